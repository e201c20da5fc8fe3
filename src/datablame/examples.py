"""Rows of a user's file become `Example` objects, here and nowhere else.

Formats: JSONL, JSON, CSV, Parquet, a `datasets` directory (`save_to_disk`), or a hub id.
Shapes of a row, recognised by its column names, first match wins:
`messages` · `prompt`+`completion` · `prompt`+`response` · `instruction`(+`input`)+`output` · `text`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datablame.errors import UserError, nearest

Message = dict[str, str]
Id = int | str

SHAPES: tuple[tuple[str, ...], ...] = (
    ("messages",),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("text",),
)


@dataclass(frozen=True)
class Example:
    """One training row or query.

    `messages` is a conversation (`role`, `content`); its first `given` messages are the row's own prompt (0 when
    the row does not say). A `text` row has no messages: its whole text is learnt.
    `id` is the user's own or the row number; `row` is the 0-based position in the file.
    `against`, of a query: the output that its response is contrasted with.
    """

    id: Id
    row: int
    messages: tuple[Message, ...] = ()
    text: str = ""
    label: str | None = None
    given: int = 0
    against: str | None = None

    @property
    def response(self) -> str:
        """The last assistant turn, or the whole of a `text` row; empty where there is none."""
        if not self.messages:
            return self.text
        last = self.messages[-1]
        return last["content"] if last["role"] == "assistant" else ""

    @property
    def prompt(self) -> str:
        """Everything before the last assistant turn, turns joined by newlines; empty for a `text` row."""
        turns = self.messages
        if turns and turns[-1]["role"] == "assistant":
            turns = turns[:-1]
        return "\n".join(m["content"] for m in turns)

    def with_response(self, response: str) -> Example:
        """The same conversation, answered so: in place of the last turn, where that is an answer already."""
        answered = bool(self.messages) and self.messages[-1]["role"] == "assistant"
        turns = self.messages[:-1] if answered else self.messages
        return replace(self, messages=(*turns, {"role": "assistant", "content": response}))

    def instead(self) -> Example:
        """The same query with `against` for its response."""
        if not self.messages:
            return replace(self, text=self.against or "")
        return self.with_response(self.against or "")


def from_prompt(prompt: str, response: str | None = None, id: Id = 0, against: str | None = None) -> Example:
    """One question (and its answer, and another one to contrast it with) given by hand."""
    example = Example(id=id, row=0, messages=({"role": "user", "content": prompt},), given=1, against=against)
    return example if response is None else example.with_response(response)


@dataclass(frozen=True)
class Columns:
    """Names that override recognition (None means recognise), and the split of a `datasets` source."""

    prompt: str | None = None
    response: str | None = None
    text: str | None = None
    messages: str | None = None
    id: str | None = None
    label: str | None = None
    split: str = "train"


def load_examples(source: str | Path, columns: Columns | None = None) -> list[Example]:
    """Read `source` (file, `datasets` directory or hub id) into examples, in file order.

    Raises UserError naming file and row for anything malformed, empty or ambiguous (duplicate ids).
    """
    columns = columns or Columns()
    records = list(read_records(str(source), columns.split))
    if not records:
        raise UserError(f"{source}: no rows. Give a file with at least one training example.")
    reader = _Reader(str(source), columns, list(dict.fromkeys(name for _, record in records for name in record)))
    examples = [reader.read(where, row, record) for row, (where, record) in enumerate(records)]
    return _checked_ids(examples, [where for where, _ in records])


def _checked_ids(examples: list[Example], wheres: list[str]) -> list[Example]:
    if not all(isinstance(e.id, int) for e in examples):
        examples = [replace(e, id=str(e.id)) for e in examples]
    seen: dict[Id, str] = {}
    for e, where in zip(examples, wheres, strict=True):
        if e.id in seen:
            raise UserError(f"{where}: the id {e.id!r} was already used at {seen[e.id]}. Ids must be unique.")
        seen[e.id] = where
    return examples


# ---------------------------------------------------------------- files


def read_records(source: str, split: str = "train") -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, the record) of every row of a file, a `datasets` directory or a hub id."""
    path = Path(source)
    if path.is_dir():
        yield from _dataset_directory(path, split)
    elif path.exists():
        yield from _file(path)
    elif path.suffix.lower() in _READERS or len(path.parts) != 2:
        raise UserError(f"{source}: no such file or directory.")
    else:
        yield from _hub(source, split)


