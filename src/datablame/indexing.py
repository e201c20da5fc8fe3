"""Rows of a file to a feature store on disk: `datablame index`."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datablame.checkpoints import (
    TRAINING_RECORD,
    AdamState,
    Checkpoint,
    adam_state,
    damaged,
    directory,
    find,
    read_record,
)
from datablame.encoding import Encoded, Encoding, EncodingOptions, encode_rows, truncation_note
from datablame.errors import UserError
from datablame.examples import Columns, Example, load_examples
from datablame.extras import parse_list
from datablame.extras.base import Summing
from datablame.models import Loaded, ModelSpec, load
from datablame.store import FeatureStore, check_disk

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class CaptureOptions:
    """blocks: a pattern of weights, None for the whole adapter · layers: hidden states to keep ·
    batch_tokens: padded tokens of one batch (more is faster on a GPU, and takes more memory) ·
    checkpoints: `all`, or steps such as `12,24`, of the adapter's training whose gradients are wanted too ·
    extras: features that cost passes of their own, such as `sampled:draws=2` (see extras/)."""

    blocks: str | None = None
    layers: str = "middle,last"
    batch_tokens: int = 1024
    checkpoints: str | None = None
    extras: str | None = None


@dataclass(frozen=True)
class Forecast:
    """What a run will take, told before it starts; `seconds` is measured on a first batch."""

    rows: int
    tokens: int
    disk_bytes: int
    memory_bytes: int
    seconds: float | None = None

    def sentence(self) -> str:
        """One line for people."""
        text = (
            f"{self.rows:,} rows · {self.tokens:,} tokens · {bytes_text(self.disk_bytes)} on disk · "
            f"about {bytes_text(self.memory_bytes)} of memory"
        )
        return text if self.seconds is None else f"{text} · about {duration(self.seconds)}"


class Reporter:
    """Where a run tells what it does; this one is silent, the command line's prints."""

    def note(self, message: str) -> None:
        """Something worth knowing."""

    def forecast(self, forecast: Forecast) -> None:
        """Before the work starts."""

    def start(self, what: str, total: int, unit: str = "tokens") -> None:
        """A stage of so many tokens (or steps) begins."""

    def advance(self, done: int) -> None:
        """So many more are done."""

    def end(self) -> None:
        """The stage is over."""


SILENT = Reporter()


def index(
    model: str | Path,
    train: str | Path,
    out: str | Path,
    adapter: str | Path | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    encoding: EncodingOptions | None = None,
    columns: Columns | None = None,
    capture: CaptureOptions | None = None,
    reporter: Reporter = SILENT,
) -> FeatureStore:
    """Capture the features of every training row into an index at `out`.

    An interrupted build goes on where it stopped, when called again in the same way. Raises UserError for
    bad input, an index at `out` made in another way, or too little disk or memory.
    """
    out, options = Path(out), capture or CaptureOptions()
    if options.batch_tokens < 1:
        raise UserError(f"--batch-tokens {options.batch_tokens}: at least 1.")
    parse_list(options.extras)  # a wrong name is told before anything is loaded
    examples = load_examples(train, columns)
    loaded = load(ModelSpec(str(model), None if adapter is None else str(adapter), device, dtype))
    encoder = Encoding(loaded.tokenizer, encoding or recorded_encoding(adapter), loaded.max_length)
    rows = encode_rows(encoder, examples)
    if note := truncation_note(examples, rows):
        reporter.note(note)
    engine = Engine(loaded, options)
    settings = {**engine.settings(), "encoding": encoder.settings(), "train_sha256": digest(examples, rows)}
    for note in engine.notes:
        reporter.note(note)
    store = FeatureStore.create(
        out, settings, engine.widths, examples, engine.dtype, lambda: engine.adapter_tensors(rows)
    )
    _forecast(store, engine, rows, reporter)
    fill(store, rows, partial(engine.capture, kept=store.adapter), reporter)
    return FeatureStore.open(out)


