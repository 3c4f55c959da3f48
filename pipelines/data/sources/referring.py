"""Phrases that name a box: RefCOCO's pickled references, and Visual Genome's regions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pipelines import storage
from pipelines.data.sources.base import (
    ENTRIES_PER_UNIT,
    Changes,
    Filtered,
    Malformed,
    ReadResult,
    Rejected,
    SourceInput,
    SourceUnit,
    find_input,
    rejection,
    shorten,
    unpack_hint,
)
from pipelines.data.sources.drafts import Draft, read_drafts
from pipelines.data.sources.images import COCO, ImageFolder, ImageLayout, find_image_folder
from pipelines.data.sources.json_entries import detect_form, plan_entries, read_beside, read_entries
from pipelines.data.sources.json_items import Item
from pipelines.data.sources.json_rows import id_of
from pipelines.data.sources.pickles import UnsafePickleError, load_plain_pickle
from pipelines.settings import SettingsError
from tinygptv.data.boxes import Box
from tinygptv.data.sample import Turn

LARGEST_REGION = 16384
"""Regions of Visual Genome of this many square pixels and more are left out, as in the release."""

_FOLDERS = ("refcoco", "refcoco+", "refcocog")
"""Official folders: RefCOCO and RefCOCO+ have files of the same names."""

IMAGES_PER_UNIT = 50
"""Images of a unit of Visual Genome: each has about fifty regions."""


@dataclass(frozen=True)
class References:
    """A slice of RefCOCO.

    Attributes:
        folder: of the images.
        entries: reference, and x, y, width, height of its box, None where its annotation is missing.
    """

    folder: storage.Location
    entries: Sequence[tuple[Any, Any]]


@dataclass(frozen=True)
class RefCocoReader:
    """``refs(<partition>).p`` and ``instances.json`` of RefCOCO, RefCOCO+ or RefCOCOg.

    Attributes:
        folder: official folder name, looked for below the input.
        partition: which of the published splits.
    """

    folder: str
    partition: str

    def plan(self, source: SourceInput) -> Iterator[SourceUnit]:
        """One unit per ``ENTRIES_PER_UNIT`` references; boxes are looked up here, so that units need no second file."""
        file, instances = self._files(source)
        folder = find_image_folder(source, file.location, COCO)
        try:
            refs = load_plain_pickle(storage.read_bytes(file.location))
        except (UnsafePickleError, ValueError) as error:
            raise SettingsError(f"{file.location} cannot be used: {error}.") from error
        if not isinstance(refs, list) or not refs:
            raise SettingsError(f"{file.location} holds no list of references: is it the right file?")
        boxes = _boxes_of(instances)
        unit = SourceUnit.of_file(source, file)
        for first in range(0, len(refs), ENTRIES_PER_UNIT):
            entries = [(_slim(ref), boxes.get(id_of(ref, "ann_id"))) for ref in refs[first : first + ENTRIES_PER_UNIT]]
            stop = first + len(entries)
            yield replace(unit, start=first, stop=stop, first=first, details=References(folder, entries))

    def read(self, unit: SourceUnit, changes: Changes | None = None) -> Iterator[ReadResult]:
        """One row per reference; its sentences are the phrases that name the box."""
        images = ImageFolder(unit.details.folder, COCO.alternatives)
        for number, (ref, bbox) in enumerate(unit.details.entries, start=unit.first):
            ref_id = id_of(ref, "ref_id")
            key = f"number {number}" if ref_id is None else str(ref_id)
            yield from read_drafts(unit, key, partial(_reference, ref, bbox), images, changes)

    def _files(self, source: SourceInput) -> tuple[storage.FoundFile, storage.Location]:
        name = f"refs({self.partition}).p"
        given = storage.Location.parse(source.input) if source.input else None
        candidates = []
        if given is not None:
            candidates = [given] if given.name.endswith(".p") else [given / name, given / self.folder / name]
        for candidate in candidates:
            if storage.exists(candidate):
                if (owner := candidate.parent.name) in _FOLDERS and owner != self.folder:
                    raise SettingsError(
                        f"{candidate} is of {owner}: source={source.source} needs the folder {self.folder}."
                    )
                return storage.find_files(candidate)[0], candidate.parent / "instances.json"
        raise SettingsError(
            f"source={source.source} needs input=: the folder with {name} and instances.json; looked for "
            f"{' and '.join(str(candidate) for candidate in candidates) or 'none: input= is empty'}"
            f"{unpack_hint(given)}."
        )


def _slim(ref: Any) -> Any:
    """Fields of a reference that a row needs; others are dropped."""
    fields = ("ref_id", "ann_id", "image_id", "split", "sentences")
    return {name: ref[name] for name in fields if name in ref} if isinstance(ref, dict) else ref


def _boxes_of(location: storage.Location) -> dict[Any, Any]:
    """Annotation id -> x, y, width, height."""
    entries = read_beside(location, "annotations")
    return {id_of(entry, "id"): entry.get("bbox") for entry in entries if isinstance(entry, dict)}


def _reference(ref: Any, bbox: Any) -> Iterator[Draft]:
    if ref["split"] != "train":
        raise Filtered("split", f"split {shorten(str(ref['split']))} does not train")
    if bbox is None:
        raise Malformed(f"annotation {ref['ann_id']} is not in instances.json")
    phrases = tuple(sentence["raw"] for sentence in ref["sentences"])
    image = f"COCO_train2014_{ref['image_id']:0>12}.jpg"
    yield Draft((Turn("", phrases),), image, (corners(*bbox),), cleans_answers=True)


def corners(x: float, y: float, width: float, height: float) -> Box:
    """x, y, width, height -> x1, y1, x2, y2. Texts of numbers are taken for these."""
    x1, y1 = float(x), float(y)
    return (x1, y1, x1 + float(width), y1 + float(height))


@dataclass(frozen=True)
class ImagePaths:
    """A slice of Visual Genome.

    Attributes:
        folder: of the images.
        paths: image id -> path below it, for the images of the slice.
    """

    folder: storage.Location
    paths: Mapping[Any, str]


def _genome_names(name: str) -> tuple[str, ...]:
    """Visual Genome's folders as its two archives unpack, each into a folder of the archive's name, or all in one."""
    base = name.rsplit("/", 1)[-1]
    folders = ("VG_100K", "VG_100K_2", "images/VG_100K", "images2/VG_100K_2", "images", "images2")
    return tuple(dict.fromkeys([name, *(f"{folder}/{base}" for folder in folders), base]))


_GENOME_FOLDERS = ("VG_100K", "VG_100K_2")
GENOME = ImageLayout((*_GENOME_FOLDERS, "."), _genome_names, frozenset(_GENOME_FOLDERS))


@dataclass(frozen=True)
class VisualGenomeReader:
    """``region_descriptions.json`` and ``image_data.json`` beside ``VG_100K`` and ``VG_100K_2``."""

    def plan(self, source: SourceInput) -> Iterator[SourceUnit]:
        """One unit per ``IMAGES_PER_UNIT`` images."""
        for file in find_input(source, "region_descriptions.json"):
            folder = find_image_folder(source, file.location, GENOME)
            paths = _image_paths(file.location.parent / "image_data.json")

            def about(
                items: list[Item], paths: dict[Any, str] = paths, folder: storage.Location = folder
            ) -> ImagePaths:
                ids = dict.fromkeys(value for item in items for value in _ids_in(item.value))  # in a fixed order
                return ImagePaths(folder, {image_id: paths[image_id] for image_id in ids if image_id in paths})

            form = detect_form(file)
            yield from plan_entries(source, file, form, about=about, entries_per_unit=IMAGES_PER_UNIT)

    def read(self, unit: SourceUnit, changes: Changes | None = None) -> Iterator[ReadResult]:
        """One row per region."""
        extra: ImagePaths = unit.details.extra
        images = ImageFolder(extra.folder, GENOME.alternatives)
        for key, entry in read_entries(unit):
            if isinstance(entry, Rejected):
                yield entry
                continue
            try:
                regions = list(entry["regions"])
            except Exception as error:  # whatever is in an entry costs that entry alone
                yield rejection(unit, key, error)
                continue
            for number, region in enumerate(regions):
                region_id = id_of(region, "region_id")
                region_key = f"{key}/{number}" if region_id is None else str(region_id)
                image_id = id_of(region, "image_id")
                image_id = id_of(entry, "id") if image_id is None else image_id
                drafts = partial(_region, region, extra.paths.get(image_id), image_id)
                yield from read_drafts(unit, region_key, drafts, images, changes)


def _ids_in(entry: Any) -> Iterator[Any]:
    """Image ids that an entry of region_descriptions.json names."""
    yield id_of(entry, "id")
    regions = entry.get("regions") if isinstance(entry, dict) else None
    if isinstance(regions, list):
        yield from (id_of(region, "image_id") for region in regions)


def _image_paths(location: storage.Location) -> dict[Any, str]:
    """Image id -> folder and file, the last two parts of its URL."""
    return {
        id_of(entry, "image_id" if "image_id" in entry else "id"): "/".join(str(entry["url"]).split("/")[-2:])
        for entry in read_beside(location)
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
    yield Draft((Turn("", (region["phrase"],)),), path, (box,), cleans_answers=True)
