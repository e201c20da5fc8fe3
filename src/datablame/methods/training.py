"""Methods that follow the training itself: TracInCP over its checkpoints, AdamDot with its optimizer's state."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from datablame.errors import UserError
from datablame.methods.base import Adam, Checkpoint, check_finite
from datablame.methods.gradients import GradDot

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Float
    from torch import Tensor

    from datablame.methods.base import Blocks
    from datablame.methods.blockwise import Pair


@dataclass(kw_only=True)
class TracInCP(GradDot):
    """`Σ_c η_c V_c G_cᵀ` over saved checkpoints c, η_c the learning rates of the steps since the one before, summed.

    The drop of the query's loss, to first order, by plain gradient descent on the row once a pass (TracInCP of
    Pruthi et al. 2020, 2002.08484). That the trainer is Adam, not gradient descent, is left out: see
    adamdot. Options: as in graddot, in each checkpoint by itself; ranks and votes are summed with the same η_c.
    """

    needs = "checkpoints"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gauge == "balanced":
            self.needs = "checkpoints-balanced"

    def fit(self, train: Sequence[Checkpoint]) -> Self:  # type: ignore[override]
        """Take `[Checkpoint(rate, {block: [n, D]}), …]`. Raises UserError when there is none."""
        if not train:
            raise UserError("tracincp: there are no checkpoints (index with --checkpoints).")
        self.checkpoints = train
        return self

    def score(self, query: Sequence[Checkpoint]) -> Float[Tensor, "m n"]:  # type: ignore[override]
        """`[m, n]`, in loss. The queries' rates are not looked at."""
        if len(query) != len(self.checkpoints):
            raise UserError(f"tracincp: {len(self.checkpoints)} checkpoints of training rows, {len(query)} of queries.")
        total: Tensor | float = 0.0
        for of_train, of_query in zip(self.checkpoints, query, strict=True):
            super().fit(of_train.gradients)
            total = total + of_train.rate * super().score(of_query.gradients).double()
        return self.finish(total)  # type: ignore[arg-type]


@dataclass(kw_only=True)
class AdamDot(GradDot):
    """`Σ_b V (G / (√v̂ + ε))ᵀ`: the row's gradient scaled as the trainer's own Adam scales it at the end.

    v̂ is the bias-corrected second moment of the optimizer's state, by weight. One side is scaled, because the query's
    loss falls by its plain gradient times the *step*: the drop of the query's loss per unit of learning rate, momentum
    and the row's own share in v̂ left out. Source: Xia et al. 2024 (LESS, 2402.04333), section 3.1, without its
    projection and momentum. Options: as in graddot; RelatIF divides by the scaled gradient's norm. Centring is done
    before the scaling. There is no `gauge=balanced`: v̂ belongs to the weights as they are stored. A block whose v̂ is
    0 throughout (LoRA's A after the first step, at which B was 0) has no scale, and contributes 0, with a warning.
    """

    needs = "adam"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gauge != "stored":
            raise self._error("gauge=balanced: the optimizer's state belongs to the weights as stored.")

    def fit(self, train: Adam) -> Self:  # type: ignore[override]
        """Take `Adam({block: [n, D]}, {block: [D]}, ε)`. Raises UserError for a block without its second moments."""
        if missing := sorted(set(train.gradients) - set(train.v)):
            raise UserError(f"adamdot: the optimizer's state has no second moments of block {missing[0]!r}.")
        self.adam = train
        return super().fit(train.gradients)

    def pairs(self, query: Blocks) -> Iterator[Pair]:
        """(block, G/(√v̂ + ε), V) of each block."""
        self._warn_of_unmoved()
        for block, g, v in super().pairs(query):
            moments = check_finite(f"{block}' of the optimizer's state", self.adam.v[block][None])[0]
            if len(moments) != g.shape[1]:
                raise self._error(f"block {block!r}: {len(moments)} second moments for {g.shape[1]} weights.")
            yield block, g / (moments.to(g.dtype).sqrt() + self.adam.eps) if moments.any() else g * 0, v

    def _warn_of_unmoved(self) -> None:
        unmoved = [block for block in self.adam.gradients if not self.adam.v[block].any()]
        if unmoved:
            warnings.warn(
                f"the optimizer has seen only zero gradients of {len(unmoved)} of {len(self.adam.gradients)} blocks, "
                f"which contribute 0 to the scores (the first: {unmoved[0]!r}; LoRA's A has none while B is 0).",
                stacklevel=4,
            )
