"""Influence with a Kronecker product for each block's curvature, as it stands or with its eigenvalues corrected."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from datablame.methods.base import Factored, check_finite
from datablame.methods.blockwise import ByExtra, Total
from datablame.methods.gram import CHUNK, squares

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from datablame.methods.base import Blocks, Kronecker


@dataclass(kw_only=True)
class KFAC(ByExtra):
    """`Σ_b V (S/n ⊗ A/T + λI)⁻¹ Gᵀ`: influence with K-FAC, a Kronecker product for each block's Fisher matrix.

    A = Σ x xᵀ over T tokens and S = Σ δ δᵀ, x a block's input and δ the gradient of its output (Martens & Grosse 2015,
    1503.05671; over tokens as in KFAC-expand, Eschenhagen et al. 2023, 2311.00636). With `S/n = Q_S s Q_Sᵀ` and
    `A/T = Q_A a Q_Aᵀ` a gradient `[o, i]` becomes `Q_Sᵀ g Q_A`, where H is diagonal: `s_j a_k + λ`.

    damping: λ over the mean eigenvalue of block b's Kronecker product. Above 0.
    relatif: `l` divides a training row's scores by `√(g_i H⁻¹ g_i)`, squares summed over blocks before the root.
    """

    needs = "kfac"

    def fit(self, train: Factored) -> Self:  # type: ignore[override]
        """Take `Factored({block: [n, D]}, {block: [n, D]}, {block: Kronecker})`."""
        self.labels, self.factors = train.labels, train.factors
        return super().fit(train.gradients)

    def sweep(self, query: Blocks, dampings: Sequence[float]) -> dict[float, Float[Tensor, "m n"]]:
        """`{damping: [m, n]}` for several dampings, from one pair of eigendecompositions a block."""
        self._check_above_0("damping", *dampings)
        totals = {damping: Total("sum") for damping in dampings}
        empty = []
        for block, g, v in self.pairs(query):
            squares(g)  # refuses rows beyond float64
            basis = _Basis(block, self.factors[block], len(g))
            values = self._eigenvalues(block, basis)
            mean = float(values.mean())
            if mean == 0:
                empty.append(block)
            self._add(totals, basis, g, v, values, mean)
        if empty:
            warnings.warn(
                f"{len(empty)} of {len(self.train)} blocks have only zero gradients in their factors and contribute 0 "
                f"to the scores (the first: {empty[0]!r}; LoRA's A has none while B is 0).",
                stacklevel=3,
            )
        return {damping: self.finish(total.result()) for damping, total in totals.items()}

    def _eigenvalues(self, block: str, basis: _Basis) -> Float[Tensor, " D"]:
        del block
        return basis.values

    def _add(
        self,
        totals: dict[float, Total],
        basis: _Basis,
        g: Float[Tensor, "n D"],
        v: Float[Tensor, "m D"],
        values: Float[Tensor, " D"],
        mean: float,
    ) -> None:
        """One block's scores and squared norms, for each damping; all 0 where the mean eigenvalue is."""
        import torch

        turned = torch.cat([part for _, part in basis.turned(v)]) if len(v) else v.double()
        inverse = {d: 1 / (values + d * mean) if mean else torch.zeros_like(values) for d in totals}
        scores = {d: torch.empty(len(v), len(g), dtype=torch.float64) for d in totals}
        norms = {d: torch.empty(len(g), dtype=torch.float64) for d in totals}
        for rows, part in basis.turned(g):
            for d, f in inverse.items():
                scores[d][:, rows] = (turned * f) @ part.T
                if self.relatif:
                    norms[d][rows] = part.square() @ f
        for d, total in totals.items():
            total.add(scores[d], norms[d] if self.relatif else None)


@dataclass(kw_only=True)
class EKFAC(KFAC):
    """`Σ_b V (Q diag(Λ) Qᵀ + λI)⁻¹ Gᵀ`, `Q = Q_S ⊗ Q_A`: K-FAC's eigenvectors with eigenvalues of their own.

    `Λ_k = mean_i (Qᵀg̃_i)_k²` over the rows' gradients g̃ with the factors' labels: the diagonal of their Fisher matrix
    in K-FAC's eigenbasis, in place of products of eigenvalues (George et al. 2018, 1806.03884; for influence, Grosse et
    al. 2023, 2308.03296, whose λ is damping=0.1).

    damping: λ over the mean of block b's Λ. Above 0. relatif: as in kfac.
    """

    def _eigenvalues(self, block: str, basis: _Basis) -> Float[Tensor, " D"]:
        drawn = check_finite(f"{block} (labels of the factors)", self.labels[block])
        squares(drawn)
        return sum(part.square().sum(dim=0) for _, part in basis.turned(drawn)) / len(drawn)  # type: ignore[return-value]


class _Basis:
    """The eigenvectors of a block's factors; `values [D]`: the eigenvalues of their Kronecker product."""

    def __init__(self, block: str, factors: Kronecker, n: int) -> None:
        import torch

        check_finite(f"{block} (Σ x xᵀ)", factors.inputs)
        check_finite(f"{block} (Σ δ δᵀ)", factors.outputs)
        a, self.inputs = torch.linalg.eigh(factors.inputs.double() / max(factors.tokens, 1))
        s, self.outputs = torch.linalg.eigh(factors.outputs.double() / n)
        self.values = torch.outer(s.clamp_min(0), a.clamp_min(0)).flatten()

    def turned(self, x: Float[Tensor, "n D"]) -> Iterator[tuple[slice, Float[Tensor, "k D"]]]:
        """`Q_Sᵀ x_i Q_A` of some rows at a time, in float64."""
        step = max(1, CHUNK // x.shape[1])
        for start in range(0, len(x), step):
            rows = slice(start, min(start + step, len(x)))
            matrices = x[rows].double().unflatten(1, (len(self.outputs), len(self.inputs)))
            yield rows, (self.outputs.T @ matrices @ self.inputs).flatten(1)
