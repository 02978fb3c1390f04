"""Which entries survive by their rank within a row: DELLA by chance, breadcrumbs by a window.

Rank 0 is the smallest magnitude as a float32; of equal ones the lowest index ranks highest, as it
does in methods.trim. A rule (6) says what becomes of each rank. Scratch grows with the row."""

from __future__ import annotations

from typing import Any

import numpy as np

from mergelab.kernels import CHUNK, LANES, add_magnitudes, encode, kernel, lanes_total, task_vectors
from mergelab.methods.base import Array, Block
from mergelab.methods.consensus import Terms, combine, scale_each
from mergelab.methods.sparsify import random_words
from mergelab.methods.trim_kernels import magnitudes

DIGIT, DIGITS = 11, 3  # bits of a magnitude that are sorted at a time, and how many times
BINS = 1 << DIGIT
LAST = BINS - 1
ALL = 2.0**32  # number of random words
LOW, SPAN, FIRST, STOP, DIVIDE, RANKED = range(6)  # entries of a rule


def rule(
    row: int,
    density: float,
    spread: float = 0.0,
    window: tuple[int, int] | None = None,
    *,
    divide: bool = False,
) -> list[float]:
    """Ranks in the window are kept with a chance from density - spread to density + spread.

    The chance is linear in the rank, and `density` in rows of one entry and where all or nothing
    is kept; `divide` divides what is kept by it."""
    first, stop = window or (0, row)
    spread = spread if row > 1 and 0 < density < 1 else 0.0
    ranked = spread > 0 or first > 0 or stop < row
    return [density - spread, 2 * spread, first, stop, divide, ranked]


@kernel
def sort_magnitudes(delta: Array, count: int, single: Array, keys: Array, counts: Array) -> int:
    """Sort the indices of delta[:count] by magnitude, equal ones falling; which keys (2, count)
    hold them.

    Radix sort: the magnitudes' bits stay where they are (single), in the L1 cache."""
    magnitudes(delta, count, single)
    bits = single.view(np.uint32)
    counts[:] = 0
    a, b, c = counts[0], counts[1], counts[2]
    for i in range(count):
        value = bits[i]
        a[value & np.uint32(LAST)] += np.uint32(1)
        b[(value >> np.uint32(DIGIT)) & np.uint32(LAST)] += np.uint32(1)
        c[value >> np.uint32(2 * DIGIT)] += np.uint32(1)
    for i in range(count):
        keys[0, i] = count - 1 - i
    now = 0
    for d in range(DIGITS):
        shift, digit = np.uint32(DIGIT * d), counts[d]
        if digit[(bits[0] >> shift) & np.uint32(LAST)] == count:
            continue
        total = np.uint32(0)
        for k in range(BINS):
            held = digit[k]
            digit[k] = total
            total += held
        old, new = keys[now], keys[1 - now]
        for i in range(count):
            index = old[i]
            value = (bits[index] >> shift) & np.uint32(LAST)
            place = digit[value]
            digit[value] = place + np.uint32(1)
            new[place] = index
        now = 1 - now
    return now


