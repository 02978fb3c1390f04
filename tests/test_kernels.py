"""Kernels: compiled once, kept as object files and loaded without numba (compiled.py)."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
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
def total(values: Array, out: Array) -> None:
    """Write the sum of an array of any shape to out."""
    out[0] = 0
    for value in values.flat:
        out[0] += value


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
    for found in (add_row, scratch, all_true, widths, total, fails, pair):
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
    odd = (np.zeros(1, kind) for kind in (">f4", "f2", "M8[s]", "O", "i4,i4", "S3", "c8"))
    for wrong in ("word", None, [1.0], 1j, int, np.float16, np.float16(1), *odd):
        with pytest.raises(TypeError, match="a kernel takes"):
            add_row(np.zeros((1, 1)), 0, wrong, out)
    with pytest.raises(TypeError, match=r"pair: returns .*; a kernel returns one number"):
        pair(1)


def test_a_kernel_that_fails_inside_raises() -> None:
    with pytest.raises(RuntimeError, match=r"fails: failed inside \(1\)"):
        fails(np.zeros(1))


def test_arguments_that_numba_takes_in_another_way_are_refused() -> None:
    assert compiler.check("name", ["ptr", "ptr", "i64"], ("int64",)) is None
    for taken in (["ptr", "ptr"], ["ptr", "ptr", "i32"], ["ptr", "ptr", "i64", "ptr"]):
        with pytest.raises(RuntimeError, match="another way"):
            compiler.check("name", taken, ("int64",))


def test_a_type_is_no_number_and_a_name_no_place() -> None:
    out = np.zeros(1)
    scratch(5, np.empty(0), out)
    widths(np.float64, np.float64(3), out)
    for wrong in ((np.float64(3), np.float64(3)), (np.float64, np.float64)):
        with pytest.raises(Exception, match=r"(?i)typing|call"):
            widths(*wrong, out)
    with pytest.raises(TypeError, match="by place"):
        all_true(True, b=True)
    for far in (2**63, -(2**63) - 1):
        with pytest.raises(OverflowError, match="no int64"):
            widths(np.float64, far, out)
    widths(np.float64, -(2**63), out)
    assert out[0] == -(2.0**63)


def test_what_may_not_be_written_is_not() -> None:
    held = bytes(8)
    with pytest.raises(Exception, match=r"(?i)cannot"):
        widths(np.float64, 7, np.frombuffer(held))
    assert held == bytes(8)


def test_arrays_of_many_dimensions() -> None:
    out = np.zeros(1)
    total(np.arange(2.0**12).reshape(12 * (2,)), out)
    assert out[0] == sum(range(2**12))


def test_workers_may_be_first_at_once(place: Path) -> None:
    start = threading.Barrier(8)

    def work(number: int) -> float:
        start.wait()
        return float(add_row(np.ones((1, 3)), 0, float(number), np.zeros(3)))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [3.0 * number for number in range(8)]
    assert len(list(place.iterdir())) == 1


def edited(source: str) -> Any:
    """A kernel of a module `sheet` that reads so."""
    names: dict[str, Any] = {"__name__": "sheet"}
    exec(source, names)
    return names["double"]


def test_code_is_known_by_what_it_does_not_by_its_name() -> None:
    """Nor by its file: the file may have changed since it was imported."""
    head = "from mergelab.kernels import kernel\nFACTOR = 2.0\n"
    inner = "@kernel\ndef inner(x):\n    return x * FACTOR\n"
    outer = "@kernel\ndef double(x):\n    return inner(x)\n"
    assert edited(head + inner + outer)(3.0) == 6.0
    assert edited(head.replace("2.0", "5.0") + inner + outer)(3.0) == 15.0
    assert edited(head + inner.replace("x *", "x * 2 *") + outer)(3.0) == 12.0
    assert edited(head + inner + outer.replace("inner(x)", "-inner(x)"))(3.0) == -6.0
    assert compiled.digest(edited(head + inner + outer)) == compiled.digest(
        edited("\n\n" + head + inner + outer)
    )


def test_an_object_file_is_of_the_processor_that_is_asked_for(place: Path) -> None:
    found = []
    for name, environment in (("own", {}), ("generic", {"NUMBA_CPU_NAME": "generic"})):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(place / name)],
            cwd=Path(__file__).parent,
            env={**os.environ, **environment},
            check=True,
            stdout=subprocess.PIPE,
        )
        assert done.stdout.split()[::2] == [b"6.0", b"6.0"]
        found.append([path.read_bytes() for path in sorted((place / name).iterdir())])
    assert len(found[0]) == len(found[1]) == 2
    assert all(own != generic for own, generic in zip(*found, strict=True))


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
        max(place.iterdir(), key=lambda path: path.stat().st_mtime_ns).unlink()  # the second
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
