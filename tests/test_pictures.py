"""Pictures in the documentation are of the committed results, and each is shown."""

from __future__ import annotations

import importlib.util
import zlib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pictures() -> ModuleType:
    """benchmarks/pictures.py"""
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "benchmarks" / "pictures.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_picture_is_of_the_committed_result(pictures: ModuleType) -> None:
    text = (ROOT / "docs" / "paper.md").read_text() + (ROOT / "docs" / "bench.md").read_text()
    drawn = 0
    for name, picture in pictures.PICTURES.items():
        view = pictures.view_of(picture)
        if view is not None:
            png = (ROOT / "docs" / f"{name}.png").read_bytes()
            assert pictures.shown_in(png) == pictures.digest(view), f"run python benchmarks/pictures.py {name}"
            assert f"({name}.png)" in text
            drawn += 1
    assert drawn >= 4


def test_a_picture_of_other_numbers_is_told(pictures: ModuleType) -> None:
    view = pictures.view_of(pictures.PICTURES["figure3"])
    view["data"][0]["y"][0] += 0.01
    assert pictures.digest(view) != pictures.shown_in((ROOT / "docs" / "figure3.png").read_bytes())
    assert pictures.shown_in(b"no such chunk") is None
    with pytest.raises(KeyError):
        pictures.view_of(pictures.Picture("figure3", "no such view"))


def test_a_picture_stays_a_png(pictures: ModuleType) -> None:
    png = pictures._with_digest((ROOT / "docs" / "report.png").read_bytes(), "a" * 64)
    assert pictures.shown_in(png) == "a" * 64
    length = int.from_bytes(png[33:37], "big")
    chunk = png[37 : 41 + length]
    assert chunk[:4] == b"tEXt"
    assert int.from_bytes(png[41 + length : 45 + length], "big") == zlib.crc32(chunk)
    assert png[45 + length :] == (ROOT / "docs" / "report.png").read_bytes()[33:]
