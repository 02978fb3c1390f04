"""YAML as untrusted input: plain data that remembers its lines; limits stop YAML bombs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from mergelab.errors import Problems, UserError, nearest

MAX_BYTES = 1_000_000
MAX_NODES = 100_000
MAX_DEPTH = 40
MERGE = "tag:yaml.org,2002:merge"
REQUIRED: Any = object()


class Map(dict[str, Any]):
    """A YAML mapping; `line` is where it starts, `lines` where each key stands (1-based)."""

    line: int = 1
    lines: dict[str, int]


class Seq(list[Any]):
    """A YAML sequence; `lines` holds the line of each element."""

    line: int = 1
    lines: list[int]


def load(path: Path) -> Map:
    """Read a YAML file whose top level is a mapping. Raises as `read` and `parse` do."""
    return parse(read(path), path)


def read(path: Path) -> str:
    """The text of a file, line ends untouched.

    Raises UserError if it is missing, unreadable, not UTF-8, or larger than 1 MB."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise UserError(f"{path}: larger than {MAX_BYTES:,} bytes, too large for a recipe.")
        return data.decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Check the path.") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, not a YAML file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from None


def parse(text: str, path: Path, loader_of: type[yaml.SafeLoader] = yaml.SafeLoader) -> Map:
    """Parse YAML text; `path` only serves the messages, `loader_of` makes the scalars.

    Raises UserError if it is no YAML, nested deeper than 40 levels, expands to more than 100,000
    nodes (a YAML bomb), or repeats a key. Tags make no objects: only plain data comes out."""
    try:
        loader = loader_of(text)
        node = loader.get_single_node()
        if node is None:
            raise UserError(f"{path}: is empty.")
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{path}:1: the top level must be a mapping (key: value).")
        value = _Builder(loader, path).build(node, 0)
    except yaml.YAMLError as error:
        raise UserError(_syntax_error(path, error)) from None
    except RecursionError:
        raise UserError(f"{path}: nested deeper than {MAX_DEPTH} levels.") from None
    assert isinstance(value, Map)
    return value


def _syntax_error(path: Path, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"{path}:{mark.line + 1}" if mark else str(path)
    what = getattr(error, "problem", None) or str(error).splitlines()[0]
    if "another document" in what:
        return (
            f"{where}: a second document begins here. Write a file for each (a recipe names "
            "another one of its folder as recipe:NAME)."
        )
    return f"{where}: not valid YAML: {what}."


class _Builder:
    """Turns YAML nodes into Map, Seq and scalars, counting every node that aliases expand to."""

    def __init__(self, loader: yaml.SafeLoader, path: Path) -> None:
        self.loader, self.path, self.nodes = loader, path, 0

    def build(self, node: yaml.Node, depth: int) -> Any:
        self.nodes += 1
        line = node.start_mark.line + 1
        if self.nodes > MAX_NODES:
            raise UserError(
                f"{self.path}:{line}: its aliases expand to more than {MAX_NODES:,} nodes "
                "(a YAML bomb). Write the values out."
            )
        if depth > MAX_DEPTH:
            raise UserError(f"{self.path}:{line}: nested deeper than {MAX_DEPTH} levels.")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, depth)
        if isinstance(node, yaml.SequenceNode):
            seq = Seq(self.build(child, depth + 1) for child in node.value)
            seq.line, seq.lines = line, [child.start_mark.line + 1 for child in node.value]
            return seq
        return self.scalar(node)

    def scalar(self, node: yaml.Node) -> Any:
        try:
            return self.loader.construct_object(node)
        except (ValueError, OverflowError, TypeError, LookupError, AttributeError):
            line = node.start_mark.line + 1
            raise UserError(
                f"{self.path}:{line}: {str(node.value)[:40]!r} is not a value of its type. "
                "Write it between quotes if it is text."
            ) from None

    def _mapping(self, node: yaml.MappingNode, depth: int) -> Map:
        result = Map()
        result.line, result.lines = node.start_mark.line + 1, {}
        inherited: dict[str, Any] = {}
        for key, child in node.value:
            if key.tag == MERGE:
                self._inherit(child, depth, inherited)
                continue
            name = self.scalar(key) if isinstance(key, yaml.ScalarNode) else None
            name = name if isinstance(name, str) else str(key.value)[:80]
            if name in result:
                line = key.start_mark.line + 1
                raise UserError(f"{self.path}:{line}: the key '{name}' is given twice.")
            result[name] = self.build(child, depth + 1)
            result.lines[name] = key.start_mark.line + 1
        for name, value in inherited.items():
            if name not in result:
                result[name], result.lines[name] = value, result.line
        return result

    def _inherit(self, node: yaml.Node, depth: int, into: dict[str, Any]) -> None:
        """The keys of `<<: *anchor` or `<<: [*one, *two]`; the first to give a key wins."""
        for source in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            built = self.build(source, depth + 1)
            if not isinstance(built, Map):
                line = source.start_mark.line + 1
                raise UserError(f"{self.path}:{line}: '<<' needs a mapping (key: value).")
            for name, value in built.items():
                into.setdefault(name, value)


