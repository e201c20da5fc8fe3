"""The pieces of benchmarks/methods.py as one JSON: costs, agreement with `exact`, planted rows found."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

import record
from datablame.comparing import relative_errors
from datablame.demo import ADAPTER, COMMAND, PLANTED, QUERIES
from datablame.diagnostics import CONTROLS, query_independent_share, rank_correlation, top_overlap, top_size
from datablame.examples import Example, load_examples
from datablame.methods import BUILTIN, parse
from datablame.methods.blockwise import OnGradients

DEMO = Path(__file__).resolve().parent / "results" / "demo.json"
VARIANTS = {"exact-damped": "exact:damping=1,unit=rank", "exact-block-damped": "exact-block:damping=1,unit=rank"}
"""With λ as large as the curvature is on average where there is any."""
UNROLL = "unrolled-unroll"
PLANTED_QUERIES = {id_: label for id_, _, label in QUERIES if label in PLANTED}


def write(path: Path, work: Path, rows: int, pieces: list[str], serves: dict[str, list[str]], blocks: str) -> None:
    """Write what is finished. serves: methods by extra · blocks: the weights of the subset."""
    again = (work / "adapter.txt").read_text(encoding="utf-8") != str(ADAPTER.resolve())
    done = {p: json.loads((work / f"{p}.json").read_text(encoding="utf-8")) for p in pieces if _there(work, p)}
    examples, queries = load_examples(work / "rows.jsonl"), load_examples(work / "queries.jsonl")
    labels = [e.label for e in examples]
    methods = {n: done[f"scores-{n}"] for n in (*BUILTIN, *VARIANTS) if f"scores-{n}" in done}
    ran = {n: m for n, m in methods.items() if "not_run" not in m}
    scores = {n: np.load(work / f"scores-{n}.npy") for n in ran}
    asked = [str(q.id) for q in queries]
    result = {
        "command": f"python benchmarks/methods.py --rows {rows}" + (" --adapter ADAPTER" if again else ""),
        "adapter": f"made again, with its checkpoints: {COMMAND} --keep 3" if again else "the demo's own",
        "protocol": "the demo's rows, adapter and questions (chat template, loss on the response, answers as in "
        "results/demo.json); one adapter, one seed; each capture and each method in a process of its own, whose peak "
        "memory holds Python and torch too; seconds on the clock of a machine that did other work beside, cpu_seconds "
        "the process's own; the interval (Wilson) treats rows as independent, which rows about one fact are not",
        "seed": 0,
        "training_rows": len(labels),
        "queries": asked,
        "chance_recall": round(12 / len(labels), 3),
        "chance_top10": round(top_size(len(labels)) / len(labels), 3),
        "captures": {
            (n := p.removeprefix("capture-")): {**c, "serves": serves.get(n, [])}
            for p, c in done.items()
            if p.startswith("capture-")
        },
        "methods": {
            n: {**m, **_found(scores[n], labels, asked), **_agree(n, scores), **_unrolled(work, n, scores[n], asked)}
            for n, m in ran.items()
        },
        "unroll": _reference(work, labels, done.get(UNROLL)),
        "not_run": {n: m["not_run"] for n, m in methods.items() if "not_run" in m},
        "not_finished": [p for p in pieces if p not in done and p != "capture-moments"],
        "subset": {"blocks": blocks, **_subset(work, examples, done)},
    }
    record.write(path, result)


def _there(work: Path, piece: str) -> bool:
    return (work / f"{piece}.json").exists()


def _found(scores: Any, labels: list[str | None], asked: list[str]) -> dict[str, Any]:
    """Planted rows in the top 12, of 12, and how much of the ranking is one for all queries."""
    hits = {}
    for query, label in ((q, label) for q, label in PLANTED_QUERIES.items() if q in asked):
        order = np.argsort(-scores[asked.index(query)], kind="stable")[:12]
        hits[query] = sum(labels[i] == label for i in order)
    total, trials = sum(hits.values()), 12 * len(hits)
    interval = binomtest(total, trials).proportion_ci(method="wilson")
    return {
        "found_of_12": hits,
        "recall": round(total / trials, 3),
        "interval95": [round(interval.low, 3), round(interval.high, 3)],
        "query_independent_share": _rounded(query_independent_share(scores)),
    }


def _agree(name: str, scores: dict[str, Any]) -> dict[str, Any]:
    """With `exact`: rank correlation, shared top 10, and the relative error after the best factor."""
    if "exact" not in scores:
        return {}
    return {"agreement": agreement(name, scores[name], scores["exact"])}


def _reference(work: Path, labels: list[str | None], told: dict[str, Any] | None) -> dict[str, Any] | None:
    """The unrolled reference itself: what it cost and finds."""
    return told and {**told, **_found(np.load(work / "scores-unroll.npy"), labels, told["queries"])}


def _unrolled(work: Path, name: str, scores: Any, asked: list[str]) -> dict[str, Any]:
    """With the unrolled reference, on its queries."""
    if not _there(work, UNROLL):
        return {}
    reference = np.load(work / "scores-unroll.npy")
    queries = json.loads((work / f"{UNROLL}.json").read_text(encoding="utf-8"))["queries"]
    return {"unrolled": agreement(name, scores[[asked.index(q) for q in queries]], reference)}


def agreement(name: str, s: Any, e: Any) -> dict[str, float | None]:
    """As `datablame compare`; no errors for methods that are not made of gradients."""
    scaled = (
        relative_errors(s, e)[1]
        if isinstance(parse(VARIANTS.get(name, name)), OnGradients) and name not in CONTROLS
        else None
    )
    return {
        "spearman": _rounded(rank_correlation(s, e)),
        "top10": round(top_overlap(s, e), 3),
        "scaled": None if scaled is None else round(scaled, 3),
    }


def _subset(work: Path, examples: list[Example], done: dict[str, Any]) -> dict[str, Any]:
    """The methods on the subset, and each beside each."""
    runs = {p.removeprefix("subset-"): r for p, r in done.items() if p.startswith("subset-")}
    scores = {n: np.load(work / f"subset-{n}.npy") for n in runs}
    beside = {a: {b: agreement(a, scores[a], scores[b]) for b in runs} for a in runs}
    rows = next(iter(runs.values()))["rows"] if runs else []
    planted = sum(examples[i].label in PLANTED for i in rows)
    return {"rows": len(rows), "planted": planted, "queries": list(PLANTED_QUERIES), "runs": runs, "beside": beside}


def _rounded(x: float) -> float | None:
    return round(x, 3) if math.isfinite(x) else None
