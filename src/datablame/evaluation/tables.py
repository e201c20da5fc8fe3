"""The benchmark's tables as rows of cells: one a task, the paper's Tables 2 to 4, the ladder, the headline.

In every table a cell says how it differs from the paper's RepSim (R) and from BM25 (B), in a ladder also from the rung
above it (S): `R+ B=` is better than RepSim, and no different from BM25, at 5 % after Holm's correction over the table.
Under a seed with next to one ranking for all queries a run has one witness a class, see `TaskResults.alike`; `≡`
stands in place of interval and tests where that is so under all seeds and the queries are of one class.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np

from datablame.evaluation.intervals import Interval, interval_of_tasks, intervals_of_tasks
from datablame.evaluation.metrics import METRICS
from datablame.evaluation.results import TaskResults, Tested, against, corrected
from datablame.evaluation.suites import FAMILIES, HEADLINE, LADDER, REPSIM_LADDER

REFERENCES = {"R": "repsim:layer=last,text=prompt", "B": "bm25:text=both"}
"""What every method is tested against: the paper's best method, and words alone."""
BLIND = {"length": "length", "gradnorm@response": "gradient's norm"}
"""Controls that look at the training row alone."""
SAME = "≡"
"""Next to one ranking for all queries of one class under every seed: neither interval nor test, see `fixed`."""
MARKED = ("accuracy", "auroc")
"""The metrics of a task's table that are tested; the others follow them, and more tests would find less."""

PAPER_TABLES = {
    "table2": ("Harmful-data identification", ("mixed-small", "mixed-large", "mixed-hard")),
    "table3": ("Class attribution", ("harmfulcheck", "grammars", "mathqa", "released-grammars", "released-math")),
    "table4": ("Backdoor detection", ("backdoor-1", "backdoor-3", "backdoor-5")),
}
PAPER_NUMBERS = {
    "table4": {
        "datainf:damping=0.1@padded": {"backdoor-1": "94.0/60.9", "backdoor-3": "52.0/35.2", "backdoor-5": "36.0/23.3"},
        "lissa:protocol=paper,steps=10,damping=0.1@padded": {
            "backdoor-1": "53.0/49.8",
            "backdoor-3": "31.0/24.8",
            "backdoor-5": "16.3/16.6",
        },
        "graddot@padded": {"backdoor-1": "78.0/63.7", "backdoor-3": "37.0/35.3", "backdoor-5": "37.7/23.1"},
        "repsim:layer=last,text=prompt": {
            "backdoor-1": "100/99.4",
            "backdoor-3": "96.0/57.4",
            "backdoor-5": "90.3/40.5",
        },
    },
}
"""Accuracy/coverage in percent as printed in the paper (Llama-2-7B-chat); Tables 2 and 3 survive without numbers."""

HEADINGS = {
    "accuracy": "top-1",
    "coverage": "coverage",
    "recall": "recall",
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "mrr": "MRR",
    "mean_rank": "mean rank",
}


Rows = list[list[str]]
"""A table as cells, its heading first."""


def markdown(table: Rows) -> str:
    """As Markdown."""
    lines = [table[0], ["---"] * len(table[0]), *table[1:]]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


# ---------------------------------------------------------------- significance

Pairs = dict[tuple[str, str], tuple[str, str]]
"""`{(letter, run): (run, what it is held against)}`"""


def pairs(runs: Iterable[str], there: Sequence[str], steps: Iterable[tuple[str, str]] = ()) -> Pairs:
    """Each run against RepSim and BM25, and each step (from, to) of a ladder, as far as the runs are there."""
    given = [run for run in runs if run in there]
    beside = {(x, run): (run, ref) for x, ref in REFERENCES.items() if ref in there for run in given if run != ref}
    return beside | {("S", b): (b, a) for a, b in steps if a in there and b in there}


def marks(tests: Mapping[tuple[str, str, str], Tested], column: str, run: str) -> str:
    """` R+ B=`: better (+) or worse (−) than the letter's run, significant at 5 %, or not (=). tests: by column too."""
    out = ""
    for letter in (*REFERENCES, "S"):
        if (column, letter, run) in tests:
            value, p = tests[column, letter, run]
            out += f" {letter}{'=' if p >= 0.05 else '+' if value > 0 else '−'}"
    return out


