"""This output rather than that one: scores are those of the one minus those of the other, where that has a meaning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import datablame
from conftest import ROWS, Run, write_jsonl
from datablame import contrast, tracing
from datablame.diagnostics import CONTROLS
from datablame.errors import UserError
from datablame.examples import load_examples
from datablame.indexing import CaptureOptions
from datablame.methods import BUILTIN, create
from datablame.tuning import TuneOptions, tune

THIS = [("Name a fruit.", "A pear."), ("Say hi.", "Hello there, all of you")]
THAT = ["Eight legs.", "No."]
LINEAR = ["graddot", "graddot:relatif=l", "graddot:center=1", "exact", "exact:relatif=theta", "exact-block", "datainf"]
LINEAR += ["lissa:steps=5", "dda", "gauss-newton", "kfac", "ekfac", "tracincp", "adamdot", "trak", "bif", "daunce"]
EXTRAS = (
    "base-gradients,sampled,hidden-gradient,kfac,margin,moments,bif:chains=2,draws=3,burn=1,every=1,daunce:models=3"
)


@pytest.fixture(scope="module")
def rich(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of two checkpoints with all extras, in float64."""
    folder = tmp_path_factory.mktemp("rich")
    train = write_jsonl(folder / "t.jsonl", [{"prompt": p, "response": r} for p, r in ROWS])
    tune(model_dir, train, folder / "a", options=TuneOptions(rank=2, epochs=2, rate=1e-2, batch=2, keep=2))
    options = CaptureOptions(checkpoints="all", extras=EXTRAS)
    datablame.index(str(model_dir), train, folder / "i", str(folder / "a"), dtype="float64", capture=options)
    return folder / "i"


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """The contrast, this alone, that alone."""
    both = [{"prompt": p, "response": r, "against": x} for (p, r), x in zip(THIS, THAT, strict=True)]
    this = [{"prompt": q["prompt"], "response": q["response"]} for q in both]
    that = [{"prompt": q["prompt"], "response": q["against"]} for q in both]
    named = {"both": both, "this": this, "that": that}
    first, second, third = (write_jsonl(tmp_path / f"{name}.jsonl", rows) for name, rows in named.items())
    return first, second, third


def test_a_linear_method_scores_this_minus_that(rich: Path, files: tuple[Path, Path, Path]) -> None:
    both, this, that = (datablame.trace(rich, f, methods=LINEAR) for f in files)
    for m in LINEAR:
        want = this.values[m] - that.values[m]
        np.testing.assert_allclose(both.values[m], want, rtol=1e-7, atol=1e-9 * np.abs(want).max(), err_msg=m)
        assert np.abs(want).max() > 0
    assert both.notes[-1] == "A score is of a query's output rather than its `against`."
    assert list(both.controls) == ["gradnorm"]  # words and states have no difference


@pytest.mark.parametrize("name", [n for n in BUILTIN if n not in CONTROLS])
def test_every_method_refuses_or_turns_its_sign_with_the_contrast(
    rich: Path, files: tuple[Path, Path, Path], tmp_path: Path, name: str
) -> None:
    query = load_examples(files[0])[0]
    this, that = str(query.response), str(query.against)
    spec = {"cg": "cg:steps=3", "minres": "minres:steps=3"}.get(name, name)
    if contrast.why_not(create(name)):
        with pytest.raises(UserError, match="cannot score one output against another"):
            datablame.trace(rich, prompt=query.prompt, response=this, against=that, methods=[spec])
        return
    ways = [(this, that), (that, this)]
    there, back = (
        datablame.trace(rich, prompt=query.prompt, response=a, against=b, methods=[spec]).values[spec] for a, b in ways
    )
    np.testing.assert_allclose(there, -back, rtol=1e-6, atol=1e-9 * np.abs(there).max())
    assert np.abs(there).max() > 0


