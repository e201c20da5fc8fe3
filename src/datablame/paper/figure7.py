"""Figure 7: does the change of the parameters go with the change of behaviour, and less so in larger models?

What the paper says (its section 4.3): four models of two linear layers on MNIST, "with their weights initialized to
zero"; the curves of ‖Δθ‖ ("normalized for better visualization") and of the test accuracy along training; "a high
correlation coefficient" for the smaller models, missing for the larger ones, which converge more quickly. It does not
say the widths, the optimizer, its rate, the batches, the number of steps, which coefficient, over which points of the
training, how often, or by what ‖Δθ‖ was divided; its numbers are in a picture only.

With everything at zero nothing can be learnt: see `twolayer.py`. So one layer starts random, and Δθ is taken from the
initial point.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datablame.paper import EXPERIMENTS, Page, Request, Table
from datablame.paper.panels import Style, Trace, View, curve, panels, share
from datablame.paper.results import already_there, interval, read, write

if TYPE_CHECKING:
    from datablame.paper.correlation import Fall
    from datablame.paper.twolayer import Data, Plan

RESULT = EXPERIMENTS["figure7"].result
HIGH = 0.8
"""What counts as a high correlation here; the paper has no number."""
PAPER = {
    "source": "Figure 7 and section 4.3 of Do Influence Functions Work on Large Language Models?",
    "claim": "a high correlation coefficient for smaller models, missing for larger ones, which converge sooner",
    "numbers": "in a picture only; none is in its text",
}


def run(request: Request) -> Path:
    """Train and measure at `request.scale`, write RESULT; finished trainings are kept in the cache."""
    from datablame.models import cache_dir
    from datablame.paper import mnist, twolayer

    images = mnist.load(request.mnist)
    plan = plans(request.seed)[request.scale]
    path = request.out / RESULT
    this = {"scale": request.scale, "seed": request.seed, "data_sha256": images.sha256, "protocol": protocol(plan)}
    if already_there(path, this, request.reporter):
        return path
    data = twolayer.data(images, plan)
    found = measure(data, plan, cache_dir() / "figure7", request.reporter.note)
    record = {"run": this, "command": request.command, "data": images.name, "paper": PAPER, **found}
    return write(path, record)


def plans(seed: int) -> dict[str, Plan]:
    """By scale."""
    from datablame.paper.twolayer import Plan, Setting

    settings = (
        Setting("SGD, first layer random", "first"),
        Setting("SGD, second layer random", "second"),
        Setting("Adam, first layer random", "first", "adam", 1e-3),
        Setting("SGD, biases random", "biases"),
    )
    widths = (4, 25, 160, 1000)
    return {
        "smoke": Plan(settings[:1], widths, seed, seeds=2, rows=10_000, points=15),
        "cpu": Plan(settings, widths, seed),
    }


def protocol(plan: Plan) -> dict[str, Any]:
    """Every choice of the measurement, for the file."""
    from datablame.paper import correlation, twolayer

    return {
        "model": "images → width → classes, no activation, biases in both layers, softmax cross-entropy; float32",
        "inputs": "pixels from 0 to 1",
        "starts": {k: twolayer.STARTS[k] for k in ("zero", *dict.fromkeys(s.start for s in plan.settings))},
        "random": "uniform within ±1/√inputs of the layer, PyTorch's default; another draw and order for each seed",
        "settings": [asdict(s) for s in plan.settings],
        "widths": list(plan.widths),
        "seeds": [plan.seed + k for k in range(plan.seeds)],
        "rows": plan.rows,
        "epochs": plan.epochs,
        "batch": plan.batch,
        "steps": plan.steps,
        "schedule": "a constant rate, no momentum, no weight decay",
        "points": plan.points,
        "spacings": "log: from step 1 to the last; even: from the first of `points` equal parts; without step 0",
        "parts": "whole: the same steps for all; matched: up to the first step at the level that all trainings reach",
        "changes": "parameters: ‖Δθ‖ (Frobenius, with biases); logits: rms of their centred change; kl: KL(p_t ‖ p_0)",
        "fewest": correlation.FEWEST,
        "intervals": "mean over seeds, 95 % by Student's t; undefined coefficients and stopped trainings are left out",
        "control": "the same coefficients with the change of the function in place of the parameters'",
    }


def measure(data: Data, plan: Plan, folder: Path, note: Any) -> dict[str, Any]:
    """The saddle, and every setting's trainings; those that are in `folder` already are not run again."""
    from datablame.paper import correlation, twolayer

    zero = twolayer.Setting("zero", "zero")
    at_zero = {w: twolayer.kept(data, plan, zero, w, plan.seed, folder, note) for w in plan.widths}
    settings = []
    for setting in plan.settings:
        seeds = range(plan.seed, plan.seed + plan.seeds)
        runs = {w: {i: twolayer.kept(data, plan, setting, w, i, folder, note) for i in seeds} for w in plan.widths}
        settings.append(correlation.summary(setting, plan, runs))
    return {"saddle": correlation.saddle(at_zero, frequent(data)), "settings": settings}


