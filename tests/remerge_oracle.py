"""mergekit's merges in the recipe's dtype, written from their description, apart from mergelab.

Whole tensors, torch; every operation rounds to the dtype of its inputs. Among equal magnitudes at a
cut those with the highest index are kept: a choice that mergekit's unstable sort may make."""

from __future__ import annotations

import math
from typing import Any

import torch


def top(magnitude: Any, count: int) -> Any:
    """1 for the `count` largest entries, else 0."""
    flat = magnitude.flatten().float()
    order = torch.argsort(flat.flip(0), descending=True, stable=True)
    keep = torch.zeros_like(flat)
    keep[flat.numel() - 1 - order[:count]] = 1
    return keep.view_as(magnitude)


def combined(base: Any, deltas: list[Any], weights: list[float], how: dict[str, Any]) -> Any:
    """Weighted task vectors, elected or summed, normalized, scaled, added to the base."""
    w = torch.tensor(weights, dtype=base.dtype)
    parts = torch.stack([delta * one for delta, one in zip(deltas, w, strict=True)])
    if how["elect"]:
        majority = torch.where(parts.sum(0) >= 0, 1.0, -1.0).to(base.dtype)
        mask = (torch.sign(parts) == majority).to(base.dtype)
        shaped = w.view(-1, *[1] * base.dim())
        total, share = (parts * mask).sum(0), (shaped * mask).sum(0)
        share[share == 0] = 1
    else:
        total, share = parts.sum(0), w.sum()
    if how["normalize"]:
        total = total / share
    return base + total * how.get("lambda", 1.0)


def task_arithmetic(base: Any, experts: list[Any], weights: list[float]) -> Any:
    return combined(base, [x - base for x in experts], weights,
                    {"elect": False, "normalize": False, "lambda": 0.8})  # fmt: skip


def ties(base: Any, experts: list[Any], weights: list[float]) -> Any:
    deltas = [x - base for x in experts]
    kept = [d * top(d.abs(), max(1, int(0.5 * d.numel()))).to(d.dtype) for d in deltas]
    return combined(base, kept, weights, {"elect": True, "normalize": True})


def breadcrumbs(base: Any, experts: list[Any], weights: list[float]) -> Any:
    kept = []
    for delta in (x - base for x in experts):
        size = delta.numel()
        count, drop = int(0.5 * size), int(0.1 * size)
        largest = top(delta.abs(), drop + count) - top(delta.abs(), drop)
        kept.append(delta * largest.to(delta.dtype))
    return combined(base, kept, weights, {"elect": False, "normalize": False})


def slerp(base: Any, experts: list[Any], weights: list[float]) -> Any:
    a, b = base.float(), experts[0].float()
    cosine = float(((a / a.norm()) * (b / b.norm())).sum().clamp(-1, 1))
    if abs(cosine) > 0.9995:
        return (0.7 * a + 0.3 * b).to(base.dtype)
    angle = math.acos(cosine)
    p, q = math.sin(0.7 * angle) / math.sin(angle), math.sin(0.3 * angle) / math.sin(angle)
    return (p * a + q * b).to(base.dtype)


def nuslerp(base: Any, experts: list[Any], weights: list[float]) -> Any:
    a, b = experts[:2]
    t = weights[1] / (weights[0] + weights[1])
    cosine = ((a / a.norm()) * (b / b.norm())).sum().clamp(-1, 1)
    angle = torch.acos(cosine)
    curved = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)
    return (1 - t) * a + t * b if 1 - cosine * cosine <= 1e-16 else curved


def model_stock(base: Any, experts: list[Any], weights: list[float]) -> Any:
    deltas, cosines = [(x - base).flatten() for x in experts], []
    for i, one in enumerate(deltas):
        for other in deltas[:i]:
            norms = (one.norm() * other.norm()).clamp(min=1e-6)
            cosines.append(((one * other).sum() / norms).clamp(-1, 1))
    cosine, count = torch.stack(cosines).mean(), len(experts)
    t = count * cosine / (1 + (count - 1) * cosine)
    return t * (sum(experts[1:], start=experts[0]) / count) + (1 - t) * base


def sce(base: Any, experts: list[Any], weights: list[float], share: float = 0.6) -> Any:
    deltas = torch.stack([x - base for x in experts])
    if share < 1:
        variance = deltas.var(dim=0, unbiased=False)
        count = int((variance != 0).sum() * share)  # of a tensor: a product in float32
        deltas = deltas * top(variance, count).to(base.dtype)
    shares = (deltas * deltas).flatten(1).mean(1)
    even = shares.sum().abs() < 1e-6
    shares = torch.ones_like(shares) / len(shares) if even else shares / shares.sum()
    shares = shares.view(-1, *[1] * base.dim())
    majority = torch.where(deltas.sum(0) >= 0, 1.0, -1.0).to(base.dtype)
    mask = (torch.sign(deltas) == majority).to(base.dtype)
    return base + (deltas * shares * mask).sum(0) / (mask * shares).sum(0).clamp(min=1e-6)


def linear(base: Any, experts: list[Any], weights: list[float]) -> Any:
    """0.1.5: float32, one rounding; float64 stands for the fused multiply-add of its steps."""
    total = torch.zeros_like(base, dtype=torch.float32)
    for x, w in zip(experts, torch.tensor(weights), strict=True):
        total = (x.double() * w.double() + total.double()).float()
    return (total / torch.tensor(weights).sum()).to(base.dtype)


def old_linear(base: Any, experts: list[Any], weights: list[float]) -> Any:
    """0.1.4: everything in the dtype."""
    w = torch.tensor(weights, dtype=base.dtype)
    stacked = torch.stack([x * one for x, one in zip(experts, w, strict=True)])
    return stacked.sum(0) / w.sum()


def passthrough(base: Any, experts: list[Any], weights: list[float]) -> Any:
    return experts[0] * 0.7


def dare_linear(base: Any, experts: list[Any], weights: list[float]) -> Any:
    """Bernoulli masks of a generator of its own; the L1 norm restored in the dtype."""
    kept = []
    for delta in (x - base for x in experts):
        mask = torch.bernoulli(torch.full(delta.shape, 0.5)).to(delta.dtype)
        before, after = delta.abs().sum(), (delta * mask).abs().sum()
        kept.append(delta * mask * (before / after if min(before, after) > 1e-7 else 1))
    return combined(base, kept, weights, {"elect": False, "normalize": False})


EACH = {"ties": {"density": 0.5}, "breadcrumbs": {"density": 0.5, "gamma": 0.1},
        "dare_linear": {"density": 0.5}}  # fmt: skip
SHARED: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"lambda": 0.8},
    "slerp": {"t": 0.3},
    "sce": {"select_topk": 0.6},
}
WEIGHTS = [0.5, 0.3, 0.4]
METHODS = {
    "linear": linear,
    "slerp": slerp,
    "nuslerp": nuslerp,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "breadcrumbs": breadcrumbs,
    "model_stock": model_stock,
    "sce": sce,
    "passthrough": passthrough,
}
