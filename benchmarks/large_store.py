"""A store larger than memory would like, through `exact`: features of Llama-2-7B's LoRA, random, on disk.

    python benchmarks/large_store.py --folder /scratch --json benchmarks/results/large_store.json

LoRA r = 4 on q and v of 32 layers of width 4096: 128 blocks of 16,384 numbers; 1,000 training rows are 8.4 GB on
disk, 100 queries 0.84 GB in memory, as `trace` holds them. Reports the time to open (with checksums) and to score, and
the peak memory of the whole process. The store is deleted afterwards unless --keep.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import time
from pathlib import Path

import torch

import record
from datablame.examples import Example
from datablame.methods import parse
from datablame.store import FeatureStore, check_disk


def build(path: Path, rows: int, blocks: int, width: int) -> None:
    """Random shards: independent rows plus a direction that all share."""
    widths = {f"gradients/{i}": width for i in range(blocks)}
    check_disk(path, rows * blocks * width * 4)
    examples = [Example(str(i), i, (), f"row {i}", None) for i in range(rows)]
    store = FeatureStore.create(path, {"made_by": "benchmarks/large_store.py"}, widths, examples, "float32")
    store.begin()
    common = torch.randn(blocks, width, generator=torch.Generator().manual_seed(0))
    for a, b in store.missing():
        own = torch.Generator().manual_seed(1 + a)
        store.write(
            (a, b), {name: torch.randn(b - a, width, generator=own) + common[i] for i, name in enumerate(widths)}
        )


def main() -> None:
    """Build, open, score, print; write JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="scratch: 8.4 GB at full size")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--blocks", type=int, default=128)
    parser.add_argument("--width", type=int, default=16384)
    parser.add_argument("--method", default="exact")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    path = args.folder / f"large-store-{args.rows}x{args.blocks}x{args.width}"
    seconds, marks = {}, [time.perf_counter()]

    def lap(name: str) -> None:
        marks.append(time.perf_counter())
        seconds[name] = round(marks[-1] - marks[-2], 1)
        print(f"{name}: {seconds[name]} s, peak memory {peak():.2f} GB", flush=True)

    try:
        build(path, args.rows, args.blocks, args.width)
        lap("build")
        store = FeatureStore.open(path)
        lap("open")
        own = torch.Generator().manual_seed(0)
        query = {str(i): torch.randn(args.queries, args.width, generator=own) for i in range(args.blocks)}
        lap("queries")
        scores = parse(args.method).fit(store.features("gradients")).score(query)
        lap("score")
    finally:
        if not args.keep:
            shutil.rmtree(path, ignore_errors=True)
    assert scores.shape == (args.queries, args.rows)
    assert torch.isfinite(scores).all()
    if args.json:
        result = {
            "command": f"python benchmarks/large_store.py --folder SCRATCH --rows {args.rows} --queries {args.queries} "
            f"--blocks {args.blocks} --width {args.width} --method {args.method}",
            "method": args.method,
            "rows": args.rows,
            "queries": args.queries,
            "blocks": args.blocks,
            "numbers_a_row": args.blocks * args.width,
            "disk_gb": round(args.rows * args.blocks * args.width * 4 / 1e9, 2),
            "seconds": seconds,
            "score_minutes": round(seconds["score"] / 60, 2),
            "peak_memory_gb": round(peak(), 2),
            "seed": 0,
        }
        record.write(args.json, result)


def peak() -> float:
    """Peak resident memory of this process so far, in GB (2^30)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
