"""The rows to look at first: numbers against their formulas, planted faults, copies, files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import datablame
from conftest import ROWS, Run, write_jsonl
from datablame import auditing, models
from datablame.errors import UserError
from datablame.examples import from_prompt
from datablame.methods import create
from datablame.store import FeatureStore
from gradient_cases import rows as gradients

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def text(i: int) -> str:
    """Unlike any other."""
    letters = random.Random(i)
    return " ".join("".join(letters.choices(LETTERS, k=6)) for _ in range(8))


def store_of(path: Path, features: dict[str, Tensor], texts: list[str] | None = None) -> FeatureStore:
    """An index of these features, as if captured."""
    n = len(next(iter(features.values())))
    examples = [from_prompt(t, "Yes.", id=i) for i, t in enumerate(texts or map(text, range(n)))]
    store = FeatureStore.create(path, {"extras": []}, {k: x.shape[1] for k, x in features.items()}, examples, "float64")
    store.begin()
    for a, b in store.missing():
        store.write((a, b), {k: x[a:b] for k, x in features.items()})
    return store


def features(g: dict[str, Tensor]) -> dict[str, Tensor]:
    n = len(next(iter(g.values())))
    numbers = torch.rand(3, n, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    tokens = (1 + 9 * numbers[2]).round()
    return {
        "loss": numbers[0] * tokens,
        "base-loss": (1 + numbers[1]) * tokens,
        "length": tokens,
        **{f"gradients/{b}": x for b, x in g.items()},
    }


@pytest.mark.parametrize(("n", "sizes"), [(6, (12, 9)), (30, (4, 3)), (8, (5, 12, 20))])
def test_self_influence_is_the_dense_formula(n: int, sizes: tuple[int, ...]) -> None:
    g = gradients(n, sizes, 0)
    for damping in (1e-3, 0.1, 10.0):
        whole = torch.cat(list(g.values()), dim=1)
        lam = torch.cat(
            [damping * x.square().sum() / x.numel() * torch.ones(x.shape[1], dtype=x.dtype) for x in g.values()]
        )
        inverse = torch.linalg.inv(whole.T @ whole / n + torch.diag(lam))
        want = torch.stack([x @ inverse @ x for x in whole])
        got = create("exact", damping=damping).fit(g).self_influence()  # type: ignore[attr-defined]
        torch.testing.assert_close(got, want, rtol=1e-8, atol=0)
        assert (got < n).all()


@pytest.mark.parametrize("seed", range(3))
def test_fewer_rows_than_weights_are_told_apart(tmp_path: Path, seed: int) -> None:
    """Oracle: the dense formula, λ over the mean of the n eigenvalues that are not 0."""
    n, sizes = 12, (300, 200)
    g = gradients(n, sizes, seed)
    size = torch.linspace(0.2, 2, n, dtype=torch.float64)[:, None]
    g = {b: x * size for b, x in g.items()}
    found = datablame.audit(store_of(tmp_path / "i", features(g)))
    got = np.array([r.self_influence for r in sorted(found.rows, key=lambda r: int(r.id))])
    whole = torch.cat(list(g.values()), dim=1)
    lam = torch.cat([x.square().sum() / x.numel() * torch.ones(x.shape[1], dtype=x.dtype) for x in g.values()])
    inverse = torch.linalg.inv(whole.T @ whole / n + torch.diag(lam * sum(sizes) / n))
    np.testing.assert_allclose(got, torch.stack([x @ inverse @ x for x in whole]), rtol=1e-8)
    assert got.mean() <= n / 2
    assert got.max() - got.min() > n / 4
    saturated = create("exact", damping=0.1).fit(g).self_influence()  # type: ignore[attr-defined]
    assert saturated.min() > 0.9 * n  # what the same measure says at the damping of exact
    assert "nearly alone" not in sentences(found, "warning")


@pytest.mark.filterwarnings("ignore:.*only zero gradients")
def test_blocks_of_zero_gradients_change_nothing(tmp_path: Path) -> None:
    g = gradients(12, (300,), 0)
    (block,) = g
    none = {"none": torch.zeros(12, 400, dtype=torch.float64)}
    found = [
        {r.id: r.self_influence for r in datablame.audit(store_of(tmp_path / name, features(x))).rows}
        for name, x in (("i", g), ("j", {block: g[block]} | none), ("k", none))
    ]
    assert found[1] == pytest.approx(found[0])
    assert set(found[2].values()) == {0.0}


def test_it_says_when_self_influence_is_the_norm(tmp_path: Path) -> None:
    g = {"b0": torch.eye(9, 30, dtype=torch.float64) * torch.arange(1.0, 10.0, dtype=torch.float64)[:, None]}
    found = datablame.audit(store_of(tmp_path / "i", features(g)))
    assert "The self-influence correlates 1.00 with the gradient norm" in sentences(found, "note")
    # Eight rows in one direction and a short one in its own: not the norm.
    g["b0"] = (
        torch.eye(9, 30, dtype=torch.float64)[[0] * 8 + [1]] * torch.linspace(2, 1, 9, dtype=torch.float64)[:, None]
    )
    found = datablame.audit(store_of(tmp_path / "j", features(g)))
    assert "correlates" not in "".join(f.sentence for f in found.findings if "with the gradient norm" in f.sentence)
    assert found.rows[0].id == 8


def test_numbers_of_every_row(tmp_path: Path) -> None:
    kept = features(gradients(12, (5, 7), 0))
    found = datablame.audit(store_of(tmp_path / "i", kept), damping=0.5)
    influence = create("exact", damping=0.5).fit(gradients(12, (5, 7), 0)).self_influence()  # type: ignore[attr-defined]
    assert [r.self_influence for r in found.rows] == sorted(influence.tolist(), reverse=True)
    for r in found.rows:
        i = int(r.id)
        tokens = float(kept["length"][i])
        assert r.self_influence == pytest.approx(float(influence[i]))
        squares = sum(float(x[i].square().sum()) for k, x in kept.items() if k.startswith("gradients/"))
        assert r.gradient_norm == pytest.approx(squares**0.5)
        assert r.loss == pytest.approx(float(kept["loss"][i]) / tokens)
        assert r.drop == pytest.approx(float(kept["base-loss"][i] - kept["loss"][i]) / tokens)
        assert (r.tokens, r.copies, r.group) == (tokens, 1, None)


def mislabelled(seed: int) -> tuple[Tensor, Tensor, list[int]]:
    """Gradients and losses of a logistic regression at its optimum, and the rows whose labels were turned."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(80, 6, generator=g, dtype=torch.float64)
    y = (x[:, 0] + x[:, 1] > 0).double()
    x[:, 0] += 2 * (2 * y - 1)
    turned = torch.randperm(80, generator=g)[:6].tolist()
    y[turned] = 1 - y[turned]
    w = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    fit = torch.optim.LBFGS([w], max_iter=200)

    def loss() -> Tensor:
        fit.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(x @ w, y) + 1e-3 * w.square().sum()
        value.backward()
        return value

    fit.step(loss)  # type: ignore[arg-type]
    with torch.no_grad():
        each = torch.nn.functional.binary_cross_entropy_with_logits(x @ w, y, reduction="none")
        return (torch.sigmoid(x @ w) - y)[:, None] * x, each, turned


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("by", ["self_influence", "gradient_norm", "loss"])
def test_planted_mislabelled_rows_come_first(tmp_path: Path, seed: int, by: str) -> None:
    g, loss, turned = mislabelled(seed)
    one = torch.ones(80, 1, dtype=torch.float64)
    store = store_of(tmp_path / "i", {"gradients/w": g, "loss": loss[:, None], "length": one})
    first = [r.id for r in datablame.audit(store, by=by).rows[:10]]
    assert len(set(first) & set(turned)) >= 5, by  # of 6; chance is 0.75


