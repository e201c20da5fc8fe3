"""Influence with the Gauss-Newton matrix, from gradients of labels that are drawn from the model itself."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from datablame.errors import UserError
from datablame.methods.base import Sampled, check_finite
from datablame.methods.blockwise import ByExtra, divided
from datablame.methods.gram import gram, product, squares

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from datablame.methods.base import Blocks


@dataclass(kw_only=True)
class GaussNewton(ByExtra):
    """`V (G̃ᵀG̃/N + diag(λ_b))⁻¹ Gᵀ`: influence with the Gauss-Newton matrix, by sampled labels.

    G̃ holds N = n S gradients, S of each training row with labels drawn from the model's own prediction: the mean of
    `g̃ g̃ᵀ` is the Fisher matrix, which for a softmax is the Gauss-Newton matrix, where `exact` has the empirical one of
    the rows' own labels (Martens 2020, 1412.1193; Kunstner et al. 2019, 1905.12558). All blocks jointly.

    damping: λ_b over the mean eigenvalue of block b of G̃ᵀG̃/N. Above 0.
    relatif: `l` divides a training row's scores by `√(g_i H⁻¹ g_i)`.
    """

    needs = "sampled"

    def fit(self, train: Sampled) -> Self:  # type: ignore[override]
        """Take `Sampled({block: [n, D]}, [{block: [n, D]}, …])`. Raises UserError when nothing was drawn."""
        if not train.draws:
            raise self._error("there are no sampled gradients (index with --extras sampled).")
        self.draws = train.draws
        return super().fit(train.gradients)

    def sweep(self, query: Blocks, dampings: Sequence[float]) -> dict[float, Float[Tensor, "m n"]]:
        """`{damping: [m, n]}` from one eigendecomposition of `[N, N]`.

        With the columns of block b scaled by `1/√μ_b`, its mean eigenvalue, H is `G̃ᵀG̃/N + damping I`, and with
        `G̃G̃ᵀ = UΛUᵀ` its inverse `(I − G̃ᵀU diag(1/(N damping + Λ)) UᵀG̃)/damping`.
        """
        import torch

        self._check_above_0("damping", *dampings)
        q, a, b, k, gg = self._products(query)
        values, u = torch.linalg.eigh(k)
        values, a, b = values.clamp_min(0), a @ u, b @ u
        out = {}
        for damping in dampings:
            f = 1 / (len(k) * damping + values)
            norms = (gg - b.square() @ f) / damping if self.relatif else None
            out[damping] = self.finish(divided((q - (a * f) @ b.T) / damping, norms))
        return out

    def _products(self, query: Blocks) -> tuple[Tensor, ...]:
        """Sums over blocks, scaled: `V Gᵀ`, `V G̃ᵀ`, `G G̃ᵀ`, `G̃ G̃ᵀ`, and `‖g_i‖²`, in float64."""
        import torch

        total: tuple[Tensor, ...] = ()
        empty = []
        for block, g, v in self.pairs(query):
            drawn = torch.cat([check_finite(f"{block}' of the sampled labels", d[block]) for d in self.draws])
            mean = float(squares(drawn).sum()) / drawn.numel()
            if mean == 0:
                empty.append(block)
                g, v, drawn, mean = g[:, :0], v[:, :0], drawn[:, :0], 1.0
            parts = [product(v, g), product(v, drawn), product(g, drawn), gram(drawn), squares(g)]
            scaled = tuple(x / mean for x in parts)
            total = tuple(x + y for x, y in zip(total, scaled, strict=True)) if total else scaled
        if empty:
            warnings.warn(
                f"{len(empty)} of {len(self.train)} blocks have only zero gradients of sampled labels and contribute "
                f"0 to the scores (the first: {empty[0]!r}; LoRA's A has none while B is 0).",
                stacklevel=4,
            )
        return total

    def _error(self, what: str) -> UserError:
        return UserError(f"gauss-newton: {what}")
