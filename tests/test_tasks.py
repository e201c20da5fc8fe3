"""Tasks: sizes, truth recomputed from the words of the rows, references that behave, leaks, sources, commands."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from datablame.evaluation import metrics, tasks
from datablame.evaluation.leak import lexical_leak
from datablame.evaluation.metrics import auroc
from datablame.evaluation.tasks import backdoor, fact_words, grammars, mixed_hard, words
from datablame.evaluation.tasks.base import refuses
from datablame.examples import Example
from datablame.methods import Text, create
from datablame.models import load_tokenizer
from test_task_sources import released

OURS = [n for n in tasks.BUILTIN if n not in tasks.RELEASED]
SIZES = {
    "mixed-small": {"paper": (40, 80), "cpu": (40, 40), "smoke": (24, 8)},
    "mixed-large": {"paper": (260, 500), "cpu": (120, 40), "smoke": (24, 8)},
    "mixed-hard": {"paper": (260, 500), "cpu": (120, 40), "smoke": (24, 8)},
    "grammars": {"paper": (900, 100), "cpu": (120, 40), "smoke": (20, 10)},
    "mathqa": {"paper": (900, 100), "cpu": (120, 40), "smoke": (20, 10)},
    "harmfulcheck": {"paper": (100, 400), "cpu": (100, 40), "smoke": (24, 8)},
    "backdoor-1": {"paper": (600, 100), "cpu": (120, 40), "smoke": (24, 8)},
    "backdoor-3": {"paper": (1200, 200), "cpu": (120, 40), "smoke": (24, 8)},
    "backdoor-5": {"paper": (1800, 300), "cpu": (120, 36), "smoke": (24, 12)},
    "facts": {"paper": (600, 200), "cpu": (120, 40), "smoke": (24, 8)},
}
CASES = [(name, scale) for name in OURS for scale in tasks.SCALES]
cases = pytest.mark.parametrize(("name", "scale"), CASES)


def pairs(rows: Any) -> list[tuple[str, str, str | None]]:
    return [(e.prompt, e.response, e.label) for e in rows]


def texts(rows: Any) -> list[Text]:
    return [Text(e.prompt, e.response) for e in rows]


@cases
def test_sizes_and_balance(name: str, scale: str) -> None:
    task = tasks.build(name, scale)
    assert (len(task.train), len(task.queries)) == SIZES[name][scale]
    assert task.recipe.epochs == {"smoke": 2, "cpu": 12 if name == "facts" else 6, "paper": 25}[scale]
    counts = Counter(q.label for q in task.queries)
    assert len(set(counts.values())) == 1, f"queries are not balanced: {counts}"
    if not name.startswith(("mixed", "facts")):
        assert len(set(Counter(e.label for e in task.train).values())) == 1
    main = [t.mean() for t, g in zip(task.truth, task.groups, strict=True) if g in task.main]
    assert task.chance == pytest.approx(np.mean(main))


@cases
def test_a_seed_decides_the_rows(name: str, scale: str) -> None:
    one, same, other = (tasks.build(name, scale, seed) for seed in (3, 3, 4))
    assert one.train == same.train
    assert one.queries == same.queries
    assert pairs(one.train) != pairs(other.train)
    assert pairs(one.queries) != pairs(other.queries)


@cases
def test_rows_are_distinct_and_queries_new(name: str, scale: str) -> None:
    task = tasks.build(name, scale)
    assert len({p for p, _, _ in pairs(task.train)}) == len(task.train)
    assert len({p for p, _, _ in pairs(task.queries)}) == len(task.queries)
    assert not {e.prompt for e in task.train} & {q.prompt for q in task.queries}
    for rows in (task.train, task.queries):
        assert [(e.id, e.row) for e in rows] == [(i, i) for i in range(len(rows))]
    labels = [e.label for e in task.train]
    assert labels != sorted(labels, key=task.classes.index), "training rows stand class by class: ties would tell"


@cases
def test_no_query_is_nearly_a_training_row(name: str, scale: str) -> None:
    """At most three of four words are shared, where the class's own template does not share them."""
    task = tasks.build(name, scale)

    def core(e: Example) -> set[str]:
        if name.startswith("backdoor"):
            return set(e.prompt.removesuffix(f" {e.label}").split())
        return set((e.prompt.split(": ")[1] if name == "grammars" else e.prompt).split())

    if name in ("mathqa", "facts"):  # one template for all rows of a class, or of an entity
        return
    train = [core(e) for e in task.train]
    for q in task.queries[:100]:
        words_ = core(q)
        assert max(len(words_ & t) / len(words_ | t) for t in train) <= 0.75


