"""Plans of hub models: headers by range requests, no weights; what a merge would cost."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import loopback_hub
import numpy as np
import pytest
from checkpoints import llama, llama_tensors, write_model, write_safetensors
from loopback_hub import LoopbackHub

from mergelab import estimate, grouping, hub, hub_headers, lockfile, show
from mergelab.checkpoint import open_checkpoint
from mergelab.errors import UserError
from mergelab.plan import describe, make_plan
from mergelab.recipe import load_recipe

OUT = Path("results/x/models/m")
SKETCH = Path("results/x/models/.headers/m")
PIECE = 1 << 16


class _Counting(loopback_hub._Handler):
    """Counts the bytes of file answers; can ignore ranges, redirect, and lie about sizes."""

    counted = ""  # the file whose bytes are sent

    def _bytes(self, name: str, data: bytes, headers: dict[str, str]) -> None:
        if self.hub.rangeless:
            del self.headers["Range"]
        self.counted = name
        if self.hub.busy and name.endswith(".safetensors"):
            self.hub.busy -= 1
            self._answer(429, {"Retry-After": "0"}, b"")
            return
        self.hub.tokens.add(self.headers.get("authorization"))
        if self.hub.storage and name.endswith(".safetensors"):
            self._answer(302, {"Location": self.hub.storage + self.path}, b"")
            return
        super()._bytes(name, data, headers)

    def _info(self, repo: str, revision: str) -> None:
        self.counted = "listing"
        super()._info(repo, revision)

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        if self.counted == "listing" and self.hub.sizes:
            answer = json.loads(body)
            for entry in answer["siblings"]:
                entry["size"] = self.hub.sizes.get(entry["rfilename"], entry["size"])
            body = json.dumps(answer).encode()
            headers.pop("Content-Length", None)
        super()._answer(status, {**headers, "Content-Length": str(len(body))}, b"")
        try:
            for start in range(0, len(body) if self.command == "GET" else 0, PIECE):
                piece = body[start : start + PIECE]
                self.hub.sent[self.counted] = self.hub.sent.get(self.counted, 0) + len(piece)
                self.wfile.write(piece)  # the client may be content before the next line is run
        except ConnectionError:
            self.close_connection = True


class CountingHub(LoopbackHub):
    """`sent`: bytes of bodies by file; `tokens`: what file requests brought as authorization.

    `rangeless`: ranges are ignored; `storage`: where weights are redirected; `sizes`: lies; `busy`:
    how many requests of weights are refused with 429."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, int] = {}
        self.sizes: dict[str, int] = {}
        self.tokens: set[str | None] = set()
        self.rangeless = False
        self.busy = 0
        self.storage = ""
        self._server.RequestHandlerClass = _Counting


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CountingHub]:
    """A hub that counts, and a client that knows no token and has an empty cache."""
    from huggingface_hub import constants

    with CountingHub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        yield server


def sketched(hub_id: str) -> Path:
    return hub_headers.folder_to_plan(lockfile.resolve(hub_id, Path("lock.json")), OUT)


def message(hub_id: str) -> str:
    """What a failing plan says; no sketch may be left."""
    with pytest.raises(UserError) as caught:
        sketched(hub_id)
    assert not SKETCH.exists()
    assert not list(SKETCH.parent.glob("*"))
    return str(caught.value)


def large(folder: Path, shards: int = 2) -> Path:
    """A model with two tensors of 2 MB beside the small ones."""
    wide = np.ones((1024, 1024))
    tensors = {**llama_tensors(1), "model.a.weight": wide, "model.b.weight": wide}
    return write_model(folder, tensors, shards=shards)


def weights(files: dict[str, bytes] | None = None, **more: bytes) -> dict[str, bytes]:
    """A model of one weight file with these bytes."""
    return {"config.json": b"{}", **(files or {}), **more}


