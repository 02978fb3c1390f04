"""The command line: one verb per step. Knows every other module; holds no logic of its own."""

from __future__ import annotations

import atexit
import dataclasses
import gc
import json
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from mergelab import __version__
from mergelab.errors import UserError, nearest
from mergelab.progress import console, say, size

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Merge language models so that anyone can re-create the result, and check its scores
for contamination.

A **study** is a folder such as `recipes/demo`: a `study.yaml` (models, benchmarks, checks) and one
mergekit-compatible YAML per merge. Run a whole study with `snakemake --config study=demo`;
the verbs below are its single steps. Exit code 0: done, 2: your input needs a change, 1: our
fault.""",
)

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
Workers = Annotated[int, typer.Option(min=1, help="Threads; the result does not depend on it.")]
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
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"mergelab {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Options before the verb."""


@app.command()
def merge(
    recipe: RecipeFile,
    out: Annotated[
        Path,
        typer.Option(
            "-o", "--out", help="Folder for the merged model; an earlier merge there is replaced."
        ),
    ],
    shard_size: ShardSize = "5GB",
    workers: Workers = 1,
    seed: Seed = 0,
    part: Annotated[
        str,
        typer.Option(
            metavar="I/N", help="Write only this part, such as 3/8; the last part done finishes."
        ),
    ] = "1/1",
    results: Results = RESULTS,
    record: RecordFile = None,
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
        _still_asked(record, recipe.parent, "merge", recipe.stem)
    _forget(out.parent.parent, "merge", out.name)
    try:
        outcome = engine.merge(planned, out, workers=workers, seed=seed, part=parts)
    except KeyboardInterrupt:
        say(f"interrupted: {out} is as it was; the same command goes on from here.")
        raise
    if outcome:
        _record(record, outcome)


@app.command()
def plan(
    recipe: RecipeFile,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Where the merge would go; nothing is written there."),
    ] = None,
    shard_size: ShardSize = "5GB",
    results: Results = RESULTS,
    as_json: AsJson = False,
) -> None:
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
        typer.echo(json.dumps({**description, "costs": costs}, indent=1))
    else:
        show.plan(description, costs)


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="Model folder or .safetensors file.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The one to compare with A.")],
    as_json: AsJson = False,
    workers: Workers = 1,
) -> None:
    """Compare two models tensor by tensor: same bits, or how far apart?

    Counts the elements that differ and tells the largest distance in ulp (steps from one number
    of the format to the next), the largest absolute difference, and the cosine of each tensor.
    Formats may differ: a float32 model and its bfloat16 copy are 0 ulp of bfloat16 apart.
    Exit code 0 whether equal or not; scripts read `identical` of `--json`."""
    from mergelab import diff as comparison
    from mergelab.checkpoint import open_checkpoint

    result = comparison.compare(open_checkpoint(a, str(a)), open_checkpoint(b, str(b)), workers)
    if as_json:
        typer.echo(json.dumps(result, indent=1))
    else:
        comparison.show(result)


@app.command()
def explain(
    method: Annotated[
        str, typer.Argument(metavar="[METHOD]", help="A merge method; without: list them all.")
    ] = "",
) -> None:
    """Say what a merge method does: parameters, papers, differences to mergekit."""
    from mergelab import show
    from mergelab.methods import METHODS

    if method and method not in METHODS:
        hint = nearest(method, METHODS)
        raise UserError(
            f"there is no merge method '{method}'.{hint}\n  Methods: {', '.join(METHODS)}."
        )
    show.methods([METHODS[method]] if method else list(METHODS.values()), full=bool(method))


@app.command()
def infer(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder of the model.")],
    more: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    candidates: Candidates = None,
    base: Annotated[
        str | None, typer.Option(metavar="X", help="The common base, if you know it.")
    ] = None,
    file: JsonFile = None,
    workers: Workers = 1,
) -> None:
    """Read from the weights how a model was made: `infer MODEL --candidates A B ... [--base X]`.

    Which of the candidates are its parents, merged by which method with which weights, what no
    candidate explains (an undeclared parent, further training), layer by layer. Folders only."""
    from mergelab.checkpoint import open_checkpoint
    from mergelab.forensics import infer as forensics
    from mergelab.forensics.show import show

    names = [*(candidates or ()), *(more or ())]
    if not names:
        raise UserError(f"infer {model}: name the models it may be made of: --candidates A B ...")
    known = {name: open_checkpoint(Path(name), name) for name in dict.fromkeys(names)}
    start = open_checkpoint(Path(base), base) if base else None
    result = forensics.infer(open_checkpoint(Path(model), model), known, start, workers)
    show(result)
    _save(file, result)


