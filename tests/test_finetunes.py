"""Snapshots of a training, and the cache of fine-tunes that everybody shares."""

from __future__ import annotations

import json
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from transformers import TrainerCallback

from conftest import ROWS, write_jsonl
from datablame import tuning
from datablame.checkpoints import find, read_record
from datablame.encoding import EncodingOptions
from datablame.errors import UserError
from datablame.evaluation import finetunes, tasks
from datablame.evaluation.cell import Cell, fingerprint
from datablame.evaluation.finetunes import fine_tuned, snapshots
from datablame.evaluation.retraining import Job
from datablame.examples import Example, from_prompt, load_examples
from datablame.models import ModelSpec, cache_dir, load
from datablame.tuning import TuneOptions, decisive, make_trainer, snapshot_steps, tune

OPTIONS = TuneOptions(rank=2, epochs=3, batch=2, rate=1e-2, dropout=0.1)  # 7 rows: 4 steps an epoch, 12 in all
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "bench" / "smollm2-135m" / "cpu"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DATABLAME_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def sha(model_dir: Path) -> str:
    return load(ModelSpec(str(model_dir))).model_sha256


def rows(first: int = 0) -> list[Example]:
    return [from_prompt(p, r, id=first + i) for i, (p, r) in enumerate(ROWS)]


def steps(adapter: Path) -> list[int]:
    return [step for step, _ in snapshots(adapter)]


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


# ---------------------------------------------------------------- snapshots


def test_snapshot_steps_are_log_spaced_and_different() -> None:
    assert snapshot_steps(8, 1000) == [1, 3, 8, 21, 55, 145, 381, 1000]
    assert 10 ** np.diff(np.log10(snapshot_steps(8, 10**6))) == pytest.approx([10 ** (6 / 7)] * 7, rel=0.04)
    assert snapshot_steps(0, 9) == []
    assert snapshot_steps(1, 9) == [9]
    for last in range(1, 60):
        for count in range(2, 20):
            found = snapshot_steps(count, last)
            assert found == sorted(set(found))
            assert len(found) == min(count, last)
            assert (found[0], found[-1]) == (1, last)


@pytest.mark.parametrize("early_stop", [0, 2])
def test_saving_changes_nothing_and_nothing_saved_is_dropped(
    model_dir: Path, train_file: Path, tmp_path: Path, early_stop: int
) -> None:
    """Dropout draws at every step: one number more or fewer would be another adapter."""
    options = replace(OPTIONS, early_stop=early_stop)
    given: dict[str, Any] = {"validation": train_file if early_stop else None}
    tune(model_dir, train_file, tmp_path / "plain", options=options, **given)
    tune(model_dir, train_file, tmp_path / "saved", options=replace(options, keep=1, snapshots=5), **given)
    assert weights(tmp_path / "saved") == weights(tmp_path / "plain")
    assert steps(tmp_path / "saved") == [1, 2, 4, 7, 12]
    assert weights(tmp_path / "saved" / "checkpoint-12") == weights(tmp_path / "plain")
    assert [c.step for c in find(tmp_path / "saved", "all")] == [1, 2, 4, 7, 12]
    assert not list(tmp_path.rglob("training_args.bin"))
    with pytest.raises(UserError, match="--snapshots -1: a whole number from 0"):
        tune(model_dir, train_file, tmp_path / "x", options=TuneOptions(snapshots=-1))


def test_epochs_and_snapshots_are_kept_beside_each_other(run: Any, model_dir: Path, tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", [{"prompt": p, "response": r} for p, r in ROWS])
    out, recipe = tmp_path / "out", ["--rank", 2, "--batch", 2, "--epochs", 3, "--keep", 2, "--snapshots", 3]
    code, _, error = run("tune", "--model", model_dir, "--train", train, "--out", out, *recipe)
    assert code == 0, error
    assert steps(out) == [1, 3, 8, 12]  # 1, 3, 12 log-spaced, 8 and 12 the last two epochs
    assert read_record(out)["options"]["snapshots"] == 3


def test_results_and_fingerprints_do_not_know_of_snapshots() -> None:
    """Committed cells are recognised: the fingerprint of one is what this version computes."""
    assert decisive(TuneOptions(snapshots=8)) == decisive(TuneOptions())
    assert set(asdict(TuneOptions())) - set(decisive(TuneOptions())) == {"snapshots"}
    assert repr(TuneOptions(snapshots=8)) == repr(TuneOptions())
    for name in ("grammars-sound-s0", "mixed-small-sound-s0"):
        result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        cell = Cell(result["model"], result["task"], result["scale"], result["seed"])
        task = tasks.build(cell.task, cell.scale, cell.seed)
        assert fingerprint(cell, task, result["model_sha256"]) == result["fingerprint"]
        other = replace(cell, recipe="paper")
        assert fingerprint(other, task, result["model_sha256"]) != result["fingerprint"]


def test_a_papers_cell_is_told_apart_by_its_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    task = tasks.build("grammars", "smoke", 0)
    cells = [Cell("m", "grammars", "smoke", 0, recipe) for recipe in ("sound", "paper")]  # type: ignore[arg-type]
    before = [fingerprint(c, task, "sha") for c in cells]
    monkeypatch.setattr("datablame.evaluation.cell.PAPER_ENCODING", EncodingOptions(template="plain"))
    after = [fingerprint(c, task, "sha") for c in cells]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False]


