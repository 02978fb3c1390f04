"""Modules of a model: text decoder, vision tower and so on, told apart by their tensors' names.

There is no registry of architectures: a module's tensors are those whose names begin with one of
its prefixes. The names of mergekit 0.1.5 are known; any other name is itself the prefix."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mergelab.checkpoint import Checkpoint
from mergelab.errors import Problems, nearest
from mergelab.structure import Module, Recipe

MANY = 3  # names of tensors that a message shows


@dataclass(frozen=True)
class Kind:
    """A kind of module: a tensor belongs to the one with the longest prefix of its name.

    Names that begin with one of `but` belong elsewhere. `section` of the config, or its top level,
    holds the module's facts; `counts` are the keys that may hold its number of layers."""

    prefixes: tuple[str, ...]
    but: tuple[str, ...] = ()
    section: str | None = None
    counts: tuple[str, ...] = ()


TEXT = "text_config"
COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "depth")
VISION = ("vision_tower.", "model.vision_tower.", "visual.", "model.visual.")
MERGERS = ("visual.merger.", "model.visual.merger.", "model.visual.deepstack_merger_list.")
PROJECTOR = ("multi_modal_projector.", "model.multi_modal_projector.", *MERGERS)
KINDS = {  # names of mergekit 0.1.5 and where Gemma 3, Llama 4, Mistral 3, Qwen-VL, T5 keep them
    "default": Kind(("",), (), TEXT, COUNTS),
    "text_decoder": Kind(
        ("language_model.", "model.", "lm_head."),
        (*VISION, *PROJECTOR, "model.vision_model."),
        TEXT,
        COUNTS,
    ),
    "vision_tower": Kind(VISION, MERGERS, "vision_config", COUNTS),
    "vision_model": Kind(("vision_model.", "model.vision_model."), (), "vision_config", COUNTS),
    "multi_modal_projector": Kind(PROJECTOR),
    "encoder": Kind(("encoder.", "model.encoder."), (), None, ("encoder_layers", "num_layers")),
    "decoder": Kind(
        ("decoder.", "model.decoder."), (), None, ("decoder_layers", "num_decoder_layers")
    ),
    "shared": Kind(("shared.", "lm_head.")),
}


def kind(module: Module) -> Kind:
    """What is known of a module; the whole model is the default one."""
    return KINDS.get(module.name or "default", Kind((f"{module.name}.",)))


@dataclass(frozen=True)
class Part:
    """A module of a recipe with its models, each reduced to the tensors of the module."""

    module: Module
    models: Mapping[str, Checkpoint]
    donor: Checkpoint


def parts(
    recipe: Recipe, checkpoints: Mapping[str, Checkpoint], donor: Checkpoint, problems: Problems
) -> list[Part]:
    """The modules of a recipe, or the whole model as one.

    A module that matches no tensor, and a tensor that no module matches, are noted as problems."""
    if recipe.modules[0].name is None:
        return [Part(recipe.modules[0], checkpoints, donor)]
    names = list(dict.fromkeys(name for c in checkpoints.values() for name in c.tensors))
    owners = {name: _owner(name, recipe.modules) for name in names}
    orphans = [name for name, owner in owners.items() if owner is None]
    if orphans:
        problems.add(
            f"{recipe.path}: no module of the recipe has the tensors {_few(orphans)}. "
            f"The merge would lack them: list their module, too. {_prefixes(orphans)}"
        )
    return [
        _part(recipe, module, owners, checkpoints, donor, problems) for module in recipe.modules
    ]


def _part(
    recipe: Recipe,
    module: Module,
    owners: Mapping[str, Module | None],
    checkpoints: Mapping[str, Checkpoint],
    donor: Checkpoint,
    problems: Problems,
) -> Part:
    if module not in owners.values():
        hint = nearest(str(module.name), KINDS)
        problems.add(
            f"{recipe.path}:{module.line}: module '{module.name}' has no tensors: none begins "
            f"with {' or '.join(map(repr, kind(module).prefixes))}.{hint} {_prefixes(owners)}"
        )

    def reduced(model: Checkpoint) -> Checkpoint:
        own = {n: t for n, t in model.tensors.items() if owners[n] is module}
        return dataclasses.replace(model, tensors=own)

    models = {name: reduced(checkpoints[name]) for name in module.models}
    return Part(module, models, models.get(donor.label) or reduced(donor))


def _owner(tensor: str, modules: Iterable[Module]) -> Module | None:
    """The module with the longest prefix of the tensor's name."""
    best, length = None, -1
    for module in modules:
        what = kind(module)
        if tensor.startswith(what.but):
            continue
        fits = [len(prefix) for prefix in what.prefixes if tensor.startswith(prefix)]
        if max(fits, default=-1) > length:
            best, length = module, max(fits)
    return best


def _prefixes(tensors: Iterable[str]) -> str:
    """The first parts of tensor names, in words; of 'model.', which all may share, the second."""
    pieces = [name.split(".") for name in tensors]
    first = {".".join(p[:2]) if p[0] == "model" else p[0] for p in pieces}
    return f"Prefixes found: {', '.join(sorted(first))}."


def _few(names: list[str]) -> str:
    more = f" and {len(names) - MANY} more" if len(names) > MANY else ""
    return ", ".join(names[:MANY]) + more
