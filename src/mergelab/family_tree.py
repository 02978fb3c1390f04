"""The picture of a lineage: left to right, parents before children, ways of taint in bold.

Columns are the longest way from a root. An arrow over several columns gets a lane in each column
between, so that no arrow runs behind a box; columns are ordered by the mean height of what their
items are tied to, a few times to and fro (Sugiyama, Tagawa and Toda 1981)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mergelab.drawing import BLANK, FONT, canvas, short, style, svg
from mergelab.figures import MARKER
from mergelab.palette import LIGHT

WIDTH, GAP, LINE = 178.0, 84.0, 13.0
BETWEEN, LANE = 14.0, 12.0  # between two boxes; the height of a lane
RUN = 40.0  # the straight end of an arrow, where its label stands
SWEEPS = 4


@dataclass(frozen=True)
class Box:
    """One node; `lines` stand under the name, `tainted` gives the frame."""

    name: str
    kind: str
    lines: Sequence[str]
    tainted: bool


@dataclass(frozen=True)
class Arrow:
    """One edge, `kind` train, merge or base (where task vectors start)."""

    parent: str
    child: str
    kind: str
    label: str
    tainted: bool = False


Item = tuple[str, int]  # a box, or the lane of a parent's arrows: name, column
Places = Mapping[Item, tuple[float, float]]  # left edge and middle of each item


@style()
def family_tree(boxes: Sequence[Box], arrows: Sequence[Arrow], *, title: str) -> str:
    """Boxes and arrows; frames, words and thick arrows mark what is tainted.

    An arrow whose ends are not both among the boxes is left out."""
    if not boxes:
        return ""
    names = {box.name for box in boxes}
    arrows = [a for a in arrows if {a.parent, a.child} <= names and a.parent != a.child]
    columns = _columns(boxes, arrows)
    ways = {arrow: _way(arrow, columns) for arrow in arrows}
    height = 26.0 + LINE * max(len(_lines(box)) for box in boxes)
    places = _places(_ordered(columns, ways.values()), columns, height)
    right = max(x for x, _ in places.values()) + WIDTH
    bottom = min(y for _, y in places.values()) - height / 2
    plot, axes = canvas(right + 8, 4.0, 4.0, top=4.0, bottom=4.0, inner=-bottom)
    axes.set_axis_off()
    axes.set_xlim(0, right)
    axes.set_ylim(bottom, 0)
    ports = _ports(ways, places, height)
    for arrow in sorted(arrows, key=lambda arrow: arrow.tainted):
        _arrow(axes, arrow, [places[item] for item in ways[arrow]], ports[arrow])
    for box in boxes:
        x, middle = places[box.name, columns[box.name]]
        _box(axes, box, (x, middle + height / 2), height)
    return svg(plot, title)


def _lines(box: Box) -> list[str]:
    """The owner of a hub id, and the notes."""
    owner, slash, _ = box.name.rpartition("/")
    return [*([f"{owner}/"] if slash else []), *box.lines]


def _box(axes: Any, box: Box, place: tuple[float, float], height: float) -> None:
    from matplotlib.patches import FancyBboxPatch

    x, y = place
    edge = LIGHT["seen"] if box.tainted else LIGHT[box.kind]
    frame = FancyBboxPatch(
        (x + 1, y - height + 1),
        WIDTH - 2,
        height - 2,
        boxstyle="square,pad=0",
        fc=LIGHT["taint"] if box.tainted else LIGHT["paper"],
        ec=edge,
        lw=2.2 if box.tainted else 1.2,
    )
    axes.add_patch(frame)
    axes.plot([x + 12], [y - 13.5], MARKER[box.kind], ms=6, color=LIGHT[box.kind])
    name = short(box.name.rpartition("/")[2] or box.name, 22)
    axes.text(x + 22, y - 13.5, name, va="center", fontweight="bold", fontsize=FONT - 0.5)
    for i, line in enumerate(_lines(box)):
        colour = LIGHT["soft"] if line.endswith("/") else LIGHT["ink"]
        place = (x + 8, y - 28 - LINE * i)
        axes.text(*place, short(line, 30), va="center", color=colour, fontsize=FONT - 1.5)


def _arrow(axes: Any, arrow: Arrow, points: Sequence[tuple[float, float]], port: float) -> None:
    """Curves from column to column, along the lanes, and a straight end where the label stands."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    corners, codes = [(points[0][0] + WIDTH, points[0][1])], [Path.MOVETO]
    for x, y in points[1:]:
        last, lane = corners[-1], (x, y) != points[-1]
        end = (x, y) if lane else (x - RUN, port)
        middle = (last[0] + end[0]) / 2
        straight = (x + WIDTH, y) if lane else (x - 3, port)
        corners += [(middle, last[1]), (middle, end[1]), end, straight]
        codes += [Path.CURVE4, Path.CURVE4, Path.CURVE4, Path.LINETO]
    colour, wide = (LIGHT["seen"], 2.6) if arrow.tainted else (LIGHT["soft"], 1.1)
    dashes = ":" if arrow.kind == "base" else "-"
    curve = PathPatch(Path(corners, codes), fc="none", ec=colour, lw=wide, ls=dashes, zorder=0)
    axes.add_patch(curve)
    x = points[-1][0]
    axes.plot([x - 4], [port], ">", ms=3.4 + wide, color=colour, mew=0, zorder=1)
    if arrow.label:
        text = axes.text(x - 24, port, short(arrow.label, 7), bbox=BLANK)
        text.set(ha="center", va="center", fontsize=FONT - 1.5)


