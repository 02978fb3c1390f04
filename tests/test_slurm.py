"""Studies on a real Slurm: the same bytes as on one machine, and nothing lost when things break."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_safetensors
from slurm_cluster import Slurm, processes, running, wait, why_not
from tiny import tiny_model

ROOT = Path(__file__).parents[1]
HALTING = Path(__file__).with_name("halting")
pytestmark = pytest.mark.xdist_group("slurm")
Run = subprocess.Popen[str]

TINY = """\
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
"""
TIES = """\
merge_method: ties
base_model: base
models:
  - {model: other, parameters: {weight: 0.5, density: 0.5}}
  - {model: base, parameters: {weight: 0.25, density: 0.5}}
"""
LARGE = """\
title: Large enough to be caught at work
models:
  base: {path: ../../base}
"""
SNAKEMAKE = """\
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from snakemake.cli import main
from snakemake_executor_plugin_slurm import Executor
# Between two looks at the jobs the plugin pauses 10 s longer each time; that is too long for tests.
Executor.next_seconds_between_status_checks = property(lambda _: 2, lambda *_: None)
main(sys.argv[1:])
"""
CLUSTER = "cluster: {partition: all, gpu_partition: gpu, gpu: fake, part_gb: %g}\n"


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """A cluster of three nodes."""
    if reason := why_not():
        if os.environ.get("MERGELAB_TEST_SLURM") == "required":
            pytest.fail(reason)
        pytest.skip(f"no Slurm: {reason}")
    with running() as cluster:
        yield cluster


class Project:
    """A folder with the repository's pipeline, as a fresh clone has it, and one study."""

    def __init__(
        self, place: Path, study: str, part_gb: float = 100, name: str = "mine", **recipes: str
    ) -> None:
        self.place, self.name, self.results = place, name, place / "results" / name
        place.mkdir(parents=True, exist_ok=True)
        for part in ("Snakefile", "workflow", "profiles", "slurm"):
            path = ROOT / part
            if path.is_dir() and not path.is_symlink():
                shutil.copytree(path, place / part, symlinks=True)
            else:
                shutil.copy2(path, place / part, follow_symlinks=False)
        (place / "slurm/cluster.yaml").write_text(CLUSTER % part_gb)
        folder = place / "recipes" / name
        folder.mkdir(parents=True)
        for file, text in {"study": study, **recipes}.items():
            (folder / f"{file}.yaml").write_text(text)

    def start(self, *arguments: str, executor: str = "slurm") -> Run:
        """Start Snakemake on the study."""
        command = ["--config", f"study={self.name}", *arguments]
        if executor == "slurm":
            command += ["--profile", "slurm", "--slurm-status-command", "squeue"]
            command += ["--slurm-init-seconds-before-status-checks", "2"]  # instead of 10
        path = filter(None, (str(HALTING), os.environ.get("PYTHONPATH")))
        return subprocess.Popen(
            [sys.executable, "-c", SNAKEMAKE, *command],
            cwd=self.place,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,
        )

    def run(self, *arguments: str, executor: str = "slurm") -> str:
        """Run Snakemake to its end; what it says."""
        return finished(self.start(*arguments, executor=executor))

    def hashes(self, name: str) -> dict[str, str]:
        """sha256 of a merge's files, by its record."""
        record = json.loads((self.results / "merged" / name / "merge.json").read_text())
        return {file["name"]: file["sha256"] for file in record["outputs"]["files"]}

    def log(self, name: str) -> str:
        """What a step's jobs said."""
        return "".join(path.read_text() for path in self.results.glob(f"logs/{name}.*.log"))

    def jobs(self, slurm: Slurm) -> list[dict[str, str]]:
        """The project's jobs, in the order in which they were submitted."""
        ours = [job for job in slurm.jobs() if job["WorkDir"] == str(self.place)]
        return sorted(ours, key=lambda job: int(job["JobId"]))

    def workers(self) -> list[tuple[int, str]]:
        """The processes that merge in this folder, with their commands."""
        found = []
        for pid, text in processes():
            with contextlib.suppress(OSError):
                here = Path(f"/proc/{pid}/cwd").readlink() == self.place
                if here and "-m mergelab.cli merge" in text and "python" in text.split()[0]:
                    found.append((pid, text))
        return found


