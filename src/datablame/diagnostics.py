"""Should you believe the scores? First diagnostics, as numbers and as sentences."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Literal

import numpy as np

from datablame.scores import SAME_ANSWER, Scores

if TYPE_CHECKING:
    from jaxtyping import Float

    Matrix = Float[np.ndarray, "m n"]

CONTROLS = ("random", "bm25", "verbatim", "length", "gradnorm", "repsim-base")
"""Methods that know nothing of the fine-tuning: compared with, not judged."""

Level = Literal["good", "note", "warning"]

EXPLAINED = {
    "bm25": "the words alone (BM25)",
    "gradnorm": "the size of the training row's gradient alone",
    "repsim-base": "the base model's hidden states alone, before any fine-tuning",
}


@dataclass(frozen=True)
class Finding:
    """One sentence for the reader, with the numbers behind it."""

    level: Level
    sentence: str
    method: str | None = None
    numbers: dict[str, float] = field(default_factory=dict)


def query_independent_share(scores: Matrix) -> float:
    """How much of the ranking is the same whatever the query: 1 = one ranking for all, 1/m = unrelated.

    Each query's row is centred over the training rows and scaled to unit norm; the share is the squared norm
    of the mean row. Constant rows are left out. NaN for fewer than two queries that rank anything.
    """
    rows = scores - scores.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(rows, axis=1)
    scale = np.abs(scores).max(axis=1, initial=0.0) * np.sqrt(scores.shape[1])
    kept = norms > 1e-12 * np.maximum(scale, np.finfo(float).tiny)
    if kept.sum() < 2:
        return float("nan")
    return float(np.square((rows[kept] / norms[kept, None]).mean(axis=0)).sum())


def hubs(scores: Matrix) -> tuple[int, int]:
    """(training position, number of queries) of the row that is the top example of the most queries."""
    position, count = Counter(scores.argmax(axis=1).tolist()).most_common(1)[0]
    return int(position), int(count)


def rank_correlation(a: Matrix, b: Matrix) -> float:
    """Spearman's correlation over training rows, averaged over the queries where both rank anything; else NaN."""
    from scipy.stats import rankdata

    kept = (np.ptp(a, axis=1) > 0) & (np.ptp(b, axis=1) > 0)
    if not kept.any() or a.shape[1] < 3:
        return float("nan")
    x, y = rankdata(a[kept], axis=1), rankdata(b[kept], axis=1)
    x, y = x - x.mean(axis=1, keepdims=True), y - y.mean(axis=1, keepdims=True)
    return float(((x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1))).mean())


