"""mergelab publish: the card says what was measured, and a loopback hub takes the upload."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from checkpoints import llama
from conftest import Run
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub

from mergelab import engine, locate, models
from mergelab.claims.cards import read_card
from mergelab.plan import make_plan
from mergelab.recipe import load_recipe
from mergelab.record import file_sha256, write_json
from mergelab.study_file import load_study

STUDY = """\
title: t
datasets:
  d: {{path: ., files: [items.jsonl], text: "{{{{q}}}}", parts: {{x: 2, y: 2}}}}
models:
  base: {{path: ../../base}}
  a: {{hub: acme/a@{a}}}
  b: {{hub: acme/b@{b}}}
contamination:
- {{benchmark: bench, base: base, suspects: d/x, controls: d/y, detectors: [base_loss]}}
"""
LINEAR = """\
merge_method: linear
models:
  - {model: a, parameters: {weight: 0.5}}
  - {model: b, parameters: {weight: 0.5}}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LoopbackHub, Path]]:
    """A hub with two models, and a working directory with their merge, scored."""
    place = tmp_path_factory.mktemp("publish")
    with LoopbackHub() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.url)
        patch.chdir(place)
        commits = {}
        for seed, name in enumerate(("base", "a", "b")):
            llama(place / name, seed)
            commits[name] = hub.publish(f"acme/{name}", place / name)
        folder = place / "recipes/mine"
        folder.mkdir(parents=True)
        (folder / "study.yaml").write_text(STUDY.format(**commits))
        (folder / "half.yaml").write_text(LINEAR)
        for name in "ab":
            models.fetch(load_study(folder), name, place / "results/mine/models" / name)
        recipe = load_recipe(folder / "half.yaml")
        plan = make_plan(recipe, locate.folders(recipe, place / "results/mine"), shard_size=10**9)
        engine.merge(plan, place / "results/mine/merged/half")
        entry = {"metric": "acc", "value": 0.5, "ci95": [0.4, 0.6], "n": 100, "num_fewshot": 5}
        entry |= {"higher_is_better": True, "chance": 0.25, "task": "arc_easy"}
        entry |= {"chat_template": True}
        whole = {"benchmarks": {"arc": entry}, "lm_eval": "0.4.13", "dtype": "float32"}
        write_json(place / "results/mine/scores/half.json", whole)
        scored = {"inputs": {"model": weights(place)}}
        write_json(place / "results/mine/records/evaluate-half.0123456789ab.json", scored)
        yield hub, place


def weights(place: Path) -> dict[str, str]:
    """sha256 of the merge's weights."""
    file = place / "results/mine/merged/half/model.safetensors"
    return {file.name: file_sha256(file)}


