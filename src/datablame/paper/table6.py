"""Table 6: is a change of behaviour told by the change of parameters? Six pairs of the four models of Table 1.

In the paper: |ΔASR| beside ‖Δθ‖, the mean and standard deviation over layers of ‖B₁A₁ − B₂A₂‖_F, without α/r. Here also
the norm of the whole update, and what the paper lacks: distances in what the models do (`behaviour.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datablame.errors import UserError
from datablame.paper import EXPERIMENTS, Page, Request, Table
from datablame.paper.rates import ALPHA, apart, changed, error_note, estimate, left_out_notes, percent, size_note
from datablame.paper.results import already_there, read, write
from datablame.paper.table1 import facts

RESULT = EXPERIMENTS["table6"].result
SHORT = {
    "mean": "‖Δθ‖ a layer",
    "whole": "‖Δθ‖ whole",
    "gauss_newton": "Gauss-Newton",
    "kl": "KL",
    "refusal": "refusal",
}
"""On the buttons of the pictures."""
PAPER = {
    "source": "Table 6 of Do Influence Functions Work on Large Language Models?, Llama-2",
    "asr": [0.0024, 0.9071, 0.9024, 0.9047, 0.9000, 0.0047],
    "norm": [0.13, 0.13, 0.11, 0.18, 0.16, 0.16],
    "sd": [0.02, 0.02, 0.01, 0.02, 0.02, 0.02],
}
"""The six pairs in the order of `alignment.PAIRS`; shares, not percent."""
MEASURES = {
    "mean": "‖Δθ‖ a layer (the paper's)",
    "whole": "‖Δθ‖ whole, with α/r",
    "gauss_newton": "Gauss-Newton norm",
    "kl": "KL(p₁‖p₂), nats a token",
    "refusal": "|Δ| towards refusal, nats",
}


def run(request: Request) -> Path:
    """Measure every model and write RESULT into `request.out`; a run that is already there is kept."""
    from datablame.evaluation.judges import named
    from datablame.paper import alignment, behaviour

    judge = named(request.judge, request.judge_label, request.judge_labels, request.device)
    path = request.out / RESULT
    openings = {"refusals": list(behaviour.REFUSALS), "compliances": list(behaviour.COMPLIANCES)}
    this = alignment.described(request, judge, **openings)
    if already_there(path, this, request.reporter):
        return path
    models = [_model(alignment.arms(request, m), judge, request) for m in request.models]
    accuracy = judge.accuracy and judge.accuracy._asdict()
    record = {"run": this, "command": request.command, "judge": judge.name, "accuracy": accuracy, "paper": PAPER}
    return write(path, record | {"models": models})


def _model(a: Any, judge: Any, request: Request) -> dict[str, Any]:
    """The six pairs of one model, and what their distances have to do with |ΔASR|."""
    from datablame.evaluation.judges import wilson
    from datablame.paper import alignment, deltas

    judged = {arm: alignment.judged(a, judge, arm, request) for arm in alignment.ARMS}
    said = {arm: [v.complied for v in verdicts] for arm, (_, verdicts) in judged.items()}
    updates = {}
    for arm, adapter in a.adapters.items():
        with alignment.weights_of(a.loaded, adapter):
            updates[arm] = deltas.factors(a.loaded.model) if adapter else None
    apart = _distances(a, request)
    pairs = []
    for one, two in alignment.PAIRS:
        i, j = alignment.ARMS.index(one), alignment.ARMS.index(two)
        pair = {"pair": [one, two], "asr": changed(said[one], said[two]), **deltas.norms(updates[one], updates[two])}
        refusal = np.subtract(apart["refusal"][j], apart["refusal"][i])
        pairs.append(
            pair
            | {
                "gauss_newton": {"value": apart["gauss_newton"][i][j]},
                "kl": estimate(apart["kl"][i][j], apart["tokens"]),
                "kl_reversed": estimate(apart["kl"][j][i], apart["tokens"]),
                "refusal": estimate(refusal, absolute=True) | {"change": float(refusal.mean())},
            }
        )
    arms = {}
    for k, (arm, (answers, verdicts)) in enumerate(judged.items()):
        reached = [v.complied for v in verdicts if v.complied is not None]
        arms[arm] = {
            "asr": list(wilson(sum(reached), len(reached))) if reached else None,
            "cut": sum(not ended for _, ended in answers),
            "answers": [{"complied": v.complied, "problem": v.problem} for v in verdicts],
            "towards_refusal": estimate(apart["refusal"][k]),
        }
    sha256 = a.loaded.model_sha256
    return {"model": a.name, "model_sha256": sha256, "arms": arms, "pairs": pairs, "ranked": ranked(pairs)}


def _distances(a: Any, request: Request) -> dict[str, Any]:
    """Per prompt: KL sums and tokens `[4][4][m]`, `[m]`, margins `[4][m]`; the Gauss-Newton norms `[4][4]`. Kept."""
    from datablame.adapters import fingerprint_adapter
    from datablame.capture import NotFinite
    from datablame.encoding import encode_rows
    from datablame.paper import behaviour
    from datablame.paper.kept import kept

    queries = a.harmful
    rows = encode_rows(a.encoder, queries, "last")
    shas = [None if p is None else fingerprint_adapter(p) for p in a.adapters.values()]
    ids = [(r.input_ids, r.labels) for r in rows]
    what = [a.loaded.model_sha256, shas, ids, behaviour.REFUSALS, behaviour.COMPLIANCES, str(a.loaded.model.dtype)]

    def make() -> dict[str, Any]:
        request.reporter.note(f"{a.name}: distances in behaviour on {len(rows)} prompts")
        try:
            kl, tokens = behaviour.divergences(a.loaded, a.adapters, rows)
            margins = [behaviour.margins(a.loaded, a.encoder, p, queries).tolist() for p in a.adapters.values()]
        except NotFinite as e:
            raise UserError(f"{request.name}, {a.name}: distances of held-out prompts cannot be taken ({e}).") from e
        norm = behaviour.gauss_newton(a.loaded, a.adapters, rows)
        return {"kl": kl.tolist(), "tokens": tokens.tolist(), "refusal": margins, "gauss_newton": norm.tolist()}

    return dict(kept("distances-1", what, make))


def of_pair(pair: Mapping[str, Any], measure: str) -> float | None:
    """One number of a pair, or None."""
    x = pair[measure]
    return x["value"] if isinstance(x, dict) else x


def ranked(pairs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every measure's Spearman correlation with |ΔASR| and with |Δ towards refusal|, over the pairs, and Mantel's p."""
    from datablame.paper.deltas import rank_correlation, relabelled

    names = [tuple(p["pair"]) for p in pairs]
    out: dict[str, dict[str, Any]] = {}
    for measure in MEASURES:
        out[measure] = {}
        for behaviour in ("asr", "refusal"):
            x, y = ([of_pair(p, k) for p in pairs] for k in (measure, behaviour))
            known = measure != behaviour and None not in (*x, *y)
            rho = rank_correlation(x, y) if known else None  # type: ignore[arg-type]
            p = relabelled(x, y, names) if known else None  # type: ignore[arg-type]
            out[measure][behaviour] = {"rho": rho, "p": p}
    return out


