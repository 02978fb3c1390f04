"""Arguments and options that several verbs share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from mergelab.errors import UserError
from mergelab.progress import say

StudyFolder = Annotated[
    Path, typer.Argument(metavar="STUDY", help="Folder of the study, such as recipes/demo.")
]
RecipeFile = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="Recipe file, such as recipes/demo/ties.yaml.")
]
Variant = Annotated[
    str, typer.Argument(metavar="VARIANT", help="A model or a merge of the study, by its name.")
]
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="A model of study.yaml.")]
Results = Annotated[
    Path, typer.Option("--results", help="Folder of all results; a study's are in a folder of it.")
]


def _writable(context: typer.Context, path: Path | None) -> Path | None:
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
        raise typer.Exit
    return path


RecordFile = Annotated[
    Path | None,
    typer.Option(
        "--record",
        dir_okay=False,
        callback=_writable,
        help="Write the record of this step here, too; Snakemake asks for it.",
    ),
]
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
WORKERS = min(8, CORES)
Workers = Annotated[
    int,
    typer.Option(
        min=1,
        help="Threads; the result does not depend on it.",
        show_default="the cores that may be used, at most 8",
    ),
]
ShardSize = Annotated[
    str, typer.Option("--shard-size", help="Largest weight file, such as 5GB or 500MB.")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the random masks of dare_* and della*.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Candidates = Annotated[
    list[str] | None,
    typer.Option(metavar="A B ...", help="What it may be made of; several after one another."),
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", dir_okay=False, help="Write the result here as JSON, too.")
]
RESULTS = Path("results")
