"""The benchmark's plan: cells and runs that are wanted, the forecast, whose result is whose; on a tiny model."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from bench_cases import one_task, run, tiny
from conftest import make_model, make_tokenizer
from datablame.encoding import Encoding, encode_rows
from datablame.errors import UserError
from datablame.evaluation import bench as bench_module
from datablame.evaluation import forecast, retraining, truth
from datablame.evaluation.cell import ANSWERED, Cell, fingerprint
from datablame.evaluation.finetunes import base_sha256
from datablame.evaluation.result_files import lacking, of_these, read_result, to_json
from datablame.evaluation.results import load_results
from datablame.evaluation.suites import LADDER, PAPER, REPSIM_LADDER, SOUND, runs, split
from datablame.models import ModelSpec, load

__all__ = ["one_task"]  # a fixture that every test here uses


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"recipes": ["sound", "papr"]}, "--recipes 'papr': use sound or paper. Did you mean"),
        ({"scale": "cpuu"}, "--scale 'cpuu': unknown"),
        ({"dtype": "float64"}, "--dtype float64: .*the padded view"),
        ({"sources": {"advbench": "x", "data": None}}, "--advbench: none of tiny takes it"),
    ],
)
def test_bad_options_are_told_before_the_model_is_loaded(
    tmp_path: Path, options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_module, "load", lambda *a: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match=said):
        run(tmp_path, tmp_path / "out", **options)


def test_cells_are_planned_once_and_released_files_when_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = bench_module._cells("m", "cpu", ["tiny", "tiny"], [3, 1, 3], ["sound", "paper", "sound"], {})
    assert [c.name for c in cells] == ["tiny-sound-s3", "tiny-sound-s1", "tiny-paper-s3"]
    monkeypatch.setattr(bench_module, "takes", lambda name: ["data"] if name.startswith("released") else [])
    chosen = {c.task for c in bench_module._cells("m", "smoke", None, None, ["sound"], {"data": "dir"})}
    assert chosen == {*bench_module.SMOKE_TASKS, "released-grammars", "released-math"}


def test_a_cell_that_another_process_runs_is_left_to_it(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = run(model_dir, tmp_path / "out", methods="bm25")
    (folder,) = (tmp_path / "cache" / "bench").iterdir()
    path.unlink()
    with FileLock(folder / "lock"), monkeypatch.context() as m:
        m.setattr(bench_module, "run_cell", lambda *a, **k: pytest.fail("the cell was run beside another process"))
        assert run(model_dir, tmp_path / "out", methods="bm25") == [path]
    assert not path.exists()
    run(model_dir, tmp_path / "out", methods="bm25")
    assert path.exists()


def test_results_that_are_not_there_yet_are_not_counted(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "a-sound-s0.json"
    there.write_text('{"version": 1, "results": {}}')
    monkeypatch.setattr(bench_module, "bench", lambda *a, **k: [there, tmp_path / "b-sound-s0.json"])
    code, out, error = run("bench", "run", "--out", tmp_path)
    assert (code, error) == (0, "")
    assert f"results in {tmp_path}: 1; see them with: datablame bench show --scale" in out
    assert "another process is still at b-sound-s0\n" in out
    for option in ("--tasks", "--recipes"):
        code, _, error = run("bench", "run", option, " , ", "--out", tmp_path)
        assert code == 2
        assert f"{option} ' , ': names nothing" in error


def test_results_of_other_sources_lie_beside(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real prompts make other rows of a task: another file, another column of the tables."""
    monkeypatch.setattr(bench_module, "takes", lambda name: ["advbench", "alpaca"])
    monkeypatch.setattr(bench_module, "build", lambda name, scale, seed, **kw: tiny(7 if kw else seed))
    (ours,) = run(model_dir, tmp_path, methods="bm25")
    (theirs,) = run(model_dir, tmp_path, methods="bm25", sources={"advbench": "file", "alpaca": None})
    assert [ours.name, theirs.name] == ["tiny-sound-s0.json", "tiny-advbench-sound-s0.json"]
    found = load_results(tmp_path, str(model_dir), "smoke")
    assert list(found) == ["tiny", "tiny-advbench"] or list(found) == ["tiny-advbench", "tiny"]
    assert found["tiny-advbench"].results[0]["sources"] == ["advbench"]
    assert (
        found["tiny-advbench"]
        .results[0]["command"]
        .endswith(" --tasks tiny --seeds 0 --recipes sound --methods bm25 --advbench ADVBENCH")
    )
    cell = bench_module._cells("m", "cpu", ["released-math"], [0], ["sound"], {})[0]
    assert cell.name == "released-math-sound-s0"  # without its files there is no such task


def test_another_model_of_the_same_name_does_not_overwrite(model_dir: Path, tmp_path: Path) -> None:
    (path,) = run(model_dir, tmp_path / "out", methods="bm25")
    before = path.read_bytes()
    other = tmp_path / "elsewhere" / model_dir.name
    make_model(seed=9).save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    for dry in (True, False):
        with pytest.raises(UserError, match=r"tiny-sound-s0\.json: there is a result of another model of this name"):
            run(other, tmp_path / "out", methods="bm25", dry=dry)
    assert path.read_bytes() == before
    run(other, tmp_path / "own", methods="bm25", dry=True)


