"""The benchmark's results from their files: which seeds are stacked, and the pages that are made of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import conftest
from bench_cases import tiny
from datablame.errors import UserError
from datablame.evaluation import results as results_module
from datablame.evaluation import tasks, truth
from datablame.evaluation.cell import Cell, fingerprint
from datablame.evaluation.result_files import lacking, read_result, save, to_json
from datablame.evaluation.results import TaskResults, is_old, joined, load_results, load_suite
from datablame.evaluation.suites import FIRST, LADDER, REPSIM_LADDER
from datablame.evaluation.tables import markdown, paper_rows
from datablame.evaluation.truth import read_truth
from datablame.paper import attribution
from datablame.report.bench import context, write_bench
from test_table_marks import BM25, RUNGS, made, stacked

ROOT = Path(__file__).resolve().parent.parent


# ---------------------------------------------------------------- seeds of one kind


def write(folder: Path, *results: dict[str, Any]) -> Path:
    for r in results:
        path = folder / r["model"] / r["scale"] / f"{r['task']}-{r['recipe']}-s{r['seed']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(to_json(r))
    return folder


def test_seeds_that_agree_are_stacked(tmp_path: Path) -> None:
    write(tmp_path, *(made("facts", s) for s in (2, 0, 1)))
    found = load_results(tmp_path, "tiny", "cpu")["facts"]
    assert [r["seed"] for r in found.results] == [0, 1, 2]
    assert found.left_out == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"title": "of old"}, "title"),
        ({"model_sha256": "other"}, "model_sha256"),
        ({"rows": 9}, "rows"),
        ({"recipe_options": {"rate": 1e-3, "seed": 1, "epochs": 9}}, "recipe_options"),
    ],
)
def test_a_seed_of_another_kind_is_left_out_and_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    write(tmp_path, made("facts", 0) | change, made("facts", 1), made("facts", 2), made("grammars", 0) | change)
    found = load_results(tmp_path, "tiny", "cpu")
    assert [r["seed"] for r in found["facts"].results] == [1, 2]  # more seeds
    (note,) = found["facts"].left_out
    assert note.startswith(f"facts: seed 0 is left out, since it is not of one kind with seed 1 ({said}). Delete")
    assert len(found["grammars"].results) == 1  # alone, it is what there is


MISSED = {"learnt": False, "behaves": {"tuned": 0.5, "base": 0.0}, "missed": ["harmful"],
          "by_group": {"harmful": {"tuned": 0.25, "base": 0.0}, "benign": {"tuned": 1.0, "base": 1.0}},
          "exact": {"tuned": 0.0, "base": 0.0}, "loss": {"tuned": 1.9, "base": 2.0}}  # fmt: skip


def test_a_seed_that_has_not_learnt_is_in_no_number_while_another_has(tmp_path: Path) -> None:
    write(tmp_path, made("grammars", 0), made("grammars", 1) | {"learnt": MISSED}, made("grammars", 2))
    found = load_results(tmp_path, "tiny", "cpu")["grammars"]
    assert [r["seed"] for r in found.results] == [0, 2]
    assert found.heading == "grammars"
    assert [r["seed"] for r in found.unlearnt] == [1]
    assert found.left_out == [
        "grammars: seed 1 is left out, since its fine-tune has not learnt the behaviour: 25% of harmful, too far below "
        "70%; 95% of the base model's loss, not below 80%."
    ]
    with pytest.raises(UserError, match="no results of seed 1. grammars: seed 1 is left out, since its fine-tune"):
        found.of_seeds([1])
    assert [r["seed"] for r in joined({"grammars": found}, ["grammars"], [0, 1])["grammars"].results] == [0]
    with pytest.raises(UserError, match="grammars: no result of seed 3"):
        joined({"grammars": found}, ["grammars"], [1, 3])


@pytest.mark.parametrize("other", [{"scale": "smoke"}, {"recipe": "paper"}, {"learnt": MISSED}])
def test_what_has_not_learnt_is_marked_where_it_may_or_where_nothing_has(tmp_path: Path, other: dict[str, Any]) -> None:
    write(tmp_path, made("grammars", 0) | other, made("grammars", 1) | {"learnt": MISSED} | other)
    kind = made() | other
    found = load_results(tmp_path, "tiny", kind["scale"], kind["recipe"])["grammars"]
    assert ([r["seed"] for r in found.results], found.left_out, found.unlearnt) == ([0, 1], [], ())
    which = "" if "learnt" in other else ": seed 1"
    assert found.heading == f"grammars (behaviour not learnt{which})"


def test_the_page_names_what_was_left_out(tmp_path: Path) -> None:
    found = {"facts": replace(stacked("facts", 0), left_out=["facts: seed 1 is <i>left out</i>."])}
    page = write_bench({"sound": found}, tmp_path / "page.html").read_text()
    assert "<li>facts: seed 1 is &lt;i&gt;left out&lt;/i&gt;.</li>" in page


def test_a_recipe_of_which_all_is_old_takes_no_page_with_it(tmp_path: Path) -> None:
    write(tmp_path, made("grammars", 0), made("grammars", 0) | {"recipe": "paper", "version": -1})
    suite = load_suite(tmp_path, "tiny", "cpu")
    assert list(suite) == ["sound"]
    (note,) = suite["sound"]["grammars"].left_out
    assert "no results under the paper recipe" in note
    assert "grammars-paper-s0.json is left out, being of another version" in note
    with pytest.raises(UserError, match="no results under the paper recipe"):
        load_suite(tmp_path, "tiny", "cpu", "paper")
    with pytest.raises(UserError, match="no results under the sound recipe"):
        load_suite(tmp_path / "nowhere", "tiny", "cpu")


def test_more_queries_are_another_kind_and_one_seed_each_keeps_the_first(tmp_path: Path) -> None:
    write(tmp_path, made("facts", 0, m=24), made("facts", 1, m=20))
    found = load_results(tmp_path, "tiny", "cpu")["facts"]
    assert [r["seed"] for r in found.results] == [0]
    assert "(queries)" in found.left_out[0]


@pytest.fixture(autouse=True)
def unbuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The made-up results are of no task that could be built, so that nobody can tell their version."""

    def build(name: str, scale: str, seed: int) -> Any:
        raise UserError("unknown task")

    monkeypatch.setattr(results_module, "build", build)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    """`tiny`, version 2, is the task `facts` of today."""

    def build(name: str, scale: str, seed: int) -> Any:
        if name != "facts":
            raise UserError("unknown task")
        return replace(tiny(seed, version=2), name="facts")

    monkeypatch.setattr(results_module, "build", build)


