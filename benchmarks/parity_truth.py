"""What each merge should give: definitions in float64, written apart from mergelab's own code.

Legend: N experts, S elements of one flat tensor; `terms` are the numbers whose sum is the result.
Discrete decisions (which entries TIES keeps, which sign wins) are taken in float32, as both tools
take them; the values that follow are float64."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Truth:
    """The right result of one tensor: `value` (S) and `scale` (S), both float64.

    scale: the largest magnitude among the result and the terms that are summed to it; one ulp is
    the float32 spacing there. `undecided` (S): entries where TIES must choose among equal
    magnitudes at its cut; `choices`: the (value, scale) of those entries for every choice."""

    value: Array
    scale: Array
    undecided: Array | None = None
    choices: tuple[tuple[Array, Array], ...] = ()

    @property
    def ulp(self) -> Array:
        """Size of one ulp (S)."""
        return spacing(self.scale)


def spacing(scale: Array) -> Array:
    """Distance from a float32 to the next larger one, at `scale`, as float64."""
    return np.spacing(scale.astype(np.float32)).astype(np.float64)


def added(terms: list[Array]) -> Truth:
    """The sum of terms."""
    value = np.sum(terms, axis=0)
    scale = np.maximum(np.abs(value), np.max(np.abs(terms), axis=0))
    return Truth(value, scale)


def linear(experts: list[Array], weights: list[float], normalize: bool) -> Truth:
    """sum(w x), divided by sum(w) if `normalize`."""
    share = float(np.sum(weights)) if normalize else 1.0
    return added([w * x.astype(float) / share for x, w in zip(experts, weights, strict=True)])


def slerp_factors(base: Array, expert: Array, t: float) -> tuple[float, float]:
    """The two factors of SLERP; a straight line above |cos| = 0.9995."""
    a, b = base.astype(float), expert.astype(float)
    cosine = float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))
    if abs(cosine) > 0.9995:
        return 1 - t, t
    angle = np.arccos(np.clip(cosine, -1, 1))
    return float(np.sin((1 - t) * angle) / np.sin(angle)), float(np.sin(t * angle) / np.sin(angle))


def slerp(base: Array, expert: Array, t: float) -> Truth:
    """Shoemake's great circle on the raw tensors."""
    p, q = slerp_factors(base, expert, t)
    return added([p * base.astype(float), q * expert.astype(float)])


def task_arithmetic(
    base: Array, experts: list[Array], weights: list[float], normalize: bool, scale: float
) -> Truth:
    """base + lambda * sum(w tau), divided by sum(w) if `normalize` and that is not 0."""
    share = float(np.sum(weights)) if normalize else 1.0
    share = 1.0 if abs(share) < 1e-8 else share
    wide = base.astype(float)
    pairs = zip(experts, weights, strict=True)
    return added([wide, *(scale * w * (x.astype(float) - wide) / share for x, w in pairs)])


def ties(
    base: Array,
    experts: list[Array],
    weights: list[float],
    densities: list[float],
    normalize: bool,
    scale: float,
) -> Truth:
    """TIES with the lowest flat index first among equal magnitudes, and what else was possible."""
    kept, equal = [], []
    for expert, density in zip(experts, densities, strict=True):
        keep, tied = trim(expert - base, density)
        kept.append(keep)
        equal.append(tied)
    truth = elect(base, experts, weights, kept, normalize, scale)
    undecided = np.any(equal, axis=0)
    at = np.flatnonzero(undecided)
    few = [x[at] for x in experts]
    choices = []
    for pick in itertools.product((False, True), repeat=len(experts)):
        pairs = zip(kept, equal, pick, strict=True)
        keeps = [np.where(e[at], p, k[at]) for k, e, p in pairs]
        choice = elect(base[at], few, weights, keeps, normalize, scale)
        choices.append((choice.value, choice.scale))
    return Truth(truth.value, truth.scale, undecided, tuple(choices))


def trim(delta: Array, density: float) -> tuple[Array, Array]:
    """Entries kept (S), and entries that any tool is free to keep or drop (S).

    k = max(1, int(density * S)) largest magnitudes; free are those equal to the k-th, if not all
    of them fit."""
    size = delta.size
    count = size if density >= 1 else max(1, int(density * size)) if density > 0 else 0
    magnitude = np.abs(delta)
    order = np.argsort(-magnitude, kind="stable")
    keep = np.zeros(size, bool)
    keep[order[:count]] = True
    if count in (0, size):
        return keep, np.zeros(size, bool)
    tied = magnitude == magnitude[order[count - 1]]
    free = tied if not keep[tied].all() else np.zeros(size, bool)
    return keep, free


def elect(
    base: Array,
    experts: list[Array],
    weights: list[float],
    kept: list[Array],
    normalize: bool,
    scale: float,
) -> Truth:
    """Elect signs by the weighted sum (0 elects plus), add the entries that agree."""
    votes = np.zeros(base.shape, np.float32)
    trimmed = []
    for expert, weight, keep in zip(experts, weights, kept, strict=True):
        delta = np.where(keep, expert - base, np.float32(0))
        trimmed.append(delta)
        votes += delta * np.float32(weight)
    sign = np.where(votes >= 0, 1, -1)
    agree = [np.sign(d * np.float32(w)) == sign for d, w in zip(trimmed, weights, strict=True)]
    share = np.sum([w * a for w, a in zip(weights, agree, strict=True)], axis=0)
    share = np.where(np.any(agree, axis=0) & (share != 0), share, 1) if normalize else 1.0
    wide = base.astype(float)
    terms = [wide]
    for expert, weight, keep, agrees in zip(experts, weights, kept, agree, strict=True):
        delta = np.where(keep & agrees, expert.astype(float) - wide, 0)
        terms.append(scale * weight * delta / share)
    return added(terms)
