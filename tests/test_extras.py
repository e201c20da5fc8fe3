"""Features that are captured when they are named: gradients of sampled labels, and the Gauss-Newton matrix of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import datablame
import oracles
from conftest import ROWS, write_jsonl
from datablame import extras
from datablame.blocks import select_blocks
from datablame.encoding import IGNORED, Encoded, Encoding, encode_rows
from datablame.errors import UserError
from datablame.examples import from_prompt
from datablame.extras import sampled
from datablame.indexing import CaptureOptions, Engine
from datablame.methods import create
from datablame.methods.base import Sampled
from datablame.models import ModelSpec, load
from datablame.store import FeatureStore
from gradient_cases import error
from test_curvlinops import N, gradients, small, whole


@pytest.fixture(scope="module")
def engine(model_dir: Path, adapter_dir: Path) -> Engine:
    loaded = load(ModelSpec(str(model_dir), str(adapter_dir), "cpu", "float64"))
    return Engine(loaded, CaptureOptions(extras="sampled:draws=2"))


@pytest.fixture(scope="module")
def rows(engine: Engine) -> list[Encoded]:
    encoder = Encoding(engine.loaded.tokenizer, None, 128)
    return encode_rows(encoder, [from_prompt(p, r) for p, r in ROWS])


def drawn(engine: Engine, rows: list[Encoded]) -> dict[str, Tensor]:
    (extra,) = engine.extras.values()
    return extra.capture(engine, rows, {})


def relabelled(engine: Engine, row: Encoded, number: int) -> Encoded:
    """The row with the tokens that the extra must draw, one position at a time."""
    model = engine.loaded.model
    uniform = sampled._uniform(row, 0, number)
    labels = list(row.labels)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row.input_ids])).logits[0]
    for u, t in zip(uniform.tolist(), row.targets, strict=True):
        mass = 0.0
        for token, p in enumerate(torch.softmax(logits[t - 1], dim=-1).tolist()):
            mass += p
            if mass > u:
                labels[t] = token
                break
    return dataclasses.replace(row, labels=labels)


def test_a_draw_is_the_gradient_of_the_relabelled_row(engine: Engine, rows: list[Encoded]) -> None:
    got = drawn(engine, rows)
    weights: dict[str, Any] = {n: m.weight for n, m in select_blocks(engine.loaded.model).items()}
    for number in (0, 1):
        others = [relabelled(engine, row, number) for row in rows]
        assert any(a.labels != b.labels for a, b in zip(rows, others, strict=True))
        assert all(sum(x != IGNORED for x in o.labels) == len(r.targets) for o, r in zip(others, rows, strict=True))
        want = oracles.gradients_alone(engine.loaded.model, others, weights)
        for block, g in want.items():
            torch.testing.assert_close(got[f"sampled/{number}/{block}"], g, rtol=1e-9, atol=1e-12)
    assert not torch.equal(got["sampled/0/" + block], got["sampled/1/" + block])


def test_a_draw_does_not_depend_on_the_batch(engine: Engine, rows: list[Encoded]) -> None:
    together, reverse = drawn(engine, rows), drawn(engine, rows[::-1])
    for name, x in together.items():
        torch.testing.assert_close(reverse[name].flip(0), x, rtol=1e-9, atol=1e-12)
        alone = torch.cat([drawn(engine, [row])[name] for row in rows[:3]])
        torch.testing.assert_close(alone, x[:3], rtol=1e-9, atol=1e-12)


def test_tokens_are_drawn_as_often_as_the_model_predicts_them(rows: list[Encoded]) -> None:
    row = rows[0]

    class One:
        """A batch of one row with 4,000 labelled tokens."""

        rows = (dataclasses.replace(row, labels=[1] * 4001, input_ids=[1] * 4001),)

    p = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05], dtype=torch.float64)
    found = sampled.draw(One(), p.log().expand(4000, -1), seed=3, number=0)  # type: ignore[arg-type]
    share = torch.bincount(found, minlength=5) / 4000
    assert (share - p).abs().max() < 4 * 0.5 / 4000**0.5
    assert share[1] == 0


def test_gauss_newton_is_influence_with_curvlinops_ggn() -> None:
    """Every label of a 3-class model, weighted by its probability, in place of draws: no sampling error is left."""
    model, data = small("mlp")
    params = list(model.parameters())
    g, v = gradients(model, data[:N]), gradients(model, data[N:])
    h = oracles.curvature("ggn", model, params, data[:N])
    by_label = [oracles.gradients_by_label(model, params, x) for x, _ in data[:N]]
    sizes = [x.shape[1] for x in g.values()]
    draws = []
    for c in range(3):
        weighted = torch.stack([(3 * p[c]).sqrt() * rows[c] for p, rows in by_label])
        draws.append(dict(zip(g, weighted.split(sizes, dim=1), strict=True)))
    for damping in (1e-4, 1e-2, 0.1, 1.0, 1e2):
        one = {"all": whole(g)}
        joined = Sampled(one, [{"all": whole(d)} for d in draws])
        want = oracles.influence(h, damping, one["all"], whole(v))
        got = create("gauss-newton", damping=damping).fit(joined).score({"all": whole(v)})
        assert error(got, want) < 1e-10, damping
        # Over several blocks, λ is each block's own.
        method = create("gauss-newton", damping=damping)
        lam, a = [], 0
        for d in sizes:
            lam.append(damping * h.diagonal()[a : a + d].mean().expand(d))
            a += d
        want = whole(v) @ torch.linalg.inv(h + torch.diag(torch.cat(lam))) @ whole(g).T
        assert error(method.fit(Sampled(g, draws)).score(v), want) < 1e-10, damping
        inverse = torch.linalg.inv(h + torch.diag(torch.cat(lam)))
        norms = ((whole(g) @ inverse) * whole(g)).sum(dim=1).sqrt()
        relative = create("gauss-newton", damping=damping, relatif="l").fit(Sampled(g, draws)).score(v)
        assert error(relative, want / norms) < 1e-10, damping


def test_it_is_not_the_empirical_fisher() -> None:
    model, data = small("linear")
    g, v = gradients(model, data[:N]), gradients(model, data[N:])
    same = create("gauss-newton").fit(Sampled(g, [g])).score(v)
    assert error(same, create("exact").fit(g).score(v)) < 1e-10  # with the rows' own labels it would be


def test_an_index_with_an_extra(model_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "t.jsonl", [{"prompt": p, "response": r} for p, r in ROWS])
    options = CaptureOptions(extras="sampled:draws=2,seed=1")
    store = datablame.index(str(model_dir), train, tmp_path / "i", str(adapter_dir), capture=options)
    assert store.settings["extras"] == ["sampled:draws=2,seed=1"]
    scores = datablame.trace(store, train, methods=["gauss-newton", "exact"])
    again = datablame.trace(tmp_path / "i", train, methods=["gauss-newton"])
    assert (scores.values["gauss-newton"] == again.values["gauss-newton"]).all()
    g = {b: store.features("gradients")[b] for b in store.features("gradients")}
    want = create("gauss-newton").fit(Sampled(g, [store.features(f"sampled/{s}") for s in (0, 1)])).score(g)
    assert error(torch.from_numpy(scores.values["gauss-newton"]), want.double()) < 1e-4
    # The other features are those of an index without it, and an interrupted build goes on to the same bytes.
    plain = datablame.index(str(model_dir), train, tmp_path / "p", str(adapter_dir))
    assert all(torch.equal(plain.features("gradients")[b], x) for b, x in g.items())
    with pytest.raises(UserError, match=r"gauss-newton needs .*--extras sampled"):
        datablame.trace(plain, train, methods=["gauss-newton"])
    with pytest.raises(UserError, match="extras"):
        datablame.index(str(model_dir), train, tmp_path / "i", str(adapter_dir))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("smpled", r"'smpled': unknown. Did you mean 'sampled'"),
        ("sampled:draws=0", "draws=0; use a whole number from 1"),
        ("sampled:drows=1", "unknown option 'drows'"),
        ("sampled,sampled:draws=2", "sampled is named twice"),
    ],
)
def test_bad_extras(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        extras.parse_list(text)


def test_a_wrong_name_is_told_before_a_model_is_loaded(tmp_path: Path) -> None:
    options = CaptureOptions(extras="kfca")
    with pytest.raises(UserError, match="--extras 'kfca': unknown. Did you mean 'kfac'"):
        datablame.index(tmp_path / "no-model", tmp_path / "no-rows.jsonl", tmp_path / "i", capture=options)


def test_sums_are_added_over_shards(tmp_path: Path) -> None:
    examples = [from_prompt("a", "b", id=i) for i in range(20)]
    store = FeatureStore.create(tmp_path / "s", {"extras": []}, {"x": 2**21}, examples, "float32")
    store.begin()
    for a, b in store.missing():
        store.write((a, b), {"x": torch.zeros(b - a, 2**21), "sums/k/n": torch.tensor([float(b - a), 1.0])})
    assert len(store.manifest["shards"]) > 1
    assert store.sums("k")["n"].tolist() == [20.0, float(len(store.manifest["shards"]))]
    assert store.sums("other") == {}
