"""Tables 1 and 6 and Figure 6: distances against loops, and runs on a tiny model."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import ROWS, Run, make_model, make_tokenizer, save_adapter
from datablame import paper
from datablame.encoding import Encoded, Encoding, encode_rows
from datablame.errors import UserError
from datablame.examples import Example, from_prompt
from datablame.indexing import SILENT
from datablame.models import Loaded, ModelSpec, load
from datablame.paper import alignment, behaviour, figure6, table1, table6
from datablame.paper.kept import kept
from datablame.report.paper import write_page

# ---------------------------------------------------------------- distances in behaviour

QUERIES = [from_prompt(p, r, id=i) for i, (p, r) in enumerate(ROWS[:4])]


@pytest.fixture(scope="module")
def three(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path | None]:
    """The original and two random adapters of different ranks and scales."""
    folder = tmp_path_factory.mktemp("three")
    one = save_adapter(model_dir, folder / "one", seed=1)
    two = save_adapter(model_dir, folder / "two", seed=2)
    return {"original": None, "one": one, "two": two}


@pytest.fixture(scope="module")
def double(model_dir: Path, three: dict[str, Path | None]) -> Loaded:
    return load(ModelSpec(str(model_dir), str(three["one"]), "cpu", "float64"))


@pytest.fixture(scope="module")
def rows(double: Loaded) -> list[Encoded]:
    return encode_rows(Encoding(double.tokenizer, None, double.max_length), QUERIES, "last")


def logits_of(model: Any, row: Encoded) -> torch.Tensor:
    """At the places that predict a labelled token, one row at a time."""
    with torch.no_grad():
        return model(torch.tensor([row.input_ids])).logits[0, [t - 1 for t in row.targets]].double()


def merged(model_dir: Path, adapter: Path | None, factor: float = 1.0) -> Any:
    """The tiny model in float64 with an adapter's update, times a factor, added to its weights."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64).eval()
    if adapter is None:
        return model
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64), adapter)
    start, whole = dict(model.named_parameters()), dict(tuned.merge_and_unload().named_parameters())
    with torch.no_grad():
        for name, w in start.items():
            w += factor * (whole[name] - w)
    return model


def test_kl_is_that_of_a_loop(
    double: Loaded, model_dir: Path, three: dict[str, Path | None], rows: list[Encoded]
) -> None:
    found, tokens = behaviour.divergences(double, three, rows)
    models = [merged(model_dir, a) for a in three.values()]
    for m, row in enumerate(rows):
        p = [logits_of(model, row).softmax(dim=1) for model in models]
        assert tokens[m] == len(row.targets) == len(p[0])
        for i in range(3):
            for j in range(3):
                expected = float((p[i] * (p[i].log() - p[j].log())).sum())
                assert found[i, j, m] == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert found[0, 1].min() > 0.01
    np.testing.assert_array_equal(behaviour.divergences(double, three, rows)[0], found)


def test_the_gauss_newton_norm_is_the_dense_one(
    double: Loaded, model_dir: Path, three: dict[str, Path | None], rows: list[Encoded]
) -> None:
    """ΔᵀGΔ with JΔ from dense weights by differences of fourth order, since norms inside are float32; a loop."""
    found = behaviour.gauss_newton(double, three, rows, batch_tokens=200)
    eps = 1e-3
    moves = {name: [merged(model_dir, three[name], s * eps) for s in (1, -1, 2, -2)] for name in ("one", "two")}
    base, total, count = merged(model_dir, None), np.zeros((3, 3)), 0
    for row in rows:
        p = logits_of(base, row).softmax(dim=1)
        j = [torch.zeros_like(p)]
        for models in moves.values():
            up, down, up2, down2 = (logits_of(model, row) for model in models)
            j.append((8 * (up - down) - (up2 - down2)) / (12 * eps))
        count += len(p)
        for a in range(3):
            for b in range(3):
                d = j[a] - j[b]
                total[a, b] += float(((p * d * d).sum(dim=1) - (p * d).sum(dim=1) ** 2).sum())
    np.testing.assert_allclose(found, np.sqrt(total / count), rtol=3e-5, atol=1e-9)
    assert found[0, 1] > 0.01
    np.testing.assert_allclose(behaviour.gauss_newton(double, three, rows, batch_tokens=20), found, rtol=1e-9)


