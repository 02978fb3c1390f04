"""Faults: kills, full disks, flipped bits, damaged notes. Never a wrong model, never a mess."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import llama_tensors, write_model

from mergelab import blocks, engine, hashes, journal, progress, record
from mergelab.errors import UserError
from mergelab.plan import Plan, make_plan
from mergelab.recipe import load_recipe

TIES = """\
merge_method: ties
base_model: base
dtype: bfloat16
models:
- {model: a, parameters: {weight: 0.5, density: 0.4}}
- {model: b, parameters: {weight: 0.5, density: 0.4}}
"""
LINEAR = """\
merge_method: linear
dtype: bfloat16
models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 2}}]
"""
LAYERS = 6
Part = tuple[int, int]


def write_models(place: Path, rows: int = 250) -> None:
    """base, a and b with tensors of several blocks in each layer, and three recipes."""
    for seed, name in enumerate(("base", "a", "b")):
        rng = np.random.default_rng(seed)
        tensors = llama_tensors(seed, LAYERS)
        for i in range(LAYERS):
            tensors[f"model.layers.{i}.mlp.big.weight"] = rng.standard_normal((rows, 600))
        write_model(place / name, tensors, layers=LAYERS, shards=seed + 1)
    (place / "ties.yaml").write_text(TIES)
    (place / "paper.yaml").write_text(TIES + "parameters: {scope: model}\n")
    (place / "linear.yaml").write_text(LINEAR)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with models and recipes, the working directory; kernels are warm, hashes are not."""
    monkeypatch.chdir(tmp_path)
    write_models(tmp_path)
    merge(planned("linear.yaml"), "warm")
    shutil.rmtree("warm")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def planned(recipe: str = "ties.yaml", shard_size: int = 10**6) -> Plan:
    """Plan a recipe over folders of the working directory."""
    loaded = load_recipe(Path(recipe))
    return make_plan(loaded, {m: Path(m) for m in loaded.models}, shard_size=shard_size)


def merge(plan: Plan, out: str = "out", part: Part = (1, 1), workers: int = 1) -> dict[str, Any]:
    """Merge in this process; what the record says of the outputs, {} while parts are missing."""
    return dict(engine.merge(plan, Path(out), workers=workers, part=part).get("outputs", {}))


def left(place: Path, out: str = "out") -> list[str]:
    """Everything in a folder that belongs to a merge."""
    return sorted(path.name for path in place.iterdir() if out in path.name)


def noted(place: Path) -> list[str]:
    """The tensors that the journals of interrupted merges name, in order."""
    paths = sorted(place.glob(".*.partial/journal-*.jsonl"))
    lines = [line for path in paths for line in path.read_bytes().split(b"\n")]
    return [json.loads(line)["tensor"] for line in lines if line.endswith(b"}")]


# --- kill -9 --------------------------------------------------------------------------------------


