"""Per-example features are exact and do not depend on their batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import ROWS, make_model, save_adapter
from datablame.blocks import select_blocks
from datablame.capture import HIDDEN_KINDS, NotFinite, capture, parse_layers, plan_batches
from datablame.encoding import Encoded, Encoding, EncodingOptions
from datablame.errors import UserError
from datablame.examples import Example, from_prompt
from datablame.models import ModelSpec, load, load_tokenizer
from datablame.store import FeatureStore
from oracles import gradients_alone, hidden_alone, loss_alone, relative_error

BATCHES = (1, 130, 10_000)
"""Token budgets that make batches of 1, 3 and 8 rows."""
LIMITS = {"float64": 1e-10, "float32": 1e-5}


def encode(tokenizer: Any, **options: Any) -> list[Encoded]:
    encoding = Encoding(tokenizer, EncodingOptions(**options), 128)
    rows = [encoding.encode(from_prompt(p, r)) for p, r in [*ROWS, ("Last?", "Yes.")]]
    assert len({len(r.input_ids) for r in rows}) > 3  # different lengths, else the test shows nothing
    return rows


def weights(model: Any, blocks: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: module.weight for name, module in blocks.items()}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("batch_tokens", BATCHES)
@pytest.mark.parametrize("pattern", [None, "*.down_proj,*.layers.0.self_attn.k_proj,layers.0.self_attn.k_proj"])
def test_gradients_equal_autograd(
    model_dir: Path, adapter_dir: Path, tokenizer: Any, dtype: str, batch_tokens: int, pattern: str | None
) -> None:
    loaded = load(ModelSpec(str(model_dir), None if pattern else str(adapter_dir), "cpu", dtype))
    blocks, rows = select_blocks(loaded.model, pattern), encode(tokenizer)
    assert len(blocks) == (4 if pattern else 12)
    got = capture(loaded.model, rows, blocks, [0, 3], batch_tokens=batch_tokens)
    want = gradients_alone(loaded.model, rows, weights(loaded.model, blocks))
    for name, g in want.items():
        assert relative_error(got[f"gradients/{name}"], g) < LIMITS[dtype], name
    losses = torch.stack([loss_alone(loaded.model, r) for r in rows])
    torch.testing.assert_close(got["loss"][:, 0], losses, rtol=LIMITS[dtype], atol=0)
    assert got["length"][:, 0].tolist() == [len(r.targets) for r in rows]


def test_the_base_models_loss_stands_beside_the_adapters(model_dir: Path, built: Path) -> None:
    store = FeatureStore.open(built)
    base = load(ModelSpec(str(model_dir))).model
    encoding = Encoding(load_tokenizer(str(model_dir)), None, 128)
    want = torch.stack([loss_alone(base, encoding.encode(e)) for e in store.examples])
    torch.testing.assert_close(store.features("base-loss")["base-loss"][:, 0], want, rtol=1e-5, atol=0)
    assert not torch.allclose(store.features("loss")["loss"][:, 0], want, rtol=1e-2)


def test_the_budgets_mean_one_three_and_eight_rows(tokenizer: Any) -> None:
    lengths = [len(r.input_ids) for r in encode(tokenizer)]
    assert [max(map(len, plan_batches(lengths, b))) for b in BATCHES] == [1, 3, 8]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("batch_tokens", BATCHES)
def test_hidden_states_equal_one_row_at_a_time(model_dir: Path, tokenizer: Any, batch_tokens: int, dtype: str) -> None:
    model = load(ModelSpec(str(model_dir), None, "cpu", dtype)).model
    rows = encode(tokenizer)
    got = capture(model, rows, {}, [0, 1, 3], batch_tokens=batch_tokens)
    for layer in (0, 1, 3):
        for kind in HIDDEN_KINDS:
            assert relative_error(got[f"hidden/{layer}.{kind}"], hidden_alone(model, rows, layer, kind)) < LIMITS[dtype]


@pytest.mark.parametrize("loss_on", ["response", "all"])
def test_text_rows_and_other_masks(model_dir: Path, adapter_dir: Path, tokenizer: Any, loss_on: Any) -> None:
    loaded = load(ModelSpec(str(model_dir), str(adapter_dir), "cpu", "float64"))
    blocks = select_blocks(loaded.model)
    encoding = Encoding(tokenizer, EncodingOptions(loss_on=loss_on), 128)
    rows = [encoding.encode(Example("t", 0, text="Rain is wet.")), encoding.encode(from_prompt(*ROWS[1]))]
    got = capture(loaded.model, rows, blocks, [3])
    for name, g in gradients_alone(loaded.model, rows, weights(loaded.model, blocks)).items():
        assert relative_error(got[f"gradients/{name}"], g) < 1e-10
    assert not got["hidden/3.prompt.last"][0].any()  # a text row has no prompt
    assert got["hidden/3.prompt.last"][1].any()


def test_a_block_in_the_output_head(tokenizer: Any) -> None:
    model = make_model(tie_word_embeddings=False).double().eval().requires_grad_(False)
    blocks, rows = select_blocks(model, "lm_head,layers.2.mlp.*"), encode(tokenizer)
    got = capture(model, rows, blocks, [3])
    want = gradients_alone(model, rows, weights(model, blocks))
    assert "lm_head" in want
    for name, g in want.items():
        assert relative_error(got[f"gradients/{name}"], g) < 1e-10


def test_a_tied_head_is_no_block(model_dir: Path) -> None:
    model = load(ModelSpec(str(model_dir), None, "cpu")).model
    with pytest.raises(UserError, match="'lm_head' matches none of the 21 linear layers"):
        select_blocks(model, "lm_head")
    assert "lm_head" not in select_blocks(model, "*")


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"rank_pattern": {"layers.0.self_attn.q_proj": 4}, "alpha_pattern": {"layers.1.self_attn.v_proj": 3}},
        {"target_modules": "all-linear"},
        {"target_modules": ["up_proj"], "layers_to_transform": [1]},
    ],
)
def test_every_plain_lora(model_dir: Path, tokenizer: Any, tmp_path: Path, config: dict[str, Any]) -> None:
    adapter = save_adapter(model_dir, tmp_path / "a", **config)
    loaded = load(ModelSpec(str(model_dir), str(adapter), "cpu", "float64"))
    blocks, rows = select_blocks(loaded.model), encode(tokenizer)
    got = capture(loaded.model, rows, blocks, [3], batch_tokens=150)
    for name, g in gradients_alone(loaded.model, rows, weights(loaded.model, blocks)).items():
        assert relative_error(got[f"gradients/{name}"], g) < 1e-10


@pytest.mark.parametrize("batch_tokens", BATCHES)
def test_another_architecture(tokenizer: Any, batch_tokens: int) -> None:
    """GPT-2: learnt positions, fused attention weights that are no linear layer, LoRA on them."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=420, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2)
    lora = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    model = get_peft_model(GPT2LMHeadModel(config), lora).double().eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    blocks, rows = select_blocks(model), encode(tokenizer, template="plain")
    assert next(iter(blocks)) == "h.0.attn.c_attn.lora_A"
    got = capture(model, rows, blocks, [2], batch_tokens=batch_tokens)
    for name, g in gradients_alone(model, rows, weights(model, blocks)).items():
        assert relative_error(got[f"gradients/{name}"], g) < 1e-10


