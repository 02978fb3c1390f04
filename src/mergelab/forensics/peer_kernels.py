"""mergekit's arithmetic as kernels: every operation is rounded to the work dtype at once.

Numbers of all work dtypes are held as float32: one float32 operation, then one rounding, is what
an operation of a 16-bit format gives. Sums over models are taken in float32 and rounded once.

Legend: M models, the base first; N experts; S entries of a block; kind: the work dtype; a key is
the bits of a magnitude in float32, as an integer; a range of keys: least one, first one beyond."""

from __future__ import annotations

import numpy as np

from mergelab.kernels import CHUNK, decode, encode, kernel
from mergelab.methods.base import Array

F32, BF16, F16 = range(3)
KINDS = {"F32": F32, "BF16": BF16, "F16": F16}
ELECT, NORMALIZE, DIVISOR, LAMBDA, LEAST = range(5)  # entries of a plan
HALF = 1 << 16


@kernel
def snap(x: Array, count: int, kind: int) -> None:
    """Round x[:count] to numbers of the work dtype: to nearest, ties to even; a NaN stays one."""
    bits = x[:count].view(np.uint32)
    if kind == BF16:
        for i in range(bits.size):
            b = bits[i]
            up = np.uint32(b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1)))
            nan = (b & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
            up = np.uint32(b | np.uint32(0x400000)) if nan else up
            bits[i] = up & np.uint32(0xFFFF0000)
    elif kind == F16:
        small, half = np.float32(2.0**-14), np.float32(0.75)  # whose last bit is 2^-24
        for i in range(count):
            tiny = np.copysign((abs(x[i]) + half) - half, x[i])
            x[i] = tiny if abs(x[i]) < small else x[i]
        for i in range(bits.size):
            b = bits[i] & np.uint32(0x7FFFFFFF)
            up = np.uint32(b + np.uint32(0xFFF) + ((b >> np.uint32(13)) & np.uint32(1)))
            up = up & np.uint32(0xFFFFE000)
            beyond = (b >= np.uint32(0x477FF000)) & (b <= np.uint32(0x7F800000))
            up = np.uint32(0x7F800000) if beyond else up
            up = np.uint32(0x7FC00000) if b > np.uint32(0x7F800000) else up
            bits[i] = (bits[i] & np.uint32(0x80000000)) | up


@kernel
def load(values: Array, m: int, start: int, count: int, kind: int, out: Array) -> None:
    """Entries of model m in the work dtype."""
    decode(values, m, start, count, out)
    if values.itemsize != 2 or kind != BF16:
        snap(out, count, kind)


@kernel
def differences(
    values: Array, start: int, count: int, kind: int, base: Array, deltas: Array
) -> None:
    """The base, and every expert minus it (N, CHUNK)."""
    load(values, 0, start, count, kind, base)
    for m in range(deltas.shape[0]):
        delta = deltas[m]
        load(values, m + 1, start, count, kind, delta)
        for i in range(count):
            delta[i] = delta[i] - base[i]
        snap(delta, count, kind)


@kernel
def scale(x: Array, factor: float, count: int, kind: int) -> None:
    """x times a number."""
    for i in range(count):
        x[i] = x[i] * factor
    snap(x, count, kind)


@kernel
def total(parts: Array, count: int, kind: int, out: Array) -> None:
    """Sum over the models (N, CHUNK)."""
    out[:count] = 0
    for m in range(parts.shape[0]):
        part = parts[m]
        for i in range(count):
            out[i] = out[i] + part[i]
    snap(out, count, kind)


# --- task vectors ---------------------------------------------------------------------------------


@kernel
def combine(
    parts: Array,
    vote: Array,
    weights: Array,
    plan: Array,
    kind: int,
    count: int,
    base: Array,
    scratch: Array,
) -> None:
    """base += lambda times `vote`, or the sum of the parts (N, CHUNK) that have its sign.

    A vote of zero elects plus. scratch (2, CHUNK)."""
    merged, share = scratch[0], scratch[1]
    if plan[ELECT] != 0:
        elect(parts, weights, count, vote, merged, share)
        snap(merged, count, kind)
        snap(share, count, kind)
    else:
        merged[:count] = vote[:count]
        share[:count] = plan[DIVISOR]
    if plan[NORMALIZE] != 0:
        one, least = np.float32(1), plan[LEAST]
        for i in range(count):
            merged[i] = merged[i] / max(share[i] if share[i] != 0 else one, least)
        snap(merged, count, kind)
    if plan[LAMBDA] != 1:
        scale(merged, plan[LAMBDA], count, kind)
    for i in range(count):
        base[i] = base[i] + merged[i]
    snap(base, count, kind)


@kernel
def elect(
    parts: Array, weights: Array, count: int, vote: Array, merged: Array, share: Array
) -> None:
    """Sum of the parts (N, CHUNK) whose sign is that of the vote, and of their weights."""
    one, zero = np.float32(1), np.float32(0)
    merged[:count] = 0
    share[:count] = 0
    for m in range(parts.shape[0]):
        part, weight = parts[m], weights[m]
        for i in range(count):
            agrees = one if (part[i] != 0) & ((part[i] > 0) == (vote[i] >= 0)) else zero
            merged[i] = merged[i] + part[i] * agrees
            share[i] = share[i] + weight * agrees


@kernel
def merge_window(
    values: Array,
    keep: Array,
    sure: Array,
    weights: Array,
    plan: Array,
    kind: int,
    out: Array,
    counts: Array,
    free: Array,
) -> None:
    """Combine the entries of each task vector whose keys are within a range.

    keep, sure (N, 2): ranges of keys: what is kept here, and what is kept for certain. If `free`
    (S) is not empty, counts (N) are raised by the entries kept for certain, and bit m of `free`
    tells those that expert m keeps here only."""
    experts, size = values.shape[0] - 1, values.shape[1]
    base, deltas = np.empty(CHUNK, np.float32), np.empty((experts, CHUNK), np.float32)
    vote, scratch = np.empty(CHUNK, np.float32), np.empty((2, CHUNK), np.float32)
    for at in range(0, size, CHUNK):
        count = min(CHUNK, size - at)
        differences(values, at, count, kind, base, deltas)
        for m in range(experts):
            keys = deltas[m][:count].view(np.uint32)
            if free.size:
                tell_free(keys, keep[m], sure[m], m, free[at : at + count], counts)
            erase(keys, keep[m])
            scale(deltas[m], weights[m], count, kind)
        total(deltas, count, kind, vote)
        combine(deltas, vote, weights, plan, kind, count, base, scratch)
        encode(base, count, out, at)


@kernel
def tell_free(bits: Array, keep: Array, sure: Array, m: int, free: Array, counts: Array) -> None:
    """Set bit m of `free` where a key is in `keep` only; count those in `sure`."""
    least, beyond, low, high = keep[0], keep[1], sure[0], sure[1]
    bit, found = np.uint8(1 << min(m, 7)), 0
    for i in range(bits.size):
        key = bits[i] & np.uint32(0x7FFFFFFF)
        certain = (key >= low) & (key < high)
        open = (key >= least) & (key < beyond) & ~certain
        found += certain
        before = free[i] if m > 0 else np.uint8(0)
        free[i] = before | (bit if open else np.uint8(0))
    counts[m] += found


@kernel
def erase(bits: Array, keep: Array) -> None:
    """Make entries zero whose keys are out of a range; the sign stays, as in a product with 0."""
    least, beyond = keep[0], keep[1]
    for i in range(bits.size):
        key = bits[i] & np.uint32(0x7FFFFFFF)
        inside = (key >= least) & (key < beyond)
        bits[i] = bits[i] if inside else bits[i] & np.uint32(0x80000000)


@kernel
def count_keys(values: Array, upper: Array, kind: int, counts: Array) -> None:
    """Count keys of each task vector: counts (N, HALF) by upper halves, where upper (N) is -1.

    Else by lower halves, of the keys with that upper half; -2: not at all."""
    experts, size = values.shape[0] - 1, values.shape[1]
    base, deltas = np.empty(CHUNK, np.float32), np.empty((experts, CHUNK), np.float32)
    for at in range(0, size, CHUNK):
        count = min(CHUNK, size - at)
        differences(values, at, count, kind, base, deltas)
        for m in range(experts):
            count_halves(deltas[m][:count].view(np.uint32), upper[m], counts[m])


@kernel
def count_halves(bits: Array, upper: int, counts: Array) -> None:
    """See `count_keys`."""
    if upper == -1:
        for i in range(bits.size):
            counts[(bits[i] >> np.uint32(16)) & np.uint32(0x7FFF)] += 1
    elif upper >= 0:
        for i in range(bits.size):
            if np.int64((bits[i] >> np.uint32(16)) & np.uint32(0x7FFF)) == upper:
                counts[bits[i] & np.uint32(0xFFFF)] += 1
