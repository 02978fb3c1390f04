"""DELLA: drop entries of each task vector at random, small ones more often."""

from __future__ import annotations

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
from mergelab.methods.sparsify import begin_norms, factors, l1_ratios
from mergelab.methods.task_vectors import MASKS_DIFFER, TIES_PAPER

PAPER = "Deep et al. 2024, DELLA-Merging, arXiv 2406.11617"


def row(settings: Settings, shape: tuple[int, ...]) -> int:
    """The last dimension; a vector is one row."""
    return shape[-1] if shape else 1


def rules(block: Block, settings: Settings) -> list[list[float]]:
    """Chances from density - epsilon for the smallest magnitude of a row to density + epsilon."""
    divide = settings.shared["rescale"] == "probability"
    return [
        rule(block.row, values["density"], values["epsilon"], divide=divide)
        for values in settings.experts
    ]


def measure_norms(block: Block, settings: Settings, stats: Stats, sums: Sums) -> None:
    """L1 norm of each task vector before and after the random mask."""
    ranked_norms(block, rules(block, settings), sums["before"], sums["after"])


def magprune(block: Block, settings: Settings, stats: Stats, out: Array, *, elect: bool) -> None:
    """Drop and rescale, then task arithmetic or the election of TIES."""
    scales = block.numbers(factors(settings, stats))
    ranked(block, rules(block, settings), scales, terms(block, settings, elect=elect), out)


def della(block: Block, settings: Settings, stats: Stats, state: Sums, out: Array) -> None:
    """Drop small entries more often, rescale, then elect signs and merge as TIES does (S)."""
    magprune(block, settings, stats, out, elect=True)


def della_linear(block: Block, settings: Settings, stats: Stats, state: Sums, out: Array) -> None:
    """Drop small entries more often, rescale, then task arithmetic (S)."""
    magprune(block, settings, stats, out, elect=False)


def check(settings: Settings) -> str | None:
    """What is wrong with these settings: chances must lie strictly between 0 and 1."""
    for values in settings.experts:
        density, epsilon = values["density"], values["epsilon"]
        low, high = density - epsilon, density + epsilon
        if 0 < density < 1 and not (low > 0 and high < 1):
            return (
                f"density {density:g} and epsilon {epsilon:g} give chances from {low:g} to "
                f"{high:g}, which must lie between 0 and 1, both excluded. Make epsilon smaller."
            )
    return None


EPSILON = Parameter(
    "epsilon",
    "number",
    True,
    0.15,
    "the chance to be kept rises from density - epsilon to density + epsilon with the rank",
    0.0,
    1.0,
)
RESCALE = Parameter(
    "rescale",
    "choice",
    False,
    "l1",
    "restore each task vector's L1 norm (l1, true), divide each entry by its chance as the paper "
    "(probability), or not at all (none, false)",
    choices=("l1", "probability", "none"),
    aliases={True: "l1", False: "none"},
)
ROUNDS = (Round(begin_norms, measure_norms, l1_ratios),)
DIFFERS = (
    MASKS_DIFFER,
    "of equal magnitudes in a row the lowest index ranks highest, mergekit's order is unspecified",
    "rows of one entry are kept with chance density, where mergekit fails; tensors of three or "
    "more dimensions are ranked along the last, where mergekit ranks along the second",
)

DELLA = Method(
    "della",
    1,
    "Drops entries of each task vector at random, small ones more often, then merges as TIES does.",
    "needed",
    (1, None),
    (WEIGHT, DENSITY, EPSILON, normalize(True), LAMBDA, RESCALE, INT8_MASK),
    della,
    ROUNDS,
    row=row,
    random=True,
    check=check,
    papers=(PAPER, TIES_PAPER),
    differs=DIFFERS,
)

DELLA_LINEAR = Method(
    "della_linear",
    1,
    "Drops entries of each task vector at random, small ones more often, adds the rest.",
    "needed",
    (1, None),
    (WEIGHT, DENSITY, EPSILON, normalize(False), LAMBDA, RESCALE, INT8_MASK),
    della_linear,
    ROUNDS,
    row=row,
    random=True,
    check=check,
    papers=(PAPER,),
    differs=DIFFERS,
)
