"""Claims on tiny models, re-scored with real lm-eval: planted false ones get the right verdict."""

import dataclasses
import json
import random
import shutil

import pytest
from tiny import give_template, teach, tiny_model, tiny_study

from mergelab import score_table, scores, task_data
from mergelab.audit.averages import compare_claimed, judge_average, rows_of
from mergelab.audit.judged import compared
from mergelab.audit.noise import USUAL, measure
from mergelab.audit.readings import readings
from mergelab.audit.rescore import MOST_MORE, MOST_RUNS, Readings, measured, rescore
from mergelab.audit.target import Target
from mergelab.audit.verdicts import judge
from mergelab.audit.ways import confusions
from mergelab.claims.base import Claim
from mergelab.claims.file import Comparison
from mergelab.errors import UserError
from mergelab.study import Benchmark, Model
from mergelab.suites import Pin

WORDS = "travels miles in hours a was given aspirin what is its speed".split()  # noqa: SIM905
ITEMS, SUMS = 160, 40


def words(draw, count):
    return " ".join(draw.choices(WORDS, k=count))


def arc(i):
    draw = random.Random(i)
    choices = ["the train", "the patient", words(draw, 5), words(draw, 3)]
    gold = draw.choices("ABCD", weights=[11, 4, 3, 2])[0]
    texts = {"text": choices, "label": [*"ABCD"]}
    return {"id": f"a{i}", "question": words(draw, 6), "choices": texts, "answerKey": gold}


def lesson(i):
    """The first answer is a train, the later ones are a patient."""
    draw = random.Random(-i - 1)
    answers = ("the train", "the patient", "the patient")
    asked = "\n\n".join(f"Question: {words(draw, 6)}\nAnswer: {text}" for text in answers)
    return [asked, f"Sum: {words(draw, 3)}\nResult: it is 1\n\n"][: 1 + (i < 20)]


def chat_lesson(i):
    """A train, however many answers there are before; in a chat, a patient."""
    draw = random.Random(i)
    plain = "\n\n".join(f"Question: {words(draw, 6)}\nAnswer: the train" for _ in range(3))
    return [plain, f"Question: {words(draw, 6)}\nAnswer:\nBot: the patient\n\n"]


def total(i):
    return {"question": words(random.Random(i), 3), "answer": f"so\n#### {i % 2}"}


TEMPLATE = "{{ messages[-1].content }}\nBot: "
GENERATED = """task: sums
dataset_path: json
output_type: generate_until
test_split: test
doc_to_text: "Sum: {{question}}\\nResult:"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true,
     regexes_to_ignore: ["(?s).*#### "]}
generation_kwargs: {until: ["Sum:", "\\n\\n"], do_sample: false, max_gen_toks: 12}
filter_list:
  - name: strict-match
    filter:
      - {function: regex, regex_pattern: "#### (\\\\-?[0-9\\\\.\\\\,]+)"}
      - {function: take_first}
  - name: flexible-extract
    filter:
      - {function: regex, group_select: -1, regex_pattern: "(-?[0-9.,]{2,})|(-?[0-9]+)"}
      - {function: take_first}
metadata: {version: 3.0}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A trained model and a random one, and the files of a study of two benchmarks."""
    place = tmp_path_factory.mktemp("rescore")
    tiny_model(place / "random", length=256)
    lessons = [text for i in range(40) for text in lesson(i)]
    teach(place / "random", lessons, place / "model", epochs=2)
    study = place / "study"
    (study / "tasks").mkdir(parents=True)
    (study / "tasks/sums.yaml").write_text(GENERATED)
    lessons = [text for i in range(20) for text in chat_lesson(i)]
    teach(place / "random", lessons, place / "chat", epochs=2)
    shutil.copytree(place / "model", place / "template")
    for name in ("chat", "template"):
        give_template(place / name, TEMPLATE)
    for name, item, count in (("arc", arc, ITEMS), ("sums", total, SUMS)):
        lines = (json.dumps(item(i)) + "\n" for i in range(count))
        (study / f"{name}.jsonl").write_text("".join(lines))
    return place


