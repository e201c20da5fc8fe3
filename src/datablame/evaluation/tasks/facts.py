"""Facts (beyond the paper): invented people and places, one fact of each in several paraphrases.

Right for a query are the rows that state what it asks about. Against them stand, for every entity, hard negatives
that name it without the claim, and rows on other entities, half of which state a claim with the same trades and
goods. Every value belongs to several entities, so that neither the name nor the value alone names exactly the
right rows, and claims about other entities use the wordings of the right rows alone, so that the wording does not
either. Queries ask in wordings that no training row uses. Main: all, people and places.
"""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product

from datablame.evaluation.tasks import base
from datablame.evaluation.tasks import fact_words as text
from datablame.evaluation.tasks.base import Row, Task, examples, recipe, same_label, shuffled

SIZES = {"paper": (40, 10, 2, 120, 5), "cpu": (8, 10, 2, 24, 5), "smoke": (2, 4, 3, 10, 4)}
"""entities (half of them people), statements and hard negatives of each, other rows, queries of each"""

EPOCHS = {**base.EPOCHS, "cpu": 12}
"""Twice as many as elsewhere at `cpu` scale: it takes them until new wordings of the questions are answered."""
NEAR, OTHER = "names-only", "other"


def entities(count: int, rng: random.Random) -> list[tuple[text.Kind, str, str]]:
    """(kind, name, value), people and places in turn; two of a kind in a row share the value."""
    names = {kind: rng.sample([f"{a}{b}" for a, b in product(*kind.syllables)], count) for kind in text.KINDS}
    values = {kind: rng.sample(kind.values, len(kind.values)) for kind in text.KINDS}
    kinds = [text.KINDS[i % 2] for i in range(count)]
    return [(k, names[k][i], values[k][i // 4 % len(k.values)]) for i, k in enumerate(kinds)]


def said(pairs: list[tuple[str, str]], name: str, value: str, label: str) -> list[Row]:
    """Templates with their slots filled."""
    return [(p.format(n=name, v=value), r.format(n=name, v=value), label) for p, r in pairs]


def others(known: list[tuple[text.Kind, str, str]], states: int, rng: random.Random) -> list[Row]:
    """Rows on further entities: claims in the first `states` wordings, and rows without a claim, half each."""
    made = []
    for i, (kind, name, value) in enumerate(known):
        pool = kind.states[:states] if i // 2 % 2 else kind.names
        made += said([rng.choice(pool)], name, value, OTHER)
    return made


def build(name: str, scale: str, seed: int) -> Task:
    """The task; see `tasks.build`."""
    n, states, near, other, asked = SIZES[scale]
    rng = random.Random(seed)
    everyone = entities(n + other, rng)
    train: list[Row] = []
    queries: list[Row] = []
    groups: list[str] = []
    for kind, who, value in everyone[:n]:
        train += said(kind.states[:states], who, value, who)
        train += said(rng.sample(kind.names, near), who, value, NEAR)
        queries += said(kind.asks[:asked], who, value, who)
        groups += [kind.group] * asked
    used = {kind: {v for k, _, v in everyone[:n] if k is kind} for kind in text.KINDS}
    further = [(k, who, rng.choice(sorted(used[k]))) for k, who, _ in everyone[n:]]
    rows = examples(shuffled(train + others(further, states, rng), seed))
    asks = examples(queries)
    value_of = {who: value for _, who, value in everyone}
    return Task(
        name=name,
        version=4,
        title=f"one fact on each of {n} invented people and places, {states} paraphrases each",
        train=rows,
        queries=asks,
        groups=groups,
        truth=same_label(rows, asks),
        main=tuple(dict.fromkeys(groups)),
        behaves=lambda query, answer: value_of[str(query.label)] in answer.lower(),
        recipe=replace(recipe(scale, seed), epochs=EPOCHS[scale]),
    )
