"""One case: make the model with mergelab's engine, ask how it was made, compare with the truth."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from forensics_cases import TOLERANCES, Case
from forensics_models import train_on, write_family, write_mixture

from mergelab.checkpoint import open_checkpoint
from mergelab.engine import merge
from mergelab.forensics.infer import infer
from mergelab.plan import make_plan
from mergelab.recipe import load_recipe

SAME = {"breadcrumbs": ("breadcrumbs",)}  # readings that are one family beside the method itself


@dataclass(frozen=True)
class Row:
    """What came of a case; None: not asked (a trained model's weights, a mixture's method)."""

    case: Case
    result: dict[str, Any]
    parents: bool
    method: bool
    weight_error: float | None
    density_error: float | None
    seconds: float

    @property
    def accused(self) -> bool:
        """Was something found that was not done?"""
        return bool(self.result["undeclared"]["found"] or self.result["finetuned"]["found"])


def run(case: Case, work: Path) -> Row:
    """Make the model, infer, compare."""
    places = write_family(work, case.family)
    folder = work / f"case-{case.number}"
    child = make(case, places, folder)
    names = [n for n in (*case.candidates, case.base) if n]
    opened = {n: open_checkpoint(places[n], n) for n in names}
    base = opened.pop(case.base) if case.base else None
    started = time.process_time()
    result = infer(open_checkpoint(child, "child"), opened, base)
    seconds = time.process_time() - started
    shutil.rmtree(folder)
    return compare(case, result, seconds)


def make(case: Case, places: dict[str, Path], folder: Path) -> Path:
    """Carry out the case's recipes; the model in between becomes one of the places, M."""
    for index, recipe in enumerate(case.recipes):
        out = folder / str(index)
        if recipe["merge_method"] == "moe":
            used = [places[n] for n in recipe["models"]]
            write_mixture(out, places["base"], used, case.family.dtype, case.family.layers)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{index}.yaml"
            path.write_text(yaml.safe_dump(recipe, sort_keys=False))
            merge(make_plan(load_recipe(path), places, shard_size=1 << 30), out, seed=case.number)
        if index + 1 < len(case.recipes):
            places["M"] = out
    if case.trained:
        last, out = out, folder / "trained"
        size = case.trained
        train_on(out, last, case.family.dtype, case.family.layers, size, case.number)
    return out


def compare(case: Case, result: dict[str, Any], seconds: float) -> Row:
    """The truth beside the best hypothesis, and those that explain the weights as well."""
    readings = result["hypotheses"]
    equal = readings[:1] + [r for r in readings[1:] if r["equal"]]
    wanted = {n for n in case.weights if n not in case.hidden}
    found = set(result["parents"])
    if case.method == "moe":
        found.discard("base")
    fitting = [r for r in equal if r["method"] == case.method]
    weights = densities = None
    if fitting and case.honest and case.kind != "slerp, gradient":
        weights = _weight_error(case, fitting[0])
        densities = _density_error(case, fitting[0])
    elif fitting and case.honest:
        weights = _gradient_error(case, result)
    return Row(case, result, found == wanted, bool(fitting), weights, densities, seconds)


def _weight_error(case: Case, reading: dict[str, Any]) -> float:
    found = {p["name"]: p["weight"] for p in reading["parents"]}
    return max(abs(found.get(n, 0.0) - w) for n, w in case.weights.items())


def _density_error(case: Case, reading: dict[str, Any]) -> float | None:
    found = {p["name"]: p["density"] for p in reading["parents"]}
    if not case.densities:
        return None
    return max(abs((found.get(n) or 0.0) - d) for n, d in case.densities.items())


def _gradient_error(case: Case, result: dict[str, Any]) -> float:
    """The largest error of t over the layers of attention and MLP matrices."""
    (recipe,) = case.recipes
    curves = {s.get("filter", "rest"): s["value"] for s in recipe["parameters"]["t"]}
    reading = next(r for r in result["hypotheses"] if r["method"] == "slerp")
    told = reading["parameters"]["t"]
    swap = reading["parents"][0]["name"] != recipe["base_model"]
    layers, errors = case.family.layers, [0.0]
    for kind in ("self_attn", "mlp"):
        knots = curves[kind]
        for layer in range(layers):
            t = float(np.interp(layer / (layers - 1), np.linspace(0, 1, len(knots)), knots))
            value = told[kind]["layers"][str(layer)] if isinstance(told, dict) else told
            errors.append(abs((1 - value if swap else value) - t))
    return max(errors)


def tolerance(case: Case) -> float:
    """How near the weights must come: 0.01 for whole models, 0.03 for masked ones."""
    return TOLERANCES.get(case.method, 0.03)
