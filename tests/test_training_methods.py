"""TracInCP, AdamDot and the balanced gauge, against what the trainer itself did and against formulas as loops."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import datablame
from conftest import ROWS, write_jsonl
from datablame.blocks import short_name
from datablame.checkpoints import TRAINING_RECORD, adam_state, find, read_record
from datablame.encoding import Encoding, encode_rows
from datablame.errors import UserError
from datablame.examples import load_examples
from datablame.indexing import CaptureOptions, Reporter
from datablame.methods import create, parse
from datablame.methods.base import Adam, Checkpoint
from datablame.methods.gauge import Balanced
from datablame.models import ModelSpec, load
from datablame.store import FeatureStore
from datablame.tuning import TuneOptions, make_trainer, tune
from gradient_cases import CASES, case, error, rows

OPTIONS = TuneOptions(rank=2, epochs=3, rate=1e-2, batch=2, keep=3, targets="q_proj,v_proj")


@pytest.fixture(scope="module")
def trained(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter of three checkpoints (4 steps each), its rows, and an index over all of them."""
    folder = tmp_path_factory.mktemp("trained")
    train = write_jsonl(folder / "train.jsonl", [{"prompt": p, "response": r} for p, r in ROWS])
    tune(model_dir, train, folder / "adapter", options=OPTIONS)
    write_jsonl(folder / "queries.jsonl", [{"prompt": p, "response": r} for p, r in ROWS[:2]])
    capture = CaptureOptions(checkpoints="all")
    datablame.index(str(model_dir), train, folder / "index", str(folder / "adapter"), capture=capture)
    return folder


# ---------------------------------------------------------------- formulas


def test_tracincp_is_the_sum_over_checkpoints_of_rate_times_dot() -> None:
    train = [Checkpoint(0.5 * k, rows(5, (4, 3), k)) for k in (1, 2, 3)]
    query = [Checkpoint(0.0, rows(2, (4, 3), 10 + k)) for k in (1, 2, 3)]
    want = torch.zeros(2, 5, dtype=torch.float64)
    for c, q in zip(train, query, strict=True):
        for j in range(2):
            for i in range(5):
                want[j, i] += sum(c.rate * (q.gradients[b][j] @ c.gradients[b][i]) for b in c.gradients)
    assert error(create("tracincp").fit(train).score(query), want) < 1e-12
    normed = create("tracincp", relatif="l").fit(train[:1]).score(query[:1])
    plain = create("graddot", relatif="l").fit(train[0].gradients).score(query[0].gradients)
    assert error(normed, 0.5 * plain) < 1e-12
    with pytest.raises(UserError, match="3 checkpoints of training rows, 2 of queries"):
        create("tracincp").fit(train).score(query[:2])
    with pytest.raises(UserError, match="no checkpoints"):
        create("tracincp").fit([])


def test_adamdot_is_the_dot_with_the_scaled_gradient() -> None:
    train, query = rows(5, (4, 3), 0), rows(2, (4, 3), 1)
    v = {b: torch.rand(g.shape[1], dtype=torch.float64) for b, g in train.items()}
    want = sum(query[b] @ torch.diag(1 / (v[b].sqrt() + 1e-3)) @ train[b].T for b in train)
    assert error(create("adamdot").fit(Adam(train, v, 1e-3)).score(query), want) < 1e-12
    unmoved = Adam(train, {"b0": v["b0"], "b1": v["b1"] * 0}, 1e-3)
    alone = query["b0"] @ torch.diag(1 / (v["b0"].sqrt() + 1e-3)) @ train["b0"].T
    with pytest.warns(
        UserWarning, match="only zero gradients of 1 of 2 blocks, which contribute 0 to the scores .*'b1'"
    ):
        assert error(create("adamdot").fit(unmoved).score(query), alone) < 1e-12
    with pytest.raises(UserError, match="no second moments of block 'b1'"):
        create("adamdot").fit(Adam(train, {"b0": v["b0"]}, 1e-3))
    with pytest.raises(UserError, match="3 second moments for 4 weights"):
        create("adamdot").fit(Adam(train, {"b0": v["b1"], "b1": v["b1"]}, 1e-3)).score(query)
    with pytest.raises(UserError, match="belongs to the weights as stored"):
        parse("adamdot:gauge=balanced")


