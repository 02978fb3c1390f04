"""What a recipe means: which tensors meet, and with which parameters (peer: mergekit 0.1.5)."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import llama, llama_tensors, read_model, write_model
from conftest import Run

from mergelab import engine, parameters
from mergelab.errors import UserError
from mergelab.estimate import bytes_hashed
from mergelab.methods import METHODS
from mergelab.methods.base import Parameter
from mergelab.parameters import ParameterReader, Setting, resolve
from mergelab.plan import SHARD_SIZE, Plan, make_plan
from mergelab.recipe import load_recipe
from mergelab.writer import Planned
from mergelab.yamlfile import parse

Q = "self_attn.q_proj.weight"
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small models base, a, b and c of four layers in the working directory."""
    for seed, name in enumerate(("base", "a", "b", "c")):
        llama(tmp_path / name, seed, layers=4)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def planned(text: str) -> Plan:
    """The plan of a recipe whose models are folders of the working directory."""
    Path("r.yaml").write_text(text)
    recipe = load_recipe(Path("r.yaml"))
    return make_plan(recipe, {m: Path(m) for m in recipe.models}, shard_size=SHARD_SIZE)


def tensors(text: str) -> dict[str, Planned]:
    return {tensor.name: tensor for tensor in planned(text).tensors}


def each(tensor: Planned, name: str) -> dict[str, Any]:
    """One per-model parameter of a planned tensor, by model."""
    return dict(zip(tensor.models, tensor.settings.each(name), strict=True))


def origin(tensor: Planned) -> list[str]:
    """model/tensor of every expert."""
    return [f"{source.file.parent.name}/{source.name}" for source in tensor.experts]


# ---- slices


THREE = """\
merge_method: linear
parameters: {weight: 0.5}
slices:
- sources: [{model: a, layer_range: [1, 3]}]
  parameters: {weight: 0.25}
- sources:
  - {model: a, layer_range: [0, 1]}
  - {model: b, layer_range: [3, 4]}
  - {model: c, layer_range: [2, 3]}
"""


def test_layers_of_different_models_meet_by_their_place_in_the_slice(place: Path) -> None:
    got = tensors(THREE)
    assert origin(got[f"model.layers.1.{Q}"]) == [f"a/model.layers.2.{Q}"]
    assert origin(got[f"model.layers.2.{Q}"]) == [
        f"a/model.layers.0.{Q}",
        f"b/model.layers.3.{Q}",
        f"c/model.layers.2.{Q}",
    ]
    assert not any(name.startswith("model.layers.3.") for name in got)


def test_what_precedes_layers_is_of_the_first_slice_and_the_rest_of_all_of_the_last(
    place: Path,
) -> None:
    """The peer drops the last slice's models beyond the number of the first slice's."""
    got = tensors(THREE)
    assert each(got[EMBEDDING], "weight") == {"a": 0.25}
    assert each(got[NORM], "weight") == {"a": 0.5, "b": 0.5, "c": 0.5}


OWN_BASE = """\
merge_method: task_arithmetic
dtype: float32
slices:
- base_model: base
  sources:
  - {model: base, layer_range: [0, 2]}
  - {model: a, layer_range: [0, 2], parameters: {weight: 0.5}}
- base_model: b
  sources:
  - {model: b, layer_range: [0, 2]}
  - {model: c, layer_range: [2, 4], parameters: {weight: 2}}
"""


def test_each_slice_may_have_a_base_of_its_own(mergelab: Run, place: Path) -> None:
    (place / "r.yaml").write_text(OWN_BASE)
    done = mergelab("merge", "r.yaml", "-o", "out")
    assert done.returncode == 0, done.stderr
    base, a, b, c, got = (read_model(place / n) for n in ("base", "a", "b", "c", "out"))
    first, second = f"model.layers.1.{Q}", f"model.layers.3.{Q}"
    np.testing.assert_allclose(got[first], base[first] + 0.5 * (a[first] - base[first]), atol=1e-6)
    below = b[first] + 2 * (c[second] - b[first])
    np.testing.assert_allclose(got[second], below, atol=1e-5)
    np.testing.assert_allclose(got[NORM], b[NORM] + 2 * (c[NORM] - b[NORM]), atol=1e-5)


