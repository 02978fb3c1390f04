"""mergekit's slerp, nuslerp and model_stock: all of a tensor enters by one cosine, or one per row.

The cosine's last bits depend on the order in which mergekit adds, and that on the processor. So it
is looked for, within its bounds, where the published entries say that it was."""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from mergelab.checkpoint import NAMES
from mergelab.forensics import peer
from mergelab.forensics.peer import Torch
from mergelab.forensics.peer_merge import WIDTHS, Array, Simulation
from mergelab.methods.gram import add_gram, symmetric

SAMPLE = 1 << 14  # entries that tell a cosine
COSINE = 2.0**-10  # a cosine that mergekit sums in float32 is off by less; 2^-13 was measured
STEPS = 4  # numbers of a narrower work dtype by which it may be off
NEAR = 32  # numbers on each side of the best guess that are all tried
FAR = tuple(2**k for k in range(14, -1, -1))  # and how far off others are


class Directed(Simulation):
    """One cosine for the whole tensor."""

    based = False  # is it one of task vectors?
    single = False  # is it taken in float32 whatever the work dtype?

    @abstractmethod
    def merged(self, cosine: Torch, x: Sequence[Torch]) -> Torch:
        """The merged entries (S) with a cosine."""

    def nominal(self, gram: Array) -> float:
        """The cosine from dot products of the models, or of their task vectors."""
        aa, ab, bb = gram[0, 0], gram[0, 1], gram[1, 1]
        return float(ab / max(math.sqrt(aa) * math.sqrt(bb), 1e-30))

    @property
    def precision(self) -> str:
        """The dtype of the cosine."""
        return "F32" if self.single and self.work != "F64" else self.work

    def prepare(self) -> None:
        if self.merge.size:
            nominal = min(1.0, max(-1.0, self.found()))
            self.cosine = self.fitted(nominal if math.isfinite(nominal) else 0.0)

    def found(self) -> float:
        """The cosine from dot products in float64."""
        models = len(self.merge.tensor.sources)
        gram = np.zeros((models - self.based, models - self.based))
        kind = np.empty(0, "<f8" if self.merge.kind == "<f8" else "<f4")
        for start in self.merge.starts():
            values = self.merge.read(start, min(start + self.merge.step, self.merge.size))
            add_gram(values, self.based, gram, kind)
        return self.nominal(symmetric(gram))

    def number(self, value: float) -> Torch:
        """A number of the cosine's dtype."""
        import torch

        return torch.tensor(value, dtype=getattr(torch, NAMES[self.precision]))

    def fitted(self, nominal: float) -> Torch:
        """The cosine near the nominal one that explains most of a sample of published entries.

        First the one at which published and merged entries agree in the mean, by bisection; then,
        as each number rounds otherwise, the best of those around it, near and far."""
        stop = min(self.merge.step, self.merge.size)
        at = np.unique(np.linspace(0, stop - 1, SAMPLE).astype(np.int64))
        x = [one[at] for one in self.inputs(0, stop)]
        given = self.published.bits()[at]
        hits: dict[int, int] = {}

        def try_all(numbers: Iterable[int]) -> int:
            for number in numbers:
                if number not in hits:
                    made = self.stored(self.merged(self.of_rank(number), x))
                    hits[number] = int(np.count_nonzero(made == given))
                if hits[number] == len(at):
                    return number
            return max(hits, key=hits.__getitem__)

        middle = self.balanced(nominal, x, self.published.floats(0, stop, "<f8")[at])
        best = try_all([rank(self.number(nominal)), middle])
        best = try_all(middle + way * step for step in range(1, NEAR + 1) for way in (1, -1))
        for step in FAR:
            best = try_all([best + step, best - step]) if hits[best] < len(at) else best
        return self.of_rank(best)

    def balanced(self, nominal: float, x: Sequence[Torch], wanted: Array) -> int:
        """The rank of the cosine at which merged entries agree with `wanted` (S) in the mean."""
        low, high = self.bounds(nominal)
        ends = [self.merged(cosine, x).double().numpy() for cosine in (low, high)]
        way = ends[1] - ends[0]
        first, last = rank(low), rank(high)
        while last - first > 1 and np.any(way):
            middle = (first + last) // 2
            made = self.merged(self.of_rank(middle), x).double().numpy()
            short = float(((made - wanted) * way).sum()) < 0
            first, last = (middle, last) if short else (first, middle)
        return first

    def bounds(self, nominal: float) -> tuple[Torch, Torch]:
        """The least and the greatest cosine that mergekit may have found."""
        if WIDTHS[self.precision] > 2:
            return self.number(nominal - COSINE), self.number(nominal + COSINE)
        middle = rank(self.number(nominal))
        return self.of_rank(middle - STEPS), self.of_rank(middle + STEPS)

    def of_rank(self, number: int) -> Torch:
        """The number of the cosine's dtype with this rank."""
        import torch

        like = self.number(0.0)
        size = like.element_size()
        bits = abs(number) | ((1 << (8 * size - 1)) if number < 0 else 0)
        kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
        signed = bits - (1 << (8 * size)) if bits >> (8 * size - 1) else bits
        return torch.tensor(signed, dtype=kind).view(like.dtype).clamp(-1, 1)

    def value(self, x: Sequence[Torch]) -> Torch:
        return self.merged(self.cosine, x)


