"""What `infer` found, printed for people: the answer first, then the layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from mergelab.progress import printable
from mergelab.show import out

ROWS = 24  # tensors or layers told to people
SHOWN = 4  # hypotheses


def show(result: Mapping[str, Any]) -> None:
    """Print the verdict, the hypotheses with their fit, coefficients by layer, and the notes."""
    out.print(_text(result["verdict"]))
    rows = Table("hypothesis", "parents", "parameters", "residual", "score", box=None)
    for reading in result["hypotheses"][:SHOWN]:
        equal = " (as well)" if reading["equal"] else ""
        parents = ", ".join(map(_parent, reading["parents"]))
        fit = f"{reading['residual']:.3g} steps, R² {reading['r2']:.4f}"
        cells = (reading["method"] + equal, parents, _parameters(reading["parameters"]), fit)
        rows.add_row(*map(_text, (*cells, f"{reading['score']:.3f}")))
    out.print()
    out.print(rows)
    for reading in result["hypotheses"][:SHOWN]:
        out.print(_text(f"{reading['method']}: {reading['why']}"))
    for title in ("undeclared", "finetuned"):
        found = "yes" if result[title]["found"] else "no"
        out.print(_text(f"{title}: {found}; {result[title]['why']}"))
    _gradients(result["gradient"])
    for note in result["notes"]:
        out.print(_text(f"note: {note}"))


def _text(value: str) -> Text:
    return Text(printable(value))


def _parent(parent: Mapping[str, Any]) -> str:
    density = "" if parent["density"] is None else f", density {parent['density']:.3g}"
    return f"{parent['name']} {parent['weight']:.3g}{density}"


def _parameters(parameters: Mapping[str, Any]) -> str:
    parts = []
    for name, value in parameters.items():
        if isinstance(value, dict | list):
            value = f"{len(value)} {name}" if isinstance(value, list) else "see below"
        parts.append(f"{name} {value}")
    return ", ".join(parts)


def _gradients(gradient: Mapping[str, Any]) -> None:
    """Coefficients that are not the same in all layers, per parent and group."""
    for name, groups in gradient.items():
        for kind, entry in groups.items():
            if entry["value"] is None and entry["layers"]:
                values = list(entry["layers"].values())
                shown = " ".join(f"{v:.3g}" for v in values[:ROWS])
                more = f" … {len(values) - ROWS} more" if len(values) > ROWS else ""
                knots = f"; a gradient of {entry['knots']}" if entry["knots"] else ""
                out.print(_text(f"{name}, {kind}, by layer: {shown}{more}{knots}"))
