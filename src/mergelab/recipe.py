"""Recipes: mergekit-compatible YAML, read strictly into frozen data. Knows no tensor.

A recipe means what mergekit 0.1.5 would do with it; see docs/conventions.md for the differences."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergelab.checkpoint import DTYPES
from mergelab.errors import nearest
from mergelab.methods import METHODS
from mergelab.methods.base import Method, Parameter
from mergelab.yamlfile import Map, Reader, Seq, as_number, parse, read

TOP_KEYS = (
    "merge_method",
    "base_model",
    "models",
    "slices",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "name",
)
LATER = ("modules", "tokenizer", "chat_template")


@dataclass(frozen=True)
class Setting:
    """One value of a parameter: a number or flag, or a gradient over the layers of its slice.

    `filter` restricts it to tensors whose name contains that text; None means all."""

    value: float | bool | tuple[float, ...]
    filter: str | None

    def at(self, position: float) -> float | bool:
        """The value at position 0 to 1; gradients are interpolated linearly."""
        if not isinstance(self.value, tuple):
            return self.value
        place = position * (len(self.value) - 1)
        low = math.floor(place)
        high = min(low + 1, len(self.value) - 1)
        share = place - low
        return (1 - share) * self.value[low] + share * self.value[high]


Settings = dict[str, tuple[Setting, ...]]


@dataclass(frozen=True)
class Source:
    """One model of a slice: its layers [start, stop), or all of them, and its parameters."""

    model: str
    layers: tuple[int, int] | None
    parameters: Settings
    line: int


@dataclass(frozen=True)
class Slice:
    """A run of output layers and the models it is merged from."""

    sources: tuple[Source, ...]
    parameters: Settings
    line: int


@dataclass(frozen=True)
class Recipe:
    """A merge, as asked for. A `models` recipe has one slice over all layers (`whole`)."""

    path: Path
    text: str
    method: Method
    base: str | None
    slices: tuple[Slice, ...]
    whole: bool
    parameters: Settings
    dtype: str | None
    out_dtype: str | None

    @property
    def models(self) -> tuple[str, ...]:
        """Every model named, in recipe order; the base last if it is listed nowhere."""
        names = [source.model for slice in self.slices for source in slice.sources]
        return tuple(dict.fromkeys([*names, *([self.base] if self.base else [])]))

    @property
    def sha256(self) -> str:
        """Hash of the recipe's text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def load_recipe(path: Path) -> Recipe:
    """Read one recipe. Raises UserError with every mistake, each with file and line."""
    text = read(path)
    reader = _RecipeReader(path)
    recipe = reader.recipe(parse(text, path), text)
    reader.problems.raise_if_any()
    assert recipe is not None
    return recipe


