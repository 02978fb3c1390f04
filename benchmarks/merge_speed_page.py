"""What merge_speed.py found: targets, numbers for --json, the Markdown page."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge_speed_run import SAMPLE, Run

RESULTS = Path(__file__).parent / "results" / "merge_speed.md"
FASTER = {  # than mergekit, warm page cache
    "linear": 5.0,
    "passthrough": 4.0,
    "task_arithmetic": 6.0,
    "slerp": 8.0,
    "dare_ties": 10.0,
    "ties": 25.0,
    "breadcrumbs": 25.0,
    "della": 10.0,
    "sce": 15.0,
    "model_stock": 8.0,
}
FLOOR = {"linear": 2.0}  # times the I/O floor, start-up subtracted
MEMORY = 200.0  # MB, anonymous
SHARE = 0.05  # of the peer's memory
BLOCK = 2**17 * 4  # bytes of a block in float32; one per model and worker
LARGER = 1.1  # memory at a model 4 times as large, over that at the small one
START = dict.fromkeys(FASTER, 1.5) | {"mergelab --help": 0.5}  # seconds


@dataclass(frozen=True)
class Row:
    """One method: runs of the floor (plain, and with fsync), of mergelab, of the peer."""

    method: str
    models: int
    floor: Run
    synced: Run
    first: Run
    later: Run
    peer: Run | None


@dataclass(frozen=True)
class Growth:
    """mergelab with `models` models of `size` bytes each."""

    method: str
    models: int
    size: int
    run: Run


@dataclass
class Results:
    """Everything found so far."""

    machine: str
    quick: bool
    workers: int
    repeats: int
    way: tuple[tuple[str, ...], str] | None = None
    starts: dict[str, Run] = field(default_factory=dict)
    warm: list[Row] = field(default_factory=list)
    cold: list[Row] = field(default_factory=list)
    growth: list[Growth] = field(default_factory=list)
    begun: float = field(default_factory=time.monotonic)


def over_floor(results: Results, row: Row, run: Run, floor: Run) -> float:
    """A run of mergelab over the floor's, each without its start-up."""
    ours, theirs = results.starts[row.method], results.starts["I/O floor"]
    return (run.wall - ours.wall) / max(floor.wall - theirs.wall, 1e-3)


def entries(results: Results) -> Iterator[dict[str, Any]]:
    """The numbers for --json. Nothing is judged in a quick run."""
    for number in _judged(results):
        yield number | ({"target": None, "holds": None} if results.quick else {})


def _judged(results: Results) -> Iterator[dict[str, Any]]:
    for name, run in results.starts.items():
        yield entry(f"start: {name}", run, run.wall, "s", START.get(name), most=True)
    for row in results.warm:
        yield from _row_entries(results, row)
    for row in results.cold:
        for name in ("floor", "synced", "first", "later", "peer"):
            run = getattr(row, name)
            if run:
                yield entry(f"{row.method}, cold: {name}", run, run.wall, "s")
    yield from _growth_entries(results)


def _row_entries(results: Results, row: Row) -> Iterator[dict[str, Any]]:
    """Of one method: times, ratios, memory."""
    name = row.method
    for kind in ("floor", "synced", "first", "later", "peer"):
        run = getattr(row, kind)
        if run:
            yield entry(f"{name}: {kind}, wall", run, run.wall, "s")
            yield entry(f"{name}: {kind}, CPU", run, run.cpu, "s")
    for kind, run in (("first", row.first), ("later", row.later)):
        if row.peer:
            ratio = 0.0 if broken(row.peer) else row.peer.wall / run.wall
            yield entry(f"{name}: faster than mergekit, {kind}", run, ratio, "x", FASTER[name])
    floors = (("floor", row.floor), ("floor with fsync", row.synced))
    for what, floor in () if results.quick else floors:  # quick: smaller than start-up's noise
        target = FLOOR.get(name) if what == "floor" else None
        ratio = over_floor(results, row, row.later, floor)
        yield entry(f"{name}: over the I/O {what}", row.later, ratio, "x", target, most=True)
    ours = max((row.first, row.later), key=lambda run: run.anonymous)
    failed = row.first if row.first.failed else row.later
    ours = failed if failed.failed else ours
    memory = ours.anonymous / 1e6
    yield entry(f"{name}: peak anonymous memory", ours, memory, "MB", MEMORY, most=True)
    if row.peer and row.peer.anonymous:
        share = ours.anonymous / row.peer.anonymous
        yield entry(f"{name}: memory over mergekit's", ours, share, "x", SHARE, most=True)


