"""`datablame evaluate`: any tool's scores against labels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    scores: Annotated[
        Path, typer.Option(help="CSV, Parquet or NumPy: a line for each query, a column a training row.")
    ],
    train_labels: Annotated[
        Path, typer.Option(help="Classes of the training rows: one a line, or JSONL with `label`.")
    ],
    query_labels: Annotated[Path, typer.Option(help="Classes of the queries, likewise.")],
    lower_is_better: Annotated[
        bool, typer.Option("--lower-is-better", help="Low scores are the responsible rows (distances, ranks).")
    ] = False,
    method: Annotated[str | None, typer.Option(help="Which method, where a scores.parquet holds several.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check any tool's scores against labels: accuracy, recall, AUROC …, with intervals and chance."""
    import json

    from datablame.evaluation.evaluate import evaluate as run
    from datablame.evaluation.reading import read_labels, read_scores

    train, queries = read_labels(train_labels), read_labels(query_labels)
    matrix = read_scores(scores, len(queries), len(train), method)
    result = run(matrix, train, queries, lower_is_better=lower_is_better)
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        _print(result, train, queries)


def _print(result: dict[str, dict[str, float]], train: list[str], queries: list[str]) -> None:
    from rich.table import Table

    from datablame.console import out
    from datablame.evaluation.evaluate import same_class
    from datablame.evaluation.metrics import coverage

    n_classes = len(set(train))
    title = f"{len(queries)} queries × {len(train)} training rows, {n_classes} classes"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("metric")
    for heading in ("value", "95 % interval", "chance"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, r in result.items():
        form = ".1f" if name == "mean_rank" else ".3f"
        interval = f"{r['low']:{form}} … {r['high']:{form}}"
        table.add_row(name.replace("_", " "), f"{r['value']:{form}}", interval, f"{r['chance']:{form}}")
    out.print(table)
    out.print("intervals: bootstrap over the queries; lower is better for the mean rank only")
    truth = same_class(train, queries)
    best = coverage(truth.astype(float), truth, n_classes).mean()
    if best < 1:
        out.print(
            f"coverage looks at the top {len(train) // n_classes} whatever the class sizes: here at most {best:.3f}"
        )
