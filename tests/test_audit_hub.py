"""Scores of a model of the hub, claimed on its card: fetched, scored again and judged, end to end.

The hub is on this machine; model, card and benchmark come from it as from the real one."""

from __future__ import annotations

import io
import json
import logging
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_model
from conftest import Run
from loopback_hub import LoopbackHub
from tiny import tiny_model, tiny_study

from mergelab import chatter, inference, scores
from mergelab.audit.rescore import rescore
from mergelab.audit.run import Options, audit
from mergelab.audit.verdicts import judge
from mergelab.checkpoint import open_checkpoint
from mergelab.claims.base import Claim
from mergelab.errors import UserError
from mergelab.study import Benchmark

WORDS = ["train", "travels", "miles", "hours", "patient", "aspirin", "what", "is", "its", "speed"]
ITEMS = 60
DATA = b"""---
configs:
- config_name: default
  data_files: [{split: train, path: data/train-*}, {split: test, path: data/test-*}]
---
"""
CARD = """---
model-index:
- name: tiny
  results:
  - task: {{type: text-generation}}
    dataset: {{name: SciQ, type: allenai/sciq, split: test, args: {{num_few_shot: 0}}}}
    metrics:
    - {{type: acc, value: {honest:.2f}}}
    - {{type: acc_norm, value: {raised:.2f}}}
---
# Tiny
"""


def item(i: int) -> dict[str, str]:
    """An item as allenai/sciq holds it."""
    draw = random.Random(i)
    names = ("question", "distractor1", "distractor2", "distractor3", "correct_answer", "support")
    return {name: " ".join(draw.choices(WORDS, k=draw.randint(1, 6))) for name in names}


