"""What a merge method is: a declaration and pure functions over blocks of elements.

Shapes: M models (the base first, if there is one), N experts, S entries of one block: consecutive
elements of one flat tensor, whole rows of it where the method works on rows.
A method may `measure` every block in one or more survey rounds before it merges. Measurements are
added over blocks, and over tensors, in order: they do not depend on the schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

BLOCK = 1 << 17  # elements of a block; part of the arithmetic: sums are added block by block

Array = np.ndarray[Any, Any]
Sums = dict[str, Any]
Stats = Mapping[str, Any]


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method; `per_model` ones are given beside each model.

    `low` and `high` bound numbers (both included); a default of None means it must be given.
    A 'choice' is one of the texts `choices`; `aliases` turns YAML values such as true into one."""

    name: str
    kind: Literal["number", "integer", "flag", "choice"]
    per_model: bool
    default: float | bool | str | None
    help: str
    low: float | None = None
    high: float | None = None
    required: bool = False
    choices: tuple[str, ...] = ()
    aliases: Mapping[Any, str] | None = None


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
    """Elements [start, start + S) of a flat tensor of `size` elements.

    values (M, S): stored entries, the base first if `based`; uint16 holds bfloat16 bits, else
    float32 or float64. `row` is the length of a row where the method works on rows (S is a
    multiple of it), else 1. `keys` holds one random key per expert (see methods.sparsify)."""

    values: Array
    based: bool
    start: int
    size: int
    row: int = 1
    keys: tuple[tuple[int, int], ...] = ()

    @property
    def work(self) -> type[Any]:
        """The number type of the arithmetic: float64 if any input has it, else float32."""
        return np.float64 if self.values.dtype == np.float64 else np.float32

    def numbers(self, values: list[Any]) -> Array:
        """Parameter values in the working precision, (len(values))."""
        return np.array(values, self.work)


Begin = Callable[[Settings, int], Sums]
Measure = Callable[[Block, Settings, Stats, Sums], None]
Conclude = Callable[[Sums, Settings, Stats], Stats]
Merge = Callable[[Block, Settings, Stats, Sums, Array], None]
Row = Callable[[Settings, tuple[int, ...]], int]
Check = Callable[[Settings], str | None]


@dataclass(frozen=True)
class Round:
    """One survey: `begin(settings, row)` gives sums of zero, `measure` adds a block to them,
    `conclude` makes statistics of the sums over all blocks.

    With `scope: model` the sums run over all tensors; a `model_only` round is left out without.
    A round is also left out if an earlier one has found the statistic that `unless` names."""

    begin: Begin
    measure: Measure
    conclude: Conclude
    model_only: bool = False
    unless: str = ""


def elements(settings: Settings, shape: tuple[int, ...]) -> int:
    """Row length of a method that works on single elements."""
    return 1


def fine(settings: Settings) -> str | None:
    """Any values within their bounds will do."""
    return None


def nothing(sums: Sums, settings: Settings, stats: Stats) -> Stats:
    """Conclusion of a round whose sums are only used as they run."""
    return {}


@dataclass(frozen=True)
class Method:
    """A merge method. `merge(block, settings, stats, state, out)` writes the merged entries (S).

    `out` has the type of block.values. `state` holds the sums of `running` over all blocks in
    front of this one; merge adds the block to them. `row` gives the length of a row for a shape.
    base: 'needed' (task vectors), 'optional' (task vectors if there is one), 'ordinary' (a model
    like the others, with its own parameters) or 'none'; experts: least and greatest number, base
    not counted. lone: what becomes of a tensor that only one model has. check: what is wrong with
    a tensor's settings, if anything. spreads: an entry of any model that is infinite or NaN makes
    the merged one so."""

    name: str
    version: int
    summary: str
    base: Literal["needed", "optional", "ordinary", "none"]
    experts: tuple[int, int | None]
    parameters: tuple[Parameter, ...]
    merge: Merge
    rounds: tuple[Round, ...] = ()
    running: Begin | None = None
    row: Row = elements
    random: bool = False
    spreads: bool = False
    lone: Literal["error", "copy", "base", "base_or_drop"] = "error"
    check: Check = fine
    papers: tuple[str, ...] = ()
    differs: tuple[str, ...] = ()

    def parameter(self, name: str) -> Parameter | None:
        """The declared parameter of that name."""
        return next((p for p in self.parameters if p.name == name), None)


WEIGHT = Parameter("weight", "number", True, None, "share of this model", required=True)
DENSITY = Parameter("density", "number", True, 1.0, "share of its task vector kept", 0.0, 1.0)
LAMBDA = Parameter("lambda", "number", False, 1.0, "scale of the merged task vector")
INT8_MASK = Parameter(
    "int8_mask", "flag", False, False, "accepted from mergekit recipes; has no effect on the result"
)


def normalize(default: bool) -> Parameter:
    """The flag that divides by the sum of weights, with the method's own default."""
    return Parameter("normalize", "flag", False, default, "divide by the sum of the weights")


def scope(what: str) -> Parameter:
    """Whether statistics are taken per tensor or over the whole flattened model."""
    return Parameter("scope", "choice", False, "tensor", what, choices=("tensor", "model"))