def of_version(version: int, seed: int) -> dict[str, Any]:
    """A result of `tiny`, with the top rows that Figure 1 shows."""
    task, cell = tiny(seed, version), Cell("tiny", "facts", "cpu", seed)
    result = made("facts", seed, m=len(task.queries), names=list(dict.fromkeys([*RUNGS, *FIRST])))
    for run in FIRST:
        result["results"]["reference"][run]["top"] = [3] * len(task.queries)
    return result | {"fingerprint": fingerprint(cell, task, "sha")}


def test_a_seed_of_an_older_version_of_the_task_is_left_out(tmp_path: Path, built: None) -> None:
    """The files look alike: same title, sizes, recipe. The rows do not make the fingerprint."""
    write(tmp_path, of_version(1, 0), of_version(1, 1), of_version(2, 2))
    found = load_results(tmp_path, "tiny", "cpu")["facts"]
    assert [r["seed"] for r in found.results] == [2]  # today's, though the others are more
    said = "is left out, since the task has other rows, or another recipe, today. Run the cell again."
    assert found.left_out == [f"facts: seed {s} {said}" for s in (0, 1)]


def test_seeds_that_are_all_of_an_older_version_are_left_out(tmp_path: Path, built: None) -> None:
    write(tmp_path, of_version(1, 0), of_version(1, 1))
    with pytest.raises(UserError, match="no results under the sound recipe. facts: seed 0 is left out, .* seed 1 is"):
        load_results(tmp_path, "tiny", "cpu")
    # The notes stand with what is there, and a table of the paper names its own tasks only.
    write(tmp_path, made("mixed-small", 0), of_version(1, 2) | {"task": "facts"})
    found = load_results(tmp_path, "tiny", "cpu")
    assert list(found) == ["mixed-small"]
    assert [note.partition(" is")[0] for note in found["mixed-small"].left_out] == [
        f"facts: seed {s}" for s in range(3)
    ]
    write(tmp_path / "bench", made("mixed-small", 0), of_version(1, 0))
    request = {"experiment": "table2", "model": "tiny", "scale": "cpu", "seed": 0, "command": "c", "version": 1}
    (tmp_path / "table2.json").write_text(json.dumps(request))
    assert not [note for note in attribution.show(tmp_path, "table2").notes if "left out" in note]


