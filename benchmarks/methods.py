"""Every method on the demo: what capture and scoring cost, agreement with `exact`, planted rows found.

    python benchmarks/methods.py --work methods-work --json benchmarks/results/methods.json

The demo's rows, adapter and questions (answers as in results/demo.json), every method with its own default options, and
the exact solutions once more with other damping (VARIANTS). Features are captured once: the index that every command
makes, and beside it an index of each extra's features alone, so that an extra's cost is its own. Each capture and each
method runs in a process of its own, whose peak memory is told. What is finished is kept in --work: run the command
again to go on. The JSON is written after every piece.

`--rows 60` keeps the 24 planted rows and draws the others. Methods that multiply by the curvature of the live model
(cg, minres, subspace) run on SUBSET_ROWS rows, the planted queries and the weights of SUBSET_BLOCKS, with `exact` and
`gauss-newton` on the same beside them. `unroll` trains the adapter once more and replays the run for each query of
UNROLLED; every method is compared with it on these.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import methods_summary
from datablame import methods as registry
from datablame.demo import ADAPTER, MODEL, PLANTED, TRAIN
from datablame.errors import UserError
from datablame.examples import Example, load_examples
from datablame.extras import parse as parse_extra
from datablame.indexing import SILENT, CaptureOptions, Engine, quiet_libraries, recorded_encoding
from datablame.store import FeatureStore
from datablame.tracing import Inputs, check_available
from datablame.unrolled import unroll

EXTRAS = {
    "sampled": "sampled",
    "kfac": "kfac",
    "margin": "margin",
    "base-gradients": "base-gradients",
    "hidden-gradient": "hidden-gradient",
    "moments": "moments",
    "daunce": "daunce:models=10",
    "bif": "bif:chains=2,draws=5,burn=10,every=2",
}
"""name -> as it is captured; daunce and bif with fewer adapters than by default (20 each), to fit into an hour."""
SERVES = {
    "sampled": ["gauss-newton"],
    "kfac": ["kfac", "ekfac"],
    "margin": ["trak"],
    "base-gradients": ["dda"],
    "hidden-gradient": ["rept"],
    "moments": ["less"],
    "daunce": ["daunce"],
    "bif": ["bif"],
}
VARIANTS = methods_summary.VARIANTS
SUBSET_ROWS, SUBSET_BLOCKS, SUBSET_BATCH = 32, "layers.2[5-9].*", 512
SUBSET = {
    "exact": "exact:damping=100",
    "gauss-newton": "gauss-newton:damping=100",
    "cg": "cg:steps=20,probes=2,damping=100",
    "minres": "minres:steps=20,probes=2,damping=100",
    "subspace": "subspace:damping=0.08",
}
"""The Fisher of the data's labels, the Gauss-Newton matrix by sampled labels, itself, and the Hessian; damped so that
twenty steps solve it (at 0.1 ten steps leave a residual of 1). `subspace` counts λ in means of as many eigenvalues as
there are rows, 32 in place of the 38,400 of all weights."""
ON_SUBSET = [s for s in SUBSET if registry.method_class(s).needs == "operator"]
UNROLLED = ["boiling-1", "memo-1"]
"""A query for each planted kind."""


# ---------------------------------------------------------------- the rows and what is known of them


def prepare(work: Path, rows: int, adapter: Path) -> None:
    """Write the training rows and the queries into `work`, or check that they are those of before."""
    examples = load_examples(TRAIN)
    planted = [i for i, e in enumerate(examples) if e.label in PLANTED]
    others = [i for i in range(len(examples)) if i not in planted]
    drawn = random.Random(0).sample(others, max(0, min(len(others), rows - len(planted))))
    lines = TRAIN.read_text(encoding="utf-8").splitlines(keepends=True)
    text = "".join(lines[i] for i in sorted([*planted, *drawn]))
    answers = json.loads(methods_summary.DEMO.read_text(encoding="utf-8"))["answers"]
    queries = "".join(json.dumps({"id": k, **a}) + "\n" for k, a in answers.items())
    work.mkdir(parents=True, exist_ok=True)
    for name, content in (("rows.jsonl", text), ("queries.jsonl", queries), ("adapter.txt", str(adapter.resolve()))):
        if (work / name).exists() and (work / name).read_text(encoding="utf-8") != content:
            sys.exit(f"{work}: was begun with other rows or another adapter; give another --work.")
        (work / name).write_text(content, encoding="utf-8")


def engine_of(work: Path, extra: str | None) -> tuple[Engine, list[Example], list[Any], list[Example], list[Any]]:
    """The model, and training rows and queries with their tokens."""
    from datablame.encoding import Encoding, encode_rows
    from datablame.models import ModelSpec, load

    adapter = (work / "adapter.txt").read_text(encoding="utf-8")
    loaded = load(ModelSpec(MODEL, adapter))
    encoder = Encoding(loaded.tokenizer, recorded_encoding(adapter), loaded.max_length)
    examples, queries = load_examples(work / "rows.jsonl"), load_examples(work / "queries.jsonl")
    checkpoints = "all" if any(Path(adapter).glob("checkpoint-*")) else None
    engine = Engine(loaded, CaptureOptions(checkpoints=checkpoints, extras=extra))
    return engine, examples, encode_rows(encoder, examples), queries, encode_rows(encoder, queries, turns="last")


# ---------------------------------------------------------------- measuring


@contextmanager
def measured(out: dict[str, Any]) -> Iterator[None]:
    """Seconds on the clock, and of this process's own computing, into `out`."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    out["seconds"] = round(time.perf_counter() - wall, 2)
    out["cpu_seconds"] = round(time.process_time() - cpu, 2)


