"""`datablame bench`: the tasks, and their rows as files."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from datablame.errors import UserError

if TYPE_CHECKING:
    from datablame.evaluation.tasks import Task
    from datablame.models import Loaded

HELP = "Tasks with known truth: list them, write their rows, measure every method on them."
app = typer.Typer(help=HELP, no_args_is_help=True)

Scale = Annotated[str, typer.Option(help="smoke, cpu or paper: how many rows and queries.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the rows.")]
AdvBench = Annotated[
    str | None, typer.Option(help="Real harmful prompts: a file, a hub id, or pyrit (fetched with pip).")
]
Alpaca = Annotated[str | None, typer.Option(help="Real instructions: a file, a hub id, or llamafactory.")]
Data = Annotated[str | None, typer.Option(help="Directory of the paper's released files.")]


RESULTS = Path("bench-out")


@app.command("tasks")
def list_tasks(
    names: Annotated[list[str] | None, typer.Argument(help="Tasks. Default: all.")] = None,
    scale: Scale = "cpu",
    seed: Seed = 0,
    model: Annotated[str | None, typer.Option(help="Say too what this model's hidden states give away.")] = None,
    advbench: AdvBench = None,
    alpaca: Alpaca = None,
    data: Data = None,
) -> None:
    """Describe the tasks: sizes, chance, what words (and a base model) alone give away, and one row of each class."""
    from datablame.evaluation import tasks
    from datablame.models import ModelSpec, load

    given = {"advbench": advbench, "alpaca": alpaca, "data": data}
    chosen = names or [n for n in tasks.names() if data is not None or n not in tasks.RELEASED]
    _check_used(given, chosen)
    tasks.check_scale(scale)
    base = None if model is None else load(ModelSpec(model))
    for name in chosen:
        known = tasks.takes(name)
        _describe(tasks.build(name, scale, seed, **{k: v for k, v in given.items() if k in known}), base)


@app.command("rows")
def write_rows(
    name: Annotated[str, typer.Argument(help="A task.")],
    out: Annotated[Path, typer.Option(help="Directory to write train.jsonl and queries.jsonl to.")],
    scale: Scale = "cpu",
    seed: Seed = 0,
    advbench: AdvBench = None,
    alpaca: Alpaca = None,
    data: Data = None,
) -> None:
    """Write a task's rows: prompt, response, label, and the queries' group."""
    from datablame.evaluation import tasks
    from datablame.scores import check_out

    task = tasks.build(name, scale, seed, advbench=advbench, alpaca=alpaca, data=data)
    check_out(out)
    train = [{"prompt": e.prompt, "response": e.response, "label": e.label} for e in task.train]
    queries = [
        {"prompt": e.prompt, "response": e.response, "label": e.label, "group": group}
        for e, group in zip(task.queries, task.groups, strict=True)
    ]
    for file, rows in {"train.jsonl": train, "queries.jsonl": queries}.items():
        _write(out / file, rows)
        typer.echo(f"wrote {out / file}: {len(rows)} rows")


@app.command("run")
def run_bench(
    model: Annotated[str, typer.Option(help="As for `datablame index`.")] = "smollm2-135m",
    suite: Annotated[str, typer.Option(help="paper (the released protocol), sound, or all.")] = "all",
    scale: Annotated[str, typer.Option(help="smoke (minutes), cpu (hours), paper (a GPU).")] = "smoke",
    tasks: Annotated[str | None, typer.Option(help="Tasks, separated by commas. Default: all; smoke: three.")] = None,
    methods: Annotated[str | None, typer.Option(help="Methods, such as gradcos,exact:damping=1@response.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, separated by commas. Default: 0,1,2; smoke: 0.")] = None,
    recipes: Annotated[str, typer.Option(help="Fine-tunes: sound, paper, or sound,paper.")] = "sound",
    layers: Annotated[
        list[str] | None, typer.Option(help="Fine-tunes of these blocks only, such as 0,1,2,3; may be repeated.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory of the results, one small file a cell.")] = RESULTS,
    dry: Annotated[bool, typer.Option("--dry", help="Only plan and forecast.")] = False,
    keep: Annotated[bool, typer.Option("--keep-features", help="Leave each cell's features in the cache.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps or auto.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float64. Default: by device.")] = None,
    advbench: AdvBench = None,
    alpaca: Alpaca = None,
    data: Data = None,
) -> None:
    """Fine-tune, attribute, measure. Cells with a result are not run again; an interrupted run goes on."""
    from datablame.console import ConsoleReporter
    from datablame.evaluation.bench import bench
    from datablame.evaluation.result_files import failures, read_result
    from datablame.indexing import quiet_libraries

    quiet_libraries()
    paths = bench(
        model,
        out,
        suite=suite,  # type: ignore[arg-type]
        scale=scale,
        tasks=_split(tasks, "--tasks"),
        methods=methods,
        seeds=numbers(seeds),
        recipes=_split(recipes, "--recipes"),
        layers=layers or [None],
        sources={"advbench": advbench, "alpaca": alpaca, "data": data},
        device=device,
        dtype=dtype,
        keep=keep,
        dry=dry,
        reporter=ConsoleReporter(),
    )
    if not dry:
        left = [p.stem for p in paths if not p.exists()]
        see = f"datablame bench show --scale {scale} --out {shlex.quote(str(out))}"
        typer.echo(f"results in {out}: {len(paths) - len(left)}; see them with: {see}")
        if left:
            typer.echo(f"another process is still at {', '.join(left)}")
        for_good = [
            f"{p.stem}: {run}: {why}" for p in paths for run, why in failures(read_result(p), limit=True).items()
        ]
        for line in for_good:
            typer.echo(f"not run, {line}")
        if failed := [f"{p.stem}: {run}: {why}" for p in paths for run, why in failures(read_result(p)).items()]:
            raise UserError("\n".join(["some methods failed, and are tried again by the same command:", *failed]))


@app.command("show")
def show_bench(
    model: Annotated[str, typer.Option(help="Whose results.")] = "smollm2-135m",
    scale: Annotated[str, typer.Option(help="smoke, cpu or paper.")] = "smoke",
    recipe: Annotated[str | None, typer.Option(help="Which fine-tune: sound or paper. Default: all there are.")] = None,
    task: Annotated[
        str | None, typer.Option(help="Print this task's table, with every method, and not the ladder.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory of the results.")] = RESULTS,
    page: Annotated[Path | None, typer.Option(help="Where to write the page. Default: beside the results.")] = None,
    tables: Annotated[Path | None, typer.Option(help="Write the ladder and Tables 2 to 4 as Markdown, too.")] = None,
) -> None:
    """Print the ladder or a task's table, and write a page with all tables and pictures, retraining among them."""
    from datablame.console import print_grid
    from datablame.evaluation.results import load_suite
    from datablame.evaluation.tables import ladder_rows, task_rows
    from datablame.evaluation.tasks.base import check_scale
    from datablame.evaluation.truth_tables import truth_of_suite
    from datablame.report.bench import write_bench, write_tables

    check_scale(scale)
    suite = load_suite(out, model, scale, recipe)
    if task is not None and not any(task in found for found in suite.values()):
        there = dict.fromkeys(t for found in suite.values() for t in found)
        raise UserError(f"--task {task!r}: no results. There are {', '.join(there)}.")
    for name, found in suite.items():
        of = f"{name} fine-tune"
        if task is None:
            print_grid(f"from the paper's protocol to the sound one, {of}: AUROC (95 % interval)", ladder_rows(found))
        elif task in found:
            print_grid(f"{found[task].heading}, {of}: main queries, 95 % intervals", task_rows(found[task]))
        for note in (note for results in found.values() for note in results.left_out):
            typer.echo(note)
    place = page or out / Path(model).name / scale / "report.html"
    typer.echo(f"wrote {write_bench(suite, place, truth_of_suite(out, model, scale))}")
    if tables is not None:
        typer.echo(f"wrote {write_tables(suite, tables)}")


