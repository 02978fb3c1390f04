"""study.yaml, read strictly: every mistake with its line, and every name that must exist."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergelab import suites
from mergelab.errors import UserError, nearest
from mergelab.study import (
    CLAIMS,
    NAME,
    SOURCES,
    TASK_DATA,
    Check,
    Dataset,
    Gguf,
    Model,
    Options,
    Policy,
    Share,
    Study,
    Training,
    Wheel,
    is_file,
)
from mergelab.suites import CHAT, Benchmark
from mergelab.yamlfile import REQUIRED, Map, Reader, load

KEYS = ("title", "about", "wheels", "datasets", "models", "suite", "contamination", "policy")
NO_RECIPES = ("study.yaml", CLAIMS)
SHA256 = re.compile(r"[0-9a-f]{64}\Z")
LEAST_VOCABULARY = 64  # tokens; fewer is a slip of the pen
LOSSES = ("all", "answer")
HIGHEST_RATE = 100  # of learning; AdamW moves each weight by about this much per step


def load_study(folder: Path) -> Study:
    """Read `folder`/study.yaml. Raises UserError with every mistake, each with file and line."""
    path = folder / "study.yaml"
    top = load(path)
    reader = _StudyReader(path)
    reader.keys(top, KEYS, "a study")
    study = Study(
        name=folder.resolve().name,
        folder=folder,
        title=reader.text(top, "title"),
        about=reader.text(top, "about", ""),
        wheels={n: reader.wheel(m) for n, m in reader.named(top, "wheels")},
        datasets={n: reader.dataset(n, m) for n, m in reader.named(top, "datasets")},
        models={n: reader.model(n, m) for n, m in reader.named(top, "models")},
        suite=tuple(b for m in reader.maps(top, "suite", None) for b in reader.benchmarks(m)),
        contamination=tuple(reader.check(m) for m in reader.maps(top, "contamination", None)),
        recipes=tuple(sorted(p for p in folder.glob("[!.]*.yaml") if p.name not in NO_RECIPES)),
        policy=reader.policy(reader.map(top, "policy", None)),
    )
    for text in (study.name, *(recipe.stem for recipe in study.recipes)):
        if not NAME.match(text):
            reader.wrong(1, f"'{text}': names of folder and recipes: letters, digits, _ . - only.")
    reader.problems.raise_if_any()
    _References(reader, top, study).check()
    reader.problems.raise_if_any()
    return study


class _StudyReader(Reader):
    """One method per part of study.yaml."""

    def named(self, top: Map, key: str) -> list[tuple[str, Map]]:
        section = self.map(top, key, None)
        for name, value in section.items():
            if not NAME.match(name):
                self.wrong(section.lines[name], f"'{name}' is no name: use letters, digits, _ . -")
            if not isinstance(value, Map):
                self.wrong(section.lines[name], f"'{name}' must be a mapping (key: value).")
        return [(name, value) for name, value in section.items() if isinstance(value, Map)]

    def name(self, map: Map, key: str, default: Any) -> Any:
        value = self.text(map, key, default)
        if value is not None and not NAME.match(value):
            line = map.lines.get(key, map.line)
            self.wrong(line, f"'{value}' is no name: use letters, digits, _ . -")
        return value

    def sha256(self, map: Map) -> str:
        value = self.text(map, "sha256")
        if value is not None and not SHA256.match(value):
            self.wrong(map.lines["sha256"], "'sha256' must be 64 lower-case hexadecimal digits.")
        return str(value)

    def wheel(self, map: Map) -> Wheel:
        self.keys(map, ("requirement", "sha256"), "a wheel")
        requirement = self.text(map, "requirement")
        if requirement is not None and not re.fullmatch(r"[\w.-]+==[\w.+!-]+", requirement):
            self.wrong(map.lines["requirement"], "'requirement' must be pinned: name==version.")
        return Wheel(str(requirement), self.sha256(map))

    def one_of(self, map: Map, kinds: tuple[str, ...], what: str) -> None:
        given = [kind for kind in kinds if map.get(kind) is not None]
        if len(given) != 1:
            self.wrong(map.line, f"{what} needs exactly one of {', '.join(kinds)}.")

    def dataset(self, name: str, map: Map) -> Dataset:
        known = ("wheel", "path", "hub", "files", "text", "parts", "answer", "twin", "options")
        self.keys(map, known, "a dataset")
        self.one_of(map, ("wheel", "path", "hub"), f"dataset '{name}'")
        parts = self.map(map, "parts")
        for part, size in parts.items():
            if not NAME.match(part):
                self.wrong(parts.lines[part], f"'{part}' is no name: use letters, digits, _ . -")
            if size != "rest" and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
                self.wrong(parts.lines[part], f"part '{part}' must be a number of items or 'rest'.")
        return Dataset(
            name,
            self.text(map, "wheel", None),
            self.text(map, "path", None),
            self.text(map, "hub", None),
            self.texts(map, "files"),
            self.text(map, "text"),
            {part: size if isinstance(size, int) else None for part, size in parts.items()},
            self.text(map, "answer", None),
            self.text(map, "twin", None),
            self.options(self.map(map, "options")) if "options" in map else None,
        )

    def options(self, map: Map) -> Options:
        self.keys(map, ("question", "choices"), "options")
        return Options(self.text(map, "question"), self.texts(map, "choices"))

    def model(self, name: str, map: Map) -> Model:
        self.keys(map, (*SOURCES, "dtype", "declared", "push"), "a model")
        self.one_of(map, SOURCES, f"model '{name}'")
        dtype = self.text(map, "dtype", None)
        if dtype not in (None, "float32", "float16", "bfloat16"):
            self.wrong(map.lines["dtype"], f"dtype '{dtype}' is not float32, float16 or bfloat16.")
        return Model(
            name,
            self.training(self.map(map, "train")) if "train" in map else None,
            self.text(map, "hub", None),
            self.text(map, "path", None),
            self.gguf(self.map(map, "gguf")) if "gguf" in map else None,
            dtype,
            self.texts(map, "declared", None),
            self.push(map),
        )

    def push(self, map: Map) -> bool:
        if "push" in map and not {"hub", "gguf"} & map.keys():
            self.wrong(map.lines["push"], "'push' is for fetched models (hub or gguf).")
        return bool(self.get(map, "push", bool, False))

    def gguf(self, map: Map) -> Gguf:
        self.keys(map, ("wheel", "file", "path", "sha256"), "a gguf model")
        self.one_of(map, ("wheel", "path"), "a gguf model")
        needs = "file" if "wheel" in map else "path"
        self.text(map, needs)
        wheel, file = self.text(map, "wheel", None), self.text(map, "file", None)
        return Gguf(wheel, file, self.text(map, "path", None), self.sha256(map))

    def training(self, map: Map) -> Training:
        known = ("start", "architecture", "data", "epochs", "learning_rate", "batch_size")
        self.keys(map, (*known, "sequence_length", "seed"), "train")
        self.one_of(map, ("start", "architecture"), "train")
        architecture = self.map(map, "architecture") if "architecture" in map else None
        if architecture is not None:
            self.count(architecture, "vocab_size", None, least=LEAST_VOCABULARY)
        return Training(
            self.text(map, "start", None),
            dict(architecture) if architecture is not None else None,
            tuple(self.share(share) for share in self.maps(map, "data")),
            self.count(map, "epochs", 1, least=1),
            self.rate(map, "learning_rate"),
            self.count(map, "batch_size", 16, least=1),
            self.count(map, "sequence_length", 256, least=8),
            self.count(map, "seed", 0),
        )

    def rate(self, map: Map, key: str) -> Any:
        value = self.number(map, key)
        if value is not None and not 0 < value <= HIGHEST_RATE:
            limits = f"above 0 and at most {HIGHEST_RATE}"
            self.wrong(map.lines[key], f"'{key}' must be {limits}, not {map[key]!r}.")
        return value

    def share(self, map: Map) -> Share:
        known = ("part", "items", "skip", "copies", "field", "loss")
        self.keys(map, known, "a share of training data")
        items = self.count(map, "items", None, least=1)
        skip, copies = self.count(map, "skip", 0), self.count(map, "copies", 1, least=1)
        field = self.choice(map, "field", ("text", "twin"))
        return Share(
            self.text(map, "part"), items, skip, copies, field, self.choice(map, "loss", LOSSES)
        )

    def choice(self, map: Map, key: str, known: tuple[str, ...]) -> str:
        """One of `known`, the first if it is not given."""
        value = self.text(map, key, known[0])
        if value not in known:
            self.wrong(map.lines[key], f"'{key}' must be {' or '.join(known)}, not '{value}'.")
        return str(value)

    def benchmarks(self, map: Map) -> list[Benchmark]:
        """The benchmark of an entry of `suite`, or all of the suite that it names."""
        if "suite" not in map:
            return [self.benchmark(map)]
        self.keys(map, ("suite", "limit", "wheels", *CHAT), "a suite entry")
        limit = self.count(map, "limit", None, least=1)
        wheels = bool(self.get(map, "wheels", bool, False))
        try:
            found = suites.load_suite(self.text(map, "suite")).benchmarks
        except UserError as error:
            self.wrong(map.lines["suite"], str(error))
            return []
        chat = self.chat(map)
        return [replace(bench, limit=limit, wheels=wheels, **chat) for bench in found]

    def benchmark(self, map: Map) -> Benchmark:
        known = ("name", "task", "data", "limit", "num_fewshot", "metric", "wheels")
        self.keys(map, (*known, *CHAT), "a benchmark")
        task = self.text(map, "task")
        name = self.name(map, "name", str(task).removeprefix("lm_eval/"))
        limit = self.count(map, "limit", None, least=1)
        data, metric = self.text(map, "data", None), self.text(map, "metric", None)
        wheels = bool(self.get(map, "wheels", bool, False))
        if wheels and data is not None:
            self.wrong(map.lines["wheels"], "'wheels' and 'data' exclude each other.")
        shots = self.count(map, "num_fewshot", 0)
        chat = self.chat(map)
        return Benchmark(name, str(task), data, limit, shots, metric, wheels=wheels, **chat)

    def chat(self, map: Map) -> dict[str, Any]:
        """Whether and how prompts become chats."""
        template = bool(self.get(map, "chat_template", bool, False))
        if "fewshot_as_multiturn" in map and not template:
            line = map.lines["fewshot_as_multiturn"]
            self.wrong(line, "'fewshot_as_multiturn' needs chat_template: true.")
        turns = bool(self.get(map, "fewshot_as_multiturn", bool, True))
        return {"chat_template": template, "fewshot_as_multiturn": turns}

    def policy(self, map: Map) -> Policy:
        known = ("allow_merged_parents", "max_merge_depth", "deny_taint", "allow_unknown")
        self.keys(map, known, "policy")
        return Policy(
            bool(self.get(map, "allow_merged_parents", bool, True)),
            self.count(map, "max_merge_depth", None, least=1),
            self.texts(map, "deny_taint", None),
            bool(self.get(map, "allow_unknown", bool, True)),
        )

    def check(self, map: Map) -> Check:
        known = ("benchmark", "base", "suspects", "controls", "detectors", "planted", "siblings")
        self.keys(map, (*known, "scores", "twin"), "a contamination check")
        return Check(
            self.name(map, "benchmark", REQUIRED),
            self.text(map, "base"),
            self.text(map, "suspects"),
            self.text(map, "controls"),
            self.texts(map, "detectors"),
            self.texts(map, "planted", None),
            self.texts(map, "siblings", None),
            self.text(map, "scores", None),
            self.text(map, "twin", None),
        )


class _References:
    """Does every name that a part of the study uses exist?"""

    def __init__(self, reader: Reader, top: Map, study: Study) -> None:
        self.reader, self.top, self.study = reader, top, study

    def check(self) -> None:
        study, sections = self.study, self.top
        for name, dataset in study.datasets.items():
            if name == TASK_DATA:
                line = sections["datasets"][name].line
                self.reader.wrong(line, f"'{name}' is the place of lm-eval's data. Rename it.")
            if dataset.wheel is not None:
                self.known(dataset.wheel, study.wheels, "wheel", sections["datasets"][name].line)
        for name, model in study.models.items():
            line = sections["models"][name].line
            if model.gguf and model.gguf.wheel is not None:
                self.known(model.gguf.wheel, study.wheels, "wheel", line)
            if model.train:
                self.training(name, model.train, line)
            for part in model.declared:
                self.part(part, line)
        own = [map for map in sections.get("suite") or () if "suite" not in map]
        benches = [bench for bench in study.suite if bench.suite is None]
        for bench, map in zip(benches, own, strict=True):
            if bench.data is not None and not is_file(bench.data):
                self.part(bench.data, map.line)
        for key, names in (
            ("suite", [bench.name for bench in study.suite]),
            ("contamination", [check.benchmark for check in study.contamination]),
        ):
            for name in dict.fromkeys(n for n in names if names.count(n) > 1):
                self.reader.wrong(sections.lines[key], f"'{name}' stands twice in '{key}'.")
        checks = sections.get("contamination") or ()
        for check, map in zip(study.contamination, checks, strict=True):
            self.part(check.suspects, map.line)
            self.part(check.controls, map.line)
            for model_name in (check.base, *check.planted, *check.siblings):
                self.known(model_name, study.models, "model", map.line)
            for bench_name in (check.scores, check.twin):
                if bench_name is not None:
                    names = [bench.name for bench in study.suite]
                    self.known(bench_name, names, "benchmark", map.line)
        for path in study.recipes:
            if path.stem in study.models:
                line = sections["models"].lines[path.stem]
                self.reader.wrong(line, f"'{path.stem}' is the name of a recipe ({path}) too.")

    def training(self, name: str, train: Training, line: int) -> None:
        for share in train.data:
            self.part(share.part, line)
            self.templates(share, line)
        seen, start = {name}, train.start
        while start is not None:
            self.known(start, self.study.models, "model", line)
            if start in seen:
                self.reader.wrong(line, f"model '{name}' starts from itself.")
                return
            seen.add(start)
            model = self.study.models.get(start)
            start = model.train.start if model and model.train else None

    def templates(self, share: Share, line: int) -> None:
        """Does the share's dataset have the templates that its field and loss ask for?"""
        dataset = self.study.datasets.get(share.part.partition("/")[0])
        wanted = {"twin": share.field == "twin", "answer": share.loss == "answer"}
        for name in (name for name, asked in wanted.items() if asked):
            if dataset is not None and getattr(dataset, name) is None:
                what = f"training on the {name} of '{share.part}' needs '{name}': add this template"
                self.reader.wrong(line, f"{what} to dataset '{dataset.name}'.")

    def known(self, name: str, names: Any, what: str, line: int) -> None:
        if name not in names:
            hint = nearest(name, names)
            self.reader.wrong(line, f"there is no {what} '{name}' in this study.{hint}")

    def part(self, part: str, line: int) -> None:
        names = [f"{d.name}/{p}" for d in self.study.datasets.values() for p in d.parts]
        self.known(part, names, "part of a dataset", line)
