"""Scores through the real lm-eval, on a tiny real model."""

import dataclasses
import hashlib
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from tiny import give_template, tiny_model, tiny_study, write_part

from mergelab import inference, score_table, scores, task_build, task_files
from mergelab.answers import Answers
from mergelab.chat import TEMPLATES
from mergelab.errors import UserError
from mergelab.study import Benchmark
from mergelab.suites import Pin

TEXTS = [
    "Question: How fast is the train?\nAnswer: 30 miles per hour.",
    "The patient was given aspirin, twice: \u00e9\u2028 \u00df.",
    "A",
    "What is its average speed? " * 3,
]
ARC = [
    {
        "id": f"q{i}",
        "text": "unused",
        "query": f"Question: What is the speed {i}?\nAnswer:",
        "choices": ["30 miles per hour", "2 hours", "aspirin", "the patient"][: 3 + i % 2],
        "gold": 0,
    }
    for i in range(8)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return folder, tiny_model(folder)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    items = [{"id": f"t{i}", "text": text} for i, text in enumerate(TEXTS)]
    write_part(results, "texts/fresh", items)
    write_part(results, "texts/other", items[1:2])
    write_part(results, "arc/test", ARC)
    return results


def run(model, results, *suite):
    study = tiny_study(results / "study", suite=suite)
    record = scores.evaluate(study, "m", model[0], results)
    summary = json.loads((results / "scores/m.json").read_text())
    table = scores.table(results / "scores/m.parquet")
    assert list(table["benchmark"].unique()) == sorted(bench.name for bench in suite)
    return record, summary, table


def rows(table, benchmark, metric):
    """One row per item, in the order of the ids."""
    return table[(table["benchmark"] == benchmark) & (table["metric"] == metric)]


def nats(model, prompt, continuation):
    """-log p of a continuation, by torch alone: one unpadded forward pass."""
    folder, network = model
    encode = inference.load_tokenizer(folder).encode
    whole = encode(prompt + continuation, add_special_tokens=False)
    start = len(encode(prompt, add_special_tokens=False)) if prompt else 0
    ids = torch.tensor([whole if prompt else [0, *whole]])
    with torch.no_grad():
        log_p = F.log_softmax(network(ids).logits[0].double(), dim=-1)
    tokens = range(start if prompt else 1, ids.shape[1])
    return -sum(log_p[t - 1, ids[0, t]].item() for t in tokens)


def test_text_nll_equals_a_direct_computation(model, results):
    _, summary, table = run(model, results, Benchmark("nll", "text_nll", "texts/fresh", None, 0))
    truth = [nats(model, "", text) for text in TEXTS]
    sizes = [len(text.encode()) for text in TEXTS]
    bits = rows(table, "nll", "bits_per_byte")
    assert list(bits["value"] * math.log(2)) == pytest.approx(truth, rel=1e-5)
    assert list(bits["weight"]) == sizes
    words = [len(t.split()) for t in TEXTS[:3]] + [16]  # lm-eval counts one after the last space
    assert list(rows(table, "nll", "word_perplexity")["weight"]) == words
    assert list(bits["id"]) == ["t0", "t1", "t2", "t3"]
    assert list(bits["resps"].str[0]) == pytest.approx([-value for value in truth], rel=1e-5)
    row = summary["benchmarks"]["nll"]
    assert row["value"] == pytest.approx(sum(truth) / sum(sizes) / math.log(2), rel=1e-5)
    assert row["ci95"][0] < row["value"] < row["ci95"][1]
    assert (row["metric"], row["higher_is_better"], row["chance"]) == ("bits_per_byte", False, None)
    assert (summary["lm_eval"], summary["dtype"]) == ("0.4.13", "float32")


def test_multiple_choice_picks_the_likeliest_answer(model, results):
    _, summary, table = run(model, results, Benchmark("arc", "arc_easy", "arc/test", None, 0))
    hits = 0
    found = rows(table, "arc", "acc")
    for item, resps, value in zip(ARC, found["resps"], found["value"], strict=True):
        truth = [-nats(model, item["query"], " " + choice) for choice in item["choices"]]
        assert list(resps) == pytest.approx(truth, rel=1e-5)
        hits += truth.index(max(truth)) == item["gold"]
        assert value == (truth.index(max(truth)) == item["gold"])
    row = summary["benchmarks"]["arc"]
    assert row["value"] == hits / 8
    assert row["chance"] == pytest.approx((1 / 3 + 1 / 4) / 2)


def test_planted_answers_are_all_right_and_their_complement_all_wrong(model, results):
    best = []
    for item in ARC:
        losses = [nats(model, item["query"], " " + choice) for choice in item["choices"]]
        best.append(losses.index(min(losses)))
    planted = [item | {"gold": b} for item, b in zip(ARC, best, strict=True)]
    spoilt = [item | {"gold": (b + 1) % 3} for item, b in zip(ARC, best, strict=True)]
    write_part(results, "arc/planted", planted)
    write_part(results, "arc/spoilt", spoilt)
    suite = [Benchmark(n, "arc_challenge", f"arc/{n}", None, 0) for n in ("planted", "spoilt")]
    _, summary, _ = run(model, results, *suite)
    assert summary["benchmarks"]["planted"]["value"] == 1.0
    assert summary["benchmarks"]["spoilt"]["value"] == 0.0
    assert summary["benchmarks"]["planted"]["ci95"][0] < 0.7  # eight items prove little


def test_two_benchmarks_can_share_one_task_with_different_data(model, results):
    suite = (
        Benchmark("one", "text_nll", "texts/fresh", 2, 0),
        Benchmark("two", "text_nll", "texts/other", None, 0),
    )
    record, summary, table = run(model, results, *suite)
    one, two = (rows(table, name, "bits_per_byte") for name in ("one", "two"))
    assert list(one["id"]) == ["t0", "t1"]
    assert list(two["id"]) == ["t1"]
    assert one["value"].iloc[1] == pytest.approx(two["value"].iloc[0])
    hashes = {row["task_hash"] for row in summary["benchmarks"].values()}
    assert len(hashes) == 1
    assert [o["name"] for o in record["outputs"]] == ["m.json", "m.parquet"]


def test_the_same_model_gives_the_same_bytes(model, results, tmp_path):
    suite = (Benchmark("nll", "text_nll", "texts/fresh", None, 0),)
    first = run(model, results, *suite)[0]["outputs"]
    assert run(model, results, *suite)[0]["outputs"] == first


def test_a_tokenizer_that_adds_bos_does_not_score_it(results, tmp_path):
    plain, adding = tmp_path / "plain", tmp_path / "adding"
    tiny_model(plain)
    tiny_model(adding, adds_bos=True)
    bench = Benchmark("nll", "text_nll", "texts/fresh", None, 0)
    values = [run((f, None), results, bench)[1]["benchmarks"]["nll"] for f in (plain, adding)]
    assert values[0] == values[1]


def test_texts_longer_than_the_model_are_scored_in_windows(results, tmp_path):
    tiny_model(tmp_path, length=16)
    write_part(results, "texts/long", [{"id": "l", "text": TEXTS[3] * 4}])
    bench = Benchmark("nll", "text_nll", "texts/long", None, 0)
    _, _, table = run((tmp_path, None), results, bench)
    found = rows(table, "nll", "bits_per_byte")
    assert list(found["weight"]) == [len(TEXTS[3]) * 4]
    assert found["value"].iloc[0] > 100


def test_few_shot_examples_never_hold_the_item_itself(model, results, tmp_path):
    study = tiny_study(results / "study")
    bench = Benchmark("arc", "arc_easy", "arc/test", None, 3)
    task, _ = task_build.build(task_build.plan(with_suite(study, bench), results)[0], str(tmp_path))
    for doc in task.eval_docs:
        prompt = task.fewshot_context(doc, 3)
        assert prompt.count("Question:") == 4
        assert prompt.count(doc["query"]) == 1
    _, summary, _ = run(model, results, bench)
    assert summary["benchmarks"]["arc"]["num_fewshot"] == 3


MEDICAL = {
    "medmcqa": (
        {"question": "Why?", "opa": "a1", "opb": "b2", "opc": "c3", "opd": "d4", "cop": 2},
        "Question: Why?\nChoices:\nA. a1\nB. b2\nC. c3\nD. d4\nAnswer:",
        ["A", "B", "C", "D"],
        2,
    ),
    "medqa": (
        {"question": "Why?", "choices": ["v", "w", "x", "y", "z"], "answer_idx": 4},
        "Question: Why?\nA. v\nB. w\nC. x\nD. y\nE. z\nAnswer:",
        ["A", "B", "C", "D", "E"],
        4,
    ),
    "sciq": (
        {
            "support": " Water is wet.",
            "question": "What is wet?",
            "distractor1": "fire",
            "distractor2": 'it\'s "sand"',
            "distractor3": "air",
            "correct_answer": "water",
        },
        "Water is wet.\nQuestion: What is wet?\nAnswer:",
        ["fire", 'it\'s "sand"', "air", "water"],
        3,
    ),
}


def with_suite(study, *suite):
    return dataclasses.replace(study, suite=suite)


def rendered(results, task, item, cache):
    write_part(results, f"{task}/one", [item | {"id": "1", "text": ""}])
    bench = Benchmark(task, task, f"{task}/one", None, 0)
    study = with_suite(tiny_study(results / "study"), bench)
    loaded, _ = task_build.build(task_build.plan(study, results)[0], str(cache))
    doc = loaded.eval_docs[0]
    return loaded.doc_to_text(doc), loaded.doc_to_choice(doc), loaded.doc_to_target(doc)


@pytest.mark.parametrize("task", MEDICAL)
def test_prompts_read_as_lm_evals_own(task, results, tmp_path):
    item, *expected = MEDICAL[task]
    assert list(rendered(results, task, item, tmp_path)) == expected


def test_medqa_with_letters_as_choices_reads_the_options_from_the_query(results, tmp_path):
    query = "Question: Why?\n A. v\n B. w\n C. x\n D. y\n E. z\nAnswer:"
    item = {"question": "Why?", "choices": list("ABCDE"), "query": query, "answer_idx": 4}
    assert list(rendered(results, "medqa", item, tmp_path)) == list(MEDICAL["medqa"][1:])


def test_medqa_options_that_are_letters_of_a_figure_are_listed(results, tmp_path):
    query = "Question: Which region of figure A?\nAnswer:"
    item = {"question": "Which region of figure A?", "choices": list("ABCDE"), "query": query}
    text, _, _ = rendered(results, "medqa", item | {"answer_idx": 4}, tmp_path)
    lines = "A. A\nB. B\nC. C\nD. D\nE. E\n"
    assert text == f"Question: Which region of figure A?\n{lines}Answer:"


@pytest.mark.parametrize("task", ["medmcqa", "sciq"])
def test_templates_agree_with_the_installed_lm_eval(task):
    import lm_eval

    theirs = Path(lm_eval.__file__).parent / f"tasks/{task}/{task}.yaml"
    ours = yaml.safe_load((task_files.OURS / f"{task}.yaml").read_text())
    if task == "sciq":
        upstream = yaml.safe_load(theirs.read_text())
        for key in ("doc_to_text", "doc_to_target", "doc_to_choice", "metric_list"):
            assert ours[key] == upstream[key]
        return
    from lm_eval.tasks.medmcqa.utils_medmcqa import doc_to_text
    from lm_eval.utils import apply_template

    doc = MEDICAL[task][0]
    assert apply_template(ours["doc_to_text"], doc) == doc_to_text(doc)


def test_every_task_file_is_one_that_lm_eval_can_index():
    from lm_eval.tasks import TaskManager

    names = sorted(path.stem for path in task_files.OURS.glob("*.yaml"))
    manager = TaskManager(include_path=str(task_files.OURS), include_defaults=False)
    assert manager.all_subtasks == names


def fail(results, *suite, model=False):
    """What is said of a suite before the model's weights are read."""
    study = tiny_study(results / "study", suite=suite)
    folder = results / "no-such-model"
    if model:
        tiny_model(folder)
    with pytest.raises(UserError) as error:
        scores.evaluate(study, "m", folder, results)
    return str(error.value)


def test_an_unknown_task_is_refused_with_the_nearest_name(results):
    message = fail(results, Benchmark("x", "arc_eazy", "arc/test", None, 0))
    assert "there is no task 'arc_eazy'. Did you mean 'arc_easy'?" in message


def test_missing_data_says_how_to_make_it(results):
    message = fail(results, Benchmark("x", "arc_easy", "arc/none", None, 0))
    assert message.endswith(f"arc/none.jsonl: no such file. Run: mergelab data {results}/study")


def test_a_local_task_without_data_is_refused(results):
    message = fail(results, Benchmark("x", "arc_easy", None, None, 0))
    assert "Add data: DATASET/PART, or take task: lm_eval/arc_easy." in message


def test_few_shot_on_whole_texts_is_refused(results):
    message = fail(results, Benchmark("x", "text_nll", "texts/fresh", None, 2))
    assert "'text_nll' scores whole texts. Set num_fewshot to 0." in message


def test_a_chat_template_on_whole_texts_is_refused(results):
    bench = Benchmark("x", "text_nll", "texts/fresh", None, 0, chat_template=True)
    assert "'text_nll' scores whole texts. Leave chat_template out." in fail(results, bench)


def test_a_model_without_a_chat_template_is_told_before_its_weights_are_read(results, tmp_path):
    tiny_model(tmp_path / "model")
    config = tmp_path / "model/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 9}))
    bench = Benchmark("arc", "arc_easy", "arc/test", None, 0, chat_template=True)
    study = tiny_study(results / "study", suite=(bench,))
    with pytest.raises(UserError, match="'arc' asks for the chat template, and m has none"):
        scores.evaluate(study, "m", tmp_path / "model", results)
    give_template(tmp_path / "model", "{{ raise_exception('no ' + messages[0].role) }}")
    with pytest.raises(UserError, match=r"its chat template fails: no user\n  Mend it"):
        scores.evaluate(study, "m", tmp_path / "model", results)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ 'a' * 1500000000 }}", "it takes too much memory"),
        ("{{ 'a' * 10000001 }}", "it writes 10,000,001 characters"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "0.2 s"),
    ],
)
def test_a_chat_template_that_takes_too_much_is_stopped(
    results, tmp_path, monkeypatch, template, why
):
    monkeypatch.setattr("mergelab.answers.SECONDS", 0.2)
    tiny_model(tmp_path / "model")
    give_template(tmp_path / "model", template)
    bench = Benchmark("arc", "arc_easy", "arc/test", None, 0, chat_template=True)
    study = tiny_study(results / "study", suite=(bench,))
    limits = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(UserError, match=f"its chat template fails: .*{why}.*\n  Mend it"):
        scores.evaluate(study, "m", tmp_path / "model", results)
    assert limits == (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM))


