"""`datablame paper`: list, run and show. Heavy imports happen inside the commands."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from datablame.errors import UserError, printable
from datablame.paper import EXPERIMENTS, Request, experiment, in_order, module

app = typer.Typer(
    help="The paper's tables and figures: run one, and see its numbers beside ours.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Name = Annotated[str, typer.Argument(help="A table or figure, such as table5; `datablame paper list` names them.")]
Out = Annotated[Path, typer.Option(help="Directory of results.")]
CellsIn = Annotated[
    Path | None,
    typer.Option("--cells", help="Where the benchmark's results are. Default: the directory bench in --out."),
]
OUT = Path("paper-out")
MODEL = "smollm2-135m"
ALL = "all"


@app.command("list")
def list_(out: Out = OUT) -> None:
    """What there is, what it shows, what it costs at each scale, and whether it was run."""
    from datablame.paper.results import state

    for name in in_order():
        e = EXPERIMENTS[name]
        typer.echo(f"{name:9} {e.shows}")
        for scale, cost in e.costs.items():
            typer.echo(f"{'':9} {scale + ':':6} {cost}")
        typer.echo(f"{'':9} {state(out / e.result)}")


@app.command()
def run(
    name: Annotated[str, typer.Argument(help="A table or figure, such as table5, or all of them: all.")],
    scale: Annotated[str, typer.Option(help="smoke (minutes), cpu (everything), paper (a GPU).")] = "smoke",
    mnist: Annotated[str | None, typer.Option(help="A folder of idx files or a hub id. Default: npm.")] = None,
    out: Out = OUT,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first subset of points, or of one-seed figures.")] = 0,
    seeds: Annotated[str | None, typer.Option(help="Seeds, separated by commas, in place of --seed.")] = None,
    model: Annotated[list[str], typer.Option(help="As for `datablame index`; twice where two are shown.")] = [MODEL],  # noqa: B006
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps or auto.")] = None,
    judge: Annotated[str, typer.Option(help="keywords, a text classifier, or module:function.")] = "keywords",
    judge_label: Annotated[str | None, typer.Option(help="The classifier's label that means harmful.")] = None,
    judge_labels: Annotated[str | None, typer.Option(help="Answers with human labels: the judge's error.")] = None,
    cells: CellsIn = None,
) -> None:
    """Measure one, or all. A run that is already in --out is kept."""
    from datablame.console import ConsoleReporter
    from datablame.evaluation.commands import numbers
    from datablame.indexing import quiet_libraries
    from datablame.scores import check_out

    several = tuple(numbers(seeds) or ()) or None
    scales = ("smoke", "cpu", "paper") if name == ALL else experiment(name).costs
    if scale not in scales:
        raise UserError(f"--scale {scale}: use {' or '.join(scales)}.")
    check_out(out)
    if name != ALL:
        _check_used(experiment(name).module, name, judge != "keywords" or judge_label or judge_labels, len(model))
        _check_cells(hasattr(module(name), "cells"), name, cells)
    first = seed if several is None else several[0]
    asked = name, scale, out, first, _command(name), ConsoleReporter(), mnist, model[0], device, tuple(model), several
    request = Request(*asked, judge=judge, judge_label=judge_label, judge_labels=judge_labels, cells_in=cells)
    quiet_libraries()
    if name == ALL:
        _run_all(request)
        return
    path = module(name).run(request)
    more = f" --cells {shlex.quote(str(cells))}" if cells and experiment(name).module == SHOWN_FROM_CELLS else ""
    typer.echo(f"{path}; see it with: datablame paper show {name} --out {shlex.quote(str(out))}{more}")


def _check_used(module: str, name: str, judge: object, models: int) -> None:
    """Raises UserError for an option that the experiment would not look at."""
    if module in ("table1", "table6", "figure6"):
        return
    if judge:
        raise UserError(f"--judge: {name} judges no answers.")
    if models > 1:
        raise UserError(f"--model, given twice: {name} shows one model.")


SHOWN_FROM_CELLS = "attribution"
"""The module that reads cells of the benchmark to show them, and not a result of its own."""


def _check_cells(used: bool, name: str, cells: Path | None) -> None:
    """Raises UserError where --cells would not be looked at."""
    if cells is not None and not used:
        raise UserError(f"--cells: {name} reads none.")


def _command(name: str) -> str:
    """The command as it was given; of one experiment among all, its own."""
    arguments = list(sys.argv[1:])
    if ALL in arguments:
        arguments[arguments.index(ALL)] = name
    return shlex.join(["datablame", *arguments])


def _run_all(request: Request) -> None:
    from datablame.paper.running import run_all

    failed = run_all(request, _command)
    where = shlex.quote(str(request.out))
    typer.echo(f"see them with: datablame paper list --out {where}, datablame paper show NAME --out {where}")
    for name, why in failed.items():
        typer.echo(f"failed: {name}: {printable(why)}", err=True)
    if failed:
        raise typer.Exit(1)


@app.command()
def show(
    name: Name,
    out: Out = OUT,
    cells: CellsIn = None,
    open_: Annotated[bool, typer.Option("--open", help="Open the picture in the browser.")] = False,
) -> None:
    """Print the paper's numbers beside ours, and write the picture, NAME.html."""
    from datablame.console import print_page
    from datablame.report.paper import write_page

    result, from_cells = out / experiment(name).result, experiment(name).module == SHOWN_FROM_CELLS
    _check_cells(from_cells, name, cells)
    try:
        page = module(name).show(out, name, cells) if from_cells else module(name).show(out, name)
    except (KeyError, TypeError) as e:
        raise UserError(f"{result}: is not a result as this version writes it ({e}). Remove it and run again.") from e
    print_page(page)
    path = write_page(page, out / f"{name}.html")
    typer.echo(f"wrote {path}")
    if open_:
        typer.launch(str(path))
