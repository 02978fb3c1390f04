"""Hub models: pinned, checked, and refused with words that say what to do next."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from loopback_hub import LoopbackHub
from safetensors.numpy import save

from mergelab import hub, hub_cards, hub_errors, lockfile
from mergelab.errors import UserError
from mergelab.study_file import load_study

TINY = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b'{"version": "1.0"}',
    "model.safetensors": save({"w": np.arange(6, dtype=np.float32)}),
    "consolidated.safetensors": b"the same weights again",
    "pytorch_model.bin": b"a pickle",
    "modeling_tiny.py": b"raise SystemExit('remote code ran')",
    "README.md": b"# tiny",
    "original/config.json": b"{}",
}
KEPT = ["config.json", "model.safetensors", "tokenizer.json"]
PATIENCE = 100.0  # seconds for a process to start or to end; what it must not wait for takes 300


def study_with(**models: str) -> Path:
    """recipes/x/study.yaml with hub models; returns its folder, relative to here."""
    folder = Path("recipes/x")
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"  {name}: {{hub: {hub_id}}}" for name, hub_id in models.items()]
    text = "title: T\nmodels:\n" + "\n".join(lines) + "\n"
    (folder / "study.yaml").write_text(text)
    return folder


def locked(*hub_ids: str) -> dict[str, dict[str, object]]:
    """Lock a study of these models; returns its entries."""
    folder = study_with(**{f"m{i}": hub_id for i, hub_id in enumerate(hub_ids)})
    lockfile.lock(load_study(folder))
    return dict(json.loads((folder / "lock.json").read_text())["models"])


def fetched(hub_id: str, out: Path = Path("results/x/models/m")) -> dict[str, object]:
    return hub.download(lockfile.resolve(hub_id, Path("recipes/x/lock.json")), out)


def message(hub_id: str) -> str:
    """What a failing fetch says; nothing may be left at its place."""
    out = Path("results/x/models/m")
    with pytest.raises(UserError) as caught:
        fetched(hub_id, out)
    assert not out.exists()
    return str(caught.value)


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_lock_pins_a_branch_to_its_commit_and_the_needed_files_to_their_hashes(server):
    commit = server.publish("acme/tiny", TINY)
    entry = locked("acme/tiny@main")["acme/tiny@main"]
    weights = TINY["model.safetensors"]
    assert entry["commit"] == commit
    assert sorted(entry["files"]) == KEPT
    assert entry["files"]["model.safetensors"]["size"] == len(weights)
    assert entry["files"]["model.safetensors"]["sha256"] == hashlib.sha256(weights).hexdigest()
    config = TINY["config.json"]
    blob = hashlib.sha1(b"blob %d\0" % len(config) + config).hexdigest()
    assert entry["files"]["config.json"] == {"size": len(config), "blob_id": blob}


def test_lock_file_is_sorted_and_ends_with_a_newline(server):
    server.publish("acme/tiny", TINY)
    locked("acme/tiny")
    text = Path("recipes/x/lock.json").read_text()
    assert text == json.dumps(json.loads(text), indent=1, sort_keys=True) + "\n"


def test_lock_takes_hub_ids_of_recipes_too(server):
    server.publish("acme/tiny", TINY)
    result = lockfile.lock(load_study(study_with(a="acme/tiny")), ["acme/tiny@main"])
    assert sorted(result["models"]) == ["acme/tiny", "acme/tiny@main"]


def test_a_branch_that_moved_after_the_lock_still_gives_the_locked_commit(server):
    old = server.publish("acme/tiny", TINY)
    locked("acme/tiny@main")
    server.publish("acme/tiny", {**TINY, "model.safetensors": save({"w": np.zeros(6)})})
    record = fetched("acme/tiny@main")
    out = Path("results/x/models/m")
    assert record["commit"] == old
    assert (out / "model.safetensors").read_bytes() == TINY["model.safetensors"]
    assert names(out) == sorted([*KEPT, "source.json"])


def test_a_record_holds_the_sha256_of_every_file(server):
    server.publish("acme/tiny", TINY)
    locked("acme/tiny")
    files = fetched("acme/tiny")["files"]
    assert {name: facts["sha256"] for name, facts in files.items()} == {
        name: hashlib.sha256(TINY[name]).hexdigest() for name in KEPT
    }


@pytest.mark.parametrize("pin", ["locked branch", "commit alone"])
def test_a_second_fetch_makes_no_requests(server, pin):
    commit = server.publish("acme/tiny", TINY)
    hub_id = "acme/tiny" if pin == "locked branch" else f"acme/tiny@{commit}"
    if pin == "locked branch":
        locked(hub_id)
    first = fetched(hub_id)
    server.requests.clear()
    assert fetched(hub_id) == first
    assert server.requests == []


def test_a_file_changed_on_disk_is_fetched_again(server):
    server.publish("acme/tiny", TINY)
    locked("acme/tiny")
    fetched("acme/tiny")
    weights = Path("results/x/models/m/model.safetensors")
    weights.write_bytes(bytes(len(TINY["model.safetensors"])))
    fetched("acme/tiny")
    assert weights.read_bytes() == TINY["model.safetensors"]


@pytest.mark.parametrize("hub_id", ["org/name", "org/name@main", "org/name@v1.0"])
def test_a_model_without_commit_and_lock_is_refused(server, hub_id):
    study_with(m=hub_id)
    assert message(hub_id) == (
        f"recipes/x/study.yaml: model {hub_id} is not pinned. Run: mergelab lock recipes/x   "
        "(or write org/name@<40-hex commit>)"
    )
    assert server.requests == []


def test_a_flipped_byte_is_caught_and_the_file_named(server):
    commit = server.publish("acme/tiny", TINY)
    locked("acme/tiny")
    server.flipped = {"model.safetensors", "config.json"}
    assert message("acme/tiny") == (
        f"acme/tiny@{commit}: config.json has another git hash than was pinned; "
        "model.safetensors has another sha256 than was pinned. The download was thrown away; run "
        f"the command again. If it happens twice, {server.url} or a proxy on the way changes the "
        "file."
    )
    server.flipped = set()
    fetched("acme/tiny")
    assert [path.name for path in Path("results/x/models").iterdir()] == ["m"]
    assert names(Path("results/x/models/m")) == sorted([*KEPT, "source.json"])


def test_a_commit_whose_files_changed_since_the_lock_is_refused(server):
    commit = server.publish("acme/tiny", TINY)
    locked("acme/tiny")
    server.repos["acme/tiny"].commits[commit]["model.safetensors"] = b"other weights"
    assert message("acme/tiny") == (
        f"acme/tiny@{commit}: model.safetensors on the hub is not the file that was locked (size "
        "or hash differ). Do not trust it; if you know why, run mergelab lock again."
    )


def test_a_locked_file_that_vanished_is_named(server):
    commit = server.publish("acme/tiny", TINY)
    locked("acme/tiny")
    del server.repos["acme/tiny"].commits[commit]["tokenizer.json"]
    assert message("acme/tiny") == (
        f"acme/tiny@{commit}: the hub has no tokenizer.json at this commit any more. "
        "Pin another commit and run mergelab lock again."
    )


def test_a_listed_file_that_the_hub_does_not_serve_is_named(server):
    commit = server.publish("acme/tiny", TINY)
    server.hidden = {"tokenizer.json"}
    assert message(f"acme/tiny@{commit}") == (
        f"acme/tiny@{commit}: the hub has no file tokenizer.json at this commit (HTTP 404). "
        "Pin another commit and run mergelab lock again."
    )


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_missing_model_says_to_check_the_spelling(server):
    assert message(f"acme/tinny@{COMMIT}") == (
        f"acme/tinny@{COMMIT}: the hub has no such model, or it is private (HTTP 401). "
        "Check the spelling; for a private model run: hf auth login"
    )


def test_a_missing_model_for_a_logged_in_user_is_a_404(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", server.token)
    assert message(f"acme/tinny@{COMMIT}") == (
        f"acme/tinny@{COMMIT}: the hub has no such model, or it is private (HTTP 404). "
        "Check the spelling; for a private model run: hf auth login"
    )


def test_a_missing_revision_points_to_the_list_of_commits(server):
    server.publish("acme/tiny", TINY)
    assert message(f"acme/tiny@{COMMIT}") == (
        f"acme/tiny@{COMMIT}: the model has no such branch, tag or commit (HTTP 404). "
        f"See {server.url}/acme/tiny/commits/main"
    )


def test_lock_reports_every_model_it_cannot_pin_and_writes_nothing(server):
    server.publish("acme/tiny", TINY)
    with pytest.raises(UserError) as caught:
        locked("acme/tiny", "acme/tiny@dev", "acme/tinny")
    assert str(caught.value).splitlines() == [
        "acme/tinny: the hub has no such model, or it is private (HTTP 401). "
        "Check the spelling; for a private model run: hf auth login",
        "acme/tiny@dev: the model has no such branch, tag or commit (HTTP 404). "
        f"See {server.url}/acme/tiny/commits/main",
    ]
    assert not Path("recipes/x/lock.json").exists()


@pytest.mark.parametrize(("token", "status"), [(None, 401), ("hf_WrongToken", 403)])
def test_a_gated_model_is_refused_without_the_right_token(server, monkeypatch, token, status):
    commit = server.publish("acme/gated", TINY, gated=True)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    text = message(f"acme/gated@{commit}")
    assert text == (
        f"acme/gated@{commit}: this model is gated and the hub refused it (HTTP {status}). "
        f"Accept its licence at {server.url}/acme/gated, then run: hf auth login"
    )


def test_a_gated_model_arrives_with_the_right_token(server, monkeypatch):
    commit = server.publish("acme/gated", TINY, gated=True)
    monkeypatch.setenv("HF_TOKEN", server.token)
    fetched(f"acme/gated@{commit}")
    for path in Path("results").rglob("*"):
        assert path.is_dir() or server.token.encode() not in path.read_bytes()


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (401, "the hub did not accept your login (HTTP 401). Log in again: hf auth login"),
        (
            403,
            "your login may not read this model (HTTP 403). Ask for access at {url}/acme/tiny, "
            "then log in with a token that may read it: hf auth login",
        ),
        (
            503,
            "{url} answers with an error (HTTP 503). Nothing was written; run the command again "
            "later.",
        ),
    ],
)
def test_a_refusing_hub_is_explained_by_its_status(server, status, text):
    server.publish("acme/tiny", TINY)
    server.status = status
    expected = f"acme/tiny@{COMMIT}: {text.format(url=server.url)}"
    assert message(f"acme/tiny@{COMMIT}") == expected
    assert len(server.requests) == 1


def test_a_hub_that_is_down_is_named_without_its_password(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url.replace("//", "//user:geheim@"))
    server.stop()
    assert message(f"acme/tiny@{COMMIT}") == (
        f"acme/tiny@{COMMIT}: cannot reach {server.url} (ConnectError). "
        "Check the network, the proxy and HF_ENDPOINT, then run the command again."
    )


def test_offline_mode_says_which_switch_forbids_it(server, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert message(f"acme/tiny@{COMMIT}") == (
        f"acme/tiny@{COMMIT}: is not on this machine yet, and HF_HUB_OFFLINE forbids to fetch it. "
        "Unset it."
    )
    assert server.requests == []


def sharded(*shards: str) -> dict[str, bytes]:
    index = {"metadata": {}, "weight_map": {f"w{i}": name for i, name in enumerate(shards)}}
    return {"config.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode()}


@pytest.mark.parametrize(
    "name", ["../../outside", "/etc/passwd", "a\\..\\b.safetensors", "a\x1b[2Jb.safetensors"]
)
def test_an_index_that_names_a_file_outside_is_refused(server, name):
    files = {**sharded("model-1.safetensors", name), "model-1.safetensors": b"x"}
    commit = server.publish("acme/evil", {**files, name: b"x"})
    assert message(f"acme/evil@{commit}") == (
        f"acme/evil@{commit}: model.safetensors.index.json names {name!r}, which is outside the "
        "model's folder. Do not use this model: its index is damaged or made to harm."
    )


def test_an_index_that_names_a_missing_shard_is_refused(server):
    commit = server.publish("acme/torn", sharded("model-1.safetensors"))
    assert message(f"acme/torn@{commit}") == (
        f"acme/torn@{commit}: model.safetensors.index.json names 'model-1.safetensors', and the "
        "repository has no such safetensors file. Pin another commit."
    )


@pytest.mark.parametrize("text", [b"[]", b"{", b'{"weight_map": 3}', b"[" * 100_000])
def test_an_index_that_is_no_index_is_refused(server, text):
    files = {"config.json": b"{}", "model.safetensors.index.json": text}
    commit = server.publish("acme/odd", files)
    assert message(f"acme/odd@{commit}") == (
        f"acme/odd@{commit}: model.safetensors.index.json is no index of safetensors shards."
    )


def test_only_the_shards_of_the_index_are_fetched(server):
    shards = {"a.safetensors": b"a", "b.safetensors": b"b", "consolidated.safetensors": b"ab"}
    commit = server.publish("acme/two", {**sharded("a.safetensors", "b.safetensors"), **shards})
    files = fetched(f"acme/two@{commit}")["files"]
    assert sorted(files) == [
        "a.safetensors",
        "b.safetensors",
        "config.json",
        "model.safetensors.index.json",
    ]


def test_a_model_of_pickles_is_refused_with_a_way_out(server):
    commit = server.publish("acme/old", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    assert message(f"acme/old@{commit}") == (
        f"acme/old@{commit}: has only pickled weights (pytorch_model.bin). Reading a pickle can "
        "run code, so mergelab does not. Look for a safetensors revision on the model page (often "
        "refs/pr/1), or convert the model in a sandbox and use its folder (path:)."
    )


@pytest.mark.parametrize("name", ["gpt2", "a/b/c", "../x/y", "a/b@", "a/b@x y", "a/b@../c"])
def test_a_name_that_is_no_hub_id_is_refused(name):
    with pytest.raises(UserError, match="is no hub model: write org/name@<40-hex commit>"):
        hub.split(name)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"models": 1}',
        '{"models": {"acme/tiny": 1}}',
        '{"models": {"acme/tiny": {"commit": "x", "files": {}}}}',
    ],
)
def test_a_damaged_lock_says_to_lock_again(server, text):
    folder = study_with(m="acme/tiny")
    (folder / "lock.json").write_text(text)
    assert message("acme/tiny") in (
        "recipes/x/lock.json: is no lock file. Delete it and run: mergelab lock recipes/x",
        "recipes/x/lock.json: its entry for acme/tiny is damaged. Run: mergelab lock recipes/x",
    )


def test_a_lock_that_replaces_a_commit_by_another_is_refused(server):
    commit = server.publish("acme/tiny", TINY)
    models = locked(f"acme/tiny@{commit}")
    models[f"acme/tiny@{commit}"]["commit"] = COMMIT
    Path("recipes/x/lock.json").write_text(json.dumps({"models": models}))
    assert message(f"acme/tiny@{commit}").startswith("recipes/x/lock.json: its entry for")


def test_a_lock_that_names_a_file_outside_is_refused(server):
    server.publish("acme/tiny", TINY)
    models = locked("acme/tiny")
    models["acme/tiny"]["files"]["../../evil"] = {"size": 1, "blob_id": COMMIT}
    Path("recipes/x/lock.json").write_text(json.dumps({"models": models}))
    assert message("acme/tiny") == (
        "recipes/x/lock.json: its entry for acme/tiny is damaged. Run: mergelab lock recipes/x"
    )


FETCH = """
import sys
from pathlib import Path
from mergelab import hub, hub_errors, lockfile
hub.download(lockfile.resolve(sys.argv[1], Path("recipes/x/lock.json")), Path(sys.argv[2]))
"""


def test_kill_in_the_middle_of_a_download_leaves_nothing_and_the_next_one_completes(
    server, tmp_path
):
    commit = server.publish("acme/tiny", {**TINY, "model.safetensors": bytes(30_000_000)})
    server.stalled = {"model.safetensors"}
    out = Path("results/x/models/m")
    command = [sys.executable, "-c", FETCH, f"acme/tiny@{commit}", str(out)]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    process = subprocess.Popen(command, env=environment)
    wanted = f"GET /acme/tiny/resolve/{commit}/model.safetensors"
    deadline = time.monotonic() + PATIENCE
    while wanted not in server.requests and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert wanted in server.requests
    assert not out.exists()
    server.stalled = set()
    fetched(f"acme/tiny@{commit}")
    assert names(out) == sorted([*KEPT, "source.json"])
    assert [path.name for path in out.parent.iterdir()] == ["m"]


SNAPSHOT = """
import sys
from pathlib import Path
import rich_click as click
from mergelab import cli, hub, lockfile
from mergelab.errors import UserError
from mergelab.hub_errors import explained

