"""Re-merge checks: what a recipe gives is recognised, whoever merged it; altered, it never is."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from checkpoints import write_model
from remerge_oracle import (
    EACH,
    METHODS,
    SHARED,
    WEIGHTS,
    dare_linear,
    old_linear,
    sce,
    task_arithmetic,
    ties,
)
from rich.console import Console
from safetensors.torch import load_file, save_file

from mergelab import engine
from mergelab.checkpoint import open_checkpoint
from mergelab.forensics.peer_blends import fused
from mergelab.forensics.peer_cuts import BEYOND
from mergelab.forensics.peer_kernels import KINDS, snap
from mergelab.forensics.peer_mask_subsets import explain, try_subsets
from mergelab.forensics.peer_select import select
from mergelab.forensics.remerge import remerge, show
from mergelab.plan import make_plan
from mergelab.recipe import load_recipe

SAME = ("exact", "rounding only")
NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
LAYER = ("input_layernorm.weight", "self_attn.q_proj.weight", "mlp.up_proj.weight")
Tensors = dict[str, Any]


def tensors(seed: int, layers: int = 3) -> dict[str, np.ndarray]:
    """A model: fine-tunes (seed > 0) differ by 5 % from the base, and share some of it."""
    shapes = {"model.embed_tokens.weight": (96, 40), "model.norm.weight": (40,)}
    for i in range(layers):
        sizes = ((40,), (64, 40), (80, 40))
        shapes |= {f"model.layers.{i}.{n}": s for n, s in zip(LAYER, sizes, strict=True)}
    common, own = np.random.default_rng(0), np.random.default_rng(seed)
    tuned = np.random.default_rng(99)
    return {
        name: 0.1 * common.standard_normal(shape)
        + (seed > 0) * 0.005 * (own.standard_normal(shape) + tuned.standard_normal(shape))
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, its fine-tunes a, b, c, and another one, in bfloat16."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "a", "b", "c", "other")):
        write_model(folder / name, tensors(seed), "BF16", layers=3, vocab_size=96)
    return folder


def coarse_models(folder: Path) -> Path:
    """Base, a, b, c, whose task vectors take few values: many are equal at a cut."""
    for seed, name in enumerate(("base", "a", "b", "c")):
        own = {n: np.round(x * 400) / 512 for n, x in tensors(seed).items()}
        write_model(folder / name, own, "BF16", layers=3, vocab_size=96)
    return folder


def recipe(place: Path, models: Path, method: str, dtype: str = "bfloat16", **more: Any) -> Path:
    """Write the recipe of a method over a, b, c, its parameters those of the oracle."""
    count = {"slerp": 1, "passthrough": 1, "nuslerp": 2}.get(method, 3)
    weighted = method not in ("slerp", "model_stock", "sce", "passthrough", "ram")
    listed = []
    for name, weight in list(zip("abc", WEIGHTS, strict=True))[:count]:
        own: dict[str, Any] = {"weight": weight} if weighted else {}
        own |= {"scale": 0.7} if method == "passthrough" else EACH.get(method, {})
        listed.append({"model": str(models / name), "parameters": own})
    based = method not in ("linear", "nuslerp", "passthrough")
    data = {"merge_method": method, "models": listed, "parameters": SHARED.get(method, {})}
    data |= {"base_model": str(models / "base")} if based else {}
    place.mkdir(parents=True, exist_ok=True)
    path = place / f"{method}.yaml"
    path.write_text(yaml.safe_dump({**data, "dtype": dtype, **more}))
    return path


def loaded(models: Path, dtype: str) -> dict[str, Tensors]:
    """All models in a dtype."""
    return {
        path.name: {
            name: x.to(getattr(torch, dtype))
            for name, x in load_file(path / "model.safetensors").items()
        }
        for path in sorted(models.iterdir())
    }


def by_oracle(
    models: Path, function: Callable[..., Any], dtype: str, *, experts: str = "abc",
    weights: list[float] = WEIGHTS, last: str = "c",
) -> Tensors:  # fmt: skip
    """Every tensor as the oracle merges it; `last` stands in for c."""
    inputs = loaded(models, dtype)
    chosen = [inputs[last if name == "c" else name] for name in experts]
    return {
        name: function(inputs["base"][name], [x[name] for x in chosen], weights)
        for name in inputs["base"]
    }


def publish(folder: Path, found: Tensors, models: Path) -> Path:
    """A published model folder."""
    folder.mkdir(parents=True)
    save_file({name: x.contiguous() for name, x in found.items()}, folder / "model.safetensors")
    (folder / "config.json").write_bytes((models / "base" / "config.json").read_bytes())
    return folder


def check(path: Path, folder: Path, workers: int = 1) -> dict[str, Any]:
    """Re-merge a recipe whose models are named by their paths."""
    wanted = load_recipe(path)
    published = open_checkpoint(folder, folder.name)
    result = remerge(wanted, published, {m: Path(m) for m in wanted.models}, workers)
    json.dumps(result, allow_nan=False)
    return result


def merged(path: Path, out: Path, **how: Any) -> Path:
    """Merge with mergelab."""
    wanted = load_recipe(path)
    size = how.pop("shard_size", 10**9)
    plan = make_plan(wanted, {m: Path(m) for m in wanted.models}, shard_size=size)
    engine.merge(plan, out, **how)
    return out


# --- merges of our own ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*METHODS, "dare_ties", "della", "karcher", "ram"])
def test_a_merge_of_ours_is_exact_in_any_layout_for_any_number_of_workers(
    method: str, models: Path, tmp_path: Path
) -> None:
    path = recipe(tmp_path, models, method)
    out = merged(path, tmp_path / "out", shard_size=20_000)
    before = sorted(tmp_path.rglob("*"))
    one, two = check(path, out), check(path, out, workers=2)
    assert (one["verdict"], one["numerics"]) == ("exact", "mergelab"), one["why"]
    assert one == two
    assert all(t["equal"] and t["cosine"] == 1 for t in one["tensors"])
    assert sorted(tmp_path.rglob("*")) == before  # nothing was written


def test_statistics_of_the_whole_model_are_taken_again(models: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, models, "ties", parameters={"scope": "model"})
    assert check(path, merged(path, tmp_path / "out"))["verdict"] == "exact"


def test_a_vocabulary_put_together_is_re_merged(models: Path, tmp_path: Path) -> None:
    vocabulary = {f"u{i}": i for i in range(96)}
    for name in ("base", "a", "b", "c"):
        folder = tmp_path / name
        write_model(folder, tensors(ord(name[0])), "BF16", layers=3, vocab_size=96)
        own = {f"t{i}": i for i in range(90)} | {f"{name}{i}": 90 + i for i in range(6)}
        vocabulary = own if name == "b" else {f"t{i}": i for i in range(96)}
        text = {"model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "added_tokens": []}
        (folder / "tokenizer.json").write_text(json.dumps(text))
    path = recipe(tmp_path, tmp_path, "linear", tokenizer_source="union")
    result = check(path, merged(path, tmp_path / "out"))
    assert result["verdict"] == "exact", result
    assert max(t["elements"] for t in result["tensors"]) == 102 * 40


# --- merges of others -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(NAMES))
@pytest.mark.parametrize("method", list(METHODS))
def test_mergekits_arithmetic_is_recognised(
    method: str, dtype: str, models: Path, tmp_path: Path
) -> None:
    path = recipe(tmp_path, models, method, dtype)
    experts = {"slerp": "a", "passthrough": "a", "nuslerp": "ab"}.get(method, "abc")
    folder = publish(
        tmp_path / "p", by_oracle(models, METHODS[method], dtype, experts=experts), models
    )
    result = check(path, folder)
    assert result["verdict"] in SAME, result["why"]
    if method == "task_arithmetic" and dtype != "float32":
        assert (result["verdict"], result["numerics"]) == ("exact", f"mergekit 0.1.5, {dtype}")


def test_the_older_releases_average_is_told_by_its_name(models: Path, tmp_path: Path) -> None:
    folder = publish(tmp_path / "p", by_oracle(models, old_linear, "bfloat16"), models)
    result = check(recipe(tmp_path, models, "linear"), folder)
    assert (result["verdict"], result["numerics"]) == ("exact", "mergekit 0.1.4, bfloat16")


def test_another_choice_among_equal_magnitudes_is_no_difference(
    models: Path, tmp_path: Path
) -> None:
    path = recipe(tmp_path, models, "ties")
    found = by_oracle(models, ties, "bfloat16")
    result = check(path, publish(tmp_path / "p", found, models))
    assert result["verdict"] == "rounding only"
    assert "equal magnitude at a cut" in result["why"]
    assert max(t["share_chosen"] for t in result["tensors"]) > 0.005
    assert all(t["share_differing"] == t["relative_error"] == 0 for t in result["tensors"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_free_choice_does_not_hide_another_density(
    dtype: str, models: Path, tmp_path: Path
) -> None:
    """Three per cent more of each task vector, all of them among the equals at the cut."""
    coarse = coarse_models(tmp_path / "coarse")
    found = by_oracle(coarse, ties, dtype)
    path = recipe(tmp_path, coarse, "ties", dtype)
    assert check(path, publish(tmp_path / "p", found, models))["verdict"] == "rounding only"
    path.write_text(path.read_text().replace("density: 0.5", "density: 0.47"))
    result = check(path, publish(tmp_path / "q", found, models))
    assert result["verdict"] == "different"
    assert "entries are kept where it says" in result["why"]


def test_sce_counts_its_share_in_float32(models: Path, tmp_path: Path) -> None:
    """As mergekit does: a share just below a half is a half, and of large tensors (above 2^24
    entries) the count is rounded."""
    share = 0.5 - 1e-12
    assert int(2560 * share) < int(np.float32(2560) * np.float32(share))
    found = by_oracle(models, partial(sce, share=share), "bfloat16")
    path = recipe(tmp_path, models, "sce", parameters={"select_topk": share})
    result = check(path, publish(tmp_path / "p", found, models))
    assert result["verdict"] in SAME, result["why"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sce_selects_everything_unless_told_otherwise(
    dtype: str, models: Path, tmp_path: Path
) -> None:
    found = by_oracle(models, partial(sce, share=1.0), dtype)
    path = recipe(tmp_path, models, "sce", dtype, parameters={})
    result = check(path, publish(tmp_path / "p", found, models))
    assert (result["verdict"], result["numerics"]) == ("exact", f"mergekit 0.1.5, {dtype}")


def test_sce_chooses_among_variances_of_zero_where_its_count_is_rounded_up() -> None:
    """Of a tensor of more than 2^24 entries: one of those whose variance is 0 is selected."""
    deltas = np.array([[1, 2, 3], [1, 2, 5]], np.float32)
    keep, sure = np.array([[[least, BEYOND]] for least in (0, 1)], np.uint32)
    counts, free = np.zeros(1, np.int64), np.zeros(3, np.uint8)
    select(deltas, 3, KINDS["F32"], keep, sure, free, counts, np.empty(3, np.float32))
    assert (counts.tolist(), free.tolist()) == ([1], [1, 1, 0])


def test_an_average_is_rounded_once_at_each_step() -> None:
    """1 + x w with x w just above half an ulp: float64 would round it down to a tie."""
    tiny = 2.0**-11
    values = np.array([[1], [1 + tiny]], np.float32)
    weights, out = np.array([1, (1 - tiny + tiny**2) * 2.0**-24], np.float32), values[0].copy()
    fused(values, weights, np.float32(0), KINDS["F32"], out)
    assert out[0] == np.float32(1 + 2.0**-23)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_numbers_are_rounded_as_torch_rounds_them(dtype: str) -> None:
    """Every exponent, with digits around the rounding edges; overflow, subnormals, signs, NaN."""
    exponents = np.arange(0, 1 << 16, 1 << 7, dtype=np.uint32) << 16
    digits = np.random.default_rng(0).integers(0, 1 << 23, 2000, dtype=np.uint32)
    edges = (np.arange(64, dtype=np.uint32) << 12)[:, None] + np.array([0, 1, 0xFFF], np.uint32)
    bits = exponents[:, None] | np.concatenate([digits, edges.ravel()])
    values = np.append(bits.ravel(), np.array([0x7FFFFFFF, 0xFFFFFFFF], np.uint32)).view("<f4")
    rounded = torch.from_numpy(values).to(getattr(torch, dtype)).float().numpy()
    snap(values, values.size, KINDS[NAMES[dtype]])
    nan = np.isnan(rounded)
    assert np.array_equal(np.isnan(values), nan)
    assert np.array_equal(values.view(np.uint32)[~nan], rounded.view(np.uint32)[~nan])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_float32_arithmetic_in_another_order_is_rounding(
    dtype: str, models: Path, tmp_path: Path
) -> None:
    """The weighted average, summed backwards, divided first, rounded once."""
    inputs = loaded(models, "float32")
    total = sum(WEIGHTS)
    found = {
        name: sum(
            (w / total) * inputs[m][name] for m, w in reversed([*zip("abc", WEIGHTS, strict=True)])
        )
        for name in inputs["base"]
    }
    found = {name: x.to(getattr(torch, dtype)) for name, x in found.items()}
    result = check(
        recipe(tmp_path, models, "linear", dtype), publish(tmp_path / "p", found, models)
    )
    assert (result["verdict"], result["numerics"]) == ("rounding only", "mergelab")
    differing = sum(t["share_differing"] * t["elements"] for t in result["tensors"])
    share = differing / sum(t["elements"] for t in result["tensors"])
    assert 0 < share < (0.02 if dtype == "bfloat16" else 1)  # many are exact ties in bfloat16


def test_a_file_converted_to_another_dtype_is_compared_after_that(
    models: Path, tmp_path: Path
) -> None:
    path = recipe(tmp_path, models, "task_arithmetic")
    ours = load_file(merged(path, tmp_path / "out") / "model.safetensors")
    for dtype in ("float16", "float32"):
        found = {name: x.to(getattr(torch, dtype)) for name, x in ours.items()}
        result = check(path, publish(tmp_path / dtype, found, models))
        assert result["verdict"] == "rounding only"
        assert f"stored as {NAMES[dtype]} where the recipe says BF16" in result["why"]
    wide = recipe(tmp_path / "wide", models, "task_arithmetic", "float32")
    found = load_file(merged(wide, tmp_path / "w") / "model.safetensors")
    found = {name: x.bfloat16() for name, x in found.items()}
    assert check(wide, publish(tmp_path / "n", found, models))["verdict"] == "rounding only"


# --- altered --------------------------------------------------------------------------------------


def swapped(found: Tensors) -> None:
    for part in LAYER:
        a, b = f"model.layers.0.{part}", f"model.layers.1.{part}"
        found[a], found[b] = found[b], found[a]


def one_ulp(found: Tensors, share: float = 0.01) -> None:
    """One bfloat16 ulp up or down in a share of the entries."""
    torch.manual_seed(0)
    for name, x in found.items():
        step = torch.where(torch.rand(x.shape) < 0.5, 1, -1) * (torch.rand(x.shape) < share)
        kind, unit = (torch.int32, 1 << 16) if x.element_size() == 4 else (torch.int16, 1)
        found[name] = (x.view(kind) + (step * unit).to(kind)).view(x.dtype)


def one_ulp_in_one(found: Tensors) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    one = {name: found[name]}
    one_ulp(one)
    found |= one


def gaussian(found: Tensors) -> None:
    torch.manual_seed(0)
    for name, x in found.items():
        found[name] = (x + 0.001 * torch.randn(x.shape)).to(x.dtype)


EDITS = {f.__name__: f for f in (swapped, one_ulp, one_ulp_in_one, gaussian)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("method", list(METHODS))
def test_altered_weights_are_different(
    method: str, dtype: str, models: Path, tmp_path: Path
) -> None:
    path = recipe(tmp_path, models, method, dtype)
    experts = {"slerp": "a", "passthrough": "a", "nuslerp": "ab"}.get(method, "abc")
    honest = by_oracle(models, METHODS[method], dtype, experts=experts)
    for name, edit in EDITS.items():
        found = dict(honest)
        edit(found)
        result = check(path, publish(tmp_path / name, found, models))
        assert result["verdict"] == "different", (name, result["why"])
        wrong = [t["tensor"] for t in result["tensors"] if t["verdict"] == "different"]
        if name == "one_ulp_in_one":
            assert wrong == ["model.layers.2.mlp.up_proj.weight"]
        if name == "swapped":
            assert {t.split(".")[2] for t in wrong} == {"0", "1"}
            assert "what the recipe gives for layer" in result["why"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("method", ["linear", "nuslerp", "task_arithmetic", "ties", "breadcrumbs"])
def test_another_weight_is_different(method: str, dtype: str, models: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, models, method, dtype)
    experts = "ab" if method == "nuslerp" else "abc"
    weights = [0.5, 0.32, 0.4]
    found = by_oracle(models, METHODS[method], dtype, experts=experts, weights=weights)
    result = check(path, publish(tmp_path / "p", found, models))
    assert result["verdict"] == "different"
    if method == "task_arithmetic":
        assert "other weights: " in result["why"]
        assert f"{models}/b enters with 0.25" in result["why"]  # 0.32 x 0.8, not 0.3 x 0.8


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "model_stock", "sce"])
def test_another_parent_is_different(method: str, models: Path, tmp_path: Path) -> None:
    found = by_oracle(models, METHODS[method], "bfloat16", last="other")
    result = check(recipe(tmp_path, models, method), publish(tmp_path / "p", found, models))
    assert result["verdict"] == "different"
    assert "not explained by the recipe's models" in result["why"]


def test_a_tensor_that_was_never_merged_is_named(models: Path, tmp_path: Path) -> None:
    found = by_oracle(models, task_arithmetic, "bfloat16")
    found["model.layers.1.mlp.up_proj.weight"] = loaded(models, "bfloat16")["b"][
        "model.layers.1.mlp.up_proj.weight"
    ]
    path = recipe(tmp_path, models, "task_arithmetic")
    result = check(path, publish(tmp_path / "p", found, models))
    assert result["verdict"] == "different"
    assert f"they are those of {models}/b, not merged" in result["why"]


# --- random masks ---------------------------------------------------------------------------------

RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")


def random_recipe(place: Path, models: Path, method: str, last: str = "c", **own: Any) -> Path:
    """Three experts with random masks; `own` goes to the last one's parameters."""
    listed = [
        {"model": str(models / name), "parameters": {"weight": w, "density": 0.6}}
        for name, w in zip(("a", "b", last), (0.7, 0.6, 0.9), strict=True)
    ]
    if method.startswith("della"):
        for model in listed:
            model["parameters"]["epsilon"] = 0.1  # type: ignore[index]
    listed[-1]["parameters"] |= own  # type: ignore[operator]
    data = {"merge_method": method, "base_model": str(models / "base"), "models": listed}
    place.mkdir(parents=True, exist_ok=True)
    path = place / "recipe.yaml"
    path.write_text(yaml.safe_dump({**data, "dtype": "float32"}))
    return path


