"""Retraining truth: removal and the linear datamodeling score, kept and shared trainings."""

from __future__ import annotations

import json
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from scipy.stats import spearmanr

import conftest
from bench_cases import METHODS, one_task, run, tiny
from datablame.errors import UserError
from datablame.evaluation import bench as bench_module
from datablame.evaluation import retraining, scoring, tasks, truth
from datablame.evaluation.cell import Cell
from datablame.evaluation.finetunes import base_sha256
from datablame.evaluation.result_files import result_path
from datablame.evaluation.retraining import Job, Retrained
from datablame.evaluation.suites import runs
from datablame.evaluation.tables import REFERENCES
from datablame.models import ModelSpec, load

__all__ = ["one_task"]  # a fixture that every test here uses


def job(model_dir: Path, kept: list[int], **changes: Any) -> Job:
    return Job(**({
        "cell": Cell(str(model_dir), "tiny", "smoke", 0), "task": tiny(), "kept": tuple(kept), "seed": 0,
        "generate": False,
    } | changes))  # fmt: skip


# ---------------------------------------------------------------- trainings


def test_lds_is_the_rank_correlation_with_the_loss() -> None:
    rng = np.random.default_rng(0)
    scores, losses = rng.normal(size=(3, 10)), rng.normal(size=(8, 3))
    sets = retraining.half_sets(10, 8, seed=0)
    assert (sets.sum(axis=1) == 5).all()
    got = retraining.lds(scores, sets, losses)
    for q in range(3):
        predicted = [-sum(scores[q, i] for i in range(10) if s[i]) for s in sets]
        assert got[q] == pytest.approx(spearmanr(predicted, losses[:, q]).statistic)
    with pytest.raises(UserError, match="1 of 30 scores are not finite"):
        retraining.lds(np.where(scores == scores.max(), np.inf, scores), sets, losses)
    # A query whose loss is what the scores say has 1; one that does not vary has 0.
    assert retraining.lds(scores, sets, -(scores @ sets.T).T) == pytest.approx(np.ones(3))
    assert (retraining.lds(scores * 0, sets, losses) == 0).all()
    assert retraining.noise_ceiling(losses, losses) == pytest.approx(np.ones(3))


def test_top_rows_are_those_that_the_group_ranks_highest() -> None:
    scores = np.array([[3.0, 2, 1, 0], [0, 100, 2, 1], [9, 0, 0, 0]])
    assert retraining.top_rows(scores, [0, 1], 2) == [1, 0]
    assert retraining.top_rows(scores, [2], 1) == [0]
    assert len(set(retraining.random_rows(10, 4, seed=1))) == 4


