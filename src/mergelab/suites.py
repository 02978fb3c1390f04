"""Suites: the benchmarks of a leaderboard or study, as versioned YAML, and how it sums them up."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mergelab.errors import UserError, nearest
from mergelab.yamlfile import Map, Reader, load

FOLDER = Path(__file__).parent / "suites"
KEYS = ("version", "title", "about", "aggregate", "benchmarks")
COMBINE = ("items", "tasks")
AGGREGATES = {
    "mean": "unweighted mean of the benchmarks (of the groups, where there are any)",
    "normalised": "mean of the benchmarks, each rescaled so that chance is 0 and all right is 1",
}
CHAT = ("chat_template", "fewshot_as_multiturn")  # lm-eval's names
NO_VERSION = "none"  # of a file of lm-eval that states none


@dataclass(frozen=True)
class Pin:
    """A task of lm-eval in the version that its file must have ("" if any will do).

    `chance` is the score of guessing, where the leaderboard fixes it."""

    task: str
    version: str = ""
    chance: float | None = None


@dataclass(frozen=True)
class Benchmark:
    """One row of the suite: an lm-eval task (or several, `pins`) and its data.

    `data` is DATASET/PART of the study or a file; None means the task's own data, from the hub or,
    with `wheels`, from PyPI. `limit` counts items of each task. `metric` is a name, or name,filter
    where a task has filters; None means the task's first. Several tasks are combined over their
    items, or as the unweighted mean of the tasks. Benchmarks of one `group` count as one.
    `chat_template`: prompts are chats in the model's own template; then `fewshot_as_multiturn`
    makes each example a turn of its own, as lm-eval does unless told otherwise."""

    name: str
    task: str
    data: str | None
    limit: int | None
    num_fewshot: int
    metric: str | None = None
    suite: str | None = None
    group: str | None = None
    pins: tuple[Pin, ...] = ()
    combine: str = "items"
    wheels: bool = False
    fewshot_split: str | None = None
    chat_template: bool = False
    fewshot_as_multiturn: bool = True

    @property
    def tasks(self) -> tuple[Pin, ...]:
        """Its tasks; a benchmark of study.yaml has a single one."""
        return self.pins or (Pin(self.task),)

    @property
    def chat(self) -> dict[str, bool]:
        """How prompts become chats; {} if they do not."""
        return {key: getattr(self, key) for key in CHAT} if self.chat_template else {}

    def content(self) -> dict[str, Any]:
        """What a key covers of it; how chats are made only where there are any."""
        return {k: v for k, v in asdict(self).items() if k not in CHAT} | self.chat


@dataclass(frozen=True)
class Suite:
    """A suite file: `aggregate` says how the one number of the leaderboard is made."""

    name: str
    version: int
    title: str
    about: str
    aggregate: str
    benchmarks: tuple[Benchmark, ...]


def names() -> list[str]:
    """Every suite that there is."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_suite(name: str) -> Suite:
    """Read a suite. Raises UserError with the nearest right name."""
    path = FOLDER / f"{name}.yaml"
    if name not in names():
        raise UserError(
            f"there is no suite '{name}'.{nearest(name, names())}\n  Suites: {', '.join(names())}."
        )
    top = load(path)
    reader = _SuiteReader(path)
    reader.keys(top, KEYS, "a suite")
    suite = Suite(
        name,
        reader.count(top, "version", least=1),
        reader.text(top, "title"),
        reader.text(top, "about"),
        reader.choice(top, "aggregate", tuple(AGGREGATES)),
        tuple(reader.benchmark(name, entry) for entry in reader.maps(top, "benchmarks")),
    )
    reader.problems.raise_if_any()
    return suite


class _SuiteReader(Reader):
    def choice(self, map: Map, key: str, known: tuple[str, ...]) -> str:
        value = self.text(map, key, known[0])
        if value not in known:
            self.wrong(map.lines[key], f"'{key}' must be {' or '.join(known)}, not '{value}'.")
        return str(value)

    def benchmark(self, suite: str, map: Map) -> Benchmark:
        known = ("name", "group", "task", "tasks", "version", "metric", "chance")
        self.keys(map, (*known, "combine", "num_fewshot", "fewshot_split"), "a benchmark")
        name = self.text(map, "name")
        tasks = self.seq(map, "tasks", None) or [self.text(map, "task", name)]
        pins = tuple(self.pin(map, entry) for entry in tasks)
        return Benchmark(
            f"{suite}.{name}",
            pins[0].task if len(pins) == 1 else name,
            None,
            None,
            self.count(map, "num_fewshot"),
            self.text(map, "metric"),
            suite,
            self.text(map, "group", None),
            pins,
            self.choice(map, "combine", COMBINE),
            fewshot_split=self.text(map, "fewshot_split", None),
        )

    def pin(self, above: Map, entry: Any) -> Pin:
        """A task of a benchmark; what it does not say, the benchmark says."""
        own = entry if isinstance(entry, Map) else {"task": entry}
        version = own.get("version", above.get("version"))
        version = NO_VERSION if version is None else str(version)
        return Pin(str(own["task"]), version, own.get("chance", above.get("chance")))
