"""How every picture of the reports is drawn: with matplotlib, written as one lean SVG element.

The same bytes every time; text stays text (searchable, read aloud); colours are named by role
(`var(--ink)`), so the page decides what they are on a light or a dark screen (palette.py)."""

from __future__ import annotations

import hashlib
import html
import io
import re
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mergelab.palette import LIGHT

FONT = 11.0
POINTS_PER_INCH = 72.0
ENLARGED = 1.2  # px per point where the screen has room
ROLES = {colour: f"var(--{role})" for role, colour in LIGHT.items()}
BLANK = {"fc": LIGHT["paper"], "ec": "none", "pad": 1.0}
BIDI = {*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C}


@contextmanager
def style() -> Iterator[None]:
    """Fonts and sizes of these pages, and nothing from the user's matplotlibrc.

    A letter that matplotlib's font lacks is no matter: the reader's browser draws the text."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        for message in ("Glyph .* missing", "Matplotlib currently does not support"):
            warnings.filterwarnings("ignore", message, UserWarning)
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": "mergelab",
                "font.family": "DejaVu Sans",
                "font.size": FONT,
                "text.color": LIGHT["ink"],
                "text.parse_math": False,
            }
        )
        yield


def canvas(
    width: float, left: float, right: float, *, top: float, bottom: float, inner: float
) -> tuple[Any, Any]:
    """A figure `width` points wide with one bare axes `inner` points high."""
    from matplotlib.figure import Figure

    height = top + inner + bottom
    figure = Figure(figsize=(width / POINTS_PER_INCH, height / POINTS_PER_INCH))
    axes = figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, inner / height)
    )
    axes.patch.set_visible(False)
    axes.set_yticks([])
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(LIGHT["rule"])
    axes.tick_params(axis="x", color=LIGHT["rule"], labelcolor=LIGHT["soft"], labelsize=FONT - 1)
    axes.locator_params(axis="x", nbins=5)
    return figure, axes


def across(axes: Any) -> dict[str, Any]:
    """Horizontal position as a share of the axes, vertical position in the data's units."""
    return {"transform": axes.get_yaxis_transform(), "va": "center"}


def clean(text: str) -> str:
    """Without what could turn the neighbouring text around or cannot be written as UTF-8.

    Controls (but tab and newline), surrogates and marks of direction become U+FFFD; the joiners
    of emoji and of Persian stay."""
    return "".join("\ufffd" if _disturbs(char) else char for char in text)


def _disturbs(char: str) -> bool:
    if char in "\t\n":
        return False
    return ord(char) in BIDI or unicodedata.category(char) in ("Cc", "Cs", "Co")


def short(text: str, most: int) -> str:
    """At most `most` characters, with an ellipsis for what is left out."""
    told = clean(" ".join(text.split()))
    return told if len(told) <= most else told[: most - 1] + "…"


def svg(figure: Any, title: str) -> str:
    """The figure as an <svg> element: no prologue, date, outside name or clashing id."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    head = re.search(r'<svg[^>]*viewBox="0 0 ([0-9.]+) ([0-9.]+)"[^>]*>', text)
    assert head is not None
    body = _lean(text[head.end() :])
    key = hashlib.sha256(body.encode()).hexdigest()[:8]
    body = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{key}-", body)
    name = html.escape(clean(title), quote=True)
    own = float(head.group(1))
    wide = f"--own:{own:.0f}px;max-width:{own * ENLARGED:.0f}px"
    size = f'viewBox="0 0 {head.group(1)} {head.group(2)}"'
    return f'<svg {size} role="img" aria-label="{name}" style="{wide}">{body.strip()}'


def _lean(body: str) -> str:
    """An SVG's content in a third of the bytes: what changes nothing in the picture is dropped."""
    body = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.S)
    body = re.sub(r"<[^>]*>", lambda tag: _lean_tag(tag.group()), body)
    body = re.sub(r">\s+<", "><", body)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda m: m.group() if m.group(1) in used else "", body)
    body = re.sub(r"<g>(<(?:text|path|use)[^>]*(?:/>|>[^<]*</text>))</g>", r"\1", body)
    return body.replace("<g></g>", "").replace("<defs></defs>", "")


def _lean_tag(tag: str) -> str:
    tag = tag.replace("xlink:href", "href")
    tag = re.sub(r"font-family: [^;\"]*;? ?", "", tag)
    tag = re.sub(r' transform="rotate\(-?0 [^"]*"', "", tag)
    tag = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number.group()):.2f}", tag)
    tag = re.sub(r"\s*\n\s*", " " if tag.startswith("<svg") else "", tag)
    tag = re.sub(r"M (\S+) (\S+) ?L \1 (\S+?) ?(?=[Mz\"])", r"M\1 \2V\3", tag)
    tag = re.sub(r" ?([MLCQ]) ", r"\1", tag)
    return re.sub(r"#[0-9a-f]{6}\b", lambda colour: ROLES.get(colour.group(), colour.group()), tag)
