"""What forensics read from the weights, layer by layer, as a heat map.

Rows are layers (and what lies outside them), columns the groups of tensors under each parent; a
last column says how far the model is from what its recipe makes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mergelab import figures
from mergelab.figures import Cell
from mergelab.forensics import origins

GROUPS = {"attention": "attn", "mlp": "mlp", "norm": "norm", "other": "other"}
BEFORE, AFTER = {"embedding": "embedding"}, {"norm": "last norm", "head": "head", "other": "other"}
MOST_COLUMNS = 21  # beyond it the groups of a parent are averaged
NOTHING = 0.005  # a parent with no coefficient above it is not drawn
FLOOR = -6.0  # log10 of the relative error where the shades begin

Key = tuple[int | None, str]  # layer (None outside the layers), group
Row = int | str  # a layer, or the group of what lies outside
Coefficients = Mapping[str, Mapping[Key, float]]  # parent -> layer and group -> mean


def heat_map(entry: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The picture of one model of an audit (`weights[]`), and its parents in the order A, B, ..."""
    found = entry["infer"] or {"parents": [], "layers": []}
    means = coefficients(found["layers"])
    named = [*found["parents"], *sorted(means)]
    parents = [name for name in dict.fromkeys(named) if _seen(means.get(name, {}))]
    errors = _errors((entry["remerge"] or {"tensors": []})["tensors"])
    keys = {key for parent in parents for key in means[parent]}
    rows = _rows(keys, errors)
    groups = [group for group in GROUPS if any(k == group and i is not None for i, k in keys)]
    if len(parents) * len(groups) > MOST_COLUMNS or not groups:
        groups = ["all"]
    cells = [
        cell for i, name in enumerate(parents) for cell in _cells(means[name], rows, groups, i)
    ]
    columns = [GROUPS.get(group, group) for _ in parents for group in groups]
    blocks = [(f"{letter(i)} {_own(name)}", len(groups)) for i, name in enumerate(parents)]
    if errors:
        cells += _error_cells(errors, rows, len(columns))
        columns.append("differs")
        blocks.append(("", 1))
    names = [_row_name(row) for row in rows]
    title = f"{entry['model']}: coefficient of each parent by layer and group of tensors"
    picture = figures.heat_map(cells, title=title, rows=names, columns=columns, blocks=blocks)
    return picture, parents


def coefficients(layers: Sequence[Mapping[str, Any]]) -> dict[str, dict[Key, float]]:
    """Mean coefficient of each parent by layer and group; a copy counts 1 for its source."""
    sums: dict[str, dict[Key, list[float]]] = {}
    for row in layers:
        key = (row["layer"], _kind(row["layer"], row["group"]))
        copied = {row["copy_of"].rpartition(":")[0]: 1.0} if row["copy_of"] else {}
        for parent, value in (row["coefficients"] or copied).items():
            if not math.isfinite(value):
                continue
            sums.setdefault(parent, {}).setdefault(key, []).append(value)
    return {
        parent: {key: math.fsum(values) / len(values) for key, values in found.items()}
        for parent, found in sums.items()
    }


def _kind(layer: int | None, group: str) -> str:
    """The group of a tensor as it is drawn: what has no column or row of its own is other."""
    known = {*BEFORE, *AFTER} if layer is None else GROUPS.keys()
    return group if group in known else "other"


def letter(place: int) -> str:
    """A, B, ... Z, then 27, 28, ..."""
    return chr(ord("A") + place) if place < 26 else str(place + 1)


def _seen(found: Mapping[Key, float]) -> bool:
    return any(abs(value) > NOTHING for value in found.values())


def _errors(tensors: Sequence[Mapping[str, Any]]) -> dict[Row, float]:
    """Largest relative error of each layer; nothing if every tensor is equal."""
    errors: dict[Row, float] = {}
    for tensor in tensors:
        row = tensor["layer"]
        row = _kind(None, origins.group(tensor["tensor"])) if row is None else row
        error = 0.0 if tensor["equal"] else tensor["relative_error"] or 0.0
        errors[row] = max(errors.get(row, 0.0), error if math.isfinite(error) else 1.0)
    return errors if any(errors.values()) else {}


def _rows(keys: set[Key], errors: Mapping[Row, float]) -> list[Row]:
    inside = {layer for layer, _ in keys if layer is not None}
    inside |= {row for row in errors if isinstance(row, int)}
    outside = {group for layer, group in keys if layer is None}
    outside |= {row for row in errors if isinstance(row, str)}
    before = [group for group in BEFORE if group in outside]
    return [*before, *sorted(inside), *(group for group in AFTER if group in outside)]


def _cells(
    found: Mapping[Key, float], rows: Sequence[Row], groups: Sequence[str], parent: int
) -> Iterator[Cell]:
    """One block: a cell per layer and group; what lies outside the layers spans the block."""
    start, end = parent * len(groups), (parent + 1) * len(groups) - 1
    for place, row in enumerate(rows):
        if isinstance(row, str) or groups == ["all"]:
            layer = row if isinstance(row, int) else None
            own = [v for (i, g), v in found.items() if i == layer and (g == row or i is not None)]
            if own:
                yield _cell(place, start, end, math.fsum(own) / len(own))
            continue
        for i, group in enumerate(groups):
            if (row, group) in found:
                yield _cell(place, start + i, start + i, found[row, group])


def _cell(row: int, first: int, last: int, value: float) -> Cell:
    text = f"{value:.2f}".replace("-", "\N{MINUS SIGN}")
    return Cell(row, first, last, abs(value), "0" if abs(value) < NOTHING else text)


def _error_cells(errors: Mapping[Row, float], rows: Sequence[Row], column: int) -> Iterator[Cell]:
    for place, row in enumerate(rows):
        if row in errors:
            error = errors[row]
            strength = (math.log10(error) - FLOOR) / -FLOOR if error > 0 else 0.0
            digits, _, power = f"{error:.0e}".partition("e")
            yield Cell(place, column, column, strength, f"{digits}e{int(power)}" if error else "0")


def _row_name(row: Row) -> str:
    return f"layer {row}" if isinstance(row, int) else {**BEFORE, **AFTER}[row]


def _own(name: str) -> str:
    """A hub id without its owner."""
    return name.rpartition("/")[2] or name
