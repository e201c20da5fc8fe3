"""Tables of retraining truth, over the seeds of one task: what removal did, and the linear datamodeling scores."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from datablame.errors import UserError
from datablame.evaluation.intervals import Interval, interval
from datablame.evaluation.results import TaskResults, Tested, corrected
from datablame.evaluation.retraining import standard_error
from datablame.evaluation.suites import runs
from datablame.evaluation.tables import REFERENCES, Rows, markdown, with_interval
from datablame.evaluation.truth import AGAIN, CHANCE, KINDS, NOTHING, RIGHT, Kind, is_old, read_truth
from datablame.evaluation.views import VIEWS
from datablame.tracing import UNSOLVED

if TYPE_CHECKING:
    from jaxtyping import Float

    Values = Float[np.ndarray, "s m"]
    Results = Sequence[Mapping[str, Any]]


def load_truth(
    out: str | Path, model: str, scale: str, kind: Kind, task: str | None = None
) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """`{task: results by seed}` of what is there, and sentences on what is left out: seeds of other rows, single runs.

    task: that one alone.

    Raises UserError for seeds of one task that cannot be joined, being of other numbers of rows or queries, recipes or
    models, or, for removal, of other runs.
    """
    folder = Path(out) / Path(model).name / scale
    whose = "" if task is None else f"^{re.escape(task)}"
    name = re.compile(rf"{whose}-sound-s\d+-{kind}$")
    found: dict[str, list[dict[str, Any]]] = {}
    notes: list[str] = []
    for path in sorted(p for p in folder.glob("*.json") if name.search(p.stem)):
        if (result := read_truth(path)) is None:
            notes.append(f"{path.stem.partition('-sound-s')[0]}: {path.name} is left out, being of another version.")
        elif is_old(result):
            notes.append(
                f"{result['task']}: the {kind} result of seed {result['seed']} is left out, since the task has other "
                "rows, or another recipe, today. Run it again."
            )
        else:
            found.setdefault(result["task"], []).append(result)
    for its, results in found.items():
        if alone := {run for r in results for run in r["runs"]} - set(_shared(results)):
            notes.append(f"{its}: not of every seed, and in no table: {', '.join(sorted(alone))}.")
        results.sort(key=lambda r: r["seed"])
        kinds = [_kind(r) for r in results]
        if differs := [k for k in kinds[0] if any(other[k] != kinds[0][k] for other in kinds)]:
            raise UserError(
                f"{folder}: the {kind} results of {its} differ in {' and '.join(differs)} from seed to seed and "
                "cannot be joined. Make them again for all seeds at once."
            )
    return found, notes


def _kind(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the seeds of one task have in common. For lds a seed may have more runs: those that all have are shown."""
    runs = ("runs",) if result["kind"] == "removal" else ()
    same = {k: result.get(k) for k in (*runs, "queries", "rows", "model_sha256")}
    return same | {"recipe": {k: v for k, v in result.get("recipe_options", {}).items() if k != "seed"}}


def truth_rows(results: Results, kind: Kind) -> Rows:
    """The table of one task."""
    return removal_rows(results) if kind == "removal" else lds_rows(results)


def truth_title(results: Results, kind: Kind) -> str:
    """What the table of one task shows."""
    first = results[0]
    seeds = f"{'seeds' if len(results) > 1 else 'seed'} {', '.join(str(r['seed']) for r in results)}"
    seeds += f"; the label shows on: {_shows(results)}"
    fixed = "; intervals are over half-sets, for these seeds" if len(results) > 1 else ""
    if kind == "lds":
        sets = f"{first['half_sets']} random halves of {first['rows']} rows, each trained twice"
        return f"{first['task']}: {sets}; {seeds}{fixed}"
    asked = f"{first['queries']} queries of {' and '.join(dict.fromkeys(str(r['class']) for r in results))}"
    return f"{first['task']}: {first['dropped']} of {first['rows']} rows dropped, {asked}; {seeds}"


def truth_text(found: Mapping[str, Results], kind: Kind, notes: Sequence[str] = ()) -> str:
    """Markdown of all tasks, and the notes."""
    tables = [f"**{truth_title(r, kind)}**\n\n{markdown(truth_rows(r, kind))}" for r in found.values()]
    if kind == "removal":
        tables = [f"{table}\n\n{with_the_share(r)}" for table, r in zip(tables, found.values(), strict=True)]
    return "\n\n".join([*tables, *notes])


def truth_of_suite(out: str | Path, model: str, scale: str) -> dict[str, tuple[Rows, list[str]]]:
    """`{title: (table, notes)}` of all tasks held against retraining, for the suite's page."""
    told: dict[str, tuple[Rows, list[str]]] = {}
    for kind in KINDS:
        try:
            found, notes = load_truth(out, model, scale, kind)
        except UserError as e:  # seeds that cannot be joined: the rest of the page stands
            told[f"{kind}: not shown"] = [["why"], [str(e)]], []
            continue
        for task, results in found.items():
            beside = [with_the_share(results)] if kind == "removal" else []
            beside += [note for note in notes if note.partition(":")[0] == task]
            told[f"{kind}, {truth_title(results, kind)}"] = truth_rows(results, kind), beside
        if others := [[note] for note in notes if note.partition(":")[0] not in found]:
            told[f"{kind}: left out"] = [["what, and why"], *others], []
    return told


