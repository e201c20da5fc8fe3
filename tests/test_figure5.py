"""Figure 5 on a tiny model: numbers against the methods at each checkpoint, what is missing, what resumes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr

from conftest import Run
from curve_cases import one_task, request, rows_of, tiny, whole
from datablame.errors import UserError
from datablame.evaluation import along, finetunes, metrics
from datablame.evaluation.cell import FEATURES, Cell, token_loss
from datablame.evaluation.intervals import flip_test
from datablame.evaluation.scoring import CellInputs
from datablame.evaluation.suites import split
from datablame.evaluation.tasks.base import Task
from datablame.methods import parse
from datablame.models import ModelSpec, load
from datablame.paper import figure4, figure5, results
from datablame.store import FeatureStore

__all__ = ["one_task"]  # a fixture that every test here uses


def test_figure5_is_what_the_methods_give_at_each_checkpoint(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = along.at_checkpoint
    monkeypatch.setattr(along, "at_checkpoint", lambda *a, **k: kept(*a, **k, keep=True))
    path = figure5.run(request("figure5", model_dir, tmp_path / "out"))
    r = json.loads(path.read_text(), parse_constant=pytest.fail)
    x, task = r["tasks"]["grammars"], tiny()
    points = x["checkpoints"]
    assert [p["step"] for p in points] == [1, 2, 3, 6]
    assert (r["left_out"], [p["failed"] for p in points]) == ([], [{}] * 4)
    losses, values = [], []
    for p in points:
        (folder,) = (tmp_path / "cache" / "along").glob(f"*-step{p['step']}-*/{FEATURES}")
        train, queries = (FeatureStore.open(folder / part) for part in ("train", "queries"))
        assert p["loss"]["train"] == pytest.approx(token_loss(train))
        for run in figure5.RUNS:
            spec, view = split(run)
            scores = CellInputs(train, queries, view).score(parse(spec))
            for m in figure5.METRICS:
                expected = metrics.per_query(scores, task.truth, 2)[m][:3]  # the last query is not of a main group
                assert p["runs"][run][m]["values"] == pytest.approx(expected.tolist(), abs=1e-4)
                assert p["runs"][run][m]["value"] == pytest.approx(expected.mean(), abs=1e-4)
        losses.append(p["loss"]["train"]["tuned"])
        values.append(p["runs"]["graddot@response"]["auroc"]["value"])
    assert losses[-1] < losses[0] < points[0]["loss"]["train"]["base"]
    rho = x["correlation"]["graddot@response"]["auroc"]
    assert rho is None or rho == pytest.approx(spearmanr([-v for v in losses], values).statistic, abs=1e-4)
    # The last checkpoint is the adapter, loaded and looked at in another way.
    (adapter,) = (p for p in (tmp_path / "cache").glob("**/adapter_model.safetensors") if "checkpoint" not in str(p))
    loaded = load(ModelSpec(str(model_dir), str(adapter.parent)))
    assert losses[-1] == pytest.approx(loss_of(loaded, task), rel=1e-4)
    whole(figure5.show(tmp_path / "out", "figure5"))
    # What is there is kept; another seed is another run, and does not overwrite it.
    monkeypatch.setattr(along, "at_checkpoint", lambda *a, **k: pytest.fail("measured again"))
    figure5.run(request("figure5", model_dir, tmp_path / "out"))


def test_what_failed_at_a_checkpoint_is_tried_again(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datablame.methods.influence import Exact

    task, cell = tiny(), Cell(str(model_dir), "tiny", "smoke", 0)
    adapter = finetunes.fine_tuned(str(model_dir), task.train, task.recipe, model_sha256="sha", checkpoints=False)

    def found() -> dict[str, Any]:
        runs = ["graddot@all", "exact:damping=0.1@response"]
        at = along.at_checkpoint(cell, task, 6, adapter, runs, tmp_path / "along", model_sha256="sha")
        results: dict[str, Any] = at["results"]["reference"]
        return results

    with monkeypatch.context() as m:
        m.setattr(Exact, "score", lambda *a: (_ for _ in ()).throw(MemoryError("for a moment")))
        bad = found()
    assert bad["exact:damping=0.1@response"]["error"] == "MemoryError: for a moment"
    good = found()
    assert "auroc" in good["exact:damping=0.1@response"]
    assert good["graddot@all"] == bad["graddot@all"] | {"seconds": good["graddot@all"]["seconds"]}
    monkeypatch.setattr(along, "_found", lambda *a: pytest.fail("what is whole is kept"))
    assert found() == good


def test_the_pages_tables_hold_the_results_numbers(model_dir: Path, tmp_path: Path, script: ModuleType) -> None:
    empty = script.render("<!-- table: figure5 -->\nold\n<!-- end -->")
    assert "*Not run yet.*" in empty
    r = json.loads(figure5.run(request("figure5", model_dir, tmp_path / "paper")).read_text())
    rows = rows_of(script.render("<!-- table: figure5 -->\nold\n<!-- end -->"))
    first, last = (r["tasks"]["grammars"]["checkpoints"][k] for k in (0, -1))
    (row,) = (x for x in rows if x[:2] == ["grammars, response", "cosine"])
    assert row[2].startswith(f"{first['runs']['gradcos@response']['accuracy']['value']:.2f} (")
    assert row[4].startswith(f"{last['runs']['gradcos@response']['accuracy']['value']:.2f} (")
    assert row[6].startswith(("+", "-", "−"))
    assert all(len(x) == len(rows[0]) for x in rows)
    r4 = json.loads(figure4.run(request("figure4", model_dir, tmp_path / "paper")).read_text())
    rows = rows_of(script.render("<!-- table: figure4 -->\nold\n<!-- end -->"))
    found = [x for x in rows if x[0] == "grammars, padded" and len(x) == 11]
    runs = r4["tasks"]["grammars"]["runs"]
    for metric, row in zip(("accuracy", "auroc"), found, strict=False):
        for column, run in ((5, "exact-block:damping=0.1@padded"), (7, "exact-block:damping=1.0,unit=rank@padded")):
            x = runs[run][metric]
            assert row[column] == f"{x['value']:.2f} ({x['interval95'][0]:.2f} to {x['interval95'][1]:.2f})"
    left = runs["lissa:steps=10,damping=0.1@padded"]["residual"]["value"]
    assert found[2][1:3] == [f"{runs['lissa:steps=1,damping=0.1@padded']['residual']['value']:.2g}", f"{left:.2g}"]
    assert ["grammars, released", "–", "–", "–", "–"] in [x[:5] for x in rows]


def loss_of(loaded: Any, task: Task) -> float:
    """Mean loss of the response tokens by the model's own logits, one row at a time."""
    import torch

    from datablame.encoding import IGNORED, Encoding, encode_rows

    total, count = 0.0, 0
    for row in encode_rows(Encoding(loaded.tokenizer, None, loaded.max_length), task.train):
        logits = loaded.model(torch.tensor([row.input_ids])).logits[0].log_softmax(dim=-1)
        for k, label in enumerate(row.labels[1:]):
            if label != IGNORED:
                total, count = total - float(logits[k, label]), count + 1
    return total / count


