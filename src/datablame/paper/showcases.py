"""Tables 7 to 11: rows of each task, as the paper shows them. Nothing is trained."""

from __future__ import annotations

from pathlib import Path

from datablame.paper import Page, Request, Table, experiment
from datablame.paper.results import already_there, read, write

TASKS = {
    "table7": ("mixed-small", "mixed-hard"),
    "table8": ("grammars",),
    "table9": ("mathqa",),
    "table10": ("harmfulcheck",),
    "table11": ("backdoor-1", "backdoor-3", "backdoor-5"),
}


def run(request: Request) -> Path:
    """The first row of every class; a run that is already there is kept."""
    from datablame.evaluation.tasks import build

    path = request.out / experiment(request.name).result
    tasks = {name: build(name, request.scale, request.seed) for name in TASKS[request.name]}
    this = {"scale": request.scale, "seed": request.seed, "versions": {name: t.version for name, t in tasks.items()}}
    if already_there(path, this, request.reporter):
        return path
    shown = []
    for name, task in tasks.items():
        first = [next(e for e in task.train if e.label == label) for label in task.classes]
        rows = [[str(e.label), e.prompt, e.response] for e in first]
        shown.append({"task": name, "title": task.title, "rows": len(task.train), "shown": rows})
    return write(path, {"experiment": request.name, "run": this, "tasks": shown, "command": request.command})


def show(out: Path, name: str) -> Page:
    """A table a task."""
    r = read(out / experiment(name).result)
    tables = [
        Table(f"{t['task']}: {t['title']}", ["class", "prompt", "response"], [list(row) for row in t["shown"]])
        for t in r["tasks"]
    ]
    notes = ["Harmful rows are inert: invented requests and placeholder answers."]
    facts = [("scale", r["run"]["scale"]), ("seed", str(r["run"]["seed"]))]
    title = f"{name.replace('table', 'Table ')}: {experiment(name).shows}"
    settings = {k: v for k, v in r.items() if k not in ("tasks", "command")}
    return Page(title, facts, notes, tables, {}, str(r["command"]), settings)
