"""Table 5 (and the run behind Figure 3): time and error of the approximations on a single linear layer.

What the paper says (its section 4.1): a subset of MNIST, a single linear layer, 10 points with 1e4 and 1e5 parameters,
20 points with 1e5; the error is an "L2 norm" relative to the accurate influence function. It does not say the layer's
shape, how it was trained, how many queries were scored, or of what the norm is taken.

What is done here. A layer of 10 classes on images of 32 × 32 pixels has 10,250 weights, on 100 × 100 pixels 100,010
(bias included). Images are enlarged from 28 × 28 rather than given more classes than there are digits or random
features: it stays one linear layer on MNIST, and as enlarging adds no information, the number of weights is all that
changes. See `linear.py` for the rest.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from datablame.paper import EXPERIMENTS, Page, Request, Table
from datablame.paper.panels import bar_marker
from datablame.paper.results import already_there, read, write

RESULT = EXPERIMENTS["table5"].result
_PRINTED = ("fisher", "datainf", "lissa:steps=1", "lissa:steps=5", "lissa:steps=10", "graddot")
PAPER: dict[str, Any] = {
    "source": "Table 5 of Do Influence Functions Work on Large Language Models?",
    "error": "an L2 norm relative to the accurate influence function; of what, the paper does not define",
    "rows": [
        {
            "points": points,
            "parameters": parameters,
            "seconds": dict(zip(_PRINTED, seconds, strict=True)),
            "error": dict(zip(_PRINTED[1:], error, strict=True)),
        }
        for points, parameters, seconds, error in (
            (10, "1e4", (46.28, 0.06, 0.06, 0.17, 0.31, 0.01), (0.199, 0.209, 0.168, 0.124, 0.221)),
            (10, "1e5", (232.79, 0.30, 0.27, 0.84, 1.51, 0.04), (0.277, 0.292, 0.232, 0.171, 0.308)),
            (20, "1e5", (879.61, 2.34, 2.04, 6.32, 11.63, 0.30), (0.519, 0.521, 0.478, 0.431, 0.533)),
        )
    ],
}
SIDES = {32: "1e4", 100: "1e5"}
"""Pixels of a side -> parameters as the paper counts them."""
NAMES = {
    "fisher": "exact",
    "datainf": "DataInf",
    "lissa:steps=1": "LiSSA 1",
    "lissa:steps=5": "LiSSA 5",
    "lissa:steps=10": "LiSSA 10",
    "lissa:steps=inf": "LiSSA ∞",
    "graddot": "GradSim",
    "gradcos": "cosine",
    "hessian": "Hessian",
    "objective": "objective",
    "left out": "left out",
    "random": "random",
}
"""As printed."""


def run(request: Request) -> Path:
    """Measure at `request.scale` and write RESULT into `request.out`; a run that is already there is kept."""
    from datablame.paper import linear, mnist

    settings = {
        "smoke": (linear.Setting(10, 32), linear.Setting(20, 32)),
        "cpu": (
            linear.Setting(10, 32, dense=True),
            linear.Setting(20, 32, dense=True),
            linear.Setting(10, 100),
            linear.Setting(20, 100),
            linear.Setting(1000, 32, dense=True, rounds=3),
            linear.Setting(1000, 100, rounds=3),
        ),
    }[request.scale]
    images = mnist.load(request.mnist)
    plan = linear.Plan(settings, request.seed)
    path = request.out / RESULT
    this = {"scale": request.scale, "seed": request.seed, "data_sha256": images.sha256, "protocol": protocol(plan)}
    if already_there(path, this, request.reporter):
        return path
    record = {
        "run": this,
        "command": request.command,
        "data": images.name,
        "paper": PAPER,
        "settings": linear.measure(images, plan, request.reporter.note),
    }
    return write(path, record)


def protocol(plan: Any) -> dict[str, Any]:
    """Every choice of the measurement, for the file."""
    from datablame.paper import linear, softmax

    return {
        "layer": "softmax on side × side pixels (bilinear), standardised, over √pixels; the bias is an input of 1",
        "training": f"mean loss + decay/2 ‖W‖², L-BFGS from 0 until the gradient is shorter than {softmax.TOLERANCE:g}",
        "subsets": [plan.seed + k for k in range(plan.subsets)],
        "queries": plan.queries,
        "damping": plan.damping,
        "decay": plan.decay,
        "dtype": "float64",
        "settings": [asdict(s) for s in plan.settings],
        "methods": list(linear.METHODS),
        "errors": "raw ‖S − E‖/‖E‖ and scaled min_a ‖aS − E‖/‖E‖, Frobenius norms of [queries, points]; Spearman",
        "intervals": "mean over subsets, 95 % by Student's t",
        "times": "fit and scores of all queries, methods taking turns, median of the rounds after one that is dropped",
        "control": "random: uniform noise around 0; its error after the best factor is the level of chance",
    }


# ---------------------------------------------------------------- what is told


def show(out: Path, name: str) -> Page:
    """Seconds and errors of every method, the paper's beside ours."""
    r = read(out / RESULT)
    headings = ["method", "s", "s, paper", "Fisher raw", "scaled", "paper", "Hessian raw", "scaled", "resid."]
    tables = [Table(title(s), headings, [_row(s, name) for name in s["methods"]]) for s in r["settings"]]
    return Page(
        "Table 5: what do the approximations cost, and how wrong are they?",
        facts(r),
        [*NOTES, *(dense_note(s) for s in r["settings"])],
        tables,
        {"seconds": seconds_view(r)},
        str(r.get("command", "")),
        r["run"],
    )


