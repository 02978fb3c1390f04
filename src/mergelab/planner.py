"""From wanted tensors to planned ones: sources found, shapes and types checked, parameters set."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from mergelab.checkpoint import DTYPES, FLOATS, Checkpoint, Tensor, split_layer
from mergelab.errors import Problems
from mergelab.methods.base import Parameter, Settings
from mergelab.modules import Part
from mergelab.parameters import first_match, resolve
from mergelab.stacking import EMBEDDINGS, HEAD, Wanted, find, is_buffer, tied_for_good, wanted
from mergelab.structure import Recipe, Source
from mergelab.vocabulary import Vocabulary
from mergelab.writer import Planned

PER_TENSOR = ("weight", "lambda", "t", "normalize", "int8_mask")  # no survey looks at these
FEW = 3  # misfits of one kind that are told in full

Found = list[tuple[Source, str, Tensor]]


class Planner:
    """Plans the tensors of one recipe, noting every mistake in `problems`.

    `notes` says, after `tensors`, which tensors were copied or left out for lack of partners."""

    def __init__(
        self,
        recipe: Recipe,
        parts: Iterable[Part],
        problems: Problems,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self.recipe, self.parts, self.problems = recipe, parts, problems
        self.vocabulary = vocabulary
        self.zeros: list[str] = []
        self.method = recipe.method
        self.misfits: dict[str, list[str]] = {}
        self.lone: dict[str, list[str]] = {}

    def tensors(self) -> list[Planned]:
        """Every output tensor, in order of names."""
        planned = [
            self.tensor(part, w)
            for part in self.parts
            for w in wanted(self.recipe, part, self.problems)
        ]
        for texts in self.misfits.values():
            for text in texts[:FEW]:
                self.problems.add(text)
            if len(texts) > FEW:
                self.problems.add(f"... and {len(texts) - FEW} more tensors like that.")
        found = sorted((p for p in planned if p is not None), key=lambda p: p.name)
        self.agree(p for p in found if p.settings.shared.get("scope") == "model")
        return found

    def agree(self, tensors: Iterable[Planned]) -> None:
        """Note it if parameters of a survey over the whole model differ between its tensors."""
        seen: dict[str, dict[str, str]] = {}
        for tensor in tensors:
            values = {"the list of models": ", ".join(tensor.models)}
            values |= dict(tensor.settings.shared) | {
                f"{name} of {model}": value
                for model, each in zip(tensor.models, tensor.settings.experts, strict=True)
                for name, value in each.items()
                if name not in PER_TENSOR
            }
            for name, value in values.items():
                if name not in PER_TENSOR:
                    seen.setdefault(name, {}).setdefault(str(value), tensor.name)
        for name, found in seen.items():
            if len(found) > 1:
                told = ", ".join(f"{value} for {tensor}" for value, tensor in found.items())
                self.problems.add(
                    f"{self.recipe.path}: with 'scope: model', {name} must be one for all tensors, "
                    f"not {told}. Use 'scope: tensor', or one value."
                )

    @property
    def notes(self) -> list[str]:
        """One line for each fate of tensors that only some models have."""
        return [
            f"{what}: {', '.join(names[:FEW])}"
            + (f" and {len(names) - FEW} more" if len(names) > FEW else "")
            for what, names in self.lone.items()
        ] + self.zeros

    def tensor(self, part: Part, want: Wanted) -> Planned | None:
        if tied_for_good(part.donor, want.name):
            told = f"left out, as {part.donor.label} ties it to its embedding"
            self.note(told, want.name)
            return None
        found: Found = []
        for source, name in want.sources:
            tensor = find(part.models[source.model], name)
            if tensor is not None:
                found.append((source, name, tensor))
        if len(found) != len(want.sources) and not self.is_alone(part, want, found):
            return None
        if len({(t.dtype, t.shape) for _, _, t in found}) > 1 and is_buffer(
            want.name, found[0][2].shape
        ):
            self.note("left out, as loaders compute it and the models' differ in kind", want.name)
            return None
        found = self.rerowed(want, found)
        if not self.same_shape(want.name, found):
            return None
        return self.planned(part, want, found)

    def rerowed(self, want: Wanted, found: Found) -> Found:
        """Tensors with one row per token, in the order of the output's vocabulary."""
        if self.vocabulary is None:
            return found
        sources = {source.model: tensor for source, _, tensor in found}
        rows = self.vocabulary.rerow(want.name, sources, want.slice.base, self.problems, self.zeros)
        if rows is None:
            return found
        return cast("Found", [(source, name, rows[source.model]) for source, name, _ in found])

    def is_alone(self, part: Part, want: Wanted, found: Found) -> bool:
        """Is the tensor to be copied from the only model that has it?

        If the method has no rule for that, the models without it are noted as mistakes."""
        have, rule = {source.model for source, _, _ in found}, self.method.lone
        lacking = [
            (source.model, name) for source, name in want.sources if source.model not in have
        ]
        optional = not any(_layer_is_missing(part.models[model], name) for model, name in lacking)
        copies = rule == "copy" or (rule in ("base", "base_or_drop") and have == {want.slice.base})
        if optional and copies and len(found) == 1:
            self.note(f"copied from {found[0][0].model}, for no other model has it", want.name)
            return True
        if optional and rule == "base_or_drop" and len(found) <= self.method.experts[0]:
            self.note(f"left out, for too few models have it for {self.method.name}", want.name)
            return False
        if optional and any(is_buffer(name, tensor.shape) for _, name, tensor in found):
            self.note("left out, as loaders compute it and not every model stores it", want.name)
            return False
        for model, name in lacking:
            self.misfits.setdefault(f"missing in {model}", []).append(
                f"model {model}: tensor {name} is missing, but another model has it. "
                "Only models of one architecture can be merged."
            )
        return False

    def note(self, fate: str, tensor: str) -> None:
        self.lone.setdefault(fate, []).append(tensor)

    def planned(self, part: Part, want: Wanted, found: Found) -> Planned:
        alone = len(found) != len(want.sources)
        base = next((t for s, _, t in found if s.model == want.slice.base), None)
        experts = [entry for entry in found if entry[0].model != want.slice.base]
        if alone:
            base, experts = None, found
        settings = Settings({}, ({"scale": 1.0},))
        settings = settings if alone else self.settings(part, want, experts)
        tensors = [tensor for _, _, tensor in found]
        dtype = self.out_dtype(want.name, tensors)
        return Planned(
            want.name,
            dtype,
            tensors[0].shape,
            base,
            tuple(tensor for _, _, tensor in experts),
            tuple(source.model for source, _, _ in experts),
            settings,
            copied=alone or dtype not in FLOATS or self.unchanged(tensors, dtype, settings),
        )

    def unchanged(self, tensors: list[Tensor], dtype: str, settings: Settings) -> bool:
        """Are the output's bits those of its only source?"""
        if self.method.name != "passthrough" or settings.experts[0]["scale"] != 1:
            return False
        return isinstance(tensors[0], Tensor) and tensors[0].dtype == dtype

    def same_shape(self, name: str, found: Found) -> bool:
        shapes = {tensor.shape for _, _, tensor in found}
        floats = {tensor.dtype in FLOATS for _, _, tensor in found}
        listing = ", ".join(f"{s.model} {list(t.shape)} {t.dtype}" for s, _, t in found)
        if len(shapes) > 1:
            rows = [shape[0] for shape in shapes if shape]
            embedding = name.endswith(HEAD) or any(w in name for w in EMBEDDINGS)
            if embedding and len(set(rows)) > 1 and len({s[1:] for s in shapes}) == 1:
                self.problems.add(
                    f"tensor {name}: the models have different vocabularies: {listing}. "
                    "Merge models that share one tokenizer, or add 'tokenizer_source: union' (all "
                    "tokens) or 'tokenizer_source: base' (the base's)."
                )
            else:
                self.misfits.setdefault("shapes", []).append(
                    f"tensor {name}: shapes differ: {listing}. "
                    "Only models of one architecture and size can be merged."
                )
        if len(floats) > 1 or (floats == {False} and len({t.dtype for _, _, t in found}) > 1):
            self.problems.add(f"tensor {name}: data types cannot be merged: {listing}.")
            return False
        return len(shapes) == 1

    def settings(self, part: Part, want: Wanted, experts: Found) -> Settings:
        """Shared parameters match the output's name, those of a model its own name for it."""
        shared: dict[str, Any] = {}
        each: list[dict[str, Any]] = [{} for _ in experts]
        common = (want.slice.parameters, part.module.parameters, self.recipe.parameters)
        for parameter in self.method.parameters:
            if not parameter.per_model:
                shared[parameter.name] = resolve(parameter, common, want.name, want.at)
                self.given(parameter, shared[parameter.name], want, None)
                continue
            for values, (source, name, _) in zip(each, experts, strict=True):
                levels = (source.parameters, *common)
                values[parameter.name] = resolve(parameter, levels, name, want.at)
                self.given(parameter, values[parameter.name], want, source)
        settings = Settings(shared, tuple(each))
        wrong = self.method.check(settings)
        if wrong:
            where = f"{self.recipe.path}:{want.slice.line}"
            self.misfits.setdefault(wrong, []).append(f"{where}: tensor {want.name}: {wrong}")
        return settings

    def given(self, parameter: Parameter, value: Any, want: Wanted, of: Source | None) -> None:
        """Note it if a parameter, of one model or of all, has no value or not the right one."""
        where = f"{self.recipe.path}:{of.line if of else want.slice.line}"
        name = f"'{parameter.name}'" + (f" of {of.model}" if of else "")
        if parameter.required and value is None:
            self.misfits.setdefault(f"no {name}", []).append(
                f"{where}: no value of {name} applies to tensor {want.name}: none of its "
                "filters matches. Add an entry without a filter."
            )
        if parameter.kind == "integer" and isinstance(value, float):
            self.misfits.setdefault(f"no integer {name}", []).append(
                f"{where}: the gradient of {name} gives {value:g} for tensor {want.name}, "
                "which is no integer. Write filters instead of a gradient."
            )

    def out_dtype(self, name: str, tensors: list[Tensor]) -> str:
        """The recipe's out_dtype, or dtype, or the narrowest format that holds all inputs."""
        stored = {tensor.dtype for tensor in tensors}
        if not stored <= set(FLOATS):
            return tensors[0].dtype
        asked = first_match(self.recipe.out_dtype, name) or first_match(self.recipe.dtype, name)
        if asked:
            return DTYPES[str(asked.value)]
        if stored == {"F16", "BF16"}:
            return "F32"
        return next(dtype for dtype in FLOATS if dtype in stored)


def _layer_is_missing(model: Checkpoint, name: str) -> bool:
    """Is this a tensor of a layer of which the model has nothing at all?"""
    prefix, index, _ = split_layer(name)
    return index is not None and not any(n.startswith(f"{prefix}.{index}.") for n in model.tensors)
