"""Where output bytes go: tensors placed in shards, files preallocated, the result put in place."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mergelab.checkpoint import BITS, SINGLE, Tensor
from mergelab.errors import UserError
from mergelab.methods.base import Settings
from mergelab.methods.sparsify import random_key
from mergelab.progress import size

RECORD = "merge.json"
FLUSH = 1 << 27  # bytes written to a file before they are forced to disk
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ESTALE)
LONGEST = 200  # bytes of a folder's name; working names beside it are longer


@dataclass(frozen=True)
class Planned:
    """One output tensor: `offset` bytes into `file`; `copied` ones keep the source's values.

    `experts` and `models` are in recipe order; `settings` holds their parameters."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    base: Tensor | None
    experts: tuple[Tensor, ...]
    models: tuple[str, ...]
    settings: Settings
    copied: bool
    file: str = ""
    offset: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes in the output."""
        return self.size * np.dtype(BITS[self.dtype]).itemsize

    @property
    def sources(self) -> tuple[Tensor, ...]:
        """Every tensor that is read."""
        return (*([self.base] if self.base else []), *self.experts)

    def keys(self, seed: int) -> tuple[tuple[int, int], ...]:
        """One random key per expert, from seed, model as the recipe names it, and tensor name."""
        return tuple(random_key(seed, model, self.name) for model in self.models)


def lay_out(
    tensors: list[Planned], shard_size: int
) -> tuple[tuple[Planned, ...], dict[str, bytes]]:
    """Give each tensor its shard and offset, in order of names, and make the shards' headers."""
    shards: list[list[Planned]] = [[]]
    room = shard_size
    for tensor in tensors:
        if shards[-1] and tensor.nbytes > room:
            shards.append([])
            room = shard_size
        shards[-1].append(tensor)
        room -= tensor.nbytes
    placed: list[Planned] = []
    headers: dict[str, bytes] = {}
    for number, shard in enumerate(shards, start=1):
        many = len(shards) > 1
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if many else SINGLE
        headers[file] = _header(shard)
        offset = len(headers[file])
        for tensor in shard:
            placed.append(dataclasses.replace(tensor, file=file, offset=offset))
            offset += tensor.nbytes
    return tuple(placed), headers


def _header(shard: list[Planned]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in shard:
        span = [offset, offset + tensor.nbytes]
        shape = list(tensor.shape)
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": shape, "data_offsets": span}
        offset = span[1]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def check_space(out: Path, needed: int) -> None:
    """Raise UserError if the disk of `out` has less than `needed` bytes free."""
    place = out.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"{out}: the merge needs {size(needed)}, but only {size(free)} of disk are free "
            "there. Free some space or choose another folder with -o."
        )


def check_target(out: Path, inputs: Sequence[Path]) -> None:
    """Raise UserError if a model cannot be put at `out`, or must not: over an input, say."""
    if out.name in ("", ".."):
        raise UserError(f"{out}: write the folder's own name after -o.")
    if len(os.fsencode(out.name)) > LONGEST:
        raise UserError(f"{out}: this name is too long. Choose a shorter one with -o.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(out.parent, os.W_OK):
            raise UserError(f"{out}: cannot be made: {out.parent} is not writable.")
        if out.exists() and not out.is_dir():
            raise UserError(f"{out}: is a file. Choose a folder with -o.")
        here = out.resolve()
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{out}: cannot be made: {why}. Choose another -o.") from None
    for folder in (path.resolve() for path in inputs):
        if here == folder or here in folder.parents or folder in here.parents:
            raise UserError(f"{out}: overlaps an input, {folder}. Choose another folder with -o.")
    check_replaceable(out)


def check_replaceable(out: Path) -> bool:
    """Is there an earlier merge at `out`? Raises UserError if there is anything else."""
    if not out.is_dir() or not any(out.iterdir()):
        return False
    try:
        files = json.loads((out / RECORD).read_bytes())["outputs"]["files"]
        ours = {RECORD, *(file["name"] for file in files)}
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{out}: is not empty and holds no {RECORD}, so it is no earlier merge. "
            "Choose another folder with -o, or delete it."
        ) from None
    except OSError as error:
        raise UserError(
            f"{out / RECORD}: cannot be read: {error.strerror}, so {out} may be no earlier merge. "
            "Make the file readable, or choose another folder with -o."
        ) from None
    others = sorted(p.name for p in out.iterdir() if p.name not in ours)
    if others:
        raise UserError(
            f"{out}: holds {', '.join(others[:3])}, which no merge wrote and a new merge would "
            "delete. Move it away, or choose another folder with -o."
        )
    return True


