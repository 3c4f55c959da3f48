"""Names files that are not what they should be (LFS pointers, web pages, half downloads); reads JSON with clear errors.

Knows bytes, not models; imports neither torch nor transformers.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from tinygptv.json_object import JsonObject

_HEAD_BYTES = 1024
_LARGEST_JSON = 64 << 20
_LARGEST_HEADER = 100_000_000
"""Bytes of a safetensors header; the format's own limit."""


class FileKindError(ValueError):
    """A file is not of the kind that its name promises; the message names the file, what it is and what to do."""


def wrong_kind(path: Path) -> str:
    """Actual kind of a file that should hold weights or JSON, with the fix; empty where nothing is wrong.

    Args:
        path: an existing file.
    """
    size = path.stat().st_size
    if size == 0:
        return "an empty file: download it again"
    with path.open("rb") as stream:
        head = stream.read(_HEAD_BYTES)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself: run git lfs pull in its repository, or download the file"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page (HTML), not the file itself: download it by its direct link, signed in where that is needed"
    if head.startswith(b"GGUF"):
        return "a GGUF file of llama.cpp, which is not read here: take the original weights"
    if head.startswith(b"\x1f\x8b"):
        return "a gzip file: unpack it"
    if is_tar(head):
        return "a tar archive: unpack it"
    if head.startswith(b"\x89HDF"):
        return "an HDF5 file, which is not read here: take the PyTorch or safetensors weights"
    return ""


def is_tar(head: bytes) -> bool:
    """Whether the first 512 bytes are a tar header: its checksum is right; torch and tarfile would try to read it."""
    if len(head) < 512:
        return False
    try:
        checksum = int(head[148:156].strip(b" \0") or b"-1", 8)
    except ValueError:
        return False
    return checksum == sum(head[:148]) + 8 * 32 + sum(head[156:512])


def missing_bytes(path: Path) -> str:
    """Damage of a safetensors file, from its header; empty where it is whole or of another kind.

    Args:
        path: an existing file.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= _LARGEST_HEADER or size < 8 + length:
            return f"its header should have {length} bytes" if 2 <= length <= _LARGEST_HEADER else ""
        header = stream.read(length)
    try:
        tensors = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        wanted = 8 + length + max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ""
    return f"it has {size} bytes of {wanted}" if size < wanted else ""


def read_json_object(path: Path) -> JsonObject:
    """Read a JSON file that holds an object.

    Raises:
        FileKindError: it is missing, too large, of another kind, no valid JSON, or no object.
    """
    if not path.is_file():
        raise FileKindError(f"{path} does not exist.")
    if kind := wrong_kind(path):
        raise FileKindError(f"{path} is {kind}.")
    if path.stat().st_size > _LARGEST_JSON:
        raise FileKindError(f"{path} has {path.stat().st_size} bytes, far too many for such a file.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FileKindError(f"{path} is no valid JSON: {str(error) or type(error).__name__}.") from error
    if not isinstance(content, dict):
        raise FileKindError(f"{path} holds {_json_kind(content)} where an object {{...}} is expected.")
    return content


def _json_kind(content: Any) -> str:
    return {list: "a list", str: "a text", bool: "true or false", type(None): "null"}.get(type(content), "a number")
