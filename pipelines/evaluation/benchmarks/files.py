"""Finding the official files of a benchmark in the user's folder, however deep the archive was unpacked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def find_file(data: Path, benchmark: str, *names: str) -> Path:
    """The first of some files.

    Args:
        data: the user's folder, or one of the files itself.
        benchmark: for the error message, and the name of a folder below ``data`` that is looked into first.
        names: official file names, in order of preference; ``*`` is allowed.

    Raises:
        FileNotFoundError: none is there; the message names all that were looked for.
    """
    if data.is_file():
        if any(data.match(name) for name in names):
            return data
        data = data.parent
    for name in names:
        for folder in (data / benchmark, data):
            direct = sorted(folder.glob(name))
            found = direct or sorted(folder.rglob(name))
            if found:
                return found[0]
    raise FileNotFoundError(f"benchmark={benchmark} needs {' or '.join(names)} in data={data}; there is none.")


def try_file(data: Path, benchmark: str, *names: str) -> Path | None:
    """The same, or None."""
    try:
        return find_file(data, benchmark, *names)
    except FileNotFoundError:
        return None


class Images:
    """Finds pictures by name: each is looked for in a few folders around the annotations."""

    def __init__(self, annotations: Path, *folders: str) -> None:
        """Choose where to look.

        Args:
            annotations: annotation file; its folder and the three above it are looked into.
            folders: official folder names of the pictures.
        """
        roots = [annotations.parent, *list(annotations.parent.parents)[:3]]
        below = [*folders, *(f"images/{folder}" for folder in folders), "images", ""]
        self.folders = [path for root in roots for name in below if (path := root / name).is_dir()]

    def find(self, *names: str) -> Path:
        """Path of the first name that exists; where none does, the path that the first one should have."""
        for name in names:
            for position, folder in enumerate(self.folders):
                path = folder / name
                if path.is_file():
                    self.folders.insert(0, self.folders.pop(position))  # the next one is likely there too
                    return path
        return self.folders[0] / names[0]


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        ValueError: it is none.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON: {error}.") from error


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file.

    Raises:
        ValueError: a line is no JSON; the message names it.
    """
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}, is no valid JSON: {error}.") from error


def coco_names(image_id: int | str, year_split: str) -> Sequence[str]:
    """File names of a COCO picture: ``COCO_val2014_000000000042.jpg``, or the number alone as in later releases."""
    number = f"{int(image_id):012d}.jpg"
    return f"COCO_{year_split}_{number}", number
