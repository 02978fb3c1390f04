"""tokenizer_source, tokenizer and chat_template: output tokens, rows of each model, files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from checkpoints import HIDDEN, bf16_bits, write_model
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, pre_tokenizers, trainers

from mergelab.chat import TEMPLATES, chosen_template, read_chat_template, with_template
from mergelab.checkpoint import Checkpoint, Tensor, open_checkpoint
from mergelab.errors import Problems, UserError
from mergelab.plan import make_plan
from mergelab.recipe import load_recipe
from mergelab.rows import Rows
from mergelab.tokenizer import Tokenizer, TokenSource, read_tokenizer
from mergelab.vocabulary import Vocabulary, build
from mergelab.yamlfile import Reader, parse

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CATS = ["the cat sat on the mat", "the dog sat on the cat", "a man and the dog"] * 3
CELLS = ["gene protein cell the", "protein cell gene patient", "the patient and the cell"] * 3
SUMS = ["integral of sine", "the sum of the integral"] * 3


def train(texts: list[str], special: list[str], added: tuple[str, ...] = ()) -> Fast:
    """A byte-level BPE tokenizer; tokens in angle brackets are special ones."""
    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=50, special_tokens=special, show_progress=False)
    fast.train_from_iterator(texts, trainer)
    for token in added:
        (fast.add_special_tokens if token.startswith("<") else fast.add_tokens)([token])
    return fast


def make(folder: Path, fast: Fast, seed: int, *, more: int = 0, **config: object) -> Checkpoint:
    """A model with an embedding and a head of `more` rows than tokens; bfloat16."""
    rows = max(fast.get_vocab().values()) + 1 + more
    random = np.random.default_rng(seed)
    names = {EMBED: (rows, HIDDEN), HEAD: (rows, HIDDEN), "model.norm.weight": (HIDDEN,)}
    tensors = {name: random.standard_normal(shape) for name, shape in names.items()}
    write_model(folder, tensors, layers=0, vocab_size=rows, **config)
    fast.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return open_checkpoint(folder, folder.name)


@dataclass
class Three:
    """cats <s> </s>; cells <pad> <s> </s> ... <|im_start|> zyzzyva, 3 rows more; sums <s>."""

    cats: Checkpoint
    cells: Checkpoint
    sums: Checkpoint

    @property
    def all(self) -> dict[str, Checkpoint]:
        return {"cats": self.cats, "cells": self.cells, "sums": self.sums}


@pytest.fixture
def three(tmp_path: Path) -> Three:
    cats = train(CATS, ["<s>", "</s>"])
    cells = train(CELLS, ["<pad>", "<s>", "</s>"], ("<|im_start|>", "zyzzyva"))
    sums = train(SUMS, ["<s>"], ("<|im_start|>",))
    return Three(
        make(tmp_path / "cats", cats, 1, bos_token_id=0, eos_token_id=1),
        make(tmp_path / "cells", cells, 2, more=3, bos_token_id=1, eos_token_id=2),
        make(tmp_path / "sums", sums, 3, bos_token_id=0),
    )


def source(
    model: str | None, token: str | int | None = None, *, force: bool = False
) -> TokenSource:
    return TokenSource(model, token, force, "r.yaml:7")


def rerowed(
    vocabulary: Vocabulary,
    checkpoints: Mapping[str, Checkpoint],
    base: str | None,
    name: str = EMBED,
) -> dict[str, Rows]:
    """The vocabulary tensor of each model in the output's order; no mistake is allowed."""
    problems = Problems()
    tensors = {model: c.tensors[name] for model, c in checkpoints.items()}
    found = vocabulary.rerow(name, tensors, base, problems, [])
    problems.raise_if_any()
    assert found is not None
    return found


def matrix(tensor: Tensor | Rows) -> np.ndarray:
    return tensor.floats(0, tensor.size).reshape(tensor.shape)


def own(model: Checkpoint, token: str, name: str = EMBED) -> np.ndarray:
    """A token's row as the model stores it."""
    return matrix(model.tensors[name])[model.vocabulary[token]]


def read(text: str, models: tuple[str, ...] = ("cats", "cells")) -> Tokenizer | None:
    reader = Reader(Path("r.yaml"))
    found = read_tokenizer(reader, parse(text, reader.path), models)
    reader.problems.raise_if_any()
    return found


