"""GRIM (Brown and Heathers 2017) of a claim: could any number of right answers give its digits?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from mergelab import published
from mergelab.audit.measured import Measured, counts, usual_size
from mergelab.claims.base import Claim

DIGITS = 10  # decimals of a percentage that are looked at: a float's own error is below
MOST_FITS = 20  # numbers of hits listed
RIGHT_OR_WRONG = ("acc", "acc_norm", "exact_match")  # metrics that count right answers


def sizes(claim: Claim, measured: Sequence[Measured]) -> set[int] | None:
    """Numbers of items of which the claim may count the right ones: all, or those that we saw.

    None if there are such items, but how many is not known; empty if right answers are not what is
    counted, or those to another split."""
    if claim.rescaled or not 0 <= claim.value <= 1:
        return set()
    if not measured:
        return usual_size(claim) if claim.metric in (None, *RIGHT_OR_WRONG) else set()
    of_kind = [o for o in measured if claim.metric is None or o.metric == claim.metric]
    if any(o.hits is None for o in of_kind):
        return set()
    found: set[int] = set()
    for one in of_kind:
        own = counts(claim, one)
        if own is None:
            return None
        found |= own
    return found


def possible(claim: Claim, numbers: set[int]) -> dict[str, Any]:
    """Could right or wrong answers to so many items give the number?

    Beside rounding, a number may be cut off, or printed with a 0 that was never measured."""
    text = _percentage(claim)
    fits = {n: _hits(text, n) for n in sorted(numbers, reverse=True)}
    n = next((n for n, hits in fits.items() if hits), max(numbers))
    return {"n": n, "fits": list(fits[n][:MOST_FITS]), "possible": bool(fits[n])}


def no_count(claim: Claim, n: int) -> str:
    """Why no number of right answers gives the claim, in a sentence."""
    text = _percentage(claim)
    k = math.floor(Decimal(text) * n / 100)
    near = " or ".join(f"{100 * x / n:.{max(2, _decimals(text))}f} ({x})" for x in (k, k + 1))
    return f"No number of right answers to {n:,} items is {text} %; the nearest are {near}."


def _percentage(claim: Claim) -> str:
    """The printed digits as a percentage, without those beyond a float's own error."""
    exact = Decimal(claim.printed).scaleb(0 if claim.percent else 2)
    exponent = exact.as_tuple().exponent
    if isinstance(exponent, int) and exponent < -DIGITS:
        exact = round(exact, DIGITS)
    return f"{exact:f}"


def _hits(text: str, n: int) -> tuple[int, ...]:
    """The numbers of hits that may be printed so."""
    if fits := published.grim(text, n):
        return fits
    short = text.rstrip("0").rstrip(".") if "." in text else text
    if short != text and (fits := published.grim(short, n)):
        return fits
    value = Decimal(text)
    step = Decimal(1).scaleb(int(value.as_tuple().exponent))
    k = math.ceil(value * n / 100)
    return (k,) if k <= n and Decimal(100 * k) / n < value + step else ()


def _decimals(text: str) -> int:
    return len(text.partition(".")[2])
