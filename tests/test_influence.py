"""Influence methods against dense matrices and the released loops, and the properties that must hold."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import oracles
from datablame.errors import UserError
from datablame.methods import create, parse
from datablame.methods import lissa as lissa_module
from gradient_cases import CASES, INFLUENCE, OPTIONS, case, error, quiet, rows, spelt

DAMPINGS = [1e-6, 1e-4, 1e-2, 0.1, 1.0, 1e2, 1e5]
OPERATORS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "exact-block": oracles.dense_operator,
    "exact-block:form=dual": oracles.dense_operator,
    "exact-block:form=primal": oracles.dense_operator,
    "datainf": oracles.datainf_operator,
    "lissa:steps=0": lambda g, damping: oracles.lissa_operator(g, damping, 0),
    "lissa:steps=1": lambda g, damping: oracles.lissa_operator(g, damping, 1),
    "lissa:steps=37,form=dual": lambda g, damping: oracles.lissa_operator(g, damping, 37),
    "lissa:steps=37,form=primal": lambda g, damping: oracles.lissa_operator(g, damping, 37),
    "lissa:steps=inf": oracles.dense_operator,
}


def tolerance(damping: float) -> float:
    """Dense inverses lose as many digits as H's condition number, about n·D/damping, has."""
    return max(1e-10, 1e-12 / damping)


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("relatif", [None, "l", "theta"])
def test_block_methods_equal_dense_matrices(name: str, damping: float, relatif: str | None) -> None:
    train, query = case(name)
    for spec, operator in OPERATORS.items():
        want, norms = 0.0, 0.0
        for b, g in train.items():
            if not g.any():
                continue
            m = operator(g, damping)
            want = want + query[b] @ m @ g.T
            norms = norms + ((g @ m * g).sum(1) if relatif == "l" else (g @ m).square().sum(1))
        if relatif:
            want = torch.where(norms > 0, want / norms.sqrt(), 0.0)  # type: ignore[union-attr]
        got = quiet(spec, train, query, damping=damping, relatif=relatif)
        assert error(got, want) < tolerance(damping), spec  # type: ignore[arg-type]


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", ["auto", "dual", "primal"])
@pytest.mark.parametrize("relatif", [None, "l", "theta"])
def test_exact_equals_the_joint_dense_matrix(name: str, damping: float, form: str, relatif: str | None) -> None:
    train, query = case(name)
    kept = {b: g for b, g in train.items() if g.any()}
    m = oracles.dense_joint(kept, damping)
    g, v = (torch.cat([x[b] for b in kept], dim=1) for x in (train, query))
    want = v @ m @ g.T
    if relatif:
        norms = (g @ m * g).sum(1) if relatif == "l" else (g @ m).square().sum(1)
        want = torch.where(norms > 0, want / norms.sqrt(), 0.0)
    got = quiet("exact", train, query, damping=damping, form=form, relatif=relatif)
    assert error(got, want) < tolerance(damping)


@pytest.mark.parametrize("damping", [1e-2, 1.0, 30.0])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("relatif", [None, "l"])
def test_damping_by_rank_is_over_the_eigenvalues_that_can_be_above_zero(
    name: str, damping: float, relatif: str | None
) -> None:
    train, query = case(name)
    blocks = {b: g for b, g in train.items() if g.any()}
    by_block, joint = 0.0, 0.0
    for b, g in train.items():
        alone = {"train": {b: g}, "query": {b: query[b]}}
        by_block = by_block + quiet("exact-block", *alone.values(), damping=damping * g.shape[1] / min(g.shape))
    d, n = sum(g.shape[1] for g in blocks.values()), len(next(iter(train.values())))
    joint = quiet("exact", train, query, damping=damping * d / min(n, d), relatif=relatif)
    assert error(quiet("exact", train, query, damping=damping, unit="rank", relatif=relatif), joint) < 1e-10
    got = quiet("exact-block", train, query, damping=damping, unit="rank")
    assert error(got, by_block) < 1e-10
    assert error(quiet("lissa", train, query, damping=damping, unit="rank", steps=math.inf), got) < 1e-8
    # The mean of those eigenvalues, as the dense matrix has them.
    g = blocks[next(iter(blocks))]
    values = torch.linalg.eigvalsh(g.T @ g / n).flip(0)[: min(g.shape)]
    assert float(values.mean()) == pytest.approx(oracles.mean_eigenvalue(g) * g.shape[1] / min(g.shape))


def test_exact_is_the_formula_of_the_design() -> None:
    """`n Q̃ (K̃ + nI)⁻¹` with `K̃ = Σ K/λ_b`, and for one block the same as exact-block."""
    train, query = case("mixed")
    n, k, q = 8, 0.0, 0.0
    for b, g in train.items():
        lam = 0.1 * oracles.mean_eigenvalue(g)
        k, q = k + g @ g.T / lam, q + query[b] @ g.T / lam
    want = n * q @ torch.linalg.inv(k + n * torch.eye(n, dtype=torch.float64))
    assert error(create("exact").fit(train).score(query), want) < 1e-12
    one, two = ({"b2": x["b2"]} for x in (train, query))
    a, b = create("exact").fit(one).score(two), create("exact-block").fit(one).score(two)
    assert error(a, b) < 1e-12
    assert error(create("exact-block").fit(train).score(query), want) > 1e-3


