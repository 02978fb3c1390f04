"""Views of a part's items: the texts that a model is asked about, and which of them a study needs.

text    the item as rendered; the answer's tokens are known where the dataset has an answer template
twin    the same item in other words
context the item after its neighbours, three other items of its part (CoDeC, arXiv 2510.27055)
orders  question and lettered choices in the published order and then in others: all 24 of four
        choices, 23 drawn with a fixed seed of more; of the part's first 100 items only"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, permutations
from math import factorial
from string import ascii_uppercase
from typing import Any

import numpy as np

from mergelab import detectors
from mergelab.detectors.base import VIEWS
from mergelab.errors import UserError
from mergelab.study import Check, Study

NEIGHBOURS = 3
ORDERS = 24  # of one item
ORDERED_ITEMS = 100  # of a part: 24 texts each


@dataclass(frozen=True)
class Text:
    """What a model is asked about: `text`, after `before`, of which nothing is scored.

    `answer` is the number of characters of text before its answer, None if it has none."""

    id: str
    text: str
    before: str = ""
    answer: int | None = None


def wanted(study: Study) -> list[tuple[str, str]]:
    """(part, view) that the detectors of a study's checks need, sorted."""
    return sorted(
        {
            (part, view)
            for check in study.contamination
            for part in (check.suspects, check.controls)
            for view in of_check(study, check)
        }
    )


def of_check(study: Study, check: Check) -> list[str]:
    """Views that the detectors of a check need, in the order of VIEWS."""
    found = [detectors.find(name, detectors.place(study, check)) for name in check.detectors]
    needs = {need for detector in found for need in detector.needs}
    return [view for view in VIEWS if view in needs or (view == "text" and "answer" in needs)]


def texts(study: Study, part: str, view: str, items: Sequence[dict[str, Any]]) -> list[Text]:
    """The texts of a view, in the order of the items. Raises UserError for an item without it."""
    if view == "text":
        dataset = study.datasets.get(part.partition("/")[0])
        answered = dataset is not None and dataset.answer is not None
        return [_plain(item, part, answered) for item in items]
    if view == "twin":
        return [Text(item["id"], _field(item, part, "twin")) for item in items]
    if view == "context":
        return _after_neighbours(part, items)
    chosen = {item["id"] for item in _by_hash(items)[:ORDERED_ITEMS]}
    return [text for item in items if item["id"] in chosen for text in _orders(item, part)]


def _plain(item: dict[str, Any], part: str, answered: bool) -> Text:
    start = len(item["text"]) - len(_field(item, part, "answer")) if answered else None
    return Text(item["id"], item["text"], answer=start)


def _field(item: dict[str, Any], part: str, name: str) -> Any:
    if name not in item:
        raise UserError(
            f"{part}, item {item['id']}: was prepared without '{name}'. Run: mergelab data STUDY"
        )
    return item[name]


def _after_neighbours(part: str, items: Sequence[dict[str, Any]]) -> list[Text]:
    """Each text after the next items of its part in a ring ordered by hash."""
    if len(items) < 2:
        raise UserError(f"{part}: holds {len(items)} items, but the view 'context' needs two.")
    ring = _by_hash(items)
    before: dict[str, str] = {}
    for i, item in enumerate(ring):
        others = (ring[(i + k) % len(ring)] for k in range(1, min(NEIGHBOURS + 1, len(ring))))
        before[item["id"]] = "".join(f"{other['text']}\n\n" for other in others)
    return [Text(item["id"], item["text"], before[item["id"]]) for item in items]


def _orders(item: dict[str, Any], part: str) -> Iterator[Text]:
    options = _field(item, part, "options")
    choices = options["choices"]
    for order in _permutations(len(choices), item["id"]):
        lines = (f"\n{ascii_uppercase[k]}. {choices[i]}" for k, i in enumerate(order))
        yield Text(item["id"], options["question"] + "".join(lines))


def _permutations(n: int, seed: str) -> list[tuple[int, ...]]:
    """The identity, then all other orders of n choices, or as many distinct ones as fit ORDERS."""
    if factorial(n) <= ORDERS:
        return list(permutations(range(n)))
    random = np.random.Generator(np.random.PCG64(int(_sha256(seed)[:16], 16)))
    drawn = {tuple(range(n)): None}
    while len(drawn) < ORDERS:
        drawn[tuple(int(i) for i in random.permutation(n))] = None
    return list(islice(drawn, ORDERS))


def _by_hash(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """An order that depends on the items only, not on that of their file."""
    return sorted(items, key=lambda item: _sha256(item["id"]))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
