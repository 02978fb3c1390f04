"""An audit as a user runs it: what it looks at, what it refuses, and how it is shown."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import llama, read_model, write_model

from mergelab.audit import run
from mergelab.audit.run import Options, audit
from mergelab.errors import UserError

CARD = """---
model-index:
- results:
  - dataset: {{name: "OpenBookQA ({name})"}}
    metrics: [{{type: acc, value: 31.2}}]
---
```yaml
merge_method: linear
models:
  - {{model: {one}, parameters: {{weight: 0.5}}}}
  - {{model: {other}, parameters: {{weight: 0.5}}}}
dtype: float32
```
"""
NO_SCORES = Options(depth=0, skip=("scores",))  # asks no hub


@pytest.fixture
def merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two models of a base, and 0.7 and 0.3 of them; the working directory is above them."""
    monkeypatch.chdir(tmp_path)
    base = read_model(llama(tmp_path / "base", 0, "F32"))
    tensors: dict[str, Any] = {}
    for seed, (name, weight) in enumerate((("one", 0.7), ("other", 0.3)), 1):
        steps = read_model(llama(tmp_path / f"step{seed}", seed, "F32"))
        own = {key: (base[key] + 0.02 * steps[key]).astype(np.float32) for key in base}
        write_model(tmp_path / name, own, "F32")
        tensors = {key: tensors.get(key, 0.0) + weight * own[key] for key in own}
    out = write_model(tmp_path / "merged", tensors, "F32")
    tell(out)
    return out


def tell(folder: Path, name: str = "x", one: str = "one", other: str = "other") -> None:
    (folder / "README.md").write_text(CARD.format(name=name, one=one, other=other))


def weights(data: dict[str, Any]) -> dict[str, float]:
    """The parents of the best hypothesis, and their weights."""
    best = data["weights"][0]["infer"]["hypotheses"][0]
    return {parent["name"]: round(parent["weight"], 2) for parent in best["parents"]}


def test_one_folder_under_two_names_is_one_candidate(merged):
    again = {"base": "./base", "candidates": (str(merged.parent / "one"), "./other", "./base")}
    data = audit("merged", Path("out"), NO_SCORES, **again)
    entry = data["weights"][0]
    assert entry["remerge"]["verdict"] == "different"
    assert weights(data) == {"one": 0.7, "other": 0.3}
    assert sorted(entry["infer"]["candidates"]) == ["one", "other"]
    assert entry["infer"]["base"] == "./base"
    levels = [row["level"] for row in data["verdicts"] if row["about"] == "weights"]
    assert levels == ["bad", "warn"]


def test_candidates_are_looked_at_where_the_parents_of_the_recipe_are_not_here(merged):
    tell(merged, one="gone/model")
    data = audit("merged", Path("out"), NO_SCORES, base="base", candidates=("one", "other"))
    entry = data["weights"][0]
    assert entry["remerge"]["verdict"] == "unverifiable"
    assert "gone/model: not here" in entry["remerge"]["why"]
    assert weights(data) == {"one": 0.7, "other": 0.3}
    assert audit("merged", Path("out"), NO_SCORES)["weights"][0]["infer"] is None


def test_candidates_are_looked_at_where_the_recipe_cannot_be_read(merged, tmp_path):
    tell(merged, one="one, odd: 1")
    data = audit("merged", tmp_path / "out", NO_SCORES, candidates=("one", "other"))
    entry = data["weights"][0]
    assert "its recipe cannot be read: recipe:" in entry["why"]
    assert entry["infer"]["candidates"]
    assert str(tmp_path) not in (tmp_path / "out/audit.json").read_text()


def test_the_page_tells_no_folder_of_this_machine(merged, tmp_path):
    (tmp_path / "empty").mkdir()
    places = (str(tmp_path / "one"), str(tmp_path / "empty"))
    data = audit(str(merged), tmp_path / "out", NO_SCORES, candidates=places)
    assert "empty holds neither" in data["weights"][0]["why"]
    for name in ("audit.json", "audit.html"):
        assert str(tmp_path) not in (tmp_path / "out" / name).read_text()


