"""mergekit's arithmetic, one operation after the other in the recipe's dtype.

mergekit rounds every intermediate to that dtype (bfloat16 keeps 8 bits), where mergelab computes in
float32 and rounds once: a merge published by it is matched by doing the same. Written from measured
behaviour of releases 0.1.4 and 0.1.5; tests and benchmarks/remerge.py hold it to them.

Legend: N experts, S elements; x (S) entries of one model in the work dtype, a torch tensor.
Scalars that the recipe gives stay float64 until an operation rounds its result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mergelab.methods.base import Settings
from mergelab.methods.consensus import NO_WEIGHT
from mergelab.methods.sce import LEAST_SHARE
from mergelab.methods.spherical import PARALLEL

Torch = Any  # a torch.Tensor; torch is imported where it is used
LEAST_NORM = 1e-7  # nuslerp divides by no smaller one
LEAST_SINE = 1e-16  # nuslerp: squares of sines up to this are a straight line
LEAST_PRODUCT = 1e-6  # model_stock: products of norms are at least this
LEAST_DISTANCE = 1e-6  # nearswap: distances are at least this


def numbers(values: Sequence[float], like: Torch) -> Torch:
    """Parameter values rounded to the work dtype, (len(values))."""
    import torch

    return torch.tensor(list(values), dtype=like.dtype)


# --- single elements ------------------------------------------------------------------------------


def linear(x: Sequence[Torch], settings: Settings) -> Torch:
    """0.1.5: fused sums in float32 (float64 for float64 inputs), one rounding at the end."""
    import torch

    wide = torch.promote_types(x[0].dtype, torch.float32)
    total = torch.zeros_like(x[0], dtype=wide)
    weights = torch.tensor(settings.each("weight"), dtype=wide)
    for one, weight in zip(x, weights, strict=True):
        total = _fused(total, one.to(wide), weight)
    if settings.shared["normalize"]:
        total = total / weights.sum()
    return total.to(x[0].dtype)


def _fused(total: Torch, x: Torch, weight: Torch) -> Torch:
    """total + weight x with one rounding, on processors without FMA too."""
    import torch

    if total.dtype == torch.float64:
        return total.addcmul(x, weight)
    return (total.double() + x.double() * weight.double()).float()


def linear_in_dtype(x: Sequence[Torch], settings: Settings) -> Torch:
    """0.1.4: weights, products, sum and division in the work dtype."""
    import torch

    weights = numbers(settings.each("weight"), x[0])
    total = torch.stack([one * weight for one, weight in zip(x, weights, strict=True)]).sum(0)
    return total / weights.sum() if settings.shared["normalize"] else total


def passthrough(x: Sequence[Torch], settings: Settings) -> Torch:
    """The one model's entries times `scale`."""
    (scale,) = settings.each("scale")
    return x[0] if scale == 1 else x[0] * scale


def nearswap(x: Sequence[Torch], settings: Settings) -> Torch:
    """Towards the expert, the farther the nearer it is to the base."""
    base, expert = x
    share = settings.shared["t"] / (base - expert).abs().clamp(min=LEAST_DISTANCE)
    share = share.clamp(0, 1)
    return share * expert + (1 - share) * base


# --- task vectors ---------------------------------------------------------------------------------


def combine(base: Torch, deltas: Sequence[Torch], settings: Settings, *, elect: bool) -> Torch:
    """base + lambda times the weighted task vectors, summed or elected (TIES)."""
    import torch

    weights = numbers(settings.each("weight"), base)
    parts = torch.stack([d * w for d, w in zip(deltas, weights, strict=True)])
    if elect:
        merged, divisor = agreeing(parts, weights)
    else:
        merged = parts.sum(0)
        divisor = torch.where(weights.sum().abs() < NO_WEIGHT, 1, weights.sum())
    if settings.shared["normalize"]:
        merged = merged / divisor
    scale = settings.shared["lambda"]
    return base + (merged if scale == 1 else merged * scale)


def agreeing(parts: Torch, weights: Torch) -> tuple[Torch, Torch]:
    """Sum of the parts (N, S) whose sign is that of their sum, and of their weights (1 for none).

    A sum of zero elects plus; zeros have no sign."""
    import torch

    signs = torch.where(parts.sum(0) >= 0, 1, -1).to(parts.dtype)
    agrees = (parts.sign() == signs).to(parts.dtype)
    share = (weights[:, None] * agrees).sum(0)
    return (parts * agrees).sum(0), torch.where(share == 0, 1, share)


def sce(base: Torch, deltas: Torch, weights: Torch) -> Torch:
    """Weighted mean of the selected task vectors (N, S) that agree in sign, added to the base."""
    import torch

    signs = torch.where(deltas.sum(0) >= 0, 1, -1).to(base.dtype)
    agrees = (deltas.sign() == signs).to(base.dtype)
    share = (agrees * weights[:, None]).sum(0).clamp(min=LEAST_SHARE)
    return base + (deltas * weights[:, None] * agrees).sum(0) / share


# --- directions: all of the tensor enters by one cosine -------------------------------------------


def slerp(cosine: Torch, x: Sequence[Torch], settings: Settings) -> Torch:
    """Great circle from base to expert in float32; a straight line where nearly parallel."""
    import torch

    t, dtype = settings.shared["t"], x[0].dtype
    a, b = (one.to(torch.promote_types(dtype, torch.float32)) for one in x)
    if abs(float(cosine)) > PARALLEL:
        return ((1 - t) * a + t * b).to(dtype)
    angle = torch.acos(cosine)
    sine = torch.sin(angle)
    return (torch.sin((1 - t) * angle) / sine * a + torch.sin(t * angle) / sine * b).to(dtype)


def nuslerp(cosine: Torch, x: Sequence[Torch], settings: Settings) -> Torch:
    """SLERP by weights, of task vectors if there is a base (the first of three)."""
    import torch

    a, b = (x[1] - x[0], x[2] - x[0]) if len(x) == 3 else x
    t = share_of_second(settings)
    angle = torch.acos(cosine)
    curved = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)
    merged = torch.where(1 - cosine * cosine <= LEAST_SINE, (1 - t) * a + t * b, curved)
    return merged + x[0] if len(x) == 3 else merged


def share_of_second(settings: Settings) -> float:
    """Weight of the second model as a share of both."""
    first, second = settings.each("weight")
    total = first + second
    return 0.5 if abs(total) < 1e-6 else float(second / total)


def model_stock(cosine: Torch, x: Sequence[Torch], settings: Settings) -> Torch:
    """From the base towards the mean of N experts by N cos / (1 + (N - 1) cos), not clamped."""
    import torch

    base, *experts = x
    count = len(experts)
    below = 1 + (count - 1) * cosine
    t = torch.where(below.abs() < LEAST_PRODUCT, 0, count * cosine / below).to(base.dtype)
    return t * (sum(experts[1:], start=experts[0]) / count) + (1 - t) * base


# --- cosines of vectors, in the work dtype --------------------------------------------------------


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
