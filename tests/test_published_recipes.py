"""Four recipes of "Merge Large Language Models with mergekit" (M. Labonne, January 2024),
unchanged, on tiny stand-ins that lie in folders of the same names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import llama, llama_tensors, read_model
from conftest import Run

SLERP = """\
slices:
  - sources:
      - model: OpenPipe/mistral-ft-optimized-1218
        layer_range: [0, 32]
      - model: mlabonne/NeuralHermes-2.5-Mistral-7B
        layer_range: [0, 32]
merge_method: slerp
base_model: OpenPipe/mistral-ft-optimized-1218
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: bfloat16
"""

TIES = """\
models:
  - model: mistralai/Mistral-7B-v0.1
    # no parameters necessary for base model
  - model: OpenPipe/mistral-ft-optimized-1218
    parameters:
      density: 0.5
      weight: 0.5
  - model: mlabonne/NeuralHermes-2.5-Mistral-7B
    parameters:
      density: 0.5
      weight: 0.3
merge_method: ties
base_model: mistralai/Mistral-7B-v0.1
parameters:
  normalize: true
dtype: float16
"""

DARE_TIES = """\
models:
  - model: mistralai/Mistral-7B-v0.1
    # No parameters necessary for base model
  - model: samir-fama/SamirGPT-v1
    parameters:
      density: 0.53
      weight: 0.4
  - model: abacusai/Slerp-CM-mist-dpo
    parameters:
      density: 0.53
      weight: 0.3
  - model: EmbeddedLLM/Mistral-7B-Merge-14-v0.2
    parameters:
      density: 0.53
      weight: 0.3
merge_method: dare_ties
base_model: mistralai/Mistral-7B-v0.1
parameters:
  int8_mask: true
dtype: bfloat16
"""

PASSTHROUGH = """\
slices:
  - sources:
    - model: OpenPipe/mistral-ft-optimized-1218
      layer_range: [0, 32]
  - sources:
    - model: mlabonne/NeuralHermes-2.5-Mistral-7B
      layer_range: [24, 32]
merge_method: passthrough
dtype: bfloat16
"""

NAMES = (
    "mistralai/Mistral-7B-v0.1",
    "OpenPipe/mistral-ft-optimized-1218",
    "mlabonne/NeuralHermes-2.5-Mistral-7B",
    "samir-fama/SamirGPT-v1",
    "abacusai/Slerp-CM-mist-dpo",
    "EmbeddedLLM/Mistral-7B-Merge-14-v0.2",
)


@pytest.fixture
def stand_ins(tmp_path: Path) -> Path:
    """Tiny models of 32 layers under the published names, two shards each."""
    for seed, name in enumerate(NAMES):
        llama(
            tmp_path / name, seed, layers=32, shards=2, layer_types=[f"type{i}" for i in range(32)]
        )
    return tmp_path


def merged(mergelab: Run, place: Path, recipe: str) -> dict[str, np.ndarray]:
    """Plan and merge; every tensor of the result."""
    (place / "r.yaml").write_text(recipe)
    assert mergelab("plan", "r.yaml").returncode == 0
    done = mergelab("merge", "r.yaml", "-o", "out")
    assert done.returncode == 0, done.stderr
    return read_model(place / "out")


def test_gradient_slerp(mergelab: Run, stand_ins: Path) -> None:
    got = merged(mergelab, stand_ins, SLERP)
    first, second = (read_model(stand_ins / name) for name in NAMES[1:3])
    ends = {  # t is 0 or 1 at the ends of the gradients: a parent's own tensors, bit for bit
        "model.layers.0.self_attn.q_proj.weight": first,
        "model.layers.0.mlp.up_proj.weight": second,
        "model.layers.31.self_attn.q_proj.weight": second,
        "model.layers.31.mlp.up_proj.weight": first,
    }
    for name, parent in ends.items():
        assert np.array_equal(got[name], parent[name]), name
    middle = "model.layers.0.input_layernorm.weight"
    between = (first[middle] + second[middle]) / 2
    assert np.abs(got[middle] - between).max() < 0.02
    assert not np.array_equal(got[middle], first[middle])


def test_ties_in_float16(mergelab: Run, stand_ins: Path) -> None:
    got = merged(mergelab, stand_ins, TIES)
    base = read_model(stand_ins / NAMES[0])
    assert got.keys() == base.keys() == llama_tensors(0, 32).keys()
    config = json.loads((stand_ins / "out/config.json").read_text())
    assert config["torch_dtype"] == "float16"
    changed = np.mean([np.mean(got[n] != base[n].astype("<f2")) for n in base])
    assert 0.5 < changed < 0.9  # two task vectors of density 0.5 together touch about 3/4


def test_dare_ties_of_three_models_with_int8_mask(mergelab: Run, stand_ins: Path) -> None:
    got = merged(mergelab, stand_ins, DARE_TIES)
    base = read_model(stand_ins / NAMES[0])
    untouched = np.mean([np.mean(got[n] == base[n]) for n in base])
    assert 0.47**3 < untouched < 0.35  # bfloat16 swallows small changes besides
    record = json.loads((stand_ins / "out/merge.json").read_text())
    assert [entry["model"] for entry in record["inputs"]] == [NAMES[0], *NAMES[3:]]


def test_passthrough_of_forty_layers(mergelab: Run, stand_ins: Path) -> None:
    got = merged(mergelab, stand_ins, PASSTHROUGH)
    first, second = (read_model(stand_ins / name) for name in NAMES[1:3])
    for layer in range(40):
        parent, source = (first, layer) if layer < 32 else (second, layer - 8)
        for name in (n for n in parent if n.startswith(f"model.layers.{source}.")):
            suffix = name.split(".", 3)[3]
            assert np.array_equal(got[f"model.layers.{layer}.{suffix}"], parent[name])
    assert np.array_equal(got["model.embed_tokens.weight"], first["model.embed_tokens.weight"])
    assert np.array_equal(got["model.norm.weight"], second["model.norm.weight"])
    config = json.loads((stand_ins / "out/config.json").read_text())
    assert config["num_hidden_layers"] == 40
    assert config["layer_types"] == [f"type{i}" for i in [*range(32), *range(24, 32)]]
