"""Claims and claimed orders with their verdicts, as entries of audit.json."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mergelab.audit.averages import AVERAGE, compare_claimed, judge_average, rows_of
from mergelab.audit.measured import Measured
from mergelab.audit.rescore import Readings
from mergelab.audit.target import Target
from mergelab.audit.verdicts import Verdict, judge
from mergelab.claims.base import Claim

Look = Callable[[str, str], Readings]  # what was measured of a model on a benchmark


def judged(claims: Sequence[Claim], readings: Look, page: Path) -> list[dict[str, Any]]:
    """Each claim with its verdict, averages last, as they rest on the others; records are told by
    their way from the folder `page`."""
    verdicts: dict[Claim, Verdict] = {}
    records: dict[Claim, str | None] = {}
    for claim in claims:
        if claim.benchmark != AVERAGE:
            known = readings(claim.model, claim.benchmark)
            verdicts[claim] = judge(claim, known.measured, known.why_not, known.chats_failed)
            record = next((one.record for one in known.measured if one.record), None)
            records[claim] = record and os.path.relpath(record, page)
    for claim in claims:
        if claim.benchmark == AVERAGE:
            rows = rows_of(claim, claims)
            verdicts[claim] = judge_average(claim, rows, [verdicts[row] for row in rows])
    return [
        {**asdict(claim), **verdicts[claim].plain(), "record": records.get(claim)}
        for claim in claims
    ]


def compared(target: Target, claims: Sequence[Claim], readings: Look) -> list[dict[str, Any]]:
    """Each claimed order of two models."""
    found = []
    for order in target.comparisons:
        known: dict[str, tuple[Measured, ...]] = {}
        for name in (order.model, order.than):
            known[name] = readings(name, order.benchmark).measured
        args = (order.model, order.than, order.benchmark, claims)
        found.append(compare_claimed(*args, known[order.model], known[order.than]))
    return found
