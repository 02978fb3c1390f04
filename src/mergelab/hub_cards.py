"""What a repository of the hub said of its model at a time: card, recipe, adapter, commit and date.

All of it was written by strangers: files are read up to a limit, histories up to a limit, and what
cannot be read is noted, never guessed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from mergelab import hub_api, hub_headers
from mergelab.errors import UserError
from mergelab.hub_api import TooLong, client
from mergelab.hub_errors import explained, no_hub, patient
from mergelab.hub_files import COMMIT
from mergelab.yamlfile import MAX_BYTES

CARD, ADAPTER, RECORD = "README.md", "adapter_config.json", "merge.json"
RECIPES = ("mergekit_config.yml", "mergekit_moe_config.yml")
NAME = re.compile(r"[\w.-]+(?:/[\w.-]+)?\Z", re.A)  # of a repository or data set
WEIGHTS = ((".safetensors", ".safetensors.index.json"), (".bin", ".bin.index.json"))
MAX_LISTED = 1000  # commits of a history, files of a folder; ordinary models have a dozen
KEPT = ("base_model", "datasets", "license", "tags")  # of a card whose text is gated
GATED = "gated: without access only the front matter of its card is known"
STRANGE = (TypeError, KeyError, ValueError, AttributeError, RecursionError)  # an answer of no hub
NO_REVISION = "has no such commit or branch"
LACKS = {  # the client's errors that tell of a repository, not of the network
    "GatedRepoError": "gated",
    "DisabledRepoError": "disabled by the hub",
    "RepositoryNotFoundError": "deleted, private or never there",
    "RevisionNotFoundError": NO_REVISION,
    "HFValidationError": "is no name of a hub model",
}


@dataclass(frozen=True)
class Page:
    """A repository (or local folder) at one commit; texts are empty where there is no such file.

    `date` is the commit's, ISO 8601 in UTC; a local folder has neither."""

    repo: str
    commit: str | None
    date: str | None
    card: str = ""
    recipe: str = ""
    adapter: str = ""
    notes: tuple[str, ...] = ()


def lacking(error: UserError) -> str | None:
    """Why there is no such repository for us, if `error` says that; None for other failures."""
    if isinstance(error, TooLong):
        return "what the hub says of it is too long to be read"
    cause: Any = error.__context__
    known = (LACKS[kind.__name__] for kind in type(cause).__mro__ if kind.__name__ in LACKS)
    bare = type(cause).__name__ == "HfHubHTTPError"  # a mirror's, that gives no reason
    missing = bare and cause.response.status_code == 404
    return next(known, "the hub does not tell of it (HTTP 404)" if missing else None)


def moment(text: str) -> datetime:
    """A date or time of ISO 8601; a date means its end, a time without zone UTC."""
    try:
        value = _time(text)
    except ValueError:
        raise UserError(f"{text!r} is no date. Write it as 2024-01-29.") from None
    return value.replace(hour=23, minute=59, second=59) if len(text) == 10 else value


def _time(text: str) -> datetime:
    """A time in UTC; raises ValueError."""
    value = datetime.fromisoformat(text)
    try:
        return value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC)
    except OverflowError:  # at the ends of the calendar
        raise ValueError(text) from None


def iso(value: datetime) -> str:
    """A time as it is written: 2024-01-29T12:00:00Z."""
    return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True)
class Commit:
    """A commit of a history, and when it was made."""

    id: str
    date: datetime


def history(repo: str, revision: str) -> list[Commit]:
    """The newest commits of a branch, tag or commit, the last one first; one request per page."""
    try:
        answers = _pages(repo, "commits", revision)
        found = [Commit(str(one["id"]), _time(str(one["date"]))) for one in answers]
    except STRANGE:
        found = []
    good = bool(found) and all(COMMIT.match(one.id) for one in found)
    if not good or (COMMIT.match(revision) and found[0].id != revision):
        raise no_hub(repo)
    return found


