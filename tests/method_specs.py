"""One row per merge method: its oracle, and values of its parameters to try. And a merge to test.

Whatever is added to METHODS needs a row here; test_laws.py then holds it to the laws of all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import yaml
from checkpoints import read_model, write_model
from oracles import Array

from mergelab import engine
from mergelab.plan import make_plan
from mergelab.recipe import load_recipe

Values = Mapping[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Given:
    """One tensor of a merge: base (*s) or None, N models (*s), parameters, names for the masks."""

    tensor: str
    base: Array
    models: Sequence[Array]
    shared: Mapping[str, Any]
    experts: Sequence[Mapping[str, Any]]
    labels: Sequence[str]
    based: bool = True
    seed: int = 0
    whole: tuple[Array, Array] | None = None

    def __getitem__(self, name: str) -> Any:
        return self.shared[name]

    def each(self, name: str) -> list[Any]:
        """A per-model parameter."""
        return [values[name] for values in self.experts]

    def masks(self, chances: Sequence[Array | float]) -> list[Array]:
        """Which entries each model keeps: those whose random word is below chance * 2^32."""
        size = self.models[0].size
        words = [oracles.random_words(self.seed, m, self.tensor, size) for m in self.labels]
        pairs = zip(words, chances, strict=True)
        shape = self.models[0].shape
        return [w.reshape(shape) < np.floor(np.asarray(c) * 2.0**32) for w, c in pairs]


@dataclass(frozen=True)
class Spec:
    """How to test a method.

    shared, each: parameters and values to try; the laws take the first, and model m takes values
    m places further on. experts: how many to try. based: with base_model, without, or both.
    scales: scaling all task vectors scales the merged one.
    steps: what test_laws.py makes task vectors of, times +-1 and a unit."""

    oracle: Callable[[Given], Array]
    shared: Values = field(default_factory=dict)
    each: Values = field(default_factory=dict)
    experts: tuple[int, ...] = (3, 1, 2, 4)
    based: tuple[bool, ...] = (True,)
    scales: bool = False
    steps: Sequence[int] = (0, 0, 0, 1, 2, 3, 5, 8, 13, 40, 60)


def _task_vectors(g: Given) -> tuple[Any, ...]:
    return g.base, g.models, g.each("weight")


def _ending(g: Given) -> dict[str, Any]:
    return {"normalize": g["normalize"], "lam": g["lambda"]}


def _ties(g: Given) -> Array:
    return oracles.ties(
        *_task_vectors(g), g.each("density"), g["flavour"], g["rescale"], **_ending(g)
    )


def _breadcrumbs(consensus: bool) -> Callable[[Given], Array]:
    def oracle(g: Given) -> Array:
        window = g.each("density"), g.each("gamma"), g["granularity"], g["rescale"]
        return oracles.breadcrumbs(*_task_vectors(g), *window, consensus, **_ending(g))

    return oracle


def _dare(consensus: bool) -> Callable[[Given], Array]:
    def oracle(g: Given) -> Array:
        density = g.each("density")
        rescale = {True: "l1", False: "none"}.get(g["rescale"], g["rescale"])
        masks = g.masks(density)
        return oracles.dare(*_task_vectors(g), density, masks, rescale, consensus, **_ending(g))

    return oracle


def _della(consensus: bool) -> Callable[[Given], Array]:
    def oracle(g: Given) -> Array:
        density, epsilon = g.each("density"), g.each("epsilon")
        triples = zip(g.models, density, epsilon, strict=True)
        masks = g.masks([oracles.della_chances(x - g.base, k, e) for x, k, e in triples])
        rescale = {True: "l1", False: "none"}.get(g["rescale"], g["rescale"])
        drop = density, epsilon, masks, rescale
        return oracles.della(*_task_vectors(g), *drop, consensus, **_ending(g))

    return oracle


def _nuslerp(g: Given) -> Array:
    along = g["nuslerp_flatten"], g["nuslerp_row_wise"]
    return oracles.nuslerp(*g.models, g.each("weight"), g.base if g.based else None, *along)


def _multislerp(g: Given) -> Array:
    base = g.base if g.based else None
    return oracles.multislerp(g.models, g.each("weight"), base, g["normalize_weights"], g["eps"])


FLAGS = (False, True)
ENDING = {"normalize": FLAGS, "lambda": (1.0, 0.5, -2.0), "int8_mask": FLAGS}
SIGNED = {"weight": (1.0, 0.5, -0.5, 0.75)}
POSITIVE = {"weight": (1.0, 0.5, 0.25, 2.0)}
DENSITY = {"density": (0.5, 0.3, 0.9, 1.0, 0.0)}
INNER = {"density": (0.5, 0.375, 0.625, 1.0), "epsilon": (0.25, 0.125)}
BREADCRUMBS = {**SIGNED, **DENSITY, "gamma": (0.1, 0.0, 0.25)}
GRANULARITY = {"granularity": ("tensor", "row"), "rescale": FLAGS}
DARE = {**ENDING, "rescale": ("l1", "density", "none", True, False)}
DELLA = {**ENDING, "rescale": ("l1", "probability", "none", True, False)}
FLAVOUR = {
    "flavour": ("mergekit", "paper", "peft"),
    "scope": ("tensor", "model"),
    "rescale": FLAGS,
}

SPECS: dict[str, Spec] = {
    "linear": Spec(
        lambda g: oracles.linear(g.models, g.each("weight"), g["normalize"]),
        {"normalize": (True, False)},
        {"weight": (1.0, 0.5, -0.25, 0.75)}, based=(False,),
    ),
    "slerp": Spec(
        lambda g: oracles.slerp(g.base, g.models[0], g["t"], g.whole),
        {"t": (0.5, 0.25, 0.0, 1.0), "scope": ("tensor", "model")}, experts=(1,),
    ),
    "nuslerp": Spec(
        _nuslerp, {"nuslerp_flatten": (True, False), "nuslerp_row_wise": FLAGS}, POSITIVE,
        experts=(2,), based=(True, False), scales=True,
        steps=range(1, 60),  # rows that are opposite have no middle
    ),
    "multislerp": Spec(
        _multislerp, {"normalize_weights": (True, False), "eps": (1e-8,)}, POSITIVE,
        based=(True, False), experts=(3, 2), scales=True,
    ),
    "karcher": Spec(
        lambda g: oracles.karcher(g.models, g.each("weight"), g["max_iter"], g["tol"]),
        {"max_iter": (10, 1, 100), "tol": (1e-5, 1e-9)}, POSITIVE, based=(False,),
    ),
    "task_arithmetic": Spec(
        lambda g: oracles.task_arithmetic(*_task_vectors(g), **_ending(g)),
        {**ENDING, "rescale": FLAGS}, {**SIGNED, **DENSITY}, scales=True,  # two have no effect
    ),
    "ties": Spec(_ties, {**ENDING, **FLAVOUR}, {**SIGNED, **DENSITY}, scales=True),
    "dare_linear": Spec(_dare(False), DARE, {**SIGNED, **DENSITY}, scales=True),
    "dare_ties": Spec(_dare(True), DARE, {**SIGNED, **DENSITY}, scales=True),
    "breadcrumbs": Spec(_breadcrumbs(False), {**ENDING, **GRANULARITY}, BREADCRUMBS, scales=True),
    "breadcrumbs_ties": Spec(
        _breadcrumbs(True), {**ENDING, **GRANULARITY}, BREADCRUMBS, scales=True
    ),
    "della": Spec(_della(True), DELLA, {**SIGNED, **INNER}, scales=True),
    "della_linear": Spec(_della(False), DELLA, {**SIGNED, **INNER}, scales=True),
    "sce": Spec(  # with 1, 2 or 4 models the variance of small integers is exact
        lambda g: oracles.sce(g.base, g.models, g["select_topk"], g["select"]),
        {"select_topk": (1.0, 0.5, 0.1, 0.0), "select": ("deltas", "weights"), "int8_mask": FLAGS},
        experts=(4, 1, 2), scales=True,
    ),
    "ram": Spec(lambda g: oracles.ram(g.base, g.models, g["epsilon"]), {"epsilon": (1e-5, 0.1)}),
    "ramplus_tl": Spec(
        lambda g: oracles.ram(g.base, g.models, g["epsilon"], g["r"], g["alpha"]),
        {"epsilon": (1e-5, 0.1), "r": (0.1, 0.5), "alpha": (0.2, 1.0)},
    ),
    "model_stock": Spec(
        lambda g: oracles.model_stock(
            g.base, g.models, g["clamp"], g["average"], g["filter_wise"]
        ),
        {"clamp": (True, False), "average": ("cosine", "angle"), "filter_wise": FLAGS},
        experts=(3, 2, 4), scales=True,
    ),
    "nearswap": Spec(
        lambda g: oracles.nearswap(g.base, g.models[0], g["t"]), {"t": (0.25, 0.01)}, experts=(1,)
    ),
    "arcee_fusion": Spec(
        lambda g: oracles.arcee_fusion(g.base, g.models[0]), experts=(1,),
        steps=(0, 3, 9, 10, 44, 49, 54, 57),  # no x of them is m + 1.5 (c - a): none at the limit
    ),
    "passthrough": Spec(
        lambda g: oracles.passthrough(g.models[0], g.each("scale")[0]),
        {}, {"scale": (1.0, 0.5, -2.0)}, experts=(1,), based=(False,),
    ),
}  # fmt: skip


def parameters(spec: Spec, count: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The first value of each shared parameter, and for model m the m-th of each of its own."""
    shared = {name: values[0] for name, values in spec.shared.items()}
    return shared, [
        {name: values[m % len(values)] for name, values in spec.each.items()} for m in range(count)
    ]


