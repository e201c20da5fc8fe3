"""Results of the benchmark, read from their files and stacked over seeds."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from datablame.errors import UserError
from datablame.evaluation.cell import ANSWERED, RECIPES, Cell, fingerprint
from datablame.evaluation.intervals import TABLE_DRAWS, Interval, flip_test, holm, intervals
from datablame.evaluation.metrics import METRICS
from datablame.evaluation.result_files import failed_run, failures, not_learnt, read_result
from datablame.evaluation.tasks import build

if TYPE_CHECKING:
    from jaxtyping import Float

    from datablame.evaluation.tasks import Task

    Values = Float[np.ndarray, "s m"]

Key = TypeVar("Key", bound=Hashable)

BY_ENTITY = ("facts",)
"""Tasks whose queries of one label are wordings of one question: one witness each label, and not one each query."""
FIXED = 0.9
"""A query-independent share above it: next to one ranking for all queries."""


@dataclass(frozen=True)
class TaskResults:
    """All seeds of one task under one recipe. results: as the files hold them, by seed.

    left_out: one sentence for each seed that does not go with the others. unlearnt: what those hold of which the
    behaviour was not learnt, see `result_files.failed_run`.
    """

    task: str
    recipe: str
    results: Sequence[dict[str, Any]]
    left_out: Sequence[str] = ()
    unlearnt: Sequence[dict[str, Any]] = ()

    @property
    def runs(self) -> list[str]:
        """Runs that every seed has finished without an error, on both sets of responses; `costly` ones left out."""
        return [run for run in self._finished if "captured" not in self.results[0]["results"]["reference"][run]]

    @property
    def _finished(self) -> list[str]:
        return [run for run in self.results[0]["results"]["reference"] if all(_done(r, run) for r in self.results)]

    @property
    def with_costly(self) -> TaskResults | None:
        """The seeds that have runs on features of their own, see costly.py; None where none has."""
        some = [r for r in self.results if any("captured" in v for v in r["results"]["reference"].values())]
        return replace(self, results=some) if some else None

    @property
    def costly(self) -> list[str]:
        """Runs on features of their own that every seed has finished, at least on the reference responses."""
        return [run for run in self._finished if run not in self.runs]

    @property
    def answered(self) -> bool:
        """Has every seed numbers on the model's own answers? Wrong ones of an older version are not read."""
        return all("generated" in r["results"] for r in self.results)

    @property
    def failed(self) -> dict[str, str]:
        """`{run: why}` of those that at least one seed has not finished."""
        every = [failures(r, limit=limit) for r in self.results for limit in (False, True)]
        done = set(self._finished)
        return {run: why for found in every for run, why in found.items() if run not in done}

    @property
    def learnt(self) -> bool:
        """Was the behaviour learnt under every seed?"""
        return all(r["learnt"]["learnt"] for r in self.results)

    @property
    def heading(self) -> str:
        """The task's name, and whether its numbers mean anything: under which seeds they do not."""
        missed = [str(r["seed"]) for r in self.results if not r["learnt"]["learnt"]]
        which = f": seed {', '.join(missed)}" if len(missed) < len(self.results) else ""
        return f"{self.task} (behaviour not learnt{which})" if missed else self.task

    def of_seeds(self, seeds: Sequence[int] | None) -> TaskResults:
        """Those that were asked for, where the directory has others, too; None: all that are there.

        Raises UserError where none of them is there.
        """
        some = [r for r in self.results if seeds is None or r["seed"] in seeds]
        if not some:
            asked = ", ".join(map(str, seeds or ()))
            raise UserError(" ".join([f"{self.task}: no results of seed {asked}.", *self.left_out]))
        return replace(self, results=some)

    def groups(self) -> list[str]:
        """The groups of the queries; the first entry stands for the main ones."""
        return ["main", *dict.fromkeys(q["group"] for q in self.results[0]["queries"])]

    def values(self, run: str, metric: str, kind: str = "reference", group: str = "main") -> Values:
        """`[seeds, queries]` of one group, or their means by label (BY_ENTITY). kind: `reference` or `generated`."""
        by_label = self.task in BY_ENTITY
        return np.array([_of_group(r, r["results"][kind][run][metric], group, by_label) for r in self.results])

    def witnesses(self, run: str, metric: str, kind: str = "reference", group: str = "main") -> Values:
        """`values`, or their means by label where the run has `one_ranking`."""
        by_label = self.task in BY_ENTITY or self.one_ranking(run, kind, group)
        return np.array([_of_group(r, r["results"][kind][run][metric], group, by_label) for r in self.results])

    def labels(self, group: str = "main") -> list[list[str]]:
        """The labels of `values`, a list a seed."""
        found = [_of_group(r, [str(q["label"]) for q in r["queries"]], group) for r in self.results]
        return [list(dict.fromkeys(labels)) for labels in found] if self.task in BY_ENTITY else found

    @property
    def same_queries(self) -> bool:
        """Does every seed ask the very same queries, as the released files do? They are then one witness together."""
        asked = {r.get("queries_sha256", k) for k, r in enumerate(self.results)}
        return len(self.results) > 1 and len(asked) == 1

    def alike(self, run: str, kind: str = "reference", group: str = "main") -> list[bool]:
        """Is it next to one ranking for all queries, under each seed?

        Then all queries of a class are right or wrong together: the class is one witness, whatever their number.
        """
        kept = [r["results"][kind][run] for r in self.results]
        found = [k.get("shares", {}).get(group, k["query_independent_share"]) for k in kept]
        return [share is None or share > FIXED for share in found]

    def one_ranking(self, run: str, kind: str = "reference", group: str = "main") -> bool:
        """Is it `alike` under some seed? Intervals then have one witness a class and a seed, under every seed."""
        return any(self.alike(run, kind, group))

    def fixed(self, run: str, kind: str = "reference", group: str = "main") -> bool:
        """Is it `alike` under every seed, and are the queries of one class? Then it has neither interval nor test."""
        return all(len(set(labels)) == 1 for labels in self.labels(group)) and all(self.alike(run, kind, group))

    def chance(self, metric: str, group: str = "main") -> float:
        """What a random order gets."""
        return float(np.mean([_of_group(r, r["chance"][metric], group) for r in self.results]))

    def interval(self, run: str, metric: str, kind: str = "reference", group: str = "main") -> Interval:
        """Mean and 95 % interval: seeds drawn, then `witnesses` within them, which differ from seed to seed."""
        return self.intervals([(run, metric)], kind, group)[run, metric]

    def intervals(
        self, cells: Sequence[tuple[str, str]], kind: str = "reference", group: str = "main"
    ) -> dict[tuple[str, str], Interval]:
        """`interval` of each (run, metric), at once."""
        found: dict[tuple[str, str], Interval] = {}
        for apart in (False, True):  # as many witnesses each
            some = [cell for cell in cells if self.one_ranking(cell[0], kind, group) == apart]
            values = np.array([self.witnesses(*cell, kind, group) for cell in some])
            found |= zip(some, intervals(values, same_queries=self.same_queries), strict=True) if some else {}
        return {cell: found[cell] for cell in cells}

    def behaving(self, run: str | None, metric: str) -> list[Float[np.ndarray, " m"]]:
        """For the model's own answers: the main queries of each seed whose answer shows its class's behaviour.

        As `witnesses`. A seed without any is left out. run: None for chance.
        """
        by_label, out = self.task in BY_ENTITY or (run is not None and self.one_ranking(run, "generated")), []
        for r in self.results:
            values = r["chance"][metric] if run is None else r["results"]["generated"][run][metric]
            shown = [v if q["behaves"] else None for v, q in zip(values, r["queries"], strict=True)]
            some = _of_group(r, shown, "main", by_label)
            out += [np.array(some)] if some else []
        return out

    def seeds(self, run: str, metric: str, kind: str = "reference", group: str = "main") -> list[float]:
        """The mean of each seed."""
        return [float(v) for v in self.values(run, metric, kind, group).mean(axis=1)]


