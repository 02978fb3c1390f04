"""Do mergelab and mergekit 0.1.5 give the same numbers? Every tensor, counted in float32 ulps.

Random bfloat16 models are merged by both with `dtype: float32`; each result is compared with the
other's and with a float64 definition of the method (parity_truth.py). The peer gets an environment
of its own (peer.py). Exit code 1 if a target is missed."""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import options
import parity_models
import peer
from parity_cases import CASES, Case
from parity_compare import Job, Tally, compare
from parity_models import FULL, QUICK, Size, write_models

from mergelab import engine
from mergelab.plan import SHARD_SIZE, make_plan
from mergelab.recipe import load_recipe

TARGET = 1.0  # float32 ulps
OLD_CPU = {"ATEN_CPU_CAPABILITY": "default"}  # torch without AVX2 and AVX-512, hence without FMA
HEADER = (
    "| recipe | models | entries | differ | largest difference, ulp | with the peer's factors | "
    "other selection / free at the cut | error of mergelab, ulp | error of mergekit, ulp | holds |"
)
LEGEND = """
- Recipes set `dtype: float32`, inputs are bfloat16. One **ulp** is the float32 spacing at the
  largest magnitude among the float64 result and the terms that are summed to it (base, w x, or
  lambda w tau): where terms cancel, rounding is relative to them, not to what is left.
- **error**: against a float64 definition of the method with the recipe's decimal weights.
- **with the peer's factors**: SLERP once more with the peer's two factors, recovered from its
  result. The peer takes norms and dot product in float32, so its angle is off; ours are float64.
- linear: the peer uses fused multiply-add where the processor has it (last row: without it, it
  differs from itself); ours goes through float64 on every processor and gives the same bits.
- **free at the cut**: entries of a magnitude of which TIES must keep some and drop others; the
  peer sorts unstably, mergelab keeps the lowest index. They are no part of the other columns, and
  each equals one of the possible choices within 1 ulp, or the row fails.
- Target: largest difference <= 1 ulp; for slerp with the peer's factors, and mergelab's own error
  no larger than the peer's: the peer's float32 angle is the less exact one.
- Rows that store bfloat16 count in bfloat16 ulps and have no target. With `dtype: bfloat16` the
  peer rounds every step to 8 bits, mergelab once at the end; its TIES also selects on rounded
  task vectors.
"""


def jobs(folder: Path, cases: list[Case], size: Size, seeds: int) -> Iterator[list[Job]]:
    """All cases that share one set of models, set by set; a set is deleted after its turn.

    Each set has a path of its own: the peer keeps what it read, by path."""
    for number, (family, heads) in enumerate(sorted({(c.family, c.heads) for c in cases})):
        for seed in range(seeds):
            for architecture in ("llama", "qwen2"):
                place = folder / f"{number}-{seed}-{architecture}"
                bits = write_models(place, architecture, family, seed, size, heads)
                group = [case for case in cases if (case.family, case.heads) == (family, heads)]
                yield [make_job(case, k, place, bits) for k, case in enumerate(group)]
                shutil.rmtree(place)


def make_job(case: Case, number: int, place: Path, bits: Mapping[str, Any]) -> Job:
    """Write a case's recipe beside its models and plan it."""
    path = place / f"{number}.yaml"
    path.write_text(case.text.replace("FOLDER", str(place)))
    recipe = load_recipe(path)
    plan = make_plan(recipe, {m: Path(m) for m in recipe.models}, shard_size=SHARD_SIZE)
    return Job(case, place, bits, path, plan)


def run(folder: Path, python: Path, quick: bool) -> tuple[list[Tally], dict[str, Any]]:
    """Merge and compare everything: a tally per case, and what the peer says of itself.

    The last tally compares the peer with itself on an older processor."""
    cases = [case for case in CASES if case.quick or not quick]
    tallies = [Tally(case) for case in cases]
    by_case = dict(zip(cases, tallies, strict=True))
    old_case = dataclasses.replace(cases[0], name="mergekit against itself without FMA: linear")
    tallies.append(Tally(old_case))
    size, seeds = (QUICK, 1) if quick else (FULL, 2)
    with (
        peer.started(python, folder / "peer.log") as mergekit,
        peer.started(python, folder / "old.log", **OLD_CPU) as old,
    ):
        for group in jobs(folder, cases, size, seeds):
            for job in group:
                mergekit.merge(job.recipe, job.out("mergekit"))
                engine.merge(job.plan, job.out("mergelab"))
                compare(job, by_case[job.case])
                if job.case == cases[0]:
                    old.merge(job.recipe, job.out("old"))
                    compare(job, tallies[-1], "old")
        return tallies, mergekit.facts


