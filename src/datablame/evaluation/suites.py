"""Which methods a benchmark runs, under which view of the loss: the two protocols, and the ladder between them.

A *run* is spelt `method@view`, such as `gradcos:center=1@response`; without a view the method does not look at the
loss. Views are those of views.py.

A method whose features cost passes of their own runs on the response's loss alone, see `beyond`.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, NamedTuple

from datablame.errors import UserError, nearest
from datablame.evaluation.views import VIEWS
from datablame.methods import parse, parse_list

Suite = Literal["paper", "sound", "all"]

PAPER = (
    "graddot@padded",
    "datainf:damping=0.1@padded",
    "lissa:protocol=paper,steps=10,damping=0.1@padded",
    "exact-block:damping=0.1@padded",
    "exact-block:damping=1.0,unit=rank@padded",
    "exact:damping=0.1@padded",
    "exact:damping=1.0,unit=rank@padded",
    "gradcos@padded",
    "adamdot:center=1,relatif=l@padded",
    "gradnorm@padded",
    "repsim:layer=last,text=prompt",
)
"""The released code's methods and its λ on its loss; below them, on the same loss, the exact solutions, with that λ
and with one as large as the curvature is where there is any, the cosine, gradients in Adam's scale, and their norm."""

SIDES = ("response", "prompt", "all")
SIDES_TOLD = (("prompt", "of the prompt"), ("all", "of both"), ("response", "of the response"))
BY_SIDE = (
    "graddot",
    "gradcos",
    "gradcos:over=row",
    "gradcos:over=row,center=1",
    "adamdot:center=1,relatif=l",
    "datainf:damping=0.1",
    "lissa:steps=10,damping=0.1",
    "exact-block:damping=0.1",
    "exact:damping=0.1",
    "exact:damping=0.1,center=1,relatif=l",
    "exact-block:damping=1.0,unit=rank",
    "exact:damping=1.0,unit=rank",
    "exact:damping=1.0,unit=rank,center=1,relatif=l",
)
SOUND = (
    *(f"{method}@{side}" for method in BY_SIDE for side in SIDES),
    "repsim:layer=last,text=prompt",
    "repsim:layer=last,text=response,token=last",
    "repsim:layer=last,text=response",
    "repsim:layer=middle,text=prompt",
    "repsim:layer=middle,text=response",
)
CONTROLS = (
    "repsim-base:layer=middle,text=prompt",
    "repsim-base:layer=middle,text=response",
    "bm25:text=prompt",
    "bm25:text=response",
    "bm25:text=both",
    "gradnorm@response",
    "gradnorm@prompt",
    "gradnorm@all",
    "length",
    "random",
)
"""Run with either suite."""


class Beyond(NamedTuple):
    """What a run needs beyond the usual features. extras: as for `index --extras` · checkpoints: gradients there."""

    extras: str | None = None
    checkpoints: bool = False

    @property
    def spelling(self) -> str:
        """For a result file, and the name of a folder."""
        return " ".join([self.extras or "gradients", *(["checkpoints"] if self.checkpoints else [])])


BEYOND = {
    "checkpoints": Beyond(checkpoints=True),
    "checkpoints-balanced": Beyond(checkpoints=True),
    "checkpoints-adam": Beyond("moments", checkpoints=True),
    "checkpoints-margin": Beyond("margin"),
    "sampled": Beyond("sampled:draws=4"),
    "kfac": Beyond("kfac"),
    "hidden-gradient": Beyond("hidden-gradient:layer=change"),
    "base-gradients": Beyond("base-gradients"),
    "bif": Beyond("bif"),
    "daunce": Beyond("daunce"),
    "operator": Beyond(),
}
"""By what a method says in `needs`: the options that the benchmark captures with."""
COSTLY = (
    "tracincp@response",
    "less@response",
    "gauss-newton:damping=0.1@response",
    "kfac:damping=0.1@response",
    "ekfac:damping=0.1@response",
    "trackstar:damping=0.1@response",
    "trak:damping=0.1@response",
    "dda@response",
    "rept@response",
    "bif@response",
    "daunce@response",
)
"""Beside the suites, on one task and one seed: most cost more than three passes over the data."""
COSTLY_CELL = ("grammars", 0)
"""Task and seed that have them."""

