"""Small-sample statistics of scores and findings: numpy in, floats out.

Legend: m suspects (or items of variant a), n controls; all intervals are two-sided 95 %."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mergelab.errors import UserError

VERSION = 2
Z95 = 1.959963984540054  # the normal distribution's 97.5 % quantile
RESAMPLES = 2_000
SIGN_FLIPS = 9_999
SEED = 20_240_501
CHUNK = 4_000_000  # random numbers drawn at once: bounds memory at 32 MB

Floats = NDArray[np.float64]


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927, JASA 22:209).

    Stays inside [0, 1] and keeps a width when every item is right or wrong."""
    if n < 1:
        raise ValueError("an interval needs at least one item")
    p = successes / n
    shrink = 1 + Z95**2 / n
    middle = (p + Z95**2 / (2 * n)) / shrink
    half = Z95 * np.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n)) / shrink
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def auc(suspects: ArrayLike, controls: ArrayLike) -> tuple[float, float, float]:
    """Area under the ROC curve with its 95 % interval: (auc, low, high).

    The chance that a suspect outscores a control, ties counting half. Interval: DeLong, DeLong
    and Clarke-Pearson 1988 (Biometrics 44:837), in the rank form of Sun and Xu 2014 (IEEE SPL
    21:1389). Where its variance is zero (samples that do not overlap at all) it would claim
    certainty, so there the score interval of Newcombe 2006 (Statistics in Medicine 25:559,
    method 5) stands in. Raises ValueError below two items a side."""
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
    values = np.asarray(p, dtype=np.float64)
    if values.size == 0:
        return values
    order = np.argsort(values, kind="stable")
    scaled = values[order] * values.size / np.arange(1, values.size + 1)
    q = np.empty_like(values)
    q[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return q


def bootstrap_ratio(top: ArrayLike, bottom: ArrayLike) -> tuple[float, float]:
    """Percentile bootstrap of sum(top) / sum(bottom) over items (Efron 1979).

    2,000 resamples from PCG64 with a fixed seed: the same items give the same interval."""
    x, y = np.asarray(top, dtype=np.float64), np.asarray(bottom, dtype=np.float64)
    random = np.random.Generator(np.random.PCG64(SEED))
    rows = max(1, CHUNK // len(x))
    ratios: list[Floats] = []
    for start in range(0, RESAMPLES, rows):
        picks = random.integers(0, len(x), size=(min(rows, RESAMPLES - start), len(x)))
        ratios.append(x[picks].sum(axis=1) / y[picks].sum(axis=1))
    low, high = np.quantile(np.concatenate(ratios), [0.025, 0.975])
    return float(low), float(high)


def sign_flip_p(differences: ArrayLike) -> float:
    """Two-sided paired permutation test (Fisher 1935): how often random signs give as large a sum.

    9,999 draws with a fixed seed, so p is at least 0.0001."""
    d = np.asarray(differences, dtype=np.float64)
    d = d[d != 0]  # zero differences do not change any sum
    if d.size == 0:
        return 1.0
    random = np.random.Generator(np.random.PCG64(SEED))
    rows = max(1, CHUNK // d.size)
    observed, extreme = abs(d.sum()) * (1 - 1e-12), 0
    for start in range(0, SIGN_FLIPS, rows):
        signs = random.integers(0, 2, size=(min(rows, SIGN_FLIPS - start), d.size)) * 2 - 1
        extreme += int(np.count_nonzero(np.abs(signs @ d) >= observed))
    return (1 + extreme) / (1 + SIGN_FLIPS)


def paired_difference(
    a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]], metric: str
) -> tuple[float, float, float, float]:
    """Score of a minus score of b on the same items: (delta, low, high, p).

    a, b: per-sample records of scores/<variant>/<benchmark>.jsonl; `metric` is bits_per_byte or a
    0/1 metric such as acc. Items are joined on id. Interval: bootstrap over items; p: sign flips.
    Raises UserError unless both hold the same items, prompts and targets."""
    pairs = _join(a, b)
    if metric == "bits_per_byte":
        top = np.array([x["metrics"]["nll"] - y["metrics"]["nll"] for x, y in pairs]) / np.log(2)
        bottom = np.array([x["metrics"]["bytes"] for x, _ in pairs], dtype=np.float64)
    else:
        top = np.array([x["metrics"][metric] - y["metrics"][metric] for x, y in pairs])
        bottom = np.ones(len(pairs))
    delta = float(top.sum() / bottom.sum())
    return delta, *bootstrap_ratio(top, bottom), sign_flip_p(top)


def _join(
    a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Pair records by id, in the order of the ids, so that the files' order cannot matter."""
    advice = "Evaluate both variants again with the same study.yaml and data."
    left, right = {r["id"]: r for r in a}, {r["id"]: r for r in b}
    if not left or len(left) != len(a) or len(right) != len(b):
        raise UserError(f"Paired scores need records with unique ids. {advice}")
    if left.keys() != right.keys():
        odd = sorted(left.keys() ^ right.keys())
        raise UserError(f"{len(odd)} items are in one score file only, as '{odd[0]}'. {advice}")
    for key in sorted(left):
        for field in ("doc_hash", "prompt_hash", "target_hash"):
            if left[key][field] != right[key][field]:
                raise UserError(f"Item '{key}' differs in {field} between two scores. {advice}")
    return [(left[key], right[key]) for key in sorted(left)]
