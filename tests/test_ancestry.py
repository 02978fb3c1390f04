"""Lineage from the hub: every ancestor that is declared, each at its time, and nothing guessed."""

from __future__ import annotations

import json

import pytest
from loopback_hub import LoopbackHub
from published_cards import serve

from mergelab import hub_cards
from mergelab.ancestors import reports
from mergelab.ancestry import Ancestry, ancestries, ancestry, plain
from mergelab.declared import MAX_PARENTS
from mergelab.detectors import taint
from mergelab.errors import UserError

NECTAR = "datasets/berkeley-nest/Nectar"
LEO = "viethq188/LeoScorpius-7B-Chat-DPO"
TRINITY = "janai-hq/trinity-v1"
MARCORO = "mlabonne/Marcoro14-7B-slerp"


def put(server: LoopbackHub, repo: str, card: str = "", *, day: str = "2024-01-01", **files: str):
    """Publish a repository with a card (and files, '__' in their names for '.')."""
    named = {name.replace("__", "."): text.encode() for name, text in files.items()}
    data = {"README.md": card.encode(), **named}
    return server.publish(repo, data, date=f"{day}T12:00:00.000Z")


def front(**keys: object) -> str:
    """A card that is only front matter."""
    return "---\n" + "".join(f"{k}: {json.dumps(v)}\n" for k, v in keys.items()) + "---\n"


def linear(*models: str) -> str:
    """A card with a linear recipe of equal weights."""
    lines = "".join(f"  - {{model: {m}, parameters: {{weight: 1.0}}}}\n" for m in models)
    return f"# Merge\n\n```yaml\nmerge_method: linear\nmodels:\n{lines}```\n"


def parents(found: Ancestry, child: str) -> dict[str, tuple[str, float, bool]]:
    edges = [edge for edge in found.graph.edges if edge.child == child]
    return {edge.parent: (edge.kind, round(edge.weight, 4), edge.exact) for edge in edges}


def tainted(found: Ancestry, model: str | None = None) -> dict[str, tuple[tuple[str, ...], float]]:
    """Path and strength of each report that reaches a model, by its source."""
    several = taint.trace(found.graph, reports(found))[model or found.target]
    return {one.source.name: (one.way.path, round(one.way.strength, 4)) for one in several}


def verdict(found: Ancestry) -> str:
    name = found.target
    several = taint.trace(found.graph, reports(found))[name]
    return taint.verdict(several, taint.unknown(found.graph)[name])


# --- published chains ------------------------------------------------------------------------


def test_marcoro14_is_traced_to_nectar_through_both_parents(server):
    serve(server, "discussion_474", "marcoro")
    found = ancestry(MARCORO)
    merge14 = "EmbeddedLLM/Mistral-7B-Merge-14-v0"
    assert parents(found, MARCORO) == {
        "AIDC-ai-business/Marcoroni-7B-v3": ("merge", 0.5, False),
        f"{merge14}.1": ("merge", 0.5, False),
    }
    assert parents(found, f"{merge14}.1") == {
        merge14: ("merge", 0.5, False),
        TRINITY: ("merge", 0.5, False),
    }
    assert parents(found, merge14)["mistralai/Mistral-7B-v0.1"] == ("base", 1.0, True)
    assert parents(found, merge14)["mistralai/Mistral-7B-Instruct-v0.2"] == ("merge", 0.04, True)
    assert len(parents(found, merge14)) == 15
    reached = tainted(found)
    cybertron, starling = "Q-bert/MetaMath-Cybertron-Starling", "berkeley-nest/Starling-LM-7B-alpha"
    marcoroni = ("AIDC-ai-business/Marcoroni-7B-v3", MARCORO)
    assert reached[NECTAR] == ((NECTAR, starling, cybertron, *marcoroni), 0.5)
    assert reached[LEO] == ((LEO, TRINITY, f"{merge14}.1", MARCORO), 0.1375)
    go_bruins = "v1olet/v1olet_marcoroni-go-bruins-merge-7B"
    assert reached[go_bruins] == ((go_bruins, merge14, f"{merge14}.1", MARCORO), 0.008)
    assert set(reached) == {
        *(NECTAR, starling, cybertron, marcoroni[0], TRINITY, LEO, go_bruins),
        "GreenNode/GreenNodeLM-7B-v1olet",
    }
    gsm8k = [t for t in plain(found)["taints"] if t["benchmark"] == "gsm8k"]
    assert {t["model"] for t in gsm8k} == set(marcoroni)


