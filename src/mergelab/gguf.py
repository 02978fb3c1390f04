"""GGUF files, unpacked into an ordinary model folder.

transformers undoes llama.cpp's renaming and its permutation of the rows of q and k; what it loads
says of itself that it is quantised and cannot be saved, so the weights move to a model made anew
from the same configuration. Arithmetic: gguf's dequantisation, then one rounding to `dtype`."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

from mergelab.errors import UserError
from mergelab.folders import alone, building
from mergelab.progress import say
from mergelab.record import file_entries, file_sha256, packages, write_json

VERSION = 1
SOURCE = "source.json"
MAGIC = b"GGUF"


def dequantise(file: Path, sha256: str, out: Path, dtype: str | None = None) -> dict[str, Any]:
    """Unpack the GGUF `file` into the folder `out`; `dtype` is bfloat16 unless given.

    Returns what the record says. Does nothing if `out` was made from the same bytes, dtype and
    versions. Raises UserError if the file is missing, is not the pinned one, or is of a kind that
    transformers cannot read; then `out` is as it was before."""
    source = {
        "gguf": {"name": file.name, "sha256": sha256},
        "dtype": dtype or "bfloat16",
        "version": VERSION,
        "packages": {name: packages()[name] for name in ("torch", "transformers")},
    }
    with alone(out):
        if not _is_made_from(source, out):
            check_pinned(file, sha256)
            say(f"unpacking {file.name} to {out} as {source['dtype']}")
            with building(out, "gguf") as folder:
                _convert(file, folder, str(source["dtype"]))
                write_json(folder / SOURCE, source)
    names = [path.name for path in out.iterdir() if path.name != SOURCE]
    return {**source, "files": file_entries(out, names)}


def check_pinned(file: Path, sha256: str) -> None:
    """Raise UserError unless `file` is a GGUF file with this sha256."""
    if not file.is_file():
        raise UserError(f"{file}: no such file. Correct the path of the gguf model.")
    found = file_sha256(file)
    if found != sha256:
        raise UserError(
            f"{file}: has sha256 {found}, and the study pins {sha256}. "
            "Get the right file, or pin this one if you trust it."
        )
    with file.open("rb") as head:
        if head.read(4) != MAGIC:
            raise UserError(f"{file}: is no GGUF file.")


def _is_made_from(source: dict[str, Any], out: Path) -> bool:
    try:
        noted = json.loads((out / SOURCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(noted == source)


def _convert(file: Path, out: Path, dtype: str) -> None:
    """Write model and tokenizer of a GGUF file as safetensors, config.json and tokenizer files."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()
    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
        packed, loading = AutoModelForCausalLM.from_pretrained(
            file.parent,
            **where,
            dtype=getattr(torch, dtype),
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
    except (ValueError, NotImplementedError, LookupError, OverflowError, struct.error) as error:
        raise UserError(
            f"{file}: transformers cannot read this GGUF file ({type(error).__name__}: {error}). "
            "Use a file of a supported architecture, or the model's safetensors."
        ) from error
    _check_complete(file, loading)
    _dense(packed).save_pretrained(out)
    tokenizer.save_pretrained(out)
    for weights in out.glob("*.safetensors"):
        weights.chmod((out / "config.json").stat().st_mode)  # they are written for the owner only


def _check_complete(file: Path, loading: dict[str, Any]) -> None:
    """transformers fills missing weights with random numbers: refuse."""
    wrong = {key: sorted(map(str, loading[key])) for key in sorted(loading) if loading[key]}
    if wrong:
        raise UserError(
            f"{file}: its tensors do not fit its configuration ({wrong}). "
            "Use another file of this model, or its safetensors."
        )


def _dense(packed: Any) -> Any:
    """The same weights in a model that does not think it is quantised."""
    import torch

    config = packed.config
    for name in ("quantization_config", "_name_or_path"):
        if hasattr(config, name):
            delattr(config, name)
    with torch.device("meta"):
        dense = type(packed)(config)
    dense.load_state_dict(packed.state_dict(), strict=True, assign=True)
    dense.tie_weights()
    return dense
