"""Speed of scoring: GradDot, DataInf and LiSSA(10) against the released code's formulas run as its loops.

    python benchmarks/scoring.py --json benchmarks/results/scoring.json

900 training rows × 100 queries, features of SmolLM2-135M's LoRA (r = 4 on q and v: 120 blocks, 230,400 numbers a
row), random with a common direction. Ours runs on all queries. The loops (query by query, weight by weight, row by
row, λ computed anew for each) run on --loop-queries of them, all blocks and all rows; the time is extrapolated to all
queries, which is exact up to noise because no work is shared between queries. `exact`, which the released code never
ran, is timed beside.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import record

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
import oracles
from datablame.methods import parse

SHAPES = {"q_proj.A": (4, 576), "q_proj.B": (576, 4), "v_proj.A": (4, 576), "v_proj.B": (192, 4)}
METHODS = {
    "graddot": ("graddot", lambda v, grads: v),
    "datainf": ("datainf:damping=0.1", oracles.released_datainf),
    "lissa10": ("lissa:protocol=paper,steps=10,damping=0.1", oracles.released_lissa),
}
BESIDE = ("exact", "exact-block", "lissa")


def features(rows: int, layers: int, seed: int) -> dict[str, Tensor]:
    """`{block: [rows, D]}` in float32: half of the squared length is one direction that all rows share."""
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    out = {}
    for layer in range(layers):
        for name, shape in SHAPES.items():
            d = shape[0] * shape[1]
            common = torch.randn(1, d, generator=shared) * torch.randn(rows, 1, generator=own).abs()
            out[f"{layer}.{name}"] = (torch.randn(rows, d, generator=own) + common) * d**-0.5
    return out


def loop(
    product: Callable[[Tensor, list[Tensor]], Tensor], train: list[dict[str, Tensor]], query: dict[str, Tensor]
) -> Tensor:
    """`[n]`: the released code's score of one query, its sign turned (it ranks by −score)."""
    hvp = {name: product(v, [row[name] for row in train]) for name, v in query.items()}
    scores = torch.zeros(len(train))
    for i, row in enumerate(train):
        for name in query:
            scores[i] += torch.sum(hvp[name] * row[name])
    return scores


def as_rows(blocks: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """The released layout: one dictionary of matrices a row."""
    shapes = {name: SHAPES[name.split(".", 1)[1]] for name in blocks}
    return [{name: x[i].reshape(shapes[name]).clone() for name, x in blocks.items()} for i in range(count)]


def timed(run: Callable[[], Tensor], rounds: int = 1) -> tuple[float, Tensor]:
    """The shortest of `rounds` times, and the result."""
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        result = run()
        best = min(best, time.perf_counter() - start)
    return best, result


def main() -> None:
    """Measure and print; write JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=900)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--loop-queries", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="ours; the shortest counts. The loops run once a query")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    train, query = features(args.rows, args.layers, 1), features(args.queries, args.layers, 2)
    rows, queries = as_rows(train, args.rows), as_rows(query, args.loop_queries)
    timed(lambda: parse("graddot").fit(train).score(query))  # wakes the threads
    results = {}
    for name, (spec, product) in METHODS.items():
        seconds, ours = timed(lambda spec=spec: parse(spec).fit(train).score(query), args.rounds)  # type: ignore[misc]
        subset, theirs = timed(lambda product=product: torch.stack([loop(product, rows, q) for q in queries]))  # type: ignore[misc]
        whole = subset * args.queries / args.loop_queries
        got = ours[: args.loop_queries]
        results[name] = {
            "spec": spec,
            "seconds": round(seconds, 3),
            "loop_seconds_measured": round(subset, 2),
            "loop_seconds_extrapolated": round(whole, 1),
            "times_faster": round(whole / seconds, 1),
            "largest_relative_difference": float((got - theirs).abs().max() / theirs.abs().max()),
        }
        r = results[name]
        print(
            f"{name:8} {seconds:7.2f} s; loops {subset:7.2f} s on {args.loop_queries} of {args.queries} queries, "
            f"{whole:8.1f} s extrapolated: {r['times_faster']:.0f} times faster; "
            f"largest relative difference {r['largest_relative_difference']:.1e}",
            flush=True,
        )
    report(args, results, beside(train, query))


def beside(train: dict[str, Tensor], query: dict[str, Tensor]) -> dict[str, float]:
    """Seconds of the methods that the released code does not have."""
    out = {}
    for spec in BESIDE:
        out[spec] = round(timed(lambda spec=spec: parse(spec).fit(train).score(query))[0], 2)  # type: ignore[misc]
        print(f"{spec:12} {out[spec]:7.2f} s", flush=True)
    return out


def report(args: argparse.Namespace, results: dict[str, dict[str, Any]], seconds: dict[str, float]) -> None:
    """Totals and the JSON."""
    ours = sum(r["seconds"] for r in results.values())
    theirs = sum(r["loop_seconds_extrapolated"] for r in results.values())
    worst = max(r["largest_relative_difference"] for r in results.values())
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"in total {ours:.1f} s against {theirs:.0f} s extrapolated: {theirs / ours:.0f} times faster; "
        f"largest relative difference {worst:.1e}; peak memory {memory:.2f} GB"
    )
    if args.json:
        numbers = sum(a * b for a, b in SHAPES.values()) * args.layers
        result = {
            "command": f"python benchmarks/scoring.py --rows {args.rows} --queries {args.queries} "
            f"--layers {args.layers} --loop-queries {args.loop_queries} --rounds {args.rounds}",
            "rows": args.rows,
            "queries": args.queries,
            "blocks": 4 * args.layers,
            "numbers_a_row": numbers,
            "loop_queries": args.loop_queries,
            "methods": results,
            "total_seconds": round(ours, 2),
            "total_loop_seconds_extrapolated": round(theirs, 1),
            "total_times_faster": round(theirs / ours, 1),
            "largest_relative_difference": worst,
            "seconds_beside": seconds,
            "peak_memory_gb": round(memory, 2),
            "seed": "0, 1, 2",
        }
        record.write(args.json, result)


if __name__ == "__main__":
    main()