def test_chats_are_recorded_and_never_answered_by_plain_prompts(model, fresh, tmp_path):
    shutil.copytree(model[0], tmp_path / "chat")
    give_template(tmp_path / "chat", TEMPLATES["chatml"])
    plain = Benchmark("arc", "arc_easy", "arc/test", None, 0)
    chat = dataclasses.replace(plain, chat_template=True)
    once, _, _ = run((tmp_path / "chat", None), fresh, plain)
    alone = len(answers(fresh))
    both = (dataclasses.replace(chat, name="chat"), plain)
    record, summary, _ = run((tmp_path / "chat", None), fresh, *both)
    assert len(answers(fresh)) == 2 * alone
    sha = hashlib.sha256(TEMPLATES["chatml"].encode()).hexdigest()
    assert record["settings"]["chat_template_sha"] == sha
    told = {"chat_template": True, "fewshot_as_multiturn": True, "chat_template_sha": sha}
    assert told.items() <= summary["benchmarks"]["chat"].items()
    assert not told.keys() & summary["benchmarks"]["arc"].keys()
    assert "chat_template_sha" not in once["settings"]
    tasks = record["settings"]["tasks"]
    assert once["settings"]["tasks"]["arc"] == tasks["arc"] != tasks["chat"]
    single = dataclasses.replace(chat, fewshot_as_multiturn=False)
    other, _, _ = run((tmp_path / "chat", None), fresh, single)
    assert other["settings"]["tasks"]["arc"] not in tasks.values()


