"""What a person sees in the terminal: forecasts, progress bars, tables. Nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from datablame.errors import printable
from datablame.indexing import Forecast, Reporter

if TYPE_CHECKING:
    from datablame.auditing import Audit
    from datablame.comparing import Comparison
    from datablame.paper import Page
    from datablame.scores import Scores

out = Console(highlight=False, soft_wrap=False)
err = Console(stderr=True, highlight=False)


class ConsoleReporter(Reporter):
    """Prints notes and forecasts, and draws a bar with rate and time left."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def note(self, message: str) -> None:
        """A line above the bar."""
        (self._progress.console if self._progress else err).print(escape(printable(message)))

    def forecast(self, forecast: Forecast) -> None:
        """The forecast's sentence."""
        err.print(f"[bold]forecast[/bold] {forecast.sentence()}")

    def start(self, what: str, total: int, unit: str = "tokens") -> None:
        """Draw the bar, in place of one that was not ended."""
        self.end()
        self._progress = Progress(
            TextColumn(f"[bold]{what}[/bold]"),
            BarColumn(),
            TextColumn(f"{{task.completed:,}}/{{task.total:,}} {unit}"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=err,
        )
        self._unit = unit
        self._task = self._progress.add_task(what, total=max(total, 1), rate="")
        self._progress.start()

    def advance(self, done: int) -> None:
        """Move the bar."""
        if self._progress is None or self._task is None:
            return
        self._progress.advance(self._task, done)
        task = self._progress.tasks[0]
        rate = task.completed / task.elapsed if task.elapsed else 0.0
        self._progress.update(self._task, rate=f"{rate:.3g} {self._unit}/s")

    def end(self) -> None:
        """Take the bar away."""
        if self._progress:
            self._progress.stop()
            self._progress = None


def shorten(text: str, width: int) -> str:
    """One line of at most `width` characters."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= width else line[: width - 1] + "…"


PRINTED = 20
"""Queries whose tables are printed; the files hold all of them."""


def print_scores(scores: Scores, k: int) -> None:
    """A table per query and method."""
    from datablame.scores import SAME_ANSWER

    for note in scores.notes:
        void = note.startswith(SAME_ANSWER)
        out.print(Text(printable(f"{'warning' if void else 'note'}: {note}"), style="bold red" if void else "yellow"))
    tops = {method: scores.top(k, method) for method in scores.methods}
    for query in scores.queries[:PRINTED]:
        out.print()
        out.print(Text.assemble(("query  ", "bold"), str(query.id), "  ", (shorten(query.prompt, 160), "dim")))
        out.print(Text.assemble(("output ", "bold"), shorten(query.response, 300)))
        for method, top in tops.items():
            out.print(_top_table(method, top[top["query"] == query.id].to_dict("records")))
    if len(scores.queries) > PRINTED:
        out.print(f"… and {len(scores.queries) - PRINTED} more queries, in the files below")


def _top_table(method: str, records: list[dict[Any, Any]]) -> Table:
    labels = any(r["label"] is not None for r in records)
    table = Table(title=escape(method), title_justify="left", title_style="bold", expand=True)
    for name in ("rank", "score", "pct"):
        table.add_column(name, justify="right", no_wrap=True, min_width={"rank": 4, "score": 9, "pct": 5}[name])
    for name, key in (("id", "train"), ("label", "label")) if labels else (("id", "train"),):
        longest = max(len("" if r[key] is None else str(r[key])) for r in records)
        table.add_column(name, no_wrap=True, min_width=min(longest, 16), max_width=20)
    table.add_column("training row", ratio=1, no_wrap=True, overflow="ellipsis")
    for r in records:
        text = shorten(f"{r['prompt']} → {r['response']}" if r["prompt"] else r["response"], 200)
        label = [Text(shorten(str(r["label"] or ""), 20))] if labels else []
        id_ = Text(shorten(str(r["train"]), 40))
        table.add_row(str(r["rank"]), f"{r['score']:.4g}", f"{r['percentile']:.1f}", id_, *label, Text(text))
    return table


def print_comparison(comparison: Comparison) -> None:
    """One table: each method at each damping against the exact solution."""
    from datablame.report.compare import cells, headings

    title = "against exact at the same damping"
    # Without lines, so that it fits 80 columns.
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))
    table.add_column("method", overflow="fold", min_width=20)
    for heading in headings(len(comparison.train)):
        table.add_column(heading.replace(" ", "\n"), justify="right", vertical="bottom")
    failed: dict[tuple[str, str], list[str]] = {}
    before = None
    for row in comparison.rows:
        *numbers, error = cells(row)
        if before not in (None, row.method):
            table.add_row()
        name = Text(printable(row.method) if row.method != before else "")
        table.add_row(name, *(numbers if not error else [numbers[0], Text("failed", style="yellow")]))
        if error:
            failed.setdefault((row.method, error), []).append(numbers[0])
        before = row.method
    out.print(table)
    for (method, error), dampings in failed.items():
        out.print(Text(printable(f"{method} failed at damping {', '.join(dampings)}: {error}"), style="yellow"))


def print_audit(audit: Audit, k: int) -> None:
    """The first rows, then how far to trust the order."""
    from datablame.report.audit import HEADINGS, cells

    title = f"rows to look at first, by {audit.by.replace('_', ' ')}"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0), expand=True)
    for heading in HEADINGS:
        table.add_column(
            heading.replace(" ", "\n").replace("-", "-\n"), justify="right", no_wrap=True, vertical="bottom"
        )
    table.add_column("id", max_width=16, no_wrap=True, vertical="bottom")
    table.add_column("training row", ratio=1, no_wrap=True, overflow="ellipsis", vertical="bottom")
    for r in audit.top(k):
        text = shorten(f"{r.prompt} → {r.response}" if r.prompt else r.response, 200)
        table.add_row(*cells(r), Text(shorten(str(r.id), 16)), Text(text))
    out.print(table)
    for f in audit.findings:
        out.print(Text(f"{f.level}: {f.sentence}", style="yellow" if f.level == "warning" else "dim"))


def print_page(page: Page) -> None:
    """A table or figure of the paper: its tables, then what has to be said of them."""
    out.print(Text(page.title, style="bold"))
    out.print(Text(printable(", ".join(f"{name.lower()}: {value}" for name, value in page.facts)), style="dim"))
    for t in page.tables:
        table = Table(title=Text(printable(t.title)), title_justify="left", title_style="bold", box=SIMPLE_HEAD)
        table.padding, table.pad_edge = (0, 1, 0, 0), False  # nine columns of numbers on 80 characters
        for i, heading in enumerate(t.headings):
            table.add_column(Text(heading), justify="right" if i else "left", overflow="fold")
        for row in t.rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        out.print(table)
    for note in page.notes:
        out.print(Text(printable(note), style="dim"))


def print_grid(title: str, rows: Sequence[Sequence[str]]) -> None:
    """A table of cells, its heading first."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))
    for k, heading in enumerate(rows[0]):
        table.add_column(Text(printable(heading)), justify="left" if k == 0 else "right", overflow="fold")
    for row in rows[1:]:
        table.add_row(*(Text(printable(cell.replace("`", ""))) for cell in row))
    out.print(table)


def print_preview(rows: Sequence[list[tuple[str, bool]]], ids: Sequence[object]) -> None:
    """Rendered rows, labelled tokens marked by colour and by brackets."""
    for id_, pieces in zip(ids, rows, strict=True):
        out.print(Text(printable(f"row {id_}   (the loss is taken on the ⟦marked⟧ part)"), style="bold"))
        line = Text()
        for text, labelled in pieces:
            shown = printable(text)
            line.append(f"⟦{shown}⟧" if labelled else shown, style="black on green" if labelled else "")
        out.print(line)
        out.print()
