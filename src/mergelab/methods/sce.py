"""SCE: select entries by variance, calculate weights, erase minority signs (Wan et al. 2024)."""

from __future__ import annotations

from typing import Any

import numpy as np

from mergelab.kernels import CHUNK, LANES, dot, encode, kernel, lanes_total, task_vectors
from mergelab.methods.base import (
    INT8_MASK,
    Array,
    Block,
    Method,
    Parameter,
    Round,
    Settings,
    Stats,
    Sums,
)
from mergelab.methods.consensus import combine
from mergelab.methods.trim import Trim
from mergelab.methods.trim_kernels import keep_window, variances

LEAST_SHARE = 1e-6  # mergekit: a smaller sum of weights is divided by this
EVEN = 1e-6  # mergekit: below this mean square of all task vectors their weights are equal


def all_selected(settings: Settings) -> bool:
    """Is nothing left out?"""
    return bool(settings.shared["select_topk"] >= 1)


TRIM = Trim(
    lambda settings, size: [[int(settings.shared["select_topk"] * size)]],
    all_selected,
    joint=True,
)


@kernel
def drop_agreed(
    deltas: Array, count: int, cuts: Array, seen: Array, single: Array, key: Array, keep: Array
) -> None:
    """Zero the entries (N, count) whose variance over the models is not among the largest.

    cuts (1, 2), seen (1): see methods.trim; single, key, keep (1, CHUNK): scratch."""
    variances(deltas, count, key)
    keep_window(key, count, cuts, seen, single, keep)
    zero = deltas.dtype.type(0)
    for m in range(deltas.shape[0]):
        for i in range(count):
            deltas[m, i] = deltas[m, i] if key[i] != 0 else zero


@kernel
def add_squares(
    values: Array, every: bool, cuts: Array, seen: Array, squares: Array, kind: Any
) -> None:
    """Add the squared norms of the selected task vectors to squares (N), in float64."""
    experts, size = values.shape[0] - 1, values.shape[1]
    base, deltas = np.empty(CHUNK, kind.dtype), np.empty((experts, CHUNK), kind.dtype)
    single, key = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    keep, lanes = np.empty((1, CHUNK), np.bool_), np.zeros((experts, LANES))
    for at in range(0, size, CHUNK):
        count = min(CHUNK, size - at)
        task_vectors(values, at, count, base, deltas)
        if not every:
            drop_agreed(deltas, count, cuts[0], seen[0], single, key, keep)
        for m in range(experts):
            dot(deltas[m], deltas[m], count, lanes[m])
    for m in range(experts):
        squares[m] += lanes_total(lanes[m])


@kernel
def merge_selected(
    values: Array,
    every: bool,
    cuts: Array,
    seen: Array,
    votes: Array,
    weights: Array,
    plan: Array,
    out: Array,
) -> None:
    """Zero the entries that are not selected, elect signs, average what agrees, add to the base."""
    experts, size = values.shape[0] - 1, values.shape[1]
    base, deltas = np.empty(CHUNK, weights.dtype), np.empty((experts, CHUNK), weights.dtype)
    single, key = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    keep, scratch = np.empty((1, CHUNK), np.bool_), np.empty((3, CHUNK), weights.dtype)
    for at in range(0, size, CHUNK):
        count = min(CHUNK, size - at)
        task_vectors(values, at, count, base, deltas)
        if not every:
            drop_agreed(deltas, count, cuts[0], seen[0], single, key, keep)
        combine(deltas, votes, weights, weights, plan, count, base, scratch)
        encode(base, count, out, at)


def begin_squares(settings: Settings, row: int) -> Sums:
    """Zero squared norms (N), number of entries, and equal variances so far."""
    experts = len(settings.experts)
    return {"squares": np.zeros(experts), "size": np.zeros(1, np.int64)} | TRIM.begin_seen(
        settings, row
    )


def measure_squares(block: Block, settings: Settings, stats: Stats, sums: Sums) -> None:
    """Squared norms of the selected task vectors."""
    add_squares(
        block.values,
        all_selected(settings),
        TRIM.cuts(settings, stats),
        sums["seen"],
        sums["squares"],
        block.numbers([]),
    )
    sums["size"] += block.values.shape[1]


def conclude_squares(sums: Sums, settings: Settings, stats: Stats) -> Stats:
    """Weight per expert: its mean square as a share of all. Equal ones for (nearly) no squares."""
    means = sums["squares"] / sums["size"]
    total = float(np.sum(means))
    even = total == 0 or (settings.shared["select"] == "deltas" and total < EVEN)
    return {"weights": [1 / len(means) if even else float(mean) / total for mean in means]}


def sce(block: Block, settings: Settings, stats: Stats, state: Sums, out: Array) -> None:
    """Average of the task vectors that agree with the sign of their sum, weighted (S)."""
    weights = block.numbers(stats["weights"])
    mask = settings.shared["select"] == "deltas"
    plan = [True, True, True, 1.0, 1.0, LEAST_SHARE if mask else -np.inf]
    merge_selected(
        block.values,
        not mask or all_selected(settings),
        TRIM.cuts(settings, stats),
        state["seen"],
        np.ones_like(weights),
        weights,
        block.numbers(plan),
        out,
    )


SCE = Method(
    "sce",
    1,
    "Averages the task vectors that agree in sign, weighted by their squares; optionally only "
    "where they differ most.",
    "needed",
    (1, None),
    (
        Parameter(
            "select_topk",
            "number",
            False,
            1.0,
            "share of the entries selected: those of largest variance over the models",
            0.0,
            1.0,
        ),
        Parameter(
            "select",
            "choice",
            False,
            "deltas",
            "only selected entries are merged, as in mergekit (deltas), or all, and the selected "
            "ones give the weights only, as the authors do (weights)",
            choices=("deltas", "weights"),
        ),
        INT8_MASK,
    ),
    sce,
    (*TRIM.rounds[:2], Round(begin_squares, measure_squares, conclude_squares)),
    running=TRIM.begin_seen,
    papers=("Wan et al. 2024, FuseChat, arXiv 2408.07990",),
    differs=(
        "of more than 2^24 entries mergekit selects a few more or less: it counts in float32",
        "entries of equal variance at the cut: ours keeps the lowest index, mergekit's order is "
        "unspecified",
        "as in mergekit, task vectors whose mean squares add up to less than 1e-6 get equal "
        "weights; with select: weights only those of zeros do, as the authors have it",
    ),
)
