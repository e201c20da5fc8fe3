"""Table 5's linear layer: its gradients, curvature and leave-one-out, and what is measured on it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr, t

import oracles
from datablame.errors import UserError
from datablame.paper import linear, mnist, softmax, table5
from paper_cases import PLAN, SETTINGS, measured

__all__ = ["measured"]  # a fixture


@pytest.fixture(scope="module")
def problem(digits: mnist.Images) -> linear.Problem:
    return linear.problem(digits, SETTINGS[0], PLAN, seed=3)


# ---------------------------------------------------------------- the layer


def loss_of(flat: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(x @ flat.view(10, -1).T, y)


def dense_hessian(p: linear.Problem) -> torch.Tensor:
    return torch.autograd.functional.hessian(lambda w: loss_of(w, *p.train), p.w.flatten())


def test_the_layer_is_at_the_minimum(problem: linear.Problem) -> None:
    w = problem.w.clone().requires_grad_(True)
    (loss_of(w.flatten(), *problem.train) + PLAN.decay / 2 * w.square().sum()).backward()
    assert w.grad is not None
    assert float(w.grad.norm()) < 2 * softmax.TOLERANCE
    assert float(softmax.losses(problem.w, *problem.train).mean()) < 0.5 * math.log(10)


def test_a_fit_that_does_not_converge_is_an_error(problem: linear.Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax, "TOLERANCE", 1e-40)
    with pytest.raises(UserError, match="did not converge on 8 points"):
        softmax.fit(*problem.train, 10, PLAN.decay)


def test_gradients_are_those_of_autograd(problem: linear.Problem) -> None:
    for (x, y), g in ((problem.train, problem.g), (problem.query, problem.v)):
        for i in range(len(x)):
            w = problem.w.flatten().clone().requires_grad_(True)
            (expected,) = torch.autograd.grad(loss_of(w, x[i : i + 1], y[i : i + 1]), w)
            torch.testing.assert_close(g["linear"][i], expected)


@pytest.mark.parametrize("points", [3, 8, 30])
def test_scores_by_the_true_hessian_are_those_of_the_dense_one(digits: mnist.Images, points: int) -> None:
    """Fewer and more points than the 17 inputs, ridges from next to nothing to large."""
    p = linear.problem(digits, replace(SETTINGS[0], points=points), PLAN, seed=1)
    h = dense_hessian(p)
    torch.testing.assert_close(torch.tensor(softmax.hessian_trace(p.w, p.train[0])), h.trace(), check_dtype=False)
    ridges = [1e-6, 1e-3, 1.0]
    for ridge, scores in zip(ridges, softmax.hessian_scores(p.w, p.train, p.query, ridges), strict=True):
        inverse = torch.linalg.inv(h + ridge * torch.eye(len(h)))
        assert oracles.relative_error(scores, p.v["linear"] @ inverse @ p.g["linear"].T) < 1e-7


def test_the_exact_method_is_the_dense_empirical_fisher(problem: linear.Problem) -> None:
    g, v = problem.g["linear"], problem.v["linear"]
    expected = v @ oracles.dense_operator(g, PLAN.damping) @ g.T
    ours = linear.registry.parse("exact:damping=0.1").fit(problem.g).score(problem.v)
    assert oracles.relative_error(ours, expected) < 1e-8
    assert oracles.relative_error(softmax.dense_scores(g, v, PLAN.damping), expected) < 1e-8


def test_leaving_out_is_fitting_without(problem: linear.Problem) -> None:
    """Against an optimiser of another kind: Newton's method on the dense Hessian, all inputs."""
    left_out = softmax.left_out(problem.w, problem.train, problem.query, PLAN.decay, rows=3)
    x, y = problem.train
    before = softmax.losses(problem.w, *problem.query)
    for i in range(3):
        kept = torch.arange(len(x)) != i

        def objective(w: torch.Tensor, kept: torch.Tensor = kept) -> torch.Tensor:
            return loss_of(w, x[kept], y[kept]) * kept.sum() / len(x) + PLAN.decay / 2 * w.square().sum()

        w = problem.w.flatten()
        for _ in range(30):
            gradient = torch.autograd.functional.jacobian(objective, w)
            w = w - torch.linalg.solve(torch.autograd.functional.hessian(objective, w), gradient)
        expected = len(x) * (softmax.losses(w.view(10, -1), *problem.query) - before)
        torch.testing.assert_close(left_out[:, i], expected, rtol=1e-3, atol=1e-4)


def test_the_objectives_hessian_predicts_leaving_out(digits: mnist.Images) -> None:
    """First order is good where one point of many is left out, and the damped Fisher matrix is no substitute."""
    setting = linear.Setting(300, 8, refits=10)
    p = linear.problem(digits, setting, PLAN, seed=0)
    others = linear.references(p, setting, PLAN)
    fisher = linear.registry.parse("exact:damping=0.1").fit(p.g).score(p.v).numpy()
    objective = linear.compared(others["objective"], others["left out"])
    assert objective["scaled"] < 0.2
    assert objective["spearman"] > 0.95
    assert linear.compared(fisher, others["left out"])["scaled"] > 2 * objective["scaled"]


