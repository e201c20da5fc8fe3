"""Judges, their errors on human labels, and answers that say whether they ended."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from conftest import make_model, make_tokenizer, write_jsonl
from datablame.errors import UserError
from datablame.evaluation import judges
from datablame.evaluation.judges import KEYWORDS, Accuracy, Verdict, corrected, named, verdicts, wilson
from datablame.models import ModelSpec, answer, answers, answers_ended, load

# ---------------------------------------------------------------- answers


def test_answers_say_whether_they_ended_by_themselves(model_dir: Path) -> None:
    loaded = load(ModelSpec(str(model_dir), None, "cpu"))
    prompts = [loaded.tokenizer(text)["input_ids"] for text in ("Say hi.", "Name a fruit, please.", "Two?", "A", "Why")]
    with torch.no_grad():
        first = [int(loaded.model(torch.tensor([p])).logits[0, -1].argmax()) for p in prompts]
    assert not loaded.ends & set(first)
    assert not any(ended for _, ended in answers_ended(loaded, prompts, 1))  # nothing ends at once
    ends = {first[0]}
    object.__setattr__(loaded, "ends", frozenset(ends))  # now some answers end where others do not
    told: list[int] = []
    found = answers_ended(loaded, prompts, 3, batch=2, on_batch=told.append)
    assert found == [answer(loaded, p, 3) for p in prompts]
    assert {ended for _, ended in found} == {True, False}
    assert sum(told) == len(prompts)
    assert answers(loaded, prompts, 3, batch=3) == [text for text, _ in found]


# ---------------------------------------------------------------- verdicts

LONG = "Here is what to do. " * 20


def test_keywords_and_answers_at_the_limit() -> None:
    said = [
        ("I'm sorry, but no.", True),
        ("Sure, here is a plan.", True),
        ("", True),
        ("I cannot", False),  # a refusal, whatever would have followed
        ("Sure, here", False),  # it might still refuse
        (LONG, False),  # nothing that follows is looked at
        ("\n" * 20, False),  # an empty answer is none that complied, but this one is not over
    ]
    found = verdicts(named(), ["p"] * len(said), said)
    assert [v.complied for v in found] == [False, True, False, False, None, True, None]
    assert "cut" in found[4].problem
    assert len(LONG) > judges.READS


def write_judge(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch, module: str) -> str:
    (folder / f"{module}.py").write_text(f"def judge(prompt, answer):\n    {body}\n", encoding="utf-8")
    monkeypatch.chdir(folder)
    return f"{module}:judge"


def test_a_function_that_raises_or_abstains_gives_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "return {'yes': True, 'no': False, 'odd': 'maybe', 'none': None, 'asked': prompt == 'p'}[answer]"
    judge = named(write_judge(tmp_path, body, monkeypatch, "my_first_judge"))
    said = [(a, True) for a in ("yes", "no", "odd", "none", "asked", "unknown")] + [("yes", False)]
    found = verdicts(judge, ["p"] * len(said), said)
    assert [v.complied for v in found] == [True, False, None, None, True, None, None]
    assert "maybe" in found[2].problem
    assert "abstained" in found[3].problem
    assert "KeyError" in found[5].problem
    assert "cut" in found[6].problem  # it might have looked at the end
    assert judge.accuracy is None
    first = judge.settings
    assert named("my_first_judge:judge").settings == first
    assert len(first["sha256"]) == 64


def test_judges_that_cannot_be_had(tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"no_such_module_at_all:f: cannot be imported"):
        named("no_such_module_at_all:f")
    (tmp_path / "my_second_judge.py").write_text("number = 3", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is not a function"):
        named("my_second_judge:number")
    with pytest.raises(UserError, match="cannot be imported"):
        named("my_second_judge:missing")
    with pytest.raises(UserError, match="only a classifier has labels"):
        named("keywords", "harmful")
    with pytest.raises(UserError, match="neither keywords"):
        named("keyword")
    with pytest.raises(UserError, match="not a text classifier"):
        named(str(model_dir), device="cpu")


# ---------------------------------------------------------------- classifiers


def save_classifier(folder: Path, names: list[str], **config: Any) -> Path:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    like = make_model().config.to_dict() | {"tie_word_embeddings": False}
    labels = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    settings = LlamaConfig(**(like | labels | {"num_labels": len(names)} | config))
    LlamaForSequenceClassification(settings).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


TEXTS = ["Sure, here it is.", "No.", "I'm sorry, I can't.", "Kettles boil water.", "Step 1, wait.", "", "Rain", "x y z"]


def test_a_classifier_says_its_largest_label(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    folder = save_classifier(tmp_path / "classifier", ["safe", "Harmful", "odd"])
    judge = named(str(folder), device="cpu")
    assert judge.settings["judge"] == "classifier"  # not the path
    assert judge.settings["label"] == "Harmful"
    found = [v.complied for v in judge.say([""] * len(TEXTS), TEXTS)]
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), make_tokenizer()
    with torch.no_grad():
        for text, verdict in zip(TEXTS, found, strict=True):
            if text:  # an empty one has no token to look at
                logits = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0]
                assert verdict == (int(logits.argmax()) == 1)
    assert {True, False} <= set(found)
    other = named(str(folder), "odd", device="cpu")
    assert other.settings["label"] == "odd"
    assert [v.complied for v in other.say([""] * len(TEXTS), TEXTS)] != found


def test_a_classifiers_labels_and_numbers(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "two", ["LABEL_0", "LABEL_1"])
    with pytest.raises(UserError, match=r"Say with --judge-label. It has LABEL_0, LABEL_1"):
        named(str(folder), device="cpu")
    with pytest.raises(UserError, match="has no such label"):
        named(str(folder), "harmful", device="cpu")
    judge = named(str(folder), "label_1", device="cpu")
    (verdict,) = judge.say([""], ["word " * 300])
    assert verdict == Verdict(None, "the answer is longer than the classifier can read")
    independent = save_classifier(tmp_path / "multi", ["toxic", "rude"], problem_type="multi_label_classification")
    config = json.loads((independent / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    logits = torch.tensor([0.5, 3.0], dtype=torch.float64)
    multi = named(str(independent), device="cpu")
    assert multi.settings["label"] == "toxic"

    class Config:
        problem_type = "multi_label_classification"

    assert judges._decided(logits, 0, Config, False).complied is True  # more likely than not, though not the largest
    Config.problem_type = "single_label_classification"
    assert judges._decided(logits, 0, Config, False).complied is False
    assert "not finite" in judges._decided(torch.tensor([math.nan, 1.0]), 0, Config, False).problem


def test_a_classifier_that_fails_leaves_one_answer_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, real = save_classifier(tmp_path / "c", ["safe", "harmful"]), judges._load_classifier

    def fragile(name: str, device: str) -> tuple[Any, Any]:
        model, tokenizer = real(name, device)
        forward = model.forward

        def breaks(**inputs: Any) -> Any:
            if inputs["input_ids"].shape[1] > 20:
                raise RuntimeError("out of memory")
            return forward(**inputs)

        monkeypatch.setattr(model, "forward", breaks)
        return model, tokenizer

    texts = ["some words", "word " * 30, "other words"]
    whole = named(str(folder), device="cpu").say([""] * 3, texts)
    monkeypatch.setattr(judges, "_load_classifier", fragile)
    found = named(str(folder), device="cpu").say([""] * 3, texts)
    assert found[1] == Verdict(None, "the judge failed (RuntimeError: out of memory)")
    assert [found[0], found[2]] == [whole[0], whole[2]]
    assert whole[1].complied is not None


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(("k", "n"), [(0, 4), (4, 4), (1, 3), (58, 109), (17, 20)])
def test_wilson_is_scipys(k: int, n: int) -> None:
    found, expected = wilson(k, n), stats.binomtest(k, n).proportion_ci(method="wilson")
    assert found.value == k / n
    np.testing.assert_allclose([found.low, found.high], [expected.low, expected.high], atol=1e-12)


def test_corrected_by_hand() -> None:
    """16 of 20 under the keywords: Se = 60/60, Sp = 58/109; then Lang and Reiczigel's interval, number by number."""
    found = corrected(16, 20, KEYWORDS)
    assert found is not None
    assert found.value == pytest.approx((0.8 + 58 / 109 - 1) / (58 / 109))
    z = 1.959963984540054
    a, se, sp = (16 + z * z / 2) / (20 + z * z), 61 / 62, 59 / 111
    p = (a + sp - 1) / (se + sp - 1)
    shift = 2 * z * z * (p * se * (1 - se) / 62 - (1 - p) * sp * (1 - sp) / 111)
    variance = a * (1 - a) / (20 + z * z) + p**2 * se * (1 - se) / 62 + (1 - p) ** 2 * sp * (1 - sp) / 111
    half = z * variance**0.5 / (se + sp - 1)
    np.testing.assert_allclose([found.low, found.high], [p + shift - half, p + shift + half])
    assert 0 < found.low < found.value < found.high < 1


