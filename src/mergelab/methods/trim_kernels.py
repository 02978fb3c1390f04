"""Loops of exact selection (see methods.trim): histograms of keys, and windows of ranks kept.

N task vectors, K series of keys (one each, or one of all together), C cuts."""

from __future__ import annotations

from typing import Any

import numpy as np

from mergelab.kernels import CHUNK, LANES, add_magnitudes, encode, kernel, lanes_total, task_vectors
from mergelab.methods.base import Array
from mergelab.methods.consensus import combine, scale_each

GROUP = 64  # keys among which one is looked for at once
NONE = 0xFFFFFFFF  # bits above those of any key


@kernel
def magnitudes(delta: Array, count: int, single: Array) -> None:
    """Write |delta[i]| as float32 to single[:count]; its bits, as integers, have the same order."""
    for i in range(count):
        single[i] = abs(delta[i])


@kernel
def variances(deltas: Array, count: int, single: Array) -> None:
    """Write the population variance over the models of each entry to single[:count].

    In float64, rounded to float32."""
    experts = deltas.shape[0]
    mean, total = np.zeros(CHUNK), np.zeros(CHUNK)
    for m in range(experts):
        for i in range(count):
            mean[i] = mean[i] + deltas[m, i]
    for i in range(count):
        mean[i] = mean[i] / experts
    for m in range(experts):
        for i in range(count):
            apart = deltas[m, i] - mean[i]
            total[i] = total[i] + apart * apart
    for i in range(count):
        single[i] = total[i] / experts


@kernel
def find_keys(deltas: Array, m: int, count: int, joint: bool, single: Array) -> None:
    """Write the keys of task vector m, or if `joint` those of all models together, to single."""
    if joint:
        variances(deltas, count, single)
    else:
        magnitudes(deltas[m], count, single)


@kernel
def count_near(bits: Array, count: int, low: Any, near: Array) -> None:
    """Count in near those of bits[:count] that are from `low` on, by how far; others are too far.

    Few are near: vectors look at a group for any."""
    wide = np.uint32(near.size)
    for at in range(0, count, GROUP):
        group, found = bits[at : min(at + GROUP, count)], np.uint32(0)
        for i in range(group.size):
            found |= np.uint32(np.uint32(group[i] - low) < wide)
        if found:
            for i in range(group.size):
                place = np.uint32(group[i] - low)
                if place < wide:
                    near[place] += np.uint32(1)


@kernel
def count_high(bits: Array, count: int, counts: Array, low: Any, near: Array) -> None:
    """Count the upper halves of bits[:count] in counts (65536); in near as count_near does."""
    wide = np.uint32(near.size)
    for i in range(count):
        counts[bits[i] >> np.uint32(16)] += 1
        place = np.uint32(bits[i] - low)
        if place < wide:
            near[place] += np.uint32(1)


@kernel
def add_high(
    values: Array, joint: bool, counts: Array, firsts: Array, near: Array, kind: Any
) -> int:
    """Count the upper halves of the keys' bits in counts (K, 65536); K: one per task vector, or 1.

    And in near (K, C, W 65536) the lower halves of those whose upper one is one of W from firsts
    (K, C) on. Gives the number of entries to choose from: those with a joint key not 0, or all."""
    experts, size = values.shape[0] - 1, values.shape[1]
    base, deltas = np.empty(CHUNK, kind.dtype), np.empty((experts, CHUNK), kind.dtype)
    single, found, last = np.empty(CHUNK, np.float32), 0, firsts.shape[1] - 1
    bits = single.view(np.uint32)
    for at in range(0, size, CHUNK):
        count = min(CHUNK, size - at)
        task_vectors(values, at, count, base, deltas)
        for k in range(counts.shape[0]):
            find_keys(deltas, k, count, joint, single)
            for c in range(last):
                count_near(bits, count, np.uint32(firsts[k, c] << np.uint32(16)), near[k, c])
            low = np.uint32(firsts[k, last] << np.uint32(16))
            count_high(bits, count, counts[k], low, near[k, last])
        if joint:
            for i in range(count):
                found += bits[i] != 0
    return found if joint else size


