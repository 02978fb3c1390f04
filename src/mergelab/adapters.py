"""LoRA adapters in peft's format, checked as untrusted and joined to the model they change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from mergelab.adapted import Adapted, Last, Update
from mergelab.adapter_settings import CONFIG, Settings, read_settings
from mergelab.checkpoint import FLOATS, Checkpoint, Tensor, read_header
from mergelab.errors import Problems, UserError
from mergelab.stacking import HEAD, TIED

WEIGHTS = "adapter_model.safetensors"
MOST_IN_FRONT = 8  # parts of a model's names that an adapter's may lack
PREFIX = "base_model.model."
PARTS = {  # how the name of a tensor ends -> which part of an update it is
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "embedding A",
    ".lora_embedding_B": "embedding B",
    ".lora_magnitude_vector": "magnitude",
}


@dataclass(frozen=True)
class _Fit:
    """One module's update and the weight it fits; `ways`: which values of `turned` are possible."""

    module: str
    stored: Tensor
    a: Tensor
    b: Tensor
    magnitude: Tensor | None
    embedding: bool
    ways: set[bool]


def open_adapted(model: Checkpoint, adapter_folder: Path, label: str) -> Checkpoint:
    """The checkpoint with an adapter's changes, which are computed as tensors are read.

    Raises UserError with everything that is wrong with the adapter or does not fit the model."""
    config, weights = adapter_folder / CONFIG, adapter_folder / WEIGHTS
    try:
        settings = read_settings(config)
        if not weights.is_file():
            raise UserError(_no_weights(adapter_folder))
        changes = _Changes(model, settings, weights)
        changes.sort(read_header(weights))
        changes.pair()
        head = changes.head()
        changes.problems.raise_if_any()
    except UserError as error:
        lines = str(error).splitlines()
        raise UserError("\n".join(f"model {label}: {line}" for line in lines)) from None
    tensors = cast("dict[str, Tensor]", {**model.tensors, **changes.found, **head})
    facts = {**model.config, "tie_word_embeddings": False} if head else model.config
    extra = (*model.extra, config, weights)
    return replace(model, label=label, config=facts, tensors=tensors, extra=extra)


def split_name(name: str, known: Callable[[str], bool]) -> tuple[str, str] | None:
    """MODEL and ADAPTER of 'MODEL+ADAPTER'; None if the whole name is a model's.

    `known` tells whether a name stands for something: a folder with a '+' in its name does."""
    cuts = [i for i, letter in enumerate(name) if letter == "+"]
    if not cuts or known(name):
        return None
    halves = [(name[:i], name[i + 1 :]) for i in cuts]
    return next((pair for pair in halves if known(pair[0]) and known(pair[1])), halves[-1])


def _no_weights(folder: Path) -> str:
    pickles = sorted(folder.glob("adapter_model*.bin"))
    if pickles:
        return (
            f"{pickles[0]}: is a pickle, which can run code and is never loaded. Load the adapter "
            "with peft in a sandbox and save it again: save_pretrained writes safetensors."
        )
    return f"{folder}: has no {WEIGHTS}. Is the download complete?"


