"""Recipes and studies: what is understood, and the exact message for what is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from checkpoints import HIDDEN, llama, llama_tensors, read_model, write_model
from conftest import Run

from mergelab.errors import UserError
from mergelab.methods import METHODS
from mergelab.parameters import Setting, describe
from mergelab.plan import SHARD_SIZE, make_plan
from mergelab.recipe import load_recipe
from mergelab.study_file import load_study

TIES = """\
merge_method: ties
base_model: base
dtype: float32
parameters:
  normalize: true
models:
  - model: base
  - model: a
    parameters:
      weight: 0.5
      density: 0.5
"""


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Two small models, base and a, in the working directory."""
    for seed, name in enumerate(("base", "a")):
        llama(tmp_path / name, seed)
    return tmp_path


def refused(mergelab: Run, place: Path, recipe: str, message: str) -> None:
    """The merge is refused with exactly this message and code 2, and nothing is written."""
    (place / "r.yaml").write_text(recipe)
    done = mergelab("merge", "r.yaml", "-o", "out")
    assert done.stderr == f"error: {message}\n"
    assert done.returncode == 2
    assert not (place / "out").exists()
    assert not list(place.glob(".out*"))


def test_misspelled_parameter(mergelab: Run, models: Path) -> None:
    refused(
        mergelab,
        models,
        TIES.replace("density", "densty"),
        "r.yaml:11: ties has no parameter 'densty'. Did you mean 'density'?\n"
        f"  ties takes: {', '.join(map(describe, METHODS['ties'].parameters))}.   "
        "More: mergelab explain ties",
    )


def test_unknown_method(mergelab: Run, models: Path) -> None:
    refused(
        mergelab,
        models,
        TIES.replace("ties", "tiess"),
        "r.yaml:1: there is no merge method 'tiess'. Did you mean 'ties'?\n"
        f"  Methods: {', '.join(METHODS)}.",
    )


def test_unknown_key(mergelab: Run, models: Path) -> None:
    refused(
        mergelab,
        models,
        TIES.replace("dtype", "dtyp"),
        "r.yaml:3: a recipe has no key 'dtyp'. Did you mean 'dtype'?\n  a recipe takes: "
        "merge_method, base_model, models, slices, modules, parameters, dtype, out_dtype, "
        "tokenizer_source, tokenizer, chat_template, allow_not_finite, name.",
    )


def test_every_mistake_of_a_recipe_is_told_at_once(mergelab: Run, models: Path) -> None:
    (models / "r.yaml").write_text(
        TIES.replace("density: 0.5", "density: 50").replace("0.5", "half").replace("float32", "f")
    )
    done = mergelab("plan", "r.yaml")
    assert done.returncode == 2
    assert "r.yaml:3: dtype 'f' is not supported. Choose one of" in done.stderr
    assert "r.yaml:10: 'weight' must be a number, not 'half'." in done.stderr
    assert "r.yaml:11: 'density' must lie in 0 to 1, not 50." in done.stderr


def test_missing_model_folder(mergelab: Run, models: Path) -> None:
    refused(
        mergelab,
        models,
        TIES.replace("model: a", "model: ./aa"),
        "r.yaml: model ./aa: there is no such folder or .safetensors file (paths start at the "
        "current folder), and it is no hub model (org/name@<40-hex commit>).",
    )


def test_unpinned_hub_model_is_refused_with_the_advice_to_lock(mergelab: Run, models: Path) -> None:
    (models / "r.yaml").write_text(TIES.replace("model: a", "model: org/name@main"))
    done = mergelab("merge", "r.yaml", "-o", "out")
    assert done.returncode == 2
    assert (
        "org/name@main: there is no such folder here, and as a hub model it is not" in done.stderr
    )
    assert "pinned. Write org/name@<40-hex commit>" in done.stderr
    (models / "study.yaml").write_text("title: t\n")
    done = mergelab("merge", "r.yaml", "-o", "out")
    assert done.returncode == 2
    assert "study.yaml: model org/name@main is not pinned. Run: mergelab lock" in done.stderr


def test_wrong_shapes(mergelab: Run, models: Path) -> None:
    tensors = llama_tensors(1)
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((HIDDEN, 24))
    write_model(models / "a", tensors)
    refused(
        mergelab,
        models,
        TIES,
        "tensor model.layers.0.mlp.up_proj.weight: shapes differ: base [24, 16] BF16, "
        "a [16, 24] BF16. Only models of one architecture and size can be merged.",
    )


