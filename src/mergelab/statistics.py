"""Statistics of scores and findings on scipy and statsmodels: numpy in, floats out.

Legend: m suspects, n controls or items. Intervals are two-sided 95 %; p is two-sided unless a
function says otherwise. Seeds are fixed and data are sorted: the order of items cannot matter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

VERSION = 3
Z95 = 1.959963984540054  # the normal distribution's 97.5 % quantile
RESAMPLES = 2_000
SIGN_FLIPS = 9_999
SEED = 20_240_501
CHUNK = 4_000_000  # numbers held at once: bounds memory at 32 MB an array

Floats = NDArray[np.float64]


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927, JASA 22:209).

    Stays inside [0, 1] and keeps a width when every item is right or wrong."""
    from statsmodels.stats.proportion import proportion_confint

    if n < 1:
        raise ValueError("an interval needs at least one item")
    low, high = proportion_confint(successes, n, method="wilson")
    return max(0.0, float(low)), min(1.0, float(high))


def auc(suspects: ArrayLike, controls: ArrayLike) -> tuple[float, float, float]:
    """Area under the ROC curve with its 95 % interval: (auc, low, high).

    The chance that a suspect outscores a control, ties counting half. Interval: DeLong, DeLong
    and Clarke-Pearson 1988 (Biometrics 44:837), in the rank form of Sun and Xu 2014 (IEEE SPL
    21:1389); neither library has it. Where its variance is zero (samples that do not overlap at
    all) it would claim certainty, so there the score interval of Newcombe 2006 (Statistics in
    Medicine 25:559, method 5) stands in. Raises ValueError below two items a side."""
    from scipy.stats import rankdata

    x, y = np.asarray(suspects, dtype=np.float64), np.asarray(controls, dtype=np.float64)
    m, n = len(x), len(y)
    if min(m, n) < 2:
        raise ValueError("an AUC needs at least two suspects and two controls")
    ranks = rankdata(np.concatenate([x, y]))
    over_controls = (ranks[:m] - rankdata(x)) / n
    over_suspects = 1 - (ranks[m:] - rankdata(y)) / m
    area = float(over_controls.mean())
    variance = over_controls.var(ddof=1) / m + over_suspects.var(ddof=1) / n
    if variance <= 0:
        return area, *_newcombe(area, m, n)
    half = Z95 * float(np.sqrt(variance))
    return area, max(0.0, area - half), min(1.0, area + half)


def _newcombe(area: float, m: int, n: int) -> tuple[float, float]:
    """Both roots of |area - t| = z sqrt(V(t)), V being Hanley and McNeil's variance at t with
    (m + n) / 2 in place of m and n (Newcombe 2006)."""
    from scipy.optimize import brentq

    half = (m + n) / 2

    def excess(t: float) -> float:
        spread = 1 + (half - 1) * ((1 - t) / (2 - t) + t / (1 + t))
        return (area - t) ** 2 - Z95**2 * t * (1 - t) * spread / (m * n)

    low = 0.0 if area <= 0 else float(brentq(excess, 0.0, area * (1 - 1e-12)))
    high = 1.0 if area >= 1 else float(brentq(excess, area + (1 - area) * 1e-12, 1.0))
    return low, high


def mann_whitney(suspects: ArrayLike, controls: ArrayLike) -> float:
    """One-sided p that suspects score no higher than controls (Mann and Whitney 1947).

    Exact for small samples without ties, else normal with tie and continuity correction."""
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(suspects, controls, alternative="greater").pvalue)


def tpr_at_fpr(suspects: ArrayLike, controls: ArrayLike, fpr: float = 0.05) -> float:
    """Share of suspects above the lowest threshold that at most `fpr` of the controls exceed.

    The threshold is a control itself: with n controls, floor(fpr n) of them may lie above it."""
    falling = np.sort(np.asarray(controls, dtype=np.float64))[::-1]
    threshold = falling[int(fpr * len(falling) + 1e-9)]  # 0.29 * 100 < 29 in binary
    return float(np.mean(np.asarray(suspects, dtype=np.float64) > threshold))


def benjamini_hochberg(p: ArrayLike) -> Floats:
    """q values: p adjusted for the false discovery rate (Benjamini and Hochberg 1995)."""
    from scipy.stats import false_discovery_control

    return np.asarray(false_discovery_control(np.asarray(p, dtype=np.float64)), dtype=np.float64)


def mcnemar(wins: int, losses: int) -> float:
    """Mid-p of McNemar's exact test: wins and losses are the items that one of two got right.

    The exact p is too careful; the mid-p keeps to the level without being so (Fagerland, Lydersen
    and Laake 2013, BMC Medical Research Methodology 13:91)."""
    from scipy.stats import binom
    from statsmodels.stats.contingency_tables import mcnemar as exact

    if wins == losses == 0:
        return 1.0
    p = float(exact([[0, wins], [losses, 0]], exact=True).pvalue)
    here = float(binom.pmf(wins, wins + losses, 0.5))
    return p - here / 2 if wins == losses else p - here


