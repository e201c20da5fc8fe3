"""Figure 4: LiSSA's iterations against accuracy, up to the exact solution; the paper's first explanation, tested.

The paper says that more iterations help on Mixed and HarmfulCheck and not on Grammars and MathQA. Here the iterations
go on until they have converged, under the paper's loss and under the sound one, and the solution that they converge to
stands beside them: if the approximation were what makes influence fail, that solution would be the best.

Drawn from the benchmark's cells: runs that a cell has already are not run again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datablame.indexing import SILENT
from datablame.paper import Cells, Page, Request, Table, experiment
from datablame.paper.panels import Style, Trace, curve, level, panels, share
from datablame.paper.results import already_there, difference, point, read, too_few, with_half, write

if TYPE_CHECKING:
    from datablame.evaluation.results import TaskResults, Tested

TASKS = ("mixed-small", "harmfulcheck", "grammars", "mathqa")
SMOKE = ("mixed-small", "grammars")
STEPS = (1, 3, 10, 30, 100, 1000, 10_000, 100_000)
RELEASED_STEPS = (1, 10, 100, 1000)
VIEWS = ("padded", "response")
"""The paper's loss, and the sound one."""
METRICS = {"accuracy": "top-1 accuracy", "auroc": "AUROC"}
REPSIM, BM25 = "repsim:layer=last,text=prompt", "bm25:text=both"
CURVES = {
    **{v: {k: f"lissa:steps={k},damping=0.1@{v}" for k in STEPS} for v in VIEWS},
    "released": {k: f"lissa:protocol=paper,steps={k},damping=0.1@padded" for k in RELEASED_STEPS},
}
"""`{curve: {iterations: run}}`; released: the recursion as the paper's code has it, with its wrong sign and step."""
SOLVED = {v: f"exact-block:damping=0.1@{v}" for v in VIEWS}
JOINT = {v: f"exact:damping=0.1@{v}" for v in VIEWS}
DAMPED = {v: f"exact-block:damping=1.0,unit=rank@{v}" for v in VIEWS}
"""The solution by block with λ as large as the curvature is on average where there is any, in place of the paper's."""
RUNS = (
    *(run for runs in CURVES.values() for run in runs.values()),
    *SOLVED.values(),
    *JOINT.values(),
    *DAMPED.values(),
    REPSIM,
    BM25,
)
"""What the benchmark has to run for this figure, spelt as in suites.py."""
PAPER = {
    "mixed-small": "more iterations improve it, and it stays below RepSim",
    "harmfulcheck": "more iterations improve it, and it stays below RepSim",
    "grammars": "more iterations do not improve it",
    "mathqa": "more iterations do not improve it",
}
"""What the paper's text says of its figure, whose numbers did not survive; Llama-2-7B-chat, other rows."""


def run(request: Request) -> Path:
    """Every cell that lacks one of the runs, then the numbers of the figure."""
    from datablame.evaluation.bench import bench
    from datablame.evaluation.results import joined, load_results

    wanted = cells(request)
    tasks, path = wanted.tasks, request.out / experiment(request.name).result
    this = {"model": Path(request.model).name, "scale": request.scale, "seeds": sorted(wanted.seeds)}
    already_there(path, this, SILENT)  # the same run is summed up again: its cells may have grown
    bench(
        request.model,
        request.bench,
        scale=request.scale,
        tasks=tasks,
        methods=",".join(RUNS),
        seeds=wanted.seeds,
        device=request.device,
        strict=False,
        reporter=request.reporter,
    )
    there = load_results(request.bench, request.model, request.scale)
    found = joined(there, tasks, wanted.seeds)
    made = {"experiment": request.name, "command": request.command, "run": this}
    return write(path, made | summary(found))


def cells(request: Request) -> Cells:
    """Every run of the figure on its tasks."""
    from datablame.evaluation.bench import SEEDS

    return Cells(tasks_of(request.scale), request.seeds or SEEDS[request.scale], RUNS)


def tasks_of(scale: str) -> tuple[str, ...]:
    """Which tasks are drawn."""
    return SMOKE if scale == "smoke" else TASKS


