"""Surveys over a whole model: the statistics that `scope: model` merges with, summed in order."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import numpy as np

from mergelab.blocks import TensorMerge
from mergelab.methods.base import Stats, Sums
from mergelab.plan import Plan
from mergelab.writer import Planned

T = TypeVar("T")
R = TypeVar("R")


def in_order(
    pool: ThreadPoolExecutor, function: Callable[[T], R], items: Sequence[T], ahead: int = 64
) -> Generator[R, None, None]:
    """Results of `function` in the order of `items`; few wait, and an error stops the rest."""
    running: list[Future[R]] = []
    try:
        for item in items:
            running.append(pool.submit(function, item))
            if len(running) > ahead:
                yield running.pop(0).result()
        while running:
            yield running.pop(0).result()
    finally:
        for future in running:
            future.cancel()


def survey_model(
    plan: Plan,
    task: Callable[[Planned], TensorMerge],
    pool: ThreadPoolExecutor,
    workers: int,
) -> dict[str, tuple[Stats, Sums]]:
    """Statistics over all tensors that ask for them (`scope: model`), and the running sums in
    front of each tensor."""
    tasks = [task(t) for t in plan.tensors if not t.copied]
    tasks = [t for t in tasks if t.whole_model]
    if not tasks:
        return {}
    stats: dict[str, Any] = {}
    before: list[Sums] = [{} for _ in tasks]
    for number, round in enumerate(plan.recipe.method.rounds):
        if round.model_only:
            before = []
        total: Sums = {}
        parts = in_order(
            pool, partial(TensorMerge.survey_round, number=number, stats=stats), tasks, 2 * workers
        )
        for part in parts:
            if round.model_only:
                before.append(total or {name: value * 0 for name, value in part.items()})
            total = {name: total[name] + value if total else value for name, value in part.items()}
        if total:
            with np.errstate(all="ignore"):
                stats = {**stats, **round.conclude(total, tasks[0].tensor.settings, stats)}
    return {t.tensor.name: (stats, state) for t, state in zip(tasks, before, strict=True)}
