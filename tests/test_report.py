"""The report: what it says, what it may not say, and that it is one safe, reproducible file."""

import copy
import csv
import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import sample_audit
from browser import browser

from mergelab import (
    contamination,
    figures,
    headlines,
    lineage,
    report,
    score_table,
    statistics,
)
from mergelab.audit import summary
from mergelab.errors import UserError
from mergelab.headlines import decimals, listed, signed, small
from mergelab.record import write_bytes
from mergelab.study import Study
from mergelab.study_file import load_study

STUDY = """
title: Does merging help two tiny specialists?
about: A base, a math and a medical expert, and four merges of the two.
datasets:
  gsm8k: {path: data, files: [gsm8k.jsonl], text: "{{question}}", parts: {leaked: 60, fresh: 120}}
  pubmed: {path: data, files: [pubmed.jsonl], text: "{{text}}", parts: {fresh: 120}}
models:
  base: {train: {architecture: {hidden_size: 96}, data: [{part: pubmed/fresh}], epochs: 1, learning_rate: 1.0e-3}}
  math: {train: {start: base, data: [{part: gsm8k/leaked, copies: 2}], epochs: 1, learning_rate: 1.0e-3}}
  medical: {train: {start: base, data: [{part: pubmed/fresh}], epochs: 1, learning_rate: 1.0e-3}}
suite:
  - {name: math_nll, task: text_nll, data: gsm8k/leaked}
  - {name: medical_nll, task: text_nll, data: pubmed/fresh}
  - {name: arc_easy, task: arc_easy}
contamination:
  - benchmark: gsm8k
    base: base
    suspects: gsm8k/leaked
    controls: gsm8k/fresh
    detectors: [base_loss, wbc, min_k_plus]
    planted: [math]
    scores: math_nll
    twin: medical_nll
"""  # noqa: E501

RECIPES = {
    "linear": """models:
  - {model: math, parameters: {weight: 0.5}}
  - {model: medical, parameters: {weight: 0.5}}
merge_method: linear
dtype: float32
""",
    "slerp": """models:
  - model: math
  - model: medical
merge_method: slerp
base_model: math
parameters: {t: 0.4}
dtype: float32
""",
    "ties": """models:
  - {model: math, parameters: {weight: 0.5, density: 0.4}}
  - {model: medical, parameters: {weight: 0.5, density: 0.4}}
merge_method: ties
base_model: base
parameters: {normalize: true}
dtype: float32
""",
    "dare_ties": """models:
  - {model: math, parameters: {weight: 0.5, density: 0.5}}
  - {model: medical, parameters: {weight: 0.5, density: 0.5}}
merge_method: dare_ties
base_model: base
dtype: float32
""",
}

# nats per byte added to an item's own difficulty: math_nll, medical_nll; skill on arc_easy; trace
EFFECTS = {
    "base": (0.0, 0.0, 0.30, 0.0),
    "math": (-0.10, 0.15, 0.34, 0.35),
    "medical": (0.15, -0.10, 0.33, 0.0),
    "linear": (-0.04, -0.04, 0.36, 0.22),
    "slerp": (-0.041, -0.039, 0.35, 0.22),
    "ties": (0.02, -0.01, 0.31, 0.18),
    "dare_ties": (0.002, 0.0, 0.32, 0.20),
}


def sample(benchmark: str, i: int, metric: str, value: float, weight: float) -> dict:
    """A row of the score table, as `mergelab evaluate` writes it."""
    return {
        "benchmark": benchmark,
        "task": benchmark,
        "id": f"{benchmark}-{i}",
        "doc_hash": f"d{i}",
        "prompt_hash": f"p{i}",
        "target_hash": f"t{i}",
        "filter": "none",
        "resps": [],
        "response": "",
        "metric": metric,
        "value": value,
        "weight": weight,
        "cluster": "",
    }