def test_copies_are_grouped_and_shown_once(tmp_path: Path) -> None:
    long = "Please tell me in one short sentence what a kettle is for and when it whistles"
    texts = [text(0), long + ".", text(1), long + "!", long.upper() + ".", text(2)]
    assert len(set(auditing.near_copies(texts))) == 4
    found = datablame.audit(store_of(tmp_path / "i", features(gradients(6, (5,), 0)), texts))
    groups = {r.id: (r.copies, r.group) for r in found.rows}
    assert groups[1] == groups[3] == groups[4]
    assert groups[1][0] == 3
    assert groups[0] == (1, None)
    top = found.top(9)
    assert len(top) == 4
    first = next(r for r in found.rows if r.group is not None)
    assert [r for r in top if r.group is not None] == [first]
    assert any("3 rows have near-copies, in 1 groups" in f.sentence for f in found.findings)
    assert auditing.near_copies([" ", "\n"]) == [0, 0]


def sentences(found: Any, level: str) -> str:
    return " ".join(f.sentence for f in found.findings if f.level == level)


def test_it_says_when_length_decides(tmp_path: Path) -> None:
    kept = features(gradients(20, (8,), 0))
    kept["length"] = torch.arange(1.0, 21.0, dtype=torch.float64)[:, None]
    kept["gradients/b0"] = kept["gradients/b0"] / kept["gradients/b0"].norm(dim=1, keepdim=True) * kept["length"]
    found = datablame.audit(store_of(tmp_path / "i", kept))
    assert "The gradient norm correlates 1.00 with the rows' length in labelled tokens. It mostly finds long rows." in (
        sentences(found, "warning")
    )


