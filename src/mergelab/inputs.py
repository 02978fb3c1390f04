"""The files a merge reads: which they are, their sha256, and whether they are still the same."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mergelab import hashes
from mergelab.checkpoint import Checkpoint, Tensor, read_header
from mergelab.errors import UserError
from mergelab.plan import Plan
from mergelab.progress import bar
from mergelab.record import file_sha256


def input_files(checkpoint: Checkpoint) -> list[Path]:
    """Every file of a model whose bytes reach the merge."""
    return [*(checkpoint.folder / name for name in checkpoint.files), *checkpoint.extra]


def hashed_inputs(plan: Plan, workers: int) -> list[dict[str, Any]]:
    """Each model's files with size and sha256, in recipe order.

    Raises UserError if a file is not the one that was downloaded or merged, by its record."""
    paths = {c.label: input_files(c) for c in plan.checkpoints.values()}
    every = list(dict.fromkeys(path for group in paths.values() for path in group))
    total = sum(path.stat().st_size for path in every)
    with ThreadPoolExecutor(workers) as pool, bar("hash inputs", total) as progress:
        found = pool.map(lambda path: hashes.sha256(path, progress.advance), every)
        hashed = dict(zip(every, found, strict=True))
    for path, sha256 in hashed.items():
        if hashes.noted(path.parent).get(path.name, sha256) != sha256:
            raise UserError(
                f"{path}: is not the file that was downloaded or merged: its sha256 is {sha256}, "
                "the record beside it has another. It is damaged or was changed; make it again."
            )
    return [
        {
            "model": label,
            "files": [
                {"name": path.name, "bytes": path.stat().st_size, "sha256": hashed[path]}
                for path in group
            ],
        }
        for label, group in paths.items()
    ]


def input_states(plan: Plan) -> dict[Path, list[int]]:
    """What changes of each input file when anyone writes to it."""
    every = [path for c in plan.checkpoints.values() for path in input_files(c)]
    try:
        return {path: hashes.identity(path) for path in every}
    except OSError as error:
        raise UserError(
            f"{error.filename}: cannot be read any more: {error.strerror}. "
            "Was the model moved or deleted?"
        ) from None


def changed_input(
    plan: Plan, before: dict[Path, list[int]], hashed: list[dict[str, Any]]
) -> Path | None:
    """An input file that was written to since its state was `before` and `hashed` was taken.

    A new hard link to it, or other permissions, change only its last time: then its bytes tell."""
    now = input_states(plan)
    known = {
        path: entry["sha256"]
        for checkpoint, model in zip(plan.checkpoints.values(), hashed, strict=True)
        for path, entry in zip(input_files(checkpoint), model["files"], strict=True)
    }
    for path, state in before.items():
        only_linked = now[path][:-1] == state[:-1]
        if now[path] != state and not (only_linked and file_sha256(path) == known[path]):
            return path
    return None


def check_layouts(plan: Plan) -> None:
    """Raise UserError if a weight file no longer has the header that the plan was made from."""
    sources = {s for tensor in plan.tensors for s in tensor.sources if isinstance(s, Tensor)}
    held = {t for file in {s.file for s in sources} for t in read_header(file).values()}
    for tensor in sorted(sources - held, key=lambda t: t.name):
        raise UserError(
            f"{tensor.file}: was changed after the merge was planned. Run the same command again."
        )
