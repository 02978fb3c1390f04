"""The plan: every output tensor, its sources, parameters, shard and byte offset.

Made from headers and configs alone, before any arithmetic; every mistake is found here (C1)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergelab.checkpoint import (
    DTYPES,
    FLOATS,
    INDEX,
    NAMES,
    Checkpoint,
    Tensor,
    open_checkpoint,
    split_layer,
)
from mergelab.config import merged_config, warnings_about
from mergelab.errors import Problems, UserError
from mergelab.methods.base import BLOCK, Settings
from mergelab.recipe import Recipe, Slice, Source, resolve
from mergelab.writer import Planned, lay_out

SHARD_SIZE = 5_000_000_000
EMBEDDINGS = ("embed", "wte", "wpe")
TIED = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")
NO_SHARE = 1e-8
FEW = 3  # misfits of one kind that are told in full


@dataclass(frozen=True)
class Plan:
    """What a merge will read and write."""

    recipe: Recipe
    checkpoints: Mapping[str, Checkpoint]
    donor: Checkpoint
    tensors: tuple[Planned, ...]
    headers: Mapping[str, bytes]
    config: dict[str, Any]
    warnings: tuple[str, ...]

    @property
    def bytes_out(self) -> int:
        """Bytes of all weight files."""
        return sum(map(len, self.headers.values())) + sum(t.nbytes for t in self.tensors)

    @property
    def bytes_in(self) -> int:
        """Bytes of all distinct input tensors that are read."""
        sources = {source for tensor in self.tensors for source in tensor.sources}
        return sum(source.nbytes for source in sources)

    @property
    def bytes_memory(self) -> int:
        """Upper estimate of the anonymous memory of one worker's blocks, in bytes."""
        return 4 * BLOCK * 6 * (len(self.checkpoints) + 1)

    @property
    def index(self) -> dict[str, Any] | None:
        """The content of the shard index, if there is more than one shard."""
        if len(self.headers) == 1:
            return None
        total = sum(tensor.nbytes for tensor in self.tensors)
        files = {tensor.name: tensor.file for tensor in self.tensors}
        return {"metadata": {"total_size": total}, "weight_map": files}


def make_plan(recipe: Recipe, folders: Mapping[str, Path], *, shard_size: int) -> Plan:
    """Plan a merge of the models in `folders` (by their name in the recipe).

    Raises UserError with everything that is wrong with recipe and models together."""
    problems = Problems()
    checkpoints: dict[str, Checkpoint] = {}
    for name in recipe.models:
        try:
            checkpoints[name] = open_checkpoint(folders[name], name)
        except UserError as error:
            problems.add(str(error))
    problems.raise_if_any()
    donor = checkpoints[recipe.base or recipe.models[0]]
    planner = _Planner(recipe, checkpoints, donor, problems)
    tensors = planner.tensors()
    warnings = tuple(warnings_about(checkpoints, donor, problems))
    problems.raise_if_any()
    shards, headers = lay_out(tensors, shard_size)
    return Plan(
        recipe,
        checkpoints,
        donor,
        shards,
        headers,
        merged_config(recipe, checkpoints, donor, shards),
        warnings,
    )


