"""What a JSON object of a file is: a row, or a container of rows; and its id."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

_OF_FILES_TOO = frozenset({"description", "query", "response", "instruction", "output"})
"""Fields that a file of rows may have for itself, one of them beside its list."""


def first_value(text: bytes) -> Any:
    """The first value of a text; None where it is not whole, or no JSON."""
    with suppress(ValueError, RecursionError):
        return json.JSONDecoder(strict=False).raw_decode(text.decode("utf-8", "replace"))[0]
    return None


def is_row(value: Any, row_fields: Collection[str]) -> bool:
    """Whether a value is an entry: it has a field of one, and no list of objects that hold such lists themselves.

    The messages of an entry may have lists, of their parts; where these are entries themselves, so is none of this.
    """
    if not isinstance(value, dict) or not (named := set(value) & set(row_fields)):
        return False
    nested = _lists_of_objects(value)
    for name, items in nested.items():
        below = _lists_of_objects(items[0])
        if below and (name not in named or set(below) & set(row_fields)):
            return False
    return not nested or bool(named - _OF_FILES_TOO) or len(named - {"description"}) > 1


def _lists_of_objects(value: Mapping[str, object]) -> dict[str, list[Mapping[str, object]]]:
    return {
        name: items for name, items in value.items() if isinstance(items, list) and items and isinstance(items[0], dict)
    }


def is_container(value: Mapping[str, object]) -> bool:
    """Whether an object holds rows, and is none itself."""
    return bool(_lists_of_objects(value) or (value and all(isinstance(item, dict) for item in value.values())))


def id_of(entry: Any, name: str) -> int | str | None:
    """An id that can be looked up; None where an entry has none."""
    value = entry.get(name) if isinstance(entry, Mapping) else None
    return value if isinstance(value, int | str) else None
