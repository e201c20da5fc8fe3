"""`datablame paper`: list, run and show. Heavy imports happen inside the commands."""

from __future__ import annotations

import shlex
from dataclasses import replace
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
    seed: Annotated[int | None, typer.Option(min=0, help="Default: 0, or the scale's where there are several.")] = None,
    seeds: Annotated[str | None, typer.Option(help="In place of --seed: several, separated by commas.")] = None,
    model: Annotated[list[str], typer.Option(help="As for `datablame index`; twice where two are shown.")] = [MODEL],  # noqa: B006
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps or auto.")] = None,
    judge: Annotated[str, typer.Option(help="keywords, a text classifier, or module:function.")] = "keywords",
    judge_label: Annotated[str | None, typer.Option(help="The classifier's label that means harmful.")] = None,
    judge_labels: Annotated[str | None, typer.Option(help="Answers with human labels: the judge's error.")] = None,
    cells: CellsIn = None,
) -> None:
    """Measure one, or all. A run that is already in --out is kept. One alone refuses options that it does not read."""
    from datablame.console import ConsoleReporter
    from datablame.indexing import quiet_libraries
    from datablame.scores import check_out

    several = _seeds(seed, seeds)
    scales = ("smoke", "cpu", "paper") if name == ALL else experiment(name).costs
    if scale not in scales:
        raise UserError(f"--scale {scale}: use {' or '.join(scales)}.")
    check_out(out)
    first = several[0] if several else 0
    asked = name, scale, out, first, "", ConsoleReporter(), mnist, model[0], device, tuple(model), several
    request = Request(*asked, judge=judge, judge_label=judge_label, judge_labels=judge_labels, cells_in=cells)
    quiet_libraries()
    if name == ALL:
        _run_all(request)
        return
    _check_read(request)
    path = module(name).run(replace(request, command=_command(request)))
    more = f" --cells {shlex.quote(str(cells))}" if cells and experiment(name).module == SHOWN_FROM_CELLS else ""
    typer.echo(f"{path}; see it with: datablame paper show {name} --out {shlex.quote(str(out))}{more}")


def _seeds(seed: int | None, seeds: str | None) -> tuple[int, ...] | None:
    """Those that were named, each once. Raises UserError where both options were given."""
    from datablame.evaluation.commands import numbers

    if seed is not None and seeds is not None:
        raise UserError("--seed and --seeds: give one of the two.")
    return tuple(dict.fromkeys(numbers(seeds) or ())) or (None if seed is None else (seed,))


NOT_READ = {
    "mnist": "--mnist: {} reads no images.",
    "model": "--model: {} runs none.",
    "models": "--model, given twice: {} shows one model.",
    "device": "--device: {} runs on the CPU.",
    "seeds": "--seeds: {} is of one seed; give --seed.",
    "judge": "--judge: {} judges no answers.",
    "cells": "--cells: {} reads none.",
}
"""`{option: what is said where an experiment does not read it}`."""
SHOWN_FROM_CELLS = "attribution"
"""The module that reads cells of the benchmark to show them, and not a result of its own."""


def _check_read(request: Request) -> None:
    """Raises UserError for what was given and the experiment would not look at."""
    for option, _, _ in _given(request):
        if option not in experiment(request.name).options:
            raise UserError(NOT_READ[option].format(request.name))


def _command(request: Request) -> str:
    """The command that runs this experiment alone, with what it reads of what was given."""
    words = ["datablame", "paper", "run", request.name, "--scale", request.scale, "--out", str(request.out)]
    read = [(flag, str(value)) for option, flag, value in _given(request) if option in experiment(request.name).options]
    if request.seeds and "--seeds" not in dict(read):
        words += ["--seed", str(request.seed)]
    return shlex.join([*words, *(word for pair in read for word in pair)])


def _given(request: Request) -> list[tuple[str, str, object]]:
    """(option, flag, value) of all that is not the default, but for a single seed, which every experiment reads."""
    several = ",".join(map(str, request.seeds)) if request.seeds and len(request.seeds) > 1 else None
    asked = [
        ("seeds", "--seeds", several),
        ("mnist", "--mnist", request.mnist),
        ("model", "--model", None if request.models == (MODEL,) else request.model),
        *(("models", "--model", model) for model in request.models[1:]),
        ("device", "--device", request.device),
        ("judge", "--judge", None if request.judge == "keywords" else request.judge),
        ("judge", "--judge-label", request.judge_label),
        ("judge", "--judge-labels", request.judge_labels),
        ("cells", "--cells", request.cells_in),
    ]
    return [(option, flag, value) for option, flag, value in asked if value is not None]


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
    if cells is not None and not from_cells:
        raise UserError(NOT_READ["cells"].format(name))
    try:
        page = module(name).show(out, name, cells) if from_cells else module(name).show(out, name)
    except (KeyError, TypeError) as e:
        raise UserError(f"{result}: is not a result as this version writes it ({e}). Remove it and run again.") from e
    print_page(page)
    path = write_page(page, out / f"{name}.html")
    typer.echo(f"wrote {path}")
    if open_:
        typer.launch(str(path))
