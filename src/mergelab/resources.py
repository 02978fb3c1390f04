"""What each step asks of a scheduler: threads, memory, minutes, disk, and where it may run.

From the merge plan and the size of the model, with constants measured on the demo and SmolLM2
(docs/cluster.md) and room to spare; never part of a result. A step that is killed all the same
asks for twice as much at its next attempt."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergelab import inference, locate, lockfile, models
from mergelab.cluster import Cluster
from mergelab.errors import UserError
from mergelab.estimate import bytes_hashed
from mergelab.plan import SHARD_SIZE, Plan, make_plan
from mergelab.steps import Steps
from mergelab.study import Training

MB = 1_000_000
GB = 1_000_000_000
SNAKEMAKE = 450 * MB  # the two Snakemakes of a Slurm job
START = {  # bytes that a verb holds before it has read anything of size
    "data": 500 * MB,
    "fetch": 700 * MB,
    "train": 700 * MB,
    "merge": 300 * MB,
    "evaluate": 900 * MB,
    "probe": 800 * MB,
    "detect": 600 * MB,
    "audit": 600 * MB,
    "report": 600 * MB,
}
UNKNOWN = 16 * GB  # a hub model that no lock names: 8e9 parameters in bfloat16
BLOCKS = 64 * MB  # a worker's blocks, before the plan can tell
VOCABULARY = 128_000  # before config.json can tell
TOKENS = 2048  # of the longest texts that are scored
COPIES = {"train": 10, "evaluate": 6, "probe": 3}  # float32 arrays of the logits' size, at once
READS = 100 * MB  # bytes per second of a slow shared disk
FLOPS = {"cpu": 3e10, "gpu": 1e13}  # of one thread or GPU, per second
ITEMS = 1000  # of a benchmark or part, where the study does not say
ITEM_TOKENS = 500  # with all its options
LEAST = 10  # minutes; starting up alone can take two on a busy disk


@dataclass(frozen=True)
class Needs:
    """What a step asks for: threads, memory and disk in MB, runtime in minutes."""

    threads: int
    mem_mb: int
    runtime: int
    disk_mb: int


class Estimates:
    """The needs of a study's steps; `results` is the folder of the study's results.

    Files that are here are measured; what is still to come is estimated from its source."""

    def __init__(self, steps: Steps, results: Path, cluster: Cluster) -> None:
        self.steps, self.study = steps, steps.study
        self.results, self.cluster = results, cluster
        self._plans: dict[str, Plan] = {}

    def needs(self, verb: str, name: str, attempt: int) -> Needs:
        """What a step asks for at its first, second, ... attempt."""
        memory, seconds, disk, threads = getattr(self, f"_{verb}", self._small)(verb, name)
        more = 2 ** (attempt - 1)
        minutes = (LEAST + math.ceil(seconds / 60)) * more
        return Needs(
            threads=threads,
            mem_mb=math.ceil((SNAKEMAKE + START[verb] + memory) * more / MB / 100) * 100,
            runtime=min(minutes, max(1, round(self.cluster.hours * 60))),
            disk_mb=math.ceil(disk / MB) + 1,
        )

    def places(self, verb: str) -> dict[str, Any]:
        """Account, partition and GPU of a verb, as the Slurm plugin names them."""
        cluster = self.cluster
        gpu = cluster.offers_gpu and verb in ("evaluate", "probe")
        found: dict[str, Any] = {
            "slurm_account": cluster.account,
            "slurm_partition": (gpu and cluster.gpu_partition) or cluster.partition,
            "gpu": 1 if gpu else 0,
            "gpu_model": cluster.gpu if gpu else "",
        }
        return {name: value for name, value in found.items() if value}

    def parts(self, name: str) -> int:
        """Into how many parts a merge is divided: one per `part_gb` of weights that it reads.

        Depends on the models' sources only, so that every process of a run says the same."""
        read = sum(self._source(model) for model in self._models(name))
        return max(1, min(999, math.ceil(read / (self.cluster.part_gb * GB))))

    # Each gives bytes of memory, seconds, bytes of disk, and threads.

    def _small(self, verb: str, name: str) -> tuple[float, float, float, int]:
        return 0, 0, 0, 1

    def _fetch(self, verb: str, name: str) -> tuple[float, float, float, int]:
        size = self.weights(name)
        return 0, size / READS, size, 1

    def _merge(self, verb: str, name: str) -> tuple[float, float, float, int]:
        plan = self.plan(name)
        if plan:
            held, blocks, written = bytes_hashed(plan), plan.bytes_memory, plan.bytes_out
            read = held + plan.passes[1] * plan.bytes_in
        else:
            sizes = [self.weights(model) for model in self._models(name)]
            held, blocks, written = sum(sizes), BLOCKS, max(sizes, default=0)
            read = 4 * held  # to be hashed, and in three passes
        threads = 2 if held < 2 * GB else 8
        return blocks * threads, (read + 3 * written) / READS, written, threads

    def _train(self, verb: str, name: str) -> tuple[float, float, float, int]:
        """float32 weights, gradients and AdamW's two moments; logits of a batch."""
        plan = self.study.models[name].train
        assert plan is not None  # it is a train step
        parameters = self._parameters(name)
        vocabulary, _ = self._shape(name)
        logits = 4 * plan.batch_size * plan.sequence_length * vocabulary
        items = sum((share.items or ITEMS) * share.copies for share in plan.data)
        tokens = items * plan.epochs * plan.sequence_length
        seconds = 6 * parameters * tokens / FLOPS["cpu"]
        return 18 * parameters + COPIES["train"] * logits, seconds, 4 * parameters, 1

    def _evaluate(self, verb: str, name: str) -> tuple[float, float, float, int]:
        items = sum(bench.limit or self._items(bench.data) for bench in self.study.suite)
        return self._scored(verb, name, items)

    def _probe(self, verb: str, name: str) -> tuple[float, float, float, int]:
        checks = self.study.contamination
        parts = {part for check in checks for part in (check.suspects, check.controls)}
        return self._scored(verb, name, sum(map(self._items, parts)))

    def _scored(self, verb: str, name: str, items: int) -> tuple[float, float, float, int]:
        """Weights, and the logits of the largest batch that inference.py makes."""
        vocabulary, tokens = self._shape(name)
        logits = 4 * inference.batch_size(vocabulary, tokens) * vocabulary * tokens
        device = "gpu" if self.cluster.offers_gpu else "cpu"
        seconds = 2 * self._parameters(name) * items * ITEM_TOKENS / FLOPS[device]
        return 1.5 * self.weights(name) + COPIES[verb] * logits, seconds, 0, 1

    def _items(self, part: str | None) -> int:
        """Number of items of a part, such as gsm8k/test."""
        dataset, _, name = (part or "").partition("/")
        known = self.study.datasets.get(dataset)
        return (known.parts.get(name) if known else None) or ITEMS

    def _parameters(self, name: str) -> float:
        """Number of parameters, of two bytes each where nobody says otherwise."""
        model = self.study.models.get(name)
        if model and model.train and model.train.architecture:
            return _size_of(model.train)
        if model and model.train and model.train.start:
            return self._parameters(model.train.start)
        return self.weights(name) / 2

    def _shape(self, name: str) -> tuple[int, int]:
        """Entries of the vocabulary, and tokens of the longest text that is scored."""
        facts: dict[str, Any] = {}
        folder, model = self._folder(name), self.study.models.get(name)
        with suppress(OSError, ValueError, RecursionError, TypeError):
            facts = json.loads((folder / "config.json").read_bytes()) if folder else {}
        if not facts and name in self.steps.recipes:
            return self._shape(next(self._models(name)))
        if not facts and model and model.train:
            if model.train.start:
                return self._shape(model.train.start)
            facts = dict(model.train.architecture or {})
        vocabulary = facts.get("vocab_size") or VOCABULARY
        length = facts.get("max_position_embeddings") or TOKENS
        return int(vocabulary), min(int(length), TOKENS)

    def plan(self, name: str) -> Plan | None:
        """The plan of a merge, or None while its models are not here or do not fit together."""
        if name not in self._plans and all(map(self._here, self._models(name))):
            recipe = self.steps.recipes[name]
            try:
                folders = locate.folders(recipe, self.results, weights=False)
                self._plans[name] = make_plan(recipe, folders, shard_size=SHARD_SIZE)
            except UserError:  # the merge itself says what is wrong
                return None
        return self._plans.get(name)

    def weights(self, name: str) -> int:
        """Bytes of a model's or merge's weights: of its files if they are here, else estimated."""
        folder = self._folder(name)
        return (folder and _held(folder)) or self._source(name)

    def _folder(self, name: str) -> Path | None:
        """Where a model of the study, a merge or a local model is or will be; None: on a hub."""
        own = name.removeprefix(locate.PREFIX)
        if own in self.study.variants:
            return models.folder(self.study, own, self.results)
        return locate.local(name)

    def _here(self, name: str) -> bool:
        folder = self._folder(name)
        return bool(folder and _held(folder))

    def _models(self, name: str) -> Iterator[str]:
        """Models and adapters that a merge reads, each once."""
        recipe = self.steps.recipes[name]
        pairs = [locate.parts(model, recipe, self.study) for model in recipe.models]
        yield from dict.fromkeys(part for pair in pairs for part in pair if part)

    def _source(self, name: str) -> int:
        """Bytes of weights by a model's source; the disk is only asked about local models."""
        own = name.removeprefix(locate.PREFIX)
        if own in self.steps.recipes:
            return max(map(self._source, self._models(own)), default=0)
        model = self.study.models.get(name)
        if model is None:
            found = locate.local(name)
            return _held(found) if found else self._locked(name)
        if model.hub:
            return self._locked(model.hub)
        if model.path:
            return _held(models.folder(self.study, name, self.results))
        if model.gguf:
            return GB
        return self._trained(model.train)

    def _trained(self, plan: Training | None) -> int:
        if plan and plan.start:
            return self._source(plan.start)
        return 4 * _size_of(plan) if plan else 0

    def _locked(self, hub_id: str) -> int:
        """Bytes of weights of a hub model, by the lock."""
        try:
            files = lockfile.resolve(hub_id, self.study.lock).files
        except UserError:
            return UNKNOWN
        return sum(f.size for f in files if f.name.endswith(locate.SUFFIX)) or UNKNOWN


