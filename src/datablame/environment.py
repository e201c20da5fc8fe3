"""What every committed result says of where it was made."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

PACKAGES = ("datablame", "torch", "transformers", "peft", "trl", "numpy", "scipy", "bm25s")


def environment() -> dict[str, Any]:
    """Versions and the machine, in the only words that results use."""
    import psutil
    import torch

    cores, gigabytes = psutil.cpu_count(), round(psutil.virtual_memory().total / 2**30)
    reference = cores == 2 and 22 <= gigabytes <= 24
    return {
        "machine": "the reference machine (2 cores, 24 GB)" if reference else f"{cores} cores, {gigabytes} GB",
        "threads": torch.get_num_threads(),
        "versions": {p: version(p) for p in PACKAGES},
    }
