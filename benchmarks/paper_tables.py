"""The tables of the paper's experiments: results/paper/*.json, of those that are not printed as their page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datablame.evaluation import tables as bench_tables
from datablame.paper import figure4 as iterations
from datablame.paper import figure5 as convergence
from datablame.paper import figure7 as widths
from datablame.paper import table5 as paper
from datablame.paper.figure3 import spread


def table5(r: dict[str, Any]) -> str:
    """Seconds, and the errors against the empirical Fisher, the paper's in brackets."""

    def beside(ours: str, theirs: float | None) -> str:
        return ours if theirs is None else f"{ours} ({theirs:g})"

    def seconds(s: dict[str, Any], m: str) -> str:
        if m == "d × d":
            return beside(paper.number(s["dense_seconds"]), paper.of_paper(s, "seconds", "fisher"))
        theirs = None if m == "fisher" else paper.of_paper(s, "seconds", m)  # the paper's exact one is the d × d route
        return beside(paper.number(s["methods"][m]["seconds"]), theirs)

    def errors(s: dict[str, Any], m: str) -> str:
        e = s["methods"][m]["errors"]["fisher"]
        return beside(f"{paper.mean(e['raw'])} · {spread(e['scaled'])}", paper.of_paper(s, "error", m))

    timed = [m for m, x in r["settings"][0]["methods"].items() if x["seconds"] is not None]
    told = [m for m, x in r["settings"][0]["methods"].items() if "fisher" in x["errors"]]
    return "\n\n".join(
        [
            _grid(r, "seconds (the paper's)", ["d × d", *timed], seconds),
            _grid(r, "error against the Fisher, raw · scaled (the paper's)", told, errors),
            f"{r['machine']}, {r['threads']} thread(s), {r['run']['protocol']['queries']} queries; errors are means "
            f"over {len(r['run']['protocol']['subsets'])} subsets. `{r['command']}`",
        ]
    )


def figure3(r: dict[str, Any]) -> str:
    """Errors after the best factor against the references that the paper does not have, with half intervals."""

    def errors(reference: str) -> Callable[[dict[str, Any], str], str]:
        def cell(s: dict[str, Any], m: str) -> str:
            e = s["methods"][m]["errors"].get(reference)
            return spread(e["scaled"]) if e else "–"

        return cell

    names = list(r["settings"][0]["methods"])
    words = {"hessian": "the true Hessian", "objective": "the objective's Hessian", "left out": "leaving out"}
    return "\n\n".join(_grid(r, f"against {words[x]}", [m for m in names if m != x], errors(x)) for x in words)


def residuals(r: dict[str, Any]) -> str:
    """What LiSSA's steps achieve, and why: the spectrum."""
    steps = [m for m in r["settings"][0]["methods"] if m.startswith("lissa") and not m.endswith("inf")]
    rows = {f"residual, {paper.NAMES[m]}": lambda s, m=m: paper.mean(s["methods"][m]["residual"]) for m in steps}
    rows |= {
        "largest eigenvalue's share of the trace": lambda s: f"{s['layer']['largest_share']['mean']:.0%}",
        "condition number of the damped Fisher": lambda s: paper.mean(s["layer"]["condition"]),
        "mean training loss": lambda s: paper.mean(s["layer"]["training_loss"]),
        "accuracy on the queries": lambda s: f"{s['layer']['query_accuracy']['mean']:.0%}",
    }
    return _grid(r, "", list(rows), lambda s, name: rows[name](s))