class Reader:
    """Takes typed values out of a Map, noting every mistake with file and line."""

    def __init__(self, path: Path, problems: Problems | None = None) -> None:
        self.path = path
        self.problems = problems or Problems()

    def wrong(self, line: int, text: str) -> None:
        """Note a mistake at a line."""
        self.problems.add(f"{self.path}:{line}: {text}")

    def keys(self, map: Map, known: Iterable[str], what: str) -> None:
        """Note every key of `map` that is not known, with the nearest right one."""
        known = list(known)
        takes = f"\n  {what} takes: {', '.join(known)}."
        for key in [key for key in map if key not in known]:
            hint = nearest(key, known)
            self.wrong(map.lines[key], f"{what} has no key '{key}'.{hint}{takes}")
            takes = ""

    def get(self, map: Map, key: str, kind: type | tuple[type, ...], default: Any) -> Any:
        """The value of a key if it has the type; else a mistake is noted and default returned."""
        value = map.get(key)
        if value is None:
            if default is REQUIRED:
                self.wrong(map.line, f"'{key}' is missing.")
                return None
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if (isinstance(value, bool) and bool not in kinds) or not isinstance(value, kinds):
            names = " or ".join(_NAMES.get(k, k.__name__) for k in kinds)
            self.wrong(map.lines[key], f"'{key}' must be {names}, not {value!r}.")
            return None if default is REQUIRED else default
        return value

    def text(self, map: Map, key: str, default: Any = REQUIRED) -> Any:
        """A string that is not empty."""
        value = self.get(map, key, str, default)
        if value == "" and key in map:
            self.wrong(map.lines[key], f"'{key}' is empty.")
        return value

    def number(self, map: Map, key: str, default: Any = REQUIRED) -> Any:
        """A finite float; '1e-5', which YAML 1.1 reads as text, counts as the number."""
        value = as_number(map.get(key))
        if map.get(key) is not None and value is None:
            self.wrong(map.lines[key], f"'{key}' must be a number, not {map[key]!r}.")
            return None if default is REQUIRED else default
        return self.get(map, key, (int, float, str), default) if value is None else value

    def count(self, map: Map, key: str, default: Any = REQUIRED, least: int = 0) -> Any:
        """An integer of at least `least`."""
        value = self.get(map, key, int, default)
        if isinstance(value, int) and value < least:
            self.wrong(map.lines.get(key, map.line), f"'{key}' must be at least {least}.")
        return value

    def map(self, map: Map, key: str, default: Any = REQUIRED) -> Map:
        """A mapping; missing or wrong gives an empty one."""
        value = self.get(map, key, Map, default)
        return value if isinstance(value, Map) else _empty(map)

    def seq(self, map: Map, key: str, default: Any = REQUIRED) -> Seq:
        """A list; missing or wrong gives an empty one."""
        value = self.get(map, key, Seq, default)
        if isinstance(value, Seq):
            return value
        empty = Seq()
        empty.line, empty.lines = map.line, []
        return empty

    def maps(self, map: Map, key: str, default: Any = REQUIRED) -> list[Map]:
        """A list of mappings."""
        seq = self.seq(map, key, default)
        for value, line in zip(seq, seq.lines, strict=True):
            if not isinstance(value, Map):
                self.wrong(line, f"each entry of '{key}' must be a mapping (key: value).")
        return [value for value in seq if isinstance(value, Map)]

    def texts(self, map: Map, key: str, default: Any = REQUIRED) -> tuple[str, ...]:
        """A list of strings."""
        seq = self.seq(map, key, default)
        for value, line in zip(seq, seq.lines, strict=True):
            if not isinstance(value, str):
                self.wrong(line, f"each entry of '{key}' must be text, not {value!r}.")
        return tuple(value for value in seq if isinstance(value, str))


_NAMES = {str: "text", int: "an integer", float: "a number", bool: "true or false"}
_NAMES |= {Map: "a mapping (key: value)", Seq: "a list"}


def _empty(parent: Map) -> Map:
    empty = Map()
    empty.line, empty.lines = parent.line, {}
    return empty


def as_number(value: Any) -> float | None:
    """A finite float from a number or its text, else None (booleans are no numbers)."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
