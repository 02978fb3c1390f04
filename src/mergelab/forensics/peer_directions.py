"""mergekit's slerp, nuslerp and model_stock: all of a tensor enters by one cosine, or one per row.

The cosine's last bits depend on the order in which mergekit adds, and that on the processor. So it
is looked for, within its bounds, where the published entries say that it was."""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from mergelab.checkpoint import NAMES, to_float
from mergelab.forensics import peer, peer_blends
from mergelab.forensics.peer import Torch
from mergelab.forensics.peer_kernels import BF16, F16, F32
from mergelab.forensics.peer_merge import Simulation
from mergelab.methods.base import Array
from mergelab.methods.gram import add_gram, symmetric

SAMPLE = 1 << 14  # entries that tell a cosine
COSINE = 2.0**-10  # a cosine that mergekit sums in float32 is off by less; 2^-13 was measured
STEPS = 4  # numbers of a narrower work dtype by which it may be off
NEAR = 32  # numbers on each side of the best guess that are all tried
FAR = tuple(2**k for k in range(14, -1, -1))  # and how far off others are


class Directed(Simulation):
    """One cosine for the whole tensor; `precision` is its dtype."""

    based = False  # is it one of task vectors?

    @abstractmethod
    def merged(self, cosine: float, values: Array) -> Array:
        """The merged entries (S) with a cosine."""

    @property
    def precision(self) -> int:
        """The work dtype, or another."""
        return self.kind

    def nominal(self, gram: Array) -> float:
        """The cosine from dot products of the models, or of their task vectors."""
        aa, ab, bb = gram[0, 0], gram[0, 1], gram[1, 1]
        return float(ab / max(math.sqrt(aa) * math.sqrt(bb), 1e-30))

    def prepare(self) -> None:
        if self.merge.size:
            nominal = min(1.0, max(-1.0, self.found()))
            self.cosine = self.fitted(nominal if math.isfinite(nominal) else 0.0)

    def found(self) -> float:
        """The cosine from dot products in float64."""
        models = len(self.merge.tensor.sources)
        gram = np.zeros((models - self.based, models - self.based))
        for _, values in self.read():
            kind = np.empty(0, "<f8" if values.dtype == np.float64 else "<f4")
            add_gram(values, self.based, gram, kind)
        return self.nominal(symmetric(gram))

    def products(self, norms: Array) -> tuple[Array, Array]:
        """Squares (N) and products (N, N) as mergekit rounds them; see peer_blends.add_products."""
        count = len(self.merge.tensor.sources) - self.based
        squares, sums = np.zeros(count), np.zeros((count, count))
        for _, values in self.read():
            peer_blends.add_products(values, self.based, norms, self.kind, squares, sums)
        return squares, sums

    def fitted(self, nominal: float) -> float:
        """The cosine near the nominal one that explains most of a sample of published entries.

        First the one at which published and merged entries agree in the mean, by bisection; then,
        as each number rounds otherwise, the best of those around it, near and far."""
        stop = min(self.merge.step, self.merge.size)
        at = np.unique(np.linspace(0, stop - 1, SAMPLE).astype(np.int64))
        values = self.merge.read(0, stop)[:, at]
        given = self.published.bits()[at]
        hits: dict[int, int] = {}

        def try_all(numbers: Iterable[int]) -> int:
            for number in numbers:
                if number not in hits:
                    made = self.stored(self.merged(self.of_rank(number), values))
                    hits[number] = int(np.count_nonzero(made == given))
                if hits[number] == len(at):
                    return number
            return max(hits, key=hits.__getitem__)

        middle = self.balanced(nominal, values, self.published.floats(0, stop, "<f8")[at])
        best = try_all([rank(nominal, self.precision), middle])
        best = try_all(middle + way * step for step in range(1, NEAR + 1) for way in (1, -1))
        for step in FAR:
            best = try_all([best + step, best - step]) if hits[best] < len(at) else best
        return self.of_rank(best)

    def balanced(self, nominal: float, values: Array, wanted: Array) -> int:
        """The rank of the cosine at which merged entries agree with `wanted` (S) in the mean."""
        first, last = self.bounds(nominal)
        low, high = (self.numbers(end, values) for end in (first, last))
        way = high - low
        while last - first > 1 and np.any(way):
            middle = (first + last) // 2
            short = float(((self.numbers(middle, values) - wanted) * way).sum()) < 0
            first, last = (middle, last) if short else (first, middle)
        return first

    def numbers(self, number: int, values: Array) -> Array:
        """Merged entries with the cosine of this rank, in float64 (S)."""
        made = self.merged(self.of_rank(number), values)
        return to_float(made, "BF16" if made.dtype == np.uint16 else "F32", "<f8")

    def bounds(self, nominal: float) -> tuple[int, int]:
        """The ranks of the least and the greatest cosine that mergekit may have found."""
        if self.precision == F32:
            low, high = max(-1.0, nominal - COSINE), min(1.0, nominal + COSINE)
            return rank(low, F32), rank(high, F32)
        middle = rank(nominal, self.precision)
        return middle - STEPS, middle + STEPS

    def of_rank(self, number: int) -> float:
        """The cosine with this rank, at most 1 and at least -1."""
        size = abs(number)
        if self.precision == F16:
            value = float(np.uint16(min(size, rank(1.0, F16))).view(np.float16))
        else:
            bits = size << 16 if self.precision == BF16 else size
            value = float(np.uint32(min(bits, rank(1.0, F32))).view(np.float32))
        return value if number >= 0 else -value

    def made(self, values: Array) -> Array:
        return self.merged(self.cosine, values)


