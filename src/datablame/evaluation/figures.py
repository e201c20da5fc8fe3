"""The benchmark's pictures: the ladder, heat maps of scores (Figure 2), the top rows of one query (Figure 1)."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from datablame.evaluation.results import TaskResults
from datablame.evaluation.suites import FIGURE, LADDER, REPSIM_LADDER

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from datablame.evaluation.tasks import Task


def ladder(found: Mapping[str, TaskResults], metric: str = "auroc") -> go.Figure:
    """A line a task over the steps of both ladders: mean, 95 % interval, and every seed as a point."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(
        rows=1, cols=2, shared_yaxes=True, subplot_titles=["gradients", "hidden states and controls"]
    )
    colours = [
        "#1f5fa8",
        "#ad2a1f",
        "#2e7d4f",
        "#8a5a00",
        "#6a3d9a",
        "#00838f",
        "#c2185b",
        "#5d6d00",
        "#444444",
        "#e07b00",
    ]
    for column, steps in ((1, LADDER), (2, REPSIM_LADDER)):
        for (task, results), colour in zip(found.items(), colours * 2, strict=False):
            there = [(name, run) for name, run in steps if run in results.runs]
            means = [results.interval(run, metric) for _, run in there]
            names = [name for name, _ in there]
            bars = {
                "array": [i.high - i.value for i in means],
                "arrayminus": [i.value - i.low for i in means],
                "thickness": 1,
            }
            line = go.Scatter(
                x=names, y=[i.value for i in means], error_y=bars, name=task, legendgroup=task,
                showlegend=column == 1, mode="lines+markers", line={"color": colour},
            )  # fmt: skip
            figure.add_trace(line, row=1, col=column)
            points = [(name, s) for name, run in there for s in results.seeds(run, metric)]
            dots = go.Scatter(
                x=[p[0] for p in points], y=[p[1] for p in points], legendgroup=task, showlegend=False,
                mode="markers", marker={"color": colour, "size": 4, "opacity": 0.5}, hoverinfo="skip",
            )  # fmt: skip
            figure.add_trace(dots, row=1, col=column)
    figure.update_layout(template="plotly_white", height=560, yaxis={"title": metric.upper(), "range": [0, 1.02]})
    return figure


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
    """Figure 1: for one query, the training row that each run of FIGURE ranks first, and whether it is a right one."""
    found = results.results[0]["results"]["reference"]
    out = []
    for run in FIGURE:
        if run in found and "top" in found[run]:
            row = task.train[found[run]["top"][query]]
            right = bool(task.truth[query, found[run]["top"][query]])
            out.append({"run": run, "label": row.label, "prompt": row.prompt, "response": row.response, "right": right})
    return out
