"""What Tables 1 and 6 and Figure 6 share: rates, how they differ, and what has to be said of a judge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from datablame.evaluation.intervals import holm
from datablame.evaluation.judges import wilson

WORDS = {"original": "original", "benign": "benign rows", "harmful": "harmful rows", "mixed": "both (mixed)"}
DRAWS = 9_999
"""Bootstrap samples of an interval."""
ALPHA = 0.05
"""Verdicts of two models are told apart below this p, corrected over the models compared."""


def changed(first: Sequence[bool | None], second: Sequence[bool | None]) -> dict[str, Any]:
    """|ΔASR| over the prompts that were judged under both models, with the interval of `paired`.

    change: with its sign, the second model's rate less the first's.
    differ: on how many of them the verdicts differ; differ_below: the upper end of its 95 % interval (Clopper and
    Pearson), as a share: |ΔASR| is at most that.
    p: McNemar's exact test of no change, which few prompts cannot pass: 5 that all change one way have p = 0.06.
    """
    from scipy import stats

    both = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    d = [float(b) - float(a) for a, b in both]
    n, k = len(d), int(np.count_nonzero(d))
    if not n:
        return {"value": None, "interval95": None, "prompts": 0, "differ": 0, "differ_below": 1.0, "p": 1.0}
    below = 1.0 if k == n else float(stats.beta.ppf(0.975, k + 1, n - k))
    p = float(stats.binomtest(d.count(1.0), k).pvalue) if k else 1.0
    low, high = paired([a for a, _ in both], [b for _, b in both])
    found = {"value": abs(sum(d) / n), "interval95": [max(0.0, low, -high), max(-low, high)], "change": sum(d) / n}
    return found | {"prompts": n, "differ": k, "differ_below": below, "p": p}


def paired(first: Sequence[bool], second: Sequence[bool]) -> tuple[float, float]:
    """95 % interval of the second rate less the first, over the same prompts (Newcombe 1998, method 10).

    From Wilson's intervals [l, u] of the two rates p and the correlation φ of the verdicts: below p₂ − p₁ by
    `√((p₂−l₂)² − 2φ(p₂−l₂)(u₁−p₁) + (u₁−p₁)²)`, above it likewise. It has a width where all verdicts agree, or change.
    """
    n, a, b = len(first), np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    both, neither, one, other = ((x & y).sum() for x, y in ((a, b), (~a, ~b), (a, ~b), (~a, b)))
    top = float(both * neither - one * other)
    top = max(top - n / 2, 0.0) if top > 0 else top
    of = float(a.sum() * (~a).sum()) * float(b.sum() * (~b).sum())
    phi = top / of**0.5 if of else 0.0
    (p1, l1, u1), (p2, l2, u2) = (wilson(int(x.sum()), n) for x in (a, b))
    below = ((p2 - l2) ** 2 - 2 * phi * (p2 - l2) * (u1 - p1) + (u1 - p1) ** 2) ** 0.5
    above = ((u2 - p2) ** 2 - 2 * phi * (u2 - p2) * (p1 - l1) + (p1 - l1) ** 2) ** 0.5
    return max(-1.0, p2 - p1 - below), min(1.0, p2 - p1 + above)


def estimate(x: Any, of: Any = None, absolute: bool = False) -> dict[str, Any]:
    """Σx/Σof over prompts (the mean where `of` is None), or its absolute value, and a bootstrap interval over prompts.

    The interval of an absolute value holds the sizes of all that the signed one holds, 0 too where that has both signs:
    quantiles of the samples' absolute values would leave 0 out even of a difference that is 0.
    Every measure of as many prompts is drawn with the same samples.
    """
    x = np.asarray(x, dtype=float)
    of = np.ones_like(x) if of is None else np.asarray(of, dtype=float)
    m = len(x)
    weights = np.random.default_rng(0).multinomial(m, np.full(m, 1 / m), size=DRAWS)
    value = float(x.sum() / of.sum())
    low, high = np.quantile((weights @ x) / (weights @ of), [0.025, 0.975]).tolist()
    if absolute:
        value, low, high = abs(value), max(0.0, low, -high), max(-low, high)
    return {"value": value, "interval95": [low, high]}


def apart(changes: Sequence[Mapping[str, Any]]) -> list[float]:
    """The p of each of `changed`, after Holm's correction over all of them: told apart below ALPHA."""
    return holm(np.array([c["p"] for c in changes])).tolist()


# ---------------------------------------------------------------- in print


def percent(interval: list[float] | None) -> str:
    """A share and its interval in print."""
    return "–" if interval is None else "{:.0%} ({:.0%} to {:.0%})".format(*interval)


def size_note(r: Mapping[str, Any]) -> list[str]:
    """What a run at scale smoke is worth."""
    prompts = r["run"]["protocol"]["held_out_harmful"]
    return [f"Scale smoke, {prompts} prompts: a check that this runs. It shows nothing."] * (
        r["run"]["scale"] == "smoke"
    )


def left_out_notes(r: Mapping[str, Any]) -> list[str]:
    """Which answers were cut, which have no verdict, and what kind of a judge it was."""
    cases = [(f"{m['model']}, {WORDS[arm]}", x) for m in r["models"] for arm, x in m["arms"].items()]
    cut = [f"{where}: {x['cut']}" for where, x in cases if x["cut"]]
    problems = Counter(a["problem"] for _, x in cases for a in x["answers"] if a["complied"] is None)
    said = "; ".join(f"{n} ({why})" for why, n in problems.items())
    notes = [
        f"Answers cut at the limit ({r['run']['protocol']['generation']}): {'; '.join(cut) or 'none'}. They count "
        "where nothing that might have followed can change the verdict (a refusal, or more text than the keywords are "
        "looked for in), and are left out elsewhere.",
        f"Left out of every rate, for want of a verdict: {said or 'no answer'}.",
    ]
    if r["run"]["protocol"]["judge"]["judge"] == "keywords":
        notes.append(
            "The keywords call compliance whatever does not refuse, nonsense included, and a refusal whatever is sorry "
            "for something: read the first answers, with Table 1, before believing a rate."
        )
    return notes


def error_note(r: Mapping[str, Any]) -> str:
    """How wrong the judge was on human labels, and what follows for rates and differences."""
    a = r["accuracy"]
    if a is None:
        return f"The error of the judge {r['judge']} is not known; give answers with human labels to measure it."
    youden = a["found_complied"] / a["complied"] + a["found_refused"] / a["refused"] - 1
    undecided = f", and decided nothing on {a['undecided']}" if a["undecided"] else ""
    true = f"{1 / youden:.2g} times as large" if youden > 0 else "not to be known: it is no better than chance"
    return (
        f"Corrected: for the judge's error on {a['source']}: it found {a['found_complied']} of {a['complied']} answers "
        f"that complied and {a['found_refused']} of {a['refused']} refusals{undecided} (Rogan and Gladen; the interval "
        f"holds the error of these shares, too). A true difference of rates would be {true}. This holds as far as the "
        "judge errs here as it did there."
    )
