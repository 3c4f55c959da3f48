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
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs as pafs

from pipelines import storage
from pipelines.cluster import quiet_ray_data, start_ray
from pipelines.data.shards import MANIFEST as SHARD_MANIFEST
from pipelines.data.shards import ShardSet
from pipelines.progress import Bar
from pipelines.settings import CacheFeaturesSettings, SettingsError
from tinygptv.checkpoint.checkpoint import verify_folder

logger = logging.getLogger(__name__)

ENCODER_PARTS = ("vision_encoder.", "qformer.")
_OPEN_PARTS = 64
_CPU_BATCH = 32
_KNOWN_BYTES = 256 * 2**20
"""Features that a process remembers, to encode a picture of several data sets once."""


class FeatureError(ValueError):
    """A feature cache is missing, incomplete or of other weights; the text says what to do."""


def encoder_hash(checkpoint: str | Path) -> str:
    """Hash of a checkpoint's frozen encoder, the same for every dtype that holds the values exactly."""
    from tinygptv.checkpoint.weight_files import open_weights

    digest = hashlib.sha256()
    tensors = open_weights(checkpoint)
    for name in sorted(name for name in tensors if name.startswith(ENCODER_PARTS)):
        digest.update(name.encode())
        digest.update(tensors[name].load().float().numpy().tobytes())
    return digest.hexdigest()[:16]


def feature_key(checkpoint: str | Path, image_size: int) -> str:
    """Name of the features that this checkpoint's encoder gives at this image size."""
    return f"{encoder_hash(checkpoint)}-{image_size}"


class FeatureSet:
    """Cached features of one shard set, by row."""

    def __init__(self, uri: str, key: str, parts: list[dict[str, Any]]) -> None:
        self.uri, self.key, self.parts = uri, key, parts
        self.starts = np.concatenate([[0], np.cumsum([part["rows"] for part in parts])])
        self._open: OrderedDict[int, np.ndarray] = OrderedDict()

    @classmethod
    def open(cls, shard_uri: str, key: str) -> FeatureSet:
        """Open the features of a shard set.

        Args:
            shard_uri: the shard set's folder.
            key: from ``feature_key``.

        Raises:
            FeatureError: they were never computed, or not for all of today's shards.
        """
        folder = storage.join(shard_uri, "features", key)
        place = storage.join(folder, "manifest.json")
        if not storage.exists(place):
            raise FeatureError(
                f"{shard_uri} has no cached features of this encoder and image size ({key}): "
                "run jobs/cache_features.py with the checkpoint that training starts from, or set features=inline."
            )
        manifest = json.loads(storage.read_bytes(place))
        shards = ShardSet.open(shard_uri).manifest.shards
        known = {part["shard_sha256"]: part for part in manifest["parts"]}
        missing = [shard.file for shard in shards if shard.sha256 not in known]
        if missing:
            raise FeatureError(
                f"the features in {folder} lack {missing[0]}: the data changed; run jobs/cache_features.py again."
            )
        return cls(folder, key, [known[shard.sha256] for shard in shards])

    def row(self, index: int) -> np.ndarray:
        """Features [Q, F] of a row."""
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        if part not in self._open:
            while len(self._open) >= _OPEN_PARTS:
                self._open.popitem(last=False)
            self._open[part] = self._load(self.parts[part])
        return np.array(self._open[part][index - self.starts[part]])

    def _load(self, part: dict[str, Any]) -> np.ndarray:
        place = storage.join(self.uri, part["name"])
        if storage.is_local(place):
            return np.load(place.removeprefix("file://"), mmap_mode="r")
        return np.load(io.BytesIO(storage.read_bytes(place)))


