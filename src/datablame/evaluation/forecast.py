"""What the cells of a benchmark will take: tokens counted from their rows, seconds measured on the loaded model."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from datablame.encoding import Encoding, encode_rows
from datablame.evaluation.cell import Cell, answered, options
from datablame.evaluation.costly import CHECKPOINTS, CHUNK, groups, limited
from datablame.evaluation.suites import Beyond, split
from datablame.evaluation.tasks import Task
from datablame.evaluation.views import PAD_TO, captured_for
from datablame.extras import parse_list
from datablame.indexing import duration
from datablame.methods import parse
from datablame.methods.krylov import OnOperator
from datablame.models import Loaded, load_tokenizer
from datablame.tuning import make_trainer

if TYPE_CHECKING:
    import torch

    from datablame.examples import Example


@dataclass(frozen=True)
class Plan:
    """What is to be done: cells with the runs that each still lacks, and the tokens that they take."""

    cells: list[tuple[Cell, Task, list[str]]]
    finished: int
    tokens: int

    def sentence(self, tokens_per_second: float | None) -> str:
        """One line for people."""
        text = f"{len(self.cells)} cells to run ({self.finished} have a result already)"
        if tokens_per_second is None:
            return text
        return (
            f"{text} · {self.tokens:,} tokens forward and backward · "
            f"about {duration(self.tokens / tokens_per_second)} at {tokens_per_second:.0f} tokens/s"
        )


def tokens(cell: Cell, task: Task, runs: Sequence[str] = (), *, views: bool = True, trained: bool = False) -> int:
    """Tokens forward and backward, roughly: training, the views of rows and of the sets of responses.

    runs: they say which views, and have passes of their own with features or products beyond them · views: are any
    still to be captured? · trained: is the fine-tune there?
    Answers and scores are not counted: at cpu scale they take about the time that the views, whose batches are larger,
    stay below the rate of the training.
    """
    sets = len(answered(cell))
    train, queries = row_tokens(cell.model, task.train), sets * row_tokens(cell.model, task.queries)
    a_token = 1.3 + ("prompt" in (seen := captured_for(split(run)[1] for run in runs)))
    padded = PAD_TO * (len(task.train) + sets * len(task.queries)) if "padded" in seen else 0
    epochs = 0 if trained else options(cell, task).epochs
    per_epoch = PAD_TO * len(task.train) if cell.recipe == "paper" else train
    usual = a_token * (train + queries) + padded if views else 0.0
    more = [passes(need, len(task.train)) for need in groups(runs)]
    shared = {_undamped(run): run for run in runs}
    more += [(products(run, task), 0.0) for run in shared.values()]
    return int(epochs * per_epoch + usual + sum(a * train + b * queries for a, b in more))


def row_tokens(model: str, rows: Sequence[Example]) -> int:
    """Of prompts and responses, and 32 a row for the chat template, roughly."""
    tokenizer = load_tokenizer(model)
    return sum(len(tokenizer(e.prompt + e.response)["input_ids"]) + 32 for e in rows)


def passes(need: Beyond, rows: int) -> tuple[float, float]:
    """Forward and backward passes over so many training rows, and over the queries, that one kind of features takes.

    One for the gradients, .3 for the base model, one a checkpoint, those of the extra, and the steps of its chains.
    """
    from datablame.extras.bif import Langevin

    extras = parse_list(need.extras).values()
    both = 1.3 + CHECKPOINTS * need.checkpoints
    chains = sum(e.steps * e.batch / rows for e in extras if isinstance(e, Langevin))
    on_queries = sum(e.passes for e in extras if e.on_queries)
    return both + sum(e.passes for e in extras) + chains, both + on_queries


def _undamped(run: str) -> str:
    """The same for runs that differ in damping alone, which share their curvature products."""
    method = parse(split(run)[0])
    return repr(replace(method, damping=1.0)) if isinstance(method, OnOperator) else run


def products(run: str, task: Task) -> float:
    """Passes over the training rows, at most, for the curvature products of a run, on the reference responses.

    One a call, whose graph costs as much, and two times backward for each vector; none for a run beyond a limit. A call
    with many vectors is taken in parts, see `costly.CHUNK`.
    """
    method = parse(split(run)[0])
    if not isinstance(method, OnOperator) or limited(run, task):
        return 0.0
    n, m = len(task.train), len(task.queries)
    vectors = method.vectors(n, m)
    return max(method.calls(m), ceil(vectors / CHUNK)) + 4 / 3 * vectors


def tokens_per_second(loaded: Loaded, cell: Cell, task: Task) -> float:
    """Tokens a second, forward and backward: the second of two trainer's steps on one small batch of middling rows.

    The model gets an adapter by it, and is of no use for anything else afterwards.
    """
    rows = encode_rows(Encoding(loaded.tokenizer, None, loaded.max_length), task.train)
    batch = sorted(rows, key=lambda r: len(r.input_ids))[len(rows) // 2 :][:4]
    recipe = replace(options(cell, task), batch=len(batch), keep=0, early_stop=0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(loaded, batch, Path(folder), recipe)
        model: torch.nn.Module = trainer.model.train()  # type: ignore[union-attr]
        inputs = next(iter(trainer.get_train_dataloader()))
        weight = next(p for p in model.parameters() if p.requires_grad)
        for _ in range(2):  # the first warms up
            start = time.perf_counter()
            trainer.compute_loss(model, dict(inputs)).backward()
            float(weight.grad.sum())  # type: ignore[union-attr]  # waits for a GPU
            seconds = time.perf_counter() - start
    return sum(len(r.input_ids) for r in batch) / seconds
