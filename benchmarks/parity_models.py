"""Random bfloat16 models in the peer's architectures: matrices, norm vectors, biases, tied heads.

Legend: a model is a dict of tensor name -> bfloat16 bits (uint16)."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
NAMES = ("base", "a", "b", "c")
FAMILIES = {
    "fine-tuned": "base + 1 % noise in bfloat16: angles under 1 degree, deltas full of ties",
    "drifted": "base + 40 % noise: angles near 22 degrees",
    "unrelated": "independent draws: angles near 90 degrees",
    "opposed": "20 % noise - base: angles near 169 degrees",
}


@dataclass(frozen=True)
class Size:
    """Widths of a model; `vocabulary` times `hidden` is its largest tensor."""

    vocabulary: int
    hidden: int
    inner: int
    layers: int


QUICK = Size(1400, 192, 256, 3)  # the embedding spans two of our blocks (262,144 elements)
FULL = Size(5600, 192, 512, 3)  # and two chunks of the peer's slerp (1,048,576 elements)


def shapes(architecture: str, size: Size, *, head: bool) -> dict[str, tuple[int, ...]]:
    """Tensor shapes of a `qwen2` (with biases) or `llama` decoder; `head`: an untied lm_head."""
    h, kv = size.hidden, size.hidden // 2
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (size.vocabulary, h)}
    for i in range(size.layers):
        layer = f"model.layers.{i}."
        found |= {layer + "input_layernorm.weight": (h,)}
        for name, rows in (("q_proj", h), ("k_proj", kv), ("v_proj", kv)):
            found[f"{layer}self_attn.{name}.weight"] = (rows, h)
            if architecture == "qwen2":
                found[f"{layer}self_attn.{name}.bias"] = (rows,)
        found |= {
            layer + "self_attn.o_proj.weight": (h, h),
            layer + "post_attention_layernorm.weight": (h,),
            layer + "mlp.gate_proj.weight": (size.inner, h),
            layer + "mlp.up_proj.weight": (size.inner, h),
            layer + "mlp.down_proj.weight": (h, size.inner),
        }
    found["model.norm.weight"] = (h,)
    if head:
        found["lm_head.weight"] = (size.vocabulary, h)
    return found


def bf16(values: Array) -> Array:
    """Nearest bfloat16 (ties to even), as its bits."""
    bits = values.astype("<f4").view("<u4").astype(np.uint64)
    rounded: Array = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return rounded


def widen(bits: Array) -> Array:
    """bfloat16 bits as float32, exactly."""
    wide: Array = (bits.astype("<u4") << 16).view("<f4")
    return wide


def values(family: str, seed: int, model: int, index: int, shape: tuple[int, ...]) -> Array:
    """One tensor of one model; norm vectors lie around 1, everything else around 0."""
    scale, centre = (0.1, 1.0) if len(shape) == 1 and index % 2 else (0.02, 0.0)
    common = np.random.default_rng([seed, index]).standard_normal(shape)
    own = np.random.default_rng([seed, index, model + 1]).standard_normal(shape)
    base = widen(bf16(centre + scale * common))
    if model == 0:
        return base
    if family == "unrelated":
        return centre + scale * own
    share = {"fine-tuned": 0.01, "drifted": 0.4, "opposed": 0.2}[family]
    return (-base if family == "opposed" else base) + share * scale * own


def write_models(
    folder: Path, architecture: str, family: str, seed: int, size: Size, heads: tuple[bool, ...]
) -> dict[str, dict[str, Array]]:
    """Write base, a, b, c below `folder` and give their bits; `heads`: which store an lm_head."""
    found: dict[str, dict[str, Array]] = {}
    for model, (name, head) in enumerate(zip(NAMES, heads, strict=True)):
        tensors: dict[str, Array] = {}
        for index, (key, shape) in enumerate(shapes(architecture, size, head=head).items()):
            tensors[key] = bf16(values(family, seed, model, index, shape))
        write_model(folder / name, tensors, config(architecture, size, tied=not head))
        found[name] = tensors
    return found


def config(architecture: str, size: Size, *, tied: bool) -> dict[str, Any]:
    """A config.json that transformers, and so the peer, recognises."""
    names = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}
    return {
        "model_type": architecture,
        "architectures": [names[architecture]],
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "intermediate_size": size.inner,
        "num_hidden_layers": size.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
    }


def write_model(folder: Path, tensors: dict[str, Array], facts: dict[str, Any]) -> None:
    """config.json and model.safetensors, written by code of its own."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(facts))
    header, position = {}, 0
    for name, bits in tensors.items():
        span = [position, position + bits.nbytes]
        header[name] = {"dtype": "BF16", "shape": list(bits.shape), "data_offsets": span}
        position += bits.nbytes
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for bits in tensors.values():
            stream.write(bits.tobytes())
