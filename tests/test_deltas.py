"""Norms of updates against dense ones, ranks of pairs, and rates: what Tables 1 and 6 and Figure 6 are made of."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from datablame.paper import alignment, deltas, figure6, rates, table6
from datablame.paper.deltas import Factors

# ---------------------------------------------------------------- norms of updates


def made(rank: int, scale: float, seed: int) -> Factors:
    g = torch.Generator().manual_seed(seed)
    return Factors(*(torch.randn(s, generator=g, dtype=torch.float64) for s in ((rank, 7), (9, rank))), scale)


def test_the_distance_of_two_updates_is_the_dense_one() -> None:
    one, two = made(3, 8.0, 0), made(5, 2.0, 1)
    for scaled in (False, True):
        s, t = (one.scale, two.scale) if scaled else (1.0, 1.0)
        dense = torch.linalg.norm(s * one.b @ one.a - t * two.b @ two.a)
        assert deltas.distance(one, two, scaled) == pytest.approx(float(dense), rel=1e-12)
        assert deltas.distance(one, None, scaled) == pytest.approx(float(s * torch.linalg.norm(one.b @ one.a)))
    assert deltas.distance(None, None, True) == 0
    assert deltas.distance(one, one, True) < 1e-12 * deltas.distance(one, None, True)


def test_a_small_distance_of_large_updates_is_not_lost() -> None:
    """Expanding the square would leave 1e-8 of the size and worse."""
    one = made(3, 1.0, 0)
    near = one._replace(b=one.b * (1 + 1e-10))
    expected = 1e-10 * deltas.distance(one, None, False)
    assert deltas.distance(one, near, False) == pytest.approx(expected, rel=1e-4)


def test_norms_of_a_pair() -> None:
    first, second = {"x": made(2, 4.0, 0), "y": made(2, 4.0, 1)}, {"x": made(2, 4.0, 2), "y": made(2, 4.0, 3)}
    each = [float(torch.linalg.norm(first[k].b @ first[k].a - second[k].b @ second[k].a)) for k in first]
    found = deltas.norms(first, second)
    assert found["mean"] == pytest.approx(np.mean(each))
    assert found["sd"] == pytest.approx(np.std(each))
    assert found["layers"] == 2
    assert found["whole"] == pytest.approx(4 * math.hypot(*each))
    assert deltas.norms(None, first)["mean"] == pytest.approx(deltas.norms(first, None)["mean"])


# ---------------------------------------------------------------- ranks of pairs


def test_rank_correlation_and_mantel() -> None:
    x = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    y = [2.0, 1.0, 4.0, 3.0, 6.0, 5.0]
    assert deltas.rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert deltas.rank_correlation(x, [1.0] * 6) is None
    assert deltas.relabelled(x, [1.0] * 6, alignment.PAIRS) is None
    same = deltas.relabelled(x, x, alignment.PAIRS)
    assert same == pytest.approx(1 / 24)  # no less is possible
    paper_rho = deltas.rank_correlation(table6.PAPER["norm"], table6.PAPER["asr"])  # type: ignore[arg-type]
    assert paper_rho == pytest.approx(stats.spearmanr(table6.PAPER["norm"], table6.PAPER["asr"]).statistic)


def test_relabelling_by_hand() -> None:
    """Three models, three pairs: 6 relabellings, of which those that keep |ρ| are counted one by one."""
    pairs = [("a", "b"), ("a", "c"), ("b", "c")]
    x, y = [1.0, 2.0, 3.0], [1.0, 3.0, 2.0]
    orders = [[1.0, 3.0, 2.0], [1.0, 2.0, 3.0], [3.0, 1.0, 2.0], [3.0, 2.0, 1.0], [2.0, 1.0, 3.0], [2.0, 3.0, 1.0]]
    expected = np.mean([abs(stats.spearmanr(x, o).statistic) >= 0.5 - 1e-9 for o in orders])
    assert deltas.relabelled(x, y, pairs) == pytest.approx(expected)


def test_a_change_of_rate_is_paired_and_undecided_prompts_are_left_out() -> None:
    first = [True, True, False, None, True, False, True, True, True, True]
    second = [True, False, False, True, None, False, False, False, False, False]
    found = rates.changed(first, second)
    assert found["prompts"] == 8
    assert found["value"] == pytest.approx(5 / 8) == -found["change"]
    assert found["differ"] == 5
    assert found["p"] == pytest.approx(2 * 0.5**5)
    low, high = found["interval95"]
    assert low < 5 / 8 < high <= 1
    same = rates.changed([True] * 5, [True] * 5)
    assert (same["value"], same["interval95"][0], same["p"]) == (0, 0, 1)
    assert same["interval95"][1] > 0.3
    assert same["differ_below"] == pytest.approx(1 - 0.025 ** (1 / 5))
    nothing = rates.changed([None, True], [True, None])
    assert (nothing["value"], nothing["p"]) == (None, 1)


def test_the_interval_of_a_paired_change_holds_the_truth_at_either_end() -> None:
    """Where nearly all verdicts change, as in the paper, or nearly none does; 20 prompts."""
    rng = np.random.default_rng(0)
    for share in (0.05, 0.5, 0.9, 0.95):
        holds = []
        for _ in range(600):
            change = rng.random(20) < share
            low, high = rates.paired([False] * 20, change.tolist())
            holds.append(low <= share <= high)
        assert np.mean(holds) > 0.9, share
    low, high = rates.paired([False] * 20, [True] * 20)
    assert (high, low) == (1, pytest.approx(0.75, abs=0.06))
    # A verdict that stays says more than one that is drawn again.
    kept = rates.paired([True] * 10 + [False] * 10, [True] * 12 + [False] * 8)
    drawn = rates.paired([True] * 10 + [False] * 10, [False] * 8 + [True] * 12)
    assert kept[1] - kept[0] < drawn[1] - drawn[0]
    assert [-x for x in kept[::-1]] == pytest.approx(
        rates.paired([True] * 12 + [False] * 8, [True] * 10 + [False] * 10)
    )


def test_an_estimate_is_a_ratio_of_sums() -> None:
    x, of = [1.0, 4.0, 2.0], [1.0, 2.0, 5.0]
    found = rates.estimate(x, of)
    assert found["value"] == pytest.approx(7 / 8)
    assert found["interval95"][0] >= 2 / 5
    assert found["interval95"][1] <= 4 / 2
    assert rates.estimate([-3.0, 1.0], absolute=True)["value"] == 1


def test_the_interval_of_a_size_holds_0_where_the_sign_is_not_known() -> None:
    """Quantiles of absolute values never do."""
    x = np.random.default_rng(1).normal(0.1, 1.0, 50)
    signed, size = rates.estimate(x)["interval95"], rates.estimate(x, absolute=True)["interval95"]
    assert signed[0] < 0 < signed[1]
    assert size == [0, max(-signed[0], signed[1])]
    low, high = rates.estimate(x + 2)["interval95"]
    assert low > 0
    assert rates.estimate(x + 2, absolute=True)["interval95"] == [low, high]
    assert rates.estimate(-x - 2, absolute=True)["interval95"] == pytest.approx([low, high])
    even = rates.changed([True, False] * 10, [False, True] * 10)
    assert (even["value"], even["interval95"][0]) == (0, 0)


def test_comparisons_are_corrected_for_their_number() -> None:
    """Six prompts that change one way have p = 1/32: enough for one comparison, not for three."""
    changes = [rates.changed([False] * 20, [True] * k + [False] * (20 - k)) for k in (6, 6, 12)]
    assert [c["p"] for c in changes] == pytest.approx([2**-5, 2**-5, 2**-11])
    assert rates.apart(changes) == pytest.approx([2 * 2**-5, 2 * 2**-5, 3 * 2**-11])
    assert rates.apart([]) == []


def test_figure6_pairs_the_prompts_of_two_epochs() -> None:
    """8 of 20 answers change one way: told apart in pairs, though the two intervals overlap."""
    from datablame.evaluation.judges import wilson

    def point(epoch: float, k: int) -> dict[str, Any]:
        harmful = {"rate": list(wilson(k, 20)), "complied": [True] * k + [False] * (20 - k), "loss": 1.0}
        return {"epoch": epoch, "norm": {"mean": 1.0}, "kl": 1.0, "harmful": harmful}

    first, last = point(1, 6)["harmful"]["rate"], point(2, 14)["harmful"]["rate"]
    assert first[2] > last[1]
    curves = {"benign": [point(0, 6), point(1, 6), point(2, 14)], "mixed": [point(0, 6), point(1, 6), point(2, 11)]}
    benign, mixed = figure6.second_half({"model": "m", "curves": curves})
    assert "success rate changes (30% to 70%" in benign
    assert "does not change beyond what the prompts can tell (30% to 55%" in mixed
