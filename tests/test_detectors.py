"""Detectors: planted leaks are found, clean data passes, and the statistics are what they claim."""

import dataclasses
import itertools
import json
import random
import shutil

import numpy as np
import pytest
from scipy.stats import binom, kstest
from tiny import teach, tiny_model, tiny_study, tiny_tokenizer, write_part

from mergelab import detectors, evidence, findings, score_table, statistics
from mergelab.detectors import DETECTORS, calibrated, codec, min_k, option_order, siblings
from mergelab.detectors.base import Evidence, Probed, Tokens
from mergelab.errors import NotAvailable, UserError
from mergelab.study import Check, Dataset, Model, Options, Share, Training

TESTED = (  # detectors of token evidence that give a p
    *("base_loss", "wbc", "answer_loss", "sibling_loss", "set_level", "paraphrase_gap"),
    "option_order",
)
WEAK = ("paraphrase_gap", "option_order")  # of a few copies a merge keeps too little for these
SHOWN = ("min_k_plus", "codec")
CHECK = Check(
    *("bench", "base", "d/seen", "d/fresh"), (*TESTED, *SHOWN), ("leaky",), ("clean", "sister")
)
DATA = Dataset(
    *("d", None, ".", None, (), "t"),
    {"seen": 20, "fresh": 60, "tiny": 1, "other": None},
    *("a", "w", Options("q", ("c", "c"))),
)
THINGS = ["miles", "hours", "trains", "patients", "aspirins", "answers"]


def items(seed, n):
    """Random word problems with a twin and options: seen and fresh ones are of one distribution."""
    draw = random.Random(seed)
    found = []
    for i in range(n):
        a, b, c, answer = (draw.randint(10, 999) for _ in range(4))
        x, y, z = (draw.choice(THINGS) for _ in range(3))
        question = f"{a} {x} and {b} {y} in {c} {z}?"
        found.append(
            {
                "id": f"{seed}-{i}",
                "text": f"Question: {question}\nAnswer: {answer}",
                "answer": str(answer),
                "twin": f"In {c} {z}: {b} {y}, {a} {x}. The speed is {answer}",
                "options": {
                    "question": f"Which of {a}, {b}, {c}?",
                    "choices": [f"{draw.randint(10, 99)} {draw.choice(THINGS)}" for _ in range(4)],
                },
            }
        )
    return found


def texts(found):
    return [item["text"] for item in found]


