"""The last stages of a cell: every run scores the queries, and is measured against the truth."""

from __future__ import annotations

import base64
import hashlib
import inspect
import io
import json
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tokenize import TokenError
from typing import TYPE_CHECKING, Any, NamedTuple
from zipfile import BadZipFile

import numpy as np

from datablame import __version__
from datablame.diagnostics import hubs, query_independent_share
from datablame.errors import UserError
from datablame.evaluation import metrics, views
from datablame.evaluation.suites import FIGURE, split
from datablame.evaluation.tasks import Task
from datablame.indexing import Reporter
from datablame.methods import Method, parse
from datablame.store import DiskError, FeatureStore, write_whole
from datablame.tracing import Inputs

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from datablame.operators import Product

    Matrix = Float[np.ndarray, "m n"]


DAMAGED = (ValueError, KeyError, EOFError, BadZipFile, TokenError, zlib.error)
"""What reading a damaged file of arrays may raise."""


class Scored(NamedTuple):
    """What a run gave: `[m, n]`, or why not; and the seconds that it took, features read from disk included.

    residual: of a solver, the median over queries and blocks. limit: was it refused for one, and not tried?
    """

    values: Matrix | None
    error: str
    seconds: float
    residual: float | None = None
    limit: bool = False


class CellInputs(Inputs):
    """What a method needs, from the stores of training rows and queries, under one view of the loss."""

    def __init__(
        self,
        train: FeatureStore,
        queries: FeatureStore,
        view: str | None,
        product: Callable[[Method], Product] | None = None,
    ) -> None:
        super().__init__(train, queries.examples, {}, product=product)
        self.query_store, self.view = queries, view or "response"

    def of_train(self, kind: str) -> Mapping[str, Tensor]:
        """Features of the training rows."""
        return views.gradients(self.store, self.view) if kind == "gradients" else self.store.features(kind)

    def of_queries(self, kind: str) -> Mapping[str, Tensor]:
        """Features of the queries."""
        store = self.query_store
        return views.gradients(store, self.view) if kind == "gradients" else store.features(kind)


def score_runs(
    runs: Sequence[str],
    train: FeatureStore,
    queries: FeatureStore,
    reporter: Reporter,
    product: Callable[[Method], Product] | None = None,
    kept: Path | None = None,
) -> dict[str, Scored]:
    """Every run on one set of responses; one that fails says why, and the others go on. product: as in `Inputs`.

    kept: a directory for what is scored, so that what is interrupted goes on.
    """
    out: dict[str, Scored] = {}
    reporter.start("score", len(runs), "runs")
    for run in runs:
        place = None if kept is None else kept / f"{_decided(run, train, queries)}.npz"
        if (found := _read(place, run)) is None:
            found = _scored(run, train, queries, product)
            _keep(place, run, found)
        out[run] = found
        reporter.advance(1)
    reporter.end()
    return out


def _scored(
    run: str, train: FeatureStore, queries: FeatureStore, product: Callable[[Method], Product] | None
) -> Scored:
    spec, view = split(run)
    start, values, error, residual = time.perf_counter(), None, "", None
    try:
        method = parse(f"random:seed={_noise(train)}" if spec == "random" else spec)
        values = _checked(CellInputs(train, queries, view, product).score(method), len(queries), len(train))
        residual = _residual(method)
    except DiskError:  # no fault of the method
        raise
    except UserError as e:
        values, error = None, str(e)
    except Exception as e:  # a method of a user's own may raise what it likes
        values, error = None, f"{type(e).__name__}: {e}"
    return Scored(values, error, round(time.perf_counter() - start, 2), residual)


def _decided(run: str, train: FeatureStore, queries: FeatureStore) -> str:
    """Of all that decides a run's scores: its spelling, the features, this package and the source of its method."""
    stored = [[shard["sha256"] for shard in store.manifest["shards"]] for store in (train, queries)]
    try:
        source = inspect.getsource(inspect.getmodule(type(parse(split(run)[0]))))  # type: ignore[arg-type]
    except (OSError, TypeError):  # not of a file
        source = ""
    return hashlib.sha256(json.dumps([__version__, run, source, stored]).encode()).hexdigest()[:32]


def _keep(place: Path | None, run: str, scored: Scored) -> None:
    """One run's scores; none of one that failed, which is tried again."""
    if place is None or scored.values is None:
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    residual = np.nan if scored.residual is None else scored.residual
    np.savez(file := io.BytesIO(), values=scored.values, run=run, seconds=scored.seconds, residual=residual)
    write_whole(place, file.getvalue())


