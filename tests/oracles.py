"""What every merge method must give: short definitions in numpy, written apart from mergelab.

Legend: N models, arrays of any one shape (*s). Everything is computed in the dtype of the arrays
(float32 or float64), in the order of the formula; sums over a tensor's elements are float64. Where
magnitudes are equal, the lower flat index counts as the larger one. Sources: the papers named
in each docstring, and mergekit 0.1.5 where the two disagree."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Arrays = Sequence[Array]
LOW, HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def dot(a: Array, b: Array) -> float:
    """Sum of a * b over all elements, in float64."""
    return float(np.sum(a.astype(float) * b.astype(float)))


def length(a: Array) -> float:
    """Euclidean norm, in float64."""
    return math.sqrt(dot(a, a))


# --- averages -----------------------------------------------------------------------------------


def linear(models: Arrays, weights: Sequence[float], normalize: bool = True) -> Array:
    """sum(w x) / sum(w): the uniform or weighted soup (Wortsman et al. 2022)."""
    total = sum_of(models, weights)
    return total / total.dtype.type(sum(weights)) if normalize else total


def sum_of(arrays: Arrays, weights: Sequence[float]) -> Array:
    """sum(w x), in order."""
    result = np.zeros_like(arrays[0])
    for array, weight in zip(arrays, weights, strict=True):
        result = result + array * array.dtype.type(weight)
    return result


def slerp(base: Array, other: Array, t: float, whole: tuple[Array, Array] | None = None) -> Array:
    """The great circle from base to other (Shoemake 1985), straight where |cos| > 0.9995.

    whole: the two flattened models that the angle is taken from (scope: model), else the tensors'.
    A norm of at most 1e-8 is not divided by."""
    a, b = whole or (base, other)
    cosine = dot(a, b)
    for norm in (length(a), length(b)):
        cosine /= norm if norm > 1e-8 else 1.0
    cosine = min(1.0, max(-1.0, cosine))
    p, q = 1 - t, t
    if abs(cosine) <= 0.9995:
        p, q = arc(math.acos(cosine), t)
    return base * base.dtype.type(p) + other * other.dtype.type(q)


def arc(angle: float, t: float) -> tuple[float, float]:
    """SLERP's factors of the first and of the second vector."""
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def nuslerp(
    a: Array,
    b: Array,
    weights: Sequence[float],
    base: Array | None = None,
    flatten: bool = True,
    row_wise: bool = False,
) -> Array:
    """SLERP with t = w_b / (w_a + w_b), of task vectors if there is a base; never straightened.

    flatten: over the whole tensor, else per vector along the last axis, or the first (row_wise)."""
    if base is not None:
        return base + nuslerp(a - base, b - base, weights, None, flatten, row_wise)
    t = 0.5 if abs(sum(weights)) < 1e-6 else weights[1] / sum(weights)
    if flatten or a.ndim < 2:
        return nuslerp_vector(a, b, t)
    axis = 0 if row_wise else -1
    rows_a, rows_b = (np.moveaxis(x, axis, -1) for x in (a, b))
    out = np.empty_like(rows_a)
    for i in np.ndindex(rows_a.shape[:-1]):
        out[i] = nuslerp_vector(rows_a[i], rows_b[i], t)
    return np.moveaxis(out, -1, axis)


def nuslerp_vector(a: Array, b: Array, t: float) -> Array:
    """One pair of vectors; a line only if they are parallel to within 1e-16 of sin^2."""
    cosine = dot(a, b) / max(length(a), 1e-7) / max(length(b), 1e-7)
    cosine = min(1.0, max(-1.0, cosine))
    p, q = (1 - t, t) if 1 - cosine**2 <= 1e-16 else arc(math.acos(cosine), t)
    return a * a.dtype.type(p) + b * b.dtype.type(q)