def test_a_retraining_is_kept_under_the_name_that_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a digest of the recipe as text, without what was added since; another kind of fine-tune is another one."""
    task = tasks.build("grammars", "smoke", 0)
    job = Job(Cell("m", "grammars", "smoke", 0), task, (0, 1), 0, generate=False)
    recipe, folder = job.recipe, job.folder(tmp_path)
    monkeypatch.setattr(finetunes, "VERSION", finetunes.VERSION + 1)
    assert job.folder(tmp_path) != folder
    assert str(recipe) == (
        "TuneOptions(rank=4, alpha=32, dropout=0.1, targets='q_proj,v_proj', layers=None, epochs=1, rate=0.001, "
        "batch=4, seed=0, early_stop=0, keep=0)"
    ).replace("epochs=1", f"epochs={recipe.epochs}")


# ---------------------------------------------------------------- the cache


def test_a_fine_tune_is_made_once_whoever_asks(
    model_dir: Path, tmp_path: Path, sha: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []
    monkeypatch.setattr(finetunes, "tune", lambda *a, **k: made.append(a[2]) or tune(*a, **k))  # type: ignore[func-returns-value]
    bare = fine_tuned(str(model_dir), rows(), OPTIONS, model_sha256=sha, checkpoints=False)
    assert not list(bare.glob("checkpoint-*"))
    with pytest.raises(UserError, match="there is no checkpoint"):
        snapshots(bare)
    before = weights(bare)
    # One that has more takes its place, and serves both; ids, labels and what is kept make no other training.
    full = fine_tuned(str(model_dir), rows(), OPTIONS, model_sha256=sha)
    assert full == bare
    assert steps(full) == [1, 2, 3, 4, 5, 7, 8, 9, 12]  # 8 log-spaced of 12, and 4, 8, 12
    assert weights(full) == before
    named = [replace(e, label="x") for e in rows(first=100)]
    for options in (OPTIONS, replace(OPTIONS, keep=3, snapshots=2)):
        for checkpoints in (True, False):
            asked = fine_tuned(str(model_dir), named, options, model_sha256=sha, checkpoints=checkpoints)
            assert asked == full
    assert len(made) == 2
    # The same as by the command.
    train = write_jsonl(tmp_path / "train.jsonl", [{"prompt": p, "response": r} for p, r in ROWS])
    tune(model_dir, train, tmp_path / "by-hand", options=OPTIONS)
    assert weights(tmp_path / "by-hand") == before
    assert read_record(full)["history"] == read_record(tmp_path / "by-hand")["history"]
    # And what decides the weights makes another.
    asked_otherwise: list[dict[str, Any]] = [
        {"options": replace(OPTIONS, seed=1)},
        {"rows": rows()[:-1]},
        {"rows": rows()[::-1]},
        {"validation": rows()},
        {"encoding": EncodingOptions(loss_on="all")},
    ]
    for changes in asked_otherwise:
        asked = {"rows": rows(), "options": OPTIONS} | changes
        other = fine_tuned(str(model_dir), model_sha256=sha, checkpoints=False, **asked)
        assert other != full
        assert weights(other) != before
    assert len(made) == 2 + len(asked_otherwise)
    assert finetunes._digest("other", rows(), None, EncodingOptions(), OPTIONS) != finetunes._digest(
        sha, rows(), None, EncodingOptions(), OPTIONS
    )


def test_rows_of_every_shape_are_read_as_they_were(tmp_path: Path) -> None:
    """Turns, system messages and bare text: the file that training reads gives the same messages and prompts."""
    turns = [{"role": r, "content": c} for r, c in (("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"))]
    answer = {"role": "assistant", "content": "d"}
    shapes: list[dict[str, Any]] = [
        {"messages": [*turns, answer]}, {"prompt": turns, "response": [answer]}, {"text": "all of it"},
        {"prompt": "a", "completion": "b"},
    ]  # fmt: skip
    for shape in shapes:
        asked = load_examples(write_jsonl(tmp_path / "asked.jsonl", [shape]))
        finetunes._write(asked, tmp_path / "train.jsonl")
        assert load_examples(tmp_path / "train.jsonl") == asked


def test_an_interrupted_training_is_begun_again(model_dir: Path, sha: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*a: Any, **k: Any) -> None:
        tune(*a, **k)
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(finetunes, "tune", broken)
        with pytest.raises(KeyboardInterrupt):
            fine_tuned(str(model_dir), rows(), OPTIONS, model_sha256=sha)
    (folder,) = (cache_dir() / "finetunes").iterdir()
    assert (folder / "training").exists()
    assert not (folder / "adapter").exists()
    adapter = fine_tuned(str(model_dir), rows(), OPTIONS, model_sha256=sha)
    assert not (folder / "training").exists()
    assert len(steps(adapter)) == 9


@pytest.mark.parametrize("early_stop", [0, 2])
@pytest.mark.parametrize("last", [1, 4, 6, 8, 11])  # 4 steps an epoch: within the first, at ends, and between them
def test_an_interrupted_training_goes_on_as_if_it_had_not_been(
    model_dir: Path, sha: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, last: int, early_stop: int
) -> None:
    """Weights, optimizer, losses and rates; early stopping waits for two bad epochs, of which the state has one."""
    options = replace(OPTIONS, epochs=4, early_stop=early_stop, rate=0.3 if early_stop else OPTIONS.rate)
    asked: dict[str, Any] = {"model_sha256": sha, "validation": rows() if early_stop else None}
    straight = fine_tuned(str(model_dir), rows(), options, **asked)
    assert early_stop == 0 or max(steps(straight)) < 16

    monkeypatch.setenv("DATABLAME_CACHE", str(tmp_path / "another"))
    begun: list[int] = []

    class Stops(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            begun.append(state.global_step)

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == last and len(begun) == 1:
                raise KeyboardInterrupt

    def watched(*a: Any, **k: Any) -> Any:
        trainer = make_trainer(*a, **k)
        trainer.add_callback(Stops())
        return trainer

    monkeypatch.setattr(tuning, "make_trainer", watched)
    with pytest.raises(KeyboardInterrupt):
        fine_tuned(str(model_dir), rows(), options, **asked)
    (folder,) = (cache_dir() / "finetunes").iterdir()
    torn = folder / "training" / "checkpoint-12"
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"epoch": 3.0, ')
    again = fine_tuned(str(model_dir), rows(), options, **asked)
    assert begun == [0, last // 4 * 4]
    assert steps(again) == steps(straight)
    for step in steps(straight):
        a, b = (folder / f"checkpoint-{step}" for folder in (straight, again))
        assert weights(a) == weights(b)
        torch.testing.assert_close(adam(a), adam(b), rtol=0, atol=0)
    assert weights(again) == weights(straight)
    for key in ("rates", "parameters"):
        assert read_record(again)[key] == read_record(straight)[key]
    assert untimed(again) == untimed(straight)


def untimed(adapter: Path) -> list[dict[str, float]]:
    """The history without seconds."""
    told = ("loss", "eval_loss", "grad_norm", "learning_rate", "step", "epoch")
    return [{k: v for k, v in line.items() if k in told} for line in read_record(adapter)["history"]]


def adam(checkpoint: Path) -> dict[int, Any]:
    return torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]  # type: ignore[no-any-return]


def test_two_at_once_train_one(model_dir: Path, sha: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def quick(model: str, train: Path, out: Path, *, options: TuneOptions, **k: Any) -> None:
        made.append(1)
        out.mkdir(parents=True)
        (out / "datablame.json").write_text(json.dumps({"options": asdict(options)}))

    monkeypatch.setattr(finetunes, "tune", quick)
    found: list[Path] = []

    def ask() -> None:
        found.append(fine_tuned(str(model_dir), rows(), OPTIONS, model_sha256=sha))

    digest = finetunes._digest(sha, rows(), None, EncodingOptions(), OPTIONS)[:24]
    folder = cache_dir() / "finetunes" / digest
    folder.mkdir(parents=True)
    at_work = [threading.Thread(target=ask) for _ in range(3)]
    with FileLock(folder / "lock"):  # another process is at it: both wait
        for thread in at_work:
            thread.start()
        at_work[0].join(timeout=0.2)
        assert not made
    for thread in at_work:
        thread.join()
    assert made == [1]
    assert found == [folder / "adapter"] * 3
