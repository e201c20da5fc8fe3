"""Influence in the span of the gradients: against exact, dense solves, and the formula with another basis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.linalg
import torch
from torch import Tensor

import datablame
from conftest import ROWS, Run, write_jsonl
from datablame.capture import capture
from datablame.encoding import Encoding, EncodingOptions
from datablame.errors import UserError
from datablame.examples import from_prompt
from datablame.methods import create, parse
from datablame.methods.base import Operator
from gradient_cases import case, error, rows
from test_curvlinops import whole
from test_krylov import MATRICES, Small, Told, of, small

__all__ = ["small"]  # a fixture

Blocks = dict[str, Tensor]


def no_product(matrix: Any, x: Tensor) -> Tensor:
    raise AssertionError("the Fisher is made of gradients")


def subspace(train: Blocks, product: Any = no_product, **options: Any) -> Any:
    return create("subspace", **options).fit(Operator(train, product))


def unit(h: Tensor, g: Tensor) -> float:
    """Σ|ε|/min(n, D), with scipy's basis of the training gradients."""
    u = torch.from_numpy(scipy.linalg.orth(g.T.numpy())).T
    return float(np.abs(np.linalg.eigvalsh((u @ h @ u.T).numpy())).sum()) / min(g.shape)


def one_block(name: str) -> tuple[Blocks, Blocks]:
    train, query = case(name)
    return {"all": whole(train)}, {"all": whole(query)}


# ---------------------------------------------------------------- against exact


@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("name", ["one block, n < D", "one block, n > D", "n < D", "n > D", "duplicates", "zero row"])
def test_fisher_is_exact_influence(name: str, damping: float) -> None:
    train, query = one_block(name)
    want = create("exact", unit="rank", damping=damping).fit(train).score(query)
    method = subspace(train, matrix="fisher", damping=damping)
    assert error(method.score(query), want) < 1e-9
    assert method.residual[damping].shape == (3, 1)
    assert float(method.residual[damping].max()) < 1e-10
    if name == "n < D":  # the same in blocks, since λ is one for all
        apart = subspace(case(name)[0], matrix="fisher", damping=damping).score(case(name)[1])
        assert error(apart, want) < 1e-9


def test_scores_depend_on_the_queries_asked_together_unless_the_solution_lies_in_the_span(small: Small) -> None:
    alone = {b: x[:1] for b, x in small.v.items()}
    gaps = {}
    for matrix in ("fisher", *MATRICES):
        together, by_itself = (
            subspace(small.g, lambda kind, x: x @ small.dense[kind], matrix=matrix, damping=10.0).score(query)[:1]
            for query in (small.v, alone)
        )
        gaps[matrix] = error(by_itself, together)
    assert gaps["fisher"] < 1e-10
    assert min(gaps[m] for m in MATRICES) > 1e-6


# ---------------------------------------------------------------- against dense matrices


