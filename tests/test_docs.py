"""Every code block of README, CONTRIBUTING and docs runs, on a tiny model; results in them come from JSON."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from conftest import ROWS, write_digits, write_jsonl
from datablame.methods import BUILTIN, method_class

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)
METHODS = ROOT / "docs" / "methods"
HEADINGS = ["Formula", "Source", "Options", "Needs", "Cost", "Checked against", "When it misleads", "Example"]
LINK = re.compile(r"\]\(([^)#:]*)(?:#([\w-]+))?\)")


def blocks(page: Path, *languages: str) -> list[str]:
    return [code for language, code in BLOCK.findall(page.read_text(encoding="utf-8")) if language in languages]


@pytest.fixture
def workplace(model_dir: Path, adapter_dir: Path, tmp_path: Path) -> Path:
    """What the pages assume that a user has: a model, an adapter, a training file, queries, MNIST's files."""
    write_digits(tmp_path / "mnist")
    (tmp_path / "my-model").symlink_to(model_dir)
    (tmp_path / "my-adapter").symlink_to(adapter_dir)
    write_jsonl(tmp_path / "train.jsonl", [{"prompt": p, "response": r} for p, r in ROWS])
    write_jsonl(tmp_path / "queries.jsonl", [{"prompt": p, "response": r} for p, r in ROWS[:2]])
    for name in ("Makefile", "benchmarks", "src", "pyproject.toml", "constraints.txt", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_code_blocks_run(page: Path, workplace: Path) -> None:
    """Shell and Python blocks of a page run in order in one folder; `make` and benchmarks run dry."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for language, code in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "bash":
            code = re.sub(r"^make ", "make -n ", code, flags=re.M)
            code = re.sub(r"^(python benchmarks/\S+).*(?:\\\n.*)*", r"\1 --help", code, flags=re.M)
            code = re.sub(
                r"^(datablame paper run (?:table5|figure3|figure7).*)", r"\1 --mnist ./mnist", code, flags=re.M
            )
            code = re.sub(r"^(git clone|pip install|datablame demo).*", "true", code, flags=re.M)
            command = ["bash", "-euo", "pipefail", "-c", code]
        elif language == "python":
            command = [sys.executable, "-c", code]
        else:
            assert language in ("text", "toml", "json"), f"{page.name}: nobody runs {language} blocks"
            continue
        done = subprocess.run(command, cwd=workplace, env=os.environ | {"PATH": path}, capture_output=True, text=True)
        assert done.returncode == 0, f"{page.name}:\n{code}\n{done.stdout}\n{done.stderr}"


def test_the_readme_has_blocks_that_matter() -> None:
    text = "\n".join(blocks(ROOT / "README.md", "bash", "python"))
    for needed in ("make demo", "make test", "datablame index", "datablame trace", "import datablame"):
        assert needed in text


def test_results_in_pages_are_those_of_the_json() -> None:
    subprocess.run([sys.executable, ROOT / "benchmarks" / "tables.py", "--check"], check=True)


@pytest.mark.parametrize("name", BUILTIN)
def test_every_method_has_a_page_that_names_its_options(name: str) -> None:
    text = (METHODS / f"{name}.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {name}\n")
    assert re.findall(r"^## (.*)", text, re.M) == HEADINGS
    sections = dict(zip(HEADINGS, re.split(r"^## .*\n", text, flags=re.M)[1:], strict=True))
    assert all(section.strip() for section in sections.values())
    assert BLOCK.search(sections["Formula"])
    options = sections["Options"]
    for field in (f for f in dataclasses.fields(method_class(name)) if f.init):
        assert f"`{field.name}`" in options, field.name
    assert f"]({name}.md)" in (METHODS / "index.md").read_text(encoding="utf-8")


def test_no_page_is_left_of_a_method_that_is_gone() -> None:
    assert {p.stem for p in METHODS.glob("*.md")} == {*BUILTIN, "index", "options"}


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and mkdocs spell them."""
    headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(BLOCK.sub("", page.read_text(encoding="utf-8"))):
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(there), f"{page.name}: {target}#{anchor}"


def install(folder: Path, module: str, code: str, group: str) -> dict[str, str]:
    """The page's code as a module of somebody else's package, with its entry points; the environment that has it."""
    (toml,) = (t for t in blocks(ROOT / "CONTRIBUTING.md", "toml") if group in t)
    (folder / f"{module}.py").write_text(code)
    points = tomllib.loads(toml)["project"]["entry-points"][group]
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()))
    path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path)}


def test_an_installed_method_appears_in_the_command_line(tmp_path: Path, built: Path) -> None:
    """The method of CONTRIBUTING, installed as a package of somebody else's."""
    (method,) = (b for b in blocks(ROOT / "CONTRIBUTING.md", "python") if "SignDot" in b)
    env = install(tmp_path, "my_package", method, "datablame.methods")
    datablame = [sys.executable, "-m", "datablame.cli"]
    listing = subprocess.run([*datablame, "methods"], env=env, capture_output=True, text=True, check=True).stdout
    assert "signdot      Dot product of the signs" in listing
    out = tmp_path / "out"
    trace = ["trace", built, "--prompt", "Hi", "--response", "Ho", "--method", "signdot:scale=2", "--out", out]
    subprocess.run([*datablame, *map(str, trace)], env=env, capture_output=True, check=True)
    import pandas as pd

    assert set(pd.read_parquet(out / "scores.parquet")["method"]) == {"signdot:scale=2"}


def test_an_installed_task_appears_in_the_command_line(tmp_path: Path) -> None:
    """The task of CONTRIBUTING, installed as a package of somebody else's; it takes under 40 lines."""
    (task,) = (b for b in blocks(ROOT / "CONTRIBUTING.md", "python") if "GREETINGS" in b)
    assert len(task.splitlines()) < 40
    env = install(tmp_path, "my_tasks", task, "datablame.tasks")
    bench = [sys.executable, "-m", "datablame.cli", "bench"]
    listing = subprocess.run([*bench, "tasks", "greetings"], env=env, capture_output=True, text=True, check=True).stdout
    assert "36 rows, 12 queries, 3 classes; chance of a right top row 0.333" in listing
    rows = [*bench, "rows", "greetings", "--scale", "smoke", "--out", str(tmp_path / "out")]
    subprocess.run(rows, env=env, capture_output=True, check=True)
    assert len((tmp_path / "out" / "train.jsonl").read_text().splitlines()) == 24
