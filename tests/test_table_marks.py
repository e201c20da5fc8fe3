"""Marks of significance in the benchmark's tables against SciPy's permutation test and Holm's procedure."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import scipy.stats

from datablame.evaluation.intervals import interval, interval_of_tasks, intervals, intervals_of_tasks
from datablame.evaluation.results import TaskResults
from datablame.evaluation.suites import HEADLINE, LADDER, REPSIM_LADDER, runs
from datablame.evaluation.tables import (
    HEADINGS,
    MARKED,
    PAPER_TABLES,
    REFERENCES,
    behaving_rows,
    headline_rows,
    ladder_rows,
    markdown,
    paper_rows,
    task_rows,
)

RUNGS = [run for _, run in (*LADDER, *REPSIM_LADDER)]
REPSIM, BM25 = REFERENCES["R"], REFERENCES["B"]


def made(
    task: str = "mixed-small", seed: int = 0, names: list[str] = RUNGS, m: int = 24, shift: float = 0.0
) -> dict[str, Any]:
    """A result with made-up metrics: each run has a level of its own, and noise of its own on every query."""
    rng = np.random.default_rng([seed, m, len(task)])
    main = ["harmful"]
    queries = [
        {"id": j, "label": "x", "group": "harmful" if j % 2 else "benign", "answer": "", "behaves": bool(j % 3)}
        for j in range(m)
    ]
    sets: dict[str, dict[str, Any]] = {"reference": {}, "generated": {}}
    for k, run in enumerate([*names, "length"]):
        for s, kind in enumerate(sets.values()):
            level = 0.5 + 0.06 * ((k // 2 * 3 + s) % 5 - 2) + shift
            kind[run] = {x: np.clip(level + rng.normal(size=m) / 20, 0, 1).tolist() for x in HEADINGS}
            kind[run]["query_independent_share"] = 0.1
            kind[run]["accuracy"] = (rng.random(m) < level + (0.3 if k % 3 else -0.3)).astype(float).tolist()
    leak = {"prompt": 0.75, "response": 0.25 + seed / 10, "shows": "prompt" if seed < 2 else "both"}
    return {
        "answered": 2, "version": 1, "fingerprint": f"{task}{seed}", "model": "tiny", "task": task, "scale": "cpu",
        "seed": seed,
        "recipe": "sound", "title": f"{task} <b>", "rows": 10, "labels": ["x"] * 10, "main": main,
        "recipe_options": {"rate": 1e-3, "seed": seed}, "leak": leak, "queries": queries,
        "learnt": {"learnt": True, "behaves": {"tuned": 1.0, "base": 0.0},
                   "exact": {"tuned": 0.5, "base": 0.0}, "loss": {"tuned": 1.0, "base": 2.0}},
        "chance": {x: [0.5] * m for x in HEADINGS}, "results": sets, "model_sha256": "sha", "threads": 1,
        "seconds": {"tune": 3600.0, "answers": 1800.0, "features": 900.0, "scores": 90.0, "all": 6390.0},
        "machine": "a machine",
    }  # fmt: skip


def stacked(task: str, *seeds: int, **options: Any) -> TaskResults:
    return TaskResults(task, "sound", [made(task, s, **options) for s in seeds])


def told(differences: dict[Any, list[np.ndarray[Any, Any]]]) -> dict[Any, str]:
    """`+`, `−` or `=` of each: SciPy's exact or sampled flips, and Holm's procedure. Arrays: of each task.

    Every task counts the same, whatever its queries.
    """
    p, sign = {}, {}
    for key, arrays in differences.items():
        d = np.concatenate([a.ravel() / a.size for a in arrays])
        found = scipy.stats.permutation_test((d,), np.sum, permutation_type="samples", n_resamples=60_000, rng=0)
        p[key], sign[key] = (1.0 if not d.any() else found.pvalue), "+" if d.sum() > 0 else "−"
    out = dict.fromkeys(p, "=")
    for step, key in enumerate(sorted(p, key=lambda k: p[k])):
        least = 0.05 / (len(p) - step)
        assert abs(p[key] / least - 1) > 0.15, "too near the edge for two sets of random flips to agree"
        if p[key] > least:
            break
        out[key] = sign[key]
    return out


def difference(r: TaskResults, a: str, b: str, metric: str, *where: str) -> np.ndarray[Any, Any]:
    return r.values(a, metric, *where) - r.values(b, metric, *where)


def wanted(marks: dict[Any, str], *key: Any) -> str:
    """The marks of a cell as it should end."""
    return "".join(f" {letter}{marks[*key, letter]}" for letter in "RBS" if (*key, letter) in marks)


# ---------------------------------------------------------------- significance


@pytest.mark.parametrize("where", [("reference", "main"), ("generated", "main"), ("reference", "benign")])
def test_a_task_table_marks_top_1_and_auroc_of_every_run(where: tuple[str, str]) -> None:
    results = stacked("mixed-small", 4, 5, names=[*RUNGS[:4], REPSIM, BM25])
    expected = told(
        {
            (m, run, letter): [difference(results, run, ref, m, *where)]
            for m in MARKED
            for letter, ref in REFERENCES.items()
            for run in results.runs
            if run != ref
        }
    )
    assert set(expected.values()) == {"+", "−", "="}
    header, *rows, chance = task_rows(results, *where)
    assert header == ["run", *HEADINGS.values(), "top-1 by seed"]
    assert chance[:2] == ["chance", "0.50"]
    for run, row in zip(results.runs, rows, strict=True):
        assert row[0] == f"`{run}`"
        for k, m in enumerate(HEADINGS, 1):
            mean, low, high = (abs(x) for x in interval(results.values(run, m, *where), same_queries=False))
            form = ".1f" if m == "mean_rank" else ".2f"
            assert row[k] == f"{mean:{form}} ({low:{form}} to {high:{form}}){wanted(expected, m, run)}"
        assert row[-1] == " ".join(f"{s:.2f}" for s in results.seeds(run, "accuracy", *where))


def test_the_papers_tables_are_corrected_over_all_their_tasks() -> None:
    found = {"mixed-small": stacked("mixed-small", 0), "mixed-hard": stacked("mixed-hard", 0, 2, names=RUNGS[:-4])}
    found["mixed-small"].results[0]["learnt"]["learnt"] = False
    expected = told(
        {
            (f"{metric} {t} {group}", run, letter): [difference(r, run, ref, metric, "reference", group)]
            for metric in ("accuracy", "coverage")
            for t, r in found.items()
            for group in ("main", "benign")
            for letter, ref in REFERENCES.items()
            for run in r.runs
            if ref in r.runs and run != ref
        }
    )
    header, *rows = paper_rows("table2", found)
    assert header == [
        "run",
        "mixed-small (behaviour not learnt)",
        "mixed-small: benign queries",
        "mixed-hard",
        "mixed-hard: benign queries",
    ]
    table = {row[0]: row[1:] for row in rows}
    assert table["the label shows on"] == ["prompt", "", "prompt, both", ""]  # the two seeds differ
    assert table["AUROC of BM25: prompt, response"] == ["0.75, 0.25", "", "0.75, 0.35", ""]
    area, top = (found["mixed-small"].values("length", m).mean() for m in ("auroc", "accuracy"))
    assert table["AUROC, top-1 of the row's length alone `length`"][0] == f"{area:.2f}, {top:.2f}"
    for run in RUNGS:
        columns = [(task, group) for task in found for group in ("main", "benign")]
        for (task, group), cell in zip(columns, table[f"`{run}`"], strict=True):
            if run not in found[task].runs:  # a run that one task lacks costs the others nothing
                assert cell == "–"
                continue
            value = 100 * found[task].values(run, "accuracy", group=group).mean()
            assert cell.startswith(f"{value:.0f} (")
            covered = 100 * found[task].values(run, "coverage", group=group).mean()
            first, second = cell.split(" / ")
            assert first == first.partition(")")[0] + ")" + wanted(expected, f"accuracy {task} {group}", run)
            assert second == f"{covered:.0f}" + wanted(expected, f"coverage {task} {group}", run)
    assert table["chance"] == ["50 / 50"] * 4
    assert paper_rows("table4", found) == [["not run yet"]]
    # The paper's numbers stand in columns of their own, and every line is as long.
    backdoor = paper_rows("table4", {"backdoor-1": stacked("backdoor-1", 0)})
    assert {len(row) for row in backdoor} == {3}  # no triggered queries, no column of them
    assert [row[2] for row in backdoor if row[0] == f"`{REPSIM}`"] == ["100/99.4"]


def test_a_ladder_tells_of_every_step() -> None:
    gone = LADDER[3][1]
    some = [run for run in RUNGS if run != gone]
    found = {"grammars": stacked("grammars", 1, 2, 3), "mathqa": stacked("mathqa", 1, names=some)}
    above = {b: a for ladder in (LADDER, REPSIM_LADDER) for (_, a), (_, b) in pairwise(ladder)}
    expected = told(
        {
            (t, run, letter): [difference(r, run, ref, "auroc")]
            for t, r in found.items()
            for run in RUNGS
            for letter, ref in [*REFERENCES.items(), ("S", above.get(run))]
            if run in r.runs and ref in r.runs and run != ref
        }
    )
    assert {v for (_, _, letter), v in expected.items() if letter == "S"} == {"+", "−", "="}
    header, *rows = ladder_rows(found)
    assert header == ["step (AUROC)", "grammars", "mathqa"]
    assert rows[0][0] == "the label shows on"
    assert rows[2][0] == "AUROC, top-1 of the row's length alone `length`"
    lines = {row[0]: row[1:] for row in rows}
    for name, run in (*LADDER, *REPSIM_LADDER):
        for (task, r), cell in zip(found.items(), lines[f"{name} `{run}`"], strict=True):
            if run not in r.runs:
                assert cell == "–"
            else:
                assert cell.endswith(")" + wanted(expected, task, run))
    first, below = (lines[f"{name} `{run}`"] for name, run in (LADDER[0], LADDER[4]))
    assert " S" not in first[0]
    assert " S" in below[0]
    assert " S" not in below[1]  # one step from what is not there is none
    assert " R" in markdown([header, *rows])


def test_differences_too_many_for_few_flips_are_still_found() -> None:
    """Holm multiplies the smallest p by the cells; with 9,999 flips nothing in 600 cells could ever be significant."""
    found = {t: stacked(t, 0, 1, 2, names=[*runs("all")], m=24) for t in PAPER_TABLES["table3"][1]}
    for r in found.values():
        for result in r.results:
            result["results"]["reference"]["graddot@padded"]["accuracy"] = [0.0] * 24
            result["results"]["reference"][REPSIM]["accuracy"] = [1.0] * 24
    (row,) = (row for row in paper_rows("table3", found) if row[0] == "`graddot@padded`")
    assert len(row) == 6
    assert all(" R−" in cell for cell in row[1:])


def test_a_run_that_failed_somewhere_is_in_no_table_and_is_named() -> None:
    results = stacked("facts", 0, 1)
    results.results[1]["results"]["generated"]["graddot@padded"] = {"error": "it diverges", "seconds": 0.0}
    assert "graddot@padded" not in results.runs
    assert results.failed == {"graddot@padded": "it diverges"}
    assert "`graddot@padded`" not in [row[0] for row in task_rows(results)]
    for kind in results.results[0]["results"].values():
        kind.clear()
    assert [row[0] for row in task_rows(results)] == ["run", "chance"]


# ---------------------------------------------------------------- answers that behave


def test_answers_that_behave_are_counted_and_shown_beside_all() -> None:
    """Seeds of 12 main queries, of which 8, 8 and 3 show their class's behaviour; one seed has none."""
    results = stacked("facts", 0, 1, 2, 3)
    for j, query in enumerate(results.results[2]["queries"]):
        query["behaves"] = j < 6
    for query in results.results[3]["queries"]:
        query["behaves"] = False
    table = behaving_rows(results)
    assert table
    header, *rows, chance = table
    assert header == ["run", *(f"{m}, {n}" for m in ("top-1", "AUROC") for n in ("all 48", "the 19 that behave"))]
    assert [row[0] for row in rows] == [f"`{run}`" for run in results.runs]
    for run, row in zip(results.runs, rows, strict=True):
        for metric, cells in zip(MARKED, (row[1:3], row[3:]), strict=True):
            every, shown = [], []
            for r in results.results:
                values = zip(r["queries"], r["results"]["generated"][run][metric], strict=True)
                main = [(q["behaves"], v) for q, v in values if q["group"] == "harmful"]
                every += [v for _, v in main]
                shown += [[v for b, v in main if b]]
            assert [len(s) for s in shown] == [8, 8, 3, 0]
            assert cells[0].startswith(f"{np.mean(every):.2f} (")
            assert cells[1].startswith(f"{np.mean([np.mean(s) for s in shown[:3]]):.2f} (")
    assert chance == ["chance", "0.50", "0.50", "0.50", "0.50"]
    only = replace(results, results=results.results[3:])
    assert behaving_rows(only) is None
    assert behaving_rows(stacked("facts", 0, names=[])) is not None  # `length` alone