def test_a_slice_may_not_base_itself_on_a_model_that_it_does_not_list(place: Path) -> None:
    with pytest.raises(UserError, match=r"r\.yaml:4: this slice does not list the base_model c"):
        planned(OWN_BASE.replace("base_model: base", "base_model: c"))
    with pytest.raises(UserError, match="task_arithmetic needs a 'base_model'"):
        planned(OWN_BASE.replace("base_model: base\n  ", ""))


def test_the_base_of_the_recipe_holds_where_a_slice_has_none(place: Path) -> None:
    text = OWN_BASE.replace("base_model: base\n  ", "").replace("dtype", "base_model: base\ndtype")
    got = tensors(text)
    bases = [got[f"model.layers.{i}.{Q}"].base for i in range(4)]
    assert [base.file.parent.name for base in bases if base] == ["base", "base", "b", "b"]


def test_a_layer_that_a_model_does_not_have_is_a_mistake_with_its_line(place: Path) -> None:
    with pytest.raises(UserError, match=r"r\.yaml:8: model b has 4 layers, layer_range ends at 5"):
        planned(THREE.replace("[3, 4]", "[4, 5]"))
    with pytest.raises(UserError, match="must span the same number of layers"):
        planned(THREE.replace("[3, 4]", "[2, 4]"))
    with pytest.raises(UserError, match="'residual_weight' has no effect in mergekit"):
        planned(THREE.replace("  parameters: {weight: 0.25}", "  residual_weight: 0.5"))


# ---- parameters


LEVELS = """\
merge_method: ties
base_model: base
parameters:
  weight: 0.1
  density: [{filter: mlp, value: 0.2}, {filter: "*", value: 0.3}, {filter: mlp, value: 0.9}]
  lambda: [0, 1]
slices:
- parameters: {weight: {filter: q_proj, value: 0.4}, lambda: []}
  sources:
  - {model: base, layer_range: [0, 4], parameters: {weight: 7, density: 0.01}}
  - model: a
    layer_range: [0, 4]
    parameters: {weight: [{filter: layers.2.self_attn.q_proj.weight, value: 0.5}]}
  - {model: b, layer_range: [0, 4]}
"""


def test_model_then_slice_then_recipe_and_a_level_without_a_match_falls_through(
    place: Path,
) -> None:
    got = tensors(LEVELS)
    weights = {i: each(got[f"model.layers.{i}.{Q}"], "weight") for i in (1, 2)}
    assert weights == {1: {"a": 0.4, "b": 0.4}, 2: {"a": 0.5, "b": 0.4}}
    assert each(got[NORM], "weight") == {"a": 0.1, "b": 0.1}
    densities = [
        each(got[f"model.layers.0.{n}"], "density")["a"] for n in (Q, "mlp.up_proj.weight")
    ]
    assert densities == [0.3, 0.2]


def test_the_own_parameters_of_the_base_are_ignored(place: Path) -> None:
    got = tensors(LEVELS)[f"model.layers.0.{Q}"]
    assert got.models == ("a", "b")
    assert got.base is not None
    assert got.base.file.parent.name == "base"


def test_gradients_run_over_each_slice_and_begin_outside_layers(place: Path) -> None:
    text = LEVELS.replace("[0, 4]", "[0, 3]").replace("[0, 1]", "[0, 0.25, 1]")
    last = "- sources:\n" + "".join(
        f"  - {{model: {m}, layer_range: [3, 4]}}\n" for m in ("base", "a", "b")
    )
    got = tensors(text + last)
    lambdas = [got[f"model.layers.{i}.{Q}"].settings.shared["lambda"] for i in range(4)]
    assert lambdas == [0, 0.25, 1, 1]  # the only layer of the last slice stands at its end
    assert [got[n].settings.shared["lambda"] for n in (EMBEDDING, NORM)] == [0, 0]


def test_a_model_parameter_matches_its_own_name_a_shared_one_the_name_in_the_output(
    place: Path,
) -> None:
    text = """\
merge_method: task_arithmetic
base_model: base
parameters: {lambda: [{filter: layers.0., value: 3}, {value: 4}], weight: 1}
slices:
- sources:
  - {model: base, layer_range: [2, 4]}
  - {model: a, layer_range: [2, 4], parameters: {weight: [{filter: layers.2., value: 5}]}}
"""
    got = tensors(text)
    layers = [got[f"model.layers.{i}.{Q}"] for i in (0, 1)]
    assert [each(t, "weight")["a"] for t in layers] == [5, 1]
    assert [t.settings.shared["lambda"] for t in layers] == [3, 4]


