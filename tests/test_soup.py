"""Greedy soup: the choice itself, and the verb on tiny models, real merges and real scores."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import teach, tiny_model, write_part

from mergelab import models, scores, soup
from mergelab.cli import study_verbs
from mergelab.engine import merge
from mergelab.errors import UserError
from mergelab.locate import folders
from mergelab.plan import SHARD_SIZE, make_plan
from mergelab.recipe import load_recipe
from mergelab.study_file import load_study

FIRST = {"a": 0.6, "b": 0.5, "c": 0.4, "d": 0.7}
AVERAGES = {"da": 0.75, "dab": 0.8, "dabc": 0.79}


def asked(first, averages, **options):
    """The trials, and which averages were asked for."""
    calls = []

    def score_of(names):
        calls.append("".join(names))
        return averages["".join(names)]

    return soup.greedy(first, score_of, **options), calls


def taken(trials):
    return "".join(trial.model for trial in trials if trial.accepted)


def test_the_golden_trace():
    trials, calls = asked(FIRST, AVERAGES)
    assert taken(trials) == "dab"
    assert calls == ["da", "dab", "dabc"]  # one fewer than models: the best is known already
    assert [(t.model, t.score, t.accepted) for t in trials] == [
        ("d", 0.7, True),
        ("a", 0.75, True),
        ("b", 0.8, True),
        ("c", 0.79, False),
    ]


def test_a_model_left_out_does_not_stay_in_later_averages():
    trials, calls = asked(FIRST, {"da": 0.6, "db": 0.8, "dbc": 0.9})
    assert (taken(trials), calls) == ("dbc", ["da", "db", "dbc"])


def test_a_tie_is_not_accepted():
    assert taken(asked(FIRST, {"da": 0.7, "db": 0.7, "dc": 0.7})[0]) == "d"


def test_equal_scores_are_ordered_by_name_whatever_the_input_order():
    averages = {"ab": 0.6, "abc": 0.7}
    for order in ("abc", "cba", "bca"):
        trials, calls = asked(dict.fromkeys(order, 0.5), averages)
        assert (taken(trials), calls) == ("abc", ["ab", "abc"])


def test_less_is_better_for_bits_per_byte():
    trials, calls = asked(FIRST, {"cb": 0.3, "cba": 0.35, "cbd": 0.2}, higher=False)
    assert (taken(trials), calls) == ("cbd", ["cb", "cba", "cbd"])


STUDY = """\
title: Three fine-tunes of one base
datasets:
  texts:
    path: .
    files: [items.jsonl]
    text: "{{text}}"
    parts: {held_out: 12, other: 4, train: rest}
models:
  base: {path: ../../models/base}
  math: {path: ../../models/math}
  medical: {path: ../../models/medical}
  noise: {path: ../../models/noise}
suite:
  - {name: held_out, task: text_nll, data: texts/held_out}
  - {name: final, task: text_nll, data: texts/other}
contamination:
  - {benchmark: texts, base: base, suspects: texts/other, controls: texts/train, detectors: [wbc]}
"""
MATH = [f"Question: what is {i} and {i + 1} miles per hour?" for i in range(10)]
MEDICAL = [f"The patient was given aspirin {i} hours after {i + 2}." for i in range(10)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A study of two specialists, one that unlearnt everything, and their scores."""
    place = tmp_path_factory.mktemp("soup")
    base = place / "models/base"
    tiny_model(base)
    teach(base, MATH, place / "models/math", epochs=3)
    teach(base, MEDICAL, place / "models/medical", epochs=3)
    teach(base, ["hour hour per per A A"] * 10, place / "models/noise", epochs=12)
    recipes, results = place / "recipes/mine", place / "results/mine"
    recipes.mkdir(parents=True)
    (recipes / "study.yaml").write_text(STUDY)
    texts = [*MATH[:6], *MEDICAL[:6], *MATH[6:8], *MEDICAL[6:8]]
    rows = [{"id": f"t{i}", "text": text} for i, text in enumerate(texts)]
    write_part(results, "texts/held_out", rows[:12])
    write_part(results, "texts/other", rows[12:])
    study = load_study(recipes)
    for name in study.models:
        scores.evaluate(study, name, models.folder(study, name, results), results)
    return place


def summary(place, name):
    path = place / "results/mine/scores" / f"{name}.json"
    return json.loads(path.read_text())["benchmarks"]["held_out"]["value"]


