"""How often does the overlap detector find copies of benchmark items, and how often look-alikes?

Real items (the data sets of recipes/smollm2, from a pinned PyPI wheel): recall of verbatim copies
inside other texts and of copies with 5 % of the words edited, and false alarms of one half of a
benchmark against its other half, all with the thresholds of the product. --gsm8k names a folder
with train.jsonl and test.jsonl of openai/grade-school-math: the test split against the train split,
the one pair here that is published as train and test. Prints a Markdown table; exit code 1 if a
target is missed. About a minute."""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from mergelab import datasets
from mergelab.detectors.overlap import index, is_dirty, longest, words
from mergelab.record import machine
from mergelab.study import load_study

STUDY = Path(__file__).parent.parent / "recipes" / "smollm2"
EDITS = 0.05  # of the words: each replaced, dropped, or followed by another
VERBATIM, EDITED, FALSE = 0.99, 0.90, 0.01  # targets, of GSM8K's test split
TARGETS = ("recall, verbatim", "recall, 5 % of words edited", "false alarms")
SPEED_TEXTS = 100_000


def dirty(items: list[str], texts: list[str]) -> float:
    """The share of items that is found in the texts."""
    found = [words(item) for item in items]
    matches = longest(index(found), len(items), texts)
    return sum(map(is_dirty, matches, map(len, found))) / len(items)


def edited(text: str, vocabulary: list[str], draw: random.Random) -> str:
    """The text with EDITS of its words, at least one, replaced, dropped or followed by another."""
    new = text.split()
    for _ in range(max(1, round(EDITS * len(new)))):
        at, word = draw.randrange(len(new)), draw.choice(vocabulary)
        new[at : at + 1] = draw.choice(([word], [], [new[at], word]))
    return " ".join(new)


def row(name: str, items: list[str], others: list[str], pair: str) -> tuple[str, list[float]]:
    """One benchmark's line of the table, and its three rates."""
    draw = random.Random(0)
    vocabulary = sorted({word for item in items for word in item.split()})
    wrapped = [f"Here is a task. {item.upper()} Thank you!" for item in items]
    copies = [edited(item, vocabulary, draw) for item in items]
    rates = [dirty(items, wrapped), dirty(items, copies), dirty(items, others)]
    middle = sorted(len(words(item)) for item in items)[len(items) // 2]
    cells = [name, f"{len(items):,}", str(middle), *(f"{rate:.2%}" for rate in rates), pair]
    return f"| {' | '.join(cells)} |", rates


def gsm8k(folder: Path) -> tuple[list[str], list[str]]:
    """Test and train split as the studies render them."""
    splits = []
    for split in ("test", "train"):
        lines = (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines]
        splits.append([f"Question: {one['question']}\nAnswer: {one['answer']}" for one in found])
    return splits[0], splits[1]


def speed(items: list[str], texts: list[str]) -> str:
    """What a large corpus takes, streamed."""
    found = [words(item) for item in items]
    started = time.process_time()
    longest(index(found), len(items), (texts[i % len(texts)] for i in range(SPEED_TEXTS)))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return (
        f"{len(items):,} items against {SPEED_TEXTS:,} texts: "
        f"{time.process_time() - started:.0f} s on one core, {memory:.0f} MB."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gsm8k", type=Path, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    args = parser.parse_args()
    study, texts = load_study(STUDY), {}
    entries: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        datasets.prepare(study, Path(scratch))
        for name in sorted(study.datasets):
            parts = sorted((Path(scratch) / name).glob("*.jsonl"))
            lines = [line for part in parts for line in part.read_text().split("\n") if line]
            texts[name] = sorted(json.loads(line)["text"] for line in lines)
    about = "{cpu}, {cores} cores, {system}, Python {python}".format(**machine())
    out = [f"# Overlap detector on real items\n\n{date.today()}, {about}.\n"]
    out += ["| benchmark | items | words | verbatim | 5 % edited | false alarms | against |"]
    out.append("|---|--:|--:|--:|--:|--:|---|")
    for name, items in texts.items():
        random.Random(0).shuffle(items)
        half = len(items) // 2
        out.append(row(name, items[:half], items[half:], "its other half")[0])
    if args.gsm8k:
        line, rates = row("gsm8k test", *gsm8k(args.gsm8k), "its train split")
        out.append(line)
        holds = (rates[0] >= VERBATIM, rates[1] >= EDITED, rates[2] <= FALSE)
        told = zip(TARGETS, rates, (VERBATIM, EDITED, FALSE), holds, strict=True)
        entries = [
            {"name": name, "value": rate, "unit": "share", "target": target, "holds": held}
            for name, rate, target, held in told
        ]
    out += ["", speed(texts["medmcqa"], [text for several in texts.values() for text in several])]
    sys.stdout.write("\n".join(out) + "\n")
    if args.json:
        args.json.write_text(json.dumps(entries, indent=1) + "\n")
    return int(not all(entry["holds"] for entry in entries))


if __name__ == "__main__":
    sys.exit(main())
