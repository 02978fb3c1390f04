"""Kernels of mergekit's averages and directions; see peer_kernels for what they have in common.

Legend: M models, the base first; N experts or task vectors; S entries; kind: the work dtype."""

from __future__ import annotations

from typing import Any

import numpy as np

from mergelab.forensics.peer_kernels import differences, load, scale, snap, total
from mergelab.kernels import CHUNK, LANES, dot, encode, fma, kernel, lanes_total
from mergelab.methods.base import Array

LEAST_DISTANCE = 1e-6  # nearswap: distances are at least this


# --- single elements ------------------------------------------------------------------------------


@kernel
def fused(values: Array, weights: Array, divisor: Any, kind: int, out: Array) -> None:
    """linear of 0.1.5: fused sums in float32, a division unless by 0, one rounding at the end."""
    x, merged = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    for at in range(0, values.shape[1], CHUNK):
        count = min(CHUNK, values.shape[1] - at)
        merged[:count] = 0
        for m in range(values.shape[0]):
            load(values, m, at, count, kind, x)
            weight = weights[m]
            for i in range(count):
                merged[i] = fma(x[i], weight, merged[i])
        if divisor != 0:
            for i in range(count):
                merged[i] = merged[i] / divisor
        snap(merged, count, kind)
        encode(merged, count, out, at)


@kernel
def weighted(values: Array, weights: Array, divisor: Any, kind: int, out: Array) -> None:
    """linear of 0.1.4, and passthrough: products, sum and division in the work dtype."""
    models = values.shape[0]
    x, merged = np.empty((models, CHUNK), np.float32), np.empty(CHUNK, np.float32)
    for at in range(0, values.shape[1], CHUNK):
        count = min(CHUNK, values.shape[1] - at)
        for m in range(models):
            load(values, m, at, count, kind, x[m])
            scale(x[m], weights[m], count, kind)
        if models > 1:
            total(x, count, kind, merged)
        else:
            merged[:count] = x[0][:count]
        if divisor != 0:
            for i in range(count):
                merged[i] = merged[i] / divisor
            snap(merged, count, kind)
        encode(merged, count, out, at)


@kernel
def near(values: Array, t: Any, least: Any, kind: int, out: Array) -> None:
    """nearswap: towards the expert, the farther the nearer it is to the base."""
    base, deltas = np.empty(CHUNK, np.float32), np.empty((1, CHUNK), np.float32)
    x, share = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    one, zero = np.float32(1), np.float32(0)
    for at in range(0, values.shape[1], CHUNK):
        count = min(CHUNK, values.shape[1] - at)
        differences(values, at, count, kind, base, deltas)
        load(values, 1, at, count, kind, x)
        for i in range(count):
            share[i] = one / max(abs(deltas[0, i]), least)
        snap(share, count, kind)
        scale(share, t, count, kind)
        for i in range(count):
            share[i] = min(max(share[i], zero), one)
            x[i] = x[i] * share[i]
            share[i] = one - share[i]
        snap(x, count, kind)
        snap(share, count, kind)
        for i in range(count):
            share[i] = share[i] * base[i]
        snap(share, count, kind)
        for i in range(count):
            x[i] = x[i] + share[i]
        snap(x, count, kind)
        encode(x, count, out, at)


# --- directions -----------------------------------------------------------------------------------


@kernel
def blend(values: Array, factors: Array, inner: int, kind: int, out: Array) -> None:
    """(p a + q b) / s of two models, or of two task vectors, and then the base is added.

    factors: p, q, s; inner: the dtype of these operations."""
    based = values.shape[0] == 3
    base, x = np.empty(CHUNK, np.float32), np.empty((2, CHUNK), np.float32)
    merged = np.empty(CHUNK, np.float32)
    for at in range(0, values.shape[1], CHUNK):
        count = min(CHUNK, values.shape[1] - at)
        if based:
            differences(values, at, count, kind, base, x)
        else:
            load(values, 0, at, count, kind, x[0])
            load(values, 1, at, count, kind, x[1])
        for m in range(2):
            scale(x[m], factors[m], count, inner)
        a, b = x[0], x[1]
        for i in range(count):
            merged[i] = a[i] + b[i]
        snap(merged, count, inner)
        if factors[2] != 1:
            for i in range(count):
                merged[i] = merged[i] / factors[2]
        snap(merged, count, kind)
        if based:
            for i in range(count):
                merged[i] = merged[i] + base[i]
            snap(merged, count, kind)
        encode(merged, count, out, at)


@kernel
def pull(values: Array, t: Any, rest: Any, kind: int, out: Array) -> None:
    """model_stock: t times the mean of the experts, and the rest of the base."""
    experts = values.shape[0] - 1
    x, merged = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    for at in range(0, values.shape[1], CHUNK):
        count = min(CHUNK, values.shape[1] - at)
        load(values, 1, at, count, kind, merged)
        for m in range(2, experts + 1):
            load(values, m, at, count, kind, x)
            for i in range(count):
                merged[i] = merged[i] + x[i]
            snap(merged, count, kind)
        for i in range(count):
            merged[i] = merged[i] / np.float32(experts)
        snap(merged, count, kind)
        scale(merged, t, count, kind)
        load(values, 0, at, count, kind, x)
        scale(x, rest, count, kind)
        for i in range(count):
            merged[i] = merged[i] + x[i]
        snap(merged, count, kind)
        encode(merged, count, out, at)


@kernel
def add_products(
    values: Array, based: bool, norms: Array, kind: int, squares: Array, sums: Array
) -> None:
    """Add squares (N) and, where j > i, rounded products (N, N), in float64.

    Of task vectors if there is a base; divided by norms (N) if these are given."""
    first = 1 if based else 0
    count_of = values.shape[0] - first
    base, x = np.empty(CHUNK, np.float32), np.empty((count_of, CHUNK), np.float32)
    product, one = np.empty(CHUNK, np.float32), np.ones(CHUNK, np.float32)
    lanes = np.zeros((count_of, count_of, LANES))
    for at in range(0, values.shape[1], CHUNK):
        count = min(CHUNK, values.shape[1] - at)
        if based:
            differences(values, at, count, kind, base, x)
        else:
            for m in range(count_of):
                load(values, m, at, count, kind, x[m])
        for i in range(norms.size):
            for k in range(count):
                x[i, k] = x[i, k] / norms[i]
            snap(x[i], count, kind)
        for i in range(count_of):
            dot(x[i], x[i], count, lanes[i, i])
            for j in range(i + 1, count_of):
                for k in range(count):
                    product[k] = x[i, k] * x[j, k]
                snap(product, count, kind)
                dot(product, one, count, lanes[i, j])
    for i in range(count_of):
        squares[i] += lanes_total(lanes[i, i])
        for j in range(i + 1, count_of):
            sums[i, j] += lanes_total(lanes[i, j])
