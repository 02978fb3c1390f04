"""Parameters of a plan for people: a gradient over 32 layers is one line, not 32 groups."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any

from mergelab.checkpoint import split_layer

MOST_NAMES = 6  # names that one group lists
MOST_KNOTS = 8  # values that one line lists
JUMP = 2  # from one text to another

Values = Mapping[str, Any]  # {"shared": {...}, "models": {model: {...}}}


def rows(groups: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(tensors, parameters) of each row, for the groups of `plan.describe`.

    A row holds the tensors whose parameters are the same, or change alike over the layers.
    '0-31' are all layers from 0 to 31, '3…31' some of them."""
    runs = _runs({name: group for group in groups for name in group["tensors"]})
    same_models = len({tuple(layers[0][1]["models"]) for _, layers in runs}) == 1
    found: dict[str, dict[str, int]] = {}
    for label, layers in runs:
        text = _parameters(layers, name_all=not same_models)
        names = found.setdefault(text, {})
        names[label] = names.get(label, 0) + len(layers)
    if len(found) == 1:
        return [(f"all {sum(len(layers) for _, layers in runs)}", text) for text in found]
    return [(_label(names), text) for text, names in found.items()]


def _runs(values: Mapping[str, Values]) -> list[tuple[str, list[tuple[int, Values]]]]:
    """Each tensor name without its layer, and its values per layer.

    It is cut where the models change, as in a stack of slices."""
    kinds: dict[tuple[str, int | None, str], list[tuple[int, Values]]] = {}
    for name, value in values.items():
        prefix, layer, suffix = split_layer(name)
        kind = (prefix, None if layer is None else 0, suffix)
        kinds.setdefault(kind, []).append((layer or 0, value))
    found = []
    for (prefix, layer, suffix), layers in kinds.items():
        if layer is None:
            found.append((prefix, layers))
            continue
        layers.sort(key=lambda pair: pair[0])
        for _, run in groupby(layers, key=lambda pair: list(pair[1]["models"])):
            part = list(run)
            rest = re.sub(r"\.\d+(?=\.)", ".*", suffix)  # experts of one layer
            found.append((f"{prefix}.{_span([i for i, _ in part])}.{rest}", part))
    return found


def _span(layers: Sequence[int]) -> str:
    first, last = layers[0], layers[-1]
    if first == last:
        return str(first)
    return f"{first}-{last}" if last - first + 1 == len(layers) else f"{first}…{last}"


def _parameters(layers: Sequence[tuple[int, Values]], *, name_all: bool) -> str:
    """One line for the shared parameters, and one per model (that has any, or all of them)."""
    numbers = [number for number, _ in layers]
    lines = [_line([values["shared"] for _, values in layers], numbers)]
    for model in layers[0][1]["models"]:
        line = _line([values["models"][model] for _, values in layers], numbers)
        lines.append(f"{model}: {line}" if line else model * name_all)
    return "\n".join(line for line in lines if line)


def _line(values: Sequence[Values], layers: Sequence[int]) -> str:
    fixed, moving = [], []
    for name in values[0]:
        row = [value[name] for value in values]
        if len({json.dumps(value) for value in row}) == 1:
            fixed.append(f"{name}={_text(row[0])}")
        else:
            moving.append(f"{name}: {_over(layers, row)}")
    return "; ".join([", ".join(fixed), *moving] if fixed else moving)


def _over(layers: Sequence[int], values: Sequence[Any]) -> str:
    """'0 … 1 over layers 0-31', with every turn in between: '0 … 1 (layer 15) … 0.5 over ...'."""
    turns = _turns(values)
    if len(turns) > MOST_KNOTS:
        return f"{len(turns)} turns over layers {_span(layers)} (all values: --json)"
    inner = [f"{_text(values[i])} (layer {layers[i]})" for i in turns[1:-1]]
    ends = _text(values[0]), _text(values[-1])
    return f"{' … '.join([ends[0], *inner, ends[1]])} over layers {_span(layers)}"


def _turns(values: Sequence[Any]) -> list[int]:
    """The ends, and where values stop to rise, fall, or stay; each change of a flag or text."""
    steps = [_step(*pair) for pair in pairwise(values)]
    inner = [i for i, (a, b) in enumerate(pairwise(steps), start=1) if a != b or b == JUMP]
    return [0, *inner, len(values) - 1]


def _step(a: Any, b: Any) -> int:
    if a == b:
        return 0
    numbers = isinstance(a, int | float) and isinstance(b, int | float)
    return JUMP if not numbers else 1 if a < b else -1


def _label(names: Mapping[str, int]) -> str:
    shown = list(names)[:MOST_NAMES]
    more = len(names) - len(shown)
    count = sum(names.values())
    lines = [*shown, *([f"… and {more} more kinds"] if more else [])]
    return "\n".join([*lines, f"({count} tensors)"] if count > 1 else lines)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)
