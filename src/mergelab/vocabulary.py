"""The output's vocabulary: which tokens, and for each model the row of each token.

As mergekit 0.1.5 does it (`tokenizer_source`, `tokenizer`), from tokenizer.json alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mergelab.checkpoint import Checkpoint, split_layer
from mergelab.errors import Problems, UserError
from mergelab.rows import (
    ZERO,
    Array,
    Defaults,
    Rows,
    Stored,
    default_rows,
    embedding_rows,
    is_vocabulary,
    rerow,
)
from mergelab.tokenizer import Tokenizer, TokenSource
from mergelab.tokens import (
    PLAIN,
    Entry,
    Tokens,
    added_entries,
    dump,
    load,
    read_tokens,
    tokenizer_files,
)

GENERATION = "generation_config.json"


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The output's tokens and, per model, the row of each of them.

    tokens: token to id; size: rows of the output's vocabulary tensors, padding included; ids: per
    model, output id to its row or -1; changed: must vocabulary tensors be re-rowed; files: the
    tokenizer and generation files to write; named: row of each source that names a token; rows: of
    each model's embedding; donor: the model that gives the config; instead: the config whose token
    ids replace those that are gone."""

    tokens: Mapping[str, int]
    size: int
    ids: Mapping[str, Array]
    changed: bool
    files: Mapping[str, bytes]
    warnings: tuple[str, ...]
    named: Mapping[TokenSource, int]
    rows: Mapping[str, int]
    donor: str
    instead: Mapping[str, Any]
    settings: Tokenizer

    def rerow(
        self,
        name: str,
        sources: Mapping[str, Stored],
        base: str | None,
        problems: Problems,
        warnings: list[str],
    ) -> dict[str, Rows] | None:
        """The tensors that are merged into `name`, per model, each in the output's order.

        None if nothing is to be done: they hold no token rows, or the vocabularies agree. `base`:
        the base_model that holds for this tensor. Token sources that cannot be had are noted in
        `problems`, tokens that get zeros because no model has them in `warnings`."""
        at = [is_vocabulary(t.name, t, self.rows[m]) for m, t in sources.items()]
        if not self.changed or not all(at):
            return None
        ids = [self.ids[model] for model in sources]
        real = np.zeros(len(ids[0]), bool)
        real[list(self.tokens.values())] = True
        index = list(sources).index(base) if base and base in sources else None
        defaults = default_rows(ids, index, real, self.size)
        given = [self.tokens[token] for token in self.settings.tokens]
        nobody = np.setdiff1d(np.flatnonzero(defaults.which == ZERO), given)
        if len(nobody):
            warnings.append(f"{name}: {len(nobody):,} tokens get zeros, as no model here has them")
        for token, wanted in self.settings.tokens.items():
            self.explicit(name, token, wanted, list(sources), defaults, problems)
        return rerow(name, sources, ids, defaults)

    def explicit(
        self,
        name: str,
        token: str,
        wanted: TokenSource,
        group: list[str],
        defaults: Defaults,
        problems: Problems,
    ) -> None:
        """Put the recipe's source of one token into the defaults."""
        i = self.tokens[token]
        if not wanted.force and all(self.ids[model][i] >= 0 for model in group):
            return
        defaults.forced[i] = wanted.force
        if wanted.model is None:
            defaults.which[i] = ZERO
            return
        if wanted.model not in group:
            problems.add(
                f"{wanted.at}: the token {token!r} takes its row from {wanted.model}, which has no "
                f"part in tensor {name}. Take it from one of {', '.join(group)}."
            )
            return
        row = self.row_of(wanted, i)
        if not 0 <= row < self.rows[wanted.model]:
            asked = token if wanted.token is None else wanted.token
            problems.add(
                f"{wanted.at}: model {wanted.model} has no row for the token {asked!r}. Give "
                "another source, or 'kind: zero'."
            )
            return
        defaults.which[i], defaults.row[i] = group.index(wanted.model), row

    def row_of(self, wanted: TokenSource, i: int) -> int:
        """The row, in the source's model, that the output's token i is to take; -1 without."""
        if wanted.token is None:
            return int(self.ids[str(wanted.model)][i])
        return wanted.token if isinstance(wanted.token, int) else self.named[wanted]

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The donor's config (or generation config) with the output's vocab_size and token ids.

        A token id follows its token to its new id; one whose token is gone becomes that of the
        model that gives the tokenizer, else null."""
        return self._config(config, self.instead) if self.changed else dict(config)

    def _config(self, config: Mapping[str, Any], instead: Mapping[str, Any]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in config.items():
            if key == "vocab_size":
                value = self.size
            elif key.endswith("_token_id"):
                value = self._new_id(value, instead.get(key))
            elif key == "text_config" and isinstance(value, dict):
                value = self._config(value, _mapping(instead.get(key)))
            result[key] = value
        return result

    def _new_id(self, value: Any, instead: Any) -> Any:
        if isinstance(value, list):
            moved = [self._new_id(one, None) for one in value]
            return [one for one in moved if one is not None] or instead
        if type(value) is not int or value < 0:
            return value
        found = np.flatnonzero(self.ids[self.donor] == value)
        return int(found[0]) if len(found) else instead


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def build(
    checkpoints: Mapping[str, Checkpoint],
    base: str | None,
    order: Sequence[str],
    settings: Tokenizer,
) -> Vocabulary:
    """The output's vocabulary. order: the recipe's models; base: its base_model, whose tokens come
    first; without one, the first model's do.

    Raises UserError, with every mistake, for a model without embedding or fast tokenizer."""
    donor = base or order[0]
    models = list(dict.fromkeys([donor, *order]))
    warnings: list[str] = []
    rows, own = _read(checkpoints, models, warnings)
    source = donor if settings.source in ("base", "union") else settings.source
    added = _additions(own, models, source, settings, warnings)
    tokens = _numbered(own[source], added, source)
    count = max(tokens.values(), default=-1) + 1
    size = -(-count // (settings.pad_to_multiple_of or 1)) * (settings.pad_to_multiple_of or 1)
    ids = {model: _ids(tokens, own[model], count) for model in models}
    changed = _changed(tokens, ids, rows, size, settings)
    if changed and rows[donor] > size:
        warnings.append(
            f"vocab_size goes from {rows[donor]:,} to {size:,}: rows without a token are dropped. "
            "'pad_to_multiple_of' under 'tokenizer' adds some again"
        )
    vocabulary = Vocabulary(
        tokens,
        size if changed else rows[donor],
        ids,
        changed,
        {},
        tuple(warnings),
        {
            wanted: own[str(wanted.model)].ids.get(wanted.token, -1)
            for wanted in settings.tokens.values()
            if isinstance(wanted.token, str)
        },
        rows,
        donor,
        {} if source == donor else checkpoints[source].config,
        settings,
    )
    entries = added_entries((token, tokens[token], flags) for token, flags in added.items())
    files = tokenizer_files(checkpoints[source], checkpoints[donor], own[source].beyond, entries)
    if changed and GENERATION in files:
        facts = load(files[GENERATION], checkpoints[donor].folder / GENERATION)
        files[GENERATION] = dump(vocabulary.config(facts))
    return replace(vocabulary, files=files)


def _read(
    checkpoints: Mapping[str, Checkpoint], models: Sequence[str], warnings: list[str]
) -> tuple[dict[str, int], dict[str, Tokens]]:
    """Rows of each model's embedding, and its tokens; without a tokenizer, those of the first."""
    problems, rows, own = Problems(), dict[str, int](), dict[str, Tokens]()
    for name in models:
        try:
            rows[name] = embedding_rows(checkpoints[name])
            found = read_tokens(checkpoints[name], rows[name])
        except UserError as error:
            problems.add(str(error))
            continue
        if found is None and rows[name] == rows.get(models[0]) and models[0] in own:
            warnings.append(f"{name} has no tokenizer: assumed to have the tokens of {models[0]}")
            found = own[models[0]]
        if found is None or not found.ids:
            problems.add(
                f"model {name}: has no tokenizer.json, so that its rows cannot be matched to "
                "tokens. Add it, or leave 'tokenizer' out of the recipe if all models share one."
            )
        else:
            own[name] = found
        warnings += _unknown(checkpoints[name], rows[name])
    problems.raise_if_any()
    return rows, own


