"""lock.json of a study: what each hub model and dataset stands for, a commit and its files."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from mergelab.errors import Problems, UserError
from mergelab.hub import Pinned, listing, pin, read_entry, split
from mergelab.hub_files import COMMIT
from mergelab.progress import say
from mergelab.record import write_json
from mergelab.study import Study

VERSION = 1


def lock(
    study: Study,
    hub_ids: Iterable[str] = (),
    datasets: Collection[str] = (),
    more: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Resolve every hub model of `study` (and `hub_ids`), and `datasets`, to a commit and write
    lock.json; `more` gives further sections of it, from that of the models.

    Raises UserError with everything that cannot be pinned; then nothing is written."""
    wanted = {model.hub for model in study.models.values() if model.hub} | set(hub_ids)
    before = _read_lock(study.lock) if study.lock.exists() else {}
    problems, models, locked_sets = Problems(), {}, {}
    if not wanted and not datasets:
        say(f"{study.folder}: no model comes from a hub; there is nothing to lock.")
    for repo in sorted(set(datasets)):
        try:
            locked_sets[repo] = {"commit": listing(repo, None, "dataset")[0]}
            say(f"dataset {repo}: commit {locked_sets[repo]['commit']}")
        except UserError as error:
            problems.add(str(error))
    for hub_id in sorted(wanted):
        try:
            pinned = pin(hub_id)
        except UserError as error:
            problems.add(str(error))
            continue
        models[hub_id] = {
            "commit": pinned.commit,
            "files": {file.name: file.facts() for file in pinned.files},
        }
        was = before[hub_id].get("commit") if hub_id in before else None
        moved = f" (was {was})" if was not in (None, pinned.commit) else ""
        say(f"{hub_id}: commit {pinned.commit}{moved}, {len(pinned.files)} files")
    problems.raise_if_any()
    locked: dict[str, Any] = {"version": VERSION, "models": models}
    locked |= more(models) if more else {}
    if locked_sets:
        locked["datasets"] = locked_sets
    write_json(study.lock, locked)
    return locked


def resolve(hub_id: str, lock_path: Path) -> Pinned:
    """The commit that `hub_id` stands for: from the lock, or its own 40-hex revision.

    Asks no server. Raises UserError for a branch, tag or nothing that is not in the lock."""
    repo, revision = split(hub_id)
    entry = _read_lock(lock_path).get(hub_id) if lock_path.exists() else None
    if entry is not None:
        return read_entry(hub_id, entry, lock_path)
    if revision and COMMIT.match(revision):
        return Pinned(repo, revision)
    study = lock_path.parent
    if not (study / "study.yaml").is_file():
        raise UserError(
            f"model {hub_id}: there is no such folder here, and as a hub model it is not pinned. "
            f"Write {repo}@<40-hex commit>: the commit stands on the "
            "model's page, under Files, History.   (mergelab lock pins the models of a study.)"
        )
    raise UserError(
        f"{study / 'study.yaml'}: model {hub_id} is not pinned. Run: mergelab lock {study}   "
        f"(or write {repo}@<40-hex commit>)"
    )


def resolve_dataset(repo: str, lock_path: Path) -> str:
    """The commit of a dataset in the lock. Raises UserError if it is not there."""
    entry = _read_lock(lock_path, "datasets").get(repo, {}) if lock_path.exists() else {}
    commit = entry.get("commit")
    if not COMMIT.match(str(commit)):
        raise UserError(
            f"{lock_path.parent / 'study.yaml'}: dataset {repo} is not pinned. "
            f"Run: mergelab lock {lock_path.parent}"
        )
    return str(commit)


def pin_datasets(repos: Iterable[str], lock_path: Path) -> None:
    """Add datasets at their newest commits to a lock file, which may be a study's or not be there.

    All that it holds stays as it is."""
    whole: dict[str, Any] = {"version": VERSION, "models": {}}
    known: dict[str, Any] = {}
    if lock_path.exists():
        known = _read_lock(lock_path, "datasets")
        whole = json.loads(lock_path.read_text(encoding="utf-8"))
    for repo in sorted(set(repos) - known.keys()):
        known[repo] = {"commit": listing(repo, None, "dataset")[0]}
        say(f"dataset {repo}: commit {known[repo]['commit']}")
        write_json(lock_path, whole | {"datasets": known})


def _read_lock(path: Path, section: str = "models") -> dict[str, Any]:
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        entries = whole["models"] if section == "models" else whole.get(section, {})
        return {hub_id: dict(entry.items()) for hub_id, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"{path}: is no lock file. Delete it and run: mergelab lock {path.parent}"
        ) from None
