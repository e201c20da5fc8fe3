"""Figure 7: the training against plain layers and formulas by hand, the saddle, correlations by SciPy, the pages."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from scipy import stats
from torch import Tensor

from conftest import Run, write_digits
from datablame import paper
from datablame.errors import UserError
from datablame.paper import correlation, figure7, mnist, results, twolayer
from datablame.paper.twolayer import Plan, Setting

FIRST = Setting("first", "first", rate=0.5)
PLAN = Plan((FIRST,), (2, 5), seed=3, seeds=3, rows=192, epochs=4, batch=16, points=8)


@pytest.fixture(scope="module")
def images() -> mnist.Images:
    """Noise around three pictures, one class twice as frequent."""
    rng = np.random.default_rng(0)
    pictures = rng.uniform(0, 255, size=(3, 5, 5))

    def part(n: int) -> tuple[np.ndarray, np.ndarray]:
        y = rng.choice(3, size=n, p=[0.25, 0.5, 0.25])
        return np.clip(pictures[y] + rng.normal(0, 90, size=(n, 5, 5)), 0, 255).astype(np.uint8), y.astype(np.int64)

    return mnist.Images(*part(200), *part(90), "made up")


@pytest.fixture(scope="module")
def data(images: mnist.Images) -> twolayer.Data:
    return twolayer.data(images, PLAN)


@pytest.fixture(scope="module")
def trained(data: twolayer.Data) -> dict[str, Any]:
    return twolayer.train(data, PLAN, FIRST, 5, 3)


def layers(theta: list[Tensor], dtype: torch.dtype = torch.float64) -> torch.nn.Sequential:
    """The same model as PyTorch has it."""
    a, b, bias = (t.detach().to(dtype) for t in theta)
    model = torch.nn.Sequential(torch.nn.Linear(a.shape[1] - 1, len(a)), torch.nn.Linear(*b.shape[::-1])).to(dtype)
    for p, value in zip(model.parameters(), (a[:, :-1], a[:, -1], b, bias), strict=True):
        p.data.copy_(value)
    return model


# ---------------------------------------------------------------- the training


def test_gradients_by_hand_by_autograd_and_of_plain_layers(data: twolayer.Data) -> None:
    x, y = data.train[0].double(), data.train[1]
    generator = torch.Generator().manual_seed(1)
    theta = [torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((4, 26), (3, 4), (3,))]
    a, b, _ = theta
    model = layers(theta)
    torch.testing.assert_close(twolayer.logits(theta, x), model(x[:, :-1]), rtol=1e-10, atol=1e-10)
    e = torch.softmax(twolayer.logits(theta, x), dim=1) - torch.eye(3, dtype=torch.float64)[y]
    g = e.T @ x / len(x)
    by_hand = [b.T @ g, g @ a.T, e.mean(0)]
    leaves = [t.clone().requires_grad_(True) for t in theta]
    by_autograd = torch.autograd.grad(torch.nn.functional.cross_entropy(twolayer.logits(leaves, x), y), leaves)
    torch.nn.functional.cross_entropy(model(x[:, :-1]), y).backward()
    a_weight, a_bias, b_weight, b_bias = (p.grad for p in model.parameters())
    plain = [torch.cat([a_weight, a_bias[:, None]], dim=1), b_weight, b_bias]
    for h, f, p in zip(by_hand, by_autograd, plain, strict=True):
        torch.testing.assert_close(h, f, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(h, p, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_training_is_that_of_plain_layers(data: twolayer.Data, optimizer: str) -> None:
    """Every batch in the same order through `nn.Linear`, in float64; what is measured at the end, too."""
    setting = Setting("x", "first", optimizer, 0.3 if optimizer == "sgd" else 0.01)
    start = twolayer.initial(setting, 5, 26, 3, seed=3)
    assert not any(t.any() for t in start[1:])
    model = layers(start)
    kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.Adam
    steps = kind(model.parameters(), lr=setting.rate)
    (x, y), (xt, yt) = data.train, data.test
    order = torch.Generator().manual_seed(3 + 1_000_003)
    for _ in range(PLAN.epochs):
        for i in torch.randperm(192, generator=order).split(16):
            steps.zero_grad()
            torch.nn.functional.cross_entropy(model(x[i, :-1].double()), y[i]).backward()
            steps.step()
    found = twolayer.train(data, PLAN, setting, 5, 3)
    assert found["steps"][-1] == PLAN.steps == 48
    with torch.no_grad():
        z = model(xt[:, :-1].double())
        moved = [p - q for p, q in zip(model.parameters(), layers(start).parameters(), strict=True)]
        change = z - layers(start)(xt[:, :-1].double())
        p, p0 = (torch.softmax(s, 1) for s in (z, layers(start)(xt[:, :-1].double())))
    expected = {
        "parameters": float(torch.cat([m.flatten() for m in moved]).norm()),
        "accuracy": float((z.argmax(1) == yt).double().mean()),
        "logits": float((change - change.mean(1, keepdim=True)).square().mean().sqrt()),
        "kl": float(np.mean([stats.entropy(a, b) for a, b in zip(p.numpy(), p0.numpy(), strict=True)])),
        "loss": float(torch.nn.functional.cross_entropy(z, yt)),
    }
    assert {k: found[k][-1] for k in expected} == pytest.approx(expected, rel=1e-3)
    assert expected["accuracy"] > 0.8


@pytest.mark.parametrize("width", [1, 7])
def test_zero_is_a_saddle(data: twolayer.Data, width: int) -> None:
    """In full batches the output's bias goes to the log-frequencies, and nothing else ever moves, not by a rounding."""
    plan = replace(PLAN, batch=192, epochs=60)
    found = twolayer.train(data, plan, Setting("zero", "zero", rate=1.0), width, 3)
    assert found["largest_weight_gradient"] == 0.0
    assert found["rank"] == 0
    label, share = figure7.frequent(data)
    assert label == 1
    assert set(found["accuracy"]) == {share}
    assert found["answers"] == [1]
    frequency = np.bincount(data.train[1]) / len(data.train[1])
    bias = np.log(frequency) - np.log(frequency).mean()
    assert found["parameters"][-1] == pytest.approx(np.linalg.norm(bias), rel=0.05)
    (said,) = correlation.saddle({width: found}, (label, share))
    assert (said["points_at_it"], said["accuracies"]) == (said["points"], [share])


