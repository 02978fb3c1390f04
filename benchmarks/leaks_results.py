"""What the detectors said of every seed, model and group of items of the planted-leak benchmark.

A cell is one detector on one model and one group (x0 to x8: 60 items, or 40 multiple-choice ones,
planted that often in the contaminated specialists) of one seed. Averages are over cells, each with
its own controls."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

COPIES = (0, 1, 2, 4, 8)
LEAKS = {  # model or merge -> leak; every other one is clean
    "verbatim": "verbatim",
    "linear": "verbatim",
    "linear_25": "verbatim",
    "slerp": "verbatim",
    "ties": "verbatim",
    "dare_ties": "verbatim",
    "again": "verbatim",
    "linear_stranger": "verbatim",
    "ties_stranger": "verbatim",
    "dare_ties_stranger": "verbatim",
    "linear_medical": "verbatim",
    "ties_medical": "verbatim",
    "dare_ties_medical": "verbatim",
    "answer": "answer",
    "linear_answer": "answer",
    "paraphrase": "paraphrase",
    "linear_paraphrase": "paraphrase",
}
SIBLINGS = ("style", "medical", "math")
CLEAN_MERGES = ("clean_linear", "clean_ties", "clean_dare_ties")
CLEAN = (*SIBLINGS, *CLEAN_MERGES)
OPTION_MODELS = ("verbatim", "style", "medical")  # of the multiple-choice study
SAME_STYLE = ("style", *CLEAN_MERGES)  # tuned on the benchmark's style, or half of it: the trap


@dataclass(frozen=True)
class Cell:
    """A finding in short; None where the detector gives no such number."""

    seed: int
    model: str
    copies: int
    detector: str
    version: int
    auc: float | None
    tpr_at_5_fpr: float | None
    tpr_at_1_fpr: float | None
    p: float | None


@dataclass(frozen=True)
class Results:
    """All cells, and the processor time of each seed in seconds, of the second study too."""

    cells: tuple[Cell, ...]
    seconds: tuple[float, ...]
    option_seconds: tuple[float, ...] = ()

    @property
    def seeds(self) -> int:
        """Number of seeds."""
        return len(self.seconds)

    @property
    def detectors(self) -> dict[str, int]:
        """Version of every detector, in the order of the detectors' table."""
        return {cell.detector: cell.version for cell in self.cells}

    def of(self, detector: str, models: Iterable[str], copies: Iterable[int]) -> list[Cell]:
        """The cells of a detector on some models and groups."""
        wanted, groups = set(models), set(copies)
        return [
            cell
            for cell in self.cells
            if cell.detector == detector and cell.model in wanted and cell.copies in groups
        ]

    def clean(self, detector: str, models: Iterable[str] = CLEAN) -> list[Cell]:
        """Cells of models that saw none of the items."""
        return self.of(detector, models, COPIES)

    def unplanted(self, detector: str) -> list[Cell]:
        """Cells of contaminated models on the group that was not planted."""
        return self.of(detector, (m for m in LEAKS if not m.endswith("_stranger")), [0])


def numbers(cells: Iterable[Cell], name: str) -> list[float]:
    """A number of every cell; empty if the detector does not give it."""
    values = [getattr(cell, name) for cell in cells]
    return [] if None in values else values


def mean(cells: Iterable[Cell], name: str) -> float | None:
    """Mean of auc, tpr_at_5_fpr or tpr_at_1_fpr; None where there is none."""
    values = numbers(cells, name)
    return float(np.mean(values)) if values else None


def rejected(cells: Iterable[Cell], alpha: float) -> float | None:
    """Share of cells with p <= alpha: power where a leak was planted, else false positives."""
    values = numbers(cells, "p")
    return float(np.mean([p <= alpha for p in values])) if values else None


def read(seeds: Iterable[Path], options: Iterable[Path] = ()) -> Results:
    """Every finding of the seeds of both studies, in these folders."""
    cells: list[Cell] = []
    seconds: dict[str, list[float]] = {"seed": [], "options": []}
    for folder in (*seeds, *options):
        kind, _, number = folder.name.rpartition("-")
        results = folder / "results/leaks"
        for name in OPTION_MODELS if kind == "options" else (*LEAKS, *CLEAN):
            text = (results / "findings" / f"{name}.json").read_text(encoding="utf-8")
            cells += [_cell(int(number), name, finding) for finding in json.loads(text)]
        records = [json.loads(path.read_text()) for path in (results / "records").glob("*.json")]
        seconds[kind].append(sum(record["cpu_seconds"] for record in records))
    return Results(tuple(cells), tuple(seconds["seed"]), tuple(seconds["options"]))


def _cell(seed: int, model: str, finding: dict[str, Any]) -> Cell:
    numbers = (finding.get(key) for key in ("auc", "tpr_at_5_fpr", "tpr_at_1_fpr", "p"))
    copies = int(finding["benchmark"].removeprefix("x"))
    return Cell(seed, model, copies, finding["detector"], finding["detector_version"], *numbers)
