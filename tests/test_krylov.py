"""Influence by products with the Gauss-Newton matrix and the Hessian, against curvlinops, scipy and dense solves."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import datablame
import oracles
from conftest import ROWS, write_jsonl
from datablame.blocks import Blocks, select_blocks
from datablame.capture import capture
from datablame.encoding import Encoded, Encoding, EncodingOptions
from datablame.errors import UserError
from datablame.examples import from_prompt
from datablame.indexing import Reporter
from datablame.methods import create, parse
from datablame.methods.base import Operator
from datablame.methods.krylov import lanczos
from datablame.models import ModelSpec, load
from datablame.operators import Product, curvature
from datablame.tracing import Inputs
from gradient_cases import error
from test_curvlinops import rms_norm, whole

MATRICES = ("gauss-newton", "hessian")


class Logits(nn.Module):
    """A language model's logits at the labelled positions of one row, `[N, V]`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, row: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self.model(input_ids=row["input_ids"]).logits[0, row["at"]]
        return logits


class Small(NamedTuple):
    model: Any
    rows: list[Encoded]
    blocks: Blocks
    g: dict[str, Tensor]
    v: dict[str, Tensor]
    dense: dict[str, Tensor]
    product: Product


@pytest.fixture(scope="module")
def small(model_dir: Path, adapter_dir: Path, tokenizer: Any, built: Path) -> Iterator[Small]:
    """The tiny Llama in float64, 224 weights in the middle, five training rows, two queries."""
    del built  # shared with other files' tests, so made before the patches, which change its last bits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.models.llama.modeling_llama.LlamaRMSNorm.forward", rms_norm)
        patch.setattr("torch.nn.functional.silu", lambda x, inplace=False: x * torch.sigmoid(x))  # curvlinops' jvp
        model = load(ModelSpec(str(model_dir), str(adapter_dir), "cpu", "float64")).model
        blocks = select_blocks(model, "layers.1.*")
        rows = [Encoding(tokenizer, EncodingOptions(), 128).encode(from_prompt(*row)) for row in ROWS]
        captured = capture(model, rows, blocks, [])
        f = {b: captured[f"gradients/{b}"] for b in blocks}
        g, v = ({b: x[part] for b, x in f.items()} for part in (slice(0, -2), slice(-2, None)))
        yield Small(model, rows[:-2], blocks, g, v, matrices(model, rows[:-2], blocks), of(model, rows[:-2], blocks))


def of(model: Any, rows: list[Encoded], blocks: Blocks, batch_tokens: int = 1024) -> Product:
    return curvature(model, rows, blocks, batch_tokens)


def matrices(model: Any, rows: list[Encoded], blocks: Blocks) -> dict[str, Tensor]:
    """curvlinops' own, `[D, D]`."""
    data = [
        (
            {"input_ids": torch.tensor([r.input_ids]), "at": torch.tensor(r.targets) - 1},
            torch.tensor([r.labels[t] for t in r.targets]),
        )
        for r in rows
    ]
    params = [layer.weight.requires_grad_() for layer in blocks.values()]
    try:
        with sdpa_kernel(SDPBackend.MATH):
            ggn, hessian = (oracles.curvature(kind, Logits(model), params, data) for kind in ("ggn", "hessian"))
    finally:
        for p in params:
            p.requires_grad_(False)
    return {"gauss-newton": ggn, "hessian": hessian}