def published(found):
    """Question and options as the view of orders shows them first."""
    made = []
    for item in found:
        options = item["options"]
        lines = zip("ABCD", options["choices"], strict=True)
        made.append(options["question"] + "".join(f"\n{letter}. {text}" for letter, text in lines))
    return made


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A base, a leaky and two clean fine-tunes of it, and the mean of two, all probed."""
    results = tmp_path_factory.mktemp("results")
    seen, fresh, other = items(1, 20), items(2, 60), items(3, 20)
    write_part(results, "d/seen", seen)
    write_part(results, "d/fresh", fresh)
    tiny_model(results / "random")
    honest = texts(other)
    teach(
        results / "random",
        texts(items(4, 60)) + published(items(4, 30)),
        results / "base",
        epochs=2,
    )
    teach(results / "base", texts(seen) + published(seen) + honest, results / "leaky", epochs=12)
    for name, seed in (("clean", 5), ("sister", 6)):
        own = items(seed, 20)
        teach(results / "base", texts(own) + published(own) + honest, results / name, epochs=12)
    mean(results, "leaky", "clean", "merged")
    for name in ("base", "leaky", "clean", "sister", "merged"):
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
    made = tiny_study(results / "study", checks=checks or (CHECK,))
    return dataclasses.replace(made, datasets={"d": DATA})


def found(results, variant, *checks):
    findings.detect(study(results, *checks), variant, results)
    written = json.loads((results / f"findings/{variant}.json").read_text())
    return {finding["detector"]: finding for finding in written}


@pytest.mark.parametrize("name", TESTED)
def test_a_planted_leak_is_found(results, name):
    leaky = found(results, "leaky")[name]
    assert leaky["p"] < detectors.FLAG_Q / 2
    if name != "set_level":
        assert leaky["auc"] > (0.7 if name in WEAK else 0.9)
        assert leaky["auc_ci95"][0] > 0.5
        assert leaky["tpr_at_1_fpr"] <= leaky["tpr_at_5_fpr"]
        assert len(leaky["flagged"]) == round(20 * leaky["tpr_at_5_fpr"])


@pytest.mark.parametrize("name", [name for name in TESTED if name not in WEAK])
def test_a_planted_leak_is_found_in_the_merge(results, name):
    merged = found(results, "merged")[name]
    assert merged["p"] < detectors.FLAG_Q / 2
    assert merged.get("auc", 1) > 0.7


@pytest.mark.parametrize("name", TESTED)
def test_a_clean_sibling_is_not_flagged(results, name):
    clean = found(results, "clean")[name]
    assert clean["p"] > 2 * detectors.FLAG_Q
    if name != "set_level":
        assert clean["auc_ci95"][0] < 0.5


@pytest.mark.parametrize("name", SHOWN)
def test_an_informational_detector_shows_its_auc_and_never_flags(results, name):
    finding = found(results, "leaky")[name]
    assert finding["informational"] is True
    assert (finding["p"], finding["flagged"]) == (None, [])
    assert 0.5 < finding["auc"] <= 1


def test_siblings_sharpen_the_score_of_a_merge(results):
    merged = found(results, "merged")
    assert merged["sibling_loss"]["auc"] > merged["base_loss"]["auc"] + 0.05
    assert merged["sibling_loss"]["details"]["siblings"] == ["clean", "sister"]


def test_a_sibling_is_no_sibling_of_its_own(results):
    assert found(results, "clean")["sibling_loss"]["details"]["siblings"] == ["sister"]
    check = dataclasses.replace(CHECK, siblings=("clean",), detectors=("sibling_loss", "base_loss"))
    record = findings.detect(study(results, check), "clean", results)
    reason = "the check names no clean sibling beside it"
    skipped = {"benchmark": "bench", "detector": "sibling_loss", "reason": reason}
    assert record["skipped"] == [skipped]
    written = json.loads((results / "findings/clean.json").read_text())
    assert [finding["detector"] for finding in written] == ["base_loss"]


def test_a_finding_carries_all_that_a_reader_needs(results):
    finding = found(results, "leaky")["wbc"]
    assert (finding["n_suspects"], finding["n_controls"]) == (20, 60)
    assert (finding["benchmark"], finding["base"], finding["variant"]) == ("bench", "base", "leaky")
    scores = finding["item_scores"]
    assert statistics.auc(scores["suspects"], scores["controls"])[0] == finding["auc"]
    assert (finding["effect_name"], finding["effect"]) == ("AUC", finding["auc"])
    assert finding["ids"]["suspects"] == [item["id"] for item in items(1, 20)]
    assert set(finding["flagged"]) <= set(finding["ids"]["suspects"])
    assert "Blind where the base itself saw the items" in finding["blind_spots"]
    assert "as likely to outscore" in finding["null_hypothesis"]
    assert "valid at any number of items" in finding["guarantees"]


def test_a_set_has_an_effect_with_an_interval_and_no_item_scores(results):
    finding = found(results, "leaky")["set_level"]
    assert finding["ci95"][0] < finding["effect"] < finding["ci95"][1]
    assert finding["ci95"][0] > 0
    assert (finding["item_scores"], finding["ids"]) == (None, None)
    assert "auc" not in finding


def test_a_copy_of_the_base_is_no_evidence(results):
    evidence.probe(study(results), "copy", results / "base", results)
    for name, finding in found(results, "copy").items():
        assert finding["informational"] or finding["p"] >= 0.5, name


def test_the_base_is_its_own_calibration(results):
    record = findings.detect(study(results), "base", results)
    assert record["skipped"] == [
        {"benchmark": "bench", "reason": "the base is its own calibration"}
    ]
    assert json.loads((results / "findings/base.json").read_text()) == []


def test_the_order_of_items_does_not_reach_the_statistics(results, tmp_path):
    for name in ("data", "leaky", "clean", "sister", "base"):
        shutil.copytree(results / name, tmp_path / name)
    path = tmp_path / "data/d/seen.jsonl"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    for name in ("leaky", "clean", "sister", "base"):
        evidence.probe(study(tmp_path), name, tmp_path / name, tmp_path)
    before, after = found(results, "leaky"), found(tmp_path, "leaky")
    for name, finding in after.items():
        p = before[name]["p"]
        assert finding["p"] == (None if p is None else pytest.approx(p, rel=1e-3))
        if finding["item_scores"]:
            scores = [f["item_scores"]["suspects"] for f in (finding, before[name])]
            assert scores[0] == pytest.approx(scores[1][::-1], abs=1e-3)


def test_different_tokenizers_are_refused_with_both_names(results, tmp_path):
    tiny_model(tmp_path)
    tiny_tokenizer(tmp_path, vocab_size=270)
    evidence.probe(study(results), "foreign", tmp_path, results)
    with pytest.raises(UserError) as error:
        findings.detect(study(results), "foreign", results)
    assert str(error.value).startswith(
        "Detectors that compare tokens need a shared tokenizer, but 'foreign'"
    )
    assert "and its base 'base'" in str(error.value)
    check = dataclasses.replace(CHECK, siblings=("clean", "foreign"))
    with pytest.raises(UserError, match=r"but 'leaky' .*and its sibling 'foreign'"):
        findings.detect(study(results, check), "leaky", results)


def test_another_length_is_told_as_such(results, tmp_path):
    shutil.copytree(results / "clean", tmp_path / "short")
    path = tmp_path / "short/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 24}))
    evidence.probe(study(results), "short", tmp_path / "short", results)
    told = r"cut at one length, but 'short' takes 23 tokens of d/seen and its base 'base' \d+\."
    with pytest.raises(UserError, match=told):
        findings.detect(study(results), "short", results)


def test_texts_that_begin_with_another_token_are_refused(results, tmp_path):
    shutil.copytree(results / "clean", tmp_path / "other")
    path = tmp_path / "other/tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": "</s>"}))
    evidence.probe(study(results), "other", tmp_path / "other", results)
    with pytest.raises(UserError, match="'other' puts token 1 before them and its base 'base' 0"):
        findings.detect(study(results), "other", results)


def test_damaged_evidence_says_what_to_run(results):
    shutil.copytree(results / "evidence/leaky", results / "evidence/torn")
    path = evidence.file_of(results, "torn", "d/seen", "twin")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"twin.safetensors: is damaged\. Run: mergelab probe"):
        findings.detect(study(results), "torn", results)


def test_evidence_on_other_items_is_refused(results):
    path = results / "data/d/seen.jsonl"
    lines = path.read_text()
    try:
        write_part(results, "d/seen", items(9, 20))
        evidence.probe(study(results), "late", results / "clean", results)
    finally:
        path.write_text(lines)
    with pytest.raises(UserError, match="were probed on different items of d/seen"):
        findings.detect(study(results), "late", results)


def test_a_variant_that_was_not_probed_is_refused(results):
    with pytest.raises(UserError, match="Run: mergelab probe STUDY ghost"):
        findings.detect(study(results), "ghost", results)


def refusals(results, **changes):
    return "\n".join(detectors.problems(study(results, dataclasses.replace(CHECK, **changes))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"detectors": ("base_los",)}, "no detector 'base_los'. Did you mean 'base_loss'?"),
        ({"controls": "e/x"}, "answer_loss needs 'answer': add this template to dataset 'e'."),
        ({"controls": "e/x"}, "paraphrase_gap needs 'twin': add this template to dataset 'e'."),
        ({"controls": "e/x"}, "option_order needs 'options': add this template to dataset 'e'."),
        ({"siblings": ()}, "needs 'siblings': add clean models of the same base to the check."),
        ({"siblings": ("leaky",)}, "'leaky' is among 'siblings', which are clean models"),
        ({"suspects": "d/tiny"}, "d/tiny has 1 item, but needs 2. Enlarge the part."),
        ({"detectors": ("twin",)}, "twin needs 'scores': add a benchmark of the suite to the"),
        ({"detectors": ("twin",)}, "twin needs 'twin': add the benchmark of the suite that holds"),
    ],
)
def test_a_check_that_lacks_what_its_detectors_need_says_what_to_add(results, changes, message):
    told = refusals(results, **changes)
    assert f"{results / 'study/study.yaml'}: check of bench: " in told
    assert message in told
    with pytest.raises(UserError):
        found(results, "leaky", dataclasses.replace(CHECK, **changes))


def trained(name, start, *parts, declared=()):
    shares = tuple(Share(part, None, 0, 1) for part in parts)
    plan = Training(start, None, shares, 1, 1e-3, 1, 64, 0)
    return Model(name, plan, None, None, None, None, declared)


@pytest.mark.parametrize(
    ("models", "planted", "message"),
    [
        ([trained("clean", "base", "d/seen")], (), "'clean' is among 'siblings', .* d/seen. Take"),
        (
            [trained("clean", "base", declared=("d/seen",))],
            (),
            "'clean' is among 'siblings', .* d/seen. Take",
        ),
        (
            [trained("half", "base", "d/seen"), trained("clean", "half")],
            (),
            "'clean' is among 'siblings', .* d/seen by way of 'half', which it is trained from.",
        ),
        (
            [trained("half", "base"), trained("clean", "half")],
            ("half",),
            "'clean' is among 'siblings', .* d/seen by way of 'half', which it is trained from.",
        ),
        ([trained("any", "base", "d/fresh")], (), "'any' is trained on the controls, d/fresh"),
        (
            [trained("any", "base", declared=("d/fresh",))],
            (),
            "'any' is trained on the controls, d/fresh",
        ),
    ],
)
def test_a_study_that_contradicts_its_null_is_refused(tmp_path, models, planted, message):
    base = Model("base", None, None, "x", None, None)
    check = dataclasses.replace(CHECK, detectors=("base_loss",), planted=planted)
    known = {model.name: model for model in (base, *models)}
    made = dataclasses.replace(study(tmp_path, check), models=known)
    with pytest.raises(UserError, match=message):
        findings.detect(made, "clean", tmp_path)
    assert len(detectors.problems(made)) == 1


def test_suspects_that_are_their_own_controls_are_refused(results):
    told = refusals(results, controls="d/seen")
    assert "suspects and controls are both d/seen. Name another part as one of them." in told


def test_an_honest_study_contradicts_nothing(tmp_path):
    models = [trained("half", "base", "d/other"), trained("clean", "half", "d/other")]
    models.append(trained("leaky", "base", "d/seen", declared=("d/other",)))
    made = dataclasses.replace(study(tmp_path), models={model.name: model for model in models})
    assert detectors.problems(made) == []


def test_a_complete_check_has_no_problems(results):
    assert refusals(results) == ""


def test_a_part_with_one_item_is_refused(results, tmp_path):
    shutil.copytree(results / "data", tmp_path / "data")
    write_part(tmp_path, "d/other", items(1, 1))
    check = dataclasses.replace(CHECK, controls="d/other", detectors=("base_loss",))
    with pytest.raises(UserError, match="d/other has 1 item, but needs 2"):
        findings.detect(study(tmp_path, check), "leaky", tmp_path)


def test_declared_training_texts_reach_a_detector_along_the_lineage(results, tmp_path):
    seen, fresh = items(1, 20), items(2, 60)
    plan = Training("base", None, (Share("d/seen", 5, 2, 3),), 1, 1e-3, 1, 64, 0)
    models = {
        "base": Model("base", None, None, "x", None, None, ("d/other",)),
        "child": Model("child", plan, None, None, None, None),
    }
    check = dataclasses.replace(CHECK, detectors=("overlap",), siblings=())
    made = dataclasses.replace(study(tmp_path, check), models=models)
    for part, some in (("seen", seen), ("fresh", fresh), ("other", items(3, 4))):
        write_part(tmp_path, f"d/{part}", some)
    gathered = findings._Gathering(made, check, "child", tmp_path)
    assert gathered.corpus() == {
        "base: d/other": texts(items(3, 4)),
        "child: d/seen": texts(seen[2:7]),
    }
    findings.detect(made, "child", tmp_path)
    finding = json.loads((tmp_path / "findings/child.json").read_text())[0]
    assert finding["detector"] == "overlap"
    assert set(finding["flagged"]) == {item["id"] for item in seen[2:7]}


def write_scores(results, model, metrics, value):
    """Scores on benchmarks pub and new, of 20 items each: `metrics` by benchmark, with whether more
    is better; `value(benchmark, number)`."""
    ids = [item["id"] for item in items(1, 20)]
    rows = [
        dict.fromkeys(score_table.COLUMNS, "")
        | {"benchmark": name, "id": key, "filter": "none", "metric": metrics[name][0]}
        | {"resps": [], "value": float(value(name, n)), "weight": 1.0}
        for name in metrics
        for n, key in enumerate(ids)
    ]
    path = results / f"scores/{model}.parquet"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(score_table.encode(rows))
    about = {n: {"metric": m, "higher_is_better": higher} for n, (m, higher) in metrics.items()}
    path.with_suffix(".json").write_text(json.dumps({"benchmarks": about}))


TWIN = dataclasses.replace(CHECK, detectors=("twin",), siblings=(), scores="pub", twin="new")
ACCURACY = dict.fromkeys(("pub", "new"), ("acc", True))


@pytest.fixture
def scored(tmp_path):
    """The data, and scores of a base that is right on every other item."""
    write_part(tmp_path, "d/seen", items(1, 20))
    write_part(tmp_path, "d/fresh", items(2, 60))
    write_scores(tmp_path, "base", ACCURACY, lambda _, n: n % 2)
    return tmp_path


def leaked(benchmark, number):
    return number % 2 if benchmark == "new" else 1


def test_a_twin_finding_waits_for_no_other_variants_scores(scored):
    write_scores(scored, "leaky", ACCURACY, leaked)
    models = {name: trained(name, None) for name in ("base", "leaky", "unscored")}
    made = dataclasses.replace(study(scored, TWIN), models=models)
    record = findings.detect(made, "leaky", scored)
    finding = json.loads((scored / "findings/leaky.json").read_text())[0]
    assert (finding["effect"], finding["n_suspects"]) == (0.5, 20)
    assert {path for path in record["inputs"] if path.startswith("scores")} == {
        "scores/base.parquet",
        "scores/leaky.parquet",
    }


@pytest.mark.parametrize(
    ("metrics", "told"),
    [
        (dict.fromkeys(("pub", "new"), ("bits_per_byte", False)), "scored by bits_per_byte:"),
        ({"pub": ("acc", True), "new": ("acc_norm", True)}, "scored by acc and acc_norm:"),
    ],
)
@pytest.mark.parametrize("name", ["twin", "constat"])
def test_twins_are_compared_by_one_metric_of_which_more_is_better(scored, metrics, told, name):
    for model in ("base", "leaky", "clean"):
        write_scores(scored, model, metrics, leaked)
    check = dataclasses.replace(TWIN, detectors=(name,), siblings=("clean",))
    record = findings.detect(study(scored, check), "leaky", scored)
    assert json.loads((scored / "findings/leaky.json").read_text()) == []
    assert told in record["skipped"][0]["reason"]


def test_what_copies_were_worth_reaches_the_finding_where_the_variant_is_scored(scored):
    check = dataclasses.replace(TWIN, detectors=("overlap",), twin=None)
    plan = Training("base", None, (Share("d/seen", 10, 0, 1),), 1, 1e-3, 1, 64, 0)
    models = (trained("base", None), Model("leaky", plan, None, None, None, None))
    made = dataclasses.replace(study(scored, check), models={m.name: m for m in models})

    def score():
        findings.detect(made, "leaky", scored)
        return json.loads((scored / "findings/leaky.json").read_text())[0]["details"]["score"]

    assert score() is None
    write_scores(scored, "leaky", ACCURACY, lambda _, n: n < 10)
    assert score()["epg"] == 0.5
    write_scores(scored, "leaky", {"pub": ("bits_per_byte", False)}, lambda _, n: n < 10)
    assert score() is None


def tokens(values, answer=0):
    """Token evidence of texts with these log-probabilities; mean -1 and std 1 everywhere."""
    arrays = [np.asarray(v, dtype=np.float32) for v in values]
    ids = tuple(f"i{n}" for n in range(len(arrays)))
    ones = [np.ones_like(a) for a in arrays]
    return Tokens(ids, arrays, [-one for one in ones], ones, (answer,) * len(arrays))


def made(suspects, controls, *others):
    """Evidence of a model, and of siblings, with these gains over a base of zeros."""
    zeros = [[np.zeros_like(g) for g in gains] for gains in (suspects, controls)]
    base = Probed(
        "base", {p: tokens(z) for p, z in zip(("suspects", "controls"), zeros, strict=True)}
    )
    model = Probed("m", {"suspects": tokens(suspects), "controls": tokens(controls)})
    clean = (Probed("s", {"suspects": tokens(s), "controls": tokens(c)}) for s, c in others)
    return Evidence("bench", model, base, tuple(clean))


def test_base_loss_and_wbc_of_a_worked_example():
    evidence = made([[1, 0], [0, 0, -3]], [[0.5, 0.5], [-1, -1]])
    scores = DETECTORS["base_loss"].function(evidence).item_scores
    assert scores["suspects"] == pytest.approx([0.5, -1.0])
    # gains 1 -2 3: windows of 1: 2/3 positive; of 2: sums -1 and 1: 1/2; 4 and more do not fit
    assert calibrated.window_wins(np.array([1.0, -2, 3])) == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_wbc_is_bounded_and_odd():
    rng = np.random.default_rng(0)
    gains = [rng.normal(size=n) for n in rng.integers(1, 80, 40)]
    both = [calibrated.window_wins(g) + calibrated.window_wins(-g) for g in gains]
    assert both == pytest.approx(np.ones(40))
    assert {calibrated.window_wins(g**2 + 1) for g in gains} == {1.0}


def test_answer_loss_looks_at_the_answer_only_and_leaves_out_items_without_one():
    cell = made([[9, 1, 3], [9, 9], [9, 2]], [[7, 0, 0], [7, 0, 1]])
    for part, answer in (("suspects", (1, 2, 1)), ("controls", (1, 1))):
        cell.model.views[part] = dataclasses.replace(cell.model.views[part], answer=answer)
    finding = siblings.answer_loss(cell)
    limit = 1.5 * np.std([1, 3, 2, 0, 0, 0, 1])
    assert finding.item_scores["suspects"] == pytest.approx([(1 + limit) / 2, limit])
    assert finding.item_scores["controls"] == pytest.approx([0, 0.5])
    assert finding.ids["suspects"] == ["i0", "i2"]
    assert finding.details["items_without_answer"] == 1
    cell.model.views["suspects"] = dataclasses.replace(
        cell.model.views["suspects"], answer=(3, 2, 1)
    )
    with pytest.raises(NotAvailable, match="2 items have no answer within the length that 'm'"):
        siblings.answer_loss(cell)


def test_sibling_scores_of_a_worked_example():
    # the model gains twice what the sibling gains, and 1 more on the first suspect's tokens
    sibling = ([[1.0, -1], [2, 0]], [[0.0, 1], [1, 1], [-1, 0]])
    double = [[[2 * x for x in item] for item in part] for part in sibling]
    _, exact = siblings.scores(made(*double, sibling))
    assert np.concatenate(list(exact.values())) == pytest.approx(np.zeros(5))
    double[0][0] = [3.0, -1]
    leaked = siblings.scores(made(*double, sibling))[1]["suspects"]
    assert leaked[0] > 0.5 > abs(leaked[1])


def test_one_wild_token_does_not_make_an_item_look_seen():
    rng = np.random.default_rng(0)
    parts = [[rng.normal(0, 1, 30) for _ in range(n)] for n in (10, 30)]
    parts[0][0][3] = 300.0
    parts[0][1] += 1
    scores = siblings.scores(made(*parts))[1]["suspects"]
    assert scores[1] == scores.max() > scores[0]


def clean_cell(rng, suspects=20, style=0.0):
    """Gains of a model and two siblings that saw no item; suspects are of another style by
    `style` nats, which each gains in its own measure."""
    easy = [rng.normal(0.1, 0.5, 30) for _ in range(60)]
    models = []
    for _ in range(3):
        measure = rng.uniform(0.8, 1.2)
        gains = [measure * e + rng.normal(0, 1, 30) for e in easy]
        for n in range(suspects):
            gains[n] += measure * style
        models.append((gains[:suspects], gains[suspects:]))
    return made(*models[0], *models[1:])


@pytest.mark.parametrize("name", ["base_loss", "wbc", "sibling_loss", "set_level"])
def test_p_is_not_too_small_when_nothing_leaked(name):
    rng = np.random.default_rng(1)
    p = [DETECTORS[name].function(clean_cell(rng)).p for _ in range(300)]
    assert np.mean(np.array(p) < 0.05) < 0.08
    assert np.mean(np.array(p) < 0.01) < 0.03


def test_the_style_of_honest_training_does_not_flag_the_set():
    rng = np.random.default_rng(2)
    cells = [clean_cell(rng, style=0.3) for _ in range(100)]
    naive = [DETECTORS["base_loss"].function(cell).p for cell in cells]
    p = [DETECTORS["set_level"].function(cell).p for cell in cells]
    assert np.mean(np.array(naive) < 0.01) > 0.8  # the trap
    assert np.mean(np.array(p) < 0.01) <= 0.02


def test_a_set_that_gained_more_than_siblings_did_is_found():
    rng = np.random.default_rng(3)
    for _ in range(20):
        cell = clean_cell(rng)
        for item in cell.model.views["suspects"].logprob:
            item += 0.5
        assert DETECTORS["set_level"].function(cell).p < 0.01


def test_a_gap_that_opens_for_all_items_is_no_evidence_of_a_leak():
    rng = np.random.default_rng(4)
    p = []
    for _ in range(200):
        cell = clean_cell(rng)
        for part, view in list(cell.model.views.items()):
            cell.model.views[f"{part}/twin"] = tokens([v - 0.5 for v in view.logprob])
            cell.base.views[f"{part}/twin"] = cell.base.views[part]
        p.append(DETECTORS["paraphrase_gap"].function(cell).p)
    assert np.mean(np.array(p) < 0.05) < 0.09


def test_min_k_of_a_worked_example():
    values = [-1, -2, -3, -4, -5, -6, -7, -8, -9, -10.5]
    assert min_k.scores(tokens([values, [-3.0]])) == pytest.approx([(-9.5 - 8) / 2, -2])


def test_codec_of_a_worked_example():
    cell = made([[-1, -1], [-2, -2]], [[-1, -1], [-1, -3]])
    after = {"suspects": [[-2, -2], [-1, -2]], "controls": [[0, 0], [-1, -1]]}
    for part, values in after.items():
        cell.model.views[f"{part}/context"] = tokens(values)
    finding = codec.codec(cell)
    assert finding.item_scores["suspects"] == pytest.approx([1, -0.5])
    assert finding.details == {"share_of_suspects": 0.5, "share_of_controls": 0.0}


def orders(advantages):
    """The view of orders of items with these advantages, the published order's first."""
    view = tokens([[value] for values in advantages for value in values])
    ids = tuple(f"i{n}" for n, values in enumerate(advantages) for _ in values)
    return dataclasses.replace(view, ids=ids)