def test_a_cosine_is_with_the_difference_of_gradients(rich: Path, files: tuple[Path, Path, Path]) -> None:
    both, _, _ = (datablame.trace(rich, f, methods=["gradcos:over=row"]) for f in files)
    store = datablame.FeatureStore.open(rich)
    loaded = tracing.load_for(store, None, None, "cpu")
    encoder = tracing.encoder_of(store, loaded)
    a, b = (
        tracing.capture_queries(store, loaded, encoder, load_examples(f), datablame.tracing.SILENT) for f in files[1:]
    )
    g = store.features("gradients")
    v = torch.cat([a[f"gradients/{k}"] - b[f"gradients/{k}"] for k in g], dim=1)
    whole = torch.cat([g[k] for k in g], dim=1)
    want = torch.cosine_similarity(v[:, None], whole[None], dim=2)
    np.testing.assert_allclose(both.values["gradcos:over=row"], want.numpy(), rtol=1e-9)
    # And of states, the concept's direction.
    got = datablame.trace(rich, files[0], methods=["concept"]).values["concept"]
    h = store.features("hidden")
    method = create("concept").fit(h)
    sides = [{k: x[f"hidden/{k}"] for k in h} for x in (a, b)]
    np.testing.assert_allclose(got, method.score_against(*sides).numpy(), rtol=1e-9)
    w = sides[0][method.block].mean(0) - sides[1][method.block].mean(0)
    centred = h[method.block] - h[method.block].mean(0)
    np.testing.assert_allclose(got[0], (centred @ w / w.norm()).numpy(), rtol=1e-9)


def test_from_python_and_the_command_line(built: Path, tmp_path: Path, run: Run) -> None:
    (prompt, response), against = THIS[0], THAT[0]
    scores = datablame.trace(built, prompt=prompt, response=response, against=against)
    assert scores.methods == ["gradcos", "graddot"]  # the defaults that have a meaning
    assert scores.notes == [f"A score is of this output rather than “{against}”."]
    turned = datablame.trace(built, prompt=prompt, response=against, against=response)
    np.testing.assert_allclose(turned.values["graddot"], -scores.values["graddot"], rtol=1e-5)
    arguments = ["--prompt", prompt, "--response", response, "--against", against]
    code, out, err = run("trace", built, *arguments, "--out", tmp_path / "o")
    assert code == 0, err
    assert f"rather than “{against}”" in out
    assert f"rather than “{against}”" in (tmp_path / "o" / "report.html").read_text()


def test_the_model_own_answer_can_be_contrasted(built: Path) -> None:
    scores = datablame.trace(built, prompt="Say hi.", against="No.", methods=["graddot"], max_new_tokens=4)
    assert any("rather than “No.”" in n for n in scores.notes)


@pytest.mark.parametrize("method", ["repsim", "repsim-base", "rept", "bm25", "verbatim", "length"])
def test_a_method_without_a_meaning_is_refused(rich: Path, files: tuple[Path, Path, Path], method: str) -> None:
    with pytest.raises(UserError, match=f"^{method} cannot score one output against another: .*gradients can"):
        datablame.trace(rich, files[0], methods=["graddot", method])


def test_an_index_of_states_alone_has_the_concept(model_dir: Path, train_file: Path, tmp_path: Path) -> None:
    datablame.index(str(model_dir), train_file, tmp_path / "i")
    assert datablame.trace(tmp_path / "i", prompt="Hi", response="Yes", against="No").methods == ["concept"]


def test_bad_contrasts(built: Path, files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--against is another answer to --prompt"):
        datablame.trace(built, files[1], against="No")
    with pytest.raises(UserError, match="--against is another answer to --prompt"):
        datablame.trace(built, prompt="Hi", response="Yes", against=" ")
    with pytest.raises(UserError, match="query 0: `against` is its own response"):
        datablame.trace(built, prompt="Hi", response="Yes", against="Yes ")
    one = [{"prompt": "a", "response": "b", "against": "c"}, {"prompt": "a", "response": "b"}]
    with pytest.raises(UserError, match="query 1 has no `against`, others have"):
        datablame.trace(built, write_jsonl(tmp_path / "q.jsonl", one))
    with pytest.raises(UserError, match="Contrast queries are for trace"):
        datablame.compare(built, files[0])


def test_the_other_output_of_every_shape(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for row in ({"prompt": "a", "response": "b"}, {"messages": turns}, {"text": "b"}):
        (query,) = load_examples(write_jsonl(tmp_path / "q.jsonl", [{**row, "against": "c"}]))
        (that,) = contrast.others([query]) or []
        assert (that.prompt, that.response) == (query.prompt, "c")
        assert (that.given, len(that.messages)) == (query.given, len(query.messages))
