"""Influence methods against dense matrices and the released loops, and the properties that must hold."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import oracles
from datablame import methods as registry
from datablame.errors import UserError
from datablame.methods import create, parse
from datablame.methods import lissa as lissa_module

Blocks = dict[str, Tensor]
DAMPINGS = [1e-6, 1e-4, 1e-2, 0.1, 1.0, 1e2, 1e5]


def rows(n: int, sizes: tuple[int, ...], seed: int, common: float = 0.0) -> Blocks:
    """Gradients of very unequal blocks; `common` times one fixed direction of each, in every row."""
    g = torch.Generator().manual_seed(seed)
    c = torch.Generator().manual_seed(99)
    out = {}
    for i, d in enumerate(sizes):
        shared = torch.randn(1, d, generator=c, dtype=torch.float64)
        out[f"b{i}"] = (torch.randn(n, d, generator=g, dtype=torch.float64) + common * shared) * 10.0 ** (i - 1)
    return out


def case(name: str) -> tuple[Blocks, Blocks]:
    """(training rows, queries) of one point of the grid."""
    common = 300.0 if name == "common" else 0.0
    sizes, n = {
        "one block, n < D": ((14,), 6),
        "one block, n > D": ((4,), 9),
        "n < D": ((12, 9, 20), 6),
        "n > D": ((5, 3, 6), 20),
        "mixed": ((5, 12, 20), 8),
    }.get(name, ((5, 12, 20), 8))
    train, query = rows(n, sizes, 0, common), rows(3, sizes, 1, common)
    for g in train.values():
        if name == "duplicates":
            g[2:5] = g[1]
        if name == "zero row":
            g[3] = 0
    if name == "zero block":
        train["b1"].zero_()
    return train, query


CASES = [
    "one block, n < D",
    "one block, n > D",
    "n < D",
    "n > D",
    "mixed",
    "duplicates",
    "zero row",
    "zero block",
    "common",
]
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


def error(got: Tensor, want: Tensor) -> float:
    """The largest difference over the largest score."""
    return float((got - want).abs().max() / want.abs().max())


def tolerance(damping: float) -> float:
    """Dense inverses lose as many digits as H's condition number, about n·D/damping, has."""
    return max(1e-10, 1e-12 / damping)


def quiet(spec: str, train: Blocks, query: Blocks, **options: object) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return create_from(spec, **options).fit(train).score(query)


def create_from(spec: str, **options: object) -> registry.Method:
    method = parse(spec)
    for k, v in options.items():
        setattr(method, k, v)
    return method


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

INFLUENCE = ["exact", "exact-block", "datainf", "lissa", "lissa:steps=inf"]
OPTIONS = ["", "relatif=l", "relatif=theta", "center=true", "center=2"]


def spelt(spec: str, option: str) -> str:
    return f"{spec}{',' if ':' in spec else ':'}{option}" if option else spec


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


# ---------------------------------------------------------------- options


@pytest.mark.parametrize("sizes", [(40, 25), (6, 5)])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_centring_projects_out_the_training_rows_strongest_directions(sizes: tuple[int, ...], k: int) -> None:
    train, query = rows(9, sizes, 0, 50.0), rows(3, sizes, 1, 50.0)
    projected = []
    for f in (train, query):
        w = {b: torch.linalg.svd(g, full_matrices=False).Vh[:k].T for b, g in train.items()}
        projected.append({b: x - x @ w[b] @ w[b].T for b, x in f.items()})
    for spec in ("graddot", "gradcos", "gradcos:over=row", "exact", "datainf", "lissa", "exact-block:relatif=theta"):
        got = parse(spelt(spec, f"center={k}")).fit(train).score(query)
        assert error(got, parse(spec).fit(projected[0]).score(projected[1])) < 1e-7
    assert torch.equal(
        create("graddot", center=True).fit(train).score(query), create("graddot", center=1).fit(train).score(query)
    )
    assert torch.equal(parse("graddot:center=false").fit(train).score(query), create("graddot").fit(train).score(query))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_centring_of_equal_rows_leaves_zero_not_rounding(dtype: torch.dtype) -> None:
    train = {"a": torch.randn(1, 30, generator=torch.Generator().manual_seed(0)).to(dtype).repeat(6, 1)}
    train["a"][2] = 0
    for spec in ("graddot", "gradcos", "datainf"):
        assert not quiet(spec, train, {"a": train["a"] * 3}, center=1).any()
    with pytest.warns(UserWarning, match="zero gradients after centring"):
        create("exact", center=1).fit(train).score(train)


