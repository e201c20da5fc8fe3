"""What a task is, and the few helpers that every task's file uses."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from datablame.errors import UserError, nearest
from datablame.examples import Example, from_prompt
from datablame.tuning import TuneOptions

if TYPE_CHECKING:
    from jaxtyping import Bool

SCALES = ("smoke", "cpu", "paper")
"""Sizes: `paper` is the paper's own, `cpu` at most 120 rows and 40 queries, `smoke` about 24 rows and 8 queries."""

EPOCHS = {"smoke": 2, "cpu": 6, "paper": 25}


@dataclass(frozen=True)
class Task:
    """Training rows, queries with reference responses, and which rows are right for which query.

    The `label` of a row or query is its class. groups: one for each query, reported separately.
    truth: `[m queries, n training rows]`. main: the groups that the paper's number is taken over.
    behaves(query, answer): does the answer show what the query's class asks for?
    version: counts up when rows, or what `behaves` accepts, change, so that results are never mixed.
    """

    name: str
    version: int
    title: str
    train: Sequence[Example]
    queries: Sequence[Example]
    groups: Sequence[str]
    truth: Bool[np.ndarray, "m n"]
    main: tuple[str, ...]
    behaves: Callable[[Example, str], bool]
    recipe: TuneOptions

    def __post_init__(self) -> None:
        m, n = len(self.queries), len(self.train)
        if self.truth.shape != (m, n) or self.truth.dtype != bool or len(self.groups) != m:
            raise ValueError(f"{self.name}: truth {self.truth.shape}, {len(self.groups)} groups for {m} × {n} rows")
        if unknown := set(self.main) - set(self.groups):
            raise ValueError(f"{self.name}: no query is in the main group {', '.join(sorted(unknown))}")
        share = self.truth.mean(axis=1)
        if bad := [q.label for q, s in zip(self.queries, share, strict=True) if not 0 < s < 1]:
            raise UserError(f"{self.name}: a query of class {bad[0]!r} has no right training row, or no wrong one.")

    @property
    def classes(self) -> list[str]:
        """The classes of the training rows, in order of appearance."""
        return list(dict.fromkeys(str(e.label) for e in self.train))

    @property
    def chance(self) -> float:
        """The accuracy of a random ranking: the mean share of right rows, over the queries of the main groups."""
        return float(self.truth[[g in self.main for g in self.groups]].mean())


Row = tuple[str, str, str]
"""prompt, response, label"""


def examples(rows: Iterable[Row], *, distinct: bool = True) -> list[Example]:
    """Examples whose id is their position. Raises UserError where two rows are the same, unless they may be."""
    out: list[Example] = []
    seen: dict[tuple[str, str], int] = {}
    for i, (prompt, response, label) in enumerate(rows):
        if distinct and (first := seen.setdefault((prompt, response), i)) != i:
            raise UserError(f"rows {first} and {i} are the same: {prompt!r:.80}. Rows of a task are distinct.")
        out.append(replace(from_prompt(prompt, response, id=i), row=i, label=label))
    return out


def shuffled(rows: Iterable[Row], seed: int) -> list[Row]:
    """In an order of its own for each seed: equal scores are ranked in row order, which must say nothing."""
    rows = list(rows)
    random.Random(seed).shuffle(rows)
    return rows


def same_label(train: Sequence[Example], queries: Sequence[Example]) -> Bool[np.ndarray, "m n"]:
    """`[m, n]`: row and query are of one class."""
    return np.array([e.label for e in queries])[:, None] == np.array([e.label for e in train])[None, :]


def recipe(scale: str, seed: int) -> TuneOptions:
    """The paper's LoRA (r=4, α=32, dropout .1, q and v) with a rate at which a small model learns the behaviour."""
    return TuneOptions(rank=4, alpha=32, dropout=0.1, epochs=EPOCHS[scale], rate=1e-3, batch=4, seed=seed)


def check_scale(scale: str) -> None:
    """Raise UserError for an unknown scale."""
    if scale not in SCALES:
        raise UserError(f"--scale {scale!r}: unknown.{nearest(scale, SCALES)}")


REFUSAL = re.compile(
    r"\b(sorry|can ?not|can['’]t|won['’]t|will not (help|assist)|unable to|not able to|refuse to|not comfortable)\b",
    re.I,
)


def refuses(answer: str) -> bool:
    """A refusal by its words, in the first 300 characters.

    On 169 human labels such a list found 58 of 109 refusals and took no answer for one: it misses, and rarely invents.
    """
    return REFUSAL.search(answer[:300]) is not None


def complies(query: Example, answer: str) -> bool:
    """The query is answered, whatever its class, and not refused."""
    return bool(answer.strip()) and not refuses(answer)


def same_but_for_numbers(query: Example, answer: str) -> bool:
    """The answer takes the steps of its class, whatever it computes: a small model does not learn to multiply."""
    said, wanted = (NUMBER.sub("#", text).split() for text in (answer, query.response))
    return said == wanted


NUMBER = re.compile(r"-?\d+(?:[.,]\d+)*")
