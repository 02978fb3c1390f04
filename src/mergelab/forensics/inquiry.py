"""What is asked of `infer`: the child, its candidates and base, and what was found on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from typing import TypeVar

import numpy as np

from mergelab.checkpoint import Checkpoint, Tensor
from mergelab.errors import UserError
from mergelab.forensics import readings, sparse, stacks
from mergelab.forensics.dense import BIG, Fit, fit, needed, pooled
from mergelab.forensics.origins import alike, copies, fingerprint, origins
from mergelab.forensics.samples import Sample, take
from mergelab.progress import bar

T = TypeVar("T")
R = TypeVar("R")
AS_CLOSE = 1.05  # times the residual of the larger set
LARGEST = 4  # tensors that a smaller set of sources is tried on first
PASSES = 4  # of leaving out what is not needed
PARTS, PART = 512, 1 << 14  # most tensors, and entries of each, for the tests of masks
ENTRIES = 1 << 20  # of all of them
GAIN = 0.01  # by which a parent must raise that share
Places = dict[str, dict[str, Tensor]]


class Inquiry:
    """One question. places: per child tensor, what it may come from; same: its copies; fits: least
    squares of whole models; found: the sources that they need, with mean weights; partial: the
    largest share of entries that masks explained."""

    def __init__(
        self,
        model: Checkpoint,
        candidates: Mapping[str, Checkpoint],
        base: Checkpoint | None,
        workers: int,
    ) -> None:
        self.model, self.workers = model, workers
        self.notes: list[str] = []
        self.base = base.label if base else None
        self.pool = self.distinct(candidates, base)
        self.places: Places = origins(model, self.pool)
        self.check()
        self.same = copies(model, self.pool)
        self.fits: list[Fit] = []
        self.found: dict[str, float] = {}
        self.reference = self.base
        self.partial = 0.0

    def distinct(
        self, candidates: Mapping[str, Checkpoint], base: Checkpoint | None
    ) -> dict[str, Checkpoint]:
        """The models without those whose weights another one has, too."""
        every = ({base.label: base} if base else {}) | {
            name: c for name, c in candidates.items() if not base or name != base.label
        }
        seen: dict[tuple[str, ...], str] = {}
        kept = {}
        for name, checkpoint in every.items():
            mark = fingerprint(checkpoint)
            if mark in seen and alike(checkpoint, every[seen[mark]]):
                self.notes.append(f"{name} has the same weights as {seen[mark]}: left out")
            else:
                seen.setdefault(mark, name)
                kept[name] = checkpoint
        return kept

    def check(self) -> None:
        """Raise UserError if nothing can be compared; note what cannot."""
        model = self.model
        names = [n for n in self.pool if n != self.base]
        if not names:
            raise UserError(
                f"model {model.label}: no candidate parents are left to compare with. Name at "
                "least one that is not the base."
            )
        missing = [n for n, tensors in self.places.items() if not tensors]
        if len(missing) == len(self.places):
            raise UserError(
                f"model {model.label}: shares no tensor (name and shape) with any candidate "
                f"({', '.join(names)}). Are they of the same architecture?"
            )
        routers = set(stacks.routers(model))
        lost = [n for n in missing if n not in routers]
        if lost:
            self.notes.append(
                f"{len(lost)} tensors have no counterpart in any candidate, {lost[0]} among them"
            )
        for name in names:
            lacks = sum(name not in t for n, t in self.places.items() if n not in routers and t)
            if lacks:
                self.notes.append(f"{name} lacks {lacks} of the tensors, or has other shapes")

    def each(self, work: Callable[[T], R], items: Sequence[T], what: str) -> list[R]:
        """Results of work in the order of the items, with a bar."""
        with (
            bar(what, len(items), "tensors") as progress,
            ThreadPoolExecutor(self.workers) as threads,
        ):

            def step(item: T) -> R:
                found = work(item)
                progress.advance()
                return found

            return list(threads.map(step, items))

    def sample(self, name: str, limit: int) -> Sample | None:
        """The sample of one tensor and its sources."""
        return take(self.model.tensors[name], self.places[name], limit)

    # --- sums of whole models -----------------------------------------------------------------

    def fit_all(self, reference: str, names: Sequence[str]) -> list[Fit]:
        """Least squares of every tensor that has a reference and differs from it."""

        def work(name: str) -> Fit | None:
            sample = take(self.model.tensors[name], self.places[name])
            return fit(sample, reference, names) if sample else None

        usable = [n for n, tensors in self.places.items() if reference in tensors]
        return [f for f in self.each(work, usable, "fit") if f]

    def note_unread(self) -> None:
        """Note tensors that could not be looked at; raise UserError if that leaves none."""
        read = {f.tensor for f in self.fits} | self.same.keys()
        left = [n for n, tensors in self.places.items() if tensors and n not in read]
        lost = [n for n in left if self.model.tensors[n].size and not self.sample(n, BIG)]
        if lost:
            self.notes.append(
                f"{len(lost)} tensors hold entries that are not finite, or integers that differ, "
                f"and were left out, {lost[0]} among them"
            )
        if not read:
            raise UserError(
                f"model {self.model.label}: no tensor can be compared with the candidates' "
                "(entries are infinite or not a number, or integers). Download the models again."
            )

    def fit_dense(self) -> None:
        """Leave out sources that no fit needs, until all are needed."""
        names = list(self.pool)
        reference = self.base or names[0]
        for _ in range(PASSES):
            self.fits = self.fit_all(reference, names)
            kept = [n for n in names if needed(self.fits, n)]
            if not kept:
                kept = [max(names, key=lambda n: abs(pooled(self.fits, n)[0]))]
            if self.base is None and reference not in kept:
                reference = max(kept, key=lambda n: pooled(self.fits, n)[0])
            elif kept == names or (self.base and {*kept, reference} == {*names, reference}):
                break
            names = kept if reference in kept else [*kept, reference]
        self.reference = reference
        self.found = readings.weights(self.fits, names)
        self.leave_mixtures()

    def leave_mixtures(self) -> None:
        """Keep the fewest sources that explain everything: one may itself be a merge of others."""
        names = list(self.found)
        if len(names) < 3 or not self.rounded:
            return
        largest = sorted(self.fits, key=lambda f: (-f.size, f.tensor))[:LARGEST]
        for chosen in _subsets(names, self.base):
            reference = self.base or chosen[0]
            if all(self.holds(f, reference, chosen) for f in largest):
                fits = self.fit_all(reference, chosen)
                if all(f.rounded for f in fits):
                    self.fits, self.reference = fits, reference
                    self.found = readings.weights(fits, list(dict.fromkeys([reference, *chosen])))
                    others = ", ".join(n for n in names if n not in chosen)
                    self.notes.append(f"candidates are mixtures of one another; with {others} "
                                      "besides, the weights would not be determined")  # fmt: skip
                    return

    def holds(self, known: Fit, reference: str, names: Sequence[str]) -> bool:
        """Do these sources explain a tensor up to rounding, and as closely as more of them do?"""
        sample = take(self.model.tensors[known.tensor], self.places[known.tensor])
        found = fit(sample, reference, names) if sample and reference in sample.names else None
        return found is not None and found.rounded and found.rms <= AS_CLOSE * known.rms

    @property
    def rounded(self) -> bool:
        """Do sums of whole models explain every tensor?"""
        return bool(self.fits) and all(f.rounded for f in self.fits)

    # --- sums of masked task vectors ----------------------------------------------------------

    def parts(self, names: Sequence[str], base: str) -> list[sparse.Part]:
        """Task vectors and the child's own, in rounding steps, of tensors that say enough."""
        whole = {base, *names}
        usable = [
            n
            for n, tensors in self.places.items()
            if self.model.tensors[n].size >= BIG and whole <= tensors.keys()
        ]
        chosen = (
            [usable[i * len(usable) // PARTS] for i in range(PARTS)]
            if len(usable) > PARTS
            else usable
        )

        limit = min(PART, ENTRIES // max(1, len(chosen)))

        def work(name: str) -> sparse.Part | None:
            sources = {n: self.places[name][n] for n in (base, *names)}
            sample = take(self.model.tensors[name], sources, limit)
            if sample is None:
                return None
            start = sample.source(base)
            unit = np.maximum(sample.unit, np.median(sample.unit))
            taus = (sample.sources[1:] - start) / unit
            moved = (sample.child - start) / unit
            bound = 0.51 * sample.unit / unit
            return sparse.Part(name, moved, taus, unit, bound) if taus.any(axis=1).all() else None

        return [p for p in self.each(work, chosen, "masks") if p]

    def unmask(self, base: str) -> tuple[sparse.Outcome, list[sparse.Part]]:
        """The best masked sum of the candidates that the dense fit needs, with few parents."""
        others = [n for n in self.pool if n != base]
        strength = {n: abs(pooled(self.fits, n)[0]) for n in others}
        names = sorted((n for n in others if n in self.found), key=lambda n: -strength[n])
        names = names[: sparse.MOST]
        parts = self.parts(names, base) if names else []
        if not parts:
            return sparse.NOTHING, []
        return self.prune(parts, names, 1.0)

    def prune(
        self, parts: list[sparse.Part], names: Sequence[str], tolerance: float
    ) -> tuple[sparse.Outcome, list[sparse.Part]]:
        """Fit masks, leaving out the parents that add nothing."""
        names, outcome = list(names), self.search(parts, names, tolerance)
        while len(names) > 1:
            without = {
                n: self.search(_without(parts, names, n), [m for m in names if m != n], tolerance)
                for n in names
            }
            least = max(without, key=lambda n: without[n].explained)
            if without[least].explained < outcome.explained - GAIN * min(tolerance, 3.0):
                break
            parts, outcome = _without(parts, names, least), without[least]
            names.remove(least)
        return sparse.settle(parts, outcome.model, tolerance), parts

    def search(
        self, parts: Sequence[sparse.Part], names: Sequence[str], tolerance: float
    ) -> sparse.Outcome:
        """Fit masks to a few entries, from the coefficients of the dense fit on."""
        guess = np.array([pooled(self.fits, n)[0] for n in names])
        return sparse.search(parts, names, guess, tolerance)


def _subsets(names: Sequence[str], base: str | None) -> list[tuple[str, ...]]:
    """Proper subsets of at most half a dozen names, the smallest first; the base is in each."""
    free = [n for n in names if n != base][:6]
    found = [c for size in range(1, len(free)) for c in combinations(free, size)]
    return [(base, *c) if base is not None and base in names else c for c in found]


def _without(parts: Sequence[sparse.Part], names: Sequence[str], name: str) -> list[sparse.Part]:
    return sparse.choose(parts, [i for i, n in enumerate(names) if n != name])