def held(tally: Tally) -> tuple[str, float, bool] | None:
    """What a case must keep (name, value in ulps, does it?); None if it is only shown."""
    if tally.case.stored or tally.case.method == "mergekit":
        return None
    if tally.case.method == "slerp":
        holds = tally.left <= TARGET and tally.ours <= max(tally.theirs, TARGET)
        return "largest difference with the peer's factors", tally.left, holds
    holds = tally.worst <= TARGET and tally.unexplained == 0
    return "largest difference", tally.worst, holds


def row(tally: Tally) -> str:
    """One line of the table."""
    goal = held(tally)
    factors = tally.case.method == "slerp" and not tally.case.stored
    selection = f"{tally.other:,} / {tally.equal:,}" if tally.case.method == "ties" else ""
    if tally.unexplained:
        selection += f" ({tally.unexplained} unexplained)"
    cells = (
        tally.case.name,
        tally.case.family,
        f"{tally.entries:,}",
        f"{tally.differing:,} ({tally.differing / tally.entries:.2%})" if tally.differing else "0",
        f"{tally.worst:.3g}",
        f"{tally.left:.3g}" if factors else "",
        selection,
        "" if goal is None and not tally.case.stored else f"{tally.ours:.2f}",
        f"{tally.theirs:.2f}",
        "shown" if goal is None else "yes" if goal[2] else "**no**",
    )
    return "| " + " | ".join(cells) + " |"


def machine(facts: Mapping[str, Any]) -> str:
    """Processor and versions, one line."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), cpu)
    return (
        f"{cpu}, {os.cpu_count()} cores, {platform.system()}; Python {platform.python_version()}, "
        f"mergelab {version('mergelab')} (numpy {np.__version__}); mergekit {peer.MERGEKIT} "
        f"(torch {facts['torch']}, {facts['capability']} kernels, one thread)"
    )


def page(tallies: list[Tally], facts: Mapping[str, Any], seconds: float, quick: bool) -> str:
    """The Markdown report."""
    size = "quick" if quick else "full"
    families = [f"- **{name}** models: {text}." for name, text in parity_models.FAMILIES.items()]
    lines = [
        "# Numbers of mergelab beside mergekit's",
        "",
        f"{time.strftime('%Y-%m-%d')}, {size} run, {seconds:.0f} s. {machine(facts)}.",
        "",
        HEADER,
        "|---|---|--:|--:|--:|--:|--:|--:|--:|---|",
        *map(row, tallies),
        "",
        *families,
        LEGEND.strip(),
    ]
    return "\n".join(lines) + "\n"


def entries(tallies: list[Tally]) -> Iterator[dict[str, Any]]:
    """The numbers for --json."""
    for tally in tallies:
        case, goal, unit = tally.case, held(tally), "ulp of float32"
        name = f"{case.name} ({case.family})"
        if goal is not None:
            value = {"value": goal[1], "unit": unit, "target": f"<= {TARGET:g}", "holds": goal[2]}
            yield {"name": f"{name}: {goal[0]}", **value}
        shown = {
            "largest difference": (tally.worst, "ulp of bfloat16" if case.stored else unit),
            "differing entries": (tally.differing / tally.entries, "share"),
            "other selection": (tally.other / tally.entries, "share"),
            "error of mergelab": (tally.ours, "ulp of bfloat16" if case.stored else unit),
            "error of mergekit": (tally.theirs, "ulp of bfloat16" if case.stored else unit),
        }
        for what, (number, kind) in shown.items():
            if goal is None or what != goal[0]:
                entry = {"name": f"{name}: {what}", "value": number, "unit": kind}
                yield {**entry, "target": None, "holds": None}


def main() -> int:
    """Parse arguments, run, report."""
    arguments = options.parsed(__doc__, quick="smaller models, one seed")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tallies, facts = run(Path(folder), arguments.python, arguments.quick)
    text = page(tallies, facts, time.monotonic() - started, arguments.quick)
    options.report(text, entries(tallies), arguments.json)
    goals = [goal for goal in map(held, tallies) if goal is not None]
    return 0 if all(holds for _, _, holds in goals) else 1


if __name__ == "__main__":
    sys.exit(main())
