"""Checkpoints on disk: safetensors headers, shards and element ranges, all checked as untrusted.

A header is 8 bytes (little-endian length), then JSON naming each tensor's dtype, shape and byte
range (https://github.com/huggingface/safetensors, format description)."""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mergelab.errors import Problems, UserError

MAX_HEADER = 100_000_000
MOST_DIMENSIONS = 64  # as numpy
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TOKENIZER = re.compile(
    r"(tokenizer.*\.json|tokenizer\.model|vocab\.json|merges\.txt|special_tokens_map\.json"
    r"|added_tokens\.json|chat_template.*|generation_config\.json|vocab\.txt|spiece\.model"
    r"|sentencepiece.*\.model|.*\.tiktoken|preprocessor_config\.json|processor_config\.json)\Z"
)
FLOATS = ("F64", "F32", "F16", "BF16")
BITS = {  # safetensors dtype -> numpy dtype that holds its bits
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "u1",
}
NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
DTYPES = {name: code for code, name in NAMES.items()}


@dataclass(frozen=True)
class Tensor:
    """Where one tensor's bytes are: `offset` from the start of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.size * np.dtype(BITS[self.dtype]).itemsize

    def bits(self) -> np.ndarray[Any, Any]:
        """All elements, flat and unread: a memory map in the dtype that holds the bits."""
        if not self.size:
            return np.empty(0, BITS[self.dtype])
        return np.memmap(self.file, BITS[self.dtype], "r", self.offset, (self.size,))

    def floats(self, start: int, stop: int, work: str = "<f4") -> np.ndarray[Any, Any]:
        """Elements [start, stop) as float32 (or float64); exact for the narrower formats."""
        return to_float(self.bits()[start:stop], self.dtype, work)


def to_float(bits: np.ndarray[Any, Any], dtype: str, work: str = "<f4") -> np.ndarray[Any, Any]:
    """Stored bits as floats of the working dtype. bfloat16 is the upper half of a float32."""
    if dtype == "BF16":
        wide = bits.astype("<u4")
        np.left_shift(wide, 16, out=wide)
        return wide.view("<f4").astype(work, copy=False)
    return bits.astype(work)


def from_float(values: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    """Round once to the storage format (to nearest, ties to even); overflow gives infinity."""
    if dtype == "BF16":
        bits = _to_odd(values).view("<u4")
        odd = (bits >> 16) & 1
        rounded = ((bits + np.uint32(0x7FFF) + odd) >> 16).astype("<u2")
        quiet = ((bits >> 16) | 0x40).astype("<u2")
        return np.where(np.isnan(values), quiet, rounded).astype("<u2")
    with np.errstate(over="ignore"):
        return values.astype(BITS[dtype])


def _to_odd(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """float32 for a second rounding: inexact float64 values get an odd last bit (toward zero).

    Rounding that to bfloat16 equals rounding once (Boldo and Melquiond 2008)."""
    single = np.ascontiguousarray(values, "<f4")
    if values.dtype == single.dtype:
        return single
    bits = single.view("<u4")
    bits -= np.abs(single) > np.abs(values)
    bits |= (single != values) & ~np.isnan(values)
    return bits.view("<f4")


def count_not_finite(bits: np.ndarray[Any, Any], dtype: str) -> int:
    """How many stored entries are infinite or NaN."""
    if dtype != "BF16":
        return int(np.count_nonzero(~np.isfinite(bits)))
    full = 0x7F80  # the bits of the exponent; the largest finite entries of both signs are below
    if not bits.size or (bits.max() < 0x8000 | full and bits.view("<i2").max() < full):
        return 0
    return int(np.count_nonzero((bits & np.uint16(full)) == full))


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, every size and offset checked against the file.

    Raises UserError naming the file and what is wrong with it (C8)."""
    try:
        length_of_file = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 0 < length <= min(MAX_HEADER, length_of_file - 8):
                raise UserError(_broken(file, "its header does not fit in the file"))
            header = json.loads(stream.read(length))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError):
        raise UserError(_broken(file, "its header is not JSON")) from None
    if not isinstance(header, dict):
        raise UserError(_broken(file, "its header is not a JSON object"))
    header.pop("__metadata__", None)
    start = 8 + length
    tensors = {n: _entry(file, n, entry, start) for n, entry in header.items()}
    _check_layout(file, list(tensors.values()), start, length_of_file)
    return tensors


def _broken(file: Path, why: str) -> str:
    return f"{file}: not a whole safetensors file: {why}. Download or copy it again."


