"""Every method beside the exact solution, over a sweep of damping: `datablame compare`."""

from __future__ import annotations

import dataclasses
import json
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datablame import methods as registry
from datablame.diagnostics import CONTROLS, base_name, rank_correlation, top_overlap, top_size
from datablame.errors import UserError
from datablame.examples import Columns, Example, load_examples
from datablame.indexing import SILENT, Reporter
from datablame.methods import Method
from datablame.methods.blockwise import OnGradients
from datablame.scores import check_out
from datablame.store import FeatureStore
from datablame.tracing import (
    Inputs,
    available,
    capture_queries,
    check_available,
    encoder_of,
    load_for,
    product_of,
    told,
)

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Float

    Matrix = Float[np.ndarray, "m n"]

REFERENCE = "exact"
DAMPINGS = (1e-1, 1e1, 1e3)
"""The paper's λ, and up to where λ is as large as the curvature for weights/rows of a thousand."""
GRADIENT_METHODS = (
    "exact",
    "exact-block",
    "datainf",
    "lissa",
    "lissa:steps=inf",
    "lissa:protocol=paper",
    "gauss-newton",
    "graddot",
    "gradcos",
    "adamdot",
    "tracincp",
    "kfac",
    "ekfac",
    "trackstar",
    "less",
    "trak",
    "dda",
)
DEFAULT_METHODS = (*GRADIENT_METHODS, "bif", "daunce", "repsim", "rept", "concept", *reversed(CONTROLS))


@dataclass(frozen=True)
class Row:
    """One method at one damping against `exact` at the same damping. None: there is no such number.

    damped: whether the method has a damping; the others run once and stand beside every damping.
    seconds: of fit and scores, reading the index included; of a damped method for the whole sweep.
    spearman, top: rank correlation over training rows, and the share of its top rows that `exact` has among its own
        (`top_size` of them: 10, fewer for small files), averaged over queries.
    raw: `‖S − E‖/‖E‖`, Frobenius norms of the score matrices; scaled: `min_a ‖aS − E‖/‖E‖`.
    residual: the solver's `‖αHr − v‖/‖v‖`, median over queries and blocks.
    error: why it has no scores.
    """

    method: str
    damping: float
    damped: bool
    seconds: float | None = None
    spearman: float | None = None
    top: float | None = None
    raw: float | None = None
    scaled: float | None = None
    residual: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Agreement:
    """Every method with every other at one damping, near ones beside each other; None: one of them ranks nothing."""

    damping: float
    methods: list[str]
    spearman: list[list[float | None]]
    top: list[list[float]]


@dataclass(frozen=True)
class Comparison:
    """`rows`, method by method over the dampings, and `agreement`, one for each damping.

    scores: `{method: {damping: [m, n]}}` of the methods that did not fail, and of `exact`.
    """

    rows: list[Row]
    agreement: list[Agreement]
    dampings: list[float]
    queries: Sequence[Example]
    train: Sequence[Example]
    scores: dict[str, dict[float, Matrix]]
    notes: Sequence[str] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    def to_pandas(self) -> pd.DataFrame:
        """One line a row, columns as the fields of `Row`."""
        import pandas as pd

        kinds = {"method": object, "damped": bool, "error": object}
        frame = pd.DataFrame([dataclasses.asdict(r) for r in self.rows])
        return frame.astype({c: kinds.get(c, float) for c in frame.columns})

    def to_json(self) -> dict[str, Any]:
        """What `compare.json` holds."""
        return {
            "version": 1,
            "reference": REFERENCE,
            "dampings": self.dampings,
            "queries": [q.id for q in self.queries],
            "training_rows": len(self.train),
            "top_size": top_size(len(self.train)),
            "rows": [dataclasses.asdict(r) for r in self.rows],
            "agreement": [dataclasses.asdict(a) for a in self.agreement],
            "notes": list(self.notes),
            "settings": self.settings,
        }

    def save(self, out: str | Path) -> list[Path]:
        """Write compare.json, compare.parquet and compare.html into the directory `out`; their paths."""
        from datablame.report.compare import write_comparison

        out = Path(out)
        check_out(out)
        try:
            text = json.dumps(self.to_json(), indent=1, allow_nan=False)  # ASCII: halves of surrogates survive
            (out / "compare.json").write_text(text + "\n", encoding="utf-8")
            self.to_pandas().to_parquet(out / "compare.parquet", index=False)
            return [out / "compare.json", out / "compare.parquet", write_comparison(self, out / "compare.html")]
        except OSError as e:
            raise UserError(f"--out {out}: cannot be written ({e.strerror or e}).") from e


