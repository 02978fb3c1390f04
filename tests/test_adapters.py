"""LoRA adapters added while reading: equal to peft's own merge, to the bit what they say they are.

The oracle is merge_and_unload of peft in float32, on tiny random models with random factors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import (
    HIDDEN,
    INNER,
    VOCABULARY,
    llama,
    llama_tensors,
    read_model,
    write_model,
    write_safetensors,
)
from tiny import tiny_model

from mergelab import engine
from mergelab.adapters import open_adapted, split_name
from mergelab.checkpoint import Checkpoint, open_checkpoint
from mergelab.errors import UserError
from mergelab.plan import SHARD_SIZE, make_plan
from mergelab.recipe import load_recipe

Q0 = "model.layers.0.self_attn.q_proj"
UP1 = "model.layers.1.mlp.up_proj"
DOWN0 = "model.layers.0.mlp.down_proj"
PLAIN = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in float32: square, wide and tall matrices."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2: Conv1D layers (stored turned), biases, a tied embedding."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(1)
    sizes = {"n_embd": 32, "n_head": 2, "n_layer": 2, "n_positions": 16, "vocab_size": 300}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(str(folder))
    return folder


def peft_merge(model: Path, out: Path, seed: int = 0, **settings: Any) -> dict[str, np.ndarray]:
    """Save an adapter with random factors to `out`; the tensors of peft's own merge in float32."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    plain = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32)
    with warnings.catch_warnings(
        action="ignore"
    ):  # what peft says of its own calls and of patterns
        adapted = get_peft_model(plain, LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            scale = 1.0 if "magnitude" in name else 0.3
            parameter.data = scale * torch.randn_like(parameter)
    adapted.save_pretrained(str(out), save_embedding_layers=False)
    with warnings.catch_warnings(action="ignore"):  # that it unties a head
        merged = adapted.merge_and_unload().state_dict()
    return {name: tensor.float().numpy().copy() for name, tensor in merged.items()}


def opened(model: Path, adapter: Path) -> Checkpoint:
    return open_adapted(open_checkpoint(model, "base"), adapter, "base+adapter")


def values(checkpoint: Checkpoint, name: str, work: str = "<f4") -> np.ndarray:
    tensor = checkpoint.tensors[name]
    return tensor.floats(0, tensor.size, work).reshape(tensor.shape)


def check_against_peft(model: Path, adapter: Path, merged: dict[str, np.ndarray]) -> set[str]:
    """Every tensor of the model is as peft merged it; the names of those that changed."""
    checkpoint, plain = opened(model, adapter), open_checkpoint(model, "base")
    for name in plain.tensors:
        np.testing.assert_allclose(values(checkpoint, name), merged[name], rtol=1e-6, atol=1e-6)
    return {n for n in plain.tensors if np.any(values(checkpoint, n) != values(plain, n))}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {
            "rank_pattern": {"down_proj": 7, "layers.1.self_attn.q_proj": 2},
            "alpha_pattern": {
                "^layers.1.mlp.up_proj": 99,
                "^model.layers.0.self_attn.q_proj": 1,
                "q_proj": 30,
            },
        },
        {"init_lora_weights": "orthogonal", "use_rslora": True, "use_dora": True},
    ],
    ids=["plain", "rank-stabilised", "DoRA", "patterns", "all of it"],
)
def test_a_llama_with_an_adapter_is_what_peft_merges(
    tiny: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    merged = peft_merge(tiny, tmp_path, **PLAIN, **settings)
    changed = check_against_peft(tiny, tmp_path, merged)
    modules = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
    assert changed == {f"model.layers.{i}.{m}.weight" for i in range(2) for m in modules}


@pytest.mark.parametrize("use_dora", [False, True])
def test_conv1d_layers_are_turned_as_peft_does(gpt2: Path, tmp_path: Path, use_dora: bool) -> None:
    targets = ["c_attn", "c_proj", "c_fc"]
    settings = {"r": 3, "target_modules": targets, "fan_in_fan_out": True, "use_dora": use_dora}
    merged = peft_merge(gpt2, tmp_path, **settings)
    assert len(check_against_peft(gpt2, tmp_path, merged)) == 8


def test_a_square_conv1d_is_turned_if_the_others_are(gpt2: Path, tmp_path: Path) -> None:
    settings = {"r": 3, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    merged = peft_merge(gpt2, tmp_path, **settings)
    change(tmp_path, fan_in_fan_out=False)
    check_against_peft(gpt2, tmp_path, merged)


def test_trained_biases_replace_the_models(gpt2: Path, tmp_path: Path) -> None:
    settings = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}
    merged = peft_merge(gpt2, tmp_path, **settings)
    changed = check_against_peft(gpt2, tmp_path, merged)
    assert {"transformer.h.1.attn.c_attn.bias", "transformer.ln_f.bias"} <= changed


@pytest.mark.parametrize("use_dora", [False, True])
def test_embeddings_and_whole_modules_are_as_in_peft(
    tiny: Path, tmp_path: Path, use_dora: bool
) -> None:
    settings = {"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["lm_head"]}
    merged = peft_merge(tiny, tmp_path, r=4, use_dora=use_dora, **settings)
    changed = check_against_peft(tiny, tmp_path, merged)
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= changed
    assert len(changed) == 4


def test_a_head_tied_to_an_embedding_that_was_trained_in_full_keeps_the_old_one(
    gpt2: Path, tmp_path: Path
) -> None:
    merged = peft_merge(gpt2, tmp_path, target_modules=["c_attn"], modules_to_save=["wte"])
    found, plain = opened(gpt2, tmp_path), open_checkpoint(gpt2, "base")
    for name in ("transformer.wte.weight", "lm_head.weight"):
        np.testing.assert_array_equal(values(found, name), merged[name])
    old = values(plain, "transformer.wte.weight")
    np.testing.assert_array_equal(values(found, "lm_head.weight"), old)
    assert np.any(values(found, "transformer.wte.weight") != old)
    assert found.config["tie_word_embeddings"] is False
    assert "lm_head.weight" not in plain.tensors


def test_an_embedding_that_peft_saved_beside_its_factors_is_the_weight(
    tiny: Path, tmp_path: Path
) -> None:
    """save_embedding_layers writes <module>.base_layer.weight: the weight that B A is added to."""
    merged = peft_merge(tiny, tmp_path, r=4, target_modules=["embed_tokens"])
    stored = read_model(tmp_path)
    shapes = {"A": (4, 300), "B": (32, 4)}
    tensors = {n: ("F32", x.reshape(shapes[n[-1]])) for n, x in stored.items()}
    weight = 2 * values(open_checkpoint(tiny, "base"), "model.embed_tokens.weight")
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    write_safetensors(tmp_path / "adapter_model.safetensors", {**tensors, name: ("F32", weight)})
    found = values(opened(tiny, tmp_path), "model.embed_tokens.weight")
    np.testing.assert_allclose(
        found, merged["model.embed_tokens.weight"] + weight / 2, rtol=1e-6, atol=1e-6
    )


# --- what is read -------------------------------------------------------------------------------


def write_adapter(
    folder: Path,
    modules: dict[str, tuple[int, int]],
    rank: int = 3,
    dtype: str = "F32",
    **more: Any,
) -> dict[str, np.ndarray]:
    """An adapter written by hand, lora_alpha 6; modules maps names to (out, in). Its factors."""
    random, found = np.random.default_rng(5), {}
    for module, (size_out, size_in) in modules.items():
        found[f"base_model.model.{module}.lora_A.weight"] = random.standard_normal((rank, size_in))
        found[f"base_model.model.{module}.lora_B.weight"] = random.standard_normal((size_out, rank))
    write_factors(folder, found, dtype)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, **more}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return found


def write_factors(folder: Path, tensors: dict[str, np.ndarray], dtype: str = "F32") -> None:
    folder.mkdir(exist_ok=True)
    stored = {name: (dtype, array) for name, array in tensors.items()}
    write_safetensors(folder / "adapter_model.safetensors", stored)


def change(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


MODULES = {Q0: (HIDDEN, HIDDEN), UP1: (INNER, HIDDEN), DOWN0: (HIDDEN, INNER)}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A bfloat16 model and a bfloat16 adapter of it, both written by hand."""
    write_adapter(tmp_path / "adapter", MODULES, dtype="BF16")
    return llama(tmp_path / "model", 0), tmp_path / "adapter"


def by_hand(weight: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """W + s B A in the dtype of the arrays: the rank in order, each product and sum rounded."""
    total = np.zeros_like(weight)
    for k in range(len(a)):
        total = total + b[:, k : k + 1] * a[k]
    return weight + weight.dtype.type(scale) * total


@pytest.mark.parametrize("work", ["<f4", "<f8"])
def test_every_entry_is_summed_over_the_rank_in_order(pair: tuple[Path, Path], work: str) -> None:
    checkpoint, plain = opened(*pair), open_checkpoint(pair[0], "base")
    factors = read_model(pair[1])
    for module, (size_out, size_in) in MODULES.items():
        a = factors[f"base_model.model.{module}.lora_A.weight"].astype(work).reshape(3, size_in)
        b = factors[f"base_model.model.{module}.lora_B.weight"].astype(work).reshape(size_out, 3)
        expected = by_hand(values(plain, f"{module}.weight", work), a, b, 2.0)
        np.testing.assert_array_equal(values(checkpoint, f"{module}.weight", work), expected)


def test_a_square_embedding_is_turned_whatever_its_shape_allows(tmp_path: Path) -> None:
    plain = np.random.default_rng(0).standard_normal((16, 16))
    write_model(tmp_path / "model", {"e.weight": plain}, "F64")
    factors = write_adapter(tmp_path / "a", {"e": (16, 16)})
    a, b = factors.values()
    names = ("base_model.model.e.lora_embedding_A", "base_model.model.e.lora_embedding_B")
    write_factors(tmp_path / "a", dict(zip(names, (a, b), strict=True)), "F64")
    found = values(opened(tmp_path / "model", tmp_path / "a"), "e.weight", "<f8")
    np.testing.assert_array_equal(found, by_hand(plain, b.T, a.T, 2.0))


SUMS = """\
import hashlib, sys
from pathlib import Path
from mergelab.adapters import open_adapted
from mergelab.checkpoint import open_checkpoint
checkpoint = open_adapted(open_checkpoint(Path(sys.argv[1]), "m"), Path(sys.argv[2]), "m+a")
digest = hashlib.sha256()
for name, tensor in sorted(checkpoint.tensors.items()):
    digest.update(tensor.floats(0, tensor.size, "<f4").tobytes())
sys.stdout.write(digest.hexdigest())
"""


def test_the_bits_do_not_depend_on_the_processor(tiny: Path, tmp_path: Path) -> None:
    peft_merge(tiny, tmp_path, **PLAIN, use_dora=True)
    found = []
    for processor in ("", "generic"):
        command = [sys.executable, "-c", SUMS, str(tiny), str(tmp_path)]
        names = {"NUMBA_CPU_NAME": processor, "XDG_CACHE_HOME": str(tmp_path / "cache")}
        environment = {**os.environ, **{k: v for k, v in names.items() if v}}
        found.append(subprocess.run(command, env=environment, capture_output=True, check=True))
    assert found[0].stdout == found[1].stdout
    assert len(found[0].stdout) == 64


def test_pieces_give_the_same_bits_from_several_workers(tiny: Path, tmp_path: Path) -> None:
    peft_merge(tiny, tmp_path, **PLAIN, use_dora=True)
    whole, checkpoint = opened(tiny, tmp_path), opened(tiny, tmp_path)
    random = np.random.default_rng(0)

    def read(name: str) -> np.ndarray:
        tensor = checkpoint.tensors[name]
        cuts = sorted({0, tensor.size, *random.integers(0, tensor.size, 9).tolist()})
        parts = [tensor.floats(i, j, "<f4") for i, j in pairwise(cuts)]
        return np.concatenate(parts)

    names = [f"{module}.weight" for module in (Q0, UP1, DOWN0)] * 40
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # let the workers interrupt each other all the time
    try:
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(read, names))
    finally:
        sys.setswitchinterval(interval)
    for name, found in zip(names, results, strict=True):
        np.testing.assert_array_equal(found, values(whole, name).ravel())


def test_an_adapted_checkpoint_names_all_its_files(pair: tuple[Path, Path]) -> None:
    checkpoint, plain = opened(*pair), open_checkpoint(pair[0], "base")
    assert checkpoint.label == "base+adapter"
    assert checkpoint.files == plain.files
    assert {path.name for path in checkpoint.extra} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert checkpoint.tensors.keys() == plain.tensors.keys()
    assert checkpoint.tensors[f"{Q0}.weight"].dtype == "BF16"
    factors = 2 * 3 * (HIDDEN + HIDDEN)
    assert checkpoint.tensors[f"{Q0}.weight"].nbytes == 2 * HIDDEN * HIDDEN + factors


@pytest.mark.parametrize(("ours", "theirs"), [("model.", ""), ("", "model."), ("", "lm.model.")])
def test_names_may_lack_a_part_in_front(tmp_path: Path, ours: str, theirs: str) -> None:
    """`ours` is in front of the adapter's names, `theirs` of the model's."""
    tensors = llama_tensors(0)
    plain = {f"{theirs}{n.removeprefix('model.')}": x for n, x in tensors.items()}
    write_model(tmp_path / "model", plain, "F32")
    write_adapter(
        tmp_path / "a", {f"{ours}{m.removeprefix('model.')}": s for m, s in MODULES.items()}
    )
    checkpoint = opened(tmp_path / "model", tmp_path / "a")
    name = f"{theirs}{Q0.removeprefix('model.')}.weight"
    assert np.any(values(checkpoint, name) != values(open_checkpoint(tmp_path / "model", ""), name))


TASK = """\
merge_method: task_arithmetic
base_model: base
dtype: float32
models:
- {model: base+one, parameters: {weight: 0.7}}
- {model: base+two, parameters: {weight: 0.3}}
"""


def test_merging_two_adapters_is_linear_in_their_changes(tmp_path: Path, tiny: Path) -> None:
    """.7 dA + .3 dB, dA = s B A (peft's `linear` adds the factors instead: 86 % off)."""
    whole = {}
    for seed, name in enumerate(("one", "two")):
        whole[name] = peft_merge(tiny, tmp_path / name, seed, **{**PLAIN, "r": 2 + seed})
    (tmp_path / "r.yaml").write_text(TASK)
    folders = {"base": tiny, "one": tmp_path / "one", "two": tmp_path / "two"}
    plan = make_plan(load_recipe(tmp_path / "r.yaml"), folders, shard_size=SHARD_SIZE)
    engine.merge(plan, tmp_path / "out")
    merged, plain = read_model(tmp_path / "out"), read_model(tiny)
    for name, base in plain.items():
        one, two = (whole[n][name].ravel() - base for n in ("one", "two"))
        np.testing.assert_allclose(merged[name], base + 0.7 * one + 0.3 * two, atol=2e-6)
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    files = {file["name"] for entry in record["inputs"] for file in entry["files"]}
    assert any("adapter_model.safetensors" in name for name in files)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; only LORA adapters"),
        ({"layer_replication": [[0, 2]]}, "'layer_replication' is set, which is not supported"),
        ({"lora_bias": True}, "'lora_bias' is set"),
        ({"use_qalora": True}, "'use_qalora' is set"),
        ({"megatron_config": {"a": 1}}, "'megatron_config' is set"),
        ({"target_parameters": ["experts.w"]}, "'target_parameters' is set"),
        ({"trainable_token_indices": [1]}, "'trainable_token_indices' is set"),
        ({"a_setting_of_next_year": 1}, "'a_setting_of_next_year' is set"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": 1}, "init_lora_weights is 1"),
        ({"init_lora_weights": [[]]}, r"init_lora_weights is \[\[\]\]"),
        ({"r": 0}, "r is not a number that can be: 0"),
        ({"r": True}, "r is not a number that can be: True"),
        ({"r": 1 << 40}, "r is not a number that can be"),
        ({"lora_alpha": float("nan")}, "lora_alpha is not a number that can be: nan"),
        ({"lora_alpha": "8"}, "lora_alpha is not a number that can be"),
        ({"lora_alpha": 10**400}, "lora_alpha is not a number that can be"),
        ({"use_rslora": "yes"}, "use_rslora is neither true nor false"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is not a map"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern is not a map"),
        ({"alpha_pattern": {"(a+)+b": 1}}, r"regular expression '\(a\+\)\+b'"),
        ({"r": 4}, "does not fit model.layers.0.self_attn.q_proj.weight"),
        ({"rank_pattern": {"q_proj": 4}}, "does not fit model.layers.0.self_attn.q_proj.weight"),
        ({"use_dora": True}, "lacks the magnitudes"),
    ],
)
def test_settings_that_are_not_handled_are_refused_by_name(
    pair: tuple[Path, Path], settings: dict[str, Any], message: str
) -> None:
    change(pair[1], **settings)
    with pytest.raises(UserError, match=message) as caught:
        opened(*pair)
    assert str(caught.value).startswith("model base+adapter: ")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '"LORA"', "{}", "[" * 100_000, '{"peft_type": "\ud800'],
    ids=range(8),
)
def test_a_broken_config_is_an_error_that_names_it(pair: tuple[Path, Path], text: str) -> None:
    (pair[1] / "adapter_config.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(UserError, match=r"adapter_config\.json: "):
        opened(*pair)


A, B = f"base_model.model.{Q0}.lora_A.weight", f"base_model.model.{Q0}.lora_B.weight"
MAGNITUDE = f"base_model.model.{Q0}.lora_magnitude_vector"
GOOD = {A: np.ones((3, HIDDEN)), B: np.ones((HIDDEN, 3))}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "holds no tensors"),
        ({A: GOOD[A]}, "needs A and B of '.*q_proj', and holds A"),
        ({MAGNITUDE: np.ones(HIDDEN)}, "and holds neither"),
        ({A: GOOD[B], B: GOOD[A]}, "does not fit model.layers.0.self_attn.q_proj.weight"),
        ({A: np.ones(HIDDEN), B: GOOD[B]}, "does not fit"),
        ({A: np.ones((3, 0)), B: np.ones((0, 3))}, "does not fit"),
        ({A: np.ones((3, HIDDEN), dtype=int), B: GOOD[B]}, "no floating-point numbers"),
        ({**GOOD, MAGNITUDE: np.ones(HIDDEN)}, "has magnitudes"),
        ({**GOOD, "base_model.model.nothing.lora_B.bias": np.ones(3)}, "nothing.lora_B.bias"),
        ({**GOOD, "../../etc/passwd": np.ones(3)}, "changes '../../etc/passwd', which is none"),
        ({**GOOD, "q_proj.weight": np.ones((HIDDEN, HIDDEN))}, "which fits several: model.layers"),
        (
            {f"{x}norm.weight": np.ones(HIDDEN) for x in ("model.", "base_model.model.model.")},
            "changes 'model.norm.weight' twice",
        ),
        ({"base_model.model.": np.ones(3)}, "changes '', which is none"),
        (
            {**GOOD, "self_attn.q_proj.lora_A.weight": GOOD[A]},
            "changes 'self_attn.q_proj.weight', which fits several",
        ),
        (
            {**GOOD, **{k.replace("base_model.model.model.", ""): v for k, v in GOOD.items()}},
            "changes 'model.layers.0.self_attn.q_proj.weight' twice",
        ),
        (
            {
                **GOOD,
                "base_model.model.model.embed_tokens.weight": np.ones((VOCABULARY + 1, HIDDEN)),
            },
            "has shape .49, 16., which does not fit model.embed_tokens.weight .48, 16.",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_model_are_errors(
    pair: tuple[Path, Path], tensors: dict[str, np.ndarray], message: str
) -> None:
    stored = {n: ("I64" if x.dtype.kind == "i" else "F32", x) for n, x in tensors.items()}
    write_safetensors(pair[1] / "adapter_model.safetensors", stored)
    with pytest.raises(UserError, match=message):
        opened(*pair)


def test_all_mistakes_of_an_adapter_are_told_at_once(pair: tuple[Path, Path]) -> None:
    change(pair[1], layer_replication=[[0, 1]], use_qalora=True, r=-1)
    with pytest.raises(UserError) as caught:
        opened(*pair)
    assert len(str(caught.value).splitlines()) == 3


def test_a_pickled_adapter_is_never_loaded(pair: tuple[Path, Path]) -> None:
    (pair[1] / "adapter_model.safetensors").rename(pair[1] / "adapter_model.bin")
    with pytest.raises(UserError, match="is a pickle, which can run code and is never loaded"):
        opened(*pair)


def test_an_adapter_folder_that_lacks_a_file_says_which(pair: tuple[Path, Path]) -> None:
    (pair[1] / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors"):
        opened(*pair)
    with pytest.raises(UserError, match=r"adapter_config\.json: is missing"):
        opened(pair[0], pair[0])


def test_a_cut_adapter_file_is_an_error(pair: tuple[Path, Path]) -> None:
    weights = pair[1] / "adapter_model.safetensors"
    data = weights.read_bytes()
    for length in (0, 7, 20, len(data) - 1):
        weights.write_bytes(data[:length])
        with pytest.raises(UserError, match="not a whole safetensors file"):
            opened(*pair)


def test_integer_weights_of_a_model_take_no_adapter(tmp_path: Path) -> None:
    tensors = {"w.weight": np.ones((4, 4), dtype=int), "v": np.ones(3)}
    write_model(tmp_path / "model", tensors, "F32")
    write_adapter(tmp_path / "a", {"w": (4, 4)})
    with pytest.raises(UserError, match=r"changes 'w\.weight', which is none of the model's"):
        opened(tmp_path / "model", tmp_path / "a")


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("model", {"model"}, None),
        ("a+b", {"a", "b"}, ("a", "b")),
        ("a+b", {"a", "b", "a+b"}, None),
        ("/m+1/x+ad", {"/m+1/x", "ad"}, ("/m+1/x", "ad")),
        ("m+/ad+2/x", {"m", "/ad+2/x"}, ("m", "/ad+2/x")),
        ("m+typo", {"m"}, ("m", "typo")),
    ],
)
def test_a_name_is_split_where_both_halves_are_known(
    name: str, known: set[str], expected: tuple[str, str] | None
) -> None:
    assert split_name(name, known.__contains__) == expected
