"""Memory and time of `remerge` on models of 1.1e9 parameters: a base and three experts, bfloat16.

The published models are mergekit's, in bfloat16 arithmetic; those with random masks are mergelab's,
with another seed. 9 GB of disk for the models and 2 for one merge at a time: merges that were made
here are deleted again, what is in the folder already is used and kept. Half an hour, most of it
mergekit's. Prints Markdown; exit code 1 if a target is missed."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peer
from forensics_size import MEMORY, TIME, read
from merge_speed_models import (
    NAMES,
    QUICK,
    TINYLLAMA,
    WEIGHTS,
    Size,
    models_of,
    write_model,
    write_recipe,
)
from merge_speed_run import Run, cool, machine, measured

from mergelab.cli.options import WORKERS
from mergelab.engine import merge
from mergelab.plan import make_plan
from mergelab.recipe import load_recipe
from mergelab.writer import RECORD

BY_MERGEKIT = ("task_arithmetic", "slerp", "model_stock", "ties", "breadcrumbs", "sce")
BY_MERGELAB = ("dare_ties",)
LIMIT = 3600.0  # seconds
SEED = 7
LEGEND = f"""
- A base and three experts (slerp: one), bfloat16, 2.2 GB each, and the published model. mergekit's
  merges, but with random masks mergelab's, of another seed. {WORKERS} workers, as `mergelab audit`
  takes here (the cores, at most 8); whole processes, start-up included; kernels are compiled.
  **MB**: anonymous memory.
