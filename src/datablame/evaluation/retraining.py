"""Retraining truth: what really happens to the queries when training rows are taken away.

    removal   the rows that a method ranks highest for a group of queries are dropped, and the adapter trained again:
              the more the queries' loss rises, the more those rows were responsible
    lds       linear datamodeling score (Park et al. 2023, TRAK, 2303.14186): over random half-sets, the rank
              correlation of a query's loss after training on the half-set with minus the half-set's summed scores

What came of every retraining is kept by the digest of its rows and queries, and its adapter with all other fine-tunes
(finetunes.py, without checkpoints), so that no set is trained twice. Processes that are
started with the same command share them: each takes trainings that no other has begun.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datablame.encoding import Encoding, encode_rows
from datablame.errors import UserError
from datablame.evaluation import finetunes
from datablame.evaluation.cell import MAX_NEW_TOKENS, Cell, options
from datablame.evaluation.finetunes import fine_tuned
from datablame.evaluation.tasks import Task
from datablame.indexing import SILENT, Reporter
from datablame.locks import alone
from datablame.models import ModelSpec, answers, load
from datablame.store import read_kept, write_whole
from datablame.tuning import TuneOptions

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    from datablame.examples import Example

    Matrix = Float[np.ndarray, "m n"]


@dataclass(frozen=True)
class Retrained:
    """After training on some rows. loss: mean over each query's response tokens, `[m]`. behaves: `[m]`, or empty.

    seconds: of the training and the look; None for what was kept before they were.
    """

    loss: Float[np.ndarray, " m"]
    behaves: Bool[np.ndarray, " m"]
    seconds: float | None


@dataclass(frozen=True, eq=False)
class Job:
    """One training with a cell's recipe, and a look at the queries.

    kept: positions of the rows. seed: of initialisation and order. generate: are the queries answered, too?
    Raises UserError where no row is kept.
    """

    cell: Cell
    task: Task
    kept: tuple[int, ...]
    seed: int
    generate: bool

    def __post_init__(self) -> None:
        if not self.kept:
            raise UserError("there is nothing to retrain on: every row was dropped.")

    @property
    def rows(self) -> list[Example]:
        """The kept rows, in their order."""
        return [self.task.train[i] for i in sorted(self.kept)]

    @property
    def recipe(self) -> TuneOptions:
        """The cell's, without what it keeps and where it may stop."""
        return replace(options(self.cell, self.task), keep=0, early_stop=0, seed=self.seed)

    def folder(self, work: Path) -> Path:
        """Where in `work`, which holds the trainings of one model, this one is kept."""
        seen = [[(e.id, e.messages) for e in some] for some in (self.rows, self.task.queries)]
        what = [self.cell.recipe, str(self.recipe), self.task.name, self.task.version, seen, self.generate]
        what += [finetunes.VERSION] if finetunes.VERSION > 1 else []  # those of the first have none in their name
        return work / hashlib.sha256(json.dumps(what).encode()).hexdigest()[:24]

    def found(self, work: Path) -> Retrained | None:
        """What came of it; None where it has not been done."""
        done = self.folder(work) / "result.json"
        if not done.exists():
            return None
        found = read_kept(done)
        return Retrained(np.array(found["loss"]), np.array(found["behaves"], dtype=bool), found.get("seconds"))


def retrain(
    job: Job,
    work: Path,
    *,
    model_sha256: str,
    wait: bool = True,
    device: str | None = None,
    dtype: str | None = None,
    reporter: Reporter = SILENT,
) -> Retrained | None:
    """What came of a job, done now where it has not been; None where another process is at it and `wait` is False."""
    folder = job.folder(work)
    if (there := job.found(work)) is not None:
        return there
    with alone(folder.with_suffix(".lock"), wait=wait) as first:
        if first and job.found(work) is None:
            _train(job, folder, model_sha256, device, dtype)
            reporter.note(f"trained again on {len(job.kept)} of {len(job.task.train)} rows")
    return job.found(work)


def retrain_all(jobs: Iterable[Job], work: Path, *, reporter: Reporter = SILENT, **options: Any) -> Iterator[Job]:
    """Do every job, and give it when it is done; those of another process come last, and are waited for.

    A process that ends before its job is done leaves it to the one that waits. options: as in `retrain`.
    """
    options["reporter"] = reporter
    others = []
    for job in jobs:
        if retrain(job, work, wait=False, **options) is None:
            others.append(job)
        else:
            yield job
    while others:
        free = [job for job in others if retrain(job, work, wait=False, **options) is not None]
        if not free:
            reporter.note(f"waiting for another process; {len(others)} trainings are not done")
            retrain(others[0], work, wait=True, **options)
            free = others[:1]
        others = [job for job in others if job not in free]
        yield from free


def _train(job: Job, folder: Path, model_sha256: str, device: str | None, dtype: str | None) -> None:
    start = time.perf_counter()
    adapter = fine_tuned(
        job.cell.model,
        job.rows,
        job.recipe,
        model_sha256=model_sha256,
        checkpoints=False,
        device=device,
        dtype=dtype,
    )
    found = _look(job, adapter, device, dtype) | {"seconds": round(time.perf_counter() - start, 1)}
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "result.json", json.dumps(found).encode())


def _look(job: Job, adapter: Path, device: str | None, dtype: str | None) -> dict[str, Any]:
    from datablame.capture import capture

    queries = job.task.queries
    loaded = load(ModelSpec(job.cell.model, str(adapter), device, dtype))
    encoder = Encoding(loaded.tokenizer, None, loaded.max_length)
    seen = capture(loaded.model, encode_rows(encoder, queries), {}, [])
    said = answers(loaded, [encoder.prompt_ids(e) for e in queries], MAX_NEW_TOKENS) if job.generate else []
    return {
        "loss": (seen["loss"] / seen["length"])[:, 0].tolist(),
        "behaves": [job.task.behaves(e, a) for e, a in zip(queries, said, strict=False)],
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
    """Each query's Spearman correlation of its loss with −Σ of the half-set's scores; 0 where one does not vary.

    Raises UserError for scores that are not finite.
    """
    if not np.isfinite(scores).all():
        bad = int((~np.isfinite(scores)).sum())
        raise UserError(f"{bad} of {scores.size} scores are not finite: delete the cell's result, and run it again.")
    return rank_correlations(-(scores @ sets.T.astype(np.float64)), losses.T)


def standard_error(without: Float[np.ndarray, " s"]) -> float:
    """Of a statistic of s sets, from its values without each of them: the jackknife (Tukey 1958)."""
    s = len(without)
    return float(np.sqrt((s - 1) / s * ((without - without.mean()) ** 2).sum()))


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
