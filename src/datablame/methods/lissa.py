"""LiSSA: influence by a recursion that is not run to its end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from datablame.methods.gram import gram, product, squares
from datablame.methods.influence import ExactBlock
from datablame.methods.spectrum import Spectrum, decompose, is_primal, relative

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from datablame.methods.base import Blocks
    from datablame.methods.influence import Part

PAPER_ALPHA = 1e-3
CHEAP = 4
"""steps × queries below CHEAP × min(n, D) run the recursion: a step on m rows takes 2 m r² operations, an
eigendecomposition of `[r, r]` the time of about 9 r³ (measured)."""


@dataclass(kw_only=True)
class LiSSA(ExactBlock):
    """`r₀ = v`, `r ← v + (I − αH) r`, `H = GᵀG/n + λI`, in each block; the scores are `Σ_b α r Gᵀ` after `steps` steps.

    In closed form `Q U diag((1 − (1 − ασ)^(k+1))/σ) Uᵀ`, σ the eigenvalues of H, or, where k steps are cheaper than
    an eigendecomposition, the recursion itself on `P_j = V (I − αH)^j Gᵀ`. As k grows the scores become those of
    exact-block. Source: Agarwal et al. 2017 (1602.03943), here without sampling.

    steps: k, or `inf`. alpha: the step; by default 1/(the largest eigenvalue of H), in each block. A step with
        α σ > 2 diverges, and is refused.
    protocol: `paper` is what the paper's released code does, `r ← v + r − (1/(1000 n)) Σ_i [(g_i·r) g_i − λ r]` and
        `r Gᵀ` not rescaled: the step is 1/1000 and the sign of λ is wrong. See protocol.md.
    form, damping, unit, relatif, center, aggregate, gauge: as in exact-block.

    After `score` or `sweep`, `residual[damping]` is `[m, blocks]`: `‖αHr − v‖/‖v‖ = ‖(I − αH)^(k+1) v‖/‖v‖` of each
    query in each block, in whole weights: the part of v that no training gradient spans, which meets no training
    row, decays by 1 − αλ a step and is counted. With `protocol=paper` H has the wrong sign of λ here too.
    """

    steps: int | float = 10
    alpha: float | None = None
    protocol: Literal["sound", "paper"] = "sound"
    residual: dict[float, Float[Tensor, "m blocks"]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._one_of("protocol", ("sound", "paper"))
        if self.steps == "inf":
            self.steps = math.inf
        if not isinstance(self.steps, int | float) or not (self.steps == math.inf or self.steps >= 0 == self.steps % 1):
            raise self._error(f"steps={self.steps!r}; use a whole number or inf.")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise self._error(f"alpha={self.alpha!r}; use a number above 0, or leave it out.")
        if self.protocol == "paper" and self.alpha is not None:
            raise self._error("protocol=paper fixes alpha at 1/1000; leave alpha out.")
        if self.protocol == "paper" and self.unit != "mean":
            raise self._error("protocol=paper has its own λ, over the mean of all eigenvalues; leave unit out.")
        if self.protocol == "paper" and self.steps == math.inf:
            raise self._error("protocol=paper never converges (its sign of λ is wrong); give a number of steps.")

    def sweep(self, query: Blocks, dampings: Sequence[float]) -> dict[float, Float[Tensor, "m n"]]:
        """`{damping: [m, n]}` for several dampings, from one factorisation a block; sets `residual`."""
        import torch

        self._residuals: dict[float, list[Tensor]] = {damping: [] for damping in dampings}
        scores = super().sweep(query, dampings)
        self.residual = {damping: torch.stack(r, dim=1) for damping, r in self._residuals.items()}
        return scores

    def _nothing(self, g: Float[Tensor, "n D"], v: Float[Tensor, "m D"], dampings: Sequence[float]) -> list[Part]:
        for damping in dampings:
            self._residuals[damping].append(v.any(dim=1).double())
        return super()._nothing(g, v, dampings)

    def _parts(
        self, block: str, g: Float[Tensor, "n D"], v: Float[Tensor, "m D"], dampings: Sequence[float]
    ) -> list[Part]:
        n, d = g.shape
        few = self.steps * len(v) * len(dampings) < CHEAP * min(n, d) and not self.relatif
        solver = _Recursion(g, v, is_primal(self.form, n, d)) if few else _Closed(decompose(g, v, self.form))
        parts: list[Part] = []
        for damping in dampings:
            lam = damping * solver.mean * self.in_means(n, d) * (-1 if self.protocol == "paper" else 1)
            alpha = self._alpha(block, solver, lam)
            scale = 1.0 if self.protocol == "paper" else alpha
            s, norms, residual = solver.run(alpha, lam, self.steps, scale, self.relatif)
            parts.append((s, norms))
            self._residuals[damping].append(residual)
        return parts

    def _alpha(self, block: str, solver: _Recursion | _Closed, lam: float) -> float:
        """The step. Raises UserError when it diverges."""
        given = PAPER_ALPHA if self.protocol == "paper" else self.alpha
        if given is not None and given * (solver.bound + lam) < 2:
            return given
        top = solver.largest() + lam
        alpha = 1 / top if given is None else given
        if alpha * top > 2 or (self.steps == math.inf and alpha * top == 2):
            fixed = "The released step is fixed; use protocol=sound."
            hint = fixed if self.protocol == "paper" else f"Give alpha below {2 / top:.4g}, or leave it out."
            raise self._error(
                f"block {block!r}: the recursion diverges: alpha = {alpha:g} times the largest eigenvalue of H, "
                f"{top:.4g}, is {alpha * top:.4g}, above 2. {hint}"
            )
        return alpha


class _Closed:
    """Any number of steps in the eigenbasis."""

    def __init__(self, s: Spectrum) -> None:
        self.s, self.mean, self.bound = s, s.mean, float(s.sigma.max())

    def largest(self) -> float:
        """The largest eigenvalue of GᵀG/n."""
        return self.bound

    def run(self, alpha: float, lam: float, steps: float, scale: float, relatif: str | None) -> tuple[Tensor, ...]:
        """Scores, RelatIF's squares and residual after `steps` steps; r is multiplied by `scale`."""
        p = alpha * (self.s.sigma + lam)
        f = scale * steps_sum(p, steps)
        left = (1 - p).abs() ** (steps + 1)
        outside = abs(1 - alpha * lam) ** (steps + 1)
        return self.s.scores(f), self.s.norms(f, relatif), self.s.residual(left, outside)  # type: ignore[return-value]


