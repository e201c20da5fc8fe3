"""How sure the numbers are: bootstrap intervals, paired tests between two methods, Holm's correction.

`values` is `[s seeds, m queries]`: one metric of one method. With one seed pass `[1, m]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float

    Values = Float[np.ndarray, "s m"]

DRAWS = 9_999
"""Bootstrap samples of an interval, sign flips of a test."""
TABLE_DRAWS = 99_999
"""Sign flips of a test in a table: Holm's correction multiplies the smallest p, 1/(1 + flips), by up to 1,600 tests."""
TAILS = [(1 - 0.95) / 2, (1 + 0.95) / 2]
"""Quantiles between which a 95 % interval lies. The first is .025 plus rounding, as in the committed numbers."""
FEW = 1_000
"""So many values have the weights of all draws at once, 80 MB, which are kept; more have them in parts of that size.

The benchmark has 120. Its tables are committed, and products taken in parts may differ in their last digit.
"""


class Interval(NamedTuple):
    """A mean and its interval."""

    value: float
    low: float
    high: float


def interval(values: Values, *, same_queries: bool = True) -> Interval:
    """Mean over seeds and queries with its hierarchical bootstrap interval (percentiles; two factors: Owen 2007).

    Each draw takes s seeds with replacement, then m queries with replacement. `same_queries`: column q is the same
    query under every seed, so one draw of queries serves all seeds (what is hard about a query does not average out
    over seeds); otherwise each drawn seed draws queries of its own. With one seed only queries are drawn.
    The interval knows of no more variation than it sees: it has no width where all values are equal. With three seeds
    it is too narrow where seeds matter: in simulations with 40 queries it held the truth in 95 % of cases where only
    queries differ, 80 % where seeds differ as much as queries do, 72 % where only seeds do. So show the seeds too.
    """
    return intervals(_checked(values)[None], same_queries=same_queries)[0]


def intervals(values: Float[np.ndarray, "k s m"], *, same_queries: bool = True) -> list[Interval]:
    """`interval` of each of k, all from the same draws: a table has hundreds over the same seeds and queries."""
    k, s, m = values.shape
    flat = np.asarray(values, dtype=np.float64).reshape(k, s * m)
    found = flat.mean(axis=1)
    parts = (_kept if s * m <= FEW else _parts)(s, m, same_queries)
    around = np.concatenate([weights @ (flat - found[:, None]).T for weights in parts])
    low, high = found + np.quantile(around, TAILS, axis=0)
    return [Interval(float(v), float(a), float(b)) for v, a, b in zip(found, low, high, strict=True)]


def interval_of_tasks(tasks: Sequence[Values], same_queries: Sequence[bool] | None = None) -> Interval:
    """Mean over tasks of their means, and its interval: tasks drawn, then seeds, then queries.

    tasks: `[s, m]` of each. same_queries: as in `interval`, of each; None: they differ by seed. Of one task it is that
    task's `interval`. With three tasks it says how much the mean depends on which of them one happens to look at, and
    no more.
    """
    return intervals_of_tasks([_checked(v)[None] for v in tasks], same_queries)[0]


def intervals_of_tasks(
    tasks: Sequence[Float[np.ndarray, "k s m"]], same_queries: Sequence[bool] | None = None
) -> list[Interval]:
    """`interval_of_tasks` of each of k, all from the same draws. tasks: `[k, s, m]` of each, m its own.

    Seeds that have not as many queries each are drawn as tasks of one seed: seeds, then queries.
    """
    same = same_queries or [False] * len(tasks)
    if len(tasks) == 1:
        return intervals(tasks[0], same_queries=same[0])
    rng = np.random.default_rng(0)
    means = np.zeros((DRAWS, len(tasks[0])))
    for _ in tasks:
        chosen = rng.integers(len(tasks), size=DRAWS)
        for i, values in enumerate(tasks):
            here, (k, s, m) = chosen == i, values.shape
            means[here] += _weights(s, m, same[i], rng, int(here.sum())) @ values.reshape(k, s * m).T / len(tasks)
    found = np.mean([values.mean(axis=(1, 2)) for values in tasks], axis=0)
    low, high = np.quantile(means, TAILS, axis=0)
    return [Interval(float(v), float(a), float(b)) for v, a, b in zip(found, low, high, strict=True)]


