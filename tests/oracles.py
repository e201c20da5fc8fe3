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
