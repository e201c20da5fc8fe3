"""Score matrices and labels from files, whatever tool wrote them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datablame.errors import UserError, nearest
from datablame.evaluation.evaluate import check_counts
from datablame.examples import jsonl

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Float

    Matrix = Float[np.ndarray, "m n"]

LONG = ("query", "train", "score")
"""Columns of a table with one pair a line, as `datablame trace` writes it."""


def read_labels(path: str | Path) -> list[str]:
    """One label a line, or JSONL with `label` (named .jsonl or .ndjson, or beginning with `{`). Blank lines may end it.

    Raises UserError naming the line without a label.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() in (".jsonl", ".ndjson") or text.lstrip().startswith("{"):
            labels = [_label(where, record) for where, record in jsonl(path)]
        else:
            labels = [line.strip() for line in text.rstrip().splitlines()]
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 text (byte {e.start}). Save it as UTF-8.") from e
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e}).") from e
    if not labels:
        raise UserError(f"{path}: no labels. Give one a line, or JSONL with `label`.")
    if "" in labels:
        raise UserError(f"{path}, line {labels.index('') + 1}: no label. Every row needs one.")
    return labels


def _label(where: str, record: dict[str, Any]) -> str:
    label = record.get("label")
    if label is None or isinstance(label, (list, dict)) or not str(label).strip():
        raise UserError(f"{where}: expected text or a number in `label`, found {label!r:.60}.")
    return str(label).strip()


def read_scores(path: str | Path, queries: int, rows: int, method: str | None = None) -> Matrix:
    """A score matrix `[queries, rows]` from a file; the numbers of labels say what a header or an index is.

    .npy, .npz (one array, or the one called `scores`): queries × training rows.
    .csv: a first line more than there are queries is a header, a first field more than there are training rows an
    index, if they hold names (something that is no number) or count 0, 1, 2 … or 1, 2, 3 …; else the counts do not fit.
    .parquet: the same for a first column. CSV and Parquet may instead be the long table of `datablame trace`, with the
    columns query, train and score: ids in order of first appearance, which every query must keep; `method` chooses
    among those in a column method.
    Raises UserError naming the place for anything else. Nothing is unpickled.
    """
    path = Path(path)
    readers = {".csv": _csv, ".parquet": _parquet, ".npy": _numpy, ".npz": _numpy}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: unknown file type {path.suffix!r}; use {', '.join(readers)}.")
    try:
        found = readers[path.suffix.lower()](path, queries, rows)
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 text (byte {e.start}). Save it as UTF-8.") from e
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e}).") from e
    if not isinstance(found, np.ndarray):
        found = _from_long(path, found, method)
    elif method is not None:
        raise UserError(f"{path}: holds one matrix; --method chooses from a table with a column `method`.")
    check_counts(str(path), found.shape, queries, rows)
    return found


def _numpy(path: Path, queries: int, rows: int) -> Matrix:
    from zipfile import BadZipFile

    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.lib.npyio.NpzFile):
            with loaded:
                name = "scores" if "scores" in loaded.files else loaded.files[0] if len(loaded.files) == 1 else None
                if name is None:
                    arrays = ", ".join(map(repr, loaded.files)) or "none"
                    raise UserError(f"{path}: which array? There are {arrays}. Call the one to read 'scores'.")
                loaded = loaded[name]
    except (ValueError, EOFError, BadZipFile) as e:
        raise UserError(f"{path}: not an array of numbers as NumPy saves it ({str(e).splitlines()[0]}).") from e
    if loaded.dtype.kind not in "biuf":
        raise UserError(f"{path}: expected numbers, found the type {loaded.dtype}.")
    return loaded.astype(np.float64)


# ---------------------------------------------------------------- tables


def _csv(path: Path, queries: int, rows: int) -> Matrix | pd.DataFrame:
    grid, numbers = _fields(path)
    if set(LONG) <= set(grid[0]):
        import pandas as pd

        return pd.DataFrame(grid[1:], columns=grid[0])
    header, index = len(grid) - queries, len(grid[0]) - rows
    if not _fits(grid, header, index):
        turned = len(grid) - rows, len(grid[0]) - queries
        header, index = turned if _fits(grid, *turned) else (0, 0)
        _check_commas(path, grid)
        check_counts(str(path), (len(grid) - header, len(grid[0]) - index), queries, rows)
    values = [line[index:] for line in grid[header:]]
    try:
        return np.array(values, dtype=np.float64)
    except ValueError:
        for number, line in zip(numbers[header:], values, strict=True):
            for field, text in enumerate(line, start=index + 1):
                if not _is_number(text):
                    what = f"{text!r:.60} is not a number" if text.strip() else "there is no score"
                    raise UserError(f"{path}, line {number}, field {field}: {what}.") from None
        raise


