"""Least squares: a tensor as a weighted sum of its sources (linear, slerp, task arithmetic).

child = total x reference + sum of a_k (x_k - reference): the sources are nearly parallel, so that
only their differences are a sound basis. The reference's own weight is total - sum of a_k."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergelab.forensics.samples import Sample

Array = np.ndarray[Any, Any]
ROUNDED = 0.5  # rms, in rounding steps, up to which a residual is rounding (once: 0.289)
TWICE = 0.42  # the same, in steps of the largest input, where inputs were rounded before (0.409)
HOPELESS = 8.0  # rms that no weighing of the entries will bring down to rounding
FAR, FEW = 2.5, 0.005  # steps that rounding hardly reaches; share of entries that may be beyond
SIGMAS = 6.0  # standard errors that a coefficient must be away from 0 to count
LEAST, LEAST_IN_TENSOR = 0.01, 0.03  # weights below these are not told from none
BIG = 1024  # entries of a tensor that says enough by itself
SOME = 0.03  # share of the tensors that must need a parent that the pooled fit does not need
SINGULAR = 1e-13  # of the largest eigenvalue: directions that the sources do not span
TOO_SURE = 1.5  # ordinary standard errors are too small where errors are unequal


@dataclass(frozen=True)
class Fit:
    """One tensor's fit. names (K): sources that differ here; coefficients, errors (K).

    total: the sum of coefficients, with its standard error; rms: residual in rounding steps;
    beyond: share of entries off by more than FAR steps; left, moved, apart: lengths of the
    residual, of child minus reference, and of source minus reference (rms over the sources);
    limit: the rms that rounding explains; cosines (K, K) of the sources."""

    tensor: str
    names: tuple[str, ...]
    coefficients: Array
    errors: Array
    total: float
    total_error: float
    size: int
    rms: float
    beyond: float
    left: float
    moved: float
    apart: float
    limit: float
    cosines: Array

    @property
    def rounded(self) -> bool:
        """Is the residual rounding alone?"""
        return self.rms <= self.limit and self.beyond * self.size <= max(1.0, FEW * self.size)

    @property
    def r2(self) -> float:
        """Share of the difference from the reference that is explained."""
        return max(0.0, 1 - (self.left / self.moved) ** 2) if self.moved else 1.0

    def weight(self, name: str) -> float | None:
        """Coefficient of a source; None if it does not differ from others here."""
        return float(self.coefficients[self.names.index(name)]) if name in self.names else None

    def error(self, name: str) -> float:
        """Standard error of that coefficient."""
        return float(self.errors[self.names.index(name)]) if name in self.names else math.inf


def fit(sample: Sample, reference: str, names: Sequence[str]) -> Fit | None:
    """Fit one tensor by the reference and the named sources; None if nothing differs from it.

    Each entry is weighed by its rounding step if rounding, once or of inputs, too, is all that is
    left then; else alike."""
    base = sample.source(reference)
    kept = [n for n in names if n in sample.names and n != reference]
    kept = [n for n in kept if np.any(sample.source(n) != base)]
    delta = sample.child - base
    if base.size < 4 * (len(kept) + 1) or not (kept or delta.any()):
        return None
    columns = np.stack([base, *(sample.source(n) - base for n in kept)])
    every = (reference, *kept)
    apart = float(np.linalg.norm(columns[1:])) / math.sqrt(max(1, len(kept)))
    plain = _fit(sample, every, columns, delta, sample.coarse, apart, weigh=False)
    for unit in (sample.unit, sample.coarse) if plain.rms < HOPELESS else ():
        weighed = _fit(sample, every, columns, delta, unit, apart, weigh=True)
        if weighed.rounded:
            return weighed
    return plain


def _fit(
    sample: Sample,
    names: tuple[str, ...],
    columns: Array,
    delta: Array,
    unit: Array,
    apart: float,
    *,
    weigh: bool,
) -> Fit:
    known = 1 / unit if weigh else np.ones(1)
    found, inverse = _solve(columns * known, delta * known)
    residual = delta - found @ columns
    freedom = max(1, delta.size - len(found))
    floor = float(np.square(unit * known).mean()) / 400
    variance = TOO_SURE**2 * max(float(np.square(residual * known).sum()) / freedom, floor)
    signs = np.concatenate([[1.0], -np.ones(len(found) - 1)])  # of total - sum of a_k
    errors = np.sqrt(variance * np.concatenate([[signs @ inverse @ signs], np.diag(inverse)[1:]]))
    steps = np.abs(residual) / unit
    return Fit(
        sample.tensor.name,
        names,
        np.concatenate([[1 + found[0] - found[1:].sum()], found[1:]]),
        errors,
        1 + float(found[0]),
        math.sqrt(variance * inverse[0, 0]),
        delta.size,
        math.sqrt(float(np.square(steps).mean())),
        float((steps > FAR).mean()),
        float(np.linalg.norm(residual)),
        float(np.linalg.norm(delta)),
        apart,
        ROUNDED if unit is sample.unit else TWICE,
        _cosines(np.stack([sample.source(n) for n in names])),
    )


def _solve(columns: Array, target: Array) -> tuple[Array, Array]:
    """Least squares coefficients and the inverse of the Gram matrix, refined once."""
    lengths = np.sqrt(np.square(columns).sum(axis=1))
    lengths[lengths == 0] = 1.0
    scaled = columns / lengths[:, None]
    values, vectors = np.linalg.eigh(scaled @ scaled.T)
    good = values > SINGULAR * values[-1]
    inverse = (vectors[:, good] / values[good]) @ vectors[:, good].T
    found = inverse @ (scaled @ target)
    found = found + inverse @ (scaled @ (target - found @ scaled))
    return found / lengths, inverse / np.outer(lengths, lengths)


def _cosines(rows: Array) -> Array:
    gram = rows @ rows.T
    lengths = np.sqrt(np.diag(gram))
    lengths[lengths == 0] = 1.0
    found: Array = gram / np.outer(lengths, lengths)
    return found


def pooled(fits: Sequence[Fit], name: str) -> tuple[float, float]:
    """Mean coefficient over the tensors, each weighed by its precision, and its standard error."""
    known = [(f.weight(name), f.error(name)) for f in fits if name in f.names]
    if not known:
        return 0.0, math.inf
    values, errors = (np.array(column, float) for column in zip(*known, strict=True))
    precision = 1 / np.maximum(errors, 1e-9) ** 2
    return float((values * precision).sum() / precision.sum()), float(precision.sum() ** -0.5)


def needed(fits: Sequence[Fit], name: str) -> bool:
    """Is a source's weight told from 0: over all tensors, or in some share of them?"""
    mean, error = pooled(fits, name)
    if abs(mean) > max(LEAST, SIGMAS * error):
        return True
    big = [f for f in fits if f.size >= BIG and name in f.names]
    own = [
        f for f in big if abs(f.weight(name) or 0) > max(LEAST_IN_TENSOR, SIGMAS * f.error(name))
    ]
    return len(own) >= max(2, SOME * len(big))