def test_what_steers_a_terminal_is_not_printed(merged, capsys):
    tell(merged, name=r"\e]0;owned\a\e[31m")
    data = audit("merged", Path("out"), NO_SCORES)
    assert "\x1b" in data["claims"][0]["published"]
    run.show(data)
    shown = capsys.readouterr().out
    assert "owned" in shown
    assert not {"\x1b", "\x07"} & set(shown)


def test_the_command_that_repeats_an_audit_is_one_for_a_shell(merged):
    merged.rename("my merged")
    data = audit("my merged", Path("out"), NO_SCORES)
    command = ["mergelab", "audit", "my merged", "--depth", "0", "--skip", "scores"]
    assert [shlex.split(line) for line in data["commands"]] == [command]


def test_of_a_model_that_lies_nowhere_the_claims_file_must_tell(merged):
    Path("board.json").write_text(json.dumps({"results": {"arc_easy": {"acc,none": 0.5}}}))
    said = {"title": "C", "claims": [{"from": "board.json"}]}
    Path("said.yaml").write_text(json.dumps(said))
    data = audit("said.yaml", Path("out"), Options())
    assert [claim["verdict"] for claim in data["claims"]] == ["unverifiable"]
    assert "say it in the claims file" in data["claims"][0]["why"]


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A study without results, and what is claimed of its models."""
    folder = tmp_path / "study"
    folder.mkdir()
    llama(tmp_path / "one", 1)
    llama(tmp_path / "other", 2)
    models = {name: {"path": str(tmp_path / name)} for name in ("one", "other")}
    (folder / "study.yaml").write_text(json.dumps({"title": "S", "about": "s", "models": models}))
    order = {"model": "one", "than": "other", "benchmark": "arc_easy"}
    said = {"title": "C", "claims": [], "comparisons": [order]}
    (folder / "claims.yaml").write_text(json.dumps(said))
    return folder


@pytest.mark.parametrize(
    "options", [Options(fetch=True), NO_SCORES, Options(limit=3), Options(depth=1)]
)
def test_options_that_change_nothing_of_a_study_are_refused(study, tmp_path, options):
    with pytest.raises(UserError, match="audited by its own results"):
        audit(str(study), tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


def test_candidates_are_of_a_model_alone(study, tmp_path):
    for target in (study, study / "claims.yaml"):
        with pytest.raises(UserError, match="--base and --candidates are for a model"):
            audit(str(target), tmp_path / "out", Options(), candidates=("x",))


def test_a_hub_that_cannot_be_asked_does_not_end_the_audit_of_a_folder(merged, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr("mergelab.hub_errors.WAITS", ())
    tell(merged, one="org/one", other="org/other")
    data = audit(str(merged), Path("out"), Options(skip=("scores",)))
    assert any("ancestors were not looked up" in text for text in data["warnings"])
    (row,) = (row for row in data["verdicts"] if row["about"] == "lineage")
    assert row["verdict"] == "unverifiable"
    with pytest.raises(UserError, match="cannot reach"):
        audit("org/one", Path("out"), Options(skip=("scores",)))


def test_a_folder_that_holds_nothing_to_audit_is_refused(tmp_path):
    """A card, a recipe or weights: each alone is enough."""
    folder, out = tmp_path / "model", tmp_path / "audit"
    folder.mkdir()
    for name in (None, "config.json", "model.safetensors.index.json"):
        if name:
            (folder / name).write_text("{}")
        with pytest.raises(UserError, match="nothing to audit: it holds neither weights"):
            audit(str(folder), out, NO_SCORES)
        assert not out.exists()
    (folder / "README.md").write_text("# A model\n")
    audit(str(folder), out, NO_SCORES)
    assert (out / "audit.html").is_file()
