"""How often does the overlap detector find copies of benchmark items, and how often look-alikes?

Real items (the data sets of benchmarks/overlap, from a pinned PyPI wheel): recall of verbatim
copies inside other texts and of copies with 5 % of the words edited, and the items of one half of a
benchmark that are found in its other half, all with the thresholds of the product. Of these, `near`
counts the true near-duplicates: half of the item's words or more stand in one other item, in its
order and in runs of three or more. --gsm8k names a folder with train.jsonl and test.jsonl of
openai/grade-school-math: the test split against the train split, the one pair here that is
published as train and test. Prints a Markdown table; exit code 1 if a target is missed. About two
minutes."""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from datetime import date
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from mergelab import datasets
from mergelab.detectors.overlap import index, is_dirty, longest, one_edit, words
from mergelab.record import machine
from mergelab.study_file import load_study

STUDY = Path(__file__).parent / "overlap"
EDITS = 0.05  # of the words: each replaced, dropped, or followed by another
VERBATIM, EDITED, FALSE = 0.99, 0.90, 0.01  # targets, of GSM8K's test split
NEAR, RUN = 0.5, 3  # share of an item's words that a near-duplicate holds, in runs of so many
TARGETS = ("recall, verbatim", "recall, 5 % of words edited", "false alarms")
SPEED_TEXTS = 100_000
LEGEND = """
- **words**: of the middle item. **verbatim**, **5 % edited**: share of such copies that is found;
  an edit exchanges, drops or adds a word, and an item has one at least.
- **found**: the share of one half's items, or of the test split's, that the other texts hold by the
  product's rule, and their number; **near**: those of which one other item holds half of the words
  or more, in order and in runs of three or more.
- The halves hold real duplicates. Those found were looked at by hand (2026-11-22; in MATH and
  MedMCQA the `near` ones only in part, and all counted as duplicates): the same question or problem
  again, with other numbers or other options at most, or the same passage, are 13 of 19 in ARC-Easy,
  42 of 49 in MATH, 56 of 64 in MedMCQA, 1 of 4 in MedQA and the one of SciQ. The others, 0.4 to
  0.7 % of the items, share a stock phrase, a list of choices or normal laboratory values.
"""


def dirty(items: list[str], texts: list[str]) -> list[int]:
    """The numbers of the items that are found in the texts."""
    found = [words(item) for item in items]
    matches = longest(index(found), len(items), texts)
    bad = {i for i, match in enumerate(matches) if is_dirty(match, len(found[i]))}
    return sorted(bad | one_edit(found, texts))


def near(item: str, texts: list[str]) -> bool:
    """Does one of the texts hold half of the item's words, in order and in runs of RUN words?

    Looks at the five texts that share most runs with it."""
    own, others = words(item), [words(text) for text in texts]
    runs = set(zip(*(own[i:] for i in range(RUN)), strict=False))
    shared = [sum(run in runs for run in {*zip(o, o[1:], o[2:], strict=False)}) for o in others]
    for i in sorted(range(len(texts)), key=lambda i: -shared[i])[:5]:
        blocks = SequenceMatcher(None, own, others[i], autojunk=False).get_matching_blocks()
        if sum(block.size for block in blocks if block.size >= RUN) >= NEAR * len(own):
            return True
    return False


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
    found = [dirty(items, texts) for texts in (wrapped, copies, others)]
    rates = [len(numbers) / len(items) for numbers in found]
    middle = sorted(len(words(item)) for item in items)[len(items) // 2]
    duplicates = sum(near(items[i], others) for i in found[2])
    cells = [name, f"{len(items):,}", str(middle), *(f"{rate:.2%}" for rate in rates)]
    cells += [f"{len(found[2])}", f"{duplicates}", pair]
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
    many = [texts[i % len(texts)] for i in range(SPEED_TEXTS)]
    longest(index(found), len(items), many)
    one_edit(found, many)
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
    head = "| benchmark | items | words | verbatim | 5 % edited | found | items | near | against |"
    out.append(head)
    out.append("|---|--:|--:|--:|--:|--:|--:|--:|---|")
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
    sys.stdout.write("\n".join([*out, "", LEGEND.strip()]) + "\n")
    if args.json:
        args.json.write_text(json.dumps(entries, indent=1) + "\n")
    return int(not all(entry["holds"] for entry in entries))


if __name__ == "__main__":
    sys.exit(main())
