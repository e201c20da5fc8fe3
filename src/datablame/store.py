"""The feature store: a directory of row shards, complete or resumable, never half-trusted.

    manifest.json                what made it, every feature's width, the shards written so far with checksums
    examples.parquet             ids, labels and text of the rows
    adapter.safetensors          the adapter's weights and its optimizer's second moments, as methods need them
    shard-00000.safetensors      every feature of rows [a, b)

A shard is written as `*.part`, flushed, renamed, and then entered into the manifest (itself replaced in one
step). Whatever the moment of an interruption, a shard named in the manifest is whole, and any other is
written again, to the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datablame.errors import UserError
from datablame.examples import Example

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

SCHEMA = 3
ADAPTER = "adapter.safetensors"
SHARD_BYTES = 64 * 2**20


def shard_rows(row_bytes: int) -> int:
    """Rows of a shard: about 64 MB, at least 8 and at most 256."""
    return max(8, min(256, SHARD_BYTES // max(1, row_bytes)))


class FeatureStore:
    """An index on disk: features `[n, D]` by name, and the examples they belong to."""

    def __init__(
        self,
        path: Path,
        manifest: dict[str, Any],
        examples: list[Example],
        adapter: Callable[[], Mapping[str, Tensor]] | None = None,
    ) -> None:
        self.path, self.manifest, self.examples = path, manifest, examples
        self._adapter = adapter or dict

    # ------------------------------------------------------------ open and create

    @classmethod
    def create(
        cls,
        path: Path,
        settings: Mapping[str, Any],
        widths: Mapping[str, int],
        examples: Sequence[Example],
        dtype: str,
        adapter: Callable[[], Mapping[str, Tensor]] | None = None,
    ) -> FeatureStore:
        """The index that will be at `path`: a new one, or an unfinished or damaged one made with the same settings.

        adapter: makes the tensors that belong to the model rather than to a row, read again by `adapter`; called only
        where they are not on disk yet.

        Nothing is written before `begin`. `settings` decide the features: another value is another index, and is
        refused with the reason (where the model lies may change, its content may not).
        """
        row_bytes = sum(widths.values()) * (8 if dtype == "float64" else 4)
        manifest = {
            "schema": SCHEMA,
            "settings": dict(settings),
            "rows": len(examples),
            "dtype": dtype,
            "widths": dict(widths),
            "shard_rows": shard_rows(row_bytes),
            "shards": [],
        }
        if (path / "manifest.json").exists():
            store = cls.open(path, complete=False, verify=False)
            _same(store.manifest, manifest, path)
            return cls(path, store.manifest, store.examples, adapter)
        if path.exists() and not path.is_dir():
            raise UserError(f"{path}: is a file; name a directory.")
        # An interruption before the first manifest leaves examples and parts; anything else is somebody's own.
        if path.exists() and any(
            p.name not in ("examples.parquet", ADAPTER) and p.suffix != ".part" for p in path.iterdir()
        ):
            raise UserError(f"{path}: the directory is not empty and is no index. Give a new --out.")
        return cls(path, manifest, list(examples), adapter)

    def begin(self) -> list[str]:
        """Write what a new index starts with; strike damaged shards of an old one, and return their names."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / "manifest.json").exists():
            _write_examples(self.path / "examples.parquet", self.examples)
            self.manifest["examples_sha256"] = _sha256(self.path / "examples.parquet")
            self._write_adapter()
            self._write_manifest()
        if not self._adapter_whole():
            self._write_adapter()
        bad = [s for s in self.manifest["shards"] if not self._whole(s)]
        if bad:
            self.manifest["shards"] = [s for s in self.manifest["shards"] if s not in bad]
            self._write_manifest()
        return [s["file"] for s in bad]

    @classmethod
    def open(cls, path: str | Path, complete: bool = True, verify: bool = True) -> FeatureStore:
        """Open an index. Raises UserError when it is none, of another version, unfinished or damaged."""
        path = Path(path)
        manifest = _read_manifest(path)
        if manifest.get("schema") != SCHEMA:
            raise UserError(
                f"{path}: made by another version (schema {manifest.get('schema')}; this one reads {SCHEMA}). "
                "Index again."
            )
        rows = path / "examples.parquet"
        if not rows.exists() or _sha256(rows) != manifest.get("examples_sha256"):
            raise UserError(f"{rows}: missing or damaged; delete {path} and index again.")
        store = cls(path, manifest, _read_examples(rows))
        if complete and store.missing():
            done, n = sum(s["rows"][1] - s["rows"][0] for s in manifest["shards"]), len(store)
            raise UserError(
                f"{path}: unfinished ({done} of {n} rows). Run the same `datablame index` command to go on."
            )
        if verify:
            store.verify()
        return store

    def verify(self) -> None:
        """Compare every checksum. Raises UserError naming the damaged file."""
        whole = {self.path / shard["file"]: self._whole(shard) for shard in self.manifest["shards"]}
        for file, intact in {self.path / ADAPTER: self._adapter_whole(), **whole}.items():
            if not intact:
                state = "damaged (checksum)" if file.exists() else "missing"
                raise UserError(f"{file}: {state}. Run the same `datablame index` command again to rebuild it.")

    def _adapter_whole(self) -> bool:
        file = self.path / ADAPTER
        return file.exists() and _sha256(file) == self.manifest["adapter_file_sha256"]

    def _whole(self, shard: Mapping[str, Any]) -> bool:
        file = self.path / shard["file"]
        return file.exists() and _sha256(file) == shard["sha256"]

    # ------------------------------------------------------------ write

    def missing(self) -> list[tuple[int, int]]:
        """Row ranges [a, b) that no shard holds yet, shard by shard."""
        done = {tuple(s["rows"]) for s in self.manifest["shards"]}
        n, step = len(self), self.manifest["shard_rows"]
        ranges = [(a, min(a + step, n)) for a in range(0, n, step)]
        return [r for r in ranges if r not in done]

    def write(self, rows: tuple[int, int], features: Mapping[str, Tensor]) -> None:
        """Write one shard and enter it into the manifest."""
        from safetensors.torch import save

        name = f"shard-{rows[0] // self.manifest['shard_rows']:05d}.safetensors"
        data = save({k: features[k].contiguous() for k in sorted(features)})
        write_whole(self.path / name, data)
        entry = {"file": name, "rows": list(rows), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        self.manifest["shards"] = sorted([*self.manifest["shards"], entry], key=lambda s: s["file"])
        self._write_manifest()

    def _write_adapter(self) -> None:
        from safetensors.torch import save

        tensors = self._adapter()
        data = save({k: tensors[k].contiguous() for k in sorted(tensors)})
        self.manifest["adapter_file_sha256"] = hashlib.sha256(data).hexdigest()
        write_whole(self.path / ADAPTER, data)

    def _write_manifest(self) -> None:
        write_whole(self.path / "manifest.json", json.dumps(self.manifest, indent=1, ensure_ascii=False).encode())

    # ------------------------------------------------------------ read

    def __len__(self) -> int:
        return int(self.manifest["rows"])

    def __repr__(self) -> str:
        return f"FeatureStore({str(self.path)!r}, {len(self)} rows, {len(self.manifest['widths'])} features)"

    @property
    def settings(self) -> dict[str, Any]:
        """What made the features: model, adapter, encoding, blocks and layers."""
        return dict(self.manifest["settings"])

    def features(self, kind: str) -> Features:
        """All features of a kind: gradients, hidden, base-hidden, loss, base-loss, length, checkpoints/STEP."""
        names = [k for k in self.manifest["widths"] if k == kind or k.startswith(f"{kind}/")]
        return Features(self, {k.removeprefix(f"{kind}/"): k for k in names})

    def adapter(self, kind: str) -> dict[str, Tensor]:
        """`{block: tensor}` of the model's own tensors: `weights`, `checkpoints/STEP/weights`, `adam` (Adam's v̂),
        `extras/KIND` (what an extra prepared)."""
        from safetensors import safe_open

        with safe_open(str(self.path / ADAPTER), framework="pt") as file:
            names = [k for k in file.keys() if k.startswith(f"{kind}/")]  # noqa: SIM118
            return {k.removeprefix(f"{kind}/"): file.get_tensor(k) for k in names}

    def sums(self, kind: str) -> dict[str, Tensor]:
        """`{name: tensor}`: what an extra summed over all training rows, `sums/KIND/NAME` of every shard added up."""
        from safetensors import safe_open

        total: dict[str, Tensor] = {}
        for shard in self.manifest["shards"]:
            with safe_open(str(self.path / shard["file"]), framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    if key.startswith(f"sums/{kind}/"):
                        name, part = key.removeprefix(f"sums/{kind}/"), file.get_tensor(key)
                        total[name] = total[name] + part if name in total else part
        return total

    def read(self, name: str) -> Float[Tensor, "n D"]:
        """One feature of all rows."""
        import torch
        from safetensors import safe_open

        parts = []
        for shard in self.manifest["shards"]:
            with safe_open(str(self.path / shard["file"]), framework="pt") as file:
                parts.append(file.get_tensor(name))
        return torch.cat(parts)


class Features(Mapping[str, "Tensor"]):
    """`{block: [n, D]}` over a store: a block is read from disk each time it is asked for, none is kept."""

    def __init__(self, store: FeatureStore, names: dict[str, str]) -> None:
        self._store, self._names = store, names

    def __getitem__(self, block: str) -> Tensor:
        return self._store.read(self._names[block])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


# ---------------------------------------------------------------- files


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as e:
        raise UserError(f"{path}: not an index (no manifest.json). Make one with `datablame index`.") from e
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path / 'manifest.json'}: damaged; delete the directory and index again.") from e
    if not isinstance(manifest, dict):
        raise UserError(f"{path / 'manifest.json'}: not the manifest of an index.")
    return manifest


PLACES = ("model", "adapter")
"""Settings that say where content lies; the digests beside them say what it is."""


def _same(old: dict[str, Any], new: dict[str, Any], path: Path) -> None:
    """Raise UserError naming every setting in which an existing index differs from the one asked for."""
    a = {**old["settings"], "rows": old["rows"], "dtype": old["dtype"], "widths": old["widths"]}
    b = {**new["settings"], "rows": new["rows"], "dtype": new["dtype"], "widths": new["widths"]}
    differ = [k for k in sorted({*a, *b} - {*PLACES}) if a.get(k) != b.get(k)]
    if differ:
        differ = [k for k in differ if k != "widths"] or differ  # the widths follow from the rest
        shown = "; ".join(f"{k}: {_short(a.get(k))} there, {_short(b.get(k))} here" for k in differ[:4])
        raise UserError(f"{path}: this index was made with other settings ({shown}). Give another --out, or delete it.")


def _short(value: Any) -> str:
    if isinstance(value, list) and value and "step" in value[0]:
        value = [v["step"] for v in value]
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"


class DiskError(UserError):
    """There is no room on the disk, or no leave to write: whatever was to be kept, it is not at fault."""


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is either the old one or the whole new one, even after a power cut."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as e:
        part.unlink(missing_ok=True)
        raise DiskError(f"{path}: cannot be written ({e.strerror}). What was finished before is kept.") from e


def read_kept(path: Path) -> Any:
    """A JSON file of the cache. Raises UserError for a damaged one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(f"{path}: damaged; delete it, and run the same command again.") from e


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_disk(path: Path, needed: int) -> None:
    """Raise DiskError, a UserError, when `needed` bytes (and a tenth more) do not fit where `path` will be."""
    folder = path
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed * 1.1 > free:
        raise DiskError(
            f"{path}: the index needs {needed / 1e6:,.1f} MB and only {free / 1e6:,.1f} MB are free. "
            "Choose fewer --blocks or --layers, fewer rows, or another --out."
        )


def _write_examples(path: Path, examples: Sequence[Example]) -> None:
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "id": pa.array([e.id for e in examples]),
            "row": pa.array([e.row for e in examples], pa.int64()),
            "messages": pa.array([json.dumps(e.messages, ensure_ascii=False) for e in examples], pa.string()),
            "text": pa.array([e.text for e in examples], pa.string()),
            "label": pa.array([e.label for e in examples], pa.string()),
            "given": pa.array([e.given for e in examples], pa.int64()),
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    write_whole(path, buffer.getvalue())


def _read_examples(path: Path) -> list[Example]:
    import pyarrow.parquet as pq

    rows = pq.read_table(path).to_pylist()
    return [Example(**{**r, "messages": tuple(json.loads(r["messages"]))}) for r in rows]