def frequent(data: Data) -> tuple[int, float]:
    """The training rows' most frequent class, and the accuracy of always answering it."""
    label = int(data.train[1].bincount().argmax())
    return label, float((data.test[1] == label).double().mean())


# ---------------------------------------------------------------- what is told

PART_NAMES = {"whole": "same steps", "matched": "up to the same accuracy"}
SPACING_NAMES = {"log": "log-spaced", "even": "evenly spaced"}
KIND_NAMES = {"pearson": "Pearson", "spearman": "Spearman"}
WAYS = [(spacing, kind) for spacing in SPACING_NAMES for kind in KIND_NAMES]
"""Of taking one correlation."""


def show(out: Path, name: str) -> Page:
    """Verdicts from the numbers, coefficients by width with those of the function beside them, and the curves."""
    r = read(out / RESULT)
    p = r["run"]["protocol"]
    views, apart = {"correlations": correlations_view(r)}, told_apart(r)
    for s in (s for s in r["settings"] if any(w["curves"] for w in s["widths"])):
        views |= {f"{s['name']}, {words}": curves_view(s, spacing) for spacing, words in SPACING_NAMES.items()}
    return Page(
        "Figure 7: does the change of parameters go with the change of behaviour?",
        [
            ("Data", f"{r['data']}, {p['rows']:,} rows"),
            ("Scale", r["run"]["scale"]),
            ("Seeds", str(len(p["seeds"]))),
            ("Training", f"{p['epochs']} epochs in batches of {p['batch']}: {p['steps']:,} steps"),
            ("Machine", str(r["machine"])),
            ("Threads", str(r["threads"])),
        ],
        [*(verdict(s, apart) for s in r["settings"]), *stops(r), *NOTES],
        tables(r),
        views,
        str(r.get("command", "")),
        r["run"],
    )


NOTES = (
    "The curves: test accuracy, and the changes of parameters and of logits since the start, each over its own largest "
    "value in its training (how the paper normalised is not said; no coefficient depends on it). Bars: 95 % intervals "
    "over seeds. What to see: in the wide models the accuracy is flat while both changes still grow.",
    "The correlations: flat lines mean that width does not matter; lines of ‖Δθ‖ and of logits that fall together mean "
    "that what falls is not a matter of parameters against behaviour.",
    "Coefficients: means over seeds ± half of the 95 % interval, over points of the whole training, or up to where it "
    "first reaches the accuracy that all reach. fall: the narrowest's minus the widest's, by seed; logits, KL: that "
    "fall with the change of the function in place of ‖Δθ‖; beyond: how much more ‖Δθ‖'s falls than the logits'. *: "
    "significant at 5 % by Student's t over seeds, after Holm's correction over all falls of the same change in all "
    "settings, parts and ways; the verdicts count only those.",
    f"The paper: {PAPER['claim']}; its numbers are {PAPER['numbers']}. High is {HIGH} or more here, our choice.",
)


def tables(r: dict[str, Any]) -> list[Table]:
    """Of the page, and of the documentation."""
    apart = told_apart(r)
    of = [[reached_table(s), *(coefficients_table(s, part, apart) for part in PART_NAMES)] for s in r["settings"]]
    return [saddle_table(r), *(table for each in of for table in each)]


