"""Scores of a cell's runs: kept until its result is written, and measured."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench_cases import one_task, run, tiny  # noqa: F401
from datablame.errors import UserError
from datablame.evaluation import scoring
from datablame.evaluation.cell import FEATURES
from datablame.indexing import SILENT
from datablame.store import FeatureStore


def test_the_share_of_one_ranking_is_kept_for_groups_of_one_class() -> None:
    task = tiny()
    task = replace(task, groups=["a", "a", "b", "b"], main=("a",))
    labels = [e.label for e in task.queries]
    assert labels == ["no", "yes", "no", "yes"]
    alike = replace(task, groups=["a", "b", "a", "b"])
    values = np.array([[3.0, 2, 1, 0, 4, 5], [0, 1, 2, 3, 4, 5], [3, 2, 1, 0, 4, 5], [5, 0, 1, 4, 2, 3]])
    assert scoring._shares(task, values) == {}  # two classes in each group
    shares = scoring._shares(alike, values)
    assert shares["main"] == shares["a"] == 1.0
    assert shares["b"] is not None
    assert shares["b"] < 1
    assert scoring.measured(alike, "x", scoring.Scored(values, "", 0.0))["shares"] == shares
    assert "shares" not in scoring.measured(task, "x", scoring.Scored(values, "", 0.0))


def test_what_is_scored_already_is_of_these_features_and_this_code(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted cell goes on with it; with a method that was mended in between, or other answers, it does not."""
    run(model_dir, tmp_path / "out", methods="graddot@response", keep=True)
    (folder,) = (tmp_path / "cache" / "bench").iterdir()
    train, reference, generated = (
        FeatureStore.open(folder / f"{FEATURES}-response" / name) for name in ("train", "reference", "generated")
    )
    score = lambda queries: scoring.score_runs(["graddot@response"], train, queries, SILENT, kept=tmp_path / "kept")  # noqa: E731
    first = score(reference)["graddot@response"]
    with monkeypatch.context() as m:
        m.setattr(scoring, "_scored", lambda *args: pytest.fail("it was scored again"))
        again = score(reference)["graddot@response"]
        assert np.array_equal(again.values, first.values)
        assert again[1:] == first[1:]
        with pytest.raises(pytest.fail.Exception, match="scored again"):
            score(generated)
        m.setattr(scoring.inspect, "getsource", lambda module: "mended")
        with pytest.raises(pytest.fail.Exception, match="scored again"):
            score(reference)


def test_damaged_arrays_are_no_scores(tmp_path: Path) -> None:
    """Whatever is wrong with the file: cut short, or with other bytes in its midst."""
    path = tmp_path / "scores.npz"
    scored = scoring.Scored(np.arange(64.0).reshape(8, 8), "", 0.0)
    for harm in range(40):
        path.unlink(missing_ok=True)
        scoring.keep_matrices(path, {"a": scored})
        whole = path.read_bytes()
        place = len(whole) * harm // 40
        path.write_bytes(whole[:place] if harm % 2 else whole[:place] + bytes(24) + whole[place + 24 :])
        with suppress(UserError):  # the only thing that may be raised
            found = scoring.read_matrices(path)
            assert "a" not in found or np.array_equal(found["a"], scored.values)  # what was harmed says nothing of it
        scoring.keep_matrices(path, {"a": scored})
        assert np.array_equal(scoring.read_matrices(path)["a"], scored.values)


def test_kept_matrices_are_the_scores_to_the_last_digit(tmp_path: Path) -> None:
    """In float32 a large score would become infinite, and its linear datamodeling score a silent 0."""
    values = np.array([[1e39, 1 / 3], [-1e-60, 2.0]])
    scoring.keep_matrices(tmp_path / "scores.npz", {"a": scoring.Scored(values, "", 0.0)})
    assert np.array_equal(scoring.read_matrices(tmp_path / "scores.npz")["a"], values)
