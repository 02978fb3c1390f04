"""The label under which a number is real: what a run that gives it did otherwise, and in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mergelab.audit import protocol
from mergelab.audit.measured import Measured
from mergelab.claims.base import Claim


@dataclass(frozen=True)
class Explanation:
    """What a run did otherwise that gives the claimed number: `exact`, or near it."""

    label: dict[str, Any]
    run: Measured
    exact: bool


def explanation(
    claim: Claim, measured: Sequence[Measured], own: Sequence[Measured]
) -> Explanation | None:
    """The label under which the number is real: what differs, and the run that says so.

    Few differences go before many, then the printed number before one that is near."""
    found = []
    for place, one in enumerate(measured):
        for changed, scale in _scales(claim):
            if not scale and one in own:
                continue
            rank = protocol.rank(changed, one, sampling=False)
            if rank < 2 and (changed.rescaled is False or one.rescaled is not None):
                label = scale | _labels(claim, one)
                label |= unsaid(claim, one, (*own, *measured)[0], measured)
                found.append(((len(label), rank, place), Explanation(label, one, rank == 0)))
    best = min(found, key=lambda entry: entry[0], default=None)
    return None if best is None else best[1]


def unsaid(
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
    return {n: getattr(one, n) for n, v in said.items() if v is not None and v != getattr(one, n)}


def explained_in_words(found: Explanation, *, ran: bool = True) -> str:
    """What gives the number, in a sentence; `ran`: was the claimed protocol run, too?"""
    what = listed(found.label)
    if found.exact:
        said, so = f"It is what {what} gives", "the number is real, but its label is wrong"
    else:
        said, so = f"It would fit {what} ({percent(found.run.value)})", "its label may be wrong"
    return f"{said}: {so}." if ran else f"{said}, but the claimed protocol was not run."


def chance(compared: Sequence[Measured]) -> str:
    """What the search itself does to its result, in a sentence; "" if there was none."""
    values = len({one.value for one in compared})
    said = f" {values} values were compared: the more there are, the likelier one fits by chance."
    return said if values > 1 else ""


def listed(label: dict[str, Any]) -> str:
    """What a label says, in words."""
    return ", ".join(words(name, value) for name, value in label.items())


def words(name: str, value: Any) -> str:
    """A field of the protocol and its value, as said in a sentence."""
    if value is None:
        return f"no {name}"
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


def label(one: Measured) -> str:
    """A run in a few words."""
    kind = one.metric if one.filter is None else f"{one.metric}, {one.filter}"
    return f"{kind}, {protocol.prompts(one.shots, one.chat_template, one.fewshot_as_multiturn)}"


def percent(value: float) -> str:
    """A share in percent; other values as they are."""
    return f"{100 * value:.2f} %" if -1 <= value <= 1 else f"{value:.4g}"
