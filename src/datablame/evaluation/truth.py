"""Methods held against retraining: `datablame bench retrain`. Needs the score matrices of finished cells."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from datablame.environment import environment
from datablame.errors import UserError
from datablame.evaluation.bench import check_model
from datablame.evaluation.cell import MATRICES, Cell, fingerprint, folder_of, options
from datablame.evaluation.forecast import row_tokens
from datablame.evaluation.leak import lexical_leak
from datablame.evaluation.result_files import failed_run, not_learnt, read_result, result_path, versioned
from datablame.evaluation.results import today
from datablame.evaluation.retraining import (
    Job,
    Retrained,
    half_sets,
    lds,
    noise_ceiling,
    random_rows,
    retrain_all,
    standard_error,
    top_rows,
)
from datablame.evaluation.scoring import read_matrices, rounded
from datablame.evaluation.tables import REFERENCES
from datablame.evaluation.tasks import RELEASED, Task
from datablame.indexing import SILENT, Reporter, duration
from datablame.models import cache_dir
from datablame.store import write_whole
from datablame.tuning import decisive

if TYPE_CHECKING:
    from jaxtyping import Float

    Matrices = Mapping[str, Float[np.ndarray, "m n"]]

Kind = Literal["removal", "lds"]
KINDS: tuple[Kind, ...] = ("removal", "lds")
VERSION = 5
"""Of a result of retraining. Another number means that old ones are made again."""
REMOVED = (
    *(
        f"{method}@{view}"
        for method in ("graddot", "gradcos", "datainf:damping=0.1", "exact:damping=1.0,unit=rank")
        for view in ("response", "all")
    ),
    REFERENCES["R"],
    REFERENCES["B"],
)
"""Runs whose top rows are dropped by default, one training each and seed: with the prompt in the loss and without."""
NOTHING, AGAIN, CHANCE, RIGHT = "nothing", "nothing, trained from another seed", "chance", "the right rows"
"""What stands beside them. AGAIN: what a training alone changes."""
HALF_SETS = 16
SECOND = 1000
"""Added to a seed for a second training on the same rows."""


@dataclass(frozen=True)
class Seed:
    """One seed's result: where it lies, what decides it, the trainings that it needs, and what they are made into."""

    place: Path
    described: Mapping[str, Any]
    jobs: Mapping[str, Job]
    told: Callable[[Mapping[str, Retrained]], dict[str, Any]]

    def made(self, work: Path) -> bool:
        """Write it, once all of its trainings are there."""
        found = {name: job.found(work) for name, job in self.jobs.items()}
        done = {name: r for name, r in found.items() if r is not None}
        if len(done) < len(found):
            return False
        seconds = [r.seconds for r in done.values() if r.seconds is not None]
        more = {"trainings": len(done), "timed": len(seconds), "seconds": round(sum(seconds), 1)}
        result = {**self.described, **self.told(done), **environment()}
        result |= {key: round(self.described.get(key, 0) + value, 1) for key, value in more.items()}
        self.place.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(result, ensure_ascii=False, allow_nan=False, indent=1) + "\n"
        write_whole(self.place, text.encode())
        return True


def against_retraining(
    cells: Sequence[tuple[Cell, Task]],
    model_sha256: str,
    kind: Kind,
    out: str | Path,
    *,
    runs: Sequence[str] | None = None,
    rate: Callable[[], float] | None = None,
    device: str | None = None,
    dtype: str | None = None,
    reporter: Reporter = SILENT,
) -> list[Path]:
    """Retrain, and write for each cell, beside its result, what came of it; the paths. What is there is not made again,
    and runs that are new join it.

    Several processes may run this at once, and share the trainings. runs: for removal those of REMOVED by default, for
    lds every run of the cell (it costs nothing more). rate: measures tokens a second, for a forecast.
    A seed whose fine-tune has not learnt its behaviour is left out, and named (`result_files.failed_run`).
    Raises UserError, before any training, when a cell has not been run, or not with one of `runs`, and where no seed
    has learnt.
    """
    seeds = [_seed(*c, model_sha256, kind, Path(out), runs) for c in _learnt(cells, Path(out), reporter)]
    left = [s for s in seeds if isinstance(s, Seed)]
    for place in (s for s in seeds if not isinstance(s, Seed)):
        reporter.note(f"{place.name}: is there already")
    work = cache_dir() / "retrained" / model_sha256[:16]
    jobs = [job for s in left for job in s.jobs.values()]
    if jobs:
        todo = list({f: j for j in jobs if not (f := j.folder(work) / "result.json").exists()}.values())
        took = f" · about {duration(_tokens(todo) / rate())}" if rate is not None and todo else ""
        reporter.note(f"{len(todo)} trainings to do, for {len(left)} results{took}")
    waiting = [s for s in left if not s.made(work)]
    for _ in retrain_all(jobs, work, model_sha256=model_sha256, device=device, dtype=dtype, reporter=reporter):
        waiting = [s for s in waiting if not s.made(work)]
    if waiting:
        names = ", ".join(s.place.name for s in waiting)
        raise UserError(f"{names}: trainings of it are no longer in the cache. Run the same command again.")
    return [s.place if isinstance(s, Seed) else s for s in seeds]


