"""Merge maths against independent float64 definitions, hand-worked numbers and laws."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from checkpoints import bf16_bits, read_model, write_model
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from mergelab import engine, kernels, show
from mergelab.methods import METHODS, sparsify
from mergelab.methods.base import BLOCK, Block, Settings
from mergelab.methods.task_vectors import kept_count
from mergelab.plan import SHARD_SIZE, make_plan
from mergelab.recipe import load_recipe

ULP = 2.0**-23


def merge(
    place: Path, recipe: str, models: dict[str, np.ndarray], dtype: str = "F32", **how: int
) -> np.ndarray:
    """Merge one-tensor models through the real engine; the merged values, flat."""
    place.mkdir(exist_ok=True)
    folders = {
        name: write_model(place / name, {"w": values}, dtype, layers=0)
        for name, values in models.items()
    }
    path = place / "recipe.yaml"
    path.write_text(recipe)
    plan = make_plan(load_recipe(path), folders, shard_size=SHARD_SIZE)
    engine.merge(plan, place / "out", **how)
    return read_model(place / "out")["w"]


def recipe(method: str, experts: dict[str, str], base: str | None = "base", extra: str = "") -> str:
    models = "".join(f"- {{model: {n}, parameters: {{{p}}}}}\n" for n, p in experts.items())
    based = f"base_model: {base}\n" if base else ""
    return f"merge_method: {method}\ndtype: float32\n{based}{extra}models:\n{models}"


def three(size: int = 1000, seed: int = 0) -> dict[str, np.ndarray]:
    """A base and two experts, exactly representable in float32."""
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(size).astype("<f4")
    a, b = (base + rng.standard_normal(size).astype("<f4") / 8 for _ in range(2))
    return {"base": base, "a": a, "b": b}


def keep_mask(key: tuple[int, int], start: int, count: int, share: float) -> np.ndarray:
    """Bernoulli(share) mask of elements [start, start + count); start is a multiple of 4."""
    words = np.empty(-(-count // 4) * 4, np.uint32)
    sparsify.random_words(np.uint64(key[0]), np.uint64(key[1]), start, count, words)
    return words[:count] < np.uint64(sparsify.threshold(share))


WEIGHTS = {"a": "weight: 0.75", "b": "weight: 0.5"}
KEPT = {"a": "weight: 0.75, density: 0.3", "b": "weight: 0.5, density: 0.6"}


def test_linear_is_the_normalized_weighted_average(tmp_path: Path) -> None:
    models = three()
    got = merge(tmp_path, recipe("linear", WEIGHTS, base=None), {k: models[k] for k in "ab"})
    want = (0.75 * models["a"].astype(float) + 0.5 * models["b"]) / 1.25
    assert np.abs(got - want).max() <= 2 * ULP * np.abs(want).max()


def test_linear_without_normalize_is_the_weighted_sum(tmp_path: Path) -> None:
    models = three()
    text = recipe("linear", WEIGHTS, base=None, extra="parameters: {normalize: false}\n")
    got = merge(tmp_path, text, {k: models[k] for k in "ab"})
    want = 0.75 * models["a"].astype(float) + 0.5 * models["b"]
    assert np.abs(got - want).max() <= 2 * ULP * np.abs(want).max()


def test_linear_does_not_round_its_products(tmp_path: Path) -> None:
    """The product 2^-24 (1 - 2^-40) rounds the sum down; rounded itself, or the sum in float64
    first, it would make a tie."""
    a, b, weight = np.array([1 + ULP]), np.array([1 + 2.0**-20]), 2.0**-24 * (1 - 2.0**-20)
    text = recipe("linear", {"a": "weight: 1", "b": f"weight: {weight!r}"}, base=None)
    text += "parameters: {normalize: false}\n"
    assert merge(tmp_path, text, {"a": a, "b": b}) == 1 + ULP
    rounded = np.float32(a[0]) + np.float32(b[0]) * np.float32(weight)
    assert rounded == 1 + 2 * ULP


def test_float64_output_is_computed_in_float64(tmp_path: Path) -> None:
    models = three(100)
    text = recipe("linear", WEIGHTS, base=None).replace("float32", "float64")
    got = merge(tmp_path, text, {k: models[k] for k in "ab"})
    want = (0.75 * models["a"].astype(float) + 0.5 * models["b"]) / 1.25
    np.testing.assert_allclose(got, want, rtol=1e-15)


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
def test_slerp_on_unit_vectors_follows_the_great_circle(tmp_path: Path, t: float) -> None:
    angle = math.radians(70)
    a, b = np.array([1.0, 0.0]), np.array([math.cos(angle), math.sin(angle)])
    text = f"merge_method: slerp\nbase_model: base\ndtype: float32\nparameters: {{t: {t}}}\n"
    text += "models: [{model: base}, {model: a}]\n"
    got = merge(tmp_path, text, {"base": a, "a": b})
    np.testing.assert_allclose(got, [math.cos(t * angle), math.sin(t * angle)], atol=2 * ULP)


def test_slerp_of_nearly_parallel_tensors_is_linear(tmp_path: Path) -> None:
    base = np.random.default_rng(0).standard_normal(512).astype("<f4")
    other = base * np.float32(3)
    text = "merge_method: slerp\nbase_model: base\ndtype: float32\nparameters: {t: 0.25}\n"
    got = merge(
        tmp_path, text + "models: [{model: base}, {model: a}]\n", {"base": base, "a": other}
    )
    np.testing.assert_allclose(got, 1.5 * base, rtol=2 * ULP)


def test_slerp_of_a_zero_tensor_takes_a_right_angle(tmp_path: Path) -> None:
    text = "merge_method: slerp\nbase_model: base\ndtype: float32\nparameters: {t: 0.5}\n"
    models = {"base": np.array([1.0, 0.0]), "a": np.zeros(2)}
    got = merge(tmp_path, text + "models: [{model: base}, {model: a}]\n", models)
    np.testing.assert_allclose(got, [math.sqrt(0.5), 0], atol=2 * ULP)


def test_slerp_sums_over_more_than_one_block(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    a, b = (rng.standard_normal(2 * BLOCK + 17).astype("<f4") for _ in range(2))
    cosine = float(a.astype(float) @ b / np.linalg.norm(a.astype(float)) / np.linalg.norm(b))
    angle = math.acos(cosine)
    want = (math.sin(0.5 * angle) * (a.astype(float) + b)) / math.sin(angle)
    text = "merge_method: slerp\nbase_model: base\ndtype: float32\nparameters: {t: 0.5}\n"
    got = merge(tmp_path, text + "models: [{model: base}, {model: a}]\n", {"base": a, "a": b})
    assert np.abs(got - want).max() <= 4 * ULP * np.abs(want).max()


def test_task_arithmetic_adds_weighted_task_vectors(tmp_path: Path) -> None:
    models = three()
    text = recipe(
        "task_arithmetic",
        {"a": "weight: 0.75", "b": "weight: -0.5"},
        extra="parameters: {lambda: 0.5}\n",
    )
    base, a, b = (models[k].astype(float) for k in ("base", "a", "b"))
    want = base + 0.5 * (0.75 * (a - base) - 0.5 * (b - base))
    np.testing.assert_allclose(merge(tmp_path, text, models), want, atol=4 * ULP)


def test_weights_that_cancel_do_not_divide(tmp_path: Path) -> None:
    models = three()
    text = recipe(
        "task_arithmetic",
        {"a": "weight: 0.3", "b": "weight: -0.3"},
        extra="parameters: {normalize: true}\n",
    )
    base, a, b = (models[k].astype(float) for k in ("base", "a", "b"))
    want = base + 0.3 * (a - base) - 0.3 * (b - base)
    np.testing.assert_allclose(merge(tmp_path, text, models), want, atol=4 * ULP)


def ties_by_definition(
    models: dict[str, np.ndarray], weights: list[float], densities: list[float], normalize: bool
) -> np.ndarray:
    """TIES with mergekit's conventions, element by element in float64."""
    base = models["base"].astype(float)
    deltas = []
    for name, density in zip(("a", "b"), densities, strict=True):
        delta = (models[name] - models["base"]).astype(float)
        keep = max(1, int(density * delta.size))
        order = sorted(range(delta.size), key=lambda i: (-abs(delta[i]), i))
        kept = np.zeros_like(delta)
        kept[order[:keep]] = delta[order[:keep]]
        deltas.append(kept)
    out = base.copy()
    for i in range(base.size):
        votes = [w * d[i] for w, d in zip(weights, deltas, strict=True)]
        sign = 1 if sum(votes) >= 0 else -1
        agree = [(v, w) for v, w in zip(votes, weights, strict=True) if np.sign(v) == sign]
        share = sum(w for _, w in agree) if normalize else 1.0
        out[i] += sum(v for v, _ in agree) / (share or 1.0)
    return out


