"""The page of a benchmark: the ladder, the paper's tables, and one table a task."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from datablame import __version__
from datablame.evaluation import figures
from datablame.evaluation.metrics import METRICS
from datablame.evaluation.results import TaskResults
from datablame.evaluation.tables import (
    HEADINGS,
    PAPER_TABLES,
    Rows,
    behaving_rows,
    costly_rows,
    headline_rows,
    ladder_rows,
    paper_rows,
    task_rows,
)
from datablame.report.figures import script_safe
from datablame.report.html import environment

BASE = "repsim-base:layer=middle,text=response"
"""Beside BM25, what can be found without any fine-tuning."""


def write_bench(found: Mapping[str, TaskResults], path: Path) -> Path:
    """Write the self-contained page and return its path."""
    page = environment().get_template("bench.html.j2").render(context(found))
    path.write_bytes(page.encode("utf-8", errors="replace"))
    return path


def context(found: Mapping[str, TaskResults]) -> dict[str, Any]:
    """Everything the template prints."""
    maps = {task: figures.heat_maps(results) for task, results in found.items()}
    drawn = {"ladder": figures.ladder(found), **{f"heat-{t}": m for t, m in maps.items() if m is not None}}
    first = next(iter(found.values())).results[0]
    return {
        "version": __version__,
        "model": first["model"],
        "scale": first["scale"],
        "recipe": first["recipe"],
        "left_out": [note for results in found.values() for note in results.left_out],
        "headline": headline_rows(found),
        "ladder": ladder_rows(found),
        "paper": {PAPER_TABLES[n][0]: paper_rows(n, found) for n in PAPER_TABLES},
        "tasks": {t: _task(r) for t, r in found.items()},
        "metrics": [HEADINGS[m] for m in METRICS],
        "figures": script_safe(json.dumps({k: json.loads(f.to_json()) for k, f in drawn.items()})),
        "drawn": list(drawn),
        "plotly": get_plotlyjs(),
    }


def _task(results: TaskResults) -> dict[str, Any]:
    """Facts and tables of one task."""
    first = results.results[0]
    tables: dict[str, Rows | None] = {"reference responses": task_rows(results)}
    if results.answered:
        tables["the model's own answers"] = task_rows(results, "generated")
        tables["the model's own answers, where they show their class's behaviour"] = behaving_rows(results)
    tables["methods on features of their own, by seeds that have them"] = costly_rows(results)
    for group in results.groups()[1:]:
        if len(results.groups()) > 2:
            tables[f"queries: {group}"] = task_rows(results, "reference", group)
    return {
        "title": first["title"],
        "rows": first["rows"],
        "queries": len(first["queries"]),
        "seeds": [r["seed"] for r in results.results],
        "leak": [r["leak"] for r in results.results],
        "base": results.seeds(BASE, "auroc") if BASE in results.runs else [],
        "learnt": [r["learnt"] for r in results.results],
        "failed": results.failed,
        "answered": results.answered,
        "tables": {caption: rows for caption, rows in tables.items() if rows},
        "top": figures.top_table(results),
    }
