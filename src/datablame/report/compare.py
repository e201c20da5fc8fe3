"""The page of `datablame compare`: one table, and a clustered heat map of agreement per damping."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from datablame import __version__
from datablame.comparing import Agreement, Comparison, Row
from datablame.diagnostics import top_size
from datablame.report.figures import SCALES, plotly_text, script_safe
from datablame.report.html import environment, flat

SHOWN = 50
"""Queries named on the page."""


def write_comparison(comparison: Comparison, path: Path) -> Path:
    """Write the self-contained page and return its path."""
    page = environment().get_template("compare.html.j2").render(context(comparison))
    Path(path).write_bytes(page.encode("utf-8", errors="replace"))
    return Path(path)


def context(comparison: Comparison) -> dict[str, Any]:
    """Everything the template prints."""
    settings = comparison.settings
    return {
        "comparison": comparison,
        "version": __version__,
        "methods": {m: [cells(r) for r in comparison.rows if r.method == m] for m in names(comparison)},
        "headings": headings(len(comparison.train)),
        "top": top_size(len(comparison.train)),
        "shown": SHOWN,
        "dampings": [f"{d:g}" for d in comparison.dampings],
        "map": agreement_map(comparison.agreement),
        "settings": list(flat({a: b for a, b in settings.items() if a != "command"})),
        "command": str(settings.get("command") or ""),
        "plotly": get_plotlyjs(),
    }


def names(comparison: Comparison) -> list[str]:
    """The methods in the order asked for."""
    return list(dict.fromkeys(r.method for r in comparison.rows))


def headings(rows: int) -> list[str]:
    """Of a table over so many training rows."""
    return ["damping", "seconds", "Spearman", f"top {top_size(rows)}", "error", "error scaled", "residual"]


def cells(row: Row) -> list[str]:
    """One row in print, under `headings`; the last cell is why the method failed, or empty. – = no such number."""
    seconds = "–" if row.seconds is None else f"{row.seconds:.3g}"
    rho = "–" if row.spearman is None else f"{row.spearman:.3f}"
    top = "–" if row.top is None else f"{row.top:.0%}"
    errors = ["–" if x is None else f"{x:.2g}" for x in (row.raw, row.scaled, row.residual)]
    return [f"{row.damping:g}", seconds, rho, top, *errors, row.error or ""]


def agreement_map(agreement: list[Agreement]) -> str:
    """Heat maps of Spearman's correlation, one per damping, the first visible: plotly's JSON, safe in a script."""
    figure = go.Figure()
    for i, a in enumerate(agreement):
        labels = [plotly_text(m, 48) for m in a.methods]
        figure.add_heatmap(
            z=np.array(a.spearman, dtype=float).reshape(len(labels), len(labels)),
            customdata=np.array(a.top, dtype=float).reshape(len(labels), len(labels)),
            x=labels,
            y=labels,
            visible=i == 0,
            coloraxis="coloraxis",
            texttemplate="%{z:.2f}",
            hovertemplate="%{y}<br>%{x}<br>Spearman %{z:.3f}<br>shared top rows %{customdata:.0%}<extra></extra>",
        )
    axis = {"type": "category", "ticks": "", "showgrid": False, "zeroline": False, "fixedrange": True}
    axis |= {"automargin": True, "dtick": 1}
    bar = {"thickness": 10, "outlinewidth": 0, "tickvals": [-1, 0, 1], "len": 1, "ticks": ""}
    figure.update_layout(
        template="none",
        height=160 + 30 * max((len(a.methods) for a in agreement), default=1),
        margin={"l": 8, "r": 8, "t": 8, "b": 8},
        xaxis={**axis, "tickangle": 45},
        yaxis={**axis, "autorange": "reversed"},
        coloraxis={"cmin": -1, "cmax": 1, "colorscale": SCALES["light"], "colorbar": bar},
    )
    return script_safe(json.dumps({"figure": json.loads(figure.to_json(engine="json")), "scales": SCALES}))