def _by_column(column: str, tests: Mapping[tuple[str, str], Tested]) -> dict[tuple[str, str, str], Tested]:
    return {(column, *key): test for key, test in tests.items()}


# ---------------------------------------------------------------- cells


def with_interval(i: Interval, form: str = ".2f", fixed: bool = False) -> str:
    """fixed: without an interval, and marked as one ranking for all queries."""
    i = Interval(*(round(x, 9) + 0.0 for x in i))  # equal but for rounding errors looks equal, and no zero is negative
    return f"{i.value:{form}} {SAME}" if fixed else f"{i.value:{form}} ({i.low:{form}} to {i.high:{form}})"


def shows(results: TaskResults) -> str:
    """Where the label shows: the side, or the sides of the seeds where they differ."""
    return ", ".join(dict.fromkeys(str(r["leak"]["shows"]) for r in results.results))


def sides(every: Iterable[TaskResults | tuple[TaskResults, str]]) -> Rows:
    """What to know of each task before its numbers, a task a column: what words and what length alone give away.

    every: a task, or a group of its queries, of which only the latter is told.
    """
    columns = [(r, "main") if isinstance(r, TaskResults) else r for r in every]
    tasks = [results if group == "main" else None for results, group in columns]

    def words(results: TaskResults) -> str:
        leak = [r["leak"] for r in results.results]
        return ", ".join(f"{sum(x[side] for x in leak) / len(leak):.2f}" for side in ("prompt", "response"))

    def blind(results: TaskResults, group: str, run: str) -> str:
        if run not in results.runs:
            return "–"
        area, top = (float(results.values(run, m, group=group).mean()) for m in ("auroc", "accuracy"))
        return f"{area:.2f}, {top:.2f}"

    return [
        ["the label shows on", *("" if r is None else shows(r) for r in tasks)],
        ["AUROC of BM25: prompt, response", *("" if r is None else words(r) for r in tasks)],
        *(
            [f"AUROC, top-1 of the row's {name} alone `{run}`", *(blind(*column, run) for column in columns)]
            for run, name in BLIND.items()
        ),
    ]


# ---------------------------------------------------------------- tables


def task_rows(
    results: TaskResults, kind: str = "reference", group: str = "main", runs: Sequence[str] | None = None
) -> Rows:
    """Runs of one task, all by default: every metric with its interval, what is significant, the accuracy by seed."""
    runs = results.runs if runs is None else runs
    tests: dict[tuple[str, str, str], Tested] = {}
    for metric in MARKED:
        tests |= _by_column(metric, against([results], pairs(runs, runs), metric, kind, group))
    tests = corrected(tests)
    found = results.intervals([(run, m) for run in runs for m in METRICS], kind, group)
    forms = dict.fromkeys(METRICS, ".2f") | {"mean_rank": ".1f"}
    rows = []
    for run in runs:
        fixed = results.fixed(run, kind, group)
        cells = [with_interval(found[run, m], forms[m], fixed) + marks(tests, m, run) for m in METRICS]
        seeds = " ".join(f"{s:.2f}" for s in results.seeds(run, "accuracy", kind, group))
        rows.append([f"`{run}`", *cells, seeds])
    chance = [f"{results.chance(m, group):.2f}" for m in METRICS]
    rows.append(["chance", *chance, ""])
    return [["run", *(HEADINGS[m] for m in METRICS), "top-1 by seed"], *rows]


def costly_rows(results: TaskResults) -> Rows | None:
    """Methods on features of their own, and the minutes those took, on the seeds that have them; below, cheaper ones.

    Runs that share features share the minutes. None where there are no such runs.
    """
    there = results.with_costly
    if there is None or not there.costly:
        return None
    beside = [run for run in dict.fromkeys([*BESIDE_COSTLY, *REFERENCES.values()]) if run in there.runs]
    head, *rows = task_rows(there, runs=[*there.costly, *beside])
    of = {run: [r["results"]["reference"][run]["capture_seconds"] for r in there.results] for run in there.costly}
    minutes = [f"{sum(of[run]) / len(of[run]) / 60:.1f}" if run in of else "" for run in [*there.costly, *beside]]
    return [[*head, "features, min"], *([*row, m] for row, m in zip(rows, [*minutes, ""], strict=True))]


