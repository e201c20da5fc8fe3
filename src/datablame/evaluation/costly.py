"""Runs of a cell whose features cost passes of their own: gradients at checkpoints, and all that is an extra.

Each kind of features is captured beside the usual ones, scored, and deleted before the next, so that one that fails
takes no other with it, and the disk holds one at a time. An interrupted capture goes on where it was.

    in the cell's folder        CAPTURED-SCHEMA (train, reference, generated, products), such as kfac-3
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datablame.checkpoints import find
from datablame.encoding import encode_rows
from datablame.errors import UserError
from datablame.evaluation.cell import RESPONSES, Opened, kept_results, token_loss
from datablame.evaluation.scoring import Scored, score_runs
from datablame.evaluation.suites import Beyond, beyond, split
from datablame.evaluation.tasks import Task
from datablame.extras import parse_list
from datablame.indexing import CaptureOptions, Engine, Reporter, digest, fill
from datablame.methods import Method, parse
from datablame.store import SCHEMA, DiskError, FeatureStore, check_disk, write_whole
from datablame.tracing import product_of

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from datablame.encoding import Encoded
    from datablame.examples import Example
    from datablame.operators import Matrix, Product

    Results = dict[str, dict[str, Scored]]

PRODUCTS = "products"
"""Directory of curvature products, beside the stores of one kind of features."""
CHECKPOINTS = 4
"""So many of a training are taken, about as far apart; the last is the adapter's own."""
OPERATOR = {"rows": 32, "queries": 8, "steps": 20}
"""Limits for products with the live model's curvature: each takes passes over all rows for every query."""
CHUNK = 16
"""Vectors of a product that are multiplied, and kept, at once: at most so many are lost when it is interrupted."""
VECTORS = 128
"""Limit, rows and queries together, for a method without steps: one product with so many vectors, all in memory."""


def groups(runs: Sequence[str]) -> dict[Beyond, list[str]]:
    """Runs by what they need; those that need nothing beyond the usual are left out."""
    out: dict[Beyond, list[str]] = {}
    for run in runs:
        if need := beyond(run):
            out.setdefault(need, []).append(run)
    return out


def costly_results(
    o: Opened, task: Task, need: Beyond, runs: Sequence[str], *, loss: float, keep: bool, reporter: Reporter
) -> dict[str, dict[str, Any]]:
    """`{set of responses: {run: …}}` as a result file keeps it, beside it `captured`, and the seconds of that.

    loss: of the reference responses, as the cell's result has it: runs of another fine-tune do not join it.
    Where the features cannot be captured, every run says why.
    """
    start, steps, seconds = time.perf_counter(), list[int](), 0.0
    sets = [s for s in RESPONSES if s in o.rows]
    refused = {s: {run: why for run in runs if (why := limited(run, task, s))} for s in sets}
    scored: Results = {s: {run: Scored(None, why, 0.0, limit=True) for run, why in refused[s].items()} for s in refused}
    left = {s: [run for run in runs if run not in refused[s]] for s in sets}
    folder = o.folder / f"{re.sub('[^a-z0-9]+', '-', need.spelling)}-{SCHEMA}"
    try:
        options, steps = _options(o, need)
        stores = _captured(o, options, folder, reporter) if any(left.values()) else {}
        seconds = round(time.perf_counter() - start, 1)
        if stores:
            _check_same(token_loss(stores["reference"])["tuned"], loss)
        for s in (s for s in sets if left[s]):
            scored[s] |= score_runs(
                left[s], train := stores["train"], stores[s], reporter, _products(o, task, train, folder)
            )
    except DiskError:  # no fault of the method
        raise
    except Exception as e:  # an extra of a user's own may raise what it likes
        why = str(e) if isinstance(e, UserError) else f"{type(e).__name__}: {e}"
        for s in sets:
            scored[s] |= {run: Scored(None, why, 0.0) for run in left[s]}
    if not keep:
        failed = any(x.error and not x.limit for found in scored.values() for x in found.values())
        _delete(folder, but=PRODUCTS if failed else None)
    results = kept_results(task, scored, o.folder)
    captured = {"captured": need.spelling, "capture_seconds": seconds} | ({"checkpoints": steps} if steps else {})
    return {s: {run: found[run] | captured for run in runs} for s, found in results.items()}


def _check_same(found: float, loss: float) -> None:
    """The same seed gives the same fine-tune up to rounding, also where it is made again on another machine."""
    if abs(found - loss) > 0.01 * loss:
        raise UserError(
            f"the fine-tune in the cache has a loss of {found:.4f} on the queries, that of the cell's result "
            f"{loss:.4f}: it is another one. Delete the result, and run the cell again."
        )