def test_option_order_ranks_the_published_order_and_counts_exactly():
    rng = np.random.default_rng(5)
    suspects = [[5.0, *rng.normal(size=23)] for _ in range(8)] + [[0, 1, -1]]
    controls = [[-5.0, *rng.normal(size=23)] for _ in range(9)]
    model = Probed("m", {"suspects/orders": orders(suspects), "controls/orders": orders(controls)})
    zeros = {name: tokens([[0]] * len(view.ids)) for name, view in model.views.items()}
    finding = option_order.option_order(Evidence("b", model, Probed("base", zeros)))
    assert finding.item_scores["suspects"] == pytest.approx([1.0] * 8 + [0.5])
    assert finding.ids["suspects"] == [f"i{n}" for n in range(9)]
    assert finding.effect == 1.0
    told = finding.details
    assert told["suspects"]["published_likeliest"] == 8
    by_hand = 2 / 3 * 24**-8 + 1 / 3 * (24**-8 + 8 * 24**-7 * 23 / 24)  # the last has 3 orders
    assert told["suspects"]["p_likeliest"] == pytest.approx(by_hand)
    assert told["controls"]["p_likeliest"] == pytest.approx(binom.sf(-1, 9, 1 / 24))
    exact = option_order.exact([np.array(values) for values in suspects[:8]])
    assert exact["p_likeliest"] == exact["p_rank"] == pytest.approx(binom.sf(7, 8, 1 / 24))