def shift(small: Small, damping: float, probes: int = 8) -> float:
    """λ, with the estimate of the trace made on the dense matrix."""
    h = small.dense["gauss-newton"]
    z = torch.randint(2, (probes, len(h)), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    return damping * float(torch.einsum("kd,de,ke->k", z, h, z).mean()) / len(h)


@pytest.mark.parametrize("matrix", MATRICES)
def test_products_are_those_of_curvlinops(small: Small, matrix: str) -> None:
    h = small.dense[matrix]
    assert float((small.dense["hessian"] - small.dense["gauss-newton"]).norm() / h.norm()) > 0.1
    x = torch.randn(4, len(h), dtype=torch.float64)
    assert error(small.product(matrix, x), x @ h) < 1e-8
    one_row_a_batch = of(small.model, small.rows, small.blocks, 1)(matrix, x)  # type: ignore[arg-type]
    assert error(one_row_a_batch, x @ h) < 1e-8
    assert torch.equal(small.product(matrix, x), small.product(matrix, x))
    assert not any(p.requires_grad for p in small.model.parameters())


@pytest.mark.parametrize("damping", [1e-2, 1.0, 100.0])
def test_all_steps_are_a_dense_solve(small: Small, damping: float) -> None:
    for name, matrix in (("cg", "gauss-newton"), ("minres", "gauss-newton"), ("minres", "hessian")):
        h = small.dense[matrix]
        eye = torch.eye(len(h), dtype=torch.float64)
        want = whole(small.v) @ torch.linalg.inv(h + shift(small, damping) * eye) @ whole(small.g).T
        method = create(name, matrix=matrix, damping=damping, steps=len(h), tolerance=1e-12)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = method.fit(Operator(small.g, lambda kind, x: x @ small.dense[kind])).score(small.v)
        assert error(got, want) < 1e-5, (name, matrix)
        assert float(method.residual[damping].max()) < 1e-8  # type: ignore[attr-defined]


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_a_few_steps_are_scipys(small: Small, steps: int) -> None:
    """With unit vectors for training rows, the scores are the solution itself."""
    for name, matrix in (("cg", "gauss-newton"), ("minres", "hessian")):
        h = small.dense[matrix]
        eye = torch.eye(len(h), dtype=torch.float64)
        lam = shift(small, 0.5)
        a = h + lam * eye
        operator = Operator({"all": eye}, lambda kind, x: x @ small.dense[kind])
        method: Any = create(name, matrix=matrix, damping=0.5, steps=steps, tolerance=1e-15)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = method.fit(operator).score({"all": whole(small.v)})
        solver = getattr(scipy.sparse.linalg, name)
        want = [solver(a.numpy(), v.numpy(), rtol=1e-30, maxiter=steps)[0] for v in whole(small.v)]
        want = torch.from_numpy(np.stack(want))
        assert error(got, want) < 1e-6, name
        left = (got @ a - whole(small.v)).norm(dim=1) / whole(small.v).norm(dim=1)
        torch.testing.assert_close(method.residual[0.5][:, 0], left, rtol=1e-6, atol=1e-9)


def test_negative_curvature(small: Small) -> None:
    assert float(torch.linalg.eigvalsh(small.dense["hessian"])[0]) < 0
    train = Operator(small.g, small.product)
    with pytest.raises(UserError, match=r"cg: H \+ λI is not positive definite.*Use minres, matrix=gauss-newton, or"):
        create("cg", matrix="hessian", damping=1e-3).fit(train).score(small.v)
    with pytest.warns(UserWarning, match=r"minres: H \+ λI has negative curvature along \d of 2 queries"):
        live = create("minres", damping=1e-3).fit(train).score(small.v)
    method = create("minres", damping=1e-3).fit(Operator(small.g, lambda kind, x: x @ small.dense[kind]))
    with pytest.warns(UserWarning, match="negative curvature"):
        dense = method.score(small.v)
    assert error(live, dense) < 1e-5


def test_it_stops_on_the_residual_and_sweeps_from_one_space(small: Small) -> None:
    calls = []

    def counted(kind: Any, x: Tensor) -> Tensor:
        calls.append(kind)
        return x @ small.dense[kind]

    method: Any = create("cg", steps=100, tolerance=0.05).fit(Operator(small.g, counted))
    swept = method.sweep(small.v, [0.1, 10.0, 1000.0])
    assert 2 < len(calls) < 60
    assert all(float(r.max()) < 0.05 for r in method.residual.values())
    for damping in (0.1, 1000.0):
        alone = create("cg", damping=damping, steps=len(calls) - 1, tolerance=1e-15).fit(Operator(small.g, counted))
        assert error(swept[damping], alone.score(small.v)) < 1e-9
    # More queries than are solved side by side.
    many = {b: torch.cat([x] * 5) for b, x in small.v.items()}
    few = method.score(small.v)
    assert error(method.score(many), few.repeat(5, 1)) < 1e-9


def test_the_unit_of_damping_is_near_the_mean_eigenvalue(small: Small) -> None:
    h = small.dense["gauss-newton"]
    estimates = [float(shift(small, 1.0, probes)) for probes in (8, 4000)]
    deviation = float((2 * (h.square().sum() - h.diagonal().square().sum())).sqrt()) / len(h)
    for estimate, probes in zip(estimates, (8, 4000), strict=True):
        assert abs(estimate - float(h.trace()) / len(h)) < 4 * deviation / probes**0.5


def test_an_exhausted_space() -> None:
    a = torch.diag(torch.tensor([1.0, 2, 3, 4, 5], dtype=torch.float64))
    v = torch.tensor([[0.0, 3, 0, 0, 0], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.float64)
    q, t = lanczos(lambda x: x @ a, v, 5)
    assert len(q) == 2
    got = torch.einsum("kcd,ck->cd", q, torch.linalg.pinv(t[:, :-1])[:, :, 0]) * v.norm(dim=1, keepdim=True)
    torch.testing.assert_close(got, v @ torch.linalg.inv(a))


def test_an_index(model_dir: Path, adapter_dir: Path, built: Path, tmp_path: Path) -> None:
    query = write_jsonl(tmp_path / "q.jsonl", [{"prompt": p, "response": r} for p, r in ROWS[2:4]])
    specs = ["cg:steps=12,damping=100", "minres:matrix=gauss-newton,steps=12,damping=100"]
    scores, again = (datablame.trace(built, query, methods=specs) for _ in range(2))
    for spec in specs:
        assert (scores.values[spec] == again.values[spec]).all()
    np.testing.assert_allclose(*scores.values.values(), rtol=1e-2, atol=1e-3 * np.abs(scores.values[specs[0]]).max())
    found = datablame.compare(built, query, methods=["exact", "cg:steps=5"], dampings=[0.1, 1.0])
    rows = [r for r in found.rows if r.method == "cg:steps=5"]
    assert [r.error for r in rows] == [None, None]
    assert all(r.residual and 0 < r.residual < 2 for r in rows)
    store = datablame.FeatureStore.open(built)
    with pytest.raises(UserError, match="need the model; use datablame trace or compare"):
        Inputs(store, [], {}).score(parse("cg"))


def test_products_are_told_and_what_is_not_solved_is_a_note(built: Path, tmp_path: Path) -> None:
    query = write_jsonl(tmp_path / "q.jsonl", [{"prompt": p, "response": r} for p, r in ROWS[2:4]])
    told = Told()
    specs = ["cg:steps=3,probes=2,damping=1e-3", "cg:steps=3,probes=2,damping=1e5", "minres:steps=2,damping=1e-3"]
    scores = datablame.trace(built, query, methods=specs, reporter=told)
    assert [n.partition(", about")[0] for n in told.notes] == [
        f"{name}: at most {n} passes with a curvature matrix of the model"
        for name, n in (("cg", 1 + 3), ("cg", 1 + 3), ("minres", 1 + 2))
    ]
    assert told.totals == [4, 4, 3]
    assert told.done == [4, 3, 3]  # with much damping two steps are enough
    assert create("cg", steps=5).calls(17) == 1 + 5 * 3  # type: ignore[attr-defined]
    notes = " ".join(scores.notes)
    assert f"{specs[0]}: its equation is left with a residual of" in notes
    assert f"{specs[1]}:" not in notes  # so much damping that three steps solve it
    (warned,) = (n for n in scores.notes if n.startswith("minres: H + λI has negative curvature"))
    enough = 1.1 * float(warned.rpartition("above ")[2].rstrip(")."))
    again = datablame.trace(built, query, methods=[f"minres:steps=2,damping={enough}"])
    assert not any("negative curvature" in n for n in again.notes)


class Told(Reporter):
    """Keeps the notes, and of every bar its end and how far it came."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.totals: list[int] = []
        self.done: list[int] = []
        self.open = False

    def note(self, message: str) -> None:
        self.notes.append(message)

    def start(self, what: str, total: int, unit: str = "tokens") -> None:
        self.open = unit == "passes"
        if self.open:
            self.totals.append(total)
            self.done.append(0)

    def advance(self, done: int) -> None:
        if self.open:
            self.done[-1] += done

    def end(self) -> None:
        self.open = False


def test_a_sweep_that_fails_leaves_no_bar_behind(built: Path, tmp_path: Path) -> None:
    class Bars(Told):
        live = most = 0

        def start(self, what: str, total: int, unit: str = "tokens") -> None:
            super().start(what, total, unit)
            self.live += 1
            self.most = max(self.most, self.live)

        def end(self) -> None:
            super().end()
            self.live = 0

    query, bars = write_jsonl(tmp_path / "q.jsonl", [{"prompt": "Say hi.", "response": "Hello"}]), Bars()
    spec = "cg:matrix=hessian,steps=4,probes=1"  # indefinite at the first two dampings, so that each is tried alone
    found = datablame.compare(built, query, methods=[spec], dampings=[1e-3, 1e-2, 1e9], reporter=bars)
    errors = [r.error for r in found.rows]
    assert errors[2] is None
    assert errors[0] is not None
    assert "not positive definite" in errors[0]
    assert (bars.live, bars.most) == (0, 1)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("cg:matrix=fisher", "cg: matrix='fisher'; use gauss-newton or hessian"),
        ("cg:steps=0", "cg: steps=0; use a whole number from 1"),
        ("minres:damping=0", "minres: damping=0; use a number above 0"),
        ("cg:tolerance=x", "cg: tolerance='x'; use a number above 0"),
    ],
)
def test_bad_options(spec: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse(spec)
