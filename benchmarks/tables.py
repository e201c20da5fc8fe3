"""Write the results of benchmarks/results/*.json into the pages, between `<!-- table: NAME -->` and `<!-- end -->`.

python benchmarks/tables.py           write them
python benchmarks/tables.py --check   exit 1 when a page differs from its JSON
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
MARK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.S)


def demo(r: dict[str, Any]) -> str:
    """Planted rows found in the top 12."""
    queries = list(next(iter(r["methods"].values()))["found_of_12"])
    lines = [
        "| method | " + " | ".join(queries) + " | recall (95 % interval) |",
        "|---|" + "---|" * (len(queries) + 1),
    ]
    for method, m in r["methods"].items():
        low, high = m["interval95"]
        counts = " | ".join(str(m["found_of_12"][q]) for q in queries)
        lines.append(f"| `{method}` | {counts} | {m['recall']:.2f} ({low:.2f} to {high:.2f}) |")
    return "\n".join(
        [
            *lines,
            "",
            f"Chance is {r['chance_recall']:.2f}. {r['training_rows']} rows, {r['seconds']} s, {r['machine']}.",
        ]
    )


def capture(r: dict[str, Any]) -> str:
    """Speed of capture."""
    rate, ratio = r["tokens_per_second"], r["ratios"]
    lines = ["| way | tokens/s (median) | capture is … times as fast |", "|---|---|---|"]
    names = {
        "capture": "capture: all per-example gradients and hidden states",
        "plain": "plain batched forward and backward, nothing kept",
        "loop": "one row at a time, padded to 128 tokens, all logits (the paper's code)",
        "bare": "the same loop without the padding",
    }
    for way, words in names.items():
        ratio_of = ratio.get(f"capture_over_{way}")
        shown = f"{ratio_of['median']:.2f} ({ratio_of['lowest']:.2f} to {ratio_of['highest']:.2f})" if ratio_of else "1"
        lines.append(f"| {words} | {rate[way]:.0f} | {shown} |")
    where = f"{r['rows']} rows, {r['unpadded_tokens']} tokens of {r['data']}, {r['blocks']} blocks, {r['machine']}"
    return "\n".join([*lines, "", f"{where}; peak memory {r['peak_memory_gb_after_capture']:.1f} GB."])


def scoring(r: dict[str, Any]) -> str:
    """Seconds of the methods on gradients, and of the loops that they replace."""
    lines = ["| method | seconds | the released loop, seconds |", "|---|---|---|"]
    for m in r["methods"].values():
        lines.append(f"| `{m['spec']}` | {m['seconds']:.1f} | {m['loop_seconds_extrapolated']:.0f} |")
    lines += [f"| `{name}` | {seconds:.1f} | – |" for name, seconds in r["seconds_beside"].items()]
    size = f"{r['rows']} rows, {r['queries']} queries, {r['blocks']} blocks, {r['numbers_a_row']} numbers a row"
    return "\n".join([*lines, "", f"{size}; {r['machine']}; peak memory {r['peak_memory_gb']:.1f} GB."])


def render(text: str) -> str:
    """The page with its tables as the JSON files say now."""

    def table(match: re.Match[str]) -> str:
        name = match[2]
        result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        return f"{match[1]}{globals()[name](result)}\n{match[3]}"

    return MARK.sub(table, text)


def main() -> None:
    """Write or check."""
    stale = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if (new := render(text)) != text:
            stale.append(page.name)
            if "--check" not in sys.argv:
                page.write_text(new, encoding="utf-8")
    if stale and "--check" in sys.argv:
        sys.exit(f"{', '.join(stale)}: differ from benchmarks/results; run python benchmarks/tables.py")
    print("written: " + ", ".join(stale) if stale else "all tables are up to date")


if __name__ == "__main__":
    if "--help" in sys.argv:
        print(__doc__)
        sys.exit()
    main()
