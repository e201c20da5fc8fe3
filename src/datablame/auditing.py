"""`datablame audit`: which rows of a training file to look at first, without any query and without a model."""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datablame.diagnostics import Finding, rank_correlation
from datablame.errors import UserError, nearest
from datablame.methods import create
from datablame.scores import check_out
from datablame.store import FeatureStore

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Float

    from datablame.examples import Example, Id

    Vector = Float[np.ndarray, " n"]

COPY = 0.9
"""Cosine of TF-IDF over character n-grams from which two rows count as copies."""
MEASURES = {
    "self_influence": "self-influence",
    "gradient_norm": "gradient norm",
    "loss": "loss a token",
    "drop": "loss drop a token",
}
"""Field of a row -> its name in print."""


@dataclass(frozen=True)
class Audited:
    """One training row.

    self_influence: `g H⁻¹ g` with the matrix of `exact`, from 0 to n, see `audit` · gradient_norm: `‖g‖` over all
    blocks · loss: of the fine-tuned model, in nats a labelled token · drop: the base model's less that; None without
    an adapter · tokens: labelled ones · copies: rows of its group of near-copies, itself included · group: their
    number, None where there are none.
    """

    rank: int
    id: Id
    row: int
    label: str | None
    self_influence: float
    gradient_norm: float
    loss: float
    drop: float | None
    tokens: int
    copies: int
    group: int | None
    prompt: str
    response: str


@dataclass(frozen=True)
class Audit:
    """`rows`, those to look at first in front; findings say how far to trust the order."""

    rows: Sequence[Audited]
    by: str
    findings: Sequence[Finding]
    settings: dict[str, Any] = field(default_factory=dict)

    def to_pandas(self) -> pd.DataFrame:
        """One line a row, columns as the fields of `Audited`."""
        import pandas as pd

        frame = pd.DataFrame([dataclasses.asdict(r) for r in self.rows])
        return frame.astype({"group": "Int64", "drop": float})

    def top(self, k: int = 20) -> list[Audited]:
        """The first k rows, of each group of near-copies only the first."""
        seen: set[int] = set()
        found = []
        for r in self.rows:
            if r.group is None or r.group not in seen:
                found.append(r)
            seen |= set() if r.group is None else {r.group}
        return found[:k]

    def save(self, out: str | Path, k: int = 20) -> list[Path]:
        """Write audit.parquet (every row), audit.jsonl (`top(k)`) and audit.html into `out`; their paths."""
        from datablame.report.audit import write_audit

        out = Path(out)
        check_out(out)
        lines = [json.dumps(dataclasses.asdict(r), ensure_ascii=False) + "\n" for r in self.top(k)]
        try:
            self.to_pandas().to_parquet(out / "audit.parquet", index=False)
            (out / "audit.jsonl").write_text("".join(lines), encoding="utf-8")
            return [out / "audit.parquet", out / "audit.jsonl", write_audit(self, out / "audit.html", k)]
        except OSError as e:
            raise UserError(f"--out {out}: cannot be written ({e.strerror or e}).") from e

    def _repr_html_(self) -> str:
        """In a notebook: the first rows."""
        frame = self.to_pandas().head(10)
        return frame.map(lambda x: html.escape(x[:120]) if isinstance(x, str) else x).to_html(escape=False)


def audit(index: FeatureStore | str | Path, *, by: str = "self_influence", damping: float = 1.0) -> Audit:
    """Order the training rows of `index` by what stands out of each by itself.

    by: `self_influence`, `gradient_norm`, `loss` or `drop`, highest first. No model is loaded.

    damping: of the self-influence `g (GᵀG/n + λI)⁻¹ g`, over the mean of the min(n, D) eigenvalues that can be above 0,
    as in `exact` with `unit=rank`. Over the mean of all D, n rows of D ≫ n numbers leave nothing but λ in most
    directions, and every row has n. At damping 1, n rows share at most n²/2, since the mean of
    `σ/(σ + λ)` is at most a half.

    Raises UserError for an index without gradients, or one without a base model where `by` is `drop`.
    """
    store = index if isinstance(index, FeatureStore) else FeatureStore.open(index)
    if by not in MEASURES:
        raise UserError(f"--by {by!r}: unknown.{nearest(by, MEASURES)}")
    gradients = store.features("gradients")
    if not gradients:
        raise UserError(f"{store.path}: holds no gradients, so no row has influence. Index with --adapter or --blocks.")
    exact: Any = create("exact", damping=damping, unit="rank").fit(gradients)
    norms = create("gradnorm").fit(gradients).score({b: gradients[b][:1] for b in gradients})[0]
    tokens = store.read("length")[:, 0].double().numpy()
    loss = store.read("loss")[:, 0].double().numpy() / tokens
    measures = {"self_influence": exact.self_influence().numpy(), "gradient_norm": norms.double().numpy(), "loss": loss}
    if store.features("base-loss"):
        measures["drop"] = store.read("base-loss")[:, 0].double().numpy() / tokens - loss
    if by not in measures:
        raise UserError(f"--by {by}: this index has no base model to compare with. Index with --adapter.")
    groups = near_copies([f"{e.prompt}\n{e.response}" for e in store.examples])
    rows = _rows(store.examples, measures, tokens, groups, by)
    settings = {**store.settings, "damping": damping, "by": by}
    return Audit(rows, by, diagnose(measures, tokens, groups), settings)


