"""Laws of every merge method, each through the real planner and engine: METHODS is the list.

A method that is added to METHODS fails here until method_specs.SPECS says how to test it."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
from checkpoints import decode, encode, read_model, write_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from method_specs import SPECS, Given, Spec, merge, parameters, recipe, run
from oracles import Array

from mergelab.checkpoint import DTYPES
from mergelab.methods import METHODS

EVERY = pytest.mark.parametrize("method", sorted(METHODS))
RANDOM = {name for name, method in METHODS.items() if method.random}
SHAPES = {"matrix": (24, 31), "norm": (31,), "cube": (5, 6, 7)}
LARGE = {**SHAPES, "large": (300, 250)}
HALF_ULP = {"F64": 2.0**-53, "F32": 2.0**-24, "BF16": 2.0**-8, "F16": 2.0**-11}  # of 1 to 2
SMALLEST = {"F64": 0.0, "F32": 0.0, "BF16": 0.0, "F16": 2.0**-25}  # half of the least number
Models = dict[str, dict[str, Array]]


def spec_of(method: str) -> Spec:
    assert method in SPECS, f"add a row for {method} to SPECS in tests/method_specs.py"
    return SPECS[method]


def draw(count: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES, seed: int = 0) -> Models:
    """base and experts m0, m1, ... near it, as float32."""
    rng = np.random.default_rng(seed)
    base = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    models = {"base": base}
    for m in range(count):
        noise = {name: 0.1 * rng.standard_normal(shape) for name, shape in shapes.items()}
        models[f"m{m}"] = {name: base[name] + noise[name] for name in shapes}
    return {m: {k: v.astype("<f4") for k, v in tensors.items()} for m, tensors in models.items()}


def first_recipe(method: str, count: int, based: bool, **shared: Any) -> dict[str, Any]:
    """The first values of SPECS over m0, m1, ..."""
    common, own = parameters(spec_of(method), count)
    experts = {f"m{m}": values for m, values in enumerate(own)}
    common |= {name: value for name, value in shared.items() if name in common}
    return recipe(method, experts, common, "base" if based else None)


def used(recipe: Mapping[str, Any], models: Models) -> Models:
    """The models that a recipe names."""
    names = {entry["model"] for entry in recipe["models"]} | {recipe.get("base_model")}
    return {name: tensors for name, tensors in models.items() if name in names}


def test_every_row_tests_a_method() -> None:
    assert set(SPECS) >= set(METHODS), "add rows to SPECS in tests/method_specs.py"
    for name, method in METHODS.items():
        tested = {*SPECS[name].shared, *SPECS[name].each}
        assert tested == {p.name for p in method.parameters}, name


@EVERY
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_models_equal_to_the_base_give_the_base(tmp_path: Path, method: str, dtype: str) -> None:
    """To the bit; averages of whole models in float32 to two units in the last place."""
    spec = spec_of(method)
    base = draw(0)["base"]
    for k, based in enumerate(spec.based):
        text = first_recipe(method, spec.experts[0], based)
        models = used(text, dict.fromkeys(("base", "m0", "m1", "m2", "m3"), base))
        got = merge(tmp_path / str(k), text, models, dtype)
        for name, values in base.items():
            want = decode(encode(values, dtype), dtype).reshape(values.shape)
            exact = dtype == "BF16" or METHODS[method].base == "needed"
            unit = 0 if exact else 2 * np.spacing(np.abs(want).astype("<f4"))
            assert np.all(np.abs(got[name] - want) <= unit), name


@EVERY
def test_the_order_of_models_does_not_matter(tmp_path: Path, method: str) -> None:
    """To the two additions' rounding, at the largest term; masks of random methods not at all."""
    spec = spec_of(method)
    count = 2 if method in RANDOM else spec.experts[0]
    for k, based in enumerate(spec.based):
        text = first_recipe(method, count, based)
        text["models"] += [{"model": "base"}] if based else []
        turned = {**text, "models": text["models"][::-1]}
        models = used(text, draw(count))
        one, two = (merge(tmp_path / f"{k}{i}", r, models) for i, r in enumerate((text, turned)))
        for name in one:
            terms = [np.abs(tensors[name]) for tensors in models.values()]
            unit = np.spacing(np.max([np.abs(one[name]), *terms], axis=0).astype("<f4"))
            assert np.all(np.abs(one[name] - two[name]) <= 2 * unit * (method not in RANDOM)), name


