"""Scores: lm-eval on a model folder, kept per sample, summed up with 95 % intervals."""

from __future__ import annotations

import json
import logging
import math
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergelab import inference, statistics, task_checks, yamlfile
from mergelab.checkpoint import open_checkpoint
from mergelab.errors import UserError, nearest
from mergelab.progress import Bar, bar
from mergelab.record import (
    canonical,
    digest,
    file_entries,
    file_sha256,
    packages,
    write_bytes,
    write_json,
)
from mergelab.study import Benchmark, Study

VERSION = 1
TASKS = Path(__file__).parent / "tasks"
SEED = 1234  # of the few-shot draw, lm-eval's default
PROMPT_TOKENS = 256  # assumed per prompt when the batch size is chosen

Sample = dict[str, Any]


def evaluate(study: Study, variant: str, folder: Path, results: Path) -> dict[str, Any]:
    """Score the model in `folder` on every benchmark of the suite, in one load.

    Writes results/scores/<variant>/<benchmark>.jsonl and results/scores/<variant>.json; returns
    what belongs in the record. Raises UserError for a task or data file that is not there,
    before the model is loaded."""
    started = time.perf_counter()
    tasks = {bench.name: task_config(study, bench, results) for bench in study.suite}
    if len(tasks) < len(study.suite):
        raise UserError(f"{study.folder}/study.yaml: two benchmarks have one name. Rename one.")
    hashes = {name: task_hash(config) for name, config in tasks.items()}
    offline = all(config["dataset_path"] in task_checks.LOCAL for config in tasks.values())
    checkpoint = open_checkpoint(folder, variant)
    with inference.quiet(offline=offline):
        loaded = inference.load(checkpoint)
        logged = _run(loaded, study, tasks)
    place = results / "scores"
    summary: dict[str, Any] = {}
    for bench in study.suite:
        samples = _samples(bench, logged[bench.name], variant)
        lines = "".join(canonical(sample) + "\n" for sample in samples)
        write_bytes(place / variant / f"{bench.name}.jsonl", lines.encode())
        summary[bench.name] = summarise(samples) | {
            "num_fewshot": bench.num_fewshot,
            "task": bench.task,
            "task_hash": hashes[bench.name],
        }
    versions = packages()
    output = {"benchmarks": summary, "lm_eval": versions["lm-eval"], "dtype": loaded.dtype}
    write_json(place / f"{variant}.json", output)
    names = [f"{variant}.json", *(f"{variant}/{bench.name}.jsonl" for bench in study.suite)]
    return {
        "variant": variant,
        "inputs": {"model": inference.model_hashes(checkpoint), "data": _data(study, results)},
        "settings": {"dtype": loaded.dtype, "device": loaded.device, "tasks": hashes},
        "versions": {"scores": VERSION, "statistics": statistics.VERSION, "packages": versions},
        "outputs": file_entries(place, names),
        "seconds": round(time.perf_counter() - started, 2),
    }


def task_config(study: Study, bench: Benchmark, results: Path) -> dict[str, Any]:
    """The lm-eval task of a benchmark: its YAML file, renamed, on the benchmark's own data.

    Files in the study's folder tasks/ come before the package's. Without `data` the file's own
    dataset_path stands, which must then be a hub dataset at a pinned revision."""
    config = task_file(study, bench)
    config |= {"task": bench.name, "num_fewshot": bench.num_fewshot}
    where = f"{study.folder}/study.yaml: benchmark '{bench.name}'"
    if config["output_type"] == "loglikelihood_rolling" and bench.num_fewshot:
        raise UserError(f"{where}: '{bench.task}' scores whole texts. Set num_fewshot to 0.")
    if bench.data is not None:
        path = results / "data" / f"{bench.data}.jsonl"
        if not path.is_file():
            raise UserError(f"{path}: no such file. Run: mergelab data {study.folder}")
        if not path.stat().st_size:
            raise UserError(f"{where}: {path} holds no items. Give the part a size in study.yaml.")
        return config | _on_file(path)
    if config.get("dataset_path", "json") in task_checks.LOCAL:
        raise UserError(f"{where}: task '{bench.task}' reads local items. Add data: DATASET/PART.")
    revision = str((config.get("dataset_kwargs") or {}).get("revision", ""))
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise UserError(
            f"{where}: task '{bench.task}' reads {config['dataset_path']} from the hub without a "
            "pinned commit.\n  Add dataset_kwargs: {revision: <40 hexadecimal digits>} to its file."
        )
    return config