# ---------------------------------------------------------------- numbers


def summary(found: Mapping[str, TaskResults]) -> dict[str, Any]:
    """Intervals of every run on the reference responses, residuals, and the tests, for the file."""
    return {
        "protocol": {
            "intervals": "95 %, bootstrap over seeds and queries; no such, nor a test, for one ranking for all queries",
            "tests": "sign flips over queries, two-sided; p_holm: Holm's correction over all tests of the figure",
            "residual": "median over queries and blocks of ‖αHr − v‖/‖v‖",
            "damping": "0.1 of the mean eigenvalue of each block; damped: 1, of the mean of those that can be above 0",
        },
        "paper": PAPER,
        "tasks": {task: _task(results) for task, results in found.items()},
        "tests": tests(found),
    }


def _task(results: TaskResults) -> dict[str, Any]:
    runs = [run for run in RUNS if run in results.runs]
    spans = results.intervals([(run, m) for run in runs for m in METRICS])
    told: dict[str, Any] = {"learnt": results.learnt, "seeds": [r["seed"] for r in results.results]}
    told |= {"queries": int(results.values(runs[0], "accuracy").size), "chance": {}, "runs": {}}
    told["chance"] = {m: results.chance(m) for m in METRICS}
    for run in runs:
        told["runs"][run] = {m: point(spans[run, m], fixed=results.fixed(run)) for m in METRICS}
        left = [r["results"]["reference"][run].get("residual") for r in results.results]
        if all(x is not None for x in left):  # results that are older than this number lack it
            told["runs"][run]["residual"] = {"value": sum(left) / len(left), "values": left}
    told["failed"] = {run: why for run, why in results.failed.items() if run in RUNS}
    return told | {"left_out": list(results.left_out)}


QUESTIONS = (
    "solved − 1 iteration",
    "solved − 10 iterations",
    "solved − RepSim",
    "joint − RepSim",
    "1000 − 10 iterations",
    "damped − solved",
    "damped − RepSim",
)


def tests(found: Mapping[str, TaskResults]) -> list[dict[str, Any]]:
    """Is the solution better than its first and its tenth iteration, and than RepSim? On every task, view and metric.

    For the released recursion, which converges to nothing: its last iterations against its tenth.
    """
    from datablame.evaluation.results import against, corrected

    pairs: dict[tuple[str, str], tuple[str, str]] = {}
    for v in VIEWS:
        others = (CURVES[v][1], CURVES[v][10], REPSIM)
        pairs |= {(v, q): (SOLVED[v], other) for q, other in zip(QUESTIONS, others, strict=False)}
        pairs[v, QUESTIONS[3]] = JOINT[v], REPSIM
        pairs |= {(v, q): (DAMPED[v], other) for q, other in zip(QUESTIONS[5:], (SOLVED[v], REPSIM), strict=True)}
    ends = CURVES["released"]
    pairs["released", QUESTIONS[4]] = ends[RELEASED_STEPS[-1]], ends[10]
    tested: dict[tuple[str, str, str, str], Tested] = {}
    for task, results in found.items():
        there = {key: pair for key, pair in pairs.items() if set(pair) <= set(results.runs)}
        for m in METRICS:
            tested |= {(task, *key, m): t for key, t in against([results], there, m).items()}
    holm = corrected(tested)
    names = ("task", "curve", "question", "metric")
    return [
        dict(zip(names, key, strict=True)) | {"value": round(t.value, 6), "p": t.p, "p_holm": holm[key].p}
        for key, t in tested.items()
    ]


def answer(r: Mapping[str, Any], task: str, curve: str, question: str, metric: str = "accuracy") -> str:
    """See `results.difference`; – for none."""
    wanted = {"task": task, "curve": curve, "question": question, "metric": metric}
    for t in r["tests"]:
        if all(t[k] == v for k, v in wanted.items()):
            return difference(t)
    return "–"


