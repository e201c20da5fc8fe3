"""What the experiments' files share: intervals, writing and reading JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datablame.environment import environment
from datablame.errors import UserError
from datablame.indexing import Reporter
from datablame.store import write_whole


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean and its 95 % interval by Student's t, to six digits; no interval for a single value."""
    import numpy as np
    from scipy import stats

    n, mean = len(values), float(np.mean(values))
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5) if n > 1 else None
    return {
        "mean": _short(mean),
        "interval95": None if half is None else [_short(mean - half), _short(mean + half)],
        "values": [_short(v) for v in values],
    }


def _short(x: float) -> float:
    return float(f"{x:.6g}")


def write(path: Path, result: dict[str, Any]) -> Path:
    """Write `result` with the environment beside it; the file appears only when it is whole.

    Raises UserError where it cannot be written.
    """
    text = json.dumps({**result, **environment()}, indent=1, allow_nan=False) + "\n"
    text = re.sub(
        r'\[[^][{}"]*\]', lambda numbers: " ".join(numbers[0].split()), text
    )  # a line for each list of numbers
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror or e}).") from e
    write_whole(path, text.encode())
    return path


def read(path: Path) -> dict[str, Any]:
    """The result at `path`. Raises UserError when it is not there or not whole."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        name = path.stem
        raise UserError(f"{path}: no such run. First: datablame paper run {name} --out {path.parent}") from None
    except (ValueError, OSError) as e:
        raise UserError(f"{path}: cannot be read ({e}). Remove it and run again.") from e
    if not isinstance(result, dict):
        raise UserError(f"{path}: is not the result of a run. Remove it and run again.")
    return result


def state(path: Path) -> str:
    """In a few words, for a list: was it run, and how."""
    if not path.exists():
        return f"not run yet in {path.parent}"
    try:
        result = read(path)
    except UserError:
        return f"{path} is damaged; remove it and run again"
    told = {k: ", ".join(map(str, v)) if isinstance(v, list) else v for k, v in _run(result).items()}
    known = [f"{k} {told[k]}" for k in ("scale", "model", "seed", "seeds") if isinstance(told.get(k), str | int)]
    return f"run: {', '.join([str(path), *known])}"


def _run(result: dict[str, Any]) -> dict[str, Any]:
    """What decides a run: under `run`, or, where the numbers are the benchmark's, the whole file."""
    return result["run"] if isinstance(result.get("run"), dict) else result


def already_there(path: Path, run: dict[str, Any], reporter: Reporter) -> bool:
    """Whether `path` holds this very `run`, of which the reporter is told.

    Raises UserError when it holds another one, which is not overwritten.
    """
    if not path.exists():
        return False
    there = _run(read(path))
    differ = [k for k in run if there.get(k) != run[k]]
    if not differ:
        reporter.note(f"{path} holds this run already; remove it to measure again.")
        return True
    raise UserError(f"{path}: holds another run (not the same {differ[0]}). Name another --out, or remove the file.")


def point(x: Any, *, fixed: bool = False) -> dict[str, Any]:
    """A mean and its interval, `(value, low, high)`, as a file keeps them. fixed: one witness, without an interval."""
    value, low, high = (_short(v) for v in x)
    return {"value": value, "interval95": None if fixed else [low, high]}


def with_half(x: Mapping[str, Any]) -> str:
    """A point in print, such as `0.53 ±0.02`; `0.53 ≡` for one ranking for all queries, which has no interval."""
    if x["interval95"] is None:
        return f"{x['value']:.2f} ≡"
    low, high = x["interval95"]
    return f"{x['value']:.2f} ±{(high - low) / 2:.2f}"


def difference(t: Mapping[str, Any]) -> str:
    """A tested difference, such as `+0.10* (p 0.01)`: *, and p, after Holm's correction. No negative zero."""
    return f"{round(t['value'], 2) + 0.0:+.2f}{'*' if t['p_holm'] < 0.05 else ''} (p {t['p_holm']:.2g})"


def too_few(tasks: Mapping[str, Any]) -> list[str]:
    """A sentence for each task whose `queries` are so few that no paired test over them can be significant at 5 %."""
    return [
        f"{task}: with {x['queries']} queries no difference can be significant; the smallest p is {2.0 ** (1 - m):g}."
        for task, x in tasks.items()
        if 2.0 ** (1 - (m := x["queries"])) >= 0.05
    ]
