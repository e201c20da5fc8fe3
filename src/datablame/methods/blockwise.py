"""What all methods on gradients share: the walk over blocks, centring, aggregation over blocks, RelatIF.

Blocks are read one at a time and none is kept, so that a store larger than memory can be scored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

from datablame.errors import UserError
from datablame.methods.base import check_blocks, check_finite
from datablame.methods.gram import product, without_common

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float
    from torch import Tensor

    from datablame.methods.base import Blocks

    Pair = tuple[str, Float[Tensor, "n D"], Float[Tensor, "m D"]]

RELATIF = (None, "l", "theta")


class OnGradients:
    """Keeps the training gradients and walks over blocks, one in memory at a time."""

    needs: str = "gradients"
    train: Blocks
    dtype: torch.dtype
    """Of the queries' features, known after the first block; scores come back in it."""
    eps: float
    """Precision of the training rows' features, known likewise."""

    def fit(self, train: Blocks) -> Self:
        """Take `{block: [n, D]}`. Raises UserError for an empty mapping."""
        if not train:
            raise UserError("there are no gradient blocks; this index holds hidden states only (use --blocks).")
        self.train = train
        return self

    def pairs(self, query: Blocks) -> Iterator[Pair]:
        """(block, G, V) of each block, checked."""
        import torch

        check_blocks(self.train, query)
        for block in self.train:
            g, v = check_finite(block, self.train[block]), check_finite(block, query[block])
            if g.shape[1] != v.shape[1]:
                raise UserError(f"block {block!r}: {g.shape[1]} numbers a training row, {v.shape[1]} a query.")
            if not len(g):
                raise UserError(f"block {block!r}: there are no training rows.")
            self.dtype, self.eps = v.dtype, torch.finfo(g.dtype).eps
            yield block, g, v

    def finish(self, scores: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        """The scores in the features' dtype. Raises UserError when one is not finite."""
        scores = scores.to(self.dtype)
        if not scores.isfinite().all():
            raise self._error(
                f"a score is not finite: the gradients are too large or too small for "
                f"{str(self.dtype).removeprefix('torch.')}. Scale them, or index with --dtype float64."
            )
        return scores

    def _check_above_0(self, option: str, *values: object) -> None:
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise self._error(f"{option}={value!r}; use a number above 0.")

    def _error(self, what: str) -> UserError:
        name = "exact-block" if type(self).__name__ == "ExactBlock" else type(self).__name__.lower()
        return UserError(f"{name}: {what}")


class Sweeps:
    """For methods with a damping, above 0: scores are a sweep of one; a method gives `sweep`, which checks them all."""

    damping: float

    def score(self, query: Blocks) -> Float[Tensor, "m n"]:
        """`[m, n]`."""
        return self.sweep(query, [self.damping])[self.damping]

    def sweep(self, query: Blocks, dampings: Sequence[float]) -> dict[float, Float[Tensor, "m n"]]:
        """`{damping: [m, n]}` for several dampings, at little more than the cost of one."""
        raise NotImplementedError


@dataclass(kw_only=True)
class ByExtra(Sweeps, OnGradients):
    """What methods share whose curvature is captured as an extra.

    damping: λ over a mean eigenvalue that the method names. Above 0.
    relatif: `l` divides a training row's scores by `√(g_i H⁻¹ g_i)`.
    """

    damping: float = 0.1
    relatif: Literal["l"] | None = None

    def __post_init__(self) -> None:
        if self.relatif not in (None, "l"):
            raise self._error(f"relatif={self.relatif!r}; use l.")
        self._check_above_0("damping", self.damping)


@dataclass(kw_only=True)
class GradientMethod(OnGradients):
    """Options of every method on gradients.

    center: how many common directions are projected out of training and query rows, in each block (`true` = 1).
        They are the strongest directions of the training rows, the mean not subtracted: gradients share a
        direction, but not its amplitude and sign, so subtracting a mean would leave most of it. Estimated from
        the training rows alone, because queries of one class have their class in common. Damping is relative to
        what is left.
    aggregate: over blocks. `sum`; `rank`, the mean over blocks of (rank − ½)/n, between 0 and 1, ties sharing
        their mean rank; `vote`, the share of blocks in which fewer than a tenth of the rows (at least one) score
        higher. Rank and vote see every block alike, whatever the size of its gradients; a block whose scores are
        all 0 adds nothing.
    gauge: `stored`, the gradients of LoRA's A and B as the adapter holds them; `balanced`, as they would be in the
        gauge of the SVD of BA. The method then `needs` gradients in that gauge, as `gauge.Balanced` turns them.
    """

    center: bool | int = False
    aggregate: Literal["sum", "rank", "vote"] = "sum"
    gauge: Literal["stored", "balanced"] = "stored"

    def __post_init__(self) -> None:
        self._one_of("gauge", ("stored", "balanced"))
        if self.gauge == "balanced":
            self.needs = "gradients-balanced"
        self._one_of("aggregate", ("sum", "rank", "vote"))
        if not isinstance(self.center, int) or self.center < 0:
            raise self._error(f"center={self.center!r}; use true, false or a whole number of directions.")

    def pairs(self, query: Blocks) -> Iterator[Pair]:
        """(block, G, V) of each block, checked and centred."""
        for block, g, v in super().pairs(query):
            yield (block, *without_common(g, v, int(self.center))) if self.center else (block, g, v)

    def _dot(self, v: Float[Tensor, "m D"], g: Float[Tensor, "n D"]) -> Float[Tensor, "m n"]:
        """`V Gᵀ`, in float64 where ranks are taken of it: see `seven_digits`."""
        return (v @ g.T).double() if self.aggregate == "sum" else product(v, g)

    def _one_of(self, option: str, allowed: tuple[str | None, ...]) -> None:
        if getattr(self, option) not in allowed:
            *most, last = [a for a in allowed if a is not None]
            raise self._error(f"{option}={getattr(self, option)!r}; use {', '.join(most)} or {last}.")


class Total:
    """The blocks' scores, aggregated as `GradientMethod` says, divided by RelatIF's norm where there is one.

    With `sum` the squared norms are summed over blocks before the root; with `rank` and `vote` every block is a
    method by itself and is divided by its own.
    """

    def __init__(self, aggregate: str) -> None:
        self.aggregate, self.blocks = aggregate, 0
        self.scores: Tensor | None = None
        self.norms: Tensor | None = None

    def add(self, scores: Float[Tensor, "m n"], norms: Float[Tensor, " n"] | None = None) -> None:
        """One block's scores and, for RelatIF, squared norms of the training rows."""
        self.blocks += 1
        if self.aggregate != "sum":
            scores, norms = divided(scores, norms), None
            by = mean_ranks if self.aggregate == "rank" else votes
            # Where all scores are 0 the block has no opinion.
            scores = by(seven_digits(scores)) if scores.any() else scores
        self.scores = scores.clone() if self.scores is None else self.scores.add_(scores)
        if norms is not None:
            self.norms = norms.clone() if self.norms is None else self.norms.add_(norms)

    def result(self) -> Float[Tensor, "m n"]:
        """The aggregate over all blocks."""
        assert self.scores is not None  # fit refused an empty mapping
        return divided(self.scores, self.norms) if self.aggregate == "sum" else self.scores / self.blocks


def divided(scores: Float[Tensor, "m n"], norms: Float[Tensor, " n"] | None) -> Float[Tensor, "m n"]:
    """Each training row's scores over the root of its `norms`; 0 where that is 0."""
    if norms is None:
        return scores
    return (scores / norms.clamp_min(0).sqrt()).where(norms > 0, 0.0)


def seven_digits(scores: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    """Each query's scores over the largest, rounded to float32: without it rounding breaks the ties of equal rows."""
    import torch

    largest = scores.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
    return (scores / largest).float()


def mean_ranks(scores: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    """(rank − ½)/n of each row's entries, lowest first, ties sharing their mean rank."""
    import torch
    from scipy.stats import rankdata

    return torch.from_numpy((rankdata(scores.numpy(force=True), axis=1) - 0.5) / scores.shape[1])


def votes(scores: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    """1 where fewer than a tenth of the row's entries (at least one) are higher, else 0."""
    k = -(-scores.shape[1] // 10)
    return (scores >= scores.topk(k, dim=1).values[:, -1:]).double()
