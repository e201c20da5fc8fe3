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
    """Write `result` with the environment beside it; the file appears only when it is whole."""
    text = json.dumps({**result, **environment()}, indent=1, allow_nan=False) + "\n"
    text = re.sub(
        r'\[[^][{}"]*\]', lambda numbers: " ".join(numbers[0].split()), text
    )  # a line for each list of numbers
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror or e}).") from e
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
    run = result["run"] if isinstance(result.get("run"), dict) else result
    known = [f"{k} {run[k]}" for k in ("scale", "model", "seed") if isinstance(run.get(k), str | int)]
    return f"run: {', '.join([str(path), *known])}"


def already_there(path: Path, run: dict[str, Any], reporter: Reporter) -> bool:
    """Whether `path` holds this very `run`, of which the reporter is told.

    Raises UserError when it holds another one, which is not overwritten.
    """
    if not path.exists():
        return False
    there = read(path).get("run")
    if there == run:
        reporter.note(f"{path} holds this run already; remove it to measure again.")
        return True
    differ = [k for k in run if not isinstance(there, dict) or there.get(k) != run[k]]
    raise UserError(f"{path}: holds another run (its {differ[0]} differs). Name another --out, or remove the file.")


def point(x: Any) -> dict[str, Any]:
    """A mean and its interval, `(value, low, high)`, as a file keeps them."""
    value, low, high = (_short(v) for v in x)
    return {"value": value, "interval95": [low, high]}


def half(x: dict[str, Any]) -> float:
    """Half of a point's interval."""
    return (x["interval95"][1] - x["interval95"][0]) / 2


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
