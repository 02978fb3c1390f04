"""One output tensor, block by block: read the sources, survey, merge, write at the planned offset.

Memory is one block per model (C2): a worker keeps its buffers from tensor to tensor."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from mergelab.checkpoint import BITS, FLOATS, Tensor, count_not_finite, from_float, to_float
from mergelab.errors import UserError
from mergelab.kernels import count_full
from mergelab.methods.averages import PASSTHROUGH
from mergelab.methods.base import BLOCK, Array, Block, Method, Stats, Sums
from mergelab.progress import Bar
from mergelab.writer import Planned, write_at

EXPONENTS: dict[str, Any] = {  # per type of block: words that hold its bits, and the exponent
    "<u2": np.uint16(0x7F80),
    "<f4": np.uint32(0x7F800000),
    "<f8": np.uint64(0x7FF << 52),
}


MOST_OPEN = min(200, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)  # others: per read


class Files:
    """Open input files; reading at an offset needs no lock, and ends with the work."""

    def __init__(self, progress: Bar | None = None) -> None:
        self._progress = progress
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def read(self, path: Path, offset: int, out: Array) -> None:
        """Fill `out` (contiguous) with the bytes at an offset."""
        if self._progress:
            self._progress.check()
        with self._lock:
            handle = self._open.get(path)
            passing = handle is None and len(self._open) >= MOST_OPEN
            if handle is None:
                handle = os.open(path, os.O_RDONLY)
                if not passing:
                    self._open[path] = handle
        try:
            view = out.view("u1").data
            while view:
                count = os.preadv(handle, [view], offset)
                if count == 0:
                    raise UserError(f"{path}: became shorter while it was read. Run it again.")
                view, offset = view[count:], offset + count
        finally:
            if passing:
                os.close(handle)

    def close(self) -> None:
        """Close all files."""
        for handle in self._open.values():
            with suppress(OSError):
                os.close(handle)


class Buffers(threading.local):
    """Arrays that a worker uses again and again, by purpose."""

    def __init__(self) -> None:
        self._held: dict[str, Array] = {}

    def get(self, name: str, size: int, dtype: Any) -> Array:
        """An array of `size` elements; what it holds is left from its last use."""
        held = self._held.get(name)
        if held is None or held.nbytes < size * np.dtype(dtype).itemsize:
            held = self._held[name] = np.empty(size * np.dtype(dtype).itemsize, "u1")
        return held[: size * np.dtype(dtype).itemsize].view(dtype)


class TensorMerge:
    """The surveys and the merge of one output tensor."""

    def __init__(
        self,
        method: Method,
        tensor: Planned,
        seed: int,
        files: Files,
        buffers: Buffers,
        *,
        lenient: bool = False,
    ) -> None:
        stored = all(isinstance(source, Tensor) for source in tensor.sources)
        self.bits_copied = tensor.copied and stored and tensor.sources[0].dtype == tensor.dtype
        if tensor.copied:
            method = PASSTHROUGH
        self.method, self.tensor, self.files, self.buffers = method, tensor, files, buffers
        self.lenient = lenient
        self.size = tensor.size
        self.keys = tensor.keys(seed) if method.random else ()
        dtypes = {tensor.dtype, *(source.dtype for source in tensor.sources)}
        self.kind = "<u2" if stored and dtypes == {"BF16"} else "<f4"
        if "F64" in dtypes:
            self.kind = "<f8"
        self.row = max(1, method.row(tensor.settings, tensor.shape))
        self.step = max(1, BLOCK // self.row) * self.row
        self.wrong = np.zeros(len(tensor.sources), np.int64)
        self.looked = method.spreads  # the merged entries will tell

    @property
    def whole_model(self) -> bool:
        """Are the surveys' sums to run over all tensors?"""
        return bool(self.tensor.settings.shared.get("scope") == "model")

    def starts(self) -> range:
        """First elements of the blocks."""
        return range(0, self.size, self.step)

    def blocks(self) -> Iterator[Block]:
        """The blocks in order; the first time round, entries that are not finite are counted."""
        looked, self.looked = self.looked or self.lenient, True
        for start in self.starts():
            values = self.read(start, min(start + self.step, self.size))
            if not looked:
                self.count_wrong(values, self.wrong)
            based = self.tensor.base is not None
            yield Block(values, based, start, self.size, self.row, self.keys)
        if not looked:
            self.check_inputs()

    def read(self, start: int, stop: int) -> Array:
        """Entries [start, stop) of all sources, the base first: (M, stop - start)."""
        count = stop - start
        sources = self.tensor.sources
        values = self.buffers.get("values", len(sources) * count, self.kind)
        values = values.reshape(len(sources), count)
        for row, source in zip(values, sources, strict=True):
            if not isinstance(source, Tensor):
                row[:] = source.floats(start, stop, self.kind)
            elif BITS[source.dtype] == self.kind:
                self.files.read(source.file, source.offset + start * row.itemsize, row)
            else:
                raw = self.buffers.get("raw", count, BITS[source.dtype])
                self.files.read(source.file, source.offset + start * raw.itemsize, raw)
                row[:] = to_float(raw, source.dtype, self.kind)
        return values

    def survey_round(self, number: int, stats: Stats) -> Sums:
        """The sums of one survey round over this tensor; nothing if the round is not needed."""
        round = self.method.rounds[number]
        settings = self.tensor.settings
        if round.unless in stats or (round.model_only and not self.whole_model):
            return {}
        sums = round.begin(settings, self.row)
        if sums:
            for block in self.blocks():
                round.measure(block, settings, stats, sums)
        return sums

    def survey(self) -> Stats:
        """Statistics after all rounds over this tensor alone."""
        stats: dict[str, Any] = {}
        for number, round in enumerate(self.method.rounds):
            if sums := self.survey_round(number, stats):
                try:
                    with np.errstate(all="ignore"):
                        stats |= round.conclude(sums, self.tensor.settings, stats)
                except ValueError as error:
                    raise UserError(f"tensor {self.tensor.name}: {error}") from None
        return stats

    def write(self, handle: int, progress: Bar, stats: Stats | None, state: Sums | None) -> str:
        """Merge into the open file; the hash of the tensor's bytes.

        `stats` and `state` come from a survey of the whole model, if there was one."""
        digest = xxhash.xxh3_128()
        position = self.tensor.offset
        for bits in self.output(stats, state):
            data = bits.view("u1").data
            write_at(handle, data, position)
            digest.update(data)
            position += len(data)
            progress.advance(len(data))
        return digest.hexdigest()

    def output(self, stats: Stats | None = None, state: Sums | None = None) -> Iterator[Array]:
        """The output's bits, block by block; a block is gone when the next one is asked for."""
        return self.copied() if self.bits_copied else self.merged(stats, state)

    def merged(self, stats: Stats | None, state: Sums | None) -> Iterator[Array]:
        """The merged bits, block by block."""
        if not self.size:
            return
        settings, dtype = self.tensor.settings, self.tensor.dtype
        wrong = np.zeros(1, np.int64)
        stats = self.survey() if stats is None else stats
        if state is None:
            state = self.method.running(settings, self.row) if self.method.running else {}
        for block in self.blocks():
            out = self.buffers.get("out", block.values.shape[1], self.kind)
            self.method.merge(block, settings, stats, state, out)
            if self.kind != BITS[dtype]:
                with np.errstate(over="ignore", invalid="ignore"):
                    out = from_float(out, dtype)
                wrong[0] += 0 if self.lenient else count_not_finite(out, dtype)
            elif not self.lenient:
                self.count_wrong(out[None], wrong)
            yield out
        if wrong[0]:
            self.look_again()
            raise UserError(
                f"tensor {self.tensor.name}: {wrong[0]} merged entries are infinite or not a "
                "number, though all inputs are finite. Use a wider dtype or smaller weights; "
                "'allow_not_finite: true' in the recipe merges it as it is."
            )

    def copied(self) -> Iterator[Array]:
        """The source's bits, once all sources are seen to hold the same."""
        dtype = self.tensor.dtype
        for start in range(0, self.size, BLOCK):
            count = min(BLOCK, self.size - start)
            for number, source in enumerate(self.tensor.sources):
                bits = self.buffers.get(f"bits{min(number, 1)}", count, BITS[dtype])
                self.files.read(source.file, source.offset + start * bits.itemsize, bits)
                if number == 0:
                    first = bits
                elif not np.array_equal(first.view("u1"), bits.view("u1")):
                    raise UserError(
                        f"tensor {self.tensor.name}: is stored as integers that differ between "
                        "the models, and integers cannot be merged. Remove it or make the models "
                        "agree."
                    )
            if dtype in FLOATS and not self.lenient:
                self.wrong[0] += count_not_finite(first, dtype)
            yield first
        self.check_inputs()

    def count_wrong(self, values: Array, counts: Array) -> None:
        """Add to counts (M) how many entries of a block (M, S) are infinite or NaN."""
        mask = EXPONENTS[self.kind]
        count_full(values.view(mask.dtype), mask, counts)

    def look_again(self) -> None:
        """Raise UserError if it is an input that has entries that are not finite."""
        self.looked = False
        for _ in self.blocks():
            pass

    def check_inputs(self) -> None:
        """Raise UserError if an input has entries that are not finite."""
        names = [*(["the base"] if self.tensor.base else []), *self.tensor.models]
        told = [
            f"{count} entries of {name}"
            for name, count in zip(names, self.wrong, strict=True)
            if count
        ]
        if told:
            raise UserError(
                f"tensor {self.tensor.name}: {', '.join(told)} are infinite or not a number. The "
                "model is damaged or was saved too narrow; 'allow_not_finite: true' in the recipe "
                "merges it as it is."
            )
