"""Degenerate input to every registered method: a clear UserError or finite scores, never NaN, never another error.

Cases stand in CASES by the kind of input that a method needs. A kind that is made of gradients has a function in
COMPOSED instead. A method whose kind is in neither fails here, by design.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from datablame import methods as registry
from datablame.errors import UserError
from datablame.methods import Text, create, parse
from datablame.methods.base import Adam, Checkpoint, Debiased, Factored, Kronecker, Margin, Moments, Operator, Sampled
from gradient_cases import OPTIONS as ON_GRADIENTS

Blocks = dict[str, Tensor]


class Case(NamedTuple):
    """Input of `fit` (n rows) and of `score` (m rows), and what must come of it."""

    train: Any
    query: Any
    n: int
    m: int = 2
    refused: str = ""
    """Every method refuses, and its message matches this."""
    may_refuse: str = ""
    """Some methods refuse; their message matches this."""
    zero: bool = False
    """All scores are 0."""
    no_gradient: bool = False
    """A block has no training gradient: methods that invert a matrix of it warn."""


OPTIONS = {
    "exact": [*ON_GRADIENTS, "unit=rank"],
    "exact-block": [*ON_GRADIENTS, "unit=rank", "aggregate=vote", "form=primal", "form=dual"],
    "datainf": ON_GRADIENTS,
    "lissa": [*ON_GRADIENTS, "unit=rank", "steps=inf", "protocol=paper"],
    "graddot": [*ON_GRADIENTS, "aggregate=rank"],
    "tracincp": ["relatif=l", "aggregate=rank"],
    "adamdot": ["relatif=l", "center=1", "aggregate=vote"],
    "gradcos": ["over=row", "center=1", "aggregate=vote"],
    "repsim": ["layer=last,text=prompt", "layer=last,token=last"],
    "bm25": ["text=prompt", "text=response"],
    "kfac": ["relatif=l"],
    "ekfac": ["relatif=l"],
    "trackstar": ["projection=sparse,dim=3", "projection=none", "dim=3", "mix=0", "mix=1"],
    "less": ["projection=sparse,dim=3", "projection=none", "projection=two-sided,dim=3"],
    "trak": ["projection=sparse,dim=3", "projection=none", "projection=two-sided,dim=3"],
    "dda": ["beta=0", "beta=2"],
    "concept": ["over=each", "layer=last,text=prompt"],
    "bif": ["correlation=true"],
    "cg": ["steps=1", "damping=1e-6", "matrix=hessian"],
    "minres": ["damping=1e-6"],
    "subspace": ["matrix=fisher", "matrix=hessian,damping=1e-6"],
}
"""Options that change the arithmetic; every method runs as it is, too."""

# ---------------------------------------------------------------- the table


def blocks(train: Blocks, **expected: Any) -> Case:
    """Against two queries of ones."""
    query = {b: torch.ones(2, x.shape[1], dtype=x.dtype) for b, x in train.items()}
    return Case(train, query, len(next(iter(train.values()))), **expected)


def spoilt(value: float, d: int = 2) -> Tensor:
    x = torch.ones(3, d)
    x[1, 0] = value
    return x


G = torch.Generator().manual_seed(0)
DIVERGES = "block 'a': the recursion diverges.*The released step is fixed"
LOW = torch.randn(6, 2, generator=G) @ torch.randn(2, 9, generator=G)
GRADIENTS = {
    "all rows equal": blocks({"a": torch.ones(6, 4), "b": torch.full((6, 9), 0.1)}),
    "zero gradients": blocks({"a": torch.zeros(6, 4), "b": torch.zeros(6, 9)}, zero=True, no_gradient=True),
    "a zero block": blocks({"a": torch.zeros(6, 4), "b": LOW}, no_gradient=True),
    "a zero query": Case({"a": LOW}, {"a": torch.zeros(2, 9)}, 6),
    "n = 1": blocks({"a": torch.ones(1, 4), "b": LOW[:1]}),
    "n = 1, zero": blocks({"a": torch.zeros(1, 4)}, zero=True, no_gradient=True),
    "n = 1, one number": blocks({"a": torch.full((1, 1), 3.0)}),
    "one number": blocks({"a": torch.full((4, 1), 2.0)}),
    "rank-deficient": blocks({"a": LOW[:, :4], "b": LOW}),
    "float64": blocks({"a": LOW.double()}),
    "tiny": blocks({"a": LOW * 1e-18}),
    "huge": blocks({"a": LOW * 1e18}, may_refuse=DIVERGES),
    "huge in float64": blocks({"a": LOW.double() * 1e100}, may_refuse=DIVERGES),
    "beyond float64": blocks({"a": LOW.double() * 1e200}, may_refuse="row 0 is too long: .* beyond float64"),
    "NaN": blocks({"a": spoilt(math.nan)}, refused="block 'a': row 1 holds a number that is not finite"),
    "infinite": blocks({"a": torch.ones(3, 4), "b": spoilt(math.inf)}, refused="block 'b': row 1"),
    "a query is not finite": Case({"a": torch.ones(2, 2)}, {"a": spoilt(math.nan)}, 2, refused="block 'a': row 1"),
    "no rows": blocks({"a": torch.zeros(0, 4)}, refused="block 'a': there are no training rows"),
    "no blocks": Case({}, {}, 0, refused="there are no gradient blocks"),
}


def states(x: Tensor, **expected: Any) -> Case:
    """The same hidden states at two layers and all positions."""
    names = [f"{layer}.{kind}" for layer in (2, 4) for kind in ("prompt.last", "response.last", "response.mean")]
    return blocks(dict.fromkeys(names, x), **expected)


HIDDEN = {
    "all rows equal": states(torch.full((6, 4), 0.1)),
    "zero hidden states": states(torch.zeros(6, 4), refused="row 0 has no hidden state"),
    "one zero row": states(torch.eye(3).repeat(2, 1) * torch.tensor([1.0, 1, 1, 1, 0, 1])[:, None], refused="row 4"),
    "a zero query": states(LOW)._replace(query=states(torch.zeros(2, 9)).train, refused="row 0 has no hidden state"),
    "n = 1": states(torch.ones(1, 4)),
    "one number": states(torch.full((4, 1), -2.0)),
    "rank-deficient": states(LOW),
    "float64": states(LOW.double()),
    "huge": states(LOW * 1e30),
    "tiny": states(LOW * 1e-38),
    "NaN": states(spoilt(math.nan), refused="row 1 holds a number that is not finite"),
    "infinite": states(spoilt(-math.inf), refused="row 1 holds a number that is not finite"),
    "a query is not finite": states(torch.ones(3, 2))._replace(query=states(spoilt(math.nan)).train, refused="row 1"),
    "no rows": states(torch.zeros(0, 4)),
    "no blocks": Case({}, {}, 0, refused="no hidden states"),
}

LENGTHS = {
    "zero": blocks({"length": torch.zeros(4, 1)}, zero=True),
    "all rows equal": blocks({"length": torch.full((4, 1), 7.0)}),
    "n = 1": blocks({"length": torch.full((1, 1), 7.0)}),
    "NaN": blocks({"length": spoilt(math.nan, 1)}, refused="block 'length': row 1 holds a number that is not finite"),
    "infinite": blocks({"length": spoilt(math.inf, 1)}, refused="block 'length': row 1"),
}


def texts(*rows: str, query: str = "What boils water?", **expected: Any) -> Case:
    """Each text as prompt and response; two queries, one of them the first row."""
    train = [Text(t, t) for t in rows]
    return Case(train, [Text(query, query), train[0]], len(train), **expected)


TEXTS = {
    "all rows equal": texts(*["A kettle boils water."] * 4),
    "empty text": texts("", "", ""),
    "an empty row": texts("A kettle boils water.", "", "Rain."),
    "an empty query": texts("A kettle boils water.", "Rain.", query=""),
    "one row": texts("A kettle boils water."),
    "one empty row": texts(""),
    "only white space": texts(" ", "\n\t", "\u00a0"),
    "only punctuation": texts("?!", "…", "_ _", query="?!"),
    "only stop words": texts("the of and", "to be or not to be", query="the and"),
    "unicode": texts("Köln İstanbul ß", "水壶烧水", "🫖 e\u0301 \u200f\u0645\u0627\u0621", query="水壶 🫖 İ"),
    "not quite text": texts("\x00\x1b[31m", "\ud800", "\ufeffwater"),
    "one long word": texts("w" * 20_000, "water"),
    "no rows": Case([], [Text("Water?", "Boils.")] * 2, 0),
    "a text row": Case([Text("", "Water boils."), Text("", "Rain.")], [Text("", "Water"), Text("Who?", "")], 2),
}


def losses(x: Tensor, **expected: Any) -> Case:
    """Losses under perturbed adapters, the queries' being those of the last row."""
    return Case({"losses": x}, {"losses": x[-1:].expand(2, -1)}, len(x), **expected)


