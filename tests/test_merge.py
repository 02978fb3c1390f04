"""The engine: same bytes whatever the schedule, nothing half-written, records of everything."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from checkpoints import decode, llama, llama_tensors, read_model, write_model
from conftest import Run

from mergelab import engine
from mergelab.checkpoint import read_header
from mergelab.errors import UserError
from mergelab.folders import alone
from mergelab.methods import METHODS
from mergelab.methods.base import BLOCK
from mergelab.plan import make_plan
from mergelab.recipe import load_recipe

EACH = "weight: 0.4, density: 0.6"
RECIPES = {  # name: method, parameters of every model, of the recipe, experts
    "linear": ("linear", "weight: 0.4", "", 2),
    "linear as it is": ("linear", "weight: 0.4", "normalize: false", 2),
    "slerp": ("slerp", "", "t: [0.2, 0.7]", 1),
    "slerp model": ("slerp", "", "t: [0.2, 0.7], scope: model", 1),
    "nuslerp": ("nuslerp", "weight: 0.4", "", 2),
    "nuslerp rows": ("nuslerp", "weight: 0.4", "nuslerp_flatten: false, nuslerp_row_wise: true", 2),
    "nuslerp columns": ("nuslerp", "weight: 0.4", "nuslerp_flatten: false", 2),
    "multislerp": ("multislerp", "weight: 0.4", "", 3),
    "karcher": ("karcher", "weight: 0.4", "", 3),
    "task_arithmetic": ("task_arithmetic", "weight: 0.4", "", 3),
    "ties": ("ties", EACH, "", 3),
    "ties paper": ("ties", EACH, "flavour: paper, scope: model", 3),
    "ties peft": ("ties", EACH, "flavour: peft, rescale: true", 3),
    "dare_linear": ("dare_linear", EACH, "", 3),
    "dare_linear density": ("dare_linear", EACH, "rescale: density", 3),
    "dare_ties": ("dare_ties", EACH, "", 3),
    "breadcrumbs": ("breadcrumbs", f"{EACH}, gamma: 0.05", "", 3),
    "breadcrumbs rows": ("breadcrumbs", EACH, "granularity: row, rescale: true", 3),
    "breadcrumbs_ties": ("breadcrumbs_ties", f"{EACH}, gamma: 0.05", "", 3),
    "della": ("della", EACH, "", 3),
    "della probability": ("della", EACH, "rescale: probability", 3),
    "della_linear": ("della_linear", EACH, "", 3),
    "sce": ("sce", "", "select_topk: 0.5", 3),
    "sce weights": ("sce", "", "select: weights", 3),
    "ram": ("ram", "", "", 3),
    "ramplus_tl": ("ramplus_tl", "", "", 3),
    "model_stock": ("model_stock", "", "", 2),
    "model_stock rows": ("model_stock", "", "filter_wise: true", 3),
    "nearswap": ("nearswap", "", "t: 0.01", 1),
    "arcee_fusion": ("arcee_fusion", "", "", 1),
    "passthrough": ("passthrough", "scale: 0.5", "", 0),
    "stack": ("passthrough", "", "", 0),
}
GOLDEN = {
    "linear v3": "8a34b949bfe95d21c4e0c826e82be9af4d83843bd07dda5904853cb2dca83d24",
    "linear as it is v3": "d6ab98cbd598a99d3d0a2fc83baf8ea562f4c0f26616abcbcbf182f1e4aeef5a",
    "slerp v2": "cf6d9924c6a18c6da3252942c38d1407174c6f2175109be24155324f4497e3bc",
    "slerp model v2": "d3c8113eccab0cec2c7bf705cd1cc97b354a751f20db9d2849c4dd746b8fea61",
    "nuslerp v1": "16ecffa7d21a070e0bd06c587c75461871e0ccab69395a1129f7270809d0373e",
    "nuslerp rows v1": "b7e257801893faaf79a3a6fae36850f9e1be5788ba3ee67e7a91f0c1f5b498d8",
    "nuslerp columns v1": "ebd35d62e08fbbd334a61c78467a4f93a6d877a5c54bcd82b4c4a17cc7bb0b84",
    "multislerp v1": "d5634ee672fa2c7c6c732494e7447831d6460643cd842c964242c615e0dfc0b4",
    "karcher v1": "ce65829fe1019a0865e5a5b7f16609f260195d60a1fa27338ec102a5d927c300",
    "task_arithmetic v2": "27cd4d6626421718a4b17aba2ed436d20c3d5b5905510c55bd03bfa54fff96c8",
    "ties v1": "187d3d2197401c703a7678b118a1dd6a0cb6ab562c64602885497b5827accf20",
    "ties paper v1": "cf7ce0b3951903eaaadb4cd262ea7beb2e1f99145591e6a04a888a60477e308e",
    "ties peft v1": "5a6c8fed26a6b4206c1b94ea79b0be0767586f6ad9dd1d41482f14d6d29e69dd",
    "dare_linear v4": "915456379ec1bf3cf301172d7aa894c2cd9a6cd5edbf8f119ef7cddd3c125d4d",
    "dare_linear density v4": "0ee1546013207b43c81eb96a6808f29bbdc1979b0e79dd2d7c711b40a9a2f9f7",
    "dare_ties v3": "f13f83e215736db2da5b880d3eb2194a8315b752aaa1ae108c7366e48cb1d8d7",
    "breadcrumbs v1": "0afc18e17103abd9f9aa08bf0d1571bfdf45c8fa5b42d347a2155b4b5c55e5fb",
    "breadcrumbs rows v1": "8ce5a880b99c82d8ce80aea47ec5290a912c235951dc0ba9984ae5966081948e",
    "breadcrumbs_ties v1": "60a630ab276b58e388f6ea48c50af29c2a9cf646366855eef6d400d060b3909f",
    "della v1": "226c25474145c5f87f6ee0572637fef383483eed99774c69b8d7e595ec0eaef7",
    "della probability v1": "26f9e70f92ff46a33ca4c97b8967c4bc2d7acc1234e1ed3f138dd2af7615d6b7",
    "della_linear v1": "71fe79e94065eeaa73c2939ad6934f71e8b633bcfa79e86839c327b2c10754fc",
    "sce v1": "e6d1e4994115e7e712fb8df32a22c082722bd97468209d89576c00712ebc715d",
    "sce weights v1": "6a51615f1f30e157b16393f70311ec50f4f5874c8c840bc2968c9d3444469b65",
    "ram v1": "f4e394a5032cb9a929424397101787245667dab9fa5df087bb001cf7f78fce4f",
    "ramplus_tl v1": "9e21eb46fd966eef9c62deb8650a2607511384dc45bbbc4190f367ab813f129f",
    "model_stock v1": "e8718f3443e4e4ef36a362823e14fb31c32d29b7800b417d2b0d14ae2ecefd25",
    "model_stock rows v1": "e51b9cf4e3d11fad9e29001de0960699a03f974cc3128aa965d45acc648b0154",
    "nearswap v1": "baf845070e764a6bde9fdb62dc9296de76971efd23d374b21e837a846a2e1bec",
    "arcee_fusion v1": "d3fae4f4346d0614dc4bc98643d9bce7d6ba0ca673e7504556ef61c556d36ce9",
    "passthrough v1": "bfeaa8e99ed6556558df8e332b7b6b0ea0c9737030c3a14f111e0aacbaae8c06",
    "stack v1": "7774c2fc2905445125af5e1b614f6d31d4ca5f836b969a5156d5bfc5d1306915",
}
STACK = """\
merge_method: passthrough
dtype: bfloat16
slices:
- sources: [{model: ./base, layer_range: [0, 2]}]
- sources: [{model: ./a, layer_range: [1, 2]}]
"""


def recipe(name: str) -> str:
    """A row of RECIPES over the models ./base, ./a, ./b and ./c; bfloat16 out."""
    method, each, shared, experts = RECIPES[name]
    if name == "stack":
        return STACK
    takes = METHODS[method].base
    models = ["./base", "./a", "./b", "./c"][: experts + 1]
    if takes != "needed" and experts == 2:  # without a base
        models = models[1:]
    based = "base_model: ./base\n" if "./base" in models and takes in ("needed", "optional") else ""
    listed = "".join(f"- {{model: {model}, parameters: {{{each}}}}}\n" for model in models)
    head = f"merge_method: {method}\n{based}dtype: bfloat16\nparameters: {{{shared}}}\n"
    return f"{head}models:\n{listed}"


def write_recipes(folder: Path) -> None:
    """Every row of RECIPES as a file."""
    folder.mkdir(exist_ok=True)
    for name in RECIPES:
        (folder / f"{name}.yaml").write_text(recipe(name))


def write_models(folder: Path, *, large: bool = False) -> None:
    """base, a, b, c; a third of each expert's entries is the base's.

    `large` adds a tensor of three blocks and one with a row above a block."""
    base: dict[str, np.ndarray] = {}
    for seed, name in enumerate(("base", "a", "b", "c")):
        tensors = llama_tensors(seed, scale=0.3)
        if large:
            rng = np.random.default_rng(seed)
            tensors |= {tensor: rng.standard_normal(shape) for tensor, shape in LARGE.items()}
        base = base or tensors
        for tensor, values in tensors.items():
            values.flat[seed::3] = base[tensor].flat[seed::3]
        write_model(folder / name, tensors, shards=seed % 3 + 1)


LARGE = {
    "model.layers.0.mlp.big.weight": (250, 600),
    "model.layers.1.mlp.long.weight": (2, BLOCK + 900),
}
Merge = tuple[int, int, Sequence[tuple[int, int]]]
ALONE: Sequence[tuple[int, int]] = [(1, 1)]


def shuffled(*counts: int) -> list[tuple[int, int]]:
    """All parts of a division in n, for each n, in an order that looks random."""
    parts = [(i, n) for n in counts for i in range(1, n + 1)]
    return sorted(parts, key=lambda p: hashlib.sha256(repr(p).encode()).digest())


def merge(
    path: str,
    out: str = "out",
    workers: int = 1,
    shard_size: int = 10**9,
    parts: Sequence[tuple[int, int]] = ALONE,
) -> dict[str, Any]:
    """Merge a recipe over folders in the working directory, in this process; the record."""
    loaded = load_recipe(Path(path))
    plan = make_plan(loaded, {m: Path(m) for m in loaded.models}, shard_size=shard_size)
    records = [engine.merge(plan, Path(out), workers=workers, part=part) for part in parts]
    return records[-1]


def merge_all(out: str, how: Merge) -> dict[str, Any]:
    """Tensor hashes of every recipe of the working directory."""
    return {
        path.stem: merge(str(path), f"{out}/{path.stem}", *how)["outputs"]["tensors"]
        for path in sorted(Path("recipes").glob("*.yaml"))
    }


def merged_elsewhere(place: Path, out: str, how: Merge, **environment: str) -> Any:
    """The same, by a process with an environment of its own."""
    script = "import json, sys, test_merge as t\nout, how = json.loads(sys.argv[1])\n"
    script += "sys.stdout.write(json.dumps(t.merge_all(out, how)))"
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps([out, how])],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def slower_cpu() -> str:
    """Names of the processor features that numpy can be told not to use."""
    from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

    return " ".join(name for name in __cpu_dispatch__ if __cpu_features__.get(name))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with four small models and all recipes; the working directory."""
    monkeypatch.chdir(tmp_path)
    write_models(tmp_path)
    write_recipes(tmp_path / "recipes")
    return tmp_path


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with models that have large tensors, and the tensor hashes of every recipe."""
    place = tmp_path_factory.mktemp("contract")
    write_models(place, large=True)
    write_recipes(place / "recipes")
    return place, merged_elsewhere(place, "out", (1, 10**9, ALONE), PYTHONHASHSEED="1")


@pytest.mark.parametrize(
    ("how", "environment"),
    [
        ((2, 10**9, ALONE), {"PYTHONHASHSEED": "2", "LC_ALL": "C", "OMP_NUM_THREADS": "2"}),
        ((3, 100_000, ALONE), {"PYTHONHASHSEED": "3", "NPY_DISABLE_CPU_FEATURES": slower_cpu()}),
        ((4, 20_000, ALONE), {"NUMBA_CPU_NAME": "generic"}),
        ((1, 10**9, shuffled(3)), {}),
        ((2, 10**5, shuffled(8)), {}),
        ((1, 10**5, [(1, 3), *shuffled(8)]), {}),
    ],
    ids=["locale", "numpy", "numba", "3 parts", "8 parts", "3 and 8 parts"],
)
def test_bytes_depend_on_recipe_and_inputs_alone(
    reference: tuple[Path, Any], how: Merge, environment: dict[str, str]
) -> None:
    place, want = reference
    out = f"out-{hashlib.sha256(repr((how, environment)).encode()).hexdigest()[:8]}"
    got = merged_elsewhere(place, out, how, **environment)
    assert got.keys() == want.keys() == RECIPES.keys()
    assert [name for name in want if got[name] != want[name]] == []


def test_numba_compiles_for_the_processor_that_is_asked_for(tmp_path: Path) -> None:
    script = (
        "from numba.core.registry import cpu_target\n"
        "print(cpu_target.target_context.codegen().magic_tuple()[1:])"
    )
    found = []
    for environment in ({}, {"NUMBA_CPU_NAME": "generic"}):
        command = [sys.executable, "-c", script]
        env = {**os.environ, **environment}
        found.append(subprocess.run(command, env=env, capture_output=True, text=True).stdout)
    assert found[1].strip() == "('generic', '')"
    assert found[0] != found[1]


def test_every_method_has_a_recipe_here() -> None:
    assert {method for method, *_ in RECIPES.values()} == set(METHODS)
    assert len(set(GOLDEN.values())) == len(RECIPES)  # each goes its own way


def test_golden_hashes_of_every_method_and_version(place: Path) -> None:
    found = {}
    for name in merge_all("out", (1, 10**9, ALONE)):
        tensors = {
            tensor.name: hashlib.sha256(tensor.bits().tobytes()).hexdigest()
            for tensor in read_header(place / f"out/{name}/model.safetensors").values()
        }
        key = f"{name} v{METHODS[RECIPES[name][0]].version}"
        found[key] = hashlib.sha256(json.dumps(tensors, sort_keys=True).encode()).hexdigest()
    assert found == GOLDEN


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_random_masks_do_not_depend_on_other_models_and_tensors(place: Path, name: str) -> None:
    sizes = {"base": 0.0, "a": 1.0, "b": 2.0**-6, "c": 2.0**-12}
    more = {"model.layers.0.a": np.ones(3), "model.layers.1.z": np.ones((2, 5))}

    def merged(models: str, extra: dict[str, np.ndarray]) -> np.ndarray:
        for model, size in sizes.items():
            write_model(place / model, {"w": np.full(3000, size)} | extra, "F32", layers=0)
        listed = "".join(f"- {{model: {m}, parameters: {{{EACH}}}}}\n" for m in models)
        shared = "parameters: {rescale: none, normalize: false}"
        head = f"merge_method: {name}\nbase_model: base\ndtype: float32\n{shared}\nmodels:\n"
        (place / "r.yaml").write_text((head + listed).replace("0.4", "1"))
        merge("r.yaml", f"out-{models}")
        return read_model(place / f"out-{models}")["w"]

    want = merged("ab", {})  # the sum tells which of the two masks had the entry
    assert set(want) == {0.0, 1.0, 2.0**-6, 1 + 2.0**-6}
    assert np.array_equal(merged("ba", more), want)
    three = merged("cba", more)
    assert np.array_equal(np.floor(three * 2**6) / 2**6, want)
    assert not np.array_equal(three, want)


def test_shards_follow_the_asked_size_and_hold_every_tensor(mergelab: Run, place: Path) -> None:
    merge("recipes/ties.yaml", "one")
    done = mergelab("merge", "recipes/ties.yaml", "-o", "many", "--shard-size", "2KB")
    assert done.returncode == 0, done.stderr
    one, many = read_model(place / "one"), read_model(place / "many")
    assert one.keys() == many.keys() == llama_tensors(0).keys()
    assert all(np.array_equal(one[name], many[name]) for name in one)
    index = json.loads((place / "many/model.safetensors.index.json").read_text())
    sizes = [(place / "many" / name).stat().st_size for name in index["weight_map"].values()]
    assert max(sizes) < 3500
    assert index["metadata"]["total_size"] == 2 * sum(v.size for v in one.values())


def test_a_merge_uses_the_cores_that_it_may_use(place: Path) -> None:
    """In a process of its own that may use one core only."""
    one = {min(os.sched_getaffinity(0))}
    code = f"import os; os.sched_setaffinity(0, {one}); from mergelab.cli import main; main()"
    for out, program in (("one", ["-c", code]), ("all", ["-m", "mergelab.cli"])):
        command = [sys.executable, *program, "merge", "recipes/ties.yaml", "-o", out]
        subprocess.run(command, check=True)
    records = [json.loads((place / out / "merge.json").read_text()) for out in ("one", "all")]
    cores = len(os.sched_getaffinity(0))
    assert [record["workers"] for record in records] == [1, min(8, cores)]
    assert records[0]["outputs"] == records[1]["outputs"]


def test_transformers_loads_a_sharded_merge_and_its_forward_pass_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(
        "merge_method: linear\ndtype: float32\nmodels:\n"
        "- {model: base, parameters: {weight: 1}}\n- {model: a, parameters: {weight: 1}}\n"
    )
    merge("r.yaml", shard_size=4000)
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("base", "a", "out")]
    base, other, merged = (m.state_dict() for m in models)
    for name in base:
        torch.testing.assert_close(merged[name], (base[name] + other[name]) / 2)
    assert torch.isfinite(models[2](torch.arange(10)[None]).logits).all()


def test_the_record_tells_inputs_outputs_method_and_versions(mergelab: Run, place: Path) -> None:
    assert mergelab("merge", "recipes/dare_ties.yaml", "-o", "out", "--seed", 7).returncode == 0
    record = json.loads((place / "out/merge.json").read_text())
    text = (place / "recipes/dare_ties.yaml").read_bytes()
    assert record["recipe"]["sha256"] == hashlib.sha256(text).hexdigest()
    assert record["method"] == {"name": "dare_ties", "version": METHODS["dare_ties"].version}
    assert (record["engine"], record["seed"]) == (engine.VERSION, 7)
    assert [entry["model"] for entry in record["inputs"]] == ["./base", "./a", "./b", "./c"]
    for entry in record["inputs"]:
        for file in entry["files"]:
            data = (place / entry["model"] / file["name"]).read_bytes()
            assert file["sha256"] == hashlib.sha256(data).hexdigest()
    for file in record["outputs"]["files"]:
        data = (place / "out" / file["name"]).read_bytes()
        assert file["sha256"] == hashlib.sha256(data).hexdigest()
        assert file["bytes"] == len(data)
    assert record["outputs"]["tensor_hash"] == "xxh3_128"
    for tensor in read_header(place / "out/model.safetensors").values():
        want = xxhash.xxh3_128(tensor.bits().tobytes()).hexdigest()
        assert record["outputs"]["tensors"][tensor.name] == want
    assert {"config.json", "tokenizer.json"} <= {f["name"] for f in record["outputs"]["files"]}
    assert record["packages"]["numpy"] == np.__version__
    tensors = merge("recipes/dare_ties.yaml", "other")["outputs"]["tensors"]
    assert tensors.keys() == record["outputs"]["tensors"].keys() == llama_tensors(0).keys()
    assert tensors != record["outputs"]["tensors"]  # the seed is another one


def test_a_finished_merge_is_not_repeated_and_a_changed_one_is(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = merge("recipes/linear.yaml")
    stamp = (place / "out/merge.json").stat().st_mtime_ns
    assert merge("recipes/linear.yaml") == first
    assert "up to date" in capsys.readouterr().err
    assert (place / "out/merge.json").stat().st_mtime_ns == stamp
    old = read_model(place / "out")
    llama(place / "a", seed=9)
    merge("recipes/linear.yaml")
    new = read_model(place / "out")
    assert any(not np.array_equal(old[name], new[name]) for name in old)
    (place / "out/model.safetensors").unlink()
    merge("recipes/linear.yaml")
    assert (place / "out/model.safetensors").is_file()


def test_a_second_merge_into_one_folder_waits_for_the_first(place: Path) -> None:
    merge("recipes/linear.yaml", "warm")
    with ThreadPoolExecutor(1) as pool:
        with alone(place / "out"):
            running = pool.submit(merge, "recipes/linear.yaml")
            with pytest.raises(TimeoutError):
                running.result(2)
            assert not (place / "out").exists()
        assert running.result(60)["outputs"]
    assert (place / "out/merge.json").is_file()


def test_a_folder_that_is_no_merge_is_never_replaced(place: Path) -> None:
    (place / "thesis").mkdir()
    (place / "thesis/chapter.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"is not empty and holds no merge\.json"):
        merge("recipes/linear.yaml", "thesis")
    assert (place / "thesis/chapter.txt").read_text() == "years of work"


def test_equal_integer_tensors_are_copied_and_different_ones_refused(place: Path) -> None:
    for seed, name in enumerate(("base", "a", "b", "c")):
        ids = {"model.position_ids": np.arange(10)}
        write_model(place / name, llama_tensors(seed) | ids)
    merge("recipes/ties.yaml")
    assert np.array_equal(read_model(place / "out")["model.position_ids"], np.arange(10))
    write_model(place / "b", llama_tensors(2) | {"model.position_ids": np.arange(10) + 1})
    with pytest.raises(UserError, match=r"model\.position_ids: is stored as integers that differ"):
        merge("recipes/ties.yaml", "other")
    assert not list(place.glob("*other*"))


def test_overflow_is_an_error_that_names_the_tensor(mergelab: Run, place: Path) -> None:
    path = place / "recipes/task_arithmetic.yaml"
    path.write_text(path.read_text().replace("bfloat16", "float16").replace("0.4", "1e7"))
    done = mergelab("merge", path, "-o", "out")
    assert done.returncode == 2
    assert "merged entries are infinite or not a number" in done.stderr
    assert not list(place.glob("*out*")) + list(place.glob(".*out*"))


def test_a_head_that_only_one_model_stores_is_merged_and_untied(place: Path) -> None:
    head = np.random.default_rng(9).standard_normal((48, 16))
    write_model(place / "b", llama_tensors(2) | {"lm_head.weight": head}, "F32")
    for seed, name in enumerate(("base", "a")):
        write_model(place / name, llama_tensors(seed), "F32")
    path = place / "recipes/task_arithmetic.yaml"
    text = recipe("task_arithmetic").replace("bfloat16", "float32").replace("0.4", "1")
    path.write_text("".join(line for line in text.splitlines(True) if "./c" not in line))
    merge(str(path))
    base, a = (llama_tensors(s)["model.embed_tokens.weight"] for s in (0, 1))
    np.testing.assert_allclose(
        read_model(place / "out")["lm_head.weight"], (a + head - base).ravel(), atol=1e-5
    )
    assert json.loads((place / "out/config.json").read_text())["tie_word_embeddings"] is False


def test_a_stack_that_ends_in_a_tied_model_gets_its_embedding_as_head(place: Path) -> None:
    head = np.random.default_rng(9).standard_normal((48, 16))
    write_model(place / "x", llama_tensors(0) | {"lm_head.weight": head}, "F32")
    write_model(place / "y", llama_tensors(1), "F32")
    (place / "r.yaml").write_text(
        "merge_method: passthrough\nslices:\n"
        "- sources: [{model: x, layer_range: [0, 2]}]\n"
        "- sources: [{model: y, layer_range: [1, 2]}]\n"
    )
    merge("r.yaml")
    want = read_model(place / "y")["model.embed_tokens.weight"]
    assert np.array_equal(read_model(place / "out")["lm_head.weight"], want)


def test_filters_match_the_head_even_where_it_is_tied(place: Path) -> None:
    head = np.random.default_rng(9).standard_normal((48, 16))
    write_model(place / "x", llama_tensors(0) | {"lm_head.weight": head}, "F32")
    write_model(place / "y", llama_tensors(1), "F32")
    (place / "r.yaml").write_text(
        "merge_method: linear\nparameters: {normalize: false}\nmodels:\n"
        "- {model: x, parameters: {weight: 0}}\n"
        "- {model: y, parameters: {weight: [{filter: lm_head, value: 1}, {value: 0.5}]}}\n"
    )
    merge("r.yaml")
    got, embedding = read_model(place / "out"), llama_tensors(1)["model.embed_tokens.weight"]
    np.testing.assert_allclose(got["lm_head.weight"], embedding.ravel(), atol=1e-6)
    np.testing.assert_allclose(got["model.embed_tokens.weight"], 0.5 * embedding.ravel(), atol=1e-6)


def test_output_dtype_is_out_dtype_then_dtype_then_the_widest_input(place: Path) -> None:
    for seed, (name, dtype) in enumerate({"x": "F16", "y": "BF16"}.items()):
        llama(place / name, seed, dtype)
    listed = "models: [{model: x, parameters: {weight: 1}}, {model: y, parameters: {weight: 1}}]\n"
    cases = {
        "dtype: float16\nout_dtype: bfloat16\n": ("BF16", "bfloat16"),
        "dtype: float16\n": ("F16", "float16"),
        "": ("F32", "float32"),
    }
    for number, (extra, (code, name)) in enumerate(cases.items()):
        (place / "r.yaml").write_text(f"merge_method: linear\n{extra}{listed}")
        out = place / f"out{number}"
        merge("r.yaml", str(out))
        raw = (out / "model.safetensors").read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        assert {e["dtype"] for k, e in header.items() if k != "__metadata__"} == {code}
        assert json.loads((out / "config.json").read_text())["torch_dtype"] == name


def test_memory_does_not_grow_with_the_tensor(tmp_path: Path) -> None:
    """Peak memory for a tensor of 16 Mi entries stays near that for 2 Mi."""
    script = (
        "import sys; from mergelab.cli import main\n"
        "sys.argv = ['mergelab', 'merge', 'r.yaml', '-o', sys.argv[1]]\n"
        "try: main()\n"
        "finally:\n"
        "    told = open('/proc/self/status').read()\n"
        "    sys.stdout.write(told.split('VmHWM:')[1].split()[0])\n"
    )
    peaks = []
    for number, rows in enumerate((2, 2, 16)):  # the first may compile kernels, which takes more
        for seed, name in enumerate(("base", "a")):
            rng = np.random.default_rng(seed)
            write_model(tmp_path / name, {"w": rng.standard_normal((rows * 1024, 1024))}, layers=0)
        (tmp_path / "r.yaml").write_text(
            "merge_method: ties\nbase_model: base\ndtype: bfloat16\n"
            "models: [{model: a, parameters: {weight: 1, density: 0.5}}]\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, f"out{number}"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(done.stdout))
    _, small, large = peaks
    assert large - small < 32_000, peaks  # the tensor alone has 64 MB in float32


def test_bfloat16_rounds_to_nearest_even() -> None:
    from mergelab.checkpoint import from_float

    values = np.array([1.0, 1.00390625, 1.01171875, -1.00390625, 3e38, 1e-40], "<f4")
    got = decode(from_float(values, "BF16").tobytes(), "BF16")
    np.testing.assert_array_equal(got[:4], [1.0, 1.0, 1.015625, -1.0])
    assert got[4] == pytest.approx(3e38, rel=0.01)
