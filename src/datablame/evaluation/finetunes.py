"""Fine-tunes that are made once, whoever asks: the benchmark's cells, retraining, the paper's experiments.

    in the cache                        what
    finetunes/DIGEST/lock               held by the process that trains
    finetunes/DIGEST/train.jsonl        the rows, and validation.jsonl where there are some
    finetunes/DIGEST/adapter/           adapter, tokenizer, `datablame.json`, and `checkpoint-STEP/` where asked for
    finetunes/DIGEST/used-PID.lock      held by a process that reads it

The digest is of all that decides the weights. Checkpoints do not: an adapter that has them serves those who need none.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datablame.checkpoints import TRAINING_RECORD, read_record
from datablame.encoding import Encoding, EncodingOptions
from datablame.errors import UserError
from datablame.indexing import SILENT, Reporter
from datablame.locks import alone, hold, release_all
from datablame.models import Loaded, cache_dir
from datablame.tuning import TuneOptions, decisive, snapshot_steps, tune

if TYPE_CHECKING:
    from datablame.examples import Example

VERSION = 1
"""Of a fine-tune. Another number means that all are made again, and retrainings; raise that of cells (cell.py) too."""
SNAPSHOTS = 8
"""Checkpoints at log-spaced steps, besides the end of every epoch."""


def fine_tuned(
    model: str,
    rows: Sequence[Example],
    options: TuneOptions,
    *,
    model_sha256: str,
    encoding: EncodingOptions | None = None,
    validation: Sequence[Example] | None = None,
    checkpoints: bool = True,
    device: str | None = None,
    dtype: str | None = None,
    reporter: Reporter = SILENT,
) -> Path:
    """The directory of an adapter trained so; trained now where the cache does not have it.

    model_sha256: the model's `base_sha256`. Another process that is at it is waited for; a training that was
    interrupted goes on after its last epoch. `options.keep` and `options.snapshots` say nothing here: with
    `checkpoints` there are those of every epoch's end and SNAPSHOTS more, else perhaps none.
    Raises UserError as `tune` does.
    """
    options = replace(options, keep=0, snapshots=0)
    encoding = encoding or EncodingOptions()
    folder = cache_dir() / "finetunes" / _digest(model_sha256, rows, validation, encoding, options)[:24]
    adapter = folder / "adapter"
    with alone(folder / "lock", wait=True):
        hold(folder)
        if not _serves(adapter, checkpoints):
            if checkpoints:
                options = replace(options, keep=math.ceil(options.epochs), snapshots=SNAPSHOTS)
            training = folder / "training"
            _write(rows, folder / "train.jsonl")
            if validation is not None:
                _write(validation, folder / "validation.jsonl")
            tune(
                model,
                folder / "train.jsonl",
                training,
                validation=folder / "validation.jsonl" if validation is not None else None,
                options=options,
                encoding=encoding,
                device=device,
                dtype=dtype,
                resume=True,  # of an interrupted one
                reporter=reporter,
            )
            _put(training, adapter)
    return adapter


def _put(training: Path, adapter: Path) -> None:
    """In place of one without checkpoints, if there is one, which another process may be reading: it goes last."""
    old = adapter.with_name(f"{adapter.name}-{os.getpid()}.old")
    if adapter.exists():
        adapter.rename(old)
    training.rename(adapter)
    shutil.rmtree(old, ignore_errors=True)


def base_sha256(loaded: Loaded) -> str:
    """Of all that a base model brings to a fine-tune: weights, configuration, tokenizer, chat template, limit."""
    what = [loaded.model_sha256, Encoding(loaded.tokenizer, None, loaded.max_length).settings()]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def snapshots(adapter: Path) -> list[tuple[int, Path]]:
    """(step, checkpoint directory), ascending: 8 log-spaced steps from the first to the last, and every epoch's end.

    A directory that is gone is named all the same. Where a training could stop early, those that are there, up to the
    adapter's own weights. Raises UserError where there is none.
    """
    found = {int(p.name.removeprefix("checkpoint-")): p for p in adapter.glob("checkpoint-*")}
    if not found:
        raise UserError(f"{adapter}: there is no checkpoint. Remove the directory, and it is trained again.")
    record = read_record(adapter)
    keep, more, stop = (record["options"][k] for k in ("keep", "snapshots", "early_stop"))
    if not stop:
        epochs = [int(h["step"]) for h in record["history"] if "loss" in h]
        wanted = {*(epochs[-keep:] if keep else []), *snapshot_steps(more, len(record["rates"]))}
        found |= {step: adapter / f"checkpoint-{step}" for step in wanted}
    return sorted(found.items())


def _serves(adapter: Path, checkpoints: bool) -> bool:
    """Is it there, with what is needed? The directory appears when the training is done."""
    if not (adapter / TRAINING_RECORD).exists():
        return False
    return not checkpoints or read_record(adapter)["options"]["snapshots"] >= SNAPSHOTS


def _digest(
    model_sha256: str,
    rows: Sequence[Example],
    validation: Sequence[Example] | None,
    encoding: EncodingOptions,
    options: TuneOptions,
) -> str:
    """sha256 of all that decides the weights. Validation does: it draws on the random numbers of dropout."""
    recipe = {k: v for k, v in decisive(options).items() if k != "keep"}
    seen = [None if some is None else [_turns(e) for e in some] for some in (rows, validation)]
    what = [VERSION, model_sha256, recipe, asdict(encoding), *seen]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _turns(e: Example) -> dict[str, Any]:
    """What training sees of a row, as a line of a file. Ids and labels are of those who ask, and may differ."""
    if not e.messages:
        return {"text": e.text}
    if not e.given:
        return {"messages": e.messages}
    return {"prompt": e.messages[: e.given], "response": e.messages[e.given :]}


def _write(rows: Sequence[Example], path: Path) -> None:
    lines = [_turns(e) for e in rows]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


atexit.register(release_all)
