"""What a merge method is: a declaration and pure functions over blocks of elements.

Shapes: N experts, S entries of one block (always consecutive elements of one flat tensor).
A method may `measure` every block in one or more survey rounds before it merges. Measurements
are added over blocks in block order, in float64 or int64: they do not depend on the schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

BLOCK = 1 << 18  # elements of a block; part of the arithmetic: sums are added block by block

Array = np.ndarray[Any, Any]
Sums = dict[str, Array]
Stats = Mapping[str, Any]


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method; `per_model` ones are given beside each model.

    `low` and `high` bound numbers (both included); a default of None means it must be given."""

    name: str
    kind: Literal["number", "flag"]
    per_model: bool
    default: float | bool | None
    help: str
    low: float | None = None
    high: float | None = None
    required: bool = False


@dataclass(frozen=True)
class Settings:
    """Parameter values for one output tensor: shared ones, and per expert in recipe order."""

    shared: Mapping[str, Any]
    experts: tuple[Mapping[str, Any], ...]

    def each(self, name: str) -> list[Any]:
        """One per-model parameter, for each expert."""
        return [values[name] for values in self.experts]


@dataclass(frozen=True)
class Block:
    """Elements [start, start + S) of a flat tensor, in the working precision.

    base (S) or None; experts: N arrays (S); `size` is the whole tensor's number of elements;
    `keys` holds one random key per expert (see methods.sparsify.keep_mask)."""

    base: Array | None
    experts: tuple[Array, ...]
    start: int
    size: int
    keys: tuple[int, ...] = ()

    @property
    def deltas(self) -> list[Array]:
        """Task vectors: expert minus base, one array (S) per expert."""
        assert self.base is not None
        return [expert - self.base for expert in self.experts]


Measure = Callable[[Block, Settings, Stats], Sums]
Conclude = Callable[[Sums, Settings, Stats], Stats]
Merge = Callable[[Block, Settings, Stats, Sums], Array]


@dataclass(frozen=True)
class Round:
    """One survey of a tensor: `measure` each block, then `conclude` from the sums over blocks."""

    measure: Measure
    conclude: Conclude


@dataclass(frozen=True)
class Method:
    """A merge method. `merge(block, settings, stats, before)` gives the merged entries (S).

    `before` holds the last survey's sums over the blocks in front of this one.
    base: 'needed' (task vectors), 'ordinary' (a model like the others, with its own parameters)
    or 'none'; experts: least and greatest number of experts, base not counted if it is needed."""

    name: str
    version: int
    summary: str
    base: Literal["needed", "ordinary", "none"]
    experts: tuple[int, int | None]
    parameters: tuple[Parameter, ...]
    merge: Merge
    rounds: tuple[Round, ...] = ()
    random: bool = False
    papers: tuple[str, ...] = ()
    differs: tuple[str, ...] = field(default=())

    def parameter(self, name: str) -> Parameter | None:
        """The declared parameter of that name."""
        return next((p for p in self.parameters if p.name == name), None)


def total(values: Array) -> Array:
    """Sum in float64, by numpy's pairwise order (the same on every processor)."""
    return np.asarray(np.sum(values, dtype=np.float64))


WEIGHT = Parameter("weight", "number", True, None, "share of this model", required=True)
DENSITY = Parameter("density", "number", True, 1.0, "share of its task vector kept", 0.0, 1.0)
LAMBDA = Parameter("lambda", "number", False, 1.0, "scale of the merged task vector")
INT8_MASK = Parameter(
    "int8_mask", "flag", False, False, "accepted from mergekit recipes; has no effect on the result"
)


def normalize(default: bool) -> Parameter:
    """The flag that divides by the sum of weights, with the method's own default."""
    return Parameter("normalize", "flag", False, default, "divide by the sum of the weights")
