"""Averages of directions: SLERP, Multi-SLERP and the Karcher mean.

All of them are sums of the models with factors that follow from norms and dot products alone."""

from __future__ import annotations

import math

import numpy as np

from mergelab.kernels import kernel
from mergelab.methods.averages import sum_plain
from mergelab.methods.base import (
    WEIGHT,
    Array,
    Block,
    Method,
    Parameter,
    Round,
    Settings,
    Stats,
    Sums,
    scope,
)
from mergelab.methods.elementary import arccos, cos, sin
from mergelab.methods.gram import add_gram, begin_gram, combine, measure_gram, square, symmetric

SHOEMAKE = "Shoemake 1985, Animating rotation with quaternion curves"
PARALLEL = 0.9995  # |cos| above which SLERP is a straight line
TINY = 1e-8  # norms up to this are not divided by
OPPOSITE = -1 + 2.0**-24  # cosines up to this are -1 in float32: no great circle is the shortest
CANCELLED = 1e-7  # means of unit vectors shorter than this have no direction in float32


@kernel
def share(t: float, angle: float) -> float:
    """SLERP's factor of the model whose share is t; an angle of 0 means a straight line."""
    return sin(t * angle) / sin(angle) if angle > 0 else t


# --- SLERP (Shoemake 1985): base and one expert, raw tensors --------------------------------------


def begin_slerp(settings: Settings, row: int) -> Sums:
    """Zero dot products of base and expert (2, 2)."""
    return {"gram": np.zeros((2, 2))}


def measure_slerp(block: Block, settings: Settings, stats: Stats, sums: Sums) -> None:
    """Dot products of base and expert."""
    add_gram(block.values, False, sums["gram"], block.numbers([]))


def conclude_slerp(sums: Sums, settings: Settings, stats: Stats) -> Stats:
    """The angle between base and expert; 0 if they are nearly parallel or opposite."""
    (aa, ab), (_, bb) = sums["gram"]
    cosine = float(ab)
    for norm in (math.sqrt(aa), math.sqrt(bb)):
        cosine /= norm if norm > TINY else 1.0
    return {"angle": 0.0 if abs(cosine) > PARALLEL else arccos(cosine)}


def slerp(block: Block, settings: Settings, stats: Stats, state: Sums, out: Array) -> None:
    """Move along the great circle from base to expert (S): the factors apply to the raw tensors.

    Nearly parallel ones are interpolated linearly; t = 0 and t = 1 are copies."""
    t, angle = float(settings.shared["t"]), stats["angle"]
    if t in (0, 1):
        out[:] = block.values[int(t)]
    else:
        sum_plain(block.values, block.numbers([share(1 - t, angle), share(t, angle)]), out)


# --- Multi-SLERP: the direction of the mean -------------------------------------------------------


def multislerp_factors(sums: Sums, settings: Settings, stats: Stats) -> Stats:
    """Factors that give the direction of the weighted mean of unit vectors the mean norm.

    The exponential map of the published formula is the identity: its tangent vectors, weighted,
    sum to zero. ValueError if the directions cancel."""
    gram, eps = symmetric(sums["gram"]), float(settings.shared["eps"])
    weights = np.array(settings.each("weight"), float)
    if settings.shared["normalize_weights"]:
        weights = weights / weights.sum()
    norms = np.sqrt(np.diag(gram))
    shares = weights / (norms + eps)
    length = math.sqrt(square(shares, gram))
    if not length < max(eps, CANCELLED * np.abs(shares * norms).sum()):
        return {"factors": list(shares * ((weights * norms).sum() / length))}
    if len(weights) > 2 and norms.max() > eps:
        raise ValueError(
            "the weighted mean of the models' directions is zero, so that Multi-SLERP has no "
            "direction to go. Use other weights."
        )
    return {"factors": list(weights)}


def check_weights(settings: Settings) -> str | None:
    """What is wrong with these settings: weights to be divided by their sum must have one."""
    weights = settings.each("weight")
    if not settings.shared.get("normalize_weights", True) or None in weights:
        return None
    return None if abs(sum(weights)) >= TINY else "the weights sum to 0. Use other weights."


def multislerp(block: Block, settings: Settings, stats: Stats, state: Sums, out: Array) -> None:
    """The normalised mean direction times the mean norm; a single model is left as it is (S)."""
    if len(settings.experts) == 1:
        out[:] = block.values[-1]
    else:
        combine(block, stats["factors"], out)


# --- Karcher mean: the point from which the logarithms of all models sum to zero ------------------


