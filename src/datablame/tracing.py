"""An index and queries to scores: `datablame trace`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datablame import contrast
from datablame import methods as registry
from datablame.checkpoints import directory
from datablame.encoding import Encoding, EncodingOptions, encode_rows, truncation_note
from datablame.errors import UserError
from datablame.examples import Columns, Example, check_text, from_prompt, load_examples
from datablame.extras import Source, serving
from datablame.extras import parse as parse_extra
from datablame.indexing import SILENT, CaptureOptions, Engine, Forecast, Reporter, check_memory, digest
from datablame.methods import Method, Text
from datablame.methods.base import Adam, Checkpoint, Operator
from datablame.methods.gauge import Balanced
from datablame.models import Loaded, ModelSpec, answer, load
from datablame.scores import SAME_ANSWER, Scores
from datablame.store import FeatureStore
from datablame.tokens import apart_note, check_linear, gap_note, token_scores

if TYPE_CHECKING:
    from torch import Tensor

    from datablame.operators import Product

DEFAULT_METHODS = ("gradcos", "graddot", "repsim", "repsim-base", "bm25")
CONTROLS = ("bm25", "gradnorm", "repsim-base")
"""The diagnostics compare every method with these."""


def trace(
    index: FeatureStore | str | Path,
    query: str | Path | None = None,
    *,
    prompt: str | None = None,
    response: str | None = None,
    against: str | None = None,
    methods: Sequence[str] | None = None,
    model: str | None = None,
    adapter: str | None = None,
    device: str | None = None,
    columns: Columns | None = None,
    max_new_tokens: int = 128,
    tokens: int = 0,
    reporter: Reporter = SILENT,
) -> Scores:
    """Score every training row of `index` for every query.

    query: a file of queries with their responses · prompt: one question; without `response` the model answers
    first (greedy) and its own answer is traced · against: another answer, to trace this one *rather than* that
    one (in a file: a column `against`) · methods: spellings such as `repsim:layer=15,text=prompt` ·
    model, adapter: where they are now, if they moved since the index was made (their content must be the same) ·
    tokens: so many of each query's highest rows are taken apart by tokens, see tokens.py.

    Raises UserError for an unknown method, a query without a response, or a model that is not the index's.
    """
    if (query is None) == (prompt is None):
        raise UserError("give either a file of queries (--query) or one question (--prompt).")
    if response is not None and prompt is None:
        raise UserError("--response goes with --prompt; a --query file holds its own responses.")
    if against is not None and (prompt is None or not against.strip()):
        raise UserError("--against is another answer to --prompt; a --query file holds its own in a column `against`.")
    check_text("--prompt, --response or --against", {"prompt": prompt, "response": response, "against": against})
    store = index if isinstance(index, FeatureStore) else FeatureStore.open(index)
    queries = [from_prompt(str(prompt), response, 0, against)] if query is None else load_examples(query, columns)
    chosen = _chosen(store, methods, any(q.against for q in queries))
    if tokens:
        check_linear(chosen, tokens)
        if any(q.against for q in queries):
            raise UserError("--tokens takes one answer apart, not the difference of two; leave out --against.")
    loaded = load_for(store, model, adapter, device)
    encoder = encoder_of(store, loaded)
    notes: list[str] = []
    if prompt is not None and response is None:
        queries = [_answered(queries[0], encoder, loaded, max_new_tokens, notes)]
    needs, that = [m.needs for m in chosen.values()], contrast.others(queries)
    captured = capture_queries(store, loaded, encoder, queries, reporter, needs)
    captured_that = None if that is None else capture_queries(store, loaded, encoder, that, reporter, needs)
    inputs = Inputs(
        store, queries, captured, captured_that, lambda m: product_of(store, loaded, encoder, m, len(queries), reporter)
    )
    values = {spec: _scored(spec, method, inputs, notes, reporter) for spec, method in chosen.items()}
    names = [c for c in available(store, CONTROLS) if that is None or not contrast.why_not(registry.create(c))]
    notes += [contrast.note(queries)] if that is not None else []
    controls = {c: values[c] if c in values else inputs.score(registry.create(c)) for c in names}
    norms = controls["gradnorm"][0] if "gradnorm" in controls else None
    scores = Scores(values, queries, store.examples, store.settings, notes, controls, norms)
    if tokens:
        found = token_scores(scores, chosen, store, captured, loaded, encoder, tokens, reporter)
        scores = replace(scores, tokens=found)
        notes += filter(None, [apart_note(chosen), gap_note(scores)])
    return scores


UNSOLVED = 0.1
"""A residual above it is told: the scores are not those of the solution."""


def _scored(spec: str, method: Method, inputs: Inputs, notes: list[str], reporter: Reporter) -> np.ndarray[Any, Any]:
    """`[m, n]`; what the method warns of, and a residual that is left, become notes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            scores = inputs.score(method)
        finally:
            reporter.end()
    notes += [note for note in told(caught) if note not in notes]
    # LiSSA's residual counts the part of the query that no training row meets, and says nothing of the scores.
    for left in getattr(method, "residual", {}).values() if method.needs == "operator" else ():
        if (residual := float(np.median(left.numpy()))) > UNSOLVED:
            more = "More steps or more damping bring" if hasattr(method, "steps") else "More damping brings"
            notes.append(
                f"{spec}: its equation is left with a residual of {residual:.2g} (median over queries), so that these "
                f"are not the scores of its solution. {more} it down."
            )
    return scores


