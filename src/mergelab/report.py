"""The report of a study: one self-contained page, the same as JSON, metrics and plots for DVC.

`gather` reads everything into one plain dict; page, metrics and plots show that dict and nothing
else, so report.json holds all that the page says."""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from mergelab import comparison, contamination, headlines, lineage, page, provenance
from mergelab.audit import summary
from mergelab.detectors import FLAG_Q
from mergelab.record import file_sha256, read_json, write_bytes, write_json
from mergelab.study import CLAIMS, Study

VERSION = 4  # of the page: figures, headlines, tables and template included

ORDER = ("base", "expert", "merge")
INPUTS = (
    *("scores/*.json", "scores/*.parquet", "findings/*.json", "merged/*/merge.json"),
    "audit/audit.json",
)
AUDIT = {  # audit/audit.json: what the report needs of it
    "verdicts": [dict.fromkeys(("subject", "about", "verdict", "level", "why", "anchor"), str)],
    "claims": [{"verdict": str}],
    "weights": [{"remerge": ({"verdict": str}, None)}],
    "lineage": {"taints": [{"benchmark": str}]},
    "contamination": {"findings": [{"variant": str, "flagged": bool}]},
    "policy": [{"verdict": str}],
}


def write(study: Study, results: Path) -> dict[str, Any]:
    """Write report.html, report.json, metrics.json and plots/; return what the record says.

    Nothing missing is an error: what a study lacks is named on the page."""
    started = time.monotonic()
    data = gather(study, results)
    html = page.render(data).encode()
    texts = {
        "report.html": html,
        "plots/scores.csv": _csv(score_rows(data)).encode(),
        "plots/contamination.csv": _csv(contamination_rows(data)).encode(),
    }
    for name, text in texts.items():
        write_bytes(results / name, text)
    write_json(results / "report.json", data)
    write_json(results / "metrics.json", metrics(data))
    names = [*texts, "report.json", "metrics.json"]
    read = sorted(path for pattern in INPUTS for path in results.glob(pattern))
    return {
        "inputs": {str(path.relative_to(results)): file_sha256(path) for path in read},
        "settings": {"flag_q": FLAG_Q},
        "versions": {
            "report": VERSION,
            "packages": {name: metadata.version(name) for name in ("jinja2", "matplotlib")},
        },
        "outputs": [{"name": name, "sha256": file_sha256(results / name)} for name in names],
        "seconds": round(time.monotonic() - started, 2),
    }


def gather(study: Study, results: Path) -> dict[str, Any]:
    """Everything the page shows, as plain JSON-able data in the order of the page."""
    merged = provenance.read_merges(study, results)
    recipes = {path.stem: path.read_text(encoding="utf-8") for path in study.recipes}
    used = {
        name: merged[name]["recipe"]["text"] if name in merged else recipes[name]
        for name in recipes
    }
    graph = lineage.graph(study, used)
    kinds = _kinds(graph)
    where = f"recipes/{study.name}"
    scored = comparison.SCORES
    summaries = _each(kinds, results / "scores", f"mergelab evaluate {where}", scored)
    examined = contamination.FINDINGS
    findings = _each(kinds, results / "findings", f"mergelab detect {where}", examined)
    records = provenance.read_records(study, results)
    parents = {name: graph.parents(name) for name in kinds}
    checks = contamination.check_tables(study, graph, kinds, findings)
    marked = contamination.marked_items(study, checks)
    benchmarks, wholes = comparison.benchmark_tables(
        study, kinds, parents, summaries, results, marked
    )
    contamination.add_scores(checks, benchmarks, marked)
    descent = contamination.descent(study, graph, findings, checks)
    data: dict[str, Any] = {
        "mergelab": metadata.version("mergelab"),
        "study": {"name": study.name, "title": study.title, "about": study.about},
        "audit": _audit(study, results),
        "headlines": [],
        "variants": [{"name": name, "kind": kind} for name, kind in kinds.items()],
        "benchmarks": benchmarks,
        "suites": wholes,
        "twins": provenance.twins(merged),
        "flag_q": FLAG_Q,
        "checks": checks,
        "descent": {name: descent[name] for name in kinds},
        "calibration": contamination.calibration(checks),
        "lineage": _lineage(graph, checks),
        "recipes": _recipes(study, used),
        "models": provenance.models(study, records),
        "merges": provenance.merges(study, merged, records),
        "environment": provenance.environment(merged, summaries),
        "commands": _commands(study),
    }
    data["warnings"] = [
        *_missing(study, kinds, summaries, findings, merged),
        *(text for bench in data["benchmarks"] for text in bench["differs"]),
        *provenance.stale(merged, recipes, records),
    ]
    data["headlines"] = headlines.headlines(data)
    return data


def metrics(data: Mapping[str, Any]) -> dict[str, Any]:
    """variant -> benchmark -> value, and variant -> auc -> check -> detector -> AUC."""
    found: dict[str, Any] = {variant["name"]: {} for variant in data["variants"]}
    for bench in data["benchmarks"]:
        for row in bench["rows"]:
            if row["value"] is not None:
                found[row["variant"]][bench["name"]] = row["value"]
    for check, detector, row in _finding_rows(data):
        if row["auc"] is not None:
            auc = found[row["variant"]].setdefault("auc", {})
            auc.setdefault(check["benchmark"], {})[detector["name"]] = row["auc"]
    return found


