"""Verdicts on claims, from measured values alone: rounding, noise, labels, GRIM, averages."""

from dataclasses import replace

import numpy as np
import pytest

from mergelab.audit import summary
from mergelab.audit.averages import compare_claimed, judge_average
from mergelab.audit.measured import Measured
from mergelab.audit.noise import GENERATED, ROUNDING, USUAL, noise, spread
from mergelab.audit.protocol import interval, unit
from mergelab.audit.verdicts import UNVERIFIABLE, Verdict, judge
from mergelab.claims.base import Claim

N = 1172
KEYS = {"value", "ci95", "n", "metric", "filter", "shots", "task", "task_version", "dtype"}
KEYS |= {"lm_eval", "chat_template", "fewshot_as_multiturn"}


def claim(printed, benchmark="arc_challenge", percent=True, **more):
    value = float(printed) / (100 if percent else 1)
    facts = {"model": "org/m", "source": "card.md:7", "published": "ARC", **more}
    return Claim(benchmark=benchmark, value=value, printed=printed, percent=percent, **facts)


def measured(hits, metric="acc", n=N, **more):
    """A value with a noise of 0.2 points in bfloat16, and none in float32."""
    facts = {
        **{"benchmark": "arc_challenge", "task": "arc_challenge", "filter": None, "shots": 25},
        **{
            "size": n,
            "whole": more.get("size", n),
            "split": "test",
            "task_version": "1.0",
            "dtype": "bfloat16",
        },
        "lm_eval": "0.4.13",
        **more,
    }
    value = hits / n
    error = (value * (1 - value) / n) ** 0.5
    noise = {"float32": 0.0001, "float16": 0.0005, "bfloat16": 0.002}
    return Measured(metric=metric, value=value, n=n, error=error, spread=noise, hits=hits, **facts)


def test_the_printed_number_is_reproduced_and_one_near_is_consistent():
    ours = measured(548)  # 46.758 %
    assert judge(claim("46.76", metric="acc"), [ours]).verdict == "reproduced"
    assert judge(claim("46.8", metric="acc"), [ours]).verdict == "reproduced"
    assert judge(claim("46.7", metric="acc"), [ours]).verdict == "reproduced"  # cut off
    near = judge(claim("46.93", metric="acc"), [ours])
    assert near.verdict == "consistent"
    assert "an honest run may give 46.37 % to 47.15 %" in near.why
    far = judge(claim("49.74", metric="acc"), [ours])
    assert (far.verdict, far.explained_by) == ("not reproduced", None)
    assert "2.98 points above ours" in far.why
    assert far.difference == pytest.approx(0.4974 - 548 / N)


def test_a_stated_dtype_narrows_what_noise_may_excuse():
    ours = measured(548)
    assert judge(claim("47.10", metric="acc"), [ours]).verdict == "consistent"
    narrow = judge(claim("47.10", metric="acc", dtype="torch.float32"), [ours])
    assert narrow.verdict == "not reproduced"


def test_one_item_is_always_forgiven():
    ours = replace(measured(548), spread=dict.fromkeys(ROUNDING, 0.0))
    assert judge(claim("46.67", metric="acc"), [ours]).verdict == "consistent"  # 547
    assert judge(claim("46.59", metric="acc"), [ours]).verdict == "not reproduced"  # 546


@pytest.mark.parametrize(
    ("printed", "fits"),
    [
        ("46.76", [548]),
        ("0.4676", [548]),
        ("46.8", [548, 549]),
        ("46.75", [548]),  # 46.758, cut off
        ("46.70", [547]),  # 46.7, and a 0 put behind it
        ("0.46757679180887374", [548]),
    ],
)
def test_grim_goes_by_the_items_of_the_task(printed, fits):
    found = judge(claim(printed, percent=float(printed) > 1), [])
    assert found.grim == {"n": N, "fits": fits, "possible": True}
    assert found.verdict == "unverifiable"


