"""`datablame cache`: what is listed, what goes, and what must stay."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock, Timeout

from conftest import ROWS
from datablame import cache, locks
from datablame.cache import KINDS, choose, entries, remove
from datablame.errors import UserError
from datablame.evaluation.finetunes import fine_tuned
from datablame.examples import from_prompt
from datablame.tuning import TuneOptions

SOURCE = Path(cache.__file__).parent


def write(path: Path, size: int = 10, days: float = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    for p in (path, path.parent):
        os.utime(p, (time.time() - days * cache.DAY,) * 2)
    return path


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with something of everything, and things that are not ours."""
    root = tmp_path / "cache"
    monkeypatch.setenv("DATABLAME_CACHE", str(root))
    write(root / "models" / "small" / "model.safetensors", 2_000_000, days=3)
    write(root / "models" / "half.7.part" / "model.safetensors", days=2)
    write(root / "models" / "new.8.part" / "model.safetensors")
    write(root / "mnist" / "a", 500, days=40)
    write(root / "mnist" / "b", 500, days=40)
    write(root / "bench" / "tiny-sound-s0-ab" / "scores.npz", 300, days=40)
    write(root / "bench" / "tiny-sound-s0-ab" / "lock", 0, days=40)
    write(root / "finetunes" / "abc" / "adapter" / "w", 100)
    write(root / "retrained" / "sha" / "digest" / "result.json")
    write(root / "thesis" / "chapter1.txt")
    write(tmp_path / "elsewhere" / "precious.txt")
    (root / "sources").symlink_to(tmp_path / "elsewhere")
    (root / "finetunes" / "link").symlink_to(tmp_path / "elsewhere")
    (root / "finetunes" / "abc" / "out").symlink_to(tmp_path / "elsewhere")
    return root


def names(found: list[cache.Entry]) -> set[str]:
    return {e.name for e in found}


def test_everything_is_listed_by_kind(run: Any, root: Path) -> None:
    code, out, error = run("cache", "list")
    assert code == 0, error
    assert names(entries()) == {
        "models/small", "models/half.7.part", "models/new.8.part", "mnist", "bench/tiny-sound-s0-ab", "finetunes/abc",
        "retrained/sha",
    }  # fmt: skip
    assert {e.name: e.in_use for e in entries() if e.kind == "models"} == {
        "models/small": False, "models/half.7.part": False, "models/new.8.part": True,
    }  # fmt: skip
    sizes = {e.name: e.size for e in entries()}
    assert sizes["mnist"] == 1000
    assert sizes["bench/tiny-sound-s0-ab"] == 300
    assert sizes["finetunes/abc"] == 100 + len(os.readlink(root / "finetunes" / "abc" / "out"))  # and not what it names
    assert re.search(r"models/small +2\.0 MB +3 days", out)
    assert re.search(r"mnist +1\.0 kB +40 days\n", out)
    assert "models: 2.0 MB. Models converted" in out
    assert "not datablame's, or links, and left alone: sources, thesis" in out
    assert not (root / "finetunes" / "abc" / "lock").exists()  # looking makes nothing
    code, out, _ = run("cache", "list", "--kind", "mnist")
    assert "bench/" not in out


def test_what_is_asked_for_together(root: Path) -> None:
    found = entries()
    assert names(choose(found, kind="bench")) == {"bench/tiny-sound-s0-ab"}
    assert names(choose(found, older_than=30)) == {"mnist", "bench/tiny-sound-s0-ab"}
    assert names(choose(found, kind="models", older_than=2.5)) == {"models/small"}
    assert names(choose(found, ["small", "finetunes/abc"])) == {"models/small", "finetunes/abc"}
    assert choose(found, ["small"], kind="bench") == []
    assert len(choose(found, older_than=0)) == len(found)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "say what to remove: names, --kind"),
        (["--kind", "finetune"], "--kind 'finetune': no such kind. Did you mean 'finetunes'"),
        (["smal"], "'smal': no such entry in .* Did you mean 'small'"),
        (["../elsewhere"], "'../elsewhere': no such entry"),
        (["sources"], "'sources': no such entry"),
        (["--older-than", "-1"], "--older-than -1: a number of days from 0"),
        (["--older-than", "nan"], "--older-than nan: a number of days"),
    ],
)
def test_what_cannot_be_removed_is_told(run: Any, root: Path, arguments: list[str], said: str) -> None:
    before = sorted(root.rglob("*"))
    code, _, error = run("cache", "prune", "--yes", *arguments)
    assert code == 2
    assert re.search(said, error.replace("\n", " ")), error
    assert sorted(root.rglob("*")) == before


