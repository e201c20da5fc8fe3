"""`compare`: its numbers by plain formulas, its files, its page, and what it says when something fails."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

import datablame
from conftest import ROWS, write_jsonl
from datablame import cli, comparing
from datablame.comparing import Comparison, clustered, parse_dampings, relative_errors
from datablame.errors import UserError
from datablame.methods import parse

DAMPINGS = [1e-2, 1.0]
METHODS = ["exact-block", "datainf", "lissa:steps=2", "graddot", "gradcos", "repsim", "bm25", "gradnorm"]
NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def queries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"id": f"{NASTY}{i}", "prompt": p, "response": r} for i, (p, r) in enumerate(ROWS[:3])]
    return write_jsonl(tmp_path_factory.mktemp("q") / "q.jsonl", rows)


@pytest.fixture(scope="module")
def compared(built: Path, queries: Path) -> Comparison:
    return datablame.compare(built, queries, methods=METHODS, dampings=DAMPINGS)


def test_a_sweep_gives_what_single_runs_give(compared: Comparison, built: Path, queries: Path) -> None:
    """`exact` is the reference although nobody asked for it, and it is not listed."""
    assert list(dict.fromkeys(r.method for r in compared.rows)) == METHODS
    damped = ["exact", "exact-block", "datainf", "lissa:steps=2"]
    for d in DAMPINGS:
        specs = {s: f"{s}{',' if ':' in s else ':'}damping={d}" for s in damped} | {"graddot": "graddot"}
        single = datablame.trace(built, queries, methods=list(specs.values()))
        for s, spec in specs.items():
            np.testing.assert_allclose(compared.scores[s][d], single.matrix(spec), rtol=1e-5)


def test_the_numbers_are_those_of_the_formulas(compared: Comparison) -> None:
    for row in compared.rows:
        s, e = compared.scores[row.method][row.damping], compared.scores["exact"][row.damping]
        rho = np.mean([spearmanr(a, b).statistic for a, b in zip(s, e, strict=True)])
        assert row.spearman == pytest.approx(rho)
        assert row.top == np.mean([np.argmax(a) == np.argmax(b) for a, b in zip(s, e, strict=True)])  # 7 rows: top 1
        assert row.seconds is not None
        assert row.seconds > 0
        if row.method in ("repsim", "bm25", "gradnorm"):
            assert (row.raw, row.scaled) == (None, None)
            continue
        raw = np.sqrt(((s - e) ** 2).sum() / (e**2).sum())
        factor = np.linalg.lstsq(s.reshape(-1, 1), e.ravel(), rcond=None)[0][0]
        scaled = np.sqrt(((factor * s - e) ** 2).sum() / (e**2).sum())
        assert row.raw == pytest.approx(raw)
        assert row.scaled == pytest.approx(scaled, rel=1e-6)
    assert {r.method for r in compared.rows if r.residual is not None} == {"lissa:steps=2"}
    assert all(0 < r.residual < 1 for r in compared.rows if r.residual is not None)
    for method in ("datainf", "graddot"):
        seconds = {r.seconds for r in compared.rows if r.method == method}
        assert len(seconds) == 1  # of the whole sweep, or of the one run


def test_residual_is_the_median_of_the_method(compared: Comparison, built: Path, queries: Path) -> None:
    seen: dict[float, float] = {}

    class Spy(comparing.Inputs):
        def sweep(self, method: Any, dampings: Any) -> Any:
            out = super().sweep(method, dampings)
            seen.update({d: float(np.median(r.numpy())) for d, r in getattr(method, "residual", {}).items()})
            return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparing, "Inputs", Spy)
        datablame.compare(built, queries, methods=["lissa:steps=2"], dampings=DAMPINGS)
    assert {r.damping: r.residual for r in compared.rows if r.method == "lissa:steps=2"} == pytest.approx(seen)


def test_the_exact_solution_agrees_with_itself_and_converged_lissa_with_exact_block(built: Path, queries: Path) -> None:
    c = datablame.compare(built, queries, methods=["exact", "exact-block", "lissa:steps=inf"], dampings=[0.1])
    exact, block, lissa = c.rows
    assert (exact.spearman, exact.top, exact.raw) == (pytest.approx(1), 1, 0)
    assert exact.scaled == pytest.approx(0, abs=1e-12)
    assert block.raw == pytest.approx(lissa.raw)
    assert lissa.residual == pytest.approx(0)
    (a,) = c.agreement
    assert a.spearman[a.methods.index("exact-block")][a.methods.index("lissa:steps=inf")] == pytest.approx(1)


def test_agreement_of_every_pair(compared: Comparison) -> None:
    assert [a.damping for a in compared.agreement] == DAMPINGS
    for a in compared.agreement:
        assert sorted(a.methods) == sorted(METHODS)
        for i, p in enumerate(a.methods):
            for j, q in enumerate(a.methods):
                x, y = compared.scores[p][a.damping], compared.scores[q][a.damping]
                rho = np.mean([spearmanr(u, v).statistic for u, v in zip(x, y, strict=True)])
                assert a.spearman[i][j] == pytest.approx(rho)
                assert a.top[i][j] == a.top[j][i]


def test_near_methods_stand_together() -> None:
    rho = np.kron(np.ones((2, 2)), np.array([[1.0, 0.1], [0.1, 1.0]]))  # 0 and 2 agree, 1 and 3 agree
    order = clustered(rho.tolist())
    assert {frozenset(order[:2]), frozenset(order[2:])} == {frozenset({0, 2}), frozenset({1, 3})}


def test_relative_errors_do_not_mind_a_factor() -> None:
    e = np.random.default_rng(0).normal(size=(3, 5))
    assert relative_errors(-4 * e, e) == (pytest.approx(5), pytest.approx(0, abs=1e-12))
    assert relative_errors(0 * e, e) == (1, 1)
    assert relative_errors(e, 0 * e) == (None, None)


def test_a_method_that_fails_is_a_row(built: Path, queries: Path) -> None:
    """Where the step diverges at one damping, the other damping is told."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparing.registry, "create", _with_failures(comparing.registry.create))
        c = datablame.compare(built, queries, methods=["datainf", "gradcos", "graddot"], dampings=DAMPINGS)
    rows = {(r.method, r.damping): r for r in c.rows}
    assert rows["datainf", 1.0].error == "datainf: diverges"
    assert rows["datainf", 1e-2].error is None
    assert rows["datainf", 1e-2].raw is not None
    assert {rows["gradcos", d].error for d in DAMPINGS} == {"ValueError: broken"}
    assert rows["gradcos", 1.0].seconds is None
    assert rows["graddot", 1.0].error is None
    assert [sorted(a.methods) for a in c.agreement] == [["datainf", "graddot"], ["graddot"]]


