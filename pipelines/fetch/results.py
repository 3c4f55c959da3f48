"""What a fetch writes: entries of its lock file, and its result."""

from __future__ import annotations

from typing import NotRequired, TypedDict

LOCK_FILE = "fetch.lock.json"


class LockEntry(TypedDict):
    """A file in ``fetch.lock.json``.

    Attributes:
        bytes: its size.
        sha256: in hexadecimal.
        modified_ns: when it was last changed, in nanoseconds since 1970.
        address: where the publisher has it.
        revision: commit of the repository; empty for other addresses.
        license: as the publisher states it.
    """

    bytes: int
    sha256: str
    modified_ns: int
    address: str
    revision: str
    license: str


class SampleResult(TypedDict):
    """What ``FetchResult`` says of samples."""

    rows: int
    files: list[str]
    images: int
    lost: int


class FetchResult(TypedDict):
    """``result.json`` of a fetch.

    Attributes:
        folder: that holds the files.
        files: path below the folder -> its entry in the lock file.
        bytes_downloaded: by this run.
        num_bytes: of all files, here or not, as published or as their servers say; not of samples.
        by_hand: what a person has to fetch, a sentence each.
        commands: what downloads the images of lists of links.
        sample: of samples: rows of each set, the annotations that are done, images fetched and not there.
        result: path of this file.
    """

    folder: str
    files: dict[str, LockEntry]
    bytes_downloaded: int
    num_bytes: NotRequired[int]
    by_hand: list[str]
    commands: list[str]
    sample: NotRequired[SampleResult]
    result: str
