"""Where the file of a task is, what it says, and what fixes its meaning.

A study's own tasks come first, then mergelab's, then those installed with lm-eval; `lm_eval/NAME`
is always lm-eval's. lm-eval itself is not imported here: it takes seconds."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mergelab import task_checks, yamlfile
from mergelab.errors import UserError, nearest
from mergelab.record import digest, file_sha256
from mergelab.study import Study
from mergelab.suites import NO_VERSION, Benchmark, Pin

OURS = Path(__file__).parent / "tasks"
PREFIX = "lm_eval/"
FUNCTION = "!function "
NAMED = re.compile(rb"""^["']?task["']?[ \t]*:[ \t]*["']?([\w.:-]+)["']?[ \t\r]*(?:#.*)?$""", re.M)


@dataclass(frozen=True)
class TaskFile:
    """A task's YAML file; `trusted` if it came with lm-eval, whose functions may then run."""

    path: Path
    trusted: bool

    def plain(self) -> dict[str, Any]:
        """Its contents without including files; a function is text: '!function FILE.NAME'."""
        if self.trusted:
            return _plain(self.path)
        found: dict[str, Any] = json.loads(json.dumps(yamlfile.load(self.path)))
        if "include" in found:
            raise UserError(f"{self.path}: 'include' is not supported. Write the task in one file.")
        task_checks.check_file(found, self.path)
        return found

    def ready(self) -> dict[str, Any]:
        """Its contents as lm-eval takes them, functions loaded."""
        if not self.trusted:
            return self.plain()
        from lm_eval.tasks._yaml_loader import load_yaml

        found: dict[str, Any] = load_yaml(self.path)
        return found

    def fingerprint(self) -> str:
        """SHA-256 of what the file says, with the files that its functions are in."""
        plain = self.plain()
        modules = sorted(set(_modules(plain)))
        return digest([plain, [file_sha256(installed() / name) for name in modules]])


def find(study: Study, bench: Benchmark, pin: Pin) -> TaskFile:
    """The file of one task of a benchmark, in the version that a suite asks for.

    Raises UserError with the nearest right name, or with both versions."""
    name = pin.task.removeprefix(PREFIX)
    where = f"{study.folder}/study.yaml: benchmark '{bench.name}'"
    own = [] if bench.suite or pin.task != name else [study.folder / "tasks", OURS]
    for folder in own:
        if (folder / f"{name}.yaml").is_file():
            return TaskFile(folder / f"{name}.yaml", trusted=False)
    path = index().get(name)
    if path is None:
        known = [path.stem for folder in own for path in sorted(folder.glob("*.yaml"))]
        raise UserError(
            f"{where}: there is no task '{pin.task}'.{nearest(name, [*known, *index()])}\n"
            f"  Known: {', '.join(known)}{' and ' if known else ''}the tasks of lm-eval "
            f"(lm_eval --tasks list). Your own go to {study.folder}/tasks/NAME.yaml."
        )
    found = TaskFile(path, trusted=True)
    plain = found.plain()
    if "class" in plain:
        raise UserError(
            f"{where}: lm-eval's task '{name}' is a Python class, not a YAML file; those are not "
            "supported."
        )
    if pin.version and version(plain) != pin.version:
        raise UserError(
            f"{where}: the suite asks for version {pin.version} of the task '{name}', and the "
            f"installed lm-eval has version {version(plain)}.\n  Scores of the two do not compare. "
            "Install the lm-eval of constraints.txt."
        )
    return found


def version(plain: dict[str, Any]) -> str:
    """The version that a task file states, or 'none'."""
    metadata = plain.get("metadata")
    stated = metadata.get("version") if isinstance(metadata, dict) else None
    return NO_VERSION if stated is None else str(stated)


@functools.cache
def installed() -> Path:
    """The folder of lm-eval's tasks."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("lm-eval is not installed. Run: pip install lm-eval")
    return Path(spec.submodule_search_locations[0]).resolve() / "tasks"


@functools.cache
def index() -> dict[str, Path]:
    """Every task of lm-eval by name, found by its `task:` line alone: 1 s instead of 30."""
    found: dict[str, Path] = {}
    for folder, _, files in sorted(os.walk(installed())):
        for file in sorted(files):
            if file.endswith(".yaml"):
                path = Path(folder, file)
                if match := NAMED.search(path.read_bytes()):
                    found.setdefault(match[1].decode(), path)
    return found


def _plain(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML file of lm-eval with what it includes; its own keys win."""

    class Loader(yaml.SafeLoader):
        pass

    def function(loader: yaml.SafeLoader, node: yaml.Node) -> str:
        folder = path.parent.relative_to(installed()).as_posix()
        return f"{FUNCTION}{folder}/{node.value}"

    Loader.add_constructor("!function", function)
    own: dict[str, Any] = yaml.load(path.read_bytes(), Loader)
    merged: dict[str, Any] = {}
    includes = own.pop("include", [])
    for name in includes if isinstance(includes, list) else [includes]:
        other = (path.parent / name).resolve()
        if other not in above:
            merged |= _plain(other, (*above, path))
    return merged | own


def _modules(value: Any) -> list[str]:
    """Files, relative to lm-eval's tasks, of the functions in a plain task."""
    if isinstance(value, str) and value.startswith(FUNCTION):
        name = value.removeprefix(FUNCTION).rpartition(".")[0] + ".py"
        return [name] if (installed() / name).is_file() else []
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [name for part in inner for name in _modules(part)]
