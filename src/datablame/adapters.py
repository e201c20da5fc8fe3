"""PEFT LoRA adapters: which ones can be attributed, and do they fit the base model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from datablame.errors import UserError

WEIGHTS = "adapter_model.safetensors"

REFUSED = {
    "use_dora": "DoRA (its magnitudes are not a linear layer)",
    "modules_to_save": "modules_to_save (whole layers trained beside the LoRA)",
    "trainable_token_indices": "trainable_token_indices (trained token embeddings)",
    "target_parameters": "target_parameters (LoRA on bare parameters)",
    "layer_replication": "layer_replication",
    "lora_bias": "lora_bias (trained biases)",
    "alora_invocation_tokens": "aLoRA (active after a token only)",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
}
"""Options of a LoRA whose trained weights the capture would miss: refused by name, never ignored."""


def read_config(directory: Path) -> dict[str, Any]:
    """adapter_config.json of a PEFT directory. Raises UserError where it is none, or not a plain LoRA."""
    if not directory.is_dir():
        raise UserError(f"--adapter {directory}: no such directory. If it was moved, say where with --adapter.")
    path = directory / "adapter_config.json"
    if not path.exists():
        raise UserError(f"--adapter {directory}: no adapter_config.json, so it is not a PEFT adapter.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not valid JSON.") from e
    if not isinstance(config, dict):
        raise UserError(f"{path}: not the configuration of an adapter.")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"--adapter {directory}: its type is {kind}; only LORA adapters can be attributed.")
    for option, reason in REFUSED.items():
        if config.get(option):
            raise UserError(f"--adapter {directory}: {reason} is not supported. Train a plain LoRA.")
    start = str(config.get("init_lora_weights"))
    if start.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise UserError(f"--adapter {directory}: init_lora_weights={start!r} changes the base weights; not supported.")
    if config.get("bias", "none") != "none":
        raise UserError(f"--adapter {directory}: bias={config['bias']!r} trains biases too; only 'none' is supported.")
    if not (directory / WEIGHTS).exists():
        raise UserError(f"--adapter {directory}: no {WEIGHTS} (pickled .bin adapters are never loaded).")
    return config


def fingerprint_adapter(directory: Path) -> str:
    """sha256 of the adapter's configuration (what changes the function) and weights."""
    config = read_config(directory)
    keys = (*SCALING, "rank_pattern", "target_modules", "fan_in_fan_out")
    shape = json.dumps({k: _plain(config.get(k)) for k in keys}, sort_keys=True)
    return hashlib.sha256(shape.encode() + (directory / WEIGHTS).read_bytes()).hexdigest()


SCALING = ("r", "lora_alpha", "use_rslora", "alpha_pattern")


def scaling(directory: Path) -> dict[str, Any]:
    """What of the adapter's configuration scales its update BA."""
    config = read_config(directory)
    return {k: config.get(k) for k in SCALING}


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value


def attach(model: Any, directory: Path) -> Any:
    """The model with the adapter on it (a PeftModel). Raises UserError when it does not fit."""
    from peft import PeftModel

    read_config(directory)
    shapes = _file_shapes(directory)
    if embedding := next((name for name in shapes if "lora_embedding" in name), None):
        raise UserError(f"--adapter {directory}: embedding adapters ({embedding}) are not supported.")
    for name in shapes:
        if "lora_A" not in name and "lora_B" not in name:
            raise UserError(f"--adapter {directory}: it trains {name}, which is not a LoRA A or B.")
    try:
        peft_model = PeftModel.from_pretrained(model, str(directory), is_trainable=False)
    except (RuntimeError, ValueError, KeyError, TypeError) as e:
        # PEFT lists every mismatch below a general first line; the first one listed says most.
        lines = [line.strip() for line in str(e).splitlines() if line.strip()]
        detail = next((line for line in lines if "mismatch for" in line), lines[0] if lines else type(e).__name__)
        raise UserError(f"--adapter {directory}: it does not fit the base model ({detail.rstrip('.')}).") from e
    _check_complete(peft_model, shapes, directory)
    return peft_model


def exchange(peft_model: Any, new: Path | dict[str, Any]) -> dict[str, Any]:
    """Put other weights (a directory's, or a state dict) into the adapter, and return those it had.

    Raises UserError when they do not fit.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    old = {k: v.clone() for k, v in get_peft_model_state_dict(peft_model, save_embedding_layers=False).items()}
    if isinstance(new, Path):
        read_config(new)
        _check_complete(peft_model, _file_shapes(new), new)
        new = load_file(new / WEIGHTS)
    try:
        set_peft_model_state_dict(peft_model, new)
    except RuntimeError as e:
        raise UserError(f"a checkpoint's weights do not fit the adapter ({str(e).splitlines()[-1].strip()}).") from e
    return old


def _file_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(directory / WEIGHTS), framework="pt") as f:
            return {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as e:
        raise UserError(f"{directory / WEIGHTS}: not a readable safetensors file ({e}).") from e


def _check_complete(peft_model: Any, shapes: dict[str, tuple[int, ...]], directory: Path) -> None:
    """Every trained weight has found its place, and every place its weight."""
    from peft import get_peft_model_state_dict

    # save_embedding_layers="auto", the default, would ask the hub about the base model's name.
    state = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    expected = {k: tuple(v.shape) for k, v in state.items()}
    strange = sorted(set(shapes) - set(expected))
    missing = sorted(set(expected) - set(shapes))
    if strange or missing:
        which = f"it has {strange[0]}, which the model lacks" if strange else f"the model expects {missing[0]}"
        raise UserError(
            f"--adapter {directory}: it does not fit the base model ({which}; "
            f"{len(strange)} unexpected and {len(missing)} missing weights)."
        )
