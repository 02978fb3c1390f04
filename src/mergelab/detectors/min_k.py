"""Min-K%++: are the least likely tokens of an item less unlikely than its context makes them?

Each token's log p is standardised by mean and standard deviation of log p under the model's own
next-token distribution; the score is the mean of the lowest 20 % (Zhang et al. 2024, arXiv
2404.02936). It uses no reference model, so it measures how easy an item is as well as whether it
was seen, and merging hides leaks from it: it is shown because people expect it and never flags.

Null hypothesis: as for base_loss. Guarantees: none is used, there is no p. Blind spots: below."""

from __future__ import annotations

import numpy as np

from mergelab.detectors.base import (
    Detector,
    Evidence,
    Finding,
    Floats,
    Tokens,
    by_part,
    item_finding,
)

LOWEST = 0.2  # share of an item's tokens


def scores(view: Tokens) -> Floats:
    """Mean of the lowest 20 % of (log p - mean) / std, one value per item."""
    found = []
    for logprob, mean, std in zip(view.logprob, view.mean, view.std, strict=True):
        above = logprob.astype(np.float64) - mean
        standard = np.sort(above / np.maximum(std, 1e-6))  # a distribution that is sure of a token
        found.append(standard[: max(1, int(LOWEST * len(standard)))].mean())
    return np.array(found)


def min_k_plus(evidence: Evidence) -> Finding:
    """AUC of the scores, without p."""
    views = evidence.model.views
    found = by_part(evidence, lambda name: scores(views[name]))
    return item_finding(*found, informational=True)


DETECTOR = Detector(
    name="min_k_plus",
    function=min_k_plus,
    effect="AUC",
    statistic="Mean of the lowest 20 % of an item's standardised token log-probabilities.",
    null_hypothesis="Suspects and controls are random draws from one distribution, and this "
    "model's training treated them alike.",
    guarantees="None: shown because it is well known.",
    blind_spots="Measures how easy an item is as well as whether it was seen. Weak at few copies; "
    "merging hides leaks from it that detectors calibrated by the base still see.",
    papers=("arXiv 2404.02936", "arXiv 2310.16789"),
    informational=True,
)