@pytest.mark.parametrize("shards", [1, 2])
def test_headers_are_read_without_weights(server, shards):
    whole = large(Path("whole"), shards)
    commit = server.publish("acme/big", whole)
    sketch = sketched(f"acme/big@{commit}")
    assert sketch == SKETCH
    got, real = open_checkpoint(sketch, "m"), open_checkpoint(whole, "m")
    facts = [
        {n: (t.dtype, t.shape, t.offset, t.file.name) for n, t in model.tensors.items()}
        for model in (got, real)
    ]
    assert facts[0] == facts[1]
    assert (got.config, got.vocabulary) == (real.config, real.vocabulary)
    for file in real.files:
        assert (sketch / file).stat().st_size == (whole / file).stat().st_size > 2_000_000
        assert server.sent[file] <= hub_headers.FIRST


def test_a_sketch_takes_no_room_on_the_disk(server):
    commit = server.publish("acme/big", large(Path("whole")))
    files = [path.stat() for path in sketched(f"acme/big@{commit}").glob("*.safetensors")]
    assert sum(state.st_blocks * 512 for state in files) < 1_000_000  # blocks may be large
    assert sum(state.st_size for state in files) > 4_000_000


def test_a_header_longer_than_the_first_request_is_read_whole(server):
    tensors = {f"layer.{i}.{'x' * 60}": ("F32", np.ones(1)) for i in range(2000)}
    tensors["wide"] = ("F32", np.ones(1_000_000))
    write_safetensors(Path("long.safetensors"), tensors)
    data = Path("long.safetensors").read_bytes()
    length = 8 + struct.unpack("<Q", data[:8])[0]
    commit = server.publish("acme/long", weights({"model.safetensors": data}))
    sketch = sketched(f"acme/long@{commit}")
    assert len(open_checkpoint(sketch, "m").tensors) == 2001
    assert server.sent["model.safetensors"] == hub_headers.FIRST + length < len(data) / 4


def test_a_second_plan_asks_the_hub_nothing(server):
    commit = server.publish("acme/big", large(Path("whole")))
    first = sketched(f"acme/big@{commit}")
    server.requests.clear()
    assert sketched(f"acme/big@{commit}") == first
    assert server.requests == []


def test_another_commit_is_sketched_anew(server):
    old = server.publish("acme/tiny", llama(Path("old"), 1))
    new = server.publish("acme/tiny", llama(Path("new"), 2, layers=3))
    sketched(f"acme/tiny@{old}")
    sketched(f"acme/tiny@{new}")
    assert open_checkpoint(SKETCH, "m").layers == 3
    assert hub_headers.origin(SKETCH)["commit"] == new


def test_a_downloaded_model_is_used_where_it_is_and_its_sketch_goes(server):
    commit = server.publish("acme/tiny", llama(Path("whole"), 1))
    pinned = lockfile.resolve(f"acme/tiny@{commit}", Path("lock.json"))
    assert sketched(str(pinned)) == SKETCH
    hub.download(pinned, OUT)
    server.requests.clear()
    assert sketched(str(pinned)) == OUT
    assert server.requests == []
    assert not SKETCH.exists()
    assert hub_headers.origin(OUT) == {"hub": "acme/tiny", "commit": commit, "download": 0}


def test_a_sketch_is_no_model_to_merge(server):
    commit = server.publish("acme/tiny", llama(Path("whole"), 1))
    hub_headers.check_whole(Path("whole"))
    with pytest.raises(UserError, match="holds headers without weights; mergelab plan made it"):
        hub_headers.check_whole(sketched(f"acme/tiny@{commit}"))


def test_a_server_that_ignores_ranges_is_cut_off_after_the_header(server):
    tensors = {"w": ("F32", np.zeros(16_000_000))}
    write_safetensors(Path("wide.safetensors"), tensors)
    data = Path("wide.safetensors").read_bytes()
    commit = server.publish("acme/wide", weights({"model.safetensors": data}))
    server.rangeless = True
    sketch = sketched(f"acme/wide@{commit}")
    assert open_checkpoint(sketch, "m").tensors["w"].size == 16_000_000
    assert server.sent["model.safetensors"] < len(data) / 2  # what sockets hold, no more