def rank(cosine: Torch) -> int:
    """The number of a float among those of its dtype, in ascending order; 0 for 0."""
    import torch

    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[cosine.element_size()]
    bits = int(cosine.view(kind))
    return bits if bits >= 0 else -(bits + (1 << (8 * cosine.element_size() - 1)))


class Slerp(Directed):
    """The two raw tensors."""

    single = True

    def merged(self, cosine: Torch, x: Sequence[Torch]) -> Torch:
        return peer.slerp(cosine, x, self.settings)


class Nuslerp(Directed):
    """The two experts, or their task vectors."""

    def prepare(self) -> None:
        self.based = self.merge.tensor.base is not None
        super().prepare()

    def found(self) -> float:
        """In 16 bits unit vectors and their products are rounded, in float16 often to 0."""
        if WIDTHS[self.work] > 2:
            return super().found()
        squares = np.zeros(2)
        for a, b in self.vectors():
            squares += [float(a.double().square().sum()), float(b.double().square().sum())]
        norms = peer.numbers(list(np.sqrt(squares)), self.number(0)).clamp(min=peer.LEAST_NORM)
        return sum(float((a / norms[0] * (b / norms[1])).double().sum()) for a, b in self.vectors())

    def vectors(self) -> Iterator[tuple[Torch, Torch]]:
        """The two vectors, block by block."""
        for start in self.merge.starts():
            x = self.inputs(start, min(start + self.merge.step, self.merge.size))
            yield (x[1] - x[0], x[2] - x[0]) if self.based else (x[0], x[1])

    def merged(self, cosine: Torch, x: Sequence[Torch]) -> Torch:
        return peer.nuslerp(cosine, x, self.settings)


class ModelStock(Directed):
    """The mean cosine over pairs of task vectors."""

    based = True

    def nominal(self, gram: Array) -> float:
        norms = np.sqrt(np.diag(gram))
        pairs = itertools.combinations(range(len(norms)), 2)
        cosines = [
            min(1.0, max(-1.0, gram[m, n] / max(norms[m] * norms[n], peer.LEAST_PRODUCT)))
            for m, n in pairs
        ]
        return float(np.mean(cosines))

    def found(self) -> float:
        """In 16 bits every product is rounded, in float16 often to 0; sums and norms once."""
        if WIDTHS[self.work] > 2:
            return super().found()
        count = len(self.merge.tensor.experts)
        squares, products = np.zeros(count), np.zeros((count, count))
        for start in self.merge.starts():
            x = self.inputs(start, min(start + self.merge.step, self.merge.size))
            deltas = [expert - x[0] for expert in x[1:]]
            squares += [float(delta.double().square().sum()) for delta in deltas]
            for i, j in itertools.combinations(range(count), 2):
                products[i, j] += float((deltas[i] * deltas[j]).double().sum())
        like = self.number(0)
        norms, sums = peer.numbers(list(np.sqrt(squares)), like), products
        cosines = [
            peer.numbers([sums[i, j]], like) / (norms[i] * norms[j]).clamp(min=peer.LEAST_PRODUCT)
            for i, j in itertools.combinations(range(count), 2)
        ]
        return float(np.mean([float(cosine.clamp(-1, 1)) for cosine in cosines]))

    def merged(self, cosine: Torch, x: Sequence[Torch]) -> Torch:
        return peer.model_stock(cosine, x, self.settings)


class ByRow(Simulation):
    """One cosine per row: of the last dimension, or whole columns."""

    columns = False

    @abstractmethod
    def cosines(self, x: Sequence[Torch]) -> Torch:
        """The cosine of each vector, along the last dimension of x, or the first (columns)."""

    @abstractmethod
    def merged(self, cosines: Torch, x: Sequence[Torch]) -> Torch:
        """The merged entries."""

    def value(self, x: Sequence[Torch]) -> Torch:
        row = self.merge.row
        shaped = [one.reshape(-1, row) for one in x]
        return self.merged(self.cosines(shaped), shaped).reshape(-1)

    def blocks(self) -> Iterator[tuple[int, Array]]:
        if not self.columns:
            yield from super().blocks()
        elif self.merge.size:
            self.x = self.inputs(0, self.merge.size)
            yield 0, self.stored(self.value(self.x))


class NuslerpRows(ByRow):
    """Vectors along the last dimension, or along the first."""

    def prepare(self) -> None:
        self.columns = bool(self.settings.shared["nuslerp_row_wise"])

    def cosines(self, x: Sequence[Torch]) -> Torch:
        a, b = (x[1] - x[0], x[2] - x[0]) if len(x) == 3 else x
        return peer.unit_cosine(a, b, 0 if self.columns else -1)

    def merged(self, cosines: Torch, x: Sequence[Torch]) -> Torch:
        return peer.nuslerp(cosines, x, self.settings)


class ModelStockRows(ByRow):
    """Filters: rows of the last dimension."""

    def cosines(self, x: Sequence[Torch]) -> Torch:
        return peer.pair_cosines([one - x[0] for one in x[1:]], -1)[:, None]

    def merged(self, cosines: Torch, x: Sequence[Torch]) -> Torch:
        return peer.model_stock(cosines, x, self.settings)