def recipe(
    method: str,
    experts: Mapping[str, Mapping[str, Any]],
    shared: Mapping[str, Any],
    base: str | None = "base",
    dtype: str | None = None,
) -> dict[str, Any]:
    """A `models` recipe as data."""
    models = [{"model": name, "parameters": dict(own)} for name, own in experts.items()]
    found: dict[str, Any] = {"merge_method": method, "parameters": dict(shared), "models": models}
    found |= {"base_model": base} if base else {}
    return found | ({"dtype": dtype} if dtype else {})


def run(place: Path, recipe: Mapping[str, Any], folders: Mapping[str, Path], **how: int) -> Path:
    """Merge model folders through the real planner and engine; the output folder."""
    place.mkdir(exist_ok=True)
    (place / "recipe.yaml").write_text(yaml.safe_dump(dict(recipe), sort_keys=False))
    shard_size = how.pop("shard_size", 10**9)
    loaded = load_recipe(place / "recipe.yaml")
    plan = make_plan(loaded, {m: folders[m] for m in loaded.models}, shard_size=shard_size)
    engine.merge(plan, place / "out", **how)
    return place / "out"


def merge(
    place: Path,
    recipe: Mapping[str, Any],
    models: Mapping[str, Mapping[str, Array]],
    dtype: str | Mapping[str, str] = "F32",
    **how: int,
) -> dict[str, Array]:
    """Write models of named tensors, merge them; the merged tensors, in their shapes."""
    place.mkdir(exist_ok=True)
    dtypes = dict.fromkeys(models, dtype) if isinstance(dtype, str) else dtype
    folders = {
        name: write_model(place / name, dict(tensors), dtypes[name], layers=0)
        for name, tensors in models.items()
    }
    shapes = {name: x.shape for tensors in models.values() for name, x in tensors.items()}
    merged = read_model(run(place, recipe, folders, **how))
    return {name: values.reshape(shapes[name]) for name, values in merged.items()}