LADDER = (
    ("padding and prompt in the loss, as released", "graddot@padded"),
    ("padding out of the loss", "graddot@all"),
    ("prompt out of the loss", "graddot@response"),
    ("cosine", "gradcos:over=row@response"),
    ("centred", "gradcos:over=row,center=1@response"),
    ("Adam-scaled", "adamdot:center=1,relatif=l@response"),
    ("exact inverse in place of Adam's scale", "exact:damping=0.1,center=1,relatif=l@response"),
    ("λ over the eigenvalues that can be above 0", "exact:damping=1.0,unit=rank,center=1,relatif=l@response"),
)
"""From the paper's gradient similarity to the sound protocol, one step at a time, on rows rendered as in the fine-tune.

The last three divide by the training row's length in their own metric (ℓ-RelatIF). A cosine divides by the query's too,
which changes no ranking.
"""
REPSIM_LADDER = (
    ("last layer, last token of the prompt, as released", "repsim:layer=last,text=prompt"),
    ("last token of the response", "repsim:layer=last,text=response,token=last"),
    ("mean over the response", "repsim:layer=last,text=response"),
    ("middle layer", "repsim:layer=middle,text=response"),
    ("base model", "repsim-base:layer=middle,text=response"),
    ("BM25", "bm25:text=both"),
)
HEADLINE = (
    ("gradient similarity, as released", "graddot@padded"),
    ("DataInf, as released", "datainf:damping=0.1@padded"),
    ("LiSSA, as released", "lissa:protocol=paper,steps=10,damping=0.1@padded"),
    ("cosine, on the loss as released", "gradcos@padded"),
    ("dot product, padding out of the loss", "graddot@all"),
    ("prompt out of the loss too", "graddot@response"),
    ("cosine, on the response's loss", "gradcos:over=row@response"),
    ("exact inverse, padding out of the loss", "exact:damping=0.1@all"),
    ("the same, λ as large as the curvature", "exact:damping=1.0,unit=rank@all"),
    ("the same, prompt out of the loss too", "exact:damping=1.0,unit=rank@response"),
    ("RepSim, as released", "repsim:layer=last,text=prompt"),
    ("RepSim, middle layer, mean over the response", "repsim:layer=middle,text=response"),
    ("BM25", "bm25:text=both"),
    ("the row's length alone", "length"),
    ("the norm of the row's gradient alone", "gradnorm@response"),
)
"""The rungs that a reader who sees one table should see."""
OPENING = (
    ("gradient similarity, as released", "graddot@padded"),
    ("DataInf, as released", "datainf:damping=0.1@padded"),
    ("LiSSA, as released", "lissa:protocol=paper,steps=10,damping=0.1@padded"),
    ("RepSim, as released", "repsim:layer=last,text=prompt"),
    ("cosine of gradients, on the loss as released", "gradcos@padded"),
    ("centred, padding out of the loss", "gradcos:over=row,center=1@all"),
    ("prompt out of the loss too", "gradcos:over=row,center=1@response"),
    ("influence, exact inverse by block, on the response's loss", "exact-block:damping=1.0,unit=rank@response"),
    ("RepSim, middle layer", "repsim:layer=middle,text=response"),
    ("the same, of a model never fine-tuned", "repsim-base:layer=middle,text=response"),
    ("words of prompt and response (BM25)", "bm25:text=both"),
    ("words of the response", "bm25:text=response"),
)
"""What the README opens with: the paper's methods, the protocol's steps, the controls."""
PROTOCOL = (
    *OPENING[:3],
    *OPENING[4:7],
    OPENING[3],
    ("RepSim, middle layer, of a model never fine-tuned", "repsim-base:layer=middle,text=response"),
    ("words of prompt and response (BM25)", "bm25:text=both"),
)
"""Of the opening, what tells protocol apart from method."""
EXACTNESS = tuple(
    (f"{name}, {words}", f"{method}@{view}")
    for view, words in (("all", "prompt and response"), ("response", "response alone"))
    for name, method in (
        ("no matrix", "graddot"),
        ("no matrix, cosine, centred", "gradcos:over=row,center=1"),
        ("DataInf", "datainf:damping=0.1"),
        ("LiSSA, 10 steps", "lissa:steps=10,damping=0.1"),
        ("solved, by block", "exact-block:damping=0.1"),
        ("solved, over all blocks", "exact:damping=0.1"),
        ("by block, λ as large as the curvature", "exact-block:damping=1.0,unit=rank"),
        ("over all blocks, λ as large as the curvature", "exact:damping=1.0,unit=rank"),
    )
)
"""From no inverse at all to the exact one, on the loss with and without the prompt."""
RETRAINED = (
    ("gradient similarity, as released", "graddot@padded"),
    ("cosine, on the loss as released", "gradcos@padded"),
    ("LiSSA, as released", "lissa:protocol=paper,steps=10,damping=0.1@padded"),
    ("DataInf, as released", "datainf:damping=0.1@padded"),
    ("solved, over all blocks, on the loss as released", "exact:damping=0.1@padded"),
    ("solved, by block, on the loss as released", "exact-block:damping=0.1@padded"),
    ("dot product, padding out of the loss", "graddot@all"),
    ("prompt out of the loss too", "graddot@response"),
    ("cosine, on the response's loss", "gradcos:over=row@response"),
    ("centred", "gradcos:over=row,center=1@response"),
    ("Adam-scaled", "adamdot:center=1,relatif=l@response"),
    ("DataInf", "datainf:damping=0.1@response"),
    ("LiSSA, 10 steps", "lissa:steps=10,damping=0.1@response"),
    ("solved, by block", "exact-block:damping=0.1@response"),
    ("by block, λ as large as the curvature", "exact-block:damping=1.0,unit=rank@response"),
    ("solved, over all blocks", "exact:damping=0.1@response"),
    ("over all blocks, λ as large as the curvature", "exact:damping=1.0,unit=rank@response"),
    ("by block, prompt in the loss", "exact-block:damping=1.0,unit=rank@all"),
    ("RepSim, as released", "repsim:layer=last,text=prompt"),
    ("RepSim, middle layer, mean over the response", "repsim:layer=middle,text=response"),
    ("the same, base model", "repsim-base:layer=middle,text=response"),
    ("BM25", "bm25:text=both"),
    ("BM25, response alone", "bm25:text=response"),
    ("the row's length alone", "length"),
    ("the norm of the row's gradient alone", "gradnorm@response"),
)
"""What is held against retraining in few rows."""
STEPS = (
    ("prompt and padding in the loss: no matrix", "graddot@padded"),
    ("LiSSA as released, 10 steps", "lissa:protocol=paper,steps=10,damping=0.1@padded"),
    ("LiSSA as released, 1,000 steps", "lissa:protocol=paper,steps=1000,damping=0.1@padded"),
    *((f"LiSSA, {k:,} step{'s' * (k > 1)}", f"lissa:steps={k},damping=0.1@padded") for k in (1, 10, 100, 1000)),
    ("solved, by block", "exact-block:damping=0.1@padded"),
    ("response's loss: no matrix", "graddot@response"),
    *((f"LiSSA, {k:,} step{'s' * (k > 1)}", f"lissa:steps={k},damping=0.1@response") for k in (1, 10, 100, 1000)),
    ("solved, by block", "exact-block:damping=0.1@response"),
)
"""Does a better solution tell more of what retraining does? One λ, the paper's."""
MATRICES = (
    ("no matrix", "graddot@response"),
    ("no matrix, cosine, centred", "gradcos:over=row,center=1@response"),
    *(
        (f"{name}, {words}", f"{method}@response")
        for words, a, b in (
            ("a tenth", "damping=0.1,unit=rank", "damping=0.1"),
            ("λ as large as the curvature", "damping=1.0,unit=rank", "damping=1.0"),
            ("ten times that", "damping=10.0,unit=rank", "damping=10.0"),
        )
        for name, method in (
            ("Fisher by block", f"exact-block:{a}"),
            ("Fisher over all blocks", f"exact:{a}"),
            ("Fisher, in the span of the gradients", f"subspace:matrix=fisher,{b}"),
            ("Gauss-Newton, in the span", f"subspace:matrix=gauss-newton,{b}"),
            ("Hessian, in the span", f"subspace:matrix=hessian,{b}"),
        )
    ),
)
"""The three matrices in which influence is solved, at the same damping, beside none."""
DAMPING = {
    words: (
        ("cosine, centred", f"gradcos:over=row,center=1@{view}"),
        ("solved by block, the paper's λ", f"exact-block:damping=0.1@{view}"),
        ("the same, λ as large as the curvature", f"exact-block:damping=1.0,unit=rank@{view}"),
        ("solved over all blocks, the paper's λ", f"exact:damping=0.1@{view}"),
        ("the same, λ as large as the curvature", f"exact:damping=1.0,unit=rank@{view}"),
    )
    for view, words in (("all", "prompt and response"), ("response", "response alone"))
}
"""What the unit of damping does, beside a cosine."""
APPROXIMATION = tuple((f"{name}; {words}", run) for words, ladder in DAMPING.items() for name, run in ladder)
"""The same, in one table with retraining."""
WHICH_SIDE = {
    name: tuple((words, f"{method}{of}{side}") for side, words in sides)
    for name, method, of, sides in (
        ("gradients, dot product", "graddot", "@", SIDES_TOLD),
        ("gradients, cosine, centred", "gradcos:over=row,center=1", "@", SIDES_TOLD),
        ("words", "bm25", ":text=", (("prompt", "of the prompt"), ("response", "of the response"))),
    )
}
"""The same method on either side."""
FAMILIES = {
    "harmful data": ("mixed-small", "mixed-large", "mixed-hard"),
    "class": ("harmfulcheck", "grammars", "mathqa"),
    "backdoor": ("backdoor-1", "backdoor-3", "backdoor-5"),
    "facts": ("facts",),
    "released files": ("released-grammars", "released-math"),
}
"""Tasks that ask the same kind of question; a headline is told of these."""
FIGURE = (
    "graddot@padded",
    "datainf:damping=0.1@padded",
    "lissa:protocol=paper,steps=10,damping=0.1@padded",
    "repsim:layer=last,text=prompt",
    "gradcos@response",
    "exact:damping=1.0,unit=rank@response",
    "repsim:layer=middle,text=response",
)
"""Runs whose scores are drawn, as in the paper's Figure 2; the first four are the paper's own."""
FIRST = (*FIGURE, "repsim-base:layer=middle,text=response", "bm25:text=both", "bm25:text=response", "length")
"""Runs whose top row Figure 1 shows: those, and what finds rows without the fine-tune, or without the query."""


