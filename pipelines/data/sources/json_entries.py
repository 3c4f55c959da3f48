r"""Entries of annotation files, whatever their form: what is in the file decides, not its name.

    list      [{..}, {..}]                            entries are numbered from 0
    member    {"info": .., "annotations": [{..}]}     entries of one list in an object
    members   {"id": {..}, "id": {..}}                an object's own members; their keys are the entries' keys
    lines     {..}\n{..}\n                            JSON lines; entries are called by the number of their line
    objects   {\n..\n}\n{\n..\n}                      entries over several lines each, without a list around them

Plain files are cut into slices that workers read on their own. Files that are compressed, or encoded as UTF-16 or
UTF-32, are read from their start, as one unit.
"""

from __future__ import annotations

import codecs
import json
import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, Literal, cast

from pipelines import storage
from pipelines.data.sources.base import ENTRIES_PER_UNIT, Rejected, SourceInput, SourceUnit, shorten
from pipelines.data.sources.json_items import Item, JsonDamage, iterate_items, iterate_objects, outline, split_items
from pipelines.data.sources.json_rows import first_value, is_container, is_row
from pipelines.settings import SettingsError

logger = logging.getLogger(__name__)

_HEAD_BYTES = 1 << 20
_LINE_CHUNK = 64 << 10
_LINE_ENDINGS = (".jsonl", ".ndjson", ".jsonlines")
_ENCODINGS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_LISTS = ("data", "annotations", "rows", "samples", "items", "examples", "entries", "questions", "train")
"""Names of the list of entries, where an object holds several lists."""

Kind = Literal["list", "member", "members", "lines", "objects"]


@dataclass(frozen=True)
class JsonForm:
    """The form of a file of entries.

    Attributes:
        kind: see the table on top.
        member: name of the list, for ``member``.
        is_packed: compressed, or not encoded as UTF-8: it can only be read from its start.
    """

    kind: Kind
    member: str = ""
    is_packed: bool = False


@dataclass(frozen=True)
class JsonDetails:
    """Fields of a slice, as a worker gets them.

    Attributes:
        form: of the file.
        extra: of the reader.
        damage: the file cannot be read from here on: the reason.
    """

    form: JsonForm
    extra: Any = None
    damage: str = ""


def detect_form(file: storage.FoundFile, member: str = "", row_fields: Collection[str] = ()) -> JsonForm:
    """Look at a file and tell how its entries are arranged.

    Args:
        file: the file.
        member: name of the list that holds the entries, where the data set's files are objects.
        row_fields: fields of an entry: an object that has one of them is an entry itself, not a container.

    Raises:
        SettingsError: it is no file of entries.
    """
    with open_entries(file.location) as stream:
        head, is_whole = _read_head(stream)
    is_packed = bool(storage.compression_of(file.location)) or _encoding_of(file.location) != ""
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if not text:
        raise SettingsError(f"{file.location} holds no entries: it is empty. Is it the right file?")
    if text[:1] == b"[":
        return JsonForm("list", is_packed=is_packed)
    if _is_lines(file.name, text, is_whole, row_fields):
        return JsonForm("lines", is_packed=is_packed)
    if text[:1] != b"{":
        raise SettingsError(
            f"{file.location} does not start as JSON with a list or an object of entries "
            f"but with {shorten(text[:20].decode('latin-1'))!r}; {_other_kind(text)}"
        )
    if is_row(first_value(text), row_fields):
        return JsonForm("objects", is_packed=is_packed)
    with open_entries(file.location) as stream:
        members = outline(stream)
    return replace(_form_of_object(file, members, member), is_packed=is_packed)


def _other_kind(text: bytes) -> str:
    """What a file may be that is no JSON."""
    if text[:1] == b"\0":
        return "it begins with a zero byte: is it UTF-16 without a byte order mark?"
    if text[257:262] == b"ustar" or text.startswith(b"PK\x03\x04"):
        return "it is an archive: unpack it, and give the unpacked file"
    return "is it the right file?"


def _read_head(stream: BinaryIO) -> tuple[bytes, bool]:
    """The first bytes of a file, and whether that is all of it; damaged compression ends it."""
    head = b""
    try:
        while len(head) <= _HEAD_BYTES and (chunk := stream.read(_HEAD_BYTES + 1 - len(head))):
            head += chunk
    except storage.DamagedFileError:
        return head, False
    return head[:_HEAD_BYTES], len(head) <= _HEAD_BYTES


def _is_lines(name: str, text: bytes, is_whole: bool, row_fields: Collection[str]) -> bool:
    """Whether the text is JSON lines. Text that begins with a list is none."""
    first, newline, rest = text.partition(b"\n")
    named_so = plain_name(name).endswith(_LINE_ENDINGS)
    value = _parsed(first) if newline or is_whole else None
    if isinstance(value, dict):
        if rest.strip() or not is_whole:
            return named_so or rest.lstrip()[:1] == b"{"
        return is_row(value, row_fields) or (named_so and not is_container(value))
    if not named_so:
        return False
    opened = first.rstrip()[-1:] in (b"{", b"[", b",")  # an object written over several lines
    return not (text[:1] == b"{" and newline and opened)


