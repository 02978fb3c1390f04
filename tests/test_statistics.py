"""Intervals, tests and ranks, each against an independent source, and all under simulated nulls."""

import time

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.power import NormalIndPower
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

from mergelab import published
from mergelab import statistics as st

SIZES = {  # items of the test sets that the MergeKit paper's Table 1 is on
    "USMLE": 1273,
    "MedMCQA": 4183,
    "PubMedQA": 500,
    "ARC-C": 1172,
    "HellaSwag": 10042,
    "MMLU": 14042,
}
TABLE = {  # Goddard et al. 2024, arXiv 2403.13257, Table 1: accuracy in percent, as printed
    "Llama2-7B-Chat": "35.90 35.45 73.40 44.20 55.40 46.37",
    "Meditron-7B": "38.40 24.07 71.40 40.20 54.50 33.06",
    "Lerp": "39.10 36.65 75.60 46.76 58.66 48.44",
    "Slerp": "39.20 36.91 75.60 46.84 58.67 47.97",
    "Ties": "38.73 32.27 75.60 45.05 58.23 45.03",
    "Dare-Ties": "36.37 27.56 72.20 42.92 54.79 41.17",
}
SIMULATIONS = 500


def accuracies(model: str) -> list[float]:
    return [float(cell) / 100 for cell in TABLE[model].split()]


PARENTS = list(map(max, accuracies("Llama2-7B-Chat"), accuracies("Meditron-7B")))


def uniform(p: list[float]) -> bool:
    """Could these p-values be draws from the uniform distribution (Kolmogorov-Smirnov, 1 %)?"""
    return stats.kstest(p, "uniform").pvalue > 0.01


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10), (525, 1000)])
def test_wilson_equals_scipys(k, n):
    expected = stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert st.wilson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_gives_newcombes_worked_examples():
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
    for k, n, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)]:
        assert st.wilson(k, n) == pytest.approx((low, high), abs=5e-5)
    assert st.wilson(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)


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


def test_mann_whitney_gives_rs_worked_example():
    # R, ?wilcox.test: Hollander and Wolfe 1973, 69f, permeability of the amnion: W = 35, p = 0.1272
    term = [0.80, 0.83, 1.89, 1.04, 1.45, 1.38, 1.91, 1.64, 0.73, 1.46]
    early = [1.15, 0.88, 0.90, 0.74, 1.21]
    assert st.mann_whitney(term, early) == pytest.approx(0.1272, abs=5e-5)


def test_tpr_threshold_lets_at_most_the_asked_share_of_controls_pass():
    controls = np.arange(100.0)
    assert st.tpr_at_fpr([94.5, 95.5, 200, 94], controls, 0.05) == 0.75
    assert np.mean(controls > 94) == 0.05
    assert st.tpr_at_fpr([57.5, 56.5, 55], np.arange(60.0), 0.05) == pytest.approx(2 / 3)
    assert st.tpr_at_fpr([18.5, 17.5], np.arange(19.0), 0.05) == 0.5  # not one may pass
    assert st.tpr_at_fpr([1.0, 2.0], np.ones(20), 0.05) == 0.5  # ties never pass


def test_benjamini_hochberg_rejects_the_four_hypotheses_of_its_paper():
    # Benjamini and Hochberg 1995, JRSS B 57:289, section 3.2: 15 p-values, 4 rejected at 0.05
    p = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344]
    p += [0.0459, 0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1.0]
    q = st.benjamini_hochberg(p)
    assert list(q <= 0.05) == [True] * 4 + [False] * 11
    assert q[:4] == pytest.approx([0.0015, 0.003, 0.0095, 0.035625])
    assert st.benjamini_hochberg(p[::-1]) == pytest.approx(q[::-1])
    assert st.benjamini_hochberg([]).size == 0


def test_benjamini_hochberg_keeps_the_false_discovery_rate():
    rng = np.random.default_rng(3)
    shares = []
    for _ in range(SIMULATIONS):  # 15 true effects among 60
        p = 2 * stats.norm.sf(np.abs(rng.normal(size=60) + 3.5 * (np.arange(60) < 15)))
        found = np.flatnonzero(st.benjamini_hochberg(p) < 0.1)
        shares.append(np.mean(found >= 15) if found.size else 0.0)
    assert 0.05 < np.mean(shares) < 0.09  # 0.1 x 45 / 60


