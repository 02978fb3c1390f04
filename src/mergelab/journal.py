"""Which tensors of an interrupted or divided merge are done, one line each."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from mergelab.writer import Planned

PATTERN = "journal-*.jsonl"
PIECE = 1 << 20


class Journal:
    """The finished tensors of all processes that build a folder; this one adds to its own file.

    `noted` holds every sha256 that any process noted of a tensor, `done` those that this process
    wrote or has found in the file."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.path = folder / PATTERN.replace("*", name)
        self.noted: dict[str, set[str]] = {}
        self.done: dict[str, str] = {}
        self._lock = threading.Lock()
        self.load()

    def load(self) -> None:
        """Read what every process has written; a line that a kill cut short does not count."""
        for path in sorted(self.folder.glob(PATTERN)):
            for line in path.read_bytes().splitlines():
                with suppress(ValueError, KeyError, TypeError, RecursionError):
                    entry = json.loads(line)
                    self.noted.setdefault(str(entry["tensor"]), set()).add(str(entry["sha256"]))

    def add(self, name: str, sha256: str) -> None:
        """Note a tensor whose bytes are written."""
        line = json.dumps({"tensor": name, "sha256": sha256}) + "\n"
        with self._lock:
            with self.path.open("ab") as file:
                file.write(b"" if file.tell() == 0 or self._clean else b"\n")
                file.write(line.encode())
            self._clean = True
            self.done[name] = sha256

    _clean = False  # is the end of our file known to be the end of a line?

    def holds(self, tensor: Planned) -> bool:
        """Is the tensor noted, and are its bytes those that were noted?"""
        noted = self.noted.get(tensor.name)
        found = tensor_sha256(self.folder, tensor) if noted else ""
        if not noted or found not in noted:
            return False
        self.done[tensor.name] = found
        return True


def tensor_sha256(folder: Path, tensor: Planned) -> str:
    """sha256 of a written tensor's bytes; of fewer bytes if the file ends before."""
    digest = hashlib.sha256()
    with suppress(FileNotFoundError), (folder / tensor.file).open("rb") as file:
        for piece in pieces(file.fileno(), tensor):
            digest.update(piece)
    return digest.hexdigest()


def pieces(handle: int, tensor: Planned) -> Iterator[bytes]:
    """The bytes of a written tensor, read from its open file."""
    position, end = tensor.offset, tensor.offset + tensor.nbytes
    while position < end:
        piece = os.pread(handle, min(PIECE, end - position), position)
        if not piece:
            return
        yield piece
        position += len(piece)
