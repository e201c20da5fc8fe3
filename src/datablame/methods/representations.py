"""Similarity of hidden states: RepSim, on the fine-tuned or on the base model."""

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
    layer: int | str = "middle"
    text: Literal["prompt", "response"] = "response"
    token: Literal["last", "mean"] | None = None

    def __post_init__(self) -> None:
        if self.text not in ("prompt", "response"):
            raise UserError(f"repsim: text={self.text!r}; use prompt or response.")
        self.token = self.token or ("last" if self.text == "prompt" else "mean")
        if self.token not in ("last", "mean") or (self.text, self.token) == ("prompt", "mean"):
            raise UserError(f"repsim: token={self.token!r} of the {self.text}; use last, or mean of the response.")
        if not isinstance(self.layer, int) and self.layer not in ("middle", "last"):
            raise UserError(f"repsim: layer={self.layer!r}; use a number, middle or last.")

    def fit(self, train: Blocks) -> Self:
        """Choose the block and scale its rows. Raises UserError when it is missing or a row has no state."""
        self.block = self._choose(list(train))
        self.train = self._units(train[self.block])
        return self

    def score(self, query: Blocks) -> Float[Tensor, "m n"]:
        """`[m, n]`, between -1 and 1."""
        if self.block not in query:
            raise UserError(f"repsim: the queries have no block {self.block!r}.")
        return self._units(query[self.block]) @ self.train.T

    def _choose(self, blocks: list[str]) -> str:
        if len(blocks) == 1:
            return blocks[0]
        layers = sorted({int(m[1]) for b in blocks if (m := _NAME.fullmatch(b))})
        if not layers:
            raise UserError(f"repsim: no hidden states among {blocks[:4]}; blocks are named LAYER.TEXT.TOKEN.")
        # An index always keeps the last layer, so the highest number is the model's depth.
        middle = min(layers, key=lambda k: abs(k - layers[-1] // 2))
        layer = {"last": layers[-1], "middle": middle}.get(str(self.layer), self.layer)
        name = f"{layer}.{self.text}.{self.token}"
        if name not in blocks:
            raise UserError(f"repsim: layer {layer} is not in this index; it holds {layers}. Index with --layers.")
        return name

    def _units(self, h: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        check_finite(self.block, h)
        empty = (h == 0).all(dim=1).nonzero()
        if len(empty):
            why = (
                " (a text row has no prompt). Use repsim:text=response."
                if self.text == "prompt"
                else ": it is all zeros."
            )
            raise UserError(f"repsim: row {int(empty[0])} has no hidden state for the {self.text}{why}")
        return unit_rows(h)


@dataclass
class BaseRepSim(RepSim):
    """Control: RepSim on the base model, adapter off. What fine-tuning taught cannot show here."""

    needs: ClassVar[str] = "base-hidden"