def test_different_vocabulary_sizes(mergelab: Run, models: Path) -> None:
    tensors = llama_tensors(1)
    tensors["model.embed_tokens.weight"] = np.zeros((50, HIDDEN))
    write_model(models / "a", tensors)
    refused(
        mergelab,
        models,
        TIES,
        "tensor model.embed_tokens.weight: the models have different vocabularies: "
        "base [48, 16] BF16, a [50, 16] BF16. Merge models that share one tokenizer, or add "
        "'tokenizer_source: union' (all tokens) or 'tokenizer_source: base' (the base's).",
    )


def test_vocabularies_of_one_size_with_other_tokens(mergelab: Run, models: Path) -> None:
    vocabulary = {f"t{47 - i}": i for i in range(48)}
    (models / "a/tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    refused(
        mergelab,
        models,
        TIES,
        "models base and a have different vocabularies: 100% of the token ids mean different "
        "tokens. Merge models that share one tokenizer, or add 'tokenizer_source: union' (all "
        "tokens) or 'tokenizer_source: base' (the base's).",
    )


def test_missing_tensor(mergelab: Run, models: Path) -> None:
    tensors = llama_tensors(1)
    del tensors["model.layers.1.self_attn.o_proj.weight"]
    write_model(models / "a", tensors)
    refused(
        mergelab,
        models,
        TIES,
        "model a: tensor model.layers.1.self_attn.o_proj.weight is missing, but another model "
        "has it. Only models of one architecture can be merged.",
    )


def test_truncated_shard(mergelab: Run, models: Path) -> None:
    file = models / "a/model.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-100])
    refused(
        mergelab,
        models,
        TIES,
        "model a: a/model.safetensors: not a whole safetensors file: it has "
        f"{size - 100:,} bytes, its header describes {size:,} (truncated?). "
        "Download or copy it again.",
    )


def test_index_that_leaves_its_folder(mergelab: Run, models: Path) -> None:
    write_model(models / "a", llama_tensors(1), shards=2)
    index = models / "a/model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["model.norm.weight"] = "../../outside"
    index.write_text(json.dumps(data))
    refused(
        mergelab,
        models,
        TIES,
        "a/model.safetensors.index.json: names a file outside the model's folder: "
        "'../../outside'. Do not trust this model; download it again from its source.",
    )


def test_yaml_bomb(mergelab: Run, models: Path) -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    refused(
        mergelab,
        models,
        "\n".join(levels) + "\n" + TIES,
        "r.yaml:1: its aliases expand to more than 100,000 nodes (a YAML bomb). "
        "Write the values out.",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 2000, "nested deeper than"),
        ("merge_method: [ties", "not valid YAML"),
        ("- a\n- b\n", "the top level must be a mapping"),
        ("", "is empty"),
        ("dtype: float32\ndtype: float16\n", "the key 'dtype' is given twice"),
        ("a: !!python/object/apply:os.system [ls]\n", "a recipe has no key 'a'"),
        ("merge_method: !!python/name:os.system x\n", "could not determine a constructor"),
        ("merge_method: {? [a]: b}\n", "'merge_method' must be text"),
        ("name: a\n---\nname: b\n", "r.yaml:2: a second document begins here. Write a file for"),
    ],
)
def test_broken_yaml_is_told_with_its_file(
    mergelab: Run, models: Path, text: str, message: str
) -> None:
    (models / "r.yaml").write_text(text)
    done = mergelab("plan", "r.yaml")
    assert done.returncode == 2
    assert message in done.stderr
    assert "r.yaml" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_disk_space(mergelab: Run, models: Path) -> None:
    """Sparse inputs larger than the free disk: the plan refuses before anything is written."""
    free = shutil.disk_usage(models).free
    count = (free // 4 // (1 << 20) + 16 * 1024) << 20  # 64 GB more: others may free some
    for name in ("base", "a"):
        header = json.dumps(
            {"w": {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}}
        ).encode()
        file = models / name / "model.safetensors"
        file.write_bytes(len(header).to_bytes(8, "little") + header)
        with file.open("r+b") as handle:
            handle.truncate(8 + len(header) + 4 * count)
    (models / "r.yaml").write_text(TIES)
    done = mergelab("merge", "r.yaml", "-o", "out")
    assert done.returncode == 2
    assert done.stderr.startswith("error: out: the merge needs ")
    assert "GB of disk are free there. Free some space or choose another folder with -o." in (
        done.stderr
    )
    assert not (models / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("base_model: base\n", ""), "ties needs a 'base_model'"),
        (("weight: 0.5\n      ", ""), "r.yaml:8: ties needs 'weight' for a."),
        (("- model: a\n", "- model: base\n"), "model base is listed twice"),
        (("normalize: true", "normalize: 3"), "'normalize' must be true or false"),
        (
            ("models:", "slices: []\nmodels:"),
            "a recipe needs exactly one of 'models', 'slices' or 'modules'.",
        ),
        (("weight: 0.5", "lambda: 0.5\n      weight: 0.5"), "'lambda' belongs to the whole merge"),
        (
            ("normalize: true", "t: 0.5"),
            "r.yaml:5: ties has no parameter 't'. It belongs to other methods, and mergekit "
            "ignores it here: remove it.",
        ),
        (
            ("weight: 0.5", "weight:\n      - vlaue: 1\n      - value: 1"),
            "r.yaml:11: an entry of 'weight' has no key 'vlaue'. Did you mean 'value'?",
        ),
        (("weight: 0.5", "weight: {filter: mlp, value: 1}"), "none of its filters matches"),
        (("dtype: float32", "chat_template: chatlm"), "Did you mean 'chatml'?"),
        (("dtype: float32", "tokenizer_source: unoin"), "Did you mean 'union'?"),
    ],
)
def test_recipe_mistakes(
    mergelab: Run, models: Path, change: tuple[str, str], message: str
) -> None:
    (models / "r.yaml").write_text(TIES.replace(*change))
    done = mergelab("merge", "r.yaml", "-o", "out")
    assert done.returncode == 2
    assert message in done.stderr
    assert not (models / "out").exists()


