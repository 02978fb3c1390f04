"""Published tensors beside the planned ones, by name and shape; other spellings and tied heads are
understood."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mergelab.checkpoint import FLOATS, Checkpoint, Tensor
from mergelab.plan import Plan
from mergelab.stacking import HEAD, find, is_buffer, spelled_as
from mergelab.writer import Planned

STEP = 1 << 20  # entries compared at a time

Pairs = list[tuple[Planned, Tensor]]


@dataclass(frozen=True)
class Match:
    """Tensors side by side, and names that only the plan (missing) or the file (extra) has.

    A name that both have with other shapes is missing, a buffer that the file leaves out is not.
    packed: names of numbers that the file holds as integers; notes: what was passed over."""

    pairs: Pairs
    missing: list[str]
    extra: list[str]
    packed: list[str]
    notes: list[str]


def match(plan: Plan, published: Checkpoint) -> Match:
    """Put planned and published tensors side by side, in the plan's spelling."""
    published = spelled_as(published, (planned.name for planned in plan.tensors))
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
        elif not is_buffer(planned.name, planned.shape):
            found.missing.append(planned.name)
    paired = {name: tensor for name, tensor in published.tensors.items() if name not in left}
    compared = replace(published, tensors=paired)
    for name, tensor in sorted(left.items()):
        embedding = find(compared, name)
        if is_buffer(name, tensor.shape):
            found.notes.append(f"{tensor.name} is no weight: not compared")
        elif embedding and _same(tensor, embedding):
            found.notes.append(f"{tensor.name} is stored beside the embedding that it equals")
        else:
            found.extra.append(tensor.name)
    return found


def _tied(published: Checkpoint, name: str, notes: list[str]) -> Tensor | None:
    """The embedding that stands for a head, or for another embedding, which the file leaves out.

    A config that says nothing counts as tied, as loaders take that of GPT-2, BERT and T5."""
    if name.endswith(HEAD) and not published.config.get("tie_word_embeddings", True):
        return None
    embedding = find(published, name)
    if embedding is not None:
        notes.append(f"{name} is tied to {embedding.name}, which is compared in its stead")
    return embedding


def _same(a: Tensor, b: Tensor) -> bool:
    """Do two published tensors hold the same bits?"""
    return (a.dtype, a.shape) == (b.dtype, b.shape) and all(
        np.array_equal(a.bits()[i : i + STEP].view("u1"), b.bits()[i : i + STEP].view("u1"))
        for i in range(0, a.size, STEP)
    )
