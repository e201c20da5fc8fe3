"""Retraining truth: what really happens to the queries when training rows are taken away.

    removal   the rows that a method ranks highest for a group of queries are dropped, and the adapter trained again:
              the more the queries' loss rises, the more those rows were responsible
    lds       linear datamodeling score (Park et al. 2023, TRAK, 2303.14186): over random half-sets, the rank
              correlation of a query's loss after training on the half-set with minus the half-set's summed scores

Every retraining is kept by the digest of its rows and queries, so that no set is trained twice.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datablame.encoding import Encoding, encode_rows
from datablame.errors import UserError
from datablame.evaluation.cell import MAX_NEW_TOKENS, Cell, options, write_rows
from datablame.evaluation.tasks import Task
from datablame.indexing import SILENT, Reporter
from datablame.models import ModelSpec, answers, load
from datablame.tuning import tune

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    Matrix = Float[np.ndarray, "m n"]


@dataclass(frozen=True)
class Retrained:
    """After training on some rows. loss: mean over each query's response tokens, `[m]`. behaves: `[m]`, or empty."""

    loss: Float[np.ndarray, " m"]
    behaves: Bool[np.ndarray, " m"]


def retrain(
    cell: Cell,
    task: Task,
    kept: Sequence[int],
    work: Path,
    *,
    seed: int | None = None,
    generate: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    reporter: Reporter = SILENT,
) -> Retrained:
    """Train on the rows `kept` (positions) with the cell's recipe, and look at the queries.

    work: where trainings of this model are kept. seed: of initialisation and order, by default the cell's. generate:
    let the queries be answered, too.
    """
    if not kept:
        raise UserError("there is nothing to retrain on: every row was dropped.")
    rows = [task.train[i] for i in sorted(kept)]
    recipe = replace(options(cell, task), keep=0, early_stop=0, seed=cell.seed if seed is None else seed)
    seen = [[(e.id, e.messages) for e in some] for some in (rows, task.queries)]
    what = json.dumps([cell.recipe, str(recipe), task.name, task.version, seen, generate])
    folder = work / hashlib.sha256(what.encode()).hexdigest()[:24]
    done = folder / "result.json"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_rows(rows, folder / "train.jsonl")
        tune(cell.model, folder / "train.jsonl", folder / "adapter", options=recipe, device=device, dtype=dtype)
        found = _look(cell, task, folder, generate, device, dtype)
        part = done.with_suffix(".part")
        part.write_text(json.dumps(found), encoding="utf-8")
        part.replace(done)
        shutil.rmtree(folder / "adapter")
        reporter.note(f"trained again on {len(rows)} of {len(task.train)} rows")
    found = json.loads(done.read_text(encoding="utf-8"))
    return Retrained(np.array(found["loss"]), np.array(found["behaves"], dtype=bool))


def _look(
    cell: Cell, task: Task, folder: Path, generate: bool, device: str | None, dtype: str | None
) -> dict[str, Any]:
    from datablame.capture import capture

    loaded = load(ModelSpec(cell.model, str(folder / "adapter"), device, dtype))
    encoder = Encoding(loaded.tokenizer, None, loaded.max_length)
    seen = capture(loaded.model, encode_rows(encoder, task.queries), {}, [])
    said = answers(loaded, [encoder.prompt_ids(e) for e in task.queries], MAX_NEW_TOKENS) if generate else []
    return {
        "loss": (seen["loss"] / seen["length"])[:, 0].tolist(),
        "behaves": [task.behaves(e, a) for e, a in zip(task.queries, said, strict=False)],
    }


# ---------------------------------------------------------------- removal


def top_rows(scores: Matrix, queries: Sequence[int], k: int) -> list[int]:
    """The k training rows with the highest mean rank over a group of queries; ties in the order of rows."""
    from scipy.stats import rankdata

    mean = rankdata(scores[list(queries)], axis=1).mean(axis=0)
    return np.argsort(-mean, kind="stable")[:k].tolist()


def random_rows(n: int, k: int, seed: int) -> list[int]:
    """Chance: k of n rows."""
    return sorted(np.random.default_rng(seed).choice(n, size=k, replace=False).tolist())


# ---------------------------------------------------------------- linear datamodeling score


def half_sets(n: int, count: int, seed: int) -> Bool[np.ndarray, "count n"]:
    """Random halves of n rows; one a row."""
    rng = np.random.default_rng(seed)
    sets = np.zeros((count, n), dtype=bool)
    for s in sets:
        s[rng.choice(n, size=n // 2, replace=False)] = True
    return sets


def lds(
    scores: Matrix, sets: Bool[np.ndarray, "count n"], losses: Float[np.ndarray, "count m"]
) -> Float[np.ndarray, " m"]:
    """Each query's Spearman correlation of its loss with −Σ of the half-set's scores; 0 where one does not vary."""
    return rank_correlations(-(scores @ sets.T.astype(np.float64)), losses.T)


def rank_correlations(a: Float[np.ndarray, "m s"], b: Float[np.ndarray, "m s"]) -> Float[np.ndarray, " m"]:
    """Spearman's correlation of each row; 0 where one of the two does not vary."""
    from scipy.stats import rankdata

    x, y = rankdata(a, axis=1), rankdata(b, axis=1)
    x, y = x - x.mean(axis=1, keepdims=True), y - y.mean(axis=1, keepdims=True)
    norms = np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))
    return np.divide((x * y).sum(axis=1), norms, out=np.zeros(len(a)), where=norms > 0)


def noise_ceiling(first: Float[np.ndarray, "count m"], second: Float[np.ndarray, "count m"]) -> Float[np.ndarray, " m"]:
    """Each query's correlation between the losses of the same half-sets under two seeds.

    With r this correlation, no method can be expected to do better than about √r against the losses of one seed, and
    than √(2r/(1 + r)) against the mean of the two (Spearman and Brown).
    """
    return rank_correlations(first.T, second.T)