def _rows(
    examples: Sequence[Example], measures: dict[str, Vector], tokens: Vector, groups: Sequence[int], by: str
) -> list[Audited]:
    sizes = np.bincount(groups, minlength=len(examples))
    rows = []
    for rank, i in enumerate(np.argsort(-measures[by], kind="stable"), start=1):
        e, copies = examples[i], int(sizes[groups[i]])
        numbers: dict[str, Any] = {name: float(measures[name][i]) if name in measures else None for name in MEASURES}
        group = int(groups[i]) if copies > 1 else None
        about: dict[str, Any] = {"tokens": int(tokens[i]), "copies": copies, "group": group}
        of_row: dict[str, Any] = {k: getattr(e, k) for k in ("id", "row", "label", "prompt", "response")}
        rows.append(Audited(rank=rank, **of_row, **numbers, **about))
    return rows


def near_copies(texts: Sequence[str]) -> list[int]:
    """A group number for each text: texts of which a chain of near-copies leads to one another have the same.

    Near: a cosine of at least 0.9 between TF-IDF weights of 3 to 5 characters inside words.
    """
    from scipy.sparse.csgraph import connected_components
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.neighbors import NearestNeighbors

    if not any(t.split() for t in texts):
        return [0] * len(texts)
    x = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), dtype=np.float32).fit_transform(texts)
    near = NearestNeighbors(radius=1 - COPY, metric="cosine", algorithm="brute").fit(x).radius_neighbors_graph(x)
    return list(map(int, connected_components(near, directed=False)[1]))


# ---------------------------------------------------------------- how far to trust it


def diagnose(measures: dict[str, Vector], tokens: Vector, groups: Sequence[int]) -> list[Finding]:
    """What speaks against reading the order as an order of faults."""
    findings = [_by_length(name, x, tokens) for name, x in measures.items()]
    influence, norms, n = measures["self_influence"], measures["gradient_norm"], len(tokens)
    rho = rank_correlation(influence[None], norms[None])
    if rho > 0.9:
        sentence = (
            f"The self-influence correlates {rho:.2f} with the gradient norm: here it orders rows much as the norm "
            "does, and that a row's direction is its own adds little."
        )
        findings.append(Finding("note", sentence, None, {"spearman_norm_self_influence": rho}))
    share = float(np.median(influence)) / n
    if share > 0.9:
        sentence = (
            f"Half of the rows have {share:.0%} or more of the highest self-influence there can be: at this damping "
            "a row is nearly alone in its direction, and the order among them says little. Raise --damping."
        )
        findings.append(Finding("warning", sentence, None, {"median_share": share}))
    learnt = int((norms <= 1e-3 * np.median(norms)).sum())
    if learnt:
        sentence = (
            f"{learnt} of {n} rows have a near-zero gradient (below a thousandth of the median): the model knows them "
            "by heart, and a fault in them shows in the loss drop alone."
        )
        findings.append(Finding("warning", sentence, None, {"near_zero": learnt, "rows": n}))
    sizes = np.bincount(groups)
    if copied := int(sizes[sizes > 1].sum()):
        sentence = (
            f"{copied} rows have near-copies, in {int((sizes > 1).sum())} groups: copies share one direction, so that "
            "each has less self-influence than one alone would have. The table shows a group once."
        )
        findings.append(Finding("note", sentence, None, {"copies": copied}))
    if "drop" not in measures:
        findings.append(Finding("note", "Without an adapter there is no base model, and no loss drop."))
    sentence = "A row in front is an unusual one. A rare subject or a long answer is unusual too: read before you drop."
    return [*findings, Finding("note", sentence)]


def _by_length(name: str, x: Vector, tokens: Vector) -> Finding:
    rho = rank_correlation(x[None], tokens[None])
    if not np.isfinite(rho):
        return Finding(
            "note", f"The {MEASURES[name]} has no correlation with the rows' length: one of them is constant."
        )
    level = "warning" if abs(rho) > 0.8 else "note" if abs(rho) > 0.5 else "good"
    sentence = f"The {MEASURES[name]} correlates {rho:.2f} with the rows' length in labelled tokens."
    if abs(rho) > 0.5:
        sentence += f" It mostly finds {'long' if rho > 0 else 'short'} rows."
    return Finding(level, sentence, None, {f"spearman_length_{name}": rho})  # type: ignore[arg-type]