def test_enlarging_adds_weights_and_nothing_else(digits: mnist.Images) -> None:
    small, large = linear.inputs(digits.train[:20], 8), linear.inputs(digits.train[:20], 80)
    assert (small.shape, large.shape) == ((20, 65), (20, 6401))
    torch.testing.assert_close(small[:, -1], torch.ones(20, dtype=torch.float64))
    pixels = (digits.train[:20].reshape(20, -1) / 255 - 0.1307) / 0.3081 / 8
    np.testing.assert_allclose(small[:, :-1], pixels)
    ratio = large.square().sum(1) / small.square().sum(1)
    assert 0.7 < float(ratio.min()) <= float(ratio.max()) < 1.1


# ---------------------------------------------------------------- the measurement


def test_errors_are_those_of_the_formulas(digits: mnist.Images, measured: list[dict[str, Any]]) -> None:
    for setting, record in zip(SETTINGS, measured, strict=True):
        raw, scaled, rho = [], [], []
        for seed in (3, 4, 5):
            p = linear.problem(digits, setting, PLAN, seed)
            g, v = p.g["linear"], p.v["linear"]
            e = (v @ oracles.dense_operator(g, 0.1) @ g.T).numpy()
            s = (v @ oracles.lissa_operator(g, 0.1, 5) @ g.T).numpy()
            raw.append(np.linalg.norm(s - e) / np.linalg.norm(e))
            a = np.linalg.lstsq(s.reshape(-1, 1), e.ravel(), rcond=None)[0][0]
            scaled.append(np.linalg.norm(a * s - e) / np.linalg.norm(e))
            rho.append(np.mean([spearmanr(x, y).statistic for x, y in zip(s, e, strict=True)]))
        lissa = record["methods"]["lissa:steps=5"]["errors"]["fisher"]
        for kind, values in (("raw", raw), ("scaled", scaled), ("spearman", rho)):
            assert lissa[kind]["values"] == pytest.approx(values, rel=1e-5)
            assert lissa[kind]["mean"] == pytest.approx(np.mean(values), rel=1e-5)
        low, high = t.interval(0.95, 2, np.mean(raw), np.std(raw, ddof=1) / math.sqrt(3))
        assert lissa["raw"]["interval95"] == pytest.approx([low, high], rel=1e-4)


def test_what_is_measured(measured: list[dict[str, Any]]) -> None:
    for record in measured:
        methods = record["methods"]
        assert set(methods) == {"fisher", *linear.METHODS, "hessian", "objective", "random"}
        assert methods["lissa:steps=inf"]["errors"]["fisher"]["raw"]["mean"] < 1e-8
        assert methods["random"]["errors"]["fisher"]["scaled"]["mean"] > 0.9
        assert methods["random"]["errors"]["fisher"]["raw"] is None
        residuals = [methods[f"lissa:steps={k}"]["residual"]["mean"] for k in (1, 5, 10, "inf")]
        assert residuals == sorted(residuals, reverse=True)
        assert set(methods["fisher"]["errors"]) == {"hessian", "objective", "left out"}
        assert all(len(methods[m]["seconds_all"]) == 2 for m in ("fisher", *linear.METHODS))
        assert record["parameters"] == 10 * (record["side"] ** 2 + 1)
    assert measured[0]["dense_difference"] < 1e-10
    assert measured[1]["dense_seconds"] is None


def test_too_few_images(digits: mnist.Images) -> None:
    for few in (replace(PLAN, settings=(linear.Setting(1501, 4),)), replace(PLAN, queries=298)):
        with pytest.raises(UserError, match="1500 training and 297 test images"):
            linear.measure(digits, few, lambda _: None)


def without_times(x: Any) -> Any:
    if isinstance(x, dict):
        return {k: without_times(v) for k, v in x.items() if "seconds" not in k}
    return [without_times(v) for v in x] if isinstance(x, list) else x


def test_the_same_plan_gives_the_same_numbers(digits: mnist.Images, measured: list[dict[str, Any]]) -> None:
    assert without_times(linear.measure(digits, PLAN, lambda _: None)) == without_times(measured)
    other = linear.measure(digits, replace(PLAN, seed=9, settings=SETTINGS[:1]), lambda _: None)
    assert without_times(other[0]) != without_times(measured[0])


def test_the_gigabytes_that_the_issue_is_about() -> None:
    assert table5.dense_note(
        {
            "points": 10,
            "parameters": 100_010,
            "dense_gigabytes": {"float32": 4 * 100_010**2 / 1e9, "float64": 8 * 100_010**2 / 1e9},
            "dense_seconds": None,
            "methods": {"fisher": {"seconds": 0.1}},
        }
    ).startswith("10 points, 100,010 parameters: the d × d route was not run; its matrix is 40 GB in float32, 80 GB")
