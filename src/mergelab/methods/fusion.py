"""Two models, entry by entry: NearSwap, and Arcee Fusion."""

from __future__ import annotations

from typing import Any

import numpy as np

from mergelab.kernels import (
    CHUNK,
    LANES,
    add_magnitudes,
    decode,
    dot,
    encode,
    kernel,
    lanes_total,
)
from mergelab.methods.base import Array, Block, Method, Parameter, Round, Settings, Stats, Sums
from mergelab.methods.elementary import exp, log
from mergelab.methods.trim import HALF, kth

NO_DIFFERENCE = 1e-6  # NearSwap takes smaller differences for this large
EPSILON = 1e-8  # added to the probabilities of Arcee Fusion
QUARTERS = (0.25, 0.5, 0.75)


@kernel
def merge_near(values: Array, step: Array, out: Array) -> None:
    """Move each entry of the base by at most `step` (1) towards the model.

    Differences below NO_DIFFERENCE count as that large: a smaller step takes its share of them."""
    size, t, tiny = values.shape[1], step[0], step.dtype.type(NO_DIFFERENCE)
    a, b = np.empty(CHUNK, step.dtype), np.empty(CHUNK, step.dtype)
    reach, share = max(t, tiny), t / tiny
    for start in range(0, size, CHUNK):
        count = min(CHUNK, size - start)
        decode(values, 0, start, count, a)
        decode(values, 1, start, count, b)
        for i in range(count):
            delta = b[i] - a[i]
            near = b[i] if share >= 1 else a[i] + delta * share
            far = a[i] + (t if delta > 0 else -t)
            a[i] = near if abs(delta) <= reach else far
        encode(a, count, out, start)


def nearswap(block: Block, settings: Settings, stats: Stats, state: Sums, out: Array) -> None:
    """base + clamp(model - base, -t, t) (S)."""
    merge_near(block.values, block.numbers([settings.shared["t"]]), out)


@kernel
def largest(x: Array, count: int) -> float:
    """The largest of x[:count], found in LANES so that vectors are used."""
    lanes = np.full(LANES, -np.inf)
    whole = count - count % LANES
    for i in range(0, whole, LANES):
        for j in range(LANES):
            lanes[j] = max(lanes[j], np.float64(x[i + j]))
    for j in range(count - whole):
        lanes[j] = max(lanes[j], np.float64(x[whole + j]))
    return float(lanes.max())


@kernel
def softmax(values: Array, model: int, start: int, row: int, x: Array, out: Array) -> None:
    """Probabilities (row) of one model's row, plus EPSILON; x (row) is scratch."""
    decode(values, model, start, row, x)
    top = largest(x, row)
    for i in range(row):
        out[i] = exp(np.float64(x[i]) - top)
    lanes = np.zeros(LANES)
    add_magnitudes(out, row, lanes)
    share = np.divide(1.0, lanes_total(lanes))
    for i in range(row):
        out[i] = out[i] * share + EPSILON


@kernel
def divergences(values: Array, row: int, out: Array, kind: Any) -> None:
    """Kullback-Leibler divergence of the model's softmax from the base's, one per row (rows)."""
    x, p, q = np.empty(row, kind.dtype), np.empty(row), np.empty(row)
    lanes = np.empty(LANES)
    for number in range(out.shape[0]):
        softmax(values, 1, number * row, row, x, p)
        softmax(values, 0, number * row, row, x, q)
        for i in range(row):
            q[i] = log(np.divide(p[i], q[i]))
        lanes[:] = 0
        dot(p, q, row, lanes)
        out[number] = lanes_total(lanes)


@kernel
def importance(
    values: Array, row: int, number: int, divergence: float, x: Array, out: Array
) -> None:
    """Write the row of base and model to x (2, row); |model - base| times the row's divergence,
    as float32, to out (row)."""
    decode(values, 0, number * row, row, x[0])
    decode(values, 1, number * row, row, x[1])
    for i in range(row):
        out[i] = np.float64(abs(x[1, i] - x[0, i])) * divergence


@kernel
def count_high(values: Array, row: int, scores: Array, counts: Array, kind: Any) -> None:
    """Count the upper halves of the importance's bits in counts (65536)."""
    x, single = np.empty((2, row), kind.dtype), np.empty(row, np.float32)
    bits = single.view(np.uint32)
    for number in range(scores.shape[0]):
        importance(values, row, number, scores[number], x, single)
        for i in range(row):
            counts[bits[i] >> np.uint32(16)] += 1


@kernel
def count_low(
    values: Array, row: int, scores: Array, highs: Array, counts: Array, kind: Any
) -> None:
    """Count the lower halves of those whose upper half is highs (C) in counts (C, 65536)."""
    x, single = np.empty((2, row), kind.dtype), np.empty(row, np.float32)
    bits = single.view(np.uint32)
    for number in range(scores.shape[0]):
        importance(values, row, number, scores[number], x, single)
        for c in range(highs.shape[0]):
            for i in range(row):
                if bits[i] >> np.uint32(16) == highs[c]:
                    counts[c, bits[i] & np.uint32(0xFFFF)] += 1