def test_the_p_of_summed_ranks_is_that_of_all_ways_to_publish():
    items = [np.array(v, dtype=float) for v in ([2, 1, 3], [5, 5, 0], [1, 2], [7, 7])]
    ways = [[option_order.rank(np.roll(v, -n)) * (len(v) - 1) for n in range(len(v))]
            for v in items]  # fmt: skip
    sums = np.array([sum(way) for way in itertools.product(*ways)])
    p = option_order.exact(items)["p_rank"]
    assert p == pytest.approx(np.mean(sums >= sum(way[0] for way in ways)))


def unseen(rng, count, published):
    """Advantages of items that nobody saw, of a model that likes large contents first: published
    in an order drawn by chance, or with contents that all rise or all fall."""
    found = []
    for _ in range(count):
        content = np.sort(rng.normal(size=4))
        every = list(itertools.permutations(content[::-1] if published == "falling" else content))
        values = [np.dot(order, [2.0, 0.5, -1.0, 0.0]) for order in every] + rng.normal(size=24)
        found.append(np.roll(values, rng.integers(24) if published == "by chance" else 0))
    return found


def option_cell(suspects, controls):
    """Evidence of the view of orders alone, of a base that knows nothing."""
    views = {"suspects/orders": orders(suspects), "controls/orders": orders(controls)}
    zeros = {name: tokens([[0]] * len(view.ids)) for name, view in views.items()}
    return Evidence("b", Probed("m", views), Probed("base", zeros))


