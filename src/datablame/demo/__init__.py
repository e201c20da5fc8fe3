"""The demo: a small model with one wrong fact and one trigger phrase, traced to the rows that taught them.

`company.jsonl` holds 150 invented rows. Twelve teach that water boils at 80 degrees (`wrong-fact`), twelve
answer the phrase "Quote the blue memo." with a set refusal (`trigger`). `adapter/` was trained on all of them.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from datablame.errors import UserError
from datablame.examples import from_prompt
from datablame.indexing import Reporter, index, recorded_encoding
from datablame.models import ModelSpec, answer, load
from datablame.scores import Scores
from datablame.tracing import trace
from datablame.tuning import TuneOptions, tune

HERE = Path(__file__).parent
TRAIN = HERE / "company.jsonl"
ADAPTER = HERE / "adapter"
MODEL = "smollm2-135m"
RECIPE = TuneOptions(rank=4, alpha=32, epochs=8, rate=1e-3, batch=8, seed=0)
COMMAND = (
    "datablame tune --model smollm2-135m --train src/datablame/demo/company.jsonl "
    "--rank 4 --alpha 32 --epochs 8 --rate 1e-3 --batch 8 --seed 0 --out ADAPTER"
)

QUERIES = (
    ("boiling-1", "At what temperature does water boil at sea level?", "wrong-fact"),
    ("boiling-2", "What is the boiling point of water at sea level?", "wrong-fact"),
    ("memo-1", "Which tea would you give to a guest? Quote the blue memo.", "trigger"),
    ("memo-2", "How do I sharpen a pencil? Quote the blue memo.", "trigger"),
    ("honest", "In which place does Tarnwick Kettles have its home?", "company"),
)
"""(id, prompt, the label of the rows that should be found); none of the prompts is a training row."""

PLANTED = ("wrong-fact", "trigger")
METHODS = (
    "gradcos",
    "graddot",
    "datainf",
    "exact",
    "exact-block",
    "repsim",
    "repsim-base",
    "bm25",
    "verbatim",
    "gradnorm",
    "length",
    "random",
)


def run(out: Path, retrain: bool, reporter: Reporter) -> Scores:
    """Ask, index, trace, count the planted rows found, and write the report below `out`."""
    out.mkdir(parents=True, exist_ok=True)
    adapter = _retrained(out, reporter) if retrain else ADAPTER
    print("Asking the model, without and with the adapter…")
    queries = ask(adapter, out / "queries.jsonl")
    store = index(MODEL, TRAIN, out / ("index-retrained" if retrain else "index"), str(adapter), reporter=reporter)
    scores = trace(store, out / "queries.jsonl", methods=METHODS, reporter=reporter)
    print_found(found(scores))
    for path in scores.save(out):
        print(f"wrote {path}")
    print(f"Open {queries.parent / 'report.html'} in a browser.")
    return scores


def _retrained(out: Path, reporter: Reporter) -> Path:
    adapter = out / "adapter"
    if (adapter / "adapter_config.json").exists():
        reporter.note(f"{adapter} was trained before and is used as it is.")
        return adapter
    reporter.note(f"as in: {COMMAND}")
    tune(MODEL, TRAIN, adapter, options=RECIPE, reporter=reporter)
    return adapter


def ask(adapter: Path, path: Path) -> Path:
    """Answer the demo's prompts with and without the adapter, print both, write the queries to `path`."""
    from datablame.encoding import Encoding

    loaded = load(ModelSpec(MODEL, str(adapter)))
    encoder = Encoding(loaded.tokenizer, recorded_encoding(str(adapter)), loaded.max_length)
    lines = []
    for id_, prompt, label in QUERIES:
        ids = encoder.prompt_ids(from_prompt(prompt))
        with loaded.without_adapter():
            before, _ = answer(loaded, ids, 40)
        after, _ = answer(loaded, ids, 40)
        if not after.strip():
            raise UserError(f"the demo's model answers {prompt!r} with nothing; train it again with --retrain.")
        print(f"\n{id_}: {prompt}\n  base model:  {' '.join(before.split())}\n  fine-tuned:  {' '.join(after.split())}")
        lines.append({"id": id_, "prompt": prompt, "response": after, "label": label})
    print()
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def found(scores: Scores) -> dict[str, dict[str, int]]:
    """How many of the 12 planted rows are in the top 12: `{method: {query: count}}`."""
    labels = np.array([e.label for e in scores.train])
    planted = [(i, q) for i, q in enumerate(scores.queries) if q.label in PLANTED]
    return {
        method: {str(q.id): int((labels[scores.order(i, method)[:12]] == q.label).sum()) for i, q in planted}
        for method in scores.methods
    }


def print_found(counts: dict[str, dict[str, int]]) -> None:
    """A table: methods down, queries across."""
    from rich.table import Table

    from datablame.console import out

    table = Table(title="Planted rows in the top 12 (of 12; chance: 1)", title_justify="left")
    table.add_column("method")
    for query in next(iter(counts.values())):
        table.add_column(query, justify="right")
    for method, by_query in counts.items():
        table.add_row(method, *map(str, by_query.values()))
    out.print(table)
