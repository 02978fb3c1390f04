"""What a comparison found, in words; and of what is different, a first guess why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mergelab.checkpoint import FLOATS, Tensor, split_layer, to_float
from mergelab.forensics import peer_masks
from mergelab.forensics.remerge_tally import Array, Tally, ulp, unsigned
from mergelab.methods.base import BLOCK
from mergelab.writer import Planned

if TYPE_CHECKING:
    from mergelab.forensics.remerge_check import Checker

FEW = 3  # names told, and tensors looked into
SHIFT = 0.005  # differences of weights that are told
EXPLAINED = 0.02  # share of a tensor's change that the named models may leave open
NEAR = 1e-2  # relative distance of tensors that are taken for the same


def same(verdict: str, tallies: Sequence[Tally]) -> str:
    """Why a model passes."""
    count = len(tallies)
    if verdict == "exact":
        return f"all {count} tensors have the very bits that the recipe gives"
    told = []
    differing = sum(t.differing for t in tallies)
    size = max(1, sum(t.size for t in tallies))
    chosen, converted = sum(t.chosen for t in tallies), [t for t in tallies if t.converted]
    if verdict == "other mask":
        return _masks(tallies)
    if differing:
        far = max(t.max_ulp for t in tallies)
        told.append(
            f"{differing:,} of {size:,} entries ({percent(differing / size)}) differ by "
            f"rounding, the farthest by {far:,} ulp of the stored format"
        )
    if chosen:
        told.append(
            f"{chosen:,} entries ({percent(chosen / size)}) are of equal magnitude at a cut, where "
            "another choice among equals was made"
        )
    if converted:
        kinds = sorted({f"{t.published.dtype} where the recipe says {t.tensor.dtype}"
                        for t in converted})  # fmt: skip
        told.append(f"stored as {', '.join(kinds)}: compared after that conversion")
    return "; ".join(told)


def percent(share: float) -> str:
    """A share in percent, never shown as 0 if it is more."""
    return f"{share:.2%}" if share == 0 or share >= 5e-5 else "<0.01%"


def _masks(tallies: Sequence[Tally]) -> str:
    """Of random masks: what agrees."""
    masked = [t for t in tallies if t.mask]
    found = peer_masks.together(list(tallies)) or {}
    return (
        f"{len(masked)} tensors hold other entries of the task vectors than ours, as another "
        "random mask gives: every entry is the base plus rescaled task vectors, and weights and "
        f"densities agree to within chance ({max(found['weight_deviations']):.1f} and "
        f"{found['density_deviations']:.1f} standard deviations over all tensors)"
    )


def different(
    checker: Checker,
    pairs: Sequence[tuple[Planned, Tensor]],
    tallies: Sequence[Tally],
    wrong: Sequence[Tally],
    missing: Sequence[str],
    extra: Sequence[str],
) -> str:
    """Which tensors, and a first guess why."""
    told = []
    if wrong:
        layers = sorted({i for t in wrong if (i := split_layer(t.tensor.name)[1]) is not None})
        where = f" (layers {_spans(layers)})" if layers else ""
        told.append(f"{len(wrong)} of {len(tallies)} tensors are not what the recipe gives{where}")
        counts = [t for t in wrong if t.miscounted and not t.off]
        if counts:
            told.append(f"in {counts[0].tensor.name} {counts[0].miscounted}: another density?")
        elif guess := _guess(checker, pairs, wrong):
            told.append(guess)
    for title, names in (("lacks", missing), ("also holds", extra)):
        if names:
            more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
            told.append(f"the file {title} {', '.join(names[:FEW])}{more}")
    return "; ".join(told) or "the tensors agree one by one, but not taken together"


def _spans(layers: Sequence[int]) -> str:
    """'0-3, 7'."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in spans)


