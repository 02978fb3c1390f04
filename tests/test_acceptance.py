"""Acceptance rows of the data-free methods, through the real planner and engine.

T1 TIES, T2 DARE, T3 DELLA, T4 breadcrumbs, T5 SCE, T6 SLERP, T7 Karcher, T8 Multi-SLERP and
NearSwap, T9 Model Stock, X2 stacked layers. Wanted values: closed forms, scipy, and oracles.py,
written after the papers' own code (TIES, DELLA, breadcrumbs, SCE)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
from method_specs import merge, recipe, run
from oracles import Array

from mergelab.errors import UserError


def one(
    place: Path,
    method: str,
    base: Array | None,
    experts: dict[str, tuple[Array, dict[str, Any]]],
    shared: dict[str, Any] | None = None,
    dtype: str = "F32",
    **how: int,
) -> Array:
    """Merge models of one tensor `w`: experts are name -> (values, parameters)."""
    based = {} if base is None else {"base": {"w": base}}
    models = based | {name: {"w": values} for name, (values, _) in experts.items()}
    own = {name: parameters for name, (_, parameters) in experts.items()}
    text = recipe(method, own, shared or {}, "base" if based else None)
    return merge(place, text, models, dtype, **how)["w"]


def alone(place: Path, method: str, delta: Array, own: dict[str, Any], **shared: Any) -> Array:
    """The task vector `delta` of one expert on a zero base, as merged (seed 0, float32)."""
    experts = {"a": (delta, {"weight": 1.0, **own})}
    return one(place, method, np.zeros_like(delta), experts, shared)


def normal(shape: Any, seed: int, scale: float = 1.0) -> Array:
    """Random float32 values."""
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype("<f4")


# --- T1: TIES -----------------------------------------------------------------------------------


def cancelling() -> tuple[Array, list[Array]]:
    """A zero base and three task vectors (40, 100); in columns 0 to 4 they cancel exactly."""
    deltas = [normal((40, 100), seed) for seed in range(3)]
    deltas[1][:, :5], deltas[2][:, :5] = -deltas[0][:, :5], 0
    return np.zeros((40, 100), "<f4"), deltas


def weighted(values: list[Array], weights: list[float], **own: Any) -> dict[str, Any]:
    """Experts a, b, c with weights."""
    triples = zip("abc", values, weights, strict=True)
    return {name: (x, {"weight": w, **own}) for name, x, w in triples}


@pytest.mark.parametrize("density", [0.1, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("flavour", ["paper", "mergekit", "peft"])
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_t1_ties_keeps_elects_and_merges_as_its_flavour(
    tmp_path: Path, density: float, flavour: str, scope: str
) -> None:
    """Bit for bit; the authors' code is run at their defaults, weights 1."""
    base, deltas = cancelling()
    weights = [1.0] * 3 if flavour == "paper" else [0.5, 0.3, 0.4]
    experts = weighted(deltas, weights, density=density)
    got = one(tmp_path, "ties", base, experts, {"flavour": flavour, "scope": scope})
    want = oracles.ties(base, deltas, weights, [density] * 3, flavour)
    np.testing.assert_array_equal(got, want.astype(float))


@pytest.mark.parametrize(("flavour", "last"), [("mergekit", 1), ("peft", 1), ("paper", -1)])
def test_t1_a_cancelled_vote_elects_plus_or_the_papers_majority(
    tmp_path: Path, flavour: str, last: int
) -> None:
    """Two task vectors agree on minus three times; the last entries, 1 and -1, cancel."""
    a, b = np.array([-1, -1, -1, 1], "<f4"), np.array([-1, -1, -1, -1], "<f4")
    experts = {"a": (a, {"weight": 1.0}), "b": (b, {"weight": 1.0})}
    got = one(tmp_path, "ties", np.zeros(4, "<f4"), experts, {"flavour": flavour})
    np.testing.assert_array_equal(got, [-1, -1, -1, last])


