"""mergekit's SCE, and the table of what is simulated of it."""

from __future__ import annotations

import numpy as np

from mergelab.blocks import TensorMerge
from mergelab.checkpoint import Tensor
from mergelab.forensics import peer
from mergelab.forensics.peer_blends import weighted
from mergelab.forensics.peer_cuts import BEYOND, windows
from mergelab.forensics.peer_directions import (
    ModelStock,
    ModelStockRows,
    Nuslerp,
    NuslerpRows,
    Slerp,
)
from mergelab.forensics.peer_kernels import (
    BF16,
    HALF,
    combine,
    count_halves,
    differences,
    scale,
    snap,
    tell_free,
    total,
)
from mergelab.forensics.peer_merge import (
    Copied,
    Linear,
    Nearswap,
    OldLinear,
    Passthrough,
    Simulation,
)
from mergelab.forensics.peer_windows import Added, Breadcrumbs, BreadcrumbsTies, Choosing, Trimmed
from mergelab.kernels import CHUNK, LANES, add_magnitudes, encode, kernel, lanes_total
from mergelab.methods.base import Array
from mergelab.methods.sce import EVEN, LEAST_SHARE
from mergelab.methods.trim_kernels import variances


@kernel
def count_variances(values: Array, upper: Array, kind: int, counts: Array) -> None:
    """Count the variances' keys; see peer_kernels.count_keys. There is one group of them."""
    experts, size = values.shape[0] - 1, values.shape[1]
    base, deltas = np.empty(CHUNK, np.float32), np.empty((experts, CHUNK), np.float32)
    key = np.empty(CHUNK, np.float32)
    for at in range(0, size, CHUNK):
        count = min(CHUNK, size - at)
        differences(values, at, count, kind, base, deltas)
        variances(deltas, count, key)
        snap(key, count, kind)
        count_halves(key[:count].view(np.uint32), upper[0], counts[0])


@kernel
def select(
    deltas: Array, count: int, kind: int, keep: Array, sure: Array, free: Array, counts: Array,
    key: Array,
) -> None:  # fmt: skip
    """Make the entries zero whose variance is out of the range; see peer_kernels.merge_window."""
    if sure[0, 0] == 0 and sure[0, 1] == BEYOND:
        if free.size:
            free[:] = 0
            counts[0] += count
        return
    variances(deltas, count, key)
    snap(key, count, kind)
    keys = key[:count].view(np.uint32)
    if free.size:
        tell_free(keys, keep[0], sure[0], 0, free, counts)
    least, beyond, zero = keep[0, 0], keep[0, 1], np.float32(0)
    for m in range(deltas.shape[0]):
        delta = deltas[m]
        for i in range(count):
            delta[i] = delta[i] if (keys[i] >= least) & (keys[i] < beyond) else zero


@kernel
def add_squares(
    values: Array, keep: Array, sure: Array, differs: Array, kind: int, squares: Array
) -> None:
    """Add the rounded squares of selected entries to squares (N), in float64.

    differs (S): do entries that may be selected, but not for certain, count?"""
    experts, size = values.shape[0] - 1, values.shape[1]
    base, deltas = np.empty(CHUNK, np.float32), np.empty((experts, CHUNK), np.float32)
    key, free, zero = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.uint8), np.float32(0)
    lanes, counts = np.zeros((experts, LANES)), np.zeros(1, np.int64)
    for at in range(0, size, CHUNK):
        count = min(CHUNK, size - at)
        differences(values, at, count, kind, base, deltas)
        select(deltas, count, kind, keep, sure, free[:count], counts, key)
        counted = differs[at : at + count]
        for m in range(experts):
            delta = deltas[m]
            for i in range(count):
                square = delta[i] * delta[i]
                delta[i] = square if (free[i] == 0) | counted[i] else zero
            snap(delta, count, kind)
            add_magnitudes(delta, count, lanes[m])
    for m in range(experts):
        squares[m] += lanes_total(lanes[m])


@kernel
def merge_selected(
    values: Array,
    keep: Array,
    sure: Array,
    weights: Array,
    plan: Array,
    kind: int,
    out: Array,
    counts: Array,
    free: Array,
) -> None:
    """Add the weighted mean of the selected entries that agree in sign to the base.

    Signs are those of the unweighted task vectors' sum. See peer_kernels.merge_window."""
    experts, size = values.shape[0] - 1, values.shape[1]
    base, deltas = np.empty(CHUNK, np.float32), np.empty((experts, CHUNK), np.float32)
    key, vote = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    scratch = np.empty((2, CHUNK), np.float32)
    for at in range(0, size, CHUNK):
        count = min(CHUNK, size - at)
        differences(values, at, count, kind, base, deltas)
        select(deltas, count, kind, keep, sure, free[at : at + count], counts, key)
        total(deltas, count, kind, vote)
        for m in range(experts):
            scale(deltas[m], weights[m], count, kind)
        combine(deltas, vote, weights, plan, kind, count, base, scratch)
        encode(base, count, out, at)


