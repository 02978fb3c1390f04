"""Verbs on a study: its single steps, and what can be done with it between them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import rich_click as click

from mergelab.cli import options
from mergelab.cli.records import forget, keep, load, still_asked
from mergelab.errors import UserError, nearest
from mergelab.progress import say, size


@options.study
def lock(study: Path) -> None:
    """Pin every hub model and every dataset of the suite: names become commits in lock.json.

    If the study has a policy, the lineage of its hub models is looked up and kept there too."""
    from mergelab import locate, lockfile, policy, task_data

    loaded = load(study)
    ids = locate.hub_ids(loaded.recipes, loaded)
    sets = task_data.repositories(loaded)
    if not ids and not sets and not any(model.hub for model in loaded.models.values()):
        say(f"{study}: has no hub models, so there is nothing to pin")
        return
    lockfile.lock(loaded, ids, sets, policy.tracing(loaded))
    say(f"wrote {loaded.lock}")
    for note in policy.check(loaded):
        say(f"note: {note}")


@options.study
@click.argument("dataset", default="", help="Only this one; lm_eval: the suite's.")
@options.results
@options.record
def data(study: Path, dataset: str, results: Path, record: Path | None) -> None:
    """Fetch benchmark items and cut them into disjoint parts."""
    from mergelab import datasets, task_data
    from mergelab.study import TASK_DATA

    loaded = load(study)
    place = results / loaded.name
    still_asked(record, study, "data", dataset)
    if dataset in ("", TASK_DATA) and any(bench.data is None for bench in loaded.suite):
        forget(place, "data", TASK_DATA)
        keep(record, task_data.prepare(loaded, place))
        say(f"wrote {place / 'data' / TASK_DATA}")
    if dataset == TASK_DATA:
        return
    if dataset:
        _known(dataset, loaded.datasets, "dataset", loaded)
        loaded = dataclasses.replace(loaded, datasets={dataset: loaded.datasets[dataset]})
    for name in loaded.datasets:
        forget(place, "data", name)
    keep(record, datasets.prepare(loaded, place / "data"))
    say(f"wrote {place / 'data'}: {', '.join(loaded.datasets)}")


@options.study
@click.argument("model", default="", help="A model of study.yaml; all with --check.")
@click.option("--check", is_flag=True, help="Ask no hub: are the models here those of the lock?")
@options.results
@options.record
def fetch(study: Path, model: str, check: bool, results: Path, record: Path | None) -> None:
    """Bring one model of a study here: from the hub (verified), or out of a GGUF file.

    A local folder is only checked; it is used where it is. Given a recipe's name, fetches the hub
    models that the recipe names itself. Data sets are checked by the steps that read them."""
    from mergelab import locate, models

    loaded = load(study)
    place = results / loaded.name
    if check:
        _checked(loaded, model, place)
        return
    recipes = [path.stem for path in loaded.recipes]
    _known(model, (*loaded.models, *recipes), "model", loaded)
    still_asked(record, study, "fetch", model)
    if model in recipes or models.folder(loaded, model, place).exists():
        forget(place, "fetch", model)  # else a clone's record comes true again
    if model in recipes:
        keep(record, locate.fetch(loaded, model, place))
        say(f"ready: the hub models of {model}.yaml")
        return
    keep(record, models.fetch(loaded, model, place / "models" / model))
    say(f"ready: {models.folder(loaded, model, place)}")


@options.study
@click.argument("model", help="A model of study.yaml.")
@options.results
@options.record
def train(study: Path, model: str, results: Path, record: Path | None) -> None:
    """Train one model of a study, from scratch or from another one."""
    from mergelab import training

    loaded = load(study)
    place = results / loaded.name
    _known(model, loaded.models, "model", loaded)
    still_asked(record, study, "train", model)
    forget(place, "train", model)
    keep(record, training.train(loaded, model, place / "models" / model, place))
    say(f"wrote {place / 'models' / model}")


@options.study
@options.variant
@options.results
@options.record
def evaluate(study: Path, variant: str, results: Path, record: Path | None) -> None:
    """Score a model or merge on the study's suite, through lm-eval."""
    from mergelab import models, scores

    loaded = load(study)
    place = results / loaded.name
    folder = models.existing(loaded, variant, place)
    still_asked(record, study, "evaluate", variant)
    forget(place, "evaluate", variant)
    keep(record, scores.evaluate(loaded, variant, folder, place))
    say(f"wrote {place / 'scores' / variant}.json")