@EVERY
def test_names_shards_and_workers_do_not_matter(tmp_path: Path, method: str) -> None:
    """Names of models are part of the random masks' keys, so random methods keep them."""
    spec = spec_of(method)
    text = first_recipe(method, spec.experts[0], spec.based[0])
    models = used(text, draw(spec.experts[0], LARGE))
    folders = {m: write_model(tmp_path / "whole" / m, t, "BF16", layers=0)
               for m, t in models.items()}  # fmt: skip
    want = read_model(run(tmp_path / "one", text, folders))
    renamed = {m: m if method in RANDOM else f"x/{9 - k}" for k, m in enumerate(models)}
    cut = {
        renamed[m]: write_model(tmp_path / "cut" / m, t, "BF16", layers=0, shards=3)
        for m, t in models.items()
    }
    text["models"] = [{**entry, "model": renamed[entry["model"]]} for entry in text["models"]]
    text |= {"base_model": renamed["base"]} if spec.based[0] else {}
    got = read_model(run(tmp_path / "two", text, cut, workers=3, shard_size=5000))
    assert want.keys() == got.keys()
    assert all(np.array_equal(want[name], got[name]) for name in want)


@EVERY
def test_permuting_rows_and_columns_commutes_with_merging(tmp_path: Path, method: str) -> None:
    """Units of a layer have no order. Random methods run at density 1: masks go by index."""
    spec = spec_of(method)
    rng = np.random.default_rng(5)
    order = {name: [rng.permutation(n) for n in shape] for name, shape in SHAPES.items()}
    for k, based in enumerate(spec.based):
        text = first_recipe(method, spec.experts[0], based)
        for entry in text["models"] if method in RANDOM else ():
            entry["parameters"]["density"] = 1.0
        models = used(text, draw(spec.experts[0]))
        moved = {m: {n: x[np.ix_(*order[n])] for n, x in t.items()} for m, t in models.items()}
        one, two = merge(tmp_path / f"{k}a", text, models), merge(tmp_path / f"{k}b", text, moved)
        for name in one:
            want = one[name][np.ix_(*order[name])]
            np.testing.assert_allclose(two[name], want, rtol=2e-7, atol=1e-7)


@pytest.mark.parametrize("method", sorted(name for name, spec in SPECS.items() if spec.scales))
def test_scaling_all_task_vectors_scales_the_merged_one(tmp_path: Path, method: str) -> None:
    spec = spec_of(method)
    text = first_recipe(method, spec.experts[0], True)
    models = used(text, draw(spec.experts[0]))
    zero = {name: np.zeros_like(x) for name, x in models["base"].items()}
    scaled = [
        {m: {n: f * x for n, x in t.items()} for m, t in models.items()} | {"base": zero}
        for f in (np.float32(1), np.float32(4))
    ]
    one, four = (merge(tmp_path / str(k), text, s) for k, s in enumerate(scaled))
    for name in one:
        np.testing.assert_allclose(four[name], 4 * one[name], rtol=1e-6)
        assert np.any(one[name])


@st.composite
def examples(draw: st.DrawFn, spec: Spec) -> dict[str, Any]:
    """Parameters, number of models, dtypes and shapes of one merge of small integers times unit.

    Sums and products of them are exact, so that every vote and every cut has one right answer."""
    count, based = draw(st.sampled_from(spec.experts)), draw(st.sampled_from(spec.based))
    start = {name: draw(st.integers(0, len(v) - 1)) for name, v in spec.each.items()}
    names = [f"m{m}" for m in range(count)]
    inputs = [*names, "base"] if based else names
    stored = st.sampled_from(["F32", "BF16", "BF16", "F16", "F64"])
    sides = st.sampled_from([0, 1, 3, 4, 5, 7])
    return {
        "based": based,
        "shared": {name: draw(st.sampled_from(v)) for name, v in spec.shared.items()},
        "experts": [
            {name: v[(start[name] + m) % len(v)] for name, v in spec.each.items()}
            for m in range(count)
        ],
        "labels": names,
        "dtypes": {name: draw(stored) for name in inputs},
        "out": draw(st.sampled_from([None, "float32", "bfloat16", "float16", "float64"])),
        "unit": draw(st.sampled_from([2.0**-6, 2.0**-20])),
        "seed": draw(st.integers(0, 2**32 - 1)),
        "workers": draw(st.integers(1, 2)),
        "shapes": {
            **{"scalar": (), "one": (1,), "none": (0,), "empty": (0, 4), "row": (1, 6)},
            **{"column": (6, 1), "matrix": (5, 8), "long": (4500,)},
            **{f"drawn{i}": tuple(draw(st.lists(sides, max_size=4))) for i in range(2)},
        },
    }