@kernel
def rank_rows(
    delta: Array, count: int, row: int, single: Array, keys: Array, counts: Array, rank: Array
) -> None:
    """Write the rank of each entry of delta[:count], whole rows, within its row to rank (int32).

    Small rows are sorted together: a sort costs as much as BINS entries more."""
    part, flat = max(row, BINS // row * row), counts.reshape(DIGITS * BINS)
    for start in range(0, count, part):
        size, found = min(part, count - start), rank[start : start + part]
        order = keys[sort_magnitudes(delta[start : start + size], size, single, keys, counts)]
        if row == size:
            for i in range(size):
                found[order[i]] = i
            continue
        width = np.uint32(row)
        flat[: size // row] = 0
        for i in range(size):
            index = order[i]
            own = np.uint32(index // width)
            found[index] = flat[own]
            flat[own] += np.uint32(1)


@kernel
def keep_ranked(
    delta: Array,
    start: int,
    count: int,
    row: int,
    key: Array,
    rule: Array,
    rank: Array,
    words: Array,
) -> None:
    """Zero the entries of whole rows of one task vector that its rule does not keep.

    rank (count); words (count + 4): scratch for the random words."""
    low, span, first, stop = rule[LOW], rule[SPAN], rule[FIRST], rule[STOP]
    zero, last, skip = delta.dtype.type(0), np.float64(max(1, row - 1)), start % 4
    if low < 1:
        random_words(key[0], key[1], start - skip, count + skip, words)
    else:
        words[: count + skip] = 0
    for i in range(count):
        chance = low + span * rank[i] / last
        drawn = np.float64(words[skip + i]) + 1.0 <= chance * ALL
        delta[i] = delta[i] if drawn and first <= rank[i] < stop else zero
    if rule[DIVIDE] != 0:
        for i in range(count):
            chance = low + span * rank[i] / last
            delta[i] = delta[i] / (chance if chance > 0 else 1.0)


@kernel
def keep_rows(
    deltas: Array,
    start: int,
    count: int,
    row: int,
    keys: Array,
    rules: Array,
    single: Array,
    sorting: Array,
    counts: Array,
    rank: Array,
    words: Array,
) -> None:
    """Apply each model's rule (N, 6) to its task vector: deltas (N, count), whole rows."""
    for m in range(deltas.shape[0]):
        if rules[m, RANKED] != 0:
            rank_rows(deltas[m], count, row, single, sorting, counts, rank)
        else:
            rank[:count] = 0
        if rules[m, RANKED] != 0 or rules[m, LOW] < 1:
            keep_ranked(deltas[m], start, count, row, keys[m], rules[m], rank, words)


@kernel
def add_ranked_norms(
    values: Array,
    start: int,
    row: int,
    keys: Array,
    rules: Array,
    before: Array,
    after: Array,
    kind: Any,
) -> None:
    """Add the L1 norms of the task vectors (N) before and after their rules, in float64."""
    experts, size = values.shape[0] - 1, values.shape[1]
    part = max(row, CHUNK // row * row)
    base, deltas = np.empty(part, kind.dtype), np.empty((experts, part), kind.dtype)
    single, sorting = np.empty(part, np.float32), np.empty((2, part), np.uint32)
    counts, rank = np.empty((DIGITS, BINS), np.uint32), np.empty(part, np.int32)
    words, lanes = np.empty(part + 8, np.uint32), np.zeros((2, experts, LANES))
    for at in range(0, size, part):
        count = min(part, size - at)
        task_vectors(values, at, count, base, deltas)
        for m in range(experts):
            add_magnitudes(deltas[m], count, lanes[0, m])
        keep_rows(deltas, start + at, count, row, keys, rules, single, sorting, counts, rank, words)
        for m in range(experts):
            add_magnitudes(deltas[m], count, lanes[1, m])
    for m in range(experts):
        before[m] += lanes_total(lanes[0, m])
        after[m] += lanes_total(lanes[1, m])


@kernel
def merge_ranked(
    values: Array,
    start: int,
    row: int,
    keys: Array,
    rules: Array,
    factors: Array,
    votes: Array,
    weights: Array,
    shares: Array,
    plan: Array,
    out: Array,
) -> None:
    """Keep what the rules keep, multiply it by the model's factor, combine, add to the base."""
    experts, size = values.shape[0] - 1, values.shape[1]
    part = max(row, CHUNK // row * row)
    base, deltas = np.empty(part, weights.dtype), np.empty((experts, part), weights.dtype)
    single, sorting = np.empty(part, np.float32), np.empty((2, part), np.uint32)
    counts, rank = np.empty((DIGITS, BINS), np.uint32), np.empty(part, np.int32)
    words, scratch = np.empty(part + 8, np.uint32), np.empty((3, part), weights.dtype)
    for at in range(0, size, part):
        count = min(part, size - at)
        task_vectors(values, at, count, base, deltas)
        keep_rows(deltas, start + at, count, row, keys, rules, single, sorting, counts, rank, words)
        scale_each(deltas, factors, count)
        combine(deltas, votes, weights, shares, plan, count, base, scratch)
        encode(base, count, out, at)


def ranked_norms(block: Block, rules: list[list[float]], before: Array, after: Array) -> None:
    """Add each task vector's L1 norms (N) before and after the rules."""
    add_ranked_norms(
        block.values,
        block.start,
        block.row,
        keys_of(block),
        np.array(rules),
        before,
        after,
        block.numbers([]),
    )


def ranked(
    block: Block, rules: list[list[float]], factors: Array, terms: Terms, out: Array
) -> None:
    """Write the base plus the combined task vectors, each cut down by its rule (S)."""
    merge_ranked(
        block.values,
        block.start,
        block.row,
        keys_of(block),
        np.array(rules),
        factors,
        *terms,
        out,
    )


def keys_of(block: Block) -> Array:
    """The random keys (N, 2); zeros for a method that draws nothing."""
    experts = len(block.values) - 1
    return np.array(block.keys or [(0, 0)] * experts, np.uint64).reshape(experts, 2)
