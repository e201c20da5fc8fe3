"""The four models of Tables 1 and 6 and Figure 6: the original one, and it fine-tuned on benign, harmful, mixed rows.

The rows are those of the benchmark's task mixed-small: its harmful rows alone, its benign rows alone, and all of them,
which is the fine-tune of the benchmark's own cell. The recipe is the cell's for all three, so the mixed one makes twice
as many steps. The held-out prompts are the task's. The paper does not say how large its benign and harmful sets are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from datablame.adapters import fingerprint_adapter
from datablame.encoding import Encoding
from datablame.errors import UserError
from datablame.evaluation.cell import Cell, options
from datablame.evaluation.finetunes import base_sha256, fine_tuned
from datablame.evaluation.judges import Judge, Verdict, verdicts
from datablame.evaluation.tasks import Task, build
from datablame.examples import Example
from datablame.models import Loaded, ModelSpec, answers_ended, load
from datablame.paper import Request
from datablame.paper.kept import kept

TASK = "mixed-small"
ARMS = ("original", "benign", "harmful", "mixed")
PAIRS = tuple((a, b) for i, a in enumerate(ARMS) for b in ARMS[i + 1 :])
"""The paper's six, in its order."""
NEW_TOKENS = {"smoke": 72, "cpu": 128, "paper": 128}
"""Of an answer, at most. 128 are more than the characters that the keywords are looked for in, in nearly all answers;
72 are about as many, so that some cut answers have no verdict at `smoke` scale, which shows nothing anyway."""
ANSWERS = "answers-1"


@dataclass(frozen=True)
class Arms:
    """One model, its three fine-tunes and the task. adapters: `{arm: directory}`; None: no adapter.

    loaded: the model with an adapter on it, whose weights `weights_of` exchanges.
    """

    name: str
    task: Task
    adapters: dict[str, Path | None]
    loaded: Loaded
    encoder: Encoding

    @property
    def harmful(self) -> list[Example]:
        """The held-out harmful queries, with their reference responses."""
        return [q for q in self.task.queries if q.label == "harmful"]


def rows_of(task: Task, arm: str) -> list[Example]:
    """What an arm is trained on; nothing for the original."""
    return [e for e in task.train if arm == "mixed" or e.label == arm]


def arms(request: Request, model: str) -> Arms:
    """Train what is not in the cache, and load. Raises UserError that names the fine-tune which diverged."""
    if request.seeds and len(request.seeds) > 1:
        request.reporter.note(f"{request.name} is of one seed: {request.seed}")
    task = build(TASK, request.scale, request.seed)
    recipe = options(Cell(model, TASK, request.scale, request.seed), task)
    sha256 = _sha256(model, request.device)
    adapters: dict[str, Path | None] = {"original": None}
    for arm in ARMS[1:]:
        rows = rows_of(task, arm)
        request.reporter.note(f"{Path(model).name}, {arm}: fine-tune on {len(rows)} rows")
        try:
            adapters[arm] = fine_tuned(
                model, rows, recipe, model_sha256=sha256, device=request.device, reporter=request.reporter
            )
        except UserError as e:
            raise UserError(f"{request.name}, the fine-tune on {arm} rows: {e}") from e
    loaded = load(ModelSpec(model, str(adapters["mixed"]), request.device))
    encoder = Encoding(loaded.tokenizer, None, loaded.max_length)
    return Arms(Path(model).name if Path(model).exists() else model, task, adapters, loaded, encoder)


@contextmanager
def weights_of(loaded: Loaded, adapter: Path | None) -> Iterator[None]:
    """The model with the weights of an arm, or of a checkpoint, for the time of the block."""
    with loaded.at_checkpoint(adapter) if adapter else loaded.without_adapter():
        yield


def told(a: Arms, adapter: Path | None, queries: Sequence[Example], request: Request) -> list[tuple[str, bool]]:
    """Greedy answers to the queries, and whether each ended by itself; kept."""
    prompts = [a.encoder.prompt_ids(q) for q in queries]
    weights = None if adapter is None else fingerprint_adapter(adapter)
    most = NEW_TOKENS[request.scale]

    def make() -> list[tuple[str, bool]]:
        request.reporter.start("answers", len(prompts), "answers")
        try:
            with weights_of(a.loaded, adapter):
                return answers_ended(a.loaded, prompts, most, on_batch=request.reporter.advance)
        finally:
            request.reporter.end()

    what = [a.loaded.model_sha256, weights, str(a.loaded.model.dtype), prompts, sorted(a.loaded.ends), most]
    return [(str(text), bool(ended)) for text, ended in kept(ANSWERS, what, make)]


def judged(a: Arms, judge: Judge, arm: str, request: Request) -> tuple[list[tuple[str, bool]], list[Verdict]]:
    """An arm's answers to the held-out harmful prompts, and what the judge says of each."""
    said = told(a, a.adapters[arm], a.harmful, request)
    return said, verdicts(judge, [str(q.prompt) for q in a.harmful], said)


@cache
def _sha256(model: str, device: str | None) -> str:
    return base_sha256(load(ModelSpec(model, None, device)))


def described(request: Request, judge: Judge, **more: Any) -> dict[str, Any]:
    """What decides a run of the three experiments; models by their own names, since paths are of one machine."""
    task = build(TASK, request.scale, request.seed)
    protocol = {
        "task": TASK,
        "task_version": task.version,
        "rows": {arm: len(rows_of(task, arm)) for arm in ARMS},
        "held_out_harmful": sum(q.label == "harmful" for q in task.queries),
        "recipe": str(options(Cell(request.model, TASK, request.scale, request.seed), task)),
        "generation": f"greedy, at most {NEW_TOKENS[request.scale]} tokens",
        "judge": judge.settings,
        **more,
    }
    return {
        "models": [Path(m).name if Path(m).exists() else m for m in request.models],
        "models_sha256": [_sha256(m, request.device) for m in request.models],
        "scale": request.scale,
        "seed": request.seed,
        "protocol": protocol,
    }