def _done(result: Mapping[str, Any], run: str) -> bool:
    """On the reference responses, and on the model's own answers but for a limit."""
    found = {kind: numbers.get(run, {"error": "not there"}) for kind, numbers in result["results"].items()}
    left = [x for kind, x in found.items() if "error" in x and (kind == "reference" or "limit" not in x)]
    return not left


def by_class(result: Mapping[str, Any]) -> dict[str, float]:
    """Share of the answers to the main queries of each class that show what the class asks for."""
    shown: dict[str, list[bool]] = {}
    for q in result["queries"]:
        if q["group"] in result["main"]:
            shown.setdefault(str(q["label"]), []).append(q["behaves"])
    return {label: float(np.mean(s)) for label, s in shown.items()}


def _of_group(result: dict[str, Any], values: Sequence[Any], group: str, by_label: bool = False) -> list[Any]:
    """A value a query, or the mean of those of one label. None: of a query that is left out."""
    wanted = result["main"] if group == "main" else [group]
    there = [
        (str(q["label"]), v)
        for v, q in zip(values, result["queries"], strict=True)
        if q["group"] in wanted and v is not None
    ]
    if not by_label:
        return [v for _, v in there]
    return [float(np.mean([v for other, v in there if other == label])) for label in dict.fromkeys(x for x, _ in there)]