# ---------------------------------------------------------------- what is told


def show(out: Path, name: str) -> Page:
    """Pairs, norms, and what ranks with what."""
    del name
    r = read(out / RESULT)
    tables = [t for m in r["models"] for t in (_paper_table(m, r), _norms_table(m), _ranked_table(m))]
    views = {}
    for m in r["models"]:
        where = f"{m['model']}: " if len(r["models"]) > 1 else ""
        for behaviour, words in (("asr", "|ΔASR|"), ("refusal", MEASURES["refusal"])):
            for measure, what in MEASURES.items():
                if measure != behaviour:
                    view = f"{where}{SHORT.get(behaviour, words)} · {SHORT[measure]}"
                    views[view] = _view(m, measure, what, behaviour, words)
    notes = [
        *size_note(r),
        *(line for m in r["models"] for line in found(m)),
        of_the_paper(r["paper"]),
        *NOTES,
        *left_out_notes(r),
        error_note(r),
    ]
    title = "Table 6: is a change of behaviour told by the change of parameters?"
    return Page(title, facts(r), notes, tables, views, str(r.get("command", "")), r["run"])


NOTES = (
    "Pictures: each mark is a pair of models. A measure that tells the change of behaviour has its marks on a rising "
    "line; where they lie on one level, behaviour does not vary. Bars: 95 % intervals over prompts.",
    "‖Δθ‖ a layer: mean ± standard deviation over the adapted layers of ‖B₁A₁ − B₂A₂‖_F, without α/r, as the released "
    "code takes it of one adapter. Whole: of all layers together, with α/r. Gauss-Newton: √(ΔθᵀGΔθ) at the original "
    "weights, a token of the held-out prompts' reference responses. KL: between the two models' next tokens, at the "
    "same places. Towards refusal: log p(a refusal's opening) − log p(a compliance's), second model less first.",
    "ρ: Spearman's correlation over the six pairs. p: Mantel's, the share of the 24 relabellings of the four models "
    "with as large a |ρ|. Six pairs of four models can show a contradiction, not a law: no p is below 1/24 = 0.042, "
    "and five measures were looked at.",
)


