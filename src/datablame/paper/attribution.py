"""Tables 2 to 4 and Figures 1 and 2: the benchmark's cells, drawn as the paper draws them.

A run leaves `NAME.json`, which says of which model, scale and seeds the cells are; they lie in `bench/` beside it, or
where `--cells` says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datablame.errors import UserError
from datablame.indexing import SILENT
from datablame.paper import Cells, Page, Request, Table, experiment
from datablame.paper.panels import bar_marker, panels
from datablame.paper.results import already_there, read, write

TASKS = {
    "table2": ("mixed-small", "mixed-large", "mixed-hard"),
    "table3": ("harmfulcheck", "grammars", "mathqa"),
    "table4": ("backdoor-1", "backdoor-3", "backdoor-5"),
    "figure1": ("grammars",),
    "figure2": ("mixed-small", "grammars", "backdoor-3"),
}
SMOKE = {
    "table2": ("mixed-small",),
    "table3": ("grammars",),
    "table4": ("backdoor-1",),
    "figure2": ("mixed-small", "grammars", "backdoor-1"),
}
"""At smoke scale: the benchmark's smoke tasks."""


def cells(request: Request) -> Cells:
    """Every run of the suites on the tasks; what takes no `--seeds` is drawn from one."""
    from datablame.evaluation.bench import SEEDS

    several = "seeds" in experiment(request.name).options
    seeds = (request.seeds or SEEDS[request.scale]) if several else [request.seed]
    return Cells(tasks_of(request.name, request.scale), seeds)


def tasks_of(name: str, scale: str) -> tuple[str, ...]:
    """Which tasks are drawn."""
    return SMOKE.get(name, TASKS[name]) if scale == "smoke" else TASKS[name]


def run(request: Request) -> Path:
    """Every cell that has no result yet. Raises UserError where the file is of other cells: it is not overwritten."""
    from datablame.evaluation.bench import bench
    from datablame.evaluation.results import joined, load_results

    wanted, path = cells(request), request.out / experiment(request.name).result
    model = Path(request.model).name if Path(request.model).exists() else request.model
    this = {"model": model, "scale": request.scale, "seeds": sorted(wanted.seeds)}
    already_there(path, this, SILENT)  # the same run goes on: its cells may not be whole
    bench(
        request.model,
        request.bench,
        scale=request.scale,
        tasks=wanted.tasks,
        seeds=wanted.seeds,
        device=request.device,
        strict=False,
        with_costly=False,
        reporter=request.reporter,
    )
    joined(load_results(request.bench, request.model, request.scale), wanted.tasks, wanted.seeds)
    return write(path, {"experiment": request.name, **this, "command": request.command})


def show(out: Path, name: str, cells_in: Path | None = None) -> Page:
    """Tables and a picture. cells_in: where the cells are, if not in `out/bench`."""
    from datablame.evaluation.results import load_results

    r = read(out / experiment(name).result)
    every = load_results(cells_in or out / "bench", r["model"], r["scale"])
    found = {task: every[task].of_seeds(r.get("seeds")) for task in tasks_of(name, r["scale"]) if task in every}
    facts = [("model", r["model"]), ("scale", r["scale"]), ("tasks", ", ".join(found))]
    page = {"figure1": _top_rows, "figure2": _heat_maps}.get(name, _table)(name, found)
    title = f"{name[:-1].capitalize()} {name[-1]}: {experiment(name).shows}"
    left_out = [note for results in every.values() for note in results.left_out]
    notes = [*page["notes"], *(note for note in left_out if note.partition(":")[0] in TASKS[name])]
    return Page(title, facts, notes, page["tables"], page["views"], str(r["command"]), r)