@pytest.mark.parametrize("method", RANDOM)
def test_the_record_tells_the_seed_and_without_it_the_mask_is_another(
    method: str, models: Path, tmp_path: Path
) -> None:
    path = random_recipe(tmp_path, models, method)
    out = merged(path, tmp_path / "out", seed=5)
    exact = check(path, out)
    assert exact["verdict"] == "exact"
    assert any("seed 5" in note for note in exact["notes"])
    (out / "merge.json").write_text('{"seed": "5"}')
    other = check(path, out)
    assert other["verdict"] == "other mask", other["why"]
    assert all(t["mask"]["unexplained"] == 0 for t in other["tensors"])


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_another_mask_is_recognised_where_lambda_is_negative(
    method: str, models: Path, tmp_path: Path
) -> None:
    path = random_recipe(tmp_path, models, method)
    path.write_text(f"{path.read_text()}parameters: {{lambda: -0.5}}\n")
    out = merged(path, tmp_path / "out", seed=5)
    (out / "merge.json").unlink()
    result = check(path, out)
    assert result["verdict"] == "other mask", result["why"]
    assert all(t["mask"]["unexplained"] == 0 for t in result["tensors"])


@pytest.mark.parametrize("elects", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [(0.2, 0.3, 0.5), (0.7, -0.6, 0.9), (1.0, 1.0, 0.0)], ids=str)
@pytest.mark.parametrize(("quick", "rounding"), [("<f4", 2.0**-7), ("<f8", 2.0**-21)])
def test_subsets_explain_at_once_only_what_they_explain_one_by_one(
    elects: bool, normalize: bool, weights: tuple[float, ...], quick: str, rounding: float
) -> None:
    """And nearly all of that; less where a division by weights that cancel leaves more room."""
    rng, size = np.random.default_rng(3), 4096
    base = rng.standard_normal(size).astype("<f4")
    tau = (0.2 * rng.standard_normal((3, size))).astype("<f4")
    tau[:, ::7] = 0
    kept = 2 * np.array(weights)[:, None] * tau * (rng.random((3, size)) < 0.5)
    published = (base + kept.sum(axis=0) * rng.choice([0.8, 1, 1.1], size)).astype("<f4")
    total = sum(weights) if normalize and not elects else 1.0
    gain = 1 / min(abs(w) for w in weights if w)
    plan = np.array([elects, normalize, total, -0.8, rounding, gain, 1])
    factors = np.array([2 * np.array(weights), weights, [0.01, 0.02, 0.03]])
    scratch, parts = np.empty((5, size), quick), np.empty((6, size), quick)
    done = np.empty(size, np.uint8)
    try_subsets(base, tau, published, factors, plan, size, scratch, parts, done)
    entries = zip(base, tau.T.copy(), published, strict=True)
    alone = np.array([explain(b, t, p, factors, plan) for b, t, p in entries])
    at_once = done != 0
    assert alone[at_once].all()
    assert 0.1 < alone.mean() < 0.95
    cancel = elects and normalize and min(weights) < 0
    assert at_once.sum() > (0.8 if cancel else 0.99) * alone.sum()


