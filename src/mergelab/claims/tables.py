"""Score tables of a model card: Markdown tables, benchmarks across or down, or one per row."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mergelab.claims import names
from mergelab.claims.entries import Entry, Notes, first_items, percent_of
from mergelab.claims.numbers import Printed, read_number

MOST_ROWS = 500  # of one table
MOST_COLUMNS = 60
MOST_TABLES = 200
LONGEST_LINE = 20_000  # characters
# Columns that hold no score, in their compared form.
_NO_SCORE = re.compile(
    r"(params?|parameters|size|rank|#|version|filter|nshot|shots?|stderr|±|↑|↓|date|bits?|type"
    r"|licen[sc]e|link|model|models|name|notes?|seed|n|items?|samples?|file|quantmethod"
    r"|usecase|maxramrequired|downloads|likes|sha|precision|architecture|hyperparameter|epochs?"
    r"|steps?|tokens?|context|contextlength|layers?|task|tasks|metric|value|score|)\Z"
)
_INTERVAL = re.compile(r"\b(ci|intervals?|confidence)\b", re.I)  # "95 % CI" is no sign of percent
_VALUE = ("value", "score", "result", "results", "accuracy", "performance")
_OF_LM_EVAL = {"version", "metric", "value"}  # columns of the tables that it prints
_NAME = (
    *("task", "tasks", "groups", "benchmark", "benchmarks", "metric", "dataset", "datasets"),
    "eval",
)
_LINK = re.compile(r"!?\[([^\[\]]{0,200})\]\([^()\s]{0,500}\)")
_WORDS = re.compile(r"[\s,;:()\[\]]+")
_HEADING = re.compile(r"#{1,6}\s+(.{1,200})")
# What lm-eval says above a table.
_LIMIT = re.compile(r"\blimit: (None|\d{1,9}(?:\.\d{1,9})?), num_fewshot: ")


@dataclass(frozen=True)
class Table:
    """A Markdown table: `line` of its header, the heading above it, its cells as plain text.

    `split` names its items where lm-eval says above it that it took the first ones only."""

    line: int
    heading: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    split: str | None = None


def read_tables(lines: Sequence[str], first: int, notes: Notes) -> Iterator[Table]:
    """The tables among the lines of a card's body; `first` is the number of its first line."""
    heading, place, count = "", 0, 0
    split: str | None = None  # of the next table
    last: str | None = None  # of the table before
    lost = False  # has other text come since a limit was said?
    while place < len(lines):
        text = lines[place][:LONGEST_LINE]
        title = _HEADING.match(text)
        if title:
            heading, last = title[1].strip(), None
            split = None if lost else split
        if limit := _LIMIT.search(text):
            split, last, lost = first_items(float(limit[1].replace("None", "0"))), None, False
        elif text.strip() and not title and not text.startswith("```"):
            lost = True  # the limit was said of something else
        below = lines[place + 1] if place + 1 < len(lines) else ""
        if "|" not in text or not _is_rule(below):
            place += 1
            continue
        count += 1
        if count > MOST_TABLES:
            notes.add(first + place, f"only the first {MOST_TABLES} tables were read.")
            return
        end = place + 2
        while end < len(lines) and "|" in lines[end][:LONGEST_LINE]:
            end += 1
        table = _table(lines[place:end], first + place, heading, notes)
        if "groups" in map(_form, table.header):  # lm-eval prints it below that of its tasks
            split = split or last
        yield replace(table, split=split)
        split, last, place = None, split, end


def _is_rule(text: str) -> bool:
    return len(text) <= LONGEST_LINE and "-" in text and set(text) <= set("|-: \t\r")


def _table(lines: Sequence[str], line: int, heading: str, notes: Notes) -> Table:
    if len(lines) - 2 > MOST_ROWS:
        notes.add(line, f"only the first {MOST_ROWS} rows of this table were read.")
    rows = [_cells(text, line, notes) for text in (lines[0], *lines[2 : MOST_ROWS + 2])]
    return Table(line, heading, rows[0], tuple(rows[1:]))


def _cells(text: str, line: int, notes: Notes) -> tuple[str, ...]:
    """The cells of a row: links become their text; of marks and HTML nothing is interpreted."""
    if len(text) > LONGEST_LINE:
        notes.add(line, f"a row of this table was cut at {LONGEST_LINE:,} characters.")
    cells = re.split(r"(?<!\\)\|", text[:LONGEST_LINE].strip().removeprefix("|"))
    if cells and not cells[-1].strip():
        cells.pop()
    if len(cells) > MOST_COLUMNS:
        notes.add(line, f"only the first {MOST_COLUMNS} columns of this table were read.")
    return tuple(plain(cell) for cell in cells[:MOST_COLUMNS])


def plain(cell: str) -> str:
    """A cell's text without links, emphasis and code marks."""
    text = _LINK.sub(r"\1", _LINK.sub(r"\1", cell[:2_000]))
    return re.sub(r"\*+|`|~~|(?<!\w)__|__(?!\w)", "", text).strip()


