"""Results of the benchmark, read from their files and stacked over seeds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datablame.errors import UserError
from datablame.evaluation.bench import read_result
from datablame.evaluation.intervals import Difference, Interval, compare, holm, interval

if TYPE_CHECKING:
    from jaxtyping import Float

    Values = Float[np.ndarray, "s m"]


@dataclass(frozen=True)
class TaskResults:
    """All seeds of one task under one recipe. results: as the files hold them, by seed."""

    task: str
    recipe: str
    results: Sequence[dict[str, Any]]

    @property
    def runs(self) -> list[str]:
        """Runs that every seed has finished without an error, on both sets of responses."""
        found = [kind for r in self.results for kind in r["results"].values()]
        return [run for run in found[0] if all(run in f and "error" not in f[run] for f in found)]

    @property
    def failed(self) -> dict[str, str]:
        """`{run: why}` of those that at least one seed has not finished."""
        sets = [found for r in self.results for found in r["results"].values()]
        return {run: v["error"] for found in sets for run, v in found.items() if "error" in v}

    @property
    def learnt(self) -> bool:
        """Was the behaviour learnt under every seed?"""
        return all(r["learnt"]["learnt"] for r in self.results)

    def groups(self) -> list[str]:
        """The groups of the queries; the first entry stands for the main ones."""
        return ["main", *dict.fromkeys(q["group"] for q in self.results[0]["queries"])]

    def values(self, run: str, metric: str, kind: str = "reference", group: str = "main") -> Values:
        """`[seeds, queries]` of one group. kind: `reference` or `generated` responses."""
        return np.array([_of_group(r, r["results"][kind][run][metric], group) for r in self.results])

    def chance(self, metric: str, group: str = "main") -> float:
        """What a random order gets."""
        return float(np.mean([_of_group(r, r["chance"][metric], group) for r in self.results]))

    def interval(self, run: str, metric: str, kind: str = "reference", group: str = "main") -> Interval:
        """Mean and 95 % interval: seeds drawn, then queries within them, which differ from seed to seed."""
        return interval(self.values(run, metric, kind, group), same_queries=False)

    def seeds(self, run: str, metric: str, kind: str = "reference", group: str = "main") -> list[float]:
        """The mean of each seed."""
        return [float(v) for v in self.values(run, metric, kind, group).mean(axis=1)]


def _of_group(result: dict[str, Any], values: Sequence[float], group: str) -> list[float]:
    wanted = result["main"] if group == "main" else [group]
    return [v for v, q in zip(values, result["queries"], strict=True) if q["group"] in wanted]


def load_results(out: str | Path, model: str, scale: str, recipe: str = "sound") -> dict[str, TaskResults]:
    """`{task: results}` of what is there. Raises UserError where nothing is."""
    folder = Path(out) / Path(model).name / scale
    name = re.compile(rf"-{re.escape(recipe)}-s\d+$")
    read = [read_result(p) for p in sorted(folder.glob("*.json")) if name.search(p.stem)]
    found: dict[str, list[dict[str, Any]]] = {}
    for result in filter(None, read):
        found.setdefault(result["task"], []).append(result)
    if not found:
        raise UserError(f"{folder}: no results under the {recipe} recipe. Run `datablame bench run` first.")
    return {task: TaskResults(task, recipe, sorted(r, key=lambda x: x["seed"])) for task, r in found.items()}


def against(results: TaskResults, runs: Sequence[str], reference: str, metric: str) -> dict[str, Difference]:
    """Each run minus `reference` on the same queries, p-values as they are (correct them over the table)."""
    b = results.values(reference, metric)
    return {r: compare(results.values(r, metric), b, same_queries=False) for r in runs if r != reference}


def corrected(table: dict[tuple[str, str], Difference]) -> dict[tuple[str, str], Difference]:
    """Holm's correction over all cells of a table."""
    if not table:
        return {}
    p = holm(np.array([d.p for d in table.values()]))
    return {key: d._replace(p=float(q)) for (key, d), q in zip(table.items(), p, strict=True)}