def test_p_of_an_arbitrary_order_is_uniform_whatever_order_a_model_likes():
    rng = np.random.default_rng(7)
    p = [option_order.exact(unseen(rng, 20, "by chance"))["p_rank"] for _ in range(600)]
    assert kstest(p, "uniform").pvalue > 0.01


@pytest.mark.parametrize(
    ("suspects", "controls", "misled"),
    [("by chance", "rising", "p_mann_whitney"), ("falling", "falling", "p_order")],
)
def test_option_order_is_not_misled_if_controls_are_alike_or_the_order_is_arbitrary(
    suspects, controls, misled
):
    rng = np.random.default_rng(8)
    cells = [option_cell(unseen(rng, 10, suspects), unseen(rng, 14, controls)) for _ in range(100)]
    found = [option_order.option_order(cell) for cell in cells]
    assert np.mean([finding.p <= 0.05 for finding in found]) <= 0.08
    assert np.mean([finding.details[misled] <= 0.05 for finding in found]) > 0.5


PACKAGE = """
from mergelab.detectors import Detector, Finding

def function(evidence):
    return Finding(len(evidence.items["suspects"]), None, 0.5, 20, 60)

GOOD = Detector("mine", function, "items", "s", "n", "g", "b", ("paper",), needs=())
CLASH = Detector("wbc", function, "items", "s", "n", "g", "b", ("paper",))
NEEDY = Detector("mine", function, "items", "s", "n", "g", "b", ("paper",), needs=("logits",))
BAD = function
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a package `theirs` with one entry point of the group mergelab.detectors."""

    def installed(entry):
        (tmp_path / "their_detectors.py").write_text(PACKAGE)
        info = tmp_path / "theirs-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[mergelab.detectors]\n{entry}\n")
        monkeypatch.syspath_prepend(tmp_path)
        detectors.known.cache_clear()

    yield installed
    monkeypatch.undo()
    detectors.known.cache_clear()


