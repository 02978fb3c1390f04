"""The merged model's config.json, and what in the inputs' configs and tokenizers disagrees."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mergelab.checkpoint import NAMES, Checkpoint
from mergelab.errors import Problems, UserError
from mergelab.modules import TEXT, Part, kind
from mergelab.stacking import HEAD
from mergelab.writer import Planned

FUNCTION = (  # fields that change what the weights compute
    "model_type",
    "hidden_act",
    "rms_norm_eps",
    "layer_norm_epsilon",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
)
FEW = 0.10  # share of token ids that may mean different tokens before it is an error


def merged_config(
    parts: Iterable[Part], donor: Checkpoint, tensors: tuple[Planned, ...]
) -> dict[str, Any]:
    """The donor's config with the merged model's dtype, layer counts and per-layer lists.

    Empty if the donor is a raw checkpoint."""
    config = dict(donor.config)
    if not config:
        return {}
    dtypes = {t.dtype for t in tensors if t.dtype in NAMES}
    if len(dtypes) == 1:
        key = "dtype" if "dtype" in config else "torch_dtype"
        config[key] = NAMES[dtypes.pop()]
    heads = [n for n in (t.name for t in tensors) if n.endswith(HEAD)]
    if heads and heads[0] not in donor.tensors:
        config["tie_word_embeddings"] = False
    for part in parts:
        if not part.module.whole:
            _stack(config, part)
    return config


def _stack(config: dict[str, Any], part: Part) -> None:
    """Overwrite a module's layer count, and gather every list with one entry per layer."""
    rows: list[tuple[Checkpoint, int]] = []
    for slice in part.module.slices:
        named = {source.model: source for source in slice.sources}
        source = named.get(part.donor.label, slice.sources[0])
        begin, end = source.layers or (0, 0)
        rows += [(part.models[source.model], layer) for layer in range(begin, end)]
    section, before = _section(config, part)
    facts = dict(before)
    for key, value in before.items():
        per_layer = key != "architectures" and "token_id" not in key
        if per_layer and isinstance(value, list) and len(value) == part.donor.layers:
            facts[key] = [_of_layer(model, part, key, value, layer) for model, layer in rows]
    counts = [key for key in kind(part.module).counts if key in facts]
    if not counts and part.module.name and len(rows) != part.donor.layers:
        raise UserError(
            f"module '{part.module.name}' gets {len(rows)} layers, but the config.json of "
            f"{part.donor.label} does not say how many it has. Keep their number."
        )
    facts |= dict.fromkeys(counts or ([] if part.module.name else ["num_hidden_layers"]), len(rows))
    config |= {section: facts} if section and facts else facts


def _section(config: Mapping[str, Any], part: Part) -> tuple[str | None, Mapping[str, Any]]:
    """Where a config has the facts of a module: its name, if it is not the top, and the facts."""
    what = kind(part.module)
    nested = config.get(what.section) if what.section else None
    facts = nested if isinstance(nested, dict) else {}
    if what.section in (None, TEXT) and not any(key in facts for key in what.counts):
        return None, config
    return what.section, facts


def _of_layer(model: Checkpoint, part: Part, key: str, default: list[Any], layer: int) -> Any:
    values = _section(model.config, part)[1].get(key, default)
    if not isinstance(values, list) or layer >= len(values):
        raise UserError(
            f"model {model.label}: '{key}' in its config.json has no entry for layer {layer}. "
            "Give it one entry per layer."
        )
    return values[layer]


def warnings_about(
    checkpoints: Mapping[str, Checkpoint], donor: Checkpoint, problems: Problems, *, tokens: bool
) -> Iterator[str]:
    """What differs between the donor and each other model; the weights alone do not show it.

    With `tokens`, tokenizers that disagree on more than a tenth of the ids are a problem."""
    if not donor.config:
        yield f"{donor.label} has no config.json, so the merge gets none"
    for model in checkpoints.values():
        for key in FUNCTION:
            ours, theirs = donor.config.get(key), model.config.get(key)
            if ours != theirs and None not in (ours, theirs):
                yield (
                    f"{key} is {ours!r} in {donor.label}, {theirs!r} in {model.label}; "
                    f"the merge gets {donor.label}'s"
                )
        share = _disagreement(donor.vocabulary, model.vocabulary) if tokens else 0.0
        if share > FEW:
            problems.add(
                f"models {donor.label} and {model.label} have different vocabularies: "
                f"{share:.0%} of the token ids mean different tokens. "
                "Merge models that share one tokenizer, or add 'tokenizer_source: union' (all "
                "tokens) or 'tokenizer_source: base' (the base's)."
            )
        elif share > 0:
            yield f"{share:.2%} of the token ids differ between {donor.label} and {model.label}"


def _disagreement(ours: dict[str, int], theirs: dict[str, int]) -> float:
    """Share of the ids of both vocabularies that stand for different tokens."""
    a, b = ({i: token for token, i in vocab.items()} for vocab in (ours, theirs))
    shared = a.keys() & b.keys()
    return sum(a[i] != b[i] for i in shared) / len(shared) if shared else 0.0
