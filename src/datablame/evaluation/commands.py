"""`datablame bench`: the tasks, and their rows as files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from datablame.errors import UserError

if TYPE_CHECKING:
    from datablame.evaluation.tasks import Task

app = typer.Typer(help="Tasks with known truth: list them, write their rows.", no_args_is_help=True)

Scale = Annotated[str, typer.Option(help="smoke, cpu or paper: how many rows and queries.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the rows.")]
AdvBench = Annotated[
    str | None, typer.Option(help="Real harmful prompts: a file, a hub id, or pyrit (fetched with pip).")
]
Alpaca = Annotated[str | None, typer.Option(help="Real instructions: a file, a hub id, or llamafactory.")]
Data = Annotated[str | None, typer.Option(help="Directory of the paper's released files.")]


@app.command("tasks")
def list_tasks(
    names: Annotated[list[str] | None, typer.Argument(help="Tasks. Default: all.")] = None,
    scale: Scale = "cpu",
    seed: Seed = 0,
    advbench: AdvBench = None,
    alpaca: Alpaca = None,
    data: Data = None,
) -> None:
    """Describe the tasks: sizes, chance, what words alone give away, and one row of each class."""
    from datablame.evaluation import tasks

    given = {"advbench": advbench, "alpaca": alpaca, "data": data}
    chosen = names or [n for n in tasks.names() if data is not None or n not in tasks.RELEASED]
    _check_used(given, chosen)
    for name in chosen:
        known = tasks.takes(name)
        _describe(tasks.build(name, scale, seed, **{k: v for k, v in given.items() if k in known}))


@app.command("rows")
def write_rows(
    name: Annotated[str, typer.Argument(help="A task.")],
    out: Annotated[Path, typer.Option(help="Directory to write train.jsonl and queries.jsonl to.")],
    scale: Scale = "cpu",
    seed: Seed = 0,
    advbench: AdvBench = None,
    alpaca: Alpaca = None,
    data: Data = None,
) -> None:
    """Write a task's rows: prompt, response, label, and the queries' group."""
    from datablame.evaluation import tasks
    from datablame.scores import check_out

    check_out(out)
    task = tasks.build(name, scale, seed, advbench=advbench, alpaca=alpaca, data=data)
    train = [{"prompt": e.prompt, "response": e.response, "label": e.label} for e in task.train]
    queries = [
        {"prompt": e.prompt, "response": e.response, "label": e.label, "group": group}
        for e, group in zip(task.queries, task.groups, strict=True)
    ]
    for file, rows in {"train.jsonl": train, "queries.jsonl": queries}.items():
        _write(out / file, rows)
        typer.echo(f"wrote {out / file}: {len(rows)} rows")


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    try:
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    except OSError as e:
        raise UserError(f"--out {path}: cannot be written ({e.strerror or e}).") from e


def _check_used(given: dict[str, str | None], names: list[str]) -> None:
    """Raise UserError for a source that none of the tasks takes."""
    from datablame.evaluation import tasks

    taken = {source for name in names for source in tasks.takes(name)}
    if unused := [k for k, v in given.items() if v is not None and k not in taken]:
        raise UserError(f"--{unused[0]}: none of {', '.join(names)} takes it.")


def _describe(task: Task) -> None:
    from datablame.console import shorten
    from datablame.evaluation.leak import lexical_leak

    leak = lexical_leak(task)
    typer.echo(f"{task.name} (version {task.version}): {task.title}")
    typer.echo(
        f"  {len(task.train)} rows, {len(task.queries)} queries, {len(task.classes)} classes; "
        f"chance of a right top row {task.chance:.3f} (queries: {', '.join(task.main)})"
    )
    typer.echo(
        f"  AUROC of words alone: prompt {leak['prompt']:.2f}, response {leak['response']:.2f}; "
        f"the label shows on: {leak['shows']}"
    )
    for label in task.classes:
        e = next(e for e in task.train if e.label == label)
        typer.echo(f"    {shorten(label, 24):24} {shorten(e.prompt, 80)} → {shorten(e.response, 100)}")
    typer.echo()
