"""The benchmark: cells planned, forecast, run where no result with the same fingerprint is there, and written."""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datablame.environment import environment
from datablame.errors import UserError, nearest
from datablame.evaluation.cell import (
    ANSWERS,
    FEATURES,
    RECIPES,
    SCORED,
    Cell,
    fingerprint,
    folder_of,
    opened,
    run_cell,
)
from datablame.evaluation.costly import costly_results, groups
from datablame.evaluation.finetunes import base_sha256
from datablame.evaluation.forecast import Plan, tokens, tokens_per_second
from datablame.evaluation.result_files import (
    failed_run,
    failures,
    lacking,
    not_learnt,
    of_these,
    read_result,
    result_path,
    save,
)
from datablame.evaluation.results import with_intervals
from datablame.evaluation.suites import Beyond, Suite, beyond, costly, runs, split
from datablame.evaluation.tasks import RELEASED, Task, build, names, takes
from datablame.evaluation.tasks.base import check_scale
from datablame.indexing import SILENT, Reporter, duration
from datablame.locks import alone
from datablame.models import ModelSpec, cache_dir, load
from datablame.scores import check_out
from datablame.store import DiskError

SEEDS = {"smoke": (0,), "cpu": (0, 1, 2), "paper": (0, 1, 2)}
SMOKE_TASKS = ("mixed-small", "grammars", "backdoor-1")


def bench(
    model: str,
    out: str | Path,
    *,
    suite: Suite = "all",
    scale: str = "smoke",
    tasks: Sequence[str] | None = None,
    methods: str | None = None,
    seeds: Sequence[int] | None = None,
    recipes: Sequence[str] = ("sound",),
    sources: dict[str, str | None] | None = None,
    layers: Sequence[str | None] = (None,),
    device: str | None = None,
    dtype: str | None = None,
    keep: bool = False,
    dry: bool = False,
    strict: bool = True,
    with_costly: bool = True,
    reporter: Reporter = SILENT,
) -> list[Path]:
    """Run every cell without a result, and write each into `out` as soon as it is done; where all results are to be.

    Several processes may run the same command at once: each takes cells that no other has begun.
    A cell is a task, a seed and a recipe (`sound`, or `paper`: the paper's own fine-tune, first seed only).
    `methods` as in `suites.runs`; without it one cell has `suites.costly` too, but for `with_costly=False`. `dry` only
    plans and forecasts.
    layers: cells with a LoRA in some blocks only, such as `0,1,2,3`; None: in all.
    strict: end with an error when, under the sound recipe at a scale above `smoke`, a fine-tune of all layers has not
        learnt its behaviour, see `result_files.failed_run`; else tables mark it.

    Raises UserError for an unknown name, for an `out` that cannot be written to, for cells that failed (after all
    others), and see `strict`.
    """
    check_scale(scale)
    if not dry:
        check_out(Path(out))
    given = {k: v for k, v in (sources or {}).items() if v is not None}
    cells = _wanted(_cells(model, scale, tasks, seeds, recipes, given, layers), suite, methods, with_costly)
    if dtype == "float64" and any(split(run)[1] == "padded" for wanted in cells.values() for run in wanted):
        raise UserError("--dtype float64: attention over padding is not finite in it (the padded view). Use float32.")
    paths = {cell: result_path(Path(out), cell) for cell in cells}
    loaded = load(ModelSpec(model, None, device, dtype))
    model_sha256 = base_sha256(loaded)
    plan = _plan(cells, paths, model_sha256, given)
    reporter.note(plan.sentence(tokens_per_second(loaded, *plan.cells[0][:2]) if plan.cells else None))
    del loaded
    if dry:
        return list(paths.values())
    how: dict[str, Any] = {"device": device, "dtype": dtype, "reporter": reporter}
    commands = {cell: _command(cell, given, suite, methods, dtype) for cell in cells}
    _each(
        {
            cell.name: partial(_run, cell, task, cells[cell], paths[cell], model_sha256, commands[cell], keep, how)
            for cell, task, _ in plan.cells
        },
        reporter,
    )
    if strict:
        _check_learnt(list(paths.values()))
    return list(paths.values())


def _each(cells: Mapping[str, Callable[[], None]], reporter: Reporter) -> None:
    """Run all. Raises UserError, after the last, for those that failed; DiskError at once, since the next would too."""
    failed = []
    for name, run in cells.items():
        try:
            run()
        except DiskError:
            raise
        except UserError as e:
            failed.append(f"{name}: {e}")
            reporter.note(f"{name} failed: {e}")
    if failed:
        raise UserError("\n".join(["some cells failed, and are tried again by the same command:", *failed]))