def multislerp(
    models: Arrays,
    weights: Sequence[float],
    base: Array | None = None,
    normalize_weights: bool = True,
    eps: float = 1e-8,
) -> Array:
    """normalise(sum of w x/|x|) * sum of w |x|: the closed form of mergekit's tangent-space mean.

    Of task vectors if there is a base. Two directions that cancel, and zeros, are averaged."""
    if len(models) == 1:
        return models[0]
    if base is not None:
        parts = [x - base for x in models]
        return base + multislerp(parts, weights, None, normalize_weights, eps)
    share = sum(weights) if normalize_weights else 1.0
    weights = [w / share for w in weights]
    norms = [length(x) for x in models]
    pairs = list(zip(weights, models, norms, strict=True))
    mean = sum((w / (n + eps) * x.astype(float) for w, x, n in pairs), np.zeros(models[0].shape))
    if length(mean) < eps:
        assert len(models) == 2 or not any(norms), "the directions of three or more models cancel"
        return sum_of(models, weights)
    scale = sum(w * n for w, _, n in pairs) / length(mean)
    return (scale * mean).astype(models[0].dtype)


def karcher(
    models: Arrays, weights: Sequence[float] | None = None, max_iter: int = 10, tol: float = 1e-5
) -> Array:
    """Riemannian (Karcher) mean of the directions, times the mean norm (arXiv 2603.04972).

    weights: 1 each by default, divided by their sum. Models of norm <= tol have no direction."""
    if len(models) == 1:
        return models[0]
    shares = np.array(weights or [1.0] * len(models))
    shares /= shares.sum()
    norms = [length(x) for x in models]
    some = [i for i, norm in enumerate(norms) if norm > tol]
    if not some:
        return np.zeros_like(models[0])
    units = [models[i].astype(float) / norms[i] for i in some]
    alphas = shares[some] / shares[some].sum()
    mean = sum((a * u for a, u in zip(alphas, units, strict=True)), np.zeros(models[0].shape))
    mean = units[0] if length(mean) < tol else mean / length(mean)
    for _ in range(max_iter):
        step = sum((a * log_map(mean, u, tol) for a, u in zip(alphas, units, strict=True)))
        size = length(step)
        if size < tol:
            break
        mean = math.cos(size) * mean + math.sin(size) * step / size
        mean /= length(mean)
    return (float(np.dot(shares, norms)) * mean).astype(models[0].dtype)


def log_map(mean: Array, unit: Array, tol: float = 0.0) -> Array:
    """Tangent vector at `mean` that points to `unit`, as long as the angle; 0 below tol."""
    cosine = min(1.0, max(-1.0, dot(mean, unit)))
    angle = math.acos(cosine)
    if angle <= tol or math.sin(angle) == 0:
        return np.zeros_like(mean)
    return angle / math.sin(angle) * (unit - cosine * mean)


def passthrough(model: Array, scale: float = 1.0) -> Array:
    """The tensor, scaled."""
    return model * model.dtype.type(scale)


# --- merging task vectors -----------------------------------------------------------------------


def add(
    base: Array, deltas: Arrays, weights: Sequence[float], normalize: bool, lam: float
) -> Array:
    """base + lambda sum(w tau), divided by sum(w) unless that is 0 (Ilharco et al. 2023)."""
    merged = sum_of(deltas, weights)
    if normalize and abs(sum(weights)) >= 1e-8:
        merged = merged / merged.dtype.type(sum(weights))
    return base + merged * merged.dtype.type(lam)


def vote(
    base: Array, deltas: Arrays, weights: Sequence[float], normalize: bool, lam: float
) -> Array:
    """Elect the sign of sum(w tau) per entry, 0 elects plus, and merge the entries that agree.

    As mergekit does it: weights enter the vote; normalize divides by the weights that agree."""
    parts = [d * d.dtype.type(w) for d, w in zip(deltas, weights, strict=True)]
    sign = np.where(sum_of(parts, [1.0] * len(parts)) >= 0, 1, -1)
    agree = [np.sign(part) == sign for part in parts]
    merged = sum_of([np.where(a, p, p.dtype.type(0)) for a, p in zip(agree, parts, strict=True)],
                    [1.0] * len(parts))  # fmt: skip
    share = sum_of([a.astype(base.dtype) for a in agree], weights)
    if normalize:
        merged = merged / np.where(share == 0, 1, share).astype(base.dtype)
    return base + merged * merged.dtype.type(lam)


