"""Which tensor of a candidate a child's tensor may come from, and which are copies.

Names are matched as they stand, then layers by direction (a stack of slices holds other layers
under its numbers), then the experts of a mixture by the names of a dense model's MLP."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import xxhash

from mergelab.checkpoint import FLOATS, Checkpoint, Tensor, from_float, split_layer, to_float
from mergelab.forensics.samples import part

Array = np.ndarray[Any, Any]
EXPERT = re.compile(
    r"(?P<layer>.*)\.(?:block_sparse_moe|mlp)\.experts\.(?P<number>\d{1,4})\."
    r"(?P<what>w1|w2|w3|gate_proj|up_proj|down_proj)\.weight\Z"
)
DENSE = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
PROBE, COPY_PROBE, PROBE_RUN = 1 << 12, 1 << 12, 1 << 9
ALIKE, BETTER = 0.1, 0.05  # cosine that tells a layer from chance; by how much another must win
BLOCK = 1 << 20  # entries compared at a time
PROBES = 2  # tensors of each layer whose directions are compared


def expert(name: str) -> tuple[int, str] | None:
    """Number of the expert that a tensor belongs to, and its name in a dense model."""
    found = EXPERT.match(name)
    if not found:
        return None
    what = DENSE.get(found["what"], found["what"])
    return int(found["number"]), f"{found['layer']}.mlp.{what}.weight"


def dense_name(name: str, names: Mapping[str, Tensor]) -> str:
    """What a tensor is called in a model with these tensors: an expert's MLP, or a tied head."""
    if name in names:
        return name
    if found := expert(name):
        return found[1]
    return "model.embed_tokens.weight" if name == "lm_head.weight" else name


def origins(
    model: Checkpoint, candidates: Mapping[str, Checkpoint]
) -> dict[str, dict[str, Tensor]]:
    """Per child tensor, the tensor of each candidate that has one of its shape in its place."""
    found: dict[str, dict[str, Tensor]] = {name: {} for name in sorted(model.tensors)}
    for label, candidate in candidates.items():
        moved = aligned(model, candidate)
        for name, tensors in found.items():
            source = candidate.tensors.get(_place(name, candidate, moved))
            if source is not None and source.shape == model.tensors[name].shape:
                tensors[label] = source
    return found


def _place(name: str, candidate: Checkpoint, moved: Mapping[int, int]) -> str:
    prefix, layer, rest = split_layer(name)
    if layer is not None and prefix == candidate.stack:
        name = f"{prefix}.{moved.get(layer, layer)}.{rest}"
    return dense_name(name, candidate.tensors)


def aligned(model: Checkpoint, candidate: Checkpoint) -> dict[int, int]:
    """Child layer -> the candidate's layer that points in the same direction, where not its own."""
    if model.stack is None or model.stack != candidate.stack:
        return {}
    mine, theirs = _directions(model), _directions(candidate)
    found = {}
    for layer, vectors in mine.items():
        scores = {
            other: float(np.mean([_cosine(a, b) for a, b in zip(vectors, w, strict=True)]))
            for other, w in theirs.items()
            if [v.size for v in w] == [v.size for v in vectors]
        }
        best = max(scores, key=lambda other: (scores[other], -other), default=layer)
        if best != layer and scores[best] > max(ALIKE, scores.get(layer, 0.0) + BETTER):
            found[layer] = best
    return found


def _directions(model: Checkpoint) -> dict[int, list[Array]]:
    """Per layer, parts of its attention matrices (the largest, by size then name)."""
    layers: dict[int, list[Tensor]] = {}
    for tensor in model.tensors.values():
        prefix, layer, rest = split_layer(tensor.name)
        if prefix != model.stack or layer is None or len(tensor.shape) != 2:
            continue
        if group(rest) == "attention" and tensor.dtype in FLOATS:
            layers.setdefault(layer, []).append(tensor)
    found = {}
    for layer, tensors in layers.items():
        chosen = sorted(tensors, key=lambda t: (-t.size, split_layer(t.name)[2]))[:PROBES]
        found[layer] = [to_float(part(t, PROBE, PROBE_RUN), t.dtype, "<f8") for t in chosen]
    return found


def _cosine(a: Array, b: Array) -> float:
    length = float(np.sqrt((a * a).sum()) * np.sqrt((b * b).sum()))
    return float((a * b).sum()) / length if 0 < length < np.inf else 0.0


def group(name: str) -> str:
    """What kind of part a tensor belongs to, by its name."""
    if re.search(r"norm|(^|\.)ln_", name):
        return "norm"
    if re.search(r"attn|attention", name):
        return "attention"
    if re.search(r"mlp|block_sparse_moe|feed_forward|ffn", name):
        return "mlp"
    if re.search(r"embed|wte|wpe", name):
        return "embedding"
    return "head" if "head" in name else "other"


def copies(
    model: Checkpoint, candidates: Mapping[str, Checkpoint]
) -> dict[str, list[tuple[str, str]]]:
    """Per child tensor, the (candidate, tensor)s whose entries are all the same, own name first.

    A short part is hashed first; what agrees is compared whole. A candidate of another dtype is
    rounded to the child's."""
    dtypes = sorted({t.dtype for t in model.tensors.values()})
    index: dict[str, list[tuple[str, Tensor]]] = {}
    for label, candidate in candidates.items():
        for _, tensor in sorted(candidate.tensors.items()):
            for dtype in dtypes:
                if dtype == tensor.dtype or {dtype, tensor.dtype} <= set(FLOATS):
                    index.setdefault(_digest(tensor, dtype), []).append((label, tensor))
    found = {}
    for name, tensor in sorted(model.tensors.items()):
        near = index.get(_digest(tensor, tensor.dtype), []) if tensor.size else []
        near.sort(key=lambda pair: pair[1].name != name)
        same = [
            (label, other.name)
            for label, other in near
            if tensor.size <= COPY_PROBE or _same(tensor, other)
        ]
        if same:
            found[name] = same
    return found


def fingerprint(model: Checkpoint) -> tuple[str, ...]:
    """Hashes of a short part of every tensor, by name: the same for models of the same weights."""
    return tuple(f"{n} {_digest(t, t.dtype)}" for n, t in sorted(model.tensors.items()))


def alike(a: Checkpoint, b: Checkpoint) -> bool:
    """Do two models of the same fingerprint hold the same bits?"""
    return all(_same(tensor, b.tensors[name]) for name, tensor in a.tensors.items())


def _digest(tensor: Tensor, dtype: str) -> str:
    bits = part(tensor, COPY_PROBE, PROBE_RUN)
    return (
        f"{tensor.shape} {dtype} {xxhash.xxh3_128_hexdigest(_as(bits, tensor.dtype, dtype).data)}"
    )


def _as(bits: Array, stored: str, wanted: str) -> Array:
    if stored == wanted:
        return np.ascontiguousarray(bits)
    return from_float(to_float(bits, stored, "<f8"), wanted)


def _same(a: Tensor, b: Tensor) -> bool:
    """Do all entries agree, bit for bit, once b is rounded to the dtype of a?"""
    x, y = a.bits(), b.bits()
    for start in range(0, a.size, BLOCK):
        block = slice(start, start + BLOCK)
        rounded = _as(y[block], b.dtype, a.dtype)
        if not np.array_equal(np.asarray(x[block]).view("u1"), rounded.view("u1")):
            return False
    return True