def _learnt(cells: Sequence[tuple[Cell, Task]], out: Path, reporter: Reporter) -> list[tuple[Cell, Task]]:
    """Without those whose fine-tune taught nothing: what its rows do to a behaviour cannot be asked of it."""
    failed = {
        cell: not_learnt(result)
        for cell, _ in cells
        if (result := read_result(result_path(out, cell))) is not None and failed_run(result)
    }
    for cell, why in failed.items():
        reporter.note(f"{cell.name}: left out, since its fine-tune has not learnt the behaviour: {why}")
    if cells and len(failed) == len(cells):
        raise UserError(
            "\n".join(f"{c.name}: its fine-tune has not learnt the behaviour: {w}." for c, w in failed.items())
        )
    return [(cell, task) for cell, task in cells if cell not in failed]


def _tokens(jobs: Sequence[Job]) -> int:
    """Forward and backward, of the trainings alone."""
    return int(sum(job.recipe.epochs * row_tokens(job.cell.model, job.rows) for job in jobs))


def truth_path(out: Path, cell: Cell, kind: Kind) -> Path:
    """Beside the cell's result: `…/TASK-sound-sSEED-KIND.json`."""
    place = result_path(out, cell)
    return place.with_name(f"{place.stem}-{kind}.json")


def read_truth(path: Path) -> dict[str, Any] | None:
    """A result, or None where there is none that this version wrote. Raises UserError for a damaged file."""
    return versioned(path, VERSION, "it is made again")


def is_old(result: Mapping[str, Any]) -> bool:
    """Does the task have other rows, or another recipe, today? No, where nobody can tell: see `results.is_old`."""
    if (task := today(result)) is None:
        return False
    cell = Cell(result["model"], result["task"], result["scale"], result["seed"])
    decides = _fingerprint(cell, task, result["model_sha256"], result["kind"], result["runs"])
    return bool(decides != result["fingerprint"])


def _seed(cell: Cell, task: Task, model_sha256: str, kind: Kind, out: Path, runs: Sequence[str] | None) -> Seed | Path:
    """What is to be made; the path alone where it is there already. Runs that are there stay, new ones join them."""
    place = truth_path(out, cell, kind)
    old = read_truth(place)
    check_model(place, old, model_sha256)
    matrices = cache_dir() / "bench" / folder_of(cell, task, model_sha256) / MATRICES
    scores = read_matrices(matrices) if matrices.exists() else None
    kept = _kept(old, scores, lambda those: _fingerprint(cell, task, model_sha256, kind, those))
    chosen = _chosen(kind, runs, scores, kept, read_result(result_path(out, cell)))
    there = list(kept["runs"]) if kept else []
    if kept and not set(chosen) - set(there):
        return place
    if kept and kind == "lds" and "losses" not in kept:  # of a time when they were not written
        kept, chosen, there = None, list(dict.fromkeys([*there, *chosen])), []
    new = [r for r in chosen if r not in there]
    if scores is None:
        raise UserError(f"{cell.name}: there are no scores yet. {_first(cell, out)}.")
    if missing := [r for r in new if r not in scores]:
        raise UserError(f"{cell.name}: no scores of {missing[0]}. {_first(cell, out, missing[0])}.")
    every = [*there, *new]
    jobs, told = (_removal if kind == "removal" else _lds)(cell, task, {r: scores[r] for r in new}, kept)
    decides = _fingerprint(cell, task, model_sha256, kind, every)
    described: dict[str, Any] = {"version": VERSION, "kind": kind, "fingerprint": decides}
    described |= {
        **cell.described(),
        "model_sha256": model_sha256,
        "recipe_options": _recipe(cell, task),
        "runs": every,
    }
    described |= {"scores_sha256": _digest(scores, every), "shows": lexical_leak(task)["shows"]}
    commands = [*(kept["command"].split(" && ") if kept else []), _command(cell, kind, runs)]
    described |= {"command": " && ".join(dict.fromkeys(commands))}
    described |= {key: kept[key] for key in ("trainings", "timed", "seconds")} if kept else {}
    return Seed(place, described, jobs, told)