def sign_flip_p(
    differences: ArrayLike, clusters: ArrayLike | None = None, *, greater: bool = False
) -> float:
    """Paired permutation test (Fisher 1935): how often random signs give as large a sum.

    Items of one cluster flip together. Every pattern of signs up to 13 differences, else 9,999
    random ones, so that p is at least 0.0001. `greater`: one-sided, against a sum above 0.
    Not scipy's permutation_test, which takes 15 s on 14,042 items, and this 0.1 s."""
    d = np.sort(cluster_sums(differences, clusters))
    d = d[d != 0]  # zero differences do not change any sum
    least = float(d.sum()) if greater else abs(float(d.sum()))
    least -= 1e-12 * float(np.abs(d).sum())  # equal sums may differ by rounding
    extreme = 0
    for flipped in _flips(d.size):
        sums = d.sum() - 2 * (flipped @ d)
        extreme += int(np.count_nonzero((sums if greater else np.abs(sums)) >= least))
    return extreme / 2**d.size if 2**d.size <= SIGN_FLIPS else (1 + extreme) / (1 + SIGN_FLIPS)


def _flips(n: int) -> Iterator[Floats]:
    """Blocks (patterns, n) of zeros and ones: all 2^n patterns, or SIGN_FLIPS random ones."""
    if 2**n <= SIGN_FLIPS:
        yield ((np.arange(2**n)[:, None] >> np.arange(n)) & 1).astype(np.float64)
        return
    random = np.random.Generator(np.random.PCG64(SEED))
    width, rows = -(-n // 64) * 8, max(1, CHUNK // n)  # whole 64-bit words: chunks do not matter
    for start in range(0, SIGN_FLIPS, rows):
        size = min(rows, SIGN_FLIPS - start)
        drawn = np.frombuffer(random.bytes(size * width), dtype=np.uint8).reshape(size, width)
        yield np.unpackbits(drawn, axis=1, count=n).astype(np.float64)


def cluster_sums(values: ArrayLike, clusters: ArrayLike | None) -> Floats:
    """Sum of the values of each cluster; without clusters, the values."""
    x = np.asarray(values, dtype=np.float64)
    if clusters is None:
        return x
    _, of = np.unique(np.asarray(clusters), return_inverse=True)
    return np.bincount(of, weights=x).astype(np.float64)


def bootstrap_ratio(
    top: ArrayLike, bottom: ArrayLike, clusters: ArrayLike | None = None
) -> tuple[float, float]:
    """95 % interval of sum(top) / sum(bottom) over items, or over clusters of items."""
    x, y = resampled((top, bottom), clusters)
    return percentiles(x / y)


def percentiles(values: Floats) -> tuple[float, float]:
    """The middle 95 % of bootstrap values."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def resampled(
    columns: Sequence[ArrayLike], clusters: ArrayLike | None = None, *, stream: int = 0
) -> Floats:
    """Sums of each column in 2,000 bootstrap samples of the items, or clusters (Efron 1979).

    Columns hold a value per item; returns (columns, samples). A `stream` always draws the same
    samples; give independent data different ones."""
    from scipy.stats import bootstrap

    items = np.stack([cluster_sums(column, clusters) for column in columns], axis=1)
    distinct, counts = np.unique(items, axis=0, return_counts=True)
    seeds = np.random.SeedSequence(SEED, spawn_key=(stream,))
    random = np.random.Generator(np.random.PCG64(seeds))
    n = len(items)
    if len(distinct) <= max(1, n // 10):  # right and wrong: the same samples, drawn by counts
        drawn = random.multinomial(n, counts / n, size=RESAMPLES)
        return np.asarray((drawn @ distinct).T, dtype=np.float64)

    def sums(*samples: Floats, axis: int) -> Floats:
        return np.stack([sample.sum(axis=axis) for sample in samples])

    options: dict[str, Any] = {"paired": True, "vectorized": True, "method": "percentile"}
    options |= {"n_resamples": RESAMPLES, "batch": max(1, CHUNK // n), "rng": random}
    found = bootstrap(tuple(np.repeat(distinct, counts, axis=0).T), sums, **options)
    return np.asarray(found.bootstrap_distribution, dtype=np.float64)


def detectable(error: float, *, power: float = 0.8, alpha: float = 0.05) -> float:
    """Minimum detectable difference: a true one of this size is found with this power.

    Normal approximation of a two-sided test whose difference has this standard error where neither
    variant is better: sqrt(discordance / n) for right and wrong on n items paired."""
    from scipy.stats import norm

    return float((norm.ppf(1 - alpha / 2) + norm.ppf(power)) * error)