def test_weights_at_zero_with_random_biases_learn_one_direction(data: twolayer.Data) -> None:
    """Not a saddle: the first layer's bias reaches the second, but all hidden units stay multiples of one."""
    found = twolayer.train(data, PLAN, Setting("biases", "biases", rate=0.5), 5, 3)
    assert found["parameters"][-1] > 1
    assert found["rank"] == 1
    assert twolayer.train(data, PLAN, FIRST, 5, 3)["rank"] == 2  # three classes: their logits' mean does not matter


def test_starts() -> None:
    weights = {s: twolayer.initial(Setting(s, s), 7, 26, 3, seed=1) for s in twolayer.STARTS}
    kinds = {
        s: [bool(a[:, :-1].any()), bool(a[:, -1].any()), bool(b.any()), bool(c.any())]
        for s, (a, b, c) in weights.items()
    }
    assert kinds == {
        "first": [True, True, False, False],
        "second": [False, False, True, True],
        "biases": [False, True, False, True],
        "zero": [False] * 4,
    }
    a, b, _ = weights["first"][0], *weights["second"][1:]
    assert 0.9 / 5 < a.abs().max() <= 1 / 5
    assert 0.8 / 7**0.5 < b.abs().max() <= 1 / 7**0.5


def test_two_trainings_are_one(data: twolayer.Data, trained: dict[str, Any]) -> None:
    assert twolayer.train(data, PLAN, FIRST, 5, 3) == trained
    assert twolayer.train(data, PLAN, FIRST, 5, 4)["parameters"] != trained["parameters"]


def test_too_few_images(images: mnist.Images) -> None:
    for plan in (replace(PLAN, rows=201), replace(PLAN, rows=15)):
        with pytest.raises(UserError, match="made up: 200 training images"):
            twolayer.data(images, plan)


# ---------------------------------------------------------------- correlations


def test_steps_that_are_looked_at() -> None:
    assert twolayer.spaced("even", 40, 4) == [10, 20, 30, 40]
    assert twolayer.spaced("log", 1000, 4) == [1, 10, 100, 1000]
    assert twolayer.spaced("even", 3, 10) == [1, 2, 3]
    assert twolayer.spaced("log", 1, 10) == [1]
    plan = replace(PLAN, rows=60_000, batch=256)
    steps = twolayer.measured_steps(plan)
    assert set(twolayer.spaced("log", 936, 8) + twolayer.spaced("even", 936, 8)) <= set(steps)
    assert steps[:30] == list(range(1, 31))
    assert steps[-1] == plan.steps == 936
    assert max(b / a for a, b in pairwise(steps[29:])) < 1.06