def _wanted(cells: Sequence[Cell], suite: Suite, methods: str | None, with_costly: bool) -> dict[Cell, list[str]]:
    """The runs of each cell. Raises UserError for an unknown suite, method or view."""
    usual = runs(suite, methods)
    of_one = {
        c: () if methods or c.layers or not with_costly else costly(c.rows, c.scale, c.seed, c.recipe, suite)
        for c in cells
    }
    return {cell: [*usual, *more] for cell, more in of_one.items()}


def _run(
    cell: Cell,
    task: Task,
    wanted: Sequence[str],
    path: Path,
    model_sha256: str,
    command: str,
    keep: bool,
    how: dict[str, Any],
) -> None:
    """Run what a cell lacks, unless another process is at it. keep: the features. how: device, dtype, reporter."""
    work, reporter, start = cache_dir() / "bench", how["reporter"], time.monotonic()
    with alone(work / folder_of(cell, task, model_sha256) / "lock") as first:
        missing = lacking(path, fingerprint(cell, task, model_sha256), wanted)
        if not first or not missing:
            reporter.note(f"{cell.name}: {'done' if first else 'being run'} by another process")
            return
        reporter.note(f"{cell.name}: {len(task.train)} rows, {len(task.queries)} queries, {len(missing)} runs")
        usual = [run for run in missing if not beyond(run)]
        if usual or not of_these(path, fingerprint(cell, task, model_sha256)):
            result = run_cell(cell, task, usual, work, model_sha256, **how)
            save(path, _complete(result | {"model_sha256": model_sha256, "command": command} | environment()))
            _tidy(work / folder_of(cell, task, model_sha256), keep)
        if by_need := groups(missing):
            _add_costly(cell, task, by_need, path, model_sha256, command, keep, how)
    result = read_result(path) or {}
    reporter.note(f"{cell.name}: done in {duration(time.monotonic() - start)}; {_learnt_line(result)}")
    for run, why in failures(result).items():
        reporter.note(f"{cell.name}: {run} failed: {why}")


def _tidy(folder: Path, keep: bool) -> None:
    """Features go once they are scored, unless this run or an earlier one of the cell was told to keep them.

    Scores of single runs go in any case: a cell that is made again is scored by the methods of that day.
    """
    shutil.rmtree(folder / SCORED, ignore_errors=True)
    kept = folder / "keep-features"
    if keep:
        kept.touch()
    if not kept.exists():
        for stores in folder.glob(f"{FEATURES}*"):
            shutil.rmtree(stores, ignore_errors=True)


def _add_costly(
    cell: Cell,
    task: Task,
    by_need: Mapping[Beyond, list[str]],
    path: Path,
    model_sha256: str,
    command: str,
    keep: bool,
    how: dict[str, Any],
) -> None:
    """Runs on features of their own join the cell's result, those of one kind as soon as they are done."""
    o = opened(cell, task, cache_dir() / "bench", model_sha256, **how)
    for need, chosen in by_need.items():
        how["reporter"].note(f"{cell.name}: {need.spelling} for {', '.join(chosen)}")
        result = read_result(path) or {}
        made = partial(costly_results, o, task, need, chosen, loss=result["learnt"]["loss"]["tuned"], keep=keep)
        results = o.timed("costly", partial(made, reporter=how["reporter"]))
        seconds = result["seconds"] | {"costly": o.seconds["costly"]}
        save(path, _complete(result | {"results": results, "seconds": seconds, "command": command}))


def _complete(result: dict[str, Any]) -> dict[str, Any]:
    """With intervals, and the sum of its seconds."""
    seconds = {k: v for k, v in result["seconds"].items() if k != "all"}
    return with_intervals(result) | {"seconds": seconds | {"all": round(sum(seconds.values()), 1)}}


def _command(cell: Cell, sources: dict[str, str], suite: Suite, methods: str | None, dtype: str | None) -> str:
    """What makes this cell again."""
    given = f" --layers {cell.layers}" if cell.layers else ""
    given += f" --suite {suite}" if suite != "all" else ""
    given += f" --methods {shlex.quote(methods)}" if methods else ""
    given += f" --dtype {dtype}" if dtype else ""
    given += "".join(f" --{k} {k.upper()}" for k in sources if k in takes(cell.task))
    return (
        f"datablame bench run --model {cell.described()['model']} --scale {cell.scale} --tasks {cell.task} "
        f"--seeds {cell.seed} --recipes {cell.recipe}{given}"
    )


