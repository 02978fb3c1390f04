"""Checks of published scores that need no model: is the number possible, is the gap real?"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

from mergelab.statistics import Z95, detectable


def grim(percent: str, n: int) -> tuple[int, ...]:
    """Every number of hits k for which k of n items is published as `percent`, such as "38.40".

    None: no such score exists for n items (GRIM: Brown and Heathers 2017, SPPS 8:363). The text
    counts with its trailing zeros; an exact half may have been rounded up or to the even digit.
    Several: the check has no power, as for two decimals of more than 10,000 items."""
    value = Fraction(percent)
    unit = Fraction(10) ** int(Decimal(percent).as_tuple().exponent)
    around = range(int((value - unit) * n / 100), int((value + unit) * n / 100) + 2)
    return tuple(k for k in around if 0 <= k <= n and _prints(Fraction(100 * k, n), value, unit))


def _prints(exact: Fraction, value: Fraction, unit: Fraction) -> bool:
    if abs(exact - value) != unit / 2:
        return abs(exact - value) < unit / 2
    return value > exact or value / unit % 2 == 0


def compare(ours: float, theirs: float, n: int, m: int | None = None) -> dict[str, Any]:
    """Two published accuracies (0 to 1) on n and m items, as if the items were not the same.

    The pooled z test and Newcombe's interval (1998, Statistics in Medicine 17:873). Where both
    answered the same items, as on a leaderboard, this is too careful: only records pair them."""
    from statsmodels.stats.proportion import confint_proportions_2indep, proportions_ztest

    m = n if m is None else m
    hits = (ours * n, theirs * m)
    z, p = proportions_ztest(hits, (n, m)) if 0 < sum(hits) < n + m else (0.0, 1.0)
    low, high = confint_proportions_2indep(hits[0], n, hits[1], m, method="newcomb")
    pooled = sum(hits) / (n + m)
    error = (pooled * (1 - pooled) * (1 / n + 1 / m)) ** 0.5
    return {
        "difference": ours - theirs,
        "ci95": [float(low), float(high)],
        "z": float(z),
        "p": float(p),
        "mde": detectable(error),
    }


def mean_gap(
    ours: Sequence[float], theirs: Sequence[float], sizes: Sequence[int]
) -> tuple[float, float, float]:
    """The difference of two means over benchmarks, with its 95 % interval (normal approximation).

    Each benchmark counts alike; its error is that of two accuracies on items of their own."""
    gap = sum(a - b for a, b in zip(ours, theirs, strict=True)) / len(sizes)
    variance = sum(
        (a * (1 - a) + b * (1 - b)) / n for a, b, n in zip(ours, theirs, sizes, strict=True)
    )
    half = Z95 * variance**0.5 / len(sizes)
    return gap, gap - half, gap + half
