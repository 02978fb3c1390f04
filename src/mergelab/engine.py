"""The engine: surveys and merges a planned model block by block, and writes it where planned.

Memory is a few blocks per model and worker, whatever the size of tensors, shards and models (C2).
Blocks of a tensor are taken in order; workers take different tensors: same bytes (C3). Finished
tensors are noted in a journal, so that a killed merge, or the parts of a divided one, go on."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from mergelab.blocks import Buffers, Files, TensorMerge
from mergelab.chat import chosen_template, with_template
from mergelab.checkpoint import INDEX
from mergelab.errors import UserError
from mergelab.folders import (
    alone,
    move_into_place,
    partial_folder,
    partial_folders,
    replaced_folder,
    sync,
)
from mergelab.hub_headers import check_whole
from mergelab.inputs import changed_input, check_layouts, hashed_inputs, input_states
from mergelab.journal import HASH, PATTERN, FileHashes, Journal
from mergelab.plan import Plan
from mergelab.progress import Bar, bar, say, size
from mergelab.record import (
    canonical,
    digest,
    file_sha256,
    machine,
    packages,
    write_bytes,
    write_json,
)
from mergelab.survey import in_order, survey_model
from mergelab.writer import (
    RECORD,
    Planned,
    check_removable,
    check_replaceable,
    check_space,
    check_target,
    disk_errors,
    is_full,
    place_shards,
    share,
)

VERSION = 5  # of plan, engine and rounding; methods have versions of their own
WHOLE = (1, 1)


def merge(
    plan: Plan, out: Path, *, workers: int = 1, seed: int = 0, part: tuple[int, int] = WHOLE
) -> dict[str, Any]:
    """Carry out a plan, or part i of n of it; `out` becomes the merged model with its record.

    Returns the record; nothing ({}) if other parts are still missing. If `out` already holds this
    very merge, nothing is done. Raises UserError for a full disk, files that may not be read or
    written, an unusable `out`, or entries that are not finite; then `out` is as it was before."""
    with disk_errors(out):
        check_target(out, [c.place for c in plan.checkpoints.values()])
        out = out.resolve() if out.is_symlink() else out
        check_space(out, plan.bytes_out - _held(out))
        for checkpoint in plan.checkpoints.values():
            check_whole(checkpoint.folder)
        small = _small_files(plan)
        states = input_states(plan)
        check_layouts(plan)
        identity = _identity(plan, small, seed, hashed_inputs(plan, workers))
        job = _Job(plan, out, small, identity, states, workers, part)
        with ExitStack() as held:
            if part == WHOLE:
                held.enter_context(alone(out))
            else:
                name = f"{out.name}.part-{part[0]}-of-{part[1]}"
                held.enter_context(alone(out.with_name(name)))
            return job.run()


class _Job:
    """One process's share of a merge."""

    def __init__(
        self,
        plan: Plan,
        out: Path,
        small: dict[str, bytes],
        identity: dict[str, Any],
        states: dict[Path, list[int]],
        workers: int,
        part: tuple[int, int],
    ) -> None:
        self.plan, self.out, self.small, self.identity = plan, out, small, identity
        self.states = states
        self.workers, self.part = workers, part
        self.started = time.monotonic()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else makes or finishes the folder meanwhile; a whole merge holds this anyway."""
        if self.part == WHOLE:
            yield
        else:
            with alone(self.out):
                yield

    def run(self) -> dict[str, Any]:
        """Write this part's tensors; finish the model if they were the last."""
        with self.alone():
            shutil.rmtree(replaced_folder(self.out), ignore_errors=True)
            record = _finished(self.out, self.identity)
            if record:
                say(f"{self.out}: is up to date")
                return record
            folder = self.prepare()
            if record := _finished(folder, self.identity):  # killed before it was put in place
                return self.put(folder, record)
        try:
            journal = Journal(folder, "{}-of-{}".format(*self.part))
            hashed = self.write(folder, journal)
            self.check_inputs(journal)
            with self.alone():
                return self.finish(folder, journal, hashed)
        except BaseException as error:
            if isinstance(error, FileNotFoundError) and not folder.is_dir():
                return self.done_elsewhere()
            hopeless = isinstance(error, UserError) or is_full(error)
            whole = (folder / RECORD).exists()  # only its place was not free
            if self.part == WHOLE and hopeless and not whole and _one_journal(folder):
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def done_elsewhere(self) -> dict[str, Any]:
        """The record, if other parts finished the model while this one was at work."""
        record = _finished(self.out, self.identity)
        if record is None:
            raise UserError(
                f"{self.out}: another merge removed what this part was writing. "
                "Merge one recipe at a time into a folder, and run the parts again."
            ) from None
        return record

    def prepare(self) -> Path:
        """The partial folder, with every shard at its full size; kept from an interrupted run."""
        check_replaceable(self.out)
        check_removable(self.out, replaced_folder(self.out))
        key = digest(self.identity)[:12]
        folder = partial_folder(self.out, f"merge-{key}")
        try:
            for path in folder.glob(".*"):  # files that a kill left half-written
                path.unlink()
            check_space(self.out, self.plan.bytes_out - _allocated(folder))
            place_shards(folder, self.plan.headers, self.plan.tensors)
        except BaseException:
            if not any(folder.glob(PATTERN)):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        return folder

    def write(self, folder: Path, journal: Journal) -> dict[str, str]:
        """Merge this part's tensors that are not done yet; the sha256 of each file, if whole."""
        mine = share(self.plan.tensors, *self.part)
        method = self.plan.recipe.method
        total = sum(tensor.nbytes for tensor in mine)
        with ExitStack() as stack:
            progress = stack.enter_context(bar(f"merge ({method.name})", total))
            files, buffers, hashed = Files(progress), Buffers(), self.file_hashes(folder, progress)
            stack.callback(files.close)
            stack.callback(hashed.close)
            pool = stack.enter_context(ThreadPoolExecutor(self.workers))
            stack.callback(progress.end)  # Ctrl-C: the pool waits for a block, not for a tensor

            def task(tensor: Planned) -> TensorMerge:
                return TensorMerge(
                    method,
                    tensor,
                    self.identity["seed"],
                    files,
                    buffers,
                    lenient=self.plan.recipe.allow_not_finite,
                )

            surveyed = survey_model(self.plan, task, pool, self.workers)

            def work(tensor: Planned) -> None:
                if journal.holds(tensor, progress):
                    progress.advance(tensor.nbytes)
                else:
                    with (folder / tensor.file).open("r+b") as file:
                        known = surveyed.get(tensor.name, (None, None))
                        found = task(tensor).write(file.fileno(), progress, *known)
                    journal.add(tensor.name, found)
                if self.part == WHOLE:
                    hashed.written(tensor)

            for _ in stack.enter_context(closing(in_order(pool, work, mine))):
                pass
        if self.part != WHOLE:
            for file in {tensor.file for tensor in mine}:
                sync(folder / file)
        return hashed.found

    def finish(self, folder: Path, journal: Journal, hashed: dict[str, str]) -> dict[str, Any]:
        """Put the model in place if all parts are there; its record is written last."""
        if not folder.is_dir():  # another part was faster
            return self.done_elsewhere()
        journal.load()
        missing = [t for t in self.plan.tensors if t.name not in journal.done | journal.noted]
        if missing:
            say(
                f"part {self.part[0]} of {self.part[1]} is done; "
                f"{len(missing)} tensors of other parts are still to come"
            )
            return {}
        if not hashed:
            hashed = self.hash_parts(folder, journal)
        for name, data in self.small.items():
            write_bytes(folder / name, data)
        record = self.record(folder, journal, hashed)
        write_json(folder / RECORD, record)
        return self.put(folder, record)

    def hash_parts(self, folder: Path, journal: Journal) -> dict[str, str]:
        """The sha256 of each file that several processes filled, once all tensors are checked."""
        tensors = self.plan.tensors
        with bar("check parts", sum(tensor.nbytes for tensor in tensors)) as progress:
            hashed = self.file_hashes(folder, progress)
            for tensor in tensors:
                if not journal.holds(tensor, progress):
                    raise UserError(
                        f"{self.out}: tensor {tensor.name} is not as it was written. "
                        "Check the disk, and run the parts again."
                    )
                hashed.written(tensor)
                progress.advance(tensor.nbytes)
        return hashed.found

    def file_hashes(self, folder: Path, progress: Bar) -> FileHashes:
        """The sha256 of the weight files, none of it taken yet."""
        return FileHashes(folder, self.plan.headers, self.plan.tensors, progress)

    def put(self, folder: Path, record: dict[str, Any]) -> dict[str, Any]:
        """Put the whole model in place."""
        for path in folder.glob(PATTERN):
            path.unlink()
        replaced = check_replaceable(self.out)
        move_into_place(folder, self.out)
        self.tell(replaced)
        return record

    def check_inputs(self, journal: Journal) -> None:
        """Raise UserError if an input was written to meanwhile; then nothing is kept."""
        if path := changed_input(self.plan, self.states, self.identity["inputs"]):
            journal.path.unlink(missing_ok=True)
            raise UserError(
                f"{path}: was changed while it was merged; nothing was kept. "
                "Run the same command again once nobody writes to it."
            )

    def record(self, folder: Path, journal: Journal, hashed: dict[str, str]) -> dict[str, Any]:
        """What happened."""
        hashed = hashed | {n: hashlib.sha256(data).hexdigest() for n, data in self.small.items()}
        entries = [
            {"name": name, "bytes": (folder / name).stat().st_size, "sha256": sha256}
            for name, sha256 in sorted(hashed.items())
        ]
        tensors = {tensor.name: journal.done[tensor.name] for tensor in self.plan.tensors}
        return {
            **self.identity,
            "outputs": {"files": entries, "tensors": tensors, "tensor_hash": HASH},
            "warnings": list(self.plan.warnings),
            "packages": packages(),
            "machine": machine(),
            "workers": self.workers,
            "seconds": round(time.monotonic() - self.started, 3),
        }

    def tell(self, replaced: bool) -> None:
        """Say what was written."""
        again = " (in place of an earlier merge)" if replaced else ""
        tensors = self.plan.tensors
        dtypes = ", ".join(sorted({t.dtype for t in tensors}))
        written = size(self.plan.bytes_out)
        say(f"wrote {self.out}: {len(tensors)} tensors, {written}, {dtypes}{again}")


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
    try:
        donated = {n: (plan.donor.folder / n).read_bytes() for n in plan.donor.tokenizer_files}
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}.") from None
    files = dict(plan.vocabulary.files) if plan.vocabulary else donated
    if plan.recipe.chat_template:
        models = [plan.checkpoints[name] for name in plan.recipe.merged]
        template = chosen_template(plan.recipe.chat_template, models)
        files = with_template(files, template) if template else files
    values = {"config.json": plan.config} if plan.config else {}
    values |= {INDEX: plan.index} if plan.index else {}
    for name, value in values.items():
        files[name] = (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
    return files


def _finished(out: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The record of `out` if it is this very merge and every file still has its hash."""
    try:
        record: dict[str, Any] = json.loads((out / RECORD).read_bytes())
        if canonical({key: record.get(key) for key in identity}) != canonical(identity):
            return None
        held = {out / file["name"]: file["sha256"] for file in record["outputs"]["files"]}
        with bar(f"check {out.name}", sum(path.stat().st_size for path in held)) as progress:
            whole = all(file_sha256(p, progress.advance) == sha for p, sha in held.items())
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return record if whole else None


def _held(out: Path) -> int:
    """Bytes of disk that interrupted merges into `out` hold; they are gone on with, or deleted."""
    return sum(map(_allocated, partial_folders(out)))


def _allocated(folder: Path) -> int:
    """Bytes of disk that the files of a folder have already; those that vanish do not count."""
    total = 0
    with suppress(OSError):
        for path in folder.iterdir():
            total += path.stat().st_blocks * 512
    return total


def _one_journal(folder: Path) -> bool:
    """Has nobody but this process noted tensors in the folder?"""
    return len(list(folder.glob(PATTERN))) <= 1