def _fields(path: Path) -> tuple[list[list[str]], list[int]]:
    """The fields of every line that is not blank, and the lines' numbers; UserError where their count changes."""
    csv.field_size_limit(2**31 - 1)
    grid, numbers = [], []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            for line in reader:
                if line:
                    grid.append(line)
                    numbers.append(reader.line_num)
        except csv.Error as e:
            raise UserError(f"{path}, line {reader.line_num}: not valid CSV ({e}).") from e
    if not grid:
        raise UserError(f"{path}: no scores. Give a line for each query and a column for each training row.")
    for number, line in zip(numbers, grid, strict=True):
        if len(line) != len(grid[0]):
            raise UserError(f"{path}, line {number}: {len(line)} fields, the first line has {len(grid[0])}.")
    return grid, numbers


def _check_commas(path: Path, grid: list[list[str]]) -> None:
    """Raise UserError where lines of one field hold what other programs separate by."""
    odd = {";": "semicolons", "\t": "tabs"}
    if found := [words for mark, words in odd.items() if len(grid[0]) == 1 and mark in grid[0][0]]:
        raise UserError(f"{path}: the fields seem to be separated by {found[0]}; use commas.")


def _fits(grid: list[list[str]], header: int, index: int) -> bool:
    """Whether so many lines and columns of names can be taken off the matrix: 0 or 1 of each."""
    if header not in (0, 1) or index not in (0, 1):
        return False
    first_line, first_column = grid[0][index:], [line[0] for line in grid[header:]]
    return (not header or _names(first_line)) and (not index or _names(first_column))


def _names(fields: Sequence[object]) -> bool:
    """Whether these are names and not scores: something that is no number, or counting from 0 or 1."""
    if not all(_is_number(f) for f in fields):
        return True
    counted = [float(f) for f in fields]  # type: ignore[arg-type]
    return counted in (list(range(len(fields))), list(range(1, len(fields) + 1)))


def _is_number(field: object) -> bool:
    try:
        float(field)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return True


def _parquet(path: Path, queries: int, rows: int) -> Matrix | pd.DataFrame:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        frame = pq.read_table(path).to_pandas()
    except pa.ArrowInvalid as e:
        raise UserError(f"{path}: not a Parquet file ({str(e).splitlines()[0]}).") from e
    if set(LONG) <= set(frame.columns):
        return frame
    if frame.shape[1] in (rows + 1, queries + 1) and _names(frame.iloc[:, 0].tolist()):
        frame = frame.iloc[:, 1:]
    check_counts(str(path), frame.shape, queries, rows)
    for name, kind in frame.dtypes.items():
        if kind.kind not in "biuf":
            raise UserError(f"{path}: the column {name!r} holds {kind}, not numbers.")
    return frame.to_numpy(dtype=np.float64, na_value=np.nan)


def _from_long(path: Path, table: pd.DataFrame, method: str | None) -> Matrix:
    """The matrix of one method; queries and training rows in order of first appearance."""
    import pandas as pd

    methods = list(table["method"].unique()) if "method" in table else []
    if method is None and len(methods) > 1:
        raise UserError(f"{path}: scores of several methods. Choose with --method: {', '.join(map(str, methods))}.")
    if method is not None:
        if method not in methods:
            raise UserError(f"{path}: no scores of {method!r}.{nearest(method, map(str, methods))}")
        table = table[table["method"] == method]
    query, queries = pd.factorize(table["query"])
    train, rows = pd.factorize(table["train"])
    if len(table) == 0 or query.min() < 0 or train.min() < 0:
        raise UserError(f"{path}: a table of query, train and score needs at least one line, and an id in each.")
    pairs = np.zeros((len(queries), len(rows)), dtype=np.int64)
    np.add.at(pairs, (query, train), 1)
    if (pairs != 1).any():
        q, t = np.argwhere(pairs != 1)[0]
        what = "no score" if pairs[q, t] == 0 else f"{pairs[q, t]} scores"
        pair = f"query {queries.tolist()[q]!r} and training row {rows.tolist()[t]!r}"
        raise UserError(f"{path}: {what} of {pair}. Each pair needs exactly one.")
    _check_order(path, table, "query", "train")
    _check_order(path, table, "train", "query")
    matrix = np.empty(pairs.shape)
    try:
        matrix[query, train] = table["score"].to_numpy(dtype=np.float64)
    except (TypeError, ValueError) as e:
        raise UserError(f"{path}: the column 'score' must hold numbers ({e}).") from e
    return matrix


def _check_order(path: Path, table: pd.DataFrame, each: str, listed: str) -> None:
    """Raise UserError unless every query lists the training rows in the order of first appearance, or the reverse."""
    import pandas as pd

    owners, names = pd.factorize(table[each])
    codes, ids = pd.factorize(table[listed])
    order = codes[np.argsort(owners, kind="stable")].reshape(len(names), len(ids))
    wrong = np.argwhere(order != np.arange(len(ids)))
    if len(wrong):
        i, j = wrong[0]
        before, after = ids.tolist()[order[i, j]], ids.tolist()[j]
        raise UserError(
            f"{path}: the lines of {each} {names.tolist()[i]!r} have {listed} {before!r} before {after!r}, earlier "
            "lines after it. Labels go by the order of the files traced: leave the table as `datablame trace` wrote "
            "it, not sorted by score or rank."
        )
