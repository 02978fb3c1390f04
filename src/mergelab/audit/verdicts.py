"""Is a published score what the model gives? A claim against what we measured.

A re-run sees the same items, so the luck of the draw excuses nothing: only rounding and numerical
noise do (see noise.py), and sampling where our run saw other items, or a part of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from typing import Any

from mergelab import published
from mergelab.audit import protocol
from mergelab.audit.protocol import EXACT, Measured
from mergelab.claims.base import Claim

VERSION = 1
REPRODUCED, CONSISTENT, NOT_REPRODUCED = "reproduced", "consistent", "not reproduced"
IMPOSSIBLE, DOES_NOT_FIT, UNVERIFIABLE = "impossible", "does not fit", "unverifiable"
NO_RUN = "nothing was measured"
DIGITS = 10  # decimals of a percentage that GRIM looks at: a float's own error is below
MOST_FITS = 20  # numbers of hits listed
RIGHT_OR_WRONG = ("acc", "acc_norm", "exact_match")  # metrics that count right answers


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
    grim = _grim(claim, measured)
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
        why += f" {_explained(explained)}"
    elif verdict in (REPRODUCED, CONSISTENT):
        label = _unsaid(claim, best, own[0])
        why += f" The claim does not say so: {_words(*next(iter(label.items())))}." if label else ""
    elif verdict == UNVERIFIABLE:
        said = f"is about {' and '.join(unable)}, which cannot be"
        said = said if unable else f"may be about {unsure}, which was not"
        why += f" But the claim {said} run here."
        why += "" if why_not == NO_RUN else f" {why_not}"
    elif verdict == NOT_REPRODUCED and why_not != NO_RUN:
        why += f" {why_not}"
    return replace(
        _with_ours(claim, best, measured),
        verdict=verdict,
        why=why,
        grim=grim,
        explained_by=label,
    )


def _unsaid(claim: Claim, best: Measured, usual: Measured) -> dict[str, Any] | None:
    """The chat template, where the number needs it (or its absence), the usual run is otherwise,
    and the claim is silent."""
    silent = claim.chat_template is None and best.chat_template != usual.chat_template
    return {"chat_template": best.chat_template} if silent else None


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
    words = ", ".join(_words(name, value) for name, value in found.label.items())
    if found.exact:
        return f"It is what {words} gives: the number is real, but its label is wrong."
    return f"It would fit {words} ({percent(found.run.value)}): its label may be wrong."


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
    return f"{name} {value}"


def _grim(claim: Claim, measured: Sequence[Measured]) -> dict[str, Any] | None:
    """Could right or wrong answers give the number? None if they are not what is counted.

    Beside rounding, a number may be cut off, or printed with a 0 that was never measured; the run
    may be of all items, or of those that we saw. Of another split the items are not known."""
    of_kind = [o for o in measured if claim.metric is None or o.metric == claim.metric]
    if measured and (not of_kind or any(o.hits is None for o in of_kind)):
        return None
    same = [o for o in of_kind if protocol.may_be_split(claim, o.split)]
    known = {o.size for o in same if claim.split != o.split}
    sizes = {o.n for o in same} | {size for size in known if size is not None}
    if not measured and claim.metric in (None, *RIGHT_OR_WRONG):
        sizes = protocol.usual_size(claim)
    if not sizes or None in known or claim.rescaled or not 0 <= claim.value <= 1:
        return None
    text = _percentage(claim)
    fits = {n: _hits(text, n) for n in sorted(sizes, reverse=True)}
    n = next((n for n, hits in fits.items() if hits), max(sizes))
    return {"n": n, "fits": list(fits[n][:MOST_FITS]), "possible": bool(fits[n])}


def _percentage(claim: Claim) -> str:
    """The printed digits as a percentage, without those beyond a float's own error."""
    exact = Decimal(claim.printed).scaleb(0 if claim.percent else 2)
    exponent = exact.as_tuple().exponent
    if isinstance(exponent, int) and exponent < -DIGITS:
        exact = round(exact, DIGITS)
    return f"{exact:f}"


def _hits(text: str, n: int) -> tuple[int, ...]:
    """The numbers of hits that may be printed so."""
    if fits := published.grim(text, n):
        return fits
    short = text.rstrip("0").rstrip(".") if "." in text else text
    if short != text and (fits := published.grim(short, n)):
        return fits
    value = Decimal(text)
    step = Decimal(1).scaleb(int(value.as_tuple().exponent))
    k = math.ceil(value * n / 100)
    return (k,) if k <= n and Decimal(100 * k) / n < value + step else ()


def _impossible(
    claim: Claim, grim: dict[str, Any], best: Measured | None, measured: Sequence[Measured]
) -> Verdict:
    why = f"{_no_count(claim, grim['n'])} It is no score of one run on all items."
    shown = Verdict(IMPOSSIBLE, why) if best is None else _with_ours(claim, best, measured)
    return replace(shown, verdict=IMPOSSIBLE, why=why, grim=grim)


def _does_not_fit(claim: Claim, grim: dict[str, Any], why_not: str) -> Verdict:
    """A number is only doubtful where nothing was run: the number of items is the usual one."""
    why = (
        f"{_no_count(claim, grim['n'])} {claim.benchmark} usually has so many; other items, a mean "
        "of several runs or another way of rounding may give it."
    )
    return Verdict(DOES_NOT_FIT, why if why_not == NO_RUN else f"{why} {why_not}", grim)


def _no_count(claim: Claim, n: int) -> str:
    text = _percentage(claim)
    k = math.floor(Decimal(text) * n / 100)
    near = " or ".join(f"{100 * x / n:.{max(2, _decimals(text))}f} ({x})" for x in (k, k + 1))
    return f"No number of right answers to {n:,} items is {text} %; the nearest are {near}."


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
    return replace(found, why=f"{why} {_explained(explained)}", explained_by=explained.label)


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
    return found | ({"chat_template": True} if one.chat_template else {})


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
        whole = "items, a part" if best.size is None else f"of {best.size:,} items"
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
    chat = ", chat template" if one.chat_template else ""
    return f"{kind}, {one.shots} shot{'' if one.shots == 1 else 's'}{chat}"


def percent(value: float) -> str:
    """A share in percent; other values as they are."""
    return f"{100 * value:.2f} %" if -1 <= value <= 1 else f"{value:.4g}"


def _show(claim: Claim, value: float) -> str:
    return percent(value) if 0 <= claim.value <= 1 else f"{value:.4g}"


def _decimals(text: str) -> int:
    return len(text.partition(".")[2])