def vote_unweighted(
    base: Array,
    deltas: Arrays,
    weights: Sequence[float],
    shares: Sequence[float],
    normalize: bool,
    lam: float,
    *,
    majority: bool,
) -> Array:
    """Elect the sign of sum(tau), then merge w tau of those that agree, divided by their shares.

    A sum of 0 elects plus (peft), or if `majority` the sign that most sums have; minus if none."""
    total = sum_of(deltas, [1.0] * len(deltas))
    most = np.sign(np.sum(np.sign(total), dtype=float)) or -1.0
    sign = np.where(total == 0, most if majority else 1.0, np.sign(total))
    agree = [np.sign(d) == sign for d in deltas]
    kept = [np.where(a, d, d.dtype.type(0)) for a, d in zip(agree, deltas, strict=True)]
    merged = sum_of(kept, weights)
    share = sum_of([a.astype(base.dtype) for a in agree], shares)
    if normalize:
        merged = merged / np.where(share == 0, 1, share).astype(base.dtype)
    return base + merged * merged.dtype.type(lam)


def task_arithmetic(
    base: Array,
    models: Arrays,
    weights: Sequence[float],
    normalize: bool = False,
    lam: float = 1.0,
) -> Array:
    """base + lambda sum(w tau)."""
    return add(base, [x - base for x in models], weights, normalize, lam)


# --- trimming -----------------------------------------------------------------------------------


def descending(values: Array) -> Array:
    """Flat indices from the largest magnitude, as float32, to the smallest; equal ones by index."""
    return np.argsort(-np.abs(values).astype(np.float32).ravel(), kind="stable")


def only(values: Array, kept: Array) -> Array:
    """The entries at flat indices `kept`, 0 elsewhere."""
    out = np.zeros(values.size, values.dtype)
    out[kept] = values.ravel()[kept]
    return out.reshape(values.shape)


def trim(delta: Array, density: float, at_least: int = 1) -> Array:
    """The int(density n) largest magnitudes: mergekit keeps at least one (at_least 0: peft)."""
    if density >= 1:
        return delta
    count = max(at_least, int(density * delta.size)) if density > 0 else 0
    return only(delta, descending(delta)[:count])


def trim_paper(delta: Array, density: float) -> Array:
    """Everything at or above the (n - int(density n))-th smallest magnitude: one more than asked.

    The authors' code fails at density 1; here that keeps all."""
    drop = delta.size - int(density * delta.size)
    if drop == 0:
        return delta
    sizes = np.abs(delta).astype(np.float32)
    return np.where(sizes >= np.sort(sizes, axis=None)[drop - 1], delta, delta.dtype.type(0))


def restored(delta: Array, kept: Array) -> Array:
    """`kept`, scaled to the L1 norm of `delta`; as it is if either norm is below 1e-7."""
    before, after = (float(np.sum(np.abs(x), dtype=float)) for x in (delta, kept))
    return kept * kept.dtype.type(before / after) if min(before, after) >= 1e-7 else kept


def ties(
    base: Array,
    models: Arrays,
    weights: Sequence[float],
    densities: Sequence[float],
    flavour: str = "mergekit",
    rescale: bool = False,
    normalize: bool = True,
    lam: float = 1.0,
) -> Array:
    """Trim, elect sign, merge (Yadav et al. 2023), on one vector: a tensor or a flattened model."""
    ways = {"mergekit": trim, "paper": trim_paper, "peft": lambda d, k: trim(d, k, 0)}
    deltas = [x - base for x in models]
    kept = [ways[flavour](d, k) for d, k in zip(deltas, densities, strict=True)]
    if rescale:
        kept = [restored(d, k) for d, k in zip(deltas, kept, strict=True)]
    if flavour == "mergekit":
        return vote(base, kept, weights, normalize, lam)
    paper = flavour == "paper"  # the authors have no weights: 1 each
    shares = weights if paper else [1.0] * len(kept)
    return vote_unweighted(base, kept, weights, shares, normalize, lam, majority=paper)