# ---------------------------------------------------------------- the released code


@pytest.mark.parametrize("name", ["n < D", "n > D", "common", "zero row"])
def test_datainf_equals_the_released_loop(name: str) -> None:
    train, query = case(name)
    want = torch.stack(
        [
            sum(
                oracles.released_scores(oracles.released_datainf(query[b][q], list(g)), list(g))
                for b, g in train.items()
            )
            for q in range(3)
        ]
    )
    assert error(create("datainf", damping=0.1).fit(train).score(query), want) < 1e-9


@pytest.mark.parametrize("name", ["n < D", "n > D", "common", "zero row"])
@pytest.mark.parametrize("steps", [1, 3, 10, 60])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_lissa_of_the_paper_equals_the_released_loop(name: str, steps: int, dtype: torch.dtype) -> None:
    train, query = case(name)
    # The released step is 1/1000 whatever the gradients: large ones diverge, these do not.
    train, query = ({b: (x / x.norm(dim=1).max() * 20).to(dtype) for b, x in f.items()} for f in (train, query))
    want = torch.stack(
        [
            sum(
                oracles.released_scores(oracles.released_lissa(query[b][q], list(g), steps), list(g))
                for b, g in train.items()
            )
            for q in range(3)
        ]
    )
    got = create("lissa", protocol="paper", steps=steps).fit(train).score(query)
    assert got.dtype == dtype
    assert error(got, want) < (1e-12 if dtype == torch.float64 else 1e-5)
    right_sign = want / 1000
    sound = create("lissa", alpha=1e-3, steps=steps).fit(train).score(query)
    assert error(sound, right_sign) > 1e-7  # the wrong sign is there, and seen


@pytest.mark.parametrize("steps", [0, 1, 10, 200])
@pytest.mark.parametrize("form", ["dual", "primal"])
@pytest.mark.parametrize("protocol", ["sound", "paper"])
@pytest.mark.parametrize("name", ["mixed", "n > D", "common"])
def test_recursion_closed_form_and_vectors_agree_with_the_residual(
    name: str, steps: int, form: str, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, query = case(name)
    train, query = ({b: x / x.norm(dim=1).max() * 20 for b, x in f.items()} for f in (train, query))
    want, residuals = 0.0, []
    for b, g in train.items():
        lam = 0.1 * oracles.mean_eigenvalue(g) * (-1 if protocol == "paper" else 1)
        top = float(torch.linalg.eigvalsh(g.T @ g / len(g))[-1]) + lam
        alpha = 1e-3 if protocol == "paper" else 1 / top
        r, residual = oracles.lissa_vectors(g, query[b], lam, alpha, steps)
        want = want + (1 if protocol == "paper" else alpha) * r @ g.T
        residuals.append(residual)
    for solver in ("_Recursion", "_Closed"):
        few = 10**9 if solver == "_Recursion" else 0
        monkeypatch.setattr(lissa_module, "CHEAP", few)
        method = create("lissa", steps=steps, form=form, protocol=protocol).fit(train)
        assert error(method.score(query), want) < 1e-10, solver  # type: ignore[arg-type]
        torch.testing.assert_close(method.residual[0.1], torch.stack(residuals, 1), rtol=1e-6, atol=1e-6)


def test_the_sum_of_steps_is_exact_for_every_step() -> None:
    p = torch.tensor([0.0, 1e-14, 1e-7, 0.3, 1.0, 1.7, 2.0, -0.01], dtype=torch.float64)
    for steps in (0, 1, 2, 9, 10):
        want = sum((1 - p) ** j for j in range(steps + 1))
        torch.testing.assert_close(lissa_module.steps_sum(p, steps), want, rtol=1e-13, atol=1e-15)  # type: ignore[arg-type]


def test_a_step_that_diverges_is_an_error() -> None:
    train, query = case("mixed")
    top = float(torch.linalg.eigvalsh(train["b2"].T @ train["b2"] / 8)[-1])
    for steps in (3, 500, math.inf):
        for relatif in (None, "l"):
            with pytest.raises(UserError, match=r"lissa: block 'b2': the recursion diverges.*Give alpha below"):
                create("lissa", alpha=2.5 / top, steps=steps, relatif=relatif).fit(train).score(query)
    got = create("lissa", alpha=1.5 / top, steps=400).fit({"b2": train["b2"]}).score({"b2": query["b2"]})
    assert torch.isfinite(got).all()
    huge = {b: 1e3 * g for b, g in train.items()}
    with pytest.raises(UserError, match=r"diverges.*use protocol=sound"):
        create("lissa", protocol="paper").fit(huge).score(query)


# ---------------------------------------------------------------- properties


@pytest.mark.parametrize("spec", [*INFLUENCE, "graddot", "gradcos"])
@pytest.mark.parametrize("option", [*OPTIONS, "aggregate=rank", "aggregate=vote"])
def test_permuting_training_rows_permutes_scores(spec: str, option: str) -> None:
    if ("relatif" in option and spec == "gradcos") or ("aggregate" in option and spec == "exact"):
        return
    train, query = rows(13, (5, 30, 7), 0), rows(3, (5, 30, 7), 1)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(3))
    a = parse(spelt(spec, option)).fit(train).score(query)
    b = parse(spelt(spec, option)).fit({k: v[order] for k, v in train.items()}).score(query)
    torch.testing.assert_close(a[:, order], b, rtol=1e-9, atol=1e-9 * float(a.abs().max()))


