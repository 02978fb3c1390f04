"""Which entries of a task vector survive by chance: seeded, counter-based random masks (DARE)."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from mergelab.kernels import CHUNK, LANES, add_magnitudes, encode, kernel, lanes_total, task_vectors
from mergelab.methods.base import Array, Block, Settings, Stats, Sums
from mergelab.methods.consensus import combine, scale_each

RATIO_LIMIT = 1e-7  # below this an L1 norm is not divided by
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


def random_key(seed: int, model: str, tensor: str) -> tuple[int, int]:
    """Key and stream (64 bits each) of one model's tensor; nothing else enters them."""
    text = f"{seed}\0{model}\0{tensor}".encode()
    digest = hashlib.sha256(text).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


@kernel
def random_words(key: Any, stream: Any, start: int, count: int, out: Array) -> None:
    """Write the random words of elements [start, start + count) to out (uint32); start % 4 = 0.

    Element i takes word i % 4 of Philox4x32-10 (Salmon et al. 2011) with this 64-bit key and the
    counter (i // 4, stream), low words first: it depends on nothing else."""
    for step in range((count + 3) // 4):
        place = np.uint64(start // 4 + step)
        a, b = place & LOW, place >> HALF
        c, d = stream & LOW, stream >> HALF
        k, n = key & LOW, key >> HALF
        for _ in range(10):
            p, q = np.uint64(0xD2511F53) * a, np.uint64(0xCD9E8D57) * c
            a, b, c, d = (q >> HALF) ^ b ^ k, q & LOW, (p >> HALF) ^ d ^ n, p & LOW
            k, n = (k + np.uint64(0x9E3779B9)) & LOW, (n + np.uint64(0xBB67AE85)) & LOW
        out[4 * step] = a
        out[4 * step + 1] = b
        out[4 * step + 2] = c
        out[4 * step + 3] = d


def threshold(share: float) -> int:
    """Words below this number are kept: `share` of 2^32."""
    return int(min(1.0, max(0.0, share)) * 2**32)


@kernel
def keep_random(
    deltas: Array, keys: Array, limits: Array, start: int, count: int, words: Array
) -> None:
    """Zero the entries of each task vector whose random word is not below the model's limit."""
    for m in range(deltas.shape[0]):
        limit = limits[m]
        if limit < np.uint64(1 << 32):
            random_words(keys[m, 0], keys[m, 1], start, count, words)
            for i in range(count):
                if words[i] >= limit:
                    deltas[m, i] = 0


@kernel
def add_norms(
    values: Array, keys: Array, limits: Array, start: int, before: Array, after: Array, kind: Any
) -> None:
    """Add the L1 norms of the task vectors (N) before and after the random mask, in float64."""
    experts, size = values.shape[0] - 1, values.shape[1]
    base, deltas = np.empty(CHUNK, kind.dtype), np.empty((experts, CHUNK), kind.dtype)
    words = np.empty(CHUNK, np.uint32)
    lanes = np.zeros((2, experts, LANES))
    for at in range(0, size, CHUNK):
        count = min(CHUNK, size - at)
        task_vectors(values, at, count, base, deltas)
        for m in range(experts):
            add_magnitudes(deltas[m], count, lanes[0, m])
        keep_random(deltas, keys, limits, start + at, count, words)
        for m in range(experts):
            add_magnitudes(deltas[m], count, lanes[1, m])
    for m in range(experts):
        before[m] += lanes_total(lanes[0, m])
        after[m] += lanes_total(lanes[1, m])


def limits(settings: Settings) -> Array:
    """Per expert, the number below which a random word keeps its entry (N)."""
    return np.array([threshold(density) for density in settings.each("density")], np.uint64)


def begin_norms(settings: Settings, row: int) -> Sums:
    """Zero L1 norms; nothing to survey unless they are to be restored and something is dropped."""
    if settings.shared["rescale"] != "l1" or min(settings.each("density")) >= 1:
        return {}
    count = len(settings.experts)
    return {"before": np.zeros(count), "after": np.zeros(count)}


def measure_norms(block: Block, settings: Settings, stats: Stats, sums: Sums) -> None:
    """L1 norm of each task vector before and after the random mask."""
    add_norms(
        block.values,
        np.array(block.keys, np.uint64),
        limits(settings),
        block.start,
        sums["before"],
        sums["after"],
        block.numbers([]),
    )


def l1_ratios(sums: Sums, settings: Settings, stats: Stats) -> Stats:
    """Factor per expert that restores its task vector's L1 norm; 1 where a norm vanishes."""
    pairs = zip(sums["before"], sums["after"], strict=True)
    return {"factors": [float(b / a) if min(a, b) >= RATIO_LIMIT else 1.0 for b, a in pairs]}


def factors(settings: Settings, stats: Stats) -> list[float]:
    """Per expert, what its surviving entries are multiplied by."""
    if "factors" in stats:
        return list(stats["factors"])
    if settings.shared["rescale"] == "density":
        return [1 / density if density > 0 else 1.0 for density in settings.each("density")]
    return [1.0] * len(settings.experts)


@kernel
def merge_random(
    values: Array,
    keys: Array,
    limits: Array,
    start: int,
    factors: Array,
    votes: Array,
    weights: Array,
    shares: Array,
    plan: Array,
    out: Array,
) -> None:
    """Drop entries at random, multiply the rest by the model's factor, combine, add to the base."""
    experts, size = values.shape[0] - 1, values.shape[1]
    base, deltas = np.empty(CHUNK, weights.dtype), np.empty((experts, CHUNK), weights.dtype)
    scratch = np.empty((3, CHUNK), weights.dtype)
    words = np.empty(CHUNK, np.uint32)
    for at in range(0, size, CHUNK):
        count = min(CHUNK, size - at)
        task_vectors(values, at, count, base, deltas)
        keep_random(deltas, keys, limits, start + at, count, words)
        scale_each(deltas, factors, count)
        combine(deltas, votes, weights, shares, plan, count, base, scratch)
        encode(base, count, out, at)