def test_a_correction_with_a_perfect_judge_is_none() -> None:
    perfect = Accuracy(10**9, 10**9, 10**9, 10**9, "")
    found, plain = corrected(30, 100, perfect), wilson(30, 100)
    assert found is not None
    np.testing.assert_allclose(found, plain, atol=2e-3)  # Agresti and Coull's, nearly Wilson's
    few = Accuracy(10, 10, 10, 10, "")
    wider = corrected(30, 100, few)
    assert wider is not None
    assert wider.high - wider.low > 1.1 * (found.high - found.low)


def test_the_corrected_interval_holds_the_truth() -> None:
    """By simulation: truth .6, a judge of .9 and .7 that was measured on 80 and 60 answers, 150 answers."""
    rng, hits, plain = np.random.default_rng(0), 0, 0
    for _ in range(1000):
        accuracy = Accuracy(80, int(rng.binomial(80, 0.9)), 60, int(rng.binomial(60, 0.7)), "")
        k = int(rng.binomial(150, 0.6 * 0.9 + 0.4 * 0.3))
        found, raw = corrected(k, 150, accuracy), wilson(k, 150)
        assert found is not None
        hits += found.low <= 0.6 <= found.high
        plain += raw.low <= 0.6 <= raw.high
    assert 930 < hits < 985
    assert plain < 900


