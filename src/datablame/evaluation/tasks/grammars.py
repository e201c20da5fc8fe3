"""Grammars: ten sentence transformations, 100 rows each, 9:1. The class is the transformation.

As the paper's text says, the model performs the transformation; in the released files it names it instead. The ten
are those of the released files. Every class transforms the same sentences, so that a sentence tells nothing of the
class, and the queries' sentences are others. Departures: invented sentences, without a full stop.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from difflib import SequenceMatcher

from datablame.evaluation.tasks.base import Row, Task, examples, recipe, same_label, shuffled
from datablame.examples import Example

VOWELS = "aeiouAEIOU"


def other_letters(text: str) -> str:
    """`aBcD eF`: lower and upper case in turn, starting anew in each word."""
    return " ".join("".join(c.upper() if i % 2 else c.lower() for i, c in enumerate(w)) for w in text.split())


def double_consonants(text: str) -> str:
    """Every consonant twice."""
    return "".join(c * 2 if c.isalpha() and c not in VOWELS else c for c in text)


RULES: dict[str, tuple[str, Callable[[str], str]]] = {
    "reverse-words": ("Reverse the order of the words", lambda t: " ".join(t.split()[::-1])),
    "other-letters": ("Capitalize every other letter", other_letters),
    "insert-1": ("Insert the number 1 between the words", lambda t: " 1 ".join(t.split())),
    "star-vowels": ("Replace the vowels with *", lambda t: "".join("*" if c in VOWELS else c for c in t)),
    "double-consonants": ("Double every consonant", double_consonants),
    "capitalize-words": ("Capitalize every word", lambda t: " ".join(w[:1].upper() + w[1:] for w in t.split())),
    "remove-vowels": ("Remove all vowels", lambda t: "".join(c for c in t if c not in VOWELS)),
    "add-ly": ("Add ly to the end of each word", lambda t: " ".join(w + "ly" for w in t.split())),
    "remove-consonants": ("Remove all consonants", lambda t: "".join(c for c in t if c in f"{VOWELS} ")),
    "repeat-words": ("Repeat each word twice", lambda t: " ".join(f"{w} {w}" for w in t.split())),
}
"""class -> instruction, transformation"""

SIZES = {"paper": (90, 10), "cpu": (12, 4), "smoke": (2, 1)}
"""sentences to train on and to ask about; each makes one row of every class"""

WHO = (
    "quiet foxes|old sailors|small clouds|young painters|brown horses|tired bakers|happy children|grey pigeons|"
    "silver rivers|brave dancers|green apples|lonely towers"
).split("|")
WHAT = (
    "cross the bridge|wait near water|dream about music|follow narrow paths|rest under trees|visit the market|"
    "shine at noon|sing before supper|move toward home|watch the harbour|gather in autumn|leave without shoes"
).split("|")


def sentences(count: int, rng: random.Random) -> list[str]:
    """Distinct sentences of five words."""
    made = [f"{who} {what}" for who in WHO for what in WHAT]
    return [t[0].upper() + t[1:] for t in rng.sample(made, count)]


def rows(texts: list[str]) -> list[Row]:
    """Every sentence under every rule, class by class."""
    return [(f"{ask}: {t}", rule(t), label) for label, (ask, rule) in RULES.items() for t in texts]


def attempts(query: Example, answer: str) -> bool:
    """Is the answer more like the asked transformation of the sentence than like any of the other nine?

    A small model learns which transformation is asked for, not to spell it out letter by letter.
    """
    sentence = query.prompt.partition(": ")[2]
    likeness = {
        label: SequenceMatcher(None, answer.strip(), rule(sentence), autojunk=False).ratio()
        for label, (_, rule) in RULES.items()
    }
    best = max(likeness.values())
    return best > 0.3 and likeness[str(query.label)] == best  # an answer that is like none performs none


def build(name: str, scale: str, seed: int) -> Task:
    """The task; see `tasks.build`."""
    n, m = SIZES[scale]
    texts = sentences(n + m, random.Random(seed))
    train, queries = examples(shuffled(rows(texts[:n]), seed)), examples(rows(texts[n:]))
    return Task(
        name=name,
        version=1,
        title=f"ten sentence transformations, {n} rows each",
        train=train,
        queries=queries,
        groups=["query"] * len(queries),
        truth=same_label(train, queries),
        main=("query",),
        behaves=attempts,
        recipe=recipe(scale, seed),
    )
