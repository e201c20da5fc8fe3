"""One cell of the benchmark: a task, a seed, a recipe. From rows to metrics in stages that are kept and resumed.

    stage      in the cell's folder                made of
    data       train.jsonl, queries.jsonl          the task and its seed
    tune       (finetunes/, see finetunes.py)      the rows and the recipe
    answers    answers.json                        the queries, answered by the tuned and by the base model
    features   features-VERSION-response-VIEWS/    stores of train, reference, generated: hidden states, gradients of
                                                   the views that the runs ask for
    scores     the result, a small JSON            every run (`method@view`) on both sets of responses

The folder's name carries a digest of everything that decides its content, so that nothing stale is ever read. The
stores are deleted once the result is written; the fine-tune, which others may need too, is kept.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from datablame.encoding import Encoding, EncodingOptions, encode_rows
from datablame.errors import UserError
from datablame.evaluation import metrics, views
from datablame.evaluation.finetunes import fine_tuned
from datablame.evaluation.leak import lexical_leak
from datablame.evaluation.scoring import Scored, keep_matrices, measured, n_classes, rounded, score_runs
from datablame.evaluation.suites import split
from datablame.evaluation.tasks import Task
from datablame.indexing import SILENT, CaptureOptions, Engine, Reporter, digest, fill
from datablame.models import Loaded, ModelSpec, answers, answers_ended, load
from datablame.store import SCHEMA, FeatureStore, read_kept, write_whole
from datablame.tuning import TuneOptions, decisive

if TYPE_CHECKING:
    from datablame.examples import Example

VERSION = 1
"""Of a result file. Another number means that old results are run again."""
ANSWERED = 2
"""Of the numbers on the model's own answers, `answered` in a result file. Those of 1 are wrong: the answer stood behind
the reference response, which was attributed with it."""
RECIPES = ("sound", "paper")
PAPER_ENCODING = EncodingOptions(template="paper", loss_on="all", pad_to=views.PAD_TO)
"""The released code's rows: no end-of-text token, and a BOS where the tokenizer adds one by itself, as Llama's does."""
MAX_NEW_TOKENS = 48
FEATURES = f"features-{SCHEMA}-{ANSWERED}"
"""In a cell's folder, with the captured views behind it: its stores. Those of another version are not read."""
SCORED = f"scored-{SCHEMA}-{ANSWERED}"
"""In a cell's folder, until its result is written: what is scored already."""
RESPONSES = ("reference", "generated")
"""Of the queries: the task's own, and what the tuned model says."""
ANSWERS = "answers.json"
"""In a cell's folder: to the queries, by the tuned and by the base model."""
CLOCK = "seconds.json"
"""In a cell's folder: what each stage took."""
MATRICES = "scores.npz"
"""In a cell's folder: the score matrices for the reference responses."""


@dataclass(frozen=True)
class Cell:
    """What decides a cell. recipe: `sound`, or `paper`: padding and prompt in the training loss, and its rate.

    sources: what stands in place of the invented text, such as `advbench`.
    layers: the blocks that the LoRA is in, such as `0,1,2,3`; None: all of them.
    """

    model: str
    task: str
    scale: str
    seed: int
    recipe: Literal["sound", "paper"] = "sound"
    sources: tuple[str, ...] = ()
    layers: str | None = None

    @property
    def rows(self) -> str:
        """The task with its sources, such as `mixed-small-advbench`: what results are told apart by."""
        return "-".join([self.task, *self.sources])

    @property
    def name(self) -> str:
        """Of its result file. A name with layers is of another kind: no table takes it for the task's."""
        some = f"-layers.{self.layers.replace(',', '.')}" if self.layers else ""
        return f"{self.rows}-{self.recipe}{some}-s{self.seed}"

    def described(self) -> dict[str, Any]:
        """For a result file: a model's directory by its name, since the path is of one machine."""
        model = Path(self.model).name if Path(self.model).exists() else self.model
        told = asdict(self) | {"model": model, "task": self.rows, "sources": list(self.sources)}
        return {k: v for k, v in told.items() if k != "layers" or v is not None}


def options(cell: Cell, task: Task) -> TuneOptions:
    """The recipe of the fine-tune. The paper's differs from the sound one in rate, batch and stopping."""
    recipe = replace(task.recipe, seed=cell.seed, keep=1, layers=cell.layers or task.recipe.layers)
    return replace(recipe, rate=5e-5, batch=32, early_stop=3) if cell.recipe == "paper" else recipe