def prepared(model_dir: Path) -> list[tuple[int, Path]]:
    """The tiny fine-tune, trained."""
    task, cell = tiny(), Cell(str(model_dir), "grammars", "smoke", 0)
    sha = finetunes.base_sha256(load(ModelSpec(str(model_dir), None, None)))
    from datablame.evaluation.cell import options

    return finetunes.snapshots(finetunes.fine_tuned(cell.model, task.train, options(cell, task), model_sha256=sha))


def test_figure5_goes_on_where_it_was_interrupted(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a fine-tune nor a finished checkpoint is done twice, and the numbers are those of one go."""
    real, done = along._found, []

    def stops(*a: Any) -> dict[str, Any]:
        done.append(Path(a[2]).name)
        if len(done) == 3:
            raise KeyboardInterrupt
        return real(*a)

    monkeypatch.setattr(along, "_found", stops)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        figure5.run(request("figure5", model_dir, out))
    assert not (out / "figure5.json").exists()
    figure5.run(request("figure5", model_dir, out))
    assert done == ["checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-3", "checkpoint-6"]
    assert not list((tmp_path / "cache" / "along").glob(f"*/{FEATURES}"))  # stores are deleted
    again = json.loads((out / "figure5.json").read_text())
    shutil.rmtree(tmp_path / "cache" / "along")
    (out / "figure5.json").unlink()
    figure5.run(request("figure5", model_dir, out))
    assert json.loads((out / "figure5.json").read_text())["tasks"] == again["tasks"]


def test_a_checkpoint_that_another_process_is_at_comes_last_and_is_waited_for(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = along.at_checkpoint, []

    def at(cell: Any, task: Any, step: int, *a: Any, wait: bool, **k: Any) -> Any:
        asked.append((step, wait))
        return None if step == 1 and not wait else real(cell, task, step, *a, wait=wait, **k)

    monkeypatch.setattr(along, "at_checkpoint", at)
    figure5.run(request("figure5", model_dir, tmp_path))
    assert asked == [(1, False), (2, False), (3, False), (6, False), (1, True)]
    r = json.loads((tmp_path / "figure5.json").read_text())
    assert [p["step"] for p in r["tasks"]["grammars"]["checkpoints"]] == [1, 2, 3, 6]


def test_two_processes_share_a_checkpoint(model_dir: Path, tmp_path: Path) -> None:
    task, cell = tiny(), Cell(str(model_dir), "tiny", "smoke", 0)
    adapter = finetunes.fine_tuned(str(model_dir), task.train, task.recipe, model_sha256="sha", checkpoints=False)
    at = lambda: along.at_checkpoint(  # noqa: E731
        cell, task, 6, adapter, ["graddot@response"], tmp_path / "along", model_sha256="sha", wait=False
    )
    assert at() is not None
    (folder,) = (tmp_path / "along").iterdir()
    with FileLock(folder / "lock"):
        assert at() is None


def test_figure5_leaves_out_what_is_missing_and_what_is_not_finite(model_dir: Path, tmp_path: Path) -> None:
    """A NaN is never averaged in; with too few checkpoints there is no figure."""
    there = dict(prepared(model_dir))
    weights = there[2] / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({k: v * float("nan") for k, v in tensors.items()}, weights)
    figure5.run(request("figure5", model_dir, tmp_path / "a"))
    r = json.loads((tmp_path / "a" / "figure5.json").read_text(), parse_constant=pytest.fail)
    assert [p["step"] for p in r["tasks"]["grammars"]["checkpoints"]] == [1, 3, 6]
    (why,) = r["left_out"]
    assert re.search(r"grammars, step 2: left out: row .* is not finite", why)
    assert why in figure5.show(tmp_path / "a", "figure5").notes
    shutil.rmtree(there[3])
    with pytest.raises(
        UserError, match="no fine-tune has 3 checkpoints.*step 3: left out, its checkpoint is not there"
    ):
        figure5.run(request("figure5", model_dir, tmp_path / "b"))
    assert not (tmp_path / "b" / "figure5.json").exists()


def test_a_run_that_fails_at_one_checkpoint_is_a_gap_there(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = "graddot@padded"

    def checkpoint(step: int, loss: float, values: list[float] | None) -> dict[str, Any]:
        one = {"datainf:damping=0.1@padded": 0.95}  # one ranking for all queries, which are of one class
        runs_: dict[str, Any] = {
            x: {m: [1.0, 0.0] for m in figure5.METRICS} | {"query_independent_share": one.get(x, 0.2)}
            for x in figure5.RUNS
        }
        of_run = dict.fromkeys(figure5.METRICS, values) | {"query_independent_share": 0.2}
        runs_[run] = {"error": "no"} if values is None else of_run
        return {
            "step": step, "main": ["q"], "queries": [{"group": "q", "label": "a"}] * 2, "seconds": 1.0,
            "results": {"reference": runs_}, "chance": {m: [0.5, 0.5] for m in figure5.METRICS},
            "loss": {who: {"tuned": loss, "base": 3.0} for who in ("train", "queries")},
        }  # fmt: skip

    some = [checkpoint(1, 3.0, [0.0, 0.0]), checkpoint(2, 2.0, None), checkpoint(4, 1.5, [1.0, 0.0])]
    some += [checkpoint(8, 1.0, [1.0, 1.0])]
    found = figure5.summary({"grammars": {"rows": 6, "shows": "neither", "checkpoints": some}})
    told = found["tasks"]["grammars"]
    assert [run in p["runs"] for p in told["checkpoints"]] == [True, False, True, True]
    assert told["checkpoints"][1]["failed"] == {run: "no"}
    assert told["correlation"][run]["accuracy"] == 1.0  # rises as the loss falls, over three checkpoints
    assert told["correlation"]["graddot@response"]["accuracy"] is None  # does not vary
    (t,) = (t for t in found["tests"] if (t["run"], t["metric"]) == (run, "accuracy"))
    assert (t["value"], t["p"]) == (1.0, pytest.approx(0.5, abs=0.01))  # two queries: 2 of 4 flips are as far
    assert "datainf:damping=0.1@padded" in figure5.RUNS
    fixed = told["checkpoints"][0]["runs"]["datainf:damping=0.1@padded"]["accuracy"]
    assert (fixed["value"], fixed["interval95"]) == (0.5, None)
    assert results.with_half(fixed) == "0.50 ≡"
    assert "datainf:damping=0.1@padded" not in {t["run"] for t in found["tests"]}


def test_too_few_queries_are_told() -> None:
    """Five queries that all agree have p = 1/16; six, 1/32."""
    five, six = (flip_test(np.ones((1, m)))[0] for m in (5, 6))
    assert six < 0.05 < five
    (said,) = results.too_few({"a": {"queries": 5}, "b": {"queries": 6}})
    assert "a: with 5 queries" in said
    assert "0.0625" in said


def test_checkpoints_are_log_spaced() -> None:
    every = [(s, Path(str(s))) for s in (1, 2, 4, 8, 16, 30, 60, 90, 120, 150, 180)]
    assert [s for s, _ in along.spaced(every, 8)] == [1, 2, 4, 8, 16, 30, 90, 180]
    assert [s for s, _ in along.spaced(every, 3)] == [1, 16, 180]
    assert along.spaced(every[:2], 8) == every[:2]


def test_the_command_line(run: Run, model_dir: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "o")
    code, _, err = run("paper", "run", "figure5", "--model", model_dir, *out)
    assert code == 0, err
    code, said, err = run("paper", "show", "figure5", *out)
    assert code == 0, err
    assert "from step 1 to 6" in " ".join(said.split())
    text = (tmp_path / "o" / "figure5.html").read_text(encoding="utf-8")
    assert "autorange" in text
    code, _, err = run("paper", "run", "figure5", "--model", model_dir, "--seed", 1, *out)
    assert (code, "holds another run" in err) == (2, True)
