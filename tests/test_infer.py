"""How a model was made, found out from its weights: every merge here is made by numpy alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import bf16_bits, read_model, write_model

from mergelab.checkpoint import open_checkpoint
from mergelab.errors import UserError
from mergelab.forensics.infer import infer
from mergelab.forensics.show import show

Tensors = dict[str, np.ndarray]
LAYERS, HIDDEN, INNER, VOCABULARY = 4, 48, 96, 64
KINDS = {
    "input_layernorm": (HIDDEN,),
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


def shapes(layers: int = LAYERS) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for i in range(layers):
        found |= {f"model.layers.{i}.{kind}.weight": shape for kind, shape in KINDS.items()}
    return {**found, "model.norm.weight": (HIDDEN,)}


def stored(tensors: Tensors) -> Tensors:
    """The values that a bfloat16 file holds."""
    return {
        name: (bf16_bits(values).astype("<u4") << 16).view("<f4").astype(float)
        for name, values in tensors.items()
    }


def family(moved: float = 0.002, seed: int = 5) -> dict[str, Tensors]:
    """A base and four experts of it, as stored."""
    random = np.random.default_rng(seed)
    base = stored(
        {n: 0.02 * random.standard_normal(s) + (len(s) == 1) for n, s in shapes().items()}
    )
    experts = {
        name: stored({n: v + moved * random.standard_t(5, v.shape) for n, v in base.items()})
        for name in "ABCD"
    }
    return {"base": base, **experts}


MODELS = family()


def taus(names: str, models: dict[str, Tensors] = MODELS) -> dict[str, Tensors]:
    base = models["base"]
    return {n: {key: models[n][key] - base[key] for key in base} for n in names}


def average(weights: dict[str, float], models: dict[str, Tensors] = MODELS) -> Tensors:
    return {key: sum(w * models[n][key] for n, w in weights.items()) for key in models["base"]}


def arithmetic(weights: dict[str, float], models: dict[str, Tensors] = MODELS) -> Tensors:
    return average({"base": 1 - sum(weights.values()), **weights}, models)


def slerp(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    cosine = float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))
    if cosine > 0.9995:
        return (1 - t) * a + t * b
    theta = np.arccos(cosine)
    return (np.sin((1 - t) * theta) * a + np.sin(t * theta) * b) / np.sin(theta)


def top(tau: np.ndarray, density: float, outliers: float = 0.0) -> np.ndarray:
    """Mask of the largest magnitudes below the outliers."""
    first, kept = int(outliers * tau.size), int(density * tau.size)
    order = np.argsort(-np.abs(tau.ravel()), kind="stable")[first : first + kept]
    mask = np.zeros(tau.size, bool)
    mask[order] = True
    return mask.reshape(tau.shape)


def ties(weights: dict[str, float], densities: dict[str, float], *, normalize: bool) -> Tensors:
    """Trim, elect signs, mean (or sum) of what agrees."""
    found, moves = {}, taus("".join(weights))
    for key, base in MODELS["base"].items():
        kept = np.stack([moves[n][key] * top(moves[n][key], densities[n]) for n in weights])
        w = np.array(list(weights.values())).reshape(-1, *(1 for _ in base.shape))
        vote = np.where((w * kept).sum(axis=0) >= 0, 1.0, -1.0)
        agrees = (kept * vote) > 0
        share = (w * agrees).sum(axis=0)
        merged = (w * kept * agrees).sum(axis=0)
        found[key] = base + (merged / np.where(share, share, 1) if normalize else merged)
    return found


def dare(weights: dict[str, float], densities: dict[str, float], *, elect: bool) -> Tensors:
    random, found, moves = np.random.default_rng(1), {}, taus("".join(weights))
    for key, base in MODELS["base"].items():
        kept = np.stack([
            w * moves[n][key] * (random.random(base.shape) < densities[n]) / densities[n]
            for n, w in weights.items()
        ])  # fmt: skip
        vote = np.where(kept.sum(axis=0) >= 0, 1.0, -1.0)
        found[key] = base + (kept * ((kept * vote > 0) if elect else 1)).sum(axis=0)
    return found


def ask(
    folder: Path,
    child: Tensors,
    candidates: str = "ABCD",
    *,
    base: bool = False,
    models: dict[str, Tensors] = MODELS,
    dtype: str = "BF16",
    workers: int = 1,
) -> dict[str, Any]:
    """Write all models as files and ask how the child was made."""

    def opened(name: str, tensors: Tensors, dtype: str = "BF16") -> Any:
        layers = 1 + max(int(n.split(".")[2]) for n in tensors if ".layers." in n)
        place = write_model(folder / name, tensors, dtype, layers=layers)
        return open_checkpoint(place, name)

    return infer(
        opened("child", child, dtype),
        {n: opened(n, models[n]) for n in candidates},
        opened("base", models["base"]) if base else None,
        workers,
    )


def weights(reading: dict[str, Any]) -> dict[str, float]:
    return {p["name"]: p["weight"] for p in reading["parents"]}


def densities(reading: dict[str, Any]) -> dict[str, float]:
    return {p["name"]: p["density"] for p in reading["parents"]}


def methods(result: dict[str, Any]) -> list[str]:
    """The best hypothesis, and those that explain the weights as well."""
    told = result["hypotheses"]
    return [told[0]["method"], *(r["method"] for r in told[1:] if r["equal"])]


def clean(result: dict[str, Any]) -> bool:
    """Is everything explained, and nobody accused?"""
    best = result["hypotheses"][0]
    return best["rounding"] and not (result["undeclared"]["found"] or result["finetuned"]["found"])


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_a_linear_merge_gives_its_weights_and_no_decoy(tmp_path: Path, dtype: str) -> None:
    result = ask(tmp_path, average({"A": 0.35, "C": 0.65}), dtype=dtype)
    assert methods(result)[0] == "linear"
    assert clean(result)
    assert weights(result["hypotheses"][0]) == pytest.approx({"A": 0.35, "C": 0.65}, abs=1e-3)
    assert result["parents"] == ["A", "C"]
    assert len(result["layers"]) == len(shapes())
    assert all(e["r2"] > 0.99 for e in result["layers"] if e["group"] in ("attention", "mlp"))


def test_task_arithmetic_with_a_negative_weight(tmp_path: Path) -> None:
    result = ask(tmp_path, arithmetic({"B": 0.8, "D": -0.4}), base=True)
    assert methods(result) == ["task_arithmetic"]
    assert clean(result)
    assert weights(result["hypotheses"][0]) == pytest.approx({"B": 0.8, "D": -0.4}, abs=2e-3)


def test_weights_that_sum_to_one_are_linear_or_task_arithmetic(tmp_path: Path) -> None:
    result = ask(tmp_path, average({"A": 0.5, "B": 0.5}), base=True)
    assert methods(result)[:2] == ["linear", "task_arithmetic"]


def test_slerp_is_told_from_linear_by_the_angle_and_its_gradient_found(tmp_path: Path) -> None:
    child = {}
    for name, a in MODELS["A"].items():
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        place = layer / (LAYERS - 1)
        t = (
            0.2 + 0.6 * place
            if "self_attn" in name
            else 0.8 - 0.6 * place
            if "mlp" in name
            else 0.5
        )
        child[name] = slerp(a, MODELS["B"][name], t)
    result = ask(tmp_path, child)
    assert methods(result) == ["slerp"]
    assert clean(result)
    t = result["hypotheses"][0]["parameters"]["t"]
    assert t["self_attn"]["knots"] == pytest.approx([0.2, 0.8], abs=0.01)
    assert t["mlp"]["knots"] == pytest.approx([0.8, 0.2], abs=0.01)
    assert t["rest"]["value"] == pytest.approx(0.5, abs=0.01)


def test_slerp_of_nearly_parallel_weights_is_linear_as_well(tmp_path: Path) -> None:
    near = family(moved=0.0003)
    child = {name: slerp(a, near["B"][name], 0.3) for name, a in near["A"].items()}
    result = ask(tmp_path, child, models=near)
    assert methods(result) == ["linear", "slerp"]
    assert "nearly parallel" in result["hypotheses"][1]["why"]
    assert clean(result)


@pytest.mark.parametrize("normalize", [False, True])
def test_ties_gives_densities_and_weights(tmp_path: Path, normalize: bool) -> None:
    wanted, kept = {"A": 0.6, "B": 0.4}, {"A": 0.3, "B": 0.7}
    result = ask(tmp_path, ties(wanted, kept, normalize=normalize), "ABC", base=True)
    best = result["hypotheses"][0]
    assert best["method"] == "ties"
    assert best["parameters"]["normalize"] == normalize
    assert clean(result)
    assert weights(best) == pytest.approx(wanted, abs=0.01)
    assert densities(best) == pytest.approx(kept, abs=0.01)


@pytest.mark.parametrize("elect", [False, True])
def test_dare_gives_densities_and_weights(tmp_path: Path, elect: bool) -> None:
    wanted, kept = {"A": 0.6, "C": 0.5}, {"A": 0.4, "C": 0.8}
    result = ask(tmp_path, dare(wanted, kept, elect=elect), "ABC", base=True)
    best = result["hypotheses"][0]
    assert best["method"] == ("dare_ties" if elect else "dare_linear")
    assert clean(result)
    assert weights(best) == pytest.approx(wanted, abs=0.02)
    assert densities(best) == pytest.approx(kept, abs=0.02)


def test_breadcrumbs_drops_both_ends(tmp_path: Path) -> None:
    moves, child = taus("AD"), {}
    for key, base in MODELS["base"].items():
        child[key] = base + sum(
            w * moves[n][key] * top(moves[n][key], 0.6, 0.05) for n, w in (("A", 0.7), ("D", 0.5))
        )
    result = ask(tmp_path, child, base=True)
    best = result["hypotheses"][0]
    assert best["method"] == "breadcrumbs"
    assert best["parameters"]["gamma"] == pytest.approx(0.05, abs=0.01)
    assert densities(best) == pytest.approx({"A": 0.6, "D": 0.6}, abs=0.02)
    assert clean(result)


def test_a_base_among_the_candidates_is_recognised(tmp_path: Path) -> None:
    child = dare({"A": 0.6, "C": 0.5}, {"A": 0.4, "C": 0.5}, elect=False)
    models = {**MODELS, "Z": MODELS["base"]}
    result = ask(tmp_path, child, "ACZ", models=models)
    assert result["hypotheses"][0]["method"] == "dare_linear"
    assert result["base"] == "Z"
    assert result["parents"] == ["A", "C"]


def layer_of(model: Tensors, layer: int, number: int) -> Tensors:
    start = f"model.layers.{layer}."
    return {n.replace(start, f"model.layers.{number}."): v for n, v in model.items() if start in n}


def test_a_stack_of_slices_is_found_by_its_copies(tmp_path: Path) -> None:
    child = {n: v for n, v in MODELS["A"].items() if ".layers." not in n}
    for number, (name, layer) in enumerate([("A", 0), ("A", 1), ("A", 2), ("B", 1), ("B", 2)]):
        child |= layer_of(MODELS[name], layer, number)
    result = ask(tmp_path, child)
    best = result["hypotheses"][0]
    assert best["method"] == "passthrough"
    assert best["parameters"]["slices"] == [
        {"model": "A", "layers": [0, 3]},
        {"model": "B", "layers": [1, 3]},
    ]
    assert weights(best) == pytest.approx({"A": 0.6, "B": 0.4})
    row = next(e for e in result["layers"] if e["tensor"].startswith("model.layers.4.mlp.up"))
    assert row["copy_of"] == "B:model.layers.2.mlp.up_proj.weight"
    assert clean(result)


def test_merged_slices_are_compared_with_the_layers_that_they_come_from(tmp_path: Path) -> None:
    both = average({"A": 0.3, "B": 0.7})
    child = {n: v for n, v in both.items() if ".layers." not in n}
    for number, layer in enumerate([0, 1, 2, 1, 2, 3]):
        child |= layer_of(both, layer, number)
    result = ask(tmp_path, child)
    assert methods(result)[0] == "linear"
    assert weights(result["hypotheses"][0]) == pytest.approx({"A": 0.3, "B": 0.7}, abs=0.01)
    assert clean(result)


def test_a_mixture_of_dense_models_names_each_expert(tmp_path: Path) -> None:
    child = {n: v for n, v in MODELS["base"].items() if ".mlp." not in n}
    for layer in range(LAYERS):
        place = f"model.layers.{layer}."
        child[place + "block_sparse_moe.gate.weight"] = np.ones((2, HIDDEN))
        for number, name in enumerate("CA"):
            for dense, own in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
                key = f"{place}block_sparse_moe.experts.{number}.{own}.weight"
                child[key] = MODELS[name][f"{place}mlp.{dense}.weight"]
    result = ask(tmp_path, child, base=True)
    best = result["hypotheses"][0]
    assert best["method"] == "moe"
    assert best["parameters"] == {"experts": {"0": "C", "1": "A"}, "base": ["base"]}
    assert set(result["parents"]) == {"base", "A", "C"}
    assert clean(result)


def test_a_copy_is_called_a_copy(tmp_path: Path) -> None:
    result = ask(tmp_path, MODELS["B"])
    assert result["hypotheses"][0]["method"] == "copy"
    assert result["parents"] == ["B"]


def test_a_copy_in_another_dtype_is_not_said_to_have_the_same_bits(tmp_path: Path) -> None:
    every = sum(values.size for values in MODELS["B"].values())
    result = ask(tmp_path, MODELS["B"], dtype="F16")
    told = f"copy of B 1: all {every:,} entries are the same, rounded to its dtype"
    assert result["verdict"] == told
    assert "same bits" not in json.dumps(result)


def test_of_copies_every_entry_is_compared_and_of_other_tensors_a_part(tmp_path: Path) -> None:
    """Embeddings of twice as many entries as are looked at where a tensor is no copy."""
    random = np.random.default_rng(3)
    large = {n: random.standard_normal((2048, 32)) for n in ("base", "A", "B")}
    models = {n: stored({**MODELS[n], "lm_head.weight": large[n]}) for n in large}
    every = sum(values.size for values in models["A"].values())
    copy = ask(tmp_path / "copy", models["A"], "AB", models=models)
    assert copy["verdict"] == f"copy of A 1: all {every:,} entries have the same bits"
    assert copy["notes"] == []
    half = average({"A": 0.5, "B": 0.5}, models)
    merge = ask(
        tmp_path / "merge",
        {**half, "lm_head.weight": models["A"]["lm_head.weight"]},
        "AB",
        models=models,
    )
    assert not any("looked at" in note for note in merge["notes"])
    merge = ask(tmp_path / "all", half, "AB", models=models)
    assert merge["notes"][-1].startswith(f"looked at {every - 32768:,} of {every:,} entries")


def test_a_merge_of_a_merge_names_the_merge_if_it_is_a_candidate(tmp_path: Path) -> None:
    inner = stored(average({"A": 0.5, "B": 0.5}))
    models = {**MODELS, "M": inner}
    child = average({"M": 0.6, "C": 0.4}, models)
    assert set(ask(tmp_path / "1", child, "ABCM", models=models)["parents"]) == {"C", "M"}
    result = ask(tmp_path / "2", child, "ABCD")
    found = weights(result["hypotheses"][0])
    assert found == pytest.approx({"A": 0.3, "B": 0.3, "C": 0.4}, abs=0.005)
    assert clean(result)


@pytest.mark.parametrize("base", [False, True])
def test_an_undeclared_parent_is_found(tmp_path: Path, base: bool) -> None:
    result = ask(tmp_path, average({"A": 0.4, "B": 0.3, "C": 0.3}), "ABD", base=base)
    assert result["undeclared"]["found"]
    assert not result["finetuned"]["found"]
    assert "undeclared parent" in result["verdict"]
    assert not result["hypotheses"][0]["rounding"]


def test_an_undeclared_parent_of_a_masked_merge_is_found(tmp_path: Path) -> None:
    child = ties({"A": 0.5, "C": 0.5}, {"A": 0.5, "C": 0.5}, normalize=False)
    result = ask(tmp_path, child, "ABD", base=True)
    assert result["undeclared"]["found"]
    assert "A" in result["parents"]


def test_one_foreign_layer_is_found(tmp_path: Path) -> None:
    child = average({"A": 0.5, "B": 0.5}) | layer_of(MODELS["D"], 2, 2)
    result = ask(tmp_path, child, "ABC", base=True)
    assert result["undeclared"]["found"]
    assert result["parents"][:2] == ["A", "B"]


def test_one_foreign_layer_of_a_masked_merge_is_found(tmp_path: Path) -> None:
    child = ties({"A": 0.6, "B": 0.4}, {"A": 0.5, "B": 0.5}, normalize=False)
    child["model.layers.2.mlp.up_proj.weight"] = MODELS["D"]["model.layers.2.mlp.up_proj.weight"]
    result = ask(tmp_path, child, "ABC", base=True)
    assert result["undeclared"]["found"]
    assert "model.layers.2.mlp.up_proj.weight" in result["undeclared"]["why"]


@pytest.mark.parametrize("base", [False, True])
def test_training_after_a_merge_is_reported_as_such(tmp_path: Path, base: bool) -> None:
    random = np.random.default_rng(3)
    merged = average({"A": 0.5, "B": 0.5})
    child = {n: v + 0.00015 * random.standard_normal(v.shape) for n, v in merged.items()}
    result = ask(tmp_path, child, base=base)
    assert result["finetuned"]["found"]
    assert not result["undeclared"]["found"]
    assert weights(result["hypotheses"][0]) == pytest.approx({"A": 0.5, "B": 0.5}, abs=0.01)
    assert "do not rule out" in result["finetuned"]["why"]


def test_an_unrelated_model_has_no_parents(tmp_path: Path) -> None:
    result = ask(tmp_path, family(seed=99)["A"], "AB", base=True)
    assert result["undeclared"]["found"]
    assert not result["hypotheses"] or not result["hypotheses"][0]["rounding"]


def test_the_answer_is_json_and_does_not_depend_on_workers(tmp_path: Path) -> None:
    child = ties({"A": 0.6, "B": 0.4}, {"A": 0.5, "B": 0.5}, normalize=True)
    one, two = (ask(tmp_path, child, "ABC", base=True, workers=n) for n in (1, 2))
    assert json.dumps(one) == json.dumps(two)


def test_what_is_printed_names_the_parents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show(ask(tmp_path, average({"A": 0.25, "B": 0.75})))
    printed = capsys.readouterr().out
    assert "linear" in printed
    assert "A 0.25" in printed
    assert "undeclared: no" in printed


def test_candidates_of_the_same_weights_count_once(tmp_path: Path) -> None:
    models = {**MODELS, "E": MODELS["A"], "F": MODELS["base"]}
    result = ask(tmp_path, average({"A": 0.3, "B": 0.7}), "ABEF", base=True, models=models)
    assert result["candidates"] == ["A", "B"]
    assert [note for note in result["notes"] if "same weights" in note] == [
        "E has the same weights as A: left out",
        "F has the same weights as base: left out",
    ]


def test_tensors_that_a_candidate_lacks_and_values_that_are_not_finite_are_noted(
    tmp_path: Path,
) -> None:
    child = average({"A": 0.3, "B": 0.7})
    child["model.norm.weight"] = np.full(HIDDEN, np.nan)
    models = dict(MODELS)
    models["C"] = {n: v for n, v in MODELS["C"].items() if "layers.3" not in n}
    result = ask(tmp_path, child, "ABC", models=models)
    assert any("C lacks 6 of the tensors" in note for note in result["notes"])
    assert any("not finite" in note and "model.norm.weight" in note for note in result["notes"])
    assert weights(result["hypotheses"][0]) == pytest.approx({"A": 0.3, "B": 0.7}, abs=1e-3)


def test_nothing_to_compare_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no candidate parents are left"):
        ask(tmp_path, MODELS["A"], "")
    with pytest.raises(UserError, match="no candidate parents are left"):
        ask(tmp_path, MODELS["A"], "Z", base=True, models={**MODELS, "Z": MODELS["base"]})
    other = {"transformer.h.0.w": np.ones((8, 8)), "model.layers.0.x": np.ones(3)}
    with pytest.raises(UserError, match=r"shares no tensor .* same architecture"):
        ask(tmp_path, MODELS["A"], "Z", models={**MODELS, "Z": other})


def test_damaged_files_are_refused_before_any_arithmetic(tmp_path: Path) -> None:
    ask(tmp_path, MODELS["A"], "B")
    path = tmp_path / "B" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match="truncated"):
        open_checkpoint(path.parent, "B")
    assert read_model(tmp_path / "child")
