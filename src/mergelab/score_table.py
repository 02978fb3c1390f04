"""The table of scores on disk: one row per item, filter and metric, in one Parquet per variant."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergelab.errors import UserError
from mergelab.record import digest
from mergelab.suites import Benchmark
from mergelab.task_build import Work

COLUMNS = {
    "benchmark": "string",
    "task": "string",
    "id": "string",
    "doc_hash": "string",
    "prompt_hash": "string",
    "target_hash": "string",
    "filter": "string",
    "resps": "list<double>",  # log-probabilities of the choices or of the text, nats
    "response": "string",  # what was generated
    "metric": "string",
    "value": "double",  # score: sum(value) / sum(weight)
    "weight": "double",
    "cluster": "string",  # items that share it share a passage; "" is an item of its own
}
ORDER = ("benchmark", "id", "filter", "metric")
# fields whose text is what items share; Question is GPQA's, whose three sets overlap
PASSAGES = ("passage", "context", "article", "support", "story", "Question")
NO_MEANS = (
    *("bleu", "brier_score", "bypass", "chrf", "chrf++", "f1", "matthews_corrcoef", "median"),
    *("perplexity", "ter", "weighted_perplexity"),
)  # aggregations of lm-eval that are no mean over items
PER_TOKEN = {"bits_per_byte": math.log(2), "byte_perplexity": 1.0, "word_perplexity": 1.0}

Row = dict[str, Any]
Sample = dict[str, Any]


def rows(one: Work, samples: Sequence[Sample], variant: str) -> list[Row]:
    """lm-eval's samples of one task as rows, each with its passage as cluster (see `shared`).

    Raises UserError if an answer is NaN or infinite."""
    ids, clusters = _ids(one, samples), _clusters(samples)
    found = []
    for sample in samples:
        number = sample["doc_id"]
        resps, response = _answer(sample)
        if not all(math.isfinite(value) for value in resps):
            raise not_finite(variant, one.bench.name, number)
        for metric in sample["metrics"]:
            measured = _value(metric, sample[metric])
            if measured is not None:
                found.append(
                    {
                        "benchmark": one.bench.name,
                        "task": one.task,
                        "id": ids[number],
                        **{key: sample[key] for key in ("doc_hash", "prompt_hash", "target_hash")},
                        "filter": sample["filter"],
                        "resps": resps,
                        "response": response,
                        "metric": metric,
                        "value": measured[0],
                        "weight": measured[1],
                        "cluster": clusters[number],
                    }
                )
    return found


def shared(found: Sequence[Row]) -> list[Row]:
    """The rows of all tasks; only passages that several items of a benchmark share stay clusters,
    be the items of one task or of several."""
    items = {(row["benchmark"], row["cluster"], row["id"]) for row in found}
    sizes = Counter((benchmark, cluster) for benchmark, cluster, _ in items)
    alone = {key for key, size in sizes.items() if size == 1}
    return [
        row | {"cluster": ""} if (row["benchmark"], row["cluster"]) in alone else row
        for row in found
    ]


def encode(found: Sequence[Row]) -> bytes:
    """The table as Parquet; equal rows give equal bytes."""
    import pyarrow
    from pyarrow import parquet

    types = {"string": pyarrow.string(), "double": pyarrow.float64()}
    types["list<double>"] = pyarrow.list_(pyarrow.float64())
    schema = pyarrow.schema([(name, types[kind]) for name, kind in COLUMNS.items()])
    ordered = sorted(found, key=lambda row: [row[key] for key in ORDER])
    buffer = io.BytesIO()
    whole = pyarrow.Table.from_pylist(ordered, schema=schema)
    parquet.write_table(whole, buffer, compression="zstd", compression_level=9)
    return buffer.getvalue()


def table(path: Path) -> Any:
    """The score table of a variant as a pandas.DataFrame with the columns of COLUMNS.

    Raises UserError if the file is missing or damaged."""
    from pyarrow import ArrowException, parquet

    remedy = f"Run: mergelab evaluate recipes/{path.absolute().parts[-3]} {path.stem}"
    if not path.is_file():
        raise UserError(f"{path}: no such file. {remedy}")
    try:
        found = parquet.read_table(path)
    except (ArrowException, OSError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: is damaged ({why}). {remedy}") from None
    if found.column_names != list(COLUMNS):
        raise UserError(f"{path}: is damaged (its columns are not those of scores). {remedy}")
    return found.to_pandas()


def decode(content: bytes) -> Any:
    """What `encode` made, as `table` reads it."""
    from pyarrow import parquet

    return parquet.read_table(io.BytesIO(content)).to_pandas()


def not_finite(variant: str, benchmark: str, number: int) -> UserError:
    """The mistake of a model whose answers are no numbers."""
    return UserError(
        f"{variant} gives no finite log-likelihood on {benchmark}, item {number}: its weights hold "
        "NaN or overflow in their dtype.\n"
        "  Check the merge's parameters, or set out_dtype: float32 in the recipe."
    )


def label(metric: str, kind: str, first: str) -> str:
    """metric,filter of lm-eval as we write it: a filter's name only if the task names filters."""
    return metric if kind == "none" and first == "none" else f"{metric},{kind}"