def test_a_training_looks_at_the_queries_and_is_kept(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = retraining.retrain(job(model_dir, [0, 1, 2, 3], generate=True), tmp_path, model_sha256="sha")
    assert first is not None
    assert first.loss.shape == first.behaves.shape == (4,)
    t = tiny()
    asked_less = replace(t, queries=t.queries[:2], groups=t.groups[:2], truth=t.truth[:2], main=("first",))
    less = retraining.retrain(job(model_dir, [0, 1, 2, 3], task=asked_less), tmp_path, model_sha256="sha")
    other = retraining.retrain(job(model_dir, [2, 3, 4, 5]), tmp_path, model_sha256="sha")
    reseeded = retraining.retrain(job(model_dir, [0, 1, 2, 3], seed=1), tmp_path, model_sha256="sha")
    assert less is not None
    assert other is not None
    assert reseeded is not None
    np.testing.assert_allclose(less.loss, first.loss[:2], rtol=1e-4)  # the same training, seen in other batches
    assert not np.allclose(first.loss, other.loss)
    assert not np.allclose(first.loss, reseeded.loss)
    monkeypatch.setattr(retraining, "fine_tuned", lambda *a, **k: pytest.fail("trained again"))
    again = retraining.retrain(job(model_dir, [3, 2, 1, 0], generate=True), tmp_path, model_sha256="sha")
    assert again is not None
    assert (again.loss == first.loss).all()
    (job(model_dir, [0, 1, 2, 3], generate=True).folder(tmp_path) / "result.json").write_text('{"loss": [1')
    with pytest.raises(UserError, match="result.json: damaged; delete it, and run the same command again"):
        job(model_dir, [0, 1, 2, 3], generate=True).found(tmp_path)
    with pytest.raises(UserError, match="every row was dropped"):
        job(model_dir, [])


def quick(trained: list[tuple[int, ...]], seconds: float = 0.0) -> Any:
    """In place of a training: its loss is a sum over the kept rows."""

    def train(job: Job, folder: Path, model_sha256: str, device: object, dtype: object) -> None:
        trained.append((job.seed, *job.kept))
        time.sleep(seconds)
        folder.mkdir(parents=True, exist_ok=True)
        m = len(job.task.queries)
        value = {"loss": [sum(job.kept) + job.seed + 0.1 * j for j in range(m)], "behaves": [True] * m}
        (folder / "result.json").write_text(json.dumps(value))

    return train


def test_two_processes_share_the_trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[tuple[int, ...]] = []
    monkeypatch.setattr(retraining, "_train", quick(trained, 0.05))
    jobs = [job(tmp_path, [0, k], seed=s) for s in (0, 1) for k in range(1, 6)]
    done: list[list[Job]] = [[], []]
    at_work = [
        threading.Thread(
            target=lambda d=d: d.extend(retraining.retrain_all(jobs, tmp_path / "work", model_sha256="sha"))
        )
        for d in done
    ]
    for thread in at_work:
        thread.start()
    for thread in at_work:
        thread.join()
    assert sorted(trained) == sorted((j.seed, *j.kept) for j in jobs)  # each once
    for d in done:  # and both know all of them
        assert {id(j) for j in d} == {id(j) for j in jobs}
        assert len(d) == len(jobs)


def test_a_training_that_another_process_does_comes_last_and_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[int, ...]] = []
    monkeypatch.setattr(retraining, "_train", quick(trained))
    jobs = [job(tmp_path, [k]) for k in range(3)]
    lock = FileLock(jobs[0].folder(tmp_path).with_suffix(".lock"))
    with lock:
        assert retraining.retrain(jobs[0], tmp_path, model_sha256="sha", wait=False) is None
        order = retraining.retrain_all(jobs, tmp_path, model_sha256="sha")
        assert [next(order), next(order)] == jobs[1:]
        assert trained == [(0, 1), (0, 2)]
    # The other one ended without a result: the one that waited takes it up.
    assert list(order) == jobs[:1]
    assert trained[-1] == (0, 0)


# ---------------------------------------------------------------- results


@pytest.fixture
def sha(model_dir: Path) -> str:
    return base_sha256(load(ModelSpec(str(model_dir))))


BM25 = REFERENCES["B"]
WANTED = ["gradcos@response", BM25]


