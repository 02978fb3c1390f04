"""A published tensor beside the re-merged one: which entries differ, by how much, is it rounding?

Legend: S entries of a block; a format's ulp is the distance between its numbers somewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mergelab.checkpoint import FLOATS, Tensor, split_layer, to_float
from mergelab.kernels import CHUNK, LANES, decode, dot, kernel, lanes_total
from mergelab.methods.base import BLOCK
from mergelab.writer import Planned

Array = np.ndarray[Any, Any]
DIGITS = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7}  # bits of the fraction
LEAST = {"F64": -1022, "F32": -126, "F16": -14, "BF16": -126}  # exponent of the least normal number
STRAY = 2.0**-10  # share of a tensor's entries that may be rounded otherwise in 16-bit arithmetic


@dataclass
class Tally:
    """What was seen of one tensor; everything but `chosen` leaves the excused entries out.

    differing: entries with other bits; off: those that rounding does not explain; far: those that
    another choice of entries does not either (in our arithmetic only); chosen: entries that hold
    another of several right results (equal magnitudes at a cut); narrow: was the arithmetic
    followed in 16 bits, where strays are rare? converted: dtypes of recipe and file disagree.
    ee, pe, dd: squared length of the expected tensor and dot product with the published one, both
    less the published one's squared length; squared length of the difference. relative: the
    latter's root by the expected length, once `entry` was asked for. miscounted: what is wrong
    with the number of entries kept, if anything. untried: differing entries that may be another
    choice that was not tried, left out too; undecided: why nothing can be told of differences."""

    tensor: Planned
    published: Tensor
    narrow: bool = False
    differing: int = 0
    off: int = 0
    far: int = 0
    chosen: int = 0
    max_ulp: int = 0
    ee: float = 0.0
    pe: float = 0.0
    dd: float = 0.0
    relative: float = 0.0
    mask: dict[str, Any] | None = None
    miscounted: str = ""
    undecided: str = ""
    untried: int = 0

    @property
    def size(self) -> int:
        """Number of entries."""
        return self.published.size

    @property
    def converted(self) -> bool:
        """Is the file's dtype another than the recipe's?"""
        return self.tensor.dtype != self.published.dtype

    @property
    def coarse(self) -> str:
        """The dtype with fewer digits, of the recipe's and the file's."""
        return min((self.tensor.dtype, self.published.dtype), key=DIGITS.__getitem__)

    @property
    def verdict(self) -> str:
        """'exact', 'rounding only', 'other mask' or 'different'."""
        if self.mask is not None:
            return "other mask" if self.mask["fits"] else "different"
        if self.wrong or self.untried:
            return "different"
        unequal = self.differing or self.chosen or self.converted
        return "rounding only" if unequal else "exact"

    @property
    def wrong(self) -> bool:
        """Do entries differ that were looked into, by more than rounding?"""
        allowed = max(1.0, STRAY * self.size) if self.narrow else self.size
        return bool(self.off or self.miscounted or self.differing > allowed)

    @property
    def share(self) -> float:
        """Share of the entries that differ."""
        return self.differing / max(1, self.size)

    @cached_property
    def given(self) -> Array:
        """The published entries' bits: one memory map, not yet read."""
        return np.asarray(self.published.bits())

    def differ(self, start: int, bits: Array) -> Array:
        """Where a block of expected bits (S) differs from the published ones."""
        given = self.given[start : start + len(bits)]
        return np.flatnonzero(unsigned(bits) != unsigned(given))

    def fold(self, bits: Array, given: Array) -> None:
        """Add differing entries, expected and published bits, to the squares and products."""
        p, e = self.floats(given), self.floats(bits)
        self.ee += float(((e - p) * (e + p)).sum())
        self.pe += float(((e - p) * p).sum())
        self.dd += float(((p - e) * (p - e)).sum())

    def floats(self, bits: Array) -> Array:
        """Finite entries as float64, others as 0."""
        if self.published.dtype not in FLOATS:
            return bits.astype(float)
        if self.published.dtype == "BF16":
            wide = np.empty(len(bits))
            widen(np.asarray(bits)[None], wide)
            return wide
        values = to_float(bits, self.published.dtype, "<f8")
        return np.where(np.isfinite(values), values, 0.0)

    def square(self) -> float:
        """The squared length of the published tensor."""
        total = 0.0
        for start in range(0, self.size, BLOCK):
            p = self.floats(self.given[start : start + BLOCK])
            total += float((p * p).sum())
        return total

    def count(self, bits: Array, given: Array, off: Array) -> None:
        """Note differing entries: expected and published bits, and which of them are off."""
        self.differing += len(bits)
        self.off += int(np.count_nonzero(off))
        if len(bits):
            self.fold(bits, given)
            self.max_ulp = max(self.max_ulp, steps(bits, given, self.published.dtype))

    def compare(self, bits: Array, given: Array) -> None:
        """Note a block (S) of floats of which many differ: expected and published bits."""
        sums, dtype = np.zeros(2), self.published.dtype
        published, expected = numbers(given, dtype), numbers(bits, dtype)
        wide = np.empty(0, "<f8" if dtype == "F64" else "<f4")
        found = np.zeros(2, np.int64)
        add_differences(unsigned(given), unsigned(bits), published, expected, sums, found, wide)
        self.differing += int(found[0])
        self.max_ulp = max(self.max_ulp, int(found[1]))
        self.ee, self.pe, self.dd = (
            self.ee + 2 * sums[0] + sums[1],
            self.pe + sums[0],
            self.dd + sums[1],
        )

    def entry(self) -> dict[str, Any]:
        """The tensor as `remerge` tells it."""
        pp = self.square() if self.dd else 0.0
        ee, pe = pp + self.ee, pp + self.pe
        lengths = math.sqrt(max(0.0, pp * ee))
        cosine = max(-1.0, min(1.0, pe / lengths)) if lengths else None
        same = not self.dd
        self.relative = 0.0 if same else math.sqrt(self.dd) / math.sqrt(max(ee, 1e-300))
        return {
            "tensor": self.tensor.name,
            "layer": split_layer(self.tensor.name)[1],
            "verdict": self.verdict,
            "equal": self.verdict == "exact",
            "dtypes": [self.tensor.dtype, self.published.dtype],
            "elements": self.size,
            "max_ulp": self.max_ulp,
            "share_differing": self.share,
            "share_chosen": self.chosen / max(1, self.size),
            "cosine": 1.0 if same else cosine,
            "relative_error": self.relative,
            **({"mask": self.mask} if self.mask else {}),
            **({"miscounted": self.miscounted} if self.miscounted else {}),
        }


