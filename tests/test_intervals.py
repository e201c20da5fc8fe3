"""Intervals hold the truth as often as they say, p-values are uniform under the null, Holm against its procedure."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from datablame.evaluation import intervals as module
from datablame.evaluation.intervals import DRAWS, flip_test, holm, interval, intervals


def held(seeds: float, queries: float, rest: float, *, s: int, same_queries: bool, crossed: bool) -> float:
    """How often a 95 % interval holds the mean 0 of normal values with these standard deviations, 40 queries each."""
    rng = np.random.default_rng(0)
    values = seeds * rng.normal(size=(400, s, 1)) + queries * rng.normal(size=(400, 1 if crossed else s, 40))
    found = intervals(values + rest * rng.normal(size=(400, s, 40)), same_queries=same_queries)
    return float(np.mean([low <= 0 <= high for _, low, high in found]))


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
    found = interval(values[None])
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


def test_an_interval_is_repeatable_and_a_constant_has_no_width() -> None:
    values = np.random.default_rng(4).random((3, 20))
    assert interval(values) == interval(values)
    assert interval(np.ones((3, 20))) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(("s", "same_queries"), [(1, True), (3, True), (3, False)])
def test_many_queries_are_drawn_in_parts(s: int, same_queries: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one seed the draws are those taken at once; with several they are others."""
    values = np.random.default_rng(5).exponential(size=(2, s, 200))
    at_once = np.array(intervals(values, same_queries=same_queries))
    monkeypatch.setattr(module, "FEW", 7)
    parts = list(module._parts(s, 200, same_queries))
    assert sum(map(len, parts)) == DRAWS
    assert 0.9 * DRAWS * 7 < parts[0].size <= DRAWS * 7
    np.testing.assert_allclose(np.concatenate(parts).sum(axis=1), 1)
    in_parts = np.array(intervals(values, same_queries=same_queries))
    if s == 1:
        np.testing.assert_allclose(in_parts, at_once, rtol=1e-13)
        np.testing.assert_array_equal(np.concatenate(parts), module._kept(1, 200, True)[0])
    assert not (in_parts[:, 1:] == at_once[:, 1:]).all() or s == 1
    np.testing.assert_allclose(in_parts, at_once, atol=0.05 * float(np.ptp(at_once, axis=1).min()))


def test_p_values_are_uniform_under_the_null() -> None:
    """Two methods that differ by noise which the seeds of a query share: Kolmogorov and Smirnov see nothing."""
    rng = np.random.default_rng(5)
    shared = rng.standard_t(4, size=(400, 1, 25))
    found = flip_test((shared + rng.normal(size=(400, 3, 25)) - rng.normal(size=(400, 3, 25))).mean(axis=1))
    assert scipy.stats.kstest(found, "uniform").pvalue > 0.01
    assert 0.02 <= np.mean(found <= 0.05) <= 0.09


def test_the_test_is_scipys() -> None:
    """All 2^10 flips enumerated by SciPy; and with many queries its random ones."""
    rng = np.random.default_rng(6)
    for m, shift in [(10, 0.5), (40, 0.25)]:
        d = (rng.normal(size=(3, m)) + shift - rng.normal(size=(3, m))).mean(axis=0)
        expected = scipy.stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=20_000, rng=rng)
        assert flip_test(d[None], draws=20_000)[0] == pytest.approx(expected.pvalue, abs=0.015)


def test_differences_seen_and_not_seen() -> None:
    rng = np.random.default_rng(7)
    a = rng.random((1, 40))
    assert flip_test(a - a)[0] == 1.0
    assert flip_test(np.full((1, 40), 0.1))[0] == 1 / 10_000
    assert flip_test(a - 0.4)[0] == flip_test(0.4 - a)[0] < 1.0
    assert flip_test(np.ones((1, 3)))[0] == pytest.approx(0.25, abs=0.02)  # 2 of 2^3
    together = np.concatenate([a - 0.4, a - 0.5, 0.6 - a])
    assert flip_test(together).tolist() == [flip_test(d[None])[0] for d in together]


def test_drawn_flips_can_fall_below_all_flips() -> None:
    """12 queries that agree have 2/2^12 among all flips."""
    p = flip_test(np.ones((1, 12)), draws=99_999)[0]
    assert p < 2 / 2**12
    assert p == pytest.approx(2 / 2**12, abs=2e-4)


def test_seeds_of_one_query_are_flipped_together() -> None:
    """Ten seeds of two queries are two witnesses, unless every seed has queries of its own."""
    d = np.ones((10, 2))
    assert flip_test(d.mean(axis=0)[None])[0] == pytest.approx(0.5, abs=0.03)
    assert flip_test(d.reshape(1, 20))[0] < 0.001


def test_equal_sums_count_as_equal_in_spite_of_rounding() -> None:
    """Tenths, whose sums differ in the last digit by their order, against the same numbers times ten."""
    tenfold = np.array([1, -2, 3, 1, -1, 2, 3, -2, 1, 2, 3, -1])
    expected = scipy.stats.permutation_test((tenfold,), np.sum, permutation_type="samples", n_resamples=np.inf)
    assert flip_test(tenfold[None] / 10, draws=50_000)[0] == pytest.approx(expected.pvalue, abs=0.008)


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
