"""How a score was measured, here and as a claim says: what must agree, and how close it comes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal, InvalidOperation
from typing import Any

from mergelab.audit.measured import OTHER, PART, SAME, Measured, drawn, extent
from mergelab.audit.noise import COARSEST, ROUNDING
from mergelab.claims.base import Claim
from mergelab.claims.entries import own_unit
from mergelab.statistics import Z95

EXACT = 1e-9  # values closer than this are the same number
MATCHED = ("metric", "filter", "shots", "chat_template")  # what a claim may say, and we may vary
COARSE = 0.1  # the last digit of a share
ONE_TURN = "all examples in one turn"
DTYPES = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}
LOWER = re.compile(r"perplexity|bits_per_byte|\b(ppl|bpb|nll|loss|brier_score|wer|ter)\b", re.I)


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
    if extent(claim, one) in (PART, OTHER):
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
        same = same or (name == "split" and said and extent(claim, one) == SAME)
        if not same:
            rows.append({"field": name, "claimed": said, "ours": ours})
    return rows


def interval(claim: Claim, one: Measured, *, sampling: bool = True) -> tuple[float, float]:
    """What an honest run of the claim's protocol gives in 95 of 100 cases.

    The same items: only numerical noise, but an item at least. Others, or a part of the claim's:
    drawing them, too (see `drawn`)."""
    variance = one.spread[dtype_of(claim.dtype) or COARSEST] ** 2
    variance += one.error**2 * drawn(claim, one) if sampling else 0.0
    half = Z95 * math.sqrt(variance)
    if one.hits is not None:
        half = max(half, 1 / one.n)
    value = value_of(claim, one)
    half *= one.stretch if claim.rescaled else 1.0
    return value - half, value + half


def rank(claim: Claim, one: Measured, *, sampling: bool = True) -> int:
    """0: the printed number; 1: inside the interval; 2: neither."""
    step, gap = unit(claim), value_of(claim, one) - claim.value
    if abs(gap) <= step / 2 + EXACT or 0 <= gap < step - EXACT:  # rounded, or cut off
        return 0
    low, high = interval(claim, one, sampling=sampling)
    return 1 if low - step / 2 - EXACT <= claim.value <= high + step / 2 + EXACT else 2


def value_of(claim: Claim, one: Measured) -> float:
    """Our value on the claim's scale."""
    return one.rescaled if claim.rescaled and one.rescaled is not None else one.value


def unit(claim: Claim) -> float:
    """What the last printed digit is worth, on the scale of the claim's value; nan if none is.

    Of a share at most COARSE: a bare 1 is no rounded 0.6."""
    try:
        exponent = Decimal(claim.printed).as_tuple().exponent
    except InvalidOperation:
        return math.nan
    if not isinstance(exponent, int):
        return math.nan
    step = 10.0**exponent / (100 if claim.percent else 1)
    return step if own_unit(claim.benchmark, claim.metric) else min(step, COARSE)


def dtype_of(said: str | None) -> str | None:
    """torch's name of a dtype in other words; None for what is none, as 4bit."""
    plain = (said or "").lower().removeprefix("torch.").strip()
    plain = DTYPES.get(plain, plain)
    return plain if plain in ROUNDING else None


def _same_version(one: str, other: str) -> bool:
    try:
        return float(one) == float(other)
    except ValueError:
        return one == other
