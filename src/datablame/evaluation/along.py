"""Methods along a fine-tune: a task's runs scored at one of its checkpoints, on the benchmark's own features.

What is found at a checkpoint is kept by the digest of all that decides it: rows, weights, runs. Its stores, which an
interrupted run goes on with, are deleted then.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datablame.adapters import WEIGHTS, fingerprint_adapter
from datablame.encoding import Encoding
from datablame.evaluation import metrics
from datablame.evaluation.cell import FEATURES, Cell, features, fingerprint, token_loss
from datablame.evaluation.scoring import measured, n_classes, rounded, score_runs
from datablame.evaluation.suites import split
from datablame.evaluation.tasks import Task
from datablame.evaluation.views import captured_for
from datablame.indexing import SILENT, Reporter
from datablame.locks import alone
from datablame.models import ModelSpec, load
from datablame.store import SCHEMA, read_kept, write_whole

VERSION = 2
"""Of what is kept. Another number means that it is done again."""


def spaced(snapshots: Sequence[tuple[int, Path]], count: int) -> list[tuple[int, Path]]:
    """At most `count` of the snapshots, nearest to log-spaced steps from the first to the last."""
    if len(snapshots) <= count:
        return list(snapshots)
    steps = np.log([step for step, _ in snapshots])
    wanted = np.linspace(steps[0], steps[-1], count)
    nearest = {int(np.abs(steps - w).argmin()) for w in wanted}
    return [snapshots[k] for k in sorted(nearest)]


def missing(checkpoint: Path) -> bool:
    """Is there no adapter?"""
    return not (checkpoint / WEIGHTS).exists()


def at_checkpoint(
    cell: Cell,
    task: Task,
    step: int,
    checkpoint: Path,
    runs: Sequence[str],
    work: Path,
    *,
    model_sha256: str,
    device: str | None = None,
    dtype: str | None = None,
    keep: bool = False,
    wait: bool = True,
    reporter: Reporter = SILENT,
) -> dict[str, Any] | None:
    """What the runs find with the weights of a checkpoint, on the queries' reference responses.

    In the shape of a cell's result, so that `TaskResults` reads it: `results`, `queries`, `main`, `chance`; and
    `loss`: `{train, queries}`, each `{tuned, base}`, the mean over response tokens. `keep` leaves the stores.
    wait: for another process that is at it; else None then.
    Raises UserError, with NotFinite as its cause, where a loss or gradient is not finite.
    """
    what = [VERSION, SCHEMA, fingerprint(cell, task, model_sha256), fingerprint_adapter(checkpoint), list(runs)]
    digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
    folder = work / f"{cell.name}-step{step}-{digest}"
    with alone(folder / "lock", wait=wait) as mine:
        if not mine:
            return None
        done = folder / "result.json"
        if not done.exists():  # one with a run that failed is not kept
            start = time.perf_counter()
            found = _found(cell, task, checkpoint, runs, folder / FEATURES, device, dtype, reporter)
            found |= {"step": step, "seconds": round(time.perf_counter() - start, 1)}
            if not any("error" in x for x in found["results"]["reference"].values()):
                write_whole(done, json.dumps(found, ensure_ascii=False, allow_nan=False).encode())
        else:
            found = dict(read_kept(done))
        if not keep:
            shutil.rmtree(folder / FEATURES, ignore_errors=True)
        return found


def _found(
    cell: Cell,
    task: Task,
    checkpoint: Path,
    runs: Sequence[str],
    stores: Path,
    device: str | None,
    dtype: str | None,
    reporter: Reporter,
) -> dict[str, Any]:
    loaded = load(ModelSpec(cell.model, str(checkpoint), device, dtype))
    encoder = Encoding(loaded.tokenizer, None, loaded.max_length)
    seen = captured_for(split(run)[1] for run in runs)
    sets = {"train": list(task.train), "queries": list(task.queries)}
    there = features(sets, stores, loaded, encoder, seen, reporter)
    scored = score_runs(runs, there["train"], there["queries"], reporter)
    results = {run: measured(task, run, found) for run, found in scored.items()}
    for result in results.values():
        result.pop("heat", None)
    return {
        "seed": cell.seed,
        "main": list(task.main),
        "queries": [{"id": e.id, "label": e.label, "group": g} for e, g in zip(task.queries, task.groups, strict=True)],
        "chance": {k: rounded(v) for k, v in metrics.chance(task.truth, n_classes(task)).items()},
        "loss": {name: token_loss(store) for name, store in there.items()},
        "results": {"reference": results},
    }
