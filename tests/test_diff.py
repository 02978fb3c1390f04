"""`mergelab diff`: what is measured between two checkpoints, against oracles of its own."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import bf16_bits, llama, llama_tensors, write_model
from conftest import Run
from hypothesis import given, settings
from hypothesis import strategies as st

from mergelab.checkpoint import open_checkpoint
from mergelab.diff import BLOCK, ROWS, compare, show
from mergelab.show import out

KINDS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "U8": "u1"}
WIDTHS = {"F64": "Q", "F32": "I", "F16": "H", "BF16": "H"}
Stored = tuple[str, np.ndarray]


def write_bits(folder: Path, tensors: dict[str, Stored]) -> Path:
    """A model folder whose tensors hold exactly these bytes: NaNs keep their payload."""
    header, body = {}, b""
    for name, (dtype, bits) in tensors.items():
        data = bits.tobytes()
        span = [len(body), len(body) + len(data)]
        header[name] = {"dtype": dtype, "shape": list(bits.shape), "data_offsets": span}
        body += data
    text = json.dumps(header).encode()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + body)
    return folder


def diff(a: Path, b: Path, workers: int = 1) -> dict[str, Any]:
    """`compare` of two folders, as JSON gives it back."""
    result = compare(open_checkpoint(a, "A"), open_checkpoint(b, "B"), workers)
    return json.loads(json.dumps(result, allow_nan=False))  # type: ignore[no-any-return]


def one(folder: Path, a: Stored, b: Stored) -> dict[str, Any]:
    """What is said of a single tensor."""
    result = diff(write_bits(folder / "a", {"w": a}), write_bits(folder / "b", {"w": b}))
    (entry,) = result["tensors"]
    return entry  # type: ignore[no-any-return]


def stored(values: Any, dtype: str) -> Stored:
    """Rounded values of a dtype."""
    numbers = np.asarray(values)
    return dtype, bf16_bits(numbers) if dtype == "BF16" else numbers.astype(KINDS[dtype])


def place(pattern: int, dtype: str) -> int:
    """Oracle: the number of a float's bits among all floats, by Python integers."""
    sign = 1 << 8 * struct.calcsize(WIDTHS[dtype]) - 1
    return -(pattern - sign) if pattern >= sign else pattern


def value(pattern: int, dtype: str) -> float:
    """Oracle: the value of a float's bits, by `struct`."""
    if dtype == "BF16":
        return float(struct.unpack("<f", struct.pack("<I", pattern << 16))[0])
    kind = {"F64": "d", "F32": "f", "F16": "e"}[dtype]
    return float(struct.unpack(f"<{kind}", struct.pack(f"<{WIDTHS[dtype]}", pattern))[0])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(WIDTHS)), st.data())
def test_every_measure_equals_its_definition(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, data: st.DataObject
) -> None:
    largest = 2 ** (8 * struct.calcsize(WIDTHS[dtype])) - 1
    patterns = st.integers(0, largest)
    pairs = data.draw(st.lists(st.one_of(st.tuples(patterns, patterns), patterns), max_size=8))
    both = [pair if isinstance(pair, tuple) else (pair, pair) for pair in pairs]
    bits = [np.array([p[i] for p in both], f"<u{(largest.bit_length()) // 8}") for i in (0, 1)]
    entry = one(tmp_path_factory.mktemp("pair"), (dtype, bits[0]), (dtype, bits[1]))
    values = [(value(x, dtype), value(y, dtype)) for x, y in both]
    kept = [i for i, pair in enumerate(values) if all(map(math.isfinite, pair))]
    assert entry["differing"] == sum(x != y for x, y in both)
    assert entry["equal"] == (entry["differing"] == 0)
    assert entry["max_ulp"] == max(
        (abs(place(both[i][0], dtype) - place(both[i][1], dtype)) for i in kept), default=0
    )
    apart = max((abs(values[i][0] - values[i][1]) for i in kept), default=0)
    assert entry["max_abs"] == min(apart, np.finfo(float).max)
    assert entry["not_finite"] == [sum(not math.isfinite(v[k]) for v in values) for k in (0, 1)]


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_the_next_number_is_one_ulp_away(tmp_path: Path, dtype: str) -> None:
    kind, bits = stored([1.0, -1.0, 3e-5, -2.5], dtype)
    nexts = (bits.view(f"<u{bits.dtype.itemsize}") + np.array(1, f"<u{bits.dtype.itemsize}")).view(
        bits.dtype
    )
    entry = one(tmp_path, (kind, bits), (kind, nexts))
    assert (entry["max_ulp"], entry["differing"], entry["share"]) == (1, 4, 1.0)


