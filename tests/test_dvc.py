"""DVC and Snakemake on one study, in temporary git clones: they agree, and nothing is stored twice.

The study: a local model, a model of a (loopback) hub, two merges, one benchmark."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Run
from loopback_hub import LoopbackHub
from tiny import tiny_model

from mergelab import versions
from mergelab.study_file import load_study

ROOT = Path(__file__).parents[1]
PARTS = ("Snakefile", "workflow", "profiles", "src/mergelab", "dvc.yaml", ".dvc/config")
PARTS = (*PARTS, ".dvc/.gitignore", ".dvcignore", ".gitignore")
MERGELAB = (sys.executable, "-m", "mergelab.cli")
STUDY = """\
title: A study in DVC
datasets:
  sums: {{path: items, files: [sums.jsonl], text: "{{{{q}}}} = {{{{a}}}}", parts: {{test: 12}}}}
models:
  base: {{path: {base}}}
  public: {{hub: acme/public@{commit}}}
suite:
  - {{name: sums, task: text_nll, data: sums/test}}
"""
MERGE = """\
merge_method: {method}
base_model: base
models:
  - {{model: public, parameters: {{weight: 0.5}}}}
parameters: {{lambda: 1.0}}
"""
NOTHING = "Nothing to be done"


class Clone:
    """A git clone of the project, and the programs run in it."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.said = ""  # by the first run
        self.results = place / "results/demo"

    def run(self, *command: str, code: int = 0) -> str:
        """What a program says; it must end with `code`."""
        if command[0] in ("dvc", "snakemake"):
            command = (sys.executable, "-m", *command)
        done = subprocess.run(
            command,
            cwd=self.place,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=1200,
        )
        assert done.returncode == code, done.stdout
        return done.stdout

    def json(self, *command: str) -> Any:
        """What `dvc ... --json` prints, without its warnings."""
        line = [line for line in self.run(*command).splitlines() if line.startswith("{")][-1]
        return json.loads(line)

    def planned(self) -> set[str]:
        """The jobs of a dry run, by the names of their logs."""
        lines = self.run("snakemake", "-n", "--quiet", "host").splitlines()
        logs = [line.split("/")[-1] for line in lines if line.strip().startswith("log:")]
        assert logs or any(NOTHING in line for line in lines)
        return {log.split(".")[0] for log in logs}

    def is_whole(self) -> None:
        """Both programs agree that nothing is left to do."""
        assert "Data and pipelines are up to date" in self.run("dvc", "status")
        assert self.planned() == set()

    def commit(self, message: str) -> None:
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "--message", message)

    def clone(self, place: Path) -> Clone:
        self.run("git", "clone", "--quiet", ".", str(place))
        return Clone(place)

    def change(self, recipe: str, old: str, new: str) -> None:
        path = self.place / f"recipes/demo/{recipe}.yaml"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    def kept(self) -> list[Path]:
        """Every file of the results that is not in git."""
        tracked = self.run("git", "ls-files", "results").splitlines()
        parts = [self.results / part for part in ("benchmarks", "logs")]
        files = [path for path in self.results.rglob("*") if path.is_file()]
        found = [path for path in files if not {*path.parents} & {*parts}]
        return [path for path in found if str(path.relative_to(self.place)) not in tracked]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clone]:
    """The project with the study in it: run, committed, pushed to a folder; to be cloned."""
    folder = tmp_path_factory.mktemp("dvc")
    with pytest.MonkeyPatch.context() as patch, LoopbackHub() as hub:
        _settings(patch, folder / "home", hub)
        study = _project(folder, hub)
        study.commit("The study")
        study.said = study.run("snakemake")
        study.run("dvc", "remote", "add", "--default", "disk", str(folder / "remote"))
        study.commit("Results")
        study.run("dvc", "push")
        yield study


@pytest.fixture
def bare(finished: Clone, tmp_path: Path) -> Clone:
    """A new git clone of it, before `dvc pull`."""
    return finished.clone(tmp_path / "clone")


@pytest.fixture
def clone(bare: Clone) -> Clone:
    """A new git clone of it, after `dvc pull`."""
    bare.run("dvc", "pull")
    return bare


def _settings(patch: pytest.MonkeyPatch, home: Path, hub: LoopbackHub) -> None:
    home.mkdir()
    (home / ".gitconfig").write_text("[user]\nname = Someone\nemail = someone@example.org\n")
    patch.setenv("HOME", str(home))
    patch.setenv("DVC_SITE_CACHE_DIR", str(home / "dvc"))
    patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    patch.setenv("HF_ENDPOINT", hub.url)


