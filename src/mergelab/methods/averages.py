"""Averages of whole models: linear, SLERP, and passthrough (no average at all)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

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
    normalize,
    total,
)

PARALLEL = 0.9995  # |cos| above which SLERP is a straight line
TINY = 1e-8  # norms up to this are not divided by


def weighted_sum(arrays: list[Array], weights: list[float]) -> Array:
    """Sum of w_m * x_m in order, each product and each sum rounded: no fused multiply-add."""
    result = np.zeros_like(arrays[0])
    for array, weight in zip(arrays, weights, strict=True):
        result += array * array.dtype.type(weight)
    return result


def fused_sum(arrays: list[Array], weights: list[float]) -> Array:
    """Sum of w_m * x_m in order; each step goes through float64, which holds the product exactly.

    What mergekit's `linear` gets from fused multiply-add where the processor has it, everywhere."""
    kind = arrays[0].dtype.type
    result: Array = np.zeros_like(arrays[0])
    for array, weight in zip(arrays, weights, strict=True):
        step = array.astype(np.float64) * np.float64(kind(weight)) + result
        result = step.astype(kind)
    return result


def sum_of_weights(weights: list[float], like: Array) -> Any:
    """Sum of the weights in order, in the precision of `like`, as mergekit adds them."""
    total = like.dtype.type(0)
    for weight in weights:
        total += like.dtype.type(weight)
    return total


def linear(block: Block, settings: Settings, stats: Stats, before: Sums) -> Array:
    """Weighted average of N models, sum(w x) or sum(w x) / sum(w) (S)."""
    weights = settings.each("weight")
    result = fused_sum(list(block.experts), weights)
    if settings.shared["normalize"]:
        result /= sum_of_weights(weights, result)
    return result


def passthrough(block: Block, settings: Settings, stats: Stats, before: Sums) -> Array:
    """The one model's entries, times `scale` (S)."""
    (values,) = block.experts
    scaled: Array = values * values.dtype.type(settings.each("scale")[0])
    return scaled


def measure_angle(block: Block, settings: Settings, stats: Stats) -> Sums:
    """Dot product and squared norms of base a and expert b over one block, in float64."""
    assert block.base is not None
    a, b = block.base.astype(np.float64), block.experts[0].astype(np.float64)
    return {"ab": total(a * b), "aa": total(a * a), "bb": total(b * b)}


def slerp_coefficients(sums: Sums, settings: Settings, stats: Stats) -> Stats:
    """The two factors of SLERP from the angle between the raw tensors (Shoemake 1985)."""
    t = float(settings.shared["t"])
    norm_a, norm_b = math.sqrt(sums["aa"]), math.sqrt(sums["bb"])
    cosine = float(sums["ab"])
    for norm in (norm_a, norm_b):
        cosine = cosine / norm if norm > TINY else cosine
    cosine = min(1.0, max(-1.0, cosine))
    if abs(cosine) > PARALLEL:
        return {"a": 1.0 - t, "b": t}
    angle = math.acos(cosine)
    return {
        "a": math.sin((1.0 - t) * angle) / math.sin(angle),
        "b": math.sin(t * angle) / math.sin(angle),
    }


def slerp(block: Block, settings: Settings, stats: Stats, before: Sums) -> Array:
    """Move along the great circle from base to expert (S).

    The factors apply to the raw tensors; nearly parallel ones are interpolated linearly."""
    assert block.base is not None
    return weighted_sum([block.base, block.experts[0]], [stats["a"], stats["b"]])


LINEAR = Method(
    "linear",
    2,
    "Weighted average of the models' weights (model soup).",
    "ordinary",
    (1, None),
    (WEIGHT, normalize(True)),
    linear,
    papers=("Wortsman et al. 2022, Model soups, arXiv 2203.05482",),
    differs=(
        "the same on processors without FMA; from five models on, the weights' sum may differ",
    ),
)

SLERP = Method(
    "slerp",
    1,
    "Spherical interpolation from the base (t = 0) to one other model (t = 1), tensor by tensor.",
    "needed",
    (1, 1),
    (
        Parameter(
            "t", "number", False, None, "position between base and model", 0.0, 1.0, required=True
        ),
    ),
    slerp,
    (Round(measure_angle, slerp_coefficients),),
    papers=("Shoemake 1985, Animating rotation with quaternion curves",),
    differs=("the angle comes from float64 sums over fixed blocks: last bits may differ",),
)

PASSTHROUGH = Method(
    "passthrough",
    1,
    "Copies tensors as they are, optionally scaled: stacks layers of several models.",
    "none",
    (1, 1),
    (Parameter("scale", "number", True, 1.0, "factor on the tensor"),),
    passthrough,
    papers=("Kim et al. 2023, SOLAR (depth up-scaling), arXiv 2312.15166",),
)
