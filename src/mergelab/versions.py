"""A finished study in DVC: what it keeps, when that is current, and what a clone still lacks.

dvc.yaml is the one list of studies, of what they are made from and of what is kept. Only `record`
calls dvc, once and last, so that no two jobs ever wait for DVC's lock."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from mergelab import hashes, models, yamlfile
from mergelab.errors import UserError
from mergelab.record import digest, read_json, write_bytes, write_json, write_record
from mergelab.steps import Step, Steps
from mergelab.study import CLAIMS, Study

VERSION = 1
PLACES = {  # of what steps make beside models, in the folder of the study's results
    "data": "data",
    "evaluate": "scores",
    "probe": "evidence",
    "detect": "findings",
    "audit": ".",
    "report": ".",
}
FILES = [{"name": str, "sha256": str}]
SHAPE = {"outputs": FILES}  # what is read of a step's record
SHAPES = {"merge": {"outputs": {"files": FILES}}, "fetch": {}}
ABSENT, OTHER = "absent", "other"


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

    DVC has the large results before there is a record, whenever this is killed. Raises UserError if
    a step is not done, or its result not at hand (or the study changed since the run that asked for
    `path` began), or if DVC refuses; then there is no record."""
    steps = Steps(study)
    place = results / "records" / step(steps).record
    todo = [s for s in steps.all.values() if not (place.parent / s.record).is_file()]
    if todo or path not in (None, place):
        why = f"{todo[0].verb} {todo[0].name} is not done" if todo else "it changed during the run"
        raise UserError(f"{study.folder}: {why}. Run: snakemake --config study={study.name}")
    why = unkept(study)
    if not why:
        _check_whole(steps, results)
        _prepare(study, results)
        _commit(study, "files")
    write_record(place, {"study": study.name, "version": VERSION, "dvc": why or "kept"})
    if why:
        return f"{study.folder}: DVC keeps no results of it: {why} (docs/dvc.md)."
    try:
        _commit(study, "study")  # its results have the record among them
    except BaseException:
        place.unlink()
        raise
    return f"{study.folder}: DVC has its results. Next: git add dvc.lock {results}; dvc push"


def lacking(steps: Steps, results: Path) -> str:
    """What a clone lacks, in words, or nothing: results that are recorded, but were not pulled or
    are those of another commit.

    Raises UserError if a step that is due needs one of them."""
    study, records = steps.study, results / "records"
    due = [asked for asked in steps.all.values() if not (records / asked.record).is_file()]
    faults = _faults(steps, results)
    waits = {need: asked for asked in reversed(due) for need in asked.needs if need in faults}
    if waits:
        first = next(asked for asked in due if asked in waits.values())
        raise UserError(
            f"{results}: {first.verb} {first.name} needs results that have records, but are not "
            f"here. {_remedies(steps, results, {place: faults[place] for place in waits})}"
        )
    if not any(_is_kept(study, place) for place in faults):
        return ""
    if why := unkept(study):
        lost = f"{results}: some results that have records are not here, and {why}."
        return f"{lost} To do everything again: rm -r {records}"
    told = {place: fault for place, fault in faults.items() if _is_kept(study, place)}
    commands = " && ".join(_commands(steps, results, told))
    return f"{results}: some results are not here. Run: {commands}"


def parameters(study: Study) -> dict[str, Any]:
    """The study's YAML files for `dvc params diff`: entries of lists under their names."""
    files = [study.folder / "study.yaml", study.folder / CLAIMS, *study.recipes]
    return {file.stem: _named(yamlfile.load(file)) for file in files if file.is_file()}


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


def _commit(study: Study, stage: str) -> None:
    """Have DVC hash the results of a stage and link them into its cache.

    Inside `dvc repro` the stage itself is DVC's to note, after its command has ended."""
    asked = f"{stage}@{study.name}"
    if os.environ.get("DVC_STAGE") == asked:
        return
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "commit", "--force", asked]
    done = subprocess.run(command, cwd=_root(study), capture_output=True, text=True)
    if done.returncode:
        said = f"{done.stdout}\n{done.stderr}".strip()
        raise UserError(f"{study.folder}: DVC refused to commit {asked}:\n{said}")