@app.command()
def audit(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="Hub model, folder of a model, claims file (*.yaml), or folder of a study.",
        ),
    ],
    more: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    candidates: Candidates = None,
    base: Annotated[
        str | None, typer.Option(metavar="X", help="Its base, where it has no recipe.")
    ] = None,
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Download the weights of models and parents, too.")
    ] = False,
    skip: Annotated[
        list[str] | None, typer.Option(metavar="WHAT", help="Leave out: weights, scores.")
    ] = None,
    depth: Annotated[int, typer.Option(min=0, help="Generations of ancestors.")] = 4,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Items per benchmark that is scored again.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            help="Folder of the audit; of a study, of its results. Default: in results.",
        ),
    ] = None,
    file: JsonFile = None,
    workers: Workers = 1,
    results: Results = RESULTS,
    record: RecordFile = None,
) -> None:
    """Is a published merge what its card says, and are its scores real?

    Collects what is claimed, traces the ancestors and what they are flagged for, merges the recipe
    again and compares the weights, scores again and compares the scores. Writes audit.html (read
    this) and audit.json. Without --fetch only cards are downloaded. A study is judged by its own
    results and its claims.yaml. Exit code 0 whatever the verdicts: read them in the file."""
    from mergelab.audit import run
    from mergelab.audit.target import read_target

    for name in skip or ():
        if name not in ("weights", "scores"):
            raise UserError(f"--skip {name}: what can be left out is: weights, scores.")
    names = (*(candidates or ()), *(more or ()))
    asked = read_target(target, base, names)
    study = asked.study if asked.kind == "study" else None
    place = out or results / (study.name if study else f"audits/{_slug(target)}")
    if study:
        _still_asked(record, study.folder, "audit", study.name)
        _forget(place, "audit", study.name)
    options = run.Options(fetch, depth, limit, tuple(skip or ()), workers)
    data = run.audit(target, place, options, base=base, candidates=names)
    run.show(data)
    _save(file, data)
    if study:
        _record(record, run.record(study, place, data))
    say(f"wrote {place / (run.FOLDER if study else '') / 'audit.html'}")


@app.command()
def lock(study: StudyFolder) -> None:
    """Pin every hub model and every dataset of the suite: names become commits in lock.json.

    If the study has a policy, the lineage of its hub models is looked up and kept there too."""
    from mergelab import hub, locate, policy, task_data

    loaded = _study(study)
    ids = locate.hub_ids(loaded.recipes, loaded)
    sets = task_data.repositories(loaded)
    if not ids and not sets and not any(model.hub for model in loaded.models.values()):
        say(f"{study}: has no hub models, so there is nothing to pin")
        return
    hub.lock(loaded, ids, sets, policy.tracing(loaded))
    say(f"wrote {loaded.lock}")
    for note in policy.check(loaded):
        say(f"note: {note}")


@app.command()
def data(
    study: StudyFolder,
    dataset: Annotated[
        str, typer.Argument(metavar="[DATASET]", help="Only this one; lm_eval: the suite's.")
    ] = "",
    results: Results = RESULTS,
    record: RecordFile = None,
) -> None:
    """Fetch benchmark items and cut them into disjoint parts."""
    from mergelab import datasets, task_data
    from mergelab.study import TASK_DATA

    loaded = _study(study)
    place = results / loaded.name
    _still_asked(record, study, "data", dataset)
    if dataset in ("", TASK_DATA) and any(bench.data is None for bench in loaded.suite):
        _forget(place, "data", TASK_DATA)
        _record(record, task_data.prepare(loaded, place))
        say(f"wrote {place / 'data' / TASK_DATA}")
    if dataset == TASK_DATA:
        return
    if dataset:
        _known(dataset, loaded.datasets, "dataset", loaded)
        loaded = dataclasses.replace(loaded, datasets={dataset: loaded.datasets[dataset]})
    for name in loaded.datasets:
        _forget(place, "data", name)
    _record(record, datasets.prepare(loaded, place / "data"))
    say(f"wrote {place / 'data'}: {', '.join(loaded.datasets)}")


@app.command()
def fetch(
    study: StudyFolder,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model of study.yaml; all with --check.")
    ] = "",
    check: Annotated[
        bool, typer.Option("--check", help="Ask no hub: are the models here those of the lock?")
    ] = False,
    results: Results = RESULTS,
    record: RecordFile = None,
) -> None:
    """Bring one model of a study here: from the hub (verified), or out of a GGUF file.

    A local folder is only checked; it is used where it is. Given a recipe's name, fetches the hub
    models that the recipe names itself. Data sets are checked by the steps that read them."""
    from mergelab import locate, models

    loaded = _study(study)
    place = results / loaded.name
    if check:
        _checked(loaded, model, place)
        return
    recipes = [path.stem for path in loaded.recipes]
    _known(model, (*loaded.models, *recipes), "model", loaded)
    _still_asked(record, study, "fetch", model)
    if model in recipes or models.folder(loaded, model, place).exists():
        _forget(place, "fetch", model)  # else a clone's record comes true again
    if model in recipes:
        _record(record, locate.fetch(loaded, model, place))
        say(f"ready: the hub models of {model}.yaml")
        return
    _record(record, models.fetch(loaded, model, place / "models" / model))
    say(f"ready: {models.folder(loaded, model, place)}")


