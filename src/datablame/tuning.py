"""LoRA fine-tuning with TRL, on exactly the ids and labels that attribution will use: `datablame tune`."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datablame.checkpoints import TRAINING_RECORD
from datablame.encoding import IGNORED, Encoded, Encoding, EncodingOptions, encode_rows, truncation_note
from datablame.errors import UserError, nearest
from datablame.examples import Columns, load_examples
from datablame.indexing import SILENT, Reporter
from datablame.models import Loaded, ModelSpec, load

if TYPE_CHECKING:
    from trl import SFTTrainer


@dataclass(frozen=True)
class TuneOptions:
    """The recipe. `layers` limits the LoRA to those block numbers (`0,1,2`); all when None.

    early_stop: stop after so many evaluations without a lower validation loss (0 = never).
    keep: the last checkpoints that led to the adapter, one an epoch, each with adapter and optimizer state (0 = none).
    snapshots: so many more on the way, at log-spaced steps from the first to the last. Saving changes no weight, so
        `repr` and `decisive`, by which results are told apart, leave it out.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str = "q_proj,v_proj"
    layers: str | None = None
    epochs: float = 3.0
    rate: float = 2e-4
    batch: int = 8
    seed: int = 0
    early_stop: int = 0
    keep: int = 0
    snapshots: int = field(default=0, repr=False)


def decisive(options: TuneOptions) -> dict[str, Any]:
    """The options as results record them, without `snapshots`."""
    return {k: v for k, v in asdict(options).items() if k != "snapshots"}


def tune(
    model: str | Path,
    train: str | Path,
    out: str | Path,
    *,
    validation: str | Path | None = None,
    options: TuneOptions | None = None,
    encoding: EncodingOptions | None = None,
    columns: Columns | None = None,
    device: str | None = None,
    dtype: str | None = None,
    resume: bool = False,
    reporter: Reporter = SILENT,
) -> dict[str, Any]:
    """Fine-tune a LoRA adapter and write it to `out` (a PEFT directory with tokenizer and `datablame.json`).

    resume: `out` may hold a training of the same rows and recipe that was interrupted; it goes on at the end of the
    last epoch that has a checkpoint there, and gives the weights of one that was not.
    Returns the record that is written: options, encoding, and the loss history of the trainer.
    Raises UserError for bad rows, targets that match nothing, or an `out` that holds an adapter already.
    """
    out, model, options = Path(out), str(model), options or TuneOptions()
    check_options(out, options, validation, resume)
    examples = load_examples(train, columns)
    held_out = load_examples(validation, columns) if validation else None
    loaded = load(ModelSpec(model, None, device, dtype))
    encoder = Encoding(loaded.tokenizer, encoding, loaded.max_length)
    rows = encode_rows(encoder, examples)
    if note := truncation_note(examples, rows):
        reporter.note(note)
    validation_rows = encode_rows(encoder, held_out) if held_out else None
    trainer = make_trainer(loaded, rows, out, options, validation_rows, reporter)
    last = _last_epoch(out) if resume else None
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    reporter.end()
    history = [h for h in trainer.state.log_history if "loss" in h or "eval_loss" in h]
    check_finite(trainer.model, history)
    record = {
        "model": model,
        "model_sha256": loaded.model_sha256,
        "options": asdict(options),
        "encoding": asdict(encoder.options),
        "history": history,
        "rates": _rates(trainer),
    }
    return write_adapter(trainer, loaded, out, record, options)


