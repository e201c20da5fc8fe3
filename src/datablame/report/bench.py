"""The page of a benchmark: the ladder, the paper's tables and one table a task for each recipe; retraining truth."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from datablame import __version__
from datablame.evaluation import figures
from datablame.evaluation.results import TaskResults
from datablame.evaluation.tables import (
    PAPER_TABLES,
    Rows,
    behaving_rows,
    costly_rows,
    headline_rows,
    ladder_rows,
    markdown,
    paper_rows,
    task_rows,
)
from datablame.report.figures import script_safe
from datablame.report.html import environment

BASE = "repsim-base:layer=middle,text=response"
"""Beside BM25, what can be found without any fine-tuning."""


Suite = Mapping[str, Mapping[str, TaskResults]]
"""`{recipe: {task: results}}`"""
Truth = Mapping[str, tuple[Rows, Sequence[str]]]
"""`{title: (table, what is to be said of it)}` of retraining."""


def write_bench(suite: Suite, path: Path, truth: Truth | None = None) -> Path:
    """Write the self-contained page and return its path."""
    page = environment().get_template("bench.html.j2").render(context(suite, truth or {}))
    path.write_bytes(page.encode("utf-8", errors="replace"))
    return path


def write_tables(suite: Suite, path: Path) -> Path:
    """The ladder and the paper's tables of every recipe as Markdown."""
    parts = []
    for recipe, found in suite.items():
        tables = {"From the paper's protocol to the sound one": ladder_rows(found)} | _paper(found)
        parts += [f"# Fine-tune: {recipe}"]
        parts += [f"## {title}\n\n{markdown(rows)}" for title, rows in tables.items()]
        parts += [note for results in found.values() for note in results.left_out]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def context(suite: Suite, truth: Truth) -> dict[str, Any]:
    """Everything the template prints."""
    drawn: dict[str, Any] = {}
    for recipe, found in suite.items():
        maps = {task: figures.heat_maps(results) for task, results in found.items()}
        drawn[f"{recipe}-ladder"] = figures.ladder(found)
        drawn |= {f"{recipe}-heat-{task}": m for task, m in maps.items() if m is not None}
    first = next(iter(next(iter(suite.values())).values())).results[0]
    return {
        "version": __version__,
        "model": first["model"],
        "scale": first["scale"],
        "recipes": {recipe: _recipe(found) for recipe, found in suite.items()},
        "truth": truth,
        "figures": script_safe(json.dumps({k: json.loads(f.to_json()) for k, f in drawn.items()})),
        "drawn": list(drawn),
        "plotly": get_plotlyjs(),
    }


def _recipe(found: Mapping[str, TaskResults]) -> dict[str, Any]:
    """What is told of the cells of one recipe."""
    return {
        "left_out": [note for results in found.values() for note in results.left_out],
        "headline": headline_rows(found),
        "ladder": ladder_rows(found),
        "paper": _paper(found),
        "tasks": {task: _task(results) for task, results in found.items()},
    }


def _paper(found: Mapping[str, TaskResults]) -> dict[str, Rows]:
    """The paper's tables by their titles, as far as there is a task of them."""
    there = {name: tasks for name, (_, tasks) in PAPER_TABLES.items() if any(t in found for t in tasks)}
    return {PAPER_TABLES[name][0]: paper_rows(name, found) for name in there}


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