def test_t1_whole_model_trimming_drops_the_small_tensor(tmp_path: Path) -> None:
    """Of two tensors with task vectors 100 times apart, only the large one survives 50 %."""
    delta = {"small": normal(500, 0, 0.01) / 10, "large": np.sign(normal(500, 1))}
    zero = {name: np.zeros(500, "<f4") for name in delta}
    text = recipe("ties", {"a": {"weight": 1.0, "density": 0.5}}, {"scope": "model"})
    got = merge(tmp_path, text, {"base": zero, "a": delta})
    assert np.count_nonzero(got["large"]) == 500
    assert np.count_nonzero(got["small"]) == 0


def test_t1_peft_flavour_is_pefts_ties(tmp_path: Path) -> None:
    import torch
    from peft.utils.merge_utils import ties

    base, deltas = cancelling()
    deltas = [d + np.float32(1e-3) * normal(d.shape, 9) for d in deltas]  # no equal magnitudes
    weights = [0.5, 0.3, -0.2]
    got = one(tmp_path, "ties", base, weighted(deltas, weights, density=0.3), {"flavour": "peft"})
    want = ties([torch.from_numpy(d) for d in deltas], torch.tensor(weights), 0.3)
    np.testing.assert_array_equal(got, want.numpy().astype(float))


# --- T2: DARE -----------------------------------------------------------------------------------


def slopes(merged: Array, pattern: Array) -> Array:
    """Mean of merged (draws, entries) over pattern (entries), for each decile of magnitude."""
    mean = merged.mean(axis=0)
    deciles = np.array_split(np.argsort(np.abs(pattern)), 10)
    return np.array([mean[d] @ pattern[d] / (pattern[d] @ pattern[d]) for d in deciles])


def test_t2_dare_by_density_is_exact_and_unbiased_at_every_magnitude(tmp_path: Path) -> None:
    """4000 draws of 400 entries; kept entries are tau / density to the bit, and 25 % are kept."""
    pattern = normal(400, 0)
    delta = np.tile(pattern, (4000, 1))
    got = alone(tmp_path, "dare_linear", delta, {"density": 0.25}, rescale="density")
    kept = got != 0
    np.testing.assert_array_equal(got, np.where(kept, 4.0 * delta, 0))
    assert abs(np.count_nonzero(kept) - got.size / 4) < 4 * math.sqrt(got.size * 0.25 * 0.75)
    assert np.all(np.abs(slopes(got, pattern) - 1) <= 0.02)


@pytest.mark.parametrize("density", [0.1, 0.3, 0.9])
def test_t2_the_factor_is_one_over_density(tmp_path: Path, density: float) -> None:
    """peft divides by the density, in float32: the same to one rounding."""
    delta = normal(5000, 1)
    got = alone(tmp_path, "dare_linear", delta, {"density": density}, rescale="density")
    kept = got != 0
    want = (delta / np.float32(density)).astype(float)
    assert np.all(np.abs(got - want)[kept] <= np.spacing(np.abs(want).astype("<f4"))[kept])
    expected = delta.size * density
    assert abs(np.count_nonzero(kept) - expected) < 4 * math.sqrt(expected * (1 - density))


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_t2_masks_know_nothing_of_other_tensors_shards_or_workers(
    tmp_path: Path, method: str
) -> None:
    """The same words, told by name: tensor w alone, or among others before and behind it."""
    delta = {"w": normal((300, 250), 0)}
    others = {f"{side}{i}": normal(100 + i, i) for i in range(4) for side in "ax"}
    text = recipe(method, {"m": {"weight": 1.0, "density": 0.5}}, {})
    results = []
    for k, tensors in enumerate((delta, others | delta)):
        zero = {name: np.zeros_like(x) for name, x in tensors.items()}
        models = {"base": zero, "m": tensors}
        results.append(merge(tmp_path / str(k), text, models, workers=1 + k, shard_size=500)["w"])
    np.testing.assert_array_equal(*results)


# --- T3: DELLA ----------------------------------------------------------------------------------


