"""Entries of large JSON files as byte ranges, found in one pass of bounded memory.

The text is scanned as Latin-1, in which every byte is one character: JSON's own marks are ASCII, so the borders are
right whatever encoding mistakes the strings hold, and they are byte positions that a worker can read directly.

An entry that is no valid JSON, but whose brackets close, costs itself alone; so does one that is nested too deep, or
holds a number too long, for Python's parser.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from pipelines import storage

_SPACE = re.compile(r"[ \t\r\n]*")
_NUMBER_REST = re.compile(r"[-+.eE0-9]*\Z")
_STRUCTURE = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]|"', re.DOTALL)
_WORD = re.compile(r'[^\s,:\[\]{}"]+')
_DECODER = json.JSONDecoder(strict=False)  # an entry with a raw line break in it must not hide those after it
_CHUNK_BYTES = 4 << 20
_LONGEST_ENTRY = 64 << 20
_LOOKED_AT = 64
"""Members of an object that are looked at to see what it holds."""

BYTE_ORDER_MARK = "\u00ef\u00bb\u00bf"
"""UTF-8's, read as Latin-1."""


class JsonDamage(ValueError):
    """The text is no valid JSON from some byte on; what comes before was found."""


@dataclass(frozen=True)
class Item:
    """One entry.

    Attributes:
        start: first byte in the file: of its key where it has one, else of its value.
        stop: one past the last.
        value_start: first byte of its value.
        key: its key, where entries are the members of an object.
        value: the value, its strings read as Latin-1: right for numbers and ASCII, else decode the bytes again. None
            where the bytes are no valid JSON.
        data: bytes of the value, where they were asked for.
        part: number of the list or object that holds it, where the file has several.
    """

    start: int
    stop: int
    value_start: int
    key: str | None
    value: Any
    data: bytes = b""
    part: int = 0


def iterate_items(stream: BinaryIO, member: str = "", *, keep_data: bool = False) -> Iterator[Item]:
    """Entries of a JSON file, in order.

    Lists and objects that follow the first one are read, too: two files that were joined lose nothing.

    Args:
        stream: the file, at its start.
        member: where the top level is an object, the list in it that holds the entries; empty takes the object's own
            members as entries. A list on top is taken as it is.
        keep_data: give the items the bytes of their values.

    Yields:
        Entries; nothing where the object has no such member.

    Raises:
        JsonDamage: the rest cannot be read.
    """
    scanner = _Scanner(stream, keep_data=keep_data)
    opening = scanner.next_mark()
    if opening not in ("[", "{"):
        raise JsonDamage("the file does not start as JSON with a list or an object of entries")
    while opening:
        if opening == "[":
            yield from scanner.elements()
        elif opening == "{":
            yield from scanner.elements_of(member) if member else scanner.members()
        else:
            scanner.step_back()
            raise JsonDamage(f"after byte {scanner.byte} there is text that belongs to no entry")
        opening = scanner.next_mark()


def iterate_objects(stream: BinaryIO, *, keep_data: bool = False) -> Iterator[Item]:
    """Entries that follow each other without a list around them, over any number of lines, as ``jq`` writes them.

    Raises:
        JsonDamage: the rest cannot be read.
    """
    yield from _Scanner(stream, keep_data=keep_data).objects()


def split_items(data: bytes, first_byte: int, kind: str) -> Iterator[Item]:
    """Entries of a slice that was found whole, without the brackets around them.

    Args:
        data: the slice.
        first_byte: of it in the file.
        kind: ``members`` of an object, ``objects`` without a list, or those of a list.
    """
    scanner = _Scanner(None, data.decode("latin-1"), first_byte)
    if kind == "objects":
        yield from scanner.objects()
    else:
        yield from scanner.members(closed=False) if kind == "members" else scanner.elements(closed=False)


def outline(stream: BinaryIO) -> dict[str, str]:
    """Kinds of a JSON object's members: key -> ``list`` (of objects), ``object`` or ``other``.

    An object that begins with many objects is taken for one of entries: the rest is not looked at. Empty where the file
    holds no object, or a damaged one.
    """
    scanner = _Scanner(stream)
    found: dict[str, str] = {}
    try:
        if scanner.next_mark() != "{":
            return {}
        while len(found) < _LOOKED_AT and scanner.peek_mark() not in ("}", ""):
            key, mark = scanner.key(), scanner.peek_mark()
            if mark == "[":
                scanner.next_mark()
                found[key] = "list" if scanner.peek_mark() == "{" else "other"
                for _ in scanner.elements():
                    pass
            else:
                found[key] = "object" if mark == "{" else "other"
                scanner.value()
                scanner.forget()
            if not scanner.comma("}", closed=True):
                break
    except (JsonDamage, storage.DamagedFileError):
        pass
    return found