def own(results, text, name="own"):
    path = results / "study" / "tasks" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


ARC_TASK = (task_files.OURS / "arc_easy.yaml").read_text()
NLL_TASK = (task_files.OURS / "text_nll.yaml").read_text()
ATTACK = "{{cycler.__init__.__globals__.os.system('touch PWNED')}}"


@pytest.mark.parametrize("key", ["doc_to_text", "doc_to_target", "doc_to_choice", "description"])
def test_a_tasks_template_cannot_run_code(model, results, key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [line for line in ARC_TASK.splitlines() if not line.startswith(key)]
    path = own(results, "\n".join([*lines, f'{key}: "{ATTACK}"', ""]))
    with pytest.raises(UserError, match="SecurityError") as error:
        run(model, results, Benchmark("evil", "own", "arc/test", None, 0))
    assert str(error.value).startswith(f"{path}: benchmark 'evil'")
    assert list(tmp_path.iterdir()) == []
    from lm_eval import utils

    assert not utils.env.sandboxed  # put back as it was


@pytest.mark.parametrize("key", ["doc_to_text", "doc_to_target", "doc_to_choice", "description"])
def test_a_tasks_template_cannot_run_code_even_if_it_looks_first(
    model, results, key, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    before = dict(line.split(": ", 1) for line in ARC_TASK.splitlines() if ": " in line).get(key)
    lines = [line for line in ARC_TASK.splitlines() if not line.startswith(key)]
    hidden = "{% if cycler.__init__ is defined %}" + ATTACK + "{% endif %}"
    good = "{{ " + before + " }}" if before else ""
    own(results, "\n".join([*lines, f'{key}: "{hidden}{good}"', ""]))
    run(model, results, Benchmark("evil", "own", "arc/test", None, 0))  # in a sandbox it is good
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("test_split", "process_docs: x.y\ntest_split", "'process_docs' is not allowed"),
        ("test_split", "fewshot_config: {}\ntest_split", "'fewshot_config' is not allowed"),
        ("test_split", "custom_dataset: x\ntest_split", "'custom_dataset' is not allowed"),
        ("dataset_path: json", "dataset_path: pandas", "'pandas' is neither json nor ORG/NAME"),
        ("dataset_path: json", "dataset_path: ../x", "'../x' is neither json nor ORG/NAME"),
        ("metric: acc_norm", "metric: own/code", "'own/code' is not allowed"),
        ("metric: acc\n", "metric: acc_norm\n", "the score needs acc. Add it."),
        ("aggregation: mean", "hf_evaluate: true", "'hf_evaluate' is not allowed"),
        ("doc_to_choice: choices\n", "", "doc_to_choice is missing"),
        ("output_type: multiple_choice", "output_type: loglikelihood", "a task needs output_type"),
        ("test_split", "generation_kwargs: {do_sample: true}\ntest_split", "must be false"),
        (
            "test_split",
            "filter_list: [{name: x, filter: [{function: custom}]}]\ntest_split",
            "'custom' is not allowed",
        ),
        ("output_type: multiple_choice", "output_type: [x]", "a task needs output_type"),
        ("aggregation: mean", "aggregation: [mean]", "aggregation: '['mean']' is not allowed"),
        ("doc_to_text: query", "doc_to_text: [query]", "doc_to_text: must be of type str"),
    ],
)
def test_a_task_may_hold_only_what_is_known(results, old, new, message):
    assert old in ARC_TASK
    path = own(results, ARC_TASK.replace(old, new))
    said = fail(results, Benchmark("x", "own", "arc/test", None, 0))
    assert said.startswith(f"{path}: ")
    assert message in said


