"""One symmetric eigendecomposition that gives `V f(H) Gᵀ` for every function f of `H = GᵀG/n + λI`.

Two forms, equal in exact arithmetic; the smaller matrix is decomposed:

    dual    K = GGᵀ = UΛUᵀ  [n, n]    f(H) Gᵀ = Gᵀ f(K/n + λI), hence V f(H) Gᵀ = (Q U) f(Λ/n + λ) Uᵀ
    primal  GᵀG = WΛWᵀ      [D, D]    V f(H) Gᵀ = (V W) f(Λ/n + λ) (G W)ᵀ

The dual one is complete although its U spans only the rows of G: `Gᵀ` lies in that span, so the part of a query
outside it never meets a training row. It counts in the residual of an iteration only, see `outside`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from datablame.methods.gram import gram, product, squares

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

Form = Literal["auto", "dual", "primal"]


@dataclass
class Spectrum:
    """Scores are `(x · f) yᵀ` with f at `sigma + λ`.

    sigma `[r]`: eigenvalues of GᵀG/n · x `[m, r]`, y `[n, r]` · weight `[r]`: `y² weight` are a training row's
    squared coordinates · mean: trace(GᵀG/n)/D, the unit of damping · vv `[m]`, gg `[n]`: squared lengths of the
    rows · metric `[r, r]`: what θ-RelatIF measures with where the coordinates were scaled, else diag(weight).
    """

    sigma: Float[Tensor, " r"]
    x: Float[Tensor, "m r"]
    y: Float[Tensor, "n r"]
    weight: Float[Tensor, " r"]
    mean: float
    vv: Float[Tensor, " m"]
    gg: Float[Tensor, " n"]
    metric: Float[Tensor, "r r"] | None = None

    def scores(self, f: Float[Tensor, " r"]) -> Float[Tensor, "m n"]:
        """`V f(H) Gᵀ`."""
        return (self.x * f) @ self.y.T

    def norms(self, f: Float[Tensor, " r"], relatif: str | None) -> Float[Tensor, " n"] | None:
        """Squared norm of each training row: `g_i f(H) g_i` for l-RelatIF, `‖f(H) g_i‖²` for θ-RelatIF."""
        if relatif is None:
            return None
        z = self.y * f
        if relatif == "l":
            norms = (z * self.y) @ self.weight
        else:
            norms = z.square() @ self.weight if self.metric is None else ((z @ self.metric) * z).sum(dim=1)
        return norms.where(self.gg > 0, 0.0)  # U has entries of 1e-17 where a row is zero

    def residual(self, p: Float[Tensor, " r"], outside: float) -> Float[Tensor, " m"]:
        """`‖p(H) v‖/‖v‖` with p at `sigma + λ`, and its value at λ for the part of v outside the span."""
        inside = (self.x.square() / self.weight).where(self.weight > 0, 0.0)
        rest = (self.vv - inside.sum(dim=1)).clamp_min(0)
        return relative(inside @ p.square() + rest * outside**2, self.vv)


def relative(part: Float[Tensor, " m"], whole: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
    """`√(part/whole)`, 0 where the whole is 0."""
    return (part.clamp_min(0) / whole).sqrt().where(whole > 0, 0.0)


def is_primal(form: Form, n: int, d: int) -> bool:
    """Whether the `[D, D]` form is taken: as asked, or because it is the smaller one."""
    return form == "primal" or (form == "auto" and d < n)


def decompose(g: Float[Tensor, "n D"], v: Float[Tensor, "m D"], form: Form = "auto") -> Spectrum:
    """The spectrum of one block."""
    n, d = g.shape
    if is_primal(form, n, d):
        return primal(g, v, gram(g.T) / n)[0]
    return dual(gram(g), product(v, g), squares(v), d)


def dual(k: Float[Tensor, "n n"], q: Float[Tensor, "m n"], vv: Float[Tensor, " m"], d: int) -> Spectrum:
    """From K `[n, n]` and Q `[m, n]`; y is U itself."""
    import torch

    n = len(k)
    values, u = torch.linalg.eigh(k)
    values = resolved(values)
    return Spectrum(values / n, q @ u, u, values, float(k.trace()) / (n * d), vv, k.diagonal())


def resolved(values: Float[Tensor, " r"]) -> Float[Tensor, " r"]:
    """Eigenvalues, 0 where they are rounding: where the inverse is large their share of it would be noise."""
    import torch

    return values.where(values > len(values) * torch.finfo(torch.float64).eps * values.max(), 0.0)


def primal(
    g: Float[Tensor, "n D"], v: Float[Tensor, "m D"], h: Float[Tensor, "D D"]
) -> tuple[Spectrum, Float[Tensor, "D D"]]:
    """From the features and GᵀG/n `[D, D]`; also W."""
    import torch

    values, w = torch.linalg.eigh(h)
    x, y = product(v, w.T), product(g, w.T)
    return Spectrum(
        resolved(values), x, y, torch.ones_like(values), float(h.trace()) / len(h), squares(v), squares(g)
    ), w
