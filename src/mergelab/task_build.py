"""Benchmarks as lm-eval tasks that are ready to run: file, data and shots put together, checked."""

from __future__ import annotations

import contextlib
import logging
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergelab import task_checks, task_data, task_files
from mergelab.errors import Problems, UserError
from mergelab.record import digest, file_sha256
from mergelab.study import Study, is_file
from mergelab.suites import Benchmark, Pin

SEED = 1234  # of the few-shot draw, lm-eval's default
SEEDS = (0, 1234, 1234)  # of random, numpy and torch before each task: lm-eval's own
BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".arrow": "arrow"}
BUILDERS |= {".parquet": "parquet"}


@dataclass(frozen=True)
class Work:
    """One task of a benchmark: `config` is what lm-eval takes, `files` its data by split, `hash`
    the SHA-256 of its protocol.

    `replaced` if its data is the user's own, and so must be checked item by item."""

    bench: Benchmark
    task: str
    file: task_files.TaskFile
    config: dict[str, Any]
    files: dict[str, Path]
    hash: str
    version: str
    replaced: bool
    where: str

    @property
    def name(self) -> str:
        """The benchmark, and the task where a benchmark has several."""
        many = len(self.bench.tasks) > 1
        return f"{self.bench.name}/{self.task}" if many else self.bench.name


def plan(study: Study, results: Path) -> list[Work]:
    """Everything that the suite asks to be run. Raises UserError with every mistake."""
    problems, found = Problems(), []
    for bench in study.suite:
        for pin in bench.tasks:
            try:
                found.append(work(study, bench, pin, results))
            except UserError as error:
                problems.add(str(error))
    problems.raise_if_any()
    return found


def work(study: Study, bench: Benchmark, pin: Pin, results: Path) -> Work:
    """One task of a benchmark: its YAML, on the benchmark's data and with its shots.

    Raises UserError for a task or data file that is not there."""
    file = task_files.find(study, bench, pin)
    plain, where = file.plain(), f"{study.folder}/study.yaml: benchmark '{bench.name}'"
    if plain.get("output_type") == "loglikelihood_rolling" and bench.num_fewshot:
        raise UserError(f"{where}: '{bench.task}' scores whole texts. Set num_fewshot to 0.")
    if plain.get("output_type") == "loglikelihood_rolling" and bench.chat_template:
        raise UserError(f"{where}: '{bench.task}' scores whole texts. Leave chat_template out.")
    name = pin.task.removeprefix(task_files.PREFIX)
    changes: dict[str, Any] = {"task": name, "num_fewshot": bench.num_fewshot}
    if bench.data is not None:
        files = {"test": _own_data(study, bench, where, results)}
        changes |= {"training_split": None, "validation_split": None}
        changes |= {"test_split": "test", "fewshot_split": "test"}
    else:
        files, settings = _their_data(study, bench, pin, results)
        changes |= settings
    if not bench.num_fewshot:
        changes |= {
            "training_split": None,
            "fewshot_split": None,
            "fewshot_config": {"samples": []},
        }
    elif bench.data is not None and "split" in (plain.get("fewshot_config") or {}):
        kept = {k: v for k, v in plain["fewshot_config"].items() if k != "split"}
        changes["fewshot_config"] = kept
    config = {k: v for k, v in file.ready().items() if k not in ("tag", "task_list")}
    asked = {k: v for k, v in changes.items() if k != "task"} | bench.chat
    return Work(
        bench,
        name,
        file,
        config | changes,
        files,
        digest([file.fingerprint(), asked]),
        task_files.version(plain),
        bench.data is not None,
        f"{file.path}: benchmark '{bench.name}'",
    )


def _own_data(study: Study, bench: Benchmark, where: str, results: Path) -> Path:
    """The user's file, which becomes the only split: few-shot examples leave out the item."""
    path = data_path(study, bench, results)
    if not path.is_file():
        remedy = f"Run: mergelab data {study.folder}"
        if is_file(str(bench.data)):
            remedy = f"Check 'data' of {where} (paths are relative to the study)."
        raise UserError(f"{path}: no such file. {remedy}")
    if not path.stat().st_size:
        raise UserError(f"{where}: {path} holds no items. Give the part a size in study.yaml.")
    return path