def _project(folder: Path, hub: LoopbackHub) -> Clone:
    """This repository's pipeline with one study in it, under git."""
    place = folder / "project"
    for part in PARTS:
        _copy(ROOT / part, place / part)
    recipes = place / "recipes/demo"
    (recipes / "items").mkdir(parents=True)
    rows = [{"q": f"{i} + {i * 7}", "a": i * 8} for i in range(20)]
    (recipes / "items/sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny_model(folder / "base")
    tiny_model(folder / "public", seed=1)
    commit = hub.publish("acme/public", folder / "public")
    (recipes / "study.yaml").write_text(STUDY.format(base=folder / "base", commit=commit))
    for name, method in (("arithmetic", "task_arithmetic"), ("ties", "ties")):
        (recipes / f"{name}.yaml").write_text(MERGE.format(method=method))
    found = Clone(place)
    found.run("git", "init", "--quiet", "--initial-branch", "main")
    return found


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        leave = shutil.ignore_patterns("__pycache__", "*.pyc")
        shutil.copytree(source, target, ignore=leave)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an S3 server on this machine, with the bucket "results"."""
    import boto3
    from moto.server import ThreadedMotoServer

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "loopback")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    boto3.client("s3", endpoint_url=url).create_bucket(Bucket="results")
    yield url
    server.stop()


def test_snakemake_and_dvc_are_two_ways_to_run_one_study(
    finished: Clone, bare: Clone, bucket: str, tmp_path: Path
) -> None:
    assert "DVC has its results" in finished.said
    finished.is_whole()
    assert "'study@demo' didn't change, skipping" in finished.run("dvc", "repro")
    stored_once(finished, but="public")
    only_small_results_are_in_git(finished)

    clone = bare
    a_clone_without_weights_says_what_to_do(clone)
    clone.run("dvc", "pull")
    clone.is_whole()
    assert merge_record(clone, "ties") == merge_record(finished, "ties")

    clone.change("arithmetic", "weight: 0.5", "weight: 0.25")
    a_fetched_model_is_fetched_again(clone)
    ties = (clone.results / "merged/ties/model.safetensors").stat().st_ino
    clone.change("study", "{hub: acme", "{push: true, hub: acme")
    clone.run("dvc", "repro")
    clone.is_whole()
    assert "weight: 0.25" in json.loads(merge_record(clone, "arithmetic"))["recipe"]["text"]
    assert (clone.results / "merged/ties/model.safetensors").stat().st_ino == ties
    clone.commit("Another weight")
    two_commits_compared(clone)

    clone.run("dvc", "exp", "run", "--set-param", "recipes/demo/ties.yaml:parameters.lambda=0.5")
    assert "lambda: 0.5" in json.loads(merge_record(clone, "ties"))["recipe"]["text"]
    clone.is_whole()
    clone.commit("Another lambda")
    stored_once(clone)
    every_object_is_what_its_name_says(clone)

    clone.run("dvc", "remote", "add", "--default", "--force", "s3", "s3://results/dvc")
    clone.run("dvc", "remote", "modify", "s3", "endpointurl", bucket)
    clone.commit("A remote")
    clone.run("dvc", "push")
    third = clone.clone(tmp_path / "third")
    third.run("dvc", "pull")
    third.is_whole()
    assert merge_record(third, "ties") == merge_record(clone, "ties")
    weights = "models/public/model.safetensors"  # pushed, since the study now says so
    assert (third.results / weights).read_bytes() == (clone.results / weights).read_bytes()


def merge_record(clone: Clone, name: str) -> str:
    return (clone.results / f"merged/{name}/merge.json").read_text()


def stored_once(clone: Clone, but: str = "") -> None:
    """Every file that is not in git is the same file on the disk as DVC's (but one model's)."""
    cache = {path.stat().st_ino for path in (clone.place / ".dvc/cache").rglob("*")}
    names = set()
    for path in clone.kept():
        if not but or clone.results / "models" / but not in path.parents:
            assert path.stat().st_ino in cache, path
            names.add(path.name)
    assert {"model.safetensors", "test.jsonl", "report.html"} <= names


def only_small_results_are_in_git(clone: Clone) -> None:
    tracked = clone.run("git", "ls-files", "results").splitlines()
    folders = {Path(name).relative_to("results/demo").parts[0] for name in tracked}
    assert folders == {".dvcignore", "metrics.json", "params.json", "plots", "records"}
    listed = yaml.safe_load((clone.place / "dvc.lock").read_text())["stages"]["files@demo"]["outs"]
    sizes = {out["path"].rpartition("/")[2]: out["nfiles"] for out in listed if "nfiles" in out}
    assert sizes["models"] == 0  # its hash is in git, in the record of the step
    assert sizes["merged"] > 6
    (record,) = (clone.results / "records").glob("fetch-public.*.json")
    weights = clone.results / "models/public/model.safetensors"
    noted = json.loads(record.read_text())["source"]["files"]["model.safetensors"]
    assert noted["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()


def two_commits_compared(clone: Clone) -> None:
    """dvc metrics, params and plots diff tell what a changed weight did."""
    revisions = ("HEAD~1", "HEAD")
    metrics = clone.json("dvc", "metrics", "diff", *revisions, "--json")
    changed = metrics["results/demo/metrics.json"]
    assert list(changed) == ["arithmetic.sums"]
    assert changed["arithmetic.sums"]["diff"] != 0
    params = clone.json("dvc", "params", "diff", *revisions, "--json")
    assert params["results/demo/params.json"] == {
        "arithmetic.models.public.parameters.weight": {"old": 0.5, "new": 0.25, "diff": -0.25},
        "study.models.public.push": {"old": None, "new": True},
    }
    plots = clone.json("dvc", "plots", "diff", *revisions, "--json")["data"]
    scores = next(plot for name, plot in plots.items() if "scores" in name)
    values = scores[0]["content"]["data"]["values"]
    found = [float(v["value"]) for v in values if v["variant"] == "arithmetic"]
    assert len(set(found)) == 2


def every_object_is_what_its_name_says(clone: Clone) -> None:
    """Nothing wrote through a link into DVC's cache."""
    objects = [p for p in (clone.place / ".dvc/cache/files/md5").rglob("*") if p.is_file()]
    assert objects
    for path in objects:
        data = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        assert data == path.parent.name + path.name.removesuffix(".dir"), path


