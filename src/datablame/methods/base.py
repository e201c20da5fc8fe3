"""What a method is, and the text and numbers it may ask for.

A method is a dataclass whose fields are its options. It names one *kind* of input in `needs`, is fitted on
that input of the training rows, and scores that input of the queries:

    needs           input of fit (n rows) and score (m rows)
    "gradients"     {block: [n, D]}, the gradient of each row's summed loss
    "hidden"        {"LAYER.TEXT.TOKEN": [n, d]}, hidden states
    "base-hidden"   the same from the base model, adapter off
    "length"        {"length": [n, 1]}, labelled tokens of each row
    "texts"         a list of n `Text(prompt, response)`
    "checkpoints"   a list of `Checkpoint(rate, gradients)`, one for each checkpoint of the training
    "adam"          fit: `Adam(gradients, v, eps, shapes)`; score: {block: [m, D]}
    "sampled"       fit: `Sampled(gradients, draws)`; score: {block: [m, D]}
    "kfac"          fit: `Factored(gradients, labels, factors)`; score: {block: [m, D]}
    "checkpoints-margin"  fit: a list of `Margin(…)`, one for each checkpoint; score: a list of {block: [m, D]}
    "checkpoints-adam"    fit: a list of `Moments(…)`, one for each checkpoint; score: a list of {block: [m, D]}
    "hidden-gradient"  {"state": [n, d], "gradient": [n, d]}, a hidden state and the loss's gradient to it
    "base-gradients"   `Debiased(gradients, base)`, at the fine-tuned and at the base model
    "bif", "daunce" {"losses": [n, S]}, the row's summed loss under each of S perturbed adapters
    "operator"      fit: `Operator(gradients, product)`, of the live model; score: {block: [m, D]}

"gradients-balanced" and "checkpoints-balanced" are gradients in the balanced gauge (see gauge.py).

What an index holds only when it is asked for (`sampled` and others) is made by an extra, see extras/base.py.

`score` returns `[m, n]`, signed, higher = more responsible. Methods know nothing of files or models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

from datablame.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

    Blocks = Mapping[str, Float[Tensor, "n _"]]


class Text(NamedTuple):
    """What the controls on words see of a row."""

    prompt: str
    response: str


class Checkpoint(NamedTuple):
    """Gradients `{block: [n, D]}` at one checkpoint; rate: the learning rates of the steps since the one before."""

    rate: float
    gradients: Blocks


class Adam(NamedTuple):
    """Gradients `{block: [n, D]}`, Adam's bias-corrected second moments `{block: [D]}`, and its ε.

    shapes: `{block: (d_out, d_in)}` of the weights, for methods that project them from both sides.
    """

    gradients: Blocks
    v: Mapping[str, Float[Tensor, " D"]]
    eps: float
    shapes: Mapping[str, tuple[int, int]] = {}


class Sampled(NamedTuple):
    """Gradients `{block: [n, D]}` of the rows' own labels, and as many of labels drawn from the model's prediction."""

    gradients: Blocks
    draws: Sequence[Blocks]


class Kronecker(NamedTuple):
    """A block's `Σ x xᵀ` and `Σ δ δᵀ` over so many `tokens`, x its input and δ the gradient of its output."""

    inputs: Float[Tensor, "i i"]
    outputs: Float[Tensor, "o o"]
    tokens: float


class Factored(NamedTuple):
    """Gradients `{block: [n, o·i]}` of the rows' own labels, those that the factors' δ belong to, and the factors."""

    gradients: Blocks
    labels: Blocks
    factors: Mapping[str, Kronecker]


class Margin(NamedTuple):
    """Gradients `{block: [n, D]}` of the rows' margins `Σ_tokens log(p/(1−p))` at one checkpoint.

    q: `[n]`, the mean of 1−p over the row's labelled tokens · shapes: `{block: (d_out, d_in)}`.
    """

    gradients: Blocks
    q: Float[Tensor, " n"]
    shapes: Mapping[str, tuple[int, int]]


