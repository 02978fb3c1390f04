"""May the evidence on two models be compared, token by token?"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mergelab import evidence
from mergelab.errors import UserError


def require_comparable(model: Path, other: Path, variant: str, named: str, part: str) -> None:
    """Raise UserError unless both models were probed on the same texts, cut alike into tokens.

    What counts is the scored token ids: a fine-tune may add a token that no item holds."""
    ours, theirs = evidence.metadata(model), evidence.metadata(other)
    if ours["ids"] != theirs["ids"]:
        raise UserError(
            f"{model} and {other} were probed on different items of {part}.\n"
            "  Run mergelab probe for both again."
        )
    if ours["tokens"] != theirs["tokens"]:
        if lengths := _lengths(model, other):
            raise UserError(
                f"Detectors that compare tokens need texts cut at one length, but '{variant}' "
                f"takes {lengths[0]} tokens of {part} and its {named} {lengths[1]}.\n"
                "  Take shorter items, or set the same max_position_embeddings in both "
                "config.json; then probe both again."
            )
        raise UserError(
            f"Detectors that compare tokens need a shared tokenizer, but '{variant}' "
            f"(sha256 {ours['tokenizer'][:12]}) and its {named} "
            f"(sha256 {theirs['tokenizer'][:12]}) cut {part} into different tokens.\n"
            "  Name a model with the same tokenizer, or leave these detectors out."
        )
    if ours["bos"] != theirs["bos"]:
        raise UserError(
            f"Detectors that compare tokens need texts to begin alike, but '{variant}' puts token "
            f"{ours['bos']} before them and its {named} {theirs['bos']}.\n"
            "  Set the same bos_token in both tokenizer_config.json, then probe both again."
        )


def _lengths(one: Path, other: Path) -> tuple[int, int] | None:
    """The longest text of each, in tokens, if all that differs is where long texts are cut."""
    ours, theirs = (np.array([len(x) for x in evidence.load(p).logprob]) for p in (one, other))
    longest = int(ours.max()), int(theirs.max())
    same = (np.minimum(ours, min(longest)) == np.minimum(theirs, min(longest))).all()
    return longest if same and longest[0] != longest[1] else None
