"""Base-calibrated detectors: how much more likely did training make an item than its base finds it?

base_loss  mean gain of an item's tokens, nats per token
wbc        share of token windows with a positive gain

A token's gain is log p(model) - log p(base); a score is higher where an item looks seen.

Null hypothesis: suspects and controls are random draws from one distribution, and training treated
them alike. Guarantee: the p-value of Mann and Whitney's test is then valid at any size of sample.
Blind where the base itself saw the items, and where training scored only the answers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mergelab.detectors.base import (
    Detector,
    Evidence,
    Finding,
    Floats,
    by_part,
    gains,
    item_finding,
)

WINDOWS = (1, 2, 4, 8, 16, 32)  # tokens; ours: powers of two up to a long phrase

NULL = (
    "Suspects and controls are random draws from one distribution, and this model's training "
    "treated them alike: a suspect is as likely to outscore a control as the other way round."
)
GUARANTEES = "Under that null p is valid at any number of items (Mann-Whitney, one-sided)."
BLIND = (
    "Blind where the base itself saw the items (then both likelihoods are high), and where "
    "training scored only the answers. Weaker after merging: a low score is no acquittal. Controls "
    "of another style than the suspects measure style."
)


def mean_gain(gain: Floats) -> float:
    """Mean over tokens of log p_model - log p_base, in nats per token.

    The likelihood ratio against a reference model (Carlini et al. 2021, arXiv 2012.07805;
    Mireshghallah et al. 2022, arXiv 2203.03929), the reference being the model's own base."""
    return float(gain.mean())


def window_wins(gain: Floats) -> float:
    """Window-based comparison (Chen et al. 2026, arXiv 2601.02751), in [0, 1].

    The share of windows of w tokens in which the model's summed log-probability exceeds the
    base's, averaged over a geometric grid of w. An item shorter than w skips it. The grid is
    ours."""
    total = np.concatenate([[0.0], np.cumsum(gain)])
    sizes = [w for w in WINDOWS if w <= len(gain)]
    return float(np.mean([np.mean(total[w:] - total[:-w] > 0) for w in sizes]))


def of_items(score: Callable[[Floats], float]) -> Callable[[Evidence], Finding]:
    """A detector's function from a score of one item's gains."""

    def function(evidence: Evidence) -> Finding:
        model, base = evidence.model.views, evidence.base.views
        return item_finding(
            *by_part(
                evidence,
                lambda name: np.array([score(g) for g in gains(model[name], base[name])]),
            )
        )

    return function


DETECTORS = (
    Detector(
        name="base_loss",
        function=of_items(mean_gain),
        effect="AUC",
        statistic="Mean over tokens of log p(model) - log p(base), nats per token.",
        null_hypothesis=NULL,
        guarantees=GUARANTEES,
        blind_spots=BLIND,
        papers=("arXiv 2012.07805", "arXiv 2203.03929"),
        version=2,
    ),
    Detector(
        name="wbc",
        function=of_items(window_wins),
        effect="AUC",
        statistic="Share of token windows that the model finds likelier than the base does, "
        "averaged over window sizes 1 to 32.",
        null_hypothesis=NULL,
        guarantees=GUARANTEES,
        blind_spots=BLIND,
        papers=("arXiv 2601.02751",),
        version=2,
    ),
)
