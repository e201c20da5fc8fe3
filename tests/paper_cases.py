"""What tests of the paper's tables and figures share: the command, and a small run of Table 5's measurement."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from conftest import Run
from datablame.paper import linear, mnist

SETTINGS = (linear.Setting(8, 4, dense=True, refits=5, rounds=2), linear.Setting(12, 5, refits=5, rounds=2))
PLAN = linear.Plan(SETTINGS, seed=3, subsets=3, queries=6)


@pytest.fixture(scope="module")
def measured(digits: mnist.Images) -> list[dict[str, Any]]:
    return linear.measure(digits, PLAN, lambda _: None)


@pytest.fixture
def run(run: Run) -> Callable[..., tuple[int, str, str]]:
    """The command line's `paper`."""
    return partial(run, "paper")
