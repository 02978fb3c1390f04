"""mergekit's SCE, and the table of what is simulated of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mergelab.blocks import TensorMerge
from mergelab.checkpoint import Tensor
from mergelab.forensics import peer
from mergelab.forensics.peer import Torch
from mergelab.forensics.peer_cuts import ALL, counted, window
from mergelab.forensics.peer_directions import (
    ModelStock,
    ModelStockRows,
    Nuslerp,
    NuslerpRows,
    Slerp,
)
from mergelab.forensics.peer_merge import (
    WIDTHS,
    Added,
    Array,
    Breadcrumbs,
    BreadcrumbsTies,
    Choosing,
    Copied,
    Linear,
    Nearswap,
    OldLinear,
    Passthrough,
    Simulation,
    Trimmed,
)
from mergelab.methods.sce import EVEN


class Sce(Choosing):
    """Entries of largest variance over the task vectors; which of equal ones, the merge tells."""

    def variance(self, x: Sequence[Torch]) -> tuple[Torch, Torch]:
        """Task vectors (N, S) and their variance over the experts (S), in the work dtype."""
        import torch

        deltas = torch.stack([expert - x[0] for expert in x[1:]])
        wide = deltas.double()  # as torch does inside `var`, which is many times slower
        return deltas, (wide - wide.mean(0)).square_().mean(0).to(self.dtype)

    def each(self) -> Iterator[tuple[int, list[Torch]]]:
        """The inputs, block by block."""
        for start in self.merge.starts():
            yield start, self.inputs(start, min(start + self.merge.step, self.merge.size))

    def keys_of_all(self) -> Iterator[Array]:
        """The variances' bits, block by block."""
        for _, x in self.each():
            yield self.keys(self.variance(x)[1])

    def prepare(self) -> None:
        share = self.settings.shared["select_topk"]
        self.window, kept = ALL, self.merge.size
        if share < 1:
            counts, zeros = np.zeros(1 << 16, np.int64), 0
            for keys in self.keys_of_all():
                counts += counted(lambda keys=keys: [keys])  # type: ignore[misc]
                zeros += int(np.count_nonzero(keys == 0))
            kept = int((self.merge.size - zeros) * share)
            self.window = window(self.keys_of_all, counts, (0, kept), wide=WIDTHS[self.work] > 2)
        self.start([kept])
        self.weights = self.found_weights()

    def found_weights(self) -> Torch:
        """Mean square of each selected task vector as a share of all; equal ones below a limit.

        Of free entries those count as selected that differ from the base in the merge."""
        squares = np.zeros(len(self.settings.experts))
        for start, x in self.each():
            deltas, variance = self.variance(x)
            sure, free = self.window.choose(self.keys(variance))
            if free.any():
                bits = self.published.bits()[start : start + len(free)]
                sure = sure | (free & (self.stored(x[0]) != bits))
            chosen = deltas * self.mask(sure)
            squares += (chosen * chosen).double().sum(1).numpy()
        means = peer.numbers(list(squares / max(1, self.merge.size)), x[0])
        if abs(float(means.sum())) < EVEN:
            return (means * 0 + 1) / len(means)
        return means / means.sum()

    def mask(self, chosen: Array) -> Torch:
        """1 for chosen entries, else 0 (S)."""
        import torch

        return torch.from_numpy(chosen).to(self.dtype)

    def value(self, x: Sequence[Torch]) -> Torch:
        self.chosen = [self.window.choose(self.keys(self.variance(x)[1]))]
        return self.outcome(x, [True], slice(None))

    def outcome(self, x: Sequence[Torch], pick: Sequence[bool], at: Any) -> Torch:
        import torch

        sure, free = self.chosen[0]
        mask = self.mask(sure | free if pick[0] else sure)[at]
        deltas = torch.stack([expert - x[0] for expert in x[1:]])
        return peer.sce(x[0], deltas * mask, self.weights)


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
