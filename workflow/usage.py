"""What each job of a study asked for and what it used, as a Markdown table.

python workflow/usage.py results/demo

Reads Snakemake's benchmark files; what was asked for stands there after a run with the slurm
profile. Memory is that of the step's own process; a Slurm job also holds two Snakemakes, 0.4 GB."""

from __future__ import annotations

import ast
import csv
import sys
from pathlib import Path

HEADER = """\
| step | threads | memory asked, MB | used, MB | time asked, min | used, min |
|---|---|---|---|---|---|
"""


def rows(results: Path) -> list[dict[str, str]]:
    """The last line of every benchmark file, with its step's name; a killed job's has none."""
    found = []
    for path in sorted((results / "benchmarks").glob("*.tsv")):
        with path.open(encoding="utf-8") as file:
            lines = list(csv.DictReader(file, delimiter="\t"))
        if not lines:
            continue
        step, _, rest = path.stem.partition(".")
        part = rest.partition(".")[2].replace("-of-", "/")  # of a divided merge
        found.append({**lines[-1], "step": f"{step.replace('-', ' ', 1)} {part}".strip()})
    return found


def line(row: dict[str, str]) -> str:
    """One job."""
    asked = ast.literal_eval(row.get("resources") or "{}")
    cells = [
        row["step"],
        row.get("threads") or "",
        str(asked.get("mem_mb", "")),
        f"{float(row['max_rss']):.0f}" if row["max_rss"] != "NA" else "",
        str(asked.get("runtime", "")),
        f"{float(row['s']) / 60:.1f}",
    ]
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1], "benchmarks").is_dir():
        sys.exit(f"{__doc__}\nGive a study's folder of results.")
    sys.stdout.write(HEADER + "".join(map(line, rows(Path(sys.argv[1])))))
