"""What steps ask of a scheduler: enough for what was measured, more after a failure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import llama

from mergelab import resources
from mergelab.cluster import Cluster, read_cluster
from mergelab.errors import UserError
from mergelab.record import write_json
from mergelab.resources import LEAST, SNAKEMAKE, Estimates, asked
from mergelab.steps import Steps
from mergelab.study_file import load_study

COMMIT = "0" * 40
STUDY = f"""\
title: t
datasets:
  d: {{path: ., files: [items.jsonl], text: "{{{{q}}}}", parts: {{x: 100, y: 100}}}}
models:
  base: {{path: ../../base}}
  small: {{path: ../../smollm2}}
  huge: {{hub: "org/huge@{COMMIT}"}}
  taught:
    train:
      {{start: small, data: [{{part: d/x}}], learning_rate: 1, batch_size: 12,
        sequence_length: 256}}
suite:
- {{task: text_nll, data: d/y, limit: 50}}
contamination:
- {{benchmark: d, base: base, suspects: d/x, controls: d/y, detectors: [base_loss]}}
"""
LINEAR = "merge_method: linear\nmodels: [{model: %s, parameters: {weight: 1}}]\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A study of a tiny model, one of SmolLM2's size (a hole on the disk), and one of 70e9."""
    llama(tmp_path / "base", 0)
    small = tmp_path / "smollm2"
    small.mkdir()
    with (small / "model.safetensors").open("wb") as file:
        file.truncate(269_060_552)
    facts = {"vocab_size": 49152, "max_position_embeddings": 8192}
    (small / "config.json").write_text(json.dumps(facts))
    folder = tmp_path / "recipes/mine"
    folder.mkdir(parents=True)
    (folder / "items.jsonl").write_text('{"q": 1}\n' * 200)
    (folder / "study.yaml").write_text(STUDY)
    (folder / "tiny.yaml").write_text(LINEAR % "base")
    (folder / "large.yaml").write_text(LINEAR % "huge")
    (folder / "next.yaml").write_text(LINEAR % "recipe:large")
    shards = [f"model-{i:05d}-of-00028.safetensors" for i in range(1, 29)]
    entry = {"size": 5_000_000_000, "blob_id": COMMIT, "sha256": "0" * 64}
    files = {**dict.fromkeys(shards, entry), "config.json": {"size": 2, "blob_id": COMMIT}}
    models = {f"org/huge@{COMMIT}": {"commit": COMMIT, "files": files}}
    write_json(folder / "lock.json", {"version": 1, "models": models})
    return folder


def estimates(folder: Path, **cluster: object) -> Estimates:
    steps = Steps(load_study(folder))
    return Estimates(steps, folder.parents[1] / "results/mine", read_cluster(cluster))


@pytest.mark.parametrize(
    ("verb", "name", "used"),  # MB of memory that SmolLM2-135M and its fine-tunes were seen to use
    [("evaluate", "small", 2567), ("probe", "small", 1361), ("train", "taught", 8641)],
)
def test_what_was_measured_is_asked_for_but_not_twice_as_much(
    folder: Path, verb: str, name: str, used: int
) -> None:
    memory = estimates(folder).needs(verb, name, 1).mem_mb - SNAKEMAKE // 10**6
    assert used <= memory <= 2 * used


def test_a_merge_asks_for_what_its_plan_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "READS", 100)  # so slow that a tiny model takes minutes
    found = estimates(folder)
    plan = found.plan("tiny")
    assert plan is not None
    needs = found.needs("merge", "tiny", 1)
    assert needs.disk_mb == plan.bytes_out // 10**6 + 1 + bool(plan.bytes_out % 10**6)
    assert needs.mem_mb * 10**6 > SNAKEMAKE + plan.bytes_memory * needs.threads
    read = (folder.parents[1] / "base/model.safetensors").stat().st_size + plan.bytes_in
    minutes = (read + 3 * plan.bytes_out) / 6000
    assert LEAST + minutes <= needs.runtime < LEAST + minutes + 1


def test_before_the_models_are_here_their_sources_tell_their_size(folder: Path) -> None:
    found = estimates(folder)
    assert found.plan("large") is None
    merge, evaluate = (found.needs(verb, "large", 1) for verb in ("merge", "evaluate"))
    assert merge.disk_mb == 140_001
    assert merge.mem_mb < 3000  # blocks, never a model
    assert merge.threads == 8
    assert evaluate.mem_mb > 140_000
    assert found.needs("evaluate", "next", 1) == evaluate


def test_each_attempt_asks_for_twice_as_much_within_the_time_that_a_partition_allows(
    folder: Path,
) -> None:
    found = estimates(folder, hours=0.5)
    first, second, third = (found.needs("evaluate", "small", n) for n in (1, 2, 3))
    assert third.mem_mb == pytest.approx(4 * first.mem_mb, rel=0.05)
    assert second.mem_mb == pytest.approx(2 * first.mem_mb, rel=0.05)
    assert (second.runtime, third.runtime) == (2 * first.runtime, 30)


def test_the_number_of_parts_follows_the_bytes_that_are_read(folder: Path) -> None:
    found = estimates(folder, part_gb=50)
    assert (found.parts("tiny"), found.parts("large"), found.parts("next")) == (1, 3, 3)
    assert estimates(folder, part_gb=200).parts("large") == 1


def test_only_what_runs_models_asks_for_the_gpu_that_the_user_named(folder: Path) -> None:
    found = estimates(folder, account=17, partition="cpu", gpu_partition="gpu", gpu="a100")
    place = {"slurm_account": "17", "slurm_partition": "cpu"}
    assert found.places("merge") == place
    gpu = place | {"slurm_partition": "gpu", "gpu": 1, "gpu_model": "a100"}
    assert found.places("evaluate") == found.places("probe") == gpu
    assert estimates(folder).places("evaluate") == {}
    assert set(asked(found, "merge")) == {*place, "mem_mb", "runtime", "disk_mb"}


def test_settings_of_the_cluster_file_are_checked() -> None:
    with pytest.raises(UserError, match="no setting 'acount'"):
        read_cluster({"acount": "x"})
    with pytest.raises(UserError, match="'part_gb' must be a number above 0, not 'many'"):
        read_cluster({"part_gb": "many"})
    assert read_cluster({"gpu": None}) == Cluster()