def test_discussion_474_every_descendant_of_nectar_is_found_with_path_and_strength(server):
    repos = serve(server, "discussion_474")
    server.renamed = {"jan-hq/trinity-v1": TRINITY}
    bruins = (NECTAR, LEO, TRINITY, "rwitz2/go-bruins-v2.1.1")
    ends = {
        LEO: ((NECTAR, LEO), 1.0),
        TRINITY: (bruins[:3], 0.55),
        "rwitz2/go-bruins-v2.1": ((NECTAR, LEO, "rwitz2/go-bruins-v2.1"), 1.0),
        "rwitz2/go-bruins-v2.1.1": (bruins, 0.55),
        "GreenNode/GreenNodeLM-v3olet-7B": ((*bruins, "GreenNode/GreenNodeLM-v3olet-7B"), 0.55),
        "cookinai/BruinHermes": ((*bruins, "cookinai/BruinHermes"), 0.275),
        "jan-ai/Pandora-10.7B-v1": ((NECTAR, LEO, "jan-ai/Pandora-10.7B-v1"), 0.5),
    }
    alpaca = "ignos/LeoScorpius-GreenNode-Alpaca-7B-v1"
    ends[alpaca] = ((NECTAR, LEO, alpaca), 1.0)
    for repo in repos:
        assert tainted(ancestry(repo)).get(NECTAR) == ends.get(repo), repo


def test_every_model_of_the_two_chains_is_tainted_and_says_where_that_is_published(server):
    repos = serve(server, "discussion_474", "discussion_556")
    server.renamed = {"jan-hq/trinity-v1": TRINITY}
    found = ancestries(repos)
    several = taint.trace(found.graph, reports(found))
    hermes = "teknium/OpenHermes-2.5-Mistral-7B"
    clean = {"mistralai/Mistral-7B-v0.1", hermes, "Intel/neural-chat-7b-v3-3"}
    clean |= {"Weyaxi/OpenHermes-2.5-neural-chat-v3-3-Slerp"}
    clean |= {"datasets/tatsu-lab/alpaca", "datasets/Intel/orca_dpo_pairs"}
    assert {name for name, taints in several.items() if not taints} == clean
    for one in (one for taints in several.values() for one in taints):
        assert one.source.benchmark == "truthfulqa"
        assert one.source.source.startswith("https://")
    trinity = next(one for one in several[TRINITY] if one.source.name == NECTAR)
    pandora = next(one for one in several["jan-ai/Pandora-10.7B-v1"] if one.source.name == NECTAR)
    assert (trinity.way.exact, pandora.way.exact) == (False, True)
    mix = taint.verdict(several["CultriX/MistralTrix-v1"][1:], [])
    end = "zyh3826/GML-Mistral-merged-v1 > CultriX/MistralTrix-v1"
    assert mix == f"tainted by descent: {end}"


def test_discussion_556_is_followed_from_both_flagged_parents(server):
    serve(server, "discussion_556")
    found = ancestry("CultriX/MistralTrix-v1")
    end = ("zyh3826/GML-Mistral-merged-v1", "CultriX/MistralTrix-v1")
    reached = tainted(found)
    quantum, mnc = "quantumaikr/quantum-v0.01", "mncai/mistral-7b-dpo-v5"
    assert reached[quantum] == ((quantum, *end), 0.8)
    assert reached[mnc] == ((mnc, *end), 0.2)
    assert found.nodes[end[0]].method == "passthrough"


def test_mayonnaise_is_one_hop_from_its_flagged_base_and_its_other_parents_are_unverifiable(server):
    serve(server, "marcoro")
    found = ancestry("kaitchup/Mayonnaise-4in1-022")
    base = "mncai/mistral-7b-dpo-v5"
    assert tainted(found) == {base: ((base, "kaitchup/Mayonnaise-4in1-022"), 1.0)}
    assert taint.unknown(found.graph)[found.target] == [
        "placeholder/expert-1",
        "placeholder/expert-2",
        base,
    ]


def test_parents_that_are_folders_of_their_authors_machine_make_a_merge_unverifiable(server):
    serve(server, "marcoro")
    found = ancestry("EmbeddedLLM/Mistral-7B-Merge-14-v0.2")
    folder = "/media/data5/hf_models/Mistral-7B-Merge-14-v0.3"
    assert found.nodes[folder].missing == "a name or folder of its author's machine"
    assert verdict(found).startswith(f"unverifiable: nothing is declared of {folder}")
    assert not any("hf_models" in request for request in server.requests)


def test_no_clean_model_is_flagged_and_those_of_unknown_parents_are_unverifiable(server):
    repos = serve(server, "clean", "discussion_474", "discussion_556")
    clean = [repo for repo in repos if repo in _clean()]
    verdicts = {repo: verdict(ancestry(repo)) for repo in clean}
    strange = verdicts.pop("Gille/StrangeMerges_4-7B-slerp")
    assert set(verdicts.values()) == {"no known taint"}
    assert len(verdicts) == 9
    assert strange == (
        "unverifiable: nothing is declared of Gille/StrangeMerges_3-7B-slerp, "
        "Gille/StrangeMerges_2-7B-slerp"
    )


def _clean() -> set[str]:
    from published_cards import cards

    return set(cards("clean"))


# --- what declares parents -------------------------------------------------------------------


