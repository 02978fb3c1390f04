"""A published table, judged without a model: is each score possible, which gaps are real?

    python -m mergelab.claims.reanalysis recipes/meditron     # the tables of docs/meditron.md

Scores are taken for independent draws of items. Where all models answered the same items, as in one
table, tests are therefore too careful: only records of the answers could pair them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from mergelab.claims.base import Claim
from mergelab.claims.file import load_claims
from mergelab.published import compare, grim, mean_gap
from mergelab.statistics import benjamini_hochberg, wilson

PARENTS = ("chat", "meditron")
LEVEL = 0.05  # q below this is called a difference
SIZES = {  # items of the test sets of the suite `meditron`
    "medqa_4options": 1273,
    "medmcqa": 4183,
    "pubmedqa": 500,
    "arc_challenge": 1172,
    "hellaswag": 10042,
    "mmlu": 14042,
}
Scores = dict[str, dict[str, Claim]]  # by model and benchmark


@dataclass(frozen=True)
class Gap:
    """One model against another on one benchmark, in percentage points; q over the whole table."""

    model: str
    than: str
    benchmark: str
    difference: float
    low: float
    high: float
    p: float
    q: float

    @property
    def real(self) -> bool:
        """Is the difference one at a false discovery rate of 5 %?"""
        return self.q < LEVEL


def scores(claims: Sequence[Claim]) -> Scores:
    """Published percentages by model and benchmark, in their order."""
    found: Scores = {}
    for claim in claims:
        found.setdefault(claim.model, {})[claim.benchmark] = claim
    return found


def decimals(claim: Claim, n: int) -> int | None:
    """To how many decimals the score is possible for n items (GRIM); None: to none.

    Fewer than are printed: the last digits were zeros that nobody computed."""
    text = claim.printed
    while not grim(text, n):
        if "." not in text or text[-1] not in "0.":
            return None
        text = text[:-1]
    return len(text.partition(".")[2])


def best_parent(found: Scores, parents: Sequence[str], benchmark: str) -> str:
    """The parent with the higher score; choosing it after the fact makes the test more careful."""
    return max(parents, key=lambda name: found[name][benchmark].value)


def gaps(found: Scores, parents: Sequence[str], sizes: Mapping[str, int]) -> list[Gap]:
    """Every merge against its better parent, and every two merges, on every benchmark.

    q: Benjamini and Hochberg over all of these."""
    merges = [name for name in found if name not in parents]
    pairs = [(merge, best_parent(found, parents, name), name) for merge in merges for name in sizes]
    pairs += [(a, b, name) for a, b in combinations(merges, 2) for name in sizes]
    tests = [
        compare(found[a][name].value, found[b][name].value, sizes[name]) for a, b, name in pairs
    ]
    adjusted = benjamini_hochberg([test["p"] for test in tests])
    found_gaps = []
    for (a, b, name), test, q in zip(pairs, tests, adjusted, strict=True):
        points, (low, high) = 100 * test["difference"], (100 * end for end in test["ci95"])
        found_gaps.append(Gap(a, b, name, points, low, high, test["p"], float(q)))
    return found_gaps


def pages(path: Path, parents: Sequence[str], sizes: Mapping[str, int]) -> dict[str, str]:
    """The Markdown tables of a claims file: scores, grim, parents, merges, means."""
    found = scores(load_claims(path).claims)
    merges = [name for name in found if name not in parents]
    all_gaps = gaps(found, parents, sizes)
    count = len(merges) * len(sizes)  # of the gaps to parents, which come first
    names = [claim.published for claim in found[merges[0]].values()]
    two = [f"{a} - {b}" for a, b in combinations(merges, 2)]
    return {
        "scores": _markdown(["%", *names], [_intervals(name, found, sizes) for name in found]),
        "grim": _markdown(["", *names], _possible(found, sizes)),
        "parents": _markdown(["points", *names], _rows(merges, all_gaps[:count])),
        "merges": _markdown(["points", *names], _rows(two, all_gaps[count:])),
        "means": _means(found, parents, sizes),
    }


def _intervals(model: str, found: Scores, sizes: Mapping[str, int]) -> list[str]:
    cells = [model]
    for name, n in sizes.items():
        claim = found[model][name]
        low, high = wilson(claim.value * n, n)
        cells.append(f"{claim.printed} ({100 * low:.1f} to {100 * high:.1f})")
    return cells


def _possible(found: Scores, sizes: Mapping[str, int]) -> list[list[str]]:
    rows = [["items"], ["possible values of two decimals"]]
    for n in sizes.values():
        rows[0].append(f"{n:,}")
        rows[1].append(f"{min(1.0, (n + 1) / 10_001):.0%}")
    for model, claims in found.items():
        cells = [model]
        for name, n in sizes.items():
            claim = claims[name]
            to, hits = decimals(claim, n), grim(claim.printed, n)
            printed = len(claim.printed.partition(".")[2])
            fits = f"{hits[0]:,}" + (f" to {hits[-1]:,}" if len(hits) > 1 else "") if hits else ""
            cells.append(fits if to == printed else "no" if to is None else f"{to} decimal")
        rows.append(cells)
    return rows


def _rows(labels: Sequence[str], listed: Sequence[Gap]) -> list[list[str]]:
    """One row per label, the gaps in order; the real ones are bold."""
    texts = [f"{gap.difference:+.2f} ({gap.low:+.1f} to {gap.high:+.1f})" for gap in listed]
    cells = [f"**{t}**" if gap.real else t for t, gap in zip(texts, listed, strict=True)]
    width = len(cells) // len(labels)
    return [[name, *cells[i * width : (i + 1) * width]] for i, name in enumerate(labels)]


def _means(found: Scores, parents: Sequence[str], sizes: Mapping[str, int]) -> str:
    """The mean over the benchmarks, against the better parent and the first merge."""
    values = {model: [claims[name].value for name in sizes] for model, claims in found.items()}
    others = [max(parents, key=lambda name: sum(values[name]))]
    others += [name for name in found if name not in parents][:1]
    rows = []
    for model, own in values.items():
        cells = [model, f"{100 * sum(own) / len(own):.2f}"]
        for other in others:
            points = [100 * x for x in mean_gap(own, values[other], list(sizes.values()))]
            text = "{:+.2f} ({:+.1f} to {:+.1f})".format(*points)
            cells.append("" if model == other else text)
        rows.append(cells)
    return _markdown(["", "mean", *(f"minus {name}" for name in others)], rows)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    for title, text in pages(Path(sys.argv[1]), sys.argv[2:] or PARENTS, SIZES).items():
        sys.stdout.write(f"{title}\n\n{text}\n\n")
