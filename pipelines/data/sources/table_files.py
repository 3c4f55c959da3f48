"""Which files of a folder are a data set: what its own lists say, one split, and no leftovers of a cache."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence

from pipelines import storage
from pipelines.data.sources.base import SourceInput, find_input, refuse_unusable, shorten, unpack_hint
from pipelines.settings import SettingsError

logger = logging.getLogger(__name__)

_PATTERNS = tuple(
    f"{folder}*.{ending}"
    for folder in ("", "data/", "train/", "*/train/")
    for ending in ("parquet", "arrow", "feather")
)
_LEFTOVER = re.compile(r"(?:^|/)(?:cache-[0-9a-f]+|tmp[^/]*|indices-[^/]*)\.arrow$")
"""Files that ``datasets`` adds to its tables: results of map and filter, orders of shuffle, half-written files."""

_SPLITS = ("train", "validation", "valid", "val", "dev", "test")
_SPLIT_NAME = re.compile(rf"(?:^|[-_./])({'|'.join(_SPLITS)})(?=[-_./\d]|$)", re.IGNORECASE)


def find_tables(source: SourceInput) -> list[storage.FoundFile]:
    """Tables of a source.

    A pattern or a file is taken as it is. Of a folder that ``save_to_disk`` wrote, the files that its ``state.json``
    lists; of any other, its Parquet and Arrow files without what a cache left among them. Where file names tell splits,
    the training split alone.

    Raises:
        SettingsError: there are none, or which split is meant cannot be told.
    """
    folder = storage.Location.parse(source.input) if source.input else None
    if folder is None or not storage.is_folder(folder):
        return find_input(source, "*.parquet")
    if storage.exists(folder / "dataset_dict.json"):
        train = folder / "train"
        if not storage.is_folder(train):
            raise SettingsError(
                f"input={source.input!r} has several splits and none is named train: name one, as input=.../SPLIT."
            )
        folder = train
    if storage.exists(folder / "state.json"):
        return _listed_files(folder)
    found = [file for pattern in _PATTERNS for file in storage.find_files(folder / pattern)]
    files = [file for file in found if not _LEFTOVER.search(f"/{file.name}")]
    if not files:
        below = storage.find_files(folder / "*/*.{parquet,arrow}", tells_missing=False)
        folders = sorted({file.location.parent.name for file in below})
        where = f" itself, but in {shorten(', '.join(folders))}: name one of these folders" if folders else ""
        where = where or unpack_hint(folder)
        raise SettingsError(f"input={source.input!r} holds neither .arrow nor .parquet files{where}.")
    refuse_unusable(files)
    return _training_split(source, sorted(files, key=lambda file: file.location))


def _listed_files(folder: storage.Location) -> list[storage.FoundFile]:
    """The files that ``save_to_disk`` lists, in its order."""
    try:
        names = [entry["filename"] for entry in json.loads(storage.read_bytes(folder / "state.json"))["_data_files"]]
        files = [storage.find_files(folder / name) for name in names]
    except (ValueError, KeyError, TypeError) as error:
        raise SettingsError(f"{folder}/state.json is not as `save_to_disk` writes it: {error}.") from error
    missing = [name for name, found in zip(names, files, strict=True) if not found]
    if missing:
        raise SettingsError(
            f"{folder} is incomplete: its state.json lists {shorten(str(missing[0]))}, which is missing."
        )
    return [file for found in files for file in found]


def _training_split(source: SourceInput, files: Sequence[storage.FoundFile]) -> list[storage.FoundFile]:
    splits = {file.location: _split_of(file.location.name) for file in files}
    known = set(splits.values())
    if known == {""} or len(known) == 1:
        return list(files)
    wanted = "train" if "train" in known else ""
    chosen = [file for file in files if splits[file.location] == wanted]
    if not chosen:
        raise SettingsError(
            f"input={source.input!r} holds the splits {', '.join(sorted(known - {''}))} and no train: name one by a "
            "pattern, as input='.../validation-*.parquet'."
        )
    others = [file.name for file in files if file not in chosen]
    logger.warning("%s: the training split alone is read; left out: %s", source.input, shorten(", ".join(others)))
    return chosen


def _split_of(name: str) -> str:
    match = _SPLIT_NAME.search(name.lower())
    return match[1] if match else ""
