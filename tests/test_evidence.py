"""Evidence against direct forward passes of the same tiny model."""

import dataclasses
import json
import signal
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import TEXT, tiny_model, tiny_study, tiny_tokenizer, write_part

from mergelab import evidence, views
from mergelab.errors import UserError
from mergelab.study import Check, Dataset, Options

WORDS = TEXT.split()
ITEMS = [
    {"id": f"i{n}", "text": " ".join(WORDS[n % 7 : n % 7 + 1 + 3 * n % 23])} for n in range(12)
]
CHECK = Check("bench", "base", "d/seen", "d/fresh", ("base_loss",), ())


@pytest.fixture
def results(tmp_path):
    write_part(tmp_path, "d/seen", ITEMS[:5])
    write_part(tmp_path, "d/fresh", ITEMS[5:])
    return tmp_path


def probe(results, folder, name="m"):
    """Probe a model; the path of its evidence on d/fresh."""
    study = tiny_study(results / "study", checks=(CHECK,))
    evidence.probe(study, name, folder, results)
    return evidence.file_of(results, name, "d/fresh", "text")


def logprobs(path):
    return evidence.load(path).logprob


def direct(model, ids):
    """logprob, mean and std of every token but the first: one unpadded pass, in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].double()
    log_p = torch.log_softmax(logits, -1)
    mean = (log_p.exp() * log_p).sum(-1)
    std = ((log_p.exp() * log_p**2).sum(-1) - mean**2).sqrt()
    chosen = log_p[range(len(ids) - 1), ids[1:]]
    return chosen.numpy(), mean.numpy(), std.numpy()


def test_evidence_equals_an_unpadded_forward_pass(results):
    model, tokenizer = tiny_model(results / "m"), tiny_tokenizer(results / "tokenizer")
    probe(results, results / "m")
    for part, items in (("d/seen", ITEMS[:5]), ("d/fresh", ITEMS[5:])):
        stored = evidence.load(evidence.file_of(results, "m", part, "text"))
        for n, item in enumerate(items):
            ids = [0, *tokenizer.encode(item["text"], add_special_tokens=False)]
            ours = (stored.logprob[n], stored.mean[n], stored.std[n])
            for values, truth in zip(ours, direct(model, ids), strict=True):
                assert values.dtype == np.float32
                assert values == pytest.approx(truth, abs=1e-4)
        assert stored.ids == tuple(item["id"] for item in items)
        assert stored.answer == tuple(len(values) for values in stored.logprob)


def test_the_order_of_items_does_not_matter(results):
    tiny_model(results / "m")
    forward = logprobs(probe(results, results / "m", "a"))
    write_part(results, "d/fresh", ITEMS[:4:-1])
    backward = logprobs(probe(results, results / "m", "b"))
    for x, y in zip(forward, reversed(backward), strict=True):
        assert x == pytest.approx(y, abs=1e-5)


def test_without_a_bos_token_the_first_token_is_not_scored(results):
    model = tiny_model(results / "m")
    tokenizer = tiny_tokenizer(results / "m")
    tokenizer.bos_token = None
    tokenizer.save_pretrained(str(results / "m"))
    stored = logprobs(probe(results, results / "m"))
    ids = tokenizer.encode(ITEMS[6]["text"], add_special_tokens=False)
    assert stored[1] == pytest.approx(direct(model, ids)[0], abs=1e-4)


def test_a_tokenizer_that_adds_bos_gets_only_one(results):
    tiny_model(results / "plain")
    tiny_model(results / "adding", adds_bos=True)
    plain = logprobs(probe(results, results / "plain", "a"))
    adding = logprobs(probe(results, results / "adding", "b"))
    assert [len(x) for x in plain] == [len(x) for x in adding]
    assert plain[0] == pytest.approx(adding[0])


def test_texts_are_cut_at_the_models_length(results):
    tiny_model(results / "m", length=8)
    stored = logprobs(probe(results, results / "m"))
    assert max(len(values) for values in stored) == 7


def test_rows_are_cut_into_pieces_without_a_seam(results, monkeypatch):
    tiny_model(results / "m")
    whole = evidence.load(probe(results, results / "m", "a")).std
    monkeypatch.setattr(evidence, "ROWS", 3)
    pieces = evidence.load(probe(results, results / "m", "b")).std
    for x, y in zip(whole, pieces, strict=True):
        assert x == pytest.approx(y, abs=1e-6)


def test_evidence_is_made_once(results):
    tiny_model(results / "m")
    path = probe(results, results / "m")
    before = path.stat().st_mtime_ns
    assert probe(results, results / "m").stat().st_mtime_ns == before


def configure(folder, **changes):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "change", ["weights", "items", "tokenizer", "bos", "length", "damage", "version"]
)
def test_evidence_is_made_anew_when_its_inputs_change(results, change, monkeypatch):
    tiny_model(results / "m")
    path = probe(results, results / "m")
    key = evidence.metadata(path)["key"]
    if change == "weights":
        tiny_model(results / "m", seed=1)
    elif change == "items":
        write_part(results, "d/fresh", ITEMS[6:])
    elif change == "tokenizer":
        tiny_tokenizer(results / "m", vocab_size=270)
    elif change == "bos":
        configure(results / "m", bos_token="</s>")
    elif change == "length":
        config = json.loads((results / "m/config.json").read_text())
        (results / "m/config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    elif change == "version":
        monkeypatch.setattr(evidence, "VERSION", 99)
    else:
        path.write_bytes(path.read_bytes()[:1000])
    probe(results, results / "m")
    assert (evidence.metadata(path)["key"] == key) == (change == "damage")
    assert len(logprobs(path)) == (6 if change == "items" else 7)


def test_the_same_inputs_give_the_same_bytes(results):
    tiny_model(results / "m")
    path = probe(results, results / "m")
    first = path.read_bytes()
    path.unlink()
    assert probe(results, results / "m").read_bytes() == first
    assert [p.name for p in path.parent.iterdir()] == ["text.safetensors"]


def test_bfloat16_evidence_is_close_to_its_unpadded_self(results):
    model, tokenizer = tiny_model(results / "m", dtype="bfloat16"), tiny_tokenizer(results / "t")
    path = probe(results, results / "m")
    assert evidence.metadata(path)["dtype"] == "bfloat16"
    for item, ours in zip(ITEMS[5:], logprobs(path), strict=True):
        ids = [0, *tokenizer.encode(item["text"], add_special_tokens=False)]
        assert ours == pytest.approx(direct(model, ids)[0], abs=0.1)


def test_missing_items_say_how_to_make_them(results):
    tiny_model(results / "m")
    (results / "data/d/fresh.jsonl").unlink()
    with pytest.raises(UserError, match=r"fresh\.jsonl: no such file.* mergelab data"):
        probe(results, results / "m")


def test_an_item_without_text_is_named(results):
    tiny_model(results / "m")
    write_part(results, "d/fresh", [*ITEMS[5:], {"id": "void", "text": ""}])
    with pytest.raises(UserError, match="Item 'void' has no token to score"):
        probe(results, results / "m")


def test_a_model_of_nans_is_reported(results):
    model = tiny_model(results / "m")
    model.model.norm.weight.data[0] = float("nan")
    model.save_pretrained(str(results / "m"))
    with pytest.raises(UserError, match="m gives no finite log-probability on d/fresh, item i5"):
        probe(results, results / "m")
    assert not evidence.file_of(results, "m", "d/fresh", "text").exists()


def test_a_folder_without_tokenizer_is_refused(results):
    tiny_model(results / "m")
    for path in (results / "m").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match=r"holds no tokenizer \(tokenizer.json\)"):
        probe(results, results / "m")


def test_unknown_evidence_is_refused(results):
    with pytest.raises(UserError, match=r"no evidence yet\. Run: mergelab probe STUDY x"):
        evidence.load(evidence.file_of(results, "x", "d/fresh", "text"))


def spoil(path, kind):
    """Write the file anew with one thing wrong."""
    from safetensors import safe_open
    from safetensors.numpy import load_file

    tensors, about = load_file(path), evidence.metadata(path)
    with safe_open(str(path), framework="numpy") as file:
        assert list(file.metadata()) == ["mergelab"]
    if kind == "list":
        about = [1]
    elif kind == "no ids":
        del about["ids"]
    elif kind == "no bos":
        del about["bos"]
    elif kind == "odd ids":
        about["ids"] = 5
    elif kind == "an id less":
        about["ids"].pop()
    elif kind == "a token less":
        tensors["logprob"] = tensors["logprob"][:-1]
    elif kind == "no std":
        del tensors["std"]
    elif kind == "falling":
        tensors["offsets"][1] = -3
    elif kind == "answer outside":
        tensors["answer"][2] = 999
    else:
        tensors["mean"][2] = np.nan
    evidence._write(path, tensors, about)


DAMAGE = (
    *("list", "no ids", "no bos", "odd ids", "an id less", "a token less", "no std", "falling"),
    *("answer outside", "nan"),
)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_evidence_is_refused_and_silently_made_anew(results, kind):
    tiny_model(results / "m")
    path = probe(results, results / "m")
    good = path.read_bytes()
    spoil(path, kind)
    with pytest.raises(UserError) as error:
        logprobs(path)
    assert str(error.value) == f"{path}: is damaged. Run: mergelab probe STUDY m"
    assert probe(results, results / "m").read_bytes() == good


NAMES = ("answer_loss", "paraphrase_gap", "codec", "option_order")
FULL = dataclasses.replace(CHECK, detectors=NAMES)
DATA = Dataset(
    "d", None, ".", None, (), "t", {"seen": 5, "fresh": 7}, "a", "w", Options("q", ("c", "c"))
)


def full(number, choices=3):
    """An item with all that a view may ask for."""
    words = WORDS[number % 5 : number % 5 + 4]
    return {
        "id": f"f{number}",
        "text": f"Question: {' '.join(words)}? Answer: {60 + number}",
        "answer": str(60 + number),
        "twin": f"What is {' '.join(words)}? {60 + number}",
        "options": {"question": f"Which {number}?", "choices": WORDS[:choices]},
    }


def full_study(results):
    return dataclasses.replace(tiny_study(results / "study", checks=(FULL,)), datasets={"d": DATA})


def probe_all(results, items):
    """Probe every view of five suspects and the other items as controls, on one random model."""
    write_part(results, "d/seen", items[:5])
    write_part(results, "d/fresh", items[5:])
    model = tiny_model(results / "m")
    evidence.probe(full_study(results), "m", results / "m", results)
    return model, tiny_tokenizer(results / "tokenizer")


def seen(results, view, part="d/seen"):
    return evidence.load(evidence.file_of(results, "m", part, view))


def test_the_answer_begins_at_the_token_that_the_question_alone_does_not_give(results):
    _, tokenizer = probe_all(results, [full(n) for n in range(12)])
    for n, start in enumerate(seen(results, "text").answer):
        ids = tokenizer.encode(full(n)["text"], add_special_tokens=False)
        straddles = " 60" if n == 0 else str(60 + n)  # the tokenizer knows " 60" as one token
        assert tokenizer.decode(ids[start:]) == straddles


def test_an_answer_beyond_the_models_length_has_no_token(results):
    loaded = type("Loaded", (), {"tokenizer": tiny_tokenizer(results / "t"), "length": 9})
    item = full(1)
    text = views.Text("x", item["text"], answer=len(item["text"]) - 2)
    encoded = evidence.encode(loaded, text)
    assert (len(encoded.ids), encoded.first, encoded.answer) == (9, 1, 8)


def test_a_text_has_the_same_tokens_after_its_neighbours(results):
    items = [full(n) for n in range(12)]
    model, tokenizer = probe_all(results, items)
    alone, after = seen(results, "text"), seen(results, "context")
    texts = views.texts(full_study(results), "d/seen", "context", items[:5])
    for n, text in enumerate(texts):
        own = tokenizer.encode(text.text, add_special_tokens=False)
        before = tokenizer.encode(text.before, add_special_tokens=False)[-(127 - len(own)) :]
        truth = direct(model, [0, *before, *own])[0][len(before) :]
        assert after.logprob[n] == pytest.approx(truth, abs=1e-4)
        assert len(after.logprob[n]) == len(alone.logprob[n])
        assert text.text not in text.before
        assert sum(item["text"] in text.before for item in items[:5]) == 3


def test_neighbours_do_not_depend_on_the_order_of_items(results):
    items = [full(n) for n in range(6)]
    study = full_study(results)
    forward = {t.id: t.before for t in views.texts(study, "d/seen", "context", items)}
    backward = {t.id: t.before for t in views.texts(study, "d/seen", "context", items[::-1])}
    assert forward == backward


def test_choices_are_scored_in_every_order_the_published_one_first(results):
    model, tokenizer = probe_all(results, [full(n) for n in range(12)])
    stored = seen(results, "orders")
    assert stored.ids == tuple(f"f{n}" for n in range(5) for _ in range(6))
    for number, order in enumerate(permutations(full(0)["options"]["choices"])):
        lines = [f"{letter}. {choice}" for letter, choice in zip("ABC", order, strict=True)]
        ids = [0, *tokenizer.encode("\n".join(["Which 0?", *lines]), add_special_tokens=False)]
        assert stored.logprob[number] == pytest.approx(direct(model, ids)[0], abs=1e-4)


def test_of_more_than_four_choices_24_orders_are_drawn_of_more_than_100_items_100(results):
    items = [full(n, choices=6) for n in range(130)]
    texts = views.texts(full_study(results), "d/seen", "orders", items)
    assert len(texts) == 2400
    assert {text.id for text in views.texts(None, "d/x", "orders", items[::-1])} == {
        text.id for text in texts
    }
    of_first = [text.text for text in texts if text.id == texts[0].id]
    assert len(set(of_first)) == 24
    assert of_first[0].endswith("F. " + WORDS[5])


@pytest.mark.parametrize("field", ["answer", "twin", "options"])
def test_an_item_that_was_prepared_without_what_a_view_needs_is_named(results, field):
    items = [full(n) for n in range(12)]
    del items[3][field]
    message = rf"d/seen, item f3: was prepared without '{field}'\. Run: mergelab data STUDY"
    with pytest.raises(UserError, match=message):
        probe_all(results, items)


PROBE = """
import os, signal, sys
def kill(event, arguments):  # when the second view is written, before it has its name
    if event == "os.rename" and str(arguments[1]).endswith("d/fresh/orders.safetensors"):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill)
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from mergelab import evidence
from test_evidence import full_study
results = Path(sys.argv[1])
evidence.probe(full_study(results), "m", results / "m", results)
"""


def test_a_killed_probe_loses_at_most_the_view_in_flight(results):
    items = [full(n, choices=4) for n in range(25)]
    write_part(results, "d/seen", items[:5])
    write_part(results, "d/fresh", items[5:])
    tiny_model(results / "m")
    command = [sys.executable, "-c", PROBE, str(results), str(Path(__file__).parent)]
    first = evidence.file_of(results, "m", "d/fresh", "context")
    assert subprocess.run(command).returncode == -signal.SIGKILL
    made = first.stat().st_mtime_ns
    assert not evidence.file_of(results, "m", "d/fresh", "orders").exists()
    evidence.probe(full_study(results), "m", results / "m", results)
    assert first.stat().st_mtime_ns == made
    names = sorted(path.name for path in first.parent.glob("*.safetensors"))
    assert names == [f"{view}.safetensors" for view in sorted(views.VIEWS)]
    assert evidence.load(evidence.file_of(results, "m", "d/seen", "twin")).ids[0] == "f0"
