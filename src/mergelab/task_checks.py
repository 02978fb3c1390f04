"""What a study's own lm-eval task may do: nothing but name fields, plain templates and metrics.

A task file comes with the study, perhaps from a stranger. lm-eval would run its templates outside a
sandbox and load metrics and data sets by name, which is code."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mergelab.errors import UserError, nearest

LOCAL = ("json", "arrow", "csv", "parquet")
# output_type: metrics a task may list, and those that the summary is made of
METRICS = {
    "multiple_choice": (("acc", "acc_norm"), ("acc",)),
    "loglikelihood_rolling": (
        ("bits_per_byte", "byte_perplexity", "word_perplexity"),
        ("bits_per_byte", "word_perplexity"),
    ),
}
AGGREGATIONS = ("mean", "bits_per_byte", "weighted_perplexity")
METRIC_KEYS = ("metric", "aggregation", "higher_is_better")
DATASET_KEYS = ("revision", "data_dir", "data_files")
KEYS = (
    *("task", "task_alias", "tag", "metadata", "output_type", "metric_list", "dataset_path"),
    *("dataset_name", "dataset_kwargs", "training_split", "validation_split", "test_split"),
    *("fewshot_split", "num_fewshot", "description", "target_delimiter", "fewshot_delimiter"),
    *("doc_to_text", "doc_to_target", "doc_to_choice"),
    *("should_decontaminate", "doc_to_decontamination_query"),
)
TYPES: dict[str, tuple[type, ...]] = {
    "doc_to_text": (str,),
    "doc_to_target": (str, int),
    "doc_to_choice": (str, list),
    "doc_to_decontamination_query": (str,),
    "dataset_path": (str,),
    "description": (str,),
    "target_delimiter": (str,),
    "fewshot_delimiter": (str,),
}


def check_file(config: dict[str, Any], path: Path) -> None:
    """Raise UserError unless the task file holds only what is known to be harmless and enough."""
    _known(config, KEYS, path, "")
    for key, types in TYPES.items():
        if key in config and type(config[key]) not in types:
            names = " or ".join(kind.__name__ for kind in types)
            raise UserError(f"{path}: {key}: must be of type {names}.")
    kwargs = config.get("dataset_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise UserError(f"{path}: dataset_kwargs: must be a mapping.")
    _known(kwargs, DATASET_KEYS, path, "dataset_kwargs: ")
    source = config.get("dataset_path", "json")
    hub = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source) and not Path(source).exists()
    if source not in LOCAL and not hub:
        raise UserError(f"{path}: dataset_path: '{source}' is neither json nor ORG/NAME on a hub.")
    _check_metrics(config, path)


def _check_metrics(config: dict[str, Any], path: Path) -> None:
    kind, listed = config.get("output_type"), config.get("metric_list")
    if kind not in [*METRICS] or not listed or not isinstance(listed, list):
        kinds = " or ".join(METRICS)
        raise UserError(f"{path}: a task needs output_type {kinds} and metric_list.")
    allowed, needed = METRICS[kind]
    for entry in listed:
        if not isinstance(entry, dict):
            raise UserError(f"{path}: metric_list: must hold mappings, as {{metric: acc}}.")
        _known(entry, METRIC_KEYS, path, "metric_list: ")
        _known([entry.get("metric")], allowed, path, f"metric_list: metric of {kind}: ")
        if "aggregation" in entry:
            _known([entry["aggregation"]], AGGREGATIONS, path, "metric_list: aggregation: ")
    missing = [name for name in needed if name not in [entry["metric"] for entry in listed]]
    if missing:
        raise UserError(f"{path}: metric_list: the score needs {' and '.join(missing)}. Add it.")
    fields = ("doc_to_text", "doc_to_target", "doc_to_choice")
    absent = [key for key in fields[: 2 + (kind == "multiple_choice")] if key not in config]
    if absent:
        raise UserError(f"{path}: {absent[0]} is missing.")


def _known(found: Any, allowed: Sequence[str], path: Path, where: str) -> None:
    for key in found:
        if key not in allowed:
            hint = nearest(str(key), allowed)
            raise UserError(
                f"{path}: {where}'{key}' is not allowed.{hint}\n  Known: {', '.join(allowed)}."
            )


@contextmanager
def sandboxed() -> Iterator[None]:
    """Let lm-eval render its templates in Jinja2's sandbox, with its own filters."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    before = utils.env
    safe = ImmutableSandboxedEnvironment(
        undefined=before.undefined, keep_trailing_newline=before.keep_trailing_newline
    )
    safe.filters.update(before.filters)
    utils.env = safe
    try:
        yield
    finally:
        utils.env = before


@contextmanager
def blamed(where: str) -> Iterator[None]:
    """Whatever is raised inside becomes a UserError: a task is the user's program."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{where}: lm-eval says: {type(error).__name__}: {error}") from error


def check_items(task: Any, limit: int, where: str) -> None:
    """Render the first `limit` items and the few-shot pool of a built lm-eval task.

    Raises UserError that names the item whose prompt, choices or answer is of no use."""
    shots = int(task.config.num_fewshot or 0)
    with blamed(where):
        pool = list(task.fewshot_docs()) if shots else []
        docs = [task.eval_docs[i] for i in range(limit)]
    if not docs:
        raise UserError(f"{where}: there are no items.")
    for number, doc in enumerate([*docs, *pool]):
        place = f"{where}: item '{doc.get('id', number)}'"
        with blamed(place):
            _check_item(task, doc, place)
    with blamed(where):
        task.fewshot_context(docs[0], shots)


def _check_item(task: Any, doc: dict[str, Any], where: str) -> None:
    target = task.doc_to_target(doc)
    if not isinstance(task.doc_to_text(doc), str):
        raise UserError(f"{where}: doc_to_text gives no text.")
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        if not isinstance(target, str) or not target:
            raise UserError(f"{where}: doc_to_target gives no text.")
        return
    choices = task.doc_to_choice(doc)
    if not isinstance(choices, list) or not all(isinstance(c, str) and c for c in choices):
        raise UserError(f"{where}: doc_to_choice gives no list of texts.")
    right = type(target) is int and 0 <= target < len(choices)
    if not right and not (isinstance(target, str) and target in choices):
        raise UserError(
            f"{where}: the answer {target!r} is neither one of the {len(choices)} choices nor the "
            "index of one, counted from 0."
        )