@kernel
def add_low(values: Array, joint: bool, highs: Array, counts: Array, kind: Any) -> None:
    """Count the lower halves of those whose upper half is highs (K, C) in counts (K, C, 65536)."""
    experts, size = values.shape[0] - 1, values.shape[1]
    base, deltas = np.empty(CHUNK, kind.dtype), np.empty((experts, CHUNK), kind.dtype)
    single = np.empty(CHUNK, np.float32)
    bits = single.view(np.uint32)
    for at in range(0, size, CHUNK):
        count = min(CHUNK, size - at)
        task_vectors(values, at, count, base, deltas)
        for k in range(highs.shape[0]):
            find_keys(deltas, k, count, joint, single)
            for c in range(highs.shape[1]):
                high, row = highs[k, c], counts[k, c]
                for i in range(count):
                    if bits[i] >> np.uint32(16) == high:
                        row[bits[i] & np.uint32(0xFFFF)] += 1


@kernel
def count_equal(values: Array, cuts: Array, seen: Array, kind: Any) -> None:
    """Add to seen (N, C) how many magnitudes equal the bits of each cut (N, C, 2)."""
    experts, size = values.shape[0] - 1, values.shape[1]
    base, deltas = np.empty(CHUNK, kind.dtype), np.empty((experts, CHUNK), kind.dtype)
    single = np.empty(CHUNK, np.float32)
    bits = single.view(np.uint32)
    for at in range(0, size, CHUNK):
        count = min(CHUNK, size - at)
        task_vectors(values, at, count, base, deltas)
        for m in range(experts):
            magnitudes(deltas[m], count, single)
            for c in range(cuts.shape[1]):
                cut = np.uint32(cuts[m, c, 0])
                for i in range(count):
                    seen[m, c] += bits[i] == cut


@kernel
def add_norms_beyond(
    values: Array, cuts: Array, norms: Array, beyond: Array, equal: Array, kind: Any
) -> None:
    """Add each task vector's L1 norm (N), that of what lies beyond each cut, and how many equal it.

    cuts (N, C, 2); beyond, equal (N, C)."""
    experts, size, ends = values.shape[0] - 1, values.shape[1], cuts.shape[1]
    base, deltas = np.empty(CHUNK, kind.dtype), np.empty((experts, CHUNK), kind.dtype)
    single, large = np.empty(CHUNK, np.float32), np.empty(CHUNK, kind.dtype)
    bits, zero = single.view(np.uint32), large.dtype.type(0)
    lanes = np.zeros((1 + ends, experts, LANES))
    for at in range(0, size, CHUNK):
        count = min(CHUNK, size - at)
        task_vectors(values, at, count, base, deltas)
        for m in range(experts):
            magnitudes(deltas[m], count, single)
            add_magnitudes(deltas[m], count, lanes[ends, m])
            for c in range(ends):
                cut, same = np.uint32(cuts[m, c, 0]), 0
                for i in range(count):
                    same += bits[i] == cut
                    large[i] = deltas[m, i] if bits[i] > cut else zero
                equal[m, c] += same
                add_magnitudes(large, count, lanes[c, m])
    for m in range(experts):
        norms[m] += lanes_total(lanes[ends, m])
        for c in range(ends):
            beyond[m, c] += lanes_total(lanes[c, m])


