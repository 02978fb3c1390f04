"""One tensor as mergekit would have made it, block by block, beside the published one.

What mergekit leaves to chance is left free: which of equal magnitudes its sort keeps, and the last
bits of a cosine that it sums over a whole tensor in its own order. The published tensor tells them;
all its entries must then follow. Memory is a few blocks, or, for vectors along the first dimension
of a tensor (nuslerp_row_wise), that tensor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np

from mergelab.blocks import TensorMerge
from mergelab.checkpoint import Tensor, from_float, to_float
from mergelab.forensics import peer, peer_blends
from mergelab.forensics.peer_kernels import BF16, KINDS
from mergelab.kernels import encode, kernel
from mergelab.methods.base import Array

WIDTHS = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}


def recast(bits: Array, given: str, *wanted: str) -> Array:
    """Stored bits in another format, by way of each of `wanted`."""
    for dtype in wanted:
        if (given, dtype) == ("F32", "BF16"):
            wide, bits = np.ascontiguousarray(bits), np.empty(bits.shape, "<u2")
            narrow(wide, bits)
            given = dtype
        elif dtype != given:
            bits = from_float(to_float(bits, given, "<f8" if given == "F64" else "<f4"), dtype)
            given = dtype
    return bits


@kernel
def narrow(values: Array, out: Array) -> None:
    """Round to bfloat16."""
    encode(values, values.size, out, 0)


class Simulation(ABC):
    """What mergekit makes of one tensor; `work` is the dtype of its arithmetic.

    `merge` reads the sources; `published` is the tensor that is explained. values (M, S): entries
    of the last block as they were read, the base first; they are rounded to the work dtype where
    they are used. bits (S): what that block is merged to, as the published file stores it."""

    def __init__(self, merge: TensorMerge, work: str, published: Tensor) -> None:
        self.merge, self.work, self.published = merge, work, published
        self.settings, self.kind = merge.tensor.settings, KINDS[work]
        self.out = np.dtype("<u2" if self.kind == BF16 else "<f4")  # the latter for float16 too
        self.values, self.bits = np.empty((0, 0)), np.empty(0)

    def prepare(self) -> None:  # noqa: B027 - most have nothing to look at
        """Look at the sources, where all of the tensor enters."""

    @abstractmethod
    def made(self, values: Array) -> Array:
        """The merged entries (S) from those of the models (M, S): numbers of the work dtype."""

    def read(self) -> Iterator[tuple[int, Array]]:
        """First element and entries (M, S) of each block; gone when the next one is asked for."""
        for start in self.merge.starts():
            yield start, self.merge.read(start, min(start + self.merge.step, self.merge.size))

    def empty(self, values: Array) -> Array:
        """Room for the merged entries."""
        return np.empty(values.shape[1], self.out)

    def stored(self, made: Array) -> Array:
        """Merged entries as the recipe stores them, then as the published file does."""
        given = "BF16" if made.dtype == np.uint16 else "F32"
        return recast(made, given, self.merge.tensor.dtype, self.published.dtype)

    def blocks(self) -> Iterator[tuple[int, Array]]:
        """First element and bits of each block, once prepared."""
        for start, values in self.read():
            self.values, self.bits = values, self.stored(self.made(values))
            yield start, self.bits

    def terms(self, at: Array) -> Array:
        """The models' numbers (M, len(at)) at some entries of the last block, in float64."""
        dtype = "BF16" if self.values.dtype == np.uint16 else "F32"
        return to_float(self.values[:, at], dtype, "<f8")

    def settle(self, given: Array) -> Array:
        """Which entries of the last block may hold the published bits `given` besides (S)."""
        return np.zeros(len(given), bool)

    def untried(self, at: Array) -> Array:
        """Which entries `at` of the last block may be another choice that `settle` did not try."""
        return np.zeros(len(at), bool)

    def miscounted(self) -> str:
        """What is wrong with the number of entries kept, once all blocks are settled."""
        return ""


class Copied(Simulation):
    """A tensor that only one model has."""

    def made(self, values: Array) -> Array:
        out = self.empty(values)
        peer_blends.weighted(values, np.ones(1, np.float32), np.float32(0), self.kind, out)
        return out


class Linear(Simulation):
    """0.1.5: fused sums in float32, one rounding at the end."""

    def made(self, values: Array) -> Array:
        weights = np.array(self.settings.each("weight"), np.float32)
        divisor = peer.summed(weights, KINDS["F32"]) if self.settings.shared["normalize"] else 0.0
        out = self.empty(values)
        peer_blends.fused(values, weights, np.float32(divisor), self.kind, out)
        return out


class OldLinear(Simulation):
    """0.1.4: weights, products, sum and division in the work dtype."""

    def made(self, values: Array) -> Array:
        weights = peer.numbers(self.settings.each("weight"), self.kind)
        divisor = peer.summed(weights, self.kind) if self.settings.shared["normalize"] else 0.0
        out = self.empty(values)
        peer_blends.weighted(values, weights, np.float32(divisor), self.kind, out)
        return out


class Passthrough(Simulation):
    """The one model's entries times `scale`."""

    def made(self, values: Array) -> Array:
        scales = np.array(self.settings.each("scale"), np.float32)
        out = self.empty(values)
        peer_blends.weighted(values, scales, np.float32(0), self.kind, out)
        return out


class Nearswap(Simulation):
    """Towards the expert, the farther the nearer it is to the base."""

    def made(self, values: Array) -> Array:
        t, out = np.float32(self.settings.shared["t"]), self.empty(values)
        least = np.float32(peer.number(peer_blends.LEAST_DISTANCE, self.kind))
        peer_blends.near(values, t, least, self.kind, out)
        return out
