"""Options of every gradient method, and degenerate input to all of them."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from datablame import methods as registry
from datablame.errors import UserError
from datablame.methods import create, parse
from gradient_cases import OPTIONS, case, error, quiet, rows, spelt

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


@pytest.mark.parametrize("relatif", ["l", "theta"])
def test_a_ranked_block_is_divided_by_its_own_norms(relatif: str) -> None:
    train, query = rows(12, (9, 30, 5), 0), rows(4, (9, 30, 5), 1)
    for g in train.values():
        g *= torch.linspace(0.1, 9, 12)[torch.randperm(12, generator=torch.Generator().manual_seed(len(g[0])))][:, None]
    for spec in ("graddot", "exact-block", "datainf", "lissa"):
        method = spelt(spec, f"relatif={relatif}")
        alone = [parse(method).fit({b: train[b]}).score({b: query[b]}) for b in train]
        want = sum((s.argsort(dim=1).argsort(dim=1).double() + 0.5) / 12 for s in alone) / 3
        torch.testing.assert_close(parse(spelt(method, "aggregate=rank")).fit(train).score(query), want)  # type: ignore[arg-type]


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


def test_a_score_beyond_the_features_dtype_is_an_error() -> None:
    train = {"a": torch.full((2, 3), 1e30)}
    with pytest.raises(UserError, match="graddot: a score is not finite.*float32"):
        create("graddot").fit(train).score(train)
    assert torch.isfinite(create("exact-block").fit(train).score(train)).all()
