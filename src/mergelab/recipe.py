"""Recipes: mergekit-compatible YAML, read strictly into frozen data (mergelab.structure).

A recipe means what mergekit 0.1.5 would do with it; see docs/conventions.md for the differences."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mergelab.chat import read_chat_template
from mergelab.checkpoint import DTYPES
from mergelab.errors import nearest
from mergelab.methods import METHODS
from mergelab.methods.base import Method
from mergelab.parameters import ParameterReader, Setting
from mergelab.structure import Module, Recipe, Slice, Source
from mergelab.tokenizer import read_tokenizer
from mergelab.yamlfile import REQUIRED, Map, Seq, as_number, parse, read

TOP_KEYS = (
    "merge_method",
    "base_model",
    "models",
    "slices",
    "modules",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "allow_not_finite",
    "name",
)
LISTS = ("models", "slices", "modules")


def load_recipe(path: Path) -> Recipe:
    """Read one recipe. Raises UserError with every mistake, each with file and line."""
    text = read(path)
    reader = _RecipeReader(path)
    recipe = reader.recipe(parse(text, path), text)
    reader.problems.raise_if_any()
    assert recipe is not None
    return recipe


class _RecipeReader(ParameterReader):
    base: str | None = None

    def recipe(self, top: Map, text: str) -> Recipe | None:
        self.keys(top, TOP_KEYS, "a recipe")
        self.method = self.find_method(top)
        self.base = self.model(top, "base_model", None)
        modules = self.modules(top)
        parameters = self.parameters(self.map(top, "parameters", None))
        dtype, out_dtype = self.dtype(top, "dtype"), self.dtype(top, "out_dtype")
        allow = bool(self.get(top, "allow_not_finite", bool, False))
        named = [name for module in modules for name in module.models]
        models = dict.fromkeys([*named, *([self.base] if self.base else [])])
        tokenizer = read_tokenizer(self, top, list(models))
        template = read_chat_template(self, top)
        if self.method is None:
            return None
        recipe = Recipe(
            self.path,
            text,
            self.method,
            self.base,
            modules,
            parameters,
            dtype,
            out_dtype,
            allow,
            tokenizer,
            template,
        )
        _Check(self, recipe).everything()
        return recipe

    def find_method(self, top: Map) -> Method | None:
        name = self.text(top, "merge_method")
        if name is not None and name not in METHODS:
            known = ", ".join(METHODS)
            line = top.lines["merge_method"]
            hint = nearest(name, METHODS)
            self.wrong(line, f"there is no merge method '{name}'.{hint}\n  Methods: {known}.")
        return METHODS.get(name)

    def dtype(self, top: Map, key: str) -> tuple[Setting, ...]:
        """One dtype, or a list of {filter, value} over the names of the output's tensors."""

        def known(value: Any, line: int) -> str:
            value = value.removeprefix("torch.") if isinstance(value, str) else value
            if not isinstance(value, str) or value not in DTYPES:
                hint = nearest(str(value), DTYPES) or f" Choose one of {', '.join(DTYPES)}."
                self.wrong(line, f"{key} {_quoted(value)} is not supported.{hint}")
            return str(value)

        return tuple(self.settings(top.get(key), key, top.lines.get(key, 1), known))

    def modules(self, top: Map) -> tuple[Module, ...]:
        if not self.one_list(top, "a recipe", LISTS):
            return ()
        if top.get("modules") is None:
            return (self.module(None, top, 1),)
        found = []
        listed = self.map(top, "modules")
        for name in listed:
            if not name:
                self.wrong(listed.lines[name], "a module needs a name.")
            map = self.map(listed, name, None)
            self.keys(map, ("models", "slices", "parameters"), "a module")
            if self.one_list(map, f"module '{name}'", LISTS[:2]):
                found.append(self.module(name, map, listed.lines[name]))
        return tuple(found)

    def one_list(self, map: Map, what: str, keys: tuple[str, ...]) -> bool:
        """Is exactly one of `keys` given, and not empty?"""
        given = [key for key in keys if map.get(key) is not None]
        if len(given) != 1:
            quoted = [f"'{key}'" for key in keys]
            choice = f"{', '.join(quoted[:-1])} or {quoted[-1]}"
            self.wrong(map.line, f"{what} needs exactly one of {choice}.")
        elif not map[given[0]]:
            self.wrong(map.lines[given[0]], f"'{given[0]}' is empty.")
        return len(given) == 1 and bool(map[given[0]])

    def module(self, name: str | None, map: Map, line: int) -> Module:
        """What `map` lists; the parameters of a recipe are read with the recipe, not here."""
        own = self.parameters(self.map(map, "parameters", None)) if name else {}
        if map.get("models") is not None:
            sources = tuple(self.source(m, ranged=False) for m in self.maps(map, "models"))
            slices = (Slice(sources, self.used(self.base), {}, map.lines["models"]),)
            return Module(name, slices, True, own, line)
        return Module(name, tuple(self.slices(map)), False, own, line)

    def slices(self, map: Map) -> Iterator[Slice]:
        for entry in self.maps(map, "slices"):
            idle = [key for key in ("residual_weight",) if key in entry]
            for key in idle:
                self.wrong(entry.lines[key], f"'{key}' has no effect in mergekit 0.1.5: remove it.")
            self.keys(entry, ("sources", "base_model", "parameters", *idle), "a slice")
            sources = tuple(self.source(m, ranged=True) for m in self.maps(entry, "sources"))
            spans = {s.layers[1] - s.layers[0] for s in sources if s.layers}
            if len(spans) > 1:
                self.wrong(
                    entry.line, "all sources of a slice must span the same number of layers."
                )
            base = self.model(entry, "base_model", None) or self.base
            own = self.parameters(self.map(entry, "parameters", None))
            yield Slice(sources, self.used(base), own, entry.line)

    def used(self, base: str | None) -> str | None:
        """The base as the method sees it: None if it makes no difference between models."""
        return base if self.method and self.method.base in ("needed", "optional") else None

    def source(self, map: Map, *, ranged: bool) -> Source:
        known = ("model", "layer_range", "parameters") if ranged else ("model", "parameters")
        self.keys(map, known, "a source" if ranged else "a model")
        layers = self.layer_range(map) if ranged else None
        parameters = self.parameters(self.map(map, "parameters", None), of_model=True)
        return Source(str(self.model(map, "model", REQUIRED)), layers, parameters, map.line)

    def model(self, map: Map, key: str, default: Any) -> str | None:
        """A model's name, or mergekit's long form of it: {model: {path, revision}, lora: ...}."""
        if not isinstance(map.get(key), Map):
            name: str | None = self.text(map, key, default)
            return name
        long = self.map(map, key)
        inner = long if "path" in long else self.map(long, "model")
        outer = ("model", "lora", "override_architecture")  # no template is needed here
        self.keys(long, ("path", "revision") if "path" in long else outer, "a model")
        self.keys(inner, ("path", "revision"), "a model")
        path, revision = self.text(inner, "path"), self.text(inner, "revision", None)
        name = f"{path}@{revision}" if revision else path
        lora = self.model(long, "lora", None) if "lora" in long else None
        return f"{name}+{lora}" if lora else name

    def layer_range(self, map: Map) -> tuple[int, int] | None:
        pair = self.seq(map, "layer_range")
        if not isinstance(map.get("layer_range"), Seq):
            return None
        numbers = [as_number(end) for end in pair]
        whole = [int(n) for n in numbers if n is not None and n.is_integer()]
        if len(pair) != 2 or len(whole) != 2 or not 0 <= whole[0] < whole[1]:
            self.wrong(
                map.lines["layer_range"],
                "'layer_range' must be [first, end]: two integers, 0 <= first < end; end is not "
                "included.",
            )
            return None
        return (whole[0], whole[1])


