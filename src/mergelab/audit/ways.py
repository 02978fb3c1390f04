"""How a claimed benchmark is run: as claimed, and as it may have been run instead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from mergelab import suites, task_files
from mergelab.claims.base import Claim
from mergelab.errors import UserError, nearest
from mergelab.study import Study
from mergelab.suites import Benchmark

USUAL_SHOTS = (0, 5)  # beside those of the leaderboards' suites
BOARDS = ("open_llm_v1", "open_llm_v2", "nous", "medical", "meditron", "eq_bench")


def benchmark(name: str, study: Study | None, limit: int | None) -> Benchmark:
    """How a claimed benchmark is run: as the study does, as a leaderboard does, or as lm-eval.

    Raises UserError if it is none that can be run."""
    for bench in study.suite if study else ():
        if name in names(bench):
            return bench
    for suite in BOARDS:
        for bench in suites.load_suite(suite).benchmarks:
            if name in names(bench):
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


def names(bench: Benchmark) -> set[str]:
    """What a claim may call a benchmark."""
    short = bench.name.removeprefix(f"{bench.suite}.")
    task = bench.task.removeprefix(task_files.PREFIX)
    also = {f"leaderboard_{short}", f"{short}_{bench.suite}"} if bench.suite else set()
    return {bench.name, short, task} | also


def as_claimed(bench: Benchmark, claim: Claim, has_template: bool) -> Benchmark:
    """The benchmark with the shots and the chat template of a claim, where it says them."""
    shots = bench.num_fewshot if claim.shots is None else claim.shots
    chat = bench.chat_template if claim.chat_template is None else claim.chat_template
    return replace(bench, num_fewshot=shots, chat_template=chat and has_template)


def confusions(bench: Benchmark, asked: Sequence[Benchmark], has_template: bool) -> list[Benchmark]:
    """What claims may be about that ask for something else, likeliest first.

    Other usual numbers of shots; chats for plain prompts, or the other way round; both; and of
    chats with examples, these all in one turn instead of in a turn each, or the other way round."""
    found = [replace(one, num_fewshot=shots) for one in asked for shots in _usual_shots(bench)]
    if has_template:
        found += [replace(one, chat_template=not one.chat_template) for one in (*asked, *found)]
        found += [
            replace(one, fewshot_as_multiturn=not one.fewshot_as_multiturn)
            for one in (*asked, *found)
            if one.chat_template and one.num_fewshot
        ]
    return [way for way in dict.fromkeys(found) if way not in asked]


def _usual_shots(bench: Benchmark) -> Iterator[int]:
    """Numbers of examples that people run the benchmark with."""
    task = bench.task.removeprefix(task_files.PREFIX)
    known = (b for suite in BOARDS for b in suites.load_suite(suite).benchmarks)
    yield from dict.fromkeys((*USUAL_SHOTS, *(b.num_fewshot for b in known if task in names(b))))
