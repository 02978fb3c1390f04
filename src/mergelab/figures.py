"""The report's pictures: plain numbers in, one SVG string out, the same bytes every time.

Text stays text (searchable, read aloud), colours are Okabe and Ito's, and nothing is said by
colour alone: kinds differ by marker, groups by position, flags by words."""

from __future__ import annotations

import hashlib
import html
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

INK, SOFT, FAINT = "#222222", "#6b6b6b", "#d9d9d9"
SEEN, UNSEEN = "#D55E00", "#8a8a8a"
COLOUR = {"base": "#5f5f5f", "expert": "#0072B2", "merge": "#009E73"}
MARKER = {"base": "s", "expert": "o", "merge": "D"}
FONT = 10.0
ROW = 21.0
MOST_TICKS = 300
BLANK = {"fc": "white", "ec": "none", "pad": 1.0}
POINTS_PER_INCH = 72.0


@dataclass(frozen=True)
class Dot:
    """One row of a score panel; `value` None means not measured, `settled` differs from base."""

    name: str
    kind: str
    value: float | None
    low: float | None
    high: float | None
    settled: bool


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
class Box:
    """One node of the lineage picture; `lines` under the name, `tainted` gives the frame."""

    name: str
    kind: str
    lines: Sequence[str]
    tainted: bool


@dataclass(frozen=True)
class Arrow:
    """One edge of the lineage picture, `kind` train, merge or base (where task vectors start)."""

    parent: str
    child: str
    kind: str
    label: str


@contextmanager
def _style() -> Iterator[None]:
    """Fonts and sizes of this page, and nothing from the user's matplotlibrc."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": "mergelab",
                "font.family": "DejaVu Sans",
                "font.size": FONT,
                "text.parse_math": False,
            }
        )
        yield


@_style()
def score_panel(
    dots: Sequence[Dot], *, title: str, axis: str, higher: bool | None, chance: float | None
) -> str:
    """Variants as rows, values with 95 % intervals, a line at the base (and at chance).

    `higher` is better, or worse, or (None) neither."""
    if not dots:
        return ""
    left, right = _label_width(dots), 46.0
    heights = _rows(dots)
    plot, axes = _canvas(360.0, left, right, top=18.0, bottom=38.0, inner=-heights[-1] + ROW)
    known = [d for d in dots if d.value is not None]
    for dot, y in zip(dots, heights, strict=True):
        _row_label(axes, dot.name, dot.kind, y)
        if dot.value is None:
            axes.text(0.02, y, "not measured", va="center", bbox=BLANK, **_across(axes))
        else:
            _dot(axes, dot, y)
    base = next((d.value for d in known if d.kind == "base"), None)
    if base is not None:
        side = "center" if chance is None else "left" if base >= chance else "right"
        _mark(axes, base, "base", "--", side)
    if chance is not None:
        side = "center" if base is None else "right" if base >= chance else "left"
        _mark(axes, chance, "chance", ":", side)
    _limits(axes, [v for d in known for v in (d.low, d.high, chance, base) if v is not None])
    axes.set_ylim(heights[-1] - ROW / 2, ROW / 2)
    sides = {True: f"{axis} · better →", False: f"← better · {axis}", None: axis}
    axes.set_xlabel(sides[higher], color=INK)
    return _svg(plot, title)


@_style()
def strips(rows: Sequence[Strip], *, title: str, axis: str) -> str:
    """Item scores of suspects above controls, one pair of rows per variant.

    Long groups are thinned to evenly spaced order statistics. The tick across both rows is the
    controls' 95th percentile: the share of suspects right of it is the TPR at 5 % FPR."""
    if not rows:
        return ""
    left, right, step = _label_width(rows), 96.0, 34.0
    plot, axes = _canvas(420.0, left, right, top=8.0, bottom=38.0, inner=len(rows) * step)
    for i, row in enumerate(rows):
        y = -i * step
        _row_label(axes, row.name, row.kind, y)
        for scores, colour, offset in ((row.suspects, SEEN, 6.5), (row.controls, UNSEEN, -6.5)):
            if len(scores):
                _rug(axes, scores, y + offset, colour)
        if len(row.controls):
            edge = float(
                np.quantile(np.asarray(row.controls, dtype=np.float64), 0.95, method="higher")
            )
            axes.plot([edge, edge], [y - 13, y + 13], color=INK, lw=0.9, ls=(0, (2, 1.5)))
        weight, colour = ("bold", SEEN) if row.flagged else ("normal", SOFT)
        axes.text(1.02, y, row.label, color=colour, fontweight=weight, va="center", **_across(axes))
        if i:
            axes.axhline(y + step / 2, color=FAINT, lw=0.5)
    _limits(axes, [float(s) for row in rows for s in (*row.suspects, *row.controls)])
    axes.set_ylim(-(len(rows) - 0.5) * step, step / 2)
    axes.set_xlabel(axis, color=INK)
    return _svg(plot, title)


