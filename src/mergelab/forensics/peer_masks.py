"""The same recipe with another random mask (DARE, DELLA)? Judged entry by entry, and in the mean.

Every entry must be the base plus some of the experts' rescaled task vectors: nothing else can come
of any mask. And what masks leave on average must agree with a merge of ours whose mask is another:
projections on each task vector (their weights) and the second moment (their densities).

Legend: N experts, S entries of a block; tau (N, S) task vectors; factor: what restores a masked
task vector's L1 norm, which each mask's own luck changes a little."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mergelab.checkpoint import Tensor
from mergelab.forensics.peer_merge import recast
from mergelab.forensics.remerge_tally import DIGITS, Array, Tally, ulp
from mergelab.kernels import CHUNK, kernel, task_vectors
from mergelab.methods.base import Settings, Stats
from mergelab.methods.consensus import NO_WEIGHT
from mergelab.methods.sparsify import factors
from mergelab.writer import Planned

if TYPE_CHECKING:
    from mergelab.blocks import TensorMerge
    from mergelab.forensics.remerge_check import Checker

MOST = 6  # experts whose subsets are tried
DEVIATIONS = 5.0  # of chance that are allowed
ROUNDINGS = 8  # of one entry in the work dtype
COMMON = 4  # of them common to all entries: of a weight, and of a factor's two sums and ratio
UNEXPLAINED = 2.0**-10  # share of entries that may be beyond these bounds
ELECTS = ("dare_ties", "della")


@kernel
def judge(
    values: Array,
    published: Array,
    ours: Array,
    weights: Array,
    plan: Array,
    moments: Array,
    kind: Any,
) -> None:
    """Add a block to moments (N + 1, 5 + N).

    published, ours (S): merged entries, float64; weights (3, N): factor times weight, weight, and
    by how much the factor may be off, relative; plan: elect, normalize, divisor, lambda, relative
    error of all roundings, gain of the division, and whether subsets are tried.
    Row m: sum of (published - ours) times the signs of tau m, its squares, and from column 5 on the
    sums of tau k times those signs. Last row: difference of squares, its squares, squares of ours,
    entries that no subset explains, and entries that differ from the base."""
    experts, size = values.shape[0] - 1, values.shape[1]
    base, taus = np.empty(CHUNK, kind.dtype), np.empty((experts, CHUNK), kind.dtype)
    tau = np.empty(experts)
    for start in range(0, size, CHUNK):
        count = min(CHUNK, size - start)
        task_vectors(values, start, count, base, taus)
        for i in range(count):
            b, p = np.float64(base[i]), published[start + i]
            y, z = p - b, ours[start + i] - b
            for m in range(experts):
                tau[m] = taus[m, i]
            for m in range(experts):
                sign = np.sign(tau[m])
                moments[m, 0] += sign * (y - z)
                moments[m, 1] += (sign * (y - z)) ** 2
                for k in range(experts):
                    moments[m, 5 + k] += sign * tau[k]
            moments[experts, 0] += y * y - z * z
            moments[experts, 1] += (y * y - z * z) ** 2
            moments[experts, 2] += z * z
            moments[experts, 4] += y != 0
            if plan[6] != 0:
                explained = explain(b, tau, p, weights, plan)
                moments[experts, 3] += not explained


@kernel
def explain(base: float, tau: Array, published: float, weights: Array, plan: Array) -> bool:
    """Is an entry the base plus what some subset of the task vectors' entries (N) gives?"""
    experts = tau.shape[0]
    error = 0.0
    for m in range(experts):
        error += abs(weights[0, m] * tau[m]) * (weights[2, m] + plan[4])
    room = plan[3] * plan[5] * error + plan[4] * (abs(base) + abs(published))
    for subset in range((1 << experts) - 1, -1, -1):
        vote = 0.0
        for m in range(experts):
            if (subset >> m) & 1:
                vote += weights[0, m] * tau[m]
        for sign in (1.0, -1.0):
            if vote * sign < -error:
                continue
            merged, share = 0.0, 0.0
            for m in range(experts):
                part = weights[0, m] * tau[m]
                if (subset >> m) & 1 and (plan[0] == 0 or part * sign > 0):
                    merged += part
                    share += weights[1, m]
            if plan[1] != 0:
                divisor = plan[2] if plan[0] == 0 else share
                merged = merged / (divisor if divisor != 0 else 1.0)
            if abs(base + plan[3] * merged - published) <= room:
                return True
    return False


