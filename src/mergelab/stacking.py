"""Which tensors an output tensor is made of: layers stacked and renumbered, the rest by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from mergelab.checkpoint import Checkpoint, Tensor, split_layer
from mergelab.errors import Problems
from mergelab.modules import Part
from mergelab.rows import OUTPUT
from mergelab.structure import Recipe, Slice, Source

EMBEDDINGS = ("embed", "wte", "wpe")
TIED = (  # the first of them that a model has
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    ".embeddings.weight",
    "shared.weight",
)
HEAD = (  # output heads that may be tied to an embedding
    "lm_head.weight",
    "lm_head.decoder.weight",
    "cls.predictions.decoder.weight",
    "vocab_projector.weight",
)
PREFIXES = ("transformer.", "bert.")  # parts in front that a model saved without its head lacks
NORMS = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
SHARING = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
BUFFERS = (".rotary_emb.inv_freq", ".masked_bias", ".position_ids")


@dataclass(frozen=True)
class Wanted:
    """An output tensor, and what each source of its slice calls it.

    `at` is where its layer stands in the slice, 0 to 1, and 0 outside layers."""

    name: str
    slice: Slice
    sources: tuple[tuple[Source, str], ...]
    at: float


def wanted(recipe: Recipe, part: Part, problems: Problems) -> list[Wanted]:
    """Every output tensor of a module; layers that a model does not have are noted as problems."""
    if part.module.whole:
        return list(_by_name(part))
    stack = _Stack(recipe, part, problems)
    return [*stack.layers(), *stack.outside()] if stack.is_there() else []


def find(model: Checkpoint, name: str) -> Tensor | None:
    """The tensor; for an output head that the model does not store the embedding it is tied to,
    for an encoder's or decoder's embedding the shared one."""
    if name in model.tensors:
        return model.tensors[name]
    tied = TIED if name.endswith(HEAD) else ("shared.weight",) if name.endswith(SHARING) else ()
    found = (t for end in tied for n, t in model.tensors.items() if n.endswith(end))
    return next(found, None)


def tied_for_good(donor: Checkpoint, name: str) -> bool:
    """Is this a tensor that the donor does not store because it is tied to another, and that would
    untie more than itself: biases of BERT's heads, the scale of T5's?"""
    shared = any(other.endswith("shared.weight") for other in donor.tensors)
    ends = (*(HEAD if shared else HEAD[1:]), *SHARING)
    return name.endswith(ends) and name not in donor.tensors and find(donor, name) is not None


def spelled_alike(models: Mapping[str, Checkpoint], donor: Checkpoint) -> dict[str, Checkpoint]:
    """The models, their tensors named as the donor's where GPT-2 and BERT have two spellings."""
    return {name: spelled_as(model, donor.tensors) for name, model in models.items()}


def spelled_as(model: Checkpoint, names: Iterable[str]) -> Checkpoint:
    """The model in the spelling that fits most of the names; its own one if none fits better."""
    wanted, best = frozenset(names), model
    if model.tensors.keys() <= wanted:
        return model
    swapped = {new: old for old, new in NORMS.items()}
    for norms in ({}, NORMS, swapped):
        for add, drop in [("", ""), *((p, "") for p in PREFIXES), *(("", p) for p in PREFIXES)]:
            found = {}
            for name, tensor in model.tensors.items():
                end = next((e for e in norms if name.endswith(e)), "")
                new = name.removesuffix(end) + norms.get(end, "")
                new = add + new.removeprefix(drop)
                fits = new in wanted or split_layer(new)[1] is not None  # a head keeps its name
                found[new if fits and name not in wanted else name] = tensor
            better = len(wanted & found.keys()) > len(wanted & best.tensors.keys())
            if better and len(found) == len(model.tensors):
                best = replace(model, tensors=found)
    return best


def is_buffer(name: str, shape: tuple[int, ...]) -> bool:
    """Is this no weight, but a table that older loaders stored: positions, a causal mask?"""
    mask = name.endswith((".attn.bias", ".attention.bias")) and len(shape) == 4
    return mask or name.endswith(BUFFERS)


def position(index: int, count: int) -> float:
    """Where a layer stands in its run, 0 to 1; the only layer of a run, and any behind its end
    (such as one that predicts further tokens), stands at 1."""
    return index / (count - 1) if index < count > 1 else 1.0