def test_mcnemar_gives_the_published_mid_p():
    # Fagerland, Lydersen and Laake 2013, table 1 (Bentur et al.): 1 and 7 discordant pairs,
    # exact p 0.070, mid-p 0.039
    assert st.mcnemar(1, 7) == st.mcnemar(7, 1) == pytest.approx(0.039, abs=5e-4)
    assert st.mcnemar(6, 6) == pytest.approx(1 - 0.5 * stats.binom.pmf(6, 12, 0.5))  # their (2)
    assert st.mcnemar(0, 0) == 1.0
    # R, ?mcnemar.test: approval of the president, 150 and 86 changed their mind
    exact = stats.binomtest(86, 236).pvalue
    assert st.mcnemar(150, 86) == pytest.approx(exact - stats.binom.pmf(86, 236, 0.5))


def test_mcnemars_mid_p_keeps_the_level():
    # exact, over every table of 60 items with this discordance where neither variant is better
    rejected = [[k for k in range(n + 1) if st.mcnemar(k, n - k) <= 0.05] for n in range(61)]
    for discordance in (0.02, 0.05, 0.1, 0.3, 0.6):
        level = sum(
            stats.binom.pmf(n, 60, discordance) * stats.binom.pmf(wins, n, 0.5).sum()
            for n, wins in enumerate(rejected)
        )
        assert level < 0.05, discordance


def test_sign_flips_are_exact_for_few_differences():
    # 5 differences of one sign: 2 of the 32 sign patterns are as extreme
    assert st.sign_flip_p([1.0, 2, 3, 4, 5]) == 2 / 32
    assert st.sign_flip_p([1.0, 2, 3, 4, 5], greater=True) == 1 / 32
    assert st.sign_flip_p([-1.0, -2, -3], greater=True) == 1.0
    assert st.sign_flip_p([0.0, 0.0]) == 1.0
    assert st.sign_flip_p([0.1, 0.2, -0.3]) == 1.0  # a sum of 0, but for rounding


def test_sign_flips_agree_with_scipys_permutation_test():
    rng = np.random.default_rng(4)
    for n in (9, 40):
        d = rng.normal(0.3, 1, n)
        scipys = stats.permutation_test(
            (d,), np.sum, permutation_type="samples", n_resamples=20_000, rng=1
        )
        assert st.sign_flip_p(d) == pytest.approx(scipys.pvalue, abs=1e-12 if n == 9 else 0.02)


def test_sign_flips_give_darwins_maize_p():
    # Fisher 1935, The Design of Experiments, section 21: 15 pairs of plants (eighths of an inch);
    # 1,726 of the 32,768 sign patterns are as extreme, p = 0.05267
    d = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
    assert st.sign_flip_p(d) == pytest.approx(1726 / 32768, abs=0.007)


def test_items_of_one_cluster_flip_together():
    d = np.repeat([1.0, 2, 3, 4], 25)
    clusters = np.repeat(["a", "b", "c", "d"], 25)
    assert st.sign_flip_p(d, clusters) == 2 / 16
    assert st.sign_flip_p(d) == 1e-4


def test_bootstrap_of_a_mean_agrees_with_the_normal_interval():
    x = np.random.default_rng(4).normal(3, 2, 400)
    low, high = st.bootstrap_ratio(x, np.ones(400))
    half = 1.96 * x.std(ddof=1) / 20
    assert (low, high) == pytest.approx((x.mean() - half, x.mean() + half), abs=0.03)


def test_bootstrap_by_counts_agrees_with_scipys():
    x = np.repeat([1.0, 0.0, -1.0], [80, 700, 40])
    scipys = stats.bootstrap((x,), np.mean, method="percentile", n_resamples=5000, rng=1)
    expected = tuple(scipys.confidence_interval)
    assert st.bootstrap_ratio(x, np.ones(820)) == pytest.approx(expected, abs=0.003)


def test_nothing_depends_on_the_order_of_items():
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(2, 300))
    labels = rng.integers(0, 40, 300)
    mixed = rng.permutation(300)
    for clusters, other in ((None, None), (labels, labels[mixed])):
        first = st.bootstrap_ratio(x, y**2, clusters)
        assert st.bootstrap_ratio(x[mixed], y[mixed] ** 2, other) == pytest.approx(first, rel=1e-9)
        assert st.sign_flip_p(x, clusters) == st.sign_flip_p(x[mixed], other)


def test_chunks_do_not_matter(monkeypatch):
    x, y = np.random.default_rng(5).uniform(1, 2, (2, 50))
    whole = st.bootstrap_ratio(x, y), st.sign_flip_p(x - y)
    monkeypatch.setattr(st, "CHUNK", 500)
    assert (st.bootstrap_ratio(x, y), st.sign_flip_p(x - y)) == whole


