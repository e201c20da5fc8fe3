"""What every benchmark's JSON carries: versions, threads, the machine's size; and where it is written."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any


def environment() -> dict[str, Any]:
    """Versions and the machine in the only words that results use."""
    import psutil
    import torch

    cores, gigabytes = psutil.cpu_count(), round(psutil.virtual_memory().total / 2**30)
    reference = cores == 2 and 22 <= gigabytes <= 24
    return {
        "machine": "the reference machine (2 cores, 24 GB)" if reference else f"{cores} cores, {gigabytes} GB",
        "threads": torch.get_num_threads(),
        "versions": {p: version(p) for p in ("datablame", "torch", "transformers", "peft", "numpy")},
    }


def write(path: Path, result: dict[str, Any]) -> None:
    """Write `result` with the environment beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**result, **environment()}, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")