def without_outliers(delta: Array, density: float, gamma: float) -> Array:
    """Drop the int(gamma n) largest magnitudes, keep the next int(density n), as mergekit does.

    Where fewer are left than asked for, fewer outliers are dropped."""
    if density >= 1:
        return delta
    count = int(density * delta.size)
    first = min(int(gamma * delta.size), delta.size - count)
    return only(delta, descending(delta)[first : first + count])


def without_outliers_by_row(delta: Array, density: float, gamma: float) -> Array:
    """The same in each row of the last axis, as the authors do: outliers are always dropped."""
    rows = as_rows(delta)
    size = rows.shape[1]
    first, count = int(gamma * size), int(density * size)
    kept = [only(row, descending(row)[first : first + count]) for row in rows]
    return np.array(kept, delta.dtype).reshape(delta.shape)


def breadcrumbs(
    base: Array,
    models: Arrays,
    weights: Sequence[float],
    densities: Sequence[float],
    gammas: Sequence[float],
    granularity: str = "tensor",
    rescale: bool = False,
    consensus: bool = False,
    normalize: bool = False,
    lam: float = 1.0,
) -> Array:
    """Model Breadcrumbs (Davari and Belilovsky 2023). consensus: merged as TIES does."""
    window = without_outliers_by_row if granularity == "row" else without_outliers
    deltas = [x - base for x in models]
    kept = [window(d, k, g) for d, k, g in zip(deltas, densities, gammas, strict=True)]
    if rescale:
        kept = [restored(d, k) for d, k in zip(deltas, kept, strict=True)]
    merge = vote if consensus else add
    return merge(base, kept, weights, normalize, lam)