def test_methods_are_held_against_retraining(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sha: str
) -> None:
    monkeypatch.setattr(truth, "HALF_SETS", 4)
    out = tmp_path / "out"
    run(model_dir, out)
    cell = Cell(str(model_dir), "tiny", "smoke", 0)
    (path,) = truth.against_retraining([(cell, tiny())], sha, "removal", out, runs=WANTED)
    found = json.loads(path.read_text())
    assert list(found["after"]) == ["nothing", *WANTED, "chance", "the right rows", truth.AGAIN]
    assert found["dropped"] == 3
    assert all(len(a["rows"]) == 3 for name, a in found["after"].items() if not name.startswith("nothing"))
    assert found["after"]["the right rows"]["right"] == 3
    assert found["model"] == model_dir.name  # and no path of this machine
    assert found["command"] == (
        f"datablame bench retrain tiny --truth removal --model {model_dir.name} --scale smoke --seeds 0 "
        f"--run {WANTED[0]} --run {WANTED[1]}"
    )
    assert found["timed"] == found["trainings"] == len(found["after"])
    assert found["seconds"] > 0
    whole = job(model_dir, list(range(6)), generate=True).found(tmp_path / "cache" / "retrained" / sha[:16])
    assert whole is not None
    assert found["after"]["nothing"]["loss"] == pytest.approx(whole.loss[[0, 2]], abs=1e-4)
    assert found["after"]["nothing"]["behaves"] == whole.behaves[[0, 2]].tolist()

    (path,) = truth.against_retraining([(cell, tiny())], sha, "lds", out)
    found = json.loads(path.read_text())
    assert set(found["lds"]) == set(runs("all", METHODS))
    assert len(found["noise_ceiling"]["queries"]) == 4
    first = "no scores of gradnorm@response. Run it first: datablame bench run .* --methods gradnorm@response"
    with pytest.raises(UserError, match=first):
        truth.against_retraining([(cell, tiny())], sha, "lds", out, runs=["gradnorm@response"])
    monkeypatch.setattr(retraining, "_train", lambda *a: pytest.fail("trained before all seeds were looked at"))
    with pytest.raises(UserError, match="tiny-sound-s5: there are no scores yet"):
        truth.against_retraining([(cell, tiny()), (replace(cell, seed=5), tiny(5))], sha, "lds", out)


def test_a_result_that_fits_is_not_made_again_and_a_changed_one_is(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sha: str
) -> None:
    """Each seed by itself, written whole; also on a machine that has the result and no scores."""
    out, trained, notes = tmp_path / "out", [], []
    monkeypatch.setattr(retraining, "_train", quick(trained))
    monkeypatch.setattr(truth, "HALF_SETS", 3)
    run(model_dir, out, seeds=[0, 1], methods=f"{METHODS},subspace:matrix=fisher")
    cells = [(Cell(str(model_dir), "tiny", "smoke", s), tiny(s)) for s in (0, 1)]

    class Told(truth.Reporter):
        def note(self, message: str) -> None:
            notes.append(message)

    def make(kind: Any = "lds", **options: Any) -> list[Path]:
        return truth.against_retraining(cells, sha, kind, out, reporter=Told(), **options)

    paths = make()
    assert [p.name for p in paths] == ["tiny-sound-s0-lds.json", "tiny-sound-s1-lds.json"]
    assert len(trained) == 2 * 2 * 3
    assert not list(paths[0].parent.glob("*.part"))
    before = [p.stat().st_mtime_ns for p in paths]
    for path, cell in zip(paths, cells, strict=True):  # every run of the cell
        of_cell = json.loads(result_path(out, cell[0]).read_text())["results"]["reference"]
        assert sorted(json.loads(path.read_text())["runs"]) == sorted(of_cell)
    make()
    assert [p.stat().st_mtime_ns for p in paths] == before
    assert notes[-2:] == [f"{p.name}: is there already" for p in paths]
    for file in (tmp_path / "cache" / "bench").glob("*/scores.npz"):
        file.rename(file.with_name("away.npz"))
    make()
    assert [p.stat().st_mtime_ns for p in paths] == before
    for file in (tmp_path / "cache" / "bench").glob("*/away.npz"):
        file.rename(file.with_name("scores.npz"))

    paths[0].write_text(json.dumps(json.loads(paths[0].read_text()) | {"fingerprint": "of something else"}))
    make()
    assert len(trained) == 12  # the trainings are still kept
    assert json.loads(paths[0].read_text())["fingerprint"] != "of something else"
    assert paths[1].stat().st_mtime_ns == before[1]
    whole = paths[0].read_text()
    make(runs=WANTED)  # they are there, and the others stay
    assert paths[0].read_text() == whole
    monkeypatch.setattr(truth, "HALF_SETS", 4)
    make(runs=WANTED)
    assert json.loads(paths[0].read_text())["half_sets"] == 4
    make("removal", runs=WANTED)
    paths[0].write_text('{"version": 2, "fing')
    with pytest.raises(UserError, match="tiny-sound-s0-lds.json: damaged; delete it"):
        make()
    paths[0].write_text(json.dumps({"version": truth.VERSION, "model_sha256": "0" * 64}))
    with pytest.raises(UserError, match="a result of another model of this name"):
        make()


