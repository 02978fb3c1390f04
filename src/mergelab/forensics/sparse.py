"""Entries that a method kept or dropped: each is a sum over a subset of the parents.

Where masks were laid over task vectors, an entry of child minus base is, up to rounding, the sum
of v_k tau_k over the parents kept there, or (`share`) lambda times their weighted mean. The
weights follow from assigning every entry to the nearest of the 2^N sums, by turns with least
squares; how many entries an assignment reproduces is compared with task vectors put out of step,
which shows what chance reproduces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
MOST = 5  # parents whose subsets are tried
ROUNDS = 40
BINS = np.linspace(-8, 16, 4801)  # ratios, 0.005 apart
CLEAR = 6.0  # steps that a task vector's entry must have to give a ratio
SHIFT = 0.37  # of the entries: how far chance's task vectors are moved
FEW, FEWER = 1024, 8  # entries of a tensor, and tensors, that starting points are tried on
SCALES = (1.0, 1.5, 2.2, 3.5, 6.0)  # densities of 1 to 1/6, restored
STEPS = (0.4, 0.6, 1.5, 2.0, 3.0)  # by which one factor may have been missed
SETTLED = 0.97  # explained: no need to look further
SPREAD = 0.04  # what restored norms may differ by between tensors
TURNS = 24  # by which a tensor's own factors are narrowed down
STILL = 0.2  # steps: what spreads any smaller do not move
DRIFT = 0.25  # share by which a tensor's factor may differ from the model's
FINE = 100.0  # steps, rms, from which ratios of entries are no longer fractions of small numbers
AGREE, SHARP = 16, 8.0  # entries that must agree on a factor; how much closer than by chance
ENOUGH = 40  # entries of a parent in a tensor for a factor of its own


@dataclass(frozen=True)
class Part:
    """One tensor: delta (S) and taus (N, S) in steps of `unit` (S), at least one of rounding.

    bound (S): what rounding may add, in these steps."""

    tensor: str
    delta: Array
    taus: Array
    unit: Array
    bound: Array

    def first(self, count: int) -> Part:
        """Its first entries."""
        part = slice(count)
        delta, taus = self.delta[part], self.taus[:, part]
        return Part(self.tensor, delta, taus, self.unit[part], self.bound[part])


@dataclass(frozen=True)
class Model:
    """Factors v (N) of a sum, or weights (N, sum 1) and `scale` of a mean."""

    names: tuple[str, ...]
    share: bool
    factors: Array
    scale: float = 1.0

    def sums(self, taus: Array) -> Array:
        """The value of every subset (2^N, S); the empty one first."""
        inside = subsets(len(self.names))
        found: Array = inside @ (self.factors[:, None] * taus)
        if self.share:
            weight = np.maximum(inside @ self.factors, 1e-12)
            found *= (self.scale / weight)[:, None]
        return found


@dataclass(frozen=True)
class Outcome:
    """A fitted model: share of entries reproduced, of chance's, and what that leaves (0 to 1)."""

    model: Model
    each: tuple[Model, ...]
    reproduced: float
    chance: float

    @property
    def explained(self) -> float:
        """Reproduced beyond chance: 0 is chance, 1 is everything."""
        return (self.reproduced - self.chance) / max(1e-9, 1 - self.chance)


NOTHING = Outcome(Model((), False, np.zeros(0)), (), 0.0, 0.0)


def subsets(count: int) -> Array:
    """Membership of every subset (2^N, N)."""
    found: Array = (np.arange(1 << count)[:, None] >> np.arange(count)) & 1
    return found.astype(float)


def choose(parts: Sequence[Part], rows: Sequence[int]) -> list[Part]:
    """The parts with only the task vectors in `rows`."""
    return [replace(part, taus=part.taus[list(rows)]) for part in parts]


def nearest(part: Part, model: Model) -> tuple[Array, Array]:
    """Index of the nearest subset of each entry, and its distance in steps (S)."""
    distance = np.abs(model.sums(part.taus) - part.delta)
    index = distance.argmin(axis=0)
    return index, np.take_along_axis(distance, index[None], 0)[0]