def _entry(file: Path, name: str, entry: Any, start: int) -> Tensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
    except (TypeError, KeyError, ValueError):
        raise UserError(_broken(file, f"tensor {name!r} lacks dtype, shape or offsets")) from None
    if not name.isprintable():
        raise UserError(_broken(file, f"no tensor can be called {name[:80]!r}"))
    sound = len(numbers) <= MOST_DIMENSIONS + 2
    if not sound or not all(type(n) is int and 0 <= n < 1 << 60 for n in numbers):
        raise UserError(_broken(file, f"tensor {name!r} has impossible sizes"))
    if not isinstance(dtype, str) or dtype not in BITS:
        raise UserError(
            f"{file}: tensor {name!r} is stored as {str(dtype)[:20]!r}, which cannot be merged. "
            "Convert the model to bfloat16, float16 or float32 first."
        )
    tensor = Tensor(name, dtype, tuple(shape), file, start + begin)
    if end - begin != tensor.nbytes:
        raise UserError(_broken(file, f"tensor {name!r} has {end - begin} bytes, its shape needs "
                                f"{tensor.nbytes}"))  # fmt: skip
    return tensor


def _check_layout(file: Path, tensors: list[Tensor], start: int, length: int) -> None:
    position = start
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != position:
            raise UserError(_broken(file, f"tensor {tensor.name!r} overlaps or leaves a gap"))
        position += tensor.nbytes
    if position != length:
        raise UserError(
            _broken(
                file, f"it has {length:,} bytes, its header describes {position:,} (truncated?)"
            )
        )


