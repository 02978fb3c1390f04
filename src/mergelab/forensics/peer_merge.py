"""One tensor as mergekit would have made it, block by block, beside the published one.

What mergekit leaves to chance is left free: which of equal magnitudes its sort keeps, and the last
bits of a cosine that it sums over a whole tensor in its own order. The published tensor tells them;
all its entries must then follow. Memory is a few blocks, or, for vectors along the first dimension
of a tensor (nuslerp_row_wise), that tensor."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from mergelab.blocks import TensorMerge
from mergelab.checkpoint import NAMES, Tensor, from_float, to_float
from mergelab.forensics import peer
from mergelab.forensics.peer import Torch
from mergelab.forensics.peer_cuts import ALL, counted, window

Array = np.ndarray[Any, Any]
FREE = 6  # most experts whose free entries are tried in every combination
WIDTHS = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}


def recast(bits: Array, given: str, *wanted: str) -> Array:
    """Stored bits in another format, by way of each of `wanted`."""
    for dtype in wanted:
        if dtype != given:
            bits = from_float(to_float(bits, given, "<f8" if given == "F64" else "<f4"), dtype)
            given = dtype
    return bits


class Simulation(ABC):
    """What mergekit makes of one tensor; `work` is the dtype of its arithmetic.

    `merge` reads the sources; `published` is the tensor that is explained."""

    def __init__(self, merge: TensorMerge, work: str, published: Tensor) -> None:
        import torch

        self.merge, self.work, self.published = merge, work, published
        self.settings = merge.tensor.settings
        self.dtype = getattr(torch, NAMES[work])
        self.x: list[Torch] = []

    def prepare(self) -> None:  # noqa: B027 - most have nothing to look at
        """Look at the sources, where all of the tensor enters."""

    @abstractmethod
    def value(self, x: Sequence[Torch]) -> Torch:
        """The merged entries (S) from those of the models, the base first."""

    def inputs(self, start: int, stop: int) -> list[Torch]:
        """Entries [start, stop) of the models in the work dtype, the base first."""
        import torch

        values = self.merge.read(start, stop)
        if values.dtype == np.uint16:
            return list(torch.from_numpy(values.view(np.int16)).view(torch.bfloat16).to(self.dtype))
        return list(torch.from_numpy(values).to(self.dtype))

    def keys(self, magnitude: Torch) -> Array:
        """The bits of magnitudes, as integers that sort as they do."""
        import torch

        kind = torch.int16 if WIDTHS[self.work] == 2 else torch.int32
        bits: Array = magnitude.contiguous().view(kind).numpy()
        return bits.view(f"<u{bits.itemsize}")

    def stored(self, value: Torch) -> Array:
        """Merged entries as the recipe stores them, then as the published file does."""
        import torch

        if self.work == "BF16":
            bits = value.contiguous().view(torch.int16).numpy().view("<u2")
        else:
            bits = value.numpy()
        return recast(bits, self.work, self.merge.tensor.dtype, self.published.dtype)

    def blocks(self) -> Iterator[tuple[int, Array]]:
        """First element and bits of each block, once prepared."""
        for start in self.merge.starts():
            self.x = self.inputs(start, min(start + self.merge.step, self.merge.size))
            yield start, self.stored(self.value(self.x))

    def settle(self, given: Array) -> Array:
        """Which entries of the last block may hold the published bits `given` besides (S)."""
        return np.zeros(len(given), bool)

    def miscounted(self) -> str:
        """What is wrong with the number of entries kept, once all blocks are settled."""
        return ""


class Choosing(Simulation):
    """Methods that keep a number of entries, any of those that are equal at the cut.

    groups: how many choices there are, each with a number of its own. Over all blocks: sure, the
    entries that are kept for certain; least and most, how many of the free ones are kept, as far as
    the published entries tell (groups)."""

    kept: list[int]
    chosen: list[tuple[Array, Array]]

    def start(self, kept: list[int]) -> None:
        """Begin to count; `kept` is what each group's number ought to be."""
        self.kept = kept
        self.sure, self.least, self.most = (np.zeros(len(kept), np.int64) for _ in range(3))

    @abstractmethod
    def outcome(self, x: Sequence[Torch], pick: Sequence[bool], at: Any) -> Torch:
        """The merged entries `at` (of the block's) if the free ones of picked groups are kept."""

    def settle(self, given: Array) -> Array:
        import torch

        allowed = super().settle(given)
        self.sure += [np.count_nonzero(sure) for sure, _ in self.chosen]
        free = np.array([free for _, free in self.chosen])
        at = np.flatnonzero(free.any(axis=0))
        if not len(at) or len(free) > FREE:
            return allowed
        x, where = [one[torch.from_numpy(at)] for one in self.x], torch.from_numpy(at)
        without = np.zeros((len(free), len(at)), bool)  # is there an explanation without it?
        found = np.zeros((len(free), len(at)), bool)  # and one with it?
        for pick in itertools.product((True, False), repeat=len(free)):
            fits = self.stored(self.outcome(x, pick, where)) == given[at]
            for group, keep in enumerate(pick):
                (found if keep else without)[group] |= fits
        explained = found.any(axis=0) | without.any(axis=0)
        allowed[at] = explained
        self.least += (free[:, at] & ~without & explained).sum(axis=1)
        self.most += (free[:, at] & (found | ~explained)).sum(axis=1)
        return allowed

    def miscounted(self) -> str:
        if len(self.kept) > FREE:
            return ""
        least, most = self.sure + self.least, self.sure + self.most
        wrong = [
            f"{a:,} to {b:,} entries are kept where it says {kept:,}"
            for a, b, kept in zip(least, most, self.kept, strict=True)
            if not a <= kept <= b
        ]
        return "; ".join(wrong)