def told(caught: Sequence[warnings.WarningMessage]) -> list[str]:
    """The sentences of our own warnings, each once; others are warned of again."""
    for w in caught:
        if not issubclass(w.category, UserWarning):
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
    return list(dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning)))


def _chosen(store: FeatureStore, methods: Sequence[str] | None, contrasted: bool) -> dict[str, Method]:
    """`{spelling: method}`; without `methods` the default ones that this index and these queries can have."""
    chosen = {spec: registry.parse(spec) for spec in methods or available(store, DEFAULT_METHODS)}
    if contrasted and not methods:
        chosen = {spec: method for spec, method in chosen.items() if not contrast.why_not(method)}
        chosen = chosen or {"concept": registry.create("concept")}
    for spec, method in chosen.items():
        check_available(spec, method, store)
        if contrasted:
            contrast.check(spec, method)
    return chosen


def _answered(query: Example, encoder: Encoding, loaded: Loaded, limit: int, notes: list[str]) -> Example:
    """The query with the model's own greedy answer; notes say what the base model answers."""
    ids = encoder.prompt_ids(query)
    text, ended = answer(loaded, ids, limit)
    if not text.strip():
        raise UserError(
            "the model's own answer to this prompt is empty, so there is nothing to trace. Give --response."
        )
    if not ended:
        notes.append(
            f"The model's answer was cut after {limit} tokens and is traced as if it ended there: --max-new-tokens."
        )
    if loaded.adapter_sha256:
        with loaded.without_adapter():
            base, _ = answer(loaded, ids, limit)
        if base.strip() == text.strip():
            notes.append(f"{SAME_ANSWER}: then no training row made it, and a ranking explains nothing.")
        else:
            notes.append(f"Without the adapter the base model answers: “{base.strip()}”")
    return query.with_response(text)


def load_for(store: FeatureStore, model: str | None, adapter: str | None, device: str | None) -> Loaded:
    """The model that made the index, refused with the reason when its content has changed."""
    s = store.settings
    dtype = s["dtype"]
    loaded = load(ModelSpec(str(model or s["model"]), adapter or s["adapter"], device, dtype))
    for what, now in (("model", loaded.model_sha256), ("adapter", loaded.adapter_sha256)):
        if now != s[f"{what}_sha256"]:
            raise UserError(
                f"{store.path}: made with another {what} than {getattr(loaded.spec, what)!r} "
                f"(sha256 {str(s[f'{what}_sha256'])[:12]} there, {str(now)[:12]} here). "
                f"Index again, or point --{what} to it."
            )
    return loaded


def encoder_of(store: FeatureStore, loaded: Loaded) -> Encoding:
    """The encoding that the index was made with, on the tokenizer of the loaded model."""
    s = store.settings["encoding"]
    options = EncodingOptions(s["template"], s["system"], s["loss_on"], s["max_length"], s["pad_to"])
    encoder = Encoding(loaded.tokenizer, options, loaded.max_length)
    differ = [k for k, v in encoder.settings().items() if v != s[k]]
    if differ:
        raise UserError(f"{store.path}: made with another {differ[0].removesuffix('_sha256')}. Index again.")
    return encoder