def cache_features(settings: CacheFeaturesSettings) -> dict[str, Any]:
    """Compute the features of every shard set in a folder; finished parts are left as they are.

    Returns:
        ``key``, ``parts`` computed now, ``reused``, ``rows``, ``seconds``, ``result``.

    Raises:
        SettingsError: a setting cannot be used.
    """
    started = time.perf_counter()
    if not settings.checkpoint or not settings.data:
        raise SettingsError(
            "give data=DIR (prepared shard sets) and checkpoint=DIR (whose encoder computes the features)."
        )
    checkpoint = str(Path(settings.checkpoint).expanduser().absolute())
    verify_folder(checkpoint, hashes=False)
    image_size = settings.image_size or _image_size(checkpoint)
    key = feature_key(checkpoint, image_size)
    units = list(_units(settings.data, key, settings.dtype, settings.sources))
    waiting = [unit for unit in units if not _is_done(unit)]
    run = _run_inline if settings.num_workers == 0 else _run_on_ray
    run(settings, checkpoint, image_size, waiting)
    for folder in dict.fromkeys(unit["folder"] for unit in units):
        _write_manifest(folder, [unit for unit in units if unit["folder"] == folder], key, image_size, settings.dtype)
    result = {
        "key": key,
        "parts": len(waiting),
        "reused": len(units) - len(waiting),
        "rows": sum(unit["rows"] for unit in units),
        "seconds": round(time.perf_counter() - started, 1),
    }
    path = settings.output_dir("outputs/features") / "result.json"
    path.write_text(json.dumps(result, indent=1))
    return {**result, "result": str(path)}


def _image_size(checkpoint: str) -> int:
    from tinygptv.config import TinyGPTVConfig

    return TinyGPTVConfig.from_pretrained(checkpoint).vision_config.image_size


def _units(data: str, key: str, dtype: str, sources: list[str]) -> Iterator[dict[str, Any]]:
    """One work unit per shard of every shard set."""
    names = sources or _shard_sets(data)
    if not names:
        raise SettingsError(f"{data} holds no shard sets: run jobs/prepare_data.py first.")
    for name in names:
        shard_uri = storage.join(data, name)
        for number, shard in enumerate(ShardSet.open(shard_uri).manifest.shards):
            yield {
                "shards": shard_uri,
                "number": number,
                "folder": storage.join(shard_uri, "features", key),
                "name": f"{Path(shard.file).stem}.npy",
                "rows": shard.rows,
                "shard_sha256": shard.sha256,
                "dtype": dtype,
            }


def _shard_sets(data: str) -> list[str]:
    """Names of the shard sets in a folder or URI."""
    filesystem, path = storage.resolve(data)
    found = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    return sorted(f.base_name for f in found if storage.exists(storage.join(data, f.base_name, SHARD_MANIFEST)))


def _is_done(unit: dict[str, Any]) -> bool:
    """A part is finished where its record says so; the record is written after the part."""
    record = storage.join(unit["folder"], f"{unit['name']}.json")
    return storage.exists(record) and json.loads(storage.read_bytes(record))["shard_sha256"] == unit["shard_sha256"]


