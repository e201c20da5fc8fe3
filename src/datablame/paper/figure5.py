"""Figure 5: accuracy along a fine-tune, against its loss; the paper's second explanation, tested.

The paper says that influence gets more accurate on backdoors as the fine-tune converges, less accurate on Mixed and
Grammars, and fluctuates on MathQA, and that gradient similarity does the same. Here the same fine-tune is looked at
from its first step to its last, under the paper's loss and, as a control that the paper lacks, under the sound one.

Block A of a LoRA has no gradient while B = 0, so the first checkpoint is that of step 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datablame.errors import UserError
from datablame.paper import Page, Request, Table, experiment
from datablame.paper.panels import Style, beside, curve, level, panels, share
from datablame.paper.results import already_there, difference, point, read, too_few, with_half, write

if TYPE_CHECKING:
    from datablame.evaluation.cell import Cell
    from datablame.evaluation.results import TaskResults
    from datablame.evaluation.tasks import Task

TASKS = ("backdoor-3", "mixed-small", "grammars", "mathqa")
PLANS = {"smoke": (("mixed-small",), 3), "cpu": (TASKS, 8), "paper": (TASKS, 8)}
"""scale -> tasks, and how many checkpoints of each."""
VIEWS = ("padded", "response")
"""The paper's loss, and the sound one."""
METRICS = ("accuracy", "auroc")
WORDS = {"accuracy": "top-1 accuracy", "auroc": "AUROC"}
BM25 = "bm25:text=both"
METHODS = {
    "DataInf": ("datainf:damping=0.1@padded", "datainf:damping=0.1@response"),
    "GradSim": ("graddot@padded", "graddot@response"),
    "cosine": ("gradcos@padded", "gradcos@response"),
    "centred": ("gradcos:over=row,center=1@padded", "gradcos:over=row,center=1@response"),
    "Adam-scaled": ("adamdot:center=1,relatif=l@padded", "adamdot:center=1,relatif=l@response"),
    "exact": ("exact-block:damping=0.1@padded", "exact-block:damping=0.1@response"),
    "damped": ("exact-block:damping=1.0,unit=rank@padded", "exact-block:damping=1.0,unit=rank@response"),
    "RepSim": ("repsim:layer=last,text=prompt", "repsim:layer=middle,text=response"),
}
"""name -> its run under each of VIEWS; RepSim sees no loss: as released, and in the middle layer over the response."""
RUNS = (*(run for pair in METHODS.values() for run in pair), BM25)
PAPER = {
    "backdoor-3": "DataInf gets more accurate as the model converges",
    "mixed-small": "accuracy drops as the model converges",
    "grammars": "accuracy drops as the model converges",
    "mathqa": "accuracy fluctuates",
}
"""What the paper's text says of its figure, whose numbers did not survive; Llama-2-7B-chat, other rows."""
FEWEST = 3
"""Checkpoints without which there is nothing to correlate."""


def run(request: Request) -> Path:
    """Every checkpoint that is not kept yet, then the numbers of the figure; a run that is already there is kept."""
    from datablame.evaluation.finetunes import base_sha256
    from datablame.models import ModelSpec, load

    path, tasks = request.out / experiment(request.name).result, PLANS[request.scale][0]
    model_sha256 = base_sha256(load(ModelSpec(request.model, None, request.device)))
    this = {"scale": request.scale, "seed": request.seed, "model": Path(request.model).name}
    this |= {"model_sha256": model_sha256, "protocol": protocol(request.scale, request.seed)}
    if already_there(path, this, request.reporter):
        return path
    kept: Kept = {}
    for name in tasks:  # two processes share the checkpoints: first each takes what no other is at
        _along(name, request, model_sha256, kept, [], wait=False)
    left_out: list[str] = []
    found = {name: _along(name, request, model_sha256, kept, left_out, wait=True) for name in tasks}
    found = {name: told for name, told in found.items() if len(told["checkpoints"]) >= FEWEST}
    if not found:
        raise UserError(f"{request.name}: no fine-tune has {FEWEST} checkpoints. {' '.join(left_out)}")
    record = {"run": this, "command": request.command, "paper": PAPER} | summary(found)
    return write(path, record | {"left_out": left_out})