@pytest.mark.parametrize("matrix", MATRICES)
def test_a_span_of_all_weights_is_a_dense_solve(small: Small, tokenizer: Any, matrix: Any) -> None:
    """38 training rows and 2 queries for 32 weights; the matrix from products with unit vectors."""
    encoding = Encoding(tokenizer, EncodingOptions(), 128)
    found = [encoding.encode(from_prompt(p, r)) for p, _ in ROWS[:6] for _, r in ROWS][:40]
    name = "layers.1.self_attn.v_proj.lora_B"
    blocks = {name: small.blocks[name]}
    f = capture(small.model, found, blocks, [])[f"gradients/{name}"]
    g, v = f[:38], f[38:]
    product = of(small.model, found[:38], blocks)
    h = product(matrix, torch.eye(32, dtype=torch.float64))
    damping = 8.0
    lam = damping * float(torch.linalg.eigvalsh(h).abs().mean())
    want = v @ torch.linalg.solve(h + lam * torch.eye(32, dtype=torch.float64), g.T)
    method = subspace({name: g}, product, matrix=matrix, damping=damping)
    assert error(method.score({name: v}), want) < 1e-7
    assert float(method.residual[damping].max()) < 1e-7
    assert method.lowest == pytest.approx(float(torch.linalg.eigvalsh(h)[0]), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("damping", [5.0, 100.0])
@pytest.mark.parametrize("matrix", MATRICES)
def test_a_smaller_span_is_the_formula(small: Small, matrix: str, damping: float) -> None:
    """Seven gradients of 224 weights, the live model's product, dense matrices of curvlinops in the oracle."""
    h, g, v = small.dense[matrix], whole(small.g), whole(small.v)
    u = torch.from_numpy(scipy.linalg.orth(torch.cat([g, v]).T.numpy())).T
    assert u.shape == (7, 224)
    lam = damping * unit(h, g)
    r = (u.T @ torch.linalg.inv(u @ h @ u.T + lam * torch.eye(7, dtype=torch.float64)) @ u @ v.T).T
    calls = []

    def product(kind: Any, x: Tensor) -> Tensor:
        calls.append((kind, x.shape))
        return small.product(kind, x)

    method = subspace(small.g, product, matrix=matrix, damping=damping)
    assert error(method.score(small.v), r @ g.T) < 1e-6
    assert calls == [(matrix, (7, 224))]
    left = (r @ h + lam * r - v).norm(dim=1) / v.norm(dim=1)
    assert float(left.min()) > 1e-3  # H leads out of the span
    torch.testing.assert_close(method.residual[damping][:, 0], left, rtol=1e-5, atol=1e-9)
    assert method.lowest == pytest.approx(float(torch.linalg.eigvalsh(u @ h @ u.T)[0]), rel=1e-5)


def test_negative_curvature(small: Small) -> None:
    said = r"subspace: H \+ λI is not positive definite: .*Use minres, matrix=gauss-newton, or a damping above (\S+)\.$"
    with pytest.raises(UserError, match=said) as e:
        subspace(small.g, small.product, matrix="hessian", damping=1e-6).score(small.v)
    enough = float(str(e.value).rpartition("above ")[2].rstrip("."))
    method = subspace(small.g, small.product, matrix="hessian", damping=1.01 * enough)
    assert method.score(small.v).isfinite().all()
    assert method.lowest < 0
    with pytest.raises(UserError, match=said):
        method.sweep(small.v, [1e3, 0.85 * enough])  # two digits, rounded up


# ---------------------------------------------------------------- the basis


@pytest.mark.parametrize("matrix", ["fisher", "gauss-newton"])
def test_what_adds_no_direction_is_not_in_the_basis(matrix: str) -> None:
    """A row of zeros, one twice as long as another, and one that differs by the rounding of its features."""
    g, v = rows(5, (30,), 0)["b0"].float(), rows(2, (30,), 1)["b0"].float()
    again = torch.cat([g, g[:1] * 2, torch.zeros(1, 30), g[1:2] * (1 + 1e-7 * torch.randn(1, 30))])
    query = torch.cat([v, g[:1], v[:1]])
    h = rows(40, (30,), 2)["b0"]
    h = h.T @ h
    shapes = []

    def product(kind: Any, x: Tensor) -> Tensor:
        shapes.append(x.shape)
        return x @ h

    got = subspace({"all": again}, product, matrix=matrix).score({"all": query})
    assert shapes == ([] if matrix == "fisher" else [(7, 30)])
    assert got.dtype == torch.float32
    assert not got[:, 6].any()
    torch.testing.assert_close(got[:, 5], 2 * got[:, 0])
    torch.testing.assert_close(got[0], got[3])


def test_one_row_and_a_query_along_it() -> None:
    """λ is damping × |g|ᵀH|g|, |g| of length 1, whatever the length of the query."""
    g = torch.tensor([[3.0, 4, 0]], dtype=torch.float64)
    h = torch.diag(torch.tensor([1.0, 2, 5], dtype=torch.float64))
    curved = (9 * 1 + 16 * 2) / 25
    method = subspace({"a": g[:, :1], "b": g[:, 1:]}, lambda kind, x: x @ h, damping=0.5)
    got = method.score({"a": -2 * g[:, :1], "b": -2 * g[:, 1:]})
    torch.testing.assert_close(got, torch.tensor([[-2 * 25 / (1.5 * curved)]], dtype=torch.float64))
    r = -2 * g / (1.5 * curved)
    left = (r @ h + 0.5 * curved * r + 2 * g).norm() / (2 * g).norm()
    torch.testing.assert_close(method.residual[0.5], left[None, None])
    assert method.lowest == pytest.approx(curved)


def test_no_gradient_at_all() -> None:
    g, v = torch.zeros(3, 4), torch.zeros(2, 4)
    for query in (v, v + 1):
        for matrix in ("fisher", "gauss-newton"):
            with pytest.raises(UserError, match=f"the {matrix} matrix is 0 on the span .* Are all gradients zero"):
                subspace({"a": g}, lambda kind, x: x, matrix=matrix).score({"a": query})
    method = subspace({"a": g + 1}, lambda kind, x: x)
    assert not method.score({"a": v}).any()
    assert not method.residual[0.1].any()
    with pytest.raises(UserError, match="gauss-newton matrix is not finite"):
        subspace({"a": g + 1}, lambda kind, x: x * float("nan")).score({"a": v + 1})


# ---------------------------------------------------------------- runs, sweeps, options


def test_two_runs_are_one_and_a_sweep_is_its_dampings(small: Small) -> None:
    method = subspace(small.g, small.product)
    swept = method.sweep(small.v, [1.0, 0.01, 30.0])
    residual = method.residual
    assert list(residual) == [1.0, 0.01, 30.0]
    for damping in swept:
        for _ in range(2):
            alone = subspace(small.g, small.product, damping=damping)
            assert torch.equal(alone.score(small.v), swept[damping])
            assert torch.equal(alone.residual[damping], residual[damping])
    method.sweep(small.v, [2.0])
    assert list(method.residual) == [2.0]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("subspace:matrix=kfac", "subspace: matrix='kfac'; use fisher, gauss-newton or hessian"),
        ("subspace:damping=0", "subspace: damping=0; use a number above 0"),
        ("subspace:steps=3", "unknown option 'steps'"),
    ],
)
def test_bad_options(spec: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse(spec)


# ---------------------------------------------------------------- trace and compare


def test_the_command_line(built: Path, tmp_path: Path, run: Run) -> None:
    query = write_jsonl(tmp_path / "q.jsonl", [{"prompt": p, "response": r} for p, r in ROWS[2:4]])
    specs = ["subspace:matrix=hessian,damping=30", "subspace:matrix=fisher,damping=30"]
    code, _, err = run("trace", built, "--query", query, "--method", ",".join(specs), "--out", tmp_path / "t")
    assert code == 0, err
    frame = pd.read_parquet(tmp_path / "t" / "scores.parquet")
    want = datablame.trace(built, query, methods=specs).values
    for spec in specs:
        got = frame[frame["method"] == spec].sort_values(["query", "train"])["score"].to_numpy().reshape(2, -1)
        np.testing.assert_allclose(got, want[spec], rtol=1e-6)
    assert np.abs(want[specs[0]] - want[specs[1]]).max() > 1e-3 * np.abs(want[specs[0]]).max()
    names = "exact,subspace,subspace:matrix=fisher"
    code, _, err = run("compare", built, "--query", query, "--method", names, "--damping", "0.1,10", "--out", tmp_path)
    assert code == 0, err
    found = pd.read_parquet(tmp_path / "compare.parquet").set_index(["method", "damping"])
    assert found["error"].isna().all()
    left = found["residual"]
    assert left["subspace", 0.1] > left["subspace", 10.0] > 1e-3
    assert left["subspace:matrix=fisher"].max() < 1e-5


def test_its_pass_is_told_and_what_is_left_is_a_note(built: Path, tmp_path: Path) -> None:
    query = write_jsonl(tmp_path / "q.jsonl", [{"prompt": p, "response": r} for p, r in ROWS[2:4]])
    told = Told()
    specs = ["subspace:damping=1e-3", "subspace:damping=1e5", "subspace:matrix=fisher,damping=1e-3"]
    scores = datablame.trace(built, query, methods=specs, reporter=told)
    assert (told.totals, told.done) == ([1, 1], [1, 1])  # the Fisher takes none
    (note,) = (n for n in scores.notes if "residual" in n)
    assert note.startswith(f"{specs[0]}: its equation is left with a residual of")
    assert note.endswith("More damping brings it down.")
