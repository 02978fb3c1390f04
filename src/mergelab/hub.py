"""Models from a Hugging Face hub: pinned to a commit, every byte checked, nothing half-written.

What a hub answers is untrusted (contract C8): names, sizes and hashes are checked here, because
the client checks sizes only. Messages never hold a token or the text of a server."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergelab.checkpoint import INDEX
from mergelab.errors import Problems, UserError
from mergelab.folders import alone, move_into_place, partial_folder
from mergelab.hub_errors import explained, hub_url
from mergelab.hub_files import COMMIT, HubFile, is_plausible, is_safe_name, needed
from mergelab.progress import say
from mergelab.record import file_sha256, write_json
from mergelab.study import Study

VERSION = 1
HUB_ID = re.compile(
    r"([A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*)(?:@([A-Za-z0-9_][\w./+-]*))?\Z", re.A
)
MAX_INDEX_BYTES = 64_000_000
SOURCE = "source.json"


@dataclass(frozen=True)
class Pinned:
    """A commit of a hub repository; `files` is empty if no lock names them."""

    repo: str
    commit: str
    files: tuple[HubFile, ...] = ()

    def __str__(self) -> str:
        return f"{self.repo}@{self.commit}"


def split(hub_id: str, kind: str = "model") -> tuple[str, str | None]:
    """Cut org/name[@revision] in two. Raises UserError if it is no hub id.

    `kind` is "model" or "dataset"."""
    match = HUB_ID.match(hub_id)
    if not match or ".." in hub_id or "--" in match[1]:
        example = ", for example HuggingFaceTB/SmolLM2-135M@main with a lock"
        raise UserError(
            f"{hub_id!r} is no hub {kind}: write org/name@<40-hex commit>"
            f"{example if kind == 'model' else ''}."
        )
    return match[1], match[2]


def lock(study: Study, hub_ids: Iterable[str] = ()) -> dict[str, Any]:
    """Resolve every hub model of `study` (and `hub_ids`) to a commit and write lock.json.

    Raises UserError with every model that cannot be pinned; then nothing is written."""
    wanted = {model.hub for model in study.models.values() if model.hub} | set(hub_ids)
    before = _read_lock(study.lock) if study.lock.exists() else {}
    problems, models = Problems(), {}
    if not wanted:
        say(f"{study.folder}: no model comes from a hub; there is nothing to lock.")
    for hub_id in sorted(wanted):
        try:
            pinned = _pin(hub_id)
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
    locked = {"version": VERSION, "models": models}
    write_json(study.lock, locked)
    return locked


def resolve(hub_id: str, lock_path: Path) -> Pinned:
    """The commit that `hub_id` stands for: from the lock, or its own 40-hex revision.

    Asks no server. Raises UserError for a branch, tag or nothing that is not in the lock."""
    repo, revision = split(hub_id)
    entry = _read_lock(lock_path).get(hub_id) if lock_path.exists() else None
    if entry is not None:
        return _locked(hub_id, entry, lock_path)
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


def download(pinned: Pinned, out: Path) -> dict[str, Any]:
    """Fetch the files of a commit into the folder `out` and check each byte by its hash.

    Asks nothing if `out` holds them already. Raises UserError; then `out` is as it was before."""
    account = _already_there(pinned, out)
    if account is None:
        with alone(out):
            account = _already_there(pinned, out) or _fetch(pinned, out)
    return account


def dataset_file(hub_id: str, name: str) -> Path:
    """One file of a dataset at its pinned commit, from the client's cache or the hub.

    Raises UserError if there is no commit, or `name` could lie outside the repository."""
    repo, revision = split(hub_id, "dataset")
    if not COMMIT.match(revision or ""):
        raise UserError(f"pin the commit: hub: {repo}@<40 hexadecimal digits>")
    if not is_safe_name(name):
        raise UserError(f"{name!r} in 'files' is no path inside {repo}. Write it as data/a.jsonl.")
    with explained(repo, revision, "dataset"):
        found = _client().hf_hub_download(repo, name, repo_type="dataset", revision=revision)
    return Path(found)


def _already_there(pinned: Pinned, out: Path) -> dict[str, Any] | None:
    files = pinned.files or _noted_files(out, pinned)
    if not files or not out.is_dir() or _differences(out, files):
        return None
    say(f"{pinned}: already in {out}")
    return _account(pinned, files, out)


def _fetch(pinned: Pinned, out: Path) -> dict[str, Any]:
    files = _agreed_files(pinned)
    partial = partial_folder(out, pinned.commit[:12])
    _check_room(pinned, files, partial)
    with explained(pinned.repo, pinned.commit):
        _snapshot(pinned, files, partial)
    if wrong := _differences(partial, files):
        shutil.rmtree(partial)
        raise UserError(
            f"{pinned}: {'; '.join(wrong)}. The download was thrown away; run the command again. "
            f"If it happens twice, {hub_url()} or a proxy on the way changes the file."
        )
    shutil.rmtree(partial / ".cache", ignore_errors=True)
    account = _account(pinned, files, partial)
    write_json(partial / SOURCE, {key: account[key] for key in ("hub", "commit", "files")})
    move_into_place(partial, out)
    return account


def _pin(hub_id: str) -> Pinned:
    repo, revision = split(hub_id)
    commit, listing = _listing(repo, revision)
    if revision and COMMIT.match(revision) and commit != revision:
        raise UserError(
            f"{hub_id}: the hub answered with another commit, {commit}. Check HF_ENDPOINT."
        )
    pinned = Pinned(repo, commit)
    names = needed(pinned, listing, lambda: _read_index(pinned, listing[INDEX]))
    return Pinned(repo, commit, tuple(listing[name] for name in names))


def _client() -> Any:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    return HfApi(
        endpoint=os.environ.get("HF_ENDPOINT", "").rstrip("/") or None, library_name="mergelab"
    )


def _listing(repo: str, revision: str | None) -> tuple[str, dict[str, HubFile]]:
    """The commit behind a revision and all its files by name; one request, no retries."""
    try:
        with explained(repo, revision):
            info = _client().model_info(repo, revision=revision, files_metadata=True, timeout=30)
        files = [
            HubFile(s.rfilename, s.size, s.blob_id, s.lfs.sha256 if s.lfs else None)
            for s in info.siblings or ()
        ]
        good = COMMIT.match(str(info.sha)) and all(is_plausible(file) for file in files)
    except (TypeError, KeyError, ValueError, AttributeError, RecursionError):
        good = None  # the client took the answer apart, and it was no model's
    if not good:
        raise UserError(f"{repo}: {hub_url()} does not answer like a hub. Check HF_ENDPOINT.")
    return info.sha, {file.name: file for file in files}


def _read_index(pinned: Pinned, file: HubFile) -> str:
    if file.size > MAX_INDEX_BYTES:
        raise UserError(f"{pinned}: {INDEX} has {file.size:,} bytes, too many for an index.")
    with tempfile.TemporaryDirectory() as folder:
        with explained(pinned.repo, pinned.commit):
            _snapshot(pinned, (file,), Path(folder))
        if wrong := _differences(Path(folder), (file,)):
            raise UserError(f"{pinned}: {wrong[0]}. Run the command again.")
        return (Path(folder) / INDEX).read_text(encoding="utf-8", errors="replace")


def _read_lock(path: Path) -> dict[str, Any]:
    try:
        models = json.loads(path.read_text(encoding="utf-8"))["models"]
        return {hub_id: dict(entry.items()) for hub_id, entry in models.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"{path}: is no lock file. Delete it and run: mergelab lock {path.parent}"
        ) from None


def _locked(hub_id: str, entry: Any, path: Path) -> Pinned:
    repo, revision = split(hub_id)
    try:
        commit = entry["commit"]
        files = tuple(
            HubFile(name, facts["size"], facts["blob_id"], facts.get("sha256"))
            for name, facts in sorted(entry["files"].items())
        )
        good = all(is_plausible(file) and is_safe_name(file.name) for file in files)
        good = good and bool(files) and COMMIT.match(commit) is not None
        good = good and (not COMMIT.match(revision or "") or commit == revision)
    except (KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise UserError(
            f"{path}: its entry for {hub_id} is damaged. Run: mergelab lock {path.parent}"
        )
    return Pinned(repo, commit, files)


def _noted_files(out: Path, pinned: Pinned) -> tuple[HubFile, ...]:
    """The files of an earlier download of the same commit into `out`, or none."""
    note = out / SOURCE
    try:
        entry = json.loads(note.read_text(encoding="utf-8"))
        same = (entry["hub"], entry["commit"]) == (pinned.repo, pinned.commit)
        return _locked(str(pinned), entry, note).files if same else ()
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return ()


def _agreed_files(pinned: Pinned) -> tuple[HubFile, ...]:
    """Ask the hub for the commit's files; where a lock names them, both must say the same."""
    if not pinned.files:
        return _pin(str(pinned)).files
    _, listing = _listing(pinned.repo, pinned.commit)
    for file in pinned.files:
        if file.name not in listing:
            raise UserError(
                f"{pinned}: the hub has no {file.name} at this commit any more. "
                "Pin another commit and run mergelab lock again."
            )
        if listing[file.name] != file:
            raise UserError(
                f"{pinned}: {file.name} on the hub is not the file that was locked (size or hash "
                "differ). Do not trust it; if you know why, run mergelab lock again."
            )
    return pinned.files