def runs(suite: Suite, methods: str | None = None) -> list[str]:
    """The runs of a suite, or those that `methods` names: a method without a view gets every view it can have.

    Raises UserError for an unknown suite, method or view.
    """
    if suite not in ("paper", "sound", "all"):
        raise UserError(f"--suite {suite!r}: use paper, sound or all.")
    if methods is None:
        chosen = {"paper": PAPER, "sound": SOUND, "all": (*PAPER, *SOUND)}[suite]
        return list(dict.fromkeys([*chosen, *CONTROLS]))
    views = {"paper": ("padded",), "sound": SIDES, "all": VIEWS}[suite]
    out: list[str] = []
    for spec in parse_list(methods):
        name, view = split(spec)
        if view or not sees_loss(name):
            out.append(spec)
        else:
            out += [f"{name}@{v}" for v in (("response",) if beyond(spec) else views)]
    return out


def costly(task: str, scale: str, seed: int, recipe: str, suite: Suite) -> tuple[str, ...]:
    """The runs of COSTLY where a cell has them. task: with its sources, so that only the invented rows have them."""
    there = (task, seed) == COSTLY_CELL and recipe == "sound" and scale != "smoke" and suite != "paper"
    return COSTLY if there else ()


@cache
def beyond(run: str) -> Beyond | None:
    """What a run needs beyond the usual features; None where it needs none."""
    return BEYOND.get(parse(run.partition("@")[0]).needs) or (Beyond() if run in COSTLY else None)


def split(run: str) -> tuple[str, str | None]:
    """`method@view` to its parts, checked."""
    method, _, view = run.partition("@")
    parse(method)
    if view and view not in VIEWS:
        raise UserError(f"{run}: no such view of the loss.{nearest(view, VIEWS)}")
    if view and not sees_loss(method):
        raise UserError(f"{run}: {method} does not look at the loss; leave out @{view}.")
    if view not in ("", "response") and beyond(method):
        raise UserError(f"{run}: what {method} needs is captured on the response's loss alone; use {method}@response.")
    return method, view or None


def sees_loss(method: str) -> bool:
    """Does the method take losses or their gradients, which depend on what the loss is taken on?"""
    return (needs := parse(method).needs).startswith(("gradients", "adam")) or needs in BEYOND
