"""`datablame paper`, Table 5 and Figure 3: the layer against autograd and dense matrices, the files, the pages."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from scipy.stats import spearmanr, t

import oracles
from conftest import Run
from datablame import paper
from datablame.errors import UserError
from datablame.indexing import SILENT
from datablame.paper import figure3, linear, mnist, results, softmax, table5
from datablame.report.paper import write_page

NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
SETTINGS = (linear.Setting(8, 4, dense=True, refits=5, rounds=2), linear.Setting(12, 5, refits=5, rounds=2))
PLAN = linear.Plan(SETTINGS, seed=3, subsets=3, queries=6)


@pytest.fixture(scope="module")
def problem(digits: mnist.Images) -> linear.Problem:
    return linear.problem(digits, SETTINGS[0], PLAN, seed=3)


@pytest.fixture(scope="module")
def measured(digits: mnist.Images) -> list[dict[str, Any]]:
    return linear.measure(digits, PLAN, lambda _: None)


# ---------------------------------------------------------------- the layer


def loss_of(flat: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(x @ flat.view(10, -1).T, y)


def dense_hessian(p: linear.Problem) -> torch.Tensor:
    return torch.autograd.functional.hessian(lambda w: loss_of(w, *p.train), p.w.flatten())


def test_the_layer_is_at_the_minimum(problem: linear.Problem) -> None:
    w = problem.w.clone().requires_grad_(True)
    (loss_of(w.flatten(), *problem.train) + PLAN.decay / 2 * w.square().sum()).backward()
    assert w.grad is not None
    assert float(w.grad.norm()) < 2 * softmax.TOLERANCE
    assert float(softmax.losses(problem.w, *problem.train).mean()) < 0.5 * math.log(10)


def test_a_fit_that_does_not_converge_is_an_error(problem: linear.Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax, "TOLERANCE", 1e-40)
    with pytest.raises(UserError, match="did not converge on 8 points"):
        softmax.fit(*problem.train, 10, PLAN.decay)


def test_gradients_are_those_of_autograd(problem: linear.Problem) -> None:
    for (x, y), g in ((problem.train, problem.g), (problem.query, problem.v)):
        for i in range(len(x)):
            w = problem.w.flatten().clone().requires_grad_(True)
            (expected,) = torch.autograd.grad(loss_of(w, x[i : i + 1], y[i : i + 1]), w)
            torch.testing.assert_close(g["linear"][i], expected)


@pytest.mark.parametrize("points", [3, 8, 30])
def test_scores_by_the_true_hessian_are_those_of_the_dense_one(digits: mnist.Images, points: int) -> None:
    """Fewer and more points than the 17 inputs, ridges from next to nothing to large."""
    p = linear.problem(digits, replace(SETTINGS[0], points=points), PLAN, seed=1)
    h = dense_hessian(p)
    torch.testing.assert_close(torch.tensor(softmax.hessian_trace(p.w, p.train[0])), h.trace(), check_dtype=False)
    ridges = [1e-6, 1e-3, 1.0]
    for ridge, scores in zip(ridges, softmax.hessian_scores(p.w, p.train, p.query, ridges), strict=True):
        inverse = torch.linalg.inv(h + ridge * torch.eye(len(h)))
        assert oracles.relative_error(scores, p.v["linear"] @ inverse @ p.g["linear"].T) < 1e-7


def test_the_exact_method_is_the_dense_empirical_fisher(problem: linear.Problem) -> None:
    g, v = problem.g["linear"], problem.v["linear"]
    expected = v @ oracles.dense_operator(g, PLAN.damping) @ g.T
    ours = linear.registry.parse("exact:damping=0.1").fit(problem.g).score(problem.v)
    assert oracles.relative_error(ours, expected) < 1e-8
    assert oracles.relative_error(softmax.dense_scores(g, v, PLAN.damping), expected) < 1e-8


def test_leaving_out_is_fitting_without(problem: linear.Problem) -> None:
    """Against an optimiser of another kind: Newton's method on the dense Hessian, all inputs."""
    left_out = softmax.left_out(problem.w, problem.train, problem.query, PLAN.decay, rows=3)
    x, y = problem.train
    before = softmax.losses(problem.w, *problem.query)
    for i in range(3):
        kept = torch.arange(len(x)) != i

        def objective(w: torch.Tensor, kept: torch.Tensor = kept) -> torch.Tensor:
            return loss_of(w, x[kept], y[kept]) * kept.sum() / len(x) + PLAN.decay / 2 * w.square().sum()

        w = problem.w.flatten()
        for _ in range(30):
            gradient = torch.autograd.functional.jacobian(objective, w)
            w = w - torch.linalg.solve(torch.autograd.functional.hessian(objective, w), gradient)
        expected = len(x) * (softmax.losses(w.view(10, -1), *problem.query) - before)
        torch.testing.assert_close(left_out[:, i], expected, rtol=1e-3, atol=1e-4)


