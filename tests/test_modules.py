"""Recipes of several modules: a text decoder, a vision tower and the projector between them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import HIDDEN, llama, llama_tensors, read_model, write_model
from conftest import Run

from mergelab.errors import UserError
from mergelab.plan import SHARD_SIZE, Plan, make_plan
from mergelab.recipe import load_recipe

Q = "self_attn.q_proj.weight"
TEXT, VISION = "language_model.model.layers", "vision_tower.encoder.layers"
PROJECTOR = "multi_modal_projector.linear.weight"
RECIPE = """\
merge_method: linear
dtype: float32
parameters: {weight: 1}
modules:
  text_decoder:
    parameters: {weight: [{filter: self_attn, value: 3}]}
    slices:
    - sources:
      - {model: a, layer_range: [0, 1]}
      - {model: b, layer_range: [1, 2], parameters: {weight: [{filter: q_proj, value: 5}]}}
      parameters: {weight: [{filter: o_proj, value: 4}]}
    - sources: [{model: b, layer_range: [0, 2]}]
  vision_tower:
    models: [{model: a}, {model: b, parameters: {weight: [0, 1]}}]
  multi_modal_projector:
    models: [{model: b}]
"""


def vision_model(folder: Path, seed: int) -> None:
    """A model of three modules; text and vision layers of two each."""
    tensors = {f"language_model.{n}": v for n, v in llama_tensors(seed).items()}
    random = np.random.default_rng(seed)
    for i in range(2):
        tensors[f"{VISION}.{i}.{Q}"] = random.standard_normal((HIDDEN, HIDDEN))
    tensors[PROJECTOR] = random.standard_normal((HIDDEN, HIDDEN))
    text = {"num_hidden_layers": 2, "layer_types": ["full", "sliding"]}
    write_model(folder, tensors, text_config=text, vision_config={"num_hidden_layers": 2})
    config = json.loads((folder / "config.json").read_text())
    del config["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Vision-language models a and b in the working directory."""
    for seed, name in enumerate(("a", "b")):
        vision_model(tmp_path / name, seed)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def planned(text: str) -> Plan:
    Path("r.yaml").write_text(text)
    recipe = load_recipe(Path("r.yaml"))
    return make_plan(recipe, {m: Path(m) for m in recipe.models}, shard_size=SHARD_SIZE)


def test_each_module_is_merged_and_stacked_by_itself(mergelab: Run, place: Path) -> None:
    (place / "r.yaml").write_text(RECIPE)
    done = mergelab("merge", "r.yaml", "-o", "out")
    assert done.returncode == 0, done.stderr
    a, b, got = (read_model(place / name) for name in ("a", "b", "out"))
    assert {n for n in got if "layers.3" in n} == set()
    assert np.array_equal(got[f"{TEXT}.2.{Q}"], b[f"{TEXT}.1.{Q}"])
    assert np.array_equal(got[f"{VISION}.0.{Q}"], a[f"{VISION}.0.{Q}"])
    mean = (a[f"{VISION}.1.{Q}"] + b[f"{VISION}.1.{Q}"]) / 2
    np.testing.assert_allclose(got[f"{VISION}.1.{Q}"], mean, atol=1e-6)
    assert np.array_equal(got[PROJECTOR], b[PROJECTOR])
    config = json.loads((place / "out/config.json").read_text())
    assert config["text_config"] == {
        "num_hidden_layers": 3,
        "layer_types": ["full", "full", "sliding"],
    }
    assert config["vision_config"] == {"num_hidden_layers": 2}
    assert "num_hidden_layers" not in config


def test_parameters_of_a_module_stand_between_slice_and_recipe(place: Path) -> None:
    got = {t.name: t for t in planned(RECIPE).tensors}
    weights = {
        name: got[f"{TEXT}.0.{name}"].settings.each("weight")
        for name in (Q, "self_attn.o_proj.weight", "self_attn.q_proj.bias", "mlp.up_proj.weight")
    }
    assert weights == {
        Q: [3, 5],
        "self_attn.o_proj.weight": [4, 4],
        "self_attn.q_proj.bias": [3, 5],
        "mlp.up_proj.weight": [1, 1],
    }