@app.command("retrain")
def retrain_bench(
    task: Annotated[str, typer.Argument(help="A task whose cells have been run.")],
    truth: Annotated[str, typer.Option(help="removal (drop what a method ranks first) or lds (random half-sets).")],
    model: Annotated[str, typer.Option(help="As for `datablame index`.")] = "smollm2-135m",
    scale: Scale = "cpu",
    seeds: Annotated[str | None, typer.Option(help="Seeds, separated by commas. Default: 0,1,2; smoke: 0.")] = None,
    runs: Annotated[list[str] | None, typer.Option("--run", help="method@view; may be repeated.")] = None,
    out: Annotated[Path, typer.Option(help="Directory of the results.")] = RESULTS,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps or auto.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float64. Default: by device.")] = None,
    advbench: AdvBench = None,
    alpaca: Alpaca = None,
    data: Data = None,
) -> None:
    """Hold methods against retraining, and print the table. Trainings are kept, and shared by two such commands."""
    from datablame.console import ConsoleReporter, print_grid
    from datablame.evaluation import tasks
    from datablame.evaluation.bench import SEEDS, named
    from datablame.evaluation.cell import Cell
    from datablame.evaluation.finetunes import base_sha256
    from datablame.evaluation.forecast import tokens_per_second
    from datablame.evaluation.truth import against_retraining
    from datablame.evaluation.truth_tables import load_truth, truth_rows, truth_title
    from datablame.indexing import quiet_libraries
    from datablame.models import ModelSpec, load

    if truth not in ("removal", "lds"):
        raise UserError(f"--truth {truth!r}: use removal or lds.")
    kind: Literal["removal", "lds"] = "lds" if truth == "lds" else "removal"
    quiet_libraries()
    given = {"advbench": advbench, "alpaca": alpaca, "data": data}
    tasks.check_scale(scale)
    cells = [
        (Cell(model, task, scale, seed, "sound", named(task, given)), tasks.build(task, scale, seed, **given))
        for seed in dict.fromkeys(numbers(seeds) or SEEDS[scale])
    ]
    sha256 = base_sha256(load(ModelSpec(model, None, device, dtype)))
    rate = lambda: tokens_per_second(load(ModelSpec(model, None, device, dtype)), *cells[0])  # noqa: E731
    options: dict[str, Any] = {"rate": rate, "device": device, "dtype": dtype, "reporter": ConsoleReporter()}
    paths = against_retraining(cells, sha256, kind, out, runs=runs, **options)
    every, notes = load_truth(out, model, scale, kind, cells[0][0].rows)
    found = every[cells[0][0].rows]
    print_grid(truth_title(found, kind), truth_rows(found, kind))
    for note in notes:
        typer.echo(note)
    typer.echo(f"results: {', '.join(str(p) for p in paths)}")


