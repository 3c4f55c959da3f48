"""Rows of one's own data as CSV or TSV: a header with the fields' names, then one row a line.

    image,question,answer
    001.jpg,what is on the desk?,a red mug

Lists are written as JSON: ``answers`` as ``["red", "dark red"]``, ``boxes`` as ``[[10, 20, 90, 80]]``.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, BinaryIO

from pipelines import storage
from pipelines.data.sources.base import (
    ENTRIES_PER_UNIT,
    Changes,
    ReadResult,
    Rejected,
    SourceInput,
    SourceUnit,
    find_input,
    shorten,
)
from pipelines.data.sources.drafts import read_drafts
from pipelines.data.sources.images import BESIDE, ImageFolder, find_image_folder
from pipelines.data.sources.json_entries import plain_name
from pipelines.data.sources.own_rows import CONVERSATIONS, KNOWN_BY, read_own_row
from pipelines.settings import SettingsError
from tinygptv.json_object import JsonObject

if TYPE_CHECKING:
    from _csv import Reader

DELIMITED = (".csv", ".tsv")
"""Endings of the files' names."""

DelimitedRow = tuple[str, JsonObject | Rejected]
"""Key (``line 7``) and fields of a row, or why it cannot be read."""

_LONGEST_FIELD = 16 << 20
_HEAD_BYTES = 4096
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True)
class TableSlice:
    """What a slice of a table needs besides its bytes.

    Attributes:
        folder: of the images.
        names: of the columns.
        delimiter: between fields.
    """

    folder: storage.Location
    names: tuple[str, ...]
    delimiter: str


@dataclass(frozen=True)
class DelimitedReader:
    """CSV and TSV files. Images are named relative to the file."""

    def plan(self, source: SourceInput) -> Iterator[SourceUnit]:
        """One unit per ``ENTRIES_PER_UNIT`` rows; a file that is compressed or UTF-16 is one, as is a small one."""
        for file in find_input(source, "*.csv", "*.tsv"):
            if next(read_delimited(file.location), None) is None:
                raise SettingsError(f"{file.location} holds no rows: is it the right file?")
            folder = find_image_folder(source, file.location, BESIDE)
            unit = SourceUnit.of_file(source, file, folder)
            slices = list(_slices(unit, folder))
            yield from slices if len(slices) > 1 else [unit]

    def read(self, unit: SourceUnit, changes: Changes | None = None) -> Iterator[ReadResult]:
        """Rows of a file, or of a slice; a broken one is set apart alone."""
        part = unit.details if isinstance(unit.details, TableSlice) else None
        images = ImageFolder(part.folder if part else unit.details)
        for key, fields in _read_slice(unit, part) if part else read_delimited(unit.file):
            if isinstance(fields, Rejected):
                yield fields
            else:
                yield from read_drafts(unit, key, partial(read_own_row, unit, fields), images, changes)


def read_delimited(location: storage.Location) -> Iterator[DelimitedRow]:
    """Key (``line 7``) and fields of every row; empty fields are left out.

    Raises:
        SettingsError: there is no header, or it has no usable names.
    """
    with storage.open_unpacked(location) as stream:
        try:
            reader, names = _behind_header(location, _lines(stream))
            yield from _rows(location, reader, names)
        except storage.DamagedFileError as error:
            yield "", Rejected("", location.name, f"the compressed data is damaged or cut off: {error}")


def _behind_header(location: storage.Location, lines: Iterator[str]) -> tuple[Reader, tuple[str, ...]]:
    """A reader of the rows, and the columns' names."""
    before = []  # blank lines, and the header's first
    for line in lines:
        before.append(line)
        if line.strip("\r\n"):
            break
    header = "".join(before).strip("\r\n")
    reader = _reader(itertools.chain(before, lines), _delimiter(location.name, header))
    try:
        names = tuple(name.strip() for name in next((values for values in reader if values), []))
    except csv.Error as error:
        raise SettingsError(f"{location}: the header cannot be read: {error}.") from error
    if len(names) != len(set(names)) or not all(names[1:]) or names == ("",):  # pandas gives its index no name
        raise SettingsError(f"{location}: the first line must name every column once; it is {header[:100]!r}.")
    return reader, names


def _reader(lines: Iterator[str], delimiter: str) -> Reader:
    csv.field_size_limit(_LONGEST_FIELD)
    return csv.reader(lines, delimiter=delimiter, strict=True)


def _rows(location: storage.Location, reader: Reader, names: Sequence[str], lines: int = 0) -> Iterator[DelimitedRow]:
    """Rows of a table behind so many lines."""
    while True:
        key = f"line {lines + reader.line_num + 1}"
        try:
            values = next(reader, None)
        except csv.Error as error:
            yield key, Rejected(key, location.name, f"no valid row: {error}")
            continue
        if values is None:
            break
        if values:
            yield key, _fields(key, location.name, names, values)