def test_flags_and_texts_of_a_list_are_picked_not_interpolated() -> None:
    flag, text = Setting((True, False, True), None), Setting(("x", "y"), None)
    assert [flag.at(p) for p in (0, 0.49, 0.5, 0.99, 1)] == [True, True, False, False, True]
    assert [text.at(p) for p in (0, 0.99, 1)] == ["x", "x", "y"]


def test_a_gradient_may_stand_inside_a_filter(place: Path) -> None:
    got = tensors(LEVELS.replace("value: 0.5}", "value: [0, 3]}"))
    assert each(got[f"model.layers.2.{Q}"], "weight")["a"] == 2


CHOICE = Parameter(
    "rescale", "choice", False, "l1", "", choices=("l1", "none"), aliases={True: "l1"}
)
COUNT = Parameter("max_iter", "integer", False, 10, "", 0)


def read(parameter: Parameter, text: str) -> tuple[Any, str]:
    """The first layer's value of a parameter and the mistakes told, from the text of its value."""
    reader = ParameterReader(Path("r.yaml"))
    reader.method = replace(METHODS["passthrough"], parameters=(parameter,))
    settings = reader.parameters(parse(f"{parameter.name}: {text}", Path("r.yaml")))
    return resolve(parameter, [settings], "w", 0.0), "; ".join(reader.problems.found)


@pytest.mark.parametrize(
    ("parameter", "text", "value", "mistake"),
    [
        (CHOICE, "none", "none", ""),
        (CHOICE, "true", "l1", ""),
        (CHOICE, "[none, l1]", "none", ""),
        (CHOICE, "[{filter: x, value: none}]", "l1", ""),
        (CHOICE, "nome", "", "'rescale' must be one of l1, none, true, not 'nome'. Did you mean"),
        (CHOICE, "2", "", "'rescale' must be one of l1, none, true, not 2."),
        (COUNT, "'1e1'", 10, ""),
        (COUNT, "[4, 6]", 4, ""),
        (COUNT, "1.5", 1.5, "'max_iter' must be an integer, not 1.5"),
        (COUNT, "-1", -1, "'max_iter' must be 0 or more, not -1"),
    ],
)
def test_choices_and_integers(parameter: Parameter, text: str, value: Any, mistake: str) -> None:
    got, told = read(parameter, text)
    assert got == value
    assert type(got) is type(value)
    assert mistake in told
    assert bool(mistake) == bool(told)


def test_a_gradient_of_integers_that_gives_a_fraction_is_refused(place: Path) -> None:
    text = "merge_method: karcher\nparameters: {max_iter: [%s]}\nmodels: [{model: a}, {model: b}]\n"
    counts = tensors(text % "1, 4")
    got = [counts[f"model.layers.{i}.{Q}"].settings.shared["max_iter"] for i in range(4)]
    assert got == [1, 2, 3, 4]
    with pytest.raises(UserError, match=r"gradient of 'max_iter' gives 1\.33333 for tensor"):
        planned(text % "1, 2")


@pytest.mark.parametrize(
    ("parameter", "told"),
    [
        (METHODS["ties"].parameter("density"), "density (per model, 0 to 1)"),
        (METHODS["nearswap"].parameter("t"), "t (0 or more)"),
        (METHODS["karcher"].parameter("weight"), "weight (per model, 0 or more)"),
        (METHODS["ties"].parameter("lambda"), "lambda"),
        (replace(COUNT, low=None, high=9), "max_iter (at most 9)"),
    ],
)
def test_a_mistaken_name_is_answered_with_the_bounds_of_each_parameter(
    parameter: Parameter, told: str
) -> None:
    assert parameters.describe(parameter) == told


# ---- data types


