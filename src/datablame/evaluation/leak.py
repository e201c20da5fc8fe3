"""How much of a task's truth words alone give away, and on which side: what a method must beat to mean anything."""

from __future__ import annotations

from datablame.evaluation.metrics import auroc
from datablame.evaluation.tasks.base import Task

SHOWS = 0.8
"""The label shows on a side where BM25 from that side has an AUROC above this."""


def lexical_leak(task: Task) -> dict[str, float | str]:
    """AUROC of BM25 from the `prompt` and from the `response`, over the queries of the main groups.

    `shows`: the side on which the label shows, `prompt`, `response`, `both` or `neither` (AUROC above `SHOWS`).
    The queries have their reference responses.
    """
    from datablame.methods import Text, create

    main = [i for i, group in enumerate(task.groups) if group in task.main]
    train = [Text(e.prompt, e.response) for e in task.train]
    queries = [Text(task.queries[i].prompt, task.queries[i].response) for i in main]
    sides = ("prompt", "response")
    scores = {s: create("bm25", text=s).fit(train).score(queries).numpy() for s in sides}
    leak = {s: float(auroc(scores[s], task.truth[main]).mean()) for s in sides}
    showing = [s for s in sides if leak[s] > SHOWS]
    return {**leak, "shows": "both" if len(showing) == 2 else (showing or ["neither"])[0]}
