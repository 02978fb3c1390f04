"""Scores: lm-eval on a model folder, kept per item, summed up with 95 % intervals."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergelab import (
    aggregates,
    inference,
    items,
    score_table,
    statistics,
    suites,
    task_build,
)
from mergelab.answers import Answers, NotFinite, remembering
from mergelab.checkpoint import Checkpoint, open_checkpoint
from mergelab.errors import UserError
from mergelab.progress import bar
from mergelab.record import (
    digest,
    file_entries,
    file_sha256,
    packages,
    write_bytes,
    write_json,
)
from mergelab.score_table import Row, table
from mergelab.study import Study
from mergelab.suites import Benchmark
from mergelab.task_build import Work

__all__ = ["VERSION", "evaluate", "table"]

VERSION = 3


@dataclass(frozen=True)
class Run:
    """A finished task: its rows, lm-eval's own `values` by metric, and the main `metric`."""

    work: Work
    rows: list[Row]
    values: dict[str, float]
    metric: str
    higher_is_better: bool


def evaluate(study: Study, variant: str, folder: Path, results: Path) -> dict[str, Any]:
    """Score the model in `folder` on every benchmark of the suite; only what was never asked of
    these weights is asked of the model.

    Writes results/scores/<variant>.parquet (see score_table) and .json; returns what belongs in
    the record. Raises UserError for a task, data file, item or metric that is no good, before the
    model is loaded. An interruption keeps every answer in results/scores/runs."""
    started = time.perf_counter()
    place = results / "scores"
    with inference.quiet(offline=True):
        works = task_build.plan(study, results)
        checkpoint = open_checkpoint(folder, variant)
        tokenizer = inference.load_tokenizer(folder)
        chat = _chat(study, variant, tokenizer)
        dtype, hashes = inference.stored_dtype(checkpoint), inference.model_hashes(checkpoint)
        answers = Answers(place / "runs" / _model_key(checkpoint, tokenizer, hashes, dtype))
        try:
            runs = _run(checkpoint, variant, tokenizer, works, answers)
        finally:
            answers.save()
        answers.join()
    content = score_table.encode(score_table.shared([row for run in runs for row in run.rows]))
    whole = score_table.decode(content)
    benchmarks = {
        bench.name: _summary(bench, runs, whole) | (chat if bench.chat_template else {})
        for bench in study.suite
    }
    versions, tasks = packages(), {run.work.name: run.work.hash for run in runs}
    output = {
        "benchmarks": benchmarks,
        "suites": _suites(study, benchmarks, whole),
        "lm_eval": versions["lm-eval"],
        "dtype": dtype,
    }
    write_bytes(place / f"{variant}.parquet", content)
    write_json(place / f"{variant}.json", output)
    return {
        "variant": variant,
        "inputs": {"model": hashes, "data": task_build.data_hashes(study, works, results)},
        "settings": {"dtype": dtype, "tasks": tasks, **chat},
        "versions": {"scores": VERSION, "statistics": statistics.VERSION, "packages": versions},
        "outputs": file_entries(place, [f"{variant}.json", f"{variant}.parquet"]),
        "seconds": round(time.perf_counter() - started, 2),
    }


def _chat(study: Study, variant: str, tokenizer: Any) -> dict[str, str]:
    """The SHA-256 of the chat template, where the suite asks for it, by lm-eval's name.

    Raises UserError if the model has none."""
    asking = [bench.name for bench in study.suite if bench.chat_template]
    if not asking:
        return {}
    template = inference.chat_template(tokenizer)
    if template is None:
        raise UserError(
            f"{study.folder}/study.yaml: benchmark '{asking[0]}' asks for the chat template, and "
            f"{variant} has none (chat_template.jinja, or chat_template in tokenizer_config.json)."
            "\n  Leave chat_template out, or give the model one (a recipe's chat_template)."
        )
    return {"chat_template_sha": hashlib.sha256(template.encode()).hexdigest()}


def _model_key(
    checkpoint: Checkpoint, tokenizer: Any, hashes: Mapping[str, str], dtype: str
) -> str:
    """16 digits that stand for everything that an answer depends on, but for the request."""
    import torch

    generation = checkpoint.folder / "generation_config.json"  # penalties, stop tokens
    return digest(
        {
            "weights": dict(hashes),
            "generation": file_sha256(generation) if generation.is_file() else "",
            "tokenizer": inference.tokenizer_hash(tokenizer),
            "special": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
            "length": inference.max_length(checkpoint.folder, tokenizer),
            "dtype": dtype,
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "lm_eval": packages()["lm-eval"],
            "version": VERSION,
        }
    )[:16]