@dataclass
class Masked(Tally):
    """A tally of a tensor whose mask is another; `moments` as in `judge`.

    bias, luck: by how much a factor may be off through rounding, and through its mask, relative;
    weights (N): what the experts enter with, before a division by their sum; flips (2): see there.
    """

    moments: Array = field(default_factory=lambda: np.zeros((1, 6)))
    flips: Array = field(default_factory=lambda: np.zeros(2))
    weights: Array = field(default_factory=lambda: np.zeros(0))
    elects: bool = False
    bias: float = 0.0
    luck: float = 0.0


def compare(checker: Checker, tensor: Planned, published: Tensor) -> Masked:
    """Judge one tensor: what rounding and chance allow is 'other mask', all else 'different'."""
    work = checker.work(tensor)
    wide = "F64" if "F64" in {tensor.dtype, *(one.dtype for one in tensor.sources)} else "F32"
    merge = checker.merge(dataclasses.replace(tensor, dtype=wide))
    stats = merge.survey()
    settings, method, count = tensor.settings, merge.method, len(tensor.experts)
    weights = strengths(merge, stats)
    tally = Masked(
        tensor,
        published,
        moments=np.zeros((count + 1, count + 5)),
        weights=weights[1] * float(settings.shared["lambda"]),
        luck=float(weights[2].max()),
        bias=COMMON * 2.0 ** -(DIGITS[work] + 1),
        elects=method.name in ELECTS,
    )
    plan = endings(settings, method.name, work, published.dtype)
    for block in merge.blocks():
        exact = np.empty(block.values.shape[1], merge.kind)
        method.merge(block, settings, stats, {}, exact)
        bits = recast(exact, wide, tensor.dtype, published.dtype)
        at = tally.add(block.start, bits)
        given = tally.given[block.start : block.start + len(bits)]
        tally.count(bits[at], given[at], np.zeros(len(at), bool))
        merged = tally.floats(given), tally.floats(bits)
        judge(block.values, *merged, weights, plan, tally.moments, block.numbers([]))
        tally.flips += flips(exact.astype(float), merged[1], block.values[0], tally.coarse, work)
    tally.mask = judged([tally])
    return tally


def flips(exact: Array, merged: Array, base: Array, dtype: str, work: str) -> Array:
    """How far sums of entries and of squares may be moved by entries close to a rounding edge: (2).

    Task vectors of a few ulps take few values, so that one rounding on the way may move all entries
    of one value over an edge together. exact, merged (S): before and after rounding to dtype."""
    step, change = ulp(exact, dtype), np.abs(exact - base)
    error = ROUNDINGS * 2.0 ** -(DIGITS[work] + 1) * change
    step = np.where(step / 2 - np.abs(exact - merged) <= error, step, 0.0)
    return np.array([step.sum(), (step * (2 * change + step)).sum()])