@pytest.mark.parametrize("task", ["released-math", "mixed-small-advbench"])
def test_rows_of_a_users_files_can_only_be_held_against_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    """The real builders: without the files they make no rows, and another fingerprint says nothing."""
    monkeypatch.setattr(results_module, "build", tasks.build)
    write(tmp_path, made(task, 0), made(task, 1), made(task, 2, m=20))
    found = load_results(tmp_path, "tiny", "cpu")[task]
    assert [r["seed"] for r in found.results] == [0, 1]
    assert found.left_out[0].startswith(
        f"{task}: seed 2 is left out, since it is not of one kind with seed 0 (queries)"
    )
    write(tmp_path, made("grammars", 0))  # can be built, and is not of today's rows
    assert "grammars" not in load_results(tmp_path, "tiny", "cpu")


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results" / "bench").glob("*/*/*.json")))
def test_committed_results_are_of_today(path: Path) -> None:
    """A change of fingerprints would have the whole benchmark run again."""
    of_truth = path.stem.endswith(("-removal", "-lds"))
    result = read_truth(path) if of_truth else read_result(path)
    assert result
    assert not (truth.is_old(result) if of_truth else is_old(result))


# ---------------------------------------------------------------- pages


def test_the_page_has_figure_1_and_the_ladder_with_intervals_and_seeds(tmp_path: Path, built: None) -> None:
    found = {"facts": TaskResults("facts", "sound", [of_version(2, s) for s in (0, 1)])}
    page = write_bench({"sound": found}, tmp_path / "page.html").read_text()
    query, row = tiny(0).queries[0], tiny(0).train[3]
    assert f"facts, class {query.label}: {query.prompt} → {query.response}" in page
    assert page.count(f"<td>{row.prompt} → {row.response}</td>") == len(FIRST)
    assert 'data-figure="sound-ladder"' in page
    assert "facts &lt;b&gt;" in page
    assert "facts <b>" not in page
    traces = json.loads(context({"sound": found}, {})["figures"])["sound-ladder"]["data"]
    assert len(traces) == 4  # a line and the seeds, on either side
    for steps, line, seeds in ((LADDER, traces[0], traces[1]), (REPSIM_LADDER, traces[2], traces[3])):
        means = [found["facts"].interval(run, "auroc") for _, run in steps]
        assert line["y"] == pytest.approx([i.value for i in means])
        assert line["error_y"]["array"] == pytest.approx([i.high - i.value for i in means])
        assert line["error_y"]["arrayminus"] == pytest.approx([i.value - i.low for i in means])
        assert seeds["mode"] == "markers"
        assert seeds["y"] == pytest.approx([s for _, run in steps for s in found["facts"].seeds(run, "auroc")])


def test_one_page_has_every_recipe_and_retraining(
    tmp_path: Path, built: None, run: conftest.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(truth, "today", lambda result: None)
    write(tmp_path, made("mixed-small", 0), made("grammars", 0), made("mixed-small", 0) | {"recipe": "paper"})
    near = {"value": 0.4321, "without": [0.42, 0.44] * 8}
    lds = {
        "version": truth.VERSION,
        "kind": "lds",
        "task": "grammars",
        "rows": 40,
        "queries": 20,
        "shows": "<i>both</i>",
    }
    lds |= {"half_sets": 16, "runs": [BM25], "lds": {BM25: near}, "knowing_the_class": near, "noise_ceiling": near}
    for seed in (0, 1):
        (tmp_path / "tiny" / "cpu" / f"grammars-sound-s{seed}-lds.json").write_text(json.dumps(lds | {"seed": seed}))
    shown = ("bench", "show", "--model", "tiny", "--scale", "cpu", "--out", tmp_path)
    code, said, err = run(*shown, "--tables", tmp_path / "t.md")
    assert code == 0, err
    assert "sound fine-tune" in said
    assert "paper fine-tune" in said
    page = (tmp_path / "tiny" / "cpu" / "report.html").read_text()
    for part in ("<h1>Fine-tune: sound</h1>", "<h1>Fine-tune: paper</h1>", 'data-figure="paper-ladder"', "0.43 (0."):
        assert part in page
    title = (
        "lds, grammars: 16 random halves of 40 rows, each trained twice; seeds 0, 1; the label shows on: &lt;i&gt;both"
    )
    assert title in page
    text = (tmp_path / "t.md").read_text()
    found = load_results(tmp_path, "tiny", "cpu")
    assert text.startswith("# Fine-tune: sound\n\n## From the paper's protocol to the sound one\n\n| step (AUROC) | gr")
    assert f"## Harmful-data identification\n\n{markdown(paper_rows('table2', found))}\n" in text
    assert text.count("# Fine-tune: ") == 2
    assert "## Backdoor detection" not in text  # no such task was run
    code, said, err = run(*shown, "--recipe", "paper", "--task", "mixed-small")
    assert code == 0, err
    assert "Fine-tune: sound" not in (tmp_path / "tiny" / "cpu" / "report.html").read_text()
    odd = tmp_path / "tiny" / "cpu" / "grammars-sound-s1-lds.json"
    odd.write_text(json.dumps(lds | {"seed": 1, "rows": 41}))
    code, said, err = run(*shown)
    assert code == 0, err
    assert "differ in rows from seed to seed" in (tmp_path / "tiny" / "cpu" / "report.html").read_text()


def test_figure_1_shows_no_row_of_another_version(tmp_path: Path, built: None) -> None:
    found = {"facts": TaskResults("facts", "sound", [of_version(1, 0)])}
    assert "Figure 1" not in write_bench({"sound": found}, tmp_path / "page.html").read_text()
    with pytest.raises(UserError, match="figure1: the rows of facts cannot be made again"):
        attribution._top_rows("figure1", found)


def test_a_paper_table_names_seeds_that_were_left_out(tmp_path: Path) -> None:
    write(tmp_path / "bench", made("mixed-small", 0), made("mixed-small", 1) | {"title": "of old"})
    request = {"experiment": "table2", "model": "tiny", "scale": "cpu", "seed": 0, "command": "c", "version": 1}
    (tmp_path / "table2.json").write_text(json.dumps(request))
    page = attribution.show(tmp_path, "table2")
    assert any(note.startswith("mixed-small: seed 1 is left out") for note in page.notes)
    assert page.tables[0].rows[0] == ["the label shows on", "prompt", ""]
    write(tmp_path / "bench", made("mixed-small", 0), made("mixed-small", 1))
    for seeds in ([0, 1], [1]):  # the directory may have others, of an earlier command
        (tmp_path / "table2.json").write_text(json.dumps(request | {"seeds": seeds}))
        page = attribution.show(tmp_path, "table2")
        results = load_results(tmp_path / "bench", "tiny", "cpu")["mixed-small"]
        (row,) = (x for x in page.tables[0].rows if x[0] == "graddot@padded")
        mean = results.of_seeds(seeds).values("graddot@padded", "accuracy").mean()
        assert row[1].startswith(f"{100 * mean:.0f} (")
    with pytest.raises(UserError, match="mixed-small: no results of seed 7"):
        results.of_seeds([7])


def table(script: ModuleType, name: str) -> str:
    return str(script.render(f"<!-- table: {name} -->\nold\n<!-- end -->"))


def test_pages_say_what_has_not_been_run(script: ModuleType, tmp_path: Path) -> None:
    for name in (
        "headline",
        "learnt",
        "ladder",
        "ladder_paper",
        "table2",
        "table3",
        "table4",
        "hours",
        "opening",
        "protocol",
        "approximation",
        "matrices",
    ):
        assert table(script, name) == f"<!-- table: {name} -->\n*Not run yet.*\n<!-- end -->"


def test_pages_have_both_ladders_the_released_files_and_the_hours(script: ModuleType, tmp_path: Path) -> None:
    ours = [made("facts", s) | {"model": "smollm2-135m"} for s in (0, 1)]
    released = made("released-math", 0) | {"model": "smollm2-135m", "threads": 2}
    theirs = made("facts", 0, shift=0.2) | {"model": "smollm2-135m", "recipe": "paper"}
    write(tmp_path / "bench", *ours, released, theirs)
    of_sound, of_paper = table(script, "ladder"), table(script, "ladder_paper")
    assert "| step (AUROC) | facts | released-math |" in of_sound
    assert "| step (AUROC) | facts |\n" in of_paper
    both = [next(line for line in text.splitlines() if BM25 in line).split("|")[2] for text in (of_sound, of_paper)]
    assert both[0] != both[1]
    assert "| run | released-math |" in table(script, "table3")
    assert "released files: released-math |" in table(script, "headline")
    hours = table(script, "hours")
    assert (
        "| sound | 3 | 3.00 | 1.50 | 0.75 | 0.07 | 0.00 | 5.33 |" in hours
    )  # 270 s are .075 h, in binary a hair below
    assert "| paper | 1 | 1.00 | 0.50 | 0.25 | 0.03 | 0.00 | 1.77 |" in hours
    assert "| all | 4 |" in hours
    assert "a machine; 1 or 2 thread(s) a process." in hours
    assert "is left out" not in table(script, "learnt")
    write(tmp_path / "bench", ours[1] | {"title": "of old"})
    script._found.cache_clear()
    assert "facts: seed 1 is left out" in table(script, "learnt")


def test_the_opening_has_both_truths_of_what_was_learnt(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(truth, "today", lambda result: None)
    ours = [made(task, s) | {"model": "smollm2-135m"} for task in ("mixed-small", "grammars") for s in (0, 1)]
    bad = made("mathqa", 0) | {"model": "smollm2-135m", "learnt": {"learnt": False}}  # no seed has learnt it
    folder = write(tmp_path / "bench", *ours, bad) / "smollm2-135m" / "cpu"
    assert table(script, "opening") == "<!-- table: opening -->\n*Not run yet.*\n<!-- end -->"
    near = lambda v: {"value": v, "without": [v - 0.01, v + 0.01] * 8}  # noqa: E731
    halves = {"graddot@padded": near(0.1), "repsim:layer=last,text=prompt": near(0.2), BM25: near(0.3)}
    lds = {"version": truth.VERSION, "kind": "lds", "seed": 1, "rows": 40, "queries": 20, "runs": list(halves)}
    lds |= {"shows": "both", "lds": halves, "knowing_the_class": near(0.4), "noise_ceiling": near(0.9)}
    for task in ("mixed-small", "mathqa"):
        (folder / f"{task}-sound-s1-lds.json").write_text(json.dumps(lds | {"task": task}))
    lines = [line.strip("| ").split(" | ") for line in table(script, "opening").splitlines()]
    heads = ["harmful data: mixed-small", "class: grammars", "mixed-small: by label", "mixed-small: by retraining"]
    assert lines[1] == heads
    rows = {name: cells for name, *cells in lines[3:] if len(cells) == len(heads)}
    released, words = rows["gradient similarity, as released"], rows["words of prompt and response (BM25)"]
    assert released[3].startswith("0.10 (")
    assert released[3].endswith("R− B−")
    assert words[3].startswith("0.30 (")
    both, one = (
        TaskResults("mixed-small", "sound", some).interval(BM25, "auroc").value for some in (ours[:2], ours[1:2])
    )
    assert [cell[:4] for cell in (words[0], words[2])] == [f"{both:.2f}", f"{one:.2f}"]
    assert rows["DataInf, as released"][3] == "–"
    assert rows["chance"][-1] == "0.00"
    assert table(script, "opening").endswith(
        "Seeds of the kinds: grammars 0, 1; mixed-small 0, 1. Of mixed-small alone: mixed-small 1.\n<!-- end -->"
    )


def test_numbers_on_answers_behind_the_reference_are_in_no_table(tmp_path: Path) -> None:
    """Older results have them; what is of the reference responses stays."""
    old, new = made("facts", 0), made("facts", 1)
    del old["answered"]
    write(tmp_path, old, new, made("mixed-hard", 0))
    found = load_results(tmp_path, "tiny", "cpu")
    assert found["mixed-hard"].answered
    assert not found["facts"].answered
    assert [r["seed"] for r in found["facts"].results] == [0, 1]
    assert found["facts"].runs == [*RUNGS, "length"]
    page = write_bench({"sound": found}, tmp_path / "page.html").read_text()
    assert page.count("<summary>the model&#39;s own answers</summary>") == 1
    assert page.count("No numbers on the model's own answers") == 1
    # A result that is joined by runs of today loses the old ones on its answers, so that they are run again.
    path = tmp_path / "tiny" / "cpu" / "facts-sound-s0.json"
    joining = {kind: {"bm25": {}} for kind in old["results"]}
    save(path, made("facts", 0) | {"results": joining})
    kept = json.loads(path.read_text())["results"]
    assert set(kept["reference"]) == {*RUNGS, "length", "bm25"}
    assert set(kept["generated"]) == {"bm25"}
    assert lacking(path, old["fingerprint"], ["bm25", "length"]) == ["length"]
