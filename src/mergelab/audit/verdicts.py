"""Is a published score what the model gives? A claim against what we measured.

A re-run sees the same items, so the luck of the draw excuses nothing: only rounding and numerical
noise do (see noise.py), and sampling where our run saw other items, or a part of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mergelab.audit import protocol
from mergelab.audit.grim import no_count, possible, sizes
from mergelab.audit.protocol import EXACT, Measured
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


@dataclass(frozen=True)
class Explanation:
    """What a run did otherwise that gives the claimed number: `exact`, or near it."""

    label: dict[str, Any]
    run: Measured
    exact: bool


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
    best = min(own, key=lambda one: _rank(claim, one), default=None)
    explained = None
    if best is None or _rank(claim, best) > 1:
        explained = _explanation(claim, measured, own)
    if grim is not None and not grim["possible"] and explained is None:
        if not measured:
            return _does_not_fit(claim, grim, why_not)
        return _impossible(claim, grim, best, measured)
    if best is None:
        return _unmatched(claim, grim, measured, explained, why_not)
    verdict = (REPRODUCED, CONSISTENT, NOT_REPRODUCED)[_rank(claim, best)]
    unable = protocol.obstacles(claim, best)
    unsure = protocol.untried(claim, best, measured, chats_failed)
    if verdict == NOT_REPRODUCED and (unable or unsure) and explained is None:
        verdict = UNVERIFIABLE
    why = _why(claim, best, verdict)
    label = None if explained is None else explained.label
    if explained is not None:
        why += f" {_explained(explained)}{_chance(measured)}"
    elif verdict in (REPRODUCED, CONSISTENT):
        label = _unsaid(claim, best, own[0], measured) or None
        why += f" The claim does not say so: {_listed(label)}.{_chance(own)}" if label else ""
    elif verdict == UNVERIFIABLE:
        said = f"is about {' and '.join(unable)}, which cannot be"
        said = said if unable else f"may be about {unsure}, which was not"
        why += f" But the claim {said} run here."
        why += "" if why_not == NO_RUN else f" {why_not}"
    elif verdict == NOT_REPRODUCED and why_not != NO_RUN:
        why += f" {why_not}"
    if counts is None and verdict != REPRODUCED:
        why += f" {UNCOUNTED}"
    return replace(
        _with_ours(claim, best, measured),
        verdict=verdict,
        why=why,
        grim=grim,
        explained_by=label,
    )


def _unsaid(
    claim: Claim, one: Measured, usual: Measured, measured: Sequence[Measured]
) -> dict[str, Any]:
    """What a run does otherwise than the usual one where the claim is silent: the chat template (or
    its absence), and the turns of its examples."""
    found: dict[str, Any] = {}
    if claim.chat_template is None and one.chat_template != usual.chat_template:
        found["chat_template"] = one.chat_template
    name = "fewshot_as_multiturn"
    turns = [getattr(other, name) for other in measured if getattr(other, name) is not None]
    if getattr(one, name) is not None and getattr(one, name) != turns[0]:
        found[name] = getattr(one, name)
    return found


def _rank(claim: Claim, one: Measured, *, sampling: bool = True) -> int:
    """0: the printed number; 1: inside the interval; 2: neither."""
    step, gap = protocol.unit(claim), protocol.value_of(claim, one) - claim.value
    if abs(gap) <= step / 2 + EXACT or 0 <= gap < step - EXACT:  # rounded, or cut off
        return 0
    low, high = protocol.interval(claim, one, sampling=sampling)
    return 1 if low - step / 2 - EXACT <= claim.value <= high + step / 2 + EXACT else 2


def _explanation(
    claim: Claim, measured: Sequence[Measured], own: Sequence[Measured]
) -> Explanation | None:
    """The label under which the number is real: what differs, and the run that says so.

    Few differences go before many, then the printed number before one that is near."""
    found = []
    for place, one in enumerate(measured):
        for changed, scale in _scales(claim):
            if not scale and one in own:
                continue
            rank = _rank(changed, one, sampling=False)
            if rank < 2 and (changed.rescaled is False or one.rescaled is not None):
                label = scale | _labels(claim, one)
                label |= _unsaid(claim, one, (*own, *measured)[0], measured)
                found.append(((len(label), rank, place), Explanation(label, one, rank == 0)))
    best = min(found, key=lambda entry: entry[0], default=None)
    return None if best is None else best[1]


def _scales(claim: Claim) -> Iterator[tuple[Claim, dict[str, Any]]]:
    """The claim as it stands, and as it may have been meant."""
    yield claim, {}
    yield replace(claim, rescaled=not claim.rescaled), {"rescaled": not claim.rescaled}
    if claim.percent and claim.value * 100 <= 1:
        fraction = replace(claim, value=claim.value * 100, percent=False)
        yield fraction, {"scale": "a fraction, not a percentage"}
    if not claim.percent and 1 < claim.value <= 100:
        percent = replace(claim, value=claim.value / 100, percent=True)
        yield percent, {"scale": "a percentage, not a fraction"}


def _labels(claim: Claim, one: Measured) -> dict[str, Any]:
    """What a run did otherwise than the claim says."""
    said = {name: getattr(claim, name) for name in protocol.MATCHED}
    labels = {n: getattr(one, n) for n, v in said.items() if v is not None and v != getattr(one, n)}
    return {name: value for name, value in labels.items() if value is not None}


def _explained(found: Explanation) -> str:
    words = _listed(found.label)
    if found.exact:
        return f"It is what {words} gives: the number is real, but its label is wrong."
    return f"It would fit {words} ({percent(found.run.value)}): its label may be wrong."


def _chance(compared: Sequence[Measured]) -> str:
    """What the search itself does to its result, in a sentence; "" if there was none."""
    values = len({one.value for one in compared})
    said = f" {values} values were compared: the more there are, the likelier one fits by chance."
    return said if values > 1 else ""


def _listed(label: dict[str, Any]) -> str:
    return ", ".join(_words(name, value) for name, value in label.items())


def _words(name: str, value: Any) -> str:
    """A field of the protocol and its value, as said in a sentence."""
    if name == "shots":
        return f"{value} shot{'' if value == 1 else 's'}"
    if name in ("metric", "scale"):
        return str(value)
    if name == "rescaled":
        return "a rescaled score" if value else "a score that is not rescaled"
    if name == "chat_template":
        return "the chat template" if value else "a plain prompt"
    if name == "fewshot_as_multiturn":
        return "a turn for each example" if value else protocol.ONE_TURN
    return f"{name} {value}"


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
    explained: Explanation | None,
    why_not: str,
) -> Verdict:
    """Nothing was measured as the claim says."""
    names = ", ".join(dict.fromkeys(label(one) for one in measured))
    fields = {name: getattr(claim, name) for name in protocol.MATCHED}
    said = [_words(name, value) for name, value in fields.items() if value is not None]
    said += ["a rescaled score"] if claim.rescaled else []
    why = why_not
    if measured:
        why = f"{claim.benchmark} was not measured as {' and '.join(said)}, only as: {names}."
        why += "" if why_not == NO_RUN else f" {why_not}"
    found = Verdict(UNVERIFIABLE, why, grim, alternatives=tuple(map(_alternative, measured)))
    if explained is None:
        return found
    why += f" {_explained(explained)}{_chance(measured)}"
    return replace(found, why=why, explained_by=explained.label)


def _with_ours(claim: Claim, best: Measured, measured: Sequence[Measured]) -> Verdict:
    low, high = protocol.interval(claim, best)
    value = protocol.value_of(claim, best)
    named = ("n", "metric", "filter", "shots", "task", "task_version", "dtype", "lm_eval")
    ours = {"value": value, "ci95": [low, high], **{name: getattr(best, name) for name in named}}
    ours["chat_template"] = best.chat_template
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
    cause = "numerical noise"
    if protocol.is_part(claim, best):
        whole = "items, perhaps not all" if best.size is None else f"of {best.size:,} items"
        cause = f"noise, and sampling: our run saw {best.n:,} {whole}"
    reach = f"an honest run may give {_show(claim, low)} to {_show(claim, high)} ({cause})"
    if verdict == CONSISTENT:
        return f"{said}; {reach}, and {claim.printed} is inside."
    gap = claim.value - value
    side = "above" if gap > 0 else "below"
    points = f"{abs(gap) * 100:.2f} points" if low >= -1 and high <= 2 else f"{abs(gap):.4g}"
    return f"{said}; {reach}, and {claim.printed} is {points} {side} ours."


def label(one: Measured) -> str:
    """A run in a few words."""
    kind = one.metric if one.filter is None else f"{one.metric}, {one.filter}"
    return f"{kind}, {protocol.prompts(one.shots, one.chat_template, one.fewshot_as_multiturn)}"


def percent(value: float) -> str:
    """A share in percent; other values as they are."""
    return f"{100 * value:.2f} %" if -1 <= value <= 1 else f"{value:.4g}"


def _show(claim: Claim, value: float) -> str:
    return percent(value) if 0 <= claim.value <= 1 else f"{value:.4g}"
