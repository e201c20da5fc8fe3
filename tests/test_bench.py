"""The benchmark on a tiny model: cells, resuming, results, tables, retraining truth."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock

from conftest import make_model, make_tokenizer
from datablame.encoding import Encoding, encode_rows
from datablame.errors import UserError
from datablame.evaluation import bench as bench_module
from datablame.evaluation import cell as cell_module
from datablame.evaluation import finetunes, forecast, scoring
from datablame.evaluation.bench import bench, lacking, read_result, result_path, to_json
from datablame.evaluation.cell import FEATURES, Cell, fingerprint
from datablame.evaluation.results import load_results
from datablame.evaluation.suites import LADDER, PAPER, REPSIM_LADDER, SOUND, runs, split
from datablame.evaluation.tables import HEADINGS
from datablame.evaluation.tasks.base import Task, examples, same_label
from datablame.models import ModelSpec, load
from datablame.report.bench import write_bench
from datablame.tuning import TuneOptions

METHODS = "graddot,gradcos,exact:damping=0.1,adamdot:center=1,relatif=l,repsim:layer=last,text=prompt,bm25:text=both"


def tiny(seed: int = 0, version: int = 1) -> Task:
    """Two classes, four rows each, four queries; the label shows in the response."""
    words = ["snow", "rain", "tea", "kettles", "spiders", "pears"]
    rows = [
        (f"Tell of {w} {seed}.", "Yes, yes." if k % 2 else "No.", "yes" if k % 2 else "no") for k, w in enumerate(words)
    ]
    train, queries = examples(rows * 1), examples([(p.replace("Tell", "Say"), r, c) for p, r, c in rows[:4]])
    return Task(
        name="tiny", version=version, title="Yes or no <b>", train=train, queries=queries,
        groups=["first", "first", "second", "second"], truth=same_label(train, queries), main=("first", "second"),
        behaves=lambda e, answer: answer.strip().startswith(e.response[:2]),
        recipe=TuneOptions(rank=2, epochs=1, batch=4, rate=1e-2),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def one_task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_module, "build", lambda name, scale, seed, **kw: tiny(seed))
    monkeypatch.setattr(bench_module, "takes", lambda name: [])
    monkeypatch.setenv("DATABLAME_CACHE", str(tmp_path / "cache"))


def run(model_dir: Path, out: Path, **options: Any) -> list[Path]:
    return bench(str(model_dir), out, **({"tasks": ["tiny"], "methods": METHODS, "seeds": [0]} | options))


def test_a_cell_from_rows_to_a_page_and_not_twice(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    (path,) = run(model_dir, out)
    result = json.loads(path.read_text())
    assert path == result_path(out, Cell(str(model_dir), "tiny", "smoke", 0))
    assert set(result["results"]) == {"reference", "generated"}
    wanted = runs("all", METHODS)
    assert len(wanted) == 4 * 4 + 2
    for kind in result["results"].values():
        assert list(kind) == wanted
        assert not [v["error"] for v in kind.values() if "error" in v]
    one = result["results"]["reference"]["gradcos@response"]
    assert len(one["accuracy"]) == 4
    assert all(np.isfinite(one[m]).all() for m in HEADINGS)
    assert one["top"] == [int(t) for t in one["top"]]
    assert result["learnt"]["loss"]["base"] > 0
    assert result["seconds"]["all"] == pytest.approx(
        sum(v for k, v in result["seconds"].items() if k != "all"), abs=0.1
    )
    assert set(result["seconds"]) == {"tune", "answers", "features", "scores", "all"}
    assert result["model"] == model_dir.name  # and no path of this machine
    assert str(model_dir.parent) not in path.read_text()
    # No features are left; the adapter is with all other fine-tunes, with its checkpoints.
    (folder,) = (tmp_path / "cache" / "bench").iterdir()
    assert {p.name for p in folder.iterdir()} == {
        "train.jsonl",
        "queries.jsonl",
        "answers.json",
        "scores.npz",
        "seconds.json",
        "lock",
    }
    (tuned,) = (tmp_path / "cache" / "finetunes").iterdir()
    assert finetunes.snapshots(tuned / "adapter")

    # A second call runs nothing; a new method runs alone, and keeps the others.
    monkeypatch.setattr(bench_module, "run_cell", lambda *a, **k: pytest.fail("the cell was run again"))
    run(model_dir, out)
    monkeypatch.undo()
    monkeypatch.setattr(bench_module, "build", lambda name, scale, seed, **kw: tiny(seed))
    monkeypatch.setattr(bench_module, "takes", lambda name: [])
    monkeypatch.setenv("DATABLAME_CACHE", str(tmp_path / "cache"))
    before = json.loads(path.read_text())["results"]["reference"]
    run(model_dir, out, methods=f"{METHODS},length")
    after = json.loads(path.read_text())["results"]["reference"]
    assert set(after) == {*before, "length"}
    assert after["graddot@padded"] == before["graddot@padded"]

    found = load_results(out, str(model_dir), "smoke")
    page = write_bench(found, tmp_path / "page.html").read_text()
    assert "Yes or no &lt;b&gt;" in page
    assert "Yes or no <b>" not in page
    assert "https://" not in page.split("<script>")[0]
    with pytest.raises(UserError, match="no results under the paper recipe"):
        load_results(out, str(model_dir), "smoke", "paper")


def test_a_result_keeps_the_residual_of_a_solver(model_dir: Path, tmp_path: Path) -> None:
    """More steps leave less; what solves nothing has none; stores of another version in the cache are not read."""
    steps = "lissa:steps=1@response,lissa:steps=1000@response,graddot@response"
    (path,) = run(model_dir, tmp_path / "out", methods=steps, keep=True)
    found = json.loads(path.read_text())["results"]["reference"]
    one, many = (found[f"lissa:steps={k}@response"]["residual"] for k in (1, 1000))
    assert 0 < many < one <= 1
    assert "residual" not in found["graddot@response"]
    (folder,) = (tmp_path / "cache" / "bench").iterdir()
    path.unlink()
    (folder / FEATURES).rename(folder / "features-1")
    manifest = folder / "features-1" / "train" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"schema": ', '"schema": 1'))
    run(model_dir, tmp_path / "out", methods=steps)
    assert json.loads(path.read_text())["results"]["reference"]["graddot@response"] | {"seconds": 0} == (
        found["graddot@response"] | {"seconds": 0}
    )


def test_scores_are_those_of_the_stores_they_come_from(model_dir: Path, tmp_path: Path) -> None:
    """The padded view is not the response's; `all` is the sum; what is in the file is the metric of the matrix."""
    (path,) = run(model_dir, tmp_path / "out", keep=True)
    (folder,) = (tmp_path / "cache" / "bench").iterdir()
    from datablame.evaluation import metrics, views
    from datablame.store import FeatureStore

    train, queries = FeatureStore.open(folder / FEATURES / "train"), FeatureStore.open(folder / FEATURES / "reference")
    dots = {}
    for view in views.VIEWS:
        g, v = views.gradients(train, view), views.gradients(queries, view)
        dots[view] = sum((v[b] @ g[b].T).double() for b in g).numpy()
    mean = {b: x / 127 for b, x in train.features("padded-gradients").items()}
    assert all(torch.allclose(mean[b], x) for b, x in views.gradients(train, "padded").items())
    kept = scoring.read_matrices(folder / "scores.npz")
    result = json.loads(path.read_text())["results"]["reference"]
    for view, want in dots.items():
        np.testing.assert_allclose(kept[f"graddot@{view}"], want, rtol=1e-3, atol=1e-4 * np.abs(want).max())
        values = metrics.auroc(kept[f"graddot@{view}"], tiny().truth)
        assert result[f"graddot@{view}"]["auroc"] == pytest.approx(values, abs=1e-4)
    assert np.abs(dots["all"] - dots["response"]).max() > 1e-3 * np.abs(dots["all"]).max()
    assert np.abs(dots["all"] - 127**2 * dots["padded"]).max() > 1e-3 * np.abs(dots["all"]).max()