def fast_of(vocabulary: Vocabulary) -> Fast:
    return Fast.from_str(vocabulary.files["tokenizer.json"].decode())


# Which tokens the output has


def test_union_keeps_the_base_ids_and_appends_the_unseen_tokens_of_the_others(three: Three) -> None:
    union = build(three.all, "cats", tuple(three.all), Tokenizer("union"))
    everyone = set().union(*(c.vocabulary for c in three.all.values()))
    assert set(union.tokens) == everyone
    assert sorted(union.tokens.values()) == list(range(len(everyone)))
    assert three.cats.vocabulary.items() <= union.tokens.items()
    assert union.size == len(everyone)
    last = ["<|im_start|>", "zyzzyva"]  # added ones come after all ordinary ones
    assert sorted(union.tokens, key=union.tokens.__getitem__)[-3:] == ["<pad>", *last]
    assert any("are appended as added tokens" in text for text in union.warnings)


def test_the_written_tokenizer_loads_with_exactly_the_planned_ids(three: Three) -> None:
    for chosen in ("union", "base", "sums"):
        settings = Tokenizer(chosen, {"<|new|>": source(None)})
        vocabulary = build(three.all, "cells", tuple(three.all), settings)
        assert fast_of(vocabulary).get_vocab() == dict(vocabulary.tokens), chosen
        assert vocabulary.tokens["<|new|>"] == len(vocabulary.tokens) - 1


def test_added_tokens_keep_their_flags_and_the_first_definition_wins(three: Three) -> None:
    union = build(three.all, "cats", tuple(three.all), Tokenizer("union"))
    entries = json.loads(union.files["tokenizer.json"])["added_tokens"]
    special = {entry["content"]: entry["special"] for entry in entries}
    assert special["<|im_start|>"]
    assert special["<pad>"]
    assert not special["zyzzyva"]
    assert not special["protein"]
    path = three.sums.folder / "tokenizer.json"
    data = json.loads(path.read_text())
    data["added_tokens"][-1]["lstrip"] = True
    path.write_text(json.dumps(data))
    again = build(three.all, "cats", tuple(three.all), Tokenizer("union"))
    assert again.files == union.files
    assert "1 added tokens of sums have other flags" in again.warnings[0]


def test_an_ordinary_token_that_is_added_elsewhere_becomes_added_with_its_old_id(
    tmp_path: Path,
) -> None:
    plain = make(tmp_path / "plain", train(CATS, ["<s>"]), 1)
    added = make(tmp_path / "added", train(CATS, ["<s>"], ("sat",)), 2)
    assert plain.vocabulary == added.vocabulary
    union = build({"plain": plain, "added": added}, "plain", ("plain", "added"), Tokenizer("union"))
    assert not union.changed
    assert fast_of(union).encode("catsat").tokens == ["cat", "sat"]
    assert plain.vocabulary["sat"] in fast_of(union).get_added_tokens_decoder()


def test_tokens_without_a_row_are_cut_from_a_bpe_tokenizer_with_their_merges(
    three: Three, tmp_path: Path
) -> None:
    fast = train(CELLS, ["<pad>", "<s>"], ("<|im_start|>",))
    short = make(tmp_path / "short", fast, 4, more=-6)
    both = {"short": short, "sums": three.sums}
    base = build(both, "short", tuple(both), Tokenizer("base"))
    assert len(base.tokens) == base.size == short.tensors[EMBED].shape[0]
    assert set(base.tokens) == {t for t, i in short.vocabulary.items() if i < base.size}
    assert fast_of(base).get_vocab() == dict(base.tokens)
    union = build(both, "sums", tuple(both), Tokenizer("union"))
    assert "Ġprotein" in short.vocabulary
    assert "Ġprotein" not in base.tokens
    assert "Ġprotein" not in union.tokens


