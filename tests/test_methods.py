"""Every method against its formula written as loops, and the properties that all must have."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from datablame import methods as registry
from datablame.errors import UserError
from datablame.methods import Text, create, parse, parse_list
from datablame.methods.controls import shared_spans

SIZES = {"a": 5, "b": 40, "c": 12}


def features(n: int, seed: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {k: torch.randn(n, d, generator=g, dtype=dtype) * 10**i for i, (k, d) in enumerate(SIZES.items())}


def hidden(n: int, seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    kinds = ("prompt.last", "response.last", "response.mean")
    return {f"{k}.{t}": torch.randn(n, 8, generator=g, dtype=torch.float64) for k in (2, 4) for t in kinds}


TRAIN, QUERY = features(7, 0), features(3, 1)
TEXTS = [
    Text("What is a kettle?", "A kettle boils water for tea."),
    Text("Who likes rain?", "Nobody likes rain in June."),
    Text("", ""),
    Text("Tea?", "Water for tea, please."),
]


def loops(formula: str) -> np.ndarray:
    """The formula over plain lists of numbers."""
    out = np.zeros((3, 7))
    for q in range(3):
        for t in range(7):
            blocks = [(QUERY[b][q].tolist(), TRAIN[b][t].tolist()) for b in SIZES]
            dots = [sum(x * y for x, y in zip(v, g, strict=True)) for v, g in blocks]
            vv = [sum(x * x for x in v) for v, _ in blocks]
            gg = [sum(y * y for y in g) for _, g in blocks]
            out[q, t] = {
                "graddot": sum(dots),
                "gradcos": sum(d / math.sqrt(a * b) for d, a, b in zip(dots, vv, gg, strict=True)) / len(blocks),
                "gradcos:over=row": sum(dots) / math.sqrt(sum(vv) * sum(gg)),
                "gradnorm": math.sqrt(sum(gg)),
            }[formula]
    return out


@pytest.mark.parametrize("spec", ["graddot", "gradcos", "gradcos:over=row", "gradnorm"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradient_methods_equal_loops(spec: str, dtype: torch.dtype) -> None:
    train, query = ({k: v.to(dtype) for k, v in f.items()} for f in (TRAIN, QUERY))
    got = parse(spec).fit(train).score(query)
    assert got.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    want = loops(spec)
    assert np.abs(got.double().numpy() - want).max() < tolerance * np.abs(want).max()


@pytest.mark.parametrize(
    ("spec", "block"),
    [
        ("repsim", "2.response.mean"),
        ("repsim:layer=last,text=prompt", "4.prompt.last"),
        ("repsim:layer=2,token=last", "2.response.last"),
        ("repsim-base:layer=4", "4.response.mean"),
    ],
)
def test_repsim_is_the_cosine_of_the_chosen_state(spec: str, block: str) -> None:
    train, query = hidden(5, 0), hidden(2, 1)
    got = parse(spec).fit(train).score(query)
    for q in range(2):
        for t in range(5):
            want = torch.nn.functional.cosine_similarity(query[block][q], train[block][t], dim=0)
            assert abs(got[q, t] - want) < 1e-12
    alone = parse("repsim").fit({"any name": train[block]}).score({"any name": query[block]})
    torch.testing.assert_close(alone, got)


@pytest.mark.parametrize("spec", ["graddot", "gradcos", "gradcos:over=row", "gradnorm", "repsim"])
def test_permuting_training_rows_permutes_scores(spec: str) -> None:
    train, query = (hidden(7, 0), hidden(3, 1)) if spec == "repsim" else (TRAIN, QUERY)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(3))
    a = parse(spec).fit(train).score(query)
    b = parse(spec).fit({k: v[order] for k, v in train.items()}).score(query)
    torch.testing.assert_close(a[:, order], b)


def test_gradcos_ignores_the_scale_of_a_block_and_keeps_the_sign() -> None:
    scaled, of_query = ({k: v * (1e-20 if k == "a" else 1e15) for k, v in x.items()} for x in (TRAIN, QUERY))
    a, b = create("gradcos").fit(TRAIN).score(QUERY), create("gradcos").fit(scaled).score(of_query)
    torch.testing.assert_close(a, b)
    minus = create("gradcos").fit({k: -v for k, v in TRAIN.items()}).score(QUERY)
    torch.testing.assert_close(minus, -a)
    assert a.min() < 0 < a.max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiny_and_huge_gradients_do_not_underflow(dtype: torch.dtype) -> None:
    want = create("gradcos").fit({"a": TRAIN["a"]}).score({"a": QUERY["a"]})
    for over in ("block", "row"):
        for scale in (1e-25, 1e25):
            train, query = ({"a": x["a"].to(dtype) * scale} for x in (TRAIN, QUERY))
            got = create("gradcos", over=over).fit(train).score(query)
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e-15])
def test_gradcos_leaves_out_blocks_of_nothing_but_rounding(dtype: torch.dtype, scale: float) -> None:
    """Oracle: the same with zeros there. A hundred times the precision stays a gradient, whatever the block's scale."""

    def made(noise: float, of_row: float, of_query: float) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        train, query = ({k: x.to(dtype, copy=True) for k, x in rows.items()} for rows in (TRAIN, QUERY))
        for block in TRAIN:  # a row, and a query, without a gradient in block a
            train[block][2] *= of_row * (noise if block == "a" else 1)
            query[block][1] *= of_query * (noise if block == "a" else 1)
        train["a"], query["a"] = train["a"] * scale, query["a"] * scale
        return train, query

    eps = torch.finfo(dtype).eps
    for sizes in ((1.0, 1.0), (1e-9, 1e6)):  # rows learnt by heart are short in every block, and are gradients
        train, query = made(eps, *sizes)
        none, of_none = made(0, *sizes)
        assert train["a"][2].any()
        assert query["a"][1].any()
        assert torch.equal(create("gradcos").fit(train).score(query), create("gradcos").fit(none).score(of_none))
        train, query = made(100 * eps, *sizes)
        kept = create("gradcos").fit(train).score(query)
        torch.testing.assert_close(kept, create("gradcos").fit(TRAIN).score(QUERY).to(dtype), rtol=1e-4, atol=1e-5)
    train, query = made(eps, 1, 1)
    votes = create("gradcos", aggregate="rank").fit(train).score(query)
    train, query = made(0, 1, 1)
    assert torch.equal(votes, create("gradcos", aggregate="rank").fit(train).score(query))


