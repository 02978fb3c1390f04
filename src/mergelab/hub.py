"""Models from a Hugging Face hub: pinned to a commit, every byte checked, nothing half-written.

What a hub answers is untrusted (contract C8): names, sizes and hashes are checked here, because
the client checks sizes only. Messages never hold a token or the text of a server."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mergelab import hub_api
from mergelab.checkpoint import INDEX
from mergelab.errors import UserError
from mergelab.folders import alone, move_into_place, partial_folder
from mergelab.hub_api import client
from mergelab.hub_errors import explained, hub_url, no_hub, patient
from mergelab.hub_files import COMMIT, HubFile, is_plausible, is_safe_name, needed
from mergelab.progress import arriving, bar, say
from mergelab.record import file_sha256, write_json

T = TypeVar("T")
HUB_ID = re.compile(
    r"([A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*)(?:@([A-Za-z0-9_][\w./+-]*))?\Z", re.A
)
MAX_INDEX_BYTES = 64_000_000
REQUESTS = 8  # files fetched at a time
GRACE = 5.0  # seconds for the others to end after one failed, so that none writes any more
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


def download_dataset(
    repo: str, commit: str, names: Iterable[str], files: dict[str, HubFile], out: Path
) -> None:
    """Fetch files of a dataset's commit into `out` and check each byte by its hash in `files`."""
    wanted = list(names)
    if bad := [name for name in wanted if not is_safe_name(name)]:
        raise UserError(f"{repo}: holds a file named {bad[0]!r}. Do not use this dataset.")
    total = sum(files[name].size for name in wanted)
    with explained(repo, commit, "dataset"), arriving(f"fetch {repo}", out, total):
        snapshot(repo, commit, wanted, out, "dataset")
    if wrong := differences(out, [files[name] for name in wanted]):
        raise UserError(f"{repo}@{commit}: {'; '.join(wrong)}. Run the command again.")


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
        fetch = client().hf_hub_download
        found = patient(lambda: fetch(repo, name, repo_type="dataset", revision=revision))
    return Path(found)


def _already_there(pinned: Pinned, out: Path) -> dict[str, Any] | None:
    files = pinned.files or _noted_files(out, pinned)
    if not files or not out.is_dir() or differences(out, files):
        return None
    say(f"{pinned}: already in {out}")
    return _account(pinned, files, out)


def _fetch(pinned: Pinned, out: Path) -> dict[str, Any]:
    files = _agreed_files(pinned)
    partial = partial_folder(out, pinned.commit[:12])
    _link_from_other_studies(pinned, files, out, partial)
    _check_room(pinned, files, partial)
    missing = [file for file in files if differences(partial, [file])]
    total = sum(file.size for file in missing)
    with explained(pinned.repo, pinned.commit), arriving(f"fetch {pinned.repo}", partial, total):
        snapshot(pinned.repo, pinned.commit, [file.name for file in missing], partial)
    if wrong := differences(partial, files):
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


def _link_from_other_studies(
    pinned: Pinned, files: Iterable[HubFile], out: Path, partial: Path
) -> None:
    """Hard links to what another study has of the same commit: one copy on the disk."""
    for folder in sorted(out.parent.parent.parent.glob("*/models/*")):
        if folder == out or not _noted_files(folder, pinned):
            continue
        for file in files:
            place = partial / file.name
            if place.exists() or differences(folder, [file]):
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            with suppress(OSError):  # another disk, or one without links
                os.link(folder / file.name, place)


def check(pinned: Pinned, out: Path) -> list[str]:
    """What in `out` is not as pinned, in words, without asking a hub.

    Raises UserError if neither lock nor download says what the files should be."""
    files = pinned.files or _noted_files(out, pinned)
    if not files:
        raise UserError(f"{pinned}: nothing here says what its files should be. Fetch it first.")
    return differences(out, files)


def pin(hub_id: str) -> Pinned:
    """The commit that org/name[@revision] stands for now, and its files; asks the hub."""
    repo, revision = split(hub_id)
    commit, files = listing(repo, revision)
    if revision and COMMIT.match(revision) and commit != revision:
        raise UserError(
            f"{hub_id}: the hub answered with another commit, {commit}. Check HF_ENDPOINT."
        )
    pinned = Pinned(repo, commit)
    names = needed(pinned, files, lambda: _read_index(pinned, files[INDEX]))
    return Pinned(repo, commit, tuple(files[name] for name in names))


