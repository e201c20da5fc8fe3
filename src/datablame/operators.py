"""Products of a curvature matrix with vectors, through autograd; the matrix itself is never formed.

Both matrices are means over the rows, of each row's summed loss `ℓ(z(w))`, z the logits at its labelled positions:

    hessian         ∂²ℓ/∂w²             the gradient's own derivative: backward through backward
    gauss-newton    Jᵀ (∂²ℓ/∂z²) J      J = ∂z/∂w;  ∂²ℓ/∂z² = diag(p) − ppᵀ at each position, p the softmax

`J x` is a derivative of `u ↦ Jᵀu`, which is linear, by u: a forward-mode derivative from two backward ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from datablame.blocks import Blocks, uses_head
from datablame.capture import Batch, labelled_only, plan_batches
from datablame.encoding import Encoded
from datablame.indexing import Reporter, duration

Matrix = Literal["gauss-newton", "hessian"]
Product = Callable[[Matrix, Float[Tensor, "k D"]], Float[Tensor, "k D"]]


def curvature(model: Any, rows: Sequence[Encoded], blocks: Blocks, batch_tokens: int) -> Product:
    """`(matrix, x) ↦ x H`, `[k, D]` in float64 on the CPU; D runs over the blocks' weights, in their order.

    One call is one pass over the rows, whose graph all k vectors share.
    """
    batches = plan_batches([len(r.input_ids) for r in rows], batch_tokens)
    device = model.get_input_embeddings().weight.device
    weights = [layer.weight for layer in blocks.values()]

    def product(matrix: Matrix, x: Float[Tensor, "k D"]) -> Float[Tensor, "k D"]:
        total = torch.zeros_like(x, dtype=torch.float64)
        vectors = [_shaped(v, weights) for v in x]
        with _trainable(weights), sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            for numbers in batches:
                batch = Batch([rows[i] for i in numbers], device)
                logits = _logits(model, batch, blocks)
                times = (_hessian if matrix == "hessian" else _gauss_newton)(batch, logits, weights)
                for k, v in enumerate(vectors):
                    total[k] += torch.cat([part.flatten().to("cpu", torch.float64) for part in times(v)])
        return total / len(rows)

    return product


def counted(product: Product, name: str, total: int, reporter: Reporter) -> Product:
    """The same product for a method that calls it `total` times at most, with a bar, which the caller ends.

    The second call tells how long all take: the first is of another matrix or of other vectors, for the trace.
    """
    done = 0

    def times(matrix: Matrix, x: Float[Tensor, "k D"]) -> Float[Tensor, "k D"]:
        nonlocal done
        if not done:
            reporter.start(name, total, "passes")
        start = time.perf_counter()
        hx = product(matrix, x)
        done += 1
        if done == 2:
            about = duration((time.perf_counter() - start) * (total - 1))
            reporter.note(f"{name}: at most {total} passes with a curvature matrix of the model, about {about}")
        reporter.advance(1)
        return hx

    return times


Times = Callable[[list[Tensor]], tuple[Tensor, ...]]


def _hessian(batch: Batch, logits: Float[Tensor, "N V"], weights: list[Tensor]) -> Times:
    """`x ↦ ∂(g·x)/∂w`, g the gradient of the batch's summed losses."""
    loss = batch.losses(logits).sum()
    g = torch.autograd.grad(loss, weights, create_graph=True)
    return lambda x: torch.autograd.grad(g, weights, x, retain_graph=True, materialize_grads=True)


def _gauss_newton(batch: Batch, logits: Float[Tensor, "N V"], weights: list[Tensor]) -> Times:
    """`x ↦ Jᵀ (p ∘ Jx − p (p·Jx))`."""
    del batch
    u = torch.zeros_like(logits, requires_grad=True)
    back = torch.autograd.grad(logits, weights, u, create_graph=True)
    p = logits.detach().softmax(dim=1)

    def times(x: list[Tensor]) -> tuple[Tensor, ...]:
        (jx,) = torch.autograd.grad(back, u, x, retain_graph=True)
        return torch.autograd.grad(logits, weights, p * jx - p * (p * jx).sum(dim=1, keepdim=True), retain_graph=True)

    return times


def _logits(model: Any, batch: Batch, blocks: Blocks) -> Float[Tensor, "N V"]:
    """At the labelled positions, in float32 at least."""
    select = not uses_head(model, blocks)
    with labelled_only(model, batch.predicts, select):
        out = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
    logits = out[0] if select else out[batch.predicts]
    return logits if logits.dtype == torch.float64 else logits.float()


def _shaped(x: Float[Tensor, " D"], weights: list[Tensor]) -> list[Tensor]:
    parts = x.split([w.numel() for w in weights])
    return [part.view_as(w).to(w.device, w.dtype) for part, w in zip(parts, weights, strict=True)]


@contextmanager
def _trainable(weights: list[Tensor]) -> Iterator[None]:
    """These weights, frozen otherwise, have gradients for the time of the block."""
    frozen = [w for w in weights if not w.requires_grad]
    try:
        with torch.enable_grad():
            for w in frozen:
                w.requires_grad_(True)
            yield
    finally:
        for w in frozen:
            w.requires_grad_(False)
