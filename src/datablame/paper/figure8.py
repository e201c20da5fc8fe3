"""Figure 8: does it matter how many layers are trained, or which? Accuracy of every method, a fine-tune each.

The paper says that influence functions stay poor whatever the number of trainable layers and wherever four of them are.
It does not say which layers make up a number. Here they are spread evenly over the depth (the middles of k equal
parts), so that the number says nothing of the place; the four of the second question are consecutive.

Each choice is a cell of the benchmark whose LoRA is in those blocks alone; all layers together are the usual cell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datablame.paper import Cells, Page, Request, Table, experiment
from datablame.paper.panels import COLOURS, Style, Trace, beside, curve
from datablame.paper.results import already_there, point, read, too_few, with_half, write

if TYPE_CHECKING:
    from datablame.evaluation.results import TaskResults

TASK = "grammars"
NUMBERS = (1, 2, 4, 8, 16)
"""And all."""
SMOKE_NUMBERS = (1,)
FOUR = 4
QUESTIONS = {"number": "how many layers are trained", "place": "which four layers are trained"}
METRICS = {"accuracy": "top-1 accuracy", "auroc": "AUROC"}
METHODS = {
    "as released": {
        "GradSim": "graddot@padded",
        "cosine": "gradcos@padded",
        "DataInf": "datainf:damping=0.1@padded",
        "LiSSA": "lissa:protocol=paper,steps=10,damping=0.1@padded",
        "exact": "exact-block:damping=0.1@padded",
        "exact, damped": "exact-block:damping=1.0,unit=rank@padded",
        "RepSim": "repsim:layer=last,text=prompt",
    },
    "response": {
        "GradSim": "graddot@response",
        "cosine": "gradcos@response",
        "DataInf": "datainf:damping=0.1@response",
        "LiSSA": "lissa:steps=10,damping=0.1@response",
        "exact": "exact-block:damping=0.1@response",
        "exact, damped": "exact-block:damping=1.0,unit=rank@response",
        "RepSim": "repsim:layer=middle,text=response",
    },
}
"""The released loss, with the released LiSSA, and the sound one; RepSim sees no loss. The release has neither a cosine
nor an exact solution: those are ours, by block, with the paper's λ and (damped) with one as large as the curvature."""
CONTROLS = {"RepSim, base model": "repsim-base:layer=middle,text=response", "BM25": "bm25:text=both"}
"""They look at no trained layer, and so are the same in every cell."""
RUNS = (*(run for found in METHODS.values() for run in found.values()), *CONTROLS.values())
PAPER = (
    "despite adjusting the size and location of trainable parameters by fine-tuning specific layers, the performance "
    "of influence functions remains poor, showing no significant improvement"
)
"""What the paper's text says of its figure, whose numbers did not survive; Llama-2-7B-chat, other rows."""


def cells(request: Request) -> Cells:
    """All layers: the cell that other tables have too."""
    return Cells([TASK], [request.seed], RUNS)


def spread(k: int, depth: int) -> list[int]:
    """k of `depth` layers: the middles of k equal parts."""
    return [int((i + 0.5) * depth / k) for i in range(k)]


def fours(depth: int) -> list[list[int]]:
    """Four consecutive layers from the first to the last, which may overlap; none where there are no more than four."""
    if depth <= FOUR:
        return []
    starts = [*range(0, depth - FOUR, FOUR), depth - FOUR]
    return [list(range(s, s + FOUR)) for s in starts]


def choices(scale: str, depth: int) -> list[tuple[str, str, list[int] | None]]:
    """(question, label, layers) of every fine-tune; None: all layers. Smoke: one of each."""
    smoke = scale == "smoke"
    numbers = [k for k in (SMOKE_NUMBERS if smoke else NUMBERS) if k < depth]
    places = fours(depth)
    places = places[:1] if smoke else places
    return [
        *(("number", str(k), spread(k, depth)) for k in numbers),
        ("number", f"all {depth}", None),
        *(("place", f"{p[0]}–{p[-1]}", p) for p in places),
    ]