def test_the_objectives_hessian_predicts_leaving_out(digits: mnist.Images) -> None:
    """First order is good where one point of many is left out, and the damped Fisher matrix is no substitute."""
    setting = linear.Setting(300, 8, refits=10)
    p = linear.problem(digits, setting, PLAN, seed=0)
    others = linear.references(p, setting, PLAN)
    fisher = linear.registry.parse("exact:damping=0.1").fit(p.g).score(p.v).numpy()
    objective = linear.compared(others["objective"], others["left out"])
    assert objective["scaled"] < 0.2
    assert objective["spearman"] > 0.95
    assert linear.compared(fisher, others["left out"])["scaled"] > 2 * objective["scaled"]


def test_enlarging_adds_weights_and_nothing_else(digits: mnist.Images) -> None:
    small, large = linear.inputs(digits.train[:20], 8), linear.inputs(digits.train[:20], 80)
    assert (small.shape, large.shape) == ((20, 65), (20, 6401))
    torch.testing.assert_close(small[:, -1], torch.ones(20, dtype=torch.float64))
    pixels = (digits.train[:20].reshape(20, -1) / 255 - 0.1307) / 0.3081 / 8
    np.testing.assert_allclose(small[:, :-1], pixels)
    ratio = large.square().sum(1) / small.square().sum(1)
    assert 0.7 < float(ratio.min()) <= float(ratio.max()) < 1.1


# ---------------------------------------------------------------- the measurement


def test_errors_are_those_of_the_formulas(digits: mnist.Images, measured: list[dict[str, Any]]) -> None:
    for setting, record in zip(SETTINGS, measured, strict=True):
        raw, scaled, rho = [], [], []
        for seed in (3, 4, 5):
            p = linear.problem(digits, setting, PLAN, seed)
            g, v = p.g["linear"], p.v["linear"]
            e = (v @ oracles.dense_operator(g, 0.1) @ g.T).numpy()
            s = (v @ oracles.lissa_operator(g, 0.1, 5) @ g.T).numpy()
            raw.append(np.linalg.norm(s - e) / np.linalg.norm(e))
            a = np.linalg.lstsq(s.reshape(-1, 1), e.ravel(), rcond=None)[0][0]
            scaled.append(np.linalg.norm(a * s - e) / np.linalg.norm(e))
            rho.append(np.mean([spearmanr(x, y).statistic for x, y in zip(s, e, strict=True)]))
        lissa = record["methods"]["lissa:steps=5"]["errors"]["fisher"]
        for kind, values in (("raw", raw), ("scaled", scaled), ("spearman", rho)):
            assert lissa[kind]["values"] == pytest.approx(values, rel=1e-5)
            assert lissa[kind]["mean"] == pytest.approx(np.mean(values), rel=1e-5)
        low, high = t.interval(0.95, 2, np.mean(raw), np.std(raw, ddof=1) / math.sqrt(3))
        assert lissa["raw"]["interval95"] == pytest.approx([low, high], rel=1e-4)


def test_what_is_measured(measured: list[dict[str, Any]]) -> None:
    for record in measured:
        methods = record["methods"]
        assert set(methods) == {"fisher", *linear.METHODS, "hessian", "objective", "random"}
        assert methods["lissa:steps=inf"]["errors"]["fisher"]["raw"]["mean"] < 1e-8
        assert methods["random"]["errors"]["fisher"]["scaled"]["mean"] > 0.9
        assert methods["random"]["errors"]["fisher"]["raw"] is None
        residuals = [methods[f"lissa:steps={k}"]["residual"]["mean"] for k in (1, 5, 10, "inf")]
        assert residuals == sorted(residuals, reverse=True)
        assert set(methods["fisher"]["errors"]) == {"hessian", "objective", "left out"}
        assert all(len(methods[m]["seconds_all"]) == 2 for m in ("fisher", *linear.METHODS))
        assert record["parameters"] == 10 * (record["side"] ** 2 + 1)
    assert measured[0]["dense_difference"] < 1e-10
    assert measured[1]["dense_seconds"] is None


def test_too_few_images(digits: mnist.Images) -> None:
    for few in (replace(PLAN, settings=(linear.Setting(1501, 4),)), replace(PLAN, queries=298)):
        with pytest.raises(UserError, match="1500 training and 297 test images"):
            linear.measure(digits, few, lambda _: None)


