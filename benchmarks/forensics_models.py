"""Small Llama-like families: a base, experts whose task vectors have heavy tails, and a mixture.

Every entry is drawn; what is realistic is the shape: layers and tensors differ in how far they
moved, single entries move far more than most, some experts share a part of what they learnt."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mergelab.checkpoint import DTYPES, from_float

Array = np.ndarray[Any, Any]
Tensors = dict[str, Array]
HIDDEN, INNER, KV, VOCABULARY = 64, 160, 32, 256
EXPERTS = ("A", "B", "C", "D", "E", "F")
TWINS = (("A", "E", 0.4), ("B", "C", 0.3))  # pairs that share a part of their task vectors
TAIL = 5  # degrees of freedom of the entries of task vectors


@dataclass(frozen=True)
class Family:
    """A base and its experts; `moved` is the sd of task vectors (of the base: 0.02)."""

    seed: int
    layers: int
    moved: float
    dtype: str

    @property
    def name(self) -> str:
        """A folder's name."""
        return f"{self.seed}-{self.layers}-{self.moved:g}-{self.dtype}"


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Tensor shapes of a Llama with tied embeddings."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        found |= {
            layer + "input_layernorm.weight": (HIDDEN,),
            layer + "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            layer + "self_attn.k_proj.weight": (KV, HIDDEN),
            layer + "self_attn.v_proj.weight": (KV, HIDDEN),
            layer + "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            layer + "post_attention_layernorm.weight": (HIDDEN,),
            layer + "mlp.gate_proj.weight": (INNER, HIDDEN),
            layer + "mlp.up_proj.weight": (INNER, HIDDEN),
            layer + "mlp.down_proj.weight": (HIDDEN, INNER),
        }
    found["model.norm.weight"] = (HIDDEN,)
    return found


def write_family(folder: Path, family: Family) -> dict[str, Path]:
    """Write base and experts below `folder`, once; their folders by name."""
    places = {name: folder / family.name / name for name in ("base", *EXPERTS)}
    if (places[EXPERTS[-1]] / "config.json").is_file():
        return places
    random = np.random.default_rng(family.seed)
    base = {
        name: (1.0 if len(shape) == 1 else 0.0) + 0.02 * random.standard_normal(shape)
        for name, shape in shapes(family.layers).items()
    }
    base = rounded(base, family.dtype)
    vectors = {name: task_vector(random, family) for name in EXPERTS}
    for one, other, share in TWINS:
        for key, tau in vectors[other].items():
            mixed = share * vectors[one][key] + np.sqrt(1 - share**2) * tau
            vectors[other][key] = mixed
    write_model(places["base"], base, family.dtype, family.layers)
    for name, tau in vectors.items():
        model = {key: base[key] + tau[key] for key in base}
        write_model(places[name], model, family.dtype, family.layers)
    return places


def task_vector(random: np.random.Generator, family: Family) -> Tensors:
    """Expert minus base: Student's t, of a size that differs by tensor and by row."""
    found = {}
    for name, shape in shapes(family.layers).items():
        size = family.moved * np.exp(0.3 * random.standard_normal())
        rows = np.exp(0.3 * random.standard_normal((shape[0], *(1 for _ in shape[1:]))))
        tau = random.standard_t(TAIL, shape) * np.sqrt((TAIL - 2) / TAIL)
        found[name] = size * rows * tau
    return found


def rounded(tensors: Tensors, dtype: str) -> Tensors:
    """The values that a file of this dtype holds."""
    if dtype == "bfloat16":
        return {
            name: (from_float(v.astype("<f4"), "BF16").astype("<u4") << 16)
            .view("<f4")
            .astype(float)
            for name, v in tensors.items()
        }
    return {name: v.astype(dtype).astype(float) for name, v in tensors.items()}


def write_model(folder: Path, tensors: Tensors, dtype: str, layers: int, **config: Any) -> Path:
    """Write a model folder: config.json last, model.safetensors."""
    header, body, offset = {}, [], 0
    for name, values in sorted(tensors.items()):
        data = from_float(np.ascontiguousarray(values, "<f4"), DTYPES[dtype]).tobytes()
        span = [offset, offset + len(data)]
        header[name] = {"dtype": DTYPES[dtype], "shape": values.shape, "data_offsets": span}
        body.append(data)
        offset += len(data)
    text = json.dumps(header).encode()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"".join(body))
    facts = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
        **config,
    }
    (folder / "config.json").write_text(json.dumps(facts))
    return folder


def read_model(folder: Path) -> Tensors:
    """All tensors of a folder, as float64."""
    from mergelab.checkpoint import open_checkpoint

    tensors = open_checkpoint(folder, folder.name).tensors.values()
    return {t.name: t.floats(0, t.size, "<f8").reshape(t.shape) for t in tensors}


def write_mixture(out: Path, base: Path, experts: list[Path], dtype: str, layers: int) -> None:
    """A Mixtral of dense models: each expert is the MLP of one, the rest is the base's."""
    donor, models = read_model(base), [read_model(path) for path in experts]
    names = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    tensors = {n: v for n, v in donor.items() if ".mlp." not in n}
    random = np.random.default_rng(0)
    for layer in range(layers):
        place = f"model.layers.{layer}."
        tensors[place + "block_sparse_moe.gate.weight"] = random.standard_normal(
            (len(models), HIDDEN)
        )
        for number, model in enumerate(models):
            for dense, name in names.items():
                key = f"{place}block_sparse_moe.experts.{number}.{name}.weight"
                tensors[key] = model[f"{place}mlp.{dense}.weight"]
    facts = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    write_model(out, tensors, dtype, layers, **facts)


def train_on(out: Path, source: Path, dtype: str, layers: int, size: float, seed: int) -> None:
    """A further fine-tuned model: every entry moves a little (sd `size`)."""
    random, unit = np.random.default_rng([seed, 7]), np.sqrt((TAIL - 2) / TAIL)
    moved = {
        name: values + size * unit * random.standard_t(TAIL, values.shape)
        for name, values in sorted(read_model(source).items())
    }
    write_model(out, moved, dtype, layers)
