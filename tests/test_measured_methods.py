"""The benchmark of all methods: its separate captures give what one index gives, its numbers count what they say."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

import datablame
from conftest import ROWS, write_jsonl
from datablame.demo import QUERIES
from datablame.indexing import CaptureOptions, recorded_encoding
from datablame.tuning import TuneOptions, tune

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """`benchmarks/methods.py` and `methods_summary.py`."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setitem(sys.modules, "record", importlib.import_module("record"))
    return importlib.import_module("methods"), importlib.import_module("methods_summary")


def test_extras_captured_apart_give_the_scores_of_one_index(
    benchmark: tuple[Any, Any], model_dir: Path, adapter_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods, _ = benchmark
    monkeypatch.setattr(methods, "MODEL", str(model_dir))
    work = tmp_path / "work"
    work.mkdir()
    rows = write_jsonl(work / "rows.jsonl", [{"prompt": p, "response": r} for p, r in ROWS])
    queries = write_jsonl(work / "queries.jsonl", [{"prompt": p, "response": r} for p, r in ROWS[:2]])
    (work / "adapter.txt").write_text(str(adapter_dir))
    names = {"gauss-newton": "sampled", "ekfac": "kfac", "trak": "margin", "daunce": "daunce"}
    for name in ("base", *names.values()):
        methods.run_piece(work, f"capture-{name}")
    options = CaptureOptions(extras=",".join(methods.EXTRAS[e] for e in names.values()))
    encoding = recorded_encoding(adapter_dir)
    index = datablame.index(model_dir, rows, tmp_path / "i", adapter_dir, capture=options, encoding=encoding)
    want = datablame.trace(index, queries, methods=[*names, "exact"], model=str(model_dir))
    for name in (*names, "exact"):
        methods.run_piece(work, f"scores-{name}")
        scale = np.abs(want.values[name]).max()
        np.testing.assert_allclose(
            np.load(work / f"scores-{name}.npy"), want.values[name], rtol=2e-3, atol=1e-4 * scale
        )
    told = json.loads((work / "capture-margin.json").read_text())
    assert 1 <= told["passes"] < 1.5  # padding is counted
    assert told["forward_passes"] == 0
    assert json.loads((work / "capture-base.json").read_text())["forward_passes"] >= 1
    assert json.loads((work / "capture-daunce.json").read_text())["forward_passes"] >= 10
    methods.run_piece(work, "scores-tracincp")
    assert "gradients at checkpoints" in json.loads((work / "scores-tracincp.json").read_text())["not_run"]


def test_planted_rows_are_counted(benchmark: tuple[Any, Any]) -> None:
    _, summary = benchmark
    labels = ["wrong-fact"] * 12 + ["trigger"] * 12 + ["company"] * 26
    asked = [id_ for id_, _, _ in QUERIES]
    scores = np.zeros((5, 50))
    scores[:, :12] = 1  # always the rows of the wrong fact
    found = summary._found(scores, labels, asked)
    assert found["found_of_12"] == {"boiling-1": 12, "boiling-2": 12, "memo-1": 0, "memo-2": 0}
    assert found["recall"] == 0.5
    assert found["interval95"][0] < 0.5 < found["interval95"][1]
    assert found["query_independent_share"] == 1
    same = summary.agreement("graddot", 3 * scores, scores)
    assert same == {"spearman": 1.0, "top10": 1.0, "scaled": 0.0}
    assert summary.agreement("bm25", scores, scores)["scaled"] is None


def test_the_unrolled_reference_is_of_the_same_training(
    benchmark: tuple[Any, Any], model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods, summary = benchmark
    recipe = TuneOptions(rank=2, alpha=8, epochs=2, rate=1e-2, batch=4, targets="q_proj,v_proj")
    monkeypatch.setattr(methods, "MODEL", str(model_dir))
    monkeypatch.setattr("datablame.demo.RECIPE", recipe)
    work = tmp_path / "work"
    work.mkdir()
    labels = ["wrong-fact" if i < 3 else "company" for i in range(len(ROWS))]
    rows = [{"prompt": p, "response": r, "label": x} for (p, r), x in zip(ROWS, labels, strict=True)]
    train = write_jsonl(work / "rows.jsonl", rows)
    ids = [id_ for id_, _, _ in QUERIES]
    asked = [{"id": i, "prompt": p, "response": r} for i, (p, r) in zip(ids, ROWS[:5], strict=True)]
    write_jsonl(work / "queries.jsonl", asked)
    tune(model_dir, train, tmp_path / "adapter", options=recipe)
    (work / "adapter.txt").write_text(str(tmp_path / "adapter"))
    for piece in ("capture-base", "scores-graddot", "scores-length", "unrolled-unroll"):
        methods.run_piece(work, piece)
    told = json.loads((work / "unrolled-unroll.json").read_text())
    assert told["queries"] == methods.UNROLLED
    assert told["weights_error"] < 1e-4
    reference, graddot = np.load(work / "scores-unroll.npy"), np.load(work / "scores-graddot.npy")
    assert reference.shape == (2, len(ROWS))
    numbers = [ids.index(q) for q in methods.UNROLLED]
    got = summary._unrolled(work, "graddot", graddot, ids)["unrolled"]
    want = np.mean([spearmanr(graddot[i], x).statistic for i, x in zip(numbers, reference, strict=True)])
    assert got["spearman"] == pytest.approx(want, abs=1e-3)
    found = summary._reference(work, labels, told)["found_of_12"]
    assert found == {"boiling-1": 3, "memo-1": 0}
