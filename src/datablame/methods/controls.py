"""Controls: scores that know nothing of the fine-tuned model. A method must beat them to mean anything."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import numpy as np

from datablame.errors import UserError
from datablame.methods.base import Text, check_finite

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from datablame.methods.base import Blocks

_WORD = re.compile(r"\w+|[^\w\s]")


def words(text: str) -> list[str]:
    """Words and punctuation marks, case kept."""
    return _WORD.findall(text)


@dataclass
class Random:
    """Uniform noise from `seed`: the level of chance."""

    needs: ClassVar[str] = "texts"
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise UserError(f"random: seed={self.seed!r}; use a whole number from 0.")

    def fit(self, train: Sequence[Text]) -> Self:
        """Count the rows."""
        self.n = len(train)
        return self

    def score(self, query: Sequence[Text]) -> Float[Tensor, "m n"]:
        """`[m, n]` between 0 and 1."""
        import torch

        return torch.rand(len(query), self.n, generator=torch.Generator().manual_seed(self.seed))


@dataclass
class BM25:
    """BM25 (Lucene's variant, as bm25s computes it) of the query's words in the training rows.

    text: which side of row and query is compared: `prompt`, `response` or `both`.
    """

    needs: ClassVar[str] = "texts"
    text: Literal["prompt", "response", "both"] = "both"

    def __post_init__(self) -> None:
        if self.text not in ("prompt", "response", "both"):
            raise UserError(f"bm25: text={self.text!r}; use prompt, response or both.")

    def fit(self, train: Sequence[Text]) -> Self:
        """Build the inverted index."""
        import bm25s

        rows = [self._tokens(t) for t in train]
        self.n, self.vocabulary = len(rows), {w for row in rows for w in row}
        self.index = bm25s.BM25()
        if self.vocabulary:
            self.index.index(rows, show_progress=False)
        return self

    def score(self, query: Sequence[Text]) -> Float[Tensor, "m n"]:
        """`[m, n]`, at least 0; 0 where no word is shared."""
        import torch

        scores = np.zeros((len(query), self.n), dtype=np.float32)
        for i, text in enumerate(query):
            known = [w for w in self._tokens(text) if w in self.vocabulary]
            if known:
                scores[i] = self.index.get_scores(known)
        return torch.from_numpy(scores)

    def _tokens(self, t: Text) -> list[str]:
        text = {"prompt": t.prompt, "response": t.response, "both": f"{t.prompt}\n{t.response}"}[self.text]
        return [w for w in words(text.lower()) if w[0].isalnum()]


@dataclass
class Verbatim:
    """Length, in words, of the longest span of the query's response that stands in the training row."""

    needs: ClassVar[str] = "texts"

    def fit(self, train: Sequence[Text]) -> Self:
        """Number the words and lay all rows end to end."""
        self.numbers: dict[str, int] = {}
        rows = [
            [self.numbers.setdefault(w, len(self.numbers)) for w in words(f"{t.prompt}\n{t.response}")] for t in train
        ]
        # A -1 between rows ends every span there.
        self.starts = np.cumsum([0] + [len(r) + 1 for r in rows])[:-1]
        self.line = np.array([w for r in rows for w in (-1, *r)], dtype=np.int64)
        return self

    def score(self, query: Sequence[Text]) -> Float[Tensor, "m n"]:
        """`[m, n]`, whole numbers of words."""
        import torch

        scores = np.zeros((len(query), len(self.starts)), dtype=np.float32)
        for i, text in enumerate(query):
            best = np.zeros(len(self.line), dtype=np.int64)
            for run in _runs([self.numbers.get(w, -2) for w in words(text.response)], self.line):
                best = np.maximum(best, run)
            if len(self.starts):
                scores[i] = np.maximum.reduceat(best, self.starts)
        return torch.from_numpy(scores)


def _runs(a: Sequence[int], b: Int[np.ndarray, " b"]) -> Iterator[Int[np.ndarray, " b"]]:
    """For every position of `a`: at each position of `b`, how long a span ends at both."""
    run = np.zeros(len(b), dtype=np.int64)
    for word in a:
        run = np.where(b == word, np.concatenate(([0], run[:-1])) + 1, 0) if len(b) else run
        yield run


def shared_spans(response: str, row: str, least: int = 3) -> list[tuple[int, int]]:
    """Character ranges [a, b) of `response` whose words (at least `least`) stand in `row`, longest first cut."""
    found = list(_WORD.finditer(response))
    numbers: dict[str, int] = {}
    b = np.array([numbers.setdefault(w, len(numbers)) for w in words(row)], dtype=np.int64)
    runs = _runs([numbers.get(m.group(), -2) for m in found], b)
    covered = np.zeros(len(found), dtype=bool)
    for end, run in enumerate(runs):
        length = int(run.max()) if len(run) else 0
        if length >= least:
            covered[end - length + 1 : end + 1] = True
    spans: list[tuple[int, int]] = []
    for k, match in enumerate(found):
        if covered[k] and k and covered[k - 1]:
            spans[-1] = (spans[-1][0], match.end())
        elif covered[k]:
            spans.append(match.span())
    return spans


@dataclass
class Length:
    """Labelled tokens of the training row, the same for every query."""

    needs: ClassVar[str] = "length"

    def fit(self, train: Blocks) -> Self:
        """Take `{"length": [n, 1]}`. Raises UserError for a length that is not finite."""
        ((name, lengths),) = train.items()
        self.lengths = check_finite(name, lengths).flatten()
        return self

    def score(self, query: Blocks) -> Float[Tensor, "m n"]:
        """`[m, n]` with equal rows, in tokens."""
        (lengths,) = query.values()
        return self.lengths.expand(len(lengths), -1).clone()