def _their_data(
    study: Study, bench: Benchmark, pin: Pin, results: Path
) -> tuple[dict[str, Path], dict[str, Any]]:
    """What `mergelab data` brought here of a task's own data, and what it changes in the task."""
    source = task_data.source(study, bench, pin)
    assert source is not None  # bench.data is None
    paths = source.paths(results)
    for path in paths.values():
        if not path.is_file():
            raise UserError(f"{path}: no such file. Run: mergelab data {study.folder}")
    shots = {"fewshot_split": bench.fewshot_split} if bench.fewshot_split else {}
    return paths, source.settings | shots


def data_path(study: Study, bench: Benchmark, results: Path) -> Path:
    """The file that a benchmark's `data` stands for."""
    data = str(bench.data)
    if is_file(data):
        return study.folder / Path(data).expanduser()
    return results / "data" / f"{data}.jsonl"


def data_hashes(study: Study, works: list[Work], results: Path) -> dict[str, str]:
    """SHA-256 of every file of items, by `data` or task and split."""
    found = {}
    for one in works:
        if one.bench.data is not None:
            found[one.bench.data] = file_sha256(data_path(study, one.bench, results))
            continue
        for split, path in one.files.items():
            found[f"{one.task}/{split}"] = file_sha256(path)
    return dict(sorted(found.items()))


def build(one: Work, cache: str) -> tuple[Any, int]:
    """The lm-eval task, and how many of its items are to be scored, from the first on.

    Its data is converted afresh in the folder `cache`. Raises UserError for an item that cannot be
    asked, or too few examples."""
    from lm_eval.tasks import TaskManager

    with task_checks.blamed(one.where):
        data = {split: _read(path, cache) for split, path in one.files.items()}
    given = {"custom_dataset": lambda **_: data, "dataset_kwargs": None}
    with _quietly(), sandbox(one), task_checks.blamed(one.where):
        if one.replaced:
            _check_names(one, data["test"].column_names)
        seed()  # process_docs may shuffle
        try:
            loaded = TaskManager(include_defaults=False).load([one.config | given])
        except Exception as error:
            fields = ", ".join(data[next(iter(data))].column_names)
            hint = " (is the first answer an index of its choices, counted from 0?)"
            raise UserError(
                f"{one.where}: lm-eval says: {type(error).__name__}: {error}"
                f"{hint if isinstance(error, IndexError) else ''}\n  Fields of the items: {fields}."
            ) from error
        task = loaded["tasks"][one.task]
        docs = task.eval_docs
        count = min(one.bench.limit or len(docs), len(docs))
        task_checks.check_shots(task, one.bench.num_fewshot, one.where)
        asked = range(count if one.replaced else min(1, count))
        task_checks.check_items(task, [docs[i] for i in asked], one.where)
        task.set_fewshot_seed(SEED)
    return task, count


def seed() -> None:
    """What is random in a task (the order of GPQA's choices) is as in a run of lm-eval of it."""
    import numpy
    import torch

    random.seed(SEEDS[0])
    numpy.random.seed(SEEDS[1])
    torch.manual_seed(SEEDS[2])


@contextlib.contextmanager
def sandbox(one: Work) -> Iterator[None]:
    """A study's own templates run in a sandbox; lm-eval's are trusted as installed."""
    with contextlib.nullcontext() if one.file.trusted else task_checks.sandboxed():
        yield


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """lm-eval warns of every default that its own files leave open."""
    chatter = logging.getLogger("lm_eval")
    level = chatter.level
    chatter.setLevel(logging.ERROR)
    try:
        yield
    finally:
        chatter.setLevel(level)


def _check_names(one: Work, fields: list[str]) -> None:
    """lm-eval takes the name of a field that is missing for the text itself; we do not.

    Fields that the task's own `process_docs` makes (HellaSwag's choices) are not in the file."""
    if one.config.get("process_docs") is not None:
        return
    values = [one.config.get(key) for key in ("doc_to_text", "doc_to_target", "doc_to_choice")]
    names = [v for v in values if isinstance(v, str) and re.fullmatch(r"[A-Za-z_]\w*", v)]
    if missing := [name for name in names if name not in fields]:
        raise UserError(
            f"{one.where}: the items of {one.bench.data} have no field {', '.join(missing)}, which "
            f"the task reads.\n  Their fields: {', '.join(fields)}. Rename them, or write a task "
            "of your own in tasks/NAME.yaml."
        )


def _read(path: Path, cache: str) -> Any:
    """A file of items as a dataset."""
    import datasets

    return datasets.load_dataset(
        BUILDERS[path.suffix], data_files=str(path.resolve()), split="train", cache_dir=cache
    )
