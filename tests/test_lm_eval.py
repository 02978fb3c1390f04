"""The same scores as lm-eval's own, to the last digit: six tasks of three kinds, two formats.

In float32 lm-eval is run by its command line, in bfloat16 through the function that this calls, in
processes of their own and with our batch size. The tasks include lm-eval's own files and read our
items. lm-eval puts requests of one kind into common batches, which changes the last digits; so no
two tasks of a kind are given to one command."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import give_template, tiny_model, tiny_study

from mergelab import inference, scores, task_files
from mergelab.chat import TEMPLATES
from mergelab.study import Benchmark

TEXT = "the train travels miles in hours a patient was given aspirin what is its speed"
WORDS = TEXT.split()


def sentence(number, length=7):
    return " ".join(WORDS[(number * 5 + i * i) % len(WORDS)] for i in range(length))


def arc(i):
    choices = {"text": [sentence(i + k, 2 + k) for k in range(4)], "label": list("ABCD")}
    return {"id": f"a{i}", "question": sentence(i), "choices": choices, "answerKey": "ABCD"[i % 4]}


def winogrande(i):
    text = f"{sentence(i, 3)} _ {sentence(i + 1, 4)}"
    return {"sentence": text, "option1": "train", "option2": "patient", "answer": str(i % 2 + 1)}


def truthfulqa(i):
    targets = {"choices": [sentence(i + k, 3) for k in range(4)], "labels": [1, 0, 1, 0]}
    return {"question": sentence(i), "mc1_targets": targets, "mc2_targets": targets}


def gsm8k(i):
    return {"question": sentence(i), "answer": f"{sentence(i, 3)}\n#### {i * 7}"}


TASKS = {  # name: (kind, shots, an item)
    "arc_easy": ("multiple choice", 0, arc),
    "winogrande": ("multiple choice", 2, winogrande),
    "truthfulqa_mc2": ("multiple choice", 0, truthfulqa),
    "wikitext": ("rolling", 0, lambda i: {"page": f"{sentence(i, 40 + 90 * i)} 's = {i}"}),
    "gsm8k": ("generation", 2, gsm8k),
    "nq_open": ("generation", 1, lambda i: {"question": sentence(i), "answer": [sentence(i, 1)]}),
}
COMMANDS = (("arc_easy", "wikitext", "gsm8k"), ("winogrande", "nq_open"), ("truthfulqa_mc2",))
ITEMS = 7
BATCH = inference.batch_size(300, 256)
CALLED = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
asked = json.loads(sys.argv[1])
manager = TaskManager(include_path=asked["folder"], include_defaults=False)
ways = []
arguments = {"pretrained": asked["model"], "dtype": asked["dtype"], "softmax_dtype": "float32"}
for way in asked["ways"]:
    ways.append({})
    for task in asked["tasks"]:
        answers = simple_evaluate("hf", arguments, [task], batch_size=asked["batch_size"],
            device="cpu", task_manager=manager, bootstrap_iters=0, log_samples=True, **way)
        samples = answers["samples"][task]
        ways[-1][task] = [answers["results"][task], [s["resps"] for s in samples]]
json.dump(ways, open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two models, the items, and the folder of task files that lm-eval is shown."""
    place = tmp_path_factory.mktemp("equality")
    for dtype in ("float32", "bfloat16"):
        tiny_model(place / dtype, dtype=dtype, length=512)
    (place / "study").mkdir()
    (place / "tasks").mkdir()
    for task, (_, shots, item) in TASKS.items():
        data = place / f"study/{task}.jsonl"
        data.write_text("".join(json.dumps(item(i)) + "\n" for i in range(ITEMS)))
        config = {"include": str(task_files.index()[task]), "task": task, "num_fewshot": shots}
        config |= {"dataset_path": "json", "dataset_name": None, "tag": None}
        config |= {"dataset_kwargs": {"data_files": {"test": str(data)}}}
        config |= {"training_split": None, "validation_split": None}
        config |= {"test_split": "test", "fewshot_split": "test"}
        (place / f"tasks/{task}.yaml").write_text(yaml.safe_dump(config))
    return place


def run(place, *arguments):
    """Run Python with these arguments and no network."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(place / "home")}
    command = [sys.executable, *arguments]
    subprocess.run(command, env=os.environ | offline, check=True, capture_output=True)


def called(place, model, dtype, tasks, *ways):
    """What lm-eval's function says of a model, asked in these ways: {task: (its metrics, items'
    answers)} for each."""
    asked = {"folder": str(place / "tasks"), "model": str(place / model), "tasks": list(tasks)}
    asked |= {"dtype": dtype, "batch_size": BATCH, "ways": ways}
    out = place / "theirs.json"
    run(place, "-c", CALLED, json.dumps(asked), str(out))
    return json.loads(out.read_text())


def commanded(place):
    """What lm-eval's command line says of the float32 model, as it writes it to files."""
    model, found = f"pretrained={place / 'float32'},dtype=float32,softmax_dtype=float32", {}
    for number, tasks in enumerate(COMMANDS):
        out = place / f"out-{number}"
        line = f"-m lm_eval run --model hf --device cpu --batch_size {BATCH} --log_samples"
        told = {"model_args": model, "tasks": ",".join(tasks), "output_path": str(out)}
        told |= {"include_path": str(place / "tasks")}
        run(place, *line.split(), *(f"--{key}={value}" for key, value in told.items()))
        (results,) = out.glob("*/results_*.json")
        for task in tasks:
            (file,) = out.glob(f"*/samples_{task}_*.jsonl")
            samples = [json.loads(one)["resps"] for one in file.read_text().splitlines()]
            found[task] = [json.loads(results.read_text())["results"][task], samples]
    return found


