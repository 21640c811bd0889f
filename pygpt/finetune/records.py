"""Labelled texts and instructions: read, checked, balanced and split."""

from __future__ import annotations

import csv
import io
import json
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pygpt.data import read_rows, read_text
from pygpt.errors import DataError

SPLITS = ("train", "validation", "test")


class Labelled(NamedTuple):
    """A text and its class; texts of one `group` never stand on both sides of a split."""

    text: str
    label: str
    group: str = ""


class Instruction(NamedTuple):
    """A task, its optional input and the wanted answer; `group` as in `Labelled`."""

    instruction: str
    input: str
    output: str
    group: str = ""


class Preference(NamedTuple):
    """A task with a better and a worse answer; `group` as in `Labelled`."""

    instruction: str
    input: str
    chosen: str
    rejected: str
    group: str = ""


Row = TypeVar("Row", bound=Labelled | Instruction | Preference)
Records = Iterable[Mapping[str, Any] | Sequence[Any]]
Source = str | Path | Records


def read_labelled(source: Source) -> list[Labelled]:
    """Labelled texts from a file, a folder or records already in memory.

    Files: csv, tsv (unquoted), json (a list) or jsonl with the fields `text`, `label` and, where
    wanted, `group`; or two columns without a header, of which the one with fewer different values
    is the label. A folder holds one folder of .txt files per label. Records are mappings or tuples.
    Raises DataError naming the file and line.
    """
    if isinstance(source, (str, Path)) and Path(source).is_dir():
        return _checked(source, _labelled_folder(Path(source)))
    return _checked(source, (_labelled(*row) for row in _rows(source, ("text", "label", "group"))))


def read_instructions(source: Source) -> list[Instruction]:
    """Instructions from a json, jsonl, csv or tsv file or from records in memory.

    Fields: `instruction`, `output` and, where wanted, `input` and `group`; others are ignored.
    Raises DataError naming the file and line.
    """
    fields = ("instruction", "input", "output", "group")
    return _checked(source, (_instruction(*row) for row in _rows(source, fields)))


def read_preferences(source: Source) -> list[Preference]:
    """Preferences, from what `read_instructions` takes, with `chosen` and `rejected` for `output`.

    Rows whose two answers are equal are left out, with a warning that counts them.
    """
    fields = ("instruction", "input", "chosen", "rejected", "group")
    rows = [_preference(*row) for row in _rows(source, fields)]
    kept = [row for row in rows if row.chosen != row.rejected]
    if len(kept) < len(rows):
        first = 1 + next(i for i, row in enumerate(rows) if row.chosen == row.rejected)
        warnings.warn(
            f"{_name(source)}: in {len(rows) - len(kept)} of {len(rows)} rows (the first is number "
            f"{first}) 'chosen' and 'rejected' are equal; they are left out",
            stacklevel=2,
        )
    return _checked(source, kept)


def write(rows: Sequence[Row], path: str | Path) -> None:
    """One JSON object a line, as the readers take it."""
    lines = [json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in rows]
    Path(path).write_text("".join(lines), encoding="utf-8")


def _checked(source: Source, rows: Iterable[Row]) -> list[Row]:
    result = list(rows)
    if not result:
        raise DataError(f"{_name(source)} holds no examples")
    return result


def _name(source: Source) -> str:
    return str(source) if isinstance(source, (str, Path)) else "the data"


def _labelled(where: str, row: Mapping[str, Any]) -> Labelled:
    if isinstance(row.get("label"), int):  # a class given by its number
        row = {**row, "label": str(row["label"])}
    label = _field(where, row, "label").strip()
    if not label:
        raise DataError(f"{where}: the label is empty")
    return Labelled(_field(where, row, "text"), label, str(row.get("group") or ""))


def _instruction(where: str, row: Mapping[str, Any]) -> Instruction:
    instruction, output = _filled(where, row, "instruction", "output")
    return Instruction(instruction, _input(where, row), output, str(row.get("group") or ""))


def _preference(where: str, row: Mapping[str, Any]) -> Preference:
    instruction, chosen, rejected = _filled(where, row, "instruction", "chosen", "rejected")
    group = str(row.get("group") or "")
    return Preference(instruction, _input(where, row), chosen, rejected, group)


def _filled(where: str, row: Mapping[str, Any], *keys: str) -> list[str]:
    values = [_field(where, row, key) for key in keys]
    for key, value in zip(keys, values, strict=True):
        if not value.strip():
            raise DataError(f"{where}: {key!r} is empty")
    return values


def _input(where: str, row: Mapping[str, Any]) -> str:
    return "" if row.get("input") is None else _field(where, row, "input")


def _field(where: str, row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if value is None:
        raise DataError(f"{where} has no {key!r}; it has {', '.join(map(repr, row)) or 'nothing'}")
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} must be a string, got {value!r:.40}")
    return value


def _labelled_folder(folder: Path) -> Iterator[Labelled]:
    for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
        for path in sorted(inner.glob("*.txt")):
            yield Labelled(read_text(path), inner.name)


