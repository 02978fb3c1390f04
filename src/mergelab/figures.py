"""The pictures of the reports: plain numbers in, one SVG string out, the same bytes every time.

Nothing is said by colour alone: kinds and verdicts differ by marker, groups by position, flags by
words, and the cells of a heat map hold their numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergelab.drawing import BLANK, FONT, across, canvas, clean, short, style, svg
from mergelab.palette import DARK_TEXT_BELOW, HEATS, LIGHT

INK, SOFT, PAPER = LIGHT["ink"], LIGHT["soft"], LIGHT["paper"]
SEEN, UNSEEN = LIGHT["seen"], LIGHT["unseen"]
MARKER = {
    **{"base": "s", "expert": "o", "merge": "D", "outside": "p"},
    **{"good": "o", "warn": "^", "bad": "X", "unknown": "s"},
}
ROW = 22.0
WIDTH = 330.0
MOST_TICKS = 300
CELL, LINE = 36.0, 16.0
LONGEST = 22


@dataclass(frozen=True)
class Dot:
    """One row of a panel, `value` None where nothing was measured; a row without `kind` is a
    heading. `filled`: the value differs from the line it is held against."""

    name: str
    kind: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    filled: bool = False
    note: str = ""


@dataclass(frozen=True)
class Strip:
    """One row of a contamination picture: item scores, higher meaning 'looks seen'."""

    name: str
    kind: str
    suspects: Sequence[float]
    controls: Sequence[float]
    label: str
    flagged: bool


@dataclass(frozen=True)
class Cell:
    """One number of a heat map: row, first and last column, strength (0 to 1), the number."""

    row: int
    first: int
    last: int
    strength: float
    text: str


@style()
def panel(
    dots: Sequence[Dot],
    *,
    title: str,
    axis: str,
    higher: bool | None = None,
    marks: Mapping[str, float] | None = None,
) -> str:
    """Values with their 95 % intervals as rows, one under the other: a forest plot.

    `marks` names vertical lines (one or two); `higher` is better, or worse, or (None) neither."""
    if not dots:
        return ""
    left, right = _label_width([dot.name for dot in dots if dot.kind]), 52.0
    heights = _heights(dots)
    plot, axes = canvas(WIDTH, left, right, top=18.0, bottom=40.0, inner=-heights[-1] + ROW)
    for dot, y in zip(dots, heights, strict=True):
        _row_label(axes, dot, y, left / (WIDTH - left - right))
        if dot.value is None and dot.kind:
            axes.text(0.02, y, "not measured", color=SOFT, fontsize=FONT - 1, **across(axes))
        elif dot.kind:
            _dot(axes, dot, y)
    _marks(axes, marks or {})
    edges = [v for dot in dots for v in (dot.value, dot.low, dot.high) if v is not None]
    _limits(axes, [*edges, *(marks or {}).values()])
    axes.set_ylim(heights[-1] - ROW / 2, ROW / 2)
    sides = {True: f"{axis} · better →", False: f"← better · {axis}", None: axis}
    axes.set_xlabel(sides[higher], color=INK)
    return svg(plot, title)


@style()
def strips(rows: Sequence[Strip], *, title: str, axis: str, most: int = MOST_TICKS) -> str:
    """Item scores of suspects above controls, one pair of rows per variant.

    Long groups are thinned to `most` evenly spaced order statistics. The tick across both rows is
    the controls' 95th percentile: the share of suspects right of it is the TPR at 5 % FPR."""
    if not rows:
        return ""
    left, right, step = _label_width([row.name for row in rows]), 96.0, 34.0
    plot, axes = canvas(400.0, left, right, top=8.0, bottom=40.0, inner=len(rows) * step)
    for i, row in enumerate(rows):
        y = -i * step
        _name(axes, row.name, row.kind, y)
        for scores, colour, offset in ((row.suspects, SEEN, 6.5), (row.controls, UNSEEN, -6.5)):
            if len(scores):
                _rug(axes, scores, y + offset, colour, most)
        if len(row.controls):
            edge = float(
                np.quantile(np.asarray(row.controls, dtype=np.float64), 0.95, method="higher")
            )
            axes.plot([edge, edge], [y - 13, y + 13], color=INK, lw=0.9, ls=(0, (2, 1.5)))
        weight, colour = ("bold", SEEN) if row.flagged else ("normal", SOFT)
        axes.text(1.02, y, row.label, color=colour, fontweight=weight, **across(axes))
        if i:
            axes.axhline(y + step / 2, color=LIGHT["line"], lw=0.5)
    _limits(axes, [float(s) for row in rows for s in (*row.suspects, *row.controls)])
    axes.set_ylim(-(len(rows) - 0.5) * step, step / 2)
    axes.set_xlabel(axis, color=INK)
    return svg(plot, title)