def plain_name(name: str) -> str:
    """A file's name in small letters, without the ending of its compression."""
    name = name.lower()
    for ending in (".gz", ".bz2", ".zst", ".xz", ".lz4"):
        name = name.removesuffix(ending)
    return name


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _form_of_object(file: storage.FoundFile, members: dict[str, str], member: str) -> JsonForm:
    lists = [name for name, kind in members.items() if kind == "list"]
    if member and (member in lists or not lists):
        if member not in members and members:
            raise SettingsError(
                f"{file.location} holds no entries in {member!r}: its members are "
                f"{shorten(', '.join(members))}. Is it the right file?"
            )
        return JsonForm("member", member)
    if lists:
        chosen = next((name for name in _LISTS if name in lists), lists[0] if len(lists) == 1 else "")
        if not chosen:
            raise SettingsError(
                f"{file.location} holds several lists ({shorten(', '.join(lists))}): write the one that is meant into "
                "a file of its own."
            )
        if len(lists) > 1:
            logger.warning("%s: entries are read from %r alone, of %s", file.location, chosen, ", ".join(lists))
        return JsonForm("member", chosen)
    if any(kind == "object" for kind in members.values()):
        return JsonForm("members")
    if not members:
        return JsonForm("members")  # damaged or empty: reported when it is planned
    raise SettingsError(
        f"{file.location} holds no entries: its members are {shorten(', '.join(members))}. Is it the right file?"
    )


def plan_entries(
    source: SourceInput,
    file: storage.FoundFile,
    form: JsonForm,
    extra: Any = None,
    *,
    about: Callable[[list[Item]], Any] | None = None,
    entries_per_unit: int = ENTRIES_PER_UNIT,
) -> Iterator[SourceUnit]:
    """Slices of a file of entries.

    Args:
        source: the ingest's input.
        file: the file.
        form: from ``detect_form``.
        extra: what the reader needs besides.
        about: makes ``extra`` from the entries of a slice; their strings are read as Latin-1.
        entries_per_unit: most entries of a slice.

    Raises:
        SettingsError: the file holds no entries.
    """
    if form.is_packed or form.kind == "lines":
        details = JsonDetails(form, about(_all_items(file, form)) if about else extra)
        unit = SourceUnit.of_file(source, file, details)
        yield from [unit] if form.is_packed else _plan_lines(unit, entries_per_unit)
        return
    first, damage = 0, ""
    waiting: list[Item] = []
    with open_entries(file.location) as stream:
        items = _iterate(stream, form)
        while True:
            try:
                item = next(items, None)
            except JsonDamage as error:
                item, damage = None, str(error)
            is_full = len(waiting) == entries_per_unit
            if waiting and (item is None or is_full or item.part != waiting[0].part):  # a slice is within one list
                details = JsonDetails(form, about(waiting) if about else extra)
                unit = SourceUnit.of_file(source, file, details)
                yield replace(unit, start=waiting[0].start, stop=waiting[-1].stop, first=first)
                first += len(waiting)
                waiting = []
            if item is None:
                break
            waiting.append(item)
    if first == 0:
        where = f" in {form.member!r}" if form.member else ""
        raise SettingsError(f"{file.location} holds no entries{where}: {damage or 'is it the right file?'}")
    if damage:
        yield SourceUnit.of_file(source, file, JsonDetails(form, about([]) if about else extra, damage))


def _iterate(stream: BinaryIO, form: JsonForm, *, keep_data: bool = False) -> Iterator[Item]:
    if form.kind == "objects":
        return iterate_objects(stream, keep_data=keep_data)
    return iterate_items(stream, form.member, keep_data=keep_data)


def _all_items(file: storage.FoundFile, form: JsonForm) -> list[Item]:
    found: list[Item] = []
    try:
        with open_entries(file.location) as stream:
            if form.kind == "lines":
                found += (Item(0, 0, 0, None, _parsed(line)) for line in _lines(stream))
            else:
                found += _iterate(stream, form)
    except (JsonDamage, storage.DamagedFileError):
        pass  # reported when the entries are read
    return found


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    parts: list[bytes] = []  # of a line that spans chunks; joined once, since it may hold an image
    while chunk := stream.read(_LINE_CHUNK):
        *lines, rest = chunk.split(b"\n")
        for line in lines:
            yield b"".join([*parts, line])
            parts = []
        parts.append(rest)
    if last := b"".join(parts):
        yield last