def capture_queries(
    store: FeatureStore,
    loaded: Loaded,
    encoder: Encoding,
    queries: list[Example],
    reporter: Reporter,
    needs: Iterable[str] = (),
) -> dict[str, Tensor]:
    """Features of the queries, with the index's own blocks and layers; its checkpoints and extras as `needs` asks."""
    s, needs = store.settings, set(needs)
    checkpoints = any(n.startswith("checkpoints") for n in needs)
    extras = [e for e in s["extras"] if (x := parse_extra(e)).on_queries and x.kind in needs]
    steps = ",".join(str(c["step"]) for c in s["checkpoints"]) if checkpoints else None
    if checkpoints:
        _check_checkpoints(store, str(loaded.spec.adapter))
    engine = Engine(loaded, CaptureOptions(s["blocks"], s["layers"], s["batch_tokens"], steps, ",".join(extras)))
    if checkpoints and [c.settings() for c in engine.checkpoints] != s["checkpoints"]:
        raise UserError(f"{store.path}: made with other checkpoints than those of {loaded.spec.adapter}. Index again.")
    rows = encode_rows(encoder, queries, turns="last")
    if note := truncation_note(queries, rows):
        reporter.note(note)
    tokens = sum(len(r.input_ids) for r in rows)
    forecast = Forecast(len(rows), tokens, 0, engine.memory_bytes(rows) + len(rows) * engine.row_bytes)
    check_memory(forecast.memory_bytes, engine)
    forecast = replace(forecast, seconds=engine.seconds_per_token(rows, queries) * tokens)
    reporter.forecast(forecast)
    reporter.start("trace", tokens)
    captured = engine.capture(rows, queries, reporter, kept=store.adapter)
    reporter.end()
    return captured


def product_of(
    store: FeatureStore,
    loaded: Loaded,
    encoder: Encoding,
    method: Method,
    m: int,
    reporter: Reporter = SILENT,
) -> Product:
    """Curvature products over the index's training rows, for its gradient blocks in their order.

    The reporter is told of those that `method` takes for m queries, where the method tells how many (`calls(m)`).
    """
    from datablame.blocks import select_blocks
    from datablame.operators import counted, curvature

    rows = encode_rows(encoder, store.examples)
    if digest(store.examples, rows) != store.settings["train_sha256"]:
        raise UserError(f"{store.path}: its rows are encoded in another way now. Index again.")
    blocks = select_blocks(loaded.model, store.settings["blocks"])
    chosen = {name: blocks[name] for name in store.features("gradients")}
    product = curvature(loaded.model, rows, chosen, store.settings["batch_tokens"])
    many = getattr(method, "calls", None)
    return counted(product, type(method).__name__.lower(), many(m), reporter) if many else product


def _check_checkpoints(store: FeatureStore, adapter: str) -> None:
    """Raise UserError when a checkpoint that the index was made with is gone."""
    gone = [c["step"] for c in store.settings["checkpoints"] if not directory(adapter, c["step"]).is_dir()]
    if gone:
        raise UserError(
            f"{directory(adapter, gone[0])}: no such checkpoint, and the queries' gradients are needed there too. "
            "Bring it back, point --adapter to where it is, or name other methods than those on checkpoints."
        )


# ---------------------------------------------------------------- methods and what they need


def _has(store: FeatureStore, need: str) -> bool:
    need, balanced = need.removesuffix("-balanced"), need.endswith("-balanced")
    if balanced and not store.adapter("weights"):
        return False
    if need == "operator":
        return _has(store, "gradients")
    if need == "adam":
        return bool(store.settings["optimizer"]) and _has(store, "gradients")
    return need == "texts" or serving(need, store.settings["extras"]) is not None or len(store.features(need)) > 0


def available(store: FeatureStore, names: Sequence[str]) -> list[str]:
    """Those of `names` whose input this index holds."""
    return [n for n in names if _has(store, registry.create(n).needs)]


def check_available(spec: str, method: Method, store: FeatureStore) -> None:
    """Raise UserError when the index does not hold what `method` needs."""
    if not _has(store, method.needs):
        have = ", ".join(available(store, registry.names()))
        raise UserError(
            f"{spec} needs {registry.NEEDS[method.needs]}, which this index does not hold. It can run: {have}."
        )


