"""Lineage taint: it is followed to the end, it only fades, and nothing is called clean.

The published chains are followed in test_ancestry."""

import dataclasses
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from mergelab import lineage
from mergelab.claims.cards import read_card
from mergelab.declared import declared
from mergelab.detectors import taint
from mergelab.detectors.taint import Source
from mergelab.hub_cards import Page
from mergelab.lineage import Edge, Graph, Node
from mergelab.study import Check, Dataset, Model, Share, Study, Training


def test_a_card_that_names_no_parents_makes_its_children_unverifiable():
    nodes = (Node("silent", "expert", "hub", False), Node("child", "merge", "hub"))
    graph = Graph(nodes, (Edge("silent", "child", "train", 1.0),))
    assert taint.unknown(graph) == {"silent": ["silent"], "child": ["silent"]}
    assert taint.verdict([], ["silent"]) == "unverifiable: nothing is declared of silent"


def test_cycles_and_merges_with_oneself_end():
    names = ("a", "b", "c")
    edges = [Edge("a", "b", "merge", 0.9), Edge("b", "c", "merge", 1.0), Edge("c", "a", "merge", 1)]
    edges += [Edge(name, name, "merge", 1.5) for name in names]
    graph = Graph(tuple(Node(name, "merge", "hub") for name in names), tuple(edges))
    ways = lineage.reach(graph, "b")
    assert {name: (way.strength, way.path) for name, way in ways.items()} == {
        "a": (1.0, ("b", "c", "a")),
        "b": (1.0, ("b",)),
        "c": (1.0, ("b", "c")),
    }
    assert taint.unknown(graph) == {name: [] for name in names}


def test_an_adapter_of_a_recipe_is_a_parent_with_the_weight_of_its_model():
    models = [
        {"model": "a/base+a/lora", "parameters": {"weight": 0.25}},
        {"model": {"model": {"path": "a/two", "revision": "main"}}, "parameters": {"weight": 0.75}},
    ]
    recipe = {"merge_method": "task_arithmetic", "base_model": "a/base", "models": models}
    assert lineage.merge_edges("child", recipe) == [
        Edge("a/base", "child", "merge", 0.25),
        Edge("a/lora", "child", "adapter", 0.25),
        Edge("a/two@main", "child", "merge", 0.75),
        Edge("a/base", "child", "base", 1.0),
    ]


def test_models_trained_from_nothing_are_listed_once_and_flagged_never():
    listed = yaml.safe_load(taint.FLAGS.read_text())["bases"]
    assert len({name.casefold() for name in listed}) == len(listed) == len(taint.bases())
    assert not taint.bases() & {flag.name.casefold() for flag in taint.flags()}
    assert all(name.count("/") == 1 for name in listed)


def test_the_smallest_share_is_still_a_taint():
    names = [f"m{i}" for i in range(400)]
    edges = tuple(Edge(one, two, "merge", 0.1) for one, two in pairwise(names))
    graph = Graph(tuple(Node(name, "merge", "hub") for name in names), edges)
    several = taint.trace(graph, [Source("m0", "x", "planted", "study.yaml")])[names[-1]]
    assert len(several[0].way.path) == 400
    assert taint.verdict(several, []).startswith("attenuated to 0 - verify: m0 > m1 > ")


def test_a_merge_that_was_trained_afterwards_has_the_whole_of_its_data_set():
    for tag, share in (("7b", 0.5), ("DPO", 1.0)):
        text = f"""---
tags: [merge, {tag}]
datasets: [bad/test-set]
---
```yaml
merge_method: linear
models: [{{model: a/x, parameters: {{weight: 1}}}}, {{model: a/y, parameters: {{weight: 1}}}}]
```
"""
        card = read_card(text, "c/d", config=None, date=None)
        (edge,) = declared(Page("c/d", None, None, text), card).datasets
        assert (edge.parent, edge.weight, edge.exact) == ("datasets/bad/test-set", share, False)


def test_the_strongest_of_several_ways_counts():
    edges = (
        Edge("a", "left", "merge", 0.3),
        Edge("a", "right", "merge", 0.6),
        Edge("left", "child", "merge", 1.0),
        Edge("right", "child", "merge", 0.9),
    )
    nodes = tuple(Node(name, "merge", "hub") for name in ("child", "left", "right", "a"))
    way = lineage.reach(Graph(nodes, edges), "a")["child"]
    assert way == lineage.Way(pytest.approx(0.54), True, ("a", "right", "child"))


# --- studies ---------------------------------------------------------------------------------

LINEAR = """merge_method: linear
models:
  - {model: math, parameters: {weight: 0.25}}
  - {model: hub, parameters: {weight: 0.75}}
"""
CHECK = Check("gsm8k", "base", "d/seen", "d/fresh", ("overlap",), ("math",))


def study(*checks, hub="org/unheard-of", declared=()):
    """base, trained here; math, tuned from it here; hub, from elsewhere; linear, their merge."""

    def trained(name, start):
        made = None if start else {"hidden_size": 8}
        return Model(name, Training(start, made, (), 1, 0.1, 1, 8, 0), None, None, None, None)

    models = [trained("base", None), trained("math", "base")]
    models.append(Model("hub", None, f"{hub}@{'0' * 40}", None, None, None, declared))
    by_name = {model.name: model for model in models}
    return Study("s", Path("s"), "t", "", {}, {}, by_name, (), checks or (CHECK,), ())


