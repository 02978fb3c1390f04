"""What a claim is: one published score of one model, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """One published score.

    `model` is a hub id or a variant of the study; `benchmark` lm-eval's name of the task where it
    is recognised, else the name as `published`. `value` is a fraction (0 to 1) where `percent`
    says that the source `printed` it times 100, else in the metric's own unit; `printed` keeps the
    digits ("38.40"), whose number decides what GRIM can tell. What the source does not say is None.
    `rescaled` scores are moved so that guessing is 0, as the second Open LLM Leaderboard shows
    them: they compare with no accuracy. `source` is an address, or a file and line."""

    model: str
    benchmark: str
    value: float
    printed: str
    percent: bool
    source: str
    published: str
    metric: str | None = None
    filter: str | None = None
    shots: int | None = None
    task_version: str | None = None
    chat_template: bool | None = None
    dtype: str | None = None
    split: str | None = None
    date: str | None = None
    commit: str | None = None
    rescaled: bool = False
