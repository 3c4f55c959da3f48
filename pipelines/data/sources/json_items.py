"""Entries of large JSON files as byte ranges, found in one pass of bounded memory.

The text is scanned as Latin-1, in which every byte is one character: JSON's own marks are ASCII, so the borders are
right whatever encoding mistakes the strings hold, and they are byte positions that a worker can read directly.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

_SPACE = re.compile(r"[ \t\r\n]*")
_NUMBER_REST = re.compile(r"[-+.eE0-9]*\Z")
_DECODER = json.JSONDecoder(strict=False)  # an entry with a raw line break in it must not hide those after it
_CHUNK_BYTES = 4 << 20


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
        value: the value, its strings read as Latin-1: right for numbers and ASCII, else decode the bytes again.
    """

    start: int
    stop: int
    value_start: int
    key: str | None
    value: Any


def iterate_items(stream: BinaryIO, member: str = "") -> Iterator[Item]:
    """Entries of a JSON file, in order.

    Args:
        stream: the file, at its start.
        member: where the top level is an object, the list in it that holds the entries; empty takes the object's own
            members as entries. A list on top is taken as it is.

    Yields:
        Entries; nothing where the object has no such member.

    Raises:
        JsonDamage: the rest cannot be read.
    """
    scanner = _Scanner(stream)
    opening = scanner.next_mark()
    if opening == "[":
        yield from scanner.elements()
    elif opening == "{" and not member:
        yield from scanner.members()
    elif opening == "{":
        yield from scanner.elements_of(member)
    else:
        raise JsonDamage("the file does not start as JSON with a list or an object of entries")


def split_items(data: bytes, first_byte: int, *, keyed: bool) -> Iterator[Item]:
    """Entries of a slice that ``iterate_items`` found whole, without the brackets around them."""
    scanner = _Scanner(None, data.decode("latin-1"), first_byte)
    yield from scanner.members(closed=False) if keyed else scanner.elements(closed=False)


class _Scanner:
    """A window on the text that moves forward."""

    def __init__(self, stream: BinaryIO | None, text: str = "", base: int = 0) -> None:
        self.stream = stream
        self.text = text
        self.base = base  # byte of the file at which the window starts
        self.place = 0  # position in the window
        if stream is not None:
            self._more()
            if self.text.startswith("\u00ef\u00bb\u00bf"):  # a UTF-8 byte order mark
                self.place = 3

    def next_mark(self) -> str:
        """The next character that is no white space; empty at the end of the text."""
        while True:
            self.place = _SPACE.match(self.text, self.place).end()
            if self.place < len(self.text):
                self.place += 1
                return self.text[self.place - 1]
            if not self._more():
                return ""

    def peek_mark(self) -> str:
        """The same, left where it is."""
        mark = self.next_mark()
        self.place -= bool(mark)
        return mark

    def value(self) -> tuple[int, int, Any]:
        """First byte, one past the last, and the value that comes next."""
        self.peek_mark()
        while True:
            try:
                value, stop = _DECODER.raw_decode(self.text, self.place)
                # "1.5e" at the end of the window reads as 1.5, but the number may go on behind it
                if not _NUMBER_REST.match(self.text, stop) or not self._more():
                    break
            except (ValueError, RecursionError) as error:
                if isinstance(error, RecursionError) or not self._more():
                    raise self._damage() from error
        start, self.place = self.place, stop
        return self.base + start, self.base + stop, value

    def elements(self, *, closed: bool = True) -> Iterator[Item]:
        """Entries of a list whose opening bracket was read."""
        while self.peek_mark() not in ("]", ""):
            start, stop, value = self.value()
            yield Item(start, stop, start, None, value)
            self._forget()
            if not self._comma("]", closed=closed):
                return
        self._close("]", closed=closed)

    def members(self, *, closed: bool = True) -> Iterator[Item]:
        """Entries of an object whose opening brace was read."""
        while self.peek_mark() not in ("}", ""):
            start = self.base + self.place
            key = self._key()
            value_start, stop, value = self.value()
            yield Item(start, stop, value_start, key, value)
            self._forget()
            if not self._comma("}", closed=closed):
                return
        self._close("}", closed=closed)

    def elements_of(self, member: str) -> Iterator[Item]:
        """Entries of the list that one member of the object holds."""
        while self.peek_mark() not in ("}", ""):
            if self._key() == member and self.peek_mark() == "[":
                self.next_mark()
                yield from self.elements()
                return
            self.value()
            self._forget()
            if not self._comma("}", closed=True):
                return

    def _key(self) -> str:
        _, _, key = self.value()
        if not isinstance(key, str) or self.next_mark() != ":":
            raise self._damage()
        return key.encode("latin-1", "replace").decode("utf-8", "replace")

    def _comma(self, closing: str, *, closed: bool) -> bool:
        """Read what follows an entry; False where that was the end."""
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
        return JsonDamage(f"the file is cut off or no valid JSON after byte {self.base + self.place}")

    def _forget(self) -> None:
        """Drop what was read, now and then."""
        if self.place > _CHUNK_BYTES:
            self.text = self.text[self.place :]
            self.base += self.place
            self.place = 0

    def _more(self) -> bool:
        if self.stream is None:
            return False
        # A value larger than the window is tried again each time it grows, so it must grow in proportion.
        chunk = self.stream.read(max(_CHUNK_BYTES, len(self.text)))
        self.text += chunk.decode("latin-1")
        return bool(chunk)
