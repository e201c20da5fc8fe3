"""Tables and figures that are drawn from the benchmark's cells or its tasks' rows."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

from conftest import Run
from datablame import paper
from datablame.indexing import SILENT
from paper_cases import run

__all__ = ["run"]  # a fixture


@pytest.mark.parametrize("name", [n for n, e in paper.EXPERIMENTS.items() if e.module == "showcases"])
def test_rows_of_the_tasks(run: Run, tmp_path: Path, name: str) -> None:
    code, out, err = run("run", name, "--out", tmp_path)
    assert code == 0, err
    code, out, err = run("show", name, "--out", tmp_path)
    assert code == 0, err
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert result["run"]["versions"].keys() == {task["task"] for task in result["tasks"]}
    assert "holds this run already" in " ".join(run("run", name, "--out", tmp_path)[2].split())
    code, _, err = run("run", name, "--seed", 1, "--out", tmp_path)
    assert (code, "holds another run (not the same seed)" in err) == (2, True)
    assert json.loads((tmp_path / f"{name}.json").read_text()) == result
    for task in result["tasks"]:
        assert len({label for label, _, _ in task["shown"]}) == len(task["shown"]) > 1
        assert task["task"] in out
    assert (tmp_path / f"{name}.html").exists()


@pytest.mark.parametrize("name", ["table2", "table3", "table4", "figure1", "figure2"])
def test_tables_and_figures_are_drawn_from_the_cells(
    name: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cells with made-up scores in place of trained ones; what is drawn is what the files hold."""
    from datablame.evaluation import bench as bench_module
    from datablame.evaluation import metrics
    from datablame.evaluation.cell import Cell
    from datablame.evaluation.scoring import Scored, measured, n_classes, rounded
    from datablame.evaluation.suites import runs
    from datablame.evaluation.tasks import Task

    def made(cell: Cell, task: Task, wanted: list[str], *args: object, **options: object) -> dict[str, object]:
        rng = np.random.default_rng(0)
        scores = {r: rng.normal(size=task.truth.shape) for r in wanted} | {"graddot@padded": task.truth.astype(float)}
        sets = {r: measured(task, r, Scored(s, "", 0.0)) for r, s in scores.items()}
        queries = [{"id": e.id, "label": e.label, "group": g} for e, g in zip(task.queries, task.groups, strict=True)]
        chance = {k: rounded(v) for k, v in metrics.chance(task.truth, n_classes(task)).items()}
        return {
            "version": 1, "fingerprint": bench_module.fingerprint(cell, task, "sha"), **vars(cell), "title": task.title,
            "rows": len(task.train), "labels": [e.label for e in task.train], "main": list(task.main),
            "learnt": {"learnt": True, "behaves": {"tuned": 1, "base": 0},
                       "loss": {"tuned": 1, "base": 2}, "by_group": {}},
            "queries": queries, "chance": chance, "results": {"reference": sets, "generated": sets}, "seconds": {},
            "leak": {"prompt": 0.6, "response": 0.7, "shows": "neither"}, "recipe_options": {},
        }  # fmt: skip

    class Loaded:
        model_sha256 = "sha"
        model = torch.empty(0)  # on a device

    monkeypatch.setattr(bench_module, "run_cell", made)
    monkeypatch.setattr(bench_module, "load", lambda spec: Loaded)
    monkeypatch.setattr(bench_module, "base_sha256", lambda loaded: "sha")
    monkeypatch.setattr(bench_module, "tokens", lambda *a, **k: 1)
    monkeypatch.setattr(bench_module, "tokens_per_second", lambda *a: 1.0)
    assert "graddot@padded" in runs("all")
    elsewhere = tmp_path / "cells" if name == "table3" else None
    where = ("--out", tmp_path, *(("--cells", elsewhere) if elsewhere else ()))
    code, _, err = run("run", name, *where)
    assert code == 0, err
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert (record["model"], record["scale"], record["seeds"]) == ("smollm2-135m", "smoke", [0])
    assert run("run", name, *where)[0] == 0  # the same again
    for other, which in ((("--model", "another"), "model"), (("--seed", 1), "seeds")):
        code, _, err = run("run", name, *other, *where)
        assert (code, f"holds another run (not the same {which})" in err) == (2, True)
    assert json.loads((tmp_path / f"{name}.json").read_text()) == record
    assert ((elsewhere or tmp_path / "bench") / "smollm2-135m" / "smoke").is_dir()
    assert (tmp_path / "bench").exists() == (elsewhere is None)
    code, _, err = run("show", name, *where)
    assert code == 0, err
    page = paper.module(name).show(tmp_path, name, elsewhere)
    if name.startswith("table"):
        (row,) = (r for r in page.tables[0].rows if r[0] == "graddot@padded")
        right = "100 ≡" if name == "table2" else r"100 \(100 to 100\)"  # its main queries are of one class
        assert all(
            re.match(rf"{right}( [RB][+=])* / ", cell) for cell in row[1 : 1 + len(page.facts[2][1].split(", "))]
        )
        assert page.tables[0].rows[-1][0] == "chance"
    elif name == "figure1":
        (row,) = (r for r in page.tables[0].rows if r[0] == "graddot@padded")
        assert row[2] == "right"
        ((trace,),) = (view["data"] for view in page.views.values())
        assert go.Figure(page.views["grammars"]).data
        cells = trace["cells"]
        at = cells["values"][0].index("graddot@padded")
        assert [column[at] for column in cells["values"]] == row
        wrong = next(k for k, verdict in enumerate(cells["values"][2]) if verdict == "wrong")
        assert cells["fill"]["color"][0][at] != cells["fill"]["color"][0][wrong]
    else:
        assert len(page.views) == 3 * (7 + 1)
        assert len(page.views["grammars: all"]["data"]) == 7
        assert all(go.Figure(view).data for view in page.views.values())
        (z,) = (v["data"][0]["z"] for k, v in page.views.items() if k == "grammars: graddot@padded")
        # Sorted by class on both sides, an oracle's map is blocks on the diagonal.
        assert z[0][0] == 1
        assert z[-1][-1] == 1
        assert z[0][-1] == 0
    assert (tmp_path / f"{name}.html").exists()


def test_a_table_keeps_the_seeds_of_its_run_and_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The seeds that the scale has, not null; a model of this machine by its name."""
    from datablame.evaluation import bench as bench_module
    from datablame.evaluation import results as cells
    from datablame.paper import attribution

    monkeypatch.setattr(bench_module, "bench", lambda *a, **k: [])
    monkeypatch.setattr(cells, "load_results", lambda *a: {})
    monkeypatch.setattr(cells, "joined", lambda *a: {})
    (tmp_path / "my-model").mkdir()
    request = paper.Request("table2", "cpu", tmp_path, 0, "c", SILENT, model=str(tmp_path / "my-model"))
    record = json.loads(attribution.run(request).read_text())
    assert (record["model"], record["seeds"]) == ("my-model", [0, 1, 2])
    attribution.run(replace(request, seeds=(2, 0, 1)))  # the same cells
    record = json.loads(attribution.run(replace(request, name="figure1", seed=4, seeds=(4, 5))).read_text())
    assert record["seeds"] == [4]