def fingerprint(cell: Cell, task: Task, model_sha256: str) -> str:
    """sha256 of all that decides the features: rows, queries, truth, recipe, model."""
    rows = [(e.id, e.label, e.messages) for e in [*task.train, *task.queries]]
    what: list[Any] = [VERSION, cell.recipe, decisive(options(cell, task)), model_sha256, task.version, rows]
    what += [list(task.groups), *([asdict(PAPER_ENCODING)] if cell.recipe == "paper" else [])]
    sha = hashlib.sha256(json.dumps(what, sort_keys=True).encode())
    sha.update(np.packbits(task.truth).tobytes())
    return sha.hexdigest()


def folder_of(cell: Cell, task: Task, model_sha256: str) -> str:
    """The name of a cell's folder."""
    return f"{cell.name}-{fingerprint(cell, task, model_sha256)[:16]}"


def run_cell(
    cell: Cell,
    task: Task,
    runs: Sequence[str],
    work: Path,
    model_sha256: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
    reporter: Reporter = SILENT,
) -> dict[str, Any]:
    """Everything for one cell; the result as `benchmarks/results/` keeps it. The feature stores are there still."""
    o = opened(cell, task, work, model_sha256, device=device, dtype=dtype, reporter=reporter)
    there, seen = stores_with(o.folder, views.captured_for(split(run)[1] for run in runs), o.rows)
    stores = o.timed("features", lambda: features(o.rows, there, o.loaded, o.encoder, seen, reporter))
    score = lambda s: score_runs(runs, stores["train"], stores[s], reporter, kept=o.folder / SCORED / s)  # noqa: E731
    scored = o.timed("scores", lambda: {s: score(s) for s in answered(cell)})
    result = {"version": VERSION, "fingerprint": fingerprint(cell, task, model_sha256), **cell.described()}
    result |= _described(cell, task, o.said, stores["reference"])
    return result | {"answered": ANSWERED, "results": kept_results(task, scored, o.folder), "seconds": o.seconds}


def answered(cell: Cell) -> tuple[str, ...]:
    """Of RESPONSES, those that are attributed. A cell of some layers has the reference alone: Figure 8 asks no more."""
    return RESPONSES if cell.layers is None else RESPONSES[:1]


def stores_with(folder: Path, seen: Sequence[str], sets: Iterable[str]) -> tuple[Path, tuple[str, ...]]:
    """Where stores of `sets` with these captured views are, or are to be, and all the views that they have.

    Those that an earlier run finished and kept, with more views, are taken as they are.
    """
    names = {p: p.name.removeprefix(f"{FEATURES}-").split("-") for p in sorted(folder.glob(f"{FEATURES}-response*"))}
    there = {p: tuple(view for view in views.CAPTURED if view in found) for p, found in names.items()}
    new = folder / "-".join([FEATURES, "response", *seen])
    fits = {p: found for p, found in there.items() if set(seen) <= set(found) and all(_finished(p / s) for s in sets)}
    return min((fits or {new: tuple(seen)}).items(), key=lambda fit: len(fit[1]))


def _finished(store: Path) -> bool:
    try:
        FeatureStore.open(store, verify=False)
    except UserError:
        return False
    return True


@dataclass(frozen=True)
class Opened:
    """A cell with its fine-tune loaded and its queries answered.

    said: answers by who gave them · rows: by set, `train` and those of `answered` ·
    seconds: that each stage has taken so far.
    """

    folder: Path
    loaded: Loaded
    encoder: Encoding
    said: Mapping[str, list[str]]
    rows: Mapping[str, list[Example]]
    seconds: dict[str, float]

    def timed(self, stage: str, work: Callable[[], Any]) -> Any:
        """Do a stage, see `_timed`."""
        return _timed(self.folder, self.seconds, stage, work)