@dataclass(frozen=True)
class Checkpoint:
    """A model folder: config and tensors. `label` is its name in messages.

    A raw checkpoint has an empty config; if it is one file and no folder of its own, `file` is it.
    `extra` names further input files whose hashes belong to the record (those of an adapter)."""

    label: str
    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    extra: tuple[Path, ...] = ()
    file: Path | None = None

    @property
    def place(self) -> Path:
        """What belongs to this model alone, and no merge may overwrite: its folder, or its file."""
        return self.file or self.folder

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the weight files, sorted."""
        return tuple(sorted({t.file.name for t in self.tensors.values()}))

    @property
    def tokenizer_files(self) -> tuple[str, ...]:
        """Names of tokenizer, chat template and generation files that travel with a merge."""
        if self.file:
            return ()
        names = (p.name for p in self.folder.iterdir() if p.is_file())
        return tuple(sorted(name for name in names if TOKENIZER.match(name)))

    @cached_property
    def stacks(self) -> dict[str, int]:
        """Name prefix of every list of layers, such as 'model.layers', and their number."""
        found: dict[str, set[int]] = {}
        for name in self.tensors:
            prefix, index, _ = split_layer(name)
            if index is not None:
                found.setdefault(prefix, set()).add(index)
        return {prefix: len(found[prefix]) for prefix in sorted(found)}

    @property
    def depth(self) -> int | None:
        """Number of layers of the (text) decoder as the config has it, if it does."""
        text = self.config.get("text_config")
        for facts in (self.config, text if isinstance(text, dict) else {}):
            found = facts.get("num_hidden_layers", facts.get("n_layer"))
            if found is not None:
                return found if isinstance(found, int) else None
        return None

    @cached_property
    def _counted(self) -> list[str]:
        """The stacks with as many layers as the config says."""
        return [prefix for prefix, count in self.stacks.items() if count == self.depth]

    @property
    def knows_its_stack(self) -> bool:
        """Does the config tell exactly one stack from the others?"""
        return len(self._counted) == 1

    @cached_property
    def stack(self) -> str | None:
        """Name prefix of the decoder's layers, such as 'model.layers'; None without layers."""
        largest = sorted(self.stacks, key=lambda prefix: -self.stacks[prefix])
        return next(iter([*self._counted, *largest]), None)

    @cached_property
    def layers(self) -> int:
        """Number of layers of the stack: one more than the highest index in the headers."""
        found = {i for p, i, _ in map(split_layer, self.tensors) if p == self.stack}
        return max((i + 1 for i in found if i is not None), default=0)

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Token to id, from tokenizer.json; empty where the model has none."""
        path = self.folder / "tokenizer.json"
        if self.file or not path.is_file():
            return {}
        data = _json_object(path)
        try:
            vocab = data["model"]["vocab"]
            if isinstance(vocab, list):  # unigram: [[token, score], ...]
                vocab = {entry[0]: i for i, entry in enumerate(vocab)}
            added = {t["content"]: t["id"] for t in data.get("added_tokens") or ()}
            return {str(token): int(i) for token, i in {**vocab, **added}.items()}
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            raise UserError(
                f"model {self.label}: {path} is not in the format of the tokenizers library. "
                "Download or copy it again, or remove it to merge without a tokenizer."
            ) from None


def split_layer(name: str) -> tuple[str, int | None, str]:
    """'model.layers.7.mlp.w' -> ('model.layers', 7, 'mlp.w'); the first number counts."""
    match = re.match(r"(.*?)\.(\d{1,6})\.(.*)\Z", name, re.DOTALL)
    return (match[1], int(match[2]), match[3]) if match else (name, None, "")


def open_checkpoint(folder: Path, label: str) -> Checkpoint:
    """Read config and headers of a model folder, or of one .safetensors file; no weight is read.

    A folder without config.json is a raw checkpoint if it holds one weight file or an index.
    Raises UserError for a missing folder or shard, an index that leaves the folder, and every
    defect that `read_header` finds, all shards at once."""
    try:
        return _open(folder, label)
    except OSError as error:
        raise UserError(
            f"model {label}: {error.filename or folder}: {error.strerror}. Check the path and its "
            "permissions."
        ) from None


def _open(folder: Path, label: str) -> Checkpoint:
    if folder.is_file():
        tensors = _tensors(folder.parent, label, folder.name)
        return Checkpoint(label, folder.parent, {}, tensors, file=folder)
    if not folder.is_dir():
        raise UserError(f"model {label}: there is no folder {folder}. Check the name or the path.")
    config = folder / "config.json"
    facts = _json_object(config) if config.is_file() else {}
    if facts.get("quantization_config"):
        raise UserError(
            f"model {label}: is quantised (quantization_config in {config}); packed weights cannot "
            "be merged. Use the unquantised model."
        )
    return Checkpoint(label, folder, facts, _tensors(folder, label))


def _tensors(folder: Path, label: str, file: str | None = None) -> dict[str, Tensor]:
    """Every tensor of `file`, or of a model folder, from the file that the index names for it."""
    index = folder / INDEX
    where = _index(index, label) if index.is_file() and not file else None
    names = sorted(set(where.values())) if where else [file or _single(folder, label)]
    if where and SINGLE not in names and (folder / SINGLE).is_file():
        raise UserError(
            f"model {label}: {folder} holds {SINGLE} and the shards of {INDEX}, two sets of "
            "weights, and transformers would load the first. Move away what is not the model's."
        )
    problems, found = Problems(), dict[str, Tensor]()
    for name in names:
        try:
            header = read_header(folder / name)
        except UserError as error:
            problems.add(f"model {label}: {error}")
            continue
        for tensor in header.values():
            if where is not None and where.get(tensor.name) != name:
                problems.add(f"model {label}: {index} does not name {tensor.name} in {name}.")
        found |= header
    for tensor_name in (where or {}).keys() - found.keys() if not problems.found else ():
        problems.add(f"model {label}: {index} names {tensor_name}, but no file has it.")
    problems.raise_if_any()
    if not found:
        place = folder / (file or "")
        raise UserError(f"model {label}: {place} holds no tensors. Is the download complete?")
    return found


def _single(folder: Path, label: str) -> str:
    """Name of a folder's only weight file; without a config (a raw checkpoint) any name will do."""
    if (folder / SINGLE).is_file():
        return SINGLE
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"model {label}: {folder} is an adapter. Write the model that it was trained on before "
            f"it: MODEL+{label}."
        )
    raw = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(raw) == 1 and not (folder / "config.json").is_file():
        return raw[0]
    if any(folder.glob("*.bin")):
        raise UserError(
            f"model {label}: {folder} holds only .bin (pickle) weights, which are never loaded. "
            "Convert them to safetensors."
        )
    raise UserError(f"model {label}: {folder} holds neither {SINGLE} nor {INDEX}.")


def _index(index: Path, label: str) -> dict[str, str]:
    """The index's map from tensor to file name; no name may leave the folder."""
    names = _json_object(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
        raise UserError(f"{index}: has no weight_map of file names.")
    for name in sorted(set(names.values())):
        plain = name == Path(name).name and name not in ("", ".", "..") and len(name) < 200
        if not plain or "\\" in name or not name.isprintable():
            raise UserError(
                f"{index}: names a file outside the model's folder: {name[:80]!r}. "
                "Do not trust this model; download it again from its source."
            )
    missing = [n for n in sorted(set(names.values())) if not (index.parent / n).is_file()]
    if missing:
        raise UserError(f"model {label}: {index} names {', '.join(missing)}: no such file.")
    return names


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not readable JSON: {error}.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: is not a JSON object.")
    return value