@app.command()
def train(
    study: StudyFolder, model: ModelName, results: Results = RESULTS, record: RecordFile = None
) -> None:
    """Train one model of a study, from scratch or from another one."""
    from mergelab import training

    loaded = _study(study)
    place = results / loaded.name
    _known(model, loaded.models, "model", loaded)
    _still_asked(record, study, "train", model)
    _forget(place, "train", model)
    _record(record, training.train(loaded, model, place / "models" / model, place))
    say(f"wrote {place / 'models' / model}")


@app.command()
def evaluate(
    study: StudyFolder, variant: Variant, results: Results = RESULTS, record: RecordFile = None
) -> None:
    """Score a model or merge on the study's suite, through lm-eval."""
    from mergelab import models, scores

    loaded = _study(study)
    place = results / loaded.name
    folder = models.existing(loaded, variant, place)
    _still_asked(record, study, "evaluate", variant)
    _forget(place, "evaluate", variant)
    _record(record, scores.evaluate(loaded, variant, folder, place))
    say(f"wrote {place / 'scores' / variant}.json")


@app.command()
def probe(
    study: StudyFolder, variant: Variant, results: Results = RESULTS, record: RecordFile = None
) -> None:
    """Run a model over the items of every contamination check; keep its log-probabilities."""
    from mergelab import evidence, models

    loaded = _study(study)
    place = results / loaded.name
    folder = models.existing(loaded, variant, place)
    _still_asked(record, study, "probe", variant)
    _forget(place, "probe", variant)
    _record(record, evidence.probe(loaded, variant, folder, place))
    say(f"wrote {place / 'evidence' / variant}")


@app.command()
def detect(
    study: StudyFolder, variant: Variant, results: Results = RESULTS, record: RecordFile = None
) -> None:
    """Compare a variant's evidence with its base's: was the benchmark in the training data?"""
    from mergelab import findings

    loaded = _study(study)
    place = results / loaded.name
    _still_asked(record, study, "detect", variant)
    _forget(place, "detect", variant)
    _record(record, findings.detect(loaded, variant, place))
    say(f"wrote {place / 'findings' / variant}.json")


@app.command()
def report(study: StudyFolder, results: Results = RESULTS, record: RecordFile = None) -> None:
    """Write report.html, report.json, metrics.json and plots/ of a study."""
    from mergelab import report as page

    loaded = _study(study)
    _still_asked(record, study, "report", loaded.name)
    _forget(results / loaded.name, "report", loaded.name)
    _record(record, page.write(loaded, results / loaded.name))
    say(f"wrote {results / loaded.name / 'report.html'}")


@app.command()
def soup(
    study: StudyFolder,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Recipe to write, such as recipes/demo/soup.yaml.")
    ],
    benchmark: Annotated[
        str, typer.Option(help="Benchmark to choose by; its items may serve nothing else.")
    ],
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODELS]", help="Candidates; without, all models but the base."),
    ] = None,
    results: Results = RESULTS,
) -> None:
    """Choose models to average by their scores on held-out items; write it as a linear recipe.

    Greedy soup (arXiv 2203.05482): the best model first; each further one stays if the average
    scores strictly better with it. The best is picked, so its score on those items is too good:
    give the benchmark a part of its own, such as gsm8k/held_out, that no other benchmark, check or
    training of the study uses. Run `mergelab evaluate` for every candidate before."""
    from mergelab import soup as soups

    loaded = _study(study)
    soups.make(loaded, benchmark, models or (), out, results / loaded.name)
    say(f"wrote {out}")


@app.command()
def publish(
    study: StudyFolder,
    merge: Annotated[str, typer.Argument(metavar="MERGE", help="A merge of the study.")],
    to: Annotated[str, typer.Option("--to", metavar="ORG/NAME", help="Repository on the hub.")],
    licence: Annotated[
        str | None,
        typer.Option("--license", help="Needed where the parents' licences differ or are unknown."),
    ] = None,
    upload: Annotated[
        bool, typer.Option("--upload", help="Do it; without, only write and show what would go.")
    ] = False,
    private: Annotated[
        bool, typer.Option("--private", help="A new repository is private.")
    ] = False,
    results: Results = RESULTS,
) -> None:
    """Write a merge's model card, recipe and record; with --upload, put all on the hub.

    The card holds parents, licence, scores with their protocol, contamination findings, and how
    to re-create the weights. Read it before you upload."""
    from mergelab import publish as publishing

    loaded = _study(study)
    package = publishing.prepare(loaded, merge, to, results / loaded.name, licence)
    for note in package.notes:
        say(f"note: {note}")
    for name in (*package.small, *package.weights):
        folder = package.folder if name in package.small else package.merged
        say(f"  {size((folder / name).stat().st_size):>8}  {folder / name}")
    if upload:
        say(f"published: {publishing.upload(package, to, private=private)}")
    else:
        say(f"Nothing was uploaded. Read {package.folder / 'README.md'}, then add --upload.")


