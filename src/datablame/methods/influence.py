"""Influence with the damped empirical Fisher matrix `H = GᵀG/n + λI`: exact, exact per block, and DataInf.

Damping is relative: `λ = damping × trace(GᵀG/n)/D`, the mean eigenvalue of the matrix that λ is added to, in each
block. DataInf's and the paper's λ, the mean of g² over examples and coordinates divided by 10, is `damping=0.1`.
A block of zero gradients contributes 0, with a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from datablame.methods.blockwise import RELATIF, GradientMethod, Sweeps, Total
from datablame.methods.gram import columns, gram, product, squares, times
from datablame.methods.spectrum import Form, Spectrum, decompose, dual, is_primal, primal

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from datablame.methods.base import Blocks

    Part = tuple[Float[Tensor, "m n"], Float[Tensor, " n"] | None]


@dataclass(kw_only=True)
class Damped(Sweeps, GradientMethod):
    """Options of the methods that invert `H = GᵀG/n + λI`.

    damping: λ over the mean eigenvalue of GᵀG/n, in each block. Above 0.
    relatif: RelatIF (Barshan et al. 2020, 2003.11630) divides a training row's scores by `√(g_i H⁻¹ g_i)` (`l`) or
        by `‖H⁻¹ g_i‖` (`theta`), H⁻¹ being the method's own; squares are summed over blocks before the root.
        A row without self-influence has score 0.
    """

    damping: float = 0.1
    relatif: Literal["l", "theta"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._one_of("relatif", RELATIF)
        self._check_above_0("damping", self.damping)

    def sweep(self, query: Blocks, dampings: Sequence[float]) -> dict[float, Float[Tensor, "m n"]]:
        """`{damping: [m, n]}` for several dampings, from one factorisation a block."""
        self._check_above_0("damping", *dampings)
        totals = {damping: Total(self.aggregate) for damping in dampings}
        empty = []
        for block, g, v in self.pairs(query):
            if squares(g).any():
                parts = self._parts(block, g, v, dampings)
            else:
                empty.append(block)
                parts = self._nothing(g, v, dampings)
            for total, (scores, norms) in zip(totals.values(), parts, strict=True):
                total.add(scores, norms)
        self._warn(empty)
        return {damping: self.finish(total.result()) for damping, total in totals.items()}

    def _parts(
        self, block: str, g: Float[Tensor, "n D"], v: Float[Tensor, "m D"], dampings: Sequence[float]
    ) -> list[Part]:
        """One block's scores and squared norms, for each damping."""
        raise NotImplementedError

    def _nothing(self, g: Float[Tensor, "n D"], v: Float[Tensor, "m D"], dampings: Sequence[float]) -> list[Part]:
        """What a block without training gradients contributes."""
        import torch

        return [(torch.zeros(len(v), len(g), dtype=torch.float64), None)] * len(dampings)

    def _warn(self, empty: list[str]) -> None:
        if empty:
            left = " after centring" if self.center else ""
            warnings.warn(
                f"{len(empty)} of {len(self.train)} blocks have only zero gradients{left} and contribute 0 to the "
                f"scores (the first: {empty[0]!r}; LoRA's A has none while B is 0).",
                stacklevel=4,
            )


