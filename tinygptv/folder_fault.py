"""Why a folder cannot be made, as people would say it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


def folder_fault(path: Path, error: OSError) -> str:
    """What is in the way of a folder.

    Args:
        path: of the folder, which could not be made.
        error: of the attempt.

    Returns:
        Part of a sentence: ``/data/x is a file``.
    """
    path = path.absolute()
    nearest = next((each for each in (path, *path.parents) if os.path.lexists(each)), path)
    if error.errno in (errno.EEXIST, errno.ENOTDIR) and not nearest.is_dir():
        return f"{nearest} is {'a file' if nearest.exists() else 'a link to nothing'}"
    if error.errno in _FORBIDDEN:
        return f"{nearest} is read-only for you"
    return error.strerror or str(error)