LOSSES = {
    "all rows equal": losses(LOW[:1].expand(6, -1)),
    "zero": losses(torch.zeros(6, 4), zero=True),
    "a row never changes": losses(torch.cat([torch.full((1, 9), 0.1), LOW])),
    "a query never changes": losses(torch.cat([LOW, torch.full((1, 9), 0.1)]), zero=True),
    "n = 1": losses(LOW[:1]),
    "two samples": losses(LOW[:, :2]),
    "one sample": losses(LOW[:, :1], refused="a covariance needs two samples, and there is 1"),
    "tiny": losses(LOW * 1e-30),
    "huge": losses(LOW * 1e30, may_refuse="a score is not finite"),
    "beyond float64": losses(LOW.double() * 1e200, may_refuse="a score is not finite"),
    "NaN": losses(spoilt(math.nan), refused="block 'losses': row 1 holds a number that is not finite"),
    "infinite": losses(spoilt(math.inf), refused="block 'losses': row 1 holds a number that is not finite"),
    "a query is not finite": Case({"losses": LOW}, {"losses": spoilt(math.nan, 9)}, 6, refused="block 'losses': row 1"),
    "another number of samples": Case(
        {"losses": LOW}, {"losses": LOW[:, :3]}, 6, refused="9 samples of a training row"
    ),
    "no rows": Case({"losses": LOW[:0]}, {"losses": LOW[:2]}, 0, refused="there are no losses"),
    "no losses": Case({}, {}, 0, refused="there are no losses"),
}