def run(request: Request) -> Path:
    """Every cell that has no result yet, then the numbers of the figure; a run that is already there is kept."""
    from datablame.evaluation.bench import bench
    from datablame.evaluation.finetunes import base_sha256
    from datablame.models import ModelSpec, load

    path = request.out / experiment(request.name).result
    loaded = load(ModelSpec(request.model, None, request.device))
    chosen = choices(request.scale, int(loaded.model.config.get_text_config().num_hidden_layers))
    this = {"scale": request.scale, "seed": request.seed, "model": Path(request.model).name}
    this |= {"model_sha256": base_sha256(loaded), "protocol": protocol(request.scale, request.seed, chosen)}
    if already_there(path, this, request.reporter):
        return path
    sizes = sizes_of(loaded.model, request.scale, request.seed)
    del loaded
    spelt = [None if layers is None else ",".join(map(str, layers)) for _, _, layers in chosen]
    given = {"scale": request.scale, "tasks": [TASK], "seeds": [request.seed], "methods": ",".join(RUNS)}
    paths = bench(
        request.model,
        request.bench,
        layers=spelt,
        device=request.device,
        strict=False,
        reporter=request.reporter,
        **given,  # type: ignore[arg-type]
    )
    by_layers = dict(zip(dict.fromkeys(spelt), paths, strict=True))
    found = [results_at(by_layers[s]) for s in spelt]
    return write(path, {"run": this, "command": request.command, "paper": PAPER, **summary(chosen, found, sizes)})


def protocol(scale: str, seed: int, chosen: Sequence[tuple[str, str, list[int] | None]]) -> dict[str, Any]:
    """Every choice of the measurement, for the file."""
    from datablame.evaluation.tasks import build
    from datablame.tuning import decisive

    task = build(TASK, scale, seed)
    return {
        "task": f"{TASK}, version {task.version}",
        "fine-tune": decisive(task.recipe),
        "layers": {f"{q}: {label}": "all" if layers is None else layers for q, label, layers in chosen},
        "number": "k layers are the middles of k equal parts of the depth",
        "runs": list(RUNS),
        "intervals": "95 %, bootstrap over queries; one fine-tune each",
        "tests": "every choice of layers against all of them, of the same method on the same queries; sign flips, "
        "two-sided; p_holm: Holm's correction over all tests of the figure",
        "left out": "a fine-tune that has not learnt the task is shown, marked, and in no test; failed runs are told",
    }


def sizes_of(model: Any, scale: str, seed: int) -> list[int]:
    """Trainable weights that the recipe's LoRA puts into each layer: rank × (inputs + outputs) of every target."""
    from datablame.evaluation.tasks import build

    recipe = build(TASK, scale, seed).recipe
    targets = {t.strip() for t in recipe.targets.split(",")}
    sizes = [0] * int(model.config.get_text_config().num_hidden_layers)
    for name, module in model.named_modules():
        numbers = [int(part) for part in name.split(".") if part.isdecimal()]
        if numbers and name.rsplit(".", 1)[-1] in targets:
            outputs, inputs = module.weight.shape
            sizes[numbers[0]] += recipe.rank * (inputs + outputs)
    return sizes


def results_at(path: Path) -> TaskResults:
    """The one result in a cell's file. Raises UserError where another process has not finished it."""
    from datablame.errors import UserError
    from datablame.evaluation.result_files import read_result
    from datablame.evaluation.results import TaskResults

    result = read_result(path)
    if result is None:
        raise UserError(f"{path}: another process is at this cell. Run the same command again when it is done.")
    return TaskResults(TASK, "sound", [result])


# ---------------------------------------------------------------- numbers


