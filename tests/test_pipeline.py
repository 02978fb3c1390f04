"""Snakemake from start to end on tiny models, with the repository's own Snakefile and rules."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_model

ROOT = Path(__file__).parents[1]
STUDY = """\
title: A tiny study
datasets:
  sums:
    path: items
    files: [sums.jsonl]
    text: "Question: {{question}} Answer: {{answer}}"
    parts: {suspects: 8, controls: 12}
models:
  base: {path: ../../base}
suite:
  - {name: sums_nll, task: text_nll, data: sums/controls}
contamination:
  - {benchmark: sums, base: base, suspects: sums/suspects, controls: sums/controls,
     detectors: [base_loss], planted: []}
policy: {max_merge_depth: 1}
"""
CLAIMS = """\
title: What a card says
source: https://example.org/card
claims:
  - {model: one, benchmark: sums_nll, value: 0.5, metric: bits_per_byte}
"""
RECIPE = """\
merge_method: linear
models:
  - {model: base, parameters: {weight: 0.5}}
"""


def snakemake(place: Path, *arguments: str, code: int = 0, **environment: str) -> str:
    """Run Snakemake in a project folder; its output. It must end with `code`."""
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", *arguments, "--config", "study=tiny"],
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stdout
    return done.stdout


def planned(place: Path) -> set[str]:
    """The jobs that a dry run would do, by the names of their logs."""
    text = snakemake(place, "-n", "--quiet", "host")
    logs = [line.split("/")[-1] for line in text.splitlines() if line.strip().startswith("log:")]
    return {log.split(".")[0] for log in logs}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project folder: the repository's pipeline, a tiny model, one study."""
    for name in ("Snakefile", "workflow", "profiles"):
        (tmp_path / name).symlink_to(ROOT / name)
    tiny_model(tmp_path / "base")
    study = tmp_path / "recipes/tiny"
    (study / "items").mkdir(parents=True)
    rows = [{"question": f"{i} + {i * 7}?", "answer": str(i * 8)} for i in range(20)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (study / "items/sums.jsonl").write_text(lines)
    (study / "study.yaml").write_text(STUDY)
    (study / "one.yaml").write_text(RECIPE)
    return tmp_path


def test_a_study_runs_to_its_report_and_only_changes_are_done_again(project: Path) -> None:
    results, recipes = project / "results/tiny", project / "recipes/tiny"
    chain = {f"{verb}-one" for verb in ("merge", "evaluate", "probe", "detect")}
    page = {"report-tiny", "record-tiny"}
    first = {f"{verb}-base" for verb in ("fetch", "evaluate", "probe", "detect")} | {"data-sums"}
    assert planned(project) == first | chain | page
    snakemake(project)
    assert (results / "report.html").stat().st_size > 10_000
    assert set(json.loads((results / "metrics.json").read_text())) == {"base", "one"}
    os.utime(recipes / "one.yaml")  # a newer time alone changes nothing
    assert planned(project) == set()
    (recipes / "claims.yaml").write_text(CLAIMS)
    assert planned(project) == {"audit-tiny"} | page
    snakemake(project)
    assert planned(project) == set()
    page.add("audit-tiny")
    snakemakes_own_report_holds_ours(project, first | chain | page - {"record-tiny"})
    a_copy_is_as_finished_until_a_byte_of_its_model_changes(project, first | chain | page)

    by_hand = ("merge", "recipes/tiny/one.yaml", "-o", "results/tiny/merged/one")
    subprocess.run([sys.executable, "-m", "mergelab.cli", *by_hand], cwd=project, check=True)
    assert {"merge-one"} <= planned(project) <= chain | page  # is done again, the study's way

    text = (recipes / "one.yaml").read_text()
    (recipes / "one.yaml").write_text(text.replace("weight: 0.5", "weight: 0.25"))
    (recipes / "two.yaml").write_text(text)
    other = {name.replace("one", "two") for name in chain}
    assert planned(project) == chain | other | page
    snakemake(project, "--until", "merge")
    record = json.loads((results / "merged/one/merge.json").read_text())
    assert "weight: 0.25" in record["recipe"]["text"]


def snakemakes_own_report_holds_ours(project: Path, steps: set[str]) -> None:
    """Page, tables and records are in it, byte for byte; it is made without a network."""
    snakemake(project, "--report", "snakemake.html", HTTPS_PROXY="http://127.0.0.1:9")
    text = (project / "snakemake.html").read_text()
    found = re.findall(r"data:[a-z/+-]+;[^\",]*base64,([A-Za-z0-9+/=]+)", text)
    held = {base64.b64decode(data) for data in found}
    results = project / "results/tiny"
    ours = [*results.glob("plots/*.csv"), results / "report.html", results / "audit/audit.html"]
    records = [path for path in results.glob("records/*.json") if "record-" not in path.name]
    assert len(ours) == 4
    assert {path.name.split(".")[0] for path in records} == steps
    assert {path.read_bytes() for path in (*ours, *records)} <= held
    for words in ("as one page", "AUC of every detector", "Record of the step", "of the study"):
        assert words in text


def a_copy_is_as_finished_until_a_byte_of_its_model_changes(project: Path, steps: set[str]) -> None:
    """On another machine, or in a clone, files have other times and places."""
    copy = project / "copy"
    leave = shutil.ignore_patterns("copy", ".snakemake")
    shutil.copytree(project, copy, symlinks=True, ignore=leave, copy_function=shutil.copyfile)
    (copy / "base").rename(copy / "moved")
    study = copy / "recipes/tiny/study.yaml"
    study.write_text(study.read_text().replace("../../base", "../../moved"))
    assert planned(copy) == {"report-tiny", "record-tiny"}  # the page shows study.yaml
    study.write_text(study.read_text().replace("../../moved", "../../base"))
    (copy / "moved").rename(copy / "base")
    assert planned(copy) == set()
    weights = copy / "base/model.safetensors"
    state, data = weights.stat(), bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert planned(copy) == steps - {"data-sums"}


def test_a_failed_job_says_why_at_the_end_of_the_run(project: Path) -> None:
    weights = project / "base/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + struct.pack("<f", math.nan))
    said = snakemake(project, "--until", "merge", code=1)
    end = said[said.rindex("\nmerge one failed. results/tiny/logs/merge-one.") :]
    assert "error: tensor model.norm.weight: 1 entries of base" in end
    assert "Traceback" not in said
    assert not (project / "results/tiny/merged/one").exists()
    told = subprocess.run(
        [sys.executable, "-m", "mergelab.cli", "status", "recipes/tiny"],
        cwd=project,
        capture_output=True,
        text=True,
    )
    assert "1 failed" in told.stdout


def test_a_mistake_in_a_recipe_stops_the_run_before_anything_starts(project: Path) -> None:
    recipe = project / "recipes/tiny/one.yaml"
    recipe.write_text(recipe.read_text().replace("weight:", "wieght:"))
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "--config", "study=tiny"],
        cwd=project,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "one.yaml:3: linear has no parameter 'wieght'. Did you mean 'weight'?" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (project / "results").exists()
