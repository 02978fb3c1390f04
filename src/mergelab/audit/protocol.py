"""How a score was measured, here and as a claim says: what must agree, and how close it comes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from typing import Any

from mergelab.audit.noise import COARSEST, ROUNDING
from mergelab.claims.base import Claim
from mergelab.statistics import Z95

EXACT = 1e-9  # values closer than this are the same number
MATCHED = ("metric", "filter", "shots", "chat_template")  # what a claim may say, and we may vary
ONE_TURN = "all examples in one turn"
SPLITS = ("train", "dev", "validation", "test")
DTYPES = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}
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
LOWER = re.compile(r"perplexity|bits_per_byte|\b(ppl|bpb|nll|loss|brier_score|wer|ter)\b", re.I)
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


def matching(claim: Claim, measured: Sequence[Measured]) -> list[Measured]:
    """The runs that are as the claim says, as far as it says.

    Of a claim about chats, where none was run: those without (see `obstacles`)."""
    found = [one for one in measured if matches(claim, one)]
    if found or not claim.chat_template or any(one.chat_template for one in measured):
        return found
    return [one for one in measured if matches(replace(claim, chat_template=None), one)]


def matches(claim: Claim, one: Measured) -> bool:
    """Was `one` measured as the claim says, as far as it says?"""
    said = {name: getattr(claim, name) for name in MATCHED if getattr(claim, name) is not None}
    if claim.metric is not None and "," in claim.metric:
        said["metric"], _, said["filter"] = claim.metric.partition(",")
    if claim.rescaled and one.rescaled is None:
        return False
    return all(getattr(one, name) == value for name, value in said.items())


def obstacles(claim: Claim, one: Measured) -> list[str]:
    """What of the claim's protocol we cannot run, in words: a gap may come from there."""
    found = []
    if claim.task_version is not None and not _same_version(claim.task_version, one.task_version):
        found.append(f"version {claim.task_version} of the task (here: {one.task_version})")
    if claim.chat_template and not one.chat_template:
        found.append("the chat template")
    if claim.dtype is not None and dtype_of(claim.dtype) is None:
        found.append(f"{claim.dtype} weights")
    if _other_split(claim, one) or _part_of(claim.split, one.split):
        found.append(f"the split {claim.split} (here: {one.split})")
    return found


def untried(claim: Claim, one: Measured, measured: Sequence[Measured], chats_failed: bool) -> str:
    """What a claim may be about that does not say whether it is about chats: plain prompts where
    only chats were run, or chats where those failed; "" if nothing."""
    alike = all(other.chat_template == one.chat_template for other in measured)
    if claim.chat_template is not None or not alike:
        return ""
    return "a plain prompt" if one.chat_template else "the chat template" if chats_failed else ""


def prompts(shots: int, chat_template: bool, fewshot_as_multiturn: bool | None) -> str:
    """How a run asks, in a few words."""
    said = f"{shots} shot{'' if shots == 1 else 's'}"
    said += ", chat template" if chat_template else ""
    return f"{said}, {ONE_TURN}" if fewshot_as_multiturn is False else said


def differences(claim: Claim, one: Measured) -> list[dict[str, Any]]:
    """The fields of the protocol where claim and run differ, or of which the claim says nothing."""
    fields = ("metric", "filter", "shots", "task_version", "chat_template", "dtype", "split")
    rows = []
    for name in fields:
        said, ours = getattr(claim, name), getattr(one, name)
        same = said == ours or (name == "dtype" and dtype_of(said) == ours)
        same = same or (name == "task_version" and said and _same_version(said, ours))
        if not same:
            rows.append({"field": name, "claimed": said, "ours": ours})
    return rows


def interval(claim: Claim, one: Measured, *, sampling: bool = True) -> tuple[float, float]:
    """What an honest run of the claim's protocol gives in 95 of 100 cases.

    The same items: only numerical noise, but an item at least. Items of which ours are a part, or
    others: sampling them, too (the part's error shrinks with what it covers of the whole)."""
    variance = one.spread[dtype_of(claim.dtype) or COARSEST] ** 2
    if sampling and _other_split(claim, one):
        variance += 2 * one.error**2
    elif sampling and is_part(claim, one):
        variance += one.error**2 * (1 - one.n / (one.size or math.inf))
    half = Z95 * math.sqrt(variance)
    if one.hits is not None:
        half = max(half, 1 / one.n)
    value = value_of(claim, one)
    half *= one.stretch if claim.rescaled else 1.0
    return value - half, value + half


def is_part(claim: Claim, one: Measured) -> bool:
    """Did the run see a part of the items that the claim is about?"""
    return (one.size is None or one.n < one.size) and claim.split != one.split


def value_of(claim: Claim, one: Measured) -> float:
    """Our value on the claim's scale."""
    return one.rescaled if claim.rescaled and one.rescaled is not None else one.value


def unit(claim: Claim) -> float:
    """What the last printed digit is worth, on the scale of the claim's value; nan if none is."""
    try:
        exponent = Decimal(claim.printed).as_tuple().exponent
    except InvalidOperation:
        return math.nan
    if not isinstance(exponent, int):
        return math.nan
    return 10.0**exponent / (100 if claim.percent else 1)


def dtype_of(said: str | None) -> str | None:
    """torch's name of a dtype in other words; None for what is none, as 4bit."""
    plain = (said or "").lower().removeprefix("torch.").strip()
    plain = DTYPES.get(plain, plain)
    return plain if plain in ROUNDING else None


def usual_size(claim: Claim) -> set[int]:
    """Items of the test set that the benchmark is usually scored on, if the claim is about it."""
    usual = "validation" if claim.benchmark in VALIDATION else "test"
    known = claim.benchmark in SIZES and may_be_split(claim, usual)
    return {SIZES[claim.benchmark]} if known else set()


def counts(claim: Claim, one: Measured) -> set[int] | None:
    """How many items the claim may be about, by a run of ours; None if that is not known."""
    if claim.split == one.split:
        return {one.n}
    found = {one.n, one.whole, *usual_size(claim)}
    found |= {one.size} if claim.split in (None, *SPLITS) else set()
    known = {size for size in found if size is not None}
    return known if known == found else None


def may_be_split(claim: Claim, split: str) -> bool:
    """Is the claim about this split, as far as it says?"""
    return claim.split in (None, split, split.partition("[")[0])


def _same_version(one: str, other: str) -> bool:
    try:
        return float(one) == float(other)
    except ValueError:
        return one == other


def _part_of(said: str | None, ours: str) -> bool:
    """Is a claim about some of the items that we saw ("test[:100]" of "test")?"""
    whole, part, _ = (said or "").partition("[")
    return bool(part) and said != ours and whole in ("", ours.partition("[")[0])


def _other_split(claim: Claim, one: Measured) -> bool:
    ours = one.split.partition("[")[0]
    said = (claim.split or "").partition("[")[0]
    return said in SPLITS and ours in SPLITS and said != ours
