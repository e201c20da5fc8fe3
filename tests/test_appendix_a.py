"""The paper's Appendix A, numerically: the derivative of the up-weighted minimum, strictly convex, in float64.

    θ_{ε,k} = argmin R(θ) + ε L(z_k, θ),    R = (1/N) Σ_i L(z_i, θ) + decay/2 ‖θ‖²           (A.1; the ridge is ours)
    dθ_{ε,k}/dε at 0 = −H⁻¹ ∇L(z_k, θ*),    H = ∇²R(θ*)                                            (A.5)
    dL(z_test, θ_{ε,k})/dε at 0 = −∇L(z_test, θ*)ᵀ H⁻¹ ∇L(z_k, θ*)                                 (Eq. 3)

Difference quotients of minima that were really found again are held against the right-hand sides: the one-sided one is
off by O(ε), the central one by O(ε²). Newton's steps in this file, derivatives by autograd; no code of the package
until the sign.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from scipy.stats import linregress
from torch import Tensor

from datablame.methods import parse
from datablame.paper import softmax

CLASSES, INPUTS, DECAY = 3, 4, 0.05
EPSILONS = (1e-2, 5e-3, 2e-3, 1e-3, 5e-4)
ROWS = (0, 3, 11)


@functools.cache
def rows(n: int) -> tuple[Tensor, Tensor]:
    """The first n of one stream of rows, a constant among the inputs."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2000, INPUTS, generator=generator, dtype=torch.float64)
    x[:, -1] = 1
    true = torch.randn(INPUTS, CLASSES, generator=generator, dtype=torch.float64)
    noise = torch.randn(2000, CLASSES, generator=generator, dtype=torch.float64)
    return x[:n], (x @ true + noise).argmax(1)[:n]


def loss(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Of each row."""
    return torch.nn.functional.cross_entropy(x @ theta.view(CLASSES, -1).T, y, reduction="none")


def gradient(f: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    theta = theta.clone().requires_grad_(True)
    (g,) = torch.autograd.grad(f(theta), theta)
    return g


def minimum(f: Callable[[Tensor], Tensor], start: Tensor | None = None) -> Tensor:
    """Newton's steps until the gradient is shorter than 1e-13, and one more."""
    theta = torch.zeros(CLASSES * INPUTS, dtype=torch.float64) if start is None else start
    done = False
    for _ in range(50):
        g = gradient(f, theta)
        theta = theta - torch.linalg.solve(torch.autograd.functional.hessian(f, theta), g)
        if done:
            return theta
        done = float(g.norm()) < 1e-13
    raise AssertionError("Newton's steps do not end")


def risk(x: Tensor, y: Tensor, n: int) -> Callable[[Tensor], Tensor]:
    """R over these rows, their sum divided by n."""
    return lambda theta: loss(theta, x, y).sum() / n + DECAY / 2 * theta.square().sum()


@functools.cache
def fitted(n: int = 40) -> tuple[Tensor, Tensor]:
    """θ* and H on the first n rows."""
    theta = minimum(risk(*rows(n), n))
    hessian = torch.autograd.functional.hessian(risk(*rows(n), n), theta)
    assert float(torch.linalg.eigvalsh(hessian)[0]) >= DECAY * (1 - 1e-9)  # strictly convex
    return theta, hessian


@functools.cache
def moved(k: int, epsilon: float, n: int = 40) -> Tensor:
    """θ_{ε,k}, found again."""
    x, y = rows(n)
    up = lambda theta: risk(x, y, n)(theta) + epsilon * loss(theta, x[k : k + 1], y[k : k + 1])[0]  # noqa: E731
    return minimum(up, fitted(n)[0])


def influence(k: int, n: int = 40) -> Tensor:
    """−H⁻¹ ∇L(z_k, θ*)."""
    x, y = rows(n)
    theta, hessian = fitted(n)
    return -torch.linalg.solve(hessian, gradient(lambda t: loss(t, x[k : k + 1], y[k : k + 1])[0], theta))


def quotients(k: int, of: Callable[[Tensor], Tensor], central: bool) -> list[Tensor]:
    """(f(θ_ε) − f(θ*))/ε, or (f(θ_ε) − f(θ_−ε))/(2ε), for each ε."""
    theta = fitted()[0]
    if central:
        return [(of(moved(k, e)) - of(moved(k, -e))) / (2 * e) for e in EPSILONS]
    return [(of(moved(k, e)) - of(theta)) / e for e in EPSILONS]


def slope(errors: list[float], x: tuple[float, ...] = EPSILONS) -> float:
    """Of log error over log x."""
    return float(linregress(torch.tensor(x).log(), torch.tensor(errors).log()).slope)


def query() -> tuple[Tensor, Tensor]:
    """A row that no fit has seen."""
    x, y = rows(2000)
    return x[-1:], y[-1:]


ORDERS = pytest.mark.parametrize(("central", "order"), [(False, 1), (True, 2)])


@ORDERS
@pytest.mark.parametrize("k", ROWS)
def test_the_parameters_move_as_a5_says_to_the_expected_order(k: int, central: bool, order: int) -> None:
    expected = influence(k)
    errors = [float((q - expected).norm() / expected.norm()) for q in quotients(k, lambda t: t, central)]
    assert errors[-1] < (0.01 if order == 1 else 1e-5)
    assert slope(errors) == pytest.approx(order, abs=0.1)


@ORDERS
@pytest.mark.parametrize("k", ROWS)
def test_the_loss_of_a_test_row_moves_as_equation_3_says(k: int, central: bool, order: int) -> None:
    v = gradient(lambda t: loss(t, *query())[0], fitted()[0])
    expected = float(v @ influence(k))
    errors = [abs(float(q) - expected) for q in quotients(k, lambda t: loss(t, *query())[0], central)]
    assert errors[-1] < 0.02 * abs(expected)
    assert slope(errors) == pytest.approx(order, abs=0.1)


def test_a_wrong_formula_would_be_noticed() -> None:
    """Damping that is not the objective's, or the empirical Fisher matrix: the difference does not go away with ε."""
    x, y = rows(40)
    theta, hessian = fitted()
    g = torch.stack([gradient(lambda t, i=i: loss(t, x[i : i + 1], y[i : i + 1])[0], theta) for i in range(40)])
    eye = torch.eye(len(theta), dtype=torch.float64)
    for wrong in (hessian + 0.02 * eye, g.T @ g / 40 + DECAY * eye):
        expected = -torch.linalg.solve(wrong, g[3])
        errors = [float((q - expected).norm() / expected.norm()) for q in quotients(3, lambda t: t, central=True)]
        assert errors[-1] > 0.05
        assert abs(slope(errors)) < 0.1


@pytest.mark.parametrize("k", ROWS)
def test_epsilon_is_a_weight_beside_a_sum_over_n(k: int) -> None:
    """A row's own weight is 1/N: ε = −1/N leaves it out, ε = 1/N has it twice, N stays what it was."""
    x, y = rows(40)
    kept = torch.arange(40) != k
    close = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-12)
    close(moved(k, -1 / 40), minimum(risk(x[kept], y[kept], 40)))
    twice = torch.cat([torch.arange(40), torch.tensor([k])])
    close(moved(k, 1 / 40), minimum(risk(x[twice], y[twice], 40)))
    # Beside a plain sum, the derivative is N times smaller: the 1/N is in A.5, through H.
    one = lambda t: loss(t, x[k : k + 1], y[k : k + 1])[0]  # noqa: E731
    up, down = [minimum(lambda t, e=e: 40 * risk(x, y, 40)(t) + e * one(t)) for e in (0.01, -0.01)]
    torch.testing.assert_close((up - down) / 0.02, influence(k) / 40, rtol=1e-3, atol=1e-7)


