"""Images that a file of requests names by path, put into the requests as data URLs."""

from __future__ import annotations

import base64
import errno
import os
from pathlib import Path
from typing import Any

from pipelines import storage
from tinygptv.data.images import without_file_scheme


def with_files(messages: Any, folder: storage.Location) -> Any:
    """The messages of a request (or its ``input``) with their images; what is wrong is left for the API to say.

    Args:
        messages: as the request has them.
        folder: that paths are relative to.

    Raises:
        OSError: a file cannot be read.
    """
    return [_message_with_files(message, folder) for message in messages] if isinstance(messages, list) else messages


def _message_with_files(message: Any, folder: storage.Location) -> Any:
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list):
        return message
    return {**message, "content": [_part_with_file(part, folder) for part in content]}


def _part_with_file(part: Any, folder: storage.Location) -> Any:
    image = part.get("image_url") if isinstance(part, dict) else None
    url = image.get("url") if isinstance(image, dict) else image
    if not isinstance(url, str) or "://" in url.removeprefix("file://") or url[:5].lower() == "data:":
        return part
    data = _read_image(folder, without_file_scheme(url))
    return {**part, "image_url": "data:;base64," + base64.b64encode(data).decode()}


def _read_image(folder: storage.Location, name: str) -> bytes:
    """An image that a request names: a path relative to the file of requests, or absolute on this machine.

    Raises:
        OSError: it cannot be read.
    """
    try:
        if folder.is_local:
            return Path(folder.path, name).read_bytes()
        location = folder / name
    except ValueError as error:  # a zero byte, or a path that climbs out
        raise FileNotFoundError(errno.ENOENT, str(error), name) from error
    try:
        return storage.read_bytes(location)
    except FileNotFoundError as error:  # storages leave out its name
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(location)) from error
