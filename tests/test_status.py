"""mergelab status: what is done, running, failed, stale and why, on real runs of the verbs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import llama
from conftest import Run

from mergelab.folders import alone
from mergelab.status import rows
from mergelab.steps import Steps
from mergelab.study_file import load_study

STUDY = "title: t\nmodels:\n  base: {path: ../../base}\n  a: {path: ../../a}\n"
LINEAR = "merge_method: linear\nmodels: [{model: %s, parameters: {weight: %s}}]\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """recipes/mine: merge one of model a, merge two of one; the working directory above it."""
    for seed, name in enumerate(("base", "a")):
        llama(tmp_path / name, seed)
    folder = tmp_path / "recipes/mine"
    folder.mkdir(parents=True)
    (folder / "study.yaml").write_text(STUDY)
    (folder / "one.yaml").write_text(LINEAR % ("a", 1))
    (folder / "two.yaml").write_text(LINEAR % ("recipe:one", 1))
    monkeypatch.chdir(tmp_path)
    return folder


def record(folder: Path, *step: str) -> Path:
    return Path("results/mine/records") / Steps(load_study(folder)).all[step].record


def do(mergelab: Run, folder: Path, verb: str, name: str) -> None:
    args = [str(folder), name]
    if verb == "merge":
        args = [str(folder / f"{name}.yaml"), "-o", f"results/mine/merged/{name}"]
    mergelab(verb, *args, "--record", str(record(folder, verb, name)))


def states(folder: Path) -> dict[str, tuple[str, str]]:
    found = rows(load_study(folder), Path("results/mine"))
    return {f"{row.verb} {row.name}": (row.state, row.why) for row in found}


def test_steps_are_to_do_then_done_then_stale_with_the_reason(folder: Path, mergelab: Run) -> None:
    before = states(folder)
    assert before["fetch a"] == ("to do", "can run now")
    assert before["merge one"] == ("to do", "after fetch a")
    do(mergelab, folder, "fetch", "a")
    do(mergelab, folder, "merge", "one")
    do(mergelab, folder, "merge", "two")
    assert {states(folder)[step] for step in ("fetch a", "merge one", "merge two")} == {
        ("done", "")
    }
    (folder / "one.yaml").write_text(LINEAR % ("a", 0.5))
    after = states(folder)
    own = "its recipe, its settings or the version of its method changed"
    assert after["merge one"] == ("stale", own)
    assert after["merge two"] == ("stale", "merge one is out of date")
    do(mergelab, folder, "merge", "one")
    assert states(folder)["merge two"] == ("stale", "what it is made from was made anew")


@pytest.mark.parametrize("verb", ["merge", "fetch"])
def test_a_study_that_changed_after_it_was_planned_gets_no_record_of_what_it_was(
    folder: Path, mergelab: Run, verb: str
) -> None:
    name = {"merge": "one", "fetch": "a"}[verb]
    asked = record(folder, verb, name)
    if verb == "merge":
        (folder / "one.yaml").write_text(LINEAR % ("a", 0.5))
        args = [str(folder / "one.yaml"), "-o", "results/mine/merged/one"]
    else:
        llama(folder.parents[1] / "a", 7)
        args = [str(folder), "a"]
    done = mergelab(verb, *args, "--record", str(asked))
    assert done.returncode == 2
    assert "changed since this run was planned" in done.stderr
    assert not asked.exists()
    assert not Path("results/mine/merged/one").exists()


def test_a_failed_step_shows_the_last_line_of_its_log(folder: Path) -> None:
    log = Path("results/mine/logs") / record(folder, "fetch", "a").name.replace(".json", ".log")
    log.parent.mkdir(parents=True)
    log.write_text("reading\nerror: no disk\n")
    assert states(folder)["fetch a"] == ("failed", f"{log}: error: no disk")


def test_a_step_that_was_done_and_is_no_longer_did_not_fail(folder: Path, mergelab: Run) -> None:
    def logged(verb: str, name: str) -> None:
        """Do a step as Snakemake does it, with what it says in its log."""
        args = [str(folder / "one.yaml"), "-o", "results/mine/merged/one"]
        args = args if verb == "merge" else [str(folder), name]
        path = record(folder, verb, name)
        log = Path("results/mine/logs") / path.name.replace(".json", ".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(mergelab(verb, *args, "--record", str(path)).stderr)

    logged("fetch", "a")
    logged("merge", "one")
    (folder / "one.yaml").write_text(LINEAR % ("a", 0.5))
    logged("merge", "one")
    (folder / "one.yaml").write_text(LINEAR % ("a", 1))
    assert states(folder)["merge one"][0] == "stale"
    mergelab("merge", str(folder / "one.yaml"), "-o", "results/mine/merged/one")  # by hand
    mergelab("fetch", str(folder), "a")
    assert states(folder)["fetch a"] == ("to do", "can run now")
    logged("fetch", "a")
    assert states(folder)["merge one"] == ("to do", "can run now")
    logged("merge", "one")  # which is up to date
    mergelab("merge", str(folder / "one.yaml"), "-o", "results/mine/merged/one")
    assert states(folder)["merge one"] == ("to do", "can run now")


def test_a_step_runs_while_a_process_is_in_it_and_the_next_one_waits(
    folder: Path, mergelab: Run
) -> None:
    path = record(folder, "fetch", "a")
    command = [sys.executable, "-m", "mergelab.cli", "fetch", str(folder), "a", "--record"]
    with alone(path):
        assert states(folder)["fetch a"][0] == "running"
        second = subprocess.Popen(
            [*command, str(path)], stderr=subprocess.PIPE, text=True, env=os.environ
        )
        assert second.stderr is not None
        assert "another process works on fetch-a" in second.stderr.readline()
        path.write_text("{}")
    assert "done by that process" in second.communicate(timeout=120)[1]
    assert second.returncode == 0
    assert path.read_text() == "{}"
    assert states(folder)["fetch a"][0] == "done"


def test_a_running_step_shows_how_far_its_log_says_it_is(folder: Path) -> None:
    path = record(folder, "fetch", "a")
    log = Path("results/mine/logs") / path.name.replace(".json", ".log")
    log.parent.mkdir(parents=True)
    far = "fetch org/a: 1 GB of 2 GB (50 %), 100 MB/s, 0:00:10 left"
    log.write_text(f"{far}\n")
    with alone(path):
        assert states(folder)["fetch a"] == ("running", f"{log}: {far}")


def test_parts_of_a_divided_merge_are_counted(folder: Path, mergelab: Run) -> None:
    do(mergelab, folder, "fetch", "a")
    stem = record(folder, "merge", "one").name.removesuffix(".json")
    results = Path("results/mine")
    logs = [results / f"logs/{stem}.{number}-of-3.log" for number in (1, 2, 3)]
    logs[0].parent.mkdir(parents=True)

    def part(number: int) -> None:
        """One part, as Snakemake does it."""
        args = [str(folder / "one.yaml"), "-o", "results/mine/merged/one"]
        logs[number - 1].write_text(mergelab("merge", *args, "--part", f"{number}/3").stderr)

    part(1)
    assert states(folder)["merge one"] == ("to do", "of 3 parts 1 done")
    logs[1].write_text("")
    with alone(results / "merged/one.part-2-of-3"):
        state, why = states(folder)["merge one"]
        assert (state, why.split(";")[0]) == ("running", "of 3 parts 1 done, 1 running")
        assert f"part 2: {logs[1]}: nothing was said" in why
    logs[1].write_text("error: no disk\n")
    lost = f"of 3 parts 1 done, 1 failed; part 2: {logs[1]}: error: no disk"
    assert states(folder)["merge one"] == ("failed", lost)
    part(2)
    part(3)
    assert states(folder)["merge one"] == ("to do", "of 3 parts 3 done")
    do(mergelab, folder, "merge", "one")
    assert states(folder)["merge one"] == ("done", "")


def test_the_table_counts_the_states(folder: Path, mergelab: Run) -> None:
    done = mergelab("status", str(folder))
    assert "merge" in done.stdout
    assert "5 to do" in done.stdout
