"""Re-merge a recipe and compare it with published weights: is the model what its recipe says?

Streamed: every tensor is merged block by block and compared at once; nothing is written, and memory
is a few blocks per worker."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

from mergelab.adapters import split_name
from mergelab.checkpoint import FLOATS, NAMES, Checkpoint, Tensor
from mergelab.errors import UserError
from mergelab.forensics import peer_masks, remerge_why
from mergelab.forensics.peer_select import SIMULATED
from mergelab.forensics.peer_windows import Choosing
from mergelab.forensics.remerge_check import OURS, Checker
from mergelab.forensics.remerge_match import Pairs, match
from mergelab.forensics.remerge_show import show
from mergelab.forensics.remerge_tally import Tally
from mergelab.plan import SHARD_SIZE, Plan, make_plan
from mergelab.progress import bar
from mergelab.structure import Recipe
from mergelab.survey import in_order, survey_model
from mergelab.writer import RECORD, Planned

__all__ = ["remerge", "show"]
PROBES = 4  # tensors that tell whose numerics made the merge
LARGEST_PROBE = 1 << 22  # entries
SMALLEST_PROBE = 1 << 8
WORST = 20  # tensors told to people
LOOSE = {"BF16": 2.0**-6, "F16": 2.0**-9, "F32": 2.0**-14, "F64": 2.0**-40}  # relative errors
RECORD_SIZE = 1 << 26  # bytes of a record that is looked at


def remerge(
    recipe: Recipe, published: Checkpoint, folders: Mapping[str, Path], workers: int = 1
) -> dict[str, Any]:
    """Merge again and compare with `published`; a plain dict that `json.dumps` takes.

    folders: where the recipe's models are, by their names in it. verdict:

    - exact: every bit of every tensor.
    - rounding only: every entry is what the recipe gives, up to rounding: see `why` for how many
      entries differ and by how much.
    - other mask: a method with random masks; other entries were kept, as many as there should be,
      with the values that they should have.
    - different: some tensors are not what the recipe gives: `worst` lists them, `why` guesses.
    - unverifiable: it cannot be merged again: a model is missing, say; `why` tells.

    numerics: whose arithmetic fits best: 'mergelab', or that of a release of mergekit and its
    dtype; None if none does, or if masks hide it. tensors: one entry per tensor; its measures are
    taken between published and expected entries and leave out those that hold another of several
    right results (share_chosen)."""
    result: dict[str, Any] = {
        "verdict": "unverifiable",
        "numerics": None,
        "why": "",
        "method": recipe.method.name,
        "dtype": None,
        "tensors": [],
        "worst": [],
        "missing": [],
        "extra": [],
        "notes": [],
    }
    try:
        missing = [name for name in recipe.models if not _here(name, folders)]
        if missing:
            raise UserError(f"the recipe's models {', '.join(missing)} are not here")
        plan = make_plan(recipe, folders, shard_size=SHARD_SIZE)
        return result | _Remerge(plan, published, workers).run()
    except UserError as error:
        return result | {"why": str(error)}


class _Remerge:
    """One plan beside one published model."""

    def __init__(self, plan: Plan, published: Checkpoint, workers: int) -> None:
        self.plan, self.published, self.workers = plan, published, workers
        self.notes = list(plan.warnings)
        seed = _seed_of(published)
        if seed and plan.recipe.method.random:
            self.notes.append(f"seed {seed}, as {published.label}/{RECORD} says")
        self.checker = Checker(plan, seed)
        found = match(plan, published)
        if found.packed:
            raise UserError(
                f"{published.label} stores {', '.join(found.packed[:3])} as integers, packed or "
                "quantised: compare the model that they were made from"
            )
        self.pairs, self.missing, self.extra = found.pairs, found.missing, found.extra
        self.notes += found.notes

    def run(self) -> dict[str, Any]:
        """Compare every tensor with the numerics that fit; conclude."""
        if not self.pairs:
            raise UserError(
                f"{self.published.label} has no tensor of a name and shape that the recipe makes. "
                "Is it another architecture, or stored under other names?"
            )
        with closing(self.checker.files), ThreadPoolExecutor(self.workers) as pool:
            self.checker.surveyed = survey_model(self.plan, self.checker.merge, pool, self.workers)
            order, fits = self.numerics()
            masked = not fits and self.plan.recipe.method.random
            total = sum(published.nbytes for _, published in self.pairs)
            with bar("compare", total) as progress:

                def work(pair: tuple[Planned, Tensor]) -> tuple[Tally, str]:
                    found = self.tensor(pair, order if fits else order[:1], masked=masked)
                    progress.advance(pair[1].nbytes)
                    return found

                found = list(in_order(pool, work, self.pairs))
            return self.concluded([tally for tally, _ in found], [used for _, used in found])

    def tensor(
        self, pair: tuple[Planned, Tensor], order: Sequence[str], *, masked: bool
    ) -> tuple[Tally, str]:
        """Compare one tensor: with the first numerics that explain it, else with the best."""
        if masked and not pair[0].copied:
            return peer_masks.compare(self.checker, *pair), OURS
        tried: list[tuple[int, int, int, Tally, str]] = []
        for numerics in order:
            tally = self.checker.check(*pair, numerics)
            if tally.verdict != "different":
                return tally, numerics
            tried.append((tally.off, tally.differing, len(tried), tally, numerics))
        *_, best, numerics = min(tried, key=lambda one: one[:3])
        return best, numerics

    def numerics(self) -> tuple[list[str], bool]:
        """Whose arithmetic to try, the likeliest first, and does that explain most of a sample?"""
        sample = self.sample()
        if not sample:
            return [OURS], True
        names = [OURS, *self.checker.releases([tensor for tensor, _ in self.pairs])]
        scores = []
        for name in names:
            tallies = [self.checker.check(*pair, name) for pair in sample]
            shares = [tally.share for tally in tallies]
            wrong = [float(tally.verdict == "different") for tally in tallies]
            scores.append((statistics.median(wrong), statistics.mean(shares)))
            if not any(shares):
                break
        order = sorted(range(len(scores)), key=scores.__getitem__)
        rest = [name for name in names if name not in [names[i] for i in order]]
        return [*(names[i] for i in order), *rest], scores[order[0]][0] < 1

    def sample(self) -> Pairs:
        """A few tensors of middle size, spread over the model."""
        merged = [p for p in self.pairs if not p[0].copied and p[0].dtype in FLOATS]
        some = [p for p in merged if SMALLEST_PROBE <= p[0].size <= LARGEST_PROBE]
        some = some or sorted(merged, key=lambda p: p[0].size)[:PROBES]
        count = min(PROBES, len(some))
        return [some[k * (len(some) - 1) // max(1, count - 1)] for k in range(count)]

    def concluded(self, tallies: list[Tally], numerics: list[str]) -> dict[str, Any]:
        """The verdict on the model, and what it rests on."""
        entries = [tally.entry() for tally in tallies]
        wrong = [t for t in tallies if t.verdict == "different"]
        whole = not self.missing and not self.extra
        verdicts = {tally.verdict for tally in tallies}
        masks = peer_masks.together(tallies)
        fits = whole and (not masks or masks["fits"])
        if wrong or not fits:
            verdict = "different"
        else:
            ranked = ("other mask", "rounding only", "exact")
            verdict = next(v for v in ranked if v in verdicts)
        why = self.why(verdict, tallies, wrong)
        if wrong and fits and all(map(self.perhaps, wrong)):
            verdict, why = "unverifiable", self.doubt(tallies, wrong)
        bad = [entry for entry in entries if not entry["equal"]]
        badness = {"different": 0, "other mask": 1, "rounding only": 2}
        bad.sort(key=lambda e: (badness[e["verdict"]], -e["relative_error"], e["tensor"]))
        dtypes = sorted({NAMES.get(tensor.dtype, tensor.dtype) for tensor, _ in self.pairs})
        told = max(dict.fromkeys(numerics), key=numerics.count)
        return {
            "verdict": verdict,
            "numerics": None if masks or wrong == tallies else self.named(told),
            "why": why,
            "dtype": ", ".join(dtypes),
            "tensors": entries,
            "worst": bad[:WORST],
            "missing": self.missing,
            "extra": self.extra,
            "notes": list(dict.fromkeys(self.notes)),
        }

    def perhaps(self, tally: Tally) -> bool:
        """May differences come from a program whose arithmetic is not followed?"""
        method, tensor = self.plan.recipe.method, tally.tensor
        if tally.undecided:
            return True
        if method.random or tensor.dtype not in FLOATS:
            return False
        work, followed = self.checker.work(tensor), SIMULATED.get(method.name)
        if followed and work != "F64":
            return False
        if followed and issubclass(followed, Choosing) and not tensor.copied:
            return not tally.far
        return tally.relative <= LOOSE[work]

    def doubt(self, tallies: list[Tally], wrong: list[Tally]) -> str:
        """Why it cannot be told whether different tensors fit."""
        if told := [tally for tally in wrong if tally.undecided]:
            return (
                f"{len(wrong)} of {len(tallies)} tensors differ, as {told[0].tensor.name} does, "
                f"where nothing can be told: {told[0].undecided}"
            )
        works = sorted({NAMES[self.checker.work(tally.tensor)] for tally in wrong})
        return (
            f"{len(wrong)} of {len(tallies)} tensors differ by no more than rounding, or a "
            "choice among equal magnitudes, may; but mergekit's arithmetic of "
            f"{self.plan.recipe.method.name} in {', '.join(works)} is not followed: such "
            "differences may be its own, or small changes"
        )

    def named(self, numerics: str) -> str:
        """'mergelab', or 'mergekit 0.1.5, bfloat16'."""
        if numerics == OURS:
            return OURS
        floats = [tensor for tensor, _ in self.pairs if tensor.dtype in FLOATS]
        works = sorted({NAMES[self.checker.work(tensor)] for tensor in floats} - {"float64"})
        return f"mergekit {numerics}, {', '.join(works)}"

    def why(self, verdict: str, tallies: list[Tally], wrong: list[Tally]) -> str:
        """One or two sentences."""
        if verdict == "different":
            return remerge_why.different(
                self.checker, self.pairs, tallies, wrong, self.missing, self.extra
            )
        return remerge_why.same(verdict, tallies)


def _here(name: str, folders: Mapping[str, Path]) -> bool:
    """Is there a folder for a model, or for each part of MODEL+ADAPTER?"""
    halves = split_name(name, folders.__contains__) or (name,)
    return all(half in folders for half in halves)


def _seed_of(published: Checkpoint) -> int:
    """The seed in the model's own record, else 0; it is only a first guess."""
    path = published.folder / RECORD
    try:
        if path.stat().st_size > RECORD_SIZE:
            return 0
        seed = json.loads(path.read_bytes())["seed"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return 0
    return seed if type(seed) is int and abs(seed) < 1 << 63 else 0
