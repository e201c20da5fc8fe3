"""Products of rows over all coordinates, in float64, a few columns at a time.

Why float64: the influence methods divide by eigenvalues up to D/damping times smaller than the largest. A strong
common direction of the gradients uses up that many digits, and float32 has seven. A product of two float32 numbers
is exact in float64, so nothing but the features' own rounding is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from datablame.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

CHUNK = 2**22
"""Numbers of one chunk: 32 MB in float64."""
PANEL = 128
"""Rows of a panel of a symmetric product."""


def columns(x: Float[Tensor, "n D"], rows: int | None = None) -> Iterator[tuple[slice, Float[Tensor, "n c"]]]:
    """Column ranges of `x` and those columns in float64; `rows` sets the width where several are walked together."""
    width = max(64, CHUNK // max(1, rows or len(x)))
    for a in range(0, x.shape[1], width):
        part = slice(a, min(a + width, x.shape[1]))
        yield part, x[:, part].double()


def product(x: Float[Tensor, "m D"], y: Float[Tensor, "n D"]) -> Float[Tensor, "m n"]:
    """`x yᵀ` in float64."""
    import torch

    total = torch.zeros(len(x), len(y), dtype=torch.float64, device=x.device)
    for part, y_c in columns(y, max(len(x), len(y))):
        total.addmm_(x[:, part].double(), y_c.T)
    return total


def times(a: Float[Tensor, "m n"], g: Float[Tensor, "n D"], y: Float[Tensor, "k D"]) -> Float[Tensor, "m k"]:
    """`(a g) yᵀ` in float64, without `g yᵀ`."""
    import torch

    total = torch.zeros(len(a), len(y), dtype=torch.float64, device=g.device)
    for part, g_c in columns(g):
        total.addmm_(a @ g_c, (g_c if y is g else y[:, part].double()).T)
    return total


def gram(x: Float[Tensor, "n D"]) -> Float[Tensor, "n n"]:
    """`x xᵀ` in float64, exactly symmetric; only the lower half is computed. Raises UserError beyond float64."""
    import torch

    n = len(x)
    total = torch.zeros(n, n, dtype=torch.float64, device=x.device)
    for _, x_c in columns(x):
        for a in range(0, n, PANEL):
            b = min(a + PANEL, n)
            total[a:b, :b].addmm_(x_c[a:b], x_c[:b].T)
    _within_float64(total.diagonal())
    return total.tril_().add_(total.tril(-1).T)


def squares(x: Float[Tensor, "n D"]) -> Float[Tensor, " n"]:
    """Squared length of each row, in float64. Raises UserError beyond it."""
    import torch

    return _within_float64(torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).square())


def _within_float64(squared: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    if not squared.isfinite().all():
        row = int((~squared.isfinite()).nonzero()[0])
        raise UserError(f"row {row} is too long: the square of its length is beyond float64. Scale the gradients.")
    return squared


def without_common(
    g: Float[Tensor, "n D"], v: Float[Tensor, "m D"], k: int
) -> tuple[Float[Tensor, "n D"], Float[Tensor, "m D"]]:
    """Both with the training rows' k strongest directions projected out.

    The directions `W [D, k]` are the first right singular vectors of `G`, its mean *not* subtracted: `G ← G − G W Wᵀ`,
    `V ← V − V W Wᵀ`. Returned in float64: rounded to float32, the rows would lie in the removed directions again, where
    H is λ and its inverse large. A row of which nothing but rounding is left becomes exactly zero.
    """
    import torch

    if g.shape[1] < len(g):
        values, w = torch.linalg.eigh(gram(g.T))
        strong = slice(max(0, len(values) - k), None)
        w = w[:, strong]
    else:
        values, u = torch.linalg.eigh(gram(g))
        strong = slice(max(0, len(values) - k), None)
        # Beyond the rank there is nothing to remove, and no direction either.
        real = values[strong] > len(values) * torch.finfo(torch.float64).eps * values[-1].clamp_min(0)
        w = torch.zeros(g.shape[1], int(real.sum()), dtype=torch.float64, device=g.device)
        for part, g_c in columns(g):
            w[part] = g_c.T @ (u[:, strong][:, real] / values[strong][real].sqrt())
    return _project(g, w, values[-1].clamp_min(0).sqrt()), _project(v, w, squares(v).sqrt())


def _project(x: Float[Tensor, "n D"], w: Float[Tensor, "D k"], scale: Tensor) -> Float[Tensor, "n D"]:
    """`x − x w wᵀ`; a row shorter than 1e-12 × its `scale` is rounding, and becomes zero."""
    import torch

    xw = product(x, w.T)
    out = torch.empty_like(x, dtype=torch.float64)
    length = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for part, x_c in columns(x):
        out[:, part] = rest = x_c - xw @ w[part].T
        length += rest.square().sum(dim=1)
    out[length.sqrt() <= 1e-12 * scale] = 0
    return out
