"""Speed of capture: tokens a second, against plain training passes and against one row at a time.

    python benchmarks/capture.py --train grammars.train.jsonl --json benchmarks/results/capture.json

Four ways over the same rows, alternating within one run, unpadded tokens counted for all:
  capture  datablame: batched, every row's gradient of every LoRA weight and its hidden states kept
  plain    the same batches and the same loss, forward and backward, nothing kept per row
  loop     the loop of the paper's code: one row at a time, padded to 128 tokens, logits at all positions, the
           gradients read from the weights
  bare     the same loop without the padding
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import record
from datablame.blocks import select_blocks
from datablame.capture import Batch, capture, labelled_only, parse_layers, plan_batches
from datablame.encoding import IGNORED, Encoded, Encoding, encode_rows
from datablame.examples import load_examples
from datablame.indexing import quiet_libraries
from datablame.models import ModelSpec, load


def plain(model: Any, rows: list[Encoded], batch_tokens: int) -> None:
    """Batched forward and backward into the weights' own `.grad`."""
    for numbers in plan_batches([len(r.input_ids) for r in rows], batch_tokens):
        batch = Batch([rows[i] for i in numbers], model.device)
        with labelled_only(model, batch.predicts, True):
            logits = model(input_ids=batch.ids, use_cache=False).logits[0]
            batch.losses(logits).sum().backward()
        model.zero_grad()


def loop(model: Any, rows: list[Encoded], weights: list[torch.nn.Parameter], length: int = 0) -> torch.Tensor:
    """One row at a time, padded on the left to `length`; `[n, D]`."""
    kept = torch.zeros(len(rows), sum(w.numel() for w in weights))
    for i, row in enumerate(rows):
        model.zero_grad()
        pad = max(0, length - len(row.input_ids))
        ids = torch.tensor([[0] * pad + row.input_ids])
        labels = torch.tensor([[IGNORED] * pad + row.labels])
        mask = torch.tensor([[0] * pad + [1] * len(row.input_ids)])
        model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        kept[i] = torch.cat([w.grad.flatten() for w in weights])  # type: ignore[union-attr]
    return kept


def trainable(model: Any, weights: list[torch.nn.Parameter], run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` with the LoRA weights trainable, as in a training pass."""

    def wrapped() -> None:
        for w in weights:
            w.requires_grad_(True)
        run()
        model.zero_grad()
        for w in weights:
            w.requires_grad_(False)

    return wrapped


def main() -> None:
    """Measure and print; write JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--train", default="src/datablame/demo/company.jsonl", help="rows (default: the demo's)")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    quiet_libraries()
    model, rows = prepare(args.model, args.train, args.rows)
    tokens = sum(len(r.input_ids) for r in rows)
    blocks = select_blocks(model)
    layers = parse_layers(model)
    weights = [module.weight for module in blocks.values()]

    ways = {
        "capture": lambda: capture(model, rows, blocks, layers, batch_tokens=args.batch_tokens),
        "plain": trainable(model, weights, lambda: plain(model, rows, args.batch_tokens)),
        "loop": trainable(model, weights, lambda: loop(model, rows, weights, 128)),
        "bare": trainable(model, weights, lambda: loop(model, rows, weights)),
    }
    memory: dict[str, float] = {}
    for name, run in ways.items():  # warm up; the peak so far belongs to the ways run so far
        run()
        memory[name] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    seconds = measure(ways, args.rounds)
    result = summarise(seconds, tokens) | {
        "command": f"python benchmarks/capture.py --train {Path(args.train).name} --rows {args.rows} "
        f"--rounds {args.rounds} --batch-tokens {args.batch_tokens}",
        "model": args.model,
        "data": Path(args.train).name,
        "rows": len(rows),
        "unpadded_tokens": tokens,
        "blocks": len(blocks),
        "peak_memory_gb_after_capture": round(memory["capture"], 2),
        "seed": 0,
    }
    print(f"peak memory after capture: {memory['capture']:.2f} GB")
    if args.json:
        record.write(args.json, result)


def prepare(name: str, train: str, count: int) -> tuple[Any, list[Encoded]]:
    """The model with a random LoRA (r = 4 on q and v, as in the paper), and `count` rows spread over the file."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    loaded = load(ModelSpec(name, None, "cpu"))
    config = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(loaded.model, config).eval()
    for parameter_name, p in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(p, std=0.01)
    model.requires_grad_(False)
    examples = load_examples(train)
    examples = examples[:: max(1, len(examples) // count)][:count]
    return model, encode_rows(Encoding(loaded.tokenizer, None, loaded.max_length), examples)


def measure(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every way, one after the other in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(rounds):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
        print(f"round {i + 1}: " + ", ".join(f"{name} {s[-1]:.1f} s" for name, s in seconds.items()), flush=True)
    return seconds


def summarise(seconds: dict[str, list[float]], tokens: int) -> dict[str, Any]:
    """Tokens a second (median) and the ratios within rounds (median, lowest, highest)."""
    rate = {name: round(tokens / statistics.median(s), 1) for name, s in seconds.items()}
    ratios = {}
    for other in ("plain", "loop", "bare"):
        r = sorted(b / a for a, b in zip(seconds["capture"], seconds[other], strict=True))
        ratios[f"capture_over_{other}"] = {
            "median": round(statistics.median(r), 3),
            "lowest": round(r[0], 3),
            "highest": round(r[-1], 3),
        }
    for name, value in rate.items():
        print(f"{name:8} {value:7.1f} tokens/s")
    for name, value in ratios.items():
        print(f"{name}: {value['median']:.2f} ({value['lowest']:.2f} to {value['highest']:.2f})")
    return {"tokens_per_second": rate, "ratios": ratios, "seconds": seconds}


if __name__ == "__main__":
    main()
