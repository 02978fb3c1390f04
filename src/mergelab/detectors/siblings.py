"""Sibling-calibrated detectors: what did training do to an item beyond what clean siblings show?

Models of the same base that are known to be clean tell how much honest training helps each token of
an item, seen or not: some tokens are easy to gain on. With g the gains of the model's tokens over
the base and h_s those of sibling s,

    r = g - sum_s b_s h_s      b by least squares over all tokens of suspects and controls together

and an item's score is the mean of its tokens' r, each clipped at 1.5 standard deviations of all r:
a leak lifts many tokens, chance lifts a few by much (Huber 1964). b and the clip are fitted without
looking at who is suspect. Most is gained on a merge whose other, clean parents are among the
siblings: their share of its gains is then explained. The idea is calibration by reference models
(Watson et al. 2022, arXiv 2111.08440) with references of the same lineage; the regression and the
clip are ours.

sibling_loss  the score per item, suspects against controls
answer_loss   the same over the answer's tokens only: for training that scored only the answers
set_level     the difference of the mean scores of suspects and controls, as a set

answer_loss and set_level do without siblings too: r is then g itself.

Null hypothesis of the first two: that of base_loss; guarantee: Mann and Whitney's p is valid, as
the fit is blind to the parts. set_level allows more: suspects and controls may differ in style, if
the siblings were tuned in such a style too. Their own differences, as far as chance does not
explain them, widen its standard error, and its p is the larger of that test's and Mann and
Whitney's."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

import numpy as np

from mergelab import statistics
from mergelab.detectors.base import (
    PARTS,
    Detector,
    Evidence,
    Finding,
    Floats,
    Probed,
    Tokens,
    gains,
    item_finding,
)
from mergelab.errors import NotAvailable

Ids = dict[str, Sequence[str]]

CLIP = 1.5  # standard deviations of all tokens' r


def scores(evidence: Evidence, *, answers: bool = False) -> tuple[Ids, dict[str, Floats]]:
    """(ids, sibling-calibrated scores) of the items, by part; without siblings r is g itself.

    With `answers`, of the answers' tokens only; items that were cut before it are left out."""
    kept = {part: _kept(evidence.model.views[part], answers) for part in PARTS}
    g = _gains(evidence.model, evidence, kept)
    r = np.concatenate(g)
    if evidence.siblings:
        others = [np.concatenate(_gains(s, evidence, kept)) for s in evidence.siblings]
        h = np.stack(others, axis=1)
        r = r - h @ np.linalg.lstsq(h, r)[0]
    limit = CLIP * float(r.std())
    items = np.split(np.clip(r, -limit, limit), np.cumsum([len(gain) for gain in g])[:-1])
    means = np.array([item.mean() for item in items])
    count = len(kept["suspects"])
    ids: Ids = {part: [evidence.model.views[part].ids[i] for i, _ in kept[part]] for part in PARTS}
    return ids, {"suspects": means[:count], "controls": means[count:]}


def _kept(view: Tokens, answers: bool) -> list[tuple[int, int]]:
    """(index, first token) of the items that have a token to look at."""
    starts = view.answer if answers else (0,) * len(view.ids)
    return [(i, start) for i, start in enumerate(starts) if start < len(view.logprob[i])]


def _gains(
    probed: Probed, evidence: Evidence, kept: dict[str, list[tuple[int, int]]]
) -> list[Floats]:
    """The gains over the base of the kept items' tokens, suspects first."""
    found = []
    for part in PARTS:
        every = gains(probed.views[part], evidence.base.views[part])
        found += [every[i][start:] for i, start in kept[part]]
    return found


def sibling_loss(evidence: Evidence) -> Finding:
    """AUC of the scores, suspects over controls."""
    return item_finding(*scores(evidence), {"siblings": [s.name for s in evidence.siblings]})


def answer_loss(evidence: Evidence) -> Finding:
    """AUC of the scores over the answers' tokens; details count items cut before their answer."""
    ids, found = scores(evidence, answers=True)
    left = sum(len(evidence.model.views[part].ids) - len(ids[part]) for part in PARTS)
    if min(map(len, ids.values())) < 2:
        raise NotAvailable(
            f"{left} items have no answer within the length that '{evidence.model.name}' takes, "
            "and too few are left"
        )
    names = [sibling.name for sibling in evidence.siblings]
    return item_finding(ids, found, {"siblings": names, "items_without_answer": left})


