"""Targets and tables of the forensics benchmark."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from forensics_run import Row, tolerance
from forensics_size import MEMORY, TIME, Large

from mergelab.record import machine, packages

LEGEND = """
- Models: small Llamas (4 or 6 layers, hidden 64, 0.2 to 0.3 million parameters), drawn, not
  trained: base normal(0, 0.02); task vectors Student's t with 5 degrees of freedom, of a size that
  differs by tensor and by row, with an sd of 0.0007, 0.002 or 0.005; two pairs of experts share a
  part of theirs (correlation 0.3 and 0.4). Merges are mergelab's own (mixtures: a small script),
  stored as bfloat16 (half of them), float16 or float32. Two or three candidates are decoys.
- **parents**: exactly the true parents are named. **method**: the true one is the best hypothesis,
  or marked as explaining the weights equally well (linear and task_arithmetic whose weights sum to
  1 are one model; so are slerp and linear of nearly parallel tensors, dare_linear and dare_ties of
  one parent, ties and breadcrumbs_ties of one density).
- **weights**: largest error over the parents (SLERP: of t; gradients: over layers and groups), as
  the recipe has them times lambda; of TIES that normalises, weight over the sum of weights, which
  is all that shows. **density**: largest error over the parents.
- **undeclared**: a parent was taken from the candidates; **trained on**: after the merge every
  entry moved, by 5 to 10 % of what an expert moved. Below one rounding step nothing can be seen;
  a parent of so small a weight, or training that moves a model as far as an expert, cannot be told
  from the other by weights alone: the threshold is 12 % of a task vector (8 % of the distance
  between candidates where no base is known).
- **accused**: an undeclared parent or training after the merge was found where there was none.
- The seeds of this run were not used while the method was developed (91 to 99, 2026 and
  4052 were).
