"""Kernels: compiled once, kept as object files and loaded without numba (compiled.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergelab import compiled, compiler
from mergelab.kernels import fma, kernel

Array = np.ndarray[Any, Any]


@kernel
def add_row(values: Array, row: int, factor: Any, out: Array) -> float:
    """Add factor * values[row] to out; the sum of out."""
    total = 0.0
    for i in range(out.size):
        out[i] = fma(values[row, i], factor, out[i])
        total += out[i]
    return total


@kernel
def scratch(size: int, kind: Any, out: Array) -> None:
    """Write the sum of an array of its own to out."""
    own = np.ones(size, kind.dtype)
    out[0] = own.sum()


@kernel
def all_true(a: bool, b: bool) -> bool:
    """Are both?"""
    return a and b


@kernel
def widths(kind: Any, word: Any, out: Array) -> None:
    """Write word, as the type `kind`, to out."""
    out[0] = kind(word)


@kernel
def fails(out: Array) -> None:
    """Does."""
    raise ValueError("inside")


@kernel
def pair(a: int) -> tuple[int, int]:
    """Two numbers, which a kernel may not return."""
    return a, a


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for object files; nothing is loaded yet."""
    monkeypatch.setattr(compiled, "folder", lambda: tmp_path / "kernels")
    forget()
    return tmp_path / "kernels"


def forget() -> None:
    """Load kernels again, as the next process will."""
    compiled.load.cache_clear()
    for found in (add_row, scratch, all_true, widths, fails, pair):
        found._loaded.clear()


def test_any_strides_and_any_alignment_give_what_numpy_gives() -> None:
    rng = np.random.default_rng(0)
    plain = rng.standard_normal((3, 7)).astype(np.float32)
    apart = np.asfortranarray(plain)
    odd = np.frombuffer(b"." + plain.tobytes(), "u1")[1:].view(np.float32).reshape(3, 7)
    assert not odd.flags.aligned
    assert not odd.flags.writeable
    want = plain[1] * np.float32(3)
    for values in (plain, apart, odd, np.repeat(plain, 2, axis=1)[:, ::2]):
        out = np.zeros(7, np.float32)
        assert add_row(values, 1, np.float32(3), out) == pytest.approx(float(want.sum()), rel=1e-6)
        assert np.array_equal(out, want)
    twice = np.zeros(14)
    add_row(plain.astype(np.float64), 1, 3.0, twice[::2])
    assert np.allclose(twice[::2], want)
    assert not twice[1::2].any()


def test_empty_arrays_numbers_and_types_are_arguments() -> None:
    out = np.zeros(1)
    assert add_row(np.empty((1, 0)), 0, 1.0, out[:0]) == 0.0
    scratch(5, np.empty(0, np.float32), out)
    assert out[0] == 5
    assert all_true(True, True) is True
    assert all_true(True, False) is False
    assert all_true(np.True_, True) is True
    largest = np.zeros(1, np.uint64)
    widths(np.uint32, np.uint64(2**64 - 1), largest)
    assert largest[0] == 2**32 - 1
    widths(np.uint64, np.uint64(2**64 - 1), largest)
    assert largest[0] == 2**64 - 1


def test_what_a_kernel_cannot_take_or_return_is_refused() -> None:
    out = np.zeros(1)
    for wrong in ("word", None, [1.0], 1j, int, np.zeros(1, ">f4"), np.zeros(1, ">f4")[::-1]):
        with pytest.raises(TypeError, match="a kernel takes"):
            add_row(np.zeros((1, 1)), 0, wrong, out)
    with pytest.raises(TypeError, match=r"pair: returns .*; a kernel returns one number"):
        pair(1)


def test_a_kernel_that_fails_inside_raises() -> None:
    with pytest.raises(RuntimeError, match=r"fails: failed \(1\)"):
        fails(np.zeros(1))


def test_arguments_that_numba_takes_in_another_way_are_refused() -> None:
    assert compiler.check("name", ["ptr", "ptr", "i64"], ("int64",)) is None
    for taken in (["ptr", "ptr"], ["ptr", "ptr", "i32"], ["ptr", "ptr", "i64", "ptr"]):
        with pytest.raises(RuntimeError, match="another way"):
            compiler.check("name", taken, ("int64",))


SCRIPT = """
import sys
import numpy as np
from test_kernels import add_row, all_true, compiled
from pathlib import Path
compiled.folder = lambda: Path(sys.argv[1])
out = np.ones(2)
add_row(np.ones((1, 2)), 0, 2.0, out)
print(out.sum(), "numba" in sys.modules)
out = np.ones(2, np.float32)
add_row(np.ones((1, 2), np.float32), 0, np.float32(2), out)
print(out.sum(), "numba" in sys.modules)
"""


def test_a_kept_kernel_needs_no_numba_and_does_not_disturb_it(place: Path) -> None:
    """The second of the script's kernels is compiled in the process that loaded the first."""
    said = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(place)],
            cwd=Path(__file__).parent,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
            capture_output=True,
            text=True,
            check=True,
        )
        said.append(done.stdout.split())
        if len(said) == 1:
            (second,) = place.glob("*float32*")
            second.unlink()
    assert said[0] == ["6.0", "True", "6.0", "True"]
    assert said[1] == ["6.0", "False", "6.0", "True"]


def test_a_damaged_file_is_replaced_and_nothing_is_left_over(place: Path) -> None:
    out = np.zeros(1)
    assert add_row(np.ones((1, 1)), 0, 2.0, out) == 2.0
    (file,) = place.iterdir()
    good = file.read_bytes()
    for bad in (b"", good[:-1], good[:-1] + bytes([good[-1] ^ 1]), b"none\n"):
        file.write_bytes(bad)
        forget()
        out[0] = 0
        assert add_row(np.ones((1, 1)), 0, 2.0, out) == 2.0
        assert file.read_bytes() == good
    assert [path.name for path in place.iterdir()] == [file.name]
