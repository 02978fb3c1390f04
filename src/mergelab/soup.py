"""Greedy soup: average the models that help on held-out items, the best first.

Wortsman et al. 2022, "Model soups", arXiv 2203.05482, recipe 1."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mergelab import (
    aggregates,
    comparison,
    engine,
    items,
    lineage,
    locate,
    models,
    policy,
    scores,
)
from mergelab.errors import UserError, nearest
from mergelab.plan import SHARD_SIZE, make_plan
from mergelab.progress import say
from mergelab.recipe import load_recipe
from mergelab.record import read_json, write_bytes
from mergelab.study import NAME, Study
from mergelab.suites import Benchmark

MARK = "# Greedy soup (Wortsman et al. 2022, arXiv 2203.05482), written by mergelab soup.\n"


@dataclass(frozen=True)
class Trial:
    """One step: the score of the soup with this model in it, and whether it stays in."""

    model: str
    score: float
    accepted: bool


@dataclass(frozen=True)
class Scored:
    """A model's score on the benchmark, and which items and prompts it was measured on;
    `template` is the SHA-256 of that of its chats."""

    value: float
    metric: str
    higher: bool
    fingerprint: str
    template: str | None


def greedy(
    first: Mapping[str, float],
    score_of: Callable[[tuple[str, ...]], float],
    *,
    higher: bool = True,
) -> list[Trial]:
    """Take models in the order of their own scores (`first`; of equal ones by name), and keep each
    with which the average of those kept scores strictly better than before.

    `score_of` is asked for the average of the named models, once per model but the best."""
    sign = 1 if higher else -1
    start, *others = sorted(first, key=lambda name: (-sign * first[name], name))
    soup: tuple[str, ...] = (start,)
    best = first[start]
    trials = [Trial(start, best, True)]
    for name in others:
        score = score_of((*soup, name))
        accepted = sign * score > sign * best
        trials.append(Trial(name, score, accepted))
        if accepted:
            soup, best = (*soup, name), score
    return trials


def make(
    study: Study, benchmark: str, candidates: Sequence[str], out: Path, results: Path
) -> list[Trial]:
    """Choose a soup of `candidates` (all experts if none are named) by a benchmark of the study,
    write its recipe to `out`, and return the trials.

    Raises UserError before any merge, if the benchmark's items are used for anything else, if the
    study's policy forbids to merge a candidate, or if one has no scores on the items."""
    bench = _held_out(study, benchmark)
    chosen = _candidates(study, candidates)
    _check_target(study, out)
    for note in policy.check(study, planned={out.stem: _linear(chosen)}):
        say(f"note: {note}")
    folders = {name: models.existing(study, name, results) for name in chosen}
    known = {name: _scored(study, bench, name, results) for name in chosen}
    first = known[chosen[0]]
    for found in known.values():
        _check_same(study, bench, found, first)

    def score_of(names: tuple[str, ...]) -> float:
        with tempfile.TemporaryDirectory(prefix=".soup-", dir=results) as place:
            merged = _merge([folders[name] for name in names], Path(place))
            found = _evaluate(study, bench, merged, results)
        _check_same(study, bench, found, first)
        say(f"{' + '.join(names)}: {found.metric} {found.value:.6g}")
        return found.value

    own = {name: found.value for name, found in known.items()}
    trials = greedy(own, score_of, higher=first.higher)
    write_bytes(out, recipe(bench, first.metric, own, trials).encode())
    return trials


def recipe(bench: Benchmark, metric: str, own: Mapping[str, float], trials: Sequence[Trial]) -> str:
    """The recipe's text: an ordinary linear merge, under a comment that tells how it was chosen."""
    width = max(map(len, own))
    lines = [
        f"# Chosen by {metric} on '{bench.name}' ({bench.data}). What it scores there is no "
        "measure of it:\n# the best was picked. Judge it by the other benchmarks.\n#\n",
        f"# {'model':{width}}  alone     in the soup\n",
    ]
    for i, trial in enumerate(trials):
        told = f"{trial.score:<8.6g}  {'taken' if trial.accepted else 'left out'}"
        told = told if i else "the start"
        lines.append(f"# {trial.model:{width}}  {own[trial.model]:<8.6g}  {told}\n")
    taken = [trial.model for trial in trials if trial.accepted]
    return MARK + "".join(lines) + _linear(taken)


def _linear(names: Sequence[str]) -> str:
    quoted = ["'{}'".format(name.replace("'", "''")) for name in names]
    sources = "".join(f"  - {{model: {name}, parameters: {{weight: 1}}}}\n" for name in quoted)
    return f"merge_method: linear\nmodels:\n{sources}parameters: {{normalize: true}}\n"


