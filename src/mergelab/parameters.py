"""Parameter values of a recipe: scalars, gradients over layers, filters; reading and resolving."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from mergelab.errors import nearest
from mergelab.methods import METHODS
from mergelab.methods.base import Method, Parameter
from mergelab.yamlfile import Map, Reader, Seq, as_number

INERT = "int8_mask"  # has no effect on any result, so any method may have it
Scalar = float | bool | str
Value = Scalar | tuple[Scalar, ...]


@dataclass(frozen=True)
class Setting:
    """One value of a parameter, or a gradient over the layers of its slice.

    `filter` restricts it to tensors whose name contains that text; None means all."""

    value: Value
    filter: str | None

    def at(self, position: float) -> Scalar:
        """The value at position 0 to 1: numbers are interpolated, flags and texts picked."""
        if not isinstance(self.value, tuple):
            return self.value
        place = position * (len(self.value) - 1)
        low = math.floor(place)
        high = min(low + 1, len(self.value) - 1)
        before, after = self.value[low], self.value[high]
        if isinstance(before, bool | str) or isinstance(after, bool | str):
            return before
        share = place - low
        return (1 - share) * before + share * after


Settings = dict[str, tuple[Setting, ...]]


def first_match(settings: Iterable[Setting], tensor: str) -> Setting | None:
    """The first setting whose filter is part of the tensor's name, if there is one."""
    return next((s for s in settings if s.filter is None or s.filter in tensor), None)


def resolve(
    parameter: Parameter, levels: Iterable[Settings], tensor: str, position: float
) -> Scalar | None:
    """Value of a parameter for a tensor: the first level with a setting whose filter matches.

    `position` is 0 to 1 within the slice (0 outside layers); else the default. A gradient of
    integers may give a fraction, which stays a float."""
    for level in levels:
        setting = first_match(level.get(parameter.name, ()), tensor)
        if setting is None:
            continue
        value = setting.at(position)
        if parameter.kind == "integer" and isinstance(value, float) and value.is_integer():
            return int(value)
        return value
    return parameter.default


class ParameterReader(Reader):
    """Reads the parameters of `method`, noting every mistake with file and line."""

    method: Method | None = None

    def parameters(self, map: Map, *, of_model: bool = False) -> Settings:
        """The settings of a 'parameters' mapping, by name; `of_model`: it stands beside one."""
        found: Settings = {}
        for name, value in map.items() if self.method else ():
            assert self.method is not None
            parameter, line = self.method.parameter(name), map.lines[name]
            if parameter is None and name == INERT:
                continue
            if parameter is None:
                self.unknown(line, name, self.method)
            elif of_model and not parameter.per_model:
                self.wrong(
                    line,
                    f"'{name}' belongs to the whole merge, not to one model: move it to the "
                    "recipe's 'parameters'.",
                )
            else:
                found[name] = tuple(
                    self.settings(value, name, line, partial(self.value, parameter))
                )
        return found

    def unknown(self, line: int, name: str, method: Method) -> None:
        hint = nearest(name, (p.name for p in method.parameters))
        if not hint and any(other.parameter(name) for other in METHODS.values()):
            hint = " It belongs to other methods, and mergekit ignores it here: remove it."
        takes = ", ".join(describe(p) for p in method.parameters)
        self.wrong(
            line,
            f"{method.name} has no parameter '{name}'.{hint}\n"
            f"  {method.name} takes: {takes}.   More: mergelab explain {method.name}",
        )

    def settings(
        self, value: Any, name: str, line: int, parse: Callable[[Any, int], Value]
    ) -> Iterator[Setting]:
        """What `parse` makes of a value, or of each of a list of {filter, value}."""
        if isinstance(value, Map):
            value = [value]
        if isinstance(value, Seq | list) and any(isinstance(v, Map) for v in value):
            for entry in value:
                if isinstance(entry, Map):
                    self.keys(entry, ("filter", "value"), f"an entry of '{name}'")
                if not isinstance(entry, Map) or "value" not in entry:
                    at = entry.line if isinstance(entry, Map) else line
                    self.wrong(at, f"each entry of '{name}' needs a 'value'.")
                    continue
                pattern = self.get(entry, "filter", str, None)
                parsed = parse(entry["value"], entry.lines["value"])
                yield Setting(parsed, None if pattern in (None, "", "*") else pattern)
        elif value is not None and value != []:
            yield Setting(parse(value, line), None)

    def value(self, parameter: Parameter, value: Any, line: int) -> Value:
        """A scalar, or a list with one entry or more."""
        if isinstance(value, list) and value:
            return tuple(self.scalar(parameter, entry, line) for entry in value)
        return self.scalar(parameter, value, line)

    def scalar(self, parameter: Parameter, value: Any, line: int) -> Scalar:
        if parameter.kind == "flag":
            if isinstance(value, bool) or value in (0, 1):
                return bool(value)
            if isinstance(value, str) and value.lower() in ("true", "false"):
                return value.lower() == "true"
            self.wrong(line, f"'{parameter.name}' must be true or false, not {value!r}.")
            return False
        if parameter.kind == "choice":
            return self.choice(parameter, value, line)
        return self.numeric(parameter, value, line)

    def choice(self, parameter: Parameter, value: Any, line: int) -> str:
        """One of the parameter's choices, or what stands for one."""
        if isinstance(value, str) and value in parameter.choices:
            return value
        aliases = parameter.aliases or {}
        if isinstance(value, bool | int | float | str) and value in aliases:
            return aliases[value]
        known = ", ".join((*parameter.choices, *(str(a).lower() for a in aliases)))
        hint = nearest(str(value), parameter.choices)
        self.wrong(line, f"'{parameter.name}' must be one of {known}, not {value!r}.{hint}")
        return ""

    def numeric(self, parameter: Parameter, value: Any, line: int) -> float:
        number, name = as_number(value), parameter.name
        if number is None:
            self.wrong(line, f"'{name}' must be a number, not {value!r}.")
            return 0.0
        if parameter.kind == "integer" and not number.is_integer():
            self.wrong(line, f"'{name}' must be an integer, not {value!r}.")
        low, high = parameter.low, parameter.high
        if (low is not None and number < low) or (high is not None and number > high):
            verb = "be" if low is None or high is None else "lie in"
            self.wrong(line, f"'{name}' must {verb} {bounds(parameter)}, not {number:g}.")
        return number


def bounds(parameter: Parameter) -> str:
    """'0 to 1', '0 or more', 'at most 1' or nothing."""
    low, high = parameter.low, parameter.high
    if low is None:
        return "" if high is None else f"at most {high:g}"
    return f"{low:g} or more" if high is None else f"{low:g} to {high:g}"


def describe(parameter: Parameter) -> str:
    """'density (per model, 0 to 1)'."""
    notes = ["per model"] if parameter.per_model else []
    if limits := bounds(parameter):
        notes.append(limits)
    if parameter.choices:
        notes.append(" or ".join(parameter.choices))
    return f"{parameter.name} ({', '.join(notes)})" if notes else parameter.name