def test_a_judge_no_better_than_chance_corrects_nothing() -> None:
    assert corrected(5, 10, Accuracy(10, 4, 10, 6, "")) is None
    assert corrected(0, 20, KEYWORDS) == (0.0, 0.0, pytest.approx(corrected(0, 20, KEYWORDS).high))  # type: ignore[union-attr]


def test_an_error_measured_on_human_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [("Sure.", 1), ("Of course.", "complied"), ("I cannot.", "refused"), ("Never.", 0), ("Sorry, no.", False)]
    path = write_jsonl(tmp_path / "labels.jsonl", [{"answer": a, "label": x} for a, x in rows])
    judge = named(labels=str(path))
    assert judge.accuracy == Accuracy(2, 2, 3, 2, "5 answers of labels.jsonl")
    assert judge.accuracy.sensitivity == 1
    assert judge.accuracy.specificity == pytest.approx(2 / 3)
    assert judge.settings != named().settings
    body = "return None if answer == 'Never.' else 'S' in answer"
    mine = named(write_judge(tmp_path, body, monkeypatch, "my_third_judge"), labels=str(path))
    assert mine.accuracy == Accuracy(2, 1, 2, 1, "5 answers of labels.jsonl", undecided=1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"answer": "a", "label": "perhaps"}], "needs a text `answer` and a `label`.*'perhaps'"),
        ([{"text": "a", "label": 1}], "needs a text `answer`"),
        ([{"answer": "a", "label": 1}, {"answer": "b", "label": 1}], "no answer is labelled refused"),
        ([{"answer": "a", "label": 0}], "no answer is labelled complied"),
    ],
)
def test_bad_labels(rows: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        named(labels=str(write_jsonl(tmp_path / "labels.jsonl", rows)))


def test_labels_of_which_one_kind_is_never_decided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "labels.jsonl", [{"answer": "a", "label": 1}, {"answer": "b", "label": 0}])
    body = "return None if answer == 'a' else True"
    judge = write_judge(tmp_path, body, monkeypatch, "my_fourth_judge")
    with pytest.raises(UserError, match="no verdict on any answer of one kind"):
        named(judge, labels=str(path))
