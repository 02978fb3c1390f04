"""A GGUF file written on the spot, unpacked, and compared with the model it was made from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import gguf as ggml
import numpy as np
import pytest

from mergelab import gguf
from mergelab.errors import UserError

WORDS = ["<|start|>", "<|end|>", *"abcdefgh", "Ġ", "ab", "abc", "Ġa"]
MERGES = ["a b", "ab c", "Ġ a"]
SHAPE = {
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 14},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32},
}
NAMES = {  # transformers -> llama.cpp, inside a layer
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
    **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
    **{"self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm"},
    "post_attention_layernorm": "ffn_norm",
}


def permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """The order in which llama.cpp keeps the rows of q and k (its convert_hf_to_gguf.py)."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def tiny_llama(tied: bool):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPE, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1, rms_norm_eps=1e-6
    )
    return LlamaForCausalLM(config).eval()


def ggml_name(name: str) -> str:
    simple = {"model.embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight"}
    if name in simple or not name.startswith("model.layers."):
        return simple.get(name, "output_norm.weight")
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def write_gguf(model, path: Path, quantised: str = "nothing", leave_out: str = "nothing") -> str:
    """Write a model as llama.cpp's converter does; returns the sha256 of the file."""
    writer = ggml.GGUFWriter(path, "llama")
    writer.add_context_length(SHAPE["max_position_embeddings"])
    writer.add_embedding_length(SHAPE["hidden_size"])
    writer.add_block_count(SHAPE["num_hidden_layers"])
    writer.add_feed_forward_length(SHAPE["intermediate_size"])
    writer.add_head_count(SHAPE["num_attention_heads"])
    writer.add_head_count_kv(SHAPE["num_key_value_heads"])
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(SHAPE["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([ggml.TokenType.CONTROL] * 2 + [ggml.TokenType.NORMAL] * 12)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        if (name == "lm_head.weight" and model.config.tie_word_embeddings) or leave_out in name:
            continue
        if "q_proj" in name:
            values = permuted(values, 4)
        if "k_proj" in name:
            values = permuted(values, 2)
        if quantised in name:
            kind = ggml.GGMLQuantizationType.Q8_0
            writer.add_tensor(ggml_name(name), ggml.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(ggml_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return hashlib.sha256(path.read_bytes()).hexdigest()


def loaded(folder: Path):
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    return model.eval()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_unpacking_a_float_file_gives_the_weights_and_the_logits_of_the_model(tmp_path, tied):
    import torch

    model = tiny_llama(tied)
    sha256 = write_gguf(model, tmp_path / "m.gguf")
    gguf.dequantise(tmp_path / "m.gguf", sha256, tmp_path / "m", "float32")
    ours = loaded(tmp_path / "m")
    assert ours.config.tie_word_embeddings is tied
    theirs = model.state_dict()
    assert set(ours.state_dict()) == set(theirs)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
    tokens = torch.tensor([[0, 5, 7, 11, 2, 9]])
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, model(tokens).logits)


def test_unpacking_q8_0_gives_the_values_of_the_blocks(tmp_path):
    import torch

    model = tiny_llama(tied=True)
    sha256 = write_gguf(model, tmp_path / "m.gguf", quantised="proj")
    gguf.dequantise(tmp_path / "m.gguf", sha256, tmp_path / "m", "float32")
    ours = loaded(tmp_path / "m").state_dict()
    kind = ggml.GGMLQuantizationType.Q8_0
    for name, tensor in model.state_dict().items():
        exact = tensor.numpy()
        if "proj" in name:
            exact = ggml.dequantize(ggml.quantize(exact, kind), kind)
            assert not np.array_equal(exact, tensor.numpy())
        assert torch.equal(ours[name], torch.from_numpy(exact)), name


def test_the_weights_are_rounded_once_to_bfloat16_by_default(tmp_path):
    import torch

    model = tiny_llama(tied=True)
    sha256 = write_gguf(model, tmp_path / "m.gguf")
    record = gguf.dequantise(tmp_path / "m.gguf", sha256, tmp_path / "m")
    assert record["dtype"] == "bfloat16"
    for name, tensor in loaded(tmp_path / "m").state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].to(torch.bfloat16)), name


def test_the_tokenizer_comes_along_and_the_config_forgets_the_quantisation(tmp_path):
    from transformers import AutoTokenizer

    sha256 = write_gguf(tiny_llama(tied=True), tmp_path / "m.gguf")
    gguf.dequantise(tmp_path / "m.gguf", sha256, tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert tokenizer("abc ab ac", add_special_tokens=False)["input_ids"] == [12, 10, 11, 13, 4]
    assert tokenizer.decode([12, 10, 11, 13, 4]) == "abc ab ac"
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert "quantization_config" not in config
    modes = {path.stat().st_mode for path in (tmp_path / "m").iterdir()}
    assert len(modes) == 1, "colleagues may read the config but not the weights"
    assert str(tmp_path) not in (tmp_path / "m" / "config.json").read_text()


def test_a_second_run_leaves_the_folder_alone_and_another_dtype_replaces_it(tmp_path):
    sha256 = write_gguf(tiny_llama(tied=True), tmp_path / "m.gguf")
    out, file = tmp_path / "m", tmp_path / "m.gguf"
    first = gguf.dequantise(file, sha256, out)
    stamp = (out / "model.safetensors").stat().st_mtime_ns
    again = gguf.dequantise(file, sha256, out)
    assert (out / "model.safetensors").stat().st_mtime_ns == stamp
    assert again["files"] == first["files"]
    wider = gguf.dequantise(file, sha256, out, "float32")
    assert wider["dtype"] == "float32"
    assert wider["files"] != first["files"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "m.gguf"]


def test_another_file_than_the_pinned_one_is_refused(tmp_path):
    found = write_gguf(tiny_llama(tied=True), tmp_path / "m.gguf")
    with pytest.raises(UserError) as caught:
        gguf.dequantise(tmp_path / "m.gguf", "0" * 64, tmp_path / "m")
    assert str(caught.value) == (
        f"{tmp_path / 'm.gguf'}: has sha256 {found}, and the study pins {'0' * 64}. "
        "Get the right file, or pin this one if you trust it."
    )
    assert not (tmp_path / "m").exists()


def test_a_missing_file_and_a_file_of_another_kind_are_refused(tmp_path):
    file = tmp_path / "m.gguf"
    with pytest.raises(UserError, match=r"m\.gguf: no such file\. Correct the path"):
        gguf.dequantise(file, "0" * 64, tmp_path / "m")
    file.write_bytes(b"not a model")
    sha256 = hashlib.sha256(b"not a model").hexdigest()
    with pytest.raises(UserError, match=r"m\.gguf: is no GGUF file"):
        gguf.dequantise(file, sha256, tmp_path / "m")


def test_a_file_without_one_of_its_tensors_is_refused_not_filled_with_random_numbers(tmp_path):
    file = tmp_path / "m.gguf"
    sha256 = write_gguf(tiny_llama(tied=True), file, leave_out="layers.1.mlp.up_proj")
    with pytest.raises(UserError) as caught:
        gguf.dequantise(file, sha256, tmp_path / "m")
    assert str(caught.value) == (
        f"{file}: its tensors do not fit its configuration "
        "({'missing_keys': ['model.layers.1.mlp.up_proj.weight']}). "
        "Use another file of this model, or its safetensors."
    )
    assert not (tmp_path / "m").exists()


def test_a_truncated_file_is_refused(tmp_path):
    file = tmp_path / "m.gguf"
    write_gguf(tiny_llama(tied=True), file)
    data = file.read_bytes()
    for size in (len(data) // 2, 2000, 30):
        file.write_bytes(data[:size])
        sha256 = hashlib.sha256(data[:size]).hexdigest()
        with pytest.raises(UserError, match="transformers cannot read this GGUF file"):
            gguf.dequantise(file, sha256, tmp_path / "m")
    assert not (tmp_path / "m").exists()
