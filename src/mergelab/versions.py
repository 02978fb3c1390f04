"""A finished study in DVC: what it keeps, when that is current, and what a clone still lacks.

dvc.yaml is the one list of studies, of what they are made from and of what is kept. Only `record`
calls dvc, once and last, so that no two jobs ever wait for DVC's lock."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from mergelab import hashes, models, yamlfile
from mergelab.errors import UserError
from mergelab.record import digest, write_bytes, write_json, write_record
from mergelab.steps import Step, Steps
from mergelab.study import Study

VERSION = 1
PLACES = {  # of what a step makes beside models, in the folder of the study's results
    "data": "data/{}",
    "evaluate": "scores",
    "probe": "evidence",
    "detect": "findings",
    "report": "report.html",
}


def unkept(study: Study) -> str:
    """Why DVC does not keep this study, in words, or nothing."""
    root = _root(study).absolute()
    if not (root / ".dvc").is_dir():
        return "DVC is not set up in this folder"
    if not any((folder / ".git").exists() for folder in (root, *root.parents)):
        return "this folder is not under git"
    if not _paths(study, "files", "outs"):
        return f"{study.name} is not one of the studies of dvc.yaml"
    return ""


def step(steps: Steps) -> Step:
    """The last step of a study: due whenever a step or anything that DVC looks at has changed."""
    study, kept = steps.study, not unkept(steps.study)
    seen = [_content(path) for path in _paths(study, "study", "deps")] if kept else None
    key = digest([VERSION, seen, [s.key for s in steps.all.values()]])[:12]
    return Step("record", study.name, key, tuple(steps.all))


def record(study: Study, results: Path, path: Path | None = None) -> str:
    """Write the last record of a finished study, and have DVC take note; a line that says so.

    Raises UserError if a step is not done (or the study changed since the run that asked for
    `path` began), or if DVC refuses; then there is no record."""
    steps = Steps(study)
    place = results / "records" / step(steps).record
    todo = [s for s in steps.all.values() if not (place.parent / s.record).is_file()]
    if todo or path not in (None, place):
        why = f"{todo[0].verb} {todo[0].name} is not done" if todo else "it changed during the run"
        raise UserError(f"{study.folder}: {why}. Run: snakemake --config study={study.name}")
    why = unkept(study)
    if not why:
        _prepare(study, results)
    write_record(place, {"study": study.name, "version": VERSION, "dvc": why or "kept"})
    if why:
        return f"{study.folder}: DVC keeps no results of it: {why} (docs/dvc.md)."
    try:
        _commit(study)
    except BaseException:
        place.unlink()
        raise
    return f"{study.folder}: DVC has its results. Next: git add dvc.lock {results}; dvc push"


def lacking(steps: Steps, results: Path) -> str:
    """What a clone lacks, in words, or nothing: results that are recorded but were not pulled.

    Raises UserError if a step that is due needs one of them."""
    study, records = steps.study, results / "records"
    if unkept(study):
        return ""
    due = [asked for asked in steps.all.values() if not (records / asked.record).is_file()]
    absent = [
        (asked.verb, asked.name)
        for asked in steps.all.values()
        if asked not in due and not _result(study, asked, results).exists()
    ]
    waits = {need: asked for asked in reversed(due) for need in asked.needs if need in absent}
    if waits:
        first = next(asked for asked in due if asked in waits.values())
        commands = dict.fromkeys(_remedy(study, place) for place in absent if place in waits)
        raise UserError(
            f"{results}: {first.verb} {first.name} needs results that have records, but are not "
            "here. Run:\n  "
            + "\n  ".join(commands)
            + f"\nor, to do everything again: rm -r {records}"
        )
    if any(_is_kept(study, place) for place in absent):
        return f"{results}: some results are not here. Run: dvc pull files@{study.name}"
    return ""


def parameters(study: Study) -> dict[str, Any]:
    """The study's YAML files for `dvc params diff`: entries of lists under their names."""
    files = [study.folder / "study.yaml", *study.recipes]
    return {file.stem: _named(yamlfile.load(file)) for file in files}