# ---------------------------------------------------------------- removal


def removal_rows(results: Results) -> Rows:
    """After dropping each run's top rows: rise of the queries' loss, fall of the behaviour, both against "nothing".

    Intervals draw seeds, then queries. Queries of one seed share its trainings, so that no test over queries would be
    one of methods: what training alone changes is a row of its own, and the seeds are shown.
    """
    names = [n for n in results[0]["after"] if n != NOTHING]
    loss, share = (float(_after(results, NOTHING, k).mean()) for k in ("loss", "behaves"))
    heads = ["dropped", "of them right", "rise of the loss a token", "by seed", "fall of the behaviour", "by seed"]
    rows = [heads, [NOTHING, "", f"(loss {loss:.3f})", "", f"({share:.0%} show it)", ""]]
    for n in sorted(names, key=lambda name: name != AGAIN):
        rise = _after(results, n, "loss") - _after(results, NOTHING, "loss")
        fall = _after(results, NOTHING, "behaves") - _after(results, n, "behaves")
        right = f"{np.mean([r['after'][n]['right'] / r['dropped'] for r in results]):.0%}" if n != AGAIN else ""
        cells = [_told(interval(rise, same_queries=False), ".3f"), " ".join(f"{v:.3f}" for v in rise.mean(axis=1))]
        cells += [_told(interval(fall, same_queries=False), ".0%"), " ".join(f"{v:.0%}" for v in fall.mean(axis=1))]
        rows.append([n if n in (AGAIN, CHANCE, RIGHT) else f"`{n}`", right, *cells])
    return rows


def with_the_share(results: Results) -> str:
    """How the rise of the loss goes with the share of right rows among the dropped, over the sets of a seed.

    Sets that several methods drop count once, and the right rows, of which it is known, do not.
    """
    found = []
    for r in results:
        sets = {tuple(sorted(x["rows"])): x for n, x in r["after"].items() if n not in (NOTHING, AGAIN, RIGHT)}
        right = [x["right"] / r["dropped"] for x in sets.values()]
        rise = [np.mean(x["loss"]) - np.mean(r["after"][NOTHING]["loss"]) for x in sets.values()]
        varies = len(sets) > 2 and np.ptp(right) > 0 and np.ptp(rise) > 0
        value = f"{np.corrcoef(right, rise)[0, 1]:.2f}" if varies else "none, since one of the two does not vary"
        found.append(f"{value} over {len(sets)} sets (seed {r['seed']})")
    return f"The rise and the share of right rows among the dropped: Pearson's r is {', '.join(found)}; no test."


def _after(results: Results, name: str, key: str) -> Values:
    return np.array([r["after"][name][key] for r in results], dtype=np.float64)


# ---------------------------------------------------------------- linear datamodeling score


class Estimate(NamedTuple):
    """The mean over seeds, its standard error, and the degrees of freedom of that."""

    value: float
    error: float
    freedom: int

    def interval(self) -> Interval:
        """95 %, by Student's t."""
        from scipy.stats import t

        wide = self.error * float(t.ppf(0.975, self.freedom))
        return Interval(self.value, self.value - wide, self.value + wide)

    def tested(self) -> Tested:
        """Against 0."""
        from scipy.stats import t

        far = abs(self.value) / self.error if self.error > 0 else np.inf
        return Tested(self.value, float(2 * t.sf(far, self.freedom)) if self.value else 1.0)


def estimate(ones: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]] | None = None) -> Estimate:
    """A score, or how far it is above another on the same half-sets; an entry a seed. Errors by the jackknife.

    The half-sets are what is drawn: all queries share them.
    """
    values = np.array([x["value"] for x in ones])
    without = np.array([x["without"] for x in ones])
    if others is not None:
        values, without = values - [x["value"] for x in others], without - [x["without"] for x in others]
    errors = np.array([standard_error(w) for w in without])
    seeds, sets = without.shape
    return Estimate(float(values.mean()), float(np.sqrt((errors**2).sum()) / seeds), seeds * (sets - 1))


def lds_rows(results: Results) -> Rows:
    """Each method's score under each view of the loss, the noise ceiling, and what knowing the class gets.

    Of LiSSA the runs of the suites alone, and not every step of a figure's sweep.

    R and B: better (+), worse (−) or not significantly different (=) from RepSim and BM25, at 5 % after Holm's
    correction over the table. Intervals and tests are by the jackknife over half-sets.
    """
    suites = set(runs("all"))
    told = [run for run in _shared(results) if run in suites or not run.startswith("lissa:")]
    table: dict[str, dict[str, str]] = {}
    for run, cell in _lds_cells({"": results}, told)[""].items():
        method, _, view = run.partition("@")
        table.setdefault(method, {})[view] = cell
    views = [*(v for v in VIEWS if any(v in cells for cells in table.values())), ""]
    rows = [["method", *(v or "no view" for v in views)]]
    rows += [[f"`{method}`", *(cells.get(v, "") for v in views)] for method, cells in table.items()]
    agreement = estimate([r["noise_ceiling"] for r in results]).interval()
    ends = {
        "knowing the class": estimate([r["knowing_the_class"] for r in results]).interval(),
        "noise: the two seeds of a half-set agree to r": agreement,
        "ceiling against one seed: √r": _mapped(agreement, np.sqrt),
        "ceiling against the mean of both, as here: √(2r/(1 + r))": _mapped(agreement, _of_two),
    }
    return rows + [[name, *("" for _ in views[1:]), _told(i, ".2f")] for name, i in ends.items()]