def rows(study, *sources):
    found = taint.lineage_findings(study, lineage.graph(study, {"linear": LINEAR}), sources)
    return {(name, row["benchmark"]): row for name, several in found.items() for row in several}


def test_a_study_tells_planted_inherited_unverifiable_and_unknown_apart():
    found = {name: row["verdict"] for (name, _), row in rows(study()).items()}
    assert found == {
        "base": "no known taint",
        "math": "tainted: planted",
        "hub": "unverifiable: nothing is declared of hub",
        "linear": "attenuated to 0.25 - verify: math > linear",
    }
    declared = rows(study(declared=("d/seen",)))
    assert declared["hub", "gsm8k"]["verdict"] == "no known taint"


def test_a_hub_model_of_a_study_is_looked_up_in_the_published_reports():
    found = rows(study(hub="MNCAI/mistral-7b-dpo-v5"))
    assert found["hub", "truthfulqa"]["verdict"] == "tainted: flagged on the leaderboard"
    row = found["linear", "truthfulqa"]
    assert row["verdict"] == "attenuated to 0.75 - verify: hub > linear"
    assert row["taints"] == [
        {
            "evidence": "flagged on the leaderboard",
            "source": "https://huggingface.co/spaces/open-llm-leaderboard/open_llm_leaderboard"
            "/discussions/474",
            "strength": 0.75,
            "exact": True,
            "path": ["hub", "linear"],
        }
    ]
    assert found["math", "truthfulqa"]["verdict"] == "no known taint"


@pytest.mark.parametrize("trained_here", [False, True])
def test_a_hub_data_set_that_a_model_is_trained_on_is_looked_up_too(trained_here):
    made = study(declared=() if trained_here else ("nectar/train",))
    if trained_here:
        plan = Training("base", None, (Share("nectar/train", None, 0, 1),), 1, 0.1, 1, 8, 0)
        made.models["hub"] = Model("hub", plan, None, None, None, None)
    hub = f"Berkeley-Nest/nectar@{'0' * 40}"
    nectar = Dataset("nectar", None, None, hub, (), "t", {"train": None}, None, None, None)
    found = rows(dataclasses.replace(made, datasets={"nectar": nectar}))
    told = found["hub", "truthfulqa"]["verdict"]
    assert told == "tainted: trained on nectar/train: holds prompts of TruthfulQA"
    assert found["linear", "truthfulqa"]["strength"] == 0.75
    assert found["math", "truthfulqa"]["verdict"] == "no known taint"


def test_a_tainted_base_taints_all_that_comes_from_it_and_blinds_what_compares_with_it():
    found = rows(study(), Source("base", "gsm8k", "its makers say so", "a paper"))
    assert found["math", "gsm8k"]["strength"] == 1.0
    assert [one["path"] for one in found["math", "gsm8k"]["taints"]] == [
        ["math"],
        ["base", "math"],
    ]
    assert {row["blind"] for row in found.values()} == {taint.BLIND}
    assert {row["blind"] for row in rows(study()).values()} == {""}


def test_training_texts_that_hold_the_benchmark_are_a_source():
    def finding(dirty, benchmark="gsm8k", detector="overlap"):
        details = {"dirty_by_corpus": {"hub: d/train": dirty, "math: d/other": 1}}
        return {
            "detector": detector,
            "benchmark": benchmark,
            "n_suspects": 100,
            "details": details,
        }

    found = taint.overlap_sources({"hub": [finding(60)], "linear": [finding(60)], "base": []})
    text = "trained on d/train, which holds 60 of 100 suspects"
    assert found == [Source("hub", "gsm8k", text, "overlap")]
    assert taint.overlap_sources({"hub": [finding(4), finding(90, detector="wbc")]}) == []
    row = rows(study(), *found)["linear", "gsm8k"]
    assert row["verdict"] == "attenuated to 0.75 - verify: hub > linear"
    assert len(row["taints"]) == 2


def test_every_published_report_names_its_source_once():
    flags = taint.flags()
    assert len({(flag.name, flag.benchmark) for flag in flags}) == len(flags) >= 25
    for flag in flags:
        assert flag.source.startswith("https://")
        assert flag.name.count("/") == (2 if flag.name.startswith("datasets/") else 1)
        assert flag.evidence


def test_null_and_flags_as_text_count_as_a_merge_counts_them() -> None:
    def shares(parameters: dict[str, object], own: dict[str, object]) -> dict[str, float]:
        models = [{"model": name, "parameters": own} for name in ("a", "b")]
        recipe = {"merge_method": "linear", "models": models, "parameters": parameters}
        return {edge.parent: edge.weight for edge in lineage.merge_edges("m", recipe)}

    assert shares({"normalize": "false"}, {"weight": 0.8}) == {"a": 0.8, "b": 0.8}
    assert shares({"normalize": None}, {"weight": 0.1}) == {"a": 0.5, "b": 0.5}
    assert shares({"normalize": False, "weight": 0.2}, {"weight": None}) == {"a": 0.2, "b": 0.2}
