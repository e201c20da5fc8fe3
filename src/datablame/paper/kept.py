"""Pieces of an experiment that are not made twice: JSON in the cache, named by the digest of all that decides it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datablame.errors import UserError
from datablame.models import cache_dir


def kept(kind: str, what: Any, make: Callable[[], Any], folder: Path | None = None) -> Any:
    """What `make` gave for `what`, made now where the folder (of the cache, if None) does not have it.

    kind: in the file's name, with a number that is raised when `make` changes, such as `answers-1`.
    Raises UserError for a damaged file, and for a number that is not finite, which is not kept.
    """
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
    path = (folder or cache_dir() / "paper") / f"{kind}-{digest[:24]}.json"
    if path.exists():
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as e:
            raise UserError(f"{path}: damaged; delete it, and it is made again.") from e
    made = make()
    try:
        text = json.dumps(made, allow_nan=False)
    except ValueError as e:
        raise UserError(f"{kind}: a number is not finite, so nothing is kept, and nothing can be said.") from e
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")  # another process may be at the same piece
    part.write_text(text, encoding="utf-8")
    part.replace(path)
    return made
