"""Which files of a hub repository make the model; every name in it was written by a stranger."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mergelab.checkpoint import INDEX, SINGLE, TOKENIZER
from mergelab.errors import UserError

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
COMMIT = re.compile(r"[0-9a-f]{40}\Z")
SHA256 = re.compile(r"[0-9a-f]{64}\Z")


@dataclass(frozen=True)
class HubFile:
    """A file of a commit: `size` in bytes, git's `blob_id`, and `sha256` if it is in LFS."""

    name: str
    size: int
    blob_id: str
    sha256: str | None

    def facts(self) -> dict[str, Any]:
        """The file as the lock writes it."""
        facts = {"size": self.size, "blob_id": self.blob_id}
        return {**facts, "sha256": self.sha256} if self.sha256 else facts


def needed(what: object, listing: dict[str, HubFile], index: Callable[[], str]) -> list[str]:
    """Names to download: config, tokenizer and weights; each weight once, never code or pickles.

    Of an adapter its two files."""
    carried = [name for name in listing if TOKENIZER.match(name) and "/" not in name]
    if "config.json" not in listing and all(name in listing for name in ADAPTER):
        return sorted(ADAPTER)
    if "config.json" not in listing:
        raise UserError(f"{what}: has no config.json, so it is no transformers model.")
    if INDEX in listing:
        weights = [INDEX, *_shards(what, index(), listing)]
    elif SINGLE in listing:
        weights = [SINGLE]
    else:
        raise UserError(_no_weights(what, listing))
    names = sorted({"config.json", *carried, *weights})
    for name in names:
        if not is_safe_name(name):
            raise UserError(f"{what}: holds a file named {name!r}. Do not use this model.")
    return names


def is_safe_name(name: str) -> bool:
    """Does this file name of a hub or an index stay inside the model's folder?"""
    parts = name.split("/")
    return name.isprintable() and "\\" not in name and not {"", ".", ".."} & set(parts)


def is_plausible(file: HubFile) -> bool:
    """Are name, size and hashes of the right kind?"""
    return (
        isinstance(file.name, str)
        and type(file.size) is int
        and file.size >= 0
        and COMMIT.match(str(file.blob_id)) is not None
        and (file.sha256 is None or SHA256.match(str(file.sha256)) is not None)
    )


def _shards(what: object, text: str, listing: dict[str, HubFile]) -> list[str]:
    """The shards an index names; its names come from strangers."""
    try:
        shards = sorted(set(json.loads(text)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{what}: {INDEX} is no index of safetensors shards.") from None
    for shard in shards:
        if not isinstance(shard, str) or not is_safe_name(shard):
            raise UserError(
                f"{what}: {INDEX} names {shard!r}, which is outside the model's folder. "
                "Do not use this model: its index is damaged or made to harm."
            )
        if shard not in listing or not shard.endswith(".safetensors"):
            raise UserError(
                f"{what}: {INDEX} names {shard!r}, and the repository has no such safetensors "
                "file. Pin another commit."
            )
    return shards


def _no_weights(what: object, listing: dict[str, HubFile]) -> str:
    pickles = sorted(name for name in listing if name.endswith((".bin", ".pt", ".pth")))
    if pickles:
        return (
            f"{what}: has only pickled weights ({pickles[0]}). Reading a pickle can run code, so "
            "mergelab does not. Look for a safetensors revision on the model page (often "
            "refs/pr/1), or convert the model in a sandbox and use its folder (path:)."
        )
    return (
        f"{what}: has neither {SINGLE} nor {INDEX}. "
        "Pick a repository that holds full weights for transformers."
    )
