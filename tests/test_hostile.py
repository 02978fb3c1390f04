"""Untrusted input: recipes, model files and targets that are wrong in unusual ways.

Every one must be a UserError that names the file, never another exception."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import llama, llama_tensors, read_model, write_model, write_safetensors
from conftest import Run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_merge import RECIPES, merge, recipe

from mergelab.checkpoint import from_float, open_checkpoint
from mergelab.errors import UserError
from mergelab.methods import METHODS
from mergelab.recipe import load_recipe
from mergelab.steps import Steps
from mergelab.study_file import load_study
from mergelab.yamlfile import parse

LINEAR = """\
merge_method: linear
dtype: float32
models:
- {model: base, parameters: {weight: 1}}
- {model: a, parameters: {weight: 1}}
"""
STACK = """\
merge_method: passthrough
slices:
- sources: [{model: base, layer_range: [0, 2]}]
- sources: [{model: a, layer_range: [0, 1]}]
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two small models, base and a, and a linear recipe; the working directory."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "a")):
        llama(tmp_path / name, seed)
    (tmp_path / "r.yaml").write_text(LINEAR)
    return tmp_path


@pytest.mark.parametrize(
    "text",
    [
        "a: \x00",
        "a: \x07",
        "dtype: 2001-99-99\n",
        "dtype: 0b_\n",
        "dtype: !!int abc\n",
        "dtype: !!float abc\n",
        f"dtype: {'9' * 5000}\n",
        "merge_method: passthrough\nslices: []\n",
        "merge_method: linear\nmodels: []\n",
        "merge_method: linear\nmodels: null\n",
        "merge_method: linear\nmodels: {a: b}\n",
        "merge_method: linear\nmodels: [a, b]\n",
        "merge_method: linear\nmodels: [{model: ''}]\n",
        "merge_method: linear\nmodels: [{model: 7}]\n",
        "merge_method: ties\nbase_model: ''\nmodels: [{model: a, parameters: {weight: 1}}]\n",
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: {}}}]\n",
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: [[1]]}}]\n",
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: .nan}}]\n",
        "merge_method: linear\nparameters: []\nmodels: [{model: a}]\n",
        "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [2, 1]}]}]\n",
        "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 1.5]}]}]\n",
        "<<: 3\n",
        "<<: [3]\n",
    ],
)
def test_odd_recipes_are_mistakes_with_the_file(place: Path, text: str) -> None:
    (place / "odd.yaml").write_text(text)
    with pytest.raises(UserError, match=r"odd\.yaml"):
        load_recipe(Path("odd.yaml"))


def test_a_bomb_of_merge_keys_is_refused() -> None:
    lines = ["a0: &a0 {k0: 1, k1: 1}"]
    lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 9)]
    with pytest.raises(UserError, match="YAML bomb"):
        parse("\n".join(lines) + "\n<<: *a8\n", Path("r.yaml"))


def test_merge_keys_inherit_and_own_keys_win() -> None:
    text = "one: &one {a: 1, b: 1}\ntwo: &two {b: 2, c: 2}\nx: {<<: [*one, *two], a: 0}\n"
    assert parse(text, Path("r.yaml"))["x"] == {"a": 0, "b": 1, "c": 2}