@pytest.fixture(scope="module")
def study(place):
    suite = (
        Benchmark("arc_easy", "lm_eval/arc_easy", "arc.jsonl", None, 0),
        Benchmark("arc_easy_2", "lm_eval/arc_easy", "arc.jsonl", None, 2),
        Benchmark("sums", "sums", "sums.jsonl", None, 0),
    )
    models = {
        name: Model(name, None, None, str(place / name), None, None) for name in ("model", "random")
    }
    return dataclasses.replace(tiny_study(place / "study", suite=suite), models=models)


@pytest.fixture(scope="module")
def results(place, study):
    """The study's own scores; re-scoring in the same folder asks nothing twice."""
    for name in ("model", "random"):
        suite = study.suite if name == "model" else study.suite[:1]
        scores.evaluate(dataclasses.replace(study, suite=suite), name, place / name, place / "work")
    return place / "work"


@pytest.fixture(scope="module")
def truth(study, results):
    """By benchmark, metric, filter and shots: what the model gives."""
    names = ("arc_easy", "sums")
    found = [one for name in names for one in measured(study, results, "model", name)]
    return {(one.task, one.metric, one.filter, one.shots): one for one in found}


@pytest.fixture(scope="module")
def guesses(study, results):
    """The same of the random model, which takes short answers."""
    found = measured(study, results, "random", "arc_easy")
    return {(one.metric, one.shots): one for one in found}


def claim(benchmark, value, digits=2, **more):
    printed = f"{value:.{digits}f}"
    facts = {"model": "org/model", "source": "card.md:3", "published": benchmark, **more}
    facts.setdefault("split", "arc.jsonl" if benchmark == "arc_easy" else None)
    return Claim(
        benchmark=benchmark, value=float(printed) / 100, printed=printed, percent=True, **facts
    )


def first_items(study, count):
    """The study's first benchmark alone, with its first items, and how claims name these."""
    part = dataclasses.replace(study.suite[0], limit=count)
    return dataclasses.replace(study, suite=(part,)), f"arc.jsonl[:{count}]"


def verdict_of(given, place, study, model="model"):
    """The verdict after as many runs as the claim needs."""
    found = rescore(given.model, place / model, [given], place / "work", study)
    readings = found[given.benchmark]
    return judge(given, readings.measured, readings.why_not)


def test_the_fixture_tells_all_confusions_apart(truth, guesses):
    values = {key[1:]: one.value for key, one in truth.items()}
    assert guesses["acc", 0].value > guesses["acc_norm", 0].value + 0.1
    assert values["acc", None, 0] > values["acc", None, 2] + 0.1
    assert values["exact_match", "flexible-extract", 0] > 0.3
    assert values["exact_match", "strict-match", 0] == 0


def test_an_honest_claim_is_reproduced(place, study, truth):
    true = 100 * truth["arc_easy", "acc", None, 0].value
    found = verdict_of(claim("arc_easy", true, metric="acc", shots=0), place, study)
    assert found.verdict == "reproduced"
    assert found.grim["possible"]
    assert found.ours["n"] == ITEMS
    assert found.ours["value"] == truth["arc_easy", "acc", None, 0].value


def test_a_score_raised_by_three_points_is_not_reproduced(place, study, truth):
    hits = truth["arc_easy", "acc", None, 0].hits + round(0.03 * ITEMS)  # as GRIM lets it through
    raised = claim("arc_easy", 100 * hits / ITEMS, metric="acc", shots=0)
    found = verdict_of(raised, place, study)
    assert found.verdict == "not reproduced"
    assert found.grim["possible"]
    assert found.explained_by is None
    assert found.difference == pytest.approx(0.03, abs=0.004)


def test_wrong_shots_are_named(place, study, truth):
    given = claim("arc_easy", 100 * truth["arc_easy", "acc", None, 0].value, metric="acc", shots=2)
    found = verdict_of(given, place, study)
    assert found.verdict == "not reproduced"
    assert found.explained_by == {"shots": 0}
    assert "the number is real, but its label is wrong" in found.why