def planned(one: Work, task: Any) -> str:
    """The metric that a task will be summed up by: the benchmark's, or the usual one of its kind.

    Raises UserError if the task has no such metric, or if it is no mean over items."""
    from lm_eval.api.registry import get_aggregation

    kinds, aggregations = [entry.name for entry in task._filters], task.aggregation()
    labels = [label(name, kind, kinds[0]) for kind in kinds for name in aggregations]
    usual = "bits_per_byte" if task.OUTPUT_TYPE == "loglikelihood_rolling" else "acc"
    main = one.bench.metric or (usual if usual in labels else labels[0])
    check_name(one, main, labels)
    no_means = [get_aggregation(name) for name in NO_MEANS]
    if aggregations[main.partition(",")[0]] in no_means:
        fit = [entry for entry in labels if aggregations[entry.partition(",")[0]] not in no_means]
        raise _no_mean(one, main, fit)
    return main


def check_name(one: Work, metric: str, labels: Sequence[str]) -> None:
    """Raise UserError if a task does not have the metric."""
    if metric not in labels:
        raise UserError(
            f"{one.where}: the task has no metric '{metric}'. It has: {', '.join(labels)}."
        )


def check_mean(one: Work, metric: str, value: float, rows: Sequence[Row]) -> None:
    """Raise UserError unless lm-eval's value of a metric is the weighted mean of the rows."""
    name, _, kind = metric.partition(",")
    own = [r for r in rows if (r["metric"], r["filter"]) == (name, kind or "none")]
    weight = math.fsum(row["weight"] for row in own)
    mean = math.fsum(row["value"] for row in own) / weight if weight else math.nan
    if not math.isclose(mean, value, rel_tol=1e-9, abs_tol=1e-12):
        raise _no_mean(one, metric, sorted({row["metric"] for row in rows} - {name}))


def _no_mean(one: Work, metric: str, others: Sequence[str]) -> UserError:
    other = f"Choose another metric: {', '.join(others)}." if others else "The task has no other."
    return UserError(
        f"{one.where}: '{metric}' is no mean over items, so it has no interval. {other}"
    )


def chance(
    bench: Benchmark, runs: Sequence[tuple[Work, Sequence[Row]]], metric: str
) -> float | None:
    """The accuracy of guessing, from each item's number of choices; None where it means nothing."""
    plain = metric.startswith("acc") and all(
        one.config["output_type"] == "multiple_choice"
        and not callable(one.config.get("process_results"))
        for one, _ in runs
    )
    if not plain:
        return None
    counts = [[len(r["resps"]) for r in rows if r["metric"] == metric] for _, rows in runs]
    if bench.combine == "items":
        counts = [[n for own in counts for n in own]]
    means = [math.fsum(1 / n for n in own) / len(own) for own in counts]
    return sum(means) / len(means)


def _ids(one: Work, samples: Sequence[Sample]) -> dict[int, str]:
    """An id for each doc_id: the item's own if all have one that differs, else its hash.

    Equal items are numbered. Where a benchmark has several tasks, the task's name comes first."""
    docs = {sample["doc_id"]: sample for sample in samples}
    own = {number: sample["doc"].get("id") for number, sample in docs.items()}
    plain = all(isinstance(name, str | int) and name != "" for name in own.values())
    if not plain or len({str(name) for name in own.values()}) < len(own):
        own = {number: sample["doc_hash"] for number, sample in docs.items()}
    before = f"{one.task}:" if len(one.bench.tasks) > 1 else ""
    seen: Counter[str] = Counter()
    found = {}
    for number, name in own.items():
        seen[str(name)] += 1
        again = f"#{seen[str(name)]}" if seen[str(name)] > 1 else ""
        found[number] = f"{before}{name}{again}"
    return found


def _clusters(samples: Sequence[Sample]) -> dict[int, str]:
    """12 digits of the passage of an item, or nothing, by doc_id."""
    passages = {}
    for sample in samples:
        texts = [sample["doc"].get(key) for key in PASSAGES]
        text = next((t for t in texts if isinstance(t, str) and t), None)
        passages[sample["doc_id"]] = digest(text)[:12] if text else ""
    return passages


def _answer(sample: Sample) -> tuple[list[float], str]:
    """Log-probabilities or the text, before any filter."""
    raw = [repeats[0] for repeats in sample["resps"]]
    if isinstance(raw[0], str):
        return [], raw[0]
    return [float(one[0] if isinstance(one, tuple | list) else one) for one in raw], ""


def _value(metric: str, measured: Any) -> tuple[float, float] | None:
    """(value, weight) of a metric on one item; None if it is no sum over items, such as F1."""
    if metric in PER_TOKEN:
        log_likelihood, size = measured
        return -float(log_likelihood) / PER_TOKEN[metric], float(size)
    if isinstance(measured, list | tuple):
        if measured and all(isinstance(one, bool) for one in measured):
            return float(sum(measured)), float(len(measured))
        return None
    return float(measured), 1.0