def protocol(scale: str, seed: int) -> dict[str, Any]:
    """Every choice of the measurement, for the file."""
    from datablame.evaluation.tasks import build

    tasks, count = PLANS[scale]
    return {
        "tasks": {name: build(name, scale, seed).version for name in tasks},
        "fine-tune": asdict(build(tasks[0], scale, seed).recipe),
        "checkpoints": f"{count}, log-spaced from step 1 to the last",
        "runs": list(RUNS),
        "loss": "mean over the response tokens of all training rows, and of the queries' reference responses",
        "intervals": "95 %, bootstrap over queries; one fine-tune; no such, nor a test, for one ranking for all",
        "correlation": "Spearman's, of a method's mean with minus the training loss, over the checkpoints: no p-value, "
        "since checkpoints of one fine-tune are not independent",
        "tests": "the last checkpoint against the first, sign flips over queries, two-sided; p_holm: Holm's correction "
        "over all tests of the figure",
        "left out": "checkpoints that are not there, and those with a loss or gradient that is not finite; a task with "
        f"fewer than {FEWEST} left; a run that fails at one checkpoint is left out at that one",
    }


Kept = dict[tuple[str, int], "dict[str, Any] | str | None"]
"""What was found at a task's step, why it is left out, or None where another process is at it."""


def _along(
    name: str, request: Request, model_sha256: str, kept: Kept, left_out: list[str], wait: bool
) -> dict[str, Any]:
    """One task's fine-tune, checkpoint by checkpoint; sentences on what cannot be used go into `left_out`.

    kept: what is known already, filled in. wait: for checkpoints that another process is at, else left out.
    """
    from datablame.evaluation.along import spaced
    from datablame.evaluation.cell import Cell, options
    from datablame.evaluation.finetunes import fine_tuned, snapshots
    from datablame.evaluation.leak import lexical_leak
    from datablame.evaluation.tasks import build

    task = build(name, request.scale, request.seed)
    cell = Cell(request.model, name, request.scale, request.seed)
    same: dict[str, Any] = {"model_sha256": model_sha256, "device": request.device, "reporter": request.reporter}
    adapter = fine_tuned(request.model, task.train, options(cell, task), **same)
    there = spaced(snapshots(adapter), PLANS[request.scale][1])
    told: dict[str, Any] = {"rows": len(task.train), "shows": lexical_leak(task)["shows"], "checkpoints": []}
    for k, (step, folder) in enumerate(there):
        if kept.get((name, step)) is None:
            request.reporter.note(f"{name}: checkpoint {k + 1} of {len(there)}, step {step}")
            kept[name, step] = _at(cell, task, step, folder, wait, same)
        found = kept[name, step]
        if isinstance(found, str):
            left_out.append(f"{name}, step {step}: left out{found}")
        elif found is not None:
            told["checkpoints"].append(found)
    if len(told["checkpoints"]) < FEWEST:
        left_out.append(f"{name}: left out, fewer than {FEWEST} checkpoints can be used.")
    return told


def _at(
    cell: Cell, task: Task, step: int, folder: Path, wait: bool, same: Mapping[str, Any]
) -> dict[str, Any] | str | None:
    """What is found at a checkpoint, why it cannot be used, or None where another process is at it."""
    from datablame.capture import NotFinite
    from datablame.evaluation.along import at_checkpoint, missing
    from datablame.models import cache_dir

    if missing(folder):
        return ", its checkpoint is not there."
    try:
        return at_checkpoint(cell, task, step, folder, RUNS, cache_dir() / "along", wait=wait, **same)
    except UserError as e:
        if not isinstance(e.__cause__, NotFinite):
            raise
        return f": {e}"