def karcher_factors(sums: Sums, settings: Settings, stats: Stats) -> Stats:
    """Riemannian mean of unit vectors, as factors of the raw tensors, times the mean norm.

    All iterates lie in the span of the models, so that they are followed by their coordinates
    (Karcher 1977; arXiv 2603.04972). Norms up to `tol` count as zero: they have no direction."""
    gram, tol = symmetric(sums["gram"]), float(settings.shared["tol"])
    weights = np.array(settings.each("weight"), float)
    weights = weights / weights.sum()
    norms = np.sqrt(np.diag(gram))
    used = (norms > tol) & (weights > 0)
    if not used.any():
        return {"factors": list(weights)}
    lengths = np.where(norms > tol, norms, np.inf)
    cosines = gram / lengths[:, None] / lengths
    alphas = np.where(used, weights, 0.0)
    alphas = alphas / alphas.sum()
    mean = alphas
    if math.sqrt(square(mean, cosines)) < max(tol, CANCELLED):
        mean = np.where(np.arange(len(norms)) == np.argmax(used), 1.0, 0.0)
    mean = mean / math.sqrt(square(mean, cosines))
    for _ in range(int(settings.shared["max_iter"])):
        tangent = mean_logarithm(mean, alphas, cosines, tol)
        length = math.sqrt(square(tangent, cosines))
        if length <= tol:
            break
        mean = cos(length) * mean + sin(length) / length * tangent
        mean = mean / math.sqrt(square(mean, cosines))
    return {"factors": list(mean * (weights * norms).sum() / lengths)}


def mean_logarithm(mean: Array, alphas: Array, cosines: Array, tol: float) -> Array:
    """Weighted sum of the tangent vectors from the mean towards each model, in coordinates (N).

    Models nearer than `tol`, and those opposite, pull nowhere."""
    tangent = np.zeros_like(mean)
    for i in np.flatnonzero(alphas):
        along = min(1.0, float((mean * cosines[i]).sum()))
        angle = arccos(along)
        if angle > tol and along > OPPOSITE:
            pull = alphas[i] * angle / sin(angle)
            tangent[i] += pull
            tangent -= pull * along * mean
    return tangent


def karcher(block: Block, settings: Settings, stats: Stats, state: Sums, out: Array) -> None:
    """Karcher mean of the directions, times the mean norm; a single model is left as it is (S)."""
    if len(settings.experts) == 1:
        out[:] = block.values[0]
    else:
        combine(block, stats["factors"], out)


SLERP = Method(
    "slerp",
    2,
    "Spherical interpolation from the base (t = 0) to one other model (t = 1).",
    "needed",
    (1, 1),
    (
        Parameter(
            "t", "number", False, None, "position between base and model", 0.0, 1.0, required=True
        ),
        scope("one angle per tensor, as mergekit, or one of the whole flattened models"),
    ),
    slerp,
    (Round(begin_slerp, measure_slerp, conclude_slerp),),
    lone="copy",
    papers=(SHOEMAKE,),
    differs=("the angle comes from float64 sums over fixed blocks: last bits may differ",),
)

MULTISLERP = Method(
    "multislerp",
    1,
    "Weighted mean of the models' directions, times their mean norm; with a base, of task vectors.",
    "optional",
    (1, None),
    (
        WEIGHT,
        Parameter("normalize_weights", "flag", False, True, "divide the weights by their sum"),
        Parameter("eps", "number", False, 1e-8, "added to norms that are divided by", 1e-30, 1.0),
    ),
    multislerp,
    (Round(begin_gram, measure_gram, multislerp_factors),),
    check=check_weights,
    papers=(
        "Goddard 2024, Multi-SLERP, https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    ),
    differs=(
        "in closed form, from dot products in float64: last bits may differ",
        "eps is added to norms only: mergekit turns its result by it, too",
        "directions that cancel to within 1e-7 count as cancelled: mergekit returns rounding noise "
        "where it does not see it",
        "task vectors that are all zero give the base (mergekit: an error from three models on)",
    ),
)

KARCHER = Method(
    "karcher",
    1,
    "Karcher (Riemannian) mean of the models' directions, times their mean norm.",
    "ordinary",
    (1, None),
    (
        Parameter("weight", "number", True, 1.0, "share of this model", 0.0),
        Parameter("max_iter", "integer", False, 10, "most iterations", 0, 100_000),
        Parameter("tol", "number", False, 1e-5, "stops when a step is shorter", 0.0, 1.0),
    ),
    karcher,
    (Round(begin_gram, measure_gram, karcher_factors),),
    check=check_weights,
    papers=("Karcher 1977, Riemannian center of mass; arXiv 2603.04972",),
    differs=(
        "takes weights (mergekit: all equal)",
        "iterates on dot products in float64: last bits may differ",
        "tensors of which no model has a norm above tol are averaged (mergekit: zeros)",
    ),
)