def strengths(merge: TensorMerge, stats: Stats) -> Array:
    """Per expert factor times weight, weight, and by how much the factor may be off: (3, N).

    Our mask's factor stands for theirs: the L1 norm of what is kept varies from mask to mask."""
    settings, count = merge.tensor.settings, len(merge.tensor.experts)
    norms, squares = np.zeros(count), np.zeros(count)
    for block in merge.blocks():
        tau = block.values[1:].astype(float) - block.values[0]
        norms += np.abs(tau).sum(axis=1)
        squares += (tau * tau).sum(axis=1)
    own = np.array(factors(settings, stats))
    density = np.clip(settings.each("density"), 1e-9, 1.0)
    epsilon = np.array([each.get("epsilon", 0.0) for each in settings.experts])
    dropped = np.where(density < 1, 1 - density + epsilon, 0.0)
    luck = np.sqrt(2 * squares * dropped / np.maximum(density - epsilon, 1e-3))
    slack = DEVIATIONS * luck / np.maximum(norms, 1e-300)
    weights = np.array(settings.each("weight"), float)
    return np.array([own * weights, weights, slack])


def endings(settings: Settings, method: str, work: str, stored: str) -> Array:
    """How parts are put together, for `explain`."""
    weights = settings.each("weight")
    total, shared = float(sum(weights)), settings.shared
    coarse = min((work, stored), key=DIGITS.__getitem__)
    least = min((abs(w) for w in weights if w), default=1.0)
    gain = max(1.0, 1 / min(least, abs(total) or 1.0)) if shared["normalize"] else 1.0
    plan = (
        method in ELECTS,
        shared["normalize"],
        total if abs(total) >= NO_WEIGHT else 1.0,
        shared["lambda"],
        ROUNDINGS * 2.0 ** -(DIGITS[coarse] + 1),
        gain,
        len(weights) <= MOST,
    )
    return np.array(plan, float)


def judged(tallies: Sequence[Masked]) -> dict[str, Any]:
    """Do tensors, taken together, fit? With what tells it, in standard deviations of chance.

    A factor restores the L1 norm, so that the sum of a masked task vector times its signs is the
    same for every mask: only rounding, and where signs are elected luck, moves it."""
    moments = np.array([tally.moments for tally in tallies])
    size = sum(tally.size for tally in tallies)

    def gap(row: int, room: float) -> float:
        beyond = max(0.0, abs(float(moments[:, row, 0].sum())) - room)
        return beyond / math.sqrt(moments[:, row, 1].sum()) if moments[:, row, 1].any() else 0.0

    weights = [gap(m, room(tallies, m)) for m in range(moments.shape[1] - 1)]
    squares = moments[:, -1, 2]
    bias, luck = (np.array([getattr(t, name) for t in tallies]) for name in ("bias", "luck"))
    factors = float((bias * squares).sum() + np.sqrt(((luck * squares) ** 2).sum()))
    density = gap(-1, 2 * factors + sum(float(tally.flips[1]) for tally in tallies))
    unexplained = float(moments[:, -1, 3].sum())
    fits = max(*weights, density) <= DEVIATIONS and unexplained <= max(1.0, UNEXPLAINED * size)
    return {
        "fits": bool(fits),
        "unexplained": unexplained / max(1, size),
        "weight_deviations": weights,
        "density_deviations": density,
        "changed": float(moments[:, -1, 4].sum()) / max(1, size),
    }


def room(tallies: Sequence[Masked], expert: int) -> float:
    """By how much an expert's sum of signs may be off: roundings add up, luck adds in squares."""
    certain, chance = 0.0, 0.0
    for tally in tallies:
        parts = np.abs(tally.weights * tally.moments[expert, 5:])
        certain += tally.bias * float(parts.sum()) + float(tally.flips[0])
        lucky = parts if tally.elects else np.delete(parts, expert)
        chance += (tally.luck * float(lucky.sum())) ** 2
    return certain + math.sqrt(chance)


def together(tallies: Sequence[Tally]) -> dict[str, Any] | None:
    """The same over all tensors that have masks, and as many experts as most of them; else None."""
    masked = [tally for tally in tallies if isinstance(tally, Masked)]
    if not masked:
        return None
    counts = [len(tally.moments) for tally in masked]
    most = max(dict.fromkeys(counts), key=counts.count)
    return judged([tally for tally in masked if len(tally.moments) == most])
