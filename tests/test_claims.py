"""Claims: what cards, leaderboards and claims files say, in the claimer's digits; hostile ones."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergelab.claims import names
from mergelab.claims.base import Claim
from mergelab.claims.cards import read_card
from mergelab.claims.file import Comparison, load_claims
from mergelab.claims.leaderboard import read_results
from mergelab.claims.numbers import Printed, read_number
from mergelab.errors import UserError
from mergelab.published import grim
from mergelab.recipe import load_recipe
from mergelab.suites import load_suite

CARDS = Path(__file__).parent / "fixtures" / "cards"
V1 = {"arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc2", "winogrande", "gsm8k"}


def card(repo: str, **more: str):
    return read_card((CARDS / f"{repo.partition('/')[2]}.md").read_text(), repo, **more)


def table(text: str, repo: str = "org/ours") -> dict[str, Claim]:
    found = read_card(text, repo)
    assert not found.problems, found.problems
    return {claim.benchmark: claim for claim in found.claims}


def protocol(claim: Claim) -> tuple:
    return (claim.metric, claim.filter, claim.shots, claim.printed, claim.percent)


# ---- cards that were published ----


def test_marcoro14_is_read_with_its_recipe_its_front_matter_and_its_tables(tmp_path):
    found = card("mlabonne/Marcoro14-7B-slerp", date="2024-01-04", commit="8f4b077")
    assert found.problems == ()
    assert (found.licence, found.base_models) == ("cc-by-nc-4.0", ())
    assert found.tags[3:] == (
        "AIDC-ai-business/Marcoroni-7B-v3",
        "EmbeddedLLM/Mistral-7B-Merge-14-v0.1",
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(found.recipe)
    assert load_recipe(path).method.name == "slerp"
    by = {(c.benchmark, c.metric, c.shots): c for c in found.claims}
    arc = by["arc_challenge", "acc_norm", 25]
    assert (arc.printed, arc.value, arc.percent, arc.split) == ("69.8", 0.698, True, "test")
    assert (arc.model, arc.date, arc.commit) == (found.repo, "2024-01-04", "8f4b077")
    assert arc.source == "README.md:24"
    assert by["truthfulqa_mc2", "acc", 0].printed == "63.54"  # the leaderboard's
    assert by["truthfulqa_mc2", "acc", None].printed == "64.15"  # of the Nous suite
    assert by["truthfulqa_mc1", "acc", None].printed == "46.88"
    assert by["gpt4all", None, None].printed == "76.24"  # bold, and not OpenHermes's 73.12
    assert by["agieval_aqua_rat", "acc_norm", None].printed == "24.41"


def test_front_matter_and_the_bots_table_are_one_claim_with_the_longer_digits():
    found = card("Gille/StrangeMerges_4-7B-slerp")
    assert found.problems == ()
    by = {claim.benchmark: claim for claim in found.claims}
    assert set(by) == V1 | {"average"}
    assert len(found.claims) == 7
    assert protocol(by["truthfulqa_mc2"]) == ("acc", None, 0, "62.40", True)
    assert protocol(by["gsm8k"]) == ("exact_match", "strict-match", 5, "68.61", True)
    assert by["mmlu"].published == "MMLU (5-Shot)"
    assert found.recipe.startswith("slices:")
    assert found.recipe.endswith("dtype: bfloat16\n")


def test_a_table_without_a_column_of_models_is_the_cards_own():
    found = card("EmbeddedLLM/Mistral-7B-Merge-14-v0.2")
    assert found.problems == ()
    assert found.base_models == ("janai-hq/trinity-v1", "EmbeddedLLM/Mistral-7B-Merge-14-v0.1")
    by = {claim.benchmark: claim for claim in found.claims}
    assert set(by) == V1 | {"average"}
    assert protocol(by["arc_challenge"]) == ("acc_norm", None, 25, "68.86", True)
    assert by["average"].printed == "72.88"


def test_the_second_leaderboards_scores_are_marked_as_rescaled():
    found = card("suayptalha/Luminis-phi-4")
    assert found.problems == ()
    by = {claim.benchmark: claim for claim in found.claims}
    assert {name for name, claim in by.items() if not claim.rescaled} == {"leaderboard_ifeval"}
    assert protocol(by["leaderboard_bbh"]) == ("acc_norm", None, 3, "55.80", True)
    assert by["leaderboard_math_hard"].metric == "exact_match"
    assert (by["average"].printed, by["average"].rescaled) == ("41.30", True)


def test_medical_tables_are_read_row_by_row_and_others_are_left_alone():
    found = card("arcee-ai/BioMistral-merged-zephyr")  # its other table is about file sizes
    assert found.problems == ()
    wanted = {
        "pubmedqa": "76.8",
        "medmcqa": "47.21",
        "medqa_4options": "47.62",
        "arc_challenge": "55.89",
        "hellaswag": "63.43",
    }
    assert {claim.benchmark: claim.printed for claim in found.claims} == wanted
    biomed = card("lighteternal/Llama3-merge-biomed-8b")
    assert biomed.problems == ()
    assert [(c.benchmark, c.metric, c.printed) for c in biomed.claims] == [
        ("arc_challenge", "acc", "59.39"),
        ("arc_challenge", "acc_norm", "63.65"),
        ("hellaswag", "acc", "62.59"),
        ("hellaswag", "acc_norm", "81.53"),
        ("gsm8k", "exact_match", "59.36"),
        ("mmlu_anatomy", "acc", "72.59"),
    ]


# ---- forms ----


def test_a_fraction_with_its_error_a_percentage_and_bold_digits_are_read_as_they_stand():
    found = table(
        "| Model | MMLU | ARC-C | HellaSwag |\n|---|---|---|---|\n"
        "| **ours** | 0.4716 ± 0.0146 | 0.47 (+0.02) | `0.640` |\n| theirs | 0.5 | 0.4 | 0.6 |\n"
    )
    assert {c.benchmark: (c.printed, c.percent) for c in found.values()} == {
        "mmlu": ("0.4716", False),
        "arc_challenge": ("0.47", False),
        "hellaswag": ("0.640", False),
    }
    percents = table("| Model | MMLU |\n|:--|--:|\n| ours | 0.9% |\n")
    assert percents["mmlu"].percent
    assert percents["mmlu"].value == pytest.approx(0.009)


def test_fractions_under_the_heading_of_the_leaderboard_stay_fractions():
    text = "# Open LLM Leaderboard\n| Metric | Value |\n|---|---|\n"
    found = table(text + "| MMLU (5-shot) | 0.6511 |\n| GSM8K (5-shot) | 0.7089 |\n")
    assert [claim.value for claim in found.values()] == [0.6511, 0.7089]
    alone = table(text + "| GSM8K (5-shot) | 0.91 |\n")
    assert (alone["gsm8k"].percent, alone["gsm8k"].value) == (True, pytest.approx(0.0091))


def test_one_value_above_the_limit_makes_a_table_one_of_percentages():
    found = table("| | ours | theirs |\n|-|-|-|\n| GSM8K | 0.91 | 3.4 |\n| MMLU | 0.5 | 0.6 |\n")
    assert (found["gsm8k"].percent, found["gsm8k"].value) == (True, pytest.approx(0.0091))


def test_shots_sizes_and_ranks_are_neither_scores_nor_signs_of_percent():
    found = table(
        "| Benchmark | n-shot | ours |\n|---|---|---|\n| MMLU | 5 | 0.61 |\n| ARC | 25 | 0.5 |\n"
    )
    assert protocol(found["mmlu"]) == (None, None, 5, "0.61", False)
    wide = table("| Model | Params | MMLU |\n|---|---|---|\n| ours | 7.24 | 0.61 |\n")
    assert set(wide) == {"mmlu"}
    assert not wide["mmlu"].percent


def test_a_column_of_95_percent_intervals_makes_no_percentages():
    found = table(
        "| benchmark | metric | shots | value | 95 % CI | items |\n|-|-|-|-|-|-|\n"
        "| MMLU | acc | 5 | 0.6100 | 0.5800 to 0.6400 | 100 |\n"
    )
    assert protocol(found["mmlu"]) == ("acc", None, 5, "0.6100", False)
    other = table("| benchmark | value (%) |\n|-|-|\n| MMLU | 0.61 |\n")
    assert other["mmlu"].percent


def test_tables_of_lm_eval_keep_filter_version_and_metric_and_leave_out_parts():
    found = read_card(
        "|Tasks|Version|Filter|n-shot|Metric| |Value| |Stderr|\n"
        "|-----|------:|------|-----:|------|-|----:|-|-----:|\n"
        "|gsm8k|3|flexible-extract|5|exact_match|↑|0.3025|±|0.0127|\n"
        "| | |strict-match|5|exact_match|↑|0.2990|±|0.0126|\n"
        "|wikitext|2|none|0|word_perplexity|↓|8.71|±|N/A|\n"
        "|mmlu|2|none| |acc|↑|0.6|±|0.01|\n| - anatomy|1|none|5|acc|↑|0.5|±|0.04|\n",
        "org/ours",
    ).claims
    assert [(c.benchmark, c.filter, c.shots, c.printed, c.value) for c in found] == [
        ("gsm8k", "flexible-extract", 5, "0.3025", 0.3025),
        ("gsm8k", "strict-match", 5, "0.2990", 0.2990),
        ("wikitext", None, 0, "8.71", 8.71),
        ("mmlu", None, None, "0.6", 0.6),
    ]
    assert found[0].task_version == "3"


@pytest.mark.parametrize(
    ("limit", "split"), [("100.0", "[:100]"), ("0.05", "[:5%]"), ("None", None)]
)
def test_a_table_of_lm_eval_whose_run_was_limited_is_about_the_first_items(limit, split):
    told = f"hf (pretrained=org/ours), limit: {limit}, num_fewshot: None, batch_size: 1\n"
    head = "\n|Tasks|Metric|Value|\n|-|-|-|\n"
    tables = f"{told}{head}|arc_easy|acc|0.47|\n{head}|piqa|acc|0.61|\n"
    found = {c.benchmark: c.split for c in read_card(tables, "org/ours").claims}
    assert found == {"arc_easy": split, "piqa": None}


LIMITED = "hf (pretrained=org/ours), limit: {}, num_fewshot: None, batch_size: 1\n"
TABLE = "\n|{}|Metric|Value|\n|-|-|-|\n|{}|acc|{}|\n"


def splits(text):
    return {(c.benchmark, c.printed): c.split for c in read_card(text, "org/ours").claims}


def test_groups_below_a_table_of_lm_eval_are_as_limited_as_its_tasks():
    tables = TABLE.format("Tasks", "arc_easy", "0.47") + TABLE.format("Groups", "mmlu", "0.62")
    tables += TABLE.format("Tasks", "piqa", "0.61")
    found = splits(LIMITED.format("20.0") + tables)
    assert found == {
        ("arc_easy", "0.47"): "[:20]",
        ("mmlu", "0.62"): "[:20]",
        ("piqa", "0.61"): None,
    }


@pytest.mark.parametrize("between", ["# Full results\n", LIMITED.format("None")])
def test_a_limit_ends_with_its_section_and_with_the_next_line_of_lm_eval(between):
    text = LIMITED.format("20.0") + "(no table)\n\n" + between
    assert splits(text + TABLE.format("Tasks", "piqa", "0.61")) == {("piqa", "0.61"): None}


def test_a_score_told_twice_keeps_what_is_said_of_its_items():
    front = (
        "---\nmodel-index:\n- name: o\n  results:\n  - dataset: {name: arc_easy%s}\n"
        "    metrics: [{type: acc, value: 0.47}]\n---\n"
    )
    table = LIMITED.format("20.0") + TABLE.format("Tasks", "arc_easy", "0.47")
    assert splits(front % "" + table) == {("arc_easy", "0.47"): "[:20]"}
    said = read_card(front % ", split: test" + table, "org/ours").claims
    assert [c.split for c in said] == ["test", "[:20]"]


def test_a_limited_score_does_not_contradict_one_of_all_items():
    full, limited = (TABLE.format("Tasks", "piqa", value) for value in ("0.70", "0.61"))
    found = read_card(LIMITED.format("20.0") + limited + full, "org/ours")
    assert [(c.printed, c.split) for c in found.claims] == [("0.61", "[:20]"), ("0.70", None)]
    assert found.problems == ()


def test_scores_that_differ_are_told_though_only_one_names_its_split():
    front = (
        "---\nmodel-index:\n- name: o\n  results:\n  - dataset: {name: piqa, split: validation}\n"
        "    metrics: [{type: acc, value: 0.61}]\n---\n"
    )
    (told,) = read_card(front + TABLE.format("Tasks", "piqa", "0.70"), "org/ours").problems
    assert "0.61" in told


def test_a_limit_is_of_the_next_table_through_headings_but_not_through_other_text():
    table = TABLE.format("Tasks", "piqa", "0.61")
    assert splits(LIMITED.format("20.0") + "\n## Results\n" + table) == {("piqa", "0.61"): "[:20]"}
    lost = LIMITED.format("20.0") + "\n|a|b|\n\n## Results\n" + table
    assert splits(lost) == {("piqa", "0.61"): None}


@pytest.mark.parametrize(
    ("limit", "split"),
    [(-5, None), (0, None), ("1e300", None), (10**18, None), (0.0004, "[:0.04%]"), (5.5, "[:5]")],
)
def test_a_limit_is_taken_within_bounds(limit, split):
    top = {"results": {"arc_easy": {"acc,none": 0.5}}, "config": {"limit": limit}}
    (found,) = read_results(json.dumps(top), "r.json", "m").claims
    assert found.split == split


def test_a_limited_run_of_lighteval_is_about_the_first_items_after_a_shuffle():
    results = {"harness|arc:challenge|25": {"acc": 0.5}}
    results |= {f"harness|hendrycksTest-{n}|5": {"acc": 0.5} for n in range(57)}
    for limit, split in ((10, "[shuffled:10]"), (None, None)):
        general = {"model_name": "a/b", "max_samples": limit}
        top = {"results": results, "config_general": general}
        claims = read_results(json.dumps(top), "r.json").claims
        assert {c.benchmark: c.split for c in claims} == {"arc_challenge": split, "mmlu": split}


@pytest.mark.parametrize("shots", [-5, 10**18])
def test_impossible_numbers_of_examples_are_not_taken(shots):
    text = (
        "---\nmodel-index:\n- name: o\n  results:\n  - dataset: {name: piqa, args: "
        f"{{num_few_shot: {shots}}}}}\n    metrics: [{{type: acc, value: 0.47}}]\n---\n"
    )
    (found,) = read_card(text, "org/ours").claims
    assert found.shots is None
    top = {"results": {"piqa": {"acc,none": 0.5}}, "n-shot": {"piqa": shots}}
    (found,) = read_results(json.dumps(top), "r.json", "m").claims
    assert found.shots is None


def test_the_cards_own_model_is_found_by_name_or_none_is_taken():
    text = "| Model | MMLU |\n|---|---|\n| Base-7B | 61.0 |\n| {} | 62.5 |\n"
    for label in ("Ours-7B", "org/Ours-7B", "**[Ours-7B](https://x.y/z)** (this model)"):
        assert table(text.format(label), "org/Ours-7B")["mmlu"].printed == "62.5"
    for label in ("Theirs-7B", "Ours-7B-v2", "other/Ours-7B"):
        assert read_card(text.format(label), "org/Ours-7B").claims == ()
    lost = read_card(text.format("Theirs-7B"), "org/Ours-7B")
    assert lost.problems == (
        "README.md:1: none of the models of this table is named like Ours-7B: its scores were not "
        "taken.",
    )


def test_what_a_comment_hides_is_not_published():
    row = "| Model | MMLU |\n|---|---|\n| ours | {} |\n"
    text = f"<!-- {row.format(70.0)} -->\n{row.format(60.0)}\na <!-- b --> c <!--\n{row}"
    assert [c.printed for c in read_card(text, "org/ours").claims] == ["60.0"]
    assert table(row.format(60.0) + "-->\n")["mmlu"].source == "README.md:3"


def test_a_score_that_is_published_twice_in_two_values_is_a_problem():
    text = "| Model | MMLU |\n|---|---|\n| ours | {} |\n\n"
    found = read_card(text.format("60.10") + text.format("63.10"), "org/ours")
    assert [claim.printed for claim in found.claims] == ["60.10", "63.10"]
    assert "published as 63.10 and as 60.10" in found.problems[0]


def test_the_hubs_newer_list_of_results_is_read():
    found = read_card(
        "---\neval_results:\n"
        "- dataset: {id: cais/mmlu, task_id: mmlu}\n  value: 71.50\n  date: 2025-01-15\n"
        "- dataset: {id: Idavidrein/gpqa, task_id: gpqa_diamond}\n  value: 0.412\n---\n",
        "org/ours",
    )
    assert found.problems == ()
    assert [(c.benchmark, c.printed, c.value, c.date) for c in found.claims] == [
        ("mmlu", "71.50", 0.715, "2025-01-15"),
        ("gpqa", "0.412", 0.412, None),
    ]


def test_mergekit_config_goes_before_the_card_and_a_bad_one_is_told():
    config = "merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 1}}\n"
    assert card("mlabonne/Marcoro14-7B-slerp", config=config).recipe == config
    bad = card("mlabonne/Marcoro14-7B-slerp", config="a: [")
    assert bad.recipe.startswith("slices:")
    assert bad.problems[0].startswith("mergekit_config.yml: is no recipe: ")


@pytest.mark.parametrize(
    ("published", "task", "shots"),
    [
        ("harness|arc:challenge|25", "arc_challenge", None),
        ("AI2 Reasoning Challenge (25-Shot)", "arc_challenge", 25),
        ("ARC-c 25-shot", "arc_challenge", 25),
        ("MATH Lvl 5 (4-Shot)", "hendrycks_math_hard", 4),
        ("MMLU-PRO", "mmlu_pro", None),
        ("MedQA (USMLE)", "medqa_4options", None),
        ("TruthfulQA (zero-shot)", "truthfulqa_mc2", 0),
        ("Winogrande", "winogrande", None),
        ("GPT4All", "gpt4all", None),
        ("Avg.", "average", None),
        ("leaderboard_bbh", "leaderboard_bbh", None),
        ("My own test", "My own test", None),
    ],
)
def test_published_names_mean_tasks_of_lm_eval(published, task, shots):
    found = names.find(published)
    assert (found.benchmark, found.shots) == (task, shots)


def test_leaderboards_give_metric_and_shots_as_their_suites_do():
    for board in names.BOARDS:
        for bench in load_suite(board).benchmarks:
            short = bench.name.partition(".")[2]
            told = names.find(short, board)
            if short.startswith("ifeval"):
                continue  # two benchmarks of ours, one column of theirs
            assert told.shots == bench.num_fewshot
            assert ",".join(filter(None, (told.metric, told.filter))) == bench.metric


# ---- leaderboards' files ----


def v1(**more) -> str:
    subjects = {f"harness|hendrycksTest-s{i}|5": {"acc": i / 100} for i in range(57)}
    results = {
        "harness|arc:challenge|25": {"acc": 0.6689, "acc_norm": 0.698, "acc_norm_stderr": 0.01},
        "harness|truthfulqa:mc|0": {"mc1": 0.4688, "mc2": 0.6354},
        "harness|gsm8k|5": {"acc": 0.7089, "acc_stderr": 0.0125},
        "all": {"acc": 0.5},
    }
    general = {"model_name": "org/ours", "model_sha": "8f4b0779", "model_dtype": "torch.bfloat16"}
    return json.dumps({"config_general": general, "results": results | subjects | more})


def test_the_first_leaderboards_file_is_read_and_its_mmlu_is_the_mean_of_the_subjects():
    found = read_results(v1(), "results.json")
    assert found.problems == ()
    by = {(c.benchmark, c.metric): c for c in found.claims}
    assert by["mmlu", "acc"].value == pytest.approx(0.28)
    assert by["mmlu", "acc"].shots == 5
    assert by["arc_challenge", "acc_norm"].printed == "0.698"
    assert by["truthfulqa_mc1", "acc"].printed == "0.4688"
    assert by["truthfulqa_mc2", "acc"].printed == "0.6354"
    assert by["gsm8k", "exact_match"].filter == "strict-match"
    arc = by["arc_challenge", "acc"]
    assert (arc.model, arc.commit, arc.dtype) == ("org/ours", "8f4b0779", "bfloat16")


def test_an_mmlu_that_lacks_subjects_is_no_claim():
    found = read_results(v1(**{"harness|hendrycksTest-s3|5": {}}), "results.json")
    assert found.problems == (
        "results.json: has 56 subjects of MMLU, not 57: no score of MMLU was taken.",
    )
    assert "mmlu" not in {claim.benchmark for claim in found.claims}


def test_results_of_a_limited_run_are_about_the_first_items():
    seen = {"arc_easy": 37, "boolq": 37, "piqa": 30, "odd": "many"}
    counts = {
        task: {"original": 30 if task == "piqa" else 99, "effective": n} for task, n in seen.items()
    }
    results = {task: {"acc,none": 0.5} for task in (*seen, "mmlu")}
    top = {"results": results, "n-samples": counts, "config": {"limit": 37.0}}
    top["configs"] = {"arc_easy": {"test_split": "test"}, "boolq": {"test_split": ["x"]}}
    found = {c.benchmark: c.split for c in read_results(json.dumps(top), "r.json", "m").claims}
    expected = {"arc_easy": "test[:37]", "boolq": "[:37]", "piqa": None, "odd": None}
    assert found == expected | {"mmlu": "[:37]"}


def test_results_of_lm_eval_keep_what_they_say_of_the_protocol():
    found = read_results(
        json.dumps(
            {
                "results": {
                    "leaderboard_bbh_navigate": {
                        "alias": " - navigate",
                        "acc_norm,none": 0.616,
                        "acc_norm_stderr,none": 0.0308,
                    },
                    "gsm8k": {"exact_match,strict-match": 0.5, "exact_match,flexible-extract": 1},
                    "wikitext": {"word_perplexity,none": 8.7},
                },
                "versions": {"leaderboard_bbh_navigate": 1.0, "gsm8k": 3.0},
                "n-shot": {"leaderboard_bbh_navigate": 3, "gsm8k": 5},
                "config": {
                    "model": "hf",
                    "model_args": "pretrained=org/ours,revision=main,dtype=bfloat16",
                    "model_sha": "0123456789abcdef0123456789abcdef01234567",
                },
                "chat_template": "{{ messages }}",
                "date": 1733961600.5,
            }
        ),
        "results.json",
    )
    assert found.problems == ()
    bbh, strict, flexible, perplexity = found.claims
    assert (bbh.benchmark, bbh.metric, bbh.filter) == (
        "leaderboard_bbh_navigate",
        "acc_norm",
        None,
    )
    assert (bbh.shots, bbh.task_version, bbh.printed, bbh.rescaled) == (3, "1.0", "0.616", False)
    assert (bbh.model, bbh.dtype, bbh.date) == ("org/ours", "bfloat16", "2024-12-12")
    assert bbh.chat_template is True
    hashed = {"results": {"gsm8k": {"acc": 0.5}}, "chat_template_sha": "0" * 64}
    assert read_results(json.dumps(hashed), "r.json", "m").claims[0].chat_template is True
    assert bbh.commit.startswith("0123")
    assert (strict.filter, flexible.filter, flexible.value) == (
        "strict-match",
        "flexible-extract",
        1.0,
    )
    assert perplexity.value == 8.7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "results.json: not valid JSON"),
        ("[" * 100_000, "results.json: nested deeper than 40 levels."),
        ("[1]", "results.json: the top level must be a JSON object."),
        ("{}", "results.json: holds no 'results'."),
        ('{"results": {"a": ' + "9" * 5000, "results.json: not valid JSON"),
    ],
)
def test_files_that_are_no_results_say_so(text, message):
    with pytest.raises(UserError) as error:
        read_results(text, "results.json")
    assert str(error.value).startswith(message)


def test_scores_that_are_no_scores_are_problems_not_claims():
    text = v1().replace("0.698", "NaN").replace("0.7089", "1e999").replace("0.6354", "63.54")
    found = read_results(text, "r.json")
    assert {p.partition(": results.")[2].partition(":")[0] for p in found.problems} == {
        "harness|arc"
    } | {"harness|truthfulqa", "harness|gsm8k|5.exact_match"}
    assert not {"gsm8k"} & {claim.benchmark for claim in found.claims}


# ---- claims.yaml ----

CLAIMS = """\
title: Two models of a paper
source: https://arxiv.org/abs/2403.13257
date: 2024-03-20
protocol: {shots: 0, metric: acc, dtype: float16, percent: true}
models:
  ours: {at: org/ours@0123abc, recipe: recipe.yaml, base: org/base, candidates: [org/a, ./local]}
  theirs: {at: ./local}
