"""What every benchmark's JSON carries: versions, threads, the machine's size; and where it is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datablame.environment import environment


def write(path: Path, result: dict[str, Any]) -> None:
    """Write `result` with the environment beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**result, **environment()}, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")
