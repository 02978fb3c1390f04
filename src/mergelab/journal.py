"""Which tensors of a merge are done, one line each, and the sha256 of the files they fill."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import xxhash

from mergelab.progress import Bar
from mergelab.writer import Flusher, Planned

PATTERN = "journal-*.jsonl"
HASH = "xxh3_128"
PIECE = 1 << 18  # stays in the cache until it is hashed


class Journal:
    """The finished tensors of all processes that build a folder; this one adds to its own file.

    `noted` holds every hash that any process noted of a tensor, `done` those that this process
    wrote or has found in the file. They are xxh3_128: it finds damage, and costs next to nothing;
    the sha256 of whole files are taken once more, of what is in the file."""

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
                    self.noted.setdefault(str(entry["tensor"]), set()).add(str(entry[HASH]))

    def add(self, name: str, found: str) -> None:
        """Note a tensor whose bytes are written."""
        line = json.dumps({"tensor": name, HASH: found}) + "\n"
        with self._lock:
            with self.path.open("ab") as file:
                file.write(b"" if file.tell() == 0 or self._clean else b"\n")
                file.write(line.encode())
            self._clean = True
            self.done[name] = found

    _clean = False  # is the end of our file known to be the end of a line?

    def holds(self, tensor: Planned, progress: Bar) -> bool:
        """Is the tensor noted, and are its bytes those that were noted?"""
        noted = self.noted.get(tensor.name)
        found = tensor_hash(self.folder, tensor, progress) if noted else ""
        if not noted or found not in noted:
            return False
        self.done[tensor.name] = found
        return True


def tensor_hash(folder: Path, tensor: Planned, progress: Bar) -> str:
    """Hash of a written tensor's bytes; of fewer bytes if the file ends before."""
    digest = xxhash.xxh3_128()
    with suppress(FileNotFoundError), (folder / tensor.file).open("rb") as file:
        for piece in pieces(file.fileno(), tensor, progress):
            digest.update(piece)
    return digest.hexdigest()


def pieces(handle: int, tensor: Planned, progress: Bar) -> Iterator[memoryview]:
    """The bytes of a written tensor, read from its open file; each piece lasts until the next."""
    position, end = tensor.offset, tensor.offset + tensor.nbytes
    piece = memoryview(bytearray(min(PIECE, tensor.nbytes)))
    while count := os.preadv(handle, [piece[: end - position]], position):
        yield piece[:count]
        progress.check()
        position += count


class FileHashes:
    """sha256 of weight files, taken in the order of their tensors while others are merged.

    Whoever has written a tensor hashes all that is ready, unless another worker is at it: no
    thread more than there are workers, and what was just written is still in the cache."""

    def __init__(
        self,
        folder: Path,
        headers: Mapping[str, bytes],
        tensors: Sequence[Planned],
        progress: Bar,
    ) -> None:
        self.found: dict[str, str] = {}
        self._folder, self._headers, self._tensors = folder, headers, tensors
        self._progress = progress
        self._written: set[str] = set()
        self._taken = 0
        self._turn = threading.Lock()
        self._steps = self._hash()
        next(self._steps)

    def written(self, tensor: Planned) -> None:
        """Note a tensor whose bytes are in their file."""
        self._written.add(tensor.name)
        while self._ready():  # asked again without the lock: others may have come in vain
            if not self._turn.acquire(blocking=False):
                return
            try:
                if self._ready():
                    self._taken += 1
                    next(self._steps, None)
            finally:
                self._turn.release()

    def close(self) -> None:
        """Close the file that is being read.

        A thread that was being started at Ctrl-C is not waited for, and closes it itself."""
        with suppress(ValueError):
            self._steps.close()

    def _ready(self) -> bool:
        at = self._taken
        return at < len(self._tensors) and self._tensors[at].name in self._written

    def _hash(self) -> Generator[None, None, None]:
        """Hash one tensor at each step; a file that is complete is forced to disk."""
        for name, header in self._headers.items():
            digest = hashlib.sha256(header)
            with (self._folder / name).open("rb") as file, Flusher(file.fileno()) as flusher:
                for tensor in (tensor for tensor in self._tensors if tensor.file == name):
                    yield
                    for piece in pieces(file.fileno(), tensor, self._progress):
                        digest.update(piece)
                    flusher.wrote(tensor.nbytes)
            self.found[name] = digest.hexdigest()