def lds_some(found: Mapping[str, Results], told: Sequence[tuple[str, str]]) -> Rows:
    """Some runs, `(name, run)`, a task a column, corrected over these; what knowing the class gets, and the ceiling."""
    columns = _lds_cells(found, [run for _, run in told])
    rows = [[f"{name} `{run}`", *(cells.get(run, "–") for cells in columns.values())] for name, run in told]
    known = (estimate([r["knowing_the_class"] for r in results]).interval() for results in found.values())
    agreed = (estimate([r["noise_ceiling"] for r in results]).interval() for results in found.values())
    rows.append(["knowing the class", *(_told(i, ".2f") for i in known)])
    rows.append(["the most that noise allows", *(_told(_mapped(i, _of_two), ".2f") for i in agreed)])
    heads = (f"{task} (the label shows on: {_shows(results)})" for task, results in found.items())
    return [["linear datamodeling score", *heads], *rows]


def matrix_rows(results: TaskResults, of_truth: Results, told: Sequence[tuple[str, str]]) -> Rows:
    """Runs, `(name, run)`, that need not be in every table: truth by label, by retraining, and what the solver left.

    results, of_truth: of the same seeds. A dash where a seed lacks a run; in place of a residual, why it failed there.
    """
    rows = [["", "AUROC", "top-1", "linear datamodeling score", "residual"]]
    for name, run in told:
        cells = ["–"] * 4
        there = [r["results"]["reference"].get(run, {"error": "not run"}) for r in results.results]
        if not any("error" in found for found in there):
            fixed = results.fixed(run)
            cells[:2] = (with_interval(results.interval(run, m), fixed=fixed) for m in ("auroc", "accuracy"))
            cells[3] = " ".join(_left(found["residual"]) for found in there if found.get("residual") is not None)
        else:
            cells[3] = " ".join(dict.fromkeys(found["error"] for found in there if "error" in found))
        if of_truth and all(run in r["lds"] for r in of_truth):
            cells[2] = _told(estimate([r["lds"][run] for r in of_truth]).interval(), ".2f")
        rows.append([f"{name} `{run}`", *cells])
    return [*rows, ["chance", *(f"{results.chance(m):.2f}" for m in ("auroc", "accuracy")), "0.00", ""]]


def _left(residual: float) -> str:
    """Of a solver: 0 is solved, 1 as good as nothing."""
    return f"{residual:.1g}" if residual <= UNSOLVED else f"{residual:.1g}: not solved"


def _shows(results: Results) -> str:
    return ", ".join(dict.fromkeys(str(r["shows"]) for r in results))


def _shared(results: Results) -> list[str]:
    """Runs that every seed has."""
    return [run for run in results[0]["runs"] if all(run in r["runs"] for r in results)]


def _lds_cells(found: Mapping[str, Results], told: Sequence[str]) -> dict[str, dict[str, str]]:
    """`{task: {run: score, interval and marks}}` of the runs that are told and all seeds have.

    The marks' tests are corrected over all that are told.
    """
    of = {task: {run: [r["lds"][run] for r in results] for run in _shared(results)} for task, results in found.items()}
    shown = {task: [run for run in cells if run in told] for task, cells in of.items()}
    tests = corrected(
        {
            (task, x, run): estimate(cells[run], cells[ref]).tested()
            for task, cells in of.items()
            for x, ref in REFERENCES.items()
            for run in shown[task]
            if ref in cells and run != ref
        }
    )

    def cell(task: str, run: str) -> str:
        marks = " ".join(f"{x}{_sign(tests[task, x, run])}" for x in REFERENCES if (task, x, run) in tests)
        return _told(estimate(of[task][run]).interval(), ".2f", marks)

    return {task: {run: cell(task, run) for run in runs} for task, runs in shown.items()}


def _of_two(r: float) -> float:
    """Against the mean of two trainings that correlate by r: `retraining.noise_ceiling`."""
    return float((2 * r / (1 + r)) ** 0.5)


def _mapped(r: Interval, f: Callable[[float], float]) -> Interval:
    """A rising function of a correlation; 0 where two seeds do not agree at all."""
    return Interval(*(float(f(min(max(x, 0.0), 1.0))) for x in r))


def _sign(test: Tested) -> str:
    return "=" if test.p >= 0.05 else "+" if test.value > 0 else "−"


def _told(i: Interval, form: str, marks: str = "") -> str:
    return f"{i.value:{form}} ({i.low:{form}} to {i.high:{form}}) {marks}".rstrip()