class _Changes:
    """Which tensors of a model an adapter changes: `found`, and what is wrong: `problems`."""

    def __init__(self, model: Checkpoint, settings: Settings, weights: Path) -> None:
        self.model, self.settings, self.weights = model, settings, weights
        self.found: dict[str, Adapted] = {}
        self.problems = Problems()
        self.modules: dict[str, dict[str, Tensor]] = {}
        self.ends: dict[str, list[str]] = {}
        for name in model.tensors:
            end = name
            for _ in range(MOST_IN_FRONT):
                if end := end.partition(".")[2]:
                    self.ends.setdefault(end, []).append(name)

    def problem(self, text: str) -> None:
        self.problems.add(f"{self.weights}: {text}")

    def sort(self, header: dict[str, Tensor]) -> None:
        """Collect the parts of each module's update; other tensors replace the model's."""
        for tensor in header.values():
            name = tensor.name.removeprefix(PREFIX)
            end = next((end for end in PARTS if name.endswith(end)), None)
            if tensor.dtype not in FLOATS:
                self.problem(f"tensor {tensor.name!r:.200} holds no floating-point numbers.")
            elif end:
                self.modules.setdefault(name.removesuffix(end), {})[PARTS[end]] = tensor
            elif stored := self.stored(name.replace(".base_layer.", ".")):
                if stored.shape != tensor.shape:
                    self.misfit(name, [tensor], stored)
                if stored.name in self.found:
                    self.problem(f"changes {stored.name!r:.200} twice.")
                self.found[stored.name] = Adapted(stored, tensor, None)
        if not header:
            self.problem("holds no tensors. Is it the right file?")

    def stored(self, name: str) -> Tensor | None:
        """The model's tensor of that name, but for parts in front that only one of the two has.

        The adapter's name may have one such part more ('model.'), the model's several."""
        shorter = name.partition(".")[2]
        names = [name] if name in self.model.tensors else self.ends.get(name, [])
        if not names and shorter in self.model.tensors:
            names = [shorter]
        tensors = [self.model.tensors[n] for n in names]
        if len(tensors) == 1 and tensors[0].dtype in FLOATS:
            return tensors[0]
        what = f"fits several: {', '.join(names[:3])}" if tensors[1:] else "is none of the model's"
        self.problem(
            f"changes {name!r:.200}, which {what}. Use the model that the adapter was trained on "
            "(if its output head is tied to its embedding, merge the adapter with peft first)."
        )
        return None

    def misfit(self, what: str, tensors: list[Tensor], stored: Tensor) -> None:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors)
        self.problem(
            f"{what!r:.200} has shape {shapes}, which does not fit {stored.name} "
            f"{list(stored.shape)} and the settings of {CONFIG}. Use the model that the adapter "
            "was trained on, its vocabulary resized if the training did so."
        )

    def head(self) -> dict[str, Tensor]:
        """The output head that was tied to an embedding which was trained in full: peft trains a
        copy of such an embedding, so that the head keeps the old one."""
        saved = tuple(f"{module}.weight" for module in self.settings.saved)
        old = [self.model.tensors[n] for n in self.found if n.endswith(TIED) and n.endswith(saved)]
        kinds = self.model.config.get("architectures")
        kind = str(kinds[0]) if isinstance(kinds, list) and kinds else ""
        if not old or any(name.endswith(HEAD) for name in self.model.tensors):
            return {}
        if kind.endswith(("ForMaskedLM", "ForPreTraining", "ForConditionalGeneration")):
            self.problem(
                f"trains {old[0].name} in full, to which the head of a {kind} is tied. Merge the "
                "adapter with peft first."
            )
        return {"lm_head.weight": old[0]} if kind.endswith(("ForCausalLM", "LMHeadModel")) else {}

    def pair(self) -> None:
        """Join the factors of each module to its weight.

        A square weight does not show whether it is turned: it is, if others or the settings say
        so (peft notes Conv1D layers as fan_in_fan_out)."""
        fits = [fit for module in self.modules if (fit := self.fit(module))]
        turned = self.settings.fan_in_fan_out or any(
            fit.ways == {True} and not fit.embedding for fit in fits
        )
        last, seen = Last(), set[str]()
        for fit in fits:
            name = fit.stored.name
            if name in seen:
                self.problem(f"changes {name!r:.200} twice.")
            seen.add(name)
            way = turned if len(fit.ways) == 2 else fit.ways == {True}
            scale = self.settings.scale_of(fit.module)
            update = Update(fit.a, fit.b, scale, way, fit.magnitude, last)
            weight = self.found[name].weight if name in self.found else fit.stored
            self.found[name] = Adapted(fit.stored, weight, update)

    def fit(self, module: str) -> _Fit | None:
        """The parts of one module's update beside its weight, if they are whole and fit."""
        parts = dict(self.modules[module])
        magnitude = parts.pop("magnitude", None)
        embedding = parts.keys() == {"embedding A", "embedding B"}
        stored = self.stored(f"{module}.weight")
        if not embedding and parts.keys() != {"A", "B"}:
            held = ", ".join(sorted(parts)) or "neither"
            self.problem(f"needs A and B of {module!r:.200}, and holds {held}.")
        elif (magnitude is not None) != self.settings.use_dora:
            lack = "lacks the magnitudes (DoRA)" if magnitude is None else "has magnitudes (DoRA)"
            self.problem(f"{module!r:.200} {lack}, against use_dora in {CONFIG}.")
        elif stored:
            a, b = (tensor for _, tensor in sorted(parts.items()))
            ways = self.ways(module, a, b, magnitude, stored) - ({False} if embedding else set())
            if ways:
                return _Fit(module, stored, a, b, magnitude, embedding, ways)
            self.misfit(module, [a, b, *([magnitude] if magnitude else [])], stored)
        return None

    def ways(
        self, module: str, a: Tensor, b: Tensor, magnitude: Tensor | None, stored: Tensor
    ) -> set[bool]:
        """Which values of `turned` the shapes allow: none, one, or for a square weight both."""
        rank = self.settings.rank_of(module)
        if (
            len(a.shape) != 2
            or len(b.shape) != 2
            or not (stored.size and a.shape[0] == b.shape[1] == rank)
        ):
            return set()
        size_in, size_out = a.shape[1], b.shape[0]
        if magnitude and magnitude.shape != (size_out,):
            return set()
        shapes = {False: (size_out, size_in), True: (size_in, size_out)}
        return {turned for turned, shape in shapes.items() if shape == stored.shape}
