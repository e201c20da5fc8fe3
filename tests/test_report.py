"""The report: it shows the true rows, it marks the true words, and no text of the user becomes markup."""

from __future__ import annotations

import html as html_module
import json
import re
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datablame import diagnostics
from datablame.examples import Example, from_prompt
from datablame.methods.controls import shared_spans
from datablame.report import figures, html, write_report
from datablame.scores import Scores

NASTY = [
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    '"><img src=x onerror=alert(1)>',
    "'quoted' \"twice\" & <b>bold</b>",
    "Grüße 中文 🙂 \u2028 \ud800",
    "line one\nline two\n\n</details></section></main>",
    "{{ 7 * 7 }} %{x} $x$ <!-- ",
    "long " * 4000 + "</textarea>",
]
VOID = {"meta", "br", "img", "link", "input", "hr", "base", "source", "embed"}
OURS = """html head meta title style body main header h1 h2 h3 h4 dl div dt dd ul ol li section p span b i small details
summary table thead tbody tr th td mark button noscript pre code footer script"""


@dataclass
class Node:
    tag: str
    attributes: dict[str, str | None] = field(default_factory=dict)
    children: list[Node | str] = field(default_factory=list)

    def text(self) -> str:
        return "".join(c if isinstance(c, str) else c.text() for c in self.children)

    def all(self, tag: str = "", **attributes: str) -> list[Node]:
        found = []
        for c in self.children:
            if isinstance(c, Node):
                names = {k.replace("_", "-").strip("-"): v for k, v in attributes.items()}
                if tag in ("", c.tag) and all(v in (c.attributes.get(k) or "").split(" ") for k, v in names.items()):
                    found.append(c)
                found += c.all(tag, **attributes)
        return found


