"""Policies: a study's rules stop a merge of tainted or merged parents before any download."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import llama
from loopback_hub import LoopbackHub
from published_cards import cards, serve
from safetensors.numpy import save

from mergelab import hub_errors, locate, lockfile, models, policy
from mergelab.errors import UserError
from mergelab.steps import Steps
from mergelab.study import Policy, Study
from mergelab.study_file import load_study

TRINITY = "janai-hq/trinity-v1"
LEO = "viethq188/LeoScorpius-7B-Chat-DPO"
BASE = "mistralai/Mistral-7B-v0.1"
HERMES = "teknium/OpenHermes-2.5-Mistral-7B"
SOURCE = (
    "flagged on the leaderboard; https://huggingface.co/spaces/open-llm-leaderboard/"
    "open_llm_leaderboard/discussions/474"
)
DENY = {"deny_taint": ["truthfulqa"]}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A hub with the published chains, whose models have weights, and a client without a cache."""
    from huggingface_hub import constants

    with LoopbackHub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setattr(hub_errors, "WAITS", ())
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        serve(server, "discussion_474", "marcoro")
        for repo in server.repos:
            weighty(server, repo)
        yield server


def weighty(server: LoopbackHub, repo: str, folder: Path | None = None) -> None:
    """Put weights into the last commit of a repository."""
    known = server.repos[repo]
    files = {"config.json": b'{"model_type": "llama"}', "model.safetensors": save({})}
    if folder:
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
    known.commits[known.branches["main"]] |= files


def study(rules: dict[str, object], models: dict[str, str], **recipes: object) -> Study:
    """recipes/x with hub models and linear recipes (lists of parents), or recipes as text."""
    folder = Path("recipes/x")
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.yaml"):
        old.unlink()
    about = {"title": "T", "models": {name: {"hub": at} for name, at in models.items()}}
    (folder / "study.yaml").write_text(json.dumps(about | ({"policy": rules} if rules else {})))
    for name, recipe in recipes.items():
        if isinstance(recipe, list):
            lines = [f"  - {{model: {m}, parameters: {{weight: 0.5}}}}\n" for m in recipe]
            recipe = "merge_method: linear\nmodels:\n" + "".join(lines)
        (folder / f"{name}.yaml").write_text(str(recipe))
    return load_study(folder)


def lock(study: Study) -> dict[str, object]:
    ids = locate.hub_ids(study.recipes, study)
    return lockfile.lock(study, ids, (), policy.tracing(study))


def refusal(study: Study) -> str:
    with pytest.raises(UserError) as caught:
        policy.check(study)
    return str(caught.value)


def test_a_flagged_parent_is_refused_with_rule_model_path_source_and_remedy(server):
    made = study(DENY, {"trinity": TRINITY, "hermes": HERMES}, half=["trinity", "hermes"])
    lock(made)
    assert refusal(made) == (
        "recipes/x/half.yaml: forbidden by the policy 'deny_taint: truthfulqa': its parent "
        f"'trinity' ({TRINITY}) is tainted: trinity; {SOURCE}. Take another parent, or change the "
        "policy in recipes/x/study.yaml."
    )
    with pytest.raises(UserError, match="forbidden by the policy"):
        Steps(made)


def test_a_parent_that_nobody_flagged_is_refused_for_its_ancestors(server):
    name = "mlabonne/Marcoro14-7B-slerp"
    made = study(DENY, {"marcoro": name, "hermes": HERMES}, half=["marcoro", "hermes"])
    lock(made)
    told = refusal(made)
    assert (
        f"its parent 'marcoro' ({name}) is tainted: Q-bert/MetaMath-Cybertron-Starling > " in told
    )
    assert f" > {name} > marcoro (at most 0.5 of it can be left); named in the card of" in told
    gsm8k = study(
        {"deny_taint": ["gsm8k"]}, {"marcoro": name, "hermes": HERMES}, half=["marcoro", "hermes"]
    )
    lock(gsm8k)
    assert "AIDC-ai-business/Marcoroni-7B-v3 > " in refusal(gsm8k)


