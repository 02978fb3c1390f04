"""Scores to judge claims by: read from a study's results, or run as the claims say.

What does not fit is run again in other usual ways (see ways.confusions), one after the other until
one of them explains it. Every metric and filter comes from the one run, and answers are kept, so
that asking again costs nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergelab import (
    datasets,
    hub_api,
    inference,
    lockfile,
    models,
    score_table,
    scores,
    suites,
    task_data,
)
from mergelab.audit import noise, ways
from mergelab.audit.averages import AVERAGE
from mergelab.audit.measured import Measured
from mergelab.audit.protocol import prompts
from mergelab.audit.readings import readings
from mergelab.audit.verdicts import NO_RUN, settled
from mergelab.claims.base import Claim
from mergelab.errors import UserError
from mergelab.record import digest
from mergelab.study import Study, is_file
from mergelab.suites import Benchmark

MOST_RUNS = 4  # protocols that the claims about one benchmark may ask for
MOST_MORE = 10  # runs beside these, in search of the protocol that explains what does not fit


@dataclass(frozen=True)
class Readings:
    """What was measured of a benchmark, the usual protocol first; `why_not`: what could not be,
    `chats_failed`: among it, prompts in the model's chat template."""

    measured: tuple[Measured, ...] = ()
    why_not: str = NO_RUN
    chats_failed: bool = False


@dataclass(frozen=True)
class _Job:
    """A model to score again, and by what (see `rescore`); can it write chats?"""

    model: str
    folder: Path
    work: Path
    study: Study | None
    limit: int | None
    fetch: bool
    has_template: bool


def rescore(
    model: str,
    folder: Path,
    claims: Sequence[Claim],
    work: Path,
    study: Study | None = None,
    limit: int | None = None,
    *,
    fetch: bool = False,
) -> dict[str, Readings]:
    """Score the model in `folder` on every claimed benchmark; by benchmark, what came out.

    `study` gives suite, data and tasks; without it they are lm-eval's own, their items from wheels,
    or from the hub if `work`/lock.json pins them; `fetch` pins them there. `limit`: items per task
    of benchmarks that are not the study's. Data and scores are kept in `work`. What cannot be run,
    for want of data, task or model, says why instead."""
    hub_api.client()  # first imported offline (_has_template), it would stay so for good
    found = {}
    job = _Job(model, folder, work, study, limit, fetch, _has_template(folder))
    for name in dict.fromkeys(claim.benchmark for claim in claims):
        if name != AVERAGE and name not in suites.names():
            found[name] = _rescore(job, [claim for claim in claims if claim.benchmark == name])
    return found


def measured(study: Study, results: Path, model: str, benchmark: str) -> tuple[Measured, ...]:
    """What the scores of a study (results/<study>) say of a benchmark and one of its variants.

    Nothing is run. Raises UserError if a file of scores is damaged."""
    place = results / "scores"
    path = place / f"{model}.parquet"
    benches = [bench for bench in study.suite if benchmark in ways.names(bench)]
    if model not in study.variants or not benches or not path.is_file():
        return ()
    table, summary = score_table.table(path), _summary(place / f"{model}.json")
    c = _noise(models.folder(study, model, results))
    record = str(path.with_suffix(".json"))
    return tuple(
        one for b in benches for one in readings(study, b, table, summary, results, c, record)
    )


def _rescore(job: _Job, claims: Sequence[Claim]) -> Readings:
    """One benchmark: as claimed, then, while a claim does not fit, in other usual ways."""
    try:
        bench = ways.benchmark(claims[0].benchmark, job.study, job.limit)
    except UserError as error:
        return Readings(why_not=str(error))
    ways_claimed = (ways.as_claimed(bench, claim, job.has_template) for claim in claims)
    every = list(dict.fromkeys(ways_claimed))
    asked = every[:MOST_RUNS]
    others = ways.confusions(bench, asked, job.has_template)
    found, failed = _search(job, claims, asked, others[:MOST_MORE])
    why_not = [_failures(claims[0].benchmark, failed)] if failed else []
    if found and not job.has_template and any(claim.chat_template for claim in claims):
        why_not.append(f"{job.model} has no chat template.")
    tried = (*asked, *others[:MOST_MORE])
    left = [way for way in dict.fromkeys((*every, *others)) if way not in tried]
    if found and left and not all(settled(claim, found) for claim in claims):
        why_not.append(f"Not tried, to save time: {'; '.join(map(_said, left))}.")
    shots = {one.num_fewshot for one in asked}
    chats_failed = any(way.chat_template and way.num_fewshot in shots for way, _ in failed)
    return Readings(found, " ".join(why_not) or NO_RUN, chats_failed)


