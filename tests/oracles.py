"""Slow and plain versions of what the package does fast: one example at a time, straight from the formula."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from datablame.encoding import IGNORED, Encoded


def loss_alone(model: Any, row: Encoded) -> Tensor:
    """The summed cross-entropy of one row, all logits, no padding."""
    logits = model(input_ids=torch.tensor([row.input_ids], device=model.device)).logits[0]
    total = logits.new_zeros(())
    for t in range(1, len(row.input_ids)):
        if row.labels[t] != IGNORED:
            total = total - torch.log_softmax(logits[t - 1], dim=-1)[row.labels[t]]
    return total


def gradients_alone(model: Any, rows: Sequence[Encoded], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`{block: [n, D]}` by autograd, one example at a time; `weights` maps block names to parameters."""
    for w in weights.values():
        w.requires_grad_(True)
    out: dict[str, list[Tensor]] = {name: [] for name in weights}
    for row in rows:
        grads = torch.autograd.grad(loss_alone(model, row), list(weights.values()))
        for name, g in zip(weights, grads, strict=True):
            out[name].append(g.flatten())
    for w in weights.values():
        w.requires_grad_(False)
    return {name: torch.stack(g) for name, g in out.items()}


def hidden_alone(model: Any, rows: Sequence[Encoded], layer: int, kind: str) -> Tensor:
    """`[n, d]`, one example at a time, unpadded."""
    out = []
    for row in rows:
        with torch.no_grad():
            h = model(input_ids=torch.tensor([row.input_ids]), output_hidden_states=True).hidden_states[layer][0]
        labelled = [t for t, label in enumerate(row.labels) if label != IGNORED]
        if kind == "prompt.last":
            out.append(h[row.prompt_length - 1])
        elif kind == "response.last":
            out.append(h[labelled[-1]])
        else:
            out.append(h[labelled].mean(0))
    return torch.stack(out)


def relative_error(a: Tensor, b: Tensor) -> float:
    """The largest ‖a−b‖/‖b‖ over rows."""
    return float(((a - b).norm(dim=1) / b.norm(dim=1)).max())


# ---------------------------------------------------------------- influence, dense and as loops


def mean_eigenvalue(g: Tensor) -> float:
    """trace(GᵀG/n)/D: the unit of damping."""
    return float(g.double().square().mean())


def dense_operator(g: Tensor, damping: float) -> Tensor:
    """`(GᵀG/n + λI)⁻¹` `[D, D]`."""
    h = g.T @ g / len(g) + damping * mean_eigenvalue(g) * torch.eye(g.shape[1], dtype=g.dtype)
    return torch.linalg.inv(h)


def dense_joint(train: Mapping[str, Tensor], damping: float) -> Tensor:
    """`(GᵀG/n + diag(λ_b))⁻¹` over whole rows."""
    g = torch.cat(list(train.values()), dim=1)
    lam = torch.cat([torch.full((x.shape[1],), damping * mean_eigenvalue(x), dtype=g.dtype) for x in train.values()])
    return torch.linalg.inv(g.T @ g / len(g) + torch.diag(lam))


def datainf_operator(g: Tensor, damping: float) -> Tensor:
    """`mean_i (g_i g_iᵀ + λI)⁻¹`, every inverse formed outright."""
    lam = damping * mean_eigenvalue(g)
    eye = torch.eye(g.shape[1], dtype=g.dtype)
    return torch.stack([torch.linalg.inv(torch.outer(x, x) + lam * eye) for x in g]).mean(0)


def lissa_operator(g: Tensor, damping: float, steps: int, alpha: float | None = None) -> Tensor:
    """`R` with `r = R v`, times α, after `steps` of `r ← v + (I − αH) r`."""
    eye = torch.eye(g.shape[1], dtype=g.dtype)
    h = g.T @ g / len(g) + damping * mean_eigenvalue(g) * eye
    alpha = alpha or 1 / float(torch.linalg.eigvalsh(h)[-1])
    r = eye
    for _ in range(steps):
        r = eye + r - alpha * h @ r
    return alpha * r


def lissa_vectors(g: Tensor, v: Tensor, lam: float, alpha: float, steps: int) -> tuple[Tensor, Tensor]:
    """`r [m, D]` by the recursion on vectors, and `‖αHr − v‖/‖v‖ [m]`."""
    r = v.clone()

    def h(x: Tensor) -> Tensor:
        return (x @ g.T) @ g / len(g) + lam * x

    for _ in range(steps):
        r = v + r - alpha * h(r)
    return r, (alpha * h(r) - v).norm(dim=1) / v.norm(dim=1)


