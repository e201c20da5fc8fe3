"""A small run of Table 5's measurement, for the tests of its numbers and of its pages."""

from __future__ import annotations

from typing import Any

import pytest

from datablame.paper import linear, mnist

SETTINGS = (linear.Setting(8, 4, dense=True, refits=5, rounds=2), linear.Setting(12, 5, refits=5, rounds=2))
PLAN = linear.Plan(SETTINGS, seed=3, subsets=3, queries=6)


@pytest.fixture(scope="module")
def measured(digits: mnist.Images) -> list[dict[str, Any]]:
    return linear.measure(digits, PLAN, lambda _: None)
