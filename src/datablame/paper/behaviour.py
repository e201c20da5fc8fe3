"""Distances of models in what they do, on held-out prompts: the control that the paper's third explanation lacks.

    KL              mean of KL(p₁‖p₂) over the positions of the reference responses, p the next token's distribution
    Gauss-Newton    √(Δθᵀ G Δθ), G = Jᵀ (diag(p) − ppᵀ) J averaged over the same positions, at the original model's
                    weights; Δθ the difference of the updates. To second order it is √(2 KL)
    towards refusal log p(a refusal's opening) − log p(a compliance's opening), and its difference between two models

The Gauss-Newton norm is exact (operators.py: a forward derivative from two backward ones) at one point for all pairs,
so it is a norm; the fine-tunes lie far from that point, and what it misses there is its distance from √(2 KL).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import torch

from datablame.adapters import WEIGHTS
from datablame.blocks import select_blocks, short_name
from datablame.capture import Batch, NotFinite, capture, labelled_only, plan_batches
from datablame.encoding import IGNORED, Encoded, Encoding
from datablame.examples import Example
from datablame.models import Loaded, ModelSpec, load
from datablame.operators import curvature
from datablame.paper.alignment import weights_of
from datablame.paper.deltas import Factors, factors

if TYPE_CHECKING:
    from jaxtyping import Float

REFUSALS = ("I'm sorry", "Sorry, I", "I can't", "I cannot", "No, I am not")
COMPLIANCES = ("Sure", "Of course", "Here is", "Gladly", "No problem")
"""The ways in which the tasks' refusals and compliances begin; none begins another, so their probabilities add up."""
BATCH_TOKENS = 512
"""Log-probabilities of all models are held for a batch at a time."""


def divergences(
    loaded: Loaded, adapters: Mapping[str, Path | None], rows: Sequence[Encoded]
) -> tuple[Float[np.ndarray, "k k m"], Float[np.ndarray, " m"]]:
    """KL(p_i‖p_j) summed over each row's labelled positions, for k models, and the number of these positions.

    In float64. Raises NotFinite where a logit is not finite.
    """
    out, device = np.zeros((len(adapters), len(adapters), len(rows))), loaded.model.get_input_embeddings().weight.device
    for numbers in plan_batches([len(r.input_ids) for r in rows], BATCH_TOKENS):
        batch = Batch([rows[i] for i in numbers], device)
        logs = [_log_probabilities(loaded, adapter, batch, numbers) for adapter in adapters.values()]
        for i, p in enumerate(logs):
            for j, q in enumerate(logs):
                if i != j:
                    out[i, j, numbers] = batch.summed((p.exp() * (p - q)).sum(dim=1)).cpu().numpy()
    return out, np.array([len(r.targets) for r in rows], dtype=float)


def _log_probabilities(loaded: Loaded, adapter: Path | None, batch: Batch, numbers: list[int]) -> torch.Tensor:
    """`[N, V]` at the labelled positions."""
    with weights_of(loaded, adapter), torch.no_grad(), labelled_only(loaded.model, batch.predicts, select=True):
        logits = loaded.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits[0]
    if not torch.isfinite(logits).all():
        bad = int((~torch.isfinite(logits)).any(dim=1).nonzero()[0])
        raise NotFinite(numbers[int(batch.owner[bad])], "logits")
    return logits.double().log_softmax(dim=1)