def test_thousands_of_unknown_keys_make_a_short_message(place: Path) -> None:
    (place / "many.yaml").write_text(LINEAR + "".join(f"key{i}: 1\n" for i in range(20_000)))
    with pytest.raises(UserError) as caught:
        load_recipe(Path("many.yaml"))
    assert len(str(caught.value)) < 10_000


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        '{"model": null}',
        '{"model": []}',
        '{"model": {"vocab": null}}',
        '{"model": {"vocab": {"a": "x"}}}',
        '{"model": {"vocab": {"a": 0}}, "added_tokens": ["x"]}',
        '{"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "x"}]}',
    ],
)
def test_odd_tokenizers(place: Path, content: str) -> None:
    (place / "a/tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"a/tokenizer\.json"):
        merge("r.yaml")
    assert not (place / "out").exists()


@pytest.mark.parametrize("content", ["[]", "{", "null", '{"a": 1'])
def test_odd_configs(place: Path, content: str) -> None:
    (place / "a/config.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"a/config\.json"):
        merge("r.yaml")


def test_per_layer_lists_must_have_every_layer(place: Path) -> None:
    (place / "r.yaml").write_text(STACK)
    write_model(place / "base", llama_tensors(0), layer_types=["x", "y"])
    for odd in ([], 3, {"0": "z"}):
        write_model(place / "a", llama_tensors(1), layer_types=odd)
        with pytest.raises(UserError, match=r"'layer_types' in its config\.json has no entry"):
            merge("r.yaml")


def test_single_layer_lists_that_are_no_layers_are_left_alone(place: Path) -> None:
    for name in ("base", "a"):
        write_model(place / name, llama_tensors(0, 1), layers=1, eos_token_id=[2])
    (place / "r.yaml").write_text(STACK.replace("[0, 2]", "[0, 1]"))
    merge("r.yaml")
    config = json.loads((place / "out/config.json").read_text())
    assert (config["architectures"], config["eos_token_id"]) == (["LlamaForCausalLM"], [2])
    assert config["num_hidden_layers"] == 2


def test_slices_take_the_tensors_of_every_source(place: Path) -> None:
    tensors = llama_tensors(0)
    del tensors["model.layers.0.self_attn.q_proj.bias"]
    write_model(place / "base", tensors)
    sources = "".join(
        f"  - {{model: {name}, layer_range: [0, 2], parameters: {{weight: 1}}}}\n"
        for name in ("base", "a")
    )
    (place / "r.yaml").write_text(f"merge_method: linear\nslices:\n- sources:\n{sources}")
    with pytest.raises(UserError, match=r"base: tensor model\.layers\.0\.self_attn\.q_proj\.bias"):
        merge("r.yaml")


def test_a_layer_without_tensors_is_an_error(place: Path) -> None:
    tensors = {n.replace("layers.1.", "layers.2."): v for n, v in llama_tensors(0).items()}
    write_model(place / "base", tensors)
    (place / "r.yaml").write_text(STACK)
    with pytest.raises(UserError, match="model base: layer 1 has no tensors"):
        merge("r.yaml")


def change_index(folder: Path, change: Any) -> None:
    """Write a model in two shards and change its index."""
    write_model(folder, llama_tensors(1), shards=2)
    path = folder / "model.safetensors.index.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["weight_map"].clear(), "holds no tensors|neither"),
        (lambda d: d.pop("weight_map"), "has no weight_map"),
        (lambda d: d["weight_map"].update({"ghost": "model-00001-of-00002.safetensors"}), "ghost"),
        (lambda d: d["weight_map"].pop("model.norm.weight"), r"does not name model\.norm\.weight"),
        (lambda d: d["weight_map"].update({"w": "gone.safetensors"}), "gone.safetensors: no such"),
        (lambda d: d["weight_map"].update({"w": "x" * 5000}), "names a file outside"),
        (lambda d: d["weight_map"].update({"w": 5}), "has no weight_map of file names"),
        (lambda d: d["weight_map"].update({"w": ".."}), "names a file outside"),
    ],
)
def test_odd_indexes(place: Path, change: Any, message: str) -> None:
    change_index(place / "a", change)
    with pytest.raises(UserError, match=message):
        merge("r.yaml")


def test_two_sets_of_weights_in_one_folder_are_refused(place: Path) -> None:
    single = (place / "a/model.safetensors").read_bytes()
    llama(place / "a", 1, shards=2)
    assert open_checkpoint(place / "a", "a").tensors
    (place / "a/model.safetensors").write_bytes(single)
    with pytest.raises(UserError, match="two sets of weights"):
        open_checkpoint(place / "a", "a")


def test_a_tensor_is_read_from_the_shard_that_the_index_names(place: Path) -> None:
    write_model(place / "a", llama_tensors(1), shards=2)
    second = place / "a/model-00002-of-00002.safetensors"
    write_safetensors(second, {"model.norm.weight": ("F32", np.zeros(16))})
    with pytest.raises(UserError, match=r"does not name|no file has it"):
        merge("r.yaml")


def write_raw(path: Path, header: str, body: bytes) -> None:
    """A safetensors file with this very header."""
    text = header.encode(errors="surrogatepass")
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def check_inside(folder: Path) -> None:
    """Opening a model either is a UserError, or all its tensors lie within files of its folder."""
    with contextlib.suppress(UserError):
        for tensor in open_checkpoint(folder, "m").tensors.values():
            assert tensor.file.parent == folder
            assert tensor.offset >= 8
            assert tensor.offset + tensor.nbytes <= tensor.file.stat().st_size
            assert len(tensor.bits().tobytes()) == tensor.nbytes