class Single(Simulation):
    """Methods that work on single entries."""

    function: Callable[..., Torch]

    def value(self, x: Sequence[Torch]) -> Torch:
        return type(self).function(x, self.settings)


class Copied(Simulation):
    """A tensor that only one model has."""

    def value(self, x: Sequence[Torch]) -> Torch:
        return x[0]


class Linear(Single):
    function = staticmethod(peer.linear)


class OldLinear(Single):
    function = staticmethod(peer.linear_in_dtype)


class Passthrough(Single):
    function = staticmethod(peer.passthrough)


class Nearswap(Single):
    function = staticmethod(peer.nearswap)


class Added(Simulation):
    """Task arithmetic: whole task vectors."""

    elect = False

    def value(self, x: Sequence[Torch]) -> Torch:
        base, *experts = x
        deltas = [expert - base for expert in experts]
        return peer.combine(base, deltas, self.settings, elect=self.elect)


class Trimmed(Choosing):
    """TIES and breadcrumbs: a window of magnitudes of each task vector."""

    elect, outliers = True, False

    def ranks(self, expert: int) -> tuple[int, int]:
        """Where an expert's window begins and ends, from the largest on."""
        own, size = self.settings.experts[expert], self.merge.size
        kept = int(own["density"] * size)
        if not self.outliers:
            return 0, max(1, kept) if own["density"] > 0 else 0
        below = max(0, size - kept - int(own["gamma"] * size))
        return size - below - kept, size - below

    def prepare(self) -> None:
        count = len(self.settings.experts)
        thin = [m for m in range(count) if self.settings.experts[m]["density"] < 1]
        totals = {m: np.zeros(1 << 16, np.int64) for m in thin}
        for start in self.merge.starts() if thin else ():
            x = self.inputs(start, min(start + self.merge.step, self.merge.size))
            for m in thin:
                keys = self.keys((x[m + 1] - x[0]).abs())
                totals[m] += counted(lambda keys=keys: [keys])  # type: ignore[misc]
        self.windows = [
            window(lambda m=m: self.all_keys(m), totals[m], self.ranks(m), wide=self.wide)  # type: ignore[misc]
            if m in thin
            else ALL
            for m in range(count)
        ]
        spans = [self.ranks(m) if m in thin else (0, self.merge.size) for m in range(count)]
        self.start([last - first for first, last in spans])

    @property
    def wide(self) -> bool:
        """Are keys longer than 16 bits?"""
        return WIDTHS[self.work] > 2

    def all_keys(self, expert: int) -> Iterator[Array]:
        """Keys of one expert's task vector, block by block."""
        for start in self.merge.starts():
            x = self.inputs(start, min(start + self.merge.step, self.merge.size))
            yield self.keys((x[expert + 1] - x[0]).abs())

    def value(self, x: Sequence[Torch]) -> Torch:
        deltas = [expert - x[0] for expert in x[1:]]
        self.chosen = [
            own.choose(self.keys(delta.abs()))
            for own, delta in zip(self.windows, deltas, strict=True)
        ]
        return self.outcome(x, [True] * len(deltas), slice(None))

    def outcome(self, x: Sequence[Torch], pick: Sequence[bool], at: Any) -> Torch:
        import torch

        kept = []
        for expert, keep, (sure, free) in zip(x[1:], pick, self.chosen, strict=True):
            mask = torch.from_numpy(sure | free if keep else sure)[at]
            kept.append((expert - x[0]) * mask.to(self.dtype))
        return peer.combine(x[0], kept, self.settings, elect=self.elect)


class Breadcrumbs(Trimmed):
    elect, outliers = False, True


class BreadcrumbsTies(Trimmed):
    outliers = True