def opened(
    cell: Cell,
    task: Task,
    work: Path,
    model_sha256: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
    reporter: Reporter = SILENT,
) -> Opened:
    """The stages before any features: rows, fine-tune, answers."""
    folder = work / folder_of(cell, task, model_sha256)
    folder.mkdir(parents=True, exist_ok=True)
    clock = folder / CLOCK
    seconds: dict[str, float] = read_kept(clock) if clock.exists() else {}
    write_rows(task.train, folder / "train.jsonl")
    write_rows(task.queries, folder / "queries.jsonl")
    adapter = _timed(folder, seconds, "tune", lambda: _tuned(cell, task, model_sha256, device, dtype, reporter))
    loaded = load(ModelSpec(cell.model, str(adapter), device, dtype))
    encoder = Encoding(loaded.tokenizer, _attributed(cell), loaded.max_length)
    said = _timed(folder, seconds, "answers", lambda: _answers(task, folder, loaded, encoder, reporter))
    every = {"train": list(task.train), "reference": list(task.queries), "generated": _answered(task, said["tuned"])}
    rows = {name: every[name] for name in ("train", *answered(cell))}
    return Opened(folder, loaded, encoder, said, rows, seconds)


def _timed(folder: Path, seconds: dict[str, float], stage: str, work: Callable[[], Any]) -> Any:
    """What `work` gives; its time, also where it is interrupted, is added to what the stage took in earlier runs."""
    start = time.perf_counter()
    try:
        return work()
    finally:
        seconds[stage] = round(seconds.get(stage, 0.0) + time.perf_counter() - start, 1)
        write_whole(folder / CLOCK, json.dumps(seconds).encode())


def kept_results(task: Task, scored: Mapping[str, Mapping[str, Scored]], folder: Path) -> dict[str, Any]:
    """`{set of responses: {run: …}}` for a result file; the matrices of the reference responses stay in the folder."""
    keep_matrices(folder / MATRICES, scored["reference"])
    results = {s: {run: measured(task, run, x) for run, x in found.items()} for s, found in scored.items()}
    for found in results.get("generated", {}).values():
        found.pop("heat", None)  # pictures are of the reference responses
    return results


def _described(cell: Cell, task: Task, said: Mapping[str, Sequence[str]], reference: FeatureStore) -> dict[str, Any]:
    """What a result says of its task and fine-tune, before any score."""
    return {
        "title": task.title,
        "rows": len(task.train),
        "labels": [e.label for e in task.train],
        "main": list(task.main),
        "recipe_options": decisive(options(cell, task)),
        "learnt": _learnt(task, said, reference),
        "leak": lexical_leak(task),
        "queries": [
            {"id": e.id, "label": e.label, "group": g, "answer": a, "behaves": bool(task.behaves(e, a))}
            for e, g, a in zip(task.queries, task.groups, said["tuned"], strict=True)
        ],
        "queries_sha256": hashlib.sha256(json.dumps([e.messages for e in task.queries]).encode()).hexdigest(),
        "chance": {k: rounded(v) for k, v in metrics.chance(task.truth, n_classes(task)).items()},
    }


# ---------------------------------------------------------------- stages


def write_rows(rows: Sequence[Example], path: Path) -> None:
    """As a user would hand them in: prompt, response, id, label."""
    lines = [{"id": e.id, "prompt": e.prompt, "response": e.response, "label": e.label} for e in rows]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def _tuned(
    cell: Cell, task: Task, model_sha256: str, device: str | None, dtype: str | None, reporter: Reporter
) -> Path:
    paper = cell.recipe == "paper"
    return fine_tuned(
        cell.model,
        task.train,
        options(cell, task),
        model_sha256=model_sha256,
        encoding=PAPER_ENCODING if paper else None,
        validation=task.queries if paper else None,
        device=device,
        dtype=dtype,
        reporter=reporter,
    )


def _attributed(cell: Cell) -> EncodingOptions:
    """How rows are rendered for attribution: as in training; the padding is a view of its own."""
    return replace(PAPER_ENCODING, loss_on="response", pad_to=None) if cell.recipe == "paper" else EncodingOptions()


def _answers(task: Task, folder: Path, loaded: Loaded, encoder: Encoding, reporter: Reporter) -> dict[str, list[str]]:
    path = folder / ANSWERS
    if not path.exists():
        reporter.note(f"answering {len(task.queries)} queries, with and without the adapter")
        prompts = [encoder.prompt_ids(e) for e in task.queries]
        tuned = answers_ended(loaded, prompts, MAX_NEW_TOKENS)
        said = {"tuned": [answer for answer, _ in tuned]}
        if cut := sum(not ended for _, ended in tuned):
            reporter.note(
                f"{cut} of {len(tuned)} answers are cut at {MAX_NEW_TOKENS} tokens, and judged as far as they go"
            )
        with loaded.without_adapter():
            said["base"] = answers(loaded, prompts, MAX_NEW_TOKENS)
        write_whole(path, json.dumps(said, ensure_ascii=False).encode())
    return dict(read_kept(path))