@lru_cache(maxsize=4)
def _kept(s: int, m: int, same_queries: bool) -> list[Float[np.ndarray, "draws s*m"]]:
    """`_parts`, kept for the next interval over as many seeds and queries."""
    return list(_parts(s, m, same_queries))


def _parts(s: int, m: int, same_queries: bool) -> Iterator[Float[np.ndarray, "part s*m"]]:
    """The `_weights` of DRAWS samples, at most DRAWS * FEW numbers at a time (but at least a sample).

    With one seed the random numbers are the same in parts as at once.
    """
    rng = np.random.default_rng(0)
    part = min(DRAWS, max(1, DRAWS * FEW // (s * m)))
    for start in range(0, DRAWS, part):
        yield _weights(s, m, same_queries, rng, min(part, DRAWS - start))


def _weights(
    s: int, m: int, same_queries: bool, rng: np.random.Generator, draws: int
) -> Float[np.ndarray, "draws s*m"]:
    """What each value counts in the mean of each bootstrap sample; rows sum to 1."""
    every = np.arange(draws)[:, None]
    if same_queries:
        seeds = rng.multinomial(s, np.full(s, 1 / s), size=draws)
        flat = every * m + rng.integers(m, size=(draws, m))
        queries = np.bincount(flat.ravel(), minlength=draws * m).reshape(draws, m)
        return (seeds[:, :, None] * queries[:, None, :]).reshape(draws, s * m) / (s * m)
    counts = np.zeros(draws * s * m)
    for _ in range(s):
        at = every * (s * m) + rng.integers(s, size=draws)[:, None] * m
        flat = at + rng.integers(m, size=(draws, m))
        counts += np.bincount(flat.ravel(), minlength=counts.size)
    return counts.reshape(draws, s * m) / (s * m)


def flip_test(differences: Float[np.ndarray, "k n"], *, draws: int = DRAWS) -> Float[np.ndarray, " k"]:
    """Two-sided p-values of k pairs of methods, from their differences on n queries, all under the same sign flips.

    If two methods are exchangeable on a query, the sign of their difference is a coin's. Only the size of a sum counts:
    p = (1 + flips at least as far from 0 as what was seen) / (1 + draws), so never below 1/(1 + draws). All flips
    taken once would leave it at 2^(1 − n) or more; these are drawn, and their p lies about that, above or below.
    Where seeds share their queries, give each query's mean over the seeds, so that they are flipped together: they are
    no independent witnesses. The test speaks about other queries *with these seeds*: three seeds alone could never show
    a difference at 5 % (their smallest p is .25). `interval` of the differences includes the seeds.
    """
    d = np.asarray(differences, dtype=np.float64)
    seen = np.abs(d.sum(axis=1)) - 1e-12 * np.abs(d).sum(axis=1)  # equal sums in another order differ by rounding
    rng, far = np.random.default_rng(0), np.zeros(len(d))
    for start in range(0, draws, DRAWS):
        signs = rng.integers(0, 2, size=(min(DRAWS, draws - start), d.shape[1]), dtype=np.int8) * 2.0 - 1
        far += np.count_nonzero(np.abs(signs @ d.T) >= seen, axis=0)
    return (1 + far) / (1 + draws)


def holm(p: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Holm's step-down adjustment over all p-values of a table, in its shape: below α, significant at family-wise α.

    Sorted p₍₁₎ ≤ … ≤ p₍ₖ₎ become `max_{i ≤ j} min(1, (k − i + 1) p₍ᵢ₎)` (Holm 1979).
    """
    p = np.asarray(p, dtype=np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("p-values must lie between 0 and 1; leave out cells without a test")
    flat = p.ravel()
    order = np.argsort(flat, kind="stable")
    stepped = np.maximum.accumulate(np.minimum(1.0, flat[order] * np.arange(flat.size, 0, -1)))
    adjusted = np.empty_like(flat)
    adjusted[order] = stepped
    return adjusted.reshape(p.shape)


def _checked(values: Values) -> Values:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or 0 in values.shape or not np.isfinite(values).all():
        raise ValueError(f"expected finite values [seeds, queries], at least one of each; found {values.shape}")
    return values
