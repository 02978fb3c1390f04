"""What one variant got on a benchmark or suite, item by item, out of its table of scores."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mergelab import aggregates, score_table
from mergelab.aggregates import Part
from mergelab.suites import Benchmark

HASHES = ("doc_hash", "prompt_hash", "target_hash")

Table = Any  # a pandas.DataFrame as score_table.table reads it


@dataclass(frozen=True)
class Items:
    """What one variant got on one benchmark; `fingerprint` is 12 digits that two runs share if and
    only if they saw the same items, prompts and targets."""

    parts: tuple[Part, ...]
    fingerprint: str


def read(results: Path, variants: Iterable[str]) -> dict[str, Table]:
    """The score tables of the variants that have one; UserError if a file is damaged."""
    paths = {variant: results / "scores" / f"{variant}.parquet" for variant in variants}
    return {variant: score_table.table(path) for variant, path in paths.items() if path.is_file()}


def items_of(
    table: Table | None, benchmark: Benchmark, metric: str, *, normalised: bool = False
) -> Items | None:
    """A benchmark's items in a score table; None if it holds none with this metric, which is a name
    or name,filter. `normalised` rescales each part by its chance."""
    if table is None:
        return None
    name, _, filter = metric.partition(",")
    rows = table[(table["benchmark"] == benchmark.name) & (table["metric"] == name)]
    rows = rows[rows["filter"] == (filter or "none")]
    if not len(rows):
        return None
    rows = rows.sort_values(["task", "id", *HASHES], kind="stable")
    chances = {pin.task: pin.chance or 0.0 for pin in benchmark.tasks}
    if benchmark.combine == "tasks":
        made = [
            (chances.get(task, 0.0), _part(found))
            for task, found in rows.groupby("task", sort=True)
        ]
    else:
        made = [(benchmark.tasks[0].chance or 0.0, _part(rows))]
    wholes = [[replace(part, chance=chance if normalised else None)] for chance, part in made]
    return Items(aggregates.mean_of(wholes), _digits(rows, ["task", "id", *HASHES]))


def _part(rows: Table) -> Part:
    own = rows["cluster"] == ""
    cluster = None
    if not own.all():
        cluster = np.where(own, "item " + rows["id"], "cluster " + rows["cluster"])
    value, weight = (rows[key].to_numpy(dtype=np.float64) for key in ("value", "weight"))
    return Part(value, weight, cluster, items=_digits(rows, ["task", "id", "doc_hash"]))


def _digits(rows: Table, columns: list[str]) -> str:
    """12 digits that stand for the contents of these columns."""
    found = hashlib.sha256()
    for column in columns:
        found.update(repr(rows[column].tolist()).encode(errors="backslashreplace"))
    return found.hexdigest()[:12]


def restricted(
    table: Table, benchmark: Benchmark, metric: str, without: Set[str]
) -> dict[str, Any] | None:
    """`value`, `ci95` and `n` of a benchmark on the items whose id is not in `without`; None if
    none is left."""
    left = items_of(table[~table["id"].isin(list(without))], benchmark, metric)
    return None if left is None else aggregates.score(left.parts)


def suite_items(
    table: Table | None, benchmarks: Sequence[Benchmark], known: Mapping[str, Any], aggregate: str
) -> Items | None:
    """The items of a whole suite, the mean of its groups of benchmarks; None if one is missing."""
    groups: dict[str, list[Sequence[Part]]] = {}
    prints = []
    for bench in benchmarks:
        metric = str(known[bench.name]["metric"])
        items = items_of(table, bench, metric, normalised=aggregate == "normalised")
        if items is None:
            return None
        groups.setdefault(bench.group or bench.name, []).append(items.parts)
        prints.append(items.fingerprint)
    parts = aggregates.mean_of([aggregates.mean_of(wholes) for wholes in groups.values()])
    return Items(parts, hashlib.sha256("\n".join(prints).encode()).hexdigest()[:12])