CASES = {
    "gradients": GRADIENTS,
    "hidden": HIDDEN,
    "base-hidden": HIDDEN,
    "length": LENGTHS,
    "texts": TEXTS,
    "bif": LOSSES,
    "daunce": LOSSES,
}


def signatures(case: Case) -> Case:
    """The same numbers as state and as gradient."""
    halves = [{k: next(iter(x.values())) for k in ("state", "gradient")} if x else {} for x in (case.train, case.query)]
    return case._replace(train=halves[0], query=halves[1])


CASES["hidden-gradient"] = {name: signatures(case) for name, case in HIDDEN.items()} | {
    "zero gradients": Case(*({"state": torch.ones(n, 3), "gradient": torch.zeros(n, 3)} for n in (4, 2)), 4),
}


def adam(case: Case) -> Case:
    """Second moments of 1, but of 0 for a block's first weight."""
    v = {b: (torch.arange(g.shape[1]) > 0).to(g.dtype) for b, g in case.train.items()}
    return case._replace(train=Adam(case.train, v, 1e-8, {b: (1, g.shape[1]) for b, g in case.train.items()}))


def checkpoints(case: Case) -> Case:
    """Two checkpoints of the same gradients."""
    if not case.train:
        return case._replace(train=[], query=[], refused="no checkpoints")
    return case._replace(train=[Checkpoint(r, case.train) for r in (1.0, 0.5)], query=[Checkpoint(0, case.query)] * 2)


def sampled(case: Case) -> Case:
    """Two draws, both of them the rows' own gradients."""
    return case._replace(train=Sampled(case.train, [case.train] * 2))


def factored(case: Case) -> Case:
    """Rows of one token whose input is the gradient and whose output gradient is 1."""
    factors = {
        b: Kronecker(g.double().T @ g.double(), torch.full((1, 1), float(len(g))), len(g))
        for b, g in case.train.items()
    }
    return case._replace(train=Factored(case.train, case.train, factors))


def shapes(case: Case) -> dict[str, tuple[int, int]]:
    """Every block a weight of one row."""
    return {b: (1, g.shape[1]) for b, g in case.train.items()}


def margin(case: Case) -> Case:
    """Two checkpoints of the same gradients, 1−p being ½."""
    if not case.train:
        return case._replace(train=[], query=[], refused="no gradients of the margin")
    at = Margin(case.train, torch.full((case.n,), 0.5), shapes(case))
    return case._replace(train=[at] * 2, query=[case.query] * 2)


def moments(case: Case) -> Case:
    """Two checkpoints: first moments of 0, second ones as in `adam`, three tokens a row."""
    if not case.train:
        return case._replace(train=[], query=[], refused="no checkpoints")
    v = adam(case).train.v
    m = {b: torch.zeros_like(x) for b, x in v.items()}
    at = Moments(1.0, case.train, torch.full((case.n,), 3.0), m, v, (0.9, 0.999), 10, 1e-8, shapes(case))
    return case._replace(train=[at] * 2, query=[case.query] * 2)


def debiased(case: Case) -> Case:
    """The base model's gradients half as long."""
    return case._replace(
        train=Debiased(case.train, {b: x / 2 for b, x in case.train.items()}),
        query=Debiased(case.query, {b: x / 2 for b, x in case.query.items()}),
    )