def forked(job: Callable[[], object], after: float | None = None) -> int:
    """Run a job in a copy of this process, killed after a time; its exit code, or -9."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            job()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def seen(job: Callable[[], object], after: float) -> dict[str, Any]:
    """Kill a merge; what it leaves."""
    before = noted(Path.cwd())
    code = forked(job, after)
    now = noted(Path.cwd())
    return {
        "killed": code == -signal.SIGKILL and not Path("out").exists(),
        "code": code,
        "tensors": len(llama_tensors(0, LAYERS)) + LAYERS,
        "before": len(before),
        "new": len(now) - len(before),
        "twice": len(now) - len(set(now)),
        "unfinished": Path("out").exists() and not Path("out/merge.json").exists(),
    }


def kill_merges(kills: int, counts: list[int]) -> list[dict[str, Any]]:
    """Kill merges of 1 or more parts at random moments; finish each after one to three kills.

    Goes on until so many kills hit a merge at work. The span of the moments follows the load of
    the machine. To be run in a process without threads."""
    rng, found = random.Random(3), list[dict[str, Any]]()
    plans = {name: planned(f"{name}.yaml") for name in ("ties", "paper")}
    want = {name: merge(plan, name) for name, plan in plans.items()}
    spans = {name: min(span(plan) for _ in range(3)) for name, plan in plans.items()}
    while sum(kill["killed"] for kill in found) < kills and len(found) < 5 * kills:
        name = rng.choice(("ties", "ties", "paper"))
        n, workers = rng.choice(counts), rng.choice((1, 2))
        job = partial(merge, plans[name], workers=workers)
        for _ in range(rng.choice((1, 2, 3))):
            part = (rng.randint(1, n), n)
            found.append(seen(partial(job, part=part), rng.uniform(0, spans[name])))
            spans[name] *= 1.1 if found[-1]["killed"] else 0.8
        for i in rng.sample(range(1, n + 1), n):
            assert forked(partial(job, part=(i, n))) == 0
        record = json.loads(Path("out/merge.json").read_bytes())
        found[-1]["same"] = record["outputs"] == want[name]
        found[-1]["left"] = left(Path.cwd())
        shutil.rmtree("out")
    return found


def span(plan: Plan) -> float:
    """Seconds of a merge in a process of its own."""
    started = time.monotonic()
    assert forked(partial(merge, plan)) == 0
    shutil.rmtree("out")
    return time.monotonic() - started


@pytest.mark.parametrize(("kills", "counts"), [(50, [1]), (25, [2, 3, 8])], ids=["whole", "parts"])
def test_a_merge_that_is_killed_goes_on_to_the_same_bytes(
    tmp_path: Path, kills: int, counts: list[int]
) -> None:
    write_models(tmp_path, rows=1200)
    script = f"import sys, json, test_faults as t\nfound = t.kill_merges({kills}, {counts})\n"
    script += "sys.stdout.write(json.dumps(found))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert {kill["code"] for kill in found} <= {0, -signal.SIGKILL}, done.stderr[-3000:]
    assert [kill for kill in found if kill["unfinished"] or kill["twice"]] == []
    finished = [kill for kill in found if "same" in kill]
    assert [kill for kill in finished if not kill["same"] or kill["left"] != ["out"]] == []
    in_progress = [kill for kill in found if kill["killed"]]
    assert len(in_progress) >= kills
    half_way = [kill for kill in in_progress if 0 < kill["before"] + kill["new"] < kill["tensors"]]
    assert len(half_way) > kills / 10
    assert [kill for kill in half_way if kill["before"]]  # and not for the first time


# --- resuming -------------------------------------------------------------------------------------


def interrupted(plan: Plan, part: int = 1) -> Path:
    """Leave what a merge that was killed half-way leaves; the partial folder."""
    assert merge(plan, part=(part, 2)) == {}
    (folder,) = Path().glob(".out.merge-*.partial")
    assert 3 < len(noted(Path())) < len(plan.tensors) - 3
    return folder


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No byte may be written beyond, as with `ulimit -f`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_resumed_merge_writes_no_tensor_again(place: Path) -> None:
    plan = planned(shard_size=10**9)
    want = merge(plan, "reference")
    interrupted(plan, part=2)
    first = next(tensor for tensor in plan.tensors if tensor.name in noted(place))
    with largest_file(first.offset):
        assert merge(plan) == want


GARBAGE = [
    b'{"tensor": "model.norm.weight", "sha',
    b"\xff\xfe\x00garbage\n",
    b"[" * 100_000 + b"\n",
    b'{"tensor": 3}\n[]\n7\nnull\n{"tensor": [], "xxh3_128": {}}\n\n',
    b"".join(
        json.dumps({"tensor": name, "xxh3_128": 32 * "0"}).encode() + b"\n"
        for name in llama_tensors(0, LAYERS)
    ),
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=["torn", "bytes", "deep", "types", "wrong"])
def test_a_damaged_journal_does_no_harm(place: Path, garbage: bytes) -> None:
    plan = planned()
    want = merge(plan, "reference")
    folder = interrupted(plan)
    for name in ("journal-1-of-1.jsonl", "journal-1-of-2.jsonl", "journal-7-of-8.jsonl"):
        with (folder / name).open("ab") as file:
            file.write(garbage)
    assert merge(plan) == want
    assert left(place) == ["out"]


@pytest.mark.parametrize("garbage", GARBAGE, ids=["torn", "bytes", "deep", "types", "wrong"])
def test_a_part_goes_on_after_the_damaged_end_of_its_journal(place: Path, garbage: bytes) -> None:
    plan = planned()
    want = merge(plan, "reference")
    folder = interrupted(plan, part=2)
    (folder / "journal-1-of-3.jsonl").write_bytes(garbage)
    assert merge(plan, part=(1, 3)) == {}
    assert merge(plan, part=(2, 3)) == want


def test_damaged_bytes_of_an_interrupted_merge_are_written_again(place: Path) -> None:
    plan = planned(shard_size=400_000)
    want = merge(plan, "reference")
    folder = interrupted(plan)
    first, *others = sorted(folder.glob("*.safetensors"))
    assert len(others) > 1
    data = bytearray(first.read_bytes())
    data[len(data) // 2] ^= 1
    data[3] ^= 1  # in its header
    first.write_bytes(bytes(data) + b"more")
    others[0].write_bytes(others[0].read_bytes()[:999])
    others[1].unlink()
    (folder / ".config.json.0badcafe").write_text("{")
    assert merge(plan) == want
    assert sorted(p.name for p in Path("out").iterdir()) == sorted(
        p.name for p in Path("reference").iterdir()
    )


# --- Ctrl-C ---------------------------------------------------------------------------------------


class Interruption:
    """Ctrl-C when a worker is done with a block; counts the blocks that are finished after it.

    It comes while the main thread waits for results; the worker goes on once that thread does
    nothing any more but wait for it."""

    def __init__(self) -> None:
        self.sent, self.later = False, 0

    def block(self) -> None:
        """A worker is done with a block."""
        self.later += self.sent
        if not self.sent:
            main = threading.main_thread().ident
            assert main
            self.sent = True
            while "result" not in functions(main):  # all threads have been started
                time.sleep(0.001)
            signal.pthread_kill(main, signal.SIGINT)
            again = time.monotonic() + 5
            while "shutdown" not in functions(main):  # of the pool
                if time.monotonic() > again and "result" in functions(main):
                    # It came just before the thread fell asleep, and Python looks when it wakes.
                    signal.pthread_kill(main, signal.SIGINT)
                    again = time.monotonic() + 5
                time.sleep(0.001)

    def after(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """A function that does a block."""

        def act(*arguments: Any) -> None:
            original(*arguments)
            self.block()

        return act

    def during(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """A function that yields blocks."""

        def act(*arguments: Any) -> Iterator[Any]:
            for piece in original(*arguments):
                yield piece
                self.block()

        return act


def functions(thread: int) -> list[str]:
    """Names of the functions that a thread is in."""
    frame, names = sys._current_frames().get(thread), list[str]()
    while frame:
        names.append(frame.f_code.co_name)
        frame = frame.f_back
    return names


@pytest.fixture
def interruption() -> Iterator[Interruption]:
    """An interruption that is heard in this process, whoever started it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield Interruption()
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("work", ["hash", "survey", "merge", "check", "hash what is written"])
def test_ctrl_c_waits_for_a_block_and_not_for_a_file_or_tensor(
    place: Path, monkeypatch: pytest.MonkeyPatch, interruption: Interruption, work: str
) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 1000)
    monkeypatch.setattr(journal, "PIECE", 1000)
    monkeypatch.setattr(record, "PIECE", 1000)
    plan = planned("linear.yaml" if work == "merge" else "ties.yaml")
    want = merge(plan, "reference")
    if work == "check":
        interrupted(plan)
    with monkeypatch.context() as broken:
        if work == "hash":
            broken.setenv("XDG_CACHE_HOME", str(place / "other cache"))
            broken.setattr(progress.Bar, "advance", interruption.after(progress.Bar.advance))
        elif work in ("survey", "merge"):
            broken.setattr(blocks.Files, "read", interruption.after(blocks.Files.read))
        else:
            broken.setattr(journal, "pieces", interruption.during(journal.pieces))
        with pytest.raises(KeyboardInterrupt):
            merge(plan)
    assert interruption.sent
    assert interruption.later == 0
    assert not Path("out").exists()
    assert merge(plan) == want
    assert left(place) == ["out"]


