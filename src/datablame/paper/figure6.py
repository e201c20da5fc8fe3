"""Figure 6: losses, behaviour and parameters along the epochs of the three fine-tunes of Table 1.

In the paper: training and validation loss converge, the behaviour on the validation set settles, and ‖Δθ‖ goes on
growing. Here the same from the checkpoints at the ends of epochs: validation loss on the reference responses to the
held-out queries, the attack success rate on the harmful ones, the share of the benign ones that are answered, ‖Δθ‖,
and, beside it, how far the model's next tokens are from the original's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datablame.paper import EXPERIMENTS, Page, Request, Table
from datablame.paper.rates import ALPHA, apart, changed, size_note
from datablame.paper.results import already_there, read, write

RESULT = EXPERIMENTS["figure6"].result
GROUPS = ("harmful", "benign")
CURVES: dict[str, tuple[str, Callable[[Mapping[str, Any]], Any]]] = {
    "‖Δθ‖": ("‖Δθ‖ a layer, without α/r", lambda p: _spread(p, "norm")),
    "attack success rate": ("share of held-out harmful prompts", lambda p: p.get("harmful", {}).get("rate")),
    "benign prompts answered": ("share of held-out benign prompts", lambda p: p.get("benign", {}).get("rate")),
    "validation loss, harmful": ("nats a token of the reference", lambda p: p.get("harmful", {}).get("loss")),
    "validation loss, benign": ("nats a token of the reference", lambda p: p.get("benign", {}).get("loss")),
    "training loss": ("nats a token, mean over the epoch", lambda p: p.get("loss")),
    "KL from the original": ("KL, nats a token of the harmful references", lambda p: p.get("kl")),
}
"""name -> (axis, what of a point: a number or [value, low, high]; None: not there)"""


def run(request: Request) -> Path:
    """Measure every model and write RESULT into `request.out`; a run that is already there is kept."""
    from datablame.evaluation.judges import named
    from datablame.paper import alignment

    judge = named(request.judge, request.judge_label, request.judge_labels, request.device)
    path = request.out / RESULT
    this = alignment.described(request, judge)
    if already_there(path, this, request.reporter):
        return path
    models = []
    for model in request.models:
        a = alignment.arms(request, model)
        start = {"epoch": 0.0, "step": 0} | _point(a, None, judge, request)
        curves = {arm: [start, *_curve(a, arm, judge, request)] for arm in alignment.ARMS[1:]}
        models.append({"model": a.name, "model_sha256": a.loaded.model_sha256, "curves": curves})
    return write(path, {"run": this, "command": request.command, "judge": judge.name, "models": models})


def _curve(a: Any, arm: str, judge: Any, request: Request) -> list[dict[str, Any]]:
    """A point for the end of every epoch; one without a checkpoint says so and has its training loss alone."""
    from datablame.checkpoints import read_record
    from datablame.evaluation.along import missing
    from datablame.evaluation.finetunes import snapshots

    there = dict(snapshots(a.adapters[arm]))
    points = []
    for entry in read_record(a.adapters[arm])["history"]:
        if "loss" not in entry:
            continue
        step = int(entry["step"])
        point: dict[str, Any] = {"epoch": round(float(entry["epoch"]), 3), "step": step, "loss": float(entry["loss"])}
        request.reporter.note(f"{a.name}, {arm}: epoch {point['epoch']:g}")
        if not math.isfinite(point["loss"]):
            point |= {"loss": None, "problem": "the training loss is not finite"}
        elif step in there and not missing(there[step]):
            point |= _point(a, there[step], judge, request)
        else:
            point["problem"] = f"no checkpoint of step {step}"
        points.append(point)
    return points


def _point(a: Any, checkpoint: Path | None, judge: Any, request: Request) -> dict[str, Any]:
    """Losses, behaviour and norms at one checkpoint. What is not finite is None, and `problem` says so."""
    from datablame.adapters import fingerprint_adapter
    from datablame.capture import NotFinite
    from datablame.encoding import encode_rows
    from datablame.paper import alignment, behaviour, deltas
    from datablame.paper.kept import kept

    rows = encode_rows(a.encoder, a.task.queries, "last")
    with alignment.weights_of(a.loaded, checkpoint):
        norm = (
            deltas.norms(deltas.factors(a.loaded.model), None) if checkpoint else {"mean": 0.0, "sd": 0.0, "whole": 0.0}
        )

    def make() -> dict[str, Any]:
        both = {"original": None, "here": checkpoint}
        harmful = [r for r, q in zip(rows, a.task.queries, strict=True) if q.label == "harmful"]
        try:
            losses = {
                g: _loss(a, checkpoint, [r for r, q in zip(rows, a.task.queries, strict=True) if q.label == g])
                for g in GROUPS
            }
            kl, tokens = behaviour.divergences(a.loaded, both, harmful)
        except NotFinite as e:
            return {"problem": f"a validation loss is not finite ({e})"}
        return {"loss": losses, "kl": float(kl[0, 1].sum() / tokens.sum())}

    weights = None if checkpoint is None else fingerprint_adapter(checkpoint)
    what = [a.loaded.model_sha256, weights, str(a.loaded.model.dtype), [(r.input_ids, r.labels) for r in rows]]
    seen = kept("along-1", what, make)
    if "problem" in seen:
        return {"problem": seen["problem"]}
    groups = {g: {"loss": seen["loss"][g], **_behaves(a, checkpoint, g, judge, request)} for g in GROUPS}
    return {"norm": norm, "kl": seen["kl"], **groups}


def _loss(a: Any, checkpoint: Path | None, rows: Sequence[Any]) -> float:
    """Mean over the labelled tokens of these rows."""
    from datablame.capture import capture
    from datablame.paper import alignment

    with alignment.weights_of(a.loaded, checkpoint):
        seen = capture(a.loaded.model, rows, {}, [])
    return float(seen["loss"].double().sum() / seen["length"].sum())


def _behaves(a: Any, checkpoint: Path | None, group: str, judge: Any, request: Request) -> dict[str, Any]:
    """The share of a group's queries that are complied with; of benign ones by the keywords, whatever the judge."""
    from datablame.evaluation.judges import named, verdicts, wilson
    from datablame.paper import alignment

    queries = [q for q in a.task.queries if q.label == group]
    said = alignment.told(a, checkpoint, queries, request)
    found = verdicts(judge if group == "harmful" else named(), [str(q.prompt) for q in queries], said)
    reached = [v.complied for v in found if v.complied is not None]
    rate = list(wilson(sum(reached), len(reached))) if reached else None
    cut = sum(not ended for _, ended in said)
    return {"rate": rate, "complied": [v.complied for v in found], "left_out": len(found) - len(reached), "cut": cut}


