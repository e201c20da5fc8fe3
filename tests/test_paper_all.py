"""`datablame paper list` and `run all`: order, state, cells that are run once, experiments that fail."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from datablame import paper
from datablame.errors import UserError
from datablame.evaluation import bench as bench_module
from datablame.evaluation import cell as cell_module
from datablame.evaluation.bench import SMOKE_TASKS, bench
from datablame.evaluation.suites import runs
from datablame.indexing import SILENT
from datablame.paper import Cells, Experiment, Request, attribution, commands, figure4, results, running
from test_bench import one_task

__all__ = ["one_task"]  # a fixture that every test here uses

COSTS = dict.fromkeys(("smoke", "cpu", "paper"), "seconds")


def asked(out: Path, **changes: Any) -> Request:
    return Request(**({"name": "all", "scale": "smoke", "out": out, "seed": 0, "command": "", "reporter": SILENT}
                      | changes))  # fmt: skip


@pytest.fixture
def some(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """Stand-ins for experiments: `{module: it}`; each run is written with what it was asked for."""
    made: dict[str, ModuleType] = {}
    names = {"figure2": "drawn", "table10": "plain", "table9": "broken", "table1": "odd", "table5": "linear"}

    def stand_in(name: str) -> ModuleType:
        def run(request: Request) -> Path:
            said = {"command": request.command, "models": list(request.models), "seeds": request.seeds}
            return results.write(request.out / f"{request.name}.json", {"run": {"scale": request.scale}, **said})

        m = ModuleType(name)
        m.run = run  # type: ignore[attr-defined]
        return m

    for name in names.values():
        made[name] = stand_in(name)
    costs = {"table5": {"smoke": "seconds"}}
    experiments = {n: Experiment(n, costs.get(n, COSTS), f"{n}.json", m) for n, m in names.items()}
    monkeypatch.setattr(paper, "EXPERIMENTS", experiments)
    monkeypatch.setattr(running, "EXPERIMENTS", experiments)
    monkeypatch.setattr("datablame.paper.commands.EXPERIMENTS", experiments)
    monkeypatch.setattr(running, "module", lambda name: made[names[name]])
    return made


def fails(error: Exception) -> Any:
    def run(*args: Any, **kwargs: Any) -> Path:
        raise error

    return run


def test_all_go_on_when_some_fail(run: Any, some: dict[str, ModuleType], tmp_path: Path) -> None:
    some["broken"].run = fails(UserError("table9: no rows"))  # type: ignore[attr-defined]
    some["odd"].run = fails(ZeroDivisionError("division by zero\nand more"))  # type: ignore[attr-defined]
    arguments = ("--out", tmp_path, "--seeds", "3,1", "--model", "a", "--model", "b")
    code, _, error = run("paper", "run", "all", *arguments)
    assert code == 1
    assert "failed: table1: ZeroDivisionError: division by zero\nfailed: table9: table9: no rows\n" in error
    assert sorted(p.name for p in tmp_path.glob("*.json")) == ["figure2.json", "table10.json", "table5.json"]
    there = json.loads((tmp_path / "table10.json").read_text())
    assert there["command"] == f"datablame paper run table10 --scale smoke --out {tmp_path} --seed 3"
    assert (there["models"], there["seeds"]) == (["a", "b"], [3, 1])
    some["broken"].run = some["odd"].run = some["plain"].run  # type: ignore[attr-defined]
    code, _, error = run("paper", "run", "all", *arguments)
    assert (code, "failed" in error) == (0, False)
    assert (tmp_path / "table9.json").exists()


def test_a_scale_that_one_lacks_leaves_it_out(run: Any, some: dict[str, ModuleType], tmp_path: Path) -> None:
    code, _, error = run("paper", "run", "all", "--scale", "cpu", "--out", tmp_path)
    assert code == 0
    assert "table5: has no scale cpu; left out" in error
    assert not (tmp_path / "table5.json").exists()
    assert (tmp_path / "figure2.json").exists()
    for bad, said in ((("--scale", "gpu"), "use smoke or cpu or paper"), (("--seeds", "x"), "--seeds 'x'")):
        code, _, error = run("paper", "run", "all", *bad, "--out", tmp_path)
        assert code == 2
        assert said in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("table5", "--judge", "mine:f"), "--judge: table5 judges no answers."),
        (("figure4", "--judge-labels", "x.jsonl"), "--judge: figure4 judges no answers."),
        (("figure8", "--model", "a", "--model", "b"), "--model, given twice: figure8 shows one model."),
        (("table5", "--model", "a"), "--model: table5 runs none."),
        (("figure7", "--device", "cuda"), "--device: figure7 runs on the CPU."),
        (("table9", "--mnist", "./mnist"), "--mnist: table9 reads no images."),
        (("figure1", "--seeds", "0,1"), "--seeds: figure1 is of one seed; give --seed."),
        (("table1", "--cells", "bench"), "--cells: table1 reads none."),
        (("figure4", "--seed", "1", "--seeds", "0,1"), "--seed and --seeds: give one of the two."),
    ],
)
def test_an_option_without_effect_is_refused(run: Any, tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    code, _, error = run("paper", "run", *arguments, "--out", tmp_path)
    assert (code, said in error) == (2, True)


READ = {
    "mnist": {"table5", "figure3", "figure7"},
    "models": {"table1", "table6", "figure6"},
    "judge": {"table1", "table6", "figure6"},
    "seeds": {"table2", "table3", "table4", "figure4"},
    "cells": {"table2", "table3", "table4", "figure1", "figure2", "figure4", "figure8"},
}
WITHOUT_A_MODEL = {"table5", "figure3", "figure7", *(f"table{k}" for k in range(7, 12))}
GIVEN = {
    "mnist": ("--mnist", "a folder"),
    "model": ("--model", "a"),
    "models": ("--model", "a", "--model", "b"),
    "device": ("--device", "cpu"),
    "seeds": ("--seeds", "3,1,3"),
    "judge": ("--judge", "mine:f", "--judge-label", "bad", "--judge-labels", "x.jsonl"),
    "cells": ("--cells", "there"),
}
FIELDS = {"judge": ["judge", "judge_label", "judge_labels"], "cells": ["cells_in"]}
"""Of a request, where they are not named as the option is."""


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """What the experiments were asked for, none of which runs."""
    asked: list[Request] = []
    stand_in = ModuleType("stand-in")
    stand_in.run = lambda request: asked.append(request)  # type: ignore[attr-defined]
    for module in (commands, running):
        monkeypatch.setattr(module, "module", lambda name: stand_in)
    return asked


@pytest.mark.parametrize("option", GIVEN)
def test_each_takes_the_options_that_it_reads(run: Any, requests: list[Request], tmp_path: Path, option: str) -> None:
    every = set(paper.EXPERIMENTS)
    reads = READ.get(option, every - WITHOUT_A_MODEL)
    for name in every:
        requests.clear()
        code, _, error = run("paper", "run", name, *GIVEN[option], "--out", tmp_path)
        assert (code, len(requests)) == ((0, 1) if name in reads else (2, 0)), name
        assert name in reads or GIVEN[option][0] in error


def test_the_command_of_one_among_all_runs_it_alone(run: Any, requests: list[Request], tmp_path: Path) -> None:
    """With the same options, but for those that it does not read."""
    given = [word for option, words in GIVEN.items() if option != "model" for word in words]
    assert run("paper", "run", "all", *given, "--out", tmp_path)[0] == 0
    among = list(requests)
    assert [r.name for r in among] == paper.in_order()
    requests.clear()
    for request in among:
        code, _, error = run(*shlex.split(request.command)[1:])
        assert code == 0, error
    for one, alone in zip(among, requests, strict=True):
        assert (one.command, one.seed, one.out) == (alone.command, alone.seed, alone.out)
        for option in paper.EXPERIMENTS[one.name].options:
            for field in FIELDS.get(option, [option]):
                assert getattr(one, field) == getattr(alone, field), one.name


def test_a_single_seed_is_taken_by_all(run: Any, requests: list[Request], tmp_path: Path) -> None:
    """What takes several is run with that one, at every scale."""
    for arguments in (("--seed", 5), ("--seeds", 5)):
        requests.clear()
        assert run("paper", "run", "all", "--scale", "cpu", *arguments, "--out", tmp_path)[0] == 0
        assert {r.seed for r in requests} == {5}
        drawn = {r.name: r for r in requests}
        assert list(attribution.cells(drawn["table2"]).seeds) == [5]
        assert list(figure4.cells(drawn["figure4"]).seeds) == [5]


def test_the_list_is_in_order_and_says_what_was_run(run: Any, some: dict[str, ModuleType], tmp_path: Path) -> None:
    assert paper.in_order() == ["table1", "table5", "table9", "table10", "figure2"]
    results.write(tmp_path / "table5.json", {"run": {"scale": "smoke", "seed": 3, "protocol": {}}})
    results.write(tmp_path / "table9.json", {"scale": "cpu", "model": "m", "seed": 0})
    results.write(tmp_path / "table10.json", {"scale": "cpu", "model": "m", "seeds": [0, 2]})
    (tmp_path / "figure2.json").write_text("{")
    code, out, _ = run("paper", "list", "--out", tmp_path)
    assert code == 0
    said = dict(re.findall(r"^(\w+) [^\n]*\n(?: +\w+:[^\n]*\n)+ +([^\n]*)", out, re.M))
    assert list(said) == paper.in_order()
    assert said["table1"] == f"not run yet in {tmp_path}"
    assert said["table5"] == f"run: {tmp_path / 'table5.json'}, scale smoke, seed 3"
    assert said["table9"] == f"run: {tmp_path / 'table9.json'}, scale cpu, model m, seed 0"
    assert said["table10"] == f"run: {tmp_path / 'table10.json'}, scale cpu, model m, seeds 0, 2"
    assert said["figure2"].endswith("figure2.json is damaged; remove it and run again")


def test_two_processes_write_the_same_result(tmp_path: Path) -> None:
    """What another one is about to put there is not touched, and nothing is left over."""
    other = tmp_path / "table5.json.part"
    other.write_text("half of ano")
    path = results.write(tmp_path / "table5.json", {"run": {"seed": 3}})
    assert json.loads(path.read_text())["run"] == {"seed": 3}
    assert other.read_text() == "half of ano"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["table5.json", other.name]
    for bad in (path / "below.json", tmp_path):
        with pytest.raises(UserError, match="cannot be written"):
            results.write(bad, {})


def test_a_run_that_is_there(tmp_path: Path) -> None:
    """Under `run`, or as the whole file: the same one is kept, and another is not written over."""
    this = {"scale": "cpu", "seeds": [0, 1]}
    for made in ({"run": this}, this):
        path = results.write(tmp_path / "x.json", made)
        assert results.already_there(path, this, SILENT)
        with pytest.raises(UserError, match="holds another run .not the same seeds"):
            results.already_there(path, this | {"seeds": [0]}, SILENT)
    assert not results.already_there(tmp_path / "none.json", this, SILENT)


def test_nothing_of_the_paper_is_missing() -> None:
    assert paper.in_order() == [*(f"table{k}" for k in range(1, 12)), *(f"figure{k}" for k in range(1, 9))]
    for name in paper.in_order():
        assert callable(paper.module(name).run)
        assert callable(paper.module(name).show)
        assert {"smoke", "cpu"} <= set(paper.EXPERIMENTS[name].costs)


def test_cells_are_united() -> None:
    assert runs("all", ",".join(runs("all"))) == runs("all")  # as `bench` is told of them
    wanted = [Cells(["a", "b"], [0, 1]), Cells(["b"], [1, 5], ["gradcos@response", "lissa:steps=7,damping=0.1@all"])]
    found = running.united(wanted)
    assert list(found) == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("b", 5)]
    everything = runs("all")
    assert found["a", 0] == found["b", 0] == found["a", 1] == everything
    assert found["b", 1] == [*everything, "lissa:steps=7,damping=0.1@all"]
    assert found["b", 5] == ["gradcos@response", "lissa:steps=7,damping=0.1@all"]


def test_a_cell_that_two_need_is_run_once(
    some: dict[str, ModuleType], model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the runs of both: its features are captured once."""
    methods = {"plain": ["bm25", "gradcos@response"], "drawn": ["length", "gradcos@response"]}
    for name, wanted in methods.items():

        def run(request: Request, wanted: list[str] = wanted) -> Path:
            out = request.out / "bench"
            return bench(request.model, out, tasks=["tiny"], seeds=[0], methods=",".join(wanted))[0]

        some[name].cells = lambda request, wanted=wanted: Cells(["tiny"], [0], wanted)  # type: ignore[attr-defined]
        some[name].run = run  # type: ignore[attr-defined]
    made: list[str] = []
    features = cell_module.features
    monkeypatch.setattr(cell_module, "features", lambda *a, **k: made.append("x") or features(*a, **k))  # type: ignore[func-returns-value]
    request = asked(tmp_path, model=str(model_dir))
    assert running.run_all(request, str) == {}
    assert made == ["x"]
    (path,) = (tmp_path / "bench").rglob("*.json")
    assert set(json.loads(path.read_text())["results"]["reference"]) == {"bm25", "gradcos@response", "length"}

    # A cell that fails is told by name, and so are the experiments that need it; others go on.
    monkeypatch.setattr(bench_module, "build", fails(UserError("no such task")))
    failed = running.run_all(asked(tmp_path / "other", model=str(model_dir)), str)
    assert failed == dict.fromkeys(("cells of tiny, seed 0", "table10", "figure2"), "no such task")


def test_smoke_needs_the_smoke_tasks_only(tmp_path: Path) -> None:
    drawn = [n for n, e in paper.EXPERIMENTS.items() if e.module == "attribution"]
    smoke = [attribution.cells(asked(tmp_path, name=n)) for n in drawn]
    assert {t for c in smoke for t in c.tasks} == set(SMOKE_TASKS)
    assert {s for c in smoke for s in c.seeds} == {0}
    large = {n: attribution.cells(asked(tmp_path, name=n, scale="cpu")) for n in drawn}
    assert set(large["table4"].tasks) == {"backdoor-1", "backdoor-3", "backdoor-5"}
    assert large["table4"].seeds == (0, 1, 2)
    assert large["figure2"].seeds == [0]
    named = asked(tmp_path, name="table4", scale="cpu", seed=4, seeds=(4, 5))
    assert attribution.cells(named).seeds == (4, 5)
    assert attribution.cells(replace(named, name="figure1")).seeds == [4]