def rank(cosine: float, kind: int) -> int:
    """The number of a cosine among the numbers of a dtype, in ascending order; 0 for 0."""
    size = np.float32(abs(peer.number(cosine, kind)))
    if kind == F16:
        found = int(size.astype(np.float16).view(np.uint16))
    else:
        found = int(size.view(np.uint32)) >> (16 if kind == BF16 else 0)
    return found if cosine >= 0 else -found


class Slerp(Directed):
    """The two raw tensors, in float32."""

    @property
    def precision(self) -> int:
        return F32

    def merged(self, cosine: float, values: Array) -> Array:
        out = self.empty(values)
        factors = np.array(peer.slerp(cosine, self.settings, self.kind), np.float32)
        peer_blends.blend(values, factors, F32, self.kind, out)
        return out


class Nuslerp(Directed):
    """The two experts, or their task vectors."""

    def prepare(self) -> None:
        self.based = self.merge.tensor.base is not None
        super().prepare()

    def found(self) -> float:
        """In 16 bits unit vectors and their products are rounded, in float16 often to 0."""
        if self.kind == F32:
            return super().found()
        raw, _ = self.products(np.empty(0, np.float32))
        least = np.float32(peer.number(peer.LEAST_NORM, self.kind))
        norms = np.maximum(peer.numbers(np.sqrt(raw), self.kind), least)
        return float(self.products(norms)[1][0, 1])

    def merged(self, cosine: float, values: Array) -> Array:
        out = self.empty(values)
        factors = np.array(peer.nuslerp(cosine, self.settings, self.kind), np.float32)
        peer_blends.blend(values, factors, self.kind, self.kind, out)
        return out


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
        if self.kind == F32:
            return super().found()
        squares, products = self.products(np.empty(0, np.float32))
        norms = peer.numbers(np.sqrt(squares), self.kind)
        least, cosines = peer.number(peer.LEAST_PRODUCT, self.kind), []
        for i, j in itertools.combinations(range(len(norms)), 2):
            norm = max(peer.number(norms[i] * norms[j], self.kind), least)
            product = peer.number(products[i, j], self.kind) / norm
            cosines.append(min(1.0, max(-1.0, peer.number(product, self.kind))))
        return float(np.mean(cosines))

    def merged(self, cosine: float, values: Array) -> Array:
        t, rest = map(np.float32, peer.model_stock(cosine, self.settings, self.kind))
        out = self.empty(values)
        peer_blends.pull(values, t, rest, self.kind, out)
        return out


class ByRow(Simulation):
    """One cosine per row: of the last dimension, or whole columns. In torch, as it is rare."""

    columns = False

    @abstractmethod
    def rows(self, x: Sequence[Torch]) -> Torch:
        """The merged vectors, of the models' (each R, row)."""

    def made(self, values: Array) -> Array:
        import torch

        dtype = getattr(torch, NAMES[self.work])
        if values.dtype == np.uint16:
            x = torch.from_numpy(values.view(np.int16)).view(torch.bfloat16).to(dtype)
        else:
            x = torch.from_numpy(values).to(dtype)
        merged = self.rows([one.reshape(-1, self.merge.row) for one in x])
        numbers: Array = merged.reshape(-1).float().numpy()
        return numbers

    def read(self) -> Iterator[tuple[int, Array]]:
        if not self.columns:
            yield from super().read()
        elif self.merge.size:
            yield 0, self.merge.read(0, self.merge.size)


class NuslerpRows(ByRow):
    """Vectors along the last dimension, or along the first."""

    def prepare(self) -> None:
        self.columns = bool(self.settings.shared["nuslerp_row_wise"])

    def rows(self, x: Sequence[Torch]) -> Torch:
        a, b = (x[1] - x[0], x[2] - x[0]) if len(x) == 3 else x
        cosines = peer.unit_cosine(a, b, 0 if self.columns else -1)
        return peer.nuslerp_rows(cosines, x, self.settings)


class ModelStockRows(ByRow):
    """Filters: rows of the last dimension."""

    def rows(self, x: Sequence[Torch]) -> Torch:
        cosines = peer.pair_cosines([one - x[0] for one in x[1:]], -1)[:, None]
        return peer.model_stock_rows(cosines, x)
