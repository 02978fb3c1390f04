"""What a recipe says of the tokenizer: `tokenizer_source`, or `tokenizer` with its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mergelab.errors import nearest
from mergelab.yamlfile import Map, Reader

MOST_PADDING = 1 << 16
WORDS = ("base", "union")


@dataclass(frozen=True)
class TokenSource:
    """Where the row of one token comes from: `token` (a name or an id; None: the same token) of
    `model`, or zeros where that is None. `at`: file and line, for messages."""

    model: str | None
    token: str | int | None
    force: bool
    at: str


@dataclass(frozen=True)
class Tokenizer:
    """What a recipe says of the tokenizer. `source`: 'base', 'union' or the name of a model."""

    source: str
    tokens: Mapping[str, TokenSource] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None

    @property
    def model(self) -> str | None:
        """The model whose tokenizer it is, if the source names one."""
        return None if self.source in WORDS else self.source


def read_tokenizer(reader: Reader, top: Map, models: Sequence[str]) -> Tokenizer | None:
    """A recipe's `tokenizer_source` or `tokenizer`, None where it has neither.

    `models`: every model that the recipe names. Mistakes are noted with the reader."""
    source = reader.text(top, "tokenizer_source", None)
    map = reader.map(top, "tokenizer", None)
    if top.get("tokenizer") is None:
        _known(reader, source, models, top.lines.get("tokenizer_source", 1), WORDS)
        return Tokenizer(source) if source else None
    if source:
        reader.wrong(
            top.lines["tokenizer_source"],
            "'tokenizer_source' and 'tokenizer' exclude each other: write it as the 'source' of "
            "'tokenizer'.",
        )
    reader.keys(map, ("source", "tokens", "pad_to_multiple_of"), "tokenizer")
    source = reader.text(map, "source", "union")
    _known(reader, source, models, map.lines.get("source", map.line), WORDS)
    multiple = reader.count(map, "pad_to_multiple_of", None, least=1)
    if multiple and multiple > MOST_PADDING:
        at = map.lines["pad_to_multiple_of"]
        reader.wrong(at, f"'pad_to_multiple_of' must be at most {MOST_PADDING}.")
    tokens = reader.map(map, "tokens", None)
    sources = {token: _token_source(reader, tokens, token, models) for token in tokens}
    return Tokenizer(source or "union", sources, multiple)


def _token_source(reader: Reader, tokens: Map, token: str, models: Sequence[str]) -> TokenSource:
    line = tokens.lines[token]
    at = f"{reader.path}:{line}"
    if not token:
        reader.wrong(line, "a token cannot be empty.")
    map = reader.map(tokens, token)
    reader.keys(map, ("source", "force"), f"the token '{token}'")
    force = bool(reader.get(map, "force", bool, False))
    source = reader.get(map, "source", (str, Map), None)
    if source is None:
        reader.wrong(line, f"the token '{token}' needs a 'source': a model, or a 'kind'.")
    if not isinstance(source, Map):
        _known(reader, source, models, line, ())
        return TokenSource(source, None, force, at)
    kind = reader.text(source, "kind")
    if kind == "zero":
        reader.keys(source, ("kind",), "a source of kind 'zero'")
        return TokenSource(None, None, force, at)
    if kind != "model_token":
        if kind:
            hint = nearest(kind, ("zero", "model_token"))
            reader.wrong(source.line, f"'kind' must be zero or model_token, not '{kind}'.{hint}")
        return TokenSource(None, None, force, at)
    reader.keys(source, ("kind", "model", "token", "token_id"), "a source of kind 'model_token'")
    model = reader.text(source, "model")
    _known(reader, model, models, source.line, ())
    named, number = reader.text(source, "token", None), reader.count(source, "token_id", None)
    if (named is None) == (number is None):
        reader.wrong(source.line, "'model_token' needs either a 'token' or a 'token_id'.")
    return TokenSource(model, named if named is not None else number, force, at)


def _known(
    reader: Reader, model: str | None, models: Sequence[str], line: int, words: tuple[str, ...]
) -> None:
    elsewhere = words and "/" in (model or "")  # a path or hub id that no weight comes from
    if model and model not in models and model not in words and not elsewhere:
        known = ", ".join([*words, *models])
        hint = nearest(model, [*words, *models])
        other = ", or ./FOLDER or ORG/NAME of another model" if words else ""
        reader.wrong(
            line, f"'{model}' is no model of this recipe.{hint}\n  Choose of: {known}{other}."
        )