def test_coefficients_are_scipy_s_on_the_spaced_points(trained: dict[str, Any]) -> None:
    tree = correlation.of_run(trained, PLAN.steps, 8)
    at = {s: [trained["steps"].index(k) for k in twolayer.spaced(s, 48, 8)] for s in correlation.SPACINGS}
    assert at["log"] != at["even"]
    for spacing, positions in at.items():
        accuracy = [trained["accuracy"][i] for i in positions]
        for change in correlation.CHANGES:
            x = [trained[change][i] for i in positions]
            assert tree[spacing]["pearson"][change] == pytest.approx(np.corrcoef(x, accuracy)[0, 1])
            ranks = [stats.rankdata(v) for v in (x, accuracy)]
            assert tree[spacing]["spearman"][change] == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_no_coefficient_without_a_change_or_enough_points() -> None:
    flat, up = [0.5] * 6, [1.0, 2, 3, 4, 5, 6]
    for kind in correlation.COEFFICIENTS:
        assert correlation.coefficient(kind, up, flat) is None
        assert correlation.coefficient(kind, flat, up) is None
        assert correlation.coefficient(kind, up[:4], up[:4]) is None
        assert correlation.coefficient(kind, up, up[::-1]) == pytest.approx(-1)
    said = correlation.over([0.5, None, 0.7])
    assert (said["mean"], said["values"], said["undefined"]) == (pytest.approx(0.6), [0.5, 0.7], 1)
    assert correlation.over([None])["mean"] is None


def test_matched_parts_end_at_the_common_level() -> None:
    def made(accuracy: list[float]) -> dict[str, Any]:
        return {"steps": list(range(1, 11)), "accuracy": accuracy, **{c: list(range(10)) for c in correlation.CHANGES}}

    slow = made([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.61, 0.62, 0.63, 0.645])
    fast = made([0.1, 0.3, 0.5, 0.6, 0.62, 0.7, 0.8, 0.9, 0.9, 0.9])
    assert correlation.common_level([slow, fast]) == 0.64
    assert (correlation.reached(slow, 0.64), correlation.reached(fast, 0.64)) == (10, 6)
    assert correlation.reached(slow, 0.7) is None
    assert correlation.common_level([]) is None
    until = correlation.of_run(fast, 6, 20)["even"]["pearson"]["logits"]
    assert until == pytest.approx(np.corrcoef(range(6), fast["accuracy"][:6])[0, 1])


# ---------------------------------------------------------------- the run