def test_t3_della_divides_by_the_chance_and_is_unbiased(tmp_path: Path) -> None:
    """4000 rows of 300 entries; kept entries are tau / p of their rank to the last place."""
    pattern = normal(300, 0)
    delta = np.tile(pattern, (4000, 1))
    own = {"density": 0.5, "epsilon": 0.2}
    got = alone(tmp_path, "della_linear", delta, own, rescale="probability")
    rank = np.argsort(np.argsort(np.abs(pattern)))
    chance = 0.3 + 0.4 * rank / 299
    kept = got != 0
    np.testing.assert_allclose(got, np.where(kept, delta / chance, 0), rtol=2.0**-22)
    assert np.all(np.abs(kept.mean(axis=0) - chance) < 5 * np.sqrt(chance * (1 - chance) / 4000))
    assert np.all(np.abs(slopes(got, pattern) - 1) <= 0.05)


def test_t3_rows_of_one_entry_are_kept_at_the_density(tmp_path: Path) -> None:
    delta = normal((20_000, 1), 0)
    own = {"density": 0.4, "epsilon": 0.3}
    got = alone(tmp_path, "della_linear", delta, own, rescale="probability")
    kept = got != 0
    np.testing.assert_allclose(got, np.where(kept, delta / 0.4, 0), rtol=2.0**-22)
    assert abs(np.count_nonzero(kept) - 8000) < 4 * math.sqrt(20_000 * 0.4 * 0.6)


@pytest.mark.parametrize(("density", "epsilon"), [(0.9, 0.1), (0.1, 0.1), (0.5, 0.6)])
def test_t3_chances_must_lie_within_0_and_1(tmp_path: Path, density: float, epsilon: float) -> None:
    own = {"density": density, "epsilon": epsilon}
    with pytest.raises(UserError, match="epsilon"):
        alone(tmp_path, "della", normal(100, 0), own)


# --- T4: breadcrumbs ----------------------------------------------------------------------------


def test_t4_breadcrumbs_by_row_is_the_authors(tmp_path: Path) -> None:
    """Per row: the largest 1 % are dropped, the next 15 % kept."""
    delta = normal((8, 1000), 0) * np.logspace(-2, 2, 8, dtype="<f4")[:, None]
    own = {"density": 0.15, "gamma": 0.01}
    got = alone(tmp_path, "breadcrumbs", delta, own, granularity="row")
    for row, values in zip(got, delta, strict=True):
        order = np.argsort(-np.abs(values))
        want = np.zeros(1000)
        want[order[10:160]] = values[order[10:160]]
        np.testing.assert_array_equal(row, want)


def test_t4_breadcrumbs_by_tensor_has_one_window(tmp_path: Path) -> None:
    delta = normal((8, 1000), 0) * np.logspace(-2, 2, 8, dtype="<f4")[:, None]
    got = alone(tmp_path, "breadcrumbs", delta, {"density": 0.15, "gamma": 0.01})
    order = np.argsort(-np.abs(delta), axis=None)[80:1280]
    assert np.count_nonzero(got) == 1200
    np.testing.assert_array_equal(got.ravel()[order], delta.ravel()[order])


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
def test_t4_a_tensor_too_small_for_outliers_keeps_its_share(tmp_path: Path, method: str) -> None:
    """64 entries at gamma 0.01: none is an outlier, half are kept (mergekit 0.1.4 kept none)."""
    delta = normal(64, 0)
    got = alone(tmp_path, method, delta, {"density": 0.5, "gamma": 0.01})
    order = np.argsort(-np.abs(delta))
    assert set(np.flatnonzero(got)) == set(order[:32])


# --- T5: SCE ------------------------------------------------------------------------------------


@pytest.mark.parametrize("select", ["weights", "deltas"])
@pytest.mark.parametrize("topk", [1.0, 0.1])
def test_t5_sce_is_its_definition(tmp_path: Path, topk: float, select: str) -> None:
    base = normal((40, 50), 9)
    models = [base + normal(base.shape, m, 0.1 * (m + 1)) for m in range(3)]
    experts = {name: (x, {}) for name, x in zip("abc", models, strict=True)}
    got = one(tmp_path, "sce", base, experts, {"select_topk": topk, "select": select})
    wide = [x.astype(float) for x in (base, *models)]
    assert np.abs(got - oracles.sce(wide[0], wide[1:], topk, select)).max() <= 1e-6
    changed = np.mean(got != base)
    assert changed > 0.99 if select == "weights" or topk == 1 else abs(changed - topk) < 1e-3


