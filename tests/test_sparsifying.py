"""Breadcrumbs, DELLA, SCE and RAM: hand-worked numbers, conventions, counts, edges.

test_laws.py holds them to their definitions on random recipes; here is what it cannot see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
from method_specs import merge, recipe
from oracles import Array

from mergelab.errors import UserError
from mergelab.methods.base import BLOCK
from mergelab.recipe import load_recipe

TEN = [8, -7, 6, -5, 4, -3, 2, -1, 0.5, 0.25]


def merged(
    place: Path,
    method: str,
    base: Any,
    experts: Sequence[Any],
    shared: Mapping[str, Any] | None = None,
    each: Mapping[str, Any] | None = None,
    dtype: str = "F32",
    **how: int,
) -> Array:
    """Merge one-tensor models m0, m1, ..., which all have the same parameters; base None: zeros."""
    base = np.zeros(np.shape(experts[0])) if base is None else np.asarray(base, float)
    names = [f"m{i}" for i in range(len(experts))]
    text = recipe(method, dict.fromkeys(names, each or {}), shared or {})
    models = {"base": {"w": base}}
    models |= {n: {"w": np.asarray(x, float)} for n, x in zip(names, experts, strict=True)}
    return merge(place, text, models, dtype, **how)["w"]


def trimmed(place: Path, delta: Any, density: float, gamma: float, **shared: Any) -> Array:
    """What breadcrumbs leaves of one task vector."""
    each = {"weight": 1.0, "density": density, "gamma": gamma}
    return merged(place, "breadcrumbs", None, [delta], shared, each)


def test_breadcrumbs_drop_outliers_and_small_entries(tmp_path: Path) -> None:
    got = trimmed(tmp_path, TEN, 0.3, 0.2)
    assert got.tolist() == [0, 0, 6, -5, 4, 0, 0, 0, 0, 0]


def test_breadcrumbs_drop_fewer_outliers_where_the_density_asks_for_more(tmp_path: Path) -> None:
    got = trimmed(tmp_path, TEN, 0.9, 0.3)
    assert got.tolist() == [0, *TEN[1:]]


def test_breadcrumbs_of_density_one_keep_all(tmp_path: Path) -> None:
    assert trimmed(tmp_path, TEN, 1.0, 0.3).tolist() == TEN


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_of_equal_magnitudes_the_lowest_index_counts_as_the_largest(
    tmp_path: Path, granularity: str
) -> None:
    signs = [1, -1, -1, 1, 1, -1, 1, -1, 1, 1]
    got = trimmed(tmp_path, signs, 0.3, 0.2, granularity=granularity)
    assert got.tolist() == [0, 0, -1, 1, 1, 0, 0, 0, 0, 0]


def test_breadcrumbs_count_equal_magnitudes_across_blocks(tmp_path: Path) -> None:
    delta = np.random.default_rng(1).integers(-3, 4, 2 * BLOCK + 17).astype(float)
    got = trimmed(tmp_path, delta, 0.4, 0.25)
    assert np.array_equal(got, oracles.without_outliers(delta, 0.4, 0.25))
    assert np.count_nonzero(got) == int(0.4 * delta.size)


def test_breadcrumbs_by_rows_trim_each_row_by_itself(tmp_path: Path) -> None:
    rows = np.array([TEN, np.roll(TEN, 3) * 100, np.roll(TEN, 7) / 100])
    got = trimmed(tmp_path, rows, 0.3, 0.2, granularity="row")
    one = np.array([0, 0, 6, -5, 4, 0, 0, 0, 0, 0])
    want = [one, np.roll(one, 3) * 100, np.roll(one, 7) / 100]
    np.testing.assert_array_equal(got, np.asarray(want, "<f4"))


@pytest.mark.parametrize(("density", "left"), [(0.9, 7), (1.0, 7), (0.5, 5)])
def test_breadcrumbs_by_rows_drop_the_outliers_first(
    tmp_path: Path, density: float, left: int
) -> None:
    """The authors keep what is left of the row even where the density asks for more."""
    got = trimmed(tmp_path, TEN, density, 0.3, granularity="row")
    assert got.tolist() == [0] * 3 + TEN[3 : 3 + left] + [0] * (7 - left)


@pytest.mark.parametrize("width", [1, 3, 1000, 5000])
def test_breadcrumbs_by_rows_of_any_length(tmp_path: Path, width: int) -> None:
    delta = np.random.default_rng(2).integers(-50, 51, (70000 // width, width)).astype(float)
    got = trimmed(tmp_path, delta, 0.4, 0.25, granularity="row")
    want = [oracles.without_outliers(row, 0.4, 0.25) for row in delta]
    assert np.array_equal(got, want)


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "breadcrumbs_ties"])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_rescale_restores_the_l1_norm(tmp_path: Path, method: str, granularity: str) -> None:
    delta = np.random.default_rng(3).integers(-3, 4, (70, 1000)).astype(float)
    shared: dict[str, Any] = {"rescale": True, "normalize": False}
    each = {"weight": 1.0, "density": 0.3}
    if method != "ties":
        shared["granularity"], each["gamma"] = granularity, 0.1
    got = merged(tmp_path / "yes", method, None, [delta], shared, each)
    plain = merged(tmp_path / "no", method, None, [delta], {**shared, "rescale": False}, each)
    factor = np.abs(delta).sum() / np.abs(plain).sum()
    assert factor > 1.2
    np.testing.assert_allclose(got, plain * factor, rtol=2e-7)


@pytest.mark.parametrize("flavour", ["mergekit", "paper"])
def test_rescale_of_ties_over_the_model_restores_the_norm_of_all_tensors(
    tmp_path: Path, flavour: str
) -> None:
    rng = np.random.default_rng(4)
    delta = {"a": rng.integers(-3, 4, 700).astype(float), "b": rng.integers(-9, 10, 900) / 1.0}
    shared = {"rescale": True, "scope": "model", "flavour": flavour}
    text = recipe("ties", {"m0": {"weight": 1.0, "density": 0.3}}, shared)
    zero = {name: np.zeros_like(x) for name, x in delta.items()}
    got = merge(tmp_path, text, {"base": zero, "m0": delta})
    norm = sum(np.abs(x).sum() for x in delta.values())
    np.testing.assert_allclose(sum(np.abs(x).sum() for x in got.values()), norm, rtol=1e-6)
    assert np.count_nonzero(got["a"]) < 10 < np.count_nonzero(got["b"])


def test_breadcrumbs_ties_elect_signs_among_what_is_kept(tmp_path: Path) -> None:
    experts = [[9, 2, 1, -0.5], [9, -3, 1, -0.5]]
    each = {"weight": 0.5, "density": 0.5, "gamma": 0.25}
    got = merged(tmp_path, "breadcrumbs_ties", None, experts, {"normalize": True}, each)
    assert got.tolist() == [0, -3, 1, 0]


# --- DELLA --------------------------------------------------------------------------------------


SHAPES = [(31, 257), (70000,), (5, 6, 7), (40, 1), (), (0, 4), (3, 2, 5000)]


@pytest.mark.parametrize("rescale", ["l1", "probability", "none"])
@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_della_keeps_entries_whose_word_is_below_their_chance(
    tmp_path: Path, method: str, rescale: str
) -> None:
    """Random words and chances by their definitions, for rows of odd length and long vectors."""
    rng = np.random.default_rng(5)
    names = {f"w{k}": shape for k, shape in enumerate(SHAPES)}
    base = {n: rng.standard_normal(s).astype("<f4") for n, s in names.items()}
    models = {"base": base} | {
        m: {n: (x + rng.standard_normal(x.shape) / 8).astype("<f4") for n, x in base.items()}
        for m in ("a", "b")
    }
    own = {"a": (0.75, 0.5, 0.25), "b": (0.5, 0.7, 0.1)}
    keys = "weight", "density", "epsilon"
    each = {m: dict(zip(keys, values, strict=True)) for m, values in own.items()}
    text = recipe(method, each, {"rescale": rescale, "normalize": False})
    got = merge(tmp_path, text, models, seed=7)
    weights, densities, epsilons = (list(values) for values in zip(*own.values(), strict=True))
    assert got.pop("w5").shape == (0, 4)
    for name in got:
        x, masks = base[name], []
        for m, (_, density, epsilon) in own.items():
            chance = oracles.della_chances(models[m][name] - x, density, epsilon)
            words = oracles.random_words(7, m, name, x.size).reshape(x.shape)
            masks.append(words < np.floor(chance * 2.0**32))
        want = oracles.della(
            x, [models[m][name] for m in own], weights, densities, epsilons, masks,
            rescale, method == "della", normalize=False,
        )  # fmt: skip
        np.testing.assert_allclose(got[name], want, rtol=1e-6, atol=1e-6)


def test_della_chances_rise_with_the_rank(tmp_path: Path) -> None:
    """Density 0.5, epsilon 0.2: of 100 000 entries in ten groups by size, 0.32, 0.36 ... stay."""
    delta = np.random.default_rng(6).permutation(np.arange(1.0, 100_001))
    each = {"weight": 1.0, "density": 0.5, "epsilon": 0.2}
    got = merged(tmp_path, "della_linear", None, [delta], {"rescale": "none"}, each)
    kept = (got != 0)[np.argsort(delta)].reshape(10, -1).mean(axis=1)
    np.testing.assert_allclose(kept, 0.32 + 0.04 * np.arange(10), atol=4 * 0.5 / 100)


def test_della_divided_by_the_chance_is_unbiased(tmp_path: Path) -> None:
    """Each of ten groups by size keeps its sum, as in the paper; the L1 ratio shifts them."""
    delta = np.random.default_rng(6).permutation(np.linspace(1, 2, 100_000))
    each = {"weight": 1.0, "density": 0.5, "epsilon": 0.2}
    sums = {}
    for rescale in ("probability", "l1"):
        shared = {"rescale": rescale}
        got = merged(tmp_path / rescale, "della_linear", None, [delta], shared, each)
        groups = got[np.argsort(delta)].reshape(10, -1).sum(axis=1)
        sums[rescale] = groups / np.sort(delta).reshape(10, -1).sum(axis=1)
    np.testing.assert_allclose(sums["probability"], 1, atol=0.06)
    assert sums["l1"][0] < 0.7
    assert sums["l1"][-1] > 1.25


def test_della_of_rows_of_one_entry_keeps_the_density(tmp_path: Path) -> None:
    each = {"weight": 1.0, "density": 0.7, "epsilon": 0.2}
    got = merged(tmp_path, "della_linear", None, [np.ones((10_000, 1))], {"rescale": False}, each)
    assert abs(np.count_nonzero(got) / 10_000 - 0.7) < 4 * 0.46 / 100


@pytest.mark.parametrize("rescale", ["l1", "probability"])
def test_della_of_density_one_keeps_all_and_of_zero_nothing(tmp_path: Path, rescale: str) -> None:
    delta = np.random.default_rng(7).standard_normal((40, 50)).astype("<f4")
    for density, want in ((1.0, delta), (0.0, 0 * delta)):
        each = {"weight": 1.0, "density": density, "epsilon": 0.9}
        place = tmp_path / str(density)
        got = merged(place, "della_linear", None, [delta], {"rescale": rescale}, each)
        assert np.array_equal(got, want)


def test_della_chances_outside_zero_and_one_are_told_before_merging(tmp_path: Path) -> None:
    each = {"weight": 1.0, "density": 0.9, "epsilon": 0.1}
    with pytest.raises(UserError) as error:
        merged(tmp_path, "della", None, [np.ones(4)], {}, each)
    assert (
        "tensor w: density 0.9 and epsilon 0.1 give chances from 0.8 to 1, which must lie between "
        "0 and 1, both excluded. Make epsilon smaller." in str(error.value)
    )


def test_della_takes_mergekits_flags(tmp_path: Path) -> None:
    for given, meant in ((True, "l1"), (False, "none")):
        text = "merge_method: della\nbase_model: base\nmodels: [{model: a}]\nparameters: "
        (tmp_path / "r.yaml").write_text(text + f"{{weight: 1, rescale: {str(given).lower()}}}\n")
        loaded = load_recipe(tmp_path / "r.yaml")
        assert loaded.parameters["rescale"][0].value == meant


# --- SCE ----------------------------------------------------------------------------------------


def test_sce_weighs_by_squares_and_erases_minority_signs(tmp_path: Path) -> None:
    """Mean squares 4 and 1, so weights 0.8 and 0.2; the sums' signs are +, +, -, +."""
    experts = [[2, 2, -2, 2], [1, -1, -1, 1]]
    got = merged(tmp_path, "sce", None, experts)
    np.testing.assert_allclose(got, [1.8, 2, -1.8, 1.8], rtol=1e-6)


