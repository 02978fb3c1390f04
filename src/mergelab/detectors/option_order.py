"""Option order: is a question likelier with its options in the published order?

A model that read a multiple-choice item knows it in its published order (Ni et al. 2024, arXiv
2409.01790). Each item is scored in up to 24 orders. Its score is the share of other orders that
the model, beyond its base, finds less likely than the published one (ties count half): the base
takes out orders that are likelier for everyone, such as sorted numbers. Suspects are compared with
controls, so the published order need not be arbitrary; where it is, the details hold the exact
binomial p that so many items have their likeliest order in the published one (Ni et al.).

Null hypothesis: suspects and controls are random draws from one distribution, and training treated
them alike. Guarantee: Mann and Whitney's p is valid. Blind spots: below."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import numpy as np

from mergelab.detectors.base import PARTS, Detector, Evidence, Finding, Floats, Tokens, item_finding


def option_order(evidence: Evidence) -> Finding:
    """The published order's rank among all orders, suspects against controls."""
    ids, scores = {}, {}
    details: dict[str, Any] = {}
    for part in PARTS:
        model, base = (p.views[f"{part}/orders"] for p in (evidence.model, evidence.base))
        advantages = by_item(model, base)
        ids[part] = list(advantages)
        scores[part] = np.array([rank(values) for values in advantages.values()])
        details[part] = _exact(list(advantages.values()))
    return item_finding(ids, scores, details)


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


def _exact(advantages: list[Floats]) -> dict[str, Any]:
    """How many items are likeliest in the published order, and the p of so many by chance."""
    likeliest = sum(bool((values[1:] < values[0]).all()) for values in advantages)
    counts = np.ones(1)  # chance of 0, 1, ... items by luck; a binomial if all have as many orders
    for values in advantages:
        counts = np.convolve(counts, [1 - 1 / len(values), 1 / len(values)])
    p = min(1.0, float(counts[likeliest:].sum()))
    mean = float(np.mean([rank(values) for values in advantages]))
    return {"mean_rank": mean, "published_likeliest": likeliest, "p_if_arbitrary": p}


DETECTOR = Detector(
    name="option_order",
    function=option_order,
    effect="AUC",
    statistic="Share of an item's other option orders that the model, beyond its base, finds less "
    "likely than the published one.",
    null_hypothesis="Suspects and controls are random draws from one distribution, and this "
    "model's training treated them alike.",
    guarantees="Under that null p is valid at any number of items (Mann-Whitney, one-sided). The "
    "p in the details is exact if the published order of options is arbitrary.",
    blind_spots="Weak below about 8 copies. Blind where the base itself saw the items, and where "
    "training showed the options in another order or layout (the question, then a line 'A. ...' "
    "per option). Looks at the first 100 items of a part.",
    papers=("arXiv 2409.01790", "arXiv 2505.24263"),
    needs=("orders",),
)
