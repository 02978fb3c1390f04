"""The three programs that merge_speed.py compares, and where their inputs and outputs are."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import merge_speed_floor
import merge_speed_models as models
import peer
from merge_speed_run import Run, back_memory, measured

WORKERS = 2
LIMIT = 900.0  # seconds for one run
PLAIN = ("--no-copy-tokenizer", "--no-write-model-card", "--quiet")
ASYNC = ("--async-write", "--write-threads", "2", "--out-shard-size", "250M")
SHARDS = ("--shard-size", "250MB")  # what is hashed is not what is written to at the same time
PEER_WAYS = (((), "2"), (ASYNC, "2"), ((), "1"))  # more options, OMP_NUM_THREADS: best is taken


@dataclass
class Bench:
    """Where things are and how to run them. Every output is deleted once it has been checked."""

    root: Path
    python: Path | None  # the peer's
    repeats: int
    small: models.Size
    large: models.Size
    way: tuple[tuple[str, ...], str] = PEER_WAYS[1]
    sizes: dict[Path, int] = field(default_factory=dict)  # bytes of a model file, by folder

    def build(self, name: str, size: models.Size, names: tuple[str, ...] = models.NAMES) -> Path:
        """Write models of a size below the root."""
        say(f"writing {len(names)} models: {name}")
        folder = self.root / name
        self.sizes[folder] = models.write_models(folder, size, names)
        return folder

    def recipe(self, method: str, folders: list[Path], layers: int) -> Path:
        """The recipe of a method over `folders`."""
        path = self.root / f"{method}.yaml"
        models.write_recipe(path, method, folders, layers)
        return path

    def ours(self, recipe: Path, size: int, *, first: bool = False) -> Run:
        """`mergelab merge` of a recipe; `first`: none of the files was ever hashed."""
        cache = self.root / "cache"
        if first:
            for folder in (cache / "mergelab").glob("hashes*"):
                shutil.rmtree(folder)
        program = Path(sys.executable).with_name("mergelab")
        command = [program, "merge", recipe, "-o", self.out(), "--workers", WORKERS, *SHARDS]
        return self.run(command, size, XDG_CACHE_HOME=str(cache))

    def peers(self, recipe: Path, size: int, way: tuple[tuple[str, ...], str]) -> Run:
        """`mergekit-yaml` of a recipe."""
        assert self.python is not None
        options, threads = way
        command = [peer.program(self.python), recipe, self.out(), *PLAIN, *options]
        return self.run(command, size, OMP_NUM_THREADS=threads, HF_HUB_OFFLINE="1")

    def floor(self, files: list[Path], size: int, *, share: int = 1, sync: bool = False) -> Run:
        """Read the first 1/`share` of every file and write a file of `size` bytes."""
        out = self.out()
        out.mkdir()
        program = [sys.executable, "-S", merge_speed_floor.__file__, out / "model.safetensors"]
        return self.run([*program, size, size // share, *["--sync"][:sync], *files], size)

    def help(self) -> Run:
        """`mergelab --help`."""
        cache = str(self.root / "cache")
        command = [Path(sys.executable).with_name("mergelab"), "--help"]
        log = self.root / "run.log"
        return measured(command, log, environ={"XDG_CACHE_HOME": cache}, limit=LIMIT)

    def out(self) -> Path:
        """The output folder, which is not there."""
        shutil.rmtree(self.root / "out", ignore_errors=True)
        os.sync()  # earlier writes are not this run's
        return self.root / "out"

    def run(self, command: Sequence[object], size: int, **environ: str) -> Run:
        """Run a command that leaves `size` bytes of weights (more or less a header)."""
        back_memory()
        run = measured(command, self.root / "run.log", environ=environ, limit=LIMIT)
        written = sum(f.stat().st_size for f in (self.root / "out").glob("*.safetensors"))
        if not run.failed and abs(written - size) > 0.01 * size + 100_000:
            return Run(run.wall, run.cpu, run.anonymous, f"{written} bytes instead of {size}")
        return run


def say(text: str) -> None:
    """Progress, with the time of day."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')}  {text}\n")


def told(name: str, run: Run) -> Run:
    """Say what a run took."""
    numbers = f"{run.wall:7.2f} s, CPU {run.cpu:7.2f} s, {run.anonymous / 1e6:6.0f} MB"
    say(f"  {name:28} {numbers} {run.failed[-300:]}")
    return run
