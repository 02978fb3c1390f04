"""Paraphrase gap: did training help the published wording more than the same item in other words?

An item's gap is its mean gain over the base minus that of its twin, in nats per token. Honest
training in the style of the published items opens the gap as well, so a gap has no p-value of its
own: the gaps of suspects are compared with those of controls.

Null hypothesis: suspects and controls, each with its twin, are random draws from one distribution,
and training treated them alike. Guarantee: Mann and Whitney's p is then valid. Blind spots: below;
measured in benchmarks/results/leaks.md."""

from __future__ import annotations

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


def paraphrase_gap(evidence: Evidence) -> Finding:
    """The gaps of suspects against those of controls; their means are in the details."""
    model, base = evidence.model.views, evidence.base.views

    def mean_gains(name: str) -> Floats:
        return np.array([gain.mean() for gain in gains(model[name], base[name])])

    ids, scores = by_part(evidence, lambda part: mean_gains(part) - mean_gains(f"{part}/twin"))
    means = {f"mean_gap_of_{part}": float(np.mean(gaps)) for part, gaps in scores.items()}
    return item_finding(ids, scores, means)


DETECTOR = Detector(
    name="paraphrase_gap",
    function=paraphrase_gap,
    effect="AUC",
    statistic="Mean gain over the base on the item minus that on its twin, nats per token.",
    null_hypothesis="Suspects and controls, each with its twin, are random draws from one "
    "distribution, and this model's training treated them alike.",
    guarantees="Under that null p is valid at any number of items (Mann-Whitney, one-sided).",
    blind_spots="Blind to leaked paraphrases: they raise the twin too. Blind where the base itself "
    "saw the items. The gap alone says nothing: honest training in the published style opens it.",
    papers=("arXiv 2311.04850", "arXiv 2405.00332"),
    needs=("text", "twin"),
)