def test_the_config_file_goes_before_the_card_and_both_before_front_matter(server):
    card = front(base_model=["a/one", "a/late"], tags=["merge"]) + linear("a/wrong")
    config = "merge_method: slerp\nbase_model: a/one\nparameters: {t: 0.25}\n"
    config += "models: [{model: a/one}, {model: a/two}]\n"
    put(server, "a/child", card, mergekit_config__yml=config)
    assert parents(ancestry("a/child"), "a/child") == {
        "a/one": ("merge", 0.75, True),
        "a/two": ("merge", 0.25, True),
        "a/late": ("train", 1.0, True),
    }


def test_tunes_quantised_copies_adapters_and_tags_are_parents_too(server):
    put(server, "a/tune", front(base_model="a/base"))
    put(server, "a/page", front(base_model="https://huggingface.co/a/base/"))
    put(server, "a/base", front(base_model="a/up"))
    assert ancestry("a/page").nodes["a/base"].commit
    put(server, "a/gguf", front(base_model="a/base", tags=["gguf"]))
    put(server, "a/lora", adapter_config__json='{"base_model_name_or_path": "a/base"}')
    put(server, "a/tags", front(tags=["merge", "a/base", "a/other", "text/", "en"]))
    put(server, "a/card", front(tags=["a/base", "chat"]))
    assert parents(ancestry("a/tune"), "a/tune") == {"a/base": ("train", 1.0, True)}
    assert parents(ancestry("a/gguf"), "a/gguf") == {"a/base": ("quantised", 1.0, True)}
    assert parents(ancestry("a/lora"), "a/lora") == {"a/base": ("train", 1.0, True)}
    assert parents(ancestry("a/tags"), "a/tags") == {
        "a/base": ("merge", 1.0, False),
        "a/other": ("merge", 1.0, False),
    }
    assert parents(ancestry("a/card"), "a/card") == {}


def test_a_model_with_an_adapter_has_two_parents_also_in_the_long_form(server):
    put(server, "a/base", front(base_model="a/none"))
    put(server, "a/lora", front(base_model="a/base"))
    short = "  - {model: a/base+a/lora, parameters: {weight: 1}}\n"
    long = "  - {model: {model: {path: a/base}, lora: a/lora}, parameters: {weight: 1}}\n"
    for form in (short, long):
        other = "  - {model: a/two, parameters: {weight: 3}}\n"
        put(server, "a/child", f"```yaml\nmerge_method: linear\nmodels:\n{form}{other}```")
        assert parents(ancestry("a/child"), "a/child") == {
            "a/base": ("merge", 0.25, True),
            "a/lora": ("adapter", 0.25, True),
            "a/two": ("merge", 0.75, True),
        }


def test_every_expert_of_a_mixture_is_whole_in_it(server):
    config = "base_model: a/base\ngate_mode: hidden\nexperts:\n"
    config += "  - {source_model: a/one, positive_prompts: [x]}\n  - {source_model: a/two}\n"
    put(server, "a/moe", mergekit_moe_config__yml=config)
    found = ancestry("a/moe")
    assert parents(found, "a/moe") == dict.fromkeys(
        ["a/one", "a/two", "a/base"], ("merge", 1.0, True)
    )
    assert found.nodes["a/moe"].method == "mixture of experts"


def test_a_recipe_of_several_documents_is_followed_to_the_models_of_the_hub(server):
    config = (
        "name: half\nmerge_method: linear\nmodels:\n  - {model: a/one, parameters: {weight: 1}}\n"
        "  - {model: a/two, parameters: {weight: 1}}\n---\n"
        "merge_method: slerp\nbase_model: half\nparameters: {t: 0.4}\n"
        "models: [{model: half}, {model: a/three}]\n"
    )
    put(server, "a/child", mergekit_config__yml=config)
    assert parents(ancestry("a/child"), "a/child") == {
        "a/one": ("merge", 0.3, True),
        "a/two": ("merge", 0.3, True),
        "a/three": ("merge", 0.4, True),
    }


def test_a_merge_whose_card_names_one_parent_is_undeclared(server):
    put(server, "mistralai/Mistral-7B-v0.1")
    put(server, "a/child", front(tags=["merge"], base_model="mistralai/Mistral-7B-v0.1"))
    found = ancestry("a/child")
    assert verdict(found) == "unverifiable: nothing is declared of a/child"
    assert found.notes == ("a/child: is a merge, but its card does not name its parents",)


def test_data_sets_of_a_card_are_sources_of_taint(server):
    put(server, "a/tune", front(base_model="gpt2", datasets=["OpenBMB/UltraFeedback", "squad"]))
    put(server, "openai-community/gpt2", "")
    server.renamed["gpt2"] = "openai-community/gpt2"
    found = ancestry("a/tune")
    assert parents(found, "a/tune").keys() == {
        *("datasets/OpenBMB/UltraFeedback", "datasets/squad", "openai-community/gpt2")
    }
    several = taint.trace(found.graph, reports(found))["a/tune"]
    assert taint.verdict(several, []) == (
        "tainted by descent: datasets/OpenBMB/UltraFeedback > a/tune"
    )


