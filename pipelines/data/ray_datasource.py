"""A shard set as a Ray Data set, for your own jobs over all rows; the jobs of this project read shards by row."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import ray.data
from ray.data.block import Block
from ray.data.datasource import FileBasedDatasource

from pipelines import storage
from pipelines.data.shard_format import MANIFEST, Manifest


class ArrowFileDatasource(FileBasedDatasource):
    """Arrow IPC files, one record batch after the other; Ray Data has no reader of its own for them."""

    _FILE_EXTENSIONS = ["arrow"]

    def _open_input_source(self, filesystem: pa.fs.FileSystem, path: str, **_: object) -> pa.NativeFile:
        return filesystem.open_input_file(path)  # random access: the index of an IPC file is at its end

    def _read_stream(self, f: pa.NativeFile, path: str) -> Iterator[Block]:
        reader = pa.ipc.open_file(f)
        for number in range(reader.num_record_batches):
            yield pa.Table.from_batches([reader.get_batch(number)])


def read_shards(uri: str) -> ray.data.Dataset:
    """All rows of a shard set, in row order where the execution preserves order; one read task per shard.

    Raises:
        FileNotFoundError: the folder has no manifest.
    """
    shards = Manifest.read(uri).shards
    if not shards:
        raise FileNotFoundError(f"{uri} has a {MANIFEST} but no rows.")
    folder = storage.Location.parse(uri)
    filesystem, _ = storage.resolve(folder)
    paths = [storage.resolve(folder / shard.file)[1] for shard in shards]
    source = ArrowFileDatasource(paths, filesystem=filesystem)
    return ray.data.read_datasource(source, override_num_blocks=len(paths))
