"""The recipes of parity_random.py: one per method, and random ones with gradients and filters."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mergelab.methods import METHODS

FILTERS = ("self_attn", "mlp", "norm", "embed", "layers.1", "q_proj", "bias", "*")
SHARE, WIDE = (0.1, 0.9), (0.2, 1.4)
FLAG = (False, True)
ENDING: dict[str, tuple[Any, ...]] = {"normalize": FLAG, "lambda": WIDE}
AGAINST = {"weight": (-0.4, 0.9)}
TRIMMED = {**AGAINST, "density": SHARE}
WINDOW = {**TRIMMED, "gamma": (0.0, 0.1)}


@dataclass(frozen=True)
class Kind:
    """What the peer's method takes: ranges (numbers) or choices (flags) of its parameters.

    base: `needed`, `optional` or `none`; experts: the most there may be, or that there must be."""

    each: dict[str, tuple[float, float]] = field(default_factory=dict)
    shared: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    base: str = "needed"
    experts: int = 3


PEER = {
    "linear": Kind({"weight": SHARE}, {"normalize": FLAG}, "none"),
    "slerp": Kind({}, {"t": SHARE}, experts=1),
    "nuslerp": Kind({"weight": SHARE}, {"nuslerp_flatten": FLAG, "nuslerp_row_wise": FLAG},
                    "optional", 2),
    "multislerp": Kind({"weight": SHARE}, {"normalize_weights": FLAG}, "optional"),
    "karcher": Kind({}, {}, "none"),
    "task_arithmetic": Kind(AGAINST, ENDING),
    "ties": Kind(TRIMMED, ENDING),
    "dare_linear": Kind(AGAINST, ENDING),
    "dare_ties": Kind(AGAINST, ENDING),
    "breadcrumbs": Kind(WINDOW, ENDING),
    "breadcrumbs_ties": Kind(WINDOW, ENDING),
    "della": Kind(AGAINST, ENDING),
    "della_linear": Kind(AGAINST, ENDING),
    "sce": Kind({}, {"select_topk": SHARE}),
    "ram": Kind({}, {"epsilon": (1e-5, 1e-3)}),
    "ramplus_tl": Kind({}, {"epsilon": (1e-5, 1e-3), "r": SHARE, "alpha": SHARE}),
    "model_stock": Kind({}, {"filter_wise": FLAG}),
    "nearswap": Kind({}, {"t": (1e-4, 1e-2)}, experts=1),
    "arcee_fusion": Kind(experts=1),
    "passthrough": Kind({"scale": WIDE}, {}, "none", 1),
}  # fmt: skip
OURS = {"model_stock": {"clamp": False}}  # what makes ours the peer's, where defaults differ
MASKS = {
    "dare_linear": {},
    "dare_ties": {},
    "della": {"epsilon": 0.1},
    "della_linear": {"epsilon": 0.1},
}


@dataclass(frozen=True)
class Case:
    """One recipe over the models of a family; `drawn` at random or fixed."""

    number: int
    name: str
    method: str
    family: str
    data: dict[str, Any]
    drawn: bool = False

    def recipe(self, folder: Path) -> dict[str, Any]:
        """The recipe, its models in `folder`."""
        return dict(_placed(self.data, folder))


def _placed(data: Any, folder: Path) -> Any:
    """A copy of the recipe with paths for names of models."""
    if isinstance(data, list):
        return [_placed(entry, folder) for entry in data]
    if not isinstance(data, dict):
        return data
    named = ("model", "base_model")
    return {k: str(folder / v) if k in named else _placed(v, folder) for k, v in data.items()}


def whole(
    method: str, based: bool, each: list[dict[str, Any]], shared: dict[str, Any]
) -> dict[str, Any]:
    """A `models` recipe over as many experts as `each` has."""
    models = [
        {"model": m, "parameters": own} if own else {"model": m}
        for m, own in zip("abc", each, strict=False)
    ]
    base = {"base_model": "base"} if based else {}
    return {"merge_method": method, **base, "parameters": shared, "models": models}


def sliced(data: dict[str, Any], spans: list[tuple[int, int]]) -> dict[str, Any]:
    """The same over slices [first, end) of layers, the base listed in each.

    As many layers as before: else the peer cannot write a Qwen2 config with transformers 5.23."""
    models = [*data["models"], *([{"model": "base"}] if "base_model" in data else [])]
    slices = [
        {"sources": [{**entry, "layer_range": list(span)} for entry in models]} for span in spans
    ]
    return {k: v for k, v in data.items() if k != "models"} | {"slices": slices}


def fixed_cases() -> list[Case]:
    """One recipe per method of the table METHODS, or two: with a base and without, flag off and on.

    Raises SystemExit for a method that has no row in PEER."""
    missing = METHODS.keys() - PEER.keys()
    if missing:
        raise SystemExit(f"parity_random_recipes.py: add rows to PEER for {sorted(missing)}")
    cases: list[Case] = []
    for method in METHODS:
        kind = PEER[method]
        for k, family in enumerate(("drifted", "fine-tuned")):
            each = [
                {
                    n: round(low + (high - low) * (m + 1) / 4, 4)
                    for n, (low, high) in kind.each.items()
                }
                for m in range(kind.experts)
            ]
            shared = {
                name: (v[k] if v == FLAG else v[0] + (v[1] - v[0]) * (k + 1) / 3)
                for name, v in kind.shared.items()
            }
            based = kind.base == "needed" or (kind.base == "optional" and k == 1)
            data = whole(method, based, each, {**shared, **OURS.get(method, {})})
            cases.append(Case(len(cases), method, method, family, data))
    return cases


def random_cases(count: int) -> list[Case]:
    """Recipes drawn with seeds 0 to count - 1; each method of METHODS comes before any twice."""
    methods = [m for m in METHODS if m != "arcee_fusion"]
    order = np.random.default_rng(0).permutation(len(methods))
    cases = []
    for seed in range(count):
        rng = np.random.default_rng([seed, 1])
        method = methods[order[seed % len(methods)]]
        kind = PEER[method]
        most = kind.experts
        least = 2 if method in ("model_stock", "nuslerp", "multislerp", "karcher") else 1
        experts = int(rng.integers(least, most + 1))
        each = [
            {n: _spread(rng, *limits) for n, limits in kind.each.items()} for _ in range(experts)
        ]
        shared = {
            n: bool(rng.integers(2)) if v == FLAG else _spread(rng, *v)
            for n, v in kind.shared.items()
        }
        based = kind.base == "needed" or (kind.base == "optional" and bool(rng.integers(2)))
        data = whole(method, based, each, {**shared, **OURS.get(method, {})})
        if rng.random() < 0.4:
            data = sliced(data, [(0, 2), (1, 2)] if rng.random() < 0.5 else [(2, 3), (0, 2)])
        family = ("fine-tuned", "drifted", "unrelated")[rng.integers(3)]
        cases.append(Case(1000 + seed, f"random {seed}: {method}", method, family, data, True))
    return cases


def _spread(rng: np.random.Generator, low: float, high: float) -> Any:
    """A number, a gradient of 2 to 5 numbers, or one or two filters and a rest of either."""

    def number() -> float:
        return round(float(rng.uniform(low, high)), 6)

    def plain() -> Any:
        return [number() for _ in range(rng.integers(2, 6))] if rng.random() < 0.5 else number()

    if rng.random() < 0.4:
        return plain()
    names = rng.choice(FILTERS, int(rng.integers(1, 3)), replace=False)
    return [*({"filter": str(name), "value": plain()} for name in names), {"value": plain()}]


def sparse_cases() -> list[Case]:
    """One expert with weight 1 and density 0.3, for each method with random masks."""
    return [
        Case(2000 + k, f"{method}, density 0.3", method, "drifted",
             whole(method, True, [{"weight": 1.0, "density": 0.3, **own}], {"normalize": False}))
        for k, (method, own) in enumerate(MASKS.items()) if method in METHODS
    ]  # fmt: skip