def test_a_merge_has_of_a_data_set_on_its_card_no_more_than_a_parent_can_bring(server):
    nectar = front(datasets=["berkeley-nest/Nectar"])
    put(server, "a/merge", nectar + linear("a/one", "a/two"))
    assert parents(ancestry("a/merge"), "a/merge")[NECTAR] == ("train", 0.5, False)
    assert verdict(ancestry("a/merge")) == f"attenuated to at most 0.5 - verify: {NECTAR} > a/merge"
    put(server, "a/two", nectar)
    way = f"{NECTAR} > a/two > a/merge"
    assert verdict(ancestry("a/merge")) == f"attenuated to 0.5 - verify: {way}"
    put(server, "a/named", front(tags=["merge"], base_model=["a/one", "a/two"]))
    put(server, "a/bare", nectar.replace("datasets", "tags: [merge]\ndatasets"))
    bare = f"attenuated to at most 1 - verify: {NECTAR} > a/bare"
    assert verdict(ancestry("a/bare")) == bare
    assert verdict(ancestry("a/named")) == f"attenuated to at most 1 - verify: {way[:-5]}named"


# --- times and names -------------------------------------------------------------------------


def test_a_parent_is_taken_as_it_was_when_its_child_was_published(server):
    old = put(server, "a/parent", front(base_model="a/clean"), day="2024-01-01")
    put(server, "a/child", front(base_model="a/parent"), day="2024-02-01")
    new = put(server, "a/parent", front(base_model=TRINITY), day="2024-03-01")
    found = ancestry("a/child")
    assert found.nodes["a/parent"].commit == old != new
    assert found.nodes["a/parent"].date == "2024-01-01T12:00:00Z"
    assert verdict(found) == "unverifiable: nothing is declared of a/clean"
    late = put(server, "a/child", front(base_model="a/parent"), day="2024-03-02")
    found = ancestry("a/child")
    assert (found.nodes["a/child"].commit, found.nodes["a/parent"].commit) == (late, new)
    assert verdict(found) == f"tainted by descent: {TRINITY} > a/parent > a/child"
    assert ancestry("a/child", as_of="2024-02-28").nodes["a/parent"].commit == old
    assert ancestry("a/child", as_of="2024-03-02").nodes["a/parent"].commit == new


@pytest.mark.parametrize(
    "weights",
    [
        ["model.safetensors", "pytorch_model.bin"],
        ["model-00001-of-00002.safetensors", "model.safetensors.index.json"],
        ["pytorch_model.bin"],
        ["adapter_model.safetensors"],
    ],
)
def test_the_time_of_a_child_is_that_of_its_weights_not_of_its_card(server, weights):
    server.page = 2
    old = put(server, "a/parent", "", day="2024-01-01")
    first, *others = [name.replace(".", "__") for name in weights]
    start = {first: "old", **dict.fromkeys(others, "same")}
    put(server, "a/child", front(base_model="a/parent"), day="2024-01-15", **start)
    put(server, "a/child", front(base_model="a/parent"), day="2024-02-01", **start | {first: "new"})
    new = put(server, "a/parent", "later", day="2024-03-01")
    card = front(base_model="a/parent", tags=["edited"])
    last = put(server, "a/child", card, day="2024-04-01", a__txt="", **start | {first: "new"})
    found = ancestry("a/child")
    assert found.nodes["a/parent"].commit == old
    assert (found.nodes["a/child"].commit, found.nodes["a/child"].date[:10]) == (last, "2024-04-01")
    put(server, "a/child", card, day="2024-05-01", **start | {first: "newer"})
    assert ancestry("a/child").nodes["a/parent"].commit == new


def test_where_the_hub_does_not_tell_when_weights_were_made_the_last_commit_counts(server):
    weights = {"model__safetensors": "w"}
    put(server, "a/parent", "", day="2024-01-01")
    put(server, "a/child", front(base_model="a/parent"), day="2024-02-01", **weights)
    new = put(server, "a/parent", "later", day="2024-03-01")
    put(server, "a/child", front(base_model="a/parent") + "edited", day="2024-04-01", **weights)
    server.repos["a/child"].history_gated = True
    found = ancestry("a/child")
    assert found.nodes["a/parent"].commit == new
    told = "a/child: when its weights were made is not told: its last commit counts"
    assert told in found.notes


def test_a_commit_that_the_recipe_pins_wins_over_the_date(server):
    put(server, "a/parent", front(base_model="a/clean"), day="2024-01-01")
    put(server, "a/child", "", day="2024-02-01")
    new = put(server, "a/parent", front(base_model=TRINITY), day="2024-03-01")
    put(server, "a/child", linear(f"a/parent@{new}", "a/other"), day="2024-02-02")
    found = ancestry("a/child")
    assert found.nodes["a/parent"].commit == new
    assert tainted(found)[TRINITY] == ((TRINITY, "a/parent", "a/child"), 0.5)