def _plan_lines(unit: SourceUnit, entries_per_unit: int) -> Iterator[SourceUnit]:
    start = position = lines = 0
    with open_entries(unit.file) as stream:
        while chunk := stream.read(storage.COPY_BYTES):
            end = -1
            while (end := chunk.find(b"\n", end + 1)) >= 0:
                lines += 1
                if lines % entries_per_unit == 0:
                    yield replace(unit, start=start, stop=position + end + 1, first=lines - entries_per_unit)
                    start = position + end + 1
            position += len(chunk)
    if position > start:
        yield replace(unit, start=start, stop=position, first=lines - lines % entries_per_unit)


def read_entries(unit: SourceUnit) -> Iterator[tuple[str, Any]]:
    """Keys and entries of a slice; a ``Rejected`` for what cannot be read."""
    details: JsonDetails = unit.details
    if details.damage:
        yield "", Rejected("", unit.shard, details.damage)
    elif details.form.is_packed:
        yield from _read_packed(unit, details.form)
    else:
        with storage.open_file(unit.file) as file:
            file.seek(unit.start)
            data = file.read(unit.stop - unit.start)
        if details.form.kind == "lines":
            yield from _decode_lines(unit, data.split(b"\n"), unit.first + 1)
        else:
            items = split_items(data, unit.start, details.form.kind)
            start = unit.start
            yield from _decode_items(unit, items, lambda item: data[item.value_start - start : item.stop - start])


def _read_packed(unit: SourceUnit, form: JsonForm) -> Iterator[tuple[str, Any]]:
    """All entries of a file that can only be read from its start; what comes before damage is kept."""
    try:
        with open_entries(unit.file) as stream:
            if form.kind == "lines":
                yield from _decode_lines(unit, _lines(stream), 1)
            else:
                items = _iterate(stream, form, keep_data=True)
                yield from _decode_items(unit, items, lambda item: item.data)
    except JsonDamage as error:
        yield "", Rejected("", unit.shard, str(error))
    except storage.DamagedFileError as error:
        yield "", Rejected("", unit.shard, f"the compressed data is damaged or cut off: {error}")


def _decode_items(
    unit: SourceUnit, items: Iterator[Item], data_of: Callable[[Item], bytes]
) -> Iterator[tuple[str, Any]]:
    for number, item in enumerate(items, start=unit.first):
        key = item.key if item.key is not None else str(number)
        yield key, _decode(unit, key, data_of(item), f"the entry (from byte {item.value_start})")


def _decode_lines(unit: SourceUnit, lines: Iterable[bytes], first: int) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, start=first):
        text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if text.strip():
            key = f"line {number}"
            yield key, _decode(unit, key, text, "the line")


def _decode(unit: SourceUnit, key: str, data: bytes, what: str) -> Any:
    try:
        return json.loads(data.decode("utf-8"), strict=False)
    except UnicodeDecodeError as error:
        return Rejected(key, unit.shard, f"{what} is not UTF-8 text (byte {error.start} of it)")
    except RecursionError:
        return Rejected(key, unit.shard, f"{what} is nested too deep")
    except ValueError as error:
        return Rejected(key, unit.shard, f"{what} is no valid JSON: {error}")


def _encoding_of(location: storage.Location) -> str:
    with storage.open_unpacked(location) as stream:
        head = stream.read(4)
    return next((encoding for mark, encoding in _ENCODINGS if head.startswith(mark)), "")


def read_beside(location: storage.Location, member: str = "") -> Iterator[Any]:
    """Entries of a file that others refer to, as ``iterate_items`` gives their values.

    Raises:
        SettingsError: it is missing or damaged.
    """
    try:
        with open_entries(location) as stream:
            yield from (item.value for item in iterate_items(stream, member))
    except (FileNotFoundError, JsonDamage, storage.DamagedFileError) as error:
        raise SettingsError(f"{location} cannot be used: {error}.") from error


@contextmanager
def open_entries(location: storage.Location) -> Iterator[BinaryIO]:
    """A file's content as UTF-8: unpacked where it is compressed, transcoded where a byte order mark says UTF-16."""
    encoding = _encoding_of(location)
    with storage.open_unpacked(location) as stream:
        yield cast(BinaryIO, _Transcoded(stream, encoding)) if encoding else stream


class _Transcoded(storage.ReadOnlyStream):
    """A stream in another encoding, read as UTF-8."""

    def __init__(self, stream: BinaryIO, encoding: str) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(encoding)(errors="replace")
        self._ready = b""

    def read(self, size: int = -1) -> bytes:
        while size < 0 or len(self._ready) < size:
            try:
                chunk = self._stream.read(storage.COPY_BYTES)
            except storage.DamagedFileError:
                if self._ready and size >= 0:
                    break  # told by the next read
                raise
            self._ready += self._decoder.decode(chunk, final=not chunk).encode("utf-8", "surrogatepass")
            if not chunk:
                break
        size = len(self._ready) if size < 0 else size
        data, self._ready = self._ready[:size], self._ready[size:]
        return data
