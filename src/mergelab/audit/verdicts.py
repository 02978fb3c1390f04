"""Is a published score what the model gives? A claim against what we measured.

A re-run sees the same items, so the luck of the draw excuses nothing: only rounding and numerical
noise do (see noise.py), and sampling where our run saw other items, or a part of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mergelab.audit import protocol
from mergelab.audit.grim import no_count, possible, sizes
from mergelab.audit.labels import (
    Explanation,
    chance,
    explained_in_words,
    explanation,
    label,
    listed,
    percent,
    unsaid,
    words,
)
from mergelab.audit.measured import OTHER, Measured, drawn, extent, holds, total
from mergelab.claims.base import Claim

REPRODUCED, CONSISTENT, NOT_REPRODUCED = "reproduced", "consistent", "not reproduced"
IMPOSSIBLE, DOES_NOT_FIT, UNVERIFIABLE = "impossible", "does not fit", "unverifiable"
NO_RUN = "nothing was measured"
UNCOUNTED = "GRIM was not asked: how many items the claim counts is not known."


@dataclass(frozen=True)
class Verdict:
    """What is to be said of a claim, with everything that it rests on (see audit.schema.json)."""

    verdict: str
    why: str
    grim: dict[str, Any] | None = None
    ours: dict[str, Any] | None = None
    difference: float | None = None
    explained_by: dict[str, Any] | None = None
    alternatives: tuple[dict[str, Any], ...] = ()
    protocol: tuple[dict[str, Any], ...] = ()

    def plain(self) -> dict[str, Any]:
        """The verdict as JSON."""
        return asdict(self) | {
            "alternatives": list(self.alternatives),
            "protocol": list(self.protocol),
        }


def judge(
    claim: Claim,
    measured: Sequence[Measured],
    why_not: str = NO_RUN,
    chats_failed: bool = False,
) -> Verdict:
    """Judge a claim by what was measured of its benchmark, the usual protocol first.

    What the claim leaves open may be as it fits best. `why_not` says why nothing (more) could be
    measured, and what to do; `chats_failed`: the model has a chat template that cannot be run."""
    if not math.isfinite(claim.value) or math.isnan(protocol.unit(claim)):
        return Verdict(UNVERIFIABLE, f"'{claim.printed[:40]}' is no number.")
    counts = sizes(claim, measured)
    grim = possible(claim, counts) if counts else None
    own = protocol.matching(claim, measured)
    best = _best(claim, measured)
    fits = best is not None and protocol.rank(claim, best) < 2
    found = None if fits else explanation(claim, measured, own)
    if grim is not None and not grim["possible"] and found is None:
        if not measured:
            return _does_not_fit(claim, grim, why_not)
        return _impossible(claim, grim, best, measured)
    unable = _unable(claim, measured)
    found = None if unable else found  # what cannot be run may differ by anything
    uncounted = f" {UNCOUNTED}" if counts is None else ""
    if best is None:
        return _unmatched(claim, grim, measured, found, why_not, uncounted)
    verdict = (REPRODUCED, CONSISTENT, NOT_REPRODUCED)[protocol.rank(claim, best)]
    unsure = protocol.untried(claim, best, measured, chats_failed)
    if verdict == NOT_REPRODUCED and (unable or unsure) and found is None:
        verdict = UNVERIFIABLE
    why = _why(claim, best, verdict)
    label = None if found is None else found.label
    if found is not None:
        why += f" {explained_in_words(found)}{chance(measured)}"
    elif fits:
        label = unsaid(claim, best, own[0], measured) or None
        why += f" The claim does not say so: {listed(label)}." if label else ""
        why += chance(own) if best is not own[0] else ""
    elif verdict == UNVERIFIABLE:
        said = f"is about {' and '.join(unable)}, which cannot be"
        said = said if unable else f"may be about {unsure}, which was not"
        why += f" But the claim {said} run here."
    why += "" if fits or found is not None or why_not == NO_RUN else f" {why_not}"
    return replace(
        _with_ours(claim, best, measured),
        verdict=verdict,
        why=why + ("" if verdict == REPRODUCED else uncounted),
        grim=grim,
        explained_by=label,
    )


def settled(claim: Claim, measured: Sequence[Measured]) -> bool:
    """Has all been said of a claim, whatever else is run?"""
    found = judge(claim, measured)
    said = found.verdict in (REPRODUCED, CONSISTENT, IMPOSSIBLE) or found.explained_by is not None
    return said or bool(_unable(claim, measured))


def _best(claim: Claim, measured: Sequence[Measured]) -> Measured | None:
    """The run as the claim says that comes closest, the usual protocol first."""
    own = protocol.matching(claim, measured)
    return min(own, key=lambda one: protocol.rank(claim, one), default=None)


def _unable(claim: Claim, measured: Sequence[Measured]) -> list[str]:
    """What of the claim none of our runs can show (see protocol.obstacles)."""
    best = _best(claim, measured)
    runs = measured if best is None else [best]
    return min((protocol.obstacles(claim, one) for one in runs), key=len, default=[])


def _impossible(
    claim: Claim, grim: dict[str, Any], best: Measured | None, measured: Sequence[Measured]
) -> Verdict:
    why = f"{no_count(claim, grim['n'])} It is no score of one run on all items."
    shown = Verdict(IMPOSSIBLE, why) if best is None else _with_ours(claim, best, measured)
    return replace(shown, verdict=IMPOSSIBLE, why=why, grim=grim)


def _does_not_fit(claim: Claim, grim: dict[str, Any], why_not: str) -> Verdict:
    """A number is only doubtful where nothing was run: the number of items is the usual one."""
    why = (
        f"{no_count(claim, grim['n'])} {claim.benchmark} usually has so many; other items, a mean "
        "of several runs or another way of rounding may give it."
    )
    return Verdict(DOES_NOT_FIT, why if why_not == NO_RUN else f"{why} {why_not}", grim)


def _unmatched(
    claim: Claim,
    grim: dict[str, Any] | None,
    measured: Sequence[Measured],
    found: Explanation | None,
    why_not: str,
    uncounted: str,
) -> Verdict:
    """Nothing was measured as the claim says."""
    names = ", ".join(dict.fromkeys(label(one) for one in measured))
    fields = {name: getattr(claim, name) for name in protocol.MATCHED}
    said = [words(name, value) for name, value in fields.items() if value is not None]
    said += ["a rescaled score"] if claim.rescaled else []
    why = why_not
    if measured:
        why = f"{claim.benchmark} was not measured as {' and '.join(said)}, only as: {names}."
        why += "" if why_not == NO_RUN else f" {why_not}"
    if found is not None:
        why += f" {explained_in_words(found, ran=False)}{chance(measured)}"
    return Verdict(
        UNVERIFIABLE,
        why + uncounted,
        grim,
        explained_by=None if found is None else found.label,
        alternatives=tuple(map(_alternative, measured)),
    )


def _with_ours(claim: Claim, best: Measured, measured: Sequence[Measured]) -> Verdict:
    low, high = protocol.interval(claim, best)
    value = protocol.value_of(claim, best)
    named = ("n", "metric", "filter", "shots", "task", "task_version", "dtype", "lm_eval")
    ours = {"value": value, "ci95": [low, high], **{name: getattr(best, name) for name in named}}
    ours["chat_template"] = best.chat_template
    ours["fewshot_as_multiturn"] = best.fewshot_as_multiturn
    return Verdict(
        UNVERIFIABLE,
        "",
        ours=ours,
        difference=claim.value - value,
        alternatives=tuple(_alternative(one) for one in measured if one is not best),
        protocol=tuple(protocol.differences(claim, best)),
    )


def _alternative(one: Measured) -> dict[str, Any]:
    found = {name: getattr(one, name) for name in ("metric", "filter", "shots", "value")}
    found |= {"chat_template": True} if one.chat_template else {}
    turns = {"fewshot_as_multiturn": one.fewshot_as_multiturn}
    return found | (turns if one.fewshot_as_multiturn is not None else {})


def _why(claim: Claim, best: Measured, verdict: str) -> str:
    """Our value, what an honest run may give, and where the claim lies."""
    low, high = protocol.interval(claim, best)
    value = protocol.value_of(claim, best)
    count = f", {best.hits:,} of {best.n:,} items" if best.hits is not None else ""
    said = f"Our run gives {_show(claim, value)} ({label(best)}{count})"
    if verdict == REPRODUCED:
        return f"{said}: the printed number."
    cause = _cause(claim, best)
    reach = f"an honest run may give {_show(claim, low)} to {_show(claim, high)} ({cause})"
    if verdict == CONSISTENT:
        return f"{said}; {reach}, and {claim.printed} is inside."
    gap = claim.value - value
    side = "above" if gap > 0 else "below"
    points = f"{abs(gap) * 100:.2f} points" if low >= -1 and high <= 2 else f"{abs(gap):.4g}"
    return f"{said}; {reach}, and {claim.printed} is {points} {side} ours."


def _cause(claim: Claim, best: Measured) -> str:
    """What the interval excuses."""
    size, seen = total(claim, best), f"noise, and sampling: our run saw {best.n:,}"
    if not drawn(claim, best):
        return "numerical noise"
    if extent(claim, best) == OTHER:
        return f"{seen} other items"
    if size is None:
        return f"{seen} items, perhaps not all"
    return f"{seen} of {size:,} items" if holds(best, size) else f"{seen} items, not the {size:,}"


def _show(claim: Claim, value: float) -> str:
    return percent(value) if 0 <= claim.value <= 1 else f"{value:.4g}"