def check_removable(out: Path, old: Path) -> None:
    """Raise UserError if an earlier merge at `out`, or what is left of one at `old`, must stay."""
    if old.exists():
        raise UserError(
            f"{old}: this rest of an earlier merge cannot be deleted. "
            "Delete it, or have its owner do so, and run the same command again."
        )
    if out.is_dir() and not os.access(out, os.W_OK | os.X_OK):
        raise UserError(
            f"{out}: the earlier merge there is not writable, so it cannot be replaced. "
            "Delete it or make it writable, or choose another folder with -o."
        )


def place_shards(folder: Path, headers: Mapping[str, bytes], tensors: tuple[Planned, ...]) -> None:
    """Make every shard at its full size with its header; one that is there keeps its bytes.

    No blocks are reserved: where the file system has no reservations (tmpfs, most network file
    systems) that writes everything twice. A full disk is told by `disk_errors` when it is full."""
    sizes = {file: len(header) for file, header in headers.items()}
    for tensor in tensors:
        sizes[tensor.file] += tensor.nbytes
    for file, header in headers.items():
        handle = os.open(folder / file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            os.ftruncate(handle, sizes[file])
            write_at(handle, header, 0)
        finally:
            os.close(handle)


def share(tensors: Sequence[Planned], part: int, parts: int) -> list[Planned]:
    """Part `part` (from 1) of a merge: consecutive tensors with about equal numbers of bytes."""
    total = sum(tensor.nbytes for tensor in tensors)
    mine, position = [], 0
    for tensor in tensors:
        if min(position * parts // max(1, total), parts - 1) == part - 1:
            mine.append(tensor)
        position += tensor.nbytes
    return mine


class Flusher:
    """Forces the bytes of an open file to disk in the background; at the end, all of them."""

    def __init__(self, handle: int) -> None:
        self._handle, self._waiting = handle, 0
        self._pool = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def __enter__(self) -> Flusher:
        return self

    def wrote(self, count: int) -> None:
        """Note `count` bytes written to the file."""
        self._waiting += count
        if self._waiting >= FLUSH and (self._last is None or self._last.done()):
            self.check()
            self._waiting = 0
            self._last = self._pool.submit(os.fdatasync, self._handle)

    def check(self) -> None:
        """Raise what the last flush raised: the system tells an error only once."""
        if self._last:
            self._last.result()

    def __exit__(self, kind: object, *rest: object) -> None:
        self._pool.shutdown()
        if kind is None:
            self.check()
            os.fsync(self._handle)


def is_full(error: BaseException) -> bool:
    """Is there no more room on the disk, in the quota or in the file?"""
    return isinstance(error, OSError) and error.errno in FULL


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Turn the system's errors that a user can mend (no room, no access) into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno in CLOSED:
            raise UserError(
                f"{error.filename or out}: {error.strerror}. Have its owner make it accessible "
                "or delete it, and run the same command again; or choose another folder with -o."
            ) from None
        if not is_full(error):
            raise
        if error.errno == errno.EFBIG:
            raise UserError(
                f"{out}: a file is larger than the disk or a limit (ulimit -f) allows. "
                "Choose a smaller --shard-size."
            ) from None
        raise UserError(
            f"{out}: no space left on the disk. Free some space and run the same command again."
        ) from None


def write_at(handle: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at an offset of an open file."""
    view = memoryview(data)
    while view:
        written = os.pwrite(handle, view, offset)
        view, offset = view[written:], offset + written