def finished(process: Run, code: int = 0) -> str:
    """Wait for Snakemake; what it said."""
    try:
        text, _ = process.communicate(timeout=1800)
    except subprocess.TimeoutExpired:
        process.kill()
        text, _ = process.communicate()
        pytest.fail(f"Snakemake does not end:\n{text}")
    assert process.returncode == code, text
    return text


def contents(results: Path) -> dict[str, bytes]:
    """Weights, evidence, scores, items, findings, metrics and plots of a study, by file."""
    kinds = ("*.safetensors", "*.parquet", "*.jsonl", "findings/*.json", "metrics.json", "*.csv")
    found = {path for kind in kinds for path in results.rglob(kind)}
    return {str(path.relative_to(results)): path.read_bytes() for path in sorted(found)}


def large(place: Path, seed: int, tensors: int = 40) -> None:
    """A model of random bfloat16 numbers, 2 MB a tensor."""
    place.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    found = {}
    for number in range(tensors):
        values = generator.integers(0, 128, (1000, 1000)).astype(np.float32) / 64 - 1
        found[f"model.layers.{number}.mlp.up_proj.weight"] = ("BF16", values)
    write_safetensors(place / "model.safetensors", found)
    (place / "config.json").write_text('{"model_type": "llama", "vocab_size": 8}')


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two large models."""
    place = tmp_path_factory.mktemp("weights")
    for seed, name in enumerate(("base", "other")):
        large(place / name, seed)
    return place


def merging(place: Path, weights: Path, part_gb: float = 100) -> Project:
    """A project that merges the large models."""
    project = Project(place, LARGE, part_gb, ties=TIES)
    for name in ("base", "other"):
        (place / name).symlink_to(weights / name)
    return project


def memory(job: dict[str, str]) -> int:
    """MB that a job asked for."""
    found = re.search(r"mem=(\d+)M", job["TRES"])
    assert found
    return int(found[1])


@pytest.fixture(scope="module")
def laptop(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The tiny study, run without Slurm."""
    project = Project(tmp_path_factory.mktemp("laptop"), TINY, ties=TIES)
    tiny_model(project.place / "base")
    tiny_model(project.place / "other", seed=1)
    rows = [{"question": f"{i} + {i * 7}?", "answer": str(i * 8)} for i in range(20)]
    (project.place / "recipes/mine/items").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (project.place / "recipes/mine/items/sums.jsonl").write_text(lines)
    project.run(executor="local")
    return project


def test_a_study_gives_the_same_bytes_on_slurm_and_its_merge_is_spread_over_nodes(
    slurm: Slurm, laptop: Project, tmp_path: Path
) -> None:
    project = Project(tmp_path / "slurm", TINY, part_gb=0.00015, ties=TIES)
    for name in ("base", "other", "recipes/mine/items"):
        shutil.copytree(laptop.place / name, project.place / name)
    project.run()
    assert contents(project.results) == contents(laptop.results)
    assert project.hashes("ties") == laptop.hashes("ties")
    jobs = project.jobs(slurm)
    rules = sorted(job["Comment"].partition("_wildcards")[0] for job in jobs)
    merge = ["rule_merge", *["rule_merge_part"] * 3]
    assert rules == ["rule_detect_detect", *["rule_evaluate"] * 2, *merge, *["rule_probe"] * 2]
    assert {job["JobState"] for job in jobs} == {"COMPLETED"}
    nodes = {job["NodeList"] for job in jobs if "merge_part" in job["Comment"]}
    assert len(nodes) > 1
    for job in jobs:
        models = "evaluate" in job["Comment"] or "probe" in job["Comment"]
        assert (job["Partition"] == "gpu") == models
        assert (job.get("TresPerJob") == "gres:gpu:fake:1") == models
    assert "Nothing to be done" in project.run()


