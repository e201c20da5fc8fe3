"""Similarity of gradients: GradDot and GradCos, and the gradient's norm as a control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from datablame.methods.base import rounding, unit_rows
from datablame.methods.blockwise import RELATIF, GradientMethod, OnGradients, Total
from datablame.methods.gram import product, squares

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jaxtyping import Bool, Float
    from torch import Tensor

    from datablame.methods.base import Blocks


@dataclass(kw_only=True)
class GradDot(GradientMethod):
    """`Σ_b V Gᵀ`: the dot product of gradients (GradSim of the paper, its section 3).

    A score is the drop of the query's loss, to first order, per unit of step along the row's gradient.
    It depends on the arbitrary scale between LoRA's A and B.

    relatif: `l` or `theta` divides by the training row's gradient norm over all blocks (both are the same here:
        the inverse Hessian is the identity). center, aggregate, gauge: see GradientMethod.
    """

    relatif: Literal["l", "theta"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._one_of("relatif", RELATIF)

    def score(self, query: Blocks) -> Float[Tensor, "m n"]:
        """`[m, n]`; in squared loss per squared weight."""
        total = Total(self.aggregate)
        for _, g, v in self.pairs(query):
            total.add(self._dot(v, g), squares(g) if self.relatif else None)
        return self.finish(total.result())


@dataclass
class GradCos(GradientMethod):
    """Cosine of gradients, from -1 to 1.

    over: `block` averages the cosines of the blocks (free of the scale between A and B), `row` takes the
        cosine of the whole row. A zero gradient has cosine 0 with everything, and so has a block's gradient that
        is nothing but rounding (`base.rounding`).
    center, aggregate, gauge: see GradientMethod; the `sum` over blocks is divided by their number.
    """

    over: Literal["block", "row"] = "block"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._one_of("over", ("block", "row"))
        if self.over == "row" and self.aggregate != "sum":
            raise self._error(f"over=row has no blocks for aggregate={self.aggregate}; use over=block.")

    def score(self, query: Blocks) -> Float[Tensor, "m n"]:
        """`[m, n]`, between -1 and 1."""
        if self.over == "block":
            lengths: dict[str, Tensor] = {}
            total = self._by_block(query, {}, lengths)
            m = len(next(iter(query.values())))
            noise = rounding(lengths, {b: x[m:].max() for b, x in lengths.items()}, self.eps)
            if any(x.any() for x in noise.values()):  # rare, and known after all blocks only
                total = self._by_block(query, noise, lengths)
            mean = total.blocks if self.aggregate == "sum" else 1
            return self.finish(total.result() / mean)
        # Sums over blocks of very different size, and no second norm to save small ones: in float64.
        parts = [(product(v, g), squares(v), squares(g)) for _, g, v in self.pairs(query)]
        dot, vv, gg = (sum(part[1:], part[0]) for part in zip(*parts, strict=True))
        norms = (vv[:, None] * gg[None, :]).sqrt()
        return self.finish((dot / norms).where(norms > 0, 0.0))

    def _by_block(
        self, query: Blocks, noise: Mapping[str, Bool[Tensor, " mn"]], lengths: dict[str, Float[Tensor, " mn"]]
    ) -> Total:
        """The blocks' cosines, 0 for what is noise; `lengths` of the queries and the rows are filled in."""
        import torch

        total = Total(self.aggregate)
        for block, g, v in self.pairs(query):
            both = [unit_rows(v), unit_rows(g)]
            lengths[block] = torch.cat([torch.linalg.vector_norm(x, dim=1, dtype=torch.float64) for x in (v, g)])
            if block in noise:
                none = noise[block][:, None].split([len(v), len(g)])
                both = [x.masked_fill(is_noise, 0) for x, is_noise in zip(both, none, strict=True)]
            total.add(self._dot(*both))
        return total


@dataclass
class GradNorm(OnGradients):
    """Control: `‖g_i‖` over all blocks, the same for every query."""

    def score(self, query: Blocks) -> Float[Tensor, "m n"]:
        """`[m, n]` with equal rows."""
        norms = sum(squares(g) for _, g, _ in self.pairs(query)).sqrt()  # type: ignore[union-attr]
        m = len(next(iter(query.values())))
        return self.finish(norms.expand(m, -1).clone())