def test_a_single_item_has_an_interval_without_width():
    assert st.bootstrap_ratio([3.0], [2.0]) == (1.5, 1.5)


def test_ratio_intervals_cover_the_truth_with_and_without_clusters():
    rng = np.random.default_rng(6)
    hits = dict.fromkeys(("items", "clusters", "clusters as items"), 0)
    for _ in range(200):
        size = rng.integers(1, 9, 60).astype(float)
        of = np.repeat(np.arange(60), 4)
        top = np.repeat(rng.normal(1, 1, 60), 4) + 0.3 * rng.normal(size=240)
        intervals = {
            "items": st.bootstrap_ratio(size * rng.normal(1, 1, 60), size),
            "clusters": st.bootstrap_ratio(top, np.ones(240), of),
            "clusters as items": st.bootstrap_ratio(top, np.ones(240)),
        }
        for name, (low, high) in intervals.items():
            hits[name] += low <= 1 <= high
    assert 0.90 <= hits["items"] / 200 <= 0.98
    assert 0.90 <= hits["clusters"] / 200 <= 0.98
    assert hits["clusters as items"] / 200 < 0.75  # what clustering is for


def test_detectable_differences_of_the_medical_benchmarks():
    # paired at 10 % discordance, and unpaired at the accuracies that Slerp and its parents have
    paired = [100 * st.detectable((0.1 / n) ** 0.5) for n in SIZES.values()]
    unpaired = [
        100 * published.compare(a, b, n)["mde"]
        for a, b, n in zip(accuracies("Slerp"), PARENTS, SIZES.values(), strict=True)
    ]
    assert paired == pytest.approx([2.5, 1.4, 4.0, 2.6, 0.9, 0.75], abs=0.05)
    assert paired[-1] == pytest.approx(0.75, abs=0.005)
    assert unpaired == pytest.approx([5.4, 2.9, 7.7, 5.8, 2.0, 1.7], abs=0.05)


def test_detectable_difference_equals_statsmodels():
    size = NormalIndPower().solve_power(nobs1=500, alpha=0.05, power=0.8, ratio=0)
    assert st.detectable(0.1**0.5 / 500**0.5) == pytest.approx(size * 0.1**0.5, rel=1e-5)
    size = NormalIndPower().solve_power(nobs1=70, alpha=0.01, power=0.9, ratio=0)
    assert st.detectable(70**-0.5, power=0.9, alpha=0.01) == pytest.approx(size, rel=1e-5)


def test_a_gap_of_means_is_walds_for_one_benchmark_and_covers_the_truth_for_six():
    gap, *ends = published.mean_gap([0.47], [0.44], [1172])
    wald = confint_proportions_2indep(0.47 * 1172, 1172, 0.44 * 1172, 1172, method="wald")
    assert (gap, *ends) == pytest.approx((0.03, *wald))
    rng, sizes, hits = np.random.default_rng(11), list(SIZES.values()), 0
    p = np.array(accuracies("Slerp"))
    for _ in range(SIMULATIONS):
        ours, theirs = rng.binomial(sizes, p) / sizes, rng.binomial(sizes, p) / sizes
        _, low, high = published.mean_gap(list(ours), list(theirs), sizes)
        hits += low <= 0 <= high
    assert 0.92 <= hits / SIMULATIONS <= 0.98


def test_a_difference_of_the_detectable_size_is_found_four_times_in_five():
    rng = np.random.default_rng(7)
    found, size = 0, st.detectable((0.1 / 2000) ** 0.5)
    for _ in range(SIMULATIONS):
        wins = rng.binomial(discordant := rng.binomial(2000, 0.1), (1 + size / 0.1) / 2)
        found += st.mcnemar(wins, discordant - wins) < 0.05
    assert 0.76 < found / SIMULATIONS < 0.85


@pytest.mark.parametrize("test", ["mcnemar", "signs", "clusters", "greater", "ranks", "published"])
def test_p_is_uniform_where_nothing_is_to_be_found(test):
    rng = np.random.default_rng(8)
    of = np.repeat(np.arange(60), 4)

    def draw() -> float:
        if test == "mcnemar":  # discrete: mid-p is uniform where many items are discordant
            n = rng.binomial(14_042, 0.2)
            return st.mcnemar(wins := int(rng.binomial(n, 0.5)), int(n) - wins)
        if test == "ranks":
            return st.mann_whitney(rng.normal(size=60), rng.normal(size=100))
        if test == "published":
            a, b = rng.binomial(14_042, 0.47, 2) / 14_042
            return published.compare(a, b, 14_042)["p"]
        d = rng.standard_t(3, 240) + 2 * np.repeat(rng.normal(size=60), 4)
        if test == "clusters":
            return st.sign_flip_p(d, of)
        return st.sign_flip_p(rng.standard_t(3, 80), greater=test == "greater")

    assert uniform([draw() for _ in range(SIMULATIONS)])


