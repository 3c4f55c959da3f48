"""Files that are read piece by piece: what fails is read again, from where it began."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import storage
from pipelines.storage import reading, retry

CONTENT = bytes(range(200))


@pytest.fixture
def bucket(monkeypatch):
    """A storage of one file. ``answers`` are its next ones: an error, or how many bytes come of those asked for."""
    answers, opened = [], []

    def read_at(size, start):
        answer = answers.pop(0) if answers else size
        if isinstance(answer, Exception):
            raise answer
        return CONTENT[start : start + min(size, answer)]

    def open_input_file(path):
        opened.append(path)
        return SimpleNamespace(read_at=read_at, size=lambda: len(CONTENT))

    system = SimpleNamespace(open_input_file=open_input_file)
    monkeypatch.setattr(reading, "resolve", lambda location: (system, location.path))
    monkeypatch.setattr(retry.time, "sleep", lambda seconds: None)
    return SimpleNamespace(answers=answers, opened=opened)


@pytest.mark.parametrize("fault", [OSError("connection reset"), 3, 0])
def test_a_piece_that_fails_or_comes_short_is_read_again(bucket, fault):
    with storage.open_file("s3://bucket/x") as file:
        assert file.read(10) == CONTENT[:10]
        bucket.answers += [fault, fault]
        assert file.read(10) == CONTENT[10:20] and file.tell() == 20
        assert bucket.opened == ["x"] * 3
        assert file.seek(-5, io.SEEK_END) == 195 and file.read(99) == CONTENT[195:] and file.read(9) == b""
        assert file.seek(7) == 7 and file.seek(3, io.SEEK_CUR) == 10 and file.read() == CONTENT[10:]


def test_a_refusal_is_told_at_once(bucket):
    bucket.answers.append(OSError("AWS Error ACCESS_DENIED"))
    with (
        storage.open_file("s3://bucket/x") as file,
        pytest.raises(storage.StorageError, match=r"^s3://bucket/x refuses access"),
    ):
        file.read(1)
    bucket.answers += [OSError("reset")] * retry.TRIES
    with storage.open_file("s3://bucket/x") as file, pytest.raises(storage.StorageError, match="failed 6 times"):
        file.read(1)


@pytest.mark.parametrize("root", ["local", "memory"])
def test_any_place_of_a_file_can_be_read(tmp_path, root):
    place = storage.join(str(tmp_path) if root == "local" else f"memory://reading/{tmp_path.name}", "a.json.gz")
    storage.write_atomically(place, CONTENT)
    with storage.open_file(place) as file:
        assert file.read(3) == CONTENT[:3] and file.seek(100) == 100 and file.read() == CONTENT[100:]
    with pytest.raises(FileNotFoundError), storage.open_file(place + "x"):
        pass
    sink = pa.BufferOutputStream()
    pq.write_table(table := pa.table({"a": range(1000)}), sink)
    storage.write_atomically(place, sink.getvalue().to_pybytes())
    with storage.open_file(place) as file:
        assert pq.ParquetFile(file).read() == table