def _merge(folders: Sequence[Path], place: Path) -> Path:
    """The uniform average of model folders, made in `place`."""
    path = place / "candidate.yaml"
    path.write_text(_linear([str(folder.resolve()) for folder in folders]), encoding="utf-8")
    loaded = load_recipe(path)
    plan = make_plan(loaded, locate.folders(loaded, place), shard_size=SHARD_SIZE)
    engine.merge(plan, place / "candidate")
    return place / "candidate"


def _evaluate(study: Study, bench: Benchmark, merged: Path, results: Path) -> Scored:
    """Score a merge on the benchmark as `mergelab evaluate` does, beside the merge."""
    place = merged.parent
    (place / "data").symlink_to((results / "data").resolve(), target_is_directory=True)
    scores.evaluate(replace(study, suite=(bench,)), merged.name, merged, place)
    return _scored(study, bench, merged.name, place)


def _scored(study: Study, bench: Benchmark, name: str, results: Path) -> Scored:
    """What a variant got on the benchmark; UserError if it was not scored on it."""
    path, remedy = results / "scores" / f"{name}.json", f"mergelab evaluate {study.folder} {name}"
    summary = read_json(path, remedy, comparison.SCORES) or {"benchmarks": {}}
    entry = summary["benchmarks"].get(bench.name, {"metric": ""})
    found = items.items_of(items.read(results, [name]).get(name), bench, entry["metric"])
    if found is None:
        raise UserError(f"{path}: holds no scores on '{bench.name}'. Run: {remedy}")
    value = float(aggregates.score(found.parts)["value"])
    return Scored(
        value,
        entry["metric"],
        bool(entry["higher_is_better"]),
        found.fingerprint,
        entry.get("chat_template_sha"),
    )


def _check_same(study: Study, bench: Benchmark, one: Scored, other: Scored) -> None:
    if one.template != other.template:
        raise UserError(
            f"{study.folder / 'study.yaml'}: the candidates write the chats of '{bench.name}' by "
            "different templates, so that their prompts differ.\n  Choose by a benchmark without "
            "chat_template, or name candidates of one template."
        )
    if (one.metric, one.fingerprint) != (other.metric, other.fingerprint):
        raise UserError(
            f"{study.folder / 'study.yaml'}: the candidates were not scored on the same items and "
            f"prompts of '{bench.name}'. Run mergelab evaluate {study.folder} for each."
        )


def _held_out(study: Study, name: str) -> Benchmark:
    """The benchmark to choose by. Raises UserError if its items serve any other purpose."""
    where = study.folder / "study.yaml"
    known = {bench.name: bench for bench in study.suite}
    if name not in known:
        hint = nearest(name, known)
        raise UserError(f"{where}: there is no benchmark '{name}' in the suite.{hint}")
    data = known[name].data
    if data is None:
        raise UserError(
            f"{where}: benchmark '{name}' is no held-out part: it reads the task's own data, "
            "which others report on.\n  Name one with data: DATASET/PART, such as gsm8k/held_out."
        )
    uses = [f"benchmark '{b.name}'" for b in study.suite if b.data == data and b.name != name]
    for check in study.contamination:
        if data in (check.suspects, check.controls):
            uses.append(f"the check of '{check.benchmark}'")
    for model in study.models.values():
        trained = [share.part for share in model.train.data] if model.train else []
        if data in (*trained, *model.declared):
            uses.append(f"the training of '{model.name}'")
    if uses:
        raise UserError(
            f"{where}: '{data}' chooses the soup, so it may serve nothing else, but "
            f"{' and '.join(uses)} use{'s' if len(uses) == 1 else ''} it.\n  Cut another part, "
            f"such as {data.partition('/')[0]}/held_out, and make it a benchmark of its own."
        )
    return known[name]


def _candidates(study: Study, names: Sequence[str]) -> list[str]:
    where = study.folder / "study.yaml"
    base = lineage.base_of(study)
    chosen = list(dict.fromkeys(names or [name for name in study.models if name != base]))
    for name in chosen:
        if name not in study.models:
            hint = nearest(name, study.models)
            raise UserError(f"{where}: there is no model '{name}'.{hint}")
    if len(chosen) < 2:
        raise UserError(f"{where}: a soup needs two candidates. Name models of the study.")
    return chosen


def _check_target(study: Study, out: Path) -> None:
    """A recipe beside study.yaml that is not there yet, or an earlier soup."""
    if out.resolve().parent != study.folder.resolve() or not re.fullmatch(r".+\.yaml", out.name):
        raise UserError(
            f"-o {out}: the recipe names models of the study, so it must lie beside its "
            f"study.yaml, such as {study.folder / 'soup.yaml'}."
        )
    if out.name == "study.yaml" or not NAME.match(out.stem) or out.stem in study.models:
        raise UserError(f"-o {out}: '{out.stem}' cannot be the name of a recipe. Choose another.")
    if out.exists() and not out.read_text(encoding="utf-8").startswith(MARK):
        raise UserError(f"-o {out}: is there already, and is no soup. Choose another name.")