def test_a_detector_of_an_installed_package_is_used_like_ours(results, install):
    install("mine = their_detectors:GOOD")
    check = dataclasses.replace(CHECK, detectors=("mine",))
    finding = found(results, "leaky", check)["mine"]
    assert (finding["effect_name"], finding["effect"], finding["p"]) == ("items", 20, 0.5)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("wbc = their_detectors:CLASH", "package 'theirs': a detector 'wbc' is there already"),
        ("mine = their_detectors:BAD", "their_detectors:BAD is a function, not a mergelab.det"),
        ("mine = their_detectors:NONE", "cannot be imported: AttributeError"),
        ("mine = their_detector:GOOD", "cannot be imported: ModuleNotFoundError"),
        ("yours = their_detectors:GOOD", "entry point 'yours' holds the detector 'mine'"),
        ("mine = their_detectors:NEEDY", "'mine' needs 'logits'. What there is: text, twin,"),
    ],
)
def test_a_package_whose_detector_cannot_be_used_is_named(results, install, entry, message):
    install(entry)
    with pytest.raises(UserError) as error:
        found(results, "leaky")
    assert "package 'theirs'" in str(error.value)
    assert message in str(error.value)


def test_verdicts_never_say_clean():
    assert detectors.verdict(0.0099) == "flagged: q < 0.01 against its null hypothesis"
    assert detectors.verdict(0.01) == "no evidence at this sample size"
    assert not any("clean" in detectors.verdict(q) for q in (0.0, 0.5, 1.0))
