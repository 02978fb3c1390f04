"""Which entries mergekit keeps where it sorts by magnitude: TIES, breadcrumbs, SCE.

Its sort is not stable: of equal magnitudes at a cut it keeps any. In bfloat16 a large part of a
task vector is such entries, so three kinds are told apart: kept, dropped, free.

Legend: a key is the bits of a magnitude in the work dtype, as an integer; S entries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
HALF = 1 << 16
BEYOND = 1 << 62  # above every key
Keys = Callable[[], Iterable[Array]]


@dataclass(frozen=True)
class Cut:
    """The key of a rank, from the largest on; `split`: do equal ones lie beyond the rank, too?"""

    key: int
    split: bool

    def within(self, keys: Array) -> tuple[Array, Array]:
        """Which entries (S) surely lie within the rank, and which may."""
        if self.split:
            return keys > self.key, keys == self.key
        return keys >= self.key, np.zeros(keys.shape, bool)


@dataclass(frozen=True)
class Window:
    """Entries beyond the rank of `first` up to that of `last`."""

    first: Cut
    last: Cut

    def choose(self, keys: Array) -> tuple[Array, Array]:
        """Which entries (S) are surely kept, and which are free."""
        dropped, perhaps_dropped = self.first.within(keys)
        kept, perhaps_kept = self.last.within(keys)
        sure = kept & ~dropped & ~perhaps_dropped
        return sure, (kept | perhaps_kept) & ~dropped & ~sure


ALL = Window(Cut(BEYOND, False), Cut(0, False))


def counted(keys: Keys, *, upper: int | None = None) -> Array:
    """How often each upper half of the keys occurs; with `upper`, each lower half below that one.

    Keys of 16 bits are their own upper half."""
    counts = np.zeros(HALF, np.int64)
    for block in keys():
        wide = block.dtype.itemsize == 4
        high = (block >> np.uint32(16)) if wide else block
        if upper is not None:
            high = (block & np.uint32(HALF - 1))[high == upper]
        counts += np.bincount(high.astype(np.uint16), minlength=HALF)
    return counts


def find(counts: Array, rank: int) -> tuple[int, int]:
    """The value of the rank-th largest of counted values, and how many of its equals belong."""
    above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(above, rank))
    value = HALF - 1 - place
    return value, rank - int(above[place] - counts[value])


def window(keys: Keys, counts: Array, ranks: Sequence[int], *, wide: bool) -> Window:
    """The window between two ranks. counts: of upper halves; wide: are keys 32 bits long?"""
    size, found = int(counts.sum()), []
    for rank in ranks:
        if rank <= 0 or rank >= size:
            found.append(Cut(BEYOND if rank <= 0 else 0, False))
            continue
        key, belong = find(counts, rank)
        equal = int(counts[key])
        if wide:
            lower = counted(keys, upper=key)
            low, belong = find(lower, belong)
            key, equal = (key << 16) + low, int(lower[low])
        found.append(Cut(key, belong < equal))
    return Window(*found)
