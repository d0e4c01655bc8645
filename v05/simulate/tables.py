"""Reads the rows of a log as a stream. The first bytes of the file tell CSV (with any delimiter), JSON lines and parquet apart."""

from __future__ import annotations

import codecs
import csv
import re
from collections.abc import Collection, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from v05.files import read_objects

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")  # files with these suffixes are read from a directory
GROWING = ("samples.jsonl", "traces.jsonl")  # v05 eval and prime-rl append to these, so the last line may be incomplete
DELIMITERS = ",;\t|:^ "  # the space comes last because column names may contain spaces
LONGEST_FIELD = 1 << 24  # characters; a question may be a long text
LONGEST_QUOTE = 60  # characters of a row or a name in a message
MOST_NAMES = 40  # column names in a message
ROWS_AT_ONCE = 512  # rows of a parquet file per batch
PARQUET = b"PAR1"
BINARY = (b"PK\x03\x04", b"\x1f\x8b", b"\x80", b"\x28\xb5\x2f\xfd")  # zip (torch and Excel files), gzip, pickle, zstd


class NotANumberError(ValueError):
    """A value of a row is not a number. Callers add the column to the message."""


class Row(NamedTuple):
    """A row of a file. `number` counts lines, or rows in parquet. The names in `values` are as `column` returns them."""

    path: Path
    number: int
    values: dict[str, Any]

    @property
    def place(self) -> str:
        return f"{self.path}, {'row' if self.path.suffix == '.parquet' else 'line'} {self.number}"

    @property
    def quote(self) -> str:
        """The row's values, shortened for a message."""
        return ",".join(str(value)[:LONGEST_QUOTE] for value in self.values.values())[:LONGEST_QUOTE]


def read_rows(path: Path, known: Collection[str]) -> Iterator[Row]:
    """The rows of a file. The first row has the number 0 and names the columns; its values are None.

    In JSON lines the columns are those of the first object.

    Args:
        path: the file.
        known: known column names. The delimiter of a CSV file is the one that finds most of them in the header.

    Raises:
        ValueError: the file is binary, UTF-16 or damaged. The message names the line if it is known.
        ImportError: the file is parquet, and pyarrow is not installed.
    """
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(PARQUET):
        return _parquet(path)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{path} is UTF-16; convert the file to UTF-8")
    if start.startswith(BINARY):
        raise ValueError(f"{path} is compressed or a pickle, which v05 does not open; write its rows as CSV, JSON lines or parquet")
    if b"\0" in start:
        raise ValueError(f"{path} is not text, or UTF-16 without a byte order mark; convert the file to UTF-8")
    first = start.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if first == b"[":
        raise ValueError(f"{path} holds a JSON array; write one object per line, for example with: jq -c '.[]' {path.name}")
    return _json_lines(path) if first == b"{" else _csv(path, known)


def column(name: str) -> str:
    """A column's name in lower case without outer spaces, so that case and spaces do not matter."""
    return name.strip().casefold()


def listed(names: Iterable[str]) -> str:
    """Column names for a message, shortened and escaped because a file that is not a log may have anything as names."""
    return ", ".join(
        name if name.isprintable() and len(name) <= LONGEST_QUOTE else repr(name[:LONGEST_QUOTE])
        for name in islice(names, MOST_NAMES)
    )


def number(value: Any) -> float:
    """A value as a number. Text may have a decimal comma if it cannot be a thousands separator. Raises NotANumberError."""
    if isinstance(value, str):
        if re.fullmatch(r"[+-]?\d+,\d+", value) and not re.fullmatch(r"[+-]?[1-9]\d{0,2},\d{3}", value):
            value = value.replace(",", ".")
        value = {"true": 1, "false": 0}.get(value.casefold(), value)
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise NotANumberError(f"{value!r} is not a number") from None


def _json_lines(path: Path) -> Iterator[Row]:
    for index, (line, values) in enumerate(read_objects(path, growing=path.name in GROWING)):
        row = Row(path, line, {column(name): value for name, value in values.items()})
        if index == 0:
            yield _header(path, row.values)
        yield row


def _csv(path: Path, known: Collection[str]) -> Iterator[Row]:
    before = csv.field_size_limit(LONGEST_FIELD)
    line, delimiter, header = 0, None, ""
    reader: Any = None
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            for header in file:
                line += 1
                if told := re.fullmatch(r'"?sep=(.)"?', header.strip("\r\n")):  # Excel writes and reads this
                    delimiter = told[1]
                elif header.strip():
                    break
            reader = csv.reader(chain([header], file), delimiter=delimiter or _delimiter(header, known), skipinitialspace=True)
            names = [column(name) for name in next(reader, [])]
            if twice := sorted({name for name in names if names.count(name) > 1 and name in known}):
                raise ValueError(f"{path} has two columns {listed(twice)}; leave one out")
            places: dict[str, int] = {}
            for place, name in enumerate(names):
                places.setdefault(name, place)
            yield _header(path, names)
            for cells in reader:
                if cells:
                    values = {name: cells[place].strip() for name, place in places.items() if place < len(cells)}
                    yield Row(path, line - 1 + reader.line_num, values)
    except (csv.Error, UnicodeDecodeError) as error:
        near = max(1, line - 1 + (1 if reader is None else reader.line_num))
        raise ValueError(f"{path}, near line {near}: {error}; give a CSV file in UTF-8 with closed quotes") from None
    finally:
        csv.field_size_limit(before)


def _delimiter(header: str, known: Collection[str]) -> str:
    def columns(delimiter: str) -> int:
        names = next(csv.reader([header], delimiter=delimiter, skipinitialspace=True), [])
        return len({column(name) for name in names} & set(known))

    return max(DELIMITERS, key=columns)  # the first of several equally good ones


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError(f"{path}: parquet needs the package 'pyarrow'; install it with: pip install 'v05[parquet]'") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield _header(path, map(column, file.schema_arrow.names))
            row = 0
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE):
                for values in batch.to_pylist():
                    row += 1
                    yield Row(path, row, {column(name): value for name, value in values.items()})
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a whole parquet file ({error}); write it again or leave it out") from None


def _header(path: Path, names: Iterable[str]) -> Row:
    return Row(path, 0, dict.fromkeys(name for name in names if name))
