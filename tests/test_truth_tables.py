"""Tables of retraining truth: what removal did, linear datamodeling scores, and which results are joined."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import pearsonr

from bench_cases import one_task, tiny
from datablame.errors import UserError
from datablame.evaluation import results, retraining, truth
from datablame.evaluation.cell import Cell
from datablame.evaluation.tables import REFERENCES
from datablame.evaluation.truth_tables import (
    estimate,
    lds_rows,
    lds_some,
    load_truth,
    removal_rows,
    truth_text,
    truth_title,
    with_the_share,
)

__all__ = ["one_task"]  # a fixture that every test here uses

REPSIM = REFERENCES["R"]


def removed(seed: int, good: float) -> dict[str, Any]:
    """A result whose losses rise by `good` for gradcos, by .1 for chance and RepSim, and not from training alone."""
    m, rng = 20, np.random.default_rng(seed)
    base = rng.uniform(1, 2, m)
    rises = {"gradcos@response": good, REPSIM: 0.1, truth.CHANCE: 0.1, truth.RIGHT: 2 * good, truth.AGAIN: 0.0}
    after = {truth.NOTHING: {"rows": [], "right": 0, "loss": base.tolist(), "behaves": [True] * m}}
    for name, rise in rises.items():
        loss = (base + rise + rng.normal(scale=0.01, size=m)).tolist()
        after[name] = {"rows": [0, 1], "right": 1, "loss": loss, "behaves": [j >= m * rise for j in range(m)]}
    return {
        "version": truth.VERSION, "kind": "removal", "task": "grammars", "seed": seed, "class": "x", "dropped": 2,
        "rows": 120, "queries": m, "runs": ["gradcos@response", REPSIM], "after": after, "shows": "prompt",
    }  # fmt: skip


def test_removal_is_told_against_nothing_beside_what_training_alone_changes() -> None:
    """Queries of a seed share its trainings: there is no mark of significance."""
    results = [removed(0, 0.4), removed(1, 0.5)]
    head, nothing, again, good, repsim, chance, right = removal_rows(results)
    assert {len(row) for row in removal_rows(results)} == {len(head)} == {6}
    assert nothing[0] == "nothing"
    base = np.mean([r["after"]["nothing"]["loss"] for r in results])
    assert nothing[2] == f"(loss {base:.3f})"
    assert nothing[4] == "(100% show it)"
    assert again[:2] == [truth.AGAIN, ""]
    assert float(again[2].partition(" (")[0]) == pytest.approx(0, abs=0.01)
    assert good[:2] == ["`gradcos@response`", "50%"]
    value, _, rest = good[2].partition(" (")
    assert float(value) == pytest.approx(0.45, abs=0.01)
    low, high = (float(x) for x in rest.partition(")")[0].split(" to "))
    assert 0.38 < low < 0.42  # the seeds are drawn, too
    assert 0.48 < high < 0.52
    assert [float(s) for s in good[3].split()] == pytest.approx([0.4, 0.5], abs=0.01)
    assert good[4].startswith("45% (")
    assert good[5] == "40% 50%"
    for row in (again, good, repsim, chance, right):
        assert row[2].endswith(")")
        assert row[4].endswith(")")


def test_how_the_rise_goes_with_the_share_of_right_rows_is_said() -> None:
    one, other = removed(0, 0.4), removed(1, 0.5)
    for r, rise in ((one, 0.4), (other, 0.1)):
        sets = {"gradcos@response": ([4, 5], 1, rise), REPSIM: ([6, 7], 0, 0.1), truth.CHANCE: ([8, 9], 2, 0.9)}
        sets |= {"graddot@all": ([5, 4], 1, rise), truth.RIGHT: ([0, 1], 2, 9.0)}  # dropped before; known anyway
        for name, (rows, right, up) in sets.items():
            loss = [x + up for x in r["after"][truth.NOTHING]["loss"]]
            r["after"][name] = {**r["after"][truth.NOTHING], "rows": rows, "right": right, "loss": loss}
    first, second = (pearsonr([0.5, 0, 1], [rise, 0.1, 0.9]).statistic for rise in (0.4, 0.1))
    assert with_the_share([one, other]) == (
        "The rise and the share of right rows among the dropped: Pearson's r is "
        f"{first:.2f} over 3 sets (seed 0), {second:.2f} over 3 sets (seed 1); no test."
    )
    for x in one["after"].values():
        x["right"] = 1
    assert "r is none, since one of the two does not vary over 3 sets (seed 0)" in with_the_share([one])


def scored(scores: np.ndarray[Any, Any], sets: np.ndarray[Any, Any], losses: np.ndarray[Any, Any]) -> dict[str, Any]:
    return truth._told(lambda some: retraining.lds(scores, sets[some], losses[some]), len(sets))


def test_the_error_of_an_lds_is_that_of_other_half_sets() -> None:
    """The jackknife's standard error against the spread over many draws of 16 half-sets, under shared noise."""
    rng = np.random.default_rng(0)
    n, m = 30, 12
    effects = rng.normal(size=(m, n))
    scores = effects + rng.normal(size=(m, n))

    def drawn(seed: int) -> dict[str, Any]:
        rng = np.random.default_rng(seed)
        sets = retraining.half_sets(n, 16, seed)
        shared = 3 * rng.normal(size=(16, 1))  # a training's noise is in the loss of every query
        return scored(scores, sets, -(sets @ effects.T) + shared + 0.3 * rng.normal(size=(16, m)))

    found = [drawn(seed) for seed in range(200)]
    spread = np.std([f["value"] for f in found])
    said = np.mean([f["standard_error"] for f in found])
    assert 0.8 < said / spread < 1.5
    of_queries = np.mean([np.std(f["queries"]) / m**0.5 for f in found])
    assert of_queries < 0.8 * spread  # what an interval over queries would say
    holds = [i.low < np.mean([f["value"] for f in found]) < i.high for i in (estimate([f]).interval() for f in found)]
    assert np.mean(holds) > 0.9
    together = estimate(found[:3])
    assert together.value == pytest.approx(np.mean([f["value"] for f in found[:3]]))
    assert together.error == pytest.approx(sum(f["standard_error"] ** 2 for f in found[:3]) ** 0.5 / 3, rel=1e-3)
    assert together.freedom == 45