def test_merge_plan_and_steps_refuse_offline_before_any_download(server, mergelab, tmp_path):
    serve(server, "discussion_474")
    for repo in server.repos:
        weighty(server, repo)
    study(DENY, {"trinity": TRINITY, "hermes": HERMES}, half=["trinity", "hermes"])
    home = str(tmp_path / "home")
    done = mergelab("lock", "recipes/x", HF_ENDPOINT=server.url, HF_HOME=home)
    assert done.returncode == 2
    assert "wrote recipes/x/lock.json" in done.stderr
    server.stop()
    for verb in (["merge", "recipes/x/half.yaml", "-o", "out"], ["plan", "recipes/x/half.yaml"]):
        done = mergelab(*verb, HF_ENDPOINT=server.url, HF_HOME=home)
        assert done.returncode == 2
        assert "forbidden by the policy 'deny_taint: truthfulqa'" in done.stderr
    assert not (tmp_path / "results").exists()
    assert not any("safetensors" in request for request in server.requests)


def test_clean_parents_are_merged_and_what_is_unknown_is_noted(server, mergelab, tmp_path):
    for i, repo in enumerate((BASE, HERMES)):
        weighty(server, repo, llama(tmp_path / str(i), i))
    made = study(DENY, {"base": BASE, "hermes": HERMES}, half=["base", "hermes"])
    where = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
    assert mergelab("lock", "recipes/x", **where).returncode == 0
    for name in made.models:
        models.fetch(made, name, Path("results/x/models") / name)
    done = mergelab("merge", "recipes/x/half.yaml", "-o", "out", **where)
    assert done.returncode == 0, done.stderr
    assert "note:" not in done.stderr
    assert (tmp_path / "out" / "merge.json").is_file()
    leo = "GreenNode/GreenNodeLM-7B-v1olet"
    weighty(server, leo, llama(tmp_path / "2", 2))
    study({"deny_taint": ["gsm8k"]}, {"base": BASE, "leo": leo}, half=["base", "leo"])
    assert mergelab("lock", "recipes/x", **where).returncode == 0
    done = mergelab("plan", "recipes/x/half.yaml", **where)
    assert done.returncode == 0, done.stderr
    why = f"nothing is declared of {leo}, in the lineage of 'leo' ({leo})"
    told = f"note: recipes/x/half.yaml: {why}: it is unverifiable, not clean"
    assert told in done.stderr


def test_merged_parents_and_merges_of_merges_are_refused_if_the_policy_says_so(server):
    rules = {"allow_merged_parents": False}
    tune = "rwitz2/go-bruins-v2.1.1"
    server.renamed["jan-hq/trinity-v1"] = TRINITY
    made = study(rules, {"bruins": tune, "hermes": HERMES}, half=["bruins", "hermes"])
    lock(made)
    assert refusal(made) == (
        "recipes/x/half.yaml: forbidden by the policy 'allow_merged_parents: false': its parent "
        f"'bruins' ({tune}) is a merge or comes from one ({TRINITY} > {tune} > bruins). Take "
        "another parent, or change the policy in recipes/x/study.yaml."
    )
    several = {"base": BASE, "hermes": HERMES, "chat": "openchat/openchat_3.5"}
    two = {"half": ["base", "hermes"], "again": ["recipe:half", "chat"]}
    made = study(rules, several, **two)
    lock(made)
    assert refusal(made).startswith(
        "recipes/x/again.yaml: forbidden by the policy 'allow_merged_parents: false': its parent "
        "'half' is a merge or comes from one. Take"
    )
    assert policy.check(made, ["half"]) == []
    deep = study({"max_merge_depth": 1}, several, **two)
    assert (
        "'max_merge_depth: 1': it would be merged 2 deep: half > again. Take another"
    ) in refusal(deep)
    assert policy.check(study({"max_merge_depth": 2}, several, **two)) == []


def test_depth_counts_the_merges_of_the_hub_too(server):
    rules = {"max_merge_depth": 4}
    name = "mlabonne/Marcoro14-7B-slerp"
    made = study(rules, {"marcoro": name, "base": BASE}, half=["marcoro", "base"])
    lock(made)
    assert "it would be merged 5 deep: " in refusal(made)
    assert f" > EmbeddedLLM/Mistral-7B-Merge-14-v0.1 > {name} > marcoro > half." in refusal(made)


