"""exp, log, sin, cos and arccos: close to the true values, the same bits on other processors."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mergelab.methods import elementary, fusion

UNITS = 4  # in the last place; math's own functions are within one
SMALL = 10.0 ** np.linspace(-300, 0, 1500)
NEAR = 10.0 ** np.linspace(-16, 0, 1500)
ANGLES = np.concatenate(
    [np.linspace(0, math.pi, 4001), SMALL, math.pi - NEAR, math.pi / 2 + NEAR, math.pi / 2 - NEAR]
)
COSINES = np.concatenate([np.linspace(-1, 1, 4001), 1 - NEAR, -1 + NEAR, SMALL, -SMALL])
GRIDS = {
    "exp": np.concatenate([np.linspace(-700, 0, 6001)[1:], -SMALL, -math.log(2) * (0.5 + NEAR)]),
    "log": np.concatenate([np.exp(np.linspace(-708, 709, 4001)), 1 + NEAR, 1 - NEAR[:-1]]),
    "sin": ANGLES,
    "cos": ANGLES,
    "arccos": COSINES,
}


@pytest.mark.parametrize("name", sorted(GRIDS))
def test_within_four_units_in_the_last_place(name: str) -> None:
    ours: Callable[[float], float] = getattr(elementary, name)
    true: Callable[[float], float] = getattr(math, "acos" if name == "arccos" else name)
    for x in GRIDS[name].tolist():
        assert abs(ours(x) - true(x)) <= UNITS * math.ulp(true(x)), x


def test_exact_values() -> None:
    assert [elementary.exp(x) for x in (0.0, -701.0, -1e300, -math.inf)] == [1, 0, 0, 0]
    assert elementary.log(1.0) == 0
    assert elementary.sin(0.0) == 0
    assert elementary.cos(0.0) == 1
    assert [elementary.arccos(x) for x in (1.0, -1.0)] == [0, math.pi]


@pytest.mark.parametrize("x", [-0.5, -3.0, 4.0, 6.0])
def test_sine_and_cosine_of_angles_beyond_half_a_turn(x: float) -> None:
    assert elementary.sin(x) == pytest.approx(math.sin(x), abs=4e-16)
    assert elementary.cos(x) == pytest.approx(math.cos(x), abs=4e-16)


def bits() -> bytes:
    """Results one at a time, and of Arcee Fusion's loops, which the compiler makes vectors of."""
    points = {"exp": (-20, 0), "log": (1e-9, 9), "sin": (0, 3), "cos": (0, 3), "arccos": (-1, 1)}
    found = [
        np.array([getattr(elementary, name)(x) for x in np.linspace(*ends, 999).tolist()])
        for name, ends in points.items()
    ]
    values = np.random.default_rng(0).standard_normal((2, 40 * 999)).astype(np.float32)
    rows = np.empty(40)
    fusion.divergences(values, 999, rows, values[0, :0])
    return np.concatenate([*found, rows]).tobytes()


def test_the_same_bits_without_this_processors_vectors(tmp_path: Path) -> None:
    code = "import sys, test_elementary; sys.stdout.buffer.write(test_elementary.bits())"
    plain = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path), "NUMBA_CPU_NAME": "generic"},
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    assert len(plain) == 8 * (5 * 999 + 40)
    assert plain == bits()
