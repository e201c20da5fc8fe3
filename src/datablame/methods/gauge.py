"""LoRA's gauge: `ΔW = B A` is the same matrix for `B M`, `M⁻¹ A`, and gradients of A and B are not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from datablame.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from datablame.methods.base import Blocks

    Weights = Mapping[str, Float[Tensor, "out in"]]

A, B = ".lora_A", ".lora_B"


class Balanced(Mapping[str, "Tensor"]):
    """Gradients `{block: [n, D]}` as they would be in the balanced gauge; a block is turned when it is asked for.

    With the thin SVD `BA = U S Vᵀ` the balanced factors are `A' = S^½ Vᵀ` and `B' = U S^½`: both have the same
    singular values, and no choice is left but rotations of equal ones. From `∂A = Bᵀ ∂W`, `∂B = ∂W Aᵀ` follow

        ∂A' = (B⁺B')ᵀ ∂A        ∂B' = ∂B (A'A⁺)ᵀ

    which are exact also where BA has a rank below r: a direction in which BA is 0 has balanced gradient 0. Blocks that
    are not LoRA's stay as they are. weights: `{block: [out, in]}`, A and B of every LoRA block.
    Raises UserError when there is no LoRA block, or one without its partner's weights.
    """

    def __init__(self, gradients: Blocks, weights: Weights) -> None:
        layers = {b.removesuffix(A).removesuffix(B) for b in gradients if b.endswith((A, B))}
        if not layers:
            raise UserError("gauge=balanced is for LoRA's A and B, and there is none among these blocks.")
        if missing := [layer + end for layer in sorted(layers) for end in (A, B) if layer + end not in weights]:
            raise UserError(f"gauge=balanced: the weights of {missing[0]} are missing.")
        self._gradients = gradients
        self._turns = {k: t for layer in layers for k, t in _turns(layer, weights).items()}

    def __getitem__(self, block: str) -> Tensor:
        g = self._gradients[block]
        if block not in self._turns:
            return g
        turn = self._turns[block]
        r = len(turn)
        if block.endswith(A):
            return (turn.T @ g.double().view(len(g), r, -1)).flatten(1).to(g.dtype)
        return (g.double().view(len(g), -1, r) @ turn).flatten(1).to(g.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._gradients)

    def __len__(self) -> int:
        return len(self._gradients)


def _turns(layer: str, weights: Weights) -> dict[str, Float[Tensor, "r r"]]:
    """`B⁺B'` for A's gradient, `(A'A⁺)ᵀ` for B's, in float64."""
    import torch

    a, b = weights[layer + A].double(), weights[layer + B].double()
    # The SVD of BA from factors of size r: B = Q_b R_b, Aᵀ = Q_a R_a, and R_b R_aᵀ is [r, r].
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vt = torch.linalg.svd(r_b @ r_a.T)
    root = torch.where(s > s[0] * len(s) * torch.finfo(torch.float64).eps, s, 0.0).sqrt()
    return {
        layer + A: torch.linalg.pinv(b) @ (q_b @ u * root),
        layer + B: torch.linalg.pinv(a.T) @ (q_a @ vt.T * root),
    }