def as_rows(values: Array) -> Array:
    """(rows, entries of the last axis)."""
    width = values.shape[-1] if values.ndim else 1
    return values.reshape(values.size // max(width, 1), width)


# --- random drops: the masks are given ----------------------------------------------------------


def random_words(seed: int, model: str, tensor: str, size: int) -> Array:
    """32 random bits per element: Philox4x32-10 (Salmon et al. 2011), by its paper.

    Key and the counter's upper half are 8 bytes each of sha256("seed NUL model NUL tensor");
    element i is word i % 4 of counter i // 4."""
    digest = hashlib.sha256(f"{seed}\0{model}\0{tensor}".encode()).digest()
    key, stream = (int.from_bytes(digest[i : i + 8], "little") for i in (0, 8))
    steps = np.arange((size + 3) // 4, dtype=np.uint64)
    counter = [steps & LOW, steps >> HALF, stream & int(LOW), stream >> 32]
    words = philox([np.broadcast_to(np.uint64(c), steps.shape) for c in counter], key)
    return np.stack(words, axis=1).ravel()[:size]


def philox(counter: list[Array], key: int) -> list[Array]:
    """Ten rounds on four words of 32 bits, each held in uint64."""
    a, b, c, d = counter
    for step in range(10):
        low = np.uint64((key + step * 0x9E3779B9) & 0xFFFFFFFF)
        high = np.uint64(((key >> 32) + step * 0xBB67AE85) & 0xFFFFFFFF)
        p, q = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b, c, d = (q >> HALF) ^ b ^ low, q & LOW, (p >> HALF) ^ d ^ high, p & LOW
    return [a, b, c, d]


def rescaled(delta: Array, mask: Array, rescale: str, chance: Array | float) -> Array:
    """delta where the mask is set, rescaled by `l1`: ratio of the L1 norms before and after,
    `density` or `probability`: 1 / chance of the entry, or `none`."""
    kept = np.where(mask, delta, delta.dtype.type(0))
    if rescale == "l1":
        return restored(delta, kept)
    if rescale in ("density", "probability"):
        chances = np.broadcast_to(chance, delta.shape)
        factor = np.divide(1, chances, out=np.zeros(delta.shape), where=chances > 0)
        return kept * factor.astype(delta.dtype)
    return kept


def dare(
    base: Array,
    models: Arrays,
    weights: Sequence[float],
    densities: Sequence[float],
    masks: Arrays,
    rescale: str = "l1",
    consensus: bool = False,
    normalize: bool = False,
    lam: float = 1.0,
) -> Array:
    """DARE (Yu et al. 2024): drop at random, rescale. consensus: merged as TIES does."""
    triples = zip(models, masks, densities, strict=True)
    deltas = [rescaled(x - base, mask, rescale if k < 1 else "none", k) for x, mask, k in triples]
    merge = vote if consensus else add
    return merge(base, deltas, weights, normalize, lam)


def della_chances(delta: Array, density: float, epsilon: float) -> Array:
    """Chance to be kept: density - epsilon for the smallest magnitude of a row (last axis) to
    density + epsilon for the largest, linear in rank; `density` in rows of one entry (float64)."""
    if density >= 1 or density <= 0:
        return np.full(delta.shape, float(density))
    width = delta.shape[-1] if delta.ndim else 1
    rows = delta.reshape(-1, width) if delta.size else delta.reshape(0, max(width, 1))
    out = np.full(rows.shape, float(density))
    for row, values in zip(out, rows, strict=True):
        if width > 1:
            rank = np.empty(width)
            rank[descending(values)[::-1]] = np.arange(width)
            row[:] = density - epsilon + 2 * epsilon * rank / (width - 1)
    return out.reshape(delta.shape)


def della(
    base: Array,
    models: Arrays,
    weights: Sequence[float],
    densities: Sequence[float],
    epsilons: Sequence[float],
    masks: Arrays,
    rescale: str = "l1",
    consensus: bool = True,
    normalize: bool = True,
    lam: float = 1.0,
) -> Array:
    """DELLA (Deep et al. 2024): drop small magnitudes more often. consensus False: della_linear."""
    deltas = []
    for x, density, epsilon, mask in zip(models, densities, epsilons, masks, strict=True):
        delta = x - base
        chances = della_chances(delta, density, epsilon)
        deltas.append(rescaled(delta, mask, rescale if density < 1 else "none", chances))
    merge = vote if consensus else add
    return merge(base, deltas, weights, normalize, lam)


# --- statistics of the task vectors decide ------------------------------------------------------


def sce(base: Array, models: Arrays, select_topk: float = 1.0, select: str = "deltas") -> Array:
    """SCE (Wan et al. 2024): select by variance, calculate weights, erase minority signs.

    select: `weights` masks the task vectors for the weights only, as the authors do; `deltas`
    masks what is merged too and takes equal weights if their sum is below 1e-6, as mergekit."""
    deltas = np.array([x - base for x in models])
    masked = deltas
    if select_topk < 1:
        variance = np.mean((deltas - deltas.mean(axis=0)) ** 2, axis=0)
        count = int(np.count_nonzero(variance) * select_topk)
        chosen = only(np.ones_like(variance), descending(variance)[:count])
        masked = deltas * chosen
    squares = [dot(d, d) / max(d.size, 1) for d in masked]
    limit = 1e-6 if select == "deltas" else 0.0
    even = sum(squares) == 0 or sum(squares) < limit
    weights = [1 / len(models) if even else s / sum(squares) for s in squares]
    merged = masked if select == "deltas" else deltas
    sign = np.where(sum_of(merged, [1.0] * len(merged)) >= 0, 1, -1)
    share = [
        (np.sign(d) == sign) * base.dtype.type(w) for d, w in zip(merged, weights, strict=True)
    ]
    total, divisor = np.sum(merged * np.array(share), axis=0), np.sum(share, axis=0)
    floor = 1e-6 if select == "deltas" else np.finfo(base.dtype).tiny
    return base + (total / np.maximum(divisor, base.dtype.type(floor))).astype(base.dtype)


def ram(base: Array, models: Arrays, epsilon: float = 1e-5, r: float = 0.0, alpha: float = 0.0
) -> Array:  # fmt: skip
    """RAM, or RAM+ with r and alpha (arXiv 2601.13572), per tensor as mergekit does.

    Entries above epsilon in one model are added times 1 + r min(shared / unique, alpha), those of
    several averaged over these."""
    deltas = [x - base for x in models]
    active = np.array([np.abs(d) > epsilon for d in deltas])
    touched = active.sum(axis=0)
    merged = np.zeros_like(base)
    for delta, own in zip(deltas, active, strict=True):
        shared = np.count_nonzero(own & (touched > 1))
        unique = np.count_nonzero(own & (touched == 1))
        boost = 1 + r * min(shared / max(unique, epsilon), alpha)
        factor = np.where(touched > 1, 1 / np.maximum(touched, 1), boost).astype(base.dtype)
        merged = merged + np.where(own, delta * factor, base.dtype.type(0))
    return base + merged


def model_stock(
    base: Array,
    models: Arrays,
    clamp: bool = True,
    average: str = "cosine",
    filter_wise: bool = False,
) -> Array:
    """Model Stock (Jang et al. 2024): t mean + (1 - t) base, t = N c / (1 + (N - 1) c).

    c: mean cosine over the pairs of task vectors, or the cosine of their mean angle; per row of
    the last axis if filter_wise. clamp: t within 0 to 1."""
    if filter_wise and base.ndim > 1:
        triples = zip(as_rows(base), *(as_rows(x) for x in models), strict=True)
        rows = [model_stock(b, xs, clamp, average) for b, *xs in triples]
        return np.array(rows, base.dtype).reshape(base.shape)
    deltas, count = [x - base for x in models], len(models)
    pairs = [(deltas[i], deltas[j]) for i in range(count) for j in range(i + 1, count)]
    cosines = [dot(a, b) / max(length(a) * length(b), 1e-6) for a, b in pairs]
    cosines = np.clip(cosines, -1, 1)
    c = float(np.mean(cosines) if average == "cosine" else np.cos(np.mean(np.arccos(cosines))))
    divisor = 1 + (count - 1) * c
    t = count * c / divisor if abs(divisor) >= 1e-6 else 0.0
    t = min(1.0, max(0.0, t)) if clamp else t
    mean = sum_of(models, [1.0] * count) / base.dtype.type(count)
    return mean * base.dtype.type(t) + base * base.dtype.type(1 - t)


def nearswap(base: Array, other: Array, t: float) -> Array:
    """base moved towards other by at most t per entry."""
    return base + np.clip(other - base, -base.dtype.type(t), base.dtype.type(t))


def arcee_fusion(base: Array, other: Array) -> Array:
    """other where its importance reaches median + 1.5 (q3 - q1) of the tensor, else base.

    importance: |other - base| times KL(softmax(other) || softmax(base)) per row of the last axis;
    quantile q is the sorted entry int(q (n - 1)). Exact, never sampled."""
    if base.size == 0:
        return base
    x, b = as_rows(other).astype(float), as_rows(base).astype(float)
    p, q = softmax(x) + 1e-8, softmax(b) + 1e-8
    divergence = np.maximum(np.sum(p * np.log(p / q), axis=-1, keepdims=True), 0)
    importance = np.abs(x - b) * divergence
    ordered = np.sort(importance, axis=None)
    low, middle, high = (ordered[k * (base.size - 1) // 4] for k in (1, 2, 3))
    take = (importance >= middle + 1.5 * (high - low)).reshape(base.shape)
    return np.where(take, base + (other - base), base)


def softmax(rows: Array) -> Array:
    """Softmax of each row."""
    powers = np.exp(rows - rows.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)