def reading(r: Mapping[str, Any], task: str, view: str) -> str:
    """In words, from the numbers: what the iterations do, and whether the solution is worth its name."""
    runs, steps = r["tasks"][task]["runs"], CURVES[view]
    if not {SOLVED[view], steps[1], steps[10]} <= set(runs):
        return f"{task}, {view}: a run that it takes has failed."
    first, ten, solved = (runs[x]["accuracy"]["value"] for x in (steps[1], steps[10], SOLVED[view]))
    found = {t["question"]: t for t in r["tests"] if (t["task"], t["curve"], t["metric"]) == (task, view, "accuracy")}

    def told(question: str, up: str, down: str, same: str) -> str:
        t = found.get(question)
        return "not tested" if t is None else same if t["p_holm"] >= 0.05 else up if t["value"] > 0 else down

    rise = told(QUESTIONS[0], "rises with the iterations", "falls with the iterations", "does not change significantly")
    rest = told(QUESTIONS[1], "better than 10 iterations", "worse than 10 iterations", "not told apart from 10")
    beside = told(QUESTIONS[2], "better than RepSim", "worse than RepSim", "not told apart from RepSim")
    return (
        f"{task}, {view}: accuracy {rise} ({first:.2f} after 1, {ten:.2f} after 10, {solved:.2f} solved); the solution "
        f"is {rest}, {beside}."
    )


# ---------------------------------------------------------------- what is told


def show(out: Path, name: str) -> Page:
    """The curves, a table a task, and what they say."""
    r = read(out / experiment(name).result)
    tasks = r["tasks"]
    facts = [
        ("Model", r["run"]["model"]),
        ("Scale", r["run"]["scale"]),
        ("Tasks", ", ".join(map(_heading, tasks.items()))),
    ]
    facts += [("Seeds", ", ".join(map(str, next(iter(tasks.values()))["seeds"]))), ("Machine", r["machine"])]
    failed = [f"{t}: {run} failed: {why}" for t, x in tasks.items() for run, why in x["failed"].items()]
    notes = [
        *NOTES,
        *too_few(tasks),
        *(reading(r, task, view) for task in tasks for view in VIEWS),
        *(f"The paper on {task}: {PAPER[task]}." for task in tasks if task in PAPER),
        *failed,
        *(note for x in tasks.values() for note in x["left_out"]),
    ]
    title = "Figure 4: do more of LiSSA's iterations find more of the right rows?"
    made = {"experiment": r["experiment"], **r["run"], "protocol": r["protocol"]}
    return Page(title, facts, notes, _tables(r), _views(r), str(r["command"]), made)


NOTES = (
    "See: whether a curve climbs towards its dashed line, the exact solution that it converges to, and whether that "
    "line is any higher than RepSim's. Circles: the paper's loss (128 padded tokens). Squares: the response's loss. "
    "Crosses: the recursion as the paper's code has it, where λ has the wrong sign and the step is so small that "
    "nothing is solved. Bars: 95 % intervals over seeds and queries.",
    "solved: exact-block, the solution block by block, which LiSSA aims at. joint: over all blocks at once. damped: "
    "block by block with λ as large as the curvature is on average where there is any; the paper's λ is a tenth of an "
    "average over mostly empty directions. "
    "Residual: what LiSSA leaves of its own equation, the median over queries and blocks; – where the result is older "
    "than this number.",
    "+0.10* (p .01): a difference, significant at 5 % after Holm's correction over the figure, with both metrics.",
)


def _heading(task: tuple[str, Mapping[str, Any]]) -> str:
    return task[0] if task[1]["learnt"] else f"{task[0]} (behaviour not learnt)"


def _tables(r: Mapping[str, Any]) -> list[Table]:
    made = [_table(item, view) for item in r["tasks"].items() for view in VIEWS]
    return [*made, *(differences(r, metric) for metric in METRICS)]


def differences(r: Mapping[str, Any], metric: str) -> Table:
    """A task and a curve down, the figure's questions across."""
    lines = [[f"{t}, {c}", *(answer(r, t, c, q, metric) for q in QUESTIONS)] for t in r["tasks"] for c in CURVES]
    return Table(f"Differences in {METRICS[metric]}", ["task, curve", *QUESTIONS], lines)