def test_pruning_asks_and_leaves_the_rest(
    run: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prune(answer: str, *arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
        code, out, _ = run("cache", "prune", *arguments)
        return code, out

    code, out = prune("", "--older-than", "30", "--dry")
    assert code == 0
    assert "would free 1.3 kB, 2 of 2 entries" in out
    code, out = prune("n\n", "--older-than", "30")
    assert (code, "nothing was removed" in out) == (1, True)
    assert prune("", "--older-than", "30")[0] == 1  # nobody answers
    assert (root / "mnist" / "a").exists()
    code, out = prune("y\n", "--older-than", "30")
    assert code == 0
    assert "freed 1.3 kB" in out
    assert names(entries()) == {
        "models/small", "models/half.7.part", "models/new.8.part", "finetunes/abc", "retrained/sha"
    }  # fmt: skip
    # What is being made stays; links are not followed, and those of others stay.
    code, out = prune("", "--older-than", "0", "--yes")
    assert names(entries()) == {"models/new.8.part"}
    assert (tmp_path / "elsewhere" / "precious.txt").exists()
    assert (root / "finetunes" / "link").is_symlink()
    assert (root / "sources").is_symlink()
    assert (root / "thesis" / "chapter1.txt").exists()
    assert not [p for p in root.rglob("*") if p.suffix == ".part" and p.name != "new.8.part"]
    code, out, _ = run("cache", "prune", "--kind", "bench", "--yes")
    assert (code, "0 of 0 entries" in out) == (0, True)


def test_what_another_process_holds_stays(run: Any, root: Path) -> None:
    folder = root / "bench" / "tiny-sound-s0-ab"
    script = (
        "import sys; from filelock import FileLock as F; x = F(sys.argv[1]); x.acquire(); print(1, flush=True); input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(folder / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None
        other.stdout.readline()
        (cell,) = (e for e in entries() if e.kind == "bench")
        assert cell.in_use
        code, out, _ = run("cache", "prune", "--kind", "bench", "--yes")
        assert (code, "frees 0 B, 0 of 1 entries" in out) == (0, True)
        # And one that was free when it was listed, and is not by now.
        assert not remove(cache.Entry(**{**vars(cell), "in_use": False}))
        assert (folder / "scores.npz").exists()
    finally:
        other.communicate("\n")
    assert run("cache", "prune", "--kind", "bench", "--yes")[0] == 0
    assert not folder.exists()


def test_a_training_that_begins_meanwhile_is_waited_for(root: Path) -> None:
    """The lock that a training takes is taken for the removal, too, though no file of it is there yet."""
    (entry,) = (e for e in entries() if e.kind == "finetunes")
    with FileLock(entry.path / "lock"):
        assert not remove(entry)
    assert remove(entry)
    assert not entry.path.exists()


def test_who_comes_to_read_just_before_the_removal_keeps_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading is marked under the lock, so marks are looked for under it, too."""
    (entry,) = (e for e in entries() if e.kind == "finetunes")
    mark = FileLock(entry.path / "used-1.lock")

    class Reader(FileLock):
        def acquire(self, *args: Any, **kwargs: Any) -> Any:
            if Path(self.lock_file).name == "lock":
                mark.acquire()
            return super().acquire(*args, **kwargs)

    monkeypatch.setattr(cache, "FileLock", Reader)
    assert not remove(entry)
    mark.release()
    monkeypatch.undo()
    assert (entry.path / "adapter" / "w").exists()


@pytest.mark.parametrize("wait", [True, False])
def test_a_folder_that_is_removed_while_its_lock_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait: bool
) -> None:
    """Who waits takes a lock in a new folder, and no other has it."""
    monkeypatch.setattr(locks, "PROBED", 60)
    folder = tmp_path / "x"
    folder.mkdir()
    begun, found = threading.Event(), []

    class Waiting(FileLock):
        def acquire(self, *args: Any, **kwargs: Any) -> Any:
            begun.set()
            return super().acquire(*args, **kwargs)

    monkeypatch.setattr(locks, "FileLock", Waiting)

    def work() -> None:
        with locks.alone(folder / "lock", wait=wait) as first:
            try:
                FileLock(folder / "lock").acquire(timeout=0)
            except Timeout:
                found.append(first)

    other = threading.Thread(target=work)
    with FileLock(folder / "lock"):
        other.start()
        begun.wait()
        time.sleep(0.2)  # it polls, and meets a folder that is gone
        gone = folder.rename(tmp_path / "gone.part")
        time.sleep(0.2)
        shutil.rmtree(gone)
    other.join()
    assert found == [True]


def test_a_fine_tune_that_is_read_is_in_use(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any
) -> None:
    monkeypatch.setenv("DATABLAME_CACHE", str(tmp_path / "cache"))
    rows = [from_prompt(p, r, id=i) for i, (p, r) in enumerate(ROWS)]
    options = TuneOptions(rank=2, epochs=1, layers="0,2")
    adapter = fine_tuned(str(model_dir), rows, options, model_sha256="sha", checkpoints=False)
    (entry,) = entries()
    assert entry.in_use
    assert entry.about == f"{model_dir.name}: 7 rows, rank 2, layers 0,2, epochs 1, seed 0, checkpoints 0"
    assert "in use" in run("cache", "list")[1]
    assert not remove(entry)
    locks.release_all()
    assert not list(adapter.parent.glob("used-*"))
    (entry,) = entries()
    assert not entry.in_use
    assert remove(entry)
    assert not adapter.exists()


def test_only_so_many_marks_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "HELD", 2)
    folders = [tmp_path / str(k) for k in range(3)]
    for folder in [*folders, folders[1]]:
        folder.mkdir(exist_ok=True)
        locks.hold(folder)
    assert [len(list(f.iterdir())) for f in folders] == [0, 1, 1]
    locks.release_all()


def test_nothing_outside_is_ever_removed(root: Path, tmp_path: Path) -> None:
    outside = cache.Entry("bench", "bench/x", tmp_path / "elsewhere", 1, 0.0, False, "")
    link = cache.Entry("finetunes", "finetunes/link", root / "finetunes" / "link", 1, 0.0, False, "")
    through = cache.Entry("sources", "sources/precious.txt", root / "sources" / "precious.txt", 1, 0.0, False, "")
    foreign = cache.Entry("thesis", "thesis/chapter1.txt", root / "thesis" / "chapter1.txt", 1, 0.0, False, "")
    for entry in (outside, link, through, foreign):
        with pytest.raises(UserError, match="not in the cache"):
            remove(entry)
    assert (tmp_path / "elsewhere" / "precious.txt").exists()
    assert (root / "thesis" / "chapter1.txt").exists()


def test_an_empty_cache(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABLAME_CACHE", str(tmp_path / "none"))
    assert run("cache", "list")[:2] == (0, f"{tmp_path / 'none'}: 0 B\n")
    assert run("cache", "prune", "--older-than", "0", "--yes")[0] == 0
    assert not (tmp_path / "none").exists()


def test_a_damaged_record_is_no_obstacle(root: Path) -> None:
    for text in ("{", "[]", json.dumps({"options": {}})):
        write(root / "finetunes" / "abc" / "adapter" / "datablame.json").write_text(text)
        write(root / "finetunes" / "abc" / "train.jsonl")
        assert {e.about for e in entries()} == {""}


def test_every_directory_of_the_cache_has_a_kind() -> None:
    """Whoever keeps something new must say what it is."""
    used = {
        name for p in SOURCE.rglob("*.py") for name in re.findall(r'cache_dir\(\) / "([^"]+)"', p.read_text("utf-8"))
    }
    assert {"models", "finetunes", "bench"} <= used <= set(KINDS)