def licence(pinned: Pinned) -> str | None:
    """The licence that a repository's card declares at its commit, or None."""
    try:
        with explained(pinned.repo, pinned.commit):
            answer = patient(lambda: hub_api.info(pinned.repo, pinned.commit))
    except (ValueError, RecursionError):
        raise no_hub(pinned.repo) from None
    front = answer.get("cardData") if isinstance(answer, Mapping) else None
    found = front.get("license") if isinstance(front, Mapping) else None
    return found if isinstance(found, str) else None


def listing(repo: str, revision: str | None, kind: str = "model") -> tuple[str, dict[str, HubFile]]:
    """The commit behind a revision and all its files by name; one request."""
    try:
        with explained(repo, revision, kind):
            found = patient(lambda: hub_api.info(repo, revision, kind))
        commit, files = found["sha"], [_listed(one) for one in found.get("siblings") or ()]
        good = COMMIT.match(str(commit)) and all(is_plausible(file) for file in files)
    except (TypeError, KeyError, ValueError, AttributeError, RecursionError):
        good = None  # the answer is no repository's
    if not good:
        raise no_hub(repo)
    return commit, {file.name: file for file in files}


def _listed(one: Mapping[str, Any]) -> HubFile:
    """A file as the API lists it; raises if it is listed in another way."""
    sha256 = one["lfs"]["sha256"] if one.get("lfs") else None
    return HubFile(one["rfilename"], one["size"], one["blobId"], sha256)


def _read_index(pinned: Pinned, file: HubFile) -> str:
    if file.size > MAX_INDEX_BYTES:
        raise UserError(f"{pinned}: {INDEX} has {file.size:,} bytes, too many for an index.")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        with explained(pinned.repo, pinned.commit):
            snapshot(pinned.repo, pinned.commit, [file.name], Path(folder))
        if wrong := differences(Path(folder), (file,)):
            raise UserError(f"{pinned}: {wrong[0]}. Run the command again.")
        return (Path(folder) / INDEX).read_text(encoding="utf-8", errors="replace")


def read_entry(hub_id: str, entry: Any, path: Path) -> Pinned:
    """What `path` (a lock, the note of a download) holds of a hub model, checked."""
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
        return read_entry(str(pinned), entry, note).files if same else ()
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return ()


def _agreed_files(pinned: Pinned) -> tuple[HubFile, ...]:
    """Ask the hub for the commit's files; where a lock names them, both must say the same."""
    if not pinned.files:
        return pin(str(pinned)).files
    _, files = listing(pinned.repo, pinned.commit)
    for file in pinned.files:
        if file.name not in files:
            raise UserError(
                f"{pinned}: the hub has no {file.name} at this commit any more. "
                "Pin another commit and run mergelab lock again."
            )
        if files[file.name] != file:
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


def snapshot(
    repo: str, commit: str, names: Iterable[str], folder: Path, kind: str = "model"
) -> None:
    """Files of a commit, several at a time; those that are there whole are not asked for again.

    The client's own snapshot_download would read a list of all files first, however long."""
    fetch = client().hf_hub_download
    place = {"repo_type": kind, "revision": commit, "local_dir": folder}
    in_parallel(lambda name: patient(lambda: fetch(repo, name, **place)), names)


def in_parallel(call: Callable[[T], Any], things: Iterable[T]) -> None:
    """Do `call` with each thing, REQUESTS at a time; the first error is raised when it comes.

    It waits GRACE seconds, and Ctrl-C does not wait, for what is under way, which may sleep or
    read for minutes; the command line ends without it, too."""
    pool = ThreadPoolExecutor(REQUESTS)
    running = [pool.submit(call, thing) for thing in things]
    try:
        for done in as_completed(running):
            done.result()
    except Exception:
        pool.shutdown(wait=False, cancel_futures=True)
        wait([future for future in running if not future.cancelled()], GRACE)
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def differences(folder: Path, files: Iterable[HubFile]) -> list[str]:
    """What is not as pinned, in words; empty if every file has its size and hash."""
    wrong, files = [], list(files)
    with bar("check files", sum(file.size for file in files)) as progress:
        for file in files:
            path = folder / file.name
            if not path.is_file():
                wrong.append(f"{file.name} is missing")
            elif (have := path.stat().st_size) != file.size:
                wrong.append(f"{file.name} has {have:,} bytes instead of {file.size:,}")
            elif file.sha256 and file_sha256(path, progress.advance) != file.sha256:
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
