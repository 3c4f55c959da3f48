"""Pickles of plain data, read without running code and without trusting the sizes that they claim."""

from __future__ import annotations

import io
import pickle
import pickletools
from typing import Any

_MOST_MEMO_STEP = 1 << 16
"""How far a memo number may be ahead of the number of opcodes: Python numbers them one by one."""

_LENGTH_BYTES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
_FIXED = {ord(o.code): o.arg.n if o.arg else 0 for o in pickletools.opcodes if not o.arg or o.arg.n >= 0}
_COUNTED = {ord(o.code): _LENGTH_BYTES[o.arg.n] for o in pickletools.opcodes if o.arg and o.arg.n in _LENGTH_BYTES}
_LINES = {
    ord(o.code): 2 if o.name in ("GLOBAL", "INST") else 1
    for o in pickletools.opcodes
    if o.arg and o.arg.n == pickletools.UP_TO_NEWLINE
}
"""Opcode -> bytes of its argument; bytes of the length that its argument begins with; lines of its argument."""


class UnsafePickleError(pickle.UnpicklingError):
    """A pickle asks for something else than plain data."""


def load_plain_pickle(data: bytes) -> Any:
    """Unpickle lists, tuples, dicts, strings, bytes and numbers; strings of Python 2 are read as Latin-1.

    The opcodes are walked before anything is built: Python's unpickler allocates the table of a memo number, or the
    buffer of a size, that seven bytes may claim to be of any size.

    Raises:
        UnsafePickleError: it asks for a class or a function, or refers to objects outside of itself.
        ValueError: it is no pickle, is cut off, or claims sizes that it does not have.
    """
    _check_opcodes(data)
    try:
        return _PlainUnpickler(io.BytesIO(data), encoding="latin1").load()
    except UnsafePickleError:
        raise
    except Exception as error:  # a damaged pickle raises almost anything
        raise ValueError(f"not a readable pickle: {error}") from error


class _PlainUnpickler(pickle.Unpickler):
    """Refuses every import: plain data needs none."""

    def find_class(self, module: str, name: str) -> Any:
        """Refuse."""
        raise UnsafePickleError(f"it asks for {module}.{name}; only lists, dicts, strings and numbers are accepted")

    def persistent_load(self, pid: Any) -> Any:
        """Refuse."""
        raise UnsafePickleError("it refers to objects outside of itself")


def _check_opcodes(data: bytes) -> None:
    """Walk the opcodes of a pickle.

    Raises:
        ValueError: it is cut off, or claims sizes or memo numbers that it does not have.
    """
    position, count, length = 0, 0, len(data)
    while position < length:
        code, start = data[position], position + 1
        if code in _FIXED:
            position = start + _FIXED[code]
        elif code in _COUNTED:
            body = start + _COUNTED[code]
            position = body + int.from_bytes(data[start:body], "little")
        elif code in _LINES:
            position = _end_of_lines(data, start, _LINES[code])
        else:
            raise ValueError(f"not a readable pickle: byte {position} is no opcode")
        if position > length:
            raise ValueError("not a readable pickle: it is cut off, or claims more data than it has")
        count += 1
        if code in _MEMO_OPCODES:
            _check_memo(code, data[start:position], count)
        elif code == _FRAME and int.from_bytes(data[start:position], "little") > length:
            raise ValueError("not a readable pickle: it claims more data than it has")
        elif code == _STOP:
            return
    raise ValueError("not a readable pickle: it has no end")


_STOP, _FRAME, _PUT, _LONG_BINPUT = (ord(mark) for mark in (".", "\x95", "p", "r"))
_MEMO_OPCODES = (_PUT, _LONG_BINPUT)


def _check_memo(code: int, argument: bytes, count: int) -> None:
    text = argument.strip()
    if code == _LONG_BINPUT:
        number = int.from_bytes(argument, "little")
    else:
        number = int(text) if text.isdigit() and len(text) < 20 else -1
    if not 0 <= number <= count + _MOST_MEMO_STEP:
        raise ValueError(f"not a readable pickle: memo number {number} after {count} opcodes")


def _end_of_lines(data: bytes, start: int, lines: int) -> int:
    for _ in range(lines):
        end = data.find(b"\n", start)
        if end < 0:
            return len(data) + 1
        start = end + 1
    return start