def test_no_number_of_hits_gives_an_impossible_score():
    found = judge(claim("46.79"), [measured(548)])
    assert found.verdict == "impossible"
    assert found.grim == {"n": N, "fits": [], "possible": False}
    assert "46.76 (548) or 46.84 (549)" in found.why
    assert found.ours is not None


def test_a_filter_that_the_task_does_not_have_is_named_as_the_wrong_label():
    found = judge(claim("46.76", filter="strict-match"), [measured(548)])
    assert found.explained_by == {"filter": None}
    assert "It is what no filter gives" in found.why


def test_without_a_run_the_number_of_items_is_a_guess_and_no_ground_to_accuse():
    found = judge(claim("46.79", metric="acc_norm", shots=25), [], "Score it: --fetch.")
    assert (found.verdict, summary.SCORES[found.verdict]) == ("does not fit", "warn")
    assert found.grim == {"n": N, "fits": [], "possible": False}
    assert "the nearest are 46.76 (548) or 46.84 (549). arc_challenge usually has so" in found.why
    assert found.why.endswith(
        "a mean of several runs or another way of rounding may give it. Score it: --fetch."
    )


def test_grim_does_not_accuse_the_meditron_table():
    cells = {"medqa_4options": "38.40", "arc_challenge": "40.20", "pubmedqa": "75.60"}
    for task, printed in cells.items():
        assert judge(claim(printed, task), []).grim["possible"], task
    assert judge(claim("39.10", "medqa_4options"), []).verdict == "unverifiable"


def test_grim_is_silent_where_items_are_not_right_or_wrong():
    shares = replace(measured(400, n=817), hits=None)
    assert judge(claim("48.96", "truthfulqa_mc2"), [shares]).grim is None
    assert judge(claim("48.96", "truthfulqa_mc2"), []).grim is None
    assert judge(claim("48.96", "mmlu"), []).grim is None
    assert judge(claim("46.79", rescaled=True), []).grim is None


@pytest.mark.parametrize(
    "more",
    [{"split": "validation"}, {"split": "test[:100]"}, {"metric": "f1"}, {"metric": "mcc,none"}],
)
def test_grim_does_not_accuse_what_is_about_other_items_or_no_count(more):
    assert judge(claim("64.21", **more), []).grim is None
    assert judge(claim("64.21", **{"metric": "acc", **more}), [measured(548)]).grim is None
    assert judge(claim("64.21", "hellaswag", split="test"), []).grim is None
    assert judge(claim("64.21", split="test"), []).verdict == "does not fit"
    assert judge(claim("64.21", "hellaswag", split="validation"), []).grim["possible"]


def test_acc_norm_called_acc_and_wrong_shots_are_named_together():
    found = judge(
        claim("46.76", metric="acc", shots=0),
        [measured(500, shots=0), measured(480, "acc_norm", shots=0), measured(548, "acc_norm")],
    )
    assert found.verdict == "not reproduced"
    assert found.explained_by == {"metric": "acc_norm", "shots": 25}
    assert found.ours["metric"] == "acc"
    assert {one["value"] for one in found.alternatives} == {480 / N, 548 / N}


def test_the_explanation_with_the_printed_number_goes_first():
    runs = [measured(500), measured(549, "acc_norm"), measured(548, shots=0)]
    found = judge(claim("46.76", metric="acc", shots=25), runs)
    assert found.explained_by == {"shots": 0}
    assert "It is what 0 shots gives: the number is real, but its label is wrong" in found.why
    near = judge(claim("46.76", metric="acc", shots=25), runs[:2])
    assert near.explained_by == {"metric": "acc_norm"}
    assert "It would fit acc_norm (46.84 %): its label may be wrong." in near.why


def test_grim_does_not_accuse_where_the_number_of_all_items_is_not_known():
    part = measured(31, n=50, size=None, split="mine.csv[:50]")
    found = judge(claim("62.3"), [part])
    assert (found.verdict, found.grim) == ("consistent", None)
    assert "our run saw 50 items, perhaps not all" in found.why
    assert "GRIM was not asked: how many items the claim counts is not known." in found.why
    of_part = judge(claim("62.3", split="mine.csv[:50]"), [part])
    assert (of_part.verdict, of_part.grim["n"]) == ("impossible", 50)


