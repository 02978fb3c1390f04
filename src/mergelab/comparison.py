"""Variants against each other, item by item: who is better, by how much, and is it settled?

Every difference is paired: the same items, resampled together (aggregates.difference). Variants
that saw other prompts are never compared."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mergelab import aggregates, suites
from mergelab.items import Items, Table, items_of, read, restricted, suite_items
from mergelab.statistics import benjamini_hochberg
from mergelab.study import Study
from mergelab.suites import Benchmark

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


def compare(ours: Items | None, theirs: Items | None, higher: bool) -> dict[str, Any] | None:
    """Difference (ours minus theirs) with its interval, p, test, mde and discordance (see
    aggregates.difference), and a verdict; q is added over the whole report.

    `verdict` is better or worse if the interval excludes 0, else unsettled; None if there is
    nothing comparable: a side is missing, or items or prompts differ."""
    if ours is None or theirs is None or ours.fingerprint != theirs.fingerprint:
        return None
    found = aggregates.difference(ours.parts, theirs.parts)
    low, high = found["ci95"]
    settled = low > 0 or high < 0
    verdict = ("better" if (low > 0) == higher else "worse") if settled else "unsettled"
    return {**found, "q": None, "verdict": verdict}


def benchmark_tables(
    study: Study,
    kinds: Mapping[str, str],
    parents: Mapping[str, Sequence[str]],
    summaries: Mapping[str, Mapping[str, Any]],
    results: Path,
    flagged: Mapping[tuple[str, str], Set[str]] = MappingProxyType({}),
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The benchmarks and the suites of the report, with q over every comparison in them.

    `flagged` maps (benchmark, variant) to the ids of items that a clean score leaves out."""
    tables = read(results, kinds)
    benchmarks = [
        benchmark_table(study, bench, kinds, parents, summaries, tables, flagged)
        for bench in study.suite
    ]
    wholes = suite_tables(study, kinds, parents, summaries, tables)
    _adjust([*benchmarks, *wholes])
    return benchmarks, wholes


def benchmark_table(
    study: Study,
    benchmark: Benchmark,
    kinds: Mapping[str, str],
    parents: Mapping[str, Sequence[str]],
    summaries: Mapping[str, Mapping[str, Any]],
    tables: Mapping[str, Table],
    flagged: Mapping[tuple[str, str], Set[str]] = MappingProxyType({}),
) -> dict[str, Any]:
    """One benchmark of the report: settings, a row per variant, who is best, what differs.

    A row's `clean` is the score on the items not flagged (None where no check covers them), `twin`
    the score on the twin benchmark that a check names."""
    name = benchmark.name
    entries = {v: s["benchmarks"][name] for v, s in summaries.items() if name in s["benchmarks"]}
    first: Mapping[str, Any] = next(iter(entries.values()), {})
    metric, higher = str(first.get("metric", "")), bool(first.get("higher_is_better", True))
    same = {v: entries[v] for v in kinds if v in entries and entries[v]["metric"] == metric}
    items = {v: items_of(tables.get(v), benchmark, metric) for v in same}
    rows = _rows(kinds, parents, same, items, higher)
    twin = next((check.twin for check in study.contamination if check.scores == name), None)
    for row in rows:
        variant, table = row["variant"], tables.get(row["variant"])
        known = (name, variant) in flagged and items.get(variant) is not None
        ids = flagged.get((name, variant), set())
        row["clean"] = restricted(table, benchmark, metric, ids) if known else None
        row["twin"] = _twin(twin, summaries.get(variant, {}))
    return {
        "name": name,
        "task": benchmark.task,
        "data": benchmark.data,
        "num_fewshot": first.get("num_fewshot", benchmark.num_fewshot),
        **{key: first[key] for key in suites.CHAT if key in first},
        "metric": metric,
        "axis": AXES.get(metric, metric.replace("_", " ")),
        "higher_is_better": higher,
        "chance": first.get("chance"),
        "n": first.get("n"),
        "task_hash": first.get("task_hash"),
        "fingerprints": {v: i.fingerprint for v, i in items.items() if i is not None},
        "rows": rows,
        **_best(rows, items, higher),
        "differs": _protocol_differences(name, entries, items),
    }


