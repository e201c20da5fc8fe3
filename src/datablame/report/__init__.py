"""The HTML report: which rows, under which method, and should you believe it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datablame.scores import Scores

__all__ = ["write_report"]


def write_report(scores: Scores, path: Path, k: int = 10) -> Path:
    """Write one self-contained page with the k highest rows per method and query, and return its path."""
    from datablame.report.html import render

    # Half of a surrogate pair in a user's text cannot be encoded; it becomes a question mark.
    Path(path).write_bytes(render(scores, k).encode("utf-8", errors="replace"))
    return Path(path)
