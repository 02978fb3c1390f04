"""Merges of task vectors (expert minus base): task arithmetic, TIES, DARE."""

from __future__ import annotations

import numpy as np

from mergelab.kernels import CHUNK, encode, kernel, task_vectors
from mergelab.methods import sparsify
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
    scope,
)
from mergelab.methods.consensus import combine, terms
from mergelab.methods.trim import Trim
from mergelab.methods.trim_kernels import add_majority, merge_trimmed

TASK_ARITHMETIC_PAPER = "Ilharco et al. 2023, Editing models with task arithmetic, arXiv 2212.04089"
TIES_PAPER = "Yadav et al. 2023, TIES-Merging, arXiv 2306.01708"
DARE_PAPER = "Yu et al. 2024, Language models are super mario (DARE), arXiv 2311.03099"


@kernel
def merge_all(
    values: Array, votes: Array, weights: Array, shares: Array, plan: Array, out: Array
) -> None:
    """Combine whole task vectors and add the result to the base."""
    experts, size = values.shape[0] - 1, values.shape[1]
    base, deltas = np.empty(CHUNK, weights.dtype), np.empty((experts, CHUNK), weights.dtype)
    scratch = np.empty((3, CHUNK), weights.dtype)
    for at in range(0, size, CHUNK):
        count = min(CHUNK, size - at)
        task_vectors(values, at, count, base, deltas)
        combine(deltas, votes, weights, shares, plan, count, base, scratch)
        encode(base, count, out, at)


def task_arithmetic(
    block: Block, settings: Settings, stats: Stats, state: Sums, out: Array
) -> None:
    """base + lambda * sum of w_m tau_m (S)."""
    merge_all(block.values, *terms(block, settings, elect=False), out)


def dare(block: Block, settings: Settings, stats: Stats, out: Array, *, elect: bool) -> None:
    """Drop entries at random, rescale the rest, then task arithmetic or the election of TIES."""
    sparsify.merge_random(
        block.values,
        np.array(block.keys, np.uint64),
        sparsify.limits(settings),
        block.start,
        block.numbers(sparsify.factors(settings, stats)),
        *terms(block, settings, elect=elect),
        out,
    )


def dare_linear(block: Block, settings: Settings, stats: Stats, state: Sums, out: Array) -> None:
    """Drop and rescale, then task arithmetic (S)."""
    dare(block, settings, stats, out, elect=False)


def dare_ties(block: Block, settings: Settings, stats: Stats, state: Sums, out: Array) -> None:
    """Drop and rescale, then elect signs and merge as TIES does (S)."""
    dare(block, settings, stats, out, elect=True)


def kept_count(settings: Settings, density: float, size: int) -> int:
    """How many of `size` entries TIES keeps: int(density size), of mergekit's convention at least
    one; the authors' code keeps one more, and all that equal it."""
    if density >= 1:
        return size
    flavour = settings.shared["flavour"]
    if flavour == "mergekit":
        return max(1, int(density * size)) if density > 0 else 0
    return int(density * size) + int(flavour == "paper")


TRIM = Trim(
    lambda settings, size: [[kept_count(settings, d, size)] for d in settings.each("density")],
    lambda settings: min(settings.each("density")) >= 1,
    lambda settings: bool(settings.shared["flavour"] == "paper"),
    lambda settings: bool(settings.shared["rescale"]),
)


def begin_majority(settings: Settings, row: int) -> Sums:
    """Sum of the elected signs; only the paper's convention looks at it."""
    return {"signs": np.zeros(1, np.int64)} if settings.shared["flavour"] == "paper" else {}


def measure_majority(block: Block, settings: Settings, stats: Stats, sums: Sums) -> None:
    """Signs of the sums of the trimmed task vectors."""
    factors = TRIM.factors(block, settings, stats)
    add_majority(block.values, TRIM.cuts(settings, stats), factors, sums["signs"])