Capture = Callable[[Sequence[Encoded], Sequence[Example], Reporter], "dict[str, Tensor]"]


def fill(store: FeatureStore, rows: Sequence[Encoded], capture: Capture, reporter: Reporter) -> None:
    """Write the shards that the store lacks; what was done before is kept."""
    for name in store.begin():
        reporter.note(f"{name} was damaged and is built again.")
    ranges = store.missing()
    if not ranges:
        reporter.note(f"{store.path} is complete already.")
        return
    done = len(store) - sum(b - a for a, b in ranges)
    if done:
        reporter.note(f"{done} of {len(store)} rows were done before; going on.")
    reporter.start("index", sum(len(r.input_ids) for a, b in ranges for r in rows[a:b]))
    for a, b in ranges:
        store.write((a, b), capture(rows[a:b], store.examples[a:b], reporter))
    reporter.end()


def _forecast(store: FeatureStore, engine: Engine, rows: list[Encoded], reporter: Reporter) -> None:
    """Tell what the rest will take, and refuse before anything is written."""
    left = [i for a, b in store.missing() for i in range(a, b)]
    if not left:
        return
    todo = [rows[i] for i in left]
    tokens = sum(len(r.input_ids) for r in todo)
    disk = len(todo) * engine.row_bytes + len(store.missing()) * engine.sum_bytes
    forecast = Forecast(len(todo), tokens, disk, engine.memory_bytes(todo))
    check_row(engine)
    check_disk(store.path, forecast.disk_bytes)
    check_memory(forecast.memory_bytes, engine)
    seconds = tokens * engine.seconds_per_token(todo, [store.examples[i] for i in left])
    forecast = replace(forecast, seconds=seconds)
    reporter.forecast(forecast)


