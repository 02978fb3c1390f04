"""Scores as weighted means over parts, their intervals, and paired differences of two of them.

A part is the items of one task, or of several pooled; a benchmark may be the mean of parts (MMLU
of 57), a suite that of its benchmarks. Each part is resampled on its own, but parts over the same
items (the two metrics of IFEval) are resampled together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergelab import statistics
from mergelab.statistics import Floats


@dataclass(frozen=True)
class Part:
    """One entry per item: sum(value) / sum(weight) is the part's score.

    `cluster` holds labels that items of one passage share, or is None where none do. `share` is the
    part's weight in the whole. Where `chance` is given, the score is rescaled so that chance is 0
    and all right is 1, and is never below 0, as the second Open LLM Leaderboard does. Parts with
    the same `items` hold the same ones in the same order; None: items that no other part holds."""

    value: Floats
    weight: Floats
    cluster: NDArray[Any] | None = None
    share: float = 1.0
    chance: float | None = None
    items: str | None = None

    @property
    def right_or_wrong(self) -> bool:
        """Is every item worth 0 or 1?"""
        return bool(np.isin(self.value, (0.0, 1.0)).all() and (self.weight == 1).all())

    def scaled(self, ratio: Floats) -> Floats:
        """What sum(value) / sum(weight) adds to the score of the whole."""
        if self.chance is not None:
            ratio = np.maximum(ratio - self.chance, 0.0) / (1 - self.chance)
        return np.asarray(self.share * ratio, dtype=np.float64)


def mean_of(wholes: Sequence[Sequence[Part]]) -> tuple[Part, ...]:
    """The parts of the mean of several scores, each counting the same."""
    return tuple(replace(p, share=p.share / len(wholes)) for parts in wholes for p in parts)


def score(parts: Sequence[Part]) -> dict[str, Any]:
    """`value`, `ci95` and `n` (items): Wilson's interval for independent right and wrong items of
    a single part, else the bootstrap within each part."""
    n = sum(len(part.value) for part in parts)
    only = parts[0]
    plain = only.right_or_wrong and only.cluster is None and only.chance is None
    if len(parts) == 1 and plain:
        ci95 = statistics.wilson(float(only.value.sum()), n)
    else:
        ci95 = statistics.percentiles(_resampled(parts))
    return {"value": float(sum(map(_value, parts))), "ci95": list(ci95), "n": n}


def difference(ours: Sequence[Part], theirs: Sequence[Part]) -> dict[str, Any]:
    """Score of ours minus theirs over the same items in the same order.

    `ci95`: paired bootstrap within each part. `p`: McNemar's mid-p for independent right and wrong
    items that count alike, else sign flips of items or clusters; `test` says which. `mde`: the
    minimum detectable difference at 80 % power, None if no item differs. `discordance`: the share
    of items that one got right and the other wrong, None for other metrics."""
    steps = _steps(ours, theirs)
    gaps = np.concatenate([a.value - b.value for a, b in zip(ours, theirs, strict=True)])
    wins, losses = int(np.sum(gaps > 0)), int(np.sum(gaps < 0))
    binary = all(part.right_or_wrong for part in (*ours, *theirs))
    clustered = any(part.cluster is not None for part in ours)
    mcnemar = binary and len(ours) == 1 and not clustered
    error = float(np.sqrt(np.sum(steps**2)))
    return {
        "difference": float(sum(map(_value, ours)) - sum(map(_value, theirs))),
        "ci95": list(statistics.percentiles(_resampled(ours, theirs))),
        "p": statistics.mcnemar(wins, losses) if mcnemar else statistics.sign_flip_p(steps),
        "test": "McNemar mid-p"
        if mcnemar
        else f"sign flips of {'clusters' if clustered else 'items'}",
        "mde": statistics.detectable(error) if error else None,
        "discordance": (wins + losses) / len(gaps) if binary else None,
        "n": len(gaps),
    }


def _value(part: Part) -> float:
    return float(part.scaled(part.value.sum() / part.weight.sum()))


def _blocks(parts: Sequence[Part]) -> list[list[int]]:
    """Places of the parts, those over the same items together."""
    blocks: dict[str | int, list[int]] = {}
    for i, part in enumerate(parts):
        blocks.setdefault(i if part.items is None else part.items, []).append(i)
    return list(blocks.values())


def _steps(ours: Sequence[Part], theirs: Sequence[Part]) -> Floats:
    """What each item, or cluster, adds to the difference of two scores (far from chance)."""
    own = [
        statistics.cluster_sums(a.value - b.value, a.cluster)
        * (a.share / float(a.weight.sum()) / (1 - (a.chance or 0.0)))
        for a, b in zip(ours, theirs, strict=True)
    ]
    blocks = [np.sum([own[i] for i in block], axis=0) for block in _blocks(ours)]
    return np.concatenate(blocks, dtype=np.float64)


def _resampled(ours: Sequence[Part], theirs: Sequence[Part] | None = None) -> Floats:
    """The score, or the difference of two, in each bootstrap sample of the items of each part."""
    whole = np.zeros(statistics.RESAMPLES)
    for stream, block in enumerate(_blocks(ours)):
        columns = [_columns(ours[i], None if theirs is None else theirs[i]) for i in block]
        every = [column for several in columns for column in several]
        sums = iter(statistics.resampled(every, ours[block[0]].cluster, stream=stream))
        for i, several in zip(block, columns, strict=True):
            *values, weight = (next(sums) for _ in several)
            first, *second = (ours[i].scaled(value / weight) for value in values)
            whole += first - sum(second)
    return whole


def _columns(ours: Part, theirs: Part | None) -> tuple[Floats, ...]:
    """Values to resample, and the weights. A difference that is not rescaled is one column."""
    if theirs is None:
        return ours.value, ours.weight
    if ours.chance is None:
        return ours.value - theirs.value, ours.weight
    return ours.value, theirs.value, ours.weight