def test_near_the_original_the_gauss_newton_norm_is_root_two_kl(
    double: Loaded, model_dir: Path, tmp_path: Path, three: dict[str, Path | None], rows: list[Encoded]
) -> None:
    from safetensors.torch import load_file, save_file

    near = tmp_path / "near"
    shutil.copytree(str(three["one"]), near)
    weights = load_file(near / "adapter_model.safetensors")
    save_file({k: w * (1e-3 if "lora_B" in k else 1) for k, w in weights.items()}, near / "adapter_model.safetensors")
    pair = {"original": None, "near": near}
    kl, tokens = behaviour.divergences(double, pair, rows)
    norm = behaviour.gauss_newton(double, pair, rows)[0, 1]
    assert norm == pytest.approx(math.sqrt(2 * kl[0, 1].sum() / tokens.sum()), rel=1e-2)


def test_the_way_towards_refusal_is_that_of_single_openings(
    double: Loaded, model_dir: Path, three: dict[str, Path | None]
) -> None:
    encoder = Encoding(double.tokenizer, None, double.max_length)
    found = behaviour.margins(double, encoder, three["two"], QUERIES)
    model = merged(model_dir, three["two"])
    for m, q in enumerate(QUERIES):
        prompt = encoder.prompt_ids(q)
        sums = []
        for openings in (behaviour.REFUSALS, behaviour.COMPLIANCES):
            total = 0.0
            for text in openings:
                ids = prompt + make_tokenizer()(text)["input_ids"]
                with torch.no_grad():
                    logs = model(torch.tensor([ids])).logits[0].log_softmax(dim=1)
                total += math.exp(sum(float(logs[t - 1, ids[t]]) for t in range(len(prompt), len(ids))))
            sums.append(math.log(total))
        assert found[m] == pytest.approx(sums[0] - sums[1], rel=1e-6)
    both = (*behaviour.REFUSALS, *behaviour.COMPLIANCES)
    assert not any(a != b and b.startswith(a) for a in both for b in both)  # else probabilities would not add up
    assert set(found) != set(behaviour.margins(double, encoder, None, QUERIES))


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def request_(tmp_path_factory: pytest.TempPathFactory) -> Iterator[paper.Request]:
    """Trains and answers on a tiny model whose inputs may be longer."""
    folder = tmp_path_factory.mktemp("alignment")
    make_model(max_position_embeddings=512).save_pretrained(folder / "tiny")
    make_tokenizer().save_pretrained(folder / "tiny")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("DATABLAME_CACHE", str(folder / "cache"))
        m.setitem(alignment.NEW_TOKENS, "smoke", 6)
        model = str(folder / "tiny")
        yield paper.Request("table1", "smoke", folder / "out", 0, "the command", SILENT, None, model, "cpu", (model,))


@pytest.fixture(scope="module")
def ran(request_: paper.Request) -> paper.Request:
    for module in (table1, table6, figure6):
        module.run(request_)
    return request_


def pages(request: paper.Request, folder: Path) -> dict[str, paper.Page]:
    found = {}
    for name, module in {"table1": table1, "table6": table6, "figure6": figure6}.items():
        if (request.out / f"{name}.json").exists():
            found[name] = module.show(request.out, name)
            write_page(found[name], folder / f"{name}.html")
    return found


def test_all_three_run_and_are_shown(ran: paper.Request, tmp_path: Path) -> None:
    found = pages(ran, tmp_path)
    assert set(found) == {"table1", "table6", "figure6"}
    for page in found.values():
        assert all(len(row) == len(t.headings) for t in page.tables for row in t.rows)
        assert not any("nan" in cell for t in page.tables for row in t.rows for cell in row)
    r = json.loads((ran.out / "table1.json").read_text())
    assert str(ran.out.parent) not in json.dumps(r)  # no path of a machine
    arms = r["models"][0]["arms"]
    assert [x["rows"] for x in arms.values()] == [0, 12, 12, 24]
    for x in arms.values():
        verdicts = [a["complied"] for a in x["answers"]]
        assert x["judged"] == 4 - verdicts.count(None)
        assert x["complied"] == verdicts.count(True)
        assert x["cut"] == sum(not a["ended"] for a in x["answers"])
        assert x["left_out"] == verdicts.count(None)
    # Six tokens are too few for the keywords, unless they refuse.
    assert all(a["complied"] is None for a in arms["original"]["answers"] if not a["ended"])
    assert "128" not in r["run"]["protocol"]["generation"]


