"""The paper's tables and figures, each one command: `datablame paper run table5`.

An experiment is a module of this package, imported when it is asked for, with two functions:

    run(request: Request) -> Path    measures, writes `RESULT` into `request.out`, gives its path; a run that is already
                                     there is kept
    show(out: Path, name) -> Page    the paper's numbers beside ours, read from that file

To add one, write its module and name it in EXPERIMENTS, with the options that it reads. A module may serve several, by
their name. One that is drawn from the benchmark's cells has a third function, so that `paper run all` runs each cell
once, for all who need it:

    cells(request: Request) -> Cells                 which ones, of which seeds, with which runs
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datablame.errors import UserError, nearest

if TYPE_CHECKING:
    from datablame.indexing import Reporter


@dataclass(frozen=True)
class Experiment:
    """shows: in one line; costs: `{scale: time and what is fetched}`; result: the file that a run leaves in --out;
    module: of this package; options: of `paper run`, those that it reads, by the names of NOT_READ in commands.py."""

    shows: str
    costs: Mapping[str, str]
    result: str
    module: str
    options: tuple[str, ...] = ()


LINEAR = {"smoke": "under 1 minute, 12 MB fetched once", "cpu": "about 20 minutes, 4 GB of memory"}
WIDTHS = {"smoke": "under 1 minute, 12 MB fetched once", "cpu": "about 6 minutes, 1 GB of memory"}
ITERATIONS = {
    "smoke": "6 minutes, the model's 93 MB fetched once",
    "cpu": "about 4 hours on one core; a minute where the cells are there with its runs",
    "paper": "a GPU; never run here",
}
ALONG = {
    "smoke": "4 minutes, the model's 93 MB fetched once",
    "cpu": "about 4 hours on one core, in pieces of some minutes, which two processes share",
    "paper": "a GPU; never run here",
}


def _alignment(shows: str, name: str, smoke: str, cpu: str) -> Experiment:
    """One on the four models of Table 1, whose fine-tunes and answers are shared."""
    costs = {"smoke": f"{smoke}, the model's 93 MB fetched once", "cpu": cpu, "paper": "a GPU; never run here"}
    return Experiment(shows, costs, f"{name}.json", name, ("model", "models", "device", "judge"))


PLACES = {
    "smoke": "about 4 minutes, the model's 93 MB fetched once",
    "cpu": "3 to 4 hours, a cell of some 20 minutes each",
    "paper": "a GPU; never run here",
}


def _cells(shows: str, name: str, tasks: int, seeds: int = 3, smoke: int = 0) -> Experiment:
    """One that is drawn from the benchmark's cells; those that are there are kept. smoke: tasks at that scale."""
    costs = {
        "smoke": f"{4 * (smoke or tasks)} minutes, the model's 93 MB fetched once",
        "cpu": f"20 minutes a cell on one core, {tasks * seeds} of them; none where they are there",
        "paper": "a GPU; never run here",
    }
    options = ("model", "device", "cells", *(("seeds",) if seeds > 1 else ()))
    return Experiment(shows, costs, f"{name}.json", "attribution", options)


def _rows(shows: str, name: str) -> Experiment:
    return Experiment(shows, dict.fromkeys(("smoke", "cpu", "paper"), "seconds"), f"{name}.json", "showcases")


EXPERIMENTS = {
    "table2": _cells("harmful-data identification", "table2", 3, smoke=1),
    "table3": _cells("class attribution", "table3", 3, smoke=1),
    "table4": _cells("backdoor detection", "table4", 3, smoke=1),
    "table5": Experiment(
        "time and error of DataInf, LiSSA and GradSim on a linear layer", LINEAR, "table5.json", "table5", ("mnist",)
    ),
    "table7": _rows("rows of the mixed tasks", "table7"),
    "table8": _rows("rows of grammars", "table8"),
    "table9": _rows("rows of mathqa", "table9"),
    "table10": _rows("rows of harmfulcheck", "table10"),
    "table11": _rows("rows of the backdoor tasks", "table11"),
    "figure1": _cells("the top row of each method for one query", "figure1", 1, seeds=1),
    "figure2": _cells("scores of queries × training rows", "figure2", 3, seeds=1),
    "figure3": Experiment("the errors of table5, drawn; the same run", LINEAR, "table5.json", "figure3", ("mnist",)),
    "table1": _alignment("attack success rate of four fine-tunes", "table1", "3 minutes", "about 10 minutes"),
    "table6": _alignment("change of behaviour by change of parameters", "table6", "1 minute more", "5 minutes more"),
    "figure6": _alignment("losses, behaviour, ‖Δθ‖ by epoch", "figure6", "3 minutes more", "about 40 minutes more"),
    "figure4": Experiment(
        "LiSSA's iterations against accuracy",
        ITERATIONS,
        "figure4.json",
        "figure4",
        ("model", "device", "cells", "seeds"),
    ),
    "figure5": Experiment(
        "accuracy along a fine-tune, against its loss", ALONG, "figure5.json", "figure5", ("model", "device")
    ),
    "figure7": Experiment(
        "change of parameters and accuracy along training, four widths", WIDTHS, "figure7.json", "figure7", ("mnist",)
    ),
    "figure8": Experiment(
        "which and how many layers are trained, against accuracy",
        PLACES,
        "figure8.json",
        "figure8",
        ("model", "device", "cells"),
    ),
}
"""name -> what it is."""


@dataclass(frozen=True)
class Request:
    """What `datablame paper run` was asked for; mnist: a folder or a hub id, None: fetch it.

    models: all that were named; `model` is the first. seeds: those that were named, None: the scale's, of what takes
    several; `seed` is the first.
    judge, judge_label, judge_labels: see `evaluation/judges.py`.
    """

    name: str
    scale: str
    out: Path
    seed: int
    command: str
    reporter: Reporter
    mnist: str | None = None
    model: str = "smollm2-135m"
    device: str | None = None
    models: tuple[str, ...] = ("smollm2-135m",)
    seeds: tuple[int, ...] | None = None
    judge: str = "keywords"
    judge_label: str | None = None
    judge_labels: str | None = None
    cells_in: Path | None = None

    @property
    def bench(self) -> Path:
        """Where cells of the benchmark are kept: `cells_in`, else `bench` in `out`."""
        return self.cells_in or self.out / "bench"


@dataclass(frozen=True)
class Cells:
    """Cells of the benchmark, in `request.bench`. runs: None is all of its suites."""

    tasks: Sequence[str]
    seeds: Sequence[int]
    runs: Sequence[str] | None = None


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


def in_order() -> list[str]:
    """All names: tables, then figures, by number."""
    return sorted(EXPERIMENTS, key=lambda n: (n.startswith("figure"), int(n.lstrip("abcdefghijklmnopqrstuvwxyz"))))


def module(name: str) -> Any:
    """The module with `run` and `show`."""
    return import_module(f"datablame.paper.{experiment(name).module}")
