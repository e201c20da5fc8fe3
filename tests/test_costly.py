"""Runs of a cell on features of their own: the numbers of `index` and `trace`, resuming, what fails alone, the plan."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import datablame
from bench_cases import one_task, run, tiny
from conftest import write_jsonl
from datablame.errors import UserError
from datablame.evaluation import bench as bench_module
from datablame.evaluation import cell as cell_module
from datablame.evaluation import costly, finetunes, forecast, metrics
from datablame.evaluation.cell import Cell
from datablame.evaluation.result_files import failures, result_path
from datablame.evaluation.results import load_results
from datablame.evaluation.scoring import read_matrices
from datablame.evaluation.suites import BEYOND, COSTLY, Beyond, beyond, runs
from datablame.evaluation.tables import costly_rows
from datablame.evaluation.tasks.base import Task
from datablame.extras import perturbed
from datablame.indexing import CaptureOptions
from datablame.report.bench import write_bench
from datablame.store import DiskError

__all__ = ["one_task"]  # a fixture that every test here uses

QUICK = {"bif": Beyond("bif:chains=2,draws=2,burn=1,every=1"), "daunce": Beyond("daunce:models=3")}
"""Fewer passes than the benchmark's own options."""
ALL = [*COSTLY, "cg:steps=3@response"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for need, options in QUICK.items():
        monkeypatch.setitem(BEYOND, need, options)
    beyond.cache_clear()
    monkeypatch.setattr(bench_module, "build", lambda name, scale, seed, **kw: task())
    yield
    beyond.cache_clear()


def task() -> Task:
    """With three epochs of two steps, whose checkpoints are not alike."""
    return replace(tiny(), recipe=replace(tiny().recipe, epochs=3))


def folders(tmp_path: Path) -> tuple[Path, Path]:
    """The cell's in the cache, and its adapter."""
    (cell,) = (tmp_path / "cache" / "bench").iterdir()
    (adapter,) = (tmp_path / "cache" / "finetunes").glob("*/adapter")
    return cell, adapter


# ---------------------------------------------------------------- numbers


def test_every_costly_run_has_the_numbers_of_index_and_trace(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All at once, as a user would: one index for what is at checkpoints, one for the other extras."""
    ours: dict[str, dict[str, Any]] = {"reference": {}, "generated": {}}
    keep_results = costly.kept_results

    def spied(task: Task, scored: costly.Results, folder: Path) -> dict[str, Any]:
        for kind, found in scored.items():
            ours[kind] |= {name: x.values for name, x in found.items()}
        return keep_results(task, scored, folder)

    monkeypatch.setattr(costly, "kept_results", spied)
    (path,) = run(model_dir, tmp_path / "out", methods=",".join(["bm25", *ALL]))
    results = json.loads(path.read_text())["results"]["reference"]
    steps = results["tracincp@response"]["checkpoints"]
    assert steps == [1, 3, 4, 6]  # nearest to 1.5, 3, 4.5 and 6 of 6 steps
    cell, adapter = folders(tmp_path)
    kept = read_matrices(cell / "scores.npz")
    assert set(kept) == {"bm25", *ALL}
    said = json.loads((cell / "answers.json").read_text())["tuned"]
    pairs = [(e.prompt, a if a.strip() else ".") for e, a in zip(task().queries, said, strict=True)]
    answered = write_jsonl(tmp_path / "said.jsonl", [{"prompt": p, "response": r} for p, r in pairs])
    for late, there in ((True, ALL[:2]), (False, ALL[2:])):
        extras = dict.fromkeys(need.extras for name in there if (need := beyond(name)) and need.extras)
        at = ",".join(map(str, steps)) if late else None
        options = CaptureOptions(checkpoints=at, extras=",".join(extras))
        store = datablame.index(model_dir, cell / "train.jsonl", tmp_path / f"index{late}", adapter, capture=options)
        for kind, file in (("reference", cell / "queries.jsonl"), ("generated", answered)):
            found = datablame.trace(store, file, methods=[name.removesuffix("@response") for name in there]).values
            for name, want in zip(there, found.values(), strict=True):
                if kind == "generated" and name.startswith("cg"):
                    continue  # products are for the reference responses alone
                atol = 1e-4 * np.abs(want).max()
                np.testing.assert_allclose(ours[kind][name], want, rtol=1e-3, atol=atol, err_msg=f"{kind} {name}")
    for name in ALL:
        np.testing.assert_allclose(kept[name], ours["reference"][name], rtol=1e-6)
        auroc = metrics.auroc(ours["reference"][name], task().truth)
        assert results[name]["auroc"] == pytest.approx(auroc, abs=1e-4)
    assert len({kept[name].tobytes() for name in ALL}) == len(ALL)


def test_they_join_a_result_that_is_there_and_leave_no_stores(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = run(model_dir, tmp_path / "out", methods="graddot@response,bm25:text=both,repsim:layer=last,text=prompt")
    before = json.loads(path.read_text())
    monkeypatch.setattr(bench_module, "run_cell", lambda *a, **k: pytest.fail("the usual features were captured again"))
    run(model_dir, tmp_path / "out", methods="kfac,trackstar:damping=0.1@response")
    after = json.loads(path.read_text())
    for kind, found in before["results"].items():
        assert {k: v for k, v in after["results"][kind].items() if k in found} == found
    assert set(after["results"]["reference"]) - set(before["results"]["reference"]) == {
        "kfac@response",
        "trackstar:damping=0.1@response",
    }
    changed = {"results", "seconds", "command"}
    first, then = after["command"].split(" && ")
    assert first == before["command"]
    assert then.endswith(" --methods kfac,trackstar:damping=0.1@response")
    assert {k: v for k, v in after.items() if k not in changed} == {k: v for k, v in before.items() if k not in changed}
    assert after["seconds"]["all"] == pytest.approx(before["seconds"]["all"] + after["seconds"]["costly"], abs=0.2)
    cell, _ = folders(tmp_path)
    assert {p.name for p in cell.iterdir() if p.is_dir()} == set()
    run(model_dir, tmp_path / "out", methods="kfac", keep=True)  # done: nothing is captured
    # They stand in a table of their own, beside cheaper ones, and in no other.
    results = load_results(tmp_path / "out", str(model_dir), "smoke")["tiny"]
    assert results.runs == list(before["results"]["reference"])
    rows = costly_rows(results)
    assert rows
    shown = ["kfac@response", "trackstar:damping=0.1@response", "graddot@response", *results.runs[2:], results.runs[1]]
    assert [row[0] for row in rows[1:-1]] == [f"`{name}`" for name in shown]
    assert rows[0][-1] == "features, min"
    assert [bool(row[-1]) for row in rows[1:]] == [True, True, *[False] * 4]
    assert "kfac@response" in write_bench({"sound": {"tiny": results}}, tmp_path / "page.html").read_text()
    other = replace(results, results=[before | {"seed": 1}, *results.results])  # a seed without them
    assert [row[0] for row in costly_rows(other) or []] == [row[0] for row in rows]
    assert costly_rows(replace(results, results=[before])) is None


def test_runs_that_differ_in_damping_share_one_product(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def counted(*args: Any) -> Any:
        times = operators_product(*args)
        return lambda matrix, x: (made.append(matrix), times(matrix, x))[1]

    operators_product = costly.product_of
    wanted = [f"subspace:matrix=hessian,damping={d}@response" for d in (5.0, 9.0)]
    (path,) = run(model_dir, tmp_path / "alone", methods=wanted[1])
    alone = json.loads(path.read_text())["results"]
    shutil.rmtree(tmp_path / "cache" / "bench")
    monkeypatch.setattr(costly, "product_of", counted)
    (path,) = run(model_dir, tmp_path / "out", methods=",".join(wanted))
    assert made == ["hessian"]  # for the references alone
    both = json.loads(path.read_text())["results"]
    ours, theirs = (found["reference"][wanted[1]] for found in (both, alone))
    assert {k: v for k, v in ours.items() if "seconds" not in k} == {
        k: v for k, v in theirs.items() if "seconds" not in k
    }
    assert both["reference"][wanted[0]]["residual"] != ours["residual"]
    assert both["generated"][wanted[0]]["error"] == "Products with the curvature are for the reference responses alone."
    # That is no failure, nor is it tried again.
    results = load_results(tmp_path / "out", str(model_dir), "smoke")["tiny"]
    assert (results.costly, results.failed) == (wanted, {})
    run(model_dir, tmp_path / "out", methods=",".join(wanted))
    assert made == ["hessian"]


def test_runs_of_another_fine_tune_do_not_join(model_dir: Path, tmp_path: Path) -> None:
    (path,) = run(model_dir, tmp_path / "out", methods="bm25")
    result = json.loads(path.read_text())
    loss = result["learnt"]["loss"]
    path.write_text(json.dumps(result | {"learnt": result["learnt"] | {"loss": loss | {"tuned": 1.1 * loss["tuned"]}}}))
    run(model_dir, tmp_path / "out", methods="kfac")
    assert "it is another one" in json.loads(path.read_text())["results"]["reference"]["kfac@response"]["error"]
    path.write_text(json.dumps(result))
    run(model_dir, tmp_path / "out", methods="kfac")
    assert "error" not in json.loads(path.read_text())["results"]["reference"]["kfac@response"]


def test_a_product_is_kept_by_all_that_decides_it(tmp_path: Path) -> None:
    made: list[str] = []

    def product(matrix: str, x: torch.Tensor) -> torch.Tensor:
        made.append(matrix)
        return x * (2 if matrix == "hessian" else 3)

    x, y = torch.ones(2, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    many = torch.arange(120.0, dtype=torch.float64).view(40, 3)
    times = costly.kept_products(product, tmp_path, "a")
    asked: list[tuple[Any, torch.Tensor]] = [("hessian", x), ("gauss-newton", x), ("hessian", y), ("hessian", x)]
    results = [times(*args) for args in asked]
    assert made == ["hessian", "gauss-newton", "hessian"]
    for (matrix, v), found in zip(asked, results, strict=True):
        torch.testing.assert_close(found, product(matrix, v), rtol=0, atol=0)
    later = costly.kept_products(lambda *args: pytest.fail("it was kept"), tmp_path, "a")  # another process
    torch.testing.assert_close(later("gauss-newton", x), 3 * x, rtol=0, atol=0)
    costly.kept_products(product, tmp_path, "of other rows")("hessian", x)
    assert len(list(tmp_path.iterdir())) == 4
    # Of many vectors those that are done are kept when one is interrupted.
    left = iter([2.0, 2.0])

    def stops(matrix: str, x: torch.Tensor) -> torch.Tensor:
        return x * next(left)

    with pytest.raises(StopIteration):
        costly.kept_products(stops, tmp_path, "b")("hessian", many)
    left = iter([2.0])
    torch.testing.assert_close(costly.kept_products(stops, tmp_path, "b")("hessian", many), 2 * many, rtol=0, atol=0)


def test_no_room_for_a_product_is_no_fault_of_the_method(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written into the result, and the run goes on from there."""

    def full(path: Path, data: bytes) -> None:
        raise DiskError(f"{path}: no space left.")

    with monkeypatch.context() as patched:
        patched.setattr(costly, "write_whole", full)
        with pytest.raises(DiskError, match="no space left"):
            run(model_dir, tmp_path / "out", methods="bm25,subspace:matrix=gauss-newton")
    (path,) = run(model_dir, tmp_path / "out", methods="bm25,subspace:matrix=gauss-newton")
    found = json.loads(path.read_text())["results"]["reference"]
    assert not [name for name, numbers in found.items() if "error" in numbers]
    assert len(found) == 2


def test_a_refused_run_is_tried_again_on_the_products_that_it_had(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datablame.methods.subspace import Subspace

    def refuse(*args: Any) -> None:
        raise UserError("not positive definite")

    with monkeypatch.context() as patched:
        patched.setattr(Subspace, "_refuse_negative", refuse)
        (path,) = run(model_dir, tmp_path / "out", methods="subspace:matrix=hessian,damping=9.0")
    assert (
        "error" in json.loads(path.read_text())["results"]["reference"]["subspace:matrix=hessian,damping=9.0@response"]
    )
    cell, _ = folders(tmp_path)
    (kept,) = (p for p in cell.iterdir() if p.is_dir())
    assert [p.name for p in kept.iterdir()] == ["products"]
    monkeypatch.setattr(costly, "product_of", lambda *args: lambda *xs: pytest.fail("the product was made again"))
    run(model_dir, tmp_path / "out", methods="subspace:matrix=hessian,damping=9.0")
    assert (
        "error"
        not in json.loads(path.read_text())["results"]["reference"]["subspace:matrix=hessian,damping=9.0@response"]
    )
    assert not kept.exists()


# ---------------------------------------------------------------- interruptions and failures


def test_an_interrupted_capture_goes_on(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done is in the file; the store that was begun is finished, and the rows in it are not captured again."""
    wanted = "bm25,kfac,gauss-newton:damping=0.1"
    straight = json.loads(run(model_dir, tmp_path / "straight", methods=wanted)[0].read_text())["results"]
    cell, _ = folders(tmp_path)
    fill, calls = costly.fill, []

    def broken(store: Any, *args: Any) -> None:
        calls.append(f"{store.path.parent.name}/{store.path.name}")
        if calls[-1] == "sampled-draws-4-3/reference":
            raise KeyboardInterrupt
        fill(store, *args)

    with monkeypatch.context() as m:
        m.setattr(costly, "fill", broken)
        with pytest.raises(KeyboardInterrupt):
            run(model_dir, tmp_path / "resumed", methods=wanted)
    path = result_path(tmp_path / "resumed", Cell(str(model_dir), "tiny", "smoke", 0))
    assert set(json.loads(path.read_text())["results"]["reference"]) == {"bm25", "kfac@response"}
    assert (cell / "sampled-draws-4-3" / "train" / "shard-00000.safetensors").exists()
    notes: list[str] = []

    class Told(bench_module.Reporter):
        def note(self, message: str) -> None:
            notes.append(message)

    with monkeypatch.context() as m:
        for module, name in ((finetunes, "tune"), (cell_module, "answers"), (bench_module, "run_cell")):
            m.setattr(module, name, lambda *a, **k: pytest.fail("done before"))
        run(model_dir, tmp_path / "resumed", methods=wanted, reporter=Told())
    assert f"{cell / 'sampled-draws-4-3' / 'train'} is complete already." in notes
    resumed = json.loads(path.read_text())["results"]
    times = ("seconds", "capture_seconds")
    for kind, found in straight.items():
        for name, values in found.items():
            same = [{k: v for k, v in x.items() if k not in times} for x in (values, resumed[kind][name])]
            assert same[0] == same[1]


def test_features_that_cannot_be_captured_fail_alone(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> Any:
        raise UserError("--extras daunce: under perturbed adapter 0 a loss is not finite")

    monkeypatch.setattr(perturbed.Perturbed, "capture", refuse)
    (path,) = run(model_dir, tmp_path / "out", methods="bm25,daunce,rept,cg:steps=21,daunce:correlation=true")
    for found in json.loads(path.read_text())["results"].values():
        for name in ("daunce@response", "daunce:correlation=true@response"):
            assert found[name]["error"] == "--extras daunce: under perturbed adapter 0 a loss is not finite"
        limits = "6 rows, 4 queries, 21 steps: a cell allows at most 32 rows, 8 queries, 20 steps."
        assert found["cg:steps=21@response"]["error"] == limits
        assert "error" not in found["rept@response"]
        assert "error" not in found["bm25"]
    results = load_results(tmp_path / "out", str(model_dir), "smoke")["tiny"]
    assert results.costly == ["rept@response"]
    assert set(results.failed) == {"daunce@response", "daunce:correlation=true@response", "cg:steps=21@response"}
    found = json.loads(path.read_text())
    assert set(failures(found)) == {"daunce@response", "daunce:correlation=true@response"}
    assert failures(found, limit=True) == {"cg:steps=21@response": limits}
    tried: list[str] = []  # what failed is tried again, and a limit is no failure
    monkeypatch.setattr(
        bench_module,
        "_add_costly",
        lambda c, t, by_need, *a: tried.extend(r for some in by_need.values() for r in some),
    )
    run(model_dir, tmp_path / "out", methods="bm25,daunce,rept,cg:steps=21,daunce:correlation=true")
    assert tried == ["daunce@response", "daunce:correlation=true@response"]


def test_a_method_of_one_product_has_a_limit_of_its_own() -> None:
    """Rows and queries together, and no steps: more of each than `cg` may have."""

    def sized(n: int, m: int) -> Task:
        t, i, j = task(), np.arange(m) % 4, np.arange(n) % 6
        queries, groups = [t.queries[k] for k in i], [t.groups[k] for k in i]
        return replace(t, train=[t.train[k] for k in j], queries=queries, groups=groups, truth=t.truth[i][:, j])

    few, most = sized(40, 9), sized(100, 28)
    for there in (few, most):
        assert costly.limited("subspace:matrix=hessian@response", there) == ""
        assert costly.limited("cg:steps=1@response", there)
    limits = "100 rows, 29 queries: a cell allows at most 128 of both together."
    assert costly.limited("subspace@response", sized(100, 29)) == limits
    assert costly.limited("exact@response", sized(100, 29)) == ""


def test_a_full_disk_is_no_fault_of_the_method(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise DiskError("the index needs 1 MB and only 0 MB are free")

    with monkeypatch.context() as m:
        m.setattr(costly, "check_disk", full)
        with pytest.raises(UserError, match="only 0 MB are free"):
            run(model_dir, tmp_path / "out", methods="bm25,rept")
    (path,) = run(model_dir, tmp_path / "out", methods="bm25,rept")
    assert "error" not in json.loads(path.read_text())["results"]["reference"]["rept@response"]


# ---------------------------------------------------------------- the plan


def test_they_have_the_response_alone() -> None:
    assert runs("all", "kfac,tracincp,bif,graddot@prompt") == [
        "kfac@response",
        "tracincp@response",
        "bif@response",
        "graddot@prompt",
    ]
    assert runs("paper", "rept") == ["rept@response"]
    with pytest.raises(UserError, match="kfac@prompt: what kfac needs is captured on the response's loss alone; use"):
        runs("all", "kfac@prompt")
    assert runs("all", "trackstar@prompt") == ["trackstar@prompt"]  # made of the usual features
    for name in COSTLY:
        assert runs("all", name) == [name]
        assert beyond(name)
    assert not [name for name in runs("all") if beyond(name)]


def test_one_task_and_one_seed_have_them_unless_methods_are_named() -> None:
    cells = bench_module._cells("m", "cpu", ["grammars", "facts"], [0, 1], ["sound", "paper"], {})
    wanted = bench_module._wanted(cells, "all", None, True)
    assert [c.name for c, names in wanted.items() if set(COSTLY) & set(names)] == ["grammars-sound-s0"]
    assert wanted[cells[0]] == [*runs("all"), *COSTLY]
    assert not set(COSTLY) & {r for names in bench_module._wanted(cells, "all", "bm25", True).values() for r in names}
    assert not set(COSTLY) & {r for names in bench_module._wanted(cells, "paper", None, True).values() for r in names}
    smoke = bench_module._cells("m", "smoke", ["grammars"], [0], ["sound"], {})
    assert not set(COSTLY) & set(bench_module._wanted(smoke, "all", None, True)[smoke[0]])
    assert bench_module._wanted(cells, "all", None, False)[cells[0]] == runs("all")


def test_the_forecast_counts_their_passes(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the benchmark's own options
    beyond.cache_clear()
    want = {  # a pass, .3 for the base model; checkpoints, draws or a third of a pass a sample
        "tracincp": (1.3 + 4, 1.3 + 4),
        "less": (1.3 + 4, 1.3 + 4),
        "gauss-newton": (1.3 + 4, 1.3),
        "kfac": (1.3 + 1, 1.3),
        "trak": (1.3 + 1, 1.3 + 1),
        "bif": (1.3 + 20 / 3 + 4 * (20 + 5 * 4) * 8 / 120, 1.3 + 20 / 3),
    }
    for name, expected in want.items():
        need = beyond(f"{name}@response")
        assert need
        assert forecast.passes(need, 120) == pytest.approx(expected)
    cell = Cell(str(model_dir), "tiny", "cpu", 0)
    usual, more = forecast.tokens(cell, task()), forecast.tokens(cell, task(), ["kfac"])
    again = forecast.tokens(cell, task(), ["kfac"], views=False)
    tokenizer = forecast.load_tokenizer(str(model_dir))
    train, queries = (
        sum(len(tokenizer(e.prompt + e.response)["input_ids"]) + 32 for e in rows)
        for rows in (task().train, [*task().queries] * 2)
    )
    assert more - usual == pytest.approx(2.3 * train + 1.3 * queries, abs=1)
    assert again == pytest.approx(3 * train + 2.3 * train + 1.3 * queries, abs=1)


def test_the_forecast_counts_curvature_products(model_dir: Path) -> None:
    """On the reference responses: a pass a call, and 4/3 for each vector of 6 rows, 4 queries."""
    want = {
        "subspace:matrix=hessian@response": 1 + 4 / 3 * (6 + 4),
        "subspace:matrix=fisher@response": 0,
        "cg:steps=3,probes=2@response": 1 + 3 + 4 / 3 * (2 + 3 * 4),
        "cg:steps=21@response": 0,  # beyond the limit
        "kfac@response": 0,
    }
    for name, expected in want.items():
        assert forecast.products(name, task()) == pytest.approx(expected), name
    cell = Cell(str(model_dir), "tiny", "cpu", 0)
    one, both = (forecast.tokens(cell, task(), runs) for runs in (list(want)[1:2], list(want)[:2]))
    tokenizer = forecast.load_tokenizer(str(model_dir))
    train = sum(len(tokenizer(e.prompt + e.response)["input_ids"]) + 32 for e in task().train)
    assert both - one == pytest.approx((1 + 4 / 3 * 10) * train, abs=1)
    damped = [*list(want)[:2], "subspace:matrix=hessian,damping=9.0@response"]
    assert forecast.tokens(cell, task(), damped) == both  # the product is shared
    other = [*list(want)[:2], "subspace:matrix=gauss-newton,damping=9.0@response"]
    assert forecast.tokens(cell, task(), other) - one == pytest.approx(2 * (both - one), abs=1)
