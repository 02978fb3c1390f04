"""Averages over benchmarks, judged as the mean of their rows; and orderings: is A better than B?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergelab import aggregates, items, published, score_table
from mergelab.audit import protocol
from mergelab.audit.labels import label, percent
from mergelab.audit.measured import SIZES, Measured
from mergelab.audit.protocol import EXACT, LOWER
from mergelab.audit.verdicts import (
    CONSISTENT,
    NOT_REPRODUCED,
    REPRODUCED,
    UNVERIFIABLE,
    Verdict,
)
from mergelab.claims import names
from mergelab.claims.base import Claim
from mergelab.claims.entries import own_unit
from mergelab.items import Items
from mergelab.suites import Benchmark

AVERAGE = names.AVERAGE
ALIKE = ("metric", "filter", "shots", "chat_template", "fewshot_as_multiturn", "combine")


def judge_average(claim: Claim, rows: Sequence[Claim], verdicts: Sequence[Verdict]) -> Verdict:
    """Judge a claimed average by the claims it is the mean of and by their verdicts.

    `rows` are the claims of the same model and source (see `rows_of`). First the arithmetic: is it
    the mean of its own rows? Then our own values, if every row was measured."""
    step = protocol.unit(claim)
    if not math.isfinite(claim.value) or math.isnan(step):
        return Verdict(UNVERIFIABLE, f"'{claim.printed[:40]}' is no number.")
    if len(rows) < 2:
        return Verdict(UNVERIFIABLE, "The benchmarks that it is the mean of are not known.")
    mean = sum(row.value for row in rows) / len(rows)
    listed = ", ".join(row.published for row in rows)
    slack = (step + max(protocol.unit(row) for row in rows)) / 2 + EXACT
    if abs(mean - claim.value) > slack:
        why = (
            f"The mean of its {len(rows)} rows ({listed}) is {percent(mean)}, not {claim.printed}."
        )
        return Verdict(UNVERIFIABLE, f"{why} Rows are missing, or it is another mean.")
    known = [v.ours for v in verdicts if v.ours is not None and v.verdict != UNVERIFIABLE]
    if len(known) < len(rows):
        missing = ", ".join(
            row.published
            for row, one in zip(rows, verdicts, strict=True)
            if one.ours is None or one.verdict == UNVERIFIABLE
        )
        why = f"It is the mean of its rows, but {missing}: not measured as claimed."
        return Verdict(UNVERIFIABLE, why)
    return _against(claim, step, known)


def rows_of(average: Claim, claims: Sequence[Claim]) -> list[Claim]:
    """The claims that an average is the mean of: of its model and file, in its own scale."""
    return [
        claim
        for claim in claims
        if claim.benchmark != AVERAGE
        and (claim.model, claim.percent, claim.rescaled)
        == (average.model, average.percent, average.rescaled)
        and _file(claim.source) == _file(average.source)
    ]


def _file(source: str) -> str:
    """A source without its line."""
    place, _, line = source.rpartition(":")
    return place if line.isdigit() else source


def _against(claim: Claim, step: float, known: Sequence[dict[str, Any]]) -> Verdict:
    """The claim against the mean of what we measured."""
    value = sum(one["value"] for one in known) / len(known)
    half = math.hypot(*((one["ci95"][1] - one["ci95"][0]) / 2 for one in known)) / len(known)
    gap = claim.value - value
    verdict = NOT_REPRODUCED
    if abs(gap) <= step / 2 + EXACT:
        verdict = REPRODUCED
    elif abs(gap) <= half + step / 2:
        verdict = CONSISTENT
    reach = f"{percent(value - half)} to {percent(value + half)}"
    why = f"The mean of our {len(known)} rows is {percent(value)}; honest runs may give {reach}."
    shared = {key: _same(known, key) for key in ("dtype", "lm_eval", "chat_template")}
    ours = {
        "value": value,
        "ci95": [value - half, value + half],
        "n": sum(one["n"] for one in known),
        "metric": "mean",
        "filter": None,
        "shots": _same(known, "shots"),
        "task": AVERAGE,
        "task_version": None,
        **shared,
    }
    return Verdict(verdict, why, ours=ours, difference=gap)


def _same(known: Sequence[dict[str, Any]], key: str) -> Any:
    """What all rows agree on, else None."""
    values = [one[key] for one in known]
    return values[0] if all(value == values[0] for value in values) else None


def compare_claimed(
    model: str,
    than: str,
    benchmark: str,
    claims: Sequence[Claim],
    ours: Sequence[Measured] = (),
    theirs: Sequence[Measured] = (),
) -> dict[str, Any]:
    """Is `model` better than `than` on a benchmark, as claimed? An entry of audit.json.

    `ours` and `theirs` are what was measured of either: item by item if both answered the same
    prompts, else the published figures decide, as if their items were not the same. `claimed`: do
    the published figures say so, where there are any; `difference`: above 0 if `model` is better,
    also where less is better; `significant`: in the claimed direction, with 95 % confidence."""
    figures = _figures(model, than, benchmark, claims)
    said = figures is None or _better(figures[0], figures[1], ours)
    about = {"model": model, "than": than, "benchmark": benchmark, "claimed": said}
    for one, other in _pairs(figures, ours, theirs):
        mine, their = _items(one), _items(other)
        if mine is not None and their is not None and mine.fingerprint == their.fingerprint:
            parts = (mine.parts, their.parts) if one.higher_is_better else (their.parts, mine.parts)
            found = aggregates.difference(*parts)
            how = label(one) + ("" if one.higher_is_better else ", less is better")
            how, share = f"{how}, {found['test']}", not own_unit(one.benchmark, one.metric)
            return {**about, **_settled(found, "paired items", how, share=share)}
    n = _published_size(figures, (*ours, *theirs), benchmark)
    if figures is None or n is None:
        why = "Neither were both scored on the same prompts, nor are both figures published."
        if figures is not None:
            why = "How many items the published figures stand for is not known. Score both models."
        nothing = {"difference": None, "ci95": None, "p": None, "significant": False}
        return {**about, **nothing, "basis": "published figures", "why": why}
    found = published.compare(figures[0].value, figures[1].value, n)
    how = f"{figures[0].printed} and {figures[1].printed} of {n:,} items each, taken as unpaired"
    return {**about, **_settled(found, "published figures", how)}


def _better(mine: Claim, theirs: Claim, measured: Sequence[Measured]) -> bool:
    """Do the published figures say that the first is better?"""
    same = (one.higher_is_better for one in measured if one.metric == mine.metric)
    by_name = LOWER.search(f"{mine.metric or mine.benchmark}") is None
    return mine.value > theirs.value if next(same, by_name) else mine.value < theirs.value


def _published_size(
    figures: tuple[Claim, Claim] | None, measured: Sequence[Measured], benchmark: str
) -> int | None:
    """Items that both published figures stand for, if they are shares of items."""
    shares = figures is not None and all(0 <= c.value <= 1 and not c.rescaled for c in figures)
    if figures is None or not shares or own_unit(benchmark, figures[0].metric):
        return None
    whole = (one.size for one in measured if one.size is not None)
    return SIZES.get(benchmark) or next(whole, None)


def _figures(
    model: str, than: str, benchmark: str, claims: Sequence[Claim]
) -> tuple[Claim, Claim] | None:
    """The published scores of both, of one metric."""
    own = [c for c in claims if c.benchmark == benchmark and math.isfinite(c.value)]
    for one in (claim for claim in own if claim.model == model):
        for other in (claim for claim in own if claim.model == than):
            if (one.metric, one.filter, one.shots, one.rescaled) == (
                other.metric, other.filter, other.shots, other.rescaled,
            ):  # fmt: skip
                return one, other
    return None


def _pairs(
    figures: tuple[Claim, Claim] | None, ours: Sequence[Measured], theirs: Sequence[Measured]
) -> list[tuple[Measured, Measured]]:
    """Runs of both by one protocol, those as published first."""
    pairs = [
        (one, other)
        for one in ours
        for other in theirs
        if all(getattr(one, field) == getattr(other, field) for field in ALIKE)
    ]
    if figures is not None:
        fit = protocol.matching(figures[0], ours)
        pairs.sort(key=lambda pair: pair[0] not in fit)
    return pairs


def _items(one: Measured) -> Items | None:
    """The items behind a value, from its record."""
    if one.record is None:
        return None
    path = Path(one.record).with_suffix(".parquet")
    bench = Benchmark(
        one.benchmark, one.task, None, None, one.shots, combine=one.combine or "items"
    )
    kind = one.metric if one.filter is None else f"{one.metric},{one.filter}"
    return items.items_of(score_table.table(path), bench, kind) if path.is_file() else None


def _settled(found: dict[str, Any], basis: str, how: str, *, share: bool = True) -> dict[str, Any]:
    """A difference and what it settles; of shares it is told in points."""
    low, high = found["ci95"]
    significant = bool(low > 0)
    value = found["difference"]
    gap = f"{value:+.4f} ({low:+.4f} to {high:+.4f})"
    if share:
        gap = f"{100 * value:+.2f} points ({100 * low:+.2f} to {100 * high:+.2f})"
    verdict = "better" if significant else "worse" if high < 0 else "not settled"
    return {
        "difference": found["difference"],
        "ci95": [low, high],
        "p": found["p"],
        "significant": significant,
        "basis": basis,
        "why": f"{gap}: {verdict} ({how}).",
    }
