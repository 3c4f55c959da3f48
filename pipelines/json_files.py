"""JSON files: written whole or not at all, valid for every parser (numbers that are not finite become null)."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines import storage
from tinygptv.json_object import JsonObject

logger = logging.getLogger(__name__)


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON text of a value. NaN and the infinities, which JSON does not have, become ``null``."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file atomically; ``path`` is local or a URI.

    Raises:
        DiskFullError: there is no room; an earlier file stays as it was.
    """
    storage.write_atomically(str(path), to_json(value, indent=1).encode() + b"\n")


def read_json_object(path: str | Path) -> JsonObject | None:
    """The object in a JSON file; None where the file is missing. A damaged one is named in the log and counts as
    missing: every file that this reads can be written again."""
    try:
        content = json.loads(storage.read_bytes(str(path)))
    except FileNotFoundError:
        return None
    except ValueError:
        content = None
    if not isinstance(content, dict):
        logger.warning("%s is empty or damaged: it is ignored, and will be written again.", path)
        return None
    return content


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