def test_ctrl_c_ends_the_program_with_130_before_a_terabyte_is_hashed(place: Path) -> None:
    """Of each model a slice is merged, and all is hashed: hours, were they waited for."""
    for name in ("a", "b"):
        grow(place / name / "model.safetensors", llama_tensors(0), 10**12)
    (place / "slice.yaml").write_text(SLICE)
    command = [sys.executable, "-m", "mergelab.cli", "merge", "slice.yaml", "-o", "out"]
    with subprocess.Popen(command, cwd=place, stderr=subprocess.PIPE, text=True) as process:
        try:
            while max(positions(process.pid, "model.safetensors")) < 10**8:
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=100)[1]
        finally:
            process.kill()
    assert process.returncode == 130
    assert said.splitlines() == [
        "interrupted: out is as it was; the same command goes on from here.",
        "stopped",
    ]
    assert left(place) == []


SLICE = """\
merge_method: passthrough
dtype: bfloat16
slices:
- sources: [{model: a, layer_range: [0, 1]}]
- sources: [{model: b, layer_range: [0, 1]}]
"""


def grow(path: Path, tensors: dict[str, Any], size: int) -> None:
    """A model of one file with a tensor of `size` bytes in its second layer, all of it a hole."""
    write_model(path.parent, tensors)
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    span = [len(data) - end, len(data) - end + size]
    header["model.layers.1.big.weight"] = {"dtype": "U8", "shape": [size], "data_offsets": span}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
    os.truncate(path, 8 + len(text) + span[1])