def test_an_interrupted_run_goes_on_where_it_was(
    data: twolayer.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = figure7.measure(data, PLAN, tmp_path / "whole", lambda _: None)
    train, calls = twolayer.train, []

    def dies(*arguments: Any) -> dict[str, Any]:
        calls.append(arguments[2:])
        if len(calls) == 5:
            raise KeyboardInterrupt
        return train(*arguments)

    monkeypatch.setattr(twolayer, "train", dies)
    with pytest.raises(KeyboardInterrupt):
        figure7.measure(data, PLAN, tmp_path / "cut", lambda _: None)
    assert len(list((tmp_path / "cut").iterdir())) == 4
    assert figure7.measure(data, PLAN, tmp_path / "cut", lambda _: None) == whole
    assert len(calls) == 5 + 2 * (1 + 3) - 4
    figure7.measure(replace(data, sha256="another"), PLAN, tmp_path / "cut", lambda _: None)
    assert len(calls) == 9 + 2 * (1 + 3)  # other data, other trainings


def test_a_training_that_is_not_finite_is_told_and_in_no_mean(data: twolayer.Data, tmp_path: Path) -> None:
    wild = Setting("wild", "first", rate=1e25)
    stopped = twolayer.train(data, PLAN, wild, 5, 3)
    assert 1 < stopped["stopped"] < 10
    assert all(math.isfinite(v) for m in twolayer.MEASURES for v in stopped[m])
    assert stopped["steps"] == list(range(1, len(stopped["steps"]) + 1))
    good = {w: {i: twolayer.train(data, PLAN, FIRST, w, i) for i in (3, 4, 5)} for w in PLAN.widths}
    without = {2: good[2], 5: {i: r for i, r in good[5].items() if i != 4}}
    spoilt = {2: good[2], 5: {**good[5], 4: stopped}}
    a, b = (correlation.summary(FIRST, PLAN, runs) for runs in (without, spoilt))
    assert b["widths"][1].pop("stopped") == [{"seed": 4, "step": stopped["stopped"]}]
    assert a["widths"][1].pop("stopped") == []
    assert a == b
    none = figure7.measure(data, replace(PLAN, settings=(wild,)), tmp_path / "kept", lambda _: None)
    page = written(none, tmp_path)
    assert "no verdict" in page.notes[0]
    assert "wild, width 2: left out, because the loss was not finite: seed 3 at step" in page.notes[1]
    assert {cell for row in page.tables[2].rows for cell in row[1:]} == {"–"}


def written(found: dict[str, Any], folder: Path, **more: Any) -> paper.Page:
    run = {"scale": "smoke", "seed": 3, "data_sha256": "0" * 64, "protocol": figure7.protocol(PLAN)}
    record = {"run": run, "command": "x", "data": "made up", "paper": figure7.PAPER, **found, **more}
    results.write(folder / figure7.RESULT, record)
    page: paper.Page = figure7.show(folder, "figure7")
    return page


@pytest.fixture(scope="module")
def found(data: twolayer.Data, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return figure7.measure(data, PLAN, tmp_path_factory.mktemp("kept"), lambda _: None)


def test_falls_are_seed_by_seed(found: dict[str, Any]) -> None:
    (s,) = found["settings"]
    narrow, wide = (w["correlations"]["whole"]["log"]["pearson"] for w in s["widths"])
    fall = s["falls"]["whole"]["log"]["pearson"]
    differ = np.subtract(narrow["parameters"]["values"], wide["parameters"]["values"])
    assert fall["parameters"]["values"] == pytest.approx(differ, abs=1e-5)
    half = stats.t.ppf(0.975, 2) * differ.std(ddof=1) / 3**0.5
    assert fall["parameters"]["interval95"] == pytest.approx([differ.mean() - half, differ.mean() + half], abs=1e-5)
    beyond = np.subtract(fall["parameters"]["values"], fall["logits"]["values"])
    assert fall["beyond the function"]["values"] == pytest.approx(beyond, abs=1e-5)


def test_pages(found: dict[str, Any], tmp_path: Path) -> None:
    page = written(found, tmp_path)
    saddle, reached, whole, matched = page.tables
    assert [row[2] for row in saddle.rows] == ["0", "0"]
    assert [row[0] for row in reached.rows] == ["2", "5"]
    assert [row[1] for row in reached.rows] == [str(2 * 26 + 3 * 2 + 3), str(5 * 26 + 3 * 5 + 3)]
    assert [len(t.rows) for t in (whole, matched)] == [4, 4]
    assert all(len(row) == len(t.headings) for t in page.tables for row in t.rows)
    assert len(page.views) == 3
    for view in page.views.values():
        assert go.Figure(view).data  # plotly refuses what it does not know
        axes = [v for k, v in view["layout"].items() if k[1:5] == "axis"]
        assert all(v["title"] for v in axes)
        drawn = {t["name"]: (t["line"]["dash"], t["marker"]["symbol"]) for t in view["data"] if "marker" in t}
        assert len(set(drawn.values())) == len(drawn) > 2
    curves = page.views["first, evenly spaced"]["data"]
    assert curves[0]["x"] == list(twolayer.spaced("even", 48, 8))
    values = found["settings"][0]["widths"][0]["curves"]["even"]["accuracy"]
    assert curves[0]["y"] == pytest.approx(np.mean(values, axis=0), abs=1e-5)
    assert all(
        up >= 0 <= down for up, down in zip(*(curves[0]["error_y"][k] for k in ("array", "arrayminus")), strict=True)
    )


def told(narrow: float, wide: float, logits: float, matched: float) -> dict[str, Any]:
    """A setting with these coefficients in every way of taking them, nearly the same in every seed."""
    near = lambda v: correlation.over([v - 0.01, v, v + 0.01])  # noqa: E731
    tree = lambda of: {s: dict.fromkeys(correlation.COEFFICIENTS, of) for s in correlation.SPACINGS}  # noqa: E731

    def width(w: int, r: float) -> dict[str, Any]:
        whole = tree({c: near(r) for c in correlation.CHANGES})
        return {"width": w, "steps_to_level": near(10 / w), "correlations": {"whole": whole, "matched": whole}}

    def falls(parameters: float, logits: float) -> Any:
        beyond = {"beyond the function": near(parameters - logits)}
        return tree({"parameters": near(parameters), "logits": near(logits), "kl": near(logits), **beyond})

    parts = {"whole": falls(narrow - wide, logits), "matched": falls(matched, 0)}
    return {"name": "s", "level": 0.9, "widths": [width(4, narrow), width(1000, wide)], "falls": parts}


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((0.95, 0.3, 0.0, 0.5), "the claim holds. Over 4 ways"),
        ((0.95, 0.85, 0.1, 0.0), "the claim holds in part. "),  # falls, but is still high
        ((0.95, 0.85, 0.1, 0.0), "it falls in 4, rises in 0. With logits in place of parameters it falls in 4"),
        ((0.95, 0.85, 0.1, 0.0), "more than the logits' in 0. Up to the same accuracy it falls in 0, rises in 0."),
        ((0.5, 0.1, 0.0, 0.0), "the claim holds in part. "),  # was not high to begin with
        ((0.95, 0.95, 0.0, 0.0), "the claim does not hold."),
        ((0.75, 0.75, 0.0, 0.0), "the claim is not decided."),  # no fall, and not high either
        ((0.9, 0.99, 0.0, -0.1), "it falls in 0, rises in 4."),
        ((0.9, 0.99, 0.0, -0.1), "falls in 0, rises in 4. Steps to 90% accuracy, by width: 2"),
    ],
)
def test_the_verdict_follows_the_numbers(numbers: tuple[float, float, float, float], said: str) -> None:
    s = told(*numbers)
    assert said in figure7.verdict(s, figure7.told_apart({"settings": [s]}))


