"""A model folder in memory, ready to score text: one loader for scores and evidence."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergelab.chatter import hushed
from mergelab.checkpoint import Checkpoint
from mergelab.errors import UserError
from mergelab.record import digest, file_sha256

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
LOGITS = 2**26  # elements of one batch's logits: 256 MB in float32
NO_MEMORY = re.compile(r"out of memory|not enough memory|allocate memory", re.I)
DEFAULT_LENGTH = 2048  # tokens, where neither config nor tokenizer says


@dataclass(frozen=True)
class Loaded:
    """A causal language model with its tokenizer; `dtype` as stored, `length` in tokens."""

    model: Any
    tokenizer: Any
    device: str
    dtype: str
    length: int


def model_hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """SHA-256 of config.json and every weight file, by file name."""
    names = ("config.json", *checkpoint.files)
    return {name: file_sha256(checkpoint.folder / name) for name in names}


def stored_dtype(checkpoint: Checkpoint) -> str:
    """The floating type that holds most elements of the weights."""
    elements: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        if tensor.dtype in DTYPES:
            elements[DTYPES[tensor.dtype]] += tensor.size
    if not elements:
        raise UserError(f"{checkpoint.folder}: no tensor is of type {', '.join(DTYPES)}.")
    return max(elements.items(), key=lambda entry: (entry[1], entry[0]))[0]


@contextmanager
def quiet(*, offline: bool) -> Iterator[None]:
    """No progress bars of other libraries, each of their warnings once (see chatter.hushed); with
    `offline`, they are kept off the network.

    The variables are read when those libraries are first imported, so enter this before."""
    names = {"TOKENIZERS_PARALLELISM": "false"}
    if offline:
        names |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        with hushed():
            yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def load(checkpoint: Checkpoint) -> Loaded:
    """Load a checkpoint's model in its stored dtype, on the GPU if there is one.

    safetensors only, no remote code. Raises UserError if weights are missing, or if transformers
    does not know the architecture."""
    import torch
    from transformers import AutoModelForCausalLM

    folder, dtype = checkpoint.folder, stored_dtype(checkpoint)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with _blamed(folder, "model"):
        model, info = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=getattr(torch, dtype),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    missing = sorted(info["missing_keys"]) + sorted(str(k) for k in info["mismatched_keys"])
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} weights are missing or of the wrong shape, as "
            f"'{missing[0]}'. Compare config.json with the weights, then make the model again."
        )
    tokenizer = load_tokenizer(folder)
    with _blamed(folder, "model"):
        model = model.to(device).eval()
    return Loaded(model, tokenizer, device, dtype, _length(model.config, tokenizer))


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer. Raises UserError if its files are missing or damaged."""
    from transformers import AutoTokenizer

    if not list(folder.glob("tokenizer*")) and not (folder / "vocab.json").is_file():
        raise UserError(f"{folder}: holds no tokenizer (tokenizer.json). Make the model again.")
    with _blamed(folder, "tokenizer"):
        return AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )


def chat_template(tokenizer: Any) -> str | None:
    """The template that the tokenizer writes chats by; None without one (or of several, none that
    is called default)."""
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:
        return None


def max_length(folder: Path, tokenizer: Any) -> int:
    """Tokens that the folder's model takes, without loading its weights."""
    from transformers import AutoConfig

    with _blamed(folder, "config.json"):
        config = AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    return _length(config, tokenizer)


@contextmanager
def _blamed(folder: Path, what: str) -> Iterator[None]:
    """Whatever transformers raises inside becomes a UserError: the files are a stranger's, but
    want of memory or of a package is not their fault."""
    try:
        yield
    except Exception as error:
        lines = (line.strip() for line in str(error).splitlines())
        said = next(filter(None, lines), type(error).__name__)
        if isinstance(error, MemoryError) or NO_MEMORY.search(said):
            why = f"its {what} needs more memory than there is: {said}\n  Take a machine with more."
        elif isinstance(error, ImportError) or "pip install" in said:
            why = f"its {what} needs a package that is not here: {said}\n  Install it, then go on."
        else:
            why = (
                f"transformers cannot read its {what}: {said}\n  The files are damaged, or of a "
                "kind that it does not know (code that comes with a model is not run)."
            )
        raise UserError(f"{folder}: {why}") from error


def _length(config: Any, tokenizer: Any) -> int:
    length = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    return int(length) if length < 10**9 else DEFAULT_LENGTH


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of what the tokenizer does: its tokenizer.json without padding and truncation."""
    if not tokenizer.is_fast:
        return digest([sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map])
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    return digest({k: v for k, v in content.items() if k not in ("padding", "truncation")})


def batch_size(vocabulary: int, tokens: int) -> int:
    """Sequences of `tokens` whose logits fit the budget: 1 to 32, the same on every machine."""
    return max(1, min(32, LOGITS // (vocabulary * max(1, tokens))))
