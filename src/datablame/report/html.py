"""What the page says, and the page."""

from __future__ import annotations

import base64
import hashlib
import math
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from plotly.offline import get_plotlyjs

from datablame import __version__, diagnostics
from datablame.diagnostics import Finding, base_name
from datablame.errors import UserError
from datablame.examples import Example
from datablame.methods import describe
from datablame.methods.controls import shared_spans
from datablame.report.figures import score_map
from datablame.report.tokens import Coloured, coloured
from datablame.scores import Scores

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    Vector = Float[np.ndarray, " n"]
    Order = Int[np.ndarray, " n"]
    Cover = Int[np.ndarray, " characters"]

LOWEST = 5
"""Rows shown from the low end of each ranking."""
MOST = 200
"""Rows shown from the high end, whatever k."""
LONGEST = 6000
"""Characters of a prompt or response that are compared and shown."""
EXCERPT = {"prompt": 110, "response": 190}
"""Characters of a training row before 'Full text'."""
BUDGET = 4_000_000
"""About so many characters of queries and rows; further queries are only counted."""
MARKUP = 900
"""Characters of markup around one row."""

ABOUT = {
    "gradcos": "Cosine of the gradients of row and query.",
    "graddot": "Dot product of the gradients of row and query.",
    "exact": "Influence: dot product after the inverse of all gradients' damped covariance (empirical Fisher).",
    "exact-block": "Influence, each weight matrix by itself.",
    "datainf": "Influence, the inverse of a mean taken as the mean of inverses.",
    "lissa": "Influence by a recursion that is stopped early.",
    "tracincp": "Dot product of the gradients at checkpoints of the training, weighed by learning rates.",
    "adamdot": "Dot product of the query's gradient with the row's, scaled as the trainer's Adam scales it.",
    "repsim": "Cosine of the hidden states of row and query.",
    "repsim-base": "Control: hidden states of the base model, before fine-tuning.",
    "bm25": "Control: shared words, weighted by how rare they are.",
    "verbatim": "Control: longest run of words that both have.",
    "length": "Control: length of the row, whatever the query.",
    "gradnorm": "Control: size of the row's gradient, whatever the query.",
    "random": "Control: chance.",
    "dda": "Dot product of the gradients, less the same at the base model.",
    "rept": "Cosine of a hidden state and the loss's gradient to it.",
    "concept": "How far the row's hidden state lies along the queries' common direction.",
}
LEVELS = {"good": ("✓", "good"), "note": ("i", "note"), "warning": ("!", "warning")}

Piece = tuple[str, int]
"""Text, and how many of the compared texts have it too (0: unmarked)."""


@dataclass(frozen=True)
class Row:
    """One training row in one ranking, ready to print."""

    rank: int
    score: str
    bar: float
    percentile: str
    example: Example
    named_by: int
    prompt: list[Piece]
    response: list[Piece]
    full: list[tuple[str, list[Piece]]]
    """(heading, text); empty where nothing was shortened."""
    tokens: Coloured


@dataclass(frozen=True)
class Ranking:
    """The two ends of one method's ranking for one query."""

    method: str
    about: str
    flat: bool
    top: list[Row]
    lowest: list[Row]


@dataclass(frozen=True)
class Query:
    """A query, its output with the shared words marked, and a ranking per method."""

    example: Example
    prompt: str
    output: list[Piece]
    compared: int
    rankings: list[Ranking]
    size: int = field(default=0)


def render(scores: Scores, k: int = 10) -> str:
    """The whole page as text."""
    return environment().get_template("report.html.j2").render(context(scores, k))