def steps_sum(p: Float[Tensor, " r"], steps: float) -> Float[Tensor, " r"]:
    """`Σ_{j=0..k} (1 − p)^j = (1 − (1 − p)^(k+1))/p`, without cancellation for small p; k + 1 at p = 0."""
    import torch

    if steps == math.inf:
        return 1 / p
    small = -torch.expm1((steps + 1) * torch.log1p(-p.clamp_max(1)))
    total = small.where(p < 1, 1 - (1 - p) ** int(steps + 1)) / p
    return total.where(p != 0, steps + 1.0)


class _Recursion:
    """A few steps, on `P_j = V (I − αH)^j Gᵀ` in the dual form and on `V (I − αH)^j` in the primal one.

    Both read `P ← P − α (P M + λP)`, with M = K/n or GᵀG/n, and the scores are the sum of all P (times Gᵀ).
    """

    def __init__(self, g: Float[Tensor, "n D"], v: Float[Tensor, "m D"], primal: bool) -> None:
        n, d = g.shape
        self.g, self.vv, self.primal = g, squares(v), primal
        self.m, self.start = (gram(g.T) / n, v.double()) if primal else (gram(g) / n, product(v, g))
        self.bound = float(self.m.trace())
        self.mean, self.n = self.bound / d, n

    def largest(self) -> float:
        """The largest eigenvalue of GᵀG/n."""
        import torch

        return float(torch.linalg.eigvalsh(self.m)[-1])

    def run(self, alpha: float, lam: float, steps: float, scale: float, relatif: str | None) -> tuple[Tensor, ...]:
        """Scores, None and residual after `steps` steps; r is multiplied by `scale`.

        The residual is that of `p = v (I − αH)^(k+1) = a v + C G` (dual): `‖p‖² = a² ‖v‖² + Σ C ∘ (a Q + P)`.
        """
        p, total, keep, c = self.start, self.start.clone(), 1 - alpha * lam, self.start * 0
        for j in range(int(steps) + 1):
            if not self.primal:
                c = keep * c - (alpha / self.n) * p
            p = keep * p - alpha * (p @ self.m)
            if j < steps:
                total += p
        if self.primal:
            scores, left = product(total, self.g), p.square().sum(dim=1)
        else:
            a = keep ** (int(steps) + 1)
            scores, left = total, a**2 * self.vv + (c * (a * self.start + p)).sum(dim=1)
        return scale * scores, None, relative(left, self.vv)  # type: ignore[return-value]
