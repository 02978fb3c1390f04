"""How far apart two honest runs of the same items can be: other dtypes, batches and kernels.

Rounding moves the log-probability of an answer by about c * sqrt(|log-probability| + 2): errors of
tokens add up like independent ones. c depends on the model and is measured on it (`measure`); items
whose two best answers are nearly tied may then flip. How well that holds on real tasks:
benchmarks/results/claims.md."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mergelab import inference
from mergelab.checkpoint import open_checkpoint
from mergelab.statistics import Floats

VERSION = 1
ROUNDING = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
COARSEST = "bfloat16"  # what a published score may have been computed in
USUAL = 0.03  # c in bfloat16 where it cannot be measured
LEAST = 1e-5  # c of the best of runs
LARGEST = 2_000_000_000  # bytes of weights that are loaded a second time to measure c
GENERATED = 0.1  # of written answers right half the time, the share that flips at c = USUAL
PER_TEXT = 0.002  # of a loss, relative
WINDOWS = (1, 3, 8, 20)  # tokens of an answer
TEXTS = (
    "Question: Which of these is the main source of energy for the water cycle?\nAnswer: the sun",
    "Question: A shop sells 12 pens for 3 dollars. How much do 20 pens cost?\nAnswer: 5 dollars",
    "A patient with a high fever and a stiff neck was given antibiotics before the test results.",
    "The man opened the bonnet of the car and looked at the engine. He took a spanner and began.",
    "Question: What do plants take in from the air?\nA. Oxygen\nB. Carbon dioxide\nAnswer: B",
    "Although the committee met twice in the spring, no decision about the bridge was reached.",
    "Sarah gave the trophy to Emily because she had won the race; the others only clapped.",
    "To fix a loose screw, put a piece of wood into the hole, then turn the screw in again.",
)  # in the manner of benchmarks; what they say does not matter


def noise(dtype: str, c: float) -> float:
    """c in a dtype; `c` is that in bfloat16, and rounding errors are in proportion."""
    return max(LEAST, c * ROUNDING.get(dtype, ROUNDING[COARSEST]) / ROUNDING[COARSEST])


@functools.cache
def measure(folder: Path) -> float:
    """c of the model in `folder`: how far bfloat16 moves the log-probabilities of some texts.

    Compared with float32. USUAL for a model that is too large to be loaded twice, or overflows."""
    import torch

    checkpoint = open_checkpoint(folder, folder.name)
    if sum((folder / name).stat().st_size for name in checkpoint.files) > LARGEST:
        return USUAL
    loaded = inference.load(checkpoint)
    logs = [
        [_token_logs(loaded, text, dtype) for text in TEXTS]
        for dtype in (torch.float32, torch.bfloat16)
    ]
    moved = []
    for exact, rough in zip(*logs, strict=True):
        for size in WINDOWS:
            for start in range(0, len(exact) - size + 1, size):
                part = slice(start, start + size)
                true, other = math.fsum(exact[part]), math.fsum(rough[part])
                moved.append((other - true) / math.sqrt(2 - true))
    found = math.sqrt(math.fsum(one**2 for one in moved) / max(1, len(moved)))
    return found if moved and math.isfinite(found) else USUAL


def _token_logs(loaded: inference.Loaded, text: str, dtype: Any) -> Floats:
    """The log-probability of each token of a text but the first, in nats."""
    import torch

    ids = loaded.tokenizer.encode(text, add_special_tokens=False)[: loaded.length]
    tokens = torch.tensor([ids], device=loaded.device)
    with torch.inference_mode():
        logits = loaded.model.to(dtype)(tokens).logits[0, :-1]
        logs = torch.log_softmax(logits, -1, dtype=torch.float32)
        chosen = logs.gather(-1, tokens[0, 1:, None])[:, 0]
    return np.asarray(chosen.cpu().numpy(), dtype=np.float64)


def spread(
    resps: Sequence[Sequence[float]],
    value: Floats,
    weight: Floats,
    ours: str,
    theirs: str,
    c: float = USUAL,
) -> float:
    """Standard deviation of sum(value) / sum(weight) between our run and one in `theirs`.

    resps: per item the log-probabilities of its choices, nats; none of a written answer. Items are
    taken as independent; the score of one that is right or wrong flips, a share (TruthfulQA's mc2)
    moves, a loss moves in proportion."""
    c = math.hypot(noise(ours, c), noise(theirs, c))
    binary = bool(np.isin(value, (0.0, 1.0)).all())
    counts = np.array([len(one) for one in resps])
    if binary and (counts >= 2).all():
        variance = [_flip(np.array(r), v, c) for r, v in zip(resps, value, strict=True)]
    elif (counts == 0).all():
        mean = float(value.sum() / weight.sum())
        share = GENERATED * min(1.0, c / USUAL) * 4 * max(0.0, mean * (1 - mean))
        variance = [share * w**2 for w in weight]
    elif (counts >= 2).all():
        moved = [v * (1 - v) * c * _scale(np.array(r)) for r, v in zip(resps, value, strict=True)]
        variance = [one**2 for one in moved]
    else:
        variance = [(PER_TEXT * v) ** 2 for v in value]
    return math.sqrt(math.fsum(variance)) / float(weight.sum())


def _scale(logs: Floats) -> float:
    """Of the difference between the two best choices, for c = 1."""
    best = np.sort(-logs)[:2]
    return float(np.sqrt(best.sum() + 4))


def _flip(logs: Floats, value: float, c: float) -> float:
    """The chance that an item turns from right to wrong, or from wrong to right.

    A wrong one turns right only if the answer that overtakes is the right one, which is any of the
    others. For acc_norm the same log-probabilities stand in (see readings.py)."""
    order = np.argsort(-logs, kind="stable")
    best, others = logs[order[0]], logs[order[1:]]
    sigma = c * np.sqrt(-best - others + 4)
    overtaken = [
        0.5 * math.erfc(gap / s / math.sqrt(2)) for gap, s in zip(best - others, sigma, strict=True)
    ]
    total = min(1.0, math.fsum(overtaken))
    return total if value == 1 else total / len(overtaken)
