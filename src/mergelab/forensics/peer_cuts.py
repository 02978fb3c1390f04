"""Which entries mergekit keeps where it sorts by magnitude: TIES, breadcrumbs, SCE.

Its sort is not stable: of equal magnitudes at a cut it keeps any. In bfloat16 a large part of a
task vector is such entries, so three kinds are told apart: kept, dropped, free.

Legend: a key is the bits of a magnitude in float32, as an integer; G groups of entries that are
sorted, each with a cut: the least key that may lie within a rank, counted from the largest key on,
and the least one that surely does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mergelab.forensics.peer_kernels import HALF
from mergelab.methods.base import Array
from mergelab.methods.trim import kth

BEYOND = 1 << 31  # above every key
Count = Callable[[Array], Array]  # keys per half of a key (G, HALF); see peer_kernels.count_keys


def windows(
    ranks: Sequence[tuple[int, int]], size: int, counts: Array, count: Count, *, wide: bool
) -> tuple[Array, Array]:
    """Ranges of keys beyond a first rank up to a last one: what may be kept, what surely is (G, 2).

    counts (G, HALF): how often each upper half of a key occurs; wide: do they differ in their lower
    halves, too, which `count` counts?"""
    first, last = zip(*ranks, strict=True)
    begin, end = (cuts(each, size, counts, count, wide=wide) for each in (first, last))
    allowed = np.stack([end[:, 0], begin[:, 1]], axis=1)
    sure = np.stack([end[:, 1], begin[:, 0]], axis=1)
    return allowed.astype(np.uint32), sure.astype(np.uint32)


def cuts(ranks: Sequence[int], size: int, counts: Array, count: Count, *, wide: bool) -> Array:
    """The cut of each group (G, 2), at its rank; see `windows`."""
    open = [group for group, rank in enumerate(ranks) if 0 < rank < size]
    found = np.array([[BEYOND if rank <= 0 else 0] * 2 for rank in ranks], np.int64)
    places = {group: kth(counts[group], ranks[group]) for group in open}
    if wide and open:
        upper = np.array([places[g][0] if g in places else -2 for g in range(len(ranks))])
        lower = count(upper)
    for group, (key, belong) in places.items():
        equal = int(counts[group, key])
        key *= HALF
        if wide:
            low, belong = kth(lower[group], belong)
            key, equal = key + low, int(lower[group, low])
        found[group] = key, key + (belong < equal)
    return found