def test_two_methods_are_held_against_each_other_on_the_same_half_sets() -> None:
    rng = np.random.default_rng(1)
    effects, sets = rng.normal(size=(8, 30)), retraining.half_sets(30, 16, 0)
    losses = -(sets @ effects.T) + 2 * rng.normal(size=(16, 1))
    good, same = (scored(effects + s * rng.normal(size=effects.shape), sets, losses) for s in (0.2, 0.2))
    bad = scored(rng.normal(size=effects.shape), sets, losses)
    assert estimate([good], [bad]).tested().p < 0.01
    assert estimate([good], [same]).tested().p > 0.05
    assert estimate([good], [good]).tested() == (0.0, 1.0)
    apart = estimate([good], [same])
    alone = (estimate([good]).error ** 2 + estimate([same]).error ** 2) ** 0.5
    assert apart.error < alone  # the noise that both share is gone


def test_lds_stands_by_view_beside_the_ceiling_and_the_class() -> None:
    def result(seed: int) -> dict[str, Any]:
        rng = np.random.default_rng(seed)

        def near(v: float, spread: float = 0.002) -> dict[str, Any]:
            return {"value": v, "without": (v + rng.normal(scale=spread, size=16)).tolist()}

        found = {
            "gradcos@response": near(0.2),
            "gradcos@all": near(0.7),
            "gradcos@padded": near(0.1),
            REPSIM: near(0.5),
        }
        return {
            "version": truth.VERSION, "kind": "lds", "task": "mathqa", "seed": seed, "rows": 100, "queries": 10,
            "half_sets": 16, "runs": list(found), "lds": found, "knowing_the_class": near(0.6), "shows": "both",
            "noise_ceiling": near(0.64, 0.0),
        }  # fmt: skip

    head, gradcos, repsim, classes, agreement, one, both = lds_rows([result(0), result(1)])
    assert head == ["method", "response", "all", "padded", "no view"]
    assert gradcos[0] == "`gradcos`"
    assert [float(c[:4]) for c in gradcos[1:4]] == [0.2, 0.7, 0.1]
    assert [c[-2:] for c in gradcos[1:4]] == ["R−", "R+", "R−"]
    assert gradcos[4] == repsim[1] == ""
    assert [float(c[-1][:4]) for c in (repsim, classes)] == [0.5, 0.6]
    assert agreement[-1] == "0.64 (0.64 to 0.64)"
    assert one[-1] == "0.80 (0.80 to 0.80)"
    assert both[-1] == "0.88 (0.88 to 0.88)"  # √(1.28/1.64)
    told = (("padded", "gradcos@padded"), ("not run", "graddot@all"))
    heads, padded, missing, classes, ceiling = lds_some({"mathqa": [result(0), result(1)]}, told)
    assert heads == ["linear datamodeling score", "mathqa (the label shows on: both)"]
    assert padded == ["padded `gradcos@padded`", gradcos[3]]  # the marks are of the same tests
    assert missing[1] == "–"
    assert classes[1].startswith("0.60 (")
    assert ceiling[1] == both[-1]
    unlike = result(0) | {"noise_ceiling": {"value": -0.1, "without": [-0.1] * 16}}
    assert lds_rows([unlike])[-1][-1] == "0.00 (0.00 to 0.00)"