def with_intervals(result: dict[str, Any]) -> dict[str, Any]:
    """The same, each run with `interval95`: `{metric: [mean, low, high]}` over the main queries of this cell alone.

    The mean alone where the run is `fixed`. Tables join the seeds and take intervals of their own.
    """
    of, results = TaskResults(result["task"], result["recipe"], [result]), {}
    for kind, found in result["results"].items():
        done = [run for run, numbers in found.items() if "error" not in numbers]
        spans = of.intervals([(run, metric) for run in done for metric in METRICS], kind)
        told = {
            run: {m: [round(x, 4) for x in spans[run, m][: 1 if of.fixed(run, kind) else 3]] for m in METRICS}
            for run in done
        }
        results[kind] = {run: found[run] | ({"interval95": told[run]} if run in told else {}) for run in found}
    return result | {"results": results}


# ---------------------------------------------------------------- from files


def load_results(out: str | Path, model: str, scale: str, recipe: str = "sound") -> dict[str, TaskResults]:
    """`{task: results}` of what is there; what is of an older version, or of another kind, is left out, and named.

    Every note begins with its task. That of a task of which nothing is left stands with the first that is there.
    Raises UserError where nothing is.
    """
    folder = Path(out) / Path(model).name / scale
    name = re.compile(rf"-{re.escape(recipe)}-s\d+$")
    read = {p: read_result(p) for p in sorted(folder.glob("*.json")) if name.search(p.stem)}
    found: dict[str, list[dict[str, Any]]] = {}
    other = [p for p, result in read.items() if result is None]
    notes = [f"{name.sub('', p.stem)}: {p.name} is left out, being of another version." for p in other]
    for result in sorted(filter(None, read.values()), key=lambda x: x["seed"]):
        if is_old(result):
            notes.append(
                f"{result['task']}: seed {result['seed']} is left out, since the task has other rows, or another "
                "recipe, today. Run the cell again."
            )
        else:
            found.setdefault(result["task"], []).append(result)
            if result.get("answered") != ANSWERED:
                del result["results"]["generated"]
    if not found:
        raise UserError(
            " ".join([f"{folder}: no results under the {recipe} recipe.", *notes, "Run `datablame bench run` first."])
        )
    every = {task: _learnt_ones(of_one_kind(task, recipe, found[task])) for task in sorted(found)}
    for note in reversed(notes):
        task = note.partition(":")[0]
        task = task if task in every else next(iter(every))
        every[task] = replace(every[task], left_out=[note, *every[task].left_out])
    return every


