"""Intervals, ranks and pairs, each against an independent source."""

import numpy as np
import pytest
from scipy import stats

from mergelab import statistics as st
from mergelab.errors import UserError


def record(name, acc=0.0, nll=1.0, size=10, **other):
    hashes = {"doc_hash": name, "prompt_hash": name, "target_hash": name} | other
    return {"id": name, **hashes, "metrics": {"acc": acc, "nll": nll, "bytes": size}}


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10), (525, 1000)])
def test_wilson_equals_scipys(k, n):
    expected = stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert st.wilson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_auc_of_a_worked_example():
    # 8 of the 9 pairs are won: (3, 2.5) (3, 1) (3, 0) (2, 1) (2, 0) (2.6, ...) x 3
    suspects, controls = [3, 2, 2.6], [2.5, 1, 0]
    area, low, high = st.auc(suspects, controls)
    assert area == pytest.approx(8 / 9)
    # DeLong by hand: placements (1, 2/3, 1) and (2/3, 1, 1), each of variance 1/27
    half = 1.959963985 * np.sqrt(1 / 27 / 3 + 1 / 27 / 3)
    assert (low, high) == pytest.approx((8 / 9 - half, 1.0))


def test_auc_counts_ties_as_half():
    area, _, _ = st.auc([1, 1, 2], [1, 0, 1])
    assert area == pytest.approx((3 + 4 * 0.5 + 2) / 9)


def test_delong_interval_agrees_with_a_bootstrap():
    rng = np.random.default_rng(1)
    x, y = rng.normal(0.8, 1, 150), rng.normal(0, 1, 200)
    area, low, high = st.auc(x, y)
    draws = [
        np.mean(rng.choice(x, 150)[:, None] > rng.choice(y, 200)[None, :]) for _ in range(2000)
    ]
    assert area == pytest.approx(np.mean(x[:, None] > y[None, :]))
    assert (low, high) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.01)


def test_delong_interval_covers_the_truth():
    rng = np.random.default_rng(2)
    truth, hits = stats.norm.cdf(1 / np.sqrt(2)), 0
    for _ in range(400):
        _, low, high = st.auc(rng.normal(1, 1, 40), rng.normal(0, 1, 40))
        hits += low <= truth <= high
    assert 0.91 <= hits / 400 <= 0.98


def test_complete_separation_does_not_claim_certainty():
    area, low, high = st.auc([5, 6, 7, 8], [1, 2, 3, 4])
    assert (area, high) == (1.0, 1.0)
    assert 0.4 < low < 0.8
    assert st.auc([1, 2, 3, 4], [5, 6, 7, 8]) == pytest.approx((0.0, 0.0, 1 - low))
    assert st.auc(np.arange(1000) + 1000.0, np.arange(1000.0))[1] > 0.99


def test_equal_scores_are_no_evidence():
    area, low, high = st.auc(np.zeros(20), np.zeros(30))
    assert area == 0.5
    assert low < 0.4 < 0.6 < high
    assert st.mann_whitney(np.zeros(20), np.zeros(30)) > 0.5


def test_auc_needs_two_items_a_side():
    with pytest.raises(ValueError, match="at least two suspects"):
        st.auc([1.0], [1.0, 2.0])


def test_mann_whitney_is_exact_for_small_samples():
    assert st.mann_whitney([4, 5, 6], [1, 2, 3]) == pytest.approx(1 / 20)
    assert st.mann_whitney([1, 2, 3], [4, 5, 6]) == pytest.approx(1.0)


def test_tpr_threshold_lets_at_most_the_asked_share_of_controls_pass():
    controls = np.arange(100.0)
    assert st.tpr_at_fpr([94.5, 95.5, 200, 94], controls, 0.05) == 0.75
    assert np.mean(controls > 94) == 0.05
    assert st.tpr_at_fpr([57.5, 56.5, 55], np.arange(60.0), 0.05) == pytest.approx(2 / 3)
    assert st.tpr_at_fpr([18.5, 17.5], np.arange(19.0), 0.05) == 0.5  # not one may pass
    assert st.tpr_at_fpr([1.0, 2.0], np.ones(20), 0.05) == 0.5  # ties never pass