def test_the_demo_study_gives_the_same_bytes_on_slurm(slurm: Slurm, tmp_path: Path) -> None:
    """On one machine first, unless MERGELAB_TEST_DEMO names the results of a run just made."""
    files = {path.stem: path.read_text() for path in (ROOT / "recipes/demo").glob("*.yaml")}
    study = files.pop("study")
    laptop = Project(tmp_path / "laptop", study, name="demo", **files)
    project = Project(tmp_path / "slurm", study, name="demo", **files)
    for place in (laptop.place, project.place):
        shutil.copytree(ROOT / "recipes/demo/data", place / "recipes/demo/data")
    if made := os.environ.get("MERGELAB_TEST_DEMO"):
        shutil.copytree(made, laptop.results)
    laptop.run(executor="local")
    project.run()
    found, expected = contents(project.results), contents(laptop.results)
    assert sorted(found) == sorted(expected)
    assert [name for name in found if found[name] != expected[name]] == []
    assert len(found) == 64
    jobs = project.jobs(slurm)
    assert len(jobs) > 20
    assert {job["JobState"] for job in jobs} == {"COMPLETED"}


def halt(project: Project, journal: str = "1-of-1", megabytes: int = 0) -> None:
    """Have the next merge stop itself in its middle, with so much more memory taken."""
    (project.place / "halt").write_text(f"journal-{journal}.jsonl {megabytes}")


def halted(project: Project, journal: str = "1-of-1", executor: str = "slurm") -> tuple[Run, int]:
    """Snakemake, and the process of a merge that is halted in its middle."""
    halt(project, journal)
    process = project.start("--until", "merge", executor=executor)
    wait(lambda: [*project.place.glob("halted-*")], "a merge at work", 400)
    (found,) = project.place.glob("halted-*")
    pid = int(found.name.partition("-")[2])
    stat = Path(f"/proc/{pid}/stat")
    wait(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "the merge to halt")
    assert not (project.results / "merged/ties").exists()
    return process, pid