def _split(text: str | None, option: str) -> Any:
    """Names separated by commas; None where the option was not given. Raises UserError for none at all."""
    if text is None:
        return None
    if not (names := [part.strip() for part in text.split(",") if part.strip()]):
        raise UserError(f"{option} {text!r}: names nothing; leave it out, or give names separated by commas.")
    return names


def numbers(text: str | None) -> list[int] | None:
    """`--seeds 0,1,2`. Raises UserError for anything else."""
    if text is None:
        return None
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise UserError(f"--seeds {text!r}: whole numbers from 0 separated by commas, such as 0,1,2.")
    return [int(part) for part in text.split(",")]


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    try:
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    except OSError as e:
        raise UserError(f"--out {path}: cannot be written ({e.strerror or e}).") from e


def _check_used(given: dict[str, str | None], names: list[str]) -> None:
    """Raise UserError for a source that none of the tasks takes."""
    from datablame.evaluation import tasks

    taken = {source for name in names for source in tasks.takes(name)}
    if unused := [k for k, v in given.items() if v is not None and k not in taken]:
        raise UserError(f"--{unused[0]}: none of {', '.join(names)} takes it.")


def _describe(task: Task, base: Loaded | None) -> None:
    from datablame.console import shorten
    from datablame.evaluation.leak import hidden_leak, lexical_leak

    leak = lexical_leak(task)
    typer.echo(f"{task.name} (version {task.version}): {task.title}")
    typer.echo(
        f"  {len(task.train)} rows, {len(task.queries)} queries, {len(task.classes)} classes; "
        f"chance of a right top row {task.chance:.3f} (queries: {', '.join(task.main)})"
    )
    typer.echo(
        f"  AUROC of words alone: prompt {leak['prompt']:.2f}, response {leak['response']:.2f}; "
        f"the label shows on: {leak['shows']}"
    )
    if base:
        hidden = hidden_leak(task, base)
        typer.echo(
            f"  AUROC of hidden states of {base.spec.model}, not fine-tuned (RepSim, middle layer): "
            f"prompt {hidden['prompt']:.2f}, response {hidden['response']:.2f}"
        )
    for label in task.classes:
        e = next(e for e in task.train if e.label == label)
        typer.echo(f"    {shorten(label, 24):24} {shorten(e.prompt, 80)} → {shorten(e.response, 100)}")
    typer.echo()
