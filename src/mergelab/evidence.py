"""Evidence: per-token log-probabilities of every view of the items, the model run once.

A token is scored given the tokens before it and the tokenizer's beginning-of-sequence token; a
tokenizer without one leaves a text's first token unscored. Texts are cut at the model's length.
Batches are right-padded, which a causal model cannot see: what else is in the batch changes a value
by rounding only (about 1e-6 nats in float32, 1e-2 in bfloat16). Each view of a part is a file of
its own, written when it is whole: an interrupted run loses the view in flight and goes on there."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergelab import datasets, detectors, inference, views
from mergelab.checkpoint import open_checkpoint
from mergelab.detectors.base import Tokens
from mergelab.errors import UserError
from mergelab.progress import Bar, bar
from mergelab.record import canonical, digest, file_entries, mismatch, packages, write_bytes
from mergelab.study import Study
from mergelab.views import Text

VERSION = 3
ROWS = 256  # positions whose distributions are held at once
STATISTICS = ("logprob", "mean", "std")
ABOUT = {  # metadata of a file
    **dict.fromkeys(("key", "model", "part", "view", "tokenizer", "tokens", "dtype"), str),
    "version": int,
    "bos": (int, None),
    "ids": [str],
}

Floats = NDArray[np.float32]
Scored = tuple[Floats, Floats, Floats]  # logprob, mean, std of one text's tokens


@dataclass(frozen=True)
class Encoded:
    """Token ids of one text, of which those from `first` on are scored; `answer` indexes these."""

    ids: list[int]
    first: int
    answer: int


def file_of(results: Path, variant: str, part: str, view: str) -> Path:
    """Where the evidence on one view of a part lies."""
    return results / "evidence" / variant / part / f"{view}.safetensors"


def probe(study: Study, variant: str, folder: Path, results: Path) -> dict[str, Any]:
    """Run the model in `folder` over every view of every part that the study's checks need.

    Writes results/evidence/<variant>/<part>/<view>.safetensors, each unless it is there already,
    made from the same weights, tokenizer and texts by the same VERSION. Returns what belongs in the
    record."""
    started = time.perf_counter()
    if problems := detectors.problems(study):
        raise UserError("\n".join(problems))
    needed = views.wanted(study)
    items = {part: datasets.items(results, part) for part, _ in needed}
    asked = {(part, view): views.texts(study, part, view, items[part]) for part, view in needed}
    checkpoint = open_checkpoint(folder, variant)
    with inference.quiet(offline=True):
        tokenizer = inference.load_tokenizer(folder)
        inputs: dict[str, Any] = {
            "model": inference.model_hashes(checkpoint),
            "tokenizer": inference.tokenizer_hash(tokenizer),
            "bos": tokenizer.bos_token_id,  # from tokenizer_config.json, as the length may be
            "length": inference.max_length(folder, tokenizer),
        }
        about = {"model": variant, "version": VERSION, "dtype": inference.stored_dtype(checkpoint)}
        about |= {name: inputs[name] for name in ("tokenizer", "bos")}
        keys = {place: _key(inputs, *place, asked[place]) for place in needed}
        paths = {place: file_of(results, variant, *place) for place in needed}
        missing = [place for place in needed if not _holds(paths[place], keys[place])]
        if missing:
            loaded = inference.load(checkpoint)
        for part, view in missing:
            texts, path = asked[part, view], paths[part, view]
            more = {"key": keys[part, view], "part": part, "view": view}
            _write(path, *_measure(loaded, texts, about | more))
    names = [str(path.relative_to(results / "evidence")) for path in paths.values()]
    return {
        "variant": variant,
        "inputs": inputs | {"texts": {f"{p}/{v}": _digest(asked[p, v]) for p, v in needed}},
        "settings": {"dtype": about["dtype"]},
        "versions": {"evidence": VERSION, "packages": packages()},
        "outputs": file_entries(results / "evidence", names),
        "seconds": round(time.perf_counter() - started, 2),
    }


def load(path: Path) -> Tokens:
    """What a model says about the texts of a view. UserError if it is not there or damaged."""
    about = metadata(path)
    stored = _read(path, len(about["ids"]))
    if stored is None:
        raise _damaged(path)
    cuts = list(pairwise(stored["offsets"]))
    logprob, mean, std = ([stored[name][a:b] for a, b in cuts] for name in STATISTICS)
    return Tokens(tuple(about["ids"]), logprob, mean, std, tuple(map(int, stored["answer"])))


def metadata(path: Path) -> dict[str, Any]:
    """What a file is about: key, model, part, view, version, tokenizer (sha256), bos (token id or
    None), dtype, ids (an item's id per text) and tokens (sha256 of the scored token ids).

    Raises UserError if there is no such file or it is damaged."""
    if not path.is_file():
        variant = path.parts[-4]
        raise UserError(f"{path}: no evidence yet. Run: mergelab probe STUDY {variant}")
    known = _read_metadata(path)
    if known is None:
        raise _damaged(path)
    return known


def _damaged(path: Path) -> UserError:
    return UserError(f"{path}: is damaged. Run: mergelab probe STUDY {path.parts[-4]}")


def _key(inputs: dict[str, Any], part: str, view: str, texts: Sequence[Text]) -> str:
    """What a file was made from, as one hash."""
    return digest([VERSION, inputs, part, view, _digest(texts)])


def _digest(texts: Sequence[Text]) -> str:
    return digest([[text.id, text.before, text.text, text.answer] for text in texts])


def _holds(path: Path, key: str) -> bool:
    """Whether the file is whole and was made from the inputs that `key` stands for."""
    known = _read_metadata(path) if path.is_file() else None
    if known is None or known["key"] != key:
        return False
    return _read(path, len(known["ids"])) is not None


def _read_metadata(path: Path) -> dict[str, Any] | None:
    """None if the file is cut short, of another tool or an older version: it is made anew."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            about = json.loads(file.metadata()["mergelab"])
    except (SafetensorError, OSError, TypeError, KeyError, ValueError, RecursionError):
        return None
    return about if not mismatch(about, ABOUT) else None


def _read(path: Path, texts: int) -> dict[str, NDArray[Any]] | None:
    """Offsets, answers and statistics by name; None unless they fit each other, `texts` texts of at
    least one token each, and are finite."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            found = {k: file.get_tensor(k) for k in ("offsets", "answer", *STATISTICS)}
    except (SafetensorError, OSError, TypeError, ValueError):
        return None
    ends, answer = found["offsets"], found["answer"]
    if any(a.dtype != np.int64 for a in (ends, answer)) or answer.shape != (texts,):
        return None
    if ends.shape != (texts + 1,) or ends[0] != 0 or (ends[1:] <= ends[:-1]).any():
        return None
    if (answer < 0).any() or (answer > np.diff(ends)).any():
        return None
    values = [found[name] for name in STATISTICS]
    fits = all(v.dtype == np.float32 and v.shape == (ends[-1],) for v in values)
    return found if fits and all(np.isfinite(v).all() for v in values) else None


def _write(path: Path, tensors: dict[str, NDArray[Any]], about: dict[str, Any]) -> None:
    """All metadata is one JSON text: safetensors writes several keys in random order."""
    from safetensors.numpy import save

    write_bytes(path, save(tensors, metadata={"mergelab": canonical(about)}))


def _measure(
    loaded: inference.Loaded, texts: Sequence[Text], about: dict[str, Any]
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Tensors of one view, and its metadata."""
    encoded = [encode(loaded, text) for text in texts]
    what = f"probe {about['model']}, {about['part']}, {about['view']}"
    with bar(what, sum(len(e.ids) for e in encoded), "tokens") as progress:
        scored = _score(loaded, encoded, progress)
    for text, (values, _, _) in zip(texts, scored, strict=True):
        if not np.isfinite(values).all():
            raise UserError(
                f"{about['model']} gives no finite log-probability on {about['part']}, item "
                f"{text.id}: its weights hold NaN or overflow in their dtype.\n"
                "  Check the merge's parameters, or set out_dtype: float32 in the recipe."
            )
    ends = np.cumsum([0, *(len(values) for values, _, _ in scored)])
    tensors: dict[str, NDArray[Any]] = {
        "offsets": ends.astype(np.int64),
        "answer": np.array([e.answer for e in encoded], dtype=np.int64),
    }
    for name, columns in zip(STATISTICS, zip(*scored, strict=True), strict=True):
        tensors[name] = np.concatenate(columns)
    tokens = digest([e.ids[e.first :] for e in encoded])
    return tensors, about | {"ids": [text.id for text in texts], "tokens": tokens}


def encode(loaded: inference.Loaded, text: Text) -> Encoded:
    """Token ids of a text after the beginning-of-sequence token and as much of what stands before
    it as the model's length leaves room for: the text has the same tokens with and without it.

    The answer begins at the first token that the text before the answer alone would not have given.
    Raises UserError if no token is left to score."""
    tokenizer = loaded.tokenizer
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids: list[int] = tokenizer.encode(text.text, add_special_tokens=False)
    kept = ids[: loaded.length - len(start)]
    skipped = 1 - len(start)  # without a begin token the first one has nothing before it
    if len(kept) <= skipped:
        raise UserError(f"Item '{text.id}' has no token to score. Leave it out of its part.")
    room = loaded.length - len(start) - len(kept)
    before = tokenizer.encode(text.before, add_special_tokens=False) if text.before else []
    before = before[len(before) - min(room, len(before)) :]
    answer = len(ids)
    if text.answer is not None:
        question = tokenizer.encode(text.text[: text.answer], add_special_tokens=False)
        pairs = zip(question, ids, strict=False)
        answer = next((i for i, (a, b) in enumerate(pairs) if a != b), len(question))
    scored = len(kept) - skipped
    answer = min(max(answer - skipped, 0), scored)
    return Encoded([*start, *before, *kept], len(start) + len(before) + skipped, answer)


def _score(loaded: inference.Loaded, encoded: Sequence[Encoded], progress: Bar) -> list[Scored]:
    """(logprob, mean, std) of every text's scored tokens, longest batches first."""
    import torch

    found: dict[int, Scored] = {}
    for batch in _batches(encoded, loaded.model.config.vocab_size):
        width = len(encoded[batch[0]].ids)
        padded = [encoded[i].ids + [0] * (width - len(encoded[i].ids)) for i in batch]
        with torch.inference_mode():
            inputs = torch.tensor(padded, device=loaded.device)
            logits = loaded.model(input_ids=inputs, use_cache=False).logits
            for row, i in enumerate(batch):
                span = range(encoded[i].first, len(encoded[i].ids))
                found[i] = _tokens(logits[row], inputs[row], span)
                progress.advance(len(encoded[i].ids))
    return [found[i] for i in range(len(encoded))]


def _batches(encoded: Sequence[Encoded], vocabulary: int) -> Iterator[list[int]]:
    """Indices of sequences of about equal length, longest first, within the logits' budget."""
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i].ids))
    while order:
        size = inference.batch_size(vocabulary, len(encoded[order[0]].ids))
        yield order[:size]
        order = order[size:]


def _tokens(logits: Any, ids: Any, span: range) -> Scored:
    """Statistics of the tokens at `span` from logits (T V) and ids (T), in float32."""
    import torch

    pieces = []
    for start in range(span.start, span.stop, ROWS):
        stop = min(start + ROWS, span.stop)
        log_p = torch.log_softmax(logits[start - 1 : stop - 1].float(), dim=-1)
        p = log_p.exp()
        mean = (p * log_p).sum(-1)
        spread = (p * (log_p - mean[:, None]) ** 2).sum(-1).sqrt()
        chosen = log_p.gather(-1, ids[start:stop, None]).squeeze(-1)
        pieces.append(torch.stack([chosen, mean, spread]))
    logprob, mean, std = torch.cat(pieces, dim=1).cpu().numpy()
    return logprob, mean, std