def without_times(x: Any) -> Any:
    if isinstance(x, dict):
        return {k: without_times(v) for k, v in x.items() if "seconds" not in k}
    return [without_times(v) for v in x] if isinstance(x, list) else x


def test_the_same_plan_gives_the_same_numbers(digits: mnist.Images, measured: list[dict[str, Any]]) -> None:
    assert without_times(linear.measure(digits, PLAN, lambda _: None)) == without_times(measured)
    other = linear.measure(digits, replace(PLAN, seed=9, settings=SETTINGS[:1]), lambda _: None)
    assert without_times(other[0]) != without_times(measured[0])


def test_the_gigabytes_that_the_issue_is_about() -> None:
    assert table5.dense_note(
        {
            "points": 10,
            "parameters": 100_010,
            "dense_gigabytes": {"float32": 4 * 100_010**2 / 1e9, "float64": 8 * 100_010**2 / 1e9},
            "dense_seconds": None,
            "methods": {"fisher": {"seconds": 0.1}},
        }
    ).startswith("10 points, 100,010 parameters: the d × d route was not run; its matrix is 40 GB in float32, 80 GB")


# ---------------------------------------------------------------- commands and pages


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, measured: list[dict[str, Any]]) -> Path:
    folder = tmp_path_factory.mktemp("out")
    run = {"scale": "smoke", "seed": 3, "data_sha256": "0" * 64, "protocol": table5.protocol(PLAN)}
    settings = [{**measured[0], "points": 10, "side": 32}, measured[1]]
    record = {"run": run, "command": NASTY, "data": NASTY, "paper": table5.PAPER, "settings": settings}
    results.write(folder / table5.RESULT, record)
    return folder


@pytest.fixture
def run(run: Run) -> Callable[..., tuple[int, str, str]]:
    """The command line's `paper`."""
    return partial(run, "paper")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[linear.Plan]:
    """`measure` on two small settings, whatever it is asked for; the plans that it was called with."""
    calls: list[linear.Plan] = []
    measure = linear.measure

    def few(images: mnist.Images, plan: linear.Plan, note: Any) -> list[dict[str, Any]]:
        calls.append(plan)
        return measure(images, replace(plan, settings=SETTINGS, subsets=2, queries=4), note)

    monkeypatch.setattr(linear, "measure", few)
    return calls


def test_end_to_end(run: Run, small: list[linear.Plan], digits_folder: Path, tmp_path: Path) -> None:
    """Table 5 and Figure 3 are one run; another run is not written over it."""
    to = ("--out", tmp_path / "o")
    assert "not run yet" in run("list", *to)[1]
    code, said, err = run("run", "table5", "--mnist", digits_folder, "--seed", 3, *to)
    assert code == 0, err
    assert "paper show table5" in said
    code, said, err = run("run", "figure3", "--mnist", digits_folder, "--seed", 3, *to)
    assert code == 0, err
    assert "holds this run already" in " ".join(err.split())
    assert len(small) == 1
    assert [(s.points, s.side) for s in small[0].settings] == [(10, 32), (20, 32)]
    code, _, err = run("run", "table5", "--mnist", digits_folder, "--seed", 4, *to)
    assert (code, "holds another run (not the same seed)" in err) == (2, True)
    record = json.loads((tmp_path / "o" / "table5.json").read_text(), parse_constant=pytest.fail)
    assert record["command"].startswith("datablame paper run table5")
    assert record["run"]["protocol"]["subsets"] == [3, 4, 5, 6, 7]
    assert {"machine", "threads", "versions", "paper", "data"} <= set(record)
    for name in ("table5", "figure3"):
        code, said, err = run("show", name, *to)
        assert code == 0, err
        assert "8 points, 170 parameters" in said
        assert (tmp_path / "o" / f"{name}.html").exists()
    assert run("list", *to)[1].count("table5.json") == 2


