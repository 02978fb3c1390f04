"""Corpus overlap: are benchmark items in the texts that a model is declared to be trained on?

Texts are compared as words: lower case, punctuation stripped; of scripts without spaces each
character is a word. An item is dirty if it shares with a training text a run of 13 words that is
15 % of the item, or of 8 words that is half of it; so an item with some words edited is still
found. Brown et al. 2020 (app. C) ask for the 13 words only; but vital signs and the like would
then flag 7 % of one half of MedQA against the other (now 0.8 %). That the longest match tells most
is of Singh et al. 2024. In an item of 8 to 25 words a single edit may leave no such run: it is also
dirty if a training text holds the whole of it but for one word exchanged, dropped or added. An item
of fewer than 8 words is dirty if a training text holds it whole. Runs that more than 10 items share
are the benchmark's template and count for nobody."""

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
ONE_EDIT = range(SHORT, 2 * LONG)  # sizes of items that may be one word off
SEED = SHORT // 2  # words in a row that such an item keeps at least
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


def one_edit(items: Sequence[Sequence[str]], texts: Iterable[str]) -> set[int]:
    """Which items of ONE_EDIT words a text holds but for one word exchanged, dropped or added.

    Of such an item at least SEED words in a row are left: only where these stand is compared."""
    seeds: dict[tuple[str, ...], list[tuple[int, int]]] = {}
    for number, item in enumerate(items):
        if len(item) in ONE_EDIT:
            for offset, run in enumerate(_runs(item, SEED)):
                seeds.setdefault(run, []).append((number, offset))
    seeds = {run: at for run, at in seeds.items() if len({number for number, _ in at}) <= TEMPLATE}
    held: set[int] = set()
    for text in texts if seeds else ():
        found = words(text)
        for place, run in enumerate(_runs(found, SEED)):
            for number, offset in seeds.get(run, ()):
                if number not in held and _held(items[number], found, place - offset):
                    held.add(number)
    return held


def _held(item: Sequence[str], text: Sequence[str], start: int) -> bool:
    """Is the item there but for one word, its words before or after that in line with `start`?"""
    stop = start + len(item)
    places = [(start, stop + more) for more in (-1, 0, 1)] + [(start - 1, stop), (start + 1, stop)]
    return any(a >= 0 and b <= len(text) and _alike(item, text[a:b]) for a, b in places)


def _alike(one: Sequence[str], other: Sequence[str]) -> bool:
    """Are two rows of words, at most one longer than the other, the same but for one word?"""
    pairs = list(zip(one, other, strict=False))
    before = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    back = list(zip(reversed(one), reversed(other), strict=False))
    after = next((i for i, (a, b) in enumerate(back) if a != b), len(back))
    return before + after >= max(len(one), len(other)) - 1


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
    best, bad = [0] * len(items), {}
    for name in sorted(evidence.corpus):
        found = longest(known, len(items), evidence.corpus[name])
        best = list(map(max, best, found))
        bad[name] = one_edit(texts, evidence.corpus[name])
        bad[name] |= {i for i, match in enumerate(found) if is_dirty(match, sizes[i])}
    dirty = [any(i in numbers for numbers in bad.values()) for i in range(len(items))]
    shares = np.array([match / max(size, 1) for match, size in zip(best, sizes, strict=True)])
    n = len(evidence.items["suspects"])
    flagged = [str(item["id"]) for item, is_bad in zip(items, dirty, strict=True) if is_bad]
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
            "dirty_by_corpus": {name: sum(i < n for i in numbers) for name, numbers in bad.items()},
            "matches": [
                {"id": str(item["id"]), "words": size, "longest": match}
                for item, size, match, is_bad in zip(items, sizes, best, dirty, strict=True)
                if is_bad
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
    f"{LONG} words that are {LONG_SHARE:.0%} of the item, {SHORT} that are {SHORT_SHARE:.0%}, or, "
    f"of {ONE_EDIT.start} to {ONE_EDIT.stop - 1} words all but one.",
    null_hypothesis="None: a run is there or it is not. The interval is for the share of items.",
    guarantees="Every verbatim copy of an item is found, at any place in a text, unless it holds "
    f"runs of {SHORT} words that more than {TEMPLATE} items share: these count for nobody, and "
    "what is left may be too short. With 5 % of its words exchanged still 99 of 100 items of "
    "GSM8K and of ARC-Easy, 97 of SciQ (14 words an item). False alarms: 0.4 % of GSM8K's test "
    "against its train split.",
    blind_spots="Sees only texts that somebody declared. Blind to paraphrases, translations and "
    "other formats; an item of few words is found by any text that holds it, and people who quote "
    "the same source look like copies.",
    papers=("arXiv 2005.14165", "arXiv 2411.03923"),
    needs=("corpus",),
    version=2,
)
