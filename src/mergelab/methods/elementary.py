"""exp, log, sin, cos and arccos in plain float64 arithmetic: the same bits on every processor.

Mathematical libraries choose other code, with other last bits, by what a processor can do. These
are series after the usual reductions (Cody and Waite 1980), within 4 units in the last place."""

from __future__ import annotations

import math

import numpy as np

from mergelab.kernels import kernel

LN2_HIGH, LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10  # their sum is ln 2
HALF_PI = math.pi / 2
PI_LOW = 1.2246467991473532e-16  # what math.pi lacks

# Coefficients, highest power first. As tuples they become constants of the compiled code.
EXP = tuple(1 / math.factorial(n) for n in range(13, -1, -1))
LOG = tuple(2 / (2 * n + 1) for n in range(10, -1, -1))
SIN = tuple((-1) ** n / math.factorial(2 * n + 1) for n in range(11, -1, -1))
ARCTAN = tuple((-1) ** n / (2 * n + 1) for n in range(20, -1, -1))

# A float64 is sign, exponent (11 bits, 1023 more than it is), and fraction (52 bits).
FRACTION = np.uint64(52)
BIAS = np.uint64(1023)
ONE = np.uint64(0x3FF0000000000000)  # the bits of 1
ROOT_HALF = np.uint64(0x3FE6A09E667F3BCD)  # the bits of the square root of 1/2
INTEGER = np.uint64(0x4330000000000000)  # the bits of 2^52: those of 2^52 + n are n more
TO_INTEGER = 1.5 * 2.0**52  # added to a small number leaves its nearest integer in the last bits


@kernel
def polynomial(x: float, terms: tuple[float, ...]) -> float:
    """Horner's rule, highest power first."""
    total = 0.0
    for i in range(len(terms)):
        total = total * x + terms[i]
    return total


@kernel
def exp(x: float) -> float:
    """e^x for x <= 0; 0 from -700 on. Without branches, so that a loop of it uses vectors."""
    shifted = x * 1.4426950408889634 + TO_INTEGER
    power = shifted - TO_INTEGER
    rest = (x - power * LN2_HIGH) - power * LN2_LOW
    bits = (np.float64(shifted).view(np.uint64) + BIAS) << FRACTION
    result = polynomial(rest, EXP) * np.uint64(bits).view(np.float64)
    return result if x > -700.0 else 0.0


@kernel
def log(x: float) -> float:
    """Natural logarithm of a positive normal number. Without branches, as exp.

    np.divide: because numba's `/` looks for zeros first."""
    bits = np.float64(x).view(np.uint64)
    exponent = (bits + (ONE - ROOT_HALF)) >> FRACTION
    mantissa = np.uint64(bits - (exponent << FRACTION) + ONE).view(np.float64)
    power = np.uint64(exponent | INTEGER).view(np.float64) - (2.0**52 + 1023)
    s: float = np.divide(mantissa - 1, mantissa + 1)
    return power * LN2_HIGH + (s * polynomial(s * s, LOG) + power * LN2_LOW)


@kernel
def sin(x: float) -> float:
    """Sine of an angle, exact to 4 units for at most half a turn to either side."""
    shifted = x * (1 / math.pi) + TO_INTEGER
    turns = shifted - TO_INTEGER
    rest = (x - turns * math.pi) - turns * PI_LOW
    value = rest * polynomial(rest * rest, SIN)
    return -value if np.float64(shifted).view(np.uint64) & np.uint64(1) else value


@kernel
def cos(x: float) -> float:
    """Cosine of an angle, as exact as the sine."""
    return sin((HALF_PI - x) + PI_LOW / 2)


@kernel
def arctan(y: float) -> float:
    """Inverse tangent of y >= 0, in [0, pi/2]."""
    if y > 2.414213562373095:
        z = 1 / y
        return HALF_PI - z * polynomial(z * z, ARCTAN)
    if y > 0.41421356237309503:
        z = (y - 1) / (y + 1)
        return HALF_PI / 2 + z * polynomial(z * z, ARCTAN)
    return y * polynomial(y * y, ARCTAN)


@kernel
def arccos(x: float) -> float:
    """Inverse cosine of x in [-1, 1], in [0, pi]."""
    if x <= -1:
        return math.pi
    return 2 * arctan(math.sqrt((1 - x) / (1 + x)))