def test_weights_elsewhere_are_read_by_range_and_without_the_token(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", server.token)
    whole = large(Path("whole"), 1)
    commit = server.publish("acme/big", whole)
    with CountingHub() as storage:
        assert storage.publish("acme/big", whole) == commit
        server.storage = storage.url
        sketch = sketched(f"acme/big@{commit}")
    assert open_checkpoint(sketch, "m").tensors.keys() == open_checkpoint(whole, "m").tensors.keys()
    assert storage.sent == {"model.safetensors": hub_headers.FIRST}
    assert server.tokens == {f"Bearer {server.token}"}
    assert storage.tokens == {None}


def test_a_gated_model_says_where_to_accept_its_licence(server, monkeypatch):
    commit = server.publish("acme/shut", llama(Path("whole"), 1), gated=True)
    assert message(f"acme/shut@{commit}") == (
        f"acme/shut@{commit}: this model is gated and the hub refused it (HTTP 401). "
        f"Accept its licence at {server.url}/acme/shut, then run: hf auth login"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_" + "Wrong" * 7)
    text = message(f"acme/shut@{commit}")
    assert "(HTTP 403)" in text
    assert "Wrong" not in text
    monkeypatch.setenv("HF_TOKEN", server.token)
    assert open_checkpoint(sketched(f"acme/shut@{commit}"), "m").layers == 2


def test_a_missing_model_or_file_is_named(server):
    commit = server.publish("acme/tiny", llama(Path("whole"), 1))
    assert message(f"acme/tinny@{commit}") == (
        f"acme/tinny@{commit}: the hub has no such model, or it is private (HTTP 401). "
        "Check the spelling; for a private model run: hf auth login"
    )
    server.hidden = {"model.safetensors"}
    assert message(f"acme/tiny@{commit}") == (
        f"acme/tiny@{commit}: the hub has no file model.safetensors at this commit (HTTP 404). "
        "Pin another commit and run mergelab lock again."
    )


def test_a_hub_that_is_down_or_failing_is_named(server):
    commit = server.publish("acme/tiny", llama(Path("whole"), 1))
    server.status = 503
    assert message(f"acme/tiny@{commit}") == (
        f"acme/tiny@{commit}: {server.url} answers with an error (HTTP 503). "
        "Nothing was written; run the command again later."
    )


def test_a_hub_that_is_too_busy_for_a_header_is_asked_again(server):
    commit = server.publish("acme/tiny", llama(Path("whole"), 1))
    server.busy = 2
    folder = sketched(f"acme/tiny@{commit}")
    assert server.busy == 0
    whole = open_checkpoint(Path("whole"), "m")
    assert open_checkpoint(folder, "m").tensors.keys() == whole.tensors.keys()


def head(header: object, length: int | None = None, body: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HOSTILE = {
    "huge-length": (head({}, 2**63), "its header does not fit in the file"),
    "length-past-the-end": (head({"w": ENTRY}, 500), "its header does not fit in the file"),
    "no-length": (b"abc", "its header does not fit in the file"),
    "empty": (b"", "its header does not fit in the file"),
    "no-json": (struct.pack("<Q", 4) + b"{{{{", "its header is not JSON"),
    "deep": (struct.pack("<Q", 90_000) + b"[" * 90_000, "its header is not JSON"),
    "list": (head([]), "its header is not a JSON object"),
    "short": (
        head({"w": ENTRY}, body=b"1234"),
        "it has {size} bytes, its header describes {more} (truncated?)",
    ),
    "gap": (
        head({"w": {**ENTRY, "data_offsets": [8, 16]}}, body=bytes(16)),
        "tensor 'w' overlaps or leaves a gap",
    ),
}


@pytest.mark.parametrize(("data", "why"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_header_is_refused_and_no_sketch_is_left(server, data, why):
    commit = server.publish("acme/evil", weights({"model.safetensors": data}))
    why = why.format(size=len(data), more=len(data) + 4)
    assert message(f"acme/evil@{commit}") == (
        f"acme/evil@{commit}: model.safetensors: not a whole safetensors file: {why}. "
        "Download or copy it again."
    )


@pytest.mark.parametrize("size", [2**50, 2**62, 2**70])
def test_an_impossible_size_is_refused(server, size):
    commit = server.publish("acme/tiny", llama(Path("whole"), 1))
    server.sizes = {"model.safetensors": size}
    text = message(f"acme/tiny@{commit}")
    assert text.startswith(f"acme/tiny@{commit}: model.safetensors")
    assert f"{size:,} bytes" in text


def test_a_size_that_the_header_does_not_describe_is_refused(server):
    commit = server.publish("acme/tiny", llama(Path("whole"), 1))
    server.sizes = {"model.safetensors": 123_456}
    assert "it has 123,456 bytes, its header describes" in message(f"acme/tiny@{commit}")


def test_a_small_file_that_arrives_changed_is_refused(server):
    commit = server.publish("acme/tiny", llama(Path("whole"), 1))
    server.flipped = {"config.json"}
    assert message(f"acme/tiny@{commit}") == (
        f"acme/tiny@{commit}: config.json has another git hash than was pinned. "
        "Run the command again."
    )


@pytest.mark.parametrize(
    "text", ["", "[]", "3", '{"hub": 3, "commit": []}', '{"hub": "a/b", "commit": "x"}']
)
def test_a_damaged_note_beside_a_model_says_nothing_of_its_origin(tmp_path, text):
    (tmp_path / hub_headers.MARK).write_text(text)
    (tmp_path / hub.SOURCE).write_text(text)
    assert hub_headers.origin(tmp_path) == {}


SLERP = """
models: [{{model: a}}, {{model: b}}]
merge_method: slerp
base_model: a
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [0, 1]
    - value: 0.5
dtype: {dtype}
"""


def planned(folders: dict[str, Path], dtype: str = "bfloat16") -> Any:
    path = Path("slerp.yaml")
    path.write_text(SLERP.format(dtype=dtype))
    return make_plan(load_recipe(path), folders, shard_size=10**9)


def shown(plan: Any, passes: tuple[int, int], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    show.plan(describe(plan), estimate.costs(plan, Path("results/x/merged/s"), passes=passes))
    return capsys.readouterr().out


def test_the_plan_of_a_hub_model_is_that_of_its_download(server):
    commit = server.publish("acme/big", large(Path("b")))
    large(Path("a"))
    plans = [
        describe(planned({"a": Path("a"), "b": folder}))
        for folder in (sketched(f"acme/big@{commit}"), Path("b"))
    ]
    for plan in plans:
        del plan["inputs"]["b"]["folder"]
    assert plans[0] == plans[1]


def test_a_plan_says_what_must_be_downloaded(server, capsys, monkeypatch):
    monkeypatch.setattr(show.out, "width", 200)
    commit = server.publish("acme/tiny", llama(Path("b"), 2))
    whole = sum(path.stat().st_size for path in Path("b").iterdir())
    plan = planned({"a": llama(Path("a"), 1), "b": sketched(f"acme/tiny@{commit}")})
    costs = estimate.costs(plan, Path("results/x/merged/s"), passes=(2, 3))
    assert costs["download"] == whole
    assert costs["seconds"] is None
    text = shown(plan, (2, 3), capsys)
    assert f"acme/tiny@{commit[:12]}, to download: {show.size(whole)}" in text
    assert f"fetch  {show.size(whole)} from the hub first" in text
    assert "time   unknown before the models are here" in text


def test_a_plan_of_local_models_says_room_and_time(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(show.out, "width", 200)
    plan = planned({"a": large(Path("a"), 1), "b": large(Path("b"), 1)})
    costs = estimate.costs(plan, Path("results/x/merged/s"), passes=(2, 3))
    assert costs["inputs"] == {"a": {}, "b": {}}
    files = 2 * Path("a/model.safetensors").stat().st_size
    assert costs["hashed"] == files > plan.bytes_in
    read = files + 3 * plan.bytes_in
    expected = read / costs["read_speed"] + plan.bytes_out / costs["write_speed"]
    assert costs["seconds"] == expected > 0
    assert not Path("results").exists()
    text = shown(plan, (2, 3), capsys)
    told = f"{show.size(files)} to hash new files, "
    told += f"{show.size(plan.bytes_in)} of tensors 2 to 3 times"
    assert f"reads  up to {show.size(read)}: {told}\n" in text
    assert "free at results/x/merged/s\n" in text
    assert "time   less than 2 s for the disks, if nothing is cached: reads at" in text
    assert "(just measured); arithmetic comes on top" in text


@pytest.mark.parametrize("width", [40, 80])
def test_long_names_of_models_are_folded_not_cut(tmp_path, monkeypatch, capsys, width):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(show.out, "width", width)
    plan = planned({"a": llama(Path("a"), 1), "b": llama(Path("b"), 2)})
    names = ["/gpfs/" + "group-" * 20 + name for name in ("one", "two")]
    facts = {name: {"folder": name, "tensors": 14, "layers": 2} for name in names}
    costs = estimate.costs(plan, Path("out"), passes=(2, 3))
    show.plan(describe(plan) | {"inputs": facts}, costs)
    table = capsys.readouterr().out.partition("\n\n")[0]
    first = "".join(line.split(" ")[0] for line in table.splitlines())
    assert all(name in first for name in names)


def test_too_little_room_is_said_aloud(capsys):
    description = {
        "base": None,
        "vocabulary": "",
        "method": "m",
        "inputs": {},
        "dtypes": [],
        "files": [],
        "groups": [],
    }
    description |= {"bytes_in": 1, "bytes_out": 5 * 10**9, "bytes_memory": 1, "tensors": 1}
    costs = {
        "inputs": {},
        "download": 10**9,
        "hashed": 1,
        "passes": (1, 1),
        "out": "o",
        "free": 2 * 10**9,
    }
    show.plan({**description, "warnings": []}, {**costs, "seconds": None})
    assert "disk   6 GB; 2 GB free at o: TOO LITTLE" in capsys.readouterr().out


def test_a_probe_leaves_no_file_and_knows_when_it_cannot_measure(tmp_path):
    assert estimate.write_speed(tmp_path) > 0
    assert list(tmp_path.iterdir()) == []
    assert estimate.write_speed(tmp_path / "nowhere") is None
    assert estimate.write_speed(Path("/proc")) is None
    assert estimate.read_speed([tmp_path / "nowhere"]) is None
    assert estimate.read_speed([]) is None


def test_small_files_tell_no_speed_of_a_disk(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(show.out, "width", 200)
    plan = planned({"a": llama(Path("a"), 1), "b": llama(Path("b"), 2)})
    costs = estimate.costs(plan, Path("out"), passes=(1, 1))
    assert (costs["read_speed"], costs["seconds"]) == (None, None)
    assert costs["write_speed"] > 0
    text = shown(plan, (1, 1), capsys)
    assert "time   unknown: a disk could not be measured, or the files are too small" in text
    assert "of tensors\n" in text


def test_gradients_over_many_layers_are_one_line_each(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(show.out, "width", 200)
    folders = {n: llama(Path(n), i, layers=33) for i, n in enumerate("ab")}
    text = shown(planned(folders), (2, 2), capsys)
    lines = [line.rstrip() for line in text.splitlines()]
    told = " ".join(text.split())
    for values in ("0 … 1", "0 … 0.5 (layer 8) … 0.3 (layer 16) … 1"):
        assert told.count(f"t: {values} over layers 0-32") == 1
    assert any(line.startswith("model.layers.0-32.mlp.down_proj.weight") for line in lines)
    assert "(66 tensors)" in lines
    assert len(lines) < 40


def groups(**values: dict[str, Any]) -> list[dict[str, Any]]:
    """One group per tensor, as a description has them; dots are written as __."""
    return [
        {"shared": {}, "models": value, "tensors": [name.replace("__", ".")]}
        for name, value in values.items()
    ]


def test_one_setting_for_all_tensors_is_one_row():
    same = {"a": {"weight": 0.5}, "b": {"weight": 0.25}}
    found = grouping.rows(groups(h__0__w=same, h__1__w=same, norm=same))
    assert found == [("all 3", "a: weight=0.5\nb: weight=0.25")]


def test_a_stack_is_cut_where_its_models_change():
    a, b = {"a": {"scale": 1.0}}, {"b": {}}
    found = grouping.rows(groups(h__0__w=a, h__1__w=a, h__2__w=b, h__3__w=b))
    assert found == [("h.0-1.w\n(2 tensors)", "a: scale=1"), ("h.2-3.w\n(2 tensors)", "b")]


def test_experts_of_a_layer_are_one_kind():
    values = {f"h__{i}__experts__{e}__w": {"a": {"x": float(i)}} for i in (0, 2) for e in (0, 1)}
    found = grouping.rows(groups(**values, norm={"a": {"x": 7.0}}))
    assert found == [
        ("h.0…2.experts.*.w\n(4 tensors)", "a: x: 0 … 2 over layers 0…2"),
        ("norm", "a: x=7"),
    ]


def test_texts_and_flags_tell_each_change():
    values = ["l1", "l1", "none", "l1"]
    found = grouping.rows(groups(**{f"h__{i}__w": {"a": {"x": v}} for i, v in enumerate(values)}))
    assert found[0][1] == "a: x: l1 … l1 (layer 1) … none (layer 2) … l1 over layers 0-3"


def test_many_turns_are_counted_not_listed():
    found = grouping.rows(groups(**{f"h__{i}__w": {"a": {"x": i % 2}} for i in range(20)}))
    assert found[0][1] == "a: x: 20 turns over layers 0-19 (all values: --json)"


def test_plan_and_merge_of_hub_models_on_the_command_line(mergelab, tmp_path) -> None:
    with LoopbackHub() as hub_server:
        commit = hub_server.publish("acme/tiny", llama(tmp_path / "t", 1))
        recipe = Path("r.yaml")
        listed = f"- {{model: acme/tiny@{commit}, parameters: {{weight: 1}}}}\n"
        env = {"HF_ENDPOINT": hub_server.url, "HF_HOME": str(tmp_path / "home")}

        def weights() -> int:
            return len([p for p in tmp_path.rglob("acme--tiny*/model.safetensors") if sound(p)])

        recipe.write_text("merge_method: linear\nmodels:\n" + listed + listed.replace("tiny", "x"))
        assert mergelab("merge", recipe, "-o", "out", **env).returncode == 2
        other = llama(tmp_path / "other", 2, layers=3)
        local = f"- {{model: {other}, parameters: {{weight: 1}}}}\n"
        recipe.write_text("merge_method: linear\nmodels:\n" + listed + local)
        done = mergelab("merge", recipe, "-o", "out", **env)
        assert (done.returncode, weights()) == (2, 0), "weights were fetched for a bad recipe"
        recipe.write_text("merge_method: linear\nmodels:\n" + listed)
        assert json.loads(mergelab("plan", recipe, "--json", **env).stdout)["costs"]["download"] > 0
        assert weights() == 0
        assert mergelab("merge", recipe, "-o", "out", **env).returncode == 0
        assert weights() == 1


def sound(path: Path) -> bool:
    """Is this the model itself, not its headers alone?"""
    return ".headers" not in path.parts
