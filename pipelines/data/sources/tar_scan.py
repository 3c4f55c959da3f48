"""Finding the members of a tar without reading its data: bounded, and continuing behind what is damaged.

Header blocks are parsed by ``tarfile``; the walk from one to the next is ours. ``tarfile``'s own walk goes backward on
a header with a negative size (for ever: CVE-2025-8194), recurses into long-name headers without bound, and takes a
damaged header for the end.
"""

from __future__ import annotations

import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

BLOCK = tarfile.BLOCKSIZE
_EMPTY_BLOCK = bytes(BLOCK)
_LONGEST_NAME = 64 << 10
"""Most bytes of a header that extends the next one (a long name, pax records); real ones have a few hundred."""

_MOST_EXTENSIONS = 16
"""Most such headers in a row before a member."""

_SEARCH_BYTES = 1 << 20


class Member(NamedTuple):  # three per sample: a fifth of a dataclass's cost
    """A member of a tar.

    Attributes:
        name: as the tar gives it; bytes that are no UTF-8 are surrogates.
        start: first byte of its data.
        size: of its data.
        offset: of its first header.
        is_file: a regular file; else a link, a device or a folder.
        is_folder: a folder.
    """

    name: str
    start: int
    size: int
    offset: int
    is_file: bool
    is_folder: bool


@dataclass
class TarScan:
    """A walk through a tar.

    Attributes:
        problems: what could not be read, in order; complete when the walk is.
    """

    file: BinaryIO
    num_bytes: int
    problems: list[str] = field(default_factory=list)

    def members(self) -> Iterator[Member]:
        """Members in order. Never raises for what is in the file."""
        if self.num_bytes == 0:
            self.problems.append("the tar is empty (0 bytes)")
            return
        offset, is_cut, found_any, has_end = 0, False, False, False
        while offset + BLOCK <= self.num_bytes:
            block = self._read(offset, BLOCK)
            if block == _EMPTY_BLOCK:
                has_end = True
                offset += BLOCK
                continue
            member = _plain_member(block, offset) or self._member_at(offset)
            if member is None:
                behind = self._next_header(offset + BLOCK)
                self._tell_damage(offset, behind, found_any)
                if behind is None:
                    return
                offset = behind
                continue
            found_any, has_end = True, False
            is_cut = member.start + member.size > self.num_bytes  # its sample says so
            yield member
            offset = member.start + -(-member.size // BLOCK) * BLOCK
        rest = self.num_bytes - offset
        if rest > 0 and not self._is_zero(offset, rest):
            self._tell_damage(offset, None, found_any)
        elif found_any and not has_end and not is_cut:
            self.problems.append("the tar has no end mark, so it may be cut off between two samples")

    def _tell_damage(self, start: int, stop: int | None, found_any: bool) -> None:
        if stop is not None:
            self.problems.append(f"the tar is damaged: bytes {start} to {stop} hold no readable member")
        elif found_any:
            self.problems.append(f"the tar is cut off or damaged after byte {start}: nothing readable follows")
        else:
            self.problems.append("the file is no tar, or its first header is damaged")

    def _member_at(self, offset: int) -> Member | None:
        """The member whose headers begin at ``offset``; None where they are damaged."""
        first, name, size = offset, "", None
        for _ in range(_MOST_EXTENSIONS):
            info = self._header_at(offset)
            if info is None:
                return None
            start = offset + BLOCK
            if info.type not in _EXTENSIONS:
                size = info.size if size is None else size
                if size < 0:
                    return None
                # Links and folders have no data, whatever size their header gives.
                has_data = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES
                return Member(name or info.name, start, size if has_data else 0, first, info.isreg(), info.isdir())
            if not 0 <= info.size <= _LONGEST_NAME or start + info.size > self.num_bytes:
                return None
            data = self._read(start, info.size)
            if info.type == tarfile.GNUTYPE_LONGNAME:
                name = data.partition(b"\0")[0].decode("utf-8", "surrogateescape")
            elif info.type == tarfile.XHDTYPE:
                records = _pax_records(data)
                name = records.get("path", name)
                size = _number(records["size"]) if "size" in records else size
            offset = start + -(-info.size // BLOCK) * BLOCK
        return None

    def _header_at(self, offset: int) -> tarfile.TarInfo | None:
        if offset + BLOCK > self.num_bytes:
            return None
        try:
            return tarfile.TarInfo.frombuf(self._read(offset, BLOCK), "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError):
            return None

    def _next_header(self, offset: int) -> int | None:
        """The next block that is a readable header."""
        while offset + BLOCK <= self.num_bytes:
            data = self._read(offset, _SEARCH_BYTES)
            for start in range(0, len(data) - BLOCK + 1, BLOCK):
                block = data[start : start + BLOCK]
                if block[257:262] == b"ustar" or block[148:154].strip(b" \0").isdigit():
                    try:
                        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
                    except (tarfile.HeaderError, ValueError):
                        continue
                    return offset + start
            offset += max(BLOCK, len(data) // BLOCK * BLOCK)
        return None

    def _is_zero(self, offset: int, num_bytes: int = BLOCK) -> bool:
        while num_bytes > 0:
            data = self._read(offset, min(num_bytes, _SEARCH_BYTES))
            if not data or data.count(0) != len(data):
                return not data
            offset, num_bytes = offset + len(data), num_bytes - len(data)
        return True

    def _read(self, offset: int, num_bytes: int) -> bytes:
        self.file.seek(offset)
        return self.file.read(num_bytes)


_EXTENSIONS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, b"X")
"""Types of headers that say more about the member behind them. ``X`` is Solaris' pax header."""


_PLAIN_NUMBERS = re.compile(rb"(?:[0-7]{7}\0){3}([0-7]{11})\0[0-7]{11}\0([0-7]{6})\0 0")
"""A header's bytes from 100 on, as ``tar`` and Python write them for a regular file: size and checksum are groups."""

_CHECKSUM = slice(148, 156)


def _plain_member(block: bytes, offset: int) -> Member | None:
    """A regular file with a short name, several times faster than ``tarfile`` finds it; None for all else."""
    numbers = _PLAIN_NUMBERS.match(block, 100)
    if numbers is None or block[345] or block[329:345].strip(b"01234567\0") or not block[0]:
        return None
    if _byte_sum(block) - _byte_sum(block[_CHECKSUM]) + 8 * ord(" ") != int(numbers[2], 8):
        return None
    name = block[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape")
    return Member(name, offset + BLOCK, int(numbers[1], 8), offset, is_file=True, is_folder=False)


def _byte_sum(data: bytes) -> int:
    """``sum(data)`` of a header that is mostly text, ten times faster: that is half of Adler-32, modulo 65521."""
    return (zlib.adler32(data) & 0xFFFF) - 1


def _pax_records(data: bytes) -> dict[str, str]:
    r"""Records ``LENGTH KEY=VALUE\n`` of a pax header; a malformed record ends them."""
    records: dict[str, str] = {}
    position = 0
    while position < len(data):
        length_text, space, _ = data[position : position + 24].partition(b" ")
        length = _number(length_text.decode("latin-1"))
        if not space or length is None or length <= len(length_text) + 1 or position + length > len(data):
            break
        key, _, value = data[position + len(length_text) + 1 : position + length].rstrip(b"\n").partition(b"=")
        records[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        position += length
    return records


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 19 else None