@pytest.mark.parametrize("name", CASES)
def test_both_on_the_grid_of_cases_and_under_permutation(name: str) -> None:
    """Outright, `Σ η V Gᵀ` and `V diag(1/(√v + ε)) Gᵀ`, and rows in another order."""
    train, query = case(name)
    v = {b: g.square().mean(dim=0) for b, g in train.items()}
    whole, asked, scale = (torch.cat([x[b] for b in train], dim=-1) for x in (train, query, v))
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
    turned = {b: g[order] for b, g in train.items()}
    got = create("tracincp").fit([Checkpoint(0.3, train)] * 2).score([Checkpoint(0, query)] * 2)
    assert error(got, 0.6 * asked @ whole.T) < 1e-12
    again = create("tracincp").fit([Checkpoint(0.3, turned)] * 2).score([Checkpoint(0, query)] * 2)
    assert error(again, got[:, order]) < 1e-12
    got = create("adamdot").fit(Adam(train, v, 1e-8)).score(query)
    assert error(got, asked @ torch.diag(1 / (scale.sqrt() + 1e-8)) @ whole.T) < 1e-12
    assert error(create("adamdot").fit(Adam(turned, v, 1e-8)).score(query), got[:, order]) < 1e-12


# ---------------------------------------------------------------- gauge


