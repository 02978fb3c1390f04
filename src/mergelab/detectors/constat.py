"""ConStat: does a model score more on a benchmark than its score on the twin lets one expect?

Dekoninck, Mueller and Vechev 2024. Reference models known to be clean, the base and its siblings,
show which score on the benchmark goes with which on the twin; a smoothing spline through them, from
a model that guesses, gives the expected score. Written from the paper's description; the penalty
comes from a grid, and resamples of fewer than 5 distinct points are fitted by a straight line."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mergelab.detectors.base import Detector, Evidence, Finding, Floats
from mergelab.detectors.smoothing import evaluate_many, fit_many
from mergelab.detectors.twin import LEAST, scored_by
from mergelab.errors import NotAvailable
from mergelab.statistics import SEED

REFERENCES = 5  # models, the fewest that the paper allows
RESAMPLES = 2_000
KINDS = ("original", "twin")


def constat(evidence: Evidence) -> Finding:
    """Score above expectation, with the pivotal bootstrap interval and one-sided p of the paper."""
    references = _references(evidence)
    ids = _items(evidence, references)
    original, twin = (_scores(evidence, kind, references, ids) for kind in KINDS)
    chance = _chance(evidence, set(ids))
    counts, picks = draw(len(ids), len(references))
    effect, ci95, lower_bound, p = judge(differences(original, twin, chance, counts, picks))
    return Finding(
        effect=effect,
        ci95=ci95,
        p=p,
        n_suspects=len(ids),
        n_controls=0,
        details={
            "lower_bound_95": lower_bound,
            "score": float(original[0].mean()),
            "twin_score": float(twin[0].mean()),
            "references": references,
            "chance": chance,
        },
    )


def _references(evidence: Evidence) -> list[str]:
    """The base and its clean siblings, as far as they are scored; NotAvailable below five."""
    named = {evidence.base.name, *(sibling.name for sibling in evidence.siblings)}
    found = [
        name
        for name in sorted(named)
        if name != evidence.model.name
        and all(evidence.scores.get(name, {}).get(kind) for kind in KINDS)
    ]
    if len(found) < REFERENCES:
        raise NotAvailable(
            f"needs {REFERENCES} reference models (the base and the check's 'siblings') scored on "
            f"the benchmark and its twin, beside the model itself, and has {len(found)}"
        )
    return found


def _items(evidence: Evidence, references: list[str]) -> list[str]:
    """Ids of the items, controls left out, that the model and every reference are scored on."""
    controls = {str(item["id"]) for item in evidence.items.get("controls", ())}
    scored = scored_by(evidence, (evidence.model.name, *references))
    found = [name for name in scored if name not in controls]
    if len(found) < LEAST:
        raise NotAvailable(
            f"'{evidence.model.name}' and its reference models share {len(found)} scored items, "
            f"but {LEAST} are needed"
        )
    return found


def _scores(evidence: Evidence, kind: str, references: list[str], ids: list[str]) -> Floats:
    """A row of item scores for the model, then for each reference."""
    models = (evidence.model.name, *references)
    table = np.array([[evidence.scores[model][kind][name] for name in ids] for model in models])
    if not ((table >= 0) & (table <= 1)).all():
        raise NotAvailable("needs a metric between 0 and 1, such as acc")
    return table


def _chance(evidence: Evidence, ids: set[str]) -> float:
    """What guessing scores: the mean of one over the number of choices; 0 without choices."""
    items = [item for part in evidence.items.values() for item in part if str(item["id"]) in ids]
    counts = [len((item.get("options") or {}).get("choices") or ()) for item in items]
    return float(np.mean([1 / n if n else 0.0 for n in counts])) if counts else 0.0


def draw(
    n: int, references: int, *, resamples: int = RESAMPLES, seed: int = SEED
) -> tuple[Floats, NDArray[np.int64]]:
    """How often each resample holds each item (B, n), and which references it holds (B, K)."""
    random = np.random.Generator(np.random.PCG64(seed))
    counts = random.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
    return counts, random.integers(0, references, size=(resamples, references))


def judge(drawn: Floats) -> tuple[float, tuple[float, float], float, float]:
    """Mean of the resampled differences, its interval, its one-sided lower bound, and p: the
    smallest q for which twice the mean less the 1 - q quantile is not below 0."""
    mean = float(drawn.mean())
    low, bound, high = (2 * mean - float(np.quantile(drawn, q)) for q in (0.975, 0.95, 0.025))
    p = (1 + int((drawn >= 2 * mean).sum())) / (1 + len(drawn))
    return mean, (low, high), bound, p


def differences(
    original: Floats, twin: Floats, chance: float, counts: Floats, picks: NDArray[np.int64]
) -> Floats:
    """Score of the first model on the benchmark minus the expected one, for each resample.

    original, twin (1 + K, n) hold the model and its K references; counts (B, n), picks (B, K)."""
    total = counts.sum(axis=1)[:, None]
    y, x = counts @ original.T / total, counts @ twin.T / total
    rows = np.arange(len(counts))[:, None]
    guess = np.full((len(counts), 1), chance)
    known_x, known_y = (
        np.concatenate([guess, np.sort(means[rows, 1 + picks], axis=1)], axis=1) for means in (x, y)
    )
    return np.asarray(y[:, 0] - _expected(known_x, known_y, x[:, 0]), dtype=np.float64)


def _expected(x: Floats, y: Floats, at: Floats) -> Floats:
    """The spline through each row's points at one place; equal x are one point, their mean."""
    merged = [_merge(*row) for row in zip(x, y, strict=True)]
    sizes = np.array([len(points[0]) for points in merged])
    found = np.empty(len(x))
    for size in np.unique(sizes):
        rows = np.flatnonzero(sizes == size)
        knots, values, weights = (np.stack([merged[i][k] for i in rows]) for k in range(3))
        if size == 1:
            found[rows] = values[:, 0]
            continue
        fitted = values if size == 2 else fit_many(knots, values, weights)
        found[rows] = evaluate_many(knots, fitted, at[rows])
    return found


def _merge(x: Floats, y: Floats) -> tuple[Floats, Floats, Floats]:
    """Distinct x in order, the mean y of each, and how many points it stands for."""
    knots, where = np.unique(np.round(x, 12), return_inverse=True)
    weights = np.bincount(where).astype(np.float64)
    return knots, np.bincount(where, weights=y) / weights, weights


DETECTOR = Detector(
    name="constat",
    function=constat,
    effect="score above what the score on the twin predicts",
    statistic="Score on the benchmark minus the score that reference models of the same strength "
    "on the twin have (smoothing spline).",
    null_hypothesis="The model is to the references as they are to each other: its score on the "
    "benchmark follows from its score on the twin as theirs do.",
    guarantees="A bootstrap over items and references, so approximate: in simulation p was below "
    "0.05 for 1 to 4 of 100 clean models with 5 to 12 references, and for 8 of 100 where the twin "
    "suits some models better than others.",
    blind_spots="As good as its references: a leak that they share is invisible. Few references, "
    "all of one strength, say little about a stronger or weaker model. Blind to memory that earns "
    "no points.",
    papers=("arXiv 2405.16281",),
    needs=("scores", "twin_scores", "siblings"),
)