class _Scanner:
    """A window on the text that moves forward."""

    def __init__(self, stream: BinaryIO | None, text: str = "", base: int = 0, *, keep_data: bool = False) -> None:
        self.stream = stream
        self.keep_data = keep_data
        self.part = 0
        self.text = text
        self.base = base  # byte of the file at which the window starts
        self.position = 0  # in the window
        if stream is not None:
            self._more()
            if self.text.startswith(BYTE_ORDER_MARK):
                self.position = len(BYTE_ORDER_MARK)

    @property
    def byte(self) -> int:
        """Position in the file."""
        return self.base + self.position

    def next_mark(self) -> str:
        """The next character that is no white space; empty at the end of the text."""
        while True:
            space = _SPACE.match(self.text, self.position)
            assert space is not None, "the pattern fits everywhere"
            self.position = space.end()
            if self.position < len(self.text):
                self.position += 1
                return self.text[self.position - 1]
            if not self._more():
                return ""

    def step_back(self) -> None:
        """Before the mark that was read last."""
        self.position -= 1

    def peek_mark(self) -> str:
        """The next mark, not moved past."""
        mark = self.next_mark()
        self.position -= bool(mark)
        return mark

    def value(self) -> tuple[int, int, Any]:
        """First byte, one past the last, and the value that comes next; None for one that is no valid JSON.

        Raises:
            JsonDamage: where it ends is not known.
        """
        self.peek_mark()
        while True:
            try:
                value, stop = _DECODER.raw_decode(self.text, self.position)
            except (ValueError, RecursionError) as error:
                value, stop = None, self._end_of_broken_value()
                if stop < 0:  # it may continue behind the window
                    if len(self.text) - self.position < _LONGEST_ENTRY and self._more():
                        continue
                    raise self._damage() from error
            # "1.5e" at the end of the window reads as 1.5, but the number may continue behind it
            # Only numbers do: behind the end of another entry there may be damage.
            if not isinstance(value, int | float) or not _NUMBER_REST.match(self.text, stop) or not self._more():
                break
        start, self.position = self.position, stop
        return self.base + start, self.base + stop, value

    def _end_of_broken_value(self) -> int:
        """Where the next value ends by its brackets and quotes alone; -1 where the window does not tell."""
        if self.text[self.position : self.position + 1] not in tuple('[{"'):
            word = _WORD.match(self.text, self.position)
            return word.end() if word and (word.end() < len(self.text) or self.stream is None) else -1
        depth = 0
        for token in _STRUCTURE.finditer(self.text, self.position):
            mark = token.group()
            if mark == '"':
                return -1  # a string without an end
            depth += (mark in "[{") - (mark in "]}")
            if depth == 0:
                return token.end()
        return -1

    def elements(self, *, closed: bool = True) -> Iterator[Item]:
        """Entries of a list whose opening bracket was read."""
        self.part += 1
        while self.peek_mark() not in ("]", ""):
            start, stop, value = self.value()
            yield self._item(start, stop, start, None, value)
            self.forget()
            if not self.comma("]", closed=closed):
                return
        self._close("]", closed=closed)

    def members(self, *, closed: bool = True) -> Iterator[Item]:
        """Entries of an object whose opening brace was read."""
        self.part += 1
        while self.peek_mark() not in ("}", ""):
            start = self.byte
            key = self.key()
            value_start, stop, value = self.value()
            yield self._item(start, stop, value_start, key, value)
            self.forget()
            if not self.comma("}", closed=closed):
                return
        self._close("}", closed=closed)

    def objects(self) -> Iterator[Item]:
        """Entries on top, one after the other; a comma between them is passed over."""
        while self.peek_mark():
            start, stop, value = self.value()
            yield self._item(start, stop, start, None, value)
            self.forget()
            if self.peek_mark() == ",":
                self.next_mark()

    def _item(self, start: int, stop: int, value_start: int, key: str | None, value: Any) -> Item:
        data = self.text[value_start - self.base : stop - self.base].encode("latin-1") if self.keep_data else b""
        return Item(start, stop, value_start, key, value, data, self.part)

    def elements_of(self, member: str) -> Iterator[Item]:
        """Entries of the lists that a member of the object holds; the object is read to its end."""
        while self.peek_mark() not in ("}", ""):
            if self.key() == member and self.peek_mark() == "[":
                self.next_mark()
                yield from self.elements()
            else:
                self.value()
                self.forget()
            if not self.comma("}", closed=True):
                return
        self._close("}", closed=True)

    def key(self) -> str:
        """A member's key and its colon.

        Raises:
            JsonDamage: there is none.
        """
        _, _, key = self.value()
        if not isinstance(key, str) or self.next_mark() != ":":
            raise self._damage()
        return key.encode("latin-1", "replace").decode("utf-8", "replace")

    def comma(self, closing: str, *, closed: bool) -> bool:
        """Read what follows an entry; False where that was the end.

        Raises:
            JsonDamage: it is neither.
        """
        mark = self.next_mark()
        if mark == ",":
            return True
        if mark == closing or (mark == "" and not closed):
            return False
        raise self._damage()

    def _close(self, closing: str, *, closed: bool) -> None:
        if closed and self.next_mark() != closing:
            raise self._damage()

    def _damage(self) -> JsonDamage:
        return JsonDamage(f"the file is cut off or no valid JSON after byte {self.byte}")

    def forget(self) -> None:
        """Drop what was read, now and then."""
        if self.position > _CHUNK_BYTES:
            self.text = self.text[self.position :]
            self.base += self.position
            self.position = 0

    def _more(self) -> bool:
        if self.stream is None:
            return False
        # A value larger than the window is tried again each time it grows, so it must grow in proportion.
        chunk = self.stream.read(max(_CHUNK_BYTES, len(self.text)))
        self.text += chunk.decode("latin-1")
        return bool(chunk)