class Tree(HTMLParser):
    """A strict reader: every element must be closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Node("root")
        self.open = [self.root]
        self.feed(page)
        self.close()
        assert self.open == [self.root], "elements left open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, dict(attrs))
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def tree(scores: Scores, k: int = 10) -> Node:
    return Tree(html.render(scores, k)).root


def example(i: int, prompt: str, response: str, label: str | None = None, id: int | str | None = None) -> Example:
    return replace(from_prompt(prompt, response, id=i if id is None else id), row=i, label=label)


def fake(m: int = 2, n: int = 30, methods: tuple[str, ...] = ("gradcos", "bm25"), seed: int = 0, **kw: Any) -> Scores:
    rng = np.random.default_rng(seed)
    train = [example(i, f"question {i}", f"answer number {i}", "ab"[i % 2], f"t{i}") for i in range(n)]
    queries = [example(i, f"ask {i}", f"The answer number {i} is right.", "a", f"q{i}") for i in range(m)]
    return Scores({name: rng.normal(size=(m, n)) for name in methods}, queries, train, **kw)


def nasty() -> Scores:
    texts = NASTY
    train = [example(i, t, texts[-1 - i], t, f"{t}{i}") for i, t in enumerate(texts)]
    queries = [example(i, texts[-1 - i], t, t, f"q{t}{i}") for i, t in enumerate(texts[:4])]
    v = np.random.default_rng(0).normal(size=(4, len(train)))
    settings = {"model": texts[2], texts[0]: {"inner": texts[1]}, "command": f"datablame trace --prompt '{texts[1]}'"}
    return Scores({"gradcos": v, texts[2]: -v}, queries, train, settings, [texts[0], texts[2]])


# ---------------------------------------------------------------- safe and self-contained


def test_no_text_becomes_markup() -> None:
    page = tree(nasty())
    assert {node.tag for node in page.all()} <= set(OURS.split())
    assert len(page.all("script")) == 3
    assert not [a for node in page.all() for a in node.attributes if a.startswith("on")]
    ours = page.all("script")[-1].text()
    assert "alert" not in ours
    assert "Plotly.react" in ours


def test_nasty_text_is_shown_as_it_is(tmp_path: Path) -> None:
    scores = nasty()
    path = write_report(scores, tmp_path / "r.html", 10)
    page = Tree(path.read_text(encoding="utf-8")).root
    shown = {c.attributes["data-id"] for c in page.all("li", class_="row")}
    assert shown == {str(e.id).replace("\ud800", "?") for e in scores.train}
    assert NASTY[2] in page.all("dl")[0].text()
    assert NASTY[1] in page.all("code", id="command")[0].text()
    assert any(NASTY[0] in li.text() for li in page.all("ul", class_="notes")[0].all("li"))
    query = page.all("details", class_="query")[0]
    assert NASTY[0] in query.all("div", class_="output")[0].text()


def test_nothing_is_loaded_from_elsewhere() -> None:
    page = tree(nasty())
    for node in page.all():
        assert not {"src", "href", "srcset", "data", "action"} & set(node.attributes), node.tag
    (style,) = page.all("style")
    assert "url(" not in style.text()
    assert "@import" not in style.text()
    (policy,) = [n for n in page.all("meta") if n.attributes.get("http-equiv") == "Content-Security-Policy"]
    content = policy.attributes["content"] or ""
    assert "default-src 'none'" in content
    assert "http" not in content


def test_the_policy_admits_exactly_the_two_scripts_of_the_page() -> None:
    page = tree(fake())
    (policy,) = [n for n in page.all("meta") if n.attributes.get("http-equiv") == "Content-Security-Policy"]
    admitted = set(re.findall(r"'sha256-[^']+'", policy.attributes["content"] or ""))
    run = [s for s in page.all("script") if s.attributes.get("type") != "application/json"]
    assert admitted == {html._csp_hash(s.text()) for s in run}
    assert len(run) == 2


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize(("m", "n", "k"), [(2, 30, 10), (1, 12, 10), (5, 40, 3), (1, 1, 10)])
def test_every_method_and_query_shows_its_true_ends_in_order(m: int, n: int, k: int) -> None:
    scores = fake(m, n)
    page = tree(scores, k)
    sections = page.all("details", class_="query")
    assert [s.attributes["data-query"] for s in sections] == [q.id for q in scores.queries]
    for i, query in enumerate(sections):
        rankings = query.all("section", class_="ranking")
        assert [r.attributes["data-method"] for r in rankings] == scores.methods
        for method, ranking in zip(scores.methods, rankings, strict=True):
            best = sorted(range(n), key=lambda t: -scores.values[method][i, t])
            top = [c.attributes["data-id"] for c in ranking.all("li", data_end="top")]
            low = [c.attributes["data-id"] for c in ranking.all("li", data_end="lowest")]
            assert top == [f"t{t}" for t in best[:k]]
            count = min(5, k, n - len(top))
            assert low == [f"t{t}" for t in best[n - count :]]
            ranks = [int(c.all("span", class_="rank")[0].text()) for c in ranking.all("li", class_="row")]
            assert ranks == [*range(1, len(top) + 1), *range(n - len(low) + 1, n + 1)]


def test_scores_percentiles_rows_and_labels_are_the_rows_own() -> None:
    scores = fake(1, 30)
    (ranking, _) = tree(scores, 10).all("section", class_="ranking")
    percentiles = scores.percentiles("gradcos")[0]
    for card in ranking.all("li", class_="row"):
        t = int((card.attributes["data-id"] or "t")[1:])
        assert float(card.all("span", class_="score")[0].text()) == pytest.approx(
            scores.values["gradcos"][0, t], abs=0.001
        )
        assert float(card.all("span", class_="percentile")[0].text()[:-1]) == pytest.approx(percentiles[t], abs=0.051)
        assert card.all("span", class_="where")[0].text() == f"row {t}"
        assert card.all("span", class_="label")[0].text() == "ab"[t % 2]


def test_rows_that_several_methods_name_say_so() -> None:
    v = np.arange(6.0)[None, :]
    base = fake(1, 6)
    scores = Scores({"gradcos": v, "repsim": v, "bm25": -v}, base.queries, base.train)
    page = tree(scores, 2)
    said = {c.attributes["data-id"]: c.all("span", class_="agreed") for c in page.all("li", data_end="top")}
    assert said["t5"][0].text() == "in the top 2 of 2 methods"
    assert said["t0"] == []


@pytest.mark.parametrize(
    ("scores", "shown"),
    [
        ([0.99812, 0.99811, 0.9975], ["0.9981200", "0.9981100", "0.9975000"]),
        ([12.34567, 0.0, 1.0], ["12.35", "0.00", "1.00"]),
        ([3e-12, 1e-12, -1e-12], ["3.000e-12", "1.000e-12", "-1.000e-12"]),
        ([2e9, 1e9, 0.0], ["2.000e+09", "1.000e+09", "0.000e+00"]),
        ([0.5, -0.0001, -0.5], ["0.500", "0.000", "-0.500"]),
        ([0.0, 0.0, 0.0], ["0", "0", "0"]),
    ],
)
def test_scores_of_a_ranking_have_as_many_digits_as_tell_them_apart(scores: list[float], shown: list[str]) -> None:
    v = np.array(scores)
    assert [html._number(x, html._decimals(v)) for x in scores] == shown


# ---------------------------------------------------------------- shared words


def marks(node: Node) -> list[tuple[str, bool]]:
    """Characters of an element, each with: is it marked?"""
    out: list[tuple[str, bool]] = []
    for c in node.children:
        if isinstance(c, str):
            out += [(x, node.tag == "mark") for x in c]
        else:
            out += marks(c)
    return out


def marked(node: Node) -> list[str]:
    return [n.text() for n in node.all("mark")]


def test_marks_are_the_shared_words() -> None:
    train = [
        example(0, "The slogan?", "It is warm hands, slow mornings for us."),
        example(1, "Nothing", "No words in common here."),
        example(2, "Again?", "Say: slow mornings, everyone."),
    ]
    query = example(0, "Slogan?", "We say warm hands, slow mornings, everyone.")
    v = np.array([[3.0, 1.0, 2.0]])
    page = tree(Scores({"gradcos": v}, [query], train), 3)
    (output,) = page.all("div", class_="output")
    assert "".join(marked(output)) == "warm hands, slow mornings, everyone."
    by_title = {n.text(): n.attributes["title"] for n in output.all("mark")}
    assert by_title["slow mornings"] == "Also in 2 of the 3 top rows"
    cards = {c.attributes["data-id"]: c for c in page.all("li", class_="row")}
    assert marked(cards["0"]) == ["warm hands, slow mornings"]
    assert marked(cards["1"]) == []
    assert marked(cards["2"]) == ["slow mornings, everyone."]


def test_marks_of_the_output_cover_the_spans_shared_with_any_top_row_and_no_other() -> None:
    rng = np.random.default_rng(3)
    words = ["red", "green", "blue", "tea", "cup", "."]
    texts = [" ".join(rng.choice(words, 12)) for _ in range(14)]
    train = [example(i, t[:20], t) for i, t in enumerate(texts[:12])]
    queries = [example(i, "?", t) for i, t in enumerate(texts[12:])]
    scores = Scores({"a": rng.normal(size=(2, 12)), "b": rng.normal(size=(2, 12))}, queries, train)
    for i, query in enumerate(tree(scores, 2).all("details", class_="query")):
        response = queries[i].response
        want = [False] * len(response)
        for method in scores.methods:
            for t in scores.order(i, method)[:2]:
                for a, b in shared_spans(response, f"{train[t].prompt}\n{train[t].response}"):
                    want[a:b] = [True] * (b - a)
        assert any(want)
        assert not all(want)
        assert marks(query.all("div", class_="output")[0]) == list(zip(response, want, strict=True))


def test_a_long_row_is_shortened_around_the_shared_words_and_given_in_full() -> None:
    long = "filler word " * 60 + "warm hands, slow mornings" + " and more" * 60
    scores = Scores({"a": np.ones((1, 1))}, [example(0, "?", "warm hands, slow mornings")], [example(0, "p", long)])
    (card,) = tree(scores).all("li", class_="row")
    (short,) = card.all("p", class_="response")
    assert len(short.text()) < 220
    assert marked(short) == ["warm hands, slow mornings"]
    assert short.text().startswith("… ")
    (full,) = card.all("details", class_="full")
    assert full.all("div", class_="text")[1].text() == long
    assert marked(full) == ["warm hands, slow mornings"]


def test_a_text_beyond_the_limit_says_how_much_is_left_out() -> None:
    scores = Scores({"a": np.ones((1, 1))}, [example(0, "?", "x")], [example(0, "p", "y " * 5000)])
    (full,) = tree(scores).all("details", class_="full")
    assert f"[{10_000 - html.LONGEST:,} more characters]" in full.text()


# ---------------------------------------------------------------- findings, settings


def test_the_box_gives_the_verdict_and_every_finding_under_its_method() -> None:
    base = fake(4, 30)
    loud = np.tile(np.arange(30.0), (4, 1))
    scores = Scores({"gradcos": loud, "repsim": base.values["bm25"]}, base.queries, base.train, {}, ["A <note>."])
    findings = diagnostics.diagnose(scores)
    assert {f.level for f in findings} == {"good", "note", "warning"}
    (box,) = tree(scores).all("section", class_="believe")
    assert box.all("p", class_="verdict")[0].text() == diagnostics.verdict(findings, 2)
    groups = {s.all("h3")[0].text(): s for s in box.all("section")}
    for f in findings:
        assert f.sentence in groups[f.method or "All methods"].text()
        assert f.level in groups[f.method or "All methods"].text()
    (numbers,) = box.all("tbody")
    assert len(numbers.all("tr")) == sum(len(f.numbers) for f in findings)


def test_settings_are_flattened_and_hashes_shortened() -> None:
    digest = "0123456789abcdef" * 4
    settings = {"model": "m", "adapter": None, "model_sha256": digest, "encoding": {"loss_on": "response"}}
    page = tree(fake(settings=settings | {"layers": [1, 2], "command": ["datablame", "trace", "a b"]}))
    (table,) = page.all("div", class_="settings")
    rows = {tr.all("th")[0].text(): tr.all("td")[0] for tr in table.all("tr")}
    assert {name: td.text() for name, td in rows.items()} == {
        "model": "m",
        "adapter": "none",
        "model_sha256": "0123456789ab…",
        "encoding.loss_on": "response",
        "layers": "1, 2",
    }
    assert rows["model_sha256"].attributes["title"] == digest
    assert page.all("code", id="command")[0].text() == "datablame trace 'a b'"


def test_without_a_command_there_is_no_copy_button() -> None:
    page = tree(fake())
    assert not page.all("pre")
    assert not page.all("button", id="copy")


# ---------------------------------------------------------------- heat maps


def figure_of(page: Node) -> dict[str, Any]:
    return json.loads(page.all("script", id="figure")[0].text())["figure"]


def array(value: Any) -> np.ndarray[Any, Any]:
    """Plotly's own encoding of arrays."""
    import base64

    if not isinstance(value, dict):
        return np.array(value)
    flat = np.frombuffer(base64.b64decode(value["bdata"]), dtype=value["dtype"])
    return flat.reshape([int(x) for x in value["shape"].split(",")]) if "shape" in value else flat