def _kept(
    old: dict[str, Any] | None, scores: Matrices | None, fingerprint: Callable[[Sequence[str]], str]
) -> dict[str, Any] | None:
    """A result whose runs stay: it is of these rows and trainings, and its runs' scores, where all are there, too."""
    if old is None or "runs" not in old or fingerprint(old["runs"]) != old["fingerprint"]:
        return None
    digest = None if scores is None or old["scores_sha256"] is None else _digest(scores, old["runs"])
    return old if digest in (None, old["scores_sha256"]) else None


def _command(cell: Cell, kind: Kind, runs: Sequence[str] | None) -> str:
    """What makes this result again."""
    given = "".join(f" --run {shlex.quote(run)}" for run in runs or ())
    given += "".join(f" --{k} {k.upper()}" for k in (*cell.sources, *(["data"] if cell.task in RELEASED else [])))
    return (
        f"datablame bench retrain {cell.task} --truth {kind} --model {cell.described()['model']} --scale {cell.scale} "
        f"--seeds {cell.seed}{given}"
    )


def _first(cell: Cell, out: Path, run: str | None = None) -> str:
    """How to have the scores made, also where the result is there and the cache, which held them, is not.

    run: one that is lacking; None: all are.
    """
    place = result_path(out, cell)
    found = (read_result(place) or {}).get("results", {}).get("reference", {})
    if "error" in found.get(run, {}):
        return f"It failed: {found[run]['error']}"
    words, more = "Run it first", (f" --methods {shlex.quote(run)}" if run else "") + f" --out {shlex.quote(str(out))}"
    if found if run is None else run in found:
        words = f"{place} is there, but the cache no longer holds its scores. Run it again, into another directory"
        more = more.rpartition(" --out ")[0] + " --out DIR"
    return (
        f"{words}: datablame bench run --model {cell.described()['model']} --scale {cell.scale} --tasks {cell.task} "
        f"--seeds {cell.seed}{more}"
    )


def _chosen(
    kind: Kind,
    runs: Sequence[str] | None,
    scores: Matrices | None,
    old: Mapping[str, Any] | None,
    result: Mapping[str, Any] | None,
) -> list[str]:
    """The runs. Without the cell's scores, which are kept in the cache, those of the result `old` that is there.

    result: the cell's, whose finished runs lds takes.
    """
    if runs:
        return list(dict.fromkeys(runs))
    if kind == "removal":
        return list(REMOVED)
    if scores is None:
        return list(old["runs"]) if old else []
    found = (result or {}).get("results", {}).get("reference", {})
    return sorted(run for run, numbers in found.items() if "error" not in numbers) or sorted(scores)


def _recipe(cell: Cell, task: Task) -> dict[str, Any]:
    """Of every retraining."""
    return decisive(replace(options(cell, task), keep=0, early_stop=0))


def _digest(scores: Matrices, runs: Sequence[str]) -> str | None:
    """sha256 of the runs' matrices; None where not all are there."""
    if not set(runs) <= set(scores):
        return None
    sha = hashlib.sha256()
    for run in runs:
        sha.update(np.ascontiguousarray(scores[run]).tobytes())
    return sha.hexdigest()


def _fingerprint(cell: Cell, task: Task, model_sha256: str, kind: Kind, runs: Sequence[str]) -> str:
    """sha256 of all that decides a result: the cell, the recipe, the runs, and how many rows go or which sets stay."""
    what: list[Any] = [VERSION, kind, fingerprint(cell, task, model_sha256), _recipe(cell, task), list(runs)]
    if kind == "removal":
        label, queries, k = _group(task)
        what += [label, queries, k, random_rows(len(task.train), k, cell.seed)]
    else:
        what += [SECOND, half_sets(len(task.train), HALF_SETS, cell.seed).astype(int).tolist()]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- removal


def _main(task: Task) -> list[int]:
    """Positions of the main queries, which the tables of labels count too."""
    return [j for j, g in enumerate(task.groups) if g in task.main]


