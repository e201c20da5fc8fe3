"""Intervals hold the truth as often as they say, p-values are uniform under the null, Holm against its procedure."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from datablame.evaluation.intervals import compare, holm, interval


def held(seeds: float, queries: float, rest: float, *, s: int, same_queries: bool, crossed: bool) -> float:
    """How often a 95 % interval holds the mean 0 of normal values with these standard deviations, 40 queries each."""
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(400):
        values = seeds * rng.normal(size=(s, 1)) + queries * rng.normal(size=(1 if crossed else s, 40))
        values = values + rest * rng.normal(size=(s, 40))
        found = interval(values, same_queries=same_queries, seed=i, draws=499)
        hits += found.low <= 0 <= found.high
    return hits / 400


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """The standard error of each share is .011."""
    assert 0.90 <= held(0, 1, 0, s=1, same_queries=True, crossed=True) <= 0.98
    assert 0.90 <= held(0, 1, 0.5, s=3, same_queries=True, crossed=True) <= 0.98
    assert held(0, 1, 0.5, s=3, same_queries=False, crossed=False) >= 0.93
    assert 0.86 <= held(0.5, 1, 0.5, s=12, same_queries=True, crossed=True) <= 0.98


def test_the_same_queries_under_every_seed_are_not_more_queries() -> None:
    """Drawing them separately for each seed would be sure of itself without reason."""
    assert held(0, 1, 0.2, s=3, same_queries=False, crossed=True) < 0.85


def test_one_seed_is_scipys_bootstrap() -> None:
    values = np.random.default_rng(1).exponential(size=60)
    found = interval(values[None], draws=20_000)
    expected = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert found.value == values.mean()
    assert found.low == pytest.approx(expected.low, abs=0.01)
    assert found.high == pytest.approx(expected.high, abs=0.01)


def test_seeds_that_differ_widen_the_interval() -> None:
    rng = np.random.default_rng(3)
    values = rng.normal(size=(3, 40))
    values -= values.mean(axis=1, keepdims=True)
    apart = values + np.array([[-1.0], [0.0], [1.0]])
    for same_queries in (True, False):
        narrow, wide = (interval(v, same_queries=same_queries) for v in (values, apart))
        assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_an_interval_is_repeatable_and_moves_with_its_seed_and_level() -> None:
    values = np.random.default_rng(4).random((3, 20))
    assert interval(values) == interval(values)
    assert interval(values, seed=1) != interval(values)
    assert interval(values, level=0.5).low > interval(values).low
    assert interval(np.ones((3, 20))) == (1.0, 1.0, 1.0)


def test_p_values_are_uniform_under_the_null() -> None:
    """Two methods that differ by noise which the seeds of a query share: Kolmogorov and Smirnov see nothing."""
    rng = np.random.default_rng(5)
    found = []
    for i in range(400):
        shared = rng.standard_t(4, size=(1, 25))
        a = shared + rng.normal(size=(3, 25))
        found.append(compare(a, rng.normal(size=(3, 25)), seed=i, draws=399).p)
    assert scipy.stats.kstest(found, "uniform").pvalue > 0.01
    assert 0.02 <= np.mean(np.array(found) <= 0.05) <= 0.09


def test_the_test_is_scipys() -> None:
    """All 2^10 flips enumerated by SciPy; and with many queries its random ones."""
    rng = np.random.default_rng(6)
    for m, shift in [(10, 0.5), (40, 0.25)]:
        a, b = rng.normal(size=(3, m)) + shift, rng.normal(size=(3, m))
        expected = scipy.stats.permutation_test(
            ((a - b).mean(axis=0),), np.mean, permutation_type="samples", n_resamples=20_000, rng=rng
        )
        found = compare(a, b, draws=20_000)
        assert found.p == pytest.approx(expected.pvalue, abs=0.015)
        assert found.value == pytest.approx(expected.statistic)
        assert (found.low, found.high) == interval(a - b, draws=20_000)[1:]


def test_differences_seen_and_not_seen() -> None:
    rng = np.random.default_rng(7)
    a = rng.random((3, 40))
    assert compare(a, a).p == 1.0
    assert compare(a + 0.1, a).p == 1 / 10_000
    assert compare(a, a + 0.1).value == pytest.approx(-0.1)
    assert compare(a + 0.1, a).p == compare(a, a + 0.1).p
    assert compare(np.array([[1.0, 1.0, 1.0]]), np.zeros((1, 3))).p == pytest.approx(0.25, abs=0.02)  # 2 of 2^3


def test_seeds_of_one_query_are_flipped_together() -> None:
    """Ten seeds of two queries are two witnesses, unless every seed has queries of its own."""
    a, b = np.ones((10, 2)), np.zeros((10, 2))
    assert compare(a, b).p == pytest.approx(0.5, abs=0.03)
    assert compare(a, b, same_queries=False).p < 0.001


def test_equal_sums_count_as_equal_in_spite_of_rounding() -> None:
    """Tenths, whose sums differ in the last digit by their order, against the same numbers times ten."""
    tenfold = np.array([1, -2, 3, 1, -1, 2, 3, -2, 1, 2, 3, -1])
    expected = scipy.stats.permutation_test((tenfold,), np.sum, permutation_type="samples", n_resamples=np.inf)
    found = compare(tenfold[None] / 10, np.zeros((1, 12)), draws=50_000)
    assert found.p == pytest.approx(expected.pvalue, abs=0.008)


def holm_by_procedure(p: list[float]) -> list[float]:
    """The smallest level on a fine grid at which the step-down procedure rejects each hypothesis."""
    levels = np.linspace(0, 1, 4001)
    adjusted = [1.0] * len(p)
    for level in reversed(levels):
        order = sorted(range(len(p)), key=lambda i: p[i])
        for step, i in enumerate(order):
            if p[i] > level / (len(p) - step):
                break
            adjusted[i] = float(level)
    return adjusted


def test_holm_is_the_step_down_procedure() -> None:
    rng = np.random.default_rng(9)
    for k in (1, 2, 7, 30):
        p = rng.random(k) ** 3
        np.testing.assert_allclose(holm(p), holm_by_procedure(p.tolist()), atol=1 / 4000)
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])  # Wikipedia's


def test_holm_keeps_the_shape_and_refuses_what_is_no_p_value() -> None:
    table = np.array([[0.2, 0.001], [0.01, 0.9]])
    assert holm(table).shape == (2, 2)
    assert holm(table).ravel().tolist() == holm(table.ravel()).tolist()
    for bad in (np.nan, -0.1, 1.1):
        with pytest.raises(ValueError, match="between 0 and 1"):
            holm(np.array([0.5, bad]))


def test_bad_values() -> None:
    with pytest.raises(ValueError, match="seeds, queries"):
        interval(np.ones(5))
    with pytest.raises(ValueError, match="finite"):
        interval(np.array([[1.0, np.nan]]))
    with pytest.raises(ValueError, match="differ"):
        compare(np.ones((1, 5)), np.ones((2, 5)))
