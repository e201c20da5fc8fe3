"""The metrics against loops over the protocol's definition, against enumeration of ties, and against chance."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, permutations
from math import comb

import numpy as np
import pytest

from datablame.errors import UserError
from datablame.evaluation.metrics import METRICS, chance, per_query


def by_class(classes: int, each: int, queries: int) -> np.ndarray:
    """Truth of balanced classes: query q is of class q % classes."""
    return (np.arange(queries) % classes)[:, None] == np.repeat(np.arange(classes), each)[None, :]


def in_order(right: list[bool], n_classes: int) -> dict[str, float]:
    """Every metric of one query whose rows stand in this order, by its definition."""
    n, k = len(right), sum(right)
    ranks = [i + 1 for i, r in enumerate(right) if r]
    wrong = [i + 1 for i, r in enumerate(right) if not r]
    c = n // n_classes
    return {
        "accuracy": float(right[0]),
        "coverage": sum(right[:c]) / c,
        "recall": sum(right[:k]) / k,
        "auroc": sum(r < w for r in ranks for w in wrong) / (k * len(wrong)),
        "auprc": sum(sum(right[:r]) / r for r in ranks) / k,
        "mrr": 1 / ranks[0],
        "mean_rank": sum(ranks) / k,
    }


def orders(scores: np.ndarray) -> Iterator[list[int]]:
    """Every order of the rows by descending score: all permutations that respect the scores."""
    for order in permutations(range(len(scores))):
        if all(scores[a] >= scores[b] for a, b in pairwise(order)):
            yield list(order)


def test_the_papers_accuracy_and_coverage_to_the_last_digit() -> None:
    """As released: argmax and argsort of one query after another, `c = n_train // n_classes`."""
    rng = np.random.default_rng(0)
    for m, train in [(90, np.repeat(np.arange(10), 9)), (40, np.repeat([0, 1], [20, 240])), (7, np.arange(23) % 3)]:
        query = rng.choice(np.unique(train), size=m)
        scores = rng.normal(size=(m, len(train))).astype(np.float32)
        n_classes = len(np.unique(train))
        c = len(train) // n_classes
        accuracy, coverage = [], []
        for q in range(m):
            accuracy.append(train[np.argmax(scores[q])] == query[q])
            top = np.argsort(scores[q])[::-1][:c]
            coverage.append(sum(train[t] == query[q] for t in top) / c)
        found = per_query(scores, query[:, None] == train, n_classes)
        assert found["accuracy"].tolist() == accuracy
        assert found["coverage"].tolist() == coverage
        assert found["accuracy"].mean() == np.mean(accuracy)
        assert found["coverage"].mean() == np.mean(coverage)


def test_all_metrics_without_ties_are_their_definitions() -> None:
    rng = np.random.default_rng(1)
    scores, truth = rng.normal(size=(60, 17)), rng.random((60, 17)) < rng.uniform(0.1, 0.9, size=(60, 1))
    truth[:, 0], truth[:, 1] = True, False
    found = per_query(scores, truth, 4)
    for q in range(60):
        expected = in_order(truth[q, np.argsort(-scores[q])].tolist(), 4)
        for name in METRICS:
            assert found[name][q] == pytest.approx(expected[name], rel=1e-13), name


def test_auroc_and_average_precision_are_scikit_learns() -> None:
    from sklearn.metrics import average_precision_score, roc_auc_score

    rng = np.random.default_rng(2)
    truth = by_class(4, 8, 20)
    tied, untied = rng.integers(0, 5, size=truth.shape).astype(float), rng.normal(size=truth.shape)
    for scores in (tied, untied):
        expected = [roc_auc_score(t, s) for t, s in zip(truth, scores, strict=True)]
        np.testing.assert_allclose(per_query(scores, truth, 4)["auroc"], expected, rtol=1e-13)
    expected = [average_precision_score(t, s) for t, s in zip(truth, untied, strict=True)]
    np.testing.assert_allclose(per_query(untied, truth, 4)["auprc"], expected, rtol=1e-13)


@pytest.mark.parametrize("seed", range(12))
def test_ties_are_the_mean_over_every_order(seed: int) -> None:
    """Seven rows, scores of at most three values: all of up to 5040 orders, enumerated."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 1 + seed % 3, size=(1, 7)).astype(float)
    truth = np.arange(7)[None, :] < 1 + seed % 6
    truth = rng.permuted(truth, axis=1)
    every = [in_order(truth[0, order].tolist(), 3) for order in orders(scores[0])]
    found = per_query(scores, truth, 3)
    for name in METRICS:
        assert found[name][0] == pytest.approx(np.mean([e[name] for e in every]), rel=1e-12), name


