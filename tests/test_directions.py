"""SLERP, NuSLERP, Multi-SLERP, Karcher mean, Model Stock, NearSwap and Arcee Fusion.

Hand-worked numbers, float64 definitions, edges. Acceptance rows T6 to T9: test_acceptance.py."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import decode, encode
from method_specs import merge, recipe

from mergelab.errors import UserError
from mergelab.methods.base import BLOCK

Array = np.ndarray[Any, Any]
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def merged(
    place: Path,
    method: str,
    base: Any,
    experts: list[Any],
    own: dict[str, list[Any]] | None = None,
    dtype: str = "F64",
    **shared: Any,
) -> Array:
    """Merge models of one tensor `w`; own: parameter -> value per expert."""
    models = {} if base is None else {"base": {"w": np.array(base)}}
    each = {}
    for m, values in enumerate(experts):
        models[f"m{m}"] = {"w": np.array(values)}
        each[f"m{m}"] = {name: given[m] for name, given in (own or {}).items()}
    text = recipe(method, each, shared, None if base is None else "base")
    return merge(place, text, models, dtype)["w"]


def weights(*values: float) -> dict[str, list[float]]:
    return {"weight": list(values)}


def normal(shape: Any, seed: int, scale: float = 1.0) -> Array:
    """Random values, exact in float32."""
    drawn = scale * np.random.default_rng(seed).standard_normal(shape)
    return np.asarray(drawn, np.float32).astype(float)


def at(degrees: float, length: float = 1.0) -> list[float]:
    """A plane vector by its angle."""
    return [length * math.cos(math.radians(degrees)), length * math.sin(math.radians(degrees))]


# --- SLERP --------------------------------------------------------------------------------------


def test_slerp_by_a_third_of_a_right_angle(tmp_path: Path) -> None:
    """Factors sin 60 and sin 30, on the vectors as they are."""
    got = merged(tmp_path, "slerp", [4.0, 0.0], [[0.0, 2.0]], t=1 / 3)
    np.testing.assert_allclose(got, [4 * math.sqrt(0.75), 1.0], **EXACT)


def test_slerp_of_opposite_vectors_is_a_straight_line(tmp_path: Path) -> None:
    got = merged(tmp_path, "slerp", [4.0, -2.0], [[-4.0, 2.0]], t=0.25)
    np.testing.assert_allclose(got, [2.0, -1.0], **EXACT)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("t", [0.0, 1.0])
def test_slerp_ends_keep_even_the_sign_of_zero(tmp_path: Path, dtype: str, t: float) -> None:
    ends = np.array([1.5, -0.0, 0.0]), np.array([-0.0, -1.5, 3.0])
    got = merged(tmp_path, "slerp", ends[0], [ends[1]], dtype=dtype, t=t)
    assert got.tobytes() == ends[int(t)].tobytes()


def test_slerp_of_whole_models_is_slerp_of_their_concatenation(tmp_path: Path) -> None:
    """Each tensor keeps its own t; the angle is that of both together."""
    a = {"x": normal((20, 30), 0), "y": normal(70, 1)}
    b = {"x": a["x"] + normal((20, 30), 2, 0.5), "y": normal(70, 3)}
    models = {"base": a, "m": b}
    shared = {"t": [{"filter": "x", "value": 0.25}, {"value": 0.75}]}
    whole = merge(tmp_path / "m", recipe("slerp", {"m": {}}, {**shared, "scope": "model"}), models,
                  "F64")  # fmt: skip
    apart = merge(tmp_path / "t", recipe("slerp", {"m": {}}, shared), models, "F64")
    flat = [np.concatenate([m["x"].ravel(), m["y"]]) for m in (a, b)]
    for name, t, part in (("x", 0.25, slice(0, 600)), ("y", 0.75, slice(600, None))):
        one = merged(tmp_path / name, "slerp", flat[0], [flat[1]], t=t)[part]
        np.testing.assert_allclose(whole[name].ravel(), one, **EXACT)
        assert np.abs(whole[name] - apart[name]).max() > 0.01


# --- NuSLERP ------------------------------------------------------------------------------------


def arc(a: Array, b: Array, t: float) -> Array:
    """The great circle's point at t, for vectors at an angle."""
    angle = math.acos(a @ b / math.sqrt((a @ a) * (b @ b)))
    return np.asarray((math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle))


