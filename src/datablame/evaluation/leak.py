"""How much of a task's truth words alone give away, and on which side: what a method must beat to mean anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

from datablame.evaluation.metrics import auroc
from datablame.evaluation.tasks.base import Task

if TYPE_CHECKING:
    from datablame.models import Loaded

SHOWS = 0.8
"""The label shows on a side where BM25 from that side has an AUROC above this."""


def lexical_leak(task: Task) -> dict[str, float | str]:
    """AUROC of BM25 from the `prompt` and from the `response`, over the queries of the main groups.

    `shows`: the side on which the label shows, `prompt`, `response`, `both` or `neither` (AUROC above `SHOWS`).
    The queries have their reference responses.
    """
    from datablame.methods import Text, create

    main = _main(task)
    train = [Text(e.prompt, e.response) for e in task.train]
    queries = [Text(task.queries[i].prompt, task.queries[i].response) for i in main]
    sides = ("prompt", "response")
    scores = {s: create("bm25", text=s).fit(train).score(queries).numpy() for s in sides}
    leak = {s: float(auroc(scores[s], task.truth[main]).mean()) for s in sides}
    showing = [s for s in sides if leak[s] > SHOWS]
    return {**leak, "shows": "both" if len(showing) == 2 else (showing or ["neither"])[0]}


def hidden_leak(task: Task, base: Loaded) -> dict[str, float]:
    """AUROC of RepSim from the `prompt` and from the `response`, middle layer, on a model that was not fine-tuned.

    Over the queries of the main groups, with their reference responses.
    """
    from datablame.capture import capture, parse_layers
    from datablame.encoding import Encoding, encode_rows
    from datablame.methods import create

    main = _main(task)
    encoder, layers = Encoding(base.tokenizer, None, base.max_length), parse_layers(base.model, "middle,last")
    train, queries = (
        {name.removeprefix("hidden/"): x for name, x in found.items() if name.startswith("hidden/")}
        for found in (
            capture(base.model, encode_rows(encoder, rows), {}, layers)
            for rows in (task.train, [task.queries[i] for i in main])
        )
    )
    scores = {s: create("repsim", text=s).fit(train).score(queries).numpy() for s in ("prompt", "response")}
    return {s: float(auroc(x, task.truth[main]).mean()) for s, x in scores.items()}


def _main(task: Task) -> list[int]:
    """Positions of the queries of the main groups."""
    return [i for i, group in enumerate(task.groups) if group in task.main]