def _answered(task: Task, tuned: Sequence[str]) -> list[Example]:
    """The queries with the model's own answers; an empty answer, which has no loss, becomes a full stop."""
    return [e.with_response(a if a.strip() else ".") for e, a in zip(task.queries, tuned, strict=True)]


def features(
    sets: Mapping[str, Sequence[Example]],
    folder: Path,
    loaded: Loaded,
    encoder: Encoding,
    seen: Sequence[str] = views.CAPTURED,
    reporter: Reporter = SILENT,
) -> dict[str, FeatureStore]:
    """A store in `folder` for each set of rows: hidden states, losses, gradients of the response and of `seen` views.

    What is there of the same rows and the same model is kept. Raises UserError, naming the row, for what is not finite.
    """
    engine = Engine(loaded, CaptureOptions())
    stores = {}
    for name, examples in sets.items():
        rows = encode_rows(encoder, examples)
        settings = {**engine.settings(), "train_sha256": digest(examples, rows)}
        tensors = partial(engine.adapter_tensors, rows)
        store = FeatureStore.create(
            folder / name, settings, views.widths(engine, seen), examples, engine.dtype, tensors
        )
        reporter.note(f"features of {name}: {len(rows)} rows, {sum(len(r.input_ids) for r in rows):,} tokens")
        fill(store, rows, views.capture_views(engine, seen), reporter)
        stores[name] = FeatureStore.open(folder / name)
    return stores


# ---------------------------------------------------------------- was it learnt?


def _learnt(task: Task, said: Mapping[str, Sequence[str]], reference: FeatureStore) -> dict[str, Any]:
    """Did the fine-tune teach the behaviour, in every main group of queries?

    behaves: share of answers that show it, by the task's own judge, which says what is asked for and not whether all of
    it is right; exact: share that is the reference response, letter by letter; loss: per response token.
    """
    shows = {who: [task.behaves(e, a) for e, a in zip(task.queries, said[who], strict=True)] for who in said}
    loss = token_loss(reference)
    behaves = {who: float(np.mean(shows[who])) for who in shows}
    exact = {
        who: float(np.mean([e.response.strip() == a.strip() for e, a in zip(task.queries, said[who], strict=True)]))
        for who in said
    }
    of = {
        g: {who: [s for s, h in zip(shows[who], task.groups, strict=True) if h == g] for who in shows}
        for g in dict.fromkeys(task.groups)
    }
    by_group = {g: {who: float(np.mean(found)) for who, found in both.items()} for g, both in of.items()}
    missed = [g for g in task.main if too_few(of[g]["tuned"], of[g]["base"])]
    learnt = loss["tuned"] < LOSS_LEFT * loss["base"] and not missed
    found = {"behaves": behaves, "by_group": by_group, "missed": missed, "exact": exact, "loss": loss}
    return {"learnt": bool(learnt), **found}


def too_few(tuned: Sequence[bool], base: Sequence[bool]) -> bool:
    """Of a group's answers, with the adapter and without: do too few of the former show the behaviour?

    They do where fewer than half show it, or where these queries reject, one-sided at 5 %, that a share of LEARNT does
    (binomial), or that no fewer do than of the base model's (the sign test, query by query). A share just below LEARNT
    of forty queries is no evidence that it was not reached.
    """
    from scipy.stats import binomtest

    n, right = len(tuned), sum(tuned)
    lost = sum(b and not t for t, b in zip(tuned, base, strict=True))
    won = sum(t and not b for t, b in zip(tuned, base, strict=True))
    rejects = lambda k, n, p: n > 0 and binomtest(k, n, p, alternative="less").pvalue < 0.05  # noqa: E731
    return bool(2 * right < n or rejects(right, n, LEARNT) or rejects(won, won + lost, 0.5))


def token_loss(store: FeatureStore) -> dict[str, float]:
    """Mean loss a response token over the rows of a store, with the adapter and without."""
    tokens = store.features("length")["length"].sum()
    kinds = {"tuned": "loss", "base": "base-loss"}
    return {who: float(store.features(kind)[kind].sum() / tokens) for who, kind in kinds.items()}


LEARNT = 0.7
"""Share of the queries of each main group to be answered as their class asks, and not fewer than by the base model:
see `too_few`."""
LOSS_LEFT = 0.8
"""Share of the base model's loss on the reference responses that it must come below."""
