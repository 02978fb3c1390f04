"""What is done of a study, what runs, what is out of date and why: `mergelab status`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mergelab.folders import held
from mergelab.record import KEYED
from mergelab.steps import Step, Steps
from mergelab.study import Study

STYLES = {"done": "green", "running": "blue", "failed": "red", "stale": "yellow", "to do": "dim"}
LOG_LINE = 160  # characters
DONE = re.compile(  # a log's last line
    "(wrote |ready: )|part .* is done;|.*: (is up to date|done by that process)$"
)
PART = re.compile(r".*\.(\d+)-of-(\d+)\.log")  # of a divided merge


@dataclass(frozen=True)
class Row:
    """One step: `state` done, running, failed, stale (an older result is there) or to do."""

    verb: str
    name: str
    state: str
    why: str


def rows(study: Study, results: Path) -> list[Row]:
    """Every step of a study in the order in which it can run.

    Raises UserError for a mistake in the study, as any run would."""
    steps = Steps(study).all
    done = {place for place, step in steps.items() if (results / "records" / step.record).is_file()}
    return [
        Row(step.verb, step.name, *_state(step, steps, done, results)) for step in _ordered(steps)
    ]


def _ordered(steps: dict[tuple[str, str], Step]) -> list[Step]:
    """Steps after those that they need, otherwise in the study's order."""
    found: dict[tuple[str, str], Step] = {}

    def visit(place: tuple[str, str]) -> None:
        for need in steps[place].needs:
            if need not in found:
                visit(need)
        found.setdefault(place, steps[place])

    for place in steps:
        visit(place)
    return list(found.values())


def _state(
    step: Step,
    steps: dict[tuple[str, str], Step],
    done: set[tuple[str, str]],
    results: Path,
) -> tuple[str, str]:
    record, log = results / "records" / step.record, _log(step, results)
    if held(record):
        return "running", _said(log)
    if (step.verb, step.name) in done:
        return "done", ""
    waits = [" ".join(need) for need in step.needs if need not in done]
    if log.is_file() and not waits and not DONE.match(_last_line(log)):
        return "failed", _said(log)
    if not waits and (divided := _parts(step, results)):
        return divided
    old = _older(record)
    if old:
        return "stale", _changed(step, old, waits)
    return "to do", f"after {_listed(waits)}" if waits else "can run now"


def _parts(step: Step, results: Path) -> tuple[str, str] | None:
    """The state of a merge of which jobs do parts, and how far they are; None if there are none."""
    stem = step.record.removesuffix(".json")
    logs = {log: PART.fullmatch(log.name) for log in results.glob(f"logs/{stem}.*-of-*.log")}
    begun = [(match[1], match[2], log) for log, match in logs.items() if match]
    if not begun:
        return None
    total = max(begun, key=lambda part: part[2].stat().st_mtime)[1]  # of the latest division
    states: dict[str, list[str]] = {"done": [], "running": [], "failed": []}
    for number, among, log in sorted(begun, key=lambda part: int(part[0])):
        if among == total:
            out = results / "merged" / f"{step.name}.part-{number}-of-{total}"
            mark = results / "parts" / f"{stem}.{number}-of-{total}"
            ended = mark.exists() or DONE.match(_last_line(log))
            state = "running" if held(out) else "done" if ended else "failed"
            states[state].append(f"part {number}: {_said(log)}")
    counts = [f"{len(found)} {state}" for state, found in states.items() if found]
    far = f"of {total} parts {', '.join(counts)}"
    for state in ("running", "failed"):
        if states[state]:
            return state, f"{far}; {states[state][0]}"
    return "to do", far


def _said(log: Path) -> str:
    """A log, and what was written there last."""
    return f"{log}: {_last_line(log)[:LOG_LINE]}"


def _log(step: Step, results: Path) -> Path:
    """Where Snakemake keeps what the step says."""
    return results / "logs" / step.record.replace(".json", ".log")


def _older(record: Path) -> str | None:
    """The key of the step's result under another key, if there is one."""
    name = KEYED.fullmatch(record.name)
    assert name is not None
    for path in sorted(record.parent.glob("*.json")):
        other = KEYED.fullmatch(path.name)
        if other and other[1] == name[1]:
            return path.name.rpartition(".json")[0].rpartition(".")[2]
    return None


def _changed(step: Step, old: str, waits: Sequence[str]) -> str:
    """Why a result is out of date: a key's first half is the step's own, the second its needs'."""
    half = len(step.key) // 2
    causes = []
    if old[:half] != step.key[:half]:
        causes.append("its recipe, its settings or the version of its method changed")
    if old[half:] != step.key[half:]:
        since = _listed(waits) if waits else "what it is made from"
        causes.append(f"{since} {'is out of date' if waits else 'was made anew'}")
    return "; ".join(causes)


def _listed(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _last_line(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else "nothing was said"


def show(found: Sequence[Row]) -> None:
    """Print the rows as a table, and how many are in each state."""
    out = Console(highlight=False, emoji=False)
    table = Table("step", "of", "state", "", box=None, pad_edge=False)
    for row in found:
        state = Text(row.state, style=STYLES[row.state])
        table.add_row(Text(row.verb), Text(row.name), state, Text(row.why))
    out.print(table)
    counts = {state: sum(row.state == state for row in found) for state in STYLES}
    out.print("\n" + ", ".join(f"{count} {state}" for state, count in counts.items() if count))
