"""The merge recipe of a published model: its mergekit_config.yml, or the YAML in its card."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from mergelab.claims.entries import Notes
from mergelab.claims.numbers import PlainLoader
from mergelab.errors import UserError
from mergelab.yamlfile import Map, parse

LONGEST = 100_000  # characters of a recipe
MOST_BLOCKS = 20  # of a card that are tried
MARKS = ("merge_method", "experts")  # one of these makes a mapping a recipe; experts: of a MoE
_FENCE = re.compile(r"\s{0,8}(`{3,}|~{3,})\s*(\w*)")
_START = re.compile(
    r"\s{0,8}(slices|models|modules|merge_method|base_model|gate_mode|experts|name) *:"
)
_INSIDE = re.compile(r"\w[\w-]* *:|[ \t#-]|\Z")


def find_recipe(lines: Sequence[str], first: int, config: str | None, notes: Notes) -> str | None:
    """The text of the recipe, or None; `config` (of mergekit_config.yml) goes before the card."""
    if config is not None:
        why = why_not(config)
        if why is None:
            return config
        notes.found[f"mergekit_config.yml: is no recipe: {why}"] = None
    for count, (line, text, fenced) in enumerate(_blocks(lines)):
        if count == MOST_BLOCKS:
            notes.add(first + line, f"only the first {MOST_BLOCKS} blocks were tried as recipes.")
            return None
        why = why_not(text)
        if why is None:
            return text
        if fenced and any(f"{mark}:" in text for mark in MARKS):
            notes.add(first + line, f"looks like a recipe, but is none: {why}")
    return None


def why_not(text: str) -> str | None:
    """Why a text is no recipe, or None if it is one. Only its form is looked at."""
    if len(text) > LONGEST:
        return f"it is longer than {LONGEST:,} characters."
    try:
        top = parse(text, Path("recipe"), PlainLoader)
    except UserError as error:
        return str(error)[:300]
    if not any(isinstance(top, Map) and key in top for key in MARKS):
        return f"it has neither '{MARKS[0]}' nor '{MARKS[1]}'."
    return None


def _blocks(lines: Sequence[str]) -> Iterator[tuple[int, str, bool]]:
    """(line, text, fenced) of YAML fences, then of loose text that begins as a recipe does."""
    outside, mark, kind, start = [], "", "", 0
    for number, line in enumerate(lines):
        fence = _FENCE.match(line[:200])
        if not mark and fence:
            mark, kind, start = fence[1], fence[2].lower(), number + 1
        elif not mark:
            outside.append(number)
        elif fence and fence[1].startswith(mark) and not fence[2]:
            if kind in ("yaml", "yml", ""):
                yield start, _text(lines[start:number]), True
            mark = ""
    yield from _loose(lines, outside)


def _loose(lines: Sequence[str], outside: Sequence[int]) -> Iterator[tuple[int, str, bool]]:
    """Runs of lines outside all fences that look like YAML: as a whole, or to a blank line."""
    end = 0
    for number in outside:
        if number < end or not _START.match(lines[number][:200]):
            continue
        end = number + 1
        while end < len(lines) and _INSIDE.match(lines[end][:200]):
            end += 1
        while not lines[end - 1].strip() or lines[end - 1].startswith("#"):
            end -= 1  # headings look like comments
        blank = next((n for n in range(number, end) if not lines[n].strip()), end)
        for stop in dict.fromkeys((end, blank)):
            yield number, _text(lines[number:stop]), False


def _text(lines: Sequence[str]) -> str:
    return textwrap.dedent("\n".join(lines)).strip() + "\n"