@pytest.mark.parametrize("normalize", [True, False])
def test_ties_equals_its_definition(tmp_path: Path, normalize: bool) -> None:
    models = three()
    text = recipe("ties", KEPT, extra=f"parameters: {{normalize: {str(normalize).lower()}}}\n")
    want = ties_by_definition(models, [0.75, 0.5], [0.3, 0.6], normalize)
    np.testing.assert_allclose(merge(tmp_path, text, models), want, atol=4 * ULP)


def test_ties_resolves_equal_magnitudes_by_lowest_index(tmp_path: Path) -> None:
    base = np.zeros(8, "<f4")
    expert = np.array([1, -2, 1, 1, -1, 1, 1, 1], "<f4")
    text = recipe("ties", {"a": "weight: 1, density: 0.5"})
    got = merge(tmp_path, text, {"base": base, "a": expert})
    np.testing.assert_array_equal(got, [1, -2, 1, 1, 0, 0, 0, 0])


def test_ties_ties_count_across_blocks(tmp_path: Path) -> None:
    size = 2 * BLOCK + 100
    base, expert = np.zeros(size, "<f4"), np.full(size, 0.5, "<f4")
    text = recipe("ties", {"a": "weight: 1, density: 0.75"})
    got = merge(tmp_path, text, {"base": base, "a": expert})
    keep = int(0.75 * size)
    assert np.array_equal(got, np.where(np.arange(size) < keep, 0.5, 0))


