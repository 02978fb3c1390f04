"""Paired comparisons and aggregates, on score tables as scores/<variant>.parquet holds them."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from tiny import tiny_study

from mergelab import aggregates, comparison, items, suites
from mergelab import statistics as st
from mergelab.aggregates import Part
from mergelab.study import Check
from mergelab.suites import Benchmark, Pin

KINDS = {"base": "base", "good": "expert", "same": "expert", "merge": "merge"}
PARENTS = {"good": ("base",), "same": ("base",), "merge": ("good", "same")}
EASY = Benchmark("easy", "arc_easy", "arc/test", None, 0)


def table(benchmark, values, *, metric="acc", task=None, cluster=None, weight=None):
    """A score table as mergelab evaluate writes it: one row per item."""
    ids = [f"q{i}" for i in range(len(values))]
    names = [f"{task or benchmark} {name}" for name in ids]
    columns = {
        "benchmark": benchmark,
        "task": task or benchmark,
        "id": ids,
        "doc_hash": [f"d {name}" for name in names],
        "prompt_hash": [f"p {name}" for name in names],
        "target_hash": [f"t {name}" for name in names],
        "filter": "none",
        "resps": [[-1.0, -2.0]] * len(ids),
        "response": "",
        "metric": metric,
        "value": np.asarray(values, dtype=float),
        "weight": np.ones(len(ids)) if weight is None else np.asarray(weight, dtype=float),
        "cluster": cluster if cluster is not None else "",
    }
    rows = pd.DataFrame(columns)
    return rows.sort_values(["benchmark", "id", "filter", "metric"]).reset_index(drop=True)


def flipped(values, wins, losses):
    """The same right and wrong answers, but `wins` more right and `losses` more wrong."""
    out = np.array(values, dtype=float)
    out[np.flatnonzero(out == 0)[:wins]] = 1
    out[np.flatnonzero(np.asarray(values) == 1)[:losses]] = 0
    return out


def entry(rows, metric="acc", higher=True, name="easy"):
    mine = rows[(rows["benchmark"] == name) & (rows["metric"] == metric.partition(",")[0])]
    return {
        "metric": metric,
        "value": float(mine["value"].sum() / mine["weight"].sum()),
        "ci95": [0.0, 1.0],
        "n": len(mine),
        "higher_is_better": higher,
        "chance": 0.25,
        "num_fewshot": 0,
        "task_hash": "h",
    }


BASE = (np.random.default_rng(0).uniform(size=400) < 0.5).astype(float)


@pytest.fixture
def tables():
    return {
        "base": table("easy", BASE),
        "good": table("easy", flipped(BASE, 50, 10)),
        "same": table("easy", BASE),
        "merge": table("easy", flipped(BASE, 22, 20)),
    }


def built(tmp_path, tables, suite=(EASY,), flagged=None, checks=(), told=None):
    study = tiny_study(tmp_path / "s", suite=suite, checks=checks)
    summaries = {
        v: {
            "benchmarks": {
                b.name: entry(rows, name=b.name) | (told or {}).get(v, {}) for b in suite
            }
        }
        for v, rows in tables.items()
    }
    args = (KINDS, PARENTS, summaries, tables)
    return comparison.benchmark_table(study, suite[0], *args, flagged or {})


def row(bench, variant):
    return next(row for row in bench["rows"] if row["variant"] == variant)


def test_a_comparison_says_all_that_a_reader_needs(tmp_path, tables):
    found = row(built(tmp_path, tables), "good")["vs_base"]
    assert found["difference"] == pytest.approx(0.1)
    assert found["test"] == "McNemar mid-p"
    assert found["p"] == st.mcnemar(50, 10)
    assert found["discordance"] == 60 / 400
    assert found["mde"] == pytest.approx(2.8016 * (0.15 / 400) ** 0.5, rel=1e-4)
    assert found["ci95"][0] < 0.1 < found["ci95"][1]
    assert (found["verdict"], found["n"], found["q"]) == ("better", 400, None)


def test_equal_variants_are_not_told_apart_and_claim_no_power(tmp_path, tables):
    found = row(built(tmp_path, tables), "same")["vs_base"]
    assert (found["difference"], found["p"], found["verdict"]) == (0.0, 1.0, "unsettled")
    assert (found["mde"], found["discordance"]) == (None, 0.0)


def test_a_merge_is_compared_with_its_best_parent(tmp_path, tables):
    found = row(built(tmp_path, tables), "merge")["vs_parent"]
    assert (found["parent"], found["verdict"]) == ("good", "worse")


def test_no_difference_to_the_base_enters_twice(tmp_path, tables, monkeypatch):
    found = built(tmp_path, tables)
    assert [row(found, v)["vs_parent"] for v in ("base", "good", "same")] == [None] * 3
    monkeypatch.setitem(PARENTS, "merge", ("base", "same"))
    assert row(built(tmp_path, tables), "merge")["vs_parent"]["parent"] == "same"
    monkeypatch.setitem(PARENTS, "merge", ("base",))
    assert row(built(tmp_path, tables), "merge")["vs_parent"] is None


def test_the_best_and_those_that_cannot_be_told_apart_from_it(tmp_path, tables):
    tables["merge"] = table("easy", flipped(BASE, 49, 10))
    found = built(tmp_path, tables)
    assert (found["top"], found["best"]) == ("good", ["good", "merge"])
    assert found["not_compared"] == []


@pytest.mark.parametrize("column", ["prompt_hash", "target_hash", "doc_hash", "id"])
def test_variants_that_saw_other_items_or_prompts_are_never_compared(tmp_path, tables, column):
    tables["good"].loc[7, column] = "other"
    found = built(tmp_path, tables)
    assert row(found, "good")["vs_base"] is None
    assert row(found, "merge")["vs_parent"] is None
    assert row(found, "merge")["vs_base"]["p"] < 1
    assert (found["top"], found["not_compared"]) == ("good", ["base", "same", "merge"])
    assert "easy: the variants saw different items or prompts." in found["differs"]


def test_the_report_tells_chats_and_templates_that_differ(tmp_path, tables):
    chat = {"chat_template": True, "fewshot_as_multiturn": True}
    told = {v: chat | {"chat_template_sha": v[0] * 64} for v in tables}
    found = built(tmp_path, tables, told=told)
    assert chat.items() <= found.items()
    assert any("chat_template_sha is not the same for all" in text for text in found["differs"])
    assert not chat.keys() & built(tmp_path, tables).keys()


def test_the_order_of_rows_does_not_matter(tmp_path, tables):
    once = built(tmp_path, tables)
    mixed = {v: rows.sample(frac=1, random_state=1) for v, rows in tables.items()}
    assert built(tmp_path, mixed) == once


def test_q_is_over_the_whole_table(tmp_path, tables):
    found = [built(tmp_path, tables), built(tmp_path, tables)]
    comparison._adjust(found)
    every = [r[k] for b in found for r in b["rows"] for k in ("vs_base", "vs_parent") if r[k]]
    assert len(every) == 2 * 4
    assert [c["q"] for c in every] == pytest.approx(
        list(stats.false_discovery_control([c["p"] for c in every]))
    )
    json.dumps(found, allow_nan=False)


def test_clean_scores_leave_out_the_flagged_items(tmp_path, tables):
    ids = {f"q{i}" for i in range(100)}
    found = built(tmp_path, tables, flagged={("easy", "good"): ids, ("easy", "merge"): set()})
    kept = flipped(BASE, 50, 10)[100:]
    clean = row(found, "good")["clean"]
    assert (clean["value"], clean["n"]) == (kept.mean(), 300)
    assert clean["ci95"] == pytest.approx(st.wilson(kept.sum(), 300))
    assert row(found, "merge")["clean"]["n"] == 400
    assert row(found, "base")["clean"] is None
    assert items.restricted(tables["good"], EASY, "acc", {f"q{i}" for i in range(400)}) is None


def test_the_twin_stands_beside_the_published_benchmark(tmp_path, tables):
    twin = Benchmark("twin", "arc_easy", "arc/twin", None, 0)
    both = {v: pd.concat([rows, table("twin", 1 - BASE)]) for v, rows in tables.items()}
    check = Check("arc", "base", "a/x", "a/y", (), (), scores="easy", twin="twin")
    found = row(built(tmp_path, both, (EASY, twin), checks=(check,)), "good")["twin"]
    assert found == {
        "benchmark": "twin",
        "value": 1 - BASE.mean(),
        "ci95": [0.0, 1.0],
        "n": 400,
    }


def test_items_of_one_passage_count_as_one():
    rng = np.random.default_rng(1)
    effect = np.repeat(rng.choice([0.0, 1.0], 50), 8)
    passages = [f"p{i // 8}" for i in range(400)]
    ours, theirs = (
        table("easy", effect, cluster=passages),
        table("easy", 1 - effect, cluster=passages),
    )
    alone = [table("easy", values) for values in (effect, 1 - effect)]
    wide, narrow = (
        comparison.compare(*(items.items_of(rows, EASY, "acc") for rows in pair), True)
        for pair in ((ours, theirs), alone)
    )
    assert (wide["test"], narrow["test"]) == ("sign flips of clusters", "McNemar mid-p")
    assert np.ptp(wide["ci95"]) > 2.3 * np.ptp(narrow["ci95"])  # sqrt(8) in theory
    assert wide["p"] > narrow["p"] or wide["p"] == 1.0
    assert wide["mde"] == pytest.approx(narrow["mde"] * 8**0.5)


def test_bits_per_byte_is_the_difference_of_the_two_summaries():
    rng = np.random.default_rng(2)
    sizes = rng.integers(20, 80, 50)
    pair = [
        items.items_of(
            table("easy", sizes * rate, metric="bits_per_byte", weight=sizes), EASY, "bits_per_byte"
        )
        for rate in (0.9, 1.1)
    ]
    found = comparison.compare(*pair, higher=False)
    assert found["difference"] == pytest.approx(-0.2)
    assert found["ci95"] == pytest.approx([-0.2, -0.2])
    assert (found["test"], found["discordance"]) == ("sign flips of items", None)
    assert (found["p"], found["verdict"]) == (1e-4, "better")


def test_a_metric_may_name_its_filter():
    one = table("easy", [1.0, 0, 0], metric="exact_match")
    rows = pd.concat([one.assign(filter=name) for name in ("strict", "flexible")])
    rows.loc[rows["filter"] == "flexible", "value"] = 1.0
    assert items.items_of(rows, EASY, "exact_match,strict").parts[0].value.sum() == 1
    assert items.items_of(rows, EASY, "exact_match,flexible").parts[0].value.sum() == 3
    assert items.items_of(rows, EASY, "exact_match,none") is None


def group(scores, combine="tasks", chances=None):
    """A benchmark of several tasks of different size, and its table."""
    chances = chances or dict.fromkeys(scores)
    pins = tuple(Pin(name, "", chances[name]) for name in scores)
    bench = Benchmark("s.mmlu", "mmlu", None, None, 5, suite="s", pins=pins, combine=combine)
    rows = [table("s.mmlu", values, task=name) for name, values in scores.items()]
    return bench, pd.concat(rows)


def test_mmlu_is_the_mean_of_its_subjects_or_of_its_items():
    scores = {"anatomy": [1.0] * 30 + [0.0] * 10, "law": [0.0, 1.0] * 200}
    bench, rows = group(scores)
    by_task = aggregates.score(items.items_of(rows, bench, "acc").parts)
    bench, rows = group(scores, "items")
    by_item = aggregates.score(items.items_of(rows, bench, "acc").parts)
    assert by_task["value"] == pytest.approx((0.75 + 0.5) / 2)
    assert by_item["value"] == pytest.approx(230 / 440)
    assert by_task["n"] == by_item["n"] == 440
    assert by_item["ci95"] == pytest.approx(st.wilson(230, 440))
    error = 0.5 * (0.75 * 0.25 / 40 + 0.5 * 0.5 / 400) ** 0.5  # delta method, within subjects
    assert np.ptp(by_task["ci95"]) == pytest.approx(2 * 1.96 * error, rel=0.05)


def test_an_aggregate_covers_the_truth():
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(300):
        parts = [
            Part((rng.uniform(size=n) < p) * 1.0, np.ones(n)) for n, p in ((60, 0.8), (200, 0.4))
        ]
        low, high = aggregates.score(aggregates.mean_of([[part] for part in parts]))["ci95"]
        hits += low <= 0.6 <= high
    assert 0.91 <= hits / 300 <= 0.98


def test_the_difference_of_an_aggregate_covers_the_truth_and_its_p_is_uniform():
    rng = np.random.default_rng(4)
    hits, p = 0, []
    for _ in range(500):
        ours, theirs = [], []
        for n in (70, 160):
            skill = rng.uniform(size=n)
            pair = (skill + rng.normal(0, 0.5, (2, n)) > 0.5) * 1.0
            ours.append(Part(pair[0], np.ones(n)))
            theirs.append(Part(pair[1], np.ones(n)))
        found = aggregates.difference(
            *(aggregates.mean_of([[part] for part in side]) for side in (ours, theirs))
        )
        low, high = found["ci95"]
        hits += low <= 0 <= high
        p.append(found["p"])
    assert 0.92 <= hits / 500 <= 0.98
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_a_normalised_score_puts_chance_at_zero_and_never_goes_below():
    scores = {"two": [1.0] * 75 + [0.0] * 25, "four": [1.0] * 10 + [0.0] * 90}
    bench, rows = group(scores, chances={"two": 0.5, "four": 0.25})
    found = items.items_of(rows, bench, "acc", normalised=True)
    assert aggregates.score(found.parts)["value"] == pytest.approx(0.5 * 0.5)  # (0.75 - 0.5) / 0.5
    better = rows.assign(value=rows["value"].where(rows["task"] != "four", 1.0))
    other = items.items_of(better, bench, "acc", normalised=True)
    gain = aggregates.difference(other.parts, found.parts)
    assert gain["difference"] == pytest.approx(0.5)
    assert gain["ci95"] == pytest.approx([0.5, 0.5])


def test_two_metrics_of_the_same_items_are_resampled_together():
    right = (np.random.default_rng(6).uniform(size=400) < 0.5) * 1.0
    apart = [Part(right, np.ones(400), share=0.5) for _ in range(2)]
    together = [replace(part, items="x") for part in apart]
    wrong = [replace(part, value=1 - part.value) for part in together]
    alone = aggregates.score([Part(right, np.ones(400), chance=0.0)])["ci95"]
    assert aggregates.score(together)["ci95"] == pytest.approx(alone)
    assert np.ptp(aggregates.score(apart)["ci95"]) < 0.8 * np.ptp(alone)
    whole = aggregates.difference(together, wrong)
    assert whole["mde"] == pytest.approx(st.detectable(1 / 20))
    assert aggregates.difference(apart, wrong)["mde"] == pytest.approx(st.detectable(1 / 800**0.5))


def leaderboard(suite, values):
    """The suite's number by hand; values[benchmark][task] are lists of right and wrong."""
    groups = {}
    for bench in suite.benchmarks:
        pins = bench.tasks if bench.combine == "tasks" else bench.tasks[:1]
        scores = []
        for pin in pins:
            named = [pin.task] if bench.combine == "tasks" else [p.task for p in bench.tasks]
            raw = np.mean(np.concatenate([values[bench.name][task] for task in named]))
            low = (pin.chance or 0.0) if suite.aggregate == "normalised" else 0.0
            scores.append(max(0.0, raw - low) / (1 - low))
        groups.setdefault(bench.group or bench.name, []).append(np.mean(scores))
    return np.mean([np.mean(scores) for scores in groups.values()])