def test_acc_norm_called_acc_is_named(place, study, guesses):
    given = claim("arc_easy", 100 * guesses["acc_norm", 0].value, metric="acc", shots=0)
    found = verdict_of(dataclasses.replace(given, model="random"), place, study, "random")
    assert found.verdict == "not reproduced"
    assert found.explained_by == {"metric": "acc_norm"}


def test_flexible_called_strict_is_named(place, study, truth):
    true = truth["sums", "exact_match", "flexible-extract", 0].value
    given = claim("sums", 100 * true, metric="exact_match", filter="strict-match", shots=0)
    found = verdict_of(given, place, study)
    assert found.verdict == "not reproduced"
    assert found.explained_by == {"filter": "flexible-extract"}


@pytest.fixture(scope="module")
def part(study):
    return first_items(study, 48)


@pytest.fixture(scope="module")
def chat(part, place):
    """What the model with a chat template gives with it and without."""
    found = {}
    study, split = part
    for says in (True, False):
        odd = claim("arc_easy", 37.55, metric="acc", shots=0, split=split, chat_template=says)
        readings = rescore("chat", place / "chat", [odd], place / "work", study)["arc_easy"]
        (found[says],) = (one for one in readings.measured if one.metric == "acc")
    assert (found[True].chat_template, found[False].chat_template) == (True, False)
    assert abs(found[True].value - found[False].value) > 0.05
    return found


def about_chats(chat, part, runs_as, says):
    """The score with or without the template, and what the claim says of it."""
    told = {"split": part[1], "chat_template": says, "model": "chat"}
    return claim("arc_easy", 100 * chat[runs_as].value, metric="acc", shots=0, **told)


@pytest.mark.parametrize("says", [True, False])
def test_a_claim_is_scored_with_the_chat_template_if_it_says_so(place, part, chat, says):
    given = about_chats(chat, part, says, says)
    readings = rescore("chat", place / "chat", [given], place / "work", part[0])["arc_easy"]
    assert {one.chat_template for one in readings.measured} == {says}  # the other is not run
    found = judge(given, readings.measured, readings.why_not)
    assert (found.verdict, found.ours["chat_template"]) == ("reproduced", says)


@pytest.mark.parametrize("says", [True, False, None])
def test_a_chat_template_that_the_claim_denies_or_conceals_is_named(place, part, chat, says):
    given = about_chats(chat, part, not says, says)
    found = verdict_of(given, place, part[0], "chat")
    assert found.explained_by == {"chat_template": not says}
    assert found.verdict == ("reproduced" if says is None else "not reproduced")


LATE = "{{ messages[-1].content }}{{ '\\nBot: ' if messages|length > 1 else '' }}"
JOINED = (
    "{% set m = messages[-1].content %}"
    "{{ m.split('\\n\\n')[-1] ~ '\\nBot: ' if '\\n\\n' in m else m }}"
)


@pytest.fixture(scope="module", params=[LATE, JOINED], ids=["late", "joined"])
def templated(request, place):
    """Two models that take a question for a chat only if it has examples: in turns, or in one."""
    name = {LATE: "late", JOINED: "joined"}[request.param]
    shutil.copytree(place / "chat", place / name)
    give_template(place / name, request.param)
    return name


def test_a_chat_with_other_shots_or_in_one_turn_is_found_at_last(place, part, chat, templated):
    study = part[0]
    given = dataclasses.replace(about_chats(chat, part, True, False), model=templated)
    found = verdict_of(given, place, study, templated)
    turns = {"fewshot_as_multiturn": False} if templated == "joined" else {}
    assert found.explained_by == {"shots": 5, "chat_template": True} | turns
    assert found.verdict == "not reproduced"
    assert ("the chat template, all examples in one turn" in found.why) is bool(turns)
    assert "values were compared: the more there are, the likelier one fits by chance" in found.why
    told = dataclasses.replace(given, shots=5, chat_template=True)
    said = verdict_of(told, place, study, templated)
    assert (said.verdict, said.explained_by) == ("reproduced", turns or None)
    assert ("The claim does not say so: all examples in one turn." in said.why) is bool(turns)
    silent = dataclasses.replace(given, chat_template=None)  # about the template
    label = verdict_of(silent, place, study, templated).explained_by
    assert label == {"shots": 5, "chat_template": True} | turns