def _unknown(model: Checkpoint, rows: int) -> Iterator[str]:
    for name, tensor in model.tensors.items():
        alike = len(tensor.shape) == 2 and tensor.shape[0] == rows and split_layer(name)[1] is None
        if alike and not is_vocabulary(name, tensor, rows):
            yield (
                f"{model.label}: tensor {name} has as many rows as the vocabulary, but is not "
                "known as an embedding: its rows stay as they are"
            )


def _additions(
    own: Mapping[str, Tokens],
    models: Sequence[str],
    source: str,
    settings: Tokenizer,
    warnings: list[str],
) -> dict[str, Entry]:
    """Tokens that the tokenizer of `source` gets as added tokens, with their flags, in order.

    union: first the other models' ordinary tokens, then their added ones; the first definition of
    a token holds. Ordinary tokens of `source` that are added elsewhere become so here."""
    start, found = own[source], dict[str, Entry]()
    if settings.source == "union":
        added: dict[str, Entry] = {}
        for model in models:
            theirs = own[model].added
            other = [t for t, flags in theirs.items() if added.setdefault(t, flags) != flags]
            if other:
                warnings.append(
                    f"{len(other)} added tokens of {model} have other flags in a model before it, "
                    f"which hold (such as {other[0]!r})"
                )
        for model in models:
            ordinary = (t for t in own[model].ids if t not in start.ids and t not in added)
            found |= dict.fromkeys(ordinary, PLAIN)
        if found:
            warnings.append(
                f"{len(found):,} ordinary tokens of other models are appended as added tokens, as "
                "mergekit does: text is cut at them before all other rules of the tokenizer"
            )
        found |= {token: flags for token, flags in added.items() if token not in start.added}
    return found | {t: PLAIN for t in settings.tokens if t not in start.ids and t not in found}


