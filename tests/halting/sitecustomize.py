"""Halts a merge in its very middle, whatever the speed of the machine; for tests/test_slurm.py.

Python imports this module at its start in every process that has this folder in PYTHONPATH. A
process that has noted a tensor in its journal, and is about to note another, stops itself if the
folder where it runs has a file named `halt`: the end of the journal's name and, maybe, megabytes
of memory to take first. The file becomes `halted-PID`, so that one process is halted, once."""

import os
import signal
import sys
from contextlib import suppress

taken: list[bytes] = []


def _halt(event: str, arguments: tuple[object, ...]) -> None:
    if event != "open" or "journal-" not in str(arguments[0]):
        return
    path, _, flags = arguments
    appends = isinstance(flags, int) and flags & os.O_APPEND
    with suppress(FileNotFoundError):
        with open("halt") as file:
            journal, megabytes = file.read().split()
        if appends and str(path).endswith(journal) and os.stat(str(path)).st_size:
            os.rename("halt", f"halted-{os.getpid()}")
            taken.append(b"x" * (int(megabytes) << 20))
            os.kill(os.getpid(), signal.SIGSTOP)


sys.addaudithook(_halt)