def test_order_of_rows_does_not_matter(model_dir: Path, adapter_dir: Path, tokenizer: Any) -> None:
    loaded = load(ModelSpec(str(model_dir), str(adapter_dir), "cpu", "float64"))
    blocks, rows = select_blocks(loaded.model), encode(tokenizer)
    a = capture(loaded.model, rows, blocks, [1], batch_tokens=150)
    b = capture(loaded.model, rows[::-1], blocks, [1], batch_tokens=150)
    for name in a:
        torch.testing.assert_close(a[name], b[name].flip(0), rtol=1e-10, atol=1e-14)


def test_not_finite_names_the_row(model_dir: Path, adapter_dir: Path, tokenizer: Any) -> None:
    loaded = load(ModelSpec(str(model_dir), str(adapter_dir), "cpu"))
    rows = encode(tokenizer)
    rare = next(t for t in rows[4].input_ids if all(t not in r.input_ids for i, r in enumerate(rows) if i != 4))
    loaded.model.get_input_embeddings().weight[rare] = float("nan")
    head = loaded.model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.nan_to_num(), requires_grad=False)
    with pytest.raises(NotFinite) as caught:
        capture(loaded.model, rows, select_blocks(loaded.model), [1], batch_tokens=150)
    assert caught.value.row == 4


def test_batches_hold_every_row_once_within_the_budget() -> None:
    lengths = [5, 90, 7, 7, 30, 31, 200, 2]
    batches = plan_batches(lengths, 64)
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 64 for b in batches)
    assert max(len(b) for b in batches) > 1


def test_layers_and_blocks_by_name(model_dir: Path, adapter_dir: Path) -> None:
    model = load(ModelSpec(str(model_dir), str(adapter_dir), "cpu")).model
    assert parse_layers(model) == [1, 3]
    assert parse_layers(model, "all") == [0, 1, 2, 3]
    assert parse_layers(model, "2") == [2, 3]  # the last is always kept
    with pytest.raises(UserError, match="from 0 to 3"):
        parse_layers(model, "4")
    assert list(select_blocks(model, "*.0.*.lora_B")) == [f"layers.0.self_attn.{p}_proj.lora_B" for p in "qv"]
    with pytest.raises(UserError, match="matches none"):
        select_blocks(model, "nothing.*")


def test_smollm2_equals_autograd(smollm2: str, tmp_path: Path) -> None:
    from datablame.models import resolve

    adapter = save_adapter(Path(resolve(smollm2)), tmp_path / "a", r=4, layers_to_transform=[0, 14, 29])
    loaded = load(ModelSpec(smollm2, str(adapter), "cpu"))
    encoding = Encoding(loaded.tokenizer, None, 128)
    rows = [encoding.encode(from_prompt(p, r)) for p, r in ROWS[:3]]
    blocks = select_blocks(loaded.model)
    got = capture(loaded.model, rows, blocks, [15, 30])
    for name, g in gradients_alone(loaded.model, rows, weights(loaded.model, blocks)).items():
        assert relative_error(got[f"gradients/{name}"], g) < 1e-4, name
    for kind in HIDDEN_KINDS:
        assert relative_error(got[f"hidden/15.{kind}"], hidden_alone(loaded.model, rows, 15, kind)) < 1e-4