class Engine:
    """One loaded model with its blocks and layers: rows in, features out. Used for training rows and queries."""

    def __init__(self, loaded: Loaded, options: CaptureOptions) -> None:
        from datablame.blocks import select_blocks
        from datablame.capture import parse_layers, widths

        self.loaded, self.options, adapter = loaded, options, loaded.spec.adapter
        if options.checkpoints and not adapter:
            raise UserError("--checkpoints are those of an adapter's training: give --adapter too.")
        self.checkpoints = find(str(adapter), options.checkpoints) if options.checkpoints else []
        self.blocks = select_blocks(loaded.model, options.blocks)
        self.layers = parse_layers(loaded.model, options.layers)
        self.widths = widths(loaded.model, self.blocks, self.layers)
        if loaded.adapter_sha256:
            hidden = {k: d for k, d in self.widths.items() if k.startswith("hidden/")}
            self.widths |= {"base-loss": 1, **{f"base-{k}": d for k, d in hidden.items()}}
        gradients = {k: d for k, d in self.widths.items() if k.startswith("gradients/")}
        for c in self.checkpoints:
            self.widths |= {at_checkpoint(k, c): d for k, d in gradients.items()}
        self.extras = parse_list(options.extras)
        for extra in self.extras.values():
            self.widths |= extra.widths(self)
        self.lora = {name: layer.weight.detach() for name, layer in select_blocks(loaded.model).items()}
        self.notes: list[str] = []
        self.dtype = "float64" if next(loaded.model.parameters()).dtype.itemsize == 8 else "float32"
        size = 8 if self.dtype == "float64" else 4
        self.row_bytes = sum(self.widths.values()) * size
        self.summing = [e for e in self.extras.values() if isinstance(e, Summing)]
        self.sum_bytes = sum(e.numbers(self) for e in self.summing) * size

    @cached_property
    def adam(self) -> AdamState | None:
        """The trainer's Adam at these weights; None where there is none, or none of use: `notes` then says why."""
        adapter = self.loaded.spec.adapter
        try:
            return adam_state(adapter, {k: tuple(w.shape) for k, w in self.lora.items()}) if adapter else None
        except UserError as e:
            self.notes.append(f"{e} It is left out, so this index cannot run adamdot.")
            return None

    def settings(self) -> dict[str, Any]:
        """What an index records of the model and the capture; paths are for reloading, digests decide."""
        spec = self.loaded.spec
        return {
            "model": _place(spec.model),
            "adapter": None if spec.adapter is None else _place(spec.adapter),
            "model_sha256": self.loaded.model_sha256,
            "adapter_sha256": self.loaded.adapter_sha256,
            "blocks": self.options.blocks,
            "layers": self.options.layers,
            "batch_tokens": self.options.batch_tokens,
            "checkpoints": [c.settings() for c in self.checkpoints],
            "extras": list(self.extras),
            "optimizer": None if self.adam is None else {"eps": self.adam.eps, "sha256": self.adam.sha256},
            "dtype": str(next(self.loaded.model.parameters()).dtype).removeprefix("torch."),
        }

    def adapter_tensors(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """What the index keeps once: the adapter's weights, those of its checkpoints, Adam's v̂, what extras prepare."""
        out = {f"weights/{k}": w.cpu() for k, w in self.lora.items()}
        for c in self.checkpoints:
            with self.loaded.at_checkpoint(directory(str(self.loaded.spec.adapter), c.step)):
                out |= {f"checkpoints/{c.step}/weights/{k}": w.cpu().clone() for k, w in self.lora.items()}
        out |= {} if self.adam is None else {f"adam/{k}": v for k, v in self.adam.v.items()}
        for extra in self.extras.values():
            out |= {f"extras/{extra.kind}/{k}": v for k, v in extra.prepare(self, rows).items()}
        return out

    def capture(
        self,
        rows: Sequence[Encoded],
        examples: Sequence[Example],
        reporter: Reporter,
        kept: Callable[[str], Mapping[str, Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        """All features of `rows`: one forward and backward pass, one forward pass of the base model, and one
        forward and backward pass more for each checkpoint with other weights.

        kept: `FeatureStore.adapter` of the index, where extras find what they prepared; without it they are left out.

        Raises UserError naming the example when a number is not finite.
        """
        from datablame.capture import NotFinite, capture

        def done(tokens: int, seconds: float) -> None:
            del seconds
            reporter.advance(tokens)

        model, size = self.loaded.model, self.options.batch_tokens
        watchers = [w for e in self.summing if kept and (w := e.watcher())]
        try:
            features = capture(
                model, rows, self.blocks, self.layers, batch_tokens=size, on_batch=done, watchers=watchers
            )
            for watcher in watchers:
                features |= watcher.features()
            if self.loaded.adapter_sha256:
                with self.loaded.without_adapter():
                    base = capture(model, rows, {}, self.layers, batch_tokens=size)
                features |= {f"base-{k}": v for k, v in base.items() if k.startswith(("hidden/", "loss"))}
            for c in self.checkpoints:
                there = features
                if c.adapter_sha256 != self.loaded.adapter_sha256:
                    with self.loaded.at_checkpoint(directory(str(self.loaded.spec.adapter), c.step)):
                        there = capture(model, rows, self.blocks, [], batch_tokens=size)
                features |= {
                    at_checkpoint(k, c): v.clone() if there is features else v
                    for k, v in there.items()
                    if k.startswith("gradients/")
                }
            for extra in self.extras.values() if kept else ():
                features |= extra.capture(self, rows, kept(f"extras/{extra.kind}"))  # type: ignore[misc]
        except NotFinite as e:
            example = examples[e.row]
            raise UserError(
                f"row {example.row} (id {example.id!r}): {e.feature} is not finite (NaN or infinity), so it has no "
                "score. Try --dtype float32, or remove the row."
            ) from e
        return features

    def seconds_per_token(self, rows: Sequence[Encoded], examples: Sequence[Example]) -> float:
        """Measured on one small batch of rows of middling length; an extra's passes are taken to cost the same."""
        by_length = sorted(zip(rows, examples, strict=True), key=lambda pair: len(pair[0].input_ids))
        batch = by_length[len(by_length) // 2 :][: 4 if len(rows) > 16 else 1]
        start = time.perf_counter()
        self.capture([r for r, _ in batch], [e for _, e in batch], SILENT)
        seconds = (time.perf_counter() - start) / sum(len(r.input_ids) for r, _ in batch)
        return seconds * (1 + sum(e.passes for e in self.extras.values()))

    def memory_bytes(self, rows: Sequence[Encoded]) -> int:
        """An estimate from shapes: weights, activations and logits of the largest batch, one shard of features."""
        from datablame.store import shard_rows

        config = self.loaded.model.config.get_text_config()
        weights = sum(p.numel() * p.element_size() for p in self.loaded.model.parameters())
        tokens = max([self.options.batch_tokens, *(len(r.input_ids) for r in rows)])
        labelled = max((len(r.targets) / len(r.input_ids) for r in rows), default=1.0)
        intermediate = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        per_token = config.num_hidden_layers * (12 * config.hidden_size + 4 * intermediate)
        activations = 4 * tokens * per_token
        logits = 3 * 4 * int(tokens * labelled) * config.vocab_size
        shard = 2 * min(len(rows), shard_rows(self.row_bytes)) * self.row_bytes
        return int(weights + activations + logits + shard + 3 * self.sum_bytes + 0.5e9)


def at_checkpoint(gradients: str, checkpoint: Checkpoint) -> str:
    """`gradients/BLOCK` to the name of the same feature at a checkpoint, `checkpoints/STEP/BLOCK`."""
    return f"checkpoints/{checkpoint.step}/{gradients.removeprefix('gradients/')}"


ROW_LIMIT = 256e6
"""Bytes of one row's features beyond which an index is refused, whatever the disk."""


def check_row(engine: Engine) -> None:
    """Raise UserError when one row alone is too large to keep."""
    if engine.row_bytes > ROW_LIMIT:
        raise UserError(
            f"one row would take {bytes_text(engine.row_bytes)} (limit {bytes_text(ROW_LIMIT)}). Choose fewer --blocks."
        )


def check_memory(needed: int, engine: Engine) -> None:
    """Raise UserError when the forecast is more than the machine's whole memory."""
    import psutil

    total = psutil.virtual_memory().total
    if needed > total and engine.loaded.model.device.type == "cpu":
        raise UserError(
            f"about {bytes_text(needed)} of memory are needed and this machine has {bytes_text(total)}. "
            f"One row takes {bytes_text(engine.row_bytes)}: choose fewer --blocks, or a smaller --batch-tokens."
        )


# ---------------------------------------------------------------- small helpers


def _place(name: str) -> str:
    """A path as seen from anywhere; a hub id or a bundled name as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def recorded_encoding(adapter: str | Path | None) -> EncodingOptions:
    """The encoding that `datablame tune` recorded beside the adapter, else the defaults."""
    record = read_record(adapter) if adapter else {}
    if not record:
        return EncodingOptions()
    try:
        return EncodingOptions(**record["encoding"])
    except (KeyError, TypeError) as e:
        raise damaged(Path(str(adapter)) / TRAINING_RECORD) from e


def digest(examples: Sequence[Example], rows: Sequence[Encoded]) -> str:
    """sha256 over ids, labels, text and tokens of all rows."""
    sha = hashlib.sha256()
    for e, r in zip(examples, rows, strict=True):
        sha.update(repr((e.id, e.label, e.messages, e.text, r.input_ids, r.labels)).encode())
    return sha.hexdigest()


def bytes_text(n: float) -> str:
    """`12 B`, `3.4 MB`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n:.0f} B"


def duration(seconds: float) -> str:
    """`12 s`, `3 min 20 s`, `2 h 05 min`."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    return f"{s // 60} min {s % 60:02d} s" if s < 3600 else f"{s // 3600} h {s % 3600 // 60:02d} min"


def quiet_libraries() -> None:
    """Silence the libraries' own progress bars and advice: ours are told by the reporter."""
    import logging
    import warnings

    import transformers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("peft").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
