"""The merges whose making is to be found out: recipes, what is known of them, what is hidden."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from forensics_models import EXPERTS, Family

COUNTS = {  # honest merges per method, in a full run
    "linear": 24,
    "slerp": 12,
    "slerp, gradient": 18,
    "task_arithmetic": 24,
    "ties": 24,
    "dare_linear": 20,
    "dare_ties": 20,
    "breadcrumbs": 20,
    "passthrough": 16,
    "merge of merges": 16,
    "moe": 10,
}
HIDDEN = {
    "linear": 12,
    "task_arithmetic": 10,
    "slerp": 6,
    "ties": 8,
    "dare_linear": 6,
    "dare_ties": 5,
    "passthrough": 4,
}
TRAINED = {"linear": 6, "slerp": 4, "task_arithmetic": 4, "ties": 4, "dare_linear": 3}
DTYPES = ("bfloat16", "bfloat16", "float16", "float32")
MOVED = (0.002, 0.002, 0.0007, 0.005)
TOLERANCES = {"linear": 0.01, "slerp": 0.01, "task_arithmetic": 0.01}  # of weights; others: 0.03


@dataclass(frozen=True)
class Case:
    """One merge. recipes: made in order, the last is the child; the others may be candidates.

    weights: of its parents, as a recipe's reading gives them; hidden: parents that are no
    candidates; trained: sd of what training after the merge adds."""

    number: int
    kind: str
    method: str
    family: Family
    recipes: tuple[dict[str, Any], ...]
    weights: dict[str, float]
    candidates: tuple[str, ...]
    base: str | None
    densities: dict[str, float] = field(default_factory=dict)
    hidden: tuple[str, ...] = ()
    trained: float = 0.0

    @property
    def honest(self) -> bool:
        """Are all parents among the candidates, and nothing was done after the merge?"""
        return not self.hidden and not self.trained


def cases(seed: int, share: float = 1.0) -> Iterator[Case]:
    """All cases of a run; a share of each kind for a quick one."""
    number = 0
    for counts, change in ((COUNTS, _same), (HIDDEN, _hide), (TRAINED, _train)):
        for kind, count in counts.items():
            for index in range(max(1, round(count * share))):
                number += 1
                random = np.random.default_rng([seed, number])
                moved = MOVED[index % len(MOVED)]
                family = Family(
                    seed * 10 + index % 3,
                    (4, 6)[index % 2],
                    max(moved, 0.002) if change is _train else moved,
                    DTYPES[(index + index // 4) % len(DTYPES)],
                )
                yield change(_case(number, kind, index, family, random), random)


def _same(case: Case, random: np.random.Generator) -> Case:
    return case


def _hide(case: Case, random: np.random.Generator) -> Case:
    """Take one parent from the candidates (never the base)."""
    name = sorted(case.weights)[int(random.integers(len(case.weights)))]
    left = tuple(n for n in case.candidates if n != name)
    return replace(case, kind=f"{case.kind}, undeclared", hidden=(name,), candidates=left)


def _train(case: Case, random: np.random.Generator) -> Case:
    """Move every entry a little after the merge: 5 to 10 % of what an expert moved.

    Of experts that moved 0.002 or more: less would be lost in a bfloat16's rounding step."""
    size = float(random.uniform(0.05, 0.1)) * case.family.moved
    return replace(case, kind=f"{case.kind}, trained on", trained=size)


def _case(number: int, kind: str, index: int, family: Family, random: np.random.Generator) -> Case:
    make = MAKERS[kind]
    method, recipes, weights, base, densities = make(index, family, random)
    used = [n for n in EXPERTS if any(n in str(r) for r in recipes)]
    decoys = [n for n in EXPERTS if n not in used][: 2 + index % 2]
    candidates = sorted({*used, *decoys, *(n for n in weights if n != base)})
    return Case(number, kind, method, family, recipes, weights, tuple(candidates), base, densities)


Made = tuple[str, tuple[dict[str, Any], ...], dict[str, float], str | None, dict[str, float]]


def _recipe(
    method: str, models: list[dict[str, Any]], family: Family, **more: Any
) -> dict[str, Any]:
    return {"merge_method": method, "dtype": family.dtype, "models": models, **more}


def _shares(random: np.random.Generator, count: int) -> list[float]:
    """Weights that sum to 1, none below 0.1, on a grid of 0.01."""
    parts = random.dirichlet(np.full(count, 3.0)) * (1 - 0.1 * count) + 0.1
    rounded = [round(float(p), 2) for p in parts[:-1]]
    return [*rounded, round(1 - sum(rounded), 2)]


def _pick(random: np.random.Generator, count: int) -> list[str]:
    return [EXPERTS[i] for i in random.permutation(len(EXPERTS))[:count]]


def _entries(weights: dict[str, float], **more: dict[str, float]) -> list[dict[str, Any]]:
    return [
        {"model": n, "parameters": {"weight": w} | {key: by[n] for key, by in more.items()}}
        for n, w in weights.items()
    ]