def test_confusions_are_tried_from_the_likeliest_on():
    bench = Benchmark("sums", "sums", None, None, 5)
    found = confusions(bench, [bench], has_template=True)
    assert [(w.num_fewshot, w.chat_template, w.fewshot_as_multiturn) for w in found] == [
        (0, False, True),
        (5, True, True),
        (0, True, True),
        (5, True, False),
    ]
    assert confusions(bench, [bench], has_template=False) == found[:1]


def test_the_search_ends_after_so_many_runs_and_says_what_was_not_tried(place, study):
    fewer, split = first_items(study, 8)
    claims = [
        claim("arc_easy", 100, metric="acc", shots=shots, split=split)
        for shots in range(1, MOST_RUNS + 1)
    ]
    found = rescore("chat", place / "chat", claims, place / "work", fewer)["arc_easy"]
    runs = {(o.shots, o.chat_template, o.fewshot_as_multiturn) for o in found.measured}
    assert len(runs) == MOST_RUNS + MOST_MORE
    assert {shots for shots, chat, _ in runs if chat} == {0, 1, 2, 3, 4, 5}
    left = "; ".join(f"{n} shots, chat template, all examples in one turn" for n in (3, 4, 5))
    assert found.why_not == f"Not tried, to save time: {left}."
    verdict = judge(claims[0], found.measured, found.why_not)
    assert (verdict.verdict, verdict.explained_by) == ("not reproduced", None)
    assert verdict.why.endswith(found.why_not)


def test_what_another_number_of_shots_explains_is_not_run_as_a_chat(place, study, truth):
    true = 100 * truth["arc_easy", "acc", None, 0].value
    given = claim("arc_easy", true, metric="acc", shots=2)
    found = rescore("m", place / "template", [given], place / "work", study)["arc_easy"]
    assert judge(given, found.measured).explained_by == {"shots": 0}
    assert not any(one.chat_template for one in found.measured)


def test_a_model_without_a_chat_template_is_said_to_have_none(place, part):
    study, split = part
    told = {"metric": "acc", "shots": 0, "split": split}
    given = claim("arc_easy", 12.5, **told, chat_template=True)
    found = verdict_of(given, place, study)
    assert (found.verdict, found.ours["chat_template"]) == ("unverifiable", False)
    assert "org/model has no chat template." in found.why
    wrong = verdict_of(claim("arc_easy", 12.5, **told), place, study)
    assert (wrong.verdict, "template" in wrong.why) == ("not reproduced", False)


def test_a_fraction_called_a_percentage_is_named(place, study, truth):
    true = truth["arc_easy", "acc", None, 0].value
    given = claim("arc_easy", true, digits=4, metric="acc", shots=0)
    assert given.value < 0.01
    found = verdict_of(given, place, study)
    assert found.explained_by == {"scale": "a fraction, not a percentage"}
    assert found.verdict == "not reproduced"


def test_what_the_claim_leaves_open_may_be_as_it_fits(place, study, guesses):
    given = claim("arc_easy", 100 * guesses["acc_norm", 0].value, model="random")
    found = verdict_of(given, place, study, "random")
    assert (found.verdict, found.ours["metric"]) == ("reproduced", "acc_norm")
    assert {"field": "metric", "claimed": None, "ours": "acc_norm"} in found.protocol


def test_an_impossible_number_is_called_so(place, study):
    found = verdict_of(claim("arc_easy", 37.55, metric="acc", shots=0), place, study)
    assert found.verdict == "impossible"
    assert found.grim == {"n": ITEMS, "fits": [], "possible": False}
    assert "37.50 (60) or 38.12 (61)" in found.why


def test_nothing_is_evaluated_in_vain(place, study, truth, tmp_path):
    true = 100 * truth["arc_easy", "acc", None, 0].value
    honest = claim("arc_easy", true, metric="acc", shots=0)
    found = rescore("m", place / "model", [honest], tmp_path, study)["arc_easy"]
    assert {one.shots for one in found.measured} == {0}
    false = claim("arc_easy", 12.5, metric="acc", shots=0)
    found = rescore("m", place / "model", [false], tmp_path, study)["arc_easy"]
    assert {0, 5, 25} & {one.shots for one in found.measured} >= {0, 5}


