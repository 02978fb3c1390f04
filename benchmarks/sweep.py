"""A sweep of 50 recipes over the same three models: how long to plan it, and to schedule a job?

Merges only, of tiny models, one after the other, so that what Snakemake adds to the jobs' own time
can be seen. Exit code 1 if a target is missed."""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mergelab.record import machine, packages

ROOT = Path(__file__).parents[1]
RECIPES = 50
HIDDEN, LAYERS, VOCABULARY = 64, 4, 256
PLAN_TARGET, JOB_TARGET = 20.0, 1.0  # seconds
STUDY = """\
title: A sweep
models:
  base: {path: ../../base}
  math: {path: ../../math}
  medical: {path: ../../medical}
"""
RECIPE = """\
merge_method: ties
base_model: base
models:
  - {model: math, parameters: {weight: %.2f, density: 0.5}}
  - {model: medical, parameters: {weight: %.2f, density: 0.5}}
"""


def project(place: Path, recipes: int) -> None:
    """The repository's pipeline, three models and one recipe per weight."""
    for name in ("Snakefile", "workflow", "profiles"):
        (place / name).symlink_to(ROOT / name)
    for seed, name in enumerate(("base", "math", "medical")):
        model(place / name, seed)
    study = place / "recipes/sweep"
    study.mkdir(parents=True)
    (study / "study.yaml").write_text(STUDY)
    for number in range(recipes):
        weight = (number + 1) / (recipes + 1)
        (study / f"w{number:02d}.yaml").write_text(RECIPE % (weight, 1 - weight))


def model(folder: Path, seed: int) -> None:
    """A tiny Llama-like model of random numbers."""
    folder.mkdir()
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"model.layers.{layer}.self_attn.{part}.weight"] = (HIDDEN, HIDDEN)
    generator = np.random.default_rng(seed)
    tensors = {n: generator.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def snakemake(place: Path, *arguments: str) -> tuple[float, float]:
    """Seconds that one Snakemake takes with its jobs, and seconds of processor."""
    command = [sys.executable, "-m", "snakemake", "--config", "study=sweep", *arguments]
    started, before = time.monotonic(), processor()
    done = subprocess.run(
        command,
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stdout)
    return time.monotonic() - started, processor() - before


def processor() -> float:
    """Seconds of processor that finished child processes took."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def job_seconds(place: Path) -> list[float]:
    """The own time of every job, by Snakemake's benchmarks."""
    found = []
    for path in place.glob("results/sweep/benchmarks/*.tsv"):
        with path.open() as file:
            found += [float(row["s"]) for row in csv.DictReader(file, delimiter="\t")]
    return found


def measure(recipes: int) -> list[dict[str, Any]]:
    """Plan the sweep, run it on one core, look at it again."""
    place = Path(tempfile.mkdtemp(prefix="mergelab-sweep-"))
    try:
        project(place, recipes)
        plan, plan_cpu = snakemake(place, "-n", "--quiet", "all")
        run, _ = snakemake(place, "--cores", "1", "--quiet", "all")
        jobs = job_seconds(place)
        again, _ = snakemake(place, "-n", "--quiet", "all")
    finally:
        shutil.rmtree(place)
    overhead = (run - sum(jobs)) / len(jobs)
    return [
        entry(f"planning {recipes} recipes over three models", plan, PLAN_TARGET),
        entry("the same, of processor", plan_cpu, None),
        entry(f"planning when all {len(jobs)} jobs are done", again, PLAN_TARGET),
        entry("scheduling, per job", overhead, JOB_TARGET),
        entry("a job itself, mean", sum(jobs) / len(jobs), None),
    ]


def entry(name: str, value: float, target: float | None) -> dict[str, Any]:
    """One figure."""
    holds = target is None or value <= target
    return {"name": name, "value": value, "unit": "s", "target": target, "holds": holds}


def page(found: list[dict[str, Any]]) -> str:
    """The Markdown page."""
    facts, versions = machine(), packages()
    lines = [
        "# A sweep on the laptop profile\n",
        f"{facts['cpu']}, {facts['cores']} cores; Python {facts['python']}, "
        f"mergelab {versions['mergelab']}, Snakemake {version('snakemake')}\n",
        "| what | seconds | target | holds |",
        "|---|---|---|---|",
    ]
    for row in found:
        known = row["target"] is not None
        target, holds = f"≤ {row['target']:g}" if known else "", "yes" if row["holds"] else "no"
        lines.append(
            f"| {row['name']} | {row['value']:.2f} | {target} | {holds if known else ''} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, print, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="10 recipes instead of 50")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    arguments = parser.parse_args()
    found = measure(10 if arguments.quick else RECIPES)
    sys.stdout.write(page(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if all(row["holds"] for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