def test_two_commits_of_a_parent_are_two_nodes(server):
    old = put(server, "a/parent", "", day="2024-01-01")
    put(server, "a/middle", front(base_model="a/parent"), day="2024-01-02")
    new = put(server, "a/parent", "", day="2024-03-01")
    put(server, "a/child", linear("a/parent", "a/middle"), day="2024-03-02")
    found = ancestry("a/child")
    assert found.nodes["a/parent"].commit == new
    assert found.nodes[f"a/parent@{old[:12]}"].commit == old
    assert parents(found, "a/middle").keys() == {f"a/parent@{old[:12]}"}


def test_a_parent_younger_than_its_child_is_taken_at_its_first_commit_and_noted(server):
    put(server, "a/child", front(base_model="a/parent"), day="2024-01-01")
    first = put(server, "a/parent", "", day="2024-05-01")
    put(server, "a/parent", "later", day="2024-06-01")
    found = ancestry("a/child")
    assert found.nodes["a/parent"].commit == first
    assert any("was not there yet" in note for note in found.notes)


def test_long_histories_come_in_pages_and_each_is_asked_for_once(server):
    server.page = 3
    commits = [put(server, "a/parent", str(day), day=f"2024-01-{day:02}") for day in range(1, 11)]
    put(server, "a/one", front(base_model="a/parent"), day="2024-01-02")
    put(server, "a/two", front(base_model="a/parent"), day="2024-01-05")
    put(server, "a/child", linear("a/one", "a/two"), day="2024-01-06")
    found = ancestry("a/child")
    assert {one.commit for one in found.nodes.values()} >= {commits[1], commits[4]}
    asked = [r for r in server.requests if r.startswith("GET /api/models/a/parent/commits")]
    assert len(asked) == 4


def test_a_second_trace_downloads_no_file_again_and_a_first_asks_little(server):
    serve(server, "discussion_556")
    ancestry("CultriX/MistralTrix-v1")
    first = len(server.requests)
    assert first == 4 * 4 + 2  # history, listing, HEAD and GET of the card; of two with parents
    ancestry("CultriX/MistralTrix-v1")
    again = server.requests[first:]
    assert len(again) == 4 * 2 + 2  # when their weights were made
    assert not any("/resolve/" in request for request in again)


def test_a_renamed_parent_is_followed_and_known_by_both_names(server):
    put(server, "old-org/flagged", "", day="2023-12-01")
    put(server, "a/child", front(base_model="rwitz2/pee"), day="2024-01-01")
    server.rename("old-org/flagged", "new-org/harmless")
    server.renamed["rwitz2/pee"] = "new-org/harmless"
    found = ancestry("a/child")
    assert found.nodes["new-org/harmless"].renamed_from == "rwitz2/pee"
    assert found.notes == ("new-org/harmless: was named rwitz2/pee",)
    assert tainted(found)["new-org/harmless"][1] == 1.0


def test_a_deleted_parent_is_unverifiable_and_still_known_by_its_reports(server):
    put(server, "a/gone", "")
    put(server, "a/child", linear("a/gone", TRINITY), day="2024-02-01")
    server.delete("a/gone")
    found = ancestry("a/child")
    assert found.nodes["a/gone"].missing == "deleted, private or never there"
    assert "a/gone" in taint.unknown(found.graph)["a/child"]
    assert tainted(found) == {TRINITY: ((TRINITY, "a/child"), 0.5)}


@pytest.mark.parametrize("way", ["{}@main", "https://huggingface.co/{}"])
def test_a_deleted_parent_is_known_by_its_reports_however_it_is_written(server, way):
    written = way.format(TRINITY)
    put(server, "a/child", front(base_model=written))
    assert tainted(ancestry("a/child")) == {written: ((written, "a/child"), 1.0)}


def test_of_a_method_that_nobody_knows_any_share_is_possible_of_the_base_too(server):
    card = linear("a/up", "a/other").replace("linear", "new_method\nbase_model: a/base")
    put(server, "a/child", card)
    whole = ("merge", 1.0, False)
    known = {"a/up": whole, "a/other": whole, "a/base": ("base", 1.0, False)}
    assert parents(ancestry("a/child"), "a/child") == known


@pytest.mark.parametrize(
    ("recipe", "shares"),
    [
        ("merge_method: slerp\nparameters: {t: 1.5}", (0.5, 1.5)),
        ("merge_method: slerp\nparameters: {t: -0.5}", (1.5, 0.5)),
        ("merge_method: linear\nparameters: {weight: [-1, 1]}", (0.5, 0.5)),
    ],
)
def test_a_share_below_zero_is_a_share(server, recipe, shares):
    models = "base_model: a/up\nmodels: [{model: a/up}, {model: a/other}]"
    put(server, "a/child", f"```yaml\n{recipe}\n{models}\n```\n")
    found = parents(ancestry("a/child"), "a/child")
    assert (found["a/up"][1], found["a/other"][1]) == shares


def test_the_base_of_a_slice_is_an_ancestor(server):
    models = "{model: a/up, layer_range: [0, 4]}"
    slices = f"slices: [{{base_model: a/base, sources: [{models}, {{model: a/base}}]}}]"
    put(server, "a/child", f"```yaml\nmerge_method: ties\n{slices}\n```\n")
    known = {"a/up": ("merge", 1.0, True), "a/base": ("base", 1.0, True)}
    assert parents(ancestry("a/child"), "a/child") == known