class FeatureWriter:
    """Computes the features of work units; one of these per Ray Data actor."""

    def __init__(self, checkpoint: str, image_size: int, batch_size: int, threads: int = 0) -> None:
        import torch

        from tinygptv.checkpoint.checkpoint import load_checkpoint

        if threads:
            torch.set_num_threads(threads)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model, _, _ = load_checkpoint(checkpoint, dtype=torch.float16 if device == "cuda" else torch.float32)
        model.set_image_size(image_size)
        self.model = model.eval().to(device)
        self.image_size = image_size
        self.known: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self.batch_size = batch_size or (_largest_batch(self.model, image_size) if device == "cuda" else _CPU_BATCH)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Ray Data's form: JSON of units in, how many were done out."""
        for text in batch["unit"]:
            self.write(json.loads(text))
        return {"done": [len(batch["unit"])]}

    def write(self, unit: dict[str, Any]) -> None:
        """Compute one part and write it, then its record."""
        shards = ShardSet.open(unit["shards"])
        start = sum(shards.shard_rows[: unit["number"]])
        config = self.model.config
        features = np.zeros(
            (unit["rows"], config.num_query_tokens, config.qformer_config.hidden_size), dtype=unit["dtype"]
        )
        waiting: dict[bytes, list[int]] = {}
        pixels: list[np.ndarray] = []
        for place in range(unit["rows"]):
            image = shards.row(start + place).image
            digest = hashlib.sha256(image).digest() if image is not None else b""
            if digest in self.known:
                features[place] = self.known[digest]
            elif digest in waiting:
                waiting[digest].append(place)
            elif image is not None:
                waiting[digest] = [place]
                pixels.append(self._pixels(image))
            if len(pixels) == self.batch_size:
                self._fill(features, waiting, pixels)
                waiting, pixels = {}, []
        if pixels:
            self._fill(features, waiting, pixels)
        stream = io.BytesIO()
        np.save(stream, features)
        data = stream.getvalue()
        storage.make_folder(unit["folder"])
        storage.write_atomically(storage.join(unit["folder"], unit["name"]), data)
        record = {**unit, "sha256": hashlib.sha256(data).hexdigest()}
        storage.write_atomically(storage.join(unit["folder"], f"{unit['name']}.json"), json.dumps(record).encode())

    def _fill(self, features: np.ndarray, waiting: dict[bytes, list[int]], pixels: list[np.ndarray]) -> None:
        """Encode pictures into all the rows that show them, and remember them: data sets share pictures."""
        for (digest, places), encoded in zip(waiting.items(), self._encode(np.stack(pixels)), strict=True):
            features[places] = encoded
            self.known[digest] = encoded
        while len(self.known) * encoded.nbytes > _KNOWN_BYTES:
            self.known.popitem(last=False)

    def _pixels(self, image: bytes) -> np.ndarray:
        from tinygptv.data.images import open_image, resize_pixels

        return resize_pixels(open_image(image), self.image_size)

    def _encode(self, pixels: np.ndarray) -> np.ndarray:
        import torch

        from tinygptv.data.images import normalise_pixels

        with torch.inference_mode():
            pixel_values = torch.from_numpy(normalise_pixels(pixels)).to(self.model.device)
            return self.model.encode_query_features(pixel_values).float().cpu().numpy()


def _largest_batch(model: Any, image_size: int) -> int:
    """Double the batch until the GPU's memory is full, then keep half."""
    import torch

    batch = 8
    while batch < 1024:
        try:
            with torch.inference_mode():
                model.encode_query_features(torch.zeros(batch * 2, 3, image_size, image_size, device=model.device))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return max(1, batch // 2)
        batch *= 2
    return batch


def _run_inline(settings: CacheFeaturesSettings, checkpoint: str, image_size: int, units: list[dict[str, Any]]) -> None:
    if not units:
        return
    writer = FeatureWriter(checkpoint, image_size, settings.batch_size)
    with Bar("computing features", quiet=settings.quiet) as bar:
        for done, unit in enumerate(units, 1):
            writer.write(unit)
            bar.update(done, len(units))


def _run_on_ray(settings: CacheFeaturesSettings, checkpoint: str, image_size: int, units: list[dict[str, Any]]) -> None:
    if not units:
        return
    import ray.data

    with start_ray(settings), Bar("computing features", quiet=settings.quiet) as bar:
        quiet_ray_data()
        gpus = settings.gpus_per_worker
        threads = max(1, (os.cpu_count() or 1) // settings.num_workers)
        done = ray.data.from_items(
            [{"unit": json.dumps(unit)} for unit in units], override_num_blocks=len(units)
        ).map_batches(
            FeatureWriter,
            fn_constructor_args=(checkpoint, image_size, settings.batch_size, threads),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=settings.num_workers),
            num_cpus=0.5,
            num_gpus=gpus or None,
        )
        for count, _ in enumerate(done.iter_rows(), 1):
            bar.update(count, len(units))


def _write_manifest(folder: str, units: list[dict[str, Any]], key: str, image_size: int, dtype: str) -> None:
    records = [json.loads(storage.read_bytes(storage.join(folder, f"{unit['name']}.json"))) for unit in units]
    kept = ("name", "rows", "shard_sha256", "sha256", "dtype")
    manifest = {
        "key": key,
        "image_size": image_size,
        "dtype": dtype,
        "parts": [{name: record[name] for name in kept} for record in records],
    }
    storage.write_atomically(storage.join(folder, "manifest.json"), json.dumps(manifest, indent=1).encode())
