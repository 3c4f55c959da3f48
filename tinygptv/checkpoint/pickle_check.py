"""Reads the opcodes of a pickle before anything unpickles it: a few bytes can ask for gigabytes.

An unpickler allocates for whatever memo index or length a pickle names. Here indices and lengths must fit what has
been read, and the number of opcodes is bounded, so that the memory of unpickling is bounded by the size of the file.
Imports neither torch nor transformers.
"""

from __future__ import annotations

import pickletools
from collections.abc import Collection
from mmap import mmap

MAX_OPCODES = 20_000_000
_MEMO_SLACK = 1 << 16
"""Largest lead of a memo index over the number of opcodes; picklers number entries one by one."""

_BY_CODE = {ord(opcode.code): opcode for opcode in pickletools.opcodes}
_LENGTH_BYTES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
_MEMO_BYTES = {"BINPUT": 1, "LONG_BINPUT": 4, "BINGET": 1, "LONG_BINGET": 4}
_LINES = {"GLOBAL": 2, "INST": 2}


class PickleError(ValueError):
    """A pickle is damaged, or made to use up memory."""


def check_pickle(
    data: bytes | mmap, start: int = 0, *, max_opcodes: int = MAX_OPCODES, forbidden: Collection[str] = ()
) -> int:
    """Check one pickle.

    Args:
        data: bytes or a mapped file.
        start: where the pickle begins.
        max_opcodes: most opcodes.
        forbidden: names (``module.name``) that it must not refer to.

    Returns:
        Where it ends.

    Raises:
        PickleError: it is damaged or cut off, or beyond the bounds.
    """
    place, size = start, len(data)
    for count in range(max_opcodes):
        if place >= size:
            raise PickleError("it is cut off.")
        opcode = _BY_CODE.get(data[place])
        if opcode is None:
            raise PickleError(f"byte {place} is no opcode of a pickle.")
        place += 1
        if opcode.name == "STOP":
            return place
        if opcode.arg is None:
            continue
        end = _argument_end(data, place, opcode)
        if end > size:
            raise PickleError("it is cut off.")
        argument = data[place:end] if end - place <= 1024 else b""
        if opcode.name in _MEMO_BYTES and int.from_bytes(argument, "little") > count + _MEMO_SLACK:
            raise PickleError(f"it names memo entry {int.from_bytes(argument, 'little')} after {count} opcodes.")
        if opcode.name in ("PUT", "GET") and not 0 <= _number(argument) <= count + _MEMO_SLACK:
            raise PickleError(f"it names memo entry {argument[:20]!r} after {count} opcodes.")
        if opcode.name == "FRAME" and int.from_bytes(argument, "little") > size - end:
            raise PickleError("it is cut off within a frame.")
        if opcode.name in _LINES and (name := argument.decode("latin1").strip().replace("\n", ".")) in forbidden:
            raise PickleError(f"it refers to {name}, which no weights need.")
        place = end
    raise PickleError(f"it has more than {max_opcodes} opcodes.")


def _argument_end(data: bytes | mmap, place: int, opcode: pickletools.OpcodeInfo) -> int:
    assert opcode.arg is not None
    kind = opcode.arg.n
    if kind >= 0:
        return place + kind
    if kind in _LENGTH_BYTES:
        width = _LENGTH_BYTES[kind]
        return place + width + int.from_bytes(data[place : place + width], "little")
    for _ in range(_LINES.get(opcode.name, 1)):
        found = data.find(b"\n", place)
        if found < 0:
            return len(data) + 1
        place = found + 1
    return place


def _number(text: bytes) -> int:
    try:
        return int(text)
    except ValueError:
        return -1
