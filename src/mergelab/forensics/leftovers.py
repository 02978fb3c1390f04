"""What the candidates do not explain: an undeclared parent, or training after the merge?

The weights alone cannot always tell. What speaks: how large the rest is beside the task vectors,
whether the declared weights leave room for another parent, and which tensors it lies in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mergelab.forensics.dense import Fit

LITTLE = 0.12  # rest, as share of a task vector, up to which it may be training
LITTLE_APART = 0.08  # the same, of the distance between two models, where no base is known
LARGE = 0.6  # more than training adds even where no other parent has room
ROOM = 0.005  # by which declared weights must miss 1 to leave room for another parent
MATCH = 2.0  # factor by which the rest may miss what a parent of the missing weight would leave
LOCAL = 0.5  # share of entries: a rest in fewer is local


def judge(
    fits: Sequence[Fit], found: dict[str, float], base: str | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """('undeclared', 'finetuned') of a model that dense sums do not explain up to rounding."""
    bad = [f for f in fits if not f.rounded]
    share = sum(f.size for f in bad) / max(1, sum(f.size for f in fits))
    rest, like = rest_of(bad), weight_like(bad)
    experts = [w for n, w in found.items() if n != base]
    total = sum(experts)
    where = f"{len(bad)} of {len(fits)} tensors, {share:.0%} of the entries looked at"
    beside = "a candidate's task vector" if base else "the distance between two candidates"
    size = f"what no candidate explains is {like:.0%} as long as {beside} ({where})"
    little = LITTLE if base else LITTLE_APART
    if not experts or not any(f.apart for f in bad):
        return _said(rest, f"no candidate has a part in it; {size}", undeclared=True)
    if share < LOCAL:
        rests = "the other tensors are explained up to rounding"
        return _said(rest, f"{size}; {rests}", undeclared=like > little)
    if base is None:
        room = "without a base the weights cannot show whether there is room for another parent"
        return _said(rest, f"{size}; {room}", undeclared=like > little)
    if abs(total - 1) <= ROOM:
        room = f"the declared weights sum to {total:.3f}, which leaves no room for another parent"
        return _said(rest, f"{size}; {room}", undeclared=like > LARGE)
    room = f"the declared weights sum to {total:.3f}: another parent has room"
    fits_room = 1 / MATCH < like / (1 - total) < MATCH
    return _said(rest, f"{size}; {room}", undeclared=like > little or fits_room)


def rest_of(fits: Sequence[Fit]) -> float:
    """Length of the residual as a share of the length of child minus reference, over tensors."""
    left, moved = sum(f.left**2 for f in fits), sum(f.moved**2 for f in fits)
    return math.sqrt(left / moved) if moved else 0.0


def weight_like(fits: Sequence[Fit]) -> float:
    """The weight that another model, as far away as the candidates, would need for such a rest."""
    left, apart = sum(f.left**2 for f in fits), sum(f.apart**2 for f in fits)
    return math.sqrt(left / apart) if apart else 1.0


def _said(rest: float, why: str, *, undeclared: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    other = "an undeclared parent" if not undeclared else "training after the merge"
    doubt = f"{why}. The weights alone do not rule out {other}."
    return (
        {"found": undeclared, "unexplained": round(rest, 4), "why": doubt if undeclared else why},
        {"found": not undeclared, "why": why if undeclared else doubt},
    )


def nothing(
    why: str = "every entry looked at is explained up to rounding",
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two answers where everything is explained."""
    return {"found": False, "unexplained": 0.0, "why": why}, {"found": False, "why": why}


def answer(
    told: list[dict[str, Any]], undeclared: dict[str, Any], finetuned: dict[str, Any]
) -> dict[str, Any]:
    """Hypotheses, best first, with what they leave over."""
    return {"hypotheses": told, "undeclared": undeclared, "finetuned": finetuned}
