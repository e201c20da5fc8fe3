"""What lies in the cache directory, and its removal: the library behind `datablame cache`.

Only what `KINDS` names is ever touched, links are neither followed nor removed, and nothing that another process holds
a lock on goes. All of it is made again when it is needed.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from datablame.errors import UserError, nearest
from datablame.models import cache_dir

KINDS = {
    "models": "models converted to float32; fetched or converted again",
    "mnist": "MNIST's files; fetched again",
    "sources": "files out of packages, for the benchmark's tasks; fetched again",
    "finetunes": "fine-tunes with their checkpoints; trained again",
    "bench": "the benchmark's cells: rows, answers, features, scores (retraining reads those); run again",
    "retrained": "what came of retrainings, a directory a model; trained again",
    "paper": "finished pieces of the paper's experiments; measured again",
    "along": "checkpoints of fine-tunes that were attributed; measured again",
    "figure7": "trainings of linear models that were watched; trained again",
}
"""Directory -> what it holds, and what its removal costs."""
WHOLE = ("mnist",)
"""Kinds that are one entry."""
LOCKED = ("bench", "finetunes", "along")
"""Kinds whose entries are worked on under a file `lock` in them."""
BEING_MADE = 3600
"""Seconds for which something unfinished (`….part`) counts as in use after it was last written to."""
DAY = 86400


@dataclass(frozen=True)
class Entry:
    """One thing in the cache. size: bytes; changed: seconds since the epoch; about: for people, may be empty."""

    kind: str
    name: str
    path: Path
    size: int
    changed: float
    in_use: bool
    about: str


def entries() -> list[Entry]:
    """All that is there, by kind and name."""
    root = cache_dir()
    found = []
    for top in sorted(root.iterdir()) if root.is_dir() else []:
        kind = _kind(top)
        if kind is None:
            continue
        inside = [top] if kind in WHOLE or not top.is_dir() else sorted(top.iterdir())
        found += [_entry(kind, p, root) for p in inside if not p.is_symlink() and p.suffix != ".lock"]
    return found


def others() -> list[str]:
    """Names in the cache directory that are links, or that datablame did not make."""
    root = cache_dir()
    return sorted(p.name for p in root.iterdir() if _kind(p) is None) if root.is_dir() else []


def _kind(top: Path) -> str | None:
    """Of something right in the cache directory; `mnist.12.part` is MNIST, unfinished."""
    kind = top.name.partition(".")[0] if top.suffix == ".part" else top.name
    return None if top.is_symlink() or kind not in KINDS else kind


def _entry(kind: str, path: Path, root: Path) -> Entry:
    size, changed = _measured(path)
    with _grabbed(path) as free:
        made = path.suffix == ".part" and time.time() - changed < BEING_MADE
        return Entry(kind, path.relative_to(root).as_posix(), path, size, changed, made or not free, _about(path))


def _measured(path: Path) -> tuple[int, float]:
    """Bytes, and when anything in it was last written to; links count as themselves, what goes meanwhile not."""
    size, changed = 0, 0.0
    inside = (Path(folder, name) for folder, ds, fs in os.walk(path) for name in (*ds, *fs))
    for p in (path, *inside):
        try:
            stat = p.lstat()
        except OSError:
            continue
        changed = max(changed, stat.st_mtime)
        size += stat.st_size if not p.is_dir() or p.is_symlink() else 0
    return size, changed


def _about(path: Path) -> str:
    """Of a fine-tune: model, rows, recipe, checkpoints."""
    try:
        record = json.loads((path / "adapter" / "datablame.json").read_text(encoding="utf-8"))
        with (path / "train.jsonl").open(encoding="utf-8") as lines:
            rows = sum(1 for _ in lines)
        o = record["options"]
        checkpoints = sum(1 for _ in (path / "adapter").glob("checkpoint-*"))
        layers = f", layers {o['layers']}" if o["layers"] else ""
        recipe = f"rank {o['rank']}{layers}, epochs {o['epochs']:g}, seed {o['seed']}"
        return f"{Path(record['model']).name}: {rows} rows, {recipe}, checkpoints {checkpoints}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


# ---------------------------------------------------------------- choosing


def choose(
    found: Sequence[Entry], names: Sequence[str] = (), kind: str | None = None, older_than: float | None = None
) -> list[Entry]:
    """The entries of all that is asked for together. names: `bench/NAME`, or NAME alone; older_than: days.

    Raises UserError for an unknown name or kind, or when nothing is asked for.
    """
    if not names and kind is None and older_than is None:
        raise UserError("say what to remove: names, --kind, --older-than DAYS (0: everything), or several of them.")
    if kind is not None and kind not in KINDS:
        raise UserError(f"--kind {kind!r}: no such kind.{nearest(kind, KINDS)}")
    if older_than is not None and not older_than >= 0:
        raise UserError(f"--older-than {older_than:g}: a number of days from 0.")
    known = {e.name for e in found} | {e.path.name for e in found}
    if strange := [n for n in names if n not in known]:
        raise UserError(f"{strange[0]!r}: no such entry in {cache_dir()}.{nearest(strange[0], known)}")
    before = time.time() - (older_than or 0) * DAY
    return [
        e
        for e in found
        if (not names or e.name in names or e.path.name in names)
        and (kind is None or e.kind == kind)
        and e.changed <= before
    ]


# ---------------------------------------------------------------- removing


def remove(entry: Entry) -> bool:
    """Take it away; False where it is in use. Raises UserError for what cannot be removed or is not in the cache."""
    root = cache_dir().resolve()
    inside = entry.path.parent.resolve().is_relative_to(root)
    if not inside or entry.path.is_symlink() or entry.kind not in KINDS:
        raise UserError(f"{entry.path}: is not in the cache ({root}), so it is left alone.")
    if entry.in_use:
        return False
    with _grabbed(entry.path, begin=entry.kind in LOCKED) as free:
        if not free:
            return False
        try:
            if entry.path.is_dir():
                # Half of an entry must never look like a whole one.
                gone = entry.path.rename(entry.path.with_name(f"{entry.path.name}.{os.getpid()}.part"))
                shutil.rmtree(gone)
            else:
                entry.path.unlink(missing_ok=True)
        except OSError as e:
            raise UserError(f"{entry.path}: cannot be removed ({e.strerror or e}).") from e
    return True


@contextmanager
def _grabbed(path: Path, begin: bool = False) -> Iterator[bool]:
    """Hold every lock in a directory (of any process that works on it or reads it); False where another one does.

    begin: hold its `lock` even where nobody has made it yet.
    """
    first = path / "lock"
    with ExitStack() as held:
        try:
            if first.is_file() or (begin and path.is_dir()):
                held.enter_context(FileLock(first).acquire(timeout=0))
            # Only now: who reads a fine-tune marks it under that lock.
            locks = {p for p in path.rglob("*lock") if p.name == "lock" or p.suffix == ".lock"} - {first}
            for lock in sorted(locks):
                held.enter_context(FileLock(lock).acquire(timeout=0))
        except (Timeout, OSError):  # no right to the lock: somebody else's
            yield False
            return
        yield True