class Moments(NamedTuple):
    """Gradients `{block: [n, D]}` of the rows' summed losses at one checkpoint, and the state of its Adam after `step`.

    lengths: `[n]`, labelled tokens of each row · m, v: `{block: [D]}`, first and second moments, bias-corrected ·
    betas: (β₁, β₂) · eps: as in `m/(√v + ε)` · rate: learning rates since the checkpoint before ·
    shapes: `{block: (d_out, d_in)}`.
    """

    rate: float
    gradients: Blocks
    lengths: Float[Tensor, " n"]
    m: Mapping[str, Float[Tensor, " D"]]
    v: Mapping[str, Float[Tensor, " D"]]
    betas: tuple[float, float]
    step: int
    eps: float
    shapes: Mapping[str, tuple[int, int]]


class Debiased(NamedTuple):
    """Gradients `{block: [n, D]}` at the fine-tuned model, and at the base model along the same directions."""

    gradients: Blocks
    base: Blocks


class Operator(NamedTuple):
    """Gradients `{block: [n, D]}`, and `product("gauss-newton" or "hessian", x [k, D]) -> x H [k, D]` in float64.

    H is the mean over the training rows; D runs over all weights, block after block in the order of `gradients`.
    """

    gradients: Blocks
    product: Callable[[Any, Float[Tensor, "k D"]], Float[Tensor, "k D"]]


class Method(Protocol):
    """The interface of every method; see the module's text."""

    @property
    def needs(self) -> str:
        """The kind of input, as listed above."""
        ...

    def fit(self, train: Any) -> Self:
        """Take the training rows."""
        ...

    def score(self, query: Any) -> Float[Tensor, "m n"]:
        """Score every training row for every query; higher = more responsible."""
        ...


def check_blocks(train: Blocks, query: Blocks) -> None:
    """Raise UserError when the queries' blocks are not the training rows' blocks."""
    if set(train) != set(query):
        odd = sorted(set(train) ^ set(query))
        raise UserError(f"training rows and queries have different blocks ({odd[0]!r} is only in one of them).")


def check_finite(name: str, x: Tensor) -> Tensor:
    """Raise UserError naming block and row when a number is NaN or infinite."""
    import torch

    bad = (~torch.isfinite(x)).any(dim=1).nonzero()
    if len(bad):
        raise UserError(f"block {name!r}: row {int(bad[0])} holds a number that is not finite, so it has no score.")
    return x


def unit_rows(x: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
    """Rows scaled to length 1; a zero row stays zero, so its cosine with anything is 0."""
    import torch

    tiny = torch.finfo(x.dtype).tiny
    # Scaling by the largest entry first keeps squares from under- or overflowing.
    x = x / x.abs().amax(dim=1, keepdim=True).clamp_min(tiny)
    return x / x.norm(dim=1, keepdim=True).clamp_min(tiny)


ROUNDING = 10.0
"""Times the precision of the features: what is shorter is rounding, see `rounding`."""


def rounding(lengths: Blocks, longest: Mapping[str, Float[Tensor, ""]], eps: float) -> dict[str, Bool[Tensor, " k"]]:
    """`{block: [k]}`: in which blocks the gradients of k rows are rounding and nothing else.

    A row's gradient can be zero in some blocks and not in others (from a single token no query projection learns), and
    arithmetic leaves rounding where the zero should be. With `r_b` its length over that of the longest training row in
    block b, that is where `0 < r_b ≤ 10 ε max_b r_b`: free of the scale of blocks and of rows alike.

    lengths: `{block: [k]}` · longest: `{block: []}`, of the training rows · eps: ε of the features' precision.
    """
    import torch

    # A block without training gradients has cosine 0 in any case, and no measure.
    r = torch.stack([(x / longest[b]).where(longest[b] > 0, 0.0) for b, x in lengths.items()])
    found = (r > 0) & (r <= ROUNDING * eps * r.amax(dim=0))
    return dict(zip(lengths, found, strict=True))