def _search(
    job: _Job, claims: Sequence[Claim], asked: Sequence[Benchmark], others: Sequence[Benchmark]
) -> tuple[tuple[Measured, ...], list[tuple[Benchmark, str]]]:
    """What came out of all that is asked, and of others until every claim is settled; and what
    could not be run, with the reason."""
    found: tuple[Measured, ...] = ()
    failed: list[tuple[Benchmark, str]] = []
    for way in (*asked, *others):
        if way in others and all(settled(claim, found) for claim in claims):
            break
        if not found and all(way.chat_template != one.chat_template for one in asked):
            break  # what cannot be run plain cannot be run as chats
        try:
            found += _run(job, way)
        except UserError as error:
            failed.append((way, str(error)))
    return found, failed


def _has_template(folder: Path) -> bool:
    """Can the model's tokenizer write chats? No, if there is none."""
    with inference.quiet(offline=True), suppress(UserError):
        return inference.chat_template(inference.load_tokenizer(folder)) is not None
    return False


def _failures(benchmark: str, failed: Sequence[tuple[Benchmark, str]]) -> str:
    """What could not be run, by reason."""
    reasons: dict[str, list[str]] = {}
    for way, why in failed:
        reasons.setdefault(why, []).append(_said(way))
    said = [
        f"{benchmark} could not be run with {' or with '.join(each)}: {why.rstrip('.')}."
        for why, each in reasons.items()
    ]
    return " ".join(said)


def _said(way: Benchmark) -> str:
    turns = way.fewshot_as_multiturn if way.chat_template and way.num_fewshot else None
    return prompts(way.num_fewshot, way.chat_template, turns)


def _run(job: _Job, bench: Benchmark) -> tuple[Measured, ...]:
    """Evaluate one benchmark and read what it gave. Raises UserError if it cannot be run."""
    chat = ".chat" if bench.chat_template else ""
    chat += ".turn" if bench.chat_template and not bench.fewshot_as_multiturn else ""
    variant = f"{_slug(job.model)}.{_slug(bench.name)}.{bench.num_fewshot}{chat}"
    derived = _with_data(job, bench)
    try:
        scores.evaluate(derived, variant, job.folder, job.work)
    except AssertionError:  # lm-eval's way to say that an answer is longer than the model takes
        raise UserError("an answer is longer than what the model takes.") from None
    place = job.work / "scores" / variant
    table, summary = score_table.table(Path(f"{place}.parquet")), _summary(Path(f"{place}.json"))
    c = _noise(job.folder)
    return tuple(readings(derived, derived.suite[0], table, summary, job.work, c, f"{place}.json"))


def _noise(folder: Path) -> float:
    """noise.measure, or the usual of models whose weights are not here."""
    if not any(folder.glob("*.safetensors")):
        return noise.USUAL
    with inference.quiet(offline=True):
        return noise.measure(folder)


def _with_data(job: _Job, bench: Benchmark) -> Study:
    """A study of one benchmark, whose items are in `work`/data: from wheels, else from the hub.

    Raises UserError that says how to give them."""
    try:
        return _prepared(job, bench)
    except UserError as error:
        if not bench.wheels:
            raise
        why = str(error)
    if bench.suite is None:
        try:
            return _prepared(job, replace(bench, wheels=False))
        except UserError as error:
            why = str(error)
    if job.study is not None or job.fetch:
        raise UserError(why)
    raise UserError(
        "its items are in no wheel that mergelab knows. Add --fetch to download them from the hub; "
        "or name the benchmark in a study.yaml, with data: FILE or pinned by mergelab lock, and "
        "the study in claims.yaml."
    )


def _prepared(job: _Job, bench: Benchmark) -> Study:
    study = job.study or Study("audit", job.work, "", "", {}, {}, {}, (), (), ())
    study = replace(study, models={}, suite=(bench,), contamination=(), recipes=())
    if bench.data is None:
        if job.fetch and job.study is None:
            lockfile.pin_datasets(task_data.repositories(study), study.lock)
        task_data.prepare(study, job.work)
    elif not is_file(bench.data) and not (job.work / "data" / f"{bench.data}.jsonl").is_file():
        name = bench.data.partition("/")[0]
        datasets.prepare(replace(study, datasets={name: study.datasets[name]}), job.work / "data")
    return study


def _summary(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
        return dict(found)
    except (OSError, ValueError, TypeError):
        raise UserError(f"{path}: is missing or damaged. Score the model again.") from None


def _slug(name: str) -> str:
    """A file name that stands for a name from outside, and for no other."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[:60]
    return plain if plain == name else f"{plain}-{digest(name)[:8]}"