def summary(
    chosen: Sequence[tuple[str, str, list[int] | None]], found: Sequence[TaskResults], sizes: Sequence[int]
) -> dict[str, Any]:
    """Intervals of every run in every cell, and the tests, for the file."""
    told = []
    for (question, label, layers), results in zip(chosen, found, strict=True):
        there = [run for run in RUNS if run in results.runs]
        spans = results.intervals([(run, m) for run in there for m in METRICS])
        weights = sum(sizes if layers is None else (sizes[k] for k in layers))
        cell: dict[str, Any] = {"question": question, "label": label, "layers": layers, "parameters": weights}
        cell |= {"learnt": results.learnt, "share": results.results[0]["learnt"]["behaves"]}
        cell["runs"] = {run: {m: point(spans[run, m], fixed=results.fixed(run)) for m in METRICS} for run in there}
        cell["failed"] = {run: why for run, why in results.failed.items() if run in RUNS}
        told.append(cell)
    first = found[0]
    about = {"task": TASK, "depth": len(sizes), "queries": int(first.values(CONTROLS["BM25"], "auroc").size)}
    about["shows"] = first.results[0]["leak"]["shows"]
    about["chance"] = {m: first.chance(m) for m in METRICS}
    seconds = sum({id(r): r.results[0]["seconds"]["all"] for r in found}.values())
    return {**about, "cells": told, "tests": tests(chosen, found), "seconds": round(seconds, 1)}


def tests(chosen: Sequence[Any], found: Sequence[TaskResults]) -> list[dict[str, Any]]:
    """Every choice of layers against all of them, for every method that both have; both must be learnt."""
    from datablame.evaluation.intervals import TABLE_DRAWS, flip_test
    from datablame.evaluation.results import Tested, corrected, together

    every = next(r for (_, _, layers), r in zip(chosen, found, strict=True) if layers is None)
    tested = {}
    for (question, label, layers), some in zip(chosen, found, strict=True):
        if layers is None or not (some.learnt and every.learnt):
            continue
        for run in (r for r in RUNS if r not in CONTROLS.values()):
            if run in some.runs and run in every.runs:
                alike = some.one_ranking(run) or every.one_ranking(run)
                for m in METRICS:
                    d = some.values(run, m) - every.values(run, m)
                    d = together(d, every.labels()) if alike else d
                    p = float(flip_test(d, draws=TABLE_DRAWS)[0])
                    tested[question, label, run, m] = Tested(float(d.mean()), p)
    holm = corrected(tested)
    names = ("question", "label", "run", "metric")
    return [
        dict(zip(names, key, strict=True)) | {"value": round(t.value, 6), "p": t.p, "p_holm": holm[key].p}
        for key, t in tested.items()
    ]


# ---------------------------------------------------------------- what is told


def show(out: Path, name: str) -> Page:
    """Pictures, a table for each question, loss and metric, and what they say."""
    r = read(out / experiment(name).result)
    facts = [("Model", r["run"]["model"]), ("Scale", r["run"]["scale"]), ("Seed", str(r["run"]["seed"]))]
    facts += [("Task", r["task"]), ("Queries", str(r["queries"])), ("Machine", r["machine"])]
    poor = [c for c in r["cells"] if not c["learnt"]]
    notes = [
        *NOTES,
        *too_few({r["task"]: r}),
        f"The paper: {PAPER}.",
        *(f"{c['question']} {c['label']}: not learnt ({c['share']['tuned']:.0%} of the answers)." for c in poor),
        *(f"{c['label']}: {run} failed: {why}" for c in r["cells"] for run, why in c["failed"].items()),
    ]
    title = "Figure 8: does it matter how many layers are trained, or which?"
    return Page(title, facts, notes, tables(r), views(r), str(r["command"]), r["run"])


NOTES = (
    "See: whether any line of a gradient method climbs towards RepSim as more layers are trained, or depends on where "
    "the four are, and whether the same methods do so on the response's loss. Bars: 95 % intervals over queries; "
    "lines stand a little beside each other.",
    "Number: so many layers, spread evenly over the depth (our choice; the paper does not say which it took). Place: "
    "four consecutive ones. Every point is a fine-tune of its own, of one seed.",
    "as released: the paper's loss, 128 tokens of which all are labelled. response: the loss that was trained. RepSim "
    "on the base model and BM25 see no trained layer: the same in every cell, drawn as levels. RepSim in the middle "
    "layer is that of the base model, too, where only later layers are trained.",
    "* significantly different from all layers together, at 5 % after Holm's correction over the figure, a test over "
    "queries. Where either was not learnt there is no test. learnt: share of the queries' answers that are what their "
    "class asks for.",
)


