"""Tables of retraining truth, over the seeds of one task: what removal did, and the linear datamodeling scores."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datablame.errors import UserError
from datablame.evaluation.intervals import TABLE_DRAWS, Interval, flip_test, interval
from datablame.evaluation.results import Tested, corrected
from datablame.evaluation.tables import REFERENCES, Rows, markdown
from datablame.evaluation.truth import CHANCE, NOTHING, RIGHT, Kind, is_old, read_truth
from datablame.evaluation.views import VIEWS

if TYPE_CHECKING:
    from jaxtyping import Float

    Values = Float[np.ndarray, "s m"]
    Results = Sequence[Mapping[str, Any]]

Tests = dict[tuple[str, str], Tested]
"""By what is tested and against what, and the run."""


def load_truth(
    out: str | Path, model: str, scale: str, kind: Kind
) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """`{task: results by seed}` of what is there, and a sentence for each that is left out, being of other rows.

    Raises UserError for seeds of one task that cannot be joined, being of other runs, numbers of rows or queries,
    recipes or models.
    """
    folder = Path(out) / Path(model).name / scale
    name = re.compile(rf"-sound-s\d+-{kind}$")
    found: dict[str, list[dict[str, Any]]] = {}
    notes: list[str] = []
    for path in sorted(p for p in folder.glob("*.json") if name.search(p.stem)):
        if (result := read_truth(path)) is None:
            continue
        if is_old(result):
            notes.append(
                f"{result['task']}: the {kind} result of seed {result['seed']} is left out, since the task has other "
                "rows, or another recipe, today. Run it again."
            )
        else:
            found.setdefault(result["task"], []).append(result)
    for task, results in found.items():
        results.sort(key=lambda r: r["seed"])
        kinds = [_kind(r) for r in results]
        if differs := [k for k in kinds[0] if any(other[k] != kinds[0][k] for other in kinds)]:
            raise UserError(
                f"{folder}: the {kind} results of {task} differ in {' and '.join(differs)} from seed to seed and "
                "cannot be joined. Make them again for all seeds at once."
            )
    return found, notes


def _kind(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the seeds of one task have in common."""
    same = {k: result.get(k) for k in ("runs", "queries", "rows", "model_sha256")}
    return same | {"recipe": {k: v for k, v in result.get("recipe_options", {}).items() if k != "seed"}}


def truth_rows(results: Results, kind: Kind) -> Rows:
    """The table of one task."""
    return removal_rows(results) if kind == "removal" else lds_rows(results)


def truth_title(results: Results, kind: Kind) -> str:
    """What the table of one task shows."""
    first = results[0]
    seeds = f"{'seeds' if len(results) > 1 else 'seed'} {', '.join(str(r['seed']) for r in results)}"
    if kind == "lds":
        return f"{first['task']}: {first['half_sets']} half-sets of {first['rows']} rows, each trained twice; {seeds}"
    asked = f"{first['queries']} queries of {' and '.join(dict.fromkeys(str(r['class']) for r in results))}"
    return f"{first['task']}: {first['dropped']} of {first['rows']} rows dropped, {asked}; {seeds}"


def truth_text(found: Mapping[str, Results], kind: Kind, notes: Sequence[str] = ()) -> str:
    """Markdown of all tasks, and the notes."""
    tables = [f"**{truth_title(r, kind)}**\n\n{markdown(truth_rows(r, kind))}" for r in found.values()]
    return "\n\n".join([*tables, *notes])


# ---------------------------------------------------------------- removal


