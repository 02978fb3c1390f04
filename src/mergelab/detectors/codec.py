"""CoDeC: does an item get less likely after others of its benchmark?

A model that never saw a benchmark learns its style from examples before an item; one that knows the
item has nothing to learn and is distracted (CoDeC, arXiv 2510.27055). The score is
log p alone - log p after three neighbours, per token; the paper's verdict is the share of items
with a positive score. That share tells apart distributions, not items: same-style tuning raises it
as a leak does, so it is shown because people expect it and never flags.

Null hypothesis: as for base_loss. Guarantees: none is used, there is no p. Blind spots: below."""

from __future__ import annotations

import numpy as np

from mergelab.detectors.base import Detector, Evidence, Finding, Floats, by_part, item_finding


def codec(evidence: Evidence) -> Finding:
    """AUC of the items' scores, without p; the paper's shares are in the details."""
    views = evidence.model.views

    def drop(name: str) -> Floats:
        alone, after = views[name].logprob, views[f"{name}/context"].logprob
        pairs = zip(alone, after, strict=True)
        return np.array([np.mean(a.astype(np.float64) - b) for a, b in pairs])

    ids, scores = by_part(evidence, drop)
    shares = {f"share_of_{part}": float(np.mean(s > 0)) for part, s in scores.items()}
    return item_finding(ids, scores, shares, informational=True)


DETECTOR = Detector(
    name="codec",
    function=codec,
    effect="AUC",
    statistic="Mean over tokens of log p(item alone) - log p(item after three others of its part), "
    "nats per token; as a set, the share of items where that is positive.",
    null_hypothesis="Suspects and controls are random draws from one distribution, and this "
    "model's training treated them alike.",
    guarantees="None: shown because it is well known.",
    blind_spots="Its share of items is high after honest training in the benchmark's style too. "
    "Says nothing of texts so long that no room is left for others before them.",
    papers=("arXiv 2510.27055",),
    needs=("text", "context"),
    informational=True,
)