def _with_failures(create: Any) -> Any:
    def sometimes(method: Any) -> Any:
        sweep = method.sweep

        def failing(query: Any, dampings: Any) -> Any:
            if 1.0 in dampings:
                raise UserError("datainf: diverges")
            return sweep(query, dampings)

        method.sweep = failing
        return method

    def broken(query: Any) -> Any:
        raise ValueError("broken")

    def made(name: str, **options: Any) -> Any:
        method = create(name, **options)
        if name == "gradcos":
            method.score = broken
        return sometimes(method) if name == "datainf" else method

    return made


def test_a_diverging_lissa_is_told_by_its_own_words(built: Path, queries: Path, tmp_path: Path) -> None:
    c = datablame.compare(built, queries, methods=["lissa:alpha=1e30", "graddot"], dampings=[0.1])
    assert "diverges" in str(c.rows[0].error)
    c.save(tmp_path)
    assert "diverges" in (tmp_path / "compare.html").read_text()
    assert pd.read_parquet(tmp_path / "compare.parquet")["error"].notna().tolist() == [True, False]


def test_files(compared: Comparison, tmp_path: Path) -> None:
    paths = compared.save(tmp_path / "new")
    assert [p.name for p in paths] == ["compare.json", "compare.parquet", "compare.html"]
    data = json.loads(paths[0].read_text(), parse_constant=pytest.fail)
    keys = {"version", "reference", "dampings", "queries", "training_rows", "top_size", "rows", "agreement", "notes"}
    keys |= {"settings"}
    assert set(data) == keys
    assert (data["reference"], data["dampings"], data["training_rows"]) == ("exact", DAMPINGS, len(ROWS))
    fields = ["method", "damping", "damped", "seconds", "spearman", "top", "raw", "scaled", "residual", "error"]
    assert all(list(r) == fields for r in data["rows"])
    assert all(set(a) == {"damping", "methods", "spearman", "top"} for a in data["agreement"])
    frame = pd.read_parquet(paths[1])
    assert list(frame.columns) == fields
    assert len(frame) == len(METHODS) * len(DAMPINGS)
    np.testing.assert_allclose(frame["raw"], [np.nan if r["raw"] is None else r["raw"] for r in data["rows"]])