def test_of_a_gated_parent_the_front_matter_is_known(server):
    server.publish(
        "a/gated",
        {"README.md": front(base_model="a/up", datasets=["berkeley-nest/Nectar"]).encode()},
        gated=True,
    )
    put(server, "a/child", front(base_model="a/gated"), day="2024-02-01")
    found = ancestry("a/child")
    assert f"a/gated: {hub_cards.GATED}" in found.notes
    assert parents(found, "a/gated").keys() == {NECTAR, "a/up"}
    server.repos["a/gated"].history_gated = True
    found = ancestry("a/child")
    assert tainted(found)[NECTAR] == ((NECTAR, "a/gated", "a/child"), 1.0)
    assert any("its history is not known" in note for note in found.notes)


def test_a_target_that_is_not_there_and_a_hub_that_fails_are_errors(server):
    with pytest.raises(UserError, match="no such model"):
        ancestry("a/nothing")
    put(server, "a/child", front(base_model="a/parent"))
    with pytest.raises(UserError, match="no such branch"):
        ancestry("a/child@nope")
    with pytest.raises(UserError, match="is no date"):
        ancestry("a/child", as_of="yesterday")
    server.publish("a/far", {"README.md": b""}, date="9999-12-31T23:59:59-14:00")
    with pytest.raises(UserError, match="does not answer like a hub"):
        ancestry("a/far")
    server.status = 503
    with pytest.raises(UserError, match="HTTP 503"):
        ancestry("a/child")


# --- limits and hostile cards ----------------------------------------------------------------


def test_circles_and_models_that_name_themselves_end(server):
    put(server, "a/one", linear("a/one", "a/two"))
    put(server, "a/two", linear("a/one", "a/two"))
    found = ancestry("a/one", depth=50)
    assert set(found.nodes) == {"a/one", "a/two"}
    assert parents(found, "a/one") == {"a/two": ("merge", 0.5, True)}
    assert "a/one: names itself as a parent" in found.notes
    assert verdict(found) == "unverifiable: nothing is declared of a/one, a/two"


def test_whoever_names_itself_or_its_own_descendant_has_declared_nothing(server):
    put(server, "a/self", front(base_model="a/self"))
    assert verdict(ancestry("a/self")) == "unverifiable: nothing is declared of a/self"
    put(server, "a/above", front(base_model="a/below"))
    put(server, "a/below", front(base_model="a/above"))
    put(server, "a/child", linear("a/below", "mistralai/Mistral-7B-v0.1"), day="2024-02-01")
    put(server, "mistralai/Mistral-7B-v0.1")
    told = verdict(ancestry("a/child"))
    assert told == "unverifiable: nothing is declared of a/below, a/above"


def test_a_merge_of_a_model_with_itself_has_one_parent(server):
    sources = "".join(
        f"  - sources: [{{model: a/up, layer_range: [{i}, {i + 16}]}}]\n" for i in (0, 8)
    )
    put(server, "a/child", f"```yaml\nmerge_method: passthrough\nslices:\n{sources}```\n")
    assert parents(ancestry("a/child"), "a/child") == {"a/up": ("merge", 1.0, True)}


def test_what_lies_deeper_than_asked_for_is_not_looked_up_and_unverifiable(server):
    for i in range(6):
        put(server, f"a/m{i}", front(base_model=f"a/m{i + 1}"))
    put(server, "a/m6", front(base_model=TRINITY))
    found = ancestry("a/m0", depth=3)
    assert list(found.nodes) == ["a/m0", "a/m1", "a/m2", "a/m3", "a/m4"]
    assert found.nodes["a/m4"].missing == "not looked up: more than 3 generations up"
    assert verdict(found) == "unverifiable: nothing is declared of a/m4"
    assert not any("a/m4" in request for request in server.requests)
    assert verdict(ancestry("a/m0", depth=9)).startswith("tainted by descent")


def test_a_card_that_names_ten_thousand_parents_is_followed_for_some_and_unverifiable(server):
    names = [f"a/p{i}" for i in range(10_000)]
    put(server, "a/named", front(base_model=names))
    put(server, "a/merged", linear(*names[:2000]))
    put(server, "a/long", linear(*names))
    for repo, told in (("a/named", "names 200 parents"), ("a/merged", "names 2,000 parents")):
        found = ancestry(repo)
        assert len(found.nodes) == 1 + MAX_PARENTS
        assert any(told in note for note in found.notes)
        assert repo in taint.unknown(found.graph)[repo]
    found = ancestry("a/long")
    assert verdict(found) == "unverifiable: nothing is declared of a/long"
    assert any("longer than 100,000 characters" in note for note in found.notes)
    assert len(server.requests) <= 2 * 2 * MAX_PARENTS + 3 * 4 + 2