@pytest.fixture(scope="module")
def theirs(place):
    (found,) = called(place, "bfloat16", "bfloat16", TASKS, {})
    return {"float32": commanded(place), "bfloat16": found}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_six_tasks_of_three_kinds_score_as_in_lm_eval_itself(place, theirs, dtype):
    suite = tuple(
        Benchmark(task, f"lm_eval/{task}", f"{task}.jsonl", None, shots)
        for task, (_, shots, _) in TASKS.items()
    )
    summary, table = evaluated(place, suite, dtype)
    assert summary["dtype"] == dtype
    equal(theirs[dtype], summary, table)


def evaluated(place, suite, model):
    """Our own summary and table."""
    results = place / "results"
    study = tiny_study(place / "study", suite=suite)
    scores.evaluate(study, model, place / model, results)
    summary = json.loads((results / f"scores/{model}.json").read_text())
    return summary, scores.table(results / f"scores/{model}.parquet")


def equal(theirs, summary, table):
    """Is every value and every answer theirs?"""
    for task, (values, resps) in theirs.items():
        found = summary["benchmarks"][task]["metrics"]
        wanted = {k.removesuffix(",none"): v for k, v in values.items() if "," in k}
        assert found == {k: v for k, v in wanted.items() if "_stderr" not in k}, task
        answers = [flat(one, TASKS[task][0]) for one in resps]
        assert sorted(answers_of(table, task)) == sorted(answers), task


CHATS = ("arc_easy", "winogrande", "gsm8k", "nq_open")  # one choice of prompts, one of answers
TEMPLATE = TEMPLATES["llama3"]  # it writes the beginning-of-sequence token itself


WAYS = ({}, {"fewshot_as_multiturn": False})


@pytest.fixture(scope="module")
def chats(place):
    """lm-eval's answers with the chat template, for each of WAYS."""
    tiny_model(place / "chat", length=512, adds_bos=True)
    give_template(place / "chat", TEMPLATE)
    asked = [{"apply_chat_template": True, **way} for way in WAYS]
    return called(place, "chat", "float32", CHATS, *asked)


@pytest.mark.parametrize("number", [0, 1])
def test_scores_with_the_chat_template_are_those_of_lm_eval_itself(place, chats, number):
    chat = {"chat_template": True, **WAYS[number]}
    suite = tuple(
        Benchmark(task, f"lm_eval/{task}", f"{task}.jsonl", None, TASKS[task][1], **chat)
        for task in CHATS
    )
    summary, table = evaluated(place, suite, "chat")
    equal(chats[number], summary, table)
    turns = {entry["fewshot_as_multiturn"] for entry in summary["benchmarks"].values()}
    assert turns == {number == 0}
    other = chats[1 - number]
    assert other["gsm8k"][1] != chats[number]["gsm8k"][1]  # two turns, or one, are two prompts
    plain = tuple(dataclasses.replace(bench, chat_template=False) for bench in suite)
    without, table_without = evaluated(place, plain, "chat")
    assert set(table_without["prompt_hash"]).isdisjoint(table["prompt_hash"])
    assert "chat" not in json.dumps(without)


def flat(resps, kind):
    """An item's answers as lm-eval logs them: texts, or log-probabilities, in its files as text."""
    values = [repeats[0] for repeats in resps]
    values = [v[0] if isinstance(v, list) else v for v in values]
    return values if kind == "generation" else [float(v) for v in values]


def answers_of(table, task):
    rows = table[table["benchmark"] == task]
    first = rows["metric"].iloc[0]
    rows = rows[rows["metric"] == first]
    return [list(r.resps) if len(r.resps) else [r.response] for r in rows.itertuples()]


def test_no_two_tasks_of_one_command_share_a_kind_of_request():
    assert sorted(sum(COMMANDS, ())) == sorted(TASKS)
    assert all(len({TASKS[task][0] for task in tasks}) == len(tasks) for tasks in COMMANDS)


def test_the_values_are_not_all_zero(theirs):
    assert Path(task_files.index()["wikitext"]).is_file()
    for kind in ("multiple choice", "rolling"):
        values = [theirs["float32"][t][0] for t, (k, _, _) in TASKS.items() if k == kind]
        assert all(any(v for k, v in found.items() if "," in k) for found in values)
    texts = [flat(resps, "generation")[0] for resps in theirs["float32"]["gsm8k"][1]]
    assert len(set(texts)) > 1
