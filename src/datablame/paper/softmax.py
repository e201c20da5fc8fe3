"""One linear layer with a softmax, small enough for everything to be known exactly.

Inputs `x [n, d]` (the last column is 1: the bias), labels `y [n]`, weights `W [C, d]`, probabilities `p [n, C]`. With
`e_y` the unit vector of the label, in float64 throughout:

    gradient of row i    g_i = (p_i − e_y) ⊗ x_i                          [C d]
    Hessian of the loss  H = (1/n) Σ_i (diag p_i − p_i p_iᵀ) ⊗ x_i x_iᵀ   [C d, C d], equal to the Gauss-Newton matrix

Layers with fewer points than inputs separate them, so the loss alone has no minimum. What is minimised is
`(1/n) Σ_i loss_i + decay/2 ‖W‖²`, which has exactly one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from datablame.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float, Int
    from torch import Tensor

TOLERANCE = 1e-7
"""Length of the objective's gradient at which the layer counts as converged."""


def fit(
    x: Float[Tensor, "n d"],
    y: Int[Tensor, " n"],
    classes: int,
    decay: float,
    start: Float[Tensor, "C d"] | None = None,
    without: int | None = None,
) -> Float[Tensor, "C d"]:
    """The minimum of `(1/n) Σ_i loss_i + decay/2 ‖W‖²` by L-BFGS, from 0 or from `start`.

    without: a row whose loss is left out of the sum; n stays what it was. Raises UserError when the gradient does not
    become shorter than TOLERANCE.
    """
    from scipy.optimize import minimize

    kept = torch.ones(len(x), 1, dtype=x.dtype)
    if without is not None:
        kept[without] = 0

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w = torch.from_numpy(flat).view(classes, -1)
        logp = torch.log_softmax(x @ w.T, dim=1)
        loss = -(logp.gather(1, y[:, None]) * kept).sum() / len(x) + decay / 2 * w.square().sum()
        return float(loss), (errors(logp.exp(), y).mul_(kept).T @ x / len(x) + decay * w).flatten().numpy()

    w0 = torch.zeros(classes, x.shape[1], dtype=x.dtype) if start is None else start
    options = {"gtol": TOLERANCE / (classes * x.shape[1]) ** 0.5, "ftol": 0, "maxiter": 20_000, "maxfun": 50_000}
    found = minimize(objective, w0.flatten().numpy(), jac=True, method="L-BFGS-B", options=options)
    if not (found.jac**2).sum() ** 0.5 <= TOLERANCE:
        raise UserError(
            f"the layer of {classes} × {x.shape[1]} weights did not converge on {len(x)} points: the gradient is "
            f"{(found.jac**2).sum() ** 0.5:.1e} long after {found.nit} steps, above {TOLERANCE:g}."
        )
    return torch.from_numpy(found.x).view(classes, -1)


def probabilities(w: Float[Tensor, "C d"], x: Float[Tensor, "n d"]) -> Float[Tensor, "n C"]:
    """`softmax(x Wᵀ)`."""
    return torch.softmax(x @ w.T, dim=1)


