"""tokenizer.json and its companions as data: read tokens, drop tokens, append tokens.

The format is that of the tokenizers library, which is not needed to edit it: `model.vocab` (and
`merges` for BPE) holds the trained tokens, `added_tokens` those matched before the model runs."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergelab.checkpoint import Checkpoint
from mergelab.errors import UserError

JSON, CONFIG = "tokenizer.json", "tokenizer_config.json"
OTHERS = ("generation_config.json", "preprocessor_config.json", "processor_config.json")
KEPT = ("chat_template", CONFIG, "special_tokens_map.json", *OTHERS)  # hold no vocabulary
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
PLAIN = dict(zip(FLAGS, (False, False, False, True, False), strict=True))
Entry = dict[str, Any]


@dataclass(frozen=True)
class Tokens:
    """A model's tokens by id. `added`: flags of those that are matched before the tokenizer's
    model runs; `beyond`: tokens whose id has no row in the embedding."""

    ids: Mapping[str, int]
    added: Mapping[str, Entry]
    beyond: tuple[str, ...]


def read_tokens(model: Checkpoint, rows: int) -> Tokens | None:
    """The tokens of a model whose embedding has `rows` rows; None if it has no tokenizer at all.

    Raises UserError for a broken tokenizer.json, and for a tokenizer without one."""
    if JSON not in model.tokenizer_files:
        slow = [name for name in model.tokenizer_files if not name.startswith(KEPT)]
        if slow:
            raise UserError(
                f"model {model.label}: {', '.join(slow)} without {JSON}: only fast tokenizers can "
                "be merged. Save it as one: load it with transformers.AutoTokenizer, then "
                "save_pretrained into the model's folder."
            )
        return None
    data = load(_bytes(model, JSON), model.folder / JSON)
    try:
        ids = _vocabulary(data)
        entries = {str(entry["content"]): entry for entry in data.get("added_tokens") or ()}
        ids |= {token: int(entry["id"]) for token, entry in entries.items()}
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise UserError(
            f"model {model.label}: {model.folder / JSON} is not in the format of the tokenizers "
            "library. Download or copy it again."
        ) from None
    ordered = sorted(ids, key=ids.__getitem__)
    held = {token: ids[token] for token in ordered if 0 <= ids[token] < rows}
    added = {
        token: {flag: bool(entries[token].get(flag, PLAIN[flag])) for flag in FLAGS}
        for token in held
        if token in entries
    }
    return Tokens(held, added, tuple(token for token in ordered if token not in held))


def _vocabulary(data: Mapping[str, Any]) -> dict[str, int]:
    vocab = data["model"]["vocab"]
    if isinstance(vocab, list):  # unigram: [[token, score], ...]
        return {str(entry[0]): i for i, entry in enumerate(vocab)}
    return {str(token): int(i) for token, i in vocab.items()}


def tokenizer_files(
    source: Checkpoint, donor: Checkpoint, drop: Collection[str], added: Mapping[str, Entry]
) -> dict[str, bytes]:
    """The tokenizer files of `source` without the tokens of `drop`, with the `added` ones (token
    to entry with id and flags), beside the other small files of `donor`.

    Files of slow tokenizers, which would say something else, stay behind if anything changes."""
    files = {
        name: _bytes(model, name)
        for model in (source, donor)
        for name in model.tokenizer_files
        if (name in OTHERS) == (model is donor) or source is donor
    }
    if not drop and not added:
        return files
    files = {n: data for n, data in files.items() if n.startswith(KEPT)}
    files[JSON] = dump(
        _edited(load(_bytes(source, JSON), source.folder / JSON), source, frozenset(drop), added)
    )
    if CONFIG in files:
        facts = load(_bytes(source, CONFIG), source.folder / CONFIG)
        decoder = facts.get("added_tokens_decoder")
        if isinstance(decoder, dict):
            kept = {i: e for i, e in decoder.items() if _content(e) not in drop}
            kept |= {str(entry["id"]): _without_id(entry) for entry in added.values()}
            files[CONFIG] = dump({**facts, "added_tokens_decoder": kept})
    return files


def _edited(
    data: dict[str, Any], source: Checkpoint, drop: frozenset[str], added: Mapping[str, Entry]
) -> dict[str, Any]:
    model = dict(data["model"])
    inside = drop.intersection(_vocabulary(data))
    if inside:
        if model.get("type") != "BPE":
            raise UserError(
                f"model {source.label}: {len(inside)} tokens of its {model.get('type')} tokenizer "
                f"have no row in the embedding (such as {min(inside)!r}); only a BPE tokenizer can "
                "be cut to its embedding. Take the tokenizer of another model."
            )
        model["vocab"] = {t: i for t, i in model["vocab"].items() if t not in inside}
        prefix = model.get("continuing_subword_prefix") or ""
        merges = model.get("merges") or []
        model["merges"] = [m for m in merges if not inside.intersection(_parts(m, prefix))]
    old = data.get("added_tokens") or []
    entries = [e for e in old if e["content"] not in drop and e["content"] not in added]
    entries = sorted([*entries, *added.values()], key=lambda entry: int(entry["id"]))
    return {**data, "model": model, "added_tokens": entries}


def _parts(merge: Any, prefix: str) -> tuple[str, ...]:
    """The two tokens of a merge, 'a b' or [a, b], and the one they become."""
    pair = merge.split(" ") if isinstance(merge, str) else merge
    left, right = (*pair, "", "")[:2]
    return str(left), str(right), str(left) + str(right).removeprefix(prefix)


def _without_id(entry: Entry) -> Entry:
    return {key: value for key, value in entry.items() if key != "id"}


def _content(entry: Any) -> str:
    return str(entry.get("content")) if isinstance(entry, dict) else ""


def added_entries(tokens: Iterable[tuple[str, int, Entry]]) -> dict[str, Entry]:
    """Entries of tokenizer.json's `added_tokens` out of (token, id, flags)."""
    return {token: {"id": i, "content": token, **flags} for token, i, flags in tokens}


def _bytes(model: Checkpoint, name: str) -> bytes:
    try:
        return (model.folder / name).read_bytes()
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}.") from None


def load(data: bytes, path: Path) -> dict[str, Any]:
    """A JSON object out of a small file; `path` only serves the message."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path}: is not a JSON object. Download or copy it again.")
    return value


def dump(value: Any) -> bytes:
    """The text of a small file."""
    return (json.dumps(value, indent=2) + "\n").encode()
