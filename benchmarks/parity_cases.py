"""The merges that parity.py compares: recipes over the models base, a, b, c."""

from __future__ import annotations

from dataclasses import dataclass

WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}
LOOSE = {"a": 0.7, "b": 0.6, "c": 0.9}
GRADIENT = "[{filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}, {value: [1, 0.5, 0.7, 0.3, 0]}]"
BY_LAYER = "[{filter: mlp, value: [0.1, 0.9]}, {filter: norm, value: 1.0}, {value: 0.4}]"


@dataclass(frozen=True)
class Case:
    """One recipe; `heads`: which of base, a, b, c store an lm_head beside the embedding.

    `stored`: written as bfloat16, where differences count in bfloat16 ulps, without a target."""

    name: str
    family: str
    text: str
    heads: tuple[bool, bool, bool, bool] = (False, False, False, False)
    stored: bool = False
    quick: bool = True

    @property
    def method(self) -> str:
        """The merge method: the first word of the name."""
        return self.name.split()[0].rstrip(",")


def recipe(
    method: str, models: dict[str, str], shared: str = "", dtype: str = "dtype: float32"
) -> str:
    """A `models` recipe; FOLDER stands for the models' folder."""
    lines = [f"merge_method: {method}", dtype]
    if method != "linear":
        lines += ["base_model: 'FOLDER/base'"]
    if shared:
        lines += [f"parameters: {{{shared}}}"]
    lines += ["models:"]
    for name, parameters in models.items():
        own = f", parameters: {{{parameters}}}" if parameters else ""
        lines += [f"- {{model: 'FOLDER/{name}'{own}}}"]
    return "\n".join(lines) + "\n"


def slices(method: str, expert: str, shared: str) -> str:
    """A `slices` recipe of layers 0, 1 of a, then layer 1 of b, each with base."""
    lines = [f"merge_method: {method}", "dtype: float32", "base_model: 'FOLDER/base'"]
    lines += [f"parameters: {{{shared}}}", "slices:"]
    for name, span in (("a", "[0, 2]"), ("b", "[1, 2]")):
        for model, own in (("base", ""), (name, expert)):
            first = "- sources:\n" if model == "base" else ""
            parameters = f", parameters: {{{own}}}" if own else ""
            source = f"model: 'FOLDER/{model}', layer_range: {span}{parameters}"
            lines += [f"{first}  - {{{source}}}"]
    return "\n".join(lines) + "\n"


def weighted(weights: dict[str, object], more: str = "") -> dict[str, str]:
    """Per-model parameters: a weight each, and what all share."""
    return {name: f"weight: {w}{more}" for name, w in weights.items()}


def _linear() -> list[Case]:
    gradients = {"a": BY_LAYER, "b": "[0.2, 0.8, 0.5]", "c": 0.3}
    negative = {"a": 1.1, "b": 0.4, "c": -0.5}
    off = "normalize: false"
    mixed = (False, True, False, True)
    heads = "[{filter: lm_head, value: 0.9}, {value: 0.4}]"
    by_head = {"a": 0.3, "b": heads, "c": heads}
    return [
        Case("linear", "fine-tuned", recipe("linear", weighted({**WEIGHTS}))),
        Case("linear, sum 2.2", "fine-tuned", recipe("linear", weighted({**LOOSE}))),
        Case("linear, sum 2.2", "unrelated", recipe("linear", weighted({**LOOSE}))),
        Case("linear, no normalize, negative", "unrelated",
             recipe("linear", weighted({**negative}), off)),
        Case("linear, gradients, filters", "drifted", recipe("linear", weighted(gradients))),
        Case("linear, lm_head in two of three", "drifted", recipe("linear", weighted({**LOOSE})),
             heads=mixed),
        Case("linear, filter on lm_head, tied in one", "drifted",
             recipe("linear", weighted(by_head)), heads=mixed),
    ]  # fmt: skip