@contextmanager
def passes(model: Any, tokens: int, out: dict[str, Any]) -> Iterator[None]:
    """Tokens that went through the model, padding included, over `tokens`, into `out`: those of forward passes that are
    differentiated, and of forward passes alone."""
    import torch

    seen = {"passes": 0, "forward_passes": 0}

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        del module, args
        seen["passes" if torch.is_grad_enabled() else "forward_passes"] += kwargs["input_ids"].numel()

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    yield
    handle.remove()
    out |= {k: round(v / tokens, 2) for k, v in seen.items()}


def peak() -> float:
    """GB of this process so far."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


# ---------------------------------------------------------------- one piece, in a process of its own


def capture(work: Path, name: str) -> dict[str, Any]:
    """An index of the rows, or of one extra's features of them; and the queries' features."""
    from safetensors.torch import save_file

    spec = EXTRAS.get(name)
    engine, examples, rows, queries, asked = engine_of(work, spec)
    tokens = sum(len(r.input_ids) for r in rows)
    out: dict[str, Any] = {"spec": spec, "tokens": tokens}
    place = work / f"index-{name}"
    shutil.rmtree(place, ignore_errors=True)
    with passes(engine.loaded.model, tokens, out), measured(out):
        if spec is None:
            settings = {**engine.settings(), "adapter": "", "model": MODEL}
            store = FeatureStore.create(
                place, settings, engine.widths, examples, engine.dtype, lambda: engine.adapter_tensors(rows)
            )
            fill(store, lambda a, b: engine.capture(rows[a:b], examples[a:b], SILENT))
        else:
            extra = parse_extra(spec)
            kept = {f"extras/{extra.kind}/{k}": v for k, v in extra.prepare(engine, rows).items()}
            store = FeatureStore.create(
                place, {"extras": [spec]}, extra.widths(engine), examples, engine.dtype, lambda: kept
            )
            fill(store, lambda a, b: extra.capture(engine, rows[a:b], store.adapter(f"extras/{extra.kind}")))
    out["peak_memory_gb"] = peak()
    if spec is None:
        features = engine.capture(asked, queries, SILENT)
    else:
        on_queries = parse_extra(spec).on_queries
        features = extra.capture(engine, asked, store.adapter(f"extras/{extra.kind}")) if on_queries else {}
    save_file({k: v.contiguous() for k, v in features.items()}, str(place.with_suffix(".queries.safetensors")))
    on_disk, by_row = sum(p.stat().st_size for p in place.iterdir()), 4 * sum(store.manifest["widths"].values())
    return out | {"bytes_a_row": by_row, "mb_once": round((on_disk - by_row * len(rows)) / 1e6, 2)}


def fill(store: FeatureStore, features: Callable[[int, int], Any]) -> None:
    """All shards of a new index."""
    store.begin()
    for a, b in store.missing():
        store.write((a, b), features(a, b))


class Joined:
    """The index and those of the extras, read as one."""

    def __init__(self, work: Path) -> None:
        self.stores = [FeatureStore.open(work / f"index-{n}", verify=False) for n in captured(work)]
        self.examples, self.path = self.stores[0].examples, self.stores[0].path
        extras = [e for s in self.stores[1:] for e in s.settings["extras"]]
        self.settings = {**self.stores[0].settings, "extras": extras}

    def _first(self, what: str, kind: str) -> Any:
        found = [getattr(s, what)(kind) for s in self.stores]
        return next((f for f in found if len(f)), {})

    def features(self, kind: str) -> Any:
        """As a store's."""
        return self._first("features", kind)

    def adapter(self, kind: str) -> Any:
        """As a store's."""
        return self._first("adapter", kind)

    def sums(self, kind: str) -> Any:
        """As a store's."""
        return self._first("sums", kind)


