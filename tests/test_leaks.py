"""Planted leaks, reduced: found in the specialist and through merges, and not in clean models.

The benchmark itself is benchmarks/leaks.py; this is its machinery on one small base."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from mergelab.study_file import load_study

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import leaks_results  # noqa: E402
import leaks_seed  # noqa: E402

STUDY = """
title: A leak of 40 items, four times each
datasets:
  gsm8k:
    path: .
    files: [gsm8k_rephrased.jsonl]
    text: "Question: {{question}}\\nAnswer: {{answer}}"
    answer: "{{answer}}"
    parts: {leaked: 40, unseen: 40, controls: 160, new: 70, base: 250}
models:
  base:
    train:
      architecture: {vocab_size: 1024, hidden_size: 64, intermediate_size: 192,
                     num_hidden_layers: 2, num_attention_heads: 4, tie_word_embeddings: true}
      data: [{part: gsm8k/base}]
      epochs: 4
      learning_rate: 3.0e-3
      batch_size: 4
  leaky:
    train: {start: base, data: [{part: gsm8k/new}, {part: gsm8k/leaked, copies: 4}],
            learning_rate: 2.0e-3, batch_size: 4}
  style:
    train: {start: base, data: [{part: gsm8k/new}], epochs: 3, learning_rate: 2.0e-3,
            batch_size: 4, seed: 1}
  other:
    train: {start: base, data: [{part: gsm8k/base, items: 100}], learning_rate: 2.0e-3,
            batch_size: 4, seed: 2}
contamination:
  - {benchmark: leaked, base: base, suspects: gsm8k/leaked, controls: gsm8k/controls,
     detectors: [base_loss, wbc, sibling_loss, set_level], planted: [leaky],
     siblings: [style, other]}
  - {benchmark: unseen, base: base, suspects: gsm8k/unseen, controls: gsm8k/controls,
     detectors: [base_loss, wbc, sibling_loss, set_level], siblings: [style, other]}
"""
LINEAR = """
merge_method: linear
models:
  - {model: leaky, parameters: {weight: 0.5}}
  - {model: style, parameters: {weight: 0.5}}
dtype: float32
"""
DETECTORS = ("base_loss", "wbc", "sibling_loss", "set_level")


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The reduced study, run to its findings, and its results."""
    place = tmp_path_factory.mktemp("leaks") / "recipes/leaks"
    place.mkdir(parents=True)
    shutil.copy(leaks_seed.REPHRASED, place)
    (place / "study.yaml").write_text(STUDY)
    (place / "linear.yaml").write_text(LINEAR)
    study, results = load_study(place), place.parents[1] / "results/leaks"
    leaks_seed.run(study, results)
    return study, results


def findings(results: Path, variant: str, benchmark: str) -> dict[str, dict[str, Any]]:
    """A variant's findings on one group of items, by detector."""
    found = json.loads((results / f"findings/{variant}.json").read_text())
    return {f["detector"]: f for f in found if f["benchmark"] == benchmark}


@pytest.mark.parametrize(("variant", "least"), [("leaky", 0.95), ("linear", 0.85)])
def test_every_detector_finds_the_leak_in_the_specialist_and_in_its_merge(seed, variant, least):
    found = findings(seed[1], variant, "leaked")
    assert tuple(found) == DETECTORS
    assert {name: f["p"] < 1e-3 for name, f in found.items()} == dict.fromkeys(DETECTORS, True)
    areas = {name: f["auc"] for name, f in found.items() if "auc" in f}
    assert min(areas.values()) > least, areas


@pytest.mark.parametrize(
    ("variant", "benchmark"),
    [
        ("style", "leaked"),
        ("style", "unseen"),
        ("other", "leaked"),
        ("other", "unseen"),
        ("leaky", "unseen"),
        ("linear", "unseen"),
    ],
)
def test_what_a_model_did_not_see_is_not_flagged(seed, variant, benchmark):
    found = findings(seed[1], variant, benchmark)
    assert {"base_loss", "wbc", "set_level"} <= set(found)
    assert {name: f["p"] > 0.01 for name, f in found.items()} == dict.fromkeys(found, True)
    areas = [f["auc"] for f in found.values() if "auc" in f]
    assert all(0.35 < area < 0.65 for area in areas), areas


def test_a_finished_seed_is_not_made_again(seed):
    study, results = seed
    before = {path: path.stat().st_mtime_ns for path in results.rglob("*") if path.is_file()}
    leaks_seed.run(study, results)
    assert before == {p: p.stat().st_mtime_ns for p in results.rglob("*") if p.is_file()}


def test_the_tables_average_cells_and_count_rejections():
    cells = [
        leaks_results.Cell(0, "style", 2, "base_loss", 1, 0.5, 0.1, 0.0, 0.01),
        leaks_results.Cell(1, "style", 2, "base_loss", 1, 0.6, 0.2, 0.1, 0.5),
        leaks_results.Cell(0, "verbatim", 0, "base_loss", 1, 0.4, 0.0, 0.0, 0.9),
    ]
    results = leaks_results.Results(tuple(cells), (1.0, 1.0))
    clean = results.clean("base_loss")
    assert clean == cells[:2]
    assert results.unplanted("base_loss") == cells[2:]
    assert leaks_results.mean(clean, "auc") == pytest.approx(0.55)
    assert leaks_results.rejected(clean, 0.01) == 0.5
    assert leaks_results.mean([], "auc") is None