def _check_room(pinned: Pinned, files: Iterable[HubFile], folder: Path) -> None:
    have = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    need = sum(file.size for file in files) - have
    free = shutil.disk_usage(folder).free
    if need > free:
        raise UserError(
            f"{pinned}: needs {need / 1e9:.1f} GB; {folder.parent} has {free / 1e9:.1f} GB free. "
            "Make room or choose another disk."
        )


def _snapshot(pinned: Pinned, files: Iterable[HubFile], folder: Path) -> None:
    _client().snapshot_download(
        pinned.repo,
        revision=pinned.commit,
        local_dir=folder,
        allow_patterns=[glob.escape(file.name) for file in files],
    )


def _differences(folder: Path, files: Iterable[HubFile]) -> list[str]:
    """What is not as pinned, in words; empty if every file has its size and hash."""
    wrong = []
    for file in files:
        path = folder / file.name
        if not path.is_file():
            wrong.append(f"{file.name} is missing")
        elif path.stat().st_size != file.size:
            wrong.append(f"{file.name} has {path.stat().st_size:,} bytes instead of {file.size:,}")
        elif file.sha256 and file_sha256(path) != file.sha256:
            wrong.append(f"{file.name} has another sha256 than was pinned")
        elif not file.sha256 and _git_blob(path) != file.blob_id:
            wrong.append(f"{file.name} has another git hash than was pinned")
    return wrong


def _git_blob(path: Path) -> str:
    """The name git gives a file: sha1 of "blob <size>\\0" and its bytes."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _account(pinned: Pinned, files: Iterable[HubFile], folder: Path) -> dict[str, Any]:
    """What a record says of a download; every file with the sha256 of its bytes."""
    return {
        "hub": pinned.repo,
        "commit": pinned.commit,
        "files": {
            file.name: {**file.facts(), "sha256": file.sha256 or file_sha256(folder / file.name)}
            for file in files
        },
    }
