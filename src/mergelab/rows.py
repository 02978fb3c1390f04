"""Vocabulary tensors whose rows are put into the order of another vocabulary while being read.

V output rows, H entries of a row, G models whose tensors are merged together (a group)."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from mergelab.checkpoint import BITS, FLOATS, Checkpoint, Tensor, to_float
from mergelab.errors import UserError

Array = np.ndarray[Any, Any]
ZERO, MEAN, PAD = -1, -2, -3  # rows that no single model gives
CHUNK = 1 << 16  # elements that the mean row adds up at a time


INPUT = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|shared|embeddings)\.weight\Z"
)
OUTPUT = re.compile(
    r"(^|\.)(lm_head(\.linear|\.decoder)?|embed_out|output|output_layer|vocab_projector"
    r"|cls\.predictions(\.decoder)?)\.(weight|bias)\Z"
)


class Stored(Protocol):
    """What is re-rowed: a tensor on disk, or one that is computed while it is read."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def floats(self, start: int, stop: int, work: str = "<f4") -> Array: ...


def embedding_rows(model: Checkpoint) -> int:
    """Rows of a model's token embedding: as many as the config's vocab_size, if one has so many,
    else those of the largest tensor named as a token embedding.

    Raises UserError if no tensor is named so."""
    found = [
        t.shape[0]
        for n, t in model.tensors.items()
        if INPUT.search(n) and len(t.shape) == 2 and t.size
    ]
    if not found:
        raise UserError(
            f"model {model.label}: none of its tensors is known as a token embedding (such as "
            "embed_tokens.weight or wte.weight). Leave 'tokenizer' out of the recipe."
        )
    text = model.config.get("text_config")
    sizes = [facts.get("vocab_size") for facts in (model.config, text) if isinstance(facts, dict)]
    return next((size for size in sizes if size in found), max(found))


def is_vocabulary(name: str, tensor: Stored, rows: int) -> bool:
    """Has a tensor one row per token? By its name, and its first dimension: 2-D, or a 1-D bias."""
    named = INPUT.search(name) or OUTPUT.search(name)
    shaped = len(tensor.shape) in (1, 2) and tensor.shape[0] == rows
    return bool(named) and shaped and tensor.dtype in FLOATS


@dataclass(frozen=True, eq=False)
class Defaults:
    """Where the row of each output token comes from for models that lack it.

    which (V): index into the group, or ZERO, MEAN, PAD; row (V): row of that model; forced (V):
    the default replaces even a model's own row."""

    which: Array
    row: Array
    forced: Array


def default_rows(ids: Sequence[Array], base: int | None, tokens: Array, size: int) -> Defaults:
    """The only owner's row; else the base's, if it has one; else the mean over the owners.

    ids: per model of the group, (n) output id to its row or -1; tokens (n): is there a token of
    this id; size: V >= n. A token without owner gets zeros, an id without token the mean row."""
    owners = np.sum([own >= 0 for own in ids], axis=0)
    which = np.full(size, PAD, "<i4")
    row = np.full(size, -1, "<i4")
    which[: len(tokens)] = np.where(tokens, np.where(owners > 1, MEAN, ZERO), PAD)
    for k, own in enumerate(ids):
        at = np.flatnonzero((own >= 0) & ((owners == 1) | (k == base)))
        which[at], row[at] = k, own[at]
    return Defaults(which, row, np.zeros(size, bool))