def test_the_map_has_every_score_grouped_by_label() -> None:
    scores = fake(3, 20, settings={})
    page = tree(scores)
    figure = figure_of(page)
    columns = [*range(0, 20, 2), *range(1, 20, 2)]
    assert [t["visible"] for t in figure["data"]] == [True, False]
    for method, trace in zip(scores.methods, figure["data"], strict=True):
        np.testing.assert_allclose(array(trace["customdata"]), scores.values[method][:, columns], rtol=1e-6)
        z = array(trace["z"])
        centred = scores.values[method] - scores.values[method].mean(1, keepdims=True)
        np.testing.assert_allclose(z, (centred / np.abs(centred).max(1, keepdims=True))[:, columns], rtol=1e-4)
        assert [x.split(" · ")[0] for x in trace["x"]] == [f"t{t}" for t in columns]
    assert [s["x0"] for s in figure["layout"]["shapes"]] == [9.5]
    assert figure["layout"]["xaxis"]["ticktext"] == ["a", "b"]
    assert [b.text() for b in page.all("div", id="methods")[0].all("button")] == scores.methods


def strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [s for v in value for s in strings(v)] if isinstance(value, list) else []


def test_plotly_gets_no_markup_from_the_user() -> None:
    data = figure_of(tree(nasty()))
    ours = data["data"][0]["hovertemplate"]
    for text in strings(data):
        if text != ours:
            assert not set("<>") & set(text), text
            assert "%{" not in text
            text.encode()  # no half of a surrogate pair
    shown = html_module.unescape(" ".join(data["data"][0]["x"]))
    assert "<script>alert(1)</script>" in shown


