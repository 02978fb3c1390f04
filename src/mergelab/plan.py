"""The plan: every output tensor, its sources, parameters, shard and byte offset.

Made from headers and configs alone, before any arithmetic; every mistake is found here (C1)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergelab.adapters import open_adapted, split_name
from mergelab.checkpoint import INDEX, NAMES, Checkpoint, open_checkpoint
from mergelab.config import merged_config, warnings_about
from mergelab.errors import Problems, UserError
from mergelab.methods.base import BLOCK
from mergelab.modules import parts
from mergelab.planner import Planner
from mergelab.stacking import spelled_alike
from mergelab.structure import Recipe
from mergelab.vocabulary import Vocabulary, build
from mergelab.writer import Planned, lay_out

SHARD_SIZE = 5_000_000_000


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
    vocabulary: Vocabulary | None = None

    @property
    def bytes_out(self) -> int:
        """Bytes of all weight files."""
        return sum(map(len, self.headers.values())) + sum(t.nbytes for t in self.tensors)

    @property
    def bytes_in(self) -> int:
        """Bytes that one pass reads: those of a layer twice if the recipe repeats it."""
        return sum(source.nbytes for tensor in self.tensors for source in tensor.sources)

    @property
    def passes(self) -> tuple[int, int]:
        """How often the input tensors are read, at least and at most: surveyed, then merged.

        Rounds with `unless` make the difference: large tensors need them more often."""
        merged = {repr(t.settings): t.settings for t in self.tensors if not t.copied}
        least = most = 1
        for settings in merged.values():
            whole = settings.shared.get("scope") == "model"
            rounds = [
                round
                for round in self.recipe.method.rounds
                if (whole or not round.model_only) and round.begin(settings, 1)
            ]
            most = max(most, 1 + len(rounds))
            least = max(least, 1 + sum(whole or not round.unless for round in rounds))
        return least, most

    @property
    def bytes_memory(self) -> int:
        """Upper estimate of the anonymous memory of one worker's blocks, in bytes.

        A method that works on rows holds one row of each model at a time, however long. What
        arcee_fusion keeps besides, 16 bytes a row, is not counted."""
        row = self.recipe.method.row
        longest = max((row(t.settings, t.shape) for t in self.tensors if not t.copied), default=1)
        return (4 * BLOCK * 6 + 24 * longest * (longest > 1)) * (len(self.checkpoints) + 1)

    @property
    def index(self) -> dict[str, Any] | None:
        """The content of the shard index, if there is more than one shard."""
        if len(self.headers) == 1:
            return None
        total = sum(tensor.nbytes for tensor in self.tensors)
        files = {tensor.name: tensor.file for tensor in self.tensors}
        return {"metadata": {"total_size": total}, "weight_map": files}


def make_plan(recipe: Recipe, folders: Mapping[str, Path], *, shard_size: int) -> Plan:
    """Plan a merge of the models in `folders` (`locate.folders`: by their names in the recipe).

    Raises UserError with everything that is wrong with recipe and models together."""
    problems = Problems()
    opened = _open_all(recipe, folders, problems)
    donor = opened[recipe.base or recipe.models[0]]
    merged = spelled_alike({name: opened[name] for name in recipe.merged}, donor)
    checkpoints = opened | merged
    modules = parts(recipe, merged, donor, problems)
    problems.raise_if_any()
    vocabulary = None
    if recipe.tokenizer:
        vocabulary = build(checkpoints, recipe.base, recipe.models, recipe.tokenizer)
    planner = Planner(recipe, modules, problems, vocabulary)
    tensors = planner.tensors()
    warnings = [
        *_twins(folders, recipe),
        *warnings_about(merged, donor, problems, tokens=vocabulary is None),
        *planner.notes,
        *(vocabulary.warnings if vocabulary else ()),
    ]
    problems.raise_if_any()
    shards, headers = lay_out(tensors, shard_size)
    config = merged_config(modules, donor, shards)
    config = vocabulary.config(config) if vocabulary else config
    return Plan(recipe, checkpoints, donor, shards, headers, config, tuple(warnings), vocabulary)


def _twins(folders: Mapping[str, Path], recipe: Recipe) -> Iterator[str]:
    """Names of the recipe that stand for one folder."""
    seen: dict[Path, str] = {}
    for name in (name for name in recipe.merged if name in folders):
        other = seen.setdefault(folders[name].resolve(), name)
        if other != name:
            yield f"{other} and {name} are the same model, which takes part twice"


def _open_all(
    recipe: Recipe, folders: Mapping[str, Path], problems: Problems
) -> dict[str, Checkpoint]:
    """Every model of the recipe, MODEL+ADAPTER with its adapter applied."""
    found: dict[str, Checkpoint] = {}
    for name in recipe.models:
        try:
            if name in folders:
                found[name] = open_checkpoint(folders[name], name)
                continue
            model, adapter = split_name(name, folders.__contains__) or (name, name)
            plain = open_checkpoint(folders[model], model)
            found[name] = open_adapted(plain, folders[adapter], name)
        except UserError as error:
            problems.add(str(error))
    problems.raise_if_any()
    return found


def describe(plan: Plan) -> dict[str, Any]:
    """The plan as plain data: the fields of `mergelab plan --json`, `costs` apart (docs/study.md).

    method: name and version
    base: the recipe's base_model, or None
    inputs: per model its folder (with that of an adapter), number of tensors, and of layers
    vocabulary: what becomes of the tokens, in words; empty if they stay as they are
    dtypes: data types of the output, sorted
    tensors: number of output tensors
    files: names of the weight files, and of their index if there are several
    bytes_in: bytes of input tensors that one pass reads (`costs` has the passes)
    bytes_out: bytes of all weight files
    bytes_memory: bytes of one worker's blocks, estimated (`Plan.bytes_memory`)
    warnings: what the merge will note, one sentence each
    groups: values of parameters (`shared`, and by expert in `models`), with their `tensors`"""
    groups: dict[str, dict[str, Any]] = {}
    for tensor in plan.tensors:
        each = zip(tensor.models, tensor.settings.experts, strict=True)
        values = {"shared": dict(tensor.settings.shared), "models": {m: dict(v) for m, v in each}}
        group = groups.setdefault(json.dumps(values, sort_keys=True), {**values, "tensors": []})
        group["tensors"].append(tensor.name)
    return {
        "method": f"{plan.recipe.method.name} v{plan.recipe.method.version}",
        "base": plan.recipe.base,
        "inputs": {
            name: {
                "folder": ", ".join(
                    str(place) for place in dict.fromkeys([c.place, *(p.parent for p in c.extra)])
                ),
                "tensors": len(c.tensors),
                "layers": c.layers,
            }
            for name, c in plan.checkpoints.items()
        },
        "vocabulary": _vocabulary(plan),
        "dtypes": sorted({NAMES.get(t.dtype, t.dtype) for t in plan.tensors}),
        "tensors": len(plan.tensors),
        "files": [*plan.headers, *([INDEX] if plan.index else [])],
        "bytes_in": plan.bytes_in,
        "bytes_out": plan.bytes_out,
        "bytes_memory": plan.bytes_memory,
        "warnings": list(plan.warnings),
        "groups": list(groups.values()),
    }


def _vocabulary(plan: Plan) -> str:
    """What becomes of the vocabulary, in words; nothing if it stays as it is."""
    vocabulary = plan.vocabulary
    if vocabulary is None or not vocabulary.changed:
        return ""
    models = ", ".join(f"{name} {rows:,}" for name, rows in vocabulary.rows.items())
    padding = vocabulary.size - len(vocabulary.tokens)
    padded = f", {padding:,} rows of padding" if padding else ""
    return f"{vocabulary.size:,} rows: {len(vocabulary.tokens):,} tokens{padded} (rows of {models})"
