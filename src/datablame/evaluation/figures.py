"""The benchmark's pictures: the ladder, heat maps of scores (Figure 2), the top rows of one query (Figure 1)."""

from __future__ import annotations

import base64
import itertools
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from datablame.evaluation.results import TaskResults, rebuilt
from datablame.evaluation.suites import FAMILIES, FIGURE, FIRST, LADDER, REPSIM_LADDER

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from datablame.evaluation.tasks import Task


COLOURS = (
    "#1f5fa8", "#ad2a1f", "#2e7d4f", "#8a5a00", "#6a3d9a", "#00838f", "#c2185b", "#5d6d00", "#444444", "#e07b00",
    "#7a4b3a", "#3b7dd8",
)  # fmt: skip


def ladder(found: Mapping[str, TaskResults], metric: str = "auroc") -> go.Figure:
    """The steps of both ladders: a kind of task a row of panels, a task a line: mean, 95 % interval, seeds as points.

    Tasks stand beside each other within a step, so that intervals and seeds do not hide behind each other.
    """
    from plotly.subplots import make_subplots

    kinds = {kind: [t for t in tasks if t in found] for kind, tasks in FAMILIES.items()}
    kinds["other"] = [t for t in found if not any(t in tasks for tasks in kinds.values())]
    kinds = {kind: tasks for kind, tasks in kinds.items() if tasks}
    figure = make_subplots(
        rows=len(kinds), cols=2, shared_yaxes=True, shared_xaxes="columns", row_titles=list(kinds),
        column_titles=["gradients", "hidden states and controls"], vertical_spacing=0.03, horizontal_spacing=0.04,
    )  # fmt: skip
    colours = dict(zip(found, itertools.cycle(COLOURS), strict=False))
    for row, tasks in enumerate(kinds.values(), 1):
        for column, steps in ((1, LADDER), (2, REPSIM_LADDER)):
            for k, task in enumerate(tasks):
                beside = 0.6 * ((k + 0.5) / len(tasks) - 0.5)
                line, seeds = _line(found[task], steps, metric, beside, colours[task])
                line.showlegend = column == 1
                figure.add_traces([line, seeds], rows=row, cols=column)
            names = [_broken(name) for name, _ in steps]
            figure.update_xaxes(
                tickvals=list(range(len(steps))), ticktext=names, tickangle=45, row=len(kinds), col=column
            )
        figure.update_yaxes(title=metric.upper(), row=row, col=1)
    figure.update_yaxes(range=[0, 1.03])
    figure.add_hline(y=0.5, line={"dash": "dot", "color": "#888888", "width": 1})
    figure.update_layout(template="plotly_white", height=240 + 160 * len(kinds))
    return figure


def _line(
    results: TaskResults, steps: Sequence[tuple[str, str]], metric: str, beside: float, colour: str
) -> tuple[go.Scatter, go.Scatter]:
    """One task over the steps of a ladder that it has, and its seeds. beside: how far right of each step."""
    import plotly.graph_objects as go

    there = [i for i, (_, run) in enumerate(steps) if run in results.runs]
    means = [results.interval(steps[i][1], metric) for i in there]
    free = [not results.fixed(steps[i][1]) for i in there]  # one ranking for all queries has no interval
    bars = {
        "array": [f * (m.high - m.value) for f, m in zip(free, means, strict=True)],
        "arrayminus": [f * (m.value - m.low) for f, m in zip(free, means, strict=True)],
        "thickness": 1,
    }
    line = go.Scatter(
        x=[i + beside for i in there], y=[m.value for m in means], error_y=bars, name=results.heading,
        text=[steps[i][0] for i in there], hovertemplate="%{text}: %{y:.2f}", mode="lines+markers",
        line={"color": colour, "width": 1}, marker={"color": colour}, legendgroup=results.task,
    )  # fmt: skip
    points = [(i + beside, s) for i in there for s in results.seeds(steps[i][1], metric)]
    seeds = go.Scatter(
        x=[p[0] for p in points], y=[p[1] for p in points], name=f"{results.task}, seeds", mode="markers",
        showlegend=False, hoverinfo="skip", legendgroup=results.task,
        marker={"color": colour, "size": 8, "symbol": "circle-open"},
    )  # fmt: skip
    return line, seeds


def _broken(name: str, width: int = 24) -> str:
    """In lines of a tick's width."""
    return "<br>".join(textwrap.wrap(name, width))


def matrices(results: TaskResults) -> dict[str, tuple[np.ndarray[Any, Any], list[str], list[str]]]:
    """`{run: (scores, names of queries, names of training rows)}` of the first seed, both sorted by class.

    Scores run from 0 at each query's lowest to 1 at its highest.
    """
    result = results.results[0]
    found = result["results"]["reference"]
    m, n = len(result["queries"]), result["rows"]
    rows = sorted(range(m), key=lambda j: (str(result["queries"][j]["label"]), j))
    columns = sorted(range(n), key=lambda i: (str(result["labels"][i]), i))
    queries = [f"{result['queries'][j]['label']} · {result['queries'][j]['id']}" for j in rows]
    training = [f"{result['labels'][i]} · {i}" for i in columns]
    out = {}
    for run in (r for r in FIGURE if "heat" in found.get(r, {})):
        z = np.frombuffer(base64.b64decode(found[run]["heat"]), dtype=np.uint8).reshape(m, n)
        out[run] = (z[np.ix_(rows, columns)] / 255, queries, training)
    return out


def heat_maps(results: TaskResults) -> go.Figure | None:
    """Figure 2: queries × training rows, one map a run."""
    from plotly.subplots import make_subplots

    drawn = matrices(results)
    if not drawn:
        return None
    runs = list(drawn)
    figure = make_subplots(rows=len(runs), cols=1, subplot_titles=runs, vertical_spacing=0.25 / len(runs))
    for k, (z, _, _) in enumerate(drawn.values(), 1):
        figure.add_heatmap(z=z, coloraxis="coloraxis", row=k, col=1)
    figure.update_layout(
        template="plotly_white", height=220 * len(runs) + 80, coloraxis={"colorscale": "Viridis", "cmin": 0, "cmax": 1}
    )
    figure.update_yaxes(autorange="reversed", title="query")
    figure.update_xaxes(title="training row, by class", row=len(runs), col=1)
    return figure


def top_rows(results: TaskResults, task: Task, query: int = 0) -> list[dict[str, Any]]:
    """Figure 1: for one query, the training row that each run of FIRST ranks first, and whether it is a right one."""
    found = results.results[0]["results"]["reference"]
    out = []
    for run in FIRST:
        if run in found and "top" in found[run]:
            row = task.train[found[run]["top"][query]]
            right = bool(task.truth[query, found[run]["top"][query]])
            out.append({"run": run, "label": row.label, "prompt": row.prompt, "response": row.response, "right": right})
    return out


def top_table(results: TaskResults) -> tuple[str, list[list[str]]] | None:
    """Figure 1 of the first query of the first seed: its title, and a table with its heading first.

    None where the rows cannot be made again, so that no row stands in for another.
    """
    task = rebuilt(results.results[0])
    if task is None:
        return None
    query = task.queries[0]
    rows = [
        [t["run"], str(t["label"]), "right" if t["right"] else "wrong", f"{t['prompt']} → {t['response']}"]
        for t in top_rows(results, task)
    ]
    title = f"{results.task}, class {query.label}: {query.prompt} → {query.response}"
    return title, [["run", "class of the top row", "", "top row"], *rows]
