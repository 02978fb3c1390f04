"""NuSLERP: SLERP between two experts by their weights, of whole tensors, rows or columns."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mergelab.kernels import LANES, decode, dot, encode, kernel, lanes_total
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
)
from mergelab.methods.elementary import arccos
from mergelab.methods.gram import begin_gram, combine, measure_gram
from mergelab.methods.spherical import OPPOSITE, SHOEMAKE, share

NO_WEIGHT = 1e-6  # a sum of weights below this means the middle
NO_NORM = 1e-7  # norms are divided by, but never by less than this
COLINEAR = 1e-16  # 1 - cos^2 up to which the way is a straight line


def position(settings: Settings) -> float:
    """Where between the two experts: the second one's share of the weights."""
    first, second = settings.each("weight")
    total = first + second
    return 0.5 if abs(total) < NO_WEIGHT else float(second / total)


@kernel
def factors_of(aa: float, ab: float, bb: float, t: float, factors: Array) -> None:
    """Write the factors of a and b (2), from their squared norms and dot product."""
    norms = max(math.sqrt(aa), NO_NORM) * max(math.sqrt(bb), NO_NORM)
    cosine = min(1.0, ab / norms)
    curved = 1 - cosine * cosine > COLINEAR and cosine > OPPOSITE
    angle = arccos(cosine) if curved else 0.0
    factors[0], factors[1] = share(1 - t, angle), share(t, angle)


@kernel
def read_row(values: Array, based: bool, start: int, row: int, x: Array, base: Array) -> None:
    """Write the two experts' entries of one row to x (2, row), less those of the base (or 0)."""
    base[:row] = 0
    if based:
        decode(values, 0, start, row, base)
    for m in range(2):
        decode(values, m + (1 if based else 0), start, row, x[m])
        for i in range(row):
            x[m, i] = x[m, i] - base[i]


@kernel
def merge_rows(values: Array, based: bool, row: int, t: float, out: Array, kind: Any) -> None:
    """NuSLERP of each row by itself."""
    x, base = np.empty((2, row), kind.dtype), np.empty(row, kind.dtype)
    factors, rounded = np.empty(2), np.empty(2, kind.dtype)
    lanes = np.empty((3, LANES))
    for start in range(0, values.shape[1], row):
        read_row(values, based, start, row, x, base)
        lanes[:] = 0
        dot(x[0], x[0], row, lanes[0])
        dot(x[0], x[1], row, lanes[1])
        dot(x[1], x[1], row, lanes[2])
        aa, ab, bb = lanes_total(lanes[0]), lanes_total(lanes[1]), lanes_total(lanes[2])
        factors_of(aa, ab, bb, t, factors)
        rounded[:] = factors
        for i in range(row):
            base[i] = base[i] + (x[0, i] * rounded[0] + x[1, i] * rounded[1])
        encode(base, row, out, start)


@kernel
def add_columns(values: Array, based: bool, row: int, sums: Array, kind: Any) -> None:
    """Add squared norms and dot product of the two experts' columns to sums (3, row)."""
    x, base = np.empty((2, row), kind.dtype), np.empty(row, kind.dtype)
    for start in range(0, values.shape[1], row):
        read_row(values, based, start, row, x, base)
        for i in range(row):
            a, b = np.float64(x[0, i]), np.float64(x[1, i])
            sums[0, i] += a * a
            sums[1, i] += a * b
            sums[2, i] += b * b


@kernel
def column_factors(sums: Array, t: float, factors: Array) -> None:
    """Write the factors (2, row) of each column from its sums (3, row)."""
    pair = np.empty(2)
    for i in range(sums.shape[1]):
        factors_of(sums[0, i], sums[1, i], sums[2, i], t, pair)
        factors[0, i], factors[1, i] = pair[0], pair[1]


@kernel
def merge_columns(values: Array, based: bool, row: int, factors: Array, out: Array) -> None:
    """Each column with its own two factors (2, row)."""
    x, base = np.empty((2, row), factors.dtype), np.empty(row, factors.dtype)
    for start in range(0, values.shape[1], row):
        read_row(values, based, start, row, x, base)
        for i in range(row):
            base[i] = base[i] + (x[0, i] * factors[0, i] + x[1, i] * factors[1, i])
        encode(base, row, out, start)


def vector(settings: Settings) -> str:
    """What is one vector: the whole tensor, each row, or each column."""
    if settings.shared["nuslerp_flatten"]:
        return "tensor"
    return "column" if settings.shared["nuslerp_row_wise"] else "row"


def row(settings: Settings, shape: tuple[int, ...]) -> int:
    """Rows run over the last dimension; columns over the first, side by side in one row."""
    kind = vector(settings)
    if kind == "tensor" or not shape:
        return 1
    return shape[-1] if kind == "row" else math.prod(shape[1:])


def begin(settings: Settings, row: int) -> Sums:
    """Sums of the whole tensor or of its columns; rows need no survey."""
    kind = vector(settings)
    if kind == "row":
        return {}
    return begin_gram(settings, row) if kind == "tensor" else {"columns": np.zeros((3, row))}


def measure(block: Block, settings: Settings, stats: Stats, sums: Sums) -> None:
    """Squared norms and dot product of the two experts, or of their columns."""
    if "gram" in sums:
        measure_gram(block, settings, stats, sums)
    else:
        columns = sums["columns"]
        add_columns(block.values, block.based, block.row, columns, block.numbers([]))


def conclude(sums: Sums, settings: Settings, stats: Stats) -> Stats:
    """The factors of the two experts: one pair (2, 1), or one per column (2, row)."""
    columns = sums.get("columns")
    if columns is None:
        (aa, ab), (_, bb) = sums["gram"]
        columns = np.array([[aa], [ab], [bb]])
    factors = np.empty((2, columns.shape[1]))
    column_factors(columns, position(settings), factors)
    return {"factors": factors}


def nuslerp(block: Block, settings: Settings, stats: Stats, state: Sums, out: Array) -> None:
    """SLERP by weights; with a base, of the task vectors (S)."""
    kind = vector(settings)
    if kind == "row":
        t = position(settings)
        merge_rows(block.values, block.based, block.row, t, out, block.numbers([]))
    elif kind == "column":
        factors = stats["factors"].astype(block.work)
        merge_columns(block.values, block.based, block.row, factors, out)
    else:
        combine(block, list(stats["factors"][:, 0]), out)


NUSLERP = Method(
    "nuslerp",
    1,
    "SLERP between two models by their weights; with a base, between their task vectors.",
    "optional",
    (2, 2),
    (
        WEIGHT,
        Parameter("nuslerp_flatten", "flag", False, True, "take the whole tensor as one vector"),
        Parameter(
            "nuslerp_row_wise",
            "flag",
            False,
            False,
            "if not flattened: vectors along the first dimension, not the last",
        ),
    ),
    nuslerp,
    (Round(begin, measure, conclude),),
    row=row,
    lone="copy",
    papers=(SHOEMAKE,),
    differs=(
        "angles come from float64 sums over fixed blocks: last bits may differ",
        "in float64 too, vectors opposite to within float32 are interpolated linearly",
    ),
)