@style()
def heat_map(
    cells: Sequence[Cell],
    *,
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    blocks: Sequence[tuple[str, int]],
) -> str:
    """Numbers in a grid, darker (on a dark screen lighter) where they are larger.

    `blocks` are headings with the number of columns under each. Cells of one shade are one path."""
    if not cells:
        return ""
    left = 12.0 + 0.58 * FONT * max(len(row) for row in rows)
    wide, high = CELL * len(columns), LINE * len(rows)
    plot, axes = canvas(left + wide + 6, left, 6.0, top=34.0, bottom=4.0, inner=high)
    axes.set_axis_off()
    axes.set_xlim(0, wide)
    axes.set_ylim(-high, 0)
    for shade in range(HEATS):
        _shade(axes, [cell for cell in cells if _level(cell) == shade], LIGHT[f"heat-{shade}"])
    for cell in cells:
        colour = INK if _level(cell) < DARK_TEXT_BELOW else PAPER
        x, y = CELL * (cell.first + cell.last + 1) / 2, -LINE * (cell.row + 0.5)
        axes.text(x, y, cell.text, color=colour, fontsize=8.5, ha="center", va="center")
    for i, row in enumerate(rows):
        y = -LINE * (i + 0.5)
        axes.text(-6, y, row, color=SOFT, fontsize=FONT - 1.5, ha="right", va="center")
    for i, column in enumerate(columns):
        axes.text(CELL * (i + 0.5), 4, column, color=SOFT, fontsize=8.5, ha="center")
    _block_heads(axes, blocks)
    return svg(plot, title)


def _shade(axes: Any, cells: Sequence[Cell], colour: str) -> None:
    """All cells of one shade, as one path with a small gap between cells."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    if not cells:
        return
    corners = []
    for cell in cells:
        x0, x1 = CELL * cell.first + 0.6, CELL * (cell.last + 1) - 0.6
        y0, y1 = -LINE * (cell.row + 1) + 0.6, -LINE * cell.row - 0.6
        corners += [(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)]
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * len(cells)
    axes.add_patch(PathPatch(Path(corners, codes), fc=colour, ec="none", lw=0))


def _level(cell: Cell) -> int:
    return min(int(min(max(cell.strength, 0.0), 1.0) * HEATS), HEATS - 1)


def _block_heads(axes: Any, blocks: Sequence[tuple[str, int]]) -> None:
    start = 0
    for name, count in blocks:
        room = max(int(CELL * count / (0.6 * FONT)), 1)
        middle = CELL * (start + count / 2)
        text = short(name, room)
        axes.text(middle, 19, text, color=INK, fontweight="bold", fontsize=FONT - 1, ha="center")
        if start:
            axes.axvline(CELL * start, color=LIGHT["rule"], lw=0.8)
        start += count


def _dot(axes: Any, dot: Dot, y: float) -> None:
    colour = LIGHT[dot.kind]
    if dot.low is not None and dot.high is not None:
        axes.plot([dot.low, dot.high], [y, y], color=colour, lw=1.7, solid_capstyle="butt")
    face = colour if dot.filled else PAPER
    size, edge = (8.4, 0.6) if dot.kind == "bad" else (6.6, 1.3)
    axes.plot([dot.value], [y], MARKER[dot.kind], ms=size, mec=colour, mfc=face, mew=edge)
    axes.text(1.03, y, dot.note, color=INK, fontsize=FONT - 0.5, **across(axes))


def _marks(axes: Any, marks: Mapping[str, float]) -> None:
    """Named vertical lines; the names of two lines turn away from each other."""
    ordered = sorted(marks.items(), key=lambda mark: mark[1])
    sides = ["center"] if len(ordered) == 1 else ["right", "left"]
    for (name, value), side in zip(ordered, sides, strict=False):
        dashes = ":" if name == "chance" else "--"
        axes.axvline(value, color=LIGHT["rule"], lw=0.9, ls=dashes, zorder=0)
        place = {"xy": (value, 1.0), "xycoords": axes.get_xaxis_transform()}
        above = {"xytext": (0, 4), "textcoords": "offset points", "annotation_clip": False}
        axes.annotate(name, **place, **above, ha=side, color=SOFT, fontsize=FONT - 1)


def _rug(axes: Any, scores: Sequence[float], y: float, colour: str, most: int) -> None:
    """Ticks for the items and a dot at the median, as one path."""
    values = np.sort(np.asarray(scores, dtype=np.float64))
    median = float(np.median(values))
    if len(values) > most:
        values = values[np.linspace(0, len(values) - 1, most).round().astype(int)]
    x = np.repeat(values, 3)
    x[2::3] = np.nan
    ticks = np.tile([y - 4.5, y + 4.5, np.nan], len(values))
    axes.plot(x, ticks, color=colour, lw=0.7, alpha=0.5)
    axes.plot([median], [y], "o", ms=5, mfc=colour, mec=PAPER, mew=1.0)


def _heights(dots: Sequence[Dot]) -> list[float]:
    """Heights of the rows, with a small gap where the kind changes (headings: before them)."""
    heights, y = [], 0.0
    for i, dot in enumerate(dots):
        if i:
            before = dots[i - 1].kind
            own = dot.kind in ("", "base", "expert", "merge") and before and dot.kind != before
            y -= ROW + (6.0 if own else 0.0)
        heights.append(y)
    return heights


def _limits(axes: Any, values: Sequence[float]) -> None:
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    margin = 0.06 * (high - low) or 0.5
    axes.set_xlim(low - margin, high + margin)


def _row_label(axes: Any, dot: Dot, y: float, left: float) -> None:
    if dot.kind:
        _name(axes, dot.name, dot.kind, y)
    else:
        text = axes.text(-left, y, short(dot.name, 44), bbox=BLANK, **across(axes))
        text.set(fontweight="bold", fontsize=FONT - 1)


def _name(axes: Any, name: str, kind: str, y: float) -> None:
    colour = LIGHT[kind] if kind in ("base", "expert", "merge") else INK
    axes.text(-0.03, y, short(name, LONGEST), color=colour, ha="right", **across(axes))


def _label_width(names: Sequence[str]) -> float:
    longest = max((min(len(clean(name)), LONGEST) for name in names), default=4)
    return 16.0 + 0.58 * FONT * longest
