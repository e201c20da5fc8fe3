"""Scores taken apart by tokens: the parts are the derivatives they claim to be, and they sum to the score."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import datablame
from conftest import ROWS, Run, make_model, make_tokenizer, save_adapter, write_jsonl
from datablame.blocks import select_blocks
from datablame.capture import along, along_hidden
from datablame.encoding import Encoded, Encoding, EncodingOptions, encode_rows, pieces
from datablame.errors import UserError
from datablame.examples import from_prompt
from datablame.indexing import CaptureOptions
from datablame.methods import names, parse
from datablame.methods.linear import is_linear
from datablame.models import ModelSpec, load
from datablame.report.tokens import LEVELS, coloured
from datablame.scores import Scores
from datablame.tokens import TokenScores, gap_note
from oracles import hidden_alone, loss_alone
from test_report import NASTY, Node, fake, tree

METHODS = {
    "graddot": 1e-12,
    "graddot:relatif=l": 1e-12,
    "graddot:center=2": 1e-12,
    "gradcos": 1e-12,
    "gradcos:over=row": 1e-12,
    "gradcos:center=1": 1e-12,
    "gradcos:over=row,center=1": 1e-12,
    # The factorisation of the scores has its own rounding, which small damping enlarges.
    "exact": 1e-9,
    "exact:relatif=theta,center=1": 1e-9,
    "exact:form=primal,relatif=l": 1e-9,
    "exact-block": 1e-9,
    "exact:unit=rank,damping=1,relatif=l": 1e-9,
    "exact-block:unit=rank,damping=1": 1e-9,
    "exact-block:relatif=l,center=1": 1e-9,
    "exact-block:relatif=theta": 1e-9,
    "datainf": 1e-12,
    "datainf:relatif=theta": 1e-12,
    "datainf:relatif=l,damping=1": 1e-12,
    "repsim": 1e-12,
    "repsim:token=last": 1e-12,
    "repsim:layer=last,text=prompt": 1e-12,
    "repsim-base": 1e-12,
}
UNICODE = ("Grüße 🙂?", "中文 🙂 <b>x</b> \u2028 e\u0301")


def rows_of(pairs: Any) -> list[dict[str, str]]:
    return [{"prompt": p, "response": r} for p, r in pairs]


@pytest.fixture(scope="module")
def double(model_dir: Path, adapter_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index in float64, with a row whose characters are several tokens each."""
    folder = tmp_path_factory.mktemp("double")
    train = write_jsonl(folder / "train.jsonl", rows_of([*ROWS, UNICODE]))
    datablame.index(str(model_dir), train, folder / "index", str(adapter_dir), dtype="float64")
    return folder / "index"


def gap(scores: Scores, method: str) -> float:
    """The furthest that a text's parts are from their score, over the sum of their absolute values."""
    found = [(key, both) for key, both in scores.tokens.items() if key[0] == method]
    assert found
    worst = 0.0
    for (_, q, t), both in found:
        for tokens in (both.row, both.query):
            parts = np.array([x for _, x in tokens])
            assert np.isfinite(parts).all()
            worst = max(worst, abs(parts.sum() - scores.values[method][q, t]) / max(np.abs(parts).sum(), 1e-300))
    return worst


# ---------------------------------------------------------------- the parts