@kernel
def merge_important(
    values: Array, row: int, scores: Array, threshold: float, out: Array, kind: Any
) -> None:
    """The model's entries where the importance reaches the threshold, else the base's."""
    x, single = np.empty((2, row), kind.dtype), np.empty(row, np.float32)
    for number in range(scores.shape[0]):
        importance(values, row, number, scores[number], x, single)
        for i in range(row):
            x[0, i] = x[1, i] if single[i] >= threshold else x[0, i]
        encode(x[0], row, out, number * row)


def last(settings: Settings, shape: tuple[int, ...]) -> int:
    """Rows are the last dimension; a vector is one row."""
    return shape[-1] if shape else 1


def begin_scores(settings: Settings, row: int) -> Sums:
    """Divergences of the rows, block by block."""
    return {"scores": []}


def measure_scores(block: Block, settings: Settings, stats: Stats, sums: Sums) -> None:
    """The divergences of a block's rows."""
    found = np.empty(block.values.shape[1] // block.row)
    divergences(block.values, block.row, found, block.numbers([]))
    sums["scores"].append(np.maximum(found, 0))


def conclude_scores(sums: Sums, settings: Settings, stats: Stats) -> Stats:
    """Divergence of each row, in order."""
    return {"scores": np.concatenate(sums["scores"])}


def rows_of(block: Block, stats: Stats) -> Array:
    """The divergences of a block's rows."""
    first = block.start // block.row
    scores: Array = stats["scores"][first : first + block.values.shape[1] // block.row]
    return scores


def begin_high(settings: Settings, row: int) -> Sums:
    """Counts of upper halves."""
    return {"high": np.zeros(HALF, np.int64)}


def measure_high(block: Block, settings: Settings, stats: Stats, sums: Sums) -> None:
    """Histogram of the upper halves of the importance's bits."""
    scores = rows_of(block, stats)
    count_high(block.values, block.row, scores, sums["high"], block.numbers([]))


def conclude_high(sums: Sums, settings: Settings, stats: Stats) -> Stats:
    """Upper halves of the quartiles: the entries at places int(q (n - 1)) in ascending order."""
    size = int(sums["high"].sum())
    found = [kth(sums["high"], size - int(q * (size - 1))) for q in QUARTERS]
    highs = np.array([high for high, _ in found], np.uint32)
    return {"highs": highs, "rests": [rest for _, rest in found]}


def begin_low(settings: Settings, row: int) -> Sums:
    """Counts of lower halves, per quartile (3, 65536)."""
    return {"low": np.zeros((len(QUARTERS), HALF), np.int64)}


def measure_low(block: Block, settings: Settings, stats: Stats, sums: Sums) -> None:
    """Histogram of the lower halves of the bits that begin as a quartile's."""
    scores, highs = rows_of(block, stats), stats["highs"]
    count_low(block.values, block.row, scores, highs, sums["low"], block.numbers([]))


def conclude_low(sums: Sums, settings: Settings, stats: Stats) -> Stats:
    """The threshold: median + 1.5 (upper quartile - lower quartile), in float32 as mergekit."""
    triples = zip(stats["highs"], stats["rests"], sums["low"], strict=True)
    bits = [(int(high) << 16) + kth(counts, rest)[0] for high, rest, counts in triples]
    low, median, high = np.array(bits, np.uint32).view(np.float32)
    return {"threshold": float(median + np.float32(1.5) * (high - low))}


def arcee_fusion(block: Block, settings: Settings, stats: Stats, state: Sums, out: Array) -> None:
    """Take over the important changes of the model, leave the rest (S)."""
    scores, kind = rows_of(block, stats), block.numbers([])
    merge_important(block.values, block.row, scores, stats["threshold"], out, kind)


NEARSWAP = Method(
    "nearswap",
    1,
    "Moves each entry of the base towards the other model by at most t.",
    "needed",
    (1, 1),
    (Parameter("t", "number", False, None, "largest change of an entry", 0.0, required=True),),
    nearswap,
    lone="base",
    papers=(
        "alchemonaut 2024, NearSwap, https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    ),
    differs=("steps of t, not weighted means: last bits may differ",),
)

ARCEE_FUSION = Method(
    "arcee_fusion",
    1,
    "Takes over the other model's most important changes: large ones, in rows that changed a lot.",
    "needed",
    (1, 1),
    (),
    arcee_fusion,
    (
        Round(begin_scores, measure_scores, conclude_scores),
        Round(begin_high, measure_high, conclude_high),
        Round(begin_low, measure_low, conclude_low),
    ),
    row=last,
    lone="copy",
    papers=("Arcee 2024, Arcee Fusion, https://arcee.ai",),
    differs=(
        "quartiles are exact, never of a random sample",
        "the divergence of a row is computed in float64 (in float32 it is mostly rounding error), "
        "the importance rounded to float32; negative divergences, rounding error too, count as 0",
        "entries are taken over as they are (mergekit: base + (model - base), rounded twice)",
    ),
)