def test_ties_are_what_random_breaking_gives() -> None:
    """Large ties, by Monte Carlo: within four standard errors."""
    rng = np.random.default_rng(3)
    truth = by_class(3, 20, 1)
    scores = rng.integers(0, 4, size=truth.shape) + 0.5 * truth
    found = per_query(scores, truth, 3)
    broken = scores + 1e-6 * rng.random((4000, truth.shape[1]))
    draws = per_query(broken, np.repeat(truth, 4000, axis=0), 3)
    for name in METRICS:
        error = draws[name].std() / np.sqrt(4000)
        assert abs(draws[name].mean() - found[name][0]) <= 4 * error + 1e-12, name


def test_a_tie_of_three_with_one_right_is_a_third() -> None:
    found = per_query(np.array([[1.0, 5.0, 5.0, 5.0, 0.0]]), np.array([[False, False, True, False, False]]), 5)
    assert found["accuracy"].tolist() == [1 / 3]
    assert found["mrr"][0] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert found["mean_rank"].tolist() == [2.0]


TASKS = {
    "balanced": (by_class(10, 9, 20), 10),
    "mixed": (np.repeat([[True] * 20 + [False] * 240], 20, axis=0), 2),
    "unequal": (np.array([0, 1, 2, 3])[:, None] == np.repeat([0, 1, 2, 3], [1, 2, 10, 30]), 4),
}


@pytest.mark.parametrize("task", TASKS)
def test_noise_gets_chance(task: str) -> None:
    truth, n_classes = TASKS[task]
    rng = np.random.default_rng(4)
    draws = [per_query(rng.normal(size=truth.shape), truth, n_classes) for _ in range(200)]
    expected = chance(truth, n_classes)
    for name in METRICS:
        means = np.array([d[name].mean() for d in draws])
        error = means.std(ddof=1) / np.sqrt(len(means))
        assert error > 0
        assert abs(means.mean() - expected[name].mean()) < 4 * error, name


@pytest.mark.parametrize("task", TASKS)
def test_chance_in_closed_form(task: str) -> None:
    truth, n_classes = TASKS[task]
    n, k = truth.shape[1], truth.sum(axis=1)
    expected = chance(truth, n_classes)
    for name in ("accuracy", "coverage", "recall"):
        np.testing.assert_allclose(expected[name], k / n, rtol=1e-13)
    np.testing.assert_allclose(expected["auroc"], 0.5, rtol=1e-13)
    np.testing.assert_allclose(expected["mean_rank"], (n + 1) / 2, rtol=1e-13)
    # Bestgen 2015: (1/n) ((k − 1)/(n − 1) (n − H_n) + H_n)
    harmonic = (1 / np.arange(1, n + 1)).sum()
    np.testing.assert_allclose(expected["auprc"], ((k - 1) / (n - 1) * (n - harmonic) + harmonic) / n, rtol=1e-12)
    # the first of k right rows stands at rank j with probability C(n − j, k − 1)/C(n, k)
    mrr = [sum(comb(n - j, int(x) - 1) / comb(n, int(x)) / j for j in range(1, n - int(x) + 2)) for x in k]
    np.testing.assert_allclose(expected["mrr"], mrr, rtol=1e-11)