def test_grim_counts_the_items_of_the_claim_or_those_that_we_saw_or_the_usual_ones():
    part = measured(20, n=40, split="test[:40]")
    assert judge(claim("46.76"), [part]).grim == {"n": N, "fits": [548], "possible": True}
    assert judge(claim("47.50"), [part]).grim["possible"]  # 19 of 40
    assert judge(claim("47.50", split="test[:40]"), [part]).grim["fits"] == [19]
    assert judge(claim("46.76", split="test[:40]"), [part]).verdict == "impossible"
    grown = measured(550, n=1180, size=1180)  # the published number is of the usual items
    assert judge(claim("46.84"), [grown]).grim == {"n": N, "fits": [549], "possible": True}
    own = measured(20, n=40, size=40, split="mine/fresh[:40]")
    assert judge(claim("46.00", split="mine/fresh"), [replace(own, whole=50)]).grim["n"] == 50
    assert judge(claim("46.00", split="mine/fresh"), [replace(own, whole=None)]).grim is None


def test_grim_is_not_asked_of_several_tasks_however_they_are_summed_up():
    pooled = measured(548, combine="items")
    mean = replace(measured(550), hits=None, combine="tasks")
    for runs in ([pooled, mean], [mean, pooled]):
        found = judge(claim("46.79", "mmlu"), runs)
        assert (found.grim, found.verdict) == (None, "consistent")


def test_grim_is_asked_of_the_claimed_metric_only():
    shares = replace(measured(400, "mc2"), hits=None)
    assert judge(claim("46.79", metric="acc"), [measured(548), shares]).verdict == "impossible"
    assert judge(claim("46.79"), [measured(548), shares]).grim is None


def test_what_is_not_stated_may_be_any_and_is_listed():
    runs = [measured(500, "acc_norm"), measured(548)]
    found = judge(claim("46.76"), runs)
    assert (found.verdict, found.ours["metric"]) == ("reproduced", "acc")
    unknown = [row["field"] for row in found.protocol if row["claimed"] is None]
    assert unknown == ["metric", "shots", "task_version", "chat_template", "dtype", "split"]


def test_fractions_and_percentages_are_told_apart():
    as_percent = judge(claim("0.4676", metric="acc"), [measured(548)])
    assert as_percent.explained_by == {"scale": "a fraction, not a percentage"}
    as_fraction = judge(claim("46.76", percent=False, metric="acc"), [measured(548)])
    assert as_fraction.explained_by == {"scale": "a percentage, not a fraction"}
    assert as_fraction.verdict == "not reproduced"


def test_rescaled_scores_are_compared_rescaled():
    ours = replace(measured(548), rescaled=(548 / N - 0.25) / 0.75, stretch=1 / 0.75)
    printed = f"{100 * ours.rescaled:.2f}"
    assert judge(claim(printed, metric="acc", rescaled=True), [ours]).verdict == "reproduced"
    assert judge(claim(printed, metric="acc"), [ours]).explained_by == {"rescaled": True}
    plain = measured(548)
    assert judge(claim(printed, metric="acc", rescaled=True), [plain]).verdict == UNVERIFIABLE


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"task_version": "0"}, "version 0 of the task (here: 1.0)"),
        ({"chat_template": True}, "the chat template"),
        ({"dtype": "4bit"}, "4bit weights"),
        ({"split": "validation"}, "the split validation (here: test)"),
        ({"split": "test[:37]"}, "the split test[:37] (here: test)"),
        ({"split": "[:37]"}, "the split [:37] (here: test)"),
    ],
)
def test_a_gap_is_no_accusation_where_the_protocol_cannot_be_run(more, words):
    found = judge(claim("60.67", metric="acc", **more), [measured(548)])
    assert found.verdict == "unverifiable"
    assert words in found.why
    assert judge(claim("46.76", metric="acc", **more), [measured(548)]).verdict == "reproduced"