@pytest.mark.parametrize("pattern", [None, "*.q_proj,*.down_proj,lm_head"])
def test_a_part_is_the_derivative_to_the_weights_of_one_position(
    pattern: str | None, model_dir: Path, adapter_dir: Path, tmp_path: Path
) -> None:
    """Autograd's answer: let position t alone have the weights W + ε_t U, and differentiate the loss to ε_t."""
    place = model_dir
    if pattern:
        place = tmp_path / "untied"
        make_model(tie_word_embeddings=False).save_pretrained(place)
        make_tokenizer().save_pretrained(place)
    loaded = load(ModelSpec(str(place), None if pattern else str(adapter_dir), "cpu", "float64"))
    blocks = select_blocks(loaded.model, pattern)
    rows = encode_rows(Encoding(loaded.tokenizer, None, 128), [from_prompt(*ROWS[1]), from_prompt(*UNICODE)])
    generator = torch.Generator().manual_seed(0)
    us = {b: torch.randn(2, m.weight.numel(), generator=generator, dtype=torch.float64) for b, m in blocks.items()}
    for row in rows:
        got = along(loaded.model, row, blocks, us)
        assert got.shape == (2, len(row.input_ids))
        for k in range(2):
            torch.testing.assert_close(got[k], by_position(loaded.model, row, blocks, us, k), rtol=1e-9, atol=1e-9)
        assert (got[:, -1] == 0).all()  # nothing is predicted from the last token
        assert got[:, 0].all()


def by_position(model: Any, row: Encoded, blocks: Any, us: dict[str, Tensor], k: int) -> Tensor:
    epsilon = torch.zeros(len(row.input_ids), dtype=torch.float64, requires_grad=True)
    handles = []
    for name, module in blocks.items():
        u = us[name][k].view_as(module.weight)

        def shifted(_: Any, args: Any, output: Tensor, u: Tensor = u) -> Tensor:
            return output + epsilon[None, :, None] * (args[0] @ u.T)

        handles.append(module.register_forward_hook(shifted))
    (gradient,) = torch.autograd.grad(loss_alone(model, row), epsilon)
    for handle in handles:
        handle.remove()
    return gradient


