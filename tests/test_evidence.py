"""Evidence against direct forward passes of the same tiny model."""

import json

import numpy as np
import pytest
import torch
from tiny import TEXT, tiny_model, tiny_study, tiny_tokenizer, write_part

from mergelab import evidence
from mergelab.errors import UserError
from mergelab.study import Check

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
    study = tiny_study(results / "study", checks=(CHECK,))
    evidence.probe(study, name, folder, results)
    return results / f"evidence/{name}.safetensors"


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
    path = probe(results, results / "m")
    for part, items in (("d/seen", ITEMS[:5]), ("d/fresh", ITEMS[5:])):
        stored = [evidence.load(path, part, s) for s in evidence.STATISTICS]
        for n, item in enumerate(items):
            ids = [0, *tokenizer.encode(item["text"], add_special_tokens=False)]
            for ours, truth in zip(stored, direct(model, ids), strict=True):
                assert ours[n].dtype == np.float32
                assert ours[n] == pytest.approx(truth, abs=1e-4)
        assert evidence.metadata(path)["ids"][part] == [item["id"] for item in items]


def test_the_order_of_items_does_not_matter(results):
    tiny_model(results / "m")
    forward = evidence.load(probe(results, results / "m", "a"), "d/fresh")
    write_part(results, "d/fresh", ITEMS[:4:-1])
    backward = evidence.load(probe(results, results / "m", "b"), "d/fresh")
    for x, y in zip(forward, reversed(backward), strict=True):
        assert x == pytest.approx(y, abs=1e-5)


def test_without_a_bos_token_the_first_token_is_not_scored(results):
    model = tiny_model(results / "m")
    tokenizer = tiny_tokenizer(results / "m")
    tokenizer.bos_token = None
    tokenizer.save_pretrained(str(results / "m"))
    stored = evidence.load(probe(results, results / "m"), "d/fresh")
    ids = tokenizer.encode(ITEMS[6]["text"], add_special_tokens=False)
    assert stored[1] == pytest.approx(direct(model, ids)[0], abs=1e-4)


def test_a_tokenizer_that_adds_bos_gets_only_one(results):
    tiny_model(results / "plain")
    tiny_model(results / "adding", adds_bos=True)
    plain = evidence.load(probe(results, results / "plain", "a"), "d/fresh")
    adding = evidence.load(probe(results, results / "adding", "b"), "d/fresh")
    assert [len(x) for x in plain] == [len(x) for x in adding]
    assert plain[0] == pytest.approx(adding[0])


def test_texts_are_cut_at_the_models_length(results):
    tiny_model(results / "m", length=8)
    stored = evidence.load(probe(results, results / "m"), "d/fresh")
    assert max(len(values) for values in stored) == 7


def test_rows_are_cut_into_pieces_without_a_seam(results, monkeypatch):
    tiny_model(results / "m")
    whole = evidence.load(probe(results, results / "m", "a"), "d/fresh", "std")
    monkeypatch.setattr(evidence, "ROWS", 3)
    pieces = evidence.load(probe(results, results / "m", "b"), "d/fresh", "std")
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
    assert len(evidence.load(path, "d/fresh")) == (6 if change == "items" else 7)


def test_the_same_inputs_give_the_same_bytes(results):
    tiny_model(results / "m")
    path = probe(results, results / "m")
    first = path.read_bytes()
    path.unlink()
    assert probe(results, results / "m").read_bytes() == first
    assert [p.name for p in path.parent.iterdir()] == ["m.safetensors"]


def test_bfloat16_evidence_is_close_to_its_unpadded_self(results):
    model, tokenizer = tiny_model(results / "m", dtype="bfloat16"), tiny_tokenizer(results / "t")
    path = probe(results, results / "m")
    assert evidence.metadata(path)["dtype"] == "bfloat16"
    for item, ours in zip(ITEMS[5:], evidence.load(path, "d/fresh"), strict=True):
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
    assert not (results / "evidence/m.safetensors").exists()


def test_a_folder_without_tokenizer_is_refused(results):
    tiny_model(results / "m")
    for path in (results / "m").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match=r"holds no tokenizer \(tokenizer.json\)"):
        probe(results, results / "m")


def test_unknown_evidence_is_refused(results):
    tiny_model(results / "m")
    path = probe(results, results / "m")
    with pytest.raises(UserError, match="holds nothing on d/other"):
        evidence.load(path, "d/other")
    with pytest.raises(UserError, match=r"no evidence yet\. Run mergelab probe for 'x'"):
        evidence.load(path.with_name("x.safetensors"), "d/fresh")


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
        about["ids"]["d/fresh"] = 5
    elif kind == "an id less":
        about["ids"]["d/fresh"].pop()
    elif kind == "a token less":
        tensors["d/fresh/logprob"] = tensors["d/fresh/logprob"][:-1]
    elif kind == "no std":
        del tensors["d/fresh/std"]
    elif kind == "falling":
        tensors["d/fresh/offsets"][1] = -3
    else:
        tensors["d/fresh/mean"][2] = np.nan
    evidence._write(path, tensors, about)


DAMAGE = (
    *("list", "no ids", "no bos", "odd ids", "an id less", "a token less", "no std", "falling"),
    "nan",
)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_evidence_is_refused_and_silently_made_anew(results, kind):
    tiny_model(results / "m")
    path = probe(results, results / "m")
    good = path.read_bytes()
    spoil(path, kind)
    with pytest.raises(UserError) as error:
        evidence.load(path, "d/fresh")
    assert str(error.value) == f"{path}: is damaged. Run: mergelab probe STUDY m"
    assert probe(results, results / "m").read_bytes() == good
