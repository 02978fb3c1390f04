"""How fast and how lean are merges beside mergekit 0.1.5 and beside the disk?

Builds TinyLlama-shaped bfloat16 checkpoints (a base and three experts of 1.1e9 parameters), merges
them with both tools, each run a process of its own from start to end, and runs the I/O floor
(merge_speed_floor.py) in between. Exit code 1 if a target is missed. A full run takes about half
an hour, 40 GB of disk and, for a warm page cache, 16 GB of memory. A noisy disk is left out of the
warm comparison by `--sections warm --work /dev/shm` (16 GB)."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import merge_speed_models as models
import peer
from merge_speed_bench import PEER_WAYS, WORKERS, Bench, say, told
from merge_speed_page import RESULTS, Growth, Results, Row, entries, page
from merge_speed_run import Run, cool, machine, middle, warm

COLD = ("linear", "ties")
COLD_PEER = ("linear",)
GROWTH = ("linear", "ties")
SHORT = 60.0  # seconds: a peer that takes less is run as often as mergelab
SECTIONS = ("warm", "cold", "growth")


def starts(bench: Bench, results: Results, methods: list[str]) -> None:
    """What a merge of almost nothing takes; each method's first use compiles its kernels."""
    folder, kernels = bench.build("start", models.START), bench.build("kernels", models.QUICK)
    some, more = models.links(folder, 4), models.links(kernels, 4)
    size, found = bench.sizes[folder], results.starts
    for method in dict.fromkeys(["linear", *methods]):
        recipe = bench.recipe(method, some, 0)
        found[f"{method}, first use"] = told(f"{method}, first use", bench.ours(recipe, size))
        larger = bench.recipe(method, more, models.QUICK.layers)
        told(f"{method}, larger", bench.ours(larger, bench.sizes[kernels]))
        recipe = bench.recipe(method, some, 0)
        found[method] = told(method, middle([bench.ours(recipe, size) for _ in range(2)]))
    found["mergelab --help"] = middle([bench.help() for _ in range(3)])
    found["I/O floor"] = middle([bench.floor(weights(some), size) for _ in range(3)])
    if bench.python:
        recipe = bench.recipe("linear", some, 0)
        bench.peers(recipe, size, bench.way)  # compiles its modules
        found["mergekit, linear"] = told("mergekit", bench.peers(recipe, size, bench.way))


def weights(folders: list[Path]) -> list[Path]:
    """The model files in folders."""
    return [folder / models.WEIGHTS for folder in folders]


def peers_best(bench: Bench, method: str, recipe: Path, size: int) -> Run:
    """The peer at its best: linear is run in all its ways, the fastest is used from then on."""
    if method != "linear":
        return told("mergekit", bench.peers(recipe, size, bench.way))
    runs = {way: bench.peers(recipe, size, way) for way in PEER_WAYS}
    for (options, threads), run in runs.items():
        told(f"mergekit, {threads} threads{', async' * bool(options)}", run)
    bench.way = min(runs, key=lambda way: (bool(runs[way].failed), runs[way].wall))
    return runs[bench.way]


def compare(bench: Bench, method: str, folder: Path) -> Row:
    """A method, warm: floor, first merge, later merges and the peer, alternating."""
    used = models.models_of(method, models.links(folder, 4))
    files, size = weights(used), bench.sizes[folder]
    share = len(files) if method == "passthrough" else 1  # which reads each byte it writes
    recipe = bench.recipe(method, models.links(folder, 4), bench.small.layers)
    say(f"{method}, warm")
    warm(files)
    floors, laters, theirs = [], [], []
    for number in range(bench.repeats):
        floors.append(told("I/O floor", bench.floor(files, size, share=share)))
        if number == 0:
            first = told("mergelab, first", bench.ours(recipe, size, first=True))
        laters.append(told("mergelab, later", bench.ours(recipe, size)))
        if bench.python and number == 0:
            theirs.append(peers_best(bench, method, recipe, size))
        elif bench.python and theirs[0].wall < SHORT:
            theirs.append(told("mergekit", bench.peers(recipe, size, bench.way)))
        warm(files)
    synced = bench.floor(files, size, share=share, sync=True)
    peers = middle(theirs) if theirs else None
    return Row(method, len(files), middle(floors), synced, first, middle(laters), peers)