@pytest.mark.parametrize("shape", [(6,), (2, 7), (3, 4, 5), (40, 3000)])
@pytest.mark.parametrize("based", [False, True])
def test_nuslerp_of_tensors_rows_and_columns(
    tmp_path: Path, shape: tuple[int, ...], based: bool
) -> None:
    """Rows run along the last dimension, columns along the first; a vector is one of either."""
    a, b = (normal(shape, k) + 0.5 for k in (0, 1))
    base = normal(shape, 2) if based else np.zeros(shape)
    for part in ("tensor", "row", "column"):
        axis = {"row": -1, "column": 0}.get(part)
        x, y = (v.reshape(1, -1) if axis is None else np.moveaxis(v, axis, -1) for v in (a, b))
        want = np.empty_like(x)
        for i in np.ndindex(x.shape[:-1]):
            want[i] = arc(x[i], y[i], 0.75)
        want = want.reshape(shape) if axis is None else np.moveaxis(want, -1, axis)
        got = merged(
            tmp_path / part, "nuslerp", base if based else None, [base + a, base + b],
            weights(0.5, 1.5), nuslerp_flatten=axis is None, nuslerp_row_wise=axis == 0,
        )  # fmt: skip
        np.testing.assert_allclose(got, base + want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("row_wise", [True, False])
@pytest.mark.parametrize("shape", [(), (1,), (3, 1), (0, 4)])
def test_nuslerp_of_single_entries_is_a_straight_line(
    tmp_path: Path, shape: tuple[int, ...], flatten: bool, row_wise: bool
) -> None:
    """One number has no direction but its sign (columns of three have: here they are parallel)."""
    got = merged(
        tmp_path, "nuslerp", None, [np.full(shape, 3.0), np.full(shape, 5.0)], weights(3.0, 1.0),
        nuslerp_flatten=flatten, nuslerp_row_wise=row_wise,
    )  # fmt: skip
    np.testing.assert_allclose(got, np.full(shape, 3.5), **EXACT)


def test_nuslerp_follows_the_circle_where_slerp_goes_straight(tmp_path: Path) -> None:
    """One degree: cos = 0.99985, above SLERP's 0.9995."""
    a, b = at(0), at(1)
    circle = merged(tmp_path / "n", "nuslerp", None, [a, b], weights(3.0, 1.0))
    line = merged(tmp_path / "s", "slerp", a, [b], t=0.25)
    np.testing.assert_allclose(circle, at(0.25), rtol=0, atol=1e-14)
    np.testing.assert_allclose(line, 0.75 * np.array(a) + 0.25 * np.array(b), rtol=0, atol=1e-15)
    assert np.abs(circle - line).max() > 1e-6


@pytest.mark.parametrize("flatten", [True, False])
def test_nuslerp_of_opposite_vectors_is_a_straight_line(tmp_path: Path, flatten: bool) -> None:
    """To within float32: not rounding noise times the 1 / sin(angle) of nearly half a turn."""
    a = normal(1000, 0)
    both = [a, normal(1000, 1, 1e-5) - a]
    got = merged(tmp_path, "nuslerp", None, both, weights(3.0, 1.0), "F32", nuslerp_flatten=flatten)
    np.testing.assert_allclose(got, 0.5 * a, rtol=1e-6, atol=2e-5)


def test_nuslerp_weights_that_cancel_mean_the_middle(tmp_path: Path) -> None:
    got = merged(tmp_path, "nuslerp", None, [at(10), at(50)], weights(0.5, -0.5))
    np.testing.assert_allclose(got, at(30), **EXACT)


# --- Multi-SLERP --------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [None, [10.0, -7.0]])
def test_multislerp_has_the_mean_direction_and_the_mean_norm(tmp_path: Path, base: Any) -> None:
    """Task vectors (3, 0) and (0, 4): direction (1, 1) / sqrt 2, norm 3.5; weights 2 and 2 double
    it."""
    origin = np.zeros(2) if base is None else np.array(base)
    experts = [origin + step for step in ((3.0, 0.0), (0.0, 4.0))]
    for divide, factor in ((True, 1), (False, 4)):
        place = tmp_path / str(divide)
        got = merged(
            place, "multislerp", base, experts, weights(2.0, 2.0), normalize_weights=divide
        )
        want = origin + factor * 3.5 / math.sqrt(2)
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-8 * factor)  # eps is 1e-8


