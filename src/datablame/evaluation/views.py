"""What the loss is taken on: the views of one row whose gradients the benchmark keeps.

    view        loss on                                                    protocol
    response    the response and its end of turn: the loss that was trained sound
    prompt      everything before it
    all         both; its gradient is the sum of the two, exactly
    padded      128 tokens, padded on the left with the end token or cut, every one labelled   paper

Under `padded` the padding carries loss, and the attention mask of the released code's tokenizer hides it from the other
tokens. What a padded position itself attends to, where every key is masked, is an accident of the implementation:
eager attention, the only one of its day and therefore ours here, adds the lowest float to all scores, which makes it
the mean of *all* values, later tokens included. (PyTorch's fused attention gives zero there, so that the padding has
no gradient in the attention's weights; eager attention in float64 gives NaN.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from datablame.encoding import IGNORED, Encoded, padded
from datablame.errors import UserError
from datablame.store import FeatureStore

if TYPE_CHECKING:
    from torch import Tensor

    from datablame.examples import Example
    from datablame.indexing import Engine, Reporter

VIEWS = ("response", "prompt", "all", "padded")
CAPTURED = ("prompt", "padded")
"""Views that are captured beside the response; `all` is a sum."""
PAD_TO = 128


def captured_for(asked: Iterable[str | None]) -> tuple[str, ...]:
    """Of CAPTURED, the views that runs with the views `asked` need."""
    asked = set(asked)
    needed = {"prompt": {"prompt", "all"}, "padded": {"padded"}}
    return tuple(view for view in CAPTURED if needed[view] & asked)


def prompt_only(row: Encoded) -> Encoded:
    """The loss on what stands before the response."""
    labels = [t if k < row.prompt_length else IGNORED for k, t in enumerate(row.input_ids)]
    return replace(row, labels=labels)


def widths(engine: Engine, views: Sequence[str] = CAPTURED) -> dict[str, int]:
    """Numbers of a row in every feature: the engine's own, and the gradients of the other views."""
    gradients = {k: d for k, d in engine.widths.items() if k.startswith("gradients/")}
    return engine.widths | {f"{view}-{k}": d for view in views for k, d in gradients.items()}


def capture_views(
    engine: Engine, views: Sequence[str] = CAPTURED
) -> Callable[[Sequence[Encoded], Sequence[Example], Reporter], dict[str, Tensor]]:
    """A capture, as `indexing.fill` takes it, of the engine's own features and the gradients of `views`."""
    from datablame.capture import NotFinite, capture

    pad = int(engine.loaded.tokenizer.eos_token_id)
    as_seen = {"prompt": prompt_only, "padded": lambda row: padded(row, pad, PAD_TO)}

    def run(rows: Sequence[Encoded], examples: Sequence[Example], reporter: Reporter) -> dict[str, Tensor]:
        features = engine.capture(rows, examples, reporter)
        for view in views:
            seen = [as_seen[view](row) for row in rows]
            with eager_attention(engine.loaded.model) if view == "padded" else nullcontext():
                try:
                    size = engine.options.batch_tokens
                    there = capture(engine.loaded.model, seen, engine.blocks, [], batch_tokens=size)
                except NotFinite as e:
                    raise UserError(
                        f"row {examples[e.row].row} (id {examples[e.row].id!r}): under the view {view}, {e.feature} is "
                        "not finite (NaN or infinity). The padded view needs --dtype float32 or bfloat16."
                    ) from e
            features |= {f"{view}-{k}": v for k, v in there.items() if k.startswith("gradients/")}
        return features

    return run


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """Attention written out, for the time of the block."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def gradients(store: FeatureStore, view: str) -> Mapping[str, Tensor]:
    """`{block: [n, D]}` of one view, read when asked for.

    Of the loss summed over the labelled tokens; under `padded` of their mean, as in the released code, whose LiSSA
    depends on the scale.
    """
    if view == "all":
        return Combined({"response": 1.0, "prompt": 1.0}, store)
    if view == "padded":
        return Combined({"padded": 1 / (PAD_TO - 1)}, store)
    return _features(store, view)


def _features(store: FeatureStore, view: str) -> Mapping[str, Tensor]:
    return store.features("gradients" if view == "response" else f"{view}-gradients")


class Combined(Mapping[str, "Tensor"]):
    """A weighted sum of stored views, block by block when a block is asked for."""

    def __init__(self, weights: Mapping[str, float], store: FeatureStore) -> None:
        self._parts = [(w, _features(store, view)) for view, w in weights.items()]

    def __getitem__(self, block: str) -> Tensor:
        (w, first), *rest = self._parts
        return sum((w * features[block] for w, features in rest), w * first[block])

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts[0][1])

    def __len__(self) -> int:
        return len(self._parts[0][1])
