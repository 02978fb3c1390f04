"""From fits to recipes: hypotheses that say which method, parents and numbers made a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mergelab.forensics import curves
from mergelab.forensics.dense import LEAST, Fit, needed, pooled
from mergelab.forensics.masks import Mask
from mergelab.forensics.sparse import Outcome

ONE = 0.003  # a sum of weights this near to 1 is 1
WORSE = 0.001  # of the score, per number that a hypothesis needs
METHODS = {  # kind of mask, elected? -> methods, the likeliest first
    ("whole", True): ("ties", "dare_ties", "breadcrumbs_ties"),
    ("whole", False): ("task_arithmetic",),
    ("size", True): ("ties", "breadcrumbs_ties"),
    ("size", False): ("breadcrumbs", "ties"),
    ("band", True): ("breadcrumbs_ties",),
    ("band", False): ("breadcrumbs",),
    ("chance", True): ("dare_ties",),
    ("chance", False): ("dare_linear",),
    ("slope", True): ("della",),
    ("slope", False): ("della_linear",),
}


def parent(name: str, weight: float, density: float | None = None) -> dict[str, Any]:
    """A parent of a hypothesis."""
    return {
        "name": name,
        "weight": round(weight, 5),
        "density": None if density is None else round(density, 4),
    }


def hypothesis(
    method: str,
    parents: Sequence[dict[str, Any]],
    parameters: dict[str, Any],
    facts: dict[str, Any],
    why: str,
) -> dict[str, Any]:
    """One reading; `facts` holds r2, residual (rounding steps, rms), rounding and explained."""
    numbers = len(parents) + sum(p["density"] is not None for p in parents) + len(parameters)
    return {
        "method": method,
        "parents": list(parents),
        "parameters": parameters,
        "r2": facts["r2"],
        "residual": facts["residual"],
        "rounding": facts["rounding"],
        "score": round(facts["explained"] - WORSE * numbers, 5),
        "equal": False,
        "why": why,
    }


def facts(fits: Sequence[Fit]) -> dict[str, Any]:
    """What a dense fit leaves over all tensors, each weighed by its entries."""
    if not fits:
        return {"r2": 0.0, "residual": 0.0, "rounding": False, "explained": 0.0}
    size = np.array([f.size for f in fits], float)
    rms = np.array([f.rms for f in fits])
    left = sum(f.left**2 for f in fits) / max(sum(f.moved**2 for f in fits), 1e-300)
    good = float(sum(f.size for f in fits if f.rounded) / size.sum())
    return {
        "r2": round(max(0.0, 1 - left), 6),
        "residual": round(math.sqrt(float((size * rms**2).sum() / size.sum())), 4),
        "rounding": good >= 0.999,
        "explained": round(good, 5),
    }


def weights(fits: Sequence[Fit], names: Sequence[str]) -> dict[str, float]:
    """Mean coefficient of each source that is needed."""
    return {n: pooled(fits, n)[0] for n in names if needed(fits, n)}


def averages(
    fits: Sequence[Fit], found: dict[str, float], base: str | None, layers: int
) -> list[dict[str, Any]]:
    """Hypotheses of a dense fit, best first: linear, slerp or task arithmetic."""
    known, experts = facts(fits), {n: w for n, w in found.items() if n != base}
    if not experts:
        return []
    total = float(sum(found.values()))
    linear = _linear(fits, found, total, layers, known)
    readings = [linear] if min(found.values()) > 0 or base is None else []
    if base is not None and (abs(total - 1) <= ONE or not known["rounding"]):
        arithmetic = _arithmetic(fits, experts, layers, known)
        readings.insert(0 if base in found else len(readings), arithmetic)
    readings = readings or [linear]
    slerp, told = _slerp(fits, found, base, layers, known) if len(found) == 2 else (None, False)
    if slerp:
        readings = [slerp] if told else [*readings, slerp]
    for reading in readings[1:]:
        reading["equal"] = True
    return readings


def _shares(fits: Sequence[Fit], found: dict[str, float], layers: int) -> dict[str, Any]:
    """Weights that are no constant, per parent."""
    curved = {}
    for name in found:
        groups = curves.weights(fits, name)
        told = curves.describe(groups, layers)
        if not _one_value(told):
            curved[name] = told
    return curved


def _one_value(told: dict[str, Any]) -> bool:
    values = [entry["value"] for entry in told.values() if entry["layers"] or entry["value"]]
    known = [v for v in values if v is not None]
    return len(known) == len(values) and (not known or max(known) - min(known) <= 2 * curves.CLOSE)


def _linear(
    fits: Sequence[Fit], found: dict[str, float], total: float, layers: int, known: dict[str, Any]
) -> dict[str, Any]:
    parameters: dict[str, Any] = {}
    if abs(total - 1) > ONE:
        parameters = {"normalize": False}
    if curved := _shares(fits, found, layers):
        parameters["weight"] = curved
    why = f"every tensor is a weighted sum of these models; the weights sum to {total:.4g}"
    parents = [parent(n, w) for n, w in found.items()]
    return hypothesis("linear", parents, parameters, known, why)


def _arithmetic(
    fits: Sequence[Fit], experts: dict[str, float], layers: int, known: dict[str, Any]
) -> dict[str, Any]:
    curved = _shares(fits, experts, layers)
    why = (
        "child minus base is a weighted sum of these task vectors (weights include lambda); "
        f"they sum to {sum(experts.values()):.4g}"
    )
    parameters = {"lambda": 1.0, **({"weight": curved} if curved else {})}
    parents = [parent(n, w) for n, w in experts.items()]
    return hypothesis("task_arithmetic", parents, parameters, known, why)


def _slerp(
    fits: Sequence[Fit],
    found: dict[str, float],
    base: str | None,
    layers: int,
    known: dict[str, Any],
) -> tuple[dict[str, Any] | None, bool]:
    """SLERP of two models, if it may be one, and whether their angles tell it from linear."""
    a, b = sorted(found, key=lambda name: (name != base, list(found).index(name)))
    miss, linear, count = curves.slerp_evidence(fits, a, b)
    if min(found.values()) < -LEAST or (count and miss > linear):
        return None, False
    used = curves.slerp_places(fits, a, b)
    groups = curves.parts(used, lambda f: curves.t_of(f, a, b), lambda f: f.error(b))
    told = curves.describe(groups, layers)
    t = float(np.average([curves.t_of(f, a, b) for f in used], weights=[f.size for f in used]))
    if count:
        why = (
            f"in {count} tensors the models' angle tells SLERP from a straight line: the factors' "
            f"sums miss SLERP's by {math.sqrt(miss / count):.2g} standard errors, 1 by "
            f"{math.sqrt(linear / count):.3g}"
        )
    else:
        why = "linear or slerp: the models' weights are nearly parallel, where both are the same"
    parameters: dict[str, Any] = {"t": round(t, 5)}
    if not _one_value(told):
        parameters["t"] = {curves.FILTERS.get(kind, kind): entry for kind, entry in told.items()}
    parents = [parent(a, 1 - t), parent(b, t)]
    return hypothesis("slerp", parents, parameters, known, why), count > 0


def masked(outcome: Outcome, mask: Mask, share_of_entries: dict[str, Any]) -> list[dict[str, Any]]:
    """Hypotheses of a sparse fit, best first."""
    model, count = outcome.model, len(outcome.model.names)
    elected = [mask.elected] if mask.elected is not None else [True, False]
    if model.share:
        elected = [True]
    readings = []
    for vote in elected:
        for method in METHODS[mask.kind, vote]:
            readings.append(_masked(method, outcome, mask, share_of_entries, count))
    for reading in readings[1:]:
        reading["equal"] = True
    return readings


def _masked(
    method: str, outcome: Outcome, mask: Mask, known: dict[str, Any], count: int
) -> dict[str, Any]:
    model = outcome.model
    rescaled = method.startswith(("dare", "della"))
    scale = np.array(mask.densities) if rescaled else np.ones(count)
    factors = model.factors if model.share else _typical(outcome) * scale
    parameters: dict[str, Any] = {"normalize": model.share}
    parameters["lambda"] = round(float(model.scale * scale.mean()), 4) if model.share else 1.0
    if mask.kind == "band":
        parameters["gamma"] = mask.outliers
    if mask.kind == "slope":
        parameters["epsilon"] = round(abs(mask.slope) / 2, 3)
    parents = [
        parent(name, float(w), density)
        for name, w, density in zip(model.names, factors, mask.densities, strict=True)
    ]
    return hypothesis(method, parents, parameters, known, _why(mask, model.share))


def _typical(outcome: Outcome) -> Any:
    """Mean over the tensors of their own factors."""
    return np.mean([model.factors for model in outcome.each], axis=0)


def _why(mask: Mask, share: bool) -> str:
    kinds = {
        "whole": "no entry was dropped",
        "chance": "which entries were kept does not depend on their size",
        "size": "the largest entries were kept",
        "band": "the largest and the smallest entries were dropped",
        "slope": "larger entries were kept more often",
    }
    vote = {
        True: "of opposing signs only one was kept",
        False: "opposing signs were added",
        None: "too few opposing entries tell whether signs were elected",
    }[mask.elected]
    how = "each entry is a weighted mean" if share else "each entry is a sum"
    return f"{how} of the task vectors that were kept there; {kinds[mask.kind]}; {vote}"
