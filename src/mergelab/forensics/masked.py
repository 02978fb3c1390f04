"""Is a model a sum of masked task vectors of its candidates? (TIES, DARE, breadcrumbs, ...)"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mergelab.forensics import leftovers, masks, readings, sparse
from mergelab.forensics.inquiry import Inquiry

EXPLAINED = 0.95  # share of entries beyond chance that a mask must reproduce
TRAINED = (0.03, 0.06, 0.12)  # of a task vector's rms: what training after the merge may add
SPREADS = 3.0  # rms within which nearly all of it lies
ALL, MOST = 0.99, 0.75  # of a tensor's entries; of the tensors: then the others are foreign
FOREIGN = 0.5  # share of a tensor's entries that masks must reproduce, or it is another model's
BETTER = 2.5  # times closer than sums of whole models that masks must come, to be believed
CHANCE = 0.8  # above which an agreement says nothing
BASES = 2  # candidates that are tried as the base, if none is named
UNTOUCHED = 0.02  # share of entries that a masked merge leaves as its base has them


def answer(inquiry: Inquiry) -> dict[str, Any] | None:
    """Sums of masked task vectors explain everything, or all but a little training."""
    if readings.facts(inquiry.fits)["explained"] > 1 - MOST:
        return None  # no masks: other tensors, whole ones, are sums
    known = inquiry.base is not None and leftovers.weight_like(inquiry.fits) > leftovers.LITTLE
    for base in [inquiry.base] if inquiry.base else _bases(inquiry):
        outcome, parts = inquiry.unmask(base)
        inquiry.partial = max(inquiry.partial, outcome.explained if parts else 0.0)
        if not parts:
            continue
        if outcome.explained >= EXPLAINED or _but_few(outcome, parts):
            return _unmasked(inquiry, base, outcome, parts)
        for tolerance in _tolerances(parts) if known else ():
            looser = inquiry.search(parts, outcome.model.names, tolerance)
            if looser.explained < EXPLAINED or looser.chance > CHANCE:
                continue
            looser, fewer = inquiry.prune(parts, outcome.model.names, tolerance)
            if _rest(fewer, looser) * BETTER < leftovers.weight_like(inquiry.fits):
                return _unmasked(inquiry, base, looser, fewer, tolerance)
    return None


def _but_few(outcome: sparse.Outcome, parts: Sequence[sparse.Part]) -> bool:
    """Is everything explained but a few tensors?"""
    return sum(share >= ALL for share in _shares(outcome, parts)) >= MOST * len(parts)


def _shares(
    outcome: sparse.Outcome, parts: Sequence[sparse.Part], tolerance: float = 1.0
) -> list[float]:
    """Per tensor, the share of entries that masks reproduce."""
    pairs = zip(parts, outcome.each, strict=True)
    return [float((sparse.nearest(p, m)[1] <= tolerance).mean()) for p, m in pairs]


def _tolerances(parts: Sequence[sparse.Part]) -> list[float]:
    """Distances, in steps, that training of some size after the merge may have caused."""
    found = [SPREADS * share * _moved(parts) for share in TRAINED]
    return [tolerance for tolerance in found if tolerance > 1]


def _moved(parts: Sequence[sparse.Part]) -> float:
    """Rms of the task vectors, in steps."""
    return float(np.sqrt(np.mean([float(np.square(part.taus).mean()) for part in parts])))


def _rest(parts: Sequence[sparse.Part], outcome: sparse.Outcome) -> float:
    """What masks leave, as a share of a task vector."""
    return float(_outcome_facts(parts, outcome, exact=False)["residual"]) / _moved(parts)


def _unmasked(
    inquiry: Inquiry,
    base: str,
    outcome: sparse.Outcome,
    parts: Sequence[sparse.Part],
    tolerance: float = 1.0,
) -> dict[str, Any] | None:
    """The answer from a masked sum; None if nothing was dropped, so that it is no masked one."""
    mask = masks.read(parts, outcome, tolerance)
    if mask.kind == "whole" and not mask.elected:
        return None
    inquiry.base = base
    told = readings.masked(outcome, mask, _outcome_facts(parts, outcome, exact=tolerance == 1))
    shares = zip(parts, _shares(outcome, parts, tolerance), strict=True)
    foreign = [part.tensor for part, share in shares if share < FOREIGN]
    if foreign:
        why = (
            f"{len(foreign)} of {len(parts)} tensors are not explained by these parents, "
            f"{foreign[0]} among them"
        )
        share = len(foreign) / len(parts)
        undeclared = {"found": True, "unexplained": round(share, 4), "why": why}
        return leftovers.answer(told, undeclared, {"found": False, "why": why})
    if tolerance == 1:
        return leftovers.answer(told, *leftovers.nothing())
    why = (
        f"masked task vectors explain {outcome.explained:.1%} of the entries beyond chance, but "
        f"only within {tolerance:.3g} rounding steps: a little training came after the merge"
    )
    none = {"found": False, "unexplained": 0.0, "why": why}
    return leftovers.answer(told, none, {"found": True, "why": why})


def _bases(inquiry: Inquiry) -> list[str]:
    """Candidates that a masked merge may have started from: many entries are theirs, untouched."""
    shares = {}
    for base in inquiry.pool:
        parts = inquiry.parts([n for n in inquiry.pool if n != base], base)
        entries = sum(p.delta.size for p in parts)
        shares[base] = sum(int((p.delta == 0).sum()) for p in parts) / max(1, entries)
    likely = [n for n in shares if shares[n] > UNTOUCHED]
    return sorted(likely, key=lambda n: -shares[n])[:BASES]


def _outcome_facts(
    parts: Sequence[sparse.Part], outcome: sparse.Outcome, *, exact: bool
) -> dict[str, Any]:
    """r2, residual and the share of entries of a masked sum."""
    left, moved, size = 0.0, 0.0, 0
    for part, model in zip(parts, outcome.each, strict=True):
        left += float(np.square(sparse.nearest(part, model)[1]).sum())
        moved += float(np.square(part.delta).sum())
        size += part.delta.size
    return {
        "r2": round(max(0.0, 1 - left / moved), 6) if moved else 1.0,
        "residual": round(float(np.sqrt(left / max(1, size))), 4),
        "rounding": exact,
        "explained": round(outcome.explained, 5),
    }
