"""Names of metrics, parameters and tags as MLflow allows them."""

from __future__ import annotations

import logging
import posixpath
import re
import zlib

logger = logging.getLogger(__name__)

_MAX_LENGTH = 250
_INVALID = re.compile(r"[^/\w.\- :]")


def valid_name(key: str) -> str:
    """The nearest name that MLflow accepts: letters, digits and ``_-./ :``, a plain relative path, at most 250
    characters."""
    name = posixpath.normpath(_INVALID.sub("_", key)).lstrip("/")
    name = "_" if name in ("", ".") or name.startswith("..") else name
    return name if len(name) <= _MAX_LENGTH else _with_hash(name, key)


def _with_hash(name: str, key: str) -> str:
    return f"{name[: _MAX_LENGTH - 9]}-{zlib.crc32(key.encode()):08x}"


class NameTable:
    """Valid names of one run's keys: two keys never share a name."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._owners: dict[str, str] = {}

    def valid(self, key: str) -> str:
        """The name under which a key is logged; a changed one is named in the log once."""
        if key not in self._names:
            name = valid_name(key)
            if self._owners.get(name, key) != key:
                name = _with_hash(name, key)
            if name != key:
                logger.info("%r is logged as %r: MLflow's names have letters, digits and _-./ : only.", key, name)
            self._names[key], self._owners[name] = name, key
        return self._names[key]
