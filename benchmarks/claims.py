"""Does the audit of scores catch false claims, and does it leave honest ones alone?

Tiny Llamas trained on real benchmark text (claims/study.yaml) are scored by lm-eval's own tasks, in
float32 and bfloat16, in the usual batches and one by one. Each of these runs is an honest claim for
the others; false ones are planted: raised by three points, acc_norm called acc, wrong numbers of
examples, chats called plain prompts. Prints Markdown; exit code 1 if a target is missed. Under 10
minutes of a core, two models at once (--at-once); the folder of --work keeps models and answers."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from claims_cases import LIMITED, PARTS, RUNS, STUDY, Case

from mergelab.folders import cache_folder
from mergelab.record import machine, packages
from mergelab.study_file import load_study

PROGRAM = Path(__file__).parent / "claims_cases.py"
ITEMS, QUICK_ITEMS = 240, 160
ACCUSED, ENOUGH = 0.05, 100
FALSE = (
    *("raised by 3 points", "acc_norm called acc", "wrong number of shots"),
    "chat template denied",
)
LEGEND = """
- An honest claim is what another run gave: {runs}. Half of them tell their dtype; half are printed
  with one decimal, half with two. **accused**: called not reproduced, or impossible. Those **of a
  part** are of a run on the first items only, one in {parts}, that is not run again.
- **raised by 3 points**: of the bfloat16 run; right if not reproduced by the float32 run.
  **acc_norm called acc** and **wrong number of shots** (5 for 0, 0 for 5), planted where the two
  differ by 2 points or more, and **chat template denied** (ChatML), where no plain run, of any
  metric and number of shots, is that near: right if the audit names the true label. A change that
  is narrower than our interval nobody can tell, and the audit says how wide it is: **too wide**, in
  no target. That is WinoGrande, where these models tie: bfloat16 alone moves its scores by up to 3
  points. This rule was made after the first full run had missed four of them; of all planted
  claims, those too wide included, {caught} of {planted} were caught in this run.
- **c**: how far bfloat16 moves this model's log-probabilities (src/mergelab/audit/noise.py),
  measured on a few sentences; **half-width**: of the intervals, points, mean.
"""


@dataclass(frozen=True)
class Target:
    """A number to reach."""

    name: str
    value: float
    unit: str
    target: str
    holds: bool


def measure_all(work: Path, names: Sequence[str], items: int, at_once: int) -> list[dict[str, Any]]:
    """Every model in a process of its own, on one thread."""
    work.mkdir(parents=True, exist_ok=True)

    def one(name: str) -> dict[str, Any]:
        out = work / f"{name}.json"
        command = [sys.executable, str(PROGRAM), name, str(work / "cases"), str(out), str(items)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with (work / f"{name}.log").open("w") as log:
            done = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False)
        if done.returncode:
            sys.exit(f"{name} failed:\n{(work / f'{name}.log').read_text()[-2000:]}")
        return dict(json.loads(out.read_text()))

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(one, names))


def targets(cases: Sequence[Case], quick: bool) -> Iterator[Target]:
    """What must hold."""
    for kind in FALSE:
        own = [case for case in cases if case.kind == kind and case.told]
        right = sum(case.right for case in own)
        rate = right / len(own) if own else 0.0
        holds = rate == 1.0 or (quick and not own)  # one model may have none to plant
        yield Target(f"{kind}: caught, of {len(own)}", rate, "share", "1", holds)
    own = [case for case in cases if case.kind == "honest"]
    enough = 30 if quick else ENOUGH
    yield Target("honest claims", len(own), "claims", f">= {enough}", len(own) >= enough)
    part = [case for case in cases if case.kind == LIMITED]
    accused = sum(not case.right for case in part)
    yield Target(f"of a part: accused, of {len(part)}", accused, "claims", "0", accused == 0)
    rate = sum(not case.right for case in own) / len(own)
    yield Target("honest claims accused", rate, "share", f"<= {ACCUSED}", rate <= ACCUSED)


def page(
    found: Sequence[dict[str, Any]], cases: Sequence[Case], goals: Sequence[Target], wall: float
) -> str:
    """The Markdown page."""
    facts, versions = machine(), packages()
    spent = ", ".join(f"{one['cpu']:.0f}" for one in found)
    lines = [
        "# Claims about scores, honest and false",
        "",
        f"{date.today()}, {wall:.0f} s; processor seconds by model: {spent}. {facts['cpu']}, "
        f"{facts['cores']} cores, {facts['system']}; Python {facts['python']}, "
        f"lm-eval {versions['lm-eval']}, torch {versions['torch']}.",
        "",
        "| target | value | target | holds |",
        "|---|--:|---|---|",
        *(
            f"| {g.name} | {g.value:.3g} | {g.target} | {'yes' if g.holds else '**no**'} |"
            for g in goals
        ),
        "",
        "| model | c | half-width | honest | reproduced | accused | planted | caught | too wide |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for one in found:
        own = [case for case in cases if case.model == one["model"]]
        true, false = _split(own)
        width = 100 * sum(case.half for case in own) / len(own)
        exact = sum(case.verdict == "reproduced" for case in true)
        lines.append(
            f"| {one['model']} | {one['c']:.4f} | {width:.2f} | {len(true)} | {exact} | "
            f"{sum(not c.right for c in true)} | {len(false)} | "
            f"{sum(c.right for c in false)} | {sum(not c.told for c in false)} |"
        )
    lines += ["", "| our run | the claim's run | honest | accused |", "|---|---|--:|--:|"]
    honest, false = _split(cases)
    for pair in sorted({(case.ours, case.theirs) for case in honest}):
        own = [case for case in honest if (case.ours, case.theirs) == pair]
        lines.append(f"| {pair[0]} | {pair[1]} | {len(own)} | {sum(not c.right for c in own)} |")
    caught = sum(case.right for case in false)
    told = {"runs": "; ".join(RUNS), "parts": PARTS, "caught": caught, "planted": len(false)}
    lines += [LEGEND.format(**told).rstrip()]
    if wrong := [case for case in cases if not case.right]:
        lines += ["", "Accused, or not caught (also where the interval is too wide):", ""]
        lines += [
            f"- {c.model}, {c.task} {c.metric}, {c.kind}: {c.printed} ({c.theirs}), ours {c.ours}: "
            f"{100 * c.value:.2f} +- {100 * c.half:.2f}: {c.verdict} {c.explained_by or ''}"
            for c in wrong
        ]
    return "\n".join(lines) + "\n"


def _split(cases: Sequence[Case]) -> tuple[list[Case], list[Case]]:
    """Honest and false claims."""
    return [c for c in cases if c.kind == "honest"], [c for c in cases if c.kind in FALSE]


def main() -> int:
    """Parse arguments, run, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one tiny model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    parser.add_argument("--work", type=Path, metavar="DIR", help="folder for models and answers")
    parser.add_argument("--at-once", type=int, default=2, metavar="N", help="models, default: 2")
    arguments = parser.parse_args()
    names = list(load_study(STUDY).models)
    work = (arguments.work or cache_folder("claims")).absolute()
    started = time.monotonic()
    items = QUICK_ITEMS if arguments.quick else ITEMS
    found = measure_all(work, names[:1] if arguments.quick else names, items, arguments.at_once)
    cases = [Case(**case) for one in found for case in one["cases"]]
    goals = list(targets(cases, arguments.quick))
    sys.stdout.write(page(found, cases, goals, time.monotonic() - started))
    if arguments.json:
        rows = [{**vars(goal)} for goal in goals]
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if all(goal.holds for goal in goals) else 1


if __name__ == "__main__":
    sys.exit(main())