def _cells(
    model: str,
    scale: str,
    tasks: Sequence[str] | None,
    seeds: Sequence[int] | None,
    recipes: Sequence[str],
    sources: dict[str, str],
    layers: Sequence[str | None] = (None,),
) -> list[Cell]:
    """Each cell once. Raises UserError for an unknown task or recipe, odd layers, or a source that no task takes."""
    default = SMOKE_TASKS if scale == "smoke" else [n for n in names() if n not in RELEASED]
    chosen = list(dict.fromkeys(tasks or [*default, *(RELEASED if "data" in sources else ())]))
    if strange := [r for r in recipes if r not in RECIPES]:
        raise UserError(f"--recipes {strange[0]!r}: use {' or '.join(RECIPES)}.{nearest(strange[0], RECIPES)}")
    taken = {source for task in chosen for source in takes(task)}
    if unused := [k for k in sources if k not in taken]:
        raise UserError(f"--{unused[0]}: none of {', '.join(chosen)} takes it.")
    numbers = list(dict.fromkeys(SEEDS[scale] if seeds is None else seeds))
    return [
        Cell(model, task, scale, seed, recipe, named(task, sources), blocks)  # type: ignore[arg-type]
        for blocks in dict.fromkeys(map(_blocks, layers))
        for recipe in dict.fromkeys(recipes)
        for seed in (numbers if recipe == "sound" else numbers[:1])
        for task in chosen
    ]


def _blocks(layers: str | None) -> str | None:
    """Block numbers in one spelling."""
    if layers is None:
        return None
    if not all(part.strip().isdecimal() for part in layers.split(",")):
        raise UserError(f"--layers {layers}: block numbers separated by commas, such as 0,1,2.")
    return ",".join(map(str, sorted({int(part) for part in layers.split(",")})))


def named(task: str, sources: Mapping[str, str | None]) -> tuple[str, ...]:
    """The sources that tell results of a task apart: those that it takes, and can do without."""
    return tuple(k for k in takes(task) if sources.get(k) is not None and task not in RELEASED)


def _check_learnt(paths: Sequence[Path]) -> None:
    """Raise UserError where a fine-tune did not learn what its task is about."""
    results = {p.stem: read_result(p) for p in paths}  # None: another process is at it
    failed = [stem for stem, result in results.items() if result and failed_run(result)]
    if failed:
        raise UserError(
            f"{', '.join(failed)}: the behaviour was not learnt, so these cells show nothing. Their results are kept, "
            "and left out of every table and figure where another seed has learnt it: run further --seeds."
        )


def check_model(path: Path, result: Mapping[str, Any] | None, model_sha256: str) -> None:
    """Raise UserError where a result of another model lies in this place: directories may share a name."""
    other = (result or {}).get("model_sha256", model_sha256)
    if other != model_sha256:
        raise UserError(
            f"{path}: there is a result of another model of this name (sha256 {other[:12]}…, not {model_sha256[:12]}…; "
            "the same one in another --dtype is another, too). Give another --out, or delete that result."
        )


def _check_files(cell: Cell, path: Path, expected: str) -> None:
    """Raise UserError where a result of other files than the user's now lies in this place."""
    old = read_result(path)
    if old is not None and old["fingerprint"] != expected and (cell.sources or cell.task in RELEASED):
        raise UserError(f"{path}: there is a result of other rows. Give another --out, or delete that result.")


def _plan(
    cells: Mapping[Cell, Sequence[str]], paths: Mapping[Cell, Path], model_sha256: str, sources: dict[str, str]
) -> Plan:
    left, finished, count = [], 0, 0
    for cell, wanted in cells.items():
        known = takes(cell.task)
        task = build(cell.task, cell.scale, cell.seed, **{k: v for k, v in sources.items() if k in known})
        path, expected = paths[cell], fingerprint(cell, task, model_sha256)
        check_model(path, read_result(path), model_sha256)
        _check_files(cell, path, expected)
        missing = lacking(path, expected, wanted)
        if missing:
            left.append((cell, task, missing))
            views = not of_these(path, expected) or any(not beyond(run) for run in missing)
            trained = (cache_dir() / "bench" / folder_of(cell, task, model_sha256) / ANSWERS).exists()
            count += tokens(cell, task, missing, views=views, trained=trained)
        else:
            finished += 1
    return Plan(left, finished, count)


def _learnt_line(result: Mapping[str, Any]) -> str:
    """What the fine-tune taught; where it is not what was to be learnt, why."""
    learnt = result["learnt"]
    share, loss = learnt["behaves"], learnt["loss"]
    text = (
        f"{share['tuned']:.0%} of the answers show it (base model {share['base']:.0%}), "
        f"loss a response token {loss['tuned']:.2f} (base {loss['base']:.2f})"
    )
    return f"learnt: {text}" if learnt["learnt"] else f"behaviour not learnt ({not_learnt(result)}): {text}"
