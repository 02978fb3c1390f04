"""Counts differences between two merges of one recipe, and looks for their cause.

Legend: S elements of one flat tensor. One ulp is the float32 spacing at the largest magnitude among
the float64 result and the terms that are summed to it (parity_truth.Truth)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import parity_truth
from parity_cases import Case
from parity_models import widen
from parity_truth import Truth

from mergelab.checkpoint import Tensor, open_checkpoint
from mergelab.plan import Plan
from mergelab.writer import Planned

Array = np.ndarray[Any, Any]
BF16 = 2.0**16  # one bfloat16 ulp in float32 ulps
NEAR = np.arange(-40, 41, dtype=np.float32)  # neighbours tried around recovered factors, in ulps


@dataclass(frozen=True)
class Job:
    """One case on one set of models."""

    case: Case
    models: Path
    bits: Mapping[str, Mapping[str, Array]] = field(repr=False)
    recipe: Path
    plan: Plan

    def out(self, tool: str) -> Path:
        """Folder of a tool's result."""
        return self.recipe.with_suffix(f".{tool}")

    def stored(self, model: str, tensor: Tensor) -> Array:
        """A model's tensor as float32 (S), from the bits that were drawn."""
        return widen(self.bits[Path(model).name][tensor.name]).ravel()

    def base(self, tensor: Planned) -> Array:
        """The base's part in an output tensor, as float32 (S)."""
        assert tensor.base is not None
        return self.stored("base", tensor.base)

    def experts(self, tensor: Planned) -> list[Array]:
        """The experts' parts in an output tensor, as float32 (S each)."""
        pairs = zip(tensor.models, tensor.experts, strict=True)
        return [self.stored(model, source) for model, source in pairs]


@dataclass
class Tally:
    """What was seen of one case over architectures, seeds and tensors; `worst` to `left` in ulps.

    worst: largest difference of the tools; ours, theirs: largest errors against float64;
    left: largest difference from the peer of SLERP with the peer's own two factors.
    equal: entries that TIES may keep or drop; other: those where the tools differ, not in `worst`;
    unexplained: those of them that no choice gives within one ulp."""

    case: Case
    entries: int = 0
    differing: int = 0
    worst: float = 0.0
    ours: float = 0.0
    theirs: float = 0.0
    left: float = 0.0
    equal: int = 0
    other: int = 0
    unexplained: int = 0


def compare(job: Job, tally: Tally, tool: str = "mergelab") -> None:
    """Add every tensor of a finished job to its tally."""
    ours = open_checkpoint(job.out(tool), tool)
    theirs = open_checkpoint(job.out("mergekit"), "mergekit")
    if ours.tensors.keys() != theirs.tensors.keys():
        names = ", ".join(sorted(ours.tensors.keys() ^ theirs.tensors.keys()))
        raise SystemExit(f"{job.case.name}: only one of the tools wrote {names}")
    for tensor in job.plan.tensors:
        a, b = ours.tensors[tensor.name], theirs.tensors[tensor.name]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            raise SystemExit(f"{job.case.name}: {tensor.name} is {a} here, {b} there")
        x, y = a.floats(0, a.size), b.floats(0, b.size)
        right = truth(job, tensor)
        measure(tally, right, x.astype(float), y.astype(float))
        if job.case.method == "slerp" and not job.case.stored:
            imitation = with_its_factors(job.base(tensor), job.experts(tensor)[0], y)
            apart = np.abs(imitation.astype(float) - y) / right.ulp
            tally.left = max(tally.left, float(apart.max()))


def truth(job: Job, tensor: Planned) -> Truth:
    """The right result of a tensor."""
    settings, experts = tensor.settings, job.experts(tensor)
    if job.case.method == "slerp":
        return parity_truth.slerp(job.base(tensor), experts[0], settings.shared["t"])
    weights, normalize = settings.each("weight"), settings.shared["normalize"]
    if job.case.method == "linear":
        return parity_truth.linear(experts, weights, normalize)
    base, scale = job.base(tensor), settings.shared["lambda"]
    if job.case.method == "task_arithmetic":
        return parity_truth.task_arithmetic(base, experts, weights, normalize, scale)
    densities = settings.each("density")
    return parity_truth.ties(base, experts, weights, densities, normalize, scale)


def measure(tally: Tally, right: Truth, ours: Array, theirs: Array) -> None:
    """Count the differences of one tensor; entries with another selection are counted apart."""
    unit = right.ulp * (BF16 if tally.case.stored else 1)
    apart = np.abs(ours - theirs) / unit
    same = np.ones(ours.shape, bool)
    if right.undecided is not None:
        at = right.undecided[apart[right.undecided] > 0]
        same[at] = False
        tally.equal += right.undecided.size
        tally.other += at.size
        if not tally.case.stored:
            tally.unexplained += unexplained(right, theirs, at)
    tally.entries += ours.size
    tally.differing += int(np.count_nonzero(apart[same]))

    def largest(values: Array) -> float:
        return float(np.max(values, where=same, initial=0))

    tally.worst = max(tally.worst, largest(apart))
    tally.ours = max(tally.ours, largest(np.abs(ours - right.value) / unit))
    tally.theirs = max(tally.theirs, largest(np.abs(theirs - right.value) / unit))


def unexplained(right: Truth, theirs: Array, at: Array) -> int:
    """How many entries `at` are not within one ulp of any choice among equal magnitudes."""
    where = right.undecided
    fits = [np.abs(theirs[where] - choice) <= right.ulp[where] for choice in right.choices]
    return int(np.count_nonzero(np.isin(where, at) & ~np.any(fits, axis=0)))


def with_its_factors(base: Array, expert: Array, theirs: Array) -> Array:
    """slerp in float32 with the peer's factors, recovered from its result by least squares (S)."""
    columns = np.stack([base, expert], axis=1).astype(float)
    p, q = np.linalg.lstsq(columns, theirs.astype(float), rcond=None)[0].astype(np.float32)
    some = np.linspace(0, base.size - 1, min(base.size, 256)).astype(int)
    ps, qs = p + NEAR * np.spacing(p), q + NEAR * np.spacing(q)
    tried = ps[:, None, None] * base[some] + qs[:, None] * expert[some]
    i, j = np.unravel_index(np.argmin((tried != theirs[some]).sum(axis=-1)), (NEAR.size, NEAR.size))
    result: Array = ps[i] * base + qs[j] * expert
    return result
