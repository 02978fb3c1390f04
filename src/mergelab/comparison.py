"""Variants against each other, item by item: who is better, by how much, and is it settled?

Every difference is paired: the same items, bootstrapped together (statistics.paired_difference).
Variants that saw other prompts are never compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergelab.record import parse_json
from mergelab.statistics import paired_difference
from mergelab.study import Benchmark, Study

BITS_PER_BYTE = "bits_per_byte"
AXES = {BITS_PER_BYTE: "bits per byte", "acc": "accuracy", "acc_norm": "accuracy, by length"}
SCORES = {  # scores/<variant>.json: what the report needs of it
    "benchmarks": {
        "*": {
            "metric": str,
            "value": int | float,
            "ci95": [int | float, int | float],
            "n": int,
            "higher_is_better": bool,
            "chance?": int | float | None,
        }
    }
}

Records = list[dict[str, Any]]


def read_records(path: Path, metric: str, remedy: str) -> Records | None:
    """The per-sample records of a benchmark, or None if they are missing or lack the metric.

    UserError with `remedy`, the command that remakes them, if a line is damaged."""
    if not path.is_file():
        return None
    needs = ("nll", "bytes") if metric == BITS_PER_BYTE else (metric,)
    shape = {"metrics": {f"{key}?": int | float for key in needs}}
    lines = enumerate(path.read_bytes().split(b"\n"), 1)
    records = [parse_json(line, path, remedy, shape, f"line {i}: ") for i, line in lines if line]
    whole = records and all(key in record["metrics"] for record in records for key in needs)
    return records if whole else None


def fingerprint(records: Records) -> str:
    """12 digits that two runs share if and only if they saw the same items, prompts, targets."""
    fields = ("id", "doc_hash", "prompt_hash", "target_hash")
    lines = sorted(json.dumps([record.get(field) for field in fields]) for record in records)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def compare(
    ours: Records | None, theirs: Records | None, metric: str, higher: bool
) -> dict[str, Any] | None:
    """Difference (ours minus theirs) with its paired 95 % interval and p, and a verdict.

    `verdict` is better or worse if the interval excludes 0, else unsettled; None if there is
    nothing comparable: a side is missing, or items or prompts differ."""
    if ours is None or theirs is None or fingerprint(ours) != fingerprint(theirs):
        return None
    difference, low, high, p = paired_difference(ours, theirs, metric)
    settled = low > 0 or high < 0
    verdict = ("better" if (low > 0) == higher else "worse") if settled else "unsettled"
    return {"difference": difference, "ci95": [low, high], "p": p, "verdict": verdict}


def benchmark_table(
    study: Study,
    benchmark: Benchmark,
    kinds: Mapping[str, str],
    parents: Mapping[str, Sequence[str]],
    summaries: Mapping[str, Mapping[str, Any]],
    results: Path,
) -> dict[str, Any]:
    """One benchmark of the report: settings, a row per variant, who is best, what differs."""
    name = benchmark.name
    entries = {v: s["benchmarks"][name] for v, s in summaries.items() if name in s["benchmarks"]}
    first: Mapping[str, Any] = next(iter(entries.values()), {})
    metric, higher = str(first.get("metric", "")), bool(first.get("higher_is_better", True))
    items = {
        v: read_records(
            results / "scores" / v / f"{name}.jsonl",
            metric,
            f"mergelab evaluate recipes/{study.name} {v}",
        )
        for v in kinds
        if v in entries and entries[v]["metric"] == metric
    }
    base = next((v for v, kind in kinds.items() if kind == "base"), None)
    rows = []
    for variant, kind in kinds.items():
        entry = entries.get(variant)
        row: dict[str, Any] = {"variant": variant, "kind": kind, "value": None, "ci95": None}
        if entry is not None and entry["metric"] == metric:
            row |= {"value": entry["value"], "ci95": entry["ci95"], "n": entry["n"]}
        row["vs_base"] = None
        if base is not None and variant != base:
            row["vs_base"] = compare(items.get(variant), items.get(base), metric, higher)
        row["vs_parent"] = _against_best_parent(variant, parents, entries, items, metric, higher)
        rows.append(row)
    return {
        "name": name,
        "task": benchmark.task,
        "data": benchmark.data,
        "num_fewshot": first.get("num_fewshot", benchmark.num_fewshot),
        "metric": metric,
        "axis": AXES.get(metric, metric.replace("_", " ")),
        "higher_is_better": higher,
        "chance": first.get("chance"),
        "n": first.get("n"),
        "task_hash": first.get("task_hash"),
        "fingerprints": {v: fingerprint(i) for v, i in items.items() if i is not None},
        "rows": rows,
        **_best(rows, items, metric, higher),
        "differs": _protocol_differences(name, entries, items),
    }


def _against_best_parent(
    variant: str,
    parents: Mapping[str, Sequence[str]],
    entries: Mapping[str, Mapping[str, Any]],
    items: Mapping[str, Records | None],
    metric: str,
    higher: bool,
) -> dict[str, Any] | None:
    scored = [p for p in parents.get(variant, ()) if items.get(p) is not None]
    if not scored:
        return None
    pick = max if higher else min
    parent = pick(scored, key=lambda p: float(entries[p]["value"]))
    result = compare(items.get(variant), items[parent], metric, higher)
    return None if result is None else {"parent": parent, **result}


def _best(
    rows: Sequence[Mapping[str, Any]],
    items: Mapping[str, Records | None],
    metric: str,
    higher: bool,
) -> dict[str, Any]:
    """`best`: the variant with the best value and every other one that cannot be told apart from
    it; `not_compared`: those that cannot be compared with it. Nothing compared, nothing best."""
    known = [row for row in rows if row["value"] is not None]
    if not known:
        return {"top": None, "best": [], "not_compared": []}
    pick = max if higher else min
    top = str(pick(known, key=lambda row: float(row["value"]))["variant"])
    against = {
        str(row["variant"]): compare(items.get(str(row["variant"])), items.get(top), metric, higher)
        for row in known
    }
    others = {v: c["verdict"] for v, c in against.items() if c is not None and v != top}
    best = [v for v in against if v == top or others.get(v, "worse") != "worse"]
    return {
        "top": top,
        "best": best if others else [],
        "not_compared": [v for v in against if v not in others and v != top],
    }


def _protocol_differences(
    name: str, entries: Mapping[str, Mapping[str, Any]], items: Mapping[str, Records | None]
) -> list[str]:
    """What was not the same for all variants, in words."""
    found = []
    for key in ("metric", "task_hash", "num_fewshot", "n"):
        values = {v: entry.get(key) for v, entry in entries.items()}
        if len({json.dumps(value) for value in values.values()}) > 1:
            given = ", ".join(f"{v}: {value}" for v, value in values.items())
            found.append(f"{name}: {key} is not the same for all variants ({given}).")
    prints = {fingerprint(found) for found in items.values() if found is not None}
    if len(prints) > 1:
        found.append(f"{name}: the variants saw different items or prompts.")
    for variant in entries:
        if items.get(variant) is None:
            found.append(f"{name}: {variant} has no per-sample records that hold the metric.")
    return found
