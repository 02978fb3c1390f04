"""Coefficients over the layers: constant or a gradient, SLERP's t, the knots of a recipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mergelab.checkpoint import split_layer
from mergelab.forensics.dense import Fit
from mergelab.forensics.origins import group

Array = np.ndarray[Any, Any]
PARALLEL = 0.9995  # cosine above which SLERP is linear (as in mergekit)
CLOSE = 0.004  # coefficients this near are one
SIGMAS = 5.0
KNOTS = 9  # most knots that a gradient is looked for with
FILTERS = {"attention": "self_attn", "mlp": "mlp"}  # groups that recipes filter by
Point = tuple[int | None, float, float]  # layer, value, standard error


def angle(fit: Fit, a: str, b: str) -> float:
    """Angle between two sources of a tensor; 0 where SLERP takes them for parallel."""
    cosine = float(fit.cosines[fit.names.index(a), fit.names.index(b)])
    return 0.0 if abs(cosine) > PARALLEL else math.acos(min(1.0, max(-1.0, cosine)))


def slerp_total(t: float, theta: float) -> float:
    """The sum of SLERP's two factors."""
    if theta <= 0:
        return 1.0
    return (math.sin((1 - t) * theta) + math.sin(t * theta)) / math.sin(theta)


def slerp_t(share: float, theta: float) -> float:
    """The t at which the second model has this share of the two factors' sum."""
    if theta <= 0 or not 0 < share < 1:
        return share
    ratio = share / (1 - share)
    return math.atan2(ratio * math.sin(theta), 1 + ratio * math.cos(theta)) / theta


def slerp_places(fits: Sequence[Fit], a: str, b: str) -> list[Fit]:
    """The tensors in which both models tell themselves apart."""
    return [f for f in fits if a in f.names and b in f.names]


def t_of(fit: Fit, a: str, b: str) -> float:
    """SLERP's t from a to b in one tensor."""
    x, y = fit.weight(a) or 0.0, fit.weight(b) or 0.0
    share = y / (x + y) if x + y else 0.0
    return slerp_t(share, angle(fit, a, b))


def slerp_evidence(fits: Sequence[Fit], a: str, b: str) -> tuple[float, float, int]:
    """Squared standard errors by which the sums of factors miss SLERP's, and 1; tensors that tell.

    Only tensors count in which the two differ by more than six standard errors."""
    miss, linear, count = 0.0, 0.0, 0
    for fit in slerp_places(fits, a, b):
        theta = angle(fit, a, b)
        wanted = slerp_total(t_of(fit, a, b), theta)
        if abs(wanted - 1) > 6 * fit.total_error:
            count += 1
            miss += ((fit.total - wanted) / max(fit.total_error, 1e-9)) ** 2
            linear += ((fit.total - 1) / max(fit.total_error, 1e-9)) ** 2
    return miss, linear, count


def parts(
    fits: Sequence[Fit], value: Callable[[Fit], float | None], error: Callable[[Fit], float]
) -> dict[str, list[Point]]:
    """Per group of tensors ('attention', 'mlp', 'rest'), layer, value and standard error.

    Tensors of one layer and group are averaged by their precision."""
    found: dict[str, dict[int | None, list[tuple[float, float]]]] = {}
    for fit in fits:
        own = value(fit)
        if own is not None:
            name = group(fit.tensor)
            layer = split_layer(fit.tensor)[1]
            kind = name if name in FILTERS else "rest"
            key = layer if kind != "rest" or layer is not None else None
            found.setdefault(kind, {}).setdefault(key, []).append((own, error(fit)))
    return {kind: [_mean(key, many) for key, many in by.items()] for kind, by in found.items()}


def weights(fits: Sequence[Fit], name: str) -> dict[str, list[Point]]:
    """`parts` of one source's coefficients."""
    return parts(fits, lambda fit: fit.weight(name), lambda fit: fit.error(name))


def _mean(layer: int | None, many: Sequence[tuple[float, float]]) -> Point:
    values, errors = (np.array(column, float) for column in zip(*many, strict=True))
    precision = 1 / np.maximum(errors, 1e-7) ** 2
    return (
        layer,
        float((values * precision).sum() / precision.sum()),
        float(precision.sum() ** -0.5),
    )


def constant(points: Sequence[Point]) -> float | None:
    """The one value of all points, if their spread is within their errors."""
    known = [(v, e) for _, v, e in points if e < 0.05]
    if not known:
        return None
    values, errors = (np.array(column, float) for column in zip(*known, strict=True))
    precision = 1 / np.maximum(errors, 1e-5) ** 2
    middle = float((values * precision).sum() / precision.sum())
    near = np.abs(values - middle) <= np.maximum(CLOSE, SIGMAS * errors)
    return middle if near.all() else None


def knots(points: Sequence[Point], layers: int) -> list[float] | None:
    """The fewest equidistant knots whose straight lines go through all layers' values."""
    known = sorted((layer, v, e) for layer, v, e in points if layer is not None and e < 0.05)
    if len(known) < 2 or layers < 2:
        return None
    place = np.array([layer / (layers - 1) for layer, _, _ in known])
    values, errors = np.array([v for _, v, _ in known]), np.array([e for _, _, e in known])
    for count in range(1, min(KNOTS, len(set(place.tolist()))) + 1):
        hats = _hats(place, count)
        found = np.linalg.lstsq(hats, values, rcond=1e-6)[0]
        if np.all(np.abs(hats @ found - values) <= np.maximum(CLOSE, SIGMAS * errors)):
            return [round(float(v), 4) for v in found]
    return None


def _hats(place: Array, count: int) -> Array:
    """Shares of `count` knots in the value at each place 0 to 1."""
    if count == 1:
        return np.ones((len(place), 1))
    distance = np.abs(place[:, None] * (count - 1) - np.arange(count))
    found: Array = np.maximum(0.0, 1 - distance)
    return found


def describe(groups: dict[str, list[Point]], layers: int) -> dict[str, Any]:
    """Per group: constant value, values by layer, knots (None if constant or no lines fit)."""
    found = {}
    for kind, points in sorted(groups.items()):
        same = constant(points)
        inside = {str(layer): round(v, 5) for layer, v, _ in sorted(
            (p for p in points if p[0] is not None), key=lambda p: p[0] or 0
        )}  # fmt: skip
        found[kind] = {
            "value": None if same is None else round(same, 5),
            "layers": inside,
            "knots": None if same is not None else knots(points, layers),
        }
    return found