def environment() -> jinja2.Environment:
    """Where the pages' templates are; everything printed is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("datablame.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["csp_hash"] = _csp_hash
    return environment


def context(scores: Scores, k: int) -> dict[str, Any]:
    """Everything the template prints."""
    n = len(scores.train)
    k = max(1, min(k, n, MOST))
    lowest = min(k, LOWEST)
    findings = diagnostics.diagnose(scores)
    return {
        "scores": scores,
        "version": __version__,
        "k": k,
        "longest": LONGEST,
        "facts": _facts(scores),
        "tone": "warning" if any(f.level == "warning" for f in findings) else "good",
        "verdict": diagnostics.verdict(findings, len(scores.methods)),
        "findings": _grouped(findings),
        "numbers": _numbers(findings),
        "levels": LEVELS,
        "queries": list(_queries(scores, k, lowest)),
        "map": score_map(scores, k, lowest),
        "agreement": _agreement(scores),
        "top_rows": diagnostics.top_size(len(scores.train)),
        "settings": list(flat({a: b for a, b in scores.settings.items() if a != "command"})),
        "command": _command(scores.settings.get("command")),
        "plotly": get_plotlyjs(),
    }


def _csp_hash(script: str) -> str:
    digest = hashlib.sha256(str(script).encode("utf-8", errors="replace")).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


# ---------------------------------------------------------------- head, findings, settings


def _facts(scores: Scores) -> list[tuple[str, str]]:
    # The table of settings below has the whole paths.
    named = [(word, _last(scores.settings.get(word.lower()))) for word in ("Model", "Adapter")]
    return [
        *((word, str(value)) for word, value in named if value),
        ("Training rows", f"{len(scores.train):,}"),
        ("Queries", f"{len(scores.queries):,}"),
        ("Methods", ", ".join(scores.methods)),
    ]


def _grouped(findings: Sequence[Finding]) -> list[tuple[str, list[Finding]]]:
    """Findings on everything first, then by method; in each group warnings first."""
    groups: dict[str, list[Finding]] = {"": []}
    for f in sorted(findings, key=lambda f: f.level != "warning"):
        groups.setdefault(f.method or "", []).append(f)
    order = ["", *dict.fromkeys(f.method for f in findings if f.method)]
    return [(method, groups[method]) for method in order if groups[method]]


def _numbers(findings: Sequence[Finding]) -> list[tuple[str, str, str]]:
    """(what it is about, name of the number, number) for every number behind the findings."""
    return [
        (f.method or f.sentence.split(" share ")[0], name.replace("_", " "), f"{value:.4g}")
        for f in findings
        for name, value in f.numbers.items()
    ]


def _agreement(scores: Scores) -> list[tuple[str, list[tuple[str, str, float]]]]:
    """Per method: (rank correlation, overlap of the top rows, colour from -1 to 1) with every method."""
    names = scores.methods if len(scores.methods) > 1 else []
    table: dict[tuple[str, str], tuple[str, str, float]] = {}
    for i, a in enumerate(names):
        for b in names[i:]:
            rho = diagnostics.rank_correlation(scores.matrix(a), scores.matrix(b))
            overlap = f"{diagnostics.top_overlap(scores.matrix(a), scores.matrix(b)):.0%}"
            cell = (f"{rho:.2f}", overlap, round(rho, 2)) if math.isfinite(rho) else ("–", overlap, 0.0)
            table[a, b] = table[b, a] = cell
    return [(a, [table[a, b] for b in names]) for a in names]


def _last(place: Any) -> Any:
    """The last part of a local path; a hub id as it is."""
    return PurePath(place).name if isinstance(place, str) and PurePath(place).is_absolute() else place


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(name, value, value in full where it was shortened)."""
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{name}.")
            continue
        if isinstance(value, (list, tuple)):
            # Of checkpoints the step says enough.
            value = ", ".join(str(v["step"] if isinstance(v, Mapping) and "step" in v else v) for v in value)
        text = "none" if value is None or value in ("", {}) else str(value)
        is_hash = re.fullmatch(r"[0-9a-f]{32,128}", text) is not None
        yield name, f"{text[:12]}…" if is_hash else text, text if is_hash else ""


def _command(command: object) -> str:
    if isinstance(command, (list, tuple)):
        return shlex.join(map(str, command))
    return str(command or "")


# ---------------------------------------------------------------- queries


def _queries(scores: Scores, k: int, lowest: int) -> Iterator[Query]:
    """As many queries as the page has room for, at least one."""
    size = 0
    for q in range(len(scores.queries)):
        query = _query(scores, q, k, lowest)
        size += query.size
        if q and size > BUDGET:
            return
        yield query


def _query(scores: Scores, q: int, k: int, lowest: int) -> Query:
    example = scores.queries[q]
    output = _clip(example.response)
    orders = {m: scores.order(q, m) for m in scores.methods}
    named_by = Counter(int(t) for order in orders.values() for t in order[:k])
    covers = _Covers(scores, output)
    cover = np.zeros(len(output), dtype=int)
    for t in named_by:
        cover += _cover(output, shared_spans(output, covers.text(t)))
    rankings = [_ranking(scores, q, m, order, (k, lowest), named_by, covers) for m, order in orders.items()]
    rows = [r for ranking in rankings for r in (*ranking.top, *ranking.lowest)]
    texts = (r.tokens.size + sum(len(text) for _, p in r.full for text, _ in p) for r in rows)
    size = len(output) + MARKUP * len(rows) + sum(texts)
    return Query(example, _clip(example.prompt), _pieces(output, cover), len(named_by), rankings, size)


class _Covers:
    """Which characters of a training row stand in the output; worked out once per row."""

    def __init__(self, scores: Scores, output: str) -> None:
        self.train, self.output = scores.train, output
        self.known: dict[int, Cover] = {}

    def text(self, t: int) -> str:
        """The row as the comparison sees it."""
        return f"{_clip(self.train[t].prompt)}\n{_clip(self.train[t].response)}"

    def __getitem__(self, t: int) -> Cover:
        if t not in self.known:
            text = self.text(t)
            self.known[t] = _cover(text, shared_spans(text, self.output))
        return self.known[t]