def scores(table: Table, repo: str, group: str, notes: Notes) -> tuple[list[Entry], bool]:
    """The scores of the card's own model in one table, and whether the table is in percent.

    Nothing if it is no score table: none of its names is that of a known benchmark."""
    form = [_form(cell) for cell in table.header]
    title = next((place for place, name in enumerate(form) if name in _NAME), 0)
    if table.header and names.find(table.header[0]).known:  # no column of models
        rows = tuple((repo, *row) for row in table.rows)
        table = replace(table, header=("model", *table.header), rows=rows[:1])
        form, title = ["model", *form], 0
    across = sum(_is_benchmark(cell) for cell in table.header[1:])
    down = sum(_is_benchmark(row[title]) for row in table.rows if len(row) > title)
    if not across and not down and not set(form) >= _OF_LM_EVAL:
        return [], False
    if across > down:
        found, shares = _wide(table, repo, group, notes)
    else:
        found, shares = _long(table, form, title, repo, group, notes)
    heads = [cell for cell in table.header if not _INTERVAL.search(cell)]
    percent = any(re.search(r"%|per ?cent", cell, re.I) for cell in heads)
    found = [replace(entry, split=table.split) for entry in found]
    return found, percent or percent_of([*found, *shares])


def _is_benchmark(name: str) -> bool:
    found = names.find(name)
    return found.known and found.benchmark != names.AVERAGE


def _wide(table: Table, repo: str, group: str, notes: Notes) -> tuple[list[Entry], list[Entry]]:
    """One row per model, one column per benchmark: scores of the card's own model, and of all."""
    rows = [row for row in table.rows if any(read_number(cell) for cell in row[1:])]
    label = _own([row[0] for row in rows], repo, table.line, notes)
    row = next((row for row in rows if row[0] == label), ())
    line = table.line + 2 + (table.rows.index(row) if row else 0)
    board = names.board_of(table.heading, table.header)

    def entries(row: tuple[str, ...]) -> Iterator[Entry]:
        for name, cell in zip(table.header[1:], row[1:], strict=False):
            number = read_number(cell)
            if number is not None and not _NO_SCORE.match(_form(name)):
                yield Entry(name, number, line, board=board, group=group)

    every = [entry for row in rows for entry in entries(row) if _is_benchmark(entry.published)]
    return list(entries(row)), every


def _long(
    table: Table, form: list[str], title: int, repo: str, group: str, notes: Notes
) -> tuple[list[Entry], list[Entry]]:
    """One row per benchmark (and metric), one column per model or a single column of values."""
    rows = [(*row, *[""] * (len(form) - len(row))) for row in table.rows]
    value = next((place for place, name in enumerate(form) if name in _VALUE), None)
    models = [p for p, name in enumerate(form) if p != title and not _NO_SCORE.match(name)]
    if value is None:
        label = _own([table.header[place] for place in models], repo, table.line, notes)
        value = next((place for place in models if table.header[place] == label), None)
    elif "model" in form and form.index("model") != title:
        mine = _own([row[form.index("model")] for row in rows], repo, table.line, notes)
        rows = [row if row[form.index("model")] == mine else ("",) * len(row) for row in rows]
    board = names.board_of(table.heading, tuple(row[title] for row in rows))
    own: list[Entry] = []
    every: list[Entry] = []
    name = ""
    for line, row in enumerate(rows, table.line + 2):
        name = row[title] or name
        if not name or name.startswith("-"):  # "- anatomy": a part of the row above
            continue
        told: dict[str, str | None] = {
            key: row[form.index(key)] or None
            for key in ("metric", "filter", "nshot", "shots", "version")
            if key in form and form.index(key) != title
        }
        for place in dict.fromkeys((*([] if value is None else [value]), *models)):
            number = read_number(row[place])
            if number is not None:
                entry = _entry(name, number, line, told, board, group)
                (own if place == value else every).append(entry)
    return own, [entry for entry in every if _is_benchmark(entry.published)]


def _entry(
    name: str,
    number: Printed,
    line: int,
    told: dict[str, str | None],
    board: str | None,
    group: str,
) -> Entry:
    kind, shots = told.get("filter"), told.get("nshot") or told.get("shots") or ""
    return Entry(
        name,
        number,
        line,
        metric=told.get("metric"),
        filter=None if kind == "none" else kind,
        shots=int(shots) if re.fullmatch(r"\d{1,3}", shots) else None,
        task_version=told.get("version"),
        board=board,
        group=group,
    )


def _own(labels: Sequence[str], repo: str, line: int, notes: Notes) -> str | None:
    """The label that names the model: exactly, else the only one with its name as a word (so that
    Ours-7B-v2 is not Ours-7B), else the only one that says "ours", or nothing at all."""
    wanted = {_form(repo), _form(repo.rpartition("/")[2])} - {""}
    exact = [label for label in labels if _form(label) in wanted]
    near = {label for label in labels if any(_form(word) in wanted for word in _WORDS.split(label))}
    selves = {label for label in labels if _is_self(label)}
    for found in (exact[:1], sorted(near), sorted(selves)):
        if len(found) == 1:
            return found[0]
    if labels:
        text = "none of the models of this table is named like"
        notes.add(line, f"{text} {repo.rpartition('/')[2]}: its scores were not taken.")
    return None


def _is_self(label: str) -> bool:
    first = _form(_WORDS.split(label.strip())[0])
    return first in (*_VALUE, "", "our", "ours", "this", "acc")


def _form(text: str) -> str:
    return re.sub(r"[^a-z0-9#±↑↓+]", "", text.lower())