@kernel
def keep_window(
    delta: Array, count: int, cuts: Array, seen: Array, single: Array, keep: Array
) -> None:
    """Zero the entries of one task vector outside a window of ranks.

    cuts (C, 2): bits of a magnitude, and how many equal ones belong to the largest k. C = 1: the
    largest are kept. C = 2: the largest by the first cut are dropped, of the rest those by the
    second kept. seen (C): equal ones so far, updated. keep (C, CHUNK): scratch."""
    bits, zero = single.view(np.uint32), delta.dtype.type(0)
    magnitudes(delta, count, single)
    first, stop, parted = np.uint32(0), np.uint32(NONE), False  # bits inside the window
    for c in range(cuts.shape[0]):
        cut, equal = np.uint32(cuts[c, 0]), np.uint32(0)
        for i in range(count):
            equal += np.uint32(bits[i] == cut)
        rest = cuts[c, 1] - seen[c]
        seen[c] += equal
        parted |= 0 < rest < equal
        edge = np.uint32(cut if rest > 0 else min(cuts[c, 0] + 1, NONE))
        if c == cuts.shape[0] - 1:
            first = edge
        else:
            stop = edge
    if parted:
        keep_parted(delta, count, cuts, seen, bits, keep)
    else:
        for i in range(count):
            delta[i] = delta[i] if first <= bits[i] < stop else zero


@kernel
def keep_parted(
    delta: Array, count: int, cuts: Array, seen: Array, bits: Array, keep: Array
) -> None:
    """Finish keep_window where, of the entries equal to a cut, some belong to the largest k.

    seen (C) holds those of this chunk already."""
    last, zero = cuts.shape[0] - 1, delta.dtype.type(0)
    for c in range(last + 1):
        cut, inside, equal = np.uint32(cuts[c, 0]), keep[c], 0
        for i in range(count):
            equal += bits[i] == cut
        rest, found = cuts[c, 1] - (seen[c] - equal), 0
        for i in range(count):
            same = bits[i] == cut
            inside[i] = bits[i] > cut or (same and found < rest)
            found += same
    inside, outside = keep[last], keep[0]
    for i in range(count):
        delta[i] = delta[i] if inside[i] and not (last > 0 and outside[i]) else zero


@kernel
def merge_trimmed(
    values: Array,
    cuts: Array,
    seen: Array,
    factors: Array,
    votes: Array,
    weights: Array,
    shares: Array,
    plan: Array,
    out: Array,
) -> None:
    """Zero the entries outside each task vector's window, multiply by its factor, combine, add.

    cuts (N, C, 2); seen (N, C): equal ones in front of this block, updated."""
    experts, size = values.shape[0] - 1, values.shape[1]
    base, deltas = np.empty(CHUNK, weights.dtype), np.empty((experts, CHUNK), weights.dtype)
    scratch, single = np.empty((3, CHUNK), weights.dtype), np.empty(CHUNK, np.float32)
    keep = np.empty((cuts.shape[1], CHUNK), np.bool_)
    for at in range(0, size, CHUNK):
        count = min(CHUNK, size - at)
        task_vectors(values, at, count, base, deltas)
        for m in range(experts):
            keep_window(deltas[m], count, cuts[m], seen[m], single, keep)
        scale_each(deltas, factors, count)
        combine(deltas, votes, weights, shares, plan, count, base, scratch)
        encode(base, count, out, at)


@kernel
def add_majority(values: Array, cuts: Array, factors: Array, signs: Array) -> None:
    """Add to signs (1) the signs of the sums of the trimmed task vectors, equal ones all kept."""
    experts, size = values.shape[0] - 1, values.shape[1]
    base, deltas = np.empty(CHUNK, factors.dtype), np.empty((experts, CHUNK), factors.dtype)
    total, single = np.empty(CHUNK, factors.dtype), np.empty(CHUNK, np.float32)
    keep, seen = np.empty((cuts.shape[1], CHUNK), np.bool_), np.zeros(cuts.shape[1], np.int64)
    for at in range(0, size, CHUNK):
        count = min(CHUNK, size - at)
        task_vectors(values, at, count, base, deltas)
        total[:count] = 0
        for m in range(experts):
            keep_window(deltas[m], count, cuts[m], seen, single, keep)
        scale_each(deltas, factors, count)
        for m in range(experts):
            for i in range(count):
                total[i] = total[i] + deltas[m, i]
        for i in range(count):
            signs[0] += (total[i] > 0) - np.int64(total[i] < 0)