class _RecipeReader(Reader):
    method: Method | None = None

    def recipe(self, top: Map, text: str) -> Recipe | None:
        for key in LATER:
            if key in top:
                self.wrong(top.lines[key], f"'{key}' is not supported yet.")
        self.keys(top, (*TOP_KEYS, *(key for key in LATER if key in top)), "a recipe")
        self.method = self.find_method(top)
        self.tokenizer_source(top)
        base = self.text(top, "base_model", None)
        slices = self.slices(top)
        parameters = self.parameters(self.map(top, "parameters", None), "shared")
        dtype, out_dtype = self.dtype(top, "dtype"), self.dtype(top, "out_dtype")
        if self.method is None:
            return None
        recipe = Recipe(
            self.path,
            text,
            self.method,
            base,
            slices,
            "models" in top,
            parameters,
            dtype,
            out_dtype,
        )
        self.sources(recipe, top)
        self.required(recipe, top)
        return recipe

    def find_method(self, top: Map) -> Method | None:
        name = self.text(top, "merge_method")
        if name is not None and name not in METHODS:
            known = ", ".join(METHODS)
            line = top.lines["merge_method"]
            hint = nearest(name, METHODS)
            self.wrong(line, f"there is no merge method '{name}'.{hint}\n  Methods: {known}.")
        return METHODS.get(name)

    def tokenizer_source(self, top: Map) -> None:
        if self.text(top, "tokenizer_source", None) not in (None, "base"):
            self.wrong(
                top.lines["tokenizer_source"],
                "only 'tokenizer_source: base' is supported yet: the tokenizer of base_model "
                "(or of the first model) is carried over.",
            )

    def dtype(self, top: Map, key: str) -> str | None:
        name = self.text(top, key, None)
        if name is not None and name not in DTYPES:
            hint = nearest(name, DTYPES) or f" Choose one of {', '.join(DTYPES)}."
            self.wrong(top.lines[key], f"{key} '{name}' is not supported.{hint}")
            return None
        return str(name) if name else None

    def slices(self, top: Map) -> tuple[Slice, ...]:
        if ("models" in top) == ("slices" in top):
            self.wrong(1, "a recipe needs either 'models' or 'slices'.")
            return ()
        listed = "models" if "models" in top else "slices"
        if not self.seq(top, listed):
            self.wrong(top.lines[listed], f"'{listed}' is empty.")
        if "models" in top:
            sources = tuple(self.source(m, ranged=False) for m in self.maps(top, "models"))
            return (Slice(sources, {}, top.lines["models"]),)
        return tuple(self.slice(m) for m in self.maps(top, "slices"))

    def slice(self, map: Map) -> Slice:
        self.keys(map, ("sources", "parameters"), "a slice")
        sources = tuple(self.source(m, ranged=True) for m in self.maps(map, "sources"))
        spans = {s.layers[1] - s.layers[0] for s in sources if s.layers}
        if len(spans) > 1:
            self.wrong(map.line, "all sources of a slice must span the same number of layers.")
        return Slice(
            sources, self.parameters(self.map(map, "parameters", None), "shared"), map.line
        )

    def source(self, map: Map, *, ranged: bool) -> Source:
        known = ("model", "layer_range", "parameters") if ranged else ("model", "parameters")
        self.keys(map, known, "a source" if ranged else "a model")
        layers = self.layer_range(map) if ranged else None
        parameters = self.parameters(self.map(map, "parameters", None), "model")
        return Source(str(self.text(map, "model")), layers, parameters, map.line)

    def layer_range(self, map: Map) -> tuple[int, int] | None:
        pair = self.seq(map, "layer_range")
        whole = [n for n in pair if isinstance(n, int) and not isinstance(n, bool)]
        if "layer_range" not in map:
            return None
        if len(pair) != 2 or len(whole) != 2 or not 0 <= pair[0] < pair[1]:
            self.wrong(
                map.lines["layer_range"],
                "'layer_range' must be [first, end]: two integers, 0 <= first < end; end is not "
                "included.",
            )
            return None
        return (whole[0], whole[1])

    def parameters(self, map: Map, place: str) -> Settings:
        found: Settings = {}
        for name, value in map.items():
            parameter = self.method.parameter(name) if self.method else None
            if self.method is None:
                continue
            if parameter is None:
                self.unknown(map.lines[name], name, self.method)
            elif place == "model" and not parameter.per_model:
                self.wrong(
                    map.lines[name],
                    f"'{name}' belongs to the whole merge, not to one model: move it to the "
                    "recipe's 'parameters'.",
                )
            else:
                found[name] = tuple(self.settings(value, parameter, map.lines[name]))
        return found

    def unknown(self, line: int, name: str, method: Method) -> None:
        hint = nearest(name, (p.name for p in method.parameters))
        takes = ", ".join(describe(p) for p in method.parameters)
        self.wrong(
            line,
            f"{method.name} has no parameter '{name}'.{hint}\n"
            f"  {method.name} takes: {takes}.   More: mergelab explain {method.name}",
        )

    def settings(self, value: Any, parameter: Parameter, line: int) -> Iterable[Setting]:
        """A scalar, a gradient, or a list of {filter, value}; the first that matches wins."""
        if isinstance(value, Map):
            value = [value]
        if isinstance(value, Seq | list) and any(isinstance(v, Map) for v in value):
            for entry in value:
                if not isinstance(entry, Map) or "value" not in entry:
                    self.wrong(line, f"each entry of '{parameter.name}' needs a 'value'.")
                    continue
                self.keys(entry, ("filter", "value"), f"an entry of '{parameter.name}'")
                pattern = self.text(entry, "filter", None)
                parsed = self.value(entry["value"], parameter, entry.lines["value"])
                yield Setting(parsed, None if pattern in (None, "*") else pattern)
        elif value is not None and value != []:
            yield Setting(self.value(value, parameter, line), None)

    def value(
        self, value: Any, parameter: Parameter, line: int
    ) -> float | bool | tuple[float, ...]:
        if isinstance(value, list) and parameter.kind == "number" and value:
            return tuple(float(self.scalar(v, parameter, line)) for v in value)
        return self.scalar(value, parameter, line)

    def scalar(self, value: Any, parameter: Parameter, line: int) -> float | bool:
        if parameter.kind == "flag":
            if isinstance(value, bool) or value in (0, 1):
                return bool(value)
            self.wrong(line, f"'{parameter.name}' must be true or false, not {value!r}.")
            return False
        number = as_number(value)
        if number is None:
            self.wrong(line, f"'{parameter.name}' must be a number, not {value!r}.")
            return 0.0
        low, high = parameter.low, parameter.high
        if (low is not None and number < low) or (high is not None and number > high):
            self.wrong(line, f"'{parameter.name}' must lie in {low:g} to {high:g}, not {number:g}.")
        return number

    def sources(self, recipe: Recipe, top: Map) -> None:
        """Does each slice list the models its method needs, each once?"""
        method = recipe.method
        if method.base == "needed" and recipe.base is None:
            self.wrong(1, f"{method.name} needs a 'base_model'.")
            return
        for slice in recipe.slices:
            names = [source.model for source in slice.sources]
            for name in dict.fromkeys(n for n in names if names.count(n) > 1):
                self.wrong(slice.line, f"model {name} is listed twice in one slice.")
            if not recipe.whole and method.base == "needed" and recipe.base not in names:
                self.wrong(slice.line, f"this slice does not list the base_model {recipe.base}.")
            experts = [n for n in names if method.base != "needed" or n != recipe.base]
            least, most = method.experts
            if len(experts) < least or (most is not None and len(experts) > most):
                wanted = f"{least}" if least == most else f"at least {least}"
                besides = " besides its base" if method.base == "needed" else ""
                self.wrong(
                    slice.line,
                    f"{method.name} needs {wanted} model(s){besides}, not {len(experts)}.",
                )

    def required(self, recipe: Recipe, top: Map) -> None:
        """Is every required parameter given wherever it is needed?"""
        for parameter in (p for p in recipe.method.parameters if p.required):
            for slice in recipe.slices:
                common = parameter.name in slice.parameters or parameter.name in recipe.parameters
                if common:
                    continue
                if not parameter.per_model:
                    self.wrong(slice.line, f"{recipe.method.name} needs '{parameter.name}'.")
                    continue
                for source in slice.sources:
                    is_base = recipe.method.base == "needed" and source.model == recipe.base
                    if not is_base and parameter.name not in source.parameters:
                        self.wrong(
                            source.line,
                            f"{recipe.method.name} needs '{parameter.name}' for {source.model}.",
                        )


def describe(parameter: Parameter) -> str:
    """'density (per model, 0 to 1)'."""
    notes = ["per model"] if parameter.per_model else []
    if parameter.low is not None and parameter.high is not None:
        notes.append(f"{parameter.low:g} to {parameter.high:g}")
    return f"{parameter.name} ({', '.join(notes)})" if notes else parameter.name


def resolve(
    parameter: Parameter, levels: Iterable[Settings], tensor: str, position: float
) -> float | bool | None:
    """Value of a parameter for a tensor: the first level with a setting whose filter matches.

    `position` is 0 to 1 within the slice (0 outside layers); else the default."""
    for level in levels:
        for setting in level.get(parameter.name, ()):
            if setting.filter is None or setting.filter in tensor:
                return setting.at(position)
    return parameter.default