def test_benjamini_hochberg_equals_scipys():
    p = np.random.default_rng(3).uniform(size=50) ** 3
    assert st.benjamini_hochberg(p) == pytest.approx(stats.false_discovery_control(p))
    assert st.benjamini_hochberg([0.01, 0.01, 1.0]) == pytest.approx([0.015, 0.015, 1.0])
    assert st.benjamini_hochberg([]).size == 0


def test_bootstrap_of_a_mean_agrees_with_the_normal_interval():
    x = np.random.default_rng(4).normal(3, 2, 400)
    low, high = st.bootstrap_ratio(x, np.ones(400))
    half = 1.96 * x.std(ddof=1) / 20
    assert (low, high) == pytest.approx((x.mean() - half, x.mean() + half), abs=0.03)
    assert st.bootstrap_ratio(x, np.ones(400)) == (low, high)


def test_bootstrap_is_the_same_in_one_chunk_or_many(monkeypatch):
    x, y = np.random.default_rng(5).uniform(1, 2, (2, 50))
    whole = st.bootstrap_ratio(x, y)
    monkeypatch.setattr(st, "CHUNK", 500)
    assert st.bootstrap_ratio(x, y) == whole


def test_sign_flips_agree_with_the_exact_test():
    # 5 differences of one sign: 2 of the 32 sign patterns are as extreme
    assert st.sign_flip_p([1.0, 2, 3, 4, 5]) == pytest.approx(2 / 32, abs=0.01)
    assert st.sign_flip_p([0.0, 0.0]) == 1.0
    exact = stats.binomtest(12, 15).pvalue  # McNemar: 12 wins, 3 losses
    assert st.sign_flip_p([1.0] * 12 + [-1.0] * 3 + [0.0] * 80) == pytest.approx(exact, abs=0.01)


def test_paired_accuracy_difference():
    a = [record(str(i), acc=1.0 if i < 60 else 0.0) for i in range(100)]
    b = [record(str(i), acc=1.0 if i < 40 else 0.0) for i in range(100)]
    delta, low, high, p = st.paired_difference(a, b, "acc")
    assert delta == pytest.approx(0.2)
    assert 0.1 < low < 0.2 < high < 0.3
    assert p < 0.001


def test_paired_bits_per_byte_is_the_difference_of_the_two_summaries():
    rng = np.random.default_rng(6)
    sizes = rng.integers(20, 80, 50)
    a = [record(str(i), nll=float(s * 0.9), size=int(s)) for i, s in enumerate(sizes)]
    b = [record(str(i), nll=float(s * 1.1), size=int(s)) for i, s in enumerate(sizes)]
    delta, low, high, p = st.paired_difference(a, b, "bits_per_byte")
    assert delta == pytest.approx(-0.2 / np.log(2))
    assert (low, high) == pytest.approx((delta, delta))
    assert p < 0.001


def test_paired_difference_ignores_the_order_of_items():
    rng = np.random.default_rng(7)
    a = [record(str(i), nll=float(n)) for i, n in enumerate(rng.uniform(1, 9, 30))]
    b = [record(str(i), nll=float(n)) for i, n in enumerate(rng.uniform(1, 9, 30))]
    once = st.paired_difference(a, b, "bits_per_byte")
    assert st.paired_difference(a[::-1], b, "bits_per_byte") == once


def test_unequal_items_are_refused():
    a, b = [record("x"), record("y")], [record("x"), record("z")]
    with pytest.raises(UserError, match="2 items are in one score file only, as 'y'"):
        st.paired_difference(a, b, "acc")
    with pytest.raises(UserError, match="Item 'y' differs in prompt_hash"):
        st.paired_difference(a, [record("x"), record("y", prompt_hash="other")], "acc")
    with pytest.raises(UserError, match="unique ids"):
        st.paired_difference([a[0], a[0]], b, "acc")