def score_rows(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """plots/scores.csv: one line per variant and benchmark."""
    return [
        {
            "variant": row["variant"],
            "kind": row["kind"],
            "benchmark": bench["name"],
            "metric": bench["metric"],
            "value": row["value"],
            "ci_low": row["ci95"][0],
            "ci_high": row["ci95"][1],
            "vs_base": row["vs_base"]["verdict"] if row["vs_base"] else "",
        }
        for bench in data["benchmarks"]
        for row in bench["rows"]
        if row["value"] is not None
    ]


def contamination_rows(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """plots/contamination.csv: one line per finding that has an AUC, its `value`."""
    return [
        {
            "variant": row["variant"],
            "kind": row["kind"],
            "benchmark": check["benchmark"],
            "detector": detector["name"],
            "value": row["auc"],
            "ci_low": row["auc_ci95"][0],
            "ci_high": row["auc_ci95"][1],
            "p": row["p"],
            "q": row["q"],
            "tpr_at_5_fpr": row["tpr_at_5_fpr"],
            "tpr_at_1_fpr": row["tpr_at_1_fpr"],
            "flagged": row["flagged"],
        }
        for check, detector, row in _finding_rows(data)
        if row["auc"] is not None
    ]


def _audit(study: Study, results: Path) -> dict[str, Any] | None:
    """The verdicts of the study's audit and its sentence; None if none is asked for, or made."""
    if not (study.folder / CLAIMS).is_file():
        return None  # one of older claims, or made by hand: no step of the study
    found = read_json(results / "audit/audit.json", f"mergelab audit recipes/{study.name}", AUDIT)
    if found is None:
        return None
    return {"sentence": summary.sentence(found), "verdicts": found["verdicts"]}


def _kinds(graph: lineage.Graph) -> dict[str, str]:
    """Every variant of the study and its kind, in the page's order."""
    return {node.name: kind for kind in ORDER for node in graph.nodes if node.kind == kind}


def _each(kinds: Iterable[str], folder: Path, remake: str, shape: Any) -> dict[str, Any]:
    read = {n: read_json(folder / f"{n}.json", f"{remake} {n}", shape) for n in kinds}
    return {name: value for name, value in read.items() if value is not None}


def _lineage(graph: lineage.Graph, checks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Nodes with what is known and found about them; arrows that would only repeat are hidden."""
    taint = lineage.taint(graph, {check["benchmark"]: check["planted"] for check in checks})
    nodes = [
        {
            "name": node.name,
            "kind": node.kind,
            "origin": node.origin,
            "taint": taint[node.name],
            **contamination.notes(node.name, taint[node.name], checks),
        }
        for node in graph.nodes
    ]
    edges = [
        {
            "parent": edge.parent,
            "child": edge.child,
            "kind": edge.kind,
            "weight": edge.weight,
            "label": ("" if edge.exact else "≈ ") + f"{edge.weight:.2g}"
            if edge.kind == "merge"
            else "",
            "shown": edge.kind != "base" or not graph.descends(edge.child, edge.parent, "base"),
        }
        for edge in graph.edges
    ]
    return {"nodes": nodes, "edges": edges}


def _recipes(study: Study, texts: Mapping[str, str]) -> list[dict[str, Any]]:
    """Each recipe's text, and its lines against the shortest recipe's."""
    if not texts:
        return []
    lengths = {name: len(text.splitlines()) for name, text in texts.items()}
    reference = min(texts, key=lambda name: lengths[name])
    ordered = [reference, *(name for name in texts if name != reference)]
    return [
        {
            "name": name,
            "path": f"recipes/{study.name}/{name}.yaml",
            "sha256": hashlib.sha256(texts[name].encode()).hexdigest(),
            "text": texts[name],
            "reference": reference,
            "diff": _diff(texts[reference], texts[name]),
        }
        for name in ordered
    ]


def _diff(old: str, new: str) -> list[dict[str, str]]:
    """Every line of both texts: sign ' ', '-' or '+', and the line."""
    lines = difflib.ndiff(old.splitlines(), new.splitlines())
    return [{"sign": line[0], "text": line[2:]} for line in lines if line[0] != "?"]


def _missing(
    study: Study,
    kinds: Mapping[str, str],
    summaries: Mapping[str, Any],
    findings: Mapping[str, Any],
    merged: Mapping[str, Any],
) -> list[str]:
    """What the study asks for and the results do not have, each with what to run."""
    where, found = f"recipes/{study.name}", []
    bases = {check.base for check in study.contamination}
    for name, kind in kinds.items():
        if kind == "merge" and name not in merged:
            found.append(f"{name}: no record of the merge (merged/{name}/merge.json is missing).")
        if name not in summaries:
            found.append(f"{name}: no scores. Run: mergelab evaluate {where} {name}")
            continue
        lacks = [b.name for b in study.suite if b.name not in summaries[name]["benchmarks"]]
        if lacks:
            what = headlines.listed(lacks)
            found.append(f"{name}: no score on {what}. Run: mergelab evaluate {where} {name}")
    for name in kinds:
        if study.contamination and name not in findings and bases != {name}:
            found.append(f"{name}: not examined. Run: mergelab detect {where} {name}")
    return found


def _commands(study: Study) -> list[str]:
    """What re-creates this page from a clone of the repository."""
    if study.name == "demo":
        return ["make demo"]
    local = [str(m.path) for m in study.models.values() if m.path]
    local += [str(d.path) for d in study.datasets.values() if d.path]
    needs = [f"# with recipes/{study.name}" + (f" and {', '.join(local)}" if local else "")]
    return [*needs, "make install", f".venv/bin/snakemake --config study={study.name}"]


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    buffer = io.StringIO()
    if rows:
        writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return buffer.getvalue()


def _finding_rows(
    data: Mapping[str, Any],
) -> Iterable[tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]]:
    for check in data["checks"]:
        for detector in check["detectors"]:
            for row in detector["rows"]:
                yield check, detector, row
