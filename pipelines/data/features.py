"""Feature cache: the frozen vision encoder's and Q-Former's outputs, computed once and kept beside the shards.

    <shard set>/features/<key>/part-00000.npy     [rows, Q, F], row k belongs to row k of part-00000.arrow
    <shard set>/features/<key>/manifest.json      encoder, image size, dtype; for each part its hash and its shard's

The key names encoder weights and image size: another encoder makes another key, so a cache can never be mistaken for
one of other weights. Rows without an image are zero.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from pipelines import storage
from pipelines.data.feature_set import FEATURES, MANIFEST, FeaturePart, feature_key
from pipelines.data.shards import ShardSet, find_shard_sets
from pipelines.node_cache import checked_checkpoint, local_checkpoint
from pipelines.progress import Bar
from pipelines.settings import CacheFeaturesSettings, SettingsError
from pipelines.settings.folders import refuse_no_folder
from pipelines.units import Workers, map_units
from tinygptv.lru import LRU

if TYPE_CHECKING:
    from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration

logger = logging.getLogger(__name__)

_CPU_BATCH = 32
_LARGEST_BATCH = 1024
_KNOWN_BYTES = 256 * 2**20
"""Features that a process remembers, to encode an image of several data sets once."""


@dataclass(frozen=True)
class FeatureUnit:
    """A part to be computed.

    Attributes:
        shards: folder of the shard set.
        number: which of its shards.
        folder: of the cache.
        part: what is to be written there.
    """

    shards: str
    number: int
    folder: str
    part: FeaturePart

    @property
    def record(self) -> str:
        """Location of the part's record, which is written after the part."""
        return storage.join(self.folder, f"{self.part.name}.json")


class FeatureResult(TypedDict):
    """``result.json`` of ``cache_features``.

    Attributes:
        key: name of the features.
        parts: computed now.
        reused: finished before.
        rows: of all parts.
        seconds: of the run.
        result: location of the file.
    """

    key: str
    parts: int
    reused: int
    rows: int
    seconds: float
    result: str


def cache_features(settings: CacheFeaturesSettings) -> FeatureResult:
    """Compute the features of every shard set in a folder; finished parts are left as they are.

    Returns:
        What stands in ``result.json``.

    Raises:
        SettingsError: a setting cannot be used, or the features are there in another dtype.
    """
    started = time.perf_counter()
    if not settings.checkpoint or not settings.data:
        raise SettingsError(
            "give data=DIR (prepared shard sets) and checkpoint=DIR (whose encoder computes the features)."
        )
    work = storage.WorkFolder(settings.output_location("outputs/features"))
    storage.check_access(work.location, writes=True)
    storage.check_access(settings.data, writes=True)
    # Actors have other working directories.
    checkpoint = storage.absolute(settings.checkpoint)
    settings = settings.model_copy(update={"data": storage.absolute(settings.data)})
    refuse_no_folder("data", settings.data, "prepared shard sets (jobs/prepare_data.py)")
    start = checked_checkpoint(checkpoint)
    image_size = settings.image_size or _image_size(start)
    key = feature_key(start, image_size)
    units = list(_find_units(settings, key))
    waiting = _waiting(settings, units)
    with _alone(sorted({unit.folder for unit in waiting})):
        waiting = _waiting(settings, waiting)  # another run may have finished some
        _begin({unit.folder for unit in waiting})
        _compute(settings, checkpoint, image_size, waiting)
        for folder in dict.fromkeys(unit.folder for unit in units):
            _write_manifest(folder, [unit for unit in units if unit.folder == folder], key, image_size, settings.dtype)
    result: FeatureResult = {
        "key": key,
        "parts": len(waiting),
        "reused": len(units) - len(waiting),
        "rows": sum(unit.part.rows for unit in units),
        "seconds": round(time.perf_counter() - started, 1),
        "result": work.uri("result.json"),
    }
    storage.write_atomically(work.uri("result.json"), json.dumps(result, indent=1).encode() + b"\n")
    if not settings.image_size:
        _tell_other_sizes(settings.recipe, image_size)
    return result


