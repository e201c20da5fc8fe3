"""The benchmark's cells on a tiny model: stages, files, what is kept and what is made again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import conftest
from bench_cases import METHODS, one_task, run, run_command, tiny
from datablame.errors import UserError
from datablame.evaluation import bench as bench_module
from datablame.evaluation import cell as cell_module
from datablame.evaluation import finetunes, scoring, tasks
from datablame.evaluation.cell import FEATURES, Cell
from datablame.evaluation.leak import hidden_leak
from datablame.evaluation.metrics import METRICS
from datablame.evaluation.result_files import failures, result_path
from datablame.evaluation.results import load_results
from datablame.evaluation.suites import runs
from datablame.evaluation.tables import HEADINGS
from datablame.models import ModelSpec, load
from datablame.report.bench import write_bench
from datablame.store import FeatureStore

__all__ = ["one_task", "run_command"]  # fixtures; every test here uses the first


def test_a_cell_from_rows_to_a_page_and_not_twice(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    (path,) = run(model_dir, out)
    result = json.loads(path.read_text())
    assert path == result_path(out, Cell(str(model_dir), "tiny", "smoke", 0))
    assert set(result["results"]) == {"reference", "generated"}
    wanted = runs("all", METHODS)
    assert len(wanted) == 4 * 4 + 2
    for kind in result["results"].values():
        assert list(kind) == wanted
        assert not [v["error"] for v in kind.values() if "error" in v]
    one = result["results"]["reference"]["gradcos@response"]
    assert len(one["accuracy"]) == 4
    assert all(np.isfinite(one[m]).all() for m in HEADINGS)
    assert one["top"] == [int(t) for t in one["top"]]
    assert result["learnt"]["loss"]["base"] > 0
    assert result["seconds"]["all"] == pytest.approx(
        sum(v for k, v in result["seconds"].items() if k != "all"), abs=0.1
    )
    assert set(result["seconds"]) == {"tune", "answers", "features", "scores", "all"}
    assert result["model"] == model_dir.name  # and no path of this machine
    assert str(model_dir.parent) not in path.read_text()
    # No features are left; the adapter is with all other fine-tunes, with its checkpoints.
    (folder,) = (tmp_path / "cache" / "bench").iterdir()
    assert {p.name for p in folder.iterdir()} == {
        "train.jsonl",
        "queries.jsonl",
        "answers.json",
        "scores.npz",
        "seconds.json",
        "lock",
    }
    (tuned,) = (tmp_path / "cache" / "finetunes").iterdir()
    assert finetunes.snapshots(tuned / "adapter")

    # A second call runs nothing; a new method runs alone, and keeps the others.
    monkeypatch.setattr(bench_module, "run_cell", lambda *a, **k: pytest.fail("the cell was run again"))
    run(model_dir, out)
    monkeypatch.undo()
    monkeypatch.setattr(bench_module, "build", lambda name, scale, seed, **kw: tiny(seed))
    monkeypatch.setattr(bench_module, "takes", lambda name: [])
    monkeypatch.setenv("DATABLAME_CACHE", str(tmp_path / "cache"))
    before = json.loads(path.read_text())["results"]["reference"]
    run(model_dir, out, methods=f"{METHODS},length")
    after = json.loads(path.read_text())["results"]["reference"]
    assert set(after) == {*before, "length"}
    assert after["graddot@padded"] == before["graddot@padded"]
    for numbers in after.values():
        assert {metric: told[0] for metric, told in numbers["interval95"].items()} == {
            metric: pytest.approx(np.mean(numbers[metric]), abs=1e-3) for metric in METRICS
        }

    found = load_results(out, str(model_dir), "smoke")
    page = write_bench({"sound": found}, tmp_path / "page.html").read_text()
    assert "Yes or no &lt;b&gt;" in page
    assert "Yes or no <b>" not in page
    assert "https://" not in page.split("<script>")[0]
    with pytest.raises(UserError, match="no results under the paper recipe"):
        load_results(out, str(model_dir), "smoke", "paper")


def test_a_result_keeps_the_residual_of_a_solver(model_dir: Path, tmp_path: Path) -> None:
    """More steps leave less; what solves nothing has none; stores of another version in the cache are not read."""
    steps = "lissa:steps=1@response,lissa:steps=1000@response,graddot@response"
    (path,) = run(model_dir, tmp_path / "out", methods=steps, keep=True)
    found = json.loads(path.read_text())["results"]["reference"]
    one, many = (found[f"lissa:steps={k}@response"]["residual"] for k in (1, 1000))
    assert 0 < many < one <= 1
    assert "residual" not in found["graddot@response"]
    (folder,) = (tmp_path / "cache" / "bench").iterdir()
    path.unlink()
    old = folder / "features-1"
    (folder / f"{FEATURES}-response").rename(old)
    manifest = old / "train" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"schema": ', '"schema": 1'))
    run(model_dir, tmp_path / "out", methods=steps)
    assert json.loads(path.read_text())["results"]["reference"]["graddot@response"] | {"seconds": 0} == (
        found["graddot@response"] | {"seconds": 0}
    )


def test_scores_are_those_of_the_stores_they_come_from(model_dir: Path, tmp_path: Path) -> None:
    """The padded view is not the response's; `all` is the sum; what is in the file is the metric of the matrix."""
    (path,) = run(model_dir, tmp_path / "out", keep=True)
    (folder,) = (tmp_path / "cache" / "bench").iterdir()
    from datablame.evaluation import metrics, views

    stores = folder / f"{FEATURES}-response-prompt-padded"
    train, queries = FeatureStore.open(stores / "train"), FeatureStore.open(stores / "reference")
    dots = {}
    for view in views.VIEWS:
        g, v = views.gradients(train, view), views.gradients(queries, view)
        dots[view] = sum((v[b] @ g[b].T).double() for b in g).numpy()
    mean = {b: x / 127 for b, x in train.features("padded-gradients").items()}
    assert all(torch.allclose(mean[b], x) for b, x in views.gradients(train, "padded").items())
    kept = scoring.read_matrices(folder / "scores.npz")
    result = json.loads(path.read_text())["results"]["reference"]
    for view, want in dots.items():
        np.testing.assert_allclose(kept[f"graddot@{view}"], want, rtol=1e-3, atol=1e-4 * np.abs(want).max())
        values = metrics.auroc(kept[f"graddot@{view}"], tiny().truth)
        assert result[f"graddot@{view}"]["auroc"] == pytest.approx(values, abs=1e-4)
    assert np.abs(dots["all"] - dots["response"]).max() > 1e-3 * np.abs(dots["all"]).max()
    assert np.abs(dots["all"] - 127**2 * dots["padded"]).max() > 1e-3 * np.abs(dots["all"]).max()


