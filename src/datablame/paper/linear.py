"""The measurement behind Table 5 and Figure 3: one linear layer on a few images, where every reference can be had.

Methods see the gradients `{"linear": [n, D]}` as they see those of any model. Their scores `[m, n]` are compared with

    fisher      `V (GᵀG/n + λI)⁻¹ Gᵀ`, the damped empirical Fisher matrix: what the paper calls accurate (`exact`)
    hessian     `V (H + λ_H I)⁻¹ Gᵀ`, the true Hessian of the loss with the same convention of damping, λ_H relative to
                H's own mean eigenvalue: nothing but Fisher for Hessian is exchanged
    objective   `V (H + decay I)⁻¹ Gᵀ`, the Hessian of what was minimised; it needs no damping
    left out    n × the rise of the query's loss after fitting again without the row: no approximation at all
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import reduce
from operator import getitem
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from datablame import methods as registry
from datablame.comparing import relative_errors
from datablame.diagnostics import rank_correlation
from datablame.errors import UserError
from datablame.methods.gram import gram
from datablame.paper import softmax
from datablame.paper.results import interval

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8
    from torch import Tensor

    from datablame.paper.mnist import Images

    Rows = tuple[Float[Tensor, "n d"], Int[Tensor, " n"]]
    Features = dict[str, Float[Tensor, "n D"]]

MEAN, STD = 0.1307, 0.3081
"""Of MNIST's training pixels, white = 1."""
DAMPING = 0.1
"""λ over the mean eigenvalue: the paper's λ, the mean of g² over 10."""
DECAY = 1e-3
METHODS = (
    "datainf",
    "lissa:steps=1",
    "lissa:steps=5",
    "lissa:steps=10",
    "lissa:steps=inf",
    "graddot",
    "gradcos",
)
REFERENCES = ("fisher", "hessian", "objective", "left out")


@dataclass(frozen=True)
class Setting:
    """One column of the experiment.

    points: training points; side: of the images in pixels, so that the layer has classes × (side² + 1) weights.
    dense: whether the `[D, D]` route is timed. refits: rows that are left out in turn. rounds: of timing.
    """

    points: int
    side: int
    dense: bool = False
    refits: int = 50
    rounds: int = 5


@dataclass(frozen=True)
class Plan:
    """subsets: random draws of points, with seeds `seed`, `seed + 1`, …; queries: held-out images of each."""

    settings: tuple[Setting, ...]
    seed: int = 0
    subsets: int = 5
    queries: int = 100
    damping: float = DAMPING
    decay: float = DECAY


@dataclass(frozen=True)
class Problem:
    """A fitted layer: training points, queries, weights `[C, d]`, and the gradients of both."""

    train: Rows
    query: Rows
    w: Float[Tensor, "C d"]
    g: Features
    v: Features


def measure(images: Images, plan: Plan, note: Callable[[str], None]) -> list[dict[str, Any]]:
    """One record for each setting: times, errors with intervals over subsets, residuals, spectrum.

    Raises UserError when there are fewer images than points or queries.
    """
    most = max(s.points for s in plan.settings)
    if len(images.train) < most or len(images.test) < plan.queries:
        raise UserError(
            f"{images.name}: {len(images.train)} training and {len(images.test)} test images; "
            f"{most} and {plan.queries} are needed."
        )
    return [_measure_setting(images, plan, setting, note) for setting in plan.settings]


def inputs(images: UInt8[np.ndarray, "n a b"], side: int) -> Float[Tensor, "n d"]:
    """Images of `side × side` pixels (bilinear) in float64, standardised, over √pixels; d = side² + 1, the last is 1.

    A row's length does not depend on `side`: more pixels are more weights and nothing else.
    """
    x = torch.from_numpy(np.array(images))[:, None].double() / 255
    x = torch.nn.functional.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)
    x = (x.flatten(1) - MEAN) / STD / side
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)


def problem(images: Images, setting: Setting, plan: Plan, seed: int) -> Problem:
    """The subset of this seed (smaller ones are the beginnings of larger ones), and the layer fitted to it."""
    rng = np.random.default_rng(seed)
    i = rng.permutation(len(images.train))[: setting.points]
    j = rng.permutation(len(images.test))[: plan.queries]
    train = inputs(images.train[i], setting.side), torch.from_numpy(images.train_labels[i])
    query = inputs(images.test[j], setting.side), torch.from_numpy(images.test_labels[j])
    w = softmax.fit(*train, int(images.train_labels.max()) + 1, plan.decay)
    return Problem(train, query, w, softmax.gradients(w, *train), softmax.gradients(w, *query))


def references(p: Problem, setting: Setting, plan: Plan) -> dict[str, Float[np.ndarray, "m n"]]:
    """Every reference but `fisher`; `left out` has the first `refits` columns only."""
    weights = p.w.numel()
    damped = plan.damping * softmax.hessian_trace(p.w, p.train[0]) / weights
    hessian, objective = softmax.hessian_scores(p.w, p.train, p.query, [damped, plan.decay])
    rows = min(setting.refits, len(p.train[0]))
    left_out = softmax.left_out(p.w, p.train, p.query, plan.decay, rows)
    return {"hessian": hessian.numpy(), "objective": objective.numpy(), "left out": left_out.numpy()}