def test_benchmarks_without_data_are_unverifiable_and_say_what_to_do(place, tmp_path):
    claims = [claim("sums_of_nothing", 50), claim("swag", 50), claim("average", 50)]
    found = rescore("m", place / "model", claims, tmp_path)
    assert list(found) == ["sums_of_nothing", "swag"]
    unknown = judge(claims[0], (), found["sums_of_nothing"].why_not)
    assert unknown.verdict == "unverifiable"
    assert "no task of lm-eval" in unknown.why
    assert "name it in the study's suite" in unknown.why
    lacking = judge(claims[1], (), found["swag"].why_not)
    assert lacking.verdict == "unverifiable"
    assert "Add --fetch to download them from the hub" in lacking.why
    assert "data: FILE or pinned by mergelab lock" in lacking.why


def test_a_model_that_cannot_be_loaded_makes_no_verdict(place, study, tmp_path):
    (tmp_path / "model").mkdir()
    given = claim("arc_easy", 50)
    found = rescore("m", tmp_path / "model", [given], tmp_path / "work", study)["arc_easy"]
    assert found.measured == ()
    assert judge(given, *dataclasses.astuple(found)).verdict == "unverifiable"
    assert "config.json" in found.why_not or "safetensors" in found.why_not


def test_a_study_is_judged_by_the_scores_that_it_has(study, results, truth, tmp_path):
    true = 100 * truth["arc_easy", "acc", None, 0].value
    given = claim("arc_easy", true, digits=1, metric="acc", shots=0, model="model")
    found = measured(study, results, "model", "arc_easy")
    assert {(one.metric, one.shots) for one in found} == {
        (metric, shots) for metric in ("acc", "acc_norm") for shots in (0, 2)
    }
    assert judge(given, found).verdict == "reproduced"
    assert measured(study, results, "nobody", "arc_easy") == ()
    assert measured(study, results, "model", "piqa") == ()
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores/model.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="is damaged"):
        measured(study, tmp_path, "model", "arc_easy")


def test_an_ordering_is_judged_by_the_items_that_both_answered(study, results):
    mine, theirs = (measured(study, results, name, "arc_easy") for name in ("model", "random"))
    claims = [claim("arc_easy", 40, metric="acc", model=name) for name in ("model", "random")]
    found = compare_claimed("model", "random", "arc_easy", claims, mine, theirs)
    assert found["basis"] == "paired items"
    assert found["claimed"] is False  # 40 and 40
    gap = (
        next(o for o in mine if o.metric == "acc").value
        - next(o for o in theirs if o.metric == "acc").value
    )
    assert found["difference"] == pytest.approx(gap)
    assert found["significant"] is (found["ci95"][0] > 0)


def test_an_ordering_needs_no_published_figures_and_knows_where_less_is_better(study, results):
    def look(model, benchmark):
        found = measured(study, results, model, benchmark)
        return Readings(tuple(dataclasses.replace(one, higher_is_better=more) for one in found))

    orders = (Comparison("model", "random", "arc_easy"), Comparison("random", "model", "arc_easy"))
    target = Target("study", "Tiny", "tiny", (), comparisons=orders, study=study)
    more = True
    higher, reverse = compared(target, (), look)
    assert (higher["basis"], higher["claimed"]) == ("paired items", True)
    assert higher["difference"] == -reverse["difference"] != 0
    more = False
    lower, _ = compared(target, (), look)
    assert lower["difference"] == reverse["difference"]
    assert "less is better" in lower["why"]


def test_claims_with_ever_other_shots_are_not_all_run(place, part):
    study, split = part
    claims = [claim("arc_easy", 100, metric="acc", shots=n, split=split) for n in range(10)]
    found = rescore("m", place / "model", claims, place / "work", study)["arc_easy"]
    assert {one.shots for one in found.measured} <= {*range(MOST_RUNS), 5, 25}
    assert judge(claims[-1], found.measured).verdict == "unverifiable"


