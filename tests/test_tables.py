"""The benchmark's tables: what they count, what they mark, what they leave out."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from datablame.evaluation.intervals import flip_test, holm, interval, interval_of_tasks, intervals
from datablame.evaluation.metrics import METRICS
from datablame.evaluation.results import TaskResults, against, corrected, of_one_kind, with_intervals
from datablame.evaluation.suites import FAMILIES, HEADLINE, runs
from datablame.evaluation.tables import (
    HEADINGS,
    SAME,
    headline_rows,
    ladder_rows,
    markdown,
    pairs,
    paper_rows,
    sides,
    task_rows,
)
from datablame.evaluation.tasks import names
from datablame.evaluation.truth_tables import matrix_rows


def made(seed: int, right: float) -> dict[str, Any]:
    """A result in which GradDot is right on a share of the queries and `bm25` never."""
    m = 40
    hit = (np.arange(m) < right * m).astype(float).tolist()
    zero, half = [0.0] * m, [0.5] * m
    columns = lambda v: dict.fromkeys(HEADINGS, v) | {"query_independent_share": 0.2}  # noqa: E731
    return {
        "task": "mixed-small", "seed": seed, "title": "t", "main": ["harmful"], "learnt": {"learnt": True},
        "queries": [{"id": j, "label": "x", "group": "harmful" if j % 2 else "benign"} for j in range(m)],
        "chance": dict.fromkeys(HEADINGS, half), "rows": 10, "recipe_options": {"rate": 1.0, "seed": seed},
        "model": "m", "scale": "cpu",
        "recipe": "sound", "fingerprint": "f", "model_sha256": "sha",
        "leak": {"prompt": 0.6, "response": 0.9, "shows": "response"},
        "results": {"reference": {
            "graddot@padded": columns(hit),
            "repsim:layer=last,text=prompt": columns(zero),
            "bm25:text=both": columns(zero),
            "length": columns(half) | {"query_independent_share": 1.0},
            "gradnorm@response": columns(hit) | {"query_independent_share": None},
        }},
    }  # fmt: skip


def test_a_run_that_failed_on_one_set_of_responses_is_in_no_table() -> None:
    result = made(0, 0.5)
    kinds = result["results"]
    kinds["generated"] = kinds["reference"] | {"graddot@padded": {"error": "no", "seconds": 0.0}}
    assert "graddot@padded" not in TaskResults("mixed-small", "sound", [result]).runs


def two_seeds() -> TaskResults:
    return TaskResults("mixed-small", "sound", [made(0, 0.5), made(1, 1.0)])


def test_matrices_stand_on_both_truths_beside_what_the_solver_left() -> None:
    result = made(0, 0.5)
    there = result["results"]["reference"]
    there["subspace:matrix=hessian@response"] = there["length"] | {"captured": "gradients", "residual": 0.2345}
    there["subspace@response"] = {"error": "not positive definite", "seconds": 0.0}
    result["results"]["generated"] = there | {"graddot@padded": {"error": "on these alone", "seconds": 0.0}}
    score = {"value": 0.4, "without": [0.39, 0.41] * 8}
    told = (
        ("plain", "graddot@padded"),
        ("Hessian", "subspace:matrix=hessian@response"),
        ("Gauss-Newton", "subspace@response"),
        ("not run", "exact@response"),
    )
    results = TaskResults("mixed-small", "sound", [result])
    rows = matrix_rows(results, [{"lds": dict.fromkeys((run for _, run in told[:2]), score)}], told)
    head, plain, hessian, failed, missing, chance = rows
    assert {len(row) for row in rows} == {len(head)}
    assert plain[0] == "plain `graddot@padded`"
    assert [cell[:4] for cell in plain[1:]] == ["0.50", "0.50", "0.40", ""]
    assert [cell[:4] for cell in hessian[1:4]] == ["0.50", "0.50", "0.40"]
    assert hessian[4] == "0.2: not solved"
    assert all(" to " in cell for cell in (*plain[1:4], hessian[3]))
    there["subspace:matrix=hessian@response"]["residual"] = 0.0834
    assert matrix_rows(results, [], told)[2][4] == "0.08"
    assert all(cell.endswith(SAME) for cell in hessian[1:3])  # one ranking, queries of one class: no interval
    assert failed[1:] == ["–", "–", "–", "not positive definite"]
    assert missing[1:] == ["–", "–", "–", "not run"]
    assert chance[1:] == ["0.50", "0.50", "0.00", ""]


def test_a_task_s_table_counts_the_main_group_and_marks_what_is_significant() -> None:
    results = two_seeds()
    assert results.values("graddot@padded", "accuracy").shape == (2, 20)
    assert results.seeds("graddot@padded", "accuracy") == [0.5, 1.0]
    assert results.values("graddot@padded", "accuracy", group="benign").shape == (2, 20)
    for kind, group in (("reference", "main"), ("reference", "benign")):
        header, *rows = task_rows(results, kind, group)
        assert header[1:-1] == list(HEADINGS.values())
        accuracy, auroc = 1 + list(HEADINGS).index("accuracy"), 1 + list(HEADINGS).index("auroc")
        assert rows[0][accuracy].startswith("0.75 (")
        assert rows[0][accuracy].endswith(") R+ B+")
        assert rows[0][auroc].endswith(") R+ B+")
        assert rows[0][-1] == "0.50 1.00"
        assert rows[1][accuracy].endswith(") B=")  # RepSim is not held against itself
        tested = [k for k, cell in enumerate(rows[0]) if "R+" in cell]
        assert tested == sorted([accuracy, auroc])
        assert rows[-1][0] == "chance"


def test_the_papers_tables_say_where_the_label_shows_and_what_length_finds() -> None:
    found = {"mixed-small": two_seeds()}
    heads, shows, words, lengths, norms, first, *_ = paper_rows("table2", found)
    assert heads == ["run", "mixed-small", "mixed-small: benign queries"]
    assert shows[1:] == ["response", ""]
    assert words[1] == "0.60, 0.90"
    assert lengths[1] == "0.50, 0.50"
    assert norms[1] == "0.75, 0.75"
    for cell in first[1:]:
        assert re.fullmatch(r"75 \(.*\) R\+ B\+ / 75 R\+ B\+", cell)
    assert paper_rows("table4", found) == [["not run yet"]]
    found["mixed-small"].results[0]["results"]["reference"]["lissa@padded"] = {"error": "it diverges"}
    assert found["mixed-small"].failed == {"lissa@padded": "it diverges"}
    assert "lissa@padded" not in found["mixed-small"].runs
    found["mixed-small"].results[0]["learnt"]["learnt"] = False
    assert paper_rows("table2", found)[0][1] == "mixed-small (behaviour not learnt: seed 0)"


def test_one_ranking_for_all_queries_of_one_class_has_no_interval_and_no_test() -> None:
    """They are right or wrong together."""
    results = two_seeds()
    rows = {row[0]: row for row in task_rows(results)}
    assert rows["`gradnorm@response`"][1] == "0.75 ≡"
    assert rows["`length`"][1] == "0.50 ≡"
    assert rows["`graddot@padded`"][1].endswith("R+ B+")
    assert paper_rows("table2", {"mixed-small": results})[8][1:] == ["50 ≡ / 50"] * 2
    lengths, norms = headline_rows({"mixed-small": results})[-3:-1]
    assert [lengths[1], norms[1]] == ["0.50 ≡", "0.75 ≡"]
    assert not results.fixed("graddot@padded")


def test_a_result_tells_its_own_intervals() -> None:
    """Over its main queries alone; the mean alone of one ranking for all."""
    rng = np.random.default_rng(0)
    result = made(0, 0.5)
    values = rng.random(40)
    result["results"]["reference"]["graddot@padded"]["auroc"] = values.tolist()
    found = with_intervals(result)["results"]["reference"]
    assert found["length"]["interval95"]["auroc"] == [0.5]
    main = values[1::2]  # the harmful ones
    means = main[rng.integers(20, size=(20_000, 20))].mean(axis=1)
    mean, low, high = found["graddot@padded"]["interval95"]["auroc"]
    assert mean == pytest.approx(main.mean(), abs=1e-4)
    assert [low, high] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.01)
    assert set(found["graddot@padded"]["interval95"]) == set(METRICS)


def test_one_ranking_for_queries_of_several_classes_has_one_witness_a_class() -> None:
    """All of a class are right or wrong together, so that their number is no evidence."""
    results = two_seeds()
    for r in results.results:
        there = r["results"]["reference"]
        for j, q in enumerate(r["queries"]):
            q["label"] = f"{q['group']} {j // 2 % 2}"
        right = [float(j // 2 % 2) for j in range(40)]  # of two classes one is named first, whatever is asked
        there["gradnorm@response"]["accuracy"] = right
        there["bm25:text=both"]["accuracy"] = [0.0] * 40
    one, other = "gradnorm@response", "bm25:text=both"
    assert not results.fixed(one)
    assert results.one_ranking(one)
    assert results.witnesses(one, "accuracy").tolist() == [[0.0, 1.0]] * 2
    assert results.witnesses(other, "accuracy").shape == (2, 20)
    i = results.interval(one, "accuracy")
    assert i == interval(np.array([[0.0, 1.0]] * 2), same_queries=False)
    assert (i.low, i.value, i.high) == (0.0, 0.5, 1.0)  # by query it would be .35 to .65
    key = ("B", one)
    tested = against([results], pairs([one], results.runs), "accuracy")[key]
    assert tested.value == 0.5
    assert tested.p == pytest.approx(0.5, abs=0.01)  # two signs: both up, both down, or 0
    for r in results.results:
        r["results"]["reference"][one]["query_independent_share"] = 0.3
    assert against([results], pairs([one], results.runs), "accuracy")[key].p < 0.001


def test_one_ranking_under_one_seed_of_two_is_one_witness_of_that_seed() -> None:
    """The other seed's queries stay witnesses of their own; the interval is over the seeds' means."""
    results = TaskResults("mixed-small", "sound", [made(0, 0.1), made(1, 1.0)])
    run, other = "graddot@padded", "bm25:text=both"
    results.results[1]["results"]["reference"][run]["query_independent_share"] = 0.95
    assert results.alike(run) == [False, True]
    assert results.one_ranking(run)
    assert not results.fixed(run)
    assert results.witnesses(run, "auroc").tolist() == [[0.1], [1.0]]
    tested = against([results], {"B": (run, other)}, "auroc")["B"]
    assert tested.value == pytest.approx(22 / 40)
    assert tested.p == pytest.approx(0.25, abs=0.01)  # three signs: two right queries of the first seed, and a seed
    results.results[1]["results"]["reference"][run]["query_independent_share"] = 0.2
    assert against([results], {"B": (run, other)}, "auroc")["B"].p < 0.001


def test_wordings_of_one_question_are_one_witness() -> None:
    results = replace(two_seeds(), task="facts")
    for r in results.results:
        for j, q in enumerate(r["queries"]):
            q["label"] = f"entity {j // 10}"
    values = results.values("graddot@padded", "auroc")
    assert values.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]  # 20 main queries, five of each entity
    assert results.chance("auroc") == 0.5
    by_query = replace(results, task="mixed-small").interval("graddot@padded", "auroc")
    by_entity = results.interval("graddot@padded", "auroc")
    assert by_entity.value == by_query.value
    assert by_entity.low < by_query.low


def test_one_ranking_is_asked_of_the_group_and_not_of_all_queries() -> None:
    """Benign queries in between bring the share down: on the harmful ones there may be one ranking all the same."""
    results = two_seeds()
    for r in results.results:
        r["results"]["reference"]["graddot@padded"]["shares"] = {"main": 0.95, "benign": 0.3}
    assert results.fixed("graddot@padded")
    assert not results.fixed("graddot@padded", group="benign")
    assert not results.fixed("bm25:text=both")


def test_wordings_of_one_question_are_one_witness_where_the_answers_behave_too() -> None:
    result = made(0, 0.5)
    values = np.arange(40.0).tolist()
    result["queries"] = [
        {"id": j, "label": f"e{j // 10}", "group": "harmful", "behaves": j % 10 < 2 and j < 20} for j in range(40)
    ]
    same = dict.fromkeys(HEADINGS, values) | {"query_independent_share": 0.3}
    result["results"]["generated"] = {"graddot@padded": same}
    facts = TaskResults("facts", "sound", [result])
    (shown,) = facts.behaving("graddot@padded", "auroc")
    assert shown.tolist() == [0.5, 10.5]
    (single,) = TaskResults("mixed-small", "sound", [result]).behaving("graddot@padded", "auroc")
    assert single.tolist() == [0.0, 1.0, 10.0, 11.0]
    (chance,) = facts.behaving(None, "auroc")
    assert chance.tolist() == [0.5, 0.5]


def test_seeds_that_have_not_learnt_are_named() -> None:
    results = two_seeds()
    assert results.heading == "mixed-small"
    results.results[1]["learnt"] = {"learnt": False}
    assert results.heading == "mixed-small (behaviour not learnt: seed 1)"
    results.results[0]["learnt"] = {"learnt": False}
    assert results.heading == "mixed-small (behaviour not learnt)"


def test_the_same_queries_under_every_seed_are_one_witness_together() -> None:
    results = two_seeds()
    rng = np.random.default_rng(0)
    for r in results.results:
        for run in ("graddot@padded", "bm25:text=both"):
            r["results"]["reference"][run]["auroc"] = (rng.random(40) + (run[0] == "g") / 5).tolist()
    key, several = ("B", "graddot@padded"), against([results], pairs(["graddot@padded"], results.runs), "auroc")
    for r in results.results:
        r["queries_sha256"] = "the same"
    assert results.same_queries
    together = against([results], pairs(["graddot@padded"], results.runs), "auroc")
    assert together[key].value == pytest.approx(several[key].value)
    a, b = (results.values(run, "auroc") for run in ("graddot@padded", "bm25:text=both"))
    assert together[key].p == pytest.approx(flip_test((a - b).mean(axis=0)[None], draws=99_999)[0])
    assert together[key].p > several[key].p
    assert results.interval("graddot@padded", "auroc") == interval(a)
    results.results[1]["queries_sha256"] = "others"
    assert not results.same_queries


def test_a_step_of_the_ladder_is_held_against_the_rung_above() -> None:
    results = two_seeds()
    for r in results.results:
        there = r["results"]["reference"]
        same = dict.fromkeys(HEADINGS, [1.0] * 40) | {"query_independent_share": 0.3}
        there |= {"graddot@all": same, "graddot@response": same}
    rows = {row[0].split("`")[1]: row[1] for row in ladder_rows({"mixed-small": results}) if "`" in row[0]}
    assert rows["graddot@padded"].endswith("R+ B+")  # the first rung has none above it
    assert rows["graddot@all"].endswith("R+ B+ S+")
    assert rows["graddot@response"].endswith("R+ B+ S=")
    assert rows["gradcos:over=row@response"] == "–"
    assert "0.75" in markdown(ladder_rows({"mixed-small": results}))


def test_a_difference_on_half_of_the_queries_survives_a_whole_table() -> None:
    """40 queries, right on all against right on 23, among 300 cells that differ in nothing."""
    d = np.zeros((300, 40))
    d[0, :17] = 1
    p = flip_test(d, draws=99_999)
    assert holm(p)[0] < 0.01
    assert (holm(p)[1:] == 1).all()
    exact = 2 * 0.5**17
    assert p[0] <= 3 * exact + 1e-4


def test_the_test_of_a_table_is_that_of_two_methods() -> None:
    rng = np.random.default_rng(0)
    results = two_seeds()
    for r in results.results:
        for run in ("graddot@padded", "bm25:text=both"):
            r["results"]["reference"][run]["auroc"] = rng.random(40).tolist()
    key = ("B", "graddot@padded")
    tested = against([results], pairs(["graddot@padded"], results.runs), "auroc")[key]
    a, b = (results.values(run, "auroc") for run in ("graddot@padded", "bm25:text=both"))
    assert tested.value == pytest.approx((a - b).mean())
    assert tested.p == pytest.approx(flip_test((a - b).reshape(1, -1), draws=99_999)[0])
    assert corrected({key: tested})[key].p == tested.p
    # Intervals taken together are those taken one by one.
    together = intervals(np.stack([a, b]), same_queries=False)
    assert together == [pytest.approx(interval(x, same_queries=False)) for x in (a, b)]


def test_the_headline_is_a_mean_over_tasks() -> None:
    low, high = two_seeds(), TaskResults("mixed-large", "sound", [made(0, 1.0), made(1, 1.0)])
    heads, shows, *rows = headline_rows({"mixed-small": low, "mixed-large": high})
    assert heads[1] == "harmful data: mixed-small, mixed-large"
    assert shows[1] == "mixed-small: response; mixed-large: response"
    assert rows[0][1].startswith("0.88 (")  # (.75 + 1)/2
    assert rows[0][1].endswith("R+ B+")
    i = interval_of_tasks([low.values("graddot@padded", "auroc"), high.values("graddot@padded", "auroc")])
    assert i.value == pytest.approx(0.875)
    assert i.low < 0.8 < i.high <= 1.0
    alone = [low.values("graddot@padded", "auroc")]
    assert interval_of_tasks(alone) == interval(alone[0], same_queries=False)


def test_headline_and_families_name_runs_and_tasks_that_exist() -> None:
    assert {run for _, run in HEADLINE} <= set(runs("all"))
    assert {t for tasks in FAMILIES.values() for t in tasks} == set(names())


def test_seeds_of_another_kind_are_left_out_and_named() -> None:
    same = [made(0, 0.5), made(1, 1.0)]
    assert of_one_kind("mixed-small", "sound", same).left_out == []
    other = made(2, 1.0) | {"recipe_options": {"rate": 2.0, "seed": 2}, "model_sha256": "another"}
    found = of_one_kind("mixed-small", "sound", [*same, other])
    assert [r["seed"] for r in found.results] == [0, 1]
    (note,) = found.left_out
    assert "seed 2 is left out" in note
    assert "model_sha256, recipe_options" in note


def test_what_shows_differs_by_seed() -> None:
    results = two_seeds()
    results.results[1]["leak"]["shows"] = "both"
    assert sides([results])[0] == ["the label shows on", "response, both"]
    length = "AUROC, top-1 of the row's length alone `length`"
    benign = sides([results, (results, "benign")])
    assert benign[0] == ["the label shows on", "response, both", ""]
    of = [float(results.values("length", m, group="benign").mean()) for m in ("auroc", "accuracy")]
    assert benign[2] == [length, sides([results])[2][1], f"{of[0]:.2f}, {of[1]:.2f}"]