def test_the_page_is_whole_and_escapes_ids(compared: Comparison, tmp_path: Path) -> None:
    nasty = replace(compared, settings={"command": NASTY, "model": NASTY}, notes=[NASTY])
    nasty.save(tmp_path)
    page = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "alert(1)</script>" not in page
    assert "<img src=x" not in page
    assert page.count("&lt;/script&gt;&lt;script&gt;alert(1)") == 3 + 3  # ids, and command, model, note
    assert "default-src 'none'" in page
    head, _, tail = page.partition('<script id="figure" type="application/json">')
    assert not any(word in head for word in ("http://", 'src="', "<link"))
    figure = json.loads(tail.partition("</script>")[0])["figure"]
    assert len(figure["data"]) == len(DAMPINGS)
    assert figure["data"][0]["x"] == compared.agreement[0].methods
    for row in compared.rows:
        assert row.method in head
        if row.raw is not None:
            assert f"<td>{row.raw:.2g}</td>" in head


def test_method_names_in_the_map_are_escaped(compared: Comparison) -> None:
    from datablame.report.compare import agreement_map

    a = replace(compared.agreement[0], methods=[NASTY, *compared.agreement[0].methods[1:]])
    text = agreement_map([a])
    assert "<" not in text
    assert "<" not in json.loads(text)["figure"]["data"][0]["x"][0]


@pytest.mark.parametrize("text", ["", "x", "0.1,", "0", "-1", "nan", "inf", "0.1,0.1", "1e-1,0.1"])
def test_bad_dampings(text: str) -> None:
    with pytest.raises(UserError, match="--damping"):
        parse_dampings(text)


def test_dampings() -> None:
    assert parse_dampings("1e-3, 1e-2,1") == [1e-3, 1e-2, 1.0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--damping", "0"], "--damping"),
        (["--damping", "much"], "separated by commas"),
        (["--method", "datinf"], "Did you mean 'datainf'"),
        (["--method", "datainf:damping=0.2"], "use --damping"),
        (["--method", "exact:unit=rank"], "leave unit out"),
        (["--method", "lissa:steps=x"], "steps"),
        (["--method", "repsim:text=x"], "text="),
    ],
)
def test_errors(
    arguments: list[str], said: str, built: Path, queries: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    code, _, err = _run(monkeypatch, capsys, built, "--query", queries, "--out", tmp_path / "o", *arguments)
    assert code == 2
    assert said in err
    assert "Traceback" not in err


def test_errors_before_any_work(
    model_dir: Path, built: Path, queries: Path, tmp_path: Path, train_file: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    code, _, err = _run(monkeypatch, capsys, built, "--query", queries, "--out", built)
    assert (code, "that is an index" in err) == (2, True)
    datablame.index(str(model_dir), train_file, tmp_path / "hidden")
    code, _, err = _run(monkeypatch, capsys, tmp_path / "hidden", "--query", queries, "--out", tmp_path / "o")
    assert (code, "holds no gradients" in err) == (2, True)


def test_the_command_with_its_defaults(
    built: Path, queries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = _run(monkeypatch, capsys, built, "--query", queries, "--out", tmp_path / "o")
    assert code == 0, err
    data = json.loads((tmp_path / "o" / "compare.json").read_text())
    methods = list(dict.fromkeys(r["method"] for r in data["rows"]))
    plain = ("gradients", "hidden", "base-hidden", "texts", "length")  # no checkpoints, no extras
    without_training = [m for m in comparing.DEFAULT_METHODS if parse(m).needs in plain]
    assert methods == without_training  # this adapter has no checkpoints
    assert data["dampings"] == [0.1, 10.0, 1000.0]
    assert data["settings"]["command"].startswith("datablame compare")
    assert out.count("against exact at the same damping") == 1
    assert "compare.html" in out


def _run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    monkeypatch.setenv("DATABLAME_DEBUG", "")
    monkeypatch.setattr(sys, "argv", ["datablame", "compare", *map(str, arguments)])
    code = 0
    try:
        cli.main()
    except SystemExit as e:
        code = int(e.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err
