"""Model Breadcrumbs: drop the outliers and the small entries of each task vector."""

from __future__ import annotations

import numpy as np

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
from mergelab.methods.consensus import terms
from mergelab.methods.ranked import ranked, ranked_norms, rule
from mergelab.methods.sparsify import l1_ratios
from mergelab.methods.task_vectors import RESTORE, TIES_PAPER
from mergelab.methods.trim import Trim
from mergelab.methods.trim_kernels import merge_trimmed

PAPER = "Davari and Belilovsky 2023, Model Breadcrumbs, arXiv 2312.06795"


def windows(settings: Settings, size: int) -> list[list[int]]:
    """Per expert the ranks from the largest on where keeping begins and ends (N, 2).

    Of a tensor's entries int(density size) are kept, whatever gamma is, as in mergekit. Of a row's,
    the authors drop int(gamma size) first; then there may be fewer left."""
    found = []
    for values in settings.experts:
        density, outliers = values["density"], int(values["gamma"] * size)
        kept = int(density * size)
        if not by_rows(settings):
            outliers = min(outliers, size - kept) if density < 1 else 0
        found.append([outliers, min(size, outliers + kept)])
    return found


def by_rows(settings: Settings) -> bool:
    """Is each row trimmed by itself, as the authors do?"""
    return bool(settings.shared["granularity"] == "row")


TRIM = Trim(
    windows,
    lambda settings: by_rows(settings) or min(settings.each("density")) >= 1,
    rescale=lambda settings: bool(settings.shared["rescale"]),
)


def row(settings: Settings, shape: tuple[int, ...]) -> int:
    """The last dimension, or 1 if whole tensors are trimmed."""
    return shape[-1] if shape and by_rows(settings) else 1


def rules(block: Block, settings: Settings) -> list[list[float]]:
    """What becomes of each rank in a row, from the smallest on."""
    size = block.row
    return [rule(size, 1.0, window=(size - b, size - a)) for a, b in windows(settings, size)]


def begin_norms(settings: Settings, row: int) -> Sums:
    """Zero L1 norms before and after, if they are to be restored."""
    if not by_rows(settings):
        return TRIM.begin_norms(settings, row)
    if not settings.shared["rescale"]:
        return {}
    count = len(settings.experts)
    return {"before": np.zeros(count), "after": np.zeros(count)}


def measure_norms(block: Block, settings: Settings, stats: Stats, sums: Sums) -> None:
    """L1 norms of the task vectors before and after trimming."""
    if by_rows(settings):
        ranked_norms(block, rules(block, settings), sums["before"], sums["after"])
    else:
        TRIM.measure_norms(block, settings, stats, sums)


def conclude_norms(sums: Sums, settings: Settings, stats: Stats) -> Stats:
    """Factor per expert that restores its L1 norm."""
    conclude = l1_ratios if by_rows(settings) else TRIM.conclude_norms
    return conclude(sums, settings, stats)


def trimmed(
    block: Block, settings: Settings, stats: Stats, state: Sums, out: Array, *, elect: bool
) -> None:
    """Trim, restore the norm if asked for, then task arithmetic or the election of TIES."""
    factors, ending = TRIM.factors(block, settings, stats), terms(block, settings, elect=elect)
    if by_rows(settings):
        ranked(block, rules(block, settings), factors, ending, out)
    else:
        cuts = TRIM.cuts(settings, stats)
        merge_trimmed(block.values, cuts, state["seen"], factors, *ending, out)


def breadcrumbs(block: Block, settings: Settings, stats: Stats, state: Sums, out: Array) -> None:
    """Trim both ends, then task arithmetic (S)."""
    trimmed(block, settings, stats, state, out, elect=False)


def breadcrumbs_ties(
    block: Block, settings: Settings, stats: Stats, state: Sums, out: Array
) -> None:
    """Trim both ends, then elect signs and merge as TIES does (S)."""
    trimmed(block, settings, stats, state, out, elect=True)


GAMMA = Parameter(
    "gamma", "number", True, 0.01, "share of the largest entries dropped first", 0.0, 1.0
)
GRANULARITY = Parameter(
    "granularity",
    "choice",
    False,
    "tensor",
    "shares of a whole tensor, as mergekit, or of each row of its last dimension, as the authors",
    choices=("tensor", "row"),
)
PARAMETERS = (WEIGHT, DENSITY, GAMMA, normalize(False), LAMBDA, RESTORE, GRANULARITY, INT8_MASK)
ROUNDS = (*TRIM.rounds, Round(begin_norms, measure_norms, conclude_norms))
DIFFERS = (
    "entries of equal magnitude at a cut: the lowest index counts as the largest, mergekit's order "
    "is unspecified",
    "mergekit drops fewer outliers if density + gamma exceeds 1; by rows, as in the authors' code, "
    "fewer entries are kept then",
)

BREADCRUMBS = Method(
    "breadcrumbs",
    1,
    "Drops the largest and the small entries of each task vector, adds the rest to the base.",
    "needed",
    (1, None),
    PARAMETERS,
    breadcrumbs,
    ROUNDS,
    running=TRIM.begin_seen,
    row=row,
    papers=(PAPER,),
    differs=DIFFERS,
)

BREADCRUMBS_TIES = Method(
    "breadcrumbs_ties",
    1,
    "Drops the largest and the small entries of each task vector, then merges as TIES does.",
    "needed",
    (1, None),
    PARAMETERS,
    breadcrumbs_ties,
    ROUNDS,
    running=TRIM.begin_seen,
    row=row,
    papers=(PAPER, TIES_PAPER),
    differs=DIFFERS,
)
