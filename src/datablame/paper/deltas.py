"""How far two fine-tunes lie apart: norms of `B₁A₁ − B₂A₂`, from LoRA's small factors; and how distances are ranked.

    ‖B₁A₁ − B₂A₂‖_F = ‖[B₁ −B₂] [A₁; A₂]‖_F = ‖R_u R_vᵀ‖_F,   R_u, R_v of the QR decompositions of the two factors

In float64: nothing large is subtracted from something as large, which expanding the square would do, and no matrix of
the size of a layer is formed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from datablame.blocks import short_name

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class Factors(NamedTuple):
    """An update `s B A` of one layer; scale: s, α/r as PEFT has it."""

    a: Float[Tensor, "r i"]
    b: Float[Tensor, "o r"]
    scale: float


def factors(model: Any) -> dict[str, Factors]:
    """`{layer: factors}` of the adapter that a PEFT model has now, in float64, on the CPU, in the model's order."""
    import torch

    def copied(layer: Any) -> Any:
        return layer.weight.detach().to("cpu", torch.float64, copy=True)  # the adapter's weights are exchanged in place

    return {
        short_name(name): Factors(
            copied(module.lora_A["default"]), copied(module.lora_B["default"]), float(module.scaling["default"])
        )
        for name, module in model.named_modules()
        if "default" in getattr(module, "lora_A", {})
    }


def distance(first: Factors | None, second: Factors | None, scaled: bool) -> float:
    """‖B₁A₁ − B₂A₂‖_F of one layer; None: no update. scaled: of the updates as the model has them, with α/r."""
    import torch

    parts = [(f, sign) for f, sign in ((first, 1.0), (second, -1.0)) if f is not None]
    if not parts:
        return 0.0
    u = torch.cat([sign * (f.scale if scaled else 1.0) * f.b for f, sign in parts], dim=1)
    v = torch.cat([f.a for f, _ in parts], dim=0)
    return float(torch.linalg.norm(torch.linalg.qr(u)[1] @ torch.linalg.qr(v.T)[1].T))


def norms(first: Mapping[str, Factors] | None, second: Mapping[str, Factors] | None) -> dict[str, Any]:
    """Of a pair of fine-tunes; None: the original model.

    mean, sd: over adapted layers (each q and each v is one), without α/r, as the released code takes them of one
    adapter. whole: of all layers together, with α/r: the change of the weights as the model has them.
    """
    names = dict.fromkeys([*(first or {}), *(second or {})])
    pairs = [((first or {}).get(n), (second or {}).get(n)) for n in names]
    each = [distance(a, b, scaled=False) for a, b in pairs]
    whole = math.sqrt(sum(distance(a, b, scaled=True) ** 2 for a, b in pairs))
    return {"mean": float(np.mean(each)), "sd": float(np.std(each)), "layers": len(each), "whole": whole}


# ---------------------------------------------------------------- six pairs, ranked


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's; None where one of the two does not vary."""
    from scipy.stats import rankdata

    a, b = rankdata(x), rankdata(y)
    if a.std() == 0 or b.std() == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def relabelled(x: Sequence[float], y: Sequence[float], pairs: Sequence[tuple[str, str]]) -> float | None:
    """Mantel's test (1967): the share of relabellings of the models under which |ρ| is at least as large as seen.

    Pairs share models, so they are no independent witnesses: four models have 24 relabellings, and no share is below
    1/24, not even of a perfect correlation. None where there is no correlation.
    """
    seen = rank_correlation(x, y)
    if seen is None:
        return None
    models = list(dict.fromkeys(m for pair in pairs for m in pair))
    at = {frozenset(pair): i for i, pair in enumerate(pairs)}
    far = []
    for order in permutations(models):
        new = dict(zip(models, order, strict=True))
        moved = [y[at[frozenset((new[a], new[b]))]] for a, b in pairs]
        far.append(abs(rank_correlation(x, moved) or 0.0) >= abs(seen) - 1e-12)
    return float(np.mean(far))
