"""How was a model made? Judged from its weights and those of candidate parents, without a recipe.

Reads a fixed part of every tensor (samples.py), and whole tensors only where they seem to be
copies. Explanations are tried from the simplest on: copies, sums of whole models, sums of masked
task vectors; what is left over is weighed last. Every test is against rounding to the child's
dtype, not against a threshold on R2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mergelab.checkpoint import Checkpoint, split_layer
from mergelab.forensics import curves, leftovers, masks, readings, sparse, stacks
from mergelab.forensics.inquiry import Inquiry
from mergelab.forensics.origins import group
from mergelab.forensics.samples import LIMIT

EXPLAINED = 0.95  # share of entries beyond chance that a mask must reproduce
TRAINED = (0.03, 0.06, 0.12)  # of a task vector's rms: what training after the merge may add
SPREADS = 3.0  # rms within which nearly all of it lies
ALL, MOST = 0.99, 0.75  # of a tensor's entries; of the tensors: then the others are foreign
FOREIGN = 0.5  # share of a tensor's entries that masks must reproduce, or it is another model's
BETTER = 2.5  # times closer than sums of whole models that masks must come, to be believed
CHANCE = 0.8  # above which an agreement says nothing
BASES = 2  # candidates that are tried as the base, if none is named
UNTOUCHED = 0.02  # share of entries that a masked merge leaves as its base has them
PARTLY = 0.15  # reproduced beyond chance: masks are at work, though they explain too little


def infer(
    model: Checkpoint,
    candidates: Mapping[str, Checkpoint],
    base: Checkpoint | None = None,
    workers: int = 1,
) -> dict[str, Any]:
    """How `model` was made, as far as its weights tell; a plain dict that `json.dumps` takes.

    hypotheses: best first; `weight` of a parent as a recipe would have it (times lambda), of
    passthrough its share of the layers, of moe of the experts; `equal` says that the one before
    explains the weights as well. score: share of entries reproduced, less 0.001 per number.
    residual: rms in rounding steps of the child's dtype (0.289 is one rounding). Raises UserError
    if there is nothing to compare."""
    inquiry = Inquiry(model, candidates, base, workers)
    inquiry.fit_dense()
    inquiry.note_unread()
    answer = (
        _copied(inquiry)
        or _mixed(inquiry)
        or _summed(inquiry)
        or _masked(inquiry)
        or _left(inquiry)
    )
    return _result(inquiry, answer)


def _copied(inquiry: Inquiry) -> dict[str, Any] | None:
    """All tensors are copies."""
    tensors = inquiry.model.tensors
    if set(inquiry.same) != {n for n, t in tensors.items() if t.size}:
        return None
    reading = stacks.stacked(inquiry.model, inquiry.same, list(inquiry.pool))
    every, parents = sum(t.size for t in tensors.values()), {p["name"] for p in reading["parents"]}
    same = all(
        tensors[name].dtype == inquiry.pool[owner].tensors[theirs].dtype
        for name, found in inquiry.same.items()
        for owner, theirs in found
        if owner in parents
    )
    said = "have the same bits" if same else "are the same, rounded to its dtype"
    return _answer([reading], *leftovers.nothing(f"all {every:,} entries {said}"))


def _mixed(inquiry: Inquiry) -> dict[str, Any] | None:
    """A mixture of experts made of dense models."""
    parts = [n for names in stacks.experts(inquiry.model).values() for n in names]
    if not parts or any(n in c.tensors for n in parts for c in inquiry.pool.values()):
        return None
    rest = set(inquiry.model.tensors) - {*parts, *stacks.routers(inquiry.model)}
    owners = [{o for o, _ in inquiry.same[n]} for n in sorted(rest) if n in inquiry.same]
    common = set.intersection(*owners) if owners else set()
    base = [n for n in inquiry.pool if n in common][:1]
    reading = stacks.mixture(inquiry.model, inquiry.same, list(inquiry.pool), base)
    if reading is None:
        return None
    others = [f for f in inquiry.fits if f.tensor in rest and not f.rounded]
    judged = leftovers.judge(others, inquiry.found, inquiry.base) if others else leftovers.nothing()
    return _answer([reading], *judged)


def _summed(inquiry: Inquiry) -> dict[str, Any] | None:
    """Sums of whole models explain everything."""
    if not inquiry.rounded or not inquiry.found:
        return None
    layers = inquiry.model.layers
    return _answer(
        readings.averages(inquiry.fits, inquiry.found, inquiry.base, layers), *leftovers.nothing()
    )


def _masked(inquiry: Inquiry) -> dict[str, Any] | None:
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
        return _answer(told, undeclared, {"found": False, "why": why})
    if tolerance == 1:
        return _answer(told, *leftovers.nothing())
    why = (
        f"masked task vectors explain {outcome.explained:.1%} of the entries beyond chance, but "
        f"only within {tolerance:.3g} rounding steps: a little training came after the merge"
    )
    none = {"found": False, "unexplained": 0.0, "why": why}
    return _answer(told, none, {"found": True, "why": why})


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


def _left(inquiry: Inquiry) -> dict[str, Any]:
    """Something is left over: an undeclared parent, or training after the merge."""
    told = readings.averages(inquiry.fits, inquiry.found, inquiry.base, inquiry.model.layers)
    undeclared, finetuned = leftovers.judge(inquiry.fits, inquiry.found, inquiry.base)
    if inquiry.partial > PARTLY and inquiry.base and undeclared["found"]:
        why = (
            f"masked task vectors of these parents reproduce {inquiry.partial:.0%} of the entries "
            "to the last bit, beyond chance: the others have a part of a model that is not among "
            "them"
        )
        undeclared = {**undeclared, "found": True, "why": why}
        finetuned = {"found": False, "why": why}
    return _answer(told, undeclared, finetuned)


def _answer(
    told: list[dict[str, Any]], undeclared: dict[str, Any], finetuned: dict[str, Any]
) -> dict[str, Any]:
    return {"hypotheses": told, "undeclared": undeclared, "finetuned": finetuned}


def _result(inquiry: Inquiry, answer: dict[str, Any]) -> dict[str, Any]:
    told, layers = answer["hypotheses"], inquiry.model.layers
    names = [p["name"] for p in told[0]["parents"]] if told else []
    gradient = {}
    for name in inquiry.found:
        groups = curves.weights(inquiry.fits, name)
        gradient[name] = curves.describe(groups, layers)
    tensors = inquiry.model.tensors.items()
    looked = sum(t.size if n in inquiry.same else min(t.size, LIMIT) for n, t in tensors)
    every = sum(t.size for _, t in tensors)
    notes = [*inquiry.notes]
    if looked < every:
        notes.append(
            f"looked at {looked:,} of {every:,} entries, spread over every tensor: a change of few "
            "entries may be missed"
        )
    return {
        "model": inquiry.model.label,
        "base": inquiry.base,
        "candidates": [n for n in inquiry.pool if n != inquiry.base],
        "verdict": _verdict(told, answer),
        "hypotheses": told,
        "parents": names,
        "undeclared": answer["undeclared"],
        "finetuned": answer["finetuned"],
        "layers": _layers(inquiry),
        "gradient": gradient,
        "notes": notes,
    }


def _layers(inquiry: Inquiry) -> list[dict[str, Any]]:
    """One entry per tensor of the child, in order of names."""
    fits = {f.tensor: f for f in inquiry.fits}
    found = []
    for name in sorted(inquiry.model.tensors):
        own, same = fits.get(name), inquiry.same.get(name, [])
        pairs = zip(own.names, own.coefficients, strict=True) if own else ()
        found.append({
            "tensor": name,
            "layer": split_layer(name)[1],
            "group": group(name),
            "coefficients": {n: round(float(w), 5) for n, w in pairs},
            "r2": round(own.r2, 6) if own else 1.0 if same else None,
            "residual": round(own.rms, 4) if own else 0.0 if same else None,
            "copy_of": ":".join(same[0]) if same else None,
        })  # fmt: skip
    return found


def _verdict(told: Sequence[dict[str, Any]], answer: dict[str, Any]) -> str:
    """One sentence."""
    if not told:
        return f"not explained by any candidate: {answer['undeclared']['why']}"
    best = told[0]
    parents = ", ".join(f"{p['name']} {p['weight']:.3g}" for p in best["parents"])
    others = [r["method"] for r in told[1:] if r["equal"]]
    method = " or ".join([best["method"], *others])
    text = f"{method} of {parents}"
    if answer["undeclared"]["found"]:
        return f"{text}, and an undeclared parent: {answer['undeclared']['why']}"
    if answer["finetuned"]["found"]:
        return f"{text}, then trained on: {answer['finetuned']['why']}"
    return f"{text}: {answer['finetuned']['why']}"
