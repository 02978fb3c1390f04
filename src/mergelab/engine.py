"""The engine: surveys and merges a planned model block by block, and writes it where planned.

Memory is a few blocks per model and worker, whatever the size of tensors, shards and models (C2).
Blocks of a tensor are folded in order; workers take different tensors: same bytes (C3)."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mergelab.checkpoint import FLOATS, INDEX, Tensor, count_not_finite, from_float
from mergelab.errors import UserError
from mergelab.folders import alone, building
from mergelab.methods.base import BLOCK, Array, Block, Method, Stats, Sums
from mergelab.plan import Plan
from mergelab.progress import Bar, bar, say, size
from mergelab.record import (
    canonical,
    file_entries,
    file_sha256,
    machine,
    packages,
    write_bytes,
    write_json,
)
from mergelab.writer import (
    RECORD,
    Planned,
    check_replaceable,
    check_space,
    check_target,
    disk_full,
    shards,
    write_at,
)

VERSION = 2  # of plan, engine and rounding; methods have versions of their own


def merge(plan: Plan, out: Path, *, workers: int = 1, seed: int = 0) -> dict[str, Any]:
    """Carry out a plan; `out` becomes the merged model with its record. Returns the record.

    If `out` already holds this very merge, nothing is done. Raises UserError for a full disk,
    an unusable `out`, or a result that is not finite; then `out` is as it was before."""
    check_target(out, [checkpoint.folder for checkpoint in plan.checkpoints.values()])
    out = out.resolve() if out.is_symlink() else out
    if not out.exists():
        check_space(out, plan.bytes_out)
    small = _small_files(plan)
    identity = _identity(plan, small, seed, _inputs(plan, workers))
    with alone(out):
        record = _finished(out, identity)
        if record:
            say(f"{out}: is up to date")
            return record
        check_space(out, plan.bytes_out)
        replaced = check_replaceable(out)
        with building(out, "merge") as folder, disk_full(out):
            record = _build(plan, folder, small, identity, workers)
    again = " (in place of an earlier merge)" if replaced else ""
    dtypes = ", ".join(sorted({t.dtype for t in plan.tensors}))
    say(f"wrote {out}: {len(plan.tensors)} tensors, {size(plan.bytes_out)}, {dtypes}{again}")
    return record


def _build(
    plan: Plan, folder: Path, small: dict[str, bytes], identity: dict[str, Any], workers: int
) -> dict[str, Any]:
    """Write the whole model into `folder`, its record last."""
    started = time.monotonic()
    hashes = _write_weights(plan, folder, workers, identity["seed"])
    for name, data in small.items():
        write_bytes(folder / name, data)
    names = [path.name for path in folder.iterdir()]
    record = {
        **identity,
        "outputs": {"files": file_entries(folder, names), "tensors": hashes},
        "warnings": list(plan.warnings),
        "packages": packages(),
        "machine": machine(),
        "workers": workers,
        "seconds": round(time.monotonic() - started, 3),
    }
    write_json(folder / RECORD, record)
    return record


def _identity(
    plan: Plan, small: dict[str, bytes], seed: int, inputs: list[dict[str, Any]]
) -> dict[str, Any]:
    """Everything that fixes the bytes of all files: two merges that agree here are the same."""
    recipe = plan.recipe
    return {
        "recipe": {"name": recipe.path.stem, "sha256": recipe.sha256, "text": recipe.text},
        "method": {"name": recipe.method.name, "version": recipe.method.version},
        "engine": VERSION,
        "inputs": inputs,
        "seed": seed,
        "small_files": {n: hashlib.sha256(data).hexdigest() for n, data in small.items()},
        "layout": {n: hashlib.sha256(head).hexdigest() for n, head in plan.headers.items()},
    }


def _small_files(plan: Plan) -> dict[str, bytes]:
    """Config, index, tokenizer and generation files of the merged model, by name."""
    files = {}
    try:
        for name in plan.donor.tokenizer_files:
            files[name] = (plan.donor.folder / name).read_bytes()
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}.") from None
    values = {"config.json": plan.config} | ({INDEX: plan.index} if plan.index else {})
    for name, value in values.items():
        files[name] = (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
    return files


def _inputs(plan: Plan, workers: int) -> list[dict[str, Any]]:
    """Each model's weight files with size and sha256, in recipe order."""
    paths = [(c, c.folder / name) for c in plan.checkpoints.values() for name in c.files]
    total = sum(path.stat().st_size for _, path in paths)
    with bar("hash inputs", total) as progress, ThreadPoolExecutor(workers) as pool:
        hashes = list(pool.map(lambda pair: file_sha256(pair[1], progress.advance), paths))
    files: dict[str, list[dict[str, Any]]] = {label: [] for label in plan.checkpoints}
    for (checkpoint, path), sha256 in zip(paths, hashes, strict=True):
        entry = {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256}
        files[checkpoint.label].append(entry)
    return [{"model": label, "files": entries} for label, entries in files.items()]