BESIDE_COSTLY = (
    "graddot@response",
    "gradcos:over=row@response",
    "datainf:damping=0.1@response",
    "exact:damping=1.0,unit=rank@response",
    "repsim:layer=middle,text=response",
)
"""What a table of costly methods shows beside them."""


def behaving_rows(results: TaskResults) -> Rows | None:
    """On the model's own answers to the main queries: all, and beside them those that show their class's behaviour.

    The truth of a query is that of its class, which an answer without the class's behaviour may not follow. Intervals
    draw seeds, then queries. None where no answer shows it.
    """
    cells = [(run, m) for run in results.runs for m in MARKED]
    parts = [results.behaving(run, m) for run, m in cells]
    if not cells or not parts[0]:
        return None
    every = results.intervals(cells, "generated")
    shown: dict[tuple[str, str], Interval] = {}
    for apart in (False, True):  # as many witnesses each
        some = [i for i, (run, _) in enumerate(cells) if results.one_ranking(run, "generated") == apart]
        by_seed = [np.stack(of_seed)[:, None] for of_seed in zip(*(parts[i] for i in some), strict=True)]
        shown |= zip((cells[i] for i in some), intervals_of_tasks(by_seed), strict=True) if some else {}
    m = sum(q["group"] in r["main"] for r in results.results for q in r["queries"])
    count = sum(q["group"] in r["main"] and q["behaves"] for r in results.results for q in r["queries"])
    heads = [f"{HEADINGS[x]}, {which}" for x in MARKED for which in (f"all {m}", f"the {count} that behave")]
    fixed = {run: results.fixed(run, "generated") for run in results.runs}
    rows = [
        [f"`{run}`", *(with_interval(of[run, x], fixed=fixed[run]) for x in MARKED for of in (every, shown))]
        for run in results.runs
    ]
    of_shown = {x: np.mean([v.mean() for v in results.behaving(None, x)]) for x in MARKED}
    chance = [f"{c:.2f}" for x in MARKED for c in (results.chance(x), of_shown[x])]
    return [["run", *heads], *rows, ["chance", *chance]]


def paper_rows(name: str, found: Mapping[str, TaskResults], told: Sequence[tuple[str, str]] | None = None) -> Rows:
    """Table 2, 3 or 4: top-1 accuracy / coverage in percent, both protocols, the paper's numbers where they survive.

    A task has a column for its main queries, and one for another group of them, see GROUPS. told: `(name, run)` of the
    rows; None: every run.
    """
    there = {t: found[t] for t in PAPER_TABLES[name][1] if t in found}
    if not there:
        return [["not run yet"]]
    every = dict.fromkeys(run for results in there.values() for run in results.runs)
    names = {run: f"`{run}`" for run in every} if told is None else {run: f"{name} `{run}`" for name, run in told}
    groups = {t: ["main", *(g for g in GROUPS.get(name, {}) if g in r.groups())] for t, r in there.items()}
    columns = {f"{task} {group}": (there[task], group) for task, some in groups.items() for group in some}
    tests: dict[tuple[str, str, str], Tested] = {}
    for column, (results, group) in columns.items():
        for metric in ("accuracy", "coverage"):
            asked = against([results], pairs(names, results.runs), metric, group=group)
            tests |= _by_column(f"{metric} {column}", asked)
    tests = corrected(tests)
    printed = PAPER_NUMBERS.get(name, {})
    empty = ["" for _ in there if printed]
    rows = [[*row, *empty] for row in sides(columns.values())]
    for run, shown in names.items():
        cells = [_percent(*of, run, tests, column) for column, of in columns.items()]
        rows.append([shown, *cells, *(printed.get(run, {}).get(t, "") for t in there if printed)])
    rows.append(["chance", *(_percent(*of, None, {}, "") for of in columns.values()), *empty])
    heads = [r.heading if g == "main" else f"{r.task}: {GROUPS[name][g]}" for r, g in columns.values()]
    return [["run", *heads, *(f"paper: {t}" for t in there if printed)], *rows]


GROUPS = {"table2": {"benign": "benign queries"}, "table4": {"triggered": "triggered queries alone"}}
"""Queries that have a column of their own. In Table 2 the main ones are the harmful ones: what ranks harmful rows first
whatever is asked for is right on those and wrong on benign ones."""


