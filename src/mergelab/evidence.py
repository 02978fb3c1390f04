"""Evidence: per-token log-probabilities of suspects and controls, the model run once.

A token is scored given the tokens before it and the tokenizer's beginning-of-sequence token; a
tokenizer without one leaves an item's first token unscored. Texts are cut at the model's length.
Batches are right-padded, which a causal model cannot see: what else is in the batch changes a value
by rounding only (about 1e-6 nats in float32, 1e-2 in bfloat16)."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergelab import datasets, inference
from mergelab.checkpoint import open_checkpoint
from mergelab.errors import UserError
from mergelab.progress import Bar, bar
from mergelab.record import canonical, digest, file_entries, packages, write_bytes
from mergelab.study import Study

VERSION = 2
ROWS = 256  # positions whose distributions are held at once
STATISTICS = ("logprob", "mean", "std")

Floats = NDArray[np.float32]


def probe(study: Study, variant: str, folder: Path, results: Path) -> dict[str, Any]:
    """Run the model in `folder` once over the items of every part that a check names.

    Writes results/evidence/<variant>.safetensors unless it is there already, made from the same
    weights, tokenizer and items by the same VERSION. Returns what belongs in the record."""
    started = time.perf_counter()
    path = results / "evidence" / f"{variant}.safetensors"
    items = {part: datasets.items(results, part) for part in parts(study)}
    checkpoint = open_checkpoint(folder, variant)
    inputs: dict[str, Any] = {
        "model": inference.model_hashes(checkpoint),
        "items": {part: digest([[i["id"], i["text"]] for i in items[part]]) for part in items},
    }
    with inference.quiet(offline=True):
        tokenizer = inference.load_tokenizer(folder)
        inputs["tokenizer"] = inference.tokenizer_hash(tokenizer)
        inputs["bos"] = tokenizer.bos_token_id  # both may lie in tokenizer_config.json only
        inputs["length"] = inference.max_length(folder, tokenizer)
        key = digest({"version": VERSION, "inputs": inputs})
        if not _holds(path, key):
            loaded = inference.load(checkpoint)
            tensors, tokens = _measure(loaded, items, variant)
            about = {
                "key": key,
                "model": variant,
                "version": VERSION,
                "tokenizer": inputs["tokenizer"],
                "bos": inputs["bos"],
                "dtype": loaded.dtype,
                "ids": {part: [str(item["id"]) for item in items[part]] for part in items},
                "tokens": tokens,
            }
            _write(path, tensors, about)
    return {
        "variant": variant,
        "inputs": inputs,
        "settings": {"parts": list(items), "dtype": metadata(path)["dtype"]},
        "versions": {"evidence": VERSION, "packages": packages()},
        "outputs": file_entries(path.parent, [path.name]),
        "seconds": round(time.perf_counter() - started, 2),
    }


def parts(study: Study) -> list[str]:
    """The parts that the study's contamination checks name, each once, sorted."""
    checks = study.contamination
    return sorted({part for check in checks for part in (check.suspects, check.controls)})


def load(path: Path, part: str, statistic: str = "logprob") -> list[Floats]:
    """One float32 array per item of `part`: the tokens' logprob, or the mean or std of log p
    under the model's own next-token distribution, in nats.

    Raises UserError if it is not there or damaged."""
    about = metadata(path)
    if part not in about["ids"]:
        raise UserError(f"{path}: holds nothing on {part}. Delete it and run mergelab probe.")
    stored = _read_part(path, part, len(about["ids"][part]))
    if stored is None:
        raise _damaged(path)
    values: Floats = stored[statistic]
    return [values[a:b] for a, b in pairwise(stored["offsets"])]


def metadata(path: Path) -> dict[str, Any]:
    """What the file is about: key, model, version, tokenizer (sha256), bos (token id or None),
    dtype, ids and tokens (sha256 of the scored token ids) by part.

    Raises UserError if there is no such file or it is damaged."""
    if not path.is_file():
        raise UserError(f"{path}: no evidence yet. Run mergelab probe for '{path.stem}'.")
    known = _read_metadata(path)
    if known is None:
        raise _damaged(path)
    return known


def _damaged(path: Path) -> UserError:
    return UserError(f"{path}: is damaged. Run: mergelab probe STUDY {path.stem}")


def _holds(path: Path, key: str) -> bool:
    """Whether the file is whole and was made from the inputs that `key` stands for."""
    known = _read_metadata(path) if path.is_file() else None
    if known is None or known["key"] != key:
        return False
    return all(_read_part(path, part, len(ids)) for part, ids in known["ids"].items())


