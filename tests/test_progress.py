"""What a person sees of work that takes long: amount, speed and time left, in few lines."""

from __future__ import annotations

import itertools
import os
import pty
import re
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from loopback_hub import LoopbackHub

from mergelab import hub, progress
from mergelab.progress import arriving, bar, told


def test_bytes_and_other_units_are_told_with_speed_and_time_left() -> None:
    assert told(1.5e9, 2e9, "bytes", 1e8) == "1.5 GB of 2 GB (75 %), 100 MB/s, 0:00:05 left"
    assert told(10, 4000, "tokens", 2) == "10 of 4,000 tokens (0 %), 2/s, 0:33:15 left"
    assert told(0, 0, "bytes", 0) == "0 B of 0 B"


def test_names_are_told_as_they_are(capfd: pytest.CaptureFixture[str]) -> None:
    progress.say("wrote runs:cat:one/[red]out")
    assert capfd.readouterr().err == "wrote runs:cat:one/[red]out\n"


def test_what_steers_a_terminal_is_not_told(capfd: pytest.CaptureFixture[str]) -> None:
    progress.say("a\x1b[31mb\x9b\udcff\nc")
    assert capfd.readouterr().err == "a\N{REPLACEMENT CHARACTER}[31mb" + (
        2 * "\N{REPLACEMENT CHARACTER}" + "\nc\n"
    )


def test_a_thread_that_goes_on_after_the_work_has_ended_is_stopped() -> None:
    with suppress(KeyboardInterrupt), bar("work", 9) as shown:
        shown.advance()
        raise KeyboardInterrupt
    for go_on in (shown.check, shown.advance):
        with pytest.raises(progress.Stopped):
            go_on()
    assert shown.done == 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time as progress.py sees it: a second more each time it looks; other threads get a turn."""
    seconds = itertools.count()

    def monotonic() -> float:
        time.sleep(0.0001)
        return float(next(seconds))

    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=monotonic))


def test_a_log_gets_a_line_now_and_then_and_none_of_short_work(
    clock: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with bar("short", 9, "tasks") as shown:
        _work(shown, 9, 9)
    assert capsys.readouterr().err == ""
    with bar("merge (ties)", 2e9) as shown:
        workers = [threading.Thread(target=_work, args=(shown, 1e9, 500)) for _ in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert shown.done == 2e9  # two threads lost nothing
    assert capsys.readouterr().err.splitlines() == [  # each pause is as long as all before it
        "merge (ties): 20 MB of 2 GB (1 %), 2 MB/s, 0:16:30 left",
        "merge (ties): 40 MB of 2 GB (2 %), 2 MB/s, 0:16:20 left",
        "merge (ties): 80 MB of 2 GB (4 %), 2 MB/s, 0:16:00 left",
        "merge (ties): 160 MB of 2 GB (8 %), 2 MB/s, 0:15:20 left",
        "merge (ties): 320 MB of 2 GB (16 %), 2 MB/s, 0:14:00 left",
        "merge (ties): 640 MB of 2 GB (32 %), 2 MB/s, 0:11:20 left",
        "merge (ties): 1.28 GB of 2 GB (64 %), 2 MB/s, 0:06:00 left",
    ]


def _work(shown: progress.Bar, amount: float, steps: int) -> None:
    for _ in range(steps):
        shown.advance(amount / steps)


def test_between_two_lines_of_a_log_is_never_more_than_the_longest_pause(
    clock: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LONGEST", 100.0)
    with bar("work", 500, "tasks") as shown:
        _work(shown, 500, 500)
    lines = capsys.readouterr().err.splitlines()
    assert [int(line.split()[1]) for line in lines] == [10, 20, 40, 80, 160, 260, 360, 460]


def test_a_terminal_gets_one_line_with_a_bar() -> None:
    code = (
        "import time; from mergelab.progress import bar\n"
        "with bar('merge (ties)', 2e9) as shown:\n"
        "    for _ in range(12): time.sleep(0.1); shown.advance(1e8)\n"
    )
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=theirs, stdin=theirs, env=environment
    )
    os.close(theirs)
    seen = b""
    try:
        while piece := os.read(ours, 4096):
            seen += piece
    except OSError:  # the program has closed its side
        pass
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
    assert re.search(
        r"merge \(ties\) .*1\.2 GB of 2 GB \(60 %\), [\d.]+ [MG]B/s, 0:00:0\d left", text
    )
    assert text.count("\n") <= 2


def test_what_arrives_in_a_folder_is_counted_whoever_puts_it_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "FIRST", 0.01)
    (tmp_path / "kept").write_bytes(b"-" * 500)
    with arriving("fetch org/name", tmp_path, 2000):
        (tmp_path / "inner").mkdir()
        (tmp_path / "inner/part.incomplete").write_bytes(b"-" * 1000)
        said, end = "", time.monotonic() + 60
        while "fetch org/name: 1 kB of 2 kB (50 %)" not in said:
            assert time.monotonic() < end, said
            time.sleep(0.02)
            said += capsys.readouterr().err


def test_a_download_tells_its_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"config.json": b"{}", "model.safetensors": b"-" * 300_000}
    monkeypatch.setattr(progress, "FIRST", 0.01)
    monkeypatch.setattr(progress, "LONGEST", 0.01)  # what it sees at its end, it tells
    with LoopbackHub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        commit = server.publish("acme/m", files)
        server.pause = 0.05
        hub.download(hub.Pinned("acme/m", commit), tmp_path / "models/m")
    said = capsys.readouterr().err
    told = r"^fetch acme/m: [\d.]+ kB of 300 kB \(\d+ %\), [\d.]+ [kM]?B/s"
    assert re.search(told, said, re.M), said
