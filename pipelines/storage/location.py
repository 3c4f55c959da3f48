"""Location of a file: a file system's address, and a path that is never parsed as an address again."""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import overload

import pyarrow.fs as pafs

from pipelines.redact import redact
from pipelines.settings import SettingsError

_QUERY = re.compile(r"\?\w+=")
"""Where the options of a URI begin (``?endpoint_override=..``); a lone ``?`` is a wildcard."""

_OBJECT_STORES = ("s3", "gs", "gcs", "az", "abfs", "abfss")
_FILE_SERVERS = ("hdfs", "viewfs", "webhdfs", "sftp", "ssh", "smb", "ftp")
_AZURE_PROTOCOLS = ("az", "abfs", "abfss")
AZURE_ACCOUNT = "AZURE_STORAGE_ACCOUNT_NAME"
"""Environment variable of the storage account where a URI names only the container."""

_ROOTED_PROTOCOLS = ("hdfs", "viewfs")
"""Protocols whose file systems begin at ``/``."""


@dataclass(frozen=True, order=True)
class Location:
    """A file or folder.

    Attributes:
        root: address of the file system: empty for the local disk, else a URI without a path, with the options that
            the user wrote: ``s3://bucket?region=eu-west-1``. The only part that is parsed as an address.
        path: in that file system, ``/`` between its parts; absolute on the local disk. ``?``, ``#``, ``%`` and ``:``
            are ordinary characters in it.
    """

    root: str
    path: str

    @classmethod
    def parse(cls, text: str | Location) -> Location:
        """Read a path or URI of the user's; a ``Location`` is returned as it is."""
        if isinstance(text, Location):
            return text
        protocol, separator, rest = text.partition("://")
        if not separator or not protocol:
            return cls("", str(Path(text).expanduser().absolute()))
        if protocol == "file":
            return cls("", "/" + rest.removeprefix("localhost").lstrip("/"))
        if "::" in text:  # fsspec's chained form: an archive in another storage
            return cls(text, "")
        match = _QUERY.search(rest)
        address, query = (rest[: match.start()], rest[match.start() :]) if match else (rest, "")
        authority, _, path = address.partition("/")
        return cls(f"{protocol}://{authority}{query}", path.strip("/"))

    @property
    def is_local(self) -> bool:
        """Whether it is on this machine's disk."""
        return not self.root

    @property
    def protocol(self) -> str:
        """``s3``, ``gs``, ..; empty for the local disk."""
        return self.root.partition("://")[0]

    @property
    def is_object_store(self) -> bool:
        """Whether folders there are only parts of names."""
        return self.protocol in _OBJECT_STORES

    @property
    def shows_partial_files(self) -> bool:
        """Whether a file there can be seen before it is complete."""
        return self.protocol in _FILE_SERVERS

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rsplit("/", 1)[-1]

    @property
    def parent(self) -> Location:
        """The folder that holds it."""
        return Location(self.root, self.path.rpartition("/")[0] or ("/" if self.is_local else ""))

    @property
    def uri(self) -> str:
        """As the user would write it: a local path, or a URI with its options."""
        if self.is_local or not self.path:
            return self.root or self.path
        match = _QUERY.search(self.root)
        address, query = (self.root[: match.start()], self.root[match.start() :]) if match else (self.root, "")
        return f"{address}/{self.path}{query}"

    def __str__(self) -> str:
        """The URI without passwords, for messages."""
        return str(redact(self.uri))

    def __truediv__(self, name: str) -> Location:
        """A file or folder below this one.

        Args:
            name: relative path; may come from data of other people.

        Raises:
            ValueError: it is empty or absolute, or climbs out of the folder.
        """
        parts = PurePosixPath(name).parts
        if not parts or parts[0] == "/" or ".." in parts or "\0" in name:
            raise ValueError(f"{name[:200]!r} is no path below a folder: it is empty or absolute, or it climbs out")
        above = [self.path.rstrip("/")] if self.path else []
        return Location(self.root, "/".join([*above, *parts]))


def resolve(location: str | Location) -> tuple[pafs.FileSystem, str]:
    """The file system of a location, and the path within it.

    Raises:
        SettingsError: nothing here can open the protocol.
    """
    location = Location.parse(location)
    if location.is_local:
        return pafs.LocalFileSystem(), location.path
    filesystem, base = _connect(location.root)
    if not location.path:
        return filesystem, base
    return filesystem, f"{base.rstrip('/')}/{location.path}" if base else location.path


@functools.lru_cache(maxsize=256)
def _connect(root: str) -> tuple[pafs.FileSystem, str]:
    """The file system of an address and its path in there; cached: a connection takes round trips."""
    protocol, _, rest = root.partition("://")
    address = f"{root}/" if protocol in _ROOTED_PROTOCOLS and "?" not in root else root
    account = os.environ.get(AZURE_ACCOUNT, "")
    if protocol in _AZURE_PROTOCOLS and "@" not in rest and account:  # az://container/path, as adlfs writes it
        container, _, query = rest.partition("?")
        address = f"abfss://{container}@{account}.dfs.core.windows.net{'?' if query else ''}{query}"
    try:
        return pafs.FileSystem.from_uri(address)
    except ValueError as error:
        if protocol in _AZURE_PROTOCOLS and "@" not in rest:
            raise SettingsError(
                f"cannot open {redact(root)}: the storage account is not known; set {AZURE_ACCOUNT} on every node."
            ) from error
        # else not one of pyarrow's own protocols; fsspec knows more
    except OSError as error:
        raise SettingsError(
            f"cannot open {redact(root)}: {error}; check the name, the region and the credentials."
        ) from error
    try:
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(root)
    except (ImportError, ValueError) as error:
        raise SettingsError(
            f"cannot open {redact(root)}: {error}; use a local path or a URI of a known protocol."
        ) from error
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path


def absolute(path: str) -> str:
    """A local path as processes in other working directories need it; URIs of other storages stay as they are."""
    return Location.parse(path).path if is_local(path) else path.rstrip("/")


def is_local(location: str | Location) -> bool:
    """Whether a location is on this machine's disk."""
    return Location.parse(location).is_local


@overload
def join(location: str, *names: str) -> str: ...
@overload
def join(location: Location, *names: str) -> Location: ...
def join(location: str | Location, *names: str) -> str | Location:
    """A location below another one. In text form, names must be ours: names from data belong into a ``Location``.

    Raises:
        ValueError: a name is empty or absolute, climbs out, or would be read as options of the URI.
    """
    joined = Location.parse(location)
    for name in names:
        joined /= name
        if not joined.is_local and isinstance(location, str) and _QUERY.search(name):
            raise ValueError(f"{name!r} would be read as options of {location}")
    if isinstance(location, Location):
        return joined
    return f"{location.rstrip('/')}/{'/'.join(names)}" if joined.is_local else joined.uri


def parent(location: str) -> str:
    """The folder of a location."""
    return Location.parse(location).parent.uri


def file_name(location: str) -> str:
    """The last part of a location."""
    return Location.parse(location).name
