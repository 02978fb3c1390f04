"""Kernels: is a published entry the base plus some subset of the experts' rescaled task vectors?

Most are explained at once, chunk by chunk, in the arithmetic that is near enough; what is left is
looked into one by one. See peer_masks for the legend, peer_mask_kernels.judge for plan, weights."""

from __future__ import annotations

import numpy as np

from mergelab.kernels import kernel
from mergelab.methods.base import Array
from mergelab.methods.consensus import NO_WEIGHT

MARGIN = 2.0**-8  # of an entry's room that is left to the slow way
SLACK, WIDE_SLACK = 2.0**-16, 2.0**-40  # how far sums in float32 and float64 are trusted


@kernel
def try_subsets(
    base: Array,
    tau: Array,
    published: Array,
    weights: Array,
    plan: Array,
    count: int,
    scratch: Array,
    parts: Array,
    done: Array,
) -> None:
    """Mark in `done` which entries of a chunk some subset surely explains; see `explain`.

    Where signs are elected, only those parts are tried that move an entry the way it went. Subsets
    follow each other so that one part is added or taken away at a time. The sums are trusted
    so far only: entries that are explained by a hair are left unmarked. (Where float64 numbers are
    to fit to their last bits, `explain` rounds as much: a hair may then go either way.)
    scratch (5, CHUNK): sums of parts, of their weights, and what `prepare` fills in."""
    merged, share, gap, room, slack = scratch[0], scratch[1], scratch[2], scratch[3], scratch[4]
    experts, zero, scale = tau.shape[0], scratch.dtype.type(0), scratch.dtype.type(plan[3])
    prepare(base, tau, published, weights, plan, count, gap, room, slack, parts)
    rest = scratch.dtype.type(1 if plan[1] == 0 else plan[2])
    fixed = plan[1] == 0 or plan[0] == 0
    for i in range(count):
        merged[i] = zero
        share[i] = rest if fixed else zero
        done[i] = 1 if (abs(gap[i]) <= room[i]) & (room[i] < np.inf) else 0
    for step in range(1, 1 << experts):
        m = 0
        while not (step >> m) & 1:
            m += 1
        add = scratch.dtype.type(-1 if ((step ^ (step >> 1)) >> m) & 1 == 0 else 1)
        add_scaled(parts[m], add, count, merged)
        add_scaled(parts[experts + m], add, count, share)
        mark(gap, merged, share, scale, slack, room, count, done)


@kernel
def unexplained(
    base: Array, tau: Array, published: Array, weights: Array, plan: Array, count: int, done: Array
) -> int:
    """How many entries of a chunk that are not done no subset explains; see `explain`."""
    left, found, one = 0, 0, np.empty(tau.shape[0])
    for i in range(count):
        left += done[i] == 0
    if left:
        for i in range(count):
            if done[i] == 0:
                for m in range(one.size):
                    one[m] = tau[m, i]
                found += not explain(base[i], one, published[i], weights, plan)
    return found


@kernel
def add_scaled(x: Array, factor: float, count: int, out: Array) -> None:
    """out += factor x."""
    for i in range(count):
        out[i] = out[i] + factor * x[i]


@kernel
def mark(
    gap: Array,
    merged: Array,
    share: Array,
    scale: float,
    slack: Array,
    room: Array,
    count: int,
    done: Array,
) -> None:
    """Set `done` to 1 where gap + scale merged / share is surely within `room`.

    Products are faster than divisions; where they overflow, none is less than the other."""
    for i in range(count):
        off = abs(gap[i] * share[i] + scale * merged[i]) + slack[i]
        done[i] = 1 if off < room[i] * abs(share[i]) else done[i]


@kernel
def prepare(
    base: Array,
    tau: Array,
    published: Array,
    weights: Array,
    plan: Array,
    count: int,
    gap: Array,
    room: Array,
    slack: Array,
    parts: Array,
) -> None:
    """Fill in what `try_subsets` needs: parts and weights (2 N), gaps, room and slack."""
    number, experts = gap.dtype.type, tau.shape[0]
    zero = number(0)
    for i in range(count):
        gap[i] = number(base[i]) - number(published[i])
        room[i] = zero
    way = number(-1 if plan[3] < 0 else 1)
    for m in range(experts):
        part, weight, row = parts[m], parts[experts + m], tau[m]
        factor, error = (
            number(weights[0, m]),
            number(weights[2, m] + plan[4]),
        )
        own = number(0 if plan[1] == 0 or plan[0] == 0 else weights[1, m])
        for i in range(count):
            part[i] = factor * row[i]
        for i in range(count):
            room[i] = room[i] + abs(part[i]) * error
        if plan[0] != 0:
            for i in range(count):
                part[i] = part[i] if part[i] * gap[i] * way < 0 else zero
        for i in range(count):
            weight[i] = own if part[i] != 0 else zero
    gain, rounding = number(abs(plan[3]) * plan[5]), number(plan[4])
    close = number(1 - MARGIN)
    slip = SLACK if gap.itemsize == 4 else WIDE_SLACK
    least = weights[2].min() + plan[4]  # of a part's relative errors: bounds the sum of all parts
    trust = number(slip * abs(plan[3]) / least)
    for i in range(count):
        slack[i] = trust * room[i] + number(1e-30)
    for i in range(count):
        room[i] = close * (gain * room[i] + rounding * (abs(base[i]) + abs(published[i])))


@kernel
def explain(base: float, tau: Array, given: float, weights: Array, plan: Array) -> bool:
    """Is an entry the base plus what some subset of the task vectors' entries (N) gives?

    Its sum may be off by `error`, and the entry by `room`; by more where elected weights nearly
    cancel, and are divided by. Sums of weights below NO_WEIGHT are not."""
    experts, error = tau.shape[0], 0.0
    for m in range(experts):
        error += abs(weights[0, m] * tau[m]) * (weights[2, m] + plan[4])
    room = plan[4] * (abs(np.float64(base)) + abs(given))
    for subset in range((1 << experts) - 1, -1, -1):
        vote = 0.0
        for m in range(experts):
            if (subset >> m) & 1:
                vote += weights[0, m] * tau[m]
        for sign in (1.0, -1.0):
            if vote * sign < -error:
                continue
            merged, share, gain = 0.0, 0.0, plan[5]
            for m in range(experts):
                part = weights[0, m] * tau[m]
                if (subset >> m) & 1 and (plan[0] == 0 or part * sign > 0):
                    merged += part
                    share += weights[1, m]
            if plan[1] != 0:
                divisor = plan[2] if plan[0] == 0 else share
                divisor = divisor if abs(divisor) >= NO_WEIGHT else 1.0
                merged, gain = merged / divisor, max(gain, 1 / abs(divisor))
            if abs(base + plan[3] * merged - given) <= abs(plan[3]) * gain * error + room:
                return True
    return False
