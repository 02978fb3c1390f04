"""Published numbers: the digits as they stand, a fraction or a percentage?"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import yaml

LONGEST = 60  # characters of a cell that may be a number
PERCENT_ABOVE = 1.5  # a table with a higher accuracy is in percent
# Metrics in units of their own: neither a share of items nor a percentage of them.
OWN_UNITS = re.compile(
    r"eqbench|eq_bench|mt_?bench|perplexity|\bppl\b|bits_per_byte|\bbpb\b|nll|loss|\belo\b", re.I
)
_MARKS = re.compile(
    r"\*+|~~|`|</?(?:b|strong|i|em|u|span|sup|sub)\b[^<>]{0,80}>|(?<!\w)_+|_+(?!\w)"
)
_NUMBER = re.compile(
    r"([+-]?(?:\d{1,12}(?:\.\d{0,25})?|\.\d{1,25})(?:[eE][+-]?\d{1,3})?)\s*(%?)"
    r"\s*(?:(?:±|\+/?-|\\pm|\(|\[|↑|↓|🔺|🔻|←|→|†|‡|-+>).{0,40})?\Z"
)


@dataclass(frozen=True)
class Printed:
    """A number as published: its `text` without marks, and whether a % stood there."""

    text: str
    value: float
    percent: bool = False


class Digits(float):
    """A float of a YAML or JSON file that keeps the digits it was written with."""

    text: str

    def __new__(cls, text: str) -> Digits:
        number = super().__new__(cls, text.replace("_", ""))
        number.text = text
        return number


class PlainLoader(yaml.SafeLoader):
    """Safe YAML whose floats keep their digits, whose dates are text, whose integers are short."""


def _float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
    text = loader.construct_scalar(node)
    return Digits(text) if _NUMBER.match(text) else loader.construct_yaml_float(node)


def _text(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
    return loader.construct_scalar(node)


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
    if len(node.value) > LONGEST:
        raise ValueError("too long")
    return loader.construct_yaml_int(node)


PlainLoader.add_constructor("tag:yaml.org,2002:float", _float)
PlainLoader.add_constructor("tag:yaml.org,2002:int", _integer)
PlainLoader.add_constructor("tag:yaml.org,2002:timestamp", _text)


def read_number(value: Any) -> Printed | None:
    """The number that a cell or a field holds, or None if it holds none.

    Bold, code, arrows and "± stderr" around it are left out; NaN and infinity are no numbers."""
    if isinstance(value, Digits):
        return Printed(value.text, float(value))
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and len(value) > 4 * LONGEST:
        return None
    text = _MARKS.sub("", value).strip() if isinstance(value, str) else str(value)
    match = _NUMBER.match(text) if len(text) <= LONGEST else None
    if match is None:
        return None
    number = float(match[1])
    return Printed(match[1], number, bool(match[2])) if math.isfinite(number) else None


def in_percent(numbers: Iterable[Printed]) -> bool:
    """Are these accuracies percentages? Yes if one is written with %, or is above 1.5."""
    return any(number.percent or number.value > PERCENT_ABOVE for number in numbers)
