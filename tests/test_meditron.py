"""The Meditron study: its page keeps what its table gives, it plans, and its small twin runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from loopback_hub import LoopbackHub
from tiny import teach, tiny_model

from mergelab import engine, locate, scores
from mergelab.audit.rescore import measured
from mergelab.audit.verdicts import judge
from mergelab.claims import reanalysis
from mergelab.claims.file import load_claims
from mergelab.plan import make_plan
from mergelab.published import compare
from mergelab.recipe import load_recipe
from mergelab.study import Study
from mergelab.study_file import load_study

ROOT = Path(__file__).parents[1]
STUDY = ROOT / "recipes/meditron"
META = ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-chat-hf")
MERGES = ("dare_ties", "linear", "slerp", "ties")


# ---- the published table ----


@pytest.fixture(scope="module")
def published() -> reanalysis.Scores:
    return reanalysis.scores(load_claims(STUDY).claims)


def test_the_page_holds_the_tables_that_the_claims_give() -> None:
    page = (ROOT / "docs/meditron.md").read_text()
    for name, table in reanalysis.pages(STUDY, reanalysis.PARENTS, reanalysis.SIZES).items():
        assert table in page, f"docs/meditron.md lacks the table '{name}'; it should be:\n{table}"


def test_every_score_is_possible_three_of_them_only_to_one_decimal(
    published: reanalysis.Scores,
) -> None:
    sizes = reanalysis.SIZES
    found = {
        (model, name): reanalysis.decimals(claims[name], sizes[name])
        for model, claims in published.items()
        for name in sizes
    }
    assert len(found) == 36
    coarse = {key: value for key, value in found.items() if value != 2}
    assert coarse == {
        ("meditron", "medqa_4options"): 1,
        ("meditron", "arc_challenge"): 1,
        ("linear", "medqa_4options"): 1,
    }


def test_four_of_six_gains_of_slerp_and_all_its_leads_on_the_average_are_not_significant(
    published: reanalysis.Scores,
) -> None:
    gaps = reanalysis.gaps(published, reanalysis.PARENTS, reanalysis.SIZES)
    assert len(gaps) == 60
    gains = [gap for gap in gaps if gap.model == "slerp" and gap.than in reanalysis.PARENTS]
    assert all(gap.difference > 0 for gap in gains)
    assert {gap.benchmark for gap in gains if gap.real} == {"hellaswag", "mmlu"}
    assert not any(gap.real for gap in gaps if (gap.model, gap.than) == ("linear", "slerp"))
    assert all(gap.p <= gap.q for gap in gaps)
    medical = ("medqa_4options", "medmcqa", "pubmedqa")
    assert not any(
        gap.real and gap.difference > 0
        for gap in gaps
        if gap.benchmark in medical and gap.than in reanalysis.PARENTS
    )


def test_the_comparisons_are_the_order_of_the_table(published: reanalysis.Scores) -> None:
    orders = load_claims(STUDY).comparisons
    assert len(orders) == 28
    for order in orders:
        ours, theirs = published[order.model], published[order.than]
        assert ours[order.benchmark].value > theirs[order.benchmark].value
        n = reanalysis.SIZES[order.benchmark]
        low, high = compare(ours[order.benchmark].value, theirs[order.benchmark].value, n)["ci95"]
        assert low < ours[order.benchmark].value - theirs[order.benchmark].value < high


# ---- the study, against a hub on this machine ----


def stand_in(folder: Path, seed: int, more: int = 0) -> Path:
    """A tiny model; `more` tokens follow those of its base, as in Meditron's vocabulary."""
    model = tiny_model(folder, seed=seed, dtype="float16")
    if more:
        widen(folder, model, more)
    return folder