def write_adapter(
    trainer: SFTTrainer, loaded: Loaded, out: Path, record: dict[str, Any], options: TuneOptions
) -> dict[str, Any]:
    """Write adapter, tokenizer and record (with the order of parameters), and keep the checkpoints of the recipe."""
    record = {**record, "parameters": _parameters(trainer)}
    trainer.save_model(str(out))
    loaded.tokenizer.save_pretrained(out)
    _name_base_model(out / "adapter_config.json", record["model"])
    best = trainer.state.best_model_checkpoint
    epochs = [int(h["step"]) for h in trainer.state.log_history if "loss" in h]
    wanted = (epochs, snapshot_steps(options.snapshots, trainer.state.max_steps))
    _tidy(out, options.keep, wanted, _step(Path(best)) if best else None)
    for folder in [out, *out.glob("checkpoint-*")]:
        (folder / TRAINING_RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def _parameters(trainer: SFTTrainer) -> list[str]:
    """Block names in the order in which the optimizer numbers its parameters."""
    from datablame.blocks import short_name

    names = {id(p): short_name(n.removesuffix(".weight")) for n, p in trainer.model.named_parameters()}  # type: ignore[union-attr]
    return [names[id(p)] for group in trainer.optimizer.param_groups for p in group["params"]]  # type: ignore[union-attr]


def _rates(trainer: SFTTrainer) -> list[float]:
    """The learning rate of every step that was done: a schedule knows the step alone."""
    schedule: Any = trainer.lr_scheduler
    rate, factor = schedule.base_lrs[0], schedule.lr_lambdas[0]
    return [float(rate * factor(step)) for step in range(trainer.state.global_step)]


def _last_epoch(out: Path) -> Path | None:
    """The last checkpoint at the end of an epoch; later ones are deleted, and will be made again."""
    last = max(filter(_goes_on, out.glob("checkpoint-*")), key=_step, default=None)
    for checkpoint in out.glob("checkpoint-*"):
        if last is None or _step(checkpoint) > _step(last):
            shutil.rmtree(checkpoint)
    return last


def _goes_on(checkpoint: Path) -> bool:
    """Is it whole, and may a training go on from it? The trainer writes its state last.

    Within an epoch the sum of its losses would be lost, and one that is to stop does not know it when begun again.
    """
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    stops = state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"]
    return float(state["epoch"]).is_integer() and not stops


def snapshot_steps(count: int, last: int) -> list[int]:
    """So many different steps from 1 to the last, log-spaced as far as whole numbers go; one alone is the last."""
    if count <= 1:
        return [last] * count
    steps = [1]
    while (left := min(count, last) - len(steps)) > 0:
        factor = (last / steps[-1]) ** (1 / left)
        steps.append(max(round(steps[-1] * factor), steps[-1] + 1))
    return steps


def _tidy(out: Path, keep: int, wanted: tuple[Sequence[int], Sequence[int]], best: int | None) -> None:
    """Drop what the trainer leaves and nobody reads: checkpoints not asked for, pickles, model cards with paths.

    wanted: the steps at the ends of epochs, of which the last `keep` stay, and those of snapshots.
    best: the step whose weights became the adapter's, where the training went on after it: later ones did not make it.
    `out` was empty before the training, so that nothing of the user's is in reach.
    """
    made = sorted(_step(c) for c in out.glob("checkpoint-*"))
    led = [s for s in made if best is None or s <= best]
    epochs = [s for s in led if s in wanted[0]]
    kept = {*(epochs[-keep:] if keep else []), *(s for s in led if s in wanted[1])}
    for step in set(made) - kept:
        shutil.rmtree(out / f"checkpoint-{step}")
    for folder in [out, *out.glob("checkpoint-*")]:
        for name in ("training_args.bin", "README.md"):
            (folder / name).unlink(missing_ok=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def check_finite(model: Any, history: list[dict[str, Any]]) -> None:
    """Raise UserError when the training has diverged: such an adapter says nothing."""
    import torch

    weights = all(torch.isfinite(p).all() for p in model.parameters() if p.requires_grad)
    if not weights or not all(math.isfinite(h.get("loss", 0.0)) for h in history):
        raise UserError("the training diverged (a loss or weight is not finite); no adapter is written. Lower --rate.")


def _name_base_model(config: Path, model: str) -> None:
    """PEFT records the path that it loaded from; the user's own name for the model is of more use elsewhere."""
    settings = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**settings, "base_model_name_or_path": model}, indent=2) + "\n", encoding="utf-8")


