"""Arguments and options that several verbs share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import rich_click as click

from mergelab.errors import UserError
from mergelab.progress import say

Verb = TypeVar("Verb", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)
FILE = click.Path(path_type=Path, dir_okay=False)
RESULTS = Path("results")
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
WORKERS = min(8, CORES)


class _Hidden(click.RichArgument):
    """An argument without a line in --help."""

    hidden = True


def _writable(context: click.Context, _: click.Parameter, path: Path | None) -> Path | None:
    """Checked before the work, so that nothing is lost for want of a place.

    One process at a time works on a step: a second one (of a Snakemake run that was killed while
    its jobs went on) waits, and then has nothing left to do."""
    from mergelab.folders import alone, held

    if path is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if waits := held(path):
            say(f"another process works on {path.name}; waiting for it")
        context.with_resource(alone(path))
    except OSError as error:
        raise UserError(f"--record {path}: cannot be written: {error.strerror}.") from None
    if waits and path.is_file():
        say(f"{path.name}: done by that process")
        context.exit()
    return path


study = click.argument("study", type=PATH, help="Folder of the study, such as recipes/demo.")
recipe = click.argument("recipe", type=PATH, help="Recipe file, such as recipes/demo/ties.yaml.")
variant = click.argument("variant", help="A model or a merge of the study, by its name.")


def out(text: str, *, required: bool = False) -> Callable[[Verb], Verb]:
    """The place of a verb's result; `text` says what is there."""
    return click.option("-o", "--out", type=PATH, required=required, help=text)


results = click.option(
    "--results",
    type=PATH,
    default=RESULTS,
    help="Folder of all results; a study's are in a folder of it.",
)
record = click.option(
    "--record",
    type=FILE,
    callback=_writable,
    help="Write the record of this step here, too; Snakemake asks for it.",
)
workers = click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=WORKERS,
    show_default="the cores that may be used, at most 8",
    help="Threads; the result does not depend on it.",
)
shard_size = click.option(
    "--shard-size", default="5GB", help="Largest weight file, such as 5GB or 500MB."
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
json_file = click.option("--json", "file", type=FILE, help="Write the result here as JSON, too.")
candidates = click.option(
    "--candidates",
    multiple=True,
    metavar="A B ...",
    help="What it may be made of; several after one another.",
)
more_candidates = click.argument("more", nargs=-1, cls=_Hidden)
