"""How well do the detectors find planted leaks, in specialists and through merges?

Per seed, a tiny Llama base and specialists of it that saw GSM8K test items 1, 2, 4 or 8 times among
clean data (leaks/study.yaml), clean siblings and merges (leaks/*.yaml), made by the product itself:
its training, engine, probe and detectors. Items that nobody saw, of the same random split, are the
controls. A second study of eleven seeds (leaks_options/study.yaml) plants multiple-choice items,
for the option-order test. Prints Markdown; exit code 1 if a target is missed. About 6 minutes of a
core per seed, two of the second study, two seeds at once; the folder of --work keeps what is done,
so that a second run only judges anew."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from leaks_page import calibration, entries, goals, page
from leaks_results import Results, read

from mergelab.folders import cache_folder

SEEDS, OPTION_SEEDS, AT_ONCE = 5, 11, 2
PROGRAM = Path(__file__).parent / "leaks_seed.py"


def make(folder: Path) -> None:
    """Run one seed in a process of its own, on one thread. Exits if it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (folder / "log.txt").open("w") as log:
        command = [sys.executable, str(PROGRAM), str(folder)]
        done = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{folder.name} failed:\n{(folder / 'log.txt').read_text()[-2000:]}")


def run(work: Path, seeds: int, option_seeds: int) -> Results:
    """Make every seed of both studies and read what the detectors said."""
    folders = [work / f"seed-{seed}" for seed in range(seeds)]
    options = [work / f"options-{seed}" for seed in range(option_seeds)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(make, [*folders, *options]))
    return read(folders, options)


def main() -> int:
    """Parse arguments, run, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed of each")
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help="default: 5")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="write the table that "
                        "reports show: src/mergelab/detectors/calibration.json")  # fmt: skip
    parser.add_argument("--work", type=Path, metavar="DIR", help="folder for models and evidence")
    arguments = parser.parse_args()
    work = arguments.work or cache_folder("leaks")
    started = time.monotonic()
    counts = (1, 1) if arguments.quick else (arguments.seeds, OPTION_SEEDS)
    results = run(work.absolute(), *counts)
    sys.stdout.write(page(results, time.monotonic() - started))
    if arguments.json:
        arguments.json.write_text(json.dumps(list(entries(results)), indent=1) + "\n")
    if arguments.calibration:
        arguments.calibration.write_text(json.dumps(calibration(results), indent=1) + "\n")
    return 0 if all(goal.holds for goal in goals(results)) else 1


if __name__ == "__main__":
    sys.exit(main())
