"""The findings of a study side by side: every check, detector and variant, with q over all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from mergelab import lineage
from mergelab.detectors import FLAG_Q, taint, verdict
from mergelab.statistics import benjamini_hochberg
from mergelab.study import Study

NUMBER = int | float
SCORES = {"suspects": [NUMBER], "controls": [NUMBER]}
FINDINGS = [  # findings/<variant>.json: what the report needs of it
    {
        "benchmark": str,
        "detector": str,
        "detector_version": int,
        "effect_name": str,
        "effect": NUMBER,
        "ci95": ([NUMBER, NUMBER], None),
        "p": (NUMBER, None),
        "informational": bool,
        "n_suspects": int,
        "n_controls": int,
        "flagged": [str],
        "auc?": (NUMBER, None),
        "auc_ci95?": ([NUMBER, NUMBER], None),
        "tpr_at_5_fpr?": (NUMBER, None),
        "tpr_at_1_fpr?": (NUMBER, None),
        "item_scores": (SCORES, None),
    }
]
COPIED = ("effect_name", "effect", "ci95", "p", "informational", "n_suspects", "n_controls")
AUC_KEYS = ("auc", "auc_ci95", "tpr_at_5_fpr", "tpr_at_1_fpr")
TEXTS = ("statistic", "null_hypothesis", "guarantees", "blind_spots")

Finding = Mapping[str, Any]
Findings = Mapping[str, Sequence[Finding]]


def check_tables(
    study: Study, graph: lineage.Graph, kinds: Mapping[str, str], findings: Findings
) -> list[dict[str, Any]]:
    """Each check with its detectors and their findings; q over every finding that has a p."""
    asked = {(check.benchmark, name) for check in study.contamination for name in check.detectors}
    known = {
        (found["benchmark"], found["detector"], variant): found
        for variant, several in findings.items()
        for found in several
        if (found["benchmark"], found["detector"]) in asked
    }
    tested = [key for key, found in known.items() if found["p"] is not None]
    q = benjamini_hochberg([known[key]["p"] for key in tested])
    adjusted = {key: float(value) for key, value in zip(tested, q, strict=True)}
    planted = {check.benchmark: check.planted for check in study.contamination}
    strengths = lineage.taint(graph, planted)
    tables = []
    for check in study.contamination:
        examined = [variant for variant in kinds if variant != check.base]
        detectors = []
        for name in check.detectors:
            keys = {variant: (check.benchmark, name, variant) for variant in examined}
            first = next((known[key] for key in keys.values() if key in known), {})
            rows = [
                {
                    "variant": variant,
                    "kind": kinds[variant],
                    "taint": strengths[variant].get(check.benchmark, 0.0),
                    **_finding(known.get(key), adjusted.get(key)),
                }
                for variant, key in keys.items()
            ]
            texts = {text: first.get(text, "") for text in TEXTS}
            shown = {key: first.get(key) for key in ("effect_name", "informational", "papers")}
            detectors.append({"name": name, **texts, **shown, "rows": rows})
        tables.append(
            {
                "benchmark": check.benchmark,
                "base": check.base,
                "suspects": check.suspects,
                "controls": check.controls,
                "siblings": list(check.siblings),
                "planted": list(check.planted),
                "scores": check.scores,
                "twin": check.twin,
                "detectors": detectors,
            }
        )
    return tables


def _finding(found: Finding | None, q: float | None) -> dict[str, Any]:
    if found is None:
        nothing: dict[str, Any] = {"effect": None, "auc": None, "q": None, "flagged_items": []}
        return {**nothing, "flagged": False, "marks": False, "verdict": "not examined"}
    scores = found["item_scores"] or {"suspects": [], "controls": []}
    return {
        **{name: found[name] for name in COPIED},
        **{name: found.get(name) for name in AUC_KEYS},
        "q": q,
        "flagged": q is not None and q < FLAG_Q,
        "marks": not found["informational"] and (q is None or q < FLAG_Q),
        "flagged_items": list(found["flagged"]),
        "verdict": _untested(found) if q is None else verdict(q),
        "details": found.get("details", {}),
        **{name: [float(f"{score:.5g}") for score in scores[name]] for name in scores},
    }


def _untested(found: Finding) -> str:
    return "informational" if found["informational"] else "a count, not a test"


def marked_items(
    study: Study, checks: Sequence[Mapping[str, Any]]
) -> dict[tuple[str, str], set[str]]:
    """(benchmark, variant) to the items that findings would leave out of a clean score.

    Only where the benchmark's items are the suspects, and of variants that were examined."""
    data = {bench.name: bench.data for bench in study.suite}
    marked: dict[tuple[str, str], set[str]] = {}
    for check in checks:
        if check["scores"] is None or data.get(check["scores"]) != check["suspects"]:
            continue
        for row in (row for detector in check["detectors"] for row in detector["rows"]):
            if row["effect"] is not None:
                items = marked.setdefault((check["scores"], row["variant"]), set())
                items.update(row["flagged_items"] if row["marks"] else ())
    return marked