@pytest.mark.parametrize("based", [False, True])
def test_multislerp_leaves_a_single_model_as_it_is(tmp_path: Path, based: bool) -> None:
    a = np.array([1.5, -0.0, 2.0**-20])
    base = np.array([2.0**20, 1.0, 1.0]) if based else None
    assert merged(tmp_path, "multislerp", base, [a], weights(0.5)).tobytes() == a.tobytes()


def test_multislerp_of_two_opposite_models_is_their_weighted_mean(tmp_path: Path) -> None:
    got = merged(tmp_path, "multislerp", None, [[2.0, 0.0], [-1.0, 0.0]], weights(1.0, 1.0))
    np.testing.assert_allclose(got, [0.5, 0.0], **EXACT)


@pytest.mark.parametrize("dtype", ["F64", "F32"])
def test_multislerp_of_three_that_cancel_is_refused(tmp_path: Path, dtype: str) -> None:
    """To within float32: what is left of the sum is rounding error."""
    a, b = (x / np.linalg.norm(x) for x in (normal(1000, 0), normal(1000, 1)))
    c = (-a - b).astype("<f4").astype(float)
    share = weights(1.0, 1.0, float(np.linalg.norm(c)))
    with pytest.raises(UserError, match=r"tensor w: the weighted mean .* is zero"):
        merged(tmp_path, "multislerp", None, [2 * a, 3 * b, c], share, dtype)


def test_multislerp_of_zero_task_vectors_is_the_base(tmp_path: Path) -> None:
    base = normal(50, 0)
    got = merged(tmp_path, "multislerp", base, [base] * 3, weights(1.0, 2.0, 3.0))
    np.testing.assert_array_equal(got, base)


@pytest.mark.parametrize(("method", "share"), [("multislerp", (1, -1)), ("karcher", (0, 0))])
def test_weights_that_sum_to_zero_are_refused(tmp_path: Path, method: str, share: Any) -> None:
    with pytest.raises(UserError, match="the weights sum to 0"):
        merged(tmp_path, method, None, [at(0), at(50)], weights(*share))


# --- Karcher mean -------------------------------------------------------------------------------


def test_karcher_mean_of_three_axes_is_their_middle(tmp_path: Path) -> None:
    axes = np.diag([1.0, 2.0, 6.0])
    got = merged(tmp_path, "karcher", None, list(axes), tol=1e-13, max_iter=100)
    np.testing.assert_allclose(got, np.full(3, 3 / math.sqrt(3)), **EXACT)


def test_karcher_mean_of_two_divides_the_angle_by_the_weights(tmp_path: Path) -> None:
    got = merged(
        tmp_path, "karcher", None, [at(10), at(90)], weights(3.0, 1.0), tol=1e-13, max_iter=1000
    )
    np.testing.assert_allclose(got, at(30), **EXACT)