def conclude_majority(sums: Sums, settings: Settings, stats: Stats) -> Stats:
    """Does the majority of the entries elect plus?"""
    return {"plus": bool(sums["signs"][0] > 0)}


def ties(block: Block, settings: Settings, stats: Stats, state: Sums, out: Array) -> None:
    """Trim each task vector to its largest magnitudes, elect signs, merge those that agree (S)."""
    merge_trimmed(
        block.values,
        TRIM.cuts(settings, stats),
        state["seen"],
        TRIM.factors(block, settings, stats),
        *terms(
            block,
            settings,
            elect=True,
            flavour=settings.shared["flavour"],
            plus=stats.get("plus", True),
        ),
        out,
    )


RESTORE = Parameter(
    "rescale", "flag", False, False, "restore each task vector's L1 norm after it is trimmed"
)
NO_RESCALE = Parameter(
    "rescale", "flag", False, False, "accepted from mergekit recipes; has no effect"
)
RESCALE = Parameter(
    "rescale",
    "choice",
    False,
    "l1",
    "restore each task vector's L1 norm (l1, true), divide by the density as the paper (density), "
    "or not at all (none, false)",
    choices=("l1", "density", "none"),
    aliases={True: "l1", False: "none"},
)
FLAVOUR = Parameter(
    "flavour",
    "choice",
    False,
    "mergekit",
    "whose convention: that of mergekit; of the paper (all entries equal to the last are kept, "
    "votes are unweighted, tied ones get the majority's sign); or of peft (unweighted votes; "
    "divides by the number of models that agree)",
    choices=("mergekit", "paper", "peft"),
)
NO_DENSITY = Parameter(
    "density", "number", True, 1.0, "accepted from mergekit recipes; has no effect", 0.0, 1.0
)
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
    (WEIGHT, normalize(False), LAMBDA, NO_DENSITY, NO_RESCALE, INT8_MASK),
    task_arithmetic,
    spreads=True,
    papers=(TASK_ARITHMETIC_PAPER,),
)

TIES = Method(
    "ties",
    1,
    "Trims each task vector to its largest entries, elects a sign per entry, merges what agrees.",
    "needed",
    (1, None),
    (
        WEIGHT,
        DENSITY,
        normalize(True),
        LAMBDA,
        RESTORE,
        FLAVOUR,
        scope("trim each tensor, as mergekit, or the whole flattened model, as the paper"),
        INT8_MASK,
    ),
    ties,
    (*TRIM.rounds, TRIM.norms, Round(begin_majority, measure_majority, conclude_majority)),
    running=TRIM.begin_seen,
    papers=(TIES_PAPER,),
    differs=(
        "entries of equal magnitude at the cut: ours keeps the lowest index, mergekit's order is "
        "unspecified",
        "as in mergekit and unlike the paper, trimming is per tensor and weights enter the vote; "
        "flavour: paper and scope: model give the paper's TIES",
    ),
)

DARE_LINEAR = Method(
    "dare_linear",
    4,
    "Drops entries of each task vector at random, rescales the rest, adds them to the base.",
    "needed",
    (1, None),
    (WEIGHT, DENSITY, normalize(False), LAMBDA, RESCALE, INT8_MASK),
    dare_linear,
    (Round(sparsify.begin_norms, sparsify.measure_norms, sparsify.l1_ratios),),
    random=True,
    papers=(DARE_PAPER,),
    differs=(MASKS_DIFFER,),
)

DARE_TIES = Method(
    "dare_ties",
    3,
    "Drops entries of each task vector at random, rescales the rest, then merges as TIES does.",
    "needed",
    (1, None),
    (WEIGHT, DENSITY, normalize(False), LAMBDA, RESCALE, INT8_MASK),
    dare_ties,
    (Round(sparsify.begin_norms, sparsify.measure_norms, sparsify.l1_ratios),),
    random=True,
    papers=(DARE_PAPER, TIES_PAPER),
    differs=(MASKS_DIFFER,),
)
