"""The engine: same bytes whatever the schedule, nothing half-written, records of everything."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from checkpoints import decode, llama, llama_tensors, read_model, write_model
from conftest import Run

from mergelab.folders import alone

RECIPES = {
    "linear": ("linear", "weight: [0.2, 0.8]", "", True),
    "slerp": ("slerp", "", "parameters: {t: [0, 0.5, 1]}", False),
    "task_arithmetic": ("task_arithmetic", "weight: 0.4", "", True),
    "ties": ("ties", "weight: 0.4, density: 0.6", "", True),
    "dare_linear": ("dare_linear", "weight: 0.4, density: 0.6", "", True),
    "dare_ties": ("dare_ties", "weight: 0.4, density: 0.6", "", True),
}
GOLDEN = {
    "linear v2": "d51f6b0f7035474a4878a9c3130d6dafa944aa052ba3648266cc2bef5db96b82",
    "slerp v1": "dcfa68a5c073a98814939aa0fc153d21400712b70d7c63d17f957262ac5064d9",
    "task_arithmetic v2": "26735bd0296c108a0a1262802854cb9a6165f211cd2447aa82059a16f3e20bc2",
    "ties v1": "42a4efeb0901c02121feb72705b9db3ac2f87b366f244b17a647fcf41663d3c5",
    "dare_linear v3": "52315c5df9c92fcf0c2f4015fa6cc1aa311f44ffaf504e1b8b53ad2798046dc8",
    "dare_ties v2": "184d296976d1dcb647ab89d4e1d3e6b8d57bc27bc9249ae38d4d52ab0609853b",
    "passthrough v1": "aacba512bbf70ce4e4cd129a4572bea00172d4dc56c55265d4a793de6a1731ba",
}


def write_recipes(folder: Path, models: Path) -> None:
    """One recipe per method over base, a and b in `models`, bfloat16 out."""
    folder.mkdir(exist_ok=True)
    for name, (method, each, extra, both) in RECIPES.items():
        experts = ("a", "b") if both else ("a",)
        listed = "".join(f"- {{model: {models}/{m}, parameters: {{{each}}}}}\n" for m in experts)
        base = f"- {{model: {models}/base, parameters: {{{each}}}}}\n"
        text = f"merge_method: {method}\nbase_model: {models}/base\ndtype: bfloat16\n{extra}\n"
        (folder / f"{name}.yaml").write_text(f"{text}models:\n{base}{listed}")
    stack = "merge_method: passthrough\ndtype: bfloat16\nslices:\n"
    for model, span in (("base", "[0, 2]"), ("a", "[1, 2]")):
        stack += f"- sources: [{{model: {models}/{model}, layer_range: {span}}}]\n"
    (folder / "passthrough.yaml").write_text(stack)


def write_models(folder: Path, *, large: bool = False) -> None:
    """base, a, b with relative names; `large` adds a tensor of more than two blocks."""
    for seed, name in enumerate(("base", "a", "b")):
        tensors = llama_tensors(seed)
        if large:
            rng = np.random.default_rng(seed)
            tensors["model.layers.0.mlp.big.weight"] = rng.standard_normal((1100, 700))
            tensors["model.layers.1.mlp.big.weight"] = rng.standard_normal((1100, 700))
        write_model(folder / name, tensors, shards=seed + 1)


MERGE_ALL = """
import json, sys
from pathlib import Path
from mergelab import engine
from mergelab.plan import make_plan
from mergelab.recipe import load_recipe
workers, shard_size, out = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
hashes = {}
for path in sorted(Path("recipes").glob("*.yaml")):
    recipe = load_recipe(path)
    plan = make_plan(recipe, {m: Path(m) for m in recipe.models}, shard_size=shard_size)
    record = engine.merge(plan, out / path.stem, workers=workers)
    name = f"{recipe.method.name} v{recipe.method.version}"
    hashes[name] = record["outputs"]["tensors"]
