"""Findings: every contamination check of a study, put to one variant from what is stored.

Gathers the evidence that a check's detectors need (token log-probabilities and scores of the
variant, its base and its clean siblings, items, declared training texts), calls the detectors and
writes results/<study>/findings/<variant>.json."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mergelab import datasets, detectors, evidence, lineage, score_table, statistics, views
from mergelab.comparable import require_comparable
from mergelab.detectors.base import PARTS, Detector, Evidence, Finding, Probed
from mergelab.errors import NotAvailable, UserError
from mergelab.progress import bar
from mergelab.record import file_entries, file_sha256, read_json, write_json
from mergelab.study import Check, Study

ABOUT_SCORES = {"benchmarks": {"*": {"metric": str, "higher_is_better": bool}}}
BASE_REASON = "the base is its own calibration"
SIBLING_REASON = "the check names no clean sibling beside it"


def detect(study: Study, variant: str, results: Path) -> dict[str, Any]:
    """Judge a variant by every contamination check of the study, from stored evidence.

    Writes results/findings/<variant>.json and returns what belongs in the record. What makes no
    finding (a check whose base is the variant itself, a detector that compares with siblings where
    there is none) stands in the record under `skipped`. Raises UserError."""
    started = time.perf_counter()
    if problems := detectors.problems(study):
        raise UserError("\n".join(problems))
    found: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    inputs: dict[str, str] = {}
    total = sum(len(check.detectors) for check in study.contamination if check.base != variant)
    with bar(f"detect {variant}", total, "detectors") as progress:
        for check in study.contamination:
            if check.base == variant:
                skipped.append({"benchmark": check.benchmark, "reason": BASE_REASON})
                continue
            judged = judge(study, check, variant, results, progress.advance)
            found, skipped, inputs = found + judged[0], skipped + judged[1], inputs | judged[2]
    path = results / "findings" / f"{variant}.json"
    write_json(path, found)
    used = {finding["detector"]: finding["detector_version"] for finding in found}
    return {
        "variant": variant,
        "inputs": dict(sorted(inputs.items())),
        "settings": {"flag_q": detectors.FLAG_Q},
        "skipped": skipped,
        "versions": {"detectors": detectors.VERSION} | dict(sorted(used.items())),
        "outputs": file_entries(path.parent, [path.name]),
        "seconds": round(time.perf_counter() - started, 2),
    }


def judge(
    study: Study, check: Check, variant: str, results: Path, advance: Callable[[], None]
) -> tuple[list[dict[str, Any]], list[dict[str, str]], dict[str, str]]:
    """The findings of one check, what made none and why, and the sha256 of the files read.

    `advance` is called after each detector."""
    found, skipped = [], []
    gathered = _Gathering(study, check, variant, results)
    known = gathered.evidence()
    for detector in gathered.detectors:
        try:
            found.append(gathered.finding(detector, known))
        except NotAvailable as error:
            where = {"benchmark": check.benchmark, "detector": detector.name}
            skipped.append(where | {"reason": str(error)})
        advance()
    return found, skipped, gathered.inputs


class _Gathering:
    """What is known of one variant and one check; `inputs` are the sha256 of the files read."""

    def __init__(self, study: Study, check: Check, variant: str, results: Path) -> None:
        self.study, self.check, self.variant, self.results = study, check, variant, results
        where = detectors.place(study, check)
        self.detectors = [detectors.find(name, where) for name in check.detectors]
        self.needs = {need for detector in self.detectors for need in detector.needs}
        self.parts = dict(zip(PARTS, (check.suspects, check.controls), strict=True))
        self.siblings = [name for name in check.siblings if name != variant]
        self.inputs: dict[str, str] = {}
        self.metrics: set[tuple[str, bool]] = set()  # (name, is more of it better?) of all scores

    def evidence(self) -> Evidence:
        """All that the check's detectors need; UserError if a part holds too few items."""
        items = {role: datasets.items(self.results, part) for role, part in self.parts.items()}
        for role, part in self.parts.items():
            if len(items[role]) < detectors.LEAST_ITEMS:
                raise UserError(
                    f"{detectors.place(self.study, self.check)}: {part} has {len(items[role])} "
                    f"item, but needs {detectors.LEAST_ITEMS}. Enlarge the part."
                )
        return Evidence(
            self.check.benchmark,
            self.probed(self.variant),
            self.probed(self.check.base),
            tuple(self.probed(name) for name in self.siblings),
            self.scores(),
            items,
            self.corpus() if "corpus" in self.needs else {},
        )

    def finding(self, detector: Detector, known: Evidence) -> dict[str, Any]:
        """What a detector finds. Raises NotAvailable if something that it needs is not there."""
        if "siblings" in detector.needs and not self.siblings:
            raise NotAvailable(SIBLING_REASON)
        self.metrics_fit(detector)
        return _plain(self.check, self.variant, detector, detector.function(known), known)

    def probed(self, model: str) -> Probed:
        """A model's evidence on every view, comparable token by token with the variant's."""
        found = {}
        for role, part in self.parts.items():
            for view in views.of_check(self.study, self.check):
                ours, own = (
                    evidence.file_of(self.results, name, part, view)
                    for name in (model, self.variant)
                )
                if ours != own:
                    kind = "base" if model == self.check.base else "sibling"
                    require_comparable(own, ours, self.variant, f"{kind} '{model}'", part)
                found[role if view == "text" else f"{role}/{view}"] = evidence.load(ours)
                self.inputs[str(ours.relative_to(self.results))] = file_sha256(ours)
        return Probed(model, found)

    def scores(self) -> dict[str, dict[str, dict[str, float]]]:
        """The metric per item id, on the benchmark and, if it is named, its twin, of each model
        whose scores are looked at; a metric of which less is better is left out."""
        named = {"original": self.check.scores, "twin": self.check.twin}
        found: dict[str, dict[str, dict[str, float]]] = {}
        for model in detectors.scored(self.check, self.needs, self.variant):
            path = self.results / "scores" / f"{model}.parquet"
            if "scores" not in self.needs and not path.is_file():
                continue  # only the estimated performance gain would need it
            table = score_table.table(path)
            self.inputs[str(path.relative_to(self.results))] = file_sha256(path)
            remedy = f"mergelab evaluate STUDY {model}"
            about = read_json(path.with_suffix(".json"), remedy, ABOUT_SCORES) or {"benchmarks": {}}
            found[model] = {}
            for kind, name in named.items():
                if name is not None:
                    values = _per_item(table, name, about["benchmarks"], path)
                    entry = about["benchmarks"][name]
                    self.metrics.add((entry["metric"], entry["higher_is_better"]))
                    if entry["higher_is_better"]:
                        found[model][kind] = values
        return found

    def metrics_fit(self, detector: Detector) -> None:
        """Raise NotAvailable if a detector of twins would compare unlike metrics."""
        if "twin_scores" in detector.needs and (
            len(self.metrics) != 1 or not all(higher for _, higher in self.metrics)
        ):
            names = " and ".join(sorted({name for name, _ in self.metrics}))
            raise NotAvailable(
                "needs one metric, of which more is better, on the benchmark and on its twin, but "
                f"'{self.check.scores}' and '{self.check.twin}' are scored by {names}: set the "
                "same 'metric', such as acc, for both"
            )

    def corpus(self) -> dict[str, list[str]]:
        """The texts that the variant and its ancestors are declared to be trained on."""
        recipes = {path.stem: path.read_text(encoding="utf-8") for path in self.study.recipes}
        found: dict[str, list[str]] = {}
        for ancestor in _ancestors(lineage.graph(self.study, recipes), self.variant):
            for part, texts in _trained_on(self.study, ancestor, self.results):
                found.setdefault(f"{ancestor}: {part}", []).extend(texts)
        return found


