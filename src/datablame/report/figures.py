"""The heat map of queries × training rows, as JSON for plotly.js."""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

from datablame.examples import Example
from datablame.scores import Scores

if TYPE_CHECKING:
    from jaxtyping import Float

CELLS = 100_000
"""More queries × training rows than this, and only the listed rows are drawn."""
ALL_CELLS = 300_000
"""Drawn cells over all methods: 11 to 16 bytes each in the page."""
QUERIES = 200
GROUPS = 40
"""With more labels than this no boundaries are drawn."""
UNLABELLED = "no label"

# Low, middle and high of the colour bar; the middle is the page's background.
SCALES = {
    "light": [[0, "#1f5fa8"], [0.25, "#8db8dd"], [0.5, "#f8f8f6"], [0.75, "#eda98a"], [1, "#ad2a1f"]],
    "dark": [[0, "#7cc0ff"], [0.25, "#2f618f"], [0.5, "#1d2025"], [0.75, "#96492f"], [1, "#ff9a73"]],
}


@dataclass(frozen=True)
class ScoreMap:
    """A drawn heat map: plotly's JSON (safe inside a script element), and what the caption has to say."""

    json: str
    methods: list[str]
    left_out: list[str]
    labelled: bool


def score_map(scores: Scores, k: int, lowest: int) -> ScoreMap:
    """Heat maps of every method, the first one visible; at most `ALL_CELLS` cells."""
    queries, rows, left_out = _drawn(scores, k, lowest)
    queries, rows = _by_label(scores.queries, queries), _by_label(scores.train, rows)
    x, y = _names(scores.train, rows, with_row=True), _names(scores.queries, queries, with_row=False)
    figure = go.Figure()
    for i, method in enumerate(scores.methods):
        v = scores.matrix(method)
        figure.add_heatmap(
            z=normalised(v)[np.ix_(queries, rows)].astype(np.float32),
            customdata=_compact(v[np.ix_(queries, rows)]),
            x=x,
            y=y,
            visible=i == 0,
            coloraxis="coloraxis",
            hovertemplate="query %{y}<br>training row %{x}<br>score %{customdata:.5~g}<extra></extra>",
        )
    groups = _groups(scores.train, rows), _groups(scores.queries, queries)
    _lay_out(figure, len(queries), *groups)
    page = {"figure": json.loads(figure.to_json(engine="json")), "scales": SCALES}
    return ScoreMap(script_safe(json.dumps(page)), scores.methods, left_out, bool(groups[0]))


def normalised(scores: Float[np.ndarray, "m n"]) -> Float[np.ndarray, "m n"]:
    """Per query: centred, then divided by the largest absolute value; 0 where a query's scores are all equal."""
    v = scores / np.maximum(np.abs(scores).max(axis=1, keepdims=True), np.finfo(float).tiny)
    v = v - v.mean(axis=1, keepdims=True)
    largest = np.abs(v).max(axis=1, keepdims=True)
    return np.where(largest > 1e-12, v / np.maximum(largest, 1e-12), 0.0)


def plotly_text(text: object, width: int = 60) -> str:
    """One short line in which plotly finds no tag, entity or placeholder of its own."""
    line = " ".join(str(text).encode("utf-8", errors="replace").decode().split())
    line = line if len(line) <= width else line[: width - 1] + "…"
    return html.escape(line, quote=False).replace("%{", "% {").replace("$", "&#36;")


def script_safe(text: str) -> str:
    """JSON that cannot end the script element around it."""
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _compact(v: Float[np.ndarray, "m n"]) -> Float[np.ndarray, "m n"]:
    """Half the bytes where single precision holds every score."""
    with np.errstate(over="ignore", under="ignore"):
        small = v.astype(np.float32)
    return small if np.allclose(small, v, rtol=1e-6, atol=0) else v