def test_a_tokenizer_of_words_cannot_be_cut(three: Three, tmp_path: Path) -> None:
    words = Fast(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    short = make(tmp_path / "short", words, 4, more=-1)
    both = {"short": short, "sums": three.sums}
    with pytest.raises(UserError, match=r"1 tokens of its WordLevel tokenizer .*'c'"):
        build(both, "short", tuple(both), Tokenizer("base"))


def test_ids_with_gaps_take_no_new_tokens(three: Three, tmp_path: Path) -> None:
    words = Fast(models.WordLevel({"a": 0, "b": 1, "c": 5}, unk_token="a"))
    gaps = make(tmp_path / "gaps", words, 4)
    both = {"gaps": gaps, "sums": three.sums}
    with pytest.raises(UserError, match="model gaps: the ids of its tokenizer have gaps"):
        build(both, "gaps", tuple(both), Tokenizer("union"))
    base = build(both, "gaps", tuple(both), Tokenizer("base"))
    rows = matrix(rerowed(base, both, "gaps")["gaps"])
    assert np.array_equal(rows[5], own(gaps, "c"))
    assert rows[3] == pytest.approx(rows[[0, 1, 5]].mean(axis=0))


def test_equal_vocabularies_change_nothing(tmp_path: Path) -> None:
    fast = train(CATS, ["<s>", "</s>"])
    same = {name: make(tmp_path / name, fast, i, more=5) for i, name in enumerate("ab")}
    for chosen in ("base", "union", "b"):
        vocabulary = build(same, "a", ("a", "b"), Tokenizer(chosen))
        assert not vocabulary.changed
        assert vocabulary.size == same["a"].tensors[EMBED].shape[0]
        tensors = {name: c.tensors[EMBED] for name, c in same.items()}
        assert vocabulary.rerow(EMBED, tensors, "a", Problems(), []) is None
        kept = {name: (tmp_path / "a" / name).read_bytes() for name in vocabulary.files}
        assert vocabulary.files == kept
        assert vocabulary.config(same["a"].config) == same["a"].config


def test_the_result_does_not_depend_on_hash_order(three: Three) -> None:
    first, again = (
        build(three.all, "cats", tuple(three.all), Tokenizer("union", {}, 8)) for _ in range(2)
    )
    assert first.files == again.files
    order = sorted(three.cells.vocabulary, key=three.cells.vocabulary.__getitem__)
    new = [
        t for t in order if t not in three.cats.vocabulary and t not in ("<pad>", "<|im_start|>")
    ]
    assert sorted(new[:-1], key=first.tokens.__getitem__) == new[:-1]


# Where the rows come from


def test_a_model_keeps_its_own_rows_whatever_their_new_ids(three: Three) -> None:
    union = build(three.all, "cats", tuple(three.all), Tokenizer("union"))
    for name in (EMBED, HEAD):
        rows = rerowed(union, three.all, "cats", name)
        for model, checkpoint in three.all.items():
            got = matrix(rows[model])
            assert got.shape == (union.size, HIDDEN)
            for token in checkpoint.vocabulary:
                assert np.array_equal(got[union.tokens[token]], own(checkpoint, token, name))


def test_a_token_of_one_model_gives_its_row_to_the_others(three: Three) -> None:
    union = build(three.all, "cats", tuple(three.all), Tokenizer("union"))
    for rows in rerowed(union, three.all, "cats").values():
        assert np.array_equal(matrix(rows)[union.tokens["zyzzyva"]], own(three.cells, "zyzzyva"))


def test_a_token_of_the_base_and_another_gives_the_base_row(three: Three) -> None:
    union = build(three.all, "cats", tuple(three.all), Tokenizer("union"))
    sums = matrix(rerowed(union, three.all, "cats")["sums"])
    assert np.array_equal(sums[union.tokens["</s>"]], own(three.cats, "</s>"))


def test_a_token_of_several_but_not_the_base_gives_their_mean(three: Three) -> None:
    union = build(three.all, "cats", tuple(three.all), Tokenizer("union"))
    token = "<|im_start|>"
    mean = (own(three.cells, token) + own(three.sums, token)) / np.float32(2)
    rows = rerowed(union, three.all, "cats")
    assert np.array_equal(matrix(rows["cats"])[union.tokens[token]], mean)
    alone = rerowed(union, three.all, None)["sums"]
    mean = (own(three.cats, "</s>") + own(three.cells, "</s>")) / np.float32(2)
    assert np.array_equal(matrix(alone)[union.tokens["</s>"]], mean)


def test_a_token_that_no_model_of_the_group_has_gets_zeros_and_a_warning(three: Three) -> None:
    union = build(three.all, "cats", tuple(three.all), Tokenizer("union"))
    warnings: list[str] = []
    tensors = {name: three.all[name].tensors[EMBED] for name in ("cats", "sums")}
    rows = union.rerow(EMBED, tensors, "cats", Problems(), warnings)
    assert rows is not None
    assert not matrix(rows["sums"])[union.tokens["zyzzyva"]].any()
    assert len(warnings) == 1
    assert "tokens get zeros" in warnings[0]


def test_a_configured_source_fills_in_and_force_replaces_all(three: Three) -> None:
    tokens = {
        "<|im_start|>": source("sums"),
        "</s>": source("cells", force=True),
        "Ġthe": source("cells", "gene", force=True),
        "zyzzyva": source(None),
        "<|new|>": source("cats", 3),
    }
    union = build(three.all, "cats", tuple(three.all), Tokenizer("union", tokens))
    rows = {m: matrix(r) for m, r in rerowed(union, three.all, "cats").items()}
    start, end, the = (union.tokens[t] for t in ("<|im_start|>", "</s>", "Ġthe"))
    assert np.array_equal(rows["cats"][start], own(three.sums, "<|im_start|>"))
    assert np.array_equal(rows["cells"][start], own(three.cells, "<|im_start|>"))
    assert not rows["cats"][union.tokens["zyzzyva"]].any()
    assert np.array_equal(rows["cells"][union.tokens["zyzzyva"]], own(three.cells, "zyzzyva"))
    for model in rows:
        assert np.array_equal(rows[model][end], own(three.cells, "</s>"))
        assert np.array_equal(rows[model][the], own(three.cells, "gene"))
        new = rows[model][union.tokens["<|new|>"]]
        assert np.array_equal(new, matrix(three.cats.tensors[EMBED])[3])


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (source("sums"), "r.yaml:7: model sums has no row for the token 'zyzzyva'"),
        (source("cats", "nothing"), "r.yaml:7: model cats has no row for the token 'nothing'"),
        (source("cats", 10**12), "r.yaml:7: model cats has no row for the token 1000000000000"),
        (source("cells"), "takes its row from cells, which has no part in tensor"),
    ],
)
def test_a_source_that_cannot_be_had_is_a_mistake(
    three: Three, wanted: TokenSource, message: str
) -> None:
    settings = Tokenizer("union", {"zyzzyva": wanted})
    union = build(three.all, "cats", tuple(three.all), settings)
    problems = Problems()
    tensors = {name: three.all[name].tensors[EMBED] for name in ("cats", "sums")}
    union.rerow(EMBED, tensors, "cats", problems, [])
    assert [message in text for text in problems.found] == [True]


