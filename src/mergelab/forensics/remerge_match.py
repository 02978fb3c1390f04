"""Published tensors beside the planned ones, by name and shape; tied heads are understood."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mergelab.checkpoint import FLOATS, Checkpoint, Tensor
from mergelab.plan import Plan
from mergelab.stacking import EMBEDDINGS, HEAD
from mergelab.writer import Planned

BUFFERS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias")  # no weights: may be left out
STEP = 1 << 20  # entries compared at a time

Pairs = list[tuple[Planned, Tensor]]


@dataclass(frozen=True)
class Match:
    """Tensors side by side, and names that only the plan (missing) or the file (extra) has.

    A name that both have with other shapes is missing. packed: names of numbers that the file holds
    as integers; notes: what was passed over."""

    pairs: Pairs
    missing: list[str]
    extra: list[str]
    packed: list[str]
    notes: list[str]


def match(plan: Plan, published: Checkpoint) -> Match:
    """Put planned and published tensors side by side."""
    left = dict(published.tensors)
    found = Match([], [], [], [], [])
    for planned in plan.tensors:
        tensor = left.pop(planned.name, None) or _tied(published, planned.name, found.notes)
        if tensor is not None and (tensor.dtype in FLOATS) != (planned.dtype in FLOATS):
            found.packed.append(planned.name)
        elif tensor is not None and tensor.shape == planned.shape:
            found.pairs.append((planned, tensor))
        elif tensor is not None:
            shapes = f"{list(tensor.shape)}, not {list(planned.shape)}"
            found.missing.append(planned.name)
            found.notes.append(f"{planned.name} has the shape {shapes}")
        elif not planned.name.endswith(BUFFERS):
            found.missing.append(planned.name)
    embedding = _embedding(published)
    for name, tensor in sorted(left.items()):
        if name.endswith(BUFFERS):
            found.notes.append(f"{name} is no weight: not compared")
        elif name.endswith(HEAD) and embedding and _same(tensor, embedding):
            found.notes.append(f"{name} is stored beside the embedding that it equals")
        else:
            found.extra.append(name)
    return found


def _tied(published: Checkpoint, name: str, notes: list[str]) -> Tensor | None:
    """The embedding, if it stands for a head that the file leaves out."""
    if not name.endswith(HEAD) or not published.config.get("tie_word_embeddings"):
        return None
    notes.append(f"{name} is tied to the embedding, which is compared in its stead")
    return _embedding(published)


def _embedding(published: Checkpoint) -> Tensor | None:
    """The published token embedding."""
    named = (t for n, t in published.tensors.items() if any(word in n for word in EMBEDDINGS))
    return next((t for t in named if len(t.shape) == 2), None)


def _same(a: Tensor, b: Tensor) -> bool:
    """Do two published tensors hold the same bits?"""
    return (a.dtype, a.shape) == (b.dtype, b.shape) and all(
        np.array_equal(a.bits()[i : i + STEP].view("u1"), b.bits()[i : i + STEP].view("u1"))
        for i in range(0, a.size, STEP)
    )
