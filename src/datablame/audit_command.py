"""`datablame audit`: parse, call the library, print."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer


def audit(
    index: Annotated[Path, typer.Argument(help="An index made by `datablame index`, with gradients.")],
    out: Annotated[Path, typer.Option(help="Directory to write to.")],
    by: Annotated[str, typer.Option(help="Order: self_influence, gradient_norm, loss, drop.")] = "self_influence",
    damping: Annotated[
        float, typer.Option(help="λ of the self-influence, over the mean eigenvalue that is not 0.")
    ] = 1.0,
    top: Annotated[int, typer.Option(min=1, help="Training rows to list.")] = 20,
) -> None:
    """List the training rows to look at first, without a query; writes audit.parquet, audit.jsonl and audit.html."""
    from dataclasses import replace

    from datablame.auditing import audit as run
    from datablame.console import print_audit
    from datablame.scores import check_out

    check_out(out)
    audited = run(index, by=by, damping=damping)
    command = shlex.join(["datablame", *sys.argv[1:]])
    audited = replace(audited, settings={**audited.settings, "command": command})
    print_audit(audited, top)
    for path in audited.save(out, top):
        typer.echo(f"wrote {path}")
