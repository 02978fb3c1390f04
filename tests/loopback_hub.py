"""A Hugging Face hub on 127.0.0.1, for tests: commits, branches, LFS hashes, gates and faults.

    with LoopbackHub() as hub:
        commit = hub.publish("acme/tiny", folder)          # a new commit on main
        ... HF_ENDPOINT=hub.url ...

Serves what huggingface_hub asks for: model (and dataset) info, trees, histories, and files by HEAD
and GET with ranges; old names of renamed repositories lead to the new ones (307); takes uploads
(LFS and plain) with the token. A repository named "datasets/org/name" is a dataset."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

import yaml

LFS = (".safetensors", ".bin", ".gguf", ".arrow", ".parquet")
API = re.compile(
    r"/api/(models|datasets)/([^/]+(?:/(?!revision/|tree/|commits/)[^/]+)?)"
    r"(?:/(revision|tree|commits)/([^/]+))?\Z"
)
RESOLVE = re.compile(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)\Z")
UPLOAD = re.compile(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/([^/]+)\Z")
BATCH = re.compile(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch\Z")
FRONT = re.compile(r"---\n(.*?\n)---\n", re.DOTALL)
RANGE = re.compile(r"bytes=(\d+)-(\d*)\Z")


@dataclass
class Repo:
    """Commits (file name to bytes), their dates, and the branches that point at them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    dates: dict[str, str] = field(default_factory=dict)
    history_gated: bool = False