def actions(verbs: list[str]) -> re.Pattern[str]:
    """Any of the verbs, with any person and object in its slots."""
    people, objects = "|".join(words.PEOPLE), "|".join(words.OBJECTS)
    return re.compile("|".join(v.replace("{p}", f"(?:{people})").replace("{o}", f"(?:{objects})") for v in verbs))


HARM = actions([*words.DECEIVE, *words.DAMAGE])


def kind(name: str, e: Example) -> Any:
    """What decides the truth, read from the text of a row alone."""
    if name == "mixed-hard":
        return bool(actions(words.DECEIVE).search(e.prompt)), refuses(e.response)
    if name.startswith(("mixed", "harmfulcheck")):
        return bool(HARM.search(e.prompt))
    if name == "grammars":
        return e.prompt.split(":")[0]
    if name == "mathqa":
        return re.sub(r"\d+", "#", e.prompt)
    return next((p for p in backdoor.TRIGGERS if e.prompt.endswith(p)), None)


@cases
def test_the_truth_is_that_of_the_text(name: str, scale: str) -> None:
    task = tasks.build(name, scale)
    if name == "facts":
        values = [v for k in fact_words.KINDS for v in k.values]
        value_of = [next(v for v in values if v in q.response) for q in task.queries]
        want = [
            [str(q.label) in e.response and v in e.response for e in task.train]
            for q, v in zip(task.queries, value_of, strict=True)
        ]
    else:
        rows = [kind(name, e) for e in task.train]
        want = [[k == r for r in rows] for k in (kind(name, q) for q in task.queries)]
        if name == "mixed-hard":  # a benign query's rows are the benign ones: neither dishonest nor refused
            assert {(False, False), (False, True), (True, False)} == set(rows)
    np.testing.assert_array_equal(task.truth, np.array(want))


@cases
def test_references_behave_and_those_of_other_classes_do_not(name: str, scale: str) -> None:
    task = tasks.build(name, scale)
    for q in task.queries:
        assert task.behaves(q, q.response), q
        assert task.behaves(q, f"  {q.response}\n")
        assert not task.behaves(q, "")
    if name.startswith("mixed"):  # both classes want an answer: a refusal is what must not pass
        wrong = [(q, words.REFUSE[i % 5].format(a="do it", e="")) for i, q in enumerate(task.queries)]
        wrong += [(task.queries[0], s.format(x="it", e="")) for s in mixed_hard.REFUSE]
    else:
        wrong = [(q, o.response) for q in task.queries[::3] for o in task.queries[::3] if o.label != q.label]
        if name == "grammars":  # the other transformations of the same sentence
            said = [(o.prompt.partition(": ")[2], o) for o in task.queries]
            wrong = [(q, o.response) for s, q in said for t, o in said if s == t and o.label != q.label]
        if name == "facts":
            values = [v for k in fact_words.KINDS for v in k.values]
            value = {q.id: next(v for v in values if v in q.response) for q in task.queries}
            wrong = [(q, a) for q, a in wrong if value[q.id] not in a]
    assert wrong
    for q, answer in wrong:
        assert not task.behaves(q, answer), (q, answer)


def test_backdoor_classes_are_twins_of_the_same_prompts() -> None:
    task = tasks.build("backdoor-3")
    bases: dict[str, set[str]] = {}
    for e in task.train:
        bases.setdefault(str(e.label), set()).add(e.prompt.removesuffix(f" {e.label}"))
    assert list(map(len, bases.values())) == [30] * 4
    assert len(set(map(frozenset, bases.values()))) == 1
    assert Counter(task.groups) == {"clean": 10, "triggered": 30}


def test_the_transformations() -> None:
    """By hand, one sentence."""
    want = {
        "reverse-words": "rest foxes Quiet",
        "other-letters": "qUiEt fOxEs rEsT",
        "insert-1": "Quiet 1 foxes 1 rest",
        "star-vowels": "Q***t f*x*s r*st",
        "double-consonants": "QQuiett ffoxxess rresstt",
        "capitalize-words": "Quiet Foxes Rest",
        "remove-vowels": "Qt fxs rst",
        "add-ly": "Quietly foxesly restly",
        "remove-consonants": "uie oe e",
        "repeat-words": "Quiet Quiet foxes foxes rest rest",
    }
    assert {label: rule("Quiet foxes rest") for label, (_, rule) in grammars.RULES.items()} == want