def test_the_forecast_is_measured_on_the_model(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []

    class Told(bench_module.Reporter):
        def note(self, message: str) -> None:
            notes.append(message)

    cell, clock = Cell(str(model_dir), "tiny", "smoke", 0), iter([10.0, 50.0, 100.0, 104.0])
    with monkeypatch.context() as m:  # the first step takes 40 seconds, the second 4
        m.setattr(forecast.time, "perf_counter", lambda: next(clock))
        rate = forecast.tokens_per_second(load(ModelSpec(str(model_dir))), cell, tiny())
    rows = encode_rows(Encoding(make_tokenizer(), None, 128), tiny().train)
    assert rate == sum(sorted(len(r.input_ids) for r in rows)[3:]) / 4
    assert run(model_dir, tmp_path, dry=True, reporter=Told())
    assert re.fullmatch(r"1 cells to run \(0 have a result already\) · [\d,]+ tokens .* at \d+ tokens/s", notes[0])
    assert not (tmp_path / "cache" / "bench").exists()
    run(model_dir, tmp_path, methods="bm25")
    monkeypatch.setattr(bench_module, "tokens_per_second", lambda *a: pytest.fail("nothing is to be forecast"))
    run(model_dir, tmp_path, methods="bm25", dry=True, reporter=Told())
    assert notes[1] == "0 cells to run (1 have a result already)"


def test_fingerprints_and_damaged_results(tmp_path: Path) -> None:
    cell = Cell("m", "tiny", "smoke", 0)
    prints = {
        fingerprint(cell, tiny(), "a"),
        fingerprint(cell, tiny(), "b"),
        fingerprint(cell, tiny(version=2), "a"),
        fingerprint(cell, tiny(seed=1), "a"),
        fingerprint(replace(cell, recipe="paper"), tiny(), "a"),
        fingerprint(cell, replace(tiny(), truth=~tiny().truth), "a"),
    }
    assert len(prints) == 6
    assert fingerprint(cell, tiny(), "a") in prints
    path = tmp_path / "x.json"
    assert lacking(path, "f", ["bm25", "length"]) == ["bm25", "length"]
    path.write_text('{"version": 1, "fingerprint"')
    with pytest.raises(UserError, match="damaged; delete it"):
        read_result(path)
    path.write_text('{"version": 0}')
    assert read_result(path) is None
    done = {"bm25": {}, "kfac@response": {"captured": "kfac:labels=data"}, "ekfac@response": {"captured": "kfac"}}
    results = {"reference": {**done, "length": {}}, "generated": done}
    path.write_text(json.dumps({"version": 1, "fingerprint": "f", "answered": ANSWERED, "results": results}))
    # On one set of responses only is not enough, nor are features captured with other options than today's.
    wanted = ["bm25", "length", "kfac@response", "ekfac@response"]
    assert lacking(path, "f", wanted) == ["length", "kfac@response"]
    assert of_these(path, "f")
    assert lacking(path, "other", ["bm25"]) == ["bm25"]
    path.write_text(
        json.dumps({"version": 1, "fingerprint": "f", "results": results})
    )  # the answers' numbers are wrong
    assert lacking(path, "f", ["bm25", "length"]) == ["bm25", "length"]
    assert not of_these(path, "f")  # the usual features are captured again, whichever runs are wanted


def test_results_are_json_with_a_line_a_run() -> None:
    kinds = {"reference": {"x": {"v": [0.5]}, "y": {}}, "generated": {"x": {}}}
    result = {"version": 1, "a": [1, 2], "results": kinds}
    assert json.loads(to_json(result)) == result
    assert '   "x": {"v": [0.5]},\n' in to_json(result)


# ---------------------------------------------------------------- suites


def test_every_step_of_the_ladders_is_a_run_of_the_suites() -> None:
    everything = runs("all")
    assert len(everything) == len(set(everything))
    for _, step in (*LADDER, *REPSIM_LADDER):
        assert step in everything
    for step in everything:
        assert split(step)
    assert set(PAPER) <= set(runs("paper"))
    assert set(SOUND) <= set(runs("sound"))
    assert not [r for r in runs("sound") if r.endswith("@padded")]


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        ("gradcos@answer", "no such view of the loss"),
        ("bm25@response", "does not look at the loss"),
        ("gradco", "gradcos"),
    ],
)
def test_bad_runs(methods: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        runs("all", methods)
    with pytest.raises(UserError, match="use paper, sound or all"):
        runs("both")  # type: ignore[arg-type]


def test_scores_that_the_cache_lost_can_be_had_again(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cell has a result, so that the plain command would do nothing: what the message says does."""
    sha, wanted = base_sha256(load(ModelSpec(str(model_dir)))), ["gradcos@response", "bm25:text=both"]
    out, cells = tmp_path / "out", [(Cell(str(model_dir), "tiny", "smoke", 0), tiny())]
    run(model_dir, out)
    (scores,) = (tmp_path / "cache" / "bench").glob("*/scores.npz")

    def make() -> None:
        truth.against_retraining(cells, sha, "lds", out, runs=wanted)

    scores.unlink()
    run(model_dir, out)
    assert not scores.exists()
    with pytest.raises(UserError, match="sound-s0.json is there, but the cache no longer holds .* --seeds 0 --out DIR"):
        make()
    run(model_dir, tmp_path / "other", methods=wanted[1])
    with pytest.raises(UserError, match="no scores of gradcos@response.*no longer.*--methods gradcos@response --out"):
        make()
    (path,) = out.rglob("tiny-sound-s0.json")
    result = json.loads(path.read_text())
    result["results"]["reference"]["gradcos@response"] = {"error": "why", "seconds": 0}
    path.write_text(json.dumps(result))
    with pytest.raises(UserError, match="no scores of gradcos@response. It failed: why"):
        make()
    run(model_dir, tmp_path / "another")
    monkeypatch.setattr(retraining, "_train", lambda *a: pytest.fail("now it trains"))
    with pytest.raises(pytest.fail.Exception, match="now it trains"):
        make()
