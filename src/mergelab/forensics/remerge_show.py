"""A re-merge check, printed for people: the answer first, then the tensors that are not exact."""

from __future__ import annotations

from typing import Any

from rich.table import Column, Table
from rich.text import Text

from mergelab.forensics.remerge_why import percent
from mergelab.show import out


def show(result: dict[str, Any]) -> None:
    """Print what `remerge` found."""
    by = f" ({result['numerics']})" if result["numerics"] else ""
    out.print(Text(f"{result['verdict']}{by}: {result['why']}"))
    for title, names in (("not in the file", result["missing"]), ("not made", result["extra"])):
        for name in names:
            out.print(Text(f"{title}: {name}"))
    for note in result["notes"]:
        out.print(Text(f"note: {note}"))
    if not result["worst"]:
        return
    name = Column("tensor, worst first", overflow="fold", min_width=24)
    rows = Table(name, box=None, pad_edge=False)
    for title in ("verdict", "differ", "other choice", "max ulp", "relative error", "cosine"):
        rows.add_column(title, no_wrap=True)
    for entry in result["worst"]:
        rows.add_row(*map(Text, _row(entry)))
    out.print()
    out.print(rows)
    unequal = sum(not entry["equal"] for entry in result["tensors"])
    if unequal > len(result["worst"]):
        out.print(f"... and {unequal - len(result['worst'])} more")


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    cosine = "" if entry["cosine"] is None else f"{entry['cosine']:.8f}"
    return (
        entry["tensor"],
        entry["verdict"],
        percent(entry["share_differing"]),
        percent(entry["share_chosen"]),
        f"{entry['max_ulp']:,}",
        f"{entry['relative_error']:.2g}",
        cosine,
    )
