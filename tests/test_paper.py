"""`datablame paper`: its commands, files and pages, on Table 5 and Figure 3."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from conftest import Run
from datablame import paper
from datablame.errors import UserError
from datablame.indexing import SILENT
from datablame.paper import figure3, linear, mnist, results, table5
from datablame.report.paper import write_page
from paper_cases import PLAN, SETTINGS, measured, run

__all__ = ["measured", "run"]  # fixtures

NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, measured: list[dict[str, Any]]) -> Path:
    folder = tmp_path_factory.mktemp("out")
    run = {"scale": "smoke", "seed": 3, "data_sha256": "0" * 64, "protocol": table5.protocol(PLAN)}
    settings = [{**measured[0], "points": 10, "side": 32}, measured[1]]
    record = {"run": run, "command": NASTY, "data": NASTY, "paper": table5.PAPER, "settings": settings}
    results.write(folder / table5.RESULT, record)
    return folder


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
