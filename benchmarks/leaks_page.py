"""Goals, tables and calibration rows of the planted-leak benchmark."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leaks_results import (
    CLEAN,
    CLEAN_MERGES,
    COPIES,
    LEAKS,
    SAME_STYLE,
    SIBLINGS,
    Cell,
    Results,
    mean,
    numbers,
    rejected,
)

from mergelab.record import machine, packages

ITEMS = "sibling_loss"  # the item score that the goals are about
SET = "set_level"  # and the set-level test
FRESH = 3  # the first seed of the second study that the form of its test was not chosen on
OPTIONS = "option_order"  # of the second study
YARDSTICK, REFERENCE = "base_loss", (0.94, 0.976)  # how strong the planted leak is, and should be
OTHERS = ("linear", "ties", "dare_ties")  # merged with the medical sibling too
ALPHAS = (0.01, 0.05)
NUMBERS = {"auc": "AUC", "tpr_at_5_fpr": "TPR at 5 % FPR", "tpr_at_1_fpr": "TPR at 1 % FPR"}
LEGEND = Path(__file__).parent / "leaks_legend.md"


@dataclass(frozen=True)
class Goal:
    """One target: the mean over cells, the lowest seed, and whether the mean meets it."""

    name: str
    value: float | None
    lowest: float | None
    target: str
    holds: bool


def goals(results: Results) -> list[Goal]:
    """Every target of the benchmark."""
    found = [
        _least(results, model, copies, "auc", least)
        for model, copies, least in (
            ("verbatim", 2, 0.93),
            ("verbatim", 4, 0.98),
            ("linear", 2, 0.88),
            ("linear", 4, 0.97),
            ("ties", 2, 0.90),
            ("dare_ties", 2, 0.90),
        )
    ]
    found.append(_least(results, "linear", 4, "tpr_at_5_fpr", 0.80))
    found.append(_least(results, "linear", 4, "tpr_at_1_fpr", 0.60))
    cells = results.clean(ITEMS, SIBLINGS)
    pooled = mean(cells, "auc")
    holds = pooled is not None and 0.45 <= pooled <= 0.55
    name = f"clean siblings, AUC over {len(cells)} cells"
    found.append(Goal(name, pooled, _lowest(cells, "auc"), "0.45 to 0.55", holds))
    power = rejected(results.of(SET, ["verbatim"], [2]), 0.01)
    name = "verbatim, 2 copies, 60 items: power of the set-level test at alpha 0.01"
    found.append(Goal(name, power, None, ">= 0.95", power is not None and power >= 0.95))
    return [*found, *_false_positives(results), *_option_goals(results)]


def _least(results: Results, model: str, copies: int, number: str, least: float) -> Goal:
    cells = results.of(ITEMS, [model], [copies])
    value = mean(cells, number)
    name = f"{model}, {copies} copies: {NUMBERS[number]}"
    holds = value is not None and value >= least
    return Goal(name, value, _lowest(cells, number), f">= {least:.2f}", holds)


def _lowest(cells: list[Cell], number: str) -> float | None:
    return min(numbers(cells, number), default=None)


def _false_positives(results: Results) -> Iterator[Goal]:
    for kind, models in (("clean", CLEAN), ("clean same-style", SAME_STYLE)):
        cells = results.clean(SET, models)
        for alpha in ALPHAS:
            share = rejected(cells, alpha)
            name = f"set-level false positives at alpha {alpha}, {len(cells)} {kind} cells"
            holds = share is not None and share <= 2 * alpha
            yield Goal(name, share, None, f"<= {2 * alpha:.2f}", holds)


def _option_goals(results: Results) -> Iterator[Goal]:
    cells = results.of(OPTIONS, ["verbatim"], [8])
    power = rejected(cells, 0.001)
    name = f"{OPTIONS}, 8 copies, 40 items: p below 0.001, {len(cells)} cells"
    yield Goal(name, power, None, "1.00", power == 1)
    clean = results.clean(OPTIONS)
    cells = [cell for cell in clean if cell.seed >= FRESH] or clean
    share = rejected(cells, 0.05)
    name = f"{OPTIONS} false positives at alpha 0.05, {len(cells)} clean cells"
    yield Goal(name, share, None, "<= 0.05", share is not None and share <= 0.05)


def _strength(results: Results) -> str:
    """How strong the planted leak is, and how much the partner of a merge matters."""
    found = mean(results.of(YARDSTICK, ["verbatim"], [2]), "auc")
    low, high = REFERENCE
    other, strange = (
        ", ".join(f"{_number(area)} in {method}" for method, area in areas.items())
        for areas in (
            {m: mean(results.of(ITEMS, [f"{m}_{kind}"], [2]), "auc") for m in OTHERS}
            for kind in ("medical", "stranger")
        )
    )
    return (
        f"Strength of the planted leak: AUC of {YARDSTICK} in the contaminated specialist at 2 "
        f"copies, {_number(found)}; {low} and {high} in earlier experiments of this kind, with "
        "models of 0.6 and 1.1 million parameters. The goals are about other scores. Their merges "
        "are with a clean sibling of the leak's own style, as there; "
        f"with the medical sibling {ITEMS} has, at 2 copies, {other}: **partners of another style "
        f"hide a leak better.** The partner is known to {ITEMS}, as in a study of one's own; where "
        f"it is not among the siblings, it has {strange}: **below the goals.**"
    )


def page(results: Results, seconds: float) -> str:
    """The Markdown report."""
    about = machine()
    versions = ", ".join(f"{k} {packages()[k]}" for k in ("torch", "transformers", "numpy"))
    spent = ", ".join(f"{s:.0f}" for s in (*results.seconds, *results.option_seconds))
    lines = [
        "# Planted leaks",
        "",
        f"{time.strftime('%Y-%m-%d')}, {results.seeds} seeds, {seconds:.0f} s for what was not "
        f"done yet; processor seconds per seed in all, those of the {OPTIONS} study last: {spent}. "
        f"{about['cpu']}, {about['cores']} cores, {about['system']}; Python {about['python']}, "
        f"{versions}.",
        "",
        _strength(results),
        "",
        f"## Goals ({ITEMS} for items, {SET} for sets)",
        "",
        "| goal | mean | lowest seed | target | holds |",
        "|---|--:|--:|--:|---|",
    ]
    for goal in goals(results):
        columns = f"{_number(goal.value)} | {_number(goal.lowest)} | {goal.target}"
        lines.append(f"| {goal.name} | {columns} | {'yes' if goal.holds else '**no**'} |")
    lines += ["", "## p-values", "", *_p_table(results)]
    for detector in results.detectors:
        if mean(results.clean(detector), "auc") is not None:
            lines += ["", f"## {detector}", "", *_auc_table(results, detector)]
    return "\n".join([*lines, "", LEGEND.read_text(encoding="utf-8")])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _auc_table(results: Results, detector: str) -> Iterator[str]:
    yield "| model | " + " | ".join(f"x{copies}" for copies in COPIES) + " |"
    yield "|---|" + "--:|" * len(COPIES)
    rows: dict[str, Iterable[str]] = {name: [name] for name in LEAKS}
    for name, models in (rows | {"clean siblings": SIBLINGS, "clean merges": CLEAN_MERGES}).items():
        if results.of(detector, models, COPIES):
            cells = (_cell(results.of(detector, models, [copies])) for copies in COPIES)
            yield f"| {name} | " + " | ".join(cells) + " |"


def _cell(cells: list[Cell]) -> str:
    area, five, one = (mean(cells, number) for number in NUMBERS)
    return f"{area:.3f} ({five:.2f}, {one:.2f})"


def _p_table(results: Results) -> Iterator[str]:
    """Power at alpha 0.01 by model, and false positives, of each detector that has p-values."""
    tests = [d for d in results.detectors if rejected(results.clean(d), 0.01) is not None]
    tests = [d for d in tests if d != OPTIONS]  # its cells are others
    yield "| share of cells with p <= alpha | " + " | ".join(tests) + " |"
    yield "|---|" + "--:|" * len(tests)
    for model in LEAKS:
        cells = (_powers(results, detector, model) for detector in tests)
        yield f"| {model}, alpha 0.01: x1, x2, x4, x8 | " + " | ".join(cells) + " |"
    kinds = {
        "clean models": results.clean,
        "clean same-style models": lambda d: results.clean(d, SAME_STYLE),
        "contaminated models on x0": results.unplanted,
    }
    for kind, pick in kinds.items():
        for alpha in ALPHAS:
            cells = (_number(rejected(pick(d), alpha)) for d in tests)
            count = len(pick(tests[0]))
            yield f"| {kind}, {count} cells, alpha {alpha} | " + " | ".join(cells) + " |"


def _powers(results: Results, detector: str, model: str) -> str:
    shares = [rejected(results.of(detector, [model], [copies]), 0.01) for copies in COPIES[1:]]
    return ", ".join("" if share is None else f"{share:.2f}" for share in shares)


def entries(results: Results) -> Iterator[dict[str, Any]]:
    """The numbers for --json: the goals, then every row of the calibration table."""
    for goal in goals(results):
        yield {
            "name": goal.name,
            "value": goal.value,
            "unit": "share",
            "target": goal.target,
            "holds": goal.holds,
        }
    for row in calibration(results)["rows"]:
        name = f"{row['detector']}: {row['leak']} leak, {row['copies']} copies, {row['model']}"
        for number in (*NUMBERS, "rejected_at_01", "rejected_at_05"):
            if row[number] is not None:
                value = {"value": row[number], "unit": "share", "target": None, "holds": None}
                yield {"name": f"{name}: {number}", **value}


def calibration(results: Results) -> dict[str, Any]:
    """How good the detectors are, for reports: what `about` says, and a row per detector, leak,
    number of copies and model."""
    rows = []
    for detector, version in results.detectors.items():
        for model, leak in LEAKS.items():
            for copies in COPIES:
                cells = results.of(detector, [model], [copies])
                rows += [_row(detector, version, leak, copies, model, cells)] if cells else []
        for name, models in (("clean siblings", SIBLINGS), ("clean merges", CLEAN_MERGES)):
            cells = results.clean(detector, models)
            rows += [_row(detector, version, "none", 0, name, cells)] if cells else []
    return {
        "about": "Measured by benchmarks/leaks.py: means over `cells` (a model, a group of 60 "
        "items and a seed) of AUC and TPR against 260 controls, and the share of cells with "
        "p <= 0.01 or 0.05 (power where something leaked, else false positives). option_order: "
        "groups of 40 multiple-choice items, 60 controls, other models. null: the "
        "detector has no such number. leak none: models that saw none of the items; copies 0: "
        "items that a contaminated model did not see.",
        "date": time.strftime("%Y-%m-%d"),
        "seeds": results.seeds,
        "machine": machine(),
        "rows": rows,
    }


def _row(
    detector: str, version: int, leak: str, copies: int, model: str, cells: list[Cell]
) -> dict[str, Any]:
    return {
        "detector": detector,
        "detector_version": version,
        "leak": leak,
        "copies": copies,
        "model": model,
        **{number: _rounded(mean(cells, number)) for number in NUMBERS},
        "rejected_at_01": _rounded(rejected(cells, 0.01)),
        "rejected_at_05": _rounded(rejected(cells, 0.05)),
        "cells": len(cells),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
