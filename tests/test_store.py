"""The store: whole or resumable, bitwise; damage and other settings are refused with the reason."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import datablame
from conftest import ROWS, write_jsonl
from datablame.errors import UserError
from datablame.examples import Example
from datablame.indexing import CaptureOptions, Reporter
from datablame.store import FeatureStore, check_disk, shard_rows

WIDTHS = {"loss": 1, "gradients/a": 3, "hidden/1.response.mean": 2}


def make(path: Path, rows: int = 20, settings: dict[str, Any] | None = None, whole: bool = True) -> FeatureStore:
    examples = [Example(f"r{i}", i, text=f"text {i}", label="x" if i % 2 else None) for i in range(rows)]
    store = FeatureStore.create(path, settings or {"model": "here", "model_sha256": "m"}, WIDTHS, examples, "float32")
    store.manifest["shard_rows"] = 8
    store.begin()
    if whole:
        for a, b in store.missing():
            store.write((a, b), {k: torch.arange(a, b)[:, None].repeat(1, d).float() for k, d in WIDTHS.items()})
    return store


def test_what_is_written_is_read(tmp_path: Path) -> None:
    make(tmp_path / "i")
    store = FeatureStore.open(tmp_path / "i")
    assert len(list((tmp_path / "i").glob("shard-*.safetensors"))) == 3
    assert list(store.features("gradients")) == ["a"]
    assert store.features("gradients")["a"][:, 0].tolist() == list(range(20))
    assert store.features("loss")["loss"].shape == (20, 1)
    assert [(e.id, e.row, e.text, e.label) for e in store.examples[:2]] == [
        ("r0", 0, "text 0", None),
        ("r1", 1, "text 1", "x"),
    ]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_shard_is_named_and_rebuilt(tmp_path: Path, damage: str) -> None:
    make(tmp_path / "i")
    shard = tmp_path / "i" / "shard-00001.safetensors"
    good = shard.read_bytes()
    if damage == "flip":
        shard.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    elif damage == "truncate":
        shard.write_bytes(good[:-5])
    else:
        shard.unlink()
    with pytest.raises(UserError, match=r"shard-00001\.safetensors: (damaged|missing).*rebuild"):
        FeatureStore.open(tmp_path / "i")
    store = make(tmp_path / "i")  # begins again: the damaged shard is struck and written once more
    assert store.missing() == []
    assert FeatureStore.open(tmp_path / "i").features("loss")["loss"].shape == (20, 1)
    assert shard.read_bytes() == good


def test_index_rebuilds_a_damaged_shard_by_itself(
    built: Path, model_dir: Path, adapter_dir: Path, tmp_path: Path
) -> None:
    import shutil

    class Notes(Reporter):
        told: ClassVar[list[str]] = []

        def note(self, message: str) -> None:
            self.told.append(message)

    out = tmp_path / "i"
    shutil.copytree(built, out)
    (out / "shard-00000.safetensors").write_bytes(b"short")
    datablame.index(model_dir, built.parent / "train.jsonl", out, adapter_dir, reporter=Notes())
    assert "shard-00000.safetensors was damaged and is built again." in Notes.told
    assert files(out) == files(built)


def test_an_interruption_before_the_first_manifest_can_be_resumed(
    built: Path, model_dir: Path, adapter_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "i"
    out.mkdir()
    (out / "examples.parquet").write_bytes(b"of a build that was killed")
    (out / "manifest.json.99.part").write_bytes(b"{")
    datablame.index(model_dir, built.parent / "train.jsonl", out, adapter_dir)
    assert files(out) == files(built)


def test_other_settings_versions_and_folders_are_refused(tmp_path: Path) -> None:
    make(tmp_path / "i")
    with pytest.raises(UserError, match=r'model_sha256: "m" there, "other" here'):
        make(tmp_path / "i", settings={"model": "here", "model_sha256": "other"})
    assert len(make(tmp_path / "i", settings={"model": "moved", "model_sha256": "m"})) == 20  # a place is no identity
    with pytest.raises(UserError, match="rows: 20 there, 21 here"):
        make(tmp_path / "i", rows=21)
    with pytest.raises(UserError, match="not an index"):
        FeatureStore.open(tmp_path)
    manifest = tmp_path / "i" / "manifest.json"
    good = manifest.read_text()
    manifest.write_text(json.dumps({**json.loads(good), "schema": 99}))
    with pytest.raises(UserError, match="schema 99"):
        FeatureStore.open(tmp_path / "i")
    manifest.write_text("[]")
    with pytest.raises(UserError, match="not the manifest"):
        FeatureStore.open(tmp_path / "i")
    manifest.write_text(good[:-30])
    with pytest.raises(UserError, match="damaged"):
        FeatureStore.open(tmp_path / "i")
    manifest.write_text(good)
    (tmp_path / "i" / "examples.parquet").write_bytes(b"no")
    with pytest.raises(UserError, match=r"examples\.parquet: missing or damaged"):
        FeatureStore.open(tmp_path / "i")
    with pytest.raises(UserError, match="not an index"):
        FeatureStore.open(tmp_path / "i" / "manifest.json")
    with pytest.raises(UserError, match="is a file"):
        make(tmp_path / "i" / "manifest.json")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        make(tmp_path / "full")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"


def test_an_unfinished_index_is_refused(tmp_path: Path) -> None:
    store = make(tmp_path / "i", whole=False)
    store.write((0, 8), {k: torch.zeros(8, d) for k, d in WIDTHS.items()})
    with pytest.raises(UserError, match="unfinished \\(8 of 20 rows\\)"):
        FeatureStore.open(tmp_path / "i")


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs 1,000,000,000,000\.0 MB and only"):
        check_disk(tmp_path / "not" / "yet", 10**18)
    check_disk(tmp_path / "not" / "yet", 10)
    assert list(tmp_path.iterdir()) == []


def test_shards_have_a_sane_size() -> None:
    assert [shard_rows(b) for b in (1, 2**20, 2**30)] == [256, 64, 8]


BUILD = """
import sys, datablame, datablame.store
datablame.store.SHARD_BYTES = 1  # eight rows a shard
datablame.index(sys.argv[1], sys.argv[2], sys.argv[4], sys.argv[3], capture=datablame.CaptureOptions(batch_tokens=150))
"""


def files(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(path.iterdir()) if p.suffix != ".part"}


def test_killed_at_any_moment_and_resumed_is_bitwise_the_same(
    model_dir: Path, adapter_dir: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": f"{p} {i}", "response": r} for i in range(6) for p, r in ROWS]
    train = write_jsonl(tmp_path / "train.jsonl", rows)
    command = [sys.executable, "-c", BUILD, str(model_dir), str(train), str(adapter_dir)]
    subprocess.run([*command, str(tmp_path / "straight")], check=True)
    out = tmp_path / "killed"
    kills = 0
    for shards in (1, 3):
        process = subprocess.Popen([*command, str(out)])
        while process.poll() is None and not (out / f"shard-{shards - 1:05d}.safetensors").exists():
            time.sleep(0.002)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    # What a kill in the middle of writing leaves behind: a part, and a shard that the manifest does not name.
    (out / "shard-00005.safetensors.part").write_bytes(b"half a sha")
    (out / "shard-00005.safetensors").write_bytes(b"not yet in the manifest")
    assert kills > 0
    assert json.loads((out / "manifest.json").read_text())["shards"]
    subprocess.run([*command, str(out)], check=True)
    assert files(out) == files(tmp_path / "straight")
    assert len(files(out)) == 6 + 3


def test_index_refuses_another_adapter_template_or_option(
    built: Path, model_dir: Path, adapter_dir: Path, tmp_path: Path
) -> None:
    import shutil

    from conftest import save_adapter

    out, train = tmp_path / "i", built.parent / "train.jsonl"
    shutil.copytree(built, out)
    other = save_adapter(model_dir, tmp_path / "other", seed=9)
    with pytest.raises(UserError, match="other settings.*adapter_sha256"):
        datablame.index(str(model_dir), train, out, str(other))
    with pytest.raises(UserError, match="other settings.*encoding"):
        datablame.index(
            str(model_dir), train, out, str(adapter_dir), encoding=datablame.EncodingOptions(template="none")
        )
    with pytest.raises(UserError, match="other settings.*layers"):
        datablame.index(str(model_dir), train, out, str(adapter_dir), capture=CaptureOptions(layers="all"))
    assert files(out) == files(built)
    again = datablame.index(str(model_dir), train, out, str(adapter_dir))  # the same: nothing to do
    assert len(again) == len(ROWS)
    assert files(out) == files(built)