def test_new_runs_join_a_result_without_its_trainings_or_scores(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sha: str
) -> None:
    """On a machine that has neither the half-sets' trainings nor the other runs' scores; removal trains what is new."""
    out, trained = tmp_path / "out", list[tuple[int, ...]]()
    monkeypatch.setattr(retraining, "_train", quick(trained, 2.0))
    monkeypatch.setattr(truth, "HALF_SETS", 3)
    run(model_dir, out)
    cells = [(Cell(str(model_dir), "tiny", "smoke", 0), tiny())]
    make = lambda kind, *runs: truth.against_retraining(cells, sha, kind, out, runs=list(runs))[0]  # noqa: E731
    some, other = WANTED, "graddot@all"
    wanted = {kind: json.loads(make(kind, *some, other).read_text()) for kind in truth.KINDS}
    for kind in truth.KINDS:
        truth.truth_path(out, cells[0][0], kind).unlink()
        make(kind, *some)
    shutil.rmtree(tmp_path / "cache" / "retrained")
    (file,) = (tmp_path / "cache" / "bench").glob("*/scores.npz")
    scores = scoring.read_matrices(file)
    file.unlink()
    scoring.keep_matrices(file, {other: scoring.Scored(scores[other], "", 0.0)})
    trained.clear()
    lds = json.loads(make("lds", other).read_text())
    assert trained == []
    assert list(lds["lds"]) == lds["runs"] == [*some, other]
    assert lds["lds"] == wanted["lds"]["lds"]
    assert lds["trainings"] == 6
    first, second = lds["command"].split(" && ")
    assert (first.count("--run"), second.count("--run")) == (2, 1)
    removal = json.loads(make("removal", other).read_text())
    assert len(trained) == 1
    assert list(removal["after"]) == ["nothing", *some, other, "chance", "the right rows", truth.AGAIN]
    assert removal["after"] == wanted["removal"]["after"]
    assert removal["trainings"] == len(removal["after"])
    with pytest.raises(UserError, match="no scores of graddot@response"):
        make("lds", "graddot@response")
    # A file of a time when losses were not written has all runs made again, so it wants all scores.
    path = truth.truth_path(out, cells[0][0], "lds")
    path.write_text(json.dumps({k: v for k, v in lds.items() if k != "losses"}))
    make("lds", other)
    with pytest.raises(UserError, match=f"no scores of {some[0]}"):
        make("lds", "graddot@response")


def test_nothing_is_retrained_where_nothing_was_learnt(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sha: str
) -> None:
    out, notes = tmp_path / "out", []
    monkeypatch.setattr(retraining, "_train", quick([]))
    monkeypatch.setattr(truth, "HALF_SETS", 3)
    run(model_dir, out, seeds=[0, 1])
    cells = [(Cell(str(model_dir), "tiny", "smoke", s), tiny(s)) for s in (0, 1)]
    failed = [result_path(out, cell) for cell, _ in cells]
    why = {"learnt": False, "missed": ["first"], "by_group": {"first": {"tuned": 0.5, "base": 0.0}}}

    def fails(path: Path) -> None:
        result = json.loads(path.read_text())
        path.write_text(json.dumps(result | {"scale": "cpu", "learnt": result["learnt"] | why | {"loss": LOSS}}))

    class Told(truth.Reporter):
        def note(self, message: str) -> None:
            notes.append(message)

    fails(failed[1])
    (path,) = truth.against_retraining(cells, sha, "lds", out, rate=lambda: 0.5, reporter=Told())
    assert path.name == "tiny-sound-s0-lds.json"
    left_out, todo, *_ = notes
    assert left_out == (
        "tiny-sound-s1: left out, since its fine-tune has not learnt the behaviour: 50% of first, too far below 70%"
    )
    seconds = 2 * truth._tokens([job(model_dir, np.flatnonzero(s).tolist()) for s in retraining.half_sets(6, 3, 0)])
    assert todo == f"6 trainings to do, for 1 results · about {truth.duration(2 * seconds)}"
    fails(failed[0])
    with pytest.raises(UserError, match="tiny-sound-s0: its fine-tune has not learnt the behaviour: 50% of"):
        truth.against_retraining(cells, sha, "lds", out)