@pytest.mark.parametrize("name", ["open_llm_v1", "open_llm_v2", "nous", "meditron"])
def test_suites_are_aggregated_as_their_leaderboard_does(tmp_path, name):
    rng = np.random.default_rng(5)
    whole = suites.load_suite(name)
    study = tiny_study(tmp_path / "s", suite=whole.benchmarks)
    tables, summaries, values = {}, {}, {}
    for variant, skill in (("base", 0.35), ("good", 0.7)):
        drawn = {
            bench.name: {
                pin.task: (rng.uniform(size=8 + i % 7) < skill) * 1.0
                for i, pin in enumerate(bench.tasks)
            }
            for bench in whole.benchmarks
        }
        rows = [
            table(bench.name, drawn[bench.name][pin.task], metric=metric, task=pin.task).assign(
                filter=chosen or "none"
            )
            for bench in whole.benchmarks
            for metric, _, chosen in [bench.metric.partition(",")]
            for pin in bench.tasks
        ]
        known = {
            bench.name: {"metric": bench.metric, "higher_is_better": True}
            for bench in whole.benchmarks
        }
        tables[variant], summaries[variant] = pd.concat(rows), {"benchmarks": known}
        values[variant] = leaderboard(whole, drawn)
    (found,) = comparison.suite_tables(study, KINDS, PARENTS, summaries, tables)
    assert (found["name"], found["aggregate"]) == (name, whole.aggregate)
    assert [row(found, v)["value"] for v in values] == pytest.approx(list(values.values()))
    gain = row(found, "good")["vs_base"]
    assert gain["difference"] == pytest.approx(values["good"] - values["base"])
    assert gain["verdict"] == "better"
    assert row(found, "merge")["value"] is None
