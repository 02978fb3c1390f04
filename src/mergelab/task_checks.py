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
# output_type: metrics a task may list, and the one that the summary is made of
METRICS = {
    "multiple_choice": (("acc", "acc_norm"), "acc"),
    "loglikelihood_rolling": (
        ("bits_per_byte", "byte_perplexity", "word_perplexity"),
        "bits_per_byte",
    ),
    "generate_until": (("exact_match",), "exact_match"),
}
AGGREGATIONS = ("mean", "bits_per_byte", "weighted_perplexity")
METRIC_KEYS = (
    *("metric", "aggregation", "higher_is_better", "ignore_case", "ignore_punctuation"),
    *("ignore_numbers", "regexes_to_ignore"),
)
FILTERS = ("regex", "take_first", "remove_whitespace", "lowercase", "uppercase")
FILTER_KEYS = ("function", "regex_pattern", "group_select", "fallback")
GENERATION_KEYS = ("until", "max_gen_toks", "do_sample", "temperature")
DATASET_KEYS = ("revision", "data_dir", "data_files")
KEYS = (
    *("task", "task_alias", "tag", "metadata", "output_type", "metric_list", "dataset_path"),
    *("dataset_name", "dataset_kwargs", "training_split", "validation_split", "test_split"),
    *("fewshot_split", "num_fewshot", "description", "target_delimiter", "fewshot_delimiter"),
    *("doc_to_text", "doc_to_target", "doc_to_choice", "generation_kwargs", "filter_list"),
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
    _check_generation(config, path)
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
    if needed not in [entry["metric"] for entry in listed]:
        raise UserError(f"{path}: metric_list: the score needs {needed}. Add it.")
    fields = ("doc_to_text", "doc_to_target", "doc_to_choice")
    absent = [key for key in fields[: 2 + (kind == "multiple_choice")] if key not in config]
    if absent:
        raise UserError(f"{path}: {absent[0]} is missing.")


def _check_generation(config: dict[str, Any], path: Path) -> None:
    """Filters by their known names; no sampling, so that the same model gives the same text."""
    generation = config.get("generation_kwargs") or {}
    filters = config.get("filter_list") or []
    if not isinstance(generation, dict) or not isinstance(filters, list):
        raise UserError(f"{path}: generation_kwargs is a mapping, filter_list a list of mappings.")
    _known(generation, GENERATION_KEYS, path, "generation_kwargs: ")
    if generation.get("do_sample"):
        raise UserError(f"{path}: generation_kwargs: do_sample must be false.")
    for entry in filters:
        steps = entry.get("filter") if isinstance(entry, dict) else None
        if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
            raise UserError(
                f"{path}: filter_list: write {{name: ..., filter: [{{function: ...}}]}}."
            )
        for step in steps:
            _known(step, FILTER_KEYS, path, "filter_list: ")
            _known([step.get("function")], FILTERS, path, "filter_list: function: ")


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


def check_shots(task: Any, shots: int, where: str) -> None:
    """Raise UserError if there are fewer examples than are to be shown."""
    if not shots:
        return
    with blamed(where):
        pool = len(list(task.fewshot_docs()))
    same = task.fewshot_cfg.split == task.config.test_split  # then the item itself is left out
    if pool - same < shots:
        raise UserError(
            f"{where}: num_fewshot is {shots}, but there are only {pool - same} examples to show"
            f"{' beside the item itself' if same else ''}. Lower num_fewshot."
        )


def check_items(task: Any, docs: Sequence[dict[str, Any]], where: str) -> None:
    """Render `docs` and, if there are examples, the pool they come from, and one whole prompt.

    Raises UserError that names the item whose prompt, choices or answer is of no use."""
    if not docs:
        raise UserError(f"{where}: there are no items.")
    shots = int(task.config.num_fewshot or 0)
    with blamed(where):
        pool = list(task.fewshot_docs()) if shots and len(docs) > 1 else []
    for number, doc in enumerate([*docs, *pool]):
        place = f"{where}: item '{doc.get('id', number)}'"
        with blamed(place):
            _check_item(task, doc, place)
    with blamed(where):
        task.fewshot_context(docs[0], shots)


def _check_item(task: Any, doc: dict[str, Any], where: str) -> None:
    text, target = task.doc_to_text(doc), task.doc_to_target(doc)
    many = bool(task.multiple_input)  # then the choices are the prompts, and text the right one
    if not isinstance(text, int if many else str):
        raise UserError(f"{where}: doc_to_text gives no text.")
    if callable(task.config.process_results):
        return  # such a task may take any target
    if task.OUTPUT_TYPE in ("loglikelihood_rolling", "generate_until"):
        given = isinstance(target, str | list) or task.OUTPUT_TYPE == "generate_until"
        if not given or target in ("", [], None):
            raise UserError(f"{where}: doc_to_target gives no text.")
        return
    if task.OUTPUT_TYPE != "multiple_choice":
        return
    choices = task.doc_to_choice(doc)
    if not isinstance(choices, list) or not all(isinstance(c, str) and c for c in choices):
        raise UserError(f"{where}: doc_to_choice gives no list of texts.")
    for answer in [text] if many else target if isinstance(target, list) else [target]:
        right = type(answer) is int and 0 <= answer < len(choices)
        if not right and not (isinstance(answer, str) and answer in choices):
            raise UserError(
                f"{where}: the answer {answer!r} is neither one of the {len(choices)} choices nor "
                "the index of one, counted from 0."
            )