class _Planner:
    """Finds the sources and parameters of each output tensor, noting every mistake."""

    def __init__(
        self,
        recipe: Recipe,
        checkpoints: Mapping[str, Checkpoint],
        donor: Checkpoint,
        problems: Problems,
    ) -> None:
        self.recipe, self.checkpoints, self.donor = recipe, checkpoints, donor
        self.problems = problems
        self.misfits: dict[str, list[str]] = {}

    def tensors(self) -> list[Planned]:
        planned = self.whole() if self.recipe.whole else self.stacked()
        for texts in self.misfits.values():
            for text in texts[:FEW]:
                self.problems.add(text)
            if len(texts) > FEW:
                self.problems.add(f"... and {len(texts) - FEW} more tensors like that.")
        return sorted((p for p in planned if p is not None), key=lambda p: p.name)

    def whole(self) -> list[Planned | None]:
        """A `models` recipe: every tensor name that any model has."""
        (slice,) = self.recipe.slices
        names = dict.fromkeys([n for c in self.ordered() for n in c.tensors])
        counts: dict[str, int] = {}
        for name in names:
            prefix, index, _ = split_layer(name)
            counts[prefix] = max(counts.get(prefix, 0), (index or 0) + 1)
        result = []
        for name in names:
            prefix, index, _ = split_layer(name)
            at = 0.0 if index is None else position(index, counts[prefix])
            sources = [(source, name) for source in self.sources(slice)]
            result.append(self.tensor(name, slice, sources, at))
        return result

    def ordered(self) -> list[Checkpoint]:
        return [self.donor, *(c for c in self.checkpoints.values() if c is not self.donor)]

    def sources(self, slice: Slice) -> list[Source]:
        """The sources of a slice; an unlisted base of task vectors comes last."""
        listed = list(slice.sources)
        base = self.recipe.base
        if self.recipe.method.base == "needed" and base not in [s.model for s in listed]:
            listed.append(Source(str(base), None, {}, slice.line))
        return listed

    def stacked(self) -> list[Planned | None]:
        """A `slices` recipe: layers renumbered, embeddings of the first slice, head of the last."""
        if not all(self.has_layers(slice) for slice in self.recipe.slices):
            return []
        result: list[Planned | None] = []
        row = 0
        for slice in self.recipe.slices:
            begin, end = slice.sources[0].layers or (0, 0)
            for k in range(end - begin):
                at = position(k, end - begin)
                for suffix in self.suffixes(slice, k):
                    sources = []
                    for source in slice.sources:
                        model = self.checkpoints[source.model]
                        layer = (source.layers or (0, 0))[0] + k
                        sources.append((source, f"{model.stack}.{layer}.{suffix}"))
                    name = f"{self.donor.stack}.{row}.{suffix}"
                    result.append(self.tensor(name, slice, sources, at))
                row += 1
        return result + self.outside()

    def has_layers(self, slice: Slice) -> bool:
        ok = True
        for source in slice.sources:
            model = self.checkpoints[source.model]
            if source.layers and source.layers[1] > model.layers:
                ok = False
                self.problems.add(
                    f"{self.recipe.path}:{source.line}: model {source.model} has {model.layers} "
                    f"layers, layer_range ends at {source.layers[1]}."
                )
                continue
            present = {i for p, i, _ in map(split_layer, model.tensors) if p == model.stack}
            for layer in set(range(*(source.layers or (0, 0)))) - present:
                ok = False
                self.problems.add(f"model {source.model}: layer {layer} has no tensors.")
        return ok

    def suffixes(self, slice: Slice, k: int) -> list[str]:
        """Names within a layer that any source has in the k-th layer of the slice."""
        names: dict[str, None] = {}
        for source in slice.sources:
            model = self.checkpoints[source.model]
            layer = (model.stack, (source.layers or (0, 0))[0] + k)
            names |= {s: None for p, i, s in map(split_layer, model.tensors) if (p, i) == layer}
        return list(names)

    def outside(self) -> list[Planned | None]:
        result = []
        for name in dict.fromkeys(n for c in self.ordered() for n in c.tensors):
            if split_layer(name)[0] == self.donor.stack:
                continue
            early = any(word in name for word in EMBEDDINGS)
            slice = self.recipe.slices[0 if early else -1]
            used = [self.checkpoints[source.model] for source in slice.sources]
            if any(self.find(model, name) for model in used):
                sources = [(source, name) for source in slice.sources]
                result.append(self.tensor(name, slice, sources, 0.0))
        return result

    def find(self, model: Checkpoint, name: str) -> Tensor | None:
        """The tensor, or the embedding it is tied to if the model stores no output head."""
        if name in model.tensors or not name.endswith("lm_head.weight"):
            return model.tensors.get(name)
        return next((t for n, t in model.tensors.items() if n.endswith(TIED)), None)

    def tensor(
        self, name: str, slice: Slice, sources: list[tuple[Source, str]], at: float
    ) -> Planned | None:
        found: list[tuple[Source, Tensor]] = []
        asked = {source.model: wanted for source, wanted in sources}
        for source, wanted in sources:
            tensor = self.find(self.checkpoints[source.model], wanted)
            if tensor is None:
                self.misfits.setdefault(f"missing in {source.model}", []).append(
                    f"model {source.model}: tensor {wanted} is missing, but another model has it. "
                    "Only models of one architecture can be merged."
                )
            else:
                found.append((source, tensor))
        if len(found) != len(sources) or not self.same_shape(name, found):
            return None
        needed = self.recipe.method.base == "needed"
        is_base = [needed and source.model == self.recipe.base for source, _ in found]
        base = next((t for (_, t), b in zip(found, is_base, strict=True) if b), None)
        experts = [pair for pair, b in zip(found, is_base, strict=True) if not b]
        settings = self.settings(name, slice, [(s, asked[s.model]) for s, _ in experts], at)
        dtype = self.out_dtype([tensor for _, tensor in found])
        same = {tensor.dtype for _, tensor in found} == {dtype}
        plain = self.recipe.method.name == "passthrough" and settings.experts[0]["scale"] == 1
        return Planned(
            name,
            dtype,
            found[0][1].shape,
            base,
            tuple(tensor for _, tensor in experts),
            tuple(source.model for source, _ in experts),
            settings,
            copied=dtype not in FLOATS or (plain and same),
        )

    def same_shape(self, name: str, found: list[tuple[Source, Tensor]]) -> bool:
        shapes = {tensor.shape for _, tensor in found}
        floats = {tensor.dtype in FLOATS for _, tensor in found}
        listing = ", ".join(f"{s.model} {list(t.shape)} {t.dtype}" for s, t in found)
        if len(shapes) > 1:
            rows = [shape[0] for shape in shapes if shape]
            embedding = name.endswith("lm_head.weight") or any(w in name for w in EMBEDDINGS)
            if embedding and len(set(rows)) > 1 and len({s[1:] for s in shapes}) == 1:
                self.problems.add(
                    f"tensor {name}: the models have different vocabularies: {listing}. "
                    "Merge models that share one tokenizer."
                )
            else:
                self.misfits.setdefault("shapes", []).append(
                    f"tensor {name}: shapes differ: {listing}. "
                    "Only models of one architecture and size can be merged."
                )
        if len(floats) > 1 or (floats == {False} and len({t.dtype for _, t in found}) > 1):
            self.problems.add(f"tensor {name}: data types cannot be merged: {listing}.")
            return False
        return len(shapes) == 1

    def settings(
        self, name: str, slice: Slice, experts: list[tuple[Source, str]], at: float
    ) -> Settings:
        shared: dict[str, Any] = {}
        each: list[dict[str, Any]] = [{} for _ in experts]
        common = (slice.parameters, self.recipe.parameters)
        for parameter in self.recipe.method.parameters:
            if not parameter.per_model:
                shared[parameter.name] = resolve(parameter, common, name, at)
                self.given(parameter.name, shared[parameter.name], parameter.required, name, slice)
                continue
            for values, (source, asked) in zip(each, experts, strict=True):
                levels = (source.parameters, *common)
                values[parameter.name] = resolve(parameter, levels, asked, at)
                self.given(parameter.name, values[parameter.name], parameter.required, name, slice)
        settings = Settings(shared, tuple(each))
        self.dividable(name, settings)
        return settings

    def given(self, parameter: str, value: Any, required: bool, name: str, slice: Slice) -> None:
        if required and value is None:
            self.problems.add(
                f"{self.recipe.path}:{slice.line}: no value of '{parameter}' applies to tensor "
                f"{name}: none of its filters matches. Add an entry without a filter."
            )

    def dividable(self, name: str, settings: Settings) -> None:
        if self.recipe.method.name != "linear" or not settings.shared["normalize"]:
            return
        weights = settings.each("weight")
        if None not in weights and abs(sum(weights)) < NO_SHARE:
            self.problems.add(
                f"{self.recipe.path}: the weights of tensor {name} sum to 0, which cannot be "
                "normalized. Change them or set normalize: false."
            )

    def out_dtype(self, tensors: list[Tensor]) -> str:
        """The recipe's out_dtype, or dtype, or the narrowest format that holds all inputs."""
        stored = {tensor.dtype for tensor in tensors}
        if not stored <= set(FLOATS):
            return tensors[0].dtype
        asked = self.recipe.out_dtype or self.recipe.dtype
        if asked:
            return DTYPES[asked]
        if stored == {"F16", "BF16"}:
            return "F32"
        return next(dtype for dtype in FLOATS if dtype in stored)