class Sce(Choosing):
    """Entries of largest variance over the task vectors; which of equal ones, the merge tells."""

    def prepare(self) -> None:
        share, size = self.settings.shared["select_topk"], self.merge.size
        wide, ranks, counts = self.kind != BF16, [(0, size)], np.zeros((1, HALF), np.int64)
        if share < 1:
            counts = self.count(np.full(1, -1))
            low = self.count(np.zeros(1, np.int64)) if wide else counts
            entries = np.float32(size - int(low[0, 0]))  # mergekit multiplies in float32
            ranks = [(0, int(entries * np.float32(share)))]
        self.allowed, self.sure = windows(ranks, size, counts, self.count, wide=wide)
        self.start([ranks[0][1]])
        self.weights = self.found_weights()

    def count(self, upper: Array) -> Array:
        """How often each half of a variance's key occurs (1, HALF)."""
        counts = np.zeros((1, HALF), np.int64)
        for _, values in self.read():
            count_variances(values, upper, self.kind, counts)
        return counts

    def found_weights(self) -> Array:
        """Mean square of each selected task vector as a share of all; equal ones below a limit.

        Of free entries those count as selected that differ from the base in the merge."""
        squares, bits = np.zeros(len(self.settings.experts)), self.published.bits()
        for start, values in self.read():
            base = self.base(values)
            differs = self.stored(base) != bits[start : start + len(base)]
            add_squares(values, self.allowed, self.sure, differs, self.kind, squares)
        means = peer.numbers(squares / max(1, self.merge.size), self.kind)
        whole = np.float32(peer.summed(means, self.kind))
        if abs(whole) < EVEN:
            return peer.numbers(np.ones(len(means)) / len(means), self.kind)
        return peer.numbers(means / whole, self.kind)

    def base(self, values: Array) -> Array:
        """The base's entries in the work dtype."""
        out = self.empty(values)
        weighted(values[:1], np.ones(1, np.float32), np.float32(0), self.kind, out)
        return out

    def choose(self, values: Array, keep: Array, sure: Array, counts: Array, free: Array) -> Array:
        least = peer.number(LEAST_SHARE, self.kind)
        plan, out = np.array([True, True, 1, 1, least], np.float32), self.empty(values)
        merge_selected(values, keep, sure, self.weights, plan, self.kind, out, counts, free)
        return out


SIMULATED: dict[str, type[Simulation]] = {
    "linear": Linear,
    "passthrough": Passthrough,
    "nearswap": Nearswap,
    "slerp": Slerp,
    "nuslerp": Nuslerp,
    "task_arithmetic": Added,
    "ties": Trimmed,
    "breadcrumbs": Breadcrumbs,
    "breadcrumbs_ties": BreadcrumbsTies,
    "model_stock": ModelStock,
    "sce": Sce,
}
BY_ROW = {"nuslerp": NuslerpRows, "model_stock": ModelStockRows}
OURS_ALONE = {  # parameters that mergekit does not know, and the value that is its way
    "scope": "tensor",
    "flavour": "mergekit",
    "granularity": "tensor",
    "select": "deltas",
    "average": "cosine",
}
OLD = {"linear": OldLinear}  # what release 0.1.4 did differently, of what can be seen


def simulated(method: str, shared: dict[str, object], release: str) -> bool:
    """Can the release's arithmetic be followed, and is it its own (0.1.4: and not 0.1.5's)?"""
    if any(shared.get(name, way) != way for name, way in OURS_ALONE.items()):
        return False
    if method in ("ties", "breadcrumbs", "breadcrumbs_ties") and shared.get("rescale"):
        return False
    return method in (SIMULATED if release == "0.1.5" else OLD)


def simulation(merge: TensorMerge, work: str, published: Tensor, release: str) -> Simulation:
    """How a release makes the tensor that `merge` reads."""
    tensor, name = merge.tensor, merge.method.name
    shared = tensor.settings.shared
    if tensor.copied:
        return Copied(merge, work, published)
    if shared.get("filter_wise") or not shared.get("nuslerp_flatten", True):
        return BY_ROW[name](merge, work, published)
    return (SIMULATED if release == "0.1.5" else OLD)[name](merge, work, published)
