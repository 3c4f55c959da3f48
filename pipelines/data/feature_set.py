"""Cached features as training reads them: by the key of an encoder and an image size, then by row."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipelines import storage
from pipelines.data.shard_cache import ShardCache
from pipelines.data.shards import ShardSet, sizes_of
from tinygptv.json_object import JsonObject
from tinygptv.lru import LRU

FEATURES = "features"
MANIFEST = "manifest.json"
_OPEN_PARTS = 64
_COMPUTE_AGAIN = "run jobs/cache_features.py again."


class FeatureError(ValueError):
    """A feature cache is missing, incomplete or of other weights; the text says what to do."""


@dataclass(frozen=True)
class FeaturePart:
    """One file of a feature cache: the features of one shard.

    Attributes:
        name: of the file.
        rows: its rows, which are the shard's.
        shard_sha256: of the shard whose images were encoded.
        dtype: of the stored numbers.
        sha256: of the file.
        bytes: size of the file.
    """

    name: str
    rows: int
    shard_sha256: str
    dtype: str
    sha256: str = ""
    bytes: int = 0

    @classmethod
    def from_json(cls, content: JsonObject) -> FeaturePart:
        """Read what ``dataclasses.asdict`` gave; files of earlier versions have no size and more keys."""
        known = {name: content[name] for name in cls.__dataclass_fields__ if name in content}
        return cls(**known)

    def is_like(self, other: FeaturePart) -> bool:
        """Whether both hold the features of the same images in the same form."""
        return replace(self, sha256="", bytes=0) == replace(other, sha256="", bytes=0)


def encoder_hash(checkpoint: str | Path, image_size: int) -> str:
    """Hash of a checkpoint's frozen encoder, the same for every dtype that holds the values exactly.

    The position embedding is hashed as it is used at the image size (``stored_encoder``).

    Args:
        checkpoint: local folder.
        image_size: side in pixels.
    """
    from tinygptv.checkpoint.stored_weights import stored_encoder

    digest = hashlib.sha256()
    for name, values in stored_encoder(checkpoint, image_size):
        digest.update(name.encode())
        digest.update(values.float().numpy().tobytes())
    return digest.hexdigest()[:16]


def feature_key(checkpoint: str | Path, image_size: int) -> str:
    """Name of the features that this checkpoint's encoder gives at this image size."""
    return f"{encoder_hash(checkpoint, image_size)}-{image_size}"


class FeatureSet:
    """Cached features of one shard set, by row."""

    def __init__(self, uri: str, key: str, parts: Sequence[FeaturePart]) -> None:
        self.uri, self.key, self.parts = uri, key, parts
        self.starts = np.concatenate([[0], np.cumsum([part.rows for part in parts])])
        self._open: LRU[int, np.ndarray] = LRU(_OPEN_PARTS)
        self._cache = ShardCache()

    @classmethod
    def open(cls, shard_uri: str, key: str) -> FeatureSet:
        """Open the features of a shard set.

        Args:
            shard_uri: the shard set's folder.
            key: from ``feature_key``.

        Raises:
            FeatureError: they were never computed, not for all of today's shards, or a file is damaged.
        """
        folder = storage.join(shard_uri, FEATURES, key)
        try:
            manifest = json.loads(storage.read_bytes(storage.join(folder, MANIFEST)))
            known = {part["shard_sha256"]: FeaturePart.from_json(part) for part in manifest["parts"]}
        except FileNotFoundError as error:
            raise FeatureError(_none_cached(shard_uri, key)) from error
        except (ValueError, KeyError, TypeError) as error:
            raise FeatureError(f"{folder}/{MANIFEST} is damaged ({error}): {_COMPUTE_AGAIN}") from error
        shards = ShardSet.open(shard_uri).manifest.shards
        missing = [shard.file for shard in shards if shard.sha256 not in known]
        if missing:
            raise FeatureError(f"the features in {folder} lack {missing[0]}: the data changed; {_COMPUTE_AGAIN}")
        parts = [known[shard.sha256] for shard in shards]
        sizes = sizes_of(folder, [part.name for part in parts])
        for part in parts:
            if part.name not in sizes or (part.bytes and sizes[part.name] != part.bytes):
                raise FeatureError(f"{folder}/{part.name} is missing or cut off: {_COMPUTE_AGAIN}")
        return cls(folder, key, parts)

    def row(self, index: int) -> np.ndarray:
        """Features [Q, F] of a row."""
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        part = self._open.get_or_make(number, lambda: self._load(self.parts[number]))
        return np.array(part[index - self.starts[number]])

    def _load(self, part: FeaturePart) -> np.ndarray:
        location = storage.Location.parse(self.uri) / part.name
        try:
            if location.is_local:
                features: np.ndarray = np.load(location.path, mmap_mode="r")
            elif part.sha256:  # on disk and mapped: a part may take half a gigabyte, and many are open
                features = np.load(self._cache.fetch(location, part.sha256), mmap_mode="r")
            else:
                features = np.load(io.BytesIO(storage.read_bytes(location)))
            return features
        except (OSError, ValueError) as error:
            raise FeatureError(
                f"{location} cannot be read ({error}): run jobs/cache_features.py with overwrite=true: a part "
                "of the right size passes for whole without."
            ) from error


def _none_cached(shard_uri: str, key: str) -> str:
    """Sentence for features that were never computed: which, which others there are, and how to compute them."""
    folder = storage.Location.parse(shard_uri)
    others = [
        name for name in storage.list_folders(folder / FEATURES) if storage.exists(folder / FEATURES / name / MANIFEST)
    ]
    beside = f"there are others, of other weights or sizes: {', '.join(others)}; " if others else ""
    return (
        f"{folder} has no cached features of this encoder and image size ({key}: hash of the weights, pixels); {beside}"
        f"run `python jobs/cache_features.py data={folder.parent} sources=[{folder.name}] "
        f"image_size={key.rpartition('-')[2]} checkpoint=START` with the checkpoint that training starts from, or set "
        "features=inline."
    )
