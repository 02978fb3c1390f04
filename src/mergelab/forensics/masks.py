"""What a mask depends on: chance (DARE), size (TIES), a band of sizes (breadcrumbs), both (DELLA).

An entry tells whether a parent was kept there if rounding allows for only one of the nearest sums
with and without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergelab.forensics.sparse import Outcome, Part, subsets

Array = np.ndarray[Any, Any]
BINS = 1000  # classes of rank, by size within the tensor
SURE = 0.02  # steps beyond what rounding may add: there a sum is refuted
SLACK = 0.001  # of an entry: what a tensor's own factors may be off by
WRONG = 0.02  # share of entries that are taken for what they are not
WHOLE = 0.995  # a share kept from which nothing was dropped
ELECTED = 0.2  # of what chance would leave: fewer opposed pairs mean that signs were elected
GAMMA = 0.15  # the largest share of outliers that is looked for


@dataclass(frozen=True)
class Mask:
    """kind: 'whole', 'chance', 'size', 'band' or 'slope'; density per parent (N).

    outliers: share of the largest dropped first; slope: change of the share kept from the smallest
    to the largest; elected: were opposing signs dropped? None if no pair tells."""

    kind: str
    densities: tuple[float, ...]
    outliers: float
    slope: float
    elected: bool | None


def read(parts: Sequence[Part], outcome: Outcome, step: float = 1.0) -> Mask:
    """The kind of mask that explains best which entries were kept, the same for all parents.

    step: rounding steps within which an entry counts as reproduced."""
    count = len(outcome.model.names)
    seen, kept = np.zeros((count, BINS)), np.zeros((count, BINS))
    pairs = np.zeros((2, 2))  # opposed or not; seen, both kept
    for part, model in zip(parts, outcome.each, strict=True):
        _add(
            part,
            np.abs(model.sums(part.taus) - part.delta) / step,
            model.factors,
            seen,
            kept,
            pairs,
        )
    return _kind(seen, kept, _elected(pairs))


def _add(
    part: Part, distance: Array, factors: Array, seen: Array, kept: Array, pairs: Array
) -> None:
    """Count by rank the entries that tell, and those kept."""
    count = len(factors)
    inside, reach = subsets(count) > 0, part.bound + SLACK * np.abs(part.delta)
    pull = factors[:, None] * part.taus
    told, member = np.zeros(pull.shape, bool), np.zeros(pull.shape, bool)
    for k in range(count):
        with_k, without = distance[inside[:, k]].min(axis=0), distance[~inside[:, k]].min(axis=0)
        member[k] = with_k <= reach
        told[k] = member[k] & (without > reach + SURE)
        told[k] |= (with_k > reach + SURE) & (without <= reach)
    for k in range(count):
        others = [j for j in range(count) if j != k]
        agree = np.all(pull[others] * pull[k] >= 0, axis=0) if others else told[k]
        use = told[k] & agree
        rank = _ranks(np.abs(part.taus[k] * part.unit))[use]
        seen[k] += np.bincount(rank, minlength=BINS)
        kept[k] += np.bincount(rank, weights=member[k, use], minlength=BINS)
        for j in others:
            both = told[k] & told[j] & (k < j)
            for opposed in (0, 1):
                these = both & ((pull[k] * pull[j] < 0) == bool(opposed))
                pairs[opposed] += these.sum(), (these & member[k] & member[j]).sum()


def _ranks(sizes: Array) -> Array:
    """Class of each entry by size, the smallest 0; of equal ones the first counts as largest."""
    order = np.argsort(sizes[::-1], kind="stable")
    rank = np.empty(sizes.size, np.int64)
    rank[order] = np.arange(sizes.size)
    found: Array = rank[::-1] * BINS // max(1, sizes.size)
    return found


def _elected(pairs: Array) -> bool | None:
    """Are pairs of opposed entries kept together as often as others, or never?"""
    (plain, plain_both), (opposed, opposed_both) = pairs
    expected = opposed * plain_both / plain if plain else 0.0
    return bool(opposed_both < ELECTED * expected) if expected >= 20 else None


def _kind(seen: Array, kept: Array, elected: bool | None) -> Mask:
    total = np.maximum(seen.sum(axis=1), 1)
    shares = kept.sum(axis=1) / total
    if shares.min() >= WHOLE:
        return Mask("whole", (1.0,) * len(seen), 0.0, 0.0, elected)
    chance = [_chance(s, k) for s, k in zip(seen, kept, strict=True)]
    size = [_band(s, k, 0) for s, k in zip(seen, kept, strict=True)]
    best = max(range(1, int(GAMMA * BINS)), key=lambda g: _bands(seen, kept, g)[0])
    band = [_band(s, k, best) for s, k in zip(seen, kept, strict=True)]
    slope = [_slope(s, k) for s, k in zip(seen, kept, strict=True)]
    margin = 5 + 0.002 * float(total.sum())
    found = {
        "chance": sum(fit[0] for fit in chance),
        "size": sum(fit[0] for fit in size),
        "band": sum(fit[0] for fit in band) - margin,
        "slope": sum(fit[0] for fit in slope) - margin,
    }
    kind = max(found, key=lambda name: found[name])
    fits = {"chance": chance, "size": size, "band": band, "slope": slope}[kind]
    tilt = float(np.mean([fit[2] for fit in slope])) if kind == "slope" else 0.0
    return Mask(
        kind, tuple(fit[1] for fit in fits), best / BINS if kind == "band" else 0.0, tilt, elected
    )


def _likelihood(seen: Array, kept: Array, share: Array | float) -> float:
    share = np.clip(share, WRONG / 10, 1 - WRONG / 10)
    return float((kept * np.log(share) + (seen - kept) * np.log1p(-share)).sum())


def _chance(seen: Array, kept: Array) -> tuple[float, float, float]:
    share = float(kept.sum() / max(1, seen.sum()))
    return _likelihood(seen, kept, share), share, 0.0


def _bands(seen: Array, kept: Array, outliers: int) -> tuple[float, list[int]]:
    """Likelihood of the best bands below one number of outlier classes, and where each begins."""
    total, starts = 0.0, []
    for s, k in zip(seen, kept, strict=True):
        likelihood, start = _best_start(s, k, outliers)
        total += likelihood
        starts.append(start)
    return total, starts


def _best_start(seen: Array, kept: Array, outliers: int) -> tuple[float, int]:
    """The best first class of a band that ends `outliers` classes below the top."""
    yes, no = np.log(1 - WRONG), np.log(WRONG)
    inside = kept * yes + (seen - kept) * no
    outside = kept * no + (seen - kept) * yes
    end = BINS - outliers
    below = np.concatenate([[0.0], np.cumsum(outside[:end])])
    within = np.concatenate([np.cumsum(inside[:end][::-1])[::-1], [0.0]])
    found = below + within + outside[end:].sum()
    start = int(found.argmax())
    return float(found[start]), start


def _band(seen: Array, kept: Array, outliers: int) -> tuple[float, float, float]:
    likelihood, start = _best_start(seen, kept, outliers)
    return likelihood, (BINS - outliers - start) / BINS, 0.0


def _slope(seen: Array, kept: Array) -> tuple[float, float, float]:
    """The share kept rises from the smallest to the largest by `slope`, least squares by rank."""
    place = (np.arange(BINS) + 0.5) / BINS - 0.5
    weight = np.maximum(seen, 1e-9)
    mean, middle = float(kept.sum() / weight.sum()), float((weight * place).sum() / weight.sum())
    rate = kept / weight
    tilt = (weight * (place - middle) * (rate - mean)).sum()
    tilt /= (weight * (place - middle) ** 2).sum()
    share = mean + tilt * (place - middle)
    return _likelihood(seen, kept, share), float(mean - tilt * middle), float(tilt)