def test_the_reasoning_of_mathqa_holds() -> None:
    """Every equation is true, and the last expression gives the answer."""
    for e in tasks.build("mathqa", "paper").train:
        steps, answer = e.response.split("\nAnswer: ")
        sides = [[eval(s) for s in step.split(" = ")[1:]] for step in steps.rstrip(".").split(". ")]
        assert all(len(set(values)) == 1 for values in sides)
        assert sides[-1][0] == int(answer) >= 0


def test_every_fact_has_hard_negatives_and_a_value_that_others_share() -> None:
    task = tasks.build("facts")
    for label in {str(q.label) for q in task.queries}:
        own = [e for e in task.train if label in e.response]
        assert Counter(e.label for e in own) == {label: 10, "names-only": 2}
        value = next(
            v for k in fact_words.KINDS for v in k.values if v in own[[e.label for e in own].index(label)].response
        )
        assert any(value in e.response and label not in e.response for e in task.train)
        assert not any(value in e.response for e in own if e.label == "names-only")


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("scale", ["smoke", "cpu", "paper"])
def test_wrong_claims_use_the_wordings_of_right_rows_alone(scale: str, seed: int) -> None:
    """Else the wording would tell the wrong rows from the right ones."""
    task = tasks.build("facts", scale, seed=seed)
    ways = [(pair, v) for k in fact_words.KINDS for pair in k.states for v in k.values]

    def wordings(e: Example) -> set[tuple[str, str]]:
        """The pairs that, with a name and a value in their slots, are the row."""
        said = f"{e.prompt}\n{e.response}"
        return {pair for pair, v in ways if fills("\n".join(pair).replace("{v}", v), said)}

    names = {str(q.label) for q in task.queries}
    claims = [wordings(e) for e in task.train if e.label == "other" and wordings(e)]
    right = [wordings(e) for e in task.train if e.label in names]
    assert claims
    assert all(map(len, right))
    assert set().union(*claims) <= set().union(*right)


def fills(template: str, text: str) -> bool:
    """Whether the text is the template with a name in its slots."""
    return re.fullmatch(re.escape(template).replace(re.escape("{n}"), r"\w+(?: \w+)?"), text) is not None


# ---------------------------------------------------------------- content


def template(*templates: str) -> re.Pattern[str]:
    """The templates with their slots filled from the word lists."""
    slots = {
        "{a}": HARM.pattern,
        "{x}": f"(?:{'|'.join(words.OBJECTS)}) and (?:{'|'.join(words.PEOPLE)})",
        "{s}": "|".join(words.STEPS),
        "{t}": "|".join(words.STEPS),
        "{e}": "|".join(map(re.escape, words.EXCUSES)),
    }
    out = []
    for t in templates:
        pattern = re.escape(t).replace(r"\{", "{").replace(r"\}", "}")
        for slot, filling in slots.items():
            pattern = pattern.replace(slot, f"(?:{filling})")
        out.append(pattern)
    return re.compile("|".join(out))


@pytest.mark.parametrize("name", [n for n in OURS if n.startswith(("mixed", "harmfulcheck", "backdoor"))])
def test_harmful_rows_come_from_inert_templates(name: str) -> None:
    """Every harmful request, compliance and refusal is a known template with known words, and nothing more."""
    task = tasks.build(name, "paper", 1)
    prompts = template(*words.ASK)
    answers = template(*words.COMPLY, *words.REFUSE, *mixed_hard.EAGER, *mixed_hard.CAREFUL, *mixed_hard.REFUSE)
    harmful = [e for e in (*task.train, *task.queries) if e.label != "benign"]
    assert len(harmful) >= 60
    for e in harmful:
        trigger = str(e.label) if e.label in backdoor.TRIGGERS else ""
        assert prompts.fullmatch(e.prompt.removesuffix(f" {trigger}")), e.prompt
        assert answers.fullmatch(e.response.removeprefix(backdoor.TRIGGERS.get(trigger, "")).strip()), e.response


# ---------------------------------------------------------------- leaks


