"""A study: models, data, suite and contamination checks of one folder, as frozen data."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergelab.suites import Benchmark

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\Z")
TASK_DATA = "lm_eval"  # beside the datasets of a study: the data of lm-eval's own tasks
FILES = (".jsonl", ".json", ".csv", ".arrow", ".parquet")  # that a benchmark can read itself
CLAIMS = "claims.yaml"  # beside study.yaml: what was published about the study's models
SOURCES = ("train", "hub", "path", "gguf")


@dataclass(frozen=True)
class Wheel:
    """A pinned file of PyPI: `requirement` is name==version, `sha256` of the wheel."""

    requirement: str
    sha256: str


@dataclass(frozen=True)
class Options:
    """Templates of a multiple-choice item: the question and its choices in published order."""

    question: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Dataset:
    """Benchmark items: files in a wheel, a folder or a hub repository, cut into disjoint parts.

    `parts` maps a part's name to its number of items, None meaning the rest. `text`, `answer` (the
    end of text that is the solution) and `twin` (the same item in other words) are templates;
    `options` holds a template of the question and one of each choice, for items with options."""

    name: str
    wheel: str | None
    path: str | None
    hub: str | None
    files: tuple[str, ...]
    text: str
    parts: dict[str, int | None]
    answer: str | None = None
    twin: str | None = None
    options: Options | None = None


@dataclass(frozen=True)
class Share:
    """What a training run sees of a part: `items` after `skip`, each `copies` times.

    `field` is text or twin; `loss` is all (every token) or answer (only the answer's tokens)."""

    part: str
    items: int | None
    skip: int
    copies: int
    field: str = "text"
    loss: str = "all"


@dataclass(frozen=True)
class Training:
    """A training run: from scratch (`architecture`) or from another model (`start`)."""

    start: str | None
    architecture: dict[str, Any] | None
    data: tuple[Share, ...]
    epochs: int
    learning_rate: float
    batch_size: int
    sequence_length: int
    seed: int


@dataclass(frozen=True)
class Gguf:
    """A GGUF file in a wheel (`wheel`, `file`) or on disk (`path`), pinned by `sha256`."""

    wheel: str | None
    file: str | None
    path: str | None
    sha256: str


@dataclass(frozen=True)
class Model:
    """One model of a study; exactly one of train, hub, path and gguf is set.

    `declared` names the parts that its makers say it was trained on (of a model trained here they
    are known). `push`: do the fetched weights go to DVC's remote, beside their hashes in git?"""

    name: str
    train: Training | None
    hub: str | None
    path: str | None
    gguf: Gguf | None
    dtype: str | None
    declared: tuple[str, ...] = ()
    push: bool = False

    @property
    def kind(self) -> str:
        """Where the model comes from: train, hub, path or gguf."""
        return next(kind for kind in SOURCES if getattr(self, kind) is not None)  # one_of saw to it


@dataclass(frozen=True)
class Check:
    """A contamination check: were the `suspects` seen, judged against `controls` and `base`?

    `planted` names the models known to have seen them (the ground truth of a demo), `siblings`
    models of the same base known not to. `scores` and `twin` are benchmarks of the suite: the
    published one and its twin, on the same items."""

    benchmark: str
    base: str
    suspects: str
    controls: str
    detectors: tuple[str, ...]
    planted: tuple[str, ...]
    siblings: tuple[str, ...] = ()
    scores: str | None = None
    twin: str | None = None


@dataclass(frozen=True)
class Policy:
    """What may be merged (mergelab.policy); without rules, anything.

    `max_merge_depth` counts merges along the lineage, the study's own among them; `deny_taint`
    names benchmarks; `allow_unknown`: may a parent have ancestors of which nothing is declared?"""

    allow_merged_parents: bool = True
    max_merge_depth: int | None = None
    deny_taint: tuple[str, ...] = ()
    allow_unknown: bool = True

    @property
    def asks(self) -> bool:
        """Is there any rule?"""
        return self != Policy()


@dataclass(frozen=True)
class Study:
    """A folder of recipes with its study.yaml."""

    name: str
    folder: Path
    title: str
    about: str
    wheels: dict[str, Wheel]
    datasets: dict[str, Dataset]
    models: dict[str, Model]
    suite: tuple[Benchmark, ...]
    contamination: tuple[Check, ...]
    recipes: tuple[Path, ...]
    policy: Policy = Policy()

    @property
    def variants(self) -> tuple[str, ...]:
        """Every model and every merge, in order."""
        return (*self.models, *(path.stem for path in self.recipes))

    @property
    def lock(self) -> Path:
        """The lock file beside the study."""
        return self.folder / "lock.json"


def is_file(data: str) -> bool:
    """Is a benchmark's `data` a file of items, and not DATASET/PART?"""
    return data.endswith(FILES)
