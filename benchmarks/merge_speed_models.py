"""Random bfloat16 Llamas of a given size, written in blocks, and recipes that merge them.

The base is normal(0, 0.02), an expert the base plus normal(0, 0.002), rounded to bfloat16. Every
block of every tensor has a random generator of its own: the same bytes on every run."""

from __future__ import annotations

import itertools
import json
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

Array = np.ndarray[Any, Any]
BLOCK = 2**21  # elements
WEIGHTS = "model.safetensors"
NAMES = ("base", "a", "b", "c")


@dataclass(frozen=True)
class Size:
    """The shape of a Llama with an untied head; `layers` 0 leaves two tensors, tied."""

    vocabulary: int
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int


TINYLLAMA = Size(32000, 2048, 5632, 22, 32, 4)  # 1.1e9 parameters
LARGE = Size(64000, 4096, 11264, 22, 32, 4)  # 4 times as many: every side of a matrix doubled
QUICK = Size(2000, 256, 704, 22, 8, 2)
QUICK_LARGE = Size(4000, 512, 1408, 22, 8, 2)
START = Size(64, 16, 32, 0, 2, 1)  # what is left of a merge without data


def shapes(size: Size) -> dict[str, tuple[int, ...]]:
    """Tensor shapes in the order of the file."""
    h, kv = size.hidden, size.hidden // size.heads * size.kv_heads
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (size.vocabulary, h)}
    for i in range(size.layers):
        layer = f"model.layers.{i}."
        found |= {
            layer + "input_layernorm.weight": (h,),
            layer + "self_attn.q_proj.weight": (h, h),
            layer + "self_attn.k_proj.weight": (kv, h),
            layer + "self_attn.v_proj.weight": (kv, h),
            layer + "self_attn.o_proj.weight": (h, h),
            layer + "post_attention_layernorm.weight": (h,),
            layer + "mlp.gate_proj.weight": (size.inner, h),
            layer + "mlp.up_proj.weight": (size.inner, h),
            layer + "mlp.down_proj.weight": (h, size.inner),
        }
    found["model.norm.weight"] = (h,)
    if size.layers:
        found["lm_head.weight"] = (size.vocabulary, h)
    return found


def config(size: Size) -> dict[str, Any]:
    """A config.json that transformers, and so the peer, recognises."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "intermediate_size": size.inner,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "tie_word_embeddings": not size.layers,
        "torch_dtype": "bfloat16",
    }


def write_models(folder: Path, size: Size, names: tuple[str, ...] = NAMES) -> int:
    """Write the base and its experts below `folder`; gives the bytes of one file."""
    for number, name in enumerate(names):
        write_model(folder, name, number, size)
    os.sync()
    return (folder / names[0] / WEIGHTS).stat().st_size


def write_model(folder: Path, name: str, number: int, size: Size) -> None:
    """Write model `number`; number 0 is the base that the others start from."""
    header, offset, jobs = {}, 0, []
    for index, (key, shape) in enumerate(shapes(size).items()):
        count = int(np.prod(shape))
        end = offset + 2 * count
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        centre = 1.0 if len(shape) == 1 else 0.0
        for start in range(0, count, BLOCK):
            jobs.append((index, start, min(BLOCK, count - start), offset + 2 * start, centre))
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / name).mkdir(parents=True)
    (folder / name / "config.json").write_text(json.dumps(config(size), indent=2))
    base, target = folder / NAMES[0] / WEIGHTS, folder / name / WEIGHTS

    def write(job: tuple[int, int, int, int, float]) -> None:
        index, start, count, place, centre = job
        at = 8 + len(text) + place
        random = np.random.default_rng([number, index, start]).standard_normal(count, "<f4")
        if number:
            random *= np.float32(0.002)
            random += (np.fromfile(base, "<u2", count, offset=at).astype("<u4") << 16).view("<f4")
        else:
            random *= np.float32(0.02)
            random += np.float32(centre)
        os.pwrite(file.fileno(), bf16(random).data, at)

    with target.open("wb") as file, ThreadPoolExecutor(2) as pool:
        file.write(struct.pack("<Q", len(text)) + text)
        file.flush()
        list(pool.map(write, jobs))


def bf16(values: Array) -> Array:
    """The nearest bfloat16 (ties to even) of finite float32 values, as its bits."""
    bits = values.view("<u4")
    low = (bits >> 16) & 1
    low += 0x7FFF
    low += bits
    low >>= 16
    rounded: Array = low.astype("<u2")
    return rounded


def links(folder: Path, count: int) -> list[Path]:
    """`count` model folders: those that were written, then links to the experts among them.

    What memory is needed does not depend on whether two experts are the same."""
    real = [folder / name for name in NAMES if (folder / name).is_dir()]
    for number in range(len(real), count):
        link = folder / f"expert-{number}"
        if not link.is_symlink():
            link.symlink_to(real[1 + number % (len(real) - 1)].name)
        real.append(link)
    return real[:count]


SHARED: dict[str, dict[str, Any]] = {  # parameters of a recipe; weights are per model
    "linear": {},
    "passthrough": {},
    "task_arithmetic": {"lambda": 0.8},
    "slerp": {"t": 0.4},
    "dare_ties": {"density": 0.5},
    "ties": {"density": 0.5},
    "breadcrumbs": {"density": 0.9, "gamma": 0.01},
    "della": {"density": 0.5, "epsilon": 0.1},
    "sce": {"select_topk": 0.5},
    "model_stock": {},
}
UNWEIGHTED = ("slerp", "sce", "model_stock", "passthrough")


def models_of(method: str, models: list[Path]) -> list[Path]:
    """The models that a recipe of `method` reads: slerp takes two."""
    return models[:2] if method == "slerp" else models


def write_recipe(path: Path, method: str, models: list[Path], layers: int) -> None:
    """A recipe for both tools that merges `models`, of which the first is the base.

    passthrough stacks a part of each model; if they have no layers, it copies the first."""
    used = models_of(method, models)
    recipe: dict[str, Any] = {"merge_method": method, "dtype": "bfloat16"}
    if method == "passthrough" and layers:
        recipe["slices"] = [
            {"sources": [{"model": str(model), "layer_range": [start, stop]}]}
            for model, (start, stop) in zip(used, stack(layers, len(used)), strict=True)
        ]
    else:
        entries = used if method in ("linear", "slerp") else used[1:]
        entries = used[:1] if method == "passthrough" else entries
        total = sum(range(len(entries) + 1))
        weights = {model: round((i + 1) / total, 3) for i, model in enumerate(entries)}
        recipe["models"] = [
            {"model": str(model)}
            | ({} if method in UNWEIGHTED else {"parameters": {"weight": weights[model]}})
            for model in entries
        ]
        if method not in ("linear", "passthrough"):
            recipe["base_model"] = str(used[0])
    if SHARED[method]:
        recipe["parameters"] = SHARED[method]
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))


def stack(layers: int, count: int) -> list[tuple[int, int]]:
    """Layer ranges of a passthrough stack as deep as its models: a part of each of them."""
    cuts = [layers * i // count for i in range(count + 1)]
    return list(itertools.pairwise(cuts))
