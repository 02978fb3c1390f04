"""One tensor re-merged and compared while it is made: nothing is written.

First with mergelab's own numbers. Where they differ, an entry is explained by rounding if the
published number is what the exact result rounds to, give or take the float32 rounding errors of the
method's steps: that is what another program's float32 arithmetic gives, whatever its order. Or the
tensor is made as mergekit makes it, in the recipe's dtype, and must then agree but for strays."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mergelab.blocks import Buffers, Files, TensorMerge
from mergelab.checkpoint import DTYPES, FLOATS, Tensor
from mergelab.forensics.peer_merge import WIDTHS, Simulation, recast
from mergelab.forensics.peer_select import simulated, simulation
from mergelab.forensics.remerge_tally import DIGITS, Array, Tally, not_finite, ulp, unsigned
from mergelab.methods.base import Stats, Sums
from mergelab.parameters import first_match
from mergelab.plan import Plan
from mergelab.writer import Planned

OURS = "mergelab"
STEPS = 4  # operations of a merge, besides two per expert, that each round once
MANY = "they are of equal magnitude at a cut, and of so many experts not all choices are tried"
STRAY_ULPS = 2  # by which a stray in 16-bit arithmetic may be off, at the scale of its terms


class Checker:
    """Compares tensors of one plan with published ones."""

    def __init__(self, plan: Plan, seed: int) -> None:
        self.plan, self.seed, self.method = plan, seed, plan.recipe.method
        self.files, self.buffers = Files(), Buffers()
        self.surveyed: Mapping[str, tuple[Stats, Sums]] = {}

    def merge(self, tensor: Planned) -> TensorMerge:
        """Reads and merges one tensor; entries that are not finite are compared like others."""
        return TensorMerge(self.method, tensor, self.seed, self.files, self.buffers, lenient=True)

    def output(self, tensor: Planned) -> Iterator[Array]:
        """The merged bits, block by block, with statistics of the whole model if it has any."""
        stats, state = self.surveyed.get(tensor.name, (None, None))
        state = {name: value.copy() for name, value in state.items()} if state else state
        return self.merge(tensor).output(stats, state)

    def check(self, tensor: Planned, published: Tensor, numerics: str) -> Tally:
        """Compare with `numerics`: OURS, or a release of mergekit; in float64 always OURS."""
        if numerics == OURS or tensor.dtype not in FLOATS or self.work(tensor) == "F64":
            return self.ours(tensor, published)
        return self.peers(tensor, published, numerics)

    def ours(self, tensor: Planned, published: Tensor) -> Tally:
        """With mergelab's numbers; only if they differ, once more with the unrounded ones."""
        tally, start = Tally(tensor, published), 0
        for made in self.output(tensor):
            bits = recast(made, tensor.dtype, published.dtype)
            at = tally.differ(start, bits)
            given = tally.given[start : start + len(bits)]
            tally.count(bits[at], given[at], np.ones(len(at), bool))
            start += len(bits)
        if tally.off and not tensor.copied and tensor.dtype in FLOATS:
            tally.off, tally.far = self.beyond_rounding(tensor, published)
        return tally

    def beyond_rounding(self, tensor: Planned, published: Tensor) -> tuple[int, int]:
        """How many published entries are not what the unrounded result may round to.

        And how many of them are farther off than dropping task vectors' entries, or not, moves them
        (of methods without a base this says nothing)."""
        wide = "F64" if "F64" in {tensor.dtype, *(s.dtype for s in tensor.sources)} else "F32"
        stored, off, far, start = np.asarray(published.bits()), 0, 0, 0
        for made in self.output(dataclasses.replace(tensor, dtype=wide)):
            stop = start + len(made)
            bits = recast(made, wide, tensor.dtype, published.dtype)
            at = np.flatnonzero(unsigned(bits) != unsigned(stored[start:stop]))
            if len(at):
                given = published.floats(start, stop, "<f8")[at]
                exact = made[at].astype(float)
                room = np.zeros(len(at))
                for dtype in dict.fromkeys((tensor.dtype, published.dtype)):
                    room += ulp(given, dtype) / 2 if dtype != wide else 0
                rows = [s.floats(start, stop, "<f8")[at] for s in tensor.sources]
                room += self.error(tensor, np.abs(rows).sum(axis=0) + np.abs(exact), wide)
                off += int(np.count_nonzero(~(np.abs(exact - given) <= room)))
                room += 2 * gain(tensor) * sum(np.abs(row - rows[0]) for row in rows)
                far += int(np.count_nonzero(~(np.abs(exact - given) <= room)))
            start = stop
        return off, far

    def error(self, tensor: Planned, scale: Array, dtype: str) -> Array:
        """Bound of the rounding errors of all steps in a dtype, at the scale of the terms (S)."""
        count = STEPS + 2 * len(tensor.sources)
        return count * gain(tensor) * scale * 2.0 ** -(DIGITS[dtype] + 1)

    def peers(self, tensor: Planned, published: Tensor, release: str) -> Tally:
        """As a release of mergekit makes it."""
        work = self.work(tensor)
        narrow = min(WIDTHS[work], WIDTHS[published.dtype]) == 2
        tally = Tally(tensor, published, narrow=narrow)
        made = simulation(self.merge(tensor), work, published, release)
        made.prepare()
        for start, bits in made.blocks():
            self.explain(tally, made, bits, tally.differ(start, bits), start)
        tally.miscounted = made.miscounted()
        tally.undecided = MANY if tally.untried and not tally.wrong else ""
        return tally

    def explain(self, tally: Tally, made: Simulation, bits: Array, at: Array, start: int) -> None:
        """Count the differing entries `at` of a block: other choices, strays, and what is off."""
        given = tally.given[start : start + len(bits)]
        chosen, untried = made.settle(given)[at], made.untried(at)
        tally.chosen += int(np.count_nonzero(chosen))
        at, untried = at[~chosen], untried[~chosen]
        if not len(at):
            return
        expected, stored = tally.floats(bits[at]), tally.floats(given[at])
        rows = made.terms(at)
        scale = gain(tally.tensor) * (np.abs(rows).sum(axis=0) + np.abs(expected))
        if tally.narrow:
            coarse = min((made.work, tally.published.dtype), key=DIGITS.__getitem__)
            room = STRAY_ULPS * ulp(scale, coarse)
        else:
            room = self.error(tally.tensor, scale, "F32")
        apart = np.abs(expected - stored)
        if untried.any():  # no choice moves an entry farther, or makes it infinite
            moves = 2 * gain(tally.tensor) * np.abs(rows[1:] - rows[0]).sum(axis=0)
            untried &= (apart <= room + moves) & (moves > 0)
            untried &= ~not_finite(given[at], tally.published.dtype)
            tally.untried += int(np.count_nonzero(untried))
            tally.fold(bits[at[untried]], given[at[untried]])
        rest = at[~untried]
        tally.count(bits[rest], given[rest], ~(apart <= room)[~untried])

    def work(self, tensor: Planned) -> str:
        """The dtype of mergekit's arithmetic: the recipe's, or the narrowest that holds all."""
        asked = first_match(self.plan.recipe.dtype, tensor.name)
        if asked:
            return DTYPES[str(asked.value)]
        stored = {source.dtype for source in tensor.sources}
        if stored == {"F16", "BF16"}:
            return "F32"
        return next(dtype for dtype in FLOATS if dtype in stored)

    def releases(self, tensors: list[Planned]) -> list[str]:
        """The releases of mergekit that can be followed for all of these tensors.

        In float64 none is: nobody merges in it, but a buffer may be stored so."""
        some = [t for t in tensors if t.dtype in FLOATS and self.work(t) != "F64"]
        return [
            release
            for release in ("0.1.5", "0.1.4")
            if some
            and all(
                t.copied or simulated(self.method.name, dict(t.settings.shared), release)
                for t in some
            )
        ]


def gain(tensor: Planned) -> float:
    """By how much the factors of a merge may enlarge its terms, and with them their errors."""
    settings: dict[str, Any] = dict(tensor.settings.shared)
    own = [abs(float(e.get("weight", e.get("scale", 1)) or 0)) for e in tensor.settings.experts]
    total = abs(sum(float(e.get("weight", 1) or 0) for e in tensor.settings.experts))
    divisor = min(1.0, total) if settings.get("normalize") and total else 1.0
    return max(1.0, *own) * max(1.0, abs(float(settings.get("lambda", 1)))) / divisor
