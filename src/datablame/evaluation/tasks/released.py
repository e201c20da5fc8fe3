"""The grammars and math files released with the paper, read from a directory that the user has (`data=`).

They are `grammars.train.jsonl`, `grammars.test.jsonl` and the same for `math`: `prompt`, `response`, `label`. In
grammars the response *is* the class's name, so that the response gives the class away: the paper's text has the
model perform the transformation instead (see grammars.py). Departure: none at scale `paper`, but for the order of
the training rows; every seed asks the same queries there, in the same order.
"""

from __future__ import annotations

import random
from pathlib import Path

from datablame.errors import UserError
from datablame.evaluation.tasks.base import Task, examples, recipe, same_but_for_numbers, same_label, shuffled
from datablame.examples import Example, load_examples

SIZES: dict[str, tuple[int | None, int | None]] = {"paper": (None, None), "cpu": (12, 4), "smoke": (2, 1)}
"""rows and queries of each class; None: all"""


def of_each_class(path: Path, count: int | None, rng: random.Random) -> list[tuple[str, str, str]]:
    """`count` rows of every class, classes in the file's order, no row twice. count: None for the file as it is."""
    classes: dict[str, list[tuple[str, str]]] = {}
    for e in load_examples(path):
        if e.label is None:
            raise UserError(f"{path}, row {e.row}: no label. The released files have prompt, response and label.")
        classes.setdefault(e.label, []).append((e.prompt, e.response))
    out = []
    for label, pairs in classes.items():
        different = list(dict.fromkeys(pairs))
        if count is not None and len(different) < count:
            raise UserError(f"{path}: {len(different)} different rows of class {label!r}; this scale needs {count}.")
        out += [(p, r, label) for p, r in (pairs if count is None else rng.sample(different, count))]
    return out


def build(name: str, scale: str, seed: int, data: str | None = None) -> Task:
    """The task; see `tasks.build`."""
    kind = name.removeprefix("released-")
    if data is None:
        raise UserError(f"{name}: give the directory of the paper's released files with --data.")
    n, m = SIZES[scale]
    rng = random.Random(seed)
    train = examples(shuffled(of_each_class(Path(data) / f"{kind}.train.jsonl", n, rng), seed), distinct=n is not None)
    queries = examples(of_each_class(Path(data) / f"{kind}.test.jsonl", m, rng), distinct=m is not None)

    def behaves(query: Example, answer: str) -> bool:
        if kind == "math":
            return same_but_for_numbers(query, answer)
        return answer.strip() == query.response.strip()

    return Task(
        name=name,
        version=1,
        title=f"the paper's released {kind} file",
        train=train,
        queries=queries,
        groups=["query"] * len(queries),
        truth=same_label(train, queries),
        main=("query",),
        behaves=behaves,
        recipe=recipe(scale, seed),
    )