@pytest.mark.parametrize("kind", ["prompt.last", "response.last", "response.mean"])
def test_parts_of_hidden_states(kind: str, model_dir: Path) -> None:
    loaded = load(ModelSpec(str(model_dir), None, "cpu", "float64"))
    (row,) = encode_rows(Encoding(loaded.tokenizer, None, 128), [from_prompt(*ROWS[1])])
    u = torch.randn(2, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = along_hidden(loaded.model, row, 1, kind, u)
    states = loaded.model(input_ids=torch.tensor([row.input_ids]), output_hidden_states=True).hidden_states[1][0]
    labelled = [t for t, label in enumerate(row.labels) if label != -100]
    at = {"prompt.last": [row.prompt_length - 1], "response.last": labelled[-1:], "response.mean": labelled}[kind]
    for t in range(len(row.input_ids)):
        want = u @ states[t] / len(at) if t in at else torch.zeros(2, dtype=torch.float64)
        torch.testing.assert_close(got[:, t], want)
    torch.testing.assert_close(got.sum(dim=1), (hidden_alone(loaded.model, [row], 1, kind) @ u.T)[0])


def test_parts_sum_to_the_score(double: Path, tmp_path: Path) -> None:
    """Every method and option that claims it, both texts, several queries."""
    query = write_jsonl(tmp_path / "q.jsonl", rows_of([("Say hi 🙂.", "Hello there"), UNICODE, ("A?", "B")]))
    scores = datablame.trace(double, query, methods=[*METHODS, "bm25"], tokens=99)
    assert len(scores.tokens) == len(METHODS) * 3 * 8
    for method, tolerance in METHODS.items():
        assert gap(scores, method) < tolerance, method
    assert scores.notes == ["Not taken apart by tokens, being no sums over them: bm25."]


def test_in_float32_they_sum_to_its_rounding(built: Path) -> None:
    scores = datablame.trace(
        built, prompt="Say hi.", response="Hello", methods=["graddot", "gradcos", "exact", "repsim"], tokens=3
    )
    assert len(scores.tokens) == 4 * 3
    assert all(gap(scores, m) < 1e-4 for m in scores.methods)
    assert not scores.notes


def test_parts_are_of_the_highest_rows_and_the_same_each_time(built: Path) -> None:
    a, b = (
        datablame.trace(built, prompt="Say hi.", response="Hello", methods=["bm25", "gradcos"], tokens=2)
        for _ in range(2)
    )
    assert list(a.tokens) == [("gradcos", 0, int(t)) for t in a.order(0, "gradcos")[:2]]
    assert a.tokens == b.tokens
    plain = datablame.trace(built, prompt="Say hi.", response="Hello", methods=["bm25", "gradcos"])
    assert not plain.tokens
    np.testing.assert_array_equal(plain.matrix("gradcos"), a.matrix("gradcos"))


def test_which_methods_have_parts(built: Path) -> None:
    assert {n for n in names() if is_linear(parse(n))} == {m.partition(":")[0] for m in METHODS}
    for spec in ("graddot:aggregate=rank", "exact-block:aggregate=vote", "gradcos:gauge=balanced", "lissa"):
        assert not is_linear(parse(spec)), spec
    with pytest.raises(UserError, match="--tokens: the scores of bm25, lissa are no sums over tokens. Add graddot"):
        datablame.trace(built, prompt="a", response="b", methods=["bm25", "lissa"], tokens=1)
    with pytest.raises(UserError, match="tokens=-1"):
        datablame.trace(built, prompt="a", response="b", tokens=-1)


def test_sums_that_miss_are_told() -> None:
    scores = replace(fake(1, 3, ("gradcos",)), values={"gradcos": np.array([[1.0, 2.0, 3.0]])})
    right = TokenScores([("a", 3.0), ("b", -1.0)], [("c", 2.0)])
    assert gap_note(replace(scores, tokens={("gradcos", 0, 1): right})) is None
    wrong = TokenScores(right.row, [("c", 1.0)])
    note = gap_note(replace(scores, tokens={("gradcos", 0, 1): wrong}))
    assert note
    assert "up to 100.0%" in note


# ---------------------------------------------------------------- degenerate rows


def test_degenerate_rows(model_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    """No prompt, one token, more than the model takes, whitespace alone, a conversation of several answers."""
    pairs = [("", "Snow is white."), (" ", "x"), ("a", " \n"), ("Long", "rain falls " * 200), *NICE]
    talks = [[("user", p), ("assistant", r)] for p, r in pairs]
    talks.append([("user", "Hi"), ("assistant", "Ho"), ("user", "And?"), ("assistant", "Snow " * 60)])
    messages = [{"messages": [{"role": r, "content": c} for r, c in talk]} for talk in talks]
    train = write_jsonl(tmp_path / "t.jsonl", messages)
    options = EncodingOptions(template="none")
    store = datablame.index(model_dir, train, tmp_path / "i", adapter_dir, dtype="float64", encoding=options)
    methods = ["gradcos", "exact", "repsim", "repsim-base"]
    scores = datablame.trace(store, prompt="Say", response="y " * 300, methods=methods, tokens=50)
    encoder = Encoding(make_tokenizer(), options, 128)
    for (_, _, t), both in scores.tokens.items():
        ids = encoder.encode(scores.train[t]).input_ids
        assert "".join(text for text, _ in both.row) == make_tokenizer().decode(ids)
        assert len(both.row) == len(ids)
        assert len(both.query) == 128
    assert all(gap(scores, m) < 1e-9 for m in methods)


NICE = [("p", text) for text in NASTY[:5] if "\ud800" not in text]


def test_text_rows_without_a_prompt(model_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "t.jsonl", [{"text": "a"}, {"text": "Snow is white 🙂"}])
    store = datablame.index(model_dir, train, tmp_path / "i", adapter_dir, dtype="float64")
    scores = datablame.trace(store, train, methods=["graddot", "gradcos:over=row", "repsim"], tokens=2)
    assert [text for text, _ in scores.tokens["graddot", 0, 0].row] == ["a", "<|im_end|>"]
    assert all(gap(scores, m) < 1e-12 for m in scores.methods)
    assert not scores.notes
    # From the first token alone no query projection learns: its gradient is rounding, and has no part in the cosine.
    gradients = store.features("gradients")
    shortest = min(float(gradients[b][0].norm() / gradients[b][1].norm()) for b in gradients if "q_proj.lora_B" in b)
    assert shortest < 1e-14
    scores = datablame.trace(store, train, methods=["gradcos"], tokens=2)
    assert gap(scores, "gradcos") < 1e-12
    assert not scores.notes


def test_the_papers_padding_counts(model_dir: Path, adapter_dir: Path, train_file: Path, tmp_path: Path) -> None:
    options = EncodingOptions(loss_on="all", pad_to=48)
    store = datablame.index(model_dir, train_file, tmp_path / "i", adapter_dir, dtype="float64", encoding=options)
    scores = datablame.trace(store, prompt="a", response="b", methods=["graddot", "repsim"], tokens=7)
    assert all(len(both.row) == len(both.query) == 48 for both in scores.tokens.values())
    assert all(gap(scores, m) < 1e-12 for m in scores.methods)


def test_a_fresh_adapter_and_plain_blocks(model_dir: Path, tmp_path: Path, train_file: Path) -> None:
    """LoRA's A has no gradient while B is zero; and blocks that are no LoRA's."""
    import safetensors.torch as st

    adapter = save_adapter(model_dir, tmp_path / "a")
    file = adapter / "adapter_model.safetensors"
    st.save_file({k: v * (0 if "lora_B" in k else 1) for k, v in st.load_file(file).items()}, file)
    plain = CaptureOptions(blocks="layers.1.*.q_proj,layers.0.*.down_proj")
    for name, given, capture in (("fresh", str(adapter), None), ("plain", None, plain)):
        store = datablame.index(model_dir, train_file, tmp_path / name, given, dtype="float64", capture=capture)
        scores = datablame.trace(store, prompt="a", response="b", methods=["gradcos", "exact", "exact-block"], tokens=7)
        assert sum("only zero gradients" in note for note in scores.notes) == (1 if given else 0)  # for both, once
        assert all(gap(scores, m) < 1e-9 for m in scores.methods)


# ---------------------------------------------------------------- texts of tokens


def word_pieces() -> Any:
    """A tokenizer whose text of a token depends on its place: spaces between words, none before `##`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "rain": 1, "##bow": 2, "!": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def sentence_pieces() -> Any:
    """Spaces are part of the words, the first one is dropped, and unknown characters are bytes."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "▁": 1, "▁rain": 2, "bow": 3, **{f"<0x{b:02X}>": b + 4 for b in range(256)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize(
    "text", [*(t for t in NASTY if "\ud800" not in t), "", "a", "🙂", "\ufffd\ufffdx\ufffd", UNICODE[1]]
)
def test_texts_of_tokens_join_to_the_whole(text: str) -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer(text[:3000] + "<|im_end|>")["input_ids"]
    for end in {*range(min(len(ids), 40)), len(ids)}:  # rows that are cut inside a character, too
        found = pieces(tokenizer, ids[:end])
        assert len(found) == end
        assert "".join(found) == tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)