def parquet(rows: list[dict[str, str]]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


@pytest.fixture
def sciq(server: LoopbackHub) -> str:
    """The benchmark, on the hub; returns its commit."""
    files = {"README.md": DATA, "data/test-0.parquet": parquet([item(i) for i in range(ITEMS)])}
    files["data/train-0.parquet"] = parquet([item(-i) for i in range(1, 9)])
    return server.publish("datasets/allenai/sciq", files)


@pytest.fixture
def true(tmp_path: Path) -> dict[str, float]:
    """A model, and the scores that lm-eval gives it on the same items from a file, in percent."""
    tiny_model(tmp_path / "model", length=128)
    bench = Benchmark("sciq", "lm_eval/sciq", "x.jsonl", None, 0)
    study = tiny_study(tmp_path / "own", suite=(bench,))
    lines = (json.dumps(item(i)) + "\n" for i in range(ITEMS))
    (study.folder / "x.jsonl").write_text("".join(lines))
    scores.evaluate(study, "tiny", tmp_path / "model", tmp_path / "truth")
    found = json.loads((tmp_path / "truth/scores/tiny.json").read_text())
    return {k: 100 * v for k, v in found["benchmarks"]["sciq"]["metrics"].items()}


def test_a_hub_model_is_fetched_and_scored_again_and_its_claims_are_judged(
    server: LoopbackHub, mergelab: Run, tmp_path: Path, sciq: str, true: dict[str, float]
) -> None:
    card = CARD.format(honest=true["acc"], raised=true["acc_norm"] + 100 * 9 / ITEMS)
    files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    server.publish("acme/tiny", files | {"README.md": card.encode()})
    done = mergelab("audit", "acme/tiny", "--fetch")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "results/audits/acme-tiny"
    data = json.loads((out / "audit.json").read_text())
    honest, raised = data["claims"]
    assert (honest["metric"], honest["verdict"]) == ("acc", "reproduced")
    assert (raised["metric"], raised["verdict"]) == ("acc_norm", "not reproduced")
    assert (raised["ours"]["n"], raised["explained_by"]) == (ITEMS, None)
    assert 100 * raised["difference"] == pytest.approx(15, abs=0.01)
    assert (out / raised["record"]).is_file()
    locked = json.loads((out / "lock.json").read_text())
    assert locked["datasets"] == {"allenai/sciq": {"commit": sciq}}
    assert "1 of 2 scores reproduced, 1 not reproduced" in done.stdout

    said = done.stderr.splitlines()
    assert not [line for line in said if "it/s" in line or "examples" in line]  # no bars of others
    assert len([line for line in said if "exceeds model's maximum length" in line]) == 1
    assert len(said) < 12

    server.publish("datasets/allenai/sciq", {"data/test-0.parquet": b"moved on"})
    asked = len(server.requests)
    again = audit("acme/tiny", out, Options(fetch=True))
    assert [claim["verdict"] for claim in again["claims"]] == ["reproduced", "not reproduced"]
    assert not any("datasets/" in request for request in server.requests[asked:])
    assert not any("safetensors" in request for request in server.requests[asked:])


def test_the_benchmark_of_a_folder_is_fetched_by_a_process_that_asked_no_hub_before(
    server: LoopbackHub, mergelab: Run, tmp_path: Path, sciq: str, true: dict[str, float]
) -> None:
    card = CARD.format(honest=true["acc"], raised=true["acc_norm"])
    (tmp_path / "model/README.md").write_text(card)
    done = mergelab("audit", "model", "--fetch", "--skip", "weights")
    assert done.returncode == 0, done.stderr
    data = json.loads((tmp_path / "results/audits/model/audit.json").read_text())
    assert [claim["verdict"] for claim in data["claims"]] == ["reproduced", "reproduced"]


def claim() -> Claim:
    return Claim("m", "sciq", 0.5, "50.00", True, "card.md:3", "SciQ", metric="acc", shots=0)


@pytest.mark.parametrize("fault", ["gone", "script"])
def test_data_that_the_hub_does_not_give_make_a_claim_unverifiable(
    server: LoopbackHub, tmp_path: Path, fault: str
) -> None:
    if fault == "script":
        server.publish("datasets/allenai/sciq", {"README.md": b"# SciQ\n", "sciq.py": b"1/0"})
    tiny_model(tmp_path / "model")
    found = rescore("m", tmp_path / "model", [claim()], tmp_path / "work", fetch=True)["sciq"]
    told = judge(claim(), found.measured, found.why_not)
    assert told.verdict == "unverifiable"
    assert "allenai/sciq" in told.why
    assert ("made by a script" if fault == "script" else "the hub has no such dataset") in told.why


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_a_model_that_transformers_cannot_read_is_the_makers_fault(
    server: LoopbackHub, tmp_path: Path, sciq: str, file: str
) -> None:
    tiny_model(tmp_path / "model")
    path = tmp_path / "model" / file
    broken = {"model_type": "mystery", "auto_map": {"AutoConfig": "code.Config"}}
    path.write_text(json.dumps(broken) if file == "config.json" else "{")
    chats = replace(claim(), chat_template=True)
    found = rescore("m", tmp_path / "model", [chats], tmp_path / "work", fetch=True)["sciq"]
    assert found.measured == ()
    assert "has no chat template" not in found.why_not
    assert f"transformers cannot read its {file.removesuffix('.json')}" in found.why_not


def test_want_of_memory_or_of_a_package_is_not_called_damaged_files(tmp_path: Path) -> None:
    write_model(tmp_path / "model", {"x": np.zeros(1, np.float32)}, "F32")
    sizes = {"n_embd": 2**24, "n_positions": 2**30, "vocab_size": 2**30}  # 32 PB at once: refused
    huge = {"model_type": "gpt2", "n_layer": 1, "n_head": 1, **sizes}
    (tmp_path / "model/config.json").write_text(json.dumps(huge))
    with pytest.raises(UserError, match=r"its model needs more memory than there is: .*allocate"):
        inference.load(open_checkpoint(tmp_path / "model", "m"))
    (tmp_path / "old").mkdir()
    (tmp_path / "old/config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "old/tokenizer.model").write_bytes(b"SentencePiece")
    with pytest.raises(UserError, match=r"its tokenizer needs a package that is not here: .*pip"):
        inference.load_tokenizer(tmp_path / "old")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(chatter, "say", lines.append)
    return lines


def test_each_kind_of_warning_is_told_once_when_it_comes_and_what_is_raised_is_not_touched(
    said: list[str],
) -> None:
    before = logging.getLogger("transformers").handlers
    first = "transformers.once: cut 0 tokens"

    def work() -> None:
        with inference.quiet(offline=True):
            for number in range(1000):
                logging.getLogger("transformers.once").warning("cut %d tokens", number)
            assert first in said
            logging.getLogger("datasets.once").error("odd \x1b[31m text")
            logging.getLogger("datasets").info("never told")
            raise UserError("a real mistake")

    for _ in range(2):  # an audit of many benchmarks tells it once, too
        with pytest.raises(UserError, match="a real mistake"):
            work()
    assert said == [first, "datasets.once: odd  [31m text"]
    assert logging.getLogger("transformers").handlers is before


def test_many_warnings_of_one_part_of_a_library_hide_none_of_another(said: list[str]) -> None:
    with inference.quiet(offline=True):
        for letter in "abcdefgh":
            logging.getLogger("lm_eval.many").warning("default for %s", letter)
        logging.getLogger("transformers.many").warning("newly initialized: lm_head")
    assert said == [
        *(f"lm_eval.many: default for {letter}" for letter in "abcde"),
        "lm_eval.many: further warnings of it are not shown",
        "transformers.many: newly initialized: lm_head",
    ]


def test_a_warning_that_a_library_words_wrongly_stops_nothing(said: list[str]) -> None:
    with inference.quiet(offline=True):
        logging.getLogger("transformers.slip").warning("a thing is deprecated", FutureWarning)
        logging.getLogger("transformers.slip").warning({"%s": 1}, 2, 3)
    assert said == [
        "transformers.slip: a thing is deprecated",
        "transformers.slip: (a message that cannot be shown)",
    ]


def test_bars_of_others_are_off_inside_and_back_after(capsys: pytest.CaptureFixture[str]) -> None:
    from tqdm.auto import tqdm

    def bar() -> Any:
        for _ in tqdm(range(3), mininterval=0):
            pass
        return capsys.readouterr().err

    with inference.quiet(offline=True):
        with inference.quiet(offline=True):
            assert bar() == ""
        assert bar() == ""
    assert "3/3" in bar()