NOTES = (
    "s: seconds for all queries; the paper's are from another machine and an unknown number of queries.",
    "Fisher: ‖S − E‖/‖E‖ against the damped empirical Fisher solution (exact), which the paper calls accurate; scaled: "
    "after the best factor. Hessian: against the true Hessian with the same convention of damping. paper: its error, "
    f"{PAPER['error']}.",
    "Hessian and objective: the true Hessian's solution, damped alike, and that of the minimised objective (loss and "
    "weight decay, no damping), told as if they were methods. random: the control.",
    "LiSSA takes its steps in closed form where that is cheaper than one by one, so its time hardly grows with them. "
    "Residual: how far it is from its own solution, the median over queries.",
)


def facts(r: dict[str, Any]) -> list[tuple[str, str]]:
    """Head of a page on this run."""
    p = r["run"]["protocol"]
    return [
        ("Data", str(r["data"])),
        ("Scale", r["run"]["scale"]),
        ("Subsets", str(len(p["subsets"]))),
        ("Queries", str(p["queries"])),
        ("Machine", str(r["machine"])),
        ("Threads", str(r["threads"])),
    ]


def title(s: dict[str, Any]) -> str:
    """Of one setting."""
    return f"{s['points']:,} points, {s['parameters']:,} parameters"


def dense_note(s: dict[str, Any]) -> str:
    """What the d × d route takes."""
    size = s["dense_gigabytes"]
    ours = f"ours takes {s['methods']['fisher']['seconds']:.3g} s"
    if s["dense_seconds"] is None:
        return (
            f"{title(s)}: the d × d route was not run; its matrix is {size['float32']:.3g} GB in float32, "
            f"{size['float64']:.3g} GB in float64. The dual form runs: {ours}."
        )
    return (
        f"{title(s)}: the d × d route took {s['dense_seconds']:.3g} s in float64 ({size['float64']:.2g} GB), {ours}; "
        f"they differ by {s['dense_difference']:.0e}."
    )


def of_paper(s: dict[str, Any], kind: str, method: str) -> float | None:
    """The paper's number for this setting, or None where it has none."""
    for row in PAPER["rows"]:
        if row["points"] == s["points"] and row["parameters"] == SIDES.get(s["side"]):
            return row[kind].get(method)
    return None


def number(x: float | None, digits: str = ".2g") -> str:
    """In print; – where there is no such number, and no power of ten for a large one."""
    return "–" if x is None else f"{x:,.0f}" if digits == ".2g" and abs(x) >= 100 else f"{x:{digits}}"


def mean(x: dict[str, Any] | None, digits: str = ".2g") -> str:
    """The mean of an interval in print."""
    return number(None if x is None else x["mean"], digits)


def _row(s: dict[str, Any], name: str) -> list[str]:
    m = s["methods"][name]
    fisher, hessian = m["errors"].get("fisher", {}), m["errors"].get("hessian", {})
    return [
        NAMES.get(name, name),
        number(m["seconds"]),
        number(of_paper(s, "seconds", name), ".4g"),
        mean(fisher.get("raw")),
        mean(fisher.get("scaled"), ".3f"),
        number(of_paper(s, "error", name), ".3f"),
        mean(hessian.get("raw")),
        mean(hessian.get("scaled"), ".3f"),
        mean(m["residual"]),
    ]


def seconds_view(r: dict[str, Any]) -> dict[str, Any]:
    """Bars: seconds by method and setting, on a logarithmic scale; the paper's paler."""
    data: list[dict[str, Any]] = []
    for i, s in enumerate(r["settings"]):
        timed = [name for name, m in s["methods"].items() if m["seconds"] is not None]
        x = [NAMES.get(name, name) for name in timed]
        group = {"legendgroup": str(i), "offsetgroup": str(i)}
        y = [s["methods"][name]["seconds"] for name in timed]
        data.append({"type": "bar", "name": title(s), "x": x, "y": y, **group, "marker": bar_marker(i)})
        theirs = [of_paper(s, "seconds", name) for name in timed]
        if any(t is not None for t in theirs):
            bar = {"type": "bar", "name": f"{title(s)}: the paper", "opacity": 0.4, "marker": bar_marker(i)}
            data.append({**bar, "x": x, "y": theirs, "legendgroup": str(i), "offsetgroup": f"{i} paper"})
    return {"data": data, "layout": {"barmode": "group", "yaxis": {"type": "log", "title": {"text": "seconds"}}}}