@given(
    st.lists(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5, 1e-40, -3e38, 2.0]), min_size=1, max_size=60
    ),
    st.floats(0, 1),
)
@budget(max_examples=200, deadline=None)
def test_trimming_keeps_exactly_the_largest_magnitudes(values: list[float], density: float) -> None:
    delta = np.array(values, "<f4")
    size = delta.size
    block = Block(np.stack([np.zeros_like(delta), delta]), True, 0, size)
    defaults = {p.name: p.default for p in METHODS["ties"].parameters if not p.per_model}
    chosen = Settings(defaults, ({"weight": 1.0, "density": density},))
    stats: dict[str, object] = {}
    for round in METHODS["ties"].rounds[:2]:
        if sums := round.begin(chosen, 1):
            round.measure(block, chosen, stats, sums)
            stats |= round.conclude(sums, chosen, stats)
    kept = np.empty_like(delta)
    METHODS["ties"].merge(block, chosen, stats, {"seen": np.zeros((1, 1), int)}, kept)
    count = kept_count(chosen, density, size)
    order = sorted(range(size), key=lambda i: (-abs(delta[i]), i))[:count]
    want = np.zeros_like(delta)
    want[order] = delta[order]
    np.testing.assert_array_equal(kept, want)


@pytest.mark.parametrize(
    ("flavour", "density", "size", "count"),
    [
        ("mergekit", 0.5, 9, 4),
        ("mergekit", 0.29, 100, 28),
        ("mergekit", 0.001, 10, 1),
        ("mergekit", 0.0, 10, 0),
        ("mergekit", 1.0, 7, 7),
        ("paper", 0.2, 1000, 201),
        ("peft", 0.001, 10, 0),
    ],
)
def test_kept_count_follows_the_flavour(
    flavour: str, density: float, size: int, count: int
) -> None:
    assert kept_count(Settings({"flavour": flavour}, ()), density, size) == count