def test_dtypes_may_differ_by_tensor(mergelab: Run, place: Path) -> None:
    (place / "r.yaml").write_text(
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n"
        "out_dtype: [{filter: norm, value: float32}]\n"
        "dtype: [{filter: layers.1., value: float16}, {filter: embed, value: float64}]\n"
    )
    done = mergelab("merge", "r.yaml", "-o", "out")
    assert done.returncode == 0, done.stderr
    kinds = {t.name: t.dtype for t in planned((place / "r.yaml").read_text()).tensors}
    assert kinds[f"model.layers.0.{Q}"] == "BF16"  # as stored: no entry matches
    assert kinds[f"model.layers.1.{Q}"] == "F16"
    assert kinds["model.layers.1.input_layernorm.weight"] == "F32"
    assert kinds[EMBEDDING] == "F64"
    got, want = read_model(place / "out"), read_model(place / "a")
    assert np.array_equal(got[EMBEDDING], want[EMBEDDING])
    with pytest.raises(UserError, match=r"r\.yaml:2: dtype 'flot16' is not supported\. Did you"):
        planned(
            "merge_method: passthrough\ndtype: [{filter: a, value: flot16}]\nmodels: [{model: a}]\n"
        )


# ---- bases and tensors that not all models have


NUSLERP = """\
merge_method: nuslerp
parameters: {weight: 1}
models: [{model: a}, {model: b}]
"""


def test_an_optional_base_is_a_base_wherever_it_is_named(place: Path) -> None:
    assert tensors(NUSLERP)[NORM].base is None
    based = "base_model: base\n" + NUSLERP
    for text in (based, based.replace("[{model: a}", "[{model: base}, {model: a}")):
        got = tensors(text)[NORM]
        assert got.base is not None
        assert got.models == ("a", "b")
    with pytest.raises(UserError, match=r"nuslerp needs 2 model\(s\) besides its base, not 1"):
        planned(NUSLERP.replace("merge_method", "base_model: a\nmerge_method"))


def with_head(folder: Path, seed: int) -> None:
    """A model with a bias that no other has."""
    write_model(folder, {**llama_tensors(seed, 4), "extra.bias": np.ones(3)}, layers=4)


PAIR = "merge_method: %s\nbase_model: base\nparameters: {%s}\nmodels: [{model: a}]\n"
STOCK = "merge_method: model_stock\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"


@pytest.mark.parametrize(
    ("text", "owner", "fate"),
    [
        (PAIR % ("slerp", "t: 0.5"), "a", "copied"),
        (PAIR % ("slerp", "t: 0.5"), "base", "copied"),
        (NUSLERP, "b", "copied"),
        (PAIR % ("nearswap", "t: 0.5"), "base", "copied"),
        (PAIR % ("nearswap", "t: 0.5"), "a", "missing"),
        (STOCK, "base", "copied"),
        (STOCK, "a", "left out"),
        (PAIR % ("ties", "weight: 1"), "a", "missing"),
        (PAIR % ("ties", "weight: 1"), "base", "missing"),
    ],
)
def test_a_tensor_that_one_model_has_follows_the_rule_of_the_method(
    place: Path, text: str, owner: str, fate: str
) -> None:
    with_head(place / owner, 1)
    if fate == "missing":
        with pytest.raises(UserError, match=r"tensor extra\.bias is missing, but another model"):
            planned(text)
        return
    plan = planned(text)
    assert any(fate in note and "extra.bias" in note for note in plan.warnings)
    got = {t.name: t for t in plan.tensors}
    assert ("extra.bias" in got) == (fate == "copied")
    if fate == "copied":
        assert got["extra.bias"].copied
        assert origin(got["extra.bias"]) == [f"{owner}/extra.bias"]


