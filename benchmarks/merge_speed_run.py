"""Run a program as a user would and measure it: wall time, CPU time, peak anonymous memory.

And the page cache before it, and the machine below it."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import numpy as np
import peer

MERGE = 5 * 10**9  # bytes of memory and output that the largest merge here takes
SAMPLE = 0.05  # seconds between two looks at the memory of a process and its children


@dataclass(frozen=True)
class Run:
    """Seconds of wall and CPU time, peak anonymous bytes; `failed`: empty, or what went wrong."""

    wall: float
    cpu: float
    anonymous: int
    failed: str = ""

    @property
    def late(self) -> bool:
        """Was it stopped at its time limit?"""
        return self.failed == LATE


LATE = "stopped at the time limit"


def measured(
    command: Sequence[object], log: Path, *, environ: Mapping[str, str], limit: float
) -> Run:
    """Run `command` beside its `log`, from start to end of its process; killed after `limit` s."""
    peak, ended, late = [0], threading.Event(), threading.Event()
    with log.open("w") as stream:
        started = time.monotonic()
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=log.parent,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "", **environ},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )

    def kill() -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def stop() -> None:
        late.set()
        kill()

    def watch() -> None:
        while not ended.wait(SAMPLE):
            peak[0] = max(peak[0], anonymous(process.pid))

    watcher, timer = threading.Thread(target=watch), threading.Timer(limit, stop)
    watcher.start()
    timer.start()
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:  # Ctrl-C reaches this process only
        kill()
        raise
    finally:
        wall = time.monotonic() - started
        timer.cancel()
        ended.set()
        watcher.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    failed = LATE if late.is_set() else ""
    if process.returncode and not failed:
        failed = f"exit code {process.returncode}: {log.read_text(errors='replace')[-600:].strip()}"
    return Run(wall, usage.ru_utime + usage.ru_stime, peak[0], failed)


def anonymous(pid: int) -> int:
    """RssAnon of a process and its descendants, in bytes; 0 for those that have just ended."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                total = int(line.split()[1]) * 1024
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(map(anonymous, map(int, (task / "children").read_text().split())))
    except OSError:
        pass
    return total


def middle(runs: Sequence[Run]) -> Run:
    """Median wall and CPU time, highest memory; the first failure if there is one."""
    broken = next((run for run in runs if run.failed), None)
    if broken:
        return broken
    walls, cpus = [run.wall for run in runs], [run.cpu for run in runs]
    return Run(median(walls), median(cpus), max(run.anonymous for run in runs))


def warm(files: Iterable[Path]) -> None:
    """Read every file once, so that it is in the page cache."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(_read, {path.resolve() for path in files}))


def _read(path: Path) -> None:
    buffer = bytearray(2**22)
    with path.open("rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass


def back_memory() -> None:
    """Touch free memory, as much as a merge takes at most, and give it back.

    The host of a virtual machine may take free pages away; whoever writes next would wait for
    them."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemFree:"))
    np.ones(min(MERGE, free * 4 // 5), np.uint8)


def cool(files: Iterable[Path]) -> None:
    """Drop the files from the page cache (they must be on the disk: see os.sync)."""
    os.sync()
    for path in {path.resolve() for path in files}:
        with path.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def machine(root: Path, python: Path | None) -> str:
    """Processor, memory, kernel, disk and versions, one line."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), cpu)
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    mine = ", ".join(f"{name} {installed(name)}" for name in ("mergelab", "numpy", "numba"))
    theirs = ", ".join(pin.replace("==", " ") for pin in peer.PINS[:4])
    return (
        f"{cpu}, {os.cpu_count()} cores, {ram:.0f} GB, {platform.system()} {platform.release()}, "
        f"{disk(root)}; Python {platform.python_version()}, {mine}"
        + (f"; the peer: {theirs}" if python else "")
    )


def installed(package: str) -> str:
    """The version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def disk(folder: Path) -> str:
    """File system and device below a folder."""
    mounts = [line.split()[:3] for line in Path("/proc/mounts").read_text().splitlines()]
    inside = [m for m in mounts if folder.is_relative_to(m[1])]
    device, _, kind = max(inside, key=lambda mount: len(mount[1]))
    return f"{kind} on {device}"
