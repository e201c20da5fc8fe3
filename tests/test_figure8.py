"""Figure 8: which layers are chosen, cells of some layers, numbers and tests from their files, the page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from safetensors import safe_open

from bench_cases import one_task, tiny
from conftest import make_model, make_tokenizer
from datablame.errors import UserError
from datablame.evaluation import bench as bench_module
from datablame.evaluation import result_files, tasks
from datablame.evaluation.bench import bench
from datablame.evaluation.cell import Cell, fingerprint
from datablame.evaluation.intervals import flip_test, interval
from datablame.evaluation.results import load_results
from datablame.indexing import SILENT
from datablame.paper import Request, figure8
from datablame.paper.figure8 import CONTROLS, RUNS, choices, fours, spread
from datablame.report.paper import write_page

__all__ = ["one_task"]  # a fixture that every test here uses

DEPTH = 6


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("deep")
    make_model(num_hidden_layers=DEPTH).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def request(deep: Path, out: Path, **changes: Any) -> Request:
    return Request(**({"name": "figure8", "scale": "smoke", "out": out, "seed": 0, "command": "c", "reporter": SILENT,
                       "model": str(deep)} | changes))  # fmt: skip


def trained_layers(adapter: Path) -> set[int]:
    with safe_open(adapter / "adapter_model.safetensors", "pt") as f:
        return {int(part) for name in f.keys() for part in name.split(".") if part.isdecimal()}  # noqa: SIM118


def test_layers_are_spread_evenly_and_four_are_in_a_row() -> None:
    assert spread(1, 30) == [15]
    assert spread(4, 30) == [3, 11, 18, 26]
    assert spread(30, 30) == list(range(30))
    for depth in range(2, 40):
        for k in range(1, depth + 1):
            found = spread(k, depth)
            assert len(set(found)) == k
            gaps = np.diff(found)
            assert not k > 1 or gaps.max() - gaps.min() <= 1
            assert abs(np.mean(found) - (depth - 1) / 2) <= 0.5  # neither early nor late
    places = fours(30)
    assert [p[0] for p in places] == [0, 4, 8, 12, 16, 20, 24, 26]
    assert all(np.diff(p).tolist() == [1, 1, 1] for p in places)
    assert fours(8) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert fours(4) == []
    labels = [(q, label) for q, label, _ in choices("cpu", 30)]
    assert [x for q, x in labels if q == "number"] == ["1", "2", "4", "8", "16", "all 30"]
    assert [x for q, x in labels if q == "place"][-1] == "26–29"
    assert [x for _, x, _ in choices("smoke", 30)] == ["1", "all 30", "0–3"]
    assert [x for _, x, _ in choices("cpu", 4)] == ["1", "2", "all 4"]


def test_trainable_weights_are_those_of_the_adapter(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import get_peft_model

    from datablame.tuning import lora_config

    monkeypatch.setattr(tasks, "build", lambda *a, **k: tiny())
    sizes = figure8.sizes_of(make_model(num_hidden_layers=DEPTH), "smoke", 0)
    for layers in ("2", "0,1,5", None):
        model = get_peft_model(make_model(num_hidden_layers=DEPTH), lora_config(replace(tiny().recipe, layers=layers)))
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert count == sum(sizes[k] for k in (range(DEPTH) if layers is None else map(int, layers.split(","))))


def test_a_cell_of_some_layers_lies_beside_and_is_in_no_table(
    deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"tasks": ["tiny"], "seeds": [0], "methods": "graddot@response,bm25"}
    some, every = bench(str(deep), tmp_path / "out", layers=["4, 1", None, "1,4"], **given)
    assert (some.name, every.name) == ("tiny-sound-layers.1.4-s0.json", "tiny-sound-s0.json")
    result = json.loads(some.read_text())
    assert result["recipe_options"]["layers"] == "1,4"
    assert result["command"].endswith(" --recipes sound --layers 1,4 --methods graddot@response,bm25")
    assert "layers" not in json.loads(every.read_text())
    # It has the reference responses alone, also of a run on features of its own; then there is nothing left to do.
    more = given | {"methods": "graddot@response,dda@response"}
    bench(str(deep), tmp_path / "out", layers=["1,4"], **more)
    found = json.loads(some.read_text())["results"]
    assert {kind: set(runs) for kind, runs in found.items()} == {
        "reference": {"graddot@response", "bm25", "dda@response"}
    }
    with monkeypatch.context() as m:
        m.setattr(bench_module, "_run", lambda *a: pytest.fail("nothing is lacking"))
        bench(str(deep), tmp_path / "out", layers=["1,4"], **more)
    found = load_results(tmp_path / "out", str(deep), "smoke")["tiny"]
    assert [r["fingerprint"] for r in found.results] == [json.loads(every.read_text())["fingerprint"]]
    cell = Cell(str(deep), "tiny", "smoke", 0)
    assert fingerprint(cell, tiny(), "x") != fingerprint(replace(cell, layers="1,4"), tiny(), "x")
    adapters = (tmp_path / "cache" / "finetunes").glob("*/adapter")
    assert sorted(map(sorted, map(trained_layers, adapters))) == [list(range(DEPTH)), [1, 4]]
    with pytest.raises(UserError, match="--layers x: block numbers separated by commas"):
        bench(str(deep), tmp_path / "out", layers=["x"], **given)
    with pytest.raises(UserError, match="--layers 6: this model has blocks 0 to 5"):
        bench(str(deep), tmp_path / "out", layers=["6"], **given)


def test_from_cells_to_a_page(deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "build", lambda *a, **k: tiny())
    real = result_files.read_result

    def learnt(path: Path) -> dict[str, Any] | None:
        """As if all but the last place were learnt: the tiny model learns nothing."""
        result = real(path)
        return result and result | {"learnt": result["learnt"] | {"learnt": "2.3.4.5" not in path.name}}

    monkeypatch.setattr(result_files, "read_result", learnt)
    last = ("place", "2–5", [2, 3, 4, 5])  # smoke has the first four alone
    monkeypatch.setattr(figure8, "choices", lambda *a: [*choices(*a), last])
    asked = request(deep, tmp_path)
    path = figure8.run(asked)
    r = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert [(c["question"], c["label"]) for c in r["cells"]] == [
        ("number", "1"), ("number", "all 6"), ("place", "0–3"), ("place", "2–5"),
    ]  # fmt: skip
    files = {p.name: json.loads(p.read_text()) for p in (tmp_path / "bench").rglob("*.json")}
    names = ["-layers.3", "", "-layers.0.1.2.3", "-layers.2.3.4.5"]
    whole = [files[f"grammars-sound{n}-s0.json"]["results"] for n in names]
    there_whole = dict(zip((c["label"] for c in r["cells"]), whole, strict=True))
    by_cell = [found["reference"] for found in whole]
    for c, there in zip(r["cells"], by_cell, strict=True):
        for run in RUNS:
            expected = interval(np.array([there[run]["auroc"]]), same_queries=False)
            assert c["runs"][run]["auroc"]["value"] == pytest.approx(np.mean(there[run]["auroc"]), abs=1e-5)
            assert c["runs"][run]["auroc"]["interval95"] == pytest.approx(expected[1:], abs=1e-4)
        assert ("generated" in there_whole[c["label"]]) == (c["layers"] is None)
        for control in CONTROLS.values():  # they see no trained layer
            assert there[control]["auroc"] == by_cell[0][control]["auroc"]
    # A fine-tune that was not learnt is in no test; the others are held against all layers, paired by query.
    assert {(t["question"], t["label"]) for t in r["tests"]} == {("number", "1"), ("place", "0–3")}
    ones = [t for t in r["tests"] if (t["run"], t["metric"]) == ("gradcos@response", "auroc")]
    for one, k in zip(ones, (0, 2), strict=True):
        d = np.array(by_cell[k]["gradcos@response"]["auroc"]) - np.array(by_cell[1]["gradcos@response"]["auroc"])
        assert one["value"] == pytest.approx(d.mean(), abs=1e-4)
        assert one["p"] == pytest.approx(flip_test(d[None])[0], abs=0.02)
        assert one["p_holm"] >= one["p"]

    page = figure8.show(tmp_path, "figure8")
    assert len(page.tables) == len(page.views) == 8
    heads = {h for t in page.tables for h in t.headings}
    assert {"2–5 (not learnt)", "0–3", "all 6"} <= heads
    assert any(n.startswith("place 2–5: not learnt") for n in page.notes)
    for table in page.tables:
        assert all(len(row) == len(table.headings) for row in table.rows)
    ones[0]["p_holm"] = 0.01
    assert figure8.differs(r | {"tests": ones}, r["cells"][0], "gradcos@response", "auroc")
    assert not figure8.differs(r | {"tests": ones}, r["cells"][2], "gradcos@response", "auroc")
    assert not figure8.differs(r | {"tests": ones}, r["cells"][0], "gradcos@response", "accuracy")
    (cells,) = (
        t.rows[1]
        for t in figure8.tables(r | {"tests": ones})
        if t.title.startswith("AUROC by how many layers are trained, resp")
    )
    assert cells[0] == "cosine"
    assert [cell[-1] == "*" for cell in cells[1:]] == [True, False]
    for view in page.views.values():
        drawn = go.Figure(view["data"], view["layout"])  # plotly's own check
        assert drawn.layout.xaxis.title.text
        assert drawn.layout.yaxis.title.text
        looks = [(t["line"]["dash"], t.get("marker", {}).get("symbol")) for t in view["data"]]
        assert len(set(looks)) == len(looks)  # told apart without colour
        places = [t["x"][0] for t in view["data"] if "markers" in t["mode"]]
        assert len(set(places)) == len(places) > 5  # bars beside each other
        assert all(round(x) == 0 for x in places)
    assert "Figure 8" in write_page(page, tmp_path / "page.html").read_text()

    # A run that is there is kept; another one is not written over it; what is half done goes on.
    with monkeypatch.context() as m:
        m.setattr(bench_module, "bench", lambda *a, **k: pytest.fail("measured again"))
        assert figure8.run(asked) == path
    with pytest.raises(UserError, match="holds another run"):
        figure8.run(replace(asked, seed=1))
    path.unlink()
    with monkeypatch.context() as m:
        m.setattr(bench_module, "run_cell", lambda *a, **k: pytest.fail("a cell was run again"))
        figure8.run(asked)
    assert json.loads(path.read_text())["cells"] == r["cells"]


def test_a_cell_that_another_process_is_at_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x\.json: another process is at this cell"):
        figure8.results_at(tmp_path / "x.json")