def widen(folder: Path, model: Any, more: int) -> None:
    """Add special tokens to the model in `folder`, with rows of their own."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    tokenizer.add_tokens([f"<M{i}>" for i in range(more)], special_tokens=True)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_TOKEN", "")
    with LoopbackHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        for seed, name in enumerate(META):
            hub.publish(name, stand_in(tmp_path / f"models/{seed}", seed), gated=True)
        hub.publish("epfl-llm/meditron-7b", stand_in(tmp_path / "models/2", 2, more=17))
        for name in ("GBaker/MedQA-USMLE-4-options-hf", "bigbio/pubmed_qa"):
            hub.publish(f"datasets/{name}", {"data/test-0.jsonl": b"{}\n"})
        yield hub


def dry_run(place: Path, study: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "snakemake", "-n", "--quiet", "host", "--config", f"study={study}"],
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )


def test_the_study_says_what_to_lock_and_what_to_accept_then_plans_and_dry_runs(
    hub: LoopbackHub, mergelab: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("Snakefile", "workflow", "profiles"):
        (tmp_path / name).symlink_to(ROOT / name)
    for study in ("meditron", "demo"):
        folder = tmp_path / "recipes" / study
        folder.mkdir(parents=True)
        for file in (ROOT / "recipes" / study).glob("*.yaml"):
            (folder / file.name).write_bytes(file.read_bytes())

    refused = dry_run(tmp_path, "meditron")
    assert refused.returncode == 1
    assert "is not pinned. Run: mergelab lock recipes/meditron" in refused.stdout
    assert "Traceback" not in refused.stdout
    other = dry_run(tmp_path, "demo")  # has nothing to do with it
    assert other.returncode == 0, other.stdout

    locked = mergelab("lock", "recipes/meditron")  # the list of files is not gated
    assert locked.returncode == 0, locked.stderr
    gated = mergelab("plan", "recipes/meditron/ties.yaml")
    assert gated.returncode == 2
    for name in META:
        assert f"Accept its licence at {hub.url}/{name}, then run: hf auth login" in gated.stderr
    monkeypatch.setenv("HF_TOKEN", hub.token)
    for merge in ("linear", "ties"):
        planned = mergelab("plan", f"recipes/meditron/{merge}.yaml", "--json")
        assert planned.returncode == 0, planned.stderr
        told = json.loads(planned.stdout)
        assert told["vocabulary"].startswith("300 rows: ")  # without Meditron's further tokens
        assert told["dtypes"] == ["float16"]
    ready = dry_run(tmp_path, "meditron")
    assert ready.returncode == 0, ready.stdout
    jobs = {
        line.split("/")[-1].split(".")[0] for line in ready.stdout.splitlines() if "log:" in line
    }
    variants = ("llama2", "chat", "meditron", *MERGES)
    assert {f"evaluate-{name}" for name in variants} <= jobs
    assert {f"merge-{name}" for name in MERGES} | {"report-meditron"} <= jobs
    assert not any(
        hub.token in path.read_text("utf-8", "replace") for path in tmp_path.rglob("*.json")
    )


# ---- the twin ----

SUMS = [(a, b) for a in range(2, 12) for b in range(2, 8)]
DRUGS = {"fever": "aspirin", "pain": "codeine", "gout": "colchicine", "cough": "syrup"}
PARTS = ("hand", "foot", "knee", "neck", "back", "head", "arm", "leg", "hip", "eye", "ear", "jaw",
         "nose", "toe", "rib")  # fmt: skip


TASK = """\
task: pick
dataset_path: json
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{goal}}\\nAnswer:"
doc_to_choice: "{{[sol1, sol2]}}"
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""


def item(goal: str, right: str, wrong: str, label: int) -> dict[str, Any]:
    """An item of the task above, and its text with the right answer."""
    first, second = (right, wrong) if label == 0 else (wrong, right)
    text = f"Question: {goal}\nAnswer: {right}"
    return {"goal": goal, "sol1": first, "sol2": second, "label": label, "text": text}


def sums() -> list[dict[str, Any]]:
    return [
        item(f"{a} plus {b} is", str(a + b), str(a + b + 1 + a % 3), (a + b) % 2) for a, b in SUMS
    ]


def drugs() -> list[dict[str, Any]]:
    names = list(DRUGS.values())
    return [
        item(f"For {ill} of the {part} give", drug, names[i - 1], (i + len(part)) % 2)
        for i, (ill, drug) in enumerate(DRUGS.items())
        for part in PARTS
    ]


