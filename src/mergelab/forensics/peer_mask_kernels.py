"""Kernels for masks that are other than ours; see peer_masks for the legend."""

from __future__ import annotations

from typing import Any

import numpy as np

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
) -> None:
    """Add a block to moments (N + 1, 5 + N).

    published, ours (S): merged entries, float64; weights (3, N): factor times weight, weight, and
    by how much the factor may be off, relative; plan: elect, normalize, divisor, lambda, relative
    error of all roundings, gain of the division, and whether subsets are tried.
    Row m: sum of (published - ours) times the signs of tau m, its squares, and from column 5 on the
    sums of tau k times those signs. Last row: difference of squares, its squares, squares of ours,
    entries that no subset explains, and entries that differ from the base."""
    experts, size = values.shape[0] - 1, values.shape[1]
    base, taus = np.empty(CHUNK, kind.dtype), np.empty((experts, CHUNK), kind.dtype)
    tau, sign = np.empty((experts, CHUNK)), np.empty(CHUNK)
    b, p, z, apart = np.empty(CHUNK), np.empty(CHUNK), np.empty(CHUNK), np.empty(CHUNK)
    square, one, scratch = np.empty(CHUNK), np.ones(CHUNK), np.empty((6, CHUNK))
    lanes = np.zeros((experts + 1, 5 + experts, LANES))
    for start in range(0, size, CHUNK):
        count = min(CHUNK, size - start)
        task_vectors(values, start, count, base, taus)
        for m in range(experts):
            row, narrow = tau[m], taus[m]
            for i in range(count):
                row[i] = narrow[i]
        changed = 0
        for i in range(count):
            b[i], p[i] = base[i], published[start + i]
            y = p[i] - b[i]
            z[i] = ours[start + i] - b[i]
            apart[i] = y - z[i]
            square[i] = y * y - z[i] * z[i]
            changed += y != 0
        for m in range(experts):
            row = tau[m]
            for i in range(count):
                sign[i] = (1.0 if row[i] > 0 else 0.0) - (1.0 if row[i] < 0 else 0.0)
            for k in range(experts):
                dot(sign, tau[k], count, lanes[m, 5 + k])
            for i in range(count):
                sign[i] = sign[i] * apart[i]
            dot(sign, one, count, lanes[m, 0])
            dot(sign, sign, count, lanes[m, 1])
        dot(square, one, count, lanes[experts, 0])
        dot(square, square, count, lanes[experts, 1])
        dot(z, z, count, lanes[experts, 2])
        moments[experts, 4] += changed
        if plan[6] != 0:
            moments[experts, 3] += unexplained(b, tau, p, weights, plan, count, scratch)
    for m in range(experts + 1):
        for k in range(5 + experts):
            moments[m, k] += lanes_total(lanes[m, k])


@kernel
def unexplained(
    base: Array,
    tau: Array,
    published: Array,
    weights: Array,
    plan: Array,
    count: int,
    scratch: Array,
) -> int:
    """How many entries of a chunk no subset explains; see `explain`.

    Most are explained by a subset whose vote has the sign of its sum: that is looked at for all
    entries at once. scratch (6, CHUNK)."""
    experts = tau.shape[0]
    room, done, errors = scratch[0], scratch[4], scratch[5]
    done[:count] = 0
    errors[:count] = 0
    for m in range(experts):
        row, factor, error = tau[m], weights[0, m], weights[2, m] + plan[4]
        for i in range(count):
            errors[i] = errors[i] + abs(factor * row[i]) * error
    gain, rounding = abs(plan[3]) * plan[5], plan[4]
    for i in range(count):
        room[i] = gain * errors[i] + rounding * (abs(base[i]) + abs(published[i]))
    for subset in range((1 << experts) - 1, -1, -1):
        try_subset(subset, base, tau, published, weights, plan, count, scratch)
    found = 0
    for i in range(count):
        if done[i] == 0:
            one = tau[:, i].copy()
            found += not explain(base[i], one, published[i], weights, plan, errors[i], room[i])
    return found