def _tell_other_sizes(recipe: str, image_size: int) -> None:
    """Say which stages do not read features of the checkpoint's own size; cached features of them are to be made."""
    from tinygptv.training.stages import RECIPES

    others = {stage.number: stage.image_size for stage in RECIPES.get(recipe, ()) if stage.image_size != image_size}
    if others:
        logger.warning(
            "these features are for %d px, the checkpoint's size; recipe %s reads %s: run this again with image_size=.",
            image_size,
            recipe,
            ", ".join(f"{size} px in stage {number}" for number, size in others.items()),
        )


def _image_size(checkpoint: Path) -> int:
    from tinygptv.checkpoint.config_file import read_config

    return read_config(checkpoint).vision_config.image_size


def _find_units(settings: CacheFeaturesSettings, key: str) -> Iterator[FeatureUnit]:
    """One unit per shard of every shard set."""
    folders = [storage.join(settings.data, name) for name in settings.sources] or find_shard_sets(settings.data)
    if not folders:
        raise SettingsError(f"data={settings.data} holds no shard sets: run jobs/prepare_data.py first.")
    for shards in folders:
        for number, shard in enumerate(ShardSet.open(shards).manifest.shards):
            part = FeaturePart(f"{Path(shard.file).stem}.npy", shard.rows, shard.sha256, settings.dtype)
            yield FeatureUnit(shards, number, storage.join(shards, FEATURES, key), part)


def _waiting(settings: CacheFeaturesSettings, units: Sequence[FeatureUnit]) -> list[FeatureUnit]:
    return [unit for unit in units if settings.overwrite or not _is_done(unit)]


@contextmanager
def _alone(folders: Sequence[str]) -> Iterator[None]:
    """Wait until no other run computes features in these folders: trainings share their data."""
    with ExitStack() as locks:
        for folder in folders:
            locks.enter_context(storage.alone(folder, wait=True))
        yield


def _begin(folders: Iterable[str]) -> None:
    """Remove what would pass for whole where parts are replaced, and what killed runs left unfinished."""
    for folder in folders:
        storage.remove_file(storage.join(folder, MANIFEST))
        storage.remove_drafts(folder)


def _is_done(unit: FeatureUnit) -> bool:
    """Whether a part is finished, as its record says, and whole.

    Raises:
        SettingsError: it is finished in another dtype.
    """
    try:
        done = FeaturePart.from_json(json.loads(storage.read_bytes(unit.record)))
    except (FileNotFoundError, ValueError, TypeError):
        return False
    if done.is_like(replace(unit.part, dtype=done.dtype)) and done.dtype != unit.part.dtype:
        raise SettingsError(
            f"{unit.folder} holds these features as {done.dtype}, and dtype={unit.part.dtype} was asked for: set "
            f"dtype={done.dtype}, or overwrite=true to compute them again."
        )
    return done.is_like(unit.part) and storage.num_bytes(storage.join(unit.folder, done.name)) == done.bytes