def positions(process: int, name: str) -> list[int]:
    """How far a process has read its open files of a name; [0] if it has none open."""
    found = [0]
    for link in Path(f"/proc/{process}/fd").iterdir():
        with suppress(FileNotFoundError):
            if link.readlink().name == name:
                facts = (link.parent.with_name("fdinfo") / link.name).read_text()
                found.append(int(facts.split()[1]))
    return found


# --- parts ----------------------------------------------------------------------------------------


def test_parts_at_once_twice_and_with_a_whole_merge_give_one_model(place: Path) -> None:
    plan = planned()
    want = merge(plan, "reference")
    for number in range(4):
        parts = [(i, n) for n in (2, 3) for i in range(1, n + 1)] * 2
        parts += [(1, 1)] if number % 2 else []
        random.Random(number).shuffle(parts)
        with ThreadPoolExecutor(len(parts)) as pool:
            found = list(pool.map(lambda part: merge(plan, part=part), parts))
        assert want in found
        assert [outputs for outputs in found if outputs not in ({}, want)] == []
        assert left(place) == ["out"]
        shutil.rmtree("out")


def test_a_part_after_the_model_is_finished_changes_nothing(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned()
    want = merge(plan)
    stamps = [path.stat().st_mtime_ns for path in sorted(Path("out").iterdir())]
    for part in ((1, 1), (2, 3), (8, 8)):
        assert merge(plan, part=part) == want
        assert "up to date" in capsys.readouterr().err
    assert [path.stat().st_mtime_ns for path in sorted(Path("out").iterdir())] == stamps


def test_another_recipe_in_the_same_place_is_told_to_a_part(place: Path) -> None:
    plan, other = planned(), planned("linear.yaml")
    folder = interrupted(plan)
    merge(other)
    assert not folder.exists()
    assert merge(plan, part=(2, 2)) == {}
    assert merge(plan, part=(1, 2)) == merge(plan, "reference")


# --- what other users have left -------------------------------------------------------------------


def as_plain_user(place: Path, recipe: str) -> subprocess.CompletedProcess[str]:
    """Merge as one whom permissions bind; root has them bind by giving up what overrides them."""
    command = [sys.executable, "-m", "mergelab.cli", "merge", recipe, "-o", "out"]
    if os.geteuid() == 0:
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    return done


def test_a_working_folder_of_another_user_is_told(place: Path) -> None:
    folder = interrupted(planned(shard_size=10**9))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for path in folder.iterdir():
        path.chmod(0o444)
    done = as_plain_user(place, "ties.yaml")
    assert done.returncode == 2
    assert ".partial/model" in done.stderr
    assert "Permission denied. Have its owner" in done.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_earlier_merge_that_may_not_be_written_to_is_not_replaced(place: Path) -> None:
    merge(planned(shard_size=10**9))
    Path("out").chmod(0o555)
    same = as_plain_user(place, "ties.yaml")
    assert (same.returncode, "is up to date" in same.stderr) == (0, True)
    done = as_plain_user(place, "linear.yaml")
    assert done.returncode == 2
    assert "out: the earlier merge there is not writable, so it cannot be repl" in done.stderr
    assert left(place) == ["out"]
    Path("out").chmod(0o755)
    assert as_plain_user(place, "linear.yaml").returncode == 0


def test_a_rest_of_an_earlier_merge_that_cannot_be_deleted_is_told_at_once(place: Path) -> None:
    Path(".out.replaced").mkdir()
    Path(".out.replaced/model.safetensors").write_bytes(b"old")
    Path(".out.replaced").chmod(0o555)
    done = as_plain_user(place, "linear.yaml")
    assert done.returncode == 2
    assert ".out.replaced: this rest of an earlier merge cannot be deleted" in done.stderr
    assert left(place) == [".out.replaced"]
    Path(".out.replaced").chmod(0o755)
    assert as_plain_user(place, "linear.yaml").returncode == 0
    assert left(place) == ["out"]


def test_a_record_that_cannot_be_read_is_not_called_missing(place: Path) -> None:
    merge(planned())
    Path("out/merge.json").chmod(0)
    done = as_plain_user(place, "linear.yaml")
    assert done.returncode == 2
    assert "out/merge.json: cannot be read: Permission denied" in done.stderr
    assert "holds no" not in done.stderr


def test_a_whole_model_whose_place_is_taken_meanwhile_is_kept(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = merge(planned(), "reference")

    def write_and_take(path: Path, value: Any) -> None:
        record.write_json(path, value)
        Path("out").mkdir()
        Path("out/notes.txt").write_text("years of work")

    with monkeypatch.context() as busy:
        busy.setattr(engine, "write_json", write_and_take)
        with pytest.raises(UserError, match=r"out: is not empty and holds no merge\.json"):
            merge(planned())
    shutil.rmtree("out")
    (kept,) = place.glob(".out.*.partial/merge.json")
    made = kept.stat().st_mtime_ns
    assert merge(planned()) == want
    assert Path("out/merge.json").stat().st_mtime_ns == made


# --- full disks -----------------------------------------------------------------------------------


def on_small_disk(place: Path, size: int) -> subprocess.CompletedProcess[str]:
    """Merge into PLACE/disk, a tmpfs of its own namespace; its contents are the standard output."""
    rights = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    mount = f'mount -t tmpfs -o size={size} tmpfs disk || {{ echo no tmpfs >&2; exit 99; }}; "$@"'
    script = f"{mount}; code=$?; find disk -mindepth 1; exit $code"
    command = ["unshare", *rights, "--mount", "sh", "-c", script, "-"]
    command += [sys.executable, "-m", "mergelab.cli", "merge", "ties.yaml", "-o", "disk/out"]
    (place / "disk").mkdir(exist_ok=True)
    return subprocess.run(command, cwd=place, capture_output=True, text=True)


PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif("MERGELAB_NO_TMPFS" in os.environ, reason="MERGELAB_NO_TMPFS is set")
@pytest.mark.parametrize(
    ("pages", "message"),
    [(-20, "are free"), (0, "no space left"), (3, "no space left")],
    ids=["told before", "no journal", "no tokenizer"],
)
def test_a_full_disk_is_told_and_left_clean(place: Path, pages: int, message: str) -> None:
    weights = -(-planned(shard_size=10**9).bytes_out // PAGE)
    done = on_small_disk(place, (weights + pages) * PAGE)
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.fail(
            f"this test mounts a tmpfs, which the system does not allow: {done.stderr} Run it as "
            "root or allow user namespaces, or set MERGELAB_NO_TMPFS=1 to leave it out."
        )
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("half_way", [False, True])
def test_a_limit_of_file_sizes_is_told_and_left_clean(place: Path, half_way: bool) -> None:
    plan = planned(shard_size=10**9)
    if half_way:
        interrupted(plan)
    with largest_file(plan.bytes_out * 3 // 4), pytest.raises(UserError, match="ulimit -f"):
        merge(plan)
    assert len(left(place)) == half_way  # what a part has written is kept
    assert merge(plan)


# --- inputs that change ---------------------------------------------------------------------------


def flip(path: Path) -> None:
    """Flip a bit of the last entry; size and time of the file stay as they were."""
    facts = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (facts.st_size, facts.st_mtime_ns)


def remembered(path: Path) -> str:
    """sha256 of a file, once it is old enough to be remembered."""
    time.sleep(max(0.0, hashes.RECENT / 1e9 + 0.1 - (time.time() - path.stat().st_ctime)))
    found = hashes.sha256(path)
    assert list((Path(os.environ["XDG_CACHE_HOME"]) / "mergelab/hashes").iterdir())
    return found


def test_a_bit_that_flips_after_a_download_is_seen(place: Path) -> None:
    weights = place / "a/model-00002-of-00002.safetensors"
    facts = {"size": weights.stat().st_size, "sha256": hashes.sha256(weights)}
    note = {"hub": "o/a", "commit": 40 * "a", "files": {weights.name: facts}}
    (place / "a/source.json").write_text(json.dumps(note))
    plan = planned()
    want = merge(plan)
    remembered(weights)
    flip(weights)
    with pytest.raises(UserError, match=r"a/model-00002-of-00002.*is not the file that was down"):
        merge(plan, "other")
    assert left(place, "other") == []
    flip(weights)
    assert merge(plan, "other") == want


def test_a_bit_that_flips_in_a_merge_of_a_merge_is_seen(place: Path) -> None:
    merge(planned("linear.yaml"), "m")
    (place / "again.yaml").write_text(TIES.replace("model: a", "model: m"))
    plan = planned("again.yaml")
    weights = sorted(Path("m").glob("*.safetensors"))[-1]
    remembered(weights)
    flip(weights)
    with pytest.raises(UserError, match=rf"{weights}: is not the file that was downloaded or merg"):
        merge(plan)
    assert left(place) == []


def test_a_bit_that_flips_before_a_merge_goes_on_starts_it_anew(place: Path) -> None:
    plan, weights = planned("linear.yaml"), place / "b/model-00003-of-00003.safetensors"
    old = merge(plan, "reference")
    remembered(weights)
    interrupted(plan, part=2)  # which reads the entry
    flip(weights)
    new = merge(plan)
    assert new == merge(plan, "anew") != old
    assert left(place) == ["out"]


def test_an_input_that_changes_while_it_is_merged_leaves_nothing(place: Path) -> None:
    plan, weights = planned(), place / "b/model-00003-of-00003.safetensors"
    want = merge(plan, "reference")
    interrupted(plan)
    done = noted(place)
    for part, kept in (((2, 2), done), ((1, 1), [])):
        with changing(weights), pytest.raises(UserError, match="was changed while it was merged"):
            merge(plan, part=part)
        assert noted(place) == kept
    assert merge(plan, part=(2, 2)) == {}
    assert merge(plan, part=(1, 2)) == want


def test_an_input_that_gets_new_links_while_it_is_merged_is_the_same(place: Path) -> None:
    plan, weights = planned(), place / "b/model-00003-of-00003.safetensors"
    want = merge(plan, "reference")

    def link(number: int) -> None:
        (place / f"link{number % 100}").unlink(missing_ok=True)
        os.link(weights, place / f"link{number % 100}")

    with repeating(link):
        assert merge(plan) == want


def changing(path: Path) -> AbstractContextManager[None]:
    """Somebody touches a file all the time."""
    return repeating(lambda number: os.utime(path, ns=(number, number)))


@contextmanager
def repeating(act: Callable[[int], None]) -> Iterator[None]:
    """Somebody does something all the time, with the numbers 1, 2 and so on."""
    with ThreadPoolExecutor(1) as pool:
        stop = list[int]()

        def work() -> None:
            for number in itertools.count(1):
                act(number)
                if stop:
                    return

        running = pool.submit(work)
        try:
            yield
        finally:
            stop.append(1)
            running.result()


def test_inputs_that_change_between_plan_and_merge_are_refused(place: Path) -> None:
    plan, weights = planned(), place / "a/model-00002-of-00002.safetensors"
    whole = weights.read_bytes()
    for size in (len(whole) - 2, len(whole) // 2, 5, 0):
        weights.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"a/model-00002-of-00002\.safetensors: "):
            merge(plan)
    weights.write_bytes(whole.replace(b"up_proj", b"xx_proj"))
    with pytest.raises(UserError, match="was changed after the merge was planned"):
        merge(plan)
    weights.unlink()
    with pytest.raises(UserError, match="moved or deleted"):
        merge(plan)
    assert left(place) == []
    weights.write_bytes(whole)
    assert merge(plan)


# --- the memory of hashes -------------------------------------------------------------------------


def test_a_damaged_memory_of_hashes_does_no_harm(place: Path) -> None:
    weights = place / "a/model-00001-of-00002.safetensors"
    want = remembered(weights)
    (note,) = (place / "cache/mergelab/hashes").iterdir()
    good = note.read_text()
    held = json.loads(good)
    odd = ["", "{", "[]", "7", "null", "\0\xff", "[" * 100_000, json.dumps({**held, "sha256": ""})]
    odd += [good[:-9], json.dumps({**held, "identity": 5}), json.dumps({**held, "sha256": None})]
    odd += [json.dumps({**held, "identity": [0, *held["identity"][1:]], "sha256": 64 * "0"})]
    for text in odd:
        note.write_text(text)
        assert hashes.sha256(weights) == want, text[:80]
        assert note.read_text() == good, text[:80]


def test_a_memory_of_hashes_that_cannot_be_written_does_no_harm(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "file"))
    weights = place / "a/model-00001-of-00002.safetensors"
    assert hashes.sha256(weights) == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert merge(planned("linear.yaml"))


def test_kernels_that_cannot_be_kept_are_compiled(place: Path) -> None:
    (place / "file").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "mergelab.cli", "merge", "linear.yaml", "-o", "out"],
        cwd=place,
        env=os.environ | {"XDG_CACHE_HOME": str(place / "file")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


# --- folders and caches that others have touched --------------------------------------------------


def test_a_folder_with_files_of_the_user_is_not_replaced_be_they_hidden(place: Path) -> None:
    merge(planned("linear.yaml"))
    (place / "out/.gitattributes").write_text("years of work")
    with pytest.raises(UserError, match="gitattributes, which no merge wrote"):
        merge(planned("ties.yaml"))
    assert (place / "out/.gitattributes").read_text() == "years of work"


def test_a_whole_merge_that_fails_keeps_what_parts_have_written(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = merge(planned(), "reference")
    merge(planned(), part=(1, 2))
    kept = noted(place)
    monkeypatch.setattr(engine, "write_json", _fails)
    with pytest.raises(UserError, match="cannot go on"):
        merge(planned())
    assert kept
    assert set(kept) <= set(noted(place))
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert merge(planned()) == want


def _fails(*arguments: object) -> None:
    raise UserError("cannot go on")


def test_a_model_that_was_whole_before_the_kill_is_only_put_in_place(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = merge(planned(), "reference")
    with monkeypatch.context() as broken:
        broken.setattr(engine, "move_into_place", _stops)
        with pytest.raises(KeyboardInterrupt):
            merge(planned())
    (folder,) = place.glob(".out.*.partial")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert merge(planned()) == want
    after = {path.name: path.stat().st_mtime_ns for path in (place / "out").iterdir()}
    weights = [name for name in after if name.endswith(".safetensors")]
    assert all(after[name] == before[name] for name in ("merge.json", "config.json"))
    assert weights


def _stops(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_an_old_model_that_a_kill_left_beside_the_new_one_is_removed(place: Path) -> None:
    merge(planned())
    (place / ".out.replaced").mkdir()
    (place / ".out.replaced/model.safetensors").write_bytes(bytes(9))
    merge(planned())
    assert left(place) == ["out"]


def test_more_input_files_than_may_be_open_are_read(place: Path) -> None:
    want = merge(planned("linear.yaml"), "reference")
    for seed, name in enumerate(("base", "a", "b")):
        rng = np.random.default_rng(seed)
        tensors = llama_tensors(seed, LAYERS)
        for i in range(LAYERS):
            tensors[f"model.layers.{i}.mlp.big.weight"] = rng.standard_normal((250, 600))
        write_model(place / name, tensors, layers=LAYERS, shards=30)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))\n"
    code = limit + "import sys; sys.argv[0] = 'mergelab'\nfrom mergelab.cli import main\nmain()"
    command = [sys.executable, "-c", code, "merge", "linear.yaml", "-o", "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=place)
    assert done.returncode == 0, done.stderr
    found = json.loads((place / "out/merge.json").read_text())["outputs"]["tensors"]
    assert found == want["tensors"]


def test_compiled_kernels_that_are_damaged_are_compiled_again(place: Path) -> None:
    command = [sys.executable, "-m", "mergelab.cli", "merge", "linear.yaml", "-o"]
    assert subprocess.run([*command, "one"], cwd=place).returncode == 0
    cached = sorted((place / "cache/mergelab").glob("kernels/*/*"))
    assert cached
    for path in cached:
        path.write_bytes(b"")
    assert subprocess.run([*command, "two"], cwd=place).returncode == 0
    one, two = (json.loads((place / n / "merge.json").read_text()) for n in ("one", "two"))
    assert one["outputs"] == two["outputs"]
    assert any(path.stat().st_size for path in cached)