def _grid(r: dict[str, Any], corner: str, names: list[str], cell: Callable[[dict[str, Any], str], str]) -> str:
    """Methods down, settings across."""
    heads = [f"{s['points']:,} points, {s['parameters']:,}" for s in r["settings"]]
    lines = [f"| {corner} | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    lines += [f"| {paper.NAMES.get(n, n)} | {' | '.join(cell(s, n) for s in r['settings'])} |" for n in names]
    return "\n".join(lines)


def figure7(r: dict[str, Any]) -> str:
    """The page's tables, and its verdicts."""
    tables = [f"**{t.title}**\n\n{bench_tables.markdown([t.headings, *t.rows])}" for t in widths.tables(r)]
    apart = widths.told_apart(r)
    verdicts = [f"- {widths.verdict(s, apart)}" for s in r["settings"]]
    where = f"{r['machine']}, {r['threads']} thread(s), {len(r['run']['protocol']['seeds'])} seeds. `{r['command']}`"
    return "\n\n".join([*tables, "\n".join([*verdicts, *(f"- {s}" for s in widths.stops(r))]), where])


def figure4(r: dict[str, Any]) -> str:
    """Both metrics and the residual after some iterations, and of the solutions, with the tests."""
    some = (1, 10, 1000, 100_000)
    ends = {"solved": iterations.SOLVED, "joint": iterations.JOINT, "damped": iterations.DAMPED}
    last = {"RepSim": iterations.REPSIM, "BM25": iterations.BM25}
    tables = []
    for metric, name in {**iterations.METRICS, "residual": "residual"}.items():
        rows = [[f"{name}: task, curve", *(f"{k:,}" for k in some), *ends, *last, "chance"]]
        for task, x in r["tasks"].items():
            for curve, steps in iterations.CURVES.items():
                wanted = [*(steps.get(k, "") for k in some), *(of.get(curve, "") for of in ends.values())]
                cells = [_value(x["runs"], run, metric) for run in [*wanted, *last.values()]]
                chance = f"{x['chance'][metric]:.2f}" if metric in x["chance"] else ""
                rows.append([f"{task}, {curve}", *cells, chance])
        tables.append(bench_tables.markdown(rows))
    for metric in iterations.METRICS:
        asked = iterations.differences(r, metric)
        tables.append(f"{asked.title}\n\n{bench_tables.markdown([asked.headings, *asked.rows])}")
    words = [iterations.reading(r, task, view) for task in r["tasks"] for view in iterations.VIEWS]
    return "\n\n".join(
        [
            *tables,
            "\n".join(f"- {w}" for w in words),
            _foot(r),
        ]
    )


def figure5(r: dict[str, Any]) -> str:
    """Accuracy at the first, a middle and the last checkpoint, a task, loss and method a row, with ρ and the test."""
    rows = [["task, loss", "method", "first", "middle", "last", "ρ with the falling loss", "last − first"]]
    for task, x in r["tasks"].items():
        points = x["checkpoints"]
        ends = points[0], points[len(points) // 2], points[-1]
        losses = [f"{p['loss']['train']['tuned']:.2f} (step {p['step']})" for p in ends]
        rows.append([task, "training loss", *losses, "", ""])
        for k, view in enumerate(convergence.VIEWS):
            for method, runs in convergence.METHODS.items():
                cells = [_value(p["runs"], runs[k]) for p in ends]
                rho = x["correlation"][runs[k]]["accuracy"]
                test = convergence.change(r, task, runs[k])
                rows.append([f"{task}, {view}", method, *cells, "–" if rho is None else f"{rho:+.2f}", test])
        rows.append([task, "BM25", _value(points[0]["runs"], convergence.BM25), "", "", "", ""])
    left_out = [f"\n\n{note}" for note in r["left_out"]]
    return f"{bench_tables.markdown(rows)}\n\n{_foot(r)}{''.join(left_out)}"


def figure5_auroc(r: dict[str, Any]) -> str:
    """AUROC at the first and the last checkpoint, a loss and method a row, a task a column; *: told apart."""
    tasks = r["tasks"]
    rows = [["AUROC, first → last checkpoint", *tasks]]
    ends = {t: (x["checkpoints"][0], x["checkpoints"][-1]) for t, x in tasks.items()}
    rows.append(
        ["training loss", *(" → ".join(f"{p['loss']['train']['tuned']:.2f}" for p in e) for e in ends.values())]
    )
    for k, view in enumerate(convergence.VIEWS):
        for method, runs in convergence.METHODS.items():
            rows.append([f"{view}: {method} `{runs[k]}`", *(_ends(r, t, e, runs[k]) for t, e in ends.items())])
    rows.append(["BM25", *(f"{e[0]['runs'][convergence.BM25]['auroc']['value']:.2f}" for e in ends.values())])
    left_out = [f"\n\n{note}" for note in r["left_out"]]
    return f"{bench_tables.markdown(rows)}\n\n{_foot(r)}{''.join(left_out)}"


def _ends(r: dict[str, Any], task: str, ends: tuple[dict[str, Any], dict[str, Any]], run: str) -> str:
    if any(run not in p["runs"] for p in ends):
        return "–"
    star = "*" if "*" in convergence.change(r, task, run, "auroc") else ""
    return " → ".join(f"{p['runs'][run]['auroc']['value']:.2f}" for p in ends) + star


def _value(runs: dict[str, Any], run: str, metric: str = "accuracy") -> str:
    """With its interval, where it has one; a dash where the run has no such number."""
    x = runs.get(run, {}).get(metric)
    if x is None:
        return "–" if run else ""
    if "interval95" not in x:
        return f"{x['value']:.2g}"
    if x["interval95"] is None:
        return f"{x['value']:.2f} {bench_tables.SAME}"
    return f"{x['value']:.2f} ({x['interval95'][0]:.2f} to {x['interval95'][1]:.2f})"


def _foot(r: dict[str, Any]) -> str:
    return f"{r['machine']}, {r['threads']} thread(s). `{r['command']}`"