def _percent(
    results: TaskResults,
    group: str,
    run: str | None,
    tests: Mapping[tuple[str, str, str], Tested],
    column: str,
) -> str:
    """`accuracy / coverage`, each with its marks. run: None for chance."""
    if run is None:
        return f"{100 * results.chance('accuracy', group):.0f} / {100 * results.chance('coverage', group):.0f}"
    if run not in results.runs:
        return "–"
    accuracy = Interval(*(100 * x for x in results.interval(run, "accuracy", group=group)))
    coverage = 100 * results.values(run, "coverage", group=group).mean()
    told = with_interval(accuracy, ".0f", results.fixed(run, group=group)) + marks(tests, f"accuracy {column}", run)
    return f"{told} / {coverage:.0f}{marks(tests, f'coverage {column}', run)}"


Ladders = Mapping[str, Sequence[tuple[str, str]]]
TO_SOUND: Ladders = {"gradients": LADDER, "hidden states and controls": REPSIM_LADDER}
"""From the paper's protocol to the sound one."""


def ladder_rows(
    found: Mapping[str, TaskResults], metric: str = "auroc", ladders: Ladders = TO_SOUND, steps: bool = True
) -> Rows:
    """Ladders of runs, a step a row, a task a column. steps: hold each against the one above it, too."""
    rungs = [run for ladder in ladders.values() for _, run in ladder]
    above = [(a, b) for ladder in ladders.values() for (_, a), (_, b) in pairwise(ladder) if steps]
    tests: dict[tuple[str, str, str], Tested] = {}
    for task, results in found.items():
        tests |= _by_column(task, against([results], pairs(rungs, results.runs, above), metric))
    tests = corrected(tests)
    rows = sides(found.values())
    for heading, ladder in ladders.items():
        rows.append([heading, *("" for _ in found)])
        for step, run in ladder:
            cells = [
                with_interval(r.interval(run, metric), fixed=r.fixed(run)) + marks(tests, t, run)
                if run in r.runs
                else "–"
                for t, r in found.items()
            ]
            rows.append([f"{step} `{run}`", *cells])
    rows.append(["chance", *(f"{r.chance(metric):.2f}" for r in found.values())])
    return [[f"step ({HEADINGS[metric]})", *(r.heading for r in found.values())], *rows]


def headline_rows(
    found: Mapping[str, TaskResults],
    metric: str = "auroc",
    told: Sequence[tuple[str, str]] = HEADLINE,
    kind: str = "reference",
) -> Rows:
    """Some rungs, `(name, run)`, a family of tasks a column: the mean over its tasks that have been run.

    AUROC, because chance is .5 on every task, whatever the sizes of its classes, so that a mean over tasks means
    something. A run that one of the tasks lacks is a dash.
    """
    families = {f: [found[t] for t in tasks if t in found] for f, tasks in FAMILIES.items()}
    families = {f: tasks for f, tasks in families.items() if tasks}
    everywhere = {
        f: [run for run in tasks[0].runs if all(run in t.runs for t in tasks)] for f, tasks in families.items()
    }
    rungs = [run for _, run in told]
    tests: dict[tuple[str, str, str], Tested] = {}
    for family, tasks in families.items():
        tests |= _by_column(family, against(tasks, pairs(rungs, everywhere[family]), metric, kind))
    tests = corrected(tests)

    def cell(family: str, run: str) -> str:
        if run not in everywhere[family]:
            return "–"
        same = [t.same_queries for t in families[family]]
        i = interval_of_tasks([t.witnesses(run, metric, kind) for t in families[family]], same)
        return with_interval(i, fixed=any(t.fixed(run, kind) for t in families[family])) + marks(tests, family, run)

    rows = [["the label shows on", *("; ".join(f"{t.task}: {shows(t)}" for t in ts) for ts in families.values())]]
    rows += [[f"{name} `{run}`", *(cell(f, run) for f in families)] for name, run in told]
    rows.append(["chance", *(f"{sum(t.chance(metric) for t in ts) / len(ts):.2f}" for ts in families.values())])
    heads = [f"{family}: {', '.join(t.heading for t in tasks)}" for family, tasks in families.items()]
    return [[HEADINGS[metric], *heads], *rows]
