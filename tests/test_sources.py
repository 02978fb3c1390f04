"""What a model's name may stand for: one raw file, a model with an adapter, another merge."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import HIDDEN, llama, llama_tensors, read_model, write_safetensors
from conftest import Run

from mergelab.checkpoint import open_checkpoint
from mergelab.errors import UserError
from mergelab.locate import folders
from mergelab.recipe import load_recipe
from mergelab.steps import Steps
from mergelab.study_file import load_study

Q = "model.layers.0.self_attn.q_proj"
LINEAR = "merge_method: linear\nmodels: [{model: %s, parameters: {weight: 1}}]\n"


def raw(path: Path, seed: int, dtype: str = "F32") -> dict[str, np.ndarray]:
    """A checkpoint as Stable Diffusion is kept: one file, numbered blocks, an integer buffer."""
    random = np.random.default_rng(seed)
    tensors = {
        f"model.diffusion_model.input_blocks.{i}.0.weight": random.standard_normal((4, 6))
        for i in range(3)
    }
    tensors["cond_stage_model.text.weight"] = random.standard_normal(5)
    path.parent.mkdir(exist_ok=True)
    stored = {name: (dtype, values) for name, values in tensors.items()}
    stored["cond_stage_model.position_ids"] = ("I64", np.arange(5))
    write_safetensors(path, stored)
    return tensors


def adapter(folder: Path, seed: int) -> np.ndarray:
    """A LoRA adapter of rank 2 and scale 3 for one matrix; the change that it stands for."""
    random = np.random.default_rng(seed)
    a, b = random.standard_normal((2, HIDDEN)), random.standard_normal((HIDDEN, 2))
    folder.mkdir(exist_ok=True)
    parts = {"lora_A": ("F32", a), "lora_B": ("F32", b)}
    tensors = {f"base_model.model.{Q}.{n}.weight": v for n, v in parts.items()}
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return 3 * b.astype("f4").astype(float) @ a.astype("f4").astype(float)


WEIGHTED_SUM = """\
merge_method: linear
models:
- {model: raw/a.safetensors, parameters: {weight: 0.75}}
- {model: raw/b.safetensors, parameters: {weight: 0.25}}
"""
ADD_DIFFERENCE = """\
merge_method: task_arithmetic
base_model: raw/a.safetensors
models:
- {model: raw/b.safetensors, parameters: {weight: 0.5}}
- {model: folder, parameters: {weight: -0.5}}
"""


def test_raw_files_are_merged_like_models(mergelab: Run, tmp_path: Path) -> None:
    a, b = (raw(tmp_path / f"raw/{n}.safetensors", seed) for seed, n in enumerate("ab"))
    (tmp_path / "raw/tokenizer.json").write_text("{")  # of somebody else
    (tmp_path / "sum.yaml").write_text(WEIGHTED_SUM)
    done = mergelab("merge", "sum.yaml", "-o", "sum")
    assert done.returncode == 0, done.stderr
    assert "raw/a.safetensors has no config.json, so the merge gets none" in done.stderr
    got = read_model(tmp_path / "sum")
    assert {p.name for p in (tmp_path / "sum").iterdir()} == {"model.safetensors", "merge.json"}
    assert np.array_equal(got["cond_stage_model.position_ids"], np.arange(5))
    for name in a:
        want = (0.75 * a[name] + 0.25 * b[name]).ravel()
        np.testing.assert_allclose(got[name], want, atol=1e-6)

    c = raw(tmp_path / "folder/sd-v1-5.safetensors", 2)
    (tmp_path / "add.yaml").write_text(ADD_DIFFERENCE)
    assert mergelab("merge", "add.yaml", "-o", "add", "--shard-size", "100").returncode == 0
    got = read_model(tmp_path / "add")
    assert len(list((tmp_path / "add").glob("model-0*.safetensors"))) > 1
    for name in a:
        want = (a[name] + 0.5 * (b[name] - a[name]) - 0.5 * (c[name] - a[name])).ravel()
        np.testing.assert_allclose(got[name], want, atol=1e-6)

    (tmp_path / "again.yaml").write_text(LINEAR % "add")  # a sharded folder without a config
    assert mergelab("merge", "again.yaml", "-o", "again").returncode == 0
    assert all(np.array_equal(v, got[n]) for n, v in read_model(tmp_path / "again").items())


def test_a_merge_may_lie_beside_its_raw_inputs_but_not_over_them(
    mergelab: Run, tmp_path: Path
) -> None:
    raw(tmp_path / "a.safetensors", 0)
    (tmp_path / "r.yaml").write_text(LINEAR % "a.safetensors")
    assert mergelab("merge", "r.yaml", "-o", "out").returncode == 0
    over = mergelab("merge", "r.yaml", "-o", ".")
    assert over.returncode == 2
    assert (tmp_path / "a.safetensors").is_file()


def test_a_raw_file_and_a_folder_of_the_same_tensors_mix(mergelab: Run, tmp_path: Path) -> None:
    llama(tmp_path / "folder", 0)
    file = llama(tmp_path / "other", 1) / "model.safetensors"
    file = file.rename(tmp_path / "raw.safetensors")
    text = "merge_method: task_arithmetic\nbase_model: folder\n"
    (tmp_path / "r.yaml").write_text(
        text + "models: [{model: raw.safetensors, parameters: {weight: 1}}]\n"
    )
    assert mergelab("merge", "r.yaml", "-o", "out/merged").returncode == 0
    made = {path.name for path in (tmp_path / "out/merged").iterdir()}
    assert {"config.json", "tokenizer.json"} <= made
    config = json.loads((tmp_path / "out/merged/config.json").read_text())
    assert config == json.loads((tmp_path / "folder/config.json").read_text())


def test_folders_that_are_no_model_are_told_apart(tmp_path: Path) -> None:
    raw(tmp_path / "two/a.safetensors", 0)
    raw(tmp_path / "two/b.safetensors", 1)
    with pytest.raises(UserError, match=r"holds neither model\.safetensors nor"):
        open_checkpoint(tmp_path / "two", "two")
    adapter(tmp_path / "lora", 0)
    with pytest.raises(UserError, match=r"is an adapter\. Write the model .* it: MODEL\+lora"):
        open_checkpoint(tmp_path / "lora", "lora")
    (tmp_path / "cut.safetensors").write_bytes(b"1234")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        open_checkpoint(tmp_path / "cut.safetensors", "cut")


def test_a_model_with_an_adapter_is_merged_as_if_the_two_were_one(
    mergelab: Run, tmp_path: Path
) -> None:
    llama(tmp_path / "a", 0, "F32")
    change = adapter(tmp_path / "lora", 1)
    (tmp_path / "r.yaml").write_text(LINEAR % "a+lora")
    done = mergelab("merge", "r.yaml", "-o", "out")
    assert done.returncode == 0, done.stderr
    got, want = read_model(tmp_path / "out"), read_model(tmp_path / "a")
    want[f"{Q}.weight"] = want[f"{Q}.weight"] + change.ravel()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], atol=1e-5)
    record = json.loads((tmp_path / "out/merge.json").read_text())
    (entry,) = record["inputs"]
    assert entry["model"] == "a+lora"
    names = [file["name"] for file in entry["files"]]
    assert names == ["model.safetensors", "adapter_config.json", "adapter_model.safetensors"]


def test_a_plus_in_a_name_belongs_to_it_if_there_is_such_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("c++", "a+lora")):
        llama(tmp_path / name, seed)
    adapter(tmp_path / "lora", 0)
    text = "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a+lora}, {model: %s}]\n"
    (tmp_path / "r.yaml").write_text(text % "c+++lora")
    found = folders(load_recipe(tmp_path / "r.yaml"), tmp_path)
    assert found == {n: Path(n) for n in ("a+lora", "c++", "lora")}
    (tmp_path / "r.yaml").write_text(text % "c+++lorra")
    with pytest.raises(UserError, match="model lorra: there is no such folder"):
        folders(load_recipe(tmp_path / "r.yaml"), tmp_path)


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study of a model with an adapter, a raw file, and a merge of the first merge."""
    monkeypatch.chdir(tmp_path)
    llama(tmp_path / "a", 0)
    adapter(tmp_path / "lora", 1)
    raw(tmp_path / "r.safetensors", 0)
    folder = tmp_path / "recipes/mine"
    folder.mkdir(parents=True)
    (folder / "study.yaml").write_text("title: t\nmodels: {a: {path: ../../a}}\n")
    (folder / "one.yaml").write_text(LINEAR % "a+lora")
    (folder / "two.yaml").write_text(LINEAR % "recipe:one+lora")
    (folder / "raw.yaml").write_text(LINEAR % "r.safetensors")
    return folder