def compare(
    index: FeatureStore | str | Path,
    query: str | Path,
    *,
    methods: Sequence[str] | None = None,
    dampings: Sequence[float] = DAMPINGS,
    model: str | None = None,
    adapter: str | None = None,
    device: str | None = None,
    columns: Columns | None = None,
    reporter: Reporter = SILENT,
) -> Comparison:
    """Run `methods` on the queries of the file `query`, and measure each against `exact` at the same damping.

    dampings: relative, above 0 (λ over the mean eigenvalue, in each block); each method is factorised once for all
    of them. methods: spellings as in `trace`, without a damping of their own; by default all that make sense.

    Raises UserError for an index without gradients, a bad damping, an unknown method, or another model than the
    index's. A method that fails on these gradients becomes a row that says so.
    """
    store = index if isinstance(index, FeatureStore) else FeatureStore.open(index)
    dampings = check_dampings(dampings)
    if not available(store, [REFERENCE]):
        raise UserError(f"{store.path}: holds no gradients, so nothing can be compared. Index with --blocks.")
    specs = list(dict.fromkeys(methods if methods is not None else available_specs(store)))
    if not specs:
        raise UserError("--method: no method named.")
    chosen = {spec: _parsed(spec, store) for spec in specs}
    queries = load_examples(query, columns)
    if any(q.against for q in queries):
        raise UserError(f"{query}: has a column `against`. Contrast queries are for trace; compare takes plain ones.")
    loaded = load_for(store, model, adapter, device)
    encoder = encoder_of(store, loaded)
    captured = capture_queries(store, loaded, encoder, queries, reporter, [m.needs for m in chosen.values()])
    inputs = Inputs(
        store,
        queries,
        captured,
        product=lambda method: product_of(store, loaded, encoder, method, len(queries), reporter),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        reference = _run(registry.create(REFERENCE), inputs, dampings)
        runs = {}
        for spec, method in chosen.items():
            runs[spec] = reference if spec == REFERENCE else _run(method, inputs, dampings, reporter)
    if reference.errors:
        raise UserError(f"there is no exact solution to compare with. {next(iter(reference.errors.values()))}")
    notes = told(caught)
    for note in notes:
        reporter.note(note)
    rows = [
        _row(spec, d, run, _on_scale(spec, chosen[spec]), reference) for spec, run in runs.items() for d in dampings
    ]
    scores = {spec: run.scores for spec, run in {**runs, REFERENCE: reference}.items() if run.scores}
    named = {spec: s for spec, s in scores.items() if spec in chosen}
    return Comparison(
        rows, _agreements(named, dampings), dampings, queries, store.examples, scores, notes, store.settings
    )


# ---------------------------------------------------------------- what is asked for


def parse_dampings(text: str) -> list[float]:
    """`1e-3,1e-2` to numbers."""
    try:
        return check_dampings([float(part) for part in text.split(",")])
    except ValueError as e:
        raise UserError(f"--damping {text!r}: use numbers above 0, separated by commas, such as 1e-3,1e-2.") from e


def check_dampings(dampings: Sequence[float]) -> list[float]:
    """The dampings as they are; UserError for none, one twice, or one that is not above 0 and finite."""
    for damping in dampings:
        if isinstance(damping, bool) or not isinstance(damping, int | float) or not 0 < damping < math.inf:
            raise UserError(f"--damping: {damping!r}; use numbers above 0.")
    if not len(dampings) or len(set(dampings)) < len(dampings):
        raise UserError("--damping: name at least one, and none twice.")
    return [float(d) for d in dampings]


def available_specs(store: FeatureStore) -> list[str]:
    """Those of DEFAULT_METHODS whose input the index holds."""
    return [s for s in DEFAULT_METHODS if available(store, [base_name(s)])]


def _parsed(spec: str, store: FeatureStore) -> Method:
    method = registry.parse(spec)
    options = [part.partition("=")[0].strip() for part in spec.partition(":")[2].split(",")]
    if "damping" in options:
        raise UserError(f"{spec}: damping is swept for all methods alike; leave it out here and use --damping.")
    if "unit" in options:
        raise UserError(
            f"{spec}: dampings are compared in one unit, mean eigenvalues; leave unit out, and sweep further."
        )
    check_available(spec, method, store)
    return method


def _on_scale(spec: str, method: Method) -> bool:
    """Whether its scores can be near the exact ones at all, up to a factor: they are made of gradients."""
    return isinstance(method, OnGradients) and base_name(spec) not in CONTROLS


# ---------------------------------------------------------------- runs


@dataclass
class _Run:
    """What a method gave, by damping: scores `[m, n]`, median residual, or why not."""

    damped: bool
    seconds: float = 0.0
    scores: dict[float, Matrix] = field(default_factory=dict)
    residual: dict[float, float] = field(default_factory=dict)
    errors: dict[float, str] = field(default_factory=dict)


def _run(method: Any, inputs: Inputs, dampings: Sequence[float], reporter: Reporter = SILENT) -> _Run:
    """One sweep, or one run of a method without damping. Where a sweep fails, each damping by itself."""
    run = _Run(damped=hasattr(method, "sweep"))
    start = time.perf_counter()
    for part in (dampings, *([d] for d in dampings)):
        if len(run.scores) + len(run.errors) == len(dampings):
            break
        try:
            _attempt(run, method, inputs, part, last=not run.damped or len(part) == 1)
        finally:
            reporter.end()
    run.seconds = time.perf_counter() - start
    return run


def _attempt(run: _Run, method: Any, inputs: Inputs, dampings: Sequence[float], last: bool) -> None:
    """Fill in `run` for `dampings`; a failure is recorded when it is the last attempt."""
    try:
        scores = inputs.sweep(method, dampings) if run.damped else dict.fromkeys(dampings, inputs.score(method))
        shape = (len(inputs.queries), len(inputs.store.examples))
        for damping, s in scores.items():
            if s.shape != shape or not np.isfinite(s).all():
                raise UserError(f"scores {s.shape}, expected {shape} finite numbers (damping {damping:g}).")
    except Exception as e:  # whatever a method does, the others are told
        if last:
            text = str(e) if isinstance(e, UserError) else f"{type(e).__name__}: {e}"
            run.errors.update(dict.fromkeys(dampings, text))
        return
    run.scores.update(scores)
    residual: Mapping[float, Any] = getattr(method, "residual", {}) if run.damped else {}
    run.residual.update({d: float(np.median(r.numpy())) for d, r in residual.items() if d in scores})


# ---------------------------------------------------------------- numbers


def _row(spec: str, damping: float, run: _Run, on_scale: bool, reference: _Run) -> Row:
    if damping in run.errors:
        return Row(spec, damping, run.damped, error=run.errors[damping])
    s, e = run.scores[damping], reference.scores[damping]
    raw, scaled = relative_errors(s, e) if on_scale else (None, None)
    rho, residual = _or_none(rank_correlation(s, e)), run.residual.get(damping)
    return Row(spec, damping, run.damped, run.seconds, rho, top_overlap(s, e), raw, scaled, residual)


def relative_errors(s: Matrix, e: Matrix) -> tuple[float | None, float | None]:
    """`‖S − E‖/‖E‖` and `min_a ‖aS − E‖/‖E‖`, the best a being `⟨S, E⟩/⟨S, S⟩`; None where E is 0."""
    size, own = np.linalg.norm(e), np.linalg.norm(s)
    if not size > 0:
        return None, None
    unit = s / own if own > 0 else s  # the best multiple of S is the projection of E onto it
    scaled = np.linalg.norm(np.vdot(unit, e) * unit - e) / size
    return float(np.linalg.norm(s - e) / size), float(scaled)


def _agreements(scores: Mapping[str, Mapping[float, Matrix]], dampings: Sequence[float]) -> list[Agreement]:
    """One for each damping; a pair whose scores are the same as at the damping before is not computed again."""
    known: dict[tuple[int, int], tuple[float | None, float]] = {}
    out = []
    for damping in dampings:
        at = {spec: s[damping] for spec, s in scores.items() if damping in s}
        rho = np.eye(len(at), dtype=object)
        top = np.ones((len(at), len(at)))
        for i, a in enumerate(at.values()):
            for j, b in enumerate(list(at.values())[: i + 1]):
                key = (id(a), id(b))
                if key not in known:
                    known[key] = (_or_none(rank_correlation(a, b)), top_overlap(a, b))
                rho[i, j], top[i, j] = known[key]
                rho[j, i], top[j, i] = known[key]
        order = clustered([[0.0 if r is None else r for r in line] for line in rho.tolist()])
        names = [list(at)[i] for i in order]
        out.append(Agreement(damping, names, rho[np.ix_(order, order)].tolist(), top[np.ix_(order, order)].tolist()))
    return out


def clustered(rho: Sequence[Sequence[float]]) -> list[int]:
    """Positions in the order of the leaves of average linkage on 1 − ρ, near leaves beside each other."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    if len(rho) < 3:
        return list(range(len(rho)))
    distance = np.clip(1 - np.asarray(rho, dtype=float), 0, 2)
    np.fill_diagonal(distance, 0)
    condensed = squareform(distance, checks=False)
    return [int(i) for i in leaves_list(linkage(condensed, "average", optimal_ordering=True))]


def _or_none(x: float) -> float | None:
    return x if math.isfinite(x) else None