def operator(case: Case) -> Case:
    """Products with the empirical Fisher of the gradients themselves; without curvature every method refuses."""
    whole = torch.cat([g.double() for g in case.train.values()], dim=1) if case.train else torch.zeros(0, 0)
    train = Operator(case.train, lambda matrix, x: (x @ whole.T) @ whole / max(1, len(whole)))
    refused = "so damping has no unit. Are all gradients zero" if case.zero else case.refused
    may_refuse = "is not finite" if case.may_refuse else ""
    return case._replace(train=train, refused=refused, may_refuse=may_refuse, no_gradient=False)


COMPOSED: dict[str, Callable[[Case], Case]] = {
    "adam": adam,
    "checkpoints": checkpoints,
    "sampled": sampled,
    "kfac": factored,
    "checkpoints-margin": margin,
    "checkpoints-adam": moments,
    "base-gradients": debiased,
    "operator": operator,
}
"""kind -> that kind's case from a gradient case, with `case._replace(train=…, query=…)`."""


def cases_of(kind: str) -> dict[str, Case]:
    """The cases of a kind of input; an AssertionError saying what to add where there are none."""
    assert kind in CASES or kind in COMPOSED, (
        f"no degenerate input for methods on {kind!r}: add a table of cases to CASES, or, if that input is made of "
        f"gradients, a function to COMPOSED, in tests/test_degenerate.py."
    )
    return CASES[kind] if kind in CASES else {name: COMPOSED[kind](case) for name, case in GRADIENTS.items()}


def grid() -> list[tuple[str, str]]:
    """(spelling, case) of every registered method; one point for a method whose kind has no cases."""
    out = []
    for name in registry.names():
        kind = registry.method_class(name).needs
        specs = [name, *(f"{name}:{o}" for o in OPTIONS.get(name, []) if o)]
        known = kind in CASES or kind in COMPOSED
        out += [(spec, case) for spec in specs for case in (cases_of(kind) if known else ["-"])]
    return out


# ---------------------------------------------------------------- the tests


def attempt(method: registry.Method, case: Case) -> tuple[Tensor | None, str, list[str]]:
    """(scores or None, the refusal, the warnings)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            return method.fit(case.train).score(case.query), "", [str(w.message) for w in caught]
        except UserError as e:
            return None, str(e), []


@pytest.mark.parametrize(("spec", "name"), grid())
def test_degenerate_input_gives_a_clear_error_or_finite_scores(spec: str, name: str) -> None:
    method = parse(spec)
    case = cases_of(method.needs)[name]
    got, refusal, said = attempt(method, case)
    if got is None:
        expected = case.refused or case.may_refuse
        assert expected, refusal
        assert re.search(expected, refusal)
        return
    assert not case.refused
    assert got.shape == (case.m, case.n)
    assert got.isfinite().all()
    assert not (case.zero and got.any())
    if name == "all rows equal" and spec != "random":
        torch.testing.assert_close(got, got[:, :1].expand_as(got))
    # Nothing but what the project says itself: a division by zero in numpy would be a warning, too.
    assert all("zero gradients" in s for s in said), said
    if case.no_gradient and hasattr(method, "sweep"):
        assert any("'a'" in s for s in said)


def test_a_method_of_a_new_kind_fails_until_it_has_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    class Smell:
        needs = "smells"

    of = registry.method_class
    monkeypatch.setattr(registry, "names", lambda: ["graddot", "smell"])
    monkeypatch.setattr(registry, "method_class", lambda name: Smell if name == "smell" else of(name))
    assert ("smell", "-") in grid()
    with pytest.raises(AssertionError, match="no degenerate input for methods on 'smells'.*CASES.*COMPOSED"):
        cases_of("smells")


def test_a_kind_made_of_gradients_has_every_gradient_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMPOSED, "pairs", lambda case: case._replace(train=(case.train, case.train)))
    assert list(cases_of("pairs")) == list(GRADIENTS)
    assert cases_of("pairs")["NaN"].train[0] is GRADIENTS["NaN"].train


@pytest.mark.parametrize("option", OPTIONS)
def test_options_are_of_registered_methods(option: str) -> None:
    assert option in registry.names()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_score_beyond_the_features_dtype_is_an_error(dtype: torch.dtype) -> None:
    train = {"a": torch.full((2, 3), 1e30 if dtype == torch.float32 else 1e160, dtype=dtype)}
    with pytest.raises(UserError, match=f"graddot: a score is not finite.*{str(dtype)[6:]}"):
        create("graddot").fit(train).score(train)
    if dtype == torch.float32:
        assert create("exact-block").fit(train).score(train).isfinite().all()