@options.study
@options.variant
@options.results
@options.record
def probe(study: Path, variant: str, results: Path, record: Path | None) -> None:
    """Run a model over the items of every contamination check; keep its log-probabilities."""
    from mergelab import evidence, models

    loaded = load(study)
    place = results / loaded.name
    folder = models.existing(loaded, variant, place)
    still_asked(record, study, "probe", variant)
    forget(place, "probe", variant)
    keep(record, evidence.probe(loaded, variant, folder, place))
    say(f"wrote {place / 'evidence' / variant}")


@options.study
@options.variant
@options.results
@options.record
def detect(study: Path, variant: str, results: Path, record: Path | None) -> None:
    """Compare a variant's evidence with its base's: was the benchmark in the training data?"""
    from mergelab import findings

    loaded = load(study)
    place = results / loaded.name
    still_asked(record, study, "detect", variant)
    forget(place, "detect", variant)
    keep(record, findings.detect(loaded, variant, place))
    say(f"wrote {place / 'findings' / variant}.json")


@options.study
@options.results
@options.record
def report(study: Path, results: Path, record: Path | None) -> None:
    """Write report.html, report.json, metrics.json and plots/ of a study."""
    from mergelab import report as page

    loaded = load(study)
    still_asked(record, study, "report", loaded.name)
    forget(results / loaded.name, "report", loaded.name)
    keep(record, page.write(loaded, results / loaded.name))
    say(f"wrote {results / loaded.name / 'report.html'}")


@options.study
@options.out("Recipe to write, such as recipes/demo/soup.yaml.", required=True)
@click.option(
    "--benchmark", required=True, help="Benchmark to choose by; its items may serve nothing else."
)
@click.argument("models", nargs=-1, help="Candidates; without, all models but the base.")
@options.results
def soup(study: Path, out: Path, benchmark: str, models: tuple[str, ...], results: Path) -> None:
    """Choose models to average by their scores on held-out items; write it as a linear recipe.

    Greedy soup (arXiv 2203.05482): the best model first; each further one stays if the average
    scores strictly better with it. The best is picked, so its score on those items is too good:
    give the benchmark a part of its own, such as gsm8k/held_out, that no other benchmark, check or
    training of the study uses. Run `mergelab evaluate` for every candidate before."""
    from mergelab import soup as soups

    loaded = load(study)
    soups.make(loaded, benchmark, models, out, results / loaded.name)
    say(f"wrote {out}")


@options.study
@click.argument("merge", help="A merge of the study.")
@click.option("--to", required=True, metavar="ORG/NAME", help="Repository on the hub.")
@click.option(
    "--license", "licence", help="Needed where the parents' licences differ or are unknown."
)
@click.option("--upload", is_flag=True, help="Do it; without, only write and show what would go.")
@click.option("--private", is_flag=True, help="A new repository is private.")
@options.results
def publish(
    study: Path,
    merge: str,
    to: str,
    licence: str | None,
    upload: bool,
    private: bool,
    results: Path,
) -> None:
    """Write a merge's model card, recipe and record; with --upload, put all on the hub.

    The card holds parents, licence, scores with their protocol, contamination findings, and how
    to re-create the weights. Read it before you upload."""
    from mergelab import publish as publishing

    loaded = load(study)
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


@options.study
@options.results
def status(study: Path, results: Path) -> None:
    """Say what is done of a study, what runs, what failed, and what is out of date and why."""
    from mergelab import status as steps

    loaded = load(study)
    steps.show(steps.rows(loaded, results / loaded.name))


@options.study
@options.record
def record(study: Path, record: Path | None) -> None:
    """Hand a finished study's results to DVC (dvc commit); `snakemake` does it as its last step.

    Without DVC, without git, or if dvc.yaml does not list the study, it says so and passes."""
    from mergelab import versions

    loaded = load(study)
    say(versions.record(loaded, options.RESULTS / loaded.name, record))


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