def released_lambda(grads: Sequence[Tensor]) -> Tensor:
    """Mean over examples and coordinates of g², over 10, one example at a time."""
    s = torch.zeros(len(grads), dtype=grads[0].dtype)
    for i, g in enumerate(grads):
        s[i] = torch.mean(g**2)
    return torch.mean(s) / 10


def released_datainf(v: Tensor, grads: Sequence[Tensor]) -> Tensor:
    """The released DataInf's product for one query and one weight, one training example at a time."""
    lam = released_lambda(grads)
    hvp = torch.zeros_like(v)
    for g in grads:
        c = torch.sum(v * g) / (lam + torch.sum(g**2))
        hvp += (v - c * g) / (len(grads) * lam)
    return hvp


def released_lissa(v: Tensor, grads: Sequence[Tensor], steps: int = 10) -> Tensor:
    """The released LiSSA's product for one query and one weight, wrong sign of λ included."""
    lam = released_lambda(grads)
    r = v
    for _ in range(steps):
        step = torch.zeros_like(v)
        for g in grads:
            step += (torch.sum(g * r) * g - lam * r) / len(grads) / 1000
        r = v + r - step
    return r


def released_scores(hvp: Tensor, grads: Sequence[Tensor]) -> Tensor:
    """`[n]`: the product with each training gradient of one weight."""
    return torch.stack([torch.sum(hvp * g) for g in grads])


# ---------------------------------------------------------------- curvature, from curvlinops

Data = Sequence[tuple[Any, Tensor]]
"""One pair (input, labels) per training example, batch dimension 1."""


def curvature(kind: str, model: Any, params: Sequence[Tensor], data: Data, loss: Any = None) -> Tensor:
    """curvlinops' matrix `[D, D]` of the mean loss: `empirical` (Fisher), `ggn` or `hessian`.

    An example's loss is `loss(model(x), y)`, the summed cross-entropy by default; rows and columns are the entries of
    `params`, in order. GGN and Hessian may have several terms an example (tokens). The empirical Fisher of curvlinops
    squares the gradient of each *term*: see `as_one_number` for examples of several tokens.
    """
    import curvlinops

    operator = {
        "empirical": curvlinops.EFLinearOperator,
        "ggn": curvlinops.GGNLinearOperator,
        "hessian": curvlinops.HessianLinearOperator,
    }[kind]
    loss = loss or torch.nn.CrossEntropyLoss(reduction="sum")
    h = operator(model, loss, list(params), data, batch_size_fn=lambda x: 1)
    return h @ torch.eye(h.shape[1], dtype=params[0].dtype) / len(data)


def as_one_number(losses: Sequence[Tensor]) -> list[Tensor]:
    """Targets `y = f − ½` for a model whose output `f [1, 1]` is an example's loss, and for `MSELoss`.

    Then `∂(f − y)²/∂f = 1`, and the gradient of the example is the gradient of its own loss.
    """
    return [f.detach().reshape(1, 1) - 0.5 for f in losses]


def gradients_by_label(model: Any, params: Sequence[Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """(probabilities `[C]`, gradients of the cross-entropy with each label `[C, D]`) of one input `[1, d]`."""
    log_p = torch.log_softmax(model(x)[0], dim=-1)
    rows = [torch.autograd.grad(-term, list(params), retain_graph=True) for term in log_p]
    return log_p.detach().exp(), torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def expected_fisher(model: Any, params: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """The true Fisher matrix `mean_i Σ_c p_c g_ic g_icᵀ` `[D, D]`: every label, weighted as the model would draw it."""
    terms = [gradients_by_label(model, params, x) for x in inputs]
    return sum(g.T @ (p[:, None] * g) for p, g in terms) / len(terms)  # type: ignore[return-value]


def influence(h: Tensor, damping: float, g: Tensor, v: Tensor) -> Tensor:
    """`V (H + λI)⁻¹ Gᵀ` `[m, n]`, the inverse formed outright; λ = damping × trace(H)/D."""
    lam = damping * float(h.trace()) / len(h)
    return v @ torch.linalg.inv(h + lam * torch.eye(len(h), dtype=h.dtype)) @ g.T
