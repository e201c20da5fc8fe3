"""Tasks with ground truth, under one call: `build(name, scale="cpu", seed=0, **sources)`.

Packages add their own through the entry-point group `datablame.tasks` (see CONTRIBUTING).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from datablame.errors import UserError, nearest
from datablame.evaluation.tasks.base import SCALES, Task, check_scale

__all__ = ["BUILTIN", "SCALES", "Task", "build", "names", "takes"]

BUILTIN = {
    "mixed-small": "mixed",
    "mixed-large": "mixed",
    "mixed-hard": "mixed_hard",
    "grammars": "grammars",
    "mathqa": "mathqa",
    "harmfulcheck": "harmfulcheck",
    "backdoor-1": "backdoor",
    "backdoor-3": "backdoor",
    "backdoor-5": "backdoor",
    "facts": "facts",
    "released-grammars": "released",
    "released-math": "released",
}
"""name -> module of this package, whose `build(name, scale, seed, **sources)` makes the task."""

RELEASED = ("released-grammars", "released-math")
"""Tasks of the paper's own files, which the user must have."""


@cache
def _entry_points() -> dict[str, Any]:
    return {e.name: e for e in entry_points(group="datablame.tasks")}


def names() -> list[str]:
    """All known tasks, ours first."""
    return [*BUILTIN, *(n for n in _entry_points() if n not in BUILTIN)]


def _builder(name: str) -> Callable[..., Task]:
    if name in BUILTIN:
        return import_module(f"datablame.evaluation.tasks.{BUILTIN[name]}").build
    if name in _entry_points():
        return _entry_points()[name].load()
    raise UserError(f"unknown task {name!r}.{nearest(name, names())}")


def takes(name: str) -> list[str]:
    """The sources of real text that a task takes: of `advbench`, `alpaca`, `data`."""
    return [p for p in inspect.signature(_builder(name)).parameters if p not in ("name", "scale", "seed")]


def build(name: str, scale: str = "cpu", seed: int = 0, **given: str | None) -> Task:
    """The same task for the same arguments, and other rows for another seed.

    given: `advbench=` and `alpaca=` (a file, a hub id, or the package named in `sources.py`) put real text in place
    of ours; `data=` is the directory of the paper's released files.
    Raises UserError for an unknown name, scale or source, and for a source that is too small.
    """
    check_scale(scale)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UserError(f"--seed {seed!r}: a whole number from 0.")
    known, given = takes(name), {k: v for k, v in given.items() if v is not None}
    for source in given:
        if source not in known:
            hint = f" It takes {' and '.join('--' + k for k in known)}." if known else " It takes none."
            raise UserError(f"{name}: takes no --{source}.{hint}")
    return _builder(name)(name, scale, seed, **given)
