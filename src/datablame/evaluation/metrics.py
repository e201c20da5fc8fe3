"""How well scores find the right training rows: pure functions of (scores, truth), one value per query.

`scores` is `[m queries, n training rows]`, higher = more responsible, ranked signed, never by absolute value; `truth`
is a bool matrix of the same shape: which training rows are right for a query. Every function raises UserError for a
score that is not finite, for shapes that differ, and for a query with no right row or with right rows only.

Ties favour nobody: the value is the mean over all orders of the rows that share a score, in closed form. So a constant
score gets exactly chance, and without ties nothing is averaged. The paper's code takes tied rows as `argmax` and
`argsort` happen to leave them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from datablame.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    Matrix = Float[np.ndarray, "m n"]
    Truth = Bool[np.ndarray, "m n"]
    PerQuery = Float[np.ndarray, " m"]

METRICS = ("accuracy", "coverage", "recall", "auroc", "auprc", "mrr", "mean_rank")
"""The keys of `per_query`. Higher is better, except `mean_rank`."""


def per_query(scores: Matrix, truth: Truth, n_classes: int) -> dict[str, PerQuery]:
    """All METRICS, each `[m]`, from one sorting of the scores."""
    ranked = _ranked(scores, truth)
    return {
        "accuracy": ranked.accuracy(),
        "coverage": ranked.coverage(n_classes),
        "recall": ranked.recall(),
        "auroc": ranked.auroc(),
        "auprc": ranked.auprc(),
        "mrr": ranked.mrr(),
        "mean_rank": ranked.mean_rank(),
    }


def coverage(scores: Matrix, truth: Truth, n_classes: int) -> PerQuery:
    """That of `per_query`, by itself."""
    return _ranked(scores, truth).coverage(n_classes)


def auroc(scores: Matrix, truth: Truth) -> PerQuery:
    """That of `per_query`, by itself."""
    return _ranked(scores, truth).auroc()


def chance(truth: Truth, n_classes: int) -> dict[str, PerQuery]:
    """What a random order of the training rows gets on average, exactly: METRICS, each `[m]`, to be averaged.

    A tie of all rows is a random order, so this is what a constant score gets: the share of right rows for accuracy,
    coverage and recall, 1/2 for AUROC, (n + 1)/2 for the mean rank, and the formulas above for AUPRC and MRR.
    """
    return per_query(np.zeros(np.shape(truth)), truth, n_classes)


# ---------------------------------------------------------------- rows in order of their score


class _Ranked(NamedTuple):
    """For each query and each rank, the tie that stands there; `k` right rows in all.

    size, right: rows in the tie, and right ones. above, right_above: rows, and right ones, above the tie.
    """

    k: Int[np.ndarray, " m"]
    size: Int[np.ndarray, "m n"]
    right: Int[np.ndarray, "m n"]
    above: Int[np.ndarray, "m n"]
    right_above: Int[np.ndarray, "m n"]

    @property
    def right_here(self) -> Matrix:
        """Probability that the row at a rank is right."""
        return self.right / self.size

    def accuracy(self) -> PerQuery:
        """Whether the highest row is right (the paper's accuracy); of a tie, the share of right rows in it."""
        return self.right_here[:, 0]

    def coverage(self, n_classes: int) -> PerQuery:
        """The paper's coverage: share of right rows among the top `c = n // n_classes`, whatever the class sizes."""
        m, n = self.size.shape
        if not 1 <= n_classes <= n:
            raise UserError(f"coverage needs between 1 and {n} classes for {n} training rows, found {n_classes}.")
        c = n // n_classes
        return self._right_among_top(np.full(m, c)) / c

    def recall(self) -> PerQuery:
        """Share of right rows among the top k, where k is the number of right rows of that query."""
        return self._right_among_top(self.k) / self.k

    def auroc(self) -> PerQuery:
        """How often a right row stands above a wrong one, ties as one half: Mann and Whitney's U over k(n − k)."""
        return 1 - (self.mean_rank() - (self.k + 1) / 2) / (self.size.shape[1] - self.k)

    def auprc(self) -> PerQuery:
        """Average precision: the precision at the rank of each right row, averaged over the right rows.

        In a tie of s rows, r of them right, below a rows of which R are right, the row at place j (from 1) is right
        with probability r/s, and then R + 1 + (j − 1)(r − 1)/(s − 1) right rows are expected down to it, at rank a + j.
        """
        rank = np.arange(1, self.size.shape[1] + 1)
        j = rank - self.above
        others = (j - 1) * (self.right - 1) / np.maximum(self.size - 1, 1)
        return (self.right_here * (self.right_above + 1 + others) / rank).sum(axis=1) / self.k

    def mrr(self) -> PerQuery:
        """Reciprocal of the rank of the first right row; its mean over queries is the mean reciprocal rank.

        In the tie of s rows that holds the first of them, r right and a rows above, the first right one stands at
        place j with probability `r/(s − j + 1) · Π_{i<j−1} (s − r − i)/(s − i)`, at rank a + j.
        """
        first = (self.right > 0).argmax(axis=1)[:, None]
        s, r, a = (np.take_along_axis(x, first, axis=1) for x in (self.size, self.right, self.above))
        i = np.arange(self.size.shape[1])
        left = np.maximum(s - i, 1)
        none_yet = np.cumprod(np.maximum(s - r - i, 0) / left, axis=1)
        none_before = np.concatenate([np.ones_like(none_yet[:, :1]), none_yet[:, :-1]], axis=1)
        return (none_before * (r / left) / (a + i + 1)).sum(axis=1)

    def mean_rank(self) -> PerQuery:
        """Mean rank of the right rows, 1 = highest; tied rows share the middle of their ranks."""
        return (self.right_here * np.arange(1, self.size.shape[1] + 1)).sum(axis=1) / self.k

    def _right_among_top(self, c: Int[np.ndarray, " m"]) -> PerQuery:
        """Expected number of right rows among the top c; the last tie gives its hypergeometric mean."""
        last = (c - 1)[:, None]
        size, right, above, right_above = (np.take_along_axis(x, last, axis=1)[:, 0] for x in self[1:])
        return right_above + (c - above) * right / size


def _ranked(scores: Matrix, truth: Truth) -> _Ranked:
    scores, truth = check(scores, truth)
    order = np.argsort(-scores, axis=1, kind="stable")
    s = np.take_along_axis(scores, order, axis=1)
    m, n = s.shape
    breaks = s[:, 1:] != s[:, :-1]
    edge = np.ones((m, 1), dtype=bool)
    rank = np.arange(n)
    above = np.maximum.accumulate(np.where(np.hstack([edge, breaks]), rank, 0), axis=1)
    ends = np.where(np.hstack([breaks, edge]), rank + 1, n)
    below = np.minimum.accumulate(ends[:, ::-1], axis=1)[:, ::-1]
    counted = np.zeros((m, n + 1), dtype=np.int64)
    np.cumsum(np.take_along_axis(truth, order, axis=1), axis=1, out=counted[:, 1:])
    right_above = np.take_along_axis(counted, above, axis=1)
    right = np.take_along_axis(counted, below, axis=1) - right_above
    return _Ranked(truth.sum(axis=1), below - above, right, above, right_above)


def check(scores: Matrix, truth: Truth) -> tuple[Matrix, Truth]:
    """Both as arrays, scores as float64. Raises UserError for what the module's docstring names."""
    scores, truth = np.asarray(scores, dtype=np.float64), np.asarray(truth)
    if scores.ndim != 2 or 0 in scores.shape:
        raise UserError(
            f"scores must be queries × training rows, at least one of each; found the shape {scores.shape}."
        )
    if truth.shape != scores.shape:
        raise UserError(f"the truth has the shape {truth.shape}, the scores {scores.shape}: they must be the same.")
    if truth.dtype != np.bool_:
        raise UserError(f"the truth must be bool (which training rows are right), found {truth.dtype}.")
    if not np.isfinite(scores).all():
        q, t = np.argwhere(~np.isfinite(scores))[0]
        count = int((~np.isfinite(scores)).sum())
        raise UserError(
            f"the score of query {q} for training row {t} (both counted from 0) is {scores[q, t]}; {count} of "
            f"{scores.size} scores are not finite. Every pair needs a finite score."
        )
    k = truth.sum(axis=1)
    if (k == 0).any():
        raise UserError(f"query {int((k == 0).argmax())} (counted from 0) has no right training row. Leave it out.")
    if (k == truth.shape[1]).any():
        q = int((k == truth.shape[1]).argmax())
        raise UserError(f"every training row is right for query {q} (counted from 0): there is nothing to find.")
    return scores, truth
