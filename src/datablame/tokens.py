"""Which tokens of a training row, and which of the query, carry a score: `datablame trace … --tokens`.

A score that is an inner product with the row's feature is the sum of what the row's positions contribute to it
(methods/linear.py, capture.along). Two things are said of a *position* t, not of a token's own loss:

    gradients       δ_tᵀ U x_t: what position t, where the model has read the tokens up to t, adds to the gradient. δ_t
                    mixes the losses of all later tokens; no loss depends on the last position, which carries 0.
    hidden states   u·h_t over the number of positions that the method takes the mean of; 0 elsewhere.

The token shown is the one that the model reads at t.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from datablame.encoding import Encoded, encode_rows, pieces
from datablame.errors import UserError
from datablame.methods.linear import directions, is_linear

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from datablame.encoding import Encoding
    from datablame.indexing import Reporter
    from datablame.methods import Method
    from datablame.models import Loaded
    from datablame.scores import Scores
    from datablame.store import FeatureStore

GAP = 1e-3
"""Of the sum of absolute contributions; a sum that is further from its score is told."""

TokenList = list[tuple[str, float]]
"""(text, contribution) of every token. A token that ends inside a character has no text; the last one has it all."""


@dataclass(frozen=True)
class TokenScores:
    """One training row and one query under one method: both lists sum to the score."""

    row: TokenList
    query: TokenList


Key = tuple[str, int, int]
"""Method, position of the query, position of the training row."""


def check_linear(methods: Mapping[str, Method], k: int) -> None:
    """Raise UserError when none of the methods has token scores, or k is no number of rows."""
    if isinstance(k, bool) or k < 0:
        raise UserError(f"tokens={k}: how many of each query's highest rows to take apart, from 0.")
    if not any(is_linear(m) for m in methods.values()):
        raise UserError(
            f"--tokens: the scores of {', '.join(methods)} are no sums over tokens. Add graddot, gradcos, exact, "
            "exact-block, datainf, repsim or repsim-base (without aggregate and gauge)."
        )


def token_scores(
    scores: Scores,
    methods: Mapping[str, Method],
    store: FeatureStore,
    captured: Mapping[str, Tensor],
    loaded: Loaded,
    encoder: Encoding,
    k: int,
    reporter: Reporter,
) -> dict[Key, TokenScores]:
    """Token scores of the k highest rows of every query, for every method that `is_linear` says yes to.

    captured: the queries' features, `{"gradients/BLOCK": [m, D]}` and so on. Cost: for each query and method one pass
    over the query and one over each of its k rows, of which only the weights' directions are kept.
    """
    queries = encode_rows(encoder, scores.queries, turns="last")
    chosen = {spec: m for spec, m in methods.items() if is_linear(m)}
    k = min(k, len(scores.train))
    out: dict[Key, TokenScores] = {}
    reporter.start("tokens", len(chosen) * len(queries) * (k + 1), "passes")
    for spec, method in chosen.items():
        kind = method.needs
        features = {b.removeprefix(f"{kind}/"): v for b, v in captured.items() if b.startswith(f"{kind}/")}
        for q, query in enumerate(queries):
            shown = [int(t) for t in scores.order(q, spec)[:k]]
            rows = encode_rows(encoder, [scores.train[t] for t in shown])
            both = directions(method, store.features(kind), {b: v[q : q + 1] for b, v in features.items()}, shown)
            ours = _contributions(loaded, store, kind, query, both.of_query)
            reporter.advance(1)
            for i, (t, row) in enumerate(zip(shown, rows, strict=True)):
                one = {b: u[i : i + 1] for b, u in both.of_row.items()}
                theirs = _contributions(loaded, store, kind, row, one)
                out[spec, q, t] = TokenScores(
                    _listed(encoder.tokenizer, row, theirs[0]), _listed(encoder.tokenizer, query, ours[i])
                )
                reporter.advance(1)
    reporter.end()
    return out


def _contributions(
    loaded: Loaded, store: FeatureStore, kind: str, row: Encoded, directions: Mapping[str, Float[Tensor, "k D"]]
) -> Float[Tensor, "k T"]:
    from datablame.blocks import select_blocks
    from datablame.capture import along, along_hidden

    if kind == "gradients":
        return along(loaded.model, row, select_blocks(loaded.model, store.settings["blocks"]), directions)
    ((name, u),) = directions.items()
    layer, _, which = name.partition(".")
    with loaded.without_adapter() if kind == "base-hidden" else nullcontext():
        return along_hidden(loaded.model, row, int(layer), which, u)


def _listed(tokenizer: PreTrainedTokenizerBase, row: Encoded, values: Float[Tensor, " T"]) -> TokenList:
    return list(zip(pieces(tokenizer, row.input_ids), values.tolist(), strict=True))


def apart_note(methods: Mapping[str, Method]) -> str | None:
    """One sentence on the methods whose scores were not taken apart; None where all were."""
    left = [spec for spec, m in methods.items() if not is_linear(m)]
    return f"Not taken apart by tokens, being no sums over them: {', '.join(left)}." if left else None


def gap_note(scores: Scores) -> str | None:
    """One sentence where token scores do not sum to their score, and by how much; None where all do."""
    worst = 0.0
    for (method, q, t), both in scores.tokens.items():
        score = float(scores.values[method][q, t])
        for tokens in (both.row, both.query):
            size = sum(abs(x) for _, x in tokens)
            worst = max(worst, abs(sum(x for _, x in tokens) - score) / size if size else 0.0)
    if worst <= GAP:
        return None
    return (
        f"Token scores miss their row's score by up to {worst:.1%} of their absolute sum. They come from a pass over "
        "one row, the score from a pass over a batch, and the two round differently with a low precision."
    )