def _slices(unit: SourceUnit, folder: storage.Location) -> Iterator[SourceUnit]:
    """Slices of a file, none where it can only be read from its start. Rows end where the reader has taken whole lines:
    a quoted field may hold line breaks."""
    position = 0

    def counted(lines: Iterator[str]) -> Iterator[str]:
        nonlocal position
        for line in lines:
            position += len(line)
            yield line

    if storage.compression_of(unit.file):
        return
    with storage.open_file(unit.file) as stream:
        head = stream.read(len(codecs.BOM_UTF8))
        if head.startswith(_UTF16_MARKS):
            return
        position = len(head) if head == codecs.BOM_UTF8 else 0
        stream.seek(position)
        reader, names = _behind_header(unit.file, _lines(stream, "utf-8"))
        part = TableSlice(folder, names, reader.dialect.delimiter)
        stream.seek(position)
        # Latin-1 has a character for each byte, and all that structures a table is ASCII.
        reader, _ = _behind_header(unit.file, counted(_lines(stream, "latin-1")))
        start, first, num_rows = position, reader.line_num, 0
        while True:
            try:
                is_end = next(reader, None) is None
            except csv.Error:
                is_end = False
            num_rows += not is_end
            if num_rows and (is_end or num_rows == ENTRIES_PER_UNIT):
                yield replace(unit, start=start, stop=position, first=first, details=part)
                start, first, num_rows = position, reader.line_num, 0
            if is_end:
                return


def _read_slice(unit: SourceUnit, part: TableSlice) -> Iterator[DelimitedRow]:
    with storage.open_file(unit.file) as stream:
        stream.seek(unit.start)
        data = stream.read(unit.stop - unit.start)
    reader = _reader(_lines(io.BytesIO(data), "utf-8"), part.delimiter)
    yield from _rows(unit.file, reader, part.names, unit.first)


def _lines(stream: BinaryIO, encoding: str = "") -> Iterator[str]:
    r"""Lines with their ends (\n, \r\n or \r). Without an encoding they are UTF-8, or UTF-16 by its byte order mark, as
    spreadsheets save them. Odd bytes cost their row later.

    Raises:
        DamagedFileError: the compressed data is damaged; whole lines before that come first.
    """
    chunk = stream.read(storage.COPY_BYTES)
    encoding = encoding or ("utf-16" if chunk.startswith(_UTF16_MARKS) else "utf-8-sig")
    errors = "replace" if encoding == "utf-16" else "surrogateescape"
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(encoding)(errors), translate=False)
    rest = ""
    while True:
        # Not splitlines(): a field may hold form feeds and Unicode's separators, which end no row.
        lines = io.StringIO(rest + decoder.decode(chunk, final=not chunk), newline="").readlines()
        rest = lines.pop() if lines and chunk and not lines[-1].endswith(("\r", "\n")) else ""
        yield from lines
        if not chunk:
            return
        chunk = stream.read(storage.COPY_BYTES)


def _first_line(text: str) -> str:
    return re.split(r"[\r\n]", text.lstrip("\r\n"), maxsplit=1)[0]


def is_delimited(location: storage.Location) -> bool:
    """Whether a file begins with a header of CSV or TSV, whatever its name is."""
    head = b""
    with storage.open_unpacked(location) as stream, suppress(storage.DamagedFileError):
        head = stream.read(_HEAD_BYTES)
    header = _first_line(head.decode("utf-8-sig", errors="replace")).strip()
    if header[:1] in ("", "{", "["):
        return False
    names = {name.strip().strip('"') for name in header.split(_delimiter(location.name, header))}
    return len(names) > 1 and bool(names & set(KNOWN_BY))


def _delimiter(name: str, header: str) -> str:
    if plain_name(name).endswith(".tsv") or "\t" in header:
        return "\t"
    return ";" if ";" in header and "," not in header else ","


def _fields(key: str, file: str, names: Sequence[str], values: list[str]) -> JsonObject | Rejected:
    if len(values) != len(names):
        reason = f"{len(values)} fields, and the header names {len(names)}; fields with the separator need quotes"
        return Rejected(key, file, reason)
    fields: JsonObject = {}
    for name, value in zip(names, values, strict=True):
        if not value or not name:
            continue
        if not value.isascii() and any("\udc80" <= character <= "\udcff" for character in value):
            return Rejected(key, file, f"{shorten(name)} is not UTF-8 text: save the file as UTF-8")
        try:
            fields[name] = json.loads(value) if name in _LISTS else value
        except (ValueError, RecursionError):
            return Rejected(key, file, f"{name} is no JSON list: {value[:60]!r}")
    return fields


_LISTS = ("answers", "boxes", "turns", *CONVERSATIONS)
