"""Figure 4 on a tiny model: numbers against LiSSA on the same features, panels, what is said of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from curve_cases import one_task, request, tiny, whole
from datablame import paper
from datablame.errors import UserError
from datablame.evaluation import bench as bench_module
from datablame.evaluation import metrics
from datablame.evaluation.cell import FEATURES
from datablame.evaluation.intervals import flip_test, interval
from datablame.evaluation.scoring import CellInputs
from datablame.evaluation.suites import BY_SIDE, CONTROLS, PAPER, SOUND, runs, split
from datablame.methods import parse
from datablame.paper import attribution, figure4, figure5, results
from datablame.paper.panels import Style, curve, level, panels, share
from datablame.report.paper import escaped, write_page
from datablame.store import FeatureStore

__all__ = ["one_task"]  # a fixture that every test here uses


def test_a_drawn_table_is_escaped() -> None:
    view = attribution._drawn("<b>t</b>", ["run", "class", "", "row"], [["a", "<i>b</i>", "right", "%{x} <a href=x>"]])
    shown = escaped(view)
    assert shown["layout"]["title"]["text"] == "&lt;b&gt;t&lt;/b&gt;"
    assert shown["data"][0]["cells"]["values"] == [
        ["a"],
        ["&lt;i&gt;b&lt;/i&gt;"],
        ["right"],
        ["% {x} &lt;a href=x&gt;"],
    ]
    assert view["layout"]["title"]["text"] == "<b>t</b>"


def test_panels_are_escaped_and_numbers_stay_numbers(tmp_path: Path) -> None:
    nasty = "</script><img src=x>"
    traces = [curve(Style(nasty, "blue"), [1, 10], [{"value": 0.5}, {"value": 1.0, "interval95": [0.5, 1.0]}])]
    traces.append(level(Style("level", "grey", "dot"), 0.3, (1, 10)))
    view = panels({nasty: traces, "b": traces}, {"type": "log"}, share("y"))
    page = paper.Page("t", [], [], [], {"v": view}, "")
    text = write_page(page, tmp_path / "p.html").read_text(encoding="utf-8")
    (shown,) = json.loads(text.partition('<script id="views" type="application/json">')[2].partition("</script>")[0])
    assert "<img" not in text
    assert "<" not in shown["layout"]["annotations"][0]["text"]
    assert shown["data"][0]["x"] == [1, 10]
    assert shown["data"][0]["error_y"]["arrayminus"] == [0.0, 0.5]
    figure = go.Figure(shown)
    assert [t.xaxis for t in figure.data] == ["x", "x", "x2", "x2"]
    assert [t.showlegend for t in figure.data] == [True, True, False, False]  # one entry for both panels


# ---------------------------------------------------------------- figure 4


def test_figure4_is_of_the_seeds_that_were_asked_for(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory may have others, of an earlier command."""
    asked = request("figure4", model_dir, tmp_path / "out")
    monkeypatch.setattr(figure4, "RUNS", (figure4.REPSIM, figure4.BM25))
    found = []
    for seeds in ((0, 1), (1,), None):
        this = replace(asked, seeds=seeds, seed=seeds[0] if seeds else 0)
        path = figure4.run(this)
        record = json.loads(path.read_text())
        found.append(record["tasks"]["grammars"]["seeds"])
        assert record["run"]["seeds"] == found[-1]
        assert "seed" not in record["run"]
        assert figure4.run(this) == path  # the same again: its cells are summed up again
        with pytest.raises(UserError, match="holds another run .not the same seeds"):
            figure4.run(replace(this, seeds=(9,)))
        path.unlink()
    assert found == [[0, 1], [1], [0]]


def test_a_difference_in_print() -> None:
    assert results.difference({"value": -0.001, "p_holm": 0.2}) == "+0.00 (p 0.2)"
    assert results.difference({"value": -0.126, "p_holm": 0.01}) == "-0.13* (p 0.01)"


def test_figure4_asks_for_runs_that_the_benchmark_has() -> None:
    """Spelt the same way, or each would be run twice; and each is a run of its own."""
    shared = {*PAPER, *SOUND, *CONTROLS} & set(figure4.RUNS)
    assert shared == {
        "lissa:steps=10,damping=0.1@response",
        "lissa:protocol=paper,steps=10,damping=0.1@padded",
        "exact:damping=0.1@padded",
        "exact-block:damping=0.1@padded",
        "exact-block:damping=0.1@response",
        "exact-block:damping=1.0,unit=rank@padded",
        "exact-block:damping=1.0,unit=rank@response",
        "exact:damping=0.1@response",
        "repsim:layer=last,text=prompt",
        "bm25:text=both",
    }
    assert "lissa:steps=10,damping=0.1" in BY_SIDE
    assert runs("all", ",".join(figure4.RUNS)) == list(dict.fromkeys(figure4.RUNS)) == list(figure4.RUNS)
    assert {view for run in figure4.RUNS if (view := split(run)[1])} == {"padded", "response"}
    assert runs("all", ",".join(figure5.RUNS)) == list(figure5.RUNS)