@cli.app.command()
@click.argument("repo")
@click.argument("commit")
@click.argument("names", nargs=-1)
@click.option("--lenient", is_flag=True)
def snapshot(repo: str, commit: str, names: tuple[str, ...], lenient: bool) -> None:
    try:
        with explained(repo, commit):
            hub.snapshot(repo, commit, names, Path("snap"))
    except UserError as error:
        if not lenient:
            raise
        print(error, file=sys.stderr)

cli.main()
"""


def snapshot(home: Path, *words: str) -> subprocess.Popen[str]:
    """The command line with a verb more, which fetches files of a commit: REPO COMMIT NAME..."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_DOWNLOAD_TIMEOUT": "600"}
    command = [sys.executable, "-c", SNAPSHOT, "snapshot", *words]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("why", ["stalled", "busy"])
def test_ctrl_c_waits_neither_for_a_download_nor_for_a_busy_hub(server, tmp_path, why):
    commit = server.publish("acme/tiny", TINY)
    if why == "stalled":
        server.stalled = set(KEPT)
    else:
        server.answers = [(429, {"Retry-After": "300"})] * 100
    with snapshot(tmp_path, "acme/tiny", commit, *KEPT) as process:
        wanted = "GET" if why == "stalled" else "HEAD"
        deadline = time.monotonic() + PATIENCE
        while sum(r.startswith(wanted) for r in server.requests) < len(KEPT):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(PATIENCE) == 130
        finally:
            process.kill()
        assert process.stderr.read().endswith("stopped\n")


