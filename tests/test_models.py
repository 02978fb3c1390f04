"""Where models are, and what is said when they are not there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub

from mergelab import hashes, models
from mergelab.errors import UserError
from mergelab.study import Study
from mergelab.study_file import load_study

STUDY = """
title: T
datasets:
  d: {path: ., files: [d.jsonl], text: "{{x}}", parts: {train: rest}}
models:
  base:
    train: {architecture: {hidden_size: 8}, data: [{part: d/train}], learning_rate: 0.1}
  chat: {hub: acme/tiny}
  local: {path: ../../weights/local}
  packed: {gguf: {path: packed.gguf, sha256: "%s"}}
""" % ("0" * 64)
RECIPE = """
models:
  - {model: chat, parameters: {weight: 0.5}}
  - {model: base, parameters: {weight: 0.5}}
merge_method: linear
dtype: float32
"""
RESULTS = Path("results/x")


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.chdir(tmp_path)
    folder = Path("recipes/x")
    folder.mkdir(parents=True)
    (folder / "study.yaml").write_text(STUDY)
    (folder / "half.yaml").write_text(RECIPE)
    return load_study(folder)


def make_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_models_merges_and_local_folders_have_their_places(study):
    assert models.folder(study, "base", RESULTS) == Path("results/x/models/base")
    assert models.folder(study, "chat", RESULTS) == Path("results/x/models/chat")
    assert models.folder(study, "half", RESULTS) == Path("results/x/merged/half")
    assert models.folder(study, "local", RESULTS) == Path("recipes/x/../../weights/local")


def test_an_unknown_model_is_named_with_the_nearest_one(study):
    with pytest.raises(UserError) as caught:
        models.folder(study, "cat", RESULTS)
    assert str(caught.value) == (
        "recipes/x/study.yaml: there is no model 'cat'. Did you mean 'chat'?"
    )


@pytest.mark.parametrize(
    ("name", "folder", "advice"),
    [
        ("base", "results/x/models/base", "Run: mergelab train recipes/x base"),
        ("chat", "results/x/models/chat", "Run: mergelab fetch recipes/x chat"),
        ("packed", "results/x/models/packed", "Run: mergelab fetch recipes/x packed"),
        (
            "half",
            "results/x/merged/half",
            "Run: mergelab merge recipes/x/half.yaml -o results/x/merged/half",
        ),
        (
            "local",
            "recipes/x/../../weights/local",
            "Correct its 'path' (absolute, or relative to study.yaml).",
        ),
    ],
)
def test_a_missing_folder_is_named_with_the_command_that_makes_it(study, name, folder, advice):
    with pytest.raises(UserError) as caught:
        models.existing(study, name, RESULTS)
    assert str(caught.value) == (
        f"recipes/x/study.yaml: model '{name}': the folder {folder} does not exist. {advice}"
    )


@pytest.mark.parametrize(
    ("removed", "lack"),
    [("config.json", "has no config.json"), ("model.safetensors", "has no *.safetensors")],
)
def test_a_folder_that_is_no_model_is_refused(study, removed, lack):
    (make_model(Path("weights/local")) / removed).unlink()
    with pytest.raises(UserError) as caught:
        models.fetch(study, "local", RESULTS / "models" / "local")
    assert f"the folder recipes/x/../../weights/local {lack}. Correct" in str(caught.value)


def test_a_local_folder_is_used_in_place(study):
    make_model(Path("weights/local"))
    record = models.fetch(study, "local", RESULTS / "models" / "local")
    assert record["source"]["path"] == "../../weights/local"
    assert record["source"]["fingerprint"] == models.fingerprint(Path("weights/local"))
    assert not RESULTS.exists()


def test_a_trained_model_is_not_fetched(study):
    with pytest.raises(UserError, match=r"'base' is trained, not fetched\. Run: mergelab train"):
        models.fetch(study, "base", RESULTS / "models" / "base")


def test_a_fingerprint_tells_contents_and_names_and_nothing_else(study):
    folder = make_model(Path("weights/local"))
    first = models.fingerprint(folder)
    shutil.copytree(folder, "elsewhere", copy_function=shutil.copyfile)  # with other times
    weights = Path("elsewhere/model.safetensors")
    os.utime(weights, ns=(0, 0))
    for unread in ("README.md", "pytorch_model.bin", ".hidden"):
        Path("elsewhere", unread).write_text("not part of it")
    assert models.fingerprint(Path("elsewhere")) == first
    weights.write_bytes(b"weightz")  # one byte, and its time restored
    os.utime(weights, ns=(0, 0))
    changed = models.fingerprint(Path("elsewhere"))
    weights.rename("elsewhere/other.safetensors")
    assert len({first, changed, models.fingerprint(Path("elsewhere"))}) == 3


def test_a_file_is_read_for_its_fingerprint_once(study, monkeypatch):
    folder = make_model(Path("weights/local"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path("cache").absolute()))
    monkeypatch.setattr(hashes, "RECENT", -1)  # files of this moment are remembered, too
    first = models.fingerprint(folder)
    monkeypatch.setattr(hashes, "file_sha256", lambda *_: pytest.fail("read again"))
    assert models.fingerprint(folder) == first


def test_a_gguf_file_beside_the_study_is_looked_for_there(study):
    with pytest.raises(UserError, match=r"recipes/x/packed\.gguf: no such file"):
        models.fetch(study, "packed", RESULTS / "models" / "packed")


def mergelab(server: LoopbackHub, *words: str, token: str = "") -> subprocess.CompletedProcess:
    """Run the command line in a clean home, as a user would."""
    environment = {
        **{key: os.environ[key] for key in ("PATH", "LANG") if key in os.environ},
        **{"HOME": str(Path.cwd()), "HF_ENDPOINT": server.url, "HF_TOKEN": token},
    }
    command = [str(Path(sys.executable).with_name("mergelab")), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


FILES = {"config.json": b"{}", "model.safetensors": b"weights"}


def test_lock_and_fetch_from_the_command_line(study):
    with LoopbackHub() as server:
        commit = server.publish("acme/tiny", FILES)
        refused = mergelab(server, "fetch", "recipes/x", "chat")
        assert refused.returncode == 2
        assert (
            "recipes/x/study.yaml: model acme/tiny is not pinned. Run: mergelab lock recipes/x   "
            "(or write acme/tiny@<40-hex commit>)"
        ) in refused.stderr
        assert "Traceback" not in refused.stderr
        assert not Path("results/x/models/chat").exists()
        assert mergelab(server, "lock", "recipes/x").returncode == 0
        assert commit in Path("recipes/x/lock.json").read_text()
        done = mergelab(server, "fetch", "recipes/x", "chat")
        assert done.returncode == 0, done.stderr
    assert Path("results/x/models/chat/model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize("right", [True, False])
def test_a_token_never_reaches_output_records_or_files(study, right):
    with LoopbackHub() as server:
        server.publish("acme/tiny", FILES, gated=True)
        token = server.token if right else "hf_" + "NotTheRightOne" * 2
        assert mergelab(server, "lock", "recipes/x", token=token).returncode == 0
        done = mergelab(server, "fetch", "recipes/x", "chat", token=token)
        assert done.returncode == (0 if right else 2)
        assert ("gated" in done.stderr) is not right
        assert token not in done.stdout + done.stderr
    for path in Path().rglob("*"):
        assert path.is_dir() or token.encode() not in path.read_bytes(), path