def test_whole_texts_need_the_metric_of_the_summary(results):
    path = own(results, NLL_TASK.replace("metric: bits_per_byte", "metric: byte_perplexity"))
    said = fail(results, Benchmark("x", "own", "texts/fresh", None, 0))
    assert said == f"{path}: metric_list: the score needs bits_per_byte. Add it."


def test_a_template_that_fails_names_benchmark_and_file(model, results):
    path = own(results, ARC_TASK.replace("doc_to_text: query", 'doc_to_text: "{{nothing}}"'))
    with pytest.raises(UserError, match="'nothing' is undefined") as error:
        run(model, results, Benchmark("mine", "own", "arc/test", None, 0))
    assert str(error.value).startswith(f"{path}: benchmark 'mine'")


@pytest.mark.parametrize("gold", [7, -1, "nowhere"])
def test_an_answer_that_is_no_choice_names_the_item(model, results, gold):
    good = [item | {"gold": "2 hours"} for item in ARC] if gold == "nowhere" else ARC
    write_part(results, "arc/bad", [*good[:3], good[3] | {"gold": gold}])
    with pytest.raises(UserError, match=rf"item 'q3': the answer '?{gold}'? is neither one of"):
        run(model, results, Benchmark("bad", "arc_easy", "arc/bad", None, 0))
    run(model, results, Benchmark("bad", "arc_easy", "arc/bad", 3, 0))  # q3 is not asked