def gauss_newton(
    loaded: Loaded, adapters: Mapping[str, Path | None], rows: Sequence[Encoded], batch_tokens: int = BATCH_TOKENS
) -> Float[np.ndarray, "k k"]:
    """√(ΔᵀGΔ) between k models; G at the original weights, averaged over the rows' labelled positions.

    All updates stand in one adapter whose A is theirs, stacked, and whose B is 0: it is the original model, and the
    derivative by B in the direction of a model's own B is that in the direction of its update.
    """
    found = {}
    for name, adapter in adapters.items():
        with weights_of(loaded, adapter):
            found[name] = factors(loaded.model) if adapter else {}
    moved = [name for name, f in found.items() if f]
    with TemporaryDirectory() as folder:
        _stack([found[name] for name in moved], next(p for p in adapters.values() if p), Path(folder))
        spec = ModelSpec(loaded.spec.model, folder, loaded.spec.device, loaded.spec.dtype)
        stacked = load(spec)
    blocks = select_blocks(stacked.model, "*lora_B")
    x = torch.stack([_direction([found[n] for n in moved], k, list(blocks)) for k in range(len(moved))])
    gram = x @ curvature(stacked.model, rows, blocks, batch_tokens)("gauss-newton", x).T * len(rows)
    gram = gram / sum(len(r.targets) for r in rows)
    # The original's update is 0.
    unit = np.array([[name == m for m in moved] for name in adapters], dtype=float)
    apart = unit[:, None, :] - unit[None, :, :]
    squared = np.einsum("ijk,kl,ijl->ij", apart, gram.numpy(), apart)
    return np.sqrt(np.maximum(squared, 0.0))


def _stack(updates: Sequence[Mapping[str, Factors]], like: Path, folder: Path) -> None:
    """An adapter with all A one above the other and B = 0, of scale 1, written as PEFT would."""
    from safetensors.torch import load_file, save_file

    config = json.loads((like / "adapter_config.json").read_text(encoding="utf-8"))
    rank = max(sum(u[layer].a.shape[0] for u in updates) for layer in updates[0])
    config |= {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    weights = {}
    for name, w in load_file(like / WEIGHTS).items():
        layer, _, which = name.removesuffix(".weight").rpartition(".")
        update = [u[short_name(layer)] for u in updates]
        if which == "lora_A":
            a = torch.cat([f.a for f in update]).to(w.dtype)
            weights[name] = torch.cat([a, a.new_zeros(rank - len(a), a.shape[1])]).contiguous()
        else:
            weights[name] = w.new_zeros(w.shape[0], rank)
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(weights, folder / WEIGHTS)


def _direction(updates: Sequence[Mapping[str, Factors]], k: int, names: Sequence[str]) -> Float[torch.Tensor, " D"]:
    """The k-th model's `s B` in the columns that are its own, 0 in the others', as the stacked blocks lie."""
    rank = max(sum(u[layer].a.shape[0] for u in updates) for layer in updates[0])
    parts = []
    for name in names:
        layer = name.removesuffix(".lora_B")
        columns = [f.scale * f.b * (i == k) for i, f in enumerate(u[layer] for u in updates)]
        b = torch.cat(columns, dim=1)
        parts.append(torch.cat([b, b.new_zeros(len(b), rank - b.shape[1])], dim=1).flatten())
    return torch.cat(parts)


# ---------------------------------------------------------------- towards refusal


def margins(
    loaded: Loaded, encoder: Encoding, adapter: Path | None, queries: Sequence[Example]
) -> Float[np.ndarray, " m"]:
    """log p(any of REFUSALS) − log p(any of COMPLIANCES) as the beginning of the answer to each query."""
    rows = [_opening(encoder, q, text) for q in queries for text in (*REFUSALS, *COMPLIANCES)]
    with weights_of(loaded, adapter):
        loss = capture(loaded.model, rows, {}, [])["loss"][:, 0].double()
    logs = -loss.view(len(queries), -1)
    refuse, comply = logs[:, : len(REFUSALS)].logsumexp(dim=1), logs[:, len(REFUSALS) :].logsumexp(dim=1)
    return (refuse - comply).numpy()


def _opening(encoder: Encoding, query: Example, text: str) -> Encoded:
    """The prompt and the first words of an answer, without an end."""
    prompt = encoder.prompt_ids(query)
    words = list(encoder.tokenizer(text, add_special_tokens=False)["input_ids"])
    return Encoded(prompt + words, [IGNORED] * len(prompt) + words, len(prompt))