def load_suite(out: str | Path, model: str, scale: str, recipe: str | None = None) -> dict[str, dict[str, TaskResults]]:
    """`{recipe: {task: results}}` of every recipe that has results, or of one.

    What is left out of a recipe of which nothing else is there is named with the first task of the others.
    Raises UserError for an unknown one, and where there is nothing.
    """
    if recipe is not None and recipe not in RECIPES:
        raise UserError(f"--recipe {recipe!r}: use {' or '.join(RECIPES)}.")
    found: dict[str, dict[str, TaskResults]] = {}
    nothing: dict[str, str] = {}
    for r in RECIPES if recipe is None else [recipe]:
        try:
            found[r] = load_results(out, model, scale, r)
        except UserError as e:
            nothing[r] = str(e)
    if not found:
        raise UserError(next(iter(nothing.values())))
    folder = Path(out) / Path(model).name / scale
    lost = [why for r, why in nothing.items() if any(folder.glob(f"*-{r}-s*.json"))]
    first = next(iter(found.values()))
    task = next(iter(first))
    first[task] = replace(first[task], left_out=[*first[task].left_out, *lost])
    return found


def _learnt_ones(of: TaskResults) -> TaskResults:
    """Without the failed runs, each of which is named; where all seeds failed, all stay, and tables mark them."""
    failed = [r for r in of.results if failed_run(r)]
    if not failed or len(failed) == len(of.results):
        return of
    notes = [
        f"{of.task}: seed {r['seed']} is left out, since its fine-tune has not learnt the behaviour: {not_learnt(r)}."
        for r in failed
    ]
    learnt = [r for r in of.results if not failed_run(r)]
    return replace(of, results=learnt, left_out=[*of.left_out, *notes], unlearnt=failed)


def joined(every: Mapping[str, TaskResults], tasks: Sequence[str], seeds: Sequence[int]) -> dict[str, TaskResults]:
    """Those tasks with those seeds, but for failed runs. Raises UserError naming what is not there."""
    for task in tasks:
        there = {r["seed"] for r in [*every[task].results, *every[task].unlearnt]} if task in every else set()
        if lacks := [str(s) for s in seeds if s not in there]:
            notes = every[task].left_out if task in every else []
            raise UserError(
                f"{task}: no result of seed {', '.join(lacks)}. Where another process is at it, run this again once it "
                f"has ended. {' '.join(notes)}".strip()
            )
    return {task: every[task].of_seeds(seeds) for task in tasks}


def of_one_kind(task: str, recipe: str, results: Sequence[dict[str, Any]]) -> TaskResults:
    """The seeds that are of one recipe and one model, with as many rows, and a sentence for each that is not.

    Of two kinds, the one with more seeds stays, then that of the lowest seed.
    """
    kinds = [_kind(r) for r in results]
    texts = [json.dumps(k, sort_keys=True) for k in kinds]
    many = Counter(texts)
    kept = max(range(len(results)), key=lambda i: (many[texts[i]], -i))
    notes = []
    for result, kind, text in zip(results, kinds, texts, strict=True):
        if text != texts[kept]:
            differs = ", ".join(k for k in kind if kind[k] != kinds[kept][k])
            notes.append(
                f"{task}: seed {result['seed']} is left out, since it is not of one kind with seed "
                f"{results[kept]['seed']} ({differs}). Delete its file and run the cell again."
            )
    same = [r for r, text in zip(results, texts, strict=True) if text == texts[kept]]
    return TaskResults(task, recipe, same, notes)


def _kind(result: dict[str, Any]) -> dict[str, Any]:
    """What the seeds of one task have in common. The rows differ, and so does the fingerprint."""
    same: dict[str, Any] = {k: result.get(k) for k in ("model_sha256", "title", "rows", "main")}
    same["recipe_options"] = {k: v for k, v in result["recipe_options"].items() if k != "seed"}
    return same | {"queries": dict(Counter(q["group"] for q in result["queries"]))}


