"""`datablame cache`: what lies in the cache directory, and its removal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from datablame.errors import printable

if TYPE_CHECKING:
    from datablame.cache import Entry

app = typer.Typer(
    help="What lies in the cache directory: models, fine-tunes, cells; and its removal.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Kind = Annotated[str | None, typer.Option(help="Only of this kind, such as finetunes.")]


@app.command("list")
def list_(kind: Kind = None) -> None:
    """What is there, how large it is, when it was last written to, and whether a process uses it."""
    from datablame.cache import KINDS, choose, entries, others
    from datablame.models import cache_dir

    found = entries()
    if kind is not None:
        found = choose(found, kind=kind)
    typer.echo(f"{cache_dir()}: {_size(found)}")
    for name, what in KINDS.items():
        some = [e for e in found if e.kind == name]
        if some:
            typer.echo(f"\n{name}: {_size(some)}. {what[0].upper()}{what[1:]}.")
            _table(some)
    if kind is None and (strange := others()):
        typer.echo(f"\nnot datablame's, or links, and left alone: {printable(', '.join(strange))}")


@app.command()
def prune(
    names: Annotated[list[str] | None, typer.Argument(help="Entries, as `datablame cache list` names them.")] = None,
    kind: Kind = None,
    older_than: Annotated[float | None, typer.Option(help="Only what was not written to for so many days.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    dry: Annotated[bool, typer.Option("--dry", help="Only show what would go.")] = False,
) -> None:
    """Remove what is named, after asking. What a process uses stays. All of it is made again when it is needed."""
    from datablame.cache import choose, entries, remove

    chosen = choose(entries(), names or [], kind, older_than)
    goes = [e for e in chosen if not e.in_use]
    _table(chosen)
    typer.echo(f"{'would free' if dry else 'frees'} {_size(goes)}, {len(goes)} of {len(chosen)} entries")
    if dry or not goes:
        return
    if not yes and not typer.confirm("Remove them?"):
        typer.echo("nothing was removed")
        raise typer.Exit(1)
    kept = [e for e in goes if not remove(e)]
    for e in kept:
        typer.echo(f"{printable(e.name)}: a process uses it by now, so it stays")
    typer.echo(f"freed {_size([e for e in goes if e not in kept])}")


def _table(some: Sequence[Entry]) -> None:
    width = max((len(e.name) for e in some), default=0)
    for e in some:
        state = "in use" if e.in_use else ""
        line = f"  {e.name:{width}}  {_size([e]):>8}  {_age(e.changed):>10}  {state:6}  {e.about}"
        typer.echo(printable(line.rstrip()))


def _size(some: Sequence[Entry]) -> str:
    from datablame.indexing import bytes_text

    return bytes_text(sum(e.size for e in some))


def _age(changed: float) -> str:
    seconds = max(time.time() - changed, 0)
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= size:
            n = int(seconds / size)
            return f"{n} {unit}{'s' if n > 1 else ''}"
    return "just now"