def tables(r: Mapping[str, Any]) -> list[Table]:
    """A method a row, a fine-tune a column."""
    out = []
    for question, words in QUESTIONS.items():
        some = [c for c in r["cells"] if c["question"] == question]
        for protocol, methods in METHODS.items() if len(some) > 1 else ():
            for m, metric in METRICS.items():
                heads = ["method", *(f"{c['label']}{'' if c['learnt'] else ' (not learnt)'}" for c in some)]
                named = {**methods, **CONTROLS}
                rows = [[n, *(_cell(c, run, m, differs(r, c, run, m)) for c in some)] for n, run in named.items()]
                rows += [["learnt", *(f"{c['share']['tuned']:.0%}" for c in some)]]
                rows += [["trained weights", *(f"{c['parameters']:,}" for c in some)]]
                title = f"{metric} by {words}, {protocol} (chance {r['chance'][m]:.2f})"
                out.append(Table(title, heads, rows))
    return out


def _cell(c: Mapping[str, Any], run: str, metric: str, differs: bool) -> str:
    return with_half(c["runs"][run][metric]) + "*" * differs if run in c["runs"] else "–"


def differs(r: Mapping[str, Any], cell: Mapping[str, Any], run: str, metric: str) -> bool:
    """Is it significantly different from all layers together?"""
    key = (cell["question"], cell["label"], run, metric)
    names = ("question", "label", "run", "metric")
    return any(tuple(t[n] for n in names) == key and t["p_holm"] < 0.05 for t in r["tests"])


STYLES = {
    "GradSim": Style("GradSim", "vermillion", "solid", "circle"),
    "cosine": Style("cosine", "blue", "dash", "square"),
    "DataInf": Style("DataInf", "orange", "dot", "diamond"),
    "LiSSA": Style("LiSSA", "sky", "dashdot", "triangle-up"),
    "exact": Style("exact", "purple", "longdash", "triangle-down"),
    "exact, damped": Style("exact, damped", "purple", "solid", "star"),
    "RepSim": Style("RepSim", "green", "solid", "x"),
}


def views(r: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A picture for each question, loss and metric: lines with intervals, controls as levels."""
    drawn = {}
    for question, words in QUESTIONS.items():
        some = [c for c in r["cells"] if c["question"] == question]
        x = list(range(len(some)))
        ticks = [f"{c['label']}{'' if c['learnt'] else ' (not learnt)'}" for c in some]
        for protocol, methods in METHODS.items() if len(some) > 1 else ():
            for m, metric in METRICS.items():
                asides = [beside(k, len(methods), 0.3) for k in range(len(methods))]
                lines = zip(asides, methods.items(), strict=True)
                data = [_line(STYLES[n], run, aside, some, m) for aside, (n, run) in lines]
                levels = {
                    n: [c["runs"].get(run, {}).get(m, {}).get("value") for c in some] for n, run in CONTROLS.items()
                }
                levels["chance"] = [r["chance"][m]] * len(some)
                dashes = ("dashdot", "longdash", "dot")
                data += [
                    {"type": "scatter", "mode": "lines", "name": n, "x": x, "y": y, "line": {"dash": d, "width": 1.5}}
                    | {"marker": {"color": COLOURS["grey"]}}
                    for (n, y), d in zip(levels.items(), dashes, strict=True)
                ]
                axis = {"title": {"text": f"{metric}, {protocol}"}, "range": [-0.03, 1.05]}
                layout = {"xaxis": {"title": {"text": words}, "tickvals": x, "ticktext": ticks}, "yaxis": axis}
                drawn[f"{metric} by {question}, {protocol}"] = {"data": data, "layout": layout}
    return drawn


def _line(style: Style, run: str, aside: float, some: Sequence[Mapping[str, Any]], metric: str) -> Trace:
    there = [(k, c) for k, c in enumerate(some) if run in c["runs"]]
    line = curve(style, [k + aside for k, _ in there], [c["runs"][run][metric] for _, c in there])
    return line | {"text": [c["label"] for _, c in there], "hovertemplate": "%{text}: %{y:.2f}"}
