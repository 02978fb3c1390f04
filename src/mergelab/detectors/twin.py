"""Twin benchmark: did the model gain more on the published items than on the same items reworded?

Difference in differences: (model - base) on the original minus (model - base) on the twin, item by
item. The base takes out how much harder the twin is; what is left is what the wording was worth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mergelab import statistics
from mergelab.detectors.base import Detector, Evidence, Finding, Floats
from mergelab.errors import NotAvailable

LEAST = 2  # items


def twin(evidence: Evidence) -> Finding:
    """Mean gap over the scored items that are no controls, paired bootstrap over items, one-sided p
    by sign flips; details hold the same gap on the controls, where these are scored."""
    both = (evidence.model.name, evidence.base.name)
    controls = {str(item["id"]) for item in evidence.items.get("controls", ())}
    scored = scored_by(evidence, both)
    ids = [name for name in scored if name not in controls]
    if len(ids) < LEAST:
        raise NotAvailable(
            f"'{both[0]}' and '{both[1]}' share {len(ids)} items scored on the benchmark and on "
            f"its twin, but {LEAST} are needed: let both use the same items"
        )
    d = gaps(evidence, ids)
    there = [name for name in scored if name in controls]
    beside = _summary(gaps(evidence, there)) if len(there) >= LEAST else None
    means = {
        which: {
            kind: float(np.mean([evidence.scores[name][kind][key] for key in ids]))
            for kind in ("original", "twin")
        }
        for which, name in zip(("model", "base"), both, strict=True)
    }
    return Finding(
        effect=float(d.mean()),
        ci95=_interval(d),
        p=statistics.sign_flip_p(d, greater=True),
        n_suspects=len(ids),
        n_controls=len(there),
        details={"means": means, "controls": beside},
    )


def scored_by(evidence: Evidence, models: Sequence[str]) -> list[str]:
    """Ids, sorted, of the items that every one of these models has both scores of."""
    tables = [
        evidence.scores.get(name, {}).get(kind, {})
        for name in models
        for kind in ("original", "twin")
    ]
    return sorted(set(tables[0]).intersection(*tables[1:]))


def gaps(evidence: Evidence, ids: Sequence[str]) -> Floats:
    """(model - base) on the original minus (model - base) on the twin, for each item."""

    def column(name: str, kind: str) -> Floats:
        return np.array([evidence.scores[name][kind][key] for key in ids], dtype=np.float64)

    model, base = evidence.model.name, evidence.base.name
    original = column(model, "original") - column(base, "original")
    reworded = column(model, "twin") - column(base, "twin")
    return np.asarray(original - reworded, dtype=np.float64)


def _summary(d: Floats) -> dict[str, object]:
    return {"effect": float(d.mean()), "ci95": list(_interval(d)), "n": len(d)}


def _interval(d: Floats) -> tuple[float, float]:
    return statistics.bootstrap_ratio(d, np.ones(len(d)))


DETECTOR = Detector(
    name="twin",
    function=twin,
    effect="gain on the benchmark beyond the gain on its twin",
    statistic="Mean over items of (model - base) on the original minus (model - base) on the twin, "
    "in units of the metric.",
    null_hypothesis="Training changed the scores of an item and of its twin alike: each item's gap "
    "is as likely to be positive as negative.",
    guarantees="Under that null p is valid at any number of items (sign flips), and the interval "
    "covers 0 in 95 of 100 clean cells. Needs no access to the weights.",
    blind_spots="Honest training in the style of the originals moves the gap too: look at the gap "
    "on controls beside it, and take a metric of right and wrong, not a likelihood. So does a twin "
    "that is easier or harder, if training changed the model's strength much (ConStat corrects for "
    "that). Blind to leaks that carry over to the twin, and to memory that earns no points.",
    papers=("arXiv 2405.00332", "arXiv 2311.04850"),
    needs=("scores", "twin_scores"),
)