@pytest.mark.parametrize(
    "change",
    [
        ("models:", "slices:\nmodules: null\ntokenizer:\nmodels:"),
        ("normalize: true", "normalize: 'True'"),
        ("normalize: true", "normalize: {filter: '', value: true}"),
        ("weight: 0.5", "weight: ['5e-1', 0.5]"),
    ],
)
def test_other_ways_to_write_a_recipe_that_mergekit_reads(
    models: Path, monkeypatch: pytest.MonkeyPatch, change: tuple[str, str]
) -> None:
    monkeypatch.chdir(models)
    plans = []
    for text in (TIES, TIES.replace(*change)):
        Path("r.yaml").write_text(text)
        recipe = load_recipe(Path("r.yaml"))
        plans.append(make_plan(recipe, {m: Path(m) for m in recipe.models}, shard_size=SHARD_SIZE))
    assert plans[0].tensors == plans[1].tensors


def test_int8_mask_is_accepted_with_a_method_that_has_none(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "merge_method: slerp\nbase_model: b\nparameters: {t: 0.5, int8_mask: true}\n"
        "models: [{model: a}]\n"
    )
    assert list(load_recipe(path).parameters) == ["t"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("['0', 2.0]", (0, 2)),
        ("[2, 2]", None),
        ("[-1, 2]", None),
        ("[0, 1.5]", None),
        ("[0, true]", None),
        ("[0, 1, 2]", None),
    ],
)
def test_a_layer_range_is_two_integers_in_order(
    tmp_path: Path, text: str, wanted: tuple[int, int] | None
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        f"merge_method: passthrough\nslices:\n- sources: [{{model: a, layer_range: {text}}}]\n"
    )
    if wanted is None:
        with pytest.raises(UserError, match=r"r\.yaml:3: 'layer_range' must be \[first, end\]"):
            load_recipe(path)
    else:
        assert load_recipe(path).modules[0].slices[0].sources[0].layers == wanted


def test_weights_that_sum_to_zero_are_refused(mergelab: Run, models: Path) -> None:
    text = "merge_method: linear\nmodels:\n- {model: base, parameters: {weight: 1}}\n"
    (models / "r.yaml").write_text(text + "- {model: a, parameters: {weight: -1}}\n")
    done = mergelab("merge", "r.yaml", "-o", "out")
    assert done.returncode == 2
    assert "sum to 0, which cannot be normalized" in done.stderr


def test_an_unlisted_base_of_linear_gives_its_config_only(mergelab: Run, models: Path) -> None:
    write_model(models / "base", llama_tensors(0), rms_norm_eps=0.125)
    (models / "r.yaml").write_text(
        "merge_method: linear\nbase_model: base\nmodels: [{model: a, parameters: {weight: 1}}]\n"
    )
    assert mergelab("merge", "r.yaml", "-o", "out").returncode == 0
    assert json.loads((models / "out/config.json").read_text())["rms_norm_eps"] == 0.125
    got, want = read_model(models / "out"), read_model(models / "a")
    assert all(np.array_equal(got[name], want[name]) for name in want)