def test_tables_that_older_loaders_stored_are_left_out_unless_all_models_have_them(
    place: Path,
) -> None:
    tables = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4),  # Llama 2
        "model.layers.0.attn.bias": np.ones((1, 1, 4, 4)),  # GPT-2
        "model.layers.0.attn.masked_bias": np.ones(()),
        "model.position_ids": np.arange(4),  # BERT
    }
    text = PAIR % ("ties", "weight: 1")
    write_model(place / "base", llama_tensors(0, 4) | tables, layers=4)
    plan = planned(text)
    assert not tables.keys() & {t.name for t in plan.tensors}
    assert any("left out" in note and "rotary_emb.inv_freq" in note for note in plan.warnings)
    write_model(place / "a", llama_tensors(1, 4) | tables, layers=4)
    assert tables.keys() <= {t.name for t in planned(text).tensors}
    longer = tables | {"model.layers.0.attn.bias": np.ones((1, 1, 8, 8))}
    write_model(place / "a", llama_tensors(1, 4) | longer, layers=4)
    assert "model.layers.0.attn.bias" not in {t.name for t in planned(text).tensors}
    bias = {"model.layers.0.attn.bias": np.ones(4)}  # no mask: a weight
    write_model(place / "base", llama_tensors(0, 4) | tables | bias, layers=4)
    write_model(place / "a", llama_tensors(1, 4), layers=4)
    with pytest.raises(UserError, match=r"tensor model\.layers\.0\.attn\.bias is missing"):
        planned(text)


@pytest.mark.parametrize(
    ("embedding", "tied"),
    [
        ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
        ("roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"),
        ("distilbert.embeddings.word_embeddings.weight", "vocab_projector.weight"),
        ("backbone.embeddings.weight", "lm_head.weight"),  # Mamba
        ("shared.weight", "encoder.embed_tokens.weight"),  # T5
        ("shared.weight", "decoder.embed_tokens.weight"),
        ("shared.weight", "lm_head.weight"),
    ],
)
def test_a_model_without_a_tied_tensor_lends_its_embedding(
    place: Path, embedding: str, tied: str
) -> None:
    write_model(place / "base", {embedding: np.ones((4, 4)), tied: np.ones((4, 4))})
    write_model(place / "a", {embedding: np.zeros((4, 4))})
    got = tensors(PAIR % ("ties", "weight: 1"))
    assert origin(got[tied]) == [f"a/{embedding}"]
    assert got[tied].base is not None
    assert got[tied].base.name == tied


@pytest.mark.parametrize(
    ("embedding", "tied"),
    [
        ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
        ("roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"),
        ("shared.weight", "decoder.embed_tokens.weight"),
        ("shared.weight", "lm_head.weight"),
    ],
)
def test_what_the_base_ties_is_left_out_where_untying_would_change_more(
    place: Path, embedding: str, tied: str
) -> None:
    write_model(place / "base", {embedding: np.ones((4, 4))})
    write_model(place / "a", {embedding: np.zeros((4, 4)), tied: np.zeros((4, 4))})
    plan = planned(PAIR % ("ties", "weight: 1"))
    assert [t.name for t in plan.tensors] == [embedding]
    assert plan.config["tie_word_embeddings"] is True
    assert f"left out, as base ties it to its embedding: {tied}" in plan.warnings


BARE = {
    "wte.weight": np.ones((4, 4)),
    "h.0.ln_1.weight": np.ones(4),
    "h.0.attn.c_attn.weight": np.ones((4, 12)),
    "ln_f.weight": np.ones(4),
}
NESTED = {f"transformer.{name}": values for name, values in BARE.items()}
OLD = {
    "bert.embeddings.LayerNorm.gamma": np.ones(4),
    "bert.embeddings.LayerNorm.beta": np.ones(4),
    "bert.encoder.layer.0.output.dense.weight": np.ones((4, 4)),
}
NEW = {n.replace("gamma", "weight").replace("beta", "bias"): v for n, v in OLD.items()}
HEADLESS = {n.removeprefix("bert."): v for n, v in NEW.items()}


@pytest.mark.parametrize(
    ("base", "expert"), [(BARE, NESTED), (OLD, NEW), (NEW, HEADLESS), (OLD, HEADLESS)]
)
def test_models_that_spell_their_tensors_otherwise_are_merged_in_the_spelling_of_the_base(
    place: Path, base: dict[str, Any], expert: dict[str, Any]
) -> None:
    for first, second in ((base, expert), (expert, base)):
        write_model(place / "base", first, layers=1)
        write_model(place / "a", second, layers=1)
        got = tensors(PAIR % ("ties", "weight: 1"))
        assert list(got) == sorted(first)
        assert {origin(t)[0] for t in got.values()} == {f"a/{name}" for name in second}