def search(parts: Sequence[Part], names: Sequence[str], guess: Array, tolerance: float) -> Outcome:
    """The better of sum and mean on a few entries, each fitted from several starting points."""
    names = tuple(names)
    few = [_pile([part.first(FEW) for part in parts[:: max(1, len(parts) // FEWER)]])]
    alone = np.array([_mode(parts, k, guess[k]) for k in range(len(names))])
    starts = [Model(names, False, alone)]
    starts += [Model(names, False, guess * scale) for scale in SCALES]
    if len(names) > 1:
        scale = float(np.median(alone))
        for weights in (np.ones(len(names)), np.maximum(guess, 0.02), _pairs(parts, alone)):
            starts.append(Model(names, True, weights / weights.sum(), scale))
    best = _tried(few, starts[0], tolerance)
    for start in starts[1:]:
        best = max(best, _tried(few, start, tolerance), key=lambda found: found.explained)
        if best.explained > SETTLED:
            return best
    for k, scale in product(range(len(names)), STEPS):
        factors = best.model.factors.copy()
        factors[k] *= scale
        moved = _tried(few, replace(best.model, factors=factors), tolerance)
        best = max(best, moved, key=lambda found: found.explained)
    return best


def settle(parts: Sequence[Part], model: Model, tolerance: float) -> Outcome:
    """The model nearest to a starting point, with each tensor's own factors (norms are restored
    tensor by tensor), and how much it explains."""
    model = _turns(parts, model, tolerance)
    each = [_own(part, model, tolerance) for part in parts]
    return _judge(parts, model, each, tolerance, 0.0)


def _tried(parts: Sequence[Part], start: Model, tolerance: float) -> Outcome:
    model = _turns(parts, start, tolerance)
    return _judge(parts, model, [model] * len(parts), tolerance, SPREAD)


def _pile(parts: Sequence[Part]) -> Part:
    """All entries as of one tensor."""
    fields = [(part.delta, part.taus, part.unit, part.bound) for part in parts]
    return Part("", *(np.concatenate(column, axis=-1) for column in zip(*fields, strict=True)))


def _mode(parts: Sequence[Part], row: int, fallback: float) -> float:
    """The commonest ratio of delta to one task vector: where that parent is alone."""
    counts = np.zeros(len(BINS) - 1)
    for part in parts:
        tau = part.taus[row]
        clear = (np.abs(tau) > CLEAR) & (np.abs(part.delta) > CLEAR / 2)
        counts += np.histogram(part.delta[clear] / tau[clear], BINS)[0]
    smooth = np.convolve(counts, np.ones(5), "same")
    around = np.convolve(counts, np.ones(81), "same") * 5 / 81
    excess = (smooth - around) / np.sqrt(around + 4)
    if not counts.any() or excess.max() < 4:
        return fallback
    top = int(excess.argmax())
    return float(BINS[top] + BINS[top + 1]) / 2


def _pairs(parts: Sequence[Part], alone: Array) -> Array:
    """Weights from the commonest place between the first parent's value and each other's."""
    scale, weights = float(np.median(alone)), np.ones(len(alone))
    bins = np.linspace(0.02, 0.98, 193)
    for k in range(1, len(alone)):
        counts = np.zeros(len(bins) - 1)
        for part in parts:
            a, b = scale * part.taus[0], scale * part.taus[k]
            clear = (np.abs(a - b) > 2 * CLEAR) & (a * b > 0)
            counts += np.histogram((part.delta - b)[clear] / (a - b)[clear], bins)[0]
        smooth = np.convolve(counts, np.ones(3), "same")
        top = int(smooth.argmax())
        place = (bins[top] + bins[top + 1]) / 2
        weights[k] = (1 - place) / place
    return weights


def _turns(parts: Sequence[Part], model: Model, tolerance: float) -> Model:
    """Assign and fit by turns, with ever less tolerance, until nothing changes."""
    for turn in range(ROUNDS):
        reach = tolerance * max(1.0, 4.0 - turn)
        better = _fitted(parts, model, reach, SPREAD)
        settled = np.allclose(better.factors, model.factors, rtol=1e-5, atol=1e-7)
        if turn > 4 and settled and abs(better.scale - model.scale) < 1e-6:
            break
        model = better
    return model


def _fitted(parts: Sequence[Part], model: Model, reach: float, spread: float = 0.0) -> Model:
    """Least squares over the entries within reach of their subset's value.

    spread: what the factors may be off by, as a share of the value."""
    count = len(model.names)
    inside = subsets(count)
    gram, right = np.zeros((count, count)), np.zeros(count)
    scales, ratios = np.zeros(2), np.zeros((count, count, 2))
    for part in parts:
        index, distance = nearest(part, model)
        near = distance <= reach + spread * np.abs(part.delta)
        index, taus, delta = index[near], part.taus[:, near], part.delta[near]
        member = inside[index].T
        if not model.share:
            rows = member * taus
            gram += rows @ rows.T
            right += rows @ delta
            continue
        value = model.sums(taus)[index, np.arange(index.size)]
        scales += (value @ delta) / model.scale, (value @ value) / model.scale**2
        _add_pairs(ratios, member, taus, delta / model.scale)
    if not model.share:
        return replace(model, factors=_least_squares(gram, right, model.factors))
    scale = scales[0] / scales[1] if scales[1] else model.scale
    return replace(model, factors=_weights(ratios, model.factors), scale=scale)


def _least_squares(gram: Array, right: Array, old: Array) -> Array:
    """Solve where there is something to solve; other factors stay."""
    alive = np.diag(gram) > 0
    found = old.copy()
    if alive.any():
        small = gram[np.ix_(alive, alive)]
        found[alive] = np.linalg.lstsq(small, right[alive], rcond=1e-10)[0]
    return found


def _add_pairs(ratios: Array, member: Array, taus: Array, delta: Array) -> None:
    """Numerator and denominator of each pair's place between its two parents."""
    pair = member.sum(axis=0) == 2
    for i in range(len(taus)):
        for j in range(i + 1, len(taus)):
            both = pair & (member[i] > 0) & (member[j] > 0)
            gap = taus[i, both] - taus[j, both]
            ratios[i, j] += ((delta[both] - taus[j, both]) @ gap, gap @ gap)


def _weights(ratios: Array, old: Array) -> Array:
    """Weights (sum 1) whose log ratios fit those of the pairs; their old ones without pairs."""
    count = len(old)
    rows, target = [np.ones(count)], [0.0]
    for i in range(count):
        for j in range(i + 1, count):
            if ratios[i, j, 1] > 0:
                place = float(np.clip(ratios[i, j, 0] / ratios[i, j, 1], 0.005, 0.995))
                row = np.zeros(count)
                row[i], row[j] = 1, -1
                strength = np.sqrt(ratios[i, j, 1])
                rows.append(row * strength)
                target.append(float(np.log(place / (1 - place)) * strength))
    if len(rows) < count:
        return old
    found = np.exp(np.linalg.lstsq(np.array(rows), np.array(target), rcond=None)[0])
    weights: Array = found / found.sum()
    return weights


def _judge(
    parts: Sequence[Part], model: Model, each: Sequence[Model], tolerance: float, spread: float
) -> Outcome:
    """What the models explain; `spread` as for `_fitted`."""
    found, chance, total = 0, 0, 0
    for part, own in zip(parts, each, strict=True):
        reach = tolerance + spread * np.abs(part.delta)
        found += int((nearest(part, own)[1] <= reach).sum())
        shift = max(1, int(SHIFT * part.delta.size))
        moved = replace(part, taus=np.roll(part.taus, shift, axis=1))
        chance += int((nearest(moved, own)[1] <= reach).sum())
        total += part.delta.size
    return Outcome(model, tuple(each), found / max(1, total), chance / max(1, total))


def _own(part: Part, model: Model, tolerance: float) -> Model:
    """The model with this tensor's own factors, where enough entries tell them."""
    if model.share:
        return model
    alone = [_sharpest(part, k, model.factors[k]) for k in range(len(model.names))]
    own, length = replace(model, factors=np.array(alone)), _length(part.delta)
    spreads = [SPREAD / 2**turn for turn in range(TURNS) if SPREAD / 2**turn * length > STILL]
    for spread in (*spreads, 0.0, 0.0):
        index, distance = nearest(part, own)
        near = distance <= tolerance + spread * np.abs(part.delta)
        member = (subsets(len(own.names))[index].T > 0) & near
        if spread:
            factors = _medians(part, own.factors, member)
        else:
            factors = _fitted([part], own, tolerance).factors
        many = member.sum(axis=1) >= ENOUGH
        sane = np.abs(factors - model.factors) <= DRIFT * np.abs(model.factors)
        own = replace(own, factors=np.where(many & sane, factors, own.factors))
    return own


def _length(values: Array) -> float:
    return float(np.sqrt(np.square(values).mean()))


def _sharpest(part: Part, row: int, about: float) -> float:
    """The factor near `about` that most entries agree on best: where that parent is alone."""
    tau = part.taus[row]
    if _length(part.delta) < FINE:
        return about
    clear = np.abs(tau) > _length(tau) / 2
    ratios = np.sort(part.delta[clear] / tau[clear])
    ratios = ratios[np.abs(ratios - about) <= DRIFT * abs(about)]
    many = max(AGREE, ratios.size // 30)
    if ratios.size < 2 * many:
        return about
    widths = ratios[many:] - ratios[:-many]
    place = int(widths.argmin())
    if widths[place] > 2 * DRIFT * abs(about) * many / ratios.size / SHARP:
        return about
    return float(np.median(ratios[place : place + many]))


def _medians(part: Part, factors: Array, member: Array) -> Array:
    """One parent's factor after the other: the median of what its entries leave for it, each
    weighed by its size, so that entries assigned wrongly do not count."""
    found = factors.copy()
    for k in range(len(found)):
        mine = member[k] & (part.taus[k] != 0)
        if not mine.any():
            continue
        taus, inside = part.taus[:, mine], member[:, mine]
        rest = part.delta[mine] - (found[:, None] * taus * inside).sum(axis=0) + found[k] * taus[k]
        order = np.argsort(rest / taus[k])
        weight = np.cumsum(np.abs(taus[k])[order])
        middle = order[np.searchsorted(weight, weight[-1] / 2)]
        found[k] = rest[middle] / taus[k][middle]
    return found