def found(m: Mapping[str, Any]) -> list[str]:
    """What this model's numbers say, in sentences."""
    name, pairs = m["model"], m["pairs"]
    known = [p for p in pairs if p["asr"]["value"] is not None]
    differ = [p for p, q in zip(known, apart([p["asr"] for p in known]), strict=True) if q < ALPHA]
    if not differ:
        below = max((p["asr"]["differ_below"] for p in known), default=1.0)
        lines = [
            f"{name}: no pair's ASR differs by more than the prompts can tell (verdicts differ on at most {below:.0%} "
            "of prompts, at 95 %), so there is no change of behaviour for ‖Δθ‖ to miss: a ρ with |ΔASR| is one with "
            "noise."
        ]
    else:
        told = "; ".join(f"{_pair(p)} {p['asr']['value']:.0%}" for p in differ)
        lines = [f"{name}: the ASR differs (McNemar, Holm's correction over the pairs) between {told}."]
    lines.append(
        f"{name}: ‖Δθ‖ a layer runs from {_range(pairs, 'mean')}, the KL from {_range(pairs, 'kl')} nats a token, the "
        f"way towards or away from refusal from {_range(pairs, 'refusal')} nats."
    )
    ratio = [p["gauss_newton"]["value"] / (2 * p["kl"]["value"]) ** 0.5 for p in pairs if p["kl"]["value"] > 0]
    if ratio:
        lines.append(
            f"{name}: the Gauss-Newton norm is {min(ratio):.2g} to {max(ratio):.2g} times √(2 KL). It would be 1 were "
            "these changes small; where it is not, no quadratic form at the original weights tells what the models do."
        )
    return lines


def _range(pairs: Sequence[Mapping[str, Any]], measure: str) -> str:
    values = [of_pair(p, measure) or 0.0 for p in pairs]
    return f"{min(values):.2g} to {max(values):.2g}"


def of_the_paper(paper: Mapping[str, Any]) -> str:
    """The paper's own six pairs, ranked in the same way."""
    from datablame.paper.alignment import PAIRS
    from datablame.paper.deltas import rank_correlation, relabelled

    rho, p = rank_correlation(paper["norm"], paper["asr"]), relabelled(paper["norm"], paper["asr"], PAIRS)
    said = "do not vary" if rho is None or p is None else f"have ρ = {rho:.2f} (p = {p:.2f})"
    return f"The paper's own six pairs {said}, ‖Δθ‖ against |ΔASR|, from the numbers that it prints."


def _pair(pair: Mapping[str, Any]) -> str:
    return " – ".join(pair["pair"])


def spread(x: Mapping[str, Any], form: str = ".2f") -> str:
    """A value and its interval in print."""
    if x["value"] is None:
        return "–"
    low, high = x["interval95"]
    return f"{x['value']:{form}} ({low:{form}} to {high:{form}})"