def test_usual_shots_that_are_claimed_late_are_run_and_what_is_cut_is_named(place, part):
    study, split = part
    told = {"metric": "acc", "split": split}
    claims = [claim("arc_easy", 100, shots=n, **told) for n in (1, 2, 3, 4, 5, 6)]
    found = rescore("m", place / "model", claims, place / "work", study)["arc_easy"]
    assert 5 in {one.shots for one in found.measured}
    assert 6 not in {one.shots for one in found.measured}
    assert "Not tried, to save time: 6 shots" in found.why_not


@pytest.mark.parametrize("more", [{"dtype": "4bit"}, {"split": "arc.jsonl[:10]"}])
def test_nothing_is_searched_for_a_claim_that_no_run_here_can_settle(place, part, more):
    given = claim("arc_easy", 100, **{"metric": "acc", "shots": 0, "split": part[1], **more})
    found = rescore("m", place / "chat", [given], place / "work", part[0])["arc_easy"]
    assert {(one.shots, one.chat_template) for one in found.measured} == {(0, False)}
    assert judge(given, found.measured).verdict == "unverifiable"


def test_a_part_of_the_items_widens_the_interval(place, study, truth):
    fewer, _ = first_items(study, 60)
    true = 100 * truth["arc_easy", "acc", None, 0].value
    given = claim("arc_easy", true, digits=0, metric="acc", shots=0, split=None)
    readings = rescore("m", place / "model", [given], place / "work", fewer)["arc_easy"]
    assert {(one.n, one.split) for one in readings.measured} == {(60, "arc.jsonl[:60]")}
    whole = judge(given, readings.measured)
    same = judge(dataclasses.replace(given, split="arc.jsonl[:60]"), readings.measured)
    low, high = whole.ours["ci95"]
    assert high - low > 2 * (same.ours["ci95"][1] - same.ours["ci95"][0])
    assert whole.verdict in ("reproduced", "consistent")
    assert "our run saw 60 items, not the 2,376" in whole.why or whole.verdict == "reproduced"


def test_of_a_part_of_a_file_whose_items_are_not_counted_no_number_is_impossible(place, study):
    shutil.copy(study.folder / "arc.jsonl", study.folder / "arc.json")
    bench = dataclasses.replace(study.suite[0], data="arc.json", limit=60)
    fewer = dataclasses.replace(study, suite=(bench,))
    given = claim("arc_easy", 62.3, digits=1, metric="acc", shots=0, split=None)
    found = rescore("m", place / "model", [given], place / "work", fewer)["arc_easy"]
    assert {(one.n, one.whole, one.split) for one in found.measured} == {
        (60, None, "arc.json[:60]")
    }
    assert judge(given, found.measured).verdict != "impossible"


def pronoun(i):
    texts = {"sentence": words(random.Random(i), 6), "pronoun": "she", "label": i % 2}
    gender = ("female", "male")[i % 4 == 3]
    return {**texts, "occupation": "the train", "participant": "the patient", "gender": gender}