def test_a_module_of_models_gets_the_base_that_it_does_not_list(place: Path) -> None:
    vision_model(place / "base", 7)
    text = RECIPE.replace("linear", "task_arithmetic\nbase_model: base")
    text = text.replace("sources:\n", "sources:\n      - {model: base, layer_range: [0, 1]}\n")
    text = text.replace(
        "[{model: b, layer", "[{model: base, layer_range: [0, 2]}, {model: b, layer"
    )
    got = {t.name: t for t in planned(text).tensors}
    base = got[PROJECTOR].base
    assert base is not None
    assert base.file.parent.name == "base"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("vision_tower:", "vision_towr:"),
            "r.yaml:13: module 'vision_towr' has no tensors: none begins with 'vision_towr.'. "
            "Did you mean 'vision_tower'? Prefixes found: language_model, multi_modal_projector, "
            "vision_tower.",
        ),
        (
            ("  multi_modal_projector:\n    models: [{model: b}]\n", ""),
            f"r.yaml: no module of the recipe has the tensors {PROJECTOR}. The merge would lack "
            "them: list their module, too. Prefixes found: multi_modal_projector.",
        ),
        (("models: [{model: b}]", "models: []"), "r.yaml:16: 'models' is empty."),
        (
            ("models: [{model: b}]", "parameters: {}"),
            "module 'multi_modal_projector' needs exactly one of 'models' or 'slices'.",
        ),
        (("models: [{model: b}]", "model: b"), "a module has no key 'model'. Did you mean"),
        (("modules:", "models: []\nmodules:"), "a recipe needs exactly one of 'models', 'slices'"),
    ],
)
def test_mistakes_with_modules(place: Path, change: tuple[str, str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        planned(RECIPE.replace(*change))
    assert message in str(caught.value)


def test_names_of_modules_are_those_of_mergekit_or_prefixes(place: Path) -> None:
    """Qwen-VL keeps its projector within its vision tower, and its text decoder beside it."""
    names = ("model.layers.0.w", "lm_head.weight", "visual.blocks.0.w", "visual.merger.ln_q.weight")
    write_model(place / "a", {name: np.ones((2, 2)) for name in names})
    part = "{models: [{model: a, parameters: {scale: %s}}]}"
    kinds = {"text_decoder": 2, "vision_tower": 3, "multi_modal_projector": 4}
    modules = "\n".join(f"  {name}: {part % scale}" for name, scale in kinds.items())
    plan = planned(f"merge_method: passthrough\nmodules:\n{modules}\n")
    scales = [t.settings.experts[0]["scale"] for t in plan.tensors]
    assert dict(zip((t.name for t in plan.tensors), scales, strict=True)) == dict(
        zip(names, (2, 2, 3, 4), strict=True)
    )
    modules = f"  default: {part % 5}\n  visual.merger: {part % 6}"
    plan = planned(f"merge_method: passthrough\nmodules:\n{modules}\n")
    scales = {t.name: t.settings.experts[0]["scale"] for t in plan.tensors}
    assert scales == dict(zip(names, (5, 5, 5, 6), strict=True))


def test_a_layer_count_that_no_config_key_could_tell_is_refused(place: Path) -> None:
    for name in ("a", "b"):
        path = place / name / "config.json"
        config = json.loads(path.read_text())
        del config["text_config"]["num_hidden_layers"]
        path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="module 'text_decoder' gets 3 layers, but the config"):
        planned(RECIPE)


def test_one_module_over_all_is_the_recipe_without_modules(place: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        llama(place / name, seed)
    lists = "models: [{model: a, parameters: {weight: [0, 1]}}, {model: b}]"
    head = "merge_method: linear\nparameters: {weight: 1}\n"
    plain, wrapped = (
        planned(head + body) for body in (lists, f"modules: {{default: {{{lists}}}}}")
    )
    assert plain.tensors == wrapped.tensors
    assert plain.config == wrapped.config