def test_a_missing_prompt_state_is_an_error() -> None:
    states = hidden(3, 0)
    states["4.prompt.last"][1] = 0
    with pytest.raises(UserError, match=r"row 1 has no hidden state for the prompt"):
        parse("repsim:layer=last,text=prompt").fit(states)
    with pytest.raises(UserError, match=r"^repsim-base: row 1 has no .*Use repsim-base:text=response"):
        parse("repsim-base:layer=last,text=prompt").fit(states)


def test_bm25_equals_the_formula() -> None:
    """Lucene's BM25 (k1 = 1.5, b = 0.75), one word at a time."""
    rows = [
        ["a", "kettle", "boils", "water", "for", "tea"],
        ["nobody", "likes", "rain", "in", "june"],
        [],
        ["water", "for", "tea", "please"],
    ]
    query = ["tea", "for", "rain", "rain"]
    mean = sum(map(len, rows)) / len(rows)
    want = []
    for row in rows:
        total = 0.0
        for w in query:
            df = sum(w in r for r in rows)
            idf = math.log(1 + (len(rows) - df + 0.5) / (df + 0.5))
            tf = row.count(w)
            total += idf * tf / (tf + 1.5 * (1 - 0.75 + 0.75 * len(row) / mean))
        want.append(total)
    got = parse("bm25:text=response").fit(TEXTS).score([Text("ignored kettle", "Tea for rain, rain!")])[0]
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-5)
    assert parse("bm25:text=prompt").fit(TEXTS).score([Text("kettle", "")])[0].argmax() == 0
    assert not parse("bm25").fit(TEXTS).score([Text("zzz", "")]).any()
    assert parse("bm25").fit([Text("", "")]).score([Text("a", "b")]).tolist() == [[0.0]]


def brute_longest(a: list[str], b: list[str]) -> int:
    spans = {tuple(b[i:j]) for i in range(len(b)) for j in range(i + 1, len(b) + 1)}
    return max((j - i for i in range(len(a)) for j in range(i + 1, len(a) + 1) if tuple(a[i:j]) in spans), default=0)


def test_verbatim_is_the_longest_shared_span() -> None:
    rng = np.random.default_rng(0)
    draw = lambda k: [str(w) for w in rng.choice(list("abcd"), k)]  # noqa: E731
    rows, queries = [draw(k) for k in (0, 1, 5, 12, 30)], [draw(k) for k in (0, 3, 9)]
    got = create("verbatim").fit([Text("", " ".join(r)) for r in rows]).score([Text("x", " ".join(q)) for q in queries])
    assert got.tolist() == [[brute_longest(q, r) for r in rows] for q in queries]
    assert got.max() >= 3


def test_shared_spans_are_character_ranges() -> None:
    response = "Well, water boils at 80 degrees here; fine."
    spans = shared_spans(response, "They say water boils at 80 degrees. Fine.")
    assert [response[a:b] for a, b in spans] == ["water boils at 80 degrees"]
    assert shared_spans("a b", "a b c") == []


def test_length_and_random() -> None:
    lengths = torch.tensor([[3.0], [9.0]])
    assert create("length").fit({"length": lengths}).score({"length": torch.ones(3, 1)}).tolist() == [[3, 9]] * 3
    a = create("random", seed=5).fit(TEXTS).score(TEXTS[:2])
    assert torch.equal(a, create("random", seed=5).fit(TEXTS).score(TEXTS[:2]))
    assert not torch.equal(a, create("random", seed=6).fit(TEXTS).score(TEXTS[:2]))


def test_the_registry_reads_spellings() -> None:
    assert parse_list("graddot,repsim:layer=15,text=prompt,gradcos") == [
        "graddot",
        "repsim:layer=15,text=prompt",
        "gradcos",
    ]
    assert parse("repsim:layer=15,text=prompt") == create("repsim", layer=15, text="prompt")
    for bad, message in {
        "gradot": r"unknown method 'gradot'.*'graddot'",
        "gradcos:ovr=row": r"gradcos: unknown option 'ovr'.*'over'",
        "length:x=1": "no options",
        "gradcos:row": "option=value",
        "gradcos:over=everything": "use block or row",
        "repsim:text=prompt,token=mean": "token='mean' of the prompt",
        "bm25:text=title": "use prompt, response or both",
    }.items():
        with pytest.raises(UserError, match=message):
            parse(bad)
    with pytest.raises(UserError, match="twice"):
        parse_list("graddot,graddot")
    for name in registry.names():
        summary, _, needs = registry.describe(name)
        assert summary
        assert needs


def test_different_blocks_are_an_error() -> None:
    with pytest.raises(UserError, match="'c' is only in one"):
        create("graddot").fit(TRAIN).score({k: v for k, v in QUERY.items() if k != "c"})