@app.command()
def status(study: StudyFolder, results: Results = RESULTS) -> None:
    """Say what is done of a study, what runs, what failed, and what is out of date and why."""
    from mergelab import status as steps

    loaded = _study(study)
    steps.show(steps.rows(loaded, results / loaded.name))


@app.command(name="record")
def record_study(study: StudyFolder, record: RecordFile = None) -> None:
    """Hand a finished study's results to DVC (dvc commit); `snakemake` does it as its last step.

    Without DVC, without git, or if dvc.yaml does not list the study, it says so and passes."""
    from mergelab import versions

    loaded = _study(study)
    say(versions.record(loaded, RESULTS / loaded.name, record))


def _slug(text: str) -> str:
    """A folder's name for a target: letters, digits, _ . - of it."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", text.removesuffix(".yaml")).strip("-.") or "model"


def _save(file: Path | None, value: Any) -> None:
    from mergelab.record import write_json

    if file is not None:
        write_json(file, value)
        say(f"wrote {file}")


def _study(folder: Path) -> Any:
    from mergelab.study import load_study

    return load_study(folder.parent if folder.name == "study.yaml" else folder)


def _plan(recipe: Path, results: Path, shard_size: str, *, weights: bool = True) -> Any:
    from mergelab import locate, policy
    from mergelab.plan import make_plan
    from mergelab.recipe import load_recipe

    largest = _bytes(shard_size)
    loaded = load_recipe(recipe)
    study = locate.study_of(recipe)
    notes = policy.check(study, [recipe.stem]) if study else []
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


def _known(name: str, names: Any, what: str, study: Any) -> None:
    if name not in names:
        hint = nearest(name, names)
        raise UserError(f"{study.folder / 'study.yaml'}: there is no {what} '{name}'.{hint}")


def _checked(study: Any, model: str, place: Path) -> None:
    """Compare the files of one hub model, or of all, with the lock; UserError if any differs."""
    from mergelab import locate, models
    from mergelab.errors import Problems

    problems, names = Problems(), [model] if model else list(study.models)
    for name in names:
        for wrong in models.check(study, name, place):
            problems.add(f"{models.folder(study, name, place)}: {wrong}.")
    names = [name for name in names if study.models[name].hub]
    for hub_id, found in locate.check(study, place) if not model else ():
        names.append(hub_id)
        for wrong in found:
            problems.add(wrong)
    problems.raise_if_any()
    say(f"as pinned: {', '.join(names) or 'nothing'}")


def _forget(place: Path, verb: str, name: str) -> None:
    """Delete a step's records before its result changes: a run by hand makes it out of date.

    And what DVC noted of the study with it."""
    from mergelab.record import forget

    forget(place / "records", f"{verb}-{name}")
    forget(place / "records", f"record-{place.name}")


def _still_asked(record: Path | None, study: Path, verb: str, name: str) -> None:
    """Raise UserError if a step is no longer the one whose key `record` has in its name.

    Called once everything that the key covers is read, so that no record tells of other work."""
    from mergelab.record import KEYED

    if record is None or not KEYED.fullmatch(record.name):
        return
    from mergelab.steps import Steps

    loaded = _study(study)
    step = Steps(loaded).all.get((verb, name))
    if step is None or step.record != record.name:
        raise UserError(
            f"{loaded.folder}: changed since this run was planned, so that {record.name} is not "
            f"what {verb} {name} would make now. Run: snakemake --config study={loaded.name}"
        )


def _record(path: Path | None, value: dict[str, Any]) -> None:
    from mergelab.record import write_record

    if path is not None:
        write_record(path, value)


def main() -> None:
    """Run the command line: exit code 0 done, 2 the user's mistake, 1 our fault."""
    gc.set_threshold(100_000)  # what is imported stays: looking for garbage in it takes long,
    atexit.register(gc.freeze)  # longest at the end
    try:
        app()
    except UserError as error:
        console.print(f"error: {error}", style="red", markup=False)
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        console.print("stopped", markup=False)
        sys.exit(130)
    except Exception:
        traceback.print_exc()
        console.print(
            f"\nThis is a mistake in mergelab {__version__}, not yours. Please report it with the "
            "text above and the command you ran (see CONTRIBUTING.md).",
            markup=False,
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