@dataclass(kw_only=True)
class ExactBlock(Damped):
    """`Σ_b V (GᵀG/n + λI)⁻¹ Gᵀ`: exact influence, each block by itself.

    Computed as `n Q (K + nλI)⁻¹` in the dual form or as it stands in the primal one, from one eigendecomposition a
    block for every damping. Source: Koh & Liang 2017 (1703.04730) with the empirical Fisher matrix for the Hessian,
    as "exact" stands in DataInf (2310.00902).

    form: `dual` works in `[n, n]`, `primal` in `[D, D]`, `auto` in the smaller. damping, relatif: see Damped;
    center, aggregate, gauge: see GradientMethod.
    unit: what damping is relative to. `mean`: the mean of all D eigenvalues, of which n rows leave at most n above 0,
        so that with D ≫ n a damping below D/n damps next to nothing. `rank`: the mean of the min(n, D) that can be
        above 0, the same strength whatever the size. `center=k` leaves a block k fewer, which is not counted.
    """

    form: Form = "auto"
    unit: Literal["mean", "rank"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._one_of("form", ("auto", "dual", "primal"))
        self._one_of("unit", ("mean", "rank"))

    def in_means(self, n: int, d: int) -> float:
        """The unit of damping for n rows of d numbers, in mean eigenvalues."""
        return d / min(n, d) if self.unit == "rank" else 1.0

    def _parts(
        self, block: str, g: Float[Tensor, "n D"], v: Float[Tensor, "m D"], dampings: Sequence[float]
    ) -> list[Part]:
        s = decompose(g, v, self.form)
        unit = s.mean * self.in_means(*g.shape)
        inverses = [1 / (s.sigma + damping * unit) for damping in dampings]
        return [(s.scores(f), s.norms(f, self.relatif)) for f in inverses]


@dataclass(kw_only=True)
class Exact(ExactBlock):
    """`n Q̃ (K̃ + nI)⁻¹`, `K̃ = Σ_b K/λ_b`, `Q̃ = Σ_b Q/λ_b`: exact influence, all blocks jointly.

    That is `V (GᵀG/n + diag(λ_b))⁻¹ Gᵀ` over whole rows: scale block b's columns by `1/√λ_b`, and the matrix to be
    inverted becomes `G̃ᵀG̃/n + I`.

    Every damping from one eigendecomposition: `λ_b = damping · μ_b` with μ_b the block's mean eigenvalue, so
    `K̃ = K₀/damping` and `Q̃ = Q₀/damping` where `K₀ = Σ K/μ_b`, `Q₀ = Σ Q/μ_b`, and

        n Q̃ (K̃ + nI)⁻¹ = n (Q₀/damping) (K₀/damping + nI)⁻¹ = n Q₀ (K₀ + n · damping · I)⁻¹.

    So the joint solution is `exact-block` on one block of rows whose columns are scaled by `1/√μ_b`, its mean
    eigenvalue 1, its D that of all blocks together (of those that are not zero). In these coordinates the norm of
    θ-RelatIF is `‖H⁻¹g_i‖² = (A K₂ A)_ii`, `K₂ = Σ K/μ_b²`, `A = n (K₀ + n · damping · I)⁻¹`.

    Memory: two or three `[n, n]` in float64 and one block. Options as in exact-block; there is no `aggregate`.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.aggregate != "sum":
            raise self._error(f"aggregate={self.aggregate!r}: all blocks are solved jointly. Use exact-block.")

    def sweep(self, query: Blocks, dampings: Sequence[float]) -> dict[float, Float[Tensor, "m n"]]:
        """`{damping: [m, n]}` for several dampings, from one factorisation."""
        self._check_above_0("damping", *dampings)
        s, unit = self._joint(query)
        out = {}
        for damping in dampings:
            total = Total("sum")
            f = 1 / (s.sigma + damping * unit)
            total.add(s.scores(f), s.norms(f, self.relatif))
            out[damping] = self.finish(total.result())
        return out

    def self_influence(self) -> Float[Tensor, " n"]:
        """`g_i H⁻¹ g_i` of every training row, in float64: between 0 and n."""
        s, unit = self._joint({block: self.train[block][:0] for block in self.train})
        norms = s.norms(1 / (s.sigma + self.damping * unit), "l")
        assert norms is not None
        return norms

    def _joint(self, query: Blocks) -> tuple[Spectrum, float]:
        """The spectrum of the scaled rows, primal while they are shorter than n, dual from then on; damping's unit."""
        joint, empty, n, d = _Joint(self.form, theta=self.relatif == "theta"), [], 1, 0
        for block, g, v in self.pairs(query):
            mean = float(squares(g).sum()) / g.numel()
            if mean == 0:
                empty.append(block)
                # One column of zeros: nothing is added, and blocks that are all empty still give scores.
                g, v, mean = g[:, :1], v[:, :1], 1.0
            else:
                n, d = len(g), d + g.shape[1]
            joint.add(g, v, mean)
        self._warn(empty)
        return joint.spectrum(), self.in_means(n, max(d, 1))


class _Joint:
    """Takes the blocks one by one; keeps the scaled rows while they are shorter than n, then K₀ and Q₀.

    K₂ only for θ-RelatIF.
    """

    def __init__(self, form: Form, theta: bool) -> None:
        self.form, self.theta = form, theta
        self.rows: list[tuple[Tensor, Tensor, float]] = []
        self.width = 0
        self.sums: list[Tensor] = []

    def add(self, g: Float[Tensor, "n D"], v: Float[Tensor, "m D"], mean: float) -> None:
        self.rows.append((g, v, mean))
        self.width += g.shape[1]
        if not is_primal(self.form, len(g), self.width):
            while self.rows:
                self._fold(*self.rows.pop(0))

    def _fold(self, g: Tensor, v: Tensor, mean: float) -> None:
        """Into K₀, Q₀, the queries' squares, and K₂ where it is asked for."""
        k, q, vv = gram(g) / mean, product(v, g) / mean, squares(v) / mean
        new = [k, q, vv, *([k / mean] if self.theta else [])]
        self.sums = [a.add_(b) for a, b in zip(self.sums, new, strict=True)] if self.sums else new

    def spectrum(self) -> Spectrum:
        import torch

        if self.sums:
            k0, q0, vv, *k2 = self.sums
            s = dual(k0, q0, vv, self.width)
            u = s.y * (s.weight > 0)
            s.metric = u.T @ k2[0] @ u if k2 else None
            return s
        scale = torch.cat([torch.full((g.shape[1],), 1 / mean**0.5, dtype=torch.float64) for g, _, mean in self.rows])
        g0, v0 = (torch.cat([row[i].double() for row in self.rows], dim=1) * scale for i in (0, 1))  # type: ignore[union-attr]
        s, w = primal(g0, v0, gram(g0.T) / len(g0))
        s.metric = w.T @ (scale.square()[:, None] * w) if self.theta else None
        return s


@dataclass(kw_only=True)
class DataInf(Damped):
    """`Σ_b V · mean_i[(g_i g_iᵀ + λI)⁻¹] · Gᵀ`: the inverse of the mean taken as the mean of the inverses.

    By the Sherman-Morrison formula `Σ_b (1/λ) (Q − (1/n) (Q ∘ 1/(λ + diag K)) K)` (Kwon et al. 2024, 2310.00902).
    With few queries K is never formed: `(C G) Gᵀ` in place of `C K`, C = Q ∘ 1/(λ + diag K). What the paper's
    released code does is this with `damping=0.1`. Options: see Damped and GradientMethod.
    """

    def _parts(
        self, block: str, g: Float[Tensor, "n D"], v: Float[Tensor, "m D"], dampings: Sequence[float]
    ) -> list[Part]:
        n = len(g)
        q, diagonal = product(v, g), squares(g)
        # C K takes 2 m n² once K is there (1.25 n² D); (C G) Gᵀ takes 4 m n D and no K.
        k = gram(g) if self.relatif or n < 3 * len(v) * len(dampings) else None
        parts: list[Part] = []
        for damping in dampings:
            lam = damping * float(diagonal.sum()) / g.numel()
            w = 1 / (lam + diagonal)
            ck = times(q * w, g, g) if k is None else (q * w) @ k
            parts.append(((q - ck / n) / lam, None if k is None else self._norms(g, k, w, lam)))
        return parts

    def _norms(
        self, g: Float[Tensor, "n D"], k: Float[Tensor, "n n"], w: Float[Tensor, " n"], lam: float
    ) -> Float[Tensor, " n"] | None:
        """RelatIF's squares, with the rows `M g_i = (1/λ) (g_i − (1/n) Σ_j K_ij w_j g_j)`."""
        if self.relatif is None:
            return None
        if self.relatif == "l":
            return (k.diagonal() - k.square() @ w / len(g)) / lam
        return sum((g_c - (k * w) @ g_c / len(g)).square().sum(dim=1) for _, g_c in columns(g)) / lam / lam  # type: ignore[return-value]
