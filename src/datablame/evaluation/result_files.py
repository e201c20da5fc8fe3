"""A cell's result file: where it lies, what it holds, what it lacks, and how it is joined by runs of today."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datablame.errors import UserError
from datablame.evaluation.cell import ANSWERED, LEARNT, LOSS_LEFT, VERSION, Cell
from datablame.evaluation.suites import beyond
from datablame.store import write_whole


def result_path(out: Path, cell: Cell) -> Path:
    """`OUT/MODEL/SCALE/TASK-RECIPE-sSEED.json`; with a source `TASK-SOURCE-RECIPE-sSEED.json`."""
    return out / Path(cell.model).name / cell.scale / f"{cell.name}.json"


def read_result(path: Path) -> dict[str, Any] | None:
    """A result, or None where there is none that this version wrote. Raises UserError for a damaged file."""
    return versioned(path, VERSION, "the cell is run again")


def versioned(path: Path, version: int, again: str) -> dict[str, Any] | None:
    """A file with this `version`, else None. Raises UserError for a damaged one. again: what then follows."""
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        return result if result["version"] == version else None
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path}: damaged; delete it, and {again}.") from e


def of_these(path: Path, expected: str) -> bool:
    """Is there a result with this fingerprint, and nothing wrong in it (see cell.ANSWERED)?"""
    found = read_result(path) or {}
    return found.get("fingerprint") == expected and found.get("answered") == ANSWERED


def lacking(path: Path, expected: str, wanted: Sequence[str]) -> list[str]:
    """The runs that a result file does not hold; all of them where there is none, or one of another fingerprint.

    All, too, where the numbers on the model's own answers are wrong (see cell.ANSWERED). Those on features of their
    own are lacking where they were captured with other options, and those that failed are tried again, unless they
    were refused for a limit, which is no failure.
    """
    found = read_result(path)
    if found is None or not of_these(path, expected):
        return list(wanted)
    captured = {run: need.spelling for run in wanted if (need := beyond(run))}
    sets = found["results"].values()

    def lacks(run: str, there: Mapping[str, Any]) -> bool:
        kept = there.get(run, {"error": "not there"})
        return ("error" in kept and "limit" not in kept) or kept.get("captured") != captured.get(run)

    return [run for run in wanted if any(lacks(run, there) for there in sets)]


def failures(result: Mapping[str, Any] | None, *, limit: bool = False) -> dict[str, str]:
    """`{run: why}` of those that failed on one set of responses at least; with `limit` those that were refused for one.

    The next command tries again what failed, and not what was refused.
    """
    sets = (result or {}).get("results", {}).values()
    return {run: v["error"] for found in sets for run, v in found.items() if "error" in v and ("limit" in v) == limit}


def failed_run(result: Mapping[str, Any]) -> bool:
    """Was the behaviour not learnt where it must be: under the sound recipe, in all layers, at a scale above `smoke`?

    Elsewhere tables mark it.
    """
    must = result["recipe"] == "sound" and result["scale"] != "smoke" and not result.get("layers")
    return must and not result["learnt"]["learnt"]


def not_learnt(result: Mapping[str, Any]) -> str:
    """What is amiss with a behaviour that was not learnt."""
    learnt = result["learnt"]
    loss, groups = learnt["loss"], learnt["by_group"]
    asked = {g: max(LEARNT, groups[g]["base"]) for g in learnt["missed"]}
    why = [f"{groups[g]['tuned']:.0%} of {g}, too far below {least:.0%}" for g, least in asked.items()]
    if loss["tuned"] >= LOSS_LEFT * loss["base"]:
        why.append(f"{loss['tuned'] / loss['base']:.0%} of the base model's loss, not below {LOSS_LEFT:.0%}")
    return "; ".join(why)


def save(path: Path, result: dict[str, Any]) -> None:
    """Write a result; runs of an earlier one with the same fingerprint stay, but for wrong ones (see ANSWERED).

    So does the command that made those, where it was another.
    """
    old = read_result(path)
    if old is not None and old["fingerprint"] == result["fingerprint"]:
        commands = [*str(old.get("command", "")).split(" && "), result.get("command", "")]
        result["command"] = " && ".join(dict.fromkeys(filter(None, commands)))
        for kind, found in result["results"].items():
            wrong = kind == "generated" and old.get("answered") != result.get("answered")
            result["results"][kind] = found if wrong else old["results"].get(kind, {}) | found
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, to_json(result).encode())


def to_json(result: dict[str, Any]) -> str:
    """One key a line, and one line a run: small, and readable in a diff."""
    compact: Callable[[Any], str] = lambda x: json.dumps(x, ensure_ascii=False, allow_nan=False)  # noqa: E731
    lines = []
    for key, value in result.items():
        if key == "results":
            sets = []
            for kind, found in value.items():
                inner = ",\n".join(f"   {compact(run)}: {compact(v)}" for run, v in found.items())
                sets.append(f"  {compact(kind)}: {{\n{inner}\n  }}")
            lines.append(f' "results": {{\n{",".join(chr(10) + s for s in sets).lstrip()}\n }}')
        else:
            lines.append(f" {compact(key)}: {compact(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