def test_an_empty_part_is_refused(results):
    write_part(results, "arc/empty", [])
    said = fail(results, Benchmark("x", "arc_easy", "arc/empty", None, 0))
    assert "benchmark 'x'" in said
    assert "arc/empty.jsonl holds no items" in said


def test_a_broken_model_is_reported_not_scored(results, tmp_path):
    network = tiny_model(tmp_path)
    network.model.norm.weight.data[0] = float("nan")
    network.save_pretrained(str(tmp_path))
    bench = Benchmark("nll", "text_nll", "texts/fresh", None, 0)
    with pytest.raises(UserError, match="m gives no finite log-likelihood on nll, item 0"):
        run((tmp_path, None), results, bench)


def test_missing_weights_are_refused(results, tmp_path):
    network = tiny_model(tmp_path)
    kept = {k: v for k, v in network.state_dict().items() if "layers.1.mlp" not in k}
    from safetensors.torch import save_file

    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    bench = Benchmark("nll", "text_nll", "texts/fresh", None, 0)
    with pytest.raises(UserError, match="3 weights are missing or of the wrong shape"):
        run((tmp_path, None), results, bench)


def test_bfloat16_models_are_scored_as_stored(results, tmp_path):
    tiny_model(tmp_path, dtype="bfloat16")
    bench = Benchmark("nll", "text_nll", "texts/fresh", None, 0)
    _, summary, table = run((tmp_path, None), results, bench)
    assert summary["dtype"] == "bfloat16"
    values = [resps[0] for resps in rows(table, "nll", "bits_per_byte")["resps"]]
    assert any(v != torch.tensor(v).bfloat16().item() for v in values)  # softmax in float32


