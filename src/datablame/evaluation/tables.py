"""The benchmark's tables as Markdown: one a task with all metrics, the paper's Tables 2 to 4, the ladder."""

from __future__ import annotations

from collections.abc import Mapping

from datablame.evaluation.intervals import Difference
from datablame.evaluation.metrics import METRICS
from datablame.evaluation.results import TaskResults, against, corrected
from datablame.evaluation.suites import LADDER, REPSIM_LADDER

REPSIM, BM25 = "repsim:layer=last,text=prompt", "bm25:text=both"
"""What every method is tested against: the paper's best method, and words alone."""

PAPER_TABLES = {
    "table2": ("Harmful-data identification", ("mixed-small", "mixed-large", "mixed-hard")),
    "table3": ("Class attribution", ("harmfulcheck", "grammars", "mathqa")),
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


def task_rows(results: TaskResults, kind: str = "reference", group: str = "main") -> Rows:
    """All runs of one task: every metric with its interval, the seeds of the accuracy, what is significant."""
    runs, metric = results.runs, "auroc"
    tests: dict[tuple[str, str], Difference] = {}
    for name, reference in (("R", REPSIM), ("B", BM25)):
        if reference in runs and group == "main" and kind == "reference":
            tests |= {(name, run): d for run, d in against(results, runs, reference, metric).items()}
    marks = corrected(tests)
    rows = []
    for run in runs:
        cells = [_interval(results, run, m, kind, group) for m in METRICS]
        seeds = " ".join(f"{s:.2f}" for s in results.seeds(run, "accuracy", kind, group))
        rows.append([f"`{run}`", *cells, seeds, mark(marks, run)])
    chance = [f"{results.chance(m, group):.2f}" for m in METRICS]
    rows.append(["chance", *chance, "", ""])
    return [["run", *(HEADINGS[m] for m in METRICS), "top-1 by seed", "AUROC against RepSim, BM25"], *rows]


def mark(tests: Mapping[tuple[str, str], Difference], run: str) -> str:
    """`R+ B=`: better (+) or worse (−) than RepSim and BM25, significant at 5 % after Holm's correction, or not (=)."""
    out = []
    for name in ("R", "B"):
        if (name, run) in tests:
            d = tests[name, run]
            out.append(f"{name}{'=' if d.p >= 0.05 else '+' if d.value > 0 else '−'}")
    return " ".join(out)


def _interval(results: TaskResults, run: str, metric: str, kind: str, group: str) -> str:
    i = results.interval(run, metric, kind, group)
    form = ".1f" if metric == "mean_rank" else ".2f"
    return f"{i.value:{form}} ({i.low:{form}} to {i.high:{form}})"


def paper_rows(name: str, found: Mapping[str, TaskResults]) -> Rows:
    """Table 2, 3 or 4: top-1 accuracy / coverage in percent, both protocols, the paper's numbers where they survive."""
    there = [t for t in PAPER_TABLES[name][1] if t in found]
    if not there:
        return [["not run yet"]]
    runs = [r for r in found[there[0]].runs if all(r in found[t].runs for t in there)]
    tests: dict[tuple[str, str], Difference] = {}
    for task in there:
        for letter, reference in (("R", REPSIM), ("B", BM25)):
            if reference in runs:
                found_here = against(found[task], runs, reference, "accuracy")
                tests |= {(f"{task} {letter}", run): d for run, d in found_here.items()}
    marks = corrected(tests)
    printed = PAPER_NUMBERS.get(name, {})
    rows = []
    for run in runs:
        cells = []
        for task in there:
            here = {(k.split()[1], r): d for (k, r), d in marks.items() if k.split()[0] == task}
            accuracy, coverage = (100 * found[task].values(run, m).mean() for m in ("accuracy", "coverage"))
            low, high = (100 * x for x in found[task].interval(run, "accuracy")[1:])
            cells.append(f"{accuracy:.0f} ({low:.0f} to {high:.0f}) / {coverage:.0f} {mark(here, run)}".rstrip())
        rows.append([f"`{run}`", *cells, *(printed.get(run, {}).get(t, "") for t in there if printed)])
    chance = [f"{100 * found[t].chance('accuracy'):.0f} / {100 * found[t].chance('coverage'):.0f}" for t in there]
    rows.append(["chance", *chance, *("" for _ in there if printed)])
    heads = [t if found[t].learnt else f"{t} (behaviour not learnt)" for t in there]
    return [["run", *heads, *(f"paper: {t}" for t in there if printed)], *rows]


def ladder_rows(found: Mapping[str, TaskResults], metric: str = "auroc") -> Rows:
    """From the paper's protocol to the sound one, a step a row, a task a column."""
    tasks = list(found)
    rows = []
    for heading, ladder in (("gradients", LADDER), ("hidden states and controls", REPSIM_LADDER)):
        rows.append([heading, *("" for _ in tasks)])
        for step, run in ladder:
            cells = [
                _interval(found[t], run, metric, "reference", "main") if run in found[t].runs else "–" for t in tasks
            ]
            rows.append([f"{step} `{run}`", *cells])
    rows.append(["chance", *(f"{found[t].chance(metric):.2f}" for t in tasks)])
    return [[f"step ({HEADINGS[metric]})", *tasks], *rows]