claims:
  - {model: ours, benchmark: USMLE, value: 38.40}
  - {model: theirs, benchmark: HellaSwag, value: "55.4", metric: acc_norm, shots: 10}
  - {model: theirs, benchmark: gsm8k, value: 60, metric: "exact_match,strict-match"}
  - {model: theirs, benchmark: EQ-Bench, value: 71.2, metric: eqbench}
comparisons:
  - {model: ours, than: theirs, benchmark: usmle}
"""


def written(folder: Path, text: str = CLAIMS) -> Path:
    (folder / "local").mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text("merge_method: linear\n")
    path = folder / "claims.yaml"
    path.write_text(text)
    return path


def test_a_claims_file_keeps_digits_defaults_and_places(tmp_path):
    found = load_claims(written(tmp_path))
    usmle, hella, gsm, eq = found.claims
    assert (usmle.benchmark, usmle.published, usmle.printed) == ("medqa_4options", "USMLE", "38.40")
    assert (usmle.value, usmle.shots, usmle.metric, usmle.dtype) == (0.384, 0, "acc", "float16")
    assert (usmle.date, usmle.source) == ("2024-03-20", "https://arxiv.org/abs/2403.13257")
    assert (hella.value, hella.shots, hella.metric) == (pytest.approx(0.554), 10, "acc_norm")
    assert (gsm.metric, gsm.filter, gsm.printed) == ("exact_match", "strict-match", "60")
    assert (eq.percent, eq.value) == (False, 71.2)
    assert found.comparisons == (Comparison("ours", "theirs", "medqa_4options"),)
    ours = found.models["ours"]
    assert (ours.at, ours.base, ours.recipe) == (
        "org/ours@0123abc",
        "org/base",
        tmp_path / "recipe.yaml",
    )
    assert ours.candidates == ("org/a", str(tmp_path / "local"))
    assert load_claims(tmp_path) == found  # the folder will do


def test_claims_beside_a_study_are_about_its_variants(tmp_path):
    (tmp_path / "study.yaml").write_text("title: t\nmodels: {medical: {path: m}}\n")
    path = tmp_path / "claims.yaml"
    path.write_text("title: t\nclaims:\n- {model: medical, benchmark: mmlu, value: 0.5}\n")
    found = load_claims(path)
    assert (found.study, found.claims[0].percent) == (tmp_path, False)
    path.write_text("title: t\nclaims:\n- {model: medicl, benchmark: mmlu, value: 0.5}\n")
    with pytest.raises(UserError, match=r"no model 'medicl'\. Did you mean 'medical'\?"):
        load_claims(path)


def test_claims_are_taken_from_a_card_and_from_a_results_file(tmp_path):
    (tmp_path / "card.md").write_text((CARDS / "BioMistral-merged-zephyr.md").read_text())
    (tmp_path / "results.json").write_text(v1())
    text = "title: t\nmodels:\n  ours: {at: arcee-ai/BioMistral-merged-zephyr}\nclaims:\n"
    path = written(tmp_path, text + "- {from: card.md, model: ours}\n- {from: results.json}\n")
    found = load_claims(path)
    assert [claim.model for claim in found.claims] == ["ours"] * 5 + ["org/ours"] * 6
    assert found.claims[0].source == "card.md:10"
    assert found.problems == ()


def test_every_mistake_of_a_claims_file_is_told_with_its_line(tmp_path):
    text = CLAIMS.replace("shots: 0", "shot: 0").replace("value: 38.40", "value: 138.40")
    text = text.replace("recipe: recipe.yaml", "recipe: ../x.yaml").replace("./local}", "./none}")
    text = text.replace("than: theirs", "than: their").replace("value: 60", "value: sixty")
    text += "  - {model: ours, than: ours, benchmark: usmle}\nextras: 1\n"
    with pytest.raises(UserError) as error:
        load_claims(written(tmp_path, text))
    lines = [line for line in str(error.value).splitlines() if not line.startswith("  ")]
    path = tmp_path / "claims.yaml"
    assert [line.removeprefix(f"{path}:") for line in lines] == [
        "16: a claims file has no key 'extras'.",
        "6: '../x.yaml' leads out of the folder of this file.",
        "7: './none' is neither a folder nor a model of the hub (org/name@commit). Check the path.",
        "4: protocol has no key 'shot'. Did you mean 'shots'?",
        "11: 'value' must be a number as published, not 'sixty'.",
        "9: 138.40 is no percentage of right answers. Say percent: true or false, or mend it.",
        "14: there is no model 'their'. Did you mean 'theirs'?",
        "15: 'ours' is compared with itself.",
    ]


def test_a_claims_file_reads_nothing_outside_its_folder(tmp_path):
    (tmp_path / "secret.md").write_text("| Model | MMLU |\n|---|---|\n| ours | 5 |\n")
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link.md").symlink_to(tmp_path / "secret.md")
    for name in ("../secret.md", str(tmp_path / "secret.md"), "link.md"):
        path = written(inside, f"title: t\nclaims:\n- {{from: {name}, model: org/ours}}\n")
        with pytest.raises(UserError, match="leads out of the folder"):
            load_claims(path)


# ---- hostile input ----


def test_html_and_script_stay_text():
    label = '<script>alert("x")</script>'
    found = read_card(
        f"| Model | MMLU | {label} |\n|---|---|---|\n| ours | 61.0 | 50.0 |\n", "org/ours"
    )
    assert [claim.published for claim in found.claims] == ["MMLU", label]


@pytest.mark.parametrize(
    ("front", "problem"),
    [
        ("a: " + "[" * 3_000, "nested deeper than 40 levels"),
        ("a: &a [" + "x," * 300 + "]\nb: &b [" + "*a," * 300 + "]\nc: [" + "*b," * 300 + "]",
         "a YAML bomb"),
        ("tags: !!python/object/apply:os.system ['true']\nlicense: !!python/name:os.system x",
         "not valid YAML"),
        ("license: {a: b}\ntags: [1, merge]", "'license' is no list of short texts"),
        ("base_model: " + "x" * 300_000, "longer than 200,000 characters"),
        ("model-index: 5", "'model-index' is not a list of mappings"),
        ("model-index: [{results: [{metrics: [{value: .nan}, {value: [1]}]}]}]",
         "a score without a benchmark or a number"),
        ("model-index: [{results: [{dataset: {name: MMLU}, metrics: [{value: 650.1}]}]}]",
         "'MMLU' is 650.1, no share of right answers"),
        ("n: 0x" + "f" * 9_000, "is not a value of its type"),
        ("n: !!int ''", "is not a value of its type"),
    ],
)  # fmt: skip
def test_hostile_front_matter_is_a_problem_and_never_a_crash(front, problem):
    found = read_card(
        f"---\n{front}\n---\n| Model | MMLU |\n|---|---|\n| ours | 61.0 |\n", "o/ours"
    )
    assert any(problem in text for text in found.problems), found.problems
    assert [claim.printed for claim in found.claims] == ["61.0"]


def test_gigantic_cards_and_tables_are_cut_and_say_so():
    row = "| ours | " + " | ".join(["50.0"] * 5_000) + " |\n"
    head = "| Model | " + " | ".join(f"MMLU {i}" for i in range(5_000)) + " |\n" + "|-|-|\n"
    found = read_card(head + row + "| x | 1 |\n" * 60_000 + "x" * 2_000_000, "org/ours")
    told = " ".join(found.problems)
    for text in ("first 1,000,000 characters", "first 500 rows", "first 60 columns"):
        assert text in told
    assert len(found.claims) <= 60
    tables = read_card("| Model | MMLU |\n|-|-|\n| ours | 50 |\n\n" * 400, "org/ours")
    assert any("only the first 200 tables" in text for text in tables.problems)


def test_long_runs_of_signs_are_read_in_time():
    for sign in ("|", "[", "_", "*", "(", "`", "-", " ", "<b ", "\\|", "| - |", "±", "0", "~~~\n"):
        text = sign * (200_000 // len(sign))
        assert read_card(f"| Model | MMLU |\n|---|---|\n| ours | {text} |\n{text}", "o/ours")
        assert read_number(text) is None
    assert read_card("---\n" + "a: {" * 2_000 + "\n---\n", "o/ours").problems


cells = st.sampled_from(
    ["MMLU", "ARC (25-shot)", "ours", "Model", "Value", "Metric", "Task", "0.5", "63.54 ± 0.1", "%"]
) | st.text(max_size=12)
lines = st.lists(cells, max_size=6).map(lambda row: "|" + "|".join(row) + "|")
rules = st.integers(0, 6).map(lambda n: "|" + "---|" * n)
cards = st.lists(lines | rules | st.text(max_size=30) | st.just("```yaml"), max_size=12)


@settings(max_examples=150, deadline=None)
@given(cards)
def test_any_card_is_read_without_a_crash_and_its_claims_are_sound(rows):
    found = read_card("\n".join(rows), "org/ours")
    for claim in found.claims:
        assert 0 <= claim.value <= 1 or claim.benchmark not in names.NAMES
        assert claim.printed in "\n".join(rows)
        assert json.dumps(claim.__dict__, allow_nan=False)


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["results", "config", "acc,none", "mmlu", "model_args", "n-shot"]),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_any_json_is_read_or_refused(value):
    for text in (json.dumps(value), json.dumps({"results": value})):
        try:
            found = read_results(text, "results.json")
        except UserError:
            continue
        assert all(claim.metric for claim in found.claims)


snippets = st.sampled_from(
    ["|", "\n", "[", "]", "{", "}", ": ", "- ", "&a ", "*a", "<<: ", "!!int ''", ".nan", "1e999"]
) | st.text(max_size=4)  # fmt: skip
places = st.integers(0, len(CLAIMS))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(places, st.integers(0, 20), snippets), min_size=1, max_size=4))
def test_any_change_of_a_claims_file_is_read_or_refused(tmp_path_factory, changes):
    text = CLAIMS
    for place, cut, snippet in changes:
        text = text[:place] + snippet + text[place + cut :]
    path = tmp_path_factory.mktemp("claims") / "claims.yaml"
    path.write_bytes(text.encode("utf-8", "replace"))
    try:
        found = load_claims(path).claims
    except UserError:
        found = ()
    assert all(json.dumps(claim.__dict__, allow_nan=False) for claim in found)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3_000), st.data())
def test_honest_percentages_are_read_back_and_possible(n, data):
    hits = data.draw(st.integers(0, n))
    printed = f"{100 * hits / n:.2f}"
    assert read_number(f"**{printed}** ± 1.2") == Printed(printed, float(printed))
    assert hits in grim(printed, n)