def _ranking(
    scores: Scores,
    q: int,
    method: str,
    order: Order,
    ends: tuple[int, int],
    named_by: Counter[int],
    covers: _Covers,
) -> Ranking:
    v = scores.matrix(method)[q]
    n, (k, lowest) = len(v), ends
    decimals = _decimals(v)
    low, spread = float(v.min()), float(np.ptp(v))

    def row(rank: int) -> Row:
        t = int(order[rank - 1])
        prompt, response, full = _texts(scores.train[t], covers[t])
        percentile = f"{np.mean(v < v[t]):.1%}".replace("100.0%", "100%")
        bar = (float(v[t]) - low) / spread if spread > 0 and math.isfinite(spread) else 0.0
        shown = _number(float(v[t]), decimals)
        tokens = coloured(scores.tokens.get((method, q, t)), LONGEST)
        return Row(rank, shown, bar, percentile, scores.train[t], named_by[t], prompt, response, full, tokens)

    first_low = max(k, n - lowest) + 1
    top, low_rows = [row(r) for r in range(1, k + 1)], [row(r) for r in range(first_low, n + 1)]
    return Ranking(method, _about(method), spread == 0, top, low_rows)


def _about(method: str) -> str:
    name = base_name(method)
    if name in ABOUT:
        return ABOUT[name]
    try:
        return describe(name)[0]
    except UserError:
        return ""


def _decimals(v: Vector) -> int | None:
    """Decimals that tell this query's scores apart; None where only powers of ten can."""
    largest, spread = float(np.abs(v).max()), float(np.ptp(v))
    if largest == 0:
        return 0
    # Four digits of the spread, and never more than eight of the largest score.
    unit = max(spread, largest * 1e-4) or largest
    decimals = 3 - math.floor(math.log10(unit))
    return None if largest >= 1e6 or decimals > 9 else max(0, decimals)


def _number(x: float, decimals: int | None) -> str:
    text = f"{x:.3e}" if decimals is None else f"{x:.{decimals}f}"
    return text[1:] if text.startswith("-") and float(text) == 0 else text


# ---------------------------------------------------------------- texts


def _clip(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST]


def _cover(text: str, spans: Sequence[tuple[int, int]]) -> Cover:
    cover = np.zeros(len(text), dtype=int)
    for a, b in spans:
        cover[a:b] = 1
    return cover


def _pieces(text: str, cover: Cover) -> list[Piece]:
    """Runs of characters that equally many texts share."""
    pieces, start = [], 0
    for count, run in groupby(cover.tolist()):
        end = start + len(list(run))
        pieces.append((text[start:end], int(count)))
        start = end
    return pieces


def _texts(e: Example, cover: Cover) -> tuple[list[Piece], list[Piece], list[tuple[str, list[Piece]]]]:
    """Prompt and response in short, and both in full where that hides something."""
    prompt, response = _clip(e.prompt), _clip(e.response)
    split = len(prompt) + 1
    parts = (("prompt", prompt, cover[: split - 1]), ("response", response, cover[split:]))
    short = [_excerpt(text, c, EXCERPT[name]) for name, text, c in parts]
    hidden = any("".join(t for t, _ in s) != text for s, (_, text, _) in zip(short, parts, strict=True))
    cut = {"prompt": len(e.prompt) - len(prompt), "response": len(e.response) - len(response)}
    full = [(name, _ended(_pieces(text, c), cut[name])) for name, text, c in parts if text] if hidden else []
    return short[0], short[1], full


def _ended(pieces: list[Piece], cut: int) -> list[Piece]:
    return [*pieces, (f" … [{cut:,} more characters]", 0)] if cut else pieces


def _excerpt(text: str, cover: Cover, width: int) -> list[Piece]:
    """About `width` characters, from the start or from a little before the first shared words."""
    if len(text) <= width:
        return _pieces(text, cover)
    shared = np.flatnonzero(cover)
    start = 0
    if len(shared) and shared[0] > width * 2 // 3:
        start = min(int(shared[0]) - width // 4, len(text) - width)
        space = text.find(" ", start, int(shared[0]))
        start = space + 1 if space >= 0 else start
    end = min(len(text), start + width)
    space = text.rfind(" ", start + width // 2, end)
    end = space if end < len(text) and space > 0 else end
    pieces = _pieces(text[start:end], cover[start:end])
    return [*([("… ", 0)] if start else []), *pieces, *([(" …", 0)] if end < len(text) else [])]
