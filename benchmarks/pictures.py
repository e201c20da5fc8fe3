"""Pictures of committed results for the documentation: `python benchmarks/pictures.py [NAME …]`.

Each is a view of the page that `datablame paper show` writes, or the ladder of the benchmark, as a PNG in docs/. Needs
what the project does not: `pip install "kaleido>=1"`, and Chrome or Chromium. A PNG holds the digest of what it shows,
so that a test can tell one that is behind its numbers.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from datablame.evaluation import figures
from datablame.evaluation.results import load_results
from datablame.paper import experiment, module
from datablame.paper.commands import SHOWN_FROM_CELLS
from datablame.paper.panels import COLOURS
from datablame.report.paper import escaped

ROOT = Path(__file__).parents[1]
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
PAPER, BENCH = RESULTS / "paper", RESULTS / "bench"
KEY = b"view-sha256"


class Picture(NamedTuple):
    """An experiment, and which of its page's views; None: the first."""

    name: str
    view: str | None = None


LADDER = "ladder"
"""No experiment of the paper: the benchmark's picture from the paper's protocol to the sound one."""
PICTURES = {
    "ladder": Picture(LADDER),
    "table1": Picture("table1"),
    "table5": Picture("table5"),
    "table6": Picture("table6"),
    "figure1": Picture("figure1", "grammars"),
    "figure2": Picture("figure2", "grammars: all"),
    "figure3": Picture("figure3"),
    "figure4": Picture("figure4"),
    "figure5": Picture("figure5", "top-1 accuracy, padded"),
    "figure5-response": Picture("figure5", "top-1 accuracy, response"),
    "figure5-auroc": Picture("figure5", "AUROC, response"),
    "figure6": Picture("figure6"),
    "figure6-kl": Picture("figure6", "KL from the original"),
    "figure7": Picture("figure7", "SGD, first layer random, log-spaced"),
    "figure7-correlations": Picture("figure7", "correlations"),
    "figure8": Picture("figure8", "top-1 accuracy by number, as released"),
    "figure8-response": Picture("figure8", "top-1 accuracy by number, response"),
    "figure8-place": Picture("figure8", "top-1 accuracy by place, as released"),
    "figure8-place-response": Picture("figure8", "top-1 accuracy by place, response"),
}
"""By the name of the file."""
STYLE = {
    "template": "plotly_white",
    "colorway": list(COLOURS.values()),
    "font": {"size": 13},
    "margin": {"l": 60, "r": 12, "t": 40, "b": 60},
    "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"},
}


def view_of(picture: Picture) -> dict[str, Any] | None:
    """Plotly's data and layout; None where the experiment has not been run. Raises KeyError for an unknown view."""
    if picture.name == LADDER:
        return json.loads(figures.ladder(load_results(BENCH, "smollm2-135m", "cpu", "sound")).to_json())
    if not (PAPER / experiment(picture.name).result).exists():
        return None
    of_cells = experiment(picture.name).module == SHOWN_FROM_CELLS
    views = module(picture.name).show(PAPER, picture.name, *([BENCH] if of_cells else [])).views
    return escaped(views[picture.view or next(iter(views))])


def digest(view: dict[str, Any]) -> str:
    """sha256 of all that is drawn."""
    return hashlib.sha256(json.dumps([view, STYLE], sort_keys=True).encode()).hexdigest()


def shown_in(png: bytes) -> str | None:
    """The digest that a picture holds."""
    _, found, rest = png.partition(KEY + b"\0")
    return rest[:64].decode() if found else None


def _with_digest(png: bytes, sha256: str) -> bytes:
    """A tEXt chunk after the header, which is 8 + 25 bytes."""
    body = b"tEXt" + KEY + b"\0" + sha256.encode()
    return png[:33] + struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)) + png[33:]


def draw(view: dict[str, Any]) -> bytes:
    """The PNG."""
    import plotly.graph_objects as go

    layout = view["layout"]
    merged = {k: {**v, **layout.get(k, {})} if isinstance(v, dict) else v for k, v in STYLE.items()}
    figure = go.Figure(data=view["data"], layout={**layout, **merged})
    return _with_digest(figure.to_image("png", width=960, height=layout.get("height", 480), scale=1.5), digest(view))


def main(names: list[str]) -> None:
    """Draw those that are behind, or the named ones."""
    for name in names or PICTURES:
        view, path = view_of(PICTURES[name]), DOCS / f"{name}.png"
        if view is None:
            print(f"{name}: not run yet")
        elif names or not path.exists() or shown_in(path.read_bytes()) != digest(view):
            path.write_bytes(draw(view))
            print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main(sys.argv[1:])
