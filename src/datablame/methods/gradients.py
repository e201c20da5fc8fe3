"""Similarity of gradients: GradDot and GradCos, and the gradient's norm as a control."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from datablame.errors import UserError
from datablame.methods.base import check_blocks, check_finite, unit_rows

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from datablame.methods.base import Blocks


class _OnGradients:
    """Keeps the training gradients and walks over blocks, one in memory at a time."""

    needs: ClassVar[str] = "gradients"
    train: Blocks

    def fit(self, train: Blocks) -> Self:
        """Take `{block: [n, D]}`. Raises UserError for an empty mapping."""
        if not train:
            raise UserError("there are no gradient blocks; this index holds hidden states only (use --blocks).")
        self.train = train
        return self

    def pairs(self, query: Blocks) -> Iterator[tuple[Float[Tensor, "n D"], Float[Tensor, "m D"]]]:
        """(G, V) of each block, checked."""
        check_blocks(self.train, query)
        for block in self.train:
            yield check_finite(block, self.train[block]), check_finite(block, query[block])


@dataclass
class GradDot(_OnGradients):
    """`Σ_b V Gᵀ`: the dot product of gradients (GradSim of the paper, its section 3).

    A score is the drop of the query's loss, to first order, per unit of step along the row's gradient.
    It depends on the arbitrary scale between LoRA's A and B.
    """

    def score(self, query: Blocks) -> Float[Tensor, "m n"]:
        """`[m, n]`; in squared loss per squared weight."""
        total = None
        for g, v in self.pairs(query):
            q = v @ g.T
            total = q if total is None else total + q
        assert total is not None  # fit refused an empty mapping
        return total


@dataclass
class GradCos(_OnGradients):
    """Cosine of gradients, from -1 to 1.

    over: `block` averages the cosines of the blocks (free of the scale between A and B), `row` takes the
        cosine of the whole row. A zero gradient has cosine 0 with everything.
    """

    over: Literal["block", "row"] = "block"

    def __post_init__(self) -> None:
        if self.over not in ("block", "row"):
            raise UserError(f"gradcos: over={self.over!r}; use block or row.")

    def score(self, query: Blocks) -> Float[Tensor, "m n"]:
        """`[m, n]`, between -1 and 1."""
        if self.over == "block":
            return sum(unit_rows(v) @ unit_rows(g).T for g, v in self.pairs(query)) / len(self.train)  # type: ignore[return-value]
        # Sums over blocks of very different size: in float64.
        parts = [((v @ g.T).double(), _squares(v), _squares(g)) for g, v in self.pairs(query)]
        dot, vv, gg = (sum(part[1:], part[0]) for part in zip(*parts, strict=True))
        norms = (vv[:, None] * gg[None, :]).sqrt()
        return (dot / norms).where(norms > 0, 0.0).to(next(iter(query.values())).dtype)


@dataclass
class GradNorm(_OnGradients):
    """Control: `‖g_i‖` over all blocks, the same for every query."""

    def score(self, query: Blocks) -> Float[Tensor, "m n"]:
        """`[m, n]` with equal rows."""
        squares = [_squares(g) for g, _ in self.pairs(query)]
        norms = sum(squares[1:], squares[0]).sqrt()
        v = next(iter(query.values()))
        return norms.to(v.dtype).expand(len(v), -1).clone()


def _squares(x: Float[Tensor, "n D"]) -> Float[Tensor, " n"]:
    """Squared length of each row, in float64."""
    import torch

    return torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).square()
