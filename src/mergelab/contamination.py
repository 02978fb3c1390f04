"""The findings of a study side by side: every check, detector and variant, with q over all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergelab import lineage
from mergelab.detectors import FLAG_Q, verdict
from mergelab.statistics import benjamini_hochberg
from mergelab.study import Study

NUMBER = int | float
FINDINGS = [  # findings/<variant>.json: what the report needs of it
    {
        "benchmark": str,
        "detector": str,
        "auc": NUMBER,
        "auc_ci95": [NUMBER, NUMBER],
        "p": NUMBER,
        "tpr_at_5_fpr": NUMBER,
        "n_suspects": int,
        "n_controls": int,
        "item_scores": {"suspects": [NUMBER], "controls": [NUMBER]},
    }
]


def check_tables(
    study: Study,
    graph: lineage.Graph,
    kinds: Mapping[str, str],
    findings: Mapping[str, list[dict[str, Any]]],
) -> list[dict[str, Any]]:
    """Each check with its detectors and their findings; q over every finding of the study."""
    asked = {(check.benchmark, name) for check in study.contamination for name in check.detectors}
    known = {
        (found["benchmark"], found["detector"], variant): found
        for variant, several in findings.items()
        for found in several
        if (found["benchmark"], found["detector"]) in asked
    }
    q = benjamini_hochberg([found["p"] for found in known.values()])
    adjusted = {key: float(value) for key, value in zip(known, q, strict=True)}
    planted = {check.benchmark: check.planted for check in study.contamination}
    taint = lineage.taint(graph, planted)
    found = []
    for check in study.contamination:
        entry: dict[str, Any] = {
            "benchmark": check.benchmark,
            "base": check.base,
            "suspects": check.suspects,
            "controls": check.controls,
            "planted": list(check.planted),
            "detectors": [],
        }
        for name in check.detectors:
            keys = {v: (check.benchmark, name, v) for v in kinds if v != check.base}
            first = next((known[key] for key in keys.values() if key in known), {})
            texts = ("statistic", "null_hypothesis", "blind_spots")
            rows = [
                {
                    "variant": variant,
                    "kind": kinds[variant],
                    "taint": taint[variant].get(check.benchmark, 0.0),
                    **_finding(known.get(key), adjusted.get(key)),
                }
                for variant, key in keys.items()
            ]
            entry["detectors"].append(
                {"name": name, **{text: first.get(text, "") for text in texts}, "rows": rows}
            )
        found.append(entry)
    return found


def _finding(found: Mapping[str, Any] | None, q: float | None) -> dict[str, Any]:
    if found is None or q is None:
        return {"auc": None, "flagged": False, "verdict": "not examined"}
    numbers = ("auc", "auc_ci95", "p", "tpr_at_5_fpr", "n_suspects", "n_controls")
    return {
        **{name: found[name] for name in numbers},
        "q": q,
        "flagged": q < FLAG_Q,
        "verdict": verdict(q),
        "suspects": [float(f"{score:.5g}") for score in found["item_scores"]["suspects"]],
        "controls": [float(f"{score:.5g}") for score in found["item_scores"]["controls"]],
    }


def notes(
    name: str, taint: Mapping[str, float], checks: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Lines for a node of the lineage picture, and whether to mark it."""
    lines, marked = [], False
    for check in checks:
        benchmark = check["benchmark"]
        strength = taint.get(benchmark, 0.0)
        if name in check["planted"]:
            lines.append(f"{benchmark}: planted")
        elif strength > 0:
            lines.append(f"{benchmark}: taint {strength:.2g} by descent")
        rows = [r for d in check["detectors"] for r in d["rows"] if r["variant"] == name]
        rows = [row for row in rows if row["auc"] is not None]
        flagged = any(row["flagged"] for row in rows)
        if rows:
            best = max(row["auc"] for row in rows)
            lines.append(f"{benchmark}: {'' if flagged else 'not '}flagged, AUC {best:.2f}")
        marked = marked or flagged or strength > 0
    return {"notes": lines, "marked": marked}