def test_an_interrupted_cell_goes_on(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = json.loads(run(model_dir, tmp_path / "straight")[0].read_text())
    monkeypatch.setenv("DATABLAME_CACHE", str(tmp_path / "second"))

    def broken(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(cell_module, "score_runs", broken)
        with pytest.raises(KeyboardInterrupt):
            run(model_dir, tmp_path / "resumed")
    with monkeypatch.context() as m:  # neither trained nor answered again
        m.setattr(finetunes, "tune", broken)
        m.setattr(cell_module, "answers", broken)
        resumed = json.loads(run(model_dir, tmp_path / "resumed")[0].read_text())
    for kind in ("reference", "generated"):
        for name, values in straight["results"][kind].items():
            assert {k: v for k, v in resumed["results"][kind][name].items() if k != "seconds"} == {
                k: v for k, v in values.items() if k != "seconds"
            }


def test_the_papers_own_fine_tune(model_dir: Path, tmp_path: Path) -> None:
    """Padding and prompt in the training loss: another adapter, another file, the same runs."""
    paths = run(model_dir, tmp_path / "out", recipes=["sound", "paper"], methods="graddot,bm25")
    assert [p.name for p in paths] == ["tiny-sound-s0.json", "tiny-paper-s0.json"]
    sound, paper = (json.loads(p.read_text()) for p in paths)
    assert paper["recipe_options"]["batch"] == 32
    assert paper["fingerprint"] != sound["fingerprint"]
    records = [json.loads(p.read_text()) for p in (tmp_path / "cache" / "finetunes").glob("*/adapter/datablame.json")]
    encodings = sorted((r["encoding"]["pad_to"] or 0, r["encoding"]["loss_on"]) for r in records)
    assert encodings == [(0, "response"), (128, "all")]


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


def test_a_method_without_finite_scores_fails_alone(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datablame.methods.controls import Random

    monkeypatch.setattr(Random, "score", lambda self, query: torch.full((len(query), self.n), torch.nan))
    (path,) = run(model_dir, tmp_path / "out", methods="bm25,random")
    found = json.loads(path.read_text())["results"]
    assert found["reference"]["random"]["error"] == "24 of 24 scores are not finite."
    assert "error" not in found["reference"]["bm25"]
    assert load_results(tmp_path / "out", str(model_dir), "smoke")["tiny"].runs == ["bm25"]


def test_a_method_of_a_users_own_that_breaks_fails_alone(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datablame.methods.controls import Random

    monkeypatch.setattr(Random, "score", lambda self, query: 1 / 0)
    (path,) = run(model_dir, tmp_path / "out", methods="bm25,random")
    found = json.loads(path.read_text())["results"]["reference"]
    assert found["random"]["error"] == "ZeroDivisionError: division by zero"
    assert "error" not in found["bm25"]


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


def test_a_padded_view_that_is_not_finite_is_told(model_dir: Path, tmp_path: Path) -> None:
    cell = Cell(str(model_dir), "tiny", "smoke", 0)
    with pytest.raises(UserError, match=r"row 0 \(id 0\): under the view padded, .* is not finite"):
        cell_module.run_cell(cell, tiny(), ["bm25"], tmp_path, "sha", dtype="float64")


def test_a_behaviour_that_was_not_learnt_fails_the_run_above_smoke(model_dir: Path, tmp_path: Path) -> None:
    run(model_dir, tmp_path / "a", methods="bm25")
    with pytest.raises(UserError, match="tiny-sound-s0: the behaviour was not learnt"):
        run(model_dir, tmp_path / "b", methods="bm25", scale="cpu")
    assert (tmp_path / "b" / model_dir.name / "cpu" / "tiny-sound-s0.json").exists()


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
        .endswith(" --tasks tiny --seeds 0 --recipes sound --advbench ADVBENCH")
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
    assert lacking(path, "f", ["a", "b"]) == ["a", "b"]
    path.write_text('{"version": 1, "fingerprint"')
    with pytest.raises(UserError, match="damaged; delete it"):
        read_result(path)
    path.write_text('{"version": 0}')
    assert read_result(path) is None
    path.write_text(json.dumps({"version": 1, "fingerprint": "f", "results": {"r": {"a": 1}, "g": {}}}))
    assert lacking(path, "f", ["a", "b"]) == ["a", "b"]
    assert lacking(path, "other", ["a"]) == ["a"]


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


# ---------------------------------------------------------------- tables
