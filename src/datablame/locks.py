"""Work that several processes share: who is at it, and which kept folders are in use."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

HELD = 32
"""How many folders a process keeps marked: each takes an open file."""
PROBED = 0.2
"""Seconds to try for: `datablame cache` holds each lock for a moment to see whether it is free."""
_held: deque[FileLock] = deque()


@contextmanager
def alone(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Is this the one process that holds the lock? A second one takes other work, so that two share it.

    wait: until the other one is done; then always True.
    """
    lock = FileLock(path)
    if not _acquired(lock, path, -1 if wait else PROBED):
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _acquired(lock: FileLock, path: Path, seconds: float) -> bool:
    """Take the lock within so many seconds (-1: whenever it is free), in a folder that is made where it is not there.

    `datablame cache prune` may take the folder away while it is waited for: then the lock is a new one.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=seconds)
            return True
        except Timeout:
            return False
        except FileNotFoundError:
            continue


def hold(folder: Path) -> None:
    """Mark a folder as in use by this process, so that `datablame cache prune` leaves it alone.

    Until the process ends, or has marked HELD others since. The system forgets the mark with the process.
    """
    mark = folder / f"used-{os.getpid()}.lock"
    held = next((lock for lock in _held if lock.lock_file == str(mark)), None)
    if held is None:
        held = FileLock(mark)
        try:
            held.acquire(timeout=0)
        except Timeout:  # of the same number, in another container: marked all the same
            return
    else:
        _held.remove(held)
    _held.append(held)
    while len(_held) > HELD:
        _release(_held.popleft())


def release_all() -> None:
    """Take back every mark of this process."""
    while _held:
        _release(_held.pop())


def _release(lock: FileLock) -> None:
    lock.release()
    Path(lock.lock_file).unlink(missing_ok=True)