@pytest.mark.parametrize(
    "more",
    [
        *({"split": split} for split in ("[:100]", "eval[:37]", "train_sft[:5%]", "validation")),
        *({"task_version": "0"}, {"dtype": "4bit"}, {"chat_template": True}),
    ],
)
def test_a_run_that_gives_the_number_by_chance_accuses_no_claim_that_cannot_be_run(more):
    by_chance = [measured(550), measured(650, shots=0)]
    found = judge(claim("55.46", metric="acc", shots=25, **more), by_chance)
    assert (found.verdict, found.explained_by) == ("unverifiable", None)
    assert "which cannot be run here" in found.why


@pytest.mark.parametrize("printed", ["62.50", "97.50"])
@pytest.mark.parametrize("split", ["[:40]", "test[:40]"])
def test_first_items_are_the_same_by_either_name(printed, split):
    part = measured(20, n=40, size=N, split="test[:40]")
    found = judge(claim(printed, split=split), [part])
    assert (found.verdict, found.grim["n"]) == ("not reproduced", 40)
    assert "numerical noise" in found.why
    assert "split" not in {row["field"] for row in found.protocol if split == "test[:40]"}
    file = replace(part, split="mine.jsonl[:40]", whole=60)
    assert judge(claim(printed, split="[:40]"), [file]).verdict == "unverifiable"


@pytest.mark.parametrize("split", ["Test", " TEST ", ""])
def test_a_split_is_known_in_any_spelling(split):
    assert judge(claim("60.67", split=split), [measured(548)]).verdict == "not reproduced"
    short = measured(548, split="validation")
    assert judge(claim("60.67", split="val"), [short]).verdict == "not reproduced"


def test_a_shuffled_part_is_not_the_first_items():
    part = measured(20, n=40, size=N, split="test[:40]")
    assert judge(claim("70", split="[shuffled:40]"), [part]).verdict == "unverifiable"


def test_a_limit_above_the_number_of_items_is_none():
    assert judge(claim("60.67", split="[:100000]"), [measured(548)]).verdict == "not reproduced"
    assert judge(claim("60.67", split="[:1171]"), [measured(548)]).verdict == "unverifiable"


def test_a_stated_usual_split_is_of_the_usual_size():
    grown = measured(550, n=1180, size=1180)
    assert judge(claim("46.84", split="test"), [grown]).verdict == "consistent"
    assert judge(claim("46.84"), [grown]).verdict == "consistent"


def test_a_file_of_more_items_than_usual_holds_others():
    file = measured(1500, n=3000, size=N, whole=3000, split="mine.jsonl")
    found = judge(claim("47.53"), [file])
    assert found.verdict == "consistent"
    assert "noise, and sampling: our run saw 3,000 items, not the 1,172" in found.why
    assert judge(claim("47.53", split="mine.jsonl"), [file]).verdict == "not reproduced"
    assert judge(claim("47.53", split="validation"), [file]).verdict == "consistent"
    assert judge(claim("60.67", split="validation"), [file]).verdict == "unverifiable"


def test_another_split_is_excused_by_sampling_and_says_so():
    found = judge(claim("43.50", split="validation"), [measured(550)])
    assert found.verdict == "consistent"
    assert "(noise, and sampling: our run saw 1,172 other items)" in found.why


def test_a_silent_claim_that_fits_after_a_search_is_told_how_many_values_there_were():
    runs = [measured(500), measured(480, shots=5), measured(549, "acc_norm", shots=5)]
    found = judge(claim("46.84"), runs)
    assert found.verdict == "reproduced"
    assert found.why.endswith(
        "3 values were compared: the more there are, the likelier one fits by chance."
    )
    assert "compared" not in judge(claim("42.66"), runs).why


@pytest.mark.parametrize(("printed", "percent"), [("1", False), ("0", False), ("1e2", True)])
def test_a_bare_digit_is_no_rounded_share(printed, percent):
    assert judge(claim(printed, percent=percent), [measured(700)]).verdict == "not reproduced"
    assert judge(claim("0.6", percent=False), [measured(700)]).verdict == "reproduced"
    loss = claim("8", "wikitext", percent=False, metric="word_perplexity")
    assert unit(loss) == 1


