"""Every file format and row shape, and the errors that name file, row and column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from conftest import write_jsonl
from datablame.errors import UserError
from datablame.examples import Columns, from_prompt, load_examples

USER, BOT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}

SHAPES: dict[str, dict[str, Any]] = {
    "messages": {"messages": [USER, BOT]},
    "completion": {"prompt": "Hi", "completion": "Ho"},
    "completion messages": {"prompt": [USER], "completion": [BOT]},
    "response": {"prompt": "Hi", "response": "Ho"},
    "output": {"instruction": "Hi", "output": "Ho"},
    "output with empty input": {"instruction": "Hi", "input": "", "output": "Ho"},
}


@pytest.mark.parametrize("record", SHAPES.values(), ids=list(SHAPES))
def test_shapes(tmp_path: Path, record: dict[str, Any]) -> None:
    (example,) = load_examples(write_jsonl(tmp_path / "f.jsonl", [record]))
    assert example.messages == (USER, BOT)
    assert (example.id, example.row, example.prompt, example.response) == (0, 0, "Hi", "Ho")
    assert example.given == (0 if "messages" in record else 1)  # which part of the row is its prompt


def test_columns_are_those_of_all_rows(tmp_path: Path) -> None:
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "a", "input": "seen", "output": "b", "label": "x"}]
    first, second = load_examples(write_jsonl(tmp_path / "f.jsonl", rows))
    assert (first.label, second.label, second.prompt) == (None, "x", "a\n\nseen")
    rows = [{"text": "a"}, {"id": 3, "text": "b"}]
    with pytest.raises(UserError, match="line 1: the column 'id' is missing"):
        load_examples(write_jsonl(tmp_path / "g.jsonl", rows))


def test_messages_as_json_text(tmp_path: Path) -> None:
    frame = pd.DataFrame([{"messages": json.dumps([USER, BOT]), "label": None}])
    frame.to_csv(tmp_path / "f.csv", index=False)
    (example,) = load_examples(tmp_path / "f.csv")
    assert (example.messages, example.label) == ((USER, BOT), None)


def test_input_and_text(tmp_path: Path) -> None:
    row = {"instruction": "Add", "input": "1, 2", "output": "3"}
    assert load_examples(write_jsonl(tmp_path / "a.jsonl", [row]))[0].prompt == "Add\n\n1, 2"
    (text,) = load_examples(write_jsonl(tmp_path / "b.jsonl", [{"text": "Once upon"}]))
    assert (text.text, text.response, text.prompt, text.messages) == ("Once upon", "Once upon", "", ())


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet", "directory"])
def test_formats_agree(tmp_path: Path, suffix: str) -> None:
    rows = [{"id": f"r{i}", "prompt": f'Say "{i}",\nplease', "response": f"é{i}", "label": "x"} for i in range(3)]
    frame, path = pd.DataFrame(rows), tmp_path / f"f.{suffix}"
    if suffix == "jsonl":
        write_jsonl(path, rows)
    elif suffix == "json":
        path.write_text(json.dumps(rows))
    elif suffix == "csv":
        frame.to_csv(path, index=False)
    elif suffix == "parquet":
        frame.to_parquet(path)
    else:
        import datasets

        datasets.Dataset.from_list(rows).save_to_disk(path)
    examples = load_examples(path)
    assert [(e.id, e.row, e.prompt, e.response, e.label) for e in examples] == [
        (r["id"], i, r["prompt"], r["response"], "x") for i, r in enumerate(rows)
    ]


def test_names_can_be_overridden(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", [{"q": "Hi", "a": "Ho", "key": 7, "kind": 3, "text": "not this"}])
    (example,) = load_examples(path, Columns(prompt="q", response="a", id="key", label="kind"))
    assert (example.prompt, example.response, example.id, example.label) == ("Hi", "Ho", 7, "3")
    with pytest.raises(UserError, match=r"no column 'qq'"):
        load_examples(path, Columns(prompt="qq", response="a"))


BAD = {
    "missing": (None, r"no such file"),
    "empty": ("", r"no rows"),
    "malformed": ('{"prompt": "a", "response": "b"}\n{"prompt": ', r"f\.jsonl, line 2: not valid JSON"),
    "not an object": ("[1, 2]\n", r"line 1: expected an object"),
    "unknown columns": ('{"foo": 1}\n', r"no known columns among 'foo'"),
    "null": ('{"prompt": "a", "response": "b"}\n\n{"prompt": "a", "response": null}\n', r"line 3: .*'response'"),
    "duplicate ids": (
        '{"id": 1, "text": "a"}\n{"id": "1", "text": "b"}\n',
        r"line 2: the id '1' was already used at .*line 1",
    ),
    "no messages": ('{"messages": []}\n', r"line 1: .*non-empty list of messages"),
    "bad message": ('{"messages": [{"role": "user"}]}\n', r"needs a text `role` and `content`"),
    "text of numbers": ('{"text": 5}\n', r"line 1: the column 'text' must hold text"),
    "messages of text": ('{"messages": "hello"}\n', r"line 1: .*non-empty list of messages"),
    "half a surrogate": ('{"text": "a\\ud800"}\n', r"line 1: the text holds half of a surrogate pair"),
    "huge id": ('{"id": 100000000000000000000, "text": "a"}\n', r"line 1: the id must be a whole number"),
    "blank text": ('{"text": "  "}\n', r"line 1: the text is empty"),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=list(BAD))
def test_bad_files(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "f.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_examples(path)


def test_other_bad_files(tmp_path: Path) -> None:
    ragged = tmp_path / "f.csv"
    ragged.write_text("prompt,response\na,b\nc\n")
    with pytest.raises(UserError, match=r"f\.csv, line 3: fewer fields"):
        load_examples(ragged)
    broken = tmp_path / "f.parquet"
    broken.write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="not a Parquet file"):
        load_examples(broken)
    latin = tmp_path / "f.jsonl"
    latin.write_bytes('{"text": "é"}\n'.encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        load_examples(latin)
    with pytest.raises(UserError, match="unknown file type"):
        load_examples(write_jsonl(tmp_path / "f.txt", [{"text": "a"}]))
    with pytest.raises(UserError, match="could not be loaded as a hub data set"):
        load_examples("nobody/nothing-of-this-name")
    import datasets

    parts = {name: datasets.Dataset.from_list([{"text": text}]) for name, text in (("train", "a"), ("test", "b"))}
    splits = datasets.DatasetDict(parts)
    splits.save_to_disk(tmp_path / "splits")
    assert load_examples(tmp_path / "splits", Columns(split="test"))[0].text == "b"
    with pytest.raises(UserError, match="no split 'tset'.*'test'"):
        load_examples(tmp_path / "splits", Columns(split="tset"))
    folder = tmp_path / "plain-folder"
    folder.mkdir()
    with pytest.raises(UserError, match="not a `datasets` directory"):
        load_examples(folder)


def test_another_answer_takes_the_place_of_the_first() -> None:
    asked, answered = from_prompt("Name a fruit."), from_prompt("Name a fruit.", "A pear.")
    assert asked.with_response("A fig.").messages == answered.with_response("A fig.").messages
    assert [m["content"] for m in answered.with_response("A fig.").messages] == ["Name a fruit.", "A fig."]
    assert [m["content"] for m in from_prompt("Name a fruit.", "", against="A fig.").instead().messages] == [
        "Name a fruit.",
        "A fig.",
    ]