def test_a_deeper_model_is_respelled_in_all_its_layers(place: Path) -> None:
    write_model(place / "x", BARE, layers=1)
    deep = NESTED | {n.replace(".0.", ".1."): v for n, v in NESTED.items() if ".0." in n}
    write_model(place / "y", deep, layers=2)
    text = (
        "merge_method: passthrough\nslices:\n- sources: [{model: x, layer_range: [0, 1]}]\n"
        "- sources: [{model: y, layer_range: [1, 2]}]\n"
    )
    got = tensors(text)
    assert origin(got["h.1.ln_1.weight"]) == ["y/transformer.h.1.ln_1.weight"]
    assert origin(got["ln_f.weight"]) == ["y/transformer.ln_f.weight"]


def test_a_model_that_lacks_a_whole_layer_is_damaged_and_refused(place: Path) -> None:
    llama(place / "a", 1, layers=3)
    with pytest.raises(UserError, match=r"model a: tensor model\.layers\.3\.\S+ is missing"):
        planned(PAIR % ("slerp", "t: 0.5"))


def test_entries_that_are_not_finite_pass_only_if_the_recipe_allows_them(
    mergelab: Run, place: Path
) -> None:
    values = llama_tensors(1, 4)
    values[NORM][0] = np.inf
    write_model(place / "a", values, layers=4)
    text = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n"
    (place / "r.yaml").write_text(text)
    done = mergelab("merge", "r.yaml", "-o", "out")
    assert done.returncode == 2
    assert f"tensor {NORM}" in done.stderr
    (place / "r.yaml").write_text(text + "allow_not_finite: true\n")
    done = mergelab("merge", "r.yaml", "-o", "out")
    assert done.returncode == 0, done.stderr
    assert read_model(place / "out")[NORM][0] == np.inf


def test_a_survey_of_the_whole_model_has_one_density(place: Path) -> None:
    density = "density: [{filter: mlp, value: 0.25}, {value: 1}]"
    text = (
        "merge_method: ties\nbase_model: base\nparameters: {scope: model}\n"
        f"models: [{{model: a, parameters: {{weight: [0.5, 1], {density}}}}}]\n"
    )
    (place / "r.yaml").write_text(text)
    recipe = load_recipe(place / "r.yaml")
    folders = {name: place / name for name in recipe.models}
    with pytest.raises(UserError, match="density of a must be one for all tensors"):
        make_plan(recipe, folders, shard_size=SHARD_SIZE)
    (place / "r.yaml").write_text(text.replace(density, "density: 0.25"))
    make_plan(load_recipe(place / "r.yaml"), folders, shard_size=SHARD_SIZE)


def test_a_survey_of_the_whole_model_has_one_list_of_models(place: Path) -> None:
    def slice(models: str, layer: int) -> str:
        listed = ", ".join(
            f"{{model: {m}, layer_range: [{layer}, {layer + 1}], parameters: {{weight: 1}}}}"
            for m in models.split()
        )
        return f"- sources: [{listed}]\n"

    head = "merge_method: ties\nbase_model: base\nparameters: {scope: model, density: 0.5}\n"
    for first, second in (("base a b", "base a"), ("base a b", "base b a")):
        text = head + "slices:\n" + slice(first, 0) + slice(second, 1)
        (place / "r.yaml").write_text(text)
        recipe = load_recipe(place / "r.yaml")
        folders = {name: place / name for name in recipe.models}
        with pytest.raises(UserError, match="the list of models must be one for all tensors"):
            make_plan(recipe, folders, shard_size=SHARD_SIZE)


def stacked(place: Path, first: str, second: str) -> Plan:
    """A plan of layer 0 of one model, then layer 0 of another."""
    text = "merge_method: passthrough\nslices:\n"
    for name in (first, second):
        text += f"- sources: [{{model: {name}, layer_range: [0, 1]}}]\n"
    (place / "r.yaml").write_text(text)
    recipe = load_recipe(place / "r.yaml")
    folders = {name: place / name for name in recipe.models}
    return make_plan(recipe, folders, shard_size=SHARD_SIZE)


def test_the_head_of_gpt_neox_is_of_the_last_slice(place: Path) -> None:
    for seed, name in enumerate("xy"):
        rng = np.random.default_rng(seed)
        names = ("gpt_neox.embed_in.weight", "gpt_neox.layers.0.mlp.weight", "embed_out.weight")
        tensors = {n: rng.standard_normal((4, 4)) for n in names}
        write_model(place / name, tensors, layers=1)
    planned = {t.name: t for t in stacked(place, "x", "y").tensors}
    assert planned["gpt_neox.embed_in.weight"].models == ("x",)
    assert planned["embed_out.weight"].models == ("y",)


