"""Averages of whole models: linear, and passthrough (no average at all)."""

from __future__ import annotations

from typing import Any

import numpy as np

from mergelab.kernels import CHUNK, decode, encode, fma, kernel
from mergelab.methods.base import (
    WEIGHT,
    Array,
    Block,
    Method,
    Parameter,
    Settings,
    Stats,
    Sums,
    normalize,
)

NO_SHARE = 1e-8  # a sum of weights below this is not divided by


@kernel
def sum_fused(values: Array, weights: Array, divisor: Any, out: Array) -> None:
    """Write sum(w_m x_m) / divisor; each step w x + r is rounded once, on every processor.

    So does mergekit's `linear` on processors that have fused multiply-add."""
    models, size = values.shape
    x, result = np.empty(CHUNK, weights.dtype), np.empty(CHUNK, weights.dtype)
    for start in range(0, size, CHUNK):
        count = min(CHUNK, size - start)
        result[:count] = 0
        for m in range(models):
            decode(values, m, start, count, x)
            weight = weights[m]
            for i in range(count):
                result[i] = fma(x[i], weight, result[i])
        if divisor != 1:
            for i in range(count):
                result[i] = result[i] / divisor
        encode(result, count, out, start)


@kernel
def sum_plain(values: Array, weights: Array, out: Array) -> None:
    """Write sum(w_m x_m) in order, each product and each sum rounded."""
    models, size = values.shape
    x, result = np.empty(CHUNK, weights.dtype), np.empty(CHUNK, weights.dtype)
    for start in range(0, size, CHUNK):
        count = min(CHUNK, size - start)
        result[:count] = 0
        for m in range(models):
            decode(values, m, start, count, x)
            weight = weights[m]
            for i in range(count):
                result[i] = result[i] + x[i] * weight
        encode(result, count, out, start)


def sum_of_weights(weights: Array) -> Any:
    """Sum of the weights in order, in their own precision, as mergekit adds them."""
    total = weights.dtype.type(0)
    for weight in weights:
        total += weight
    return total


def linear(block: Block, settings: Settings, stats: Stats, state: Sums, out: Array) -> None:
    """Weighted average of N models, sum(w x) or sum(w x) / sum(w) (S)."""
    weights = block.numbers(settings.each("weight"))
    divide = settings.shared["normalize"]
    sum_fused(block.values, weights, sum_of_weights(weights) if divide else block.work(1), out)


def passthrough(block: Block, settings: Settings, stats: Stats, state: Sums, out: Array) -> None:
    """The one model's entries, times `scale` (S)."""
    (scale,) = settings.each("scale")
    if scale == 1:
        out[:] = block.values[0]
    else:
        sum_plain(block.values, block.numbers([scale]), out)


def check_weights(settings: Settings) -> str | None:
    """Can the average be divided by the sum of the weights?"""
    weights = settings.each("weight")
    if not settings.shared["normalize"] or None in weights or abs(sum(weights)) >= NO_SHARE:
        return None
    return "the weights sum to 0, which cannot be normalized. Change them or set normalize: false."


LINEAR = Method(
    "linear",
    3,
    "Weighted average of the models' weights (model soup).",
    "ordinary",
    (1, None),
    (WEIGHT, normalize(True)),
    linear,
    spreads=True,
    check=check_weights,
    papers=("Wortsman et al. 2022, Model soups, arXiv 2203.05482",),
    differs=(
        "the same on processors without FMA; from five models on, the weights' sum may differ",
    ),
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