def saddle_table(r: dict[str, Any]) -> Table:
    """Everything at zero."""
    headings = ["width", "parameters", "largest gradient of a weight", "‖Δθ‖ (output bias)", "answers", "accuracy"]
    rows = []
    for s in r["saddle"]:
        moved = "–" if s["moved"] is None else f"{s['moved']:.3f}"
        at_end = f"always class {s['answers'][0]}" if len(s["answers"]) == 1 else f"{len(s['answers'])} classes"
        span = f"{min(s['accuracies']):.1%} to {max(s['accuracies']):.1%}" if s["accuracies"] else "–"
        sizes = [f"{s['width']:,}", f"{s['parameters']:,}", f"{s['largest_weight_gradient']:g}"]
        rows.append([*sizes, moved, at_end, span])
    return Table("Everything at zero", headings, rows)


def reached_table(s: dict[str, Any]) -> Table:
    """What each width became."""
    level = "a common level" if s["level"] is None else f"{s['level']:.0%}"
    headings = ["width", "parameters", "rank", "accuracy", "‖Δθ‖", "‖Δθ‖ / ‖θ₀‖", "logits", f"steps to {level}"]
    rows = []
    for w in s["widths"]:
        end, start = w["end"], w["start_norm"]["mean"]
        moved = end["parameters"]["mean"]
        relative = f"{moved / start:.2f}" if start and moved is not None else "–"
        rank = "–" if not w["rank"] else " or ".join(map(str, w["rank"]))
        told = [percent(end["accuracy"]), spread(end["parameters"]), relative, spread(end["logits"])]
        rows.append([f"{w['width']:,}", f"{w['parameters']:,}", rank, *told, spread(w["steps_to_level"], 0)])
    return Table(f"{s['name']}: at the end", headings, rows)


def told_apart(r: Mapping[str, Any]) -> set[Fall]:
    """The falls, and rises, that are significant at 5 % after Holm's correction."""
    from datablame.paper import correlation

    return {fall for fall, p in correlation.corrected(r["settings"]).items() if p < 0.05}


def coefficients_table(s: dict[str, Any], part: str, apart: set[Fall]) -> Table:
    """Correlations of accuracy with ‖Δθ‖ by width, and the falls."""
    from datablame.paper.correlation import FALLING

    rows = []
    for spacing, kind in WAYS:
        cells = [spread(w["correlations"][part][spacing][kind]["parameters"]) for w in s["widths"]]
        falls = s["falls"][part][spacing][kind]
        told = [spread(falls[c]) + "*" * ((s["name"], part, spacing, kind, c) in apart) for c in FALLING]
        rows.append([f"{spacing}, {KIND_NAMES[kind]}", *cells, *told])
    widths = [f"{w['width']:,}" for w in s["widths"]]
    title = f"{s['name']}: correlation of accuracy with ‖Δθ‖, {PART_NAMES[part]}"
    return Table(title, ["points", *widths, "fall", "logits", "KL", "beyond"], rows)


def spread(x: dict[str, Any], digits: int = 2) -> str:
    """Mean ± half of the interval; – for none."""
    if x["mean"] is None:
        return "–"
    half = "" if x["interval95"] is None else f" ±{(x['interval95'][1] - x['interval95'][0]) / 2:.{digits}f}"
    return f"{round(x['mean'], digits) + 0.0:.{digits}f}{half}"  # no negative zero


def percent(x: dict[str, Any]) -> str:
    """As `spread`, of a share."""
    if x["mean"] is None:
        return "–"
    half = "" if x["interval95"] is None else f" ±{50 * (x['interval95'][1] - x['interval95'][0]):.1f}"
    return f"{100 * x['mean']:.1f}{half} %"