@pytest.fixture(scope="session")
def expected(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The hashes of an undisturbed merge."""
    project = merging(tmp_path_factory.mktemp("expected"), weights)
    project.run("--until", "merge", executor="local")
    return project.hashes("ties")


def test_a_job_killed_for_memory_is_tried_again_with_more(
    slurm: Slurm, weights: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    project = merging(tmp_path / "project", weights)
    halt(project, megabytes=1000)  # and Slurm, which looks every second, finds it
    said = project.run("--until", "merge")
    assert [*project.place.glob("halted-*")]
    first, second = project.jobs(slurm)
    assert (first["JobState"], second["JobState"]) == ("FAILED", "COMPLETED"), said
    assert memory(first) < 1000
    assert memory(second) == 2 * memory(first)
    assert project.hashes("ties") == expected


def test_a_job_out_of_time_is_tried_again_with_twice_the_time_and_goes_on_where_it_was(
    slurm: Slurm, weights: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    project = merging(tmp_path / "project", weights)
    process, _ = halted(project)
    (job,) = project.jobs(slurm)
    slurm.call("scontrol", "update", f"jobid={job['JobId']}", "timelimit=00:00:01")
    finished(process)
    first, second = project.jobs(slurm)
    assert (first["JobState"], second["JobState"]) == ("TIMEOUT", "COMPLETED")
    assert (job["TimeLimit"], second["TimeLimit"]) == ("00:11:00", "00:22:00")
    assert memory(second) == 2 * memory(first)
    assert project.hashes("ties") == expected


def test_a_lost_node_costs_its_part_only(
    slurm: Slurm, weights: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    project = merging(tmp_path / "project", weights, part_gb=0.06)
    process, pid = halted(project, "2-of-3")
    environment = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    node = dict(line.partition("=")[::2] for line in environment)["SLURMD_NODENAME"]
    slurm.kill_node(node)
    try:
        finished(process)
    finally:
        slurm.start_node(node)
    again = [job for job in project.jobs(slurm) if job["Comment"].endswith("_2_3")]
    assert [job["JobState"] for job in again] == ["NODE_FAIL", "COMPLETED"]
    assert again[1]["NodeList"] != node
    assert project.hashes("ties") == expected
    wait(lambda: slurm.states()[node] == "idle", "the node to come back")


def test_a_restart_of_the_controller_is_not_noticed(
    slurm: Slurm, weights: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    project = merging(tmp_path / "project", weights)
    process, pid = halted(project)
    slurm.save_state(project.jobs(slurm)[0]["JobId"])
    slurm.kill("slurmctld")
    time.sleep(5)  # long enough for Snakemake to ask in vain
    slurm.start_controller()
    os.kill(pid, signal.SIGCONT)
    finished(process)
    (job,) = project.jobs(slurm)
    assert job["JobState"] == "COMPLETED"
    assert project.hashes("ties") == expected


def test_two_runs_at_once_and_a_killed_one_leave_one_writer(
    slurm: Slurm, weights: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    project = merging(tmp_path / "project", weights)
    process, pid = halted(project)
    other = finished(project.start("--until", "merge"), code=1)
    assert "make sure that no other Snakemake process is" in other.replace("\n", " ")
    process.kill()  # snakemake dies, its job goes on
    process.communicate()
    assert "--unlock" in finished(project.start("--until", "merge"), code=1)
    project.run("--unlock")
    process = project.start("--until", "merge")
    wait(lambda: "waiting for it" in project.log("merge-ties"), "the second job", 400)
    os.kill(pid, signal.SIGCONT)
    finished(process)
    assert "done by that process" in project.log("merge-ties")
    assert [job["JobState"] for job in project.jobs(slurm)] == ["COMPLETED"] * 2
    assert project.hashes("ties") == expected


@pytest.mark.parametrize("executor", ["local", "slurm"])
def test_ctrl_c_leaves_nothing_half_done_and_the_same_command_goes_on(
    executor: str,
    weights: Path,
    expected: dict[str, str],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    cluster = request.getfixturevalue("slurm") if executor == "slurm" else None
    project = merging(tmp_path / "project", weights)
    process, pid = halted(project, executor=executor)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    if executor == "local":
        os.kill(pid, signal.SIGCONT)
    finished(process, code=1)
    wait(lambda: not project.workers(), "the merge to end")
    assert not list(project.results.glob("merged/ties"))
    assert not list(project.results.glob("records/merge-*.json"))
    (journal,) = project.results.glob("merged/.ties.merge-*.partial/journal-*.jsonl")
    before = journal.read_text().splitlines()
    assert before
    process = project.start("--until", "merge", executor=executor)  # nothing to unlock
    text = finished(process)
    assert "Unlock" not in text
    assert project.hashes("ties") == expected
    if cluster:
        states = [job["JobState"] for job in project.jobs(cluster)]
        assert states == ["CANCELLED", "COMPLETED"]


def test_a_full_disk_leaves_nothing_and_room_is_all_that_it_takes(
    slurm: Slurm, weights: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    project = merging(tmp_path / "project", weights)
    project.results.mkdir(parents=True)
    slurm.call("mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", str(project.results))
    try:
        said = finished(project.start("--until", "merge", "--retries", "0"), code=1)
        assert "the merge needs 80 MB, but only" in said.replace("\n", " ")
        assert not list(project.results.glob("merged/ties"))
        assert not list(project.results.glob("records/merge-*.json"))
        slurm.call("mount", "-o", "remount,size=400m", str(project.results))
        project.run("--until", "merge")
        assert project.hashes("ties") == expected
    finally:
        slurm.call("umount", str(project.results))
