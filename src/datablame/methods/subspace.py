"""Influence with the Fisher, the Gauss-Newton matrix or the Hessian, solved in the span of the gradients at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from datablame.methods.base import ROUNDING, unit_rows
from datablame.methods.krylov import OnOperator

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(kw_only=True)
class Subspace(OnOperator):
    """`V (H + λI)⁻¹ Gᵀ` in the span of all gradients, the training rows' and the queries': `r = Uᵀ (h + λI)⁻¹ U v`.

    U `[p, D]` is an orthonormal basis of that span, `h = U H Uᵀ`: the Galerkin solution. One product with the p ≤ n + m
    vectors of U serves all queries and all dampings. H leads out of the span, so r is not the inverse's: `residual`.
    The span grows with the queries, so scores depend on which are asked together; with `fisher`, whose solution lies
    in the span anyway, by rounding only.

    matrix: the mean over training rows, of all attributed weights jointly. `fisher`: empirical, `GᵀG/n`, of the
        gradients at hand, without a product; `gauss-newton`; `hessian`.
    damping: λ over `Σ|ε|/min(n, D)`, ε the eigenvalues of H restricted to the span of the training gradients, in which
        no more than min(n, D) are above rounding. It depends on no query. With `fisher` that is trace(GᵀG/n)/min(n, D):
        the λ of `exact` with `unit=rank` on one block (on several, `exact` has one λ for each).

    After `score` or `sweep`, `residual[damping]` is `[m, 1]`, `‖(H + λI)r − v‖/‖v‖` over all weights, and `lowest` the
    lowest eigenvalue of h: below 0, H has negative curvature. Raises UserError where h + λI is not positive definite.
    """

    matrix: Literal["fisher", "gauss-newton", "hessian"] = "gauss-newton"
    lowest: float | None = field(default=None, init=False, repr=False)
    matrices: ClassVar[tuple[str, ...]] = ("fisher", "gauss-newton", "hessian")

    def calls(self, m: int) -> int:
        """One, of any number of queries; the Fisher takes none."""
        return int(self.matrix != "fisher")

    def vectors(self, n: int, m: int) -> int:
        """The basis, of as many vectors as there are gradients."""
        return self.calls(m) * (n + m)

    def _solutions(self, v: Float[Tensor, "m D"], dampings: Sequence[float]) -> Float[Tensor, "s m D"]:
        """From one basis, one product and one eigendecomposition."""
        import torch

        g = torch.cat([x.double() for x in self.train.values()], dim=1)
        u, own = span(g, v, self.eps)
        hu = self._finite(u @ g.T @ g / len(g), "fisher") if self.matrix == "fisher" else self._times(u)
        h = u @ hu.T
        h = (h + h.T) / 2
        unit = float(torch.linalg.eigvalsh(h[:own, :own]).abs().sum()) / min(g.shape)
        if not unit > 0:
            raise self._error(
                f"the {self.matrix} matrix is 0 on the span of the training gradients, so damping has no unit. "
                "Are all gradients zero?"
            )
        values, w = torch.linalg.eigh(h)
        self.lowest = float(values[0])
        self._refuse_negative(self.lowest, min(dampings) * unit, unit)
        length = v.norm(dim=1, keepdim=True)
        out, self.residual = [], {}
        for damping in dampings:
            shift = damping * unit
            y = ((v @ u.T @ w) / (values + shift)) @ w.T
            out.append(r := y @ u)
            left = (y @ hu + shift * r - v).norm(dim=1, keepdim=True)
            self.residual[damping] = (left / length).where(length > 0, 0.0)
        return torch.stack(out)


def span(g: Float[Tensor, "n D"], v: Float[Tensor, "m D"], eps: float) -> tuple[Float[Tensor, "p D"], int]:
    """Orthonormal rows U that span all rows of both, and how many of them, the first, span those of g.

    eps: ε of the features' precision. Rows count by their directions, whatever their lengths.
    """
    import torch

    own = directions(unit_rows(g), eps)
    rest = unit_rows(v)
    both = torch.cat([own, directions(rest - rest @ own.T @ own, eps)])
    # What is left of the queries may be short: orthogonal to U by its own length only, which a second QR mends.
    return torch.linalg.qr(both.T).Q.T, len(own)


def directions(x: Float[Tensor, "k D"], eps: float) -> Float[Tensor, "p D"]:
    """Orthonormal rows that span those of x, each 1 long at most. A singular value ≤ 10 ε √k is rounding."""
    import torch

    q, r = torch.linalg.qr(x.T)
    w, s, _ = torch.linalg.svd(r, full_matrices=False)
    return (q @ w[:, s > ROUNDING * eps * len(x) ** 0.5]).T