def _read_metadata(path: Path) -> dict[str, Any] | None:
    """None if the file is cut short, of another tool or an older version: it is made anew."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            about = json.loads(file.metadata()["mergelab"])
    except (SafetensorError, OSError, TypeError, KeyError, ValueError, RecursionError):
        return None
    return about if _sound(about) else None


def _sound(about: Any) -> bool:
    """Whether metadata has every key, each of its type, and the same parts throughout."""
    if not isinstance(about, dict) or not isinstance(about.get("bos", ""), int | None):
        return False
    if not all(isinstance(about.get(k), str) for k in ("key", "model", "tokenizer", "dtype")):
        return False
    ids, tokens = about.get("ids"), about.get("tokens")
    if not isinstance(ids, dict) or not isinstance(tokens, dict) or ids.keys() != tokens.keys():
        return False
    lists = all(isinstance(names, list) for names in ids.values())
    return lists and all(isinstance(n, str) for names in ids.values() for n in names)


def _read_part(path: Path, part: str, items: int) -> dict[str, NDArray[Any]] | None:
    """The part's offsets and statistics by name; None unless they fit each other, `items` items
    of at least one token each, and are finite."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            found = {k: file.get_tensor(f"{part}/{k}") for k in ("offsets", *STATISTICS)}
    except (SafetensorError, OSError, TypeError, ValueError):
        return None
    ends = found["offsets"]
    if ends.dtype != np.int64 or ends.shape != (items + 1,):
        return None
    if ends[0] != 0 or (ends[1:] <= ends[:-1]).any():
        return None
    values = [found[name] for name in STATISTICS]
    fits = all(v.dtype == np.float32 and v.shape == (ends[-1],) for v in values)
    return found if fits and all(np.isfinite(v).all() for v in values) else None


def _write(path: Path, tensors: dict[str, NDArray[Any]], about: dict[str, Any]) -> None:
    """All metadata is one JSON text: safetensors writes several keys in random order."""
    from safetensors.numpy import save

    write_bytes(path, save(tensors, metadata={"mergelab": canonical(about)}))


def _measure(
    loaded: inference.Loaded, items: dict[str, list[dict[str, Any]]], variant: str
) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Tensors of every part, and the sha256 of its scored token ids."""
    ids = {part: [encode(loaded, item) for item in items[part]] for part in items}
    tensors: dict[str, NDArray[Any]] = {}
    with bar(f"Probing {variant}", sum(len(t) for part in ids.values() for t in part)) as progress:
        for part, sequences in ids.items():
            scored = _score(loaded, sequences, progress)
            ends = np.cumsum([0, *(len(values) for values, _, _ in scored)])
            tensors[f"{part}/offsets"] = ends.astype(np.int64)
            for name, columns in zip(STATISTICS, zip(*scored, strict=True), strict=True):
                tensors[f"{part}/{name}"] = np.concatenate(columns)
            for item, (values, _, _) in zip(items[part], scored, strict=True):
                if not np.isfinite(values).all():
                    raise UserError(
                        f"{variant} gives no finite log-probability on {part}, item {item['id']}: "
                        "its weights hold NaN or overflow in their dtype.\n"
                        "  Check the merge's parameters, or set out_dtype: float32 in the recipe."
                    )
    return tensors, {part: digest([t[1:] for t in ids[part]]) for part in ids}


def encode(loaded: inference.Loaded, item: dict[str, Any]) -> list[int]:
    """Token ids of an item's text after the beginning-of-sequence token, cut at the model's length.

    Raises UserError if no token is left to score."""
    start = loaded.tokenizer.bos_token_id
    ids: list[int] = loaded.tokenizer.encode(item["text"], add_special_tokens=False)
    ids = (ids if start is None else [start, *ids])[: loaded.length]
    if len(ids) < 2:
        raise UserError(f"Item '{item['id']}' has no token to score. Leave it out of its part.")
    return ids


def _score(
    loaded: inference.Loaded, sequences: Sequence[list[int]], progress: Bar
) -> list[tuple[Floats, Floats, Floats]]:
    """(logprob, mean, std) of every sequence's tokens but the first, longest batches first."""
    import torch

    found: dict[int, tuple[Floats, Floats, Floats]] = {}
    for batch in _batches(sequences, loaded.model.config.vocab_size):
        width = len(sequences[batch[0]])
        padded = [sequences[i] + [0] * (width - len(sequences[i])) for i in batch]
        with torch.inference_mode():
            inputs = torch.tensor(padded, device=loaded.device)
            logits = loaded.model(input_ids=inputs, use_cache=False).logits
            for row, i in enumerate(batch):
                found[i] = _tokens(logits[row], inputs[row], len(sequences[i]))
                progress.advance(len(sequences[i]))
    return [found[i] for i in range(len(sequences))]


def _batches(sequences: Sequence[list[int]], vocabulary: int) -> Iterator[list[int]]:
    """Indices of sequences of about equal length, longest first, within the logits' budget."""
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    while order:
        size = inference.batch_size(vocabulary, len(sequences[order[0]]))
        yield order[:size]
        order = order[size:]


def _tokens(logits: Any, ids: Any, length: int) -> tuple[Floats, Floats, Floats]:
    """Statistics of tokens 1..length-1 from logits (T V) and ids (T), in float32."""
    import torch

    pieces = []
    for start in range(0, length - 1, ROWS):
        stop = min(start + ROWS, length - 1)
        log_p = torch.log_softmax(logits[start:stop].float(), dim=-1)
        p = log_p.exp()
        mean = (p * log_p).sum(-1)
        spread = (p * (log_p - mean[:, None]) ** 2).sum(-1).sqrt()
        chosen = log_p.gather(-1, ids[start + 1 : stop + 1, None]).squeeze(-1)
        pieces.append(torch.stack([chosen, mean, spread]))
    logprob, mean, std = torch.cat(pieces, dim=1).cpu().numpy()
    return logprob, mean, std