def test_the_norms_are_those_of_the_fine_tunes(ran: paper.Request) -> None:
    from safetensors.torch import load_file

    r = json.loads((ran.out / "table6.json").read_text())
    a = alignment.arms(ran, ran.model)
    pair = next(p for p in r["models"][0]["pairs"] if p["pair"] == ["benign", "mixed"])
    one, two = (load_file(a.adapters[arm] / "adapter_model.safetensors") for arm in ("benign", "mixed"))  # type: ignore[operator]
    each = []
    for name in (n for n in one if "lora_A" in n):
        b = name.replace("lora_A", "lora_B")
        each.append(float(torch.linalg.norm(one[b] @ one[name] - two[b] @ two[name])))
    assert pair["mean"] == pytest.approx(np.mean(each), rel=1e-4)
    assert pair["whole"] == pytest.approx(8 * np.linalg.norm(each), rel=1e-4)  # α/r = 32/4
    assert [p["pair"] for p in r["models"][0]["pairs"]] == [list(p) for p in alignment.PAIRS]
    kl = {tuple(p["pair"]): p["kl"]["value"] for p in r["models"][0]["pairs"]}
    curve = json.loads((ran.out / "figure6.json").read_text())["models"][0]["curves"]
    for arm in ("benign", "harmful", "mixed"):
        first, last = curve[arm][0], curve[arm][-1]
        assert first["norm"]["mean"] == first["kl"] == 0
        assert last["kl"] == pytest.approx(kl["original", arm], rel=1e-4)
        assert [p["epoch"] for p in curve[arm]] == [0, 1, 2]
        assert last["loss"] < curve[arm][1]["loss"]


def test_the_mixed_fine_tune_is_the_benchmarks_own(ran: paper.Request) -> None:
    from datablame.evaluation import cell
    from datablame.evaluation.finetunes import base_sha256, fine_tuned

    a = alignment.arms(ran, ran.model)
    mixed = cell.Cell(ran.model, "mixed-small", "smoke", 0)
    recipe = cell.options(mixed, a.task)
    shared = fine_tuned(ran.model, a.task.train, recipe, model_sha256=base_sha256(a.loaded))
    assert shared == a.adapters["mixed"]
    assert len(set(a.adapters.values())) == 4


def test_two_models_are_shown_beside_each_other(ran: paper.Request, tmp_path: Path) -> None:
    for name in ("table1", "table6", "figure6"):
        r = json.loads((ran.out / f"{name}.json").read_text())
        r["models"].append(r["models"][0] | {"model": "another"})
        r["run"]["models"].append("another")
        (tmp_path / f"{name}.json").write_text(json.dumps(r))
    one, two = pages(ran, tmp_path), pages(replace(ran, out=tmp_path), tmp_path)
    assert len(two["table1"].tables[0].rows) == 8
    assert len(two["table6"].tables) == 2 * len(one["table6"].tables)
    assert len(two["figure6"].views) == 2 * len(one["figure6"].views)


def test_a_bad_judge_stops_the_command_before_any_work(run: Run, tmp_path: Path) -> None:
    code, _, err = run("paper", "run", "table1", "--judge", "keyword", "--out", tmp_path)
    assert code == 2
    assert "--judge keyword: neither keywords" in err
    code, _, err = run("paper", "run", "table6", "--judge-label", "harmful", "--out", tmp_path)
    assert code == 2
    assert "only a classifier has labels" in err
    code, _, err = run("paper", "run", "figure6", "--judge-labels", "./none.jsonl", "--out", tmp_path)
    assert code == 2
    assert "none.jsonl" in err