def test_both_zeros_differ_by_no_ulp(tmp_path: Path) -> None:
    entry = one(tmp_path, stored([0.0, 1.0], "F32"), stored([-0.0, 1.0], "F32"))
    assert (entry["equal"], entry["differing"]) == (False, 1)
    assert (entry["max_ulp"], entry["max_abs"], entry["cosine"]) == (0, 0.0, 1.0)


def test_steps_are_counted_across_zero(tmp_path: Path) -> None:
    tiny = float(np.finfo("<f4").smallest_subnormal)
    entry = one(tmp_path, stored([tiny], "F32"), stored([-2 * tiny], "F32"))
    assert entry["max_ulp"] == 3


def test_nan_of_equal_bits_is_equal_and_of_others_is_not(tmp_path: Path) -> None:
    nan = np.array([0x7FC0, 0x3F80], "<u2")
    same = one(tmp_path / "same", ("BF16", nan), ("BF16", nan))
    assert (same["equal"], same["not_finite"], same["cosine"]) == (True, [1, 1], 1.0)
    other = one(tmp_path / "other", ("BF16", nan), ("BF16", nan + np.array([1, 0], "<u2")))
    assert (other["equal"], other["differing"], other["max_abs"]) == (False, 1, 0.0)


def test_an_infinite_entry_takes_no_part_in_the_measures(tmp_path: Path) -> None:
    entry = one(tmp_path, stored([3.0, 4.0, 1.0], "F16"), stored([4.0, 3.0, np.inf], "F16"))
    assert entry["not_finite"] == [0, 1]
    assert (entry["differing"], entry["max_abs"]) == (3, 1.0)
    assert entry["cosine"] == pytest.approx(24 / 25, abs=1e-15)


def test_cosine_counts_equal_blocks_too(tmp_path: Path) -> None:
    values = np.random.default_rng(5).standard_normal(3 * BLOCK + 7)
    changed = values.copy()
    changed[BLOCK + 3 : BLOCK + 400] *= -3.0
    entry = one(tmp_path, stored(values, "F64"), stored(changed, "F64"))
    length = math.sqrt(math.fsum(values**2)) * math.sqrt(math.fsum(changed**2))
    assert entry["cosine"] == pytest.approx(math.fsum(values * changed) / length, abs=1e-14)
    assert entry["differing"] == 397
    assert entry["max_abs"] == np.abs(values - changed).max()


def test_infinite_entries_of_equal_blocks_leave_the_cosine_finite(tmp_path: Path) -> None:
    values = np.ones(BLOCK + 1)
    values[0] = np.inf
    changed = values.copy()
    changed[-1] = -1.0
    entry = one(tmp_path, stored(values, "F32"), stored(changed, "F32"))
    assert entry["cosine"] == pytest.approx((BLOCK - 2) / BLOCK, abs=1e-14)
    assert entry["not_finite"] == [1, 1]


def test_a_difference_beyond_float64_is_told_as_its_largest_number(tmp_path: Path) -> None:
    largest = float(np.finfo(float).max)
    entry = one(tmp_path, stored([largest], "F64"), stored([-largest], "F64"))
    assert (entry["max_abs"], entry["cosine"]) == (largest, None)


def test_opposite_tensors_have_cosine_minus_one_and_zeros_have_none(tmp_path: Path) -> None:
    values = np.arange(1.0, 20.0)
    opposite = one(tmp_path / "opposite", stored(values, "F32"), stored(-values, "F32"))
    assert opposite["cosine"] == pytest.approx(-1.0, abs=1e-15)
    zeros = one(tmp_path / "zeros", stored(values, "F32"), stored(0 * values, "F32"))
    assert zeros["cosine"] is None


