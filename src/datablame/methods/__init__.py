"""Every attribution method, under one call: `create(name, **options).fit(train).score(query)`.

Packages add their own through the entry-point group `datablame.methods` (see CONTRIBUTING).
"""

from __future__ import annotations

import dataclasses
import inspect
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from datablame import spelling
from datablame.errors import UserError, nearest
from datablame.methods.base import Method, Text

__all__ = ["BUILTIN", "Method", "Text", "create", "describe", "names", "parse", "parse_list"]

BUILTIN = {
    "gradcos": "gradients:GradCos",
    "graddot": "gradients:GradDot",
    "exact": "influence:Exact",
    "exact-block": "influence:ExactBlock",
    "datainf": "influence:DataInf",
    "lissa": "lissa:LiSSA",
    "gauss-newton": "curvature:GaussNewton",
    "tracincp": "training:TracInCP",
    "adamdot": "training:AdamDot",
    "repsim": "representations:RepSim",
    "repsim-base": "representations:BaseRepSim",
    "bm25": "controls:BM25",
    "verbatim": "controls:Verbatim",
    "length": "controls:Length",
    "gradnorm": "gradients:GradNorm",
    "random": "controls:Random",
    "kfac": "kronecker:KFAC",
    "ekfac": "kronecker:EKFAC",
    "trackstar": "trackstar:TrackStar",
    "less": "less:LESS",
    "trak": "trak:TRAK",
    "dda": "debiased:DDA",
    "rept": "representations:RepT",
    "concept": "representations:Concept",
    "bif": "covariance:BIF",
    "daunce": "covariance:Daunce",
    "cg": "krylov:CG",
    "minres": "krylov:MinRes",
    "subspace": "subspace:Subspace",
}
"""name -> module:class inside this package."""

NEEDS = {
    "gradients": "gradients (index with --adapter or --blocks)",
    "hidden": "hidden states",
    "base-hidden": "an adapter, and the base model's hidden states",
    "length": "the rows' lengths",
    "texts": "the rows' text",
    "checkpoints": "gradients at checkpoints (tune with --keep, index with --checkpoints)",
    "adam": "gradients, and the optimizer's state beside the adapter (tune with --keep)",
    "sampled": "gradients of sampled labels (index with --extras sampled)",
    "gradients-balanced": "gradients of a LoRA adapter, and its weights",
    "checkpoints-balanced": "gradients of a LoRA adapter at checkpoints, and its weights",
    "kfac": "gradients and Kronecker factors (index with --extras kfac)",
    "checkpoints-margin": "gradients of the margin (index with --extras margin)",
    "checkpoints-adam": "the optimizer's moments (tune with --keep, index with --extras moments)",
    "hidden-gradient": "the loss's gradient to a hidden state (index with --extras hidden-gradient)",
    "base-gradients": "gradients at the base model too (index with --extras base-gradients)",
    "bif": "losses under samples of the adapter's posterior (index with --extras bif)",
    "daunce": "losses under adapters of perturbed objectives (index with --extras daunce)",
    "operator": "gradients, and the model at hand (trace and compare have it)",
}


@cache
def _entry_points() -> dict[str, Any]:
    return {e.name: e for e in entry_points(group="datablame.methods")}


def names() -> list[str]:
    """All known methods, ours first."""
    return [*BUILTIN, *(n for n in _entry_points() if n not in BUILTIN)]


def method_class(name: str) -> type[Any]:
    """The class behind a name. Raises UserError with the nearest names for an unknown one."""
    if name in BUILTIN:
        module, attribute = BUILTIN[name].split(":")
        return getattr(import_module(f"datablame.methods.{module}"), attribute)
    if name in _entry_points():
        return _entry_points()[name].load()
    raise UserError(f"unknown method {name!r}.{nearest(name, names())}")


def create(name: str, **options: Any) -> Method:
    """A method by name. Raises UserError for an unknown name or option."""
    method: Method = spelling.make(method_class(name), name, options)
    return method


def parse(spec: str) -> Method:
    """`name:option=value,option=value` to a method. Whole numbers, decimals, true and false become such values."""
    name, options = spelling.read(spec)
    return create(name, **options)


def parse_list(text: str) -> list[str]:
    """`a,b:x=1,y=2,c` to `["a", "b:x=1,y=2", "c"]`: a part with `=` but no `:` belongs to the method before."""
    return spelling.read_list(text, "--method")


def describe(name: str) -> tuple[str, str, str]:
    """(first line of its description, options with defaults, what it needs)."""
    cls = method_class(name)
    needs = create(name).needs
    options = ", ".join(f"{f.name}={f.default}" for f in dataclasses.fields(cls) if f.init)
    return (inspect.getdoc(cls) or "").splitlines()[0], options, NEEDS.get(needs, needs)
