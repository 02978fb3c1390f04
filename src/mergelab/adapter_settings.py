"""What adapter_config.json of a LoRA adapter (peft) says about the arithmetic; it is untrusted.

The scale is lora_alpha / r, or lora_alpha / sqrt(r) if rank-stabilised (Kalajdzievski 2023, arXiv
2312.03732). Settings that this module does not know are refused: they may change the arithmetic."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergelab.errors import Problems, UserError

CONFIG = "adapter_config.json"
FLAGS = ("use_rslora", "use_dora", "fan_in_fan_out")
READ = {
    *FLAGS,
    *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights"),
    "modules_to_save",
}
INERT = {  # settings that the adapter's tensors show, or that matter in training only
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "target_modules", "exclude_modules", "lora_dropout"),
    *("bias", "layers_to_transform", "layers_pattern", "megatron_core", "loftq_config"),
    *("eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "ensure_weight_tying"),
}
INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")  # those that keep W
MERGE_FIRST = "Merge the adapter with peft (merge_and_unload, save_pretrained) and use that model."


@dataclass(frozen=True)
class Settings:
    """What adapter_config.json says about the arithmetic; patterns map modules to values."""

    rank: int
    alpha: float
    ranks: dict[str, int]
    alphas: dict[str, float]
    use_rslora: bool
    use_dora: bool
    fan_in_fan_out: bool
    saved: tuple[str, ...] = ()  # modules_to_save: ends of the names of modules trained in full

    def rank_of(self, module: str) -> int:
        """The rank of a module, by its own name or the end of it; the first pattern counts."""
        return next((r for key, r in self.ranks.items() if _matches(key, module)), self.rank)

    def scale_of(self, module: str) -> float:
        """The factor of B A."""
        alphas = (alpha for key, alpha in self.alphas.items() if _matches(key, module))
        rank = self.rank_of(module)
        return next(alphas, self.alpha) / (math.sqrt(rank) if self.use_rslora else rank)


def read_settings(path: Path) -> Settings:
    """Read adapter_config.json. Raises UserError with everything it says that is not handled."""
    config, problems = _json_object(path), Problems()
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"{path}: peft_type is {config.get('peft_type')!r:.40}; only LORA adapters can be "
            f"added to a model here. {MERGE_FIRST}"
        )
    for key in sorted(config.keys() - READ - INERT):
        if config[key]:
            problems.add(f"{path}: {key!r:.60} is set, which is not supported. {MERGE_FIRST}")
    _check_init(config.get("init_lora_weights"), path, problems)
    for key in FLAGS:
        if config.get(key) not in (None, False, True):
            problems.add(f"{path}: {key} is neither true nor false.")
    for key, kind in (("r", int), ("lora_alpha", float)):
        if not _is_number(config.get(key, 8), kind):
            problems.add(f"{path}: {key} is not a number that can be: {config[key]!r:.40}.")
    ranks = _pattern(config, "rank_pattern", int, path, problems)
    alphas = _pattern(config, "alpha_pattern", float, path, problems)
    problems.raise_if_any()
    flags = {key: bool(config.get(key)) for key in FLAGS}
    saved = config.get("modules_to_save")
    saved = tuple(map(str, saved)) if isinstance(saved, list) else ()
    return Settings(
        config.get("r", 8), config.get("lora_alpha", 8), ranks, alphas, saved=saved, **flags
    )


def _check_init(init: Any, path: Path, problems: Problems) -> None:
    if not any(init is known or (init == known and init != 1) for known in INITS):
        problems.add(
            f"{path}: init_lora_weights is {init!r:.40}: such an adapter belongs to changed base "
            "weights. Save it again with peft's path_initial_model_for_weight_conversion, which "
            "turns it into a plain one."
        )


def _is_number(value: Any, kind: type) -> bool:
    """A number of sensible size; a rank (int) is at least 1."""
    if type(value) is int and kind is int:
        return 0 < value <= 1 << 20
    return kind is float and type(value) in (int, float) and abs(value) <= 1e9


def _pattern(
    config: dict[str, Any], key: str, kind: type, path: Path, problems: Problems
) -> dict[str, Any]:
    """A map from module names to numbers; peft's regular expressions are taken as plain names."""
    pattern = config.get(key) or {}
    if not isinstance(pattern, dict) or not all(_is_number(v, kind) for v in pattern.values()):
        problems.add(f"{path}: {key} is not a map from module names to numbers.")
        return {}
    for name in pattern:
        plain = name.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if set(plain) & set("\\^$*+?()[]{}|"):
            problems.add(
                f"{path}: {key} has the regular expression {name!r:.80}. Write one entry for each "
                "module, with its whole name."
            )
    return pattern


def _matches(key: str, module: str) -> bool:
    """Does a key of a pattern mean this module? '^' in front ties it to the whole name."""
    name = key.removeprefix("^").removesuffix("$").replace("\\.", ".")
    return module == name or (not key.startswith("^") and module.endswith(f".{name}"))


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: is missing, so {path.parent} is no adapter of peft's.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not readable JSON: {error}.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: is not a JSON object.")
    return value