def test_a_rounded_tensor_is_no_ulp_of_the_coarser_format_away(tmp_path: Path) -> None:
    values = np.random.default_rng(1).standard_normal(300).astype("<f4")
    entry = one(tmp_path / "rounded", stored(values, "F32"), stored(values, "BF16"))
    exact = (bf16_bits(values).astype("<u4") << 16).view("<f4")
    assert (entry["compared_as"], entry["ulp_of"], entry["max_ulp"]) == ("F32", "BF16", 0)
    assert entry["differing"] == np.count_nonzero(exact != values) > 200
    assert entry["max_abs"] == np.abs(exact.astype(float) - values).max()
    off = ("BF16", bf16_bits(values) + np.array(1, "<u2"))
    assert one(tmp_path / "off", stored(values, "F32"), off)["max_ulp"] == 1


def test_a_widened_tensor_has_equal_values_but_is_not_equal(tmp_path: Path) -> None:
    values = [0.5, -3.0, 0.0]
    entry = one(tmp_path, stored(values, "BF16"), stored(values, "F16"))
    assert (entry["compared_as"], entry["ulp_of"]) == ("F32", "BF16")
    assert (entry["equal"], entry["differing"], entry["cosine"]) == (False, 0, 1.0)


def test_integers_differ_by_their_difference(tmp_path: Path) -> None:
    ends = np.array([-(2**63), 7, 0], "<i8"), np.array([2**63 - 1, 9, 0], "<i8")
    entry = one(tmp_path / "ends", ("I64", ends[0]), ("I64", ends[1]))
    assert (entry["differing"], entry["max_ulp"], entry["max_abs"]) == (2, 2**64 - 1, 2.0**64)
    small = one(tmp_path / "small", stored([3, 250], "U8"), stored([10, 250], "U8"))
    assert (small["max_ulp"], small["max_abs"]) == (7, 7.0)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (stored(np.ones((2, 3)), "F32"), stored(np.ones((3, 2)), "F32")),
        (stored([1, 2], "I64"), stored([1.0, 2.0], "F32")),
    ],
)
def test_other_shapes_and_integers_of_another_type_are_not_compared(
    tmp_path: Path, a: Stored, b: Stored
) -> None:
    entry = one(tmp_path, a, b)
    assert not entry["equal"]
    assert entry["compared_as"] is entry["differing"] is entry["cosine"] is None


def test_scalars_and_empty_tensors_are_compared(tmp_path: Path) -> None:
    empty = one(tmp_path / "empty", stored(np.zeros((0, 4)), "BF16"), stored(np.zeros(0), "BF16"))
    assert not empty["equal"]
    assert empty["shapes"] == [[0, 4], [0]]
    same = one(tmp_path / "same", stored(np.zeros(0), "BF16"), stored(np.zeros(0), "BF16"))
    assert (same["equal"], same["share"]) == (True, 0.0)
    scalar = one(tmp_path / "scalar", stored(2.0, "F32"), stored(3.0, "F32"))
    assert (scalar["elements"], scalar["max_abs"]) == (1, 1.0)


def test_a_model_is_identical_to_its_copy_in_other_shards(tmp_path: Path) -> None:
    result = diff(llama(tmp_path / "a", 1), llama(tmp_path / "b", 1, shards=3))
    assert result["identical"]
    assert result["config"] == []
    assert result["totals"]["equal"] == result["totals"]["tensors"] == len(llama_tensors(1))
    assert result["totals"]["worst"] is None


def test_totals_sum_the_tensors_and_name_the_worst(tmp_path: Path) -> None:
    tensors = llama_tensors(1)
    names = sorted(tensors)
    changed = {name: values.copy() for name, values in tensors.items()}
    changed[names[0]][0, 0] += 1.0
    changed[names[3]].flat[:2] += 50.0
    a, b = write_model(tmp_path / "a", tensors, "F32"), write_model(tmp_path / "b", changed, "F32")
    result = diff(a, b)
    totals = result["totals"]
    assert [entry["name"] for entry in result["tensors"]] == names
    assert (totals["different"], totals["differing"], totals["worst"]) == (2, 3, names[3])
    assert totals["elements"] == sum(values.size for values in tensors.values())
    assert totals["max_abs"] == pytest.approx(50.0, rel=1e-6)
    assert totals["min_cosine"] == min(entry["cosine"] for entry in result["tensors"])


