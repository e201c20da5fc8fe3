"""Figure 3: the errors of Table 5's run, over points and parameters, against every reference, raw and scaled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datablame.paper import Page, Request, Table, table5
from datablame.paper.panels import bar_marker
from datablame.paper.results import read

KINDS = {"scaled": "after the best factor", "raw": "raw"}


def run(request: Request) -> Path:
    """The run of Table 5."""
    return table5.run(request)


def show(out: Path, name: str) -> Page:
    """Errors with intervals against each reference."""
    from datablame.paper.linear import REFERENCES

    r = read(out / table5.RESULT)
    headings = ["method", *(table5.NAMES[x] for x in REFERENCES), "ρ", "paper"]
    tables = [
        Table(table5.title(s), headings, [_row(s, name, REFERENCES) for name in s["methods"]]) for s in r["settings"]
    ]
    shares = [f"{s['layer']['largest_share']['mean']:.0%} at {table5.title(s)}" for s in r["settings"]]
    return Page(
        "Figure 3: how far is each method from which truth?",
        table5.facts(r),
        [
            "Errors after the best factor, ± half of the 95 % interval over subsets of points; 1 = no better than "
            "scores of 0. ρ: Spearman's correlation with the exact solution over points, averaged over queries. paper: "
            f"its error, {table5.PAPER['error']}.",
            "exact: the damped empirical Fisher solution. Hessian: the true one, damped alike. objective: "
            "the Hessian of loss and weight decay, no damping. left out: the layer fitted again without the point (the "
            f"first {max(s['refits'] for s in r['settings'])} points at most).",
            f"Share of the largest eigenvalue of the gradients' Gram matrix: {'; '.join(shares)}.",
        ],
        tables,
        {f"against {table5.NAMES[x]}, {words}": _view(r, x, kind) for x in REFERENCES for kind, words in KINDS.items()},
        str(r.get("command", "")),
        r["run"],
    )


def _row(s: dict[str, Any], name: str, references: tuple[str, ...]) -> list[str]:
    errors = s["methods"][name]["errors"]
    cells = [spread(errors[x]["scaled"]) if x in errors else "–" for x in references]
    rho = table5.mean(errors["fisher"]["spearman"], ".2f") if "fisher" in errors else "–"
    return [
        table5.NAMES.get(name, name),
        *cells,
        rho,
        table5.number(table5.of_paper(s, "error", name), ".3f"),
    ]


def spread(x: dict[str, Any]) -> str:
    """Mean ± half of the interval."""
    half = "" if x["interval95"] is None else f" ±{(x['interval95'][1] - x['interval95'][0]) / 2:.2f}"
    return f"{x['mean']:.2f}{half}"


def _view(r: dict[str, Any], reference: str, kind: str) -> dict[str, Any]:
    """Bars: the error by method and setting, with intervals."""
    data = []
    for k, s in enumerate(r["settings"]):
        errors = {n: m["errors"].get(reference, {}).get(kind) for n, m in s["methods"].items()}
        known = {n: e for n, e in errors.items() if e is not None}
        names = [table5.NAMES.get(n, n) for n in known]
        bars = {"type": "bar", "name": table5.title(s), "x": names, "marker": bar_marker(k)}
        y = [e["mean"] for e in known.values()]
        half = [0 if e["interval95"] is None else e["interval95"][1] - e["mean"] for e in known.values()]
        data.append({**bars, "y": y, "error_y": {"type": "data", "array": half, "thickness": 1, "width": 2}})
    scale = "log" if kind == "raw" else "linear"
    axis = {"type": scale, "title": {"text": f"error, {KINDS[kind]}"}, "rangemode": "tozero"}
    return {"data": data, "layout": {"barmode": "group", "yaxis": axis}}
