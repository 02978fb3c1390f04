"""Natural cubic smoothing splines, many small ones at once (Green and Silverman 1994, chapter 2).

scipy's make_smoothing_spline fits one at a time, 5 ms each; a bootstrap needs thousands, of a few
points each. Legend: B splines, K knots."""

from __future__ import annotations

import numpy as np

from mergelab.detectors.base import Floats

PENALTIES = np.logspace(-4, 4, 33)  # tried by cross-validation, in units of the roughness
LEAST = 5  # knots; fewer are fitted by a straight line, the stiffest spline


def fit_many(x_BK: Floats, y_BK: Floats, weights_BK: Floats) -> Floats:
    """Fitted values at the knots, each spline's penalty chosen by generalised cross-validation.

    The knots of each row must rise strictly. Minimises sum w (y - f(x))^2 + penalty int f''^2."""
    roots = np.sqrt(weights_BK)
    rough = roughness(x_BK) / (roots[:, :, None] * roots[:, None, :])
    scale, axes = np.linalg.eigh((rough + rough.transpose(0, 2, 1)) / 2)
    scale = np.maximum(scale, 0.0)
    scale[:, :2] = 0.0  # straight lines cost nothing, however rounding has it
    part = np.einsum("bji,bj->bi", axes, roots * y_BK)
    straight = (scale == 0.0).astype(np.float64)
    kept = straight if x_BK.shape[1] < LEAST else _kept(scale, part)
    return np.asarray(np.einsum("bij,bj->bi", axes, kept * part) / roots, dtype=np.float64)


def _kept(scale: Floats, part: Floats) -> Floats:
    """How much of each component survives: 1 / (1 + penalty x scale) at the best penalty."""
    n = scale.shape[1]
    penalties = PENALTIES / np.median(scale[:, 2:], axis=1)[:, None]
    kept = 1 / (1 + penalties[:, :, None] * scale[:, None, :])
    error = ((1 - kept) ** 2 * part[:, None, :] ** 2).sum(axis=2)
    score = error / (1 - kept.sum(axis=2) / n) ** 2
    best = np.argmin(score, axis=1)
    return np.asarray(kept[np.arange(len(kept)), best], dtype=np.float64)


def roughness(x_BK: Floats) -> Floats:
    """The matrices M for which g' M g is the integral of f''^2 of the natural spline through g."""
    q, r = _bands(x_BK)
    return np.asarray(q @ np.linalg.solve(r, q.transpose(0, 2, 1)), dtype=np.float64)


def _bands(x_BK: Floats) -> tuple[Floats, Floats]:
    """Q and R of Green and Silverman: R times the inner second derivatives is Q' g."""
    h = np.diff(x_BK, axis=1)
    rows, knots = x_BK.shape
    q, r = np.zeros((rows, knots, knots - 2)), np.zeros((rows, knots - 2, knots - 2))
    for j in range(knots - 2):
        q[:, j, j], q[:, j + 2, j] = 1 / h[:, j], 1 / h[:, j + 1]
        q[:, j + 1, j] = -q[:, j, j] - q[:, j + 2, j]
        r[:, j, j] = (h[:, j] + h[:, j + 1]) / 3
        if j + 1 < knots - 2:
            r[:, j, j + 1] = r[:, j + 1, j] = h[:, j + 1] / 6
    return q, r


def evaluate_many(x_BK: Floats, g_BK: Floats, at_B: Floats) -> Floats:
    """Value of each row's natural spline through (x, g); beyond the knots it goes on straight."""
    rows, knots = x_BK.shape
    curve = np.zeros_like(g_BK)
    if knots > 2:
        q, r = _bands(x_BK)
        curve[:, 1:-1] = np.linalg.solve(r, np.einsum("bij,bi->bj", q, g_BK)[:, :, None])[:, :, 0]
    row = np.arange(rows)
    left = np.clip((x_BK <= at_B[:, None]).sum(axis=1) - 1, 0, knots - 2)
    x0, x1, g0, g1 = x_BK[row, left], x_BK[row, left + 1], g_BK[row, left], g_BK[row, left + 1]
    c0, c1, h = curve[row, left], curve[row, left + 1], x1 - x0
    at = np.clip(at_B, x_BK[:, 0], x_BK[:, -1])
    a, b = (x1 - at) / h, (at - x0) / h
    value = a * g0 + b * g1 + ((a**3 - a) * c0 + (b**3 - b) * c1) * h**2 / 6
    slope = (g1 - g0) / h + ((1 - 3 * a**2) * c0 + (3 * b**2 - 1) * c1) * h / 6
    return np.asarray(value + slope * (at_B - at), dtype=np.float64)
