"""Hidden states: RepSim, on the fine-tuned or on the base model; RepT; the direction of a concept."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from datablame.errors import UserError
from datablame.methods.base import check_finite, unit_rows

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from datablame.methods.base import Blocks

_NAME = re.compile(r"(\d+)\.(prompt|response)\.(last|mean)")


@dataclass
class RepSim:
    """Cosine of hidden states, from -1 to 1 (paper, section 3).

    layer: a number, `middle` (of the layers kept, the nearest to it) or `last` (after the final norm).
    text: `prompt`, or `response`, whose hidden states have seen the prompt too.
    token: `last`, or `mean` over the response (its default). The last token of a response is the last one that
    training labelled: with many chat templates the newline after the end of turn.
    The paper's variant is `repsim:layer=last,text=prompt`.

    The input is `{"LAYER.TEXT.TOKEN": [n, d]}`; a mapping with a single block is taken as it is.
    """

    needs: ClassVar[str] = "hidden"
    name: ClassVar[str] = "repsim"
    layer: int | str = "middle"
    text: Literal["prompt", "response"] = "response"
    token: Literal["last", "mean"] | None = None

    def __post_init__(self) -> None:
        if self.text not in ("prompt", "response"):
            raise UserError(f"{self.name}: text={self.text!r}; use prompt or response.")
        self.token = self.token or ("last" if self.text == "prompt" else "mean")
        if self.token not in ("last", "mean") or (self.text, self.token) == ("prompt", "mean"):
            raise UserError(f"{self.name}: token={self.token!r} of the {self.text}; use last, or mean of the response.")
        if not isinstance(self.layer, int) and self.layer not in ("middle", "last"):
            raise UserError(f"{self.name}: layer={self.layer!r}; use a number, middle or last.")

    def fit(self, train: Blocks) -> Self:
        """Choose the block and scale its rows. Raises UserError when it is missing or a row has no state."""
        self.block = self._choose(list(train))
        self.train = self._units(train[self.block])
        return self

    def score(self, query: Blocks) -> Float[Tensor, "m n"]:
        """`[m, n]`, between -1 and 1."""
        if self.block not in query:
            raise UserError(f"{self.name}: the queries have no block {self.block!r}.")
        return self._units(query[self.block]) @ self.train.T

    def _choose(self, blocks: list[str]) -> str:
        if len(blocks) == 1:
            return blocks[0]
        layers = sorted({int(m[1]) for b in blocks if (m := _NAME.fullmatch(b))})
        if not layers:
            raise UserError(f"{self.name}: no hidden states among {blocks[:4]}; blocks are named LAYER.TEXT.TOKEN.")
        # An index always keeps the last layer, so the highest number is the model's depth.
        middle = min(layers, key=lambda k: abs(k - layers[-1] // 2))
        layer = {"last": layers[-1], "middle": middle}.get(str(self.layer), self.layer)
        name = f"{layer}.{self.text}.{self.token}"
        if name not in blocks:
            raise UserError(f"{self.name}: layer {layer} is not in this index; it holds {layers}. Index with --layers.")
        return name

    def _units(self, h: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        return unit_rows(self._states(h))

    def _states(self, h: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        check_finite(self.block, h)
        empty = (h == 0).all(dim=1).nonzero()
        if len(empty):
            why = (
                f" (a text row has no prompt). Use {self.name}:text=response."
                if self.text == "prompt"
                else ": it is all zeros."
            )
            raise UserError(f"{self.name}: row {int(empty[0])} has no hidden state for the {self.text}{why}")
        return h


@dataclass
class BaseRepSim(RepSim):
    """Control: RepSim on the base model, adapter off. What fine-tuning taught cannot show here."""

    needs: ClassVar[str] = "base-hidden"
    name: ClassVar[str] = "repsim-base"


@dataclass
class RepT:
    """`cos([ĥ; ĝ], [ĥ'; ĝ'])`: cosine of a hidden state and the loss's gradient to it, each of length 1.

    h is the state of the last prompt token in one layer and g = ∂loss/∂h (Li et al. 2025, 2510.02334). With both halves
    of length 1 the score is the mean of their two cosines. A row whose gradient is zero has 0 for that half.
    """

    needs: ClassVar[str] = "hidden-gradient"

    def fit(self, train: Blocks) -> Self:
        """Take `{"state": [n, d], "gradient": [n, d]}`. Raises UserError when a row has no prompt."""
        self.train = self._signature(train)
        return self

    def score(self, query: Blocks) -> Float[Tensor, "m n"]:
        """`[m, n]`, between -1 and 1."""
        return self._signature(query) @ self.train.T / 2

    def _signature(self, rows: Blocks) -> Float[Tensor, "n 2d"]:
        import torch

        if set(rows) != {"state", "gradient"}:
            raise UserError("rept: no hidden states with their gradients (index with --extras hidden-gradient).")
        h, g = check_finite("state", rows["state"]), check_finite("gradient", rows["gradient"])
        empty = (h == 0).all(dim=1).nonzero()
        if len(empty):
            raise UserError(f"rept: row {int(empty[0])} has no hidden state for the prompt (a text row has none).")
        return torch.cat([unit_rows(h), unit_rows(g)], dim=1)


@dataclass
class Concept(RepSim):
    """`(h_i − μ)·w/‖w‖` with `w = mean(queries) − μ`: how far a row lies along the queries' direction.

    The difference in means (Marks & Tegmark 2023, 2310.06824; as persona vectors, Chen et al. 2025, 2507.21509). μ is
    the mean over training rows, the level of what the model learnt in all. Contrast queries have a direction of their
    own, `w = mean(h of this output) − mean(h of that one)`.

    layer, text, token: as in repsim. over: `all`, one direction of all queries, so that they share one ranking;
    `each`, a direction of each query.
    """

    needs: ClassVar[str] = "hidden"
    name: ClassVar[str] = "concept"
    over: Literal["all", "each"] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.over not in ("all", "each"):
            raise UserError(f"concept: over={self.over!r}; use all or each.")

    def fit(self, train: Blocks) -> Self:
        """Choose the block and centre its rows. Raises UserError when it is missing or a row has no state."""
        self.block = self._choose(list(train))
        h = self._states(train[self.block]).double()
        self.mean = h.mean(dim=0)
        self.train = h - self.mean
        return self

    def score(self, query: Blocks) -> Float[Tensor, "m n"]:
        """`[m, n]`, in units of the hidden state."""
        return self._project(self._of(query) - self.mean)

    def score_against(self, query: Blocks, against: Blocks) -> Float[Tensor, "m n"]:
        """`[m, n]` for contrast queries: along `query` minus `against`."""
        return self._project(self._of(query) - self._of(against))

    def _of(self, query: Blocks) -> Float[Tensor, "m d"]:
        if self.block not in query:
            raise UserError(f"{self.name}: the queries have no block {self.block!r}.")
        self.dtype = query[self.block].dtype
        return self._states(query[self.block]).double()

    def _project(self, w: Float[Tensor, "m d"]) -> Float[Tensor, "m n"]:
        w = w.mean(dim=0).expand_as(w) if self.over == "all" else w
        return (unit_rows(w) @ self.train.T).to(self.dtype)