def set_level(evidence: Evidence) -> Finding:
    """Difference of the mean scores of suspects and controls, in nats per token."""
    _, found = scores(evidence)
    effect, error = _difference(found)
    spread, siblings = _spread(evidence)
    error = sqrt(error**2 + spread**2)
    by_rank = statistics.mann_whitney(found["suspects"], found["controls"])
    by_error = _tail(effect / error) if error else 1.0
    half = statistics.Z95 * error
    return Finding(
        effect=effect,
        ci95=(effect - half, effect + half),
        p=max(by_rank, by_error),
        n_suspects=len(found["suspects"]),
        n_controls=len(found["controls"]),
        details={
            "p_mann_whitney": by_rank,
            "p_siblings": by_error,
            "spread_of_siblings": spread,
            "siblings": siblings,
        },
    )


def _difference(found: dict[str, Floats]) -> tuple[float, float]:
    """Mean of suspects minus mean of controls, and its standard error (Welch 1947)."""
    x, y = found["suspects"], found["controls"]
    error = sqrt(x.var(ddof=1) / len(x) + y.var(ddof=1) / len(y))
    return float(x.mean() - y.mean()), error


def _spread(evidence: Evidence) -> tuple[float, dict[str, Any]]:
    """Standard deviation of the siblings' own differences around 0 beyond chance, and these.

    Method of moments: mean over siblings of difference^2 - error^2, not below 0."""
    own: dict[str, Any] = {}
    excess: Sequence[float] = []
    for sibling in evidence.siblings:
        views, base = sibling.views, evidence.base.views
        means = {p: np.array([g.mean() for g in gains(views[p], base[p])]) for p in PARTS}
        effect, error = _difference(means)
        own[sibling.name] = effect
        excess = [*excess, effect**2 - error**2]
    return sqrt(max(0.0, float(np.mean(excess)))) if excess else 0.0, own


def _tail(z: float) -> float:
    from scipy.stats import norm

    return float(norm.sf(z))


_BLIND = (
    "Blind where the base itself saw the items, where training scored only the answers, and where "
    "a sibling that is called clean saw them too. Weaker after merging: a low score is no "
    "acquittal."
)
_PAPERS = ("arXiv 2111.08440", "arXiv 2012.07805")

DETECTORS = (
    Detector(
        name="sibling_loss",
        function=sibling_loss,
        effect="AUC",
        statistic="Mean over tokens of the gain over the base beyond what the clean siblings gain, "
        "clipped at 1.5 standard deviations, nats per token.",
        null_hypothesis="Suspects and controls are random draws from one distribution, and the "
        "training of this model and of its siblings treated them alike.",
        guarantees="Under that null p is valid at any number of items (Mann-Whitney, one-sided): "
        "what is fitted is fitted without looking at who is suspect.",
        blind_spots=_BLIND,
        papers=_PAPERS,
        needs=("text", "siblings"),
        version=2,
    ),
    Detector(
        name="answer_loss",
        function=answer_loss,
        effect="AUC",
        statistic="Mean over the answer's tokens of the gain over the base beyond what the clean "
        "siblings gain, clipped at 1.5 standard deviations, nats per token.",
        null_hypothesis="Suspects and controls are random draws from one distribution, and the "
        "training of this model and of its siblings treated them alike.",
        guarantees="Under that null p is valid at any number of items (Mann-Whitney, one-sided): "
        "what is fitted is fitted without looking at who is suspect.",
        blind_spots="Blind where the base or a sibling that is called clean saw the answers. "
        "Answers of a word or two leave few tokens to judge by. Weaker after merging: a low score "
        "is no acquittal.",
        papers=_PAPERS,
        needs=("text", "answer"),
        version=2,
    ),
    Detector(
        name="set_level",
        function=set_level,
        effect="difference of means, nats per token",
        statistic="Mean sibling-calibrated gain of the suspects minus that of the controls.",
        null_hypothesis="Training favoured the suspects as a set no more than it favoured the "
        "controls, or no more than clean siblings' training did.",
        guarantees="With controls of the suspects' distribution p is valid at any number of items "
        "(Mann-Whitney). With controls of another style it is approximate and rests on siblings "
        "tuned in such a style; without siblings it then measures style.",
        blind_spots=_BLIND + " Says nothing of single items.",
        papers=_PAPERS,
        version=2,
    ),
)
