"""Pickles of plain data, read without running code and without trusting the sizes that they claim."""

from __future__ import annotations

import io
import pickle
from typing import Any

from tinygptv.checkpoint.pickle_check import check_pickle


class UnsafePickleError(pickle.UnpicklingError):
    """A pickle asks for something else than plain data."""


def load_plain_pickle(data: bytes) -> Any:
    """Unpickle lists, tuples, dicts, strings, bytes and numbers; strings of Python 2 are read as Latin-1.

    The opcodes are checked before anything is built (``pickle_check``): seven bytes can claim gigabytes.

    Raises:
        UnsafePickleError: it asks for a class or a function, or refers to objects outside of itself.
        ValueError: it is no pickle, is cut off, or claims sizes that it does not have.
    """
    try:
        check_pickle(data)
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