@_style()
def lineage(boxes: Sequence[Box], arrows: Sequence[Arrow], *, title: str) -> str:
    """Left to right, parents before children; frames and words mark tainted models."""
    if not boxes:
        return ""
    width, gap = 164.0, 92.0
    height = 20.0 + 13.0 * max((len(box.lines) for box in boxes), default=0)
    places = _places(boxes, arrows, width + gap, height + 16.0)
    right = max((x for x, _ in places.values()), default=0.0) + width
    bottom = min((y for _, y in places.values()), default=0.0) - height
    plot, axes = _canvas(right + 8, 4.0, 4.0, top=4.0, bottom=4.0, inner=-bottom)
    axes.set_axis_off()
    axes.set_xlim(0, right)
    axes.set_ylim(bottom, 0)
    ports = _ports(arrows, places, height)
    for arrow in arrows:
        _arrow(axes, arrow, places, ports[arrow], width, height)
    for box in boxes:
        _box(axes, box, places[box.name], width, height)
    return _svg(plot, title)


def _dot(axes: Any, dot: Dot, y: float) -> None:
    colour = COLOUR[dot.kind]
    if dot.low is not None and dot.high is not None:
        axes.plot([dot.low, dot.high], [y, y], color=colour, lw=1.6, solid_capstyle="butt")
    filled = dot.settled or dot.kind == "base"
    face = colour if filled else "white"
    axes.plot([dot.value], [y], MARKER[dot.kind], ms=6.2, mec=colour, mfc=face, mew=1.3)
    axes.text(1.03, y, f"{dot.value:.3f}", va="center", color=INK, **_across(axes))


def _mark(axes: Any, value: float, name: str, style: str, side: str = "center") -> None:
    axes.axvline(value, color=SOFT, lw=0.9, ls=style, zorder=0)
    transform = axes.get_xaxis_transform()
    axes.text(value, 1.02, name, transform=transform, ha=side, color=SOFT, fontsize=FONT - 1)


def _rug(axes: Any, scores: Sequence[float], y: float, colour: str) -> None:
    """Ticks for the items and a dot at the median, as one path."""
    values = np.sort(np.asarray(scores, dtype=np.float64))
    median = float(np.median(values))
    if len(values) > MOST_TICKS:
        values = values[np.linspace(0, len(values) - 1, MOST_TICKS).round().astype(int)]
    x = np.repeat(values, 3)
    x[2::3] = np.nan
    ticks = np.tile([y - 4.5, y + 4.5, np.nan], len(values))
    axes.plot(x, ticks, color=colour, lw=0.7, alpha=0.5)
    axes.plot([median], [y], "o", ms=5, mfc=colour, mec="white", mew=1.0)


def _box(axes: Any, box: Box, place: tuple[float, float], width: float, height: float) -> None:
    from matplotlib.patches import FancyBboxPatch

    x, y = place
    edge, face = (SEEN, "#FDEBDD") if box.tainted else (COLOUR[box.kind], "white")
    frame = FancyBboxPatch(
        (x + 1, y - height + 1),
        width - 2,
        height - 2,
        boxstyle="square,pad=0",
        fc=face,
        ec=edge,
        lw=2.0 if box.tainted else 1.2,
    )
    axes.add_patch(frame)
    axes.plot([x + 11], [y - 11.5], MARKER[box.kind], ms=5.5, color=COLOUR[box.kind])
    name = _short(box.name, 22)
    axes.text(x + 20, y - 11.5, name, va="center", fontweight="bold", color=INK)
    for i, line in enumerate(box.lines):
        text = _short(line, 30)
        axes.text(x + 7, y - 25 - 13 * i, text, va="center", color=INK, fontsize=FONT - 1.2)