def _read(place: Path | None, run: str) -> Scored | None:
    """What `_keep` wrote of this run; None where there is nothing, or what cannot be read."""
    try:
        with np.load(place or "", allow_pickle=False) as file:
            values, of, seconds, residual = (file[k] for k in ("values", "run", "seconds", "residual"))
    except (OSError, *DAMAGED):
        return None
    return Scored(values, "", float(seconds), None if np.isnan(residual) else float(residual)) if of == run else None


def _noise(train: FeatureStore) -> int:
    """A seed for the level of chance that is of these training rows: no two cells have the same noise."""
    return int(train.settings["train_sha256"][:12], 16)


def _residual(method: Method) -> float | None:
    """The median that a solver left; None for what does not solve."""
    left = getattr(method, "residual", None)
    if not isinstance(left, dict) or not left:
        return None
    median = float(np.median(next(iter(left.values())).numpy()))
    if not np.isfinite(median):
        raise UserError("what its solver left is not finite.")
    return median


def _checked(values: Matrix, m: int, n: int) -> Matrix:
    """A method of a user's own may forget the rule that a score is finite: its run fails, and not the cell."""
    if values.shape != (m, n):
        raise UserError(f"the scores have the shape {values.shape}, not {m} queries × {n} training rows.")
    if not np.isfinite(values).all():
        raise UserError(f"{int((~np.isfinite(values)).sum())} of {values.size} scores are not finite.")
    return values


def measured(task: Task, run: str, scored: Scored) -> dict[str, Any]:
    """What a result keeps of a run: `{metric: [m], query_independent_share, hub, top, seconds}`, or its error.

    shares: that of single groups of queries, see `_shares`, where there are such groups. top: the highest training row
    of each query. hub: of how many queries the most frequent one is. heat: for FIGURE runs, the scores in 256 steps
    from the lowest to the highest of each query, one byte each.
    """
    values = scored.values
    if values is None:
        return {"error": scored.error, "seconds": scored.seconds} | ({"limit": True} if scored.limit else {})
    found: dict[str, Any] = {k: rounded(v) for k, v in metrics.per_query(values, task.truth, n_classes(task)).items()}
    found["query_independent_share"] = _share(values)
    if shares := _shares(task, values):
        found["shares"] = shares
    found["hub"] = hubs(values)[1]
    found["top"] = values.argmax(axis=1).tolist()
    if scored.residual is not None:
        found["residual"] = float(f"{scored.residual:.4g}")
    if run in FIGURE:
        found["heat"] = heat(values)
    return found | {"seconds": scored.seconds}


def _share(values: Matrix) -> float | None:
    share = query_independent_share(values)
    return round(share, 5) if np.isfinite(share) else None


def _shares(task: Task, values: Matrix) -> dict[str, float | None]:
    """The query-independent share among the main queries and in each group, where these are some and of one class."""
    sets = {"main": task.main} | {group: (group,) for group in task.groups}
    rows = {name: [j for j, g in enumerate(task.groups) if g in some] for name, some in sets.items()}
    alike = {name: js for name, js in rows.items() if len({task.queries[j].label for j in js}) == 1}
    return {name: _share(values[js]) for name, js in alike.items() if len(js) < len(task.queries)}


def n_classes(task: Task) -> int:
    """Classes among the training rows, as the paper's coverage counts them."""
    return len({e.label for e in task.train})


def heat(scores: Matrix) -> str:
    """Base64 of `[m, n]` bytes: 0 at each query's lowest score, 255 at its highest."""
    low, high = scores.min(axis=1, keepdims=True), scores.max(axis=1, keepdims=True)
    steps = np.rint(255 * (scores - low) / np.where(high > low, high - low, 1.0))
    return base64.b64encode(steps.astype(np.uint8).tobytes()).decode()


def rounded(values: Float[np.ndarray, " m"]) -> list[float]:
    """To four digits, for a file."""
    return [round(float(v), 4) for v in values]


def keep_matrices(path: Path, scored: Mapping[str, Scored]) -> None:
    """Write the score matrices, beside those of earlier runs in the same file, as far as it can be read."""
    try:
        matrices = read_matrices(path) if path.exists() else {}
    except UserError:
        matrices = {}
    matrices |= {run: s.values for run, s in scored.items() if s.values is not None}
    np.savez_compressed(file := io.BytesIO(), **matrices)  # type: ignore[arg-type]
    write_whole(path, file.getvalue())


def read_matrices(path: Path) -> dict[str, Matrix]:
    """`{run: [m, n]}`. Raises UserError for a damaged file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {run: file[run].astype(np.float64) for run in file.files}  # older ones are in float32
    except DAMAGED as e:
        raise UserError(f"{path}: damaged; delete it, and run the cell again into another directory.") from e