def write_scores(results: Path, variant: str, effect: tuple[float, ...], tasks: dict) -> None:
    """Per-item records and their summary, as `mergelab evaluate` leaves them."""
    noise = np.random.default_rng(sum(map(ord, variant)))
    summary, rows = {}, []
    for k, (name, task) in enumerate(tasks.items()):
        items = np.random.default_rng(k)
        metric = "bits_per_byte" if task == "text_nll" else "acc"
        own = []
        for i in range(120):
            if task == "text_nll":
                size = int(items.integers(150, 400))
                nats = 1.4 + 0.15 * items.normal() + effect[k] + 0.02 * noise.normal()
                own.append(sample(name, i, metric, nats * size / math.log(2), float(size)))
            else:
                right = items.uniform() + 0.05 * noise.normal() < effect[k]
                own.append(sample(name, i, metric, float(right), 1.0))
        top, bottom = (np.array([row[key] for row in own]) for key in ("value", "weight"))
        rows += own
        summary[name] = {
            "metric": metric,
            "value": float(top.sum() / bottom.sum()),
            "ci95": list(statistics.bootstrap_ratio(top, bottom)),
            "n": 120,
            "higher_is_better": task != "text_nll",
            "chance": None if task == "text_nll" else 0.25,
            "num_fewshot": 0,
            "task": task,
            "task_hash": hashlib.sha256(task.encode()).hexdigest(),
        }
    whole = {"benchmarks": summary, "lm_eval": "0.4.13", "dtype": "float32"}
    write_bytes(results / f"scores/{variant}.parquet", score_table.encode(rows))
    (results / "scores" / f"{variant}.json").write_text(json.dumps(whole))


def change_rows(results: Path, variant: str, change: Callable[[dict], dict | None]) -> None:
    """Rewrite a variant's score table row by row; None drops a row."""
    path = results / f"scores/{variant}.parquet"
    rows = [change(row) for row in score_table.table(path).to_dict("records")]
    kept = [{**row, "resps": list(row["resps"])} for row in rows if row is not None]
    write_bytes(path, score_table.encode(kept))


def other_prompt(row: dict) -> dict:
    changed = row["benchmark"] == "math_nll" and row["prompt_hash"] == "p7"
    return row | {"prompt_hash": "other"} if changed else row


def without(benchmark: str) -> Callable[[dict], dict | None]:
    return lambda row: None if row["benchmark"] == benchmark else row


def write_findings(results: Path, variant: str, trace: float) -> None:
    """Findings of two detectors, as `mergelab detect` leaves them."""
    random = np.random.default_rng(7 + sum(map(ord, variant)))
    findings = []
    for detector, scale in (("base_loss", 1.0), ("wbc", 0.8)):
        suspects = random.normal(trace * scale, 0.15, 60)
        controls = random.normal(0, 0.15, 120)
        auc, low, high = statistics.auc(suspects, controls)
        edge = float(np.quantile(controls, 0.95))
        findings.append(
            {
                "benchmark": "gsm8k",
                "detector": detector,
                "detector_version": 1,
                "variant": variant,
                "base": "base",
                "effect_name": "AUC",
                "effect": auc,
                "ci95": [low, high],
                "informational": False,
                "null_hypothesis": "Suspects and controls are exchangeable.",
                "guarantees": "The p is exact.",
                "blind_spots": "Blind where the base saw the items.",
                "statistic": "Mean of log p(model) - log p(base), nats per token.",
                "papers": [],
                "n_suspects": 60,
                "n_controls": 120,
                "auc": auc,
                "auc_ci95": [low, high],
                "p": statistics.mann_whitney(suspects, controls),
                "tpr_at_5_fpr": statistics.tpr_at_fpr(suspects, controls),
                "tpr_at_1_fpr": statistics.tpr_at_fpr(suspects, controls, 0.01),
                "item_scores": {"suspects": suspects.tolist(), "controls": controls.tolist()},
                "flagged": [f"math_nll-{i}" for i in np.flatnonzero(suspects > edge)],
                "details": {},
            }
        )
    findings.append(
        {key: value for key, value in findings[0].items() if not key.startswith(("auc", "tpr"))}
        | {"detector": "min_k_plus", "informational": True, "p": None}
        | {"effect_name": "share", "effect": 0.4, "ci95": None, "item_scores": None, "flagged": []}
    )
    path = results / "findings" / f"{variant}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(findings))


def write_merge(study: Study, results: Path, name: str) -> None:
    """A merge's record and the record of its evaluation."""
    text = (study.folder / f"{name}.yaml").read_text()
    weights = hashlib.sha256(name.encode()).hexdigest()
    model = {"name": "model.safetensors", "sha256": weights, "bytes": 1000}
    record = {
        "recipe": {
            "path": f"{name}.yaml",
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "text": text,
        },
        "method": {"name": text.split("merge_method: ")[1].split()[0], "version": 1},
        "parameters": {},
        "inputs": [
            {
                "model": parent,
                "source": f"results/demo/models/{parent}",
                "files": [
                    {
                        "name": "model.safetensors",
                        "sha256": hashlib.sha256(parent.encode()).hexdigest(),
                        "bytes": 1000,
                    }
                ],
            }
            for parent in ("math", "medical")
        ],
        "outputs": {"files": [model], "tensors": {"lm_head.weight": weights}},
        "packages": {"torch": "2.13.0", "numpy": "2.4.6"},
        "machine": {"cpu": "A CPU", "python": "3.11.2"},
        "seconds": 1.5,
    }
    path = results / "merged" / name / "merge.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


