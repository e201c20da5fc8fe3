"""Influence against curvature matrices from another library, curvlinops, on models small enough to invert them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import oracles
from conftest import ROWS
from datablame.blocks import select_blocks
from datablame.capture import capture
from datablame.encoding import Encoding, EncodingOptions
from datablame.examples import from_prompt
from datablame.methods import create
from datablame.models import ModelSpec, load
from gradient_cases import error

DAMPINGS = [1e-6, 1e-4, 1e-2, 0.1, 1.0, 1e2, 1e5]
N, M = 9, 3
"""Training rows and queries of the small models."""


def tolerance(damping: float) -> float:
    """Dense inverses lose as many digits as H's condition number, about n·D/damping, has."""
    return max(1e-10, 1e-12 / damping)


def small(name: str) -> tuple[nn.Module, oracles.Data]:
    """(model, training rows then queries): 4 numbers in, 3 classes out, float64."""
    torch.manual_seed(0)
    linear, mlp = nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model = (linear if name == "linear" else mlp).double()
    x, y = torch.randn(N + M, 4, dtype=torch.float64), torch.randint(3, (N + M,))
    return model, [(x[i : i + 1], y[i : i + 1]) for i in range(N + M)]


def gradients(model: nn.Module, data: oracles.Data) -> dict[str, Tensor]:
    """`{weight: [rows, D]}` by autograd, one row at a time."""
    params = dict(model.named_parameters())
    rows = [
        torch.autograd.grad(nn.functional.cross_entropy(model(x), y, reduction="sum"), list(params.values()))
        for x, y in data
    ]
    return {b: torch.stack([row[i].flatten() for row in rows]) for i, b in enumerate(params)}


def whole(blocks: dict[str, Tensor]) -> Tensor:
    return torch.cat(list(blocks.values()), dim=1)


def diagonal(h: Tensor, blocks: dict[str, Tensor]) -> dict[str, Tensor]:
    """The diagonal blocks `{block: [D_b, D_b]}` of `[D, D]`."""
    out, a = {}, 0
    for b, g in blocks.items():
        out[b] = h[a : a + g.shape[1], a : a + g.shape[1]]
        a += g.shape[1]
    assert a == len(h)
    return out


def check_exact(h: Tensor, g: dict[str, Tensor], v: dict[str, Tensor]) -> None:
    """`exact` and `exact-block` are influence with curvlinops' empirical Fisher, at every damping."""
    parts, one, query = diagonal(h, g), {"all": whole(g)}, {"all": whole(v)}
    for damping in DAMPINGS:
        method = create("exact", damping=damping)
        want = oracles.influence(h, damping, one["all"], query["all"])
        assert error(method.fit(one).score(query), want) < tolerance(damping), damping
        # Over several blocks, λ is each block's own.
        lam = torch.cat([damping * p.diagonal().mean().expand(len(p)) for p in parts.values()])
        want = query["all"] @ torch.linalg.inv(h + torch.diag(lam)) @ one["all"].T
        assert error(method.fit(g).score(v), want) < tolerance(damping), damping
        want = sum(oracles.influence(parts[b], damping, g[b], v[b]) for b in g)
        assert error(create("exact-block", damping=damping).fit(g).score(v), want) < tolerance(damping), damping


@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_exact_is_influence_with_curvlinops_empirical_fisher(name: str) -> None:
    model, data = small(name)
    g, v = gradients(model, data[:N]), gradients(model, data[N:])
    h = oracles.curvature("empirical", model, list(model.parameters()), data[:N])
    torch.testing.assert_close(h, whole(g).T @ whole(g) / N, rtol=1e-12, atol=1e-14)
    check_exact(h, g, v)


class LossOf(nn.Module):
    """A language model whose output is the loss of one row, `[1, 1]`: its labelled tokens, summed.

    curvlinops would take each token for an example of its own.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, row: dict[str, Tensor]) -> Tensor:
        logits = self.model(input_ids=row["input_ids"]).logits[0, :-1]
        return nn.functional.cross_entropy(logits, row["labels"][0, 1:], reduction="sum").reshape(1, 1)


def rms_norm(self: Any, x: Tensor) -> Tensor:
    """Llama's, which rounds to float32 inside: derivatives of two orders would agree to six digits only."""
    return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


def test_the_same_on_a_language_model_with_lora(
    model_dir: Path, adapter_dir: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaRMSNorm.forward", rms_norm)
    loaded = load(ModelSpec(str(model_dir), str(adapter_dir), "cpu", "float64"))
    blocks = select_blocks(loaded.model, "layers.1.*")  # 224 weights with layers above and below; all take 15 s
    rows = [Encoding(tokenizer, EncodingOptions(), 128).encode(from_prompt(*row)) for row in ROWS]
    captured = capture(loaded.model, rows, blocks, [3])
    features = {b: captured[f"gradients/{b}"] for b in blocks}
    model, params = LossOf(loaded.model), [block.weight.requires_grad_() for block in blocks.values()]
    inputs = [{"input_ids": torch.tensor([r.input_ids]), "labels": torch.tensor([r.labels])} for r in rows[:-2]]
    data = list(zip(inputs, oracles.as_one_number([model(x) for x in inputs]), strict=True))
    with sdpa_kernel(SDPBackend.MATH):  # the fused one has no forward-mode derivative; "eager" rounds too
        h = oracles.curvature("empirical", model, params, data, nn.MSELoss(reduction="sum"))
    g, v = ({b: f[part] for b, f in features.items()} for part in (slice(0, -2), slice(-2, None)))
    torch.testing.assert_close(h, whole(g).T @ whole(g) / len(inputs), rtol=1e-8, atol=1e-10 * float(h.abs().max()))
    check_exact(h, g, v)


@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_true_curvature_is_another_matrix(name: str) -> None:
    """`exact` inverts the empirical Fisher. Gauss-Newton is the Fisher over the *model's* labels, whatever the model,
    and the Hessian is Gauss-Newton where the model is linear; influence with them is something else."""
    model, data = small(name)
    params = list(model.parameters())
    fisher, ggn, hessian = (oracles.curvature(k, model, params, data[:N]) for k in ("empirical", "ggn", "hessian"))
    expected = oracles.expected_fisher(model, params, [x for x, _ in data[:N]])
    torch.testing.assert_close(ggn, expected, rtol=1e-10, atol=1e-14)
    distance = float((hessian - ggn).norm() / ggn.norm())
    assert distance < 1e-12 if name == "linear" else distance > 0.1
    assert float((fisher - ggn).norm() / ggn.norm()) > 0.1
    g, v = whole(gradients(model, data[:N])), whole(gradients(model, data[N:]))
    exact = create("exact").fit({"all": g}).score({"all": v})
    for h in (ggn, hessian):
        want = oracles.influence(h, 0.1, g, v)
        scale = float((exact * want).sum() / exact.square().sum())
        assert error(scale * exact, want) > 0.1  # not for want of a factor