def test_another_mask_is_recognised_where_nothing_is_rescaled(models: Path, tmp_path: Path) -> None:
    path = random_recipe(tmp_path, models, "dare_linear")
    path.write_text(f"{path.read_text()}parameters: {{rescale: false}}\n")
    out = merged(path, tmp_path / "out", seed=5)
    (out / "merge.json").unlink()
    result = check(path, out)
    assert result["verdict"] == "other mask", result["why"]


@pytest.mark.parametrize("method", RANDOM)
@pytest.mark.parametrize(
    "change", [{"weight": -0.9}, {"density": 0.85}, {"last": "other"}], ids=str
)
def test_a_mask_does_not_hide_another_recipe(
    method: str, change: dict[str, Any], models: Path, tmp_path: Path
) -> None:
    altered = random_recipe(tmp_path / "altered", models, method, **change)
    out = merged(altered, tmp_path / "out", seed=5)
    (out / "merge.json").unlink()
    result = check(random_recipe(tmp_path, models, method), out)
    assert result["verdict"] == "different", result["why"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_another_programs_masks_are_recognised(dtype: str, models: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    path = recipe(tmp_path, models, "dare_linear", dtype)
    found = by_oracle(models, dare_linear, dtype)
    assert check(path, publish(tmp_path / "p", found, models))["verdict"] == "other mask"
    swapped(found)
    assert check(path, publish(tmp_path / "s", found, models))["verdict"] == "different"


# --- names, shapes, models that are not there -----------------------------------------------------


def test_a_head_stored_beside_its_embedding_is_no_difference(models: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, models, "linear")
    found = load_file(merged(path, tmp_path / "out") / "model.safetensors")
    found["lm_head.weight"] = found["model.embed_tokens.weight"].clone()
    found["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    result = check(path, publish(tmp_path / "p", found, models))
    assert result["verdict"] == "exact"
    assert any("lm_head.weight is stored beside" in note for note in result["notes"])
    found["lm_head.weight"] += 1
    changed = check(path, publish(tmp_path / "q", found, models))
    assert (changed["verdict"], changed["extra"]) == ("different", ["lm_head.weight"])


def test_a_head_that_the_file_leaves_out_is_the_embedding(models: Path, tmp_path: Path) -> None:
    for name in ("base", "a", "b", "c"):
        own = tensors(len(name) + ord(name[0]))
        own["lm_head.weight"] = own["model.embed_tokens.weight"]
        write_model(tmp_path / name, own, "BF16", layers=3, vocab_size=96)
    path = recipe(tmp_path, tmp_path, "linear")
    found = load_file(merged(path, tmp_path / "out") / "model.safetensors")
    del found["lm_head.weight"]
    result = check(path, publish(tmp_path / "p", found, models))
    assert (result["verdict"], result["missing"]) == ("exact", [])


BERT = {
    "bert.embeddings.position_embeddings.weight": (5, 4),
    "bert.embeddings.word_embeddings.weight": (8, 4),
    "bert.embeddings.LayerNorm.gamma": (4,),
    "bert.embeddings.LayerNorm.beta": (4,),
    "bert.encoder.layer.0.attention.output.dense.bias": (4,),
    "cls.predictions.decoder.weight": (8, 4),
}
GPT2 = {
    "wte.weight": (8, 4),
    "wpe.weight": (5, 4),
    "h.0.ln_1.weight": (4,),
    "h.0.attn.c_attn.bias": (12,),
    "h.0.attn.bias": (1, 1, 5, 5),
    "ln_f.weight": (4,),
}
T5 = {
    "shared.weight": (8, 4),
    "encoder.embed_tokens.weight": (8, 4),
    "decoder.embed_tokens.weight": (8, 4),
    "lm_head.weight": (8, 4),
    "encoder.block.0.layer.0.SelfAttention.q.weight": (4, 4),
}
TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "encoder.embed_tokens.weight": "shared.weight",
    "decoder.embed_tokens.weight": "shared.weight",
    "lm_head.weight": "shared.weight",
}


def averaged(
    place: Path, shapes: dict[str, tuple[int, ...]], *, stored: bool = True
) -> tuple[Path, Tensors]:
    """The recipe of the mean of two models and its tensors; `stored`: with those that are tied."""
    for seed, name in enumerate("ab"):
        own = {n: np.random.default_rng(seed).standard_normal(s) for n, s in shapes.items()}
        own = {n: own[TIED.get(n, n)] for n in own if stored or n not in TIED}
        write_model(place / name, own, "F32", layers=1, tie_word_embeddings=True)
    listed = [{"model": str(place / name), "parameters": {"weight": 0.5}} for name in "ab"]
    path = place / "linear.yaml"
    data = {"merge_method": "linear", "models": listed, "dtype": "float32"}
    path.write_text(yaml.safe_dump(data))
    return path, load_file(merged(path, place / "out") / "model.safetensors")


def saved(folder: Path, found: Tensors, **config: Any) -> Path:
    """A published model of one layer, of a config that need not say what is tied."""
    folder.mkdir()
    save_file({name: x.contiguous() for name, x in found.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 1, **config}))
    return folder


@pytest.mark.parametrize(
    ("shapes", "spelled"),
    [
        (BERT, lambda name: name.replace(".gamma", ".weight").replace(".beta", ".bias")),
        (BERT, lambda name: name.removeprefix("bert.")),
        (GPT2, lambda name: f"transformer.{name}"),
    ],
    ids=["norms", "no bert.", "transformer."],
)
def test_a_file_in_the_other_spelling_is_compared(
    shapes: dict[str, tuple[int, ...]], spelled: Callable[[str], str], tmp_path: Path
) -> None:
    """As mergekit spells GPT-2 and BERT: as its template does, not as the models do."""
    path, ours = averaged(tmp_path, shapes)
    found = {spelled(name): x for name, x in ours.items()}
    assert found.keys() != ours.keys()
    result = check(path, saved(tmp_path / "p", found))
    assert (result["verdict"], len(result["tensors"])) == ("exact", len(ours)), result["why"]
    norm = next(spelled(name) for name in ours if "gamma" in name or "ln_1" in name)
    found[norm], found[f"{norm}.more"] = found[norm] + 1, found[norm].clone()
    result = check(path, saved(tmp_path / "q", found))
    assert result["verdict"] == "different"
    assert (len(result["worst"]), result["extra"]) == (1, [f"{norm}.more"])  # as the file spells it


@pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": True}], ids=["silent", "tied"])
@pytest.mark.parametrize("shapes", [BERT, T5], ids=["BERT", "T5"])
def test_what_is_tied_to_an_embedding_may_be_stored_or_left_out(
    shapes: dict[str, tuple[int, ...]], config: dict[str, Any], tmp_path: Path
) -> None:
    """To that of the words, not to the first one; T5's is called 'shared'."""
    path, ours = averaged(tmp_path, shapes)
    fewer = {name: x for name, x in ours.items() if name not in TIED}
    assert len(fewer) < len(ours)
    result = check(path, saved(tmp_path / "p", fewer, **config))
    assert (result["verdict"], len(result["tensors"])) == ("exact", len(ours)), result["why"]
    (tmp_path / "alone").mkdir()
    path, alone = averaged(tmp_path / "alone", shapes, stored=False)
    assert alone.keys() == fewer.keys()
    more = alone | {name: alone[TIED[name]].clone() for name in ours if name in TIED}
    result = check(path, saved(tmp_path / "m", more, **config))
    assert (result["verdict"], result["extra"]) == ("exact", []), result["why"]
    assert len(result["notes"]) == len(more) - len(alone)
    last = max(name for name in more if name in TIED)
    more[last] = more[last] + 1
    result = check(path, saved(tmp_path / "x", more, **config))
    assert (result["verdict"], result["extra"]) == ("different", [last])


def test_an_untied_head_that_the_file_lacks_is_missing(tmp_path: Path) -> None:
    path, ours = averaged(tmp_path, T5)
    del ours["lm_head.weight"]
    result = check(path, saved(tmp_path / "p", ours, tie_word_embeddings=False))
    assert (result["verdict"], result["missing"]) == ("different", ["lm_head.weight"])


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.embeddings.position_ids", (1, 5)),
        ("model.layers.0.attention.bias", (1, 1, 5, 5)),
        ("model.layers.0.attn.masked_bias", ()),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (4,)),
    ],
)
def test_a_buffer_may_be_left_out_or_stored(
    name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    weight = {"model.layers.0.q_proj.weight": (4, 4)}
    path, ours = averaged(tmp_path, weight | {name: shape})
    buffer = ours.pop(name)
    result = check(path, saved(tmp_path / "p", ours))
    assert (result["verdict"], result["missing"]) == ("exact", []), result["why"]
    (tmp_path / "alone").mkdir()
    path, ours = averaged(tmp_path / "alone", weight)
    result = check(path, saved(tmp_path / "q", ours | {name: buffer}))
    assert (result["verdict"], result["extra"]) == ("exact", []), result["why"]
    assert result["notes"] == [f"{name} is no weight: not compared"]


@pytest.mark.parametrize("end", ["attn.c_attn.bias", "attn.bias", "attention.bias"])
def test_a_bias_is_no_buffer(end: str, tmp_path: Path) -> None:
    name = f"model.layers.0.{end}"
    path, ours = averaged(tmp_path, {"model.layers.0.q_proj.weight": (4, 4), name: (12,)})
    del ours[name]
    result = check(path, saved(tmp_path / "p", ours))
    assert (result["verdict"], result["missing"]) == ("different", [name])


def test_integers_beside_the_weights_are_copied(models: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a", "b", "c")):
        counts = {"model.count": np.arange(6, dtype=np.int64)}
        write_model(tmp_path / name, tensors(seed) | counts, "BF16", layers=3, vocab_size=96)
    path = recipe(tmp_path, tmp_path, "task_arithmetic")
    found = by_oracle(models, task_arithmetic, "bfloat16")
    found["model.count"] = torch.arange(6)
    result = check(path, publish(tmp_path / "p", found, models))
    assert (result["verdict"], result["numerics"]) == ("exact", "mergekit 0.1.5, bfloat16")
    found["model.count"] = torch.arange(1, 7)
    result = check(path, publish(tmp_path / "q", found, models))
    assert result["verdict"] == "different"
    assert [e["tensor"] for e in result["worst"]] == ["model.count"]


def test_missing_and_extra_tensors_are_different(models: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, models, "linear")
    found = load_file(merged(path, tmp_path / "out") / "model.safetensors")
    found["model.layers.3.mlp.up_proj.weight"] = found.pop("model.norm.weight")
    result = check(path, publish(tmp_path / "p", found, models))
    assert result["verdict"] == "different"
    assert result["missing"] == ["model.norm.weight"]
    assert result["extra"] == ["model.layers.3.mlp.up_proj.weight"]
    assert "the file lacks model.norm.weight" in result["why"]


def test_what_cannot_be_merged_again_is_unverifiable(models: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, models, "linear")
    out = merged(path, tmp_path / "out")
    published, wanted = open_checkpoint(out, "out"), load_recipe(path)
    folders = {m: Path(m) for m in wanted.models}
    gone = remerge(wanted, published, {m: p for m, p in folders.items() if p.name != "b"})
    assert gone["verdict"] == "unverifiable"
    assert f"{models}/b are not here" in gone["why"]
    write_model(tmp_path / "packed", tensors(1), layers=3, quantization_config={"bits": 4})
    packed = remerge(wanted, published, folders | {f"{models}/b": tmp_path / "packed"})
    assert packed["verdict"] == "unverifiable"
    assert "is quantised" in packed["why"]
    eight = {n: (x * 100).to(torch.int8) for n, x in loaded(models, "float32")["a"].items()}
    result = remerge(wanted, open_checkpoint(publish(tmp_path / "i", eight, models), "i"), folders)
    assert result["verdict"] == "unverifiable"
    assert "as integers, packed or quantised" in result["why"]
    strange = publish(tmp_path / "p", {"x": torch.ones(3)}, models)
    result = remerge(wanted, open_checkpoint(strange, "p"), folders)
    assert result["verdict"] == "unverifiable"
    assert "no tensor of a name and shape" in result["why"]


def test_arithmetic_that_is_not_followed_is_unverifiable(models: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, models, "karcher")
    found = load_file(merged(path, tmp_path / "out") / "model.safetensors")
    one_ulp(found, 0.3)
    result = check(path, publish(tmp_path / "p", found, models))
    assert result["verdict"] == "unverifiable"
    assert "mergekit's arithmetic of karcher in bfloat16 is not followed" in result["why"]
    swapped(found)
    assert check(path, publish(tmp_path / "q", found, models))["verdict"] == "different"


def test_in_float64_another_choice_among_equal_magnitudes_is_unverifiable(
    models: Path, tmp_path: Path
) -> None:
    coarse = coarse_models(tmp_path / "coarse")
    found = by_oracle(coarse, ties, "float64")
    path = recipe(tmp_path, coarse, "ties", "float64")
    result = check(path, publish(tmp_path / "p", found, models))
    assert result["verdict"] == "unverifiable", result["why"]
    assert "mergekit's arithmetic of ties in float64 is not followed" in result["why"]
    swapped(found)
    assert check(path, publish(tmp_path / "q", found, models))["verdict"] == "different"


def test_a_buffer_in_float64_leaves_the_other_tensors_to_mergekits_arithmetic(
    models: Path, tmp_path: Path
) -> None:
    """A recipe that names no dtype: every tensor keeps its own."""
    for name in ("base", "a", "b", "c"):
        own = loaded(models, "bfloat16")[name]
        own["model.frequencies"] = torch.arange(300, dtype=torch.float64) / 7
        publish(tmp_path / name, own, models)
    path = recipe(tmp_path, tmp_path, "ties")
    path.write_text(path.read_text().replace("dtype: bfloat16\n", ""))
    found = by_oracle(models, ties, "bfloat16")
    found["model.frequencies"] = torch.arange(300, dtype=torch.float64) / 7
    result = check(path, publish(tmp_path / "p", found, models))
    assert result["verdict"] == "rounding only", result["why"]
    assert result["numerics"] == "mergekit 0.1.5, bfloat16"
    found["model.frequencies"] += 1e-6
    result = check(path, publish(tmp_path / "q", found, models))
    assert result["verdict"] == "different"
    assert [e["tensor"] for e in result["worst"]][:1] == ["model.frequencies"]


def test_people_are_shown_the_answer_and_the_worst_tensors(
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mergelab.forensics.remerge_show.out", Console(width=200, highlight=False))
    found = by_oracle(models, task_arithmetic, "bfloat16")
    one_ulp_in_one(found)
    path = recipe(tmp_path, models, "task_arithmetic")
    show(check(path, publish(tmp_path / "p", found, models)))
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("different (mergekit 0.1.5, bfloat16): 1 of 11 tensors are not what")
    assert "model.layers.2.mlp.up_proj.weight different 1." in text