def test_padding_fills_up_with_each_models_mean_row(three: Three) -> None:
    union = build(three.all, "cats", tuple(three.all), Tokenizer("union", {}, 16))
    assert union.size % 16 == 0
    assert 0 < union.size - len(union.tokens) < 16
    for rows in rerowed(union, three.all, "cats").values():
        got = matrix(rows)
        mean = got[: len(union.tokens)].astype(float).mean(axis=0)
        for row in got[len(union.tokens) :]:
            assert row == pytest.approx(mean, abs=1e-6)


def test_any_pieces_give_the_same_bits(three: Three) -> None:
    union = build(three.all, "cats", tuple(three.all), Tokenizer("union", {}, 16))
    for rows in rerowed(union, three.all, "cats").values():
        for work in ("<f4", "<f8"):
            whole = rows.floats(0, rows.size, work)
            for step in (1, 7, HIDDEN, 100):
                starts = range(0, rows.size, step)
                pieces = [rows.floats(a, min(a + step, rows.size), work) for a in starts]
                assert np.array_equal(np.concatenate(pieces), whole)
        assert len(rows.floats(5, 5)) == 0


@dataclass(frozen=True)
class Doubled:
    """A tensor that is computed while it is read, as that of an adapter."""

    stored: Tensor

    def __getattr__(self, name: str) -> object:
        return getattr(self.stored, name)

    def floats(self, start: int, stop: int, work: str = "<f4") -> np.ndarray:
        return 2 * self.stored.floats(start, stop, work)


