"""The benchmark's views of a row: which tokens carry the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from conftest import ROWS
from datablame.blocks import select_blocks
from datablame.capture import capture
from datablame.encoding import Encoding, EncodingOptions, padded
from datablame.evaluation.views import eager_attention, prompt_only
from datablame.examples import from_prompt
from datablame.models import ModelSpec, load
from oracles import gradients_alone, relative_error


def encoded(tokenizer: Any, loss_on: Any = "response") -> list[Any]:
    encoding = Encoding(tokenizer, EncodingOptions(loss_on=loss_on), 128)
    return [encoding.encode(from_prompt(p, r)) for p, r in ROWS]


def test_prompt_and_response_add_up_to_all(model_dir: Path, adapter_dir: Path, tokenizer: Any) -> None:
    model = load(ModelSpec(str(model_dir), str(adapter_dir), "cpu", "float64")).model
    blocks = select_blocks(model)
    response, everything = encoded(tokenizer), encoded(tokenizer, "all")
    prompt = [prompt_only(r) for r in response]
    a, b = (capture(model, rows, blocks, []) for rows in (response, prompt))
    want = gradients_alone(model, everything, {k: m.weight for k, m in blocks.items()})
    for name, g in want.items():
        # Llama's norms and softmax round to float32, also in a float64 model, and so once more in each backward pass.
        assert relative_error(a[f"gradients/{name}"] + b[f"gradients/{name}"], g) < 1e-6
    for r, p, e in zip(response, prompt, everything, strict=True):
        assert sorted(r.targets + p.targets) == e.targets


def test_padded_rows_are_what_the_released_code_feeds(model_dir: Path, adapter_dir: Path, tokenizer: Any) -> None:
    """128 ids padded on the left, an attention mask, labels = ids, and transformers' own loss."""
    model = load(ModelSpec(str(model_dir), str(adapter_dir), "cpu")).model
    blocks = select_blocks(model)
    rows = [padded(r, tokenizer.eos_token_id, 128) for r in encoded(tokenizer)]
    with eager_attention(model):
        got = capture(model, rows, blocks, [], batch_tokens=400)
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    tokenizer.padding_side = "left"
    weights = {k: m.weight.requires_grad_(True) for k, m in blocks.items()}
    for i, row in enumerate(encoded(tokenizer)):
        batch = tokenizer.pad({"input_ids": [row.input_ids]}, padding="max_length", max_length=128, return_tensors="pt")
        assert batch["input_ids"][0].tolist() == rows[i].input_ids
        batch["attention_mask"] = (torch.arange(128) >= 128 - len(row.input_ids)).long()[None]
        loss = model(**batch, labels=batch["input_ids"]).loss * 127  # the model takes the mean over shifted positions
        assert abs(float(loss.detach() - got["loss"][i, 0])) < 1e-5 * float(loss.detach())
        for name, g in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
            assert relative_error(got[f"gradients/{name}"][i : i + 1], g.reshape(1, -1)) < 1e-3
    assert got["length"][:, 0].tolist() == [127.0] * len(rows)
    # The padding counts; with fused attention, which gives wholly masked positions nothing, it would not.
    everything = capture(model, encoded(tokenizer, "all"), blocks, [])
    for name in (n for n in blocks if "v_proj" in n):
        key = f"gradients/{name}"
        assert relative_error(got[key], everything[key]) > 1e-2


def test_long_rows_are_cut(tokenizer: Any) -> None:
    row = padded(encoded(tokenizer)[4], 2, length=10)
    assert len(row.input_ids) == 10
    assert row.padding == 0
    assert row.labels == row.input_ids
    assert row.dropped > 0
