"""Twin benchmark and ConStat: gains that do not carry over to the twin are found, others pass."""

import numpy as np
import pytest
from scipy.interpolate import make_smoothing_spline
from scipy.stats import kstest

from mergelab import statistics
from mergelab.detectors import constat, smoothing, twin
from mergelab.detectors.base import Evidence, Probed
from mergelab.errors import NotAvailable

SIMULATIONS = 500


def evidence(scores, siblings=(), items=None):
    """Scores as {model: (original, twin)}, each a list of item scores or {id: score}."""

    def by_id(values):
        if isinstance(values, dict):
            return values
        return {f"i{k:03}": float(value) for k, value in enumerate(values)}

    return Evidence(
        "bench",
        Probed("m", {}),
        Probed("base", {}),
        tuple(Probed(name, {}) for name in siblings),
        {name: {"original": by_id(o), "twin": by_id(t)} for name, (o, t) in scores.items()},
        items or {},
    )


# --- difference in differences ---------------------------------------------------------------


def test_the_gap_by_hand():
    found = twin.twin(
        evidence({"m": ([1, 1, 1, 0], [0, 1, 0, 0]), "base": ([0, 1, 0, 0], [0] * 4)})
    )
    assert found.effect == pytest.approx((1 - 1 + 1 + 0) / 4)
    assert found.details["means"] == {
        "model": {"original": 0.75, "twin": 0.25},
        "base": {"original": 0.25, "twin": 0.0},
    }
    assert found.p == statistics.sign_flip_p([1, -1, 1, 0], greater=True)
    assert found.ci95[0] <= found.effect <= found.ci95[1]
    assert (found.n_suspects, found.n_controls) == (4, 0)


def test_items_that_one_score_lacks_are_left_out_and_controls_stand_beside():
    scores = {
        "m": ({"a": 1.0, "b": 1.0, "c": 1.0, "x": 0.0, "y": 1.0}, dict.fromkeys("abxy", 0.0)),
        "base": (dict.fromkeys("abcxy", 0.0), dict.fromkeys("abcxyz", 0.0)),
    }
    items = {"suspects": [{"id": "a"}], "controls": [{"id": "x"}, {"id": "y"}]}
    found = twin.twin(evidence(scores, items=items))
    assert (found.effect, found.n_suspects, found.n_controls) == (1.0, 2, 2)
    assert found.details["controls"]["effect"] == 0.5
    assert found.details["controls"]["n"] == 2


def test_too_few_common_items_are_no_finding():
    with pytest.raises(NotAvailable, match="'m' and 'base' share 1 items"):
        twin.twin(evidence({"m": ([1], [1]), "base": ([1], [0])}))


def answers(random, n, *, leaked=0.0, right=0.25):
    """0/1 scores of a base and of its fine-tune: the twin agrees with the original on most items,
    the fine-tune with the base on 9 of 10; it knows the answers of the leaked share by heart."""

    def changed(before, share):
        return np.where(random.random(n) < share, random.random(n) < right, before)

    base = random.random(n) < right
    tuned = changed(base, 0.05 / (right * (1 - right)))
    base_twin = changed(base, 0.2)
    tuned_twin = changed(base_twin, 0.05 / (right * (1 - right)))
    tuned[: round(leaked * n)] = True
    return {"m": (tuned, tuned_twin), "base": (base, base_twin)}


@pytest.fixture(scope="module")
def clean_cells():
    random = np.random.default_rng(1)
    sizes = [(60, 0.25), (100, 0.4), (200, 0.6), (100, 0.25)]
    cells = [sizes[i % len(sizes)] for i in range(SIMULATIONS)]
    return [twin.twin(evidence(answers(random, n, right=right))) for n, right in cells]


def test_on_clean_cells_the_interval_covers_zero_and_p_is_valid(clean_cells):
    covered = np.mean([cell.ci95[0] <= 0 <= cell.ci95[1] for cell in clean_cells])
    p = np.array([cell.p for cell in clean_cells])
    assert covered >= 0.95
    assert kstest(p, "uniform", alternative="greater").pvalue > 0.05
    assert np.mean(p <= 0.01) <= 0.02