def test_falls_are_corrected_over_all_of_one_change(found: dict[str, Any]) -> None:
    """Against SciPy's test of each fall, and Holm's steps written out; a setting more makes every p larger or equal."""
    (s,) = found["settings"]
    other = {**s, "name": "other"}
    p = correlation.corrected([s, other])
    ways = [(part, a, b) for part in correlation.PARTS for a, b in figure7.WAYS]
    values = [s["falls"][part][a][b]["parameters"]["values"] for part, a, b in ways]
    raw = [1.0 if not any(v) else float(stats.ttest_1samp(v, 0).pvalue) for v in values if len(v) > 1]
    assert len(raw) > 4
    expected, largest = {}, 0.0
    for k, one in enumerate(sorted(raw + raw)):
        expected[one] = largest = max(largest, min(1.0, (2 * len(raw) - k) * one))
    got = [v for key, v in p.items() if key[0] == s["name"] and key[-1] == "parameters"]
    assert got == pytest.approx([expected[one] for one in raw])
    alone = correlation.corrected([s])
    assert all(alone[key] <= p[key] for key in alone)


def test_what_no_correction_survives_is_not_counted() -> None:
    """Seeds that agree loosely: each fall is significant alone, and none of thirty-two is."""
    s = told(0.95, 0.85, 0.1, 0.1)
    loose = correlation.over([0.08, 0.1, 0.12])
    assert loose["interval95"][0] > 0
    for part in s["falls"].values():
        for ways in part.values():
            for kind in ways:
                ways[kind] = {**ways[kind], "parameters": loose}
    settings = [{**s, "name": name} for name in "abcd"]
    apart = figure7.told_apart({"settings": settings})
    assert not any(fall[-1] == "parameters" for fall in apart)
    assert "does not hold" in figure7.verdict(settings[0], apart)


def test_end_to_end(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABLAME_CACHE", str(tmp_path / "cache"))
    small = lambda seed: {"smoke": replace(PLAN, seed=seed, seeds=2)}  # noqa: E731
    monkeypatch.setattr(figure7, "plans", small)
    arguments = ("paper", "run", "figure7", "--mnist", write_digits(tmp_path / "digits"), "--out", tmp_path / "o")
    code, said, err = run(*arguments)
    assert code == 0, err
    text = (tmp_path / "o" / "figure7.json").read_text()
    record = json.loads(text, parse_constant=pytest.fail)
    assert record["run"]["protocol"]["seeds"] == [0, 1]
    assert {"machine", "threads", "versions", "paper", "saddle", "settings"} <= set(record)
    code, said, err = run(*arguments)
    assert "holds this run already" in " ".join(err.split())
    code, said, err = run("paper", "show", "figure7", "--out", tmp_path / "o")
    assert code == 0, err
    assert "Everything at zero" in said
    assert (tmp_path / "o" / "figure7.html").exists()


def test_the_plans_are_what_the_documentation_says() -> None:
    plans = figure7.plans(0)
    assert set(plans) == {"smoke", "cpu"}
    assert (plans["cpu"].widths, plans["cpu"].seeds, plans["cpu"].rows) == ((4, 25, 160, 1000), 5, 60_000)
    assert {s.start for s in plans["cpu"].settings} == {"first", "second", "biases"}
    assert len(plans["smoke"].settings) == 1
