"""Documents from files: plain text, jsonl, json, csv and tsv, and folders of them, in UTF-8.

A byte order mark is dropped and line ends become "\\n". What cannot be text is refused with the
place where that was seen.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pygpt.errors import DataError

_SUFFIXES = (".txt", ".md", ".rst", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")

Paths = str | Path | Iterable[str | Path]


def list_files(paths: Paths) -> list[Path]:
    """The files that `paths` name, in order; a folder stands for all readable files below it."""
    files: list[Path] = []
    for path in [paths] if isinstance(paths, str | Path) else paths:
        path = Path(path)
        if path.is_dir():
            found = sorted(
                f for f in path.rglob("*") if f.suffix.lower() in _SUFFIXES and f.is_file()
            )
            if not found:
                raise DataError(f"{path} holds no file of type {', '.join(_SUFFIXES)}")
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise FileNotFoundError(f"no file or folder {path}")
    if not files:
        raise ValueError("no files were given")
    return files


def read_text(path: Path) -> str:
    """One file as text; DataError where it is empty, binary, or not UTF-8."""
    if path.is_dir():
        raise DataError(f"{path} is a folder, and a file was expected")
    raw = path.read_bytes()
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path} is UTF-16; convert it to UTF-8")
    if (zero := raw.find(0)) >= 0:
        raise DataError(f"{path} is binary, not text: a zero byte at offset {zero}")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}"
        ) from None
    if not text.strip():
        raise DataError(f"{path} is empty")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a jsonl, json, csv or tsv file, each with its place, for messages."""
    suffix, text = path.suffix.lower(), read_text(path)
    if suffix in (".jsonl", ".ndjson"):
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"{path}, line {number}", _parse_json(line, f"{path}, line {number}")
    elif suffix == ".json":
        rows = _parse_json(text, str(path))
        if not isinstance(rows, list):
            raise DataError(f"{path} must hold a list of entries, not {type(rows).__name__}")
        yield from ((f"{path}, entry {number}", row) for number, row in enumerate(rows, 1))
    else:
        reader = csv.DictReader(
            io.StringIO(text), dialect="excel-tab" if suffix == ".tsv" else "excel", strict=True
        )
        try:
            for row in reader:
                yield f"{path}, line {reader.line_num}", row
        except csv.Error as error:
            raise DataError(f"{path}, after line {reader.line_num}: {error}") from None


def read_documents(path: Path, text_key: str = "text") -> Iterator[str]:
    """The documents of a file: each row of a jsonl, json, csv or tsv file, else the whole."""
    if path.suffix.lower() not in _SUFFIXES[3:]:
        yield read_text(path)
        return
    for place, row in read_rows(path):
        text = row.get(text_key) if isinstance(row, dict) else row
        if text is None:
            keys = ", ".join(map(repr, row)) if isinstance(row, dict) else "null"
            raise DataError(f"{place}: no text under {text_key!r}; there is {keys}")
        if not isinstance(text, str):
            raise DataError(f"{place}: the text must be a string, not {type(text).__name__}")
        if text.strip():
            yield text


def _parse_json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{place}: not JSON: {error.msg} (line {error.lineno}, column {error.colno})"
        ) from None
