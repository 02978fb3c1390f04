"""Kernels: loops over blocks, compiled once for this processor, and those that methods share.

No fast math and no contraction: the same bits on every processor."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar, cast

import numpy as np

from mergelab.compiled import kind, load

Array = np.ndarray[Any, Any]
CHUNK = 4096  # elements that a kernel works on at a time: a few arrays of it fit in the L1 cache
LANES = 64  # running sums of `dot`, so that the order of additions is fixed and vectors are used
LEAST = -(2**63)  # int64
P = ParamSpec("P")
R = TypeVar("R")
_lock = threading.Lock()


class Kernel(Generic[P, R]):
    """A compiled function of arrays, numbers and numpy types (np.float32 itself).

    It returns one number or nothing."""

    def __init__(self, function: Callable[P, R]) -> None:
        self.function = function
        self.name = f"{function.__module__}.{function.__qualname__}"
        self.__doc__ = function.__doc__
        self._loaded: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run it without the interpreter's lock. Raises TypeError for other arguments, and
        OverflowError for an int that is none of 64 bits."""
        if kwargs:
            raise TypeError(f"{self.name} takes its arguments by place")
        key: list[Any] = []
        values: list[Any] = []
        for arg in args:
            if isinstance(arg, np.ndarray):
                key += arg.dtype, arg.ndim, arg.flags.num
                place = arg.__array_interface__["data"][0]
                values += 0, 0, arg.size, arg.itemsize, place, *arg.shape, *arg.strides
            elif isinstance(arg, type):
                key += type, arg
                values.append(0)
            else:
                if type(arg) is int and not LEAST <= arg < -LEAST:
                    raise OverflowError(f"{self.name}: {arg} is no int64")
                key.append(type(arg))
                values.append(arg)
        found = self._loaded.get(tuple(key))
        if found is None:
            with _lock:
                found = self._loaded[tuple(key)] = load(self, tuple(map(kind, args)))
        return cast("R", found(*values))


def kernel(function: Callable[P, R]) -> Kernel[P, R]:
    """Mark a function as a kernel."""
    return Kernel(function)


def decode(values: Array, model: int, start: int, count: int, out: Array) -> None:
    """Write entries [start, start + count) of one model as numbers to out[:count].

    A bfloat16 is the upper half of a float32. In kernels numba chooses by the array's type."""
    (widen if values.dtype == np.uint16 else copy_in)(values, model, start, count, out)


def encode(values: Array, count: int, out: Array, start: int) -> None:
    """Round values[:count] once to the type of `out` and put them at `start`.

    To nearest, ties to even; overflow gives infinity, a NaN stays one. In kernels numba chooses by
    the array's type."""
    (narrow if out.dtype == np.uint16 else copy_out)(values, count, out, start)


def fma(a: Any, b: Any, c: Any) -> Any:
    """a b + c of three numbers of one type, rounded once (IEEE 754 fusedMultiplyAdd).

    For kernels alone; a processor that cannot calls the C library, which gives the same bits."""
    raise TypeError("fma is for kernels: Python rounds twice")


def widen(values: Array, model: int, start: int, count: int, out: Array) -> None:
    row = values[model, start : start + count]  # a slice: no index can be negative, so it is fast
    bits = out[:count].view(np.uint32)
    for i in range(row.size):
        bits[i] = np.uint32(row[i]) << np.uint32(16)


def copy_in(values: Array, model: int, start: int, count: int, out: Array) -> None:
    row = values[model, start : start + count]
    for i in range(row.size):
        out[i] = row[i]


def narrow(values: Array, count: int, out: Array, start: int) -> None:
    bits, rounded = values[:count].view(np.uint32), out[start : start + count]
    for i in range(bits.size):
        b = bits[i]
        even = np.uint32(b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1)))
        nan = (b & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        kept = np.uint32(b | np.uint32(0x400000))
        rounded[i] = np.uint16((kept if nan else even) >> np.uint32(16))


def copy_out(values: Array, count: int, out: Array, start: int) -> None:
    row = out[start : start + count]
    for i in range(row.size):
        row[i] = values[i]


@kernel
def dot(a: Array, b: Array, count: int, sums: Array) -> None:
    """Add a[i] * b[i], i < count, in float64, to sums (LANES): lane i % LANES takes entry i."""
    whole = count - count % LANES
    for i in range(0, whole, LANES):
        for j in range(LANES):
            sums[j] += np.float64(a[i + j]) * np.float64(b[i + j])
    for j in range(count - whole):
        sums[j] += np.float64(a[whole + j]) * np.float64(b[whole + j])


@kernel
def lanes_total(sums: Array) -> float:
    """The lanes added in order."""
    total = 0.0
    for j in range(LANES):
        total += sums[j]
    return total


@kernel
def add_magnitudes(a: Array, count: int, sums: Array) -> None:
    """Add |a[i]|, i < count, in float64, to sums (LANES): lane i % LANES takes entry i."""
    whole = count - count % LANES
    for i in range(0, whole, LANES):
        for j in range(LANES):
            sums[j] += abs(np.float64(a[i + j]))
    for j in range(count - whole):
        sums[j] += abs(np.float64(a[whole + j]))


@kernel
def task_vectors(values: Array, start: int, count: int, base: Array, deltas: Array) -> None:
    """Decode the base (count entries) and write each expert minus base to deltas (N, CHUNK)."""
    decode(values, 0, start, count, base)
    for m in range(deltas.shape[0]):
        decode(values, m + 1, start, count, deltas[m])
        for i in range(count):
            deltas[m, i] = deltas[m, i] - base[i]


@kernel
def count_full(bits: Array, mask: Any, counts: Array) -> None:
    """Add to counts (M) how many words of each row of bits (M, S) have all bits of the mask set.

    With the exponent's bits as mask: how many floats are infinite or NaN."""
    for m in range(bits.shape[0]):
        row, found = bits[m], 0
        for i in range(row.size):
            found += (row[i] & mask) == mask
        counts[m] += found