class _Check:
    """Does every slice list the models that the method needs, with their parameters?"""

    def __init__(self, reader: _RecipeReader, recipe: Recipe) -> None:
        self.wrong, self.recipe, self.method = reader.wrong, recipe, recipe.method

    def everything(self) -> None:
        slices = [(m, s) for m in self.recipe.modules for s in m.slices]
        if self.method.base == "needed" and any(slice.base is None for _, slice in slices):
            self.wrong(1, f"{self.method.name} needs a 'base_model'.")
            return
        for module, slice in slices:
            self.models(module, slice)
        for module, slice in slices:
            self.parameters(module, slice)

    def models(self, module: Module, slice: Slice) -> None:
        """Is each model listed once, the base among them, and as many as it takes?"""
        names = [source.model for source in slice.sources]
        for name in dict.fromkeys(n for n in names if names.count(n) > 1):
            self.wrong(slice.line, f"model {name} is listed twice in one slice.")
        if not module.whole and slice.base and slice.base not in names:
            self.wrong(slice.line, f"this slice does not list the base_model {slice.base}.")
        (least, most), count = self.method.experts, len(slice.experts)
        if count < least or (most is not None and count > most):
            wanted = f"{least}" if least == most else f"at least {least}"
            besides = " besides its base" if slice.base else ""
            self.wrong(
                slice.line, f"{self.method.name} needs {wanted} model(s){besides}, not {count}."
            )

    def parameters(self, module: Module, slice: Slice) -> None:
        """Is every required parameter given wherever it is needed?"""
        levels = (slice.parameters, module.parameters, self.recipe.parameters)
        common = {name for level in levels for name, values in level.items() if values}
        for parameter in self.method.parameters:
            name = parameter.name
            if not parameter.required or name in common:
                continue
            if not parameter.per_model:
                self.wrong(slice.line, f"{self.method.name} needs '{name}'.")
                continue
            for source in slice.experts:
                if not source.parameters.get(name):
                    self.wrong(
                        source.line, f"{self.method.name} needs '{name}' for {source.model}."
                    )


def _quoted(value: Any) -> str:
    return f"'{value}'" if isinstance(value, str) else repr(value)