def _by_name(part: Part) -> Iterator[Wanted]:
    """A list of `models`: every tensor name that any model has."""
    (slice,) = part.module.slices
    names = _names([part.donor, *part.models.values()])
    counts: dict[str, int] = {}
    for name in names:
        prefix, index, _ = split_layer(name)
        counts[prefix] = max(counts.get(prefix, 0), (index or 0) + 1)
    if len(part.donor.stacks) == 1 and part.donor.depth:  # layers behind the last one do not count
        (stack,) = part.donor.stacks
        counts[stack] = min(counts[stack], part.donor.depth)
    sources = _with_base(slice)
    for name in names:
        prefix, index, _ = split_layer(name)
        at = 0.0 if index is None else position(index, counts[prefix])
        yield Wanted(name, slice, tuple((source, name) for source in sources), at)


def _with_base(slice: Slice) -> list[Source]:
    """The sources of a slice; a base that is not listed comes last."""
    if slice.base is None or slice.base in [source.model for source in slice.sources]:
        return list(slice.sources)
    return [*slice.sources, Source(slice.base, None, {}, slice.line)]


def _names(models: Iterable[Checkpoint]) -> list[str]:
    return list(dict.fromkeys(name for model in models for name in model.tensors))


class _Stack:
    """A list of `slices`: layers renumbered in order, embeddings of the first slice, the rest of
    the last."""

    def __init__(self, recipe: Recipe, part: Part, problems: Problems) -> None:
        self.recipe, self.part, self.problems = recipe, part, problems
        self.slices = part.module.slices
        self.suffixes = {name: _suffixes(model) for name, model in part.models.items()}
        first = part.models[self.slices[0].sources[0].model]
        self.name = part.donor.stack or first.stack

    def is_there(self) -> bool:
        """Does every model have the layers that are asked of it?"""
        missing = [text for slice in self.slices for s in slice.sources for text in self.lack(s)]
        donor = self.part.donor
        if self.part.module.name is None and len(donor.stacks) > 1 and not donor.knows_its_stack:
            missing.append(
                f"model {donor.label}: has several stacks of layers ({', '.join(donor.stacks)}), "
                "so that 'slices' alone does not say which. List them under 'modules'."
            )
        for text in dict.fromkeys(missing):
            self.problems.add(text)
        return not missing

    def lack(self, source: Source) -> Iterator[str]:
        model, (begin, end) = self.part.models[source.model], source.layers or (0, 0)
        if model.stack != self.name:
            yield (
                f"{self.recipe.path}:{source.line}: model {source.model} names its layers "
                f"{model.stack}, not {self.name}. Only models of one architecture can be stacked."
            )
            return
        if end > model.layers:
            yield (
                f"{self.recipe.path}:{source.line}: model {source.model} has {model.layers} "
                f"layers, layer_range ends at {end}."
            )
            return
        for layer in range(begin, end):
            if layer not in self.suffixes[source.model]:
                yield f"model {source.model}: layer {layer} has no tensors."

    def layers(self) -> Iterator[Wanted]:
        row = 0
        for slice in self.slices:
            begin, end = slice.sources[0].layers or (0, 0)
            for k in range(end - begin):
                at = position(k, end - begin)
                for suffix in self.suffixes_of(slice, k):
                    sources = tuple((s, self.source_name(s, k, suffix)) for s in slice.sources)
                    yield Wanted(f"{self.name}.{row}.{suffix}", slice, sources, at)
                row += 1

    def source_name(self, source: Source, k: int, suffix: str) -> str:
        layer = (source.layers or (0, 0))[0] + k
        return f"{self.part.models[source.model].stack}.{layer}.{suffix}"

    def suffixes_of(self, slice: Slice, k: int) -> list[str]:
        """Names within a layer that any source has in the k-th layer of the slice."""
        names: dict[str, None] = {}
        for source in slice.sources:
            layer = (source.layers or (0, 0))[0] + k
            names |= dict.fromkeys(self.suffixes[source.model][layer])
        return list(names)

    def outside(self) -> Iterator[Wanted]:
        for name in _names([self.part.donor, *self.part.models.values()]):
            if split_layer(name)[0] == self.name:
                continue
            early = any(word in name for word in EMBEDDINGS) and not OUTPUT.search(name)
            slice = self.slices[0 if early else -1]
            models = [self.part.models[source.model] for source in slice.sources]
            if any(find(model, name) for model in models):
                yield Wanted(name, slice, tuple((s, name) for s in slice.sources), 0.0)


def _suffixes(model: Checkpoint) -> dict[int, list[str]]:
    """Names within each layer of a model's stack."""
    found: dict[int, list[str]] = {}
    for name in model.tensors:
        prefix, index, suffix = split_layer(name)
        if index is not None and prefix == model.stack:
            found.setdefault(index, []).append(suffix)
    return found