def test_what_was_not_run_has_no_wrong_label_and_grim_says_that_it_was_not_asked():
    found = judge(claim("43.5", shots=10), [measured(550), measured(510, shots=0)])
    assert found.verdict == "unverifiable"
    assert "It is what 0 shots gives, but the claimed protocol was not run." in found.why
    assert "label" not in found.why
    part = measured(31, n=50, size=None, split="mine.csv[:50]")
    assert "GRIM was not asked" in judge(claim("62.3", shots=3), [part]).why


def test_our_run_says_whether_its_examples_were_turns():
    joined = measured(548, chat_template=True, fewshot_as_multiturn=False)
    assert judge(claim("46.76"), [joined]).ours["fewshot_as_multiturn"] is False
    assert judge(claim("46.76"), [measured(548)]).ours["fewshot_as_multiturn"] is None


def test_a_claim_about_the_chat_template_is_judged_by_the_run_with_it():
    plain, chat = measured(500), measured(548, chat_template=True)
    told = claim("46.76", metric="acc", chat_template=True)
    found = judge(told, [plain, chat])
    assert (found.verdict, found.ours["chat_template"]) == ("reproduced", True)
    assert found.alternatives == ({"metric": "acc", "filter": None, "shots": 25, "value": 500 / N},)
    false = judge(claim("60.67", metric="acc", chat_template=True), [plain, chat])
    assert (false.verdict, false.explained_by) == ("not reproduced", None)
    assert "acc, 25 shots, chat template" in false.why


@pytest.mark.parametrize("says", [True, False])
def test_a_chat_template_that_was_not_applied_and_a_hidden_one_are_named(says):
    runs = [measured(548, chat_template=not says), measured(500, chat_template=says)]
    found = judge(claim("46.76", metric="acc", chat_template=says), runs)
    assert (found.verdict, found.explained_by) == ("not reproduced", {"chat_template": not says})
    what = "a plain prompt" if says else "the chat template"
    assert f"It is what {what} gives: the number is real, but its label is wrong" in found.why


def test_a_claim_that_is_silent_about_the_chat_template_it_needs_is_told_so():
    plain, chat = measured(500), measured(548, chat_template=True)
    silent = claim("46.76", metric="acc")
    found = judge(silent, [plain, chat])
    assert (found.verdict, found.explained_by) == ("reproduced", {"chat_template": True})
    assert "The claim does not say so: the chat template." in found.why
    assert {"field": "chat_template", "claimed": None, "ours": True} in found.protocol
    assert found.alternatives[0]["value"] == 500 / N
    usual = judge(silent, [chat, plain])  # a study that applies it says so for all its claims
    assert (usual.verdict, usual.explained_by) == ("reproduced", None)
    assert usual.alternatives == ({"metric": "acc", "filter": None, "shots": 25, "value": 500 / N},)
    other = judge(claim("42.66", metric="acc"), [chat, plain])
    assert (other.verdict, other.explained_by) == ("reproduced", {"chat_template": False})
    assert other.alternatives[0]["chat_template"] is True


def test_a_silent_claim_is_not_accused_by_chats_alone_nor_where_chats_failed():
    silent = claim("60.67", metric="acc")
    chat = judge(silent, [measured(548, chat_template=True)])
    assert chat.verdict == "unverifiable"
    assert "the claim may be about a plain prompt, which was not run here" in chat.why
    failed = judge(silent, [measured(548)], "Its template fails.", chats_failed=True)
    assert failed.verdict == "unverifiable"
    assert "may be about the chat template, which was not run here. Its template" in failed.why
    plain = claim("60.67", metric="acc", chat_template=False)
    assert judge(plain, [measured(548)], chats_failed=True).verdict == "not reproduced"
    both = [measured(548), measured(500, chat_template=True)]
    assert judge(silent, both).verdict == "not reproduced"


def test_equal_versions_in_other_words_are_no_obstacle():
    found = judge(claim("60.67", metric="acc", task_version="1"), [measured(548)])
    assert found.verdict == "not reproduced"