def _rows(source: Source, fields: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where, fields) of each record; `fields` names the members of a tuple and of a bare table."""
    if not isinstance(source, (str, Path)):
        for number, record in enumerate(source, 1):
            if isinstance(record, Mapping):
                yield f"record {number}", record
            elif isinstance(record, Sequence) and not isinstance(record, str):
                yield f"record {number}", dict(zip(fields, record, strict=False))
            else:
                raise DataError(f"record {number} must be a mapping or a tuple, got {record!r:.40}")
        return
    path = Path(source)
    suffix = path.suffix.lower()
    if suffix in (".json", ".jsonl", ".ndjson"):
        for where, row in read_rows(path):
            if not isinstance(row, Mapping):
                raise DataError(f"{where} must be an object, got {row!r:.40}")
            yield where, row
        return
    content = read_text(path)
    if suffix == ".csv":
        yield from _table_rows(path, content, ",", fields)
    elif suffix == ".tsv" or "\t" in content.partition("\n")[0]:
        yield from _table_rows(path, content, "\t", fields)
    else:
        raise DataError(f"{path}: cannot tell its format; name it .csv, .tsv, .json or .jsonl")


def _table_rows(
    path: Path, content: str, delimiter: str, fields: Sequence[str]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    # Tab-separated corpora are unquoted: a message may begin with a lone quotation mark.
    lines = io.StringIO(content, newline="")
    if delimiter == ",":
        reader = csv.reader(lines, strict=True)
    else:
        reader = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE)
    rows: list[tuple[str, list[str]]] = []
    try:
        for cells in reader:
            if cells:
                rows.append((f"{path}, line {reader.line_num}", cells))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from None
    if not rows:
        return
    if set(rows[0][1]) & set(fields):
        header = rows.pop(0)[1]
    elif len(rows[0][1]) == 2 and "label" in fields:
        header = _bare_header(path, rows)
    else:
        raise DataError(f"{path} needs a first line that names its columns: {', '.join(fields)}")
    for where, cells in rows:
        if len(cells) != len(header):
            raise DataError(f"{where} has {len(cells)} columns, expected {len(header)}")
        yield where, dict(zip(header, cells, strict=True))


def _bare_header(path: Path, rows: Sequence[tuple[str, list[str]]]) -> list[str]:
    first, second = ({cells[i] for _, cells in rows if len(cells) == 2} for i in (0, 1))
    if len(first) == len(second):
        raise DataError(
            f"{path}: cannot tell which column is the label; begin with a line 'label' and 'text'"
        )
    header = ["label", "text"] if len(first) < len(second) else ["text", "label"]
    column = header.index("label")
    if [cells[column] for _, cells in rows if len(cells) == 2].count(rows[0][1][column]) == 1:
        raise DataError(f"{rows[0][0]} looks like a header; name the columns 'text' and 'label'")
    return header


# --- splits ---------------------------------------------------------------------------------------


def balance(rows: Sequence[Labelled], seed: int = 0) -> list[Labelled]:
    """As many texts of every class as the rarest has, drawn by `seed`, in their old order."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    fewest = min(Counter(row.label for row in rows).values())
    kept: dict[str, list[int]] = {}
    for i in order:
        kept.setdefault(rows[i].label, []).append(i)
    return [rows[i] for i in sorted(i for members in kept.values() for i in members[:fewest])]


def split(
    rows: Sequence[Row], fractions: tuple[float, float, float], seed: int = 0
) -> dict[str, list[Row]]:
    """Train, validation and test parts: stratified by class, groups and equal texts kept together.

    The parts' sizes are the fractions of the rows rounded down, the rest is the test; groups that
    do not fit make them approximate. The same rows and seed give the same parts.
    """
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"split must be three fractions that sum to 1, got {fractions!r}")
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.group,) if row.group else ("", *_content(row)), []).append(row)
    rng = random.Random(seed)
    classes: dict[str, list[list[Row]]] = {}
    for group in groups.values():
        classes.setdefault(getattr(group[0], "label", ""), []).append(group)
    # Interleaving the shuffled classes evenly makes every stretch of the order a fair sample.
    # The first of each class comes first, so that none is missing from the training part.
    order: list[tuple[float, list[Row]]] = []
    for members in classes.values():
        rng.shuffle(members)
        order += [(i and (i + rng.random()) / len(members), g) for i, g in enumerate(members)]
    order.sort(key=lambda entry: entry[0])

    sizes = [int(len(rows) * fraction + 1e-6) for fraction in fractions[:2]]
    room = dict(zip(SPLITS, [*sizes, len(rows) - sum(sizes)], strict=True))
    result: dict[str, list[Row]] = {name: [] for name in SPLITS}
    for _, group in order:
        name = next((n for n in SPLITS if room[n] >= len(group)), max(room, key=room.__getitem__))
        room[name] -= len(group)
        result[name] += group
    return result


def _content(row: Labelled | Instruction | Preference) -> tuple[str, ...]:
    return (row.text,) if isinstance(row, Labelled) else (row.instruction, row.input)


def load_parts(
    data: Source | Mapping[str, Source],
    read: Callable[[Source], list[Row]],
    fractions: tuple[float, float, float],
    seed: int,
    prepare: Callable[[list[Row]], list[Row]] = lambda rows: rows,
) -> dict[str, list[Row]]:
    """`data` split by `fractions`, or already split: a mapping with train, validation and test."""
    if isinstance(data, Mapping):
        unknown = set(data) - set(SPLITS)
        if unknown or not {"train", "validation"} <= set(data):
            raise ValueError(f"splits must be train, validation and perhaps test, got {list(data)}")
        result = {name: read(data[name]) if name in data else [] for name in SPLITS}
        result["train"] = prepare(result["train"])
    else:
        result = split(prepare(read(data)), fractions, seed)
    for name in ("train", "validation"):
        if not result[name]:
            raise DataError(f"the {name} split is empty: {_name(data)} holds too few examples")
    return result