def captured(work: Path) -> list[str]:
    """The finished indexes, the base first."""
    return [n for n in ("base", *EXTRAS) if (work / f"capture-{n}.json").exists()]


def query_features(work: Path) -> dict[str, Any]:
    """All features of the queries."""
    from safetensors.torch import load_file

    parts = [load_file(str(work / f"index-{n}.queries.safetensors")) for n in captured(work)]
    return {k: v for part in parts for k, v in part.items()}


def score(work: Path, name: str) -> dict[str, Any]:
    """A method on all rows: its scores into a file, its cost."""
    store: Any = Joined(work)
    queries = load_examples(work / "queries.jsonl")
    inputs = Inputs(store, queries, query_features(work))
    spec = VARIANTS.get(name, name)
    method: Any = registry.parse(spec)
    try:
        check_available(name, method, store)
    except UserError:
        return {"spec": spec, "not_run": f"needs {registry.NEEDS[method.needs]}; the demo's adapter has none"}
    return _scored(work, f"scores-{name}", spec, method, lambda: inputs.score(method))


def subset(work: Path, name: str) -> dict[str, Any]:
    """A method on SUBSET_ROWS rows, the planted queries and some weights."""
    from datablame.blocks import select_blocks
    from datablame.methods.base import Operator, Sampled
    from datablame.operators import curvature

    store: Any = Joined(work)
    chosen = subset_rows(store.examples)
    engine, _, rows, queries, _ = engine_of(work, None)
    blocks = select_blocks(engine.loaded.model, SUBSET_BLOCKS)
    asked = [i for i, q in enumerate(queries) if str(q.id) in methods_summary.PLANTED_QUERIES]
    v = query_features(work)

    def of_rows(kind: str) -> dict[str, Any]:
        features = store.features(kind)
        return {b: features[b][chosen] for b in blocks}

    query = {b: v[f"gradients/{b}"][asked] for b in blocks}
    g = of_rows("gradients")
    train: Any = g
    if name == "gauss-newton":
        train = Sampled(g, [of_rows("sampled/0")])
    elif name in ON_SUBSET:
        own = [rows[i] for i in chosen]
        train = Operator(g, curvature(engine.loaded.model, own, blocks, SUBSET_BATCH))
    method: Any = registry.parse(SUBSET[name])
    out: dict[str, Any] = {"rows": chosen, "weights": sum(x.shape[1] for x in g.values())}
    tokens = sum(len(rows[i].input_ids) for i in chosen)
    with passes(engine.loaded.model, tokens, out):
        run = _scored(
            work, f"subset-{name}", SUBSET[name], method, lambda: method.fit(train).score(query).double().numpy()
        )
    lowest = getattr(method, "lowest", None)
    return out | run | ({"lowest_ritz": [float(x) for x in lowest]} if lowest is not None else {})


