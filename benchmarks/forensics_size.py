"""Memory and time of `infer` on a model of 1.1e9 parameters with four candidates and a base.

The child is a TIES merge of three of the candidates, by mergelab. 13 GB of disk; what is in the
folder already is used. What `infer` takes is compared with reading all inputs once, one after the
other, in the same state of the page cache."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from merge_speed_models import TINYLLAMA, WEIGHTS, Size, write_model, write_recipe
from merge_speed_run import Run, cool, measured

from mergelab.engine import merge
from mergelab.plan import make_plan
from mergelab.recipe import load_recipe

NAMES = ("base", "a", "b", "c", "d")
MEMORY, TIME = 500e6, 3.0  # bytes of anonymous memory; times of reading the inputs once
LIMIT = 3600.0  # seconds
PROGRAM = """
import sys
from pathlib import Path
from mergelab.checkpoint import open_checkpoint
from mergelab.forensics.infer import infer
place = Path(sys.argv[1])
model, base, *others = (open_checkpoint(place / n, n) for n in ("out", "base", "a", "b", "c", "d"))
found = infer(model, {c.label: c for c in others}, base)
print(found["verdict"])
"""


@dataclass(frozen=True)
class Large:
    """Cold runs: seconds to read the inputs, what `infer` took, and what it said."""

    reading: float
    run: Run
    said: str


def large(folder: Path, size: Size = TINYLLAMA) -> Large:
    """Make the models that are missing, read them once, then ask how the child was made."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(NAMES):
        if not (folder / name).exists():
            write_model(folder, name, number, size)
    if not (folder / "out").exists():
        path = folder / "ties.yaml"
        write_recipe(path, "ties", [folder / n for n in NAMES[:4]], size.layers)
        recipe = load_recipe(path)
        places = {str(folder / n): folder / n for n in NAMES}
        merge(make_plan(recipe, places, shard_size=1 << 40), folder / "out")
    files = [folder / name / WEIGHTS for name in (*NAMES, "out")]
    cool(files)
    started = time.monotonic()
    for file in files:
        read(file)
    reading = time.monotonic() - started
    cool(files)
    log = folder / "infer.log"
    command = [sys.executable, "-c", PROGRAM, folder.resolve()]
    run = measured(command, log, environ={"OMP_NUM_THREADS": "1"}, limit=LIMIT)
    return Large(reading, run, log.read_text().strip().splitlines()[-1] if not run.failed else "")


def read(file: Path) -> None:
    """Read a file once, from start to end."""
    buffer = bytearray(1 << 22)
    handle = os.open(file, os.O_RDONLY)
    try:
        while os.readv(handle, [buffer]):
            pass
    finally:
        os.close(handle)