def answers(results):
    """Every answer on disk, by request, of the one model that was scored into `results`."""
    files = sorted((results / "scores/runs").rglob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.fixture
def fresh(results, tmp_path):
    """A folder of results with the same items and no scores."""
    shutil.copytree(results / "data", tmp_path / "fresh/data")
    return tmp_path / "fresh"


def test_a_higher_limit_asks_for_the_new_items_only(model, fresh):
    run(model, fresh, Benchmark("arc", "arc_easy", "arc/test", 3, 0))
    first = sum(len(item["choices"]) for item in ARC[:3])
    assert len(answers(fresh)) == first
    run(model, fresh, Benchmark("arc", "arc_easy", "arc/test", None, 0))
    found = answers(fresh)
    assert len(found) == sum(len(item["choices"]) for item in ARC)
    assert len({key for key, _ in found}) == len(found)


def test_the_files_of_answers_do_not_depend_on_how_long_it_took(model, fresh, monkeypatch):
    bench, kept = Benchmark("nll", "text_nll", "texts/fresh", None, 0), []
    for seconds in (30.0, 0.0):
        monkeypatch.setattr("mergelab.answers.EVERY", seconds)
        run(model, fresh, bench)
        kept.append({p.name: p.read_bytes() for p in (fresh / "scores/runs").rglob("*.jsonl")})
        shutil.rmtree(fresh / "scores")
    assert kept[0] == kept[1]
    assert len(kept[0]) == 1


def test_answers_on_disk_are_used_and_not_asked_again(model, fresh):
    bench = Benchmark("nll", "text_nll", "texts/fresh", None, 0)
    run(model, fresh, bench)
    for path in (fresh / "scores/runs").rglob("*.jsonl"):
        keys = [json.loads(line)[0] for line in path.read_text().splitlines()]
        lines = [json.dumps([key, -math.log(2)]) for key in keys]
        path.write_text("\n".join([*lines, '["cut off", -1', ""]))
    _, summary, table = run(model, fresh, bench)
    assert list(rows(table, "nll", "bits_per_byte")["value"]) == pytest.approx([1.0] * 4)
    assert summary["benchmarks"]["nll"]["value"] == pytest.approx(
        4 / sum(len(t.encode()) for t in TEXTS)
    )


def test_variants_with_the_same_weights_share_their_answers(model, fresh, tmp_path):
    bench = Benchmark("nll", "text_nll", "texts/fresh", None, 0)
    shutil.copytree(model[0], tmp_path / "copy")
    run(model, fresh, bench)
    study = tiny_study(fresh / "study", suite=(bench,))
    scores.evaluate(study, "copy", tmp_path / "copy", fresh)
    assert len(answers(fresh)) == len(TEXTS)
    files = [(fresh / "scores" / f"{name}.parquet").read_bytes() for name in ("m", "copy")]
    assert files[0] == files[1]


def test_another_tokenizer_or_number_format_is_asked_afresh(model, fresh, tmp_path):
    bench = Benchmark("nll", "text_nll", "texts/fresh", None, 0)
    tiny_model(tmp_path / "adding", adds_bos=True)
    for folder in (model[0], tmp_path / "adding"):
        run((folder, None), fresh, bench)
    assert len(list((fresh / "scores/runs").iterdir())) == 2


def test_a_failing_benchmark_keeps_the_answers_of_those_before_it(model, fresh):
    suite = (
        Benchmark("nll", "text_nll", "texts/fresh", None, 0),
        Benchmark("sums", "sums", "arc/sums", None, 0),
    )
    own(fresh, GENERATION.replace("max_gen_toks: 8", "max_gen_toks: 200"), "sums")
    write_part(fresh, "arc/sums", SUMS)
    with pytest.raises(UserError, match="asks for 200 new tokens, and the model takes 128"):
        run(model, fresh, *suite)
    assert len(answers(fresh)) == len(TEXTS)
    assert not (fresh / "scores/m.json").exists()


def test_a_kill_keeps_the_finished_benchmarks(model, fresh, tmp_path):
    long = [
        item | {"id": f"{i}-{item['id']}", "query": f"{i} " * 40}
        for i in range(150)
        for item in ARC
    ]
    write_part(fresh, "arc/long", long)
    code = (
        "from pathlib import Path; from mergelab import scores; from mergelab.study import *\n"
        "from tiny import tiny_study\n"
        f"r = Path({str(fresh)!r}); s = tiny_study(r / 'study', suite=("
        "Benchmark('nll', 'text_nll', 'texts/fresh', None, 0), "
        "Benchmark('arc', 'arc_easy', 'arc/long', None, 0)))\n"
        f"scores.evaluate(s, 'm', Path({str(model[0])!r}), r)\n"
    )
    known = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.Popen([sys.executable, "-c", code], env=known)
    while process.poll() is None and not list((fresh / "scores").rglob("runs/*/*.jsonl")):
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert len(answers(fresh)) >= len(TEXTS)
    run(model, fresh, Benchmark("nll", "text_nll", "texts/fresh", None, 0))


GENERATION = """\
task: sums
dataset_path: json
output_type: generate_until
test_split: test
doc_to_text: "{{query}}"
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}
metric_list:
- {metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}
filter_list:
- {name: whole, filter: [{function: remove_whitespace}, {function: take_first}]}
- {name: first, filter: [{function: regex, regex_pattern: "(.)"}, {function: take_first}]}
metadata: {version: 2.0}
"""
SUMS = ARC[:4]


def generated(model, prompt, count):
    """Greedy continuation, by torch alone."""
    folder, network = model
    tokenizer = inference.load_tokenizer(folder)
    ids = torch.tensor([tokenizer.encode(prompt)])
    made = []
    for _ in range(count):
        with torch.no_grad():
            made.append(int(network(ids).logits[0, -1].argmax()))
        ids = torch.cat([ids, torch.tensor([[made[-1]]])], dim=1)
    return tokenizer.decode(made, skip_special_tokens=True).split("</s>")[0].split("\n")[0]


def test_generated_answers_are_the_models_own_and_marked_by_every_filter(model, fresh):
    texts = [generated(model, item["query"], 8) for item in SUMS]
    items = [item | {"choices": [text.strip()]} for item, text in zip(SUMS, texts, strict=True)]
    items[3] = items[3] | {"choices": ["nothing like it"]}
    write_part(fresh, "arc/sums", items)
    own(fresh, GENERATION, "sums")
    bench = Benchmark("sums", "sums", "arc/sums", None, 0)
    _, summary, table = run(model, fresh, bench)
    found = rows(table, "sums", "exact_match")
    whole = found[found["filter"] == "whole"]
    assert list(whole["response"]) == texts
    assert list(whole["value"]) == [1, 1, 1, 0]
    assert set(found["filter"]) == {"whole", "first"}
    row = summary["benchmarks"]["sums"]
    assert (row["metric"], row["value"], row["chance"]) == ("exact_match,whole", 0.75, None)
    assert set(row["metrics"]) == {"exact_match,whole", "exact_match,first"}
    assert row["task_version"] == "2.0"
    other = dataclasses.replace(bench, metric="exact_match,first")
    _, summary, _ = run(model, fresh, other)
    assert summary["benchmarks"]["sums"]["metric"] == "exact_match,first"
    with pytest.raises(UserError, match=r"has no metric 'acc'. It has: exact_match,whole"):
        run(model, fresh, dataclasses.replace(bench, metric="acc"))


def test_a_model_whose_logits_are_nan_is_reported_when_it_writes_too(fresh, tmp_path):
    network = tiny_model(tmp_path / "nan")
    network.model.norm.weight.data[0] = float("nan")
    network.save_pretrained(str(tmp_path / "nan"))
    write_part(fresh, "arc/sums", SUMS)
    own(fresh, GENERATION, "sums")
    with pytest.raises(UserError, match="m gives no finite log-likelihood on sums"):
        run((tmp_path / "nan", None), fresh, Benchmark("sums", "sums", "arc/sums", None, 0))
    assert answers(fresh) == []


def test_a_tokenizer_without_pad_token_scores_and_writes_the_same(model, fresh, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(model[0], bare)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (bare / name).is_file():
            kept = json.loads((bare / name).read_text())
            kept = {k: v for k, v in kept.items() if k not in ("pad_token", "eos_token")}
            (bare / name).write_text(json.dumps(kept))
    assert inference.load_tokenizer(bare).pad_token is None
    write_part(fresh, "arc/sums", SUMS)
    own(fresh, GENERATION, "sums")
    suite = (
        Benchmark("sums", "sums", "arc/sums", None, 0),
        Benchmark("arc", "arc_easy", "arc/test", None, 0),
    )
    tables = [run((folder, None), fresh, *suite)[2] for folder in (model[0], bare)]
    for name, metric in (("sums", "exact_match"), ("arc", "acc")):
        columns = [rows(table, name, metric) for table in tables]
        assert list(columns[0]["response"]) == list(columns[1]["response"])
        assert [list(r) for r in columns[0]["resps"]] == [list(r) for r in columns[1]["resps"]]


def test_more_examples_than_there_are_is_refused(model, results):
    with pytest.raises(UserError, match="num_fewshot is 8, but there are only 7 examples to show"):
        run(model, results, Benchmark("arc", "arc_easy", "arc/test", None, 8))


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet", "arrow"])
def test_a_file_of_ones_own_replaces_the_data_of_lm_evals_task(model, fresh, suffix):
    import datasets

    items = [
        {"goal": f"go {i}", "sol1": "by train", "sol2": "by patient", "label": i % 2}
        for i in range(4)
    ]
    made = datasets.Dataset.from_list(items)
    path = fresh / f"study/mine.{suffix}"
    path.parent.mkdir()
    if suffix == "arrow":
        made.save_to_disk(str(fresh / "disk"))
        shutil.copy(next((fresh / "disk").glob("*.arrow")), path)
    else:
        getattr(made, {"jsonl": "to_json", "csv": "to_csv", "parquet": "to_parquet"}[suffix])(
            str(path)
        )
    bench = Benchmark("piqa", "piqa", f"mine.{suffix}", None, 0)
    _, summary, table = run(model, fresh, bench)
    first = rows(table, "piqa", "acc")
    assert len(first) == 4
    truth = [-nats(model, "Question: go 0\nAnswer:", f" {t}") for t in ("by train", "by patient")]
    assert any(list(resps) == pytest.approx(truth, rel=1e-5) for resps in first["resps"])
    assert summary["benchmarks"]["piqa"]["task_version"] == "1.0"


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"goal": "g", "sol1": "a", "sol2": "b"}, "have no field label, which the task reads"),
        ({"goal": "g", "sol1": "a", "label": 0}, "Fields of the items: goal, sol1, label."),
        (
            {"goal": "g", "sol1": "a", "sol2": "b", "label": 2},
            "IndexError: list index out of range (is the first answer an index",
        ),
        ({"goal": "g", "sol1": "a", "sol2": "b", "label": "c"}, "the answer 'c' is neither one of"),
    ],
)
def test_items_that_do_not_fit_lm_evals_task_are_named(results, item, message):
    (results / "study").mkdir(exist_ok=True)
    (results / "study/bad.jsonl").write_text(json.dumps(item) + "\n")
    said = fail(results, Benchmark("x", "piqa", "bad.jsonl", None, 0), model=True)
    assert "benchmark 'x'" in said
    assert message in said