def test_the_figure_cannot_end_its_script_element() -> None:
    page = tree(nasty())
    assert not set("<>&") & set(page.all("script", id="figure")[0].text())


def test_names_in_the_map_stay_apart() -> None:
    train = [example(i, "p", "r", id="x" * 100 + str(i)) for i in range(3)]
    train = [replace(e, row=0) for e in train]
    page = tree(Scores({"a": np.arange(3.0)[None, :]}, [example(0, "p", "r")], train))
    assert len(set(figure_of(page)["data"][0]["x"])) == 3


def test_a_large_map_shows_the_listed_rows_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "CELLS", 100)
    scores = fake(2, 60)
    page = tree(scores, 3)
    listed = {f"t{t}" for m in scores.methods for i in range(2) for t in (*scores.order(i, m)[:3],)}
    lowest = {f"t{t}" for m in scores.methods for i in range(2) for t in (*scores.order(i, m)[-3:],)}
    drawn = {x.split(" · ")[0] for x in figure_of(page)["data"][0]["x"]}
    assert drawn == listed | lowest
    assert f"Of 60 training rows the map shows {len(drawn)}" in page.text()


def test_the_page_stays_small() -> None:
    scores = fake(300, 1000, ("gradcos", "graddot", "bm25"))
    page = html.render(scores, 10)
    assert len(page.encode()) < len(html.get_plotlyjs().encode()) + 10_000_000
    read = Tree(page).root
    left = 300 - len(read.all("details", class_="query"))
    assert left > 0
    assert f"{left} more queries are left out" in read.text()