def a_clone_without_weights_says_what_to_do(clone: Clone) -> None:
    said = clone.run("snakemake")
    assert NOTHING in said
    assert "results/demo: some results are not here. Run: dvc pull files@demo" in said
    clone.change("ties", "lambda: 1.0", "lambda: 0.75")
    said = clone.run("snakemake", code=1)
    assert "merge ties needs results that have records, but are not here. Run:" in said
    assert "  dvc pull files@demo\n" in said
    assert "  mergelab fetch recipes/demo public\n" in said
    clone.run("git", "checkout", "--quiet", "recipes")


def a_fetched_model_is_fetched_again(clone: Clone) -> None:
    """It is not in DVC; once it is back, nothing that was made of it is done again."""
    said = clone.run("snakemake", "-n", code=1)
    assert "  mergelab fetch recipes/demo public\n" in said
    assert "dvc pull" not in said
    clone.run(*MERGELAB, "fetch", "recipes/demo", "public")
    chain = {f"{verb}-arithmetic" for verb in ("merge", "evaluate")}
    assert clone.planned() == chain | {"report-demo", "record-demo"}


def test_a_change_that_only_dvc_would_see_makes_its_note_due(clone: Clone) -> None:
    with (clone.place / "src/mergelab/page.py").open("a") as file:
        file.write("# a remark\n")
    assert "src/mergelab" in clone.run("dvc", "status")
    assert clone.planned() == {"record-demo"}


def test_a_verb_run_by_hand_is_noted_by_the_next_run(clone: Clone) -> None:
    clone.run(*MERGELAB, "report", "recipes/demo")
    assert clone.planned() == {"report-demo", "record-demo"}
    said = clone.run(*MERGELAB, "record", "recipes/demo", code=2)
    assert "report demo is not done. Run: snakemake --config study=demo" in said


def test_a_study_that_changed_while_it_ran_is_not_noted_as_current(clone: Clone) -> None:
    (mark,) = (clone.results / "records").glob("record-demo.*.json")
    (clone.place / "recipes/demo/notes.txt").write_text("written while Snakemake was at work")
    asked = str(mark.relative_to(clone.place))
    said = clone.run(*MERGELAB, "record", "recipes/demo", "--record", asked, code=2)
    assert "it changed during the run" in said


def test_the_note_waits_for_another_dvc_command(clone: Clone) -> None:
    from dvc.lock import make_lock

    lock = make_lock(str(clone.place / ".dvc/tmp/lock"))
    lock.lock()
    started = time.monotonic()
    threading.Timer(6, lock.unlock).start()  # without waiting, DVC gives up after 3 seconds
    assert "DVC has its results" in clone.run(*MERGELAB, "record", "recipes/demo")
    assert time.monotonic() - started > 6


def test_what_was_not_pulled_is_not_noted_as_gone(bare: Clone) -> None:
    before = (bare.place / "dvc.lock").read_text()
    for part in ("scores", "data", "evidence", "findings", "report.html", "report.json"):
        bare.run("dvc", "pull", f"results/demo/{part}")
    with (bare.place / "src/mergelab/page.py").open("a") as file:
        file.write("# a remark\n")  # makes the note due
    said = bare.run("snakemake", code=1)
    assert "merge arithmetic has a record, but is not here. Run:\n  dvc pull files@demo\n" in said
    assert not (bare.results / "merged").exists()
    assert (bare.place / "dvc.lock").read_text() == before
    bare.run("dvc", "pull", "files@demo")
    assert "DVC has its results" in bare.run("snakemake")
    bare.is_whole()


