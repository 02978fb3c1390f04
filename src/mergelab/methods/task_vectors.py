"""Merges of task vectors (expert minus base): task arithmetic, TIES, DARE."""

from __future__ import annotations

import numpy as np

from mergelab.methods import sparsify
from mergelab.methods.averages import sum_of_weights, weighted_sum
from mergelab.methods.base import (
    DENSITY,
    INT8_MASK,
    LAMBDA,
    WEIGHT,
    Array,
    Block,
    Method,
    Parameter,
    Round,
    Settings,
    Stats,
    Sums,
    normalize,
)

NO_WEIGHT = 1e-8  # a sum of weights below this is not divided by
TASK_ARITHMETIC_PAPER = "Ilharco et al. 2023, Editing models with task arithmetic, arXiv 2212.04089"
TIES_PAPER = "Yadav et al. 2023, TIES-Merging, arXiv 2306.01708"
DARE_PAPER = "Yu et al. 2024, Language models are super mario (DARE), arXiv 2311.03099"


def add(block: Block, settings: Settings, task_vector: Array) -> Array:
    """base + lambda * merged task vector (S)."""
    assert block.base is not None
    result: Array = block.base + task_vector * task_vector.dtype.type(settings.shared["lambda"])
    return result


def summed(deltas: list[Array], settings: Settings) -> Array:
    """Weighted sum of task vectors (S), divided by the sum of weights if `normalize`."""
    weights = settings.each("weight")
    merged = weighted_sum(deltas, weights)
    if settings.shared["normalize"] and abs(sum(weights)) >= NO_WEIGHT:
        merged /= sum_of_weights(weights, merged)
    return merged


def elected(deltas: list[Array], settings: Settings) -> Array:
    """TIES' elect and merge: the sign of the weighted sum wins, only agreeing entries count (S).

    A sum of exactly zero elects plus; a zero entry never votes nor counts. With `normalize` the
    sum is divided by the weights of the entries that agree."""
    kind = deltas[0].dtype.type
    weights = settings.each("weight")
    weighted = [delta * kind(weight) for delta, weight in zip(deltas, weights, strict=True)]
    sign = np.where(weighted_sum(weighted, [1.0] * len(weighted)) >= 0, kind(1), kind(-1))
    merged: Array = np.zeros_like(sign)
    share = np.zeros_like(sign)
    for value, weight in zip(weighted, weights, strict=True):
        agrees = np.sign(value) == sign
        merged += np.where(agrees, value, kind(0))
        share += np.where(agrees, kind(weight), kind(0))
    if settings.shared["normalize"]:
        merged /= np.where(share == 0, kind(1), share)
    return merged


def task_arithmetic(block: Block, settings: Settings, stats: Stats, before: Sums) -> Array:
    """base + lambda * sum of w_m tau_m (S)."""
    return add(block, settings, summed(block.deltas, settings))


def ties(block: Block, settings: Settings, stats: Stats, before: Sums) -> Array:
    """Trim each task vector to its largest magnitudes, elect signs, merge those that agree (S)."""
    deltas = sparsify.trimmed(block, settings, stats, before)
    return add(block, settings, elected(deltas, settings))


def rescaled(block: Block, settings: Settings, stats: Stats) -> list[Array]:
    """DARE: drop entries at random and rescale the rest (N arrays of S)."""
    deltas = sparsify.dropped(block, settings)
    factors = stats["factors"]
    return [d * d.dtype.type(f) for d, f in zip(deltas, factors, strict=True)]


def dare_linear(block: Block, settings: Settings, stats: Stats, before: Sums) -> Array:
    """Drop and rescale, then task arithmetic (S)."""
    return add(block, settings, summed(rescaled(block, settings, stats), settings))


def dare_ties(block: Block, settings: Settings, stats: Stats, before: Sums) -> Array:
    """Drop and rescale, then elect signs and merge as TIES does (S)."""
    return add(block, settings, elected(rescaled(block, settings, stats), settings))


RESCALE = Parameter("rescale", "flag", False, True, "restore each task vector's L1 norm")
TRIM = (
    Round(sparsify.measure_high, sparsify.conclude_high),
    Round(sparsify.measure_low, sparsify.conclude_low),
    Round(sparsify.measure_equal, lambda sums, settings, stats: {}),
)
DROP = (Round(sparsify.measure_l1, sparsify.l1_ratios),)
MASKS_DIFFER = (
    "random masks come from a counter-based generator keyed by seed, model and tensor, "
    "so they differ from mergekit's, which depend on the order of execution"
)

TASK_ARITHMETIC = Method(
    "task_arithmetic",
    2,
    "Adds the weighted task vectors of the experts to the base.",
    "needed",
    (1, None),
    (WEIGHT, normalize(False), LAMBDA, INT8_MASK),
    task_arithmetic,
    papers=(TASK_ARITHMETIC_PAPER,),
)

TIES = Method(
    "ties",
    1,
    "Trims each task vector to its largest entries, elects a sign per entry, merges what agrees.",
    "needed",
    (1, None),
    (WEIGHT, DENSITY, normalize(True), LAMBDA, INT8_MASK),
    ties,
    TRIM,
    papers=(TIES_PAPER,),
    differs=(
        "entries of equal magnitude at the cut: ours keeps the lowest index, mergekit's order is "
        "unspecified",
        "as in mergekit and unlike the paper, trimming is per tensor and weights enter the vote",
    ),
)

DARE_LINEAR = Method(
    "dare_linear",
    3,
    "Drops entries of each task vector at random, rescales the rest, adds them to the base.",
    "needed",
    (1, None),
    (WEIGHT, DENSITY, normalize(False), LAMBDA, RESCALE, INT8_MASK),
    dare_linear,
    DROP,
    random=True,
    papers=(DARE_PAPER,),
    differs=(MASKS_DIFFER,),
)

DARE_TIES = Method(
    "dare_ties",
    2,
    "Drops entries of each task vector at random, rescales the rest, then merges as TIES does.",
    "needed",
    (1, None),
    (WEIGHT, DENSITY, normalize(False), LAMBDA, RESCALE, INT8_MASK),
    dare_ties,
    DROP,
    random=True,
    papers=(DARE_PAPER, TIES_PAPER),
    differs=(MASKS_DIFFER,),
)