def compared(s: Float[np.ndarray, "m n"], e: Float[np.ndarray, "m k"]) -> dict[str, float]:
    """Relative errors, raw and after the best factor, and Spearman's correlation, over the columns that `e` has."""
    s = s[:, : e.shape[1]]
    raw, scaled = relative_errors(s, e)
    assert raw is not None  # a fitted layer's influence is not 0
    assert scaled is not None
    return {"raw": raw, "scaled": scaled, "spearman": rank_correlation(s, e)}


# ---------------------------------------------------------------- one setting


def _measure_setting(images: Images, plan: Plan, setting: Setting, note: Callable[[str], None]) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    times: dict[str, list[float]] = {}
    dense: dict[str, Any] = {}
    for k in range(plan.subsets):
        note(f"{setting.points} points, {setting.side} × {setting.side} pixels: subset {k + 1} of {plan.subsets}")
        p = problem(images, setting, plan, plan.seed + k)
        if not k:
            times = _times(p, plan, setting.rounds)
            dense = _dense(p, plan, setting)
        rows.append(_subset(p, setting, plan, plan.seed + k))
    methods = {
        name: {
            "seconds": float(np.median(times[name])) if name in times else None,
            "seconds_all": times.get(name),
            "residual": _over(rows, "residual", name) if name in rows[0]["residual"] else None,
            "errors": {
                reference: {kind: _over(rows, "errors", name, reference, kind) for kind in kinds}
                for reference, kinds in references.items()
            },
        }
        for name, references in rows[0]["errors"].items()
    }
    layer = {name: _over(rows, "facts", name) for name in rows[0]["facts"]}
    return {**asdict(setting), "parameters": int(p.w.numel()), "layer": layer, **dense, "methods": methods}


def _over(rows: list[dict[str, Any]], *keys: str) -> dict[str, Any] | None:
    """The interval over subsets of the number at `keys`; None where there is no such number."""
    values: list[Any] = [reduce(getitem, keys, row) for row in rows]
    return None if None in values else interval(values)


def _specs(plan: Plan) -> dict[str, str]:
    """`{name: spelling}` of every method that is timed; `fisher` is the project's exact solution."""
    damped = {m: f"{m}{',' if ':' in m else ':'}damping={plan.damping}" for m in METHODS if not m.startswith("grad")}
    return {"fisher": f"exact:damping={plan.damping}", **{m: damped.get(m, m) for m in METHODS}}


def _times(p: Problem, plan: Plan, rounds: int) -> dict[str, list[float]]:
    """Seconds of fit and scores, the methods taking turns; a round before the first is not counted."""
    out: dict[str, list[float]] = {name: [] for name in _specs(plan)}
    for counted in range(rounds + 1):
        for name, spec in _specs(plan).items():
            start = time.perf_counter()
            registry.parse(spec).fit(p.g).score(p.v)
            if counted:
                out[name].append(round(time.perf_counter() - start, 6))
    return out


def _dense(p: Problem, plan: Plan, setting: Setting) -> dict[str, Any]:
    """The `[D, D]` route: its size, and where it is run its time and how far our exact solution is from it."""
    size = {"dense_gigabytes": {"float32": 4 * p.w.numel() ** 2 / 1e9, "float64": 8 * p.w.numel() ** 2 / 1e9}}
    if not setting.dense:
        return {**size, "dense_seconds": None, "dense_difference": None}
    start = time.perf_counter()
    dense = softmax.dense_scores(p.g["linear"], p.v["linear"], plan.damping)
    seconds = time.perf_counter() - start
    ours = registry.parse(_specs(plan)["fisher"]).fit(p.g).score(p.v)
    return {**size, "dense_seconds": seconds, "dense_difference": float((ours - dense).norm() / dense.norm())}


def _subset(p: Problem, setting: Setting, plan: Plan, seed: int) -> dict[str, Any]:
    """Errors of every method, reference and the control on one subset; residuals; facts of the layer."""
    scores: dict[str, np.ndarray] = {}
    residual = {}
    for name, spec in _specs(plan).items():
        method: Any = registry.parse(spec)
        scores[name] = method.fit(p.g).score(p.v).numpy()
        if hasattr(method, "residual"):
            residual[name] = float(method.residual[plan.damping].median())
    others = references(p, setting, plan)
    fisher = {"fisher": scores["fisher"], **others}
    scores |= {"hessian": others["hessian"], "objective": others["objective"]}
    noise = registry.create("random", seed=seed).fit([None] * len(p.train[0])).score([None] * len(p.query[0]))
    scores["random"] = (noise - 0.5).double().numpy()
    errors = {
        name: {reference: compared(s, e) for reference, e in fisher.items() if reference != name}
        for name, s in scores.items()
    }
    for per_reference in errors["random"].values():
        per_reference["raw"] = None  # type: ignore[assignment]  # noise has no scale
    return {"errors": errors, "residual": residual, "facts": _facts(p, plan)}


def _facts(p: Problem, plan: Plan) -> dict[str, float]:
    """The layer's losses and accuracy; the share of the largest eigenvalue of GGᵀ, and the condition number of H."""
    values = torch.linalg.eigvalsh(gram(p.g["linear"]))
    mean = float(p.g["linear"].square().mean())
    largest = float(values[-1]) / len(values)
    (xq, yq) = p.query
    right = softmax.probabilities(p.w, xq).argmax(1) == yq
    return {
        "training_loss": float(softmax.losses(p.w, *p.train).mean()),
        "query_loss": float(softmax.losses(p.w, xq, yq).mean()),
        "query_accuracy": float(right.double().mean()),
        "largest_share": float(values[-1] / values.sum()),
        "condition": (largest + plan.damping * mean) / (plan.damping * mean),
    }
