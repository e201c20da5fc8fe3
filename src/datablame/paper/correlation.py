"""How the accuracy along a training goes with the change of the parameters, and with that of the function.

A correlation is taken over points of one training, so it depends on which. Two spacings, log and even, of two parts:

    whole     the same steps for every width, from the first to the last
    matched   each training up to where its test accuracy first reaches the level that all trainings reach
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from datablame.evaluation.intervals import holm
from datablame.paper.results import interval
from datablame.paper.twolayer import MEASURES, Plan, Setting, spaced

SPACINGS = ("log", "even")
COEFFICIENTS = ("pearson", "spearman")
CHANGES = ("parameters", "logits", "kl")
PARTS = ("whole", "matched")
FEWEST = 5
"""Points below which no correlation is taken."""

Run = Mapping[str, Any]
Tree = dict[str, dict[str, dict[str, Any]]]
"""spacing -> coefficient -> change -> what."""


def coefficient(kind: str, x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's or Spearman's; None for fewer than FEWEST points and where either does not change."""
    from scipy import stats

    if len(x) < FEWEST or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    r = float((stats.pearsonr if kind == "pearson" else stats.spearmanr)(x, y).statistic)
    return r if math.isfinite(r) else None


def points(run: Run, spacing: str, last: int, wanted: int) -> list[int]:
    """Positions in a training's `steps`, nearest to the spaced ones up to `last`, each once."""
    steps = np.array(run["steps"])
    return sorted({int(np.abs(steps - s).argmin()) for s in spaced(spacing, last, wanted)})


def reached(run: Run, level: float) -> int | None:
    """The first measured step with a test accuracy of `level` or more; None where there is none."""
    return next((s for s, a in zip(run["steps"], run["accuracy"], strict=True) if a >= level), None)


def common_level(runs: Sequence[Run]) -> float | None:
    """The highest whole percent of test accuracy that all of them reach; None without runs."""
    return math.floor(100 * min(max(r["accuracy"]) for r in runs) + 1e-9) / 100 if runs else None


def of_run(run: Run, last: int | None, wanted: int) -> Tree:
    """Correlations of the accuracy with each of CHANGES over the steps up to `last`; all None without one."""
    out: Tree = {}
    for spacing in SPACINGS:
        at = [] if last is None else points(run, spacing, last, wanted)
        accuracy = [run["accuracy"][i] for i in at]
        out[spacing] = {
            kind: {c: coefficient(kind, [run[c][i] for i in at], accuracy) for c in CHANGES} for kind in COEFFICIENTS
        }
    return out


