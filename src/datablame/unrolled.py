"""`datablame unroll`: a LoRA fine-tune of its own, and the derivative of each query's loss to each row's weight.

The run is TRL's, step for step (the rows of each batch, AdamW and its rates, clipping, the loss), without dropout.
It is recorded, and replayed backwards (replay.py). The weight of a row multiplies the loss of its tokens in each batch
that holds it; the denominator, the batch's number of labelled tokens, stays.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datablame.encoding import Encoded, Encoding, EncodingOptions, encode_rows, truncation_note
from datablame.errors import UserError
from datablame.examples import Columns, Example, load_examples
from datablame.indexing import SILENT, Forecast, Reporter, digest
from datablame.models import Loaded, ModelSpec, load
from datablame.scores import Scores
from datablame.tuning import TuneOptions, check_finite, check_options, make_trainer, write_adapter

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from datablame.replay import Adjoint, Moment, Problem, Recipe

METHOD = "unrolled"


@dataclass(frozen=True)
class Task:
    """Rows and queries, as examples and as tokens."""

    train: list[Example]
    queries: list[Example]
    rows: list[Encoded]
    query_rows: list[Encoded]


def unroll(
    model: str | Path,
    train: str | Path,
    query: str | Path,
    out: str | Path,
    *,
    options: TuneOptions | None = None,
    encoding: EncodingOptions | None = None,
    columns: Columns | None = None,
    batch_tokens: int = 512,
    device: str | None = None,
    dtype: str | None = None,
    reporter: Reporter = SILENT,
) -> Scores:
    """Fine-tune as `tune` would, and score every training row for every query by replaying the run backwards.

    Scores `[m, n]`, in nats a token: minus the derivative of the query's mean loss (over its response tokens) to the
    row's weight. Writes the adapter to `out/adapter`, and while it works its states to `out/trajectory`; the same call
    goes on where it stopped. batch_tokens: padded tokens that are differentiated twice at a time.
    Raises UserError for bad input, dropout, a training that diverges, or an `out` of another call.
    """
    from datablame.trajectory import Trajectory

    out, options = Path(out), options or TuneOptions()
    _check(out, options, batch_tokens)
    loaded = load(ModelSpec(str(model), None, device, dtype or "float32"))
    encoder = Encoding(loaded.tokenizer, encoding, loaded.max_length)
    task = _task(train, query, columns, encoder, reporter)
    settings = {
        "model": str(model),
        "model_sha256": loaded.model_sha256,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "options": asdict(options),
        "encoding": asdict(encoder.options),
        "train_sha256": digest(task.train, task.rows),
        "query_sha256": digest(task.queries, task.query_rows),
    }
    trajectory = Trajectory(out / "trajectory", settings)
    trainer = make_trainer(loaded, task.rows, out / "adapter", options)
    with _twice_differentiable():
        problem, recipe = problem_of(trainer, loaded, task.rows, options, batch_tokens)
        _forecast(problem, task, trajectory, reporter)
        moments = _forward(problem, recipe, trajectory, reporter)
        try:
            check_finite(trainer.model, moments)
        except UserError:
            trajectory.remove()
            raise
        values = _backward(problem, recipe, trajectory, task, trainer.model, reporter)
    record = {k: settings[k] for k in ("model", "model_sha256", "options", "encoding")}
    write_adapter(
        trainer, loaded, out / "adapter", {**record, "history": moments, "rates": list(recipe.rates)}, options
    )
    scores = Scores({METHOD: values.numpy()}, task.queries, task.train, settings, controls=_controls(task))
    trajectory.remove()
    return scores


def _check(out: Path, options: TuneOptions, batch_tokens: int) -> None:
    if (out / "manifest.json").exists():
        raise UserError(f"--out {out}: that is an index; name another directory.")
    check_options(out / "adapter", options)
    if options.dropout:
        raise UserError(f"--dropout {options.dropout}: a run with dropout cannot be replayed; use 0.")
    if options.early_stop or options.keep or options.snapshots:
        raise UserError("unroll: early_stop, keep and snapshots must be 0; the whole run is replayed.")
    if batch_tokens < 1:
        raise UserError(f"--batch-tokens {batch_tokens}: at least 1.")


def _task(train: str | Path, query: str | Path, columns: Columns | None, encoder: Encoding, reporter: Reporter) -> Task:
    rows, queries = load_examples(train, columns), load_examples(query, columns)
    task = Task(rows, queries, encode_rows(encoder, rows), encode_rows(encoder, queries, turns="last"))
    for examples, encoded in ((rows, task.rows), (queries, task.query_rows)):
        if note := truncation_note(examples, encoded):
            reporter.note(note)
    return task


def _controls(task: Task) -> dict[str, Any]:
    """BM25, with which the diagnostics compare."""
    from datablame.methods import Text, create

    train, queries = ([Text(e.prompt, e.response) for e in some] for some in (task.train, task.queries))
    return {"bm25": create("bm25").fit(train).score(queries).double().numpy()}


# ---------------------------------------------------------------- the trainer's run as a problem


@contextmanager
def _twice_differentiable() -> Iterator[None]:
    """Fused attention has no second derivative; the same formula in plain operations has."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        yield