def task_file(study: Study, bench: Benchmark) -> dict[str, Any]:
    """The task's YAML as plain data, checked; custom tags such as !function are refused."""
    path = task_path(study, bench)
    plain: dict[str, Any] = json.loads(json.dumps(yamlfile.load(path)))
    if "include" in plain:
        raise UserError(f"{path}: 'include' is not supported. Write the task in one file.")
    task_checks.check_file(plain, path)
    return plain


def task_path(study: Study, bench: Benchmark) -> Path:
    """The benchmark's task file. Raises UserError with the nearest right name."""
    folders = [study.folder / "tasks", TASKS]
    for folder in folders:
        path = folder / f"{bench.task}.yaml"
        if path.is_file():
            return path
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    raise UserError(
        f"{study.folder}/study.yaml: benchmark '{bench.name}': there is no task '{bench.task}'."
        f"{nearest(bench.task, known)}\n  Known: {', '.join(known)}. "
        f"Your own go to {study.folder}/tasks/NAME.yaml."
    )


def _on_file(path: Path) -> dict[str, Any]:
    """Task keys that read one .jsonl as the only split; few-shot examples leave out the item."""
    return {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(path.resolve())}},
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
        "fewshot_split": "test",
    }


def task_hash(config: dict[str, Any]) -> str:
    """SHA-256 of a task's protocol: everything but its name and where its file lies."""
    kwargs = {k: v for k, v in (config.get("dataset_kwargs") or {}).items() if k != "data_files"}
    return digest({k: v for k, v in config.items() if k != "task"} | {"dataset_kwargs": kwargs})


def _data(study: Study, results: Path) -> dict[str, str]:
    parts = sorted({bench.data for bench in study.suite if bench.data is not None})
    return {part: file_sha256(results / "data" / f"{part}.jsonl") for part in parts}


def _run(
    loaded: inference.Loaded, study: Study, tasks: dict[str, dict[str, Any]]
) -> dict[str, list[Sample]]:
    """lm-eval's logged samples of every benchmark. Nothing is left outside a temporary folder."""
    from lm_eval.evaluator import evaluate as lm_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False)
    with tempfile.TemporaryDirectory(prefix="mergelab-") as cache, task_checks.sandboxed():
        built: dict[str, Any] = {}
        limits: dict[str, list[int]] = {}
        for bench in study.suite:
            where = f"{task_path(study, bench)}: benchmark '{bench.name}'"
            with task_checks.blamed(where):
                loadable = manager.load([_cached(tasks[bench.name], cache)])
                built[bench.name] = loadable["tasks"][bench.name]
                docs = len(built[bench.name].eval_docs)
            limits[bench.name] = list(range(min(bench.limit or docs, docs)))
            task_checks.check_items(built[bench.name], len(limits[bench.name]), where)
            built[bench.name].set_fewshot_seed(SEED)
        total = sum(len(limits[name]) * _requests(task) for name, task in built.items())
        with bar("Scoring", total) as progress:
            answers = lm_evaluate(
                _language_model(loaded, progress),
                manager.load(list(built.values())),
                samples=limits,
                bootstrap_iters=0,
                log_samples=True,
            )
    samples: dict[str, list[Sample]] = answers["samples"]
    return samples


def _cached(config: dict[str, Any], cache: str) -> dict[str, Any]:
    """Local data is converted afresh in `cache`; hub data keeps the hub's own cache."""
    if config["dataset_path"] not in task_checks.LOCAL:
        return config
    return config | {"dataset_kwargs": {**config["dataset_kwargs"], "cache_dir": cache}}