def _arrow(
    axes: Any,
    arrow: Arrow,
    places: dict[str, tuple[float, float]],
    port: float,
    width: float,
    height: float,
) -> None:
    """A curve that ends in a straight run of 44 points, where the label stands."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    start = (places[arrow.parent][0] + width, places[arrow.parent][1] - height / 2)
    end = (places[arrow.child][0], places[arrow.child][1] - port)
    bend = end[0] - 44
    middle = (start[0] + bend) / 2
    points = [start, (middle, start[1]), (middle, end[1]), (bend, end[1]), (end[0] - 3, end[1])]
    curve = Path(points, [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4, Path.LINETO])
    style = ":" if arrow.kind == "base" else "-"
    axes.add_patch(PathPatch(curve, fc="none", ec=SOFT, lw=1.1, ls=style, zorder=0))
    axes.plot([end[0] - 4], [end[1]], ">", ms=4.5, color=SOFT, mew=0, zorder=1)
    if arrow.label:
        text = axes.text(end[0] - 26, end[1], _short(arrow.label, 8), color=INK, bbox=BLANK)
        text.set(ha="center", va="center", fontsize=FONT - 1)


def _places(
    boxes: Sequence[Box], arrows: Sequence[Arrow], across: float, down: float
) -> dict[str, tuple[float, float]]:
    """Upper left corner of each box: the column is the longest way from a root."""
    depth = {box.name: 0 for box in boxes}
    for _ in boxes:
        for arrow in arrows:
            depth[arrow.child] = max(depth[arrow.child], min(depth[arrow.parent] + 1, len(boxes)))
    columns = [[b.name for b in boxes if depth[b.name] == d] for d in sorted({*depth.values()})]
    tallest = max((len(column) for column in columns), default=0)
    return {
        name: (i * across, -((tallest - len(column)) / 2 + j) * down)
        for i, column in enumerate(columns)
        for j, name in enumerate(column)
    }


def _ports(
    arrows: Sequence[Arrow], places: dict[str, tuple[float, float]], height: float
) -> dict[Arrow, float]:
    """Where each arrow enters its child, from the child's upper edge, by its parent."""
    ports: dict[Arrow, float] = {}
    for child in places:
        entering = sorted(
            (a for a in arrows if a.child == child), key=lambda a: -places[a.parent][1]
        )
        for i, arrow in enumerate(entering):
            ports[arrow] = height * (i + 1) / (len(entering) + 1)
    return ports


def _rows(dots: Sequence[Dot]) -> list[float]:
    """Heights of the rows, with a small gap between base, experts and merges."""
    heights, y = [], 0.0
    for i, dot in enumerate(dots):
        if i:
            y -= ROW + (6.0 if dot.kind != dots[i - 1].kind else 0.0)
        heights.append(y)
    return heights


def _limits(axes: Any, values: Sequence[float]) -> None:
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    margin = 0.06 * (high - low) or 0.5
    axes.set_xlim(low - margin, high + margin)


def _row_label(axes: Any, name: str, kind: str, y: float) -> None:
    place = {"transform": axes.get_yaxis_transform(), "va": "center", "ha": "right"}
    axes.text(-0.03, y, _short(name, 24), color=COLOUR[kind], **place)


def _across(axes: Any) -> dict[str, Any]:
    """Horizontal position as a share of the axes, vertical position in rows."""
    return {"transform": axes.get_yaxis_transform()}


def _short(text: str, most: int) -> str:
    clean = "".join(c if c.isprintable() else "?" for c in text)
    return clean if len(clean) <= most else clean[: most - 1] + "…"


def _label_width(rows: Sequence[Dot] | Sequence[Strip]) -> float:
    longest = max((min(len(row.name), 24) for row in rows), default=4)
    return 16.0 + 0.62 * FONT * longest


def _canvas(
    width: float, left: float, right: float, *, top: float, bottom: float, inner: float
) -> tuple[Any, Any]:
    """A figure `width` points wide with one bare axes `inner` points high."""
    from matplotlib.figure import Figure

    height = top + inner + bottom
    figure = Figure(figsize=(width / POINTS_PER_INCH, height / POINTS_PER_INCH))
    axes = figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, inner / height)
    )
    axes.set_yticks([])
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(SOFT)
    axes.tick_params(axis="x", colors=SOFT, labelsize=FONT - 1)
    axes.locator_params(axis="x", nbins=5)
    return figure, axes


def _svg(figure: Any, title: str) -> str:
    """The figure as an <svg> element: no prologue, date, outside name or clashing id."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    head = re.search(r"<svg[^>]*>", text)
    assert head is not None
    box = re.search(r'viewBox="0 0 ([0-9.]+) [0-9.]+"', head.group())
    assert box is not None
    body = re.sub(r"<metadata>.*?</metadata>", "", text[head.end() :], flags=re.DOTALL)
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    key = hashlib.sha256(body.encode()).hexdigest()[:8]
    body = body.replace(' id="', f' id="{key}-').replace("xlink:href", "href")
    body = body.replace('href="#', f'href="#{key}-').replace("url(#", f"url(#{key}-")
    name = html.escape(title, quote=True)
    wide = f"max-width:{float(box.group(1)) * 1.2:.0f}px"
    return f'<svg {box.group()} role="img" aria-label="{name}" style="{wide}">{body.strip()}'