def top_size(n: int) -> int:
    """How many rows "the top" is: 10, fewer for small files, so that chance stays at a quarter or less."""
    return max(1, min(10, n // 4))


def top_overlap(a: Matrix, b: Matrix, k: int | None = None) -> float:
    """Share of the k highest rows (default: `top_size`) that both have, averaged over queries."""
    k = k or top_size(a.shape[1])
    best = [np.argsort(-s, axis=1, kind="stable")[:, :k] for s in (a, b)]
    return float(np.mean([len(np.intersect1d(p, q)) / k for p, q in zip(*best, strict=True)]))


def standing_out(scores: Matrix) -> Float[np.ndarray, " m"]:
    """How far the top rows stand above all, relative to noise: 1 = as far as the top of normal random numbers.

    For each query the mean of the `top_size` highest scores, in standard deviations above the mean, divided by
    what n independent normal numbers would give (Blom's approximation of their order statistics).
    """
    from scipy.stats import norm

    n = scores.shape[1]
    k = top_size(n)
    noise = norm.ppf((n - np.arange(k) - 0.375) / (n + 0.25)).mean()
    spread = np.maximum(scores.std(axis=1), np.finfo(float).tiny)
    top = np.sort(scores, axis=1)[:, n - k :].mean(axis=1)
    return (top - scores.mean(axis=1)) / spread / max(noise, np.finfo(float).tiny)


def base_name(method: str) -> str:
    """`repsim:layer=3` -> `repsim`."""
    return method.split(":")[0]


def diagnose(scores: Scores) -> list[Finding]:
    """All findings: notes first, then the gradients, each method, and the agreement between methods."""
    findings = [Finding("warning" if note.startswith(SAME_ANSWER) else "note", note) for note in scores.notes]
    findings += _gradients(scores)
    for method in scores.methods:
        if base_name(method) not in CONTROLS:
            findings += _one_method(scores, method)
    return findings + _agreement(scores)


def _gradients(scores: Scores) -> list[Finding]:
    norms = scores.gradient_norms
    if norms is None:
        return []
    if not norms.max() > 0:
        sentence = "All training gradients are zero: the gradient methods say nothing."
        return [Finding("warning", sentence, None, {"near_zero": len(norms), "rows": len(norms)})]
    tiny = np.flatnonzero(norms <= 1e-3 * np.median(norms[norms > 0]))
    if len(tiny):
        named = ", ".join(str(scores.train[t].id) for t in tiny[:5])
        sentence = (
            f"{len(tiny)} of {len(norms)} training rows have a near-zero gradient (below a thousandth of the median), "
            f"so the model has nothing left to learn from them and gradient methods can hardly see them: {named}."
        )
        return [Finding("warning", sentence, None, {"near_zero": len(tiny), "rows": len(norms)})]
    sentence = f"All {len(norms)} training gradients are finite, and none is near zero."
    return [Finding("good", sentence, None, {"near_zero": 0, "rows": len(norms)})]


def _one_method(scores: Scores, method: str) -> list[Finding]:
    v, m = scores.matrix(method), len(scores.queries)
    if not np.ptp(v, axis=1).any():
        return [Finding("warning", "All its scores are equal: it ranks nothing here.", method)]
    findings = []
    share = query_independent_share(v)
    if np.isfinite(share):
        level: Level = "warning" if share > max(0.8, 2 / m) else "note" if share > max(0.5, 2 / m) else "good"
        sentence = (
            f"{share:.0%} of its ranking is the same whatever the query ({1 / m:.0%} would be unrelated rankings)"
            + (": it mostly tells which rows are loud, unless all queries ask the same thing." if share > 0.5 else ".")
        )
        findings.append(Finding(level, sentence, method, {"query_independent_share": share, "unrelated": 1 / m}))
    findings += _flat(scores, method)
    position, count = hubs(v)
    if m >= 4 and count > m / 2:
        sentence = f"Training row {scores.train[position].id} is the top example of {count} of {m} queries (a hub)."
        findings.append(Finding("warning", sentence, method, {"hub_queries": count, "queries": m}))
    for control, words in EXPLAINED.items():
        if control in scores.controls and control != base_name(method):
            findings += _explained(method, v, control, scores.controls[control], words)
    return findings


def _flat(scores: Scores, method: str) -> list[Finding]:
    n, m = len(scores.train), len(scores.queries)
    if n < 20:
        return []
    ratio = standing_out(scores.matrix(method))
    flat = [str(q.id) for q, r in zip(scores.queries, ratio, strict=True) if r < 1.1]
    numbers = {"flat_queries": len(flat), "queries": m, "standing_out": float(np.median(ratio))}
    if not flat:
        return [Finding("good", "For every query its top rows stand out from the others.", method, numbers)]
    which = f"For {len(flat)} of {m} queries its top {top_size(n)} do" if m > 1 else f"Its top {top_size(n)} do"
    sentence = (
        f"{which} not stand out: they lie no further above the other rows than the top of as many random numbers"
        + (f" ({', '.join(flat[:5])}{'…' if len(flat) > 5 else ''})." if m > 1 else ".")
    )
    return [Finding("warning" if 2 * len(flat) >= m else "note", sentence, method, numbers)]


def _explained(method: str, v: Matrix, control: str, c: Matrix, words: str) -> list[Finding]:
    rho, overlap, k = rank_correlation(v, c), top_overlap(v, c), top_size(v.shape[1])
    if not np.isfinite(rho):
        return []
    level: Level = "warning" if rho > 0.8 else "note" if rho > 0.5 else "good"
    sentence = f"Its ranking correlates {rho:.2f} with {words}, and they share {overlap:.0%} of their top {k}."
    if rho > 0.5:
        sentence += " What it finds could be had without the fine-tuned model." if control != "gradnorm" else ""
    return [Finding(level, sentence, method, {f"spearman_{control}": rho, f"top_{control}": overlap})]


PAIRS = 6
"""More pairs of methods than these are told in one sentence."""


def _agreement(scores: Scores) -> list[Finding]:
    names, k = [m for m in scores.methods if base_name(m) not in CONTROLS], top_size(len(scores.train))
    findings: list[Finding] = []
    for a, b in combinations(names, 2):
        overlap = top_overlap(scores.matrix(a), scores.matrix(b))
        rho = rank_correlation(scores.matrix(a), scores.matrix(b))
        if np.isfinite(rho):
            level: Level = "warning" if overlap < 0.2 or rho < 0 else "note"
            sentence = f"{a} and {b} share {overlap:.0%} of their top {k} (rank correlation {rho:.2f})."
            findings.append(Finding(level, sentence, None, {"top": overlap, "spearman": rho}))
    if len(findings) <= PAIRS:
        return findings
    apart = [f for f in findings if f.level == "warning"]
    least = min(findings, key=lambda f: (f.numbers["spearman"], f.numbers["top"]))
    sentence = (
        f"Of {len(findings)} pairs of methods {len(apart)} share less than a fifth of their top {k}, or rank in "
        f"opposite directions. Least alike: {least.sentence}"
    )
    numbers: dict[str, float] = {"pairs": len(findings), "pairs_apart": len(apart)}
    return [Finding("warning" if apart else "note", sentence, None, numbers)]


def verdict(findings: list[Finding], methods: int) -> str:
    """One plain sentence over all findings."""
    warnings = sum(f.level == "warning" for f in findings)
    count = f"{warnings} warning{'' if warnings == 1 else 's'} below"
    if any(f.sentence.startswith(SAME_ANSWER) for f in findings):
        return "No: the base model gives the same answer without any of these rows."
    if warnings == 0:
        return "Nothing here speaks against the ranking. It is still a correlate of influence, not a retraining."
    if methods < 2:
        return f"With care: {count}, and no second method to compare with."
    return f"With care: {count}. Prefer rows that several methods name."