# ---------------------------------------------------------------- numbers


def summary(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Intervals of every run at every checkpoint, correlations with the loss, and the tests, for the file."""
    from datablame.evaluation.results import corrected

    results = {name: [_results(name, c) for c in told["checkpoints"]] for name, told in found.items()}
    tested = {
        (name, run, m): _last_against_first(along, run, m)
        for name, along in results.items()
        for m in METRICS
        for run in RUNS[:-1]
        if all(run in r.runs and not r.fixed(run) for r in (along[0], along[-1]))
    }
    holm = corrected(tested)
    tests = [
        dict(zip(("task", "run", "metric"), key, strict=True))
        | {"value": round(t.value, 6), "p": t.p, "p_holm": holm[key].p}
        for key, t in tested.items()
    ]
    tasks = {}
    for name, told in found.items():
        points = [_point(c, r) for c, r in zip(told["checkpoints"], results[name], strict=True)]
        about = {"rows": told["rows"], "shows": told["shows"], "queries": results[name][0].values(BM25, "auroc").size}
        about["chance"] = {m: results[name][0].chance(m) for m in METRICS}
        tasks[name] = about | {"checkpoints": points, "correlation": correlations(points)}
    seconds = sum(c["seconds"] for told in found.values() for c in told["checkpoints"])
    return {"tasks": tasks, "tests": tests, "seconds": round(seconds, 1)}


def _results(name: str, checkpoint: dict[str, Any]) -> TaskResults:
    from datablame.evaluation.results import TaskResults

    return TaskResults(name, "sound", [checkpoint])


def _point(checkpoint: Mapping[str, Any], results: TaskResults) -> dict[str, Any]:
    there = [run for run in RUNS if run in results.runs]
    spans = results.intervals([(run, m) for run in there for m in METRICS])
    runs = {
        run: {
            m: point(spans[run, m], fixed=results.fixed(run)) | {"values": results.values(run, m)[0].tolist()}
            for m in METRICS
        }
        for run in there
    }
    failed = {run: why for run, why in results.failed.items() if run in RUNS}
    return {"step": checkpoint["step"], "loss": checkpoint["loss"], "runs": runs, "failed": failed}


def correlations(points: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """`{run: {metric: ρ}}` with minus the training loss: above 0, a method gets better as the loss falls.

    Over the checkpoints that have the run; None where they are fewer than FEWEST, or where one of the two does not
    vary.
    """
    from scipy.stats import spearmanr

    out: dict[str, dict[str, float | None]] = {}
    for run in RUNS[:-1]:
        some = [p for p in points if run in p["runs"]]
        losses = [-p["loss"]["train"]["tuned"] for p in some]
        out[run] = {}
        for m in METRICS:
            values = [p["runs"][run][m]["value"] for p in some]
            enough = len(some) >= FEWEST and len(set(values)) > 1 and len(set(losses)) > 1
            out[run][m] = round(float(spearmanr(losses, values).statistic), 4) if enough else None
    return out


def _last_against_first(along: Sequence[TaskResults], run: str, metric: str) -> Any:
    """The paired test of `results.against`, between two checkpoints in place of two runs."""
    from datablame.evaluation.intervals import TABLE_DRAWS, flip_test
    from datablame.evaluation.results import Tested, together

    first, last = along[0], along[-1]
    d = last.values(run, metric) - first.values(run, metric)
    d = together(d, first.labels()) if first.one_ranking(run) or last.one_ranking(run) else d
    return Tested(float(d.mean()), float(flip_test(d, draws=TABLE_DRAWS)[0]))


# ---------------------------------------------------------------- what is told


def show(out: Path, name: str) -> Page:
    """The curves, a table a task, and what they say."""
    r = read(out / experiment(name).result)
    tasks = r["tasks"]
    facts = [("Model", r["run"]["model"]), ("Scale", r["run"]["scale"]), ("Seed", str(r["run"]["seed"]))]
    facts += [("Tasks", ", ".join(tasks)), ("Machine", r["machine"])]
    failed = [
        f"{t}, step {p['step']}: {run} failed: {why}"
        for t, x in tasks.items()
        for p in x["checkpoints"]
        for run, why in p["failed"].items()
    ]
    notes = [
        *NOTES,
        *too_few(tasks),
        *(reading(r, task, k) for task in tasks for k in range(len(VIEWS))),
        *(f"The paper on {task}: {PAPER[task]}." for task in tasks if task in PAPER),
        *r["left_out"],
        *failed,
    ]
    title = "Figure 5: do methods find more as the fine-tune converges?"
    tables = [_table(r, task, k, m) for task in tasks for k in range(len(VIEWS)) for m in METRICS]
    return Page(title, facts, notes, tables, _views(r), str(r["command"]), r["run"])


NOTES = (
    "See: from left to right the loss falls; whether a line climbs or drops with it, whether DataInf does what GradSim "
    "does, and whether the same lines look alike under the response's loss. Bars: 95 % intervals over queries; points "
    "of one checkpoint stand a little beside each other.",
    "padded: the paper's loss, 128 tokens of which all are labelled; RepSim as released. response: the loss that was "
    "trained; RepSim in the middle layer over the response. The fine-tune is one and the same. GradSim: the dot "
    "product of gradients. cosine: block by block; centred: over the row, without the training rows' mean; "
    "Adam-scaled: that in Adam's metric. exact: the solution by block with the paper's λ; damped: the same, λ as large "
    "as the curvature is on average where there is any. loss: nats a response token, over the training rows and over "
    "the queries' reference responses.",
    "ρ: Spearman's correlation of the values with the falling training loss over the checkpoints; above 0, better "
    "as the loss falls. There are few of them and they are of one fine-tune, so ρ has no p-value and is often large by "
    "accident. last − first: *, significant at 5 % after Holm's correction over the figure, a test over queries.",
)


def reading(r: Mapping[str, Any], task: str, view: int) -> str:
    """In words, from the numbers: what each method does between the first checkpoint and the last."""
    x = r["tasks"][task]
    first, last = x["checkpoints"][0], x["checkpoints"][-1]
    losses = " to ".join(f"{p['loss']['train']['tuned']:.2f}" for p in (first, last))
    told = []
    for method, runs in METHODS.items():
        t, ends = _test(r, task, runs[view], "accuracy"), [p["runs"].get(runs[view]) for p in (first, last)]
        if all(end is not None for end in ends):
            change = "not tested, being one ranking for all queries"
            if t is not None:
                change = "not told apart" if t["p_holm"] >= 0.05 else "better" if t["value"] > 0 else "worse"
            a, b = (end["accuracy"]["value"] for end in ends)
            told.append(f"{method} {a:.2f} to {b:.2f}, {change}")
    words = "; ".join(told) or "no method ran at both ends"
    return f"{task}, {VIEWS[view]}: from step {first['step']} to {last['step']} (training loss {losses}): {words}."


def _test(r: Mapping[str, Any], task: str, run: str, metric: str) -> dict[str, Any] | None:
    key = (task, run, metric)
    return next((t for t in r["tests"] if (t["task"], t["run"], t["metric"]) == key), None)


def change(r: Mapping[str, Any], task: str, run: str, metric: str = "accuracy") -> str:
    """The last checkpoint's value minus the first's, see `results.difference`; – where it was not tested."""
    t = _test(r, task, run, metric)
    return "–" if t is None else difference(t)


def _table(r: Mapping[str, Any], task: str, view: int, metric: str) -> Table:
    """A checkpoint a row, a method a column; then ρ, and the last minus the first, where it is accuracy."""
    x = r["tasks"][task]
    points, runs = x["checkpoints"], [pair[view] for pair in METHODS.values()]
    base = [f"{points[0]['loss'][who]['base']:.2f}" for who in LOSSES]
    rows = [["base", *base, *["–"] * len(METHODS)]]
    rows += [
        [
            f"{p['step']:,}",
            *(f"{p['loss'][who]['tuned']:.2f}" for who in LOSSES),
            *(_cell(p, run, metric) for run in runs),
        ]
        for p in points
    ]
    rhos = [x["correlation"][run][metric] for run in runs]
    rows.append(["ρ", "", "", *("–" if rho is None else f"{rho:+.2f}" for rho in rhos)])
    rows.append(["last − first", "", "", *(change(r, task, run, metric) for run in runs)])
    beside = [f"chance {x['chance'][metric]:.2f}", *(f"BM25 {_cell(p, BM25, metric)}" for p in points[:1])]
    title = f"{task}, {VIEWS[view]}: {WORDS[metric]} ({', '.join(beside)})"
    return Table(title, ["step", "loss", "on queries", *METHODS], rows)


def _cell(p: Mapping[str, Any], run: str, metric: str) -> str:
    if run not in p["runs"]:
        return "–"
    found = p["runs"][run][metric]
    return with_half(found)


STYLES = {
    "DataInf": Style("DataInf", "vermillion", "solid", "circle"),
    "GradSim": Style("GradSim", "orange", "dash", "square"),
    "cosine": Style("cosine", "blue", "solid", "diamond"),
    "centred": Style("centred", "black", "dash", "star"),
    "Adam-scaled": Style("Adam-scaled", "black", "solid", "hexagram"),
    "exact": Style("exact", "sky", "dash", "triangle-up"),
    "damped": Style("damped", "purple", "dot", "triangle-down"),
    "RepSim": Style("RepSim", "green", "solid", "x"),
}
CONTROL = Style("BM25", "grey", "dashdot"), Style("chance", "grey", "dot")
LOSSES = {
    "train": Style("training rows", "blue", "solid", "circle"),
    "queries": Style("queries, reference responses", "vermillion", "dash", "square"),
}


def _views(r: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    tasks, views = r["tasks"], {}
    falling = {"type": "linear", "autorange": "reversed", "title": {"text": "training loss, nats a response token"}}
    for k, view in enumerate(VIEWS):
        for m, words in WORDS.items():
            views[f"{words}, {view}"] = panels({t: _lines(x, k, m) for t, x in tasks.items()}, falling, share(words))
    steps = {"type": "log", "title": {"text": "step of the optimizer"}}
    drawn = {}
    for task, x in tasks.items():
        points = x["checkpoints"]
        at = [p["step"] for p in points]
        drawn[task] = [curve(s, at, [{"value": p["loss"][w]["tuned"]} for p in points]) for w, s in LOSSES.items()]
    return views | {"loss": panels(drawn, steps, {"title": {"text": "nats a response token"}, "rangemode": "tozero"})}


def _lines(x: Mapping[str, Any], view: int, metric: str) -> list[dict[str, Any]]:
    points, made = x["checkpoints"], []
    losses = [p["loss"]["train"]["tuned"] for p in points]
    ends = max(losses), min(losses)
    for k, (method, runs) in enumerate(METHODS.items()):
        aside = beside(k, len(METHODS), 0.06 * (ends[0] - ends[1]))
        some = [p for p in points if runs[view] in p["runs"]]
        at = [p["loss"]["train"]["tuned"] + aside for p in some]
        made.append(curve(STYLES[method], at, [p["runs"][runs[view]][metric] for p in some]))
    words, chance = CONTROL
    if BM25 in points[0]["runs"]:  # it looks at no model
        made.append(level(words, points[0]["runs"][BM25][metric]["value"], ends))
    return [*made, level(chance, x["chance"][metric], ends)]