def test_agreement_is_shown_for_two_methods_and_not_for_one() -> None:
    scores = fake()
    (table,) = tree(scores).all("table", class_="agree")
    rho = diagnostics.rank_correlation(scores.values["gradcos"], scores.values["bm25"])
    cells = [td.text() for td in table.all("tbody")[0].all("td")]
    assert cells[0].startswith("1.00")
    assert cells[1].startswith(f"{rho:.2f}")
    assert not tree(fake(methods=("gradcos",))).all("table", class_="agree")


# ---------------------------------------------------------------- edges


def test_the_first_query_is_open_and_many_others_are_closed() -> None:
    def opened(m: int) -> list[bool]:
        return ["open" in d.attributes for d in tree(fake(m)).all("details", class_="query")]

    assert opened(3) == [True] * 3
    assert opened(5) == [True, False, False, False, False]


def test_equal_scores_render_in_the_order_of_the_file_and_say_so() -> None:
    base = fake(2, 8)
    page = tree(Scores({"a": np.full((2, 8), 0.25)}, base.queries, base.train), 3)
    assert [c.attributes["data-id"] for c in page.all("li", data_end="top")] == ["t0", "t1", "t2"] * 2
    assert "All scores are equal" in page.all("section", class_="ranking")[0].text()
    assert not array(figure_of(page)["data"][0]["z"]).any()


def test_rows_without_labels_prompts_or_settings_render() -> None:
    train = [Example(id=i, row=i, text=f"Just a text {i}.") for i in range(4)]
    page = tree(Scores({"a": np.eye(1, 4)}, [Example(id="q", row=0, text="Just a text 0.")], train))
    assert not page.all("span", class_="label")
    assert not page.all("p", class_="prompt")
    assert not figure_of(page)["layout"].get("shapes")
    assert "No settings were recorded." in page.text()


def test_huge_and_tiny_scores_keep_their_value_in_the_map() -> None:
    base = fake(1, 4)
    v = np.array([[1e150, -1e150, 1e-300, 0.0]])
    figure = figure_of(
        tree(Scores({"a": v, "b": v * 1e-155}, base.queries, [replace(e, label=None) for e in base.train]))
    )
    np.testing.assert_array_equal(array(figure["data"][0]["customdata"]), v)
    np.testing.assert_allclose(array(figure["data"][1]["z"])[0], [1, -1, 0, 0], atol=1e-6)