def test_results_are_joined_over_seeds_and_not_with_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truth, "today", lambda result: None)  # see the next test
    folder = tmp_path / "m" / "cpu"
    folder.mkdir(parents=True)
    assert load_truth(tmp_path, "m", "cpu", "removal") == ({}, [])

    def save(name: str, result: dict[str, Any]) -> None:
        (folder / f"{name}.json").write_text(json.dumps(result))

    for seed in (1, 0):
        save(f"grammars-sound-s{seed}-removal", removed(seed, 0.4))
    save("grammars-sound-s0", {"version": 1})
    save("grammars-sound-s2-removal", {"version": truth.VERSION - 1})
    save("grammars-sound-s0-lds", removed(0, 0.4))
    found, notes = load_truth(tmp_path, "m", "cpu", "removal")
    assert notes == ["grammars: grammars-sound-s2-removal.json is left out, being of another version."]
    assert [r["seed"] for r in found["grammars"]] == [0, 1]
    text = truth_text(found, "removal")
    assert text.startswith(
        "**grammars: 2 of 120 rows dropped, 20 queries of x; seeds 0, 1; the label shows on: prompt**\n\n| dr"
    )
    assert truth_title(found["grammars"][:1], "removal").endswith("; seed 0; the label shows on: prompt")
    for seed in (0, 1):
        save(f"grammars-sound-s{seed}-removal", removed(seed, 0.4) | {"recipe_options": {"rank": 4, "seed": seed}})
    assert len(load_truth(tmp_path, "m", "cpu", "removal")[0]["grammars"]) == 2
    odd = {"runs": [REPSIM], "rows": 7, "model_sha256": "other", "recipe_options": {"rank": 8, "seed": 1}}
    for key, value in odd.items():
        save("grammars-sound-s1-removal", removed(1, 0.4) | {"recipe_options": {"rank": 4, "seed": 1}, key: value})
        with pytest.raises(UserError, match=f"differ in {key.partition('_opt')[0]} from seed to seed"):
            load_truth(tmp_path, "m", "cpu", "removal")


def test_a_seed_with_more_runs_joins_by_those_that_all_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truth, "today", lambda result: None)
    near = lambda v: {"value": v, "without": [v - 0.01, v + 0.01] * 8}  # noqa: E731
    ends = {"half_sets": 16, "knowing_the_class": near(0.6), "noise_ceiling": near(0.9)}
    folder = tmp_path / "m" / "cpu"
    folder.mkdir(parents=True)
    for seed, more in ((0, ["kfac@response"]), (1, [])):
        names = [*more, "gradcos@response", REPSIM]
        result = removed(seed, 0.4) | ends | {"kind": "lds", "runs": names, "lds": dict.fromkeys(names, near(0.5))}
        (folder / f"grammars-sound-s{seed}-lds.json").write_text(json.dumps(result))
    found = load_truth(tmp_path, "m", "cpu", "lds")[0]["grammars"]
    assert [row[0] for row in lds_rows(found)[1:3]] == ["`gradcos`", f"`{REPSIM}`"]
    assert [row[0] for row in lds_rows(found[:1])[1:4]] == ["`kfac`", "`gradcos`", f"`{REPSIM}`"]


def test_a_result_of_other_rows_is_left_out_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "build", lambda name, scale, seed: tiny(seed))
    folder = tmp_path / "m" / "smoke"
    folder.mkdir(parents=True)
    for seed in (0, 1):
        made = removed(seed, 0.4) | {"model": "m", "scale": "smoke", "model_sha256": "sha", "task": "tiny"}
        decides = truth._fingerprint(Cell("m", "tiny", "smoke", seed), tiny(seed), "sha", "removal", made["runs"])
        file = folder / f"tiny-sound-s{seed}-removal.json"
        file.write_text(json.dumps(made | {"fingerprint": decides}))
    found, notes = load_truth(tmp_path, "m", "smoke", "removal")
    assert ([r["seed"] for r in found["tiny"]], notes) == ([0, 1], [])
    monkeypatch.setattr(results, "build", lambda name, scale, seed: tiny(seed, version=2 if seed else 1))
    found, (note,) = load_truth(tmp_path, "m", "smoke", "removal")
    assert [r["seed"] for r in found["tiny"]] == [0]
    assert note.startswith("tiny: the removal result of seed 1 is left out, since the task has other rows")
    assert truth_text(found, "removal", [note]).endswith(f"\n\n{note}")
    monkeypatch.setattr(results, "build", lambda name, scale, seed: tiny(seed, version=3))
    found, notes = load_truth(tmp_path, "m", "smoke", "removal")
    assert (found, len(notes)) == ({}, 2)
