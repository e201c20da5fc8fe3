"""The benchmark of all methods: its separate captures give what one index gives, its numbers count what they say."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import datablame
from conftest import ROWS, write_jsonl
from datablame.demo import QUERIES
from datablame.indexing import CaptureOptions, recorded_encoding

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
