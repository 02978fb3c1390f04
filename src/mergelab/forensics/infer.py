"""How was a model made? Judged from its weights and those of candidate parents, without a recipe.

Reads a fixed part of every tensor (samples.py), and whole tensors only where they seem to be
copies. Explanations are tried from the simplest on: copies, sums of whole models, sums of masked
task vectors; what is left over is weighed last. Every test is against rounding to the child's
dtype, not against a threshold on R2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergelab.checkpoint import Checkpoint, split_layer
from mergelab.forensics import curves, leftovers, masked, readings, stacks
from mergelab.forensics.inquiry import Inquiry
from mergelab.forensics.origins import group
from mergelab.forensics.samples import LIMIT

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
        or masked.answer(inquiry)
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
    return leftovers.answer([reading], *leftovers.nothing(f"all {every:,} entries {said}"))


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
    return leftovers.answer([reading], *judged)


def _summed(inquiry: Inquiry) -> dict[str, Any] | None:
    """Sums of whole models explain everything."""
    if not inquiry.rounded or not inquiry.found:
        return None
    layers = inquiry.model.layers
    return leftovers.answer(
        readings.averages(inquiry.fits, inquiry.found, inquiry.base, layers), *leftovers.nothing()
    )


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
    return leftovers.answer(told, undeclared, finetuned)


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