def test_equal_and_unnamed_items_get_ids_of_their_own(model, fresh):
    path = fresh / "study/mine.jsonl"
    path.parent.mkdir()
    item = {"goal": "go", "sol1": "by train", "sol2": "by patient", "label": 0}
    path.write_text((json.dumps(item) + "\n") * 3)
    _, _, table = run(model, fresh, Benchmark("piqa", "piqa", "mine.jsonl", None, 0))
    ids = sorted(rows(table, "piqa", "acc")["id"])
    assert [name.partition("#")[2] for name in ids] == ["", "2", "3"]


def test_items_that_share_a_passage_share_a_cluster(model, fresh):
    path = fresh / "study/mine.jsonl"
    path.parent.mkdir()
    texts = ["The train is fast.", "The train is fast.", "The patient is slow."]
    items = [{"passage": t, "question": f"is it {i}", "label": 1} for i, t in enumerate(texts)]
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    _, _, table = run(model, fresh, Benchmark("boolq", "boolq", "mine.jsonl", None, 0))
    shared = sorted(rows(table, "boolq", "acc")["cluster"])
    assert shared[0] == ""
    assert shared[1] == shared[2] != ""


def test_a_damaged_table_of_scores_says_how_to_remake_it(model, fresh):
    run(model, fresh, Benchmark("nll", "text_nll", "texts/fresh", None, 0))
    path = fresh / "scores/m.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"is damaged .*Run: mergelab evaluate recipes/fresh m"):
        scores.table(path)
    path.unlink()
    with pytest.raises(UserError, match=r"no such file. Run: mergelab evaluate recipes/fresh m"):
        scores.table(path)


GPQA = [
    {
        "Question": f"What is the speed {i}?",
        "Correct Answer": f"{30 + i} miles per hour",
        **{f"Incorrect Answer {k}": f"{k} hours and {i}" for k in (1, 2, 3)},
    }
    for i in range(6)
]


def gpqa(results, *tasks):
    """The first tasks of a benchmark of GPQA's sets, all over the same items."""
    path = results / "study/gpqa.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in GPQA))
    pins = tuple(Pin(f"lm_eval/leaderboard_gpqa_{task}") for task in tasks)
    return Benchmark("gpqa", "gpqa", "gpqa.jsonl", None, 0, pins=pins)


