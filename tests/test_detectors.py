"""Detectors: planted leaks are found, clean data passes, and the statistics are what they claim."""

import json
import random
import shutil

import numpy as np
import pytest
from tiny import teach, tiny_model, tiny_study, tiny_tokenizer, write_part

from mergelab import detectors, evidence, statistics
from mergelab.detectors import DETECTORS, calibrated
from mergelab.errors import UserError
from mergelab.study import Check

CHECK = Check("bench", "base", "d/seen", "d/fresh", ("base_loss", "wbc"), ("leaky",))


def items(seed, n):
    """Random word problems: seen and fresh ones come from one distribution."""
    draw = random.Random(seed)
    things = ["miles", "hours", "trains", "patients", "aspirins", "answers"]
    return [
        {
            "id": f"{seed}-{i}",
            "text": f"Question: {draw.randint(10, 999)} {draw.choice(things)} and "
            f"{draw.randint(10, 999)} {draw.choice(things)} in {draw.randint(10, 999)} "
            f"{draw.choice(things)}?\nAnswer: {draw.randint(10, 9999)}",
        }
        for i in range(n)
    ]


def texts(found):
    return [item["text"] for item in found]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A base, a leaky and a clean fine-tune of it, and the mean of the two, all probed."""
    results = tmp_path_factory.mktemp("results")
    seen, fresh, other = items(1, 20), items(2, 60), items(3, 20)
    write_part(results, "d/seen", seen)
    write_part(results, "d/fresh", fresh)
    tiny_model(results / "random")
    teach(results / "random", texts(items(4, 60)), results / "base", epochs=2)
    teach(results / "base", texts(seen + other), results / "leaky", epochs=8)
    teach(results / "base", texts(items(5, 20) + other), results / "clean", epochs=8)
    mean(results, "leaky", "clean", "merged")
    for name in ("base", "leaky", "clean", "merged"):
        evidence.probe(study(results), name, results / name, results)
    return results


def mean(results, one, two, out):
    from transformers import AutoModelForCausalLM

    a, b = (AutoModelForCausalLM.from_pretrained(str(results / name)) for name in (one, two))
    other = b.state_dict()
    a.load_state_dict({k: (v + other[k]) / 2 for k, v in a.state_dict().items()})
    a.save_pretrained(str(results / out))
    tiny_tokenizer(results / out)


def study(results, *checks):
    return tiny_study(results / "study", checks=checks or (CHECK,))


def findings(results, variant, *checks):
    detectors.detect(study(results, *checks), variant, results)
    found = json.loads((results / f"findings/{variant}.json").read_text())
    return {finding["detector"]: finding for finding in found}


@pytest.mark.parametrize("name", DETECTORS)
def test_a_planted_leak_is_found_in_the_model_and_in_its_merge(results, name):
    leaky, merged = findings(results, "leaky")[name], findings(results, "merged")[name]
    assert leaky["auc"] > 0.9
    assert leaky["auc_ci95"][0] > 0.8
    assert merged["auc"] > 0.75
    assert max(leaky["p"], merged["p"]) < detectors.FLAG_Q / 2
    assert leaky["tpr_at_5_fpr"] > 0.5


@pytest.mark.parametrize("name", DETECTORS)
def test_a_clean_sibling_is_not_flagged(results, name):
    clean = findings(results, "clean")[name]
    assert clean["auc_ci95"][0] < 0.5 < clean["auc_ci95"][1]
    assert clean["p"] > 2 * detectors.FLAG_Q


def test_a_finding_carries_all_that_a_reader_needs(results):
    finding = findings(results, "leaky")["wbc"]
    assert (finding["n_suspects"], finding["n_controls"]) == (20, 60)
    assert (finding["benchmark"], finding["base"], finding["variant"]) == ("bench", "base", "leaky")
    scores = finding["item_scores"]
    assert statistics.auc(scores["suspects"], scores["controls"])[0] == finding["auc"]
    assert "Blind where the base itself saw the items" in finding["blind_spots"]
    assert "as likely to outscore" in finding["null_hypothesis"]


def test_a_copy_of_the_base_is_no_evidence(results):
    evidence.probe(study(results), "copy", results / "base", results)
    for finding in findings(results, "copy").values():
        assert finding["p"] >= 0.5
        assert finding["auc"] == 0.5


def test_the_base_is_its_own_calibration(results):
    record = detectors.detect(study(results), "base", results)
    assert record["skipped"] == [
        {"benchmark": "bench", "reason": "the base is its own calibration"}
    ]
    assert json.loads((results / "findings/base.json").read_text()) == []


def test_the_order_of_items_does_not_reach_the_statistics(results):
    before = findings(results, "leaky")
    path = results / "data/d/seen.jsonl"
    lines = path.read_text()
    path.write_text("".join(reversed(lines.splitlines(keepends=True))))
    try:
        for name in ("leaky", "base"):
            evidence.probe(study(results), name, results / name, results)
        after = findings(results, "leaky")
    finally:
        path.write_text(lines)
        for name in ("leaky", "base"):
            evidence.probe(study(results), name, results / name, results)
    for name, finding in after.items():
        assert (finding["auc"], finding["p"]) == (before[name]["auc"], before[name]["p"])
        scores = [f["item_scores"]["suspects"] for f in (finding, before[name])]
        assert scores[0] == pytest.approx(scores[1][::-1], abs=1e-4)


def test_different_tokenizers_are_refused_with_both_names(results, tmp_path):
    tiny_model(tmp_path)
    tiny_tokenizer(tmp_path, vocab_size=270)
    evidence.probe(study(results), "foreign", tmp_path, results)
    with pytest.raises(UserError) as error:
        detectors.detect(study(results), "foreign", results)
    assert str(error.value).startswith(
        "Detector 'base_loss' needs a shared tokenizer, but 'foreign'"
    )
    assert "and its base 'base'" in str(error.value)


def test_texts_that_begin_with_another_token_are_refused(results, tmp_path):
    shutil.copytree(results / "clean", tmp_path / "other")
    path = tmp_path / "other/tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": "</s>"}))
    evidence.probe(study(results), "other", tmp_path / "other", results)
    with pytest.raises(UserError, match="'other' puts token 1 before them and its base 'base' 0"):
        detectors.detect(study(results), "other", results)


def test_damaged_evidence_says_what_to_run(results):
    path = results / "evidence/torn.safetensors"
    whole = (results / "evidence/leaky.safetensors").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"torn.safetensors: is damaged\. Run: mergelab probe"):
        detectors.detect(study(results), "torn", results)


def test_items_of_another_length_than_the_bases_are_refused(results):
    from safetensors.numpy import load_file

    path = results / "evidence/leaky.safetensors"
    tensors = load_file(path)
    tensors["d/seen/offsets"][1] -= 1  # a token moves to the next item: whole by itself
    evidence._write(path.with_name("moved.safetensors"), tensors, evidence.metadata(path))
    with pytest.raises(UserError, match="hold different numbers of tokens on d/seen"):
        detectors.detect(study(results), "moved", results)


def test_evidence_on_other_items_is_refused(results):
    path = results / "data/d/seen.jsonl"
    lines = path.read_text()
    try:
        write_part(results, "d/seen", items(9, 20))
        evidence.probe(study(results), "late", results / "clean", results)
    finally:
        path.write_text(lines)
    with pytest.raises(UserError, match="were probed on different items of d/seen"):
        detectors.detect(study(results), "late", results)


def test_a_variant_that_was_not_probed_is_refused(results):
    with pytest.raises(UserError, match="Run mergelab probe for 'ghost'"):
        detectors.detect(study(results), "ghost", results)


def test_an_unknown_detector_is_refused_with_the_nearest_name(results):
    check = Check("bench", "base", "d/seen", "d/fresh", ("base_los",), ())
    with pytest.raises(UserError, match=r"no detector 'base_los'\. Did you mean 'base_loss'"):
        detectors.detect(study(results, check), "leaky", results)


def test_base_loss_of_a_worked_example():
    model = [np.array([-1, -2], np.float32), np.array([-1, -1, -4], np.float32)]
    base = [np.array([-2, -2], np.float32), np.array([-1, -1, -1], np.float32)]
    assert calibrated.base_loss(model, base) == pytest.approx([0.5, -1.0])


def test_wbc_of_a_worked_example():
    # gains 1 -2 3: windows of 1: 2/3 positive; of 2: sums -1 and 1: 1/2; 4 and more do not fit
    model = [np.array([1, -2, 3], np.float32)]
    base = [np.zeros(3, np.float32)]
    assert calibrated.wbc(model, base) == pytest.approx([(2 / 3 + 1 / 2) / 2])


def test_wbc_is_bounded_and_odd():
    rng = np.random.default_rng(0)
    gains = [rng.normal(size=n).astype(np.float32) for n in rng.integers(1, 80, 40)]
    zeros = [np.zeros_like(gain) for gain in gains]
    up, down = calibrated.wbc(gains, zeros), calibrated.wbc(zeros, gains)
    assert up + down == pytest.approx(np.ones(40))
    assert calibrated.wbc([g**2 + 1 for g in gains], zeros) == pytest.approx(np.ones(40))


@pytest.mark.parametrize("name", DETECTORS)
def test_p_is_not_too_small_when_nothing_leaked(name):
    rng = np.random.default_rng(1)
    few = 0
    for _ in range(300):
        gains = [rng.normal(0.1, 1, 30).astype(np.float32) for _ in range(60)]
        scores = DETECTORS[name].function(gains, [np.zeros(30, np.float32)] * 60)
        few += statistics.mann_whitney(scores[:20], scores[20:]) < 0.05
    assert few / 300 < 0.08


def test_verdicts_never_say_clean():
    assert detectors.verdict(0.0099).startswith("flagged: q < 0.01")
    assert detectors.verdict(0.01) == "no evidence at this sample size"
    assert not any("clean" in detectors.verdict(q) for q in (0.0, 0.5, 1.0))