def test_texts_of_other_tokenizers() -> None:
    assert pieces(word_pieces(), [1, 2, 3, 1]) == ["rain", "bow", " !", " rain"]
    smile = [b + 4 for b in "🙂".encode()]
    assert pieces(sentence_pieces(), [2, 3, 2, 1, *smile, 3]) == ["rain", "bow", " rain", " ", "", "", "", "🙂", "bow"]


def test_a_character_of_several_tokens_is_one_text() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer("a🙂b")["input_ids"]
    assert pieces(tokenizer, ids) == ["a", "", "", "", "🙂", "b"]


# ---------------------------------------------------------------- files and report


def test_files_hold_the_parts(double: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    question = ["--prompt", "Say hi.", "--response", "Hello <i>🙂</i>", "--method", "gradcos,bm25", "--top", 2]
    code, printed, _ = run("trace", double, *question, "--tokens", "--out", out)
    assert code == 0
    assert "tokens.parquet" in "".join(printed.split())
    frame = pd.read_parquet(out / "tokens.parquet")
    assert list(frame.columns) == ["method", "query", "train", "side", "position", "token", "score"]
    records = [json.loads(line) for line in (out / "top.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    assert [("tokens" in r, r["method"]) for r in records] == [(True, "gradcos")] * 2 + [(False, "bm25")] * 2
    for r in records[:2]:
        for key, side, text in (("tokens", "row", r["response"]), ("query_tokens", "query", "Hello <i>🙂</i>")):
            assert text in "".join(t for t, _ in r[key])
            assert sum(x for _, x in r[key]) == pytest.approx(r["score"], rel=1e-10)
            lines = frame[(frame["train"] == r["train"]) & (frame["side"] == side)].sort_values("position")
            assert [[*pair] for pair in zip(lines["token"], lines["score"], strict=True)] == r[key]
    assert code == run("trace", double, *question, "--out", tmp_path / "plain")[0]
    assert not (tmp_path / "plain" / "tokens.parquet").exists()


def with_tokens(row: list[tuple[str, float]], query: list[tuple[str, float]]) -> Scores:
    scores = fake(1, 3, ("gradcos", "bm25"))
    best = int(scores.order(0, "gradcos")[0])
    return replace(scores, tokens={("gradcos", 0, best): TokenScores(row, query)})


def shown(page: Node) -> list[Node]:
    (details,) = page.all("details", class_="tokens")
    return details.all("div", class_="text")


def test_the_report_shows_the_text_as_text() -> None:
    tokens = [(text[:500], float(i - 3)) for i, text in enumerate(NASTY)]
    page = tree(with_tokens(tokens, [("one", 0.0)]))
    row, query = shown(page)
    assert row.text() == "".join(text for text, _ in tokens)
    assert query.text() == "one"
    assert not query.all("span")
    assert len(page.all("script")) == 3
    spans = row.all("span")
    assert [s.attributes["title"] for s in spans] == ["-3", "-2", "-1", "+1", "+2", "+3", "+4"]
    assert [(s.attributes["class"] or "").split()[0] for s in spans] == ["down"] * 3 + ["up"] * 4
    assert page.all("p", class_="legend")
    assert not tree(fake()).all("p", class_="legend")
    assert not tree(fake()).all("details", class_="tokens")


def test_sign_is_told_by_more_than_colour_and_line_breaks_are_seen() -> None:
    page = tree(with_tokens([("a", 1.0), ("\n", -1.0)], [("b", 1.0)]))
    (style,) = page.all("style")
    assert ".down { --hue: var(--low); text-decoration-style: dotted; }" in style.text()
    assert ".tokens::details-content { content-visibility: visible" in style.text().partition("@media print")[2]
    assert shown(page)[0].all("span", class_="break")[0].text() == "\n"


def test_shades() -> None:
    both = TokenScores([("a", 2.0), ("b", 0.2), ("c", -0.1), ("", -1.0), ("🙂", -0.5), ("", 0.5)], [("x", 0.0)])
    row, query = coloured(both, 100)
    assert [(p.text, p.level) for p in row] == [("a", LEVELS), ("bc", 0), ("🙂", -2)]
    assert row[-1].score == "-1"
    assert [(p.text, p.level) for p in query] == [("x", 0)]
    assert coloured(None, 100) == ([], [])
    assert coloured(TokenScores([], [("", 1.0)]), 100) == ([], [])


def test_a_long_text_is_cut_and_the_rest_is_summed() -> None:
    row, _ = coloured(TokenScores([("word ", 1.0)] * 10, []), 20)
    assert "".join(p.text for p in row) == "word " * 4 + " … [6 more tokens, together +6]"
