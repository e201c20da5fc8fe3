"""The page of `datablame paper show`: sentences, pictures to choose from, tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from datablame import __version__
from datablame.errors import UserError
from datablame.paper import Page
from datablame.report.figures import plotly_text, script_safe
from datablame.report.html import environment, flat


def write_page(page: Page, path: Path) -> Path:
    """Write the self-contained page and return its path."""
    template = environment().get_template("paper.html.j2")
    text = template.render(
        page=page,
        version=__version__,
        settings=list(flat(page.settings)),
        views=script_safe(json.dumps(list(map(escaped, page.views.values())))),
        plotly=get_plotlyjs(),
    )
    try:
        path.write_bytes(text.encode("utf-8", errors="replace"))
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror or e}).") from e
    return path


def escaped(view: dict[str, Any]) -> dict[str, Any]:
    """Names, categories, cells and titles in which plotly finds no tag of its own."""
    data = []
    for trace in view["data"]:
        if trace["type"] == "table":
            values = [[plotly_text(text, 240) for text in column] for column in trace["cells"]["values"]]
            data.append({**trace, "cells": {**trace["cells"], "values": values}})
            continue
        labels: dict[str, Any] = {"name": plotly_text(trace["name"]), "x": list(map(_category, trace["x"]))}
        if trace["type"] == "heatmap":
            labels["y"] = list(map(_category, trace["y"]))
        data.append({**trace, **labels})
    layout = dict(view["layout"])
    if "annotations" in layout:
        layout["annotations"] = [{**a, "text": plotly_text(a["text"])} for a in layout["annotations"]]
    if "title" in layout:
        layout["title"] = {**layout["title"], "text": plotly_text(layout["title"]["text"], 240)}
    return {**view, "data": data, "layout": layout}


def _category(x: object) -> object:
    """A number stays one."""
    return x if isinstance(x, int | float) else plotly_text(x)
