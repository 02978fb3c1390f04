"""Every value that one run of a benchmark gave: each metric, filter and way to sum up."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mergelab import aggregates, items, task_build, task_data, task_files
from mergelab.audit import noise
from mergelab.audit.measured import SIZES, Measured
from mergelab.audit.protocol import LOWER
from mergelab.errors import UserError
from mergelab.items import Table
from mergelab.statistics import Z95, Floats
from mergelab.study import Study
from mergelab.suites import COMBINE, Benchmark

NO_FILTER = "none"
BOTH = " and "  # joins the metrics whose mean is published (IFEval)
BY_LENGTH = 2.0  # acc_norm divides by lengths that records lack: it flips up to twice as often
IFEVAL = ("prompt_level_strict_acc", "inst_level_strict_acc")


def readings(
    study: Study,
    bench: Benchmark,
    table: Table,
    summary: Mapping[str, Any],
    results: Path,
    c: float = noise.USUAL,
    record: str | None = None,
) -> list[Measured]:
    """What scores/<variant>.parquet and .json hold of a benchmark, its main metric first.

    `c`: see noise.measure. [] if they do not hold it."""
    own, entry = table[table["benchmark"] == bench.name], summary["benchmarks"].get(bench.name)
    if not len(own) or entry is None:
        return []
    main = str(entry["metric"]).partition(",")
    chat, shots = bool(entry.get("chat_template", False)), int(entry["num_fewshot"])
    facts = {
        "benchmark": bench.name,
        "task": bench.task.removeprefix(task_files.PREFIX),
        "shots": shots,
        "chat_template": chat,
        "fewshot_as_multiturn": bool(entry.get("fewshot_as_multiturn", True))
        if chat and shots
        else None,
        "task_version": str(entry["task_version"]),
        "dtype": str(summary["dtype"]),
        "lm_eval": str(summary["lm_eval"]),
        "record": record,
        "main": (main[0], bool(entry["higher_is_better"])),
        **_extent(study, bench, results, int(own["id"].nunique())),
    }
    kinds = [label for label, _ in own.groupby(["metric", "filter"], sort=True)]
    kinds.sort(key=lambda kind: (kind != (main[0], main[2] or NO_FILTER), kind))
    ways = (bench.combine, *(way for way in COMBINE if way != bench.combine))
    found = [
        _measured(own, replace(bench, combine=way), str(metric), str(filter), c, facts)
        for way in ways[: len(bench.tasks)]  # of one task there is one way
        for metric, filter in kinds
    ]
    return [*found, *_mean_of_two(found)]


def _measured(
    own: Table, bench: Benchmark, metric: str, filter: str, c: float, facts: Mapping[str, Any]
) -> Measured:
    rows = own[(own["metric"] == metric) & (own["filter"] == filter)]
    main, higher = facts["main"]
    label = metric if filter == NO_FILTER else f"{metric},{filter}"
    counted = items.items_of(rows, bench, label)
    assert counted is not None  # the table holds the metric
    score = aggregates.score(counted.parts)
    chances = [pin.chance for pin in bench.tasks]
    rescaled, stretch = None, 1.0
    if all(chance is not None for chance in chances):
        moved = items.items_of(rows, bench, label, normalised=True)
        assert moved is not None
        rescaled = float(aggregates.score(moved.parts)["value"])
        stretch = sum(1 / (1 - (chance or 0.0)) for chance in chances) / len(chances)
    only = counted.parts[0]
    every = len(rows) == facts["n"]  # a metric may be asked of some items only
    right = every and len(counted.parts) == 1 and only.right_or_wrong
    return Measured(
        **{key: value for key, value in facts.items() if key != "main"},
        higher_is_better=higher if metric == main else LOWER.search(metric) is None,
        metric=metric,
        filter=None if filter == NO_FILTER else filter,
        value=score["value"],
        error=(score["ci95"][1] - score["ci95"][0]) / (2 * Z95),
        spread={d: _spread(rows, bench, facts["dtype"], d, c) for d in noise.ROUNDING},
        hits=int(only.value.sum()) if right else None,
        combine=bench.combine if len(bench.tasks) > 1 else None,
        rescaled=rescaled,
        stretch=stretch,
    )


def _spread(rows: Table, bench: Benchmark, ours: str, theirs: str, c: float) -> float:
    """noise.spread of the benchmark, of several tasks as they are summed up."""
    groups = [rows]
    if bench.combine == "tasks":
        groups = [found for _, found in rows.groupby("task", sort=True)]
    each = [
        noise.spread(list(g["resps"]), _floats(g, "value"), _floats(g, "weight"), ours, theirs, c)
        for g in groups
    ]
    more = math.sqrt(BY_LENGTH) if (rows["metric"] == "acc_norm").all() else 1.0
    return more * math.hypot(*each) / len(each)


def _floats(rows: Table, column: str) -> Floats:
    return np.asarray(rows[column].to_numpy(), dtype=np.float64)


def _extent(study: Study, bench: Benchmark, results: Path, n: int) -> dict[str, Any]:
    """How many items a run saw, of how many, and which: see Measured.

    A file in the place of lm-eval's own data may hold others, or fewer, than what is published."""
    file = task_files.find(study, bench, bench.tasks[0])
    split = bench.data or task_data.splits(file.plain(), bench)[0]
    usual = SIZES.get(bench.task.removeprefix(task_files.PREFIX))
    whole: int | None = n
    if bench.limit is not None and n >= bench.limit:
        whole = _rows(study, bench, split, results)
        split += f"[:{bench.limit}]" if whole is None or n < whole else ""
        whole = usual if whole is None and bench.data is None else whole
    replaced = bench.data is not None and file.trusted
    size = usual or (None if replaced else whole)
    return {"n": n, "size": size, "whole": whole, "split": split}


def _rows(study: Study, bench: Benchmark, split: str, results: Path) -> int | None:
    """Items of the file; None if it has gone since, of several tasks, of other formats, and where
    the task itself drops items, as that code is not run here."""
    if len(bench.tasks) > 1:
        return None
    try:
        one = task_build.work(study, bench, bench.tasks[0], results)
        if one.config.get("process_docs") is not None:
            return None
        return _count(one.files["test" if bench.data else split])
    except (UserError, OSError, KeyError):
        return None


def _count(path: Path) -> int | None:
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return int(parquet.read_metadata(path).num_rows)
    if path.suffix == ".jsonl":
        return sum(1 for line in path.read_bytes().split(b"\n") if line.strip())
    return None


def _mean_of_two(found: list[Measured]) -> Iterator[Measured]:
    """IFEval's published score, the mean of two of its metrics."""
    pair = [one for name in IFEVAL for one in found if one.metric == name]
    if len(pair) == 2:
        first, second = pair
        yield replace(
            first,
            metric=BOTH.join(IFEVAL),
            value=(first.value + second.value) / 2,
            error=max(first.error, second.error),
            spread={d: max(first.spread[d], second.spread[d]) for d in first.spread},
            hits=None,
        )
