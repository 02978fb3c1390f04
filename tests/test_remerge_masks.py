"""Other random masks, entry by entry: what no mask can give is told, what one can is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from checkpoints import write_model
from remerge_oracle import EACH, ties
from safetensors.torch import load_file, save_file
from test_remerge import check, coarse_models, loaded, merged, publish, recipe, tensors

from mergelab.forensics.peer_mask_subsets import explain, try_subsets

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
WEIGHTS = {"a": 0.7, "b": 0.6, "c": 0.9}


def written(folder: Path, dtype: str, names: str = "abc") -> Path:
    """A base and its fine-tunes."""
    for seed, name in enumerate(("base", *names)):
        write_model(folder / name, tensors(seed, 1), DTYPES[dtype], layers=1, vocab_size=96)
    return folder


def masked(
    place: Path,
    models: Path,
    method: str = "dare_linear",
    dtype: str = "bfloat16",
    weights: dict[str, float] = WEIGHTS,
    **shared: Any,
) -> Path:
    """A recipe with random masks."""
    listed = [
        {"model": str(models / name), "parameters": {"weight": weight, "density": 0.6}}
        for name, weight in weights.items()
    ]
    data = {"merge_method": method, "base_model": str(models / "base"), "models": listed}
    path = place / "recipe.yaml"
    path.write_text(yaml.safe_dump({**data, **shared, "dtype": dtype}))
    return path


def unknown(path: Path, out: Path) -> Path:
    """Merge with another seed, and leave out the record that tells it."""
    merged(path, out, seed=5)
    (out / "merge.json").unlink()
    return out


def altered(folder: Path, change: Any) -> None:
    """Change the tensors of a published model."""
    found = load_file(folder / "model.safetensors")
    save_file({name: change(x) for name, x in found.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("factor", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_what_is_measured_is_what_numpy_measures(factor: float, dtype: str, tmp_path: Path) -> None:
    path = masked(tmp_path, written(tmp_path / "models", dtype), dtype=dtype)
    expected = load_file(merged(path, tmp_path / "ours", seed=0) / "model.safetensors")
    out = unknown(path, tmp_path / "out")
    altered(out, lambda x: x * factor)
    published = load_file(out / "model.safetensors")
    result = check(path, out)
    assert result["verdict"] == ("other mask" if factor == 1 else "different"), result["why"]
    for tensor in result["tensors"]:
        e, p = (x[tensor["tensor"]].double().numpy().ravel() for x in (expected, published))
        off = np.linalg.norm(p - e) / np.linalg.norm(e)
        assert tensor["relative_error"] == pytest.approx(off, rel=1e-9)
        if factor:
            cosine = p @ e / np.linalg.norm(p) / np.linalg.norm(e)
            assert tensor["cosine"] == pytest.approx(cosine, rel=1e-9)
        else:
            assert tensor["cosine"] is None


def entries(kind: str, rounding: float, spread: float, share: float) -> tuple[Any, ...]:
    """One expert, kept everywhere; published entries are off by a share of their room."""
    rng, size = np.random.default_rng(5), 4096
    base = (spread * rng.random(size)).astype(kind)
    tau = (0.2 * rng.standard_normal((1, size))).astype(kind)
    factors, plan = np.array([[2.0], [1.0], [0.0]]), np.array([0, 0, 1, 1, rounding, 1, 1.0])
    exact, part = base + 2 * tau[0].astype(float), 2 * np.abs(tau[0].astype(float))
    off = share * rounding * (part + base + np.abs(exact)) / (1 - share * rounding)
    published = (exact + np.where(exact < 0, -1, 1) * off).astype(kind)
    return base, tau, published, factors, plan


def explained(
    base: Any, tau: Any, published: Any, factors: Any, plan: Any, quick: str
) -> tuple[Any, Any]:
    """Which entries are explained at once, and which one by one."""
    scratch, parts = np.empty((5, base.size), quick), np.empty((2, base.size), quick)
    done = np.empty(base.size, np.uint8)
    try_subsets(base, tau, published, factors, plan, base.size, scratch, parts, done)
    each = zip(base, tau.T.copy(), published, strict=True)
    return done != 0, np.array([explain(b, t, p, factors, plan) for b, t, p in each])


@pytest.mark.parametrize("beyond", [1.005, 1.01, 1.02, 1.03, 1.05])
@pytest.mark.parametrize(
    ("kind", "quick", "rounding"),
    [("<f4", "<f4", 2.0**-7), ("<f4", "<f8", 2.0**-21), ("<f8", "<f8", 2.0**-40)],
)
def test_an_entry_just_beyond_its_room_is_not_explained_at_once(
    beyond: float, kind: str, quick: str, rounding: float
) -> None:
    at_once, alone = explained(*entries(kind, rounding, 2.0**-20, beyond), quick)
    assert alone.mean() < 0.9  # what is published is itself rounded
    assert alone[at_once].all()


def test_an_entry_just_within_its_room_is_left_to_the_exact_way() -> None:
    at_once, alone = explained(*entries("<f8", 2.0**-21, 1.0, 1 - 2.0**-10), "<f8")
    assert alone.all()
    assert at_once.mean() < 0.01


def test_nearly_all_of_float64_is_explained_at_once() -> None:
    base, tau, published, factors, plan = entries("<f8", 2.0**-50, 1.0, 0.0)
    factors[2] = 0.01
    at_once, alone = explained(base, tau, published, factors, plan, "<f8")
    assert alone.all()
    assert at_once.mean() > 0.99


def test_weights_that_nearly_cancel_are_divided_by(tmp_path: Path) -> None:
    weights = {"a": 0.5, "b": -0.499, "c": 0.7}
    path = masked(
        tmp_path, written(tmp_path / "models", "bfloat16"), "dare_ties",
        weights=weights, parameters={"normalize": True},
    )  # fmt: skip
    out = unknown(path, tmp_path / "out")
    result = check(path, out)
    assert result["verdict"] == "other mask", result["why"]
    generator = torch.Generator().manual_seed(1)
    altered(out, lambda x: x + 0.002 * torch.randn(x.shape, generator=generator).to(x.dtype))
    assert check(path, out)["verdict"] == "different"


@pytest.mark.parametrize("names", ["abc", "abcdefg"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_mask_makes_an_entry_that_is_not_finite(
    value: float, names: str, tmp_path: Path
) -> None:
    models = written(tmp_path / "models", "bfloat16", names)
    path = masked(tmp_path, models, "dare_ties", weights=dict.fromkeys(names, 0.5))
    out = unknown(path, tmp_path / "out")
    assert check(path, out)["verdict"] == "other mask"

    def one(x: Any) -> Any:
        x[(0,) * x.ndim] = value
        return x

    altered(out, one)
    assert check(path, out)["verdict"] == "different"


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize(("model", "value"), [("a", "nan"), ("a", "inf"), ("base", "inf")])
def test_masks_of_sources_that_are_not_finite_are_no_difference(
    model: str, value: str, method: str, tmp_path: Path
) -> None:
    models = written(tmp_path / "models", "bfloat16")

    def some(x: Any) -> Any:
        if x.shape == (64, 40):
            x[3, 5:8] = float(value)
        return x

    altered(models / model, some)
    path = masked(tmp_path, models, method, allow_not_finite=True)
    out = unknown(path, tmp_path / "out")
    result = check(path, out)
    if result["verdict"] != "other mask":  # a tensor may be NaN throughout, with any mask
        assert result["verdict"] == "unverifiable"
        assert "infinite or no number" in result["why"]
    altered(out, lambda x: x.flip(0) if x.shape == (80, 40) else x)
    assert check(path, out)["verdict"] == "different"


def ties_of(names: str, tmp_path: Path, models: Path) -> Path:
    """A recipe of ties of the models of these names, of one letter each."""
    listed = [
        {"model": str(models / name), "parameters": {"weight": 0.3, **EACH["ties"]}}
        for name in names
    ]
    path = recipe(tmp_path, models, "ties")
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"models": listed}))
    return path


def test_a_choice_among_equals_of_many_experts_is_unverifiable(tmp_path: Path) -> None:
    models = coarse_models(tmp_path / "models")
    names = "abcdefg"
    for seed, name in enumerate(names[3:], 4):
        own = {n: np.round(x * 400) / 512 for n, x in tensors(seed).items()}
        write_model(models / name, own, "BF16", layers=3, vocab_size=96)
    path, every = ties_of(names, tmp_path, models), loaded(models, "bfloat16")
    found = {
        name: ties(x, [every[expert][name] for expert in names], [0.3] * 7)
        for name, x in every["base"].items()
    }
    result = check(path, publish(tmp_path / "p", found, models))
    assert result["verdict"] == "unverifiable", result["why"]
    assert "equal magnitude at a cut" in result["why"]
    found["model.norm.weight"] = found["model.norm.weight"].flip(0)
    assert check(path, publish(tmp_path / "q", found, models))["verdict"] == "different"


def test_no_choice_among_equals_excuses_other_numbers(tmp_path: Path) -> None:
    """Seven sparse fine-tunes: nearly every entry lies at a cut, at 0."""
    models, names = tmp_path / "models", "abcdefg"
    random = np.random.default_rng(0)
    base = {name: np.round(x * 100) / 512 for name, x in tensors(0).items()}
    write_model(models / "base", base, "BF16", layers=3, vocab_size=96)
    for expert in names:
        own = {
            n: x + (random.random(x.shape) > 0.95) * 0.05 * random.standard_normal(x.shape)
            for n, x in base.items()
        }
        write_model(models / expert, own, "BF16", layers=3, vocab_size=96)
    path, every = ties_of(names, tmp_path, models), loaded(models, "bfloat16")
    for number, forged in enumerate((lambda x: x * 1000, lambda x: x * float("nan"))):
        found = {
            name: forged(ties(x, [every[expert][name] for expert in names], [0.3] * 7))
            for name, x in every["base"].items()
        }
        result = check(path, publish(tmp_path / str(number), found, models))
        assert result["verdict"] == "different", result["why"]
