"""Time and memory that a stranger's program, such as a chat template, may take in our process."""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

STATM = Path("/proc/self/statm")  # pages of this process, in all first


@contextmanager
def bounded(seconds: float, memory: int) -> Iterator[None]:
    """Inside, `memory` more bytes than now raise MemoryError (on Linux), and `seconds` of processor
    time TimeoutError (on the main thread)."""
    with _memory(memory), _time(seconds):
        yield


@contextmanager
def _memory(more: int) -> Iterator[None]:
    if not STATM.is_file():
        yield
        return
    now = int(STATM.read_text().split()[0]) * resource.getpagesize()
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = now + more if before == resource.RLIM_INFINITY else min(now + more, before)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))


@contextmanager
def _time(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> NoReturn:
        raise TimeoutError(f"it takes more than {seconds:g} seconds")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 1.0)  # again, should it once be swallowed
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