def _columns(boxes: Sequence[Box], arrows: Sequence[Arrow]) -> dict[str, int]:
    """The longest way from a root; a cycle ends at the last column that there can be."""
    depth = {box.name: 0 for box in boxes}
    for _ in boxes:
        for arrow in arrows:
            further = min(depth[arrow.parent] + 1, len(boxes) - 1)
            depth[arrow.child] = max(depth[arrow.child], further)
    ranks = {column: rank for rank, column in enumerate(sorted({*depth.values()}))}
    return {name: ranks[column] for name, column in depth.items()}


def _way(arrow: Arrow, columns: Mapping[str, int]) -> list[Item]:
    """Parent, the parent's lanes in the columns between, child."""
    first, last = columns[arrow.parent], columns[arrow.child]
    lanes = [(arrow.parent, column) for column in range(first + 1, last)]
    return [(arrow.parent, first), *lanes, (arrow.child, last)]


def _ordered(columns: Mapping[str, int], ways: Iterable[Sequence[Item]]) -> list[list[Item]]:
    """The items of each column from top to bottom."""
    boxes = [(name, column) for name, column in columns.items()]
    found = dict.fromkeys([*boxes, *(item for way in ways for item in way)])
    order = [[i for i in found if i[1] == column] for column in sorted({c for _, c in found})]
    tied: dict[Item, list[Item]] = {item: [] for item in found}
    for left, right in dict.fromkeys(pair for way in ways for pair in pairwise(way)):
        tied[left].append(right)
        tied[right].append(left)
    for sweep in range(SWEEPS):
        step = 1 if sweep % 2 == 0 else -1
        for column in range(len(order))[::step]:
            _settle(order, column, tied, column - step)
    return order


def _settle(
    order: list[list[Item]], column: int, tied: Mapping[Item, Sequence[Item]], beside: int
) -> None:
    """Sort a column by the mean place of what its items are tied to in the column beside it."""
    if not 0 <= beside < len(order):
        return
    place = {item: i / len(order[beside]) for i, item in enumerate(order[beside])}
    own = {item: i / len(order[column]) for i, item in enumerate(order[column])}
    for item in order[column]:
        others = [place[other] for other in tied[item] if other in place]
        own[item] = sum(others) / len(others) if others else own[item]
    order[column].sort(key=lambda item: own[item])


def _places(order: Sequence[Sequence[Item]], columns: Mapping[str, int], height: float) -> Places:
    """Left edge and middle of each item, every column centred."""

    def tall(item: Item) -> float:
        return height if columns.get(item[0]) == item[1] else LANE

    totals = [sum(tall(i) for i in column) + BETWEEN * (len(column) - 1) for column in order]
    places: dict[Item, tuple[float, float]] = {}
    for i, column in enumerate(order):
        y = -(max(totals) - totals[i]) / 2
        for item in column:
            places[item] = (i * (WIDTH + GAP), y - tall(item) / 2)
            y -= tall(item) + BETWEEN
    return places


def _ports(
    ways: Mapping[Arrow, Sequence[Item]], places: Places, height: float
) -> dict[Arrow, float]:
    """The height at which each arrow enters its child: in the order of where it comes from."""
    ports: dict[Arrow, float] = {}
    for child in dict.fromkeys(way[-1] for way in ways.values()):
        entering = [arrow for arrow, way in ways.items() if way[-1] == child]
        entering.sort(key=lambda arrow: -places[ways[arrow][-2]][1])
        for i, arrow in enumerate(entering):
            share = (i + 1) / (len(entering) + 1)
            ports[arrow] = places[child][1] + height * (0.5 - share)
    return ports