def _check_whole(steps: Steps, results: Path) -> None:
    """Raise UserError if DVC would note as current what is not here, or is another commit's."""
    found = {
        place: f for place, f in _faults(steps, results).items() if _is_kept(steps.study, place)
    }
    if found:
        verb, name = next(iter(found))
        raise UserError(
            f"{results}: DVC would note a study without its results: that of {verb} {name} has a "
            f"record, but is not here. {_remedies(steps, results, found)}"
        )


def _faults(steps: Steps, results: Path) -> dict[tuple[str, str], str]:
    """The steps with a record whose result is not here (ABSENT) or not the record's (OTHER)."""
    found = {}
    for place, asked in steps.all.items():
        path = results / "records" / asked.record
        known = read_json(path, f"rm {shlex.quote(str(path))}", SHAPES.get(asked.verb, SHAPE))
        if known is not None and (fault := _fault(steps.study, asked, known, results)):
            found[place] = fault
    return found


def _fault(study: Study, asked: Step, known: dict[str, Any], results: Path) -> str:
    """What is wrong with the result of a step, by its record; a merge or download by its own."""
    if asked.verb == "fetch" and asked.name not in study.models:
        return ""  # hub models that only a recipe names; a merge gets them
    if asked.verb in PLACES:
        return _compared(results / PLACES[asked.verb], _kept_files(asked, known))
    folder = models.folder(study, asked.name, results)
    if asked.verb == "train":
        return _compared(folder, _kept_files(asked, known))
    if asked.verb == "fetch":
        return _fetched(folder, known) if folder.exists() else ABSENT
    files = known["outputs"]["files"]
    if not all((folder / file["name"]).is_file() for file in files):
        return ABSENT
    own = read_json(folder / "merge.json", f"rm -r {shlex.quote(str(folder))}")
    return "" if own == known else OTHER


def _fetched(folder: Path, known: dict[str, Any]) -> str:
    """OTHER if the folder says that it was downloaded from another commit than the record's."""
    own = read_json(folder / "source.json", f"rm -r {shlex.quote(str(folder))}", dict) or {}
    commits = [found.get("commit") for found in (own, known.get("source") or {})]
    return OTHER if all(commits) and commits[0] != commits[1] else ""


def _kept_files(asked: Step, known: dict[str, Any]) -> dict[str, str]:
    """sha256 of a step's files, by its record; of the report those that are not in git."""
    files = {str(file["name"]): str(file["sha256"]) for file in known["outputs"]}
    in_git = asked.verb == "report"
    return {name: sha for name, sha in files.items() if not in_git or name.startswith("report.")}


def _compared(folder: Path, files: dict[str, str]) -> str:
    if not all((folder / name).is_file() for name in files):
        return ABSENT
    same = all(hashes.sha256(folder / name) == sha256 for name, sha256 in files.items())
    return "" if same else OTHER


def _is_kept(study: Study, place: tuple[str, str]) -> bool:
    """Does DVC keep the result of this step? Of fetched models only if the study says so."""
    verb, name = place
    return verb != "fetch" or (name in study.models and study.models[name].push)


def _remedies(steps: Steps, results: Path, faults: dict[tuple[str, str], str]) -> str:
    lines = "\n  ".join(_commands(steps, results, faults))
    return f"Run:\n  {lines}\nor, to do everything again: rm -r {results / 'records'}"


def _commands(steps: Steps, results: Path, faults: dict[tuple[str, str], str]) -> list[str]:
    """What brings results here: DVC, a download, or doing the step again."""
    study, found = steps.study, []
    by_dvc = {ABSENT: f"dvc pull files@{study.name}", OTHER: f"dvc checkout files@{study.name}"}
    for place, fault in faults.items():
        if place[0] == "fetch" and not _is_kept(study, place):
            found.append(f"mergelab fetch {study.folder} {place[1]}")
        elif unkept(study):
            found.append(f"rm {results / 'records' / steps.all[place].record}")
        else:
            found.append(by_dvc[fault])
    return list(dict.fromkeys(found))


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