def _slerp() -> list[Case]:
    def text(t: str) -> str:
        return recipe("slerp", {"base": "", "a": ""}, f"t: {t}")

    return [
        Case("slerp, t 0.3", "fine-tuned", text("0.3")),
        Case("slerp, t 0.3", "drifted", text("0.3")),
        Case("slerp, t 0.7", "unrelated", text("0.7")),
        Case("slerp, gradient t", "drifted", text(GRADIENT), heads=(True, True, True, True)),
        Case("slerp, slices, gradient t", "unrelated",
             slices("slerp", "", "t: [{filter: mlp, value: [0.2, 0.6]}, {value: 0.5}]")),
        Case("slerp, t 0.5", "opposed", text("0.5")),
    ]  # fmt: skip


def _task_arithmetic() -> list[Case]:
    def text(weights: dict[str, object], shared: str = "") -> str:
        return recipe("task_arithmetic", weighted(weights), shared)

    negative = {"a": 1.0, "b": -0.5, "c": 0.3}
    return [
        Case("task_arithmetic", "fine-tuned", text({**WEIGHTS})),
        Case("task_arithmetic, negative, lambda 0.8", "fine-tuned", text(negative, "lambda: 0.8")),
        Case("task_arithmetic, negative", "unrelated", text(negative)),
        Case("task_arithmetic, normalize, lambda 1.5", "drifted",
             text({**LOOSE}, "normalize: true, lambda: 1.5")),
        Case("task_arithmetic, gradients, filters", "drifted",
             text({"a": BY_LAYER, "b": GRADIENT}), heads=(True, True, True, True)),
        Case("task_arithmetic, slices, gradients, filters", "fine-tuned",
             slices("task_arithmetic",
                    "weight: [{filter: layers.1, value: [0.3, 0.9]}, {value: 0.5}]",
                    "lambda: [{filter: layers.2, value: 0.7}, {value: [1, 2]}]")),
    ]  # fmt: skip


def _ties() -> list[Case]:
    def text(weights: dict[str, object], density: object, shared: str = "") -> str:
        return recipe("ties", weighted(weights, f", density: {density}"), shared)

    off = "normalize: false"
    own = {"a": "weight: 0.5, density: 0.1", "b": "weight: 0.3, density: [0.9, 0.2]",
           "c": f"weight: -0.4, density: {BY_LAYER}"}  # fmt: skip
    return [
        Case("ties, density 0.1", "fine-tuned", text({**WEIGHTS}, 0.1)),
        Case("ties, density 0.5", "fine-tuned", text({**WEIGHTS}, 0.5)),
        Case("ties, density 0.9, sum 2.2", "fine-tuned", text({**LOOSE}, 0.9)),
        Case("ties, density 0.3, no normalize", "fine-tuned", text({**LOOSE}, 0.3, off)),
        Case("ties, density 0.5, no normalize", "unrelated", text({**LOOSE}, 0.5, off)),
        Case("ties, density 0.5, int8_mask, lambda 0.7", "drifted",
             text({**WEIGHTS}, 0.5, "int8_mask: true, lambda: 0.7")),
        Case("ties, densities by filter and layer", "fine-tuned", recipe("ties", own)),
        Case("ties, density 1", "fine-tuned", text({**LOOSE}, 1), quick=False),
        Case("ties, density 0", "fine-tuned", text({**LOOSE}, 0), quick=False),
    ]  # fmt: skip


def _stored() -> list[Case]:
    """The peer's arithmetic in bfloat16, and float32 arithmetic rounded to bfloat16."""
    found = []
    for dtype in ("dtype: float32\nout_dtype: bfloat16", "dtype: bfloat16"):
        kind = "bfloat16" if dtype == "dtype: bfloat16" else "float32, out_dtype: bfloat16"
        texts = {
            "linear": recipe("linear", weighted({**WEIGHTS}), dtype=dtype),
            "slerp": recipe("slerp", {"base": "", "a": ""}, "t: 0.3", dtype=dtype),
            "task_arithmetic": recipe("task_arithmetic", weighted({**WEIGHTS}), dtype=dtype),
            "ties": recipe("ties", weighted({**WEIGHTS}, ", density: 0.5"), dtype=dtype),
        }
        for name, text in texts.items():
            family = "drifted" if name in ("linear", "slerp") else "fine-tuned"
            found.append(Case(f"{name}, dtype: {kind}", family, text, stored=True))
    return found


CASES = (*_linear(), *_slerp(), *_task_arithmetic(), *_ties(), *_stored())