def test_other_items_and_parts_of_them_widen_the_interval():
    part, whole = measured(140, n=300, size=N, split="test[:300]"), measured(548)
    given = claim("46.76", metric="acc")
    half = [(high - low) / 2 for low, high in (interval(given, one) for one in (part, whole))]
    expected = 1.96 * (0.002**2 + part.error**2 * (1 - 300 / N)) ** 0.5
    assert half[0] == pytest.approx(expected, rel=1e-3)
    assert half[0] > 10 * half[1]
    same = interval(replace(given, split="test[:300]"), part)
    assert same[1] - same[0] == pytest.approx(half[1] * 2, rel=0.01)
    other = interval(replace(given, split="validation"), whole)
    expected = 1.96 * (0.002**2 + 2 * whole.error**2) ** 0.5
    assert (other[1] - other[0]) / 2 == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("printed", ["nan", "inf", "-inf"])
def test_what_is_no_number_is_unverifiable(printed):
    found = judge(claim(printed), [measured(548)])
    assert (found.verdict, found.ours) == ("unverifiable", None)
    assert "is no number" in found.why
    assert judge_average(claim(printed, "average"), [], []).verdict == "unverifiable"


def test_an_unknown_metric_is_unverifiable_and_says_what_there_is():
    found = judge(claim("60.67", metric="f1"), [measured(548), measured(500, "acc_norm")])
    assert found.verdict == "unverifiable"
    assert "not measured as f1, only as: acc, 25 shots, acc_norm, 25 shots" in found.why
    assert len(found.alternatives) == 2
    fits = judge(claim("46.76", metric="f1"), [measured(548)])
    assert (fits.verdict, fits.explained_by) == ("unverifiable", {"metric": "acc"})


def test_a_verdict_is_json_of_one_shape():
    full = judge(claim("46.76", metric="acc"), [measured(548)]).plain()
    empty = judge(claim("46.76"), [], "no wheel holds it").plain()
    assert set(full) == set(empty) == set(Verdict("", "").plain())
    assert set(full["ours"]) == KEYS
    assert empty["why"] == "no wheel holds it"
    assert isinstance(full["alternatives"], list)


def averaged(values, printed, halves=0.004):
    """An average of rows that we measured at `values`."""
    rows = [claim(f"{100 * value:.2f}", f"b{i}") for i, value in enumerate(values)]
    ours = [{"value": v, "ci95": [v - halves, v + halves], "n": 100, "shots": 0} for v in values]
    shared = {"dtype": "bfloat16", "lm_eval": "0.4.13", "chat_template": False}
    verdicts = [Verdict("reproduced", "", ours=one | shared) for one in ours]
    return claim(printed, "average"), rows, verdicts


def test_an_average_is_the_mean_of_its_rows():
    assert judge_average(*averaged([0.4, 0.5, 0.6], "50.00")).verdict == "reproduced"
    given, rows, verdicts = averaged([0.4, 0.5, 0.6], "53.00")
    assert judge_average(given, rows, verdicts).verdict == "unverifiable"
    raised = [replace(row, value=row.value + 0.03) for row in rows]
    found = judge_average(given, raised, verdicts)
    assert found.verdict == "not reproduced"
    assert found.difference == pytest.approx(0.03)
    near = [replace(row, value=row.value + 0.001) for row in rows]
    assert judge_average(replace(given, value=0.501), near, verdicts).verdict == "consistent"
    missing = [verdicts[0], verdicts[1], Verdict(UNVERIFIABLE, "")]
    assert "not measured" in judge_average(given, raised, missing).why


def test_an_average_of_rows_that_cannot_be_run_as_claimed_is_no_accusation():
    given, rows, verdicts = averaged([0.4, 0.5, 0.6], "53.00")
    raised = [replace(row, value=row.value + 0.03) for row in rows]
    verdicts[1] = replace(verdicts[1], verdict=UNVERIFIABLE)
    found = judge_average(given, raised, verdicts)
    assert found.verdict == "unverifiable"
    assert "ARC: not measured as claimed" in found.why