def integers(example: Mapping[str, Any], steps: Sequence[int]) -> Models:
    """Tensors of base and experts: integers of up to 8 bits times unit, exact in every dtype."""
    rng = np.random.default_rng(example["seed"])
    models: Models = {"base": {}} | {name: {} for name in example["labels"]}
    for name, shape in example["shapes"].items():
        sign = rng.choice([-1, 1], shape)
        base = sign * rng.integers(64, 128, shape)
        models["base"][name] = base * example["unit"]
        for label in example["labels"]:
            step = rng.choice(steps, shape) * rng.choice([-1, 1], shape)
            models[label][name] = (base + step) * example["unit"]
    return models


def expected(
    spec: Spec, example: Mapping[str, Any], models: Models, work: str, names: list[str]
) -> dict[str, Array]:
    """What the oracle gives for each tensor, in the working dtype."""
    cast = {m: {n: np.asarray(t[n], work) for n in names} for m, t in models.items()}
    facts = {key: example[key] for key in ("shared", "experts", "labels", "based")}
    flat = {m: np.concatenate([t[n].ravel() for n in sorted(names)]) for m, t in cast.items()}
    experts = [flat[m] for m in example["labels"]]
    all_at_once = Given("", flat["base"], experts, **facts)
    wide = example["shared"].get("scope") == "model"
    if wide and "flavour" in example["shared"]:
        merged = spec.oracle(all_at_once)
        ends = np.cumsum([cast["base"][n].size for n in sorted(names)])[:-1]
        parts = dict(zip(sorted(names), np.split(merged, ends), strict=True))
        return {name: parts[name].reshape(cast["base"][name].shape) for name in names}
    one = Given("", flat["base"], [], **facts, whole=(flat["base"], experts[0]) if wide else None)
    return {
        name: spec.oracle(
            dataclasses.replace(
                one,
                tensor=name,
                base=cast["base"][name],
                models=[cast[m][name] for m in example["labels"]],
            )
        )
        for name in names
    }


def out_dtype(example: Mapping[str, Any]) -> str:
    """The output's safetensors dtype: as asked, or what holds all inputs."""
    if example["out"]:
        return DTYPES[example["out"]]
    stored = set(example["dtypes"].values())
    return next((d for d in ("F64", "F32") if d in stored), None) or (
        "F32" if len(stored) > 1 else stored.pop()
    )


@EVERY
@given(data=st.data())
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_every_method_equals_its_oracle(method: str, data: st.DataObject) -> None:
    """Random parameters, shapes and dtypes; to rounding in the output's dtype."""
    spec = spec_of(method)
    example = data.draw(examples(spec))
    models = integers(example, spec.steps)
    experts = dict(zip(example["labels"], example["experts"], strict=True))
    base = "base" if example["based"] else None
    text = recipe(method, experts, example["shared"], base, example["out"])
    ids = {"ids": np.arange(10)}
    inputs = {m: t | ids for m, t in used(text, models).items()}
    with tempfile.TemporaryDirectory() as folder:
        got = merge(Path(folder), text, inputs, example["dtypes"], workers=example["workers"])
    dtype = out_dtype(example)
    work = "<f8" if "F64" in {dtype, *example["dtypes"].values()} else "<f4"
    assert np.array_equal(got.pop("ids"), ids["ids"])
    assert got.keys() == models["base"].keys()
    for name, want in expected(spec, example, models, work, list(got)).items():
        terms = [np.abs(tensors[name]) for tensors in inputs.values()]
        scale = np.max([np.abs(want), *terms], axis=0)
        slack = np.ldexp(HALF_ULP[dtype], np.frexp(want)[1] - 1) + SMALLEST[dtype]
        slack += scale * (2.0**-21 if work == "<f4" else 2.0**-40)
        wrong = np.abs(got[name] - want) > slack
        assert not np.any(wrong), (name, got[name][wrong][:5], want[wrong][:5])


def test_the_random_words_are_those_of_philox() -> None:
    """Test vectors of Random123 (Salmon et al. 2011), philox4x32, 10 rounds."""
    zeros, ones = [np.uint64(0)] * 4, [np.uint64(0xFFFFFFFF)] * 4
    assert oracles.philox(zeros, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    full = oracles.philox(ones, 2**64 - 1)
    assert full == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