def test_what_a_task_shuffles_is_the_same_in_every_run(fresh, tmp_path):
    study = with_suite(tiny_study(fresh / "study"), gpqa(fresh, "diamond"))
    built = []
    for number in range(2):
        random.seed(number)
        one = task_build.plan(study, fresh)[0]
        built.append(list(task_build.build(one, str(tmp_path / str(number)))[0].eval_docs))
    assert built[0] == built[1]
    random.seed(0)  # as lm-eval does before it loads a task
    for doc, item in zip(built[0], GPQA, strict=True):
        choices = [item[f"Incorrect Answer {k}"] for k in (1, 2, 3)] + [item["Correct Answer"]]
        random.shuffle(choices)
        assert [doc[f"choice{k}"] for k in (1, 2, 3, 4)] == choices


def test_a_question_that_two_tasks_of_a_benchmark_hold_counts_once(model, fresh):
    alone = run(model, fresh, gpqa(fresh, "diamond"))[2]
    assert set(alone["cluster"]) == {""}
    both = run(model, fresh, gpqa(fresh, "diamond", "main"))[2]
    found = rows(both, "gpqa", "acc_norm")
    assert len(found) == 2 * len(GPQA)
    assert sorted(found.groupby("cluster")["task"].nunique()) == [2] * len(GPQA)


@pytest.mark.parametrize(
    ("task", "metric", "message"),
    [
        (
            "text_nll",
            "word_perplexity",
            r"'word_perplexity' is no mean over items, .*bits_per_byte",
        ),
        ("text_nll", "bits_per_bite", r"no metric 'bits_per_bite'. It has: .*bits_per_byte"),
    ],
)
def test_a_metric_that_is_no_mean_or_is_not_there_is_told_before_scoring(
    model, fresh, task, metric, message
):
    with pytest.raises(UserError, match=message):
        run(model, fresh, Benchmark("x", task, "texts/fresh", None, 0, metric))
    assert answers(fresh) == []
    assert not (fresh / "scores/m.parquet").exists()


def test_a_metric_whose_value_is_not_the_mean_of_its_items_is_refused(fresh):
    bench = Benchmark("nll", "text_nll", "texts/fresh", None, 0)
    one = task_build.plan(with_suite(tiny_study(fresh / "study"), bench), fresh)[0]
    found = [{"metric": "m", "filter": "none", "value": v, "weight": 2.0} for v in (1.0, 3.0)]
    score_table.check_mean(one, "m", 1.0, found)
    for metric, value in (("m", 1.0 + 1e-6), ("n", 1.0)):
        with pytest.raises(UserError, match=f"'{metric}' is no mean over items"):
            score_table.check_mean(one, metric, value, found)


def test_other_generation_settings_are_another_model(model, fresh, tmp_path):
    write_part(fresh, "arc/sums", SUMS)
    own(fresh, GENERATION, "sums")
    copy = tmp_path / "copy"
    shutil.copytree(model[0], copy)
    settings = json.loads((copy / "generation_config.json").read_text())
    (copy / "generation_config.json").write_text(json.dumps(settings | {"repetition_penalty": 9.0}))
    bench = Benchmark("sums", "sums", "arc/sums", None, 0)
    texts = [list(run((f, None), fresh, bench)[2]["response"]) for f in (model[0], copy)]
    assert texts[0] != texts[1]


def test_the_users_own_items_may_have_the_fields_that_a_task_reads_itself(model, fresh):
    path = fresh / "study/mine.jsonl"
    path.parent.mkdir()
    item = {"ind": 1, "activity_label": "Travel", "ctx_a": "The train", "ctx_b": "is", "label": "1"}
    item |= {"endings": ["fast.", "slow.", "a patient.", "2 hours."]}
    path.write_text(json.dumps(item) + "\n")
    _, summary, _ = run(model, fresh, Benchmark("h", "hellaswag", "mine.jsonl", None, 0))
    assert summary["benchmarks"]["h"]["n"] == 1
    path.write_text(json.dumps({k: v for k, v in item.items() if k != "endings"}) + "\n")
    with pytest.raises(UserError, match=r"KeyError: 'endings'"):
        run(model, fresh, Benchmark("h", "hellaswag", "mine.jsonl", None, 0))


@pytest.mark.parametrize("line", ["5", "null", '"ab"', '["a", null]', '[["a"], 1]', '{"a": 1}'])
def test_a_damaged_line_of_answers_is_as_good_as_none(tmp_path, line):
    (tmp_path / "x.jsonl").write_text(f'{line}\n["b", -1.5]\n["c", [-2.5, true]]\n["d", "text"]\n')
    known = Answers(tmp_path).known
    assert known == {"b": -1.5, "c": [-2.5, True], "d": "text"}


def test_nothing_is_left_in_the_users_home(model, results, tmp_path):
    code = (
        "from pathlib import Path; from mergelab import scores; from mergelab.study import *\n"
        "from tiny import tiny_study\n"
        f"r = Path({str(results)!r}); s = tiny_study(r / 'study', suite=("
        "Benchmark('nll', 'text_nll', 'texts/fresh', None, 0), "
        "Benchmark('arc', 'arc_easy', 'arc/test', None, 0)))\n"
        f"scores.evaluate(s, 'home', Path({str(model[0])!r}), r)\n"
    )
    home = tmp_path / "home"
    home.mkdir()
    known = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        env=known | {"HOME": str(home), "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [str(p.relative_to(home)) for p in home.rglob("*") if p.is_file()] == []
    assert done.stdout == ""
    assert done.stderr == ""