def test_ranks_and_votes_over_blocks() -> None:
    train = {"a": torch.tensor([[1.0], [2.0], [2.0], [5.0]]), "b": torch.tensor([[9.0], [7.0], [8.0], [-1.0]])}
    train["zero"] = torch.zeros(4, 2)
    query = {"a": torch.ones(1, 1), "b": torch.tensor([[1e6]]), "zero": torch.ones(1, 2)}
    ranks = parse("graddot:aggregate=rank").fit(train).score(query)[0] * 4 * 3
    assert ranks.tolist() == pytest.approx([0.5 + 3.5, 2 + 1.5, 2 + 2.5, 3.5 + 0.5])
    assert parse("graddot:aggregate=vote").fit(train).score(query)[0].tolist() == pytest.approx([1 / 3, 0, 0, 1 / 3])
    many = {"a": torch.arange(20.0)[:, None]}
    assert parse("graddot:aggregate=vote").fit(many).score({"a": torch.ones(1, 1)}).sum() == 2
    # A block is a method by itself: RelatIF divides it by its own norms.
    got = parse("graddot:aggregate=rank,relatif=l").fit({"a": train["a"][3:], "b": train["b"][3:]})
    assert got.score({"a": torch.ones(1, 1), "b": torch.ones(1, 1)}).tolist() == [[0.5]]


def test_graddot_relatif_is_the_gradient_norm() -> None:
    train, query = case("zero row")
    g, v = (torch.cat(list(x.values()), dim=1) for x in (train, query))
    want = torch.where(g.norm(dim=1) > 0, v @ g.T / g.norm(dim=1), 0.0)
    for relatif in ("l", "theta"):
        torch.testing.assert_close(create("graddot", relatif=relatif).fit(train).score(query), want)


def test_wrong_options_are_errors() -> None:
    for bad, message in {
        "exact:aggregate=rank": "exact: aggregate='rank': all blocks are solved jointly",
        "exact:damping=0": "exact: damping=0; use a number above 0",
        "exact:damping=nan": "above 0",
        "exact-block:relatif=both": "exact-block: relatif='both'; use l or theta",
        "exact-block:form=wide": "use auto, dual or primal",
        "graddot:aggregate=mean": "use sum, rank or vote",
        "graddot:center=-1": "center=-1",
        "graddot:center=mean": "true, false or a whole number",
        "gradcos:over=row,aggregate=vote": "has no blocks",
        "lissa:steps=1.5": "whole number or inf",
        "lissa:steps=-1": "whole number or inf",
        "lissa:steps=nan": "whole number or inf",
        "lissa:alpha=-1": "alpha=-1",
        "lissa:protocol=paper,alpha=1": "fixes alpha",
        "lissa:protocol=paper,steps=inf": "never converges",
        "lissa:protocol=other": "use sound or paper",
    }.items():
        with pytest.raises(UserError, match=message):
            parse(bad)
    with pytest.raises(UserError, match="above 0"):
        create("exact").fit(case("mixed")[0]).sweep(case("mixed")[1], [0.1, -1])


# ---------------------------------------------------------------- degenerate input


def gradient_methods() -> list[str]:
    """Every method of the registry that takes gradients, and its options that change the arithmetic."""
    specs = [n for n in registry.names() if registry.method_class(n).needs == "gradients"]
    more = [f"{n}:{o}" for n in ("exact", "exact-block", "datainf", "lissa", "graddot") for o in OPTIONS if o]
    return [*specs, *more, "lissa:steps=inf", "lissa:protocol=paper", "gradcos:center=1", "exact-block:aggregate=vote"]


G = torch.Generator().manual_seed(0)
LOW = torch.randn(6, 2, generator=G) @ torch.randn(2, 9, generator=G)
DEGENERATE = {
    "all rows equal": {"a": torch.ones(6, 4), "b": torch.full((6, 9), 0.1)},
    "zero gradients": {"a": torch.zeros(6, 4), "b": torch.zeros(6, 9)},
    "a zero block": {"a": torch.zeros(6, 4), "b": LOW},
    "n = 1": {"a": torch.ones(1, 4), "b": LOW[:1]},
    "n = 1, one number": {"a": torch.full((1, 1), 3.0)},
    "rank-deficient": {"a": LOW[:, :4], "b": LOW},
    "huge": {"a": LOW * 1e18},
    "tiny": {"a": LOW * 1e-18},
    "not finite": {"a": torch.tensor([[1.0, 2.0], [math.nan, 1.0]])},
}


@pytest.mark.parametrize("name", list(DEGENERATE))
@pytest.mark.parametrize("spec", gradient_methods())
def test_degenerate_input_gives_a_clear_error_or_finite_scores(spec: str, name: str) -> None:
    train = DEGENERATE[name]
    query = {b: torch.ones(2, g.shape[1]) for b, g in train.items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            got = parse(spec).fit(train).score(query)
        except UserError as e:
            said, got = str(e), None
    refused = name == "not finite" or (name == "huge" and "protocol=paper" in spec)
    if refused:
        assert got is None
        assert "block 'a'" in said
        return
    assert got is not None, said
    assert torch.isfinite(got).all()
    assert got.shape == (2, len(train["a"]))
    said = [str(w.message) for w in caught]
    damped = hasattr(registry.method_class(spec.split(":")[0]), "sweep")
    if name in ("zero gradients", "a zero block") and damped:
        assert any("zero gradients" in s and "'a'" in s for s in said)
    if name == "zero gradients":
        assert not got.any()
