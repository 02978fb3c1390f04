"""Carries out an audit: claims, lineage, weights, scores, comparisons, in one record."""

from __future__ import annotations

import shlex
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mergelab import ancestry
from mergelab.audit import VERSION, page, summary
from mergelab.audit.of_models import Options, of_models
from mergelab.audit.of_study import FOLDER, of_study
from mergelab.audit.target import Target, read_target
from mergelab.errors import UserError
from mergelab.progress import printable
from mergelab.record import file_entries, write_bytes, write_json
from mergelab.study import Study

MOST_ROWS = 30  # printed

__all__ = ["FOLDER", "Options", "audit", "record", "show"]


def audit(
    text: str,
    out: Path,
    options: Options,
    *,
    base: str | None = None,
    candidates: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Audit a model, a claims file or a study; write `out`/audit.html and audit.json.

    `text` names it (see read_target). Of a study, `out` is the folder of its results, which are
    judged as they are; else models and scores are kept below `out`, and the same audit again
    downloads and scores nothing anew. Returns what audit.json holds. Raises UserError if there is
    no such target, and for options that change nothing of it."""
    started = time.monotonic()
    target = read_target(text, base, candidates)
    if target.kind == "study" and options != Options(workers=options.workers):
        raise UserError(
            f"{text}: a study is audited by its own results: --fetch, --skip, --depth and --limit "
            "change nothing there. Leave them out."
        )
    place = out / FOLDER if target.kind == "study" else out
    found = of_study(target, out) if target.kind == "study" else of_models(target, out, options)
    data: dict[str, Any] = {
        "mergelab": metadata.version("mergelab"),
        "audit": VERSION,
        **found,
        "commands": _commands(target, options, base, candidates),
    }
    data["warnings"] = [*target.problems, *data["warnings"]]
    data["provenance"]["seconds"] = round(time.monotonic() - started, 2)
    data["verdicts"] = summary.rows(data)
    data = _from_here(data)
    write_json(place / "audit.json", data)
    write_bytes(place / "audit.html", page.render_audit(data).encode())
    return data


def record(study: Study, out: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    """What the record of a study's audit says."""
    names = [f"{FOLDER}/audit.html", f"{FOLDER}/audit.json"]
    return {
        "study": study.name,
        "versions": {"audit": VERSION, "mergelab": data["mergelab"]},
        "outputs": file_entries(out, names),
        "seconds": data["provenance"]["seconds"],
    }


def show(data: Mapping[str, Any]) -> None:
    """Print the verdict table; of a long one, what is wrong or doubtful."""
    out = Console(highlight=False, emoji=False)
    out.print(f"\n{printable(summary.sentence(data))}\n", markup=False)
    table = Table("", "of", "about", "verdict", "why", box=None, pad_edge=False)
    rows = data["verdicts"]
    if len(rows) > MOST_ROWS:
        rows = [row for row in rows if row["level"] in ("bad", "warn")][:MOST_ROWS]
    for row in rows:
        cells = (
            summary.MARKS[row["level"]],
            row["subject"],
            row["about"],
            row["verdict"],
            row["why"],
        )
        table.add_row(
            *(Text(printable(cell)) for cell in cells), style=summary.STYLES[row["level"]]
        )
    out.print(table)
    if rest := Counter(row["level"] for row in data["verdicts"] if row not in rows):
        marks = ", ".join(f"{rest[level]} {summary.MARKS[level]}" for level in rest)
        out.print(f"\nNot shown here: {marks}", markup=False)


def _from_here(value: Any) -> Any:
    """The same, with paths as they are from the working folder or the user's: both files are to be
    shown to others."""
    if isinstance(value, Mapping):
        return {_from_here(key): _from_here(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_from_here(one) for one in value]
    if isinstance(value, str):
        for folder, name in ((Path.cwd(), ""), (Path.home(), "~/")):
            value = value if folder == folder.parent else value.replace(f"{folder}/", name)
    return value


def _commands(
    target: Target, options: Options, base: str | None, candidates: Sequence[str]
) -> list[str]:
    """What repeats this audit."""
    words = ["mergelab", "audit", target.at]
    words += ["--candidates", *candidates] if candidates else []
    words += ["--base", base] if base else []
    words += ["--fetch"] if options.fetch else []
    words += ["--depth", str(options.depth)] if options.depth != ancestry.DEPTH else []
    words += ["--limit", str(options.limit)] if options.limit else []
    words += [word for name in options.skip for word in ("--skip", name)]
    return [shlex.join(words)]
