"""What a recipe asks for, as frozen data. Knows no tensor and no YAML."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from mergelab.methods.base import Method
from mergelab.parameters import Setting, Settings
from mergelab.tokenizer import Tokenizer


@dataclass(frozen=True)
class Source:
    """One model of a slice: its layers [start, stop), or all of them, and its parameters."""

    model: str
    layers: tuple[int, int] | None
    parameters: Settings
    line: int


@dataclass(frozen=True)
class Slice:
    """A run of output layers, the models it is merged from, and their base, if there is one.

    `base` is the slice's own or the recipe's, and None for methods that use no base."""

    sources: tuple[Source, ...]
    base: str | None
    parameters: Settings
    line: int

    @property
    def experts(self) -> tuple[Source, ...]:
        """The sources that are not the base."""
        return tuple(source for source in self.sources if source.model != self.base)


@dataclass(frozen=True)
class Module:
    """A part of the model with layers of its own; without a name it is the whole model.

    If it lists `models` it has one slice over all layers (`whole`)."""

    name: str | None
    slices: tuple[Slice, ...]
    whole: bool
    parameters: Settings
    line: int

    @property
    def models(self) -> tuple[str, ...]:
        """Every model that takes part, in recipe order, each slice's base after its sources."""
        names: list[str | None] = []
        for slice in self.slices:
            names += [*(source.model for source in slice.sources), slice.base]
        return tuple(name for name in dict.fromkeys(names) if name)


@dataclass(frozen=True)
class Recipe:
    """A merge, as asked for. `allow_not_finite`: infinities and NaN are no error.

    tokenizer: the output's vocabulary, the donor's if None; chat_template: its name or text."""

    path: Path
    text: str
    method: Method
    base: str | None
    modules: tuple[Module, ...]
    parameters: Settings
    dtype: tuple[Setting, ...]
    out_dtype: tuple[Setting, ...]
    allow_not_finite: bool
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None

    @property
    def models(self) -> tuple[str, ...]:
        """Every model named: those that are merged, then one that only gives the tokenizer."""
        donor = self.tokenizer.model if self.tokenizer else None
        return tuple(dict.fromkeys([*self.merged, *([donor] if donor else [])]))

    @property
    def merged(self) -> tuple[str, ...]:
        """Every model that is merged, in recipe order; the base last if it is listed nowhere."""
        names = [name for module in self.modules for name in module.models]
        return tuple(dict.fromkeys([*names, *([self.base] if self.base else [])]))

    @property
    def sha256(self) -> str:
        """Hash of the recipe's text."""
        return hashlib.sha256(self.text.encode()).hexdigest()
