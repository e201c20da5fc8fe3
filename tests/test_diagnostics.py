"""The numbers behind "should you believe it?" against hand-made cases and brute force."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from datablame.diagnostics import (
    Finding,
    diagnose,
    hubs,
    query_independent_share,
    rank_correlation,
    standing_out,
    top_overlap,
    top_size,
    verdict,
)
from datablame.examples import Example
from datablame.scores import Scores

RNG = np.random.default_rng(0)


def make(values: dict[str, np.ndarray], **more: Any) -> Scores:
    m, n = next(iter(values.values())).shape
    queries = [Example(f"q{i}", i, text="x") for i in range(m)]
    return Scores(values, queries, [Example(f"t{i}", i, text="y") for i in range(n)], **more)


def test_share_is_one_for_one_ranking_and_1_over_m_for_unrelated_ones() -> None:
    row = RNG.normal(size=50)
    scales = np.array([[1.0], [20.0], [0.1]])
    assert query_independent_share(scales * row + scales) == pytest.approx(1)
    orthogonal = np.linalg.qr(RNG.normal(size=(50, 5)) - 0)[0].T
    centred = np.linalg.qr((np.eye(50) - 1 / 50) @ orthogonal.T)[0].T
    assert query_independent_share(centred) == pytest.approx(1 / 5)
    assert query_independent_share(np.stack([row, -row])) == pytest.approx(0, abs=1e-12)
    assert np.isnan(query_independent_share(row[None]))
    assert np.isnan(query_independent_share(np.full((3, 50), 0.1)))


def test_share_equals_the_definition_in_loops() -> None:
    v = RNG.normal(size=(4, 9))
    rows = []
    for row in v:
        centred = [x - sum(row) / len(row) for x in row]
        norm = sum(x * x for x in centred) ** 0.5
        rows.append([x / norm for x in centred])
    mean = [sum(r[t] for r in rows) / 4 for t in range(9)]
    assert query_independent_share(v) == pytest.approx(sum(x * x for x in mean))


def test_rank_correlation_is_spearman_averaged_over_queries() -> None:
    a, b = RNG.integers(0, 6, size=(5, 30)).astype(float), RNG.normal(size=(5, 30))
    want = np.mean([spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)])
    assert rank_correlation(a, b) == pytest.approx(want)
    a[2] = 1.0  # a query that ranks nothing is left out
    want = np.mean([spearmanr(a[i], b[i]).statistic for i in (0, 1, 3, 4)])
    assert rank_correlation(a, b) == pytest.approx(want)
    assert np.isnan(rank_correlation(np.ones((2, 5)), np.ones((2, 5))))


def test_overlap_and_hubs() -> None:
    a = np.array([[4.0, 3, 2, 1], [1, 2, 3, 4]])
    b = np.array([[4.0, 1, 2, 3], [4, 3, 2, 1]])
    assert top_overlap(a, b, 2) == pytest.approx((1 / 2 + 0) / 2)
    assert top_overlap(a, a) == 1
    assert [top_size(n) for n in (1, 7, 8, 40, 900)] == [1, 1, 2, 10, 10]
    assert hubs(np.array([[0.0, 1, 0], [0, 2, 1], [5, 0, 0]])) == (1, 2)


def test_top_rows_stand_out_from_noise_or_not() -> None:
    noise = RNG.normal(size=(400, 100))
    assert standing_out(noise).mean() == pytest.approx(1, abs=0.02)  # by definition
    planted = noise.copy()
    planted[:, :10] += 4
    assert standing_out(planted).min() > 1.1
    np.testing.assert_allclose(standing_out(7 * noise - 3), standing_out(noise))
    few = noise[:4] * 1.0
    few[3] = planted[3]
    warned = sentences(make({"mine": few[:, :]}), "warning", "mine")
    assert "For 3 of 4 queries its top 10 do not stand out" in warned or "For 2 of 4" in warned
    assert "q3" not in warned
    assert "stand out from the others" in sentences(make({"mine": planted[:4]}), "good", "mine")


def sentences(scores: Scores, level: str, method: str | None = None) -> str:
    return " ".join(f.sentence for f in diagnose(scores) if f.level == level and f.method == method)


def test_findings_warn_where_they_must() -> None:
    loud = RNG.normal(size=40)
    same = loud + 0.01 * RNG.normal(size=(6, 40))
    fresh = RNG.normal(size=(6, 40))
    scores = make({"graddot": same, "mine": fresh}, controls={"bm25": fresh * 3 + 1, "gradnorm": np.tile(loud, (6, 1))})
    warned = sentences(scores, "warning", "graddot")
    assert "the same whatever the query" in warned
    assert "is the top example of 6 of 6 queries" in warned
    assert "size of the training row's gradient" in warned
    assert "words alone (BM25)" in sentences(scores, "warning", "mine")
    assert "the same whatever the query" not in sentences(scores, "warning", "mine")
    assert "graddot and mine share" in sentences(scores, "note") + sentences(scores, "warning")


def test_many_pairs_are_told_in_one_sentence() -> None:
    row = RNG.normal(size=(3, 40))
    few = {name: row + 0.1 * RNG.normal(size=(3, 40)) for name in ("a", "b", "c")}
    pairs = [f for f in diagnose(make(few)) if "spearman" in f.numbers]
    assert len(pairs) == 3
    (one,) = [f for f in diagnose(make(few | {"d": row, "e": -row})) if "pairs" in f.numbers]
    assert one.numbers == {"pairs": 10, "pairs_apart": 4}
    assert one.sentence.startswith("Of 10 pairs of methods 4 share less than a fifth of their top 10")
    assert "d and e share 0% of their top 10 (rank correlation -1.00)." in one.sentence
    assert one.level == "warning"
    (near,) = [f for f in diagnose(make(few | {"d": row, "e": row})) if "pairs" in f.numbers]
    assert near.level == "note"


def test_gradients_notes_and_equal_scores() -> None:
    norms = np.zeros(20)
    norms[8:] = 1.0
    norms[7] = 1e-9
    scores = make(
        {"repsim": np.ones((2, 20))},
        gradient_norms=norms,
        notes=["The base model without the adapter gives the same answer: then no training row made it."],
    )
    warned = sentences(scores, "warning")
    assert "8 of 20 training rows have a near-zero gradient" in warned
    assert "t0, t1" in warned
    assert "ranks nothing" in sentences(scores, "warning", "repsim")
    assert verdict(diagnose(scores), 1).startswith("No:")
    assert "All training gradients are zero" in sentences(
        make({"a": np.ones((1, 3))}, gradient_norms=np.zeros(3)), "warning"
    )


def test_the_models_own_words_do_not_decide() -> None:
    quoted = make({"a": np.eye(3)}, notes=["Without the adapter the base model answers: “gives the same answer”"])
    assert not verdict(diagnose(quoted), 1).startswith("No:")


def test_verdict_counts_warnings() -> None:
    good, bad = Finding("good", "fine"), Finding("warning", "not fine")
    assert verdict([good, good], 2).startswith("Nothing here speaks against")
    assert verdict([good, bad], 2).startswith("With care: 1 warning below. Prefer")
    assert "no second method" in verdict([bad], 1)
