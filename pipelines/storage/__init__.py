"""Files on a local disk or in any object storage, behind pyarrow's file systems.

A location is a local path or a URI (``s3://``, ``gs://``, ``hdfs://``, ``file://``, or any protocol that fsspec knows).
What people and settings give is text; it is parsed once (``Location.parse``). Names from data are only ever added to
the path of a ``Location``, so that no name in a file can change the address that is contacted.
"""

from pipelines.storage.files import (
    COPY_BYTES,
    DRAFT_ENDING,
    AtomicFile,
    DiskFullError,
    disk_full_as_error,
    download,
    draft_of,
    exists,
    is_folder,
    link_or_copy,
    list_folders,
    list_names,
    make_folder,
    num_bytes,
    read_bytes,
    remove_drafts,
    remove_file,
    remove_folder,
    sha256,
    write_atomically,
    write_lines,
)
from pipelines.storage.find import FoundFile, expand_braces, find_files
from pipelines.storage.location import Location, file_name, is_local, join, parent, resolve
from pipelines.storage.packed import compression_of, open_unpacked, unpack

__all__ = [
    "COPY_BYTES",
    "DRAFT_ENDING",
    "AtomicFile",
    "DiskFullError",
    "FoundFile",
    "Location",
    "compression_of",
    "disk_full_as_error",
    "download",
    "draft_of",
    "exists",
    "expand_braces",
    "file_name",
    "find_files",
    "is_folder",
    "is_local",
    "join",
    "link_or_copy",
    "list_folders",
    "list_names",
    "make_folder",
    "num_bytes",
    "open_unpacked",
    "parent",
    "read_bytes",
    "remove_drafts",
    "remove_file",
    "remove_folder",
    "resolve",
    "sha256",
    "unpack",
    "write_atomically",
    "write_lines",
]