def _guess(
    checker: Checker, pairs: Sequence[tuple[Planned, Tensor]], wrong: Sequence[Tally]
) -> str:
    """The guess that most of a few different tensors share."""
    usable = [t for t in wrong if t.tensor.dtype in FLOATS and not t.tensor.copied]
    usable = sorted(usable, key=lambda t: (t.size < 1 << 10, t.size, t.tensor.name))
    guesses = [
        guess for tally in usable[:FEW] if (guess := _about(checker, pairs, tally)) is not None
    ]
    return max(dict.fromkeys(guesses), key=guesses.count) if guesses else ""


def _about(checker: Checker, pairs: Sequence[tuple[Planned, Tensor]], tally: Tally) -> str | None:
    """A guess about one tensor, from its first block."""
    stop = min(tally.size, BLOCK)
    published = tally.published.floats(0, stop, "<f8")
    tensor = tally.tensor
    names = [*(["the base"] if tensor.base else []), *tensor.models]
    for name, source in zip(names, tensor.sources, strict=True):
        if isinstance(source, Tensor) and source.dtype == tally.published.dtype:
            bits = tally.published.bits()[:stop]
            if np.array_equal(unsigned(source.bits()[:stop]), unsigned(bits)):
                return f"they are those of {name}, not merged"
    if twin := _twin(checker, pairs, tally, published):
        return twin
    return _weights(checker, tally, published, names)


def _twin(
    checker: Checker, pairs: Sequence[tuple[Planned, Tensor]], tally: Tally, published: Array
) -> str | None:
    """Is it what the recipe gives for another layer?"""
    stack, layer, rest = split_layer(tally.tensor.name)
    if layer is None:
        return None
    for tensor, _ in pairs:
        other = split_layer(tensor.name)
        if (
            (other[0], other[2]) != (stack, rest)
            or other[1] == layer
            or (tensor.shape != tally.tensor.shape)
        ):
            continue
        made = _first(checker, tensor, len(published))
        if np.linalg.norm(made - published) <= NEAR * np.linalg.norm(made):
            return f"layer {layer} holds what the recipe gives for layer {other[1]}"
    return None


def _first(checker: Checker, tensor: Planned, count: int) -> Array:
    """The first entries that the recipe gives, at most a block of them."""
    made = next(checker.output(tensor))[:count]
    return to_float(made, tensor.dtype, "<f8")


def _weights(checker: Checker, tally: Tally, published: Array, names: list[str]) -> str | None:
    """Least squares of published and expected entries over the models: whose weight is another?

    Of entries that are finite everywhere."""
    tensor, stop = tally.tensor, len(published)
    models = np.array([source.floats(0, stop, "<f8") for source in tensor.sources])
    expected = _first(checker, tensor, stop)
    stop = len(expected)
    whole = np.isfinite([published[:stop], expected, *models[:, :stop]]).all(axis=0)
    if not whole.any():
        return None
    published, expected, models = (
        published[:stop][whole],
        expected[whole],
        models[:, :stop][:, whole],
    )
    if tensor.base:
        published, expected = published - models[0], expected - models[0]
        models, names = models[1:] - models[0], names[1:]
    rounding = ulp(tally.published.floats(0, stop, "<f8")[whole], tally.coarse)
    noise = float(np.linalg.norm(rounding))
    found, wanted = (np.linalg.lstsq(models.T, y, rcond=None)[0] for y in (published, expected))
    left = published - found @ models - (expected - wanted @ models)
    change = expected if tensor.base else models - models.mean(axis=0)
    size = float(np.linalg.norm(change)) or 1.0
    if np.linalg.norm(left) > EXPLAINED * size + noise:
        part = min(1.0, float(np.linalg.norm(left)) / size)
        what = "what the merge changes" if tensor.base else "what the models differ by"
        return (
            f"another parent, training or noise: {part:.0%} of {what} is not explained by the "
            "recipe's models"
        )
    shifts = [
        f"{name} enters with {a:.3f} instead of {b:.3f}"
        for name, a, b in zip(names, found, wanted, strict=True)
        if abs(a - b) > SHIFT
    ]
    if shifts:
        return f"other weights: {', '.join(shifts)}"
    return "small differences that are no rounding, such as noise or another program's arithmetic"
