"""RAM: add what one model changed, average what several changed (arXiv 2601.13572)."""

from __future__ import annotations

from typing import Any

import numpy as np

from mergelab.kernels import CHUNK, encode, kernel, task_vectors
from mergelab.methods.base import Array, Block, Method, Parameter, Round, Settings, Stats, Sums

PAPER = "Reinforced Agent Merging, arXiv 2601.13572"


@kernel
def count_changes(deltas: Array, count: int, epsilon: Any, touched: Array) -> None:
    """Write to touched[:count] how many task vectors (N, count) exceed epsilon."""
    touched[:count] = 0
    for m in range(deltas.shape[0]):
        for i in range(count):
            touched[i] += abs(deltas[m, i]) > epsilon


@kernel
def add_changes(values: Array, epsilon: Array, shared: Array, unique: Array) -> None:
    """Add to shared and unique (N) how many entries each model changed with others and alone."""
    experts, size = values.shape[0] - 1, values.shape[1]
    base, deltas = np.empty(CHUNK, epsilon.dtype), np.empty((experts, CHUNK), epsilon.dtype)
    touched, least = np.empty(CHUNK, np.int32), epsilon[0]
    for at in range(0, size, CHUNK):
        count = min(CHUNK, size - at)
        task_vectors(values, at, count, base, deltas)
        count_changes(deltas, count, least, touched)
        for m in range(experts):
            both, alone = 0, 0
            for i in range(count):
                own = abs(deltas[m, i]) > least
                both += own and touched[i] > 1
                alone += own and touched[i] == 1
            shared[m] += both
            unique[m] += alone


@kernel
def merge_changes(values: Array, epsilon: Array, factors: Array, out: Array) -> None:
    """Add to the base what one model changed, times its factor, and means of what several did."""
    experts, size = values.shape[0] - 1, values.shape[1]
    base, deltas = np.empty(CHUNK, epsilon.dtype), np.empty((experts, CHUNK), epsilon.dtype)
    touched, merged = np.empty(CHUNK, np.int32), np.empty(CHUNK, epsilon.dtype)
    least, zero, one = epsilon[0], epsilon.dtype.type(0), epsilon.dtype.type(1)
    for at in range(0, size, CHUNK):
        count = min(CHUNK, size - at)
        task_vectors(values, at, count, base, deltas)
        count_changes(deltas, count, least, touched)
        merged[:count] = 0
        for m in range(experts):
            factor = factors[m]
            for i in range(count):
                delta = deltas[m, i]
                several = max(one, epsilon.dtype.type(touched[i]))
                mine = delta * factor if touched[i] == 1 else delta / several
                merged[i] = merged[i] + (mine if abs(delta) > least else zero)
        for i in range(count):
            base[i] = base[i] + merged[i]
        encode(base, count, out, at)


def begin_changes(settings: Settings, row: int) -> Sums:
    """Zero counts (N)."""
    count = len(settings.experts)
    return {"shared": np.zeros(count, np.int64), "unique": np.zeros(count, np.int64)}


def measure_changes(block: Block, settings: Settings, stats: Stats, sums: Sums) -> None:
    """How many entries each model changed together with others, and alone."""
    epsilon = block.numbers([settings.shared["epsilon"]])
    add_changes(block.values, epsilon, sums["shared"], sums["unique"])


def conclude_changes(sums: Sums, settings: Settings, stats: Stats) -> Stats:
    """Factor per expert of what it changed alone: 1 + r min(shared / unique, alpha)."""
    r, alpha, epsilon = (settings.shared[name] for name in ("r", "alpha", "epsilon"))
    pairs = zip(sums["shared"].tolist(), sums["unique"].tolist(), strict=True)
    shares = [shared / (max(unique, epsilon) or 1) for shared, unique in pairs]
    return {"factors": [1 + r * min(share, alpha) for share in shares]}


def ram(block: Block, settings: Settings, stats: Stats, state: Sums, out: Array) -> None:
    """Entries changed by one model are added, those changed by several averaged over them (S)."""
    factors = block.numbers(list(stats.get("factors", [1.0] * len(settings.experts))))
    merge_changes(block.values, block.numbers([settings.shared["epsilon"]]), factors, out)


EPSILON = Parameter(
    "epsilon", "number", False, 1e-5, "an entry is changed if it differs by more than this", 0.0
)

RAM = Method(
    "ram",
    1,
    "Adds what one model changed, averages what several changed over these.",
    "needed",
    (1, None),
    (EPSILON,),
    ram,
    papers=(PAPER,),
)

RAMPLUS_TL = Method(
    "ramplus_tl",
    1,
    "As ram; what one model changed alone is enlarged, the more it shares with others, per tensor.",
    "needed",
    (1, None),
    (
        Parameter("r", "number", False, 0.1, "strength of the enlargement"),
        Parameter("alpha", "number", False, 0.2, "greatest shared / alone that counts", 0.0),
        EPSILON,
    ),
    ram,
    (Round(begin_changes, measure_changes, conclude_changes),),
    papers=(PAPER,),
    differs=("the paper counts over the whole model; as in mergekit, counts are per tensor",),
)