def merges(study: Path) -> dict[str, str]:
    """The key of every merge."""
    steps = Steps(load_study(study)).all
    return {name: step.key for (verb, name), step in steps.items() if verb == "merge"}


def test_every_input_reaches_the_keys_of_the_merges_that_use_it(study: Path) -> None:
    steps = Steps(load_study(study)).all
    assert steps["merge", "one"].needs == (("fetch", "a"),)
    assert steps["merge", "two"].needs == (("merge", "one"),)
    before = merges(study)
    raw(study.parents[1] / "r.safetensors", 5, "F64")
    between = merges(study)
    assert {name for name in before if before[name] != between[name]} == {"raw"}
    adapter(study.parents[1] / "lora", 9)
    after = merges(study)
    assert {name for name in after if after[name] != between[name]} == {"one", "two"}


def test_a_merge_of_a_merge_with_an_adapter(mergelab: Run, study: Path) -> None:
    place = study.parents[1]
    for name in ("one", "two"):
        out = f"results/mine/merged/{name}"
        done = mergelab("merge", f"recipes/mine/{name}.yaml", "-o", out)
        assert done.returncode == 0, done.stderr
    got, base = read_model(place / "results/mine/merged/two"), llama_tensors(0)[f"{Q}.weight"]
    want = base.ravel() + 2 * adapter(place / "lora", 1).ravel()
    np.testing.assert_allclose(got[f"{Q}.weight"], want, atol=0.2)  # stored as bfloat16 twice
    assert np.abs(got[f"{Q}.weight"] - base.ravel()).max() > 2