def test_leaked_answers_of_a_fifth_of_the_items_are_found():
    random = np.random.default_rng(2)
    cells = [twin.twin(evidence(answers(random, 200, leaked=0.2))) for _ in range(100)]
    assert np.mean([cell.ci95[0] > 0 for cell in cells]) >= 0.95
    assert np.mean([cell.p < 0.01 for cell in cells]) >= 0.9


# --- smoothing splines -----------------------------------------------------------------------


def curves(seed=0, rows=20, knots=8):
    random = np.random.default_rng(seed)
    x = np.sort(random.random((rows, knots)), axis=1)
    y = np.sort(x + 0.1 * random.normal(size=x.shape), axis=1)
    return x, y, random.integers(1, 4, size=x.shape).astype(float)


@pytest.mark.parametrize("penalty", [1e-5, 1e-3, 1e-1])
def test_roughness_and_values_are_those_of_scipys_smoothing_spline(penalty):
    x, y, w = curves()
    system = penalty * smoothing.roughness(x) + w[:, :, None] * np.eye(x.shape[1])
    fitted = np.linalg.solve(system, (w * y)[:, :, None])[:, :, 0]
    at = x[:, 0] + 0.37 * (x[:, -1] - x[:, 0])
    ours = smoothing.evaluate_many(x, fitted, at)
    for row in range(len(x)):
        spline = make_smoothing_spline(x[row], y[row], w=w[row], lam=penalty)
        assert fitted[row] == pytest.approx(spline(x[row]), abs=1e-7)
        assert ours[row] == pytest.approx(float(spline(at[row])), abs=1e-7)


def test_cross_validation_finds_a_penalty_no_worse_than_scipys():
    x, y, w = curves(seed=3, rows=10, knots=10)
    ours = smoothing.fit_many(x, y, w)
    rough = smoothing.roughness(x)
    for row in range(len(x)):
        theirs = make_smoothing_spline(x[row], y[row], w=w[row])(x[row])
        scores = []
        for penalty in np.logspace(-12, 4, 321):
            hat = np.linalg.solve(np.diag(w[row]) + penalty * rough[row], np.diag(w[row]))
            fit = hat @ y[row]
            freedom = (1 - np.trace(hat) / len(fit)) ** 2
            gcv = (w[row] * (y[row] - fit) ** 2).sum() / freedom
            scores.append((gcv, np.abs(fit - ours[row]).max(), np.abs(fit - theirs).max()))
        gcv_ours = min(scores, key=lambda score: score[1])[0]
        gcv_theirs = min(scores, key=lambda score: score[2])[0]
        assert gcv_ours <= gcv_theirs * 1.1


def test_straight_lines_stay_straight_and_go_on_beyond_the_knots():
    x = np.array([[0.0, 0.2, 0.3, 0.7, 0.9, 1.0], [0.0, 0.1, 0.4, 0.5, 0.6, 0.8]])
    fitted = smoothing.fit_many(x, 2 * x + 1, np.ones_like(x))
    assert fitted == pytest.approx(2 * x + 1)
    for at in (-0.5, 0.45, 1.5):
        there = smoothing.evaluate_many(x, fitted, np.full(2, at))
        assert there == pytest.approx(np.full(2, 2 * at + 1))


def test_four_points_are_fitted_by_the_line_of_least_squares():
    x, y, w = curves(knots=4)
    fitted = smoothing.fit_many(x, y, w)
    for row in range(len(x)):
        line = np.polynomial.Polynomial.fit(x[row], y[row], 1, w=np.sqrt(w[row]))
        assert fitted[row] == pytest.approx(line(x[row]))


# --- ConStat ---------------------------------------------------------------------------------

SIBLINGS = ("s1", "s2", "s3", "s4")


def family(random, n, *, references=5, leaked=0.0, harder=0.5):
    """0/1 scores (models, n) on benchmark and twin; the first model is judged by the others."""
    skill = random.normal(0, 0.8, size=(references + 1, 1))
    odds = skill - random.normal(0, 1, size=n)
    original = random.random(odds.shape) < 1 / (1 + np.exp(-odds))
    reworded = random.random(odds.shape) < 1 / (1 + np.exp(harder - odds))
    original[0, : round(leaked * n)] = True
    return original.astype(float), reworded.astype(float)