def test_repositories_made_up_without_end_stop_at_the_limit(server, monkeypatch):
    class Endless(dict):
        """Any repository x/N, a merge of x/2N and x/2N+1."""

        def get(self, name, default=None):
            if name not in self and name.startswith("x/"):
                n = int(name[2:])
                put(server, name, linear(f"x/{2 * n}", f"x/{2 * n + 1}"))
            return dict.get(self, name, default)

    server.repos = Endless()
    monkeypatch.setattr("mergelab.ancestry.MAX_REPOS", 20)
    found = ancestry("x/1", depth=100)
    looked_up = [name for name, one in found.nodes.items() if not one.missing]
    assert len(looked_up) == 20
    assert len(found.nodes) == 2 * 20 + 1
    assert verdict(found).startswith("unverifiable")
    monkeypatch.setattr("mergelab.ancestry.MAX_NODES", 30)
    found = ancestry("x/1", depth=100)
    assert len(found.nodes) == 31
    assert verdict(found).startswith("unverifiable")
    assert "not told apart" in str(found.nodes["further models"].missing)


@pytest.mark.parametrize(
    "card",
    [
        "---\nbase_model: &a [*a]\n---\n",
        "---\nbase_model: {x: 1}\ntags: 7\ndatasets: [[a], null, 3.5]\nlicense: [a, b]\n---\n",
        "---\nbase_model: !!python/object/apply:os.system ['touch hacked']\n---\n",
        "---\na: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: [*c, *c]\n" + "---\n",
        "---\nbase_model: ['../../etc/passwd', 'a/..', '<script>x()</script>', \"a/b\\0c\"]\n---\n",
        "```yaml\nmerge_method: linear\nmodels: 7\n```",
        "```yaml\nmerge_method: linear\nmodels: [x, 3, {model: [1, 2]}, {parameters: 8}]\n```",
        "```yaml\nmerge_method: {a: b}\nslices: [{sources: {}}, {sources: [1]}, 5]\n```",
        "```yaml\nmerge_method: slerp\nbase_model: {model: {path: {}}}\nmodules: [1]\n```",
        "```yaml\nmerge_method: passthrough\nslices: [{sources: [{model: a/b, "
        "layer_range: [.inf, -.inf]}]}, {sources: [{model: a/c, layer_range: [5, 5]}]}]\n```",
        "```yaml\nexperts: [1, {source_model: {}}, {source_model: a/b+a/c}]\n```",
        "```yaml\nmerge_method: linear\nmodels: " + "[" * 5000 + "\n```",
        "<!-- \u202e --><img src=x onerror=alert(1)>\n" + "| a " * 20000,
    ],
)
def test_hostile_cards_do_no_harm(server, card, tmp_path):
    put(server, "a/child", card)
    found = ancestry("a/child")
    assert not (tmp_path / "hacked").exists()
    assert verdict(found).startswith("unverifiable")
    assert all(r.split()[1].startswith("/a") or "/api/models/" in r for r in server.requests)
    assert not any(".." in request or "etc" in request for request in server.requests)
    for note in found.notes:
        assert note.isprintable()
        assert len(note) < 1000
    json.dumps(plain(found), allow_nan=False)


def test_files_larger_than_a_megabyte_are_not_fetched(server):
    put(server, "a/child", "x" * (hub_cards.MAX_BYTES + 1))
    found = ancestry("a/child")
    assert found.notes == ("a/child: README.md was not read: it is larger than 1,000,000 bytes",)
    assert not any("/resolve/" in request for request in server.requests)


def test_a_page_of_the_hub_never_leads_to_folders_of_this_machine(server, tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "README.md").write_text(front(base_model="a/told"))
    put(server, "a/child", linear("secret", "./secret", str(tmp_path / "secret"), "recipe:x"))
    found = ancestry("a/child")
    assert "a/told" not in found.nodes
    assert all(found.nodes[name].missing for name in parents(found, "a/child"))


# --- local models ----------------------------------------------------------------------------


def test_a_local_folder_is_traced_from_its_card_config_or_record(server, tmp_path):
    put(server, "a/up", front(base_model=TRINITY))
    for name, file, text in (
        ("card", "README.md", front(base_model="a/up")),
        ("config", "mergekit_config.yml", linear("a/up", "./results/s/models/tuned")),
        ("record", "merge.json", ""),
    ):
        folder = tmp_path / "results" / "s" / "merged" / name
        folder.mkdir(parents=True)
        if name == "config":
            text = text.partition("```yaml\n")[2].partition("```")[0]
        if name == "record":
            recipe = "merge_method: linear\nmodels:\n  - {model: tuned, parameters: {weight: 1}}\n"
            recipe += "  - {model: 'recipe:config', parameters: {weight: 3}}\n"
            text = json.dumps({"recipe": {"text": recipe}})
        (folder / file).write_text(text)
    tuned = tmp_path / "results" / "s" / "models" / "tuned"
    tuned.mkdir(parents=True)
    (tuned / "README.md").write_text(front(base_model="mistralai/Mistral-7B-v0.1"))
    put(server, "mistralai/Mistral-7B-v0.1")
    found = ancestry("results/s/merged/card")
    assert found.target == "results/s/merged/card"
    assert tainted(found)[TRINITY] == ((TRINITY, "a/up", found.target), 1.0)
    record = ancestry("results/s/merged/record")
    assert parents(record, record.target) == {
        "results/s/models/tuned": ("merge", 0.25, True),
        "results/s/merged/config": ("merge", 0.75, True),
    }
    assert tainted(record)[TRINITY][1] == 0.375
    assert plain(record)["nodes"][0]["merge_method"] == "linear"