fuzzed = settings(
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
odd_numbers = st.one_of(
    st.integers(0, 40),
    st.sampled_from([-1, -(2**63), 2**31, 2**32, 2**60, 2**63, 2**64, 10**400, 1e308, 0.5, True]),
)
odd_json = st.recursive(
    st.one_of(odd_numbers, st.none(), st.text(max_size=5), st.sampled_from(["F32", "BF16", "\0"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@fuzzed
@given(st.data())
def test_damaged_headers_never_crash_or_reach_outside_their_file(
    tmp_path: Path, data: st.DataObject
) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": ("F32", np.ones(4)), "b.0.c": ("BF16", np.ones((2, 3)))})
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw
    path.write_bytes(bytes(raw))
    check_inside(tmp_path)


@st.composite
def entries(draw: st.DrawFn) -> tuple[str, Any]:
    """One line of a header: a real tensor's, with up to two fields replaced by something odd."""
    dtype, size = draw(st.sampled_from([("F32", 4), ("BF16", 2), ("BOOL", 1), ("F64", 8)]))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    begin = draw(st.integers(0, 24))
    entry: Any = {"dtype": dtype, "shape": shape}
    entry["data_offsets"] = [begin, begin + size * math.prod(shape)]
    for field in draw(st.lists(st.sampled_from([*entry, "more"]), max_size=2)):
        entry[field] = draw(odd_json | st.lists(odd_numbers, min_size=2, max_size=2))
    name = draw(st.sampled_from(["a", "b", "model.layers.0.w", "__metadata__", "../w", "\ud800"]))
    return name, draw(st.sampled_from([entry, entry, entry, 7, None, [entry]]))


@fuzzed
@given(st.lists(entries(), max_size=4), st.binary(max_size=40))
def test_odd_headers_never_crash_or_reach_outside_their_file(
    tmp_path: Path, found: list[tuple[str, Any]], body: bytes
) -> None:
    lines = (f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in found)  # may repeat
    write_raw(tmp_path / "model.safetensors", f"{{{', '.join(lines)}}}", body)
    check_inside(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        "[" * 100_000,
        '{"a":' * 50_000,
        '{"a": {"dtype": "F32", "shape": ' + "[" * 20_000 + "]" * 20_000 + "}}",
        '{"a": {"dtype": "F32", "shape": [' + "9" * 5000 + '], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, NaN]}}',
        '{"a": {"dtype": "F32", "shape": [' + f"{2**59}, " * 400 + '1], "data_offsets": [0, 4]}}',
        '{"a\\u001b[2J": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        '{"a\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32\\u001b[2J", "shape": [1], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}\0',
        "",
        " ",
        "\ufeff{}",
    ],
)
def test_headers_that_are_hard_to_parse_are_refused(place: Path, header: str) -> None:
    write_raw(place / "a/model.safetensors", header, bytes(4))
    with pytest.raises(UserError, match=r"a/model\.safetensors|holds no tensors") as found:
        open_checkpoint(place / "a", "a")
    assert str(found.value).isprintable()  # and does not steer the terminal


@pytest.mark.parametrize("length", [0, 1, 99, 2**31, 2**63, 2**64 - 1])
def test_impossible_lengths_of_headers_are_refused(place: Path, length: int) -> None:
    (place / "a/model.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match=r"a/model\.safetensors"):
        open_checkpoint(place / "a", "a")


@fuzzed
@given(st.data())
def test_odd_indexes_never_crash_or_reach_outside_their_folder(
    tmp_path: Path, data: st.DataObject
) -> None:
    folder = tmp_path / "m"
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(("../outside.safetensors", *SHARDS)):
        write_safetensors(folder / name, {f"w{number}": ("F32", np.ones(3))})
    files = st.sampled_from([*SHARDS, "../outside.safetensors", "..", "", "x", "\0", "\ud800"])
    odd_files = files | odd_json | st.just(str(tmp_path / "outside.safetensors"))
    names = st.sampled_from(["w0", "w1", "w2", "\ud800"])
    index: Any = {"metadata": {}, "weight_map": {"w1": SHARDS[0], "w2": SHARDS[1]}}
    index["weight_map"] |= data.draw(st.dictionaries(names, odd_files, max_size=2))
    for key in data.draw(st.lists(st.sampled_from(["metadata", "weight_map"]), max_size=1)):
        index[key] = data.draw(odd_json)
    text = json.dumps(data.draw(st.sampled_from([index, index, index, [index], None])))
    cut = data.draw(st.integers(0, 3))
    (folder / "model.safetensors.index.json").write_text(text[: len(text) - cut])
    check_inside(folder)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]},
        {"dtype": "F32", "shape": None, "data_offsets": [0, 4]},
        {"dtype": "F32"},
        7,
    ],
)
def test_odd_header_entries(place: Path, entry: Any) -> None:
    header = json.dumps({"w": entry}).encode()
    data = len(header).to_bytes(8, "little") + header + b"\0\0\0\0"
    (place / "a/model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"a/model\.safetensors"):
        open_checkpoint(place / "a", "a")


def test_unusual_names_and_numbers_in_files_survive(place: Path) -> None:
    odd = {"w\udc80": "\udc80", "nan": float("nan"), "model.layers." + "9" * 4400 + ".w": 1}
    tensors = llama_tensors(0) | {"model.layers." + "9" * 4400 + ".w": np.ones(3)}
    for name in ("base", "a"):
        write_model(place / name, tensors, **odd)
    merge("r.yaml")
    assert json.loads((place / "out/config.json").read_text())["w\udc80"] == "\udc80"


def test_an_input_is_never_overwritten(place: Path) -> None:
    before = read_model(place / "a")
    merge("r.yaml", out="m")
    (place / "again.yaml").write_text(LINEAR.replace("model: a", "model: m"))
    for out in ("m", "m/inside", "."):
        with pytest.raises(UserError, match=r"overlaps an input|own name"):
            merge("again.yaml", out)
    with pytest.raises(UserError, match="overlaps an input"):
        merge("r.yaml", out="a")
    assert all(np.array_equal(before[n], v) for n, v in read_model(place / "a").items())


def test_files_that_no_merge_wrote_are_never_deleted(place: Path) -> None:
    merge("r.yaml")
    (place / "out/NOTES.md").write_text("mine")
    (place / "r.yaml").write_text(LINEAR + "# changed\n")
    with pytest.raises(UserError, match=r"holds NOTES\.md, which no merge wrote"):
        merge("r.yaml")
    assert (place / "out/NOTES.md").read_text() == "mine"


def test_a_linked_target_stays_a_link(place: Path) -> None:
    (place / "disk").mkdir()
    (place / "out").symlink_to("disk")
    for text in (LINEAR, LINEAR + "# changed\n"):
        (place / "r.yaml").write_text(text)
        merge("r.yaml")
        assert (place / "out").is_symlink()
        assert (place / "disk/merge.json").is_file()
    assert not list(place.glob(".*replaced*"))


@pytest.mark.parametrize("out", ["r.yaml", "r.yaml/out", "x" * 300, ".."])
def test_impossible_targets(place: Path, out: str) -> None:
    with pytest.raises(UserError):
        merge("r.yaml", out=out)


def test_a_change_of_config_tokenizer_or_shards_is_a_new_merge(place: Path) -> None:
    merge("r.yaml")
    stamp = (place / "out/merge.json").stat().st_mtime_ns
    merge("r.yaml")
    assert (place / "out/merge.json").stat().st_mtime_ns == stamp
    (place / "base/generation_config.json").write_text('{"x": 1}')
    merge("r.yaml")
    assert (place / "out/generation_config.json").read_text() == '{"x": 1}'
    config = json.loads((place / "base/config.json").read_text())
    (place / "base/config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.25}))
    merge("r.yaml")
    assert json.loads((place / "out/config.json").read_text())["rms_norm_eps"] == 0.25
    merge("r.yaml", shard_size=2000)
    assert (place / "out/model.safetensors.index.json").is_file()


def test_a_flipped_bit_in_a_finished_merge_is_seen_and_mended(place: Path) -> None:
    want = merge("r.yaml")["outputs"]["files"]
    path = place / "out/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert merge("r.yaml")["outputs"]["files"] == want


def test_many_small_shards_need_few_open_files(place: Path) -> None:
    for name in ("base", "a"):
        write_model(place / name, llama_tensors(0, 30), layers=30)
    limited = ["bash", "-c", 'ulimit -n 64; exec "$@"', "-", sys.executable, "-m", "mergelab.cli"]
    arguments = ["merge", "r.yaml", "-o", "out", "--shard-size", "1B"]
    done = subprocess.run([*limited, *arguments], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list((place / "out").glob("*.safetensors"))) == len(llama_tensors(0, 30))


BITS = {"BOOL": "?", "U8": "u1", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "F32": "<f4"}


def write_shapes(folder: Path, seed: int) -> dict[str, tuple[str, np.ndarray]]:
    """A model of two layers with tensors of no, one and few entries, and of integers; its tensors.

    No tensor is large, and the last ones have no entries."""
    rng, tensors = np.random.default_rng(seed), dict[str, tuple[str, np.ndarray]]()
    for layer in range(2):
        floats = {shape: rng.uniform(0.5, 1.5, shape) for shape in ((5,), (1, 3), (3, 1), (2, 2))}
        floats |= {shape: np.full(shape, 1 + seed / 4) for shape in ((), (1,), (1, 1))}
        floats |= {shape: np.empty(shape) for shape in ((0,), (0, 4), (4, 0))}
        for number, (shape, values) in enumerate(floats.items()):
            tensors[f"model.layers.{layer}.w{number}.{len(shape)}"] = ("F32", values)
        for dtype in list(BITS)[:-1]:
            for shape in ((4,), (), (0,)):
                name = f"model.layers.{layer}.{dtype}.{shape}"
                tensors[name] = (dtype, np.arange(2, 2 + math.prod(shape)).reshape(shape))
    header, body = {}, b""
    for name, (dtype, values) in tensors.items():
        data = values.astype(BITS[dtype]).tobytes()
        span = [len(body), len(body) + len(data)]
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": span}
        body += data
    write_model(folder, llama_tensors(0))
    write_raw(folder / "model.safetensors", json.dumps(header), body)
    return tensors


@pytest.mark.parametrize("name", RECIPES)
def test_every_method_merges_scalars_and_empty_tensors_and_copies_integers(
    place: Path, name: str
) -> None:
    models = [write_shapes(place / m, seed) for seed, m in enumerate(("base", "a", "b", "c"))]
    (place / "r.yaml").write_text(recipe(name).replace("bfloat16", "float32"))
    for parts in ([(1, 1)], [(2, 3), (3, 3), (1, 3)]):
        merge("r.yaml", out="out", parts=parts)
        held = open_checkpoint(place / "out", "out").tensors
        assert held.keys() >= models[0].keys()
        for tensor, (dtype, values) in models[0].items():
            merged = held[tensor]
            assert (merged.dtype, merged.shape) == (dtype, values.shape)
            if dtype == "F32":
                assert np.isfinite(merged.bits()).all()
            else:
                assert merged.bits().tobytes() == values.astype(BITS[dtype]).tobytes()
        if not METHODS[RECIPES[name][0]].random:
            one = [held[f"model.layers.0.w{i}.{i - 4}"].bits()[0] for i in (4, 5, 6)]
            assert len(set(one)) == 1, one
        shutil.rmtree("out")


def damage(folder: Path, tensor: str, values: list[float], dtype: str = "BF16") -> None:
    """Put values over the first entries of a tensor."""
    seed = ("base", "a", "b", "c").index(folder.name)
    tensors = llama_tensors(seed)
    tensors[tensor].flat[: len(values)] = values
    write_model(folder, tensors, dtype)


@pytest.mark.parametrize("name", RECIPES)
def test_entries_that_are_not_finite_are_told_with_tensor_model_and_count(
    place: Path, name: str
) -> None:
    for seed, model in enumerate(("base", "a", "b", "c")):
        llama(place / model, seed)
    text = recipe(name)
    (place / "r.yaml").write_text(text)
    listed = [m for m in ("base", "a", "b") if f"./{m}," in text]
    tensor = "model.layers.1.self_attn.q_proj.weight"
    if name == "stack":
        listed, tensor = ["base", "a"], "model.layers.1.self_attn.o_proj.weight"
    for model in listed:
        damage(place / model, tensor, [math.nan, -math.inf, math.inf])
    with pytest.raises(UserError) as caught:
        merge("r.yaml")
    told = str(caught.value)
    for model in listed if name != "stack" else ["base"]:
        named = "the base" if f"base_model: ./{model}" in text else f"./{model}"
        assert f"3 entries of {named}" in told
    assert tensor in told
    assert "allow_not_finite" in told
    assert list(place.glob("*out*")) == []
    (place / "r.yaml").write_text(f"allow_not_finite: true\n{text}")
    merge("r.yaml")
    values = read_model(place / "out")[tensor]
    assert not np.isfinite(values[:3]).all()


def test_an_overflow_is_told_with_tensor_and_count_or_allowed(place: Path) -> None:
    for model in ("base", "a"):
        damage(place / model, "model.norm.weight", [60000.0, 1e5, -1e5], "F32")
    text = LINEAR.replace("float32", "float16")
    (place / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=r"tensor model\.norm\.weight: 2 merged entries"):
        merge("r.yaml")
    assert list(place.glob("*out*")) == []
    (place / "r.yaml").write_text(f"{text}allow_not_finite: true\n")
    merge("r.yaml")
    values = read_model(place / "out")["model.norm.weight"][:3]
    assert list(values) == [60000.0, math.inf, -math.inf]


def test_a_nan_in_a_copied_tensor_is_an_error(place: Path) -> None:
    damage(place / "base", "model.norm.weight", [math.nan], "F32")
    (place / "r.yaml").write_text("merge_method: passthrough\nmodels: [{model: base}]\n")
    with pytest.raises(UserError, match=r"model\.norm\.weight: 1 entries of base are infinite or"):
        merge("r.yaml")


@pytest.mark.parametrize(
    ("value", "nearest"),
    [(1 + 2**-8 + 2**-40, 1 + 2**-7), (1 + 3 * 2**-8 - 2**-40, 1 + 2**-7), (1 + 2**-8, 1.0)],
)
def test_float64_is_rounded_once_to_bfloat16(value: float, nearest: float) -> None:
    for sign in (1, -1):
        bits = from_float(np.array([sign * value]), "BF16").astype("<u4") << 16
        assert bits.view("<f4")[0] == sign * nearest


def test_record_and_shard_size_are_checked_before_the_work(mergelab: Run, place: Path) -> None:
    for extra in (["--record", "a"], ["--record", "r.yaml/x.json"], ["--shard-size", "9" * 400]):
        done = mergelab("merge", "r.yaml", "-o", "out", *extra)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: {x: {hub: }}", "needs exactly one of train, hub, path, gguf"),
        ("datasets: {d: {path: ., files: [], text: t, parts: {'../../x': 1}}}", "is no name"),
        ("suite: [{task: text_nll, name: '../x'}]", "is no name"),
        ("suite:\n- {task: txt_nll}", "there is no task 'txt_nll'. Did you mean 'text_nll'?"),
        ("models: {x: {path: gone}}", "gone does not exist"),
        ("datasets: {d: {path: ., files: [gone], text: t, parts: {x: 1}}}", "gone: no such file"),
    ],
)
def test_odd_studies_are_told_before_anything_runs(tmp_path: Path, text: str, message: str) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "study.yaml").write_text(f"title: t\nsuite:\ncontamination:\n{text}\n")
    if text.startswith("suite"):
        (folder / "study.yaml").write_text(f"title: t\n{text}\n")
    with pytest.raises(UserError) as caught:
        Steps(load_study(folder))
    assert message in str(caught.value)


def test_an_unknown_detector_is_told_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text('{"q": 1}\n{"q": 2}\n')
    (tmp_path / "study.yaml").write_text(
        "title: t\nmodels: {m: {hub: o/n@" + "a" * 40 + "}}\n"
        "datasets: {d: {path: ., files: [items.jsonl], text: '{{q}}', parts: {x: 1, y: 1}}}\n"
        "contamination:\n"
        "- {benchmark: d, base: m, suspects: d/x, controls: d/y, detectors: [base_lose]}\n"
    )
    with pytest.raises(UserError, match=r"no detector 'base_lose'\. Did you mean 'base_loss'"):
        Steps(load_study(tmp_path))


def test_a_recipe_name_that_a_shell_would_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text("title: t\n")
    (tmp_path / "x$(touch pwned).yaml").write_text(LINEAR)
    (tmp_path / ".hidden.yaml").write_text("not a recipe")
    with pytest.raises(UserError, match=r"x\$\(touch pwned\)': names of folder and recipes"):
        load_study(tmp_path)
