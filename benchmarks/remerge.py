"""Does the re-merge check recognise mergekit's merges, and no altered ones?

mergekit 0.1.5 merges random models in bfloat16 and float32; each result is compared with its recipe
(mergelab.forensics.remerge). The same is done with merges of other recipes under the first one's
name (another weight, density or parent), and with files whose weights were changed. The peer gets
an environment of its own (peer.py). Exit code 1 if a target is missed."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peer
import yaml
from parity import machine
from parity_models import FAMILIES, QUICK
from remerge_cases import EDITED, REMADE, Case, cases, edited, placed, write_inputs

from mergelab.checkpoint import open_checkpoint
from mergelab.forensics.remerge import remerge
from mergelab.recipe import load_recipe

SAME = ("exact", "rounding only")
SHORT = {"exact": "exact", "rounding only": "rounding", "other mask": "other mask",
         "different": "different", "unverifiable": "unverifiable"}  # fmt: skip
# small changes that random masks may hide
HIDDEN = ("weight +0.02", "density +0.05", "1 ulp on 1 %", "that in one tensor", "gaussian noise")
LEGEND = """
- **honest**: mergekit's merge of the recipe. Target: exact or rounding only; with random masks,
  other mask: mergekit draws them from a generator that no recipe fixes.
- **differ**: entries with other bits than the arithmetic in **numerics** gives. **other choice**:
  entries of equal magnitude at a cut, of which mergekit's unstable sort keeps any; each holds one
  of the permitted results.