def test_t5_only_mergekits_sce_levels_the_weights_of_light_fine_tunes(tmp_path: Path) -> None:
    """Task vectors of 1e-4: weights by their squares (authors), or equal (mergekit)."""
    base = np.zeros(1000, "<f4")
    models = [np.full(1000, 1e-4, "<f4"), np.full(1000, 3e-4, "<f4")]
    experts = {name: (x, {}) for name, x in zip("ab", models, strict=True)}
    for select, want in (("deltas", 2e-4), ("weights", 2.8e-4)):
        got = one(tmp_path / select, "sce", base, experts, {"select": select})
        np.testing.assert_allclose(got, want, rtol=1e-6)


# --- T6: SLERP ----------------------------------------------------------------------------------


def slerp(place: Path, a: Array, b: Array, t: float, **how: Any) -> Array:
    return one(place, "slerp", a, {"b": (b, {})}, {"t": t}, **how)


@pytest.mark.parametrize("t", [0.1, 0.3, 0.5, 0.9])
def test_t6_slerp_of_unit_vectors_is_scipys_geodesic(tmp_path: Path, t: float) -> None:
    from scipy.spatial import geometric_slerp

    a, b = (x / np.linalg.norm(x) for x in np.random.default_rng(0).standard_normal((2, 500)))
    got = slerp(tmp_path, a, b, t, dtype="F64")
    assert np.abs(got - geometric_slerp(a, b, t)).max() <= 1e-12
    scaled = slerp(tmp_path / "scaled", 3 * a, 5 * b, t, dtype="F64")
    p, q = np.linalg.lstsq(np.stack([a, b], axis=1), got, rcond=None)[0]
    assert np.abs(scaled - (3 * p * a + 5 * q * b)).max() <= 1e-12


@pytest.mark.parametrize("dtype", ["F64", "F32", "BF16"])
def test_t6_slerp_ends_at_its_models_to_the_bit(tmp_path: Path, dtype: str) -> None:
    a, b = normal((30, 40), 0), normal((30, 40), 1)
    if dtype == "BF16":
        a, b = (np.round(64 * x) / 64 % 4 for x in (a, b))
    np.testing.assert_array_equal(slerp(tmp_path / "0", a, b, 0.0, dtype=dtype), a)
    np.testing.assert_array_equal(slerp(tmp_path / "1", a, b, 1.0, dtype=dtype), b)


def test_t6_the_whole_models_angle_is_that_of_the_flattened_models(tmp_path: Path) -> None:
    """Tensors at unequal angles, one larger than a block: streamed equals materialised."""
    shapes = {"near": (300, 250), "far": (5000,), "scalar": ()}
    a = {name: normal(shape, k) for k, (name, shape) in enumerate(shapes.items())}
    share = {"near": 0.1, "far": 3.0, "scalar": 1.0}
    b = {name: x + share[name] * normal(x.shape, 7) for name, x in a.items()}
    b = {name: x.astype("<f4") for name, x in b.items()}
    shared = {"t": 0.3}
    models = {"base": a, "m": b}
    whole = merge(tmp_path / "m", recipe("slerp", {"m": {}}, shared | {"scope": "model"}), models)
    apart = merge(tmp_path / "t", recipe("slerp", {"m": {}}, shared), models)
    flat = [np.concatenate([m[name].ravel() for name in shapes]).astype(float) for m in (a, b)]
    for name in shapes:
        want = oracles.slerp(a[name].astype(float), b[name].astype(float), 0.3, (flat[0], flat[1]))
        np.testing.assert_allclose(whole[name], want, rtol=1e-6, atol=1e-6)
    assert np.abs(whole["far"] - apart["far"]).max() > 0.01