def compare_cold(bench: Bench, method: str, folder: Path) -> Row:
    """The same with inputs dropped from the page cache before each run."""
    used = models.models_of(method, models.links(folder, 4))
    files, size = weights(used), bench.sizes[folder]
    recipe = bench.recipe(method, used, bench.small.layers)
    say(f"{method}, cold")
    cool(files)
    floor = told("I/O floor", bench.floor(files, size))
    cool(files)
    synced = told("I/O floor, synced", bench.floor(files, size, sync=True))
    cool(files)
    first = told("mergelab, first", bench.ours(recipe, size, first=True))
    cool(files)
    later = told("mergelab, later", bench.ours(recipe, size))
    theirs = None
    if bench.python and method in COLD_PEER:
        cool(files)
        theirs = told("mergekit", bench.peers(recipe, size, bench.way))
    return Row(method, len(files), floor, synced, first, later, theirs)


def growth(bench: Bench, method: str, folder: Path, layers: int, count: int) -> Growth:
    """Ours alone, files hashed before: memory and time with `count` models."""
    size = bench.sizes[folder]
    recipe = bench.recipe(method, models.links(folder, count), layers)
    run = told(f"{method}, {count} x {size / 1e9:.2f} GB", bench.ours(recipe, size))
    return Growth(method, count, size, run)


def everything(
    bench: Bench, results: Results, methods: list[str], sections: list[str], target: Path | None
) -> None:
    """Run it all; the page is written after every step."""
    starts(bench, results, methods)
    small = bench.build("small", bench.small)
    for method in methods if "warm" in sections else ():
        results.warm.append(compare(bench, method, small))
        results.way = bench.way if bench.python else None
        save(results, target)
    for method in [m for m in COLD if m in methods and "cold" in sections]:
        results.cold.append(compare_cold(bench, method, small))
        save(results, target)
    grown = [method for method in GROWTH if method in methods and "growth" in sections]
    warm(weights(models.links(small, 4)))
    for method in grown:
        for count in (2, 4, 8):
            results.growth.append(growth(bench, method, small, bench.small.layers, count))
            save(results, target)
    large = bench.build("large", bench.large, models.NAMES[:2]) if grown else small
    for number, method in enumerate(grown):
        if number == 0:
            growth(bench, method, large, bench.large.layers, 4)  # hashes the files
        results.growth.append(growth(bench, method, large, bench.large.layers, 4))
        save(results, target)


def save(results: Results, target: Path | None) -> None:
    """Write the page as far as it goes."""
    if target:
        target.write_text(page(results))


def parsed() -> argparse.Namespace:
    """The command line."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="small models, one repeat, nothing judged")
    add("--json", type=Path, metavar="FILE", help="write the numbers here")
    add("--out", type=Path, metavar="FILE", help=f"the page; of a full run, {RESULTS.name}")
    add("--methods", default=",".join(models.SHARED), help="some of " + ", ".join(models.SHARED))
    add("--sections", default=",".join(SECTIONS), help="some of " + ", ".join(SECTIONS))
    add("--repeats", type=int, metavar="N", help="runs of mergelab and the floor (2; quick: 1)")
    add("--no-peer", action="store_true", help="without mergekit")
    add("--venv", type=Path, default=peer.default_folder(), help="the peer's environment")
    add("--work", type=Path, metavar="DIR", default=cache / "mergelab", help="where models go")
    add("--keep", action="store_true", help="do not delete the models at the end")
    arguments = parser.parse_args()
    arguments.methods = arguments.methods.split(",")
    arguments.sections = arguments.sections.split(",")
    unknown = set(arguments.methods) - set(models.SHARED)
    unknown |= set(arguments.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    return arguments


def main() -> int:
    """Parse arguments, run, report."""
    arguments = parsed()
    quick = arguments.quick
    root = arguments.work.absolute() / "merge_speed"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    needed = 40e9 if "growth" in arguments.sections else 16e9
    if shutil.disk_usage(root).free < (1e9 if quick else needed):
        raise SystemExit(f"{root}: too little space on this disk; choose another with --work.")
    python = None if arguments.no_peer else peer.environment(arguments.venv.absolute())
    sizes = (models.QUICK, models.QUICK_LARGE) if quick else (models.TINYLLAMA, models.LARGE)
    bench = Bench(root, python, arguments.repeats or (1 if quick else 2), *sizes)
    results = Results(machine(root, python), quick, WORKERS, bench.repeats)
    target = arguments.out or (None if quick else RESULTS)
    try:
        everything(bench, results, arguments.methods, arguments.sections, target)
    finally:
        if not arguments.keep:
            shutil.rmtree(root)
    save(results, target)
    sys.stdout.write(page(results))
    numbers = list(entries(results))
    if arguments.json:
        arguments.json.write_text(json.dumps(numbers, indent=1) + "\n")
    return 1 if any(number["holds"] is False for number in numbers) else 0


if __name__ == "__main__":
    sys.exit(main())