def test_it_says_when_damping_is_too_small_and_rows_are_learnt(tmp_path: Path) -> None:
    g = gradients(6, (40,), 0)
    g["b0"][2] *= 1e-9
    store = store_of(tmp_path / "i", features(g))
    warned = sentences(datablame.audit(store, damping=1e-6), "warning")
    assert "row is nearly alone in its direction" in warned
    assert "1 of 6 rows have a near-zero gradient" in warned
    assert "nearly alone" not in sentences(datablame.audit(store, damping=100.0), "warning")


def test_the_command_loads_no_model(built: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load", lambda spec: pytest.fail("a model was loaded"))
    code, out, err = run("audit", built, "--top", 3, "--by", "drop", "--out", tmp_path / "o")
    assert code == 0, err
    frame = pd.read_parquet(tmp_path / "o" / "audit.parquet")
    assert list(frame["rank"]) == list(range(1, len(ROWS) + 1))
    assert frame["drop"].is_monotonic_decreasing
    lines = [json.loads(line) for line in (tmp_path / "o" / "audit.jsonl").read_text().splitlines()]
    assert [x["rank"] for x in lines] == [1, 2, 3]
    assert all((x["prompt"], x["response"]) == ROWS[x["row"]] for x in lines)
    page = (tmp_path / "o" / "audit.html").read_text()
    assert "datablame audit" in page
    assert lines[0]["response"].strip() in page
    assert "rows to look at first, by drop" in out
    again = run("audit", built, "--top", 3, "--by", "drop", "--out", tmp_path / "p")
    assert again[0] == 0
    assert (tmp_path / "o" / "audit.parquet").read_bytes() == (tmp_path / "p" / "audit.parquet").read_bytes()
    store = FeatureStore.open(built)
    drop = ((store.read("base-loss") - store.read("loss")) / store.read("length"))[:, 0].double().numpy()
    np.testing.assert_allclose(frame["drop"], np.sort(drop)[::-1], rtol=1e-5, atol=1e-6)


def test_text_is_escaped(tmp_path: Path) -> None:
    found = datablame.audit(store_of(tmp_path / "i", features(gradients(2, (3,), 0)), ["<script>x</script>", "other"]))
    found.save(tmp_path / "o")
    assert "<script>" not in (tmp_path / "o" / "audit.html").read_text()
    assert "<script>" not in found._repr_html_()


def test_errors(built: Path, model_dir: Path, train_file: Path, tmp_path: Path, run: Run) -> None:
    with pytest.raises(UserError, match=r"--by 'los': unknown. Did you mean 'loss'"):
        datablame.audit(built, by="los")
    with pytest.raises(UserError, match="damping=0; use a number above 0"):
        datablame.audit(built, damping=0)
    datablame.index(str(model_dir), train_file, tmp_path / "states")
    with pytest.raises(UserError, match="holds no gradients"):
        datablame.audit(tmp_path / "states")
    kept = features(gradients(4, (3,), 0))
    del kept["base-loss"]
    store = store_of(tmp_path / "nobase", kept)
    with pytest.raises(UserError, match="no base model to compare with"):
        datablame.audit(store, by="drop")
    assert datablame.audit(store).rows[0].drop is None
    datablame.audit(store).save(tmp_path / "saved")
    code, _, err = run("audit", built, "--out", built)
    assert (code, "that is an index" in err) == (2, True)


def test_one_row(model_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "t.jsonl", [{"prompt": "a", "response": "b"}])
    datablame.index(str(model_dir), train, tmp_path / "i", str(adapter_dir))
    found = datablame.audit(tmp_path / "i")
    assert len(found.rows) == len(found.top()) == 1
    found.save(tmp_path / "o")