"""


@dataclass(frozen=True)
class Goal:
    """One target; `value` None: not measured."""

    name: str
    value: float | None
    target: str
    holds: bool


def goals(rows: Sequence[Row], size: Large | None) -> list[Goal]:
    """Every target of the issue."""
    honest = [row for row in rows if row.case.honest]
    hidden = [row for row in rows if row.case.hidden]
    trained = [row for row in rows if row.case.trained]
    weights = [r.weight_error <= tolerance(r.case) for r in honest if r.weight_error is not None]
    densities = [r.density_error <= 0.02 for r in honest if r.density_error is not None]
    found = [
        _least("parents named correctly", [row.parents for row in honest], 0.98),
        _least("method family", [row.method for row in honest], 0.95),
        _least("weights within 0.01 (whole models), 0.03 (masked)", weights, 0.98),
        _least("densities within 0.02", densities, 0.98),
        _least(
            "undeclared parent detected", [r.result["undeclared"]["found"] for r in hidden], 0.98
        ),
        _least("trained on: reported", [r.result["finetuned"]["found"] for r in trained], 0.9),
    ]
    wrong = sum(row.accused for row in honest)
    found.append(Goal(f"false accusations in {len(honest)} honest", wrong, "0", wrong == 0))
    if size is not None:
        memory, ratio = size.run.anonymous, size.run.wall / size.reading
        good = not size.run.failed
        found.append(
            Goal("anonymous memory, MB", memory / 1e6, "<= 500", good and memory <= MEMORY)
        )
        found.append(Goal("time, times reading once", ratio, "<= 3", good and ratio <= TIME))
    return found


def _least(name: str, held: Sequence[bool], share: float) -> Goal:
    value = sum(held) / len(held) if held else None
    return Goal(
        f"{name} ({len(held)})", value, f">= {share:g}", value is not None and value >= share
    )


def page(rows: Sequence[Row], size: Large | None, seed: int, seconds: float) -> str:
    """The Markdown report."""
    about = machine()
    made = sum(row.seconds for row in rows)
    lines = [
        "# How was it made? Weight forensics without a recipe",
        "",
        f"{time.strftime('%Y-%m-%d')}, seed {seed}, {len(rows)} models, {seconds:.0f} s of "
        f"processor time, {made:.0f} of them in `infer`. {about['cpu']}, {about['cores']} cores, "
        f"{about['system']}; Python {about['python']}, numpy {packages()['numpy']}.",
        "",
        "| target | found | wanted | holds |",
        "|---|--:|--:|---|",
    ]
    for goal in goals(rows, size):
        value = "" if goal.value is None else f"{goal.value:.4g}"
        lines.append(f"| {goal.name} | {value} | {goal.target} | {_yes(goal.holds)} |")
    if size is not None:
        lines += ["", _size(size)]
    lines += ["", *_kinds(rows), "", *_misses(rows), "", LEGEND.strip()]
    return "\n".join(lines) + "\n"


def _yes(holds: bool) -> str:
    return "yes" if holds else "**no**"


def _size(size: Large) -> str:
    run = size.run
    return (
        f"1.1e9 parameters, bfloat16, TIES of three; four candidates and the base, nothing cached: "
        f"reading the six files once took {size.reading:.0f} s, `infer` {run.wall:.0f} s "
        f"({run.cpu:.0f} s of processor time), {run.anonymous / 1e6:.0f} MB of anonymous memory. "
        f"It said: {size.said or run.failed}"
    )


def _kinds(rows: Sequence[Row]) -> Iterable[str]:
    yield "| kind | models | parents | method | weights, worst | densities, worst | accused |"
    yield "|---|--:|--:|--:|--:|--:|--:|"
    for kind in dict.fromkeys(row.case.kind for row in rows):
        mine = [row for row in rows if row.case.kind == kind]
        honest = mine[0].case.honest
        hidden = bool(mine[0].case.hidden)
        cells = [
            str(len(mine)),
            "" if hidden else str(sum(row.parents for row in mine)),
            str(sum(row.method for row in mine)) if honest else "",
            _worst(mine, lambda row: row.weight_error),
            _worst(mine, lambda row: row.density_error),
            str(sum(row.accused for row in mine)) if honest else _found(mine, hidden),
        ]
        yield f"| {kind} | {' | '.join(cells)} |"


def _found(rows: Sequence[Row], hidden: bool) -> str:
    what = "undeclared" if hidden else "finetuned"
    return f"rightly: {sum(bool(row.result[what]['found']) for row in rows)}"


def _worst(rows: Sequence[Row], value: Callable[[Row], float | None]) -> str:
    known = [v for v in map(value, rows) if v is not None]
    return f"{max(known):.4f}" if known else ""


def wrong(row: Row) -> list[str]:
    """What is wrong with a row, in words."""
    case, result = row.case, row.result
    found = []
    if case.honest:
        found += [] if row.parents else ["parents"]
        found += [] if row.method else ["method"]
        found += ["accused"] if row.accused else []
        if row.weight_error is not None and row.weight_error > tolerance(case):
            found.append(f"weights by {row.weight_error:.3f}")
        if row.density_error is not None and row.density_error > 0.02:
            found.append(f"density by {row.density_error:.3f}")
    elif case.hidden:
        found += [] if result["undeclared"]["found"] else ["not detected"]
    else:
        found += [] if row.parents else ["parents"]
        found += [] if result["finetuned"]["found"] else ["not reported"]
    return found


def _misses(rows: Sequence[Row]) -> Iterable[str]:
    missed = [row for row in rows if wrong(row)]
    yield f"Missed: {len(missed)}"
    for row in missed:
        case = row.case
        weights = ", ".join(f"{n} {w:.3g}" for n, w in case.weights.items())
        densities = ", ".join(f"{n} {d:.2g}" for n, d in case.densities.items())
        facts = f"{case.kind}, {case.family.dtype}, moved {case.family.moved:g}: {weights}"
        facts += f"; densities {densities}" if densities else ""
        said = row.result["verdict"].partition(":")[0]
        yield f"- {', '.join(wrong(row))}: {facts}. Said: {said}"


def entries(rows: Sequence[Row], size: Large | None) -> list[dict[str, Any]]:
    """The targets as plain data."""
    return [
        {"name": g.name, "value": g.value, "unit": "", "target": g.target, "holds": g.holds}
        for g in goals(rows, size)
    ]
