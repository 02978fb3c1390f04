"""Kernels: loops over blocks, compiled once for this processor and kept on disk.

numba is imported when the first kernel runs. No fast math and no contraction: the same bits on
every processor. Compiled code lies under $XDG_CACHE_HOME/mergelab, keyed by the sources."""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar, cast

import numpy as np

from mergelab.folders import cache_folder

Array = np.ndarray[Any, Any]
CHUNK = 4096  # elements that a kernel works on at a time: a few arrays of it fit in the L1 cache
LANES = 64  # running sums of `dot`, so that the order of additions is fixed and vectors are used
P = ParamSpec("P")
R = TypeVar("R")
_lock = threading.Lock()


class Kernel(Generic[P, R]):
    """A function that numba compiles at its first call, and with it the kernels it calls."""

    def __init__(self, function: Callable[P, R]) -> None:
        self.function = function
        self.compiled: Callable[P, R] | None = None
        self.__doc__ = function.__doc__

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if self.compiled is None:
            with _lock:
                self.compile()
        return cast("Callable[P, R]", self.compiled)(*args, **kwargs)

    def compile(self) -> Any:
        """The numba function; kernels among the function's globals are compiled first."""
        if self.compiled is None:
            numba = _numba()
            names = self.function.__globals__
            for name in self.function.__code__.co_names:
                if isinstance(names.get(name), Kernel):
                    names[name] = names[name].compile()
            done = numba.njit(nogil=True, cache=True, error_model="numpy")(self.function)
            done._cache = _Cache(done._cache)
            self.compiled = done
        return self.compiled


def kernel(function: Callable[P, R]) -> Kernel[P, R]:
    """Mark a function as a kernel."""
    return Kernel(function)


class _Cache:
    """numba's cache of one kernel: what cannot be read or written is compiled, and no error."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def load_overload(self, signature: Any, target: Any) -> Any:
        try:
            return self._cache.load_overload(signature, target)
        except Exception:  # a power cut, a full disk or another program damaged it
            with suppress(Exception):
                self._cache.flush()
            return None

    def save_overload(self, signature: Any, data: Any) -> None:
        with suppress(Exception):
            self._cache.save_overload(signature, data)


@functools.cache
def _numba() -> Any:
    """numba, with its cache in a folder that changes with the source of any kernel."""
    with _without("scipy.linalg.cython_blas"):
        import numba
        import numba.np.arraymath

    numba.config.CACHE_DIR = str(_place())
    numba.config.DISABLE_JIT = 0
    _teach(numba)
    return numba


@contextmanager
def _without(module: str) -> Iterator[None]:
    """Imports inside do not find the module: numba needs scipy's BLAS for `np.dot` in kernels,
    which may not use it (its sums depend on the processor), and it takes long to load."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = cast("Any", None)
    try:
        yield
    finally:
        del sys.modules[module]


def _place() -> Path:
    """Where compiled code is kept; a folder that goes with this process if that is not writable."""
    digest = hashlib.sha256()
    here = Path(__file__)
    folders = here.parent / "methods", here.parent / "forensics"
    others = (file for folder in folders for file in sorted(folder.glob("*.py")))
    for source in (here, here.with_name("adapted.py"), *others):
        digest.update(source.read_bytes())
    name = f"kernels-{digest.hexdigest()[:12]}"
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    place = Path(chosen) / name if chosen else cache_folder(name)
    with suppress(OSError):
        place.mkdir(parents=True, exist_ok=True)
    if not os.access(place, os.W_OK):
        place = Path(tempfile.mkdtemp(prefix="mergelab-kernels-"))
        atexit.register(shutil.rmtree, place, ignore_errors=True)
    return place


def decode(values: Array, model: int, start: int, count: int, out: Array) -> None:
    """Write entries [start, start + count) of one model as numbers to out[:count].

    A bfloat16 is the upper half of a float32. In kernels numba chooses by the array's type."""
    (_widen if values.dtype == np.uint16 else _copy_in)(values, model, start, count, out)


def encode(values: Array, count: int, out: Array, start: int) -> None:
    """Round values[:count] once to the type of `out` and put them at `start`.

    To nearest, ties to even; overflow gives infinity, a NaN stays one. In kernels numba chooses by
    the array's type."""
    (_narrow if out.dtype == np.uint16 else _copy_out)(values, count, out, start)


def fma(a: Any, b: Any, c: Any) -> Any:
    """a b + c of three numbers of one type, rounded once (IEEE 754 fusedMultiplyAdd).

    For kernels alone; a processor that cannot calls the C library, which gives the same bits."""
    raise TypeError("fma is for kernels: Python rounds twice")


def _teach(numba: Any) -> None:
    """Give numba what Python cannot say: code by an array's type, and the fused multiply-add."""
    bfloat16 = numba.types.uint16

    def choose_in(values: Any, model: Any, start: Any, count: Any, out: Any) -> Any:
        return _widen if values.dtype == bfloat16 else _copy_in

    def choose_out(values: Any, count: Any, out: Any, start: Any) -> Any:
        return _narrow if out.dtype == bfloat16 else _copy_out

    def rounded_once(typing: Any, a: Any, b: Any, c: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.fma(*args)

        return c(c, c, c), build

    once = numba.extending.intrinsic(rounded_once)

    def choose_fma(a: Any, b: Any, c: Any) -> Any:
        return lambda a, b, c: once(a, b, c)

    numba.extending.overload(decode, strict=False)(choose_in)
    numba.extending.overload(encode, strict=False)(choose_out)
    numba.extending.overload(fma, strict=False)(choose_fma)


def _widen(values: Array, model: int, start: int, count: int, out: Array) -> None:
    row = values[model, start : start + count]  # a slice: no index can be negative, so it is fast
    bits = out[:count].view(np.uint32)
    for i in range(row.size):
        bits[i] = np.uint32(row[i]) << np.uint32(16)


def _copy_in(values: Array, model: int, start: int, count: int, out: Array) -> None:
    row = values[model, start : start + count]
    for i in range(row.size):
        out[i] = row[i]


def _narrow(values: Array, count: int, out: Array, start: int) -> None:
    bits, rounded = values[:count].view(np.uint32), out[start : start + count]
    for i in range(bits.size):
        b = bits[i]
        even = np.uint32(b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1)))
        nan = (b & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        kept = np.uint32(b | np.uint32(0x400000))
        rounded[i] = np.uint16((kept if nan else even) >> np.uint32(16))


def _copy_out(values: Array, count: int, out: Array, start: int) -> None:
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