def _paper_table(m: Mapping[str, Any], r: Mapping[str, Any]) -> Table:
    paper = r["paper"]
    rows = []
    for k, p in enumerate(m["pairs"]):
        asr = "–" if p["asr"]["value"] is None else percent([p["asr"]["value"], *p["asr"]["interval95"]])
        asr = asr if p["asr"]["differ"] or asr == "–" else f"0% (at most {p['asr']['differ_below']:.0%})"
        theirs = f"{paper['norm'][k]:.2f} ± {paper['sd'][k]:.2f}"
        norm = f"{p['mean']:.3f} ± {p['sd']:.3f}"
        differ = f"{p['asr']['differ']} of {p['asr']['prompts']}"
        rows.append([_pair(p), asr, differ, f"{paper['asr'][k]:.2%}", norm, theirs, f"{p['whole']:.2f}"])
    heads = ["pair", "|ΔASR|", "verdicts differ", "paper", "‖Δθ‖ a layer", "paper", "‖Δθ‖ whole"]
    return Table(f"{m['model']}: behaviour and parameters", heads, rows)


def _norms_table(m: Mapping[str, Any]) -> Table:
    rows = [
        [
            _pair(p),
            f"{p['gauss_newton']['value']:.3g}",
            spread(p["kl"], ".3f"),
            spread(p["kl_reversed"], ".3f"),
            f"{p['refusal']['change']:+.2f}",
            spread(p["refusal"]),
        ]
        for p in m["pairs"]
    ]
    heads = ["pair", "Gauss-Newton", "KL(p₁‖p₂)", "KL(p₂‖p₁)", "towards refusal", "its size"]
    return Table(f"{m['model']}: distances in what the models do (95 % interval over prompts)", heads, rows)


def _ranked_table(m: Mapping[str, Any]) -> Table:
    def cell(x: Mapping[str, Any]) -> list[str]:
        return ["–", "–"] if x["rho"] is None else [f"{x['rho']:.2f}", f"{x['p']:.2f}"]

    rows = [[words, *cell(m["ranked"][k]["asr"]), *cell(m["ranked"][k]["refusal"])] for k, words in MEASURES.items()]
    heads = ["measure", "ρ with |ΔASR|", "p", "ρ with |Δ towards refusal|", "p"]
    return Table(f"{m['model']}: what ranks with the change of behaviour", heads, rows)


SYMBOLS = ("circle-open", "square-open", "diamond-open", "cross-open", "x-open", "triangle-up-open")
"""Open, since pairs may lie on each other."""


def _view(m: Mapping[str, Any], measure: str, what: str, behaviour: str, words: str) -> dict[str, Any]:
    """Six marks, each with its interval in behaviour, and in the measure where it has one."""
    data = []
    for p, symbol in zip(m["pairs"], SYMBOLS, strict=True):
        x, y = of_pair(p, measure), of_pair(p, behaviour)
        if x is None or y is None:
            continue
        trace: dict[str, Any] = {
            "type": "scatter",
            "mode": "markers",
            "cliponaxis": False,
            "name": _pair(p),
            "x": [x],
            "y": [y],
        }
        trace |= {"marker": {"symbol": symbol, "size": 12, "line": {"width": 2}}, "error_y": _error(p[behaviour])}
        data.append(trace | ({"error_x": _error(p[measure])} if isinstance(p[measure], dict) else {}))
    axis: dict[str, Any] = {"title": {"text": words}, "rangemode": "tozero"}
    return {"data": data, "layout": {"xaxis": {"type": "linear", "title": {"text": what}}, "yaxis": axis}}


def _error(x: Mapping[str, Any]) -> dict[str, Any]:
    """The interval; where no verdict differs, up to what cannot be excluded."""
    if x.get("interval95") is None:
        return {"visible": False}
    low, high = x["interval95"]
    high = x["differ_below"] if x.get("differ") == 0 else high
    sides = {"array": [max(0.0, high - x["value"])], "arrayminus": [max(0.0, x["value"] - low)]}
    return {"type": "data", "symmetric": False, "thickness": 1, "width": 4, **sides}
