"""`datablame evaluate`: score files of every kind, labels, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from conftest import Run, write_jsonl
from datablame.errors import UserError
from datablame.evaluation.evaluate import evaluate, same_class
from datablame.evaluation.metrics import METRICS
from datablame.evaluation.reading import read_labels, read_scores
from datablame.examples import from_prompt
from datablame.scores import Scores

TRAIN = ["cat", "dog", "cat", "owl", "dog", "owl", "cat"]
QUERY = ["owl", "cat", "dog"]
SCORES = np.random.default_rng(0).normal(size=(3, 7))


def write_lines(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def csv_lines(scores: np.ndarray) -> list[str]:
    return [",".join(map(repr, line)) for line in scores.tolist()]


@pytest.fixture
def labels(tmp_path: Path) -> tuple[Path, Path]:
    return write_lines(tmp_path / "train.txt", TRAIN), write_lines(tmp_path / "query.txt", QUERY)


# ---------------------------------------------------------------- the numbers


def test_evaluate_is_the_mean_with_interval_and_chance() -> None:
    found = evaluate(SCORES, TRAIN, QUERY)
    assert tuple(found) == METRICS
    top = [TRAIN[t] == q for t, q in zip(SCORES.argmax(axis=1), QUERY, strict=True)]
    in_two = [sum(TRAIN[t] == q for t in np.argsort(-s)[:2]) / 2 for s, q in zip(SCORES, QUERY, strict=True)]
    assert found["accuracy"]["value"] == np.mean(top)
    assert found["coverage"]["value"] == np.mean(in_two)  # c = 7 // 3
    assert found["accuracy"]["chance"] == pytest.approx((2 + 3 + 2) / 3 / 7)
    assert found["mean_rank"]["chance"] == pytest.approx(4)
    for numbers in found.values():
        assert tuple(numbers) == ("value", "low", "high", "chance")
        assert numbers["low"] <= numbers["value"] <= numbers["high"]


def test_lower_is_better_turns_the_scores() -> None:
    assert evaluate(-SCORES, TRAIN, QUERY, lower_is_better=True) == evaluate(SCORES, TRAIN, QUERY)
    assert evaluate(-SCORES, TRAIN, QUERY)["auroc"]["value"] == pytest.approx(
        1 - evaluate(SCORES, TRAIN, QUERY)["auroc"]["value"]
    )
    ranks = (-SCORES).argsort(axis=1).argsort(axis=1).astype(np.uint8)  # unsigned numbers must not wrap around
    assert evaluate(ranks, TRAIN, QUERY, lower_is_better=True) == evaluate(SCORES, TRAIN, QUERY)


def test_an_oracle_gets_one_and_a_constant_chance() -> None:
    oracle = evaluate(same_class(TRAIN, QUERY).astype(float), TRAIN, QUERY)
    constant = evaluate(np.zeros((3, 7)), TRAIN, QUERY)
    for name in set(METRICS) - {"mean_rank"}:
        assert oracle[name]["value"] == 1
        assert constant[name]["value"] == constant[name]["chance"] < 1


def test_classes_need_not_be_text_nor_large() -> None:
    assert evaluate(SCORES, [5, 5, 1, 5, 5, 5, 5], [1, 1, 5])["recall"]["chance"] == pytest.approx((1 + 1 + 6) / 21)


@pytest.mark.parametrize(
    ("scores", "train", "query", "message"),
    [
        (SCORES, TRAIN[:-1], QUERY, "3 × 7 scores do not fit 3 query labels and 6 training labels"),
        (SCORES, TRAIN, [*QUERY, "owl"], "3 × 7 scores do not fit 4 query labels and 7 training labels"),
        (SCORES.T, TRAIN, QUERY, "7 × 3 scores for 3 query labels and 7 training labels look transposed"),
        (SCORES[0], TRAIN, QUERY, "7 scores do not fit"),
        (SCORES, TRAIN, ["owl", "ow", "dog"], r"query 1 .* 'ow', which no training row has\. Leave .*'owl'"),
        (SCORES, ["cat"] * 7, ["cat"] * 3, "all training rows are of the class 'cat'"),
        (SCORES, [*TRAIN[:4], None, *TRAIN[5:]], QUERY, "training row 4 .* no label"),
        (np.where(SCORES[1, 5] == SCORES, np.nan, SCORES), TRAIN, QUERY, "query 1 for training row 5 .* nan"),
    ],
)
def test_bad_scores_and_labels(scores: np.ndarray, train: list[str], query: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(scores, train, query)


# ---------------------------------------------------------------- files of scores


def frame(**names: list[object]) -> pd.DataFrame:
    return pd.DataFrame(SCORES, **names)  # type: ignore[call-overload]


NAMED = {"index": ["q1", "q2", "q3"], "columns": [f"t{i}" for i in range(7)]}
NUMBERED = {"index": pd.Index([1, 2, 3], name="query"), "columns": [17, 4, 5, 90, "a", "b", "c"]}


@pytest.mark.parametrize("names", [{}, NAMED, NUMBERED], ids=["counted", "named", "mixed"])
@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("index", [True, False])
def test_csv_with_and_without_header_and_index(names: dict, header: bool, index: bool, tmp_path: Path) -> None:
    frame(**names).to_csv(tmp_path / "s.csv", header=header, index=index)
    np.testing.assert_array_equal(read_scores(tmp_path / "s.csv", 3, 7), SCORES)


def test_csv_of_windows_with_blank_lines_at_the_end(tmp_path: Path) -> None:
    text = "\ufeff" + "\r\n".join(csv_lines(SCORES)) + "\r\n\r\n"
    (tmp_path / "s.csv").write_bytes(text.encode())
    np.testing.assert_array_equal(read_scores(tmp_path / "s.csv", 3, 7), SCORES)


@pytest.mark.parametrize("names", [{}, NAMED], ids=["counted", "named"])
def test_parquet_matrices(names: dict, tmp_path: Path) -> None:
    table = frame(**names).rename(columns=str)
    table.to_parquet(tmp_path / "plain.parquet")
    table.reset_index().to_parquet(tmp_path / "index.parquet")
    for name in ("plain", "index"):
        np.testing.assert_array_equal(read_scores(tmp_path / f"{name}.parquet", 3, 7), SCORES)


def test_numpy_files(tmp_path: Path) -> None:
    np.save(tmp_path / "s.npy", SCORES)
    np.savez(tmp_path / "one.npz", anything=SCORES)
    np.savez(tmp_path / "named.npz", scores=SCORES, other=SCORES[0])
    np.savez(tmp_path / "two.npz", a=SCORES, b=SCORES)
    for name in ("s.npy", "one.npz", "named.npz"):
        np.testing.assert_array_equal(read_scores(tmp_path / name, 3, 7), SCORES)
    with pytest.raises(UserError, match="'a', 'b'"):
        read_scores(tmp_path / "two.npz", 3, 7)


def traced(*methods: str) -> Scores:
    values = {name: SCORES * (i + 1) for i, name in enumerate(methods)}
    queries = [from_prompt("?", "!", f"z{3 - i}") for i in range(3)]  # not in the alphabet's order
    return Scores(values, queries, [from_prompt("?", "!", 100 - i) for i in range(7)])


def test_the_scores_of_trace(tmp_path: Path) -> None:
    traced("gradcos").to_parquet(tmp_path / "one.parquet")
    both = traced("gradcos", "bm25").to_parquet(tmp_path / "both.parquet")
    pd.read_parquet(both).to_csv(tmp_path / "both.csv", index=False)
    np.testing.assert_array_equal(read_scores(tmp_path / "one.parquet", 3, 7), SCORES)
    for name in ("both.parquet", "both.csv"):
        np.testing.assert_array_equal(read_scores(tmp_path / name, 3, 7, "bm25"), 2 * SCORES)
        with pytest.raises(UserError, match="--method: gradcos, bm25"):
            read_scores(tmp_path / name, 3, 7)
        with pytest.raises(UserError, match="no scores of 'bm52'. Did you mean 'bm25'"):
            read_scores(tmp_path / name, 3, 7, "bm52")
    with pytest.raises(UserError, match="3 × 7 scores do not fit 3 query labels and 8 training labels"):
        read_scores(tmp_path / "one.parquet", 3, 8)


def test_long_tables_need_every_pair_once(tmp_path: Path) -> None:
    table = traced("m").to_pandas()
    bad = {
        "twice": (pd.concat([table, table[:1]]), "2 scores of query 'z3' and training row 100"),
        "missing": (table.drop(index=8), "no score of query 'z2' and training row 99"),
        "empty": (table[:0], "at least one line"),
        "text": (table.assign(score="x"), "'score' must hold numbers"),
    }
    for name, (rows, message) in bad.items():
        rows.to_parquet(tmp_path / f"{name}.parquet")
        with pytest.raises(UserError, match=message):
            read_scores(tmp_path / f"{name}.parquet", 3, 7)


def test_long_tables_in_another_order_are_an_error(tmp_path: Path) -> None:
    """Labels would go to other rows, and every number would be wrong."""
    table = traced("m").to_pandas()
    turned = table.sort_values("train", ascending=False, kind="stable")  # every training row with all of its queries
    turned.to_parquet(tmp_path / "turned.parquet")
    np.testing.assert_array_equal(read_scores(tmp_path / "turned.parquet", 3, 7), SCORES)
    bad = [
        (table.sort_values(["query", "rank"], ascending=[False, True]), r"lines of query 'z2' have train \S+ before"),
        (table.sort_values("rank", kind="stable"), r"lines of query 'z\d' have train \S+ before"),
        (turned.sort_values(["train", "score"], ascending=False), r"lines of train \S+ have query 'z\d' before 'z\d'"),
        (
            pd.concat([table[:14], table[14:].iloc[[0, 1, 2, 4, 3, 5, 6]]]),
            "query 'z1' have train 96 before 97, earlier",
        ),
    ]
    for lines, message in bad:
        lines.to_parquet(tmp_path / "s.parquet")
        lines.to_csv(tmp_path / "s.csv", index=False)
        for name in ("s.parquet", "s.csv"):
            with pytest.raises(UserError, match=message.replace("96", "'?96'?").replace("97", "'?97'?")):
                read_scores(tmp_path / name, 3, 7)


CSV = csv_lines(SCORES)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (CSV[:2], "2 × 7 scores do not fit 3 query labels"),
        ([CSV[0], *CSV], "4 × 7 scores do not fit 3"),  # a line too many is no header unless it holds names
        ([f"0.5,{line}" for line in CSV], "3 × 8 scores do not fit"),
        (["a,b,c,d,e,f,g", *CSV[:2]], r"s\.csv, line 1, field 1: 'a' is not a number"),
        ([CSV[0], "1,2,,4,5,6,7", CSV[2]], "line 2, field 3: there is no score"),
        (["x,a,b,c,d,e,f,g", *(f"q,{line}" for line in CSV[:2]), "q,1,2,3,4,5,6,?"], r"line 4, field 8: '\?'"),
        ([CSV[0], CSV[1] + ",1", CSV[2]], "line 2: 8 fields, the first line has 7"),
        ([line.replace(",", ";") for line in CSV], "separated by semicolons; use commas"),
        ([line.replace(",", "\t") for line in CSV], "separated by tabs; use commas"),
        (["1", "2", "3"], "3 × 1 scores do not fit"),
        (csv_lines(SCORES.T), "7 × 3 scores .* look transposed"),
        (["q1,q2,q3", *csv_lines(SCORES.T)], "7 × 3 scores .* look transposed"),
        (["", *(f"t,{line}" for line in csv_lines(SCORES.T))], "7 × 3 scores .* look transposed"),
        ([], "no scores"),
        (['"a', *CSV], "not valid CSV"),
    ],
)
def test_bad_csv(lines: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_scores(write_lines(tmp_path / "s.csv", lines), 3, 7)


def test_bad_files(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([[{}]], dtype=object), allow_pickle=True)
    np.save(tmp_path / "text.npy", np.array([["1"]]))
    np.save(tmp_path / "cube.npy", np.zeros((3, 7, 1)))
    np.save(tmp_path / "turned.npy", SCORES.T)
    for name in ("broken.npy", "broken.npz", "broken.parquet"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 half a file")
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "latin.csv").write_bytes(b"\xe9,1\n")
    (tmp_path / "s.txt").write_text("1")
    frame().rename(columns=str).assign(**{"2": "x"}).to_parquet(tmp_path / "text.parquet")
    frame().rename(columns=str)[:2].to_parquet(tmp_path / "short.parquet")
    messages = {
        "objects.npy": "not an array of numbers",
        "text.npy": "expected numbers, found the type",
        "cube.npy": "3 × 7 × 1 scores do not fit",
        "turned.npy": "look transposed",
        "broken.npy": "not an array of numbers",
        "broken.npz": "not an array of numbers",
        "empty.npy": "not an array of numbers",
        "broken.parquet": "not a Parquet file",
        "latin.csv": "not UTF-8",
        "s.txt": "unknown file type '.txt'; use .csv",
        "text.parquet": "the column '2' holds",
        "short.parquet": "2 × 7 scores do not fit",
        "missing.csv": "cannot be read",
        "missing.npy": "cannot be read",
        "missing.parquet": "cannot be read",
    }
    for name, message in messages.items():
        with pytest.raises(UserError, match=message):
            read_scores(tmp_path / name, 3, 7)
    np.save(tmp_path / "s.npy", SCORES)
    with pytest.raises(UserError, match="holds one matrix"):
        read_scores(tmp_path / "s.npy", 3, 7, "bm25")


# ---------------------------------------------------------------- files of labels


def test_labels(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "response": "b", "label": label} for label in ("two words", 3, " x ")]
    for name in ("l.jsonl", "l.json"):
        assert read_labels(write_jsonl(tmp_path / name, rows)) == ["two words", "3", "x"]
    (tmp_path / "l.txt").write_bytes("\ufefftwo words\r\n3\r\nx\r\n\r\n".encode())
    assert read_labels(tmp_path / "l.txt") == ["two words", "3", "x"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.txt", "a\n\nb\n", "line 2: no label"),
        ("l.txt", "\n", "no labels"),
        ("l.jsonl", "", "no labels"),
        ("l.jsonl", '{"label": "a"}\n{"prompt": "b"}\n', "line 2: expected text or a number in `label`, found None"),
        ("l.jsonl", '{"label": ["a"]}\n', "line 1: expected text"),
        ("l.jsonl", '{"label": ""}\n', "line 1: expected text"),
        ("l.jsonl", '{"label": \n', "line 1: not valid JSON"),
        ("l.jsonl", '"a"\n', "line 1: expected an object"),
    ],
)
def test_bad_labels(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_labels(tmp_path / name)


def test_labels_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        read_labels(tmp_path / "l.txt")
    with pytest.raises(UserError, match="cannot be read"):
        read_labels(tmp_path / "none.txt")


# ---------------------------------------------------------------- the command


def test_the_command(run: Run, labels: tuple[Path, Path], tmp_path: Path) -> None:
    np.save(tmp_path / "s.npy", SCORES)
    arguments = ("--scores", tmp_path / "s.npy", "--train-labels", labels[0], "--query-labels", labels[1])
    code, stdout, stderr = run("evaluate", *arguments, "--json")
    assert (code, stderr) == (0, "")
    assert json.loads(stdout) == evaluate(SCORES, TRAIN, QUERY)
    code, stdout, _ = run("evaluate", *arguments, "--json", "--lower-is-better")
    assert json.loads(stdout) == evaluate(-SCORES, TRAIN, QUERY)
    code, stdout, _ = run("evaluate", *arguments)
    assert code == 0
    assert "3 queries × 7 training rows, 3 classes" in stdout
    for name in METRICS:
        assert name.replace("_", " ") in stdout
    assert "at most" not in stdout
    assert f"{evaluate(SCORES, TRAIN, QUERY)['auroc']['value']:.3f}" in stdout


def test_the_command_says_what_coverage_can_reach(run: Run, tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", [{"label": "bad" if i < 2 else "good"} for i in range(10)])
    query = write_lines(tmp_path / "query.txt", ["bad", "bad"])
    write_lines(tmp_path / "s.csv", csv_lines(np.random.default_rng(1).normal(size=(2, 10))))
    code, stdout, _ = run("evaluate", "--scores", tmp_path / "s.csv", "--train-labels", train, "--query-labels", query)
    assert code == 0
    assert "the top 5 whatever the class sizes: here at most 0.400" in stdout


def test_the_command_fails_in_one_sentence(run: Run, labels: tuple[Path, Path], tmp_path: Path) -> None:
    write_lines(tmp_path / "s.csv", csv_lines(SCORES.T))
    code, stdout, stderr = run(
        "evaluate", "--scores", tmp_path / "s.csv", "--train-labels", labels[0], "--query-labels", labels[1], "--json"
    )
    assert (code, stdout) == (2, "")
    assert stderr.startswith("error: ")
    assert "transposed" in stderr