def test_models_that_name_their_layers_otherwise_are_not_stacked(place: Path) -> None:
    for name, prefix in (("x", "model.layers"), ("y", "transformer.h")):
        write_model(place / name, {f"{prefix}.0.mlp.weight": np.ones((2, 2))}, layers=1)
    with pytest.raises(UserError, match=r"names its layers transformer.h, not model.layers"):
        stacked(place, "x", "y")


def test_slices_of_a_model_with_several_stacks_need_modules(place: Path) -> None:
    tensors = {f"vision.blocks.{i}.w": np.ones((2, 2)) for i in range(3)}
    tensors |= {f"model.layers.{i}.w": np.ones((2, 2)) for i in range(2)}
    write_model(place / "x", tensors, layers=7)
    with pytest.raises(UserError, match=r"several stacks of layers \(model.layers, vision.blocks"):
        stacked(place, "x", "x")
    config = {"text_config": {"num_hidden_layers": 2}}
    (place / "x/config.json").write_text(json.dumps(config))
    names = {t.name for t in stacked(place, "x", "x").tensors}
    assert "model.layers.1.w" in names


def test_mergekits_long_names_of_models_and_dtypes_are_read(place: Path) -> None:
    text = (
        "merge_method: linear\ndtype: torch.bfloat16\n"
        "base_model: {model: {path: org/base, revision: v1}}\n"
        "models:\n- {model: {model: {path: a}, lora: {path: x}, override_architecture: null},"
        " parameters: {weight: 1}}\n"
        "- {model: {path: b}, parameters: {weight: 1}}\n"
    )
    (place / "r.yaml").write_text(text)
    recipe = load_recipe(place / "r.yaml")
    assert recipe.models == ("a+x", "b", "org/base@v1")
    assert recipe.dtype[0].value == "bfloat16"


# ---- what is read


def wide(folder: Path, seed: int) -> None:
    """A model of four layers of 0.5 MB, a fine-tune as the others are."""
    shared, own = np.random.default_rng(9), np.random.default_rng(seed)
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (512, 512) for i in range(4)}
    write_model(
        folder,
        {n: shared.standard_normal(s) + own.standard_normal(s) / 9 for n, s in shapes.items()},
        layers=4,
    )


STACK = "merge_method: passthrough\nslices:\n" + "".join(
    f"- sources: [{{model: {model}, layer_range: {span}}}]\n"
    for model, span in (("a", "[0, 4]"), ("a", "[1, 3]"), ("b", "[3, 4]"))
)
BREADCRUMBS = PAIR % ("breadcrumbs", "weight: 1, density: 0.5, rescale: true")


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        (NUSLERP, (2, 2)),
        (NUSLERP.replace("nuslerp", "linear"), (1, 1)),
        (STACK, (1, 1)),
        (PAIR % ("ties", "weight: 1, density: 0.5"), (2, 3)),
        (PAIR % ("ties", "weight: 1, density: 1"), (1, 1)),
        (PAIR % ("ties", "weight: 1, density: 0.5, scope: model"), (4, 4)),
        (BREADCRUMBS, (3, 4)),
    ],
)
def test_a_merge_reads_what_its_plan_says(place: Path, text: str, passes: tuple[int, int]) -> None:
    engine.merge(planned(text), place / "small")  # loads what is compiled
    for name in ("base", "a", "b"):
        shutil.rmtree(place / name)
        wide(place / name, ord(name[-1]))
    plan = planned(text)
    assert plan.passes == passes
    before = bytes_read()
    engine.merge(plan, place / "out")
    read = bytes_read() - before - plan.bytes_out  # read back for the sha256 of the output
    least, most = (bytes_hashed(plan) + count * plan.bytes_in for count in passes)
    assert least <= read <= most + 300_000  # headers and records


def bytes_read() -> int:
    """Bytes that this process has read so far, from disk or page cache."""
    return int(Path("/proc/self/io").read_text().split()[1])
