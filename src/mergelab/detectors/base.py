"""What a detector is, what it may look at and what it says: pure functions over stored evidence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Items = Sequence[NDArray[np.float32]]


@dataclass(frozen=True)
class Tokens:
    """One model's evidence on one list of texts: an array per text, one value per scored token.

    `logprob` of the token, `mean` and `std` of log p under the model's own next-token distribution,
    in nats; `answer` is the index of the first token of the text's answer (its length if none)."""

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
    suspects/orders, controls/orders (the question with its choices in every order: `orders` texts
    per item, the published order first)."""

    name: str
    views: Mapping[str, Tokens]


@dataclass(frozen=True)
class Evidence:
    """What is known of one model and one check; empty where a study does not say.

    `scores` holds every model's metric per item id: {model: {"original" | "twin": {id: value}}};
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
    per suspect and control, higher meaning "looks seen", or is None; `flagged` are ids of items to
    leave out of a clean score; `details` are further numbers for the report, plain JSON."""

    effect: float
    ci95: tuple[float, float] | None
    p: float | None
    n_suspects: int
    n_controls: int
    item_scores: Mapping[str, Floats] | None = None
    flagged: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Detector:
    """A named statistic with what it means, assumes, guarantees and cannot see.

    `needs` names what the evidence must hold beside suspects and controls: some of twin, context,
    orders, answer, siblings, scores, corpus. An `informational` detector never flags: its p is
    None and its AUC is shown because people expect it."""

    name: str
    function: Callable[[Evidence], Finding]
    effect: str
    statistic: str
    null_hypothesis: str
    guarantees: str
    blind_spots: str
    papers: tuple[str, ...]
    needs: tuple[str, ...] = ()
    informational: bool = False
    version: int = 1
