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


def test_base_hidden_states_are_the_base_models(built: Path, model_dir: Path) -> None:
    from datablame.encoding import Encoding
    from datablame.models import ModelSpec, load
    from oracles import hidden_alone, relative_error

    store = datablame.FeatureStore.open(built)
    loaded = load(ModelSpec(str(model_dir), None, "cpu"))
    rows = [Encoding(loaded.tokenizer, None, 128).encode(e) for e in store.examples]
    base, tuned = (store.features(kind)["1.response.mean"] for kind in ("base-hidden", "hidden"))
    want = hidden_alone(loaded.model, rows, 1, "response.mean")
    assert relative_error(base, want) < 1e-5
    assert relative_error(tuned, want) > 1e-2


def test_only_the_last_answer_of_a_query_counts(built: Path, tmp_path: Path) -> None:
    turns = [("user", "Say hi."), ("assistant", "Eight legs."), ("user", "Name a fruit."), ("assistant", "A pear.")]
    messages = [{"role": r, "content": c} for r, c in turns]
    whole = write_jsonl(tmp_path / "a.jsonl", [{"messages": messages}])
    given = write_jsonl(tmp_path / "b.jsonl", [{"prompt": messages[:3], "completion": messages[3:]}])
    a, b = (datablame.trace(built, q, methods=["graddot"]).matrix() for q in (whole, given))
    np.testing.assert_array_equal(a, b)


def test_layers_without_the_middle(model_dir: Path, adapter_dir: Path, train_file: Path, tmp_path: Path) -> None:
    """The paper's own layer alone: everything works, on the layer that is there."""
    chosen = CaptureOptions(layers="last")
    store = datablame.index(model_dir, train_file, tmp_path / "i", adapter_dir, capture=chosen)
    scores = datablame.trace(store, prompt="Say hi.", response=" Hello there")
    np.testing.assert_array_equal(
        scores.matrix("repsim"),
        datablame.trace(store, prompt="Say hi.", response=" Hello there", methods=["repsim:layer=last"]).matrix(),
    )


def test_greedy_is_greedy_whatever_the_model_ships(model_dir: Path, tmp_path: Path) -> None:
    from datablame.models import ModelSpec, answer, load

    fussy = tmp_path / "fussy"
    shutil.copytree(model_dir, fussy)
    path = fussy / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "repetition_penalty": 50.0, "num_beams": 3}))
    plain, other = (answer(load(ModelSpec(str(d), None, "cpu")), [5, 6, 7], 12) for d in (model_dir, fussy))
    assert plain == other


def test_a_row_that_is_not_finite_is_named(model_dir: Path, train_file: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    holed = tmp_path / "holed"
    shutil.copytree(model_dir, holed)
    weights = load_file(holed / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, holed / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"row \d+ \(id \d+\): loss is not finite"):
        datablame.index(holed, train_file, tmp_path / "i")


def test_an_index_moves_with_its_model(
    model_dir: Path, adapter_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative paths work from another folder, and the same content elsewhere is the same index."""
    shutil.copytree(model_dir, tmp_path / "m")
    shutil.copytree(adapter_dir, tmp_path / "a")
    write_jsonl(tmp_path / "t.jsonl", [{"prompt": p, "response": r} for p, r in ROWS])
    monkeypatch.chdir(tmp_path)
    datablame.index("./m", "t.jsonl", "i", "a/")
    monkeypatch.chdir(tmp_path.parent)
    assert datablame.trace(tmp_path / "i", prompt="a", response="b", methods=["gradcos"]).methods == ["gradcos"]
    assert len(datablame.index(model_dir, tmp_path / "t.jsonl", tmp_path / "i", adapter_dir)) == len(ROWS)


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