def test_computed_tensors_are_rerowed_too(three: Three) -> None:
    union = build(three.all, "cats", tuple(three.all), Tokenizer("union", {}, 16))
    stored = {name: c.tensors[EMBED] for name, c in three.all.items()}
    twice = union.rerow(EMBED, {n: Doubled(t) for n, t in stored.items()}, "cats", Problems(), [])
    once = rerowed(union, three.all, "cats")
    assert twice is not None
    for model in once:
        assert np.array_equal(matrix(twice[model]), 2 * matrix(once[model]))


def test_biases_of_the_head_are_rerowed_and_other_tensors_left(three: Three) -> None:
    union = build(three.all, "cats", tuple(three.all), Tokenizer("union"))
    norms = {name: c.tensors["model.norm.weight"] for name, c in three.all.items()}
    assert union.rerow("model.norm.weight", norms, "cats", Problems(), []) is None
    biases = {}
    for name, model in three.all.items():
        rows = model.tensors[EMBED].shape[0]
        bits, file = bf16_bits(np.arange(rows, dtype=float)), model.folder / "bias"
        file.write_bytes(bits.tobytes())
        biases[name] = Tensor("lm_head.bias", "BF16", (rows,), file, 0)
    found = union.rerow("lm_head.bias", biases, "cats", Problems(), [])
    assert found is not None
    assert found["sums"].shape == (union.size,)
    got = matrix(found["sums"])
    assert got[union.tokens["zyzzyva"]] == three.cells.vocabulary["zyzzyva"]
    assert got[union.tokens["Ġsum"]] == three.sums.vocabulary["Ġsum"]


def test_each_models_words_are_encoded_to_tokens_with_that_models_rows(three: Three) -> None:
    union = build(three.all, "cats", tuple(three.all), Tokenizer("union"))
    rows = {m: matrix(r) for m, r in rerowed(union, three.all, "cats").items()}
    fast = fast_of(union)
    for model, words in {"cells": "protein<|im_start|>zyzzyva", "sums": "<s>integral"}.items():
        tokens = three.all[model].vocabulary
        encoded = fast.encode(words)
        assert fast.decode(encoded.ids, skip_special_tokens=False) == words
        assert (
            encoded.tokens
            == Fast.from_file(str(three.all[model].folder / "tokenizer.json")).encode(words).tokens
        )
        for token, i in zip(encoded.tokens, encoded.ids, strict=True):
            stored = matrix(three.all[model].tensors[EMBED])[tokens[token]]
            assert np.array_equal(rows[model][i], stored)


# Config, files and what is refused


def test_config_gets_the_vocabulary_size_and_ids_follow_their_tokens(three: Three) -> None:
    cells = build(three.all, "cats", tuple(three.all), Tokenizer("cells"))
    config = cells.config({**three.cats.config, "pad_token_id": -1, "sep_token_id": None})
    assert (config["vocab_size"], config["bos_token_id"], config["eos_token_id"]) == (
        len(three.cells.vocabulary), 1, 2,
    )  # fmt: skip
    assert (config["pad_token_id"], config["sep_token_id"]) == (-1, None)
    sums = build(three.all, "cats", tuple(three.all), Tokenizer("sums"))
    nested = {"text_config": {"vocab_size": 9, "eos_token_id": [0, 1]}}
    assert sums.config(nested) == {"text_config": {"vocab_size": sums.size, "eos_token_id": [0]}}
    assert sums.config({"eos_token_id": 1}) == {"eos_token_id": None}


def test_a_model_that_is_not_merged_may_give_the_tokenizer(
    three: Three, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "sums", {EMBED: np.ones((50, HIDDEN)), "sums.only": np.ones(3)})
    train(SUMS, ["<s>"], ("<|im_start|>",)).save("sums/tokenizer.json")
    Path("r.yaml").write_text(
        "merge_method: task_arithmetic\nbase_model: cats\ntokenizer_source: ./sums\n"
        "models: [{model: cells, parameters: {weight: 1}}]\n"
    )
    recipe = load_recipe(Path("r.yaml"))
    assert recipe.models == ("cells", "cats", "./sums")
    plan = make_plan(recipe, {name: Path(name) for name in recipe.models}, shard_size=10**9)
    assert {t.name: t.models for t in plan.tensors} == dict.fromkeys(
        (EMBED, HEAD, "model.norm.weight"), ("cells",)
    )
    assert plan.vocabulary is not None
    sums = three.sums.vocabulary
    assert list(plan.vocabulary.tokens) == sorted(sums, key=sums.__getitem__)
    assert plan.config["vocab_size"] == len(sums)
    assert list(plan.checkpoints) == list(recipe.models)  # all are hashed for the record