def suite_tables(
    study: Study,
    kinds: Mapping[str, str],
    parents: Mapping[str, Sequence[str]],
    summaries: Mapping[str, Mapping[str, Any]],
    tables: Mapping[str, Table],
) -> list[dict[str, Any]]:
    """One entry per suite of the study: how it is made of which benchmarks, and its rows."""
    found = []
    for name in dict.fromkeys(bench.suite for bench in study.suite if bench.suite):
        benches = [bench for bench in study.suite if bench.suite == name]
        aggregate = suites.load_suite(name).aggregate
        items: dict[str, Items | None] = {}
        higher = True
        for variant in kinds:
            known = summaries.get(variant, {}).get("benchmarks", {})
            if all(bench.name in known for bench in benches):
                items[variant] = suite_items(tables.get(variant), benches, known, aggregate)
                higher = all(known[bench.name]["higher_is_better"] for bench in benches)
        entries = {v: aggregates.score(i.parts) for v, i in items.items() if i is not None}
        rows = _rows(kinds, parents, entries, items, higher)
        of = [bench.name for bench in benches]
        about = {"name": name, "aggregate": aggregate, "of": of, "higher_is_better": higher}
        found.append({**about, "rows": rows, **_best(rows, items, higher)})
    return found


def _rows(
    kinds: Mapping[str, str],
    parents: Mapping[str, Sequence[str]],
    entries: Mapping[str, Mapping[str, Any]],
    items: Mapping[str, Items | None],
    higher: bool,
) -> list[dict[str, Any]]:
    """A row per variant: its value, its difference to the base and, of a merge, to its best parent
    other than the base."""
    base = next((v for v, kind in kinds.items() if kind == "base"), None)
    rows = []
    for variant, kind in kinds.items():
        row: dict[str, Any] = {"variant": variant, "kind": kind, "value": None, "ci95": None}
        if entry := entries.get(variant):
            row |= {"value": entry["value"], "ci95": entry["ci95"], "n": entry["n"]}
        row["vs_base"] = None
        if base is not None and variant != base:
            row["vs_base"] = compare(items.get(variant), items.get(base), higher)
        own = [p for p in parents.get(variant, ()) if kind == "merge" and p != base]
        row["vs_parent"] = _against_best_parent(variant, own, entries, items, higher)
        rows.append(row)
    return rows


def _against_best_parent(
    variant: str,
    parents: Sequence[str],
    entries: Mapping[str, Mapping[str, Any]],
    items: Mapping[str, Items | None],
    higher: bool,
) -> dict[str, Any] | None:
    known = [p for p in parents if items.get(p) is not None]
    if not known:
        return None
    pick = max if higher else min
    parent = pick(known, key=lambda p: float(entries[p]["value"]))
    result = compare(items.get(variant), items[parent], higher)
    return None if result is None else {"parent": parent, **result}


def _best(
    rows: Sequence[Mapping[str, Any]], items: Mapping[str, Items | None], higher: bool
) -> dict[str, Any]:
    """`best`: the variant with the best value and every other one that cannot be told apart from
    it; `not_compared`: those that cannot be compared with it. Nothing compared, nothing best."""
    known = [row for row in rows if row["value"] is not None]
    if not known:
        return {"top": None, "best": [], "not_compared": []}
    pick = max if higher else min
    top = str(pick(known, key=lambda row: float(row["value"]))["variant"])
    against = {
        str(row["variant"]): compare(items.get(str(row["variant"])), items.get(top), higher)
        for row in known
    }
    others = {v: c["verdict"] for v, c in against.items() if c is not None and v != top}
    best = [v for v in against if v == top or others.get(v, "worse") != "worse"]
    return {
        "top": top,
        "best": best if others else [],
        "not_compared": [v for v in against if v not in others and v != top],
    }


def _twin(twin: str | None, summary: Mapping[str, Any]) -> dict[str, Any] | None:
    entry = summary.get("benchmarks", {}).get(twin)
    if entry is None:
        return None
    return {"benchmark": twin, **{key: entry[key] for key in ("value", "ci95", "n")}}


def _adjust(tables: Sequence[Mapping[str, Any]]) -> None:
    """Fill in every comparison's q: p after Benjamini-Hochberg over all of them."""
    rows = [row for table in tables for row in table["rows"]]
    known = [row[key] for row in rows for key in ("vs_base", "vs_parent") if row[key] is not None]
    q = benjamini_hochberg([comparison["p"] for comparison in known])
    for comparison, value in zip(known, q, strict=True):
        comparison["q"] = float(value)


def _protocol_differences(
    name: str, entries: Mapping[str, Mapping[str, Any]], items: Mapping[str, Items | None]
) -> list[str]:
    """What was not the same for all variants, in words."""
    found = []
    for key in ("metric", "task_hash", "num_fewshot", "chat_template_sha", "n"):
        values = {v: entry.get(key) for v, entry in entries.items()}
        if len({json.dumps(value) for value in values.values()}) > 1:
            given = ", ".join(f"{v}: {value}" for v, value in values.items())
            found.append(f"{name}: {key} is not the same for all variants ({given}).")
    prints = {found.fingerprint for found in items.values() if found is not None}
    if len(prints) > 1:
        found.append(f"{name}: the variants saw different items or prompts.")
    for variant in entries:
        if items.get(variant) is None:
            found.append(f"{name}: {variant} has no per-sample records that hold the metric.")
    return found
