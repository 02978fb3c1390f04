"""One tensor as mergekit would have made it, block by block, beside the published one.

What mergekit leaves to chance is left free: which of equal magnitudes its sort keeps, and the last
bits of a cosine that it sums over a whole tensor in its own order. The published tensor tells them;
all its entries must then follow. Memory is a few blocks, or, for vectors along the first dimension
of a tensor (nuslerp_row_wise), that tensor."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np

from mergelab.blocks import TensorMerge
from mergelab.checkpoint import Tensor, from_float, to_float
from mergelab.forensics import peer, peer_blends, peer_cuts
from mergelab.forensics.peer_kernels import BF16, HALF, KINDS, count_keys, merge_window
from mergelab.kernels import encode, kernel
from mergelab.methods.base import Array

FREE = 6  # most experts whose free entries are tried in every combination
WIDTHS = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
NOTHING: Array = np.empty(0, np.uint8)
ALL = np.array([0, peer_cuts.BEYOND], np.uint32)  # the range of all keys


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
    they are used."""

    def __init__(self, merge: TensorMerge, work: str, published: Tensor) -> None:
        self.merge, self.work, self.published = merge, work, published
        self.settings, self.kind = merge.tensor.settings, KINDS[work]
        self.out = np.dtype("<u2" if self.kind == BF16 else "<f4")  # the latter for float16 too
        self.values = np.empty((0, 0))

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
            self.values = values
            yield start, self.stored(self.made(values))

    def terms(self, at: Array) -> Array:
        """The models' numbers (M, len(at)) at some entries of the last block, in float64."""
        dtype = "BF16" if self.values.dtype == np.uint16 else "F32"
        return to_float(self.values[:, at], dtype, "<f8")

    def settle(self, given: Array) -> Array:
        """Which entries of the last block may hold the published bits `given` besides (S)."""
        return np.zeros(len(given), bool)

    def miscounted(self) -> str:
        """What is wrong with the number of entries kept, once all blocks are settled."""
        return ""


class Choosing(Simulation):
    """Methods that keep a number of entries, any of those that are equal at the cut.

    They are chosen in groups, each with a range of keys that may be kept, and one that surely is:
    allowed, sure (G, 2). kept: how many each group ought to keep. Over all blocks: certain, entries
    kept for certain; least and most, how many of the free ones are, as far as the published entries
    tell (G). free (S): bit g is set where the last block's entry is free in group g."""

    kept: list[int]
    allowed: Array
    sure: Array

    def start(self, kept: list[int]) -> None:
        """Begin to count."""
        self.kept = kept
        self.certain, self.least, self.most = (np.zeros(len(kept), np.int64) for _ in range(3))
        self.room = np.empty(self.merge.step, np.uint8)

    @abstractmethod
    def choose(self, values: Array, keep: Array, sure: Array, counts: Array, free: Array) -> Array:
        """The merged entries if keys in the ranges `keep` (G, 2) are kept.

        Unless `free` is empty, it is filled, and counts (G) are raised by what is sure."""

    def made(self, values: Array) -> Array:
        self.free = self.room[: values.shape[1]]
        return self.choose(values, self.allowed, self.sure, self.certain, self.free)

    def settle(self, given: Array) -> Array:
        allowed = super().settle(given)
        at, groups = np.flatnonzero(self.free != 0), len(self.kept)
        if not len(at) or groups > FREE:
            return allowed
        values, given = self.values[:, at], given[at]
        free = (self.free[at] >> np.arange(groups, dtype=np.uint8)[:, None]) & 1 != 0
        without = np.zeros(free.shape, bool)  # is there an explanation without it?
        found = np.zeros(free.shape, bool)  # and one with it?
        for pick in itertools.product((True, False), repeat=groups):
            keep = np.where(np.array(pick)[:, None], self.allowed, self.sure)
            fits = self.stored(self.choose(values, keep, keep, self.certain, NOTHING)) == given
            for group, with_it in enumerate(pick):
                (found if with_it else without)[group] |= fits
        explained = found[0] | without[0]
        allowed[at] = explained
        self.least += (free & ~without & explained).sum(axis=1)
        self.most += (free & (found | ~explained)).sum(axis=1)
        return allowed

    def miscounted(self) -> str:
        if len(self.kept) > FREE:
            return ""
        least, most = self.certain + self.least, self.certain + self.most
        wrong = [
            f"{a:,} to {b:,} entries are kept where it says {kept:,}"
            for a, b, kept in zip(least, most, self.kept, strict=True)
            if not a <= kept <= b
        ]
        return "; ".join(wrong)


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


class Summed(Simulation):
    """Weighted task vectors; of each, a range of keys is kept."""

    elect = False

    def choose(self, values: Array, keep: Array, sure: Array, counts: Array, free: Array) -> Array:
        """See Choosing."""
        weights = peer.numbers(self.settings.each("weight"), self.kind)
        plan = peer.plan(self.settings, weights, self.kind, elect=self.elect)
        out = self.empty(values)
        merge_window(values, keep, sure, weights, plan, self.kind, out, counts, free)
        return out


class Added(Summed):
    """Task arithmetic: whole task vectors."""

    def made(self, values: Array) -> Array:
        every = np.tile(ALL, (len(values) - 1, 1))
        return self.choose(values, every, every, np.zeros(len(every), np.int64), NOTHING)


class Trimmed(Summed, Choosing):
    """TIES and breadcrumbs: a window of magnitudes of each task vector."""

    elect, outliers = True, False

    def ranks(self, expert: int) -> tuple[int, int]:
        """Where an expert's window begins and ends, from the largest on."""
        own, size = self.settings.experts[expert], self.merge.size
        kept = int(own["density"] * size)
        if own["density"] >= 1:
            return 0, size
        if not self.outliers:
            return 0, max(1, kept) if own["density"] > 0 else 0
        below = max(0, size - kept - int(own["gamma"] * size))
        return size - below - kept, size - below

    def prepare(self) -> None:
        ranks = [self.ranks(expert) for expert in range(len(self.settings.experts))]
        size, counts = self.merge.size, np.zeros((len(ranks), HALF), np.int64)
        if any(0 < rank < size for pair in ranks for rank in pair):
            counts = self.count(np.full(len(ranks), -1))
        self.allowed, self.sure = peer_cuts.windows(
            ranks, size, counts, self.count, wide=self.kind != BF16
        )
        self.start([last - first for first, last in ranks])

    def count(self, upper: Array) -> Array:
        """How often each half of a key occurs (N, HALF); see peer_kernels.count_keys."""
        counts = np.zeros((len(upper), HALF), np.int64)
        for _, values in self.read():
            count_keys(values, upper, self.kind, counts)
        return counts


class Breadcrumbs(Trimmed):
    elect, outliers = False, True


class BreadcrumbsTies(Trimmed):
    outliers = True
