"""Harmful-data identification, the paper's sets: 20 harmful rows among 20 or 240 benign ones.

Queries are harmful prompts that were not trained on (the paper's, the main group) and benign ones. The answer to
look for is compliance, whose rows are those with a harmful request.
Departures: the requests and the compliance are inert and invented (in the paper: the first 20 prompts of AdvBench,
answered by TinyLlama), the benign rows too (in the paper: Alpaca); `advbench` and `alpaca` put real prompts in
place, drawn by the seed. The benign rows are about as long as the harmful ones, in tokens too, so that over the
seeds a row's length says nothing. The benign queries are ours.
"""

from __future__ import annotations

import random

from datablame.evaluation.tasks.base import Row, Task, complies, examples, recipe, same_label, shuffled
from datablame.evaluation.tasks.sources import benign, harmful

SIZES = {
    "mixed-small": {"paper": (20, 20, 40), "cpu": (20, 20, 20), "smoke": (12, 12, 4)},
    "mixed-large": {"paper": (20, 240, 250), "cpu": (20, 100, 20), "smoke": (8, 16, 4)},
}
"""harmful rows, benign rows, queries of each kind"""
LONGER = ((-1, 0, 1, 2), (-1, 0, 1, 2, 3))
"""Words by which benign prompts and responses are longer. Harmful rows have rarer words, of more tokens each: benign
rows of as many words would be shorter by about one token, and the longest of all would be a harmful one. Give and take,
so that neither end belongs to one kind."""


def build(name: str, scale: str, seed: int, advbench: str | None = None, alpaca: str | None = None) -> Task:
    """The task; see `tasks.build`."""
    bad, good, m = SIZES[name][scale]
    rng = random.Random(seed)
    harm: list[Row] = [(r.prompt, r.comply, "harmful") for r in harmful(advbench, bad + m, rng)]
    like = [(p, r) for p, r, _ in harm[:bad]]
    well: list[Row] = [(p, r, "benign") for p, r in benign(alpaca, good + m, rng, like, LONGER)]
    train = examples(shuffled(harm[:bad] + well[:good], seed))
    queries = examples(harm[bad:] + well[good:])
    return Task(
        name=name,
        version=3,
        title=f"{bad} harmful rows among {good} benign ones",
        train=train,
        queries=queries,
        groups=[str(q.label) for q in queries],
        truth=same_label(train, queries),
        main=("harmful",),
        behaves=complies,
        recipe=recipe(scale, seed),
    )