def over(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean and 95 % interval over the seeds that have a value; undefined: how many have none."""
    known = [v for v in values if v is not None]
    found = interval(known) if known else {"mean": None, "interval95": None, "values": []}
    return {**found, "undefined": len(values) - len(known)}


def _over_seeds(trees: Sequence[Tree]) -> Tree:
    return {s: {k: {c: over([t[s][k][c] for t in trees]) for c in CHANGES} for k in COEFFICIENTS} for s in SPACINGS}


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _falls(narrow: Mapping[int, Tree], wide: Mapping[int, Tree]) -> Tree:
    """The narrowest's coefficient minus the widest's, by seed; function: the parameters' fall minus the logits'."""
    out: Tree = {}
    for s in SPACINGS:
        out[s] = {}
        for k in COEFFICIENTS:
            falls = {c: [_minus(narrow[i][s][k][c], wide[i][s][k][c]) for i in narrow if i in wide] for c in CHANGES}
            beyond = [_minus(p, f) for p, f in zip(falls["parameters"], falls["logits"], strict=True)]
            out[s][k] = {**{c: over(v) for c, v in falls.items()}, "beyond the function": over(beyond)}
    return out


FALLING = (*CHANGES, "beyond the function")
"""What falls from the narrowest to the widest."""
Fall = tuple[str, str, str, str, str]
"""(setting, part, spacing, coefficient, one of FALLING)."""


def corrected(settings: Sequence[Mapping[str, Any]]) -> dict[Fall, float]:
    """p of every fall of the settings' summaries that has two values or more, not all the same, which have no t.

    Student's t over seeds, two-sided, after Holm's correction over all falls of the same change, whatever the setting,
    the part, the spacing and the coefficient.
    """
    out: dict[Fall, float] = {}
    for change in FALLING:
        found = {
            (s["name"], part, spacing, kind, change): s["falls"][part][spacing][kind][change]["values"]
            for s in settings
            for part in PARTS
            for spacing in SPACINGS
            for kind in COEFFICIENTS
        }
        p = {key: _p(values) for key, values in found.items() if len(values) > 1 and np.ptp(values) > 0}
        out |= dict(zip(p, holm(np.array(list(p.values()))).tolist(), strict=True))
    return out


def _p(values: Sequence[float]) -> float:
    """Of Student's t against 0."""
    from scipy import stats

    return float(stats.ttest_1samp(values, 0.0).pvalue)


def summary(setting: Setting, plan: Plan, runs: Mapping[int, Mapping[int, Run]]) -> dict[str, Any]:
    """What the result says of one setting. runs: width -> seed -> training.

    Trainings that stopped are named, and in no mean, curve or correlation.
    """
    whole = {w: {i: r for i, r in of.items() if r["stopped"] is None} for w, of in runs.items()}
    level = common_level([r for of in whole.values() for r in of.values()])
    lasts: dict[str, dict[int, Mapping[int, int | None]]] = {
        "whole": {w: dict.fromkeys(of, plan.steps) for w, of in whole.items()},
        "matched": {
            w: {i: None if level is None else reached(r, level) for i, r in of.items()} for w, of in whole.items()
        },
    }
    trees = {
        part: {w: {i: of_run(r, lasts[part][w][i], plan.points) for i, r in of.items()} for w, of in whole.items()}
        for part in PARTS
    }
    narrow, wide = min(plan.widths), max(plan.widths)
    return {
        "name": setting.name,
        "start": setting.start,
        "optimizer": setting.optimizer,
        "rate": setting.rate,
        "level": level,
        "widths": [
            {
                **_of_width(w, runs[w], whole[w], plan),
                "steps_to_level": over(list(lasts["matched"][w].values())),
                "correlations": {part: _over_seeds(list(trees[part][w].values())) for part in PARTS},
            }
            for w in plan.widths
        ],
        "falls": {part: _falls(trees[part][narrow], trees[part][wide]) for part in PARTS},
    }


def _of_width(width: int, runs: Mapping[int, Run], whole: Mapping[int, Run], plan: Plan) -> dict[str, Any]:
    curves: dict[str, Any] = {}
    for spacing in SPACINGS if whole else ():
        first = next(iter(whole.values()))
        at = points(first, spacing, plan.steps, plan.points)
        curves[spacing] = {"steps": [first["steps"][i] for i in at]} | {
            m: [[float(f"{r[m][i]:.5g}") for i in at] for r in whole.values()] for m in MEASURES
        }
    return {
        "width": width,
        "parameters": int(next(iter(runs.values()))["size"]),
        "seeds": list(whole),
        "stopped": [{"seed": i, "step": r["stopped"]} for i, r in runs.items() if r["stopped"] is not None],
        "rank": sorted({r["rank"] for r in whole.values()}),
        "start_norm": over([r["start_norm"] for r in whole.values()]),
        "end": {m: over([r[m][-1] for r in whole.values()]) for m in MEASURES},
        "curves": curves,
    }


def saddle(runs: Mapping[int, Run], frequent: tuple[int, float]) -> list[dict[str, Any]]:
    """What trainings from zero did, by width. frequent: the training rows' most frequent class, and its share of the
    test images."""
    label, share = frequent
    return [
        {
            "width": w,
            "parameters": r["size"],
            "stopped": r["stopped"],
            "largest_weight_gradient": r["largest_weight_gradient"],
            "moved": r["parameters"][-1] if r["parameters"] else None,
            "most_frequent": {"class": label, "test_share": share},
            "points": len(r["accuracy"]),
            "points_at_it": sum(abs(a - share) < 1e-12 for a in r["accuracy"]),
            "accuracies": sorted(set(r["accuracy"])),
            "answers": r["answers"],
        }
        for w, r in runs.items()
    ]
