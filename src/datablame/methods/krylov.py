"""Influence with the Gauss-Newton matrix or the Hessian, from products with vectors: conjugate gradients and MINRES."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from datablame.methods.blockwise import OnGradients, Sweeps
from datablame.methods.gram import product, squares

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from datablame.methods.base import Blocks, Operator

CHUNK = 8
"""Queries solved side by side; their Krylov vectors, steps × CHUNK × D numbers in float64, are in memory."""


@dataclass(kw_only=True)
class OnOperator(Sweeps, OnGradients):
    """What the methods share that solve `(H + λI) r = v` with products of H; a method gives `_solutions`."""

    matrix: str = "gauss-newton"
    damping: float = 0.1
    residual: dict[float, Float[Tensor, "m 1"]] = field(default_factory=dict, init=False, repr=False)
    needs = "operator"
    matrices: ClassVar[tuple[str, ...]] = ("gauss-newton", "hessian")

    def __post_init__(self) -> None:
        if self.matrix not in self.matrices:
            *most, last = self.matrices
            raise self._error(f"matrix={self.matrix!r}; use {', '.join(most)} or {last}.")
        self._check_above_0("damping", self.damping)

    def fit(self, train: Operator) -> Self:  # type: ignore[override]
        """Take `Operator({block: [n, D]}, product)`."""
        self.product = train.product
        return super().fit(train.gradients)

    def sweep(self, query: Blocks, dampings: Sequence[float]) -> dict[float, Float[Tensor, "m n"]]:
        """`{damping: [m, n]}` from one space; sets `residual` and `lowest`."""
        import torch

        self._check_above_0("damping", *dampings)
        sizes, v = [], []
        for _, g, v_b in self.pairs(query):
            sizes.append(g.shape[1])
            v.append(v_b.double())
        squares(x := torch.cat(v, dim=1))
        parts = zip(self.train, self._solutions(x, dampings).split(sizes, dim=2), strict=True)
        by_block = [torch.stack([product(r_d, self.train[b]) for r_d in r_b]) for b, r_b in parts]
        return {d: self.finish(s) for d, s in zip(dampings, torch.stack(by_block).sum(dim=0), strict=True)}

    def _solutions(self, v: Float[Tensor, "m D"], dampings: Sequence[float]) -> Float[Tensor, "s m D"]:
        """r for each damping."""
        raise NotImplementedError

    def calls(self, m: int) -> int:
        """Calls of `product` (each a pass over the rows) for m queries, at most."""
        raise NotImplementedError

    def vectors(self, n: int, m: int) -> int:
        """Vectors in all these calls together, for n training rows, at most."""
        raise NotImplementedError

    def _times(self, x: Float[Tensor, "k D"], matrix: str | None = None) -> Float[Tensor, "k D"]:
        return self._finite(self.product(matrix or self.matrix, x), matrix or self.matrix)

    def _finite(self, hx: Float[Tensor, "k D"], matrix: str) -> Float[Tensor, "k D"]:
        if not hx.isfinite().all():
            raise self._error(f"a product with the {matrix} matrix is not finite; index with --dtype float64.")
        return hx

    def _refuse_negative(self, low: float, shift: float, mean: float) -> None:
        """Raise UserError where λ = `shift` leaves `low`, the lowest eigenvalue found, not above 0."""
        if low + shift <= 0:
            others = "minres, matrix=gauss-newton, or " if self.matrix == "hessian" else ""
            raise self._error(
                f"H + λI is not positive definite: H has negative curvature, {low:.3g}, and λ is {shift:.3g}. "
                f"Use {others}a damping above {_up(-low / mean):g}."
            )


@dataclass(kw_only=True)
class CG(OnOperator):
    """`V (H + λI)⁻¹ Gᵀ` by k steps of conjugate gradients for each query, H the Gauss-Newton matrix or the Hessian.

    Lanczos builds an orthonormal basis Q of v, Hv, … , Hᵏ⁻¹v and the tridiagonal `T = QᵀHQ`, once for every damping;
    k steps of conjugate gradients give `r = Q (T + λI)⁻¹ ‖v‖e₁` (Golub & Van Loan 2013, section 11.3).

    matrix: `gauss-newton` or `hessian`, the mean over training rows, of all attributed weights jointly.
    damping: λ over the mean eigenvalue of the Gauss-Newton matrix, for the Hessian too, whose own may be below 0. It is
        estimated from `probes` products with random signs (Hutchinson).
    steps: at most this many products; fewer once every residual is below `tolerance`.

    After `score` or `sweep`, `residual[damping]` is `[m, 1]`, `‖(H + λI)r − v‖/‖v‖`, and `lowest` `[m]` the lowest
    Ritz value of each query, of T: below 0, H has negative curvature. Raises UserError where T + λI is not positive
    definite, since conjugate gradients may break down there.
    """

    matrix: Literal["gauss-newton", "hessian"] = "gauss-newton"
    steps: int = 20
    tolerance: float = 1e-4
    probes: int = 8
    seed: int = 0
    lowest: Float[Tensor, " m"] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, least in (("steps", 1), ("probes", 1), ("seed", 0)):
            value = getattr(self, option)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise self._error(f"{option}={value!r}; use a whole number from {least}.")
        self._check_above_0("tolerance", self.tolerance)

    def calls(self, m: int) -> int:
        """One for all probes, one a step."""
        return 1 + self.steps * math.ceil(m / CHUNK)

    def vectors(self, n: int, m: int) -> int:
        """The probes, and one a step and query."""
        return self.probes + self.steps * m

    def _solutions(self, v: Float[Tensor, "m D"], dampings: Sequence[float]) -> Float[Tensor, "s m D"]:
        """From one Krylov space a query."""
        import torch

        mean = self._mean_eigenvalue(v.shape[1])
        shifts = [damping * mean for damping in dampings]
        solved = [self._solve(part, shifts) for part in v.split(CHUNK)]
        self.residual = {d: torch.cat([s[1][k] for s in solved])[:, None] for k, d in enumerate(dampings)}
        self.lowest = torch.cat([s[2] for s in solved])
        self._check_sign(shifts, mean)
        return torch.cat([s[0] for s in solved], dim=1)

    def _mean_eigenvalue(self, d: int) -> float:
        """trace(H)/D of the Gauss-Newton matrix, from `zᵀHz` of random signs z (Hutchinson 1989)."""
        import torch

        generator = torch.Generator().manual_seed(self.seed)
        z = torch.randint(2, (self.probes, d), generator=generator).double() * 2 - 1
        mean = float((z * self._times(z, "gauss-newton")).sum(dim=1).mean()) / d
        if not mean > 0:
            raise self._error(
                f"the mean eigenvalue of the Gauss-Newton matrix is estimated at {mean:.3g}, so damping has no unit. "
                "Are all gradients zero?"
            )
        return mean

    def _solve(self, v: Float[Tensor, "c D"], shifts: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
        """Solutions `[shifts, c, D]`, residuals `[shifts, c]`, lowest Ritz values `[c]`."""
        import torch

        length = v.norm(dim=1)

        def found(t: Float[Tensor, "c k1 k"]) -> list[tuple[Tensor, Tensor]]:
            return [self._coefficients(t, shift) for shift in shifts]

        def done(t: Float[Tensor, "c k1 k"]) -> bool:
            return all(bool((residual[length > 0] < self.tolerance).all()) for _, residual in found(t))

        q, t = lanczos(self._times, v, self.steps, done)
        y = torch.stack([y for y, _ in found(t)]) * length[:, None]
        residual = torch.stack([r for _, r in found(t)]) * (length > 0)
        lowest = torch.linalg.eigvalsh(t[:, :-1])[:, 0]
        return torch.einsum("sck,kcd->scd", y, q), residual, lowest

    def _coefficients(self, t: Float[Tensor, "c k1 k"], shift: float) -> tuple[Tensor, Tensor]:
        """y `[c, k]` for a v of length 1, and the residual `[c]`: `(T + λI) y = e₁`, of which the row below is left."""
        import torch

        square = t[:, :-1] + shift * torch.eye(t.shape[2], dtype=t.dtype)
        one = torch.zeros_like(square[:, :, :1])
        one[:, 0] = 1
        y, failed = torch.linalg.solve_ex(square, one)
        left = (t[:, -1:] @ y).abs()[:, 0, 0]
        return y[:, :, 0], left.where(failed == 0, math.inf)

    def _check_sign(self, shifts: Sequence[float], mean: float) -> None:
        assert self.lowest is not None
        self._refuse_negative(float(self.lowest.min()) if len(self.lowest) else 0.0, min(shifts), mean)


@dataclass(kw_only=True)
class MinRes(CG):
    """`V (H + λI)⁻¹ Gᵀ` by k steps of MINRES for each query: for a Hessian that has negative curvature, too.

    As `cg`, but `r = Q y` with the y that makes `‖(H + λI) Q y − v‖` smallest (Paige & Saunders 1975): with the next
    row of T below, that is `‖(T̲ + λI̲) y − ‖v‖e₁‖`, a least-squares problem of k columns. It is not a damping of
    negative eigenvalues: their directions are scored with their own, negative, inverse. A warning tells of them.
    """

    matrix: Literal["gauss-newton", "hessian"] = "hessian"

    def _coefficients(self, t: Float[Tensor, "c k1 k"], shift: float) -> tuple[Tensor, Tensor]:
        import torch

        tall = t + shift * torch.eye(*t.shape[1:], dtype=t.dtype)
        one = torch.zeros_like(tall[:, :, :1])
        one[:, 0] = 1
        y = torch.linalg.pinv(tall) @ one
        return y[:, :, 0], (tall @ y - one)[:, :, 0].norm(dim=1)

    def _check_sign(self, shifts: Sequence[float], mean: float) -> None:
        assert self.lowest is not None
        if negative := int((self.lowest + min(shifts) < 0).sum()):
            warnings.warn(
                f"minres: H + λI has negative curvature along {negative} of {len(self.lowest)} queries "
                f"(Ritz values down to {float(self.lowest.min()):.3g}, λ from {min(shifts):.3g}; "
                f"none found with a damping above {_up(-float(self.lowest.min()) / mean):g}).",
                stacklevel=5,
            )


def _up(x: float) -> float:
    """Rounded up to two digits, since below it the same would be said again."""
    unit = 10.0 ** (math.floor(math.log10(x)) - 1)
    return math.ceil(x / unit) * unit


def lanczos(
    times: Callable[[Tensor], Tensor],
    v: Float[Tensor, "c D"],
    steps: int,
    done: Callable[[Tensor], bool] = lambda t: False,
) -> tuple[Float[Tensor, "k c D"], Float[Tensor, "c k1 k"]]:
    """Orthonormal bases Q of the Krylov spaces of c vectors, and `T̲` with `H Q = Q₊ T̲`, Q₊ one vector longer.

    Every new vector is made orthogonal to all before it, twice. Where a space is exhausted its vectors are 0. Stops
    before `steps` products when `done(T̲)`.
    """
    import torch

    c, d = v.shape
    steps = min(steps, d)
    t = torch.zeros(c, steps + 1, steps, dtype=v.dtype)
    q = [v / v.norm(dim=1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)]
    for j in range(steps):
        w = times(q[j])
        size = w.norm(dim=1)
        t[:, j, j] = (w * q[j]).sum(dim=1)
        for _ in range(2):
            for x in q:
                w = w - (w * x).sum(dim=1, keepdim=True) * x
        beta = w.norm(dim=1)
        beta = beta.where(beta > 1e-10 * torch.maximum(size, t[:, j, : j + 1].abs().amax(dim=1)), 0)
        t[:, j + 1, j] = beta
        if j + 1 < steps:
            t[:, j, j + 1] = beta
        if j + 1 == steps or not beta.any() or done(t[:, : j + 2, : j + 1]):
            return torch.stack(q), t[:, : j + 2, : j + 1]
        q.append(torch.where(beta[:, None] > 0, w / beta.clamp_min(torch.finfo(v.dtype).tiny)[:, None], 0.0))
    raise AssertionError("no step was made")
