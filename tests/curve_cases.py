"""What the tests of Figures 4 and 5 share: a task, a request, a look at every table and picture of a page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest

from datablame import paper
from datablame.evaluation import bench as bench_module
from datablame.evaluation import results as results_module
from datablame.evaluation import tasks as tasks_module
from datablame.evaluation.tasks.base import Task, examples, same_label
from datablame.indexing import SILENT
from datablame.paper import figure4, figure5
from datablame.tuning import TuneOptions


def tiny(seed: int = 0) -> Task:
    """Two classes, six rows, four queries; two epochs of three steps."""
    words = ["snow", "rain", "tea", "kettles", "spiders", "pears"]
    rows = [
        (f"Tell of {w} {seed}.", "Yes, yes." if k % 2 else "No.", "yes" if k % 2 else "no") for k, w in enumerate(words)
    ]
    train, queries = examples(rows), examples([(p.replace("Tell", "Say"), r, c) for p, r, c in rows[:4]])
    return Task(
        name="grammars", version=1, title="Yes or no", train=train, queries=queries, groups=["a", "a", "a", "b"],
        truth=same_label(train, queries), main=("a",), behaves=lambda e, answer: True,
        recipe=TuneOptions(rank=2, epochs=2, batch=2, rate=1e-2),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def one_task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in (bench_module, results_module, tasks_module):
        monkeypatch.setattr(module, "build", lambda name, scale="smoke", seed=0, **kw: tiny(seed))
    monkeypatch.setattr(bench_module, "takes", lambda name: [])
    monkeypatch.setattr(figure4, "SMOKE", ("grammars",))
    monkeypatch.setitem(figure5.PLANS, "smoke", (("grammars",), 4))
    monkeypatch.setenv("DATABLAME_CACHE", str(tmp_path / "cache"))


def request(name: str, model_dir: Path, out: Path) -> paper.Request:
    return paper.Request(name, "smoke", out, 0, f"datablame paper run {name}", SILENT, None, str(model_dir))


def whole(page: paper.Page) -> None:
    """Every table is a grid, and plotly knows every view: panels, marks, intervals."""
    for table in page.tables:
        assert all(len(row) == len(table.headings) for row in table.rows)
    for view in page.views.values():
        figure = go.Figure(view)
        assert len(figure.data) == len(view["data"]) > 0
        assert all(np.isfinite([float(v) for v in t.y]).all() for t in figure.data)


def rows_of(text: str) -> list[list[str]]:
    return [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
