"""Gradients to score, the grid of cases, and how scores are compared."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from datablame import methods as registry
from datablame.methods import parse

Blocks = dict[str, Tensor]

INFLUENCE = ["exact", "exact-block", "datainf", "lissa", "lissa:steps=inf"]
OPTIONS = ["", "relatif=l", "relatif=theta", "center=true", "center=2"]


def rows(n: int, sizes: tuple[int, ...], seed: int, common: float = 0.0) -> Blocks:
    """Gradients of very unequal blocks; `common` times one fixed direction of each, in every row."""
    g = torch.Generator().manual_seed(seed)
    c = torch.Generator().manual_seed(99)
    out = {}
    for i, d in enumerate(sizes):
        shared = torch.randn(1, d, generator=c, dtype=torch.float64)
        out[f"b{i}"] = (torch.randn(n, d, generator=g, dtype=torch.float64) + common * shared) * 10.0 ** (i - 1)
    return out


def case(name: str) -> tuple[Blocks, Blocks]:
    """(training rows, queries) of one point of the grid."""
    common = 300.0 if name == "common" else 0.0
    sizes, n = {
        "one block, n < D": ((14,), 6),
        "one block, n > D": ((4,), 9),
        "n < D": ((12, 9, 20), 6),
        "n > D": ((5, 3, 6), 20),
        "mixed": ((5, 12, 20), 8),
    }.get(name, ((5, 12, 20), 8))
    train, query = rows(n, sizes, 0, common), rows(3, sizes, 1, common)
    for g in train.values():
        if name == "duplicates":
            g[2:5] = g[1]
        if name == "zero row":
            g[3] = 0
    if name == "zero block":
        train["b1"].zero_()
    return train, query


CASES = [
    "one block, n < D",
    "one block, n > D",
    "n < D",
    "n > D",
    "mixed",
    "duplicates",
    "zero row",
    "zero block",
    "common",
]


def error(got: Tensor, want: Tensor) -> float:
    """The largest difference over the largest score."""
    return float((got - want).abs().max() / want.abs().max())


def quiet(spec: str, train: Blocks, query: Blocks, **options: object) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return create_from(spec, **options).fit(train).score(query)


def create_from(spec: str, **options: object) -> registry.Method:
    method = parse(spec)
    for k, v in options.items():
        setattr(method, k, v)
    return method


def spelt(spec: str, option: str) -> str:
    return f"{spec}{',' if ':' in spec else ':'}{option}" if option else spec