def _file(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        raise UserError(f"{path}: unknown file type {suffix!r}; use {', '.join(_READERS)}.")
    try:
        yield from _READERS[suffix](path)
    except UserError:
        raise
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 text (byte {e.start}). Save it as UTF-8.") from e
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e}).") from e


def jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) of every line that is not blank; UserError naming the line that is no JSON object."""
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as e:
                raise UserError(f"{where}: not valid JSON ({e.msg}, column {e.colno}).") from e
            except (ValueError, RecursionError) as e:
                raise UserError(f"{where}: cannot be read as JSON ({e}).") from e
            yield where, _object(record, where)


def _json(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig") or "[]")
    except json.JSONDecodeError as e:
        raise UserError(f"{path}, line {e.lineno}: not valid JSON ({e.msg}, column {e.colno}).") from e
    if not isinstance(data, list):
        raise UserError(f"{path}: expected a list of objects, found {type(data).__name__}.")
    for number, record in enumerate(data):
        where = f"{path}, row {number}"
        yield where, _object(record, where)


def _csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import csv

    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for record in reader:
                where = f"{path}, line {reader.line_num}"
                if None in record or None in record.values():
                    raise UserError(f"{where}: {'more' if None in record else 'fewer'} fields than the header.")
                yield where, record
        except csv.Error as e:
            raise UserError(f"{path}, line {reader.line_num}: not valid CSV ({e}).") from e


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as e:
        raise UserError(f"{path}: not a Parquet file ({str(e).splitlines()[0]}).") from e
    for number, record in enumerate(table.to_pylist()):
        yield f"{path}, row {number}", record


_READERS = {".jsonl": jsonl, ".ndjson": jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}


def _object(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object with named columns, found {type(record).__name__}.")
    return record


def _dataset_directory(path: Path, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (FileNotFoundError, ValueError) as e:
        raise UserError(f"{path}: not a `datasets` directory (save_to_disk). Name a file inside it.") from e
    yield from _dataset(loaded, str(path), split)


def _hub(source: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets

    try:
        loaded = datasets.load_dataset(source)
    except Exception as e:  # the hub client raises many kinds, all of which mean "could not be loaded"
        raise UserError(
            f"{source}: no such file, and it could not be loaded as a hub data set ({type(e).__name__}: "
            f"{str(e).splitlines()[0] if str(e) else 'no detail'})."
        ) from e
    yield from _dataset(loaded, source, split)


def _dataset(loaded: Any, name: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(loaded, dict):
        if split not in loaded:
            raise UserError(f"{name}: no split {split!r}.{nearest(split, loaded)}")
        loaded = loaded[split]
    for number, record in enumerate(loaded.with_format(None)):
        yield f"{name}, row {number}", dict(record)


# ---------------------------------------------------------------- rows


class _Reader:
    """Turns one record into an Example, with the columns chosen once from the first record."""

    def __init__(self, source: str, columns: Columns, present: list[str]) -> None:
        self.columns = columns
        for field, name in vars(columns).items():
            if field != "split" and name is not None and name not in present:
                raise UserError(f"{source}: no column {name!r}.{nearest(name, present)}")
        self.shape = self._shape(source, present)
        self.id = columns.id or ("id" if "id" in present else None)
        self.label = columns.label or ("label" if "label" in present else None)
        self.has_input = self.shape[1:] == ("output",) and "input" in present

    def _shape(self, source: str, present: Sequence[str]) -> tuple[str, ...]:
        c = self.columns
        if c.messages:
            return (c.messages,)
        if c.text:
            return (c.text,)
        if c.prompt and c.response:
            return (c.prompt, c.response)
        for prompt, *response in SHAPES:
            shape = (c.prompt or prompt, *([c.response or response[0]] if response else []))
            if all(name in present for name in shape) and (response or not (c.prompt or c.response)):
                return shape
        wanted = " · ".join("+".join(s) for s in SHAPES)
        raise UserError(
            f"{source}: no known columns among {', '.join(map(repr, present))}; expected {wanted}, "
            "or name yours with --prompt-column and --response-column (or --text-column, --messages-column)."
        )

    def read(self, where: str, row: int, record: dict[str, Any]) -> Example:
        for name in (*self.shape, *([self.id] if self.id else [])):
            if _absent(record.get(name)):
                raise UserError(f"{where}: the column {name!r} is missing or empty.")
        id_ = record[self.id] if self.id else row
        if isinstance(id_, bool) or not isinstance(id_, (int, str)) or (isinstance(id_, int) and abs(id_) >= 2**63):
            raise UserError(f"{where}: the id must be a whole number (64 bits) or a string, found {id_!r}.")
        label = record.get(self.label) if self.label else None
        against = record.get("against")
        base = Example(
            id=id_,
            row=row,
            label=None if _absent(label) or label == "" else str(label),
            against=None if _absent(against) or str(against).strip() == "" else str(against),
        )
        check_text(where, record)
        if len(self.shape) == 2:
            return self._pair(base, where, record)
        value = record[self.shape[0]]
        if self.shape[0] == (self.columns.messages or "messages"):
            return replace(base, messages=_messages(_parsed(value), where, self.shape[0]))
        if not isinstance(value, str):
            raise UserError(f"{where}: the column {self.shape[0]!r} must hold text, found {value!r:.60}.")
        if not value.strip():
            raise UserError(f"{where}: the text is empty.")
        return replace(base, text=value)

    def _pair(self, base: Example, where: str, record: dict[str, Any]) -> Example:
        prompt, response = (record[name] for name in self.shape)
        if self.has_input and not _absent(record.get("input")) and record["input"]:
            prompt = f"{prompt}\n\n{record['input']}"
        before = _messages(prompt, where, self.shape[0], role="user")
        after = _messages(response, where, self.shape[1], role="assistant")
        return replace(base, messages=before + after, given=len(before))


def _absent(value: Any) -> bool:
    """None, or the NaN with which tables mark an empty cell."""
    return value is None or (isinstance(value, float) and value != value)


def _parsed(value: Any) -> Any:
    """Messages kept as JSON text, as CSV must keep them."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def check_text(where: str, record: dict[str, Any]) -> None:
    """Raise UserError for half a surrogate pair, which no file or tokenizer can hold."""
    try:
        json.dumps(record, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError as e:
        raise UserError(
            f"{where}: the text holds half of a surrogate pair (\\ud800 or the like). Mend the text."
        ) from e


def _messages(value: Any, where: str, column: str, role: str | None = None) -> tuple[Message, ...]:
    """A list of {role, content}, or (with `role`) a plain string as one message."""
    if isinstance(value, str) and role is not None:
        return ({"role": role, "content": value},)
    if not isinstance(value, (list, tuple)) or not value:
        what = "text or a non-empty list of messages" if role else "a non-empty list of messages"
        raise UserError(f"{where}: the column {column!r} must hold {what}, found {value!r:.60}.")
    for m in value:
        if not isinstance(m, dict) or not isinstance(m.get("role"), str) or not isinstance(m.get("content"), str):
            raise UserError(f"{where}: every message in {column!r} needs a text `role` and `content`, found {m!r:.80}.")
    return tuple({"role": m["role"], "content": m["content"]} for m in value)
