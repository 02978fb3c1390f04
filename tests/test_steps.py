"""Steps of a study: what they need, and what their keys depend on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import llama, read_model
from conftest import Run
from loopback_hub import LoopbackHub

from mergelab.errors import UserError
from mergelab.steps import Steps
from mergelab.study_file import load_study

STUDY = """\
title: t
datasets:
  d: {path: ., files: [items.jsonl], text: "{{q}}", parts: {x: 2, y: 2}}
models:
  base: {path: ../../base}
  a: {path: ../../a}
  taught: {train: {start: base, learning_rate: 1, data: [{part: d/x}]}}
suite:
- {task: text_nll, data: d/y}
contamination:
- {benchmark: d, base: base, suspects: d/x, controls: d/y, detectors: [base_loss]}
"""
LINEAR = "merge_method: linear\nmodels: [{model: %s, parameters: {weight: 1}}]\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """recipes/mine with two models, and recipes one (of a) and two (of one)."""
    for seed, name in enumerate(("base", "a")):
        llama(tmp_path / name, seed)
    folder = tmp_path / "recipes/mine"
    folder.mkdir(parents=True)
    (folder / "items.jsonl").write_text("".join(f'{{"q": {n}}}\n' for n in range(4)))
    (folder / "study.yaml").write_text(STUDY)
    (folder / "one.yaml").write_text(LINEAR % "a")
    (folder / "two.yaml").write_text(LINEAR % "recipe:one")
    return folder


def keys(folder: Path) -> dict[tuple[str, str], str]:
    return {place: step.key for place, step in Steps(load_study(folder)).all.items()}


def changed(folder: Path, before: dict[tuple[str, str], str]) -> set[str]:
    """Steps whose key is not what it was, as verb-name."""
    return {"-".join(place) for place, key in keys(folder).items() if before.get(place) != key}


def after(*names: str) -> set[str]:
    verbs = ("evaluate", "probe", "detect")
    return {f"{verb}-{name}" for name in names for verb in verbs} | {"report-mine"}


def test_a_merge_of_a_merge_needs_it(folder: Path) -> None:
    steps = Steps(load_study(folder)).all
    assert steps["merge", "two"].needs == (("merge", "one"),)
    assert steps["merge", "one"].needs == (("fetch", "a"),)
    probes = {("probe", "two"), ("probe", "base")}
    assert set(steps["detect", "two"].needs) == {("merge", "two"), ("data", "d"), *probes}
    assert steps["train", "taught"].needs == (("data", "d"), ("fetch", "base"))


def test_a_recipe_reaches_its_merge_and_what_follows_only(folder: Path) -> None:
    before = keys(folder)
    (folder / "two.yaml").write_text(LINEAR % "recipe:one" + "# a word\n")
    assert changed(folder, before) == {"merge-two"} | after("two")
    before = keys(folder)
    (folder / "one.yaml").write_text(LINEAR % "a" + "# a word\n")
    assert changed(folder, before) == {"merge-one", "merge-two"} | after("one", "two")


def test_the_chat_template_reaches_the_scores_and_changes_no_key_where_it_is_not_asked_for(
    folder: Path,
) -> None:
    before, text = keys(folder), (folder / "study.yaml").read_text()
    suite = load_study(folder).suite
    assert not {"chat_template", "fewshot_as_multiturn"} & suite[0].content().keys()
    plain = text.replace("text_nll, ", "text_nll, chat_template: false, ")
    (folder / "study.yaml").write_text(plain)
    assert changed(folder, before) == {"report-mine"}
    (folder / "study.yaml").write_text(plain.replace("false", "true"))
    names = ("base", "a", "taught", "one", "two")
    assert {f"evaluate-{name}" for name in names} < changed(folder, before)


def test_weights_of_a_local_model_reach_everything_made_of_it(folder: Path) -> None:
    before = keys(folder)
    llama(folder.parents[1] / "a", seed=7)
    assert changed(folder, before) == {"fetch-a", "merge-one", "merge-two"} | after(
        "a", "one", "two"
    )


def test_training_settings_reach_the_trained_model_only(folder: Path) -> None:
    before = keys(folder)
    (folder / "study.yaml").write_text(STUDY.replace("learning_rate: 1", "learning_rate: 2"))
    assert changed(folder, before) == {"train-taught"} | after("taught")


def test_items_reach_whatever_reads_them(folder: Path) -> None:
    before = keys(folder)
    (folder / "items.jsonl").write_text("".join(f'{{"q": {n}}}\n' for n in range(1, 5)))
    models = ("base", "a", "taught", "one", "two")
    assert changed(folder, before) == {"data-d", "train-taught"} | after(*models)


def test_claims_reach_the_audit_with_their_sources_and_rules_but_not_their_lines(
    folder: Path,
) -> None:
    text = "title: t\nclaims: [{model: a, benchmark: arc_easy, value: '61.5'%s}]\n"
    (folder / "claims.yaml").write_text(text % "")
    before, page = keys(folder), {"audit-mine", "report-mine"}
    (folder / "claims.yaml").write_text("# a word\n" + text % "")
    assert changed(folder, before) == set()
    (folder / "claims.yaml").write_text(text % ", source: 'https://example.org/a'")
    assert changed(folder, before) == page
    before = keys(folder)
    (folder / "claims.yaml").write_text(text % ", source: 'https://example.org/b'")
    assert changed(folder, before) == page
    before = keys(folder)
    (folder / "study.yaml").write_text(STUDY + "policy: {max_merge_depth: 2}\n")
    assert changed(folder, before) == page
    (folder / "claims.yaml").unlink()
    assert ("audit", "mine") not in keys(folder)


def test_recipes_that_use_each_other_are_refused(folder: Path) -> None:
    (folder / "one.yaml").write_text(LINEAR % "recipe:two")
    with pytest.raises(UserError, match="use each other in a circle: one > two > one"):
        Steps(load_study(folder))
    (folder / "one.yaml").write_text(LINEAR % "recipe:three")
    with pytest.raises(UserError, match="there is no recipe 'three' in this study"):
        Steps(load_study(folder))


def test_a_merge_of_a_merge_runs_in_order(mergelab: Run, folder: Path) -> None:
    place = folder.parents[1]
    second = ("merge", "recipes/mine/two.yaml", "-o", "results/mine/merged/two")
    early = mergelab(*second)
    assert early.returncode == 2
    command = "mergelab merge recipes/mine/one.yaml -o results/mine/merged/one"
    assert f"recipe:one is not merged yet. Run: {command}" in early.stderr
    assert mergelab(*command.split()[1:]).returncode == 0
    assert mergelab(*second).returncode == 0
    got, want = read_model(place / "results/mine/merged/two"), read_model(place / "a")
    assert all((got[name] == want[name]).all() for name in want)


def test_a_verb_run_by_hand_makes_its_record_out_of_date(mergelab: Run, folder: Path) -> None:
    records = folder.parents[1] / "results/mine/records"
    records.mkdir(parents=True)
    names = [f"merge-one.{'0' * 12}.json", f"merge-one.b.{'0' * 12}.json", "data-d.json"]
    for name in (*names, f"data-d.{'0' * 12}.json"):
        (records / name).write_text("{}")
    done = mergelab("merge", "recipes/mine/one.yaml", "-o", "results/mine/merged/one")
    assert done.returncode == 0
    assert mergelab("data", "recipes/mine").returncode == 0
    assert {path.name for path in records.iterdir()} == set(names[1:])
    lines = (records.parent / "data/d/x.jsonl").read_text().splitlines()
    assert {json.loads(line)["text"] for line in lines} < {"0", "1", "2", "3"}


def check_with(folder: Path, more: str, detectors: str) -> None:
    document = STUDY.replace("detectors: [base_loss]", f"detectors: [{detectors}], {more}")
    (folder / "study.yaml").write_text(document)


def test_findings_wait_for_the_evidence_and_scores_of_base_and_siblings(folder: Path) -> None:
    check_with(folder, "siblings: [a], scores: text_nll, twin: text_nll", "sibling_loss, twin")
    steps = Steps(load_study(folder)).all
    wanted = {name for verb, name in steps["detect", "two"].needs if verb == "probe"}
    assert wanted == {"two", "base", "a"}
    scored = {name for verb, name in steps["detect", "two"].needs if verb == "evaluate"}
    assert scored == {"base", "a", "two"}


@pytest.mark.parametrize(("more", "expected"), [("scores: text_nll", {"two"}), ("", set())])
def test_findings_of_overlap_wait_for_the_variants_scores_alone(
    folder: Path, more: str, expected: set[str]
) -> None:
    check_with(folder, more, "overlap")
    steps = Steps(load_study(folder)).all
    assert {n for verb, n in steps["detect", "two"].needs if verb == "evaluate"} == expected


def test_a_check_of_scores_alone_probes_nothing(folder: Path) -> None:
    check_with(folder, "scores: text_nll, twin: text_nll", "twin")
    steps = Steps(load_study(folder)).all
    assert not [name for verb, name in steps if verb == "probe"]
    assert ("detect", "two") in steps


def test_what_a_check_lacks_is_told_before_any_work(folder: Path) -> None:
    check_with(folder, "planted: []", "paraphrase_gap, los")
    with pytest.raises(UserError) as error:
        Steps(load_study(folder))
    assert "paraphrase_gap needs 'twin': add this template to dataset 'd'." in str(error.value)
    assert "there is no detector 'los'" in str(error.value)


def test_hub_models_that_a_recipe_names_itself_have_a_step_and_then_need_no_network(
    mergelab: Run, folder: Path
) -> None:
    with LoopbackHub() as server:
        commit = server.publish("org/far", folder.parents[1] / "a")
        (folder / "one.yaml").write_text(LINEAR % f"org/far@{commit}")
        steps = Steps(load_study(folder)).all
        assert steps["merge", "one"].needs == (("fetch", "one"),)
        assert steps["fetch", "one"].needs == ()
        fetched = mergelab("fetch", "recipes/mine", "one", HF_ENDPOINT=server.url)
        assert fetched.returncode == 0, fetched.stderr
    merge = ("merge", "recipes/mine/one.yaml", "-o", "out")
    done = mergelab(*merge, HF_ENDPOINT=server.url, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
