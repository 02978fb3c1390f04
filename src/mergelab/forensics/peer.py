"""mergekit's arithmetic of scalars: parameters, cosines, and the factors that follow from them.

mergekit rounds every intermediate to the recipe's dtype (bfloat16 keeps 8 bits), where mergelab
computes in float32 and rounds once: a merge published by it is matched by doing the same. Written
from measured behaviour of releases 0.1.4 and 0.1.5; tests and benchmarks/remerge.py hold it to
them. What is done with whole tensors: peer_kernels, peer_blends.

Legend: kind: the work dtype (peer_kernels.KINDS). Scalars that the recipe gives are not rounded
until an operation rounds its result. Rows: torch tensors, one vector per row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mergelab.forensics.peer_kernels import F32, snap
from mergelab.methods.base import Array, Settings
from mergelab.methods.consensus import NO_WEIGHT
from mergelab.methods.spherical import PARALLEL

Torch = Any  # a torch.Tensor; torch is imported where it is used
Factors = tuple[float, ...]
LEAST_NORM = 1e-7  # nuslerp divides by no smaller one
LEAST_SINE = 1e-16  # nuslerp: squares of sines up to this are a straight line
LEAST_PRODUCT = 1e-6  # model_stock: products of norms are at least this


def numbers(values: Sequence[float] | Array, kind: int) -> Array:
    """Values rounded to the work dtype, as float32 (len(values))."""
    rounded = np.array(values, np.float32)
    snap(rounded, rounded.size, kind)
    return rounded


def number(value: float, kind: int) -> float:
    """A float32 result, rounded to the work dtype."""
    return float(numbers([value], kind)[0])


def summed(values: Array, kind: int) -> float:
    """The sum of numbers (N) of the work dtype: added in float32, rounded once."""
    total = np.float32(0)
    for value in values:
        total += value
    return number(float(total), kind)


def plan(settings: Settings, weights: Array, kind: int, *, elect: bool) -> Array:
    """How weighted task vectors are put together (peer_kernels.combine)."""
    divisor = summed(weights, kind)
    shared = settings.shared
    divisor = 1.0 if abs(divisor) < NO_WEIGHT else divisor
    return np.array([elect, shared["normalize"], divisor, shared["lambda"], -np.inf], np.float32)


# --- factors from a cosine ------------------------------------------------------------------------


def slerp(cosine: float, settings: Settings, kind: int) -> Factors:
    """p, q, s of (p a + q b) / s, in float32; a straight line where nearly parallel."""
    t = float(settings.shared["t"])
    if abs(cosine) > PARALLEL:
        return 1 - t, t, 1.0
    angle = curve("acos", cosine, F32, kind)
    sine = curve("sin", angle, F32, kind)
    p, q = (curve("sin", times(share, angle, F32), F32, kind) for share in (1 - t, t))
    return number(p / sine, F32), number(q / sine, F32), 1.0


def nuslerp(cosine: float, settings: Settings, kind: int) -> Factors:
    """SLERP by weights: p, q, s of (p a + q b) / s."""
    t = share_of_second(settings)
    if number(1 - number(cosine * cosine, kind), kind) <= LEAST_SINE:
        return 1 - t, t, 1.0
    angle = curve("acos", cosine, kind, kind)
    p, q = (curve("sin", times(share, angle, kind), kind, kind) for share in (1 - t, t))
    return p, q, curve("sin", angle, kind, kind)


def times(share: float, angle: float, kind: int) -> float:
    """A recipe's number times a scalar."""
    return number(float(np.float32(share)) * angle, kind)


def curve(name: str, value: float, kind: int, work: int) -> float:
    """acos or sin. The last bit of torch's in float32 is its own, and seen in float32 merges."""
    if work != F32:
        return number(getattr(math, name)(value), kind)
    import torch

    return float(getattr(torch, name)(torch.tensor(value, dtype=torch.float32)))


def share_of_second(settings: Settings) -> float:
    """Weight of the second model as a share of both."""
    first, second = settings.each("weight")
    total = first + second
    return 0.5 if abs(total) < 1e-6 else float(second / total)


def model_stock(cosine: float, settings: Settings, kind: int) -> Factors:
    """Shares of the mean of N experts and of the base: t = N cos / (1 + (N - 1) cos), and 1 - t."""
    count = len(settings.experts)
    below = number(1 + number((count - 1) * cosine, kind), kind)
    t = number(number(count * cosine, kind) / below, kind) if abs(below) >= LEAST_PRODUCT else 0.0
    return t, number(1 - t, kind)


# --- one cosine per row: rare, and left to torch --------------------------------------------------


def nuslerp_rows(cosine: Torch, x: Sequence[Torch], settings: Settings) -> Torch:
    """SLERP by weights, of task vectors if there is a base (the first of three)."""
    import torch

    a, b = (x[1] - x[0], x[2] - x[0]) if len(x) == 3 else x
    t = share_of_second(settings)
    angle = torch.acos(cosine)
    curved = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)
    merged = torch.where(1 - cosine * cosine <= LEAST_SINE, (1 - t) * a + t * b, curved)
    return merged + x[0] if len(x) == 3 else merged


def model_stock_rows(cosine: Torch, x: Sequence[Torch]) -> Torch:
    """From the base towards the mean of the experts, as far as `model_stock` says."""
    import torch

    base, *experts = x
    count = len(experts)
    below = 1 + (count - 1) * cosine
    t = torch.where(below.abs() < LEAST_PRODUCT, 0, count * cosine / below).to(base.dtype)
    return t * (sum(experts[1:], start=experts[0]) / count) + (1 - t) * base


def pair_cosines(deltas: Sequence[Torch], dim: int) -> Torch:
    """model_stock: the mean over pairs of experts of their cosines along `dim`."""
    import torch

    found = []
    for i in range(len(deltas)):
        for j in range(i):
            norms = deltas[i].norm(dim=dim) * deltas[j].norm(dim=dim)
            product = (deltas[i] * deltas[j]).sum(dim) / norms.clamp(min=LEAST_PRODUCT)
            found.append(product.clamp(-1, 1))
    return torch.stack(found).mean(0)


def unit_cosine(a: Torch, b: Torch, dim: int) -> Torch:
    """nuslerp: the sum of products of unit vectors along `dim`, which stays as a dimension."""
    u, v = (x / x.norm(dim=dim, keepdim=True).clamp(min=LEAST_NORM) for x in (a, b))
    return (u * v).sum(dim, keepdim=True).clamp(-1, 1)
