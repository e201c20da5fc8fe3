"""A score as an inner product with the row's gradient or hidden state, so that it can be taken apart by tokens.

Many scores are `Σ_b s_b ⟨P v_b, g_b⟩`: v of the query, g of the training row, P a symmetric matrix that the training
rows fix, s_b ≥ 0 a number of the pair (one over lengths, for a cosine). With the pair's s_b held at its value, the
direction of the row's gradient is `U_b = s_b P v_b`, that of the query's `W_b = s_b P g_b`, and

    score = Σ_b ⟨U_b, g_b⟩ = Σ_b ⟨W_b, v_b⟩

    graddot, gradcos    P = I (with `center`, the projection that takes the common directions out)
    exact, exact-block  P = (GᵀG/n + λI)⁻¹, without a factorisation: `P v = (v − Σ_i score_i g_i / n) / λ`, since
                        `(GᵀG/n + λI) u = v` and `G u` is the row of scores
    datainf             P = mean_i[(g_i g_iᵀ + λI)⁻¹]
    repsim              P = I, on hidden states, s one over both lengths
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from datablame.methods.base import rounding
from datablame.methods.gradients import GradCos, GradDot
from datablame.methods.gram import columns, product, squares
from datablame.methods.influence import DataInf, Exact, ExactBlock
from datablame.methods.representations import BaseRepSim, RepSim

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float
    from torch import Tensor

    from datablame.methods.base import Blocks

    Sums = dict[str, Float[Tensor, " k"]]

ON_GRADIENTS = (GradDot, GradCos, Exact, ExactBlock, DataInf)
ON_HIDDEN = (RepSim, BaseRepSim)


class Directions(NamedTuple):
    """`{block: [k, D]}` in float64, for k pairs of one query and a row: what the row's, and the query's, is times."""

    of_row: dict[str, Tensor]
    of_query: dict[str, Tensor]


def is_linear(method: Any) -> bool:
    """Has `directions`: not with ranks or votes over blocks, and only in the stored gauge. Subclasses have none."""
    if type(method) in ON_HIDDEN:
        return True
    return type(method) in ON_GRADIENTS and (method.aggregate, method.gauge) == ("sum", "stored")


def directions(method: Any, train: Blocks, query: Blocks, rows: Sequence[int]) -> Directions:
    """Directions of one query (`{block: [1, D]}`) and the training rows at k positions.

    For a method `is_linear` says yes to. Cost: one walk over the blocks; for the influence methods one more of the
    method's own scores, with the k rows as queries. Memory: 3 (k + 1) D numbers.
    """
    import torch

    if type(method) in ON_HIDDEN:
        block = method.fit(train).block
        v, g = query[block].double(), train[block][list(rows)].double()
        s = 1 / (v.norm(dim=1) * g.norm(dim=1))[:, None]
        return Directions({block: s * v}, {block: s * g})
    x = {b: torch.cat([query[b], train[b][list(rows)]]).double() for b in train}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of empty blocks the scores themselves have warned
        px, lengths = _applied(method, train, x)
    s = {b: scale[:, None] for b, scale in _scales(method, px, lengths, x).items()}
    return Directions({b: s[b] * p[:1] for b, p in px.items()}, {b: s[b] * p[1:] for b, p in px.items()})


def _applied(method: Any, train: Blocks, x: Blocks) -> tuple[dict[str, Tensor], Sums]:
    """`P x` of every block, and the squared lengths of the rows of x (centred, where the method centres).

    For a cosine in each block, 0 where the gradient is nothing but rounding.
    """
    plain = method if type(method) is GradCos else replace(method, relatif=None)
    scores = plain.fit(train).score(x) if type(method) is Exact else None
    out, lengths, longest = {}, {}, {}
    width = 0
    if type(method) is Exact and method.unit == "rank":  # of all blocks that are not empty, see Exact
        width = sum(g.shape[1] for _, g, _ in method.fit(train).pairs(x) if squares(g).any())
    for block, g, v in method.fit(train).pairs(x):
        if type(method) is ExactBlock:
            scores = plain.fit({block: train[block]}).score({block: x[block]})
        if type(method) in (GradDot, GradCos):
            out[block] = v.double()
        else:
            out[block] = _inverse(method.damping * _unit(method, g, width), g, v, scores)
        lengths[block] = squares(v)
        longest[block] = squares(g).max().sqrt()
    if type(method) is GradCos and method.over == "block":
        noise = rounding({b: q.sqrt() for b, q in lengths.items()}, longest, method.eps)
        lengths = {b: q.masked_fill(noise[b], 0) for b, q in lengths.items()}
    return out, lengths


def _unit(method: Any, g: Float[Tensor, "n D"], width: int) -> float:
    """Of the method's damping, in mean eigenvalues of the block. width: of all blocks together, for `exact`."""
    return method.in_means(len(g), width or g.shape[1]) if isinstance(method, ExactBlock) else 1.0


def _inverse(
    damping: float, g: Float[Tensor, "n D"], v: Float[Tensor, "k D"], scores: Float[Tensor, "k n"] | None
) -> Float[Tensor, "k D"]:
    """`(GᵀG/n + λI)⁻¹ v` from its scores; DataInf's inverse without them. 0 in a block without training gradients."""
    mean = float(squares(g).sum()) / g.numel()
    if mean == 0:
        return v.double() * 0
    lam = damping * mean
    weights = product(v, g) / (lam + squares(g)) if scores is None else scores
    out = v.double().clone()
    for part, g_c in columns(g):
        out[:, part] = (out[:, part] - weights @ g_c / len(g)) / lam
    return out


def _scales(method: Any, px: Blocks, lengths: Sums, x: Blocks) -> Sums:
    """s_b of the pairs `[k]`, in each block."""
    import torch

    def one_over(squared: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
        return squared.clamp_min(0).rsqrt().where(squared > 0, 0.0)

    if type(method) is GradCos:
        if method.over == "block":
            return {b: one_over(q[0]) * one_over(q[1:]) / len(px) for b, q in lengths.items()}
        total = torch.stack(list(lengths.values())).sum(dim=0)
        return dict.fromkeys(px, one_over(total[0]) * one_over(total[1:]))
    if method.relatif is None:
        return {b: p.new_ones(len(p) - 1) for b, p in px.items()}
    parts = [(p * (x[b] if method.relatif == "l" else p))[1:].sum(dim=1) for b, p in px.items()]
    return dict.fromkeys(px, one_over(torch.stack(parts).sum(dim=0)))
