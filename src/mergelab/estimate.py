"""What a merge would cost before it runs: room and time, from a short probe of the disks.

A guess for people, never an input of a merge: disks are shared, and caches make second reads
faster than the probe says."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mergelab.hub_headers import origin
from mergelab.inputs import input_files
from mergelab.plan import Plan

STEP = 4 << 20  # bytes of one read or write
MOST = 32 << 20  # bytes that one probe reads or writes
PATIENCE = 0.25  # seconds after which a probe stops at the next step


def costs(plan: Plan, out: Path, *, passes: tuple[int, int]) -> dict[str, Any]:
    """Where the inputs are, the room at `out`, and the seconds that the disks will need.

    Takes under a second and leaves no file; what cannot be measured is None. The fields:

    inputs: per hub model `hub`, `commit`, and `download`, the bytes that are not here; else {}
    download: bytes to fetch from the hub in all
    hashed: bytes of all input files, read whole by the first merge, for their sha256
    passes: how often a merge reads its input tensors, at least and at most (`Plan.passes`)
    out: where the merge would go
    free: bytes free there
    read_speed, write_speed: bytes per second, just measured; None if files are too small for that
    seconds: a first merge's reading (hashed + most passes * bytes_in) and writing; no arithmetic"""
    inputs = {name: origin(model.folder) for name, model in plan.checkpoints.items()}
    download = sum({i["commit"]: i["download"] for i in inputs.values() if i}.values())
    place = _existing(out)
    hashed = bytes_hashed(plan)
    reading = None if download else read_speed(sorted(_files(plan)))
    writing = write_speed(place)
    seconds = None
    if reading and writing:
        seconds = (hashed + passes[1] * plan.bytes_in) / reading + plan.bytes_out / writing
    return {
        "inputs": inputs,
        "download": download,
        "hashed": hashed,
        "passes": passes,
        "out": str(out),
        "free": _free(place),
        "read_speed": reading,
        "write_speed": writing,
        "seconds": seconds,
    }


def bytes_hashed(plan: Plan) -> int:
    """Bytes of all input files: the first merge of them reads them whole, for their sha256."""
    return sum(file.stat().st_size for file in _files(plan))


def _files(plan: Plan) -> set[Path]:
    return {file for c in plan.checkpoints.values() for file in input_files(c)}


def read_speed(files: Iterable[Path]) -> float | None:
    """Bytes per second from the slowest of the disks that `files` are on; None if not readable.

    Reads from the middle of each disk's largest file, past the page cache where it can. Files of
    less than STEP tell no speed: a disk with no larger one does not count."""
    largest: dict[int, tuple[int, Path]] = {}
    try:
        for file in files:
            state = file.stat()
            if state.st_size < STEP:
                continue
            known = largest.get(state.st_dev, (0, file))
            largest[state.st_dev] = max(known, (state.st_size, file))
        return min((_read(file, size) for size, file in largest.values()), default=None)
    except OSError:
        return None


def _read(file: Path, size: int) -> float:
    start, count = size // 3, 0
    buffer = bytearray(STEP)
    with file.open("rb", buffering=0) as stream:
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(stream.fileno(), start, MOST, os.POSIX_FADV_DONTNEED)
        stream.seek(start)
        begun = time.perf_counter()
        while count < MOST and time.perf_counter() - begun < PATIENCE:
            got = stream.readinto(buffer)
            if not got:
                break
            count += got
        return count / (time.perf_counter() - begun)


def write_speed(folder: Path) -> float | None:
    """Bytes per second that reach the disk of `folder`; None if it cannot be written to."""
    data, count = os.urandom(STEP), 0
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as stream:
            begun = time.perf_counter()
            while count < MOST and time.perf_counter() - begun < PATIENCE:
                count += stream.write(data)
                os.fsync(stream.fileno())
            return count / (time.perf_counter() - begun)
    except OSError:
        return None


def _existing(out: Path) -> Path:
    """`out`, or the nearest folder above it that exists."""
    place = out.absolute()
    return next(p for p in (place, *place.parents) if p.is_dir())


def _free(place: Path) -> int | None:
    try:
        return shutil.disk_usage(place).free
    except OSError:
        return None