@pytest.mark.parametrize("spec", ["exact", "exact-block", "datainf", "lissa"])
@pytest.mark.parametrize("option", ["", "relatif=l", "center=true"])
@pytest.mark.parametrize("damping", [1e-4, 0.1, 1e3])
def test_the_scale_of_a_block_does_not_matter(spec: str, option: str, damping: float) -> None:
    train, query = case("mixed")
    for c in (1e-6, 1e6):
        big = [{b: x * (c if b == "b1" else 1) for b, x in f.items()} for f in (train, query)]
        a = quiet(spelt(spec, option), train, query, damping=damping)
        assert error(quiet(spelt(spec, option), *big, damping=damping), a) < 1e-8


@pytest.mark.parametrize("spec", [*INFLUENCE, "lissa:protocol=paper"])
@pytest.mark.parametrize("blocks", [1, 3])
def test_at_large_damping_every_method_is_a_scaled_graddot(spec: str, blocks: int) -> None:
    sizes = (12, 5, 20)[:blocks]
    train, query = rows(8, sizes, 0), rows(3, sizes, 1)
    # λ differs by block: in units of the mean eigenvalue the blocks are equal.
    train = {b: g / oracles.mean_eigenvalue(g) ** 0.5 for b, g in train.items()}
    damping = 1e5 if "paper" not in spec else 10.0
    got = quiet(spec, train, query, damping=damping)
    dot = create("graddot").fit(train).score(query)
    scale = float((got * dot).sum() / dot.square().sum())
    assert scale > 0
    assert error(got, scale * dot) < (1e-3 if "paper" not in spec else 2e-2)
    if spec in ("exact", "exact-block", "datainf"):
        assert abs(scale * damping - 1) < 1e-3


@pytest.mark.parametrize("spec", [*INFLUENCE, "lissa:steps=100", "graddot", "gradcos"])
@pytest.mark.parametrize("option", [*OPTIONS, "form=primal"])
@pytest.mark.parametrize("common", [0.0, 1.0, 1e3])
def test_float32_agrees_with_float64(spec: str, option: str, common: float) -> None:
    """Within 1e-4 of the largest score, for every damping from 1e-4 up; 400 numbers a row and more."""
    if (option.startswith(("relatif", "form")) and spec == "gradcos") or (
        option.startswith("form") and "exact" not in spec
    ):
        return
    train, query = ({b: x.float() for b, x in rows(n, (400, 30, 900), s, common).items()} for n, s in ((60, 0), (5, 1)))
    double = [{b: x.double() for b, x in f.items()} for f in (train, query)]
    for damping in (1e-4, 1e-2, 1.0, 1e3) if "grad" not in spec else (None,):
        options = {} if damping is None else {"damping": damping}
        got, want = quiet(spelt(spec, option), train, query, **options), quiet(spelt(spec, option), *double, **options)
        assert got.dtype == torch.float32
        assert want.dtype == torch.float64
        assert error(got.double(), want) < 1e-4, damping


@pytest.mark.parametrize("spec", [*INFLUENCE, "lissa:protocol=paper"])
@pytest.mark.parametrize("option", ["", "relatif=l", "relatif=theta", "aggregate=rank"])
def test_a_sweep_equals_one_damping_at_a_time(spec: str, option: str) -> None:
    if spec == "exact" and option.startswith("aggregate"):
        return
    train, query = rows(40, (5, 60, 20), 0), rows(3, (5, 60, 20), 1)
    train, query = ({b: 0.1 * x for b, x in f.items()} for f in (train, query))
    method = parse(spelt(spec, option)).fit(train)
    swept = method.sweep(query, DAMPINGS[1:-1])  # type: ignore[attr-defined]
    assert list(swept) == DAMPINGS[1:-1]
    for damping, got in swept.items():
        torch.testing.assert_close(got, quiet(spelt(spec, option), train, query, damping=damping), rtol=1e-7, atol=1e-9)


def test_the_cheap_way_and_the_gram_give_the_same_datainf() -> None:
    train, query = rows(60, (8, 90), 0), rows(21, (8, 90), 1)
    full = create("datainf").fit(train).score(query)  # 3 × 21 > 60: K is formed
    one = torch.cat(
        [create("datainf").fit(train).score({b: v[i : i + 1] for b, v in query.items()}) for i in range(21)]
    )
    torch.testing.assert_close(one, full, rtol=1e-9, atol=1e-9)
