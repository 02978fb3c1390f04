"""What a detector is, what it may look at and what it says: pure functions over stored evidence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergelab import statistics

FLAGGED_FPR = 0.05  # share of the controls that may lie above a suspect that is flagged

Floats = NDArray[np.float64]
Items = Sequence[NDArray[np.float32]]
PARTS = ("suspects", "controls")
VIEWS = ("text", "twin", "context", "orders")  # ways of asking a model about an item
NEEDS = (*VIEWS, "answer", "siblings", "scores", "twin_scores", "corpus")


@dataclass(frozen=True)
class Tokens:
    """One model's evidence on one list of texts: an array per text, one value per scored token.

    `logprob` of the token, `mean` and `std` of log p under the model's own next-token distribution,
    in nats; `answer` is the index of the first token of the text's answer (its length if none).
    The view of orders repeats an item's id for each of its texts."""

    ids: tuple[str, ...]
    logprob: Items
    mean: Items
    std: Items
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Probed:
    """All that one model was asked about one check, by view of the items.

    Views: suspects, controls; suspects/twin, controls/twin (the same items in other words);
    suspects/context, controls/context (each text after others of its part);
    suspects/orders, controls/orders (the question with its choices in up to 24 orders, the
    published one first; the first items of a part only). Only views that the detector needs."""

    name: str
    views: Mapping[str, Tokens]


@dataclass(frozen=True)
class Evidence:
    """What is known of one model and one check; empty where a study does not say.

    `siblings` are models of the same base known to be clean, never the model itself. `scores` holds
    the metric per item id of the model, its base and its siblings, if more of it is better:
    {model: {"original" | "twin": {id: value}}};
    `items` the items of suspects and controls as prepared; `corpus` the texts that the model and
    its ancestors are declared to have been trained on, by "ancestor: part"."""

    benchmark: str
    model: Probed
    base: Probed
    siblings: tuple[Probed, ...] = ()
    scores: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    items: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    corpus: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """What a detector found: an effect with its 95 % interval, and p where its null gives one.

    `effect` is what `Detector.effect` names (an AUC, a gap, a share). `item_scores` holds one score
    per suspect and control, higher meaning "looks seen", or is None, and `ids` the items' ids if
    they are not all items of the parts, in order; `flagged` are ids of items to leave out of a
    clean score; `details` are further numbers for the report, plain JSON."""

    effect: float
    ci95: tuple[float, float] | None
    p: float | None
    n_suspects: int
    n_controls: int
    item_scores: Mapping[str, Floats] | None = None
    ids: Mapping[str, Sequence[str]] | None = None
    flagged: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Detector:
    """A named statistic with what it means, assumes, guarantees and cannot see.

    `needs` names what the evidence must hold: some of VIEWS, answer (the text view with the index
    of the answer), siblings (at least one), scores, twin_scores (of the benchmarks that the check
    names) and corpus. An `informational` detector never flags: its p is None and its AUC is shown
    because people expect it."""

    name: str
    function: Callable[[Evidence], Finding]
    effect: str
    statistic: str
    null_hypothesis: str
    guarantees: str
    blind_spots: str
    papers: tuple[str, ...]
    needs: tuple[str, ...] = ("text",)
    informational: bool = False
    version: int = 1


def item_finding(
    ids: Mapping[str, Sequence[str]],
    scores: Mapping[str, Floats],
    details: Mapping[str, Any] | None = None,
    *,
    informational: bool = False,
) -> Finding:
    """What item scores of suspects and controls say: AUC (DeLong) and one-sided p (Mann-Whitney).

    `ids` and `scores` by "suspects" and "controls". Flags the suspects above the lowest threshold
    that at most 5 % of the controls exceed; an informational detector has no p and flags none."""
    suspects, controls = scores["suspects"], scores["controls"]
    area, low, high = statistics.auc(suspects, controls)
    falling = np.sort(controls)[::-1]
    threshold = falling[int(FLAGGED_FPR * len(falling) + 1e-9)]
    above = zip(ids["suspects"], suspects > threshold, strict=True)
    return Finding(
        effect=area,
        ci95=(low, high),
        p=None if informational else statistics.mann_whitney(suspects, controls),
        n_suspects=len(suspects),
        n_controls=len(controls),
        item_scores=scores,
        ids=ids,
        flagged=() if informational else tuple(name for name, is_above in above if is_above),
        details=details or {},
    )


def gains(model: Tokens, base: Tokens) -> list[Floats]:
    """log p_model - log p_base of every token, in float64, one array per text."""
    pairs = zip(model.logprob, base.logprob, strict=True)
    return [m.astype(np.float64) - b.astype(np.float64) for m, b in pairs]


def by_part(
    evidence: Evidence, score: Callable[[str], Floats]
) -> tuple[dict[str, Sequence[str]], dict[str, Floats]]:
    """(ids, scores) of suspects and controls, for item_finding; `score` takes suspects or controls
    and gives one value per item of the text view."""
    views = evidence.model.views
    ids: dict[str, Sequence[str]] = {part: views[part].ids for part in PARTS}
    return ids, {part: score(part) for part in PARTS}