def rebuilt(result: Mapping[str, Any]) -> Task | None:
    """The task whose rows the result is of; None where they cannot be made again: another version, a user's files."""
    task = today(result)
    return task if task is not None and _made_of(result, task) else None


def is_old(result: Mapping[str, Any]) -> bool:
    """Does the task have other rows, or another recipe, today?

    Where its rows are made of files that are not at hand (the paper's released ones, a user's sources), or by a package
    that is not installed, nobody can tell, and the answer is no.
    """
    task = today(result)
    return task is not None and not _made_of(result, task)


def today(result: Mapping[str, Any]) -> Task | None:
    """The task as it is now; None where it cannot be made here."""
    try:
        return build(result["task"], result["scale"], result["seed"])
    except UserError:
        return None


def _made_of(result: Mapping[str, Any], task: Task) -> bool:
    cell = Cell(result["model"], result["task"], result["scale"], result["seed"], result["recipe"])
    return fingerprint(cell, task, result.get("model_sha256", "")) == result["fingerprint"]


# ---------------------------------------------------------------- tests


class Tested(NamedTuple):
    """Mean of a − b, and the two-sided p-value of "no difference"."""

    value: float
    p: float


def against(
    tasks: Sequence[TaskResults],
    pairs: Mapping[Key, tuple[str, str]],
    metric: str,
    kind: str = "reference",
    group: str = "main",
) -> dict[Key, Tested]:
    """For each pair its first run minus its second on the same queries: the mean over tasks of the mean differences.

    The test is that of `intervals.flip_test`: every query of every seed has a sign of its own where they differ; under
    a seed where one of the two ranks all queries `alike`, every class has. Pairs with a run that is `fixed` are left
    out. p-values as they are: correct them over the table.
    """
    fixed = cache(lambda run: any(t.fixed(run, kind, group) for t in tasks))
    pairs = {key: pair for key, pair in pairs.items() if not any(map(fixed, pair))}
    if not pairs:
        return {}
    values = cache(lambda t, run: tasks[t].values(run, metric, kind, group))
    alike = cache(lambda t, run: np.array(tasks[t].alike(run, kind, group)))

    def difference(a: str, b: str) -> Float[np.ndarray, " all"]:
        parts = []
        for t, results in enumerate(tasks):
            d, one = _asked(results, values(t, a) - values(t, b)), alike(t, a) | alike(t, b)
            one = one if len(one) == len(d) else one.any(keepdims=True)
            d = np.where(one[:, None], together(d, results.labels(group)), d)
            parts.append(d.ravel() / (len(tasks) * d.size))  # so that the sum is the mean over tasks
        return np.concatenate(parts)

    d = np.array([difference(a, b) for a, b in pairs.values()])
    p = flip_test(d, draws=TABLE_DRAWS)
    return {key: Tested(float(x.sum()), float(q)) for key, x, q in zip(pairs, d, p, strict=True)}


def _asked(results: TaskResults, values: Values) -> Values:
    """Each query once: its mean over the seeds, where all ask it."""
    return values.mean(axis=0, keepdims=True) if results.same_queries else values


def together(values: Values, labels: Sequence[Sequence[str]]) -> Values:
    """The sum of each label's values in place of its first one, and 0 for the others: they have one sign together."""
    out = np.zeros_like(values)
    for row, here, of in zip(out, values, labels, strict=False):  # of queries asked once, those of the first seed
        for label, value in zip(of, here, strict=True):
            row[of.index(label)] += value
    return out


def corrected(table: Mapping[Key, Tested]) -> dict[Key, Tested]:
    """Holm's correction over all cells of a table."""
    if not table:
        return {}
    p = holm(np.array([t.p for t in table.values()]))
    return {key: t._replace(p=float(q)) for (key, t), q in zip(table.items(), p, strict=True)}