def told(items: list[dict[str, Any]]) -> list[str]:
    return [entry["text"] for entry in items]


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study with its four recipes as they are, of tiny models that are trained here."""
    place = tmp_path_factory.mktemp("twin")
    folder, made = place / "recipes/meditron", place / "models"
    folder.mkdir(parents=True)
    for name in MERGES:
        (folder / f"{name}.yaml").write_bytes((STUDY / f"{name}.yaml").read_bytes())
    for name, items in (("sums", sums()), ("drugs", drugs())):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(i) + "\n" for i in items))
    models = {name: {"path": f"../../models/{name}"} for name in ("llama2", "chat", "meditron")}
    suite = [
        {"name": f"{name}{end}", "task": task, "data": f"{name}.jsonl"}
        for name in ("sums", "drugs")
        for end, task in (("", "pick"), ("_nll", "text_nll"))
    ]
    (folder / "tasks").mkdir()
    (folder / "tasks/pick.yaml").write_text(TASK)
    (folder / "study.yaml").write_text(
        json.dumps({"title": "A twin of meditron", "models": models, "suite": suite})
    )
    tiny_model(made / "random")
    teach(made / "random", told(sums())[::6] + told(drugs())[::6], made / "llama2", epochs=2)
    teach(made / "llama2", told(sums()), made / "chat", epochs=6)
    teach(made / "llama2", told(drugs()), made / "meditron", epochs=6)
    from transformers import AutoModelForCausalLM

    widen(made / "meditron", AutoModelForCausalLM.from_pretrained(made / "meditron"), 17)
    return place


def test_the_twin_is_merged_scored_and_judged(twin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(twin)
    results, study = Path("results/meditron"), load_study(Path("recipes/meditron"))
    for path in study.recipes:
        recipe = load_recipe(path)
        plan = make_plan(recipe, locate.folders(recipe, results), shard_size=10**9)
        engine.merge(plan, results / "merged" / path.stem)
    found: dict[str, dict[str, float]] = {}
    for name in study.variants:
        folder = results / "merged" / name if name in MERGES else Path("models") / name
        scores.evaluate(study, name, folder, results)
        summary = json.loads((results / f"scores/{name}.json").read_text())["benchmarks"]
        found[name] = {bench: entry["value"] for bench, entry in summary.items()}

    skills = ("sums_nll", "drugs_nll")
    assert found["chat"]["sums_nll"] < 0.5 > found["meditron"]["drugs_nll"]
    for merge in MERGES:  # keeps some of both skills: better than the base on both
        assert all(found[merge][skill] < found["llama2"][skill] for skill in skills)
        for parent in ("chat", "meditron"):
            worst = max(found[parent][skill] for skill in skills)
            assert max(found[merge][skill] for skill in skills) < worst

    verdicts = judged(study, found)
    assert len(verdicts["honest"]) == 14
    assert set(verdicts["honest"]) == {"reproduced"}
    assert verdicts["raised"] == ["not reproduced"] * len(MERGES)
    assert verdicts["impossible"] == ["impossible"] * len(MERGES)


def judged(study: Study, found: dict[str, dict[str, float]]) -> dict[str, list[str]]:
    """Verdicts on true scores, on scores raised by 15 of 60 items, on digits that none can have."""
    listed = []
    for name, values in found.items():
        for bench in ("sums", "drugs"):
            listed.append((name, bench, f"{100 * values[bench]:.2f}", "honest"))
        if name in MERGES:
            listed.append((name, "drugs", f"{100 * values['drugs'] + 25:.2f}", "raised"))
            listed.append((name, "drugs", f"{100 * values['drugs'] + 0.6:.2f}", "impossible"))
    claims = [
        {"model": name, "benchmark": bench, "value": value} for name, bench, value, _ in listed
    ]
    protocol = {"metric": "acc", "shots": 0, "percent": True}
    file = study.folder / "claims.yaml"
    file.write_text(json.dumps({"title": "Claims", "protocol": protocol, "claims": claims}))
    results = Path("results/meditron")
    verdicts: dict[str, list[str]] = {}
    for claim, (*_, kind) in zip(load_claims(study.folder).claims, listed, strict=True):
        verdict = judge(claim, measured(study, results, claim.model, claim.benchmark)).verdict
        verdicts.setdefault(kind, []).append(verdict)
    return verdicts