def test_the_scale_decides_what_is_measured(
    run: Run, small: list[linear.Plan], digits_folder: Path, tmp_path: Path
) -> None:
    assert run("run", "table5", "--scale", "cpu", "--mnist", digits_folder, "--out", tmp_path / "o")[0] == 0
    settings = {(s.points, 10 * (s.side**2 + 1)): s.dense for s in small[0].settings}
    wide = {(n, 100_010): False for n in (10, 20, 1000)}
    assert settings == {(n, 10_250): True for n in (10, 20, 1000)} | wide


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "tabel5"), "Did you mean 'table5'"),
        (("show", "figure33"), "Did you mean 'figure3'"),
        (("run", "table5", "--scale", "gpu"), "use smoke or cpu"),
        (("run", "table5", "--mnist", "./nowhere"), "no such folder"),
        (("show", "table5"), "First: datablame paper run table5"),
        (("show", "figure3"), "First: datablame paper run table5"),
    ],
)
def test_errors(run: Run, tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    code, _, err = run(*arguments, "--out", tmp_path / "o")
    assert code == 2
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"run": [], "settings": [1]}'])
def test_a_broken_result(run: Run, tmp_path: Path, text: str) -> None:
    (tmp_path / "table5.json").write_text(text)
    code, _, err = run("show", "table5", "--out", tmp_path)
    assert (code, "run again" in err) == (2, True)


@pytest.mark.parametrize("name", ["table5", "figure3"])
def test_pages_are_whole_and_escaped(out: Path, tmp_path: Path, name: str) -> None:
    page = paper.module(name).show(out, name)
    evil = {"data": [{"type": "bar", "name": NASTY, "x": [NASTY], "y": [1]}], "layout": {}}
    page = replace(page, notes=[*page.notes, NASTY], views={**page.views, NASTY: evil})
    text = write_page(page, tmp_path / "p.html").read_text(encoding="utf-8")
    assert "alert(1)</script>" not in text
    assert "<img src=x" not in text
    assert "default-src 'none'" in text
    head, _, tail = text.partition('<script id="views" type="application/json">')
    assert not any(word in head for word in ("http://", "https://", 'src="', "<link"))
    views = json.loads(tail.partition("</script>")[0])
    assert len(views) == len(page.views)
    assert all(go.Figure(view).data for view in views)  # plotly refuses what it does not know
    assert not any("<" in x for view in views for trace in view["data"] for x in (trace["name"], *trace["x"]))
    for table in page.tables:
        for row in table.rows:
            assert len(row) == len(table.headings)
            assert all(f"<td>{cell}</td>" in head for cell in row)


def test_the_papers_numbers_stand_beside_ours(out: Path) -> None:
    first, second = table5.show(out, "table5").tables
    assert first.headings[2:6:3] == ["s, paper", "paper"]
    assert {r[0]: r[2:6:3] for r in first.rows if r[0] in ("exact", "DataInf", "cosine")} == {
        "exact": ["46.28", "–"],
        "DataInf": ["0.06", "0.199"],
        "cosine": ["–", "–"],
    }
    assert {r[2] for r in second.rows} == {"–"}
    (row,) = (r for r in figure3.show(out, "figure3").tables[0].rows if r[0] == "LiSSA 10")
    assert row[-1] == "0.124"
    assert "±" in row[1]


def test_the_registry_names_modules_that_can_run_and_show() -> None:
    for name, e in paper.EXPERIMENTS.items():
        module = paper.module(name)
        assert callable(module.run)
        assert callable(module.show)
        assert {"smoke", "cpu"} <= set(e.costs)
    with pytest.raises(UserError, match="unknown table or figure"):
        paper.experiment("table99")
    request = paper.Request("table5", "smoke", Path("x"), 0, "", SILENT)
    assert request.mnist is None


# ---------------------------------------------------------------- from the benchmark


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
        right = "100 ≡ / " if name == "table2" else "100 (100 to 100) / "  # its main queries are of one class
        assert all(cell.startswith(right) for cell in row[1 : 1 + len(page.facts[2][1].split(", "))])
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


def test_cells_are_refused_where_none_are_read(run: Run, tmp_path: Path) -> None:
    for command in (("run", "table5"), ("show", "table5"), ("show", "figure8")):
        code, _, err = run(*command, "--out", tmp_path, "--cells", tmp_path)
        assert code == 2
        assert f"--cells: {command[1]} reads none" in err


@pytest.mark.slow
def test_all_at_smoke_scale_on_the_bundled_model(run: Run, smollm2: str, digits_folder: Path, tmp_path: Path) -> None:
    """Every table and figure is measured and can be shown. Fine-tunes may come from the user's cache."""
    code, _, error = run(
        "run", "all", "--scale", "smoke", "--model", smollm2, "--mnist", digits_folder, "--out", tmp_path
    )
    assert code == 0, error
    for name in paper.in_order():
        code, said, error = run("show", name, "--out", tmp_path)
        assert code == 0, error
        assert paper.EXPERIMENTS[name].result in run("list", "--out", tmp_path)[1]
        assert said
        assert (tmp_path / f"{name}.html").exists()
