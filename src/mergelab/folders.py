"""Folders that appear whole or not at all."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from mergelab.errors import UserError


def cache_folder(name: str) -> Path:
    """$XDG_CACHE_HOME/mergelab/NAME, or ~/.cache/mergelab/NAME."""
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        cache = Path(home) if home else Path.home() / ".cache"
    except RuntimeError:  # no HOME, and a user without a name
        cache = Path(tempfile.gettempdir()) / f"cache-{os.getuid()}"
    return cache / "mergelab" / name


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Let one process at a time build `out`; the others wait. The system frees a dead one's lock.

    The lock file is deleted at the end, so a waiter must look whether it holds the file of today.
    Raises UserError if it is somebody else's, and OSError if the folder cannot be written to."""
    path = out.with_name(f".{out.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with _opened(path) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_file_at(path, file.fileno()):
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _opened(path: Path) -> IO[str]:
    try:
        return path.open("w")
    except OSError as error:
        if not path.exists():
            raise
        raise UserError(
            f"{path}: cannot be locked: {error.strerror}. Does another user work there? Wait for "
            "them, or choose another folder; if nobody does, delete this file."
        ) from None


def held(out: Path) -> bool:
    """Is a process inside `alone(out)` now?"""
    try:
        with out.with_name(f".{out.name}.lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _is_file_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def partial_folders(out: Path) -> list[Path]:
    """What interrupted processes left of `out`."""
    pattern = re.compile(rf"\.{re.escape(out.name)}\.[^.]+\.partial\Z")
    return [p for p in out.parent.glob(".*.partial") if pattern.match(p.name) and p.is_dir()]


def replaced_folder(out: Path) -> Path:
    """Where the old `out` is for the moment in which a new one takes its place."""
    return out.with_name(f".{out.name}.replaced")


def partial_folder(out: Path, key: str) -> Path:
    """A hidden folder beside `out` to build it in; leftovers with another key are removed.

    A leftover with the same key is kept: an interrupted download goes on from there.
    `key` holds no dot, so that the leftovers of "m" are told from those of "m.v2"."""
    partial = out.with_name(f".{out.name}.{key}.partial")
    for left in partial_folders(out):
        if left != partial:
            shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True, exist_ok=True)
    return partial


@contextmanager
def building(out: Path, key: str) -> Iterator[Path]:
    """An empty folder beside `out` that takes its place at the end; gone after an error.

    What a killed process left is emptied first. To be used inside `alone`."""
    partial = partial_folder(out, key)
    shutil.rmtree(partial)
    partial.mkdir()
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    move_into_place(partial, out)


def move_into_place(partial: Path, out: Path) -> None:
    """Rename the finished folder to `out`, in place of what was there."""
    sync(partial)
    old = replaced_folder(out)
    if old.is_symlink():
        old.unlink()
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    partial.rename(out)
    sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Force a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
