"""An audit of a study by its own results; nothing is run."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mergelab import contamination, lineage, policy
from mergelab.audit.judged import compared, judged
from mergelab.audit.rescore import Readings, measured
from mergelab.audit.target import Target
from mergelab.audit.verdicts import NO_RUN
from mergelab.record import packages, read_json

FOLDER = "audit"  # of a study's results


def of_study(target: Target, out: Path) -> dict[str, Any]:
    """An audit of a study by its own results; nothing is run."""
    study = target.study
    assert study is not None

    @functools.cache
    def readings(model: str, benchmark: str) -> Readings:
        found = measured(study, out, model, benchmark)
        lacking = f"no scores here. Run: mergelab evaluate {target.at} {model}"
        return Readings(found, NO_RUN if found else lacking)

    recipes = {path.stem: path.read_text("utf-8") for path in study.recipes}
    own = lineage.graph(study, recipes)
    graph = policy.whole(study)[0] if study.policy.asks else own
    kinds = {node.name: node.kind for node in own.nodes if node.kind != "outside"}
    shape = contamination.FINDINGS
    each = {
        name: read_json(out / "findings" / f"{name}.json", f"mergelab detect {study.folder}", shape)
        for name in kinds
    }
    findings = {name: value for name, value in each.items() if value is not None}
    checks = contamination.check_tables(study, graph, kinds, findings)
    descent = contamination.descent(study, graph, findings, checks)
    models = [{"name": name, "at": name, "node": name, "commit": None} for name in kinds]
    return {
        "target": {"name": target.name, "kind": "study", "at": target.at, "models": models},
        "claims": judged(target.claims, readings, out / FOLDER),
        "comparisons": compared(target, target.claims, readings),
        "lineage": _study_lineage(graph, descent),
        "weights": [],
        "contamination": _contamination(checks),
        "policy": policy.rows(study),
        "provenance": {"files": [], "versions": packages()},
        "warnings": [],
    }


def _study_lineage(
    graph: lineage.Graph, descent: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """The study's own graph, in the shape of ancestry.plain."""
    nodes = [
        {
            "name": node.name,
            "kind": node.kind,
            "commit": None,
            "date": None,
            "licence": None,
            "missing": None if node.declared else "nothing is declared of it",
            "depth": 0,
            "merge_method": node.origin if node.kind == "merge" else None,
        }
        for node in graph.nodes
    ]
    taints = [
        {"model": name, "benchmark": row["benchmark"], **taint}
        for name, rows in descent.items()
        for row in rows
        for taint in row["taints"]
    ]
    return {
        "nodes": nodes,
        "edges": [asdict(edge) for edge in graph.edges],
        "taints": taints,
        "notes": [],
    }


def _contamination(checks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Findings, how often their detectors are right, and what those cannot see."""
    keys = ("variant", "kind", "effect_name", "effect", "ci95", "p", "q", "flagged", "verdict")
    findings = [
        {"benchmark": check["benchmark"], "detector": detector["name"]}
        | {key: row.get(key) for key in keys}
        for check in checks
        for detector in check["detectors"]
        for row in detector["rows"]
        if row["effect"] is not None
    ]
    spots = [detector["blind_spots"] for check in checks for detector in check["detectors"]]
    known = contamination.calibration(checks)
    return {
        "findings": findings,
        "calibration": known["rows"] if known else [],
        "blind_spots": list(dict.fromkeys(spot for spot in spots if spot)),
    }
