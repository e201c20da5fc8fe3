"""What fails in a cell of the benchmark: told, tried again, and never at the cost of what is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import conftest
from bench_cases import one_task, run, run_command
from datablame.errors import UserError
from datablame.evaluation import bench as bench_module
from datablame.evaluation import cell as cell_module
from datablame.evaluation import finetunes, scoring
from datablame.evaluation.cell import FEATURES, Cell
from datablame.evaluation.results import load_results
from datablame.store import DiskError

__all__ = ["one_task", "run_command"]  # fixtures; every test here uses the first


def test_an_interrupted_cell_goes_on(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = json.loads(run(model_dir, tmp_path / "straight")[0].read_text())
    monkeypatch.setenv("DATABLAME_CACHE", str(tmp_path / "second"))

    def broken(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(cell_module, "score_runs", broken)
        with pytest.raises(KeyboardInterrupt):
            run(model_dir, tmp_path / "resumed")
    (clock,) = (tmp_path / "second" / "bench").glob("*/seconds.json")
    assert set(json.loads(clock.read_text())) == {"tune", "answers", "features", "scores"}  # what is cut off took time
    with monkeypatch.context() as m:  # neither trained nor answered again
        m.setattr(finetunes, "tune", broken)
        m.setattr(cell_module, "answers_ended", broken)
        resumed = json.loads(run(model_dir, tmp_path / "resumed")[0].read_text())
    for kind in ("reference", "generated"):
        for name, values in straight["results"][kind].items():
            assert {k: v for k, v in resumed["results"][kind][name].items() if k != "seconds"} == {
                k: v for k, v in values.items() if k != "seconds"
            }


def test_answers_that_are_cut_are_counted(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []

    class Told(bench_module.Reporter):
        def note(self, message: str) -> None:
            notes.append(message)

    said = cell_module.answers_ended
    for ends, told in (([True, False, True, False], 1), ([True] * 4, 0)):
        monkeypatch.setattr(
            cell_module, "answers_ended", lambda *a, e=ends: [(t, x) for (t, _), x in zip(said(*a), e, strict=True)]
        )
        monkeypatch.setenv("DATABLAME_CACHE", str(tmp_path / f"cache {told}"))
        run(model_dir, tmp_path / f"out {told}", methods="bm25", reporter=Told())
        cut = [note for note in notes if "cut" in note]
        assert cut == ["2 of 4 answers are cut at 48 tokens, and judged as far as they go"] * told
        notes.clear()


@pytest.mark.parametrize("file", ["answers.json", "seconds.json"])
def test_a_damaged_file_of_the_cache_is_named(model_dir: Path, tmp_path: Path, file: str) -> None:
    (path,) = run(model_dir, tmp_path / "out", methods="bm25")
    path.unlink()
    (there,) = (tmp_path / "cache" / "bench").glob(f"*/{file}")
    there.write_text(there.read_text()[:5])
    with pytest.raises(UserError, match=f"{file}: damaged; delete it, and run the same command again"):
        run(model_dir, tmp_path / "out", methods="bm25")
    there.unlink()
    (scores,) = (tmp_path / "cache" / "bench").glob("*/scores.npz")
    scores.write_bytes(scores.read_bytes()[:50])
    with pytest.raises(UserError, match="scores.npz: damaged; delete it"):
        scoring.read_matrices(scores)
    run(model_dir, tmp_path / "out", methods="bm25")
    assert list(scoring.read_matrices(scores)) == ["bm25"]


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


def test_what_failed_is_told_and_tried_again(
    run_command: conftest.Run, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datablame.methods.controls import Length, Random

    asked = ("bench", "run", "--model", model_dir, "--tasks", "tiny", "--methods", "bm25,random,length")
    with monkeypatch.context() as m:
        m.setattr(Random, "score", lambda self, query: 1 / 0)
        code, _, err = run_command(*asked, "--out", tmp_path / "out")
    assert code == 2
    assert "tiny-sound-s0: random failed: ZeroDivisionError: division by zero" in err
    assert "some methods failed, and are tried again by the same command" in err
    monkeypatch.setattr(Length, "score", lambda self, query: pytest.fail("it has numbers"))
    code, said, err = run_command(*asked, "--out", tmp_path / "out")
    assert code == 0, err
    assert "4 queries, 1 runs" in err
    (path,) = (tmp_path / "out").rglob("*-s0.json")
    found = json.loads(path.read_text())["results"]["reference"]
    assert set(found) == {"bm25", "random", "length"}
    assert "error" not in found["random"]
    code, said, err = run_command("bench", "show", "--model", model_dir, "--task", "tiny", "--out", tmp_path / "out")
    assert code == 0, err
    assert "length" in said
    for option, value in (("--task", "facts"), ("--scale", "huge"), ("--recipe", "nope")):
        code, _, err = run_command("bench", "show", "--model", model_dir, option, value, "--out", tmp_path / "out")
        assert code == 2
        assert value in err


def test_what_a_solver_left_must_be_finite(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datablame.methods.controls import Length

    monkeypatch.setattr(Length, "residual", {0.1: torch.tensor([[np.nan]])}, raising=False)
    (path,) = run(model_dir, tmp_path / "out", methods="bm25,length")
    found = json.loads(path.read_text())["results"]["reference"]
    assert found["length"]["error"] == "what its solver left is not finite."
    assert "error" not in found["bm25"]


def test_features_outlive_a_result_that_cannot_be_written(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as m:
        m.setattr(bench_module, "save", full)
        with pytest.raises(OSError, match="no space"):
            run(model_dir, tmp_path / "out", methods="bm25")
    (folder,) = (tmp_path / "cache" / "bench").iterdir()
    assert {p.name for p in (folder / f"{FEATURES}-response").iterdir()} == {"train", "reference", "generated"}
    file = tmp_path / "a-file"
    file.write_text("")
    monkeypatch.setattr(bench_module, "load", lambda spec: pytest.fail("--out was looked at too late"))
    with pytest.raises(UserError, match="not a directory that can be made"):
        run(model_dir, file, methods="bm25")


def test_a_result_of_another_users_files_is_not_overwritten(tmp_path: Path) -> None:
    cell = Cell("m", "mixed-small", "smoke", 0, "sound", ("advbench",))
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"version": cell_module.VERSION, "fingerprint": "of one file"}))
    bench_module._check_files(cell, path, "of one file")
    with pytest.raises(UserError, match="a result of other rows. Give another --out"):
        bench_module._check_files(cell, path, "of another file")
    bench_module._check_files(Cell("m", "mixed-small", "smoke", 0), path, "ours, which has changed")


def test_a_cell_that_fails_takes_no_other_with_it(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = bench_module.run_cell

    def diverges(cell: Cell, *args: Any, **how: Any) -> dict[str, Any]:
        if cell.seed == 0:
            raise UserError("the loss is not finite at step 3")
        return whole(cell, *args, **how)

    monkeypatch.setattr(bench_module, "run_cell", diverges)
    with pytest.raises(UserError, match="tried again by the same command:\ntiny-sound-s0: the loss is not finite"):
        run(model_dir, tmp_path / "out", methods="bm25", seeds=[0, 1])
    assert [p.stem for p in (tmp_path / "out").rglob("*.json")] == ["tiny-sound-s1"]

    def full(*args: Any, **how: Any) -> None:
        tried.append(args[0])
        raise DiskError("no space")

    tried: list[Cell] = []
    monkeypatch.setattr(bench_module, "run_cell", full)
    with pytest.raises(DiskError, match="no space"):  # the next cell would meet it as well
        run(model_dir, tmp_path / "other", methods="bm25", seeds=[0, 1])
    assert len(tried) == 1