def _numbered(start: Tokens, added: Mapping[str, Entry], source: str) -> dict[str, int]:
    """Token to id: those of `start` keep theirs, new ones follow."""
    new = [token for token in added if token not in start.ids]
    if new and sorted(start.ids.values()) != list(range(len(start.ids))):
        raise UserError(
            f"model {source}: the ids of its tokenizer have gaps, so that no token can be appended "
            "to it. Take the tokenizer of another model, or one without new tokens."
        )
    return {**start.ids, **{token: len(start.ids) + k for k, token in enumerate(new)}}


def _ids(tokens: Mapping[str, int], own: Tokens, count: int) -> Array:
    """Output id to the model's row, -1 where it lacks the token."""
    ids = np.full(count, -1, "<i4")
    ids[list(tokens.values())] = [own.ids.get(token, -1) for token in tokens]
    return ids


def _changed(
    tokens: Mapping[str, int],
    ids: Mapping[str, Array],
    rows: Mapping[str, int],
    size: int,
    settings: Tokenizer,
) -> bool:
    """Must any row move? Not if all models have all tokens at the same ids and as many rows.

    Then even rows without a token stay (the peer drops them), unless the recipe pads."""
    at = np.fromiter(tokens.values(), int, len(tokens))
    same = all(np.array_equal(own[at], at) for own in ids.values())
    forced = any(token.force for token in settings.tokens.values())
    padded = settings.pad_to_multiple_of is not None and set(rows.values()) != {size}
    return not same or len(set(rows.values())) > 1 or forced or padded