def _run(
    checkpoint: Checkpoint, variant: str, tokenizer: Any, works: Sequence[Work], answers: Answers
) -> list[Run]:
    """Every task of the suite, one after the other: a task's score never depends on the others."""
    with tempfile.TemporaryDirectory(prefix="mergelab-") as cache:
        built = [task_build.build(one, cache) for one in works]
        tasks = [task for task, _ in built]
        metrics = [score_table.planned(*pair) for pair in zip(works, tasks, strict=True)]
        total = sum(
            count * _requests(one, task) for one, (task, count) in zip(works, built, strict=True)
        )
        with bar(f"evaluate {variant}", total, "answers") as progress:
            model = remembering(lambda: inference.load(checkpoint), tokenizer, answers, progress)
            return [
                _score(one, *task, metric, model, variant, answers)
                for one, task, metric in zip(works, built, metrics, strict=True)
            ]


def _requests(one: Work, task: Any) -> int:
    """Model calls per item: one per choice, judged by the first item."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return 1
    with task_build.sandbox(one):
        return len(task.doc_to_choice(task.eval_docs[0]))


def _score(
    one: Work, task: Any, count: int, metric: str, model: Any, variant: str, answers: Answers
) -> Run:
    """Run one task: its rows, and lm-eval's own value of every metric.

    Raises UserError if the value of the main `metric` is not the mean of the rows."""
    from lm_eval.evaluator import evaluate as lm_evaluate

    task_build.seed()
    try:
        with task_build.sandbox(one):
            found = lm_evaluate(
                model,
                {"tasks": {one.task: task}, "groups": {}},
                limit=count,
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=one.bench.chat_template,
                fewshot_as_multiturn=one.bench.chat.get("fewshot_as_multiturn", False),
            )
    except NotFinite:
        raise score_table.not_finite(variant, one.bench.name, 0) from None
    answers.save()
    samples = found["samples"][one.task]
    first = samples[0]["filter"]
    values = {
        score_table.label(name, kind, first): float(value)
        for key, value in found["results"][one.task].items()
        if "," in key and "_stderr," not in key
        for name, _, kind in [key.partition(",")]
    }
    score_table.check_name(one, metric, list(values))
    rows = score_table.rows(one, samples, variant)
    score_table.check_mean(one, metric, values[metric], rows)
    return Run(one, rows, values, metric, bool(task.higher_is_better()[metric.partition(",")[0]]))


def _summary(bench: Benchmark, runs: Sequence[Run], whole: Any) -> dict[str, Any]:
    """A benchmark's value with its interval, and its protocol; `whole` is the table of scores.

    Of one task the value is lm-eval's own, of several that of the items (see Benchmark)."""
    own = [run for run in runs if run.work.bench is bench]
    first, metric = own[0], own[0].metric
    counted = items.items_of(whole, bench, metric)
    assert counted is not None  # every run has rows of the metric
    found = aggregates.score(counted.parts)
    hashes = sorted(run.work.hash for run in own)
    if len(own) == 1:
        more = {"value": first.values[metric], "metrics": first.values, "task_hash": hashes[0]}
    else:
        more = {
            "metrics": {metric: found["value"]},
            "tasks": {run.work.task: run.values[metric] for run in own},
            "combine": bench.combine,
            "task_hash": digest(hashes),
        }
    return {
        **found,
        "metric": metric,
        "higher_is_better": first.higher_is_better,
        "chance": score_table.chance(bench, [(run.work, run.rows) for run in own], metric),
        "num_fewshot": bench.num_fewshot,
        **bench.chat,
        "task": bench.task,
        "task_version": ", ".join(sorted({run.work.version for run in own})),
        **more,
    }


def _suites(study: Study, benchmarks: Mapping[str, Any], whole: Any) -> dict[str, Any]:
    """The number that each suite of the study sums up to, as its leaderboard makes it."""
    found = {}
    for name in dict.fromkeys(bench.suite for bench in study.suite if bench.suite):
        suite = suites.load_suite(name)
        benches = [bench for bench in study.suite if bench.suite == name]
        counted = items.suite_items(whole, benches, benchmarks, suite.aggregate)
        assert counted is not None  # every benchmark was just scored
        found[name] = {
            **aggregates.score(counted.parts),
            "aggregate": suite.aggregate,
            "of": [bench.name for bench in benches],
            "version": suite.version,
        }
    return found