@pytest.mark.parametrize(
    ("key", "stream", "start", "words"),
    [
        (0, 0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (0x299F31D0A4093822, 0x0370734413198A2E, 0x85A308D3243F6A88, None),
    ],
)
def test_the_random_words_are_those_of_philox(
    key: int, stream: int, start: int, words: tuple[int, ...] | None
) -> None:
    """The first vector of Random123's known answers; the second against plain Python."""
    out = np.empty(4, np.uint32)
    sparsify.random_words(np.uint64(key), np.uint64(stream), np.uint64(start * 4 % 2**64), 4, out)
    assert tuple(out) == (words or philox(start * 4 % 2**64 // 4, stream, key))


def philox(place: int, stream: int, key: int) -> tuple[int, ...]:
    """Philox4x32-10 as published (Salmon et al. 2011, section 4.3)."""
    low = 2**32 - 1
    a, b, c, d = place & low, place >> 32, stream & low, stream >> 32
    k, n = key & low, key >> 32
    for _ in range(10):
        p, q = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (q >> 32) ^ b ^ k, q & low, (p >> 32) ^ d ^ n, p & low
        k, n = (k + 0x9E3779B9) & low, (n + 0xBB67AE85) & low
    return a, b, c, d


def test_dare_keeps_its_density_and_its_l1_norm(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    base = np.zeros(100_000, "<f4")
    expert = rng.standard_normal(base.size).astype("<f4")
    text = recipe("dare_linear", {"a": "weight: 1, density: 0.3"})
    got = merge(tmp_path, text, {"base": base, "a": expert})
    kept = np.count_nonzero(got)
    assert abs(kept - 30_000) < 4 * math.sqrt(100_000 * 0.3 * 0.7)
    assert np.abs(got).sum() == pytest.approx(np.abs(expert).sum(dtype=float), rel=1e-6)
    factors = got[got != 0] / expert[got != 0]
    assert np.ptp(factors) < 1e-5


def test_dare_without_rescale_leaves_kept_entries_alone(tmp_path: Path) -> None:
    models = {"base": np.zeros(999, "<f4"), "a": np.arange(1, 1000, dtype="<f4")}
    text = recipe(
        "dare_linear", {"a": "weight: 1, density: 0.5"}, extra="parameters: {rescale: false}\n"
    )
    got = merge(tmp_path, text, models)
    assert set(got) <= {0.0, *models["a"].tolist()}
    assert 400 < np.count_nonzero(got) < 600


def test_dare_ties_equals_ties_of_its_masked_task_vectors(tmp_path: Path) -> None:
    models = three(5000)
    got = merge(tmp_path / "x", recipe("dare_ties", KEPT), models)
    masked = {"base": models["base"]}
    for name, density in (("a", 0.3), ("b", 0.6)):
        mask = keep_mask(sparsify.random_key(0, name, "w"), 0, 5000, density)
        delta = (models[name] - models["base"]).astype(float)
        factor = np.abs(delta).sum() / np.abs(delta * mask).sum()
        masked[name] = models["base"] + delta * mask * factor
    want = ties_by_definition(masked, [0.75, 0.5], [1.0, 1.0], normalize=False)
    np.testing.assert_allclose(got, want, atol=8 * ULP)


def test_masks_depend_on_seed_model_tensor_and_index_only() -> None:
    key = sparsify.random_key(0, "a", "w")
    whole = keep_mask(key, 0, 4096, 0.4)
    assert np.array_equal(whole[1000:3000], keep_mask(key, 1000, 2000, 0.4))
    keys = ((1, "a", "w"), (0, "b", "w"), (0, "a", "v"), (0, "a@v1", "w"))
    others = [sparsify.random_key(*k) for k in keys]
    assert all(np.mean(whole == keep_mask(k, 0, 4096, 0.4)) < 0.6 for k in others)


def test_order_of_models_does_not_change_a_dare_merge(tmp_path: Path) -> None:
    models = three(3000)
    one = merge(tmp_path / "one", recipe("dare_ties", KEPT), models)
    turned = recipe("dare_ties", dict(reversed(KEPT.items())))
    assert np.array_equal(one, merge(tmp_path / "two", turned, models))


def test_passthrough_copies_bits_and_scales(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal(300).astype("<f4")
    text = "merge_method: passthrough\nmodels: [{model: a}]\n"
    assert np.array_equal(merge(tmp_path / "x", text, {"a": values}), values)
    text = "merge_method: passthrough\nmodels: [{model: a, parameters: {scale: 0.5}}]\n"
    assert np.array_equal(merge(tmp_path / "y", text, {"a": values}), values * 0.5)


TASK_VECTOR = ["task_arithmetic", "ties", "dare_linear", "dare_ties"]


@pytest.mark.parametrize("method", TASK_VECTOR)
def test_lambda_zero_gives_the_base(tmp_path: Path, method: str) -> None:
    models = three()
    got = merge(tmp_path, recipe(method, WEIGHTS, extra="parameters: {lambda: 0}\n"), models)
    assert np.array_equal(got, models["base"])


@pytest.mark.parametrize("method", [*TASK_VECTOR, "slerp"])
def test_models_equal_to_the_base_give_the_base(tmp_path: Path, method: str) -> None:
    base = three()["base"]
    if method == "slerp":
        text = "merge_method: slerp\nbase_model: base\ndtype: float32\nparameters: {t: 0.5}\n"
        text += "models: [{model: base}, {model: a}]\n"
    else:
        text = recipe(method, WEIGHTS)
    got = merge(tmp_path, text, {"base": base, "a": base, "b": base})
    assert np.array_equal(got, base)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties"])
def test_density_zero_gives_the_base(tmp_path: Path, method: str) -> None:
    models = three()
    got = merge(tmp_path, recipe(method, {"a": "weight: 1, density: 0"}), models)
    assert np.array_equal(got, models["base"])


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_says_what_it_is(method: str) -> None:
    declared = METHODS[method]
    assert declared.name == method
    assert declared.summary.endswith(".")
    assert all(p.help for p in declared.parameters)
    assert declared.papers


def test_explain_tells_bounds_and_choices(capsys: pytest.CaptureFixture[str]) -> None:
    show.methods([METHODS["karcher"], METHODS["ties"]], full=True)
    text = " ".join(capsys.readouterr().out.split())
    assert "share of this model (0 or more)" in text
    assert "share of its task vector kept (0 to 1)" in text
    assert "(mergekit | paper | peft)" in text


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F64"])
def test_float_formats_are_read_exactly_and_rounded_once(tmp_path: Path, dtype: str) -> None:
    models = three(500)
    text = recipe("linear", {"a": "weight: 0.25", "b": "weight: 0.75"}, base=None)
    text = text.replace("dtype: float32\n", "")
    stored = {k: models[k] for k in "ab"}
    got = merge(tmp_path, text, stored, dtype)
    from checkpoints import decode, encode

    a, b = (decode(encode(stored[k], dtype), dtype) for k in "ab")
    want = 0.25 * a + 0.75 * b
    exact = decode(encode(want, dtype), dtype)
    step = {"F16": 2.0**-10, "BF16": 2.0**-7, "F64": 2.0**-52}[dtype]
    assert np.mean(got == exact) > 0.99
    assert np.all(np.abs(got - want) <= step * np.abs(want) + 1e-7 * (dtype != "F64"))


def test_kernels_read_and_round_like_their_plain_python() -> None:
    values = np.array([[0x3F80, 0xC040, 0x7F80, 0x0001]], np.uint16)
    plain, compiled = np.empty(4, np.float32), np.empty((2, 4), np.float32)
    kernels.decode(values, 0, 0, 4, plain)
    kernels.task_vectors(np.concatenate([0 * values, values]), 0, 4, compiled[0], compiled[1:])
    assert np.array_equal(plain, compiled[1])
    numbers = np.array([1 + 2.0**-8, 1 + 2.0**-8 + 2.0**-20, 3e38, np.nan], np.float32)
    bits = np.empty(4, np.uint16)
    kernels.encode(numbers, 4, bits, 0)
    assert list(bits[:3]) == list(bf16_bits(numbers[:3]))
    assert bits[3] & 0x7FFF > 0x7F80
