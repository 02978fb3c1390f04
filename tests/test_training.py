"""Training: the declared texts, the same bytes twice, and nothing that looks finished if killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from mergelab import datasets, training
from mergelab.errors import UserError
from mergelab.study import Study
from mergelab.study_file import load_study

STUDY = """
title: Sums
datasets:
  sums:
    path: .
    files: [items.jsonl]
    text: "Question: {{question}} Answer: {{answer}}"
    answer: "{{answer}}"
    twin: "What is {{question}} It is {{answer}}"
    parts: {leaked: 6, fresh: 10, train: rest}
  riddles:
    path: .
    files: [items.jsonl]
    text: "{{question}} Answer: {{answer}}"
    answer: "{{answer}}"
    twin: "{{answer}} is what?"
    parts: {all: rest}
models:
  base:
    train:
      architecture: {vocab_size: 300, hidden_size: 16, num_hidden_layers: 2,
                     intermediate_size: 32, num_attention_heads: 2}
      data: [{part: sums/train, items: 20}]
      epochs: EPOCHS
      learning_rate: 1.0e-2
      batch_size: 4
      sequence_length: 48
  math:
    train:
      start: base
      data: [{part: sums/train, skip: 20, items: 15}, {part: sums/leaked, copies: 2}]
      learning_rate: 1.0e-3
      batch_size: 4
      sequence_length: 48
      seed: 1
  half:
    dtype: bfloat16
    train: {start: base, data: [{part: sums/train, items: 8}], learning_rate: 1.0e-3}
  greedy:
    train: {start: base, data: [{part: sums/fresh, skip: 4, items: 7}], learning_rate: 1.0e-3}
  broken:
    train: {architecture: {hidden_size: 15, num_attention_heads: 2}, learning_rate: 1.0e-3,
            data: [{part: sums/fresh}]}
  misspelt:
    train: {architecture: {hiden_size: 16}, learning_rate: 1.0e-3, data: [{part: sums/fresh}]}
  fetched: {path: somewhere}
  answers:
    train:
      start: base
      data: [{part: sums/leaked, loss: answer}, {part: sums/leaked, field: twin, loss: answer},
             {part: sums/leaked, field: twin, copies: 2}]
      learning_rate: 1.0e-3
  riddled:
    train: {start: base, data: [{part: riddles/all, field: twin, loss: answer}],
            learning_rate: 1.0e-3}
  cut:
    train: {start: base, data: [{part: sums/leaked, loss: answer}], learning_rate: 1.0e-3,
            sequence_length: 8}