def test_intervals_of_seeds_with_queries_of_their_own_number() -> None:
    """One row at a time as `interval_of_tasks`; with as many queries in every seed the interval of stacked seeds."""
    rng = np.random.default_rng(0)
    ragged = [rng.normal(k, 1, size=(3, 1, m)) for k, m in enumerate((5, 20))]
    for k, found in enumerate(intervals_of_tasks(ragged)):
        assert found == pytest.approx(interval_of_tasks([v[k] for v in ragged]))
        assert found.value == pytest.approx(np.mean([v[k].mean() for v in ragged]))
    even = rng.normal(size=(2, 3, 30)) + np.arange(3)[:, None]
    apart = intervals_of_tasks([even[:, [s]] for s in range(3)])
    for one, other in zip(apart, intervals(even, same_queries=False), strict=True):
        assert one == pytest.approx(other, abs=0.03)  # other draws of the same distribution


# ---------------------------------------------------------------- the headline


def test_the_headline_is_a_mean_over_the_tasks_of_a_kind() -> None:
    found = {
        "mixed-small": stacked("mixed-small", 0, 1, m=12),
        "mixed-hard": stacked("mixed-hard", 0, m=40, shift=0.1),
        "facts": stacked("facts", 0, 1, names=[r for r in RUNGS if r != LADDER[0][1]]),
    }
    families = {"harmful data": ["mixed-small", "mixed-hard"], "facts": ["facts"]}
    expected = told(
        {
            (f, run, letter): [difference(found[t], run, ref, "auroc") for t in tasks]
            for f, tasks in families.items()
            for _, run in HEADLINE
            for letter, ref in REFERENCES.items()
            if run != ref and all(run in found[t].runs for t in tasks)
        }
    )
    header, shows, *rows, chance = headline_rows(found)
    assert header == ["AUROC", "harmful data: mixed-small, mixed-hard", "facts: facts"]
    assert shows == ["the label shows on", "mixed-small: prompt; mixed-hard: prompt", "facts: prompt"]
    assert chance == ["chance", "0.50", "0.50"]
    cells = {run: row for (_, run), row in zip(HEADLINE, rows, strict=True)}
    for run in (run for _, run in HEADLINE if run in found["mixed-small"].runs):
        mean = np.mean([found[t].values(run, "auroc").mean() for t in families["harmful data"]])
        assert cells[run][1].startswith(f"{mean:.2f} (")
        assert cells[run][1].endswith(")" + wanted(expected, "harmful data", run))
    one = found["facts"].interval(BM25, "auroc")
    assert cells[BM25][2].startswith(f"{one.value:.2f} ({one.low:.2f} to {one.high:.2f})")
    assert cells[LADDER[0][1]][2] == "–"
    assert headline_rows({"tiny": stacked("tiny", 0)})[0] == ["AUROC"]  # of no kind


def test_an_interval_over_tasks_draws_tasks_seeds_and_queries() -> None:
    rng = np.random.default_rng(0)
    tasks = [rng.normal(size=(3, 8)), 1 + rng.normal(size=(1, 20)), 3 + rng.normal(size=(2, 5))]
    found = interval_of_tasks(tasks)
    assert found.value == pytest.approx(np.mean([t.mean() for t in tasks]))
    means = []
    for _ in range(20_000):
        total = 0.0
        for _ in tasks:
            values = tasks[rng.integers(3)]
            s, m = values.shape
            total += np.mean([rng.choice(values[rng.integers(s)], m).mean() for _ in range(s)]) / 3
        means.append(total)
    low, high = np.quantile(means, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.06)
    assert found.high == pytest.approx(high, abs=0.06)
    assert interval_of_tasks(tasks[:1]) == interval(tasks[0], same_queries=False)
    # Of two tasks without variation a quarter of the draws is twice the one, and a quarter twice the other.
    assert interval_of_tasks([np.zeros((2, 4)), np.ones((1, 9))]) == (0.5, 0.0, 1.0)