def _compute(settings: CacheFeaturesSettings, checkpoint: str, image_size: int, units: Sequence[FeatureUnit]) -> None:
    threads = max(1, (os.cpu_count() or 1) // settings.num_workers) if settings.num_workers else 0
    workers = Workers(settings.num_workers, num_cpus=0.5, num_gpus=settings.gpus_per_worker, reuse_setup=True)
    setup = partial(FeatureWriter, checkpoint, image_size, settings.batch_size, threads)
    with Bar("computing features", quiet=settings.quiet) as bar:
        done = map_units(setup, units, workers, settings, name="cache_features")
        for count, _ in enumerate(done, start=1):
            bar.update(count, len(units))


class FeatureWriter:
    """Computes the features of units; one of these per Ray Data actor."""

    def __init__(self, checkpoint: str, image_size: int, batch_size: int, threads: int = 0) -> None:
        import torch

        from tinygptv.checkpoint.checkpoint import load_checkpoint

        if threads:
            torch.set_num_threads(threads)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model, _, _ = load_checkpoint(
            local_checkpoint(checkpoint), dtype=torch.float16 if device == "cuda" else torch.float32
        )
        model.set_image_size(image_size)
        self.model: TinyGPTVForConditionalGeneration = model.eval().to(device)
        self.image_size = image_size
        self.known: LRU[bytes, np.ndarray] = LRU(_KNOWN_BYTES, lambda features: features.nbytes)
        self.batch_size = batch_size or (_largest_batch(self.model, image_size) if device == "cuda" else _CPU_BATCH)

    def __call__(self, unit: FeatureUnit) -> None:
        """Compute one part and write it, then its record."""
        stream = io.BytesIO()
        np.save(stream, self._features(unit))
        data = stream.getbuffer()  # no copy: a part may take a gigabyte
        storage.make_folder(unit.folder)
        storage.write_atomically(storage.join(unit.folder, unit.part.name), data)
        part = replace(unit.part, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
        storage.write_atomically(unit.record, json.dumps(asdict(part)).encode())

    def _features(self, unit: FeatureUnit) -> np.ndarray:
        """Features [rows, Q, F] of a shard; each image is encoded once, rows without one are zero."""
        shards = ShardSet.open(unit.shards)
        start = sum(shards.shard_rows[: unit.number])
        config = self.model.config
        shape = (unit.part.rows, config.num_query_tokens, config.qformer_config.hidden_size)
        features = np.zeros(shape, dtype=unit.part.dtype)
        waiting: dict[bytes, list[int]] = {}
        pixels: list[np.ndarray] = []
        for index in range(unit.part.rows):
            image = shards.row(start + index).image
            digest = hashlib.sha256(image).digest() if image is not None else b""
            known = self.known.get(digest)
            if known is not None:
                features[index] = known
            elif digest in waiting:
                waiting[digest].append(index)
            elif image is not None:
                waiting[digest] = [index]
                pixels.append(self._pixels(image))
            if len(pixels) == self.batch_size:
                self._fill(features, waiting, pixels)
                waiting, pixels = {}, []
        if pixels:
            self._fill(features, waiting, pixels)
        return features

    def _fill(self, features: np.ndarray, waiting: dict[bytes, list[int]], pixels: list[np.ndarray]) -> None:
        """Encode images into all the rows that show them, and remember them: data sets share images."""
        for (digest, indices), encoded in zip(waiting.items(), self._encode(np.stack(pixels)), strict=True):
            features[indices] = encoded
            self.known.put(digest, encoded)

    def _pixels(self, image: bytes) -> np.ndarray:
        from tinygptv.data.images import open_image, resize_pixels

        return resize_pixels(open_image(image), self.image_size)

    def _encode(self, pixels: np.ndarray) -> np.ndarray:
        import torch

        from tinygptv.data.images import normalise_pixels

        with torch.inference_mode():
            pixel_values = normalise_pixels(torch.from_numpy(pixels).to(self.model.device))
            return self.model.encode_query_features(pixel_values).float().cpu().numpy()


def _largest_batch(model: TinyGPTVForConditionalGeneration, image_size: int) -> int:
    """Double the batch until the GPU's memory is full, then keep half."""
    import torch

    batch = 8
    while batch < _LARGEST_BATCH:
        try:
            with torch.inference_mode():
                model.encode_query_features(torch.zeros(batch * 2, 3, image_size, image_size, device=model.device))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return max(1, batch // 2)
        batch *= 2
    return batch


def _write_manifest(folder: str, units: Sequence[FeatureUnit], key: str, image_size: int, dtype: str) -> None:
    parts = [json.loads(storage.read_bytes(unit.record)) for unit in units]
    manifest = json.dumps({"key": key, "image_size": image_size, "dtype": dtype, "parts": parts}, indent=1).encode()
    location = storage.join(folder, MANIFEST)
    if not storage.exists(location) or storage.read_bytes(location) != manifest:  # finished features may be read-only
        storage.write_atomically(location, manifest)