def test_leaving_out_is_epsilon_of_minus_one_over_n_and_better_predicted_the_larger_n() -> None:
    """N (θ without the row − θ*) against −dθ/dε: off by O(1/N)."""
    sizes = (50, 100, 200, 400, 800)
    errors = []
    for n in sizes:
        theta = fitted(n)[0]
        found = [(n * (moved(k, -1 / n, n) - theta) + influence(k, n)).norm() / influence(k, n).norm() for k in ROWS]
        errors.append(float(torch.stack(found).mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02
    assert slope(errors, tuple(map(float, sizes))) == pytest.approx(-1, abs=0.2)


def test_the_sign_of_the_package_is_the_other_one() -> None:
    """Equation 3 is negative for a row that helps. Scores are −Eq. 3: higher = more responsible, and leaving it out
    raises the query's loss."""
    x, y = rows(40)
    theta, _ = fitted()
    (xq, yq), w = query(), theta.view(CLASSES, -1)
    v = gradient(lambda t: loss(t, xq, yq)[0], theta)
    equation3 = torch.stack([v @ influence(k) for k in range(40)])
    (scores,) = softmax.hessian_scores(w, (x, y), (xq, yq), [DECAY])
    torch.testing.assert_close(scores[0], -equation3, rtol=1e-9, atol=1e-12)
    rises = torch.stack([loss(moved(k, -1 / 40), xq, yq)[0] for k in range(40)]) - loss(theta, xq, yq)[0]
    helpful, harmful = int(scores[0].argmax()), int(scores[0].argmin())
    assert equation3[helpful] < 0 < rises[helpful]
    assert equation3[harmful] > 0 > rises[harmful]
    assert torch.corrcoef(torch.stack([scores[0], rises]))[0, 1] > 0.95


def test_exact_has_that_sign() -> None:
    """A copy of the query among the rows, and one with a wrong label: `exact` on plain gradients, and fitting again."""
    (x, y), (xq, yq) = rows(40), query()
    x, y = torch.cat([x, xq, xq]), torch.cat([y, yq, (yq + 1) % CLASSES])
    n = len(x)
    theta = minimum(risk(x, y, n))
    w = theta.view(CLASSES, -1)
    g, v = softmax.gradients(w, x, y), softmax.gradients(w, xq, yq)
    scores = torch.as_tensor(parse("exact").fit(g).score(v))[0]
    without = [minimum(risk(x[torch.arange(n) != k], y[torch.arange(n) != k], n), theta) for k in (n - 2, n - 1)]
    rises = torch.stack([loss(t, xq, yq)[0] for t in without]) - loss(theta, xq, yq)[0]
    assert rises[0] > 0 > rises[1]
    assert int(scores.argmax()) == n - 2
    assert int(scores.argmin()) == n - 1
    assert scores[n - 2] > 0 > scores[n - 1]
