"""The demo as a measurement: planted rows found in the top 12, with controls, chance and intervals.

python benchmarks/demo.py --out demo-out --json benchmarks/results/demo.json
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

import record
from datablame.console import ConsoleReporter
from datablame.demo import COMMAND, run
from datablame.demo import found as count_found
from datablame.diagnostics import query_independent_share
from datablame.indexing import quiet_libraries
from datablame.scores import Scores


def main() -> None:
    """Run the demo into an empty folder, count, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="an empty folder, else it measures no index")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    quiet_libraries()
    start = time.perf_counter()
    scores = run(args.out, False, ConsoleReporter())
    seconds = time.perf_counter() - start
    result = summarise(scores) | {
        "command": "python benchmarks/demo.py",
        "adapter_made_by": COMMAND,
        "seconds": round(seconds),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "index_mb": round(sum(p.stat().st_size for p in (args.out / "index").iterdir()) / 1e6),
    }
    if args.json:
        record.write(args.json, result)


def summarise(scores: Scores) -> dict[str, Any]:
    """Counts by method and query, recall over all planted queries with its 95 % Wilson interval."""
    methods = {}
    for method, by_query in count_found(scores).items():
        hits, trials = sum(by_query.values()), 12 * len(by_query)
        interval = binomtest(hits, trials).proportion_ci(method="wilson")
        methods[method] = {
            "found_of_12": by_query,
            "recall": round(hits / trials, 3),
            "interval95": [round(interval.low, 3), round(interval.high, 3)],
            "query_independent_share": round(query_independent_share(scores.matrix(method)), 3),
        }
    return {
        "protocol": "sound: chat template, loss on the response; one adapter, seed 0; "
        "the interval treats rows as independent, which rows about one fact are not",
        "training_rows": len(scores.train),
        "chance_recall": round(12 / len(scores.train), 3),
        "seed": 0,
        "answers": {str(q.id): {"prompt": q.prompt, "response": q.response} for q in scores.queries},
        "methods": methods,
    }


if __name__ == "__main__":
    main()
