"""Detectors: statistics on evidence that say whether a model looks as if it saw a benchmark.

A detector sees log-probabilities, never a model. It scores items; suspects are then judged against
controls of the same distribution, so the p-value needs no reference population."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mergelab import evidence, statistics
from mergelab.detectors.calibrated import Floats, Items, base_loss, wbc
from mergelab.errors import UserError, nearest
from mergelab.record import file_entries, file_sha256, write_json
from mergelab.study import Check, Study

VERSION = 1
FLAG_Q = 0.01  # q below this is flagged; q = p after Benjamini-Hochberg over a study's findings
BASE_REASON = "the base is its own calibration"

NULL = (
    "Suspects and controls are random draws from one distribution, and this model's training "
    "treated them alike: a suspect is as likely to outscore a control as the other way round."
)
BLIND = (
    "Blind where the base itself saw the items (then both likelihoods are high), and where "
    "training scored only the answers. Weaker after merging: a low score is no acquittal."
)


@dataclass(frozen=True)
class Detector:
    """A named item score with what it means, assumes and cannot see."""

    name: str
    function: Callable[[Items, Items], Floats]
    statistic: str
    null_hypothesis: str
    blind_spots: str
    papers: tuple[str, ...]
    version: int = 1


DETECTORS: dict[str, Detector] = {
    detector.name: detector
    for detector in (
        Detector(
            "base_loss",
            base_loss,
            "Mean over tokens of log p(model) - log p(base), nats per token.",
            NULL,
            BLIND,
            ("arXiv 2012.07805", "arXiv 2203.03929"),
        ),
        Detector(
            "wbc",
            wbc,
            "Share of token windows that the model finds likelier than the base does, "
            "averaged over window sizes 1 to 32.",
            NULL,
            BLIND,
            ("arXiv 2601.02751",),
        ),
    )
}


def verdict(q: float) -> str:
    """One line on a finding. It never says clean: no detector can."""
    if q < FLAG_Q:
        return f"flagged: q < {FLAG_Q} - scores suspects above controls of the same distribution"
    return "no evidence at this sample size"


def detect(study: Study, variant: str, results: Path) -> dict[str, Any]:
    """Judge a variant by every contamination check of the study, from stored evidence.

    Writes results/findings/<variant>.json and returns what belongs in the record. Checks whose base
    is the variant itself make no finding; the record lists them under `skipped`."""
    started = time.perf_counter()
    findings: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    inputs: dict[str, str] = {}
    for check in study.contamination:
        if check.base == variant:
            skipped.append({"benchmark": check.benchmark, "reason": BASE_REASON})
            continue
        paths = [results / "evidence" / f"{name}.safetensors" for name in (variant, check.base)]
        findings += [_finding(study, check, variant, name, paths) for name in check.detectors]
        inputs |= {path.stem: file_sha256(path) for path in paths}
    path = results / "findings" / f"{variant}.json"
    write_json(path, findings)
    used = sorted({finding["detector"] for finding in findings})
    return {
        "variant": variant,
        "inputs": {"evidence": inputs},
        "settings": {"flag_q": FLAG_Q},
        "skipped": skipped,
        "versions": {"detectors": VERSION} | {name: DETECTORS[name].version for name in used},
        "outputs": file_entries(path.parent, [path.name]),
        "seconds": round(time.perf_counter() - started, 2),
    }


def _finding(
    study: Study, check: Check, variant: str, name: str, paths: list[Path]
) -> dict[str, Any]:
    """One detector on one check: item scores, AUC with interval, one-sided p, TPR at 5 % FPR."""
    detector = find(name, f"{study.folder}/study.yaml: check of {check.benchmark}")
    for part in (check.suspects, check.controls):
        _comparable(detector, part, *paths)
    suspects, controls = (
        detector.function(*_load(part, *paths)) for part in (check.suspects, check.controls)
    )
    if min(len(suspects), len(controls)) < 2:
        raise UserError(f"{study.folder}/study.yaml: {check.benchmark}: needs 2 items a part.")
    area, low, high = statistics.auc(suspects, controls)
    return {
        "benchmark": check.benchmark,
        "detector": name,
        "detector_version": detector.version,
        "variant": variant,
        "base": check.base,
        "n_suspects": len(suspects),
        "n_controls": len(controls),
        "auc": area,
        "auc_ci95": [low, high],
        "p": statistics.mann_whitney(suspects, controls),
        "tpr_at_5_fpr": statistics.tpr_at_fpr(suspects, controls, 0.05),
        "statistic": detector.statistic,
        "null_hypothesis": detector.null_hypothesis,
        "blind_spots": detector.blind_spots,
        "papers": list(detector.papers),
        "item_scores": {"suspects": _plain(suspects), "controls": _plain(controls)},
    }


def _load(part: str, model: Path, base: Path) -> tuple[Items, Items]:
    """Log-probabilities of model and base. Raises UserError unless token by token they pair."""
    ours, theirs = evidence.load(model, part), evidence.load(base, part)
    if [len(item) for item in ours] != [len(item) for item in theirs]:
        raise UserError(
            f"{model} and {base} hold different numbers of tokens on {part}: one is damaged.\n"
            "  Delete both and run mergelab probe for each."
        )
    return ours, theirs


def find(name: str, where: str) -> Detector:
    """A detector by name. Raises UserError with the nearest right name."""
    if name not in DETECTORS:
        known = ", ".join(DETECTORS)
        hint = nearest(name, DETECTORS)
        raise UserError(f"{where}: there is no detector '{name}'.{hint} Known: {known}.")
    return DETECTORS[name]


def _comparable(detector: Detector, part: str, model: Path, base: Path) -> None:
    """Raise UserError unless model and base were probed on the same items, cut alike into tokens.

    What counts is the scored token ids: a fine-tune may add a token that no item holds."""
    ours, theirs = evidence.metadata(model), evidence.metadata(base)
    for about, path in ((ours, model), (theirs, base)):
        if part not in about["ids"]:
            raise UserError(
                f"{path}: holds nothing on {part}. Run mergelab probe for '{path.stem}'."
            )
    if ours["ids"][part] != theirs["ids"][part]:
        raise UserError(
            f"{model} and {base} were probed on different items of {part}.\n"
            "  Delete both and run mergelab probe for each."
        )
    if ours["tokens"][part] != theirs["tokens"][part]:
        raise UserError(
            f"Detector '{detector.name}' needs a shared tokenizer, but '{model.stem}' "
            f"(sha256 {ours['tokenizer'][:12]}) and its base '{base.stem}' "
            f"(sha256 {theirs['tokenizer'][:12]}) cut {part} into different tokens.\n"
            "  Name a base with the same tokenizer, or leave this detector out."
        )
    if ours["bos"] != theirs["bos"]:
        raise UserError(
            f"Detector '{detector.name}' needs texts to begin alike, but '{model.stem}' puts token "
            f"{ours['bos']} before them and its base '{base.stem}' {theirs['bos']}.\n"
            "  Set the same bos_token in both tokenizer_config.json, then probe both again."
        )


def _plain(scores: Floats) -> list[float]:
    return [float(score) for score in np.asarray(scores)]