def test_ignoring_clusters_is_what_breaks_p():
    rng = np.random.default_rng(9)
    p = [st.sign_flip_p(np.repeat(rng.normal(size=30), 8)) for _ in range(100)]
    assert np.mean(np.array(p) < 0.05) > 0.3


def test_a_comparison_of_the_largest_benchmark_is_fast():
    rng = np.random.default_rng(10)
    right, loss = rng.choice([-1.0, 0, 1], 14_042), rng.normal(size=14_042)
    for d, seconds in ((right, 1.0), (loss, 4.0)):  # 0.05 and 0.7 s on a free core
        started = time.process_time()
        st.bootstrap_ratio(d, np.ones(14_042))
        st.sign_flip_p(d)
        assert time.process_time() - started < seconds


def test_grim_of_the_meditron_table():
    cells = [
        (name, n, cell)
        for row in TABLE.values()
        for (name, n), cell in zip(SIZES.items(), row.split(), strict=True)
    ]
    impossible = [(name, cell) for name, n, cell in cells if not published.grim(cell, n)]
    assert len(cells) == 36
    assert impossible == [("USMLE", "38.40"), ("ARC-C", "40.20"), ("USMLE", "39.10")]
    assert [published.grim(cell[:-1], SIZES[name]) for name, cell in impossible] == [
        (489,),
        (471,),
        (498,),
    ]


def test_grim_counts_digits_and_takes_both_ways_of_rounding_a_half():
    assert published.grim("17.5", 40) == (7,)
    assert published.grim("17.6", 40) == published.grim("17.50", 41) == ()
    assert published.grim("0.00", 500) == (0,)
    assert published.grim("100", 3) == (3,)
    # 1/16 = 6.25 %: half up gives 6.3, half to even 6.2; 3/16 = 18.75 %: both give 18.8
    assert published.grim("6.3", 16) == published.grim("6.2", 16) == (1,)
    assert published.grim("18.8", 16) == (3,)
    assert published.grim("18.7", 16) == ()
    assert published.grim("50.0", 10_042) == tuple(range(5016, 5027))


def test_the_published_gains_of_slerp_in_six_benchmarks():
    sizes = SIZES.values()
    gains = zip(accuracies("Slerp"), PARENTS, sizes, strict=True)
    z = [published.compare(ours, parent, n)["z"] for ours, parent, n in gains]
    assert z == pytest.approx([0.41, 1.39, 0.80, 1.28, 4.68, 2.69], abs=0.005)
    against = zip(accuracies("Slerp"), accuracies("Lerp"), sizes, strict=True)
    lerp = [published.compare(ours, theirs, n) for ours, theirs, n in against]
    assert max(abs(found["z"]) for found in lerp) < 0.79
    assert all(found["ci95"][0] < 0 < found["ci95"][1] for found in lerp)


def test_published_difference_equals_newcombes_worked_example():
    # Newcombe 1998, Statistics in Medicine 17:873, table II, method 10: 56/70 against 48/80
    found = published.compare(56 / 70, 48 / 80, 70, 80)
    assert found["difference"] == pytest.approx(0.2)
    assert found["ci95"] == pytest.approx([0.0524, 0.3339], abs=5e-5)
    table = [[56, 14], [48, 32]]
    assert found["p"] == pytest.approx(stats.chi2_contingency(table, correction=False).pvalue)
    assert published.compare(0.0, 0.0, 10)["p"] == published.compare(1.0, 1.0, 10)["p"] == 1.0


def test_published_intervals_cover_the_truth():
    rng = np.random.default_rng(11)
    hits = 0
    for _ in range(SIMULATIONS):
        low, high = published.compare(
            rng.binomial(500, 0.75) / 500, rng.binomial(500, 0.7) / 500, 500
        )["ci95"]
        hits += low <= 0.05 <= high
    assert 0.93 <= hits / SIMULATIONS <= 0.98


def test_wilson_covers_the_truth():
    hits = [
        low <= 0.9 <= high
        for k in np.random.default_rng(12).binomial(60, 0.9, SIMULATIONS)
        for low, high in [proportion_confint(k, 60, method="wilson")]
    ]
    assert 0.92 <= np.mean(hits) <= 0.98
