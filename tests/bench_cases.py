"""A tiny task of two classes, and the benchmark run on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import conftest
from datablame.evaluation import bench as bench_module
from datablame.evaluation.bench import bench
from datablame.evaluation.tasks.base import Task, examples, same_label
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


@pytest.fixture
def run_command(request: pytest.FixtureRequest) -> conftest.Run:
    """The command line, `run` elsewhere: here that is the benchmark."""
    found: conftest.Run = request.getfixturevalue("run")
    return found


def run(model_dir: Path, out: Path, **options: Any) -> list[Path]:
    return bench(str(model_dir), out, **({"tasks": ["tiny"], "methods": METHODS, "seeds": [0]} | options))
