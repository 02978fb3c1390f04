"""The merges that remerge.py checks, and what is done to them: recipes over base, a, b, c, other.

A recipe is a dict as YAML gives it; names of models stand for folders beside each other."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from parity_models import Array, Size, bf16, config, shapes, values, write_model, write_models

from mergelab.checkpoint import open_checkpoint

Recipe = dict[str, Any]
OTHER = 7  # the number of a model that no recipe names


@dataclass(frozen=True)
class Case:
    """A recipe, and whether its masks are random."""

    name: str
    recipe: Recipe
    random: bool = False


def whole(method: str, models: dict[str, Recipe], base: bool = True, **shared: Any) -> Recipe:
    """A `models` recipe."""
    listed = [
        {"model": name, **({"parameters": own} if own else {})} for name, own in models.items()
    ]
    recipe = {"merge_method": method, "models": listed, "parameters": shared}
    return recipe | ({"base_model": "base"} if base else {})


def each(weights: tuple[float, ...], **own: Any) -> dict[str, Recipe]:
    """Weights and common parameters of a, b, c."""
    return {name: {"weight": w, **own} for name, w in zip("abc", weights, strict=False)}


def cases() -> list[Case]:
    """Eleven recipes without chance, and four with random masks."""
    graded = each((0.5, 0.3, 0.2))
    graded["a"] = {"weight": [{"filter": "mlp", "value": [0.1, 0.9]}, {"value": 0.4}]}
    slices = [
        {"sources": [{"model": name, "layer_range": span}]}
        for name, span in (("a", [0, 2]), ("b", [1, 3]))
    ]
    t = [{"filter": "self_attn", "value": [0.1, 0.6, 0.9]}, {"value": 0.4}]
    trio = {"a": {}, "b": {}, "c": {}}
    loose = (0.7, 0.6, 0.9)
    return [
        Case("linear", whole("linear", graded, base=False)),
        Case("linear, sum 2.2", whole("linear", each(loose), base=False, normalize=False)),
        Case("slerp", whole("slerp", {"base": {}, "a": {}}, t=t)),
        Case("nuslerp", whole("nuslerp", each((0.6, 0.3)), base=False)),
        Case("task_arithmetic", whole("task_arithmetic", each((0.5, 0.3, 0.2)), **{"lambda": 0.9})),
        Case("ties", whole("ties", each(loose, density=0.5))),
        Case("breadcrumbs", whole("breadcrumbs", each(loose, density=0.6, gamma=0.02))),
        Case("breadcrumbs_ties", whole("breadcrumbs_ties", each(loose, density=0.6, gamma=0.02))),
        Case("model_stock", whole("model_stock", trio)),
        Case("sce", whole("sce", trio, select_topk=0.6)),
        Case("passthrough", {"merge_method": "passthrough", "slices": slices}),
        Case("dare_linear", whole("dare_linear", each(loose, density=0.6)), random=True),
        Case("dare_ties", whole("dare_ties", each(loose, density=0.4)), random=True),
        Case("della", whole("della", each(loose, density=0.6, epsilon=0.1)), random=True),
        Case("della_linear", whole("della_linear", each(loose, density=0.6, epsilon=0.1)),
             random=True),
    ]  # fmt: skip


def placed(recipe: Any, folder: Path) -> Any:
    """The recipe with paths for names of models."""
    if isinstance(recipe, list):
        return [placed(entry, folder) for entry in recipe]
    if not isinstance(recipe, dict):
        return recipe
    named = ("model", "base_model")
    return {k: str(folder / v) if k in named else placed(v, folder) for k, v in recipe.items()}


# --- other recipes: made by the peer, published under the first one's name ------------------------


def other_weight(recipe: Recipe) -> Recipe | None:
    """The last model's weight, or slerp's t, .02 larger; None without either."""
    changed = copy.deepcopy(recipe)
    if recipe["merge_method"] == "slerp":
        changed["parameters"]["t"][-1]["value"] += 0.02
        changed["parameters"]["t"][0]["value"] = [0.12, 0.62, 0.92]
        return changed
    for model in reversed(changed.get("models", ())):
        if "weight" in model.get("parameters", {}):
            model["parameters"]["weight"] = round(model["parameters"]["weight"] + 0.02, 4)
            return changed
    return None


def other_density(recipe: Recipe) -> Recipe | None:
    """Every density (or SCE's share) .05 larger; None without."""
    changed = copy.deepcopy(recipe)
    if "select_topk" in changed.get("parameters", {}):
        changed["parameters"]["select_topk"] += 0.05
        return changed
    found = False
    for model in changed.get("models", ()):
        if "density" in model.get("parameters", {}):
            model["parameters"]["density"] = round(model["parameters"]["density"] + 0.05, 4)
            found = True
    return changed if found else None


def other_parent(recipe: Recipe) -> Recipe:
    """The last model that is not the base is another one."""
    changed = copy.deepcopy(recipe)
    if "slices" in changed:
        changed["slices"][-1]["sources"][0]["model"] = "other"
    else:
        changed["models"][-1]["model"] = "other"
    return changed


REMADE: dict[str, Callable[[Recipe], Recipe | None]] = {
    "weight +0.02": other_weight,
    "density +0.05": other_density,
    "another parent": other_parent,
}

# --- other weights: the published file is changed -------------------------------------------------


def swapped_layers(tensors: dict[str, Array], rng: np.random.Generator) -> None:
    """Layers 0 and 1 change places."""
    for name in [name for name in tensors if ".layers.0." in name]:
        other = name.replace(".layers.0.", ".layers.1.")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def ulp_noise(tensors: dict[str, Array], rng: np.random.Generator) -> None:
    """One bfloat16 ulp up or down in 1 % of the entries."""
    for name, bits in tensors.items():
        at = rng.random(bits.shape) < 0.01
        step = np.where(rng.random(bits.shape) < 0.5, 1, -1)
        unit = 1 if bits.dtype.itemsize == 2 else 1 << 16
        tensors[name] = np.where(at, bits.astype(np.int64) + step * unit, bits).astype(bits.dtype)


def one_noisy_tensor(tensors: dict[str, Array], rng: np.random.Generator) -> None:
    """The same in one matrix only."""
    name = next(name for name in tensors if "layers.1.mlp.up" in name)
    one = {name: tensors[name]}
    ulp_noise(one, rng)
    tensors[name] = one[name]


def gaussian_noise(tensors: dict[str, Array], rng: np.random.Generator) -> None:
    """Noise of 1 % of each tensor's standard deviation."""
    for name, bits in tensors.items():
        narrow = bits.dtype.itemsize == 2
        wide = (bits.astype("<u4") << 16 if narrow else bits).view("<f4")
        noisy = (wide + 0.01 * wide.std() * rng.standard_normal(wide.shape)).astype("<f4")
        tensors[name] = bf16(noisy) if narrow else noisy.view("<u4")


EDITED: dict[str, Callable[[dict[str, Array], np.random.Generator], None]] = {
    "layers swapped": swapped_layers,
    "1 ulp on 1 %": ulp_noise,
    "that in one tensor": one_noisy_tensor,
    "gaussian noise": gaussian_noise,
}


def edited(folder: Path, out: Path, change: Callable[..., None]) -> None:
    """Copy a published model of bfloat16 or float32 tensors, changed as bits."""
    published = open_checkpoint(folder, folder.name)
    kinds = {tensor.dtype for tensor in published.tensors.values()}
    tensors = {
        name: np.array(t.bits()).view(f"<u{t.bits().itemsize}").reshape(t.shape)
        for name, t in published.tensors.items()
    }
    change(tensors, np.random.default_rng(0))
    out.mkdir()
    (out / "config.json").write_bytes((folder / "config.json").read_bytes())
    write(out / "model.safetensors", tensors, *kinds)


def write(path: Path, tensors: dict[str, Array], kind: str) -> None:
    """A safetensors file of tensors of one dtype, given as bits."""
    header, position = {}, 0
    for name, bits in tensors.items():
        span = [position, position + bits.nbytes]
        header[name] = {"dtype": kind, "shape": list(bits.shape), "data_offsets": span}
        position += bits.nbytes
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for bits in tensors.values():
            stream.write(bits.tobytes())


def write_inputs(folder: Path, family: str, size: Size) -> None:
    """base, a, b, c, and another fine-tune of the base that no recipe names."""
    write_models(folder, "llama", family, 1, size, (False,) * 4)
    tensors = {
        name: bf16(values(family, 1, OTHER, index, shape))
        for index, (name, shape) in enumerate(shapes("llama", size, head=False).items())
    }
    write_model(folder / "other", tensors, config("llama", size, tied=True))
