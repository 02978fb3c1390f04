"""Exact selection: which entries are among the k largest (TIES, breadcrumbs, SCE).

The order is by key, then by index. A key is |x| as a float32, of float64 inputs too, or the
variance over the models. A survey finds the k-th key from two histograms over the halves of its
bits: exact, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mergelab.methods.base import Array, Block, Round, Settings, Stats, Sums, nothing
from mergelab.methods.sparsify import l1_ratios
from mergelab.methods.trim_kernels import (
    NONE,
    add_high,
    add_low,
    add_norms_beyond,
    count_equal,
)

HALF = 1 << 16
EVERY = 1 << 62  # more equal entries than any model has
NEAR = 3  # buckets around the expected one whose lower halves are counted at once
FAR = 3 << 14  # a first bucket that no key is near


def kth(counts: Array, k: int) -> tuple[int, int]:
    """Bucket that holds the k-th largest value, and how many of that bucket belong to the k."""
    above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(above, k))
    bucket = len(counts) - 1 - place
    return bucket, k - int(above[place] - counts[bucket])


def never(settings: Settings) -> bool:
    """The usual answer to whether ties are kept and norms restored."""
    return False


@dataclass(frozen=True)
class Trim:
    """The survey of a method that keeps a window of ranks.

    `ranks(settings, size)` gives per series of keys the ranks (C) where entries change between
    kept and dropped: C = 1, [kept]; C = 2, [dropped, dropped + kept], both from the largest on.
    `ties` says whether all entries equal to the last one kept are kept, too; `joint` whether there
    is one series, the variances, of which only those that are not 0 count. `rescale` says whether
    the L1 norms are restored."""

    ranks: Callable[[Settings, int], list[list[int]]]
    trivial: Callable[[Settings], bool]
    ties: Callable[[Settings], bool] = never
    rescale: Callable[[Settings], bool] = never
    joint: bool = False

    @property
    def rounds(self) -> tuple[Round, ...]:
        """Two histograms, then for whole-model windows the equal ones of each tensor."""
        return (
            Round(self.begin_high, self.measure_high, self.conclude_high),
            Round(self.begin_low, self.measure_low, self.conclude_low, unless="cuts"),
            Round(self.begin_seen, self.measure_seen, nothing, model_only=True),
        )

    @property
    def norms(self) -> Round:
        """The L1 norms before and after, if they are to be restored."""
        return Round(self.begin_norms, self.measure_norms, self.conclude_norms)

    def begin_high(self, settings: Settings, row: int) -> Sums:
        """Counts of upper halves, and of lower ones near the bucket that the first block suggests;
        no survey if nothing is dropped."""
        if self.trivial(settings):
            return {}
        shape = np.shape(self.ranks(settings, 1))
        guesses = settings.shared.get("scope") != "model"
        return {
            "high": np.zeros((shape[0], HALF), np.int64),
            "size": np.zeros(1, np.int64),
            "first": np.full(shape, FAR, np.uint32),
            "near": np.zeros((*shape, NEAR * guesses * HALF), np.uint32),
        }

    def measure_high(self, block: Block, settings: Settings, stats: Stats, sums: Sums) -> None:
        """Histograms of the keys' bits."""
        kind = block.numbers([])
        if block.start == 0 and block.size <= NONE and sums["near"].size:
            counts = np.zeros_like(sums["high"])
            size = add_high(block.values, self.joint, counts, sums["first"], sums["near"], kind)
            for m, cuts in enumerate(self.ranks(settings, size)):
                for c, k in enumerate(cuts):
                    if 0 < k < size:
                        sums["first"][m, c] = max(0, kth(counts[m], k)[0] - NEAR // 2)
        sums["size"] += add_high(
            block.values, self.joint, sums["high"], sums["first"], sums["near"], kind
        )

    def conclude_high(self, sums: Sums, settings: Settings, stats: Stats) -> Stats:
        """For each rank the upper half of its key, and how many of its bucket belong."""
        size = int(sums["size"][0])
        ranks = self.ranks(settings, size)
        high = np.full((len(ranks), len(ranks[0])), NONE, np.uint32)
        rest = np.zeros(high.shape, np.int64)
        for m, cuts in enumerate(ranks):
            for c, k in enumerate(cuts):
                if 0 < k < size:
                    high[m, c], rest[m, c] = kth(sums["high"][m], k)
        found = {"ranks": ranks, "size": size, "high": high, "rest": rest}
        places = high.astype(np.int64) - sums["first"]
        if sums["near"].size and np.all((high == NONE) | ((places >= 0) & (places < NEAR))):
            near = sums["near"].reshape(*places.shape, NEAR, HALF)
            low = np.take_along_axis(near, np.clip(places, 0, NEAR - 1)[..., None, None], axis=2)
            found |= self.conclude_low({"low": low[:, :, 0]}, settings, found)
        return found

    def begin_low(self, settings: Settings, row: int) -> Sums:
        """Counts of lower halves."""
        if self.trivial(settings):
            return {}
        ranks = self.ranks(settings, 1)
        return {"low": np.zeros((len(ranks), len(ranks[0]), HALF), np.int64)}

    def measure_low(self, block: Block, settings: Settings, stats: Stats, sums: Sums) -> None:
        """Histogram of the lower halves within the buckets."""
        add_low(block.values, self.joint, stats["high"], sums["low"], block.numbers([]))

    def conclude_low(self, sums: Sums, settings: Settings, stats: Stats) -> Stats:
        """Cuts (K, C, 2): the exact key as bits, and how many equal to it belong."""
        cuts = np.zeros((*stats["high"].shape, 2), np.int64)
        for m, ranks in enumerate(stats["ranks"]):
            for c, k in enumerate(ranks):
                cuts[m, c] = (NONE, 0) if k <= 0 else (0, EVERY)
                if 0 < k < stats["size"]:
                    low, rest = kth(sums["low"][m, c], int(stats["rest"][m, c]))
                    bits = (int(stats["high"][m, c]) << 16) + low
                    cuts[m, c] = (bits, EVERY if self.ties(settings) else rest)
        return {"cuts": cuts}

    def begin_seen(self, settings: Settings, row: int) -> Sums:
        """Equal keys so far, (K, C)."""
        ranks = self.ranks(settings, 1)
        return {"seen": np.zeros((len(ranks), len(ranks[0])), np.int64)}

    def measure_seen(self, block: Block, settings: Settings, stats: Stats, sums: Sums) -> None:
        """How many magnitudes equal each cut."""
        count_equal(block.values, self.cuts(settings, stats), sums["seen"], block.numbers([]))

    def begin_norms(self, settings: Settings, row: int) -> Sums:
        """L1 norms, norms of what lies beyond the cuts, and numbers of entries at them."""
        if self.trivial(settings) or not self.rescale(settings):
            return {}
        shape = np.shape(self.ranks(settings, 1))
        return {
            "before": np.zeros(shape[0]),
            "beyond": np.zeros(shape),
            "equal": np.zeros(shape, np.int64),
        }

    def measure_norms(self, block: Block, settings: Settings, stats: Stats, sums: Sums) -> None:
        """Magnitudes beyond each cut, and how many are at it: all equal, whichever of them stay."""
        found = sums["before"], sums["beyond"], sums["equal"]
        add_norms_beyond(block.values, self.cuts(settings, stats), *found, block.numbers([]))

    def conclude_norms(self, sums: Sums, settings: Settings, stats: Stats) -> Stats:
        """Factor per expert that restores its L1 norm."""
        cuts, beyond = self.cuts(settings, stats), sums["beyond"]
        at = np.minimum(cuts[..., 1], sums["equal"])
        size = np.where(at > 0, cuts[..., 0], 0).astype(np.uint32).view(np.float32)
        largest = beyond + at * size.astype(float)
        dropped = largest[:, 0] if largest.shape[1] == 2 else 0.0
        return l1_ratios({**sums, "after": largest[:, -1] - dropped}, settings, stats)

    def cuts(self, settings: Settings, stats: Stats) -> Array:
        """The cuts, or those that keep everything where there was no survey."""
        if "cuts" in stats:
            return np.asarray(stats["cuts"])
        cuts = np.zeros((*np.shape(self.ranks(settings, 1)), 2), np.int64)
        cuts[:, 0] = (NONE, 0)
        cuts[:, -1] = (0, EVERY)
        return cuts

    def factors(self, block: Block, settings: Settings, stats: Stats) -> Array:
        """Per expert, what the entries that it keeps are multiplied by (N)."""
        return block.numbers(list(stats.get("factors", [1.0] * len(settings.experts))))