def test_orderings_by_published_figures_are_tested_as_unpaired():
    table = {"lerp": "58.66", "slerp": "58.67", "chat": "55.40"}
    claims = [claim(value, "hellaswag", model=name) for name, value in table.items()]
    near = compare_claimed("slerp", "lerp", "hellaswag", claims)
    assert (near["claimed"], near["significant"], near["basis"]) == (
        *(True, False),
        "published figures",
    )
    assert near["p"] > 0.9
    far = compare_claimed("slerp", "chat", "hellaswag", claims)
    assert far["significant"]
    assert far["ci95"][0] > 0
    false = compare_claimed("chat", "slerp", "hellaswag", claims)
    assert (false["claimed"], false["significant"]) == (False, False)
    nothing = compare_claimed("slerp", "other", "hellaswag", claims)
    assert (nothing["difference"], nothing["p"]) == (None, None)
    assert compare_claimed("a", "b", "x", [claim("1", "x", model=m) for m in "ab"])["p"] is None


def test_published_figures_stand_for_whole_test_sets_and_shares_of_items():
    claims = [claim("58.67", "arc_challenge", model=name) for name in "ab"]
    part = measured(30, n=50, size=N, split="test[:50]")
    whole = compare_claimed("a", "b", "arc_challenge", claims)
    assert compare_claimed("a", "b", "arc_challenge", claims, [part], [part]) == whole
    assert "1,172 items" in whole["why"]
    rescaled = [replace(one, rescaled=True) for one in claims]
    assert compare_claimed("a", "b", "arc_challenge", rescaled)["p"] is None


def test_of_losses_the_smaller_is_better():
    facts = {"metric": "bits_per_byte", "percent": False}
    claims = [claim(v, "text", model=name, **facts) for name, v in (("a", "1.94"), ("b", "1.81"))]
    assert compare_claimed("a", "b", "text", claims)["claimed"] is False
    assert compare_claimed("b", "a", "text", claims)["claimed"] is True


def test_noise_flips_ties_and_nothing_else():
    one = np.ones(2)
    tied, clear = [[-4.0, -4.0001]], [[-4.0, -9.0]]
    sure = spread(clear, one[:1], one[:1], "bfloat16", "bfloat16", 0.03)
    assert sure < 1e-6
    alone = spread(tied, one[:1], one[:1], "bfloat16", "float32", 0.03)
    assert alone == pytest.approx(0.5**0.5, abs=0.01)
    assert spread(tied * 2, one, one, "bfloat16", "float32", 0.03) == pytest.approx(0.5, abs=0.01)
    wrong = spread([[-4.0, -4.0001, -50.0]], np.zeros(1), one[:1], "bfloat16", "float32", 0.03)
    assert wrong == pytest.approx(0.5, abs=0.01)  # only one of two others is right


def test_noise_of_shares_losses_and_written_answers():
    one = np.ones(4)
    shares = spread([[-4.0, -4.0]] * 4, one / 2, one, "bfloat16", "float32", 0.03)
    assert shares == pytest.approx(0.25 * 0.03 * 12**0.5 / 2, rel=1e-3)
    loss = spread([[-100.0]] * 4, one * 100, one * 50, "bfloat16", "float32")
    assert loss == pytest.approx(2 * 0.002 / 2)
    written = spread([[]] * 4, np.array([0.0, 0.0, 1.0, 1.0]), one, "bfloat16", "bfloat16")
    assert written == pytest.approx((GENERATED / 4) ** 0.5)
    assert spread([[]] * 4, one, one, "bfloat16", "bfloat16") == 0
    assert noise("float32", USUAL) < noise("float16", USUAL) == USUAL / 8 < noise("bfloat16", USUAL)


def test_a_printed_digit_is_worth_what_it_stands_for():
    assert unit(claim("46.76")) == pytest.approx(1e-4)
    assert unit(claim("47")) == pytest.approx(0.01)
    assert unit(claim("0.468", percent=False)) == pytest.approx(1e-3)
    assert np.isnan(unit(claim("nan")))