def _growth_entries(results: Results) -> Iterator[dict[str, Any]]:
    """Memory per further model, and at a larger model."""
    for method in dict.fromkeys(g.method for g in results.growth):
        small, *more = [g for g in results.growth if g.method == method]
        for g in more:
            same = [s for s in (small, *more) if s.models == g.models and s.size < g.size]
            if same:
                ratio = g.run.anonymous / max(same[0].run.anonymous, 1)
                name = f"{method}: memory at a model {g.size / small.size:.1f} times as large"
                yield entry(name, g.run, ratio, "x", LARGER, most=True)
            else:
                growth = (g.run.anonymous - small.run.anonymous) / (g.models - small.models) / 1e6
                name = f"{method}: memory per further model, {small.models} to {g.models}"
                limit = results.workers * BLOCK / 1e6
                yield entry(name, g.run, growth, "MB", limit, most=True)


def entry(
    name: str, run: Run, value: float, unit: str, target: float | None = None, *, most: bool = False
) -> dict[str, Any]:
    """A number with its target (`most`: at most), which a failed run misses."""
    number = {"name": name, "value": None if broken(run) else value, "unit": unit}
    if target is None:
        return {**number, "target": None, "holds": None}
    holds = not run.failed and (value <= target if most else value >= target)
    return {**number, "target": f"{'<=' if most else '>='} {target:.4g}", "holds": holds}


def broken(run: Run) -> bool:
    """Failed for another reason than its time limit."""
    return bool(run.failed) and not run.late


def seconds(run: Run | None) -> str:
    """Wall and CPU time of a run; what went wrong if it did."""
    if run is None:
        return ""
    if run.late:
        return f"> {run.wall:.0f}"
    return "failed" if run.failed else f"{run.wall:.2f} ({run.cpu:.1f})"


def memory(run: Run | None) -> str:
    """Peak anonymous memory in MB."""
    return f"{run.anonymous / 1e6:.0f}" if run and not broken(run) else ""


