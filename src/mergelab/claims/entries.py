"""From scores as they stand in a source to claims: names, units and protocol settled."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mergelab.claims import names
from mergelab.claims.base import Claim
from mergelab.claims.numbers import OWN_UNITS, Printed, in_percent

MOST_CLAIMS = 2_000  # of one source
MOST_ITEMS = 1_000_000_000  # of a limit
MOST_SHOTS = 1_000
DATE = re.compile(r"\d{4}-\d{2}-\d{2}(?:[T ][\d:.+Z-]{0,30})?\Z")


@dataclass(frozen=True)
class Entry:
    """A score as it stands in a source: the name `published`, a number, and what else is told.

    `board` is the leaderboard that it says it is from; `group` names the table or list that it
    stands in: the entries of one group are all percentages or all fractions."""

    published: str
    number: Printed
    line: int
    metric: str | None = None
    filter: str | None = None
    shots: int | None = None
    task_version: str | None = None
    split: str | None = None
    chat_template: bool | None = None
    date: str | None = None
    board: str | None = None
    group: str = ""


class Notes:
    """Problems of one source, each with its line; repeated ones are told once."""

    def __init__(self, where: str) -> None:
        self.where, self.found = where, dict[str, None]()

    def add(self, line: int, text: str) -> None:
        """Note a problem at a line."""
        if len(self.found) < 100:
            self.found[f"{self.where}:{line}: {text}"] = None


def own_unit(published: str, metric: str | None) -> bool:
    """Is the score no share of right answers (perplexity, EQ-Bench, ...)?"""
    return bool(OWN_UNITS.search(f"{published} {metric or ''}"))


def first_items(limit: float) -> str | None:
    """The split of a run of lm-eval with a `limit`: a number of items, or a share of them; None of
    what is no limit."""
    if not 0 < limit < MOST_ITEMS:
        return None
    return f"[:{int(limit)}]" if limit >= 1 else f"[:{100 * limit:g}%]"


def shots_of(value: Any) -> int | None:
    """A number of examples, as a source says it; None if it is none."""
    return value if type(value) is int and 0 <= value < MOST_SHOTS else None


def percent_of(entries: Iterable[Entry]) -> bool:
    """Are the accuracies of a table percentages? A single one of the Open LLM Leaderboard is."""
    shares = [entry for entry in entries if not own_unit(entry.published, entry.metric)]
    alone = len(shares) == 1 and shares[0].board is not None
    return alone or in_percent(entry.number for entry in shares)


def percents_of(entries: Sequence[Entry]) -> dict[str, bool]:
    """`percent_of` for each group of entries."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.group, []).append(entry)
    return {group: percent_of(members) for group, members in groups.items()}


def settle(
    entries: Sequence[Entry], percents: dict[str, bool], model: str, notes: Notes, **common: Any
) -> tuple[Claim, ...]:
    """The claims of one source; `percents` says of each group whether it is in percent.

    A score outside 0 to 1 is dropped with a note; one that is published twice (front matter and
    table) is kept once, with the longer digits."""
    found: dict[tuple[Any, ...], list[Claim]] = {}
    for entry in entries[:MOST_CLAIMS]:
        claim = _claim(entry, percents[entry.group], model, notes, common)
        if claim is not None:
            _keep(found.setdefault((claim.benchmark, claim.filter, claim.rescaled), []), claim)
    if len(entries) > MOST_CLAIMS:
        notes.add(entries[MOST_CLAIMS].line, f"only the first {MOST_CLAIMS:,} scores were read.")
    claims = tuple(claim for same in found.values() for claim in same)
    _contradictions(claims, notes)
    return claims


def _claim(
    entry: Entry, percent: bool, model: str, notes: Notes, common: dict[str, Any]
) -> Claim | None:
    told = names.find(entry.published, entry.board, entry.metric)
    own = own_unit(told.benchmark, entry.metric)
    metric = names.metric_of(entry.metric or "") or told.metric
    if told.metric == "exact_match" and metric == "acc":
        metric = told.metric  # what the leaderboard called accuracy of generated answers
    percent = percent and not own
    value = entry.number.value / 100 if percent else entry.number.value
    if not own and not 0 <= value <= 1:
        what = f"{entry.published[:80]!r} is {entry.number.text}, no share of right answers"
        notes.add(entry.line, f"{what}: not taken.")
        return None
    if entry.date is not None and not DATE.match(entry.date):
        notes.add(entry.line, f"{entry.date[:40]!r} is no date.")
    return Claim(
        model=model,
        benchmark=told.benchmark,
        value=value,
        printed=entry.number.text,
        percent=percent,
        source=f"{notes.where}:{entry.line}",
        published=entry.published[: names.LONGEST],
        metric=metric,
        filter=entry.filter or told.filter,
        shots=told.shots if entry.shots is None else entry.shots,
        task_version=entry.task_version,
        split=entry.split,
        chat_template=entry.chat_template,
        rescaled=told.rescaled,
        **common | ({"date": entry.date} if entry.date and DATE.match(entry.date) else {}),
    )


def _keep(same: list[Claim], claim: Claim) -> None:
    """Add a claim to those of its benchmark, or join it with the one that says the same."""
    for place, known in enumerate(same):
        if _says(known, claim):
            shots = known.shots if claim.shots is None else claim.shots
            digits = claim if len(claim.printed) > len(known.printed) else known
            both = replace(known, shots=shots, metric=known.metric or claim.metric)
            both = replace(both, split=known.split or claim.split)
            same[place] = replace(both, printed=digits.printed, value=digits.value)
            return
    same.append(claim)


def _says(known: Claim, claim: Claim) -> bool:
    """Are two claims one, up to digits and protocol that one of them leaves out?"""
    told = [(getattr(claim, name), getattr(known, name)) for name in ("shots", "metric", "split")]
    alike = all(None in pair or pair[0] == pair[1] for pair in told)
    if not alike or known.percent != claim.percent:
        return False
    unit = 10.0 ** -min(_decimals(claim.printed), _decimals(known.printed))
    return abs(claim.value - known.value) <= 0.5001 * unit / (100 if claim.percent else 1)


def _decimals(printed: str) -> int:
    return len(printed.partition(".")[2])


def _contradictions(claims: Sequence[Claim], notes: Notes) -> None:
    """Note what is published twice with different values under one protocol."""
    seen: dict[tuple[Any, ...], Claim] = {}
    for claim in claims:
        if claim.benchmark == names.AVERAGE:
            continue
        key = (
            *(claim.benchmark, claim.metric, claim.filter, claim.shots),
            *(claim.split if "[" in (claim.split or "") else None, claim.rescaled),
        )
        first = seen.setdefault(key, claim)
        if first is not claim:
            line = int(claim.source.rpartition(":")[2])
            what = f"{claim.published!r} is published as {claim.printed} and as {first.printed}"
            notes.add(line, f"{what} ({first.source}).")