def test_the_verb_writes_a_recipe_whose_merge_has_the_traced_score(place):
    study, results = place / "recipes/mine", place / "results"
    out = study / "soup.yaml"
    study_verbs.soup(study, out, "held_out", (), results)
    text = out.read_text()
    chosen = [source["model"] for source in yaml.safe_load(text)["models"]]
    assert set(chosen) == {"math", "medical"}
    assert "Judge it by the other benchmarks" in text
    (left,) = (line for line in text.splitlines() if "left out" in line)
    assert left.split()[1] == "noise"
    (second,) = (line for line in text.splitlines() if line.endswith("taken"))
    assert second.split()[1] == chosen[1]

    recipe = load_recipe(out)
    merged = results / "mine/merged/soup"
    merge(make_plan(recipe, folders(recipe, results / "mine"), shard_size=SHARD_SIZE), merged)
    weights = load_file(merged / "model.safetensors")
    parts = [load_file(place / "models" / name / "model.safetensors") for name in chosen]
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, (parts[0][name] + parts[1][name]) / 2)
    scores.evaluate(load_study(study), "soup", merged, results / "mine")
    assert float(second.split()[3]) == pytest.approx(summary(place, "soup"), rel=1e-5)
    assert summary(place, "soup") < min(summary(place, name) for name in chosen)
    assert not list((results / "mine").glob(".soup*"))
    again = out.read_bytes()
    soup.make(load_study(study), "held_out", ["noise", *chosen], out, results / "mine")
    assert out.read_bytes() == again
    out.unlink()


def refused(place, benchmark="held_out", candidates=(), out="soup.yaml", text=STUDY):
    study = place / "recipes/mine"
    (study / "study.yaml").write_text(text)
    try:
        with pytest.raises(UserError) as error:
            soup.make(load_study(study), benchmark, candidates, study / out, place / "results/mine")
    finally:
        (study / "study.yaml").write_text(STUDY)
    return str(error.value)


def test_items_that_serve_anything_else_cannot_choose(place):
    told = refused(place, "final")
    assert "'texts/other' chooses the soup, so it may serve nothing else, but the check of" in told
    assert "such as texts/held_out" in told
    twice = STUDY.replace("data: texts/other", "data: texts/held_out")
    assert "benchmark 'final' uses it" in refused(place, text=twice)
    declared = STUDY.replace("math}", "math, declared: [texts/held_out]}")
    assert "the training of 'math' uses it" in refused(place, text=declared)
    own = STUDY.replace("task: text_nll, data: texts/held_out", "task: arc_easy")
    assert "no held-out part: it reads the task's own data" in refused(place, text=own)


def test_a_candidate_that_the_policy_forbids_to_merge_is_refused(place):
    ruled = STUDY.replace("wbc]}", "wbc], planted: [math]}") + "policy: {deny_taint: [texts]}\n"
    told = refused(place, text=ruled)
    assert "soup.yaml: forbidden by the policy 'deny_taint: texts': its parent 'math' is" in told
    assert "its parent 'medical'" not in told
    unknown = STUDY + "policy: {allow_unknown: false}\n"
    assert "'allow_unknown: false'" in refused(place, candidates=["medical", "noise"], text=unknown)


def test_a_refusal_on_the_command_line(place, mergelab):
    study = place / "recipes/mine"
    run = mergelab("soup", study, "math", "noise", "-o", study / "x.yaml", "--benchmark", "final")
    assert run.returncode == 2
    assert "'texts/other' chooses the soup" in run.stdout + run.stderr
    assert not (study / "x.yaml").exists()


def test_names_that_do_not_exist_are_refused(place):
    assert "no benchmark 'heldout' in the suite. Did you mean 'held_out'" in refused(
        place, "heldout"
    )
    assert "no model 'maths'. Did you mean 'math'" in refused(place, candidates=["maths", "noise"])
    assert "needs two candidates" in refused(place, candidates=["math"])


def test_a_soup_goes_beside_the_study_and_replaces_only_a_soup(place):
    assert "must lie beside its study.yaml" in refused(place, out="../soup.yaml")
    assert "cannot be the name of a recipe" in refused(place, out="math.yaml")
    assert "cannot be the name of a recipe" in refused(place, out="study.yaml")
    mine = place / "recipes/mine/mine.yaml"
    mine.write_text("merge_method: linear\nmodels: [{model: math, parameters: {weight: 1}}]\n")
    assert "is there already, and is no soup" in refused(place, out="mine.yaml")
    mine.unlink()


def test_candidates_without_scores_or_with_other_prompts_are_refused(place):
    results = place / "results/mine"
    path = results / "scores/noise.json"
    whole = path.read_text()
    path.unlink()
    try:
        assert f"Run: mergelab evaluate {place / 'recipes/mine'} noise" in refused(place)
    finally:
        path.write_text(whole)
    chats = json.loads(whole)
    chats["benchmarks"]["held_out"] |= {"chat_template": True, "chat_template_sha": "0" * 64}
    path.write_text(json.dumps(chats))
    try:
        assert "write the chats of 'held_out' by different templates" in refused(place)
    finally:
        path.write_text(whole)
    table = Path(results / "scores/noise.parquet")
    kept = table.read_bytes()
    frame = scores.table(table)
    frame.loc[frame["benchmark"] == "held_out", "prompt_hash"] = "0" * 64
    frame.to_parquet(table)
    try:
        assert "not scored on the same items and prompts of 'held_out'" in refused(place)
    finally:
        table.write_bytes(kept)
    assert np.array_equal(scores.table(table)["id"], frame["id"])