def test_tensors_and_config_keys_of_one_side_are_named(tmp_path: Path) -> None:
    tensors = llama_tensors(1)
    a = write_model(tmp_path / "a", {**tensors, "lm_head.weight": np.ones((2, 2))}, rope_theta=1)
    b = write_model(tmp_path / "b", {**tensors, "extra": np.ones(2)}, hidden_act="silu")
    result = diff(a, b)
    assert (result["only_a"], result["only_b"]) == (["lm_head.weight"], ["extra"])
    assert result["config"] == ["hidden_act", "rope_theta"]
    assert not result["identical"]
    assert result["totals"]["different"] == 0


def test_the_result_does_not_depend_on_workers(tmp_path: Path) -> None:
    a, b = llama(tmp_path / "a", 1, layers=4), llama(tmp_path / "b", 2, layers=4)
    assert diff(a, b) == diff(a, b, workers=3)


def test_people_read_the_answer_first_and_the_worst_tensors_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count = ROWS + 5
    a = {f"w{i:02}": stored(np.ones(4), "F32") for i in range(count)}
    b = {f"w{i:02}": stored(np.ones(4) + i, "F32") for i in range(count)}
    b["w07"] = stored(np.ones(3), "F32")
    result = diff(write_bits(tmp_path / "a", a), write_bits(tmp_path / "b", b))
    show(result)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"different: {count - 1} of {count} common tensors differ"
    assert "worst: w07" in lines
    rows = [line.split()[0] for line in lines if line.startswith("w") and line[1].isdigit()]
    others = [f"w{i:02}" for i in range(count - 1, 0, -1) if i != 7]
    assert rows == ["w07", *others][:ROWS]
    assert lines[-1] == "... and 4 more; --json lists them all"
    assert any("shapes [4] and [3]" in line for line in lines)


def test_one_changed_element_of_many_is_not_shown_as_zero_percent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = np.ones(100_000)
    a = write_bits(tmp_path / "a", {"w": stored(values, "F32")})
    values[70_000] = np.nan
    show(diff(a, write_bits(tmp_path / "b", {"w": stored(values, "F32")})))
    text = capsys.readouterr().out
    assert "1 of 100,000 elements (<0.01%), by up to 0 ulp and 0" in text
    assert "infinite or NaN, not measured: 0 elements of A, 1 of B" in text


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_width_hides_names_or_numbers(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    width: int,
) -> None:
    """Nor does a key of config.json steer the terminal."""
    monkeypatch.setattr(out, "_width", width)
    name = "model.layers.31.self_attn.q_proj.weight"
    a = {name: stored([1.0, 2.0], "F32"), "w": stored([1.0], "F32")}
    b = {name: stored([1.0, -2.0], "BF16"), "w": stored([1.0, 1.0], "F32")}
    folders = [write_bits(tmp_path / x, tensors) for x, tensors in (("a", a), ("b", b))]
    (tmp_path / "a/config.json").write_text('{"x\\u001b[2J\\ud800": 1}')
    show(diff(*folders))
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "x\N{REPLACEMENT CHARACTER}[2J" in text
    assert max(map(len, text.splitlines())) <= width
    assert name in "".join(line.split(" ")[0] for line in text.splitlines())  # folded
    cells = (
        "F32/BF16",
        "50.00%",
        "32,768 of BF16",
        "shapes [1]",
        "-0.60000000",
    )
    assert width < 80 or all(cell in text for cell in cells)


def test_diff_prints_for_people_and_for_programs(tmp_path: Path, mergelab: Run) -> None:
    a, b = llama(tmp_path / "a", 1), llama(tmp_path / "b", 2)
    same = mergelab("diff", a, a)
    assert (same.returncode, same.stderr) == (0, "")
    assert same.stdout == f"identical: all {len(llama_tensors(1))} tensors have the same bits\n"
    other = mergelab("diff", a, b, "--json", "--workers", 2)
    assert other.returncode == 0
    result = json.loads(other.stdout)
    assert (result["a"], result["b"], result["identical"]) == (str(a), str(b), False)
    assert result["totals"]["different"] > 0


def test_diff_of_a_missing_folder_says_so(tmp_path: Path, mergelab: Run) -> None:
    done = mergelab("diff", llama(tmp_path / "a", 1), "nowhere")
    assert done.returncode == 2
    assert "there is no folder nowhere" in done.stderr
