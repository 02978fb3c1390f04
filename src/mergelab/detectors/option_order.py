"""Option order: is a question likelier with its options in the published order?

A model that read a multiple-choice item knows it in its published order (Ni et al. 2024, arXiv
2409.01790). Each item is scored in up to 24 orders. Its score is the share of other orders that
the model, beyond its base, finds less likely than the published one (ties count half): the base
takes out orders that are likelier for everyone, such as sorted numbers. p is the larger of two:

by rank   suspects against controls (Mann and Whitney)
by order  the suspects' published orders against their other ones, by the exact distribution of
          their summed ranks when each item's published order is any of its orders by chance

A leak makes both small. The first needs no arbitrary order but controls of the suspects'
distribution; for the second it is the other way round. The details hold both, and how many items
are likeliest in the published order, with the exact binomial p (Ni et al.).

Null hypothesis, guarantee and blind spots: below."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergelab import statistics
from mergelab.detectors.base import PARTS, Detector, Evidence, Finding, Floats, Tokens, item_finding

Integers = NDArray[np.int64]


def option_order(evidence: Evidence) -> Finding:
    """The published order's rank among all orders, suspects against controls and by itself."""
    ids, scores = {}, {}
    details: dict[str, Any] = {}
    for part in PARTS:
        model, base = (p.views[f"{part}/orders"] for p in (evidence.model, evidence.base))
        advantages = by_item(model, base)
        ids[part] = list(advantages)
        scores[part] = np.array([rank(values) for values in advantages.values()])
        details[part] = exact(list(advantages.values()))
    finding = item_finding(ids, scores)
    p = {"p_mann_whitney": statistics.mann_whitney(scores["suspects"], scores["controls"]),
         "p_order": details["suspects"]["p_rank"]}  # fmt: skip
    return replace(finding, p=max(p.values()), details=p | details)


def by_item(model: Tokens, base: Tokens) -> dict[str, Floats]:
    """log p(model) - log p(base) of an item's texts, the published order first, by item id."""
    sums = [
        float(np.sum(m, dtype=np.float64) - np.sum(b, dtype=np.float64))
        for m, b in zip(model.logprob, base.logprob, strict=True)
    ]
    pairs = groupby(zip(model.ids, sums, strict=True), key=lambda pair: pair[0])
    return {name: np.array([value for _, value in group]) for name, group in pairs}


def rank(values: Floats) -> float:
    """Share of the other orders below the published one, in [0, 1]; 0.5 by chance."""
    first, others = values[0], values[1:]
    return float(np.mean((others < first) + 0.5 * (others == first)))


def exact(advantages: list[Floats]) -> dict[str, Any]:
    """How high and how often highest the published orders rank, each with the p of so much if
    they are arbitrary: one of an item's orders by chance, whatever the model makes of each."""
    ranks = [_half_ranks(values) for values in advantages]
    likeliest = [(r == 2 * (len(r) - 1)).astype(np.int64) for r in ranks]
    return {
        "mean_rank": float(np.mean([rank(values) for values in advantages])),
        "p_rank": _tail(ranks),
        "published_likeliest": sum(int(best[0]) for best in likeliest),
        "p_likeliest": _tail(likeliest),
    }


def _half_ranks(values: Floats) -> Integers:
    """Of each value: twice the number of others below it, plus the number of others equal."""
    ordered = np.sort(values)
    below = np.searchsorted(ordered, values)
    return below + np.searchsorted(ordered, values, side="right") - 1


def _tail(values: list[Integers]) -> float:
    """P(sum of one value of each item, drawn by chance >= sum of the items' first values)."""
    chance = np.ones(1)  # of a sum of 0, 1, ...
    for item in values:
        chance = np.convolve(chance, np.bincount(item) / len(item))
    return min(1.0, float(chance[sum(int(item[0]) for item in values) :].sum()))


DETECTOR = Detector(
    name="option_order",
    function=option_order,
    effect="AUC",
    statistic="Share of an item's other option orders that the model, beyond its base, finds less "
    "likely than the published one.",
    null_hypothesis="Training did not show the model the suspects in their published order; and "
    "suspects and controls are random draws from one distribution that training treated alike, or "
    "the published order of the suspects' options is arbitrary.",
    guarantees="Under that null p is valid: it is the larger of two one-sided p-values, Mann and "
    "Whitney's against the controls (exact without ties, else by the normal approximation, too "
    "small for a handful of items) and an exact one over the suspects' orders, each valid in one "
    "of the two cases.",
    blind_spots="Weak below about 8 copies. Blind where the base itself saw the items, and where "
    "training showed the options in another order or layout (the question, then a line 'A. ...' "
    "per option). Looks at the first 100 items of a part.",
    papers=("arXiv 2409.01790", "arXiv 2505.24263"),
    needs=("orders",),
    version=2,
)
