"""`datablame paper run all`: every experiment, those that fail told at the end; a cell of the benchmark is run once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

from datablame.errors import UserError
from datablame.paper import EXPERIMENTS, Cells, Request, in_order, module


def run_all(request: Request, command: Callable[[Request], str]) -> dict[str, str]:
    """Run each experiment that has this scale; `{name: why}` of those that failed.

    command: the command that runs one of them alone.
    """
    failed: dict[str, str] = {}
    names = [n for n in in_order() if request.scale in EXPERIMENTS[n].costs]
    for name in (n for n in in_order() if n not in names):
        request.reporter.note(f"{name}: has no scale {request.scale}; left out")
    named = [replace(request, name=n) for n in names]
    requests = {r.name: replace(r, command=command(r)) for r in named}
    failed |= run_cells(request, [r for r in requests.values() if hasattr(module(r.name), "cells")])
    for k, (name, one) in enumerate(requests.items()):
        request.reporter.note(f"{name} ({k + 1} of {len(requests)}): {EXPERIMENTS[name].shows}")
        if why := _failure(partial(module(name).run, one)):
            request.reporter.note(f"{name} failed: {why}")
            failed[name] = why
    return failed


def run_cells(request: Request, asked: Iterable[Request]) -> dict[str, str]:
    """Every cell that one of them needs, with the runs of all of them: features are captured once. As `run_all`."""
    from datablame.evaluation.bench import bench

    wanted = united(module(r.name).cells(r) for r in asked)
    same: dict[tuple[str, ...], dict[int, list[str]]] = {}
    for (task, seed), found in wanted.items():
        same.setdefault(tuple(found), {}).setdefault(seed, []).append(task)
    failed = {}
    options: dict[str, Any] = {"scale": request.scale, "device": request.device, "reporter": request.reporter}
    for runs, by_seed in same.items():
        for seed, tasks in by_seed.items():
            given = {"tasks": tasks, "seeds": [seed], "methods": ",".join(runs), **options}
            if why := _failure(partial(bench, request.model, request.bench, strict=False, **given)):
                failed[f"cells of {', '.join(tasks)}, seed {seed}"] = why
    return failed


def united(wanted: Iterable[Cells]) -> dict[tuple[str, int], list[str]]:
    """`{(task, seed): runs}`, each cell once."""
    from datablame.evaluation.suites import runs

    found: dict[tuple[str, int], list[str]] = {}
    for cells in wanted:
        named = runs("all") if cells.runs is None else runs("all", ",".join(cells.runs))
        for seed in cells.seeds:
            for task in cells.tasks:
                there = found.setdefault((task, seed), [])
                there += [run for run in named if run not in there]
    return found


def _failure(work: Callable[[], Any]) -> str | None:
    """Why it failed, in a sentence. With --debug the first failure ends everything, with its traceback."""
    try:
        work()
    except Exception as e:
        if os.environ.get("DATABLAME_DEBUG"):
            raise
        line = (str(e).strip().splitlines() or ["no message"])[0]
        return str(e) if isinstance(e, UserError) else f"{type(e).__name__}: {line}"
    return None