@pytest.mark.parametrize("more", [[], ["--lenient"]])
def test_a_file_that_cannot_be_had_is_told_before_the_others_have_arrived(server, tmp_path, more):
    """Whether the command fails then, or does without the file and succeeds."""
    commit = server.publish("acme/tiny", TINY)
    server.stalled, server.hidden = {"model.safetensors"}, {"tokenizer.json"}
    words = ("acme/tiny", commit, "model.safetensors", "tokenizer.json")
    with snapshot(tmp_path, *words, *more) as process:
        try:
            assert process.wait(PATIENCE) == (0 if more else 2), "it waited for the stalled file"
        finally:
            process.kill()
        assert "the hub has no file tokenizer.json at this commit" in process.stderr.read()


def test_several_that_wait_for_a_busy_hub_say_so_once(server, monkeypatch, capsys):
    monkeypatch.setattr(hub_errors, "WAITS", (1.0,))
    server.status, server.gate = 503, threading.Barrier(4, timeout=PATIENCE)
    with ThreadPoolExecutor(4) as pool:
        several = [pool.submit(hub.listing, "acme/tiny", None) for _ in range(4)]
    assert all("HTTP 503" in str(one.exception()) for one in several)
    assert len(server.requests) == 8
    assert capsys.readouterr().err.count("next try in 1 s") == 1