def verdict(s: dict[str, Any], apart: set[Fall]) -> str:
    """Whether the paper's claim holds in one setting, from its numbers. apart: see `told_apart`."""
    narrow, wide = s["widths"][0], s["widths"][-1]
    of = lambda w: [w["correlations"]["whole"][a][b]["parameters"]["mean"] for a, b in WAYS]  # noqa: E731
    if None in of(narrow) or None in of(wide):
        return f"{s['name']}: no verdict, some coefficient has no value at all."

    def count(part: str, change: str, way: int = 1) -> int:
        falls = {(a, b): s["falls"][part][a][b][change]["mean"] for a, b in WAYS}
        return sum((s["name"], part, *ab, change) in apart and way * fall > 0 for ab, fall in falls.items())

    down, rises = count("whole", "parameters"), count("whole", "parameters", -1)
    missing = min(of(narrow)) >= HIGH > max(of(wide))
    whole = wide["correlations"]["whole"]
    lows = [(whole[a][b]["parameters"]["interval95"] or [-1.0])[0] for a, b in WAYS]
    none = "does not hold" if min(lows) >= HIGH or rises == len(WAYS) else "is not decided"
    says = "holds" if missing and down == len(WAYS) else "holds in part" if down else none
    steps = ", ".join(spread(w["steps_to_level"], 0) for w in s["widths"])
    level = "" if s["level"] is None else f" Steps to {s['level']:.0%} accuracy, by width: {steps}."
    span = lambda w: f"width {w['width']:,} has {min(of(w)):.2f} to {max(of(w)):.2f}"  # noqa: E731
    same, same_rises = count("matched", "parameters"), count("matched", "parameters", -1)
    return (
        f"{s['name']}: the claim {says}. Over {len(WAYS)} ways of taking the coefficient, {span(narrow)}, "
        f"{span(wide)}; it falls in {down}, rises in {rises}. With logits in place of parameters it falls in "
        f"{count('whole', 'logits')}, with KL in {count('whole', 'kl')}; ‖Δθ‖'s falls more than the logits' in "
        f"{count('whole', 'beyond the function')}. Up to the same accuracy it falls in {same}, rises in "
        f"{same_rises}.{level}"
    )


def stops(r: dict[str, Any]) -> list[str]:
    """A sentence for each width with trainings that are left out."""
    return [
        f"{s['name']}, width {w['width']:,}: left out, because the loss was not finite: "
        + ", ".join(f"seed {x['seed']} at step {x['step']:,}" for x in w["stopped"])
        for s in r["settings"]
        for w in s["widths"]
        if w["stopped"]
    ]


CURVES = (
    Style("test accuracy", "blue"),
    Style("‖Δθ‖, over its largest", "vermillion", "dash", "square"),
    Style("change of logits, over its largest", "green", "dot", "diamond"),
)


def curves_view(s: dict[str, Any], spacing: str) -> View:
    """A panel for each width: accuracy, and both changes over their largest."""
    drawn = {}
    for w in s["widths"]:
        if w["curves"]:
            c = w["curves"][spacing]
            parts = (
                c["accuracy"],
                [_over_largest(v) for v in c["parameters"]],
                [_over_largest(v) for v in c["logits"]],
            )
            title = f"width {w['width']:,}: {w['parameters']:,} parameters"
            drawn[title] = [_mean(style, c["steps"], v) for style, v in zip(CURVES, parts, strict=True)]
    x = {"type": "log" if spacing == "log" else "linear", "title": {"text": "training step"}}
    return panels(drawn, x, share("share (0 to 1)"))


def _mean(style: Style, x: list[float], values: list[list[float]]) -> Trace:
    """Mean and interval at each x of `values`, a list of numbers for each seed."""
    found = [interval(column) for column in zip(*values, strict=True)]
    return curve(style, x, [{"value": f["mean"], "interval95": f["interval95"]} for f in found])


def _over_largest(values: list[float]) -> list[float]:
    largest = max(map(abs, values)) or 1.0
    return [v / largest for v in values]


CHANGES = {"parameters": ("‖Δθ‖", "vermillion", "square"), "logits": ("logits", "green", "diamond")}
DASHES = {"log": "solid", "even": "dash"}
"""Of the points along training."""


def correlations_view(r: dict[str, Any]) -> View:
    """A panel for each setting: coefficients over the number of parameters, of ‖Δθ‖ and of the logits."""
    drawn = {
        s["name"]: [
            _by_width(Style(f"{words}, {SPACING_NAMES[spacing]}", colour, DASHES[spacing], mark), s, spacing, change)
            for spacing in SPACING_NAMES
            for change, (words, colour, mark) in CHANGES.items()
        ]
        for s in r["settings"]
    }
    x = {"type": "log", "dtick": 1, "title": {"text": "parameters"}}
    return panels(drawn, x, {"title": {"text": "Pearson's correlation with accuracy"}})


def _by_width(style: Style, s: dict[str, Any], spacing: str, change: str) -> Trace:
    known = [(w["parameters"], w["correlations"]["whole"][spacing]["pearson"][change]) for w in s["widths"]]
    known = [(n, f) for n, f in known if f["mean"] is not None]
    points = [{"value": f["mean"], "interval95": f["interval95"]} for _, f in known]
    return curve(style, [n for n, _ in known], points)
