"""Small random checkpoints for tests, written by an implementation of their own."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

VOCABULARY, HIDDEN, INNER = 48, 16, 24
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8}


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """Nearest bfloat16 (ties to even), as uint16."""
    bits = values.astype("<f4").view("<u4").astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def encode(values: np.ndarray, dtype: str) -> bytes:
    """The bytes of an array in a safetensors dtype."""
    kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8"}
    return (bf16_bits(values) if dtype == "BF16" else values.astype(kinds[dtype])).tobytes()


def decode(data: bytes, dtype: str) -> np.ndarray:
    """The values of stored bytes, as float64 (exact), or int64."""
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").astype(float)
    kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8"}
    values = np.frombuffer(data, kinds[dtype])
    return values if dtype == "I64" else values.astype(float)


def write_safetensors(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> None:
    """Write name -> (dtype, values)."""
    header, body = {}, b""
    for name, (dtype, values) in tensors.items():
        data = encode(values, dtype)
        span = [len(body), len(body) + len(data)]
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": span}
        body += data
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Name -> values (flat, float64 or int64)."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        found[name] = decode(data[8 + length + begin : 8 + length + end], entry["dtype"])
    return found


def read_model(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a model folder."""
    found: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= read_safetensors(path)
    return found


def llama_tensors(seed: int, layers: int = 2, scale: float = 0.05) -> dict[str, np.ndarray]:
    """Llama-like names and mixed shapes: matrices, norm vectors, biases, tied embeddings.

    Models of one `layers` share their large part and differ by `scale`, like fine-tunes."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for i in range(layers):
        prefix = f"model.layers.{i}"
        shapes[f"{prefix}.input_layernorm.weight"] = (HIDDEN,)
        shapes[f"{prefix}.self_attn.q_proj.weight"] = (HIDDEN, HIDDEN)
        shapes[f"{prefix}.self_attn.q_proj.bias"] = (HIDDEN,)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (INNER, HIDDEN)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (HIDDEN, INNER)
    shapes["model.norm.weight"] = (HIDDEN,)
    common, own = np.random.default_rng(0), np.random.default_rng(seed + 1)
    return {
        name: (common.standard_normal(shape) + scale * own.standard_normal(shape))
        for name, shape in shapes.items()
    }


def write_model(
    folder: Path,
    tensors: dict[str, np.ndarray],
    dtype: str = "BF16",
    *,
    layers: int = 2,
    shards: int = 1,
    **config: object,
) -> Path:
    """Write a model folder anew: config.json, one or more shards, a small tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    facts = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        **config,
    }
    (folder / "config.json").write_text(json.dumps(facts))
    vocabulary = {f"t{i}": i for i in range(VOCABULARY)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    names = sorted(tensors)
    stored = {n: ("I64" if tensors[n].dtype.kind == "i" else dtype, tensors[n]) for n in names}
    if shards == 1:
        write_safetensors(folder / "model.safetensors", stored)
        return folder
    weight_map = {}
    for k in range(shards):
        file = f"model-{k + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: stored[name] for name in names[k::shards]}
        write_safetensors(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def llama(folder: Path, seed: int, dtype: str = "BF16", **how: object) -> Path:
    """A random Llama-like model folder."""
    layers = int(str(how.get("layers", 2)))
    return write_model(folder, llama_tensors(seed, layers), dtype, **how)  # type: ignore[arg-type]