def unrolled(work: Path, name: str) -> dict[str, Any]:
    """The exact derivative through the whole training, for the queries UNROLLED."""
    from safetensors.torch import load_file

    from datablame.demo import RECIPE

    queries = work / f"{name}-queries.jsonl"
    lines = (work / "queries.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    queries.write_text("".join(x for x in lines if json.loads(x)["id"] in UNROLLED), encoding="utf-8")
    out: dict[str, Any] = {"queries": [str(q.id) for q in load_examples(queries)]}
    with measured(out):
        scores = unroll(MODEL, work / "rows.jsonl", queries, work / name, options=RECIPE)
    np.save(work / f"scores-{name}.npy", next(iter(scores.values.values())))
    file, theirs = "adapter_model.safetensors", (work / "adapter.txt").read_text(encoding="utf-8")
    a, b = load_file(str(work / name / "adapter" / file)), load_file(str(Path(theirs) / file))
    change = sum(float((a[k] - b[k]).square().sum()) for k in b) / sum(float(x.square().sum()) for x in b.values())
    return out | {"peak_memory_gb": peak(), "weights_error": float(f"{change**0.5:.2g}")}


def subset_rows(examples: list[Example]) -> list[int]:
    """A quarter of them each of the two planted kinds, the rest drawn from the others."""
    draw, chosen = random.Random(0), []
    for label in PLANTED:
        chosen += draw.sample([i for i, e in enumerate(examples) if e.label == label], SUBSET_ROWS // 4)
    others = [i for i, e in enumerate(examples) if e.label not in PLANTED]
    return sorted(chosen + draw.sample(others, SUBSET_ROWS // 2))


def _scored(work: Path, file: str, spec: str, method: Any, run: Callable[[], Any]) -> dict[str, Any]:
    out: dict[str, Any] = {"spec": spec, "needs": method.needs}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        with measured(out):
            scores = run()
    np.save(work / f"{file}.npy", scores)
    residual = getattr(method, "residual", {})
    told = {str(w.message) for w in caught if issubclass(w.category, UserWarning)}
    out |= {"peak_memory_gb": peak(), "warnings": sorted(told)}
    return out | ({"residual": max(float(np.median(r.numpy())) for r in residual.values())} if residual else {})


# ---------------------------------------------------------------- all pieces


def pieces() -> list[str]:
    """In this order: the cheap ones first, so that a run that is cut off is of use."""
    served = {m for methods in SERVES.values() for m in methods}
    out = ["capture-base"]
    out += [f"scores-{n}" for n in (*registry.BUILTIN, *VARIANTS) if n not in served and n not in ON_SUBSET]
    for extra, methods in SERVES.items():
        if extra == "daunce":
            out += [f"subset-{n}" for n in SUBSET]
        out += [f"capture-{extra}", *(f"scores-{m}" for m in methods)]
    return [*out, "unrolled-unroll"]


def run_piece(work: Path, piece: str) -> None:
    """In this process: measure, and write its JSON last."""
    kind, _, name = piece.partition("-")
    load = [round(x, 1) for x in os.getloadavg()]
    result = {"capture": capture, "scores": score, "subset": subset, "unrolled": unrolled}[kind](work, name)
    (work / f"{piece}.json").write_text(json.dumps({**result, "load": load}, indent=1), encoding="utf-8")


def summarise(args: argparse.Namespace) -> None:
    """Write the JSON with --json."""
    if args.json:
        methods_summary.write(args.json, args.work, args.rows, pieces(), SERVES, SUBSET_BLOCKS)


def main() -> None:
    """Run the pieces that are missing, each in a process of its own; write the JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("methods-work"), help="where pieces are kept")
    parser.add_argument("--rows", type=int, default=150, help="fewer for a trial: the planted rows, and others")
    parser.add_argument("--adapter", type=Path, default=ADAPTER, help="another training of it, with its checkpoints")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--piece", help=argparse.SUPPRESS)
    args = parser.parse_args()
    quiet_libraries()
    if args.piece:
        run_piece(args.work, args.piece)
        return
    prepare(args.work, args.rows, args.adapter)
    has_state = (args.adapter / "optimizer.pt").exists() or any(args.adapter.glob("checkpoint-*"))
    for piece in pieces():
        if (args.work / f"{piece}.json").exists() or (piece == "capture-moments" and not has_state):
            continue
        start = time.perf_counter()
        command = [sys.executable, __file__, "--work", str(args.work), "--piece", piece]
        subprocess.run(command, check=True)
        print(f"{piece}: {time.perf_counter() - start:.0f} s", flush=True)
        summarise(args)
    summarise(args)


if __name__ == "__main__":
    main()