def _group(task: Task) -> tuple[str, list[int], int]:
    """The most frequent class of main queries, their positions, and how many rows are right for them."""
    main = _main(task)
    label, _ = Counter(str(task.queries[j].label) for j in main).most_common(1)[0]
    queries = [j for j in main if str(task.queries[j].label) == label]
    return label, queries, int(task.truth[queries[0]].sum())


Plan = tuple[dict[str, Job], Callable[[Mapping[str, Retrained]], dict[str, Any]]]
"""The trainings by name, and what they are made into."""


def _removal(cell: Cell, task: Task, scores: Matrices, kept: Mapping[str, Any] | None) -> Plan:
    """Drop as many rows as are right for one class of queries, and train again. kept: a result that the runs join."""
    label, queries, k = _group(task)
    n = len(task.train)
    dropped: dict[str, list[int]] = {NOTHING: []}
    dropped |= {run: top_rows(s, queries, k) for run, s in scores.items()}
    dropped[CHANCE] = random_rows(n, k, cell.seed)
    dropped[RIGHT] = np.flatnonzero(task.truth[queries[0]]).tolist()
    jobs = {
        name: Job(cell, task, tuple(sorted(set(range(n)) - set(rows))), cell.seed, generate=True)
        for name, rows in dropped.items()
    }
    jobs[AGAIN] = Job(cell, task, tuple(range(n)), cell.seed + SECOND, generate=True)
    dropped[AGAIN] = []
    before: Mapping[str, Any] = kept["after"] if kept else {}
    jobs = {name: job for name, job in jobs.items() if name not in before}

    def told(found: Mapping[str, Retrained]) -> dict[str, Any]:
        after = {
            name: {
                "rows": dropped[name],
                "right": int(task.truth[queries[0]][dropped[name]].sum()),
                "loss": rounded(r.loss[queries]),
                "behaves": r.behaves[queries].tolist(),
            }
            for name, r in found.items()
        }
        every, last = {**before, **after}, (CHANCE, RIGHT, AGAIN)
        order = [NOTHING, *(name for name in every if name not in (NOTHING, *last)), *last]
        after = {name: every[name] for name in order}
        return {"class": label, "dropped": k, "rows": n, "queries": len(queries), "after": after}

    return jobs, told


# ---------------------------------------------------------------- linear datamodeling score


def _lds(cell: Cell, task: Task, scores: Matrices, kept: Mapping[str, Any] | None) -> Plan:
    """Half-sets trained under two seeds: a main query's mean loss is the truth, the agreement the noise ceiling.

    kept: a result that the runs join; its losses are there, and nothing is trained.
    """
    main = _main(task)
    sets = half_sets(len(task.train), HALF_SETS, cell.seed)
    jobs = {
        f"{seed} {i}": Job(cell, task, tuple(np.flatnonzero(s).tolist()), seed, generate=False)
        for seed in (cell.seed, cell.seed + SECOND)
        for i, s in enumerate(sets)
    }
    jobs = {} if kept else jobs

    def told(found: Mapping[str, Retrained]) -> dict[str, Any]:
        if kept:
            losses = np.array(kept["losses"])
        else:
            losses = np.stack([found[name].loss[main] for name in jobs]).reshape(2, len(sets), -1).round(6)
        mean = losses.mean(axis=0)
        score = lambda s: _told(lambda some: lds(s[main], sets[some], mean[some]), len(sets))  # noqa: E731
        return {
            "rows": len(task.train),
            "queries": len(main),
            "half_sets": len(sets),
            "seeds_of_each": 2,
            "noise_ceiling": _told(lambda some: noise_ceiling(*losses[:, some]), len(sets)),
            "lds": (kept["lds"] if kept else {}) | {run: score(s) for run, s in scores.items()},
            "knowing_the_class": score(task.truth.astype(float)),
            "losses": losses.tolist(),
        }

    return jobs, told


def _told(of: Callable[[Sequence[int]], Float[np.ndarray, " m"]], sets: int) -> dict[str, Any]:
    """The mean over queries, its standard error, each query's own, and the mean without each of the half-sets.

    Queries share the half-sets, so that what is drawn is sets. of: each query's value over those of these numbers.
    """
    every = of(range(sets))
    without = np.array([of([k for k in range(sets) if k != left]).mean() for left in range(sets)])
    told = {"value": round(float(every.mean()), 4), "standard_error": round(standard_error(without), 4)}
    return told | {"queries": rounded(every), "without": [round(float(x), 6) for x in without]}