def test_generation_settings_follow_too(three: Three) -> None:
    settings = three.cats.folder / "generation_config.json"
    settings.write_text('{"eos_token_id": [1], "bos_token_id": 0, "top_p": 0.9}')
    cells = build(three.all, "cats", tuple(three.all), Tokenizer("cells"))
    written = json.loads(cells.files["generation_config.json"])
    assert written == {"eos_token_id": [2], "bos_token_id": 1, "top_p": 0.9}


def test_files_of_slow_tokenizers_stay_behind_when_tokens_change(three: Three) -> None:
    for name in ("vocab.json", "added_tokens.json", "special_tokens_map.json"):
        (three.cats.folder / name).write_text("{}")
    decoder = {"1": {"content": "</s>", "special": True}}
    config = three.cats.folder / "tokenizer_config.json"
    config.write_text(json.dumps({"added_tokens_decoder": decoder}))
    union = build(three.all, "cats", tuple(three.all), Tokenizer("union"))
    assert sorted(union.files) == [
        "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    listed = json.loads(union.files["tokenizer_config.json"])["added_tokens_decoder"]
    assert listed[str(union.tokens["zyzzyva"])]["content"] == "zyzzyva"
    assert listed["1"] == decoder["1"]


def test_a_slow_tokenizer_is_refused_with_advice(three: Three) -> None:
    (three.sums.folder / "tokenizer.json").rename(three.sums.folder / "tokenizer.model")
    with pytest.raises(
        UserError, match=r"model sums: tokenizer.model without tokenizer.json: only"
    ):
        build(three.all, "cats", tuple(three.all), Tokenizer("union"))


def test_a_model_without_tokenizer_counts_as_the_base_only_if_it_has_as_many_rows(
    three: Three, tmp_path: Path
) -> None:
    twin = make(tmp_path / "twin", train(CATS, ["<s>", "</s>"]), 9)
    for model in (twin, three.sums):
        (model.folder / "tokenizer.json").unlink()
    both = {"cats": three.cats, "twin": twin}
    union = build(both, "cats", ("cats", "twin"), Tokenizer("union"))
    assert union.warnings == ("twin has no tokenizer: assumed to have the tokens of cats",)
    with pytest.raises(UserError, match=r"model sums: has no tokenizer\.json"):
        build(three.all, "cats", tuple(three.all), Tokenizer("union"))


@pytest.mark.parametrize(
    "text",
    [
        "[]", '{"model": 3}', '{"model": {"vocab": {"a": "x"}}}', '{"model": {"vocab": [1]}}',
        '{"model": {"vocab": {}}, "added_tokens": [{"id": 1}]}', "{" * 5000,
    ],
)  # fmt: skip
def test_a_broken_tokenizer_is_the_users_to_mend(three: Three, text: str) -> None:
    (three.sums.folder / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="sums"):
        build(three.all, "cats", tuple(three.all), Tokenizer("union"))


# What a recipe may say


def test_the_recipe_gives_source_tokens_and_padding() -> None:
    assert read("a: 1") is None
    assert read("tokenizer_source: union") == Tokenizer("union")
    assert read("tokenizer_source: cells") == read("tokenizer: {source: cells}")
    assert read("tokenizer: {}") == Tokenizer("union")
    assert read("tokenizer_source: org/dogs") == Tokenizer("org/dogs")
    text = """tokenizer:
  source: base
  pad_to_multiple_of: 64
  tokens:
    <a>: {source: cells, force: true}
    <b>: {source: {kind: zero}}
    <c>: {source: {kind: model_token, model: cats, token: <d>}}
    <e>: {source: {kind: model_token, model: cats, token_id: 0}}"""
    at = ["r.yaml:5", "r.yaml:6", "r.yaml:7", "r.yaml:8"]
    assert read(text) == Tokenizer(
        "base",
        {
            "<a>": TokenSource("cells", None, True, at[0]),
            "<b>": TokenSource(None, None, False, at[1]),
            "<c>": TokenSource("cats", "<d>", False, at[2]),
            "<e>": TokenSource("cats", 0, False, at[3]),
        },
        64,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tokenizer_source: cel", "r.yaml:1: 'cel' is no model of this recipe. Did you mean"),
        ("tokenizer_source: dogs", "or ./FOLDER or ORG/NAME of another model"),
        ("tokenizer: {sorce: base}", "tokenizer has no key 'sorce'. Did you mean 'source'?"),
        ("tokenizer: {pad_to_multiple_of: 0}", "must be at least 1"),
        ("tokenizer: {pad_to_multiple_of: 99999999}", "must be at most 65536"),
        ("tokenizer: {tokens: {<a>: {force: true}}}", "the token '<a>' needs a 'source'"),
        ("tokenizer: {tokens: {<a>: {source: dogs}}}", "'dogs' is no model of this recipe"),
        ("tokenizer: {tokens: {<a>: {source: {kind: zeros}}}}", "Did you mean 'zero'?"),
        ("tokenizer: {tokens: {'': {source: cats}}}", "a token cannot be empty"),
        (
            "tokenizer: {tokens: {<a>: {source: {kind: model_token, model: cats}}}}",
            "needs either a 'token' or a 'token_id'",
        ),
        ("tokenizer: {source: base}\ntokenizer_source: base", "r.yaml:2: 'tokenizer_source' and"),
    ],
)
def test_mistakes_are_told_with_their_line(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        read(text)
    assert message in str(error.value)


# Chat templates


def template(text: str) -> str | None:
    reader = Reader(Path("r.yaml"))
    found = read_chat_template(reader, parse(text, reader.path))
    reader.problems.raise_if_any()
    return found


def test_a_chat_template_is_auto_a_name_or_jinja() -> None:
    assert template("a: 1") is None
    assert template("chat_template: auto") == "auto"
    assert template("chat_template: chatml") == "chatml"
    jinja = "{% for m in messages %}{{ m }}{% endfor %}"
    assert template(f'chat_template: "{jinja}"') == jinja
    assert chosen_template(jinja, ()) == jinja
    with pytest.raises(UserError, match=r"no chat template 'chatlm'\. Did you mean 'chatml'"):
        template("chat_template: chatlm")


def test_auto_takes_the_most_frequent_template(three: Three) -> None:
    assert chosen_template("auto", three.all.values()) is None
    (three.cats.folder / "chat_template.jinja").write_text("one {{ messages }}\n")
    named = [{"name": "tool", "template": "x"}, {"name": "default", "template": "two"}]
    for model in (three.cells, three.sums):
        facts = json.dumps({"chat_template": named})
        (model.folder / "tokenizer_config.json").write_text(facts)
    assert chosen_template("auto", three.all.values()) == "two"
    assert chosen_template("auto", [three.cats, three.cells]) == "one {{ messages }}"


def test_the_template_is_written_for_new_and_old_loaders(three: Three) -> None:
    union = build(three.all, "cats", tuple(three.all), Tokenizer("union"))
    files = with_template({**union.files, "chat_template.json": b"{}"}, TEMPLATES["chatml"])
    assert files["chat_template.jinja"].decode() == TEMPLATES["chatml"]
    facts = json.loads(files["tokenizer_config.json"])
    assert facts["chat_template"] == TEMPLATES["chatml"]
    assert facts["bos_token"] == "<s>"
    assert "chat_template.json" not in files


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("chatml", "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
         "<|im_start|>assistant\nA<|im_end|>\n<|im_start|>assistant\n"),
        ("alpaca", "S\n\n### Instruction:\nU\n\n### Response:\nA\n\n### Response:\n"),
        ("llama3", "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
         "<|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|>"
         "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>"
         "<|start_header_id|>assistant<|end_header_id|>\n\n"),
        ("mistral", "<s> [INST] S\n\nU [/INST] A</s>"),
        ("exaone", "[|system|]S[|endofturn|]\n[|user|]U\n[|assistant|]A[|endofturn|]\n"
         "[|assistant|]"),
    ],
)  # fmt: skip
def test_named_templates_write_their_formats_prompt(name: str, prompt: str) -> None:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    said = [("system", "S"), ("user", "U"), ("assistant", "A")]
    messages = [{"role": role, "content": content} for role, content in said]
    text = environment.from_string(TEMPLATES[name]).render(
        messages=messages, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
    )
    assert text == prompt
