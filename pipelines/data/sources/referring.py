"""Phrases that name a box: RefCOCO's pickled references, and Visual Genome's regions."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipelines import storage
from pipelines.data.sources.annotations import WRONG_ENTRY, Box, Draft, plan_json, read_drafts, read_json
from pipelines.data.sources.base import (
    ENTRIES_PER_UNIT,
    Filtered,
    ImageFolder,
    Malformed,
    ReadResult,
    Rejected,
    SourceInput,
    SourceUnit,
    find_input,
    image_folder,
)
from pipelines.data.sources.json_items import Item, JsonDamage, iterate_items
from pipelines.settings import SettingsError
from tinygptv.data.prompts import clean_caption
from tinygptv.data.sample import Turn

LARGEST_REGION = 16384
"""Regions of Visual Genome of this many square pixels and more are left out, as in the release."""

IMAGES_PER_UNIT = 50
"""Images of a unit of Visual Genome: each has about fifty regions."""


class UnsafePickleError(pickle.UnpicklingError):
    """A pickle asks for something else than plain data."""


class _PlainUnpickler(pickle.Unpickler):
    """Builds lists, tuples, dicts, strings, bytes and numbers; these need no imports, so every import is refused."""

    def find_class(self, module: str, name: str) -> Any:
        """Refuse."""
        raise UnsafePickleError(f"it asks for {module}.{name}; only lists, dicts, strings and numbers are accepted")

    def persistent_load(self, pid: Any) -> Any:
        """Refuse."""
        raise UnsafePickleError("it refers to objects outside of itself")


def load_plain_pickle(data: bytes) -> Any:
    """Unpickle plain data; strings of Python 2 are read as Latin-1.

    Raises:
        UnsafePickleError: it holds anything that would run code.
        ValueError: it is no pickle, or is cut off.
    """
    try:
        return _PlainUnpickler(io.BytesIO(data), encoding="latin1").load()
    except UnsafePickleError:
        raise
    except Exception as error:  # a damaged pickle raises almost anything
        raise ValueError(f"not a readable pickle: {error}") from error


@dataclass(frozen=True)
class RefCocoReader:
    """``refs(<partition>).p`` and ``instances.json`` of RefCOCO, RefCOCO+ or RefCOCOg.

    Attributes:
        folder: official folder name, looked for below the input.
        partition: which of the published splits.
    """

    folder: str
    partition: str

    def plan(self, location: SourceInput) -> Iterator[SourceUnit]:
        """One unit per ``ENTRIES_PER_UNIT`` references; boxes are looked up here, so that units need no second file."""
        refs_file, instances = self._files(location)
        folder = image_folder(location)
        try:
            refs = load_plain_pickle(storage.read_bytes(refs_file.place))
        except (UnsafePickleError, ValueError) as error:
            raise SettingsError(f"{refs_file.place} cannot be used: {error}.") from error
        if not isinstance(refs, list):
            raise SettingsError(f"{refs_file.place} holds a {type(refs).__name__}, not the list of references.")
        boxes = _boxes_of(instances)
        for first in range(0, len(refs), ENTRIES_PER_UNIT):
            entries = [(_slim(ref), boxes.get(_id_of(ref, "ann_id"))) for ref in refs[first : first + ENTRIES_PER_UNIT]]
            yield SourceUnit(
                location,
                refs_file.place,
                refs_file.name,
                start=first,
                stop=first + len(entries),
                first=first,
                num_bytes=refs_file.num_bytes,
                modified_ns=refs_file.modified_ns,
                details={"folder": folder, "entries": entries},
            )

    def read(self, unit: SourceUnit) -> Iterator[ReadResult]:
        """One row per reference; its sentences are the phrases that name the box."""
        images = ImageFolder(unit.details["folder"])
        for number, (ref, bbox) in enumerate(unit.details["entries"], start=unit.first):
            ref_id = _id_of(ref, "ref_id")
            key = f"number {number}" if ref_id is None else str(ref_id)
            yield from read_drafts(unit, key, partial(_reference, ref, bbox), images)

    def _files(self, location: SourceInput) -> tuple[storage.FoundFile, str]:
        name = f"refs({self.partition}).p"
        tried = []
        for folder in (location.input, storage.join(location.input, self.folder)):
            place = folder if folder.endswith(".p") else storage.join(folder, name)
            tried.append(place)
            if location.input and storage.exists(place):
                file = find_input(SourceInput(location.source, place, "", "", ""))[0]
                return file, storage.join(storage.parent(place), "instances.json")
        raise SettingsError(
            f"source={location.source} needs input=: the folder with {name} and instances.json; looked for "
            f"{' and '.join(tried)}."
        )


def _slim(ref: Any) -> Any:
    """What a row needs of a reference; anything else that it may hold stays behind."""
    if not isinstance(ref, dict):
        return ref
    return {name: ref[name] for name in ("ref_id", "ann_id", "image_id", "split", "sentences") if name in ref}


def _id_of(entry: Any, name: str) -> int | str | None:
    """An id that an entry holds; None where the entry or the id is of a wrong kind."""
    value = entry.get(name) if isinstance(entry, dict) else None
    return value if isinstance(value, int | str) else None


def _boxes_of(instances: str) -> dict[Any, Any]:
    """Annotation id -> [x, y, width, height]."""
    filesystem, path = storage.resolve(instances)
    try:
        with filesystem.open_input_stream(path, compression=None) as stream:
            entries = [item.value for item in iterate_items(stream, "annotations")]
    except (FileNotFoundError, JsonDamage) as error:
        raise SettingsError(f"{instances} cannot be used: {error}.") from error
    return {_id_of(entry, "id"): entry.get("bbox") for entry in entries if isinstance(entry, dict)}


def _reference(ref: Any, bbox: Any) -> Iterator[Draft]:
    if ref["split"] != "train":
        raise Filtered("split", f"split {ref['split']} does not train")
    if bbox is None:
        raise Malformed(f"annotation {ref['ann_id']} is not in instances.json")
    phrases = tuple(clean_caption(sentence["raw"]) for sentence in ref["sentences"])
    yield Draft((Turn("", phrases),), f"COCO_train2014_{ref['image_id']:0>12}.jpg", (corners(*bbox),))


def corners(x: float, y: float, width: float, height: float) -> Box:
    """x, y, width, height -> x1, y1, x2, y2."""
    return (float(x), float(y), float(x + width), float(y + height))


@dataclass(frozen=True)
class VisualGenomeReader:
    """``region_descriptions.json`` and ``image_data.json`` beside ``VG_100K`` and ``VG_100K_2``."""

    def plan(self, location: SourceInput) -> Iterator[SourceUnit]:
        """One unit per ``IMAGES_PER_UNIT`` images."""
        for file in find_input(location, "region_descriptions.json"):
            root = storage.parent(file.place)
            paths = _image_paths(storage.join(root, "image_data.json"))
            folder = image_folder(location, root)

            def about(items: list[Item], paths: dict[Any, str] = paths) -> dict[str, Any]:
                ids = {value for item in items for value in _ids_in(item.value)}
                return {"paths": {image_id: paths[image_id] for image_id in ids if image_id in paths}}

            yield from plan_json(location, file, "", {"folder": folder}, about=about, entries_per_unit=IMAGES_PER_UNIT)

    def read(self, unit: SourceUnit) -> Iterator[ReadResult]:
        """One row per region."""
        images = ImageFolder(unit.details.get("folder", ""))
        for key, entry in read_json(unit):
            if isinstance(entry, Rejected):
                yield entry
                continue
            try:
                regions = list(entry["regions"])
            except WRONG_ENTRY as error:
                yield Rejected(key, unit.shard, f"malformed entry: {type(error).__name__} {error}")
                continue
            for number, region in enumerate(regions):
                region_id = _id_of(region, "region_id")
                region_key = f"{key}/{number}" if region_id is None else str(region_id)
                image_id = _id_of(region, "image_id")
                image_id = _id_of(entry, "id") if image_id is None else image_id
                drafts = partial(_region, region, unit.details["paths"].get(image_id), image_id)
                yield from read_drafts(unit, region_key, drafts, images)


def _ids_in(entry: Any) -> Iterator[Any]:
    """Image ids that an entry of region_descriptions.json names."""
    yield _id_of(entry, "id")
    regions = entry.get("regions") if isinstance(entry, dict) else None
    if isinstance(regions, list):
        yield from (_id_of(region, "image_id") for region in regions)


def _image_paths(place: str) -> dict[Any, str]:
    """Image id -> folder and file, the last two parts of its URL."""
    filesystem, path = storage.resolve(place)
    try:
        with filesystem.open_input_stream(path, compression=None) as stream:
            entries = [item.value for item in iterate_items(stream)]
    except (FileNotFoundError, JsonDamage) as error:
        raise SettingsError(f"{place} cannot be used: {error}.") from error
    return {
        _id_of(entry, "image_id" if "image_id" in entry else "id"): "/".join(str(entry["url"]).split("/")[-2:])
        for entry in entries
        if isinstance(entry, dict) and "url" in entry
    }


def _region(region: Any, path: str | None, image_id: Any) -> Iterator[Draft]:
    if region["width"] * region["height"] >= LARGEST_REGION:
        raise Filtered(
            "region_area", f"region of {region['width']} x {region['height']} pixels, {LARGEST_REGION} or more in all"
        )
    if path is None:
        raise Malformed(f"image {image_id} is not in image_data.json")
    box = corners(region["x"], region["y"], region["width"], region["height"])
    yield Draft((Turn("", (clean_caption(region["phrase"]),)),), path, (box,))
