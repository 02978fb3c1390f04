"""Which entries of a task vector survive: exact top-k by magnitude, and seeded random masks."""

from __future__ import annotations

import hashlib

import numpy as np

from mergelab.methods.base import Array, Block, Settings, Stats, Sums, total

HALF = 1 << 16
RATIO_LIMIT = 1e-7  # below this an L1 norm is not divided by


def random_key(seed: int, model: str, tensor: str) -> int:
    """128-bit key of the random stream of one model's tensor; nothing else enters it."""
    text = f"{seed}\0{model}\0{tensor}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:16], "little")


def keep_mask(key: int, start: int, count: int, density: float) -> Array:
    """Bernoulli(density) mask for elements [start, start + count) of a tensor.

    Element i takes 32-bit word i of the Philox4x64-10 stream of `key` (Salmon et al. 2011), so the
    mask depends on neither blocks, order, threads nor other tensors. `start` must be a multiple
    of 8, the words of one Philox counter step."""
    if start % 8:
        raise ValueError(f"start {start} is not a multiple of 8")
    stream = np.random.Philox(key=key).advance(start // 8)
    words = stream.random_raw((count + 1) // 2).view("<u4")[:count]
    kept: Array = words < np.uint64(min(1.0, max(0.0, density)) * 2**32)
    return kept


def dropped(block: Block, settings: Settings) -> list[Array]:
    """Task vectors with the entries outside each expert's random mask set to zero."""
    out = []
    densities = settings.each("density")
    for delta, key, density in zip(block.deltas, block.keys, densities, strict=True):
        if density < 1:
            delta = np.where(
                keep_mask(key, block.start, delta.size, density), delta, delta.dtype.type(0)
            )
        out.append(delta)
    return out


def measure_l1(block: Block, settings: Settings, stats: Stats) -> Sums:
    """L1 norm of each task vector before and after the random mask, (N) each, in float64."""
    return {
        "before": np.array([total(np.abs(d)) for d in block.deltas]),
        "after": np.array([total(np.abs(d)) for d in dropped(block, settings)]),
    }


def l1_ratios(sums: Sums, settings: Settings, stats: Stats) -> Stats:
    """Factor per expert that restores its task vector's L1 norm; 1 where a norm vanishes."""
    if not settings.shared["rescale"]:
        return {"factors": [1.0] * len(settings.experts)}
    pairs = zip(sums["before"], sums["after"], strict=True)
    return {"factors": [float(b / a) if min(a, b) >= RATIO_LIMIT else 1.0 for b, a in pairs]}


def magnitude_bits(delta: Array) -> Array:
    """|x| as an integer of the same order: the float32 bit pattern without its sign (S)."""
    bits: Array = np.ascontiguousarray(delta, "<f4").view("<u4") & np.uint32(0x7FFFFFFF)
    return bits


def kept_count(density: float, size: int) -> int:
    """How many of `size` entries magnitude trimming keeps: all, none, or int(density * size)."""
    if density >= 1:
        return size
    return max(1, int(density * size)) if density > 0 else 0


def measure_high(block: Block, settings: Settings, stats: Stats) -> Sums:
    """Histogram (N, 65536) of the upper halves of the magnitudes' bits."""
    counts = [np.bincount(magnitude_bits(d) >> 16, minlength=HALF) for d in block.deltas]
    return {"high": np.array(counts), "size": np.array(block.base.size)}  # type: ignore[union-attr]


def conclude_high(sums: Sums, settings: Settings, stats: Stats) -> Stats:
    """Per expert: upper half of the k-th largest magnitude, and how many of its bucket stay."""
    size = int(sums["size"])
    found = [
        _kth(counts, kept_count(density, size))
        for counts, density in zip(sums["high"], settings.each("density"), strict=True)
    ]
    return {"high": [bucket for bucket, _ in found], "rest": [rest for _, rest in found]}


def measure_low(block: Block, settings: Settings, stats: Stats) -> Sums:
    """Histogram (N, 65536) of the lower halves within each expert's bucket."""
    counts = []
    for delta, bucket in zip(block.deltas, stats["high"], strict=True):
        bits = magnitude_bits(delta)
        inside = bits[(bits >> 16) == bucket] & np.uint32(HALF - 1)
        counts.append(np.bincount(inside, minlength=HALF))
    return {"low": np.array(counts)}


def conclude_low(sums: Sums, settings: Settings, stats: Stats) -> Stats:
    """The exact k-th magnitude as bits, and how many entries equal to it are kept, per expert."""
    found = [_kth(counts, rest) for counts, rest in zip(sums["low"], stats["rest"], strict=True)]
    bits = [(high << 16) + low for high, (low, _) in zip(stats["high"], found, strict=True)]
    return {"threshold": bits, "equal": [rest for _, rest in found]}


def measure_equal(block: Block, settings: Settings, stats: Stats) -> Sums:
    """How many magnitudes equal the threshold, per expert (N)."""
    pairs = zip(block.deltas, stats["threshold"], strict=True)
    return {"equal": np.array([np.count_nonzero(magnitude_bits(d) == t) for d, t in pairs])}


def trimmed(block: Block, settings: Settings, stats: Stats, before: Sums) -> list[Array]:
    """Task vectors with all but their k largest magnitudes zeroed; ties go to the lowest index."""
    out = []
    for m, delta in enumerate(block.deltas):
        bits, threshold = magnitude_bits(delta), stats["threshold"][m]
        equal = bits == threshold
        allowed = stats["equal"][m] - int(before["equal"][m])
        keep = (bits > threshold) | (equal & (np.cumsum(equal) <= allowed))
        out.append(np.where(keep, delta, delta.dtype.type(0)))
    return out


def _kth(counts: Array, k: int) -> tuple[int, int]:
    """Bucket that holds the k-th largest value, and how many of that bucket belong to the k."""
    if k <= 0:
        return len(counts) - 1, 0
    above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(above, k))
    bucket = len(counts) - 1 - place
    return bucket, k - int(above[place] - counts[bucket])
