"""Write the results of benchmarks/results/*.json into the pages, between `<!-- table: NAME -->` and `<!-- end -->`.

python benchmarks/tables.py           write them
python benchmarks/tables.py --check   exit 1 when a page differs from its JSON
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from datablame.evaluation import tables as bench_tables
from datablame.evaluation import truth_tables
from datablame.evaluation.cell import RECIPES
from datablame.evaluation.results import TaskResults, by_class, load_results
from datablame.evaluation.suites import (
    APPROXIMATION,
    DAMPING,
    EXACTNESS,
    MATRICES,
    OPENING,
    PROTOCOL,
    RETRAINED,
    STEPS,
    WHICH_SIDE,
)
from datablame.evaluation.truth import KINDS
from datablame.paper import experiment, module
from datablame.report.bench import BASE
from methods_tables import captures, curvatures, methods, unrolled  # noqa: F401
from paper_tables import figure3, figure4, figure5, figure5_auroc, figure7, residuals, table5  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
MARK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.S)
FILES = {
    **dict.fromkeys(("table5", "figure3", "residuals"), "paper/table5"),
    "figure4": "paper/figure4",
    **dict.fromkeys(("figure5", "figure5_auroc"), "paper/figure5"),
    "figure7": "paper/figure7",
    **dict.fromkeys(("captures", "curvatures", "unrolled"), "methods"),
}
"""Tables whose result has another name."""


SHOWN = ("table1", "table6", "figure6", "figure8")
"""Tables that are pages of `datablame paper show` as they are."""


def demo(r: dict[str, Any]) -> str:
    """Planted rows found in the top 12."""
    queries = list(next(iter(r["methods"].values()))["found_of_12"])
    lines = [
        "| method | " + " | ".join(queries) + " | recall (95 % interval) |",
        "|---|" + "---|" * (len(queries) + 1),
    ]
    for method, m in r["methods"].items():
        low, high = m["interval95"]
        counts = " | ".join(str(m["found_of_12"][q]) for q in queries)
        lines.append(f"| `{method}` | {counts} | {m['recall']:.2f} ({low:.2f} to {high:.2f}) |")
    return "\n".join(
        [
            *lines,
            "",
            f"Chance is {r['chance_recall']:.2f}. {r['training_rows']} rows, {r['seconds']} s, {r['machine']}.",
        ]
    )


def capture(r: dict[str, Any]) -> str:
    """Speed of capture."""
    rate, ratio = r["tokens_per_second"], r["ratios"]
    lines = ["| way | tokens/s (median) | capture is … times as fast |", "|---|---|---|"]
    names = {
        "capture": "capture: all per-example gradients and hidden states",
        "plain": "plain batched forward and backward, nothing kept",
        "loop": "one row at a time, padded to 128 tokens, all logits (the paper's code)",
        "bare": "the same loop without the padding",
    }
    for way, words in names.items():
        ratio_of = ratio.get(f"capture_over_{way}")
        shown = f"{ratio_of['median']:.2f} ({ratio_of['lowest']:.2f} to {ratio_of['highest']:.2f})" if ratio_of else "1"
        lines.append(f"| {words} | {rate[way]:.0f} | {shown} |")
    where = f"{r['rows']} rows, {r['unpadded_tokens']} tokens of {r['data']}, {r['blocks']} blocks, {r['machine']}"
    return "\n".join([*lines, "", f"{where}; peak memory {r['peak_memory_gb_after_capture']:.1f} GB."])


def scoring(r: dict[str, Any]) -> str:
    """Seconds of the methods on gradients, and of the loops that they replace."""
    lines = ["| method | seconds | the released loop, seconds |", "|---|---|---|"]
    for m in r["methods"].values():
        lines.append(f"| `{m['spec']}` | {m['seconds']:.1f} | {m['loop_seconds_extrapolated']:.0f} |")
    lines += [f"| `{name}` | {seconds:.1f} | – |" for name, seconds in r["seconds_beside"].items()]
    size = f"{r['rows']} rows, {r['queries']} queries, {r['blocks']} blocks, {r['numbers_a_row']} numbers a row"
    return "\n".join([*lines, "", f"{size}; {r['machine']}; peak memory {r['peak_memory_gb']:.1f} GB."])


def projection(r: dict[str, Any]) -> str:
    """Errors of projected scores, and the rank correlation, by the numbers kept."""
    dims = sorted({e["dim"] for e in r["errors"]})
    lines = [f"| method, projection | {' | '.join(f'dim={d}' for d in dims)} |", "|---|" + "---|" * len(dims)]
    for method, kind in dict.fromkeys((e["method"], e["projection"]) for e in r["errors"]):
        of = {e["dim"]: e for e in r["errors"] if (e["method"], e["projection"]) == (method, kind)}
        cells = [f"{of[d]['error']:.2f} ± {of[d]['error_sd']:.2f} ({of[d]['spearman']:.2f})" for d in dims]
        lines.append(f"| `{method}`, {kind} | {' | '.join(cells)} |")
    size = f"{r['rows']} rows, {r['queries']} queries, {r['blocks']} blocks, {r['numbers_a_row']} numbers a row"
    what = f"`‖S − E‖/‖E‖` ± its standard deviation over {r['seeds']} seeds (in brackets Spearman's correlation)"
    return "\n".join([*lines, "", f"{what}; {size}."])


def smoke(r: dict[str, Any]) -> str:
    """What the smoke scale takes from an empty cache."""
    took = f"`{r['timed']}`: {r['seconds'] / 60:.1f} minutes on {r['machine']}, alone"
    return f"{took}; peak memory {r['peak_memory_gb']:.1f} GB. (`{r['command']}`)"


smoke_bench = smoke_paper = smoke


def learnt(found: dict[str, TaskResults]) -> str:
    """What each fine-tune taught, and on which side words show the label."""
    head = [
        "task",
        "rows",
        "seeds",
        "learnt",
        "answers as their class asks (base)",
        "least of a class",
        "exactly the reference (base)",
        "loss a token (base)",
        "AUROC of BM25: prompt, response; the label shows on",
        "of the base model's hidden states",
    ]
    rows = [head]
    for results in found.values():
        r = _every(results)
        share, exact, loss = [
            " · ".join(f"{x['learnt'][k]['tuned']:{form}} ({x['learnt'][k]['base']:{form}})" for x in r)
            for k, form in (("behaves", ".0%"), ("exact", ".0%"), ("loss", ".2f"))
        ]
        least = " · ".join(f"{min(by_class(x).values()):.0%}" for x in r)
        leak = " · ".join(f"{x['leak']['prompt']:.2f}, {x['leak']['response']:.2f}: {x['leak']['shows']}" for x in r)
        there = replace(results, results=r)
        base = " · ".join(f"{s:.2f}" for s in (there.seeds(BASE, "auroc") if BASE in there.runs else []))
        rows.append(
            [
                results.task,
                str(r[0]["rows"]),
                ", ".join(str(x["seed"]) for x in r),
                " · ".join("yes" if x["learnt"]["learnt"] else "**no**" for x in r),
                share,
                least,
                exact,
                loss,
                leak,
                base,
            ]
        )
    notes = [f"\n\n{note}" for results in found.values() for note in results.left_out]
    return bench_tables.markdown(rows) + "".join(notes)


def _every(results: TaskResults) -> list[dict[str, Any]]:
    """Failed runs with the others."""
    return sorted([*results.results, *results.unlearnt], key=lambda r: r["seed"])


STAGES = {
    "tune": "fine-tune",
    "answers": "answers",
    "features": "features",
    "scores": "scores",
    "costly": "features of their own",
}


def hours(by_recipe: dict[str, dict[str, TaskResults]]) -> str:
    """Hours of all cells by stage, a recipe a row: the sum over cells, whatever ran side by side."""
    cells = {recipe: [r for t in found.values() for r in _every(t)] for recipe, found in by_recipe.items()}
    cells = {recipe: c for recipe, c in cells.items() if c}
    every = [r for c in cells.values() for r in c]
    if not every:
        return "*Not run yet.*"
    rows = [["fine-tunes", "cells", *(f"{name}, h" for name in STAGES.values()), "all, h"]]
    for name, results in {**cells, "all": every}.items():
        seconds = [sum(r["seconds"].get(stage, 0.0) for r in results) for stage in STAGES]
        rows.append([name, str(len(results)), *(f"{s / 3600:.2f}" for s in (*seconds, sum(seconds)))])
    machines = " and ".join(sorted({r["machine"] for r in every}))
    threads = " or ".join(str(t) for t in sorted({r["threads"] for r in every}))
    return f"{bench_tables.markdown(rows)}\n\n{machines}; {threads} thread(s) a process. {_retrained()}"


def _retrained() -> str:
    """What retraining took, as far as it was timed."""
    found = [truth_tables.load_truth(RESULTS / "bench", "smollm2-135m", "cpu", kind)[0] for kind in KINDS]
    results = [r for tasks in found for of_task in tasks.values() for r in of_task]
    done, timed = (sum(r[key] for r in results) for key in ("trainings", "timed"))
    took = sum(r["seconds"] for r in results) / 3600
    all_of_them = f"{took / timed * done:.0f} h" if timed else ""
    told = f"; the {timed} that were timed took {took:.1f} h, at which all would take {all_of_them}" if timed else ""
    return f"Retraining: {done} trainings for {len(results)} results{told}."


def costly(found: dict[str, TaskResults]) -> str:
    """Methods on features of their own: every task that has them."""
    told = {r.heading: (bench_tables.shows(r), bench_tables.costly_rows(r)) for r in found.values()}
    there = [
        f"{heading} (the label shows on: {sides})\n\n{bench_tables.markdown(rows)}"
        for heading, (sides, rows) in told.items()
        if rows
    ]
    return "\n\n".join(there) or "*Not run yet.*"


def damping(found: dict[str, TaskResults]) -> str:
    """What λ does, for the tasks and seeds that have it."""
    runs = {run for ladder in DAMPING.values() for _, run in ladder}
    there = {}
    for task, results in found.items():
        seeds = [r["seed"] for r in results.results if runs <= set(r["results"]["reference"])]
        there |= {task: results.of_seeds(seeds)} if seeds else {}
    if not there:
        return "*Not run yet.*"
    tables = [bench_tables.markdown(bench_tables.ladder_rows(there, m, DAMPING)) for m in ("auroc", "accuracy")]
    return "\n\n".join([*tables, f"Seeds: {'; '.join(f'{t}: {_seeds(r)}' for t, r in there.items())}."])


def _seeds(results: TaskResults) -> str:
    return ", ".join(str(r["seed"]) for r in results.results)


def matrices() -> str:
    """The three matrices on the task and seed that have them."""
    task, seed = "mixed-small", 0
    results = _found(RESULTS, "sound").get(task)
    truth, _ = truth_tables.load_truth(RESULTS / "bench", "smollm2-135m", "cpu", "lds")
    of_seed = [r for r in truth.get(task, []) if r["seed"] == seed]
    there = results.of_seeds([seed]) if results else None
    if there is None or not there.costly or not of_seed:
        return "*Not run yet.*"
    rows = truth_tables.matrix_rows(there, of_seed, MATRICES)
    return f"{bench_tables.markdown(rows)}\n\n`{task}`, seed {seed}."


def joined(told: Sequence[tuple[str, str]]) -> str:
    """Some runs on both truths side by side, for a reader who sees one table; of tasks that a seed has learnt."""
    every = _found(RESULTS, "sound")
    found = {task: t for task, t in every.items() if any(r["learnt"]["learnt"] for r in t.results)}
    truth, _ = truth_tables.load_truth(RESULTS / "bench", "smollm2-135m", "cpu", "lds")
    truth = {task: results for task, results in truth.items() if task in found}
    if not truth:
        return "*Not run yet.*"
    same = {task: found[task].of_seeds([r["seed"] for r in results]) for task, results in truth.items()}
    heads, sides, *kinds = bench_tables.headline_rows(found, told=told)
    tasks = bench_tables.ladder_rows(same, ladders={"": told}, steps=False)[-len(kinds) :]
    _, *halves, knowing, ceiling = truth_tables.lds_some(truth, told)
    of_truth = [x for t in truth for x in (bench_tables.shows(same[t]), "")]
    rows = [["", *heads[1:], *(f"{t}: {what}" for t in truth for what in ("by label", "by retraining"))]]
    rows.append([*sides, *of_truth])
    for name, of_kinds, of_tasks, of_halves in zip(
        (*(name for name, _ in told), "chance"),
        kinds,
        tasks,
        (*halves, ["", *("0.00" for _ in truth)]),
        strict=True,
    ):
        both = (cell for pair in zip(of_tasks[1:], of_halves[1:], strict=True) for cell in pair)
        rows.append([name, *of_kinds[1:], *both])
    for name, *cells in (knowing, ceiling):
        rows.append([name, *("" for _ in heads[1:]), *(x for cell in cells for x in ("", cell))])
    seeds = "; ".join(f"{task} {_seeds(results)}" for task, results in found.items())
    halved = "; ".join(f"{task} {_seeds(results)}" for task, results in same.items())
    return f"{bench_tables.markdown(rows)}\n\nSeeds of the kinds: {seeds}. Of {' and '.join(truth)} alone: {halved}."


def answered(found: dict[str, TaskResults]) -> str:
    """The opening's runs on the model's own answers."""
    there = {task: results for task, results in found.items() if results.answered}
    return bench_tables.markdown(bench_tables.headline_rows(there, told=OPENING, kind="generated"))


BENCH: dict[str, Callable[[dict[str, TaskResults]], str]] = {
    "learnt": learnt,
    "damping": damping,
    "costly": costly,
    "headline": lambda found: bench_tables.markdown(bench_tables.headline_rows(found)),
    "headline_top1": lambda found: bench_tables.markdown(bench_tables.headline_rows(found, "accuracy")),
    "answered": answered,
    "exactness": lambda found: bench_tables.markdown(bench_tables.headline_rows(found, told=EXACTNESS)),
    "exactness_top1": lambda found: bench_tables.markdown(bench_tables.headline_rows(found, "accuracy", EXACTNESS)),
    "which_side": lambda found: bench_tables.markdown(bench_tables.ladder_rows(found, "accuracy", WHICH_SIDE)),
    "ladder": lambda found: bench_tables.markdown(bench_tables.ladder_rows(found)),
    **{
        n: lambda found, n=n: bench_tables.markdown(bench_tables.paper_rows(n, found, OPENING))
        for n in bench_tables.PAPER_TABLES
    },
}
"""Tables of the benchmark's results, `benchmarks/results/bench/`, under the sound recipe; `NAME_paper`: the paper's."""


SOME = {"lds_some": RETRAINED, "lds_steps": STEPS}
"""Some runs against retraining on half-sets."""
JOINED = {
    "opening": lambda: joined(OPENING),
    "protocol": lambda: joined(PROTOCOL),
    "approximation": lambda: joined(APPROXIMATION),
    "matrices": matrices,
}
"""Tables of labels and of retraining together."""


@cache
def _found(folder: Path, recipe: str) -> dict[str, TaskResults]:
    """Empty where nothing has been run."""
    there = any((folder / "bench" / "smollm2-135m" / "cpu").glob(f"*-{recipe}-s*.json"))
    return load_results(folder / "bench", "smollm2-135m", "cpu", recipe) if there else {}


def _bench(name: str) -> str | None:
    """A table of the benchmark; None where the name is not of one."""
    if name == "hours":
        return hours({recipe: _found(RESULTS, recipe) for recipe in RECIPES})
    plain, of_paper, _ = name.partition("_paper")
    if plain not in BENCH:
        return None
    found = _found(RESULTS, "paper" if of_paper else "sound")
    return BENCH[plain](found) if found else "*Not run yet.*"


def render(text: str) -> str:
    """The page with its tables as the JSON files say now."""

    def table(match: re.Match[str]) -> str:
        name = match[2]
        if (drawn := _bench(name)) is not None:
            return f"{match[1]}{drawn}\n{match[3]}"
        if name in SOME:
            found, _ = truth_tables.load_truth(RESULTS / "bench", "smollm2-135m", "cpu", "lds")
            rows = truth_tables.lds_some(found, SOME[name])
            return f"{match[1]}{bench_tables.markdown(rows) if found else '*Not run yet.*'}\n{match[3]}"
        if name in JOINED:
            return f"{match[1]}{JOINED[name]()}\n{match[3]}"
        if name in ("removal", "lds"):
            return f"{match[1]}{retraining(name)}\n{match[3]}"
        if name == "table6_ranked":
            return f"{match[1]}{shown('table6', 2)}\n{match[3]}"
        if name in SHOWN:
            return f"{match[1]}{shown(name)}\n{match[3]}"
        path = RESULTS / f"{FILES.get(name, name)}.json"
        if not path.exists():
            return f"{match[1]}*Not run yet.*\n{match[3]}"
        result = json.loads(path.read_text(encoding="utf-8"))
        return f"{match[1]}{globals()[name](result)}\n{match[3]}"

    return MARK.sub(table, text)


def main() -> None:
    """Write or check."""
    stale = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if (new := render(text)) != text:
            stale.append(page.name)
            if "--check" not in sys.argv:
                page.write_text(new, encoding="utf-8")
    if stale and "--check" in sys.argv:
        sys.exit(f"{', '.join(stale)}: differ from benchmarks/results; run python benchmarks/tables.py")
    print("written: " + ", ".join(stale) if stale else "all tables are up to date")


def shown(name: str, only: int | None = None) -> str:
    """The tables and the findings of a page of `datablame paper show`; of one model, the table of this number alone."""
    folder = RESULTS / "paper"
    if not (folder / experiment(name).result).exists():
        return "*Not run yet.*"
    page = module(name).show(folder, name)
    if only is not None:
        t = page.tables[only]
        return f"{t.title}\n\n{bench_tables.markdown([t.headings, *t.rows])}"
    parts = [f"{t.title}:\n\n{bench_tables.markdown([t.headings, *t.rows])}" for t in page.tables]
    return "\n\n".join([*parts, *(f"- {note}" for note in page.notes), f"`{page.command}`"])


def retraining(kind: str) -> str:
    """Methods against retraining: every task that has it."""
    found, notes = truth_tables.load_truth(RESULTS / "bench", "smollm2-135m", "cpu", kind)
    return truth_tables.truth_text(found, kind, notes) if found or notes else "*Not run yet.*"


if __name__ == "__main__":
    if "--help" in sys.argv:
        print(__doc__)
        sys.exit()
    main()
