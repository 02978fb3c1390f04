"""Model Stock (Jang et al. 2024): how far to go from the base to the mean of its fine-tunes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mergelab.kernels import LANES, decode, dot, encode, kernel, lanes_total
from mergelab.methods.base import Array, Block, Method, Parameter, Round, Settings, Stats, Sums
from mergelab.methods.elementary import arccos, cos
from mergelab.methods.gram import begin_gram, combine, measure_gram

NO_NORM = 1e-6  # products of norms below this are not divided by
SINGULAR = 1e-6  # denominators of the ratio below this leave the base as it is


@kernel
def ratio(gram: Array, angles: bool, clamp: bool) -> float:
    """Share t of the mean from the dot products (N, N) of the task vectors, pairs m < n filled.

    t = N cos / (1 + (N - 1) cos), cos the mean over pairs, or with `angles` that of the mean
    angle; `clamp` keeps it in [0, 1]."""
    count = gram.shape[0]
    total, pairs = 0.0, 0
    for m in range(count):
        for n in range(m + 1, count):
            norms = max(math.sqrt(gram[m, m]) * math.sqrt(gram[n, n]), NO_NORM)
            cosine = min(1.0, max(-1.0, gram[m, n] / norms))
            total += arccos(cosine) if angles else cosine
            pairs += 1
    mean = cos(total / pairs) if angles else total / pairs
    denominator = 1 + (count - 1) * mean
    if abs(denominator) < SINGULAR:
        return 0.0
    t = count * mean / denominator
    return float(min(1.0, max(0.0, t)) if clamp else t)


@kernel
def merge_rows(values: Array, row: int, angles: bool, clamp: bool, out: Array, kind: Any) -> None:
    """Model Stock of each row by itself."""
    experts = values.shape[0] - 1
    base, deltas = np.empty(row, kind.dtype), np.empty((experts, row), kind.dtype)
    gram, lanes = np.zeros((experts, experts)), np.empty(LANES)
    for start in range(0, values.shape[1], row):
        decode(values, 0, start, row, base)
        for m in range(experts):
            decode(values, m + 1, start, row, deltas[m])
            for i in range(row):
                deltas[m, i] = deltas[m, i] - base[i]
        for m in range(experts):
            for n in range(m, experts):
                lanes[:] = 0
                dot(deltas[m], deltas[n], row, lanes)
                gram[m, n] = lanes_total(lanes)
        factor = kind.dtype.type(ratio(gram, angles, clamp) / experts)
        for m in range(1, experts):
            for i in range(row):
                deltas[0, i] = deltas[0, i] + deltas[m, i]
        for i in range(row):
            base[i] = base[i] + deltas[0, i] * factor
        encode(base, row, out, start)


def options(settings: Settings) -> tuple[bool, bool]:
    """Mean of angles instead of cosines, and clamping."""
    return settings.shared["average"] == "angle", bool(settings.shared["clamp"])


def row(settings: Settings, shape: tuple[int, ...]) -> int:
    """The last dimension, if filters are merged one by one."""
    return shape[-1] if settings.shared["filter_wise"] and shape else 1


def begin(settings: Settings, row: int) -> Sums:
    """Dot products of the whole tensor's task vectors; filters need no survey."""
    return {} if settings.shared["filter_wise"] else begin_gram(settings, row)


def conclude(sums: Sums, settings: Settings, stats: Stats) -> Stats:
    """The same factor for each task vector: t / N."""
    experts = len(settings.experts)
    return {"factors": [ratio(sums["gram"], *options(settings)) / experts] * experts}


def model_stock(block: Block, settings: Settings, stats: Stats, state: Sums, out: Array) -> None:
    """base + t (mean of the experts - base) (S)."""
    if "factors" in stats:
        combine(block, stats["factors"], out)
    else:
        merge_rows(block.values, block.row, *options(settings), out, block.numbers([]))


MODEL_STOCK = Method(
    "model_stock",
    1,
    "Goes from the base towards the mean of the experts, the farther the more they agree.",
    "needed",
    (2, None),
    (
        Parameter("filter_wise", "flag", False, False, "one ratio per row instead of per tensor"),
        Parameter("clamp", "flag", False, True, "keep the ratio in 0 to 1 where experts disagree"),
        Parameter(
            "average",
            "choice",
            False,
            "cosine",
            "over pairs of experts: the mean cosine, or the cosine of the mean angle",
            choices=("cosine", "angle"),
        ),
    ),
    model_stock,
    (Round(begin, measure_gram, conclude),),
    row=row,
    lone="base_or_drop",
    papers=("Jang et al. 2024, Model Stock, arXiv 2403.19522",),
    differs=(
        "the ratio is kept in 0 to 1: mergekit goes beyond the base where experts point away from "
        "each other (clamp: false)",
    ),
)
