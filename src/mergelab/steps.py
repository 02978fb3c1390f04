"""The steps of a study and their content keys: what the Snakefile asks for.

A key is a hash of what a step was asked for: texts of recipe and settings, keys of the steps before
it, versions of method and code (of other packages only lm-eval's: records name them). Targets carry
it in their names, so that a result is current or absent, whatever the files' times say."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mergelab import (
    audit,
    datasets,
    detectors,
    engine,
    evidence,
    locate,
    lockfile,
    models,
    policy,
    report,
    scores,
    statistics,
    task_build,
    task_data,
    task_files,
    training,
    views,
)
from mergelab.claims.file import load_claims
from mergelab.errors import Problems, UserError
from mergelab.recipe import load_recipe
from mergelab.record import digest, file_sha256
from mergelab.structure import Recipe
from mergelab.study import CLAIMS, TASK_DATA, Study, is_file
from mergelab.suites import Benchmark

LINE = re.compile(r":\d+\Z")  # of the file that a claim stands in: it may move


@dataclass(frozen=True)
class Step:
    """One job: a verb of the CLI on a name, its content key, and the steps it needs."""

    verb: str
    name: str
    key: str
    needs: tuple[tuple[str, str], ...]

    @property
    def record(self) -> str:
        """File name of its record."""
        return f"{self.verb}-{self.name}.{self.key}.json"


class Steps:
    """Every step of a study, by (verb, name).

    Raises UserError with every mistake in the study's recipes."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.all: dict[tuple[str, str], Step] = {}
        self.recipes = _load_all(study.recipes)
        _check_outside(study)
        policy.check(study)
        for name in study.datasets:
            self.data(name)
        if sources := task_data.sources(study):
            content = [[asdict(source) for source in sources], task_data.VERSION]
            self.add("data", TASK_DATA, content, [])
        for name in (*study.models, *self.recipes):
            self.variant(name)
        for name in (*study.models, *self.recipes):
            self.measure(name)
        for name in (*study.models, *self.recipes):
            self.judge(name)
        everything = [key for key in self.all if key[0] in ("evaluate", "detect")]
        merges = [("merge", name) for name in self.recipes]
        everything += self.audit([*everything, *merges])
        page = [study.title, study.about, report.VERSION, _text(study.folder / "study.yaml")]
        self.add("report", study.name, page, [*everything, *merges])

    def add(
        self, verb: str, name: str, content: Any, needs: Iterable[tuple[str, str]]
    ) -> tuple[str, str]:
        """Note a step. Its key's first half covers `content`, the second the keys of what it needs,
        so that `mergelab status` can tell which of the two changed."""
        wanted = tuple(dict.fromkeys(needs))
        own, given = digest([verb, name, content]), digest([self.all[n].key for n in wanted])
        key = own[:6] + given[:6]
        self.all[verb, name] = Step(verb, name, key, wanted)
        return verb, name

    def data(self, name: str) -> tuple[str, str]:
        """A dataset's parts."""
        dataset = self.study.datasets[name]
        wheel = self.study.wheels.get(dataset.wheel or "")
        local = _local_files(self.study, name)
        content = [asdict(dataset), list(dataset.parts), wheel and asdict(wheel), local]
        return self.add("data", name, [content, datasets.VERSION], [])

    def tasks(self, bench: Benchmark) -> list[Any]:
        """What fixes a benchmark beside its entry: its tasks' files, and its own file of items."""
        found: list[Any] = [
            task_files.find(self.study, bench, p).fingerprint() for p in bench.tasks
        ]
        if bench.data and is_file(bench.data):
            found.append(file_sha256(task_build.data_path(self.study, bench, Path())))
        return found

    def part(self, part: str) -> tuple[str, str]:
        """The step that makes a part such as gsm8k/fresh."""
        return ("data", part.partition("/")[0])

    def variant(self, name: str) -> tuple[str, str]:
        """The step that makes a model or merge."""
        if name in self.recipes:
            return self.merge(name)
        model = self.study.models[name]
        verb = "train" if model.train else "fetch"
        if (verb, name) in self.all:
            return verb, name
        content: Any = asdict(model)
        del content["push"]  # changes no byte of it
        content["path"] = None  # what lies there counts, wherever it lies
        needs: list[tuple[str, str]] = []
        if model.train:
            needs = [self.part(share.part) for share in model.train.data]
            needs += [self.variant(model.train.start)] if model.train.start else []
            version = training.VERSION
        else:
            version = models.VERSION
            content = [content, self.pin(name)]
        return self.add(verb, name, [content, version], needs)

    def pin(self, name: str) -> Any:
        """What fixes the bytes of a model that is not trained."""
        model = self.study.models[name]
        if model.hub is not None:
            return lockfile.resolve(model.hub, self.study.lock).commit
        if model.path is not None:
            folder = models.folder(self.study, name, Path())
            return models.fingerprint(folder) if folder.is_dir() else None
        wheel = model.gguf.wheel if model.gguf else None
        return asdict(self.study.wheels[wheel]) if wheel else None

    def merge(self, name: str, above: tuple[str, ...] = ()) -> tuple[str, str]:
        """A merge, after the models and merges that its recipe names."""
        if ("merge", name) in self.all:
            return "merge", name
        recipe = self.recipes[name]
        if name in above:
            circle = " > ".join((*above, name))
            raise UserError(f"{recipe.path}: recipes use each other in a circle: {circle}.")
        needs, content = [], [recipe.text, recipe.method.version, engine.VERSION]
        for named in recipe.models:
            model, adapter = locate.parts(named, recipe, self.study)
            if model.startswith(locate.PREFIX):
                other = model.removeprefix(locate.PREFIX)
                if other not in self.recipes:
                    raise UserError(f"{recipe.path}: there is no recipe '{other}' in this study.")
                needs.append(self.merge(other, (*above, name)))
            elif model in self.study.models:
                needs.append(self.variant(model))
            else:
                content.append(locate.fixed(model, recipe, self.study))
            if adapter:
                content.append(locate.fixed(adapter, recipe, self.study))
        if ids := locate.direct(recipe, self.study):
            commits = [lockfile.resolve(hub_id, self.study.lock).commit for hub_id in ids]
            needs.append(self.add("fetch", name, [ids, commits, models.VERSION], []))
        return self.add("merge", name, content, needs)

    def measure(self, name: str) -> None:
        """Scores and evidence of one variant."""
        study, made = self.study, self.variant(name)
        tasks = [[bench.content(), self.tasks(bench)] for bench in study.suite]
        used = [self.part(b.data) for b in study.suite if b.data and not is_file(b.data)]
        used += [("data", TASK_DATA)] if ("data", TASK_DATA) in self.all else []
        version = [scores.VERSION, statistics.VERSION, importlib.metadata.version("lm-eval")]
        if study.suite:
            self.add("evaluate", name, [tasks, version], [made, *used])
        wanted = views.wanted(study)
        if wanted:
            needed = [self.part(part) for part, _ in wanted]
            self.add("probe", name, [wanted, evidence.VERSION], [made, *needed])

    def audit(self, needs: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """The audit, if the study says what was claimed of its models."""
        if not (self.study.folder / CLAIMS).is_file():
            return []
        found = load_claims(self.study.folder)
        said = [replace(c, source="") if LINE.search(c.source) else c for c in found.claims]
        content: list[Any] = [found.title, [asdict(claim) for claim in said]]
        content.append([asdict(order) for order in found.comparisons])
        if self.study.policy.asks:
            content.append([policy.rows(self.study), asdict(policy.whole(self.study)[0])])
        return [self.add("audit", self.study.name, [content, audit.VERSION], needs)]

    def judge(self, name: str) -> None:
        """Findings of one variant, after everything that its checks' detectors look at."""
        study, wanted = self.study, [self.variant(name)]
        if not study.contamination:
            return
        used: dict[str, detectors.Detector] = {}
        for check in study.contamination:
            where = detectors.place(study, check)
            own = {known: detectors.find(known, where) for known in check.detectors}
            used |= own
            needs = {need for detector in own.values() for need in detector.needs}
            scored = detectors.scored(check, needs, name)
            wanted += [("evaluate", model) for model in scored]
            wanted += [self.part(check.suspects), self.part(check.controls)]
            wanted += [("probe", model) for model in (name, check.base, *check.siblings)]
        if any("corpus" in detector.needs for detector in used.values()):
            wanted += [self.part(part) for part in _training_parts(study)]
        checks = [asdict(check) for check in study.contamination]
        known = [
            detectors.VERSION,
            statistics.VERSION,
            *sorted((n, d.version) for n, d in used.items()),
        ]
        self.add("detect", name, [checks, known], [step for step in wanted if step in self.all])


def _check_outside(study: Study) -> None:
    """Do the tasks, detectors, local models and local items that study.yaml names exist?"""
    problems, where = Problems(), study.folder / "study.yaml"
    for bench in study.suite:
        try:
            for pin in bench.tasks:
                task_files.find(study, bench, pin).plain()
        except UserError as error:
            problems.add(str(error))
        if bench.data and is_file(bench.data):
            path = task_build.data_path(study, bench, Path())
            if not path.is_file():
                problems.add(f"{where}: benchmark '{bench.name}': {path}: no such file.")
    for text in detectors.problems(study):
        problems.add(text)
    for name, model in study.models.items():
        if model.path is not None:
            try:
                models.existing(study, name, Path())
            except UserError as error:
                problems.add(str(error))
    for name, dataset in study.datasets.items():
        for file in dataset.files if dataset.path is not None else ():
            path = study.folder / Path(str(dataset.path)).expanduser() / file
            if not path.is_file():
                problems.add(f"{where}: dataset '{name}': {path}: no such file.")
    problems.raise_if_any()


def _training_parts(study: Study) -> list[str]:
    """The parts that models of the study were trained on, here or as declared."""
    trained = [m.train.data for m in study.models.values() if m.train]
    declared = [part for model in study.models.values() for part in model.declared]
    return sorted({*declared, *(share.part for shares in trained for share in shares)})


def _load_all(paths: Iterable[Path]) -> dict[str, Recipe]:
    problems, recipes = Problems(), {}
    for path in paths:
        try:
            recipes[path.stem] = load_recipe(path)
        except UserError as error:
            problems.add(str(error))
    problems.raise_if_any()
    return recipes


def _local_files(study: Study, name: str) -> list[str]:
    """Hashes of the files of a dataset that lies in a local folder."""
    dataset = study.datasets[name]
    if dataset.path is None:
        return []
    files = [study.folder / Path(dataset.path).expanduser() / file for file in dataset.files]
    return [file_sha256(file) if file.is_file() else "missing" for file in files]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")
