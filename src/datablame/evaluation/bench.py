"""The benchmark: cells planned, forecast, run where no result with the same fingerprint is there, and written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datablame.environment import environment
from datablame.errors import UserError, nearest
from datablame.evaluation.cell import RECIPES, VERSION, Cell, fingerprint, folder_of, run_cell
from datablame.evaluation.forecast import Plan, tokens, tokens_per_second
from datablame.evaluation.suites import Suite, runs
from datablame.evaluation.tasks import RELEASED, build, names, takes
from datablame.evaluation.tasks.base import check_scale
from datablame.indexing import SILENT, Reporter, duration
from datablame.locks import alone
from datablame.models import ModelSpec, cache_dir, load

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
    device: str | None = None,
    dtype: str | None = None,
    keep: bool = False,
    dry: bool = False,
    reporter: Reporter = SILENT,
) -> list[Path]:
    """Run every cell without a result, and write each into `out` as soon as it is done; the paths of all results.

    Several processes may run the same command at once: each takes cells that no other has begun.
    A cell is a task, a seed and a recipe (`sound`, or `paper`: the paper's own fine-tune, first seed only).
    `methods` as in `suites.runs`. `dry` only plans and forecasts.

    Raises UserError for an unknown name, and, at the end, when under the sound recipe at a scale above `smoke` a
    fine-tune has not learnt its behaviour.
    """
    wanted = runs(suite, methods)
    given = {k: v for k, v in (sources or {}).items() if v is not None}
    check_scale(scale)
    if dtype == "float64":
        raise UserError("--dtype float64: attention over padding is not finite in it (the padded view). Use float32.")
    cells = _cells(model, scale, tasks, seeds, recipes, given)
    folder = Path(out)
    loaded = load(ModelSpec(model, None, device, dtype))
    model_sha256 = loaded.model_sha256
    plan = _plan(cells, wanted, folder, model_sha256, given)
    reporter.note(plan.sentence(tokens_per_second(loaded, *plan.cells[0][:2]) if plan.cells else None))
    del loaded
    paths = [result_path(folder, c) for c in cells]
    if dry:
        return paths
    work = cache_dir() / "bench"
    for cell, task, _ in plan.cells:
        path = result_path(folder, cell)
        with alone(work / folder_of(cell, task, model_sha256) / "lock") as first:
            missing = lacking(path, fingerprint(cell, task, model_sha256), wanted)
            if not first or not missing:
                reporter.note(f"{cell.name}: {'done' if first else 'being run'} by another process")
                continue
            reporter.note(f"{cell.name}: {len(task.train)} rows, {len(task.queries)} queries, {len(missing)} runs")
            result = run_cell(
                cell, task, missing, work, model_sha256, device=device, dtype=dtype, keep=keep, reporter=reporter
            )
            result |= {"model_sha256": model_sha256, "command": _command(cell, given)} | environment()
            result["seconds"]["all"] = round(sum(result["seconds"].values()), 1)
            save(path, result)
        reporter.note(f"{cell.name}: done in {duration(result['seconds']['all'])}; {_learnt_line(result['learnt'])}")
    if scale != "smoke":
        _check_learnt([p for p, c in zip(paths, cells, strict=True) if c.recipe == "sound"])
    return paths


def _command(cell: Cell, sources: dict[str, str]) -> str:
    """What makes this cell again."""
    given = "".join(f" --{k} {k.upper()}" for k in sources if k in takes(cell.task))
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
) -> list[Cell]:
    """Each cell once. Raises UserError for an unknown task or recipe, and for a source that no task takes."""
    default = SMOKE_TASKS if scale == "smoke" else [n for n in names() if n not in RELEASED]
    chosen = list(dict.fromkeys(tasks or [*default, *(RELEASED if "data" in sources else ())]))
    if strange := [r for r in recipes if r not in RECIPES]:
        raise UserError(f"--recipes {strange[0]!r}: use {' or '.join(RECIPES)}.{nearest(strange[0], RECIPES)}")
    taken = {source for task in chosen for source in takes(task)}
    if unused := [k for k in sources if k not in taken]:
        raise UserError(f"--{unused[0]}: none of {', '.join(chosen)} takes it.")
    numbers = list(dict.fromkeys(SEEDS[scale] if seeds is None else seeds))
    return [
        Cell(model, task, scale, seed, recipe, named(task, sources))  # type: ignore[arg-type]
        for recipe in dict.fromkeys(recipes)
        for seed in (numbers if recipe == "sound" else numbers[:1])
        for task in chosen
    ]


def named(task: str, sources: Mapping[str, str | None]) -> tuple[str, ...]:
    """The sources that tell results of a task apart: those that it takes, and can do without."""
    return tuple(k for k in takes(task) if sources.get(k) is not None and task not in RELEASED)


def _check_learnt(paths: Sequence[Path]) -> None:
    """Raise UserError where a fine-tune did not learn what its task is about."""
    results = {p.stem: read_result(p) for p in paths}  # None: another process is at it
    failed = [stem for stem, result in results.items() if result and not result["learnt"]["learnt"]]
    if failed:
        raise UserError(
            f"{', '.join(failed)}: the behaviour was not learnt, so these cells show nothing. The results are kept."
        )


def result_path(out: Path, cell: Cell) -> Path:
    """`OUT/MODEL/SCALE/TASK-RECIPE-sSEED.json`; with a source `TASK-SOURCE-RECIPE-sSEED.json`."""
    return out / Path(cell.model).name / cell.scale / f"{cell.name}.json"


def check_model(path: Path, result: Mapping[str, Any] | None, model_sha256: str) -> None:
    """Raise UserError where a result of another model lies in this place: directories may share a name."""
    other = (result or {}).get("model_sha256", model_sha256)
    if other != model_sha256:
        raise UserError(
            f"{path}: there is a result of another model of this name (sha256 {other[:12]}…, not {model_sha256[:12]}…; "
            "the same one in another --dtype is another, too). Give another --out, or delete that result."
        )


def _plan(
    cells: Sequence[Cell],
    wanted: Sequence[str],
    out: Path,
    model_sha256: str,
    sources: dict[str, str],
) -> Plan:
    left, finished, count = [], 0, 0
    for cell in cells:
        known = takes(cell.task)
        task = build(cell.task, cell.scale, cell.seed, **{k: v for k, v in sources.items() if k in known})
        path = result_path(out, cell)
        check_model(path, read_result(path), model_sha256)
        missing = lacking(path, fingerprint(cell, task, model_sha256), wanted)
        if missing:
            left.append((cell, task, missing))
            count += tokens(cell, task)
        else:
            finished += 1
    return Plan(left, finished, count)


def lacking(path: Path, expected: str, wanted: Sequence[str]) -> list[str]:
    """The runs that a result file does not hold; all of them where there is none, or one of another fingerprint."""
    found = read_result(path)
    if found is None or found.get("fingerprint") != expected:
        return list(wanted)
    return [run for run in wanted if any(run not in runs for runs in found["results"].values())]


def read_result(path: Path) -> dict[str, Any] | None:
    """A result, or None where there is none that this version wrote. Raises UserError for a damaged file."""
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        return result if result["version"] == VERSION else None
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path}: damaged; delete it, and the cell is run again.") from e


def save(path: Path, result: dict[str, Any]) -> None:
    """Write a result; runs of an earlier one with the same fingerprint stay."""
    old = read_result(path)
    if old is not None and old["fingerprint"] == result["fingerprint"]:
        for kind, found in result["results"].items():
            result["results"][kind] = old["results"].get(kind, {}) | found
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(to_json(result), encoding="utf-8")
    part.replace(path)


def to_json(result: dict[str, Any]) -> str:
    """One key a line, and one line a run: small, and readable in a diff."""
    compact: Callable[[Any], str] = lambda x: json.dumps(x, ensure_ascii=False, allow_nan=False)  # noqa: E731
    lines = []
    for key, value in result.items():
        if key == "results":
            sets = []
            for kind, found in value.items():
                inner = ",\n".join(f"   {compact(run)}: {compact(v)}" for run, v in found.items())
                sets.append(f"  {compact(kind)}: {{\n{inner}\n  }}")
            lines.append(f' "results": {{\n{",".join(chr(10) + s for s in sets).lstrip()}\n }}')
        else:
            lines.append(f" {compact(key)}: {compact(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _learnt_line(learnt: dict[str, Any]) -> str:
    share, loss = learnt["behaves"], learnt["loss"]
    state = "learnt" if learnt["learnt"] else "behaviour not learnt"
    return (
        f"{state}: {share['tuned']:.0%} of the answers show it (base model {share['base']:.0%}), "
        f"loss a response token {loss['tuned']:.2f} (base {loss['base']:.2f})"
    )