- **disk**: wall seconds, nothing in the page cache (but a virtual disk may be served from its
  host's memory). **GB/s**: the fastest disk of which a check takes at most {TIME:.0f} times reading
  once, at the pace it has here. **cached**: processor seconds of all workers, all in the page
  cache; **read**: every byte once, 4 MB at a time; **read and hash**: with sha256, which every
  download and every merge takes.
- What bounds it, in processor seconds, measured once, on 2026-11-22, and not again with these
  tables (1.1e9 entries, two cores of about 3e9 cycles a second): start-up and the
  trial of whose numerics fit, 1; reading a base and three experts, 0.8 each time, and the published
  model, 0.9. Averages read all once. ties and breadcrumbs do so twice: histograms of three task
  vectors' magnitudes, 1.5, the merge, 2.1, which of equal entries were kept, 2. sce does three
  times: histogram, 2, weights, 3, the merge, 3.5. Random masks: twice; our own masks, drawn in
  both, 4, sums over signs, 3, subsets that explain an entry, 3, roundings and differences, 3.
- **holds**: the verdict is right, at most {MEMORY / 1e6:.0f} MB, from the disk at most {TIME:.0f}
  times reading once, as in forensics.md. Where all is cached and reading costs next to nothing, a
  check takes longer than that: the columns to the right tell how much."""
PROGRAM = """
import sys
from pathlib import Path
from mergelab.checkpoint import open_checkpoint
from mergelab.forensics.remerge import remerge
from mergelab.recipe import load_recipe
wanted = load_recipe(Path(sys.argv[1]))
published = open_checkpoint(Path(sys.argv[2]), "published")
found = remerge(wanted, published, {m: Path(m) for m in wanted.models}, int(sys.argv[3]))
print(", ".join(filter(None, (found["verdict"], found["numerics"]))))
"""


@dataclass(frozen=True)
class Sized:
    """One method: processor seconds to read, and to read and hash, the inputs and the published
    model once; what a process that checks it took, and what it said. Then wall seconds to read them
    from the disk, what it took there, and their bytes."""

    method: str
    reading: float
    hashing: float
    run: Run
    said: str
    disk: float
    cold: Run
    size: int

    @property
    def times(self) -> float:
        """How many times longer than reading it takes from the disk."""
        return self.cold.wall / self.disk

    @property
    def memory(self) -> int:
        """Bytes, at most."""
        return max(self.run.anonymous, self.cold.anonymous)

    @property
    def pace(self) -> float:
        """Bytes a second of a disk from which reading once takes a third of the check."""
        return TIME * self.size / self.cold.wall

    @property
    def quick(self) -> bool:
        """Is it within the bound of time?"""
        return self.times <= TIME

    @property
    def right(self) -> bool:
        """Is the verdict right?"""
        right = ("other mask",) if self.method in BY_MERGELAB else ("exact", "rounding only")
        return self.said.split(",")[0] in right

    @property
    def holds(self) -> bool:
        """Is it within the bounds, and the verdict right?"""
        return self.right and self.memory <= MEMORY and self.quick


def sizes(folder: Path, size: Size, mergekit: peer.Peer) -> Iterator[Sized]:
    """Make what is missing, and check every method."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(NAMES):
        if not (folder / name).exists():
            write_model(folder, name, number, size)
    per_file = [processor(work, folder / NAMES[0] / WEIGHTS) for work in (read, read, sha256)]
    for method in (*BY_MERGEKIT, *BY_MERGELAB):
        recipe, out = folder / f"{method}.yaml", folder / method
        models = [folder / name for name in NAMES]
        write_recipe(recipe, method, models, size.layers)
        made = not out.exists()
        if made:
            publish(method, recipe, out, mergekit)
        files = [model / WEIGHTS for model in (*models_of(method, models), out)]
        for file in files:
            read(file)
        run = checked(recipe, out, folder / "remerge.log")
        said = (folder / "remerge.log").read_text().strip().splitlines()[-1]
        disk, cold = from_disk(files, recipe, out)
        count = len(files)
        size_of_all = sum(file.stat().st_size for file in files)
        yield Sized(
            method, count * per_file[1], count * per_file[2], run, said, disk, cold, size_of_all
        )
        if made:
            shutil.rmtree(out)


def publish(method: str, recipe: Path, out: Path, mergekit: peer.Peer) -> None:
    """Merge; what was killed half-way is not taken for a model."""
    part = out.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    if method in BY_MERGEKIT:
        mergekit.merge(recipe, part)
    else:
        wanted = load_recipe(recipe)
        plan = make_plan(wanted, {m: Path(m) for m in wanted.models}, shard_size=1 << 40)
        merge(plan, part, seed=SEED)
        (part / RECORD).unlink()  # which tells the seed
    part.rename(out)


def from_disk(files: list[Path], recipe: Path, out: Path) -> tuple[float, Run]:
    """Wall seconds to read the files once, and the check, both with nothing in the page cache."""
    cool(files)
    started = time.monotonic()
    for file in files:
        read(file)
    seconds = time.monotonic() - started
    cool(files)
    return seconds, checked(recipe, out, recipe.with_name("remerge.log"))


def processor(work: Callable[[Path], None], file: Path) -> float:
    """Processor seconds of this process for a file."""
    started = time.process_time()
    work(file)
    return time.process_time() - started


def sha256(file: Path) -> None:
    """Read a file once, and hash it."""
    with file.open("rb") as stream:
        hashlib.file_digest(stream, "sha256")


def checked(recipe: Path, published: Path, log: Path) -> Run:
    """One process that checks the published model."""
    command = [sys.executable, "-c", PROGRAM, recipe, published, WORKERS]
    return measured(command, log, environ={"OMP_NUM_THREADS": "1"}, limit=LIMIT)


def page(rows: list[Sized], where: str) -> Iterator[str]:
    """Lines of the Markdown report; where: on which machine."""
    yield "## Memory and time at 1.1e9 parameters"
    yield ""
    yield f"{time.strftime('%Y-%m-%d')}. {where}."
    yield ""
    yield from heads(rows)
    yield ""
    yield (
        "| method | verdict | numerics | disk: read, s | check, s | times | GB/s "
        "| cached: read, cpu s | read and hash | check | times reading "
        "| times reading and hashing | MB | holds |"
    )
    yield "|---|---|---|" + "--:|" * 11
    for row in rows:
        verdict, _, numerics = row.said.partition(", ")
        yield (
            f"| {row.method} | {verdict} | {numerics} | {row.disk:.1f} | {row.cold.wall:.1f} "
            f"| {row.times:.2f} | {row.pace / 1e9:.1f} | {row.reading:.2f} | {row.hashing:.1f} "
            f"| {row.run.cpu:.1f} | {row.run.cpu / row.reading:.1f} "
            f"| {row.run.cpu / row.hashing:.2f} | {row.memory / 1e6:.0f} "
            f"| {'yes' if row.holds else '**no**'} |"
        )
    yield LEGEND


def heads(rows: list[Sized]) -> Iterator[str]:
    """What holds, and what does not."""
    slow = [row for row in rows if not row.quick]
    told = f": not {', '.join(f'{row.method} ({row.times:.1f} times)' for row in slow)}"
    yield (
        f"- time: {len(rows) - len(slow)} of {len(rows)} methods within {TIME:.0f} times reading "
        f"from the disk{told if slow else ''};"
    )
    small = sum(row.memory <= MEMORY for row in rows)
    yield f"- memory: {small} of {len(rows)} within {MEMORY / 1e6:.0f} MB;"
    yield f"- verdict: {sum(row.right for row in rows)} of {len(rows)} right."


def entries(rows: list[Sized]) -> list[dict[str, Any]]:
    """The numbers for --json."""
    return [
        {"name": f"{row.method}, 1.1e9 parameters: {name}", "value": value, "unit": unit,
         "target": target, "holds": row.holds}
        for row in rows
        for name, value, unit, target in (
            ("verdict", row.said, "verdict", None),
            ("from disk, times reading", row.times, "", f"<= {TIME}"),
            ("cached, times reading", row.run.cpu / row.reading, "", None),
            ("cached, times reading and hashing", row.run.cpu / row.hashing, "", None),
            ("anonymous memory", row.run.anonymous, "B", f"<= {MEMORY:.0f}"),
        )
    ]  # fmt: skip


def main() -> int:
    """Parse arguments, run, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the models are, or will be made")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    python = peer.environment(peer.default_folder())
    with peer.started(python, folder / "peer.log") as mergekit:
        list(sizes(folder / "quick", QUICK, mergekit))  # which compiles the kernels
        rows = list(sizes(folder, TINYLLAMA, mergekit))
    sys.stdout.write("\n".join(page(rows, machine(folder, python))) + "\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(entries(rows), indent=1) + "\n")
    return 0 if all(row.holds for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
