"""Tensors that a LoRA adapter changes, computed block by block while they are read.

W + s B A (Hu et al. 2021, arXiv 2106.09685), and DoRA, m (W + s B A) / |W + s B A| (Liu et al.
2024, arXiv 2402.09353), as merge_and_unload of peft 0.21 computes them, but never rounded.

Legend: W (rows, columns) is the stored weight; A (r, in), B (out, r) the factors, s the scale, m
(out) the magnitudes. W is (out, in), or `turned`, (in, out): Conv1D layers and embeddings."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mergelab.checkpoint import Tensor
from mergelab.kernels import CHUNK, kernel
from mergelab.methods.base import BLOCK, Array


@kernel
def add_product(left: Array, right: Array, scale: Any, start: int, out: Array) -> None:
    """Add scale * (left @ right), flattened, from entry `start` on to `out` (S).

    left (rows, r), right (r, columns). Each entry is summed over the rank in order."""
    rank, columns = right.shape
    total = np.empty(CHUNK, out.dtype)
    done = 0
    while done < out.size:
        row = (start + done) // columns
        column = (start + done) - row * columns
        count = min(CHUNK, columns - column, out.size - done)
        total[:count] = 0
        for k in range(rank):
            factor, line = left[row, k], right[k, column : column + count]
            for i in range(count):
                total[i] = total[i] + factor * line[i]
        piece = out[done : done + count]
        for i in range(count):
            piece[i] = piece[i] + scale * total[i]
        done += count


class Last(threading.local):
    """The factors that a worker decoded last, by their key: they stay while it reads one tensor."""

    held: tuple[tuple[Path, str, str], tuple[Array, Array]] | None = None


@dataclass(frozen=True)
class Update:
    """What LoRA adds to one weight: s B A, or its transpose; with DoRA's magnitudes if it has any.

    `last` is shared by the updates of one adapter."""

    a: Tensor
    b: Tensor
    scale: float
    turned: bool
    magnitude: Tensor | None
    last: Last = field(repr=False)

    def factors(self, work: str) -> tuple[Array, Array]:
        """left (rows, r) and right (r, columns) in the working precision, from the files."""
        key, held = (self.a.file, self.a.name, work), self.last.held
        if held is None or held[0] != key:
            a, b = (t.floats(0, t.size, work).reshape(t.shape) for t in (self.a, self.b))
            left, right = (a.T, b.T) if self.turned else (b, a)
            held = self.last.held = key, (np.ascontiguousarray(left), np.ascontiguousarray(right))
        return held[1]


@dataclass(frozen=True, eq=False)
class Adapted:
    """A tensor that an adapter changes: `weight` (the model's own, or one the adapter replaces it
    by) and its update. `stored` is the model's tensor and gives name, shape and nominal dtype."""

    stored: Tensor
    weight: Tensor
    update: Update | None
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)
    _factors: dict[str, Array] = field(default_factory=dict, init=False, repr=False)

    @property
    def name(self) -> str:
        """The model's name of the tensor."""
        return self.stored.name

    @property
    def dtype(self) -> str:
        """The dtype in which the model stores the tensor; what is read is not rounded to it."""
        return self.stored.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The model's shape, (rows, columns) where there is an update."""
        return self.stored.shape

    @property
    def file(self) -> Path:
        """The model's file, whose hash belongs to the record like the adapter's."""
        return self.stored.file

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.stored.size

    @property
    def nbytes(self) -> int:
        """Number of bytes that are read."""
        parts = (self.update.a, self.update.b) if self.update else ()
        return self.weight.nbytes + sum(part.nbytes for part in parts)

    def floats(self, start: int, stop: int, work: str = "<f4") -> Array:
        """Elements [start, stop), computed in float32 (or float64); not rounded to the dtype."""
        values = self._sum(start, stop, work)
        if self.update and self.update.magnitude:
            index = np.arange(start, stop)
            columns = self.shape[1]
            index = index % columns if self.update.turned else index // columns
            values *= self._dora(self.update, self.update.magnitude, work)[index]
        return values

    def _sum(self, start: int, stop: int, work: str) -> Array:
        values = np.asarray(self.weight.floats(start, stop, work))
        if self.update:
            left, right = self.update.factors(work)
            scale = values.dtype.type(self.update.scale)
            add_product(left, right, scale, start, values)
        return values

    def _dora(self, update: Update, magnitude: Tensor, work: str) -> Array:
        """m / |W + s B A| (out), once per tensor; the norms are summed in float64."""
        with self._lock:
            if work not in self._factors:
                norms = np.sqrt(self._squares(update.turned, work)).astype(work)
                with np.errstate(divide="ignore", invalid="ignore"):
                    self._factors[work] = magnitude.floats(0, magnitude.size, work) / norms
            return self._factors[work]

    def _squares(self, turned: bool, work: str) -> Array:
        """Sums of squares of the rows, or of the columns if turned; a few rows at a time."""
        rows, columns = self.shape
        sums = np.zeros(columns if turned else rows)
        step = max(1, BLOCK // columns)
        for row in range(0, rows, step):
            stop = min(row + step, rows)
            block = self._sum(row * columns, stop * columns, work).astype(float)
            squares = np.square(block).reshape(-1, columns)
            if turned:
                for line in squares:
                    sums += line
            else:
                sums[row:stop] = squares.sum(axis=1)
        return sums