# --- T7: Karcher --------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.2, 0.5, 0.3]])
def test_t7_the_karcher_mean_is_stationary(tmp_path: Path, weights: list[float]) -> None:
    """At the mean, the weighted tangent vectors to all models sum to zero."""
    rng = np.random.default_rng(0)
    models = [rng.standard_normal(200) for _ in range(3)]
    experts = weighted(models, weights)
    got = one(tmp_path, "karcher", None, experts, {"max_iter": 1000, "tol": 1e-13}, "F64")
    mean = got / np.linalg.norm(got)
    units = [x / np.linalg.norm(x) for x in models]
    shares = np.array(weights) / sum(weights)
    pull = sum(s * oracles.log_map(mean, u) for s, u in zip(shares, units, strict=True))
    assert np.abs(pull).max() <= 1e-10
    norms = [np.linalg.norm(x) for x in models]
    assert np.linalg.norm(got) == pytest.approx(float(shares @ norms), rel=1e-12)


def test_t7_the_karcher_mean_of_two_is_halfway_slerp(tmp_path: Path) -> None:
    a, b = (x / np.linalg.norm(x) for x in np.random.default_rng(1).standard_normal((2, 200)))
    experts = {"a": (a, {}), "b": (b, {})}
    mean = one(tmp_path / "k", "karcher", None, experts, {"tol": 1e-13}, "F64")
    half = slerp(tmp_path / "s", a, b, 0.5, dtype="F64")
    assert np.abs(mean - half).max() <= 1e-12


# --- T8: Multi-SLERP and NearSwap ---------------------------------------------------------------


def tangent_mean(models: list[Array], weights: list[float]) -> Array:
    """Multi-SLERP as it is defined: project to the tangent space at the mean, sum, map back."""
    shares = np.array(weights) / sum(weights)
    norms = np.array([np.linalg.norm(x) for x in models])
    units = np.array([x / n for x, n in zip(models, norms, strict=True)])
    middle = shares @ units / np.linalg.norm(shares @ units)
    tangent = shares @ (units - np.outer(units @ middle, middle))
    size = np.linalg.norm(tangent) + 1e-8
    mapped = middle * math.cos(size) + tangent * math.sin(size) / size
    return np.asarray(mapped * (shares @ norms))


@pytest.mark.parametrize("based", [True, False])
def test_t8_multislerp_is_its_tangent_space_mean(tmp_path: Path, based: bool) -> None:
    rng = np.random.default_rng(0)
    base = rng.standard_normal(300) * based
    parts = [rng.standard_normal(300) * (1 + m) for m in range(3)]
    experts = weighted([base + p for p in parts], [0.5, 0.3, 0.4])
    got = one(tmp_path, "multislerp", base if based else None, experts, dtype="F64")
    assert np.abs(got - base - tangent_mean(parts, [0.5, 0.3, 0.4])).max() <= 1e-8 * 10