def test_hub_models_and_adapters_that_only_recipes_name_are_judged_too(server):
    adapter = {"README.md": f"---\nbase_model: {LEO}\n---\n", "adapter_config.json": "{}"}
    files = {name: text.encode() for name, text in adapter.items()}
    lora = server.publish("acme/lora", files | {"adapter_model.safetensors": save({})})
    commit = server.repos[HERMES].branches["main"]
    named = f"{HERMES}@{commit}"
    made = study(DENY, {"base": BASE}, half=["base", f"{named}+acme/lora@{lora}"])
    lock(made)
    assert refusal(made).startswith(
        "recipes/x/half.yaml: forbidden by the policy 'deny_taint: truthfulqa': its parent "
        f"'acme/lora@{lora}' is tainted: {LEO} > acme/lora > acme/lora@{lora} (1 of it can be left"
    )


def test_what_is_planted_in_a_study_counts_through_all_its_merges(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = study({"deny_taint": ["sums"]}, {}, half=["math", "base"], again=["recipe:half", "base"])
    text = {
        "title": "T",
        "datasets": {"d": {"path": ".", "files": ["d.jsonl"], "text": "x", "parts": {"a": 2}}},
        "models": {"base": {"path": "b"}, "math": {"path": "m"}},
        "policy": {"deny_taint": ["sums"]},
    }
    part = {"suspects": "d/a", "controls": "d/a", "detectors": ["wbc"]}
    check = {"benchmark": "sums", "base": "base", "planted": ["math"], **part}
    (made.folder / "study.yaml").write_text(json.dumps(text | {"contamination": [check]}))
    told = refusal(load_study(made.folder)).splitlines()
    assert len(told) == 2
    assert "again.yaml: forbidden by the policy 'deny_taint: sums': its parent 'half'" in told[0]
    assert "is tainted: math > half (0.5 of it can be left); planted; study.yaml. Take" in told[0]
    assert "half.yaml: forbidden by the policy 'deny_taint: sums': its parent 'math'" in told[1]


def test_an_undeclared_parent_is_a_breach_only_if_unknown_ones_are_not_allowed(server):
    name = "GreenNode/GreenNodeLM-7B-v1olet"
    several, recipe = {"green": name, "base": BASE}, ["green", "base"]
    made = study({"deny_taint": ["gsm8k"]}, several, half=recipe)
    lock(made)
    assert policy.check(made) == [
        f"recipes/x/half.yaml: nothing is declared of {name}, in the lineage of 'green' "
        f"({name}): it is "
        "unverifiable, not clean"
    ]
    assert policy.rows(made) == [
        {"rule": "deny_taint: gsm8k", "verdict": "unverifiable", "why": policy.check(made)[0]}
    ]
    strict = study({"deny_taint": ["gsm8k"], "allow_unknown": False}, several, half=recipe)
    assert "'allow_unknown: false': nothing is declared of GreenNode" in refusal(strict)
    verdicts = {row["rule"]: row["verdict"] for row in policy.rows(strict)}
    assert verdicts == {"deny_taint: gsm8k": "kept", "allow_unknown: false": "broken"}


def test_only_a_study_with_a_policy_needs_the_lineage_in_its_lock(server):
    several, recipe = {"hermes": HERMES, "base": BASE}, ["hermes", "base"]
    plain = study({}, several, half=recipe)
    assert "ancestry" not in lock(plain)
    assert not any("/commits/" in request for request in server.requests)
    assert policy.check(plain) == []
    made = study(DENY, several, half=recipe)
    assert refusal(made) == (
        "recipes/x/lock.json: holds no lineage of the hub models, which the policy of "
        "recipes/x/study.yaml asks for. Run: mergelab lock recipes/x"
    )
    lock(made)
    assert policy.check(made) == []
    value = json.loads(made.lock.read_text())
    value["models"][HERMES]["commit"] = "0" * 40
    made.lock.write_text(json.dumps(value))
    assert f"holds no lineage of {HERMES} at its commit" in refusal(made)
    value["ancestry"]["nodes"] = {}
    made.lock.write_text(json.dumps(value))
    assert "holds no lineage of the hub models" in refusal(made)
    value["ancestry"]["edges"] = 7
    made.lock.write_text(json.dumps(value))
    assert "is damaged" in refusal(made)


def test_the_lineage_in_the_lock_is_the_same_every_time_and_holds_commits_and_dates(server):
    made = study(DENY, {"hermes": HERMES, "base": BASE}, half=["hermes", "base"])
    lock(made)
    first = made.lock.read_bytes()
    lock(made)
    assert made.lock.read_bytes() == first
    kept = json.loads(first)["ancestry"]
    assert kept["targets"] == {HERMES: HERMES, BASE: BASE}
    day = cards("discussion_474")[BASE][0]
    assert kept["nodes"][BASE] == {
        "repo": BASE,
        "kind": "base",
        "origin": "hub",
        "declared": True,
        "commit": server.repos[BASE].branches["main"],
        "date": f"{day}T12:00:00Z",
        "renamed_from": None,
    }
    assert kept["edges"] == [
        {"parent": BASE, "child": HERMES, "kind": "train", "weight": 1.0, "exact": True}
    ]


def test_two_models_of_a_study_may_be_one_hub_model(server):
    made = study(DENY, {"one": LEO, "two": LEO, "base": BASE}, half=["one", "two"])
    lock(made)
    assert len(refusal(made).splitlines()) == 2


def test_a_circle_hides_no_merge_whichever_model_comes_first(server):
    merge = "merge_method: linear\nmodels: [{model: a/tune}, {model: a/other}]\n"
    cards = {"a/merge": f"```yaml\n{merge}```\n", "a/tune": "---\nbase_model: a/merge\n---\n"}
    for repo, card in cards.items():
        server.publish(repo, {"README.md": card.encode()}, date="2024-01-01T12:00:00.000Z")
        weighty(server, repo)
    for names in (["a/merge", "a/tune"], ["a/tune", "a/merge"]):
        rules = {"allow_merged_parents": False}
        made = study(rules, {name[2:]: name for name in names}, half=["tune"])
        lock(made)
        assert "its parent 'tune' (a/tune) is a merge or comes from one" in refusal(made)


def test_a_name_on_a_card_is_not_the_model_that_the_study_calls_so(server):
    card = b"---\nbase_model: math\n---\n"
    server.publish("a/child", {"README.md": card}, date="2024-01-01T12:00:00.000Z")
    weighty(server, "a/child")
    made = study(DENY, {"math": TRINITY, "child": "a/child"}, half=["child"])
    lock(made)
    assert policy.check(made) == [
        "recipes/x/half.yaml: nothing is declared of math (of a card), in the lineage of 'child' "
        "(a/child): it is unverifiable, not clean"
    ]


def test_one_commit_may_be_named_in_two_ways(server):
    models = {"one": LEO, "two": f"{LEO}@main", "base": BASE}
    made = study(DENY, models, half=["one", "two"])
    lock(made)
    assert len(refusal(made).splitlines()) == 2


def test_a_benchmark_that_nothing_is_reported_of_may_be_a_slip_of_the_pen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = study({"deny_taint": ["truthfullqa"]}, {})
    assert policy.check(made) == [
        "policy deny_taint: nothing is reported of 'truthfullqa' yet. Did you mean 'truthfulqa'?"
    ]


def test_mistakes_in_a_policy_are_told_with_their_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert study({}, {}).policy == Policy()
    (tmp_path / "recipes/x/study.yaml").write_text(
        "title: T\npolicy:\n  deny_taints: [x]\n  max_merge_depth: 0\n  deny_taint: truthfulqa\n"
        "  allow_unknown: 7\n"
    )
    with pytest.raises(UserError) as caught:
        load_study(Path("recipes/x"))
    told = str(caught.value)
    assert "study.yaml:3: policy has no key 'deny_taints'. Did you mean 'deny_taint'?" in told
    assert "study.yaml:4: 'max_merge_depth' must be at least 1." in told
    assert "study.yaml:5: 'deny_taint' must be a list, not 'truthfulqa'." in told
    assert "study.yaml:6: 'allow_unknown' must be true or false, not 7." in told
