"""Records: what happened, with hashes of everything, written last and atomically."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import secrets
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mergelab.errors import UserError

PACKAGES = (
    "mergelab",
    "numpy",
    "numba",
    "torch",
    "transformers",
    "safetensors",
    "lm-eval",
    "datasets",
)
PIECE = 1 << 18  # bytes
KEYED = re.compile(r"(.+)\.[0-9a-f]{12}\.json")


def file_sha256(path: Path, advance: Callable[[int], None] | None = None) -> str:
    """sha256 of a file, in pieces that stay in the cache; `advance` is told the bytes of each."""
    digest = hashlib.sha256()
    piece = memoryview(bytearray(PIECE))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(piece[:count])
            if advance:
                advance(count)
    return digest.hexdigest()


def file_entries(folder: Path, names: Iterable[str]) -> list[dict[str, Any]]:
    """Name, size in bytes and sha256 of files of a folder, sorted by name."""
    return [
        {
            "name": name,
            "bytes": (folder / name).stat().st_size,
            "sha256": file_sha256(folder / name),
        }
        for name in sorted(names)
    ]


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values, equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    return hashlib.sha256(canonical(value).encode(errors="backslashreplace")).hexdigest()


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that it is either whole or not there: temporary file, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON (sorted keys, one-space indent, final newline) atomically."""
    text = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    write_bytes(path, (text + "\n").encode(errors="backslashreplace"))


def read_json(path: Path, remedy: str, shape: Any = object) -> Any:
    """The contents of a JSON file, or None if there is no such file.

    UserError with the command that remakes it if the file is cut, not UTF-8, not JSON, or not of
    the `shape` that `mismatch` explains."""
    return parse_json(path.read_bytes(), path, remedy, shape) if path.is_file() else None


def parse_json(data: bytes, path: Path, remedy: str, shape: Any = object, where: str = "") -> Any:
    """JSON from `data`, which is `path` or the part of it that `where` names; else UserError."""
    try:
        value = json.loads(data.decode(), parse_constant=_no_number)
        why = mismatch(value, shape)
    except (ValueError, RecursionError) as error:
        why = str(error) or type(error).__name__
    if why:
        raise UserError(f"{path}: is damaged ({where}{why}). Run: {remedy}")
    return value


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")


def mismatch(value: Any, shape: Any, name: str = "") -> str:
    """What of a JSON value is not as in `shape`, in words, or nothing.

    A shape is a type; a mapping of the keys that must be there ('key?': may be, '*': each one)
    to shapes; [shape] for a list of any length; [shape, shape] for a list of this length; a tuple
    (shape, None) also allows null."""
    if isinstance(shape, tuple):
        return "" if value is None else mismatch(value, shape[0], name)
    if not isinstance(shape, dict | list):
        return "" if isinstance(value, shape) else f"{name or 'the whole'} has the wrong type"
    if not isinstance(value, type(shape)):
        kind = "an object" if isinstance(shape, dict) else "a list"
        return f"{name or 'the whole'} is not {kind}"
    if isinstance(shape, list):
        if len(shape) > 1 and len(shape) != len(value):
            return f"{name or 'the whole'} has {len(value)} entries, not {len(shape)}"
        inner = [(f"{name}[{i}]", part, shape[0]) for i, part in enumerate(value)]
        return next((why for n, part, s in inner if (why := mismatch(part, s, n))), "")
    for key, part in shape.items():
        for at in value if key == "*" else [key.removesuffix("?")]:
            told = f"{name}.{at}" if name else str(at)
            if at not in value:
                if key.endswith("?"):
                    continue
                return f"{told} is missing"
            if why := mismatch(value[at], part, told):
                return why
    return ""


def write_record(path: Path, value: Any) -> None:
    """Write a record; one named NAME.<12-hex key>.json replaces those of NAME under other keys."""
    write_json(path, value)
    keyed = KEYED.fullmatch(path.name)
    if keyed:
        forget(path.parent, keyed[1], but=path)


def forget(folder: Path, name: str, but: Path | None = None) -> None:
    """Delete the records NAME.<12-hex key>.json of a folder, all but one."""
    for path in folder.iterdir() if folder.is_dir() else ():
        keyed = KEYED.fullmatch(path.name)
        if keyed and keyed[1] == name and path != but:
            path.unlink(missing_ok=True)


def packages() -> dict[str, str]:
    """Versions of the packages that can reach a result."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def machine() -> dict[str, Any]:
    """Where it ran: processor, cores, system and Python; no host name, no user."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