def test_figure4_is_what_lissa_gives_on_the_cells_features(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accuracy, AUROC and residual of each number of iterations; iterations end in the solution; tests are paired."""
    kept = bench_module.bench
    monkeypatch.setattr(bench_module, "bench", lambda *a, **k: kept(*a, **k, keep=True))
    path = figure4.run(request("figure4", model_dir, tmp_path / "out"))
    r = json.loads(path.read_text(), parse_constant=pytest.fail)
    x, task = r["tasks"]["grammars"], tiny()
    assert list(x["runs"]) == list(figure4.RUNS)
    assert (x["queries"], x["seeds"], x["failed"]) == (3, [0], {})
    (features,) = (tmp_path / "cache" / "bench").glob(f"*/{FEATURES}-response-padded")
    train, queries = (FeatureStore.open(features / part) for part in ("train", "reference"))
    per_run = {}
    for run in figure4.RUNS:
        spec, view = split(run)
        method = parse(spec)
        scores = CellInputs(train, queries, view).score(method)
        per_run[run] = metrics.per_query(scores, task.truth, 2)["accuracy"][:3]
        assert x["runs"][run]["accuracy"]["value"] == pytest.approx(per_run[run].mean(), abs=1e-4)
        assert x["runs"][run]["auroc"]["value"] == pytest.approx(metrics.auroc(scores, task.truth)[:3].mean(), abs=1e-4)
        left = np.median(method.residual[0.1]) if spec.startswith("lissa") else None  # type: ignore[attr-defined]
        found = x["runs"][run].get("residual")
        assert (found is None) == (left is None)
        assert left is None or found["value"] == pytest.approx(left, rel=1e-3)
    for view in figure4.VIEWS:
        left = [x["runs"][run]["residual"]["value"] for run in figure4.CURVES[view].values()]
        assert left == sorted(left, reverse=True)
        assert left[-1] < 1e-3 < left[0]
        last, solved = figure4.CURVES[view][100_000], figure4.SOLVED[view]
        assert x["runs"][last]["auroc"]["value"] == pytest.approx(x["runs"][solved]["auroc"]["value"], abs=1e-3)
    # The test of the difference is the benchmark's own, between the runs that the question names.
    for t in r["tests"]:
        if (t["question"], t["metric"]) == ("solved − 10 iterations", "accuracy"):
            view = t["curve"]
            d = per_run[figure4.SOLVED[view]] - per_run[figure4.CURVES[view][10]]
            assert t["value"] == pytest.approx(d.mean(), abs=1e-4)
            assert t["p"] == pytest.approx(flip_test(d[None])[0], abs=0.02)
            assert t["p_holm"] >= t["p"]
    span = x["runs"][figure4.REPSIM]["accuracy"]
    expected = interval(per_run[figure4.REPSIM][None], same_queries=False)
    assert [span["value"], *span["interval95"]] == pytest.approx(list(expected), abs=1e-4)
    page = figure4.show(tmp_path / "out", "figure4")
    whole(page)
    assert "after 1," in figure4.reading(r, "grammars", "padded")
    # A second run trains and scores nothing.
    monkeypatch.setattr(bench_module, "run_cell", lambda *a, **k: pytest.fail("the cell was run again"))
    figure4.run(request("figure4", model_dir, tmp_path / "out"))


def made_up(solved: float, ten: float, p: float) -> dict[str, Any]:
    runs = {
        figure4.SOLVED["padded"]: {"accuracy": {"value": solved}},
        figure4.CURVES["padded"][10]: {"accuracy": {"value": ten}},
        figure4.CURVES["padded"][1]: {"accuracy": {"value": ten}},
    }
    key = {"task": "t", "curve": "padded", "metric": "accuracy"}
    tests = [key | {"question": q, "value": solved - ten, "p": p, "p_holm": p} for q in figure4.QUESTIONS[:3]]
    return {"tasks": {"t": {"runs": runs}}, "tests": tests}


@pytest.mark.parametrize(
    ("solved", "ten", "p", "words"),
    [
        (0.9, 0.5, 0.01, "rises with the iterations"),
        (0.2, 0.5, 0.01, "falls with the iterations"),
        (0.9, 0.5, 0.07, "does not change significantly"),
    ],
)
def test_figure4_says_what_its_numbers_say(solved: float, ten: float, p: float, words: str) -> None:
    r = made_up(solved, ten, p)
    assert words in figure4.reading(r, "t", "padded")
    assert figure4.answer(r, "t", "padded", figure4.QUESTIONS[1]).count("*") == (p < 0.05)
    del r["tasks"]["t"]["runs"][figure4.SOLVED["padded"]]
    assert "has failed" in figure4.reading(r, "t", "padded")
    assert figure4.answer(r, "t", "response", figure4.QUESTIONS[1]) == "–"
