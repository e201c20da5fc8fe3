"""The paper's tables and figures, each one command: `datablame paper run table5`.

An experiment is a module of this package, imported when it is asked for, with two functions:

    run(request: Request) -> Path    measures, writes `RESULT` into `request.out`, gives its path; a run that is already
                                     there is kept
    show(out: Path) -> Page          the paper's numbers beside ours, read from that file

To add one, write its module and name it in EXPERIMENTS.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datablame.errors import UserError, nearest

if TYPE_CHECKING:
    from datablame.indexing import Reporter

SCALES = ("smoke", "cpu")


@dataclass(frozen=True)
class Experiment:
    """shows: in one line; costs: `{scale: time and what is fetched}`; result: the file that a run leaves in --out."""

    shows: str
    costs: Mapping[str, str]
    result: str


LINEAR = {"smoke": "under 1 minute, 12 MB fetched once", "cpu": "about 20 minutes, 4 GB of memory"}

EXPERIMENTS = {
    "table5": Experiment("time and error of DataInf, LiSSA and GradSim on a linear layer", LINEAR, "table5.json"),
    "figure3": Experiment("those errors over points and parameters; the same run as table5", LINEAR, "table5.json"),
}
"""name -> what it is; the module has the same name."""


@dataclass(frozen=True)
class Request:
    """What `datablame paper run` was asked for; mnist: a folder or a hub id, None: fetch it."""

    scale: str
    out: Path
    seed: int
    command: str
    reporter: Reporter
    mnist: str | None = None


@dataclass(frozen=True)
class Table:
    """One table in print: every row has as many cells as there are headings."""

    title: str
    headings: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Page:
    """What is told of a run: sentences, tables, and pictures of which one is visible.

    views: `{name: {"data": [...], "layout": {...}}}`, plotly's JSON.
    """

    title: str
    facts: list[tuple[str, str]]
    notes: list[str]
    tables: list[Table]
    views: dict[str, dict[str, Any]]
    command: str
    settings: dict[str, Any] = field(default_factory=dict)


def experiment(name: str) -> Experiment:
    """By name. Raises UserError with the nearest names for an unknown one."""
    if name not in EXPERIMENTS:
        raise UserError(f"unknown table or figure {name!r}.{nearest(name, EXPERIMENTS)}")
    return EXPERIMENTS[name]


def module(name: str) -> Any:
    """The module with `run` and `show`."""
    experiment(name)
    return import_module(f"datablame.paper.{name}")
