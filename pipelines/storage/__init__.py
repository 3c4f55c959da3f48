"""Files on a local disk or in any object storage, behind pyarrow's file systems.

A location is a local path or a URI (``s3://``, ``gs://``, ``az://``, ``hdfs://``, ``file://``, or any protocol that
fsspec knows). Jobs take one wherever they take a path. Faults of a bucket that pass are retried (``retry``).
What people and settings give is text; it is parsed once (``Location.parse``). Names from data are only ever added to
the path of a ``Location``, so that no name in a file can change the address that is contacted.
"""

from pipelines.storage.cache_folder import CACHE_VARIABLE, LOCK, alone, default_cache, locked, secure_folder
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
    upload,
    write_atomically,
    write_lines,
)
from pipelines.storage.find import FoundFile, expand_braces, find_below, find_files
from pipelines.storage.folders import (
    WorkFolder,
    check_access,
    copy_tree,
    download_files,
    upload_folder,
)
from pipelines.storage.location import Location, absolute, file_name, is_local, join, parent, resolve
from pipelines.storage.packed import DamagedFileError, compression_of, open_unpacked, unpack
from pipelines.storage.reading import ReadOnlyStream, open_file
from pipelines.storage.retry import StorageError, with_retries

__all__ = [
    "CACHE_VARIABLE",
    "COPY_BYTES",
    "DRAFT_ENDING",
    "LOCK",
    "AtomicFile",
    "DamagedFileError",
    "DiskFullError",
    "FoundFile",
    "Location",
    "ReadOnlyStream",
    "StorageError",
    "WorkFolder",
    "absolute",
    "alone",
    "check_access",
    "compression_of",
    "copy_tree",
    "default_cache",
    "disk_full_as_error",
    "download",
    "download_files",
    "draft_of",
    "exists",
    "expand_braces",
    "file_name",
    "find_below",
    "find_files",
    "is_folder",
    "is_local",
    "join",
    "link_or_copy",
    "list_folders",
    "list_names",
    "locked",
    "make_folder",
    "num_bytes",
    "open_file",
    "open_unpacked",
    "parent",
    "read_bytes",
    "remove_drafts",
    "remove_file",
    "remove_folder",
    "resolve",
    "secure_folder",
    "sha256",
    "unpack",
    "upload",
    "upload_folder",
    "with_retries",
    "write_atomically",
    "write_lines",
]