def _linear(index: int, family: Family, random: np.random.Generator) -> Made:
    names = _pick(random, 2 + index % 3)
    weights = dict(zip(names, _shares(random, len(names)), strict=True))
    base = "base" if index % 2 else None
    return "linear", (_recipe("linear", _entries(weights), family),), weights, base, {}


def _slerp(index: int, family: Family, random: np.random.Generator) -> Made:
    a, b = _pick(random, 2)
    t = round(float(random.uniform(0.15, 0.85)), 2)
    recipe = _recipe("slerp", [{"model": a}, {"model": b}], family, base_model=a)
    recipe["parameters"] = {"t": t}
    return "slerp", (recipe,), {a: 1 - t, b: t}, "base" if index % 3 == 0 else None, {}


def _gradient(index: int, family: Family, random: np.random.Generator) -> Made:
    method, (recipe,), weights, base, _ = _slerp(index, family, random)
    up = [round(float(v), 2) for v in random.uniform(0, 1, (3, 5, 2)[index % 3])]
    rest = round(float(random.uniform(0.2, 0.8)), 2)
    recipe["parameters"]["t"] = [
        {"filter": "self_attn", "value": up},
        {"filter": "mlp", "value": up[::-1]},
        {"value": rest},
    ]
    return method, (recipe,), weights, base, {}


def _arithmetic(index: int, family: Family, random: np.random.Generator) -> Made:
    names = _pick(random, 1 + index % 4)
    weights = {n: round(float(random.uniform(0.2, 0.9)), 2) for n in names}
    if index % 5 == 4:
        weights[names[0]] = -weights[names[0]]
    scale = (1.0, 0.7)[index % 2]
    recipe = _recipe("task_arithmetic", _entries(weights), family, base_model="base")
    recipe["parameters"] = {"lambda": scale}
    return "task_arithmetic", (recipe,), {n: w * scale for n, w in weights.items()}, "base", {}


def _masked(method: str, index: int, family: Family, random: np.random.Generator) -> Made:
    names = _pick(random, 2 + index % 2 if index % 7 else 1 + 2 * (method == "ties"))
    weights = {n: round(float(random.uniform(0.25, 0.9)), 2) for n in names}
    low = 0.8 if method == "breadcrumbs" and index % 2 else 0.2
    densities = {n: round(float(random.uniform(low, 0.95)), 2) for n in names}
    more: dict[str, dict[str, float]] = {"density": densities}
    shared: dict[str, Any] = {}
    if method == "breadcrumbs":
        densities = {n: min(d, 0.9) for n, d in densities.items()}
        more = {"density": densities, "gamma": dict.fromkeys(names, (0.01, 0.05)[index % 2])}
    if method == "ties":
        shared["normalize"] = bool(index % 3)
    if method == "ties" and shared["normalize"]:
        total = sum(weights.values())
        recipe = _recipe(method, _entries(weights, **more), family, base_model="base")
        weights = {n: w / total for n, w in weights.items()}
    else:
        recipe = _recipe(method, _entries(weights, **more), family, base_model="base")
    if shared:
        recipe["parameters"] = shared
    return method, (recipe,), weights, "base", densities


def _stack(index: int, family: Family, random: np.random.Generator) -> Made:
    a, b = _pick(random, 2)
    n = family.layers
    cut = int(random.integers(1, n))
    again = int(random.integers(0, cut + 1))
    pieces = [(a, 0, cut), (b, again, n)]
    slices = [{"sources": [{"model": m, "layer_range": [i, j]}]} for m, i, j in pieces]
    recipe = {"merge_method": "passthrough", "dtype": family.dtype, "slices": slices}
    total = sum(j - i for _, i, j in pieces)
    weights = {m: (j - i) / total for m, i, j in pieces}
    return "passthrough", (recipe,), weights, None, {}


def _twice(index: int, family: Family, random: np.random.Generator) -> Made:
    """A merge with a merge, which is a candidate (even numbers) or not."""
    a, b, c = _pick(random, 3)
    inner, outer = _shares(random, 2), _shares(random, 2)
    first = _recipe("linear", _entries(dict(zip((a, b), inner, strict=True))), family)
    second = _recipe("linear", _entries(dict(zip(("M", c), outer, strict=True))), family)
    weights = {"M": outer[0], c: outer[1]}
    if index % 2:
        weights = {a: outer[0] * inner[0], b: outer[0] * inner[1], c: outer[1]}
    return "linear", (first, second), weights, (None, "base")[index % 4 // 2], {}


def _mixture(index: int, family: Family, random: np.random.Generator) -> Made:
    names = _pick(random, 2 + index % 3)
    weights = dict.fromkeys(names, 1 / len(names))
    return "moe", ({"merge_method": "moe", "models": names},), weights, "base", {}


def _with(method: str) -> Any:
    return lambda index, family, random: _masked(method, index, family, random)


MAKERS: dict[str, Any] = {
    "linear": _linear,
    "slerp": _slerp,
    "slerp, gradient": _gradient,
    "task_arithmetic": _arithmetic,
    **{name: _with(name) for name in ("ties", "dare_linear", "dare_ties", "breadcrumbs")},
    "passthrough": _stack,
    "merge of merges": _twice,
    "moe": _mixture,
}