- Altered: the merge of another recipe (the last weight, or slerp's t, .02 larger; densities .05
  larger; another fine-tune for the last model), or a changed file (layers 0 and 1 exchanged; one
  bfloat16 ulp up or down in 1 % of all entries, or of one matrix; gaussian noise of 1 % of a
  tensor's standard deviation). Target: different; a dash where the recipe has no such parameter.
- Random masks may hide small changes (in brackets, without a target): the factor that restores a
  task vector's norm is known up to the rounding of its 16-bit sums, and to the luck of the mask.
"""


@dataclass
class Row:
    """One recipe on one family of models in one dtype; verdicts by kind of alteration."""

    case: Case
    family: str
    dtype: str
    honest: dict[str, Any] = field(default_factory=dict)
    altered: dict[str, str] = field(default_factory=dict)

    @property
    def honest_holds(self) -> bool:
        """Is the unaltered merge recognised?"""
        wanted = ("other mask",) if self.case.random else SAME
        return self.honest["verdict"] in wanted

    @property
    def missed(self) -> list[str]:
        """Alterations that were not seen, of those that have a target."""
        free = HIDDEN if self.case.random else ()
        return [k for k, v in self.altered.items() if v != "different" and k not in free]


def check(recipe: Path, folder: Path) -> dict[str, Any]:
    """Compare a published folder with a recipe whose models are named by their paths."""
    wanted = load_recipe(recipe)
    return remerge(
        wanted, open_checkpoint(folder, folder.name), {m: Path(m) for m in wanted.models}
    )


def run(folder: Path, python: Path, families: list[str]) -> tuple[list[Row], Any]:
    """Merge and check everything; what the peer says of itself."""
    rows = []
    with peer.started(python, folder / "peer.log") as mergekit:
        for family in families:
            place = folder / family
            write_inputs(place, family, QUICK)
            for dtype in ("bfloat16", "float32"):
                for case in cases():
                    rows.append(one(Row(case, family, dtype), place, mergekit))
            shutil.rmtree(place)
        return rows, mergekit.facts


def one(row: Row, place: Path, mergekit: peer.Peer) -> Row:
    """Fill in one row."""
    work = place / "work"
    work.mkdir()
    recipe = written(work / "recipe.yaml", row.case.recipe, row.dtype, place)
    published = work / "published"
    mergekit.merge(recipe, published)
    row.honest = check(recipe, published)
    for name, change in REMADE.items():
        other = change(row.case.recipe)
        if other is not None:
            out = work / f"{len(row.altered)}"
            mergekit.merge(written(work / "other.yaml", other, row.dtype, place), out)
            row.altered[name] = check(recipe, out)["verdict"]
    for name, edit in EDITED.items():
        out = work / f"{len(row.altered)}"
        edited(published, out, edit)
        row.altered[name] = check(recipe, out)["verdict"]
    shutil.rmtree(work)
    return row


def written(path: Path, recipe: dict[str, Any], dtype: str, place: Path) -> Path:
    """The recipe as a file."""
    path.write_text(yaml.safe_dump(placed({**recipe, "dtype": dtype}, place)))
    return path


def table(rows: list[Row]) -> Iterator[str]:
    """One line per row."""
    changes = [*REMADE, *EDITED]
    heads = ["recipe", "models", "dtype", "honest", "numerics", "differ", "other choice", *changes]
    yield "| " + " | ".join([*heads, "holds"]) + " |"
    yield "|" + "---|" * (len(heads) + 1)
    for row in rows:
        size = sum(t["elements"] for t in row.honest["tensors"])
        shares = [
            sum(t[key] * t["elements"] for t in row.honest["tensors"]) / size
            for key in ("share_differing", "share_chosen")
        ]
        told = ["" if row.case.random else f"{share:.3%}" for share in shares]
        verdicts = [SHORT[row.altered[name]] if name in row.altered else "-" for name in changes]
        if row.case.random:
            verdicts = [f"({v})" if n in HIDDEN else v
                        for n, v in zip(changes, verdicts, strict=True)]  # fmt: skip
        holds = "yes" if row.honest_holds and not row.missed else "**no**"
        numerics = row.honest["numerics"] or ""
        cells = [row.case.name, row.family, row.dtype, SHORT[row.honest["verdict"]],
                 "" if row.case.random else numerics, *told, *verdicts, holds]  # fmt: skip
        yield "| " + " | ".join(cells) + " |"


def page(rows: list[Row], facts: Any, seconds: float, quick: bool) -> str:
    """The Markdown report."""
    kinds = sorted({row.family for row in rows})
    plain = [row for row in rows if not row.case.random]
    altered = [(row, name) for row in rows for name in row.altered
               if not (row.case.random and name in HIDDEN)]  # fmt: skip
    lines = [
        "# Published merges re-made and compared",
        "",
        f"{time.strftime('%Y-%m-%d')}, {'quick' if quick else 'full'} run, {seconds:.0f} s. "
        f"{machine(facts)}.",
        "",
        f"- {sum(r.honest_holds for r in plain)} of {len(plain)} merges by mergekit are matched "
        "exact or rounding only;",
        f"- {sum(r.honest_holds for r in rows if r.case.random)} of {len(rows) - len(plain)} with "
        "random masks are matched as other mask;",
        f"- {len(altered) - sum(len(row.missed) for row in rows)} of {len(altered)} altered ones "
        "are told to be different;",
        "- time and memory: the last section, with what misses its bound.",
        "",
        *table(rows),
        "",
        *(f"- **{name}** models: {FAMILIES[name]}." for name in kinds),
        LEGEND.strip(),
    ]
    return "\n".join(lines) + "\n"


def entries(rows: list[Row]) -> list[dict[str, Any]]:
    """The numbers for --json."""
    found = []
    for row in rows:
        name = f"{row.case.name} ({row.family}, {row.dtype})"
        target = "other mask" if row.case.random else " or ".join(SAME)
        found.append({"name": f"{name}: honest", "value": row.honest["verdict"], "unit": "verdict",
                      "target": target, "holds": row.honest_holds})  # fmt: skip
        for change, verdict in row.altered.items():
            free = row.case.random and change in HIDDEN
            found.append({"name": f"{name}: {change}", "value": verdict, "unit": "verdict",
                          "target": None if free else "different",
                          "holds": None if free else verdict == "different"})  # fmt: skip
    return found


def main() -> int:
    """Parse arguments, run, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="models of one family only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    parser.add_argument("--venv", type=Path, metavar="DIR", default=peer.default_folder(),
                        help="where the peer's environment is, or will be made")  # fmt: skip
    arguments = parser.parse_args()
    python = peer.environment(arguments.venv.absolute())
    started = time.monotonic()
    families = ["fine-tuned"] if arguments.quick else ["fine-tuned", "drifted"]
    with tempfile.TemporaryDirectory() as folder:
        rows, facts = run(Path(folder), python, families)
    sys.stdout.write(page(rows, facts, time.monotonic() - started, arguments.quick))
    if arguments.json:
        arguments.json.write_text(json.dumps(entries(rows), indent=1) + "\n")
    return 0 if all(row.honest_holds and not row.missed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