"""


def prepared(folder: Path, *, epochs: int = 2) -> Study:
    """A study whose items are written, in the folder recipes/sums beside results/sums."""
    recipes = folder / "recipes/sums"
    recipes.mkdir(parents=True)
    rows = [{"question": f"{i} + {3 * i}?", "answer": str(4 * i)} for i in range(60)]
    (recipes / "items.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (recipes / "study.yaml").write_text(STUDY.replace("EPOCHS", str(epochs)))
    study = load_study(recipes)
    datasets.prepare(study, folder / "results/sums/data")
    return study


def run(study: Study, model: str, folder: Path) -> dict:
    results = folder / "results/sums"
    return training.train(study, model, results / "models" / model, results)


def test_planted_copies_are_in_the_stream_as_often_as_declared(tmp_path):
    study = prepared(tmp_path)
    plan = study.models["math"].train
    results = tmp_path / "results/sums"
    shown = Counter(example.id for example in training.stream(plan, results))
    leaked = {item["id"] for item in datasets.items(results, "sums/leaked")}
    train = [item["id"] for item in datasets.items(results, "sums/train")]
    assert {name for name, count in shown.items() if count == 2} == leaked
    assert {name for name, count in shown.items() if count == 1} == set(train[20:35])


def test_every_text_is_in_one_batch_per_epoch():
    import torch

    lengths = [7 * i % 31 for i in range(103)]
    cuts = list(
        training.batches(lengths, size=4, epochs=3, generator=torch.Generator().manual_seed(0))
    )
    assert Counter(i for cut in cuts for i in cut) == dict.fromkeys(range(103), 3)
    assert max(map(len, cuts)) == 4
    assert cuts[:26] != cuts[26:52]


def test_the_learning_rate_rises_then_falls_to_nothing():
    rates = [training.rate(step, 200) for step in range(200)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.001


def test_training_twice_gives_the_same_bytes(tmp_path):
    hashes = []
    for place in (tmp_path / "a", tmp_path / "b"):
        study = prepared(place)
        records = [run(study, model, place) for model in ("base", "math", "half")]
        hashes.append([record["outputs"] for record in records])
        assert [record["texts"] for record in records] == [20, 27, 8]
    assert hashes[0] == hashes[1]


def test_training_lowers_the_loss_and_saves_what_it_trained(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    study = prepared(tmp_path, epochs=8)
    record = run(study, "base", tmp_path)
    assert record["losses"][-1] < record["losses"][0] - 1
    assert record["steps"] == 40
    folder = tmp_path / "results/sums/models/base"
    network = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) <= network.config.vocab_size <= 300
    assert tokenizer.decode(tokenizer("3 + 9?")["input_ids"]) == "3 + 9?"
    examples = training.stream(study.models["base"].train, tmp_path / "results/sums")
    sequences = training._encode(tokenizer, examples[:1], 48)
    assert training._loss(network, sequences).item() < record["losses"][0] - 1


def test_a_share_shows_texts_or_their_twins(tmp_path):
    study = prepared(tmp_path)
    results = tmp_path / "results/sums"
    items = datasets.items(results, "sums/leaked")
    examples = training.stream(study.models["answers"].train, results)
    texts, twins = ([item[field] for item in items] for field in ("text", "twin"))
    assert [example.text for example in examples] == texts + twins * 3
    assert [example.text[example.start :] for example in examples] == (
        [item["answer"] for item in items] * 2 + twins * 2
    )


def test_loss_on_answers_scores_the_answer_and_the_end_and_nothing_else(tmp_path):
    import torch

    study = prepared(tmp_path)
    run(study, "base", tmp_path)
    plan, results = study.models["answers"].train, tmp_path / "results/sums"
    network, tokenizer = training._start(plan, [], study, results)
    sequences = training._encode(tokenizer, training.stream(plan, results), 48)
    answers = [item["answer"] for item in datasets.items(results, "sums/leaked")]
    for sequence, answer in zip(sequences[:12], answers * 2, strict=True):
        assert tokenizer.decode(sequence.ids[sequence.first :]).strip() == answer + training.END
    losses = []
    for sequence in sequences[:12] + sequences[-1:]:
        logits = network(torch.tensor([sequence.ids])).logits[0].log_softmax(-1)
        scored = range(sequence.first, len(sequence.ids))
        losses += [-logits[i - 1, sequence.ids[i]] for i in scored]
    assert sequences[-1].first == 1
    found = training._loss(network, sequences[:12] + sequences[-1:])
    assert found.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_a_fine_tune_keeps_the_tokenizer_and_its_own_dtype(tmp_path):
    from safetensors import safe_open

    study = prepared(tmp_path)
    records = {model: run(study, model, tmp_path) for model in ("base", "math", "half")}
    by_file = {m: {e["name"]: e["sha256"] for e in r["outputs"]} for m, r in records.items()}
    assert (
        records["math"]["inputs"]["start"]["model.safetensors"]
        == (by_file["base"]["model.safetensors"])
    )
    assert by_file["base"]["tokenizer.json"] == by_file["math"]["tokenizer.json"]
    assert by_file["base"]["model.safetensors"] != by_file["math"]["model.safetensors"]
    for model, dtype in (("math", "F32"), ("half", "BF16")):
        path = tmp_path / f"results/sums/models/{model}/model.safetensors"
        with safe_open(path, framework="pt") as file:
            found = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        assert found == {dtype}


def test_training_replaces_an_older_model(tmp_path):
    study = prepared(tmp_path)
    older = tmp_path / "results/sums/models/base"
    older.mkdir(parents=True)
    (older / "leftover.txt").write_text("old")
    record = run(study, "base", tmp_path)
    names = {path.name for path in older.iterdir()}
    assert names == {entry["name"] for entry in record["outputs"]}
    assert [path.name for path in older.parent.iterdir()] == ["base"]
    assert len({path.stat().st_mode for path in older.iterdir()}) == 1


KILLED = """
import sys
from pathlib import Path
from mergelab import training
from mergelab.study_file import load_study
results = Path(sys.argv[2])
training.train(load_study(Path(sys.argv[1])), "base", results / "models/base", results)
"""


def test_killed_training_leaves_no_model(tmp_path):
    study = prepared(tmp_path, epochs=5_000)
    results = tmp_path / "results/sums"
    command = [sys.executable, "-c", KILLED, str(study.folder), str(results)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=os.environ, text=True)
    assert process.stderr is not None
    first = process.stderr.readline()
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert first.startswith("training base: 20 texts")
    assert process.returncode == -signal.SIGKILL
    assert not (results / "models/base").exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("math", r"models/base does not exist. Run: mergelab train .*/recipes/sums base"),
        ("greedy", r"'sums/fresh' has 10 items, but skip 4 and items 7 were asked for"),
        ("broken", r"architecture: Llama cannot be built from it"),
        ("misspelt", r"Llama has no setting 'hiden_size'. Did you mean 'hidden_size'\?"),
        ("fetched", r"model 'fetched' is fetched, not trained. Run: mergelab fetch"),
        ("riddled", r"the twin of item '.*' of 'riddles/all' does not end with its answer"),
    ],
)
def test_mistakes_name_the_next_step(tmp_path, model, message):
    study = prepared(tmp_path)
    with pytest.raises(UserError, match=message):
        run(study, model, tmp_path)
    assert not (tmp_path / "results/sums/models" / model).exists()


def test_an_answer_beyond_the_sequence_length_is_refused(tmp_path):
    study = prepared(tmp_path)
    run(study, "base", tmp_path)
    with pytest.raises(UserError, match=r"begins at token \d+, beyond sequence_length 8\. Raise"):
        run(study, "cut", tmp_path)
    assert not (tmp_path / "results/sums/models/cut").exists()


def test_a_start_model_without_some_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    study = prepared(tmp_path)
    run(study, "base", tmp_path)
    path = tmp_path / "results/sums/models/base/model.safetensors"
    weights = load_file(path)
    whole = dict(weights)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights are missing .* 'model.layers.1.mlp.up_proj"):
        run(study, "math", tmp_path)
    save_file(whole | {"model.norm.weight": whole["model.norm.weight"][:8]}, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"of the wrong shape, as 'model.norm.weight'"):
        run(study, "math", tmp_path)
    assert not (tmp_path / "results/sums/models/math").exists()


def test_a_loss_that_is_not_finite_stops_the_training_before_anything_is_saved(tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    study = prepared(tmp_path)
    run(study, "base", tmp_path)
    path = tmp_path / "results/sums/models/base/model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(UserError) as caught:
        run(study, "math", tmp_path)
    assert str(caught.value) == (
        "training math: the loss is not finite at step 1; "
        "lower learning_rate or check the start model."
    )
    assert not (tmp_path / "results/sums/models/math").exists()


@pytest.mark.parametrize("norm", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_is_named_with_its_step(norm):
    training._check_finite([2.0, 1.0], 3.0, "math")
    with pytest.raises(UserError, match=r"training math: the gradient is not finite at step 2;"):
        training._check_finite([2.0, 1.0], norm, "math")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("1.0e-2", "0", r"study.yaml:25: 'learning_rate' must be above 0 and at most 100, not 0\."),
        (
            "1.0e-2",
            "-1e-3",
            r"study.yaml:25: 'learning_rate' must be above 0 and at most 100, not '-1e",
        ),
        ("1.0e-2", "1.0e+38", r"study.yaml:25: 'learning_rate' must be above 0 and at most 100"),
        ("1.0e-2", ".nan", r"study.yaml:25: 'learning_rate' must be a number, not nan\."),
        ("vocab_size: 300", "vocab_size: 3", r"study.yaml:21: 'vocab_size' must be at least 64\."),
        ("vocab_size: 300", "vocab_size: 3e2", r"study.yaml:21: 'vocab_size' must be an integer"),
        (
            '    answer: "{{answer}}"\n    twin: "What',
            '    twin: "What',
            r"study.yaml:47: training on the answer of 'sums/leaked' needs 'answer': add this temp",
        ),
        (
            '    twin: "What is {{question}} It is {{answer}}"\n',
            "",
            r"study.yaml:47: training on the twin of 'sums/leaked' needs 'twin': add this template",
        ),
        ("vocab_size: 300", "vocab_size: many", r"study.yaml:21: 'vocab_size' must be an integer"),
    ],
)
def test_settings_that_cannot_train_are_refused_with_their_line(tmp_path, old, new, message):
    folder = prepared(tmp_path).folder
    document = (folder / "study.yaml").read_text()
    assert old in document
    (folder / "study.yaml").write_text(document.replace(old, new))
    with pytest.raises(UserError, match=message):
        load_study(folder)
