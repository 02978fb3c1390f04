"""Corpus overlap: are benchmark items in the texts that a model is declared to be trained on?

Texts are compared as words: lower case, punctuation stripped; of scripts without spaces each
character is a word. An item is dirty if it shares with a training text a run of 13 words that is
15 % of the item, or of 8 words that is half of it; so an item with some words edited is still
found. Brown et al. 2020 (app. C) ask for the 13 words only; but vital signs and the like would
then flag 7 % of one half of MedQA against the other (now 0.8 %). That the longest match tells most
is of Singh et al. 2024. An item of fewer than 8 words is dirty if a training text holds it whole.
Runs that more than 10 items share are the benchmark's template and count for nobody."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergelab import statistics
from mergelab.detectors.base import PARTS, Detector, Evidence, Finding
from mergelab.errors import NotAvailable

LONG, LONG_SHARE = 13, 0.15  # words in a row, and the share of the item that they must be
SHORT, SHORT_SHARE = 8, 0.5  # the same for shorter runs; no run below SHORT is looked at
TEMPLATE = 10  # items that may share a run before it counts as the benchmark's template

UNSPACED = "\u3040-\u30ff\u3400-\u9fff"  # kana and Han
PUNCTUATION = re.compile(r"[^\w\s]|_")
WORD = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")


def words(text: str) -> list[str]:
    """The words of a text as they are compared."""
    return WORD.findall(PUNCTUATION.sub("", text.lower()))


@dataclass(frozen=True)
class Index:
    """Where each run of words stands in the items: positions on all items' words in a row.

    `runs` maps a length (SHORT, or that of a shorter item) to its runs; `owners` a position to its
    item."""

    runs: Mapping[int, Mapping[tuple[str, ...], Sequence[int]]]
    owners: Sequence[int]


def index(items: Sequence[Sequence[str]]) -> Index:
    """The runs of words of every item; only the benchmark is held in memory, never the corpus."""
    runs: dict[int, dict[tuple[str, ...], list[int]]] = {}
    owners: list[int] = []
    for number, item in enumerate(items):
        length = min(SHORT, len(item))
        for offset, run in enumerate(_runs(item, length)):
            runs.setdefault(length, {}).setdefault(run, []).append(len(owners) + offset)
        owners += [number] * (len(item) + 1)  # a place between items: no run goes on in the next
    kept = {
        length: {
            run: positions
            for run, positions in table.items()
            if len({owners[position] for position in positions}) <= TEMPLATE
        }
        for length, table in runs.items()
    }
    return Index(kept, owners)


def longest(known: Index, n_items: int, texts: Iterable[str]) -> list[int]:
    """For each item the longest run of words, at least SHORT, that any text shares with it, or 0.

    Reads the texts once, one at a time."""
    best = [0] * n_items
    for text in texts:
        found = words(text)
        for length, table in known.runs.items():
            matches: dict[int, int] = {}  # where a run ends so far -> its words
            for run in _runs(found, length):
                positions = table.get(run)
                if positions is None:
                    matches = {}
                    continue
                matches = {p: matches.get(p - 1, length - 1) + 1 for p in positions}
                for position, size in matches.items():
                    owner = known.owners[position]
                    best[owner] = max(best[owner], size)
    return best


def _runs(found: Sequence[str], length: int) -> Iterable[tuple[str, ...]]:
    """Every run of `length` words, in order."""
    return zip(*(found[start:] for start in range(length)), strict=False)


def is_dirty(match: int, size: int) -> bool:
    """Does a run of `match` words condemn an item of `size` words?"""
    least = LONG_SHARE if match >= LONG else SHORT_SHARE
    return match > 0 and match >= least * size


def overlap(evidence: Evidence) -> Finding:
    """The share of suspects found in the declared training texts, with its score interval."""
    if not any(evidence.corpus.values()):
        raise NotAvailable(
            "nothing is declared of what the model and its ancestors were trained on"
        )
    items = [item for part in PARTS for item in evidence.items[part]]
    texts = [words(str(item["text"])) for item in items]
    known, sizes = index(texts), [len(text) for text in texts]
    matches = {
        name: longest(known, len(items), evidence.corpus[name]) for name in sorted(evidence.corpus)
    }
    best = [max((found[i] for found in matches.values()), default=0) for i in range(len(items))]
    dirty = [is_dirty(match, size) for match, size in zip(best, sizes, strict=True)]
    shares = np.array([match / max(size, 1) for match, size in zip(best, sizes, strict=True)])
    n = len(evidence.items["suspects"])
    flagged = [str(item["id"]) for item, bad in zip(items, dirty, strict=True) if bad]
    return Finding(
        effect=sum(dirty[:n]) / n,
        ci95=statistics.wilson(sum(dirty[:n]), n),
        p=None,
        n_suspects=n,
        n_controls=len(items) - n,
        item_scores={"suspects": shares[:n], "controls": shares[n:]},
        flagged=tuple(flagged),
        details={
            "dirty_controls": sum(dirty[n:]),
            "with_13_gram": sum(match >= LONG for match in best[:n]),
            "dirty_by_corpus": {
                name: sum(map(is_dirty, found[:n], sizes[:n])) for name, found in matches.items()
            },
            "matches": [
                {"id": str(item["id"]), "words": size, "longest": match}
                for item, size, match, bad in zip(items, sizes, best, dirty, strict=True)
                if bad
            ],
            "score": clean_score(evidence, items, dirty),
        },
    )


def clean_score(
    evidence: Evidence, items: Sequence[Mapping[str, Any]], dirty: Sequence[bool]
) -> dict[str, Any] | None:
    """Mean score on all items and on the clean ones; their difference is the estimated performance
    gain (EPG, Singh et al. 2024), with a bootstrap interval over items.

    The bootstrap resamples the EPG's linear terms, so that it is defined on every resample. None
    if the study scored no clean item of this check."""
    scores = evidence.scores.get(evidence.model.name, {}).get("original", {})
    known = {str(item["id"]): bad for item, bad in zip(items, dirty, strict=True)}
    ids = [name for name in known if name in scores]
    clean = np.array([not known[name] for name in ids], dtype=bool)
    if not clean.any():
        return None
    values = np.array([scores[name] for name in ids], dtype=np.float64)
    on_clean = float(values[clean].mean())
    terms = (values - on_clean) * (1 - clean * (clean.size / clean.sum()))
    return {
        "full": float(values.mean()),
        "clean": on_clean,
        "epg": float(values.mean()) - on_clean,
        "epg_ci95": list(statistics.bootstrap_ratio(terms, np.ones(clean.size))),
        "n": int(clean.size),
        "n_clean": int(clean.sum()),
    }


DETECTOR = Detector(
    name="overlap",
    function=overlap,
    effect="share of suspects found in declared training texts",
    statistic="The longest run of words that an item shares with a training text. Found: "
    f"{LONG} words that are {LONG_SHARE:.0%} of the item, or {SHORT} that are {SHORT_SHARE:.0%}.",
    null_hypothesis="None: a run is there or it is not. The interval is for the share of items.",
    guarantees="Every verbatim copy of an item is found, at any place in a text, unless it holds "
    f"runs of {SHORT} words that more than {TEMPLATE} items share: these count for nobody, and "
    "what is left may be too short. With 5 % of its words exchanged still 99 of 100 items of "
    "GSM8K, 93 of ARC-Easy, 76 of SciQ (14 words an item). False alarms: 0.4 % of GSM8K's test "
    "against its train split.",
    blind_spots="Sees only texts that somebody declared. Blind to paraphrases, translations and "
    "other formats; an item of few words is found by any text that holds it, and people who quote "
    "the same source look like copies.",
    papers=("arXiv 2005.14165", "arXiv 2411.03923"),
    needs=("corpus",),
)