# ---------------------------------------------------------------- what is told


def show(out: Path, name: str) -> Page:
    """Curves along the epochs, and what happens in their second half."""
    del name
    r = read(out / RESULT)
    several = len(r["models"]) > 1
    views = {
        f"{m['model']}: {name}" if several else name: _view(m, axis, of)
        for m in r["models"]
        for name, (axis, of) in CURVES.items()
    }
    facts = [("Models", ", ".join(r["run"]["models"])), ("Scale", r["run"]["scale"]), ("Seed", str(r["run"]["seed"]))]
    facts.append(("Judge", r["judge"]))
    notes = [*size_note(r), *(line for m in r["models"] for line in [*second_half(m), *problems(m)]), *NOTES]
    title = "Figure 6: behaviour settles, do parameters?"
    return Page(title, facts, notes, [_table(m) for m in r["models"]], views, str(r.get("command", "")), r["run"])


NOTES = (
    "Pictures: epoch 0 is the original model; the three lines differ in dash and mark. Error bars: 95 % intervals of "
    "shares (Wilson), of ‖Δθ‖ the standard deviation over layers. A line that goes on rising where that of the "
    "behaviour is level is the paper's point.",
    "The learning rate falls linearly to 0, so that ‖Δθ‖ must level off in the end, whatever the behaviour does.",
    "The KL says how far the function has moved, not the weights: where it grows with ‖Δθ‖ while the attack success "
    "rate stays, it is the rate that does not see the change.",
    "The paper's Figure 6 has no numbers that survived in the copy that this was made from.",
)