def check_options(out: Path, options: TuneOptions, validation: str | Path | None = None, resume: bool = False) -> None:
    """Raise UserError, before any work, for a recipe that cannot be or, but to resume, an `out` that is not empty."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a directory.")
    if (out / "adapter_config.json").exists() and not resume:
        raise UserError(f"--out {out}: there is an adapter already. Give a new directory, or delete it.")
    if out.exists() and any(out.iterdir()) and not resume:
        raise UserError(f"--out {out}: the directory is not empty. Give a new one.")
    if options.early_stop and not validation:
        raise UserError("--early-stop watches the validation loss: give --validation FILE too.")
    for name in ("rank", "alpha", "epochs", "rate", "batch"):
        if not getattr(options, name) > 0:
            raise UserError(f"--{name} {getattr(options, name)}: must be more than 0.")
    for name in ("keep", "snapshots", "seed"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name} {getattr(options, name)}: a whole number from 0.")
    if not 0 <= options.dropout < 1:
        raise UserError(f"--dropout {options.dropout}: from 0 up to, but not, 1.")


def make_trainer(
    loaded: Loaded,
    rows: Sequence[Encoded],
    out: Path,
    options: TuneOptions,
    validation: Sequence[Encoded] | None = None,
    reporter: Reporter = SILENT,
) -> SFTTrainer:
    """TRL's SFTTrainer over our ids and labels; it prepares nothing by itself."""
    from transformers.trainer_callback import PrinterCallback

    _check_targets(loaded.model, options)
    if any(r.padding for r in rows):  # see evaluation/views.py: the padding attends to something
        loaded.model.set_attn_implementation("eager")
    trainer = _trainer_class(loaded.model.device.type)(
        model=loaded.model,
        args=_arguments(loaded, out, options, validation is not None),
        train_dataset=_dataset(rows),
        eval_dataset=_dataset(validation) if validation is not None else None,
        data_collator=_stacked if any(r.padding for r in rows) else None,
        processing_class=loaded.tokenizer,
        peft_config=lora_config(options),
        callbacks=_callbacks(options, reporter),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _trainer_class(device: str) -> type[SFTTrainer]:
    """TRL's, which without Triton puts all positions through the head, labelled or not: 2/5 of a small model's time."""
    from torch.nn import functional as F
    from trl import SFTTrainer

    from datablame.capture import labelled_only

    class LabelledOnly(SFTTrainer):
        """The same loss, from the positions that have one."""

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            """Summed over the labelled tokens, divided by their number in the batch."""
            if self.aux_loss_enabled:  # a mixture of experts: its routers have a loss of their own
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            after = F.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORED)
            predicts = after != IGNORED
            others = {k: v for k, v in inputs.items() if k != "labels"}
            with labelled_only(model, predicts, select=True):
                logits = model(**others, use_cache=False).logits[0]
            total = F.cross_entropy(logits.float(), after[predicts], reduction="sum")
            count = predicts.sum() if num_items_in_batch is None else num_items_in_batch
            loss = total / max(int(count), 1)
            return (loss, {}) if return_outputs else loss

    return SFTTrainer if device == "cuda" else LabelledOnly


def _check_targets(model: Any, options: TuneOptions) -> None:
    """Raise UserError for a target that names no module, and for block numbers that the model has not."""
    targets = [t.strip() for t in options.targets.split(",") if t.strip()]
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules() if name}
    strange = [t for t in targets if t.rsplit(".", 1)[-1] not in names and t != "all-linear"]
    if strange or not targets:
        raise UserError(f"--targets {options.targets!r}: no module is named so.{nearest(''.join(strange[:1]), names)}")
    depth = int(model.config.get_text_config().num_hidden_layers)
    if options.layers and any(k >= depth for k in lora_config(options).layers_to_transform):
        raise UserError(f"--layers {options.layers}: this model has blocks 0 to {depth - 1}.")