def test_folders_that_name_each_other_end(server, tmp_path):
    for name, other in (("one", "two"), ("two", "one")):
        folder = tmp_path / "merged" / name
        folder.mkdir(parents=True)
        recipe = f"merge_method: passthrough\nmodels: [{{model: 'recipe:../merged/{other}'}}]\n"
        (folder / "merge.json").write_text(json.dumps({"recipe": {"text": recipe}}))
    found = ancestry("merged/one", depth=3)
    assert len(found.nodes) == 5
    assert "more than 3 generations up" in found.notes[-1]


def test_a_folder_may_name_what_no_file_can_be_called(server, tmp_path):
    (tmp_path / "here").mkdir()
    recipe = f"merge_method: passthrough\nmodels: [{{model: 'recipe:{'Ж' * 190}'}}]\n"
    (tmp_path / "here/mergekit_config.yml").write_text(recipe, encoding="utf-8")
    assert verdict(ancestry("here")).startswith("unverifiable: nothing is declared of recipe:ЖЖ")


def test_a_downloaded_model_is_the_hub_model_at_its_commit(server, tmp_path):
    commit = put(server, "a/up", front(base_model=TRINITY))
    put(server, "a/up", "another")
    (tmp_path / "here").mkdir()
    note = {"hub": "a/up", "commit": commit, "files": {}}
    (tmp_path / "here" / "source.json").write_text(json.dumps(note))
    found = ancestry("here")
    assert (found.target, found.nodes["a/up"].commit) == ("a/up", commit)


def test_the_json_of_an_ancestry_has_nodes_edges_taints_and_notes(server):
    put(server, "a/tune", front(base_model=TRINITY, license="mit"), day="2024-02-01")
    put(server, "a/child", linear("a/tune", "a/tune@main"), day="2024-02-03")
    found = plain(ancestry("a/child"), [taint.Source("a/tune", "gsm8k", "found by us", "findings")])
    assert list(found) == ["nodes", "edges", "taints", "notes"]
    tune = next(node for node in found["nodes"] if node["name"] == "a/tune")
    assert tune == {
        "name": "a/tune",
        "kind": "expert",
        "commit": tune["commit"],
        "date": "2024-02-01T12:00:00Z",
        "licence": "mit",
        "missing": None,
        "depth": 1,
        "merge_method": None,
    }
    trinity = next(node for node in found["nodes"] if node["name"] == TRINITY)
    assert (trinity["missing"], trinity["kind"]) == ("deleted, private or never there", "outside")
    ours = [t for t in found["taints"] if t["benchmark"] == "gsm8k" and t["model"] == "a/child"]
    assert [(t["strength"], t["path"]) for t in ours] == [(1.0, ["a/tune", "a/child"])]


def test_a_parent_of_which_the_hub_says_too_much_is_noted_and_the_trace_goes_on(server):
    put(server, "a/large")
    put(server, "a/other", front(base_model="a/base"))
    put(server, "a/merge", linear("a/large", "a/other"))
    server.padded = {"a/large"}
    found = ancestry("a/merge")
    assert found.nodes["a/large"].missing == "what the hub says of it is too long to be read"
    assert "a/base" in found.nodes


def test_the_history_of_a_renamed_repository_is_read_beyond_its_first_page(server):
    server.page = 2
    for day in range(1, 7):
        put(server, "old/name", front(tags=[f"day-{day}"]), day=f"2024-01-0{day}")
    first = next(iter(server.repos["old/name"].commits))
    put(server, "a/child", front(base_model="old/name"), day="2024-01-01")
    server.rename("old/name", "new/name")
    assert len(hub_cards.history("old/name", "main")) == 6
    assert ancestry("a/child").nodes["new/name"].commit == first


def test_where_a_mirror_does_not_list_folders_the_last_commit_counts(server):
    put(server, "a/parent", front(base_model="a/base"), day="2024-01-01")
    put(server, "a/child", front(base_model="a/parent"), day="2024-02-01")
    server.treeless = True
    found = ancestry("a/child")
    assert "a/base" in found.nodes
    told = "a/child: when its weights were made is not told: its last commit counts"
    assert told in found.notes


def test_a_history_that_is_too_long_is_not_called_gated(server):
    put(server, "a/child")
    server.title = "x" * 17_000_000
    assert ancestry("a/child").notes == (
        "a/child: what the hub says of it is too long to be read: its history is not known, "
        "so today's commit is taken",
    )