def _table(name: str, found: dict[str, Any]) -> dict[str, Any]:
    from datablame.evaluation.tables import paper_rows

    header, *rows = paper_rows(name, found)
    data = []
    for k, (task, results) in enumerate(found.items()):
        means = [results.interval(run, "accuracy") for run in results.runs]
        fixed = [results.fixed(run) for run in results.runs]
        spans = [
            (0.0, 0.0) if one else (i.high - i.value, i.value - i.low) for one, i in zip(fixed, means, strict=True)
        ]
        up, down = zip(*spans, strict=True) if spans else ((), ())
        ends = {"type": "data", "symmetric": False, "array": list(up), "arrayminus": list(down)}
        error = {**ends, "thickness": 1, "width": 2}
        bars = {"x": results.runs, "y": [i.value for i in means], "error_y": error}
        data.append({"type": "bar", "name": task, **bars, "marker": bar_marker(k)})
    layout = {"barmode": "group", "yaxis": {"title": {"text": "top-1 accuracy"}, "rangemode": "tozero"}}
    notes = [
        "See: whether a method on gradients is better than RepSim (R+) and than words (B+), and than what the row's "
        "length and the norm of its gradient find without looking at the query; and where the label shows.",
        "Top-1 accuracy with its 95 % interval / coverage, in percent; chance in the last row.",
        "R and B: better (+), worse (−) or not significantly different (=) from the paper's RepSim and from BM25, at "
        "5 % after Holm's correction over the table. ≡: one ranking for all queries, which are of one class, under "
        "every seed; neither interval nor test. The paper's numbers are of Llama-2-7B-chat, on other rows.",
        "The first lines say on which side a task's label shows, what words alone find, and what the length of a row "
        "and the norm of its gradient find, whatever the query.",
    ]
    plain = [[cell.replace("`", "") for cell in row] for row in rows]
    return {
        "notes": notes,
        "tables": [Table(experiment(name).shows, header, plain)],
        "views": {"accuracy": {"data": data, "layout": layout}},
    }


def _top_rows(name: str, found: dict[str, Any]) -> dict[str, Any]:
    from datablame.evaluation.figures import top_table

    tables, views = [], {}
    for task, results in found.items():
        drawn = top_table(results)
        if drawn is None:
            raise UserError(
                f"{name}: the rows of {task} cannot be made again (another version of the task, or files of your own). "
                f"Run `datablame paper run {name}` into another directory."
            )
        title, (headings, *rows) = drawn
        tables.append(Table(title, headings, rows))
        views[task] = _drawn(title, headings, rows)
    return {
        "notes": [
            "The training row that each method ranks first, for the first query.",
            "See: whether what a method names is of the query's class, and whether the base model and words name it, "
            "too. One query: an example, and no evidence.",
        ],
        "tables": tables,
        "views": views,
    }


def _drawn(title: str, headings: list[str], rows: list[list[str]]) -> dict[str, Any]:
    """A table as a picture."""
    right = ["#e3f2ec" if row[2] == "right" else "#fbe9dd" for row in rows]
    shape = {"align": "left", "font": {"size": 12}}
    trace: dict[str, Any] = {"type": "table", "columnwidth": [7, 2.4, 1.1, 9]}
    trace["header"] = {**shape, "values": headings}
    trace["cells"] = {
        **shape,
        "values": [list(column) for column in zip(*rows, strict=True)],
        "fill": {"color": [right] * len(headings)},
        "height": 24,
    }
    heading = {"text": title, "font": {"size": 13}}
    return {"data": [trace], "layout": {"title": heading, "height": 140 + 52 * len(rows), "margin": {"t": 60}}}


def _heat_maps(name: str, found: dict[str, Any]) -> dict[str, Any]:
    from datablame.evaluation.figures import matrices

    x = {"title": {"text": "training row, by class"}, "showticklabels": False, "type": "category"}
    y = {"title": {"text": "query, by class"}, "autorange": "reversed", "showticklabels": False, "type": "category"}
    views = {}
    for task, results in found.items():
        drawn = {}
        for run, (z, rows, columns) in matrices(results).items():
            drawn[run] = {"type": "heatmap", "name": run, "x": columns, "y": rows, "z": z.round(2).tolist()}
        every = {run: [{**trace, "showscale": False, "colorscale": "Viridis"}] for run, trace in drawn.items()}
        together = panels(every, x, y)
        together["data"] = [{**trace, "showlegend": False} for trace in together["data"]]
        views[f"{task}: all"] = together
        views |= {f"{task}: {run}": {"data": [t], "layout": {"xaxis": x, "yaxis": y}} for run, t in drawn.items()}
    notes = [
        "Queries × training rows, both sorted by class; each query's scores from its lowest (0) to its highest (1).",
        "See: bright blocks along the diagonal are rows of the query's class; a bright column from top to bottom is a "
        "row that a method names whatever is asked.",
    ]
    return {"notes": notes, "tables": [], "views": views}