def test_karcher_mean_of_close_fine_tunes_is_stationary(tmp_path: Path) -> None:
    """Six models within 0.6 degrees of each other, the same one twice."""
    base = normal(BLOCK + 100, 0)
    models = [base + normal(base.shape, k + 1, 0.01 * (k + 1)) for k in range(5)]
    models.append(models[0])
    share = weights(1.0, 2.0, 3.0, 1.0, 2.0, 5.0)
    got = merged(tmp_path, "karcher", None, models, share, tol=1e-13, max_iter=1000)
    mean, pull = got / np.linalg.norm(got), np.zeros_like(got)
    for model, weight in zip(models, share["weight"], strict=True):
        unit = model / np.linalg.norm(model)
        away = unit - (unit @ mean) * mean
        pull += weight / 14 * away * math.asin(np.linalg.norm(away)) / np.linalg.norm(away)
    assert np.linalg.norm(pull) <= 1e-10


def test_karcher_without_iterations_is_the_mean_of_the_directions(tmp_path: Path) -> None:
    got = merged(
        tmp_path, "karcher", None, [at(0, 2.0), at(90, 4.0)], weights(1.0, 3.0), max_iter=0
    )
    np.testing.assert_allclose(got, 3.5 * np.array([1.0, 3.0]) / math.sqrt(10), **EXACT)


def test_karcher_step_follows_the_mean_logarithm(tmp_path: Path) -> None:
    """One iteration, as defined: from m along T = sum of a (u - cos m) angle / sin(angle)."""
    models, shares = [normal(50, k) for k in range(3)], np.array([0.5, 0.3, 0.2])
    units = np.array([x / np.linalg.norm(x) for x in models])
    mean = shares @ units / np.linalg.norm(shares @ units)
    cosines = units @ mean
    pulls = shares * np.arccos(cosines) / np.sqrt(1 - cosines**2)
    step = pulls @ (units - np.outer(cosines, mean))
    size = np.linalg.norm(step)
    moved = math.cos(size) * mean + math.sin(size) * step / size
    want = moved * (shares @ [np.linalg.norm(x) for x in models])
    got = merged(tmp_path, "karcher", None, models, weights(*shares.tolist()), max_iter=1)
    np.testing.assert_allclose(got, want, **EXACT)


def test_karcher_counts_zero_tensors_in_the_norm_only(tmp_path: Path) -> None:
    got = merged(tmp_path, "karcher", None, [at(0, 2.0), [0.0, 0.0], at(90, 4.0)])
    np.testing.assert_allclose(got, at(45, 2.0), **EXACT)
    zeros = merged(tmp_path / "z", "karcher", None, [np.zeros(3)] * 2)
    np.testing.assert_array_equal(zeros, np.zeros(3))


def test_karcher_averages_tensors_too_short_for_a_direction(tmp_path: Path) -> None:
    short = [[1e-6, 0.0], [0.0, 1e-6]]
    got = merged(tmp_path, "karcher", None, short, weights(3.0, 1.0))
    np.testing.assert_allclose(got, [0.75e-6, 0.25e-6], rtol=1e-12)


@pytest.mark.parametrize("dtype", ["F64", "F32"])
def test_karcher_mean_of_opposite_models_has_the_firsts_direction(
    tmp_path: Path, dtype: str
) -> None:
    a = normal(500, 0)
    got = merged(tmp_path, "karcher", None, [a, -3 * a], dtype=dtype)
    np.testing.assert_allclose(got, 2 * a, rtol=1e-6)


# --- Model Stock --------------------------------------------------------------------------------


def stock(base: Array, experts: list[Array], clamp: bool) -> Array:
    """Model Stock of one vector; t = 0 where the formula divides by zero."""
    deltas = [x - base for x in experts]
    cosines = []
    for m, a in enumerate(deltas):
        for b in deltas[m + 1 :]:
            product = max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-6)
            cosines.append(min(1.0, max(-1.0, float(a @ b) / product)))
    cosine, count = np.mean(cosines), len(experts)
    divisor = 1 + (count - 1) * cosine
    t = count * cosine / divisor if abs(divisor) >= 1e-6 else 0.0
    t = min(1.0, max(0.0, t)) if clamp else t
    return np.asarray(t * np.mean(experts, axis=0) + (1 - t) * base)


