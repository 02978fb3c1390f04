"""The same recipe with another random mask (DARE, DELLA)? Judged entry by entry, and in the mean.

Every entry must be the base plus some of the experts' rescaled task vectors: nothing else can come
of any mask. And what masks leave on average must agree with a merge of ours whose mask is another:
projections on each task vector (their weights) and the second moment (their densities).

Legend: N experts, S entries of a block; tau (N, S) task vectors; factor: what restores a masked
task vector's L1 norm, which each mask's own luck changes a little."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mergelab.blocks import Buffers, Files, TensorMerge
from mergelab.checkpoint import BITS, Tensor, to_float
from mergelab.forensics.peer_mask_kernels import add_flips, add_sizes, judge
from mergelab.forensics.peer_merge import recast
from mergelab.forensics.remerge_tally import DIGITS, LEAST, Array, Tally, not_finite, numbers
from mergelab.methods.base import Block, Method, Settings, Stats
from mergelab.methods.consensus import NO_WEIGHT
from mergelab.methods.sparsify import factors
from mergelab.writer import Planned

if TYPE_CHECKING:
    from mergelab.forensics.remerge_check import Checker

MOST = 6  # experts whose subsets are tried
DEVIATIONS = 5.0  # of chance that are allowed
ROUNDINGS = 8  # of one entry in the work dtype
COMMON = 4  # of them common to all entries: of a weight, and of a factor's two sums and ratio
UNEXPLAINED = 2.0**-10  # share of entries that may be beyond these bounds
WIDE = 2.0**-12  # relative errors from which on sums in float32 are near enough
ELECTS = ("dare_ties", "della")
NOT_FINITE = "its sources hold entries that are infinite or no number, which spoil random masks"


@dataclass
class Masked(Tally):
    """A tally of a tensor whose mask is another; `moments` as in `judge`.

    bias, luck: by how much a factor may be off through rounding, and through its mask, relative;
    weights (N): what the experts enter with, before a division by their sum; flips (2): see
    `add_flips`; broken: entries that are not finite where no mask makes them so.
    """

    moments: Array = field(default_factory=lambda: np.zeros((1, 7)))
    flips: Array = field(default_factory=lambda: np.zeros(2))
    weights: Array = field(default_factory=lambda: np.zeros(0))
    elects: bool = False
    bias: float = 0.0
    luck: float = 0.0
    broken: int = 0

    def square(self) -> float:
        return float(self.moments[-1, 5])


def compare(checker: Checker, tensor: Planned, published: Tensor) -> Tally:
    """Judge one tensor: what rounding and chance allow is 'other mask', all else 'different'.

    Where sources hold entries that are not finite, they spoil factors: nothing can be told."""
    merge = Sizing(checker.method, tensor, checker.seed, checker.files, checker.buffers)
    stats = merge.survey()
    if not np.isfinite(merge.sizes()[0]).all():
        plain = checker.ours(tensor, published)
        plain.undecided = NOT_FINITE
        return plain
    work, count = checker.work(tensor), len(tensor.experts)
    weights = strengths(merge, stats)
    tally = Masked(
        tensor,
        published,
        moments=np.zeros((count + 1, count + 6)),
        weights=weights[1] * float(tensor.settings.shared["lambda"]),
        luck=float(weights[2].max()),
        bias=COMMON * 2.0 ** -(DIGITS[work] + 1),
        elects=merge.method.name in ELECTS,
    )
    look(tally, merge, stats, weights, work)
    tally.mask = judged([tally])
    return tally


def look(tally: Masked, merge: Sizing, stats: Stats, weights: Array, work: str) -> None:
    """Read the tensor and note what it holds."""
    tensor, stored_as, settings = tally.tensor, tally.published.dtype, tally.tensor.settings
    plan = endings(settings, merge.method.name, work, stored_as)
    error = ROUNDINGS * 2.0 ** -(DIGITS[work] + 1)
    edge = DIGITS[tally.coarse], LEAST[tally.coarse], error
    limit = min(2.0 ** -LEAST[dtype] for dtype in (work, tensor.dtype, stored_as))
    wide = "F64" if merge.kind == BITS["F64"] else "F32"
    kind = np.empty(0, BITS[wide])
    stored = np.empty(0, "<f8" if stored_as == "F64" else "<f4")
    quick = np.empty(0, "<f4" if kind.itemsize == 4 and plan[4] > WIDE else "<f8")
    for block in merge.blocks():
        exact = np.empty(block.values.shape[1], kind.dtype)
        merge.method.merge(block, settings, stats, {}, exact)
        bits = recast(exact, wide, tensor.dtype, stored_as)
        given = tally.given[block.start : block.start + len(bits)]
        merged = numbers(given, stored_as), numbers(bits, stored_as)
        tally.compare(bits, given)
        judge(block.values, *merged, weights, plan, tally.moments, kind, stored, quick)
        add_flips(block.values, exact, merged[1], stored, *edge, tally.flips)
        at = np.flatnonzero(not_finite(given, stored_as))
        tally.broken += broken(block.values[:, at], weights, plan, limit) if len(at) else 0


def broken(values: Array, weights: Array, plan: Array, limit: float) -> int:
    """How many entries of finite sources (N + 1, S), infinite or NaN where published, are smaller
    than a limit, whatever mask they have, so that none overflows."""
    wide = to_float(values, "BF16" if values.dtype == np.uint16 else "F32", "<f8")
    with np.errstate(over="ignore"):
        parts = np.abs(weights[0]) @ np.abs(wide[1:] - wide[0])
    return int(np.count_nonzero(np.abs(wide[0]) + abs(plan[3]) * plan[5] * parts < limit))


class Sizing(TensorMerge):
    """A merge that adds up the task vectors' L1 norms and squared lengths (N) when it first
    reads."""

    def __init__(
        self, method: Method, tensor: Planned, seed: int, files: Files, buffers: Buffers
    ) -> None:
        super().__init__(method, tensor, seed, files, buffers, lenient=True)
        self.norms, self.squares = np.zeros((2, len(tensor.experts)))
        self.sized = False

    def blocks(self) -> Iterator[Block]:
        first, self.sized = not self.sized, True
        for block in super().blocks():
            if first:
                add_sizes(block.values, self.norms, self.squares, block.numbers([]))
            yield block

    def sizes(self) -> tuple[Array, Array]:
        """Norms and squares; the tensor is read for them if it was not yet."""
        if not self.sized:
            for _ in self.blocks():
                pass
        return self.norms, self.squares


def strengths(merge: Sizing, stats: Stats) -> Array:
    """Per expert factor times weight, weight, and by how much the factor may be off: (3, N).

    Our mask's factor stands for theirs: the L1 norm of what is kept varies from mask to mask."""
    settings, (norms, squares) = merge.tensor.settings, merge.sizes()
    own = np.array(factors(settings, stats))
    density = np.clip(settings.each("density"), 1e-9, 1.0)
    epsilon = np.array([each.get("epsilon", 0.0) for each in settings.experts])
    dropped = np.where(density < 1, 1 - density + epsilon, 0.0)
    luck = np.sqrt(2 * squares * dropped / np.maximum(density - epsilon, 1e-3))
    slack = DEVIATIONS * luck / np.maximum(norms, 1e-300)
    weights = np.array(settings.each("weight"), float)
    return np.array([own * weights, weights, slack])


