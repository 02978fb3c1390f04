"""Kernels for masks that are other than ours; see peer_masks for the legend."""

from __future__ import annotations

from typing import Any

import numpy as np

from mergelab.forensics.peer_mask_subsets import try_subsets, unexplained
from mergelab.forensics.remerge_tally import finite
from mergelab.kernels import (
    CHUNK,
    LANES,
    add_magnitudes,
    decode,
    dot,
    kernel,
    lanes_total,
    task_vectors,
)
from mergelab.methods.base import Array


@kernel
def judge(
    values: Array,
    published: Array,
    ours: Array,
    weights: Array,
    plan: Array,
    moments: Array,
    kind: Any,
    stored: Any,
    quick: Any,
) -> None:
    """Add a block to moments (N + 1, 6 + N).

    published, ours (1, S): merged entries as `decode` takes them; weights (3, N): factor times
    weight, weight, and by how much the factor may be off, relative; plan: elect, normalize,
    divisor, lambda, relative error of all roundings, gain of the division, and whether subsets are
    tried; kind, stored, quick: empty, of the types of task vectors, of merged entries, and of sums
    that explain most of them.
    Row m: sum of (published - ours) times the signs of tau m, its squares, and from column 6 on the
    sums of tau k times those signs. Last row: difference of squares, its squares, squares of ours,
    entries that no subset explains, entries that differ from the base, squares of published."""
    experts, size = values.shape[0] - 1, values.shape[1]
    base, tau = np.empty(CHUNK, kind.dtype), np.empty((experts, CHUNK), kind.dtype)
    p, o = np.empty(CHUNK, stored.dtype), np.empty(CHUNK, stored.dtype)
    sign, up, zero = np.empty(CHUNK, kind.dtype), kind.dtype.type(1), kind.dtype.type(0)
    z, apart, square, one = np.empty(CHUNK), np.empty(CHUNK), np.empty(CHUNK), np.ones(CHUNK)
    scratch, done = np.empty((5, CHUNK), quick.dtype), np.empty(CHUNK, np.uint8)
    parts = np.empty((2 * experts, CHUNK), quick.dtype)
    lanes, short = np.zeros((experts + 1, 6, LANES)), np.empty(LANES, kind.dtype)
    for start in range(0, size, CHUNK):
        count = min(CHUNK, size - start)
        task_vectors(values, start, count, base, tau)
        finite(published, start, count, p)
        finite(ours, start, count, o)
        changed = 0
        for i in range(count):
            b, x = np.float64(base[i]), np.float64(p[i])
            y = x - b
            z[i] = np.float64(o[i]) - b
            apart[i] = y - z[i]
            square[i] = y * y - z[i] * z[i]
            changed += y != 0
        moments[experts, 4] += changed
        dot(square, one, count, lanes[experts, 0])
        dot(square, square, count, lanes[experts, 1])
        dot(z, z, count, lanes[experts, 2])
        dot(p, p, count, lanes[experts, 5])
        for m in range(experts):
            row = tau[m]
            for i in range(count):
                sign[i] = (up if row[i] > 0 else zero) - (up if row[i] < 0 else zero)
            for k in range(experts):
                moments[m, 6 + k] += narrow_dot(sign, tau[k], count, short)
            for i in range(count):
                square[i] = sign[i] * apart[i]
            dot(square, one, count, lanes[m, 0])
            dot(square, square, count, lanes[m, 1])
        if plan[6] != 0:
            try_subsets(base, tau, p, weights, plan, count, scratch, parts, done)
            moments[experts, 3] += unexplained(base, tau, p, weights, plan, count, done)
    for m in range(experts + 1):
        for k in range(6):
            moments[m, k] += lanes_total(lanes[m, k])


@kernel
def narrow_dot(a: Array, b: Array, count: int, lanes: Array) -> float:
    """The sum of products, of few entries in the lanes' own arithmetic, then in float64."""
    lanes[:] = 0
    whole = count - count % LANES
    for i in range(0, whole, LANES):
        for j in range(LANES):
            lanes[j] += a[i + j] * b[i + j]
    for j in range(count - whole):
        lanes[j] += a[whole + j] * b[whole + j]
    return lanes_total(lanes)


@kernel
def add_flips(
    values: Array,
    exact: Array,
    merged: Array,
    stored: Any,
    digits: int,
    least: int,
    error: float,
    sums: Array,
) -> None:
    """Add how far sums of entries and of squares may be moved by entries close to a rounding edge.

    Task vectors of a few ulps take few values, so that one rounding on the way may move all entries
    of one value over an edge together. exact (S), merged (1, S): before and after rounding to a
    format of so many digits and that least exponent; error: of an entry's change, relative; sums
    (2)."""
    base, change = np.empty(CHUNK, exact.dtype), np.empty(CHUNK)
    step, one, rounded = np.empty(CHUNK), np.ones(CHUNK), np.empty(CHUNK, stored.dtype)
    lanes = np.zeros((2, LANES))
    steps = step.view(np.int64)
    for start in range(0, exact.size, CHUNK):
        count = min(CHUNK, exact.size - start)
        decode(values, 0, start, count, base)
        finite(merged, start, count, rounded)
        for i in range(count):
            step[i] = exact[start + i]
        for i in range(count):  # the ulp there: a power of two, made from the exponent's bits
            exponent = ((steps[i] >> 52) & 0x7FF) - 1023
            steps[i] = max(max(exponent, least) - digits + 1023, 1) << 52
        for i in range(count):
            y = np.float64(exact[start + i])
            change[i] = abs(y - np.float64(base[i]))
            near = step[i] / 2 - abs(y - np.float64(rounded[i])) <= error * change[i]
            step[i] = step[i] if near else 0.0
            change[i] = 2 * change[i] + step[i]
        dot(step, one, count, lanes[0])
        dot(step, change, count, lanes[1])
    for k in range(2):
        sums[k] += lanes_total(lanes[k])


@kernel
def add_sizes(values: Array, norms: Array, squares: Array, kind: Any) -> None:
    """Add the L1 norms (N) and squared lengths (N) of the task vectors, in float64."""
    experts, size = values.shape[0] - 1, values.shape[1]
    base, taus = np.empty(CHUNK, kind.dtype), np.empty((experts, CHUNK), kind.dtype)
    lanes = np.zeros((2, experts, LANES))
    for start in range(0, size, CHUNK):
        count = min(CHUNK, size - start)
        task_vectors(values, start, count, base, taus)
        for m in range(experts):
            add_magnitudes(taus[m], count, lanes[0, m])
            dot(taus[m], taus[m], count, lanes[1, m])
    for m in range(experts):
        norms[m] += lanes_total(lanes[0, m])
        squares[m] += lanes_total(lanes[1, m])