def test_two_processes_that_fetch_the_same_model_at_once_both_succeed(server, tmp_path):
    commit = server.publish("acme/tiny", {**TINY, "model.safetensors": bytes(20_000_000)})
    out = Path("results/x/models/m")
    command = [sys.executable, "-c", FETCH, f"acme/tiny@{commit}", str(out)]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    processes = [subprocess.Popen(command, env=environment) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert [path.name for path in out.parent.iterdir()] == ["m"]
    got = [request for request in server.requests if request.startswith("GET /acme")]
    assert len(got) == len(set(got)) == len(KEPT)


GOOD = {"id": "acme/odd", "sha": COMMIT, "siblings": []}
FILE = {"rfilename": "config.json", "size": 2, "blobId": COMMIT}
ODD = {
    "list": [],
    "null": None,
    "text": "x",
    "empty": {},
    "no-commit": {**GOOD, "sha": None},
    "siblings-number": {**GOOD, "siblings": 3},
    "siblings-numbers": {**GOOD, "siblings": [3]},
    "siblings-nameless": {**GOOD, "siblings": [{}]},
    "size-text": {**GOOD, "siblings": [{**FILE, "size": "2"}]},
    "lfs-text": {**GOOD, "siblings": [{**FILE, "lfs": "x"}]},
    "lfs-list": {**GOOD, "siblings": [{**FILE, "lfs": [1]}]},
    "lfs-hashless": {**GOOD, "siblings": [{**FILE, "lfs": {"size": 2}}]},
}
BODIES = {name: json.dumps(answer).encode() for name, answer in ODD.items()}
BODIES |= {"html": b"<html>server text</html>", "nothing": b"", "deep": b"[" * 100_000}


class _OddHandler(BaseHTTPRequestHandler):
    """Answers every GET with the server's `body`, the first twenty with its `extra` headers."""

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.server.asked.append(self.headers)
        for key, value in self.server.extra.items() if len(self.server.asked) <= 20 else ():
            self.send_header(key, value)
        self.end_headers()
        with suppress(ConnectionError):  # the client has read enough
            self.wfile.write(self.server.body)


@pytest.fixture
def odd(server, monkeypatch) -> Iterator[ThreadingHTTPServer]:
    """HF_ENDPOINT is a server that is no hub."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _OddHandler) as odd:
        odd.asked, odd.extra = [], {}
        threading.Thread(target=odd.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{odd.server_address[1]}")
        yield odd
        odd.shutdown()


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_server_that_is_no_hub_is_named(odd, body):
    odd.body = body
    url = os.environ["HF_ENDPOINT"]
    text = f"acme/odd: {url} does not answer like a hub. Check HF_ENDPOINT."
    assert message(f"acme/odd@{COMMIT}") == text


@pytest.mark.parametrize("body", ["html", "nothing", "deep"])
def test_a_server_that_is_no_hub_is_named_when_it_is_asked_for_a_licence(odd, body):
    odd.body = BODIES[body]
    with pytest.raises(UserError, match="does not answer like a hub"):
        hub.licence(hub.Pinned("acme/odd", COMMIT))


def test_a_packed_answer_is_not_asked_for_and_unpacked_within_bounds(odd):
    whole = json.dumps({**GOOD, "sha": COMMIT}).encode()
    odd.body, odd.extra = gzip.compress(whole), {"Content-Encoding": "gzip"}
    assert hub.listing("acme/odd", None)[0] == COMMIT
    assert odd.asked[0]["Accept-Encoding"] == "identity"
    odd.body = gzip.compress(whole + b" " * 20_000_000)
    with pytest.raises(UserError, match="more than 16,000,000 bytes"):
        hub.listing("acme/odd", None)
    for body, packing in ((gzip.compress(odd.body), "gzip, gzip"), (whole, "gzip")):
        odd.body, odd.extra = body, {"Content-Encoding": packing}
        with pytest.raises(UserError, match="does not answer like a hub"):
            hub.listing("acme/odd", None)


ENTRY = {"id": COMMIT, "date": "2024-01-01T00:00:00Z"}
PAGES = {  # what each page holds, the host of the next one, pages read, and what is said
    "empty": ([], "127.0.0.1", 1, "does not answer like a hub"),
    "large": ([{**ENTRY, "title": "x" * 5_000_000}], "127.0.0.1", 4, "more than 16,000,000 bytes"),
    "elsewhere": ([ENTRY], "localhost", 1, None),
    "no address": ([ENTRY], "127.0.0.1:1@localhost", 1, None),
}


@pytest.mark.parametrize(("page", "host", "asked", "said"), PAGES.values(), ids=PAGES)
def test_pages_of_a_list_end_and_never_lead_elsewhere(odd, monkeypatch, page, host, asked, said):
    monkeypatch.setenv("HF_TOKEN", LoopbackHub.token)
    odd.body = json.dumps(page).encode()
    place = f"http://{host}:{odd.server_address[1]}/api/models/acme/odd/commits/main?p=2"
    odd.extra = {"Link": f'<{place}>; rel="next"'}
    if said:
        with pytest.raises(UserError, match=said) as caught:
            hub_cards.history("acme/odd", "main")
        assert "p=2" not in str(caught.value)
    else:
        assert len(hub_cards.history("acme/odd", "main")) == 1
    assert len(odd.asked) == asked


DATES = [{"lastModified": date} for date in ("yesterday", "0001-01-01T00:00:00+14:00")]


@pytest.mark.parametrize("more", [{"id": 5}, *DATES])
def test_the_page_of_a_model_is_what_a_hub_says(odd, more):
    odd.body = json.dumps({**GOOD, **more}).encode()
    with pytest.raises(UserError, match="does not answer like a hub"):
        hub_cards.page("acme/odd", COMMIT)


def test_lock_tells_of_a_server_that_is_no_hub_and_writes_nothing(odd):
    odd.body = b"<html>server text</html>"
    with pytest.raises(UserError, match="does not answer like a hub"):
        locked("acme/tiny")
    assert not Path("recipes/x/lock.json").exists()


@pytest.mark.parametrize("what", ["lock", "fetch", "licence", "page", "history", "data"])
def test_a_list_of_files_or_commits_is_not_read_without_end(server, what):
    commit = server.publish("acme/tiny", TINY)
    server.publish("datasets/acme/items", {"a.jsonl": b"{}"})
    server.padded = {"acme/tiny", "datasets/acme/items"}
    calls = {
        "lock": lambda: locked("acme/tiny"),
        "fetch": lambda: fetched(f"acme/tiny@{commit}"),
        "licence": lambda: hub.licence(hub.Pinned("acme/tiny", commit)),
        "page": lambda: hub_cards.page("acme/tiny", commit),
        "history": lambda: hub_cards.history("acme/tiny", "main"),
        "data": lambda: hub.listing("acme/items", None, "dataset"),
    }
    with pytest.raises(UserError, match="answers with more than 16,000,000 bytes"):
        calls[what]()
    assert not Path("recipes/x/lock.json").exists()


def test_pinning_data_sets_leaves_what_a_lock_holds(server):
    server.publish("acme/tiny", TINY)
    old = server.publish("datasets/acme/old", {"a.jsonl": b"{}"})
    new = server.publish("datasets/acme/new", {"a.jsonl": b"{}"})
    study = load_study(study_with(m="acme/tiny"))
    before = lockfile.lock(study, (), ["acme/old"], lambda models: {"ancestry": {"depth": 4}})
    server.publish("datasets/acme/old", {"a.jsonl": b"[]"})
    lockfile.pin_datasets(["acme/old", "acme/new"], study.lock)
    pinned = {"acme/old": {"commit": old}, "acme/new": {"commit": new}}
    assert json.loads(study.lock.read_text()) == before | {"datasets": pinned}


def test_a_fetch_reads_no_other_list_of_files_than_the_one_it_checks(server):
    commit = server.publish("acme/tiny", TINY)
    fetched(f"acme/tiny@{commit}")
    assert [r for r in server.requests if "/api/" in r] == [
        f"GET /api/models/acme/tiny/revision/{commit}"
    ]
