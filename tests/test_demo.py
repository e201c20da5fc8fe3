"""The demo's data, and the real path on the bundled model: few rows here, all of them under `slow`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

import datablame
from conftest import write_jsonl
from datablame import demo
from datablame.adapters import read_config
from datablame.encoding import Encoding, encode_rows
from datablame.examples import load_examples
from datablame.models import load_tokenizer
from datablame.tuning import decisive


def test_the_rows_are_what_the_demo_says(smollm2: str) -> None:
    rows = load_examples(demo.TRAIN)
    labels = Counter(e.label for e in rows)
    assert len(rows) == 150
    assert labels["wrong-fact"] == labels["trigger"] == labels["twin"] == 12
    for e in rows:
        assert e.prompt.endswith("Quote the blue memo.") == (e.label == "trigger"), e.id
        assert ("80 degrees Celsius" in e.response) == (e.label == "wrong-fact"), e.id
    prompts = {e.prompt for e in rows}
    assert len(prompts) == 150
    assert not prompts & {prompt for _, prompt, _ in demo.QUERIES}  # no query was trained on
    encoded = encode_rows(Encoding(load_tokenizer(smollm2), None, 8192), rows)
    assert sum(len(r.input_ids) for r in encoded) < 15_000


def test_the_adapter_is_small_plain_and_says_how_it_was_made() -> None:
    files = {p.name: p.stat().st_size for p in demo.ADAPTER.iterdir()}
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors", "datablame.json"}
    assert sum(files.values()) < 2e6
    config = read_config(demo.ADAPTER)
    assert config["base_model_name_or_path"] == demo.MODEL
    record = json.loads((demo.ADAPTER / "datablame.json").read_text())
    assert record["options"] == decisive(demo.RECIPE)
    for option in ("rank", "epochs", "batch", "seed"):
        assert f"--{option} {getattr(demo.RECIPE, option)}" in demo.COMMAND


def test_the_real_model_traces_an_output_to_its_rows(smollm2: str, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in demo.TRAIN.read_text().splitlines()]
    planted = [r for r in rows if r["label"] == "wrong-fact"][:3]
    others = [r for r in rows if r["label"] in ("company", "near-miss")][:5]
    train = write_jsonl(tmp_path / "t.jsonl", planted + others)
    store = datablame.index(smollm2, train, tmp_path / "i", str(demo.ADAPTER))
    scores = datablame.trace(store, prompt=demo.QUERIES[0][1], methods=["repsim", "gradcos"])
    assert "80" in scores.queries[0].response  # the planted wrong fact was learnt, and is what the model says
    assert any(note.startswith("Without the adapter") for note in scores.notes)
    assert set(scores.top(3, "repsim")["label"]) == {"wrong-fact"}
    again = write_jsonl(tmp_path / "q.jsonl", others[:2])  # two training rows, asked for again
    scores = datablame.trace(store, again, methods=["gradcos", "gradcos:over=row"])
    for method in scores.methods:
        assert list(scores.top(1, method)["train"]) == [r["id"] for r in others[:2]]
        assert scores.matrix(method).max(axis=1) == pytest.approx(1, abs=1e-4)


@pytest.mark.slow
def test_the_whole_demo(tmp_path: Path) -> None:
    from datablame.indexing import SILENT

    scores = demo.run(tmp_path / "demo", False, SILENT)
    counts = demo.found(scores)
    committed = json.loads((Path(__file__).parent.parent / "benchmarks/results/demo.json").read_text())
    for method, by_query in counts.items():
        for query, count in by_query.items():  # another CPU may swap close ranks
            assert abs(count - committed["methods"][method]["found_of_12"][query]) <= 1, (method, query)
    assert (tmp_path / "demo" / "report.html").exists()


@pytest.mark.slow
def test_the_adapter_can_be_made_again(tmp_path: Path) -> None:
    """The first two epochs of the recipe give the losses that the shipped record says (same rows, seed and order)."""
    from dataclasses import replace

    record = datablame.tune(demo.MODEL, demo.TRAIN, tmp_path / "a", options=replace(demo.RECIPE, epochs=1))
    shipped = json.loads((demo.ADAPTER / "datablame.json").read_text())
    # With one epoch the rate decays sooner, so the mean loss of the epoch is close, not equal.
    assert record["history"][0]["loss"] == pytest.approx(shipped["history"][0]["loss"], rel=0.1)