class LoopbackHub:
    """The server, and the switches of its faults; `requests` lists "METHOD /path" as they came."""

    token = "hf_" + "LoopbackSecret" * 2  # the only token that opens a gated repository

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.renamed: dict[str, str] = {}  # old names to new ones
        self.page = 50  # commits of a history, files of a folder that come at once
        self.requests: list[str] = []
        self.authorized: list[str] = []  # those of them that came with an Authorization header
        self.status: int | None = None  # every answer has this status code
        self.flipped: set[str] = set()  # files that arrive with their last byte changed
        self.stalled: set[str] = set()  # files that stop half-way
        self.padded: set[str] = set()  # repositories whose lists end in 20 MB of blanks
        self.title = "a title"  # of the commits in a history
        self.treeless = False  # folders are not listed, as by some mirrors: a bare 404
        self.hidden: set[str] = set()  # files that are listed but answer EntryNotFound
        self.answers: list[tuple[int, dict[str, str]]] = []  # status and headers, once each
        self.cuts: dict[str, list[int]] = {}  # bytes after which the connection closes, once each
        self.sizeless: set[str] = set()  # files that come without a Content-Length
        self.pause = 0.0  # seconds before each 64 kB of a file
        self.gate: threading.Barrier | None = None  # where questions wait for each other
        self.elsewhere: str | None = None  # address of the hub that really serves LFS files
        self.objects: dict[str, bytes] = {}  # uploaded LFS files by sha256
        self.stopped = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._server.hub = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Close the port: from now on connections are refused."""
        if not self.stopped.is_set():
            self.stopped.set()
            self._server.shutdown()
            self._server.server_close()

    def publish(
        self,
        repo: str,
        files: Path | dict[str, bytes],
        *,
        branch: str = "main",
        gated: bool = False,
        date: str = "2024-01-01T00:00:00.000Z",
    ) -> str:
        """Commit a folder's files (or names and bytes) to a branch; returns the commit.

        Commits of a repository are listed in the order they came, whatever their dates."""
        if isinstance(files, Path):
            paths = [path for path in sorted(files.rglob("*")) if path.is_file()]
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in paths}
        known = self.repos.setdefault(repo, Repo())
        digest = hashlib.sha1(f"{repo} {len(known.commits)}".encode())
        for name, data in sorted(files.items()):
            digest.update(f"\0{name}\0{_blob(data)}".encode())
        commit = digest.hexdigest()
        known.commits[commit] = dict(files)
        known.branches[branch] = commit
        known.gated = gated
        known.dates[commit] = date
        return commit

    def rename(self, old: str, new: str) -> None:
        """Give a repository another name; the old one leads to it."""
        self.repos[new] = self.repos.pop(old)
        self.renamed[old] = new

    def delete(self, repo: str) -> None:
        """Take a repository away."""
        del self.repos[repo]


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(name: str, data: bytes) -> dict[str, Any]:
    """A file in both forms the API knows: siblings (blobId) and tree (oid)."""
    entry: dict[str, Any] = {"size": len(data), "blobId": _blob(data), "oid": _blob(data)}
    if name.endswith(LFS):
        sha256 = hashlib.sha256(data).hexdigest()
        pointer = (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n"
        ).encode()
        entry["blobId"] = entry["oid"] = _blob(pointer)
        size = {"size": len(data), "pointerSize": len(pointer)}
        entry["lfs"] = {**size, "sha256": sha256, "oid": sha256}
    return {**entry, "rfilename": name, "path": name, "type": "file"}


def _last_commit(repo: Repo, commit: str, name: str) -> str:
    """The commit, up to this one, that changed a file last."""
    names = list(repo.commits)
    names = names[: names.index(commit) + 1]
    data, last = repo.commits[commit][name], commit
    while names and repo.commits[names[-1]].get(name) == data:
        last = names.pop()
    return last


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> LoopbackHub:
        return self.server.hub  # type: ignore[attr-defined, no-any-return]

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: tests read `requests`."""

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def _serve(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {path}")
        if "authorization" in self.headers:
            self.hub.authorized.append(f"{self.command} {path}")
        if self.hub.gate:
            self.hub.gate.wait()
        if self.hub.status is not None:
            self._refuse(self.hub.status, None)
        elif self.hub.answers:
            status, headers = self.hub.answers.pop(0)
            self._answer(status, headers, b"")
        elif match := API.match(path):
            kind, name, what, revision = match.groups()
            repo = name if kind == "models" else f"datasets/{name}"
            if name in self.hub.renamed:
                place = self.path.replace(name, self.hub.renamed[name], 1)
                self._answer(307, {"Location": place}, b"")
            elif what == "commits":
                self._history(repo, unquote(revision))
            elif what == "tree":
                self._tree(repo, unquote(revision))
            else:
                self._info(repo, unquote(revision or "main"))
        elif match := RESOLVE.match(path):
            self._file(match[1], unquote(match[2]), unquote(match[3]))
        else:
            self._refuse(404, "RepoNotFound")

    def do_PUT(self) -> None:
        self.hub.requests.append(f"PUT {urlsplit(self.path).path}")
        data = self._body()
        self.hub.objects[hashlib.sha256(data).hexdigest()] = data
        self._answer(200, {}, b"")

    def do_POST(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append(f"POST {path}")
        body = self._body()
        if self.hub.status is not None:
            self._refuse(self.hub.status, None)
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif self.headers.get("authorization") != f"Bearer {self.hub.token}":
            self._refuse(401, None)
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name not in self.hub.repos:
                self.hub.publish(name, {".gitattributes": b""})
            self._json({"url": f"{self.hub.url}/{name}"})
        elif match := BATCH.match(path):
            objects = [self._slot(entry) for entry in json.loads(body)["objects"]]
            self._json({"transfer": "basic", "objects": objects})
        elif match := UPLOAD.match(path):
            (self._preupload if match[2] == "preupload" else self._take)(match[1], body)
        else:
            self._refuse(404, "RepoNotFound")

    def _slot(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Where an LFS file goes, unless it is there."""
        if entry["oid"] in self.hub.objects:
            return dict(entry)
        return {**entry, "actions": {"upload": {"href": f"{self.hub.url}/put/{entry['oid']}"}}}

    def _preupload(self, repo: str, body: bytes) -> None:
        names = [entry["path"] for entry in json.loads(body)["files"]]
        modes = {True: "lfs", False: "regular"}
        files = [{"path": n, "uploadMode": modes[n.endswith(LFS)]} for n in names]
        self._json({"files": [{**file, "shouldIgnore": False} for file in files]})

    def _take(self, repo: str, body: bytes) -> None:
        """A commit, as lines of JSON: a header, then one line per file."""
        known = self.hub.repos[repo]
        files = dict(known.commits[known.branches["main"]])
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "lfsFile":
                files[entry["value"]["path"]] = self.hub.objects[entry["value"]["oid"]]
            elif entry["key"] == "deletedFile":
                del files[entry["value"]["path"]]
        commit = self.hub.publish(repo, files)
        page = f"{self.hub.url}/{repo}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": page})

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _json(
        self, answer: Any, headers: dict[str, str] | None = None, *, padded: bool = False
    ) -> None:
        headers = {**(headers or {}), "Content-Type": "application/json"}
        body = json.dumps(answer).encode()
        self._answer(200, headers, body + b" " * 20_000_000 if padded else body)

    def _commit(self, repo: str, revision: str) -> str | None:
        """The commit of a revision; None after an error answer."""
        known = self.hub.repos.get(repo)
        if known is None:
            self._refuse(404 if "authorization" in self.headers else 401, "RepoNotFound")
            return None
        commit = known.branches.get(revision, revision)
        if commit not in known.commits:
            self._refuse(404, "RevisionNotFound")
            return None
        return commit

    def _history(self, repo: str, revision: str) -> None:
        """The commits up to a revision, the last one first, in pages that name the next one."""
        commit = self._commit(repo, revision)
        if commit is None:
            return
        known = self.hub.repos[repo]
        if known.history_gated:
            self._refuse(403, "GatedRepo")
            return
        names = list(known.commits)
        about = {"authors": [{"user": "someone"}], "title": self.hub.title, "message": ""}
        found = [{"id": one, "date": known.dates[one], **about} for one in names]
        self._paged(repo, found[names.index(commit) :: -1])

    def _paged(self, repo: str, entries: list[dict[str, Any]]) -> None:
        """A part of a list, which names the next one."""
        query = parse_qs(urlsplit(self.path).query)
        number = int(query.pop("p", ["0"])[0])
        first, last = number * self.hub.page, (number + 1) * self.hub.page
        headers = {}
        if last < len(entries):
            more = urlencode({**query, "p": number + 1}, doseq=True)
            place = f"{self.hub.url}{urlsplit(self.path).path}?{more}"
            headers["Link"] = f'<{place}>; rel="next"'
        self._json(entries[first:last], headers, padded=repo in self.hub.padded)

    def _tree(self, repo: str, revision: str) -> None:
        """The files at the top of a commit; with `expand`, each with its last commit."""
        commit = self._commit(repo, revision)
        if commit is None:
            return
        known = self.hub.repos[repo]
        if known.history_gated:
            self._refuse(403, "GatedRepo")
            return
        if self.hub.treeless:
            self._refuse(404, None)
            return
        names = [name for name in known.commits[commit] if "/" not in name]
        entries = [_entry(name, known.commits[commit][name]) for name in names]
        if "expand" in parse_qs(urlsplit(self.path).query):
            for entry in entries:
                last = _last_commit(known, commit, entry["path"])
                about = {"id": last, "title": "a title", "date": known.dates[last]}
                entry["lastCommit"] = about
        self._paged(repo, entries)

    def _info(self, repo: str, revision: str) -> None:
        commit = self._commit(repo, revision)
        if commit is None:
            return
        files = self.hub.repos[repo].commits[commit]
        answer: dict[str, Any] = {"id": repo, "sha": commit}
        answer["lastModified"] = self.hub.repos[repo].dates[commit]
        answer["siblings"] = [_entry(name, data) for name, data in files.items()]
        if front := FRONT.match(files.get("README.md", b"").decode()):
            with suppress(yaml.YAMLError, ValueError):  # of such a card the hub tells nothing
                answer["cardData"] = json.loads(json.dumps(yaml.safe_load(front[1])))
        self._json(answer, padded=repo in self.hub.padded)

    def _file(self, repo: str, revision: str, name: str) -> None:
        commit = self._commit(repo, revision)
        if commit is None:
            return
        known = self.hub.repos[repo]
        given = self.headers.get("authorization")
        if known.gated and given != f"Bearer {self.hub.token}":
            self._refuse(403 if given else 401, "GatedRepo")
            return
        data = known.commits[commit].get(name)
        if data is None or name in self.hub.hidden:
            self._refuse(404, "EntryNotFound")
            return
        entry = _entry(name, data)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{entry["oid"]}"', "Accept-Ranges": "bytes"}
        if "lfs" in entry:
            headers["X-Linked-Etag"] = f'"{entry["lfs"]["sha256"]}"'
            headers["X-Linked-Size"] = str(len(data))
            if self.hub.elsewhere:
                place = f"{self.hub.elsewhere}/{repo}/resolve/{commit}/{name}"
                self._answer(302, {**headers, "Location": place}, b"")
                return
        self._bytes(name, data, headers)

    def _bytes(self, name: str, data: bytes, headers: dict[str, str]) -> None:
        if name in self.hub.flipped:
            data = data[:-1] + bytes([data[-1] ^ 1])
        start, status = 0, 200
        if match := RANGE.match(self.headers.get("Range", "")):
            start, stop = int(match[1]), int(match[2] or len(data) - 1) + 1
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            data, status = data[start:stop], 206
        if name in self.hub.stalled and self.command == "GET":
            self._answer(
                status, {**headers, "Content-Length": str(len(data))}, data[: len(data) // 2]
            )
            self.wfile.flush()
            self.hub.stopped.wait(300)
            self.close_connection = True
            return
        cuts = self.hub.cuts.get(name, [])
        if self.command == "GET" and (cuts or name in self.hub.sizeless or self.hub.pause):
            self._drip(status, headers, data, name, cuts.pop(0) if cuts else len(data))
        else:
            self._answer(status, headers, data)

    def _drip(
        self, status: int, headers: dict[str, str], data: bytes, name: str, stop: int
    ) -> None:
        """The first `stop` bytes, slowly; then the connection closes."""
        sized = {} if name in self.hub.sizeless else {"Content-Length": str(len(data))}
        self._answer(status, {**headers, **sized}, b"", measured=False)
        for start in range(0, min(stop, len(data)), 1 << 16):
            self.hub.stopped.wait(self.hub.pause)
            self.wfile.write(data[start : min(start + (1 << 16), stop)])
        self.wfile.flush()
        self.close_connection = True

    def _refuse(self, status: int, code: str | None) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": f"<server text {code}>"} if code else {}
        self._answer(status, headers, b'{"error": "server text"}')

    def _answer(
        self, status: int, headers: dict[str, str], body: bytes, *, measured: bool = True
    ) -> None:
        self.send_response(status)
        length = {"Content-Length": str(len(body))} if measured else {}
        for key, value in {**length, **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            with suppress(ConnectionError):  # the client has read enough
                self.wfile.write(body)
