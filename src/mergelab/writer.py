"""Where output bytes go: tensors placed in shards, files preallocated, the result put in place."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mergelab.checkpoint import BITS, SINGLE, Tensor
from mergelab.errors import UserError
from mergelab.folders import sync
from mergelab.methods.base import Settings
from mergelab.methods.sparsify import random_key
from mergelab.progress import size

RECORD = "merge.json"
LONGEST = 200  # characters of a folder's name; working names beside it are longer


@dataclass(frozen=True)
class Planned:
    """One output tensor: `offset` bytes into `file`; `copied` ones keep the source's bits.

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
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Number of bytes in the output."""
        return self.size * np.dtype(BITS[self.dtype]).itemsize

    @property
    def sources(self) -> tuple[Tensor, ...]:
        """Every tensor that is read."""
        return (*([self.base] if self.base else []), *self.experts)

    def keys(self, seed: int) -> tuple[int, ...]:
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
    if len(out.name) > LONGEST:
        raise UserError(f"{out}: this name is too long. Choose a shorter one with -o.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(out.parent, os.W_OK):
            raise UserError(f"{out}: cannot be made: {out.parent} is not writable.")
        if out.exists() and not out.is_dir():
            raise UserError(f"{out}: is a file. Choose a folder with -o.")
        here = out.resolve()
    except OSError as error:
        raise UserError(f"{out}: cannot be made: {error.strerror}. Choose another -o.") from None
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
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{out}: is not empty and holds no {RECORD}, so it is no earlier merge. "
            "Choose another folder with -o, or delete it."
        ) from None
    others = sorted(p.name for p in out.iterdir() if p.name not in ours and p.name[0] != ".")
    if others:
        raise UserError(
            f"{out}: holds {', '.join(others[:3])}, which no merge wrote and a new merge would "
            "delete. Move it away, or choose another folder with -o."
        )
    return True


@contextmanager
def shards(
    folder: Path, headers: Mapping[str, bytes], tensors: tuple[Planned, ...]
) -> Iterator[None]:
    """Preallocate every shard and write its header; on leaving without an error fsync all."""
    sizes = {file: len(header) for file, header in headers.items()}
    for tensor in tensors:
        sizes[tensor.file] += tensor.nbytes
    for file, header in headers.items():
        with (folder / file).open("xb") as stream:
            os.posix_fallocate(stream.fileno(), 0, sizes[file])
            write_at(stream.fileno(), header, 0)
    yield
    for file in headers:
        sync(folder / file)


@contextmanager
def disk_full(out: Path) -> Iterator[None]:
    """Turn 'no space left' and 'quota exceeded' into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(
            f"{out}: no space left on the disk; nothing was kept. "
            "Free some space and run the same command again."
        ) from None


def write_at(handle: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at an offset of an open file."""
    view = memoryview(data)
    while view:
        written = os.pwrite(handle, view, offset)
        view, offset = view[written:], offset + written