def problem_of(
    trainer: Any, loaded: Loaded, rows: Sequence[Encoded], options: TuneOptions, batch_tokens: int = 512
) -> tuple[Problem, Recipe]:
    """The trainer's batches, parameters and optimizer, read from the trainer itself before it has trained.

    Raises UserError for a model with dropout of its own or with a loss beside the rows'.
    """
    import torch

    from datablame.replay import Problem, Recipe

    model, loader = trainer.model.eval(), trainer.get_train_dataloader()
    _check_plain(trainer)
    steps = max(math.ceil(options.epochs * len(loader)), 1)
    trainer.create_optimizer_and_scheduler(num_training_steps=steps)
    groups, schedule = trainer.optimizer.param_groups, trainer.lr_scheduler
    params = [p for group in groups for p in group["params"]]
    decay = torch.cat([torch.full_like(p, g["weight_decay"]).flatten() for g in groups for p in g["params"]])
    rates = [schedule.base_lrs[0] * schedule.lr_lambdas[0](k) for k in range(steps)]
    batches = batches_of(loader, steps)
    problem = Problem(
        params,
        partial(losses, model, rows),
        batches,
        [float(sum(len(rows[i].targets) for i in batch)) for batch in batches],
        partial(_split, rows, batch_tokens),
    )
    return problem, Recipe(rates, groups[0]["betas"], groups[0]["eps"], decay, float(trainer.args.max_grad_norm))


def _check_plain(trainer: Any) -> None:
    from torch import nn

    config: Any = trainer.model.config.get_text_config()
    drops = any(isinstance(m, nn.Dropout) and m.p > 0 for m in trainer.model.modules())
    if drops or getattr(config, "attention_dropout", None):
        raise UserError("--model: it trains with dropout of its own (see its config.json); set that to 0 in a copy.")
    if trainer.aux_loss_enabled:
        raise UserError("--model: a mixture of experts trains its routers on a loss of no row; it cannot be unrolled.")


def batches_of(loader: Any, steps: int) -> list[list[int]]:
    """The row numbers of each step, in the order in which the trainer takes them: a new order each epoch."""
    batches: list[list[int]] = []
    epoch = 0
    while len(batches) < steps:
        loader.set_epoch(epoch)
        batches += [list(map(int, batch)) for batch in loader.batch_sampler]
        epoch += 1
    return batches[:steps]


def losses(model: Any, rows: Sequence[Encoded], numbers: Sequence[int]) -> Float[Tensor, " B"]:
    """Summed loss of some of the rows, with a graph that can be differentiated twice."""
    from datablame.blocks import select_blocks, uses_head
    from datablame.capture import Batch, labelled_only

    batch = Batch([rows[i] for i in numbers], model.get_input_embeddings().weight.device)
    select = not uses_head(model, select_blocks(model))
    with labelled_only(model, batch.predicts, select):
        logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
    return batch.losses(logits[0] if select else logits[batch.predicts])


