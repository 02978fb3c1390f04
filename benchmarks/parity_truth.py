"""What each merge should give: definitions in float64, written apart from mergelab's own code.

Legend: N experts, S elements of one flat tensor; `terms` are the numbers whose sum is the result.
Discrete decisions (which entries TIES keeps, which sign wins) are taken in float32, as both tools
take them; the values that follow are float64, with weights as the recipe's decimals."""

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
    the float32 spacing there. `undecided`: indices of entries where TIES must choose among equal
    magnitudes at its cut; `choices`: what float32 arithmetic gives there for every choice."""

    value: Array
    scale: Array
    undecided: Array | None = None
    choices: tuple[Array, ...] = ()

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
    truth = added(elect(base, experts, weights, kept, normalize, scale, np.float64))
    at = np.flatnonzero(np.any(equal, axis=0))
    few = [x[at] for x in experts]
    choices = []
    for pick in itertools.product((False, True), repeat=len(experts)):
        pairs = zip(kept, equal, pick, strict=True)
        keeps = [np.where(e[at], p, k[at]) for k, e, p in pairs]
        choices.append(sum(elect(base[at], few, weights, keeps, normalize, scale, np.float32)))
    return Truth(truth.value, truth.scale, at, tuple(choices))


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
    kind: type[np.floating[Any]],
) -> list[Array]:
    """Elect signs by the weighted sum (0 elects plus); base and the merged task vector (S each).

    In float64 the entries that agree are separate terms; in float32 they are summed first."""
    deltas = [np.where(k, x - base, np.float32(0)) for x, k in zip(experts, kept, strict=True)]
    signs = [np.sign(d * np.float32(w)) for d, w in zip(deltas, weights, strict=True)]
    votes = np.zeros_like(base)
    for delta, weight in zip(deltas, weights, strict=True):
        votes += delta * np.float32(weight)
    agree = [sign == np.where(votes >= 0, 1, -1) for sign in signs]
    share = np.zeros(base.shape, kind)
    for a, w in zip(agree, weights, strict=True):
        share += np.where(a, kind(w), kind(0))
    share = np.where((share != 0) & normalize, share, kind(1))
    parts = [
        np.where(a, d.astype(kind) * kind(w), kind(0))
        for a, d, w in zip(agree, deltas, weights, strict=True)
    ]
    if kind is np.float64:
        return [base.astype(float), *(scale * part / share for part in parts)]
    merged = sum(parts[1:], start=parts[0]) / share
    return [base, merged * kind(scale)]