print(json.dumps(hashes, sort_keys=True))
"""


def merge_all(
    place: Path, workers: int = 1, shard_size: int = 10**9, out: str = "out", **environment: str
) -> dict[str, dict[str, str]]:
    """Tensor hashes of every recipe, merged in a process with its own environment."""
    done = subprocess.run(
        [sys.executable, "-c", MERGE_ALL, str(workers), str(shard_size), str(place / out)],
        cwd=place,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout))


def slower_cpu() -> str:
    """Names of the processor features that numpy can be told not to use."""
    from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

    return " ".join(name for name in __cpu_dispatch__ if __cpu_features__.get(name))


def test_bytes_depend_on_recipe_and_inputs_alone(tmp_path: Path) -> None:
    write_models(tmp_path, large=True)
    write_recipes(tmp_path / "recipes", Path("."))
    want = merge_all(tmp_path, out="reference")
    assert set(want) == set(GOLDEN)
    settings: list[tuple[int, int, dict[str, str]]] = [
        (2, 10**9, {"PYTHONHASHSEED": "1"}),
        (2, 100_000, {"PYTHONHASHSEED": "2", "OMP_NUM_THREADS": "2"}),
        (1, 20_000, {"PYTHONHASHSEED": "3", "ATEN_CPU_CAPABILITY": "default"}),
        (1, 10**9, {"NPY_DISABLE_CPU_FEATURES": slower_cpu()}),
        (1, 10**9, {"ATEN_CPU_CAPABILITY": "avx512", "LC_ALL": "C"}),
    ]
    for number, (workers, shard_size, environment) in enumerate(settings):
        got = merge_all(tmp_path, workers, shard_size, f"out{number}", **environment)
        assert got == want, environment


def test_golden_hashes_of_every_method_and_version(tmp_path: Path) -> None:
    write_models(tmp_path)
    write_recipes(tmp_path / "recipes", Path("."))
    merged = merge_all(tmp_path)
    found = {n: hashlib.sha256(json.dumps(h).encode()).hexdigest() for n, h in merged.items()}
    assert found == GOLDEN


def test_shards_follow_the_asked_size_and_hold_every_tensor(mergelab: Run, tmp_path: Path) -> None:
    write_models(tmp_path)
    write_recipes(tmp_path / "recipes", Path("."))
    assert mergelab("merge", "recipes/ties.yaml", "-o", "one").returncode == 0
    assert (
        mergelab("merge", "recipes/ties.yaml", "-o", "many", "--shard-size", "2KB").returncode == 0
    )
    one, many = read_model(tmp_path / "one"), read_model(tmp_path / "many")
    assert one.keys() == many.keys() == llama_tensors(0).keys()
    assert all(np.array_equal(one[name], many[name]) for name in one)
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    sizes = [(tmp_path / "many" / name).stat().st_size for name in index["weight_map"].values()]
    assert max(sizes) < 3500
    assert index["metadata"]["total_size"] == 2 * sum(v.size for v in one.values())


def test_transformers_loads_a_sharded_merge_and_its_forward_pass_works(
    mergelab: Run, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=48,
        tie_word_embeddings=True,
    )
    for seed, name in enumerate(("base", "a")):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(tmp_path / name)
    (tmp_path / "r.yaml").write_text(
        "merge_method: linear\ndtype: float32\nmodels:\n"
        "- {model: base, parameters: {weight: 1}}\n- {model: a, parameters: {weight: 1}}\n"
    )
    assert mergelab("merge", "r.yaml", "-o", "out", "--shard-size", "4KB").returncode == 0
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("base", "a", "out")]
    base, other, merged = (m.state_dict() for m in models)
    for name in base:
        torch.testing.assert_close(merged[name], (base[name] + other[name]) / 2)
    assert torch.isfinite(models[2](torch.arange(10)[None]).logits).all()


def test_the_record_tells_inputs_outputs_method_and_versions(mergelab: Run, tmp_path: Path) -> None:
    write_models(tmp_path)
    write_recipes(tmp_path / "recipes", Path("."))
    assert mergelab("merge", "recipes/dare_ties.yaml", "-o", "out", "--seed", 7).returncode == 0
    record = json.loads((tmp_path / "out/merge.json").read_text())
    text = (tmp_path / "recipes/dare_ties.yaml").read_bytes()
    assert record["recipe"]["sha256"] == hashlib.sha256(text).hexdigest()
    assert record["method"] == {"name": "dare_ties", "version": 2}
    assert record["seed"] == 7
    assert [entry["model"] for entry in record["inputs"]] == ["./base", "./a", "./b"]
    for entry in record["inputs"]:
        for file in entry["files"]:
            data = (tmp_path / entry["model"] / file["name"]).read_bytes()
            assert file["sha256"] == hashlib.sha256(data).hexdigest()
    for file in record["outputs"]["files"]:
        data = (tmp_path / "out" / file["name"]).read_bytes()
        assert file["sha256"] == hashlib.sha256(data).hexdigest()
    assert {"config.json", "tokenizer.json"} <= {f["name"] for f in record["outputs"]["files"]}
    assert record["packages"]["numpy"] == np.__version__


def test_a_finished_merge_is_not_repeated_and_a_changed_one_is(
    mergelab: Run, tmp_path: Path
) -> None:
    write_models(tmp_path)
    write_recipes(tmp_path / "recipes", Path("."))
    first = mergelab("merge", "recipes/linear.yaml", "-o", "out")
    stamp = (tmp_path / "out/merge.json").stat().st_mtime_ns
    again = mergelab("merge", "recipes/linear.yaml", "-o", "out")
    assert (first.returncode, again.returncode) == (0, 0)
    assert "up to date" in again.stderr
    assert (tmp_path / "out/merge.json").stat().st_mtime_ns == stamp
    old = read_model(tmp_path / "out")
    llama(tmp_path / "a", seed=9)
    assert mergelab("merge", "recipes/linear.yaml", "-o", "out").returncode == 0
    new = read_model(tmp_path / "out")
    assert any(not np.array_equal(old[name], new[name]) for name in old)
    (tmp_path / "out/model.safetensors").unlink()
    assert mergelab("merge", "recipes/linear.yaml", "-o", "out").returncode == 0
    assert (tmp_path / "out/model.safetensors").is_file()


def test_kill_leaves_nothing_that_looks_finished_and_a_rerun_completes(
    mergelab: Run, tmp_path: Path
) -> None:
    write_models(tmp_path, large=True)
    write_recipes(tmp_path / "recipes", Path("."))
    assert mergelab("merge", "recipes/ties.yaml", "-o", "reference").returncode == 0
    want = json.loads((tmp_path / "reference/merge.json").read_text())["outputs"]["tensors"]
    command = [sys.executable, "-m", "mergelab.cli", "merge", "recipes/ties.yaml", "-o", "out"]
    partial, killed = tmp_path / ".out.merge.partial", 0
    for wait in (0.0, 0.02, 0.05, 0.1, 0.15):
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
        while not (partial / "model.safetensors").exists() and process.poll() is None:
            time.sleep(0.002)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL and not (tmp_path / "out").exists():
            killed += 1
            assert partial.exists()
            assert not (partial / "merge.json").exists()
        if (tmp_path / "out").exists():
            break
    assert killed > 0
    assert mergelab("merge", "recipes/ties.yaml", "-o", "out").returncode == 0
    assert not partial.exists()
    assert json.loads((tmp_path / "out/merge.json").read_text())["outputs"]["tensors"] == want


def test_a_second_merge_into_one_folder_waits_for_the_first(tmp_path: Path) -> None:
    write_models(tmp_path)
    write_recipes(tmp_path / "recipes", Path("."))
    command = [sys.executable, "-m", "mergelab.cli", "merge", "recipes/linear.yaml", "-o", "out"]
    with alone(tmp_path / "out"):
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(3)
        assert not (tmp_path / "out").exists()
    assert process.wait(60) == 0
    assert (tmp_path / "out/merge.json").is_file()


def test_a_folder_that_is_no_merge_is_never_replaced(mergelab: Run, tmp_path: Path) -> None:
    write_models(tmp_path)
    write_recipes(tmp_path / "recipes", Path("."))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("years of work")
    done = mergelab("merge", "recipes/linear.yaml", "-o", "thesis")
    assert done.returncode == 2
    assert "is not empty and holds no merge.json" in done.stderr
    assert (tmp_path / "thesis/chapter.txt").read_text() == "years of work"


def test_equal_integer_tensors_are_copied_and_different_ones_refused(
    mergelab: Run, tmp_path: Path
) -> None:
    write_recipes(tmp_path / "recipes", Path("."))
    for seed, name in enumerate(("base", "a", "b")):
        ids = {"model.position_ids": np.arange(10)}
        write_model(tmp_path / name, llama_tensors(seed) | ids)
    assert mergelab("merge", "recipes/ties.yaml", "-o", "out").returncode == 0
    assert np.array_equal(read_model(tmp_path / "out")["model.position_ids"], np.arange(10))
    write_model(tmp_path / "b", llama_tensors(2) | {"model.position_ids": np.arange(10) + 1})
    done = mergelab("merge", "recipes/ties.yaml", "-o", "other")
    assert done.returncode == 2
    assert "model.position_ids: is stored as integers that differ" in done.stderr
    assert not (tmp_path / "other").exists()


def test_overflow_is_an_error_that_names_the_tensor(mergelab: Run, tmp_path: Path) -> None:
    write_models(tmp_path)
    write_recipes(tmp_path / "recipes", Path("."))
    path = tmp_path / "recipes/task_arithmetic.yaml"
    path.write_text(path.read_text().replace("bfloat16", "float16").replace("0.4", "1e7"))
    done = mergelab("merge", path, "-o", "out")
    assert done.returncode == 2
    assert "merged entries are infinite or not a number" in done.stderr
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.merge.partial").exists()


def test_a_head_that_only_one_model_stores_is_merged_and_untied(
    mergelab: Run, tmp_path: Path
) -> None:
    write_recipes(tmp_path / "recipes", Path("."))
    write_models(tmp_path)
    head = np.random.default_rng(9).standard_normal((48, 16))
    write_model(tmp_path / "b", llama_tensors(2) | {"lm_head.weight": head}, "F32")
    write_model(tmp_path / "a", llama_tensors(1), "F32")
    write_model(tmp_path / "base", llama_tensors(0), "F32")
    path = tmp_path / "recipes/task_arithmetic.yaml"
    path.write_text(path.read_text().replace("bfloat16", "float32").replace("0.4", "1"))
    assert mergelab("merge", path, "-o", "out").returncode == 0
    base, a = (llama_tensors(s)["model.embed_tokens.weight"] for s in (0, 1))
    np.testing.assert_allclose(
        read_model(tmp_path / "out")["lm_head.weight"], (a + head - base).ravel(), atol=1e-5
    )
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False


def test_a_stack_that_ends_in_a_tied_model_gets_its_embedding_as_head(
    mergelab: Run, tmp_path: Path
) -> None:
    head = np.random.default_rng(9).standard_normal((48, 16))
    write_model(tmp_path / "x", llama_tensors(0) | {"lm_head.weight": head}, "F32")
    write_model(tmp_path / "y", llama_tensors(1), "F32")
    (tmp_path / "r.yaml").write_text(
        "merge_method: passthrough\nslices:\n"
        "- sources: [{model: x, layer_range: [0, 2]}]\n"
        "- sources: [{model: y, layer_range: [1, 2]}]\n"
    )
    assert mergelab("merge", "r.yaml", "-o", "out").returncode == 0
    want = read_model(tmp_path / "y")["model.embed_tokens.weight"]
    assert np.array_equal(read_model(tmp_path / "out")["lm_head.weight"], want)


def test_filters_match_the_head_even_where_it_is_tied(mergelab: Run, tmp_path: Path) -> None:
    head = np.random.default_rng(9).standard_normal((48, 16))
    write_model(tmp_path / "x", llama_tensors(0) | {"lm_head.weight": head}, "F32")
    write_model(tmp_path / "y", llama_tensors(1), "F32")
    (tmp_path / "r.yaml").write_text(
        "merge_method: linear\nparameters: {normalize: false}\nmodels:\n"
        "- {model: x, parameters: {weight: 0}}\n"
        "- {model: y, parameters: {weight: [{filter: lm_head, value: 1}, {value: 0.5}]}}\n"
    )
    assert mergelab("merge", "r.yaml", "-o", "out").returncode == 0
    got, embedding = read_model(tmp_path / "out"), llama_tensors(1)["model.embed_tokens.weight"]
    np.testing.assert_allclose(got["lm_head.weight"], embedding.ravel(), atol=1e-6)
    np.testing.assert_allclose(got["model.embed_tokens.weight"], 0.5 * embedding.ravel(), atol=1e-6)


def test_output_dtype_is_out_dtype_then_dtype_then_the_widest_input(
    mergelab: Run, tmp_path: Path
) -> None:
    for seed, (name, dtype) in enumerate({"x": "F16", "y": "BF16"}.items()):
        llama(tmp_path / name, seed, dtype)
    listed = "models: [{model: x, parameters: {weight: 1}}, {model: y, parameters: {weight: 1}}]\n"
    cases = {
        "dtype: float16\nout_dtype: bfloat16\n": ("BF16", "bfloat16"),
        "dtype: float16\n": ("F16", "float16"),
        "": ("F32", "float32"),
    }
    for number, (extra, (code, name)) in enumerate(cases.items()):
        (tmp_path / "r.yaml").write_text(f"merge_method: linear\n{extra}{listed}")
        out = tmp_path / f"out{number}"
        assert mergelab("merge", "r.yaml", "-o", out).returncode == 0
        raw = (out / "model.safetensors").read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        assert {e["dtype"] for k, e in header.items() if k != "__metadata__"} == {code}
        assert json.loads((out / "config.json").read_text())["torch_dtype"] == name


def test_memory_does_not_grow_with_the_tensor(mergelab: Run, tmp_path: Path) -> None:
    """Peak anonymous memory for a tensor of 16 Mi entries stays near that for 2 Mi."""
    script = (
        "import resource, sys; from mergelab.cli import main\n"
        "sys.argv = ['mergelab', 'merge', 'r.yaml', '-o', sys.argv[1]]\n"
        "import threading, time; peak = [0]\n"
        "def watch():\n"
        "    while True:\n"
        "        for line in open('/proc/self/status'):\n"
        "            if line.startswith('RssAnon'): peak[0] = max(peak[0], int(line.split()[1]))\n"
        "        time.sleep(0.01)\n"
        "threading.Thread(target=watch, daemon=True).start()\n"
        "try: main()\nfinally: sys.stdout.write(str(peak[0]))\n"
    )
    peaks = []
    for rows in (2, 16):
        for seed, name in enumerate(("base", "a")):
            rng = np.random.default_rng(seed)
            write_model(tmp_path / name, {"w": rng.standard_normal((rows * 1024, 1024))}, layers=0)
        (tmp_path / "r.yaml").write_text(
            "merge_method: ties\nbase_model: base\ndtype: bfloat16\n"
            "models: [{model: a, parameters: {weight: 1, density: 0.5}}]\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, f"out{rows}"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(done.stdout))
    small, large = peaks
    assert large - small < 32_000, peaks  # the tensor alone has 64 MB in float32


def test_bfloat16_rounds_to_nearest_even() -> None:
    from mergelab.checkpoint import from_float

    values = np.array([1.0, 1.00390625, 1.01171875, -1.00390625, 3e38, 1e-40], "<f4")
    got = decode(from_float(values, "BF16").tobytes(), "BF16")
    np.testing.assert_array_equal(got[:4], [1.0, 1.0, 1.015625, -1.0])
    assert got[4] == pytest.approx(3e38, rel=0.01)