LOSS = {"tuned": 1.0, "base": 2.0}


def test_the_fingerprint_is_of_all_that_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell("m", "tiny", "smoke", 0)
    prints = [
        truth._fingerprint(c, t, s, k, r)
        for c, t, s, k, r in [
            (cell, tiny(), "a", "lds", WANTED),
            (cell, tiny(), "a", "removal", WANTED),
            (cell, tiny(), "b", "lds", WANTED),
            (cell, tiny(), "a", "lds", WANTED[:1]),
            (replace(cell, seed=1), tiny(), "a", "lds", WANTED),
            (cell, replace(tiny(), recipe=replace(tiny().recipe, rate=1e-4)), "a", "lds", WANTED),
            (cell, tiny(version=2), "a", "removal", WANTED),
        ]
    ]
    monkeypatch.setattr(truth, "HALF_SETS", 4)
    prints.append(truth._fingerprint(cell, tiny(), "a", "lds", WANTED))
    assert len(set(prints)) == len(prints)


def test_what_is_removed_by_default_compares_masks_and_is_affordable() -> None:
    assert len(truth.REMOVED) <= 10
    assert set(truth.REMOVED) <= set(runs("all"))
    for spec in truth.REMOVED:  # each that looks at the loss with the prompt in it and without
        method, _, view = spec.partition("@")
        assert not view or {f"{method}@response", f"{method}@all"} <= set(truth.REMOVED)
    methods = {r.partition("@")[0].partition(":")[0] for r in truth.REMOVED}
    assert methods == {"graddot", "gradcos", "datainf", "exact", "repsim", "bm25"}


def test_the_command_prints_the_table(
    run: conftest.Run, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    bench_module.bench(str(model_dir), out, tasks=["tiny"], methods=METHODS, seeds=[0, 1])
    monkeypatch.setattr(tasks, "build", lambda name, scale, seed, **kw: tiny(seed))
    monkeypatch.setattr(retraining, "_train", quick([]))
    options = ("--model", model_dir, "--scale", "smoke", "--seeds", "0,1", "--out", out)
    chosen = [part for r in WANTED for part in ("--run", r)]
    code, said, err = run("bench", "retrain", "tiny", "--truth", "removal", *options, *chosen)
    assert code == 0, err
    assert "tiny: 3 of 6 rows dropped, 2 queries of no; seeds 0, 1" in said
    assert truth.CHANCE in said
    assert (out / model_dir.name / "smoke" / "tiny-sound-s1-removal.json").exists()
    code, _, err = run("bench", "retrain", "tiny", "--truth", "removal", *options, *chosen)
    assert code == 0
    assert err.count("is there already") == 2
    for bad in ("1,x", "-1", ""):
        code, _, err = run("bench", "retrain", "tiny", "--truth", "lds", "--seeds", bad)
        assert code
        assert "whole numbers from 0" in err


def test_what_was_found_is_read_back_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retraining, "_train", quick([]))
    one = job(tmp_path, [1, 2])
    assert one.found(tmp_path) is None
    got = retraining.retrain(one, tmp_path, model_sha256="sha")
    assert isinstance(got, Retrained)
    assert got.loss.tolist() == [3.0, 3.1, 3.2, 3.3]
    assert got.behaves.dtype == bool