def _per_item(table: Any, benchmark: str, about: Mapping[str, Any], path: Path) -> dict[str, float]:
    """The benchmark's main metric by item id, per byte where it is one of bits."""
    if benchmark not in about:
        raise UserError(f"{path}: holds no {benchmark}. Run: mergelab evaluate STUDY {path.stem}")
    metric, _, filter = about[benchmark]["metric"].partition(",")
    rows = table[(table["benchmark"] == benchmark) & (table["metric"] == metric)]
    rows = rows[rows["filter"] == (filter or "none")]
    pairs = zip(rows["id"], rows["value"] / rows["weight"], strict=True)
    return {str(key): float(value) for key, value in pairs}


def _ancestors(graph: lineage.Graph, child: str) -> list[str]:
    """The child and all that it descends from, in the graph's order."""
    reached = {child}
    for _ in graph.nodes:
        reached |= {edge.parent for edge in graph.edges if edge.child in reached}
    return [node.name for node in graph.nodes if node.name in reached]


def _trained_on(study: Study, model: str, results: Path) -> Iterator[tuple[str, list[str]]]:
    """(part, texts) of what a model's training here showed, and of what it declares."""
    known = study.models.get(model)
    if known is None:
        return
    for share in known.train.data if known.train else ():
        stop = None if share.items is None else share.skip + share.items
        shown = datasets.items(results, share.part)[share.skip : stop]
        yield share.part, [item[share.field] for item in shown]
    for part in known.declared:
        yield part, [item["text"] for item in datasets.items(results, part)]


def _plain(
    check: Check, variant: str, detector: Detector, found: Finding, known: Evidence
) -> dict[str, Any]:
    """A finding as JSON, with what its detector assumes, guarantees and cannot see."""
    return {
        "benchmark": check.benchmark,
        "detector": detector.name,
        "detector_version": detector.version,
        "variant": variant,
        "base": check.base,
        "effect_name": detector.effect,
        "effect": float(found.effect),
        "ci95": None if found.ci95 is None else [float(end) for end in found.ci95],
        "p": None if detector.informational or found.p is None else float(found.p),
        "n_suspects": found.n_suspects,
        "n_controls": found.n_controls,
        "informational": detector.informational,
        "statistic": detector.statistic,
        "null_hypothesis": detector.null_hypothesis,
        "guarantees": detector.guarantees,
        "blind_spots": detector.blind_spots,
        "papers": list(detector.papers),
        "item_scores": None,
        "ids": None,
        "flagged": list(found.flagged),
        "details": dict(found.details),
        **(_items(found, known) if found.item_scores is not None else {}),
    }


def _items(found: Finding, known: Evidence) -> dict[str, Any]:
    """Item scores with their ids, and how well they tell suspects from controls."""
    values: Mapping[str, Any] = found.item_scores or {}
    suspects, controls = (np.asarray(values[part], dtype=np.float64) for part in PARTS)
    area, low, high = statistics.auc(suspects, controls)
    ids = found.ids or {part: [item["id"] for item in known.items[part]] for part in PARTS}
    return {
        "item_scores": {"suspects": suspects.tolist(), "controls": controls.tolist()},
        "ids": {part: list(ids[part]) for part in PARTS},
        "auc": area,
        "auc_ci95": [low, high],
        "tpr_at_5_fpr": statistics.tpr_at_fpr(suspects, controls, 0.05),
        "tpr_at_1_fpr": statistics.tpr_at_fpr(suspects, controls, 0.01),
    }