def test_results_of_another_commit_are_not_noted_as_this_ones(clone: Clone) -> None:
    clone.run(*MERGELAB, "fetch", "recipes/demo", "public")
    clone.change("arithmetic", "weight: 0.5", "weight: 0.25")
    clone.run("snakemake")
    clone.commit("Another weight")
    clone.run("git", "checkout", "--quiet", "HEAD~1")  # and no dvc checkout
    asked = "Run: dvc checkout files@demo"
    assert f"some results are not here. {asked}" in clone.run("snakemake", "-n")
    clone.change("ties", "lambda: 1.0", "lambda: 0.75")
    assert "  dvc checkout files@demo\n" in clone.run("snakemake", code=1)
    clone.run("git", "checkout", "--quiet", "recipes")
    said = clone.run(*MERGELAB, "record", "recipes/demo", code=2)
    assert "merge arithmetic has a record, but is not here" in said
    clone.run("dvc", "checkout", "files@demo")
    assert "some results" not in clone.run("snakemake", "-n")
    clone.is_whole()


def test_a_clone_of_a_study_that_dvc_does_not_keep_lacks_its_results(bare: Clone) -> None:
    path = bare.place / "dvc.yaml"
    path.write_text(path.read_text().replace("- demo", "- other"))
    said = bare.run("snakemake", "-n")
    assert "demo is not one of the studies of dvc.yaml" in said
    assert "To do everything again: rm -r results/demo/records" in said
    bare.change("ties", "lambda: 1.0", "lambda: 0.75")
    (record,) = (bare.results / "records").glob("merge-arithmetic.*.json")
    assert f"  rm {record.relative_to(bare.place)}\n" in bare.run("snakemake", code=1)


def test_when_dvc_refuses_it_says_why_and_there_is_no_record(clone: Clone) -> None:
    (mark,) = (clone.results / "records").glob("record-demo.*.json")
    mark.unlink()
    path = clone.place / "dvc.lock"
    before = path.read_text()
    path.write_text("schema: '2.0'\nstages: 7\n")
    said = clone.run(*MERGELAB, "record", "recipes/demo", code=2)
    assert "DVC refused to commit files@demo:" in said
    assert "dvc.lock" in said
    assert not mark.exists()
    path.write_text(before)


def test_dvc_has_the_results_before_there_is_a_record(clone: Clone) -> None:
    (mark,) = (clone.results / "records").glob("record-demo.*.json")
    mark.unlink()
    (clone.place / "dvc.lock").unlink()
    process = subprocess.Popen((*MERGELAB, "record", "recipes/demo"), cwd=clone.place)
    while process.poll() is None and not mark.exists():
        time.sleep(0.01)
    process.kill()  # at its first sight
    process.wait()
    stages = yaml.safe_load((clone.place / "dvc.lock").read_text())["stages"]
    merged = next(out for out in stages["files@demo"]["outs"] if out["path"].endswith("/merged"))
    assert merged["nfiles"] > 6


@pytest.mark.parametrize(
    ("without", "why"),
    [
        (".git", "this folder is not under git"),
        (".dvc", "DVC is not set up in this folder"),
        ("dvc.yaml", "demo is not one of the studies of dvc.yaml"),
    ],
)
def test_where_dvc_cannot_keep_a_study_the_last_step_says_so(
    bare: Clone, without: str, why: str
) -> None:
    (bare.place / without).rename(bare.place / "elsewhere")
    said = bare.run("snakemake")
    assert f"recipes/demo: DVC keeps no results of it: {why} (docs/dvc.md)." in said
    (bare.place / "elsewhere").rename(bare.place / without)
    assert bare.planned() == {"record-demo"}


def test_claims_are_among_the_parameters_that_two_commits_differ_in(tmp_path: Path) -> None:
    study = tmp_path / "recipes/demo"
    study.mkdir(parents=True)
    (study / "study.yaml").write_text("title: t\nmodels:\n  base: {path: base}\n")
    claims = "source: s\nclaims: [{model: base, benchmark: b, value: 0.25}]\n"
    (study / "claims.yaml").write_text(claims)
    found = versions.parameters(load_study(study))
    assert set(found) == {"study", "claims"}
    assert found["claims"]["claims"]["base"]["value"] == 0.25


def test_no_step_but_the_last_local_one_calls_dvc(mergelab: Run) -> None:
    rules = {path.stem: path.read_text() for path in (ROOT / "workflow/rules").glob("*.smk")}
    assert [name for name, text in rules.items() if "dvc" in text.lower()] == ["record"]
    local = (ROOT / "Snakefile").read_text().partition("localrules:")[2].partition("\n\n")[0]
    assert "record," in local
    assert "dvc commit" in mergelab("record", "--help").stdout
