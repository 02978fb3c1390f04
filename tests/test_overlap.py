"""Corpus overlap: copies and edited copies are found, look-alikes are not."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergelab import statistics
from mergelab.detectors import overlap
from mergelab.detectors.base import Evidence, Probed
from mergelab.detectors.overlap import index, is_dirty, longest, one_edit, words
from mergelab.errors import NotAvailable

LISTS = """
    Ann Bert Carla Dan Eve Fritz Gül Hana Ivo Jun Kofi Lea Mona Nils Oda Pia
    buys sells finds loses packs paints counts bakes carries borrows sorts repairs
    red old small cheap new broken wooden round heavy lost spare blue
    apples books coins tickets stamps eggs cakes miles pages shirts cards bricks
    today yesterday weekly hourly later twice first again together alone outside quickly
    and but so because while until then after before when if although
"""
WHO, DOES, LIKE, WHAT, WHEN, LINK = (line.split() for line in LISTS.strip().splitlines())


def problems(seed, count):
    """Word problems of one style, none a copy of another."""
    draw = random.Random(seed)

    def clause():
        order = [WHO, DOES, [str(draw.randint(2, 99))], LIKE, WHAT, WHEN]
        return " ".join(draw.choice(kind) for kind in order)

    def problem():
        link = draw.choice(LINK)
        told = f"{clause()}, {link} {clause()}. {clause()}."
        return f"{told} How many {draw.choice(WHAT)} does {draw.choice(WHO)} have in total?"

    return [problem() for _ in range(count)]


def dirty(items, texts):
    """The share of items that is found in the texts."""
    found = [words(item) for item in items]
    matches = longest(index(found), len(items), iter(texts))
    bad = {i for i, match in enumerate(matches) if is_dirty(match, len(found[i]))}
    return len(bad | one_edit(found, iter(texts))) / len(items)


def edited(texts, share, seed=0):
    """Texts with a share of their words replaced, dropped, or followed by another word."""
    draw = random.Random(seed)
    found = []
    for text in texts:
        new = text.split()
        for _ in range(max(1, round(share * len(new)))):
            at = draw.randrange(len(new))
            word = draw.choice(WHAT)
            new[at : at + 1] = draw.choice(([word], [], [new[at], word]))
        found.append(" ".join(new))
    return found


def test_verbatim_copies_are_found_in_other_case_punctuation_and_surroundings():
    items = problems(1, 300)
    copies = [f"### Task: {i.upper().replace('.', ' !').replace('?', '')} Go on." for i in items]
    assert dirty(items, problems(2, 300) + copies) == 1.0


def test_copies_with_five_percent_of_the_words_edited_are_found():
    items = problems(1, 500)
    assert dirty(items, edited(items, 0.05)) >= 0.95


def test_other_items_of_the_same_style_are_not_found():
    assert dirty(problems(1, 500), problems(2, 3000)) <= 0.01


@pytest.mark.parametrize(
    ("match", "size", "expected"),
    [
        (13, 86, True),
        (13, 87, False),
        (12, 25, False),
        (12, 24, True),
        (8, 16, True),
        (8, 17, False),
        (3, 3, True),
        (0, 0, False),
        (0, 9, False),
    ],
)
def test_a_long_run_is_15_percent_of_the_item_and_a_short_one_half(match, size, expected):
    assert is_dirty(match, size) is expected


def test_a_short_item_is_found_only_whole():
    items = ["What is 7 times 8?", "Name the capital of France."]
    assert dirty(items, ["Quiz! what is 7 TIMES 8", "name the capital of Spain"]) == 0.5
    assert dirty(items, ["what is 7", "times 8"]) == 0.0


ITEM = "which gas do green plants take from the air by day"  # 11 words: no half of it holds 8


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ITEM.replace("take", "draw"), True),
        (ITEM.replace("take ", ""), True),
        (ITEM.replace("take", "take in"), True),
        (ITEM.replace("which", "what"), True),
        (f"so {ITEM.replace('take', 'draw')} they ask", True),
        (ITEM.replace("take", "draw").replace("day", "night"), False),
        (ITEM.replace("take", "get it"), False),
        (ITEM.replace("green plants take", "take"), False),
        ("which gas do green plants and from the air by day", True),
        ("which gas do green plants need. take it from the air by day", False),
    ],
)
def test_an_item_of_8_to_25_words_may_be_one_word_off(text, expected):
    assert one_edit([words(ITEM)], [text]) == ({0} if expected else set())


def test_only_items_of_8_to_25_words_may_be_one_word_off():
    sizes = {}
    for size in (7, 8, 25, 26):
        item = [f"w{i}" for i in range(size)]
        sizes[size] = one_edit([item], [" ".join([*item[:3], "other", *item[4:]])])
    assert sizes == {7: set(), 8: {0}, 25: {0}, 26: set()}


@settings(max_examples=300, deadline=None)
@given(
    item=st.lists(st.sampled_from("abcd"), min_size=8, max_size=12),
    text=st.lists(st.sampled_from("abcd"), max_size=5),
    after=st.lists(st.sampled_from("abcd"), max_size=5),
    at=st.integers(0, 11),
    new=st.sampled_from([[], ["x"], ["x", "y"], ["x", "y", "z"]]),
)
def test_one_edit_is_what_dynamic_programming_finds(item, text, after, at, new):
    at = min(at, len(item) - 1)
    text = [*text, *item[:at], *new, *item[at + 1 :], *after]
    row = [0] * (len(text) + 1)  # fewest edits of the item's beginning to end at each place
    for i, word in enumerate(item, 1):
        last, row = row, [i]
        for j, other in enumerate(text, 1):
            row.append(min(last[j - 1] + (word != other), last[j] + 1, row[j - 1] + 1))
    assert one_edit([item], [" ".join(text)]) == ({0} if min(row) <= 1 else set())


def test_a_phrase_of_more_than_ten_items_is_the_template():
    template = "the following are multiple choice questions with answers about the human body "
    ten = [template + problem for problem in problems(3, 10)]
    eleven = [template + problem for problem in problems(3, 11)]
    text = [f"{template} and nothing else"]
    assert [max(longest(index([*map(words, i)]), len(i), text)) for i in (ten, eleven)] == [12, 0]


def test_what_overlap_guarantees_names_the_template_as_its_exception():
    template = f"{problems(3, 1)[0]} "
    items = [template + word for word in "abcdefghijkl"]
    assert dirty(items[:10], [items[0]]) == 1.0
    assert dirty(items, [items[0]]) == 0.0
    assert "unless it holds runs of 8 words that more than 10 items share" in (
        overlap.DETECTOR.guarantees
    )


def test_scripts_without_spaces_are_compared_by_character():
    found = words("東京は日本の首都です。 Yes, 1,000 it_is")
    assert found == [*"東京は日本の首都です", "yes", "1000", "itis"]
    item = "次の文章を読んで、正しい答えを選びなさい。"
    assert dirty([item], [f"問題:{item}答え"]) == 1.0


@settings(max_examples=200, deadline=None)
@given(
    items=st.lists(st.lists(st.sampled_from("abc"), max_size=24), min_size=1, max_size=4),
    texts=st.lists(st.lists(st.sampled_from("abc"), max_size=30), max_size=3),
)
def test_the_longest_run_is_the_longest_common_run_of_words(items, texts):
    def by_hand(item, text):
        runs = [
            size
            for size in range(1, len(item) + 1)
            for i in range(len(item) - size + 1)
            for j in range(len(text) - size + 1)
            if item[i : i + size] == text[j : j + size]
        ]
        best = max(runs, default=0)
        return best if best >= min(overlap.SHORT, len(item)) else 0

    expected = [max((by_hand(item, text) for text in texts), default=0) for item in items]
    assert longest(index(items), len(items), map(" ".join, texts)) == expected


# --- the finding -----------------------------------------------------------------------------


def evidence(corpus, scores=None):
    texts = problems(5, 30)
    items = [{"id": f"i{k}", "text": text} for k, text in enumerate(texts)]
    found = Evidence(
        "bench",
        Probed("m", {}),
        Probed("base", {}),
        scores={"m": {"original": scores or {}}},
        items={"suspects": items[:20], "controls": items[20:]},
        corpus=corpus(texts),
    )
    return found


def test_the_finding_gives_the_share_with_its_interval_and_the_dirty_items():
    found = overlap.overlap(
        evidence(lambda t: {"m: a": [*t[:5], "x"], "base: b": [*t[3:6], t[25], *problems(6, 50)]})
    )
    assert found.effect == 6 / 20
    assert found.ci95 == statistics.wilson(6, 20)
    assert found.p is None
    assert (found.n_suspects, found.n_controls) == (20, 10)
    assert found.flagged == ("i0", "i1", "i2", "i3", "i4", "i5", "i25")
    assert found.details["dirty_by_corpus"] == {"base: b": 3, "m: a": 5}
    assert found.details["dirty_controls"] == 1
    assert found.details["with_13_gram"] == 6
    assert found.details["score"] is None
    matches = found.details["matches"]
    assert [one["id"] for one in matches] == list(found.flagged)
    assert all(one["longest"] == one["words"] for one in matches)
    assert list(found.item_scores["suspects"][:6]) == [1.0] * 6
    assert max(found.item_scores["suspects"][6:]) < 0.5
    assert len(found.item_scores["controls"]) == 10


def test_full_and_clean_score_and_their_difference():
    scores = {f"i{k}": float(k < 6 or k % 2) for k in range(20)} | {"unknown": 0.0}
    found = overlap.overlap(evidence(lambda t: {"m: a": t[:6]}, scores)).details["score"]
    assert (found["n"], found["n_clean"]) == (20, 14)
    assert found["full"] == pytest.approx(13 / 20)
    assert found["clean"] == pytest.approx(7 / 14)
    assert found["epg"] == pytest.approx(13 / 20 - 7 / 14)
    low, high = found["epg_ci95"]
    assert 0 < low < found["epg"] < high < 0.35


def test_a_leak_that_earned_nothing_has_no_performance_gain():
    scores = {f"i{k}": float(k % 2) for k in range(20)}
    found = overlap.overlap(evidence(lambda t: {"m: a": t[:6]}, scores)).details["score"]
    assert found["epg"] == 0.0
    assert found["epg_ci95"][0] < 0 < found["epg_ci95"][1]


def test_if_every_scored_item_is_dirty_there_is_no_clean_score():
    scores = {f"i{k}": 1.0 for k in range(6)}
    found = overlap.overlap(evidence(lambda t: {"m: a": t[:6]}, scores))
    assert found.details["score"] is None


def test_the_order_of_texts_does_not_matter():
    one = overlap.overlap(evidence(lambda t: {"m: a": t[:6], "m: b": t[3:9]}))
    two = overlap.overlap(evidence(lambda t: {"m: b": t[3:9][::-1], "m: a": t[:6][::-1]}))
    assert (one.effect, one.flagged, one.details) == (two.effect, two.flagged, two.details)


@pytest.mark.parametrize("corpus", [{}, {"m: a": []}])
def test_without_declared_texts_there_is_no_finding(corpus):
    with pytest.raises(NotAvailable, match="nothing is declared of what the model"):
        overlap.overlap(evidence(lambda t: corpus))


def test_a_short_item_that_is_one_word_off_is_flagged_and_counted():
    items = [{"id": f"i{k}", "text": text} for k, text in enumerate((ITEM, problems(7, 1)[0]))]
    probed = Probed("m", {}), Probed("base", {})
    corpus = {"m: a": [ITEM.replace("take", "draw")], "m: b": problems(6, 5)}
    found = overlap.overlap(
        Evidence("b", *probed, items={"suspects": items, "controls": []}, corpus=corpus)
    )
    assert found.flagged == ("i0",)
    assert found.details["dirty_by_corpus"] == {"m: a": 1, "m: b": 0}
    assert found.details["matches"] == [{"id": "i0", "words": 11, "longest": 0}]