def _root(study: Study) -> Path:
    """The project's folder: studies are in its recipes/."""
    return study.folder.parent.parent


def _paths(study: Study, stage: str, what: str) -> list[Path]:
    """Paths that a stage of dvc.yaml names for this study; none if it is not listed there."""
    try:
        text = (_root(study) / "dvc.yaml").read_text(encoding="utf-8")
        file = yaml.safe_load(text)
        listed = [vars for vars in file["vars"] if isinstance(vars, dict)]
        studies = [name for vars in listed for name in vars.get("studies", ())]
        paths = [str(path) for path in file["stages"][stage]["do"][what]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return []  # someone's own dvc.yaml, or none
    if study.name not in studies:
        return []
    return [_root(study) / path.replace("${item}", study.name) for path in paths]


def _content(path: Path) -> list[list[str]]:
    """Names and sha256 of a file, or of a folder's files as DVC sees them."""
    return [[str(file.relative_to(path)), hashes.sha256(file)] for file in _files(path)]


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    for inner in sorted(path.iterdir()) if path.is_dir() else ():
        if inner.name != "__pycache__":
            yield from _files(inner)


def _prepare(study: Study, results: Path) -> None:
    """Parameters, folders that this study has no use for, and the list of what is left out."""
    write_json(results / "params.json", parameters(study))
    for path in _paths(study, "files", "outs"):
        if not path.suffix:
            path.mkdir(exist_ok=True)
    weights = [f"!/models/{m.name}" for m in study.models.values() if m.train or m.push]
    merges = [f"!/merged/{path.stem}" for path in study.recipes]
    why = "# What DVC keeps of models and merges; fetched models only with `push: true`."
    lines = [why, "/models/*", *weights, "/merged/*", *merges]
    write_bytes(results / ".dvcignore", ("\n".join(lines) + "\n").encode())


def _commit(study: Study) -> None:
    """Have DVC hash the results and link them into its cache.

    Inside `dvc repro` the stage itself is DVC's to note, after its command has ended."""
    stages = [f"study@{study.name}", f"files@{study.name}"]
    if os.environ.get("DVC_STAGE") == stages[0]:
        del stages[0]
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "commit", "--quiet", "--force"]
    done = subprocess.run([*command, *stages], cwd=_root(study), capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{study.folder}: DVC refused to commit it:\n{done.stderr.strip()}")


def _result(study: Study, asked: Step, results: Path) -> Path:
    """What a step made; of hub models that only a recipe names, the recipe (a merge gets them)."""
    if asked.verb in PLACES:
        return results / PLACES[asked.verb].format(asked.name)
    if asked.verb == "fetch" and asked.name not in study.models:
        return study.folder / f"{asked.name}.yaml"
    return models.folder(study, asked.name, results)


def _is_kept(study: Study, place: tuple[str, str]) -> bool:
    """Does DVC keep the weights of this step? Of fetched models only if the study says so."""
    return place[0] != "fetch" or study.models[place[1]].push


def _remedy(study: Study, place: tuple[str, str]) -> str:
    if _is_kept(study, place):
        return f"dvc pull files@{study.name}"
    return f"mergelab fetch {study.folder} {place[1]}"


def _named(value: Any) -> Any:
    """A list of mappings becomes a mapping, by model, name or benchmark, else by position."""
    if isinstance(value, dict):
        return {str(key): _named(inner) for key, inner in value.items()}
    if not isinstance(value, list) or not all(isinstance(inner, dict) for inner in value):
        return value
    names = [inner.get("model", inner.get("name", inner.get("benchmark"))) for inner in value]
    unique = len(set(map(str, names))) == len(names) and None not in names
    keys = names if unique else range(len(value))
    return {str(key): _named(inner) for key, inner in zip(keys, value, strict=True)}