@kernel
def try_subset(
    subset: int,
    base: Array,
    tau: Array,
    published: Array,
    weights: Array,
    plan: Array,
    count: int,
    scratch: Array,
) -> None:
    """Mark in scratch[4] which entries a subset explains, within scratch[0]."""
    vote, merged, share, done = scratch[1], scratch[2], scratch[3], scratch[4]
    vote[:count] = 0
    for m in range(tau.shape[0]):
        if (subset >> m) & 1:
            add_scaled(tau[m], weights[0, m], count, vote)
    merged[:count] = vote[:count]
    share[:count] = plan[2]
    if plan[0] != 0:
        merged[:count] = 0
        share[:count] = 0
        for m in range(tau.shape[0]):
            if (subset >> m) & 1:
                add_agreeing(tau[m], weights[0, m], weights[1, m], vote, count, merged, share)
    if plan[1] == 0:
        share[:count] = 1
    mark(base, merged, share, plan[3], published, scratch[0], count, done)


@kernel
def add_scaled(tau: Array, factor: float, count: int, out: Array) -> None:
    """out += factor tau."""
    for i in range(count):
        out[i] = out[i] + factor * tau[i]


@kernel
def add_agreeing(
    tau: Array,
    factor: float,
    weight: float,
    vote: Array,
    count: int,
    merged: Array,
    share: Array,
) -> None:
    """Add the entries with the sign of the vote, and their weight."""
    for i in range(count):
        part = factor * tau[i]
        agrees = 1.0 if (part != 0) & ((part > 0) == (vote[i] >= 0)) else 0.0
        merged[i] = merged[i] + part * agrees
        share[i] = share[i] + weight * agrees


@kernel
def mark(
    base: Array,
    merged: Array,
    share: Array,
    scale: float,
    published: Array,
    room: Array,
    count: int,
    done: Array,
) -> None:
    """Set `done` to 1 where base + scale merged / share is within `room` of what is published.

    A share of 0 is not divided by; products are faster than divisions."""
    for i in range(count):
        divisor = share[i] if share[i] != 0 else 1.0
        apart = abs((base[i] - published[i]) * divisor + scale * merged[i])
        done[i] = 1.0 if apart <= room[i] * abs(divisor) else done[i]


@kernel
def explain(
    base: float, tau: Array, given: float, weights: Array, plan: Array, error: float, room: float
) -> bool:
    """Is an entry the base plus what some subset of the task vectors' entries (N) gives?

    error: by how much their sum may be off; room: and with it the entry."""
    experts = tau.shape[0]
    for subset in range((1 << experts) - 1, -1, -1):
        vote = 0.0
        for m in range(experts):
            if (subset >> m) & 1:
                vote += weights[0, m] * tau[m]
        for sign in (1.0, -1.0):
            if vote * sign < -error:
                continue
            merged, share = 0.0, 0.0
            for m in range(experts):
                part = weights[0, m] * tau[m]
                if (subset >> m) & 1 and (plan[0] == 0 or part * sign > 0):
                    merged += part
                    share += weights[1, m]
            if plan[1] != 0:
                divisor = plan[2] if plan[0] == 0 else share
                merged = merged / (divisor if divisor != 0 else 1.0)
            if abs(base + plan[3] * merged - given) <= room:
                return True
    return False


@kernel
def add_flips(
    values: Array, exact: Array, merged: Array, digits: int, least: int, error: float, sums: Array
) -> None:
    """Add how far sums of entries and of squares may be moved by entries close to a rounding edge.

    Task vectors of a few ulps take few values, so that one rounding on the way may move all entries
    of one value over an edge together. exact, merged (S): before and after rounding to a format of
    so many digits and that least exponent; error: of an entry's change, relative; sums (2)."""
    base, change = np.empty(CHUNK, exact.dtype), np.empty(CHUNK)
    step, one = np.empty(CHUNK), np.ones(CHUNK)
    lanes = np.zeros((2, LANES))
    steps = step.view(np.int64)
    for start in range(0, exact.size, CHUNK):
        count = min(CHUNK, exact.size - start)
        decode(values, 0, start, count, base)
        for i in range(count):
            step[i] = exact[start + i]
        for i in range(count):  # the ulp there: a power of two, made from the exponent's bits
            exponent = ((steps[i] >> 52) & 0x7FF) - 1023
            steps[i] = max(max(exponent, least) - digits + 1023, 1) << 52
        for i in range(count):
            y = np.float64(exact[start + i])
            change[i] = abs(y - np.float64(base[i]))
            near = step[i] / 2 - abs(y - merged[start + i]) <= error * change[i]
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
