"""Ray Data sets: numbers, and shard sets for your own jobs over all rows; the jobs here read shards by row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import pyarrow as pa
import ray.data
from ray.data.block import Block, BlockMetadata
from ray.data.datasource import Datasource, FileBasedDatasource, ReadTask

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


class _Numbers(Datasource):
    """Numbers in order, some in a block; each block is made by a task."""

    def __init__(self, start: int, stop: int, per_block: int) -> None:
        super().__init__()
        self._blocks = [range(first, min(first + per_block, stop)) for first in range(start, stop, per_block)]

    def __len__(self) -> int:
        return len(self._blocks)

    def estimate_inmemory_data_size(self) -> int:
        return 8 * sum(map(len, self._blocks))

    def get_read_tasks(self, parallelism: int, *_: object, **__: object) -> list[ReadTask]:
        return [
            ReadTask(partial(_table, numbers), BlockMetadata(len(numbers), 8 * len(numbers), None))
            for numbers in self._blocks
        ]


def _table(numbers: Sequence[int]) -> list[pa.Table]:
    return [pa.table({"id": pa.array(numbers, pa.int64())})]


def read_numbers(start: int, stop: int, per_block: int, *, num_cpus: float) -> ray.data.Dataset:
    """Numbers from ``start`` to before ``stop`` in the column ``id``.

    Args:
        start: the first.
        stop: one past the last.
        per_block: numbers in a block.
        num_cpus: logical CPUs of the tasks; those of ``ray.data.range`` take a whole one, which may never be free.
    """
    source = _Numbers(start, stop, per_block)
    return ray.data.read_datasource(source, num_cpus=num_cpus, override_num_blocks=max(1, len(source)))
