"""Pictures of several panels, one a task: curves with intervals, and levels to hold them against.

What a line is shows in its mark and its dashes too, so that a print without colour can be read. The colours are those
of Okabe and Ito, which the colour-blind tell apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

View = dict[str, Any]
Trace = dict[str, Any]

COLOURS = {
    "blue": "#0072b2",
    "vermillion": "#d55e00",
    "green": "#009e73",
    "orange": "#e69f00",
    "sky": "#56b4e9",
    "purple": "#cc79a7",
    "grey": "#8c8c8c",
    "black": "#000000",
}


HATCHES = ("", "/", "x", ".", "\\", "-", "+")
"""Of bars, in order, so that they are told apart in grey too."""


def bar_marker(k: int) -> dict[str, Any]:
    """Colour and hatching of the k-th kind of bar."""
    colours = list(COLOURS.values())
    return {"color": colours[k % len(colours)], "pattern": {"shape": HATCHES[k % len(HATCHES)], "solidity": 0.25}}


@dataclass(frozen=True)
class Style:
    """How a line looks. colour: of COLOURS; mark, dash: plotly's symbol and dash."""

    name: str
    colour: str
    dash: str = "solid"
    mark: str = "circle"


def curve(style: Style, x: Sequence[float] | Sequence[str], points: Sequence[Mapping[str, Any]]) -> Trace:
    """Marks joined by lines; points: `{"value"}` each, with an `interval95` of their own or without."""
    trace: Trace = {"type": "scatter", "mode": "lines+markers", "name": style.name, "x": list(x)}
    trace |= {"y": [p["value"] for p in points], "line": {"dash": style.dash}}
    trace["marker"] = {"symbol": style.mark, "size": 8, "color": COLOURS[style.colour]}
    spans = [p.get("interval95") or [p["value"]] * 2 for p in points]
    if any(low < high for low, high in spans):
        bars = zip(spans, points, strict=True)
        up, down = zip(*((high - p["value"], p["value"] - low) for (low, high), p in bars), strict=True)
        ends = {"type": "data", "symmetric": False, "array": list(up), "arrayminus": list(down)}
        trace["error_y"] = {**ends, "thickness": 1, "width": 2}
    return trace


def beside(k: int, count: int, span: float) -> float:
    """How far the k-th of `count` lines stands from the place that all share, so that their bars can be told apart."""
    return span * ((k + 0.5) / count - 0.5)


def level(style: Style, value: float, ends: Sequence[float]) -> Trace:
    """A line across the panel, from one end to the other."""
    trace: Trace = {"type": "scatter", "mode": "lines", "name": style.name, "x": list(ends), "y": [value] * 2}
    return trace | {"line": {"dash": style.dash, "width": 1.5}, "marker": {"color": COLOURS[style.colour]}}


def panels(drawn: Mapping[str, Sequence[Trace]], x: Mapping[str, Any], y: Mapping[str, Any]) -> View:
    """A view with a panel for each `{title: traces}`, two in a row; x, y: plotly's axes. One legend for all."""
    rows, seen, data = (len(drawn) + 1) // 2, set[str](), []
    layout: dict[str, Any] = {"height": 140 + 330 * rows, "annotations": []}
    layout["grid"] = {"rows": rows, "columns": min(len(drawn), 2), "pattern": "independent", "ygap": 0.3, "xgap": 0.15}
    layout |= {"legend": {"y": -0.2 / rows, "yanchor": "top"}, "margin": {"t": 32}}
    for k, (title, traces) in enumerate(drawn.items()):
        number = str(k + 1) if k else ""
        for t in traces:
            axes = {"xaxis": f"x{number}", "yaxis": f"y{number}", "legendgroup": t["name"]}
            data.append({**t, **axes, "showlegend": t["name"] not in seen})
            seen.add(t["name"])
        layout |= {f"xaxis{number}": dict(x), f"yaxis{number}": dict(y)}
        place = {"xref": f"x{number} domain", "yref": f"y{number} domain", "x": 0, "y": 1.01, "showarrow": False}
        layout["annotations"].append({"text": title, **place, "xanchor": "left", "yanchor": "bottom"})
    return {"data": data, "layout": layout}


def share(title: str) -> dict[str, Any]:
    """The axis of a metric between 0 and 1."""
    return {"title": {"text": title}, "range": [-0.03, 1.05]}