def _products(o: Opened, task: Task, train: FeatureStore, folder: Path) -> Callable[[Method], Product]:
    """Products of the cell's curvature for each method, kept in `folder` under what they are of."""

    def product(method: Method) -> Product:
        made = product_of(train, o.loaded, o.encoder, method, len(task.queries))
        return kept_products(made, folder / PRODUCTS, json.dumps(train.settings, sort_keys=True))

    return product


def kept_products(product: Product, folder: Path, of: str) -> Product:
    """The same, kept in files of CHUNK vectors each: runs that differ in damping alone share them, and an interrupted
    cell has them still.

    of: all that decides a product but the matrix and the vectors. The seconds of the first run hold those of its
    products, the others' do not. Raises DiskError where one cannot be written.
    """
    import torch

    def times(matrix: Matrix, x: Float[Tensor, "k D"]) -> Float[Tensor, "k D"]:
        return torch.cat([some(matrix, part) for part in x.split(CHUNK)])

    def some(matrix: Matrix, x: Float[Tensor, "k D"]) -> Float[Tensor, "k D"]:
        sha = hashlib.sha256(f"{matrix} {of} ".encode())
        sha.update(np.ascontiguousarray(x.numpy()).tobytes())
        place = folder / f"{matrix}-{sha.hexdigest()[:16]}.npy"
        if not place.exists():
            folder.mkdir(parents=True, exist_ok=True)
            np.save(file := io.BytesIO(), product(matrix, x).numpy())
            write_whole(place, file.getvalue())
        return torch.from_numpy(np.load(place, allow_pickle=False))

    return times


def _delete(folder: Path, but: str | None) -> None:
    """All that was captured; a run that failed is tried again on the products that it had."""
    for part in folder.iterdir() if but and folder.exists() else [folder]:
        if part.name != but:
            shutil.rmtree(part, ignore_errors=True)


def limited(run: str, task: Task, responses: str = "reference") -> str:
    """Why this run is beyond a limit on this set of responses; empty where it is not."""
    method = parse(split(run)[0])
    if method.needs != "operator":
        return ""
    sizes = {"rows": len(task.train), "queries": len(task.queries)}
    if hasattr(method, "steps"):
        sizes["steps"] = method.steps
        too_many = any(size > OPERATOR[what] for what, size in sizes.items())
        most = ", ".join(f"{limit} {what}" for what, limit in OPERATOR.items())
    else:
        too_many, most = sum(sizes.values()) > VECTORS, f"{VECTORS} of both together"
    if too_many:
        return f"{', '.join(f'{size} {what}' for what, size in sizes.items())}: a cell allows at most {most}."
    return "" if responses == "reference" else "Products with the curvature are for the reference responses alone."


def _options(o: Opened, need: Beyond) -> tuple[CaptureOptions, list[int]]:
    """How to capture, and the steps of the checkpoints: those nearest to equal parts of the training."""
    if not need.checkpoints:
        return CaptureOptions(extras=need.extras), []
    there = [c.step for c in find(str(o.loaded.spec.adapter), "all")]
    parts = [there[-1] * k / CHECKPOINTS for k in range(1, CHECKPOINTS + 1)]
    steps = sorted({min(there, key=lambda s: abs(s - part)) for part in parts})
    return CaptureOptions(checkpoints=",".join(map(str, steps)), extras=need.extras), steps


def _captured(o: Opened, options: CaptureOptions, folder: Path, reporter: Reporter) -> dict[str, FeatureStore]:
    """Training rows with all that `datablame index` would capture, queries with all that `datablame trace` would."""
    of_queries = ",".join(spec for spec, extra in parse_list(options.extras).items() if extra.on_queries)
    engines = {"train": Engine(o.loaded, options)}
    engines |= dict.fromkeys(RESPONSES, Engine(o.loaded, replace(options, extras=of_queries or None)))
    encoded = {name: encode_rows(o.encoder, examples) for name, examples in o.rows.items()}
    needed = sum(engines[name].row_bytes * len(rows) for name, rows in encoded.items()) + engines["train"].sum_bytes
    check_disk(folder, needed)
    stores: dict[str, FeatureStore] = {}
    for name, rows in encoded.items():
        settings = {**engines[name].settings(), "train_sha256": digest(o.rows[name], rows)}
        stores[name] = _store(engines[name], folder / name, settings, o.rows[name], rows, stores.get("train"), reporter)
    return stores


def _store(
    engine: Engine,
    folder: Path,
    settings: Mapping[str, Any],
    examples: list[Example],
    rows: list[Encoded],
    train: FeatureStore | None,
    reporter: Reporter,
) -> FeatureStore:
    """One store. train: of the training rows, where extras find what they prepared; None for that store itself."""

    def tensors() -> dict[str, Tensor]:
        return engine.adapter_tensors(rows) if train is None else {}

    store = FeatureStore.create(folder, settings, engine.widths, examples, engine.dtype, tensors)
    fill(store, rows, partial(engine.capture, kept=(train or store).adapter), reporter)
    return FeatureStore.open(folder)