def table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    """A Markdown table: the first column to the left, the others to the right."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows] + [""]


def warm_row(results: Results, row: Row) -> list[str]:
    """A line of the table of methods."""
    found = {n["name"].removeprefix(f"{row.method}: "): n for n in _row_entries(results, row)}

    def number(name: str, form: str) -> str:
        entry = found.get(name)
        return form.format(entry["value"]) if entry and entry["value"] is not None else ""

    missed = [name for name, entry in found.items() if entry["holds"] is False]
    holds = "not judged" if results.quick else "**no**: " + "; ".join(missed) if missed else "yes"
    form = "> {:.1f}" if row.peer and row.peer.late else "{:.1f}"
    ratios = [number(f"faster than mergekit, {kind}", form) for kind in ("first", "later")]
    target = f"{FASTER[row.method]:g}"
    if row.method in FLOOR:
        target += f"; floor x {FLOOR[row.method]:g}"
    return [
        row.method,
        str(row.models),
        seconds(row.floor),
        seconds(row.first),
        seconds(row.later),
        seconds(row.peer),
        *ratios,
        number("over the I/O floor", "{:.2f}"),
        number("over the I/O floor with fsync", "{:.2f}"),
        number("peak anonymous memory", "{:.0f}"),
        memory(row.peer),
        number("memory over mergekit's", "{:.1%}"),
        target,
        holds,
    ]


def cold_row(row: Row) -> list[str]:
    """A line of the table of cold runs."""
    runs = (row.floor, row.synced, row.first, row.later, row.peer)
    return [row.method, str(row.models), *map(seconds, runs)]


def growth_row(growth: Growth) -> list[str]:
    """A line of the table of growth."""
    size = f"{growth.size / 1e9:.3g} GB"
    return [growth.method, str(growth.models), size, seconds(growth.run), memory(growth.run)]


HEAD = [
    *("method", "models", "I/O floor, s", "mergelab first, s", "mergelab later, s", "mergekit, s"),
    *("times faster, first", "later", "over the floor", "over the floor with fsync"),
    *("mergelab, MB", "mergekit, MB", "share", "target", "holds"),
]
COLD_HEAD = ["method", "models", "I/O floor, s", "with fsync, s"]
COLD_HEAD += ["mergelab first, s", "mergelab later, s", "mergekit, s"]
GROWTH_HEAD = ["method", "models", "size of each", "mergelab, s", "anonymous, MB"]


def page(results: Results) -> str:
    """The Markdown page, as far as the run went."""
    taken = f"{time.monotonic() - results.begun:.0f} s so far or in all"
    kind = "quick run (small models: nothing is judged)" if results.quick else "full run"
    lines = [
        *("# Speed and memory of merges", ""),
        f"{time.strftime('%Y-%m-%d')}, {kind}, {taken}. {results.machine}.",
        *("", "## Warm page cache", ""),
        *table(HEAD, [warm_row(results, row) for row in results.warm]),
        *("## Start-up", ""),
        *table(["what", "s", "MB", "target, s", "holds"], start_rows(results)),
    ]
    if results.cold:
        lines += ["## Cold page cache", ""]
        lines += table(COLD_HEAD, [cold_row(row) for row in results.cold])
    if results.growth:
        lines += ["## Growth", ""]
        lines += table(GROWTH_HEAD, [growth_row(growth) for growth in results.growth])
        judged = [judged_row(results, number) for number in _growth_entries(results)]
        lines += table(["", "measured", "target", "holds"], judged)
    way = "(not at all this time)"
    if results.way:
        options, threads = results.way
        way = f"`{' '.join(('mergekit-yaml', *options))}`, OMP_NUM_THREADS={threads}"
    return "\n".join(lines) + LEGEND.format(way=way, repeats=results.repeats, sample=SAMPLE)


def start_rows(results: Results) -> Iterator[list[str]]:
    """The lines of the table of start-up."""
    for name, run in results.starts.items():
        number = entry("", run, run.wall, "s", START.get(name), most=True)
        target = number["target"] or ""
        yield [name, seconds(run), memory(run), target, holds(results, number)]


def judged_row(results: Results, number: dict[str, Any]) -> list[str]:
    """A line of the table of what growth may be."""
    value = "" if number["value"] is None else f"{number['value']:.3g} {number['unit']}"
    return [number["name"], value, number["target"], holds(results, number)]


def holds(results: Results, number: dict[str, Any]) -> str:
    """Whether a target is kept; empty if there is none."""
    if number["holds"] is None:
        return ""
    return "not judged" if results.quick else "yes" if number["holds"] else "**no**"


LEGEND = """
- Each run is a whole process, start-up included: wall seconds (CPU seconds in parentheses). Runs
  alternate; the floor, *mergelab later*, and mergekit where it takes less than a minute, are
  medians of {repeats}, the others one run.
- Before each run, free memory is touched and given back: the host of a virtual machine takes free
  pages away, and whoever writes next would wait for them (seconds of a short run).
- **first**: no input file was ever hashed before, so its sha256 is taken during this run;
  **later**: the hashes are known. Kernels are compiled and cached in both.
- **I/O floor**: a program that reads every input byte with preadv and writes every output byte
  with pwrite to a file of full size, two threads, nothing else; passthrough reads each byte once.
  *Over the floor* is *mergelab later*, start-up of both subtracted; *with fsync*: the floor waits
  for the disk as well.
- **anonymous memory**: largest sum of RssAnon of a process and its children, looked at every
  {sample} s. File-backed pages are not in it. MB are 1e6 bytes.
- **target**: at least so many times faster than mergekit, first and later; at most 200 MB and 5 %
  of mergekit's memory.
- mergekit ran as
  {way},
  the fastest of three ways for linear; mergelab writes shards of 250 MB, too. Both tools are given
  the same recipe with `dtype: bfloat16`; slerp merges two of the models, passthrough stacks parts
  of all four.
- **Start-up**: the same command on models of two tensors; *first use*: on a new machine, with the
  kernels to be compiled.
- **Cold**: every input was dropped from the page cache before the run (the programs were not);
  what the host of a virtual machine keeps is out of reach.
- **Growth**: mergelab alone, files hashed before; models beyond the fourth (beyond the second of
  the large ones) are links to the experts before them. A further model may cost one float32 block
  of 2^17 elements per worker.
"""