def removal_rows(results: Results) -> Rows:
    """After dropping each run's top rows: rise of the queries' loss, fall of the behaviour, both against "nothing".

    C and R: more (+), less (−) or not significantly different (=) from dropping rows by chance and RepSim's rows, at
    5 % after Holm's correction over the table.
    """
    names = [n for n in results[0]["after"] if n != NOTHING]
    rise = {n: _after(results, n, "loss") - _after(results, NOTHING, "loss") for n in names}
    fall = {n: _after(results, NOTHING, "behaves") - _after(results, n, "behaves") for n in names}
    tests: Tests = {}
    for what, values in (("rise", rise), ("fall", fall)):
        tests |= _against(values, {"C": CHANCE, "R": REFERENCES["R"]}, what)
    tests = corrected(tests)
    loss, share = (float(_after(results, NOTHING, k).mean()) for k in ("loss", "behaves"))
    heads = ["dropped", "of them right", "rise of the loss a token", "by seed", "fall of the behaviour"]
    rows = [heads, [NOTHING, "", f"(loss {loss:.3f})", "", f"({share:.0%} show it)"]]
    for n in names:
        right = np.mean([r["after"][n]["right"] / r["dropped"] for r in results])
        seeds = " ".join(f"{v:.3f}" for v in rise[n].mean(axis=1))
        cells = [_told(_interval(rise[n]), ".3f", _marks(tests, "rise", n)), seeds]
        cells.append(_told(_interval(fall[n]), ".0%", _marks(tests, "fall", n)))
        rows.append([n if n in (CHANCE, RIGHT) else f"`{n}`", f"{right:.0%}", *cells])
    return rows


def _after(results: Results, name: str, key: str) -> Values:
    return np.array([r["after"][name][key] for r in results], dtype=np.float64)


# ---------------------------------------------------------------- linear datamodeling score


def lds_rows(results: Results) -> Rows:
    """Each method's score under each view of the loss, the noise ceiling, and what knowing the class gets.

    R and B: better (+), worse (−) or not significantly different (=) from RepSim and BM25, at 5 % after Holm's
    correction over the table.
    """
    values = {run: np.array([r["lds"][run]["queries"] for r in results]) for run in results[0]["runs"]}
    tests = corrected(_against(values, REFERENCES, "lds"))
    table: dict[str, dict[str, str]] = {}
    for run, v in values.items():
        method, _, view = run.partition("@")
        table.setdefault(method, {})[view] = _told(_interval(v), ".2f", _marks(tests, "lds", run))
    views = [*(v for v in VIEWS if any(v in cells for cells in table.values())), ""]
    rows = [["method", *(v or "no view" for v in views)]]
    rows += [[f"`{method}`", *(cells.get(v, "") for v in views)] for method, cells in table.items()]
    classes = _interval(np.array([r["knowing_the_class"]["queries"] for r in results]))
    agreement = _interval(np.array([r["noise_ceiling"]["queries"] for r in results]))
    ends = {
        "knowing the class": classes,
        "noise: the two seeds of a half-set agree to r": agreement,
        "ceiling against one seed: √r": _mapped(agreement, np.sqrt),
        "ceiling against the mean of both, as here: √(2r/(1 + r))": _mapped(
            agreement, lambda r: (2 * r / (1 + r)) ** 0.5
        ),
    }
    return rows + [[name, *("" for _ in views[1:]), _told(i, ".2f")] for name, i in ends.items()]


def _mapped(r: Interval, f: Callable[[float], float]) -> Interval:
    """A rising function of a correlation; 0 where two seeds do not agree at all."""
    return Interval(*(float(f(max(x, 0.0))) for x in r))


# ---------------------------------------------------------------- both


def _interval(values: Values) -> Interval:
    """Seeds, then queries within them, which differ from seed to seed."""
    return interval(values, same_queries=False)


def _against(values: Mapping[str, Values], references: Mapping[str, str], what: str) -> Tests:
    """Every run but the reference, paired with each reference that is there."""
    d = {
        (f"{what} {letter}", run): v - values[reference]
        for letter, reference in references.items()
        if reference in values
        for run, v in values.items()
        if run != reference
    }
    if not d:
        return {}
    p = flip_test(np.array([x.ravel() for x in d.values()]), draws=TABLE_DRAWS)
    return {key: Tested(float(x.mean()), float(q)) for (key, x), q in zip(d.items(), p, strict=True)}


def _marks(tests: Tests, what: str, run: str) -> str:
    """`C+ R=`."""
    here = {key.split()[1]: d for (key, r), d in tests.items() if r == run and key.split()[0] == what}
    return " ".join(f"{k}{'=' if d.p >= 0.05 else '+' if d.value > 0 else '−'}" for k, d in here.items())


def _told(i: Interval, form: str, marks: str = "") -> str:
    return f"{i.value:{form}} ({i.low:{form}} to {i.high:{form}}) {marks}".rstrip()