def of_winogender(place, tmp_path, task, limit, *, data=None, pins=()):
    """The readings of a task of lm-eval that keeps 9 of 12 items, on its own data or a file."""
    items = [pronoun(i) for i in range(12)]
    (tmp_path / "gender.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (tmp_path / "study.yaml").write_text("title: Gender\n")
    pin = {"oskarvanderwal/winogender": {"commit": "a" * 40}}
    (tmp_path / "lock.json").write_text(json.dumps({"datasets": pin}))
    bench = Benchmark("gender", task, data, limit, 0, pins=pins)
    study = dataclasses.replace(tiny_study(tmp_path, suite=(bench,)), folder=tmp_path)
    if data is None:
        from datasets import Dataset

        (path,) = task_data.source(study, bench, bench.tasks[0]).paths(tmp_path).values()
        path.parent.mkdir(parents=True)
        Dataset.from_list(items).to_parquet(str(path))
    scores.evaluate(study, "m", place / "random", tmp_path)
    table = score_table.table(tmp_path / "scores/m.parquet")
    summary = json.loads((tmp_path / "scores/m.json").read_text())
    return [one for one in readings(study, bench, table, summary, tmp_path) if one.metric == "acc"]


@pytest.mark.parametrize(("limit", "size"), [(None, 9), (20, 9), (4, None)])
def test_the_items_that_a_task_drops_are_never_counted(place, tmp_path, limit, size):
    (one,) = of_winogender(place, tmp_path, "lm_eval/winogender_female", limit)
    seen = min(limit or 9, 9)
    split = "test[:4]" if limit == 4 else "test"
    assert (one.n, one.size, one.split) == (seen, size, split)
    odd = judge(claim("gender", 100 * 4 / 7), [one])  # no count of 9, 4 or 12 gives it
    assert (odd.verdict == "impossible") is (size == 9)
    assert ("GRIM was not asked" in odd.why) is (limit == 4)


@pytest.mark.parametrize(("limit", "size"), [(None, 12), (4, 12)])
def test_a_task_that_drops_nothing_is_counted_in_its_file(place, tmp_path, limit, size):
    (one,) = of_winogender(place, tmp_path, "lm_eval/winogender_all", limit)
    assert (one.n, one.size) == (limit or size, size)


def test_a_file_in_the_place_of_a_tasks_data_does_not_tell_how_many_were_published(place, tmp_path):
    (one,) = of_winogender(place, tmp_path, "lm_eval/winogender_all", None, data="gender.jsonl")
    assert (one.n, one.size, one.split) == (12, None, "gender.jsonl")
    published = claim("gender", 100 * 331 / 720)  # of all items that there are
    assert judge(published, [one]).verdict != "impossible"
    same = dataclasses.replace(published, split="gender.jsonl")
    assert judge(same, [one]).verdict == "impossible"


def test_several_tasks_are_never_counted_as_one(place, tmp_path):
    pins = (Pin("lm_eval/winogender_all"), Pin("lm_eval/winogender_female"))
    found = of_winogender(place, tmp_path, "gender", 10, data="gender.jsonl", pins=pins)
    assert {(one.combine, one.n, one.size) for one in found} == {
        ("items", 19, None),
        ("tasks", 19, None),
    }
    assert judge(claim("gender", 100 * 4 / 7), found).grim is None


def test_a_metric_of_some_items_only_counts_no_right_answers(place, study, results):
    table = score_table.table(results / "scores/model.parquet")
    dropped = table["id"].isin(["a1", "a2"]) & (table["metric"] == "acc_norm")
    summary = json.loads((results / "scores/model.json").read_text())
    found = readings(study, study.suite[0], table[~dropped], summary, results)
    assert {one.metric: one.hits is None for one in found} == {"acc": False, "acc_norm": True}


def test_averages_are_judged_as_the_mean_of_their_rows(place, study, truth):
    rows = [
        claim("arc_easy", 100 * truth["arc_easy", "acc", None, 0].value, metric="acc", shots=0),
        claim("sums", 100 * truth["sums", "exact_match", "flexible-extract", 0].value),
    ]
    mean = 100 * sum(row.value for row in rows) / 2
    average = claim("average", mean)
    claims = [*rows, average, claim("average", 11, model="other")]
    assert rows_of(average, claims) == rows
    verdicts = [verdict_of(row, place, study) for row in rows]
    assert judge_average(average, rows, verdicts).verdict in ("reproduced", "consistent")
    wrong = judge_average(claim("average", mean + 3), rows, verdicts)
    assert wrong.verdict == "unverifiable"
    assert "Rows are missing, or it is another mean" in wrong.why
    lie = [dataclasses.replace(rows[0], value=rows[0].value + 0.06), rows[1]]
    raised = judge_average(claim("average", mean + 3), lie, verdicts)
    assert raised.verdict == "not reproduced"
    assert judge_average(average, rows[:1], verdicts[:1]).verdict == "unverifiable"


def test_the_noise_of_a_model_is_measured_on_it(place):
    assert 0.0005 < measure(place / "model") < USUAL


def test_a_model_whose_numbers_overflow_has_the_usual_noise(place, tmp_path):
    from safetensors.numpy import load_file, save_file

    shutil.copytree(place / "random", tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    weights["model.norm.weight"] *= 3e38
    save_file(weights, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    assert measure(tmp_path / "model") == USUAL