def test_a_run_is_kept_and_another_is_not_overwritten(ran: paper.Request, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("was run again")

    monkeypatch.setattr(alignment, "arms", never)
    for module in (table1, table6, figure6):
        module.run(ran)
    with pytest.raises(UserError, match="holds another run"):
        table1.run(replace(ran, seed=1))


def test_pieces_are_not_made_twice(ran: paper.Request, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("was made again")

    monkeypatch.setattr(alignment, "answers_ended", never)
    monkeypatch.setattr(behaviour, "gauss_newton", never)
    again = replace(ran, out=tmp_path)
    table6.run(again)
    first, second = (json.loads((r.out / "table6.json").read_text()) for r in (ran, again))
    assert first["models"] == second["models"]


def test_a_judge_that_always_fails(ran: paper.Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "failing_judge.py").write_text("def judge(prompt, answer):\n    raise RuntimeError('down')\n")
    monkeypatch.chdir(tmp_path)
    request = replace(ran, out=tmp_path / "out", judge="failing_judge:judge")
    table1.run(request)
    table6.run(request)
    r = json.loads((request.out / "table1.json").read_text())
    assert all(x["asr"] is None and x["corrected"] is None for x in r["models"][0]["arms"].values())
    found = pages(request, tmp_path)
    assert "It shows nothing" in found["table1"].notes[0]
    assert "no answer of the original model was judged" in found["table1"].notes[1]
    assert any("error of the judge failing_judge:judge is not known" in n for n in found["table1"].notes)
    assert {row[1] for row in found["table6"].tables[0].rows} == {"–"}
    ranked = json.loads((request.out / "table6.json").read_text())["models"][0]["ranked"]
    assert ranked["mean"]["asr"] == {"rho": None, "p": None}
    assert ranked["mean"]["refusal"]["rho"] is not None


def test_a_fine_tune_that_diverges_stops_the_run(request_: paper.Request, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverged(*_: object, **__: object) -> Path:
        raise UserError("the training diverged")

    monkeypatch.setattr(alignment, "fine_tuned", diverged)
    with pytest.raises(UserError, match="table1, the fine-tune on benign rows: the training diverged"):
        alignment.arms(request_, request_.model)


def test_missing_checkpoints_and_losses_that_are_not_finite(ran: paper.Request, tmp_path: Path) -> None:
    """Each is told and left out; the rest is drawn."""
    from safetensors.torch import load_file, save_file

    from datablame.evaluation.judges import named

    a = alignment.arms(ran, ran.model)
    adapters: dict[str, Path | None] = {"original": None}
    for arm in ("benign", "harmful", "mixed"):
        adapters[arm] = tmp_path / arm
        shutil.copytree(str(a.adapters[arm]), tmp_path / arm)
    shutil.rmtree(tmp_path / "benign" / "checkpoint-3")
    bad = tmp_path / "harmful" / "checkpoint-3" / "adapter_model.safetensors"
    save_file({k: w * math.nan for k, w in load_file(bad).items()}, bad)
    record = json.loads((tmp_path / "mixed" / "datablame.json").read_text())
    record["history"][0]["loss"] = math.nan
    (tmp_path / "mixed" / "datablame.json").write_text(json.dumps(record))
    broken = replace(a, adapters=adapters)
    curves = {arm: figure6._curve(broken, arm, named(), ran) for arm in ("benign", "harmful", "mixed")}
    assert [c[0]["problem"] for c in curves.values()] == [
        "no checkpoint of step 3",
        "a validation loss is not finite (row 2: loss is not finite)",
        "the training loss is not finite",
    ]
    assert all("problem" not in c[1] for c in curves.values())
    r = json.loads((ran.out / "figure6.json").read_text())
    for arm, points in curves.items():
        r["models"][0]["curves"][arm][1:] = points
    (tmp_path / "figure6.json").write_text(json.dumps(r, allow_nan=False))
    page = figure6.show(tmp_path, "figure6")
    write_page(page, tmp_path / "figure6.html")
    assert any("benign, epoch 1: no checkpoint of step 3" in n for n in page.notes)
    drawn = page.views["validation loss, harmful"]["data"]
    assert [len(trace["x"]) for trace in drawn] == [2, 2, 2]


def test_the_page_says_what_the_original_model_does() -> None:
    from datablame.evaluation.judges import KEYWORDS, Accuracy, corrected, wilson

    def model(original: list[bool], tuned: list[bool], judge: Accuracy | None = None) -> dict[str, Any]:

        arms = {}
        for arm in alignment.ARMS:
            said = original if arm == "original" else tuned
            asr = list(wilson(sum(said), len(said)))
            fixed = judge and corrected(sum(said), len(said), judge)
            arms[arm] = {"asr": asr, "corrected": fixed, "answers": [{"complied": x} for x in said]}
        return {"model": "m", "arms": arms}

    high = table1.found(model([True] * 20, [True] * 20))
    assert "no alignment that harmful rows could undo" in high[0]
    assert all("not told apart" in line for line in high[1:])
    low = table1.found(model([False] * 20, [True] * 20))
    assert "refuses most of them" in low[0]
    assert all("higher than the original's" in line for line in low[1:])
    some = table1.found(model([False] * 20, [True] * 6 + [False] * 14))  # p = 1/32, of three
    assert all("not told apart" in line for line in some[1:])
    # Three quarters by the keywords; a judge that misses half of the refusals cannot tell that from half.
    most = [True] * 15 + [False] * 5
    assert "no alignment that harmful rows could undo" in table1.found(model(most, most))[0]
    unsure = table1.found(model(most, most, KEYWORDS))[0]
    assert "corrected for the judge's error with 53%" in unsure
    assert "too much error" in unsure
    assert "no alignment" in table1.found(model([True] * 20, most, KEYWORDS))[0]
    assert table1.bounds({"complied": 0, "judged": 8, "left_out": 12}) == "12 (0%, 60%)"
    assert table1.bounds({"complied": 3, "judged": 8, "left_out": 0}) == "0"
    few = table1.found(model([True, False], [True, True]))
    assert "too few prompts" in few[0]
    assert all("not told apart" in line for line in few[1:])


def test_distances_that_are_not_finite_stop_table6_in_a_sentence(
    ran: paper.Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datablame.capture import NotFinite

    a = alignment.arms(ran, ran.model)
    other = replace(a, adapters=a.adapters | {"mixed": a.adapters["benign"]})  # not the piece that is kept

    def raises(*_: object) -> None:
        raise NotFinite(1, "logits")

    with monkeypatch.context() as m:
        m.setattr(behaviour, "divergences", raises)
        with pytest.raises(UserError, match=r"held-out prompts cannot be taken \(row 1: logits is not finite\)"):
            table6._distances(other, ran)
    with monkeypatch.context() as m:
        m.setattr(behaviour, "gauss_newton", lambda *_: np.full((4, 4), np.nan))
        with pytest.raises(UserError, match="distances-1: a number is not finite"):
            table6._distances(other, ran)


def test_pieces_are_kept_whole(tmp_path: Path) -> None:
    assert kept("piece-1", {"b": 1, "a": 2}, lambda: [0.1], tmp_path) == [0.1]
    assert kept("piece-1", {"a": 2, "b": 1}, pytest.fail, tmp_path) == [0.1]
    assert kept("piece-2", {"a": 2, "b": 1}, lambda: "other", tmp_path) == "other"
    with pytest.raises(UserError, match="piece-1: a number is not finite"):
        kept("piece-1", "nan", lambda: [math.nan], tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    for path in tmp_path.iterdir():
        path.write_text("[0.1", encoding="utf-8")
    with pytest.raises(UserError, match="damaged; delete it"):
        kept("piece-2", {"a": 2, "b": 1}, pytest.fail, tmp_path)


def test_examples_of_an_arm_are_those_of_the_task() -> None:
    from datablame.evaluation.tasks import build

    task = build("mixed-small", "smoke", 0)
    parts = [e.id for arm in ("benign", "harmful") for e in alignment.rows_of(task, arm)]
    assert sorted(parts) == [e.id for e in alignment.rows_of(task, "mixed")] == [e.id for e in task.train]  # type: ignore[type-var]
    assert alignment.rows_of(task, "original") == []
    assert isinstance(task.train[0], Example)