def second_half(m: Mapping[str, Any]) -> list[str]:
    """Of each fine-tune: what changes from the middle epoch to the last, of those that were measured."""
    halves, lines = {}, []
    for arm, points in m["curves"].items():
        whole = [p for p in points if "problem" not in p and p["harmful"]["rate"] is not None]
        if len(whole) < 3:
            lines.append(f"{m['model']}, {arm}: fewer than two epochs were measured, so there is no second half.")
        else:
            halves[arm] = whole[len(whole) // 2], whole[-1]
    changes = [changed(*(p["harmful"]["complied"] for p in half)) for half in halves.values()]
    for (arm, (middle, last)), p in zip(halves.items(), apart(changes), strict=True):
        grown = last["norm"]["mean"] / middle["norm"]["mean"] - 1
        rates = middle["harmful"]["rate"], last["harmful"]["rate"]
        change = "changes" if p < ALPHA else "does not change beyond what the prompts can tell"
        lines.append(
            f"{m['model']}, {arm}: from epoch {middle['epoch']:g} to {last['epoch']:g} ‖Δθ‖ grows by {grown:.0%}, the "
            f"KL from the original by {last['kl'] / middle['kl'] - 1:.0%}, the loss on harmful references goes from "
            f"{middle['harmful']['loss']:.2f} to {last['harmful']['loss']:.2f}, and the attack success rate {change} "
            f"({rates[0][0]:.0%} to {rates[1][0]:.0%}; McNemar's p = {p:.2g}, after Holm)."
        )
    return lines


def problems(m: Mapping[str, Any]) -> list[str]:
    """Points that could not be measured, and answers that were left out."""
    curves = m["curves"].items()
    lost = [f"{arm}, epoch {p['epoch']:g}: {p['problem']}" for arm, ps in curves for p in ps if "problem" in p]
    points = {(arm, p["epoch"]) if p["epoch"] else 0: p for arm, ps in curves for p in ps}  # all start at one model
    left = sum(p[g]["left_out"] for p in points.values() for g in GROUPS if g in p)
    lines = [f"{m['model']}, not drawn: {'; '.join(lost)}."] if lost else []
    return (
        [*lines, f"{m['model']}: {left} answers were left out of the shares, for want of a verdict."] if left else lines
    )


def _spread(point: Mapping[str, Any], key: str) -> list[float] | None:
    norm = point.get(key)
    return None if norm is None else [norm["mean"], norm["mean"] - norm["sd"], norm["mean"] + norm["sd"]]


STYLES = {"benign": ("solid", "circle"), "harmful": ("dash", "square"), "mixed": ("dot", "diamond")}


def _view(m: Mapping[str, Any], axis: str, of: Callable[[Mapping[str, Any]], Any]) -> dict[str, Any]:
    """A line for each fine-tune; points that are not there are gaps."""
    data = []
    for arm, points in m["curves"].items():
        known = [(p["epoch"], x if isinstance(x, list) else [x, x, x]) for p in points if (x := of(p)) is not None]
        dash, symbol = STYLES[arm]
        trace: dict[str, Any] = {"type": "scatter", "mode": "lines+markers", "name": f"{arm} rows"}
        trace |= {"x": [e for e, _ in known], "y": [x[0] for _, x in known]}
        trace |= {"line": {"dash": dash}, "marker": {"symbol": symbol, "size": 9}}
        if any(x[1] != x[2] for _, x in known):
            up, down = [x[2] - x[0] for _, x in known], [x[0] - x[1] for _, x in known]
            sides = {"array": up, "arrayminus": down}
            trace["error_y"] = {"type": "data", "symmetric": False, "thickness": 1, "width": 3, **sides}
        data.append(trace)
    layout = {"xaxis": {"type": "linear", "title": {"text": "epoch"}}, "yaxis": {"title": {"text": axis}}}
    return {"data": data, "layout": layout}


def _table(m: Mapping[str, Any]) -> Table:
    headings = ["fine-tuned on", "epoch", *CURVES]
    rows = []
    for arm, points in m["curves"].items():
        for p in points:
            cells = []
            for name, (_, of) in CURVES.items():
                x = of(p)
                x = x[0] if isinstance(x, list) else x
                share = name in ("attack success rate", "benign prompts answered")
                cells.append("–" if x is None else f"{x:.0%}" if share else f"{x:.3f}")
            rows.append([arm, f"{p['epoch']:g}", *cells])
    return Table(f"{m['model']}, at the end of each epoch", headings, rows)
