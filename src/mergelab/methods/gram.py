"""Dot products of all models (the Gram matrix), and sums of models with factors found from it.

Norms, angles and means of directions follow from the dot products alone: one survey is enough."""

from __future__ import annotations

from typing import Any

import numpy as np

from mergelab.kernels import CHUNK, LANES, decode, dot, kernel, lanes_total
from mergelab.methods.averages import sum_plain
from mergelab.methods.base import Array, Block, Settings, Stats, Sums
from mergelab.methods.consensus import terms
from mergelab.methods.task_vectors import merge_all


@kernel
def add_gram(values: Array, based: bool, sums: Array, kind: Any) -> None:
    """Add the dot products of all models, or with a base of all task vectors, to sums (N, N).

    Only pairs m <= n are filled. Lanes of float64 are added up block by block."""
    models, size = values.shape
    first = 1 if based else 0
    x = np.empty((models, CHUNK), kind.dtype)
    lanes = np.zeros((models, models, LANES))
    for start in range(0, size, CHUNK):
        count = min(CHUNK, size - start)
        for m in range(models):
            decode(values, m, start, count, x[m])
        for m in range(first, models):
            if based:
                for i in range(count):
                    x[m, i] = x[m, i] - x[0, i]
        for m in range(first, models):
            for n in range(m, models):
                dot(x[m], x[n], count, lanes[m, n])
    for m in range(first, models):
        for n in range(m, models):
            sums[m - first, n - first] += lanes_total(lanes[m, n])


def begin_gram(settings: Settings, row: int) -> Sums:
    """Zero dot products of the experts (N, N); a single expert needs no survey."""
    count = len(settings.experts)
    return {"gram": np.zeros((count, count))} if count > 1 else {}


def measure_gram(block: Block, settings: Settings, stats: Stats, sums: Sums) -> None:
    """Dot products of the experts, or of their task vectors if there is a base."""
    add_gram(block.values, block.based, sums["gram"], block.numbers([]))


def symmetric(gram: Array) -> Array:
    """The Gram matrix with both halves."""
    full: Array = np.triu(gram) + np.triu(gram, 1).T
    return full


def square(x: Array, gram: Array) -> float:
    """Squared length of the sum of x[m] times model m; rounding never makes it negative."""
    return max(float((x[:, None] * x * gram).sum()), 0.0)


def combine(block: Block, factors: list[float], out: Array) -> None:
    """Sum of factor times expert, or base plus the sum of factor times task vector (S)."""
    if block.based:
        weights = tuple({"weight": factor} for factor in factors)
        sum_of_all = Settings({"normalize": False, "lambda": 1.0}, weights)
        merge_all(block.values, *terms(block, sum_of_all, elect=False), out)
    else:
        sum_plain(block.values, block.numbers(factors), out)
