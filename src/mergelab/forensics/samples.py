"""A fixed part of a tensor, read from the child and everything that it may come from.

Of tensors with more than LIMIT entries, runs of RUN entries at equal distances: the same on every
machine, a bounded amount of memory and reading whatever the model's size."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergelab.checkpoint import BITS, FLOATS, Tensor, to_float
from mergelab.errors import UserError

Array = np.ndarray[Any, Any]
LIMIT, RUN = 1 << 15, 1 << 10
DIGITS = {"BF16": (7, -133), "F16": (10, -24), "F32": (23, -149), "F64": (52, -1074)}
ARITHMETIC = 2.0**-21  # of the largest input: what float32 arithmetic may add to the rounding


@dataclass(frozen=True)
class Sample:
    """Entries of one child tensor and its sources.

    child (S); sources (K, S), in the order of `names`; unit (S): one rounding step of the child;
    coarse (S): one of the largest input, which is what an earlier rounding may have left."""

    tensor: Tensor
    child: Array
    names: tuple[str, ...]
    sources: Array
    unit: Array
    coarse: Array

    def source(self, name: str) -> Array:
        """The entries of one source (S)."""
        row: Array = self.sources[self.names.index(name)]
        return row


def runs(size: int, limit: int = LIMIT, run: int = RUN) -> list[tuple[int, int]]:
    """Ranges of entries to look at: all, or at most `limit` in runs from the first to the last."""
    if size <= limit:
        return [(0, size)]
    count = max(2, limit // run)
    starts = [(size - run) * i // (count - 1) for i in range(count)]
    return [(start, start + run) for start in starts]


def part(tensor: Tensor, limit: int = LIMIT, run: int = RUN) -> Array:
    """The stored bits of those ranges. Only they are read: a memory map would read around them."""
    ranges = runs(tensor.size, limit, run)
    found = np.empty(sum(stop - start for start, stop in ranges), BITS[tensor.dtype])
    place, width = found.view("u1"), found.itemsize
    with tensor.file.open("rb", buffering=0) as stream:
        if len(ranges) > 1 and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for start, stop in ranges:
            stream.seek(tensor.offset + start * width)
            count = (stop - start) * width
            if stream.readinto(place[:count].data) != count:
                raise UserError(f"{tensor.file}: became shorter while it was read. Run it again.")
            place = place[count:]
    return found


def step(values: Array, dtype: str) -> Array:
    """Distance between neighbouring numbers of the format at each value (ulp)."""
    digits, least = DIGITS[dtype]
    exponent = np.frexp(values)[1] - 1 - digits
    exponent[values == 0] = least
    found: Array = np.ldexp(1.0, np.maximum(exponent, least))
    return found


def take(
    child: Tensor, sources: Mapping[str, Tensor], limit: int = LIMIT, run: int = RUN
) -> Sample | None:
    """The sample of a tensor; None if an entry of it is not finite or it is no float."""
    tensors: Sequence[Tensor] = [child, *sources.values()]
    if not child.size or any(t.dtype not in FLOATS for t in tensors):
        return None
    rows = np.stack([to_float(part(t, limit, run), t.dtype, "<f8") for t in tensors])
    if not np.isfinite(rows).all():
        return None
    largest = np.abs(rows).max(axis=0)
    unit = np.maximum(step(rows[0], child.dtype), ARITHMETIC * largest)
    coarse = np.maximum(step(largest, child.dtype), unit)
    return Sample(child, rows[0], tuple(sources), rows[1:], unit, coarse)