def lora_config(options: TuneOptions) -> Any:
    """The PEFT configuration of a recipe."""
    from peft import LoraConfig

    try:
        layers = [int(k) for k in options.layers.split(",")] if options.layers else None
    except ValueError as e:
        raise UserError(f"--layers {options.layers}: block numbers separated by commas, such as 0,1,2.") from e
    targets = [t.strip() for t in options.targets.split(",") if t.strip()]
    return LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,  # type: ignore[arg-type]
        lora_dropout=options.dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        layers_to_transform=layers,
        task_type="CAUSAL_LM",
    )


def _dataset(rows: Sequence[Encoded]) -> Any:
    from datasets import Dataset

    keys = ("input_ids", "labels", "padding") if any(r.padding for r in rows) else ("input_ids", "labels")
    return Dataset.from_list([{k: getattr(r, k) for k in keys} for r in rows])


def _stacked(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of rows that are padded already; TRL's own collator would let the padding be attended to."""
    import torch

    ids, labels = (torch.tensor([r[k] for r in rows]) for k in ("input_ids", "labels"))
    mask = torch.arange(ids.shape[1]) >= torch.tensor([r["padding"] for r in rows])[:, None]
    return {"input_ids": ids, "labels": labels, "attention_mask": mask.long()}


def _arguments(loaded: Loaded, out: Path, options: TuneOptions, validates: bool) -> Any:
    from trl import SFTConfig

    cpu = loaded.model.device.type == "cpu"
    saves = options.keep > 0 or options.early_stop > 0
    # Early stopping is told of the best epoch only so many epochs later, and those are dropped in the end.
    limit = max(options.keep + options.early_stop * bool(options.keep), 1) if saves else None
    return SFTConfig(
        output_dir=str(out),
        num_train_epochs=options.epochs,
        learning_rate=options.rate,
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=options.batch,
        seed=options.seed,
        data_seed=options.seed,
        use_cpu=cpu,
        bf16=loaded.model.device.type == "cuda" and loaded.model.dtype.itemsize == 2,
        gradient_checkpointing=False,
        max_length=None,  # rows are truncated, and told of, by Encoding
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        save_strategy="epoch" if saves else "no",
        save_total_limit=None if options.snapshots else limit,  # the oldest go first, whichever they are
        eval_strategy="epoch" if validates else "no",
        load_best_model_at_end=options.early_stop > 0,
        metric_for_best_model="eval_loss" if options.early_stop else None,
        restore_callback_states_from_checkpoint=True,  # how long early stopping has waited
        logging_strategy="epoch",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=not cpu,
        remove_unused_columns=False,  # ours are all used
    )


def _callbacks(options: TuneOptions, reporter: Reporter) -> list[Any]:
    from transformers import EarlyStoppingCallback, TrainerCallback

    class Progress(TrainerCallback):
        """Tells the reporter of each step and each epoch's loss."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """The number of steps is known."""
            reporter.start("tune", state.max_steps, "steps")
            reporter.advance(state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """One optimizer step is done."""
            reporter.advance(1)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kw: Any) -> None:
            """One epoch is done."""
            for key, what in (("loss", "training"), ("eval_loss", "validation")):
                if logs and key in logs:
                    reporter.note(f"epoch {logs.get('epoch', 0):.0f}: {what} loss {float(logs[key]):.4f}")

    class Snapshots(TrainerCallback):
        """Saves at log-spaced steps."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Is this one of them?"""
            if state.global_step in snapshot_steps(options.snapshots, state.max_steps):
                control.should_save = True

    stop = [EarlyStoppingCallback(options.early_stop)] if options.early_stop else []
    return [Progress(), *([Snapshots()] if options.snapshots else []), *stop]
