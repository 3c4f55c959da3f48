"""Local folders that settings name: one sentence where nothing can be read or written there."""

from __future__ import annotations

import os
from pathlib import Path

from pipelines.settings.errors import SettingsError
from tinygptv.folder_fault import folder_fault


def refuse_unwritable(key: str, path: Path) -> None:
    """Raise where a folder cannot be made or written to; nothing is made.

    Args:
        key: of the setting, for the message.
        path: absolute path of the folder, which may not exist yet.

    Raises:
        SettingsError: it is a file, lies below one, or nobody may write there.
    """
    nearest = next(folder for folder in (path, *path.parents) if os.path.lexists(folder))
    if not nearest.is_dir():
        kind = "a file" if nearest.exists() else "a link to nothing"
        raise SettingsError(f"{key}={path} cannot be a folder: {nearest} is {kind}. Give another {key}=.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise SettingsError(f"{key}={path} cannot be written: {nearest} is read-only for you. Give another {key}=.")


def make_local_folder(path: Path, what: str, fix: str, mode: int = 0o777) -> None:
    """Make a folder and those above it, where they are missing.

    Args:
        path: of the folder.
        what: name of the folder, for the message.
        fix: a sentence that says what to do where it cannot be made.
        mode: rights of a new folder.

    Raises:
        SettingsError: it cannot be made: a file is in the way, a folder is read-only, the disk is full.
    """
    try:
        path.mkdir(parents=True, exist_ok=True, mode=mode)
    except OSError as error:
        raise SettingsError(f"{what} {path} cannot be made: {folder_fault(path, error)}. {fix}") from error


def refuse_no_folder(key: str, location: str, holds: str) -> None:
    """Raise where a local path is missing or a file, though a folder is wanted; URIs are left to their storage.

    Args:
        key: of the setting, for the message.
        location: path or URI.
        holds: what is wanted in the folder, for the message.

    Raises:
        SettingsError: it is missing or a file.
    """
    plain = location.removeprefix("file://")
    path = Path(plain).expanduser()
    if "://" in plain or path.is_dir():
        return
    what = "is a file" if path.exists() else "does not exist"
    raise SettingsError(f"{key}={location} {what}: give the folder of {holds}.")