def make_results(folder: Path, effects: dict | None = None) -> tuple[Study, Path]:
    """A whole study with plausible results, in the formats of the other verbs."""
    effects = EFFECTS | (effects or {})
    recipes = folder / "recipes" / "demo"
    recipes.mkdir(parents=True)
    (recipes / "study.yaml").write_text(STUDY)
    for name, text in RECIPES.items():
        (recipes / f"{name}.yaml").write_text(text)
    study, results = load_study(recipes), folder / "results" / "demo"
    for variant in study.variants:
        write_scores(results, variant, effects[variant], {b.name: b.task for b in study.suite})
        if variant != "base":
            write_findings(results, variant, effects[variant][3])
        path = results / "records" / f"evaluate-{variant}.0123456789ab.json"
        path.parent.mkdir(exist_ok=True)
        sha256 = hashlib.sha256(variant.encode()).hexdigest()
        path.write_text(json.dumps({"inputs": {"model": {"model.safetensors": sha256}}}))
    for name in RECIPES:
        write_merge(study, results, name)
    return study, results


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Path]:
    study, results = make_results(tmp_path_factory.mktemp("demo"))
    report.write(study, results)
    return study, results


@pytest.fixture(scope="module")
def page(demo: tuple[Study, Path]) -> str:
    return (demo[1] / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def data(demo: tuple[Study, Path]) -> dict:
    return json.loads((demo[1] / "report.json").read_text(encoding="utf-8"))


class Outline(HTMLParser):
    """Tags, ids and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


def test_page_loads_nothing_and_runs_only_its_own_script(page: str) -> None:
    outline = Outline(page)
    assert "://" not in page
    assert not {"link", "img", "iframe", "object", "base", "form"} & set(outline.tags)
    assert outline.tags.count("script") == 1
    assert "script-src 'sha256-" in page
    assert not [name for name, _ in outline.attributes if name.startswith(("on", "src"))]
    assert set(re.findall(r"url\((.)", page)) <= {"#"}
    assert "@import" not in page


def test_ids_are_unique_and_every_reference_has_its_target(
    demo: tuple[Study, Path], page: str
) -> None:
    attributes = Outline(page).attributes
    ids = [value for name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids))
    links = {value for name, value in attributes if name == "href" and value}
    wanted = {link[1:] for link in links if link.startswith("#")}
    wanted |= set(re.findall(r"url\(#([^)]+)\)", page))
    assert wanted <= set(ids)
    records = {link for link in links if not link.startswith("#")}
    assert {"scores/ties.json", "findings/ties.json", "merged/ties/merge.json"} <= records
    assert all((demo[1] / record).is_file() for record in records)


def test_report_json_is_as_its_schema_says(data: dict) -> None:
    text = resources.files("mergelab").joinpath("report.schema.json").read_text("utf-8")
    schema = jsonschema.Draft202012Validator(json.loads(text))
    schema.check_schema(json.loads(text))
    schema.validate(data)
    audited = {"sentence": "x", "verdicts": sample_audit.sample()["verdicts"]}
    schema.validate(data | {"audit": audited})
    data = json.loads(json.dumps(data))
    data["benchmarks"][0]["rows"][1]["vs_base"]["verdict"] = "winner"
    found = next(schema.iter_errors(data))
    assert found.json_path.startswith("$.benchmarks[0].rows[1].vs_base")


def test_second_run_writes_the_same_bytes(demo: tuple[Study, Path]) -> None:
    study, results = demo
    names = ("report.html", "report.json", "metrics.json", "plots/scores.csv")
    before = {name: (results / name).read_bytes() for name in names}
    record = report.write(study, results)
    assert {name: (results / name).read_bytes() for name in names} == before
    listed = {entry["name"]: entry["sha256"] for entry in record["outputs"]}
    assert listed["report.html"] == hashlib.sha256(before["report.html"]).hexdigest()


def test_headline_names_the_merge_that_beats_the_base_everywhere(data: dict) -> None:
    first = data["headlines"][0]
    assert first.startswith("linear beats base on all three benchmarks: math_nll bits per byte")
    assert "95 % CI \N{MINUS SIGN}" in first
    assert "ties" not in first


def test_headline_turns_when_the_data_turn(tmp_path: Path) -> None:
    worse = dict.fromkeys(RECIPES, (0.05, 0.05, 0.31, 0.0))
    study, results = make_results(tmp_path, worse)
    sentences = report.gather(study, results)["headlines"]
    assert sentences[0].startswith("No merge beats base on all three benchmarks.")
    assert "linear is worse on math_nll and medical_nll" in sentences[0]
    assert "Missed: dare_ties, linear, slerp and ties." in sentences[-2]


def test_headline_claims_nothing_when_nothing_is_settled(data: dict) -> None:
    changed = json.loads(json.dumps(data))
    for bench in changed["benchmarks"]:
        for row in bench["rows"]:
            for other in ("vs_base", "vs_parent"):
                if row[other]:
                    row[other]["verdict"] = "unsettled"
    first, second, *_ = headlines.headlines(changed)
    assert first.startswith("No merge can be told apart from base on any benchmark")
    assert second.startswith("No merge beats the best of its parents on any benchmark: everywhere")


def test_flags_follow_q_over_all_findings(data: dict) -> None:
    rows = [row for d in data["checks"][0]["detectors"] for row in d["rows"] if row["q"]]
    q = statistics.benjamini_hochberg([row["p"] for row in rows])
    assert [row["q"] for row in rows] == pytest.approx(list(q))
    assert {row["variant"] for row in rows if not row["flagged"]} == {"medical"}
    assert "medical (AUC 0.51 to 0.53); that does not prove it clean" in data["headlines"][2]


def test_only_a_best_value_that_is_settled_is_bold(data: dict, page: str) -> None:
    best = {bench["name"]: bench["best"] for bench in data["benchmarks"]}
    assert best["math_nll"] == ["math"]
    assert len(best["arc_easy"]) > 1
    assert page.count("(bold) is better than every other variant") == 2
    assert len(re.findall(r"<strong>[0-9.]+</strong>", page)) == 2


def test_hostile_names_and_texts_are_escaped(tmp_path: Path) -> None:
    study, results = make_results(tmp_path)
    evil = "<script>alert(1)<x>"
    recipe = RECIPES["linear"].replace("model: math", f"model: '{evil}'") + "# $x$ </pre>\n"
    (study.folder / "evil.yaml").write_text(recipe)
    study = replace(load_study(study.folder), title=evil, about='"><img src=x onerror=y>')
    hostile = study.folder / f"{evil}.yaml"  # a study refuses this name; the page must not need it
    hostile.write_text(recipe)
    study = replace(study, recipes=(*study.recipes, hostile))
    shutil.copy(results / "scores/linear.json", results / f"scores/{evil}.json")
    path = results / "findings" / "math.json"
    path.write_text(path.read_text().replace("nats per token", "<script>nats"))
    report.write(study, results)
    page = (results / "report.html").read_text(encoding="utf-8")
    assert page.count("<script") == 1
    assert "<img" not in page
    assert Outline(page).tags.count("script") == 1
    assert "&lt;script&gt;alert(1)&lt;x&gt;" in page


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    study, results = make_results(tmp_path)
    (results / "scores" / "ties.json").unlink()
    (results / "findings" / "slerp.json").unlink()
    (results / "merged" / "linear" / "merge.json").unlink()
    change_rows(results, "math", without("arc_easy"))
    report.write(study, results)
    page = (results / "report.html").read_text(encoding="utf-8")
    assert "ties: no scores. Run: mergelab evaluate recipes/demo ties" in page
    assert "slerp: not examined. Run: mergelab detect recipes/demo slerp" in page
    assert "linear: no record of the merge" in page
    assert "arc_easy: math has no per-sample records" in page
    assert "not measured" in page
    assert "math_nll" not in json.loads((results / "metrics.json").read_text())["ties"]


def test_a_study_without_any_results_gives_a_page(tmp_path: Path) -> None:
    study, _ = make_results(tmp_path)
    report.write(study, tmp_path / "empty")
    page = (tmp_path / "empty" / "report.html").read_text(encoding="utf-8")
    assert "Nothing has been measured yet." in page
    assert page.count("no scores. Run:") == 7


def test_other_prompts_are_reported_and_never_compared(tmp_path: Path) -> None:
    study, results = make_results(tmp_path)
    change_rows(results, "linear", other_prompt)
    data = report.gather(study, results)
    assert "math_nll: the variants saw different items or prompts." in data["warnings"]
    rows = {row["variant"]: row for row in data["benchmarks"][0]["rows"]}
    assert rows["linear"]["vs_base"] is None
    assert rows["slerp"]["vs_base"] is not None


def test_benchmarks_whose_prompts_were_chats_say_so(data: dict, page: str) -> None:
    chats = copy.deepcopy(data)
    chats["benchmarks"][0] |= {"chat_template": True, "fewshot_as_multiturn": True}
    html = report.page.render(chats)
    assert "0-shot, in the model's chat template." in html
    assert '<td class="number">0, chat template</td>' in html
    assert "chat template" not in page


def test_stale_results_are_named(tmp_path: Path) -> None:
    study, results = make_results(tmp_path)
    (study.folder / "ties.yaml").write_text(RECIPES["ties"].replace("0.4", "0.3"))
    path = next((results / "records").glob("evaluate-slerp.*.json"))
    path.write_text(json.dumps({"inputs": {"model": {"model.safetensors": "0" * 64}}}))
    assert report.gather(load_study(study.folder), results)["warnings"] == [
        "slerp: its scores are of other weights. Evaluate it again.",
        "ties: its recipe changed after it was merged. Merge it again.",
    ]


def test_metrics_and_plots_hold_the_measured_numbers(demo: tuple[Study, Path]) -> None:
    _, results = demo
    metrics = json.loads((results / "metrics.json").read_text())
    summary = json.loads((results / "scores" / "slerp.json").read_text())["benchmarks"]
    findings = json.loads((results / "findings" / "slerp.json").read_text())
    assert metrics["slerp"]["math_nll"] == summary["math_nll"]["value"]
    assert metrics["slerp"]["auc"]["gsm8k"]["wbc"] == findings[1]["auc"]
    assert "auc" not in metrics["base"]
    with (results / "plots" / "scores.csv").open(newline="") as file:
        scores = list(csv.DictReader(file))
    assert len(scores) == 7 * 3
    assert [r["variant"] for r in scores[:3]] == ["base", "math", "medical"]
    with (results / "plots" / "contamination.csv").open(newline="") as file:
        aucs = {(r["variant"], r["detector"]): float(r["value"]) for r in csv.DictReader(file)}
    assert len(aucs) == 6 * 2
    assert aucs["slerp", "wbc"] == findings[1]["auc"]


def test_merges_with_the_same_weights_are_told_to_be_one_result(tmp_path: Path, page: str) -> None:
    study, results = make_results(tmp_path)
    linear, slerp = (results / "merged" / n / "merge.json" for n in ("linear", "slerp"))
    record = json.loads(slerp.read_text())
    record["outputs"]["tensors"] = json.loads(linear.read_text())["outputs"]["tensors"]
    slerp.write_text(json.dumps(record))
    data = report.gather(study, results)
    assert data["twins"] == [["linear", "slerp"]]
    told = "linear and slerp have the same weights, byte for byte: "
    assert f"{told}read them as one result." in data["headlines"]
    assert f"{told}their rows are one result." in report.page.render(data)
    assert "have the same weights" not in page


def test_what_cannot_be_compared_is_not_called_a_tie(tmp_path: Path) -> None:
    study, results = make_results(tmp_path)
    change_rows(results, "linear", other_prompt)
    change_rows(results, "base", without("math_nll"))
    data = report.gather(study, results)
    bench = data["benchmarks"][0]
    assert (bench["top"], bench["best"]) == ("math", ["math"])
    assert bench["not_compared"] == ["base", "linear"]
    html = report.page.render(data)
    assert "math (bold) is better than every other variant that can be compared with it." in html
    assert "no per-sample records): base and linear." in html


def test_what_can_be_compared_with_nothing_is_not_best(tmp_path: Path) -> None:
    study, results = make_results(tmp_path)
    change_rows(results, "math", without("math_nll"))
    bench = report.gather(study, results)["benchmarks"][0]
    assert (bench["top"], bench["best"]) == ("math", [])
    assert len(bench["not_compared"]) == 6


def test_the_base_of_task_vectors_is_no_parent_to_beat(tmp_path: Path) -> None:
    study, results = make_results(tmp_path, {"base": (-0.5, -0.5, 0.9, 0.0)})
    benches = report.gather(study, results)["benchmarks"]
    rows = {row["variant"]: row["vs_parent"] for row in benches[0]["rows"]}
    assert {rows[name]["parent"] for name in RECIPES} == {"math"}
    assert rows["math"] is None


def test_headlines_say_that_intervals_are_not_corrected(data: dict) -> None:
    assert "".join(data["headlines"]).count("not corrected for the number of comparisons") == 1
    assert data["headlines"][1].endswith(headlines.UNCORRECTED)


DAMAGE = {
    "cut": lambda text: text[: len(text) // 2],
    "not UTF-8": lambda text: b"\xff\xfe" + text,
    "a number": lambda _: b"3",
    "empty": lambda _: b"",
    "NaN": lambda text: text.replace(b": 0.", b': NaN, "x": 0.').replace(b'": "', b'": NaN, "'),
}
FILES = {
    "findings/ties.json": "mergelab detect recipes/demo ties",
    "scores/ties.json": "mergelab evaluate recipes/demo ties",
    "records/evaluate-ties.0123456789ab.json": " && snakemake --config study=demo",
    "merged/ties/merge.json": " && mergelab merge recipes/demo/ties.yaml -o ",
    "lock.json": " && mergelab lock recipes/demo",
}


def damaged_error(study: Study, results: Path, path: Path, content: bytes) -> str:
    """What the report says while `path` holds `content`."""
    whole = path.read_bytes()
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        report.write(study, results)
    path.write_bytes(whole)
    return str(caught.value)


@pytest.fixture(scope="module")
def spare(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Path]:
    study, results = make_results(tmp_path_factory.mktemp("spare"))
    study.lock.write_text('{"models": {"org/a@main": {"commit": "0123456789abcdef"}}}')
    return study, results


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_with_the_command_that_remakes_it(
    spare: tuple[Study, Path], name: str
) -> None:
    study, results = spare
    path = study.lock if name == "lock.json" else results / name
    for how, damage in DAMAGE.items():
        error = damaged_error(study, results, path, damage(path.read_bytes()))
        assert error.startswith(f"{path}: is damaged ("), how
        assert FILES[name] in error.partition(" Run: ")[2], how


@pytest.mark.parametrize(
    ("name", "keys", "why"),
    [
        ("findings/ties.json", (1, "p"), "([1].p is missing)"),
        ("findings/ties.json", (0, "item_scores", "controls"), "controls is missing)"),
        ("scores/ties.json", ("benchmarks",), "(benchmarks is missing)"),
        ("scores/ties.json", ("benchmarks", "math_nll", "ci95"), "math_nll.ci95 is missing)"),
        ("scores/ties.json", ("benchmarks", "math_nll", "ci95", 1), "ci95 has 1 entries, not 2)"),
        ("merged/ties/merge.json", ("outputs",), "(outputs is missing)"),
        ("merged/ties/merge.json", ("inputs", 0, "files"), "(inputs[0].files is missing)"),
    ],
)
def test_a_missing_key_is_named(
    spare: tuple[Study, Path], name: str, keys: tuple, why: str
) -> None:
    study, results = spare
    value = inner = json.loads((results / name).read_text())
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    assert why in damaged_error(study, results, results / name, json.dumps(value).encode())


def test_a_damaged_score_table_is_named(spare: tuple[Study, Path]) -> None:
    study, results = spare
    path = results / "scores/ties.parquet"
    for content in (path.read_bytes()[:-100], b"", b"{}"):
        assert f"{path}: is damaged (" in damaged_error(study, results, path, content)


def test_a_score_is_shown_on_all_items_and_on_those_not_marked(
    demo: tuple[Study, Path], data: dict, page: str
) -> None:
    shown = {row["variant"]: row for row in data["checks"][0]["clean_scores"]}
    assert shown["base"]["full"]["n"] == 120
    assert shown["base"]["clean"] is None  # it was not examined
    study = load_study(demo[0].folder)
    marked = contamination.marked_items(study, data["checks"])["math_nll", "math"]
    assert len(marked) > 20
    assert shown["math"]["clean"]["n"] == 120 - len(marked)
    twin = next(b for b in data["benchmarks"] if b["name"] == "medical_nll")["rows"][1]
    assert shown["math"]["twin"]["value"] == twin["value"]
    assert "Not marked" in page
    rows = {row["variant"]: row for row in data["checks"][0]["detectors"][2]["rows"]}
    assert (rows["math"]["verdict"], rows["math"]["q"]) == ("informational", None)


def test_two_checks_and_a_detector_without_findings_keep_their_pictures(tmp_path: Path) -> None:
    study, results = make_results(tmp_path)
    first = study.contamination[0]
    second = replace(first, benchmark="other", detectors=("wbc",), scores=None, twin=None)
    first = replace(first, detectors=("constat", "base_loss", "wbc"))
    for path in (results / "findings").glob("*.json"):
        found = json.loads(path.read_text())
        found += [f | {"benchmark": "other"} for f in found if f["detector"] == "wbc"]
        path.write_text(json.dumps(found))
    study = replace(study, contamination=(first, second))
    html = report.page.render(report.gather(study, results))
    assert html.count("item scores of suspects and controls") == 3
    assert html.count("not examined") == 6


def test_every_comparison_has_q_and_a_detectable_difference(data: dict, page: str) -> None:
    rows = [row for bench in data["benchmarks"] for row in bench["rows"]]
    known = [row[key] for row in rows for key in ("vs_base", "vs_parent") if row[key]]
    q = statistics.benjamini_hochberg([comparison["p"] for comparison in known])
    assert [comparison["q"] for comparison in known] == pytest.approx(list(q))
    assert all(comparison["mde"] > 0 for comparison in known)
    assert f"over all {len(known)} comparisons" in page


def test_difference_to_the_base_is_the_one_of_the_summaries(data: dict) -> None:
    rows = {row["variant"]: row for row in data["benchmarks"][0]["rows"]}
    by_hand = rows["linear"]["value"] - rows["base"]["value"]
    assert rows["linear"]["vs_base"]["difference"] == pytest.approx(by_hand)
    assert rows["linear"]["vs_parent"]["parent"] == "math"


def test_recipe_diff_keeps_every_line_of_both(data: dict) -> None:
    recipes = {recipe["name"]: recipe for recipe in data["recipes"]}
    reference = recipes["ties"]["reference"]
    lines = recipes["ties"]["diff"]
    ours = [line["text"] for line in lines if line["sign"] in " +"]
    theirs = [line["text"] for line in lines if line["sign"] in " -"]
    assert ours == RECIPES["ties"].splitlines()
    assert theirs == RECIPES[reference].splitlines()


def edges_of(study: Study, recipe: str) -> dict[str, tuple[str, float, bool]]:
    graph = lineage.graph(study, {"merge": recipe})
    return {
        edge.parent: (edge.kind, round(edge.weight, 6), edge.exact)
        for edge in graph.edges
        if edge.child == "merge"
    }


def test_effective_weights_by_hand(demo: tuple[Study, Path]) -> None:
    study = demo[0]
    linear = RECIPES["linear"].replace("{weight: 0.5}}", "{weight: 1.5}}", 1)
    assert edges_of(study, linear) == {
        "math": ("merge", 0.75, True),
        "medical": ("merge", 0.25, True),
    }
    assert edges_of(study, RECIPES["slerp"])["math"] == ("merge", 0.6, True)
    assert edges_of(study, RECIPES["slerp"])["medical"] == ("merge", 0.4, True)
    assert edges_of(study, RECIPES["ties"]) == {
        "math": ("merge", 0.2, True),
        "medical": ("merge", 0.2, True),
        "base": ("base", 1.0, True),
    }
    assert edges_of(study, RECIPES["dare_ties"])["math"] == ("merge", 0.25, True)


def test_a_gradient_counts_by_its_mean_and_layers_by_their_share(demo: tuple[Study, Path]) -> None:
    study = demo[0]
    gradient = RECIPES["slerp"].replace(
        "{t: 0.4}", "{t: [{filter: mlp, value: [0, 1]}, {value: 0.3}]}"
    )
    assert edges_of(study, gradient)["medical"] == ("merge", 0.4, False)
    stacked = """slices:
  - sources: [{model: math, layer_range: [0, 6]}]
  - sources: [{model: medical, layer_range: [4, 6]}]
merge_method: passthrough
"""
    assert edges_of(study, stacked) == {
        "math": ("merge", 0.75, True),
        "medical": ("merge", 0.25, True),
    }


def test_taint_is_the_strongest_way_from_a_planted_model(demo: tuple[Study, Path]) -> None:
    study = demo[0]
    twice = RECIPES["linear"].replace("model: medical", "model: 'recipe:ties'")
    graph = lineage.graph(study, {"ties": RECIPES["ties"], "twice": twice})
    taint = lineage.taint(graph, {"gsm8k": ("math",)})
    assert taint["math"] == {"gsm8k": 1.0}
    assert taint["ties"]["gsm8k"] == pytest.approx(0.2)
    assert taint["twice"]["gsm8k"] == pytest.approx(0.5)
    assert taint["medical"] == {}
    from_base = lineage.taint(graph, {"gsm8k": ("base",)})
    assert from_base["medical"] == {"gsm8k": 1.0}
    assert from_base["ties"] == {"gsm8k": 1.0}


def test_a_model_outside_the_study_is_a_node(demo: tuple[Study, Path]) -> None:
    recipe = RECIPES["linear"].replace("model: medical", "model: org/stranger")
    graph = lineage.graph(demo[0], {"merge": recipe})
    assert [n.kind for n in graph.nodes if n.name == "org/stranger"] == ["outside"]
    assert graph.parents("merge") == ("math", "org/stranger")


def test_figures_take_names_in_any_script() -> None:
    for name in ("漢字-7B", "مرحبا", "😀‍💥", "हिन्दी", "\ue000\ud800\x00x"):
        svg = figures.panel([figures.Dot(name, "merge", 1.0)], title=name, axis="y")
        assert f">{name}</text>" in svg or ">\ufffd\ufffd\ufffdx</text>" in svg
        svg.encode("utf-8")


def test_differences_have_a_forest_plot(page: str) -> None:
    assert page.count("differences in") == 3
    assert page.count(">minus the base</text>") == 3
    assert page.count(">minus the best parent</text>") == 3


def test_a_study_that_was_audited_begins_with_its_verdicts(tmp_path: Path) -> None:
    study, results = make_results(tmp_path)
    audit = sample_audit.sample()
    (results / "audit").mkdir()
    (results / "audit/audit.json").write_text(json.dumps(audit))
    assert report.gather(study, results)["audit"] is None  # nothing is claimed (any more)
    (study.folder / "claims.yaml").write_text("claims: []\n")
    data = report.gather(study, results)
    assert data["audit"]["verdicts"] == audit["verdicts"]
    html = report.page.render(data)
    assert html.index(summary.sentence(audit)) < html.index("linear beats base")
    assert 'href="audit/audit.html#claim-3"' in html
    del audit["verdicts"][0]["why"]
    (results / "audit/audit.json").write_text(json.dumps(audit))
    with pytest.raises(UserError, match=r"why is missing\). Run: mergelab audit recipes/demo"):
        report.gather(study, results)


def test_the_page_works_in_a_browser(demo: tuple[Study, Path]) -> None:
    path = demo[1] / "report.html"
    with browser() as chrome:
        for width in (360, 800, 1400):
            for dark in (False, True):
                chrome.open(path, width=width, dark=dark)
                assert chrome.run("document.documentElement.scrollWidth") == width
                assert (chrome.complaints(), chrome.requests()) == ([], [path.as_uri()])
        table = "table[aria-describedby=about3-1]"
        chrome.click(f"{table} th:nth-child(2) button")
        groups = chrome.run(
            f"[...document.querySelectorAll('{table} tbody')].map((body) =>"
            "[...body.rows].slice(1).map((row) => parseFloat(row.cells[1].dataset.sort)))"
        )
        heads = chrome.run(
            f"document.querySelectorAll('{table} tbody > .group:first-child').length"
        )
    assert [len(group) for group in groups] == [6, 6, 6]
    assert all(group == sorted(group) for group in groups)
    assert heads == 3


def enlarged(data: dict, variants: int, benchmarks: int, checks: int) -> dict:
    """A report's data with its rows, benchmarks and checks repeated under other names."""

    def repeated(rows: list[dict], count: int) -> list[dict]:
        more = [rows[i % len(rows)] | {"variant": f"variant-{i}"} for i in range(len(rows), count)]
        return [*rows, *more]

    names = repeated(
        [{"variant": v["name"], "kind": v["kind"]} for v in data["variants"]], variants
    )
    benches = [data["benchmarks"][i % len(data["benchmarks"])] for i in range(benchmarks)]
    detectors = [
        detector | {"rows": repeated(detector["rows"], variants - 1)}
        for detector in data["checks"][0]["detectors"]
    ]
    return data | {
        "variants": [{"name": row["variant"], "kind": row["kind"]} for row in names],
        "descent": {row["variant"]: [] for row in names},
        "benchmarks": [
            bench | {"name": f"bench-{i}", "rows": repeated(bench["rows"], variants)}
            for i, bench in enumerate(benches)
        ],
        "checks": [
            data["checks"][0] | {"benchmark": f"check-{i}", "detectors": detectors}
            for i in range(checks)
        ],
    }


def test_twenty_variants_on_twenty_benchmarks_stay_below_five_megabytes(data: dict) -> None:
    html = report.page.render(enlarged(data, 20, 20, 4))
    assert html.count("<svg") == 2 * 20 + 2 * 4 + 4 + 1
    assert 500_000 < len(html.encode()) < 5_000_000


def test_figures_treat_dollar_signs_as_text() -> None:
    dot = figures.Dot("a$x$b", "base", 1.0, 0.9, 1.1)
    svg = figures.panel([dot], title="t", axis="$y$ & <z>", higher=True)
    assert ">a$x$b</text>" in svg
    assert "$y$ &amp; &lt;z&gt; · better →" in svg


def test_numbers_read_well() -> None:
    assert small(3.21e-30, up=True) == "3.3e-30"
    assert small(0.0404) == "0.040"
    assert signed(-0.0004, 3) == "0.000"
    assert signed(-0.5, 2) == "\N{MINUS SIGN}0.50"
    assert decimals(0.1, 0.9) == 2
    assert decimals(1.9301, 1.9342) == 4
    assert listed(["a", "b", "c"]) == "a, b and c"
