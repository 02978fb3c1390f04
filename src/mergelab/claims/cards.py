"""Model cards: what a README says of a model's parents, recipe and scores.

A card is untrusted text. It is read as data, within limits, and never shown or run by this
module; what cannot be read is a problem of the card, told with its line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergelab.claims import names
from mergelab.claims.base import Claim
from mergelab.claims.entries import Entry, Notes, percents_of, settle, shots_of
from mergelab.claims.numbers import PlainLoader, read_number
from mergelab.claims.recipes import find_recipe
from mergelab.claims.tables import read_tables, scores
from mergelab.errors import UserError
from mergelab.yamlfile import Map, Seq, parse

LONGEST = 1_000_000  # characters of a card that are read
LONGEST_FRONT = 200_000  # of its front matter
MOST_NAMES = 200  # of models, tags or datasets


@dataclass(frozen=True)
class Card:
    """What a card says: parents, tags, data sets, licence, the recipe's text, scores.

    `problems` names, with their lines, what could not be read or contradicts itself."""

    repo: str
    base_models: tuple[str, ...]
    tags: tuple[str, ...]
    datasets: tuple[str, ...]
    licence: str | None
    recipe: str | None
    claims: tuple[Claim, ...]
    problems: tuple[str, ...]


def read_card(
    text: str,
    repo: str,
    *,
    config: str | None = None,
    where: str = "README.md",
    date: str | None = None,
    commit: str | None = None,
) -> Card:
    """Read the card of `repo`; `config` is the text of its mergekit_config.yml, which goes first.

    `where` names the file in sources and problems; date and commit are those of the card."""
    notes = Notes(where)
    if len(text) > LONGEST:
        notes.add(1, f"only the first {LONGEST:,} characters of the card were read.")
    lines = text[:LONGEST].removeprefix("\ufeff").splitlines()
    end = _front_matter(lines)
    front = _front(lines[1:end], where, notes) if end else Map()
    body = _shown(lines[end + 1 :] if end else lines)
    found = [*_model_index(front, notes), *_eval_results(front, notes)]
    percents = percents_of(found)
    first = len(lines) - len(body) + 1
    for table in read_tables(body, first, notes):
        group = f"table {table.line}"
        entries, percents[group] = scores(table, repo, group, notes)
        found += entries
    claims = settle(found, percents, repo, notes, date=date, commit=commit)
    recipe = find_recipe(body, first, config, notes)
    return Card(
        repo,
        _texts(front, "base_model", notes),
        _texts(front, "tags", notes),
        _texts(front, "datasets", notes),
        next(iter(_texts(front, "license", notes)), None),
        recipe,
        claims,
        tuple(notes.found),
    )


def _shown(lines: list[str]) -> list[str]:
    """The lines without what HTML comments hide; as many as before."""
    hidden = list(lines)
    inside = False
    for number, line in enumerate(lines):
        text = ""
        while line:
            before, mark, line = line.partition("-->" if inside else "<!--")
            text += "" if inside else before
            inside = not inside if mark else inside
        hidden[number] = text
    return hidden


def _front_matter(lines: list[str]) -> int:
    """The line (from 0) that ends the front matter, or 0 if there is none."""
    if not lines or lines[0].strip() != "---":
        return 0
    return next((n for n, line in enumerate(lines[1:], 1) if line.rstrip() == "---"), 0)


def _front(lines: list[str], where: str, notes: Notes) -> Map:
    text = "\n".join(["", *lines])  # a blank first line, so that lines count from the card's start
    if len(text) > LONGEST_FRONT:
        notes.add(1, f"the front matter is longer than {LONGEST_FRONT:,} characters: not read.")
        return Map()
    if not text.strip():
        return Map()
    try:
        return parse(text, Path(where), PlainLoader)
    except UserError as error:
        notes.found[str(error)[:500]] = None
        return Map()


def _texts(front: Map, key: str, notes: Notes) -> tuple[str, ...]:
    """One text or a list of texts; anything else is noted and left out."""
    value = front.get(key)
    values = value if isinstance(value, Seq) else [] if value is None else [value]
    good = [item.strip() for item in values if isinstance(item, str) and len(item) <= 500]
    if len(good) < len(values) or len(good) > MOST_NAMES:
        notes.add(front.lines.get(key, 1), f"'{key}' is no list of short texts: read in part.")
    return tuple(dict.fromkeys(item for item in good[:MOST_NAMES] if item))


def _model_index(front: Map, notes: Notes) -> Iterator[Entry]:
    """The metrics of `model-index`, however much of its form is there."""
    for result in _maps(front, "model-index", notes):
        for block in _maps(result, "results", notes):
            dataset, source = _map(block, "dataset"), _map(block, "source")
            told = " ".join(_text(source, key) or "" for key in ("name", "url"))
            for metric in _maps(block, "metrics", notes):
                entry = _metric(block, dataset, metric, told, notes)
                if entry is not None:
                    yield entry


def _metric(block: Map, dataset: Map, metric: Map, told: str, notes: Notes) -> Entry | None:
    published = _name(block, dataset)
    number = read_number(metric.get("value"))
    line = metric.lines.get("value", metric.line)
    if published is None or number is None:
        if metric.get("value") is not None:
            notes.add(line, "a score without a benchmark or a number: not taken.")
        return None
    kind = _text(metric, "type") or _text(metric, "name")
    args = _map(dataset, "args")
    shots = args.get("num_few_shot", args.get("num_fewshot"))
    template = args.get("chat_template")
    return Entry(
        published,
        number,
        line,
        metric=kind,
        shots=shots_of(shots),
        split=_text(dataset, "split"),
        chat_template=template if isinstance(template, bool) else None,
        board=names.board_of(told, (published,)),
        group=f"model-index {told}",
    )


def _name(block: Map, dataset: Map) -> str | None:
    """The first name of the block that is known, else the data set's."""
    given = [_text(dataset, "name"), _text(dataset, "type"), _text(_map(block, "task"), "name")]
    told = [name for name in given if name]
    return next((name for name in told if names.find(name).known), told[0] if told else None)


def _eval_results(front: Map, notes: Notes) -> Iterator[Entry]:
    """The hub's newer list: [{dataset: {id, task_id}, value, date, source, notes}]."""
    for result in _maps(front, "eval_results", notes):
        dataset, number = _map(result, "dataset"), read_number(result.get("value"))
        told = [_text(dataset, "task_id"), _text(dataset, "id")]
        given = [name for name in told if name]
        line = result.lines.get("value", result.line)
        if number is None or not given:
            notes.add(line, "a result without a benchmark or a number: not taken.")
            continue
        known = next((name for name in given if names.find(name).known), " ".join(given[::-1]))
        yield Entry(known, number, line, date=_text(result, "date"), group=f"{result.line}")


def _maps(map: Map, key: str, notes: Notes) -> list[Map]:
    value = map.get(key)
    entries = value if isinstance(value, Seq) else [value] if isinstance(value, Map) else []
    good = [entry for entry in entries if isinstance(entry, Map)]
    if value is not None and (not entries or len(good) < len(entries)):
        notes.add(map.lines.get(key, map.line), f"'{key}' is not a list of mappings.")
    return good


def _map(map: Map, key: str) -> Map:
    value = map.get(key)
    return value if isinstance(value, Map) else Map()


def _text(map: Map, key: str) -> str | None:
    value: Any = map.get(key)
    return value.strip()[: names.LONGEST] or None if isinstance(value, str) else None