def _requests(task: Any) -> int:
    """Model calls per item: one per choice, judged by the first item."""
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return 1
    return len(task.doc_to_choice(task.eval_docs[0]))


def _language_model(loaded: inference.Loaded, progress: Bar) -> Any:
    """lm-eval's HFLM around a loaded model, with our bar, softmax in float32 and one mend:
    whole texts get one beginning-of-sequence token, even if the tokenizer adds its own."""
    from lm_eval.models.huggingface import HFLM

    class LanguageModel(HFLM):  # type: ignore[misc]
        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            this: Any = self
            before, this.add_bos_token = this.add_bos_token, False
            try:
                return super().loglikelihood_rolling(requests, disable_tqdm=True)
            finally:
                this.add_bos_token = before

        def _loglikelihood_tokens(
            self, requests: Any, disable_tqdm: bool = True, override_bs: Any = None
        ) -> Any:
            answers = super()._loglikelihood_tokens(
                requests, disable_tqdm=True, override_bs=override_bs
            )
            progress.advance(len(requests))
            return answers

    chatter = logging.getLogger("lm_eval.models.huggingface")  # it warns of models as objects
    level = chatter.level
    chatter.setLevel(logging.ERROR)
    try:
        return LanguageModel(
            pretrained=loaded.model,
            tokenizer=loaded.tokenizer,
            softmax_dtype="float32",
            max_length=loaded.length,
            batch_size=inference.batch_size(loaded.model.config.vocab_size, PROMPT_TOKENS),
        )
    finally:
        chatter.setLevel(level)


def _samples(bench: Benchmark, logged: Sequence[Sample], variant: str) -> list[Sample]:
    """lm-eval's samples as records: id, hashes, responses (nats) and metrics, in item order.

    Raises UserError if the model answered with NaN or infinity."""
    records = []
    for sample in logged:
        answers = [r[0] if isinstance(r, tuple | list) else r for r in sample["filtered_resps"]]
        if not all(math.isfinite(answer) for answer in answers):
            raise UserError(
                f"{variant} gives no finite log-likelihood on {bench.name}, item "
                f"{sample['doc_id']}: its weights hold NaN or overflow in their dtype.\n"
                "  Check the merge's parameters, or set out_dtype: float32 in the recipe."
            )
        records.append(
            {
                "id": str(sample["doc"].get("id", sample["doc_hash"])),
                "doc_hash": sample["doc_hash"],
                "prompt_hash": sample["prompt_hash"],
                "target_hash": sample["target_hash"],
                "resps": [float(answer) for answer in answers],
                "metrics": _metrics(sample),
            }
        )
    return records


def _metrics(sample: Sample) -> dict[str, float | int]:
    if "bits_per_byte" in sample["metrics"]:
        log_likelihood, size = sample["bits_per_byte"]
        words = sample["word_perplexity"][1]
        return {"nll": -float(log_likelihood), "bytes": int(size), "words": int(words)}
    return {name: float(sample[name]) for name in sample["metrics"]}


def summarise(samples: Sequence[Sample]) -> dict[str, Any]:
    """One number with its interval: bits per byte over all items, or accuracy (Wilson).

    `chance` is the accuracy of guessing, from each item's number of choices."""
    first = samples[0]["metrics"]
    if "nll" in first:
        bits = [sample["metrics"]["nll"] / math.log(2) for sample in samples]
        sizes = [sample["metrics"]["bytes"] for sample in samples]
        value, interval = math.fsum(bits) / sum(sizes), statistics.bootstrap_ratio(bits, sizes)
        metric, chance = "bits_per_byte", None
    else:
        hits = sum(sample["metrics"]["acc"] for sample in samples)
        value, interval = hits / len(samples), statistics.wilson(hits, len(samples))
        metric = "acc"
        chance = math.fsum(1 / len(sample["resps"]) for sample in samples) / len(samples)
    return {
        "metric": metric,
        "value": value,
        "ci95": list(interval),
        "n": len(samples),
        "higher_is_better": chance is not None,
        "chance": chance,
    }
