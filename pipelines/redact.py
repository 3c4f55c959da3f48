"""Removes passwords from logs, records and messages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_CREDENTIALS = re.compile(r"(?<=://)[^/\s?#]*@")
_SECRET_QUERY = re.compile(r"([?&][^=&\s]*(?:password|passwd|secret|token|sig|signature|key)[^=&\s]*=)[^&\s]+", re.I)


def redact(value: Any) -> Any:
    """A value without the credentials of the URIs in it: ``http://user:password@host`` becomes ``http://***@host``.

    Mappings, lists and tuples are gone through; what is no text stays as it is.
    """
    if isinstance(value, str):
        return _SECRET_QUERY.sub(r"\1***", _CREDENTIALS.sub("***@", value))
    if isinstance(value, Mapping):
        return {key: redact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(redact(item) for item in value)
    return value


def one_line(error: BaseException, longest: int = 200) -> str:
    """What an error says, in one line of so many characters, without passwords: they are taken out before it is cut,
    because one that is cut in its middle would not be known as such."""
    return str(redact(" ".join(str(error).split())))[:longest]
