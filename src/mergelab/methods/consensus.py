"""How task vectors become one: a weighted sum, or the sign election of TIES (Yadav et al. 2023)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mergelab.kernels import kernel
from mergelab.methods.base import Array, Block, Settings

NO_WEIGHT = 1e-8  # a sum of weights below this is not divided by
ELECT, PLUS, NORMALIZE, DIVISOR, LAMBDA, LEAST = range(6)  # entries of a plan


class Terms(NamedTuple):
    """What `combine` needs: per expert the factors of vote, value and share (N), and a plan (6)."""

    votes: Array
    weights: Array
    shares: Array
    plan: Array


def terms(
    block: Block, settings: Settings, *, elect: bool, flavour: str = "mergekit", plus: bool = True
) -> Terms:
    """Factors for one tensor. Entries whose votes sum to zero elect plus if `plus`, else minus.

    mergekit lets the weights enter the vote and divides by the weights that agree; the paper's
    vote is unweighted; peft divides by the number of models that agree."""
    weights = block.numbers(settings.each("weight"))
    ones = np.ones_like(weights)
    divisor = block.work(0)
    for weight in weights:
        divisor += weight
    if abs(sum(settings.each("weight"))) < NO_WEIGHT:
        divisor = block.work(1)
    shared = settings.shared
    plan = [elect, plus, shared["normalize"], divisor, shared["lambda"], -np.inf]
    votes = weights if flavour == "mergekit" else ones
    shares = ones if flavour == "peft" else weights
    return Terms(votes, weights, shares, block.numbers(plan))


@kernel
def scale_each(deltas: Array, factors: Array, count: int) -> None:
    """Multiply each task vector (N, count) by its factor (N)."""
    for m in range(deltas.shape[0]):
        factor = factors[m]
        if factor != 1:
            for i in range(count):
                deltas[m, i] = deltas[m, i] * factor


@kernel
def combine(
    deltas: Array,
    votes: Array,
    weights: Array,
    shares: Array,
    plan: Array,
    count: int,
    base: Array,
    scratch: Array,
) -> None:
    """Combine task vectors (N, CHUNK) and add lambda times the result to base[:count].

    scratch (3, CHUNK)."""
    vote, merged, share = scratch[0], scratch[1], scratch[2]
    merged[:count] = 0
    if plan[ELECT] != 0:
        elect(deltas, votes, weights, shares, plan[PLUS] != 0, count, vote, merged, share)
        if plan[NORMALIZE] != 0:
            one, least = share.dtype.type(1), plan[LEAST]
            for i in range(count):
                merged[i] = merged[i] / max(share[i] if share[i] != 0 else one, least)
    else:
        for m in range(deltas.shape[0]):
            weight = weights[m]
            for i in range(count):
                merged[i] = merged[i] + deltas[m, i] * weight
        if plan[NORMALIZE] != 0:
            for i in range(count):
                merged[i] = merged[i] / plan[DIVISOR]
    scale = plan[LAMBDA]
    for i in range(count):
        base[i] = base[i] + merged[i] * scale


@kernel
def elect(
    deltas: Array,
    votes: Array,
    weights: Array,
    shares: Array,
    plus: bool,
    count: int,
    vote: Array,
    merged: Array,
    share: Array,
) -> None:
    """Add to `merged` the weighted entries whose vote has the sign of the votes' sum.

    A zero entry never votes nor counts; `share` becomes the sum of the shares that agree."""
    zero, one = vote.dtype.type(0), vote.dtype.type(1)
    vote[:count] = 0
    share[:count] = 0
    for m in range(deltas.shape[0]):
        delta, factor = deltas[m], votes[m]
        for i in range(count):
            vote[i] = vote[i] + delta[i] * factor
    for i in range(count):
        vote[i] = one if vote[i] > 0 or (vote[i] == 0 and plus) else -one
    for m in range(deltas.shape[0]):
        delta, factor, weight, part = deltas[m], votes[m], weights[m], shares[m]
        for i in range(count):
            agrees = delta[i] * factor * vote[i] > 0
            merged[i] = merged[i] + (delta[i] * weight if agrees else zero)
            share[i] = share[i] + (part if agrees else zero)