@kernel
def finite(bits: Array, start: int, count: int, out: Array) -> None:
    """Write finite entries of (1, S) as numbers to out[:count], others as 0."""
    decode(bits, 0, start, count, out)
    for i in range(count):
        out[i] = out[i] if abs(out[i]) < np.inf else 0


@kernel
def widen(bits: Array, out: Array) -> None:
    """Finite entries of a bfloat16 array (1, S) as float64, others as 0 (S)."""
    single = np.empty(CHUNK, np.float32)
    for start in range(0, out.size, CHUNK):
        count = min(CHUNK, out.size - start)
        finite(bits, start, count, single)
        for i in range(count):
            out[start + i] = single[i]


@kernel
def add_differences(
    given: Array,
    bits: Array,
    published: Array,
    expected: Array,
    sums: Array,
    found: Array,
    stored: Any,
) -> None:
    """Write to found (2) how many floats differ and by how many steps at most; add to pe, dd.

    given, bits (S): published and expected ones as unsigned bits; sums (2): see Tally."""
    p, e = np.empty(CHUNK, stored.dtype), np.empty(CHUNK, stored.dtype)
    gap = np.empty(CHUNK)
    lanes, differing, farthest = np.zeros((2, LANES)), 0, np.int64(0)
    for start in range(0, given.size, CHUNK):
        count = min(CHUNK, given.size - start)
        finite(published, start, count, p)
        finite(expected, start, count, e)
        for i in range(count):
            gap[i] = np.float64(e[i]) - np.float64(p[i])
        dot(gap, p, count, lanes[0])
        dot(gap, gap, count, lanes[1])
    top = np.int64(1) << (8 * given.itemsize - 1)
    for i in range(given.size):
        a, b = np.int64(given[i]), np.int64(bits[i])
        differing += a != b
        a = (top - a) if a & top else a
        b = (top - b) if b & top else b
        farthest = max(farthest, abs(a - b))
    for k in range(2):
        sums[k] += lanes_total(lanes[k])
    found[0], found[1] = differing, farthest


def numbers(bits: Array, dtype: str) -> Array:
    """Stored entries (S) as kernels decode them (1, S)."""
    return (to_float(bits, dtype, "<f4") if dtype == "F16" else bits)[None]


def not_finite(bits: Array, dtype: str) -> Array:
    """Which stored floats are infinite or NaN (S)."""
    full = (1 << (8 * bits.dtype.itemsize - 1)) - (1 << DIGITS[dtype])
    return np.asarray((unsigned(bits) & full) == full)


def unsigned(bits: Array) -> Array:
    """Bits as integers without sign."""
    return bits.view(f"<u{bits.dtype.itemsize}")


def ulp(values: Array, dtype: str) -> Array:
    """Distance from each magnitude to the next number of the format, in float64 (S)."""
    exponent = np.frexp(np.abs(values))[1].astype(np.int64) - 1
    exponent = np.where(values == 0, LEAST[dtype], np.maximum(exponent, LEAST[dtype]))
    return np.ldexp(1.0, exponent - DIGITS[dtype])


def steps(a: Array, b: Array, dtype: str) -> int:
    """Largest distance of two arrays, in steps from one number of their format to the next.

    Of floats more than 2^53 steps apart (float64 only) it is rounded."""
    if dtype in FLOATS:
        a, b = ranks(a), ranks(b)
    return int(np.abs(a.astype(float) - b.astype(float)).max(initial=0))


def ranks(bits: Array) -> Array:
    """Numbers of a float format in ascending order; 0.0 and -0.0 are number 0."""
    signed = bits.view(f"<i{bits.dtype.itemsize}").astype(np.int64)
    least = -(1 << (8 * bits.dtype.itemsize - 1))
    return np.where(signed < 0, least - signed, signed)