def losses(w: Float[Tensor, "C d"], x: Float[Tensor, "n d"], y: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Cross-entropy of each row, in nats."""
    return torch.nn.functional.cross_entropy(x @ w.T, y, reduction="none")


def errors(p: Float[Tensor, "n C"], y: Int[Tensor, " n"]) -> Float[Tensor, "n C"]:
    """`p − e_y`: the loss's gradient in the logits."""
    return p - torch.nn.functional.one_hot(y, p.shape[1])


def gradients(
    w: Float[Tensor, "C d"], x: Float[Tensor, "n d"], y: Int[Tensor, " n"]
) -> dict[str, Float[Tensor, "n D"]]:
    """`{"linear": [n, C d]}`, the gradient of each row's loss: one block, weights and bias together."""
    g = errors(probabilities(w, x), y)[:, :, None] * x[:, None, :]
    return {"linear": g.flatten(1)}


def hessian_trace(w: Float[Tensor, "C d"], x: Float[Tensor, "n d"]) -> float:
    """trace H = mean of `(1 − ‖p_i‖²) ‖x_i‖²`."""
    p = probabilities(w, x)
    return float(((1 - p.square().sum(1)) * x.square().sum(1)).mean())


def hessian_scores(
    w: Float[Tensor, "C d"],
    train: tuple[Float[Tensor, "n d"], Int[Tensor, " n"]],
    query: tuple[Float[Tensor, "m d"], Int[Tensor, " m"]],
    ridges: list[float],
) -> list[Float[Tensor, "m n"]]:
    """`V (H + ridge I)⁻¹ Gᵀ` for each ridge, H the true Hessian, without a matrix of `C d` columns.

    With `S_i = diag √p_i − p_i √p_iᵀ`, `S_i S_iᵀ = diag p_i − p_i p_iᵀ`. So H = JᵀJ/n where J has the n C rows
    `J_ic = S_i[:, c] ⊗ x_i`, and its Gram matrix is `(JJᵀ)_ic,jd = (S_iᵀ S_j)_cd · x_i·x_j` `[n C, n C]`. Because
    `S_i e_y = √p_y (e_y − p_i)`, each gradient is a multiple of one of these rows, `g_i = −J_iy/√p_iy`, hence

        V (H + ridge I)⁻¹ Gᵀ = n V Jᵀ (JJᵀ + n ridge I)⁻¹ with column (i, y_i) times −1/√p_iy.

    Memory: two `[n C, n C]`, 1.6 GB at n = 1,000 and C = 10.
    """
    (x, y), (xq, yq) = train, query
    n = len(x)
    p = probabilities(w, x)
    classes = p.shape[1]
    root = p.sqrt()
    s = torch.diag_embed(root) - p[:, :, None] * root[:, None, :]  # [n, C, C], S_i
    rows = s.transpose(1, 2).reshape(n * classes, classes)  # row (i, c) is S_i[:, c]
    k = rows @ rows.T
    k.view(n, classes, n, classes).mul_((x @ x.T)[:, None, :, None])
    vj = (errors(probabilities(w, xq), yq) @ rows.T).view(-1, n, classes) * (xq @ x.T)[:, :, None]
    at = torch.arange(n) * classes + y
    diagonal = k.diagonal().clone()
    out = []
    for ridge in ridges:
        k.diagonal().copy_(diagonal + n * ridge)
        solved = torch.cholesky_solve(vj.flatten(1).T, torch.linalg.cholesky(k)).T
        out.append(-n * solved[:, at] / root.gather(1, y[:, None]).T)
    return out


def left_out(
    w: Float[Tensor, "C d"],
    train: tuple[Float[Tensor, "n d"], Int[Tensor, " n"]],
    query: tuple[Float[Tensor, "m d"], Int[Tensor, " m"]],
    decay: float,
    rows: int,
) -> Float[Tensor, "m rows"]:
    """n × the rise of each query's loss when training row i is left out and the layer fitted again, i < `rows`.

    To first order that is `V (H + decay I)⁻¹ Gᵀ`. The minimum is a combination of training inputs, so all of it happens
    in an orthonormal basis of them, `x = RᵀQᵀ`: n coordinates in place of d.
    """
    (x, y), (xq, yq) = train, query
    q, r = torch.linalg.qr(x.T)
    x, w, xq = r.T.contiguous(), w @ q, xq @ q
    before = losses(w, xq, yq)
    after = [losses(fit(x, y, len(w), decay, start=w, without=i), xq, yq) for i in range(rows)]
    return len(x) * (torch.stack(after, dim=1) - before[:, None])


def dense_scores(g: Float[Tensor, "n D"], v: Float[Tensor, "m D"], damping: float) -> Float[Tensor, "m n"]:
    """`V (GᵀG/n + λI)⁻¹ Gᵀ` by the `[D, D]` matrix itself: 8 D² bytes, twice while it is factorised."""
    h = g.T @ g
    h /= len(g)
    h.diagonal().add_(damping * float(g.square().mean()))
    return torch.cholesky_solve(v.T, torch.linalg.cholesky(h)).T @ g.T
