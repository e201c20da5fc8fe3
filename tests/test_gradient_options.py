"""Options of the gradient methods."""

from __future__ import annotations

import pytest
import torch

from datablame.errors import UserError
from datablame.methods import create, parse
from gradient_cases import case, error, quiet, rows, spelt


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
        "exact:unit=foo": "exact: unit='foo'; use mean or rank",
        "lissa:protocol=paper,unit=rank": "leave unit out",
        "datainf:unit=rank": "unknown option 'unit'",
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