def endings(settings: Settings, method: str, work: str, stored: str) -> Array:
    """How parts are put together, for `explain`."""
    weights = settings.each("weight")
    total, shared = float(sum(weights)), settings.shared
    coarse = min((work, stored), key=DIGITS.__getitem__)
    least = min((abs(w) for w in weights if w), default=1.0)
    gain = max(1.0, 1 / min(least, abs(total) or 1.0)) if shared["normalize"] else 1.0
    plan = (
        method in ELECTS,
        shared["normalize"],
        total if abs(total) >= NO_WEIGHT else 1.0,
        shared["lambda"],
        ROUNDINGS * 2.0 ** -(DIGITS[coarse] + 1),
        gain,
        len(weights) <= MOST,
    )
    return np.array(plan, float)


def judged(tallies: Sequence[Masked]) -> dict[str, Any]:
    """Do tensors, taken together, fit? With what tells it, in standard deviations of chance.

    A factor restores the L1 norm, so that the sum of a masked task vector times its signs is the
    same for every mask: only rounding, and where signs are elected luck, moves it."""
    moments = np.array([tally.moments for tally in tallies])
    size = sum(tally.size for tally in tallies)

    def gap(row: int, room: float) -> float:
        beyond = max(0.0, abs(float(moments[:, row, 0].sum())) - room)
        return beyond / math.sqrt(moments[:, row, 1].sum()) if moments[:, row, 1].any() else 0.0

    weights = [gap(m, room(tallies, m)) for m in range(moments.shape[1] - 1)]
    squares = moments[:, -1, 2]
    bias, luck = (np.array([getattr(t, name) for t in tallies]) for name in ("bias", "luck"))
    factors = float((bias * squares).sum() + np.sqrt(((luck * squares) ** 2).sum()))
    density = gap(-1, 2 * factors + sum(float(tally.flips[1]) for tally in tallies))
    unexplained = float(moments[:, -1, 3].sum())
    fits = max(*weights, density) <= DEVIATIONS and unexplained <= max(1.0, UNEXPLAINED * size)
    return {
        "fits": bool(fits and not any(tally.broken for tally in tallies)),
        "unexplained": unexplained / max(1, size),
        "weight_deviations": weights,
        "density_deviations": density,
        "changed": float(moments[:, -1, 4].sum()) / max(1, size),
    }


def room(tallies: Sequence[Masked], expert: int) -> float:
    """By how much an expert's sum of signs may be off: roundings add up, luck adds in squares."""
    certain, chance = 0.0, 0.0
    for tally in tallies:
        parts = np.abs(tally.weights * tally.moments[expert, 6:])
        certain += tally.bias * float(parts.sum()) + float(tally.flips[0])
        lucky = parts if tally.elects else np.delete(parts, expert)
        chance += (tally.luck * float(lucky.sum())) ** 2
    return certain + math.sqrt(chance)


def together(tallies: Sequence[Tally]) -> dict[str, Any] | None:
    """The same over all tensors that have masks, and as many experts as most of them; else None."""
    masked = [tally for tally in tallies if isinstance(tally, Masked)]
    if not masked:
        return None
    counts = [len(tally.moments) for tally in masked]
    most = max(dict.fromkeys(counts), key=counts.count)
    return judged([tally for tally in masked if len(tally.moments) == most])