def lora(rank_of_b: int = 3) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """(gradients of factors A, B for six rows' ∂W, A, B)."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    w, a, b = draw(6, 5, 7), draw(3, 7), draw(5, 3)
    b[:, rank_of_b:] = 0
    return lambda a, b: {"x.lora_A": (b.T @ w).flatten(1), "x.lora_B": (w @ a.T).flatten(1)}, a, b


@pytest.mark.parametrize("rank", [3, 2, 1])
def test_balanced_gradients_are_those_at_the_factors_of_the_svd(rank: int) -> None:
    gradients, a, b = lora(rank)
    u, s, vt = torch.linalg.svd(b @ a, full_matrices=False)
    root = s[:rank].sqrt()
    want = gradients(root[:, None] * vt[:rank], u[:, :rank] * root)
    got = Balanced(gradients(a, b), {"x.lora_A": a, "x.lora_B": b})
    for block in want:
        assert error(got[block] @ got[block].T, want[block] @ want[block].T) < 1e-12
        assert got[block].shape == gradients(a, b)[block].shape


@pytest.mark.parametrize("spec", ["graddot", "gradcos", "gradcos:over=row", "exact", "exact-block", "datainf", "lissa"])
def test_balanced_scores_do_not_depend_on_the_gauge(spec: str) -> None:
    gradients, a, b = lora()
    m = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scores, stored = [], []
    for a_, b_ in ((a, b), (torch.linalg.inv(m) @ a, b @ m)):
        g = gradients(a_, b_)
        turned = Balanced(g, {"x.lora_A": a_, "x.lora_B": b_})
        method = parse(f"{spec}{',' if ':' in spec else ':'}gauge=balanced")
        assert method.needs == "gradients-balanced"
        scores.append(method.fit(turned).score({k: turned[k][:2] for k in turned}))
        stored.append(parse(spec).fit(g).score({k: g[k][:2] for k in g}))
    assert error(scores[0], scores[1]) < 1e-9
    assert error(stored[0], stored[1]) > 1e-3


def test_gauge_needs_lora_and_both_factors() -> None:
    gradients, a, b = lora()
    with pytest.raises(UserError, match="there is none among these blocks"):
        Balanced(rows(3, (4,), 0), {})
    with pytest.raises(UserError, match=r"weights of x\.lora_B are missing"):
        Balanced(gradients(a, b), {"x.lora_A": a})
    with pytest.raises(UserError, match="gauge='even'; use stored or balanced"):
        parse("graddot:gauge=even")
    at_zero = Balanced(gradients(a, b * 0), {"x.lora_A": a, "x.lora_B": b * 0})
    assert not at_zero["x.lora_A"].any()
    assert not at_zero["x.lora_B"].any()


# ---------------------------------------------------------------- what the training left


class Watched(TrainerCallback):
    """Notes the rate that each step is about to take."""

    def __init__(self, rates: list[float]) -> None:
        self.rates = rates

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rates.append(kwargs["lr_scheduler"].get_last_lr()[0])


def test_rates_and_second_moments_are_the_trainers_own(model_dir: Path, trained: Path, tmp_path: Path) -> None:
    """A second trainer over the same rows, watched from inside: its optimizer, by parameter object."""
    loaded = load(ModelSpec(str(model_dir)))
    encoder = Encoding(loaded.tokenizer, None, loaded.max_length)
    rates: list[float] = []
    encoded = encode_rows(encoder, load_examples(trained / "train.jsonl"))
    trainer = make_trainer(loaded, encoded, tmp_path / "again", OPTIONS)
    trainer.add_callback(Watched(rates))
    trainer.train()
    assert rates == pytest.approx([OPTIONS.rate * (1 - k / 12) for k in range(12)])
    assert read_record(trained / "adapter")["rates"] == rates
    checkpoints = find(trained / "adapter", "all")
    assert [c.step for c in checkpoints] == [4, 8, 12]
    assert [c.rate for c in checkpoints] == pytest.approx([sum(rates[a : a + 4]) for a in (0, 4, 8)])
    assert find(trained / "adapter", "8,12")[0].rate == pytest.approx(sum(rates[:8]))

    named = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    shapes = {short_name(n.removesuffix(".weight")): tuple(p.shape) for n, p in named.items()}
    state = adam_state(trained / "adapter", shapes)
    assert state is not None
    assert state.eps == 1e-8
    for (name, p), block in zip(named.items(), shapes, strict=True):
        v = trainer.optimizer.state[p]["exp_avg_sq"] / (1 - 0.999**12)
        assert v.any(), name
        torch.testing.assert_close(state.v[block], v.flatten(), rtol=1e-4, atol=1e-12)


def test_rates_of_another_trainers_checkpoints_come_from_its_log(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "adapter", tmp_path / "a")
    mine = find(tmp_path / "a", "all")
    for record in (tmp_path / "a").rglob(TRAINING_RECORD):
        record.unlink()
    theirs = find(tmp_path / "a", "all")
    # Logged after steps 4, 8 and 12: the rates of steps 1 to 3 are taken as that of step 4, the rest is linear.
    assert theirs[0].rate == pytest.approx(4 * OPTIONS.rate * (1 - 3 / 12))
    assert [c.rate for c in theirs[1:]] == pytest.approx([c.rate for c in mine[1:]])
    (tmp_path / "a" / "checkpoint-12" / "trainer_state.json").unlink()
    with pytest.raises(UserError, match="tells the learning rates"):
        find(tmp_path / "a", "all")


def test_damaged_rates_and_foreign_checkpoints_are_refused(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "a"
    shutil.copytree(trained / "adapter", run)
    shutil.copytree(run / "checkpoint-4", run / "checkpoint-4-old")
    assert [c.step for c in find(run, "all")] == [4, 8, 12]
    for rates in ("x", [0.1], [None] * 12):
        (run / TRAINING_RECORD).write_text(json.dumps({"rates": rates}))
        with pytest.raises(UserError, match=r"datablame.json is damaged, so the learning rates are not known"):
            find(run, "all")
    for record in run.rglob(TRAINING_RECORD):
        record.unlink()
    for text in ("{", "[]", "{}", '{"log_history": [{"learning_rate": null, "step": 1}]}'):
        (run / "checkpoint-12" / "trainer_state.json").write_text(text)
        with pytest.raises(UserError, match=r"trainer_state.json is damaged"):
            find(run, "all")
    config = json.loads((run / "checkpoint-8" / "adapter_config.json").read_text())
    (run / "checkpoint-8" / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 64}))
    with pytest.raises(UserError, match=r"of another LoRA than .*lora_alpha: 64 there, 16.0 here"):
        find(run, "all")


def test_checkpoints_after_the_adapters_own_weights_are_not_taken(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained / "adapter"
    assert find(run / "checkpoint-8", "all") == find(run, "all")[:2]
    monkeypatch.chdir(run / "checkpoint-8")
    assert find(".", "all") == find(run, "all")[:2]
    with pytest.raises(UserError, match=r"no checkpoint-12 .*; there are 4, 8 \(later ones did not make"):
        find(run / "checkpoint-8", "4,12")
    # The best of a training that went on: the adapter is that of step 8.
    shutil.copytree(run, tmp_path / "a")
    shutil.copy(run / "checkpoint-8" / "adapter_model.safetensors", tmp_path / "a")
    assert find(tmp_path / "a", "all") == find(run, "all")[:2]


def test_early_stopping_keeps_the_checkpoints_up_to_the_best(model_dir: Path, trained: Path, tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, rate=5e-2, epochs=8, keep=2, early_stop=2)
    validation = write_jsonl(tmp_path / "v.jsonl", [{"prompt": p, "response": r} for p, r in ROWS[3:5]])
    record = tune(model_dir, trained / "train.jsonl", tmp_path / "a", validation=validation, options=options)
    losses = [h["eval_loss"] for h in record["history"] if "eval_loss" in h]
    best = losses.index(min(losses)) + 1
    assert 2 <= best == len(losses) - 2, "this seed must overfit, or nothing is tested"
    assert sorted(p.name for p in (tmp_path / "a").glob("checkpoint-*")) == sorted(
        f"checkpoint-{4 * k}" for k in (best - 1, best)
    )
    weights = [
        (p / "adapter_model.safetensors").read_bytes()
        for p in (tmp_path / "a" / f"checkpoint-{4 * best}", tmp_path / "a")
    ]
    assert weights[0] == weights[1]


def test_second_moments_are_matched_by_name_not_by_order(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "adapter", tmp_path / "a")
    store = FeatureStore.open(trained / "index")
    shapes = {k: tuple(w.shape) for k, w in store.adapter("weights").items()}
    straight = adam_state(tmp_path / "a", shapes)
    assert straight is not None
    path = tmp_path / "a" / "checkpoint-12"
    state = torch.load(path / "optimizer.pt", weights_only=True)
    record = json.loads((path / TRAINING_RECORD).read_text())
    group = next(g for g in state["param_groups"] if g["params"])
    group["params"].reverse()
    record["parameters"].reverse()
    torch.save(state, path / "optimizer.pt")
    (path / TRAINING_RECORD).write_text(json.dumps(record))
    turned = adam_state(tmp_path / "a", shapes)
    assert turned is not None
    assert all(torch.equal(turned.v[b], straight.v[b]) for b in shapes)


@pytest.mark.parametrize("damage", ["shape", "count", "names", "negative", "no pickle", "sgd"])
def test_a_state_that_does_not_fit_is_refused(damage: str, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "adapter", tmp_path / "a")
    store = FeatureStore.open(trained / "index")
    shapes = {k: tuple(w.shape) for k, w in store.adapter("weights").items()}
    path = tmp_path / "a" / "checkpoint-12"
    state = torch.load(path / "optimizer.pt", weights_only=True)
    said = {"shape": r"has shape \[1\] there", "negative": "negative", "count": "holds 11 parameters, the adapter 12"}
    if damage == "shape":
        state["state"][0]["exp_avg_sq"] = torch.ones(1)
    elif damage == "negative":
        state["state"][0]["exp_avg_sq"][:] = -1
    elif damage == "count":
        next(g for g in state["param_groups"] if g["params"])["params"].pop()
    elif damage == "names":
        record = json.loads((path / TRAINING_RECORD).read_text())
        record["parameters"][0] = "layers.9.q_proj.lora_A"
        (path / TRAINING_RECORD).write_text(json.dumps(record))
    elif damage == "sgd":
        for entry in state["state"].values():
            del entry["exp_avg_sq"]
    torch.save(state, path / "optimizer.pt")
    if damage == "no pickle":
        (path / "optimizer.pt").write_bytes(b"nothing")
    with pytest.raises(UserError, match=said.get(damage, "optimizer.pt: (not the state|belongs to another)")):
        adam_state(tmp_path / "a", shapes)


def test_several_groups_without_names_are_refused(trained: Path, tmp_path: Path) -> None:
    """A rate for each layer, say, the last layer first: the shapes fit, the order does not."""
    shutil.copytree(trained / "adapter", tmp_path / "a")
    store = FeatureStore.open(trained / "index")
    shapes = {k: tuple(w.shape) for k, w in store.adapter("weights").items()}
    path = tmp_path / "a" / "checkpoint-12"
    straight = adam_state(tmp_path / "a", shapes)
    (path / TRAINING_RECORD).unlink()
    assert straight is not None
    in_order = adam_state(tmp_path / "a", shapes)  # one group of weights, as Trainers make it, needs no names
    assert in_order is not None
    assert all(torch.equal(in_order.v[b], straight.v[b]) for b in shapes)
    state = torch.load(path / "optimizer.pt", weights_only=True)
    group = next(g for g in state["param_groups"] if g["params"])
    state["param_groups"] = [{**group, "params": group["params"][k : k + 4]} for k in (8, 4, 0)]
    torch.save(state, path / "optimizer.pt")
    with pytest.raises(UserError, match="3 groups of parameters, and nothing tells which weights"):
        adam_state(tmp_path / "a", shapes)


def test_a_state_of_other_weights_is_none(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "adapter", tmp_path / "a", ignore=shutil.ignore_patterns("checkpoint-12"))
    assert adam_state(tmp_path / "a", {}) is None


# ---------------------------------------------------------------- through the index


def test_the_index_holds_gradients_of_every_checkpoint(model_dir: Path, trained: Path, tmp_path: Path) -> None:
    store = FeatureStore.open(trained / "index")
    for step in (4, 8, 12):
        there = tmp_path / str(step)
        adapter = trained / "adapter" / f"checkpoint-{step}"
        alone = datablame.index(str(model_dir), trained / "train.jsonl", there, str(adapter))
        got = store.features(f"checkpoints/{step}")
        assert set(got) == set(alone.features("gradients"))
        for block in got:
            assert torch.equal(got[block], alone.features("gradients")[block])
            assert torch.equal(store.adapter(f"checkpoints/{step}/weights")[block], alone.adapter("weights")[block])
    assert torch.equal(store.adapter("weights")[block], alone.adapter("weights")[block])


def test_trace_scores_them_as_the_formulas_say(model_dir: Path, trained: Path, tmp_path: Path) -> None:
    specs = ["tracincp", "adamdot", "graddot:gauge=balanced", "tracincp:gauge=balanced", "exact:gauge=balanced"]
    scores = datablame.trace(trained / "index", trained / "queries.jsonl", methods=specs)
    store = FeatureStore.open(trained / "index")
    # The queries are the first two training rows, so that their features are there already.
    first = lambda f: {k: f[k][:2] for k in f}  # noqa: E731
    want = sum(
        c.rate
        * torch.from_numpy(
            sum(store.features(f"checkpoints/{c.step}")[b][:2] @ store.features(f"checkpoints/{c.step}")[b].T
                for b in store.features("gradients")).numpy())
        for c in find(trained / "adapter", "all")
    )  # fmt: skip
    assert error(torch.from_numpy(scores.values["tracincp"]), want) < 1e-4
    g, v = store.features("gradients"), store.adapter("adam")
    want = sum(g[b][:2] @ (g[b] / (v[b].sqrt() + 1e-8)).T for b in g)
    assert error(torch.from_numpy(scores.values["adamdot"]), want) < 1e-4
    turned = Balanced(g, store.adapter("weights"))
    want = create("graddot").fit(turned).score(first(turned))
    assert error(torch.from_numpy(scores.values["graddot:gauge=balanced"]), want) < 1e-4
    assert not (scores.values["tracincp"] == scores.values["tracincp:gauge=balanced"]).any()


def test_what_is_missing_is_said(model_dir: Path, built: Path, trained: Path, tmp_path: Path) -> None:
    queries = trained / "queries.jsonl"
    with pytest.raises(UserError, match=r"tracincp needs gradients at checkpoints \(tune with --keep, index with"):
        datablame.trace(built, queries, methods=["tracincp"])
    with pytest.raises(UserError, match="adamdot needs gradients, and the optimizer's state beside the adapter"):
        datablame.trace(built, queries, methods=["adamdot"])
    for choice, said in (("5", "no checkpoint-5 in .*; there are 4, 8, 12"), ("x", "use all, or steps such as 8,12")):
        with pytest.raises(UserError, match=said):
            find(trained / "adapter", choice)
    with pytest.raises(UserError, match="give --adapter too"):
        datablame.index(
            str(model_dir), trained / "train.jsonl", tmp_path / "i", capture=CaptureOptions(checkpoints="all")
        )
    plain = tmp_path / "plain"
    datablame.index(str(model_dir), trained / "train.jsonl", plain, capture=CaptureOptions("*.q_proj"))
    with pytest.raises(UserError, match="gauge=balanced needs gradients of a LoRA adapter"):
        datablame.trace(plain, queries, methods=["graddot:gauge=balanced"])
    moved = tmp_path / "moved"
    shutil.copytree(trained / "adapter", moved)
    shutil.rmtree(moved / "checkpoint-4")
    with pytest.raises(UserError, match=r"checkpoint-4: no such checkpoint, and the queries' gradients are needed"):
        datablame.trace(trained / "index", queries, methods=["tracincp"], adapter=str(moved))


def test_a_state_of_no_use_is_told_and_left_out(model_dir: Path, trained: Path, tmp_path: Path) -> None:
    """Nobody asked for it: an 8-bit or factored optimizer must not stop an index, nor a state gone bad a trace."""
    adapter = tmp_path / "adapter"
    shutil.copytree(trained / "adapter", adapter)
    index = tmp_path / "index"
    datablame.index(str(model_dir), trained / "train.jsonl", index, str(adapter))
    (adapter / "checkpoint-12" / "optimizer.pt").write_bytes(b"nothing")
    specs = ["adamdot", "graddot"]
    there = datablame.trace(index, trained / "queries.jsonl", methods=specs)  # v is in the index
    want = datablame.trace(trained / "index", trained / "queries.jsonl", methods=specs)
    assert all((there.values[s] == want.values[s]).all() for s in specs)

    class Notes(Reporter):
        said: list[str] = []  # noqa: RUF012

        def note(self, message: str) -> None:
            self.said.append(message)

    store = datablame.index(
        str(model_dir), trained / "train.jsonl", tmp_path / "without", str(adapter), reporter=Notes()
    )
    assert "optimizer.pt: not the state of an Adam" in Notes.said[0]
    assert "cannot run adamdot" in Notes.said[0]
    assert store.settings["optimizer"] is None