def _finished(out: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The record of `out` if it is this very merge and every file still has its hash."""
    try:
        record: dict[str, Any] = json.loads((out / RECORD).read_bytes())
        if canonical({key: record.get(key) for key in identity}) != canonical(identity):
            return None
        files = record["outputs"]["files"]
        whole = all(file_sha256(out / file["name"]) == file["sha256"] for file in files)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if whole else None


def _write_weights(plan: Plan, folder: Path, workers: int, seed: int) -> dict[str, str]:
    """Merge every tensor; returns sha256 of each one's bytes, by name."""
    total = sum(tensor.nbytes for tensor in plan.tensors)
    with (
        shards(folder, plan.headers, plan.tensors),
        bar(f"merge ({plan.recipe.method.name})", total) as progress,
        ThreadPoolExecutor(workers) as pool,
    ):

        def work(tensor: Planned) -> str:
            with (folder / tensor.file).open("r+b") as file:
                task = _TensorMerge(plan.recipe.method, tensor, seed)
                return task.write(file.fileno(), progress)

        futures = [pool.submit(work, tensor) for tensor in plan.tensors]
        try:
            hashes = [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return dict(zip((t.name for t in plan.tensors), hashes, strict=True))


class _TensorMerge:
    """One output tensor: survey rounds over its blocks, then the merge pass."""

    def __init__(self, method: Method, tensor: Planned, seed: int) -> None:
        self.method, self.tensor = method, tensor
        self.keys = tensor.keys(seed) if method.random else ()
        wide = "F64" in {tensor.dtype, *(source.dtype for source in tensor.sources)}
        self.work = "<f8" if wide else "<f4"

    def write(self, handle: int, progress: Bar) -> str:
        digest = hashlib.sha256()
        position = self.tensor.offset
        for bits in self.copied() if self.tensor.copied else self.merged():
            data = np.ascontiguousarray(bits).view("u1").data
            write_at(handle, data, position)
            digest.update(data)
            position += len(data)
            progress.advance(len(data))
        return digest.hexdigest()

    def starts(self) -> range:
        return range(0, self.tensor.size, BLOCK)

    def block(self, start: int) -> Block:
        stop = min(start + BLOCK, self.tensor.size)

        def read(source: Tensor) -> Array:
            return source.floats(start, stop, self.work)

        base = read(self.tensor.base) if self.tensor.base else None
        experts = tuple(read(expert) for expert in self.tensor.experts)
        return Block(base, experts, start, self.tensor.size, self.keys)

    def survey(self) -> tuple[dict[str, Any], Iterator[Sums]]:
        """Statistics after all rounds, and the last round's sums in front of each block."""
        stats: dict[str, Any] = {}
        last: list[Sums] = []
        settings = self.tensor.settings
        for number, round in enumerate(self.method.rounds, start=1):
            parts = (round.measure(self.block(s), settings, stats) for s in self.starts())
            if number == len(self.method.rounds):
                last = list(parts)
            total = _fold(last or parts)
            stats = {**stats, **round.conclude(total, settings, stats)}
        return stats, _running(last)

    def merged(self) -> Iterator[Array]:
        if not self.tensor.size:
            return
        stats, running = self.survey()
        for start, before in zip(self.starts(), running, strict=False):
            yield self.merge_block(self.block(start), stats, before)

    def merge_block(self, block: Block, stats: Stats, before: Sums) -> Array:
        with np.errstate(over="ignore", invalid="ignore"):
            values = self.method.merge(block, self.tensor.settings, stats, before)
            bits = from_float(values, self.tensor.dtype)
        self.check_finite(bits)
        return bits

    def check_finite(self, bits: Array) -> None:
        dtype = self.tensor.dtype
        if dtype in FLOATS and (wrong := count_not_finite(bits, dtype)):
            raise UserError(
                f"tensor {self.tensor.name}: {wrong} merged entries are infinite or not a number. "
                "Check the inputs for the same, or use a wider dtype."
            )

    def copied(self) -> Iterator[Array]:
        """The source's bits, once all sources are seen to hold the same."""
        first, *others = (source.bits() for source in self.tensor.sources)
        for start in self.starts():
            bits = first[start : start + BLOCK]
            if not all(np.array_equal(bits, o[start : start + BLOCK]) for o in others):
                raise UserError(
                    f"tensor {self.tensor.name}: is stored as integers that differ between the "
                    "models, and integers cannot be merged. Remove it or make the models agree."
                )
            self.check_finite(bits)
            yield bits


def _fold(parts: Iterable[Sums]) -> Sums:
    """Add measurements over blocks, in block order."""
    total: Sums = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total[name] + value if name in total else value
    return total


def _running(parts: list[Sums]) -> Iterator[Sums]:
    """For each block the sums over all blocks in front of it; endless zeros without a survey."""
    if not parts:
        yield from itertools.repeat({})
    total = {name: np.zeros_like(value) for name, value in parts[0].items()}
    for part in parts:
        yield total
        total = {name: total[name] + value for name, value in part.items()}
