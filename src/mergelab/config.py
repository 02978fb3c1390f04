"""The merged model's config.json, and what in the inputs' configs and tokenizers disagrees."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mergelab.checkpoint import NAMES, Checkpoint
from mergelab.errors import Problems, UserError
from mergelab.recipe import Recipe
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
    recipe: Recipe,
    checkpoints: Mapping[str, Checkpoint],
    donor: Checkpoint,
    tensors: tuple[Planned, ...],
) -> dict[str, Any]:
    """The donor's config with the merged model's dtype, layer count and per-layer lists."""
    config = dict(donor.config)
    dtypes = {t.dtype for t in tensors if t.dtype in NAMES}
    if len(dtypes) == 1:
        key = "dtype" if "dtype" in config else "torch_dtype"
        config[key] = NAMES[dtypes.pop()]
    heads = [n for n in (t.name for t in tensors) if n.endswith("lm_head.weight")]
    if heads and heads[0] not in donor.tensors:
        config["tie_word_embeddings"] = False
    if not recipe.whole:
        _stack(config, recipe, checkpoints, donor)
    return config


def _stack(
    config: dict[str, Any],
    recipe: Recipe,
    checkpoints: Mapping[str, Checkpoint],
    donor: Checkpoint,
) -> None:
    """Overwrite the layer count, and gather every list with one entry per layer."""
    rows: list[tuple[Checkpoint, int]] = []
    for slice in recipe.slices:
        named = {source.model: source for source in slice.sources}
        source = named.get(donor.label, slice.sources[0])
        begin, end = source.layers or (0, 0)
        rows += [(checkpoints[source.model], layer) for layer in range(begin, end)]
    for key, value in donor.config.items():
        per_layer = key != "architectures" and "token_id" not in key
        if per_layer and isinstance(value, list) and len(value) == donor.layers:
            config[key] = [_of_layer(model, key, value, layer) for model, layer in rows]
    config["n_layer" if "n_layer" in config else "num_hidden_layers"] = len(rows)


def _of_layer(model: Checkpoint, key: str, default: list[Any], layer: int) -> Any:
    values = model.config.get(key, default)
    if not isinstance(values, list) or layer >= len(values):
        raise UserError(
            f"model {model.label}: '{key}' in its config.json has no entry for layer {layer}. "
            "Give it one entry per layer."
        )
    return values[layer]


def warnings_about(
    checkpoints: Mapping[str, Checkpoint], donor: Checkpoint, problems: Problems
) -> Iterator[str]:
    """What differs between the donor and each other model; the weights alone do not show it.

    Tokenizers that disagree on more than a tenth of the ids are noted as a problem."""
    for model in checkpoints.values():
        for key in FUNCTION:
            ours, theirs = donor.config.get(key), model.config.get(key)
            if ours != theirs and None not in (ours, theirs):
                yield (
                    f"{key} is {ours!r} in {donor.label}, {theirs!r} in {model.label}; "
                    f"the merge gets {donor.label}'s"
                )
        share = _disagreement(donor.vocabulary, model.vocabulary)
        if share > FEW:
            problems.add(
                f"models {donor.label} and {model.label} have different vocabularies: "
                f"{share:.0%} of the token ids mean different tokens. "
                "Merge models that share one tokenizer."
            )
        elif share > 0:
            yield f"{share:.2%} of the token ids differ between {donor.label} and {model.label}"


def _disagreement(ours: dict[str, int], theirs: dict[str, int]) -> float:
    """Share of the ids of both vocabularies that stand for different tokens."""
    a, b = ({i: token for token, i in vocab.items()} for vocab in (ours, theirs))
    shared = a.keys() & b.keys()
    return sum(a[i] != b[i] for i in shared) / len(shared) if shared else 0.0