def weights_date(repo: str, commit: str) -> datetime | None:
    """When the weights of a commit were made: the last change of its safetensors files, else of its
    .bin files (an index with its shards); None if there are none, or the hub does not tell.

    Asks for the `lastCommit` of each file, which the hub lists with `expand` (in huggingface_hub:
    HfApi.list_repo_tree, RepoFile.last_commit). Raises UserError."""
    try:
        answers = _pages(repo, "tree", commit, expand="true")
        told = [(str(one["path"]), one["lastCommit"]) for one in answers if one.get("lastCommit")]
        for names in WEIGHTS:
            if found := [_time(str(last["date"])) for name, last in told if name.endswith(names)]:
                return max(found)
    except STRANGE:
        raise no_hub(repo) from None
    return None


def _pages(repo: str, what: str, revision: str, **params: str) -> list[Any]:
    """All that the hub lists of a revision (up to MAX_LISTED), as JSON that is not looked at."""
    with explained(repo, revision):
        start = f"{hub_api.address(repo)}/{what}/{quote(revision, safe='')}"
        answers: list[Any] = patient(lambda: hub_api.listed(start, MAX_LISTED, **params))
    return answers


def current(commits: list[Commit], as_of: datetime | None) -> Commit | None:
    """The commit that was the newest at `as_of` (now, if None); None if there was none yet."""
    return next((one for one in commits if as_of is None or one.date <= as_of), None)


def page(repo: str, revision: str) -> Page:
    """What `repo` says at `revision`; `repo` of the answer is the name that it has now.

    Files are kept in the client's cache, by commit. Raises UserError."""
    try:
        with explained(repo, revision):
            info = patient(lambda: hub_api.info(repo, revision))
        name, commit, front = info["id"], info["sha"], info.get("cardData") or {}
        sizes = {str(file["rfilename"]): file.get("size") for file in info.get("siblings") or ()}
        date = _time(info["lastModified"]) if info.get("lastModified") else None
    except STRANGE:
        raise no_hub(repo) from None
    asked = revision if COMMIT.match(revision) else commit
    good = isinstance(name, str) and isinstance(commit, str) and commit == asked
    if not good or not NAME.match(name) or not COMMIT.match(commit):
        raise no_hub(repo)
    read = _Reader(name, commit, sizes)
    card, adapter = read.text(CARD), read.text(ADAPTER)
    recipe = next(filter(None, map(read.text, RECIPES)), "")
    if read.gated and not card:
        known = {key: front[key] for key in KEPT if isinstance(front, dict) and front.get(key)}
        card = f"---\n{yaml.safe_dump(known)}---\n"
    return Page(name, commit, iso(date) if date else None, card, recipe, adapter, read.told)


class _Reader:
    """Reads small text files of one commit; `notes` says what could not be read."""

    def __init__(self, repo: str, commit: str, sizes: dict[str, Any]) -> None:
        self.repo, self.commit, self.sizes = repo, commit, sizes
        self.notes: list[str] = []
        self.gated = False

    @property
    def told(self) -> tuple[str, ...]:
        """The notes, each once."""
        return tuple(dict.fromkeys(self.notes))

    def text(self, name: str) -> str:
        """A file's text, or nothing: it is not there, too large, or not for us."""
        if name not in self.sizes:
            return ""
        size = self.sizes[name]
        if type(size) is not int or size > MAX_BYTES:
            self.notes.append(f"{name} was not read: it is larger than {MAX_BYTES:,} bytes")
            return ""
        try:
            with explained(self.repo, self.commit):
                fetch = client().hf_hub_download
                found = patient(lambda: fetch(self.repo, name, revision=self.commit))
        except UserError as error:
            self.gated = self.gated or lacking(error) == "gated"
            if not lacking(error):
                raise
            self.notes.append(GATED if self.gated else f"{name} was not read")
            return ""
        return text_of(Path(found))


def text_of(path: Path) -> str:
    """The first megabyte of a file as text; nothing if there is no such file."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return ""


def folder_page(folder: Path) -> Page | tuple[str, str]:
    """What a local folder says of its model; (repo, commit) if it was downloaded by mergelab."""
    if fetched := hub_headers.origin(folder):
        return fetched["hub"], fetched["commit"]
    card, adapter = text_of(folder / CARD), text_of(folder / ADAPTER)
    recipe = next(filter(None, (text_of(folder / name) for name in RECIPES)), "")
    return Page(str(folder), None, None, card, recipe, adapter)