def test_model_stock_of_two_by_hand(tmp_path: Path) -> None:
    """cos 0.6: t = 0.75 of the mean task vector (0.8, 0.4)."""
    got = merged(tmp_path, "model_stock", [1.0, 1.0], [[2.0, 1.0], [1.6, 1.8]])
    np.testing.assert_allclose(got, [1.6, 1.3], **EXACT)


@pytest.mark.parametrize("shape", [(), (9,), (40, 5), (6, 1), (3, 4, 5), (2, BLOCK + 7)])
@pytest.mark.parametrize("clamp", [True, False])
def test_model_stock_of_filters_takes_each_row_by_itself(
    tmp_path: Path, shape: tuple[int, ...], clamp: bool
) -> None:
    base = normal(shape, 0)
    experts = [base + normal(shape, k, 0.1) + 0.02 for k in (1, 2, 3)]
    got = merged(tmp_path, "model_stock", base, experts, filter_wise=True, clamp=clamp)
    width = shape[-1] if shape else 1
    rows = [x.reshape(-1, width) for x in (base, *experts)]
    want = np.array([stock(b, list(e), clamp) for b, *e in zip(*rows, strict=True)])
    np.testing.assert_allclose(got, want.reshape(shape), rtol=1e-8, atol=1e-8)


def test_model_stock_of_two_opposite_task_vectors_is_the_base(tmp_path: Path) -> None:
    """1 + cos = 0: no share of the mean is right, clamped or not."""
    base, delta = normal(64, 0), normal(64, 1)
    for clamp in (True, False):
        got = merged(tmp_path, "model_stock", base, [base + delta, base - delta], clamp=clamp)
        np.testing.assert_allclose(got, base, rtol=1e-12)


# --- NearSwap -----------------------------------------------------------------------------------


def test_nearswap_moves_at_most_t(tmp_path: Path) -> None:
    base, other = [1.0, 1.0, 1.0, 1.0], [1.05, 0.9, 1.005, 1.0]
    got = merged(tmp_path, "nearswap", base, [other], t=0.01)
    np.testing.assert_allclose(got, [1.01, 0.99, 1.005, 1.0], rtol=1e-15)


def test_nearswap_copies_what_it_reaches(tmp_path: Path) -> None:
    """Not base + (other - base), which is 0 here in float32."""
    base, other = [3e8, 1.0], [1.0, 3.0]
    got = merged(tmp_path, "nearswap", base, [other], dtype="F32", t=1e9)
    np.testing.assert_array_equal(got, other)


def test_nearswap_takes_small_differences_for_a_millionth(tmp_path: Path) -> None:
    """t is half of a millionth: half of smaller differences, t of larger ones; as mergekit."""
    base, change = np.ones(4), np.array([4e-7, -8e-7, 2e-6, -2e-6])
    got = merged(tmp_path, "nearswap", base, [base + change], t=5e-7)
    np.testing.assert_allclose(got - base, [2e-7, -4e-7, 5e-7, -5e-7], rtol=1e-8)


# --- Arcee Fusion -------------------------------------------------------------------------------


def fusion_takes(base: Array, other: Array) -> Array:
    """Which entries: |difference| times the row's divergence reaches median + 1.5 (q3 - q1)."""
    width = base.shape[-1] if base.ndim else 1
    x, b = other.reshape(-1, width), base.reshape(-1, width)
    p, q = (np.exp(v - v.max(axis=1, keepdims=True)) for v in (x, b))
    p, q = (v / v.sum(axis=1, keepdims=True) + 1e-8 for v in (p, q))
    scores = np.abs(x - b) * (p * np.log(p / q)).sum(axis=1, keepdims=True)
    ordered = np.sort(scores, axis=None)
    low, middle, high = (ordered[int(k * (base.size - 1))] for k in (0.25, 0.5, 0.75))
    return np.asarray(scores >= middle + 1.5 * (high - low)).reshape(base.shape)