def test_gradient_is_interpolated_over_the_layers() -> None:
    setting = Setting((0.0, 0.5, 0.3, 0.7, 1.0), None)
    assert [setting.at(p) for p in (0, 0.25, 0.5, 1)] == [0.0, 0.5, 0.3, 1.0]
    assert setting.at(0.125) == pytest.approx(0.25)
    assert Setting((2.0,), None).at(0.7) == 2.0


def test_a_layer_behind_those_of_the_config_stands_at_the_end_of_a_gradient(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a")):  # a third layer that predicts further tokens
        llama(tmp_path / name, seed, layers=3, num_hidden_layers=2)
    (tmp_path / "r.yaml").write_text(
        "merge_method: task_arithmetic\nbase_model: base\n"
        "models: [{model: a, parameters: {weight: [0, 1]}}]\n"
    )
    folders = {n: tmp_path / n for n in ("base", "a")}
    plan = make_plan(load_recipe(tmp_path / "r.yaml"), folders, shard_size=SHARD_SIZE)
    weights = {t.name: t.settings.experts[0]["weight"] for t in plan.tensors}
    assert [weights[f"model.layers.{i}.self_attn.q_proj.weight"] for i in range(3)] == [0, 1, 1]


def test_first_matching_filter_wins_and_levels_fall_through(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a")):
        llama(tmp_path / name, seed, layers=3)
    (tmp_path / "r.yaml").write_text(
        "merge_method: ties\nbase_model: base\nparameters: {weight: 0.9, density: 1e-1}\n"
        "models:\n- model: a\n  parameters:\n    weight:\n"
        "    - {filter: self_attn, value: [0, 1]}\n    - {filter: mlp, value: 0.25}\n"
        "    - {filter: self_attn.q_proj, value: 7}\n"
    )
    folders = {n: tmp_path / n for n in ("base", "a")}
    recipe = load_recipe(tmp_path / "r.yaml")
    plan = make_plan(recipe, folders, shard_size=SHARD_SIZE)
    weights = {t.name: t.settings.experts[0]["weight"] for t in plan.tensors}
    assert [weights[f"model.layers.{i}.self_attn.q_proj.weight"] for i in range(3)] == [0, 0.5, 1]
    assert weights["model.layers.1.mlp.up_proj.weight"] == 0.25
    assert weights["model.norm.weight"] == weights["model.embed_tokens.weight"] == 0.9
    assert {t.settings.experts[0]["density"] for t in plan.tensors} == {0.1}


def test_plan_as_json_groups_tensors_by_parameters(mergelab: Run, models: Path) -> None:
    (models / "r.yaml").write_text(TIES)
    plan = json.loads(mergelab("plan", "r.yaml", "--json").stdout)
    assert plan["method"] == "ties v1"
    assert plan["bytes_in"] == 2 * 2 * sum(v.size for v in llama_tensors(0).values())
    (group,) = plan["groups"]
    assert group["models"] == {"a": {"weight": 0.5, "density": 0.5}}
    assert len(group["tensors"]) == plan["tensors"] == len(llama_tensors(0))
    shown = mergelab("plan", "r.yaml")
    assert shown.returncode == 0
    assert "a: weight=0.5, density=0.5" in shown.stdout


def test_explain_lists_and_describes_methods(mergelab: Run) -> None:
    assert "dare_ties" in mergelab("explain").stdout
    text = mergelab("explain", "ties").stdout
    assert "arXiv 2306.01708" in text
    assert "density" in text
    wrong = mergelab("explain", "tie")
    assert (wrong.returncode, "Did you mean 'ties'?" in wrong.stderr) == (2, True)


def test_study_mistakes_are_told_with_lines(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(
        "title: t\nmodel:\n  x: {path: p}\nwheels:\n  w: {requirement: foo, sha256: 12}\n"
        "models:\n  base: {path: p, hub: o/n}\n  b: {train: {start: bas, data: []}}\n"
        "suite:\n- {task: t, data: gsm8k/x}\n"
    )
    with pytest.raises(UserError) as caught:
        load_study(tmp_path)
    text = str(caught.value)
    for message in (
        "study.yaml:2: a study has no key 'model'. Did you mean 'models'?",
        "study.yaml:5: 'requirement' must be pinned: name==version.",
        "study.yaml:7: model 'base' needs exactly one of train, hub, path, gguf.",
        "study.yaml:8: 'learning_rate' is missing.",
    ):
        assert message in text


def test_study_references_must_exist(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(
        "title: t\nmodels:\n  base: {path: p}\n"
        "  b: {train: {start: bas, learning_rate: 1, data: [{part: d/x}]}}\n"
    )
    with pytest.raises(
        UserError, match=r"there is no model 'bas' in this study\. Did you mean 'base'"
    ):
        load_study(tmp_path)