class Inputs:
    """Hands every method the kind of input it needs, for training rows and queries.

    against: features of the outputs that those of the queries are contrasted with.
    """

    def __init__(
        self,
        store: FeatureStore,
        queries: Sequence[Example],
        captured: Mapping[str, Tensor],
        against: Mapping[str, Tensor] | None = None,
        product: Callable[[Method], Product] | None = None,
    ) -> None:
        """against: features of the other answers · product: makes a method's curvature products of the live model,
        where there is one; see operators.py."""
        self.store, self.queries, self.captured, self.product = store, queries, captured, product
        self.sides: list[Inputs] = []
        if against is not None:
            self.sides = [Inputs(store, queries, side) for side in (captured, against)]
            self.captured = contrast.difference(captured, against)

    def of_train(self, kind: str) -> Mapping[str, Tensor]:
        """Features of the training rows."""
        return self.store.features(kind)

    def of_queries(self, kind: str) -> Mapping[str, Tensor]:
        """Features of the queries."""
        mine = {k: v for k, v in self.captured.items() if k == kind or k.startswith(f"{kind}/")}
        return {k.removeprefix(f"{kind}/"): v for k, v in mine.items()}

    def score(self, method: Method) -> np.ndarray[Any, Any]:
        """Fit on the training rows, score the queries: `[m, n]` in float64."""
        fitted: Any = method.fit(self._train(method))
        if self.sides and hasattr(fitted, "score_against"):
            return fitted.score_against(*(side._query(method.needs) for side in self.sides)).double().numpy()
        return fitted.score(self._query(method.needs)).double().numpy()

    def sweep(self, method: Any, dampings: Sequence[float]) -> dict[float, np.ndarray[Any, Any]]:
        """As `score`, for a method with damping: `{damping: [m, n]}` from one factorisation."""
        swept = method.fit(self._train(method)).sweep(self._query(method.needs), dampings)
        return {damping: scores.double().numpy() for damping, scores in swept.items()}

    def _train(self, method: Method) -> Any:
        need = method.needs
        if need == "texts":
            return _texts(self.store.examples)
        if need == "adam":
            optimizer = self.store.settings["optimizer"]
            shapes = {b: (w.shape[0], w.shape[1]) for b, w in self.store.adapter("weights").items()}
            return Adam(self.of_train("gradients"), self.store.adapter("adam"), optimizer["eps"], shapes)
        if need == "operator":
            if self.product is None:
                raise UserError("products with a curvature matrix need the model; use datablame trace or compare.")
            return Operator(self.of_train("gradients"), self.product(method))
        if extra := serving(need, self.store.settings["extras"]):
            return extra.of_train(self._source(extra.kind, self.of_train))
        return self._features(need, self.of_train)

    def _query(self, need: str) -> Any:
        if need == "texts":
            return _texts(self.queries)
        if extra := serving(need, self.store.settings["extras"]):
            return extra.of_queries(self._source(extra.kind, self.of_queries))
        return self._features("gradients" if need in ("adam", "operator") else need, self.of_queries)

    def _source(self, kind: str, features: Callable[[str], Mapping[str, Tensor]]) -> Source:
        return Source(features, lambda: self.store.adapter(f"extras/{kind}"), lambda: self.store.sums(kind))

    def _features(self, need: str, features: Callable[[str], Mapping[str, Tensor]]) -> Any:
        """One kind of features; at the checkpoints, and in the balanced gauge."""
        kind, balanced = need.removesuffix("-balanced"), need.endswith("-balanced")

        def turned(kind: str, weights: str) -> Mapping[str, Tensor]:
            return Balanced(features(kind), self.store.adapter(weights)) if balanced else features(kind)

        if kind != "checkpoints":
            return turned(kind, "weights")
        found = self.store.settings["checkpoints"]
        at = [f"checkpoints/{c['step']}" for c in found]
        return [Checkpoint(c["rate"], turned(f, f"{f}/weights")) for c, f in zip(found, at, strict=True)]


def _texts(examples: Sequence[Example]) -> list[Text]:
    return [Text(e.prompt, e.response) for e in examples]
