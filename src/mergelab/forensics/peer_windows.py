"""mergekit's methods that keep some entries of each task vector, any of those equal at a cut.

Which ones it kept the published tensor tells: each of its entries must be what some choice gives,
and as many must be kept as the recipe says."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterable
from functools import cached_property

import numpy as np

from mergelab.forensics import peer, peer_cuts
from mergelab.forensics.peer_kernels import BF16, HALF, count_keys, merge_window
from mergelab.forensics.peer_merge import Simulation
from mergelab.kernels import kernel
from mergelab.methods.base import Array

FREE = 6  # most experts whose free entries are tried in every combination
ALONE = np.array([mask.bit_count() == 1 for mask in range(256)])  # one group, by its bit
NOTHING: Array = np.empty(0, np.uint8)
ALL = np.array([0, peer_cuts.BEYOND], np.uint32)  # the range of all keys


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
        alone, every = ALONE[self.free[at]], itertools.product((True, False), repeat=groups)
        for some, picks in (
            (at[alone], ((True,) * groups, (False,) * groups)),
            (at[~alone], every),
        ):
            if len(some):
                allowed[some] = self.explained(some, given[some], picks)
        return allowed

    def untried(self, at: Array) -> Array:
        free: Array = self.free[at] != 0
        return free if len(self.kept) > FREE else np.zeros(len(at), bool)

    def explained(self, at: Array, given: Array, picks: Iterable[tuple[bool, ...]]) -> Array:
        """Which entries `at` are what one of the picks of groups gives that keep theirs; counted.

        Bit g of an entry of found, without: is there an explanation with group g, and without?"""
        values = np.empty((len(self.values), len(at)), self.values.dtype)
        gather(self.values, at, values)
        found, without = np.zeros((2, len(at)), np.uint8)
        for pick in picks:
            bits = self.bits[at]
            if not all(pick):
                keep = np.where(np.array(pick)[:, None], self.allowed, self.sure)
                bits = self.stored(self.choose(values, keep, keep, self.certain, NOTHING))
            fits = (bits == given).view(np.uint8)
            chosen = sum(1 << group for group, with_it in enumerate(pick) if with_it)
            found |= fits * np.uint8(chosen)
            without |= fits * np.uint8(chosen ^ 0xFF)
        explained: Array = (without | found) != 0
        free = self.free[at]
        least = free & ~without & (explained.view(np.uint8) * np.uint8(0xFF))
        most = free & (found | (~explained).view(np.uint8) * np.uint8(0xFF))
        for group in range(len(self.kept)):
            self.least[group] += np.count_nonzero(least & np.uint8(1 << group))
            self.most[group] += np.count_nonzero(most & np.uint8(1 << group))
        return explained

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


class Summed(Simulation):
    """Weighted task vectors; of each, a range of keys is kept."""

    elect = False

    def choose(self, values: Array, keep: Array, sure: Array, counts: Array, free: Array) -> Array:
        """See Choosing."""
        out = self.empty(values)
        merge_window(values, keep, sure, self.weights, self.plan, self.kind, out, counts, free)
        return out

    @cached_property
    def weights(self) -> Array:
        """The experts' weights in the work dtype (N)."""
        return peer.numbers(self.settings.each("weight"), self.kind)

    @cached_property
    def plan(self) -> Array:
        """How weighted task vectors are put together."""
        return peer.plan(self.settings, self.weights, self.kind, elect=self.elect)


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


@kernel
def gather(values: Array, at: Array, out: Array) -> None:
    """Columns `at` of values (M, S)."""
    for m in range(values.shape[0]):
        row, few = values[m], out[m]
        for i in range(at.size):
            few[i] = row[at[i]]
