"""How long the smoke scale takes, of the benchmark or of all the paper's tables and figures, from an empty cache.

python benchmarks/smoke.py bench --json benchmarks/results/smoke_bench.json
python benchmarks/smoke.py paper --json benchmarks/results/smoke_paper.json

The bundled model and MNIST are fetched once and are not timed; nothing else comes from the cache. Run it on a machine
that does nothing else.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import record
from datablame.models import cache_dir, load_tokenizer
from datablame.paper import mnist

COMMANDS = {"bench": "bench run --scale smoke", "paper": "paper run all --scale smoke"}
FETCHED = ("models", "mnist")
"""Of the cache, what is shared with the user's own."""


def main() -> None:
    """Time one command in a directory of its own, with a cache of its own; exit 1 where it fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    load_tokenizer("smollm2-135m")
    if args.what == "paper":
        mnist.load()
    command = COMMANDS[args.what]
    with tempfile.TemporaryDirectory() as folder:
        seconds = round(timed(command.split(), Path(folder)), 1)
    print(f"{command}: {seconds / 60:.1f} min")
    if args.json:
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        result = {"command": f"python benchmarks/smoke.py {args.what}", "timed": f"datablame {command}"}
        result |= {"seconds": seconds, "peak_memory_gb": round(peak, 2)}
        record.write(args.json, result)


def timed(command: list[str], folder: Path) -> float:
    """Seconds of one command."""
    (folder / "cache").mkdir()
    for name in (name for name in FETCHED if (cache_dir() / name).exists()):
        (folder / "cache" / name).symlink_to((cache_dir() / name).resolve())
    start = time.perf_counter()
    asked = [sys.executable, "-m", "datablame.cli", *command, "--out", str(folder / "out")]
    subprocess.run(asked, cwd=folder, env={**os.environ, "DATABLAME_CACHE": str(folder / "cache")}, check=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