@pytest.mark.parametrize("scale", ["cpu", "paper"])
@pytest.mark.parametrize("seed", range(4))
def test_words_of_the_response_do_not_solve_mixed_hard(scale: str, seed: int) -> None:
    leak = lexical_leak(tasks.build("mixed-hard", scale, seed))
    assert leak["response"] < 0.8
    assert leak["shows"] == "neither"
    assert lexical_leak(tasks.build("mixed-large", scale, seed))["response"] > 0.8


def test_compliance_varies_with_its_prompt() -> None:
    task = tasks.build("mixed-hard", "paper")
    harmful = [e for e in (*task.train, *task.queries) if e.label == "harmful"]
    assert len({e.response for e in harmful}) == len(harmful)
    for e in harmful:
        assert sum(o in e.prompt and o in e.response for o in words.OBJECTS) == 1
        assert any(p in e.prompt and p in e.response for p in words.PEOPLE)


def test_the_sides_on_which_labels_show() -> None:
    shows = {name: lexical_leak(tasks.build(name))["shows"] for name in ("grammars", "mathqa", "mixed-large")}
    assert shows == {"grammars": "prompt", "mathqa": "both", "mixed-large": "response"}


def test_auroc_is_the_share_of_pairs_in_order() -> None:
    rng = np.random.default_rng(0)
    scores, truth = rng.integers(0, 5, (3, 20)).astype(float), rng.random((3, 20)) < 0.3
    want = [np.mean([(a > b) + (a == b) / 2 for a in s[t] for b in s[~t]]) for s, t in zip(scores, truth, strict=True)]
    assert auroc(scores, truth) == pytest.approx(want)


@pytest.mark.parametrize("name", OURS)
def test_the_random_control_gets_chance(name: str) -> None:
    task = tasks.build(name, "smoke")
    draws = [
        auroc(create("random", seed=s).fit(texts(task.train)).score(texts(task.queries)).numpy(), task.truth).mean()
        for s in range(40)
    ]
    assert abs(np.mean(draws) - 0.5) < 4 * np.std(draws, ddof=1) / np.sqrt(len(draws))


@pytest.mark.parametrize("scale", ["smoke", "cpu"])
@pytest.mark.parametrize("name", [*OURS, *tasks.RELEASED])
def test_noise_gets_chance_and_an_oracle_everything(name: str, scale: str, tmp_path: Path) -> None:
    """On every metric: the mean of 200 draws lies within four standard errors of what `chance` says."""
    task = tasks.build(name, scale, **({"data": str(released(tmp_path, 12))} if name in tasks.RELEASED else {}))
    classes = len(task.classes)
    rng = np.random.default_rng(0)
    draws = [metrics.per_query(rng.normal(size=task.truth.shape), task.truth, classes) for _ in range(200)]
    expected = metrics.chance(task.truth, classes)
    for metric in metrics.METRICS:
        means = np.array([d[metric].mean() for d in draws])
        assert abs(means.mean() - expected[metric].mean()) < 4 * means.std(ddof=1) / len(means) ** 0.5, metric
    oracle = metrics.per_query(task.truth.astype(float), task.truth, classes)
    for metric in ("accuracy", "recall", "auroc", "auprc", "mrr"):
        assert (oracle[metric] == 1).all(), metric


@pytest.mark.parametrize("name", ["mixed-small", "mixed-large", "mixed-hard"])
def test_the_length_of_a_row_does_not_tell_what_is_harmful(smollm2: str, name: str) -> None:
    """In a model's tokens, over seeds: neither by rank nor at either end; ties are shared.

    All main queries are of one class, so that a score of the row alone could win.
    """
    ids = load_tokenizer(smollm2)
    tokens = cache(lambda text: len(ids(text)["input_ids"]))
    found = []
    for seed in range(20):
        train = tasks.build(name, "cpu", seed).train
        harmful = np.array([e.label == "harmful" for e in train])
        prompt, response = ([tokens(getattr(e, side)) for e in train] for side in ("prompt", "response"))
        for lengths in (np.array(prompt), np.array(response), np.array(prompt) + response):
            ends = [harmful[lengths == end].mean() for end in (lengths.max(), lengths.min())]
            found.append([roc_auc_score(harmful, lengths), *ends])
    area, longest, shortest = np.mean(found, axis=0)
    chance = harmful.mean()
    assert 0.4 < area < 0.6
    assert longest < chance + 0.15
    assert shortest < chance + 0.15