def test_sce_merges_only_the_entries_of_largest_variance(tmp_path: Path) -> None:
    """Of four entries with variances 1, 4, 0, 9 three can be chosen: int(0.7 * 3) = 2 are."""
    experts = [[1, 4, 5, 6], [3, 8, 5, 12]]
    one, two = 4**2 + 6**2, 8**2 + 12**2
    share = one / (one + two)
    want = [0, 4 * share + 8 * (1 - share), 0, 6 * share + 12 * (1 - share)]
    got = merged(tmp_path / "d", "sce", None, experts, {"select_topk": 0.7})
    np.testing.assert_allclose(got, want, rtol=1e-6)
    shared = {"select_topk": 0.7, "select": "weights"}
    got = merged(tmp_path / "w", "sce", None, experts, shared)
    want = [1 * share + 3 * (1 - share), want[1], 5, want[3]]
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_sce_keeps_the_lowest_index_of_equal_variances_across_blocks(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    one, two = rng.integers(-2, 3, (2, 2 * BLOCK + 17)).astype(float)
    got = merged(tmp_path, "sce", None, [one, two], {"select_topk": 0.55})
    variance = (one - two) ** 2 / 4
    chosen = np.argsort(-variance, kind="stable")[: int(0.55 * np.count_nonzero(variance))]
    mask = np.zeros(one.size, bool)
    mask[chosen] = True
    assert 0 < np.count_nonzero(mask & (variance == 1)) < np.count_nonzero(variance == 1)
    assert np.array_equal(got != 0, mask)


def test_sce_of_light_task_vectors_has_equal_weights_in_mergekit_only(tmp_path: Path) -> None:
    """Below a mean square of 1e-6 in all, mergekit's weights are equal."""
    experts = [np.full(50, 2e-4), np.full(50, 4e-4)]
    got = merged(tmp_path / "d", "sce", None, experts)
    np.testing.assert_allclose(got, 3e-4, rtol=1e-6)
    got = merged(tmp_path / "w", "sce", None, experts, {"select": "weights"})
    np.testing.assert_allclose(got, 2e-4 * 0.2 + 4e-4 * 0.8, rtol=1e-6)


@pytest.mark.parametrize("count", [1, 2])
def test_sce_without_selected_entries_gives_the_base(tmp_path: Path, count: int) -> None:
    """One expert has no variance, so nothing of it is selected; nor is a share of 0."""
    base, expert = np.arange(6.0), np.arange(6.0) ** 2
    topk = 0.9 if count == 1 else 0.0
    got = merged(tmp_path, "sce", base, [expert, -expert][:count], {"select_topk": topk})
    assert np.array_equal(got, base)


# --- RAM ----------------------------------------------------------------------------------------


RAM = [[1, 2, 0, 0.5, 4], [3, 0, 0, 0.5, -4], [8, 0, 5, 0.25, 0]]


def test_ram_adds_what_one_changed_and_averages_what_several_did(tmp_path: Path) -> None:
    """A change of just epsilon, 0.25 or 0.5, is none."""
    got = merged(tmp_path / "a", "ram", np.ones(5), np.array(RAM) + 1, {"epsilon": 0.25})
    assert got.tolist() == [5, 3, 6, 1.5, 1]
    got = merged(tmp_path / "b", "ram", np.ones(5), np.array(RAM) + 1, {"epsilon": 0.5})
    assert got.tolist() == [5, 3, 6, 1, 1]


def test_ramplus_enlarges_what_one_model_changed_alone(tmp_path: Path) -> None:
    """The first model shares 3 entries and has 1 of its own, the third 1 and 1: factors 2, 1.5."""
    shared = {"epsilon": 0.25, "r": 0.5, "alpha": 2.0}
    got = merged(tmp_path / "a", "ramplus_tl", None, RAM, shared)
    assert got.tolist() == [4, 4, 7.5, 0.5, 0]
    got = merged(tmp_path / "b", "ramplus_tl", None, RAM, {**shared, "alpha": 0.0})
    assert got.tolist() == [4, 2, 5, 0.5, 0]


def test_ramplus_counts_over_all_blocks(tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    experts = rng.integers(-1, 2, (3, 2 * BLOCK + 17)) * rng.integers(1, 3, (3, 2 * BLOCK + 17))
    zero = np.zeros(experts.shape[1])
    got = merged(tmp_path, "ramplus_tl", None, experts, {"r": 0.5, "alpha": 9.0})
    want = oracles.ram(zero, list(experts.astype(float)), 1e-5, 0.5, 9.0)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_weights_that_cancel_but_for_rounding_do_not_divide(tmp_path: Path) -> None:
    """0.3 - 0.1 - 0.2 is 1.5e-8 in float32; mergekit divides by it."""
    experts = {f"m{i}": {"weight": w} for i, w in enumerate((0.3, -0.1, -0.2))}
    text = recipe("task_arithmetic", experts, {"normalize": True})
    models = {"base": {"w": np.zeros(3)}} | {
        m: {"w": np.ones(3) * k} for k, m in enumerate(experts)
    }
    np.testing.assert_allclose(merge(tmp_path, text, models)["w"], -0.5, rtol=1e-6)