def test_t8_nearswap_is_a_clamp(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal(4000)
    b = a + rng.standard_normal(4000) * 10 ** rng.uniform(-4, 0, 4000)
    got = one(tmp_path, "nearswap", a, {"b": (b, {})}, {"t": 0.01}, "F64")
    assert np.abs(got - (a + np.clip(b - a, -0.01, 0.01))).max() <= 1e-8


# --- T9: Model Stock ----------------------------------------------------------------------------


def at_angles(*cosines: float) -> list[Array]:
    """Task vectors (8) of three models whose pairwise cosines 12, 13, 23 are as given."""
    first, second, third = cosines
    gram = np.array([[1, first, second], [first, 1, third], [second, third, 1]])
    return list(np.pad(np.linalg.cholesky(gram), ((0, 0), (0, 5))))


def stock(place: Path, deltas: list[Array], **shared: Any) -> float:
    """The share t that Model Stock takes of the mean: its result on a zero base."""
    experts = {name: (d, {}) for name, d in zip("abc", deltas, strict=False)}
    got = one(place, "model_stock", np.zeros(8), experts, shared, "F64")
    mean = np.mean(deltas, axis=0)
    t = float(got @ mean / (mean @ mean))
    np.testing.assert_allclose(got, t * mean, atol=1e-12)
    return t


def test_t9_model_stock_of_two_at_cosine_06_takes_075(tmp_path: Path) -> None:
    a, b, _ = at_angles(0.6, 0, 0)
    assert stock(tmp_path, [a, b]) == pytest.approx(0.75, abs=1e-12)


def test_t9_model_stock_of_three_averages_cosines_or_angles(tmp_path: Path) -> None:
    cosines = [0.8, 0.3, 0.1]
    deltas = at_angles(*cosines)
    for average, c in (
        ("cosine", np.mean(cosines)),
        ("angle", np.cos(np.mean(np.arccos(cosines)))),
    ):
        want = 3 * c / (1 + 2 * c)
        assert stock(tmp_path / average, deltas, average=average) == pytest.approx(want, abs=1e-12)


def test_t9_an_obtuse_angle_gives_the_base_unless_unclamped(tmp_path: Path) -> None:
    a, b, _ = at_angles(-0.6, 0, 0)
    assert stock(tmp_path / "clamped", [a, b]) == 0
    assert stock(tmp_path / "free", [a, b], clamp=False) == pytest.approx(-3, abs=1e-12)


# --- X2: stacked layers -------------------------------------------------------------------------


def llamas(place: Path, layers: int) -> dict[str, Any]:
    """Two random Llamas, saved in float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        vocab_size=48,
        tie_word_embeddings=False,
    )
    found = {}
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        found[name] = LlamaForCausalLM(config).eval()
        found[name].save_pretrained(place / name)
    return found


def stack(place: Path, *parts: tuple[str, int, int]) -> Any:
    """Stack layers [first, end) of models with passthrough; the merged model, loaded."""
    from transformers import AutoModelForCausalLM

    slices = [{"sources": [{"model": m, "layer_range": [i, j]}]} for m, i, j in parts]
    folders = {m: place / m for m in ("a", "b")}
    out = run(place / "x", {"merge_method": "passthrough", "slices": slices}, folders)
    return AutoModelForCausalLM.from_pretrained(out).eval()


def test_x2_stacking_a_models_own_layers_gives_it_back(tmp_path: Path) -> None:
    import torch

    model = llamas(tmp_path, 4)["a"]
    merged = stack(tmp_path, ("a", 0, 1), ("a", 1, 4)).state_dict()
    assert merged.keys() == model.state_dict().keys()
    assert all(torch.equal(merged[name], x) for name, x in model.state_dict().items())


def test_x2_a_stack_runs_as_one_model_after_the_other(tmp_path: Path) -> None:
    """Embedding and layers of a, then layers, norm and head of b: the same logits to the bit."""
    import torch

    models = llamas(tmp_path, 2)
    merged = stack(tmp_path, ("a", 0, 2), ("b", 0, 2))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        hidden = models["a"].model.embed_tokens(ids)
        places = torch.arange(12)[None]
        rotary = models["a"].model.rotary_emb(hidden, position_ids=places)
        for layer in (*models["a"].model.layers, *models["b"].model.layers):
            hidden = layer(hidden, position_embeddings=rotary, position_ids=places)
        want = models["b"].lm_head(models["b"].model.norm(hidden))
        assert torch.equal(merged(ids).logits, want)


def test_x2_depth_up_scaling_repeats_the_middle_layers(tmp_path: Path) -> None:
    """SOLAR (Kim et al. 2023): of 32 layers, 0 to 23 and then 8 to 31 make 48."""
    import torch

    model = llamas(tmp_path, 32)["a"].state_dict()
    merged = stack(tmp_path, ("a", 0, 24), ("a", 8, 32))
    assert merged.config.num_hidden_layers == 48
    state = merged.state_dict()
    for row, source in enumerate([*range(24), *range(8, 32)]):
        for name in ("self_attn.q_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight"):
            got, want = (f"model.layers.{k}.{name}" for k in (row, source))
            assert torch.equal(state[got], model[want])