def test_scores_that_are_there_are_not_made_again(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an interrupted cell alone; what is half-written is made again, and so is what failed."""
    wanted = ["graddot@response", "lissa:steps=2@response", "bm25"]
    straight = json.loads(run(model_dir, tmp_path / "straight", methods=",".join(wanted))[0].read_text())["results"]
    monkeypatch.setenv("DATABLAME_CACHE", str(tmp_path / "second"))
    made: list[str] = []
    score = scoring._scored

    def counted(name: str, *args: Any) -> Any:
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append(name)
        return score(name, *args)

    monkeypatch.setattr(scoring, "_scored", counted)
    with pytest.raises(KeyboardInterrupt):
        run(model_dir, tmp_path / "out", methods=",".join(wanted))
    assert made == [*wanted, *wanted[:2]]
    files = sorted((tmp_path / "second" / "bench").glob("*/scored-*/reference/*.npz"))
    assert len(files) == 3
    files[0].write_bytes(files[0].read_bytes()[:100])
    files[1].write_bytes(files[2].read_bytes())  # of another run
    made.clear()
    monkeypatch.setattr(scoring, "_scored", lambda name, *args: made.append(name) or score(name, *args))
    (path,) = run(model_dir, tmp_path / "out", methods=",".join(wanted))
    assert len(made) == 3
    assert made[-1] == "bm25"  # of the answers
    resumed = json.loads(path.read_text())["results"]
    for kind, found in straight.items():
        for name, values in found.items():
            assert resumed[kind][name] | {"seconds": 0} == values | {"seconds": 0}
    assert resumed["reference"]["lissa:steps=2@response"]["residual"] > 0
    assert not list((tmp_path / "second" / "bench").glob("*/scored-*"))


def test_the_papers_own_fine_tune(model_dir: Path, tmp_path: Path) -> None:
    """Padding and prompt in the training loss: another adapter, another file, the same runs."""
    paths = run(model_dir, tmp_path / "out", recipes=["sound", "paper"], methods="graddot,bm25")
    assert [p.name for p in paths] == ["tiny-sound-s0.json", "tiny-paper-s0.json"]
    sound, paper = (json.loads(p.read_text()) for p in paths)
    assert paper["recipe_options"]["batch"] == 32
    assert paper["fingerprint"] != sound["fingerprint"]
    records = [json.loads(p.read_text()) for p in (tmp_path / "cache" / "finetunes").glob("*/adapter/datablame.json")]
    encodings = sorted((r["encoding"]["pad_to"] or 0, r["encoding"]["loss_on"]) for r in records)
    assert encodings == [(0, "response"), (128, "all")]


def test_what_a_base_model_gives_away_is_the_control_of_the_cell(
    run_command: conftest.Run, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {side: f"repsim-base:layer=middle,text={side}" for side in ("prompt", "response")}
    (path,) = run(model_dir, tmp_path / "out", methods=",".join(wanted.values()))
    found = json.loads(path.read_text())["results"]["reference"]
    base = load(ModelSpec(str(model_dir)))
    leak = hidden_leak(tiny(), base)
    for side, name in wanted.items():
        assert leak[side] == pytest.approx(np.mean(found[name]["auroc"]), abs=1e-4)
    assert leak["prompt"] != leak["response"]
    monkeypatch.setattr(tasks, "build", lambda *a, **k: tiny())
    code, said, err = run_command("bench", "tasks", "grammars", "--model", model_dir)
    assert code == 0, err
    assert f"prompt {leak['prompt']:.2f}, response {leak['response']:.2f}" in said.partition("not fine-tuned")[2]


def test_features_that_were_to_be_kept_stay_for_later_runs(model_dir: Path, tmp_path: Path) -> None:
    run(model_dir, tmp_path / "out", methods="graddot@response", keep=True)
    (cell,) = (tmp_path / "cache" / "bench").iterdir()
    (features,) = cell.glob("features-*")
    before = {p: p.stat().st_mtime_ns for p in features.rglob("*") if p.is_file()}
    run(model_dir, tmp_path / "out", methods="gradcos@response")  # not told, as a figure's run of the cell is not
    assert before == {p: p.stat().st_mtime_ns for p in features.rglob("*") if p.is_file()}
    run(model_dir, tmp_path / "other", methods="graddot@response", seeds=[1])
    (other,) = ((tmp_path / "cache" / "bench") / c for c in {c.name for c in cell.parent.iterdir()} - {cell.name})
    assert not list(other.glob("features-*"))


def test_every_command_that_made_runs_of_a_cell_is_kept(model_dir: Path, tmp_path: Path) -> None:
    (path,) = run(model_dir, tmp_path / "out", methods="bm25,length")
    first = json.loads(path.read_text())["command"]
    assert first.endswith("--methods bm25,length")
    run(model_dir, tmp_path / "out", methods="bm25")  # has nothing to do
    assert json.loads(path.read_text())["command"] == first
    run(model_dir, tmp_path / "out", methods="bm25,length,random", suite="sound")
    run(model_dir, tmp_path / "out", methods="bm25,length,random", suite="sound")
    more = first.replace("bm25,length", "bm25,length,random").replace(" --methods", " --suite sound --methods")
    assert json.loads(path.read_text())["command"] == f"{first} && {more}"


def test_views_are_captured_where_a_run_asks_for_them(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = Cell(str(model_dir), "tiny", "smoke", 0)
    with pytest.raises(UserError, match=r"row 0 \(id 0\): under the view padded, .* is not finite"):
        cell_module.run_cell(cell, tiny(), ["graddot@padded"], tmp_path / "b", "sha", dtype="float64")
    # The padded one is captured where a run asks for it, and not else; `all` needs the prompt's.
    found = cell_module.run_cell(cell, tiny(), ["bm25", "graddot@all"], tmp_path / "b", "sha", dtype="float64")
    assert not failures(found)
    (stores,) = (tmp_path / "b").glob(f"*/{FEATURES}-response-prompt")
    assert not FeatureStore.open(stores / "train").features("padded-gradients")
    # Kept stores with more views serve runs that ask for fewer.
    monkeypatch.setattr(cell_module.views, "capture_views", lambda *a: lambda *rows: pytest.fail("captured again"))
    found = cell_module.run_cell(cell, tiny(), ["graddot@response"], tmp_path / "b", "sha", dtype="float64")
    assert not failures(found)
    sets = ["train", "reference", "generated"]
    assert cell_module.stores_with(stores.parent, ["prompt"], sets) == (stores, ("prompt",))
    more = stores.with_name(f"{FEATURES}-response-prompt-padded")
    assert cell_module.stores_with(stores.parent, ["prompt", "padded"], sets) == (more, ("prompt", "padded"))


def test_a_behaviour_that_was_not_learnt_fails_the_run_above_smoke(model_dir: Path, tmp_path: Path) -> None:
    run(model_dir, tmp_path / "a", methods="bm25")
    with pytest.raises(UserError, match="tiny-sound-s0: the behaviour was not learnt"):
        run(model_dir, tmp_path / "b", methods="bm25", scale="cpu")
    assert (tmp_path / "b" / model_dir.name / "cpu" / "tiny-sound-s0.json").exists()
    run(model_dir, tmp_path / "b", methods="bm25", scale="cpu", strict=False)  # tables mark it


@pytest.mark.parametrize(
    ("tuned", "base", "n", "few"),
    [
        (28, 3, 40, False),  # as many as are asked for
        (27, 3, 40, False),  # 40 queries cannot tell this from 28
        (22, 3, 40, True),  # that they can
        (17, 20, 20, False),  # three fewer than the base model: p is 1/8
        (15, 20, 20, True),  # five fewer: 1/32
        (20, 0, 20, False),
        (0, 2, 2, True),  # fewer than half, whatever so few queries can tell
        (1, 0, 2, False),
        (2, 0, 2, False),
    ],
)
def test_a_share_is_too_low_where_the_queries_can_tell(tuned: int, base: int, n: int, few: bool) -> None:
    shows = lambda k: [j < k for j in range(n)]  # noqa: E731
    assert cell_module.too_few(shows(tuned), shows(base)) is few


def test_what_was_not_learnt_says_why() -> None:
    groups = {"harmful": {"tuned": 0.75, "base": 0.8}, "benign": {"tuned": 0.0, "base": 1.0}}
    learnt = {
        "learnt": False,
        "behaves": {"tuned": 0.4, "base": 0.9},
        "by_group": groups,
        "missed": ["harmful"],
        "loss": {"tuned": 2.04, "base": 2.5},
    }
    said = bench_module._learnt_line({"main": ["harmful"], "learnt": learnt})
    assert said.startswith(
        "behaviour not learnt (75% of harmful, too far below 80%; 82% of the base model's loss, not below 80%): "
        "40% of the"
    )
    learnt["loss"] = {"tuned": 1.0, "base": 2.5}
    assert "loss, not below" not in bench_module._learnt_line({"main": ["harmful"], "learnt": learnt})
    assert bench_module._learnt_line({"main": ["harmful"], "learnt": learnt | {"learnt": True}}).startswith(
        "learnt: 40%"
    )


def test_the_tokenizer_and_its_template_make_another_base(model_dir: Path, tmp_path: Path) -> None:
    def of(**changes: str) -> str:
        copy = tmp_path / "-".join(["copy", *changes])
        shutil.copytree(model_dir, copy)
        settings = json.loads((copy / "tokenizer_config.json").read_text())
        (copy / "tokenizer_config.json").write_text(json.dumps(settings | changes))
        (copy / "chat_template.jinja").unlink(missing_ok=True)
        return finetunes.base_sha256(load(ModelSpec(str(copy))))

    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    same, other = of(chat_template=template), of(chat_template=template + "!", a="")
    assert same != other
    assert same == of(chat_template=template, b="")
    assert (
        load(ModelSpec(str(tmp_path / "copy-chat_template"))).model_sha256
        == load(ModelSpec(str(model_dir))).model_sha256
    )