def judged(random, n, **kwargs):
    original, reworded = family(random, n, **kwargs)
    counts, picks = constat.draw(n, len(original) - 1, resamples=200)
    return constat.judge(constat.differences(original, reworded, 0.0, counts, picks))


def test_the_expected_score_follows_the_references():
    def model(right, right_twin, n=200):
        return np.arange(n) < right * n, np.arange(n) < right_twin * n

    levels = {"base": 0.2, "s1": 0.3, "s2": 0.4, "s3": 0.5, "s4": 0.6}
    scores = {name: model(level, level / 2) for name, level in levels.items()}
    found = constat.constat(evidence({**scores, "m": model(0.65, 0.2)}, SIBLINGS))
    assert found.effect == pytest.approx(0.65 - 0.4, abs=0.02)
    assert found.details["references"] == ["base", *SIBLINGS]
    assert found.ci95[0] < found.details["lower_bound_95"] < found.effect < found.ci95[1]
    assert found.p < 0.01
    clean = constat.constat(evidence({**scores, "m": model(0.4, 0.2)}, SIBLINGS))
    assert clean.effect == pytest.approx(0, abs=0.02)
    assert clean.p > 0.1


def test_chance_is_one_over_the_number_of_choices():
    random = np.random.default_rng(4)
    original, reworded = family(random, 60)
    names = ("m", "base", *SIBLINGS)
    scores = {name: (original[k], reworded[k]) for k, name in enumerate(names)}
    items = [{"id": f"i{k:03}", "options": {"choices": list("abcd")}} for k in range(60)]
    found = constat.constat(evidence(scores, SIBLINGS, {"suspects": items}))
    assert found.details["chance"] == 0.25


def test_fewer_than_five_references_are_no_finding():
    original, reworded = family(np.random.default_rng(5), 60)
    names = ("m", "base", *SIBLINGS)
    scores = {name: (original[k], reworded[k]) for k, name in enumerate(names)}
    with pytest.raises(NotAvailable, match=r"needs 5 reference models .* and has 4"):
        constat.constat(evidence(scores, SIBLINGS[:3]))
    with pytest.raises(NotAvailable, match="and has 4"):
        constat.constat(evidence(scores | {"s4": (original[5], [])}, SIBLINGS))


def test_a_metric_beyond_one_is_no_finding():
    scores = {name: ([1.5, 2.5], [1.0, 2.0]) for name in ("m", "base", *SIBLINGS)}
    with pytest.raises(NotAvailable, match="between 0 and 1"):
        constat.constat(evidence(scores, SIBLINGS))


def test_the_order_of_siblings_and_items_does_not_matter():
    original, reworded = family(np.random.default_rng(6), 40)
    names = ("m", "base", *SIBLINGS)
    scores = {name: (original[k], reworded[k]) for k, name in enumerate(names)}
    turned = {
        name: tuple({f"i{k:03}": o[k] for k in reversed(range(40))} for o in both)
        for name, both in reversed(scores.items())
    }
    one = constat.constat(evidence(scores, SIBLINGS))
    assert one == constat.constat(evidence(turned, SIBLINGS[::-1]))


@pytest.mark.parametrize("references", [5, 10])
def test_clean_members_of_a_family_are_seldom_above_expectation(references):
    random = np.random.default_rng(7)
    found = [judged(random, 100, references=references) for _ in range(SIMULATIONS // 2)]
    p = np.array([p for _, _, _, p in found])
    for level in (0.01, 0.05, 0.1, 0.25):
        assert np.mean(p <= level) <= level + 2 * np.sqrt(level * (1 - level) / len(p))
    assert np.mean([low <= 0 <= high for _, (low, high), _, _ in found]) >= 0.95


def test_a_large_leak_stands_out_from_the_family():
    random = np.random.default_rng(8)
    found = [judged(random, 300, references=10, leaked=0.4) for _ in range(60)]
    assert np.mean([p < 0.05 for _, _, _, p in found]) >= 0.8