def _drawn(scores: Scores, k: int, lowest: int) -> tuple[list[int], list[int], list[str]]:
    """Positions of the queries and training rows to draw, and sentences on what is left out."""
    m, n, methods = len(scores.queries), len(scores.train), len(scores.methods)
    if m * n <= CELLS and m * n * methods <= ALL_CELLS:
        return list(range(m)), list(range(n)), []
    queries = list(range(min(m, QUERIES)))
    listed: Counter[int] = Counter()
    for method in scores.methods:
        for q in queries:
            order = scores.order(q, method).tolist()
            listed.update(set(order[:k] + order[-lowest:]))
    room = max(1, min(CELLS, ALL_CELLS // methods) // len(queries))
    rows = [t for t, _ in listed.most_common(room)]
    notes = [f"Of {n:,} training rows the map shows {len(rows):,}: rows among the highest or lowest of some query."]
    if len(rows) < len(listed):
        notes.append(f"There are {len(listed):,} such rows; the map takes those that are listed most often.")
    if len(queries) < m:
        notes.append(f"It shows the first {len(queries):,} of {m:,} queries.")
    return queries, rows, notes


def _by_label(examples: Sequence[Example], positions: list[int]) -> list[int]:
    """Sorted by label, rows without one last, then by position."""
    return sorted(positions, key=lambda p: (examples[p].label is None, examples[p].label or "", p))


def _names(examples: Sequence[Example], positions: list[int], with_row: bool) -> list[str]:
    names = []
    for p in positions:
        e = examples[p]
        parts = [plotly_text(e.id, 40 if with_row else 24)]
        parts += [f"row {e.row}"] if with_row else []
        parts += [plotly_text(e.label, 24)] if with_row and e.label is not None else []
        names.append(" · ".join(parts))
    # Plotly lays equal names on top of each other.
    often = Counter(names)
    return [f"{name} #{p}" if often[name] > 1 else name for name, p in zip(names, positions, strict=True)]


def _groups(examples: Sequence[Example], positions: list[int]) -> list[tuple[str, int, int]]:
    """(label, first, last) of each run of equal labels; empty where nothing is labelled or there are too many."""
    if all(examples[p].label is None for p in positions):
        return []
    runs, start = [], 0
    for label, run in groupby(examples[p].label for p in positions):
        size = len(list(run))
        runs.append((UNLABELLED if label is None else label, start, start + size - 1))
        start += size
    return runs if len(runs) <= GROUPS else []


def _lay_out(figure: go.Figure, m: int, columns: list[tuple[str, int, int]], lines: list[tuple[str, int, int]]) -> None:
    cell = max(4.0, min(26.0, 900 / m))
    x: dict[str, Any] = {"type": "category", "ticks": "", "showgrid": False, "zeroline": False, "fixedrange": False}
    if columns:
        middles = [(a + b) / 2 for _, a, b in columns]
        x |= {"tickmode": "array", "tickvals": middles, "ticktext": [plotly_text(g, 24) for g, _, _ in columns]}
        x |= {"automargin": True}
    else:
        x |= {"showticklabels": False, "title": {"text": "training rows, in the order of the file", "standoff": 8}}
    y = {"type": "category", "autorange": "reversed", "ticks": "", "showgrid": False, "zeroline": False}
    y |= {"automargin": True, "fixedrange": True, "showticklabels": m <= 60, "dtick": 1}
    figure.update_layout(
        template="none",
        height=round(m * cell + 70),
        margin={"l": 8, "r": 8, "t": 8, "b": 32},
        xaxis=x,
        yaxis=y,
        shapes=[*map(_across("x"), columns[1:]), *map(_across("y"), lines[1:])],
        coloraxis={
            "cmin": -1,
            "cmax": 1,
            "colorscale": SCALES["light"],
            "colorbar": {"thickness": 10, "outlinewidth": 0, "tickvals": [-1, 0, 1], "len": 1, "ticks": ""},
        },
    )


def _across(axis: str) -> Any:
    """A function from a label group to the line before it."""
    other = "y" if axis == "x" else "x"

    def line(group: tuple[str, int, int]) -> dict[str, Any]:
        at = group[1] - 0.5
        ends = {f"{axis}0": at, f"{axis}1": at, f"{other}0": 0, f"{other}1": 1}
        return {"type": "line", "line": {"width": 1}, f"{axis}ref": axis, f"{other}ref": "paper", **ends}

    return line