def _held(folder: Path) -> int:
    """Bytes of the weight files in a folder, or of one file."""
    files = [folder] if folder.is_file() else folder.glob(f"*{locate.SUFFIX}")
    return sum(file.stat().st_size for file in files)


def _size_of(plan: Training) -> int:
    """Parameters of a Llama that is trained from scratch."""
    facts = {"vocab_size": 1024, "hidden_size": 4096, "num_hidden_layers": 32}
    facts |= {k: v for k, v in (plan.architecture or {}).items() if isinstance(v, int)}
    hidden = facts["hidden_size"]
    inner = facts.get("intermediate_size", 4 * hidden)
    return 2 * facts["vocab_size"] * hidden + facts["num_hidden_layers"] * hidden * (
        4 * hidden + 3 * inner
    )


def asked(estimates: Estimates, verb: str) -> dict[str, Any]:
    """The `resources:` of a verb's rule: constants, and functions of wildcards and attempt."""

    def amount(what: str) -> Callable[..., int]:
        def of(wildcards: Any, attempt: int) -> int:
            return int(getattr(estimates.needs(verb, wildcards.name, attempt), what))

        return of

    found: dict[str, Any] = {what: amount(what) for what in ("mem_mb", "runtime", "disk_mb")}
    return {**found, **estimates.places(verb)}
