"""Base-calibrated detectors: how much more likely did training make an item than its base finds it?

Both take per-item token log-probabilities (nats) of the model and of its base, and return one score
per item, higher meaning "looks seen"."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

WINDOWS = (1, 2, 4, 8, 16, 32)  # tokens; ours: powers of two up to a long phrase

Floats = NDArray[np.float64]
Items = Sequence[NDArray[np.float32]]


def base_loss(model: Items, base: Items) -> Floats:
    """Mean over tokens of log p_model - log p_base, in nats per token.

    The likelihood ratio against a reference model (Carlini et al. 2021, arXiv 2012.07805;
    Mireshghallah et al. 2022, arXiv 2203.03929), the reference being the model's own base."""
    return np.array([gain.mean() for gain in gains(model, base)])


def wbc(model: Items, base: Items) -> Floats:
    """Window-based comparison (Chen et al. 2026, arXiv 2601.02751), in [0, 1].

    The share of windows of w tokens in which the model's summed log-probability exceeds the
    base's, averaged over a geometric grid of w. An item shorter than w skips it. The grid is
    ours."""
    return np.array([np.mean(_wins(gain)) for gain in gains(model, base)])


def gains(model: Items, base: Items) -> list[Floats]:
    """log p_model - log p_base of every token, in float64, one array per item."""
    pairs = zip(model, base, strict=True)
    return [m.astype(np.float64) - b.astype(np.float64) for m, b in pairs]


def _wins(gain: Floats) -> list[float]:
    """For each window size that fits: the share of windows with a positive sum."""
    total = np.concatenate([[0.0], np.cumsum(gain)])
    sizes = [w for w in WINDOWS if w <= len(gain)]
    return [float(np.mean(total[w:] - total[:-w] > 0)) for w in sizes]
