"""From an index and a question to scores, in Python."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import datablame
from conftest import ROWS, make_model, save_adapter, write_jsonl
from datablame.errors import UserError
from datablame.indexing import CaptureOptions
from datablame.scores import Scores, ranks


def test_a_training_row_finds_itself(built: Path, tmp_path: Path) -> None:
    query = write_jsonl(
        tmp_path / "q.jsonl", [{"id": f"q{i}", "prompt": p, "response": r} for i, (p, r) in enumerate(ROWS)]
    )
    scores = datablame.trace(built, query, methods=["gradcos", "gradcos:over=row", "repsim", "repsim-base", "verbatim"])
    for method in scores.methods:
        assert (scores.ranks(method).diagonal() == 1).all(), method
    for method in ("gradcos", "gradcos:over=row", "repsim", "repsim-base"):
        np.testing.assert_allclose(scores.matrix(method).diagonal(), 1, atol=1e-5)


def test_files_hold_every_pair_and_the_top(built: Path, tmp_path: Path) -> None:
    query = write_jsonl(
        tmp_path / "q.jsonl",
        [
            {"id": "a", "prompt": "Hi?", "response": "Snow."},
            {"id": "b", "text": "x", "prompt": "Two?", "response": "Four."},
        ],
    )
    scores = datablame.trace(built, query, methods=["graddot", "bm25:text=response"])
    scores.save(tmp_path / "out", 3)
    frame = pd.read_parquet(tmp_path / "out" / "scores.parquet")
    assert list(frame.columns) == ["method", "query", "train", "score", "rank"]
    assert len(frame) == 2 * 2 * len(ROWS)
    assert set(frame["method"]) == {"graddot", "bm25:text=response"}
    assert frame["train"].dtype.kind == "i"  # row numbers, since the file has no ids
    part = frame[(frame["method"] == "graddot") & (frame["query"] == "b")].sort_values("rank")
    assert list(part["rank"]) == list(range(1, len(ROWS) + 1))
    assert part["score"].is_monotonic_decreasing
    top = [json.loads(line) for line in (tmp_path / "out" / "top.jsonl").read_text().splitlines()]
    assert len(top) == 2 * 2 * 3
    for record in top:
        assert (record["prompt"], record["response"]) == ROWS[record["row"]]
        row = frame[
            (frame["method"] == record["method"])
            & (frame["query"] == record["query"])
            & (frame["train"] == record["train"])
        ]
        assert (row["rank"].item(), row["score"].item()) == (record["rank"], record["score"])
    assert {r["percentile"] for r in top if r["rank"] == 1} == {100 * 6 / 7}


def test_the_same_command_gives_the_same_scores(built: Path) -> None:
    a, b = (datablame.trace(built, prompt="Say hi.", response="Hello there").to_pandas() for _ in range(2))
    pd.testing.assert_frame_equal(a, b, check_exact=True)


def test_ranks_and_ties() -> None:
    assert ranks(np.array([[1.0, 3.0, 3.0, -2.0]])).tolist() == [[3, 1, 2, 4]]


def test_a_score_that_is_not_finite_is_an_error() -> None:
    examples = [datablame.Example("t", 0, text="a")]
    with pytest.raises(UserError, match="'t' for query 't'"):
        Scores({"mine": np.array([[np.nan]])}, examples, examples)


def test_the_models_own_answer_is_traced(built: Path) -> None:
    scores = datablame.trace(built, prompt="Say hi.", methods=["gradcos"], max_new_tokens=5)
    assert scores.queries[0].response
    assert any("cut after 5 tokens" in n for n in scores.notes)
    assert any("base model" in n for n in scores.notes)


def test_an_answer_that_the_base_model_gives_too_is_told(model_dir: Path, tmp_path: Path) -> None:
    import safetensors.torch as st

    adapter = save_adapter(model_dir, tmp_path / "a")
    weights = st.load_file(adapter / "adapter_model.safetensors")
    st.save_file(
        {k: v * (0 if "lora_B" in k else 1) for k, v in weights.items()}, adapter / "adapter_model.safetensors"
    )
    train = write_jsonl(tmp_path / "t.jsonl", [{"prompt": p, "response": r} for p, r in ROWS])
    store = datablame.index(str(model_dir), train, tmp_path / "i", str(adapter))
    scores = datablame.trace(store, prompt="Say hi.", methods=["gradcos"], max_new_tokens=5)
    assert any("gives the same answer" in n for n in scores.notes)
    # LoRA's A has no gradient while B is zero: scores are still finite.
    assert np.isfinite(scores.matrix()).all()


def test_without_an_adapter(model_dir: Path, tmp_path: Path, train_file: Path) -> None:
    store = datablame.index(str(model_dir), train_file, tmp_path / "h")
    assert not store.features("gradients")
    scores = datablame.trace(store, prompt="Say hi.", response="Hello there")
    assert scores.methods == ["repsim", "bm25"]
    with pytest.raises(UserError, match="gradcos needs gradients .* It can run: repsim, bm25"):
        datablame.trace(store, prompt="a", response="b", methods=["gradcos"])
    chosen = CaptureOptions(blocks="layers.1.*.q_proj")
    store = datablame.index(str(model_dir), train_file, tmp_path / "b", capture=chosen)
    assert list(store.features("gradients")) == ["layers.1.self_attn.q_proj"]
    assert datablame.trace(store, prompt="Say hi.", response=" Hello there").ranks("gradcos")[0, 2] == 1


def test_another_model_adapter_or_tokenizer_is_refused(
    built: Path, model_dir: Path, adapter_dir: Path, tmp_path: Path
) -> None:
    ask = {"prompt": "Hi", "response": "Ho", "methods": ["gradcos"]}
    other = tmp_path / "other"
    shutil.copytree(model_dir, other)
    make_model(seed=5).save_pretrained(other)
    with pytest.raises(UserError, match="another model"):
        datablame.trace(built, model=str(other), **ask)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="another adapter"):
        datablame.trace(built, adapter=str(save_adapter(model_dir, tmp_path / "a", seed=7)), **ask)  # type: ignore[arg-type]
    moved = tmp_path / "moved"
    shutil.copytree(model_dir, moved)
    assert datablame.trace(built, model=str(moved), **ask).methods == ["gradcos"]  # type: ignore[arg-type]
    (moved / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(UserError, match="another template"):
        datablame.trace(built, model=str(moved), **ask)  # type: ignore[arg-type]


def test_wrong_questions(built: Path, tmp_path: Path) -> None:
    for arguments, message in [
        ({}, "give either"),
        ({"prompt": "a", "query": "b"}, "give either"),
        ({"query": "b", "response": "c"}, "--response goes with --prompt"),
        ({"prompt": "a", "response": ""}, "the response is empty"),
        ({"prompt": "a", "response": "b", "methods": ["gradcosine"]}, "unknown method 'gradcosine'.*'gradcos'"),
        ({"prompt": "a", "response": "b", "methods": ["repsim:layer=2"]}, "layer 2 is not in this index; it holds"),
    ]:
        with pytest.raises(UserError, match=message):
            datablame.trace(built, **arguments)  # type: ignore[arg-type]


def test_top_is_a_table(built: Path) -> None:
    scores = datablame.trace(built, prompt="Say hi.", response="Hello there", methods=["graddot", "bm25"])
    top = scores.top(2)
    assert list(top["rank"]) == [1, 2, 1, 2]
    assert list(scores.top(1, "bm25")["train"]) == [2]
    assert "&lt;" not in scores._repr_html_()
    assert repr(scores) == "Scores(1 queries × 7 training rows: graddot, bm25)"
    with pytest.raises(UserError, match="no scores of 'grad'"):
        scores.matrix("grad")
    with pytest.raises(UserError, match="no query"):
        scores.top(1, query="nobody")