def _table(item: tuple[str, Mapping[str, Any]], view: str) -> Table:
    """Iterations down; beside the paper's loss what is released, which is taken on it."""
    runs, released = item[1]["runs"], CURVES["released"] if view == "padded" else {}
    told = ["top-1", "AUROC", "residual"]
    rows = [[f"{k:,}", *_cells(runs, run)] for k, run in CURVES[view].items()]
    beside = {"solved": SOLVED[view], "joint": JOINT[view], "damped": DAMPED[view], "RepSim": REPSIM, "BM25": BM25}
    rows += [[words, *_cells(runs, run)] for words, run in beside.items()]
    rows.append(["chance", *(f"{item[1]['chance'][m]:.2f}" for m in METRICS), ""])
    if released:
        steps = [released.get(k, "") for k in CURVES[view]]
        rows = [[*row, *_cells(runs, run)] for row, run in zip(rows, [*steps, *[""] * (len(beside) + 1)], strict=True)]
    heads = ["iterations", *told, *(f"{x}, released" for x in told if released)]
    return Table(f"{_heading(item)}, {view}", heads, rows)


def _cells(runs: Mapping[str, Any], run: str) -> list[str]:
    if run not in runs:
        return ["–" if run else ""] * 3
    x = runs[run]
    left = f"{x['residual']['value']:.2g}" if "residual" in x else "–"
    return [*(with_half(x[m]) for m in METRICS), left]


STYLES = {
    "padded": Style("LiSSA, padded (the paper's loss)", "vermillion", "solid", "circle"),
    "response": Style("LiSSA, response (sound)", "blue", "solid", "square"),
    "released": Style("LiSSA as released", "purple", "dot", "x"),
}
LEVELS = {
    SOLVED["padded"]: Style("solved, padded", "vermillion", "dash"),
    SOLVED["response"]: Style("solved, response", "blue", "dash"),
    JOINT["padded"]: Style("joint, padded", "vermillion", "dot"),
    JOINT["response"]: Style("joint, response", "blue", "dot"),
    DAMPED["padded"]: Style("damped, padded", "vermillion", "dashdot"),
    DAMPED["response"]: Style("damped, response", "blue", "dashdot"),
    REPSIM: Style("RepSim", "green", "longdash"),
    BM25: Style("BM25", "orange", "dashdot"),
}
CHANCE = Style("chance", "grey", "dot")
END = 10 * STEPS[-1]
"""Where on the axis of iterations the solution stands."""


def _views(r: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    ticks = {"tickvals": [*(k for k in STEPS if k not in (3, 30)), END], "tickmode": "array"}
    ticks["ticktext"] = ["1", "10", "100", "1e3", "1e4", "1e5", "solved"]
    axis = {"type": "log", "title": {"text": "iterations"}, **ticks}
    views = {}
    for metric, words in METRICS.items():
        drawn = {_heading(item): _lines(item[1], metric) for item in r["tasks"].items()}
        views[words] = panels(drawn, axis, share(words))
    left = {_heading(item): _curves(item[1], "residual") for item in r["tasks"].items()}
    views["residual"] = panels(left, axis, {"type": "log", "title": {"text": "residual ‖αHr − v‖/‖v‖"}})
    return views


def _curves(task: Mapping[str, Any], metric: str) -> list[Trace]:
    made = []
    for name, steps in CURVES.items():
        points = {k: task["runs"][x][metric] for k, x in steps.items() if metric in task["runs"].get(x, {})}
        if points:
            made.append(curve(STYLES[name], list(points), list(points.values())))
    return made


def _lines(task: Mapping[str, Any], metric: str) -> list[Trace]:
    runs, ends = task["runs"], (STEPS[0], END)
    made = _curves(task, metric)
    for v, run in SOLVED.items():
        if run in runs:  # the solution's own mark and interval, at the end of its dashed line
            mark = Style(LEVELS[run].name, LEVELS[run].colour, "dash", f"{STYLES[v].mark}-open")
            made.append(curve(mark, [END], [runs[run][metric]]) | {"showlegend": False})
    made += [level(style, runs[run][metric]["value"], ends) for run, style in LEVELS.items() if run in runs]
    return [*made, level(CHANCE, task["chance"][metric], ends)]