def add_scores(
    checks: Sequence[dict[str, Any]],
    benchmarks: Sequence[Mapping[str, Any]],
    marked: Mapping[tuple[str, str], set[str]],
) -> None:
    """Give each check `clean_scores`: the score of all suspects, of those not marked, of twins."""
    tables = {bench["name"]: bench["rows"] for bench in benchmarks}
    for check in checks:
        twins = {row["variant"]: row for row in tables.get(check["twin"], ())}
        shown = {name for name, _ in marked}
        check["clean_scores"] = [
            {
                "variant": row["variant"],
                "kind": row["kind"],
                "full": _score(row),
                "clean": row["clean"],
                "twin": _score(twins.get(row["variant"])),
            }
            for row in (tables[check["scores"]] if check["scores"] in shown else ())
            if row["value"] is not None
        ]


def _score(row: Mapping[str, Any] | None) -> dict[str, Any] | None:
    known = row is not None and row["value"] is not None
    return {key: row[key] for key in ("value", "ci95", "n")} if row and known else None


def descent(
    study: Study, graph: lineage.Graph, findings: Findings, checks: Sequence[Mapping[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """Taint by descent of every model: from what is planted, published, declared and flagged here.

    A flagged finding taints the model itself and all that descends from it."""
    flagged = [
        taint.Source(row["variant"], check["benchmark"], f"flagged by {detector['name']}", "here")
        for check in checks
        for detector in check["detectors"]
        for row in detector["rows"]
        if row["flagged"]
    ]
    return taint.lineage_findings(study, graph, [*taint.overlap_sources(findings), *flagged])


def calibration(checks: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Error rates of the detectors that the study used, as benchmarks/leaks.py measured them.

    A row whose detector has another version now than when it was measured is left out."""
    from mergelab.detectors import DETECTORS

    path = resources.files("mergelab").joinpath("detectors/calibration.json")
    if not path.is_file():
        return None
    measured = json.loads(path.read_text("utf-8"))
    used = {detector["name"] for check in checks for detector in check["detectors"]}
    rows = [
        row
        for row in measured["rows"]
        if row["detector"] in used
        and row["detector"] in DETECTORS
        and row["detector_version"] == DETECTORS[row["detector"]].version
    ]
    return {**measured, "rows": rows}


def notes(
    name: str, strengths: Mapping[str, float], checks: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Lines for a node of the lineage picture, and whether to mark it."""
    lines, marked = [], False
    for check in checks:
        benchmark = check["benchmark"]
        strength = strengths.get(benchmark, 0.0)
        if name in check["planted"]:
            lines.append(f"{benchmark}: planted")
        elif strength > 0:
            lines.append(f"{benchmark}: taint {strength:.2g} by descent")
        rows = [r for d in check["detectors"] for r in d["rows"] if r["variant"] == name]
        tested = [row for row in rows if row["effect"] is not None and row["q"] is not None]
        flagged = any(row["flagged"] for row in tested)
        if tested:
            aucs = [row["auc"] for row in tested if row["auc"] is not None]
            best = f", AUC {max(aucs):.2f}" if aucs else ""
            lines.append(f"{benchmark}: {'' if flagged else 'not '}flagged{best}")
        marked = marked or flagged or strength > 0
    return {"notes": lines, "marked": marked}