def _split(rows: Sequence[Encoded], batch_tokens: int, batch: Sequence[int]) -> list[list[int]]:
    from datablame.capture import plan_batches

    plan = plan_batches([len(rows[i].input_ids) for i in batch], batch_tokens)
    return [[batch[k] for k in part] for part in plan]


# ---------------------------------------------------------------- there and back


def _forecast(problem: Problem, task: Task, trajectory: Any, reporter: Reporter) -> None:
    """Measure the largest part once: training passes, and one double backward pass a query."""
    from datablame.replay import double_backward, graph
    from datablame.store import check_disk

    parts = [part for batch in problem.batches for part in problem.split(batch)]
    sizes = [sum(len(task.rows[i].input_ids) for i in part) for part in parts]
    largest = sizes.index(max(sizes))
    theta, m = problem.theta(), len(task.queries)
    part = parts[largest]
    graph(problem, part)  # the first pass of a process is slow
    start = time.perf_counter()
    g, w = graph(problem, part)
    between = time.perf_counter()
    double_backward(problem, g, w, theta)
    once, twice = between - start, time.perf_counter() - between
    per_token = (2 * once + m * twice) / sizes[largest]
    steps, tokens = len(problem.batches), sum(sizes)
    disk = steps * 4 * theta.numel() * theta.element_size() + 3 * 8 * m * theta.numel()
    check_disk(trajectory.folder, disk)
    forecast = Forecast(len(task.rows), tokens, disk, _memory() + 8 * 8 * m * theta.numel(), per_token * tokens)
    reporter.note(f"{steps} steps there, and back for {m} queries; tokens and time are those of the whole run")
    reporter.forecast(forecast)


def _memory() -> int:
    """The process's memory while the graphs are there, in bytes."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def _forward(problem: Problem, recipe: Recipe, trajectory: Any, reporter: Reporter) -> list[dict[str, Any]]:
    """Train from where the trajectory ends; the loss history by step."""
    from datablame.replay import train

    first = trajectory.steps()
    reporter.start("train", len(problem.batches), "steps")
    reporter.advance(first)

    def record(step: int, moment: Moment) -> None:
        trajectory.write(step, moment)
        reporter.advance(1)

    device = problem.params[0].device
    start = trajectory.read(max(first - 1, 0)).state if first else None
    start = start and type(start)(*(x.to(device) for x in start))
    train(problem, recipe, start, max(first - 1, 0), record=record)
    reporter.end()
    kept = (trajectory.read(k).loss for k in range(len(problem.batches)))
    return [{"step": k + 1, "loss": loss} for k, loss in enumerate(kept)]


def _backward(
    problem: Problem, recipe: Recipe, trajectory: Any, task: Task, model: Any, reporter: Reporter
) -> Float[Tensor, "m n"]:
    """Replay from where the last replay stopped; the params are put back to the end of the run."""
    from datablame.replay import begin, replay

    end = problem.theta()
    step, adjoint = trajectory.read_adjoint() or (len(problem.batches), None)
    if adjoint is None:
        adjoint = begin(query_gradients(problem, model, task.query_rows), len(task.rows))
    reporter.start("replay", len(problem.batches), "steps")
    reporter.advance(len(problem.batches) - step)

    def done(step: int, adjoint: Adjoint) -> None:
        trajectory.write_adjoint(step, adjoint)
        reporter.advance(1)

    scores = replay(problem, recipe, trajectory.read, adjoint, step - 1, done)
    reporter.end()
    problem.put(end)
    return scores


def query_gradients(problem: Problem, model: Any, rows: Sequence[Encoded]) -> Float[Tensor, "m P"]:
    """Of each query's mean loss over its labelled tokens, at the present params."""
    import torch

    found = []
    for k, row in enumerate(rows):
        mean = losses(model, rows, [k]).sum() / len(row.targets)
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(mean, problem.params)]))
    return torch.stack(found)