@dataclass(frozen=True, eq=False)
class Rows:
    """One model's vocabulary tensor, (V, H) or (V), in the output's order of tokens.

    Computed while reading, in memory for the rows asked for. `group`: the stored tensors of all
    models merged together; `ids`: of each, output id to its row or -1; which, row (V): as in
    Defaults, this model's own rows put in. Means add up in the group's order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    group: tuple[Stored, ...]
    ids: tuple[Array, ...]
    which: Array
    row: Array

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """H, the number of elements of a row; 1 for a bias."""
        return math.prod(self.shape[1:])

    @cached_property
    def nbytes(self) -> int:
        """Number of bytes that are read; twice if there are rows to fill with the mean row."""
        mean = np.flatnonzero(self.which == MEAN)
        total = 0
        for k, (stored, own) in enumerate(zip(self.group, self.ids, strict=True)):
            count = np.count_nonzero(self.which == k) + np.count_nonzero(own[mean] >= 0)
            total += int(count) * self.width * np.dtype(BITS[stored.dtype]).itemsize
        return total * (2 if PAD in self.which else 1)

    def floats(self, start: int, stop: int, work: str = "<f4") -> Array:
        """Elements [start, stop), flat, as float32 or float64."""
        if start >= stop:
            return np.empty(0, work)
        first, last = start // self.width, -(-stop // self.width)
        rows = self.rows(first, last, work).reshape(-1)
        return rows[start - first * self.width : stop - first * self.width]

    def rows(self, first: int, last: int, work: str) -> Array:
        """Rows [first, last): (last - first, H)."""
        out = self.given(first, last, work)
        padded = self.which[first:last] == PAD
        if padded.any():
            out[padded] = self.average
        return out

    def given(self, first: int, last: int, work: str) -> Array:
        """Rows [first, last), zeros where the mean row will stand."""
        out = np.zeros((last - first, self.width), work)
        which = self.which[first:last]
        for k in np.unique(which).tolist():
            at = np.flatnonzero(which == k)
            if k >= 0:
                out[at] = self.take(k, self.row[first + at], work)
            elif k == MEAN:
                out[at] = self.means(first + at, work)
        return out

    def means(self, at: Array, work: str) -> Array:
        """For each output id the mean over the models that have the token: (len(at), H)."""
        total = np.zeros((len(at), self.width), work)
        count = np.zeros((len(at), 1), work)
        for k, own in enumerate(self.ids):
            has = np.flatnonzero(own[at] >= 0)
            total[has] += self.take(k, own[at[has]], work)
            count[has] += 1
        return total / count

    def take(self, k: int, rows: Array, work: str) -> Array:
        """The given rows of the group's k-th tensor: (len(rows), H)."""
        stored, bits = self.group[k], self.bits[k]
        if bits is not None:
            return to_float(bits[rows], stored.dtype, work)
        out = np.empty((len(rows), self.width), work)
        cuts = np.flatnonzero(np.diff(rows, prepend=-2) != 1).tolist()
        for begin, end in itertools.pairwise([*cuts, len(rows)]):  # runs of neighbouring rows
            low = int(rows[begin]) * self.width
            run = stored.floats(low, low + (end - begin) * self.width, work)
            out[begin:end] = run.reshape(-1, self.width)
        return out

    @cached_property
    def bits(self) -> tuple[Array | None, ...]:
        """The group's tensors as memory maps of their rows; None for one that is computed."""
        return tuple(
            np.asarray(stored.bits()).reshape(stored.shape[0], -1)
            if isinstance(stored, Tensor)
            else None
            for stored in self.group
        )

    @cached_property
    def average(self) -> Array:
        """The mean over the rows of all tokens, in float64: (H)."""
        total, step = np.zeros(self.width), max(1, CHUNK // self.width)
        for first in range(0, self.shape[0], step):
            last = min(first + step, self.shape[0])
            total += self.given(first, last, "<f8").sum(axis=0)
        return total / np.count_nonzero(self.which != PAD)


def rerow(
    name: str, sources: Mapping[str, Stored], ids: Sequence[Array], defaults: Defaults
) -> dict[str, Rows]:
    """Every model's tensor in the output's order: its own row, or the default one."""
    group, found = tuple(sources.values()), {}
    for k, (model, stored) in enumerate(sources.items()):
        own = np.full(len(defaults.which), -1, "<i4")
        own[: len(ids[k])] = ids[k]
        mine = (own >= 0) & ~defaults.forced
        which = np.where(mine, k, defaults.which).astype("<i4")
        row = np.where(mine, own, defaults.row).astype("<i4")
        shape = (len(which), *stored.shape[1:])
        found[model] = Rows(name, stored.dtype, shape, group, tuple(ids), which, row)
    return found
