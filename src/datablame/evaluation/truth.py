"""Methods held against retraining: `datablame bench retrain`. Needs the score matrices of a finished cell."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from datablame.environment import environment
from datablame.errors import UserError
from datablame.evaluation.bench import result_path
from datablame.evaluation.cell import MATRICES, Cell, folder_of
from datablame.evaluation.intervals import interval
from datablame.evaluation.retraining import half_sets, lds, noise_ceiling, random_rows, retrain, top_rows
from datablame.evaluation.scoring import read_matrices, rounded
from datablame.evaluation.tasks import Task
from datablame.indexing import SILENT, Reporter
from datablame.models import cache_dir

REMOVED = (
    "graddot@response",
    "gradcos@response",
    "gradcos@all",
    "exact:damping=0.1@response",
    "repsim:layer=middle,text=response",
    "bm25:text=both",
)
"""Runs whose top rows are dropped by default; chance and the right rows themselves stand beside them."""
HALF_SETS = 16


def against_retraining(
    cell: Cell,
    task: Task,
    model_sha256: str,
    kind: Literal["removal", "lds"],
    out: str | Path,
    *,
    runs: Sequence[str] | None = None,
    device: str | None = None,
    dtype: str | None = None,
    reporter: Reporter = SILENT,
) -> Path:
    """Retrain, and write what came of it beside the cell's result; the path.

    runs: for removal those of REMOVED by default, for lds every run of the cell (it costs nothing more).
    Raises UserError when the cell has not been run, or not with one of `runs`.
    """
    path = cache_dir() / "bench" / folder_of(cell, task, model_sha256) / MATRICES
    if not path.exists():
        raise UserError(
            f"{cell.name}: there are no scores yet. Run it first: datablame bench run --tasks {cell.task} "
            f"--scale {cell.scale} --seeds {cell.seed}."
        )
    matrices = read_matrices(path)
    chosen = list(runs or (REMOVED if kind == "removal" else matrices))
    if missing := [r for r in chosen if r not in matrices]:
        raise UserError(f"{cell.name}: no scores of {missing[0]}. Run it first: datablame bench run --methods …")
    scores = {r: matrices[r] for r in chosen}
    work = cache_dir() / "retrained" / model_sha256[:16]
    options = {"device": device, "dtype": dtype, "reporter": reporter}
    found = (_removal if kind == "removal" else _lds)(cell, task, scores, work, options)
    result = {"version": 1, "kind": kind, **cell.described(), **found, **environment()}
    place = result_path(Path(out), cell)
    place = place.with_name(f"{place.stem}-{kind}.json")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(result, ensure_ascii=False, allow_nan=False, indent=1) + "\n", encoding="utf-8")
    return place


def _removal(
    cell: Cell, task: Task, scores: dict[str, np.ndarray[Any, Any]], work: Path, options: dict[str, Any]
) -> dict[str, Any]:
    """Drop as many rows as are right for the most frequent class of main queries, and train again."""
    main = [j for j, g in enumerate(task.groups) if g in task.main]
    label, _ = Counter(task.queries[j].label for j in main).most_common(1)[0]
    queries = [j for j in main if task.queries[j].label == label]
    k, n = int(task.truth[queries[0]].sum()), len(task.train)
    dropped: dict[str, list[int]] = {"nothing": []}
    dropped |= {run: top_rows(s, queries, k) for run, s in scores.items()}
    dropped["chance"] = random_rows(n, k, cell.seed)
    dropped["the right rows"] = np.flatnonzero(task.truth[queries[0]]).tolist()
    out = {}
    for name, rows in dropped.items():
        kept = sorted(set(range(n)) - set(rows))
        after = retrain(cell, task, kept, work, generate=True, **options)
        out[name] = {
            "rows": rows,
            "loss": rounded(after.loss[queries]),
            "behaves": float(after.behaves[queries].mean()),
        }
    return {"class": label, "dropped": k, "queries": len(queries), "after": out}


def _lds(
    cell: Cell, task: Task, scores: dict[str, np.ndarray[Any, Any]], work: Path, options: dict[str, Any]
) -> dict[str, Any]:
    """Half-sets trained under two seeds: their mean loss is the truth, their agreement the noise ceiling."""
    sets = half_sets(len(task.train), HALF_SETS, cell.seed)
    losses = [
        np.stack([retrain(cell, task, np.flatnonzero(s).tolist(), work, seed=seed, **options).loss for s in sets])
        for seed in (cell.seed, cell.seed + 1000)
    ]
    mean = (losses[0] + losses[1]) / 2
    found = {run: _told(lds(s, sets, mean)) for run, s in scores.items()}
    return {
        "half_sets": HALF_SETS,
        "seeds_of_each": 2,
        "noise_ceiling": _told(noise_ceiling(*losses)),
        "lds": found,
        "knowing_the_class": _told(lds(task.truth.astype(float), sets, mean)),
    }


def _told(values: np.ndarray[Any, Any]) -> dict[str, Any]:
    i = interval(values[None, :])
    return {"value": round(i.value, 4), "low": round(i.low, 4), "high": round(i.high, 4), "queries": rounded(values)}