@pytest.mark.parametrize("dtype", ["F64", "F32"])
@pytest.mark.parametrize(
    "shape", [(), (1,), (500,), (37, 53), (5, 6, 7), (700, 1), (300, 250), (3, BLOCK + 4465)]
)
def test_arcee_fusion_takes_exactly_the_important_entries(
    tmp_path: Path, shape: tuple[int, ...], dtype: str
) -> None:
    base = normal(shape, 0)
    kind = "<f4" if dtype == "F32" else "<f8"
    scale = np.linspace(0.1, 1.0, base.size).reshape(shape)
    other = (base + scale * normal(shape, 1)).astype(kind)
    base = base.astype(kind)
    got = merged(tmp_path, "arcee_fusion", base, [other], dtype=dtype)
    takes = fusion_takes(base.astype(float), other.astype(float))
    np.testing.assert_array_equal(got, np.where(takes, other, base))
    alike = base.size < 2 or shape[-1] < 2  # a row of one entry has one softmax
    assert takes.all() if alike else 0 < takes.sum() < base.size / 2


def test_arcee_fusion_where_nothing_is_more_important_takes_the_model(tmp_path: Path) -> None:
    """All scores are 0, and so is the threshold: constant rows have one softmax."""
    base, other = np.full((4, 8), 2.0), np.full((4, 8), 3.0)
    np.testing.assert_array_equal(merged(tmp_path, "arcee_fusion", base, [other]), other)


# --- all of them --------------------------------------------------------------------------------


EQUAL = [
    ("slerp", True, 1, {}, {"t": 0.3}),
    ("slerp", True, 1, {}, {"t": 0.3, "scope": "model"}),
    *(
        ("nuslerp", based, 2, weights(0.3, 0.4), how)
        for based in (True, False)
        for how in ({}, {"nuslerp_flatten": False},
                    {"nuslerp_flatten": False, "nuslerp_row_wise": True})
    ),
    ("multislerp", True, 3, weights(0.3, 0.4, 0.9), {}),
    ("multislerp", False, 3, weights(0.3, 0.4, 0.9), {}),
    ("karcher", False, 3, weights(0.3, 0.4, 0.9), {}),
    ("karcher", False, 3, {}, {"max_iter": 1000, "tol": 1e-13}),
    *(
        ("model_stock", True, 3, {}, {"filter_wise": rows, "average": average})
        for rows in (True, False)
        for average in ("cosine", "angle")
    ),
    ("nearswap", True, 1, {}, {"t": 0.001}),
    ("arcee_fusion", True, 1, {}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "based", "count", "own", "shared"), EQUAL)
def test_equal_models_are_merged_to_themselves(
    tmp_path: Path,
    method: str,
    based: bool,
    count: int,
    own: dict[str, list[Any]],
    shared: dict[str, Any],
) -> None:
    """To the bit in bfloat16 (zeros may lose their sign): small, large and subnormal entries."""
    rng = np.random.default_rng(0)
    drawn = (rng.standard_normal((200, 4)) * 2.0 ** np.array([-132, -20, 0, 100])).ravel()
    values = decode(encode(drawn, "BF16"), "BF16")
    tensors = {"vector": values, "matrix": values[:600].reshape(20, 30), "zero": np.zeros(5)}
    experts = {f"m{m}": {name: v[m] for name, v in own.items()} for m in range(count)}
    text = recipe(method, experts, shared, "base" if based else None)
    names = [*experts, *(["base"] if based else [])]
    got = merge(tmp_path, text, dict.fromkeys(names, tensors), "BF16")
    for name, values in tensors.items():
        np.testing.assert_array_equal(got[name], values)