@pytest.fixture
def hub(
    made: tuple[LoopbackHub, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> LoopbackHub:
    """The hub; the test's working directory is a copy of the made one."""
    shutil.copytree(made[1], tmp_path, dirs_exist_ok=True)
    made[0].repos.pop("me/half", None)
    monkeypatch.setenv("HF_ENDPOINT", made[0].url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")  # the loopback hub speaks LFS only
    return made[0]


def make(hub: LoopbackHub, licences: dict[str, str]) -> Path:
    """Give the parents their licences; the study's folder."""
    for name in "ab":
        (files,) = hub.repos[f"acme/{name}"].commits.values()
        front = f"license: {licences[name]}\n" if name in licences else "tags: [x]\n"
        files["README.md"] = f"---\n{front}---\n# x\n".encode()
    return Path("recipes/mine")


def head(hub: LoopbackHub, repo: str) -> dict[str, bytes]:
    """The files of a repository's main branch."""
    return hub.repos[repo].commits[hub.repos[repo].branches["main"]]


def test_the_card_names_parents_scores_and_record(
    tmp_path: Path, mergelab: Run, hub: LoopbackHub
) -> None:
    folder = make(hub, {"a": "apache-2.0", "b": "apache-2.0"})
    asked = len(hub.requests)
    done = mergelab("publish", folder, "half", "--to", "me/half")
    assert done.returncode == 0, done.stderr
    assert not any("POST" in request for request in hub.requests[asked:])
    out = tmp_path / "results/mine/published/half"
    card = ModelCard((out / "README.md").read_text())
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == ["acme/a", "acme/b"]
    assert set(card.data.tags) == {"merge", "mergelab", "linear"}
    (result,) = card.data.eval_results
    told = {"num_few_shot": 5, "chat_template": True}
    assert (result.metric_value, result.dataset_args) == (0.5, told)
    assert {claim.chat_template for claim in read_card(card.content, "me/half").claims} == {True}
    assert "With the chat template: arc." in card.text
    assert "Not examined" in card.text
    recipe = yaml.safe_load((out / "mergekit_config.yml").read_text())
    assert [m["model"].partition("@")[0] for m in recipe["models"]] == ["acme/a", "acme/b"]
    record = json.loads((out / "merge.json").read_text())
    weights = next(f for f in record["outputs"]["files"] if f["name"].endswith(".safetensors"))
    assert weights["sha256"] in card.text


def test_the_published_recipe_gives_the_published_bytes(
    tmp_path: Path, mergelab: Run, hub: LoopbackHub
) -> None:
    folder = make(hub, {"a": "mit", "b": "mit"})
    token = {"HF_TOKEN": hub.token}
    done = mergelab("publish", folder, "half", "--to", "me/half", "--upload", **token)
    assert done.returncode == 0, done.stderr
    assert hub.token not in done.stdout + done.stderr
    files = head(hub, "me/half")
    assert {"README.md", "mergekit_config.yml", "merge.json", "config.json"} <= files.keys()
    assert not any(hub.token.encode() in data for data in files.values())
    again = tmp_path / "again"
    again.mkdir()
    (again / "recipe.yaml").write_bytes(files["mergekit_config.yml"])
    done = mergelab("merge", again / "recipe.yaml", "-o", again / "out")
    assert done.returncode == 0, done.stderr
    assert (again / "out/model.safetensors").read_bytes() == files["model.safetensors"]


@pytest.mark.parametrize(
    ("licences", "why"),
    [
        ({"a": "mit", "b": "llama2"}, "their licences differ"),
        ({"a": "mit"}, "not every licence is known"),
        ({"a": "other", "b": "other"}, "not every licence is known"),
    ],
)
def test_licences_that_do_not_agree_need_a_choice(
    tmp_path: Path, mergelab: Run, hub: LoopbackHub, licences: dict[str, str], why: str
) -> None:
    folder = make(hub, licences)
    done = mergelab("publish", folder, "half", "--to", "me/half")
    assert done.returncode == 2
    assert why in done.stderr
    assert not (tmp_path / "results/mine/published/half").exists()
    done = mergelab("publish", folder, "half", "--to", "me/half", "--license", "other")
    assert done.returncode == 0
    assert "check that the parents' licences allow other" in done.stderr


def test_an_upload_without_login_is_explained(
    tmp_path: Path, mergelab: Run, hub: LoopbackHub
) -> None:
    folder = make(hub, {"a": "mit", "b": "mit"})
    done = mergelab("publish", folder, "half", "--to", "me/half", "--upload")
    assert done.returncode == 2
    assert "hf auth login" in done.stderr
    assert "me/half" not in hub.repos


def test_changed_weights_are_not_published(tmp_path: Path, mergelab: Run, hub: LoopbackHub) -> None:
    folder = make(hub, {"a": "mit", "b": "mit"})
    path = tmp_path / "results/mine/merged/half/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    done = mergelab("publish", folder, "half", "--to", "me/half")
    assert done.returncode == 2
    assert "is not the file of its record" in done.stderr
    done = mergelab("publish", folder, "hulf", "--to", "me/half")
    assert "Did you mean 'half'?" in done.stderr


def again(mergelab: Run, folder: Path, recipe: str, *options: str) -> None:
    """Merge another recipe into the place of the first one."""
    (folder / "half.yaml").write_text(recipe)
    done = mergelab("merge", folder / "half.yaml", "-o", "results/mine/merged/half", *options)
    assert done.returncode == 0, done.stderr


def test_scores_of_other_weights_are_not_published(
    tmp_path: Path, mergelab: Run, hub: LoopbackHub
) -> None:
    folder = make(hub, {"a": "mit", "b": "mit"})
    again(mergelab, folder, LINEAR.replace("weight: 0.5", "weight: 0.1", 1))
    done = mergelab("publish", folder, "half", "--to", "me/half")
    assert done.returncode == 2
    assert "its scores are of other weights. Run: snakemake --config study=mine" in done.stderr
    next(Path("results/mine/records").glob("evaluate-*")).unlink()
    done = mergelab("publish", folder, "half", "--to", "me/half")
    assert done.returncode == 0
    assert "the scores have no record" in done.stderr
    assert "Not evaluated." in (tmp_path / "results/mine/published/half/README.md").read_text()


def test_findings_of_other_weights_or_evidence_are_not_published(
    mergelab: Run, hub: LoopbackHub
) -> None:
    folder = make(hub, {"a": "mit", "b": "mit"})
    found = {"benchmark": "bench", "detector": "base_loss", "detector_version": 1, "p": 0.5}
    found |= {"effect_name": "d", "effect": 0.1, "ci95": None, "informational": False}
    found |= {"n_suspects": 2, "n_controls": 2, "flagged": [], "item_scores": None}
    texts = dict.fromkeys(("statistic", "null_hypothesis", "guarantees", "blind_spots"), "x")
    write_json(Path("results/mine/findings/half.json"), [found | texts])

    def publish() -> tuple[int, str]:
        done = mergelab("publish", folder, "half", "--to", "me/half")
        return done.returncode, done.stderr

    def records(model: dict[str, str], used: str) -> None:
        made = {"inputs": {"model": model}, "outputs": [{"name": "e", "sha256": "1"}]}
        write_json(Path("results/mine/records/probe-half.0123456789ab.json"), made)
        seen = {"inputs": {"evidence/e": used}}
        write_json(Path("results/mine/records/detect-half.0123456789ab.json"), seen)

    assert "the findings have no record" in publish()[1]
    records(weights(Path()), "1")
    code, said = publish()
    assert (code, "findings" in said) == (0, False)
    assert "base_loss" in Path("results/mine/published/half/README.md").read_text()
    for model, used in (({"model.safetensors": "0"}, "1"), (weights(Path()), "0")):
        records(model, used)
        code, said = publish()
        assert code == 2
        assert "its findings are of other weights or other evidence" in said


def test_random_masks_are_not_said_to_come_again_under_other_names(
    tmp_path: Path, mergelab: Run, hub: LoopbackHub
) -> None:
    folder = make(hub, {"a": "mit", "b": "mit"})
    for path in Path("results/mine/records").glob("evaluate-*"):
        path.unlink()
    dare = LINEAR.replace("linear", "dare_linear\nbase_model: a")
    dare = dare.replace("weight: 0.5", "weight: 0.5, density: 0.5")
    again(mergelab, folder, dare, "--seed", "7")
    card = tmp_path / "results/mine/published/half/README.md"
    assert mergelab("publish", folder, "half", "--to", "me/half").returncode == 0
    assert "--seed 7" in card.read_text()
    assert "other random masks" in card.read_text()
    assert "same bytes" not in card.read_text()
    pinned = (card.parent / "mergekit_config.yml").read_text()
    again(mergelab, folder, pinned, "--seed", "7")
    assert mergelab("publish", folder, "half", "--to", "me/half").returncode == 0
    assert "--seed 7` gives the same bytes" in card.read_text()
    (tmp_path / "elsewhere.yaml").write_bytes((card.parent / "mergekit_config.yml").read_bytes())
    mergelab("merge", tmp_path / "elsewhere.yaml", "-o", tmp_path / "out", "--seed", "7")
    assert file_sha256(tmp_path / "out/model.safetensors") in card.read_text()


def test_an_upload_removes_the_weights_of_an_earlier_one(mergelab: Run, hub: LoopbackHub) -> None:
    folder = make(hub, {"a": "mit", "b": "mit"})
    index, shard = "model.safetensors.index.json", "model-00001-of-00001.safetensors"
    hub.publish("me/half", {index: b"{}", shard: b"x", "NOTES.md": b"mine"})
    token = {"HF_TOKEN": hub.token}
    done = mergelab("publish", folder, "half", "--to", "me/half", "--upload", **token)
    assert done.returncode == 0, done.stderr
    assert {"model.safetensors", "NOTES.md"} <= head(hub, "me/half").keys()
    assert not {index, shard} & head(hub, "me/half").keys()


def test_local_parents_are_named_without_their_paths(
    tmp_path: Path, mergelab: Run, hub: LoopbackHub
) -> None:
    folder = make(hub, {"a": "mit", "b": "mit"})
    shutil.copytree(tmp_path / "base", tmp_path / "models/math")
    names = (f"{tmp_path}/base", "models/math", "recipe:half", "a")
    entries = "".join(f"- {{model: '{name}', parameters: {{weight: 1}}}}\n" for name in names)
    entries += f"- {{model: {{model: {{path: {tmp_path}/b}}}}, parameters: {{weight: 1}}}}\n"
    (folder / "local.yaml").write_text(f"merge_method: linear\nmodels:\n{entries}")
    done = mergelab("merge", folder / "local.yaml", "-o", "results/mine/merged/local")
    assert done.returncode == 0, done.stderr
    done = mergelab("publish", folder, "local", "--to", "me/local", "--license", "mit")
    assert done.returncode == 0, done.stderr
    assert "merge.json keeps the paths" in done.stderr
    out = tmp_path / "results/mine/published/local"
    card, recipe = ((out / name).read_text() for name in ("README.md", "mergekit_config.yml"))
    assert str(tmp_path) not in card + recipe
    assert ModelCard(card).data.base_model == ["acme/a"]
    assert "base, math, recipe:half, b is in no repository" in card
    assert "same bytes" not in card
    models = [entry["model"] for entry in yaml.safe_load(recipe)["models"]]
    assert models[:3] == ["base", "math", "recipe:half"]
    assert models[3].startswith("acme/a@")
    assert models[4] == "b"