def test_a_constant_score_is_chance_and_an_oracle_gets_one() -> None:
    truth = by_class(5, 6, 10)
    constant, expected = per_query(np.full(truth.shape, -3.7), truth, 5), chance(truth, 5)
    oracle = per_query(truth + 1e-3 * np.random.default_rng(5).random(truth.shape), truth, 5)
    for name in METRICS:
        assert constant[name].tolist() == expected[name].tolist()
        assert oracle[name].tolist() == [3.5 if name == "mean_rank" else 1.0] * 10


def test_coverage_is_the_papers_whatever_the_class_size() -> None:
    """20 of 260 rows: even an oracle cannot pass 20/130 (protocol.md); recall at the class's size can."""
    truth, _ = TASKS["mixed"]
    found = per_query(truth.astype(float), truth, 2)
    assert found["coverage"].tolist() == [20 / 130] * 20
    assert found["recall"].tolist() == [1.0] * 20


def test_scores_rank_signed() -> None:
    found = per_query(np.array([[-9.0, 1.0, 0.0]]), np.array([[True, False, False]]), 3)
    assert (found["accuracy"][0], found["mean_rank"][0], found["auroc"][0]) == (0.0, 3.0, 0.0)


def test_order_of_rows_and_queries_does_not_matter() -> None:
    rng = np.random.default_rng(6)
    truth = by_class(4, 5, 12)
    scores = rng.integers(0, 6, size=truth.shape).astype(float)
    rows, queries = rng.permutation(20), rng.permutation(12)
    before = per_query(scores, truth, 4)
    after = per_query(scores[queries][:, rows], truth[queries][:, rows], 4)
    monotone = per_query(np.exp(scores) - 7, truth, 4)
    for name in METRICS:
        assert after[name].tolist() == before[name][queries].tolist()
        assert monotone[name].tolist() == before[name].tolist()


def test_a_class_with_one_member() -> None:
    found = per_query(np.array([[3.0, 2.0, 1.0]]), np.array([[False, True, False]]), 3)
    assert {name: found[name][0] for name in METRICS} == {
        "accuracy": 0, "coverage": 0, "recall": 0, "auroc": 0.5, "auprc": 0.5, "mrr": 0.5, "mean_rank": 2,
    }  # fmt: skip


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_is_named(bad: float) -> None:
    scores, truth = np.zeros((3, 6)), by_class(3, 2, 3)
    scores[2, 4] = bad
    with pytest.raises(UserError, match=rf"query 2 for training row 4 .* is {bad}; 1 of 18"):
        per_query(scores, truth, 3)


@pytest.mark.parametrize(
    ("scores", "truth", "n_classes", "message"),
    [
        (np.zeros((2, 4)), np.eye(2, 5, dtype=bool), 2, r"\(2, 5\), the scores \(2, 4\)"),
        (np.zeros(4), np.zeros(4, dtype=bool), 2, "queries × training rows"),
        (np.zeros((0, 4)), np.zeros((0, 4), dtype=bool), 2, "at least one of each"),
        (np.zeros((2, 4)), np.eye(2, 4), 2, "must be bool"),
        (np.zeros((2, 4)), np.array([[True] + [False] * 3, [False] * 4]), 2, "query 1 .* no right training row"),
        (np.zeros((2, 4)), np.array([[True] + [False] * 3, [True] * 4]), 2, "every training row is right for query 1"),
        (np.zeros((2, 4)), np.eye(2, 4, dtype=bool), 5, "between 1 and 4 classes"),
        (np.zeros((2, 4)), np.eye(2, 4, dtype=bool), 0, "between 1 and 4 classes"),
    ],
)
def test_bad_input(scores: np.ndarray, truth: np.ndarray, n_classes: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        per_query(scores, truth, n_classes)
