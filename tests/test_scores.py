"""Scores through the real lm-eval, on a tiny real model."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from tiny import tiny_model, tiny_study, write_part

from mergelab import inference, scores
from mergelab.errors import UserError
from mergelab.study import Benchmark

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
    samples = {
        bench.name: [
            json.loads(line)
            for line in (results / f"scores/m/{bench.name}.jsonl").read_text().split("\n")
            if line
        ]
        for bench in suite
    }
    return record, summary, samples


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
    _, summary, samples = run(model, results, Benchmark("nll", "text_nll", "texts/fresh", None, 0))
    truth = [nats(model, "", text) for text in TEXTS]
    sizes = [len(text.encode()) for text in TEXTS]
    assert [s["metrics"]["nll"] for s in samples["nll"]] == pytest.approx(truth, rel=1e-5)
    assert [s["metrics"]["bytes"] for s in samples["nll"]] == sizes
    assert [s["metrics"]["words"] for s in samples["nll"]] == [
        len(t.split()) for t in TEXTS[:3]
    ] + [
        16  # lm-eval counts the empty word after the last space
    ]
    assert [s["id"] for s in samples["nll"]] == ["t0", "t1", "t2", "t3"]
    row = summary["benchmarks"]["nll"]
    assert row["value"] == pytest.approx(sum(truth) / sum(sizes) / math.log(2), rel=1e-5)
    assert row["ci95"][0] < row["value"] < row["ci95"][1]
    assert (row["metric"], row["higher_is_better"], row["chance"]) == ("bits_per_byte", False, None)
    assert (summary["lm_eval"], summary["dtype"]) == ("0.4.13", "float32")


def test_multiple_choice_picks_the_likeliest_answer(model, results):
    _, summary, samples = run(model, results, Benchmark("arc", "arc_easy", "arc/test", None, 0))
    hits = 0
    for item, sample in zip(ARC, samples["arc"], strict=True):
        truth = [-nats(model, item["query"], " " + choice) for choice in item["choices"]]
        assert sample["resps"] == pytest.approx(truth, rel=1e-5)
        hits += truth.index(max(truth)) == item["gold"]
        assert sample["metrics"]["acc"] == (truth.index(max(truth)) == item["gold"])
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
    record, summary, samples = run(model, results, *suite)
    assert [s["id"] for s in samples["one"]] == ["t0", "t1"]
    assert [s["id"] for s in samples["two"]] == ["t1"]
    assert samples["one"][1]["metrics"]["nll"] == pytest.approx(samples["two"][0]["metrics"]["nll"])
    hashes = {row["task_hash"] for row in summary["benchmarks"].values()}
    assert len(hashes) == 1
    assert [o["name"] for o in record["outputs"]] == ["m.json", "m/one.jsonl", "m/two.jsonl"]


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
    _, _, samples = run((tmp_path, None), results, bench)
    assert samples["nll"][0]["metrics"]["bytes"] == len(TEXTS[3]) * 4
    assert samples["nll"][0]["metrics"]["nll"] > 100


def test_few_shot_examples_never_hold_the_item_itself(model, results):
    study = tiny_study(results / "study")
    bench = Benchmark("arc", "arc_easy", "arc/test", None, 3)
    from lm_eval.tasks import TaskManager

    config = scores.task_config(study, bench, results)
    task = TaskManager(include_defaults=False).load([config])["tasks"]["arc"]
    task.set_fewshot_seed(scores.SEED)
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


def rendered(results, task, item):
    from lm_eval.tasks import TaskManager

    write_part(results, f"{task}/one", [item | {"id": "1", "text": ""}])
    bench = Benchmark(task, task, f"{task}/one", None, 0)
    config = scores.task_config(tiny_study(results / "study"), bench, results)
    loaded = TaskManager(include_defaults=False).load([config])["tasks"][task]
    doc = loaded.eval_docs[0]
    return loaded.doc_to_text(doc), loaded.doc_to_choice(doc), loaded.doc_to_target(doc)


@pytest.mark.parametrize("task", MEDICAL)
def test_prompts_read_as_lm_evals_own(task, results):
    item, *expected = MEDICAL[task]
    assert list(rendered(results, task, item)) == expected


def test_medqa_with_letters_as_choices_reads_the_options_from_the_query(results):
    query = "Question: Why?\n A. v\n B. w\n C. x\n D. y\n E. z\nAnswer:"
    item = {"question": "Why?", "choices": list("ABCDE"), "query": query, "answer_idx": 4}
    assert list(rendered(results, "medqa", item)) == list(MEDICAL["medqa"][1:])


def test_medqa_options_that_are_letters_of_a_figure_are_listed(results):
    query = "Question: Which region of figure A?\nAnswer:"
    item = {"question": "Which region of figure A?", "choices": list("ABCDE"), "query": query}
    text, _, _ = rendered(results, "medqa", item | {"answer_idx": 4})
    lines = "A. A\nB. B\nC. C\nD. D\nE. E\n"
    assert text == f"Question: Which region of figure A?\n{lines}Answer:"


@pytest.mark.parametrize("task", ["medmcqa", "sciq"])
def test_templates_agree_with_the_installed_lm_eval(task):
    import lm_eval

    theirs = Path(lm_eval.__file__).parent / f"tasks/{task}/{task}.yaml"
    ours = yaml.safe_load((scores.TASKS / f"{task}.yaml").read_text())
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

    names = sorted(path.stem for path in scores.TASKS.glob("*.yaml"))
    manager = TaskManager(include_path=str(scores.TASKS), include_defaults=False)
    assert manager.all_subtasks == names


def fail(results, *suite):
    study = tiny_study(results / "study", suite=suite)
    with pytest.raises(UserError) as error:
        scores.evaluate(study, "m", results / "no-such-model", results)
    return str(error.value)


def test_an_unknown_task_is_refused_with_the_nearest_name(results):
    message = fail(results, Benchmark("x", "arc_eazy", "arc/test", None, 0))
    assert "there is no task 'arc_eazy'. Did you mean 'arc_easy'?" in message


def test_missing_data_says_how_to_make_it(results):
    message = fail(results, Benchmark("x", "arc_easy", "arc/none", None, 0))
    assert message.endswith(f"arc/none.jsonl: no such file. Run: mergelab data {results}/study")


def test_a_local_task_without_data_is_refused(results):
    message = fail(results, Benchmark("x", "arc_easy", None, None, 0))
    assert "task 'arc_easy' reads local items. Add data: DATASET/PART." in message


def test_few_shot_on_whole_texts_is_refused(results):
    message = fail(results, Benchmark("x", "text_nll", "texts/fresh", None, 2))
    assert "'text_nll' scores whole texts. Set num_fewshot to 0." in message


def test_a_hub_dataset_needs_a_pinned_commit(results):
    own = results / "study" / "tasks" / "hub_arc.yaml"
    own.parent.mkdir(parents=True, exist_ok=True)
    text = (scores.TASKS / "arc_easy.yaml").read_text()
    own.write_text(text.replace("dataset_path: json", "dataset_path: allenai/ai2_arc"))
    message = fail(results, Benchmark("x", "hub_arc", None, None, 0))
    assert "reads allenai/ai2_arc from the hub without a pinned commit" in message
    own.write_text(own.read_text() + f"dataset_kwargs: {{revision: {'a' * 40}}}\n")
    bench = Benchmark("x", "hub_arc", None, None, 0)
    config = scores.task_config(tiny_study(results / "study"), bench, results)
    assert config["dataset_path"] == "allenai/ai2_arc"


def own(results, text, name="own"):
    path = results / "study" / "tasks" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


ARC_TASK = (scores.TASKS / "arc_easy.yaml").read_text()
NLL_TASK = (scores.TASKS / "text_nll.yaml").read_text()
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
        ("output_type: multiple_choice", "output_type: generate_until", "a task needs output_type"),
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


def test_whole_texts_need_the_metrics_of_the_summary(results):
    path = own(results, NLL_TASK.replace("metric: word_perplexity", "metric: byte_perplexity"))
    said = fail(results, Benchmark("x", "own", "texts/fresh", None, 0))
    assert said == f"{path}: metric_list: the score needs word_perplexity. Add it."


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
    _, summary, samples = run((tmp_path, None), results, bench)
    assert summary["dtype"] == "bfloat16"
    values = [s["metrics"]["nll"] for s in samples["nll"]]
    assert any(v != torch.tensor(v).bfloat16().item() for v in values)  # softmax in float32


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
