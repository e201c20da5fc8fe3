"""Any tool's score matrix against labels: right training rows are those of the query's class."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from datablame.errors import UserError, nearest
from datablame.evaluation.intervals import intervals
from datablame.evaluation.metrics import METRICS, chance, per_query

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def evaluate(
    scores: Float[np.ndarray, "m n"],
    train_labels: Sequence[Hashable],
    query_labels: Sequence[Hashable],
    *,
    lower_is_better: bool = False,
) -> dict[str, dict[str, float]]:
    """For each of `METRICS`: `value` (mean over queries), `low`, `high` (95 % bootstrap over queries), `chance`.

    scores: queries × training rows, higher = more responsible; with `lower_is_better` they are negated. The number of
    classes is that of the training labels. Ties, and what the metrics are: see `metrics.py`.
    Raises UserError for labels that do not fit the scores, a query class absent from training, a training set of one
    class, and scores that are not finite. A class with a single training row is fine.
    """
    scores = np.asarray(scores, dtype=np.float64)
    check_counts("the scores", scores.shape, len(query_labels), len(train_labels))
    truth = same_class(train_labels, query_labels)
    n_classes = len(set(train_labels))
    values = per_query(-scores if lower_is_better else scores, truth, n_classes)
    expected = chance(truth, n_classes)
    found = intervals(np.array([values[name] for name in METRICS])[:, None])
    return {
        name: {**i._asdict(), "chance": float(expected[name].mean())} for name, i in zip(METRICS, found, strict=True)
    }


def same_class(train_labels: Sequence[Hashable], query_labels: Sequence[Hashable]) -> Bool[np.ndarray, "m n"]:
    """Truth by class: `[m, n]`, True where query and training row have the same label.

    Raises UserError where a label is missing, a query's class is absent from training, or there is only one class.
    """
    train_labels, query_labels = list(train_labels), list(query_labels)
    for what, labels in (("training row", train_labels), ("query", query_labels)):
        if None in labels:
            raise UserError(f"{what} {labels.index(None)} (counted from 0) has no label. Every row needs one.")
    codes = {label: code for code, label in enumerate(dict.fromkeys(train_labels))}
    for q, label in enumerate(query_labels):
        if label not in codes:
            raise UserError(
                f"query {q} (counted from 0) has the class {label!r}, which no training row has. Leave the query out, "
                f"with its line of scores, or mend its label.{nearest(str(label), map(str, codes))}"
            )
    if len(codes) == 1:
        raise UserError(f"all training rows are of the class {next(iter(codes))!r}: there is nothing to find.")
    train = np.array([codes[label] for label in train_labels])
    query = np.array([codes[label] for label in query_labels])
    return query[:, None] == train[None, :]


def check_counts(where: str, shape: tuple[int, ...], queries: int, rows: int) -> None:
    """Raise UserError unless a score matrix has a line per query label and a column per training label."""
    if shape == (queries, rows):
        return
    found = " × ".join(map(str, shape))
    if shape == (rows, queries):
        raise UserError(
            f"{where}: {found} scores for {queries} query labels and {rows} training labels look transposed. Lines "
            "must be queries and columns training rows: transpose them (in NumPy: scores.T)."
        )
    raise UserError(
        f"{where}: {found} scores do not fit {queries} query labels and {rows} training labels. There must be a line "
        "for each query and a column for each training row."
    )