def position(index: int, count: int) -> float:
    """Where a layer stands in its run, 0 to 1; the only layer of a run stands at 1."""
    return index / (count - 1) if count > 1 else 1.0


def describe(plan: Plan) -> dict[str, Any]:
    """The plan as plain data: inputs, outputs, bytes, and which tensors get which parameters."""
    groups: dict[str, dict[str, Any]] = {}
    for tensor in plan.tensors:
        each = zip(tensor.models, tensor.settings.experts, strict=True)
        values = {"shared": dict(tensor.settings.shared), "models": {m: dict(v) for m, v in each}}
        group = groups.setdefault(json.dumps(values, sort_keys=True), {**values, "tensors": []})
        group["tensors"].append(tensor.name)
    return {
        "method": f"{plan.recipe.method.name} v{plan.recipe.method.version}",
        "inputs": {
            name: {"folder": str(c.folder), "tensors": len(c.tensors), "layers": c.layers}
            for name, c in plan.checkpoints.items()
        },
        "dtypes": sorted({NAMES.get(t.dtype, t.dtype) for t in plan.tensors}),
        "tensors": len(plan.tensors),
        "files": [*plan.headers, *([INDEX] if plan.index else [])],
        "bytes_in": plan.bytes_in,
        "bytes_out": plan.bytes_out,
        "bytes_memory": plan.bytes_memory,
        "warnings": list(plan.warnings),
        "groups": list(groups.values()),
    }
