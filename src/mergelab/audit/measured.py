"""What a run of ours gave, and how its items relate to those that a claim is about."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mergelab.claims.base import Claim

SPLITS = ("train", "dev", "validation", "test")
SHORT = {"val": "validation", "valid": "validation"}
# What a claim may be about (see `extent`).
SAME, WHOLE = "the items of our run", "the whole set"
PART, OTHER = "a part that was not run", "another set"
_FIRST = re.compile(r":(\d{1,12})\]\Z")
# Items of test sets that are answered right or wrong, as lm-eval scores them: GRIM needs no run.
# Of those in VALIDATION it scores the validation split.
SIZES = {
    "arc_challenge": 1172,
    "arc_easy": 2376,
    "boolq": 3270,
    "gsm8k": 1319,
    "hellaswag": 10042,
    "medmcqa": 4183,
    "medqa_4options": 1273,
    "mmlu_anatomy": 135,
    "mmlu_clinical_knowledge": 265,
    "mmlu_college_biology": 144,
    "mmlu_college_medicine": 173,
    "mmlu_medical_genetics": 100,
    "mmlu_professional_medicine": 272,
    "openbookqa": 500,
    "piqa": 1838,
    "pubmedqa": 500,
    "sciq": 1000,
    "truthfulqa_mc1": 817,
    "winogrande": 1267,
}
VALIDATION = ("boolq", "hellaswag", "medmcqa", "piqa", "truthfulqa_mc1", "winogrande")


@dataclass(frozen=True)
class Measured:
    """One value that a run of ours gave: of one benchmark, metric, filter and number of shots.

    `size` counts the items that claims are about which name no split (None: not known), `whole`
    those of the split or file that the run is of; it saw `n`, those of `split` ("test",
    "test[:150]", or DATASET/PART). `error`: standard error of sampling items; `spread` by dtype:
    the standard deviation between this run and an honest one in that dtype. `hits`: items answered
    right, None unless each is right or wrong and all count alike. `rescaled`: the value moved so
    that guessing is 0, where a leaderboard says what guessing is, and `stretch` what that
    multiplies differences by. `higher_is_better`: as the task says of its main metric, of others by
    their names. `fewshot_as_multiturn`: is each example of a chat a turn of its own? None where
    there are none."""

    benchmark: str
    task: str
    metric: str
    filter: str | None
    shots: int
    value: float
    n: int
    size: int | None
    whole: int | None
    split: str
    error: float
    spread: Mapping[str, float]
    hits: int | None
    task_version: str
    dtype: str
    lm_eval: str
    chat_template: bool = False
    fewshot_as_multiturn: bool | None = None
    combine: str | None = None
    rescaled: float | None = None
    stretch: float = 1.0
    higher_is_better: bool = True
    record: str | None = None


def extent(claim: Claim, one: Measured) -> str:
    """Which items a claim is about, by what it says of its split.

    SAME: those of our run, by their name ("mine/fresh", "test[:40]"; "[:40]" if no file of other
    items stands for the data). WHOLE: all of the set that ours is, stands for, or is a part of.
    PART: first items, or so, that we did not run; OTHER: another split."""
    said, ours = _plain(claim.split), _plain(one.split)
    root, own = _root(said), _root(ours)
    if not said:
        return WHOLE
    if said != root:  # a part
        first = not root and said == ours.removeprefix(own)
        if said == ours or (first and one.whole in (None, one.size)):
            return SAME
        return WHOLE if root in ("", own) and _all(said, total(claim, one)) else PART
    if said == ours and own not in SPLITS:
        return SAME
    stands = own not in SPLITS and root == _usual_split(claim)
    return WHOLE if root == own or stands else OTHER


def total(claim: Claim, one: Measured) -> int | None:
    """Items of the whole set that the claim is about, or about a part of; None: not known."""
    return one.size if _root(_plain(claim.split)) in ("", *SPLITS) else one.whole


def drawn(claim: Claim, one: Measured) -> float:
    """How much drawing the items excuses: the variance of the gap between a score on the claim's
    items and one on ours, in units of that of ours (`error` squared).

    None on the same items, nor for a PART, to which our score says nothing; less, the more of the
    whole set a part covers; of a set that holds other items, both draws."""
    kind, size = extent(claim, one), total(claim, one)
    if kind in (SAME, PART):
        return 0.0
    if kind == OTHER:
        return 2.0
    if size is None:
        return 1.0
    return 1 - one.n / size if holds(one, size) else 1 + one.n / size


def holds(one: Measured, size: int) -> bool:
    """Are our items those of a set of this size, or a part of them, as far as numbers tell?"""
    return one.n <= size and one.whole in (None, size)


def counts(claim: Claim, one: Measured) -> set[int] | None:
    """How many items the claim may be about, by a run of ours: none of them if it is about others;
    None if that is not known."""
    kind = extent(claim, one)
    if kind != WHOLE:
        return {one.n} if kind == SAME else set()
    found = {one.n, one.whole, total(claim, one), *usual_size(claim)}
    known = {size for size in found if size is not None}
    return known if known == found else None


def usual_size(claim: Claim) -> set[int]:
    """Items of the test set that the benchmark is usually scored on, if the claim is about it."""
    known = claim.benchmark in SIZES and _plain(claim.split) in ("", _usual_split(claim))
    return {SIZES[claim.benchmark]} if known else set()


def _usual_split(claim: Claim) -> str:
    return "validation" if claim.benchmark in VALIDATION else "test"


def _plain(split: str | None) -> str:
    """A split in one spelling: "validation[:40]" for "Val[:40]"; "" for none."""
    name, bracket, part = (split or "").strip().casefold().partition("[")
    return f"{SHORT.get(name.strip(), name.strip())}{bracket}{part}"


def _root(split: str) -> str:
    """The split without its part: "test" of "test[:40]"."""
    return split.partition("[")[0]


def _all(part: str, size: int | None) -> bool:
    """Are the first items ("[:2000]") all that there are?"""
    first = _FIRST.search(part)
    return first is not None and size is not None and int(first[1]) >= size
